//! Whole documents on their way between regions: what storage has of one, and what another region has of it.
//!
//! Contents are covered by other origins' logs, whose entries are not here, so they are stored without being logged.

use std::sync::Arc;

use bytes::Bytes;
use isobar_protocol::base::{BaseDamaged, BaseIndex, BaseSummary};
use isobar_protocol::change::{Change, ChangeError};
use isobar_protocol::chunk::{ChunkError, ChunkKind, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::ids::DocumentId;
use isobar_protocol::link::{BaseContents, DocumentContents};
use tokio::sync::oneshot;

use super::conflict::RefusalError;
use super::receipts::TakingContents;
use super::replication::Part;
use super::{Document, Documents, LoadError};
use crate::commit::{Committer, Received, Stopped};
use crate::materialise::MaterialiseError;
use crate::storage::{Deletion, DocumentState, NewBase, StorageError, StoredBase};
use crate::telemetry::MaterialiseReason;

/// How often a base is read again that was replaced between two reads. Making one takes longer than reading it.
pub(super) const BASE_READS_MAX: usize = 5;

/// Why another region's contents were not taken. What was stored of them stays; they may be offered again.
#[derive(Debug, thiserror::Error)]
pub enum ContentsError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the base's summary or index: {0}")]
    Base(#[from] BaseDamaged),
    #[error("the base's chunk: {0}")]
    Chunk(#[from] ChunkError),
    /// Summary, index and chunk do not belong together.
    #[error("the parts of the base do not agree")]
    Disagreement,
    #[error("the base does not open: {0}")]
    Materialise(#[from] MaterialiseError),
    #[error("a change cannot be read: {0}")]
    Change(#[from] ChangeError),
    /// What was submitted may or may not be stored.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl From<StorageError> for ContentsError {
    fn from(error: StorageError) -> Self {
        Self::Load(error.into())
    }
}

impl From<RefusalError> for ContentsError {
    fn from(error: RefusalError) -> Self {
        match error {
            RefusalError::Storage(error) => error.into(),
            RefusalError::Stopped(error) => error.into(),
        }
    }
}

impl Documents {
    /// All that storage has of a document: its tombstone, or base and tail; nothing if it does not exist.
    pub async fn contents(&self, id: &DocumentId) -> Result<Option<DocumentContents>, LoadError> {
        for _ in 0..BASE_READS_MAX {
            let Some(stored) = self.storage.load_document(id).await? else { return Ok(None) };
            if !stored.damaged_rows.is_empty() {
                return Err(LoadError::RowsDamaged { rows: stored.damaged_rows.len() });
            }
            let deleted_at_ms = match stored.state {
                DocumentState::Deleted { deleted_at_ms } => Some(deleted_at_ms),
                DocumentState::Live | DocumentState::Quarantined { .. } => None,
            };
            let base = match &stored.base {
                None => None,
                Some(base) => match self.base_contents(id, base).await? {
                    Some(base) => Some(base),
                    None => continue,
                },
            };
            let changes = stored.tail.into_iter().map(|change| change.bytes).collect();
            let document = id.clone();
            return Ok(Some(DocumentContents {
                document,
                group: stored.group,
                deleted_at_ms,
                base,
                changes,
            }));
        }
        Err(LoadError::BaseIncomplete)
    }

    /// The base's parts; nothing if it is another one by now.
    pub(super) async fn base_contents(
        &self,
        id: &DocumentId,
        base: &StoredBase,
    ) -> Result<Option<BaseContents>, StorageError> {
        let index = self.storage.read_base_index(id).await?;
        let chunk = self.storage.read_base_chunk(id).await?;
        let (Some((index_of, index)), Some((chunk_of, chunk))) = (index, chunk) else {
            // It was deleted, or is damaged: the next load tells.
            return Ok(None);
        };
        let whole = index_of == base.generation && chunk_of == base.generation;
        Ok(whole.then(|| BaseContents { summary: base.summary.clone(), index, chunk }))
    }

    /// Takes what is not here yet out of another region's contents. Returns when it is durable.
    pub async fn store_contents(
        self: &Arc<Self>,
        contents: DocumentContents,
        committer: &Committer,
    ) -> Result<(), ContentsError> {
        let DocumentContents { document: id, group, deleted_at_ms, base, changes } = contents;
        if let Some(deleted_at_ms) = deleted_at_ms {
            let deletion = Deletion { document: id, group, deleted_at_ms };
            return self.store_deletion(deletion, committer).await;
        }
        let base = base.map(CheckedBase::new).transpose()?;
        let bytes: usize = changes.iter().map(Bytes::len).sum();
        let mut part = Part::new(&id, &group);
        // Held to the end, so that it stays in memory and is brought up to date there.
        let document = self.open_in(&id, &group).await?;
        let settled = document.settled_group().filter(|_| !document.lock().is_deleted());
        if let Some(own) = settled.filter(|own| *own != group) {
            return Ok(self.refuse_copy(&document, &own, &group, committer).await?);
        }
        let _taking = TakingContents::begin(&document);
        if let Some(base) = base
            && !self.install(&document, &base, &part).await?
        {
            part.changes = self.split(&base).await?;
        }
        let mut parsed = parse(changes).await?;
        part.changes.append(&mut parsed);
        if part.changes.is_empty() {
            return Ok(());
        }
        let permits = committer.reserve_received(bytes).await;
        self.store(vec![part], permits, committer).await?;
        Ok(())
    }

    async fn store_deletion(&self, deletion: Deletion, committer: &Committer) -> Result<(), ContentsError> {
        let (done, stored) = oneshot::channel();
        let permits = committer.reserve_received(0).await;
        committer.receive(Received { run: None, cold: Vec::new(), deletions: vec![deletion], permits, done });
        stored.await.map_err(|_| Stopped)?;
        Ok(())
    }

    /// Takes the base as it is, if the document has nothing yet. Returns whether all that it covers is here.
    async fn install(
        &self,
        document: &Arc<Document>,
        base: &CheckedBase,
        part: &Part,
    ) -> Result<bool, ContentsError> {
        let empty = {
            let state = document.lock();
            let graph = state.graph();
            if state.is_deleted() || base.summary.heads.iter().all(|it| graph.position(&it.hash).is_some()) {
                return Ok(true);
            }
            graph.staged_end() == 0 && graph.pending_count() == 0
        };
        if !empty || self.storage.load_document(&part.document).await?.is_some() {
            return Ok(false);
        }
        if document.settle_group(&part.group).is_err() {
            return Ok(false);
        }
        self.storage.create_document(&part.document, &part.group).await?;
        // A sibling may have created it meanwhile, in another group. From here on it keeps the one it has.
        let created = self.storage.find_document(&part.document).await?;
        if created.is_none_or(|it| it.group != part.group) {
            return Ok(false);
        }
        match self.storage.install_base(&part.document, 0, base.to_install()).await {
            // A client may have written since. Then the base's changes are taken one by one as well: in memory the document
            // stays what it is, in storage it is whole with the base, and the next load finds them covered.
            Ok(generation) => Ok(document.adopt_base(generation, base.summary.clone(), &part.group)),
            Err(StorageError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn split(&self, base: &CheckedBase) -> Result<Vec<Change>, ContentsError> {
        let split = self.materialiser.split(MaterialiseReason::Contents, base.contents.chunk.clone(), false);
        parse(split.await?).await
    }
}

/// A base whose parts were found to agree.
pub(super) struct CheckedBase {
    contents: BaseContents,
    summary: BaseSummary,
}

impl CheckedBase {
    pub(super) fn new(contents: BaseContents) -> Result<Self, ContentsError> {
        let summary = BaseSummary::decode(&contents.summary)?;
        let index = BaseIndex::decode(&contents.index)?;
        let heads = summary.heads.iter().map(|head| (&head.hash, head.position));
        let last = summary.actors.iter().map(|actor| (&actor.last_hash, actor.last_position));
        let agree = summary.change_count == index.len() as u64
            && !summary.heads.is_empty()
            && summary.heads.is_sorted_by_key(|head| head.position)
            && heads.chain(last).all(|(hash, position)| index.position_of(hash) == Some(position));
        let mut all = chunks(contents.chunk.clone());
        let chunk = all.next().ok_or(ContentsError::Disagreement)??;
        chunk.check()?;
        match agree && chunk.kind == ChunkKind::Document && all.next().is_none() {
            true => Ok(Self { contents, summary }),
            false => Err(ContentsError::Disagreement),
        }
    }

    fn to_install(&self) -> NewBase {
        let BaseContents { summary, index, chunk } = self.contents.clone();
        NewBase { summary, index, chunk }
    }
}

/// Reads changes that another region has accepted, on a blocking thread: there may be many.
pub(super) async fn parse(changes: Vec<Bytes>) -> Result<Vec<Change>, ContentsError> {
    if changes.is_empty() {
        return Ok(Vec::new());
    }
    let limits = Limits::stored();
    let parse = move || changes.into_iter().map(|bytes| Change::decode(bytes, &limits)).collect();
    let parsed: Result<Vec<Change>, ChangeError> =
        tokio::task::spawn_blocking(parse).await.map_err(|_| ContentsError::Disagreement)?;
    Ok(parsed?)
}
