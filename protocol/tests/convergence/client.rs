//! A standard Automerge peer with its connection to the server.

use std::collections::VecDeque;

use automerge::sync::{BloomFilter, Message, MessageVersion, State, SyncDoc};
use automerge::transaction::{CommitOptions, Transactable};
use automerge::{ActorId, AutoCommit, ChangeHash, ObjType, ROOT, ReadDoc, ScalarValue, Value};
use isobar_protocol::chunk::chunks;
use isobar_protocol::session::SyncSession;

use crate::rng::Rng;

/// A connection: both queues, the client's state and the server's session. Lost as a whole.
pub struct Link {
    pub state: State,
    pub session: SyncSession,
    pub to_server: VecDeque<Vec<u8>>,
    pub to_client: VecDeque<Vec<u8>>,
}

pub struct Client {
    pub name: usize,
    pub doc: AutoCommit,
    pub link: Option<Link>,
    /// What automerge-repo keeps between connections.
    saved_state: Vec<u8>,
    /// Knows nothing of flags, as Automerge before 2.2.8.
    pub v1: bool,
    /// Takes no changes from the server.
    pub read_only: bool,
    /// The server takes no changes from it.
    pub refused: bool,
    actors_made: u8,
    /// Messages, and changes in them, since the last [`Client::reset_counts`].
    pub sent: usize,
    pub received: usize,
    pub changes_received: usize,
}

/// In which condition the sync state comes back at a reconnection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    Saved,
    Fresh,
    /// Claims to share changes that the client has and the server may lack.
    Boasting,
    /// Claims to share changes that the server has and the client may lack.
    Mistaken,
}

impl Client {
    pub fn new(name: usize) -> Self {
        let mut client = Self {
            name,
            doc: AutoCommit::new(),
            link: None,
            saved_state: State::new().encode(),
            v1: false,
            read_only: false,
            refused: false,
            actors_made: 0,
            sent: 0,
            received: 0,
            changes_received: 0,
        };
        client.new_actor();
        client
    }

    pub fn new_actor(&mut self) {
        self.actors_made += 1;
        self.doc.set_actor(ActorId::from([self.name as u8, self.actors_made]));
    }

    pub fn connect(&mut self, memory: Memory, server_hashes: &[ChangeHash], rng: &mut Rng) {
        let mut state = match memory {
            Memory::Saved => State::decode(&self.saved_state).expect("a saved state"),
            _ => State::new(),
        };
        let own: Vec<ChangeHash> = self.doc.get_changes(&[]).iter().map(|it| it.hash()).collect();
        let claimed = match memory {
            Memory::Boasting => rng.pick(&own),
            Memory::Mistaken => rng.pick(server_hashes),
            _ => None,
        };
        state.shared_heads.extend(claimed);
        state.shared_heads.sort_unstable();
        state.shared_heads.dedup();
        if self.read_only {
            state.set_read_only(true);
        }
        self.link = Some(Link {
            state,
            session: SyncSession::new(self.refused),
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
        });
    }

    pub fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            self.saved_state = link.state.encode();
        }
    }

    /// Deletes the document and asks for it again, on the same connection.
    pub fn lose_everything(&mut self) {
        self.doc = AutoCommit::new();
        self.new_actor();
        self.saved_state = State::new().encode();
        let read_only = self.read_only;
        if let Some(link) = &mut self.link {
            link.state = if read_only { State::new_read_only() } else { State::new() };
        }
    }

    /// Falls back to what it had at some earlier time, as from a backup. The sync state is kept if `keep_state`.
    pub fn fall_back(&mut self, keep_state: bool, rng: &mut Rng) {
        let changes = self.doc.get_changes(&[]);
        let kept = rng.below(changes.len() + 1);
        let mut doc = AutoCommit::new();
        doc.apply_changes(changes[..kept].to_vec()).expect("changes in causal order");
        self.doc = doc;
        self.new_actor();
        self.link = None;
        if !keep_state {
            self.saved_state = State::new().encode();
        }
    }

    pub fn toggle_read_only(&mut self) {
        self.read_only = !self.read_only;
        let read_only = self.read_only;
        match &mut self.link {
            Some(link) if link.state.their_capabilities.is_some() => link.state.set_read_only(read_only),
            // Automerge would report empty heads, to make a peer of unknown abilities send everything again. A server
            // that has nothing takes this for a request, so change sides on a new connection.
            _ => self.disconnect(),
        }
    }

    /// Sends what the client has to say, if anything.
    pub fn generate(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let Some(mut message) = self.doc.sync().generate_sync_message(&mut link.state) else {
            return false;
        };
        if self.v1 {
            assert_eq!(message.version, MessageVersion::V1, "an old client never learnt of V2");
            message.flags = None;
        }
        link.to_server.push_back(message.encode());
        self.sent += 1;
        true
    }

    /// As [`Client::generate`], with a filter that wrongly holds some of these hashes.
    pub fn generate_with_false_positives(&mut self, server_hashes: &[ChangeHash], rng: &mut Rng) {
        if !self.generate() {
            return;
        }
        let Some(link) = &mut self.link else { return };
        let Some(bytes) = link.to_server.pop_back() else { return };
        let mut message = Message::decode(&bytes).expect("our own message");
        if let Some(have) = message.have.first_mut() {
            let mut held: Vec<ChangeHash> =
                self.doc.get_changes(&have.last_sync).iter().map(|it| it.hash()).collect();
            held.extend(server_hashes.iter().filter(|_| rng.chance(30)));
            have.bloom = BloomFilter::from_hashes(held.iter());
        }
        link.to_server.push_back(message.encode());
    }

    /// Sends some of its changes without regard for what the server has.
    pub fn send_orphans(&mut self, rng: &mut Rng) {
        let changes = self.doc.get_changes(&[]);
        let mut chosen: Vec<Vec<u8>> =
            changes.iter().filter(|_| rng.chance(25)).map(|it| it.raw_bytes().to_vec()).collect();
        rng.shuffle(&mut chosen);
        let heads = self.doc.get_heads();
        let Some(link) = &mut self.link else { return };
        if chosen.is_empty() || link.state.is_peer_read_only() {
            return;
        }
        let message = Message {
            heads,
            need: Vec::new(),
            have: Vec::new(),
            changes: chosen.into(),
            flags: if self.v1 { None } else { Some(Default::default()) },
            version: MessageVersion::V1,
        };
        link.to_server.push_back(message.encode());
        self.sent += 1;
    }

    /// Takes one message from the server. Returns the heads that it told, if there was one.
    pub fn receive(&mut self) -> Option<Vec<ChangeHash>> {
        let link = self.link.as_mut()?;
        let bytes = link.to_client.pop_front()?;
        let mut message = Message::decode(&bytes).expect("the server's message is readable");
        assert!(message.heads.is_sorted() && message.need.is_sorted(), "sorted, as automerge expects");
        if self.v1 {
            message.flags = None;
        }
        for entry in message.changes.iter() {
            self.changes_received += chunks(entry.to_vec().into()).count();
        }
        let heads = message.heads.clone();
        self.doc.sync().receive_sync_message(&mut link.state, message).expect("the server's message applies");
        self.received += 1;
        Some(heads)
    }

    pub fn reset_counts(&mut self) {
        self.sent = 0;
        self.received = 0;
        self.changes_received = 0;
    }

    /// Makes one change.
    pub fn edit(&mut self, rng: &mut Rng) {
        if rng.chance(8) {
            self.new_actor();
        }
        if rng.chance(6) {
            self.edit_the_past(rng);
        } else if rng.chance(4) {
            self.doc.empty_change(CommitOptions::default());
            // Automerge forgets an empty change when it edits the past, and then numbers another change as its
            // successor that does not descend from it. The door refuses that one, rightly: whoever gets it first panics.
            self.new_actor();
        } else {
            self.edit_now(rng);
        }
        self.doc.commit();
    }

    /// Edits the document as it was once, which makes a branch.
    fn edit_the_past(&mut self, rng: &mut Rng) {
        let changes = self.doc.get_changes(&[]);
        if let Some(change) = rng.pick(&changes) {
            self.doc.isolate(&[change.hash()]);
            self.edit_now(rng);
            self.doc.commit();
            self.doc.integrate();
        }
    }

    fn edit_now(&mut self, rng: &mut Rng) {
        let key = format!("k{}", rng.below(4));
        match rng.below(6) {
            0 => self.doc.put(ROOT, key, rng.next() as i64).expect("put"),
            1 => self.edit_text(rng),
            2 => self.count(rng),
            3 if self.doc.get(ROOT, &key).expect("get").is_some() => {
                self.doc.delete(ROOT, key).expect("delete")
            }
            4 => {
                let map = self.doc.put_object(ROOT, key, ObjType::Map).expect("put map");
                self.doc.put(&map, "x", 1).expect("put in map");
            }
            _ => self.edit_text(rng),
        }
    }

    fn edit_text(&mut self, rng: &mut Rng) {
        let text = match self.doc.get(ROOT, "text").expect("get") {
            Some((Value::Object(ObjType::Text), id)) => id,
            _ => self.doc.put_object(ROOT, "text", ObjType::Text).expect("put text"),
        };
        let length = self.doc.length(&text);
        let at = rng.below(length + 1);
        let gone = rng.below(3).min(length - at) as isize;
        self.doc.splice_text(&text, at, gone, "ab").expect("splice");
    }

    fn count(&mut self, rng: &mut Rng) {
        let counter = matches!(
            self.doc.get(ROOT, "counter").expect("get"),
            Some((Value::Scalar(value), _)) if matches!(*value, ScalarValue::Counter(_))
        );
        if counter {
            self.doc.increment(ROOT, "counter", rng.below(9) as i64).expect("increment");
        } else {
            self.doc.put(ROOT, "counter", ScalarValue::counter(0)).expect("put counter");
        }
    }
}
