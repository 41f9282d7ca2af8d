//! Storage in memory, for tests and the simulator: the same contract, gone with the last handle.
//!
//! Nothing here fails or waits.

mod append;
mod erasure;
mod seat;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::config::LINK_LINEAGE_MAX;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::log::Chain;
use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::clock::before_now_ms;
use super::log_run::{check, erase_all, gather};
use super::{
    Acknowledgement, Batch, ClaimedOrigin, DocumentState, ErasureStep, ListedDocument, Member, NewBase,
    Storage, StorageError, StorageStatistics, StoredBase, StoredChange, StoredDocument, StoredOrigin,
    StoredRun, check_settable, new_storage_id,
};

/// A handle to a store in memory.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    database: Arc<Mutex<Database>>,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Database {
    region: Option<(RegionName, StorageId)>,
    origins: BTreeMap<OriginId, Origin>,
    documents: BTreeMap<DocumentId, Document>,
    tombstones: BTreeMap<DocumentId, Tombstone>,
    /// Deleted documents whose changes may still stand in the log.
    unerased: BTreeMap<DocumentId, erasure::Pass>,
    /// How far the pass has come that erases them, in each origin's log.
    erasure_cursors: BTreeMap<OriginId, Seq>,
    acknowledgements: BTreeMap<(RegionName, OriginId), Seq>,
    /// The latest last.
    nodes: Vec<NodeId>,
    members: BTreeMap<RegionName, Member>,
    /// What snapshots lacked.
    missing: BTreeMap<DocumentId, PlacementGroup>,
    /// By slot.
    seats: BTreeMap<u32, seat::Taken>,
    /// The node that keeps the links.
    keeper: Option<Uuid>,
}

#[derive(Debug)]
struct Origin {
    region: RegionName,
    group: PlacementGroup,
    /// `None` for other regions' origins, and own ones that were replaced.
    slot: Option<u32>,
    incarnation: Incarnation,
    seq: Seq,
    chain: Chain,
    /// By the run's last seq.
    log: BTreeMap<Seq, LoggedRun>,
}

#[derive(Debug)]
struct LoggedRun {
    appended_at_ms: i64,
    run: StoredRun,
}

#[derive(Debug)]
struct Document {
    group: PlacementGroup,
    state: DocumentState,
    base: Option<Base>,
    changes: BTreeMap<ChangeHash, Bytes>,
}

#[derive(Debug)]
struct Tombstone {
    group: PlacementGroup,
    deleted_at_ms: u64,
}

#[derive(Debug)]
struct Base {
    generation: u64,
    pruned: bool,
    contents: NewBase,
}

impl MemoryStorage {
    pub fn new() -> Self {
        Self::default()
    }

    /// Another handle to the same store, open whether or not this one is closed: what reopening a file is to the
    /// databases.
    pub fn reopen(&self) -> Self {
        Self { database: Arc::clone(&self.database), closed: AtomicBool::new(false) }
    }

    fn database(&self) -> Result<MutexGuard<'_, Database>, StorageError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(StorageError::Fatal("the storage is closed".into()));
        }
        Ok(self.database.lock())
    }
}

impl Origin {
    fn new(region: RegionName, group: PlacementGroup, slot: Option<u32>) -> Self {
        Self {
            region,
            group,
            slot,
            incarnation: Incarnation(0),
            seq: Seq(0),
            chain: Chain::START,
            log: BTreeMap::new(),
        }
    }

    /// Takes the origin from whoever holds it (clause 4).
    fn replace(&mut self) {
        if self.slot.take().is_some() {
            self.incarnation.0 += 1;
        }
    }
}

impl Document {
    fn new(group: PlacementGroup) -> Self {
        Self { group, state: DocumentState::Live, base: None, changes: BTreeMap::new() }
    }

    fn is_quarantined(&self) -> bool {
        matches!(self.state, DocumentState::Quarantined { .. })
    }
}

impl Tombstone {
    fn state(&self) -> DocumentState {
        DocumentState::Deleted { deleted_at_ms: self.deleted_at_ms }
    }
}

impl Database {
    fn check_region(&self, region: &RegionName) -> Result<(), StorageError> {
        match &self.region {
            Some((found, _)) if found != region => {
                Err(StorageError::OtherRegion { expected: region.clone(), found: found.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The document, created if it neither exists nor was deleted; `None` if it was.
    fn document_mut(&mut self, id: &DocumentId, group: &PlacementGroup) -> Option<&mut Document> {
        if self.tombstones.contains_key(id) {
            return None;
        }
        Some(self.documents.entry(id.clone()).or_insert_with(|| Document::new(group.clone())))
    }
}

#[async_trait]
impl Storage for MemoryStorage {
    async fn region_identity(&self, region: &RegionName) -> Result<StorageId, StorageError> {
        let mut database = self.database()?;
        database.check_region(region)?;
        let (_, storage_id) = database.region.get_or_insert_with(|| (region.clone(), new_storage_id()));
        Ok(storage_id.clone())
    }

    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
        anew: bool,
    ) -> Result<ClaimedOrigin, StorageError> {
        let mut database = self.database()?;
        database.check_region(region)?;
        let held =
            |origin: &Origin| origin.slot == Some(slot) && origin.region == *region && origin.group == *group;
        let mut claimed = database.origins.iter().find(|(_, origin)| held(origin)).map(|(id, _)| *id);
        if anew && let Some(former) = claimed.and_then(|id| database.origins.get_mut(&id)) {
            former.replace();
            claimed = None;
        }
        let id = claimed.unwrap_or_else(|| OriginId(Uuid::new_v4()));
        let new = || Origin::new(region.clone(), group.clone(), Some(slot));
        let origin = database.origins.entry(id).or_insert_with(new);
        origin.incarnation.0 += 1;
        Ok(ClaimedOrigin {
            id,
            group: group.clone(),
            incarnation: origin.incarnation,
            last_seq: origin.seq,
            chain: origin.chain,
        })
    }

    async fn take_seat(&self) -> Result<super::seat::Seat, StorageError> {
        drop(self.database()?);
        Ok(seat::take(&self.database))
    }

    async fn origins(&self) -> Result<Vec<StoredOrigin>, StorageError> {
        let stored = |(&id, origin): (&OriginId, &Origin)| StoredOrigin {
            id,
            region: origin.region.clone(),
            group: origin.group.clone(),
            seq: origin.seq,
            chain: origin.chain,
            claimed: origin.slot.is_some(),
        };
        Ok(self.database()?.origins.iter().map(stored).collect())
    }

    async fn append(&self, batch: &Batch) -> Result<(), StorageError> {
        check(batch);
        append::append(&mut *self.database()?, batch)
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let database = self.database()?;
        if let Some(tombstone) = database.tombstones.get(document) {
            let (group, state) = (tombstone.group.clone(), tombstone.state());
            return Ok(Some(StoredDocument {
                group,
                state,
                base: None,
                tail: Vec::new(),
                damaged_rows: Vec::new(),
            }));
        }
        Ok(database.documents.get(document).map(|found| StoredDocument {
            group: found.group.clone(),
            state: found.state.clone(),
            base: found.base.as_ref().map(|base| StoredBase {
                generation: base.generation,
                summary: base.contents.summary.clone(),
                chunk_bytes: base.contents.chunk.len() as u64,
                pruned: base.pruned,
            }),
            tail: found
                .changes
                .iter()
                .map(|(&hash, bytes)| StoredChange { hash, bytes: bytes.clone() })
                .collect(),
            damaged_rows: Vec::new(),
        }))
    }

    async fn read_base_chunk(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        let database = self.database()?;
        let base = database.documents.get(document).and_then(|found| found.base.as_ref());
        Ok(base.map(|base| (base.generation, base.contents.chunk.clone())))
    }

    async fn read_base_index(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        let database = self.database()?;
        let base = database.documents.get(document).and_then(|found| found.base.as_ref());
        Ok(base.map(|base| (base.generation, base.contents.index.clone())))
    }

    async fn install_base(
        &self,
        document: &DocumentId,
        replaces: u64,
        base: NewBase,
    ) -> Result<u64, StorageError> {
        let mut database = self.database()?;
        let row = database.documents.get_mut(document);
        let found = row.as_ref().and_then(|row| row.base.as_ref()).map_or(0, |base| base.generation);
        match row {
            Some(row) if found == replaces => {
                row.base = Some(Base { generation: found + 1, pruned: false, contents: base });
                Ok(found + 1)
            }
            _ => Err(StorageError::Conflict { expected: replaces, found }),
        }
    }

    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError> {
        if let Some(row) = self.database()?.documents.get_mut(document) {
            covered.iter().for_each(|hash| {
                row.changes.remove(hash);
            });
        }
        Ok(())
    }

    async fn mend_changes(&self, document: &DocumentId, good: &[StoredChange]) -> Result<(), StorageError> {
        if let Some(row) = self.database()?.documents.get_mut(document) {
            for change in good {
                if let Some(bytes) = row.changes.get_mut(&change.hash) {
                    *bytes = change.bytes.clone();
                }
            }
        }
        Ok(())
    }

    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError> {
        let mut database = self.database()?;
        let base = database.documents.get_mut(document).and_then(|row| row.base.as_mut());
        if let Some(base) = base.filter(|base| base.generation == generation) {
            base.pruned = true;
        }
        Ok(())
    }

    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError> {
        check_settable(state);
        if let Some(row) = self.database()?.documents.get_mut(document) {
            row.state = state.clone();
        }
        Ok(())
    }

    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    ) -> Result<Vec<StoredRun>, StorageError> {
        let database = self.database()?;
        let Some(row) = database.origins.get(&origin) else {
            return Ok(Vec::new());
        };
        let mut bytes = 0;
        let following =
            row.log.range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, logged)| &logged.run);
        let runs = following.take_while(|run| {
            let fits = bytes == 0 || bytes < bytes_max;
            bytes += run.body.len();
            fits
        });
        Ok(erase_all(gather(row.seq, after, runs.cloned().collect())?, &database.unerased()))
    }

    async fn truncate_log(
        &self,
        origin: OriginId,
        up_to: Seq,
        older_than: Duration,
    ) -> Result<(), StorageError> {
        let mut database = self.database()?;
        if let Some(row) = database.origins.get_mut(&origin) {
            let (newest, appended_until) = (row.seq, before_now_ms(older_than));
            let mut removed = true;
            row.log.retain(|&last, logged| {
                removed &= last <= up_to && last != newest && logged.appended_at_ms <= appended_until;
                !removed
            });
        }
        Ok(())
    }

    async fn erase_step(&self, runs_max: usize) -> Result<ErasureStep, StorageError> {
        Ok(self.database()?.erase_step(runs_max))
    }

    async fn adopt_origins(
        &self,
        origins: &[StoredOrigin],
        missing: &[MissingDocument],
    ) -> Result<(), StorageError> {
        let mut database = self.database()?;
        for lacking in missing {
            database.missing.entry(lacking.document.clone()).or_insert_with(|| lacking.group.clone());
        }
        for adopted in origins {
            let new = || Origin::new(adopted.region.clone(), adopted.group.clone(), None);
            let origin = database.origins.entry(adopted.id).or_insert_with(new);
            if origin.seq < adopted.seq {
                origin.replace();
                (origin.seq, origin.chain) = (adopted.seq, adopted.chain);
                origin.log.clear();
            }
        }
        Ok(())
    }

    async fn register_node(&self, node: NodeId) -> Result<(), StorageError> {
        self.database()?.nodes.push(node);
        Ok(())
    }

    async fn registered_nodes(&self) -> Result<Vec<NodeId>, StorageError> {
        Ok(self.database()?.nodes.iter().rev().take(LINK_LINEAGE_MAX).copied().collect())
    }

    async fn missing_documents(&self) -> Result<Vec<MissingDocument>, StorageError> {
        let missing = |(document, group): (&DocumentId, &PlacementGroup)| MissingDocument {
            document: document.clone(),
            group: group.clone(),
        };
        Ok(self.database()?.missing.iter().map(missing).collect())
    }

    async fn document_found(&self, document: &DocumentId) -> Result<(), StorageError> {
        self.database()?.missing.remove(document);
        Ok(())
    }

    async fn note_member(&self, member: &Member) -> Result<(), StorageError> {
        let mut database = self.database()?;
        let noted = database.members.entry(member.region.clone()).or_insert_with(|| member.clone());
        noted.linked_at_ms = noted.linked_at_ms.max(member.linked_at_ms);
        noted.needs_snapshot = member.needs_snapshot;
        Ok(())
    }

    async fn members(&self) -> Result<Vec<Member>, StorageError> {
        Ok(self.database()?.members.values().cloned().collect())
    }

    async fn forget_member(&self, region: &RegionName) -> Result<bool, StorageError> {
        let mut database = self.database()?;
        database.acknowledgements.retain(|(of, _), _| of != region);
        Ok(database.members.remove(region).is_some())
    }

    async fn note_acknowledgements(&self, news: &[Acknowledgement]) -> Result<(), StorageError> {
        let mut database = self.database()?;
        for new in news {
            let key = (new.region.clone(), new.origin);
            let seq = database.acknowledgements.entry(key).or_insert(new.seq);
            *seq = new.seq.max(*seq);
        }
        Ok(())
    }

    async fn acknowledgements(&self) -> Result<Vec<Acknowledgement>, StorageError> {
        let noted = |((region, origin), &seq): (&(RegionName, OriginId), &Seq)| Acknowledgement {
            region: region.clone(),
            origin: *origin,
            seq,
        };
        Ok(self.database()?.acknowledgements.iter().map(noted).collect())
    }

    async fn find_document(&self, document: &DocumentId) -> Result<Option<ListedDocument>, StorageError> {
        let database = self.database()?;
        let found = database.documents.get(document).map(|it| (it.group.clone(), it.state.clone()));
        let gone = || database.tombstones.get(document).map(|it| (it.group.clone(), it.state()));
        let listed = |(group, state)| ListedDocument { id: document.clone(), group, state };
        Ok(found.or_else(gone).map(listed))
    }

    async fn list_documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let database = self.database()?;
        let after = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let limit = limit as usize;
        let documents = database.documents.range::<DocumentId, _>(after).take(limit);
        let tombstones = database.tombstones.range::<DocumentId, _>(after).take(limit);
        let mut listed: Vec<ListedDocument> = documents
            .map(|(id, found)| (id, &found.group, found.state.clone()))
            .chain(tombstones.map(|(id, found)| (id, &found.group, found.state())))
            .map(|(id, group, state)| ListedDocument { id: id.clone(), group: group.clone(), state })
            .collect();
        listed.sort_by(|one, other| one.id.cmp(&other.id));
        listed.truncate(limit);
        Ok(listed)
    }

    async fn list_quarantined(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let database = self.database()?;
        let after = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let documents = database.documents.range::<DocumentId, _>(after);
        let quarantined = documents.filter(|(_, found)| found.is_quarantined()).take(limit as usize);
        let listed = |(id, found): (&DocumentId, &Document)| ListedDocument {
            id: id.clone(),
            group: found.group.clone(),
            state: found.state.clone(),
        };
        Ok(quarantined.map(listed).collect())
    }

    async fn count_quarantined(&self) -> Result<u64, StorageError> {
        Ok(self.database()?.documents.values().filter(|found| found.is_quarantined()).count() as u64)
    }

    async fn create_document(
        &self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<(), StorageError> {
        self.database()?.document_mut(document, group);
        Ok(())
    }

    async fn statistics(&self) -> Result<StorageStatistics, StorageError> {
        let database = self.database()?;
        Ok(StorageStatistics {
            documents: database.documents.len() as u64,
            changes: database.documents.values().map(|document| document.changes.len() as u64).sum(),
            disk_bytes: 0,
        })
    }

    async fn check(&self) -> Result<(), StorageError> {
        self.database().map(drop)
    }

    async fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}
