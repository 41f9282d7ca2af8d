//! Reading frames.

use bytes::Bytes;

use super::fields::Fields;
use super::{
    CHANGE_BYTES_MIN, CONTENTS_BASE, CONTENTS_CHANGES, CONTENTS_DELETED, FINGERPRINTS_BUCKETS,
    FINGERPRINTS_DOCUMENTS, LinkFrameError, STANDING_ABSENT, STANDING_DELETED, STANDING_ELSEWHERE,
    STANDING_HERE, kind,
};
use crate::config::{
    CLIENT_URL_BYTES_MAX, ELSEWHERE_URLS_MAX, INTEREST_DOCUMENTS_MAX, LINK_ORIGINS_MAX,
    LINK_REASON_BYTES_MAX, PEER_ID_BYTES_MAX, PRESENCE_DATA_BYTES_MAX, RECEIPT_HEADS_MAX, SCRUB_BUCKETS,
    SCRUB_DOCUMENTS_ASKED_MAX, SCRUB_DOCUMENTS_MAX, SCRUB_PREFIX_BYTES_MAX, SNAPSHOT_MISSING_MAX,
    SNAPSHOT_PAGE_DOCUMENTS_MAX,
};
use crate::ids::{ChangeHash, DocumentId, OriginId, Seq};
use crate::leb128::ReadError;
use crate::link::{
    BaseContents, DocumentContents, Fingerprints, LinkFrame, MissingDocument, Progress, Standing,
};

/// An id of one byte behind its length.
const DOCUMENT_BYTES_MIN: usize = 2;

/// Origin, two names of one byte, a seq of one, and the chain.
const PROGRESS_BYTES_MIN: usize = 16 + 2 + 2 + 1 + 16;

/// Id, group, form, and an empty list or a short number.
const CONTENTS_BYTES_MIN: usize = DOCUMENT_BYTES_MIN + 2 + 1 + 1;

pub(super) fn decode(frame: &Bytes, bytes_max: usize) -> Result<LinkFrame, LinkFrameError> {
    if frame.len() > bytes_max {
        return Err(LinkFrameError::TooLong { bytes: frame.len(), bytes_max });
    }
    let mut fields = Fields::new(frame);
    let kind = fields.byte("frame type")?;
    match read(kind, &mut fields)? {
        Some(frame) => Ok(frame),
        None => Err(LinkFrameError::UnknownFrame(kind)),
    }
}

fn read(kind: u8, fields: &mut Fields<'_>) -> Result<Option<LinkFrame>, ReadError> {
    Ok(Some(match kind {
        kind::HAVE => LinkFrame::Have { origins: vector(fields)? },
        kind::SUBSCRIBE => {
            LinkFrame::Subscribe { origin: fields.origin()?, after: seq(fields)?, chain: fields.chain()? }
        }
        kind::UNSUBSCRIBE => LinkFrame::Unsubscribe { origin: fields.origin()? },
        kind::ENTRIES => LinkFrame::Entries {
            origin: fields.origin()?,
            first: seq(fields)?,
            chain: fields.chain()?,
            body: fields.bytes("body")?,
        },
        kind::TRUNCATED => LinkFrame::Truncated { origin: fields.origin()?, floor: seq(fields)? },
        kind::SNAPSHOT_REQUEST => LinkFrame::SnapshotRequest { after: next_document(fields)? },
        kind::SNAPSHOT_PAGE => LinkFrame::SnapshotPage {
            vector: vector(fields)?,
            documents: fields.list("documents", CONTENTS_BYTES_MIN, SNAPSHOT_PAGE_DOCUMENTS_MAX, contents)?,
            next: next_document(fields)?,
        },
        kind::PING => LinkFrame::Ping { sent_ms: fields.unsigned("time")? },
        kind::PONG => LinkFrame::Pong { sent_ms: fields.unsigned("time")? },
        kind::INTEREST => LinkFrame::Interest { add: interests(fields)?, remove: interests(fields)? },
        kind::PRESENCE => presence(fields)?,
        kind::FIND => LinkFrame::Find { request: request(fields)?, document: fields.document()? },
        kind::FOUND => LinkFrame::Found { request: request(fields)?, standing: standing(fields)? },
        kind::DOCUMENT_REQUEST => {
            LinkFrame::DocumentRequest { request: request(fields)?, document: fields.document()? }
        }
        kind::DOCUMENT_ANSWER => LinkFrame::DocumentAnswer {
            request: request(fields)?,
            contents: fields.option("contents", contents)?,
        },
        kind::SCRUB_REQUEST => LinkFrame::ScrubRequest {
            request: request(fields)?,
            prefix: fields.slice("prefix", SCRUB_PREFIX_BYTES_MAX)?.to_vec(),
        },
        kind::SCRUB_ANSWER => {
            LinkFrame::ScrubAnswer { request: request(fields)?, fingerprints: fingerprints(fields)? }
        }
        kind::FINGERPRINTS_REQUEST => LinkFrame::FingerprintsRequest {
            request: request(fields)?,
            documents: fields.list(
                "documents",
                DOCUMENT_BYTES_MIN,
                SCRUB_DOCUMENTS_ASKED_MAX,
                Fields::document,
            )?,
        },
        kind::POSITIONS_REQUEST => LinkFrame::PositionsRequest { request: request(fields)? },
        kind::POSITIONS_ANSWER => LinkFrame::PositionsAnswer {
            request: request(fields)?,
            positions: fields.option("positions", positions)?,
        },
        kind::HEADS_REQUEST => LinkFrame::HeadsRequest {
            request: request(fields)?,
            document: fields.document()?,
            heads: fields
                .list("heads", 32, RECEIPT_HEADS_MAX, |fields| fields.array("head").map(ChangeHash))?,
        },
        kind::HEADS_ANSWER => LinkFrame::HeadsAnswer { request: request(fields)?, has: truth(fields)? },
        kind::PART => LinkFrame::Part {
            transfer: fields.unsigned("transfer")?,
            left: fields.unsigned("bytes left")?,
            bytes: fields.bytes("part")?,
        },
        kind::MISSING => LinkFrame::Missing {
            documents: fields.list("missing", DOCUMENT_BYTES_MIN + 2, SNAPSHOT_MISSING_MAX, missing)?,
        },
        kind::FAILED => {
            LinkFrame::Failed { message: fields.text("reason", LINK_REASON_BYTES_MAX)?.to_owned() }
        }
        _ => return Ok(None),
    }))
}

fn seq(fields: &mut Fields<'_>) -> Result<Seq, ReadError> {
    fields.unsigned("seq").map(Seq)
}

fn request(fields: &mut Fields<'_>) -> Result<u64, ReadError> {
    fields.unsigned("request")
}

fn positions(fields: &mut Fields<'_>) -> Result<Vec<(OriginId, Seq)>, ReadError> {
    fields.list("positions", 16 + 1, LINK_ORIGINS_MAX, |fields| Ok((fields.origin()?, seq(fields)?)))
}

fn truth(fields: &mut Fields<'_>) -> Result<bool, ReadError> {
    let malformed = fields.malformed("truth");
    match fields.byte("truth")? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(malformed),
    }
}

fn next_document(fields: &mut Fields<'_>) -> Result<Option<DocumentId>, ReadError> {
    fields.option("position", Fields::document)
}

fn vector(fields: &mut Fields<'_>) -> Result<Vec<Progress>, ReadError> {
    fields.list("origins", PROGRESS_BYTES_MIN, LINK_ORIGINS_MAX, |fields| {
        Ok(Progress {
            origin: fields.origin()?,
            region: fields.region()?,
            group: fields.group()?,
            seq: seq(fields)?,
            chain: fields.chain()?,
        })
    })
}

fn interests(fields: &mut Fields<'_>) -> Result<Vec<DocumentId>, ReadError> {
    fields.list("interests", DOCUMENT_BYTES_MIN, INTEREST_DOCUMENTS_MAX, Fields::document)
}

fn presence(fields: &mut Fields<'_>) -> Result<LinkFrame, ReadError> {
    let document = fields.document()?;
    let sender = fields.text("sender", PEER_ID_BYTES_MAX)?.to_owned();
    let session = fields.text("session", PEER_ID_BYTES_MAX)?.to_owned();
    let count = fields.unsigned("count")?;
    let data = fields.bytes_within("presence data", PRESENCE_DATA_BYTES_MAX)?;
    Ok(LinkFrame::Presence { document, sender, session, count, data })
}

fn standing(fields: &mut Fields<'_>) -> Result<Standing, ReadError> {
    let malformed = fields.malformed("standing");
    match fields.byte("standing")? {
        STANDING_ABSENT => Ok(Standing::Absent),
        STANDING_HERE => Ok(Standing::Here),
        STANDING_DELETED => Ok(Standing::Deleted),
        STANDING_ELSEWHERE => {
            let url = |fields: &mut Fields<'_>| fields.text("url", CLIENT_URL_BYTES_MAX).map(str::to_owned);
            Ok(Standing::Elsewhere { urls: fields.list("urls", 1, ELSEWHERE_URLS_MAX, url)? })
        }
        _ => Err(malformed),
    }
}

fn missing(fields: &mut Fields<'_>) -> Result<MissingDocument, ReadError> {
    Ok(MissingDocument { document: fields.document()?, group: fields.group()? })
}

fn contents(fields: &mut Fields<'_>) -> Result<DocumentContents, ReadError> {
    let (document, group) = (fields.document()?, fields.group()?);
    let malformed = fields.malformed("contents");
    let (deleted_at_ms, base) = match fields.byte("contents")? {
        CONTENTS_CHANGES => (None, None),
        CONTENTS_BASE => (None, Some(base(fields)?)),
        CONTENTS_DELETED => (Some(fields.unsigned("deletion time")?), None),
        _ => return Err(malformed),
    };
    let changes = match deleted_at_ms {
        None => changes(fields)?,
        Some(_) => Vec::new(),
    };
    Ok(DocumentContents { document, group, deleted_at_ms, base, changes })
}

fn base(fields: &mut Fields<'_>) -> Result<BaseContents, ReadError> {
    Ok(BaseContents {
        summary: fields.bytes("base summary")?,
        index: fields.bytes("base index")?,
        chunk: fields.bytes("base chunk")?,
    })
}

/// Each change is at least as long as its header, so that what is kept of it is in proportion to the frame.
fn changes(fields: &mut Fields<'_>) -> Result<Vec<Bytes>, ReadError> {
    fields.list("changes", 1 + CHANGE_BYTES_MIN, usize::MAX, |fields| {
        let malformed = fields.malformed("change");
        let change = fields.bytes("change")?;
        if change.len() < CHANGE_BYTES_MIN {
            return Err(malformed);
        }
        Ok(change)
    })
}

fn fingerprints(fields: &mut Fields<'_>) -> Result<Fingerprints, ReadError> {
    let malformed = fields.malformed("fingerprints");
    match fields.byte("fingerprints")? {
        FINGERPRINTS_BUCKETS => {
            let bucket = |fields: &mut Fields<'_>| Ok((fields.unsigned("count")?, fields.array("hash")?));
            (0..SCRUB_BUCKETS).map(|_| bucket(fields)).collect::<Result<_, _>>().map(Fingerprints::Buckets)
        }
        FINGERPRINTS_DOCUMENTS => {
            let document = |fields: &mut Fields<'_>| Ok((fields.document()?, fields.array("fingerprint")?));
            fields
                .list("documents", DOCUMENT_BYTES_MIN + 16, SCRUB_DOCUMENTS_MAX, document)
                .map(Fingerprints::Documents)
        }
        _ => Err(malformed),
    }
}
