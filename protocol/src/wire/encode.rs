//! Writing frames, both a server's and a client's.

use cbor4ii::core::enc::{Encode, Write};
use cbor4ii::core::types::{Array, Bytes, Map};

use super::{PROTOCOL_VERSION, PeerMetadata, RemoteHeads, Saved};
use crate::ids::{DocumentId, PeerId, StorageId};
use crate::sync_message::SyncMessage;

/// The longest header of a CBOR text or byte string.
const HEADER_BYTES_MAX: usize = 9;

/// A frame under construction.
struct Frame(Vec<u8>);

impl Write for Frame {
    type Error = std::convert::Infallible;

    fn push(&mut self, input: &[u8]) -> Result<(), Self::Error> {
        self.0.extend_from_slice(input);
        Ok(())
    }
}

const IN_MEMORY: &str = "a write to memory does not fail";

impl Frame {
    /// Begins a map of `keys` keys, of which the first is the type.
    fn new(keys: usize, kind: &str, capacity: usize) -> Self {
        let mut frame = Self(Vec::with_capacity(capacity));
        frame.map(keys);
        frame.pair("type", kind);
        frame
    }

    fn put(&mut self, value: impl Encode) {
        value.encode(self).expect(IN_MEMORY);
    }

    fn pair(&mut self, key: &str, value: impl Encode) {
        self.put(key);
        self.put(value);
    }

    fn map(&mut self, keys: usize) {
        Map::bounded(keys, self).expect(IN_MEMORY);
    }

    fn array(&mut self, items: usize) {
        Array::bounded(items, self).expect(IN_MEMORY);
    }

    /// A number as JavaScript has it: an integer of 32 bits, else a float.
    fn number(&mut self, key: &str, value: u64) {
        match u32::try_from(value) {
            Ok(value) => self.pair(key, value),
            Err(_) => self.pair(key, value as f64),
        }
    }

    fn metadata(&mut self, metadata: &PeerMetadata) {
        let PeerMetadata { storage_id, is_ephemeral, extras } = metadata;
        let keys = [storage_id.is_some(), is_ephemeral.is_some(), !extras.is_empty()];
        self.put("peerMetadata");
        self.map(keys.into_iter().filter(|present| *present).count());
        if let Some(storage_id) = storage_id {
            self.pair("storageId", storage_id.as_str());
        }
        if let Some(is_ephemeral) = is_ephemeral {
            self.pair("isEphemeral", *is_ephemeral);
        }
        if !extras.is_empty() {
            self.pair("isobar", extras.as_slice());
        }
    }

    fn storage_ids(&mut self, key: &str, ids: &[StorageId]) {
        self.put(key);
        self.array(ids.len());
        for id in ids {
            self.put(id.as_str());
        }
    }
}

/// The server's answer to a join.
pub fn encode_peer(sender: &PeerId, target: &PeerId, metadata: &PeerMetadata) -> Vec<u8> {
    let mut frame = Frame::new(5, "peer", 256);
    frame.pair("senderId", sender.as_str());
    frame.metadata(metadata);
    frame.pair("selectedProtocolVersion", PROTOCOL_VERSION);
    frame.pair("targetId", target.as_str());
    frame.0
}

/// A client's first frame.
pub fn encode_join(sender: &PeerId, metadata: &PeerMetadata) -> Vec<u8> {
    let mut frame = Frame::new(4, "join", 256);
    frame.pair("senderId", sender.as_str());
    frame.metadata(metadata);
    frame.put("supportedProtocolVersions");
    frame.array(1);
    frame.put(PROTOCOL_VERSION);
    frame.0
}

/// Why the sender is about to close the connection.
pub fn encode_error(sender: &str, target: &str, message: &str) -> Vec<u8> {
    let mut frame = Frame::new(4, "error", 128 + message.len());
    frame.pair("senderId", sender);
    frame.pair("message", message);
    frame.pair("targetId", target);
    frame.0
}

/// The document is not to be had here.
pub fn encode_unavailable(sender: &PeerId, target: &PeerId, document: &DocumentId) -> Vec<u8> {
    let mut frame = Frame::new(4, "doc-unavailable", 192);
    frame.pair("senderId", sender.as_str());
    frame.pair("documentId", document.to_string().as_str());
    frame.pair("targetId", target.as_str());
    frame.0
}

/// Where a document is that is not to be had here; for clients that announced it.
pub fn encode_elsewhere(sender: &PeerId, target: &PeerId, document: &DocumentId, urls: &[String]) -> Vec<u8> {
    let mut frame = Frame::new(5, "isobar-elsewhere", 256 + 64 * urls.len());
    frame.pair("senderId", sender.as_str());
    frame.pair("documentId", document.to_string().as_str());
    frame.put("urls");
    frame.array(urls.len());
    for url in urls {
        frame.put(url.as_str());
    }
    frame.pair("targetId", target.as_str());
    frame.0
}

/// Which regions hold a document up to which heads; for clients that announced it.
pub fn encode_receipt(sender: &PeerId, target: &PeerId, document: &DocumentId, saved: &[Saved]) -> Vec<u8> {
    let mut frame = Frame::new(5, "isobar-receipt", 256 + 192 * saved.len());
    frame.pair("senderId", sender.as_str());
    frame.pair("documentId", document.to_string().as_str());
    frame.put("saved");
    frame.array(saved.len());
    for Saved { region, storage_id, heads } in saved {
        frame.map(3);
        frame.pair("region", region.as_str());
        frame.pair("storageId", storage_id.as_str());
        frame.put("heads");
        frame.array(heads.len());
        for head in heads {
            frame.put(head.to_text().as_str());
        }
    }
    frame.pair("targetId", target.as_str());
    frame.0
}

/// A message that is never stored, from its author by way of anyone to `target`. `data` must not be empty: the
/// JavaScript side refuses that.
pub fn encode_ephemeral(
    sender: &str,
    target: &PeerId,
    document: &DocumentId,
    session_id: &str,
    count: u64,
    data: &[u8],
) -> Vec<u8> {
    let mut frame = Frame::new(7, "ephemeral", 256 + data.len());
    frame.pair("senderId", sender);
    frame.pair("documentId", document.to_string().as_str());
    frame.pair("sessionId", session_id);
    frame.number("count", count);
    frame.pair("data", Bytes(data));
    frame.pair("targetId", target.as_str());
    frame.0
}

/// Storages to be told about from now on, and no longer.
pub fn encode_remote_subscription_change(
    sender: &PeerId,
    target: &PeerId,
    add: &[StorageId],
    remove: &[StorageId],
) -> Vec<u8> {
    let mut frame = Frame::new(5, "remote-subscription-change", 256);
    frame.pair("senderId", sender.as_str());
    frame.storage_ids("add", add);
    frame.storage_ids("remove", remove);
    frame.pair("targetId", target.as_str());
    frame.0
}

/// What storages hold of a document.
pub fn encode_remote_heads_changed(
    sender: &PeerId,
    target: &PeerId,
    document: &DocumentId,
    heads: &[RemoteHeads],
) -> Vec<u8> {
    let mut frame = Frame::new(5, "remote-heads-changed", 256 + 128 * heads.len());
    frame.pair("senderId", sender.as_str());
    frame.pair("documentId", document.to_string().as_str());
    frame.put("newHeads");
    frame.map(heads.len());
    for remote in heads {
        frame.put(remote.storage_id.as_str());
        frame.map(2);
        frame.put("heads");
        frame.array(remote.heads.len());
        for head in &remote.heads {
            frame.put(head.to_text().as_str());
        }
        frame.pair("timestamp", remote.timestamp);
    }
    frame.pair("targetId", target.as_str());
    frame.0
}

/// A sync message; `request` if the sender has nothing of the document. `data` must not be empty.
pub fn encode_sync(
    request: bool,
    sender: &PeerId,
    target: &PeerId,
    document: &DocumentId,
    data: &[u8],
) -> Vec<u8> {
    let kind = if request { "request" } else { "sync" };
    let mut frame = Frame::new(5, kind, 192 + data.len());
    frame.pair("senderId", sender.as_str());
    frame.pair("documentId", document.to_string().as_str());
    frame.pair("data", Bytes(data));
    frame.pair("targetId", target.as_str());
    frame.0
}

/// A sync frame built once for many recipients: only the target differs, and it stands last.
#[derive(Debug, Clone)]
pub struct SharedSyncFrame {
    /// Everything up to and including the key of the target.
    prefix: Vec<u8>,
}

impl SharedSyncFrame {
    pub fn new(sender: &PeerId, document: &DocumentId, message: &SyncMessage) -> Self {
        let message_bytes = message.encoded_bytes();
        let mut frame = Frame::new(5, "sync", 192 + message_bytes);
        frame.pair("senderId", sender.as_str());
        frame.pair("documentId", document.to_string().as_str());
        frame.put("data");
        Bytes::bounded(message_bytes, &mut frame).expect(IN_MEMORY);
        let data_start = frame.0.len();
        message.encode_into(&mut frame.0);
        assert_eq!(
            frame.0.len() - data_start,
            message_bytes,
            "a message's length is known before it is written"
        );
        frame.put("targetId");
        Self { prefix: frame.0 }
    }

    /// The frame for one recipient.
    pub fn for_target(&self, target: &PeerId) -> Vec<u8> {
        let capacity = self.prefix.len() + text_header_bytes(target.as_str()) + target.as_str().len();
        let mut frame = Frame(Vec::with_capacity(capacity));
        frame.0.extend_from_slice(&self.prefix);
        frame.put(target.as_str());
        frame.0
    }
}

fn text_header_bytes(text: &str) -> usize {
    match text.len() {
        0..=0x17 => 1,
        0x18..=0xff => 2,
        0x100..=0xffff => 3,
        _ => HEADER_BYTES_MAX,
    }
}
