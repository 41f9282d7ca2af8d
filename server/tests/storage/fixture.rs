//! A database for one test, and what tests put into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use isobar::storage::memory::MemoryStorage;
use isobar::storage::postgres::PostgresStorage;
use isobar::storage::sqlite::SqliteStorage;
use isobar::storage::{
    Batch, ClaimedOrigin, Deletion, DocumentAppend, ErasureStep, NewBase, RunAppend, Storage, StorageError,
    StoredChange, StoredDocument, Writer,
};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::log::{self, Chain, Content, Entry};
use isobar_testkit::TestServer;
use sha2::{Digest, Sha256};
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
    storage.claim_origin(&region(), &group(), slot, false).await.unwrap()
}

pub fn document(number: u8) -> DocumentId {
    DocumentId::from_slice(&[number; 16]).unwrap()
}

pub fn hash(number: u32) -> ChangeHash {
    change(number).hash
}

/// A real change without operations, whose message has its number.
pub fn change(number: u32) -> StoredChange {
    let message = format!("the bytes of change {number}");
    // No dependencies; an actor of 16 bytes; seq, start of operations and time.
    let mut data = vec![0, 16];
    data.extend_from_slice(&[7; 16]);
    data.extend_from_slice(&[1, 1, 0, message.len() as u8]);
    data.extend_from_slice(message.as_bytes());
    // No other actors, no columns.
    data.extend_from_slice(&[0, 0]);
    let contents = [&[1, data.len() as u8][..], &data].concat();
    let digest: [u8; 32] = Sha256::digest(&contents).into();
    let bytes = [&[0x85, 0x6f, 0x4a, 0x83], &digest[..4], &contents].concat();
    StoredChange { hash: ChangeHash(digest), bytes: Bytes::from(bytes) }
}

pub fn changes(numbers: impl IntoIterator<Item = u32>) -> Vec<StoredChange> {
    numbers.into_iter().map(change).collect()
}

/// Changes of one document that arrive together.
#[derive(Debug, Clone)]
pub struct Arriving {
    pub document: DocumentId,
    pub changes: Vec<StoredChange>,
}

pub fn append(to: u8, numbers: impl IntoIterator<Item = u32>) -> Arriving {
    Arriving { document: document(to), changes: changes(numbers) }
}

/// The chain before the entry after `seq`. Storage takes it as it comes, so it need not be a real one here; the chain after a
/// run is the real one that follows.
pub fn chain(seq: u64) -> Chain {
    let mut bytes = [1; 16];
    bytes[..8].copy_from_slice(&seq.to_be_bytes());
    if seq == 0 { Chain::START } else { Chain(bytes) }
}

fn entries(arriving: &[Arriving]) -> Vec<Entry> {
    let content = |change: &StoredChange| Content::Change { hash: change.hash, bytes: change.bytes.clone() };
    let of_one = |one: &Arriving| {
        let document = one.document.clone();
        let entry = move |change| Entry { document: document.clone(), content: content(change) };
        one.changes.iter().map(entry).collect::<Vec<_>>()
    };
    arriving.iter().flat_map(of_one).collect()
}

/// A batch of one run that begins at `first`.
pub fn batch(origin: OriginId, writer: Writer, first: Seq, arriving: &[Arriving]) -> Batch {
    let mut next = first.0;
    let mut changes = Vec::new();
    for one in arriving.iter().filter(|one| !one.changes.is_empty()) {
        let seqs = (next..).map(Seq);
        next += one.changes.len() as u64;
        changes.push(DocumentAppend {
            document: one.document.clone(),
            group: group(),
            origin,
            changes: seqs.zip(one.changes.iter().cloned()).collect(),
        });
    }
    let runs =
        if changes.is_empty() { Vec::new() } else { vec![run(origin, writer, first, &entries(arriving))] };
    Batch { runs, changes, deletions: Vec::new() }
}

pub fn run(origin: OriginId, writer: Writer, first: Seq, entries: &[Entry]) -> RunAppend {
    let chain_before = chain(first.0 - 1);
    let after = |chain: Chain, entry: &Entry| chain.after(&entry.document, &entry.content);
    RunAppend {
        origin,
        writer,
        group: group(),
        first,
        last: Seq(first.0 + entries.len() as u64 - 1),
        chain_before,
        chain: entries.iter().fold(chain_before, after),
        body: log::encode_run(entries).into(),
    }
}

pub fn own(origin: &ClaimedOrigin) -> Writer {
    Writer::Own { incarnation: origin.incarnation }
}

/// A batch of this node's own.
pub fn own_batch(origin: &ClaimedOrigin, first: u64, arriving: &[Arriving]) -> Batch {
    batch(origin.id, own(origin), Seq(first), arriving)
}

/// A batch that came from another region.
pub fn other_batch(origin: OriginId, first: u64, arriving: &[Arriving]) -> Batch {
    batch(origin, Writer::Other { region: elsewhere() }, Seq(first), arriving)
}

pub fn joined(batches: impl IntoIterator<Item = Batch>) -> Batch {
    batches.into_iter().fold(Batch::default(), |mut joined, batch| {
        joined.runs.extend(batch.runs);
        joined.changes.extend(batch.changes);
        joined.deletions.extend(batch.deletions);
        joined
    })
}

pub fn elsewhere() -> RegionName {
    RegionName::new("us").unwrap()
}

pub fn new_origin() -> OriginId {
    OriginId(uuid::Uuid::new_v4())
}

/// The deletion of a document, logged as the entry `seq` of an own origin.
pub fn deletion(origin: &ClaimedOrigin, seq: u64, number: u8, deleted_at_ms: u64) -> Batch {
    let entry = Entry { document: document(number), content: Content::Tombstone { deleted_at_ms } };
    let run = run(origin.id, own(origin), Seq(seq), &[entry]);
    let deletion = Deletion { document: document(number), group: group(), deleted_at_ms };
    Batch { runs: vec![run], changes: Vec::new(), deletions: vec![deletion] }
}

/// Takes steps until no deletion is left to be erased; what each did.
pub async fn erase_all(storage: &dyn Storage, runs_max: usize) -> Vec<ErasureStep> {
    let mut steps = Vec::new();
    while steps.last().is_none_or(|step: &ErasureStep| step.deletions_left > 0) {
        assert!(steps.len() < 1_000, "erasing does not come to an end");
        steps.push(storage.erase_step(runs_max).await.unwrap());
    }
    steps
}

/// Appends changes under an own origin; the last seq. What most tests do.
pub async fn append_own(
    storage: &dyn Storage,
    origin: &ClaimedOrigin,
    first: Seq,
    arriving: &[Arriving],
) -> Result<Seq, StorageError> {
    let count: usize = arriving.iter().map(|one| one.changes.len()).sum();
    storage.append(&own_batch(origin, first.0, arriving)).await?;
    Ok(Seq(first.0 + count as u64 - 1))
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

/// An entry of a log, as the tests compare it. `hash` is that of the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub seq: Seq,
    pub document: DocumentId,
    pub hash: ChangeHash,
    pub erased: bool,
}

/// The entries after `after` that one read returns; checked to be dense.
pub async fn read_entries(
    storage: &dyn Storage,
    origin: OriginId,
    after: Seq,
    bytes_max: usize,
) -> Result<Vec<LogEntry>, StorageError> {
    let mut read = Vec::new();
    let runs = storage.read_log(origin, after, bytes_max).await?;
    for (place, run) in runs.iter().enumerate() {
        assert_eq!(run.chain_before, chain(run.first.0 - 1));
        assert!(run.last > after, "a run that was not asked for");
        assert!(place == 0 || run.first.0 == runs[place - 1].last.0 + 1, "the log has a hole");
        let entries = log::decode_run(&run.body).unwrap();
        assert_eq!(entries.len() as u64, run.last.0 - run.first.0 + 1);
        read.extend(entries.into_iter().zip(run.first.0..).filter_map(|(entry, seq)| {
            let (hash, erased) = match entry.content {
                Content::Change { hash, .. } => (hash, false),
                Content::Erased { hash } => (hash, true),
                Content::Tombstone { .. } => (ChangeHash([0; 32]), false),
            };
            (seq > after.0).then_some(LogEntry { seq: Seq(seq), document: entry.document, hash, erased })
        }));
    }
    assert!(read.first().is_none_or(|entry| entry.seq.0 == after.0 + 1), "the log has a hole");
    Ok(read)
}

/// Everything in an origin's log, read a few runs at a time; checked to be dense.
pub async fn whole_log(storage: &dyn Storage, origin: &ClaimedOrigin) -> Vec<LogEntry> {
    whole_log_of(storage, origin.id).await
}

pub async fn whole_log_of(storage: &dyn Storage, origin: OriginId) -> Vec<LogEntry> {
    let mut entries: Vec<LogEntry> = Vec::new();
    loop {
        let after = entries.last().map_or(Seq(0), |entry| entry.seq);
        let more = read_entries(storage, origin, after, 1_000).await.unwrap();
        if more.is_empty() {
            return entries;
        }
        entries.extend(more);
    }
}

/// The log entries that appending `batches` one after the other makes.
pub fn expected_log(batches: &[Vec<Arriving>]) -> Vec<LogEntry> {
    let arriving = batches.iter().flatten();
    let changes = arriving.flat_map(|one| one.changes.iter().map(|change| (&one.document, change.hash)));
    let entry = |((document, hash), seq): ((&DocumentId, ChangeHash), u64)| LogEntry {
        seq: Seq(seq),
        document: document.clone(),
        hash,
        erased: false,
    };
    changes.zip(1..).map(entry).collect()
}
