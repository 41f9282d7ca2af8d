//! Two regions of which one has two nodes: a client of the node without links misses nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use automerge::AutoCommit;
use isobar::config::ClusterKey;
use isobar::demo::links::{Distance, Proxy};
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::wire::{
    EXTRA_RECEIPTS, RemoteHeads, encode_remote_heads_changed, encode_remote_subscription_change,
};

use super::exchange::{all_hear, meet};
use super::{Shared, region_at, sees};
use crate::support::{Client, Faults, FaultyStorage, Node, document_id, eventually, get, put};

/// Region "near" of two nodes, of which the first keeps the links, and region "far", behind a way that can be cut.
struct Scene {
    database: Shared,
    key: ClusterKey,
    keeper: Node,
    other: Node,
    far: Node,
    faults: Arc<Faults>,
    way: Proxy,
}

impl Scene {
    async fn start(database: Shared) -> Self {
        let key = ClusterKey::random();
        let (storage, faults) = FaultyStorage::new(&MemoryStorage::new());
        let far = Node::start_with(region_at("far", &key, &[]), storage).await;
        let distance = Distance::of(Duration::from_millis(2));
        let way = Proxy::start(far.peers.unwrap(), distance).await.unwrap();
        let start =
            async || Node::start_on(region_at("near", &key, &[way.address()]), database.open().await).await;
        let keeper = start().await;
        eventually("the first keeps the links", async || keeper.metric("isobar_keeps_links").await == 1.0)
            .await;
        let other = start().await;
        let scene = Self { database, key, keeper, other, far, faults, way };
        is_told_of_far(&scene.keeper).await;
        is_told_of_far(&scene.other).await;
        scene
    }
}

/// What a node says of region "far" to its clients: whether it is up; nothing if it does not know it.
async fn far_is_up(node: &Node) -> Option<bool> {
    let (_, body) = get(node.clients, "/regions").await;
    let regions: serde_json::Value = serde_json::from_str(&body).unwrap();
    regions.as_array().unwrap().iter().find(|it| it["name"] == "far").and_then(|it| it["up"].as_bool())
}

async fn is_told_of_far(node: &Node) {
    eventually("far is known to be up", async || far_is_up(node).await == Some(true)).await;
}

async fn following(node: &Node, name: &str) -> Client {
    Client::join_as(node.clients, "", name, &[EXTRA_RECEIPTS]).await.unwrap()
}

async fn share(client: &mut Client, document: &DocumentId, actor: u8) {
    let mut doc = AutoCommit::new().with_actor([actor; 16].into());
    put(&mut doc, "key", 0);
    client.share(document, doc).await;
    client.in_step(document).await;
}

fn is_saved_in(client: &mut Client, document: &DocumentId, region: &str) -> bool {
    let heads = client.open(document).heads();
    client.receipts.get(&(document.clone(), region.to_owned())).is_some_and(|saved| saved.heads == heads)
}

/// What was said last that region "far" holds.
fn told_of_far(client: &Client, document: &DocumentId) -> Option<Vec<ChangeHash>> {
    client.receipts.get(&(document.clone(), "far".to_owned())).map(|saved| saved.heads.clone())
}

async fn saved_in(client: &mut Client, document: &DocumentId, region: &str) {
    let name = client.peer.to_string();
    client.until(&format!("{name}: saved in {region}"), |it| is_saved_in(it, document, region)).await;
}

/// Has a document be in region "far" without any log that names it.
async fn put_beside_the_logs(far: &Node, document: &DocumentId) {
    let elsewhere = Node::start(MemoryStorage::new()).await;
    let mut author = Client::join(elsewhere.clients, "author").await;
    share(&mut author, document, 9).await;
    let contents = elsewhere.parts.documents.contents(document).await.unwrap().unwrap();
    far.parts.documents.store_contents(contents, &far.parts.committer).await.unwrap();
}

async fn presence_passes_through_the_keeper(database: Shared) {
    let scene = Scene::start(database).await;
    let document = document_id("document");
    let mut one = Client::join(scene.other.clients, "at the other").await;
    share(&mut one, &document, 1).await;
    let mut far = Client::join(scene.far.clients, "far").await;
    far.share(&document, AutoCommit::new()).await;
    sees(&mut far, &document, "key", 0).await;
    // Nobody has it open at the keeper.
    let (mut of_one, mut of_far, mut of_kept) = (0, 0, 0);
    meet(&mut one, &mut far, &document, &mut of_one).await;
    meet(&mut far, &mut one, &document, &mut of_far).await;
    all_hear(&mut one, &mut [&mut far], &document, &mut of_one).await;
    all_hear(&mut far, &mut [&mut one], &document, &mut of_far).await;

    let mut kept = Client::join(scene.keeper.clients, "at the keeper").await;
    kept.fetch(&document).await;
    meet(&mut far, &mut kept, &document, &mut of_far).await;
    meet(&mut one, &mut kept, &document, &mut of_one).await;
    meet(&mut kept, &mut one, &document, &mut of_kept).await;
    all_hear(&mut one, &mut [&mut far, &mut kept], &document, &mut of_one).await;
    all_hear(&mut far, &mut [&mut one, &mut kept], &document, &mut of_far).await;
    all_hear(&mut kept, &mut [&mut one, &mut far], &document, &mut of_kept).await;
}

#[tokio::test]
async fn presence_passes_through_the_keeper_between_all_nodes_and_regions() {
    presence_passes_through_the_keeper(Shared::memory()).await;
}

#[tokio::test]
async fn presence_passes_through_the_keeper_between_all_nodes_and_regions_on_postgres() {
    presence_passes_through_the_keeper(Shared::postgres().await).await;
}

async fn a_document_that_only_another_region_has_is_found(database: Shared) {
    let scene = Scene::start(database).await;
    let (found, nowhere, late) = (document_id("found"), document_id("nowhere"), document_id("late"));
    put_beside_the_logs(&scene.far, &found).await;
    let mut client = Client::join(scene.other.clients, "client").await;
    client.share(&found, AutoCommit::new()).await;
    sees(&mut client, &found, "key", 0).await;
    assert_eq!(client.open(&found).unavailable, 0, "it was waited for");
    client.share(&nowhere, AutoCommit::new()).await;
    client.until("it is nowhere", |it| it.open(&nowhere).unavailable > 0).await;

    // What the keeper finds for its own client comes to those who have given up hope elsewhere.
    client.share(&late, AutoCommit::new()).await;
    client.until("it is not there yet", |it| it.open(&late).unavailable > 0).await;
    put_beside_the_logs(&scene.far, &late).await;
    let mut kept = Client::join(scene.keeper.clients, "kept").await;
    kept.share(&late, AutoCommit::new()).await;
    sees(&mut kept, &late, "key", 0).await;
    sees(&mut client, &late, "key", 0).await;
}

#[tokio::test]
async fn a_document_that_only_another_region_has_is_found_from_every_node() {
    a_document_that_only_another_region_has_is_found(Shared::memory()).await;
}

#[tokio::test]
async fn a_document_that_only_another_region_has_is_found_from_every_node_on_postgres() {
    a_document_that_only_another_region_has_is_found(Shared::postgres().await).await;
}

#[tokio::test]
async fn every_node_names_the_regions_and_refuses_what_clients_say_of_them() {
    let scene = Scene::start(Shared::memory()).await;
    let document = document_id("document");
    let mut liar = Client::join(scene.other.clients, "liar").await;
    share(&mut liar, &document, 1).await;
    let heads = liar.open(&document).heads();
    let claim = RemoteHeads { storage_id: scene.far.parts.storage_id.clone(), heads, timestamp: 4e12 };
    let frame = encode_remote_heads_changed(&liar.peer, &liar.server, &document, &[claim]);
    liar.send_raw(frame).await;
    liar.write(&document, |doc| put(doc, "key", 1)).await;
    assert_eq!(scene.other.metric("isobar_region_claims_dropped_total").await, 1.0);

    let convergence = async |node: &Node| -> serde_json::Value {
        serde_json::from_str(&get(node.admin, "/admin/v1/convergence").await.1).unwrap()
    };
    assert_eq!(convergence(&scene.keeper).await["keeps_links"], true);
    assert_eq!(convergence(&scene.other).await["keeps_links"], false);
    assert_eq!(get(scene.keeper.admin, "/admin/v1/peers").await.0, 200);
    assert_eq!(get(scene.other.admin, "/admin/v1/peers").await.0, 409);

    scene.far.stop().await.unwrap();
    for node in [&scene.keeper, &scene.other] {
        eventually("far is known to be down", async || far_is_up(node).await == Some(false)).await;
    }
    // One that comes later hears of it, too, and so does who takes over.
    let third = Node::start_on(region_at("near", &scene.key, &[]), scene.database.open().await).await;
    eventually("it is told", async || far_is_up(&third).await == Some(false)).await;
    scene.keeper.kill().await;
    eventually("another takes over", async || scene.other.metric("isobar_keeps_links").await == 1.0).await;
    assert_eq!(far_is_up(&scene.other).await, Some(false));
}

async fn receipts_come_through_the_keeper(database: Shared) {
    let scene = Scene::start(database).await;
    let document = document_id("document");
    let mut client = following(&scene.other, "client").await;
    share(&mut client, &document, 1).await;
    saved_in(&mut client, &document, "near").await;
    saved_in(&mut client, &document, "far").await;
    let saved = &client.receipts[&(document.clone(), "far".to_owned())];
    assert_eq!(saved.storage_id, scene.far.parts.storage_id);

    // Also of what others write, at each place.
    let mut kept = following(&scene.keeper, "kept").await;
    kept.fetch(&document).await;
    let mut far = following(&scene.far, "far").await;
    far.fetch(&document).await;
    for (round, author) in [(1, &mut kept), (2, &mut far)] {
        author.write(&document, |doc| put(doc, &format!("round {round}"), round)).await;
        sees(&mut client, &document, &format!("round {round}"), round).await;
        saved_in(&mut client, &document, "far").await;
    }
    saved_in(&mut kept, &document, "far").await;
    saved_in(&mut far, &document, "near").await;

    // Nothing is claimed that is not stored there, however much is stored here.
    scene.faults.hold_appends();
    let before = told_of_far(&client, &document);
    let begun = scene.faults.appends.load(Ordering::SeqCst);
    for round in 3..6 {
        client.write(&document, |doc| put(doc, &format!("round {round}"), round)).await;
        saved_in(&mut client, &document, "near").await;
    }
    eventually("it is there", async || scene.faults.appends.load(Ordering::SeqCst) > begun).await;
    let mut late = following(&scene.other, "late").await;
    late.fetch(&document).await;
    for round in 6..9 {
        kept.write(&document, |doc| put(doc, &format!("round {round}"), round)).await;
        sees(&mut client, &document, &format!("round {round}"), round).await;
        saved_in(&mut client, &document, "near").await;
    }
    sees(&mut late, &document, "round 8", 8).await;
    saved_in(&mut late, &document, "near").await;
    for client in [&client, &late] {
        assert_eq!(told_of_far(client, &document), before, "more is not stored");
    }
    scene.faults.release_appends();
    saved_in(&mut client, &document, "far").await;
    saved_in(&mut late, &document, "far").await;

    // The region is cut off, and comes back.
    let before = told_of_far(&client, &document);
    scene.way.cut();
    for round in 9..12 {
        client.write(&document, |doc| put(doc, &format!("round {round}"), round)).await;
        saved_in(&mut client, &document, "near").await;
    }
    assert_eq!(told_of_far(&client, &document), before, "nothing gets there");
    scene.way.heal();
    saved_in(&mut client, &document, "far").await;
}

#[tokio::test]
async fn receipts_come_through_the_keeper_and_none_too_early() {
    receipts_come_through_the_keeper(Shared::memory()).await;
}

#[tokio::test]
async fn receipts_come_through_the_keeper_and_none_too_early_on_postgres() {
    receipts_come_through_the_keeper(Shared::postgres().await).await;
}

#[tokio::test]
async fn a_stock_client_of_any_node_hears_what_another_region_holds() {
    let scene = Scene::start(Shared::memory()).await;
    let document = document_id("document");
    let there = scene.far.parts.storage_id.clone();
    let mut watcher = Client::join(scene.other.clients, "watcher").await;
    let frame =
        encode_remote_subscription_change(&watcher.peer, &watcher.server, std::slice::from_ref(&there), &[]);
    watcher.send_raw(frame).await;
    share(&mut watcher, &document, 1).await;
    let heads = watcher.open(&document).heads();
    let of_far = (document.clone(), there);
    watcher.until("far has it", |it| it.remote_heads.get(&of_far) == Some(&heads)).await;
}

async fn who_takes_over_knows_all_anew(database: Shared) {
    let scene = Scene::start(database).await;
    let (document, found, again) = (document_id("document"), document_id("found"), document_id("again"));
    let mut client = following(&scene.other, "client").await;
    share(&mut client, &document, 1).await;
    saved_in(&mut client, &document, "far").await;
    put_beside_the_logs(&scene.far, &found).await;
    put_beside_the_logs(&scene.far, &again).await;
    // A search is under way at the end of who would make it.
    scene.faults.hold_loads();
    let loads = scene.faults.loads.load(Ordering::SeqCst);
    client.share(&found, AutoCommit::new()).await;
    eventually("it is looked for", async || scene.faults.loads.load(Ordering::SeqCst) > loads).await;
    let Scene { database, key, keeper, other, far, faults, way } = scene;
    keeper.kill().await;
    client.write(&document, |doc| put(doc, "meanwhile", 1)).await;
    client.until("it is not found", |it| it.open(&found).unavailable > 0).await;
    faults.release_loads();

    // The node keeps the links itself now.
    is_told_of_far(&other).await;
    saved_in(&mut client, &document, "far").await;
    client.share(&again, AutoCommit::new()).await;
    sees(&mut client, &again, "key", 0).await;
    // One that comes stands to it as it stood to the other.
    let third = Node::start_on(region_at("near", &key, &[way.address()]), database.open().await).await;
    is_told_of_far(&third).await;
    let mut new = following(&third, "new").await;
    new.fetch(&document).await;
    saved_in(&mut new, &document, "far").await;
    new.share(&found, AutoCommit::new()).await;
    sees(&mut new, &found, "key", 0).await;
    sees(&mut client, &found, "key", 0).await;
    // The end of the second keeper, while nothing gets to the other region.
    let before = told_of_far(&new, &document);
    way.cut();
    new.write(&document, |doc| put(doc, "cut", 1)).await;
    drop(client);
    other.kill().await;
    new.write(&document, |doc| put(doc, "alone", 1)).await;
    saved_in(&mut new, &document, "near").await;
    assert_eq!(told_of_far(&new, &document), before);
    way.heal();
    saved_in(&mut new, &document, "far").await;
    assert_eq!(far.metric("isobar_origins_forked_total").await, 0.0);
}

#[tokio::test]
async fn who_takes_over_the_links_knows_all_anew() {
    who_takes_over_knows_all_anew(Shared::memory()).await;
}

#[tokio::test]
async fn who_takes_over_the_links_knows_all_anew_on_postgres() {
    who_takes_over_knows_all_anew(Shared::postgres().await).await;
}
