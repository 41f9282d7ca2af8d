//! What is in memory, and what is never opened.

use automerge::AutoCommit;
use automerge::transaction::Transactable;
use automerge::{ROOT, ScalarValue};
use isobar::config::Settings;
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::DocumentId;

use crate::support::{Client, Node, document_id, eventually, number, put, settings};

/// How often a node has opened documents with the CRDT, for whatever reason.
pub async fn materialised(node: &Node) -> f64 {
    let mut times = 0.0;
    for reason in ["upload", "compaction", "contents", "old_client"] {
        times += node.metric(&format!("isobar_documents_materialised_total{{reason=\"{reason}\"}}")).await;
    }
    times
}

#[tokio::test]
async fn nothing_that_is_stored_relayed_or_served_is_opened() {
    let store = MemoryStorage::new();
    let document = document_id("document");
    let node = Node::start(store.reopen()).await;
    let mut writer = Client::join(node.clients, "writer").await;
    writer.share(&document, AutoCommit::new()).await;
    // Stock clients send a whole document to who has nothing of it, or lacks more than a third: that is split, once.
    for edit in 0..40 {
        writer.write(&document, |doc| put(doc, "edits", edit)).await;
    }
    let uploads = materialised(&node).await;
    let mut reader = Client::join(node.clients, "reader").await;
    reader.fetch(&document).await;
    for edit in 40..50 {
        writer.write(&document, |doc| put(doc, "edits", edit)).await;
        reader.write(&document, |doc| put(doc, "reader's", edit)).await;
    }
    reader.until("the last edit", |it| number(&it.open(&document).doc, "edits") == Some(49)).await;
    reader.in_step(&document).await;
    assert_eq!(materialised(&node).await, uploads);
    node.stop().await.unwrap();

    // Nor what is read from storage, for a client that knows nothing and for one that lacks a little.
    let node = Node::start(store.reopen()).await;
    let mut cold = Client::join(node.clients, "cold").await;
    cold.fetch(&document).await;
    assert_eq!(number(&cold.open(&document).doc, "edits"), Some(49));
    let mut back = Client::join(node.clients, "writer").await;
    let doc = writer.open(&document).doc.fork();
    back.share(&document, doc).await;
    back.write(&document, |doc| put(doc, "edits", 50)).await;
    cold.until("the edit", |it| number(&it.open(&document).doc, "edits") == Some(50)).await;
    assert_eq!(node.metric("isobar_documents_loaded_total").await, 1.0);
    assert_eq!(materialised(&node).await, 0.0);
}

const DOCUMENT_BYTES: usize = 20_000;

fn id(number: usize) -> DocumentId {
    document_id(&format!("document {number}"))
}

/// A document of so many bytes, left by its author.
async fn visit(node: &Node, number: usize) {
    let mut doc = AutoCommit::new();
    doc.put(ROOT, "filling", ScalarValue::Bytes(vec![number as u8; DOCUMENT_BYTES])).unwrap();
    let mut author = Client::join(node.clients, &format!("author {number}")).await;
    author.share(&id(number), doc).await;
    author.in_step(&id(number)).await;
    drop(author);
    eventually("the author has left", async || node.metric("isobar_connections").await == 1.0).await;
}

#[tokio::test]
async fn beyond_the_budget_the_documents_that_were_left_first_leave_memory() {
    let roomy = Settings { resident_bytes_max: 5 * DOCUMENT_BYTES, idle_seconds: 3_600, ..settings() };
    let node = Node::start_with(roomy, MemoryStorage::new()).await;
    let open = document_id("open");
    let mut staying = Client::join(node.clients, "staying").await;
    staying.share(&open, AutoCommit::new()).await;
    staying.write(&open, |doc| put(doc, "key", 1)).await;
    for number in 0..4 {
        visit(&node, number).await;
    }
    let documents = &node.parts.documents;
    documents.sweep();
    let resident = |id: &DocumentId| documents.resident(id).is_some();
    assert!((0..4).all(|number| resident(&id(number))), "there is room for four");
    for number in 4..8 {
        visit(&node, number).await;
    }
    documents.sweep();
    let left: Vec<usize> = (0..8).filter(|number| resident(&id(*number))).collect();
    assert_eq!(left, [4, 5, 6, 7]);
    assert!(resident(&open), "what somebody has open stays");
    assert_eq!(node.metric("isobar_documents_evicted_total").await, 4.0);
    assert!(node.metric("isobar_documents_resident_bytes").await <= (5 * DOCUMENT_BYTES) as f64);

    // It is where it was for the next who asks.
    let mut reader = Client::join(node.clients, "reader").await;
    reader.fetch(&id(0)).await;
    assert_eq!(node.metric("isobar_documents_loaded_total").await, 1.0);
}
