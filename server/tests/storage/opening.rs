//! Clauses 9 and 10: opening, and what else concerns the whole database.

use futures_util::future::join_all;
use isobar::storage::{DocumentState, ErasureStep, StorageError, StoredChange};
use isobar_protocol::config::LINK_LINEAGE_MAX;
use isobar_protocol::ids::{RegionName, Seq};
use isobar_protocol::link::handshake::NodeId;
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use crate::fixture::*;

pub async fn clause_9_nodes_that_open_at_once_all_succeed(database: Database) {
    let opened = join_all((0..6).map(|_| database.open())).await;
    let region = region();
    let ids = join_all(opened.iter().map(|storage| storage.region_identity(&region))).await;
    for id in &ids {
        assert_eq!(id.as_ref().unwrap(), ids[0].as_ref().unwrap());
    }
    let origin = claim(&*opened[0], 0).await;
    append_own(&*opened[0], &origin, Seq(1), &[append(1, 0..3)]).await.unwrap();
    assert_eq!(load(&*opened[5], 1).await.tail.len(), 3);
}

pub async fn clause_10_the_storage_id_stays_and_another_region_is_refused(database: Database) {
    let storage = database.open().await;
    let id = storage.region_identity(&region()).await.unwrap();
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);
    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);

    let other = RegionName::new("us").unwrap();
    let refused = storage.region_identity(&other).await;
    assert!(
        matches!(refused, Err(StorageError::OtherRegion { expected, found }) if expected == other && found == region())
    );
    let refused = storage.claim_origin(&other, &group(), 0, false).await;
    assert!(matches!(refused, Err(StorageError::OtherRegion { .. })));
    assert_eq!(claim(&*storage, 0).await.incarnation.0, 1);
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);
}

pub async fn clause_17_nodes_are_registered_in_order_and_the_newest_are_remembered(database: Database) {
    let node = |number: usize| NodeId([number as u8; 16]);
    let storage = database.open().await;
    assert_eq!(storage.registered_nodes().await.unwrap(), []);
    let nodes: Vec<NodeId> = (0..LINK_LINEAGE_MAX + 6).map(node).collect();
    for node in &nodes {
        storage.register_node(*node).await.unwrap();
    }
    let database = database.crashed();
    let found = database.open().await.registered_nodes().await.unwrap();
    assert_eq!(found, nodes.into_iter().rev().take(LINK_LINEAGE_MAX).collect::<Vec<_>>());
}

pub async fn statistics_count_documents_and_changes(database: Database) {
    let storage = database.open().await;
    let empty = storage.statistics().await.unwrap();
    assert_eq!((empty.documents, empty.changes), (0, 0));
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..5), append(2, 0..1)]).await.unwrap();
    let found = storage.statistics().await.unwrap();
    assert_eq!((found.documents, found.changes), (2, 6));
    assert!(matches!(database, Database::Memory(_)) || found.disk_bytes > 4_096);
    storage.check().await.unwrap();
}

pub async fn a_closed_storage_refuses_calls(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    storage.close().await;
    assert!(matches!(storage.check().await, Err(StorageError::Fatal(_))));
    let refused = append_own(&*storage, &origin, Seq(2), &[append(1, 1..2)]).await;
    assert!(matches!(refused, Err(StorageError::Fatal(_))));
    assert!(matches!(storage.load_document(&document(1)).await, Err(StorageError::Fatal(_))));
    storage.close().await;
    assert_eq!(load(&*database.open().await, 1).await.tail.len(), 1);
}

/// A database as the program before several regions left it, made by its own migration: one origin with three entries, document
/// 1 with three changes in two bundles, document 2 with a base and nothing else, and whose it is.
struct Old {
    origin: Vec<u8>,
    bundles: Vec<OldBundle>,
    /// (first seq, last seq, entries) of each run.
    runs: Vec<(i64, i64, Vec<u8>)>,
}

impl Old {
    fn new() -> Self {
        let id = document(1).as_bytes().to_vec();
        let (mut bundles, mut runs) = (Vec::new(), Vec::new());
        for (first, numbers) in [(1, 0..2), (3, 2..3)] {
            let stored = changes(numbers);
            let hashes: Vec<u8> = stored.iter().flat_map(|it| *it.hash.as_bytes()).collect();
            let sized = |it: &StoredChange| [&[it.bytes.len() as u8][..], &it.bytes].concat();
            // Version 1, and one section: the document's id with its length, how many entries, their hashes.
            let head = [&[1, id.len() as u8][..], &id, &[stored.len() as u8]].concat();
            runs.push((first, first + stored.len() as i64 - 1, [head, hashes.clone()].concat()));
            bundles.push((id.clone(), first, hashes, stored.iter().flat_map(sized).collect()));
        }
        Self { origin: vec![9; 16], bundles, runs }
    }

    /// Has the new program keep what the old one had.
    async fn check(self, database: &Database, storage_id: &str) {
        let storage = database.open().await;
        assert_eq!(storage.region_identity(&region()).await.unwrap().as_str(), storage_id);
        assert_eq!(tail(&*storage, 1).await, sorted(changes(0..3)));
        let base = load(&*storage, 2).await.base.unwrap();
        assert_eq!(&base.summary[..], b"summary");
        assert_eq!(load(&*storage, 1).await.group, group());
        // Its log held no bytes: whoever asks for it has to take the documents as they are.
        let origin = claim(&*storage, 0).await;
        assert_eq!((origin.id.0.as_bytes().to_vec(), origin.last_seq), (self.origin, Seq(3)));
        let read = storage.read_log(origin.id, Seq(0), usize::MAX).await;
        assert!(matches!(read, Err(StorageError::Truncated { .. })), "{read:?}");
        storage.append(&own_batch(&origin, 4, &[append(1, 3..4)])).await.unwrap();
        assert_eq!(tail(&*storage, 1).await, sorted(changes(0..4)));
    }
}

/// (document, first seq, hashes, changes)
type OldBundle = (Vec<u8>, i64, Vec<u8>, Vec<u8>);

/// Runs the first migration alone and inserts what the program of its time wrote.
macro_rules! make_old {
    ($connection:expr, $migrations:literal, $old:expr) => {{
        let (mut connection, old) = ($connection, $old);
        let mut first = sqlx::migrate!($migrations);
        first.migrations.to_mut().truncate(1);
        first.run(&mut connection).await.unwrap();
        let region = "INSERT INTO region (only_row, name, storage_id) VALUES (1, 'eu', 'the-storage')";
        sqlx::query(region).execute(&mut connection).await.unwrap();
        let origin = "INSERT INTO origins (id, region, placement_group, slot, incarnation, seq) \
                      VALUES ($1, 'eu', 'everywhere', 0, 1, 3)";
        sqlx::query(origin).bind(&old.origin).execute(&mut connection).await.unwrap();
        for number in [1, 2] {
            let statement = "INSERT INTO documents (id, placement_group, state, created_at) \
                             VALUES ($1, 'everywhere', 0, 7)";
            let id = document(number).as_bytes().to_vec();
            sqlx::query(statement).bind(id).execute(&mut connection).await.unwrap();
        }
        for (id, first, hashes, changes) in &old.bundles {
            let statement = "INSERT INTO changes (document_id, origin, first_seq, hashes, changes) \
                             VALUES ($1, $2, $3, $4, $5)";
            let query = sqlx::query(statement).bind(id).bind(&old.origin).bind(first);
            query.bind(hashes).bind(changes).execute(&mut connection).await.unwrap();
        }
        for (first, last, entries) in &old.runs {
            let statement = "INSERT INTO log (origin, first_seq, last_seq, entries) VALUES ($1, $2, $3, $4)";
            let query = sqlx::query(statement).bind(&old.origin).bind(first).bind(last).bind(entries);
            query.execute(&mut connection).await.unwrap();
        }
        let base = "INSERT INTO bases (document_id, generation, pruned, chunk_bytes, summary) \
                    VALUES ($1, 1, true, 5, $2)";
        let id = document(2).as_bytes().to_vec();
        sqlx::query(base).bind(&id).bind(b"summary".to_vec()).execute(&mut connection).await.unwrap();
        let contents = "INSERT INTO base_contents (document_id, generation, index_bytes, chunk) \
                        VALUES ($1, 1, $2, $3)";
        let query = sqlx::query(contents).bind(&id).bind(b"index".to_vec()).bind(b"chunk".to_vec());
        query.execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }};
}

#[tokio::test]
async fn clause_9_a_sqlite_database_of_before_several_regions_keeps_its_documents() {
    let database = Database::sqlite().await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    let file = sqlite_file(directory.path());
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    let old = Old::new();
    make_old!(SqliteConnection::connect_with(&options).await.unwrap(), "../migrations/sqlite", &old);
    old.check(&database, "the-storage").await;
}

#[tokio::test]
async fn clause_9_a_postgres_database_of_before_several_regions_keeps_its_documents() {
    let database = Database::postgres().await;
    let Database::Postgres(postgres) = &database else { unreachable!() };
    let old = Old::new();
    make_old!(postgres.connect().await, "../migrations/postgres", &old);
    old.check(&database, "the-storage").await;
}

/// Runs the migrations of before deletions were erased step by step, and inserts a tombstone of their time.
macro_rules! make_deleted {
    ($connection:expr, $migrations:literal) => {{
        let mut connection = $connection;
        let mut of_before = sqlx::migrate!($migrations);
        of_before.migrations.to_mut().retain(|it| it.version <= 4);
        of_before.run(&mut connection).await.unwrap();
        let tombstone = "INSERT INTO tombstones (document_id, placement_group, deleted_at) \
                         VALUES ($1, 'everywhere', 500)";
        let id = document(1).as_bytes().to_vec();
        sqlx::query(tombstone).bind(id).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }};
}

/// Nothing is left to do for a deletion of before.
async fn check_deleted(database: &Database) {
    let storage = database.open().await;
    assert_eq!(load(&*storage, 1).await.state, DocumentState::Deleted { deleted_at_ms: 500 });
    assert_eq!(storage.erase_step(10).await.unwrap(), ErasureStep::default());
}

#[tokio::test]
async fn clause_9_deletions_of_before_count_as_erased_in_sqlite() {
    let database = Database::sqlite().await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    let file = sqlite_file(directory.path());
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    make_deleted!(SqliteConnection::connect_with(&options).await.unwrap(), "../migrations/sqlite");
    check_deleted(&database).await;
}

#[tokio::test]
async fn clause_9_deletions_of_before_count_as_erased_in_postgres() {
    let database = Database::postgres().await;
    let Database::Postgres(postgres) = &database else { unreachable!() };
    make_deleted!(postgres.connect().await, "../migrations/postgres");
    check_deleted(&database).await;
}
