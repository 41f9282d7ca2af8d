//! The door: what a change must be to get into the graph.
//!
//! A change that got this far is well-formed by itself. Here it is held against the rest of the document: what it
//! depends on is found, or waited for, and what would crash or corrupt a stock Automerge is refused.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::past::{Past, Steps};
use super::{ActorState, Graph, Lookup, Node};
use crate::change::Change;
use crate::config::{ANCESTRY_STEPS_PER_CHANGE, Limits, MAX_OP_MAX, START_OP_JUMP_MAX};
use crate::ids::{ActorId, ChangeHash};
use crate::planted::{self, Fault};

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
    Staged(Range<u64>),
    /// The change, or one that waits for it, refers to the inside of the base: load the index
    /// ([`Graph::attach_index`]) and offer it again.
    NeedsIndex,
}

/// What a change depends on, looked up.
enum Resolved {
    All(SmallVec<[u64; 2]>),
    Missing(Vec<ChangeHash>),
    NeedsIndex,
}

impl Graph {
    /// Offers a change. It is staged if everything it depends on is here, kept pending if not, refused if it would
    /// harm those who receive it.
    pub fn ingest(&mut self, change: Change, limits: &Limits) -> Result<Ingested, Refusal> {
        let credit = ANCESTRY_STEPS_PER_CHANGE.saturating_mul(self.staged_end());
        let allowed = limits.ancestry_steps_max.saturating_add(credit);
        let mut steps = Steps::new(allowed.saturating_sub(self.steps_spent));
        let before = steps.left();
        let hash = change.hash;
        self.dropped.clear();
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
            Lookup::Absent if change.seq <= last_seq && !planted::is(Fault::LetInReused) => {
                Err(Refusal::SeqReused { seq: change.seq })
            }
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
        if missing.is_empty() || planted::is(Fault::LetInIncomplete) {
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
        let is_reused = change.seq <= last_seq && planted::is(Fault::LetInReused);
        if change.seq <= last_seq && !is_reused {
            return Err(Refusal::SeqReused { seq: change.seq });
        }
        if change.seq != last_seq + 1 && !is_reused {
            return Err(Refusal::SeqGap { last: last_seq, found: change.seq });
        }
        let Some((past, reached)) = self.past_of(parents, steps)? else {
            return Ok(None);
        };
        if let Some(actor) = last.filter(|_| !is_reused) {
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
        if planted::is(Fault::ShowStaged) {
            self.heads.insert(change.hash, position);
        }
        self.nodes.push(Node {
            hash: change.hash,
            parents,
            actor,
            seq: change.seq,
            max_op,
            // Not a slice of the message it came in, which may be much larger and would stay with it.
            bytes: Bytes::copy_from_slice(&change.bytes),
            past,
            covers_all: self.staged_heads.len() == 1,
        });
    }

    /// What a change's past adds, if it does not share that of a dependency.
    fn new_past_size(&self, parents: &[u64], past: &Arc<Past>) -> usize {
        let shares = |parent: &u64| self.node(*parent).is_some_and(|node| Arc::ptr_eq(&node.past, past));
        if parents.iter().any(shares) { 0 } else { past.size() }
    }

    /// Stages every pending change whose dependencies are complete now that `hash` is staged. A pending change that
    /// turns out to break a rule is dropped, see [`Graph::dropped`]: whoever sent it was not promised anything. One for which only the effort of
    /// checking was used up goes on waiting, until the document is loaded again: others' effort says nothing of it.
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
                Err(Refusal::TooTangled) => self.pending.put_back(change, &[]),
                Err(refusal) => {
                    self.pending.drop_dependents(hash);
                    self.dropped.push((hash, refusal));
                }
            }
        }
    }
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
