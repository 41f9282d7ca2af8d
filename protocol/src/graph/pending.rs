//! Changes that wait for a dependency: bounded, and found again by the hash they wait for.

use std::collections::{HashMap, HashSet};

use crate::change::Change;
use crate::config::Limits;
use crate::ids::ChangeHash;

/// What a waiting change costs beside its bytes: the parsed header and two map entries.
const OVERHEAD_BYTES: usize = 512;

#[derive(Debug, Default)]
pub(super) struct Pending {
    changes: HashMap<ChangeHash, Change>,
    /// For a missing hash: who waits for it. Each change waits for one missing dependency at a time.
    waiting: HashMap<ChangeHash, Vec<ChangeHash>>,
    bytes: usize,
}

fn cost_bytes(change: &Change) -> usize {
    change.bytes.len() + OVERHEAD_BYTES + 32 * change.deps.len()
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn contains(&self, hash: &ChangeHash) -> bool {
        self.changes.contains_key(hash)
    }

    /// Returns false, and changes nothing, if there is no room.
    pub(super) fn insert(&mut self, change: Change, missing: ChangeHash, limits: &Limits) -> bool {
        let bytes = self.bytes + cost_bytes(&change);
        if self.changes.len() >= limits.pending_changes_max || bytes > limits.pending_bytes_max {
            return false;
        }
        self.wait_again(change, missing);
        true
    }

    /// Puts back a change that was taken and lacks another dependency.
    pub(super) fn wait_again(&mut self, change: Change, missing: ChangeHash) {
        self.bytes += cost_bytes(&change);
        self.waiting.entry(missing).or_default().push(change.hash);
        self.changes.insert(change.hash, change);
    }

    /// Removes and returns the changes that waited for `hash`.
    pub(super) fn take_waiting_on(&mut self, hash: &ChangeHash) -> Vec<Change> {
        let waiting = self.waiting.remove(hash).unwrap_or_default();
        let taken: Vec<Change> = waiting.iter().filter_map(|hash| self.changes.remove(hash)).collect();
        self.bytes -= taken.iter().map(cost_bytes).sum::<usize>();
        taken
    }

    /// The hashes that are neither pending nor `known`, on the way down from those `heads` that are pending.
    pub(super) fn missing_from(
        &self,
        heads: &[ChangeHash],
        known: impl Fn(&ChangeHash) -> bool,
    ) -> Vec<ChangeHash> {
        let mut missing = HashSet::new();
        let mut visited = HashSet::new();
        let mut stack: Vec<ChangeHash> = heads.iter().filter(|head| self.contains(head)).copied().collect();
        while let Some(hash) = stack.pop() {
            match self.changes.get(&hash) {
                Some(change) if visited.insert(hash) => stack.extend(change.deps.iter()),
                Some(_) => {}
                None if known(&hash) => {}
                None => {
                    missing.insert(hash);
                }
            }
        }
        let mut missing: Vec<ChangeHash> = missing.into_iter().collect();
        missing.sort_unstable();
        missing
    }
}
