//! Putting back what storage has lost or what was damaged there, out of another region's contents.
//!
//! What counts is what is stored, not what is in memory: a document in memory may well have what its rows have lost. So
//! missing changes are stored past the graph, damaged bytes are replaced where they stand, a damaged base is made anew; and then
//! memory is brought up to what is stored, so that subscribers get it and a document that was withheld serves again.
//!
//! # Order
//!
//! First what is missing is appended, then damaged rows are mended or removed: killed between the two, nothing is gone that
//! was there before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::change::Change;
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested};
use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::link::DocumentContents;
use tokio::sync::oneshot;

use super::contents::{CheckedBase, ContentsError};
use super::inspection::read_tail;
use super::{Damage, Documents, LoadError};
use crate::commit::{Cold, Committer, Received, Stopped};
use crate::materialise::MaterialiseError;
use crate::storage::{DocumentState, NewBase, StorageError, StoredBase, StoredChange, StoredDocument};
use crate::telemetry::MaterialiseReason;

/// How the reason of a quarantine begins that damaged bytes are the cause of. It is lifted when they are mended.
const DAMAGED: &str = "stored bytes are damaged: ";

/// Why a document was not mended. What was stored of the contents stays.
#[derive(Debug, thiserror::Error)]
pub enum MendError {
    #[error(transparent)]
    Contents(#[from] ContentsError),
    #[error("a new base: {0}")]
    Base(#[from] MaterialiseError),
    /// The other region lacks what the damaged part held as well.
    #[error("the contents do not cover what is damaged here")]
    NotCovered,
    /// A new base would be of another order than the one in memory.
    #[error("the document is in use")]
    InUse,
}

impl From<StorageError> for MendError {
    fn from(error: StorageError) -> Self {
        Self::Contents(error.into())
    }
}

impl From<Stopped> for MendError {
    fn from(error: Stopped) -> Self {
        Self::Contents(error.into())
    }
}

/// What was put back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    /// Changes that were not stored, and those whose bytes were wrong.
    pub changes: usize,
    pub base: bool,
    /// The whole document, or its tombstone.
    pub document: bool,
}

impl Mended {
    pub fn is_something(self) -> bool {
        self != Self::default()
    }
}

/// What storage has, as far as it can be read.
struct Present {
    tail: Vec<Change>,
    damaged: BTreeSet<ChangeHash>,
    rows: Vec<Vec<ChangeHash>>,
    base: Option<StoredBase>,
    index: Option<BaseIndex>,
    base_is_damaged: bool,
}

impl Present {
    fn has(&self, hash: &ChangeHash) -> bool {
        self.index.as_ref().is_some_and(|index| index.position_of(hash).is_some())
            || self.tail.iter().any(|change| change.hash == *hash)
    }
}

impl Documents {
    /// Puts back what storage lacks of another region's contents, or has damaged. Returns when it is durable.
    pub async fn mend(
        self: &Arc<Self>,
        contents: DocumentContents,
        committer: &Committer,
    ) -> Result<Mended, MendError> {
        let id = contents.document.clone();
        let stored = self.storage.load_document(&id).await?;
        if stored.as_ref().is_some_and(|it| matches!(it.state, DocumentState::Deleted { .. })) {
            return Ok(Mended::default());
        }
        if let Some(stored) = stored.as_ref().filter(|it| it.group != contents.group)
            && contents.deleted_at_ms.is_none()
        {
            self.quarantine_conflict(&id, &stored.group, &contents.group).await?;
            return Ok(Mended::default());
        }
        // What is in memory may have all of a document whose rows are gone: then it takes nothing in.
        if contents.deleted_at_ms.is_some() || stored.is_none() && !self.has_slot(&id) {
            self.store_contents(contents, committer).await?;
            return Ok(Mended { document: true, ..Mended::default() });
        }
        let stored = stored.unwrap_or_else(|| nothing(&contents));
        let state = stored.state.clone();
        let group = stored.group.clone();
        let present = self.present(&id, stored).await?;
        let offered = self.offered(contents, &present).await?;
        let mut mended = Mended::default();
        let missing: Vec<StoredChange> = offered
            .values()
            .filter(|change| !present.has(&change.hash) && !present.damaged.contains(&change.hash))
            .map(stored_change)
            .collect();
        if !missing.is_empty() {
            mended.changes += missing.len();
            let permits = committer.reserve_received(missing.iter().map(|it| it.bytes.len()).sum()).await;
            let (done, stored) = oneshot::channel();
            let cold = vec![Cold { document: id.clone(), group, changes: missing }];
            committer.receive(Received { run: None, cold, deletions: Vec::new(), permits, done });
            stored.await.map_err(|_| Stopped)?;
        }
        let is_covered = self.mend_rows(&id, &present, &offered, &mut mended).await?;
        if present.base_is_damaged
            && let Some(base) = &present.base
        {
            self.make_base_anew(&id, base, &present, &offered).await?;
            mended.base = true;
        }
        if mended.is_something() {
            self.serve_again(&id, &state, committer).await?;
        }
        if is_covered { Ok(mended) } else { Err(MendError::NotCovered) }
    }

    /// Marks a document as out of service because bytes of it are damaged and nobody is there to mend them.
    pub async fn quarantine_damaged(&self, id: &DocumentId, damage: &Damage) -> Result<(), StorageError> {
        if let Some(document) = self.resident(id) {
            document.lock().quarantine();
        }
        self.metrics.quarantines.increment(1);
        tracing::error!(document = %id, %damage, "document quarantined");
        let reason = format!("{DAMAGED}{damage}");
        self.storage.set_state(id, &DocumentState::Quarantined { reason }).await
    }

    async fn present(&self, id: &DocumentId, stored: StoredDocument) -> Result<Present, MendError> {
        let StoredDocument { base, tail, damaged_rows, .. } = stored;
        let tail = read_tail(tail).await;
        let (mut index, mut base_is_damaged) = (None, false);
        if let Some(base) = &base {
            match self.index_of(id, base).await? {
                Some(Ok(read)) => index = Some(read),
                Some(Err(_)) => base_is_damaged = true,
                None => return Err(StorageError::Transient("its base was replaced meanwhile".into()).into()),
            }
            let contents = self.base_contents(id, base).await?;
            base_is_damaged |= match contents {
                Some(contents) => {
                    let checked = tokio::task::spawn_blocking(move || CheckedBase::new(contents)).await;
                    !matches!(checked, Ok(Ok(_)))
                }
                None => true,
            };
        }
        let damaged = tail.damaged.into_iter().collect();
        Ok(Present { tail: tail.changes, damaged, rows: damaged_rows, base, index, base_is_damaged })
    }

    /// The changes that the contents hold, as far as they are of use. What cannot be read is passed over.
    async fn offered(
        &self,
        contents: DocumentContents,
        present: &Present,
    ) -> Result<BTreeMap<ChangeHash, Change>, MendError> {
        let mut chunks = contents.changes;
        if let Some(base) = contents.base {
            let index = BaseIndex::decode(&base.index).map_err(ContentsError::from)?;
            if present.base_is_damaged || !index.hashes().iter().all(|hash| present.has(hash)) {
                let split = self.materialiser.split(MaterialiseReason::Contents, base.chunk, false);
                chunks.extend(split.await.map_err(ContentsError::from)?);
            }
        }
        let read = move || {
            let limits = Limits::stored();
            let read = chunks.into_iter().filter_map(|it| Change::decode(it, &limits).ok());
            read.map(|change| (change.hash, change)).collect()
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| MendError::Contents(ContentsError::Disagreement))
    }

    /// Replaces damaged changes, and removes rows that do not decode if nothing is lost with them. Returns whether all is
    /// well now.
    async fn mend_rows(
        &self,
        id: &DocumentId,
        present: &Present,
        offered: &BTreeMap<ChangeHash, Change>,
        mended: &mut Mended,
    ) -> Result<bool, MendError> {
        let good: Vec<StoredChange> =
            present.damaged.iter().filter_map(|hash| offered.get(hash)).map(stored_change).collect();
        let is_known = |hash: &ChangeHash| present.has(hash) || offered.contains_key(hash);
        let rows_are_covered = present.rows.iter().flatten().all(is_known);
        let all = rows_are_covered && good.len() == present.damaged.len();
        if rows_are_covered && (!good.is_empty() || !present.rows.is_empty()) {
            self.storage.mend_changes(id, &good).await?;
            mended.changes += good.len();
        }
        Ok(all)
    }

    /// Makes a base of what a damaged one covered, in its order if that can still be read.
    async fn make_base_anew(
        &self,
        id: &DocumentId,
        base: &StoredBase,
        present: &Present,
        offered: &BTreeMap<ChangeHash, Change>,
    ) -> Result<(), MendError> {
        let in_memory = self.resident(id).is_some_and(|it| it.lock().graph().staged_end() > 0);
        if present.index.is_none() && in_memory {
            // It would be of another order than the one in memory.
            return Err(MendError::InUse);
        }
        let own = present.tail.iter().map(|change| (change.hash, change.clone()));
        let mut changes: BTreeMap<ChangeHash, Change> = offered.clone();
        changes.extend(own);
        let order: Option<Vec<ChangeHash>> = present.index.as_ref().map(|index| index.hashes().to_vec());
        let heads = BaseSummary::decode(&base.summary).map(|summary| summary.heads).unwrap_or_default();
        let heads: Vec<ChangeHash> = heads.into_iter().map(|head| head.hash).collect();
        let built = tokio::task::spawn_blocking(move || ordered(changes, order)).await;
        let graph = built.unwrap_or_default().ok_or(MendError::NotCovered)?;
        if !heads.iter().all(|head| graph.position(head).is_some()) {
            return Err(MendError::NotCovered);
        }
        let end = graph.durable_end();
        let (summary, entries) = graph.summarise(end);
        let heads = summary.heads.iter().map(|head| head.hash).collect();
        let changes = graph.changes(0..end).map(|(_, bytes)| bytes.clone()).collect();
        let chunk = self.materialiser.make_base(None, changes, heads, self.limits.clone()).await?;
        let index = BaseIndex::default().extended(entries.into_iter());
        let new = NewBase { summary: summary.encode(), index: index.encode(), chunk };
        self.storage.install_base(id, base.generation, new).await?;
        Ok(())
    }

    /// Brings memory up to what is stored, and lifts a quarantine that the damage was the cause of.
    async fn serve_again(
        self: &Arc<Self>,
        id: &DocumentId,
        state: &DocumentState,
        committer: &Committer,
    ) -> Result<(), MendError> {
        match state {
            DocumentState::Quarantined { reason } if reason.starts_with(DAMAGED) => {
                self.storage.set_state(id, &DocumentState::Live).await?;
            }
            DocumentState::Quarantined { .. } => return Ok(()),
            DocumentState::Live | DocumentState::Deleted { .. } => {}
        }
        self.reload_withheld(id).await?;
        Ok(self.refresh(id, committer).await?)
    }

    /// Gives a document that was withheld because of what was stored of it another chance.
    async fn reload_withheld(&self, id: &DocumentId) -> Result<(), MendError> {
        let Some(document) = self.resident(id).filter(|it| it.lock().quarantined) else { return Ok(()) };
        let Some(stored) = self.storage.load_document(id).await? else { return Ok(()) };
        let generation = stored.base.as_ref().map_or(0, |base| base.generation);
        match self.load_graph(id, stored).await {
            Ok((graph, waiting)) => document.serve_again(graph, generation, waiting),
            Err(LoadError::Storage(error)) => return Err(error.into()),
            Err(error) => {
                tracing::error!(document = %id, %error, "stored document is damaged, stays quarantined")
            }
        }
        Ok(())
    }
}

/// What storage has of a document that it does not know.
fn nothing(contents: &DocumentContents) -> StoredDocument {
    StoredDocument {
        group: contents.group.clone(),
        state: DocumentState::Live,
        base: None,
        tail: Vec::new(),
        damaged_rows: Vec::new(),
    }
}

fn stored_change(change: &Change) -> StoredChange {
    StoredChange { hash: change.hash, bytes: change.bytes.clone() }
}

/// A graph of these changes: of those that `order` names and in that order, else of all that have their past. Nothing if
/// one is missing or does not fit.
fn ordered(mut changes: BTreeMap<ChangeHash, Change>, order: Option<Vec<ChangeHash>>) -> Option<Graph> {
    let limits = Limits::stored();
    let mut graph = Graph::new();
    let Some(order) = order else {
        for change in changes.into_values() {
            graph.ingest(change, &limits).ok()?;
        }
        graph.advance_durable(graph.staged_end());
        return Some(graph);
    };
    for (hash, position) in order.iter().zip(0..) {
        let ingested = graph.ingest(changes.remove(hash)?, &limits);
        if !matches!(ingested, Ok(Ingested::Staged(_))) || graph.position(hash) != Some(position) {
            return None;
        }
    }
    graph.advance_durable(graph.staged_end());
    Some(graph)
}
