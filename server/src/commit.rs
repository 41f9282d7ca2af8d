//! The only way into the log: many documents' changes, one transaction at a time.
//!
//! Whoever has staged changes in a document's graph submits them here; runs that came from other regions, and deletions,
//! stand in the same queue. While one batch commits, the next gathers: under load batches grow, and an idle server
//! commits a single change at once. Batches are committed in the order of submission, so a document's changes become
//! durable in the order of their positions, and whatever was submitted before a run is durable no later than the run.
//!
//! A batch is all or nothing. A passing failure is retried, the same batch, until it succeeds; clients see a slow
//! acknowledgement. A fatal failure ends the process: nothing that is not stored was ever acknowledged, and clients
//! still have what they sent. A received run that another node of the region stored first is taken out of its batch,
//! and the rest is committed.
//!
//! Changes of this node's clients are logged under the node's own origin for the document's placement group. Changes that
//! another origin's log already names are stored without being logged again, under keys that no other append uses: an origin
//! made up for this process, and a counter. Their own (origin, seq) would not do: when a run is applied a second time, after a
//! crash or by a sibling node, other parts of it may be known already, and the same key would stand for other contents.
//!
//! # Bounds
//!
//! A submission holds [`Permit`]s for its bytes, of this committer and of the session it came from. When either is
//! used up, the session stops reading from its socket: a flood waits at its own door first. A received run holds one
//! of this committer.

use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::log::Chain;
use isobar_protocol::replica::Stored;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::documents::{Document, Documents};
use crate::recent_log::RecentLog;
use crate::storage::{ClaimedOrigin, Deletion, RunAppend, Storage, StorageError, StoredChange};
use crate::telemetry::Metrics;

mod batch;
mod worker;
mod written;

use worker::Worker;

pub use written::Written;

/// Bytes that may wait for their commit, over all sessions and links.
const QUEUED_BYTES_MAX: usize = 64 << 20;

/// What a change occupies in the queue beside its bytes.
const CHANGE_OVERHEAD_BYTES: usize = 128;

/// Room in a queue of bytes. Dropped when the changes are durable.
pub type Permit = OwnedSemaphorePermit;

/// A bounded number of bytes that may be under way to the log.
#[derive(Clone)]
pub struct ByteBudget {
    semaphore: Arc<Semaphore>,
    bytes_max: usize,
}

impl ByteBudget {
    pub fn new(bytes_max: usize) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(bytes_max)), bytes_max }
    }

    /// Waits for room for so many bytes; more than the whole budget waits for all of it.
    pub async fn acquire(&self, bytes: usize) -> Permit {
        let bytes = bytes.clamp(1, self.bytes_max) as u32;
        let permit = self.semaphore.clone().acquire_many_owned(bytes).await;
        permit.expect("the semaphore is never closed")
    }

    pub fn used_bytes(&self) -> usize {
        self.bytes_max - self.semaphore.available_permits()
    }
}

/// Who logs a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logged {
    /// It is this node's to log.
    Own,
    /// Another origin's log names it; it is only to be stored.
    Elsewhere,
    /// It is stored already; only its position is to become durable, in its turn.
    Stored,
}

/// A change with a position in its document's graph.
#[derive(Debug, Clone)]
pub struct Staged {
    pub change: StoredChange,
    pub logged: Logged,
}

/// Staged changes of one document, up to the position `end`.
pub struct Submission {
    pub document: Arc<Document>,
    /// Where the document lives.
    pub group: PlacementGroup,
    pub changes: Vec<Staged>,
    pub end: u64,
    /// Room in the queues for the message that this is a part of, given back when all of its parts are durable.
    pub permits: Arc<[Permit]>,
}

/// Changes of a document that no graph in memory has a position for.
#[derive(Debug, Clone)]
pub struct Cold {
    pub document: DocumentId,
    pub group: PlacementGroup,
    /// Never empty.
    pub changes: Vec<StoredChange>,
}

/// What came from another region, as far as it is not staged in a graph.
pub struct Received {
    /// The run of log entries it came with; none if it came as a document's contents.
    pub run: Option<RunAppend>,
    pub cold: Vec<Cold>,
    pub deletions: Vec<Deletion>,
    pub permits: Arc<[Permit]>,
    pub done: oneshot::Sender<Stored>,
}

/// A deletion that is to be logged by this node.
struct LocalDeletion {
    deletion: Deletion,
    done: oneshot::Sender<()>,
}

/// What stands in the queue.
enum Item {
    Changes(Submission),
    Received(Received),
    Deletion(LocalDeletion),
}

/// How far one of this node's own origins is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnProgress {
    pub origin: OriginId,
    pub group: PlacementGroup,
    pub seq: Seq,
    pub chain: Chain,
    /// Bytes of what was appended to it since this node started.
    pub bytes: u64,
}

/// The committer has failed and the process is ending; what was submitted may or may not be stored.
#[derive(Debug, thiserror::Error)]
#[error("the committer has stopped")]
pub struct Stopped;

/// A handle for submitting. Cheap to clone; when the last is dropped, the committer finishes and stops.
#[derive(Clone)]
pub struct Committer {
    queue: mpsc::UnboundedSender<Item>,
    budget: ByteBudget,
    progress: watch::Receiver<Vec<OwnProgress>>,
    recent: Arc<RecentLog>,
    written: Arc<Written>,
}

impl Committer {
    /// A committer that writes under `origins`, one for each placement group, and the task that does the work. The task
    /// ends with an error that is fatal to the process, or without one when every handle is gone and everything submitted is
    /// durable.
    pub fn new(
        storage: Arc<dyn Storage>,
        origins: Vec<ClaimedOrigin>,
        documents: Arc<Documents>,
        metrics: Arc<Metrics>,
    ) -> (Self, impl Future<Output = Result<(), StorageError>> + Send) {
        // Bounded by the budget: each submission and each received run holds permits for its bytes, deletions excepted,
        // which are operators' and wait for their answers.
        let (queue, items) = mpsc::unbounded_channel();
        let budget = ByteBudget::new(QUEUED_BYTES_MAX);
        let recent = Arc::new(RecentLog::default());
        let written = Arc::new(Written::default());
        let (worker, progress) =
            Worker::new(storage, origins, items, documents, (recent.clone(), written.clone()), metrics);
        (Self { queue, budget, progress, recent, written }, worker.run())
    }

    /// Waits for room for a submission of so many bytes.
    pub async fn reserve(&self, session: &ByteBudget, bytes: usize) -> Arc<[Permit]> {
        let bytes = bytes + CHANGE_OVERHEAD_BYTES;
        // The session's own budget first: whoever has used it up does not hold any of the common one.
        let own = session.acquire(bytes).await;
        Arc::new([own, self.budget.acquire(bytes).await])
    }

    /// Waits for room for what came from another region.
    pub async fn reserve_received(&self, bytes: usize) -> Arc<[Permit]> {
        Arc::new([self.budget.acquire(bytes + CHANGE_OVERHEAD_BYTES).await])
    }

    /// Queues staged changes. Call it under the lock under which they were staged, so that a document's submissions
    /// stand in the order of its positions.
    pub fn submit(&self, submission: Submission) {
        self.send(Item::Changes(submission));
    }

    /// Queues what came from another region. Runs of one origin are to be queued in the order of their seqs.
    pub fn receive(&self, received: Received) {
        self.send(Item::Received(received));
    }

    /// Logs a deletion, and returns when it is durable.
    pub async fn delete(&self, deletion: Deletion) -> Result<(), Stopped> {
        let (done, deleted) = oneshot::channel();
        self.send(Item::Deletion(LocalDeletion { deletion, done }));
        deleted.await.map_err(|_| Stopped)
    }

    fn send(&self, item: Item) {
        if self.queue.send(item).is_err() {
            // The committer has failed and the process is ending; nobody will be told that this is durable.
            tracing::debug!("submission after the committer stopped");
        }
    }

    /// Waits until everything submitted is durable, or the patience ends.
    pub async fn settled(&self, patience: Duration) {
        if tokio::time::timeout(patience, self.budget.acquire(QUEUED_BYTES_MAX)).await.is_err() {
            tracing::warn!("changes were left uncommitted; their clients were not told otherwise");
        }
    }

    /// How far this node's own origins are durable, now and whenever it changes.
    pub fn progress(&self) -> watch::Receiver<Vec<OwnProgress>> {
        self.progress.clone()
    }

    /// The newest runs of every origin that were stored by this node.
    pub fn recent_log(&self) -> &Arc<RecentLog> {
        &self.recent
    }

    /// Which parts of other origins' logs were stored by this node.
    pub fn written(&self) -> &Arc<Written> {
        &self.written
    }

    pub fn queued_bytes(&self) -> usize {
        self.budget.used_bytes()
    }
}
