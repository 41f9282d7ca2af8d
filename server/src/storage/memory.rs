//! Storage in memory, for tests and the simulator: the same contract, gone with the last handle.
//!
//! It keeps the log in the same packed runs as the databases, so that truncation and repeated appends behave
//! alike. Nothing here fails or waits.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};
use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::log_run::{FoundCounter, LogRun, gather, judge_refused};
use super::{
    ClaimedOrigin, DocumentAppend, DocumentState, LogEntry, NewBase, Storage, StorageError,
    StorageStatistics, StoredBase, StoredChange, StoredDocument, new_storage_id,
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
    origins: Vec<Origin>,
    documents: HashMap<DocumentId, Document>,
}

#[derive(Debug)]
struct Origin {
    id: OriginId,
    key: (RegionName, PlacementGroup, u32),
    incarnation: Incarnation,
    seq: Seq,
    /// By the run's last seq.
    log: BTreeMap<Seq, LogRun>,
}

#[derive(Debug)]
struct Document {
    group: PlacementGroup,
    state: DocumentState,
    base: Option<Base>,
    changes: HashMap<ChangeHash, Bytes>,
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

impl Database {
    fn check_region(&self, region: &RegionName) -> Result<(), StorageError> {
        match &self.region {
            Some((found, _)) if found != region => {
                Err(StorageError::OtherRegion { expected: region.clone(), found: found.clone() })
            }
            _ => Ok(()),
        }
    }

    fn origin_mut(&mut self, id: OriginId) -> Result<&mut Origin, StorageError> {
        let found = self.origins.iter_mut().find(|origin| origin.id == id);
        found.ok_or_else(|| StorageError::Fatal(format!("origin {id:?} is not in the database").into()))
    }

    fn store(&mut self, group: &PlacementGroup, append: &DocumentAppend) {
        let document = self.documents.entry(append.document.clone()).or_insert_with(|| Document {
            group: group.clone(),
            state: DocumentState::Live,
            base: None,
            changes: HashMap::new(),
        });
        for change in &append.changes {
            document.changes.entry(change.hash).or_insert_with(|| change.bytes.clone());
        }
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
    ) -> Result<ClaimedOrigin, StorageError> {
        let mut database = self.database()?;
        database.check_region(region)?;
        let key = (region.clone(), group.clone(), slot);
        let place = database.origins.iter().position(|origin| origin.key == key).unwrap_or_else(|| {
            database.origins.push(Origin {
                id: OriginId(Uuid::new_v4()),
                key,
                incarnation: Incarnation(0),
                seq: Seq(0),
                log: BTreeMap::new(),
            });
            database.origins.len() - 1
        });
        let origin = &mut database.origins[place];
        origin.incarnation.0 += 1;
        Ok(ClaimedOrigin {
            id: origin.id,
            group: group.clone(),
            incarnation: origin.incarnation,
            last_seq: origin.seq,
        })
    }

    async fn append(
        &self,
        origin: &ClaimedOrigin,
        first_seq: Seq,
        batch: &[DocumentAppend],
    ) -> Result<Seq, StorageError> {
        let mut database = self.database()?;
        let Some(run) = LogRun::pack(first_seq, batch) else {
            return Ok(Seq(first_seq.0 - 1));
        };
        let row = database.origin_mut(origin.id)?;
        if row.incarnation != origin.incarnation || row.seq.0 + 1 != first_seq.0 {
            let run_at_end = row.log.get(&run.last).cloned();
            let found = FoundCounter { incarnation: row.incarnation, seq: row.seq, run_at_end };
            return judge_refused(origin, &run, found);
        }
        let last = run.last;
        row.seq = last;
        row.log.insert(last, run);
        batch.iter().for_each(|append| database.store(&origin.group, append));
        Ok(last)
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let database = self.database()?;
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

    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError> {
        let mut database = self.database()?;
        let base = database.documents.get_mut(document).and_then(|row| row.base.as_mut());
        if let Some(base) = base.filter(|base| base.generation == generation) {
            base.pruned = true;
        }
        Ok(())
    }

    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError> {
        if let Some(row) = self.database()?.documents.get_mut(document) {
            row.state = state.clone();
        }
        Ok(())
    }

    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        limit: u32,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let database = self.database()?;
        let Some(row) = database.origins.iter().find(|row| row.id == origin) else {
            return Ok(Vec::new());
        };
        let runs = row.log.range(Seq(after.0.saturating_add(1))..).map(|(_, run)| run.clone());
        // Each run holds at least one entry, so `limit` runs are always enough.
        let runs: Vec<LogRun> = runs.take(limit as usize).collect();
        gather(&runs, after, limit as usize)
    }

    async fn truncate_log(&self, origin: OriginId, up_to: Seq) -> Result<(), StorageError> {
        let mut database = self.database()?;
        if let Some(row) = database.origins.iter_mut().find(|row| row.id == origin) {
            let newest = row.seq;
            row.log.retain(|&last, _| last > up_to || last == newest);
        }
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
