//! The documents in memory: found, loaded once, swept out again.
//!
//! A document is in memory while somebody is subscribed to it and for a short while after. Cold documents cost
//! nothing. When the budget is exceeded, idle documents go at once, those that were idle longest first.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use isobar_protocol::base::{BaseDamaged, BaseIndex, BaseSummary};
use isobar_protocol::change::{Change, ChangeError};
use isobar_protocol::chunk::{ChunkError, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested, Refusal};
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use parking_lot::Mutex;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OnceCell, mpsc};

use crate::materialise::{MaterialiseError, Materialiser};
use crate::storage::{DocumentState, Storage, StorageError, StoredBase, StoredChange, StoredDocument};
use crate::telemetry::Metrics;

mod compaction;
mod conflict;
mod contents;
mod document;
mod inspection;
mod receipts;
mod repair;
mod replication;
mod siblings;

use conflict::Conflicts;
use document::{Loaded, PendingRoom, change_numbered};
use replication::ColdCounts;

pub use contents::ContentsError;
pub use document::{Document, Incoming, IngestStep, Outgoing, Rejected, SharedKey, SubscriberKey, joined};
pub use inspection::{Damage, Inspection};
pub use repair::{MendError, Mended};
pub use replication::DeleteError;

/// The placement group of documents for which no other was asked: all regions.
pub const DEFAULT_GROUP: &str = "default";

/// A tail of more bytes is parsed on a blocking thread: it takes longer than a millisecond.
const PARSE_INLINE_BYTES: usize = 128 << 10;

/// Documents that may wait for a base; each stays in memory meanwhile.
const COMPACTIONS_WAITING_MAX: usize = 1_024;

/// Why a document cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Damaged(#[from] BaseDamaged),
    /// A base says that it exists and its chunk or index is not there.
    #[error("the stored base is incomplete")]
    BaseIncomplete,
    #[error("the stored base is damaged: {0}")]
    BaseChunk(#[from] ChunkError),
    /// A base that the CRDT made does not open any more.
    #[error("the stored base: {0}")]
    BaseRefused(#[from] MaterialiseError),
    #[error("stored change {hash} cannot be read: {error}")]
    ChangeUnreadable { hash: ChangeHash, error: ChangeError },
    #[error("stored {0}")]
    ChangeRefused(Rejected),
    /// It waited for a dependency, and broke a rule when that was there.
    #[error("stored change {hash} does not fit its dependencies")]
    ChangeDropped { hash: ChangeHash },
    #[error("{rows} stored rows of changes do not decode")]
    RowsDamaged { rows: usize },
}

/// A document's place in memory.
#[derive(Default)]
struct Place {
    document: OnceCell<Arc<Document>>,
    /// Set when a deletion has committed. A load that read storage before that finds it here.
    deleted: AtomicBool,
}

type Slot = Arc<Place>;

/// All documents in memory.
pub struct Documents {
    storage: Arc<dyn Storage>,
    metrics: Arc<Metrics>,
    materialiser: Materialiser,
    limits: Limits,
    resident_bytes_max: usize,
    idle: Duration,
    pending: PendingRoom,
    slots: Mutex<HashMap<DocumentId, Slot>>,
    default_group: PlacementGroup,
    cold: Mutex<ColdCounts>,
    conflicts: Mutex<Conflicts>,
    /// Runs that are being stored.
    applying: AtomicUsize,
    /// Each document stands here at most once.
    compactions: mpsc::Sender<Arc<Document>>,
}

/// The work of making bases, one at a time; to be run as a task.
pub struct Compactor {
    documents: Arc<Documents>,
    due: mpsc::Receiver<Arc<Document>>,
}

impl Compactor {
    pub async fn run(mut self) {
        while let Some(document) = self.due.recv().await {
            let compacted = AssertUnwindSafe(self.documents.compact(&document)).catch_unwind().await;
            if compacted.is_err() {
                // What the document holds in memory may be half changed.
                self.documents.quarantine(&document, "making a base panicked").await;
            }
        }
    }
}

impl Documents {
    pub fn new(
        storage: Arc<dyn Storage>,
        metrics: Arc<Metrics>,
        materialiser: Materialiser,
        limits: Limits,
        resident_bytes_max: usize,
        idle: Duration,
    ) -> (Arc<Self>, Compactor) {
        let (compactions, due) = mpsc::channel(COMPACTIONS_WAITING_MAX);
        let documents = Arc::new(Self {
            storage,
            metrics,
            materialiser,
            limits,
            resident_bytes_max,
            idle,
            pending: PendingRoom::new(resident_bytes_max / 2),
            slots: Mutex::new(HashMap::new()),
            default_group: PlacementGroup::new(DEFAULT_GROUP).expect("the name is short"),
            cold: Mutex::default(),
            conflicts: Mutex::default(),
            applying: AtomicUsize::new(0),
            compactions,
        });
        (documents.clone(), Compactor { documents, due })
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The document, loaded if need be. One that does not exist is there too, empty, so that it can be waited for.
    pub async fn open(&self, id: &DocumentId) -> Result<Arc<Document>, LoadError> {
        self.open_in(id, &self.default_group).await
    }

    /// As [`Self::open`]; a document that does not exist yet will be of this group.
    pub async fn open_in(&self, id: &DocumentId, group: &PlacementGroup) -> Result<Arc<Document>, LoadError> {
        let slot = self.slots.lock().entry(id.clone()).or_default().clone();
        let document = slot.document.get_or_try_init(|| self.load(id, group)).await?;
        // Only now: a deletion that commits later finds the document in its place.
        if slot.deleted.load(Ordering::SeqCst) {
            document.delete();
        }
        document.lock().last_used = Instant::now();
        Ok(document.clone())
    }

    /// The document, if it is in memory.
    pub fn resident(&self, id: &DocumentId) -> Option<Arc<Document>> {
        self.slots.lock().get(id).and_then(|slot| slot.document.get().cloned())
    }

    /// Whether the document is in memory or on its way there.
    fn has_slot(&self, id: &DocumentId) -> bool {
        self.slots.lock().contains_key(id)
    }

    /// Called when a document's deletion is durable.
    pub(crate) fn deleted(&self, id: &DocumentId) {
        let slot = self.slots.lock().get(id).cloned();
        if let Some(slot) = slot {
            slot.deleted.store(true, Ordering::SeqCst);
            if let Some(document) = slot.document.get() {
                document.delete();
            }
        }
    }

    /// The documents that exist and that somebody is subscribed to, each with its group.
    pub fn subscribed(&self) -> Vec<(DocumentId, PlacementGroup)> {
        let documents = self.residents();
        let subscribed = documents.iter().filter(|it| it.has_subscribers());
        subscribed.filter_map(|it| Some((it.id().clone(), it.settled_group()?))).collect()
    }

    fn residents(&self) -> Vec<Arc<Document>> {
        self.slots.lock().values().filter_map(|slot| slot.document.get().cloned()).collect()
    }

    /// Called when a document's commit says that its tail has grown long. Without room it is left to a later commit, or to
    /// when the document is idle: one that waits here cannot be evicted.
    pub fn request_base(&self, document: Arc<Document>) {
        // The receiver lives as long as the process serves.
        if let Err(TrySendError::Full(document)) = self.compactions.try_send(document) {
            document.lock().compacting = false;
        }
    }

    async fn load(&self, id: &DocumentId, group: &PlacementGroup) -> Result<Arc<Document>, LoadError> {
        let made = |loaded: Loaded| Ok(Arc::new(Document::new(id.clone(), loaded, self.pending.clone())));
        let Some(stored) = self.storage.load_document(id).await? else {
            return made(Loaded::empty(group.clone()));
        };
        self.metrics.documents_loaded.increment(1);
        let generation = stored.base.as_ref().map_or(0, |base| base.generation);
        let found = Loaded { generation, exists: true, ..Loaded::empty(stored.group.clone()) };
        match stored.state {
            DocumentState::Deleted { .. } => return made(Loaded { deleted: true, ..found }),
            DocumentState::Quarantined { .. } => return made(Loaded { quarantined: true, ..found }),
            DocumentState::Live => {}
        }
        match self.load_graph(id, stored).await {
            Ok((graph, waiting)) => made(Loaded { graph, waiting, ..found }),
            Err(LoadError::Storage(error)) => Err(LoadError::Storage(error)),
            Err(error) => {
                // Only in memory: whoever mends what is stored need not undo a mark as well.
                tracing::error!(document = %id, %error, "stored document is damaged, quarantined");
                self.metrics.quarantines.increment(1);
                made(Loaded { quarantined: true, ..found })
            }
        }
    }

    /// The graph of what is stored, and which of its changes lack a dependency.
    async fn load_graph(
        &self,
        id: &DocumentId,
        stored: StoredDocument,
    ) -> Result<(Graph, Vec<ChangeHash>), LoadError> {
        let StoredDocument { base, mut tail, damaged_rows, .. } = stored;
        if !damaged_rows.is_empty() {
            return Err(LoadError::RowsDamaged { rows: damaged_rows.len() });
        }
        let mut index = None;
        if let Some(base) = base.as_ref().filter(|base| !base.pruned) {
            index = Some(self.index_for_load(id, base, &mut tail).await?);
        }
        loop {
            let built = build(base.as_ref(), index.clone(), &tail).await?;
            if let Some(mut graph) = built {
                graph.detach_index();
                let waiting =
                    tail.iter().map(|change| change.hash).filter(|it| graph.is_pending(it)).collect();
                return Ok((graph, waiting));
            }
            let base = base.as_ref().ok_or(LoadError::BaseIncomplete)?;
            index = Some(self.index_for_load(id, base, &mut tail).await?);
        }
    }

    async fn index_for_load(
        &self,
        id: &DocumentId,
        base: &StoredBase,
        tail: &mut Vec<StoredChange>,
    ) -> Result<Arc<BaseIndex>, LoadError> {
        let (generation, mut index) = self.read_index(id).await?;
        if generation > base.generation {
            // A sibling has made another base since the document was read.
            let count = BaseSummary::decode(&base.summary)?.change_count as usize;
            if index.len() < count {
                return Err(LoadError::BaseIncomplete);
            }
            index = index.prefix(count);
        }
        check_index(base, &index)?;
        self.resume_prune(id, base, &index, tail).await;
        Ok(Arc::new(index))
    }

    /// Takes covered changes out of a tail that was not pruned to the end, or got some again from another region, and
    /// prunes on.
    async fn resume_prune(
        &self,
        id: &DocumentId,
        base: &StoredBase,
        index: &BaseIndex,
        tail: &mut Vec<StoredChange>,
    ) {
        let covered: Vec<ChangeHash> = tail
            .extract_if(.., |change| index.position_of(&change.hash).is_some())
            .map(|it| it.hash)
            .collect();
        if !base.pruned || !covered.is_empty() {
            self.prune_logged(id, base.generation, &covered).await;
        }
    }

    /// The base's index and the generation it belongs to.
    pub async fn read_index(&self, id: &DocumentId) -> Result<(u64, BaseIndex), LoadError> {
        self.metrics.index_loads.increment(1);
        let (generation, bytes) = self.storage.read_base_index(id).await?.ok_or(LoadError::BaseIncomplete)?;
        let index = tokio::task::spawn_blocking(move || BaseIndex::decode(&bytes)).await;
        Ok((generation, index.map_err(|_| LoadError::BaseIncomplete)??))
    }

    /// The base's chunk; at least as new as the generation the document was at when asked.
    pub async fn base_chunk(&self, document: &Document) -> Result<Bytes, LoadError> {
        Ok(self.base_chunk_and_generation(document).await?.1)
    }

    async fn base_chunk_and_generation(&self, document: &Document) -> Result<(u64, Bytes), LoadError> {
        if let Some(cached) = document.cached_base_chunk() {
            return Ok(cached);
        }
        let read = self.storage.read_base_chunk(document.id()).await?;
        let (generation, chunk) = read.ok_or(LoadError::BaseIncomplete)?;
        let checked = chunk.clone();
        let check = move || {
            chunks(checked).next().ok_or(LoadError::BaseIncomplete)??.check().map_err(LoadError::from)
        };
        match chunk.len() > PARSE_INLINE_BYTES {
            false => check(),
            true => tokio::task::spawn_blocking(check).await.map_err(|_| LoadError::BaseIncomplete)?,
        }?;
        document.cache_base_chunk(generation, &chunk);
        Ok((generation, chunk))
    }

    /// Takes a document out of service because what is stored of it is damaged. Only in memory, so that whoever mends it
    /// need not undo a mark as well.
    pub fn withhold(&self, document: &Document, error: &LoadError) {
        tracing::error!(document = %document.id(), %error, "stored document is damaged, quarantined");
        self.metrics.quarantines.increment(1);
        document.lock().quarantine();
    }

    pub fn materialiser(&self) -> &Materialiser {
        &self.materialiser
    }

    /// Drops what nobody needs, and reports what is left. To be called every few seconds.
    pub fn sweep(&self) {
        let now = Instant::now();
        let documents = self.residents();
        let mut resident_bytes = 0;
        let mut pending = 0;
        let mut idle = Vec::new();
        for document in documents {
            if document.tidy(now, self.idle) {
                self.request_base(document.clone());
            }
            let residency = document.residency();
            resident_bytes += residency.bytes;
            pending += residency.pending;
            if let Some(since) = residency.idle_since {
                idle.push((since, residency.bytes, document.id().clone()));
            }
        }
        idle.sort_unstable_by_key(|(since, ..)| *since);
        for (since, bytes, id) in idle {
            let expired = now.duration_since(since) >= self.idle;
            if (expired || resident_bytes > self.resident_bytes_max) && self.evict(&id) {
                resident_bytes -= bytes;
            }
        }
        // Left behind by loads that failed, with nobody waiting for another attempt.
        self.slots.lock().retain(|_, slot| slot.document.initialized() || Arc::strong_count(slot) > 1);
        let waiting = self.compactions.max_capacity() - self.compactions.capacity();
        self.metrics.compactions_waiting.set(waiting as f64);
        self.metrics.pending_changes.set(pending as f64);
        self.metrics.resident_bytes.set(resident_bytes as f64);
        self.metrics.documents_resident.set(self.slots.lock().len() as f64);
    }

    /// Drops a document unless somebody holds it.
    fn evict(&self, id: &DocumentId) -> bool {
        let mut slots = self.slots.lock();
        // Under this lock nobody can get hold of it anew: the slot and the document have one owner each, or stay.
        let unused = slots.get_mut(id).is_some_and(|slot| {
            let document = Arc::get_mut(slot).and_then(|place| place.document.get_mut());
            document.is_some_and(|it| Arc::get_mut(it).is_some())
        });
        if unused {
            slots.remove(id);
            self.metrics.documents_evicted.increment(1);
        }
        unused
    }
}

/// Whether an index is as long as its base says.
fn check_index(base: &StoredBase, index: &BaseIndex) -> Result<(), LoadError> {
    match BaseSummary::decode(&base.summary)?.change_count == index.len() as u64 {
        true => Ok(()),
        false => Err(LoadError::BaseIncomplete),
    }
}

/// Builds a graph from what is stored. `None`: a change of the tail refers to the inside of the base, and the index is
/// needed.
async fn build(
    base: Option<&StoredBase>,
    index: Option<Arc<BaseIndex>>,
    tail: &[StoredChange],
) -> Result<Option<Graph>, LoadError> {
    let summary = base.map(|base| BaseSummary::decode(&base.summary)).transpose()?;
    let bytes: usize = tail.iter().map(|change| change.bytes.len()).sum();
    if bytes <= PARSE_INLINE_BYTES {
        return build_now(summary, index, tail);
    }
    let tail = tail.to_vec();
    let built = tokio::task::spawn_blocking(move || build_now(summary, index, &tail)).await;
    built.expect("building a graph does not panic")
}

fn build_now(
    summary: Option<BaseSummary>,
    index: Option<Arc<BaseIndex>>,
    tail: &[StoredChange],
) -> Result<Option<Graph>, LoadError> {
    let limits = Limits::stored();
    let mut graph = summary.map_or_else(Graph::new, Graph::from_base);
    if let Some(index) = index {
        graph.attach_index(index);
    }
    for StoredChange { hash, bytes } in tail {
        let change = Change::decode(bytes.clone(), &limits)
            .map_err(|error| LoadError::ChangeUnreadable { hash: *hash, error })?;
        let (actor, seq) = (change.actor.clone(), change.seq);
        match graph.ingest(change, &limits) {
            Ok(Ingested::NeedsIndex) => return Ok(None),
            Ok(_) => {}
            Err(refusal) => {
                let reused = matches!(refusal, Refusal::SeqReused { .. });
                let other = if reused { change_numbered(&graph, &actor, seq) } else { None };
                return Err(LoadError::ChangeRefused(Rejected { hash: *hash, refusal, other }));
            }
        }
    }
    let has = |hash: &ChangeHash| graph.position(hash).is_some() || graph.is_pending(hash);
    if let Some(StoredChange { hash, .. }) = tail.iter().find(|change| !has(&change.hash)) {
        return Err(LoadError::ChangeDropped { hash: *hash });
    }
    let end = graph.staged_end();
    graph.advance_durable(end);
    Ok(Some(graph))
}
