//! The change graph of one live document: which changes there are, what they depend on, where their bytes are.
//!
//! This is all a server needs to synchronise a document. No operation is decoded. A graph is a *base*, known by
//! its [`BaseSummary`], and a *tail*: the changes since, each a node over shared bytes.
//!
//! A change goes through up to three stages:
//!
//! - *pending*: a dependency is not here yet. It waits, bounded in number and bytes, and is not advertised.
//! - *staged*: it has a position and later changes may build on it, but it is not committed yet.
//! - *durable*: committed. Only durable changes appear in heads or are sent to anybody.
//!
//! Changes of a document are committed in the order of their positions, so durability is one number.
//!
//! The graph also is the door (`graph/door.rs`): [`Graph::ingest`] refuses what would crash or corrupt a stock Automerge that
//! receives it. It does not judge whether operations make sense to the CRDT; that shows when a base is made.
//!
//! # Invariants
//!
//! - Positions are topological: a change's dependencies stand before it.
//! - `heads` are the durable changes that no durable change depends on, sorted by hash.
//! - For every author the changes in the graph are numbered 1, 2, 3, … and each descends from the one before.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::base::{BaseIndex, BaseSummary};
use crate::ids::{ActorId, ChangeHash};

mod compaction;
mod door;
mod past;
mod pending;
mod walk;

pub use compaction::Retired;
pub use door::{Ingested, Refusal};

use past::Past;
use pending::Pending;

/// A change in the tail.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) hash: ChangeHash,
    /// Positions of the dependencies, ascending; those below the tail's start are in the base.
    parents: SmallVec<[u64; 2]>,
    actor: u32,
    seq: u64,
    max_op: u64,
    pub(crate) bytes: Bytes,
    /// Of itself and its ancestors.
    past: Arc<Past>,
    /// Whether everything before it, in tail and base, is among its ancestors.
    covers_all: bool,
}

/// Where an author stands, staged changes included.
#[derive(Debug, Clone)]
struct ActorState {
    id: ActorId,
    last_seq: u64,
    last_position: u64,
}

/// Where a hash was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookup {
    At(u64),
    Absent,
    /// Not in the tail, nor a head of the base or an author's last change there; only the index can tell.
    AskIndex,
}

/// The graph of one document. See the module.
#[derive(Debug, Default)]
pub struct Graph {
    base: BaseSummary,
    /// Of the base's heads, in their order.
    base_pasts: Vec<Arc<Past>>,
    /// The base's heads and its authors' last changes.
    base_positions: HashMap<ChangeHash, u64>,
    index: Option<Arc<BaseIndex>>,
    nodes: Vec<Node>,
    positions: HashMap<ChangeHash, u64>,
    actors: Vec<ActorState>,
    actor_numbers: HashMap<ActorId, u32>,
    durable_end: u64,
    /// Hash and position of each durable head, by hash.
    heads: BTreeMap<ChangeHash, u64>,
    /// Positions that nothing staged depends on.
    staged_heads: HashSet<u64>,
    tail_bytes: usize,
    /// How many numbers the tail's [`Past`]s keep.
    past_size: usize,
    /// Steps spent on checking what changes descend from.
    steps_spent: u64,
    pending: Pending,
    /// Changes that waited, and broke a rule when the last one that was offered completed them.
    dropped: Vec<(ChangeHash, Refusal)>,
}

impl Graph {
    /// A document that has nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A document that has a base and no tail yet.
    pub fn from_base(base: BaseSummary) -> Self {
        let mut graph = Self {
            durable_end: base.change_count,
            heads: base.heads.iter().map(|head| (head.hash, head.position)).collect(),
            staged_heads: base.heads.iter().map(|head| head.position).collect(),
            ..Self::default()
        };
        for actor in &base.actors {
            let number = graph.actor_number(&actor.id) as usize;
            graph.actors[number].last_seq = actor.last_seq;
            graph.actors[number].last_position = actor.last_position;
        }
        graph.set_base(base);
        graph
    }

    fn set_base(&mut self, base: BaseSummary) {
        let heads = base.heads.iter().map(|head| (head.hash, head.position));
        let last = base.actors.iter().map(|actor| (actor.last_hash, actor.last_position));
        self.base_positions = heads.chain(last).collect();
        self.base = base;
        let pasts = self.base.heads.iter().map(|head| {
            Arc::new(Past {
                actors: head.actors.clone(),
                reach: self.reach_from(std::iter::once(head.position)),
            })
        });
        self.base_pasts = pasts.collect();
    }

    /// The first position of the tail; everything before is in the base.
    pub fn tail_start(&self) -> u64 {
        self.base.change_count
    }

    /// One past the last durable position.
    pub fn durable_end(&self) -> u64 {
        self.durable_end
    }

    /// One past the last staged position.
    pub fn staged_end(&self) -> u64 {
        self.base.change_count + self.nodes.len() as u64
    }

    /// Whether nothing is durable yet.
    pub fn is_empty(&self) -> bool {
        self.durable_end == 0
    }

    pub fn has_base(&self) -> bool {
        self.base.change_count > 0
    }

    /// The heads that may be advertised, sorted.
    pub fn heads(&self) -> Vec<ChangeHash> {
        self.heads.keys().copied().collect()
    }

    /// Whether `heads` (in any order, without repetition) are the durable heads.
    pub fn heads_are(&self, heads: &[ChangeHash]) -> bool {
        heads.len() == self.heads.len() && heads.iter().all(|head| self.heads.contains_key(head))
    }

    /// How many changes the document has, staged ones included.
    pub fn change_count(&self) -> u64 {
        self.staged_end()
    }

    /// How many changes wait for a dependency.
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// What the changes that wait for a dependency occupy.
    pub fn pending_bytes(&self) -> usize {
        self.pending.bytes()
    }

    /// What the graph occupies in memory, roughly.
    pub fn resident_bytes(&self) -> usize {
        // A node, its entry in the map of positions, and the allocation around its bytes.
        const NODE_BYTES: usize = size_of::<Node>() + 2 * (32 + 8) + 32;
        let index = self.index.as_ref().map_or(0, |index| index.resident_bytes());
        self.nodes.len() * NODE_BYTES
            + self.tail_bytes
            + self.pending.bytes()
            + self.past_size * 8
            + self.actors.len() * 128
            + self.base_positions.len() * 64
            + index
    }

    /// The bytes of the tail's changes.
    pub fn tail_bytes(&self) -> usize {
        self.tail_bytes
    }

    /// Gives the graph its base's index, so that it can look inside. Dropped by [`Graph::detach_index`].
    ///
    /// # Panics
    /// If the index is of another base.
    pub fn attach_index(&mut self, index: Arc<BaseIndex>) {
        assert_eq!(index.len() as u64, self.base.change_count, "the index belongs to another base");
        self.index = Some(index);
    }

    pub fn detach_index(&mut self) {
        self.index = None;
    }

    pub fn has_index(&self) -> bool {
        self.index.is_some()
    }

    pub(crate) fn node(&self, position: u64) -> Option<&Node> {
        self.nodes.get(usize::try_from(position.checked_sub(self.tail_start())?).ok()?)
    }

    fn lookup(&self, hash: &ChangeHash) -> Lookup {
        if let Some(position) = self.positions.get(hash) {
            return Lookup::At(*position);
        }
        if let Some(position) = self.base_positions.get(hash) {
            return Lookup::At(*position);
        }
        match &self.index {
            Some(index) => index.position_of(hash).map_or(Lookup::Absent, Lookup::At),
            None if self.has_base() => Lookup::AskIndex,
            None => Lookup::Absent,
        }
    }

    /// The place among the base's heads of the one at this position.
    fn base_head(&self, position: u64) -> Option<usize> {
        self.base.heads.binary_search_by_key(&position, |head| head.position).ok()
    }

    fn actor_number(&mut self, id: &ActorId) -> u32 {
        if let Some(number) = self.actor_numbers.get(id) {
            return *number;
        }
        let number = self.actors.len() as u32;
        self.actors.push(ActorState { id: id.clone(), last_seq: 0, last_position: 0 });
        self.actor_numbers.insert(id.clone(), number);
        number
    }

    /// Records that everything before `end` is committed, and moves the heads.
    ///
    /// # Panics
    /// If `end` goes back or beyond what is staged: something would be advertised that is not stored.
    pub fn advance_durable(&mut self, end: u64) {
        assert!(end >= self.durable_end, "durability does not go back");
        assert!(end <= self.staged_end(), "only staged changes become durable");
        for position in self.durable_end..end {
            let node = &self.nodes[(position - self.base.change_count) as usize];
            let hash = node.hash;
            for parent in node.parents.clone() {
                if let Some(parent) = self.hash_at(parent) {
                    self.heads.remove(&parent);
                }
            }
            self.heads.insert(hash, position);
        }
        self.durable_end = end;
    }

    /// The hash of a tail change or of a head of the base; nothing for the inside of the base.
    fn hash_at(&self, position: u64) -> Option<ChangeHash> {
        match self.node(position) {
            Some(node) => Some(node.hash),
            None => self.base_head(position).map(|place| self.base.heads[place].hash),
        }
    }

    /// Forgets what is staged but not durable, because its commit failed. Changes that were pending until they were
    /// staged are forgotten with the rest, whoever sent them, so every session of the document must be closed.
    pub fn roll_back_staged(&mut self) {
        let keep = (self.durable_end - self.base.change_count) as usize;
        for node in self.nodes.drain(keep..).rev() {
            self.positions.remove(&node.hash);
            self.tail_bytes -= node.bytes.len();
            self.actors[node.actor as usize].last_seq = node.seq - 1;
        }
        // Authors are numbered in the order of their first change: those whose first was dropped are the last.
        while let Some(actor) = self.actors.pop_if(|actor| actor.last_seq == 0) {
            self.actor_numbers.remove(&actor.id);
        }
        for (actor, in_base) in self.actors.iter_mut().zip(&self.base.actors) {
            actor.last_position = in_base.last_position;
        }
        for (offset, node) in self.nodes.iter().enumerate() {
            self.actors[node.actor as usize].last_position = self.base.change_count + offset as u64;
        }
        self.staged_heads = self.heads.values().copied().collect();
        self.measure_pasts();
    }

    fn measure_pasts(&mut self) {
        let mut seen = HashSet::new();
        let pasts = self.nodes.iter().map(|node| &node.past);
        self.past_size = pasts.filter(|past| seen.insert(Arc::as_ptr(past))).map(|past| past.size()).sum();
    }

    /// The dependencies that pending changes wait for, reachable from `heads` and not here: what to ask a peer for
    /// that has these heads.
    pub fn missing_from(&self, heads: &[ChangeHash]) -> Vec<ChangeHash> {
        self.pending.missing_from(heads, |hash| self.position(hash).is_some())
    }

    /// The bytes of the tail's changes at these positions.
    pub fn bytes_at(&self, positions: impl IntoIterator<Item = u64>) -> Vec<Bytes> {
        positions.into_iter().filter_map(|it| self.node(it)).map(|node| node.bytes.clone()).collect()
    }

    /// The hash and bytes of the tail's changes at these positions.
    pub fn changes(&self, positions: std::ops::Range<u64>) -> impl Iterator<Item = (ChangeHash, &Bytes)> {
        positions.filter_map(|position| self.node(position)).map(|node| (node.hash, &node.bytes))
    }

    /// The hash of a tail change.
    pub fn hash(&self, position: u64) -> Option<ChangeHash> {
        self.node(position).map(|node| node.hash)
    }

    /// Where a change stands, durable or staged; nothing if it is not here or only the missing index could tell.
    pub fn position(&self, hash: &ChangeHash) -> Option<u64> {
        match self.lookup(hash) {
            Lookup::At(position) => Some(position),
            Lookup::Absent | Lookup::AskIndex => None,
        }
    }

    /// The changes that waited until the last call of [`Graph::ingest`], and were refused in it.
    pub fn dropped(&self) -> &[(ChangeHash, Refusal)] {
        &self.dropped
    }

    pub fn is_pending(&self, hash: &ChangeHash) -> bool {
        self.pending.contains(hash)
    }

    /// Whether the change is durable, as far as can be told without the index.
    pub(crate) fn is_durable(&self, hash: &ChangeHash) -> bool {
        self.position(hash).is_some_and(|position| position < self.durable_end)
    }

    /// Whether the change is not in the tail nor pending, though it may be in the base.
    pub(crate) fn is_in_base_or_unknown(&self, hash: &ChangeHash) -> bool {
        self.has_base() && !self.positions.contains_key(hash) && !self.pending.contains(hash)
    }

    pub(crate) fn base_heads(&self) -> impl Iterator<Item = &ChangeHash> {
        self.base.heads.iter().map(|head| &head.hash)
    }

    /// The position of a durable change of the tail.
    pub fn durable_position(&self, hash: &ChangeHash) -> Option<u64> {
        let position = *self.positions.get(hash)?;
        (position < self.durable_end).then_some(position)
    }
}
