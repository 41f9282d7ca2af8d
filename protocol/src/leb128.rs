//! A bounded cursor over untrusted bytes: LEB128 integers, slices and hashes.
//!
//! Numbers must be in their shortest form, as Automerge's own chunk and message parsers demand: a second
//! encoding of one value would give one change two hashes. Every failure is a value that names the field and
//! the byte it stands at; nothing panics, and nothing is allocated for a count that the input cannot hold.

use crate::ids::ChangeHash;

/// Why a field could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadProblem {
    /// The input ends inside the field.
    #[error("the input ends too early")]
    Truncated,
    /// The number has superfluous bytes.
    #[error("the number is not in its shortest form")]
    Overlong,
    /// The number does not fit its type, or is above the limit for the field.
    #[error("the number is too large")]
    TooLarge,
    /// The value is not of a form that Automerge writes.
    #[error("the value is malformed")]
    Malformed,
}

/// A field that could not be read: which one, where, and why. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field} at byte {at}: {problem}")]
pub struct ReadError {
    /// The name of the field.
    pub field: &'static str,
    /// The offset of the field in the input.
    pub at: usize,
    pub problem: ReadProblem,
}

/// A cursor that knows how far it has come.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    /// Starts at an offset, so that errors count from the front of `input`.
    pub fn starting_at(input: &'a [u8], at: usize) -> Self {
        Self { input, at: at.min(input.len()) }
    }

    pub fn position(&self) -> usize {
        self.at
    }

    pub fn remaining(&self) -> usize {
        self.input.len() - self.at
    }

    pub fn is_empty(&self) -> bool {
        self.remaining() == 0
    }

    pub fn byte(&mut self, field: &'static str) -> Result<u8, ReadError> {
        match self.input.get(self.at) {
            Some(byte) => {
                self.at += 1;
                Ok(*byte)
            }
            None => Err(self.error(field, ReadProblem::Truncated)),
        }
    }

    pub fn unsigned(&mut self, field: &'static str) -> Result<u64, ReadError> {
        let start = self.at;
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let byte = self.byte(field)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte holds the 64th bit alone.
            if shift == 63 && bits > 1 {
                return Err(ReadError { field, at: start, problem: ReadProblem::TooLarge });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if shift > 0 && byte == 0 {
                    return Err(ReadError { field, at: start, problem: ReadProblem::Overlong });
                }
                return Ok(value);
            }
        }
        Err(ReadError { field, at: start, problem: ReadProblem::TooLarge })
    }

    pub fn signed(&mut self, field: &'static str) -> Result<i64, ReadError> {
        let start = self.at;
        let mut value = 0_i64;
        let mut previous = 0_u8;
        for shift in (0..70).step_by(7) {
            let byte = self.byte(field)?;
            // The tenth byte may only repeat the sign.
            if shift == 63 && byte != 0 && byte != 0x7f {
                return Err(ReadError { field, at: start, problem: ReadProblem::TooLarge });
            }
            value |= i64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                let repeats_sign =
                    (byte == 0 && previous & 0x40 == 0) || (byte == 0x7f && previous & 0x40 != 0);
                if shift > 0 && repeats_sign {
                    return Err(ReadError { field, at: start, problem: ReadProblem::Overlong });
                }
                if shift < 57 && byte & 0x40 != 0 {
                    value |= -1_i64 << (shift + 7);
                }
                return Ok(value);
            }
            previous = byte;
        }
        Err(ReadError { field, at: start, problem: ReadProblem::TooLarge })
    }

    pub fn unsigned_32(&mut self, field: &'static str) -> Result<u32, ReadError> {
        let at = self.at;
        let value = self.unsigned(field)?;
        u32::try_from(value).map_err(|_| ReadError { field, at, problem: ReadProblem::TooLarge })
    }

    /// A count of items that each take at least `item_bytes_min` bytes of what follows, and of which at most
    /// `count_max` are allowed. Safe to allocate by.
    pub fn count(
        &mut self,
        field: &'static str,
        item_bytes_min: usize,
        count_max: usize,
    ) -> Result<usize, ReadError> {
        let at = self.at;
        let value = self.unsigned(field)?;
        let count = usize::try_from(value).unwrap_or(usize::MAX);
        if count > count_max {
            return Err(ReadError { field, at, problem: ReadProblem::TooLarge });
        }
        if count > self.remaining() / item_bytes_min.max(1) {
            return Err(ReadError { field, at, problem: ReadProblem::Truncated });
        }
        Ok(count)
    }

    pub fn take(&mut self, field: &'static str, bytes: usize) -> Result<&'a [u8], ReadError> {
        if bytes > self.remaining() {
            return Err(self.error(field, ReadProblem::Truncated));
        }
        let taken = &self.input[self.at..self.at + bytes];
        self.at += bytes;
        Ok(taken)
    }

    /// Bytes behind a length of their own.
    pub fn length_prefixed(&mut self, field: &'static str) -> Result<&'a [u8], ReadError> {
        let length = self.count(field, 1, usize::MAX)?;
        self.take(field, length)
    }

    pub fn hash(&mut self, field: &'static str) -> Result<ChangeHash, ReadError> {
        let error = self.error(field, ReadProblem::Truncated);
        let bytes = self.take(field, 32)?;
        Ok(ChangeHash(bytes.try_into().map_err(|_| error)?))
    }

    /// A counted list of hashes, in the order they stand in.
    pub fn hashes(&mut self, field: &'static str, count_max: usize) -> Result<Vec<ChangeHash>, ReadError> {
        let count = self.count(field, 32, count_max)?;
        let mut hashes = Vec::with_capacity(count);
        for _ in 0..count {
            hashes.push(self.hash(field)?);
        }
        Ok(hashes)
    }

    pub fn error(&self, field: &'static str, problem: ReadProblem) -> ReadError {
        ReadError { field, at: self.at, problem }
    }
}

pub(crate) fn write_unsigned(out: &mut Vec<u8>, value: u64) {
    let (bytes, length) = unsigned_array(value);
    out.extend_from_slice(&bytes[..length]);
}

/// A number in its shortest form, and how many of the bytes that takes.
pub(crate) fn unsigned_array(mut value: u64) -> ([u8; 10], usize) {
    let mut bytes = [0; 10];
    let mut length = 0;
    while value >= 0x80 {
        bytes[length] = value as u8 | 0x80;
        value >>= 7;
        length += 1;
    }
    bytes[length] = value as u8;
    (bytes, length + 1)
}

/// How many bytes [`write_unsigned`] writes.
pub(crate) fn unsigned_bytes(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

pub(crate) fn write_hashes(out: &mut Vec<u8>, hashes: &[ChangeHash]) {
    write_unsigned(out, hashes.len() as u64);
    for hash in hashes {
        out.extend_from_slice(hash.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unsigned(bytes: &[u8]) -> Result<u64, ReadProblem> {
        Reader::new(bytes).unsigned("number").map_err(|error| error.problem)
    }

    fn signed(bytes: &[u8]) -> Result<i64, ReadProblem> {
        Reader::new(bytes).signed("number").map_err(|error| error.problem)
    }

    #[test]
    fn unsigned_numbers_use_the_full_width_and_no_more() {
        assert_eq!(unsigned(&[0]), Ok(0));
        assert_eq!(unsigned(&[0x81, 0x01]), Ok(129));
        let mut widest = [0xff; 10];
        widest[9] = 1;
        assert_eq!(unsigned(&widest), Ok(u64::MAX));
        widest[9] = 2;
        assert_eq!(unsigned(&widest), Err(ReadProblem::TooLarge));
        assert_eq!(unsigned(&[0x81; 12]), Err(ReadProblem::TooLarge));
    }

    #[test]
    fn signed_numbers_use_the_full_width_and_no_more() {
        assert_eq!(signed(&[0x7f]), Ok(-1));
        assert_eq!(signed(&[0x40]), Ok(-64));
        assert_eq!(signed(&[0x80, 0x40]), Ok(-8192));
        assert_eq!(signed(&[0xc0, 0x00]), Ok(64));
        let least = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7f];
        assert_eq!(signed(&least), Ok(i64::MIN));
        let most = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00];
        assert_eq!(signed(&most), Ok(i64::MAX));
        let too_low = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7e];
        assert_eq!(signed(&too_low), Err(ReadProblem::TooLarge));
    }

    #[test]
    fn superfluous_bytes_and_a_missing_end_are_refused() {
        assert_eq!(unsigned(&[0x80, 0x00]), Err(ReadProblem::Overlong));
        assert_eq!(signed(&[0xbf, 0x00]), Err(ReadProblem::Overlong));
        assert_eq!(signed(&[0x81, 0xff, 0x7f]), Err(ReadProblem::Overlong));
        assert_eq!(unsigned(&[0x80]), Err(ReadProblem::Truncated));
        assert_eq!(signed(&[]), Err(ReadProblem::Truncated));
    }

    #[test]
    fn a_count_is_bounded_by_what_follows_and_by_its_limit() {
        let count = |bytes: &[u8], least, most| {
            Reader::new(bytes).count("items", least, most).map_err(|error| error.problem)
        };
        assert_eq!(count(&[2, 0, 0, 0, 0], 2, 9), Ok(2));
        assert_eq!(count(&[3, 0, 0, 0, 0], 2, 9), Err(ReadProblem::Truncated));
        assert_eq!(count(&[2, 0, 0, 0, 0], 2, 1), Err(ReadProblem::TooLarge));
        let mut widest = vec![0xff; 9];
        widest.push(1);
        assert_eq!(count(&widest, 1, usize::MAX), Err(ReadProblem::Truncated));
    }

    #[test]
    fn errors_name_the_field_and_the_byte() {
        let mut reader = Reader::starting_at(&[0, 0, 5, 1], 2);
        let error = reader.length_prefixed("name").unwrap_err();
        assert_eq!(error, ReadError { field: "name", at: 2, problem: ReadProblem::Truncated });
    }

    #[test]
    fn what_is_written_is_read_and_its_length_known() {
        for shift in 0..64 {
            for value in [(1_u64 << shift) - 1, 1 << shift, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                write_unsigned(&mut bytes, value);
                assert_eq!(unsigned(&bytes), Ok(value));
                assert_eq!(bytes.len(), unsigned_bytes(value));
            }
        }
    }
}
