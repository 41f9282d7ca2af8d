//! Questions about ancestry, answered by walking positions downwards.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Ancestry, Graph};
use crate::base::BaseClosure;

/// The part of the tail that some changes descend from, and where the walk entered the base.
struct Descent {
    /// By offset from the tail's start.
    visited: Vec<bool>,
    base_entries: Vec<u64>,
}

impl Graph {
    /// What changes with these dependencies have as ancestors. `None`: a dependency lies inside the base and the index
    /// is not attached.
    pub(super) fn ancestry(&self, parents: &[u64]) -> Option<Ancestry> {
        let mut sets: SmallVec<[Arc<[u32]>; 2]> = SmallVec::new();
        let mut max_op = 0;
        let mut inside = Vec::new();
        for parent in parents {
            if let Some(node) = self.node(*parent) {
                sets.push(node.actors.clone());
                max_op = max_op.max(node.max_op);
            } else if let Some(head) = self.base.heads.iter().find(|head| head.position == *parent) {
                sets.push(head.actors.clone().into());
                max_op = max_op.max(head.max_op);
            } else {
                max_op = max_op.max(self.index.as_ref()?.max_op(*parent));
                inside.push(*parent);
            }
        }
        let closure = self.closure_of(inside);
        if let Some(closure) = &closure {
            sets.push(closure.actors.clone().into());
        }
        let covers_base = self.parents_cover_base(parents);
        Some(Ancestry { actors: union(sets), max_op, covers_base })
    }

    fn closure_of(&self, inside: Vec<u64>) -> Option<BaseClosure> {
        if inside.is_empty() {
            return None;
        }
        Some(self.index.as_ref()?.closure(&inside))
    }

    /// Whether a change with these dependencies has the whole base among its ancestors.
    pub(super) fn parents_cover_base(&self, parents: &[u64]) -> bool {
        if !self.has_base()
            || parents.iter().any(|parent| self.node(*parent).is_some_and(|it| it.covers_base))
        {
            return true;
        }
        let heads = &self.base.heads;
        if heads.iter().all(|head| parents.contains(&head.position)) {
            return true;
        }
        // Only the branches of a base with several heads can cover it together.
        heads.len() > 1 && {
            let entries = self.descend(parents, self.tail_start()).base_entries;
            heads.iter().all(|head| entries.contains(&head.position))
        }
    }

    /// Whether `target` is among `parents` and their ancestors. `None`: only the index can tell.
    pub(super) fn descends_from(&self, parents: &[u64], target: u64, ancestry: &Ancestry) -> Option<bool> {
        if parents.contains(&target) {
            return Some(true);
        }
        if target >= self.tail_start() {
            return Some(self.includes(parents, target));
        }
        if ancestry.covers_base {
            return Some(true);
        }
        let entries = self.descend(parents, self.tail_start()).base_entries;
        if entries.contains(&target) {
            return Some(true);
        }
        Some(self.index.as_ref()?.closure(&entries).contains(target))
    }

    /// Walks from `from` down through the tail, not below `floor`.
    fn descend(&self, from: &[u64], floor: u64) -> Descent {
        let start = self.tail_start();
        let mut visited = vec![false; self.nodes.len()];
        let mut base_entries = Vec::new();
        let mut stack: SmallVec<[u64; 8]> = SmallVec::from_slice(from);
        while let Some(position) = stack.pop() {
            if position < start {
                if !base_entries.contains(&position) {
                    base_entries.push(position);
                }
                continue;
            }
            let offset = (position - start) as usize;
            if position < floor || visited[offset] {
                continue;
            }
            visited[offset] = true;
            stack.extend_from_slice(&self.nodes[offset].parents);
        }
        Descent { visited, base_entries }
    }

    /// Whether whoever has the changes at `known`, and all their ancestors, has the whole base.
    pub(crate) fn covers_base(&self, known: &[u64]) -> bool {
        self.parents_cover_base(known)
    }

    /// Whether `target` is at one of `positions` or certainly among their ancestors.
    pub(crate) fn includes(&self, positions: &[u64], target: u64) -> bool {
        if positions.contains(&target) {
            return true;
        }
        if target < self.tail_start() {
            return self.parents_cover_base(positions);
        }
        self.descend(positions, target).visited[(target - self.tail_start()) as usize]
    }

    /// The durable positions of the tail that are neither at `known` nor among their ancestors, in order.
    pub(crate) fn beyond(&self, known: &[u64]) -> Vec<u64> {
        let visited = self.descend(known, self.tail_start()).visited;
        (self.tail_start()..self.durable_end())
            .filter(|position| !visited[(position - self.tail_start()) as usize])
            .collect()
    }

    /// The dependencies of a tail change.
    pub(crate) fn parents(&self, position: u64) -> &[u64] {
        self.node(position).map_or(&[], |node| &node.parents)
    }
}

/// Merges ascending lists; shares the list where one holds all.
fn union(mut sets: SmallVec<[Arc<[u32]>; 2]>) -> Arc<[u32]> {
    let Some(mut all) = sets.pop() else {
        return Arc::from([]);
    };
    for set in sets {
        if Arc::ptr_eq(&all, &set) || includes(&all, &set) {
            continue;
        }
        if includes(&set, &all) {
            all = set;
            continue;
        }
        let mut merged: Vec<u32> = all.iter().chain(set.iter()).copied().collect();
        merged.sort_unstable();
        merged.dedup();
        all = merged.into();
    }
    all
}

fn includes(all: &[u32], some: &[u32]) -> bool {
    some.len() <= all.len() && some.iter().all(|it| all.binary_search(it).is_ok())
}
