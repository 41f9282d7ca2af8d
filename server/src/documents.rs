//! The documents in memory: found, loaded once, swept out again.
//!
//! A document is in memory while somebody is subscribed to it and for a short while after. Cold documents cost
//! nothing. When the budget is exceeded, idle documents go at once, those that were idle longest first.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use isobar_protocol::base::{BaseDamaged, BaseIndex, BaseSummary};
use isobar_protocol::change::{Change, ChangeError};
use isobar_protocol::chunk::{ChunkError, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested, Refusal};
use isobar_protocol::ids::{ChangeHash, DocumentId};
use parking_lot::Mutex;
use tokio::sync::{OnceCell, mpsc};

use crate::materialise::{MaterialiseError, Materialiser};
use crate::storage::{DocumentState, Storage, StorageError, StoredBase, StoredChange, StoredDocument};
use crate::telemetry::Metrics;

mod compaction;
mod document;

use document::PendingRoom;

pub use document::{Document, Incoming, IngestStep, Outgoing, SharedKey, SubscriberKey, joined};

/// A tail of more bytes is parsed on a blocking thread: it takes longer than a millisecond.
const PARSE_INLINE_BYTES: usize = 128 << 10;

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
    #[error("stored change {hash} does not fit the others: {refusal}")]
    ChangeRefused { hash: ChangeHash, refusal: Refusal },
}

type Slot = Arc<OnceCell<Arc<Document>>>;

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
    /// Each document stands here at most once.
    compactions: mpsc::UnboundedSender<Arc<Document>>,
}

/// The work of making bases, one at a time; to be run as a task.
pub struct Compactor {
    documents: Arc<Documents>,
    due: mpsc::UnboundedReceiver<Arc<Document>>,
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
        let (compactions, due) = mpsc::unbounded_channel();
        let documents = Arc::new(Self {
            storage,
            metrics,
            materialiser,
            limits,
            resident_bytes_max,
            idle,
            pending: PendingRoom::new(resident_bytes_max / 2),
            slots: Mutex::new(HashMap::new()),
            compactions,
        });
        (documents.clone(), Compactor { documents, due })
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The document, loaded if need be. One that does not exist is there too, empty, so that it can be waited for.
    pub async fn open(&self, id: &DocumentId) -> Result<Arc<Document>, LoadError> {
        let slot = self.slots.lock().entry(id.clone()).or_default().clone();
        let document = slot.get_or_try_init(|| self.load(id)).await?;
        document.lock().last_used = Instant::now();
        Ok(document.clone())
    }

    /// The document, if it is in memory.
    pub fn resident(&self, id: &DocumentId) -> Option<Arc<Document>> {
        self.slots.lock().get(id).and_then(|slot| slot.get().cloned())
    }

    /// Called when a document's commit says that its tail has grown long.
    pub fn request_base(&self, document: Arc<Document>) {
        // The receiver lives as long as the process serves.
        let _ = self.compactions.send(document);
    }

    async fn load(&self, id: &DocumentId) -> Result<Arc<Document>, LoadError> {
        let pending = self.pending.clone();
        let Some(stored) = self.storage.load_document(id).await? else {
            return Ok(Arc::new(Document::new(id.clone(), Graph::new(), 0, false, pending)));
        };
        self.metrics.documents_loaded.increment(1);
        let quarantined = matches!(stored.state, DocumentState::Quarantined { .. });
        let generation = stored.base.as_ref().map_or(0, |base| base.generation);
        if quarantined {
            return Ok(Arc::new(Document::new(id.clone(), Graph::new(), generation, true, pending)));
        }
        match self.load_graph(id, stored).await {
            Ok(graph) => Ok(Arc::new(Document::new(id.clone(), graph, generation, false, pending))),
            Err(LoadError::Storage(error)) => Err(LoadError::Storage(error)),
            Err(error) => {
                // Only in memory: whoever mends what is stored need not undo a mark as well.
                tracing::error!(document = %id, %error, "stored document is damaged, quarantined");
                self.metrics.quarantines.increment(1);
                Ok(Arc::new(Document::new(id.clone(), Graph::new(), generation, true, pending)))
            }
        }
    }

    async fn load_graph(&self, id: &DocumentId, stored: StoredDocument) -> Result<Graph, LoadError> {
        let StoredDocument { base, mut tail, .. } = stored;
        let mut index = None;
        if let Some(base) = base.as_ref().filter(|base| !base.pruned) {
            let (_, loaded) = self.read_index(id).await?;
            check_index(base, &loaded)?;
            self.resume_prune(id, base, &loaded, &mut tail).await;
            index = Some(Arc::new(loaded));
        }
        loop {
            let built = build(base.as_ref(), index.clone(), &tail).await?;
            if let Some(mut graph) = built {
                graph.detach_index();
                return Ok(graph);
            }
            let (_, loaded) = self.read_index(id).await?;
            if let Some(base) = &base {
                check_index(base, &loaded)?;
            }
            index = Some(Arc::new(loaded));
        }
    }

    /// Takes covered changes out of a tail that was not pruned to the end, and prunes on.
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
        self.prune_logged(id, base.generation, &covered).await;
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
        if let Some((_, chunk)) = document.cached_base_chunk() {
            return Ok(chunk);
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
        Ok(chunk)
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
        let documents: Vec<Arc<Document>> =
            self.slots.lock().values().filter_map(|slot| slot.get().cloned()).collect();
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
        self.slots.lock().retain(|_, slot| slot.initialized() || Arc::strong_count(slot) > 1);
        self.metrics.pending_changes.set(pending as f64);
        self.metrics.resident_bytes.set(resident_bytes as f64);
        self.metrics.documents_resident.set(self.slots.lock().len() as f64);
    }

    /// Drops a document unless somebody holds it.
    fn evict(&self, id: &DocumentId) -> bool {
        let mut slots = self.slots.lock();
        // Under this lock nobody can get hold of it anew: the slot and the document have one owner each, or stay.
        let unused = slots.get_mut(id).is_some_and(|slot| {
            Arc::get_mut(slot).and_then(OnceCell::get_mut).is_some_and(|it| Arc::get_mut(it).is_some())
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
    let limits = stored_limits();
    let mut graph = summary.map_or_else(Graph::new, Graph::from_base);
    if let Some(index) = index {
        graph.attach_index(index);
    }
    for StoredChange { hash, bytes } in tail {
        let change = Change::decode(bytes.clone(), &limits)
            .map_err(|error| LoadError::ChangeUnreadable { hash: *hash, error })?;
        match graph.ingest(change, &limits) {
            Ok(Ingested::NeedsIndex) => return Ok(None),
            Ok(_) => {}
            Err(refusal) => return Err(LoadError::ChangeRefused { hash: *hash, refusal }),
        }
    }
    let end = graph.staged_end();
    graph.advance_durable(end);
    Ok(Some(graph))
}

/// What was accepted once is read back whatever the limits are today.
fn stored_limits() -> Limits {
    Limits {
        change_bytes_max: usize::MAX,
        change_ops_max: u64::MAX,
        pending_changes_max: usize::MAX,
        pending_bytes_max: usize::MAX,
        ancestry_steps_max: u64::MAX,
        ..Limits::default()
    }
}
