//! What operators see of documents that are not served.

use isobar::storage::memory::MemoryStorage;
use isobar::storage::{Deletion, DocumentState, Storage};
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use serde_json::{Value, json};

use crate::support::{Node, document_id, eventually, get};

const LISTED: &str = "/admin/v1/documents";

async fn page(node: &Node, query: &str) -> Value {
    let (status, body) = get(node.admin, &format!("{LISTED}?{query}")).await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// All pages, one after the other; how many there were, and their documents.
async fn pages(node: &Node, query: &str) -> (usize, Vec<Value>) {
    let (mut count, mut documents, mut cursor) = (0, Vec::new(), String::new());
    loop {
        let page = page(node, &format!("{query}{cursor}")).await;
        documents.extend(page["documents"].as_array().unwrap().clone());
        count += 1;
        match page["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return (count, documents),
        }
    }
}

async fn quarantine(store: &MemoryStorage, document: &DocumentId) {
    let state = DocumentState::Quarantined { reason: "does not apply".to_owned() };
    store.set_state(document, &state).await.unwrap();
}

/// A store with six documents, and their views in the order of their ids: the second and the fifth are quarantined, the third
/// is deleted.
async fn store() -> (MemoryStorage, Vec<DocumentId>, Vec<Value>) {
    let (store, group) = (MemoryStorage::new(), PlacementGroup::new("default").unwrap());
    let mut ids: Vec<_> = ["one", "two", "three", "four", "five", "six"].map(document_id).into();
    ids.sort();
    for id in &ids {
        store.create_document(id, &group).await.unwrap();
    }
    quarantine(&store, &ids[1]).await;
    quarantine(&store, &ids[4]).await;
    let deletion = Deletion { document: ids[2].clone(), group, deleted_at_ms: 500 };
    let batch = isobar::storage::Batch { deletions: vec![deletion], ..Default::default() };
    store.append(&batch).await.unwrap();
    let view = |(place, id): (usize, &DocumentId)| match (place, id.to_string()) {
        (1 | 4, id) => {
            json!({"id": id, "group": "default", "state": "quarantined", "reason": "does not apply"})
        }
        (2, id) => json!({"id": id, "group": "default", "state": "deleted", "deleted_at_ms": 500}),
        (_, id) => json!({"id": id, "group": "default", "state": "live"}),
    };
    let views = ids.iter().enumerate().map(view).collect();
    (store, ids, views)
}

#[tokio::test]
async fn operators_list_documents_by_state_page_by_page() {
    let (store, ids, views) = store().await;
    let node = Node::start(store.reopen()).await;
    let some = |places: &[usize]| places.iter().map(|place| views[*place].clone()).collect::<Vec<_>>();
    assert_eq!(pages(&node, "").await, (1, views.clone()));
    assert_eq!(pages(&node, "limit=2").await, (4, views.clone()));
    assert_eq!(pages(&node, "state=quarantined").await, (1, some(&[1, 4])));
    assert_eq!(pages(&node, "state=quarantined&limit=1").await, (3, some(&[1, 4])));
    // A page looks at no more documents than it may list, whether they are of the state or not.
    assert_eq!(pages(&node, "state=live&limit=4").await, (2, some(&[0, 3, 5])));
    assert_eq!(pages(&node, "state=deleted&limit=1").await, (7, some(&[2])));
    let empty = page(&node, "state=deleted&limit=1").await;
    assert_eq!(empty, json!({"documents": [], "cursor": ids[0].to_string()}));
}

#[tokio::test]
async fn a_query_for_documents_that_cannot_be_meant_is_refused_with_the_reason() {
    let (store, _, views) = store().await;
    let node = Node::start(store.reopen()).await;
    for (query, reason) in [
        ("state=dead", "live, deleted and quarantined"),
        ("limit=0", "from 1 to 1000"),
        ("limit=1001", "from 1 to 1000"),
        ("limit=many", "from 1 to 1000"),
        ("cursor=0O", "0O"),
        ("sate=live", "sate"),
    ] {
        let (status, body) = get(node.admin, &format!("{LISTED}?{query}")).await;
        assert_eq!(status, 400, "{query}");
        let problem: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(problem["type"], "/problems/bad-query");
        assert!(problem["detail"].as_str().unwrap().contains(reason), "{body}");
    }
    assert_eq!(pages(&node, "limit=1000").await, (1, views));
}

#[tokio::test]
async fn documents_in_quarantine_are_counted_after_a_restart_and_when_others_change_their_state() {
    let (store, ids, _) = store().await;
    let node = Node::start(store.reopen()).await;
    let counts = async |node: &Node, expected: f64| {
        eventually("they are counted", async || {
            node.metric("isobar_documents_in_quarantine").await == expected
        })
        .await;
    };
    counts(&node, 2.0).await;
    quarantine(&store, &ids[0]).await;
    counts(&node, 3.0).await;
    store.set_state(&ids[4], &DocumentState::Live).await.unwrap();
    store.set_state(&ids[1], &DocumentState::Live).await.unwrap();
    counts(&node, 1.0).await;
    node.stop().await.unwrap();
    counts(&Node::start(store.reopen()).await, 1.0).await;
}
