//! The only way into the log: many documents' changes, one transaction at a time.
//!
//! Whoever has staged changes in a document's graph submits them here. While one batch commits, the next gathers:
//! under load batches grow, and an idle server commits a single change at once. Batches are committed in the order of
//! submission, so a document's changes become durable in the order of their positions.
//!
//! A batch is all or nothing. A passing failure is retried, the same batch, until it succeeds; clients see a slow
//! acknowledgement. A fatal failure ends the process: nothing that is not stored was ever acknowledged, and clients
//! still have what they sent.
//!
//! # Bounds
//!
//! A submission holds [`Permit`]s for its bytes, of this committer and of the session it came from. When either is
//! used up, the session stops reading from its socket: a flood waits at its own door first.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, Seq};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::documents::{Document, Documents};
use crate::storage::{ClaimedOrigin, DocumentAppend, Storage, StorageError, StoredChange};
use crate::telemetry::Metrics;

/// Changes in one batch at most: a transaction of this size takes some 50 ms, which is what a single keystroke may
/// have to wait behind it.
const BATCH_CHANGES_MAX: usize = 4_096;

/// Bytes in one batch at most, for the same reason. A single larger submission is a batch of its own.
const BATCH_BYTES_MAX: usize = 8 << 20;

/// Bytes that may wait for their commit, over all sessions.
const QUEUED_BYTES_MAX: usize = 64 << 20;

/// What a change occupies in the queue beside its bytes.
const CHANGE_OVERHEAD_BYTES: usize = 128;

const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LAST: Duration = Duration::from_secs(2);

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

/// Staged changes of one document, up to the position `end`.
pub struct Submission {
    pub document: Arc<Document>,
    pub changes: Vec<StoredChange>,
    pub end: u64,
    /// Room in the queues for the message that this is a part of, given back when all of its parts are durable.
    pub permits: Arc<[Permit; 2]>,
}

/// A handle for submitting. Cheap to clone; when the last is dropped, the committer finishes and stops.
#[derive(Clone)]
pub struct Committer {
    queue: mpsc::UnboundedSender<Submission>,
    budget: ByteBudget,
    durable_seq: Arc<AtomicU64>,
}

impl Committer {
    /// A committer that writes under `origin`, and the task that does the work. The task ends with an error that is
    /// fatal to the process, or without one when every handle is gone and everything submitted is durable.
    pub fn new(
        storage: Arc<dyn Storage>,
        origin: ClaimedOrigin,
        documents: Arc<Documents>,
        metrics: Arc<Metrics>,
    ) -> (Self, impl Future<Output = Result<(), StorageError>> + Send) {
        // Bounded by the budget: each submission holds permits for its bytes.
        let (queue, submissions) = mpsc::unbounded_channel();
        let budget = ByteBudget::new(QUEUED_BYTES_MAX);
        let next_seq = Seq(origin.last_seq.0 + 1);
        let durable_seq = Arc::new(AtomicU64::new(origin.last_seq.0));
        let worker = Worker {
            next_seq,
            durable_seq: durable_seq.clone(),
            storage,
            origin,
            submissions,
            documents,
            metrics,
        };
        (Self { queue, budget, durable_seq }, worker.run())
    }

    /// Waits for room for a submission of so many bytes.
    pub async fn reserve(&self, session: &ByteBudget, bytes: usize) -> [Permit; 2] {
        let bytes = bytes + CHANGE_OVERHEAD_BYTES;
        // The session's own budget first: whoever has used it up does not hold any of the common one.
        let own = session.acquire(bytes).await;
        [own, self.budget.acquire(bytes).await]
    }

    /// Queues staged changes. Call it under the lock under which they were staged, so that a document's submissions
    /// stand in the order of its positions.
    pub fn submit(&self, submission: Submission) {
        if self.queue.send(submission).is_err() {
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

    /// The last seq that has been committed.
    pub fn durable_seq(&self) -> Seq {
        Seq(self.durable_seq.load(Ordering::Acquire))
    }

    pub fn queued_bytes(&self) -> usize {
        self.budget.used_bytes()
    }
}

struct Worker {
    storage: Arc<dyn Storage>,
    origin: ClaimedOrigin,
    next_seq: Seq,
    durable_seq: Arc<AtomicU64>,
    submissions: mpsc::UnboundedReceiver<Submission>,
    documents: Arc<Documents>,
    metrics: Arc<Metrics>,
}

impl Worker {
    async fn run(mut self) -> Result<(), StorageError> {
        let mut waiting = None;
        loop {
            let first = match waiting.take() {
                Some(submission) => submission,
                None => match self.submissions.recv().await {
                    Some(submission) => submission,
                    None => return Ok(()),
                },
            };
            let batch = self.gather(first, &mut waiting);
            self.commit(batch).await?;
        }
    }

    /// Takes what has been submitted meanwhile, as far as it fits. What does not fit is the next batch's first.
    fn gather(&mut self, first: Submission, waiting: &mut Option<Submission>) -> Vec<Submission> {
        let mut changes = first.changes.len();
        let mut bytes = submission_bytes(&first);
        let mut batch = vec![first];
        while let Ok(submission) = self.submissions.try_recv() {
            changes += submission.changes.len();
            bytes += submission_bytes(&submission);
            if changes > BATCH_CHANGES_MAX || bytes > BATCH_BYTES_MAX {
                *waiting = Some(submission);
                break;
            }
            batch.push(submission);
        }
        batch
    }

    async fn commit(&mut self, mut batch: Vec<Submission>) -> Result<(), StorageError> {
        let appends = by_document(&mut batch);
        let changes: usize = appends.iter().map(|append| append.changes.len()).sum();
        let started = std::time::Instant::now();
        let last_seq = self.append(&appends).await?;
        assert_eq!(last_seq.0, self.next_seq.0 + changes as u64 - 1, "the log is dense");
        self.next_seq = Seq(last_seq.0 + 1);
        self.durable_seq.store(last_seq.0, Ordering::Release);
        self.metrics.committed(changes, started.elapsed());
        for submission in batch {
            if submission.document.committed(submission.end) {
                self.documents.request_base(submission.document);
            }
        }
        Ok(())
    }

    async fn append(&self, appends: &[DocumentAppend]) -> Result<Seq, StorageError> {
        let mut pause = RETRY_FIRST;
        let mut failed = false;
        loop {
            match self.storage.append(&self.origin, self.next_seq, appends).await {
                Err(StorageError::Transient(error)) => {
                    if !failed {
                        tracing::warn!(%error, "storage unavailable, commits wait");
                    }
                    failed = true;
                    self.metrics.commit_retries.increment(1);
                }
                result => {
                    if failed && result.is_ok() {
                        tracing::info!("storage available again");
                    }
                    return result;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    }
}

fn submission_bytes(submission: &Submission) -> usize {
    submission.changes.iter().map(|change| change.bytes.len()).sum()
}

/// Takes the changes out of the submissions and puts those of one document together, in order.
fn by_document(batch: &mut [Submission]) -> Vec<DocumentAppend> {
    let mut appends: Vec<DocumentAppend> = Vec::with_capacity(batch.len());
    let mut places: HashMap<DocumentId, usize> = HashMap::with_capacity(batch.len());
    for submission in batch {
        let changes = std::mem::take(&mut submission.changes);
        let document = submission.document.id();
        match places.get(document) {
            Some(place) => appends[*place].changes.extend(changes),
            None => {
                places.insert(document.clone(), appends.len());
                appends.push(DocumentAppend { document: document.clone(), changes });
            }
        }
    }
    appends
}
