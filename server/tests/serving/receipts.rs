//! Receipts: a client is told that a region holds its document when it does, and not before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use automerge::AutoCommit;
use isobar::config::{ClusterKey, PeerAddress, Settings};
use isobar::demo::links::{Distance, Proxy};
use isobar::storage::Storage;
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::{DocumentId, StorageId};
use isobar_protocol::wire::{
    EXTRA_RECEIPTS, RemoteHeads, encode_remote_heads_changed, encode_remote_subscription_change,
};

use crate::support::{
    Client, Faults, FaultyStorage, Node, document_id, eventually, get, number, put, settings,
};

/// How many changes go back and forth while something is not to happen: each takes at least as long as a receipt would.
const ROUNDS: i64 = 4;

/// How long nothing is to happen for: several times as long as a receipt takes.
const QUIET: Duration = Duration::from_millis(500);

fn region(name: &str, key: &ClusterKey, peers: &[std::net::SocketAddr]) -> Settings {
    Settings {
        region: name.to_owned(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        peers: peers.iter().map(|peer| PeerAddress::WebSocket(format!("ws://{peer}"))).collect(),
        ..settings()
    }
}

/// A region, and the way to it for those that dial it.
struct Region {
    node: Node,
    way: Proxy,
    store: MemoryStorage,
    faults: Arc<Faults>,
    settings: Settings,
}

impl Region {
    async fn start(name: &str, key: &ClusterKey, peers: &[&Region]) -> Self {
        let peers: Vec<_> = peers.iter().map(|peer| peer.way.address()).collect();
        Self::start_on(region(name, key, &peers), MemoryStorage::new()).await
    }

    async fn start_on(settings: Settings, store: MemoryStorage) -> Self {
        let (storage, faults) = FaultyStorage::new(&store);
        let node = Node::start_with(settings.clone(), storage).await;
        let distance = Distance::of(Duration::from_millis(20));
        let way = Proxy::start(node.peers.unwrap(), distance).await.unwrap();
        Self { node, way, store, faults, settings }
    }

    /// Stops the node, and starts it again on this store.
    async fn restart_on(self, store: MemoryStorage) -> Self {
        let Self { node, settings, .. } = self;
        node.stop().await.unwrap();
        Self::start_on(settings, store).await
    }

    async fn is_linked_to(&self, count: usize) {
        let replication = self.node.parts.replication.as_ref().unwrap();
        eventually("regions are linked", async || {
            replication.known().iter().filter(|it| it.up).count() == count
        })
        .await;
    }

    async fn following(&self, name: &str) -> Client {
        Client::join_as(self.node.clients, "", name, &[EXTRA_RECEIPTS]).await.unwrap()
    }
}

async fn share(client: &mut Client, document: &DocumentId) {
    let mut doc = AutoCommit::new();
    put(&mut doc, "key", 0);
    client.share(document, doc).await;
    client.in_step(document).await;
}

/// Whether the last receipt of a region is of the client's own heads.
fn is_saved(client: &mut Client, document: &DocumentId, region: &str) -> bool {
    let heads = client.open(document).heads();
    client.receipts.get(&(document.clone(), region.to_owned())).is_some_and(|saved| saved.heads == heads)
}

async fn saved_in(client: &mut Client, document: &DocumentId, region: &str) {
    client.until(&format!("it is saved in {region}"), |it| is_saved(it, document, region)).await;
}

/// Writes several times, each until the client's own region has given a receipt.
async fn write_rounds(client: &mut Client, document: &DocumentId, own: &str) {
    for round in 1..=ROUNDS {
        client.write(document, |doc| put(doc, "round", round)).await;
        saved_in(client, document, own).await;
    }
}

#[tokio::test]
async fn a_receipt_of_this_region_comes_after_the_commit_and_others_see_none() {
    let (storage, faults) = FaultyStorage::new(&MemoryStorage::new());
    let node = Node::start(storage).await;
    let document = document_id("document");
    let mut client = Client::join_as(node.clients, "", "client", &[EXTRA_RECEIPTS]).await.unwrap();
    let mut stock = Client::join(node.clients, "stock").await;
    share(&mut client, &document).await;
    saved_in(&mut client, &document, "local").await;
    stock.fetch(&document).await;

    faults.hold_appends();
    let begun = faults.appends.load(Ordering::SeqCst);
    client.edit(&document, |doc| put(doc, "key", 1)).await;
    eventually("the append begins", async || faults.appends.load(Ordering::SeqCst) > begun).await;
    let early = saved_in(&mut client, &document, "local");
    assert!(tokio::time::timeout(QUIET, early).await.is_err(), "it is not durable");
    faults.release_appends();
    saved_in(&mut client, &document, "local").await;
    let saved = &client.receipts[&(document.clone(), "local".to_owned())];
    assert_eq!(saved.storage_id, node.parts.storage_id);
    stock.until("the change arrives", |it| number(&it.open(&document).doc, "key") == Some(1)).await;
    assert!(stock.receipts.is_empty());
    assert!(stock.remote_heads.is_empty());
}

#[tokio::test]
async fn a_receipt_of_another_region_waits_until_it_has_stored_the_change() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let frankfurt = Region::start("frankfurt", &key, &[&virginia]).await;
    frankfurt.is_linked_to(1).await;
    let document = document_id("document");
    let mut client = frankfurt.following("client").await;
    share(&mut client, &document).await;
    saved_in(&mut client, &document, "virginia").await;

    virginia.faults.hold_appends();
    let begun = virginia.faults.appends.load(Ordering::SeqCst);
    write_rounds(&mut client, &document, "frankfurt").await;
    eventually("the change is there", async || virginia.faults.appends.load(Ordering::SeqCst) > begun).await;
    write_rounds(&mut client, &document, "frankfurt").await;
    assert!(!is_saved(&mut client, &document, "virginia"), "it is not stored");
    virginia.faults.release_appends();
    saved_in(&mut client, &document, "virginia").await;
    let stored = virginia.store.load_document(&document).await.unwrap().unwrap();
    assert!(stored.tail.iter().any(|it| client.open(&document).heads().contains(&it.hash)));
    let saved = &client.receipts[&(document.clone(), "virginia".to_owned())];
    assert_eq!(saved.storage_id, virginia.node.parts.storage_id);
}

#[tokio::test]
async fn a_cut_link_delays_the_receipts_of_its_region_only() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let tokyo = Region::start("tokyo", &key, &[]).await;
    let frankfurt = Region::start("frankfurt", &key, &[&virginia, &tokyo]).await;
    frankfurt.is_linked_to(2).await;
    let document = document_id("document");
    let mut client = frankfurt.following("client").await;
    share(&mut client, &document).await;
    for region in ["frankfurt", "virginia", "tokyo"] {
        saved_in(&mut client, &document, region).await;
    }
    tokyo.way.cut();
    write_rounds(&mut client, &document, "frankfurt").await;
    saved_in(&mut client, &document, "virginia").await;
    let lag = async || -> u64 {
        let (_, body) = get(frankfurt.node.admin, "/admin/v1/peers").await;
        let peers: serde_json::Value = serde_json::from_str(&body).unwrap();
        let peers = peers.as_array().unwrap();
        peers.iter().find(|it| it["region"] == "tokyo").and_then(|it| it["lag_ms"].as_u64()).unwrap_or(0)
    };
    eventually("tokyo is seen to be behind", async || lag().await >= 200).await;
    assert!(!is_saved(&mut client, &document, "tokyo"), "nothing gets there");
    tokyo.way.heal();
    saved_in(&mut client, &document, "tokyo").await;
    eventually("tokyo is seen to have caught up", async || {
        let linked = frankfurt.node.parts.replication.as_ref().unwrap().view().links.len();
        linked == 2 && lag().await == 0
    })
    .await;

    // One that is down for good delays nobody.
    tokyo.node.stop().await.unwrap();
    write_rounds(&mut client, &document, "frankfurt").await;
    saved_in(&mut client, &document, "virginia").await;
    let mut late = frankfurt.following("late").await;
    late.fetch(&document).await;
    saved_in(&mut late, &document, "virginia").await;
    frankfurt.is_linked_to(1).await;
    let mut later = frankfurt.following("later").await;
    later.fetch(&document).await;
    saved_in(&mut later, &document, "virginia").await;
    assert!(!is_saved(&mut later, &document, "tokyo"), "it is not known what became of it");
}

#[tokio::test]
async fn a_region_that_lost_what_it_had_is_not_claimed_to_have_it_until_it_has() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let way = virginia.way.address();
    let frankfurt = Region::start("frankfurt", &key, &[&virginia]).await;
    frankfurt.is_linked_to(1).await;
    let document = document_id("document");
    let mut client = frankfurt.following("client").await;
    share(&mut client, &document).await;
    saved_in(&mut client, &document, "virginia").await;

    // The older copy is the one from before the first start. It hears of what it lost, and is kept from storing it.
    let Region { node, way: proxy, settings, .. } = virginia;
    node.stop().await.unwrap();
    frankfurt.is_linked_to(0).await;
    drop(proxy);
    let older = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(&older);
    faults.hold_appends();
    let peers = vec![PeerAddress::WebSocket(format!("ws://{}", frankfurt.way.address()))];
    let virginia = Node::start_with(Settings { peers, ..settings }, storage).await;
    frankfurt.is_linked_to(1).await;
    assert_ne!(way, virginia.peers.unwrap());
    eventually("what was lost comes back", async || faults.appends.load(Ordering::SeqCst) > 0).await;
    let mut late = frankfurt.following("late").await;
    late.fetch(&document).await;
    saved_in(&mut late, &document, "frankfurt").await;
    let before = client.receipts[&(document.clone(), "virginia".to_owned())].clone();
    write_rounds(&mut late, &document, "frankfurt").await;
    client.until("the change arrives", |it| number(&it.open(&document).doc, "round") == Some(ROUNDS)).await;
    saved_in(&mut client, &document, "frankfurt").await;
    assert!(!late.receipts.contains_key(&(document.clone(), "virginia".to_owned())), "it has nothing");
    assert_eq!(client.receipts[&(document.clone(), "virginia".to_owned())], before);
    faults.release_appends();
    saved_in(&mut late, &document, "virginia").await;
    saved_in(&mut client, &document, "virginia").await;
    assert!(older.load_document(&document).await.unwrap().is_some());
}

#[tokio::test]
async fn contents_that_no_log_names_are_no_receipt_of_those_who_have_the_logs() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let frankfurt = Region::start("frankfurt", &key, &[&virginia]).await;
    frankfurt.is_linked_to(1).await;
    // Somewhere else a document was written; its log entries have not come anywhere yet.
    let elsewhere = Node::start(MemoryStorage::new()).await;
    let document = document_id("document");
    let mut author = Client::join(elsewhere.clients, "author").await;
    share(&mut author, &document).await;
    let contents = elsewhere.parts.documents.contents(&document).await.unwrap().unwrap();
    let parts = &frankfurt.node.parts;
    let mut client = frankfurt.following("client").await;
    // Followed before it comes, and after.
    client.share(&document, AutoCommit::new()).await;
    client.until("it is not there yet", |it| it.open(&document).unavailable > 0).await;
    parts.documents.store_contents(contents.clone(), &parts.committer).await.unwrap();
    client.until("it comes", |it| number(&it.open(&document).doc, "key") == Some(0)).await;
    saved_in(&mut client, &document, "frankfurt").await;
    write_rounds(&mut client, &document, "frankfurt").await;
    let mut late = frankfurt.following("late").await;
    late.fetch(&document).await;
    write_rounds(&mut late, &document, "frankfurt").await;
    // What was written here is there, and waits for what it stands on.
    eventually("virginia has what was written on it", async || {
        let stored = virginia.store.load_document(&document).await.unwrap();
        stored.is_some_and(|it| it.tail.len() as i64 == 2 * ROUNDS)
    })
    .await;
    write_rounds(&mut late, &document, "frankfurt").await;
    assert!(
        !late.receipts.contains_key(&(document.clone(), "virginia".to_owned())),
        "it lacks the beginning"
    );
    assert!(!client.receipts.contains_key(&(document.clone(), "virginia".to_owned())));

    let parts = &virginia.node.parts;
    parts.documents.store_contents(contents, &parts.committer).await.unwrap();
    saved_in(&mut late, &document, "virginia").await;
}

#[tokio::test]
async fn who_comes_back_is_told_how_things_stand_also_by_a_node_that_was_started_again() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let frankfurt = Region::start("frankfurt", &key, &[&virginia]).await;
    frankfurt.is_linked_to(1).await;
    let document = document_id("document");
    let mut client = frankfurt.following("client").await;
    share(&mut client, &document).await;
    saved_in(&mut client, &document, "virginia").await;
    let mut again = frankfurt.following("again").await;
    again.fetch(&document).await;
    saved_in(&mut again, &document, "frankfurt").await;
    saved_in(&mut again, &document, "virginia").await;

    let store = frankfurt.store.reopen();
    let frankfurt = frankfurt.restart_on(store).await;
    let mut third = frankfurt.following("third").await;
    third.fetch(&document).await;
    saved_in(&mut third, &document, "frankfurt").await;
    saved_in(&mut third, &document, "virginia").await;
}

#[tokio::test]
async fn a_stock_client_hears_of_a_region_from_the_region_alone() {
    let key = ClusterKey::random();
    let virginia = Region::start("virginia", &key, &[]).await;
    let frankfurt = Region::start("frankfurt", &key, &[&virginia]).await;
    frankfurt.is_linked_to(1).await;
    let document = document_id("document");
    let there = virginia.node.parts.storage_id.clone();
    let mut watcher = Client::join(frankfurt.node.clients, "watcher").await;
    let watch = [there.clone(), StorageId::new("a client's").unwrap()];
    let frame = encode_remote_subscription_change(&watcher.peer, &watcher.server, &watch, &[]);
    watcher.send_raw(frame).await;
    share(&mut watcher, &document).await;
    let mut liar = Client::join(frankfurt.node.clients, "liar").await;
    liar.fetch(&document).await;

    virginia.faults.hold_appends();
    watcher.write(&document, |doc| put(doc, "key", 1)).await;
    let heads = watcher.open(&document).heads();
    let claim = |storage_id: &StorageId| RemoteHeads {
        storage_id: storage_id.clone(),
        heads: heads.clone(),
        timestamp: 4e12,
    };
    let claims = [claim(&there), claim(&frankfurt.node.parts.storage_id), claim(&watch[1])];
    let frame = encode_remote_heads_changed(&liar.peer, &liar.server, &document, &claims);
    liar.send_raw(frame).await;
    let of = |storage: &StorageId| (document.clone(), storage.clone());
    watcher.until("the client's report comes", |it| it.remote_heads.contains_key(&of(&watch[1]))).await;
    assert_ne!(watcher.remote_heads.get(&of(&there)), Some(&heads), "only virginia may say so");
    assert_eq!(frankfurt.node.metric("isobar_region_claims_dropped_total").await, 2.0);

    virginia.faults.release_appends();
    watcher.until("virginia has it", |it| it.remote_heads.get(&of(&there)) == Some(&heads)).await;
    assert!(watcher.receipts.is_empty());
}
