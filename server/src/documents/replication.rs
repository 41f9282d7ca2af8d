//! What other regions send, on its way into documents and storage.
//!
//! A received run is stored whole, whether or not its changes can be applied. Changes of a document that is in memory go
//! through its graph, so that its subscribers get them; changes of one that is not are stored without loading anything, and so
//! are those that lack a dependency, break a rule, or belong to a document that is out of service.
//!
//! # Order
//!
//! Everything goes through the committer's one queue. A run's changes that found a place in a graph are submitted under the
//! lock under which they were staged, before the run itself. So a document's positions become durable in their order,
//! between the submissions of its clients, and the run's log entries are durable no earlier than its changes: killed at any
//! moment, what the log says is stored is stored. Killed between the two, changes are stored that no log names here yet;
//! the run is received again, and finds them known.
//!
//! A document that is loaded while its changes are stored without it may have read storage before they were there. So
//! after the commit each is looked for again, and offered the changes as ones that are stored.
//!
//! This module does not know links, and does not order runs: whoever hands them over passes an origin's next run when the
//! one before stands in the queue. Runs of different origins may be applied at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isobar_protocol::change::Change;
use isobar_protocol::graph::Refusal;
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::log::Opened;
use isobar_protocol::replica::{ReceivedRun, Stored};
use tokio::sync::oneshot;

use super::{Document, Documents, Incoming, IngestStep, LoadError, Rejected};
use crate::commit::{Cold, Committer, Logged, Permit, Received, Stopped};
use crate::storage::{Deletion, DocumentState, RunAppend, StorageError, StoredChange, Writer};

/// After so many changes were stored for a document that was not in memory it is loaded, so that compaction takes notice.
const COLD_CHANGES_MAX: u32 = 1_024;

/// Documents whose cold changes are counted. When there are more the counts begin anew, which only puts compaction off.
const COLD_DOCUMENTS_MAX: usize = 65_536;

/// How long to wait before a base's index is read again that storage could not give.
const READ_RETRY: Duration = Duration::from_millis(250);

/// How many changes were stored for documents that were not in memory, since they last were.
#[derive(Default)]
pub(super) struct ColdCounts(HashMap<DocumentId, u32>);

impl ColdCounts {
    /// Returns whether the document is to be loaded.
    fn add(&mut self, document: &DocumentId, changes: usize) -> bool {
        if self.0.len() >= COLD_DOCUMENTS_MAX && !self.0.contains_key(document) {
            self.0.clear();
        }
        let count = self.0.entry(document.clone()).or_insert(0);
        *count = count.saturating_add(u32::try_from(changes).unwrap_or(u32::MAX));
        let due = *count > COLD_CHANGES_MAX;
        if due {
            self.0.remove(document);
        }
        due
    }
}

/// What one run or another region's copy holds of one document.
pub(super) struct Part {
    pub(super) document: DocumentId,
    pub(super) group: PlacementGroup,
    pub(super) changes: Vec<Change>,
    /// It came with a run that counts as taken in, for receipts, before any of it is in the document.
    pub(super) in_run: bool,
    /// Changes with a name that cannot be read: a newer program let them in.
    unreadable: Vec<StoredChange>,
    deleted_at_ms: Option<u64>,
}

impl Part {
    pub(super) fn new(document: &DocumentId, group: &PlacementGroup) -> Self {
        Self {
            document: document.clone(),
            group: group.clone(),
            changes: Vec::new(),
            in_run: false,
            unreadable: Vec::new(),
            deleted_at_ms: None,
        }
    }

    /// Whether it says that the document was deleted.
    pub(super) fn is_deletion(&self) -> bool {
        self.deleted_at_ms.is_some()
    }

    /// What is wrong with a document of which it holds a change that cannot be read.
    pub(super) fn unreadable_reason(&self) -> Option<String> {
        self.unreadable.first().map(|it| format!("change {} cannot be read", it.hash))
    }
}

/// What has become of one document's part before the commit.
#[derive(Default)]
struct Taken {
    /// The document, if it was in memory and in service.
    document: Option<Arc<Document>>,
    cold: Vec<StoredChange>,
    /// Why the document is to be quarantined.
    fault: Option<String>,
}

/// Parts that stand in the queue to the log.
struct Placed {
    parts: Vec<Part>,
    taken: Vec<Taken>,
    permits: Arc<[Permit]>,
    stored: oneshot::Receiver<Stored>,
}

impl Documents {
    /// Offers changes to a document's graph, some at a time, loading the base's index if they refer to its inside. Returns
    /// early with the first that is refused, which is taken out; the others may be offered by another call. One that had to
    /// wait for another of them is refused when that has come.
    pub async fn offer(
        &self,
        document: &Arc<Document>,
        incoming: &mut Incoming,
        committer: &Committer,
    ) -> Result<Option<Rejected>, LoadError> {
        let outcome = loop {
            match document.ingest(incoming, committer, &self.limits) {
                IngestStep::Done => break Ok(None),
                IngestStep::More => tokio::task::yield_now().await,
                IngestStep::NeedsIndex => {
                    let (generation, index) = self.read_index(document.id()).await?;
                    document.attach_index(generation, index)?;
                }
                IngestStep::Refused(rejected) => break Ok(Some(rejected)),
            }
        };
        self.look_for_dropped(document, &outcome).await;
        let (dropped, own) = incoming.take_dropped();
        for Rejected { refusal, .. } in dropped {
            // Who sent it may be gone for long.
            self.metrics.refused(refusal.reason());
            tracing::warn!(document = %document.id(), %refusal, "change dropped that waited");
        }
        Ok(outcome?.or(own))
    }

    /// A change of another region that waited here and is dropped does not fit: the document's affair, as if it had been
    /// refused at once. Where only the room for what waits was used up, the next load finds it again.
    async fn look_for_dropped(
        &self,
        document: &Arc<Document>,
        outcome: &Result<Option<Rejected>, LoadError>,
    ) {
        let dropped = document.take_dropped();
        let Some(hash) = dropped.first() else { return };
        match outcome {
            Ok(Some(Rejected { refusal: Refusal::PendingFull | Refusal::TooTangled, .. })) => {
                tracing::warn!(document = %document.id(), changes = dropped.len(), "stored changes wait for a reload");
            }
            _ => {
                self.metrics.replicated_refused.increment(dropped.len() as u64);
                self.quarantine(document, &format!("change {hash} does not fit its dependencies")).await;
            }
        }
    }

    /// Stores a run and applies what can be applied. Resolves when everything of it stands in the queue to the log, so that
    /// the origin's next run may follow; what it resolves to does so when the run is durable, or when it shows that another
    /// node of the region stored it, and never if the committer has failed: the process is ending.
    pub async fn apply(
        self: &Arc<Self>,
        run: ReceivedRun,
        committer: &Committer,
    ) -> impl Future<Output = Stored> + Send + use<> {
        let applying = Applying::begin(self);
        let permits = committer.reserve_received(run.body.len()).await;
        let append = RunAppend {
            origin: run.origin,
            writer: Writer::Other { region: run.region },
            group: run.group.clone(),
            first: run.first,
            last: run.last,
            chain_before: run.chain_before,
            chain: run.chain,
            body: run.body,
        };
        let mut parts = by_document(run.entries, &run.group);
        parts.iter_mut().for_each(|part| part.in_run = true);
        let placed = self.place(parts, Some(append), permits, committer).await;
        let (documents, committer) = (self.clone(), committer.clone());
        async move {
            let finished = documents.finish(placed, &committer).await;
            drop(applying);
            match finished {
                Ok(stored) => stored,
                Err(Stopped) => std::future::pending().await,
            }
        }
    }

    /// Whether a run is under way whose changes may be durable in documents before its log entries are.
    pub(crate) fn is_applying(&self) -> bool {
        self.applying.load(Ordering::SeqCst) > 0
    }

    /// Deletes a document for good, in every region of its group. Returns false if that had been done. A document that is not
    /// known here gets a tombstone too: another region may have it.
    pub async fn delete(&self, id: &DocumentId, committer: &Committer) -> Result<bool, DeleteError> {
        let stored = self.storage.load_document(id).await?;
        let group = match stored {
            Some(stored) if matches!(stored.state, DocumentState::Deleted { .. }) => return Ok(false),
            Some(stored) => stored.group,
            // Whoever waits for a document that is not there has not settled its group.
            None => {
                let settled = self.resident(id).and_then(|document| document.settled_group());
                settled.unwrap_or_else(|| self.default_group.clone())
            }
        };
        if !committer.progress().borrow().iter().any(|log| log.group == group) {
            return Err(DeleteError::OutsideGroup(group));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let deleted_at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        committer.delete(Deletion { document: id.clone(), group, deleted_at_ms }).await?;
        Ok(true)
    }

    /// Stores parts of documents that came without a run.
    pub(super) async fn store(
        self: &Arc<Self>,
        parts: Vec<Part>,
        permits: Arc<[Permit]>,
        committer: &Committer,
    ) -> Result<Stored, Stopped> {
        let placed = self.place(parts, None, permits, committer).await;
        self.finish(placed, committer).await
    }

    /// Puts parts of documents into the queue to the log, and the run they came in behind them.
    async fn place(
        self: &Arc<Self>,
        parts: Vec<Part>,
        run: Option<RunAppend>,
        permits: Arc<[Permit]>,
        committer: &Committer,
    ) -> Placed {
        let mut taken = Vec::with_capacity(parts.len());
        for part in &parts {
            taken.push(self.take(part, &permits, committer).await);
        }
        let (done, stored) = oneshot::channel();
        committer.receive(Received {
            run,
            cold: parts.iter().zip(&taken).filter_map(|(part, taken)| cold(part, taken)).collect(),
            deletions: parts.iter().filter_map(deletion).collect(),
            permits: permits.clone(),
            done,
        });
        Placed { parts, taken, permits, stored }
    }

    /// Waits for the commit, and looks after the documents then.
    async fn finish(self: &Arc<Self>, placed: Placed, committer: &Committer) -> Result<Stored, Stopped> {
        let Placed { parts, taken, permits, stored } = placed;
        let stored = stored.await.map_err(|_| Stopped)?;
        // If another node was first it stored what it was given, which need not be all of this.
        let logged = if stored == Stored::Durable { Logged::Stored } else { Logged::Elsewhere };
        for (part, taken) in parts.into_iter().zip(taken) {
            self.settle(part, taken, logged, &permits, committer).await;
        }
        Ok(stored)
    }

    /// Offers a part to its document, if that is in memory, and says what has to be stored beside.
    async fn take(self: &Arc<Self>, part: &Part, permits: &Arc<[Permit]>, committer: &Committer) -> Taken {
        if part.deleted_at_ms.is_some() {
            // Nothing of it is kept.
            return Taken::default();
        }
        let mut taken = Taken { cold: part.unreadable.clone(), ..Taken::default() };
        let document = match self.has_slot(&part.document) {
            true => self.open_in(&part.document, &part.group).await.ok(),
            false => None,
        };
        let all = part.changes.iter().map(|it| StoredChange { hash: it.hash, bytes: it.bytes.clone() });
        let Some(document) = document.filter(|document| !document.lock().is_withheld()) else {
            taken.cold.extend(all);
            return taken;
        };
        if let Some(conflict) = self.conflict(&document, &part.group) {
            // Storage is given them nevertheless: it keeps none and marks the document in the same transaction.
            taken.cold.extend(all);
            document.lock().quarantine();
            return Taken { document: Some(document), fault: Some(conflict), ..taken };
        }
        taken.fault = self.offer_all(&document, part, Logged::Elsewhere, permits, committer).await;
        if let Some(unreadable) = part.unreadable.first() {
            taken.fault = taken.fault.or(Some(format!("change {} cannot be read", unreadable.hash)));
        }
        if taken.fault.is_some() {
            // At once, so that nobody builds on it; storage is told when the change is there.
            document.lock().quarantine();
        }
        taken.cold.extend(document.unplaced(&part.changes));
        taken.document = Some(document);
        taken
    }

    /// Offers every change of a part. Returns what is wrong with the first that does not fit.
    pub(super) async fn offer_all(
        &self,
        document: &Arc<Document>,
        part: &Part,
        logged: Logged,
        permits: &Arc<[Permit]>,
        committer: &Committer,
    ) -> Option<String> {
        if let Some(conflict) = self.conflict(document, &part.group) {
            return Some(conflict);
        }
        let mut incoming =
            Incoming::foreign(part.changes.clone(), permits.clone(), logged, part.in_run, &part.group);
        loop {
            match self.offer(document, &mut incoming, committer).await {
                Ok(None) => return None,
                Ok(Some(rejected)) => {
                    self.metrics.replicated_refused.increment(1);
                    return Some(rejected.to_string());
                }
                Err(LoadError::Storage(error)) => {
                    // What was offered stays; without the rest the document would miss changes until it is loaded again.
                    tracing::warn!(document = %document.id(), %error, "index not read, received changes wait");
                    tokio::time::sleep(READ_RETRY).await;
                }
                Err(error) => {
                    self.withhold(document, &error);
                    return None;
                }
            }
        }
    }

    /// After the commit: what was in memory learns what is stored, and what came into memory meanwhile is looked after.
    async fn settle(
        self: &Arc<Self>,
        part: Part,
        taken: Taken,
        logged: Logged,
        permits: &Arc<[Permit]>,
        committer: &Committer,
    ) {
        self.metrics.cold_changes.increment(taken.cold.len() as u64);
        if let Some(document) = taken.document {
            if logged == Logged::Stored {
                document.note_stored(taken.cold.iter().map(|change| &change.hash));
            }
            if let Some(reason) = taken.fault {
                self.quarantine(&document, &reason).await;
            }
            return;
        }
        if taken.cold.is_empty() || self.was_left_out(&part, committer).await {
            return;
        }
        let due = self.cold.lock().add(&part.document, taken.cold.len());
        if !due && !self.has_slot(&part.document) {
            return;
        }
        // A load that fails now leaves nothing behind, and the next one reads what is committed.
        let Ok(document) = self.open_in(&part.document, &part.group).await else { return };
        if document.lock().is_withheld() {
            return;
        }
        let fault = self.offer_all(&document, &part, logged, permits, committer).await;
        if let Some(reason) = fault.or_else(|| part.unreadable_reason()) {
            self.quarantine(&document, &reason).await;
        }
    }
}

/// A run that is being stored, until it is.
struct Applying(Arc<Documents>);

impl Applying {
    fn begin(documents: &Arc<Documents>) -> Self {
        documents.applying.fetch_add(1, Ordering::SeqCst);
        Self(documents.clone())
    }
}

impl Drop for Applying {
    fn drop(&mut self) {
        self.0.applying.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Why a document was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Whether it was deleted could not be read. Nothing was stored.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The region has left the document's group since, so it could tell nobody. Nothing was stored.
    #[error("the document is of the placement group {0}, which this region is not in any more")]
    OutsideGroup(PlacementGroup),
    /// The deletion may or may not be stored.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Sorts a run's entries by document, in the order in which the documents come up.
pub(super) fn by_document(entries: Vec<(DocumentId, Opened)>, group: &PlacementGroup) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut places: HashMap<DocumentId, usize> = HashMap::new();
    for (document, content) in entries {
        let place = *places.entry(document).or_insert_with_key(|document| {
            parts.push(Part::new(document, group));
            parts.len() - 1
        });
        let part = &mut parts[place];
        match content {
            Opened::Change(change) => part.changes.push(change),
            Opened::Unreadable { hash, bytes } => part.unreadable.push(StoredChange { hash, bytes }),
            Opened::Tombstone { deleted_at_ms } => {
                part.deleted_at_ms =
                    Some(part.deleted_at_ms.map_or(deleted_at_ms, |it| it.min(deleted_at_ms)));
            }
            // The deletion it left with is in some log, too.
            Opened::Erased { .. } => {}
        }
    }
    parts
}

fn cold(part: &Part, taken: &Taken) -> Option<Cold> {
    let Part { document, group, .. } = part;
    let changes = taken.cold.clone();
    (!changes.is_empty()).then(|| Cold { document: document.clone(), group: group.clone(), changes })
}

fn deletion(part: &Part) -> Option<Deletion> {
    let Part { document, group, .. } = part;
    let deleted_at_ms = part.deleted_at_ms?;
    Some(Deletion { document: document.clone(), group: group.clone(), deleted_at_ms })
}
