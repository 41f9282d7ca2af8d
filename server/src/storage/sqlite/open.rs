//! Opening a SQLite database: its file, its settings, its schema.

use std::io;
use std::path::Path;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection, SqlitePool};
use tokio::time::Instant;

use super::{failed, may_pass};
use crate::storage::StorageError;
use crate::storage::failure::classify_migration;
use crate::storage::schema::{NEWEST_MIGRATION, refuse_newer};

/// How long a statement waits for another process's transaction. A healthy one takes milliseconds; a migration may
/// take seconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that read. Reads do not wait for the writer, and a machine has only so many cores.
const READERS_MAX: u32 = 4;

/// Pages of write-ahead log (4 KiB each) before they are moved into the file. More would move pages that change
/// often less often; but until the log has reached this length once, each commit makes its file longer, and
/// recording the file's new length is one more thing a commit waits for.
const CHECKPOINT_PAGES: u32 = 1_000;

/// What the write-ahead log is cut back to after it grew under a long read.
const WAL_BYTES_KEPT: u32 = 64 << 20;

/// Page cache of each connection, in KiB.
const WRITER_CACHE_KIB: u32 = 32 << 10;
const READER_CACHE_KIB: u32 = 8 << 10;

/// How much of the file is read through the page cache of the system instead of being copied.
const MMAP_BYTES: u64 = 256 << 20;

/// The writer's connection and the readers' pool.
pub(super) async fn open(path: &Path) -> Result<(SqliteConnection, SqlitePool), StorageError> {
    create_file(path).map_err(|error| StorageError::Fatal(Box::new(error)))?;
    let mut writer = connect_writer(path).await?;
    migrate(&mut writer, sqlx::migrate!("../migrations/sqlite")).await?;
    let readers = SqlitePoolOptions::new()
        .max_connections(READERS_MAX)
        .acquire_timeout(BUSY_TIMEOUT)
        .test_before_acquire(false)
        .connect_lazy_with(reader_options(path));
    Ok((writer, readers))
}

/// Creates the file and its directory for this user alone: documents are nobody else's business. SQLite gives its
/// two companion files the same mode.
fn create_file(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        let mut directory = std::fs::DirBuilder::new();
        directory.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut directory, 0o700);
        directory.create(parent)?;
    }
    let mut file = std::fs::OpenOptions::new();
    file.write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut file, 0o600);
    file.open(path).map(drop)
}

fn base_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(false)
        .pragma("mmap_size", MMAP_BYTES.to_string())
        .pragma("temp_store", "MEMORY")
        .disable_statement_logging()
}

fn reader_options(path: &Path) -> SqliteConnectOptions {
    base_options(path).pragma("query_only", "ON").pragma("cache_size", format!("-{READER_CACHE_KIB}"))
}

/// `synchronous=FULL` makes a commit wait for the disk. Incremental vacuum can only be chosen for an empty file; no
/// page is given back by itself, so what pruning frees is reused by later changes, and an operator may still shrink
/// the file.
fn writer_options(path: &Path) -> SqliteConnectOptions {
    base_options(path)
        .auto_vacuum(SqliteAutoVacuum::Incremental)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", format!("-{WRITER_CACHE_KIB}"))
        .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
        .pragma("journal_size_limit", WAL_BYTES_KEPT.to_string())
}

/// Connects, and tries again while another process opens the same file: switching a new file to write-ahead logging
/// needs the file alone, and SQLite reports that it is busy without waiting.
async fn connect_writer(path: &Path) -> Result<SqliteConnection, StorageError> {
    let options = writer_options(path);
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match options.connect().await.map_err(failed) {
            Err(StorageError::Transient(_)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            outcome => return outcome,
        }
    }
}

/// Brings the schema up to date in one transaction that holds the write lock from its beginning, so that of two
/// processes the second finds the first one's work done (clause 9).
async fn migrate(connection: &mut SqliteConnection, mut migrator: Migrator) -> Result<(), StorageError> {
    migrator.set_locking(false);
    let mut transaction = connection.begin_with("BEGIN EXCLUSIVE").await.map_err(failed)?;
    let exists: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations')")
            .fetch_one(&mut *transaction)
            .await
            .map_err(failed)?;
    if exists {
        let found =
            sqlx::query_scalar(NEWEST_MIGRATION).fetch_one(&mut *transaction).await.map_err(failed)?;
        refuse_newer(&migrator, found)?;
    }
    migrator.run(&mut *transaction).await.map_err(|error| classify_migration(error, may_pass))?;
    transaction.commit().await.map_err(failed)
}
