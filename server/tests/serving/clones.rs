//! A region that was started twice, on copies of one database.

use automerge::AutoCommit;
use isobar::config::ClusterKey;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar_protocol::ids::DocumentId;
use isobar_protocol::replica::LinkId;
use tempfile::TempDir;

use crate::siblings::region_at;
use crate::support::{Client, Node, document_id, eventually, number, put};

/// Region "far", and a directory for the databases of region "near", which dials it.
struct Scene {
    key: ClusterKey,
    far: Node,
    directory: TempDir,
}

impl Scene {
    async fn start() -> Self {
        let key = ClusterKey::random();
        let far = Node::start_with(region_at("far", &key, &[]), MemoryStorage::new()).await;
        Self { key, far, directory: TempDir::new().unwrap() }
    }

    /// Starts a node of region "near" on one of the databases.
    async fn near(&self, database: &str) -> Node {
        let storage = SqliteStorage::open(&self.directory.path().join(database)).await.unwrap();
        Node::start_with(region_at("near", &self.key, &[self.far.peers.unwrap()]), storage).await
    }

    /// To be called while nothing runs on the first.
    fn copy(&self, from: &str, to: &str) {
        let path = |name: &str| self.directory.path().join(name);
        assert!(!path(&format!("{from}-wal")).exists(), "all of it is in one file");
        std::fs::copy(path(from), path(to)).unwrap();
    }

    /// By which link region "near" is linked.
    fn link(&self) -> Option<LinkId> {
        self.far.parts.replication.as_ref().unwrap().regions().iter().find_map(|region| region.link)
    }

    async fn is_linked(&self) -> LinkId {
        eventually("near is linked", async || self.link().is_some()).await;
        self.link().unwrap()
    }
}

async fn write(node: &Node, document: &DocumentId, actor: u8) {
    let mut author = Client::join(node.clients, &format!("author {actor}")).await;
    author.share(document, AutoCommit::new().with_actor([actor; 16].into())).await;
    author.write(document, |doc| put(doc, "edits", 1)).await;
}

/// Waits until a node gives a document to a client of its own.
async fn gives(node: &Node, document: &DocumentId) {
    let mut reader = Client::join(node.clients, &uuid::Uuid::new_v4().to_string()).await;
    reader.share(document, AutoCommit::new()).await;
    reader.until("it comes", |it| number(&it.open(document).doc, "edits") == Some(1)).await;
}

async fn clones_reported(node: &Node) -> f64 {
    node.metric("isobar_cloned_regions_total").await
}

#[tokio::test]
async fn of_two_copies_one_is_linked_and_the_other_brings_what_it_has_when_that_one_is_gone() {
    let scene = Scene::start().await;
    let [before, of_original, of_copy, later] =
        ["before", "of the original", "of the copy", "later"].map(document_id);
    let original = scene.near("original.db").await;
    scene.is_linked().await;
    write(&original, &before, 1).await;
    gives(&scene.far, &before).await;
    original.stop().await.unwrap();
    scene.copy("original.db", "copy.db");

    eventually("the link is gone", async || scene.link().is_none()).await;
    let original = scene.near("original.db").await;
    let link = scene.is_linked().await;
    assert_eq!(clones_reported(&scene.far).await, 0.0, "a restart is none");
    let copy = scene.near("copy.db").await;
    write(&original, &of_original, 2).await;
    write(&copy, &of_copy, 3).await;
    eventually("both ends report it", async || {
        clones_reported(&scene.far).await >= 2.0 && clones_reported(&copy).await >= 2.0
    })
    .await;
    assert_eq!(scene.link(), Some(link), "the older link stays");
    assert_eq!(clones_reported(&original).await, 0.0, "it is linked");
    gives(&scene.far, &of_original).await;
    let far_has =
        async |document: &DocumentId| scene.far.parts.storage.load_document(document).await.unwrap();
    assert!(far_has(&of_copy).await.is_none(), "nothing was taken from the other");

    // The copy is linked in the place of the original, gets what only that one had, and brings its own.
    original.stop().await.unwrap();
    gives(&scene.far, &of_copy).await;
    gives(&copy, &of_original).await;
    write(&copy, &later, 4).await;
    gives(&scene.far, &later).await;
    copy.stop().await.unwrap();

    // And the other way round.
    let original = scene.near("original.db").await;
    for document in [&before, &of_original, &of_copy, &later] {
        gives(&original, document).await;
        gives(&scene.far, document).await;
    }
    for node in [&original, &scene.far] {
        assert_eq!(node.metric("isobar_origins_forked_total").await, 0.0);
        assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
    }
}

#[tokio::test]
async fn a_node_that_takes_over_on_the_same_database_is_no_copy() {
    let scene = Scene::start().await;
    let original = scene.near("original.db").await;
    let first = scene.is_linked().await;
    // The first still has its link when the second comes, which fences it.
    let second = scene.near("original.db").await;
    eventually("the second is linked", async || scene.link().is_some_and(|link| link != first)).await;
    let document = document_id("document");
    write(&second, &document, 1).await;
    gives(&scene.far, &document).await;
    drop(original);
    for node in [&second, &scene.far] {
        assert_eq!(clones_reported(node).await, 0.0);
    }
}
