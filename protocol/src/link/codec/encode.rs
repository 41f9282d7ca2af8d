//! Writing frames.

use super::fields::{put_bytes, put_list, put_option};
use super::{
    CONTENTS_BASE, CONTENTS_CHANGES, CONTENTS_DELETED, FINGERPRINTS_BUCKETS, FINGERPRINTS_DOCUMENTS,
    STANDING_ABSENT, STANDING_DELETED, STANDING_ELSEWHERE, STANDING_HERE, kind,
};
use crate::config::LINK_REASON_BYTES_MAX;
use crate::ids::{DocumentId, OriginId, Seq};
use crate::leb128::write_unsigned;
use crate::link::{DocumentContents, Fingerprints, LinkFrame, Progress, Standing};

/// Room for the fields beside a payload.
const SMALL_FIELDS_BYTES: usize = 128;

// One arm per frame: longer than a function should be, but it reads as the table that the module's head draws.
pub(super) fn encode(frame: &LinkFrame) -> Vec<u8> {
    let mut frame_bytes = Vec::with_capacity(SMALL_FIELDS_BYTES + payload_bytes(frame));
    let out = &mut frame_bytes;
    match frame {
        LinkFrame::Have { origins } => {
            out.push(kind::HAVE);
            put_list(out, origins, put_progress);
        }
        LinkFrame::Subscribe { origin, after, chain } => {
            put_origin(out, kind::SUBSCRIBE, origin);
            write_unsigned(out, after.0);
            out.extend_from_slice(chain.as_bytes());
        }
        LinkFrame::Unsubscribe { origin } => put_origin(out, kind::UNSUBSCRIBE, origin),
        LinkFrame::Entries { origin, first, chain, body } => {
            put_origin(out, kind::ENTRIES, origin);
            write_unsigned(out, first.0);
            out.extend_from_slice(chain.as_bytes());
            put_bytes(out, body);
        }
        LinkFrame::Truncated { origin, floor } => {
            put_origin(out, kind::TRUNCATED, origin);
            write_unsigned(out, floor.0);
        }
        LinkFrame::SnapshotRequest { after } => {
            out.push(kind::SNAPSHOT_REQUEST);
            put_option(out, after.as_ref(), put_document);
        }
        LinkFrame::SnapshotPage { vector, documents, next } => {
            out.push(kind::SNAPSHOT_PAGE);
            put_list(out, vector, put_progress);
            put_list(out, documents, put_contents);
            put_option(out, next.as_ref(), put_document);
        }
        LinkFrame::Ping { sent_ms } => put_number(out, kind::PING, *sent_ms),
        LinkFrame::Pong { sent_ms } => put_number(out, kind::PONG, *sent_ms),
        LinkFrame::Interest { add, remove } => {
            out.push(kind::INTEREST);
            put_list(out, add, put_document);
            put_list(out, remove, put_document);
        }
        LinkFrame::Presence { document, sender, session, count, data } => {
            out.push(kind::PRESENCE);
            put_document(out, document);
            put_bytes(out, sender.as_bytes());
            put_bytes(out, session.as_bytes());
            write_unsigned(out, *count);
            put_bytes(out, data);
        }
        LinkFrame::Find { request, document } => {
            put_number(out, kind::FIND, *request);
            put_document(out, document);
        }
        LinkFrame::Found { request, standing } => {
            put_number(out, kind::FOUND, *request);
            put_standing(out, standing);
        }
        LinkFrame::DocumentRequest { request, document } => {
            put_number(out, kind::DOCUMENT_REQUEST, *request);
            put_document(out, document);
        }
        LinkFrame::DocumentAnswer { request, contents } => {
            put_number(out, kind::DOCUMENT_ANSWER, *request);
            put_option(out, contents.as_ref(), put_contents);
        }
        LinkFrame::ScrubRequest { request, prefix } => {
            put_number(out, kind::SCRUB_REQUEST, *request);
            put_bytes(out, prefix);
        }
        LinkFrame::ScrubAnswer { request, fingerprints } => {
            put_number(out, kind::SCRUB_ANSWER, *request);
            put_fingerprints(out, fingerprints);
        }
        LinkFrame::FingerprintsRequest { request, documents } => {
            put_number(out, kind::FINGERPRINTS_REQUEST, *request);
            put_list(out, documents, put_document);
        }
        LinkFrame::PositionsRequest { request } => put_number(out, kind::POSITIONS_REQUEST, *request),
        LinkFrame::PositionsAnswer { request, positions } => {
            put_number(out, kind::POSITIONS_ANSWER, *request);
            put_option(out, positions.as_ref(), |out, positions| put_list(out, positions, put_position));
        }
        LinkFrame::HeadsRequest { request, document, heads } => {
            put_number(out, kind::HEADS_REQUEST, *request);
            put_document(out, document);
            put_list(out, heads, |out, head| out.extend_from_slice(&head.0));
        }
        LinkFrame::HeadsAnswer { request, has } => {
            put_number(out, kind::HEADS_ANSWER, *request);
            out.push(u8::from(*has));
        }
        LinkFrame::Part { transfer, left, bytes } => {
            put_number(out, kind::PART, *transfer);
            write_unsigned(out, *left);
            put_bytes(out, bytes);
        }
        LinkFrame::Missing { documents } => {
            out.push(kind::MISSING);
            put_list(out, documents, |out, missing| {
                put_document(out, &missing.document);
                put_bytes(out, missing.group.as_str().as_bytes());
            });
        }
        LinkFrame::Failed { message } => {
            out.push(kind::FAILED);
            put_bytes(out, &message.as_bytes()[..message.floor_char_boundary(LINK_REASON_BYTES_MAX)]);
        }
    }
    frame_bytes
}

/// About how much a frame carries beyond its small fields, so that large ones are not copied while they grow.
fn payload_bytes(frame: &LinkFrame) -> usize {
    match frame {
        LinkFrame::Entries { body, .. } => body.len(),
        LinkFrame::Part { bytes, .. } => bytes.len(),
        LinkFrame::Presence { data, .. } => data.len(),
        LinkFrame::SnapshotPage { documents, .. } => documents.iter().map(contents_bytes).sum(),
        LinkFrame::DocumentAnswer { contents: Some(contents), .. } => contents_bytes(contents),
        _ => 0,
    }
}

fn contents_bytes(contents: &DocumentContents) -> usize {
    let base = contents.base.as_ref();
    let base_bytes = base.map_or(0, |base| base.summary.len() + base.index.len() + base.chunk.len());
    let changes_bytes: usize = contents.changes.iter().map(|change| change.len() + 4).sum();
    SMALL_FIELDS_BYTES + base_bytes + changes_bytes
}

fn put_number(out: &mut Vec<u8>, kind: u8, number: u64) {
    out.push(kind);
    write_unsigned(out, number);
}

fn put_origin(out: &mut Vec<u8>, kind: u8, origin: &OriginId) {
    out.push(kind);
    out.extend_from_slice(origin.0.as_bytes());
}

fn put_document(out: &mut Vec<u8>, document: &DocumentId) {
    put_bytes(out, document.as_bytes());
}

fn put_position(out: &mut Vec<u8>, (origin, seq): &(OriginId, Seq)) {
    out.extend_from_slice(origin.0.as_bytes());
    write_unsigned(out, seq.0);
}

fn put_progress(out: &mut Vec<u8>, progress: &Progress) {
    out.extend_from_slice(progress.origin.0.as_bytes());
    put_bytes(out, progress.region.as_str().as_bytes());
    put_bytes(out, progress.group.as_str().as_bytes());
    write_unsigned(out, progress.seq.0);
    out.extend_from_slice(progress.chain.as_bytes());
}

fn put_contents(out: &mut Vec<u8>, contents: &DocumentContents) {
    put_document(out, &contents.document);
    put_bytes(out, contents.group.as_str().as_bytes());
    if let Some(deleted_at_ms) = contents.deleted_at_ms {
        return put_number(out, CONTENTS_DELETED, deleted_at_ms);
    }
    match &contents.base {
        None => out.push(CONTENTS_CHANGES),
        Some(base) => {
            out.push(CONTENTS_BASE);
            put_bytes(out, &base.summary);
            put_bytes(out, &base.index);
            put_bytes(out, &base.chunk);
        }
    }
    put_list(out, &contents.changes, |out, change| put_bytes(out, change));
}

fn put_fingerprints(out: &mut Vec<u8>, fingerprints: &Fingerprints) {
    match fingerprints {
        Fingerprints::Buckets(buckets) => {
            out.push(FINGERPRINTS_BUCKETS);
            for (count, fingerprint) in buckets {
                write_unsigned(out, *count);
                out.extend_from_slice(fingerprint);
            }
        }
        Fingerprints::Documents(documents) => {
            out.push(FINGERPRINTS_DOCUMENTS);
            put_list(out, documents, |out, (document, fingerprint)| {
                put_document(out, document);
                out.extend_from_slice(fingerprint);
            });
        }
    }
}

fn put_standing(out: &mut Vec<u8>, standing: &Standing) {
    match standing {
        Standing::Absent => out.push(STANDING_ABSENT),
        Standing::Here => out.push(STANDING_HERE),
        Standing::Deleted => out.push(STANDING_DELETED),
        Standing::Elsewhere { urls } => {
            out.push(STANDING_ELSEWHERE);
            put_list(out, urls, |out, url| put_bytes(out, url.as_bytes()));
        }
    }
}
