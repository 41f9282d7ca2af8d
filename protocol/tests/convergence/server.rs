//! A server reduced to the graph: what the real one does with messages, commits, bases and restarts.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use automerge::Automerge;
use bytes::Bytes;
use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{ChunkKind, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested};
use isobar_protocol::ids::ChangeHash;
use isobar_protocol::session::{Reply, SyncSession, span_message, whole_message};
use isobar_protocol::sync_message::{SyncMessage, SyncVersion};

use crate::rng::Rng;

#[derive(Default)]
pub struct Server {
    pub graph: Graph,
    /// What is committed, in the order of positions. Stands for the database.
    pub stored: Vec<Change>,
    stored_positions: HashMap<ChangeHash, usize>,
    /// The heads of what is committed, worked out apart from the graph.
    heads: BTreeSet<ChangeHash>,
    base: BaseSummary,
    base_index: Bytes,
    base_chunk: Bytes,
    limits: Limits,
}

impl Server {
    pub fn is_stored(&self, hash: &ChangeHash) -> bool {
        self.stored_positions.contains_key(hash)
    }

    pub fn heads(&self) -> Vec<ChangeHash> {
        self.heads.iter().copied().collect()
    }

    /// Takes a message in. Returns whether it brought anything that is not durable yet.
    pub fn receive(&mut self, session: &mut SyncSession, bytes: Vec<u8>) -> bool {
        let message = SyncMessage::decode(bytes.into()).expect("a client's message is readable");
        let mut hashes = Vec::new();
        if !session.is_read_only() {
            for entry in &message.changes {
                for change in self.cut(entry.clone()) {
                    hashes.push(change.hash);
                    self.offer(change);
                }
            }
        }
        let at: Vec<u64> = hashes.iter().filter_map(|hash| self.graph.position(hash)).collect();
        session.receive(message, at, &self.graph);
        hashes.iter().any(|hash| !self.is_stored(hash))
    }

    fn cut(&self, entry: Bytes) -> Vec<Change> {
        let mut all = Vec::new();
        for chunk in chunks(entry) {
            let chunk = chunk.expect("a client's chunk is readable");
            match chunk.kind {
                ChunkKind::Document => {
                    let doc = Automerge::load(&chunk.bytes).expect("a client's document loads");
                    let bytes =
                        doc.get_changes(&[]).into_iter().map(|it| Bytes::from(it.raw_bytes().to_vec()));
                    all.extend(bytes.map(|bytes| self.parse(bytes)));
                }
                _ => all.push(self.parse(chunk.bytes)),
            }
        }
        all
    }

    fn parse(&self, bytes: Bytes) -> Change {
        parse(bytes, &self.limits)
    }

    fn offer(&mut self, change: Change) {
        let asked = self.graph.has_index();
        match self.graph.ingest(change.clone(), &self.limits).expect("an honest change is accepted") {
            Ingested::NeedsIndex => {
                assert!(!asked, "the index is attached already");
                self.attach_index();
                self.offer(change);
            }
            Ingested::Staged(range) => assert!(!range.is_empty()),
            Ingested::Known | Ingested::Pending => {}
        }
    }

    pub fn attach_index(&mut self) {
        if self.graph.has_base() {
            let index = BaseIndex::decode(&self.base_index).expect("our own index");
            self.graph.attach_index(Arc::new(index));
        }
    }

    /// Commits what is staged before `end`.
    pub fn commit(&mut self, end: u64) {
        let from = self.graph.durable_end();
        let committed: Vec<Bytes> = self.graph.changes(from..end).map(|(_, bytes)| bytes.clone()).collect();
        for bytes in committed {
            let change = self.parse(bytes);
            for dependency in &change.deps {
                assert!(self.is_stored(dependency), "a change is committed after what it depends on");
                self.heads.remove(dependency);
            }
            self.heads.insert(change.hash);
            self.stored_positions.insert(change.hash, self.stored.len());
            self.stored.push(change);
        }
        self.graph.advance_durable(end);
        assert_eq!(self.graph.durable_end(), self.stored.len() as u64);
        assert_eq!(self.graph.heads(), self.heads());
    }

    pub fn commit_all(&mut self) {
        self.commit(self.graph.staged_end());
    }

    /// Builds a message if the session has something to say. `None` also stands for "unavailable".
    pub fn generate(&mut self, session: &mut SyncSession) -> Option<Vec<u8>> {
        let is_in_step = session.is_in_step(&self.graph);
        let reply = session.generate(&self.graph);
        assert!(!is_in_step || reply.is_none(), "who is in step is sent nothing");
        let (mut message, with_base) = match reply? {
            Reply::Unavailable => {
                assert!(self.graph.is_empty(), "what is here is available");
                return None;
            }
            Reply::Span { from, to } => (span_message(&self.graph, from, to), false),
            Reply::Whole { .. } => (whole_message(&self.graph), true),
            Reply::Single { message, with_base } => (*message, with_base),
        };
        if with_base && self.graph.has_base() {
            let base = match message.version {
                SyncVersion::V2 => vec![self.base_chunk.clone()],
                SyncVersion::V1 => self.cut(self.base_chunk.clone()).into_iter().map(|it| it.bytes).collect(),
            };
            message.changes.splice(0..0, base);
        }
        // Durable before advertised, and nothing with a gap below it.
        assert!(message.heads.iter().all(|head| self.is_stored(head)), "advertised something not durable");
        assert_eq!(message.heads, self.heads(), "the heads are those of what is durable");
        let known = message.have.iter().flat_map(|have| &have.last_sync);
        assert!(known.clone().all(|hash| self.is_stored(hash)), "claims to have something not durable");
        assert!(message.need.iter().all(|hash| self.graph.position(hash).is_none()), "asks for what is here");
        Some(message.encode())
    }

    /// Makes a base of everything before `cut`.
    pub fn compact(&mut self, cut: u64) {
        let (summary, entries) = self.graph.summarise(cut);
        let old = match self.base_index.is_empty() {
            true => BaseIndex::default(),
            false => BaseIndex::decode(&self.base_index).expect("our own index"),
        };
        self.base_index = old.extended(entries.into_iter()).encode();
        self.base_chunk = self.chunk_of(cut);
        let summary = BaseSummary::decode(&summary.encode()).expect("our own summary");
        assert_eq!((summary.clone(), self.base_index.clone()), self.summarised_from_scratch(cut));
        self.base = summary.clone();
        self.graph.rebase(summary);
        assert_eq!(self.graph.tail_start(), cut);
        assert_eq!(self.graph.heads(), self.heads());
    }

    fn chunk_of(&self, cut: u64) -> Bytes {
        let changes = self.stored[..cut as usize].iter();
        let changes =
            changes.map(|it| automerge::Change::from_bytes(it.bytes.to_vec()).expect("a stored change"));
        let mut doc = Automerge::new();
        doc.apply_changes(changes).expect("stored changes apply");
        doc.save().into()
    }

    /// What a graph that never had a base says.
    fn summarised_from_scratch(&self, cut: u64) -> (BaseSummary, Bytes) {
        let mut graph = Graph::new();
        for change in &self.stored {
            let staged = graph.ingest(change.clone(), &self.limits).expect("a stored change is accepted");
            assert!(matches!(staged, Ingested::Staged(_)), "positions are topological");
        }
        graph.advance_durable(graph.staged_end());
        let (summary, entries) = graph.summarise(cut);
        (summary, BaseIndex::default().extended(entries.into_iter()).encode())
    }

    /// Forgets everything but what is stored. The tail is read back in any order, which makes it anew.
    pub fn restart(&mut self, rng: &mut Rng) {
        let start = self.base.change_count as usize;
        let mut tail = self.stored.split_off(start);
        rng.shuffle(&mut tail);
        for change in &tail {
            self.stored_positions.remove(&change.hash);
        }
        self.graph = match self.base.change_count {
            0 => Graph::new(),
            _ => Graph::from_base(self.base.clone()),
        };
        self.heads = self.base.heads.iter().map(|head| head.hash).collect();
        for change in tail {
            self.offer(change);
        }
        assert_eq!(self.graph.pending_count(), 0, "everything stored has its dependencies");
        self.commit_all();
    }

    /// Compares the graph with Automerge.
    pub fn check(&self) {
        let mut doc = Automerge::new();
        let changes = self.stored.iter();
        let changes: Vec<automerge::Change> = changes
            .map(|it| automerge::Change::from_bytes(it.bytes.to_vec()).expect("a stored change"))
            .collect();
        doc.apply_changes(changes.clone()).expect("stored changes apply");
        let mut heads: Vec<ChangeHash> = doc.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
        heads.sort_unstable();
        assert_eq!(self.graph.heads(), heads);
        let (summary, _) = self.graph.summarise(self.graph.durable_end());
        assert_eq!(summary.max_op, changes.iter().map(|it| it.max_op()).max().unwrap_or(0));
        for actor in &summary.actors {
            let of_actor = changes.iter().filter(|it| it.actor_id().to_bytes() == actor.id.as_bytes());
            assert_eq!(actor.last_seq, of_actor.map(|it| it.seq()).max().expect("an author has changes"));
            let last = &self.stored[actor.last_position as usize];
            assert_eq!((&last.actor, last.seq), (&actor.id, actor.last_seq));
        }
        let heads_of_summary: BTreeSet<ChangeHash> = summary.heads.iter().map(|head| head.hash).collect();
        assert_eq!(heads_of_summary, self.heads);
        for (position, change) in self.stored.iter().enumerate().skip(self.graph.tail_start() as usize) {
            assert_eq!(self.graph.position(&change.hash), Some(position as u64));
            assert_eq!(self.graph.hash(position as u64), Some(change.hash));
        }
    }
}

/// Reads a change and compares what was read with Automerge.
fn parse(bytes: Bytes, limits: &Limits) -> Change {
    let theirs = automerge::Change::from_bytes(bytes.to_vec()).expect("an honest change");
    let change = Change::decode(bytes, limits).expect("an honest change is readable");
    assert_eq!((change.max_op(), change.hash.0), (theirs.max_op(), theirs.hash().0));
    change
}
