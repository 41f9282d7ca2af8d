//! Whole documents between regions: pages of them, and single ones.
//!
//! A document that cannot be read, or is too large for the way to the peer, holds up no other: it is named as missing, and
//! counted.

use std::collections::BTreeSet;
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::link::{DocumentContents, MissingDocument, Progress, Standing};
use isobar_protocol::replica::Page;

use super::{Parts, RETRY};
use crate::documents::{ContentsError, DEFAULT_GROUP, LoadError};
use crate::storage::{DocumentState, ListedDocument, StorageError, StoredOrigin};

/// Documents in one page at most, and the bytes after which it ends.
const PAGE_DOCUMENTS: u32 = 256;
const PAGE_BYTES: usize = 1 << 20;

/// For whom documents are read.
#[derive(Debug, Clone)]
pub(super) struct Audience {
    pub(super) groups: BTreeSet<PlacementGroup>,
    /// Most bytes of one document's contents that fit through the link.
    pub(super) contents_bytes_max: usize,
}

/// What came of reading a document.
enum Reading {
    Absent,
    Contents(DocumentContents),
    /// It is here and cannot be given.
    Withheld,
}

/// A page of the documents of a peer's groups; `None` if the database does not answer.
pub(super) async fn read_page(parts: &Parts, after: Option<DocumentId>, audience: &Audience) -> Option<Page> {
    let listed = parts.storage.list_documents(after.as_ref(), PAGE_DOCUMENTS).await;
    let listed = listed.inspect_err(|error| tracing::warn!(%error, "documents not listed")).ok()?;
    let is_last = listed.len() < PAGE_DOCUMENTS as usize;
    let mut page = Page::default();
    let mut bytes = 0;
    for ListedDocument { id, group, .. } in listed {
        if bytes >= PAGE_BYTES {
            return Some(page);
        }
        if audience.groups.contains(&group) {
            match read_contents(parts, &id, audience).await? {
                Reading::Contents(contents) => {
                    bytes += contents.bytes();
                    page.documents.push(contents);
                }
                Reading::Withheld => page.missing.push(MissingDocument { document: id.clone(), group }),
                Reading::Absent => {}
            }
        }
        page.next = Some(id);
    }
    if is_last {
        page.next = None;
    }
    Some(page)
}

/// A document for a peer; `None` if it is not here, cannot be given, or is not for it.
pub(super) async fn contents(
    parts: &Parts,
    document: &DocumentId,
    audience: &Audience,
) -> Option<DocumentContents> {
    match read_contents(parts, document, audience).await? {
        Reading::Contents(contents) => shared(contents, &audience.groups),
        Reading::Absent | Reading::Withheld => None,
    }
}

/// The contents, if they are of one of these groups. A tombstone of another is passed on as one of the group of all regions, to
/// whoever names its document: it is stored there under the group that the document has there.
pub(super) fn shared(
    contents: DocumentContents,
    groups: &BTreeSet<PlacementGroup>,
) -> Option<DocumentContents> {
    if groups.contains(&contents.group) {
        return Some(contents);
    }
    let everywhere = groups.iter().find(|group| group.as_str() == DEFAULT_GROUP)?.clone();
    contents.deleted_at_ms.is_some().then_some(DocumentContents { group: everywhere, ..contents })
}

/// `None`: the database does not answer.
async fn read_contents(parts: &Parts, document: &DocumentId, audience: &Audience) -> Option<Reading> {
    match parts.documents.contents(document).await {
        Ok(None) => Some(Reading::Absent),
        Ok(Some(contents)) if contents.bytes() > audience.contents_bytes_max => {
            let (bytes, bytes_max) = (contents.bytes(), audience.contents_bytes_max);
            tracing::error!(%document, bytes, bytes_max, "document is too large for the link, not passed on");
            parts.metrics.contents_withheld("too_large");
            Some(Reading::Withheld)
        }
        Ok(Some(contents)) => Some(Reading::Contents(contents)),
        Err(LoadError::Storage(error)) => {
            tracing::warn!(%document, %error, "document not read");
            None
        }
        Err(error) => {
            // What is damaged here is no help to anybody else.
            tracing::error!(%document, %error, "stored document is damaged, not passed on");
            parts.metrics.contents_withheld("damaged");
            Some(Reading::Withheld)
        }
    }
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

/// Stores what is not here yet. Returns when it is durable, however long that takes, and which documents cannot be used.
pub(super) async fn store_page(parts: &Parts, documents: Vec<DocumentContents>) -> Vec<MissingDocument> {
    let (mut stored, mut unusable) = (Vec::new(), Vec::new());
    for contents in documents {
        let (document, group) = (contents.document.clone(), contents.group.clone());
        match store_contents(parts, contents).await {
            true => stored.push(document),
            false => unusable.push(MissingDocument { document, group }),
        }
    }
    // No log says so to the other nodes of the region.
    parts.exchange.stored(stored);
    unusable
}

/// The same for one document: returns whether it could be used.
pub(super) async fn store(parts: &Parts, contents: DocumentContents) -> bool {
    store_page(parts, vec![contents]).await.is_empty()
}

async fn store_contents(parts: &Parts, contents: DocumentContents) -> bool {
    let document = contents.document.clone();
    let mut pause = RETRY;
    loop {
        match parts.documents.store_contents(contents.clone(), &parts.committer).await {
            Ok(()) => return true,
            Err(ContentsError::Load(LoadError::Storage(error))) => {
                tracing::warn!(%document, %error, "document not stored yet");
            }
            Err(ContentsError::Stopped(_)) => return std::future::pending().await,
            Err(error) => {
                tracing::error!(%document, %error, "another region's document cannot be used");
                return false;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(10));
    }
}

/// Notes that a document is not missing any more, however long it takes.
pub(super) async fn note_found(parts: &Parts, document: &DocumentId) {
    while let Err(error) = parts.storage.document_found(document).await {
        tracing::warn!(%document, %error, "document not noted to be found yet");
        if matches!(error, StorageError::Fatal(_)) {
            return std::future::pending().await;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Raises the counters to the snapshot's and notes what it lacked, however long it takes.
pub(super) async fn adopt(parts: &Parts, origins: &[Progress], missing: &[MissingDocument]) {
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
    while let Err(error) = parts.storage.adopt_origins(&origins, missing).await {
        tracing::warn!(%error, "snapshot's vector not adopted yet");
        if matches!(error, StorageError::Fatal(_)) {
            return std::future::pending().await;
        }
        tokio::time::sleep(RETRY).await;
    }
}
