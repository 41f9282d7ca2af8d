//! From the first frame to the last: what is acknowledged is stored, what is stored is served, and whoever leaves or
//! fails does so cleanly.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use automerge::AutoCommit;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar::storage::{DocumentState, NewBase, Storage, StorageError, StoredChange};
use isobar_protocol::ids::{ChangeHash, DocumentId, Incarnation, OriginId};
use isobar_protocol::wire;
use tokio_tungstenite::tungstenite::Message;

use crate::draft::*;
use crate::support::{
    Client, Ended, Faults, FaultyStorage, Heard, Node, append, document_id, eventually, get, in_time, number,
    put, settings,
};

/// A node whose storage can fail, with a document, its author, and a reader.
struct Scene {
    store: MemoryStorage,
    faults: Arc<Faults>,
    node: Node,
    document: DocumentId,
    author: Client,
    reader: Client,
}

impl Scene {
    async fn new() -> Self {
        let store = MemoryStorage::new();
        let (storage, faults) = FaultyStorage::new(&store);
        let node = Node::start(storage).await;
        let document = document_id("document");
        let mut author = Client::join(node.clients, "author").await;
        author.share(&document, AutoCommit::new().with_actor([1; 16].into())).await;
        author.write(&document, |doc| put(doc, "edits", 0)).await;
        let mut reader = Client::join(node.clients, "reader").await;
        reader.fetch(&document).await;
        Self { store, faults, node, document, author, reader }
    }

    /// Edits while the storage holds commits, and returns when the commit has begun.
    async fn edit_while_held(&mut self) -> Vec<ChangeHash> {
        self.faults.hold_appends();
        let begun = self.faults.appends.load(Ordering::SeqCst);
        self.author.edit(&self.document, |doc| put(doc, "edits", 1)).await;
        let faults = self.faults.clone();
        eventually("the commit begins", async || faults.appends.load(Ordering::SeqCst) > begun).await;
        self.author.open(&self.document).heads()
    }

    /// Asserts that whoever asks now is told of nothing that is not stored: neither heads nor changes.
    async fn assert_unknown(&mut self, heads: &[ChangeHash]) {
        let mut asking = Client::join(self.node.clients, "asking").await;
        asking.fetch(&self.document).await;
        assert_ne!(asking.open(&self.document).server_heads, heads);
        assert_eq!(number(&asking.open(&self.document).doc, "edits"), Some(0));
        // The author and the reader are asked something, and their answers come after whatever was on its way.
        for client in [&mut self.author, &mut self.reader] {
            client.send(Message::Ping(Vec::new().into())).await;
            while client.hear().await != Heard::Pong {}
            assert_ne!(client.open(&self.document).server_heads, heads);
        }
        assert_eq!(number(&self.reader.open(&self.document).doc, "edits"), Some(0));
    }
}

fn transient() -> StorageError {
    StorageError::Transient("the database is restarting".into())
}

#[tokio::test]
async fn nothing_is_acknowledged_or_relayed_before_it_is_committed() {
    let mut scene = Scene::new().await;
    let heads = scene.edit_while_held().await;
    scene.assert_unknown(&heads).await;
    let committed = scene.node.metric("isobar_committed_changes_total").await;
    scene.faults.release_appends();
    for client in [&mut scene.author, &mut scene.reader] {
        client.until("the change", |it| it.open(&scene.document).server_heads == heads).await;
        assert_eq!(client.open(&scene.document).heads(), heads);
    }
    assert_eq!(scene.node.metric("isobar_committed_changes_total").await, committed + 1.0);
}

#[tokio::test]
async fn a_passing_failure_is_retried_and_acknowledged_once() {
    let mut scene = Scene::new().await;
    (0..3).for_each(|_| scene.faults.fail_next_append(transient()));
    let before = scene.author.open(&scene.document).received.len();
    scene.author.write(&scene.document, |doc| put(doc, "edits", 1)).await;
    scene
        .reader
        .until("the edit", |it| number(&it.open(&document_id("document")).doc, "edits") == Some(1))
        .await;
    assert_eq!(scene.node.metric("isobar_commit_retries_total").await, 3.0);
    assert_eq!(scene.node.metric("isobar_committed_changes_total").await, 2.0);
    scene.author.send(Message::Ping(Vec::new().into())).await;
    while scene.author.hear().await != Heard::Pong {}
    assert_eq!(scene.author.open(&scene.document).received.len(), before + 1, "one acknowledgement");
}

async fn assert_failure_ends_the_node(error: StorageError, says: &str) {
    let mut scene = Scene::new().await;
    scene.faults.fail_next_append(error);
    let heads = scene.edit_while_held().await;
    scene.faults.release_appends();
    let ended = scene.node.ended().await.unwrap_err();
    assert!(format!("{ended:#}").contains(says), "{ended:#}");
    // Nobody heard of the change, and it is not there.
    for client in [&mut scene.author, &mut scene.reader] {
        assert_ne!(client.open(&scene.document).server_heads, heads);
    }
    let stored = scene.store.reopen().load_document(&scene.document).await.unwrap().unwrap();
    assert_eq!(stored.tail.len(), 1);
}

#[tokio::test]
async fn a_fatal_failure_ends_the_node_and_acknowledges_nothing() {
    let full = StorageError::Fatal("the disk is full".into());
    assert_failure_ends_the_node(full, "the disk is full").await;
}

#[tokio::test]
async fn a_node_that_was_fenced_ends_and_acknowledges_nothing() {
    let fenced = StorageError::Fenced { origin: OriginId(uuid::Uuid::nil()), ours: Incarnation(1) };
    assert_failure_ends_the_node(fenced, "claimed by another node").await;
}

#[tokio::test]
async fn a_node_that_drains_commits_and_acknowledges_what_is_under_way() {
    let mut scene = Scene::new().await;
    let heads = scene.edit_while_held().await;
    let clients = scene.node.clients;
    let admin = scene.node.admin;
    let stopping = scene.node.begin_stop();
    eventually("the node says that it drains", async || get(admin, "/readyz").await.0 == 503).await;
    assert_eq!(get(admin, "/livez").await.0, 200);
    assert!(Client::try_connect(clients).await.is_err(), "nobody new is taken");
    scene.faults.release_appends();
    scene.author.in_step(&scene.document).await;
    assert_eq!(scene.author.open(&scene.document).server_heads, heads);
    for client in [&mut scene.author, &mut scene.reader] {
        let ended = client.ended().await;
        assert_eq!(ended.code, 1012, "{ended:?}");
        assert_eq!(ended.error, None);
    }
    drop((scene.author, scene.reader));
    in_time("the node stops", stopping).await.unwrap().unwrap();

    let node = Node::start(scene.store.reopen()).await;
    let mut cold = Client::join(node.clients, "cold").await;
    cold.fetch(&scene.document).await;
    assert_eq!(cold.open(&scene.document).heads(), heads);
    assert_eq!(get(node.admin, "/readyz").await.0, 200);
}

#[tokio::test]
async fn a_storage_that_fails_while_the_node_drains_is_an_error() {
    let mut scene = Scene::new().await;
    scene.faults.fail_next_append(StorageError::Fatal("the disk is full".into()));
    scene.edit_while_held().await;
    let stopping = scene.node.begin_stop();
    scene.faults.release_appends();
    drop((scene.author, scene.reader));
    let ended = in_time("the node stops", stopping).await.unwrap().unwrap_err();
    assert!(format!("{ended:#}").contains("the disk is full"), "{ended:#}");
}

#[tokio::test]
async fn a_client_that_left_messages_unanswered_gets_the_last_one_before_the_node_stops() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let mut deaf = Client::join(scene.node.clients, "deaf").await;
    // It asks by hand, so that nothing that the server says is answered: more is gathered for it before each message.
    deaf.offer(&document, Vec::new(), Vec::new()).await;
    assert!(matches!(deaf.hear().await, Heard::Sync { .. }));
    for edit in 0..20 {
        scene.author.write(&document, |doc| put(doc, "edits", edit)).await;
    }
    let heads = scene.author.open(&document).heads();
    let stopping = scene.node.begin_stop();
    let mut heard = Vec::new();
    let ended = loop {
        match deaf.hear().await {
            Heard::Sync { heads, .. } => heard = heads,
            Heard::Ended(ended) => break ended,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ended.code, 1012, "{ended:?}");
    assert_eq!(heard, heads);
    drop((scene.author, scene.reader, deaf));
    in_time("the node stops", stopping).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_second_connection_of_a_peer_takes_the_place_of_the_first() {
    let mut scene = Scene::new().await;
    let mut second = Client::join(scene.node.clients, "author").await;
    let ended = scene.author.ended().await;
    assert_eq!((ended.code, ended.error), (1000, None));
    second.fetch(&scene.document).await;
    second.write(&scene.document, |doc| put(doc, "edits", 1)).await;
    scene
        .reader
        .until("the edit", |it| number(&it.open(&document_id("document")).doc, "edits") == Some(1))
        .await;
    eventually("the first is gone", async || scene.node.metric("isobar_connections").await == 2.0).await;
    // The one that left last does not take the other's place with it.
    let mut third = Client::join(scene.node.clients, "author").await;
    assert_eq!(second.ended().await.code, 1000);
    third.fetch(&scene.document).await;
    assert_eq!(number(&third.open(&scene.document).doc, "edits"), Some(1));
}

#[tokio::test]
async fn a_client_that_says_that_it_leaves_is_let_go() {
    let mut scene = Scene::new().await;
    // `leave` with a sender id, as CBOR.
    let mut frame = vec![0xa2];
    for text in ["type", "leave", "senderId", "author"] {
        frame.push(0x60 + text.len() as u8);
        frame.extend_from_slice(text.as_bytes());
    }
    scene.author.send_raw(frame).await;
    let ended = scene.author.ended().await;
    assert_eq!(ended, Ended { code: 1000, reason: "goodbye".to_owned(), error: None });
    eventually("it is gone", async || scene.node.metric("isobar_connections").await == 1.0).await;
}

#[tokio::test]
async fn presence_is_relayed_to_others_and_its_echo_is_dropped() {
    let mut scene = Scene::new().await;
    scene.author.ephemeral(&scene.document, 1, b"cursor at 7").await;
    let heard = scene.reader.hear().await;
    let expected = Heard::Ephemeral { sender: "author".to_owned(), count: 1, data: b"cursor at 7".to_vec() };
    assert_eq!(heard, expected);
    // A stock client sends it back to where it came from, under its author's name.
    let reader = &mut scene.reader;
    let echo =
        wire::encode_ephemeral("author", &reader.server, &scene.document, "session", 1, b"cursor at 7");
    reader.send_raw(echo).await;
    eventually("the echo is counted", async || scene.node.metric("isobar_echoes_dropped_total").await == 1.0)
        .await;
    // A repetition is no news, the next message is.
    scene.author.ephemeral(&scene.document, 1, b"cursor at 7").await;
    scene.author.ephemeral(&scene.document, 2, b"cursor at 8").await;
    let Heard::Ephemeral { count: 2, .. } = scene.reader.hear().await else { panic!("the next message") };
    scene.author.send(Message::Ping(Vec::new().into())).await;
    assert_eq!(scene.author.hear().await, Heard::Pong, "its author hears nothing of it");
}

#[tokio::test]
async fn an_unknown_document_is_unavailable_at_once_and_comes_when_it_appears() {
    let scene = Scene::new().await;
    let document = document_id("not there yet");
    let mut waiting = Client::join(scene.node.clients, "waiting").await;
    waiting.share(&document, AutoCommit::new()).await;
    assert_eq!(waiting.hear().await, Heard::Unavailable(document.clone()));
    let mut author = scene.author;
    author.share(&document, AutoCommit::new()).await;
    author.write(&document, |doc| put(doc, "edits", 1)).await;
    waiting.until("the document", |it| number(&it.open(&document).doc, "edits") == Some(1)).await;
    assert_eq!(waiting.open(&document).unavailable, 1);
    // Asking made nothing.
    assert_eq!(scene.store.reopen().statistics().await.unwrap().documents, 2);
}

#[tokio::test]
async fn a_silent_client_is_pinged_and_closed_only_if_it_does_not_answer() {
    let mut settings = settings();
    settings.ping_seconds = 1;
    let node = Node::start_with(settings, MemoryStorage::new()).await;
    let mut alive = Client::join(node.clients, "alive").await;
    let mut dead = Client::join(node.clients, "dead").await;
    // Reading is what answers pings.
    for _ in 0..3 {
        assert_eq!(alive.hear().await, Heard::Ping);
    }
    eventually("the dead one is gone", async || {
        // The one that is alive has to go on reading meanwhile.
        assert_eq!(alive.hear().await, Heard::Ping);
        node.metric("isobar_connections").await == 1.0
    })
    .await;
    // It finds its pings, and the end.
    dead.ended().await;
}

fn stored(change: &automerge::Change) -> StoredChange {
    StoredChange { hash: ChangeHash(change.hash().0), bytes: change.raw_bytes().to_vec().into() }
}

/// Asserts that a document is withheld, and that a client that asks for it keeps its connection and other documents.
async fn assert_withheld(node: &Node, document: &DocumentId, healthy: &DocumentId) {
    let mut client = Client::join(node.clients, "asking").await;
    client.share(document, AutoCommit::new()).await;
    assert_eq!(client.hear().await, Heard::Unavailable(document.clone()));
    client.fetch(healthy).await;
    let edits = number(&client.open(healthy).doc, "edits").unwrap();
    client.write(healthy, |doc| put(doc, "edits", edits + 1)).await;
    // Who has the document and offers it is not told that it was stored.
    let mut owner = Client::join(node.clients, "owner").await;
    let mut doc = AutoCommit::new();
    put(&mut doc, "edits", 9);
    owner.share(document, doc).await;
    owner.until("the answer", |owner| owner.open(document).unavailable > 0).await;
    assert_eq!(owner.open(document).server_heads, []);
    assert!(node.metric("isobar_documents_quarantined_total").await >= 1.0);
}

#[tokio::test]
async fn a_document_whose_stored_change_is_damaged_is_withheld_and_no_other() {
    let store = MemoryStorage::new();
    let document = document_id("damaged");
    let healthy = document_id("healthy");
    let mut doc = AutoCommit::new();
    put(&mut doc, "edits", 1);
    put(&mut doc, "edits", 2);
    let changes: Vec<StoredChange> = doc.get_changes(&[]).iter().map(stored).collect();
    append(&store, &healthy, changes.clone()).await;
    let mut damaged = changes;
    let mut bytes = damaged[1].bytes.to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    damaged[1].bytes = bytes.into();
    append(&store, &document, damaged).await;
    // It is so at every start: nothing was thrown away, and nothing mended.
    for _ in 0..2 {
        let node = Node::start(store.reopen()).await;
        assert_withheld(&node, &document, &healthy).await;
        node.stop().await.unwrap();
    }
    assert_eq!(store.reopen().load_document(&document).await.unwrap().unwrap().tail.len(), 2);
}

#[tokio::test]
async fn a_document_with_a_change_missing_is_served_as_far_as_it_is_whole() {
    let store = MemoryStorage::new();
    let document = document_id("with a gap");
    let mut doc = AutoCommit::new();
    (1..=3).for_each(|edit| put(&mut doc, "edits", edit));
    let mut changes: Vec<StoredChange> = doc.get_changes(&[]).iter().map(stored).collect();
    changes.remove(1);
    append(&store, &document, changes).await;
    let node = Node::start(store.reopen()).await;
    let mut client = Client::join(node.clients, "client").await;
    client.fetch(&document).await;
    assert_eq!(number(&client.open(&document).doc, "edits"), Some(1), "causally complete, and no further");
    // Whoever has the rest brings it back.
    let mut author = Client::join(node.clients, "author").await;
    author.share(&document, doc).await;
    author.in_step(&document).await;
    client.until("the rest", |it| number(&it.open(&document).doc, "edits") == Some(3)).await;
}

/// A change that passes the door, and that Automerge cannot apply: its operations are in an object that does not exist.
fn inapplicable(doc: &mut AutoCommit) -> Vec<u8> {
    let heads = doc.get_heads();
    let last = doc.get_change_by_hash(&heads[0]).unwrap();
    let draft = Draft {
        deps: vec![heads[0].0],
        actor: last.actor_id().to_bytes().to_vec(),
        seq: last.seq() + 1,
        start_op: last.max_op() + 1,
        ..Draft::honest()
    };
    sealed_as(1, &draft.with(OBJECT_ACTOR, &[2, 0]).with(OBJECT_COUNTER, &[2, 1]).data())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_does_not_apply_is_quarantined_for_good_and_no_other() {
    let store = MemoryStorage::new();
    let document = document_id("poisoned");
    let healthy = document_id("healthy");
    let mut doc = AutoCommit::new();
    (0..1_500).for_each(|edit| put(&mut doc, "edits", edit));
    let mut changes: Vec<StoredChange> = doc.get_changes(&[]).iter().map(stored).collect();
    append(&store, &healthy, changes.clone()).await;
    // The poison stands deep enough to go into the first base.
    let mut poisoned = AutoCommit::new().with_actor([9; 16].into());
    put(&mut poisoned, "edits", 0);
    let poison = automerge::Change::from_bytes(inapplicable(&mut poisoned)).unwrap();
    let mut poisoned = poisoned.get_changes(&[]).iter().map(stored).collect::<Vec<_>>();
    poisoned.push(stored(&poison));
    changes.extend(poisoned);
    append(&store, &document, changes).await;

    let mut settings = settings();
    settings.idle_seconds = 0;
    let node = Node::start_with(settings, store.reopen()).await;
    let mut victim = Client::join(node.clients, "victim").await;
    victim.offer(&document, Vec::new(), Vec::new()).await;
    assert!(
        matches!(victim.hear().await, Heard::Sync { .. }),
        "it is served until it shows that it does not apply"
    );
    assert_eq!(victim.hear().await, Heard::Unavailable(document.clone()));
    assert_withheld(&node, &document, &healthy).await;
    let state = store.reopen().load_document(&document).await.unwrap().unwrap().state;
    let DocumentState::Quarantined { reason } = state else { panic!("{state:?}") };
    assert!(!reason.is_empty());
    drop(victim);
    node.stop().await.unwrap();

    let node = Node::start(store.reopen()).await;
    let mut client = Client::join(node.clients, "after the restart").await;
    client.share(&document, AutoCommit::new()).await;
    assert_eq!(client.hear().await, Heard::Unavailable(document.clone()));
    assert_eq!(store.reopen().load_document(&document).await.unwrap().unwrap().tail.len(), 1_502);
}

/// A database with a long document that has a base, and a healthy one. Returns the long one as it was at its beginning.
async fn with_base(file: &Path, document: &DocumentId, healthy: &DocumentId) -> AutoCommit {
    let store = SqliteStorage::open(file).await.unwrap();
    let mut doc = AutoCommit::new().with_actor([1; 16].into());
    (0..10).for_each(|edit| put(&mut doc, "edits", edit));
    let early = doc.fork().with_actor([2; 16].into());
    (10..6_000).for_each(|edit| put(&mut doc, "edits", edit));
    let changes: Vec<StoredChange> = doc.get_changes(&[]).iter().map(stored).collect();
    append(&store, healthy, changes[..10].to_vec()).await;
    append(&store, document, changes).await;
    let node = Node::start(SqliteStorage::open(file).await.unwrap()).await;
    let mut client = Client::join(node.clients, "client").await;
    client.fetch(document).await;
    client.write(document, |doc| put(doc, "edits", 6_000)).await;
    eventually("the base is made and pruned", async || {
        let stored = store.load_document(document).await.unwrap().unwrap();
        stored.base.is_some_and(|base| base.pruned)
    })
    .await;
    drop(client);
    node.stop().await.unwrap();
    store.close().await;
    early
}

/// Spoils the stored base of a document.
async fn spoil_base(file: &Path, document: &DocumentId, spoil: impl FnOnce(&mut NewBase)) {
    let store = SqliteStorage::open(file).await.unwrap();
    let base = store.load_document(document).await.unwrap().unwrap().base.unwrap();
    let (_, chunk) = store.read_base_chunk(document).await.unwrap().unwrap();
    let (generation, index) = store.read_base_index(document).await.unwrap().unwrap();
    let mut spoilt = NewBase { summary: base.summary, index, chunk };
    spoil(&mut spoilt);
    let generation = store.install_base(document, generation, spoilt).await.unwrap();
    store.finish_prune(document, generation).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_whose_base_is_damaged_is_withheld_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("isobar.db");
    let (document, healthy) = (document_id("damaged base"), document_id("healthy"));
    with_base(&file, &document, &healthy).await;
    spoil_base(&file, &document, |base| {
        let mut chunk = base.chunk.to_vec();
        let middle = chunk.len() / 2;
        chunk[middle] ^= 1;
        base.chunk = chunk.into();
    })
    .await;
    let node = Node::start(SqliteStorage::open(&file).await.unwrap()).await;
    assert_withheld(&node, &document, &healthy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_whose_index_is_damaged_is_withheld_when_it_is_needed_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("isobar.db");
    let (document, healthy) = (document_id("damaged index"), document_id("healthy"));
    let mut early = with_base(&file, &document, &healthy).await;
    put(&mut early, "offline", 1);
    let edit = early.get_last_local_change().unwrap();
    let shorter = isobar_protocol::base::BaseIndex::default().encode();
    for index in [shorter, bytes::Bytes::from_static(b"no index")] {
        spoil_base(&file, &document, |base| base.index = index).await;
        let node = Node::start(SqliteStorage::open(&file).await.unwrap()).await;
        let mut client = Client::join(node.clients, "client").await;
        client.fetch(&healthy).await;
        // Whoever asks for everything does not need the index.
        client.fetch(&document).await;
        assert_eq!(number(&client.open(&document).doc, "edits"), Some(6_000));
        // An edit from inside the base does.
        let heads = vec![ChangeHash(edit.hash().0)];
        client.offer(&document, heads, vec![edit.raw_bytes().to_vec().into()]).await;
        client.until("the document is withheld", |client| client.open(&document).unavailable > 0).await;
        assert_withheld(&node, &document, &healthy).await;
        client.write(&healthy, |doc| put(doc, "still", 1)).await;
        drop(client);
        node.stop().await.unwrap();
    }
}

#[tokio::test]
async fn the_manual_names_every_metric() {
    let node = Node::start(MemoryStorage::new()).await;
    let (_, text) = get(node.admin, "/metrics").await;
    let described: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(described.len() > 50, "{described:?}");
    let manual = include_str!("../../../docs/operations.md");
    let unnamed: Vec<&&str> = described.iter().filter(|name| !manual.contains(**name)).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
}
