//! The end of a schedule: faults stop, everything heals, and all regions must come to the same.

use std::collections::{BTreeMap, BTreeSet};

use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};

use crate::disk::Disk;
use crate::events::Event;
use crate::ledger::{Invariant, Violation};
use crate::plan::Planted;
use crate::region::Region;
use crate::trace;
use crate::world::{Tally, World};

/// How long regions may take to come to the same after the last fault, in virtual time. Dead links are noticed after 15
/// seconds, and some are noticed one after the other.
const SETTLES_WITHIN_MS: u64 = 120_000;

/// How long clients go on handing over what they have.
const CLIENTS_FINISH_MS: u64 = 3_000;

/// Between two looks whether all is settled.
const LOOK_EVERY_MS: u64 = 500;

/// How long acknowledgements may take after that, and how long silence is listened to.
const ANNOUNCED_WITHIN_MS: u64 = 3_000;
const LISTENS_MS: u64 = 4_000;

impl World {
    /// Runs the whole schedule.
    pub fn run(mut self) -> Result<Tally, Violation> {
        self.run_until(self.plan.faults_until_ms);
        if self.is_planted(Planted::ForkOrigins) {
            // There is nothing to come to: what is forked stays as it is.
            self.audit();
            return self.violation.map_or(Ok(self.counts.tally()), Err);
        }
        self.calm_down();
        let paused_until = self.regions.iter().map(|region| region.paused_until).max().unwrap_or(0);
        self.run_until(self.now.max(paused_until) + CLIENTS_FINISH_MS);
        self.clients.clear();
        let began_at = self.now;
        while self.violation.is_none() && !self.is_settled() {
            if self.now - began_at > SETTLES_WITHIN_MS {
                let detail = self.describe_vectors();
                self.violate(Invariant::Convergence, || format!("vectors stay different: {detail}"));
                break;
            }
            self.run_until(self.now + LOOK_EVERY_MS);
        }
        self.run_until(self.now + ANNOUNCED_WITHIN_MS);
        self.silent = true;
        self.run_until(self.now + LISTENS_MS);
        if self.violation.is_none() {
            self.audit();
            self.check_convergence();
            self.check_promises();
            self.silent = false;
            self.check_presence();
            self.check_scrub();
        }
        match self.violation {
            Some(violation) => Err(violation),
            None => {
                let mut tally = self.counts.tally();
                tally.insert("events", self.events);
                Ok(tally)
            }
        }
    }

    fn calm_down(&mut self) {
        trace::note(|| format!("{} calm", self.now));
        self.calm = true;
        self.trap = None;
        for pair in 0..self.pairs.len() {
            (0..2).for_each(|from| self.after(0, Event::Heal { pair, from }));
        }
        for at in 0..self.regions.len() {
            self.regions[at].effects_left = None;
        }
        self.after(0, Event::Join);
    }

    fn is_settled(&self) -> bool {
        let idle = |region: &Region| region.node.as_ref().is_some_and(|node| node.is_idle());
        self.staying().all(idle) && self.vectors_agree()
    }

    /// The regions that have not left.
    pub fn staying(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().filter(|region| !region.gone)
    }

    /// The numbers of those that hold a group.
    pub fn members(&self, group: &PlacementGroup) -> Vec<usize> {
        let member = |at: &usize| !self.regions[*at].gone && self.regions[*at].groups.contains(group);
        (0..self.regions.len()).filter(member).collect()
    }

    fn vectors_agree(&self) -> bool {
        let mut most: BTreeMap<OriginId, (&PlacementGroup, Seq)> = BTreeMap::new();
        for region in self.staying() {
            for (origin, row) in region.disk.origins.iter().filter(|(_, row)| row.seq > Seq(0)) {
                let known = most.entry(*origin).or_insert((&row.group, row.seq));
                known.1 = known.1.max(row.seq);
            }
        }
        most.iter().all(|(origin, (group, seq))| {
            let mut members = self.staying().filter(|region| region.groups.contains(group));
            members.all(|it| it.disk.origins.get(origin).is_some_and(|row| row.seq == *seq))
        })
    }

    fn describe_vectors(&self) -> String {
        let vector = |disk: &Disk| {
            let rows = disk.origins.iter().filter(|(_, row)| row.seq > Seq(0));
            let rows: Vec<String> = rows
                .map(|(id, row)| format!("{}:{}>{}", &id.0.to_string()[..8], row.floor.0, row.seq.0))
                .collect();
            rows.join(" ")
        };
        let all = self.staying().map(|it| {
            let links: Vec<_> = it.node.iter().flat_map(|node| node.replica.links()).collect();
            format!("\n  {} [{}] {links:?}", it.name, vector(&it.disk))
        });
        all.collect()
    }

    /// Documents of which something was only ever on a disk that was rolled back, and in pages that were taken from it:
    /// no log leads there any more, and only a scrub finds it.
    fn beyond_logs(&self) -> BTreeSet<DocumentId> {
        if self.ledger.rolled_back.is_empty() {
            return BTreeSet::new();
        }
        let disks: Vec<&Disk> = self.staying().map(|region| &region.disk).collect();
        let mut beyond = self.ledger.forgotten_deletions(&disks);
        for disk in &disks {
            for (document, row) in &disk.documents {
                if row.all().any(|it| !self.ledger.is_covered(document, &it.change.hash, &disks)) {
                    beyond.insert(document.clone());
                }
            }
        }
        beyond
    }

    fn check_convergence(&mut self) {
        let beyond = self.beyond_logs();
        let documents = self.documents.clone();
        for (document, group) in &documents {
            if beyond.contains(document) {
                self.count("documents beyond logs");
                continue;
            }
            let members = self.members(group);
            let states: Vec<State> = members.iter().map(|at| self.state(*at, document)).collect();
            if let Some((at, state)) = members.iter().zip(&states).find(|(_, state)| **state != states[0]) {
                self.violate(Invariant::Convergence, || {
                    format!("{document:?} is {state:?} at r{at} and {:?} at r{}", states[0], members[0])
                });
            }
            let state = &states[0];
            self.count(match state {
                State { deleted_at_ms: Some(_), .. } => "deleted documents",
                State { heads: None, .. } => "quarantined documents",
                _ => "documents",
            });
            if state.pending > 0 && self.ledger.rolled_back.is_empty() {
                self.violate(Invariant::Convergence, || format!("{document:?} waits for ever: {state:?}"));
            }
        }
    }

    fn state(&mut self, at: usize, document: &DocumentId) -> State {
        // From the disk, whatever is in memory.
        if let Some(node) = &mut self.regions[at].node {
            node.forget(document);
        }
        let graph = self.graph(at, document);
        let heads = graph.as_ref().map(|graph| graph.heads());
        let pending = graph.map_or(0, |graph| graph.pending_count());
        let row = self.regions[at].disk.documents.get(document);
        State {
            deleted_at_ms: row.and_then(|row| row.deleted_at_ms),
            changes: row.map(|row| row.all().map(|it| it.change.hash).collect()).unwrap_or_default(),
            heads,
            pending,
        }
    }

    /// What clients were promised is everywhere; what went with the only disk that had it is nowhere, or not lost.
    fn check_promises(&mut self) {
        let beyond = self.beyond_logs();
        let promised: Vec<(DocumentId, ChangeHash)> = self.ledger.acknowledged.iter().cloned().collect();
        for (document, hash) in promised {
            if self.ledger.was_deleted(&document) || beyond.contains(&document) {
                continue;
            }
            let group = self.group_of(&document);
            let members = self.staying().filter(|region| region.groups.contains(&group));
            let held: Vec<bool> = members.map(|region| region.disk.holds(&document, &hash)).collect();
            let lost = self.ledger.lost.contains(&(document.clone(), hash));
            if lost && held.iter().all(|held| !held) {
                self.count("lost with a disk");
            } else if held.contains(&false) {
                self.violate(Invariant::AcknowledgedMeansKept, || {
                    format!("{hash:?} of {document:?} was acknowledged and is held by {held:?}")
                });
            }
        }
    }
}

/// What a region makes of a document.
#[derive(Debug, PartialEq, Eq)]
struct State {
    deleted_at_ms: Option<u64>,
    changes: BTreeSet<ChangeHash>,
    /// `None`: it is not served.
    heads: Option<Vec<ChangeHash>>,
    pending: usize,
}
