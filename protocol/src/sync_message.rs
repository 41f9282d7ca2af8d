//! The Automerge sync message: what peers say to each other about one document.
//!
//! The wire form is that of automerge 0.12 (`sync.rs`): a version byte; heads, needs and haves; the changes,
//! each entry any number of concatenated chunks; and a section of flags that older peers ignore. Changes are
//! slices of the input and are not looked into here: [`crate::chunk`] does that.
//!
//! Every count is checked against the bytes that remain before anything is allocated. Hash lists are kept as
//! they were sent, sorted or not: whoever encodes a message must sort them, as automerge expects.

use bytes::Bytes;

use crate::bloom::{BloomError, BloomFilter};
use crate::config::{SYNC_HASHES_MAX, SYNC_HAVE_MAX};
use crate::ids::ChangeHash;
use crate::leb128::{ReadError, Reader, unsigned_bytes, write_hashes, write_unsigned};

const VERSION_1: u8 = 0x42;
const VERSION_2: u8 = 0x43;

/// Marks the byte of the flags section that carries bits; smaller bytes are legacy values.
const FLAG_BITS_MARKER: u8 = 0x80;

/// What the flags section begins with, so that peers that know no bits see "version 2 understood".
const LEGACY_VERSION_2_FLAG: u8 = 0x02;

/// The shortest chunk: magic, checksum, type and a length of zero.
const CHUNK_BYTES_MIN: usize = 10;

/// A message that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SyncMessageError {
    /// The first byte is no known version.
    #[error("unknown sync message version {0:#04x}")]
    Version(u8),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("bloom filter: {0}")]
    Bloom(#[from] BloomError),
    /// An entry of the changes is too short to hold a chunk.
    #[error("a change of {bytes} bytes at byte {at}, the shortest chunk has {CHUNK_BYTES_MIN}")]
    ChangeTooShort { at: usize, bytes: usize },
}

/// Which generation of messages this one belongs to. Version 2 may carry whole documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncVersion {
    V1,
    V2,
}

/// The bits of the flags section. Its presence alone says that the sender understands version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SyncFlags(u8);

impl SyncFlags {
    /// The receiver should forget what it has sent and start afresh.
    pub const SYNC_RESET: u8 = 1;
    /// The sender takes no changes.
    pub const READ_ONLY: u8 = 2;
    /// The sender understands [`Self::SYNC_RESET`].
    pub const SUPPORTS_SYNC_RESET: u8 = 4;

    pub fn contains(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    #[must_use]
    pub fn with(self, bit: u8) -> Self {
        Self(self.0 | (bit & !FLAG_BITS_MARKER))
    }

    fn from_section(section: &[u8]) -> Self {
        section.iter().filter(|byte| *byte & FLAG_BITS_MARKER != 0).fold(Self::default(), |f, b| f.with(*b))
    }
}

/// What the sender has, in short: everything up to `last_sync`, and what the filter contains after that.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Have {
    pub last_sync: Vec<ChangeHash>,
    pub bloom: BloomFilter,
}

/// One sync message. The hash lists must be in ascending order when it is encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncMessage {
    pub version: SyncVersion,
    pub heads: Vec<ChangeHash>,
    pub need: Vec<ChangeHash>,
    pub have: Vec<Have>,
    /// Concatenated chunks; how they are cut into entries has no meaning.
    pub changes: Vec<Bytes>,
    pub flags: Option<SyncFlags>,
}

impl SyncMessage {
    /// Reads a message. Empty change entries are dropped; bytes after the flags are ignored, as automerge
    /// ignores them, so that the format may grow.
    pub fn decode(data: Bytes) -> Result<Self, SyncMessageError> {
        let mut reader = Reader::new(&data);
        let version = match reader.byte("version")? {
            VERSION_1 => SyncVersion::V1,
            VERSION_2 => SyncVersion::V2,
            other => return Err(SyncMessageError::Version(other)),
        };
        let heads = reader.hashes("heads", SYNC_HASHES_MAX)?;
        let need = reader.hashes("need", SYNC_HASHES_MAX)?;
        let have_count = reader.count("have", 2, SYNC_HAVE_MAX)?;
        let mut have = Vec::with_capacity(have_count);
        for _ in 0..have_count {
            have.push(decode_have(&data, &mut reader)?);
        }
        let changes = decode_changes(&data, &mut reader)?;
        let flags = match reader.is_empty() {
            true => None,
            false => Some(SyncFlags::from_section(reader.length_prefixed("flags")?)),
        };
        Ok(Self { version, heads, need, have, changes, flags })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        self.encode_into(&mut out);
        out
    }

    /// Appends the message.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.push(match self.version {
            SyncVersion::V1 => VERSION_1,
            SyncVersion::V2 => VERSION_2,
        });
        write_hashes(out, &self.heads);
        write_hashes(out, &self.need);
        write_unsigned(out, self.have.len() as u64);
        for have in &self.have {
            write_hashes(out, &have.last_sync);
            write_unsigned(out, have.bloom.encoded_bytes() as u64);
            have.bloom.encode_into(out);
        }
        write_unsigned(out, self.changes.len() as u64);
        for change in &self.changes {
            write_unsigned(out, change.len() as u64);
            out.extend_from_slice(change);
        }
        if let Some(flags) = self.flags {
            out.extend_from_slice(&[2, LEGACY_VERSION_2_FLAG, FLAG_BITS_MARKER | flags.0]);
        }
    }

    /// How many bytes [`Self::encode_into`] appends.
    pub fn encoded_bytes(&self) -> usize {
        let prefixed = |bytes: usize| unsigned_bytes(bytes as u64) + bytes;
        let hashes = |list: &[ChangeHash]| unsigned_bytes(list.len() as u64) + 32 * list.len();
        let have = self.have.iter().map(|h| hashes(&h.last_sync) + prefixed(h.bloom.encoded_bytes()));
        let changes = self.changes.iter().map(|change| prefixed(change.len()));
        let flags = if self.flags.is_some() { 3 } else { 0 };
        1 + hashes(&self.heads)
            + hashes(&self.need)
            + unsigned_bytes(self.have.len() as u64)
            + have.sum::<usize>()
            + unsigned_bytes(self.changes.len() as u64)
            + changes.sum::<usize>()
            + flags
    }
}

fn decode_have(data: &Bytes, reader: &mut Reader<'_>) -> Result<Have, SyncMessageError> {
    let last_sync = reader.hashes("last sync", SYNC_HASHES_MAX)?;
    let filter = reader.length_prefixed("bloom filter")?;
    let bloom = BloomFilter::decode(data.slice_ref(filter))?;
    Ok(Have { last_sync, bloom })
}

fn decode_changes(data: &Bytes, reader: &mut Reader<'_>) -> Result<Vec<Bytes>, SyncMessageError> {
    // An entry costs more memory than its length prefix, so the count alone is no licence to allocate.
    let count = reader.count("changes", 1, usize::MAX)?;
    let mut changes = Vec::with_capacity(count.min(1 + reader.remaining() / (CHUNK_BYTES_MIN + 1)));
    for _ in 0..count {
        let at = reader.position();
        let change = reader.length_prefixed("change")?;
        match change.len() {
            0 => {}
            bytes if bytes < CHUNK_BYTES_MIN => {
                return Err(SyncMessageError::ChangeTooShort { at, bytes });
            }
            _ => changes.push(data.slice_ref(change)),
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leb128::ReadProblem;

    fn decode(bytes: &[u8]) -> Result<SyncMessage, SyncMessageError> {
        SyncMessage::decode(Bytes::copy_from_slice(bytes))
    }

    fn read_problem(bytes: &[u8]) -> (&'static str, ReadProblem) {
        match decode(bytes) {
            Err(SyncMessageError::Read(error)) => (error.field, error.problem),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_shortest_message_is_read() {
        let message = decode(&[0x42, 0, 0, 0, 0]).unwrap();
        assert_eq!(message.version, SyncVersion::V1);
        assert!(message.heads.is_empty() && message.have.is_empty() && message.flags.is_none());
        assert_eq!(decode(&[0x43, 0, 0, 0, 0]).unwrap().version, SyncVersion::V2);
        assert_eq!(decode(&[0x41, 0, 0, 0, 0]), Err(SyncMessageError::Version(0x41)));
        assert_eq!(read_problem(&[]), ("version", ReadProblem::Truncated));
    }

    #[test]
    fn flags_are_those_of_new_and_old_peers() {
        let flags = |tail: &[u8]| decode(&[&[0x42, 0, 0, 0, 0], tail].concat()).unwrap().flags;
        assert_eq!(flags(&[]), None);
        assert_eq!(flags(&[1, 2]), Some(SyncFlags::default()));
        let expected = SyncFlags::default().with(SyncFlags::READ_ONLY).with(SyncFlags::SUPPORTS_SYNC_RESET);
        assert_eq!(flags(&[2, 2, 0x86]), Some(expected));
        assert!(expected.contains(SyncFlags::READ_ONLY) && !expected.contains(SyncFlags::SYNC_RESET));
        // What comes after the section is for the future.
        assert_eq!(flags(&[2, 2, 0x86, 1, 2, 3]), Some(expected));
        assert_eq!(flags(&[0]), Some(SyncFlags::default()));
        assert_eq!(read_problem(&[0x42, 0, 0, 0, 0, 3, 2, 0x81]), ("flags", ReadProblem::Truncated));
        let message = SyncMessage { flags: Some(expected), ..decode(&[0x42, 0, 0, 0, 0]).unwrap() };
        assert_eq!(message.encode(), [0x42, 0, 0, 0, 0, 2, 2, 0x86]);
    }

    #[test]
    fn counts_that_the_message_cannot_hold_are_refused() {
        let mut huge = vec![0x42];
        huge.extend_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
        assert_eq!(read_problem(&huge), ("heads", ReadProblem::TooLarge));
        assert_eq!(read_problem(&[0x42, 2, 0, 0, 0]), ("heads", ReadProblem::Truncated));
        assert_eq!(read_problem(&[0x42, 0, 1, 0]), ("need", ReadProblem::Truncated));
        assert_eq!(read_problem(&[0x42, 0, 0, 9, 0, 0, 0, 0]), ("have", ReadProblem::TooLarge));
        let endless = [&[0x42, 0, 0, 0][..], &[0xff; 9], &[1]].concat();
        assert_eq!(read_problem(&endless), ("changes", ReadProblem::Truncated));
        assert_eq!(read_problem(&[0x42, 0, 0, 0, 1, 11, 0]), ("change", ReadProblem::Truncated));
    }

    #[test]
    fn empty_changes_take_no_memory_and_short_ones_are_refused() {
        let empty = [&[0x43, 0, 0, 0, 100][..], &[0; 100]].concat();
        let message = decode(&empty).unwrap();
        assert!(message.changes.is_empty() && message.changes.capacity() <= 10);
        let short = [&[0x43, 0, 0, 0, 1, 9][..], &[0; 9]].concat();
        assert_eq!(decode(&short), Err(SyncMessageError::ChangeTooShort { at: 5, bytes: 9 }));
        let shortest = [&[0x43, 0, 0, 0, 1, 10][..], &[0; 10]].concat();
        assert_eq!(decode(&shortest).unwrap().changes.len(), 1);
    }

    #[test]
    fn a_bad_filter_is_refused_with_its_message() {
        // Ten bytes that make stock automerge panic.
        let bytes = [0x42, 0, 0, 1, 0, 3, 1, 0, 7, 0];
        assert_eq!(decode(&bytes), Err(SyncMessageError::Bloom(BloomError::BitsPerEntry(0))));
    }
}
