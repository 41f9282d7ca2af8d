//! What clients do: write, hand over, take, move, all when it suits them.

use std::sync::Arc;

use isobar_protocol::config::Limits;
use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::link::Progress;
use isobar_protocol::log::Opened;

use crate::change_bytes::Made;
use crate::client::Client;
use crate::events::Event;
use crate::plan::Planted;
use crate::staging::ingest;
use crate::trace;
use crate::world::World;

/// How often a client does something when faults are over: then it only hands over and takes what is left.
const CALM_TURN_MS: u64 = 300;

impl World {
    pub fn turn(&mut self, client: usize) {
        if client >= self.clients.len() {
            return;
        }
        let slow = if self.calm { CALM_TURN_MS } else { 0 };
        let delay = self.rng.range(1, 2 * self.plan.turn_every_ms.max(slow));
        self.after(delay, Event::Turn(client));
        let at = self.clients[client].region;
        if self.regions[at].node.is_none() || self.rng.chance(5) {
            self.clients[client].region = self.rng.below(self.regions.len());
            return;
        }
        let groups = &self.regions[at].groups;
        let within: Vec<DocumentId> = self
            .documents
            .iter()
            .filter(|(_, group)| groups.contains(group))
            .map(|(id, _)| id.clone())
            .collect();
        let Some(document) = self.rng.pick(&within).cloned() else { return };
        if self.rng.chance(30) {
            self.be_present(at, &document);
        }
        match self.rng.below(10) {
            _ if self.calm => {
                self.take(client, at, &document);
                self.hand_over(client, at, &document);
            }
            0..5 => {
                self.write(client, &document);
                self.hand_over(client, at, &document);
            }
            5 => self.write(client, &document),
            6 => self.take(client, at, &document),
            _ => {
                self.take(client, at, &document);
                self.hand_over(client, at, &document);
            }
        }
    }

    fn write(&mut self, client: usize, document: &DocumentId) {
        let number = self.changes.len();
        let Some(left) = self.writes_left.checked_sub(1) else { return };
        let Self { clients, .. } = self;
        let actor = clients[client].actor;
        let view = clients[client].views.entry(document.clone()).or_default();
        if view.spoilt {
            return;
        }
        self.writes_left = left;
        let made = view.write(actor, number);
        trace::note(|| format!("  client {client} writes {:?}", made.change.hash));
        self.changes.insert(made.change.hash, made);
        self.count("writes");
    }

    /// The client takes what the region has.
    fn take(&mut self, client: usize, at: usize, document: &DocumentId) {
        let Some(graph) = self.graph(at, document) else { return };
        let tail: Vec<_> = graph.changes(0..graph.durable_end()).map(|(hash, _)| hash).collect();
        self.acknowledge(at, document);
        let Self { clients, changes, regions, .. } = self;
        let base = regions[at].disk.documents.get(document).and_then(|row| row.base.as_ref());
        // Dependencies first.
        let mut hashes: Vec<_> = base.iter().flat_map(|base| base.covered.keys().copied()).collect();
        hashes.sort_unstable_by_key(|hash| changes[hash].number);
        hashes.extend(tail);
        let Client { actor, views, .. } = &mut clients[client];
        let view = views.entry(document.clone()).or_default();
        for hash in hashes {
            let made = &changes[&hash];
            if made.change.actor.as_bytes() == [*actor] && !view.own.contains(&hash) {
                view.spoilt = true;
            }
            if !view.spoilt {
                view.add(made);
            }
        }
    }

    /// The client sends what the region lacks; sometimes only the last of it, and sometimes it gets lost.
    fn hand_over(&mut self, client: usize, at: usize, document: &DocumentId) {
        let Some(view) = self.clients[client].views.get(document) else { return };
        let mut changes = view.changes.clone();
        if let Some(graph) = self.graph(at, document) {
            changes.retain(|made| graph.durable_position(&made.change.hash).is_none());
        }
        if let Some(row) = self.regions[at].disk.documents.get(document) {
            changes.retain(|made| !row.covers(&made.change.hash));
        }
        if changes.is_empty() || !self.calm && self.rng.chance(10) {
            return;
        }
        if self.rng.chance(15) {
            changes.drain(..changes.len() - 1);
        }
        let life = self.regions[at].life;
        let delay = self.rng.range(1, 30);
        self.after(delay, Event::Offer { client, region: at, life, document: document.clone(), changes });
    }

    /// What a client sent is held against the document, staged and submitted.
    pub fn offer(&mut self, client: usize, at: usize, document: &DocumentId, changes: &[Arc<Made>]) {
        for made in changes {
            let index = self.index(at, document);
            let Some(graph) = self.graph(at, document) else {
                // Deleted or quarantined: the client is told so, and may go on trying.
                return self.count("refused clients");
            };
            match ingest(graph, &made.change, &Limits::default(), index.as_ref()) {
                Ok(ingested) => self.staged(at, document, Some(ingested)),
                Err(refusal) => {
                    trace::note(|| format!("  r{at} refuses {:?}: {refusal}", made.change.hash));
                    if let Some(view) = self.clients.get_mut(client).and_then(|it| it.views.get_mut(document))
                    {
                        view.spoilt = true;
                    }
                    break;
                }
            }
        }
        if self.is_planted(Planted::AcknowledgeBeforeCommit) {
            self.acknowledge(at, document);
        }
        if self.is_planted(Planted::AnnounceBeforeCommit) {
            self.announce_early(at, document, changes);
        }
        self.start_commit(at);
    }

    /// What was acknowledged need not be asked about again.
    pub fn hear_acknowledgement(&mut self, client: usize, document: &DocumentId, changes: &[ChangeHash]) {
        let view = self.clients.get_mut(client).and_then(|client| client.views.get_mut(document));
        if let Some(view) = view {
            view.unacknowledged.retain(|hash| !changes.contains(hash));
        }
    }

    fn announce_early(&mut self, at: usize, document: &DocumentId, changes: &[Arc<Made>]) {
        let group = self.group_of(document);
        let entries: Vec<(DocumentId, Opened)> =
            changes.iter().map(|made| (document.clone(), Opened::Change(made.change.clone()))).collect();
        let Some(node) = &self.regions[at].node else { return };
        let run = self.own_run(at, &group, &entries, &node.positions);
        let progress = Progress {
            origin: run.origin,
            region: run.region,
            group: run.group,
            seq: run.last,
            chain: run.chain,
        };
        self.call(at, |replica, now| replica.own_appended(now, progress));
    }
}
