//! How a [`LinkFrame`] looks in bytes.
//!
//! A frame is a type byte and the fields of its variant, in the order in which [`LinkFrame`] declares them, without
//! padding. Numbers are unsigned LEB128 in their shortest form; what has no fixed size stands behind its length, lists
//! behind their count:
//!
//! ```text
//! Have             1   progress*
//! Subscribe        2   origin after chain
//! Unsubscribe      3   origin
//! Entries          4   origin first chain body
//! Truncated        5   origin floor
//! SnapshotRequest  6   after?
//! SnapshotPage     7   progress* contents* next?
//! Ping, Pong       8 9 sent_ms
//! Interest        10   document* document*
//! Presence        11   document sender session count data
//! Find            12   request document
//! Found           13   request standing               standing: 0 absent, 1 here, 2 deleted, 3 url* elsewhere
//! DocumentRequest 14   request document
//! DocumentAnswer  15   request contents?
//! ScrubRequest    16   request prefix
//! ScrubAnswer     17   request 0 (count hash)*256     hashes are 16 bytes, without a count before them
//!                      request 1 (document hash)*
//! Failed          18   message
//! HeadsRequest    21   request document hash*          hashes are 32 bytes
//! HeadsAnswer     22   request 0 | 1
//! FingerprintsRequest 30 request document*
//! PositionsRequest    31 request
//! PositionsAnswer     32 request (origin seq)*?
//! Part            40   transfer left bytes
//! Missing         41   (document group)*
//!
//! progress = origin region group seq chain             origin and chain: 16 bytes each
//! contents = document group 0 change*                  without a base
//!          | document group 1 summary index chunk change*
//!          | document group 2 deleted_at_ms            and nothing else
//! x?       = 0 | 1 x
//! ```
//!
//! # Growth
//!
//! A newer peer may send frames of types that are not known here ([`LinkFrameError::UnknownFrame`]: to be ignored), and
//! may append fields to known ones, which are not looked at. Everything else is strict: a frame has one encoding, and
//! every count and length is bounded by what follows and by a limit in [`crate::config`]. What is decoded borrows from
//! the frame, and what is allocated for it is in proportion to the frame's size.
//!
//! What the fields mean is not known here, nor how frames are told apart on the wire: that is the transport's work.

mod decode;
mod encode;
pub(crate) mod fields;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use super::LinkFrame;
use crate::leb128::ReadError;

/// The first byte of each frame. A number that was used once is never given another meaning.
mod kind {
    pub const HAVE: u8 = 1;
    pub const SUBSCRIBE: u8 = 2;
    pub const UNSUBSCRIBE: u8 = 3;
    pub const ENTRIES: u8 = 4;
    pub const TRUNCATED: u8 = 5;
    pub const SNAPSHOT_REQUEST: u8 = 6;
    pub const SNAPSHOT_PAGE: u8 = 7;
    pub const PING: u8 = 8;
    pub const PONG: u8 = 9;
    pub const INTEREST: u8 = 10;
    pub const PRESENCE: u8 = 11;
    pub const FIND: u8 = 12;
    pub const FOUND: u8 = 13;
    pub const DOCUMENT_REQUEST: u8 = 14;
    pub const DOCUMENT_ANSWER: u8 = 15;
    pub const SCRUB_REQUEST: u8 = 16;
    pub const SCRUB_ANSWER: u8 = 17;
    pub const FAILED: u8 = 18;
    pub const HEADS_REQUEST: u8 = 21;
    pub const HEADS_ANSWER: u8 = 22;
    pub const FINGERPRINTS_REQUEST: u8 = 30;
    pub const POSITIONS_REQUEST: u8 = 31;
    pub const POSITIONS_ANSWER: u8 = 32;
    pub const PART: u8 = 40;
    pub const MISSING: u8 = 41;
}

const STANDING_ABSENT: u8 = 0;
const STANDING_HERE: u8 = 1;
const STANDING_DELETED: u8 = 2;
const STANDING_ELSEWHERE: u8 = 3;

const CONTENTS_CHANGES: u8 = 0;
const CONTENTS_BASE: u8 = 1;
const CONTENTS_DELETED: u8 = 2;

const FINGERPRINTS_BUCKETS: u8 = 0;
const FINGERPRINTS_DOCUMENTS: u8 = 1;

/// A change chunk is at least its header: magic number, checksum, type, length.
const CHANGE_BYTES_MIN: usize = 10;

/// A frame that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkFrameError {
    /// A newer peer's frame, to be ignored: the link goes on.
    #[error("a link frame of the unknown type {0}")]
    UnknownFrame(u8),
    #[error("a link frame of {bytes} bytes, at most {bytes_max} are allowed")]
    TooLong { bytes: usize, bytes_max: usize },
    /// The peer does not keep to the protocol, or the frame was damaged.
    #[error("a malformed link frame: {0}")]
    Malformed(#[from] ReadError),
}

/// Writes a frame. Whoever builds a frame keeps to the limits, or the peer refuses it; only the reason of a
/// [`LinkFrame::Failed`] is cut where it is too long. Of the contents of a deleted document nothing but the deletion is
/// written.
pub fn encode(frame: &LinkFrame) -> Vec<u8> {
    encode::encode(frame)
}

/// Reads a frame.
pub fn decode(frame: Bytes) -> Result<LinkFrame, LinkFrameError> {
    decode::decode(&frame, crate::config::LINK_FRAME_BYTES_MAX)
}

/// Reads a frame that was put together of parts, which may be longer than others.
pub fn decode_parted(frame: Bytes) -> Result<LinkFrame, LinkFrameError> {
    decode::decode(&frame, crate::config::LINK_PARTED_BYTES_MAX)
}
