//! Nobody, slow or greedy, takes more than a share, and nobody else pays for it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT, ScalarValue};
use isobar::storage::StoredChange;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar_protocol::ids::{ChangeHash, DocumentId};
use tokio_tungstenite::tungstenite;

use crate::support::{
    Client, FaultyStorage, Heard, Node, append, document_id, eventually, in_time, number, put, settings,
};

/// Bytes that do not compress.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn put_noise(doc: &mut AutoCommit, seed: u64, bytes: usize) {
    doc.put(ROOT, "noise", ScalarValue::Bytes(noise(seed, bytes))).unwrap();
    put(doc, "edits", seed as i64);
}

#[tokio::test]
async fn a_client_that_stops_reading_costs_little_and_is_caught_up_in_few_messages() {
    const EDITS: usize = 300;
    const EDIT_BYTES: usize = 64 << 10;
    let node = Node::start(MemoryStorage::new()).await;
    let document = document_id("document");
    let mut writer = Client::join(node.clients, "writer").await;
    writer.share(&document, AutoCommit::new()).await;
    writer.write(&document, |doc| put(doc, "edits", 0)).await;
    let mut reader = Client::join_narrowly(node.clients, "reader").await;
    reader.fetch(&document).await;
    let before = reader.open(&document).received.len();
    let sent_before = node.metric("isobar_frame_bytes_sent_total").await;
    for edit in 0..EDITS {
        writer.write(&document, |doc| put_noise(doc, edit as u64, EDIT_BYTES)).await;
    }
    // What has been made for the reader is what the kernel's buffers took, and not much more.
    let sent = node.metric("isobar_frame_bytes_sent_total").await - sent_before;
    assert!(
        sent < (EDITS * EDIT_BYTES / 2) as f64,
        "{sent} bytes were generated for a client that does not read"
    );
    reader
        .until("the last edit", |it| number(&it.open(&document).doc, "edits") == Some(EDITS as i64 - 1))
        .await;
    reader.in_step(&document).await;
    let messages = reader.open(&document).received.len() - before;
    assert!(messages < EDITS / 2, "{messages} messages for {EDITS} edits");
    assert_eq!(reader.open(&document).heads(), writer.open(&document).heads());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_takes_longer_than_silence_may_is_not_cut() {
    let store = MemoryStorage::new();
    let document = document_id("document");
    let mut doc = AutoCommit::new();
    (0..12).for_each(|part| put_noise(&mut doc, part, 1 << 20));
    let heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
    let changes = doc.get_changes(&[]).into_iter().map(|change| StoredChange {
        hash: ChangeHash(change.hash().0),
        bytes: change.raw_bytes().to_vec().into(),
    });
    append(&store, &document, changes.collect()).await;
    let mut settings = settings();
    settings.ping_seconds = 1;
    let node = Node::start_with(settings, store).await;
    let mut reader = Client::join_narrowly(node.clients, "reader").await;
    // A line of some 1 MB/s: one message of 12 MB, and nothing to answer before its end.
    reader.throttle(Duration::from_millis(10), 12 << 10);
    let started = Instant::now();
    reader.offer(&document, Vec::new(), Vec::new()).await;
    assert_eq!(reader.hear().await, Heard::Sync { document, heads });
    assert!(started.elapsed() > Duration::from_secs(8), "the test is too fast to show anything");
}

/// The same many changes for each of many documents, ready to be sent.
fn flood(documents: usize, changes: i64) -> Vec<(DocumentId, Vec<ChangeHash>, Vec<bytes::Bytes>)> {
    let mut doc = AutoCommit::new();
    (0..changes).for_each(|value| put(&mut doc, "edits", value));
    let changes: Vec<bytes::Bytes> =
        doc.get_changes(&[]).iter().map(|it| it.raw_bytes().to_vec().into()).collect();
    let heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
    (0..documents)
        .map(|number| (document_id(&format!("flood {number}")), heads.clone(), changes.clone()))
        .collect()
}

/// Waits until every document of a flood is acknowledged, with the one head it has.
async fn acknowledged(flooder: &mut Client, documents: usize, last: &[ChangeHash]) {
    let mut acknowledged = BTreeSet::new();
    while acknowledged.len() < documents {
        match flooder.hear().await {
            Heard::Sync { document, heads } if heads == last => {
                acknowledged.insert(document);
            }
            Heard::Sync { heads, .. } => {
                assert_eq!(heads, [], "nothing is known before everything is durable")
            }
            heard => panic!("{heard:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_does_not_hold_up_another_clients_acknowledgements() {
    const DOCUMENTS: usize = 120;
    let directory = tempfile::tempdir().unwrap();
    let storage = SqliteStorage::open(&directory.path().join("isobar.db")).await.unwrap();
    let node = Node::start(storage).await;
    let address = node.clients;
    let mut quiet = Client::join(address, "quiet").await;
    let document = document_id("quiet");
    quiet.share(&document, AutoCommit::new()).await;
    quiet.write(&document, |doc| put(doc, "edits", 0)).await;
    let flood = flood(DOCUMENTS, 500);
    let last = flood[0].1.clone();
    let flooding = tokio::spawn(async move {
        let mut flooder = Client::join(address, "flooder").await;
        for (document, heads, changes) in flood {
            flooder.offer(&document, heads, changes).await;
        }
        acknowledged(&mut flooder, DOCUMENTS, &last).await;
    });
    let mut slowest = Duration::ZERO;
    let mut edits = 0;
    while !flooding.is_finished() {
        edits += 1;
        let started = Instant::now();
        quiet.write(&document, |doc| put(doc, "edits", edits)).await;
        slowest = slowest.max(started.elapsed());
    }
    flooding.await.unwrap();
    assert!(edits >= 5, "{edits} edits were made during the flood: it was too short to show anything");
    assert!(slowest < Duration::from_secs(1), "an edit took {slowest:?} during a flood");
    let expected = (DOCUMENTS * 500) as f64 + 1.0 + edits as f64;
    assert_eq!(node.metric("isobar_committed_changes_total").await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_not_read_from_beyond_its_budget_of_uncommitted_changes() {
    const BUDGET_BYTES: f64 = (4 << 20) as f64;
    let (storage, faults) = FaultyStorage::new(&MemoryStorage::new());
    let node = Node::start(storage).await;
    let address = node.clients;
    faults.hold_appends();
    // Exactly as many changes as are offered at a time, so that the end of the message brings none.
    let flood = flood(80, 1_000);
    let message_bytes: usize = flood[0].2.iter().map(bytes::Bytes::len).sum();
    let flood_bytes = message_bytes * flood.len();
    assert!(flood_bytes as f64 > BUDGET_BYTES * 1.5, "{flood_bytes}");
    let last = flood[0].1.clone();
    let flooding = tokio::spawn(async move {
        let mut flooder = Client::join(address, "flooder").await;
        for (document, heads, changes) in flood {
            flooder.offer(&document, heads, changes).await;
        }
        acknowledged(&mut flooder, 80, &last).await;
    });
    eventually("the budget is used up", async || {
        node.metric("isobar_commit_queue_bytes").await > BUDGET_BYTES - 2.0 * message_bytes as f64
    })
    .await;
    // Another client is still read from: its edit waits behind the same held commit and not behind the flood.
    let mut other = Client::join(address, "other").await;
    let document = document_id("other");
    other.share(&document, AutoCommit::new()).await;
    other.edit(&document, |doc| put(doc, "edits", 1)).await;
    let received = node.metric("isobar_frame_bytes_received_total").await;
    assert!(received < BUDGET_BYTES + 3.0 * message_bytes as f64, "{received} bytes were read");
    assert!(node.metric("isobar_commit_queue_bytes").await < BUDGET_BYTES + message_bytes as f64);
    assert_eq!(node.metric("isobar_committed_changes_total").await, 0.0);
    faults.release_appends();
    other.in_step(&document).await;
    in_time("the flood is acknowledged", flooding).await.unwrap();
    eventually("the queue is empty", async || node.metric("isobar_commit_queue_bytes").await == 0.0).await;
}

#[tokio::test]
async fn a_connection_opens_so_many_documents_and_no_more() {
    let mut settings = settings();
    settings.connection_documents_max = 3;
    let node = Node::start_with(settings, MemoryStorage::new()).await;
    let mut greedy = Client::join(node.clients, "greedy").await;
    for number in 0..3 {
        let document = document_id(&format!("document {number}"));
        greedy.share(&document, AutoCommit::new()).await;
        greedy.write(&document, |doc| put(doc, "edits", 1)).await;
    }
    // Another is refused; presence for another is not an offence, and does nothing.
    greedy.ephemeral(&document_id("document 3"), 1, b"here").await;
    greedy.write(&document_id("document 0"), |doc| put(doc, "edits", 2)).await;
    greedy.share(&document_id("document 3"), AutoCommit::new()).await;
    let ended = greedy.ended().await;
    assert_eq!(ended.code, 1008, "{ended:?}");
    assert_eq!(node.refused("too_many_documents").await, 1.0);
}

#[tokio::test]
async fn a_full_node_answers_that_it_is_full() {
    let mut settings = settings();
    settings.connections_max = 2;
    let node = Node::start_with(settings, MemoryStorage::new()).await;
    let first = Client::join(node.clients, "first").await;
    let _second = Client::join(node.clients, "second").await;
    let Err(tungstenite::Error::Http(answer)) = Client::try_connect(node.clients).await else {
        panic!("a third client is turned away by HTTP");
    };
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "5");
    assert_eq!(node.metric("isobar_connections").await, 2.0);
    drop(first);
    eventually("there is room again", async || Client::try_connect(node.clients).await.is_ok()).await;
}

/// A document with somebody who talks and somebody who listens.
async fn talk(node: &Node) -> (DocumentId, Client, Client) {
    let document = document_id("document");
    let mut talker = Client::join(node.clients, "talker").await;
    talker.share(&document, AutoCommit::new()).await;
    talker.write(&document, |doc| put(doc, "edits", 0)).await;
    let mut listener = Client::join_narrowly(node.clients, "listener").await;
    listener.fetch(&document).await;
    (document, talker, listener)
}

#[tokio::test]
async fn presence_beyond_a_rate_is_dropped_and_counted() {
    let node = Node::start(MemoryStorage::new()).await;
    let (document, mut talker, mut listener) = talk(&node).await;
    let started = Instant::now();
    for count in 1..=1_000 {
        talker.ephemeral(&document, count, b"cursor").await;
    }
    // A burst of 200 and 100 a second, which is less than what may wait for the listener.
    let most = 200 + (started.elapsed().as_secs_f64() * 100.0) as usize + 20;
    // Whatever was relayed stands before this edit.
    talker.write(&document, |doc| put(doc, "edits", 1)).await;
    let mut heard = Vec::new();
    while number(&listener.open(&document).doc, "edits") != Some(1) {
        if let Heard::Ephemeral { count, .. } = listener.hear().await {
            heard.push(count);
        }
    }
    assert!(heard.is_sorted() && heard.starts_with(&[1, 2, 3]), "{heard:?}");
    assert!((200..=most).contains(&heard.len()), "{} were relayed, at most {most} should be", heard.len());
    let dropped = node.metric("isobar_lossy_frames_dropped_total").await;
    assert_eq!(dropped, (1_000 - heard.len()) as f64);
}

#[tokio::test]
async fn presence_for_a_client_that_does_not_read_loses_the_oldest() {
    const MESSAGES: u64 = 190;
    let node = Node::start(MemoryStorage::new()).await;
    let (document, mut talker, mut listener) = talk(&node).await;
    let data = noise(1, 60 << 10);
    for count in 1..=MESSAGES {
        talker.ephemeral(&document, count, &data).await;
    }
    // One that alone is beyond what may wait is dropped without pushing others out.
    talker.ephemeral(&document, MESSAGES + 1, &noise(2, 2 << 20)).await;
    talker.write(&document, |doc| put(doc, "edits", 1)).await;
    let mut heard = Vec::new();
    while heard.last() != Some(&MESSAGES) {
        match listener.hear().await {
            Heard::Ephemeral { count, data: received, .. } => {
                assert_eq!(received.len(), data.len());
                heard.push(count);
            }
            Heard::Sync { .. } => {}
            heard => panic!("{heard:?}"),
        }
    }
    listener.until("the edit", |it| number(&it.open(&document).doc, "edits") == Some(1)).await;
    assert!(heard.is_sorted());
    let dropped = node.metric("isobar_lossy_frames_dropped_total").await;
    assert_eq!(dropped, (MESSAGES + 1) as f64 - heard.len() as f64);
    assert!(dropped > 10.0, "{dropped} were dropped: too few to show anything");
    // The newest that fit into a megabyte were kept.
    let newest: Vec<u64> = (MESSAGES - 15..=MESSAGES).collect();
    assert!(heard.ends_with(&newest), "{heard:?}");
}

#[tokio::test]
async fn a_client_that_never_joins_is_closed() {
    let node = Node::start(MemoryStorage::new()).await;
    let mut stranger = Client::connect(node.clients).await;
    let mut friend = Client::join(node.clients, "friend").await;
    let ended = stranger.ended().await;
    assert_eq!(ended.code, 1008, "{ended:?}");
    assert_eq!(node.refused("no_join").await, 1.0);
    let document = document_id("document");
    friend.share(&document, AutoCommit::new()).await;
    friend.write(&document, |doc| put(doc, "edits", 1)).await;
}

#[tokio::test]
async fn frames_up_to_the_limit_are_taken_and_relayed() {
    let mut settings = settings();
    settings.frame_bytes_max = 1 << 20;
    settings.change_bytes_max = 1 << 20;
    let node = Node::start_with(settings, MemoryStorage::new()).await;
    let (document, mut writer, mut reader) = talk(&node).await;
    for edit in 1..=3 {
        writer.write(&document, |doc| put_noise(doc, edit, (1 << 20) - 1_000)).await;
        reader.until("the edit", |it| number(&it.open(&document).doc, "edits") == Some(edit as i64)).await;
    }
    // What a client is sent may be larger than what it may send.
    let mut cold = Client::join(node.clients, "cold").await;
    cold.fetch(&document).await;
    assert_eq!(cold.open(&document).heads(), writer.open(&document).heads());
}

#[tokio::test]
async fn changes_without_their_dependencies_are_bounded_over_all_documents() {
    let mut settings = settings();
    settings.resident_bytes_max = 8 << 20;
    settings.idle_seconds = 0;
    let node = Node::start_with(settings, MemoryStorage::new()).await;
    let (document, mut writer, _reader) = talk(&node).await;
    let mut doc = AutoCommit::new();
    put(&mut doc, "edits", 1);
    let first = doc.get_last_local_change().unwrap().raw_bytes().to_vec();
    put_noise(&mut doc, 2, 1 << 20);
    let noise = doc.get_changes(&[]).into_iter().map(|it| bytes::Bytes::from(it.raw_bytes().to_vec()));
    let orphans: Vec<bytes::Bytes> = noise.skip(1).collect();
    let heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
    // Half of eight megabytes: one each for so many documents, and no more.
    let mut hoarder = Client::join(node.clients, "hoarder").await;
    for number in 0..6 {
        hoarder.offer(&document_id(&format!("orphan {number}")), heads.clone(), orphans.clone()).await;
    }
    assert_eq!(hoarder.ended().await.code, 1008);
    assert_eq!(node.refused("pending_full").await, 1.0);
    writer.write(&document, |doc| put(doc, "edits", 1)).await;
    drop(hoarder);
    // What nobody has open any more makes room, and so does a change whose dependency comes.
    eventually("the hoard is gone", async || node.metric("isobar_documents_resident").await == 1.0).await;
    let mut late = Client::join(node.clients, "late").await;
    for number in 0..6 {
        let document = document_id(&format!("orphan {number}"));
        late.offer(&document, heads.clone(), orphans.clone()).await;
        late.offer(&document, heads.clone(), vec![first.clone().into()]).await;
    }
    acknowledged(&mut late, 6, &heads).await;
    assert_eq!(node.refused("pending_full").await, 1.0);
}
