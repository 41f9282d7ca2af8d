//! Clients: they write whether or not a region is there, and hand over what a region lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use isobar_protocol::ids::{ChangeHash, DocumentId};

use crate::change_bytes::{Draft, Made};

#[derive(Debug, Clone)]
pub struct Client {
    pub actor: u8,
    pub region: usize,
    pub views: BTreeMap<DocumentId, View>,
}

/// A document as a client has it.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// In an order in which dependencies come first.
    pub changes: Vec<Arc<Made>>,
    pub known: BTreeSet<ChangeHash>,
    /// With their numbers.
    pub heads: BTreeMap<ChangeHash, usize>,
    pub max_op: u64,
    /// Changes of the client's own.
    pub own: BTreeSet<ChangeHash>,
    pub unacknowledged: BTreeSet<ChangeHash>,
    /// The client's actor was used by somebody else, or its changes were refused: it writes no more.
    pub spoilt: bool,
}

impl View {
    pub fn add(&mut self, made: &Arc<Made>) {
        if !self.known.insert(made.change.hash) {
            return;
        }
        self.max_op = self.max_op.max(made.change.start_op);
        made.change.deps.iter().for_each(|hash| {
            self.heads.remove(hash);
        });
        self.heads.insert(made.change.hash, made.number);
        self.changes.push(made.clone());
    }

    /// Makes a change after everything that is known.
    pub fn write(&mut self, actor: u8, number: usize) -> Arc<Made> {
        let deps: Vec<ChangeHash> = self.heads.keys().copied().collect();
        let seq = self.own.len() as u64 + 1;
        let draft = Draft { deps: &deps, actor, seq, start_op: self.max_op + 1, salt: number as u64 };
        let made =
            Arc::new(Made { number, deps: self.heads.values().copied().collect(), change: draft.change() });
        self.own.insert(made.change.hash);
        self.unacknowledged.insert(made.change.hash);
        self.add(&made);
        made
    }
}
