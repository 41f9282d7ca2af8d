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
//! The graph also is the door: [`Graph::ingest`] refuses what would crash or corrupt a stock Automerge that
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

use crate::base::{BaseActor, BaseEntry, BaseHead, BaseIndex, BaseSummary};
use crate::change::Change;
use crate::config::{ANCESTRY_STEPS_PER_CHANGE, Limits, MAX_OP_MAX, START_OP_JUMP_MAX};
use crate::ids::{ActorId, ChangeHash};

mod past;
mod pending;
mod walk;

use past::{Past, Reach, Steps};
use pending::Pending;

/// Why a change was refused. Nothing was changed, except that changes which waited for this one are forgotten, since
/// they can never be complete. Whether a change is refused depends on its ancestors and on its author's other
/// changes, not on the order in which changes arrive; the two limits on effort, named last, excepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The author's sequence number does not follow the author's last change. Stock Automerge panics on it.
    #[error("seq {found} does not follow the author's last, {last}")]
    SeqGap { last: u64, found: u64 },
    /// The author already made another change with this number: two copies of one author are writing.
    #[error("the author already has another change numbered {seq}")]
    SeqReused { seq: u64 },
    /// The author's previous change is not among the ancestors.
    #[error("the author's previous change is not an ancestor")]
    PreviousNotAncestor,
    /// The operation counter starts at or below that of a dependency. Such a document saves, and never loads again.
    #[error("operations start at {start_op}, dependencies reach {reached}")]
    StartOpTooLow { start_op: u64, reached: u64 },
    /// The operation counter jumps so far that it would use up the document.
    #[error("operations reach {max_op}, dependencies {reached}")]
    StartOpTooHigh { max_op: u64, reached: u64 },
    /// It names an author whom none of its ancestors has. Stock Automerge panics on it.
    #[error("an operation names an author unknown to the change's ancestors")]
    UnknownActor,
    /// Too many changes wait for dependencies.
    #[error("too many changes of this document wait for dependencies")]
    PendingFull,
    /// The document's history is so tangled that checking more of it costs too much.
    #[error("the history is too tangled to check")]
    TooTangled,
}

impl Refusal {
    /// A short fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::SeqGap { .. } => "seq_gap",
            Refusal::SeqReused { .. } => "seq_reused",
            Refusal::PreviousNotAncestor => "previous_not_ancestor",
            Refusal::StartOpTooLow { .. } => "start_op_too_low",
            Refusal::StartOpTooHigh { .. } => "start_op_too_high",
            Refusal::UnknownActor => "unknown_actor",
            Refusal::PendingFull => "pending_full",
            Refusal::TooTangled => "too_tangled",
        }
    }
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ingested {
    /// Already here, at whatever stage.
    Known,
    /// Waits for a dependency.
    Pending,
    /// Staged, together with pending changes that waited for it: these positions, in order.
    Staged(std::ops::Range<u64>),
    /// The change, or one that waits for it, refers to the inside of the base: load the index
    /// ([`Graph::attach_index`]) and offer it again.
    NeedsIndex,
}

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

    /// Offers a change. It is staged if everything it depends on is here, kept pending if not, refused if it would
    /// harm those who receive it.
    pub fn ingest(&mut self, change: Change, limits: &Limits) -> Result<Ingested, Refusal> {
        let credit = ANCESTRY_STEPS_PER_CHANGE.saturating_mul(self.staged_end());
        let allowed = limits.ancestry_steps_max.saturating_add(credit);
        let mut steps = Steps::new(allowed.saturating_sub(self.steps_spent));
        let before = steps.left();
        let hash = change.hash;
        let ingested = self.ingest_within(change, limits, &mut steps);
        self.steps_spent = self.steps_spent.saturating_add(before - steps.left());
        if ingested.is_err() {
            self.pending.drop_dependents(hash);
        }
        ingested
    }

    fn ingest_within(
        &mut self,
        change: Change,
        limits: &Limits,
        steps: &mut Steps,
    ) -> Result<Ingested, Refusal> {
        if self.pending.contains(&change.hash) {
            return Ok(Ingested::Known);
        }
        match self.is_known(&change)? {
            Lookup::At(_) => return Ok(Ingested::Known),
            Lookup::AskIndex => return Ok(Ingested::NeedsIndex),
            Lookup::Absent => {}
        }
        // Those that wait for it may have dependencies that only the index knows; they are looked up with it.
        if self.has_base() && self.index.is_none() && self.pending.awaits(&change.hash) {
            return Ok(Ingested::NeedsIndex);
        }
        let parents = match self.resolve(&change) {
            Resolved::All(parents) => parents,
            Resolved::NeedsIndex => return Ok(Ingested::NeedsIndex),
            Resolved::Missing(missing) => {
                return if self.pending.insert(change, &missing, limits) {
                    Ok(Ingested::Pending)
                } else {
                    Err(Refusal::PendingFull)
                };
            }
        };
        let Some(past) = self.check(&change, &parents, steps)? else {
            return Ok(Ingested::NeedsIndex);
        };
        let start = self.staged_end();
        let hash = change.hash;
        self.stage(change, parents, past);
        self.stage_dependents(hash, steps);
        Ok(Ingested::Staged(start..self.staged_end()))
    }

    /// Tells a repeated change from a new one. A change numbered beyond its author's last cannot be in the base.
    fn is_known(&self, change: &Change) -> Result<Lookup, Refusal> {
        let last_seq = self.actor(&change.actor).map_or(0, |actor| actor.last_seq);
        match self.lookup(&change.hash) {
            Lookup::AskIndex if change.seq > last_seq => Ok(Lookup::Absent),
            Lookup::Absent if change.seq <= last_seq => Err(Refusal::SeqReused { seq: change.seq }),
            lookup => Ok(lookup),
        }
    }

    fn actor(&self, id: &ActorId) -> Option<&ActorState> {
        self.actor_numbers.get(id).map(|number| &self.actors[*number as usize])
    }

    fn resolve(&self, change: &Change) -> Resolved {
        let mut parents = SmallVec::new();
        let mut missing = Vec::new();
        for dependency in &change.deps {
            match self.lookup(dependency) {
                Lookup::At(position) => parents.push(position),
                // A dependency that waits itself is not in the base.
                Lookup::AskIndex if self.pending.contains(dependency) => missing.push(*dependency),
                Lookup::AskIndex => return Resolved::NeedsIndex,
                Lookup::Absent => missing.push(*dependency),
            }
        }
        if missing.is_empty() {
            parents.sort_unstable();
            Resolved::All(parents)
        } else {
            Resolved::Missing(missing)
        }
    }

    /// The rules of the door. Returns what the change has among itself and its ancestors, its author excepted. `None`:
    /// the index is needed to decide.
    fn check(
        &self,
        change: &Change,
        parents: &[u64],
        steps: &mut Steps,
    ) -> Result<Option<Arc<Past>>, Refusal> {
        let last = self.actor(&change.actor);
        let last_seq = last.map_or(0, |actor| actor.last_seq);
        if change.seq <= last_seq {
            return Err(Refusal::SeqReused { seq: change.seq });
        }
        if change.seq != last_seq + 1 {
            return Err(Refusal::SeqGap { last: last_seq, found: change.seq });
        }
        let Some((past, reached)) = self.past_of(parents, steps)? else {
            return Ok(None);
        };
        if let Some(actor) = last {
            match self.descends_from(parents, actor.last_position, &past, steps)? {
                Some(true) => {}
                Some(false) => return Err(Refusal::PreviousNotAncestor),
                None => return Ok(None),
            }
        }
        check_counters(change, reached)?;
        if last.is_none() {
            // The author is added to a copy.
            steps.spend(past.size())?;
        }
        let knows = |actor| self.actor_numbers.get(actor).is_some_and(|it| past.actors.contains(*it));
        match change.other_actors.iter().all(knows) {
            true => Ok(Some(past)),
            false => Err(Refusal::UnknownActor),
        }
    }

    fn stage(&mut self, change: Change, parents: SmallVec<[u64; 2]>, past: Arc<Past>) {
        let position = self.staged_end();
        let actor = self.actor_number(&change.actor);
        let max_op = change.max_op();
        let past = past.with_actor(actor);
        self.past_size += self.new_past_size(&parents, &past);
        let state = &mut self.actors[actor as usize];
        state.last_seq = change.seq;
        state.last_position = position;
        self.tail_bytes += change.bytes.len();
        self.positions.insert(change.hash, position);
        for parent in &parents {
            self.staged_heads.remove(parent);
        }
        self.staged_heads.insert(position);
        self.nodes.push(Node {
            hash: change.hash,
            parents,
            actor,
            seq: change.seq,
            max_op,
            bytes: change.bytes,
            past,
            covers_all: self.staged_heads.len() == 1,
        });
    }

    /// What a change's past adds, if it does not share that of a dependency.
    fn new_past_size(&self, parents: &[u64], past: &Arc<Past>) -> usize {
        let shares = |parent: &u64| self.node(*parent).is_some_and(|node| Arc::ptr_eq(&node.past, past));
        if parents.iter().any(shares) { 0 } else { past.size() }
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

    /// Stages every pending change whose dependencies are complete now that `hash` is staged. A pending change that
    /// turns out to break a rule is dropped: whoever sent it was not promised anything.
    fn stage_dependents(&mut self, hash: ChangeHash, steps: &mut Steps) {
        let mut ready = self.pending.arrived(&hash);
        while let Some(change) = ready.pop() {
            let hash = change.hash;
            let parents = match self.resolve(&change) {
                Resolved::All(parents) => parents,
                // One that had arrived was rolled back since.
                Resolved::Missing(missing) => {
                    self.pending.put_back(change, &missing);
                    continue;
                }
                Resolved::NeedsIndex => unreachable!("the index is attached when somebody waits"),
            };
            match self.check(&change, &parents, steps) {
                Ok(Some(past)) => {
                    self.stage(change, parents, past);
                    ready.extend(self.pending.arrived(&hash));
                }
                Ok(None) => unreachable!("the index is attached when somebody waits"),
                Err(_) => self.pending.drop_dependents(hash),
            }
        }
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

    /// What a base that covers everything before `cut` has to say of itself: its summary, and the entries that
    /// extend the current base's index.
    ///
    /// # Panics
    /// If `cut` is not within the durable tail.
    pub fn summarise(&self, cut: u64) -> (BaseSummary, Vec<BaseEntry>) {
        assert!(cut >= self.tail_start() && cut <= self.durable_end, "a base covers durable changes");
        let covered = &self.nodes[..(cut - self.tail_start()) as usize];
        let mut old_heads: BTreeMap<u64, &BaseHead> =
            self.base.heads.iter().map(|head| (head.position, head)).collect();
        let mut heads = BTreeMap::new();
        let mut actors = self.base.actors.clone();
        let mut max_op = self.base.max_op;
        let mut entries = Vec::with_capacity(covered.len());
        for (offset, node) in covered.iter().enumerate() {
            let position = self.tail_start() + offset as u64;
            for parent in &node.parents {
                old_heads.remove(parent);
                heads.remove(parent);
            }
            heads.insert(position, offset);
            // Authors are numbered in the order of their first change, so a new one is always the next.
            let last = BaseActor {
                id: self.actors[node.actor as usize].id.clone(),
                last_seq: node.seq,
                last_position: position,
                last_hash: node.hash,
            };
            match actors.get_mut(node.actor as usize) {
                Some(actor) => *actor = last,
                None => actors.push(last),
            }
            max_op = max_op.max(node.max_op);
            entries.push(BaseEntry {
                hash: node.hash,
                actor: node.actor,
                max_op: node.max_op,
                parents: node.parents.clone(),
            });
        }
        let new_heads = heads.into_iter().map(|(position, offset)| {
            let node = &covered[offset];
            BaseHead { hash: node.hash, position, max_op: node.max_op, actors: node.past.actors.clone() }
        });
        let heads = old_heads.into_values().cloned().chain(new_heads).collect();
        (BaseSummary { change_count: cut, max_op, heads, actors }, entries)
    }

    /// Takes `base` in the place of the old base and the tail before it. Positions stay what they were. Returns what is
    /// no longer needed: to free the memory of many changes takes longer than all the rest, so let go of it when the
    /// graph's lock is released.
    ///
    /// # Panics
    /// If the base covers less than the old one or more than is durable.
    pub fn rebase(&mut self, base: BaseSummary) -> Retired {
        let cut = base.change_count;
        assert!(cut >= self.tail_start() && cut <= self.durable_end, "a base covers durable changes");
        let kept = self.nodes.split_off((cut - self.tail_start()) as usize);
        let covered = std::mem::replace(&mut self.nodes, kept);
        self.tail_bytes = self.nodes.iter().map(|node| node.bytes.len()).sum();
        let mut retired = Retired { _positions: HashMap::new(), _index: self.index.take(), covered };
        if retired.covered.len() > self.nodes.len() {
            let kept = self.nodes.iter().zip(cut..).map(|(node, position)| (node.hash, position));
            retired._positions = std::mem::replace(&mut self.positions, kept.collect());
        } else {
            for node in &retired.covered {
                self.positions.remove(&node.hash);
            }
        }
        self.set_base(base);
        self.reach_base_anew();
        self.measure_pasts();
        retired
    }

    /// Works out again how much of the base each change of the tail reaches, after the base has moved.
    fn reach_base_anew(&mut self) {
        for offset in 0..self.nodes.len() {
            let node = &self.nodes[offset];
            let mut reach = match node.parents.is_empty() && self.has_base() {
                true => Reach::From(Vec::new()),
                false => Reach::Whole,
            };
            for (place, parent) in node.parents.iter().enumerate() {
                let one = match self.node(*parent) {
                    Some(parent) => parent.past.reach.clone(),
                    None => self.reach_from(std::iter::once(*parent)),
                };
                reach = if place == 0 { one } else { self.merge_reach(&reach, &one) };
            }
            let first = node.parents.first().and_then(|parent| self.node(*parent));
            let shared = first.filter(|it| it.past.reach == reach && it.past.actors == node.past.actors);
            let past = match shared {
                Some(parent) => parent.past.clone(),
                None => Arc::new(Past { actors: node.past.actors.clone(), reach }),
            };
            self.nodes[offset].past = past;
        }
    }
}

/// What a graph gave up for a base. Dropping it frees the memory; that is all it is for.
#[derive(Debug)]
pub struct Retired {
    covered: Vec<Node>,
    _positions: HashMap<ChangeHash, u64>,
    _index: Option<Arc<BaseIndex>>,
}

/// What a change depends on, looked up.
enum Resolved {
    All(SmallVec<[u64; 2]>),
    Missing(Vec<ChangeHash>),
    NeedsIndex,
}

/// Where a change's operations may start, when those of its dependencies have reached `reached`.
fn check_counters(change: &Change, reached: u64) -> Result<(), Refusal> {
    if change.start_op <= reached {
        return Err(Refusal::StartOpTooLow { start_op: change.start_op, reached });
    }
    let max_op = change.max_op().max(change.start_op);
    if change.start_op > reached.saturating_add(START_OP_JUMP_MAX) || max_op > MAX_OP_MAX {
        return Err(Refusal::StartOpTooHigh { max_op, reached });
    }
    Ok(())
}
