//! Documents in memory: brought to life from the disk and from what was submitted, and what is staged in them.

use std::collections::BTreeSet;
use std::sync::Arc;

use isobar_protocol::base::BaseIndex;
use isobar_protocol::change::Change;
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested, Refusal};
use isobar_protocol::ids::{ChangeHash, DocumentId};

use crate::change_bytes::Made;
use crate::disk::DocumentRow;
use crate::plan::Planted;
use crate::receipts::Ways;
use crate::region::{Own, Submission};
use crate::world::World;

/// Offers a change to a graph, and the base's index if it refers to its inside.
pub fn ingest(
    graph: &mut Graph,
    change: &Change,
    limits: &Limits,
    index: Option<&Arc<BaseIndex>>,
) -> Result<Ingested, Refusal> {
    match (graph.ingest(change.clone(), limits)?, index) {
        (Ingested::NeedsIndex, Some(index)) => {
            // A later base may have been installed, which this graph has not taken over yet.
            let covered = graph.tail_start() as usize;
            let index = match index.len() == covered {
                true => index.clone(),
                false => Arc::new(BaseIndex::clone(index).prefix(covered)),
            };
            graph.attach_index(index);
            let ingested = graph.ingest(change.clone(), limits);
            graph.detach_index();
            ingested
        }
        (ingested, _) => Ok(ingested),
    }
}

impl World {
    /// Brings a document's graph to life: what is durable, then what was submitted. `None` if the document is not served.
    pub fn graph(&mut self, at: usize, document: &DocumentId) -> Option<&mut Graph> {
        let node = self.regions[at].node.as_ref()?;
        let row = self.regions[at].disk.documents.get(document);
        let served = row.is_none_or(|row| row.deleted_at_ms.is_none() && !row.quarantined);
        if !served || node.refused.contains_key(document) {
            return None;
        }
        if !node.graphs.contains_key(document) {
            self.count("loads");
            let (graph, refused) = self.load(at, document);
            if refused {
                self.refuse(at, document);
                return None;
            }
            self.take_in(at, document, graph);
        }
        self.regions[at].node.as_mut()?.graphs.get_mut(document)
    }

    fn take_in(&mut self, at: usize, document: &DocumentId, graph: Graph) {
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("only nodes load");
        let base = region.disk.documents.get(document).and_then(|row| row.base.as_ref());
        let is_pruned = base.is_none_or(|base| base.pruned);
        let load = node.new_load();
        node.generations.insert(document.clone(), (base.map_or(0, |base| base.generation), load));
        let mut ways =
            Ways::of_loaded(graph.staged_end() > 0 || graph.pending_count() > 0, node.new_baseline());
        if graph.staged_end() > graph.durable_end() || graph.pending_count() > 0 {
            ways.staged_otherwise(graph.staged_end());
        }
        node.ways.insert(document.clone(), ways);
        node.graphs.insert(document.clone(), graph);
        self.check_heads(at, document);
        if !is_pruned {
            self.prune_soon(at, document);
        }
    }

    fn load(&self, at: usize, document: &DocumentId) -> (Graph, bool) {
        let row = self.regions[at].disk.documents.get(document);
        let (mut graph, mut refused) = row.map_or((Graph::new(), false), load_row);
        let index = row.and_then(|row| row.base.as_ref()).map(|base| &base.index);
        let node = self.regions[at].node.as_ref().expect("only nodes load");
        let submitted = node.submitted().flat_map(|submission| submission.changes(&self.changes));
        for (_, made) in submitted.filter(|(id, _)| *id == document) {
            refused |= ingest(&mut graph, &made.change, &Limits::stored(), index).is_err();
        }
        (graph, refused)
    }

    pub fn index(&self, at: usize, document: &DocumentId) -> Option<Arc<BaseIndex>> {
        let row = self.regions[at].disk.documents.get(document)?;
        row.base.as_ref().map(|base| base.index.clone())
    }

    /// A stored change does not fit its document: the document is served no more. It is recorded when the change is durable.
    pub fn refuse(&mut self, at: usize, document: &DocumentId) {
        if self.is_planted(Planted::IgnoreClones) {
            return;
        }
        self.count("refused");
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("only nodes refuse");
        node.forget(document);
        let reason = node.submissions;
        node.refused.insert(document.clone(), reason);
        if reason <= node.durable_submission
            && let Some(row) = region.disk.documents.get_mut(document)
        {
            row.quarantined = true;
        }
    }

    /// Stages what is submitted, and has it committed.
    pub fn submit(&mut self, at: usize, submission: Submission) {
        let changes: Vec<(DocumentId, Arc<Made>)> = match &submission {
            Submission::Own { .. } => Vec::new(),
            other => {
                let changes = other.changes(&self.changes);
                changes.into_iter().map(|(id, made)| (id.clone(), made.clone())).collect()
            }
        };
        let otherwise = matches!(submission, Submission::Contents { .. });
        self.regions[at].node.as_mut().expect("only nodes submit").push(submission);
        for (document, made) in changes {
            // A document that is not in memory is brought there when somebody wants it.
            let resident = self.regions[at].node.as_ref().is_some_and(|it| it.graphs.contains_key(&document));
            let index = self.index(at, &document);
            if (resident || self.rng.chance(50))
                && let Some(graph) = self.graph(at, &document)
            {
                let ingested = ingest(graph, &made.change, &Limits::stored(), index.as_ref()).ok();
                let end = graph.staged_end();
                if otherwise && let Some(ways) = self.ways(at, &document) {
                    ways.staged_otherwise(end);
                }
                self.staged(at, &document, ingested);
            }
        }
        self.start_commit(at);
    }

    /// Logs what was staged and nobody stores yet: changes of clients that waited for a dependency. `None`: it was refused.
    pub fn staged(&mut self, at: usize, document: &DocumentId, ingested: Option<Ingested>) {
        let positions = match ingested {
            None => return self.refuse(at, document),
            Some(Ingested::Staged(positions)) => positions,
            Some(Ingested::Pending) => return self.count("pending"),
            Some(_) => return,
        };
        if positions.end > positions.start + 1
            && let Some(ways) = self.ways(at, document)
        {
            ways.staged_otherwise(positions.end);
        }
        let region = &self.regions[at];
        let node = region.node.as_ref().expect("only nodes stage");
        let Some(graph) = node.graphs.get(document) else { return };
        let mut unlogged: Vec<ChangeHash> = positions.filter_map(|position| graph.hash(position)).collect();
        unlogged.retain(|it| !region.disk.holds(document, it));
        for (_, made) in node.submitted().flat_map(|submission| submission.changes(&self.changes)) {
            unlogged.retain(|it| *it != made.change.hash);
        }
        let group = self.group_of(document);
        for hash in unlogged {
            let content = Own::Change(self.changes[&hash].clone());
            let own = Submission::Own { group: group.clone(), document: document.clone(), content };
            self.regions[at].node.as_mut().expect("only nodes stage").push(own);
        }
    }

    fn ways(&mut self, at: usize, document: &DocumentId) -> Option<&mut Ways> {
        self.regions[at].node.as_mut()?.ways.get_mut(document)
    }
}

/// The graph of what is stored, all of it durable, and whether something of it was refused.
fn load_row(row: &DocumentRow) -> (Graph, bool) {
    let base = row.base.as_ref();
    let mut graph = base.map_or_else(Graph::new, |base| Graph::from_base((*base.summary).clone()));
    let index = base.map(|base| &base.index);
    let mut refused = false;
    for made in row.changes.values().filter(|made| !row.covers(&made.change.hash)) {
        refused |= ingest(&mut graph, &made.change, &Limits::stored(), index).is_err();
    }
    graph.advance_durable(graph.staged_end());
    let is_here = |hash: &ChangeHash| graph.position(hash).is_some() || graph.is_pending(hash);
    refused |= !row.changes.keys().all(|hash| is_here(hash) || row.covers(hash));
    (graph, refused)
}

/// Documents that changed in the present step.
pub type Touched = BTreeSet<(usize, DocumentId)>;
