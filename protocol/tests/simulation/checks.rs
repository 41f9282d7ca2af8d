//! What is looked at, and when.
//!
//! - As it happens: every frame that is sent, every run that is taken in, heads whenever they move or are loaded, every
//!   acknowledgement, receipt and presence message, every entry against all that were ever written under its origin.
//! - After every step: what the step has changed on disks, that is origins (dense, and all that is new under them is kept) and
//!   documents (in their groups, whole, not resurrected).
//! - Every 256 events and at the end: everything on every disk, bytes of deleted documents and windows of links among it; at
//!   starts and truncations everything on that disk. What breaks otherwise than in a step that touches it shows only then.

use isobar_protocol::config::{LINK_WINDOW_BYTES, Limits};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::{LinkFrame, Progress};
use isobar_protocol::log::{Chain, open_run};
use isobar_protocol::replica::{LinkId, ReceivedRun};

use crate::bases::covered_by;
use crate::disk::{Disk, OriginRow};
use crate::events::Event;
use crate::ledger::{Invariant, Name};
use crate::plan::Planted;
use crate::region::name_of;
use crate::world::World;

impl World {
    /// Holds a frame that a region sends against its disk, and against what the receiver may see.
    pub fn check_frame(&mut self, at: usize, link: LinkId, frame: &LinkFrame) {
        let Some(&(connection, side)) = self.regions[at].node.as_ref().and_then(|node| node.links.get(&link))
        else {
            return;
        };
        let to = self.connections[connection].ends[1 - side];
        match frame {
            LinkFrame::Have { origins } => origins.iter().for_each(|it| self.check_progress(at, to, it)),
            // Runs that were handed over and are not stored yet are asked beyond; they were durable elsewhere.
            LinkFrame::Subscribe { origin, after, chain }
                if !self.ledger.is_chain(*origin, *after, *chain) =>
            {
                self.violate(Invariant::DenseLog, || format!("r{at} asks for {origin:?} after {after:?}"));
            }
            LinkFrame::Entries { origin, first, chain, body } => {
                self.check_entries(at, to, *origin, *first, *chain, body);
            }
            LinkFrame::Truncated { origin, floor } => {
                let stands = self.regions[at].disk.origins.get(origin).map(|row| row.floor);
                if stands.is_none_or(|stands| stands < *floor) {
                    self.violate(Invariant::DenseLog, || {
                        format!("r{at} says {origin:?} begins at {floor:?}")
                    });
                }
            }
            LinkFrame::SnapshotPage { vector, documents, .. } => {
                vector.iter().for_each(|it| self.check_progress(at, to, it));
                for contents in documents {
                    self.check_residency(at, to, &contents.document, &contents.group);
                    let row = self.regions[at].disk.documents.get(&contents.document);
                    let stored = |hash: &ChangeHash| row.is_some_and(|row| row.holds(hash));
                    let covered = contents.base.iter().flat_map(|base| covered_by(&base.chunk));
                    let all = covered.chain(contents.changes.iter().map(name_of)).all(|hash| stored(&hash));
                    if !all {
                        self.violate(Invariant::DurableBeforeAdvertised, || format!("r{at} sends a page"));
                    }
                }
            }
            LinkFrame::Interest { add, remove } => {
                for document in add.iter().chain(remove) {
                    let group = self.group_of(document);
                    self.check_residency(at, to, document, &group);
                }
            }
            LinkFrame::HeadsRequest { document, .. } => {
                let group = self.group_of(document);
                self.check_residency(at, to, document, &group);
            }
            LinkFrame::Presence { document, sender, .. } => {
                self.check_presence_frame(at, to, document, sender);
            }
            _ => {}
        }
        let carries = matches!(
            frame,
            LinkFrame::Entries { .. } | LinkFrame::SnapshotRequest { .. } | LinkFrame::SnapshotPage { .. }
        );
        if self.silent && carries {
            self.violate(Invariant::Silence, || format!("r{at} still sends {frame:?}"));
        }
    }

    fn check_progress(&mut self, at: usize, to: usize, progress: &Progress) {
        let durable = self.regions[at].disk.origins.get(&progress.origin).map_or(Seq(0), |row| row.seq);
        if durable < progress.seq {
            self.violate(Invariant::DurableBeforeAdvertised, || {
                format!("r{at} announces {progress:?}, durable is {durable:?}")
            });
        }
        if !self.ledger.is_chain(progress.origin, progress.seq, progress.chain) {
            self.violate(Invariant::OneEntryPerSeq, || {
                format!("r{at} announces {progress:?}, never written")
            });
        }
        if !self.regions[to].groups.contains(&progress.group) && !self.is_planted(Planted::TrustSenders) {
            self.violate(Invariant::Residency, || format!("r{at} tells r{to} of {progress:?}"));
        }
    }

    fn check_entries(
        &mut self,
        at: usize,
        to: usize,
        origin: OriginId,
        first: Seq,
        chain: Chain,
        body: &bytes::Bytes,
    ) {
        let Ok(entries) = open_run(body, &Limits::stored()) else {
            return self.violate(Invariant::DenseLog, || format!("r{at} sends what does not decode"));
        };
        let last = Seq(first.0 + entries.len() as u64 - 1);
        let durable = self.regions[at].disk.origins.get(&origin).map_or(Seq(0), |row| row.seq);
        if last > durable {
            self.violate(Invariant::DurableBeforeAdvertised, || {
                format!("r{at} sends {origin:?} to {last:?}")
            });
        }
        if self.ledger.forked.contains(&origin) {
            return;
        }
        if !self.ledger.is_chain(origin, Seq(first.0 - 1), chain) {
            self.violate(Invariant::DenseLog, || format!("r{at} sends a wrong chain of {origin:?}"));
        }
        for (seq, (document, opened)) in (first.0..).zip(&entries) {
            let written = self.ledger.logs.get(&origin).and_then(|log| log.entries.get(seq as usize - 1));
            if written != Some(&(document.clone(), Name::of(opened))) {
                self.violate(Invariant::DenseLog, || format!("r{at} sends another {origin:?} {seq}"));
            }
            let group = self.group_of(document);
            self.check_residency(at, to, document, &group);
        }
        let logged = self.ledger.logs.get(&origin).map(|log| log.group.clone());
        let trusted = self.is_planted(Planted::TrustSenders);
        if logged.is_some_and(|group| !self.regions[to].groups.contains(&group)) && !trusted {
            self.violate(Invariant::Residency, || format!("r{at} sends {origin:?} to r{to}"));
        }
    }

    pub fn check_residency(&mut self, at: usize, to: usize, document: &DocumentId, group: &PlacementGroup) {
        let is_for = self.regions[to].groups.contains(group) || self.is_planted(Planted::TrustSenders);
        if !is_for || *group != self.group_of(document) {
            self.violate(Invariant::Residency, || format!("r{at} sends {document:?} of {group} to r{to}"));
        }
    }

    /// Holds a run that is to be stored against what was written.
    pub fn check_received(&mut self, at: usize, run: &ReceivedRun) {
        let origin = run.origin;
        if run.last.0 + 1 - run.first.0 != run.entries.len() as u64 {
            self.violate(Invariant::DenseLog, || format!("r{at} is handed a run of another length"));
        }
        if !self.ledger.is_chain(origin, Seq(run.first.0 - 1), run.chain_before) {
            self.violate(Invariant::DenseLog, || format!("r{at} is handed {origin:?} from {:?}", run.first));
        }
        if !self.regions[at].groups.contains(&run.group) {
            self.violate(Invariant::Residency, || format!("r{at} is handed {origin:?} of {}", run.group));
        }
        for (document, _) in &run.entries {
            if !self.regions[at].groups.contains(&self.group_of(document)) {
                self.violate(Invariant::Residency, || format!("r{at} is handed {document:?}"));
            }
        }
    }

    /// The heads that clients are shown: what is stored and complete, and nothing else.
    pub fn check_heads(&mut self, at: usize, document: &DocumentId) {
        let region = &self.regions[at];
        let Some(graph) = region.node.as_ref().and_then(|node| node.graphs.get(document)) else { return };
        let Some(row) = region.disk.documents.get(document) else {
            if !graph.heads().is_empty() {
                self.violate(Invariant::DurableBeforeAdvertised, || format!("r{at} shows {document:?}"));
            }
            return;
        };
        let shown = graph.heads();
        // As long as commits are under way, the disk may be ahead of a change that stands before in memory.
        let is_over = region.node.as_ref().is_some_and(|it| it.queue.is_empty() && it.batch.is_none());
        let waits = |hash: &ChangeHash| graph.position(hash).is_some_and(|it| it >= graph.durable_end());
        let expected = row.shape(|hash| is_over || !waits(hash)).heads;
        if !shown.iter().eq(&expected) {
            let blocked = format!("{:?} is next of {}", graph.hash(graph.durable_end()), graph.staged_end());
            let stored = shown.iter().all(|hash| row.holds(hash));
            let invariant =
                if stored { Invariant::CausalVisibility } else { Invariant::DurableBeforeAdvertised };
            self.violate(invariant, || {
                format!(
                    "r{at} shows {shown:?} of {document:?}, stored and complete are {expected:?}; {blocked}"
                )
            });
        }
    }

    /// Notes that the present step changes a document on a disk.
    pub fn touch(&mut self, at: usize, document: &DocumentId) {
        self.touched.insert((at, document.clone()));
        self.regions[at].disk.prints.remove(document);
        self.has_moved(|pair| pair.ends.contains(&at));
    }

    /// Looks at what the step that is over has changed.
    pub fn audit_step(&mut self) {
        for (at, origin) in std::mem::take(&mut self.moved) {
            let from = self.looked_at.get(&(at, origin)).copied().unwrap_or(Seq(0));
            let Some(row) = self.regions[at].disk.origins.get(&origin) else { continue };
            let seq = row.seq;
            let found = gap(row).map(|gap| (Invariant::DenseLog, format!("{origin:?} {gap}")));
            let found = found.or_else(|| self.audit_origin(at, origin, from));
            self.looked_at.insert((at, origin), seq);
            self.found(at, found);
        }
        for (at, document) in std::mem::take(&mut self.touched) {
            let found = self.audit_document(at, &document);
            self.found(at, found);
        }
    }

    fn found(&mut self, at: usize, found: Option<(Invariant, String)>) {
        if let Some((invariant, detail)) = found {
            self.violate(invariant, || format!("r{at}: {detail}"));
        }
    }

    /// Looks at everything that is durable.
    pub fn audit(&mut self) {
        (0..self.regions.len()).for_each(|at| self.audit_region(at));
    }

    /// Looks at everything that is durable in a region.
    pub fn audit_region(&mut self, at: usize) {
        let mut found = audit_logs(&self.regions[at].disk);
        found = found.or_else(|| self.audit_documents(at));
        found = found.or_else(|| self.audit_vector(at));
        found = found.or_else(|| self.audit_windows(at));
        self.found(at, found);
    }

    fn audit_documents(&self, at: usize) -> Option<(Invariant, String)> {
        let region = &self.regions[at];
        let found = region.disk.documents.keys().find_map(|document| self.audit_document(at, document));
        if found.is_some() {
            return found;
        }
        let gone = region.deleted.iter().find(|it| !region.disk.is_deleted(it));
        if let Some(document) = gone {
            return Some((Invariant::NoResurrection, format!("{document:?} is not deleted any more")));
        }
        // Until it has taken note of the commit, the node does not know.
        let idle = region.node.as_ref().filter(|node| node.is_idle());
        let shown =
            idle.and_then(|node| node.graphs.keys().find(|document| region.disk.is_deleted(document)));
        shown.map(|document| (Invariant::NoResurrection, format!("{document:?} is in memory")))
    }

    fn audit_document(&self, at: usize, document: &DocumentId) -> Option<(Invariant, String)> {
        let region = &self.regions[at];
        let row = region.disk.documents.get(document)?;
        if !region.groups.contains(&row.group) {
            return Some((Invariant::Residency, format!("{document:?} of {} is here", row.group)));
        }
        if row.deleted_at_ms.is_some() && !row.is_empty() {
            return Some((Invariant::NoResurrection, format!("{document:?} has changes again")));
        }
        let base = row.base.as_ref()?;
        let complete =
            base.covered.len() as u64 == base.summary.change_count && base.index.len() == base.covered.len();
        (!complete).then(|| (Invariant::AcknowledgedMeansKept, format!("{document:?} has a torn base")))
    }

    /// Whatever the vector covers is in the documents, unless it was deleted somewhere.
    fn audit_vector(&self, at: usize) -> Option<(Invariant, String)> {
        let origins = self.regions[at].disk.origins.keys();
        origins.into_iter().find_map(|origin| self.audit_origin(at, *origin, Seq(0)))
    }

    fn audit_origin(&self, at: usize, origin: OriginId, from: Seq) -> Option<(Invariant, String)> {
        let region = &self.regions[at];
        let row = &region.disk.origins[&origin];
        let log = self.ledger.logs.get(&origin).filter(|_| !self.ledger.forked.contains(&origin))?;
        let new = (from.0 + 1..=row.seq.0).zip(log.entries.iter().skip(from.0 as usize));
        for (seq, (document, name)) in new {
            let kept = match name {
                Name::Change(hash) => {
                    region.disk.holds(document, hash)
                        || region.disk.is_deleted(document)
                        // Its bytes may be gone ahead of the tombstone.
                        || self.ledger.was_deleted(document)
                }
                Name::Tombstone(_) => region.disk.is_deleted(document),
            };
            if !kept {
                let detail = format!("{origin:?} {seq} of {document:?} is missing: {name:?}");
                return Some((Invariant::AcknowledgedMeansKept, detail));
            }
        }
        None
    }

    fn audit_windows(&self, at: usize) -> Option<(Invariant, String)> {
        let node = self.regions[at].node.as_ref()?;
        let over = node.replica.links().find(|it| it.in_flight_bytes > 2 * LINK_WINDOW_BYTES)?;
        Some((Invariant::Bounded, format!("{over:?}")))
    }

    /// Tells the clients of a region which of their changes are kept.
    pub fn acknowledge(&mut self, at: usize, document: &DocumentId) {
        let hastily = self.is_planted(Planted::AcknowledgeBeforeCommit);
        let Some(graph) = self.regions[at].node.as_ref().and_then(|node| node.graphs.get(document)) else {
            return;
        };
        let row = self.regions[at].disk.documents.get(document);
        let kept = |hash: &&ChangeHash| {
            let durable = graph.position(hash).is_some_and(|it| hastily || it < graph.durable_end());
            durable || row.is_some_and(|row| row.covers(hash))
        };
        let mut promised = Vec::new();
        for (number, client) in self.clients.iter().enumerate().filter(|(_, client)| client.region == at) {
            let Some(view) = client.views.get(document) else { continue };
            let changes: Vec<ChangeHash> = view.unacknowledged.iter().filter(kept).copied().collect();
            if !changes.is_empty() {
                promised.push((number, changes));
            }
        }
        for (client, changes) in promised {
            self.promise(at, client, document, changes);
        }
    }

    /// Tells a client that changes are kept. It may never hear of it.
    fn promise(&mut self, at: usize, client: usize, document: &DocumentId, changes: Vec<ChangeHash>) {
        for hash in &changes {
            self.count("acknowledged");
            let disk = &self.regions[at].disk;
            if !disk.holds(document, hash) && !disk.is_deleted(document) {
                self.violate(Invariant::DurableBeforeAdvertised, || {
                    format!("r{at} acknowledges {hash:?} of {document:?}, which is not stored")
                });
            }
            self.ledger.acknowledged.insert((document.clone(), *hash));
        }
        if !self.calm && self.rng.chance(10) {
            return self.count("lost acknowledgements");
        }
        let delay = self.rng.range(1, 30);
        self.after(delay, Event::Acknowledged { client, document: document.clone(), changes });
    }
}

/// Every log is dense: its runs follow each other from the floor to the counter. Deleted documents have left no bytes.
fn audit_logs(disk: &Disk) -> Option<(Invariant, String)> {
    for (origin, row) in &disk.origins {
        if let Some(detail) = gap(row) {
            return Some((Invariant::DenseLog, format!("{origin:?} {detail}")));
        }
        for run in row.runs.values() {
            if disk.documents.values().all(|row| row.deleted_at_ms.is_none()) {
                break;
            }
            let entries = isobar_protocol::log::decode_run(&run.body).expect("stored runs decode");
            let kept = entries.iter().find(|entry| {
                matches!(entry.content, isobar_protocol::log::Content::Change { .. })
                    && disk.is_deleted(&entry.document)
            });
            if let Some(entry) = kept {
                return Some((
                    Invariant::NoResurrection,
                    format!("{:?} has bytes in the log", entry.document),
                ));
            }
        }
    }
    None
}

fn gap(row: &OriginRow) -> Option<String> {
    let mut end = row.floor;
    for run in row.runs.values() {
        if run.first.0 != end.0 + 1 {
            return Some(format!("has nothing between {end:?} and {:?}", run.first));
        }
        end = run.last;
    }
    (end != row.seq).then(|| format!("ends at {end:?}, its counter says {:?}", row.seq))
}
