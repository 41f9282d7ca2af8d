//! The shell around a replica: it performs effects, one by one and in order, and decides nothing.

use std::collections::BTreeSet;

use isobar_protocol::config::{ENTRIES_BYTES, LINK_WINDOW_BYTES};
use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::DocumentContents;
use isobar_protocol::log::{decode_run, encode_run};
use isobar_protocol::replica::{Effect, LinkId, LogRead, LogSlice, Page};

use crate::bases::contents_of;
use crate::events::Event;
use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::region::Submission;
use crate::trace;
use crate::world::World;

/// Log reads that a link may have under way: as many as fill its window.
const READS_MAX: usize = LINK_WINDOW_BYTES / ENTRIES_BYTES;

impl World {
    /// Performs what the region's replica wants done. The region may crash before any of it.
    pub fn perform_effects(&mut self, at: usize) {
        loop {
            let region = &mut self.regions[at];
            let Some(node) = &mut region.node else { return };
            if node.effects.is_empty() {
                return;
            }
            if !self.survives_step(at) {
                return;
            }
            let node = self.regions[at].node.as_mut().expect("it survives");
            let effect = node.effects.pop_front().expect("it was there a moment ago");
            trace::note(|| format!("  r{at} {effect:?}"));
            self.perform(at, effect);
        }
    }

    /// Whether a node lives to take its next step.
    pub fn survives_step(&mut self, at: usize) -> bool {
        let region = &mut self.regions[at];
        match &mut region.effects_left {
            Some(0) => {
                region.effects_left = None;
                let moment = match &region.node {
                    Some(node) if !node.after.is_empty() => "crashes after a commit",
                    Some(node) if node.batch.is_some() => "crashes during a commit",
                    _ => "crashes between effects",
                };
                self.count(moment);
                self.crash(at);
                false
            }
            Some(left) => {
                *left -= 1;
                true
            }
            None => true,
        }
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        let life = self.regions[at].life;
        match effect {
            Effect::Send { link, frame } | Effect::SendCatchUp { link, frame } => {
                self.check_frame(at, link, &frame);
                if let Some((connection, side)) = self.connection_of(at, link) {
                    self.send(connection, side, &frame);
                }
            }
            Effect::Close { link, .. } => {
                self.count("closes");
                if let Some((connection, side)) = self.connection_of(at, link) {
                    self.close(connection, side);
                }
            }
            Effect::ReadLog { link, origin, after, bytes_max } => {
                let node = self.regions[at].node.as_mut().expect("it performs effects");
                let reads = node.reads.entry(link).or_default();
                *reads += 1;
                if *reads > READS_MAX {
                    self.violate(Invariant::Bounded, || format!("r{at} has too many reads on {link:?}"));
                }
                let delay = self.rng.range(0, 5);
                self.after(delay, Event::LogRead { region: at, life, link, origin, after, bytes_max });
            }
            Effect::ReadPage { link, after, groups } => {
                let delay = self.rng.range(0, 20);
                self.after(delay, Event::PageRead { region: at, life, link, after, groups });
            }
            Effect::Append(run) => {
                let (origin, last) = (run.origin, run.last);
                self.check_received(at, &run);
                self.submit(at, Submission::Run(run));
                if self.is_planted(Planted::ReportStoredBeforeCommit) {
                    self.call(at, |replica, now| {
                        replica.stored(now, origin, last, isobar_protocol::replica::Stored::Durable);
                    });
                }
            }
            Effect::StorePage { documents } => self.store_page(at, documents),
            Effect::AdoptOrigins { origins, .. } => {
                let delay = self.rng.range(1, self.plan.commit_ms.max(2));
                self.after(delay, Event::Adopt { region: at, life, origins });
            }
            Effect::Acknowledged { region, origin, seq } => {
                let noted = self.regions[at].disk.acknowledged.entry((region, origin)).or_insert(Seq(0));
                *noted = (*noted).max(seq);
            }
            Effect::OriginForked { .. } | Effect::OwnOriginLost { .. }
                if self.is_planted(Planted::ForkOrigins) =>
            {
                self.fork_noticed(at, &effect);
            }
            Effect::OriginForked { origin, region, seq } => {
                self.violate(Invariant::OneEntryPerSeq, || {
                    format!("r{at} finds {origin:?} of {region} forked at {seq:?}")
                });
            }
            Effect::OwnOriginLost { origin } => {
                self.violate(Invariant::OneEntryPerSeq, || format!("r{at} has lost its own {origin:?}"));
            }
        }
    }

    /// Has a page stored, one document after the other.
    fn store_page(&mut self, at: usize, documents: Vec<DocumentContents>) {
        self.count("pages");
        if documents.is_empty() {
            return self.submit(at, Submission::Contents { contents: None, is_last: true });
        }
        let count = documents.len();
        for (number, contents) in documents.into_iter().enumerate() {
            if self.regions[at].node.is_none() {
                return;
            }
            let contents = Some(Box::new(contents));
            self.submit(at, Submission::Contents { contents, is_last: number + 1 == count });
        }
    }

    /// A node whose own log is not what others have of it writes no more under it.
    fn fork_noticed(&mut self, at: usize, effect: &Effect) {
        self.count("forks noticed");
        if let Effect::OwnOriginLost { origin } = effect {
            self.regions[at].disk.claimed.retain(|_, claimed| claimed != origin);
            self.crash(at);
        }
    }

    pub fn connection_of(&self, at: usize, link: LinkId) -> Option<(usize, usize)> {
        self.regions[at].node.as_ref()?.links.get(&link).copied()
    }

    pub fn log_read(&mut self, at: usize, link: LinkId, origin: OriginId, after: Seq, bytes_max: usize) {
        let node = self.regions[at].node.as_mut().expect("it lives");
        if let Some(reads) = node.reads.get_mut(&link) {
            *reads = reads.saturating_sub(1);
        }
        let fails = !self.calm && self.rng.chance(2);
        let read = match self.regions[at].disk.read_log(origin, after, bytes_max) {
            _ if fails => LogRead::Failed,
            Ok(mut runs) => {
                if self.is_planted(Planted::SkipEntry) {
                    skip_entry(&mut runs);
                }
                LogRead::Runs(runs)
            }
            Err(floor) => {
                self.count("truncated reads");
                LogRead::Truncated { floor }
            }
        };
        trace::note(|| format!("  r{at} read {origin:?} after {after:?}: {read:?}"));
        self.call(at, |replica, now| replica.log_read(now, link, origin, after, read));
    }

    pub fn page_read(
        &mut self,
        at: usize,
        link: LinkId,
        after: Option<DocumentId>,
        groups: &BTreeSet<PlacementGroup>,
    ) {
        if !self.calm && self.rng.chance(5) {
            return self.call(at, |replica, now| replica.page_read(now, link, None));
        }
        let limit = self.plan.page_documents;
        let forgets = self.is_planted(Planted::ForgetTombstonesInPages);
        let rows = self.regions[at].disk.documents.iter();
        let mut rows = rows.filter(|(id, row)| {
            after.as_ref().is_none_or(|after| *id > after)
                && groups.contains(&row.group)
                && !(forgets && row.deleted_at_ms.is_some())
        });
        let page: Vec<DocumentContents> = rows
            .by_ref()
            .take(limit)
            .map(|(id, row)| DocumentContents {
                document: id.clone(),
                group: row.group.clone(),
                deleted_at_ms: row.deleted_at_ms,
                base: row.base.as_ref().map(contents_of),
                changes: row.changes.values().map(|made| made.change.bytes.clone()).collect(),
            })
            .collect();
        let next = rows.next().and(page.last()).map(|last| last.document.clone());
        let page = Page { documents: page, missing: Vec::new(), next };
        self.call(at, |replica, now| replica.page_read(now, link, Some(page)));
    }
}

/// Leaves an entry out of a run that has more than one.
fn skip_entry(runs: &mut [LogSlice]) {
    let longer = runs.iter_mut().find(|run| run.last > run.first);
    if let Some(run) = longer {
        let mut entries = decode_run(&run.body).expect("stored runs decode");
        entries.remove(entries.len() / 2);
        run.body = encode_run(&entries).into();
    }
}
