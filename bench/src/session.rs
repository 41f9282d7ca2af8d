//! What a client says: one document, one connection, no sockets.
//!
//! Each dialect answers as its stock client does, without ever applying a change: it notes which links of the
//! document's chain have arrived, and derives heads and answers from that.
//!
//! - [`Dialect::Automerge`] follows Automerge's own rules for when a sync message is answered (`generate` in
//!   automerge's `sync.rs`): whenever the heads moved, or the server's view differs and nothing is in flight.
//! - [`Dialect::AutomergeGathered`] announces Isobar's extra `gathered-answers`, as Isobar's own client does.
//! - [`Dialect::Yjs`] is a y-sync client: sync steps 1 and 2, then updates, which nobody answers. Presence is left
//!   out, as it is for Automerge. After each of its own updates it asks for a sync status, as y-sweet's client does.
//! - [`Dialect::Bare`] relays the Automerge frames over the bare server, whose frames begin with one byte that says
//!   whether it is to be broadcast; `answers` tells whether readers send what a stock Automerge client would.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use automerge::ChangeHash;
use automerge::sync::BloomFilter;
use bytes::Bytes;
use yrs::Update;
use yrs::updates::decoder::Decode;

use crate::frames::{self, Chunk, Envelope, Hash, ServerFrame, SyncMessage};
use crate::workload::Document;

/// The language of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Automerge,
    /// The same, with answers gathered: see [`Session::gathered_answer`].
    AutomergeGathered,
    Yjs,
    Bare {
        answers: bool,
    },
}

/// First byte of a frame for the bare server: for everybody else in the room.
pub const BARE_BROADCAST: u8 = 1;
/// First byte of a frame for the bare server: read and dropped.
pub const BARE_ANSWER: u8 = 0;

/// A client of one document.
pub struct Session {
    dialect: Dialect,
    peer_id: String,
    server_id: String,
    document: Document,
    /// How many links of the chain are held without a gap.
    held: u32,
    held_at_first: u32,
    /// Links that arrived before their dependencies.
    beyond: BTreeSet<u32>,
    /// How many links the server has acknowledged.
    acknowledged: u32,
    joined: bool,
    unavailable: bool,
    automerge: AutomergeState,
    is_answer_due: bool,
    /// Whole-document bytes that arrived, when the session was told to keep them.
    kept: Option<Vec<Bytes>>,
}

/// Automerge's sync state, as far as a linear history needs it. Heads are positions in the chain.
#[derive(Default)]
struct AutomergeState {
    shared: u32,
    last_sent: Option<u32>,
    theirs: Option<u32>,
    in_flight: bool,
    /// Own links up to here have been sent.
    sent: u32,
}

impl Session {
    /// `holds` links are there from the start: 1 for who uploads the document, 0 for who asks for it.
    pub fn new(dialect: Dialect, peer_id: String, document: Document, holds: u32) -> Self {
        let holds = if matches!(dialect, Dialect::Bare { .. }) { holds.max(1) } else { holds };
        Self {
            dialect,
            peer_id,
            server_id: "bare".to_owned(),
            document,
            held: holds,
            held_at_first: holds,
            beyond: BTreeSet::new(),
            acknowledged: 0,
            joined: false,
            unavailable: false,
            automerge: AutomergeState::default(),
            is_answer_due: false,
            kept: None,
        }
    }

    /// The same client before it connected.
    pub fn afresh(&self) -> Self {
        Self::new(self.dialect, self.peer_id.clone(), self.document.clone(), self.held_at_first)
    }

    /// Keeps what arrives as document content, for verification.
    pub fn keep_content(mut self) -> Self {
        self.kept = Some(Vec::new());
        self
    }

    pub fn kept(&self) -> &[Bytes] {
        self.kept.as_deref().unwrap_or_default()
    }

    pub fn held(&self) -> u32 {
        self.held
    }

    pub fn acknowledged(&self) -> u32 {
        self.acknowledged
    }

    /// Whether the document is here: downloaded, or uploaded and acknowledged.
    pub fn is_joined(&self) -> bool {
        self.joined
    }

    /// Whether the server has said that it does not have the document. Who has it need not care: stock servers say so
    /// to an uploader whose document they do not know yet.
    pub fn is_unavailable(&self) -> bool {
        self.unavailable
    }

    pub fn document(&self) -> &Document {
        &self.document
    }

    /// The first frames of a connection.
    pub fn open(&mut self, out: &mut Vec<Bytes>) {
        match self.dialect {
            Dialect::Automerge => out.push(frames::encode_join(&self.peer_id, false)),
            Dialect::AutomergeGathered => out.push(frames::encode_join(&self.peer_id, true)),
            // Sync step 1 with an empty state vector, or with what the uploader holds: one client, one clock.
            Dialect::Yjs => out.push(Bytes::from_static(&[0, 0, 1, 0])),
            Dialect::Bare { .. } => self.joined = true,
        }
    }

    /// Takes a frame from the server and adds what a stock client would send in return.
    pub fn receive(&mut self, frame: &Bytes, out: &mut Vec<Bytes>) -> Result<()> {
        match self.dialect {
            Dialect::Yjs => self.receive_yjs(frame, out),
            _ => self.receive_automerge(frame, out),
        }
    }

    /// Makes the next edit: the link after those held.
    ///
    /// # Panics
    /// If the chain is at its end.
    pub fn edit(&mut self, out: &mut Vec<Bytes>) {
        let at = self.held;
        let link = self.document.chain.link(at);
        match self.dialect {
            Dialect::Yjs => {
                out.push(yjs_message(2, &link.update));
                self.held += 1;
                out.push(yjs_status(self.held));
            }
            _ => {
                let change = [link.chunk.clone()];
                if matches!(self.dialect, Dialect::Bare { .. }) {
                    // Nobody acknowledges here; without this, the Bloom filter would grow with every edit.
                    self.automerge.shared = self.held;
                }
                self.held += 1;
                self.send_automerge(false, &change, out);
            }
        }
    }

    fn hold(&mut self, at: u32) {
        if at < self.held {
            return;
        }
        self.beyond.insert(at);
        while self.beyond.remove(&self.held) {
            self.held += 1;
        }
    }

    fn hold_through(&mut self, at: u32) {
        self.held = self.held.max(at + 1);
        self.beyond = self.beyond.split_off(&self.held);
        while self.beyond.remove(&self.held) {
            self.held += 1;
        }
    }

    // Automerge

    fn receive_automerge(&mut self, frame: &Bytes, out: &mut Vec<Bytes>) -> Result<()> {
        let frame = match self.dialect {
            Dialect::Bare { .. } => frame.get(1..).context("an empty frame")?,
            _ => &frame[..],
        };
        match frames::decode(frame)? {
            ServerFrame::Peer { sender } => {
                self.server_id = sender.to_owned();
                self.send_automerge(self.held == 0, &[], out);
            }
            ServerFrame::Sync { document, data } if document == &*self.document.id => {
                self.receive_sync(data, out)?;
            }
            ServerFrame::Unavailable { document } if document == &*self.document.id => {
                self.unavailable = true
            }
            ServerFrame::Error { message } => bail!("the server refused: {message}"),
            _ => {}
        }
        Ok(())
    }

    fn receive_sync(&mut self, data: &[u8], out: &mut Vec<Bytes>) -> Result<()> {
        let message = frames::decode_sync(data)?;
        let held_before = self.held;
        for entry in &message.changes {
            if let Some(kept) = &mut self.kept {
                kept.push(Bytes::copy_from_slice(entry));
            }
            self.receive_chunks(entry)?;
        }
        let theirs = self.position_of(&message.heads);
        if self.dialect == (Dialect::Bare { answers: false }) {
            return Ok(());
        }
        self.automerge.in_flight = false;
        self.automerge.theirs = theirs;
        if let Some(theirs) = theirs.filter(|theirs| *theirs <= self.held) {
            self.automerge.shared = theirs;
            self.acknowledged = self.acknowledged.max(theirs);
            self.joined |= theirs > 0;
            if theirs == 0 {
                // The server lost everything, or never had it: all is to be sent again.
                (self.automerge.last_sent, self.automerge.sent) = (None, 0);
            }
        }
        self.answer(held_before, &message.need, out);
        Ok(())
    }

    fn receive_chunks(&mut self, entry: &[u8]) -> Result<()> {
        let chain = Arc::clone(&self.document.chain);
        frames::for_each_chunk(entry, |chunk| match chunk {
            // Link 0 may come as its many changes: its last one stands for it.
            Chunk::Change { checksum } => {
                if let Some(at) = chain.find_checksum(checksum) {
                    self.hold(at);
                }
            }
            Chunk::Document { heads } => {
                for at in heads.iter().filter_map(|hash| chain.find_hash(hash)) {
                    self.hold_through(at);
                }
            }
            Chunk::Other => {}
        })
    }

    /// The position that heads stand for; `None` if a head is unknown.
    fn position_of(&self, heads: &[Hash]) -> Option<u32> {
        let positions = heads.iter().map(|hash| self.document.chain.find_hash(hash).map(|at| at + 1));
        positions.collect::<Option<Vec<_>>>().map(|positions| positions.into_iter().max().unwrap_or(0))
    }

    fn answer(&mut self, held_before: u32, need: &[Hash], out: &mut Vec<Bytes>) {
        let unsent = self.automerge.theirs == Some(0) && self.automerge.sent == 0 && self.held > 0;
        let changes = if unsent || self.is_link_zero_needed(need) {
            vec![self.document.chain.link(0).chunk.clone()]
        } else {
            Vec::new()
        };
        let unchanged = self.automerge.last_sent == Some(self.held);
        let in_step = self.automerge.theirs == Some(self.held) && changes.is_empty();
        if unchanged && held_before == self.held && (in_step || self.automerge.in_flight) {
            return;
        }
        if self.dialect == Dialect::AutomergeGathered && self.joined && changes.is_empty() {
            self.is_answer_due = true;
            return;
        }
        self.send_automerge(false, &changes, out);
    }

    /// Answers, once, what was received since the last answer. For clients that gather their answers, to be called about
    /// once a second; does nothing for all others.
    pub fn gathered_answer(&mut self, out: &mut Vec<Bytes>) {
        if std::mem::take(&mut self.is_answer_due) {
            self.send_automerge(false, &[], out);
        }
    }

    fn is_link_zero_needed(&self, need: &[Hash]) -> bool {
        self.held > 0 && self.automerge.sent == 0 && need.contains(&self.document.chain.link(0).hash)
    }

    fn send_automerge(&mut self, is_request: bool, changes: &[Bytes], out: &mut Vec<Bytes>) {
        let chain = &self.document.chain;
        let missing = match self.automerge.theirs {
            Some(theirs) if theirs > self.held => (self.held..theirs).find(|at| !self.beyond.contains(at)),
            _ => None,
        };
        let need: &[Hash] = match missing {
            Some(at) => std::slice::from_ref(&chain.link(at).hash),
            None => &[],
        };
        let shared = chain.heads(self.automerge.shared);
        let bloom = bloom_of(&self.document, self.automerge.shared, self.held);
        let is_need_their_head = missing.is_none_or(|at| Some(at + 1) == self.automerge.theirs);
        let message = SyncMessage {
            is_v2: changes.first().is_some_and(|chunk| chunk.get(8) == Some(&0)),
            heads: chain.heads(self.held),
            need,
            have: is_need_their_head.then_some((shared, &bloom[..])),
            changes,
        };
        let envelope =
            Envelope { sender: &self.peer_id, target: &self.server_id, document: &self.document.id };
        let frame = frames::encode_sync(envelope, is_request, &message);
        if !changes.is_empty() {
            self.automerge.sent = self.held;
        }
        self.automerge.last_sent = Some(self.held);
        self.automerge.in_flight = true;
        out.push(match self.dialect {
            Dialect::Bare { .. } if changes.is_empty() => prefixed(BARE_ANSWER, &frame),
            Dialect::Bare { .. } => prefixed(BARE_BROADCAST, &frame),
            _ => frame,
        });
    }

    // Yjs

    fn receive_yjs(&mut self, frame: &Bytes, out: &mut Vec<Bytes>) -> Result<()> {
        let mut rest = &frame[..];
        match take_varint(&mut rest)? {
            0 => {}
            102 => {
                let mut payload = take_buffer(&mut rest)?;
                self.acknowledged = self.acknowledged.max(take_varint(&mut payload)? as u32);
                self.joined = true;
                return Ok(());
            }
            _ => return Ok(()),
        }
        let kind = take_varint(&mut rest)?;
        let payload = take_buffer(&mut rest)?;
        match kind {
            0 if self.held > 0 => {
                // The uploader answers the server's state vector with what it has, and asks for a confirmation.
                out.push(yjs_message(1, &self.document.chain.link(0).update));
                out.push(yjs_status(self.held));
            }
            0 => out.push(yjs_message(1, &[0, 0])),
            1 if self.held == 0 => {
                if let Some(kept) = &mut self.kept {
                    kept.push(Bytes::copy_from_slice(payload));
                }
                let state = Update::decode_v1(payload)?.state_vector();
                self.held = self.document.chain.position_at(&state);
                self.joined = true;
            }
            2 => self.receive_update(payload)?,
            _ => {}
        }
        Ok(())
    }

    fn receive_update(&mut self, mut update: &[u8]) -> Result<()> {
        let is_single = take_varint(&mut update)? == 1 && take_varint(&mut update)? == 1;
        if is_single {
            take_varint(&mut update)?;
            let clock = take_varint(&mut update)?;
            if let Some(at) = self.document.chain.position_at_clock(clock + 1).checked_sub(1) {
                self.hold(at);
            }
        }
        Ok(())
    }
}

fn prefixed(first: u8, frame: &Bytes) -> Bytes {
    let mut out = Vec::with_capacity(frame.len() + 1);
    out.push(first);
    out.extend_from_slice(frame);
    out.into()
}

/// The Bloom filter of the links after `from` and up to `to`, encoded; empty for none.
fn bloom_of(document: &Document, from: u32, to: u32) -> Vec<u8> {
    if from >= to {
        return Vec::new();
    }
    let hashes: Vec<ChangeHash> = (from..to).map(|at| ChangeHash(document.chain.link(at).hash)).collect();
    BloomFilter::from_hashes(hashes.iter()).to_bytes()
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A y-sync message: kind 0 is step 1, 1 is step 2, 2 is an update.
fn yjs_message(kind: u8, payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(payload.len() + 8);
    out.extend([0, kind]);
    put_varint(&mut out, payload.len() as u64);
    out.extend(payload);
    out.into()
}

/// Asks a y-sweet server to confirm that it has taken everything before.
fn yjs_status(position: u32) -> Bytes {
    let mut payload = Vec::new();
    put_varint(&mut payload, u64::from(position));
    let mut out = vec![102, payload.len() as u8];
    out.extend(payload);
    out.into()
}

fn take_varint(rest: &mut &[u8]) -> Result<u64> {
    let (mut value, mut shift) = (0_u64, 0);
    loop {
        let (byte, after) = rest.split_first().context("the message ends early")?;
        *rest = after;
        if shift > 63 {
            bail!("number too long");
        }
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
}

fn take_buffer<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = take_varint(rest)? as usize;
    let (taken, after) = rest.split_at_checked(length).context("the message ends early")?;
    *rest = after;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use automerge::Automerge;
    use automerge::sync::{Message, State, SyncDoc};

    use super::*;
    use crate::workload::{Chain, Seed};

    fn document(edits: usize) -> Document {
        Document::numbered(1, &Arc::new(Chain::build(Seed::small().unwrap(), edits, 1).unwrap()))
    }

    /// A stock server side: an Automerge document and its sync state for one client.
    struct Stock {
        document: Automerge,
        state: State,
    }

    impl Stock {
        fn new() -> Self {
            Self { document: Automerge::new(), state: State::new() }
        }

        fn exchange(&mut self, session: &mut Session, from_client: Vec<Bytes>) -> usize {
            let (mut pending, mut rounds) = (from_client, 0);
            while rounds < 20 {
                for frame in pending.drain(..) {
                    let ServerFrame::Sync { data, .. } = frames::decode(&frame).unwrap() else { continue };
                    let message = Message::decode(data).unwrap();
                    self.document.receive_sync_message(&mut self.state, message).unwrap();
                }
                let Some(message) = self.document.generate_sync_message(&mut self.state) else { break };
                rounds += 1;
                // The encoder of client frames serves for the server's too: same keys.
                let envelope = Envelope { sender: "s", target: "c", document: &session.document.id.clone() };
                let encoded = server_frame(envelope, &message.encode());
                session.receive(&encoded, &mut pending).unwrap();
            }
            rounds
        }
    }

    fn server_frame(envelope: Envelope<'_>, data: &[u8]) -> Bytes {
        let mut out = vec![0xa3];
        for (key, value) in [("type", "sync"), ("documentId", envelope.document)] {
            out.extend([0x60 | key.len() as u8]);
            out.extend(key.as_bytes());
            out.extend([0x78, value.len() as u8]);
            out.extend(value.as_bytes());
        }
        out.extend(b"\x64data\x5a");
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out.into()
    }

    fn joined(dialect: Dialect, document: &Document, holds: u32) -> (Session, Vec<Bytes>) {
        let mut session = Session::new(dialect, "c".into(), document.clone(), holds);
        let mut out = Vec::new();
        session.open(&mut out);
        out.clear();
        session.receive(&Bytes::from_static(b"\xa2\x64type\x64peer\x68senderId\x61s"), &mut out).unwrap();
        (session, out)
    }

    #[test]
    fn a_stock_server_takes_the_upload_and_every_edit_and_comes_to_rest() {
        let document = document(3);
        let mut stock = Stock::new();
        let (mut session, out) = joined(Dialect::Automerge, &document, 1);
        assert!(stock.exchange(&mut session, out) < 20);
        assert!(session.is_joined());
        assert_eq!(session.acknowledged(), 1);
        for expected in 2..=4 {
            let mut out = Vec::new();
            session.edit(&mut out);
            assert!(session.acknowledged() < expected);
            assert!(stock.exchange(&mut session, out) < 20);
            assert_eq!(session.acknowledged(), expected);
        }
        assert_eq!(stock.document.get_heads()[0].0, document.chain.heads(4)[0]);
    }

    #[test]
    fn a_reader_gets_the_document_then_edits_and_answers_each() {
        let document = document(2);
        let mut stock = Stock::new();
        stock.document.load_incremental(&document.chain.link(0).chunk).unwrap();
        let (mut session, out) = joined(Dialect::Automerge, &document, 0);
        stock.exchange(&mut session, out);
        assert!(session.is_joined());
        assert_eq!(session.held(), 1);

        stock.document.load_incremental(&document.chain.link(1).chunk).unwrap();
        stock.document.load_incremental(&document.chain.link(2).chunk).unwrap();
        assert_eq!(stock.exchange(&mut session, Vec::new()), 1);
        assert_eq!(session.held(), 3);
        assert_eq!(stock.state.their_heads.as_ref().unwrap()[0].0, document.chain.heads(3)[0]);
    }

    #[test]
    fn a_client_that_gathers_answers_once_for_several_messages() {
        let document = document(2);
        let (mut session, _) = joined(Dialect::AutomergeGathered, &document, 0);
        let envelope = Envelope { sender: "s", target: "c", document: &document.id };
        let mut out = Vec::new();
        for at in 0..3 {
            let message = SyncMessage {
                heads: document.chain.heads(at + 1),
                changes: &[document.chain.link(at).chunk.clone()],
                ..SyncMessage::default()
            };
            session.receive(&frames::encode_sync(envelope, false, &message), &mut out).unwrap();
        }
        assert_eq!((session.held(), out.len()), (3, 0));
        session.gathered_answer(&mut out);
        session.gathered_answer(&mut out);
        assert_eq!(out.len(), 1);
        let ServerFrame::Sync { data, .. } = frames::decode(&out[0]).unwrap() else { panic!("not a sync") };
        assert_eq!(frames::decode_sync(data).unwrap().heads, document.chain.heads(3));
    }

    #[test]
    fn a_change_without_its_dependency_is_not_held_and_is_asked_for() {
        let document = document(2);
        let (mut session, _) = joined(Dialect::Automerge, &document, 1);
        let message = SyncMessage {
            heads: document.chain.heads(3),
            changes: &[document.chain.link(2).chunk.clone()],
            ..SyncMessage::default()
        };
        let envelope = Envelope { sender: "s", target: "c", document: &document.id };
        let mut out = Vec::new();
        session.receive(&frames::encode_sync(envelope, false, &message), &mut out).unwrap();
        assert_eq!(session.held(), 1);
        let ServerFrame::Sync { data, .. } = frames::decode(&out[0]).unwrap() else { panic!("not a sync") };
        assert_eq!(frames::decode_sync(data).unwrap().need, [document.chain.link(1).hash]);
    }

    #[test]
    fn a_yjs_reader_follows_updates_and_counts_no_gap() {
        let document = document(3);
        let mut session = Session::new(Dialect::Yjs, "c".into(), document.clone(), 0);
        let mut out = Vec::new();
        session.receive(&yjs_message(1, &document.chain.link(0).update), &mut out).unwrap();
        assert!(session.is_joined());
        session.receive(&yjs_message(2, &document.chain.link(1).update), &mut out).unwrap();
        session.receive(&yjs_message(2, &document.chain.link(3).update), &mut out).unwrap();
        assert_eq!(session.held(), 2);
        session.receive(&yjs_message(2, &document.chain.link(2).update), &mut out).unwrap();
        assert_eq!(session.held(), 4);
        assert!(out.is_empty());
    }

    #[test]
    fn a_bare_reader_answers_only_when_told_to() {
        let document = document(1);
        for answers in [false, true] {
            let dialect = Dialect::Bare { answers };
            let mut writer = Session::new(dialect, "w".into(), document.clone(), 1);
            let mut reader = Session::new(dialect, "r".into(), document.clone(), 0);
            let (mut sent, mut out) = (Vec::new(), Vec::new());
            writer.edit(&mut sent);
            assert_eq!(sent[0][0], BARE_BROADCAST);
            reader.receive(&sent[0], &mut out).unwrap();
            assert_eq!(reader.held(), 2);
            assert_eq!(
                out.iter().map(|frame| frame[0]).collect::<Vec<_>>(),
                vec![BARE_ANSWER; answers.into()]
            );
        }
    }

    #[test]
    fn frames_over_the_bare_server_do_not_grow_with_the_edits() {
        let document = document(50);
        let mut writer = Session::new(Dialect::Bare { answers: true }, "w".into(), document, 1);
        let mut sent = Vec::new();
        (0..50).for_each(|_| writer.edit(&mut sent));
        assert!(sent[49].len() <= sent[0].len() + 8, "{} after {}", sent[49].len(), sent[0].len());
    }
}
