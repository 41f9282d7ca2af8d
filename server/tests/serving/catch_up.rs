//! Regions that are behind what the logs hold, and documents that are hard to move: everything arrives, or is known not to.

use std::collections::BTreeSet;
use std::time::Duration;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use isobar::config::{ClusterKey, PeerAddress, Settings};
use isobar::replication::{FrameLimits, Replication, SearchOutcome};
use isobar::storage::memory::MemoryStorage;
use isobar::storage::{NewBase, Storage, StoredOrigin};
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup, Seq};
use isobar_protocol::link::DocumentContents;

mod logs;

use crate::support::{Client, Node, document_id, eventually, get, in_time, linked_to, put, settings};

/// Frames of which a large document takes several.
const SMALL: FrameLimits =
    FrameLimits { frame_bytes_max: 600 << 10, parted_bytes_max: 8 << 20, takes_parts: true };

/// As a node of before there were parts has it.
const WHOLE_ONLY: FrameLimits = FrameLimits { takes_parts: false, ..SMALL };

fn region(name: &str, key: &ClusterKey, peers: &[&Node]) -> Settings {
    let address = |node: &&Node| PeerAddress::WebSocket(format!("ws://{}", node.peers.unwrap()));
    Settings {
        region: name.to_owned(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        peers: peers.iter().map(address).collect(),
        frame_limits: SMALL,
        ..settings()
    }
}

fn group() -> PlacementGroup {
    PlacementGroup::new("default").unwrap()
}

fn replication(node: &Node) -> &Replication {
    node.parts.replication.as_ref().unwrap()
}

/// A document of a change for each count of kilobytes, which hardly can be compressed.
fn document_of(kilobytes: &[usize]) -> AutoCommit {
    let mut doc = AutoCommit::new();
    for kilobytes in kilobytes {
        let bytes: Vec<u8> = (0..kilobytes * 64).flat_map(|_| uuid::Uuid::new_v4().into_bytes()).collect();
        doc.put(ROOT, "bytes", bytes).unwrap();
        doc.commit();
    }
    doc
}

fn hashes(doc: &mut AutoCommit) -> BTreeSet<ChangeHash> {
    doc.get_changes(&[]).iter().map(|change| ChangeHash(change.hash().0)).collect()
}

fn contents(document: &DocumentId, doc: &mut AutoCommit) -> DocumentContents {
    let changes = doc.get_changes(&[]);
    DocumentContents {
        document: document.clone(),
        group: group(),
        deleted_at_ms: None,
        base: None,
        changes: changes.iter().map(|change| change.raw_bytes().to_vec().into()).collect(),
    }
}

/// Puts a document where no log says that it is.
async fn place(node: &Node, document: &DocumentId, doc: &mut AutoCommit) {
    node.parts.documents.store_contents(contents(document, doc), &node.parts.committer).await.unwrap();
}

/// The hashes of the changes that are stored one by one.
async fn stored(store: &dyn Storage, document: &DocumentId) -> BTreeSet<ChangeHash> {
    let stored = store.load_document(document).await.unwrap();
    stored.iter().flat_map(|it| &it.tail).map(|change| change.hash).collect()
}

async fn search(node: &Node, document: &DocumentId) -> SearchOutcome {
    in_time("the search ends", replication(node).search(document.clone(), group())).await
}

#[tokio::test]
async fn a_document_too_large_for_one_frame_is_found_in_another_region() {
    let key = ClusterKey::random();
    let here = MemoryStorage::new();
    let frankfurt = Node::start_with(region("frankfurt", &key, &[]), MemoryStorage::new()).await;
    let document = document_id("large");
    let mut doc = document_of(&[300, 500, 200, 1]);
    place(&frankfurt, &document, &mut doc).await;
    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    let link = linked_to(&virginia, "frankfurt").await;

    assert_eq!(search(&virginia, &document).await, SearchOutcome::Found);
    assert_eq!(stored(&here, &document).await, hashes(&mut doc));
    assert_eq!(linked_to(&virginia, "frankfurt").await, link, "the link was closed");
}

#[tokio::test]
async fn a_region_that_takes_no_parts_is_not_given_what_is_too_large_and_stays_linked() {
    let key = ClusterKey::random();
    let here = MemoryStorage::new();
    let frankfurt = Node::start_with(region("frankfurt", &key, &[]), MemoryStorage::new()).await;
    let (large, small) = (document_id("large"), document_id("small"));
    let mut doc = document_of(&[400]);
    place(&frankfurt, &large, &mut document_of(&[500, 500])).await;
    place(&frankfurt, &small, &mut doc).await;
    let older = Settings { frame_limits: WHOLE_ONLY, ..region("virginia", &key, &[&frankfurt]) };
    let virginia = Node::start_with(older, here.reopen()).await;
    let link = linked_to(&virginia, "frankfurt").await;

    assert_eq!(search(&virginia, &large).await, SearchOutcome::Absent);
    let withheld = "isobar_contents_withheld_total{reason=\"too_large\"}";
    assert_eq!(frankfurt.metric(withheld).await, 1.0);
    assert_eq!(search(&virginia, &small).await, SearchOutcome::Found);
    assert_eq!(stored(&here, &small).await, hashes(&mut doc));
    assert_eq!(linked_to(&virginia, "frankfurt").await, link, "the link was closed");
}

/// A base is made of a quiet document with so many changes.
const BASE_CHANGES: usize = 1_400;

async fn has_base(store: &dyn Storage, document: &DocumentId) -> bool {
    let stored = store.load_document(document).await.unwrap();
    stored.and_then(|it| it.base).is_some_and(|base| base.pruned)
}

/// A region's storage with documents that its logs do not hold any more.
async fn truncated(documents: &mut [(DocumentId, AutoCommit)]) -> MemoryStorage {
    let store = MemoryStorage::new();
    let alone = Settings { region: "frankfurt".to_owned(), idle_seconds: 0, ..settings() };
    let node = Node::start_with(alone, store.reopen()).await;
    let mut author = Client::join(node.clients, "author").await;
    for (document, doc) in documents {
        author.share(document, doc.fork()).await;
        author.in_step(document).await;
        let long = doc.get_changes(&[]).len() > BASE_CHANGES;
        eventually("a long document has a base", async || !long || has_base(&store, document).await).await;
    }
    // The last run of a log is kept; it is of no document that matters.
    author.share(&document_id("last"), AutoCommit::new()).await;
    author.write(&document_id("last"), |doc| put(doc, "key", 1)).await;
    drop(author);
    node.stop().await.unwrap();
    for origin in store.origins().await.unwrap() {
        store.truncate_log(origin.id, origin.seq, Duration::ZERO).await.unwrap();
    }
    store
}

/// Waits until a region has everything that another one's vector says.
async fn caught_up(node: &Node, other: &Node) {
    eventually("the region has caught up", async || {
        let has = node.parts.storage.origins().await.unwrap();
        let wanted = other.parts.storage.origins().await.unwrap();
        let is_same = |it: &StoredOrigin, other: &StoredOrigin| {
            (it.id, it.seq, it.chain) == (other.id, other.seq, other.chain)
        };
        wanted.iter().filter(|it| it.seq > Seq(0)).all(|it| has.iter().any(|other| is_same(it, other)))
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_brings_a_document_too_large_for_one_frame_and_what_stands_behind_it() {
    let key = ClusterKey::random();
    let mut documents = [
        (document_id("a"), document_of(&[1])),
        (document_id("b"), document_of(&[500, 500, 500])),
        (document_id("c"), document_of(&[1, 1])),
    ];
    let (there, here) = (truncated(&mut documents).await, MemoryStorage::new());
    let frankfurt = Node::start_with(region("frankfurt", &key, &[]), there.reopen()).await;
    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    let link = linked_to(&virginia, "frankfurt").await;
    caught_up(&virginia, &frankfurt).await;
    for (document, doc) in &mut documents {
        assert_eq!(stored(&here, document).await, hashes(doc));
    }
    assert_eq!(linked_to(&virginia, "frankfurt").await, link, "the link was closed");
    assert_eq!(virginia.metric("isobar_documents_missing").await, 0.0);
}

/// What a region says of the documents that it lacks.
async fn missing(node: &Node) -> Vec<String> {
    let (status, answer) = get(node.admin, "/admin/v1/convergence").await;
    assert_eq!(status, 200);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    let missing = answer["missing_documents"].as_array().unwrap();
    missing.iter().map(|id| id.as_str().unwrap().to_owned()).collect()
}

/// Waits until a region says that it lacks these and no others.
async fn lacks(node: &Node, documents: &[&DocumentId]) {
    let documents: Vec<String> = documents.iter().map(|it| it.to_string()).collect();
    eventually("it is known what is missing", async || missing(node).await == documents).await;
    assert_eq!(node.metric("isobar_documents_missing").await, documents.len() as f64);
}

#[tokio::test]
async fn what_a_snapshot_lacks_is_known_survives_a_restart_and_comes_from_another_region() {
    let key = ClusterKey::random();
    let mut documents = [
        (document_id("before"), document_of(&[1])),
        (document_id("damaged"), document_of(&[2, 2])),
        (document_id("too large"), document_of(&[500, 500])),
        (document_id("unharmed"), document_of(&[1, 1])),
    ];
    let (there, here) = (truncated(&mut documents).await, MemoryStorage::new());
    // Paris has the same, whole.
    let elsewhere = MemoryStorage::new();
    let paris = Node::start_with(region("paris", &key, &[]), elsewhere.reopen()).await;
    for (document, doc) in &mut documents {
        place(&paris, document, doc).await;
    }
    paris.stop().await.unwrap();
    elsewhere.adopt_origins(&there.origins().await.unwrap(), &[]).await.unwrap();

    let (damaged, large) = (documents[1].0.clone(), documents[2].0.clone());
    let junk = || bytes::Bytes::from_static(b"junk");
    let base = NewBase { summary: junk(), index: junk(), chunk: junk() };
    there.install_base(&damaged, 0, base).await.unwrap();
    let withholding = FrameLimits { parted_bytes_max: 600 << 10, ..SMALL };
    let settings = Settings { frame_limits: withholding, ..region("frankfurt", &key, &[]) };
    let frankfurt = Node::start_with(settings, there.reopen()).await;
    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    caught_up(&virginia, &frankfurt).await;
    let lacking = |id: &DocumentId| *id == damaged || *id == large;
    for (document, doc) in documents.iter_mut().filter(|(id, _)| !lacking(id)) {
        assert_eq!(stored(&here, document).await, hashes(doc), "one bad document held up others");
    }
    lacks(&virginia, &[&damaged, &large]).await;
    virginia.kill().await;

    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    linked_to(&virginia, "frankfurt").await;
    lacks(&virginia, &[&damaged, &large]).await;
    let paris = Node::start_with(region("paris", &key, &[&virginia]), elsewhere.reopen()).await;
    linked_to(&paris, "virginia").await;
    lacks(&virginia, &[]).await;
    for (document, doc) in &mut documents {
        assert_eq!(stored(&here, document).await, hashes(doc));
    }
    eventually("the note is gone", async || here.missing_documents().await.unwrap().is_empty()).await;
}
