//! Several nodes on one database: any of them serves any document, and clients do not notice which.

use std::net::SocketAddr;
use std::sync::Arc;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use isobar::config::{ClusterKey, PeerAddress, Settings};
use isobar::storage::memory::MemoryStorage;
use isobar::storage::postgres::PostgresStorage;
use isobar::storage::{Batch, DocumentAppend, DocumentState, Storage, StoredChange};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::log::decode_run;
use isobar_testkit::{TestServer, shared};
use sqlx::Connection;

use crate::support::{Client, Node, append, document_id, eventually, in_time, number, put, settings};

mod exchange;
mod regions;

/// A database that several nodes share.
enum Shared {
    Memory(MemoryStorage),
    Postgres { url: String, _server: TestServer },
}

impl Shared {
    fn memory() -> Self {
        Self::Memory(MemoryStorage::new())
    }

    async fn postgres() -> Self {
        let server = shared().unwrap();
        let name = format!("siblings_{}", uuid::Uuid::new_v4().simple());
        let mut admin = sqlx::PgConnection::connect(&server.url(None)).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut admin)
            .await
            .unwrap();
        Self::Postgres { url: server.url(Some(&name)), _server: server }
    }

    async fn open(&self) -> Arc<dyn Storage> {
        match self {
            Self::Memory(store) => Arc::new(store.reopen()),
            Self::Postgres { url, .. } => Arc::new(PostgresStorage::connect(url).await.unwrap()),
        }
    }

    async fn node(&self) -> Node {
        Node::start_on(settings(), self.open().await).await
    }

    /// Two nodes that know of each other.
    async fn pair(&self) -> (Node, Node) {
        let pair = (self.node().await, self.node().await);
        for node in [&pair.0, &pair.1] {
            eventually("the nodes know of each other", async || node.metric("isobar_siblings").await == 1.0)
                .await;
        }
        pair
    }
}

fn heads(doc: &mut AutoCommit) -> Vec<ChangeHash> {
    let mut heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
    heads.sort_unstable();
    heads
}

fn origin_of(node: &Node) -> OriginId {
    node.parts.committer.progress().borrow()[0].origin
}

/// Waits until a client has a value.
async fn sees(client: &mut Client, document: &DocumentId, key: &str, value: i64) {
    client.until(key, |it| number(&it.open(document).doc, key) == Some(value)).await;
}

async fn edits_reach_the_clients_of_both(database: Shared) {
    let (left, right) = database.pair().await;
    assert_ne!(origin_of(&left), origin_of(&right), "two nodes write one log");
    let (document, cold) = (document_id("document"), document_id("cold"));
    let mut one = Client::join(left.clients, "one").await;
    one.share(&document, AutoCommit::new().with_actor([1; 16].into())).await;
    one.write(&document, |doc| put(doc, "first", 1)).await;
    let mut two = Client::join(right.clients, "two").await;
    two.fetch(&document).await;
    let doc = std::mem::take(&mut two.open(&document).doc);
    two.open(&document).doc = doc.with_actor([2; 16].into());

    // A chain that goes to and fro: each link needs the one before.
    for step in 0..10 {
        one.edit(&document, |doc| put(doc, "step", step)).await;
        sees(&mut two, &document, "step", step).await;
        two.edit(&document, |doc| put(doc, "back", step)).await;
        sees(&mut one, &document, "back", step).await;
    }
    // Both at once.
    for step in 0..20 {
        one.edit(&document, |doc| put(doc, &format!("one {step}"), step)).await;
        two.edit(&document, |doc| put(doc, &format!("two {step}"), step)).await;
    }
    sees(&mut one, &document, "two 19", 19).await;
    sees(&mut two, &document, "one 19", 19).await;
    one.in_step(&document).await;
    two.in_step(&document).await;
    assert_eq!(heads(&mut one.open(&document).doc), heads(&mut two.open(&document).doc));

    one.share(&cold, AutoCommit::new().with_actor([3; 16].into())).await;
    one.write(&cold, |doc| put(doc, "edits", 0)).await;
    one.write(&document, |doc| put(doc, "last", 1)).await;
    sees(&mut two, &document, "last", 1).await;
    assert!(right.parts.documents.resident(&cold).is_none(), "nobody needs it in memory there");
    assert_eq!(left.metric("isobar_documents_quarantined_total").await, 0.0);
    assert_eq!(right.metric("isobar_documents_quarantined_total").await, 0.0);

    // Each change stands in one log: following is not writing.
    let storage = database.open().await;
    let mut logged = Vec::new();
    for origin in [origin_of(&left), origin_of(&right)] {
        for run in storage.read_log(origin, Seq(0), usize::MAX).await.unwrap() {
            logged.extend(decode_run(&run.body).unwrap());
        }
    }
    let all = one.open(&document).doc.get_changes(&[]).len() + 1;
    assert_eq!(logged.len(), all);
}

#[tokio::test]
async fn edits_reach_the_clients_of_both_nodes() {
    edits_reach_the_clients_of_both(Shared::memory()).await;
}

#[tokio::test]
async fn edits_reach_the_clients_of_both_nodes_on_postgres() {
    edits_reach_the_clients_of_both(Shared::postgres().await).await;
}

async fn a_document_that_is_waited_for_comes_and_goes(database: Shared) {
    let (left, right) = database.pair().await;
    let document = document_id("document");
    let mut waiting = Client::join(right.clients, "waiting").await;
    waiting.share(&document, AutoCommit::new()).await;
    waiting.until("it is not there", |it| it.open(&document).unavailable > 0).await;
    let mut author = Client::join(left.clients, "author").await;
    author.share(&document, AutoCommit::new().with_actor([1; 16].into())).await;
    author.write(&document, |doc| put(doc, "edits", 1)).await;
    sees(&mut waiting, &document, "edits", 1).await;

    let before = waiting.open(&document).unavailable;
    assert!(left.parts.documents.delete(&document, &left.parts.committer).await.unwrap());
    waiting.until("it is gone", |it| it.open(&document).unavailable > before).await;
    // What its client writes now is kept out on the sibling, too.
    waiting.edit(&document, |doc| put(doc, "late", 1)).await;
    let stored = database.open().await.load_document(&document).await.unwrap().unwrap();
    assert!(matches!(stored.state, DocumentState::Deleted { .. }) && stored.tail.is_empty());
}

#[tokio::test]
async fn a_document_that_is_waited_for_comes_and_goes_on_every_node() {
    a_document_that_is_waited_for_comes_and_goes(Shared::memory()).await;
}

#[tokio::test]
async fn a_document_that_is_waited_for_comes_and_goes_on_every_node_on_postgres() {
    a_document_that_is_waited_for_comes_and_goes(Shared::postgres().await).await;
}

/// A document with more changes than a base is made for at the next commit.
fn long_document() -> AutoCommit {
    let mut doc = AutoCommit::new().with_actor([1; 16].into());
    for edit in 0..6_000 {
        doc.put(ROOT, format!("key {}", edit % 50), edit).unwrap();
        put(&mut doc, "edits", edit);
    }
    doc
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_that_a_sibling_makes_is_not_noticed_by_those_who_have_the_document_open() {
    let store = MemoryStorage::new();
    let document = document_id("long");
    let mut doc = long_document();
    let changes = doc.get_changes(&[]).into_iter().map(|change| StoredChange {
        hash: ChangeHash(change.hash().0),
        bytes: change.raw_bytes().to_vec().into(),
    });
    append(&store, &document, changes.collect()).await;
    let database = Shared::Memory(store.reopen());
    let (left, right) = database.pair().await;
    let mut author = Client::join(left.clients, "author").await;
    author.share(&document, doc).await;
    author.in_step(&document).await;
    let mut reader = Client::join(right.clients, "reader").await;
    reader.fetch(&document).await;
    // Somebody who was away since the middle of what the base will cover.
    let mut away = reader.open(&document).doc.fork().with_actor([7; 16].into());
    put(&mut away, "away", 1);
    let old = reader.open(&document).doc.get_changes(&[])[2_000].hash();
    let mut branch = reader.open(&document).doc.fork_at(&[old]).unwrap().with_actor([8; 16].into());
    put(&mut branch, "branch", 1);
    let mut second = branch.fork_at(&[old]).unwrap().with_actor([9; 16].into());
    put(&mut second, "second", 1);

    author.write(&document, |doc| put(doc, "due", 1)).await;
    // Of the base that is made and of which the tail has been pruned.
    let generation = async || {
        let stored = store.load_document(&document).await.unwrap().unwrap();
        stored.base.filter(|base| base.pruned).map_or(0, |base| base.generation)
    };
    eventually("a base is made and the tail is pruned", async || generation().await == 1).await;
    let resident = right.parts.documents.resident(&document).unwrap();
    assert_eq!(resident.base_generation(), 0, "nobody has told it");
    sees(&mut reader, &document, "due", 1).await;
    assert_eq!(right.metric("isobar_bases_made_total").await, 0.0, "one of the two is enough");

    // New clients get all of it from either, and changes that refer to the inside of the base fit on both.
    for (node, name) in [(&left, "new at the left"), (&right, "new at the right")] {
        let mut new = Client::join(node.clients, name).await;
        new.fetch(&document).await;
        assert_eq!(heads(&mut new.open(&document).doc), heads(&mut author.open(&document).doc));
    }
    let mut late = Client::join(right.clients, "late").await;
    late.share(&document, branch).await;
    late.in_step(&document).await;
    sees(&mut author, &document, "branch", 1).await;
    let mut back = Client::join(left.clients, "back").await;
    back.share(&document, away).await;
    back.in_step(&document).await;
    sees(&mut reader, &document, "away", 1).await;
    sees(&mut late, &document, "away", 1).await;
    for node in [&left, &right] {
        assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
    }

    // What it stored itself made a base due. It found its own replaced, and took the sibling's.
    eventually("the base is taken over", async || resident.base_generation() == 1).await;

    // The sibling makes another, which this node is not told of; its own is in no database any more.
    author
        .write(&document, |doc| {
            for edit in 0..6_000 {
                put(doc, "edits", edit);
                doc.commit();
            }
        })
        .await;
    eventually("the base is replaced", async || generation().await == 2).await;
    sees(&mut reader, &document, "edits", 5_999).await;
    assert_eq!(resident.base_generation(), 1);
    let mut inside = Client::join(right.clients, "inside").await;
    inside.share(&document, second).await;
    inside.in_step(&document).await;
    sees(&mut author, &document, "second", 1).await;
    reader.write(&document, |doc| put(doc, "after", 1)).await;
    sees(&mut author, &document, "after", 1).await;
    let mut last = Client::join(right.clients, "last").await;
    last.fetch(&document).await;
    assert_eq!(heads(&mut last.open(&document).doc), heads(&mut author.open(&document).doc));
    for node in [&left, &right] {
        assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
    }
    assert_eq!(right.metric("isobar_bases_made_total").await, 0.0);
}

#[tokio::test]
async fn what_no_log_names_reaches_a_node_that_was_out_of_touch() {
    let store = MemoryStorage::new();
    let database = Shared::Memory(store.reopen());
    let node = database.node().await;
    let document = document_id("document");
    let mut waiting = Client::join(node.clients, "waiting").await;
    waiting.share(&document, AutoCommit::new()).await;
    waiting.until("it is not there", |it| it.open(&document).unavailable > 0).await;
    let mut doc = AutoCommit::new().with_actor([1; 16].into());
    put(&mut doc, "edits", 1);
    let changes = doc.get_changes(&[]).into_iter().map(|change| StoredChange {
        hash: ChangeHash(change.hash().0),
        bytes: change.raw_bytes().to_vec().into(),
    });
    let change: Vec<StoredChange> = changes.collect();
    let group = PlacementGroup::new("default").unwrap();
    let changes = change.into_iter().map(|change| (Seq(1), change)).collect();
    let origin = OriginId(uuid::Uuid::new_v4());
    let append = DocumentAppend { document: document.clone(), group, origin, changes };
    store.append(&Batch { changes: vec![append], ..Batch::default() }).await.unwrap();
    assert!(node.parts.documents.refresh_all(&node.parts.committer).await);
    sees(&mut waiting, &document, "edits", 1).await;
}

#[tokio::test]
async fn a_node_that_comes_joins_and_one_that_is_killed_loses_nothing() {
    let database = Shared::postgres().await;
    let (left, right) = database.pair().await;
    let document = document_id("document");
    let mut author = Client::join(left.clients, "author").await;
    author.share(&document, AutoCommit::new().with_actor([1; 16].into())).await;
    for edit in 0..50 {
        author.write(&document, |doc| put(doc, "edits", edit)).await;
    }
    left.kill().await;
    eventually("the other is alone", async || right.metric("isobar_siblings").await == 0.0).await;
    assert_eq!(right.metric("isobar_keeps_links").await, 1.0);
    let mut reader = Client::join(right.clients, "reader").await;
    reader.fetch(&document).await;
    sees(&mut reader, &document, "edits", 49).await;
    let third = database.node().await;
    let mut other = Client::join(third.clients, "other").await;
    other.fetch(&document).await;
    reader.edit(&document, |doc| put(doc, "after", 1)).await;
    sees(&mut other, &document, "after", 1).await;
    in_time("it stops", third.stop()).await.unwrap();
}

/// A node of region "near" that dials `peers`, or of "far".
fn region(name: &str, key: &ClusterKey, peers: &[&Node]) -> Settings {
    let peers: Vec<_> = peers.iter().map(|node| node.peers.unwrap()).collect();
    region_at(name, key, &peers)
}

pub fn region_at(name: &str, key: &ClusterKey, peers: &[SocketAddr]) -> Settings {
    let address = |peer: &SocketAddr| PeerAddress::WebSocket(format!("ws://{peer}"));
    Settings {
        region: name.to_owned(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        peers: peers.iter().map(address).collect(),
        ..settings()
    }
}

fn linked(node: &Node) -> usize {
    node.parts.replication.as_ref().unwrap().known().iter().filter(|it| it.up).count()
}

async fn links_go_to_the_node_that_is_left(database: Shared) {
    let key = ClusterKey::random();
    let far_store = MemoryStorage::new();
    let left = Node::start_on(region("near", &key, &[]), database.open().await).await;
    eventually("the first keeps the links", async || left.metric("isobar_keeps_links").await == 1.0).await;
    let right = Node::start_on(region("near", &key, &[]), database.open().await).await;
    // The far region knows both, and may ask the wrong one first.
    let far = Node::start_with(region("far", &key, &[&right, &left]), far_store.reopen()).await;
    eventually("the regions are linked", async || linked(&left) == 1 && linked(&far) == 1).await;
    assert_eq!(linked(&right), 0, "one node keeps the links");

    let (document, other) = (document_id("document"), document_id("other"));
    let mut watching = Client::join(far.clients, "watching").await;
    let mut author = Client::join(right.clients, "author").await;
    author.share(&document, AutoCommit::new().with_actor([1; 16].into())).await;
    author.write(&document, |doc| put(doc, "edits", 1)).await;
    eventually("it is there", async || far_store.load_document(&document).await.unwrap().is_some()).await;
    watching.fetch(&document).await;
    sees(&mut watching, &document, "edits", 1).await;
    // From there to the node that has no link, through the one that has.
    watching.edit(&document, |doc| put(doc, "answer", 2)).await;
    sees(&mut author, &document, "answer", 2).await;
    assert_eq!(linked(&right), 0);

    let mut lost = Client::join(left.clients, "lost").await;
    lost.share(&other, AutoCommit::new().with_actor([2; 16].into())).await;
    lost.write(&other, |doc| put(doc, "edits", 1)).await;
    left.kill().await;
    author.write(&document, |doc| put(doc, "meanwhile", 3)).await;
    sees(&mut watching, &document, "meanwhile", 3).await;
    assert_eq!((linked(&right), linked(&far)), (1, 1));
    watching.edit(&document, |doc| put(doc, "again", 4)).await;
    sees(&mut author, &document, "again", 4).await;
    // What the killed one acknowledged is everywhere.
    watching.fetch(&other).await;
    sees(&mut watching, &other, "edits", 1).await;
    for node in [&right, &far] {
        assert_eq!(node.metric("isobar_origins_forked_total").await, 0.0);
        assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
    }

    // One that comes back neither takes the links nor an origin that was used.
    let again = Node::start_on(region("near", &key, &[&far]), database.open().await).await;
    eventually("they know of each other", async || again.metric("isobar_siblings").await == 1.0).await;
    let mut late = Client::join(again.clients, "late").await;
    late.fetch(&document).await;
    late.edit(&document, |doc| put(doc, "late", 5)).await;
    sees(&mut watching, &document, "late", 5).await;
    sees(&mut author, &document, "late", 5).await;
    assert_eq!((linked(&right), linked(&again)), (1, 0));
}

#[tokio::test]
async fn links_go_to_the_node_that_is_left_and_other_regions_get_everything() {
    links_go_to_the_node_that_is_left(Shared::memory()).await;
}

#[tokio::test]
async fn links_go_to_the_node_that_is_left_and_other_regions_get_everything_on_postgres() {
    links_go_to_the_node_that_is_left(Shared::postgres().await).await;
}
