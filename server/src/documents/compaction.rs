//! Making bases: what keeps a document's history small at rest and quick to join.
//!
//! A base takes in the older part of a tail. It is made off the async threads, proved by loading it again, installed
//! in one transaction, and only then are the changes that it covers removed, in steps. Killed at any moment, the
//! document is whole: covered changes that are still there are recognised by the index and removed at the next load.
//!
//! This is also where it shows that a document does not apply. Such a document is quarantined: it is served to nobody
//! until an operator has looked at it, and no other document notices.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use isobar_protocol::base::{BaseEntry, BaseIndex, BaseSummary};
use isobar_protocol::ids::{ChangeHash, DocumentId};

use super::document::{Document, TAIL_CHANGES_KEPT};
use super::siblings::replaced;
use super::{Documents, LoadError};
use crate::materialise::MaterialiseError;
use crate::storage::{DocumentState, NewBase, StorageError};

/// Changes removed in one transaction. Appends wait for it on an embedded database.
const PRUNE_CHANGES: usize = 1_000;

/// Why no base was made. The document is as it was.
#[derive(Debug, thiserror::Error)]
enum CompactionError {
    #[error(transparent)]
    DoesNotApply(#[from] MaterialiseError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl From<StorageError> for CompactionError {
    fn from(error: StorageError) -> Self {
        Self::Load(LoadError::Storage(error))
    }
}

/// The part of a document that goes into its next base.
struct Cut {
    generation: u64,
    summary: BaseSummary,
    entries: Vec<BaseEntry>,
    changes: Vec<Bytes>,
}

impl Documents {
    /// Makes bases for the document, and prunes what they cover, until its tail is short: much may have been committed
    /// while one was made.
    pub(super) async fn compact(&self, document: &Arc<Document>) {
        while self.compact_once(document).await {}
    }

    /// Makes one base. Reports failures itself; returns whether another is due.
    async fn compact_once(&self, document: &Arc<Document>) -> bool {
        let started = Instant::now();
        match self.install_next_base(document).await {
            Ok(Some((generation, covered))) => {
                self.metrics.bases_made.increment(1);
                self.metrics.base_seconds.record(started.elapsed().as_secs_f64());
                tracing::debug!(document = %document.id(), generation, changes = covered.len(), "base made");
                self.prune_logged(document.id(), generation, &covered).await;
                return document.lock().compacted();
            }
            Ok(None) => document.lock().compacting = false,
            Err(CompactionError::DoesNotApply(error @ MaterialiseError::TooLarge { .. })) => {
                // It is served as before, from its changes; only its history is not made compact.
                tracing::warn!(document = %document.id(), %error, "base not made");
                document.lock().put_compaction_off();
            }
            Err(CompactionError::DoesNotApply(error)) => self.quarantine(document, &error.to_string()).await,
            Err(CompactionError::Load(LoadError::Storage(StorageError::Conflict { .. }))) => {
                // A sibling has made one. The next is tried later, from there if it could be taken over.
                if let Err(error) = self.take_stored_base_over(document).await {
                    tracing::warn!(document = %document.id(), %error, "a sibling's base not read");
                }
                document.lock().put_compaction_off();
            }
            Err(CompactionError::Load(error)) => {
                tracing::warn!(document = %document.id(), %error, "base not made");
                document.lock().put_compaction_off();
            }
        }
        false
    }

    async fn install_next_base(
        &self,
        document: &Arc<Document>,
    ) -> Result<Option<(u64, Vec<ChangeHash>)>, CompactionError> {
        let Some(cut) = cut(document) else { return Ok(None) };
        let (old, index) = self.base_to_replace(document, cut.generation).await?;
        let heads = cut.summary.heads.iter().map(|head| head.hash).collect();
        let chunk = self.materialiser.make_base(old, cut.changes, heads, self.limits.clone()).await?;
        let covered: Vec<ChangeHash> = cut.entries.iter().map(|entry| entry.hash).collect();
        let index = index.extended(cut.entries.into_iter());
        assert_eq!(
            index.len() as u64,
            cut.summary.change_count,
            "the index and the base cover the same changes"
        );
        let base = NewBase { summary: cut.summary.encode(), index: index.encode(), chunk };
        let generation = self.storage.install_base(document.id(), cut.generation, base).await?;
        let retired = {
            let mut state = document.lock();
            if state.is_deleted() {
                return Ok(None);
            }
            if state.generation < generation {
                state.generation = generation;
                Some(state.graph.rebase(cut.summary))
            } else {
                // Somebody found it in storage and took it, or a later one, over.
                None
            }
        };
        // Freeing what the base took in takes longer than all else: nobody waits for it.
        drop(retired);
        Ok(Some((generation, covered)))
    }

    /// The chunk, if there is one, and the index of the base that the document has; a conflict if storage has another.
    async fn base_to_replace(
        &self,
        document: &Document,
        generation: u64,
    ) -> Result<(Option<Bytes>, BaseIndex), CompactionError> {
        if generation == 0 {
            let found = self.storage.read_base_index(document.id()).await?;
            replaced(0, found.map_or(0, |(found, _)| found))?;
            return Ok((None, BaseIndex::default()));
        }
        let (found, index) = self.read_index(document.id()).await?;
        replaced(generation, found)?;
        let (found, chunk) = self.base_chunk_and_generation(document).await?;
        replaced(generation, found)?;
        Ok((Some(chunk), index))
    }

    /// Removes covered changes. If it fails half-way the next load goes on.
    pub(super) async fn prune_logged(&self, document: &DocumentId, generation: u64, covered: &[ChangeHash]) {
        if let Err(error) = self.prune(document, generation, covered).await {
            tracing::warn!(%document, %error, "covered changes not removed yet");
        }
    }

    async fn prune(
        &self,
        document: &DocumentId,
        generation: u64,
        covered: &[ChangeHash],
    ) -> Result<(), StorageError> {
        for hashes in covered.chunks(PRUNE_CHANGES) {
            self.storage.prune_changes(document, hashes).await?;
        }
        self.storage.finish_prune(document, generation).await
    }

    /// Takes a document out of service.
    pub(super) async fn quarantine(&self, document: &Arc<Document>, reason: &str) {
        tracing::error!(document = %document.id(), reason, "document quarantined");
        self.metrics.quarantines.increment(1);
        document.lock().quarantine();
        let state = DocumentState::Quarantined { reason: reason.to_owned() };
        if let Err(error) = self.storage.set_state(document.id(), &state).await {
            // It is found again, and quarantined again, by the next attempt to make a base.
            tracing::warn!(document = %document.id(), %error, "quarantine not recorded");
        }
    }
}

fn cut(document: &Document) -> Option<Cut> {
    let state = document.lock();
    let start = state.graph.tail_start();
    let end = state.graph.durable_end().saturating_sub(TAIL_CHANGES_KEPT);
    if end <= start {
        return None;
    }
    let (summary, entries) = state.graph.summarise(end);
    Some(Cut {
        generation: state.generation,
        summary,
        entries,
        changes: state.graph.changes(start..end).map(|(_, bytes)| bytes.clone()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use isobar_protocol::config::Limits;

    use super::*;
    use crate::documents::COMPACTIONS_WAITING_MAX;
    use crate::materialise::Materialiser;
    use crate::storage::memory::MemoryStorage;
    use crate::telemetry::Metrics;

    #[tokio::test]
    async fn a_document_without_room_to_wait_for_its_base_asks_again_later() {
        let metrics = Arc::new(Metrics::new());
        let materialiser = Materialiser::new(metrics.clone());
        let storage = Arc::new(MemoryStorage::new());
        let limits = Limits::default();
        // Nobody makes bases.
        let (documents, _compactor) =
            Documents::new(storage, metrics, materialiser, limits, 1 << 20, Duration::ZERO);
        let mut asked = Vec::new();
        for number in 0..=COMPACTIONS_WAITING_MAX as u32 {
            let id = DocumentId::from_slice(&number.to_be_bytes()).unwrap();
            let document = documents.open(&id).await.unwrap();
            document.lock().compacting = true;
            documents.request_base(document.clone());
            asked.push(document);
        }
        let last = asked.pop().unwrap();
        assert!(asked.iter().all(|document| document.lock().compacting), "they wait");
        assert!(!last.lock().compacting, "its next commit asks again");
    }
}
