//! The task behind the queue: gathers a batch, commits it, tells everybody.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isobar_protocol::ids::{OriginId, Seq};
use isobar_protocol::replica::Stored;
use tokio::sync::{mpsc, watch};

use super::batch::{Assembly, OwnLog, UnloggedKeys};
use super::{Item, Logged, OwnProgress, Received, Submission, Written};
use crate::documents::Documents;
use crate::recent_log::RecentLog;
use crate::storage::{Batch, ClaimedOrigin, Storage, StorageError, StoredRun};
use crate::telemetry::Metrics;

/// Changes in one batch at most: a transaction of this size takes some 50 ms, which is what a single keystroke may
/// have to wait behind it.
const BATCH_CHANGES_MAX: usize = 4_096;

/// Bytes in one batch at most, for the same reason. A single larger submission is a batch of its own.
const BATCH_BYTES_MAX: usize = 8 << 20;

const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LAST: Duration = Duration::from_secs(2);

pub(super) struct Worker {
    storage: Arc<dyn Storage>,
    logs: Vec<OwnLog>,
    keys: UnloggedKeys,
    items: mpsc::UnboundedReceiver<Item>,
    progress: watch::Sender<Vec<OwnProgress>>,
    recent: Arc<RecentLog>,
    written: Arc<Written>,
    documents: Arc<Documents>,
    metrics: Arc<Metrics>,
}

/// What a batch holds so far.
#[derive(Default)]
struct Filling {
    changes: usize,
    bytes: usize,
    /// Where the received runs of each origin end.
    ends: HashMap<OriginId, Seq>,
}

impl Filling {
    /// Takes an item in if there is room; the first always fits.
    fn take(&mut self, item: &Item) -> bool {
        let (changes, bytes) = weight(item);
        let full = self.changes + changes > BATCH_CHANGES_MAX || self.bytes + bytes > BATCH_BYTES_MAX;
        if self.changes > 0 && full {
            return false;
        }
        if let Item::Received(Received { run: Some(run), .. }) = item {
            // A batch has one run of each origin. Only those that follow each other can be put together.
            match self.ends.get(&run.origin) {
                Some(end) if run.first.0 != end.0 + 1 => return false,
                _ => self.ends.insert(run.origin, run.last),
            };
        }
        self.changes += changes;
        self.bytes += bytes;
        true
    }
}

/// Changes, at least one, and bytes.
fn weight(item: &Item) -> (usize, usize) {
    match item {
        Item::Changes(Submission { changes, .. }) => {
            (changes.len().max(1), changes.iter().map(|staged| staged.change.bytes.len()).sum())
        }
        Item::Received(Received { run, cold, .. }) => {
            let changes: usize = cold.iter().map(|cold| cold.changes.len()).sum();
            let bytes: usize =
                cold.iter().flat_map(|cold| &cold.changes).map(|change| change.bytes.len()).sum();
            (changes.max(1), bytes + run.as_ref().map_or(0, |run| run.body.len()))
        }
        Item::Deletion(_) => (1, 0),
    }
}

impl Worker {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        origins: Vec<ClaimedOrigin>,
        items: mpsc::UnboundedReceiver<Item>,
        documents: Arc<Documents>,
        (recent, written): (Arc<RecentLog>, Arc<Written>),
        metrics: Arc<Metrics>,
    ) -> (Self, watch::Receiver<Vec<OwnProgress>>) {
        let logs: Vec<OwnLog> = origins.into_iter().map(OwnLog::new).collect();
        let (progress, announced) = watch::channel(progress_of(&logs));
        let keys = UnloggedKeys::new();
        (Self { storage, logs, keys, items, progress, recent, written, documents, metrics }, announced)
    }

    pub(super) async fn run(mut self) -> Result<(), StorageError> {
        let mut waiting = None;
        loop {
            let first = match waiting.take() {
                Some(item) => item,
                None => match self.items.recv().await {
                    Some(item) => item,
                    None => return Ok(()),
                },
            };
            let items = self.gather(first, &mut waiting);
            self.commit(items).await?;
        }
    }

    /// Takes what has been submitted meanwhile, as far as it fits. What does not fit is the next batch's first.
    fn gather(&mut self, first: Item, waiting: &mut Option<Item>) -> Vec<Item> {
        let mut filling = Filling::default();
        filling.take(&first);
        let mut items = vec![first];
        while let Ok(item) = self.items.try_recv() {
            if !filling.take(&item) {
                *waiting = Some(item);
                break;
            }
            items.push(item);
        }
        items
    }

    async fn commit(&mut self, mut items: Vec<Item>) -> Result<(), StorageError> {
        let started = Instant::now();
        let batch = loop {
            let batch = Assembly::batch(&items, &self.logs, &mut self.keys);
            match self.append(&batch).await {
                Ok(()) => break batch,
                Err(StorageError::OutOfStep { origin, seq }) => {
                    items = self.take_out(items, origin, seq).await?;
                }
                Err(error) => return Err(error),
            }
        };
        let changes = batch.changes.iter().map(|append| append.changes.len()).sum();
        self.metrics.committed(changes, started.elapsed());
        self.advance(batch);
        items.into_iter().for_each(|item| self.announce(item));
        Ok(())
    }

    /// Moves the own logs on, and keeps what was stored for those who read behind.
    fn advance(&mut self, batch: Batch) {
        for run in &batch.runs {
            match self.logs.iter_mut().find(|log| log.origin.id == run.origin) {
                Some(log) => {
                    (log.seq, log.chain) = (run.last, run.chain);
                    log.bytes += run.body.len() as u64;
                }
                None => self.written.note(run.origin, run.first, run.last),
            }
        }
        if !batch.runs.is_empty() {
            self.written.appended();
        }
        if !batch.deletions.is_empty() {
            // Bytes of deleted documents go at once, and storage gives them to nobody any more.
            self.recent.clear();
        }
        for run in batch.runs {
            match batch.deletions.is_empty() {
                true => {
                    let stored = StoredRun {
                        first: run.first,
                        last: run.last,
                        chain_before: run.chain_before,
                        body: run.body,
                    };
                    self.recent.push(run.origin, stored);
                }
                false => self.recent.skip_to(run.origin, run.last),
            }
        }
        let progress = progress_of(&self.logs);
        self.progress.send_if_modified(|known| {
            let moved = *known != progress;
            *known = progress;
            moved
        });
    }

    /// Tells those who wait for an item that it is durable.
    fn announce(&self, item: Item) {
        // Whoever asked may have gone.
        match item {
            Item::Changes(submission) => {
                let stored_here = submission.changes.iter().any(|it| it.logged != Logged::Stored);
                if submission.document.committed(submission.end, stored_here) {
                    self.documents.request_base(submission.document);
                }
            }
            Item::Received(received) => {
                received.deletions.iter().for_each(|deletion| self.documents.deleted(&deletion.document));
                let _ = received.done.send(Stored::Durable);
            }
            Item::Deletion(local) => {
                self.documents.deleted(&local.deletion.document);
                let _ = local.done.send(());
            }
        }
    }

    /// Takes an origin's runs out of a batch, because another node of the region stored them first.
    async fn take_out(
        &self,
        items: Vec<Item>,
        origin: OriginId,
        seq: Seq,
    ) -> Result<Vec<Item>, StorageError> {
        let is_of = |item: &Item| matches!(item, Item::Received(Received { run: Some(run), .. }) if run.origin == origin);
        let (taken, kept): (Vec<Item>, Vec<Item>) = items.into_iter().partition(is_of);
        if taken.is_empty() {
            return Err(StorageError::OutOfStep { origin, seq });
        }
        let answer = self.standing(origin).await?;
        for item in taken {
            if let Item::Received(received) = item {
                let _ = received.done.send(answer);
            }
        }
        Ok(kept)
    }

    /// Where an origin stands in storage.
    async fn standing(&self, origin: OriginId) -> Result<Stored, StorageError> {
        let mut retry = Retry::new(&self.metrics);
        loop {
            match self.storage.origins().await {
                Err(StorageError::Transient(error)) => retry.after(&*error).await,
                Err(error) => return Err(error),
                Ok(origins) => {
                    let found = origins.into_iter().find(|it| it.id == origin);
                    let found = found.ok_or_else(|| {
                        StorageError::Fatal(format!("origin {origin:?} is not in the database").into())
                    })?;
                    return Ok(Stored::OutOfStep { seq: found.seq, chain: found.chain });
                }
            }
        }
    }

    async fn append(&self, batch: &Batch) -> Result<(), StorageError> {
        if batch.runs.is_empty() && batch.changes.is_empty() && batch.deletions.is_empty() {
            return Ok(());
        }
        let mut retry = Retry::new(&self.metrics);
        loop {
            match self.storage.append(batch).await {
                Err(StorageError::Transient(error)) => retry.after(&*error).await,
                result => {
                    if result.is_ok() {
                        retry.succeeded();
                    }
                    return result;
                }
            }
        }
    }
}

fn progress_of(logs: &[OwnLog]) -> Vec<OwnProgress> {
    let one = |log: &OwnLog| OwnProgress {
        origin: log.origin.id,
        group: log.origin.group.clone(),
        seq: log.seq,
        chain: log.chain,
        bytes: log.bytes,
    };
    logs.iter().map(one).collect()
}

/// Waits between attempts while storage is unavailable.
struct Retry<'a> {
    metrics: &'a Metrics,
    pause: Duration,
    failed: bool,
}

impl<'a> Retry<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        Self { metrics, pause: RETRY_FIRST, failed: false }
    }

    async fn after(&mut self, error: &(dyn std::error::Error + Send + Sync)) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::warn!(%error, "storage unavailable, commits wait");
        }
        self.metrics.commit_retries.increment(1);
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(RETRY_LAST);
    }

    fn succeeded(&self) {
        if self.failed {
            tracing::info!("storage available again");
        }
    }
}
