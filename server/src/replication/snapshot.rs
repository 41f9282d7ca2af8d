//! Whole documents between regions: pages of them, and single ones.

use std::collections::BTreeSet;
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::link::{DocumentContents, Progress, Standing};

use super::{Parts, RETRY};
use crate::documents::{ContentsError, LoadError};
use crate::storage::{DocumentState, ListedDocument, StorageError, StoredOrigin};

/// Documents in one page at most, and the bytes after which it ends.
const PAGE_DOCUMENTS: u32 = 256;
const PAGE_BYTES: usize = 1 << 20;

/// Documents, and what to ask for next.
pub(super) type Page = (Vec<DocumentContents>, Option<DocumentId>);

/// A page of the documents of these groups; `None` if the database does not answer.
pub(super) async fn read_page(
    parts: &Parts,
    after: Option<DocumentId>,
    groups: &BTreeSet<PlacementGroup>,
) -> Option<Page> {
    let listed = parts.storage.list_documents(after.as_ref(), PAGE_DOCUMENTS).await;
    let listed = listed.inspect_err(|error| tracing::warn!(%error, "documents not listed")).ok()?;
    let is_last = listed.len() < PAGE_DOCUMENTS as usize;
    let mut documents = Vec::new();
    let mut bytes = 0;
    let mut reached = None;
    for ListedDocument { id, group, .. } in listed {
        if bytes >= PAGE_BYTES {
            return Some((documents, reached));
        }
        if groups.contains(&group) {
            let contents = read_contents(parts, &id).await?;
            bytes += contents.as_ref().map_or(0, contents_bytes);
            documents.extend(contents);
        }
        reached = Some(id);
    }
    Some((documents, if is_last { None } else { reached }))
}

/// A document for a region that holds these groups; `None` if it is not here, or not for it.
pub(super) async fn contents(
    parts: &Parts,
    document: &DocumentId,
    groups: &BTreeSet<PlacementGroup>,
) -> Option<DocumentContents> {
    read_contents(parts, document).await.flatten().filter(|contents| groups.contains(&contents.group))
}

/// The outer `None`: the database does not answer.
async fn read_contents(parts: &Parts, document: &DocumentId) -> Option<Option<DocumentContents>> {
    match parts.documents.contents(document).await {
        Ok(contents) => Some(contents),
        Err(LoadError::Storage(error)) => {
            tracing::warn!(%document, %error, "document not read");
            None
        }
        Err(error) => {
            // What is damaged here is no help to anybody else.
            tracing::error!(%document, %error, "stored document is damaged, not passed on");
            Some(None)
        }
    }
}

fn contents_bytes(contents: &DocumentContents) -> usize {
    let base =
        contents.base.as_ref().map_or(0, |base| base.chunk.len() + base.index.len() + base.summary.len());
    base + contents.changes.iter().map(bytes::Bytes::len).sum::<usize>() + 64
}

/// What a region learns of a document that it asks for.
pub(super) enum Found {
    Standing(Standing),
    /// It is of a group that the region is not in.
    Outside(PlacementGroup),
}

/// Whether a document is here, for a region that holds these groups.
pub(super) async fn standing(
    parts: &Parts,
    document: &DocumentId,
    groups: &BTreeSet<PlacementGroup>,
) -> Found {
    let stored = parts.storage.load_document(document).await;
    Found::Standing(match stored {
        Ok(Some(stored)) => match stored.state {
            // Outside of its group nobody needs to know that it was ever there.
            DocumentState::Deleted { .. } if !groups.contains(&stored.group) => Standing::Absent,
            DocumentState::Deleted { .. } => Standing::Deleted,
            _ if !groups.contains(&stored.group) => return Found::Outside(stored.group),
            _ => Standing::Here,
        },
        Ok(None) => Standing::Absent,
        Err(error) => {
            tracing::warn!(%document, %error, "document not looked up");
            Standing::Absent
        }
    })
}

/// Stores what is not here yet. Returns when it is durable, however long that takes; what cannot be used is left out.
pub(super) async fn store_page(parts: &Parts, documents: Vec<DocumentContents>) {
    let ids: Vec<DocumentId> = documents.iter().map(|it| it.document.clone()).collect();
    for contents in documents {
        let document = contents.document.clone();
        let mut pause = RETRY;
        loop {
            match parts.documents.store_contents(contents.clone(), &parts.committer).await {
                Ok(()) => break,
                Err(ContentsError::Load(LoadError::Storage(error))) => {
                    tracing::warn!(%document, %error, "document not stored yet");
                }
                Err(ContentsError::Stopped(_)) => return std::future::pending().await,
                Err(error) => {
                    tracing::error!(%document, %error, "another region's document cannot be used");
                    break;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
    parts.exchange.stored(ids);
}

/// Raises the counters to the snapshot's, however long it takes.
pub(super) async fn adopt(parts: &Parts, origins: &[Progress]) {
    let origins: Vec<StoredOrigin> = origins
        .iter()
        .map(|it| StoredOrigin {
            id: it.origin,
            region: it.region.clone(),
            group: it.group.clone(),
            seq: it.seq,
            chain: it.chain,
            claimed: false,
        })
        .collect();
    while let Err(error) = parts.storage.adopt_origins(&origins).await {
        tracing::warn!(%error, "snapshot's vector not adopted yet");
        if matches!(error, StorageError::Fatal(_)) {
            return std::future::pending().await;
        }
        tokio::time::sleep(RETRY).await;
    }
}
