//! Storage chunks: the containers in which Automerge keeps documents, changes and bundles.
//!
//! A chunk is a magic number, four bytes of checksum, a type, a length and that many bytes. Any number of them
//! may follow each other. [`chunks`] cuts them apart without copying; [`census`] counts what a document or a
//! bundle claims to hold before Automerge is asked to load it.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::ids::ChangeHash;
use crate::leb128::{ReadError, ReadProblem, Reader, unsigned_array};

pub use crate::census::{Census, census};

const MAGIC: [u8; 4] = [0x85, 0x6f, 0x4a, 0x83];

/// A chunk that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// What stands where a chunk should begin is none.
    #[error("no chunk begins at byte {at}")]
    Magic { at: usize },
    #[error("unknown chunk type {0}")]
    Kind(u8),
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The contents do not hash to the checksum.
    #[error("the checksum does not match the contents")]
    Checksum,
    /// A census was asked of a chunk that is neither a document nor a bundle.
    #[error("a chunk of this kind has no census")]
    NotCounted,
    /// A compressed column is not valid, or inflates to more than the limit.
    #[error("column {column}: {problem}")]
    Inflation { column: u32, problem: InflationProblem },
    /// A column's runs are not valid, or claim more values than the limit.
    #[error("column {column} at byte {at}: {problem}")]
    Column { column: u32, at: usize, problem: ReadProblem },
    /// Columns out of order, or one twice.
    #[error("column {column} is out of order")]
    ColumnOrder { column: u32 },
    /// Bytes are left over after the last field.
    #[error("{0} bytes are left over")]
    Trailing(usize),
}

/// Why compressed data was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflationProblem {
    #[error("not a valid deflate stream")]
    Invalid,
    #[error("inflates to more than the limit")]
    TooLarge,
}

/// What a chunk contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// A document with all of its history.
    Document,
    /// One change.
    Change,
    /// One change, compressed.
    DeflatedChange,
    /// A set of changes in columns. Experimental in Automerge; not read by older clients.
    Bundle,
}

impl ChunkKind {
    fn from_byte(byte: u8) -> Result<Self, ChunkError> {
        match byte {
            0 => Ok(Self::Document),
            1 => Ok(Self::Change),
            2 => Ok(Self::DeflatedChange),
            3 => Ok(Self::Bundle),
            other => Err(ChunkError::Kind(other)),
        }
    }

    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Document => 0,
            Self::Change => 1,
            Self::DeflatedChange => 2,
            Self::Bundle => 3,
        }
    }
}

/// One chunk, cut out of a larger buffer. Its contents have not been looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub kind: ChunkKind,
    /// The whole chunk, with its header.
    pub bytes: Bytes,
    /// The first four bytes of the hash of the contents, as the sender claims.
    pub checksum: [u8; 4],
    data_start: usize,
}

impl Chunk {
    /// What follows the header.
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.data_start..]
    }

    /// Checks the checksum, unless the contents are compressed as a whole.
    pub fn check(&self) -> Result<(), ChunkError> {
        check_checksum(self)
    }

    fn read(input: &Bytes, at: usize) -> Result<Self, ChunkError> {
        let mut reader = Reader::starting_at(input, at);
        if reader.take("magic", MAGIC.len())? != MAGIC {
            return Err(ChunkError::Magic { at });
        }
        let mut checksum = [0_u8; 4];
        checksum.copy_from_slice(reader.take("checksum", 4)?);
        let kind = ChunkKind::from_byte(reader.byte("chunk type")?)?;
        let length = reader.count("chunk length", 1, usize::MAX)?;
        let data_start = reader.position() - at;
        let end = reader.position() + length;
        Ok(Self { kind, bytes: input.slice(at..end), checksum, data_start })
    }
}

/// Cuts concatenated chunks apart, sharing the bytes. Ends after the first error.
pub fn chunks(data: Bytes) -> impl Iterator<Item = Result<Chunk, ChunkError>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= data.len() {
            return None;
        }
        let chunk = Chunk::read(&data, at);
        at = match &chunk {
            Ok(chunk) => at + chunk.bytes.len(),
            Err(_) => data.len(),
        };
        Some(chunk)
    })
}

/// The hash of a chunk's contents. A deflated change hashes as the change it inflates to.
pub(crate) fn content_hash(kind: ChunkKind, data: &[u8]) -> ChangeHash {
    let (length, length_bytes) = unsigned_array(data.len() as u64);
    let mut hasher = Sha256::new();
    hasher.update([kind.byte()]);
    hasher.update(&length[..length_bytes]);
    hasher.update(data);
    ChangeHash(hasher.finalize().into())
}

/// Inflates raw deflate data to at most `bytes_max` bytes. What follows the end of the stream is an error.
pub(crate) fn inflate(data: &[u8], bytes_max: usize) -> Result<Vec<u8>, InflationProblem> {
    use miniz_oxide::inflate::TINFLStatus;
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut decompressor = Box::<DecompressorOxide>::default();
    let mut out = vec![0_u8; data.len().saturating_mul(2).clamp(64, bytes_max.max(64))];
    let (mut read, mut written) = (0, 0);
    loop {
        let (status, consumed, produced) =
            decompress(&mut decompressor, &data[read..], &mut out, written, flags);
        read += consumed;
        written += produced;
        match status {
            TINFLStatus::Done if read < data.len() => return Err(InflationProblem::Invalid),
            TINFLStatus::Done if written > bytes_max => return Err(InflationProblem::TooLarge),
            TINFLStatus::Done => {
                out.truncate(written);
                return Ok(out);
            }
            TINFLStatus::HasMoreOutput if out.len() >= bytes_max => return Err(InflationProblem::TooLarge),
            TINFLStatus::HasMoreOutput => {
                let longer = out.len().saturating_mul(2).min(bytes_max);
                out.resize(longer, 0);
            }
            _ => return Err(InflationProblem::Invalid),
        }
    }
}

/// Checks the checksum of a chunk whose contents are not compressed as a whole.
pub(crate) fn check_checksum(chunk: &Chunk) -> Result<(), ChunkError> {
    let hash = content_hash(chunk.kind, chunk.data());
    if hash.as_bytes()[..4] != chunk.checksum {
        return Err(ChunkError::Checksum);
    }
    Ok(())
}
