//! Client frames: the automerge-repo network protocol, one CBOR map per WebSocket message.
//!
//! The field names and message types are those of `@automerge/automerge-repo` 2.5. [`ClientFrame::decode`] takes
//! untrusted bytes: any key order, indefinite-length maps, `null` or `undefined` for an optional field, integers or
//! floats for numbers, tag 64 around byte strings, unknown keys. It borrows from the frame, and what it allocates
//! is bounded by the frame's size.
//!
//! The encoders write what the JavaScript side's decoder turns into plain values: text keys, byte strings without
//! a tag, and no 64-bit integers, which it would make a `BigInt`.
//!
//! Nothing here knows what a frame means: whether its sender is who it claims, or who should get it.

mod decode;
mod encode;

pub use decode::{CborProblem, WireError};
pub use encode::{
    SharedSyncFrame, encode_elsewhere, encode_ephemeral, encode_error, encode_join, encode_peer,
    encode_receipt, encode_remote_heads_changed, encode_remote_subscription_change, encode_sync,
    encode_unavailable,
};

use crate::ids::{ChangeHash, DocumentId, IdError, PeerId, RegionName, StorageId};

/// The only version of the protocol that exists.
pub const PROTOCOL_VERSION: &str = "1";

/// Most extras that a peer may announce in its metadata.
pub const EXTRAS_MAX: usize = 16;

/// Longest name of an extra, in bytes.
pub const EXTRA_BYTES_MAX: usize = 32;

/// What a peer says of itself when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerMetadata {
    /// The name of its persistent storage; stable over reconnects.
    pub storage_id: Option<StorageId>,
    /// Whether it keeps nothing.
    pub is_ephemeral: Option<bool>,
    /// Extensions of Isobar that it understands, under the key `isobar`. Other peers send none.
    pub extras: Vec<String>,
}

/// What one storage holds of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteHeads {
    pub storage_id: StorageId,
    pub heads: Vec<ChangeHash>,
    /// When the storage reached these heads, in milliseconds of its own clock.
    pub timestamp: f64,
}

/// An extra: the client does not answer each sync message but gathers its answers, one a second or less. A stock client
/// answers each at once, which is half of what it costs to send to it.
pub const EXTRA_GATHERED_ANSWERS: &str = "gathered-answers";

/// An extra: the client wants to be told where a document is that this region may not hold ([`ElsewhereFrame`]).
pub const EXTRA_ELSEWHERE: &str = "elsewhere";

/// An extra: the client wants to be told which regions hold its documents ([`ReceiptFrame`]).
pub const EXTRA_RECEIPTS: &str = "receipts";

/// Most addresses that one of these frames names.
const URLS_MAX: usize = 256;

/// A frame that a client sent. Fields that decide nothing (`targetId`) are left out.
#[derive(Debug, Clone, PartialEq)]
pub enum ClientFrame<'a> {
    /// The first frame of a connection.
    Join { sender_id: PeerId, metadata: PeerMetadata, versions: Option<Vec<&'a str>> },
    /// A sync message; `request` when the sender has nothing of the document itself.
    Sync { request: bool, sender_id: &'a str, document: DocumentId, data: &'a [u8] },
    /// The sender does not have the document.
    Unavailable { sender_id: &'a str, document: DocumentId },
    /// A message that is never stored. `sender_id` is its author, who need not be the neighbour.
    Ephemeral { sender_id: &'a str, document: DocumentId, session_id: &'a str, count: u64, data: &'a [u8] },
    /// Storages to be told about from now on, and no longer.
    RemoteSubscriptionChange { sender_id: &'a str, add: Vec<StorageId>, remove: Vec<StorageId> },
    /// What other storages hold, as far as the sender knows.
    RemoteHeadsChanged { sender_id: &'a str, document: DocumentId, heads: Vec<RemoteHeads> },
    /// The sender is about to close.
    Leave { sender_id: &'a str },
    /// The sender gives up, and says why.
    Error { message: &'a str },
    /// A type that is not known; to be ignored.
    Unknown { kind: &'a str },
}

/// The document that the last frame named. Checking the text of an id takes longer than reading the rest of an answer.
#[derive(Debug, Default)]
pub struct LastDocument(Option<(Box<str>, DocumentId)>);

impl LastDocument {
    fn read(&mut self, text: &str) -> Result<DocumentId, IdError> {
        match &self.0 {
            Some((last, document)) if **last == *text => Ok(document.clone()),
            _ => {
                let document = DocumentId::from_text(text)?;
                self.0 = Some((text.into(), document.clone()));
                Ok(document)
            }
        }
    }
}

impl<'a> ClientFrame<'a> {
    /// Reads one frame.
    pub fn decode(frame: &'a [u8]) -> Result<Self, WireError> {
        Self::decode_after(frame, &mut LastDocument::default())
    }

    /// Reads one frame of many, mostly of one document: its id is taken apart once.
    pub fn decode_after(frame: &'a [u8], last: &mut LastDocument) -> Result<Self, WireError> {
        decode::client_frame(frame, last)
    }

    /// Who sent the frame, by its own account.
    pub fn sender_id(&self) -> Option<&str> {
        match self {
            Self::Join { sender_id, .. } => Some(sender_id.as_str()),
            Self::Sync { sender_id, .. }
            | Self::Unavailable { sender_id, .. }
            | Self::Ephemeral { sender_id, .. }
            | Self::RemoteSubscriptionChange { sender_id, .. }
            | Self::RemoteHeadsChanged { sender_id, .. }
            | Self::Leave { sender_id } => Some(sender_id),
            Self::Error { .. } | Self::Unknown { .. } => None,
        }
    }
}

/// The server's answer to a join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFrame {
    pub sender_id: PeerId,
    pub target_id: PeerId,
    pub metadata: PeerMetadata,
    /// The protocol version that the server chose; `None` if it does not say.
    pub version: Option<String>,
}

impl PeerFrame {
    /// Reads a `peer` frame: `Ok(None)` if the frame is of another type.
    pub fn decode(frame: &[u8]) -> Result<Option<Self>, WireError> {
        decode::peer_frame(frame)
    }
}

/// Where a document is that this region may not hold. Only for clients that announced [`EXTRA_ELSEWHERE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElsewhereFrame {
    pub document: DocumentId,
    /// Where clients reach regions that hold it; empty if none of them says.
    pub urls: Vec<String>,
}

impl ElsewhereFrame {
    /// Reads an `isobar-elsewhere` frame: `Ok(None)` if the frame is of another type.
    pub fn decode(frame: &[u8]) -> Result<Option<Self>, WireError> {
        decode::elsewhere_frame(frame)
    }
}

/// That a region holds a document, durably, up to these heads: they and all their ancestors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    pub region: RegionName,
    pub storage_id: StorageId,
    pub heads: Vec<ChangeHash>,
}

/// Which regions hold a document, as far as that has changed since the last of these frames. Only for clients that
/// announced [`EXTRA_RECEIPTS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptFrame {
    pub document: DocumentId,
    pub saved: Vec<Saved>,
}

impl ReceiptFrame {
    /// Reads an `isobar-receipt` frame: `Ok(None)` if the frame is of another type.
    pub fn decode(frame: &[u8]) -> Result<Option<Self>, WireError> {
        decode::receipt_frame(frame)
    }
}
