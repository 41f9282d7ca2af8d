//! The client frames of the automerge-repo protocol and the sync messages inside them, as far as a load
//! generator needs them: what a stock client sends, and the few fields of what a server answers.
//!
//! This codec is deliberately the benchmark's own. It shares no code with the server under test, so that a
//! mistake in one does not hide in the other, and it reads only what it needs, so that the generator stays light.
//! It trusts its input to come from a server under test: bad input is an error, never a panic.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;

/// A change hash as it travels.
pub type Hash = [u8; 32];

/// What the generator reads of a frame from the server.
#[derive(Debug, PartialEq, Eq)]
pub enum ServerFrame<'a> {
    /// The handshake's answer.
    Peer { sender: &'a str },
    /// A sync message for the document of this text id.
    Sync { document: &'a str, data: &'a [u8] },
    /// The server does not have the document.
    Unavailable { document: &'a str },
    /// The server refused something and will close.
    Error { message: &'a str },
    /// Everything that does not concern a load generator.
    Other,
}

/// Reads one frame. Unknown keys are skipped.
pub fn decode(frame: &[u8]) -> Result<ServerFrame<'_>> {
    let mut reader = Cbor { rest: frame };
    let (mut kind, mut sender, mut document, mut message, mut data) = ("", "", "", "", &[][..]);
    let mut entries = reader.map_length()?;
    while reader.another(&mut entries)? {
        match reader.text()? {
            "type" => kind = reader.text()?,
            "senderId" => sender = reader.text()?,
            "documentId" => document = reader.text()?,
            "message" => message = reader.text()?,
            "data" => data = reader.bytes()?,
            _ => reader.skip(0)?,
        }
    }
    Ok(match kind {
        "peer" => ServerFrame::Peer { sender },
        "sync" | "request" => ServerFrame::Sync { document, data },
        "doc-unavailable" => ServerFrame::Unavailable { document },
        "error" => ServerFrame::Error { message },
        _ => ServerFrame::Other,
    })
}

/// A cursor over CBOR. Definite and indefinite maps, definite strings, and a tag before a byte string.
struct Cbor<'a> {
    rest: &'a [u8],
}

impl<'a> Cbor<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        ensure!(length <= self.rest.len(), "the frame ends early");
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        Ok(taken)
    }

    /// The major type and argument of the next item; `None` as argument for an indefinite length.
    fn head(&mut self) -> Result<(u8, Option<u64>)> {
        let initial = self.take(1)?[0];
        let argument = match initial & 0x1f {
            small @ 0..=23 => Some(u64::from(small)),
            size @ 24..=27 => {
                let bytes = self.take(1 << (size - 24))?;
                Some(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
            }
            31 => None,
            _ => bail!("reserved CBOR length"),
        };
        Ok((initial >> 5, argument))
    }

    fn map_length(&mut self) -> Result<Option<u64>> {
        let (major, length) = self.head()?;
        ensure!(major == 5, "the frame is not a map");
        Ok(length)
    }

    /// Whether the map has another entry; counts it.
    fn another(&mut self, entries: &mut Option<u64>) -> Result<bool> {
        match entries {
            Some(0) => Ok(false),
            Some(left) => {
                *left -= 1;
                Ok(true)
            }
            None if self.rest.first() == Some(&0xff) => Ok(false),
            None => Ok(true),
        }
    }

    fn text(&mut self) -> Result<&'a str> {
        let (major, length) = self.head()?;
        ensure!(major == 3, "expected a text");
        let bytes = self.take(length.context("indefinite text")? as usize)?;
        std::str::from_utf8(bytes).context("text is not UTF-8")
    }

    fn bytes(&mut self) -> Result<&'a [u8]> {
        let (mut major, mut length) = self.head()?;
        if major == 6 {
            (major, length) = self.head()?;
        }
        ensure!(major == 2, "expected bytes");
        self.take(length.context("indefinite bytes")? as usize)
    }

    fn skip(&mut self, depth: u32) -> Result<()> {
        ensure!(depth < 32, "the frame nests too deeply");
        let (major, argument) = self.head()?;
        match (major, argument) {
            (0 | 1 | 7, Some(_)) => {}
            (2 | 3, Some(length)) => drop(self.take(length as usize)?),
            (4, Some(length)) => (0..length).try_for_each(|_| self.skip(depth + 1))?,
            (5, Some(length)) => (0..length.saturating_mul(2)).try_for_each(|_| self.skip(depth + 1))?,
            (6, Some(_)) => self.skip(depth + 1)?,
            (4 | 5, None) => {
                while self.rest.first() != Some(&0xff) {
                    self.skip(depth + 1)?;
                }
                self.take(1)?;
            }
            _ => bail!("indefinite strings are not expected from a server"),
        }
        Ok(())
    }
}

fn cbor_head(out: &mut Vec<u8>, major: u8, length: usize) {
    let major = major << 5;
    match length {
        0..=23 => out.push(major | length as u8),
        24..=0xff => out.extend([major | 24, length as u8]),
        0x100..=0xffff => {
            out.push(major | 25);
            out.extend((length as u16).to_be_bytes());
        }
        _ => {
            out.push(major | 26);
            out.extend((length as u32).to_be_bytes());
        }
    }
}

fn cbor_text(out: &mut Vec<u8>, text: &str) {
    cbor_head(out, 3, text.len());
    out.extend(text.as_bytes());
}

/// The handshake of a client without storage of its own; with `gathers_answers`, of one that announces that extra.
pub fn encode_join(sender: &str, gathers_answers: bool) -> Bytes {
    let mut out = Vec::with_capacity(128);
    cbor_head(&mut out, 5, 4);
    for text in ["type", "join", "senderId", sender, "peerMetadata"] {
        cbor_text(&mut out, text);
    }
    cbor_head(&mut out, 5, 1 + usize::from(gathers_answers));
    cbor_text(&mut out, "isEphemeral");
    out.push(0xf5);
    if gathers_answers {
        cbor_text(&mut out, "isobar");
        cbor_head(&mut out, 4, 1);
        cbor_text(&mut out, "gathered-answers");
    }
    cbor_text(&mut out, "supportedProtocolVersions");
    cbor_head(&mut out, 4, 1);
    cbor_text(&mut out, "1");
    out.into()
}

/// Who speaks to whom about what: the fields that every sync frame of a session repeats.
#[derive(Debug, Clone, Copy)]
pub struct Envelope<'a> {
    pub sender: &'a str,
    pub target: &'a str,
    pub document: &'a str,
}

/// A `request` (when `is_request`) or `sync` frame around a sync message.
pub fn encode_sync(envelope: Envelope<'_>, is_request: bool, message: &SyncMessage<'_>) -> Bytes {
    let data = message.encode();
    let mut out = Vec::with_capacity(data.len() + 192);
    cbor_head(&mut out, 5, 5);
    let kind = if is_request { "request" } else { "sync" };
    for text in ["type", kind, "senderId", envelope.sender, "targetId", envelope.target] {
        cbor_text(&mut out, text);
    }
    for text in ["documentId", envelope.document, "data"] {
        cbor_text(&mut out, text);
    }
    cbor_head(&mut out, 2, data.len());
    out.extend(data);
    out.into()
}

/// A sync message as a stock client writes it, with at most one `have`.
#[derive(Debug, Default)]
pub struct SyncMessage<'a> {
    /// True for the second version, whose changes may be whole documents.
    pub is_v2: bool,
    pub heads: &'a [Hash],
    pub need: &'a [Hash],
    /// The last synchronised heads, and an encoded Bloom filter of what this client has beyond them.
    pub have: Option<(&'a [Hash], &'a [u8])>,
    pub changes: &'a [Bytes],
}

impl SyncMessage<'_> {
    fn encode(&self) -> Vec<u8> {
        let changes: usize = self.changes.iter().map(|change| change.len() + 5).sum();
        let mut out = Vec::with_capacity(128 + changes);
        out.push(if self.is_v2 { 0x43 } else { 0x42 });
        put_hashes(&mut out, self.heads);
        put_hashes(&mut out, self.need);
        match self.have {
            Some((last_sync, bloom)) => {
                out.push(1);
                put_hashes(&mut out, last_sync);
                put_leb(&mut out, bloom.len() as u64);
                out.extend(bloom);
            }
            None => out.push(0),
        }
        put_leb(&mut out, self.changes.len() as u64);
        for change in self.changes {
            put_leb(&mut out, change.len() as u64);
            out.extend(change);
        }
        // The flags: second version supported, sync reset understood.
        out.extend([2, 2, 0x84]);
        out
    }
}

fn put_leb(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_hashes(out: &mut Vec<u8>, hashes: &[Hash]) {
    put_leb(out, hashes.len() as u64);
    for hash in hashes {
        out.extend(hash);
    }
}

/// What the generator reads of a sync message.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReceivedSync<'a> {
    pub heads: Vec<Hash>,
    pub need: Vec<Hash>,
    /// Each entry may hold several chunks.
    pub changes: Vec<&'a [u8]>,
}

/// Reads a sync message; `have` and flags are skipped.
pub fn decode_sync(data: &[u8]) -> Result<ReceivedSync<'_>> {
    let mut reader = Leb { rest: data };
    let version = reader.take(1)?[0];
    ensure!(version == 0x42 || version == 0x43, "unknown sync message version {version:#x}");
    let heads = reader.hashes()?;
    let need = reader.hashes()?;
    for _ in 0..reader.number()? {
        reader.hashes()?;
        let bloom_bytes = reader.number()?;
        reader.take(bloom_bytes)?;
    }
    let count = reader.number()?;
    let mut changes = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        let length = reader.number()?;
        changes.push(reader.take(length)?);
    }
    Ok(ReceivedSync { heads, need, changes })
}

/// A cursor over LEB128 numbers and what they count.
struct Leb<'a> {
    rest: &'a [u8],
}

impl<'a> Leb<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        ensure!(length <= self.rest.len(), "the message ends early");
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<usize> {
        let (mut value, mut shift) = (0_u64, 0);
        loop {
            let byte = self.take(1)?[0];
            ensure!(shift < 63, "number too long");
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return Ok(usize::try_from(value)?);
            }
        }
    }

    fn hashes(&mut self) -> Result<Vec<Hash>> {
        let count = self.number()?;
        ensure!(count <= self.rest.len() / 32, "the message ends early");
        (0..count).map(|_| Ok(self.take(32)?.try_into()?)).collect()
    }
}

/// One chunk of a change list.
#[derive(Debug, PartialEq, Eq)]
pub enum Chunk {
    /// A change; its checksum is the first four bytes of its hash.
    Change { checksum: [u8; 4] },
    /// A whole document with these heads.
    Document { heads: Vec<Hash> },
    /// A kind that the generator has no use for.
    Other,
}

/// Calls `visit` for each chunk of an entry, without reading further than the chunk's head.
pub fn for_each_chunk(entry: &[u8], mut visit: impl FnMut(Chunk)) -> Result<()> {
    let mut reader = Leb { rest: entry };
    while !reader.rest.is_empty() {
        ensure!(reader.take(4)? == [0x85, 0x6f, 0x4a, 0x83], "not an Automerge chunk");
        let checksum = reader.take(4)?.try_into()?;
        let kind = reader.take(1)?[0];
        let length = reader.number()?;
        let body = reader.take(length)?;
        visit(match kind {
            0 => Chunk::Document { heads: document_heads(body)? },
            1 | 2 => Chunk::Change { checksum },
            _ => Chunk::Other,
        });
    }
    Ok(())
}

fn document_heads(body: &[u8]) -> Result<Vec<Hash>> {
    let mut reader = Leb { rest: body };
    for _ in 0..reader.number()? {
        let actor_bytes = reader.number()?;
        reader.take(actor_bytes)?;
    }
    reader.hashes()
}

#[cfg(test)]
mod tests {
    use automerge::sync::{BloomFilter, Message};
    use automerge::transaction::Transactable;
    use automerge::{AutoCommit, ROOT};

    use super::*;

    #[test]
    fn automerge_reads_what_is_encoded() {
        let bloom = BloomFilter::from_hashes([automerge::ChangeHash([3; 32])].iter()).to_bytes();
        let message = SyncMessage {
            is_v2: false,
            heads: &[[1; 32]],
            need: &[[2; 32]],
            have: Some((&[[3; 32]], &bloom)),
            changes: &[Bytes::from_static(b"abc")],
        };
        let decoded = Message::decode(&message.encode()).unwrap();
        assert_eq!(decoded.heads, [automerge::ChangeHash([1; 32])]);
        assert_eq!(decoded.need, [automerge::ChangeHash([2; 32])]);
        assert_eq!(decoded.have[0].last_sync, [automerge::ChangeHash([3; 32])]);
        assert_eq!(decoded.have[0].bloom.to_bytes(), bloom);
        assert!(decoded.flags.is_some());
        assert_eq!(decoded.encode(), message.encode());
    }

    #[test]
    fn a_frame_survives_the_round_trip_and_unknown_keys_are_skipped() {
        let envelope = Envelope { sender: "a", target: "b", document: "d" };
        let message = SyncMessage { heads: &[[1; 32]], ..SyncMessage::default() };
        let frame = encode_sync(envelope, false, &message);
        let ServerFrame::Sync { document: "d", data } = decode(&frame).unwrap() else { panic!("not a sync") };
        assert_eq!(decode_sync(data).unwrap().heads, [[1; 32]]);

        let indefinite = b"\xbf\x65extra\x82\x01\xf7\x64type\x64peer\x68senderId\x61s\xff";
        assert_eq!(decode(indefinite).unwrap(), ServerFrame::Peer { sender: "s" });
        assert!(decode(&frame[..frame.len() - 1]).is_err());
        assert!(decode_sync(&data[..data.len() / 2]).is_err());
    }

    #[test]
    fn chunks_are_told_apart_by_their_heads_and_checksums() {
        let mut document = AutoCommit::new();
        document.put(ROOT, "key", 1).unwrap();
        document.commit();
        let hash = document.get_heads()[0];
        let change = document.get_last_local_change().unwrap().raw_bytes().to_vec();
        let entry = [document.save(), change].concat();

        let mut chunks = Vec::new();
        for_each_chunk(&entry, |chunk| chunks.push(chunk)).unwrap();
        let checksum = hash.0[..4].try_into().unwrap();
        assert_eq!(chunks, [Chunk::Document { heads: vec![hash.0] }, Chunk::Change { checksum }]);
        assert!(for_each_chunk(&entry[..entry.len() - 1], |_| {}).is_err());
    }
}
