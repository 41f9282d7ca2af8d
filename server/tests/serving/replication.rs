//! What other regions send: how it reaches documents, their subscribers and storage.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use automerge::AutoCommit;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::{DocumentState, Storage, StorageError};
use isobar_protocol::config::Limits;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::log::{Chain, Content, Entry, decode_run, encode_run, open_run};
use isobar_protocol::replica::{ReceivedRun, Stored};
use uuid::Uuid;

use crate::support::{Client, FaultyStorage, Node, document_id, eventually, in_time, number, put};

/// Another region's node, as its log arrives here.
struct Remote {
    origin: OriginId,
    last: Seq,
    chain: Chain,
}

impl Remote {
    fn new(number: u128) -> Self {
        Self { origin: OriginId(Uuid::from_u128(number)), last: Seq(0), chain: Chain::START }
    }

    fn run(&mut self, entries: Vec<Entry>) -> ReceivedRun {
        let body = bytes::Bytes::from(encode_run(&entries));
        let first = Seq(self.last.0 + 1);
        let chain_before = self.chain;
        self.last = Seq(self.last.0 + entries.len() as u64);
        self.chain = self.chain.after_all(&entries);
        ReceivedRun {
            origin: self.origin,
            region: RegionName::new("far").unwrap(),
            group: PlacementGroup::new("default").unwrap(),
            first,
            last: self.last,
            chain_before,
            chain: self.chain,
            entries: open_run(&body, &Limits::stored()).unwrap(),
            body,
        }
    }

    /// Has a node apply a run of these changes.
    async fn send(&mut self, node: &Node, document: &DocumentId, changes: &[automerge::Change]) -> Stored {
        let run = self.run(entries(document, changes));
        apply(node, run).await
    }
}

async fn apply(node: &Node, run: ReceivedRun) -> Stored {
    in_time("the run is stored", apply_to(&node.parts, run)).await
}

async fn apply_to(parts: &isobar::node::Node, run: ReceivedRun) -> Stored {
    parts.documents.apply(run, &parts.committer).await.await
}

fn entries(document: &DocumentId, changes: &[automerge::Change]) -> Vec<Entry> {
    let entry = |change: &automerge::Change| Entry {
        document: document.clone(),
        content: Content::Change { hash: hash(change), bytes: change.raw_bytes().to_vec().into() },
    };
    changes.iter().map(entry).collect()
}

fn hash(change: &automerge::Change) -> ChangeHash {
    ChangeHash(change.hash().0)
}

/// A document of so many changes.
fn author(actor: u8, edits: i64) -> AutoCommit {
    let mut doc = AutoCommit::new().with_actor([actor; 16].into());
    for edit in 0..edits {
        put(&mut doc, "edits", edit);
        doc.commit();
    }
    doc
}

/// Asks for a document that is not there, and waits for the answer.
async fn ask_in_vain(client: &mut Client, document: &DocumentId) {
    client.share(document, AutoCommit::new()).await;
    client.until("the document is unavailable", |it| it.open(document).unavailable > 0).await;
}

/// The hashes of what is stored of a document.
async fn stored_hashes(store: &MemoryStorage, document: &DocumentId) -> Vec<ChangeHash> {
    let stored = store.load_document(document).await.unwrap();
    let mut hashes: Vec<_> = stored.iter().flat_map(|it| &it.tail).map(|change| change.hash).collect();
    hashes.sort_unstable();
    hashes
}

/// What a node's own log says.
async fn own_log(store: &MemoryStorage, node: &Node) -> Vec<Content> {
    let progress = node.parts.committer.progress().borrow()[0].clone();
    let runs = store.read_log(progress.origin, Seq(0), usize::MAX).await.unwrap();
    let mut chain = Chain::START;
    let mut contents = Vec::new();
    for run in runs {
        assert_eq!(run.chain_before, chain);
        for entry in decode_run(&run.body).unwrap() {
            chain = chain.after(&entry.document, &entry.content);
            contents.push(entry.content);
        }
    }
    assert_eq!((progress.seq, progress.chain), (Seq(contents.len() as u64), chain));
    contents
}

fn sorted(changes: &[automerge::Change]) -> Vec<ChangeHash> {
    let mut hashes: Vec<_> = changes.iter().map(hash).collect();
    hashes.sort_unstable();
    hashes
}

async fn seq_of(store: &MemoryStorage, origin: OriginId) -> Option<Seq> {
    store.origins().await.unwrap().into_iter().find(|it| it.id == origin).map(|it| it.seq)
}

#[tokio::test]
async fn a_received_run_reaches_subscribers_and_the_storage_of_cold_documents() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let (open, cold) = (document_id("open"), document_id("cold"));
    let mut reader = Client::join(node.clients, "reader").await;
    ask_in_vain(&mut reader, &open).await;
    let mut remote = Remote::new(1);
    let changes = author(1, 3).get_changes(&[]);
    let mut run = entries(&open, &changes[..2]);
    run.extend(entries(&cold, &changes));
    let run = remote.run(run);
    assert_eq!(apply(&node, run).await, Stored::Durable);

    reader.until("the change arrives", |it| number(&it.open(&open).doc, "edits") == Some(1)).await;
    assert_eq!(stored_hashes(&store, &open).await, sorted(&changes[..2]));
    assert_eq!(stored_hashes(&store, &cold).await, sorted(&changes));
    assert_eq!(seq_of(&store, remote.origin).await, Some(Seq(5)));
    assert!(node.parts.documents.resident(&cold).is_none(), "nobody needs it in memory");
    assert_eq!(own_log(&store, &node).await, [], "another origin's log names them");
    let recent = node.parts.committer.recent_log();
    let runs = recent.read(remote.origin, Seq(0), usize::MAX).expect("it was stored a moment ago");
    assert_eq!(runs, store.read_log(remote.origin, Seq(0), usize::MAX).await.unwrap());

    // The whole document reaches whoever asks for it later.
    reader.fetch(&cold).await;
    reader.until("the document arrives", |it| number(&it.open(&cold).doc, "edits") == Some(2)).await;
}

#[tokio::test]
async fn a_load_that_races_a_cold_append_misses_nothing() {
    let store = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(&store);
    let node = Node::start(storage).await;
    let document = document_id("document");
    let mut remote = Remote::new(1);
    let changes = author(1, 2).get_changes(&[]);
    remote.send(&node, &document, &changes[..1]).await;

    // The load reads the store while the run is stored, and brings what it read into memory after that.
    faults.hold_appends();
    faults.hold_loads();
    let begun = faults.appends.load(Ordering::SeqCst);
    let run = remote.run(entries(&document, &changes[1..]));
    let parts = node.parts.clone();
    let applied = tokio::spawn(async move { apply_to(&parts, run).await });
    eventually("the append begins", async || faults.appends.load(Ordering::SeqCst) > begun).await;
    let (parts, id) = (node.parts.clone(), document.clone());
    let loaded = tokio::spawn(async move { parts.documents.open(&id).await.unwrap() });
    eventually("the load has read", async || faults.loads.load(Ordering::SeqCst) > 0).await;
    faults.release_appends();
    eventually("the run is stored", async || stored_hashes(&store, &document).await.len() == 2).await;
    faults.release_loads();
    assert_eq!(in_time("applied", applied).await.unwrap(), Stored::Durable);
    let loaded = in_time("loaded", loaded).await.unwrap();
    let mut client = Client::join(node.clients, "client").await;
    client.fetch(loaded.id()).await;
    client.until("the change is here", |it| number(&it.open(&document).doc, "edits") == Some(1)).await;
}

#[tokio::test]
async fn pending_changes_are_stored_and_complete_when_another_origin_brings_their_dependency() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let document = document_id("document");
    let mut reader = Client::join(node.clients, "reader").await;
    ask_in_vain(&mut reader, &document).await;
    let changes = author(1, 2).get_changes(&[]);
    let (mut one, mut other) = (Remote::new(1), Remote::new(2));
    assert_eq!(one.send(&node, &document, &changes[1..]).await, Stored::Durable);
    assert_eq!(stored_hashes(&store, &document).await, sorted(&changes[1..]));
    assert_eq!(seq_of(&store, one.origin).await, Some(Seq(1)));
    assert_eq!(number(&reader.open(&document).doc, "edits"), None);

    other.send(&node, &document, &changes[..1]).await;
    reader.until("both changes arrive", |it| number(&it.open(&document).doc, "edits") == Some(1)).await;
    assert_eq!(stored_hashes(&store, &document).await, sorted(&changes));
    assert_eq!(own_log(&store, &node).await, []);
}

#[tokio::test]
async fn only_what_came_from_a_client_is_logged_when_a_received_run_completes_it() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let document = document_id("document");
    let changes = author(1, 2).get_changes(&[]);
    let mut client = Client::join(node.clients, "client").await;
    // The client's change waits for one that only the other region has.
    let pending = changes[1].raw_bytes().to_vec().into();
    client.offer(&document, vec![hash(&changes[1])], vec![pending]).await;
    eventually("the change waits", async || {
        let resident = node.parts.documents.resident(&document);
        resident.is_some_and(|document| document.pending_count() == 1)
    })
    .await;
    assert_eq!(stored_hashes(&store, &document).await, []);

    let mut remote = Remote::new(1);
    remote.send(&node, &document, &changes[..1]).await;
    assert_eq!(stored_hashes(&store, &document).await, sorted(&changes));
    let [Content::Change { hash: logged, .. }] = own_log(&store, &node).await[..] else {
        panic!("one entry is expected")
    };
    assert_eq!(logged, hash(&changes[1]));
}

#[tokio::test]
async fn two_changes_with_one_number_quarantine_their_document_and_both_are_kept() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let (document, healthy) = (document_id("document"), document_id("healthy"));
    let mut client = Client::join(node.clients, "client").await;
    client.share(&document, author(1, 1)).await;
    client.in_step(&document).await;
    client.share(&healthy, author(2, 1)).await;
    client.in_step(&healthy).await;
    let ours = client.open(&document).doc.get_changes(&[]);
    let mut clone = AutoCommit::new().with_actor([1; 16].into());
    put(&mut clone, "other", 1);
    let theirs = clone.get_changes(&[]);
    let mut remote = Remote::new(1);
    assert_eq!(remote.send(&node, &document, &theirs).await, Stored::Durable);

    let stored = store.load_document(&document).await.unwrap().unwrap();
    let DocumentState::Quarantined { reason } = stored.state else { panic!("it is {:?}", stored.state) };
    for change in [&ours[0], &theirs[0]] {
        assert!(reason.contains(&hash(change).to_string()), "{reason}");
    }
    let mut both = sorted(&ours);
    both.extend(sorted(&theirs));
    both.sort_unstable();
    assert_eq!(stored_hashes(&store, &document).await, both);
    assert_eq!(seq_of(&store, remote.origin).await, Some(Seq(1)));
    client.until("it is withheld", |it| it.open(&document).unavailable > 0).await;
    client.write(&healthy, |doc| put(doc, "still", 1)).await;
    assert_eq!(client.open(&healthy).unavailable, 0);
}

#[tokio::test]
async fn a_tombstone_takes_a_document_out_of_service_and_later_changes_stay_out() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let document = document_id("document");
    let mut client = Client::join(node.clients, "client").await;
    client.share(&document, author(1, 1)).await;
    client.in_step(&document).await;
    let tombstone = Entry { document: document.clone(), content: Content::Tombstone { deleted_at_ms: 7 } };
    let mut remote = Remote::new(1);
    let run = remote.run(vec![tombstone]);
    assert_eq!(apply(&node, run).await, Stored::Durable);
    client.until("it is unavailable", |it| it.open(&document).unavailable > 0).await;

    assert_eq!(remote.send(&node, &document, &author(2, 1).get_changes(&[])).await, Stored::Durable);
    client.edit(&document, |doc| put(doc, "late", 1)).await;
    let mut asking = Client::join(node.clients, "asking").await;
    ask_in_vain(&mut asking, &document).await;
    let stored = store.load_document(&document).await.unwrap().unwrap();
    assert_eq!(stored.state, DocumentState::Deleted { deleted_at_ms: 7 });
    assert_eq!(stored.tail, []);
    assert_eq!(seq_of(&store, remote.origin).await, Some(Seq(2)));
    assert_eq!(asking.open(&document).received, []);
}

#[tokio::test]
async fn a_deletion_is_logged_once_and_reaches_those_who_have_the_document_open() {
    let store = MemoryStorage::new();
    let node = Node::start(store.reopen()).await;
    let (document, unknown) = (document_id("document"), document_id("unknown"));
    let mut client = Client::join(node.clients, "client").await;
    client.share(&document, author(1, 1)).await;
    client.in_step(&document).await;
    let (documents, committer) = (&node.parts.documents, &node.parts.committer);
    assert!(documents.delete(&document, committer).await.unwrap());
    assert!(!documents.delete(&document, committer).await.unwrap());
    assert!(documents.delete(&unknown, committer).await.unwrap());
    client.until("it is unavailable", |it| it.open(&document).unavailable > 0).await;
    let log = own_log(&store, &node).await;
    assert!(
        matches!(log[..], [Content::Erased { .. }, Content::Tombstone { .. }, Content::Tombstone { .. }]),
        "{log:?}"
    );
    let own = node.parts.committer.progress().borrow()[0].clone();
    assert_eq!(committer.recent_log().read(own.origin, Seq(0), 1000), None, "it held the bytes");
    assert_eq!(committer.recent_log().read(own.origin, own.seq, 1000), Some(Vec::new()));
    eventually("the stored log is erased", async || {
        node.metric("isobar_log_runs_erased_total").await == 1.0
            && node.metric("isobar_deletions_unerased").await == 0.0
    })
    .await;
    assert_eq!(own_log(&store, &node).await, log);
}

#[tokio::test]
async fn a_run_that_another_node_stored_first_leaves_the_rest_of_its_batch() {
    let store = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(&store);
    let node = Node::start(storage).await;
    let sibling = Node::start(store.reopen()).await;
    let (mine, theirs) = (document_id("mine"), document_id("theirs"));
    let mut raced = Remote::new(1);
    let mut alone = Remote::new(2);
    let changes = author(1, 1).get_changes(&[]);
    let run = raced.run(entries(&theirs, &changes));
    assert_eq!(apply(&sibling, run.clone()).await, Stored::Durable);

    // All three stand in one batch: the first append is held until they are queued.
    faults.hold_appends();
    let begun = faults.appends.load(Ordering::SeqCst);
    let first = alone.run(entries(&mine, &changes));
    let others = [run, alone.run(entries(&document_id("third"), &changes))];
    let applied = apply_all(&node, std::iter::once(first).chain(others));
    eventually("the first append begins", async || faults.appends.load(Ordering::SeqCst) > begun).await;
    eventually("the others are queued", async || node.parts.committer.queued_bytes() > 2 * 128).await;
    faults.release_appends();
    let stored = in_time("answered", applied).await.unwrap();
    assert_eq!(
        stored,
        [Stored::Durable, Stored::OutOfStep { seq: raced.last, chain: raced.chain }, Stored::Durable]
    );
    assert_eq!(seq_of(&store, alone.origin).await, Some(Seq(2)));
    assert_eq!(seq_of(&store, raced.origin).await, Some(Seq(1)));
    assert_eq!(stored_hashes(&store, &document_id("third")).await, sorted(&changes));
}

/// Has a node apply runs at once, queued in this order.
fn apply_all(node: &Node, runs: impl Iterator<Item = ReceivedRun>) -> tokio::task::JoinHandle<Vec<Stored>> {
    let runs: Vec<ReceivedRun> = runs.collect();
    let parts: Arc<isobar::node::Node> = node.parts.clone();
    tokio::spawn(async move {
        let applying = runs.into_iter().map(|run| apply_to(&parts, run));
        futures_util::future::join_all(applying).await
    })
}

#[tokio::test]
async fn runs_that_gather_while_storage_is_away_are_stored_in_order() {
    let store = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(&store);
    let node = Node::start(storage).await;
    let document = document_id("document");
    let mut remote = Remote::new(1);
    let changes = author(1, 5).get_changes(&[]);
    faults.fail_next_append(StorageError::Transient("the database is restarting".into()));
    let runs: Vec<_> =
        changes.iter().map(|it| remote.run(entries(&document, std::slice::from_ref(it)))).collect();
    let stored = in_time("stored", apply_all(&node, runs.into_iter())).await.unwrap();
    assert_eq!(stored, [Stored::Durable; 5]);
    let log = store.read_log(remote.origin, Seq(0), usize::MAX).await.unwrap();
    assert!(log.len() < 5, "runs that follow each other are stored as one");
    let hashes: Vec<ChangeHash> = log
        .iter()
        .flat_map(|run| decode_run(&run.body).unwrap())
        .map(|entry| match entry.content {
            Content::Change { hash, .. } => hash,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(hashes, changes.iter().map(hash).collect::<Vec<_>>());
}

#[tokio::test]
async fn contents_of_another_region_are_stored_without_being_logged() {
    let (there, here) = (MemoryStorage::new(), MemoryStorage::new());
    let (from, to) = (Node::start(there.reopen()).await, Node::start(here.reopen()).await);
    let document = document_id("document");
    let mut writer = Client::join(from.clients, "writer").await;
    writer.share(&document, author(1, 3)).await;
    writer.in_step(&document).await;
    let mut reader = Client::join(to.clients, "reader").await;
    ask_in_vain(&mut reader, &document).await;
    let contents = from.parts.documents.contents(&document).await.unwrap().expect("it is stored");
    assert_eq!(contents.changes.len(), 3);
    for _ in 0..2 {
        to.parts.documents.store_contents(contents.clone(), &to.parts.committer).await.unwrap();
    }
    reader.until("it arrives", |it| number(&it.open(&document).doc, "edits") == Some(2)).await;
    assert_eq!(stored_hashes(&here, &document).await, stored_hashes(&there, &document).await);
    assert_eq!(own_log(&here, &to).await, []);
    assert!(from.parts.documents.contents(&document_id("unknown")).await.unwrap().is_none());

    from.parts.documents.delete(&document, &from.parts.committer).await.unwrap();
    let gone = from.parts.documents.contents(&document).await.unwrap().expect("there is a tombstone");
    assert!(gone.deleted_at_ms.is_some() && gone.changes.is_empty());
    to.parts.documents.store_contents(gone, &to.parts.committer).await.unwrap();
    reader.until("it is unavailable", |it| it.open(&document).unavailable > 1).await;
    assert_eq!(own_log(&here, &to).await, []);
}
