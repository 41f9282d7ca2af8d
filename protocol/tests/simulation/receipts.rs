//! Receipts: nodes follow what their sessions have open, and whatever they say that another region has must be there.

use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::link::LinkFrame;
use isobar_protocol::receipts::{Baseline, Checkpoint, Effect, Receipts, Subject};
use isobar_protocol::replica::{LinkId, Moment, Replica};

use crate::ledger::Invariant;
use crate::world::World;

/// How often a node looks at the documents that it follows.
const OBSERVE_EVERY_MS: u64 = 800;

/// By which ways a document's changes came, as the server keeps it.
#[derive(Debug)]
pub struct Ways {
    baseline: Baseline,
    /// Where the changes end that came otherwise than from a client or with a run, until they are durable.
    otherwise_end: u64,
}

impl Ways {
    pub fn of_loaded(exists: bool, new: Baseline) -> Self {
        Self { baseline: if exists { new } else { Baseline::NOTHING }, otherwise_end: 0 }
    }

    pub fn staged_otherwise(&mut self, end: u64) {
        self.otherwise_end = self.otherwise_end.max(end);
    }

    fn look(&mut self, durable_end: u64, new: Baseline) -> (Baseline, bool) {
        if self.otherwise_end == 0 {
            return (self.baseline, true);
        }
        self.baseline = new;
        if durable_end >= self.otherwise_end {
            self.otherwise_end = 0;
        }
        (self.baseline, self.otherwise_end == 0)
    }
}

impl World {
    /// Calls a region's receipts, if there is a node, and performs what they want done.
    pub fn call_receipts(&mut self, at: usize, call: impl FnOnce(&mut Receipts, &Replica, Moment)) {
        let now = self.regions[at].clock.at(self.now);
        let Some(node) = &mut self.regions[at].node else { return };
        call(&mut node.receipts, &node.replica, now);
        for effect in node.receipts.effects() {
            match effect {
                Effect::Ask { link, request, document, heads } => {
                    self.send_beside(at, link, &LinkFrame::HeadsRequest { request, document, heads });
                }
                Effect::Reached { link, subject, heads } => {
                    self.check_receipt(at, link, &subject.document, &heads);
                }
            }
        }
    }

    /// Tells the receipts what followed documents hold now, and that time has passed. After commits they hear of what has moved.
    pub fn observe(&mut self, at: usize) {
        let now = self.regions[at].clock.at(self.now);
        let Some(node) = &mut self.regions[at].node else { return };
        if now.0 < node.observed_at.0 + OBSERVE_EVERY_MS {
            return;
        }
        node.observed_at = now;
        let open: Vec<DocumentId> = node.open.keys().cloned().collect();
        open.iter().for_each(|document| self.observe_document(at, document));
        self.call_receipts(at, |receipts, replica, now| receipts.tick(now, replica));
    }

    /// Tells the receipts what a document holds now, if it is followed.
    pub fn observe_document(&mut self, at: usize, document: &DocumentId) {
        let Some(node) = &self.regions[at].node else { return };
        let Some(group) = node.open.get(document).cloned() else { return };
        let Some((baseline, heads, is_closed)) = self.durable(at, document) else { return };
        let node = self.regions[at].node.as_ref().expect("it was there a moment ago");
        let mut target = node.replica.target(&group);
        // The replica may not have been told yet what the heads hold already.
        target.raise(node.own[&group], node.positions[&node.own[&group]].0);
        let checkpoint = Checkpoint { baseline, heads, is_closed, target: target.into() };
        self.call_receipts(at, |receipts, replica, now| {
            receipts.observe(now, Subject::here(document.clone()), group, checkpoint, replica);
        });
    }

    fn durable(&mut self, at: usize, document: &DocumentId) -> Option<(Baseline, Vec<ChangeHash>, bool)> {
        let node = self.regions[at].node.as_mut()?;
        let new = node.new_baseline();
        let graph = node.graphs.get(document)?;
        if graph.durable_end() == 0 {
            return None;
        }
        let (baseline, is_settled) = node.ways.get_mut(document)?.look(graph.durable_end(), new);
        Some((baseline, graph.heads(), is_settled && graph.pending_count() == 0))
    }

    /// Takes a frame that is about receipts; gives others back.
    pub fn receive_receipt(&mut self, at: usize, link: LinkId, frame: LinkFrame) -> Option<LinkFrame> {
        match frame {
            LinkFrame::HeadsRequest { request, document, heads } => {
                let has = self.serves(at, &document, &heads);
                self.send_beside(at, link, &LinkFrame::HeadsAnswer { request, has });
            }
            LinkFrame::HeadsAnswer { request, has } => {
                self.call_receipts(at, |receipts, replica, now| {
                    receipts.answered(now, link, request, has, replica);
                });
            }
            other => return Some(other),
        }
        None
    }

    /// Whether all of these changes are durable and in service.
    fn serves(&mut self, at: usize, document: &DocumentId, heads: &[ChangeHash]) -> bool {
        let Some(graph) = self.graph(at, document) else { return false };
        let end = graph.durable_end();
        let durable = |hash: &ChangeHash| graph.position(hash).is_some_and(|it| it < end);
        let missing: Vec<ChangeHash> = heads.iter().filter(|hash| !durable(hash)).copied().collect();
        let row = self.regions[at].disk.documents.get(document);
        missing.iter().all(|hash| row.is_some_and(|row| row.covers(hash)))
    }

    /// A receipt is true of the region that was linked. What that has lost since nobody knows yet.
    fn check_receipt(&mut self, at: usize, link: LinkId, document: &DocumentId, heads: &[ChangeHash]) {
        let Some((connection, side)) = self.connection_of(at, link) else { return };
        let other = self.connections[connection].ends[1 - side];
        self.count("receipts");
        let peer = &self.regions[other];
        if self.connections[connection].disk_numbers[1 - side] != peer.disk_number
            // Of a document that was deleted somewhere, entries come without their bytes.
            || self.ledger.was_deleted(document)
        {
            return;
        }
        if !heads.iter().all(|hash| peer.disk.holds(document, hash)) {
            self.violate(Invariant::TrueReceipts, || {
                format!("r{at} says that r{other} has {heads:?} of {document:?}")
            });
        }
    }

    /// Sends a frame that is none of the replica's.
    pub fn send_beside(&mut self, at: usize, link: LinkId, frame: &LinkFrame) {
        self.check_frame(at, link, frame);
        if let Some((connection, side)) = self.connection_of(at, link) {
            self.send(connection, side, frame);
        }
    }
}
