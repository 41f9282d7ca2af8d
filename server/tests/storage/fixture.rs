//! A database for one test, and what tests put into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::postgres::PostgresStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar::storage::{
    ClaimedOrigin, DocumentAppend, LogEntry, NewBase, Storage, StorageError, StoredChange, StoredDocument,
};
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup, RegionName, Seq};
use isobar_testkit::TestServer;
use sqlx::Connection;
use sqlx::postgres::PgConnection;
use tempfile::TempDir;

/// An empty database of some implementation, gone with the value.
pub enum Database {
    Memory(MemoryStorage),
    Sqlite(TempDir),
    Postgres(PostgresDatabase),
}

impl Database {
    pub async fn memory() -> Self {
        Self::Memory(MemoryStorage::new())
    }

    pub async fn sqlite() -> Self {
        Self::Sqlite(TempDir::new().unwrap())
    }

    pub async fn postgres() -> Self {
        Self::Postgres(PostgresDatabase::create(isobar_testkit::shared().unwrap()).await)
    }

    /// Opens the database, as each node of a region does.
    pub async fn open(&self) -> Arc<dyn Storage> {
        self.try_open().await.unwrap()
    }

    pub async fn try_open(&self) -> Result<Arc<dyn Storage>, StorageError> {
        Ok(match self {
            Self::Memory(storage) => Arc::new(storage.reopen()),
            Self::Sqlite(directory) => Arc::new(SqliteStorage::open(&sqlite_file(directory.path())).await?),
            Self::Postgres(database) => Arc::new(PostgresStorage::connect(&database.url).await?),
        })
    }

    /// The database as a crash of the process leaves it at this moment. Handles that are open count for nothing.
    pub fn crashed(self) -> Self {
        match self {
            Self::Sqlite(directory) => {
                let copy = TempDir::new().unwrap();
                for entry in std::fs::read_dir(directory.path().join("data")).unwrap() {
                    let entry = entry.unwrap();
                    std::fs::create_dir_all(copy.path().join("data")).unwrap();
                    std::fs::copy(entry.path(), copy.path().join("data").join(entry.file_name())).unwrap();
                }
                Self::Sqlite(copy)
            }
            other => other,
        }
    }
}

pub fn sqlite_file(directory: &Path) -> PathBuf {
    directory.join("data").join("isobar.db")
}

/// A database of its own on a Postgres server.
pub struct PostgresDatabase {
    pub url: String,
    name: String,
    /// `None` while the value is dropped.
    server: Option<TestServer>,
}

impl PostgresDatabase {
    pub async fn create(server: TestServer) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("isobar_test_{}_{count}", std::process::id());
        let database = Self { url: server.url(Some(&name)), name, server: Some(server) };
        database.maintain(format!("CREATE DATABASE {}", database.name)).await.unwrap();
        database
    }

    async fn maintain(&self, statement: String) -> sqlx::Result<()> {
        let server = self.server.as_ref().expect("there is a server until the value is dropped");
        let mut connection = PgConnection::connect(&server.url(None)).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await?;
        connection.close().await
    }

    /// A connection beside the storage's own.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    pub async fn run(&self, statements: &'static str) {
        sqlx::raw_sql(statements).execute(&mut self.connect().await).await.unwrap();
    }

    pub fn server_mut(&mut self) -> &mut TestServer {
        self.server.as_mut().expect("there is a server until the value is dropped")
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        if let Some(TestServer::Given { .. }) = self.server {
            // The test's runtime cannot be waited on from here.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    let statement = format!("DROP DATABASE {} WITH (FORCE)", self.name);
                    if let Err(error) = runtime.block_on(self.maintain(statement)) {
                        eprintln!("the test's database {} stays behind: {error}", self.name);
                    }
                });
            });
        }
    }
}

pub fn region() -> RegionName {
    RegionName::new("eu").unwrap()
}

pub fn group() -> PlacementGroup {
    PlacementGroup::new("everywhere").unwrap()
}

pub async fn claim(storage: &dyn Storage, slot: u32) -> ClaimedOrigin {
    storage.claim_origin(&region(), &group(), slot).await.unwrap()
}

pub fn document(number: u8) -> DocumentId {
    DocumentId::from_slice(&[number; 16]).unwrap()
}

/// A hash that stands nowhere near its neighbours', as real ones do.
pub fn hash(number: u32) -> ChangeHash {
    let mut bytes = [0; 32];
    for (place, chunk) in bytes.chunks_exact_mut(4).enumerate() {
        let mixed = (number ^ place as u32).wrapping_mul(0x9e37_79b1).rotate_left(7);
        chunk.copy_from_slice(&mixed.to_be_bytes());
    }
    bytes[28..].copy_from_slice(&number.to_be_bytes());
    ChangeHash(bytes)
}

pub fn change(number: u32) -> StoredChange {
    StoredChange { hash: hash(number), bytes: Bytes::from(format!("the bytes of change {number}")) }
}

pub fn changes(numbers: impl IntoIterator<Item = u32>) -> Vec<StoredChange> {
    numbers.into_iter().map(change).collect()
}

pub fn append(to: u8, numbers: impl IntoIterator<Item = u32>) -> DocumentAppend {
    DocumentAppend { document: document(to), changes: changes(numbers) }
}

pub fn base(summary: &[u8]) -> NewBase {
    NewBase {
        summary: Bytes::copy_from_slice(summary),
        index: Bytes::from(["index of ".as_bytes(), summary].concat()),
        chunk: Bytes::from(["chunk of ".as_bytes(), summary].concat()),
    }
}

pub async fn load(storage: &dyn Storage, number: u8) -> StoredDocument {
    storage.load_document(&document(number)).await.unwrap().unwrap()
}

/// A document's tail in the order of the changes' hashes.
pub async fn tail(storage: &dyn Storage, number: u8) -> Vec<StoredChange> {
    sorted(load(storage, number).await.tail)
}

pub fn sorted(mut changes: Vec<StoredChange>) -> Vec<StoredChange> {
    changes.sort_by_key(|change| change.hash);
    changes
}

/// Everything in an origin's log, read a few entries at a time; checked to be dense.
pub async fn whole_log(storage: &dyn Storage, origin: &ClaimedOrigin) -> Vec<LogEntry> {
    let mut entries: Vec<LogEntry> = Vec::new();
    loop {
        let after = entries.last().map_or(Seq(0), |entry| entry.seq);
        let more = storage.read_log(origin.id, after, 7).await.unwrap();
        assert!(more.len() <= 7);
        for (place, entry) in more.iter().enumerate() {
            assert_eq!(entry.seq.0, after.0 + 1 + place as u64, "the log has a hole");
        }
        if more.is_empty() {
            return entries;
        }
        entries.extend(more);
    }
}

/// The log entries that appending `batches` one after the other makes.
pub fn expected_log(batches: &[Vec<DocumentAppend>]) -> Vec<LogEntry> {
    let appends = batches.iter().flatten();
    let changes =
        appends.flat_map(|append| append.changes.iter().map(|change| (&append.document, change.hash)));
    changes
        .zip(1..)
        .map(|((document, hash), seq)| LogEntry { seq: Seq(seq), document: document.clone(), hash })
        .collect()
}
