//! Changes that wait for dependencies: bounded, and found again by the hashes they wait for.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;

use crate::change::Change;
use crate::config::Limits;
use crate::ids::ChangeHash;

/// What a waiting change costs beside its bytes: the parsed header and a map entry.
const OVERHEAD_BYTES: usize = 512;

/// What each of its dependencies costs: its hash, and an entry of those who wait.
const DEPENDENCY_BYTES: usize = 128;

#[derive(Debug, Default)]
pub(super) struct Pending {
    changes: HashMap<ChangeHash, Waiting>,
    /// Pairs of a missing hash and a change that waits for it.
    awaited: BTreeSet<(ChangeHash, ChangeHash)>,
    bytes: usize,
}

#[derive(Debug)]
struct Waiting {
    change: Change,
    missing: usize,
}

fn cost_bytes(change: &Change) -> usize {
    change.bytes.len() + OVERHEAD_BYTES + DEPENDENCY_BYTES * change.deps.len()
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

    /// Whether any change waits for `hash`.
    pub(super) fn awaits(&self, hash: &ChangeHash) -> bool {
        self.waiters(hash).next().is_some()
    }

    fn waiters(&self, hash: &ChangeHash) -> impl Iterator<Item = ChangeHash> {
        let range = (*hash, ChangeHash([0; 32]))..=(*hash, ChangeHash([255; 32]));
        self.awaited.range(range).map(|(_, waiter)| *waiter)
    }

    /// Keeps a change that lacks these dependencies. Returns false, and changes nothing, if there is no room.
    pub(super) fn insert(&mut self, mut change: Change, missing: &[ChangeHash], limits: &Limits) -> bool {
        let bytes = self.bytes + cost_bytes(&change);
        if self.changes.len() >= limits.pending_changes_max || bytes > limits.pending_bytes_max {
            return false;
        }
        // As the graph does: a slice would keep the whole message.
        change.bytes = Bytes::copy_from_slice(&change.bytes);
        self.put_back(change, missing);
        true
    }

    /// As [`Self::insert`], for a change that was here a moment ago.
    pub(super) fn put_back(&mut self, change: Change, missing: &[ChangeHash]) {
        self.bytes += cost_bytes(&change);
        self.awaited.extend(missing.iter().map(|dependency| (*dependency, change.hash)));
        self.changes.insert(change.hash, Waiting { change, missing: missing.len() });
    }

    /// Notes that `hash` is here. Removes and returns the changes that wait for nothing else.
    pub(super) fn arrived(&mut self, hash: &ChangeHash) -> Vec<Change> {
        let waiters: Vec<ChangeHash> = self.waiters(hash).collect();
        let mut ready = Vec::new();
        for waiter in waiters {
            self.awaited.remove(&(*hash, waiter));
            let waiting = self.changes.get_mut(&waiter).expect("whoever waits is pending");
            waiting.missing -= 1;
            if waiting.missing == 0 {
                ready.extend(self.remove(&waiter));
            }
        }
        ready
    }

    fn remove(&mut self, hash: &ChangeHash) -> Option<Change> {
        let Waiting { change, .. } = self.changes.remove(hash)?;
        self.bytes -= cost_bytes(&change);
        for dependency in &change.deps {
            self.awaited.remove(&(*dependency, change.hash));
        }
        Some(change)
    }

    /// Drops every change that waits for `hash`, which was refused, and those that wait for them.
    pub(super) fn drop_dependents(&mut self, hash: ChangeHash) {
        let mut refused = vec![hash];
        while let Some(hash) = refused.pop() {
            let waiters: Vec<ChangeHash> = self.waiters(&hash).collect();
            for waiter in waiters {
                self.remove(&waiter);
                refused.push(waiter);
            }
        }
    }

    /// The hashes that are neither pending nor `known`, on the way down from those `heads` that are pending.
    pub(super) fn missing_from(
        &self,
        heads: &[ChangeHash],
        known: impl Fn(&ChangeHash) -> bool,
    ) -> Vec<ChangeHash> {
        let mut missing = BTreeSet::new();
        let mut visited = HashSet::new();
        let mut stack: Vec<ChangeHash> = heads.iter().filter(|head| self.contains(head)).copied().collect();
        while let Some(hash) = stack.pop() {
            match self.changes.get(&hash) {
                Some(waiting) if visited.insert(hash) => stack.extend(waiting.change.deps.iter()),
                Some(_) => {}
                None if known(&hash) => {}
                None => {
                    missing.insert(hash);
                }
            }
        }
        missing.into_iter().collect()
    }
}
