//! Bases: the older part of a document's changes is folded into one, installed in a transaction, taken over in memory, and
//! then what it covers is removed in steps. The node may die between any two of these.
//!
//! The summary and the index are the core's own; the chunk is a list of names, as nobody here opens one.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use isobar_protocol::base::{BaseEntry, BaseIndex, BaseSummary};
use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::link::BaseContents;

use crate::change_bytes::Made;
use crate::disk::BaseRow;
use crate::events::Event;
use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::world::World;

/// How often a base cannot be installed for now, in percent.
const FAILS_PERCENT: u32 = 10;

/// How many changes are removed in one step at most: few, so that there are many steps.
const PRUNE_CHANGES: usize = 3;

/// A base that was made, to be installed.
#[derive(Debug)]
pub struct NewBase {
    replaces: u64,
    /// The number of the graph that it was made from.
    load: u64,
    summary: BaseSummary,
    entries: Vec<BaseEntry>,
    covered: BTreeMap<ChangeHash, Arc<Made>>,
}

impl World {
    /// Makes a base of the front of some document's tail.
    pub fn compact(&mut self, at: usize) {
        let here: Vec<DocumentId> = self.regions[at].disk.documents.keys().cloned().collect();
        let Some(document) = self.rng.pick(&here).cloned() else { return };
        let Some(graph) = self.graph(at, &document) else { return };
        let (start, end) = (graph.tail_start(), graph.durable_end());
        if end == start {
            return;
        }
        let cut = self.rng.range(start + 1, end + 1).min(end);
        let node = self.regions[at].node.as_mut().expect("it has a graph");
        if !node.compacting.insert(document.clone()) {
            return;
        }
        let graph = &node.graphs[&document];
        let (summary, entries) = graph.summarise(cut);
        let covered = graph.changes(start..cut).map(|(hash, _)| (hash, self.changes[&hash].clone()));
        let covered = covered.collect();
        let (replaces, load) = node.generations[&document];
        let base = NewBase { replaces, load, summary, entries, covered };
        let (life, delay) = (self.regions[at].life, self.rng.range(1, 200));
        self.after(delay, Event::BaseMade { region: at, life, document, base: Box::new(base) });
    }

    /// Installs a base, unless the document has another by now.
    pub fn install(&mut self, at: usize, document: DocumentId, base: Box<NewBase>) {
        let life = self.regions[at].life;
        if !self.calm && self.rng.chance(FAILS_PERCENT) {
            let delay = self.rng.range(1, 500);
            return self.after(delay, Event::BaseMade { region: at, life, document, base });
        }
        let row = self.regions[at].disk.documents.get_mut(&document);
        let found = row.as_ref().and_then(|row| row.base.as_ref()).map_or(0, |base| base.generation);
        let Some(row) = row.filter(|row| row.deleted_at_ms.is_none() && found == base.replaces) else {
            self.count("bases in conflict");
            let node = self.regions[at].node.as_mut().expect("it lives");
            node.compacting.remove(&document);
            return;
        };
        let NewBase { replaces, load, summary, entries, covered } = *base;
        let old = row.base.as_ref();
        let index = old.map_or_else(BaseIndex::default, |base| (*base.index).clone());
        let mut all = old.map_or_else(BTreeMap::new, |base| (*base.covered).clone());
        all.extend(covered);
        let generation = replaces + 1;
        row.base = Some(BaseRow {
            generation,
            summary: Arc::new(summary),
            index: Arc::new(index.extended(entries.into_iter())),
            covered: Arc::new(all),
            pruned: false,
        });
        self.count("bases");
        self.touch(at, &document);
        let delay = self.rng.range(0, 20);
        self.after(delay, Event::BaseInstalled { region: at, life, document, generation, load });
    }

    /// The node hears that a base is installed: it takes it over in memory, and has pruned what it covers. A graph that was loaded
    /// meanwhile may have its changes in another order; it is loaded again.
    pub fn base_installed(&mut self, at: usize, document: &DocumentId, generation: u64, load: u64) {
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("it lives");
        let base = region.disk.documents.get(document).and_then(|row| row.base.as_ref());
        if let Some(base) = base.filter(|base| base.generation == generation)
            && let Some(graph) = node.graphs.get_mut(document)
            && node.generations[document].0 < generation
        {
            if node.generations[document].1 == load {
                drop(graph.rebase((*base.summary).clone()));
                node.generations.insert(document.clone(), (generation, load));
            } else {
                node.forget(document);
            }
        }
        // Until a commit is over, the disk may have more than the node knows.
        if self.regions[at].node.as_ref().is_some_and(|node| node.is_idle()) {
            self.check_heads(at, document);
        }
        self.prune_soon(at, document);
    }

    pub fn prune_soon(&mut self, at: usize, document: &DocumentId) {
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("only nodes prune");
        node.compacting.insert(document.clone());
        let (life, document) = (region.life, document.clone());
        let delay = self.rng.range(1, 100);
        self.after(delay, Event::Prune { region: at, life, document });
    }

    /// Removes some of what the base covers; and says so when there is no more.
    pub fn prune(&mut self, at: usize, document: &DocumentId) {
        let too_much = self.is_planted(Planted::PruneTooMuch);
        let region = &mut self.regions[at];
        let row = region.disk.documents.get_mut(document).filter(|row| row.base.is_some());
        let Some(row) = row else {
            region.node.as_mut().expect("it lives").compacting.remove(document);
            return;
        };
        let covered = row.changes.keys().filter(|hash| too_much || row.covers(hash));
        let some: Vec<ChangeHash> = covered.take(PRUNE_CHANGES).copied().collect();
        some.iter().for_each(|hash| drop(row.changes.remove(hash)));
        if let Some(hash) = some.iter().find(|hash| !row.holds(hash)).copied() {
            self.violate(Invariant::AcknowledgedMeansKept, || {
                format!("r{at} prunes {hash:?} of {document:?}, which no base has")
            });
        }
        if !some.is_empty() {
            return self.prune_soon(at, document);
        }
        let region = &mut self.regions[at];
        if let Some(base) = region.disk.documents.get_mut(document).and_then(|row| row.base.as_mut()) {
            base.pruned = true;
        }
        region.node.as_mut().expect("it lives").compacting.remove(document);
        self.count("prunings");
    }

    /// Takes another region's base as it is if there is nothing here yet, else what it covers one by one.
    pub fn store_base(&mut self, at: usize, document: &DocumentId, base: &BaseContents) {
        self.touch(at, document);
        let hashes = covered_by(&base.chunk);
        let group = self.group_of(document);
        let covered: BTreeMap<_, _> = hashes.iter().map(|hash| (*hash, self.changes[hash].clone())).collect();
        let row = self.regions[at].disk.row(document, &group);
        if row.deleted_at_ms.is_some() {
            return;
        }
        if !row.is_empty() {
            return hashes.iter().for_each(|hash| self.store_change(at, document, *hash));
        }
        row.base = Some(BaseRow {
            generation: 1,
            summary: Arc::new(BaseSummary::decode(&base.summary).expect("regions send what decodes")),
            index: Arc::new(BaseIndex::decode(&base.index).expect("regions send what decodes")),
            covered: Arc::new(covered),
            pruned: true,
        });
        self.count("bases taken whole");
        for hash in hashes {
            self.ledger.lost.remove(&(document.clone(), hash));
        }
    }
}

/// A base as it is sent.
pub fn contents_of(base: &BaseRow) -> BaseContents {
    let chunk: Vec<u8> = base.covered.keys().flat_map(|hash| *hash.as_bytes()).collect();
    BaseContents { summary: base.summary.encode(), index: base.index.encode(), chunk: chunk.into() }
}

/// The changes in a base's chunk.
pub fn covered_by(chunk: &Bytes) -> Vec<ChangeHash> {
    chunk.chunks_exact(32).map(|name| ChangeHash(name.try_into().expect("32 bytes"))).collect()
}
