//! The names of things: documents, changes, actors, peers, storages and log writers.
//!
//! Every id and sequence number is a type of its own, so that no signature takes a bare `u64`, `Uuid` or
//! `[u8; 32]`. The text forms are those that the Automerge ecosystem prints: base58 with a checksum.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use uuid::Uuid;

use crate::base58;
use crate::config::{ACTOR_ID_BYTES_MAX, DOCUMENT_ID_BYTES_MAX, PEER_ID_BYTES_MAX};

/// Longer than the text form of any change hash, which is 50 digits; bounds the work on it.
const HASH_TEXT_BYTES_MAX: usize = 64;

/// An id that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is not base58 with a valid checksum.
    #[error("not base58 with a valid checksum")]
    NotBase58Check,
    /// The id is empty, or longer than the limit for its kind.
    #[error("{kind} of {bytes} bytes, allowed are 1 to {bytes_max}")]
    Length { kind: &'static str, bytes: usize, bytes_max: usize },
}

fn checked_length(kind: &'static str, bytes: usize, bytes_max: usize) -> Result<(), IdError> {
    if bytes == 0 || bytes > bytes_max {
        return Err(IdError::Length { kind, bytes, bytes_max });
    }
    Ok(())
}

/// SHA-256 of a change chunk: the name of a change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChangeHash(pub [u8; 32]);

impl ChangeHash {
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The text form that clients use for heads: base58 with a checksum.
    pub fn to_text(self) -> String {
        base58::encode_check(&self.0)
    }

    /// Reads the text form.
    pub fn from_text(text: &str) -> Result<Self, IdError> {
        if text.len() > HASH_TEXT_BYTES_MAX {
            return Err(IdError::NotBase58Check);
        }
        let bytes = base58::decode_check(text).ok_or(IdError::NotBase58Check)?;
        Self::from_slice(&bytes)
    }

    /// Reads exactly 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
        let hash = <[u8; 32]>::try_from(bytes).map_err(|_| IdError::Length {
            kind: "change hash",
            bytes: bytes.len(),
            bytes_max: 32,
        })?;
        Ok(Self(hash))
    }
}

impl fmt::Debug for ChangeHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ChangeHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A document: 1 to 64 bytes, by convention the 16 of a random UUID.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentId(SmallVec<[u8; 16]>);

// By hand, as what is derived copies byte by byte.
impl Clone for DocumentId {
    fn clone(&self) -> Self {
        Self(SmallVec::from_slice(&self.0))
    }
}

impl DocumentId {
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
        checked_length("document id", bytes.len(), DOCUMENT_ID_BYTES_MAX)?;
        Ok(Self(SmallVec::from_slice(bytes)))
    }

    /// Reads the text form that travels in client frames: base58 with a checksum.
    pub fn from_text(text: &str) -> Result<Self, IdError> {
        // The longest accepted id is under 100 characters; longer text is refused before it is decoded.
        if text.len() > 2 * DOCUMENT_ID_BYTES_MAX {
            return Err(IdError::Length {
                kind: "document id",
                bytes: text.len(),
                bytes_max: DOCUMENT_ID_BYTES_MAX,
            });
        }
        let bytes = base58::decode_check(text).ok_or(IdError::NotBase58Check)?;
        Self::from_slice(&bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base58::encode_check(&self.0))
    }
}

impl fmt::Debug for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The author of a sequence of changes within a document.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ActorId(SmallVec<[u8; 16]>);

// By hand, as what is derived copies byte by byte.
impl Clone for ActorId {
    fn clone(&self) -> Self {
        Self(SmallVec::from_slice(&self.0))
    }
}

impl ActorId {
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
        checked_length("actor id", bytes.len(), ACTOR_ID_BYTES_MAX)?;
        Ok(Self(SmallVec::from_slice(bytes)))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Declares an opaque, shared text id with a length limit.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn new(text: &str) -> Result<Self, IdError> {
                checked_length($kind, text.len(), PEER_ID_BYTES_MAX)?;
                Ok(Self(Arc::from(text)))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

text_id! {
    /// A process or browser tab, as it names itself when it joins.
    PeerId, "peer id"
}

text_id! {
    /// What a peer's persistent storage is called; stable over reconnects. Each region has one.
    StorageId, "storage id"
}

text_id! {
    /// The name of a region, as operators write it.
    RegionName, "region name"
}

text_id! {
    /// A named set of regions that hold a document in full.
    PlacementGroup, "placement group"
}

/// A log writer: one node of one region, for one placement group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OriginId(pub Uuid);

/// How often an origin has been claimed; a writer of an older incarnation is fenced off.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Incarnation(pub u64);

/// A position in an origin's log. The first entry is 1; 0 means "nothing yet".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Seq(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_ids_have_the_ecosystems_text_form() {
        let id = DocumentId::from_text("4NMNnkMhL8jXrdJ9jamS58PAVdXu").unwrap();
        assert_eq!(id.as_bytes(), 0xf1c2_9c84_74c8_4ade_b800_be47_627d_33bf_u128.to_be_bytes());
        assert_eq!(id.to_string(), "4NMNnkMhL8jXrdJ9jamS58PAVdXu");
    }

    #[test]
    fn a_wrong_checksum_or_length_is_refused() {
        assert_eq!(DocumentId::from_text("4NMNnkMhL8jXrdJ9jamS58PAVdXv"), Err(IdError::NotBase58Check));
        assert!(matches!(DocumentId::from_slice(&[]), Err(IdError::Length { .. })));
        assert!(matches!(DocumentId::from_slice(&[0; 65]), Err(IdError::Length { bytes: 65, .. })));
        assert!(matches!(DocumentId::from_text(&"1".repeat(129)), Err(IdError::Length { .. })));
    }

    #[test]
    fn heads_survive_their_text_form() {
        let hash = ChangeHash([7; 32]);
        assert_eq!(ChangeHash::from_text(&hash.to_text()), Ok(hash));
        assert!(ChangeHash::from_text("abc").is_err());
    }
}
