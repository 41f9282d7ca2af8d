//! What other nodes of the region have stored, on its way into documents in memory.
//!
//! All of it is stored already, so nothing is stored here: changes take their places in the graph, and their positions
//! become durable in their turn.
//!
//! # Bases that a sibling made
//!
//! Each node has an order of its own for a document's changes. A base is of the order of who made it, and goes on from the
//! base before it, so the index of a later base begins with that of an earlier one, and its chunk holds all that the earlier
//! held. A document therefore stays what it is when a sibling replaces its base, and takes the new one over only if its own
//! order is the same up to there. If it is not, it keeps its tail until it is loaded again.

use std::sync::Arc;

use isobar_protocol::base::BaseSummary;
use isobar_protocol::change::Change;
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use isobar_protocol::log::Opened;

use super::contents::{ContentsError, parse};
use super::receipts::TakingContents;
use super::replication::{Part, by_document};
use super::{Document, Documents, LoadError};
use crate::commit::{Committer, Logged};
use crate::storage::{DocumentState, StorageError, StoredBase};
use crate::telemetry::MaterialiseReason;

impl Documents {
    /// Has documents in memory take what a log says that this node did not store. Returns how many changes they were offered.
    /// For receipts this part of the log must count as taken in by now.
    pub async fn follow(
        self: &Arc<Self>,
        entries: Vec<(DocumentId, Opened)>,
        group: &PlacementGroup,
        committer: &Committer,
    ) -> u64 {
        let mut taken = 0;
        for mut part in by_document(entries, group) {
            part.in_run = true;
            if part.is_deletion() {
                self.deleted(&part.document);
            } else if self.has_slot(&part.document) {
                // A load that fails now leaves nothing behind, and the next one reads what is stored.
                let Ok(document) = self.resident_or_loading(&part.document, group).await else { continue };
                taken += part.changes.len() as u64;
                self.take_stored(&document, &part, committer).await;
            }
        }
        taken
    }

    /// Brings every document in memory up to what is stored. Returns whether that succeeded for all.
    pub async fn refresh_all(self: &Arc<Self>, committer: &Committer) -> bool {
        let ids: Vec<DocumentId> = self.slots.lock().keys().cloned().collect();
        let mut all = true;
        for id in ids {
            if let Err(error) = self.refresh(&id, committer).await {
                tracing::warn!(document = %id, %error, "document not refreshed");
                all = false;
            }
        }
        all
    }

    /// Brings a document up to what is stored, if it is in memory: its state, its changes, those in a base that a sibling
    /// made.
    pub async fn refresh(
        self: &Arc<Self>,
        id: &DocumentId,
        committer: &Committer,
    ) -> Result<(), ContentsError> {
        if !self.has_slot(id) {
            return Ok(());
        }
        let document = self.resident_or_loading(id, &self.default_group).await?;
        let Some(stored) = self.storage.load_document(id).await? else { return Ok(()) };
        self.metrics.refreshes.increment(1);
        // Which logs name what is found is not known.
        let _taking = TakingContents::begin(&document);
        match stored.state {
            DocumentState::Deleted { .. } => self.deleted(id),
            DocumentState::Quarantined { .. } => document.lock().quarantine(),
            DocumentState::Live => {}
        }
        if document.lock().is_withheld() {
            return Ok(());
        }
        let mut part = Part::new(id, &stored.group);
        if let Some(base) = &stored.base {
            part.changes = self.changes_of_base(&document, base, &stored.group).await?;
        }
        let news = {
            let state = document.lock();
            let graph = state.graph();
            let is_news = |hash: &ChangeHash| graph.position(hash).is_none() && !graph.is_pending(hash);
            let news = stored.tail.into_iter().filter(|it| is_news(&it.hash));
            news.map(|it| it.bytes).collect()
        };
        part.changes.append(&mut parse(news).await?);
        self.take_stored(&document, &part, committer).await;
        if let Some(base) = &stored.base {
            self.take_base_over(&document, base).await?;
        }
        Ok(())
    }

    /// Takes over the base that a sibling made, if the document's own order allows it. For who finds that its base is not the
    /// stored one.
    pub(super) async fn take_stored_base_over(&self, document: &Document) -> Result<(), LoadError> {
        match self.storage.load_document(document.id()).await?.and_then(|stored| stored.base) {
            Some(base) => self.take_base_over(document, &base).await,
            None => Ok(()),
        }
    }

    /// Without counting as use, so that what only siblings edit leaves memory.
    async fn resident_or_loading(
        &self,
        id: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<Arc<Document>, LoadError> {
        match self.resident(id) {
            Some(document) => Ok(document),
            None => self.open_in(id, group).await,
        }
    }

    async fn take_stored(&self, document: &Arc<Document>, part: &Part, committer: &Committer) {
        if document.lock().is_withheld() {
            return;
        }
        let permits = committer.reserve_received(part.changes.iter().map(|it| it.bytes.len()).sum()).await;
        let fault = self.offer_all(document, part, Logged::Stored, &permits, committer).await;
        if let Some(reason) = fault.or_else(|| part.unreadable_reason()) {
            self.quarantine(document, &reason).await;
        }
    }

    /// The changes in a stored base, unless the document has them, or could take the base as it is.
    async fn changes_of_base(
        &self,
        document: &Document,
        base: &StoredBase,
        group: &PlacementGroup,
    ) -> Result<Vec<Change>, ContentsError> {
        let summary = BaseSummary::decode(&base.summary)?;
        {
            let state = document.lock();
            let has = |hash| state.graph().position(hash).is_some();
            if state.generation >= base.generation || summary.heads.iter().all(|head| has(&head.hash)) {
                return Ok(Vec::new());
            }
        }
        if document.adopt_base(base.generation, summary, group) {
            return Ok(Vec::new());
        }
        let read = self.storage.read_base_chunk(document.id()).await?;
        let (_, chunk) = read.ok_or(LoadError::BaseIncomplete)?;
        parse(self.materialiser.split(MaterialiseReason::Contents, chunk, false).await?).await
    }

    async fn take_base_over(&self, document: &Document, base: &StoredBase) -> Result<(), LoadError> {
        let summary = BaseSummary::decode(&base.summary)?;
        if document.lock().generation >= base.generation {
            return Ok(());
        }
        let (generation, index) = self.read_index(document.id()).await?;
        if generation != base.generation {
            // Another has been made since.
            return Ok(());
        }
        let retired = {
            let mut state = document.lock();
            let graph = state.graph();
            let (start, end) = (graph.tail_start(), summary.change_count);
            let in_order = |position| {
                let hash = graph.hash(position);
                hash.is_some_and(|hash| index.position_of(&hash) == Some(position))
            };
            let same = start <= end && end <= graph.durable_end() && (start..end).all(in_order);
            if state.is_withheld() || state.generation >= generation || !same {
                return Ok(());
            }
            state.generation = generation;
            state.graph.rebase(summary)
        };
        drop(retired);
        Ok(())
    }
}

/// Whether what was read of a base is of another than the one that was meant.
pub(super) fn replaced(expected: u64, found: u64) -> Result<(), StorageError> {
    match expected == found {
        true => Ok(()),
        false => Err(StorageError::Conflict { expected, found }),
    }
}
