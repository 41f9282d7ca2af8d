//! The rows that the shared statements return, and what they mean. Both databases read them by the same names.

use std::collections::BTreeSet;

use bytes::Bytes;
use isobar_protocol::ids::{DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::log::Chain;
use sqlx::FromRow;
use uuid::Uuid;

use super::bundle::Tail;
use super::failure::{intact, unsigned};
use super::log_run::{FoundCounter, erase_all, gather};
use super::{
    Acknowledgement, ClaimedOrigin, DocumentState, ListedDocument, Member, StorageError, StoredBase,
    StoredDocument, StoredOrigin, StoredRun,
};

const STATE_LIVE: i32 = 0;
const STATE_QUARANTINED: i32 = 1;
const STATE_DELETED: i32 = 2;

/// A value that no statement of ours has written: the database is damaged.
fn damaged(what: String) -> StorageError {
    StorageError::Fatal(what.into())
}

/// A column that this kind of row always has.
fn present<T>(column: Option<T>, name: &str) -> Result<T, StorageError> {
    column.ok_or_else(|| damaged(format!("a row has no {name}")))
}

fn origin_id(bytes: &[u8]) -> Result<OriginId, StorageError> {
    Uuid::from_slice(bytes).map(OriginId).map_err(|error| StorageError::Fatal(Box::new(error)))
}

pub(super) fn node_id(bytes: &[u8]) -> Result<NodeId, StorageError> {
    bytes.try_into().map(NodeId).map_err(|_| damaged(format!("a node's id of {} bytes", bytes.len())))
}

fn chain(bytes: &[u8]) -> Result<Chain, StorageError> {
    bytes.try_into().map(Chain).map_err(|_| damaged(format!("a chain of {} bytes", bytes.len())))
}

/// A document's state as its two columns in `documents`.
///
/// # Panics
/// If it is `Deleted`.
pub(super) fn state_columns(state: &DocumentState) -> (i32, Option<&str>) {
    super::check_settable(state);
    match state {
        DocumentState::Live | DocumentState::Deleted { .. } => (STATE_LIVE, None),
        DocumentState::Quarantined { reason } => (STATE_QUARANTINED, Some(reason)),
    }
}

fn state(state: i32, reason: Option<String>, deleted_at: Option<i64>) -> Result<DocumentState, StorageError> {
    match state {
        STATE_LIVE => Ok(DocumentState::Live),
        STATE_QUARANTINED => Ok(DocumentState::Quarantined { reason: reason.unwrap_or_default() }),
        STATE_DELETED => {
            let deleted_at_ms = unsigned(present(deleted_at, "deletion time")?)?;
            Ok(DocumentState::Deleted { deleted_at_ms })
        }
        unknown => Err(damaged(format!("a document has the unknown state {unknown}"))),
    }
}

/// Of [`super::schema::LOAD_DOCUMENT`]: the document, its tombstone, or a bundle.
#[derive(FromRow)]
pub(super) struct LoadedRow {
    placement_group: Option<String>,
    state: Option<i32>,
    state_reason: Option<String>,
    deleted_at: Option<i64>,
    generation: Option<i64>,
    pruned: Option<bool>,
    chunk_bytes: Option<i64>,
    summary: Option<Vec<u8>>,
    first_seq: Option<i64>,
    hashes: Option<Vec<u8>>,
    changes: Option<Vec<u8>>,
}

impl LoadedRow {
    fn base(&mut self) -> Result<Option<StoredBase>, StorageError> {
        let Some(generation) = self.generation else { return Ok(None) };
        Ok(Some(StoredBase {
            generation: unsigned(generation)?,
            summary: present(self.summary.take(), "summary")?.into(),
            chunk_bytes: unsigned(present(self.chunk_bytes, "chunk length")?)?,
            pruned: present(self.pruned, "mark of pruning")?,
        }))
    }

    fn document(mut self, group: &str) -> Result<StoredDocument, StorageError> {
        let base = self.base()?;
        Ok(StoredDocument {
            group: intact(PlacementGroup::new(group))?,
            state: state(present(self.state, "state")?, self.state_reason, self.deleted_at)?,
            base,
            tail: Vec::new(),
            damaged_rows: Vec::new(),
        })
    }
}

/// A document from its rows; `None` if there are none.
pub(super) fn loaded_document(rows: Vec<LoadedRow>) -> Result<Option<StoredDocument>, StorageError> {
    let mut loaded: Option<StoredDocument> = None;
    let mut tail = Tail::default();
    for mut row in rows {
        if let Some(group) = row.placement_group.take() {
            let document = row.document(&group)?;
            if matches!(document.state, DocumentState::Deleted { .. }) {
                return Ok(Some(document));
            }
            loaded = Some(document);
        } else {
            let first = Seq(unsigned(present(row.first_seq, "seq")?)?);
            let changes = present(row.changes, "changes")?.into();
            tail.push(first, &present(row.hashes, "hashes")?, &changes);
        }
    }
    let damaged_rows = tail.take_damaged();
    Ok(loaded.map(|document| StoredDocument { tail: tail.into_changes(), damaged_rows, ..document }))
}

/// Of [`super::schema::LIST_DOCUMENTS`].
#[derive(FromRow)]
pub(super) struct ListedRow {
    id: Vec<u8>,
    placement_group: String,
    state: i32,
    state_reason: Option<String>,
    deleted_at: Option<i64>,
}

impl ListedRow {
    pub fn listed(self) -> Result<ListedDocument, StorageError> {
        Ok(ListedDocument {
            id: intact(DocumentId::from_slice(&self.id))?,
            group: intact(PlacementGroup::new(&self.placement_group))?,
            state: state(self.state, self.state_reason, self.deleted_at)?,
        })
    }
}

/// One of the two opaque parts of a base.
#[derive(FromRow)]
pub(super) struct ContentsRow {
    generation: i64,
    contents: Vec<u8>,
}

impl ContentsRow {
    pub fn contents(self) -> Result<(u64, Bytes), StorageError> {
        Ok((unsigned(self.generation)?, self.contents.into()))
    }
}

/// A run's columns, all of them or none.
#[derive(FromRow)]
pub(super) struct RunColumns {
    first_seq: Option<i64>,
    last_seq: Option<i64>,
    chain_before: Option<Vec<u8>>,
    body: Option<Vec<u8>>,
}

impl RunColumns {
    fn run(self) -> Result<Option<StoredRun>, StorageError> {
        let Some(first) = self.first_seq else { return Ok(None) };
        Ok(Some(StoredRun {
            first: Seq(unsigned(first)?),
            last: Seq(unsigned(present(self.last_seq, "last seq")?)?),
            chain_before: chain(&present(self.chain_before, "chain")?)?,
            body: present(self.body, "body")?.into(),
        }))
    }
}

/// Of [`super::schema::READ_LOG`]: a run, or the origin's counter alone, or a document whose deletion is not erased yet.
#[derive(FromRow)]
pub(super) struct LogRow {
    seq: Option<i64>,
    #[sqlx(flatten)]
    run: RunColumns,
}

/// What a read of an origin's log finds, before anything is erased.
pub(super) struct FoundLog {
    /// The origin's counter; `None` if it is not known.
    seq: Option<Seq>,
    pub runs: Vec<StoredRun>,
    pub unerased: BTreeSet<DocumentId>,
}

impl FoundLog {
    pub fn from_rows(rows: Vec<LogRow>) -> Result<Self, StorageError> {
        let mut found = Self { seq: None, runs: Vec::new(), unerased: BTreeSet::new() };
        for LogRow { seq, run } in rows {
            let Some(seq) = seq else {
                let document = present(run.body, "document")?;
                found.unerased.insert(intact(DocumentId::from_slice(&document))?);
                continue;
            };
            found.seq = Some(Seq(unsigned(seq)?));
            found.runs.extend(run.run()?);
        }
        Ok(found)
    }

    /// Up to where the log was read, and whether that is its end. Where nothing is stored nothing is left to read.
    pub fn reach(&self) -> (Seq, bool) {
        let seq = self.seq.unwrap_or(Seq(0));
        let reached = self.runs.last().map_or(seq, |run| run.last);
        (reached, reached >= seq)
    }
}

/// What a reader at `after` gets (clauses 8 and 12). Nothing of an origin that is not known.
pub(super) fn read_runs(rows: Vec<LogRow>, after: Seq) -> Result<Vec<StoredRun>, StorageError> {
    let found = FoundLog::from_rows(rows)?;
    let Some(seq) = found.seq else { return Ok(Vec::new()) };
    Ok(erase_all(gather(seq, after, found.runs)?, &found.unerased))
}

/// Of [`super::schema::READ_COUNTER`].
#[derive(FromRow)]
pub(super) struct CounterRow {
    incarnation: i64,
    seq: i64,
    chain: Vec<u8>,
    #[sqlx(flatten)]
    run_at_end: RunColumns,
}

impl CounterRow {
    pub fn found(self) -> Result<FoundCounter, StorageError> {
        Ok(FoundCounter {
            incarnation: Incarnation(unsigned(self.incarnation)?),
            seq: Seq(unsigned(self.seq)?),
            chain: chain(&self.chain)?,
            run_at_end: self.run_at_end.run()?,
        })
    }
}

/// Of [`super::schema::CLAIM_ORIGIN`].
#[derive(FromRow)]
pub(super) struct ClaimedRow {
    id: Vec<u8>,
    incarnation: i64,
    seq: i64,
    chain: Vec<u8>,
}

impl ClaimedRow {
    pub fn claimed(self, group: &PlacementGroup) -> Result<ClaimedOrigin, StorageError> {
        Ok(ClaimedOrigin {
            id: origin_id(&self.id)?,
            group: group.clone(),
            incarnation: Incarnation(unsigned(self.incarnation)?),
            last_seq: Seq(unsigned(self.seq)?),
            chain: chain(&self.chain)?,
        })
    }
}

/// Of [`super::schema::READ_ORIGINS`].
#[derive(FromRow)]
pub(super) struct OriginRow {
    id: Vec<u8>,
    region: String,
    placement_group: String,
    seq: i64,
    chain: Vec<u8>,
    claimed: bool,
}

impl OriginRow {
    pub fn origin(self) -> Result<StoredOrigin, StorageError> {
        Ok(StoredOrigin {
            id: origin_id(&self.id)?,
            region: intact(RegionName::new(&self.region))?,
            group: intact(PlacementGroup::new(&self.placement_group))?,
            seq: Seq(unsigned(self.seq)?),
            chain: chain(&self.chain)?,
            claimed: self.claimed,
        })
    }
}

/// Of [`super::schema::READ_ACKNOWLEDGEMENTS`].
#[derive(FromRow)]
pub(super) struct AcknowledgementRow {
    region: String,
    origin: Vec<u8>,
    seq: i64,
}

impl AcknowledgementRow {
    pub fn acknowledgement(self) -> Result<Acknowledgement, StorageError> {
        Ok(Acknowledgement {
            region: intact(RegionName::new(&self.region))?,
            origin: origin_id(&self.origin)?,
            seq: Seq(unsigned(self.seq)?),
        })
    }
}

/// Of [`super::schema::READ_MISSING_DOCUMENTS`].
#[derive(FromRow)]
pub(super) struct MissingRow {
    document_id: Vec<u8>,
    placement_group: String,
}

impl MissingRow {
    pub fn missing(self) -> Result<MissingDocument, StorageError> {
        Ok(MissingDocument {
            document: intact(DocumentId::from_slice(&self.document_id))?,
            group: intact(PlacementGroup::new(&self.placement_group))?,
        })
    }
}

/// Of [`super::schema::READ_MEMBERS`].
#[derive(FromRow)]
pub(super) struct MemberRow {
    region: String,
    linked_at: i64,
    needs_snapshot: bool,
}

impl MemberRow {
    pub fn member(self) -> Result<Member, StorageError> {
        Ok(Member {
            region: intact(RegionName::new(&self.region))?,
            linked_at_ms: unsigned(self.linked_at)?,
            needs_snapshot: self.needs_snapshot,
        })
    }
}
