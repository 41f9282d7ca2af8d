//! The fields that frames and the handshake's messages are made of.

use bytes::Bytes;
use uuid::Uuid;

use crate::config::{DOCUMENT_ID_BYTES_MAX, PEER_ID_BYTES_MAX};
use crate::ids::{DocumentId, IdError, OriginId, PlacementGroup, RegionName};
use crate::leb128::{ReadError, ReadProblem, Reader, write_unsigned};
use crate::log::Chain;

/// A cursor over a message, whose fields share the message's buffer.
pub(crate) struct Fields<'a> {
    message: &'a Bytes,
    reader: Reader<'a>,
}

impl<'a> Fields<'a> {
    pub fn new(message: &'a Bytes) -> Self {
        Self { message, reader: Reader::new(message) }
    }

    /// Refuses bytes behind the last field.
    pub fn end(&self) -> Result<(), ReadError> {
        match self.reader.is_empty() {
            true => Ok(()),
            false => Err(self.malformed("end")),
        }
    }

    pub fn byte(&mut self, field: &'static str) -> Result<u8, ReadError> {
        self.reader.byte(field)
    }

    pub fn unsigned(&mut self, field: &'static str) -> Result<u64, ReadError> {
        self.reader.unsigned(field)
    }

    pub fn unsigned_32(&mut self, field: &'static str) -> Result<u32, ReadError> {
        self.reader.unsigned_32(field)
    }

    /// Exactly `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], ReadError> {
        let error = self.reader.error(field, ReadProblem::Truncated);
        self.reader.take(field, N)?.try_into().map_err(|_| error)
    }

    /// Bytes behind their length, of which `bytes_max` are allowed.
    pub fn slice(&mut self, field: &'static str, bytes_max: usize) -> Result<&'a [u8], ReadError> {
        let length = self.reader.count(field, 1, bytes_max)?;
        self.reader.take(field, length)
    }

    /// As [`Self::slice`], sharing the message's buffer.
    pub fn bytes_within(&mut self, field: &'static str, bytes_max: usize) -> Result<Bytes, ReadError> {
        self.slice(field, bytes_max).map(|bytes| self.message.slice_ref(bytes))
    }

    /// Bytes behind their length, as many as the message has.
    pub fn bytes(&mut self, field: &'static str) -> Result<Bytes, ReadError> {
        self.bytes_within(field, usize::MAX)
    }

    pub fn text(&mut self, field: &'static str, bytes_max: usize) -> Result<&'a str, ReadError> {
        let malformed = self.reader.error(field, ReadProblem::Malformed);
        std::str::from_utf8(self.slice(field, bytes_max)?).map_err(|_| malformed)
    }

    /// A name that its type checks further.
    pub fn name<T>(
        &mut self,
        field: &'static str,
        check: impl FnOnce(&str) -> Result<T, IdError>,
    ) -> Result<T, ReadError> {
        let malformed = self.reader.error(field, ReadProblem::Malformed);
        check(self.text(field, PEER_ID_BYTES_MAX)?).map_err(|_| malformed)
    }

    pub fn region(&mut self) -> Result<RegionName, ReadError> {
        self.name("region", RegionName::new)
    }

    pub fn group(&mut self) -> Result<PlacementGroup, ReadError> {
        self.name("placement group", PlacementGroup::new)
    }

    pub fn document(&mut self) -> Result<DocumentId, ReadError> {
        let malformed = self.malformed("document");
        DocumentId::from_slice(self.slice("document", DOCUMENT_ID_BYTES_MAX)?).map_err(|_| malformed)
    }

    pub fn origin(&mut self) -> Result<OriginId, ReadError> {
        self.array("origin").map(|bytes| OriginId(Uuid::from_bytes(bytes)))
    }

    pub fn chain(&mut self) -> Result<Chain, ReadError> {
        self.array("chain").map(Chain)
    }

    /// Items behind their count: at most `count_max`, each of at least `item_bytes_min`.
    pub fn list<T>(
        &mut self,
        field: &'static str,
        item_bytes_min: usize,
        count_max: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, ReadError>,
    ) -> Result<Vec<T>, ReadError> {
        let count = self.reader.count(field, item_bytes_min, count_max)?;
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }

    /// Something that may be absent.
    pub fn option<T>(
        &mut self,
        field: &'static str,
        item: impl FnOnce(&mut Self) -> Result<T, ReadError>,
    ) -> Result<Option<T>, ReadError> {
        let malformed = self.malformed(field);
        match self.byte(field)? {
            0 => Ok(None),
            1 => item(self).map(Some),
            _ => Err(malformed),
        }
    }

    /// That the field which begins here has a value that does not exist.
    pub fn malformed(&self, field: &'static str) -> ReadError {
        self.reader.error(field, ReadProblem::Malformed)
    }
}

/// Writes bytes behind their length.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    write_unsigned(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Writes items behind their count.
pub(crate) fn put_list<T>(out: &mut Vec<u8>, items: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
    write_unsigned(out, items.len() as u64);
    for item in items {
        put(out, item);
    }
}

/// Writes something that may be absent.
pub(crate) fn put_option<T>(out: &mut Vec<u8>, item: Option<&T>, put: impl FnOnce(&mut Vec<u8>, &T)) {
    out.push(u8::from(item.is_some()));
    if let Some(item) = item {
        put(out, item);
    }
}
