//! The Bloom filter of a sync message: which changes the sender probably has.
//!
//! The wire form is automerge's (`sync/bloom.rs` of automerge 0.12): nothing at all for an empty filter, else
//! entries, bits per entry and probes as LEB128, then the bits. A stock receiver divides by the number of bits
//! and loops over the probes without a check, so a filter that this module accepts has at least one bit, few
//! probes, and exactly the bytes that its header announces.

use bytes::Bytes;

use crate::config::{BLOOM_BITS_PER_ENTRY_MAX, BLOOM_PROBES_MAX};
use crate::ids::ChangeHash;
use crate::leb128::{ReadError, Reader, unsigned_bytes, write_unsigned};

/// What automerge writes: about one false positive in a hundred.
const BITS_PER_ENTRY: u32 = 10;
const PROBES: u32 = 7;

/// A filter that was refused; nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BloomError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A filter that is not empty announces no entries.
    #[error("the filter has bytes but no entries")]
    NoEntries,
    /// Zero bits make a stock receiver divide by zero; very many serve nobody.
    #[error("{0} bits per entry, allowed are 1 to {BLOOM_BITS_PER_ENTRY_MAX}")]
    BitsPerEntry(u32),
    /// Each probe costs a stock receiver memory and time per change.
    #[error("{0} probes, allowed are 1 to {BLOOM_PROBES_MAX}")]
    Probes(u32),
    /// The bits are fewer or more than entries times bits per entry.
    #[error("{bytes} bytes of bits where the header announces {expected}")]
    Length { bytes: usize, expected: u64 },
}

/// A set of change hashes that may contain more than was put in, and never less.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BloomFilter {
    entries: u32,
    bits_per_entry: u32,
    probes: u32,
    bits: Bytes,
}

impl Default for BloomFilter {
    /// The empty filter, which contains nothing.
    fn default() -> Self {
        Self { entries: 0, bits_per_entry: BITS_PER_ENTRY, probes: PROBES, bits: Bytes::new() }
    }
}

impl BloomFilter {
    /// Reads the whole of `bytes`; the filter shares them.
    pub fn decode(bytes: Bytes) -> Result<Self, BloomError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut reader = Reader::new(&bytes);
        let entries = reader.unsigned_32("bloom entries")?;
        let bits_per_entry = reader.unsigned_32("bloom bits per entry")?;
        let probes = reader.unsigned_32("bloom probes")?;
        if entries == 0 {
            return Err(BloomError::NoEntries);
        }
        if !(1..=BLOOM_BITS_PER_ENTRY_MAX).contains(&bits_per_entry) {
            return Err(BloomError::BitsPerEntry(bits_per_entry));
        }
        if !(1..=BLOOM_PROBES_MAX).contains(&probes) {
            return Err(BloomError::Probes(probes));
        }
        let expected = bits_bytes(entries, bits_per_entry);
        if expected != reader.remaining() as u64 {
            return Err(BloomError::Length { bytes: reader.remaining(), expected });
        }
        let bits = bytes.slice(reader.position()..);
        Ok(Self { entries, bits_per_entry, probes, bits })
    }

    /// The filter of these hashes, with automerge's parameters.
    pub fn from_hashes<'a>(hashes: impl ExactSizeIterator<Item = &'a ChangeHash>) -> Self {
        let entries = u32::try_from(hashes.len()).expect("a document has fewer than 2^32 changes");
        let mut bits = vec![0_u8; bits_bytes(entries, BITS_PER_ENTRY) as usize];
        let modulo = 8 * bits.len() as u64;
        for hash in hashes {
            for probe in Probes::new(hash, modulo).take(PROBES as usize) {
                bits[(probe >> 3) as usize] |= 1 << (probe & 7);
            }
        }
        Self { entries, bits_per_entry: BITS_PER_ENTRY, probes: PROBES, bits: bits.into() }
    }

    /// Whether the hash was put in; wrongly true for about one in a hundred that were not.
    pub fn contains(&self, hash: &ChangeHash) -> bool {
        if self.is_empty() {
            return false;
        }
        let modulo = 8 * self.bits.len() as u64;
        Probes::new(hash, modulo)
            .take(self.probes as usize)
            .all(|probe| self.bits[(probe >> 3) as usize] & (1 << (probe & 7)) != 0)
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// How many hashes the sender put in, by its own account.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// How many bytes [`Self::encode_into`] appends.
    pub fn encoded_bytes(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        let header = [self.entries, self.bits_per_entry, self.probes];
        header.iter().map(|n| unsigned_bytes(u64::from(*n))).sum::<usize>() + self.bits.len()
    }

    /// Appends the wire form, without a length prefix.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        if self.is_empty() {
            return;
        }
        write_unsigned(out, u64::from(self.entries));
        write_unsigned(out, u64::from(self.bits_per_entry));
        write_unsigned(out, u64::from(self.probes));
        out.extend_from_slice(&self.bits);
    }
}

fn bits_bytes(entries: u32, bits_per_entry: u32) -> u64 {
    (u64::from(entries) * u64::from(bits_per_entry)).div_ceil(8)
}

/// The bit numbers of a hash: triple hashing over its first twelve bytes. Endless.
struct Probes {
    x: u64,
    y: u64,
    z: u64,
    modulo: u64,
}

impl Probes {
    /// `modulo` is the number of bits and must not be zero.
    fn new(hash: &ChangeHash, modulo: u64) -> Self {
        let word = |at: usize| {
            let bytes = &hash.as_bytes()[at..at + 4];
            u64::from(u32::from_le_bytes(bytes.try_into().expect("four bytes"))) % modulo
        };
        Self { x: word(0), y: word(4), z: word(8), modulo }
    }
}

impl Iterator for Probes {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let probe = self.x;
        self.x = (self.x + self.y) % self.modulo;
        self.y = (self.y + self.z) % self.modulo;
        Some(probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<BloomFilter, BloomError> {
        BloomFilter::decode(Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn no_bytes_are_the_empty_filter() {
        let filter = decode(&[]).unwrap();
        assert_eq!(filter, BloomFilter::default());
        assert_eq!(filter, BloomFilter::from_hashes([].iter()));
        assert!(filter.is_empty() && !filter.contains(&ChangeHash([0; 32])));
    }

    #[test]
    fn a_filter_that_would_make_stock_automerge_divide_by_zero_is_refused() {
        assert_eq!(decode(&[1, 0, 7]), Err(BloomError::BitsPerEntry(0)));
        assert_eq!(decode(&[0, 10, 7]), Err(BloomError::NoEntries));
    }

    #[test]
    fn a_filter_that_costs_millions_of_probes_is_refused() {
        assert_eq!(decode(&[1, 10, 0x80, 0x80, 0x80, 0x80, 1, 0, 0]), Err(BloomError::Probes(1 << 28)));
        assert_eq!(decode(&[1, 10, 0, 0, 0]), Err(BloomError::Probes(0)));
        assert_eq!(decode(&[1, 10, 17, 0, 0]), Err(BloomError::Probes(17)));
        assert_eq!(decode(&[1, 65, 7, 0, 0]), Err(BloomError::BitsPerEntry(65)));
        assert!(decode(&[1, 10, 16, 0, 0]).is_ok());
    }

    #[test]
    fn the_bits_are_as_many_as_announced() {
        assert_eq!(decode(&[1, 10, 7, 0]), Err(BloomError::Length { bytes: 1, expected: 2 }));
        assert_eq!(decode(&[1, 10, 7, 0, 0, 0]), Err(BloomError::Length { bytes: 3, expected: 2 }));
        let most = [0xff, 0xff, 0xff, 0xff, 0x0f, 64, 7];
        assert_eq!(decode(&most), Err(BloomError::Length { bytes: 0, expected: u64::from(u32::MAX) * 8 }));
        assert!(matches!(decode(&[0xff, 0xff, 0xff, 0xff, 0x1f, 10, 7]), Err(BloomError::Read(_))));
    }

    #[test]
    fn probes_follow_three_words_of_the_hash() {
        let mut hash = [0; 32];
        (hash[0], hash[4], hash[8]) = (3, 5, 7);
        let probes: Vec<_> = Probes::new(&ChangeHash(hash), 16).take(4).collect();
        assert_eq!(probes, [3, 8, 4, 7]);
    }
}
