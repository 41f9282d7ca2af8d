//! Long documents: a base instead of their old changes, invisible to everybody, and safe at any moment.

use std::sync::OnceLock;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT, ReadDoc};
use isobar::config::Settings;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar::storage::{Storage, StoredChange};
use isobar_protocol::ids::{ChangeHash, DocumentId};

use crate::support::{Client, FaultyStorage, Node, append, document_id, eventually, number, put, settings};

/// More changes than a base is made for while a document is in use.
const CHANGES: i64 = 12_000;

/// As many changes as a base is made for at the next commit, and enough to be pruned in several steps.
const KILLED_CHANGES: i64 = 6_000;

/// How many changes stay beside the base.
const TAIL: usize = 1_024;

/// A document of two authors with so many changes.
fn long_document(changes: i64) -> AutoCommit {
    let mut one = AutoCommit::new().with_actor([1; 16].into());
    put(&mut one, "edits", 0);
    let mut two = one.fork().with_actor([2; 16].into());
    for edit in 1..changes {
        let (doc, other) = if edit / 100 % 2 == 0 { (&mut one, &mut two) } else { (&mut two, &mut one) };
        if edit % 100 == 0 {
            doc.merge(other).unwrap();
        }
        doc.put(ROOT, format!("key {}", edit % 50), edit).unwrap();
        put(doc, "edits", edit);
    }
    one.merge(&mut two).unwrap();
    one
}

fn settings_for_idle() -> Settings {
    let mut settings = settings();
    settings.idle_seconds = 0;
    settings
}

fn heads(doc: &mut AutoCommit) -> Vec<ChangeHash> {
    let mut heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
    heads.sort_unstable();
    heads
}

/// Puts a document into a store, as single changes.
async fn append_all(storage: &impl Storage, document: &DocumentId, doc: &mut AutoCommit) {
    let changes = doc.get_changes(&[]).into_iter().map(|change| StoredChange {
        hash: ChangeHash(change.hash().0),
        bytes: change.raw_bytes().to_vec().into(),
    });
    append(storage, document, changes.collect()).await;
}

/// Asserts that two documents have equal contents and history.
fn assert_equal(left: &mut AutoCommit, right: &mut AutoCommit) {
    assert_eq!(heads(left), heads(right));
    let changes = |doc: &mut AutoCommit| doc.get_changes(&[]).len();
    assert_eq!(changes(left), changes(right));
    assert_eq!(left.hydrate(ROOT, None).unwrap(), right.hydrate(ROOT, None).unwrap());
}

async fn bases_made(node: &Node) -> f64 {
    node.metric("isobar_bases_made_total").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_document_gets_a_base_and_nobody_notices() {
    let document = document_id("long");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("isobar.db");
    let mut truth = long_document(CHANGES);
    let (mut early, mut stale) = (AutoCommit::new(), AutoCommit::new());
    let all = truth.get_changes(&[]);
    early.apply_changes(all[..3_000].to_vec()).unwrap();
    stale.apply_changes(all[..CHANGES as usize - 50].to_vec()).unwrap();
    let storage = SqliteStorage::open(&file).await.unwrap();
    append_all(&storage, &document, &mut truth).await;
    let before = storage.statistics().await.unwrap();
    let change_bytes: usize = all.iter().map(|change| change.raw_bytes().len()).sum();
    assert_eq!(before.changes, CHANGES as u64);
    storage.close().await;

    let node = Node::start(SqliteStorage::open(&file).await.unwrap()).await;
    let mut author = Client::join(node.clients, "author").await;
    author.share(&document, truth).await;
    author.in_step(&document).await;
    let mut reader = Client::join(node.clients, "reader").await;
    reader.fetch(&document).await;
    let seen = reader.open(&document).received.len();
    // Edits go on while the base is made.
    let mut edits = 0;
    while bases_made(&node).await == 0.0 {
        edits += 1;
        author.write(&document, |doc| put(doc, "meanwhile", edits)).await;
    }
    author.write(&document, |doc| put(doc, "after", 1)).await;
    reader.until("the last edit", |it| number(&it.open(&document).doc, "after") == Some(1)).await;
    let received = &reader.open(&document).received[seen..];
    assert!(
        received.iter().all(|(_, whole)| *whole == 0),
        "a reader in step gets single changes: {received:?}"
    );
    assert_eq!(received.iter().map(|(changes, _)| changes).sum::<usize>(), edits as usize + 1);

    // A client that comes cold gets one chunk and a tail, and has exactly the same.
    let mut cold = Client::join(node.clients, "cold").await;
    cold.fetch(&document).await;
    assert_eq!(cold.open(&document).received[0].1, 1);
    assert!(cold.open(&document).received[0].0 <= TAIL + edits as usize + 1);
    assert_equal(&mut cold.open(&document).doc, &mut author.open(&document).doc);

    // A client that stands within the tail gets the changes that it lacks.
    let mut returning = Client::join(node.clients, "returning").await;
    returning.share(&document, stale).await;
    returning.until("what it lacks", |it| number(&it.open(&document).doc, "after") == Some(1)).await;
    assert!(returning.open(&document).received.iter().all(|(_, whole)| *whole == 0));
    assert_equal(&mut returning.open(&document).doc, &mut author.open(&document).doc);

    // A client that stands inside the base, with edits that nobody else has.
    let mut early = early.with_actor([3; 16].into());
    put(&mut early, "offline", 1);
    put(&mut early, "offline", 2);
    let mut inside = Client::join(node.clients, "inside").await;
    inside.share(&document, early).await;
    inside.until("what it lacks", |it| number(&it.open(&document).doc, "after") == Some(1)).await;
    inside.in_step(&document).await;
    for client in [&mut author, &mut reader] {
        client.until("the offline edits", |it| number(&it.open(&document).doc, "offline") == Some(2)).await;
        client.in_step(&document).await;
    }
    assert_equal(&mut inside.open(&document).doc, &mut author.open(&document).doc);

    // A client that knows no document chunks gets every change on its own.
    let mut old = Client::join(node.clients, "old").await;
    old.is_old = true;
    old.fetch(&document).await;
    let received = old.open(&document).received.clone();
    assert!(received.iter().all(|(_, whole)| *whole == 0), "{received:?}");
    assert!(received.iter().any(|(changes, _)| *changes >= CHANGES as usize), "{received:?}");
    assert_equal(&mut old.open(&document).doc, &mut author.open(&document).doc);

    // The store holds less, and a node that starts on it has everything.
    node.stop().await.unwrap();
    let storage = SqliteStorage::open(&file).await.unwrap();
    let after = storage.statistics().await.unwrap();
    assert!(after.changes <= (TAIL + edits as usize + 3) as u64, "{after:?}");
    let stored = storage.load_document(&document).await.unwrap().unwrap();
    let base = stored.base.unwrap();
    assert!(base.pruned);
    let (_, index) = storage.read_base_index(&document).await.unwrap().unwrap();
    let tail_bytes: usize = stored.tail.iter().map(|change| change.bytes.len()).sum();
    let stored_bytes = base.chunk_bytes as usize + base.summary.len() + index.len() + tail_bytes;
    assert!(stored_bytes < change_bytes / 2, "{stored_bytes} bytes of {change_bytes} are left");
    let node = Node::start(storage).await;
    let mut cold = Client::join(node.clients, "cold").await;
    cold.fetch(&document).await;
    assert_equal(&mut cold.open(&document).doc, &mut author.open(&document).doc);
    assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
}

/// The document of the kill tests, and what is stored of it.
fn killed_document() -> AutoCommit {
    static SAVED: OnceLock<Vec<u8>> = OnceLock::new();
    AutoCommit::load(SAVED.get_or_init(|| long_document(KILLED_CHANGES).save())).unwrap()
}

/// Serves until the storage dies at the call `number` of those that make and prune a base. Returns whether it died, and
/// what was acknowledged.
async fn serve_until_killed(
    store: &MemoryStorage,
    document: &DocumentId,
    number: usize,
    after: bool,
) -> (bool, AutoCommit) {
    let (storage, faults) = FaultyStorage::new(store);
    faults.kill_at(number, after);
    let node = Node::start(storage).await;
    let mut client = Client::join(node.clients, "client").await;
    client.fetch(document).await;
    client.write(document, |doc| put(doc, "before", 1)).await;
    eventually("the base is made and pruned, or the process dies", async || {
        faults.is_dead() || store.is_pruned(document).await
    })
    .await;
    let died = faults.is_dead();
    // Nothing more reaches the store, as if the process had been killed.
    faults.kill();
    (died, client.open(document).doc.clone())
}

trait Pruned {
    async fn is_pruned(&self, document: &DocumentId) -> bool;
}

impl Pruned for MemoryStorage {
    async fn is_pruned(&self, document: &DocumentId) -> bool {
        let stored = self.reopen().load_document(document).await.unwrap().unwrap();
        stored.base.is_some_and(|base| base.pruned)
    }
}

async fn assert_killing_loses_nothing(after: bool) {
    let document = document_id("killed");
    let mut deaths = 0;
    loop {
        let store = MemoryStorage::new();
        append_all(&store, &document, &mut killed_document()).await;
        let (died, mut truth) = serve_until_killed(&store, &document, deaths, after).await;
        // A cold client of the next process has everything, and may go on.
        let node = Node::start(store.reopen()).await;
        let mut cold = Client::join(node.clients, "cold").await;
        cold.fetch(&document).await;
        assert_equal(&mut cold.open(&document).doc, &mut truth);
        cold.write(&document, |doc| put(doc, "afterwards", 1)).await;
        let mut truth = cold.open(&document).doc.clone();
        // What was left undone is done.
        eventually("the base is made and pruned", async || store.is_pruned(&document).await).await;
        let stored = store.reopen().load_document(&document).await.unwrap().unwrap();
        assert!(stored.tail.len() <= TAIL + 2, "{} changes are left beside the base", stored.tail.len());
        let mut later = Client::join(node.clients, "later").await;
        later.fetch(&document).await;
        assert_equal(&mut later.open(&document).doc, &mut truth);
        if !died {
            break;
        }
        deaths += 1;
    }
    // Installing, pruning in several steps, finishing.
    assert!(deaths >= 7, "the process died {deaths} times: compaction has more calls than that");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_any_step_of_compaction_takes_effect_nothing_is_lost() {
    assert_killing_loses_nothing(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_any_step_of_compaction_has_taken_effect_nothing_is_lost() {
    assert_killing_loses_nothing(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_nobody_has_open_leaves_memory_and_comes_back() {
    let document = document_id("left");
    let store = MemoryStorage::new();
    let node = Node::start_with(settings_for_idle(), store.reopen()).await;
    let mut author = Client::join(node.clients, "author").await;
    author.share(&document, AutoCommit::new()).await;
    author.write(&document, |doc| put(doc, "edits", 1)).await;
    let mut keeps = Client::join(node.clients, "keeps another open").await;
    let other = document_id("open");
    keeps.share(&other, AutoCommit::new()).await;
    keeps.write(&other, |doc| put(doc, "edits", 1)).await;
    let mut truth = author.open(&document).doc.clone();
    drop(author);
    eventually("one document is left", async || {
        node.metric("isobar_documents_evicted_total").await == 1.0
            && node.metric("isobar_documents_resident").await == 1.0
    })
    .await;
    // The other is as it was.
    keeps.write(&other, |doc| put(doc, "edits", 2)).await;
    let mut back = Client::join(node.clients, "back").await;
    back.fetch(&document).await;
    assert_equal(&mut back.open(&document).doc, &mut truth);
    back.write(&document, |doc| put(doc, "edits", 2)).await;
    drop((back, keeps));
    eventually("nothing is left", async || node.metric("isobar_documents_resident").await == 0.0).await;
    assert!(node.metric("isobar_documents_resident_bytes").await < 1.0);
}
