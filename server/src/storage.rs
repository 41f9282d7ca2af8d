//! Where a region keeps its documents: the contract, and its three implementations.
//!
//! Storage knows documents, changes, bases and the log as names and bytes. It never looks inside a change or a
//! base: what they mean is the core's business. Only the modules below this one name sqlx.
//!
//! # Contract
//!
//! Each implementation passes one suite (`server/tests/storage.rs`), whose tests are named after these clauses.
//!
//! 1. **Atomic append.** [`Storage::append`] stores the whole batch — documents, changes, log entries and the
//!    origin's counter — or nothing. When it returns `Ok` the batch survives a crash of the process, and of the
//!    machine as far as the database promises that.
//! 2. **Dense, commit-ordered log.** The entries of an origin are numbered 1, 2, 3, … without a gap, in the order
//!    of their commits. The counter row is raised in the transaction that inserts the entries.
//! 3. **Each change once.** Appending a change that the document already holds leaves its bytes as they are, and
//!    [`Storage::load_document`] returns it once. (It may occupy its space twice until it is pruned.)
//! 4. **Fenced.** Only the latest incarnation of an origin may append; an older one gets
//!    [`StorageError::Fenced`] and nothing is stored.
//! 5. **Definite.** An append that fails with [`StorageError::Transient`] may be repeated as it stands: the caller
//!    passes the seq it expects to write first, and a batch that did commit before the failure was reported is
//!    recognised by the counter and the last entry, and answered as the success it was.
//! 6. **Whole documents.** [`Storage::load_document`] returns a base and a tail that belong together: never the
//!    changes of before an [`Storage::install_base`] with the base of after it.
//! 7. **Bases replace, then prune.** `install_base` is one transaction and fails with [`StorageError::Conflict`]
//!    unless the base it replaces is the one the caller started from. It removes no change. The caller then
//!    removes covered changes in steps ([`Storage::prune_changes`]) and ends with [`Storage::finish_prune`]; until
//!    that, `load_document` says that the tail may still hold covered changes.
//! 8. **Truncation is a prefix.** [`Storage::truncate_log`] removes entries up to a seq and nothing else; the
//!    counter stays. Reading below the floor fails with [`StorageError::Truncated`].
//! 9. **Forward-only schema.** Opening migrates under a lock, so that two nodes may start at once, and refuses a
//!    schema newer than this program's with [`StorageError::NewerSchema`] before anything is written.
//! 10. **One region per database.** The database remembers the region's name and its storage id from the first
//!     start; another region's name is refused.
//! 11. **Independent documents.** No call about one document reads or locks another's rows, except that appends
//!     share the origin's counter.

mod bundle;
mod failure;
mod log_run;
pub mod memory;
mod packing;
pub mod postgres;
mod schema;
pub mod sqlite;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};

/// A change as it is stored: its name and its chunk, exactly as its author made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredChange {
    pub hash: ChangeHash,
    pub bytes: Bytes,
}

/// The right to append under an origin, from [`Storage::claim_origin`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedOrigin {
    pub id: OriginId,
    pub group: PlacementGroup,
    pub incarnation: Incarnation,
    /// The last seq that has been committed under this origin; 0 when it is new.
    pub last_seq: Seq,
}

/// The changes of one document within a batch. `changes` is never empty.
#[derive(Debug, Clone)]
pub struct DocumentAppend {
    pub document: DocumentId,
    pub changes: Vec<StoredChange>,
}

/// One log entry: at `seq`, its origin received this change of this document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub seq: Seq,
    pub document: DocumentId,
    pub hash: ChangeHash,
}

/// A base as it is kept beside a document's tail. The two opaque parts that are needed rarely stay in the
/// database: the Automerge chunk ([`Storage::read_base_chunk`]) and the index ([`Storage::read_base_index`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBase {
    /// Counts the bases this document has had; the first is 1.
    pub generation: u64,
    /// What the core always needs to know of the base; opaque here.
    pub summary: Bytes,
    pub chunk_bytes: u64,
    /// False while covered changes may still stand among the tail (see clause 7).
    pub pruned: bool,
}

/// A base to install.
#[derive(Debug, Clone)]
pub struct NewBase {
    pub summary: Bytes,
    pub index: Bytes,
    pub chunk: Bytes,
}

/// Why a document is not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentState {
    Live,
    /// It does not apply; the reason is for operators.
    Quarantined {
        reason: String,
    },
}

/// Everything that is needed to bring a document to life, without its base's bytes.
#[derive(Debug, Clone)]
pub struct StoredDocument {
    pub group: PlacementGroup,
    pub state: DocumentState,
    pub base: Option<StoredBase>,
    /// In no particular order: the core orders changes by their dependencies.
    pub tail: Vec<StoredChange>,
}

/// Sizes for operators and benchmarks, in rows and bytes. May be estimates and may take a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageStatistics {
    pub documents: u64,
    pub changes: u64,
    /// What the database occupies on disk, with its indexes and its write-ahead log.
    pub disk_bytes: u64,
}

/// What can go wrong. Each variant is a decision the caller can make.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database could not be reached, was busy, or asked for a retry. Nothing is known to have been stored; the
    /// same call may be repeated (clause 5).
    #[error("storage is unavailable for the moment: {0}")]
    Transient(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database is damaged, full, read-only, or answered what cannot be. Nothing was stored. The process should
    /// end, so that whoever supervises it notices.
    #[error("storage failed: {0}")]
    Fatal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another node has claimed this origin since. Nothing was stored. This node must stop writing.
    #[error("origin {origin:?} was claimed by another node (incarnation {ours:?} is no longer the latest)")]
    Fenced { origin: OriginId, ours: Incarnation },
    /// The base to be replaced is no longer the current one. Nothing was stored.
    #[error("the base changed meanwhile: expected generation {expected}, found {found}")]
    Conflict { expected: u64, found: u64 },
    /// The log no longer holds entries this old.
    #[error("the log begins after seq {floor:?}")]
    Truncated { floor: Seq },
    /// The database was migrated by a newer program. Nothing was written.
    #[error("the database has schema {found}, this program knows up to {supported}: use a newer isobar")]
    NewerSchema { found: i64, supported: i64 },
    /// The database belongs to another region. Nothing was written.
    #[error("the database belongs to region {found}, not {expected}")]
    OtherRegion { expected: RegionName, found: RegionName },
}

/// A region's store. See the module's contract.
#[async_trait]
pub trait Storage: Send + Sync + 'static {
    /// The region's stable storage id: made at the first call for this database, the same ever after (clause 10).
    async fn region_identity(&self, region: &RegionName) -> Result<StorageId, StorageError>;

    /// Claims the origin of `(region, group)` numbered `slot` for this process, creating it if there is none, and
    /// fences whoever held it before (clause 4).
    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
    ) -> Result<ClaimedOrigin, StorageError>;

    /// Appends a batch under `origin`, whose first entry shall be `first_seq` (the caller counts; clauses 1–5).
    /// A document that does not exist is created in the origin's placement group. Returns the last seq written;
    /// `first_seq - 1` for a batch without changes, which does nothing.
    ///
    /// # Panics
    /// If the counter is not at `first_seq - 1` nor at this very batch's end although the incarnation is current:
    /// two writers share an incarnation, and going on would break the log.
    async fn append(
        &self,
        origin: &ClaimedOrigin,
        first_seq: Seq,
        batch: &[DocumentAppend],
    ) -> Result<Seq, StorageError>;

    /// Loads a document; `None` if it does not exist (clause 6).
    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError>;

    /// The base's Automerge chunk and the generation it belongs to.
    async fn read_base_chunk(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError>;

    /// The base's index and the generation it belongs to.
    async fn read_base_index(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError>;

    /// Replaces the base of generation `replaces` (0: there is none yet). Returns the new generation (clause 7).
    /// A document that does not exist has no base to replace and gets none: a conflict.
    async fn install_base(
        &self,
        document: &DocumentId,
        replaces: u64,
        base: NewBase,
    ) -> Result<u64, StorageError>;

    /// Removes changes that the base covers; unknown ones are passed over. Callers pass at most a few thousand at a
    /// time, so that appends are not held up, and roughly in the order in which they were appended: changes that came
    /// together are stored together, and leave at the least cost together.
    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError>;

    /// Records that the tail holds no covered change any more, if `generation` is still the current base.
    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError>;

    /// Sets a document's state, if the document exists.
    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError>;

    /// Up to `limit` log entries of `origin` after seq `after`, in order (clauses 2 and 8).
    async fn read_log(&self, origin: OriginId, after: Seq, limit: u32)
    -> Result<Vec<LogEntry>, StorageError>;

    /// Removes the entries of `origin` up to and including `up_to` (clause 8). An implementation may keep a few more
    /// than asked where entries are stored in runs, and keeps the run of the last append in any case (clause 5).
    async fn truncate_log(&self, origin: OriginId, up_to: Seq) -> Result<(), StorageError>;

    /// Sizes, for metrics.
    async fn statistics(&self) -> Result<StorageStatistics, StorageError>;

    /// Whether the database answers: one cheap round trip, for readiness.
    async fn check(&self) -> Result<(), StorageError>;

    /// Finishes what is under way and closes. Later calls fail.
    async fn close(&self);
}

/// Opens the storage that `url` names: `sqlite:PATH` or `postgres://…`. Migrates it (clause 9).
pub async fn open(url: &str) -> Result<Arc<dyn Storage>, StorageError> {
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path == ":memory:" {
            return Err(StorageError::Fatal("sqlite: must be followed by the path of a file".into()));
        }
        return Ok(Arc::new(sqlite::SqliteStorage::open(Path::new(path)).await?));
    }
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Ok(Arc::new(postgres::PostgresStorage::connect(url).await?));
    }
    // Not quoted: what was meant as a URL may hold a password.
    Err(StorageError::Fatal("the database must be sqlite:PATH or postgres://…".into()))
}

/// A region's storage id, made at random as automerge-repo makes its own.
fn new_storage_id() -> StorageId {
    StorageId::new(&uuid::Uuid::new_v4().to_string()).expect("a UUID's text is within the limit")
}
