//! Reading client frames.
//!
//! A frame is read twice: once to find where the value of each known key stands, skipping everything, and then only
//! those values that its type calls for. So the order of keys does not matter, and a frame of an unknown type is
//! never refused for the shape of its fields.

use cbor4ii::core::dec::{self, Decode, IgnoredAny, Read, Reference, is_break};
use cbor4ii::core::{major, marker, types};

use super::{
    ClientFrame, EXTRA_BYTES_MAX, EXTRAS_MAX, ElsewhereFrame, LastDocument, PeerFrame, PeerMetadata,
    ReceiptFrame, RemoteHeads, Saved, URLS_MAX,
};
use crate::config::{
    CBOR_DEPTH_MAX, FRAME_KEYS_MAX, RECEIPT_REGIONS_MAX, REMOTE_HEADS_STORAGES_MAX, SYNC_HASHES_MAX,
};
use crate::ids::{ChangeHash, DocumentId, IdError, PeerId, RegionName, StorageId};

/// The tag that some encoders put around a typed array of bytes.
const TAG_BYTES: u64 = 64;

/// The largest integer that a float holds exactly, plus one.
const FLOAT_INTEGERS: f64 = 9_007_199_254_740_992.0;

/// What is wrong with the encoding of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CborProblem {
    #[error("ends too early")]
    Truncated,
    #[error("has the wrong type")]
    Type,
    #[error("is not UTF-8")]
    Utf8,
    #[error("is nested too deeply")]
    Depth,
    #[error("is not valid CBOR")]
    Malformed,
}

/// A frame that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A value cannot be decoded, or is not of the type that the field calls for.
    #[error("{field} at byte {at} {problem}")]
    Value { field: &'static str, at: usize, problem: CborProblem },
    #[error("{0} is missing")]
    Missing(&'static str),
    /// An id is malformed, empty or too long.
    #[error("{field}: {problem}")]
    Id { field: &'static str, problem: IdError },
    /// A number is negative, not finite, or too large.
    #[error("{0} is out of range")]
    Range(&'static str),
    #[error("more than {count_max} {field}")]
    TooMany { field: &'static str, count_max: usize },
    /// Bytes follow after the map.
    #[error("bytes are left over at byte {at}")]
    Trailing { at: usize },
}

/// A cursor over the frame that can be copied, and that bounds the nesting of what it skips.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    rest: &'a [u8],
    frame_bytes: usize,
    depth: usize,
}

impl<'a> Cursor<'a> {
    fn new(frame: &'a [u8]) -> Self {
        Self { rest: frame, frame_bytes: frame.len(), depth: 0 }
    }

    fn at(&self) -> usize {
        self.frame_bytes - self.rest.len()
    }

    fn fail(&self, field: &'static str, problem: CborProblem) -> WireError {
        WireError::Value { field, at: self.at(), problem }
    }

    fn read<T: Decode<'a>>(&mut self, field: &'static str) -> Result<T, WireError> {
        let before = *self;
        T::decode(self).map_err(|error| before.fail(field, problem_of(&error)))
    }

    fn skip(&mut self, field: &'static str) -> Result<(), WireError> {
        self.read::<IgnoredAny>(field).map(|_| ())
    }

    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn is_nothing(&self) -> bool {
        matches!(self.peek(), Some(marker::NULL | marker::UNDEFINED))
    }

    /// Begins a map or an array. The length is `None` if it is indefinite.
    fn open(&mut self, field: &'static str, is_map: bool) -> Result<Items, WireError> {
        let before = *self;
        let length = match is_map {
            true => types::Map::len(self),
            false => types::Array::len(self),
        };
        length.map(Items).map_err(|error| before.fail(field, problem_of(&error)))
    }

    /// Whether another item follows in the map or array.
    fn next_item(&mut self, items: &mut Items, field: &'static str) -> Result<bool, WireError> {
        match &mut items.0 {
            Some(0) => Ok(false),
            Some(left) => {
                *left -= 1;
                Ok(true)
            }
            None => {
                let before = *self;
                is_break(self).map(|ended| !ended).map_err(|error| before.fail(field, problem_of(&error)))
            }
        }
    }

    /// A text key, or `None` if the key is something else, which is skipped.
    fn key(&mut self, field: &'static str) -> Result<Option<&'a str>, WireError> {
        let is_text = self.peek().is_some_and(|byte| dec::if_major(byte) == major::STRING);
        if is_text && self.peek() != Some(major::STRING << 5 | marker::START) {
            return self.read::<&str>(field).map(Some);
        }
        self.skip(field).map(|()| None)
    }
}

impl<'a> Read<'a> for Cursor<'a> {
    type Error = std::convert::Infallible;

    #[inline]
    fn fill<'short>(&'short mut self, want: usize) -> Result<Reference<'a, 'short>, Self::Error> {
        Ok(Reference::Long(&self.rest[..want.min(self.rest.len())]))
    }

    #[inline]
    fn advance(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes.min(self.rest.len())..];
    }

    #[inline]
    fn step_in(&mut self) -> bool {
        self.depth += 1;
        self.depth <= CBOR_DEPTH_MAX
    }

    #[inline]
    fn step_out(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }
}

/// How many items of a map or array are still to come; `None` if that shows only at its end.
struct Items(Option<usize>);

fn problem_of<E>(error: &dec::Error<E>) -> CborProblem {
    match error {
        dec::Error::Eof { .. } => CborProblem::Truncated,
        // The reader lends everything it has, so this is a definite length beyond the end of the frame.
        dec::Error::RequireLength { .. } => CborProblem::Truncated,
        dec::Error::Mismatch { .. } => CborProblem::Type,
        dec::Error::RequireUtf8 { .. } => CborProblem::Utf8,
        dec::Error::DepthOverflow { .. } => CborProblem::Depth,
        _ => CborProblem::Malformed,
    }
}

/// Where the value of each known key stands.
#[derive(Default)]
struct Fields<'a> {
    kind: Option<Cursor<'a>>,
    sender_id: Option<Cursor<'a>>,
    target_id: Option<Cursor<'a>>,
    document_id: Option<Cursor<'a>>,
    data: Option<Cursor<'a>>,
    session_id: Option<Cursor<'a>>,
    count: Option<Cursor<'a>>,
    message: Option<Cursor<'a>>,
    metadata: Option<Cursor<'a>>,
    versions: Option<Cursor<'a>>,
    selected_version: Option<Cursor<'a>>,
    add: Option<Cursor<'a>>,
    remove: Option<Cursor<'a>>,
    new_heads: Option<Cursor<'a>>,
    urls: Option<Cursor<'a>>,
    saved: Option<Cursor<'a>>,
}

impl<'a> Fields<'a> {
    fn find(frame: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Self::default();
        let mut cursor = Cursor::new(frame);
        let mut items = cursor.open("frame", true)?;
        let mut keys = 0;
        while cursor.next_item(&mut items, "frame")? {
            keys += 1;
            if keys > FRAME_KEYS_MAX {
                return Err(WireError::TooMany { field: "keys", count_max: FRAME_KEYS_MAX });
            }
            let slot = cursor.key("key")?.and_then(|key| fields.slot(key));
            let present = !cursor.is_nothing();
            if let Some(slot) = slot {
                *slot = present.then_some(cursor);
            }
            cursor.skip("value")?;
        }
        match cursor.rest {
            [] => Ok(fields),
            _ => Err(WireError::Trailing { at: cursor.at() }),
        }
    }

    fn slot(&mut self, key: &str) -> Option<&mut Option<Cursor<'a>>> {
        Some(match key {
            "type" => &mut self.kind,
            "senderId" => &mut self.sender_id,
            "targetId" => &mut self.target_id,
            "documentId" => &mut self.document_id,
            "data" => &mut self.data,
            "sessionId" => &mut self.session_id,
            "count" => &mut self.count,
            "message" => &mut self.message,
            "peerMetadata" | "metadata" => &mut self.metadata,
            "supportedProtocolVersions" => &mut self.versions,
            "selectedProtocolVersion" => &mut self.selected_version,
            "add" => &mut self.add,
            "remove" => &mut self.remove,
            "newHeads" => &mut self.new_heads,
            "urls" => &mut self.urls,
            "saved" => &mut self.saved,
            _ => return None,
        })
    }

    fn sender_id(&self) -> Result<&'a str, WireError> {
        text(self.sender_id, "senderId")
    }

    fn document(&self) -> Result<DocumentId, WireError> {
        self.document_after(&mut LastDocument::default())
    }

    fn document_after(&self, last: &mut LastDocument) -> Result<DocumentId, WireError> {
        let text = text(self.document_id, "documentId")?;
        last.read(text).map_err(|problem| WireError::Id { field: "documentId", problem })
    }

    fn metadata(&self) -> Result<PeerMetadata, WireError> {
        self.metadata.map_or_else(|| Ok(PeerMetadata::default()), peer_metadata)
    }

    fn data(&self) -> Result<&'a [u8], WireError> {
        let mut cursor = self.data.ok_or(WireError::Missing("data"))?;
        let tagged = cursor.peek().is_some_and(|byte| dec::if_major(byte) == major::TAG);
        if tagged && cursor.read::<types::Tag<types::Nothing>>("data")?.0 != TAG_BYTES {
            return Err(cursor.fail("data", CborProblem::Type));
        }
        Ok(cursor.read::<types::Bytes<&[u8]>>("data")?.0)
    }
}

pub(super) fn client_frame<'a>(
    frame: &'a [u8],
    last: &mut LastDocument,
) -> Result<ClientFrame<'a>, WireError> {
    let fields = Fields::find(frame)?;
    let kind = text(fields.kind, "type")?;
    Ok(match kind {
        "sync" | "request" => ClientFrame::Sync {
            request: kind == "request",
            sender_id: fields.sender_id()?,
            document: fields.document_after(last)?,
            data: fields.data()?,
        },
        "ephemeral" => ClientFrame::Ephemeral {
            sender_id: fields.sender_id()?,
            document: fields.document_after(last)?,
            session_id: text(fields.session_id, "sessionId")?,
            count: whole_number(fields.count, "count")?,
            data: fields.data()?,
        },
        "join" => ClientFrame::Join {
            sender_id: peer_id(fields.sender_id, "senderId")?,
            metadata: fields.metadata()?,
            versions: fields.versions.map(versions).transpose()?,
        },
        "doc-unavailable" => ClientFrame::Unavailable {
            sender_id: fields.sender_id()?,
            document: fields.document_after(last)?,
        },
        "remote-subscription-change" => ClientFrame::RemoteSubscriptionChange {
            sender_id: fields.sender_id()?,
            add: storage_ids(fields.add, "add")?,
            remove: storage_ids(fields.remove, "remove")?,
        },
        "remote-heads-changed" => ClientFrame::RemoteHeadsChanged {
            sender_id: fields.sender_id()?,
            document: fields.document_after(last)?,
            heads: remote_heads(fields.new_heads)?,
        },
        "leave" => ClientFrame::Leave { sender_id: fields.sender_id()? },
        "error" => ClientFrame::Error { message: optional_text(fields.message, "message")?.unwrap_or("") },
        kind => ClientFrame::Unknown { kind },
    })
}

pub(super) fn peer_frame(frame: &[u8]) -> Result<Option<PeerFrame>, WireError> {
    let fields = Fields::find(frame)?;
    if text(fields.kind, "type")? != "peer" {
        return Ok(None);
    }
    let version = optional_text(fields.selected_version, "selectedProtocolVersion")?;
    Ok(Some(PeerFrame {
        sender_id: peer_id(fields.sender_id, "senderId")?,
        target_id: peer_id(fields.target_id, "targetId")?,
        metadata: fields.metadata()?,
        version: version.map(str::to_owned),
    }))
}

pub(super) fn elsewhere_frame(frame: &[u8]) -> Result<Option<ElsewhereFrame>, WireError> {
    let fields = Fields::find(frame)?;
    if text(fields.kind, "type")? != "isobar-elsewhere" {
        return Ok(None);
    }
    let urls = texts(fields.urls.ok_or(WireError::Missing("urls"))?, "urls", URLS_MAX)?;
    let urls = urls.into_iter().map(str::to_owned).collect();
    Ok(Some(ElsewhereFrame { document: fields.document()?, urls }))
}

pub(super) fn receipt_frame(frame: &[u8]) -> Result<Option<ReceiptFrame>, WireError> {
    const FIELD: &str = "saved";
    let fields = Fields::find(frame)?;
    if text(fields.kind, "type")? != "isobar-receipt" {
        return Ok(None);
    }
    let mut cursor = fields.saved.ok_or(WireError::Missing(FIELD))?;
    let mut all = Vec::new();
    let mut items = cursor.open(FIELD, false)?;
    while cursor.next_item(&mut items, FIELD)? {
        if all.len() == RECEIPT_REGIONS_MAX {
            return Err(WireError::TooMany { field: FIELD, count_max: RECEIPT_REGIONS_MAX });
        }
        all.push(saved(cursor)?);
        cursor.skip(FIELD)?;
    }
    Ok(Some(ReceiptFrame { document: fields.document()?, saved: all }))
}

/// One region's part of a receipt.
fn saved(mut cursor: Cursor<'_>) -> Result<Saved, WireError> {
    const FIELD: &str = "saved";
    let (mut region, mut storage, mut heads) = (None, None, None);
    let mut items = cursor.open(FIELD, true)?;
    while cursor.next_item(&mut items, FIELD)? {
        match cursor.key(FIELD)? {
            Some("region") => region = Some(cursor),
            Some("storageId") => storage = Some(cursor),
            Some("heads") => heads = Some(cursor),
            _ => {}
        }
        cursor.skip(FIELD)?;
    }
    let region = RegionName::new(text(region, "region")?);
    Ok(Saved {
        region: region.map_err(|problem| WireError::Id { field: "region", problem })?,
        storage_id: storage_id(text(storage, "storageId")?, "storageId")?,
        heads: hashes(heads.ok_or(WireError::Missing("heads"))?)?,
    })
}

fn optional_text<'a>(value: Option<Cursor<'a>>, field: &'static str) -> Result<Option<&'a str>, WireError> {
    value.map(|mut cursor| cursor.read::<&str>(field)).transpose()
}

fn text<'a>(value: Option<Cursor<'a>>, field: &'static str) -> Result<&'a str, WireError> {
    optional_text(value, field)?.ok_or(WireError::Missing(field))
}

fn peer_id(value: Option<Cursor<'_>>, field: &'static str) -> Result<PeerId, WireError> {
    PeerId::new(text(value, field)?).map_err(|problem| WireError::Id { field, problem })
}

fn storage_id(text: &str, field: &'static str) -> Result<StorageId, WireError> {
    StorageId::new(text).map_err(|problem| WireError::Id { field, problem })
}

/// A number that is not negative and not infinite, written as an integer or a float of any width.
fn number(value: Option<Cursor<'_>>, field: &'static str) -> Result<f64, WireError> {
    let mut cursor = value.ok_or(WireError::Missing(field))?;
    let number = match cursor.peek() {
        Some(marker::F64) => cursor.read::<f64>(field)?,
        Some(marker::F32) => f64::from(cursor.read::<f32>(field)?),
        Some(marker::F16) => half_float(cursor.read::<types::F16>(field)?.0),
        Some(byte) if dec::if_major(byte) == major::NEGATIVE => return Err(WireError::Range(field)),
        _ => cursor.read::<u64>(field)? as f64,
    };
    match number.is_finite() && number >= 0.0 {
        true => Ok(number),
        false => Err(WireError::Range(field)),
    }
}

/// As [`number`], but whole, and exact up to 64 bits if it was written as an integer.
fn whole_number(value: Option<Cursor<'_>>, field: &'static str) -> Result<u64, WireError> {
    let mut cursor = value.ok_or(WireError::Missing(field))?;
    if cursor.peek().is_some_and(|byte| dec::if_major(byte) == major::UNSIGNED) {
        return cursor.read::<u64>(field);
    }
    let number = number(value, field)?;
    match number.fract() == 0.0 && number < FLOAT_INTEGERS {
        true => Ok(number as u64),
        false => Err(WireError::Range(field)),
    }
}

/// IEEE 754 binary16.
fn half_float(bits: u16) -> f64 {
    let fraction = f64::from(bits & 0x3ff);
    let magnitude = match i32::from(bits >> 10 & 0x1f) {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (1.0 + fraction / 1024.0) * 2_f64.powi(exponent - 15),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

fn peer_metadata(mut cursor: Cursor<'_>) -> Result<PeerMetadata, WireError> {
    const FIELD: &str = "peerMetadata";
    let mut metadata = PeerMetadata::default();
    let mut items = cursor.open(FIELD, true)?;
    while cursor.next_item(&mut items, FIELD)? {
        let key = cursor.key(FIELD)?;
        let value = (!cursor.is_nothing()).then_some(cursor);
        cursor.skip(FIELD)?;
        match (key, value) {
            (Some("storageId"), Some(mut value)) => {
                metadata.storage_id = Some(storage_id(value.read::<&str>("storageId")?, "storageId")?);
            }
            (Some("isEphemeral"), Some(mut value)) => {
                metadata.is_ephemeral = Some(value.read::<bool>("isEphemeral")?);
            }
            (Some("isobar"), Some(value)) => metadata.extras = extras(value).unwrap_or_default(),
            _ => {}
        }
    }
    Ok(metadata)
}

/// The extras, or nothing if another application uses the key for something else.
fn extras(mut cursor: Cursor<'_>) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut items = cursor.open("isobar", false).ok()?;
    while cursor.next_item(&mut items, "isobar").ok()? {
        let name = cursor.read::<&str>("isobar").ok()?;
        if names.len() == EXTRAS_MAX || name.len() > EXTRA_BYTES_MAX {
            return None;
        }
        names.push(name.to_owned());
    }
    Some(names)
}

/// The texts of an array, at most `count_max` of them.
fn texts<'a>(
    mut cursor: Cursor<'a>,
    field: &'static str,
    count_max: usize,
) -> Result<Vec<&'a str>, WireError> {
    let mut texts = Vec::new();
    let mut items = cursor.open(field, false)?;
    while cursor.next_item(&mut items, field)? {
        if texts.len() == count_max {
            return Err(WireError::TooMany { field, count_max });
        }
        texts.push(cursor.read::<&str>(field)?);
    }
    Ok(texts)
}

fn versions(cursor: Cursor<'_>) -> Result<Vec<&str>, WireError> {
    const VERSIONS_MAX: usize = 16;
    texts(cursor, "supportedProtocolVersions", VERSIONS_MAX)
}

fn storage_ids(value: Option<Cursor<'_>>, field: &'static str) -> Result<Vec<StorageId>, WireError> {
    let Some(cursor) = value else { return Ok(Vec::new()) };
    texts(cursor, field, REMOTE_HEADS_STORAGES_MAX)?.into_iter().map(|id| storage_id(id, field)).collect()
}

fn remote_heads(value: Option<Cursor<'_>>) -> Result<Vec<RemoteHeads>, WireError> {
    const FIELD: &str = "newHeads";
    let mut cursor = value.ok_or(WireError::Missing(FIELD))?;
    let mut all = Vec::new();
    let mut items = cursor.open(FIELD, true)?;
    while cursor.next_item(&mut items, FIELD)? {
        if all.len() == REMOTE_HEADS_STORAGES_MAX {
            return Err(WireError::TooMany { field: FIELD, count_max: REMOTE_HEADS_STORAGES_MAX });
        }
        let storage_id = storage_id(cursor.read::<&str>(FIELD)?, FIELD)?;
        let (heads, timestamp) = heads_and_timestamp(cursor)?;
        cursor.skip(FIELD)?;
        all.push(RemoteHeads { storage_id, heads, timestamp });
    }
    Ok(all)
}

fn heads_and_timestamp(mut cursor: Cursor<'_>) -> Result<(Vec<ChangeHash>, f64), WireError> {
    const FIELD: &str = "newHeads";
    let (mut heads, mut timestamp) = (None, None);
    let mut items = cursor.open(FIELD, true)?;
    while cursor.next_item(&mut items, FIELD)? {
        match cursor.key(FIELD)? {
            Some("heads") => heads = Some(cursor),
            Some("timestamp") => timestamp = Some(cursor),
            _ => {}
        }
        cursor.skip(FIELD)?;
    }
    let heads = hashes(heads.ok_or(WireError::Missing("heads"))?)?;
    Ok((heads, number(timestamp, "timestamp")?))
}

fn hashes(cursor: Cursor<'_>) -> Result<Vec<ChangeHash>, WireError> {
    texts(cursor, "heads", SYNC_HASHES_MAX)?
        .into_iter()
        .map(|head| ChangeHash::from_text(head).map_err(|problem| WireError::Id { field: "heads", problem }))
        .collect()
}
