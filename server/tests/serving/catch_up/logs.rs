//! Logs between real nodes: given up when all have them and not before, and a region behind them gets everything.

use isobar::demo::links::{Distance, Proxy};
use isobar::storage::{DocumentState, Member, StorageError};
use isobar_protocol::ids::{OriginId, RegionName};
use isobar_protocol::log::decode_run;

use super::*;
use crate::support::ask;

const VIRGINIA_NEEDS: &str = "isobar_region_needs_snapshot{region=\"virginia\"}";

/// A region that gives up log entries every second, as soon as everybody has them.
fn keeping(name: &str, key: &ClusterKey, peers: &[&Node]) -> Settings {
    Settings { log_keep_hours: 0, log_truncate_seconds: 1, ..region(name, key, peers) }
}

fn own_origin(node: &Node) -> OriginId {
    node.parts.committer.progress().borrow()[0].origin
}

/// Waits until logs were truncated twice more: the first time may have begun before.
async fn truncated_again(node: &Node) {
    let before = node.metric("isobar_log_truncations_total").await;
    eventually("the logs are truncated", async || {
        node.metric("isobar_log_truncations_total").await >= before + 2.0
    })
    .await;
}

async fn is_truncated(store: &dyn Storage, origin: OriginId, after: Seq) -> bool {
    matches!(store.read_log(origin, after, usize::MAX).await, Err(StorageError::Truncated { .. }))
}

async fn seq_of(store: &dyn Storage, origin: OriginId) -> Seq {
    let origins = store.origins().await.unwrap();
    origins.iter().find(|it| it.id == origin).map_or(Seq(0), |it| it.seq)
}

/// So many edits, each in a run of its own.
async fn edit(client: &mut Client, document: &DocumentId, edits: i64) {
    for edit in 0..edits {
        client.write(document, |doc| put(doc, "edits", edit)).await;
    }
}

async fn author(node: &Node, document: &DocumentId) -> Client {
    let mut author = Client::join(node.clients, "author").await;
    author.share(document, AutoCommit::new()).await;
    author
}

#[tokio::test]
async fn logs_go_when_all_have_them_and_not_below_what_a_silent_region_has() {
    let key = ClusterKey::random();
    let (there, here) = (MemoryStorage::new(), MemoryStorage::new());
    let frankfurt = Node::start_with(keeping("frankfurt", &key, &[]), there.reopen()).await;
    let virginia = Node::start_with(keeping("virginia", &key, &[&frankfurt]), here.reopen()).await;
    linked_to(&frankfurt, "virginia").await;
    let (document, origin) = (document_id("document"), own_origin(&frankfurt));
    let mut author = author(&frankfurt, &document).await;
    edit(&mut author, &document, 5).await;
    eventually("what all have is given up", async || is_truncated(&there, origin, Seq(0)).await).await;
    caught_up(&virginia, &frankfurt).await;
    eventually("nothing is held", async || frankfurt.metric("isobar_log_entries_held").await == 0.0).await;

    virginia.stop().await.unwrap();
    let reached = seq_of(&here, origin).await;
    edit(&mut author, &document, 5).await;
    truncated_again(&frankfurt).await;
    let kept = there.read_log(origin, reached, usize::MAX).await.unwrap();
    let entries: usize = kept.iter().map(|run| decode_run(&run.body).unwrap().len()).sum();
    assert!(entries >= 5, "{entries} entries are left for the region that is away");
    assert_eq!(frankfurt.metric("isobar_log_entries_held").await, 5.0);

    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    caught_up(&virginia, &frankfurt).await;
    assert_eq!(virginia.metric("isobar_snapshot_documents_total").await, 0.0);
    assert_eq!(stored(&here, &document).await, hashes(&mut author.open(&document).doc.fork()));
    eventually("the rest is given up", async || frankfurt.metric("isobar_log_entries_held").await == 0.0)
        .await;
}

/// Has a region's storage say that another one was linked so many days ago.
async fn backdate(store: &dyn Storage, name: &str, days: u64) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let at = now - Duration::from_secs(days * 24 * 3600);
    let region = RegionName::new(name).unwrap();
    assert!(store.forget_member(&region).await.unwrap(), "it was noted that it was linked");
    let member = Member { region, linked_at_ms: at.as_millis() as u64, needs_snapshot: false };
    store.note_member(&member).await.unwrap();
}

async fn json(node: &Node, path: &str) -> serde_json::Value {
    let (status, answer) = get(node.admin, path).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).unwrap()
}

#[tokio::test]
async fn a_region_that_is_away_for_too_long_needs_a_snapshot_whatever_was_started_meanwhile() {
    let key = ClusterKey::random();
    let (there, here) = (MemoryStorage::new(), MemoryStorage::new());
    let frankfurt = Node::start_with(keeping("frankfurt", &key, &[]), there.reopen()).await;
    let virginia = Node::start_with(keeping("virginia", &key, &[&frankfurt]), here.reopen()).await;
    let document = document_id("document");
    edit(&mut author(&frankfurt, &document).await, &document, 2).await;
    caught_up(&virginia, &frankfurt).await;
    virginia.stop().await.unwrap();
    frankfurt.stop().await.unwrap();

    // Six days are not too long. A start of the node does not begin them anew.
    backdate(&there, "virginia", 6).await;
    let frankfurt = Node::start_with(keeping("frankfurt", &key, &[]), there.reopen()).await;
    edit(&mut author(&frankfurt, &document).await, &document, 5).await;
    truncated_again(&frankfurt).await;
    let first = own_origin(&frankfurt);
    assert!(!is_truncated(&there, first, Seq(0)).await);
    assert_eq!(frankfurt.metric(VIRGINIA_NEEDS).await, 0.0);
    frankfurt.stop().await.unwrap();
    backdate(&there, "virginia", 8).await;
    let frankfurt = Node::start_with(keeping("frankfurt", &key, &[]), there.reopen()).await;
    let mut author = author(&frankfurt, &document).await;
    edit(&mut author, &document, 5).await;
    eventually("the region needs a snapshot", async || frankfurt.metric(VIRGINIA_NEEDS).await == 1.0).await;
    eventually("the log is given up", async || is_truncated(&there, first, Seq(0)).await).await;
    let convergence = json(&frankfurt, "/admin/v1/convergence").await;
    assert_eq!(convergence["regions"]["virginia"]["state"], "needs-snapshot");
    let peers = json(&frankfurt, "/admin/v1/peers").await;
    assert_eq!((&peers[0]["up"], &peers[0]["needs_snapshot"]), (&false.into(), &true.into()));

    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), here.reopen()).await;
    caught_up(&virginia, &frankfurt).await;
    assert!(virginia.metric("isobar_snapshot_documents_total").await > 0.0);
    assert_eq!(stored(&here, &document).await, stored(&there, &document).await);
    assert_eq!(frankfurt.metric(VIRGINIA_NEEDS).await, 0.0);
    let noted = async || there.members().await.unwrap().iter().all(|it| !it.needs_snapshot);
    eventually("it is waited for again", noted).await;
}

#[tokio::test]
async fn a_region_that_was_removed_can_be_forgotten_and_holds_nothing_any_more() {
    let key = ClusterKey::random();
    let there = MemoryStorage::new();
    let frankfurt = Node::start_with(keeping("frankfurt", &key, &[]), there.reopen()).await;
    let virginia = Node::start_with(region("virginia", &key, &[&frankfurt]), MemoryStorage::new()).await;
    linked_to(&frankfurt, "virginia").await;
    let forget = async || ask(frankfurt.admin, "DELETE", "/admin/v1/peers/virginia").await.0;
    assert_eq!(forget().await, 409, "it is linked");
    virginia.stop().await.unwrap();
    eventually("the link is gone", async || !replication(&frankfurt).is_linked()).await;
    let document = document_id("document");
    edit(&mut author(&frankfurt, &document).await, &document, 5).await;
    truncated_again(&frankfurt).await;
    assert!(frankfurt.metric("isobar_log_entries_held").await >= 5.0);

    assert_eq!(forget().await, 204);
    assert_eq!(forget().await, 404);
    eventually("nothing is held", async || frankfurt.metric("isobar_log_entries_held").await == 0.0).await;
    assert_eq!(json(&frankfurt, "/admin/v1/peers").await, serde_json::json!([]));
    assert_eq!(there.members().await.unwrap(), []);
}

/// More than a base is made for.
fn long_document() -> AutoCommit {
    let mut doc = AutoCommit::new();
    for edit in 0..BASE_CHANGES as i64 + 100 {
        put(&mut doc, "edits", edit);
        doc.commit();
    }
    doc
}

/// How wide the way is to the region that joins: a snapshot of a few MiB takes seconds.
const BYTES_PER_SECOND: u64 = 1 << 20;

#[tokio::test]
async fn an_empty_region_joins_behind_a_truncated_log_while_the_world_goes_on() {
    let key = ClusterKey::random();
    let mut documents: Vec<_> =
        (0..14).map(|at| (document_id(&format!("document {at}")), document_of(&[300]))).collect();
    documents.push((document_id("long"), long_document()));
    documents.push((document_id("live"), document_of(&[1])));
    let (there, here) = (truncated(&mut documents).await, MemoryStorage::new());
    let frankfurt = Node::start_with(region("frankfurt", &key, &[]), there.reopen()).await;
    let distance = Distance { one_way: Duration::ZERO, bytes_per_second: Some(BYTES_PER_SECOND) };
    let proxy = Proxy::start(frankfurt.peers.unwrap(), distance).await.unwrap();
    let mut joining = region("virginia", &key, &[]);
    joining.peers = vec![PeerAddress::WebSocket(format!("ws://{}", proxy.address()))];
    let virginia = Node::start_with(joining, here.reopen()).await;
    let came = async || virginia.metric("isobar_snapshot_documents_total").await;
    eventually("the first page comes", async || came().await > 0.0).await;

    // Edits, and deletions of what has come and of what has not.
    let live = document_id("live");
    let mut author = Client::join(frankfurt.clients, "author").await;
    author.fetch(&live).await;
    edit(&mut author, &live, 2).await;
    let mut small: Vec<DocumentId> = documents[..14].iter().map(|(id, _)| id.clone()).collect();
    small.sort();
    let deleted = [small[0].clone(), small[13].clone()];
    for document in &deleted {
        frankfurt.parts.documents.delete(document, &frankfurt.parts.committer).await.unwrap();
    }
    eventually("it shows how far the snapshot is", async || {
        let progress = json(&virginia, "/admin/v1/peers").await[0]["snapshot"].clone();
        progress["documents"].as_u64() > Some(0) && progress["bytes"].as_u64() > Some(0)
    })
    .await;

    // The link is lost midway.
    let listed = there.list_documents(None, 100).await.unwrap().len() as f64;
    proxy.refuse();
    eventually("the link is gone", async || !replication(&virginia).is_linked()).await;
    let before = came().await;
    assert!(before < listed, "the snapshot came too fast to be interrupted");
    edit(&mut author, &live, 2).await;
    proxy.heal();
    linked_to(&virginia, "frankfurt").await;
    edit(&mut author, &live, 2).await;
    caught_up(&virginia, &frankfurt).await;
    assert_eq!(came().await, listed, "each document came once: it went on where it was");

    for document in &deleted {
        let stored = here.load_document(document).await.unwrap().unwrap();
        assert!(matches!(stored.state, DocumentState::Deleted { .. }), "{:?}", stored.state);
    }
    for (document, doc) in documents.iter_mut().filter(|(id, _)| small.contains(id) && !deleted.contains(id))
    {
        assert_eq!(stored(&here, document).await, hashes(doc));
    }
    let long = here.load_document(&documents[14].0).await.unwrap().unwrap();
    assert!(long.base.is_some(), "it came as a base");
    let mut reader = Client::join(virginia.clients, "reader").await;
    for document in [&documents[14].0, &live] {
        author.fetch(document).await;
        reader.fetch(document).await;
        assert_eq!(author.open(document).heads(), reader.open(document).heads());
    }
    assert_eq!(virginia.metric("isobar_documents_missing").await, 0.0);
}
