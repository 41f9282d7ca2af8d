//! Making a base of the front of the tail.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::past::{Past, Reach};
use super::{Graph, Node};
use crate::base::{BaseActor, BaseEntry, BaseHead, BaseIndex, BaseSummary};
use crate::ids::ChangeHash;
use crate::planted::{self, Fault};

/// What a graph gave up for a base. Dropping it frees the memory; that is all it is for.
#[derive(Debug)]
pub struct Retired {
    covered: Vec<Node>,
    _positions: HashMap<ChangeHash, u64>,
    _index: Option<Arc<BaseIndex>>,
}

impl Graph {
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
        let mut heads: Vec<BaseHead> = old_heads.into_values().cloned().chain(new_heads).collect();
        if planted::is(Fault::ForgetBaseHeads) {
            heads.drain(1..);
        }
        if planted::is(Fault::ForgetBaseAuthors) {
            actors.iter_mut().for_each(|actor| actor.last_seq = 0);
        }
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
