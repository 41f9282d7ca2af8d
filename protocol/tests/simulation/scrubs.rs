//! Regions compare themselves while everything goes on, a half step at a time. What a comparison calls a difference must be
//! one; and at the end, when something vanishes from a disk, it must be found, exactly, and come back.

use std::collections::BTreeSet;
use std::sync::Arc;

use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use isobar_protocol::link::Fingerprints;
use isobar_protocol::receipts::{Announced, Target};
use isobar_protocol::scrub::{
    Comparison, Cut, Difference, Fingerprint, Held, Step, Verdict, answer, fingerprint,
};

use crate::change_bytes::Made;
use crate::disk::{Disk, DocumentRow, Shape};
use crate::events::Event;
use crate::ledger::Invariant;
use crate::network::Pair;
use crate::plan::Planted;
use crate::world::World;

/// Between two half steps, on average.
const HALF_STEP_MS: u64 = 20;

/// Before a comparison begins, and while it waits for what is on its way, so many times that passes.
const PATIENCE: u64 = 5;

/// A comparison that is under way.
pub struct RunningScrub {
    connection: usize,
    /// Which end of the connection asks.
    side: usize,
    /// The lives of the asker and the other.
    lives: [u64; 2],
    comparison: Comparison,
    step: Step,
    half: Option<Half>,
    /// Both sides' positions at the beginning: the wrong moment.
    early: [Target; 2],
}

/// What the asker has of a step.
enum Half {
    Prints(Fingerprints),
    Listed(Vec<(DocumentId, Fingerprint)>),
    Positions(Target),
}

fn held(row: &DocumentRow) -> Option<Held> {
    if row.deleted_at_ms.is_some() {
        return Some(Held::Deleted);
    }
    let Shape { heads, pending } = row.shape(|_| true);
    (!row.is_empty()).then_some(Held::Changes { heads, pending })
}

fn print(document: &DocumentId, row: &DocumentRow) -> Option<Fingerprint> {
    Some(fingerprint(document, &held(row)?))
}

/// The fingerprints of all documents of some groups. Those of documents that have not changed are not taken again.
fn prints(disk: &mut Disk, groups: &BTreeSet<PlacementGroup>) -> Vec<(DocumentId, Fingerprint)> {
    let Disk { documents, prints, .. } = disk;
    let shared = documents.iter().filter(|(_, row)| groups.contains(&row.group));
    let taken = shared.filter_map(|(id, row)| {
        let print = prints.entry(id.clone()).or_insert_with(|| print(id, row));
        Some((id.clone(), (*print)?))
    });
    taken.collect()
}

impl World {
    /// Regions that something changes in are compared: nothing comes of looking at the same things twice.
    pub fn has_moved(&mut self, concerns: impl Fn(&Pair) -> bool) {
        self.pairs.iter_mut().filter(|pair| concerns(pair)).for_each(|pair| pair.has_moved = true);
        self.scrub_soon();
    }

    fn scrub_soon(&mut self) {
        if std::mem::replace(&mut self.scrub_is_scheduled, true) {
            return;
        }
        // Nothing is drawn for it, so that schedules are what they would be without.
        let delay = 1 + self.scrub_turns * 7_919 % (2 * HALF_STEP_MS);
        let waits = self.running_scrub.as_ref().is_none_or(|it| it.comparison.awaited().is_some());
        self.after(delay * if waits { PATIENCE } else { 1 }, Event::Scrub);
    }

    pub fn scrub(&mut self) {
        self.scrub_turns += 1;
        self.scrub_is_scheduled = false;
        match self.running_scrub.take() {
            None => self.running_scrub = self.begin_scrub(|pair| pair.has_moved),
            Some(running) if self.is_up(&running) => self.running_scrub = self.half_step(running),
            Some(_) => self.count("scrubs interrupted"),
        }
        let is_due = |connection: usize| self.pairs[self.connections[connection].pair].has_moved;
        if self.running_scrub.is_some() || self.open_connections().any(is_due) {
            self.scrub_soon();
        }
    }

    /// The connections that are up on both sides.
    fn open_connections(&self) -> impl Iterator<Item = usize> {
        let open = self.connections.iter().enumerate().filter(|(_, it)| it.open == [true; 2]);
        open.map(|(number, _)| number)
    }

    fn begin_scrub(&mut self, is_due: impl Fn(&Pair) -> bool) -> Option<RunningScrub> {
        let mut due = self.open_connections().collect::<Vec<_>>();
        due.retain(|connection| is_due(&self.pairs[self.connections[*connection].pair]));
        let connection = *due.get(self.scrub_turns as usize % due.len().max(1))?;
        let side = usize::from(self.scrub_turns.is_multiple_of(2));
        let ends = self.connections[connection].ends;
        let lives = [self.regions[ends[side]].life, self.regions[ends[1 - side]].life];
        let (comparison, step) = Comparison::begin();
        let early = [Target::default(), Target::default()];
        let mut running = RunningScrub { connection, side, lives, comparison, step, half: None, early };
        if !self.is_up(&running) {
            return None;
        }
        running.early = [self.noted(&running, 0)?, self.noted(&running, 1)?];
        let pair = self.connections[connection].pair;
        self.pairs[pair].has_moved = false;
        Some(running)
    }

    /// The regions of the asker (0) and of the other (1).
    fn end(&self, running: &RunningScrub, end: usize) -> usize {
        self.connections[running.connection].ends[if end == 0 { running.side } else { 1 - running.side }]
    }

    /// Whether both nodes live and have this link.
    fn is_up(&self, running: &RunningScrub) -> bool {
        let connection = &self.connections[running.connection];
        (0..2).all(|end| {
            let at = self.end(running, end);
            let side = if end == 0 { running.side } else { 1 - running.side };
            let node = self.regions[at].node.as_ref();
            let has_link = node.is_some_and(|node| node.links.contains_key(&connection.links[side]));
            has_link && self.regions[at].life == running.lives[end] && connection.open[side]
        })
    }

    fn shared(&self, running: &RunningScrub) -> BTreeSet<PlacementGroup> {
        &self.regions[self.end(running, 0)].groups & &self.regions[self.end(running, 1)].groups
    }

    /// How far an end has taken in the logs; nothing while it fetches a snapshot. What its disk holds counts, also what the
    /// replica has not been told of yet.
    fn noted(&self, running: &RunningScrub, end: usize) -> Option<Target> {
        let side = if end == 0 { running.side } else { 1 - running.side };
        let link = self.connections[running.connection].links[side];
        let region = &self.regions[self.end(running, end)];
        let replica = &region.node.as_ref()?.replica;
        if replica.fetches_snapshot() {
            return None;
        }
        let mut target = replica.shared_target(link);
        let shared = self.shared(running);
        let stored = region.disk.vector().into_iter().filter(|it| shared.contains(&it.group));
        stored.for_each(|it| target.raise(it.origin, it.seq));
        Some(target)
    }

    fn prints_of(&mut self, running: &RunningScrub, end: usize) -> Vec<(DocumentId, Fingerprint)> {
        let (at, groups) = (self.end(running, end), self.shared(running));
        prints(&mut self.regions[at].disk, &groups)
    }

    fn is_reached(&self, running: &RunningScrub, cut: &Cut) -> bool {
        let link = self.connections[running.connection].links[running.side];
        let node = self.regions[self.end(running, 0)].node.as_ref();
        node.is_some_and(|node| node.replica.covers(link, &cut.ours) && node.replica.has(&cut.theirs))
    }

    /// The asker does its half of a step, or the other does.
    fn half_step(&mut self, mut running: RunningScrub) -> Option<RunningScrub> {
        let ours = running.half.take();
        let listed = |all: Vec<(DocumentId, Fingerprint)>, asked: &[DocumentId]| {
            all.into_iter().filter(|(document, _)| asked.contains(document)).collect::<Vec<_>>()
        };
        let next = match (&running.step, ours) {
            (Step::AskPrefix(prefix), None) => {
                running.half = answer(prefix, self.prints_of(&running, 0)).map(Half::Prints);
                return Some(running);
            }
            (Step::AskPrefix(prefix), Some(Half::Prints(ours))) => {
                let theirs = answer(prefix, self.prints_of(&running, 1))?;
                running.comparison.answered(prefix, &theirs, &ours).ok()?.pop()?
            }
            (Step::AskPositions, None) if running.comparison.awaited().is_none() => {
                running.half = Some(Half::Positions(self.noted(&running, 0)?));
                return Some(running);
            }
            (Step::AskPositions, Some(Half::Positions(ours))) => {
                let theirs = self.noted(&running, 1)?;
                let early = running.early.clone();
                running.comparison.placed(match self.planted {
                    Some(Planted::LookWithoutWaiting) => {
                        Cut { ours: Target::default(), theirs: Target::default() }
                    }
                    Some(Planted::PlaceBeforeLooking) => {
                        Cut { ours: early[0].clone(), theirs: early[1].clone() }
                    }
                    _ => Cut { ours, theirs },
                });
                return Some(running);
            }
            (Step::AskPositions, None) => {
                let cut = running.comparison.awaited()?.clone();
                if !self.is_reached(&running, &cut) {
                    return Some(running);
                }
                running.comparison.reached()?
            }
            (Step::AskDocuments(asked), None) => {
                running.half = Some(Half::Listed(listed(self.prints_of(&running, 0), asked)));
                return Some(running);
            }
            (Step::AskDocuments(asked), Some(Half::Listed(ours))) => {
                let theirs = listed(self.prints_of(&running, 1), asked);
                running.comparison.looked_again(&theirs, &ours).ok()?
            }
            _ => return None,
        };
        match next {
            Step::Finish(verdict) => {
                self.judge(&running, &verdict);
                None
            }
            step => {
                running.step = step;
                Some(running)
            }
        }
    }

    /// Nothing is lost from any disk while a schedule runs, unless it is rolled back; and unless documents were fetched whole,
    /// ahead of the logs, all that differs is on its way; but see [`Disk::is_erased_ahead`].
    fn judge(&mut self, running: &RunningScrub, verdict: &Verdict) {
        self.count("scrubs");
        if verdict.moving > 0 {
            self.count("scrubs that saw documents move");
        }
        if self.counts.has("pages") || !self.ledger.rolled_back.is_empty() {
            return;
        }
        let ends = [0, 1].map(|end| &self.regions[self.end(running, end)]);
        let is_erased_ahead = |id: &DocumentId| ends.iter().any(|region| region.disk.is_erased_ahead(id));
        let unexplained: Vec<_> = verdict.differences.iter().filter(|(id, _)| !is_erased_ahead(id)).collect();
        if unexplained.is_empty() {
            return;
        }
        let detail = format!("a scrub of {} by {} reports {unexplained:?}", ends[1].name, ends[0].name);
        self.violate(Invariant::Scrub, || detail);
    }

    /// Fingerprints that were kept are those of what is there.
    fn check_prints(&self) {
        for region in &self.regions {
            for (id, row) in &region.disk.documents {
                let kept = region.disk.prints.get(id);
                let is_right = kept.is_none_or(|kept| *kept == print(id, row));
                assert!(is_right, "{} has an outdated fingerprint of {id:?}", region.name);
            }
        }
    }

    /// A change vanishes from a disk. A comparison finds that, and nothing else that was not there before.
    pub fn check_scrub(&mut self) {
        self.running_scrub = None;
        self.check_prints();
        let Some(mut running) = self.begin_scrub(|_| true) else { return };
        for end in 0..2 {
            let at = self.end(&running, end);
            let before: BTreeSet<DocumentId> = self.compared(&mut running).differences.into_keys().collect();
            let groups = self.shared(&running);
            let rows = self.regions[at].disk.documents.iter();
            let mut found = rows.filter(|(id, row)| groups.contains(&row.group) && !before.contains(*id));
            let Some((document, hash)) = found.find_map(|(id, row)| {
                Some((id.clone(), *row.changes.keys().find(|hash| !row.covers(hash))?))
            }) else {
                return;
            };
            let Some(row) = self.regions[at].disk.documents.get_mut(&document) else { return };
            let Some(lost) = row.changes.remove(&hash) else { return };
            self.touch(at, &document);
            let after = self.compared(&mut running);
            let news: Vec<(DocumentId, Difference)> = after
                .kinds()
                .filter(|(id, _)| !before.contains(*id))
                .map(|(id, it)| (id.clone(), it))
                .collect();
            let is_exact = news.len() == 1 && news[0].0 == document;
            if !is_exact {
                self.violate(Invariant::Scrub, || {
                    format!("{hash:?} of {document:?} is gone, found is {news:?}")
                });
            }
            self.count("losses found");
            // What the other region has of it comes back.
            let other = self.end(&running, 1 - end);
            let theirs = self.regions[other].disk.documents.get(&document).map(DocumentRow::all);
            let theirs = theirs.into_iter().flatten().map(|made| (made.change.hash, made.clone()));
            let theirs: Vec<(ChangeHash, Arc<Made>)> = theirs.collect();
            if let Some(row) = self.regions[at].disk.documents.get_mut(&document) {
                row.changes.extend(theirs);
            }
            self.touch(at, &document);
            let repaired: BTreeSet<DocumentId> =
                self.compared(&mut running).differences.into_keys().collect();
            if repaired.contains(&document) || !self.regions[at].disk.holds(&document, &hash) {
                self.violate(Invariant::Scrub, || format!("{hash:?} of {document:?} did not come back"));
            }
            drop(lost);
        }
    }

    /// A whole comparison at one moment, when everybody has everything.
    fn compared(&mut self, running: &mut RunningScrub) -> Verdict {
        let (mut comparison, mut step) = Comparison::begin();
        loop {
            let [ours, theirs] = [0, 1].map(|end| self.prints_of(running, end));
            step = match step {
                Step::AskPrefix(prefix) => {
                    let [ours, theirs] =
                        [ours, theirs].map(|it| answer(&prefix, it).expect("a short prefix"));
                    let next = comparison.answered(&prefix, &theirs, &ours).expect("it was asked").pop();
                    next.expect("few documents are listed at once")
                }
                Step::AskPositions => {
                    let noted = [0, 1].map(|end| self.noted(running, end).unwrap_or_default());
                    let [ours, theirs] = noted;
                    let cut = Cut { ours, theirs };
                    if !self.is_reached(running, &cut) {
                        self.violate(Invariant::Convergence, || {
                            format!("all is settled, and {cut:?} is not reached")
                        });
                    }
                    comparison.placed(cut);
                    comparison.reached().expect("it was placed")
                }
                Step::AskDocuments(asked) => {
                    let only = |all: Vec<(DocumentId, Fingerprint)>| {
                        all.into_iter().filter(|(id, _)| asked.contains(id)).collect::<Vec<_>>()
                    };
                    comparison.looked_again(&only(theirs), &only(ours)).expect("it was asked")
                }
                Step::Finish(verdict) => return verdict,
            };
        }
    }
}
