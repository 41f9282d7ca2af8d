//! What one region's disk has lost or damaged is found, exactly, and comes back from another region.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use automerge::AutoCommit;
use isobar::config::{ClusterKey, PeerAddress, Settings};
use isobar::documents::Inspection;
use isobar::replication::{Checked, Outcome};
use isobar::storage::Storage;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar_protocol::ids::{ChangeHash, DocumentId};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Row};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

mod damaged_log;

use crate::support::{
    Client, FaultyStorage, Node, document_id, eventually, get, in_time, number, put, settings,
};

/// Two linked regions, each on a file.
struct Cluster {
    _directory: TempDir,
    here: Node,
    there: Node,
    /// The file of `here`.
    file: PathBuf,
    there_file: PathBuf,
    key: ClusterKey,
}

fn region(name: &str, key: &ClusterKey, peer: Option<&Node>) -> Settings {
    let address = |node: &Node| PeerAddress::WebSocket(format!("ws://{}", node.peers.unwrap()));
    Settings {
        region: name.to_owned(),
        cluster_key: Some(key.clone()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        peers: peer.map(address).into_iter().collect(),
        scrub_minutes: 0,
        verify_rate: 0,
        idle_seconds: 0,
        ..settings()
    }
}

async fn start(settings: Settings, file: &Path) -> Node {
    let storage: Arc<dyn Storage> = Arc::new(SqliteStorage::open(file).await.unwrap());
    Node::start_on(settings, storage).await
}

async fn linked(node: &Node) {
    let replication = node.parts.replication.as_ref().unwrap();
    eventually("the regions are linked", async || replication.is_linked()).await;
}

impl Cluster {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = ClusterKey::random();
        let file = directory.path().join("here.db");
        let there_file = directory.path().join("there.db");
        let there = start(region("there", &key, None), &there_file).await;
        let here = start(region("here", &key, Some(&there)), &file).await;
        linked(&here).await;
        Self { _directory: directory, here, there, file, there_file, key }
    }

    /// Starts `here` again, after something was done to its file.
    async fn restart_here(self, spoil: impl AsyncFnOnce(&mut SqliteConnection), verify_rate: u64) -> Self {
        let Self { _directory, here, there, file, there_file, key } = self;
        here.stop().await.unwrap();
        let mut connection = beside(&file).await;
        spoil(&mut connection).await;
        connection.close().await.unwrap();
        let here = start(Settings { verify_rate, ..region("here", &key, Some(&there)) }, &file).await;
        linked(&here).await;
        Self { _directory, here, there, file, there_file, key }
    }

    /// Both regions hold the same of these documents.
    async fn settled(&self, documents: &[&DocumentId]) {
        for document in documents {
            eventually("both regions hold the same", async || {
                let looks = [&self.here, &self.there].map(|it| it.parts.documents.inspect(document, false));
                let [here, there] = looks.map(async |look| look.await.unwrap().and_then(|it| it.held));
                let (here, there) = (here.await, there.await);
                here.is_some() && here == there
            })
            .await;
        }
    }
}

impl Cluster {
    /// A document that is written to at a node, change by change, each of which is stored alone in both regions.
    async fn written(&self, node: &Node, name: &str, changes: i64) -> (Client, DocumentId) {
        let (mut client, document) = written(node, name, 1).await;
        self.settled(&[&document]).await;
        for edit in 1..changes {
            client.write(&document, |doc| put(doc, "edits", edit)).await;
            self.settled(&[&document]).await;
        }
        (client, document)
    }
}

async fn held(node: &Node, document: &DocumentId) -> Inspection {
    let inspection = node.parts.documents.inspect(document, true).await.unwrap();
    inspection.unwrap_or_else(|| panic!("{document} is not stored"))
}

async fn beside(file: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(file)).await.unwrap()
}

/// A client that writes a document with so many changes, each by itself.
async fn written(node: &Node, name: &str, changes: i64) -> (Client, DocumentId) {
    let document = document_id(name);
    let mut client = Client::join(node.clients, name).await;
    client.share(&document, AutoCommit::new()).await;
    for edit in 0..changes {
        client.write(&document, |doc| put(doc, "edits", edit)).await;
    }
    (client, document)
}

/// Removes a document's row number `row` from `here`, counted from its first change.
async fn drop_row(connection: &mut SqliteConnection, document: &DocumentId, row: i64) {
    let removed = sqlx::query(
        "DELETE FROM changes WHERE document_id = ?1 AND first_seq = \
         (SELECT first_seq FROM changes WHERE document_id = ?1 ORDER BY first_seq LIMIT 1 OFFSET ?2)",
    )
    .bind(document.as_bytes())
    .bind(row)
    .execute(connection)
    .await
    .unwrap();
    assert_eq!(removed.rows_affected(), 1);
}

async fn post(node: &Node, path: &str) -> (u16, serde_json::Value) {
    in_time("an HTTP answer", async {
        let mut stream = TcpStream::connect(node.admin).await.unwrap();
        let request =
            format!("POST {path} HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, serde_json::from_str(body).unwrap())
    })
    .await
}

async fn convergence(node: &Node) -> serde_json::Value {
    let (status, body) = get(node.admin, "/admin/v1/convergence").await;
    assert_eq!(status, 200);
    serde_json::from_str(&body).unwrap()
}

/// Has a node check now, and returns what it says of the other region afterwards.
async fn checked(node: &Node, other: &str) -> serde_json::Value {
    let (status, answer) = post(node, "/admin/v1/convergence/checks").await;
    assert_eq!((status, &answer["begun"]), (202, &true.into()));
    let mut shown = serde_json::Value::Null;
    eventually("the check ends", async || {
        shown = convergence(node).await;
        shown["checking"] == false
    })
    .await;
    shown["regions"][other].clone()
}

/// Waits until a node says that it stands so to another region; its view of the links is some moments old.
async fn stands(node: &Node, other: &str, state: &str) {
    eventually(state, async || convergence(node).await["regions"][other]["state"] == state).await;
}

fn divergences(shown: &serde_json::Value) -> Vec<(String, String, bool)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let listed = shown["last_check"]["divergences"].as_array().unwrap().iter();
    listed
        .map(|it| (text(&it["document"]), text(&it["difference"]), it["repaired"].as_bool().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_one_region_lost_is_found_exactly_and_comes_back_to_subscribers() {
    let cluster = Cluster::start().await;
    let (mut author, lost) = cluster.written(&cluster.there, "lost", 4).await;
    let (_other, whole) = cluster.written(&cluster.here, "whole", 3).await;
    cluster.settled(&[&lost, &whole]).await;
    let shown = checked(&cluster.here, "there").await;
    assert_eq!(shown["last_check"]["result"], "equal");
    stands(&cluster.here, "there", "equal").await;
    assert_eq!(cluster.here.metric("isobar_scrub_differences_total").await, 0.0);

    let cluster = cluster.restart_here(async |it| drop_row(it, &lost, 1).await, 0).await;
    let mut reader = Client::join(cluster.here.clients, "reader").await;
    reader.fetch(&lost).await;
    assert_eq!(
        number(&reader.open(&lost).doc, "edits"),
        Some(0),
        "what follows the lost change waits for it"
    );
    let shown = checked(&cluster.here, "there").await;
    assert_eq!(divergences(&shown), [(lost.to_string(), "different".to_owned(), true)]);
    assert_eq!(shown["last_check"]["result"], "repaired");
    stands(&cluster.here, "there", "equal").await;
    reader.until("the change is back", |it| number(&it.open(&lost).doc, "edits") == Some(3)).await;
    cluster.settled(&[&lost, &whole]).await;
    for (metric, expected) in [("isobar_scrub_differences_total", 1.0), ("isobar_scrub_repaired_total", 1.0)]
    {
        assert_eq!(cluster.here.metric(metric).await, expected, "{metric}");
    }
    assert_eq!(cluster.here.metric("isobar_scrubs_total{outcome=\"repaired\"}").await, 1.0);
    author.write(&lost, |doc| put(doc, "edits", 9)).await;
    reader.until("it goes on", |it| number(&it.open(&lost).doc, "edits") == Some(9)).await;
    let shown = checked(&cluster.here, "there").await;
    assert_eq!(divergences(&shown), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_running_node_has_in_memory_does_not_hide_what_its_disk_lost() {
    let cluster = Cluster::start().await;
    let (_author, lost) = cluster.written(&cluster.here, "lost", 3).await;
    let (_other, gone) = cluster.written(&cluster.here, "gone", 2).await;
    cluster.settled(&[&lost, &gone]).await;
    let mut connection = beside(&cluster.file).await;
    drop_row(&mut connection, &lost, 2).await;
    for statement in ["DELETE FROM documents WHERE id = ?", "DELETE FROM changes WHERE document_id = ?"] {
        sqlx::query(statement).bind(gone.as_bytes()).execute(&mut connection).await.unwrap();
    }
    // The region that lacks something is told by the other, too.
    let shown = checked(&cluster.there, "here").await;
    let expected = [(lost.to_string(), "different"), (gone.to_string(), "missing_there")];
    let mut expected = expected.map(|(document, what)| (document, what.to_owned(), true)).to_vec();
    expected.sort();
    let mut found = divergences(&shown);
    found.sort();
    assert_eq!(found, expected);
    cluster.settled(&[&lost, &gone]).await;
    assert_eq!(cluster.here.metric("isobar_scrub_repaired_total").await, 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_repaired_is_named_as_diverged() {
    let cluster = Cluster::start().await;
    let (_author, document) = cluster.written(&cluster.here, "document", 4).await;
    cluster.settled(&[&document]).await;
    // Nobody has the third change any more, and what is here of the last cannot be sent with a row that does not decode.
    spoil_row(&mut beside(&cluster.file).await, &document, 2, true).await;
    let mut there = beside(&cluster.there_file).await;
    drop_row(&mut there, &document, 3).await;
    drop_row(&mut there, &document, 2).await;
    let shown = checked(&cluster.here, "there").await;
    assert_eq!(divergences(&shown), [(document.to_string(), "different".to_owned(), false)]);
    assert_eq!(shown["last_check"]["result"], "diverged");
    stands(&cluster.here, "there", "diverged").await;
    let shown = convergence(&cluster.here).await["regions"]["there"].clone();
    assert_eq!(shown["documents"][0]["document"], document.to_string());
    let (_, listed) = get(cluster.here.admin, "/admin/v1/convergence/divergences").await;
    assert!(listed.contains(&document.to_string()), "{listed}");
    let found = cluster.here.metric("isobar_scrub_differences_total").await;
    let repaired = cluster.here.metric("isobar_scrub_repaired_total").await;
    assert_eq!((found, repaired), (1.0, 0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_is_written_to_all_the_time_is_not_reported() {
    let cluster = Cluster::start().await;
    let (_quiet, quiet) = cluster.written(&cluster.there, "quiet", 2).await;
    let (mut busy, document) = cluster.written(&cluster.there, "busy", 1).await;
    cluster.settled(&[&quiet]).await;
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writing = tokio::spawn(async move {
        let mut edit = 0;
        while stopped.try_recv().is_err() {
            edit += 1;
            busy.write(&document, |doc| put(doc, "edits", edit)).await;
        }
        edit
    });
    for _ in 0..10 {
        let shown = checked(&cluster.here, "there").await;
        assert_eq!(divergences(&shown), [], "{shown}");
    }
    stop.send(()).unwrap();
    assert!(writing.await.unwrap() > 10);
    assert_eq!(cluster.here.metric("isobar_scrub_differences_total").await, 0.0);
    assert_eq!(cluster.there.metric("isobar_scrub_differences_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_its_way_is_waited_for_before_anything_is_called_a_difference() {
    let key = ClusterKey::random();
    let there = Node::start_with(region("there", &key, None), MemoryStorage::new()).await;
    let (storage, faults) = FaultyStorage::new(&MemoryStorage::new());
    let here = Node::start_with(region("here", &key, Some(&there)), storage).await;
    linked(&here).await;
    linked(&there).await;
    let (mut author, document) = written(&there, "document", 1).await;
    eventually("the document is here", async || {
        here.parts.documents.inspect(&document, false).await.unwrap().is_some()
    })
    .await;
    // The change has left the one region, and the other cannot store it: both stay what they are.
    faults.hold_appends();
    author.write(&document, |doc| put(doc, "edits", 1)).await;
    let loads = faults.loads.load(Ordering::SeqCst);
    assert_eq!(post(&there, "/admin/v1/convergence/checks").await.0, 202);
    eventually("the other region has been looked at", async || faults.loads.load(Ordering::SeqCst) > loads)
        .await;
    let reported = eventually("a difference is reported", async || {
        there.metric("isobar_scrub_differences_total").await > 0.0
    });
    assert!(tokio::time::timeout(Duration::from_millis(500), reported).await.is_err());
    faults.release_appends();
    let replication = there.parts.replication.as_ref().unwrap();
    eventually("the check ends", async || !replication.is_checking()).await;
    let checked: Vec<Checked> = replication.checked().into_values().collect();
    assert_eq!((checked.len(), checked[0].outcome), (1, Outcome::Equal));
}

/// Spoils a byte in the middle of a document's row number `row`, or the row as a whole.
async fn spoil_row(connection: &mut SqliteConnection, document: &DocumentId, row: i64, whole: bool) {
    let found = sqlx::query(
        "SELECT first_seq, changes FROM changes WHERE document_id = ?1 ORDER BY first_seq LIMIT 1 OFFSET ?2",
    )
    .bind(document.as_bytes())
    .bind(row)
    .fetch_one(&mut *connection)
    .await
    .unwrap();
    let (first, mut changes): (i64, Vec<u8>) = (found.get(0), found.get(1));
    match whole {
        true => changes.truncate(3),
        false => {
            let last = changes.len() - 1;
            changes[last] ^= 0xff;
        }
    }
    sqlx::query("UPDATE changes SET changes = ?3 WHERE document_id = ?1 AND first_seq = ?2")
        .bind(document.as_bytes())
        .bind(first)
        .bind(changes)
        .execute(connection)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_bytes_are_found_by_hashing_them_again_and_mended() {
    for whole in [false, true] {
        let cluster = Cluster::start().await;
        let (_author, spoilt) = cluster.written(&cluster.there, "spoilt", 4).await;
        let (_other, whole_one) = cluster.written(&cluster.there, "whole", 2).await;
        cluster.settled(&[&spoilt, &whole_one]).await;
        let cluster = cluster.restart_here(async |it| spoil_row(it, &spoilt, 2, whole).await, 1 << 20).await;
        let mut reader = Client::join(cluster.here.clients, "reader").await;
        reader.share(&spoilt, AutoCommit::new()).await;
        eventually("the damage is mended", async || {
            cluster.here.metric("isobar_stored_damage_mended_total").await == 1.0
        })
        .await;
        assert_eq!(cluster.here.metric("isobar_stored_changes_damaged_total").await, 1.0);
        assert_eq!(held(&cluster.here, &spoilt).await.damage, []);
        cluster.settled(&[&spoilt, &whole_one]).await;
        reader.until("it serves again", |it| number(&it.open(&spoilt).doc, "edits") == Some(3)).await;
        // The other document was never concerned, and a later load is whole.
        assert!(cluster.here.metric("isobar_stored_bytes_verified_total").await > 0.0);
        let cluster = cluster.restart_here(async |_| {}, 0).await;
        let mut late = Client::join(cluster.here.clients, "late").await;
        late.fetch(&spoilt).await;
        assert_eq!(number(&late.open(&spoilt).doc, "edits"), Some(3));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_without_another_region_quarantines_its_document_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("alone.db");
    let alone = || Settings { verify_rate: 1 << 20, idle_seconds: 0, ..settings() };
    let node = start(alone(), &file).await;
    let (_author, spoilt) = written(&node, "spoilt", 3).await;
    let (_other, whole) = written(&node, "whole", 2).await;
    node.stop().await.unwrap();
    let mut connection = beside(&file).await;
    spoil_row(&mut connection, &spoilt, 1, false).await;
    connection.close().await.unwrap();
    let node = start(alone(), &file).await;
    eventually("the damage is found", async || {
        let stored = node.parts.storage.load_document(&spoilt).await.unwrap().unwrap();
        matches!(stored.state, isobar::storage::DocumentState::Quarantined { .. })
    })
    .await;
    assert_eq!(node.metric("isobar_stored_changes_damaged_total").await, 1.0);
    let mut reader = Client::join(node.clients, "reader").await;
    reader.fetch(&whole).await;
    assert_eq!(number(&reader.open(&whole).doc, "edits"), Some(1));
}

/// A document with a base in `here`, which covers all of its changes.
async fn with_base(node: &Node, document: &DocumentId) -> Vec<ChangeHash> {
    let mut doc = AutoCommit::new();
    for edit in 0..6_000 {
        put(&mut doc, "edits", edit);
    }
    let mut client = Client::join(node.clients, "long").await;
    client.share(document, doc).await;
    client.in_step(document).await;
    eventually("a base is made", async || {
        node.parts.storage.read_base_index(document).await.unwrap().is_some()
    })
    .await;
    client.open(document).heads()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_base_is_made_anew_from_another_region() {
    for part in ["chunk", "index_bytes"] {
        let cluster = Cluster::start().await;
        let document = document_id("long");
        with_base(&cluster.here, &document).await;
        cluster.settled(&[&document]).await;
        let spoil = async |connection: &mut SqliteConnection| {
            let column = if part == "chunk" { "chunk" } else { "index_bytes" };
            let read = sqlx::AssertSqlSafe(format!("SELECT {column} FROM base_contents"));
            let mut bytes: Vec<u8> = sqlx::query(read).fetch_one(&mut *connection).await.unwrap().get(0);
            let middle = if part == "chunk" { bytes.len() / 2 } else { 0 };
            bytes[middle] ^= 0x55;
            let write = sqlx::AssertSqlSafe(format!("UPDATE base_contents SET {column} = ?"));
            sqlx::query(write).bind(bytes).execute(connection).await.unwrap();
        };
        let cluster = cluster.restart_here(spoil, 16 << 20).await;
        eventually("the base is mended", async || {
            cluster.here.metric("isobar_stored_damage_mended_total").await == 1.0
        })
        .await;
        assert_eq!(cluster.here.metric("isobar_stored_bases_damaged_total").await, 1.0);
        assert_eq!(held(&cluster.here, &document).await.damage, []);
        cluster.settled(&[&document]).await;
        let mut reader = Client::join(cluster.here.clients, "reader").await;
        reader.fetch(&document).await;
        assert_eq!(number(&reader.open(&document).doc, "edits"), Some(5_999));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_other_regions_says_that_there_is_nothing_to_check() {
    let node = Node::start(MemoryStorage::new()).await;
    let (status, answer) = post(&node, "/admin/v1/convergence/checks").await;
    assert_eq!((status, &answer["type"]), (409, &"/problems/no-links".into()));
    let (status, body) = get(node.admin, "/admin/v1/convergence/divergences").await;
    assert_eq!((status, body.as_str()), (200, "{}"));
    tokio::time::timeout(Duration::from_secs(5), node.stop()).await.unwrap().unwrap();
}
