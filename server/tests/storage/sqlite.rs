//! What only SQLite has: its file.

use std::time::Duration;

use isobar::storage::sqlite::SqliteStorage;
use isobar::storage::{Batch, StorageError};
use isobar_protocol::ids::Seq;
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;

use crate::fixture::*;

async fn beside(directory: &TempDir) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(sqlite_file(directory.path()));
    SqliteConnection::connect_with(&options).await.unwrap()
}

async fn run(directory: &TempDir, statements: &'static str) {
    let mut connection = beside(directory).await;
    sqlx::raw_sql(statements).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn clause_1_a_batch_that_fails_halfway_leaves_nothing() {
    let database = Database::sqlite().await;
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    run(
        directory,
        "CREATE TRIGGER broken AFTER INSERT ON changes WHEN instr(NEW.changes, CAST('of change 3' AS BLOB)) > 0 \
         BEGIN SELECT RAISE(ABORT, 'broken'); END",
    )
    .await;
    let refused = append_own(&*storage, &origin, Seq(1), &[append(1, 0..3), append(2, 3..4)]).await;
    assert!(matches!(refused, Err(StorageError::Fatal(_))), "{refused:?}");
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    assert!(storage.load_document(&document(2)).await.unwrap().is_none());
    assert_eq!(whole_log(&*storage, &origin).await, []);
    assert_eq!(append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap(), Seq(2));
}

#[tokio::test]
async fn clause_5_a_writer_that_finds_the_file_locked_is_told_to_repeat() {
    let database = Database::sqlite().await;
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    let mut other = beside(directory).await;
    let transaction = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let refused = append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await;
    assert!(matches!(refused, Err(StorageError::Transient(_))), "{refused:?}");
    // Readers do not wait for a writer.
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    transaction.rollback().await.unwrap();
    assert_eq!(append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap(), Seq(1));
}

#[tokio::test]
async fn clause_9_a_newer_schema_is_refused_and_left_as_it_is() {
    let database = Database::sqlite().await;
    database.open().await.close().await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    run(directory, "INSERT INTO _sqlx_migrations VALUES (9999, 'future', '2030-01-01', TRUE, x'00', 0)")
        .await;
    let before = std::fs::read(sqlite_file(directory.path())).unwrap();
    let refused = database.try_open().await.map(drop);
    assert!(
        matches!(refused, Err(StorageError::NewerSchema { found: 9999, supported }) if supported < 9999),
        "{refused:?}"
    );
    assert!(before == std::fs::read(sqlite_file(directory.path())).unwrap());
}

#[tokio::test]
async fn clause_18_a_deletion_does_without_the_log_until_it_is_erased() {
    let database = Database::sqlite().await;
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap();
    let Database::Sqlite(directory) = &database else { unreachable!() };
    run(directory, "ALTER TABLE log RENAME TO out_of_reach").await;
    let unlogged = Batch { runs: Vec::new(), ..deletion(&origin, 3, 1, 500) };
    storage.append(&unlogged).await.unwrap();
    assert_eq!(load(&*storage, 1).await.tail, []);
    run(directory, "ALTER TABLE out_of_reach RENAME TO log").await;
    assert!(whole_log(&*storage, &origin).await.iter().all(|entry| entry.erased));
    let holding = "SELECT count(*) FROM log WHERE instr(body, CAST('the bytes of change' AS BLOB)) > 0";
    for left in [1, 0] {
        let found: i64 = sqlx::query_scalar(holding).fetch_one(&mut beside(directory).await).await.unwrap();
        assert_eq!(found, left);
        erase_all(&*storage, 10).await;
    }
}

#[cfg(unix)]
#[tokio::test]
async fn the_files_are_private_and_their_directory_is_made() {
    use std::os::unix::fs::MetadataExt;

    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a").join("b").join("isobar.db");
    let storage = isobar::storage::open(&format!("sqlite:{}", path.display())).await.unwrap();
    claim(&*storage, 0).await;
    assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    for suffix in ["", "-wal", "-shm"] {
        let mode = std::fs::metadata(format!("{}{suffix}", path.display())).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "isobar.db{suffix}");
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_fatal() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("isobar.db");
    std::fs::write(&path, vec![b'x'; 8_192]).unwrap();
    let refused = SqliteStorage::open(&path).await.map(drop);
    assert!(matches!(refused, Err(StorageError::Fatal(_))), "{refused:?}");
    for url in ["sqlite:", "sqlite::memory:", "mysql://localhost/isobar", ""] {
        let refused = isobar::storage::open(url).await.map(drop);
        assert!(matches!(refused, Err(StorageError::Fatal(_))), "{url}: {refused:?}");
    }
}

#[tokio::test]
async fn what_pruning_frees_is_used_again() {
    let database = Database::sqlite().await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    let mut sizes = Vec::new();
    for round in 0..8_u32 {
        let storage = database.open().await;
        let origin = claim(&*storage, 0).await;
        let numbers = round * 4_000..round * 4_000 + 4_000;
        let first = Seq(u64::from(numbers.start) + 1);
        append_own(&*storage, &origin, first, &[append(1, numbers.clone())]).await.unwrap();
        storage.truncate_log(origin.id, Seq(u64::MAX), Duration::ZERO).await.unwrap();
        storage.prune_changes(&document(1), &numbers.map(hash).collect::<Vec<_>>()).await.unwrap();
        // Moves the write-ahead log into the file.
        storage.close().await;
        sizes.push(std::fs::metadata(sqlite_file(directory.path())).unwrap().len());
    }
    assert!(sizes[7] < sizes[0] * 3 / 2, "the file grows though it holds no more: {sizes:?}");
}

#[tokio::test]
async fn an_append_that_is_given_up_in_the_middle_does_not_block_the_next() {
    let database = Database::sqlite().await;
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let mut last = 0;
    for microseconds in (0..4_000).step_by(200) {
        let batch = [append(1, 0..500)];
        let given_up = append_own(&*storage, &origin, Seq(last + 1), &batch);
        let _ = tokio::time::timeout(Duration::from_micros(microseconds), given_up).await;
        let reached = append_own(&*storage, &origin, Seq(last + 1), &batch).await.unwrap().0;
        assert_eq!(reached, last + 500);
        last = reached;
    }
    assert_eq!(whole_log(&*storage, &origin).await.len() as u64, last);
}

#[tokio::test]
async fn clause_15_a_row_that_does_not_decode_costs_nothing_but_itself() {
    let database = Database::sqlite().await;
    let storage = database.open().await;
    let Database::Sqlite(directory) = &database else { unreachable!() };
    let spoil = || run(directory, "UPDATE changes SET changes = x'ff' WHERE first_seq = 5");
    crate::documents::a_spoilt_row_costs_nothing_but_itself(storage, async || spoil().await).await;
}
