//! Questions about ancestry, answered by walking positions downwards.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use smallvec::SmallVec;

use super::past::{Past, Reach, Steps};
use super::{Graph, Refusal};
use crate::base::{ActorSet, BaseClosure, BaseIndex};

/// Positions from `floor` on that a walk has come by.
struct Visited {
    floor: u64,
    marks: Vec<bool>,
}

impl Visited {
    /// Room for `from` and what is between them and the floor.
    fn new(floor: u64, from: &[u64]) -> Self {
        let end = from.iter().max().map_or(floor, |last| last + 1);
        Self { floor, marks: vec![false; end.saturating_sub(floor) as usize] }
    }

    fn contains(&self, position: u64) -> bool {
        let offset = position.checked_sub(self.floor);
        offset.and_then(|offset| self.marks.get(offset as usize)).is_some_and(|it| *it)
    }

    /// Returns whether it is at or above the floor and new.
    fn insert(&mut self, position: u64) -> bool {
        position >= self.floor && !std::mem::replace(&mut self.marks[(position - self.floor) as usize], true)
    }
}

impl Graph {
    /// What changes with these dependencies have among their ancestors, and how far operations reach there. `None`: a
    /// dependency lies inside the base and the index is not attached.
    pub(super) fn past_of(
        &self,
        parents: &[u64],
        steps: &mut Steps,
    ) -> Result<Option<(Arc<Past>, u64)>, Refusal> {
        let mut past: Option<Arc<Past>> = None;
        let mut max_op = 0;
        let mut inside: SmallVec<[u64; 2]> = SmallVec::new();
        for parent in parents {
            let (one, reached) = match self.node(*parent) {
                Some(node) => (&node.past, node.max_op),
                None => match self.base_head(*parent) {
                    Some(place) => (&self.base_pasts[place], self.base.heads[place].max_op),
                    None => {
                        inside.push(*parent);
                        continue;
                    }
                },
            };
            max_op = max_op.max(reached);
            past = Some(match past {
                Some(past) => self.merge(past, one, steps)?,
                None => one.clone(),
            });
        }
        // What lies inside the base adds nothing to what has all of it.
        if !inside.is_empty() && past.as_ref().is_none_or(|past| past.reach != Reach::Whole) {
            let Some(index) = &self.index else { return Ok(None) };
            let closure = closure(index, &inside, steps)?;
            let one =
                Arc::new(Past { actors: closure.actors, reach: self.reach_from(inside.iter().copied()) });
            max_op = inside.iter().fold(max_op, |reached, it| reached.max(index.max_op(*it)));
            past = Some(match past {
                Some(past) => self.merge(past, &one, steps)?,
                None => one,
            });
        }
        let nothing = || {
            let reach = if self.has_base() { Reach::From(Vec::new()) } else { Reach::Whole };
            Arc::new(Past { actors: ActorSet::default(), reach })
        };
        Ok(Some((past.unwrap_or_else(nothing), max_op)))
    }

    /// Whether `target` is among `parents`, in ascending order, and their ancestors. `None`: only the index can tell.
    pub(super) fn descends_from(
        &self,
        parents: &[u64],
        target: u64,
        past: &Past,
        steps: &mut Steps,
    ) -> Result<Option<bool>, Refusal> {
        if parents.binary_search(&target).is_ok() {
            return Ok(Some(true));
        }
        if target >= self.tail_start() {
            return self.reaches(parents, target, steps).map(Some);
        }
        let Reach::From(entries) = &past.reach else { return Ok(Some(true)) };
        if entries.binary_search(&target).is_ok() {
            return Ok(Some(true));
        }
        let Some(index) = &self.index else { return Ok(None) };
        Ok(Some(closure(index, entries, steps)?.contains(target)))
    }

    /// Walks from `parents` down to the `target` in the tail.
    fn reaches(&self, parents: &[u64], target: u64, steps: &mut Steps) -> Result<bool, Refusal> {
        // The last first: the walk ends where one of them has everything before it.
        let mut open: BTreeSet<u64> = parents.iter().copied().collect();
        while let Some(position) = open.pop_last() {
            if position <= target {
                return Ok(position == target);
            }
            let Some(node) = self.node(position) else { return Ok(false) };
            if node.covers_all {
                return Ok(true);
            }
            steps.spend(1 + node.parents.len())?;
            open.extend(&node.parents);
        }
        Ok(false)
    }

    /// What is at or above `floor`, which is in the tail, among `from` and their ancestors.
    fn descend(&self, from: &[u64], floor: u64) -> Visited {
        let mut visited = Visited::new(floor, from);
        let mut stack: SmallVec<[u64; 8]> = SmallVec::from_slice(from);
        while let Some(position) = stack.pop() {
            if visited.insert(position) {
                stack.extend_from_slice(self.parents(position));
            }
        }
        visited
    }

    /// Whether whoever has the changes at `known`, and all their ancestors, certainly has the whole base.
    pub(crate) fn covers_base(&self, known: &[u64]) -> bool {
        let mut entries = Vec::new();
        for position in known {
            match self.node(*position).map(|node| &node.past.reach) {
                Some(Reach::Whole) => return true,
                Some(Reach::From(some)) => entries.extend_from_slice(some),
                None => entries.push(*position),
            }
        }
        self.reach_from(entries.into_iter()) == Reach::Whole
    }

    /// Whether all of `targets` are at one of `positions` or certainly among their ancestors.
    pub(crate) fn includes(&self, positions: &[u64], targets: &[u64]) -> bool {
        let start = self.tail_start();
        let in_tail = targets.iter().filter(|target| **target >= start);
        let visited = in_tail.clone().min().map(|floor| self.descend(positions, *floor));
        let all_in_tail =
            visited.is_none_or(|visited| in_tail.clone().all(|target| visited.contains(*target)));
        let in_base: SmallVec<[u64; 4]> = targets.iter().filter(|it| **it < start).copied().collect();
        all_in_tail
            && (in_base.is_empty() || self.covers_base(positions) || {
                let positions: HashSet<u64> = positions.iter().copied().collect();
                in_base.iter().all(|target| positions.contains(target))
            })
    }

    /// The durable positions of the tail that are neither at `known` nor among their ancestors, in order.
    pub(crate) fn beyond(&self, known: &[u64]) -> Vec<u64> {
        let visited = self.descend(known, self.tail_start());
        (self.tail_start()..self.durable_end()).filter(|position| !visited.contains(*position)).collect()
    }

    /// The dependencies of a tail change, in ascending order.
    pub(crate) fn parents(&self, position: u64) -> &[u64] {
        self.node(position).map_or(&[], |node| &node.parents)
    }
}

fn closure(index: &BaseIndex, entries: &[u64], steps: &mut Steps) -> Result<BaseClosure, Refusal> {
    let closure = index.closure(entries, steps.left());
    steps.spend(closure.as_ref().map_or(usize::MAX, BaseClosure::steps))?;
    closure.ok_or(Refusal::TooTangled)
}
