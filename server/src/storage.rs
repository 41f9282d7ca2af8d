//! Where a region keeps its documents: the contract, and its three implementations.
//!
//! Storage knows documents, changes, bases and the log as names and bytes. It never looks inside a change or a
//! base: what they mean is the core's business. Only the modules below this one name sqlx.
//!
//! # Contract
//!
//! Each implementation passes one suite (`server/tests/storage`), whose tests are named after these clauses.
//!
//! 1. **Atomic append.** [`Storage::append`] stores the whole batch — documents, changes, tombstones, runs of log
//!    entries and the origins' counters — or nothing. When it returns `Ok` the batch survives a crash of the process,
//!    and of the machine as far as the database promises that.
//! 2. **Dense, commit-ordered logs.** The entries of an origin are numbered 1, 2, 3, … without a gap, in the order
//!    of their commits, whether the origin is this region's or another's. The counter row is raised, and the chain
//!    moved on, in the transaction that inserts the entries.
//! 3. **Each change once.** Appending a change that the document already holds leaves its bytes as they are, and
//!    [`Storage::load_document`] returns it once. (It may occupy its space twice until it is pruned.)
//! 4. **Fenced.** Only the latest incarnation of an own origin may append; an older one gets
//!    [`StorageError::Fenced`] and nothing is stored. An origin that was replaced by a new one is fenced for ever.
//! 5. **Definite.** An append that fails with [`StorageError::Transient`] may be repeated as it stands: the caller
//!    passes the seqs it expects to write first, and a batch that did commit before the failure was reported is
//!    recognised by the counter and the last run of an own origin, and answered as the success it was. A run of another
//!    region's origin whose counter stands elsewhere — another node of the region was first, or a batch without an own run
//!    did commit — fails with [`StorageError::OutOfStep`], and this attempt has stored nothing of the batch.
//! 6. **Whole documents.** [`Storage::load_document`] returns a base and a tail that belong together: never the
//!    changes of before an [`Storage::install_base`] with the base of after it.
//! 7. **Bases replace, then prune.** `install_base` is one transaction and fails with [`StorageError::Conflict`]
//!    unless the base it replaces is the one the caller started from. It removes no change. The caller then
//!    removes covered changes in steps ([`Storage::prune_changes`]) and ends with [`Storage::finish_prune`]; until
//!    that, `load_document` says that the tail may still hold covered changes.
//! 8. **Truncation is a prefix.** [`Storage::truncate_log`] removes entries up to a seq and nothing else; counter and
//!    chain stay. Reading below the floor fails with [`StorageError::Truncated`], also when nothing above it is left.
//! 9. **Forward-only schema.** Opening migrates under a lock, so that two nodes may start at once, and refuses a
//!    schema newer than this program's with [`StorageError::NewerSchema`] before anything is written.
//! 10. **One region per database.** The database remembers the region's name and its storage id from the first
//!     start; another region's name is refused.
//! 11. **Independent documents.** No call about one document reads or locks another's rows, except that appends
//!     share the origin's counter.
//! 12. **Deleted for good.** A tombstone removes the document, its changes and its base in its transaction, and from then on
//!     [`Storage::read_log`] shows the document's changes as erased (their names, seqs and chain stay), although they may still
//!     stand in stored runs until [`Storage::erase_step`] has come to them (clause 18). Nothing appended later brings the
//!     document back: its changes are left out, its log entries are stored. The earliest deletion time counts.
//! 13. **Vectors are adopted forward.** [`Storage::adopt_origins`] raises counters of other regions' origins after a
//!     snapshot, never lowers one, and leaves the log below truncated. Which documents the snapshot lacked is noted in the same
//!     transaction ([`Storage::missing_documents`]): at no moment does a counter claim what is neither here nor noted.
//! 14. **One seat each.** Of the nodes that have a seat ([`Storage::take_seat`]) no two have the same slot, and at most one
//!     keeps the links but for a moment. A seat is free again when its process is gone, without anybody waiting for a
//!     term to run out, or when its machine has not been heard of for some seconds.
//! 15. **Damage stays in its row.** A row of changes that does not decode is left out of the tail, and named beside it
//!     ([`StoredDocument::damaged_rows`]); the rest of the document is read, and nothing fails. [`Storage::mend_changes`] gives
//!     every stored copy of a change the bytes that the caller has for it, and removes rows that do not decode; a change that is
//!     not stored stays out. A log of which runs are lost reads as far as they are there, and below the next as truncated.
//! 16. **Members are remembered.** [`Storage::note_member`] keeps when a region was last linked, which never goes back, until
//!     [`Storage::forget_member`] removes all that is known of it.
//! 17. **Nodes are registered.** The database remembers the nodes that were started on it ([`Storage::register_node`]), in
//!     their order, the newest [`LINK_LINEAGE_MAX`] at least. A copy of the database has those of before it was made, and neither
//!     has those of the other since.
//! 18. **Erased step by step.** No append reads or rewrites the log because of a deletion. [`Storage::erase_step`] does,
//!     with a bounded number of runs in one transaction, in the order of origins and seqs. How far it has come is stored with
//!     what it has done, so that a pass over the log goes on after a crash, and two nodes may take steps at once. A pass erases
//!     every deletion that was appended before it began, and ends when it has come to the end of every log, whatever was
//!     appended meanwhile; a later deletion is erased by the next pass.
//! 19. **One group each.** A document stays of the placement group in which it was created first, and so does its tombstone.
//!     Changes that are appended to it under another group are left out, their log entries are stored, and the same transaction
//!     quarantines the document with the reason [`two_groups`].

mod bundle;
mod clock;
mod failure;
mod log_run;
pub mod memory;
pub(crate) mod packing;
pub mod postgres;
mod rows;
mod schema;
pub mod seat;
pub mod sqlite;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
#[cfg(doc)]
use isobar_protocol::config::LINK_LINEAGE_MAX;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::log::Chain;

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
    /// The chain at that seq.
    pub chain: Chain,
}

/// An origin as this region knows it, its own or another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredOrigin {
    pub id: OriginId,
    pub region: RegionName,
    pub group: PlacementGroup,
    /// The last seq that is stored.
    pub seq: Seq,
    pub chain: Chain,
    /// A node of this region has claimed it, and may be writing it.
    pub claimed: bool,
}

/// Consecutive entries of one origin, to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAppend {
    pub origin: OriginId,
    pub writer: Writer,
    pub group: PlacementGroup,
    pub first: Seq,
    pub last: Seq,
    /// The chain before the first entry and after the last.
    pub chain_before: Chain,
    pub chain: Chain,
    /// As `isobar_protocol::log` packs it.
    pub body: Bytes,
}

/// Who writes a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writer {
    /// This node, under an origin it has claimed.
    Own { incarnation: Incarnation },
    /// Another region, whose entries are stored here. The origin is created if it is not known yet.
    Other { region: RegionName },
}

/// Changes of one document within a batch that came by one origin. `changes` is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentAppend {
    pub document: DocumentId,
    /// The group in which the document is created if it does not exist.
    pub group: PlacementGroup,
    pub origin: OriginId,
    /// Each with its entry's seq, ascending. No other append ever uses the same (document, origin, seq).
    pub changes: Vec<(Seq, StoredChange)>,
}

/// A document's deletion within a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    pub document: DocumentId,
    pub group: PlacementGroup,
    /// Milliseconds of Unix time.
    pub deleted_at_ms: u64,
}

/// What one transaction stores. Deletions take effect after the changes: a change and the tombstone of its document in one
/// batch leave the tombstone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// At most one per origin.
    pub runs: Vec<RunAppend>,
    pub changes: Vec<DocumentAppend>,
    pub deletions: Vec<Deletion>,
}

/// Consecutive entries as they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRun {
    pub first: Seq,
    pub last: Seq,
    /// The chain before the first entry.
    pub chain_before: Chain,
    pub body: Bytes,
}

/// What came of a step of erasing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ErasureStep {
    /// Stored runs that were rewritten without deleted documents' changes.
    pub runs_erased: u64,
    /// Deletions that are not erased yet.
    pub deletions_left: u64,
}

/// How far another region has stored an origin's log, as it said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledgement {
    pub region: RegionName,
    pub origin: OriginId,
    pub seq: Seq,
}

/// Another region that was ever linked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub region: RegionName,
    /// When it was linked last, in milliseconds of Unix time.
    pub linked_at_ms: u64,
    /// It was away for so long that log entries are given up without it.
    pub needs_snapshot: bool,
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
    /// There is a tombstone and nothing else.
    Deleted {
        deleted_at_ms: u64,
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
    /// For each row that does not decode, the names of its changes as far as they can be read (clause 15).
    pub damaged_rows: Vec<Vec<ChangeHash>>,
}

/// A document in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDocument {
    pub id: DocumentId,
    pub group: PlacementGroup,
    pub state: DocumentState,
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
    /// Another node has stored entries of this origin meanwhile; it stands at `seq`. Nothing was stored.
    #[error("origin {origin:?} already stands at {seq:?}")]
    OutOfStep { origin: OriginId, seq: Seq },
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
    /// fences whoever held it before (clause 4). With `anew`, the origin is replaced by a new one, even if nothing was written
    /// under it: whether this database is a copy, or was restored from one, cannot be told from inside, and a seq must never be
    /// used twice.
    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
        anew: bool,
    ) -> Result<ClaimedOrigin, StorageError>;

    /// Takes a place among the nodes that share this database (clause 14). To be called once by a process.
    async fn take_seat(&self) -> Result<seat::Seat, StorageError> {
        Ok(seat::Seat::alone())
    }

    /// Remembers that a node was started on this database (clause 17).
    async fn register_node(&self, node: NodeId) -> Result<(), StorageError>;

    /// The newest nodes that were registered, at most [`LINK_LINEAGE_MAX`], the latest first.
    async fn registered_nodes(&self) -> Result<Vec<NodeId>, StorageError>;

    /// Every origin that is known, this region's former ones included.
    async fn origins(&self) -> Result<Vec<StoredOrigin>, StorageError>;

    /// Appends a batch (clauses 1–5, 12 and 18). A document that does not exist is created.
    ///
    /// # Panics
    /// If the counter of an own origin is not where its run begins, nor at this very run's end, although the incarnation
    /// is current: two writers share an incarnation, and going on would break the log.
    async fn append(&self, batch: &Batch) -> Result<(), StorageError>;

    /// Loads a document; `None` if it does not exist and was not deleted (clause 6).
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

    /// Replaces the bytes of stored changes by these, and removes rows that do not decode (clause 15). To be called when
    /// everything that shall be kept of the document has been appended.
    async fn mend_changes(&self, document: &DocumentId, good: &[StoredChange]) -> Result<(), StorageError>;

    /// Records that the tail holds no covered change any more, if `generation` is still the current base.
    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError>;

    /// Sets a document's state, if the document exists. `Deleted` is no state to set: append a deletion.
    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError>;

    /// The runs of `origin` from the one that holds the entry after `after` on, in order, up to about `bytes_max` bytes
    /// of bodies, at least one if there is any (clauses 2, 8, 12 and 15). The first may begin before `after`.
    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    ) -> Result<Vec<StoredRun>, StorageError>;

    /// Removes the entries of `origin` up to and including `up_to` that were appended `older_than` ago or earlier (clause 8).
    /// An implementation may keep a few more than asked, as entries are stored in runs, and keeps the run of the last
    /// append in any case (clause 5).
    async fn truncate_log(
        &self,
        origin: OriginId,
        up_to: Seq,
        older_than: Duration,
    ) -> Result<(), StorageError>;

    /// Erases changes of deleted documents from stored runs, reading about `runs_max` of them, at least one (clause 18). To be
    /// called until no deletion is left.
    async fn erase_step(&self, runs_max: usize) -> Result<ErasureStep, StorageError>;

    /// Raises other regions' origins to where a snapshot was taken, creating those that are not known, and notes which
    /// documents it lacked (clause 13).
    async fn adopt_origins(
        &self,
        origins: &[StoredOrigin],
        missing: &[MissingDocument],
    ) -> Result<(), StorageError>;

    /// The documents that snapshots lacked and that were not found since, in the order of their ids.
    async fn missing_documents(&self) -> Result<Vec<MissingDocument>, StorageError>;

    /// A document is whole again: what it lacked is stored.
    async fn document_found(&self, document: &DocumentId) -> Result<(), StorageError>;

    /// Notes how far other regions have stored logs; what goes back is ignored.
    async fn note_acknowledgements(&self, news: &[Acknowledgement]) -> Result<(), StorageError>;

    /// What was noted.
    async fn acknowledgements(&self) -> Result<Vec<Acknowledgement>, StorageError>;

    /// Notes that a region was linked then, and whether it needs a snapshot (clause 16).
    async fn note_member(&self, member: &Member) -> Result<(), StorageError>;

    /// The regions that were ever linked, by name (clause 16).
    async fn members(&self) -> Result<Vec<Member>, StorageError>;

    /// Removes a region and its acknowledgements. Returns whether it was known.
    async fn forget_member(&self, region: &RegionName) -> Result<bool, StorageError>;

    /// What a listing says of one document, without reading its changes.
    async fn find_document(&self, document: &DocumentId) -> Result<Option<ListedDocument>, StorageError>;

    /// Up to `limit` documents after `after` in the order of their ids, deleted and quarantined ones included.
    async fn list_documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError>;

    /// Up to `limit` quarantined documents after `after` in the order of their ids, at a cost that does not grow with the others.
    async fn list_quarantined(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError>;

    /// How many documents are quarantined, at a cost that does not grow with the others.
    async fn count_quarantined(&self) -> Result<u64, StorageError>;

    /// Creates a document without changes, if it neither exists nor was deleted. For a base that comes from another region.
    async fn create_document(
        &self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<(), StorageError>;

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

/// Why a document is quarantined to which changes came under another group than its own (clause 19).
pub fn two_groups(own: &PlacementGroup, other: &PlacementGroup) -> String {
    format!("created in two placement groups: {own} here, {other} elsewhere")
}

/// A region's storage id, made at random as automerge-repo makes its own.
fn new_storage_id() -> StorageId {
    StorageId::new(&uuid::Uuid::new_v4().to_string()).expect("a UUID's text is within the limit")
}

/// # Panics
/// If the state is `Deleted`, which is no state to set.
fn check_settable(state: &DocumentState) {
    assert!(!matches!(state, DocumentState::Deleted { .. }), "a document is deleted by appending a deletion");
}
