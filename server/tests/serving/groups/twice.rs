//! Documents that were created in two groups: nothing is mixed, and they are out of service where the groups meet.

use isobar::storage::{Batch, Deletion, DocumentAppend, DocumentState, StoredChange};
use isobar_protocol::ids::{ChangeHash, OriginId};
use isobar_protocol::link::DocumentContents;
use isobar_protocol::log::Content;

use super::*;

/// Frankfurt and Paris are in "eu", Paris and Tokyo in "asia".
struct Meeting {
    frankfurt: Node,
    paris: Node,
    tokyo: Node,
    /// Of the three, in this order.
    stores: [MemoryStorage; 3],
}

fn group(name: &str) -> PlacementGroup {
    PlacementGroup::new(name).unwrap()
}

fn member(name: &str, key: &ClusterKey, peers: &[&Node]) -> Settings {
    let of = |regions: [&str; 2]| regions.map(str::to_owned).to_vec();
    let groups = [("eu", of(["frankfurt", "paris"])), ("asia", of(["paris", "tokyo"]))];
    let groups: std::collections::BTreeMap<_, _> =
        groups.into_iter().map(|(name, regions)| (name.to_owned(), regions)).collect();
    let groups = Groups::try_from(groups).unwrap();
    Settings { groups, scrub_minutes: 0, ..region(name, key, peers) }
}

impl Meeting {
    async fn start(stores: [MemoryStorage; 3]) -> Self {
        let key = ClusterKey::random();
        let frankfurt = Node::start_with(member("frankfurt", &key, &[]), stores[0].reopen()).await;
        let paris = Node::start_with(member("paris", &key, &[&frankfurt]), stores[1].reopen()).await;
        let peers = [&frankfurt, &paris];
        let tokyo = Node::start_with(member("tokyo", &key, &peers), stores[2].reopen()).await;
        for node in [&frankfurt, &paris, &tokyo] {
            linked(node, 2).await;
        }
        Self { frankfurt, paris, tokyo, stores }
    }

    async fn new() -> Self {
        Self::start(std::array::from_fn(|_| MemoryStorage::new())).await
    }

    async fn european(&self) -> Client {
        Client::join_as(self.frankfurt.clients, "?group=eu", "european", &[]).await.unwrap()
    }

    async fn asian(&self) -> Client {
        Client::join_as(self.tokyo.clients, "?group=asia", "asian", &[]).await.unwrap()
    }

    async fn has(&self, store: usize, document: &DocumentId) {
        let store = &self.stores[store];
        eventually("the document is stored", async || store.load_document(document).await.unwrap().is_some())
            .await;
    }

    /// Paris has quarantined the document, which it has in "eu", and nothing of either copy is where its group is not.
    async fn is_kept_apart(&self, document: &DocumentId, european: &mut Client, asian: &mut Client) {
        let [frankfurt, paris, tokyo] = &self.stores;
        eventually("it is quarantined", async || !is_live(paris, document).await).await;
        let stored = paris.load_document(document).await.unwrap().unwrap();
        let DocumentState::Quarantined { reason } = stored.state else { panic!("{:?}", stored.state) };
        assert!(reason.contains("eu") && reason.contains("asia"), "{reason}");
        assert_eq!(stored.group, group("eu"));
        let theirs: BTreeSet<ChangeHash> = hashes(european, document);
        let others: BTreeSet<ChangeHash> = hashes(asian, document);
        assert!(theirs.is_disjoint(&others) && !theirs.is_empty() && !others.is_empty());
        assert!(stored.tail.iter().all(|change| theirs.contains(&change.hash)));
        // What was written afterwards in each group has arrived, so no log stands still, and what was to leak has had its time.
        for (client, name, stores) in [(european, "eu's next", [0, 1]), (asian, "asia's next", [1, 2])] {
            let next = document_id(name);
            shared_doc(client, &next).await;
            for store in stores {
                self.has(store, &next).await;
            }
        }
        for (store, foreign) in [(frankfurt, &others), (tokyo, &theirs)] {
            assert!(is_live(store, document).await);
            assert!(everything(store, document).await.is_disjoint(foreign));
        }
        assert_eq!(self.paris.metric("isobar_documents_quarantined_total").await, 1.0);
    }
}

async fn is_live(store: &MemoryStorage, document: &DocumentId) -> bool {
    store.find_document(document).await.unwrap().is_some_and(|it| it.state == DocumentState::Live)
}

fn hashes(client: &mut Client, document: &DocumentId) -> BTreeSet<ChangeHash> {
    let doc = &mut client.open(document).doc;
    doc.get_changes(&[]).iter().map(|change| ChangeHash(change.hash().0)).collect()
}

/// What a store has of a document, among its changes and in its logs.
async fn everything(store: &MemoryStorage, document: &DocumentId) -> BTreeSet<ChangeHash> {
    let stored = store.load_document(document).await.unwrap().unwrap();
    let mut found: BTreeSet<ChangeHash> = stored.tail.iter().map(|change| change.hash).collect();
    for origin in store.origins().await.unwrap() {
        for run in store.read_log(origin.id, Seq(0), usize::MAX).await.unwrap() {
            let entries = decode_run(&run.body).unwrap().into_iter().filter(|it| it.document == *document);
            found.extend(entries.filter_map(|entry| match entry.content {
                Content::Change { hash, .. } => Some(hash),
                _ => None,
            }));
        }
    }
    found
}

async fn is_unavailable(node: &Node, name: &str, document: &DocumentId) {
    let mut client = Client::join(node.clients, name).await;
    client.share(document, AutoCommit::new()).await;
    client.until("it is unavailable", |it| it.open(document).unavailable > 0).await;
    assert_eq!(client.open(document).received.iter().map(|it| it.0 + it.1).sum::<usize>(), 0);
}

#[tokio::test]
async fn a_document_that_is_open_where_its_two_groups_meet_goes_out_of_service_unmixed() {
    let meeting = Meeting::new().await;
    let document = document_id("twice");
    let (mut european, mut asian) = (meeting.european().await, meeting.asian().await);
    shared_doc(&mut european, &document).await;
    let mut reader = Client::join(meeting.paris.clients, "reader").await;
    reader.fetch(&document).await;
    shared_doc(&mut asian, &document).await;
    reader.until("it goes out of service", |it| it.open(&document).unavailable > 0).await;
    meeting.is_kept_apart(&document, &mut european, &mut asian).await;
    assert_eq!(hashes(&mut reader, &document), hashes(&mut european, &document));

    // Each copy is served where only its group is, and what is written to it on and on changes nothing.
    european.write(&document, |doc| put(doc, "key", 2)).await;
    asian.write(&document, |doc| put(doc, "key", 3)).await;
    is_unavailable(&meeting.paris, "late", &document).await;
    meeting.paris.stop().await.unwrap();
    let alone = member("paris", &ClusterKey::random(), &[]);
    let paris = Node::start_with(alone, meeting.stores[1].reopen()).await;
    is_unavailable(&paris, "after the restart", &document).await;
}

#[tokio::test]
async fn a_document_that_nobody_has_open_is_kept_apart_without_being_loaded() {
    let meeting = Meeting::new().await;
    let document = document_id("twice");
    let (mut european, mut asian) = (meeting.european().await, meeting.asian().await);
    shared_doc(&mut european, &document).await;
    meeting.has(1, &document).await;
    shared_doc(&mut asian, &document).await;
    meeting.is_kept_apart(&document, &mut european, &mut asian).await;
    assert_eq!(meeting.paris.metric("isobar_documents_loaded_total").await, 0.0);
    asian.write(&document, |doc| put(doc, "key", 3)).await;
    is_unavailable(&meeting.paris, "late", &document).await;
    let is_counted = async || meeting.paris.metric("isobar_documents_in_quarantine").await == 1.0;
    eventually("it is counted", is_counted).await;
    assert_eq!(meeting.paris.metric("isobar_documents_quarantined_total").await, 1.0);
}

fn change(value: i64) -> StoredChange {
    let mut doc = AutoCommit::new();
    put(&mut doc, "key", value);
    let change = doc.get_last_local_change().unwrap();
    StoredChange { hash: ChangeHash(change.hash().0), bytes: change.raw_bytes().to_vec().into() }
}

/// A store that holds a document with one change, which no log names.
async fn holding(document: &DocumentId, of: &str, change: &StoredChange) -> MemoryStorage {
    let store = MemoryStorage::new();
    let append = DocumentAppend {
        document: document.clone(),
        group: group(of),
        origin: OriginId(uuid::Uuid::new_v4()),
        changes: vec![(Seq(1), change.clone())],
    };
    store.append(&Batch { changes: vec![append], ..Batch::default() }).await.unwrap();
    store
}

async fn check(node: &Node) -> Vec<Outcome> {
    let replication = node.parts.replication.as_ref().unwrap();
    assert!(replication.check_now());
    eventually("the check ends", async || !replication.is_checking()).await;
    replication.checked().values().map(|it| it.outcome).collect()
}

#[tokio::test]
async fn a_copy_of_another_group_is_not_merged_however_it_comes() {
    let document = document_id("twice");
    let (ours, theirs) = (change(1), change(2));
    for comes in ["open", "closed", "asked for", "offered"] {
        let paris = holding(&document, "eu", &ours).await;
        let tokyo = holding(&document, "asia", &theirs).await;
        let stores = [MemoryStorage::new(), paris.reopen(), tokyo.reopen()];
        let meeting = Meeting::start(stores).await;
        let parts = &meeting.paris.parts;
        let contents = DocumentContents {
            document: document.clone(),
            group: group("asia"),
            deleted_at_ms: None,
            base: None,
            changes: vec![theirs.bytes.clone()],
        };
        let mut reader = Client::join(meeting.paris.clients, "reader").await;
        match comes {
            "open" => reader.fetch(&document).await,
            "asked for" => assert_eq!(check(&meeting.paris).await[1], Outcome::Diverged),
            "offered" => assert!(check(&meeting.tokyo).await.contains(&Outcome::Diverged)),
            _ => {}
        }
        if ["open", "closed"].contains(&comes) {
            parts.documents.store_contents(contents, &parts.committer).await.unwrap();
        }
        eventually("it is quarantined", async || !is_live(&paris, &document).await).await;
        let stored = paris.load_document(&document).await.unwrap().unwrap();
        assert_eq!(stored.tail, std::slice::from_ref(&ours), "{comes}");
        let of_tokyo = tokyo.load_document(&document).await.unwrap().unwrap();
        assert_eq!(of_tokyo.tail, std::slice::from_ref(&theirs));
        assert!(is_live(&tokyo, &document).await);
        assert_eq!(meeting.paris.metric("isobar_documents_quarantined_total").await, 1.0, "{comes}");
        is_unavailable(&meeting.paris, "late", &document).await;
        if comes == "open" {
            reader.until("it goes out of service", |it| it.open(&document).unavailable > 0).await;
        }
    }
}

#[tokio::test]
async fn a_deletion_wins_over_a_copy_of_another_group_and_is_found_once() {
    let document = document_id("twice");
    let deleted = async |of: &str| {
        let store = MemoryStorage::new();
        let deletion = Deletion { document: document.clone(), group: group(of), deleted_at_ms: 500 };
        store.append(&Batch { deletions: vec![deletion], ..Batch::default() }).await.unwrap();
        store
    };
    for checks_first in ["paris", "tokyo"] {
        let paris = deleted("eu").await;
        let tokyo = holding(&document, "asia", &change(1)).await;
        let stores = [deleted("eu").await, paris.reopen(), tokyo.reopen()];
        let meeting = Meeting::start(stores).await;
        let first = if checks_first == "paris" { &meeting.paris } else { &meeting.tokyo };
        assert!(!check(first).await.contains(&Outcome::Diverged), "{checks_first}");
        eventually("the deletion wins", async || {
            let found = tokyo.find_document(&document).await.unwrap().unwrap();
            assert_eq!(found.group, group("asia"));
            matches!(found.state, DocumentState::Deleted { .. })
        })
        .await;
        for node in [&meeting.paris, &meeting.tokyo, &meeting.frankfurt] {
            assert_eq!(check(node).await, [Outcome::Equal; 2], "{checks_first}");
        }
        let of_paris = paris.find_document(&document).await.unwrap().unwrap();
        assert_eq!(of_paris.group, group("eu"));
    }
}
