//! What a commit does to a disk, and what is held against the ledger as it does.

use isobar_protocol::ids::{ChangeHash, DocumentId, Seq};
use isobar_protocol::link::{DocumentContents, Progress};
use isobar_protocol::log::Opened;
use isobar_protocol::replica::{ReceivedRun, Stored};

use crate::commits::{Done, News};
use crate::disk::Run;
use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::region::name_of;
use crate::world::World;

impl World {
    pub fn store_own(&mut self, at: usize, run: &Run, entries: &[(DocumentId, Opened)], done: &mut Done) {
        if self.regions[at].disk.claimed.get(&run.group) != Some(&run.origin) {
            let origin = run.origin;
            self.violate(Invariant::OneWriter, || format!("r{at} stores {origin:?}, which was replaced"));
        }
        let progress = Progress {
            origin: run.origin,
            region: run.region.clone(),
            group: run.group.clone(),
            seq: run.last,
            chain: run.chain,
        };
        if self.append(at, run, entries, done).is_err() {
            let origin = run.origin;
            self.violate(Invariant::OneEntryPerSeq, || format!("r{at} finds its own {origin:?} elsewhere"));
        }
        done.news.push(News::Own(progress));
    }

    pub fn store_run(&mut self, at: usize, received: &ReceivedRun, done: &mut Done) {
        let ReceivedRun { origin, last, .. } = *received;
        let run = Run {
            origin,
            region: received.region.clone(),
            group: received.group.clone(),
            first: received.first,
            last,
            chain_before: received.chain_before,
            chain: received.chain,
            body: received.body.clone(),
        };
        let outcome = match self.append(at, &run, &received.entries, done) {
            Ok(()) => Stored::Durable,
            Err(outcome) => {
                self.count("out of step");
                // What was staged is not stored: its documents are brought to life again when they are wanted.
                for (document, _) in &received.entries {
                    done.dropped.entry(document.clone()).or_default();
                }
                outcome
            }
        };
        if !self.is_planted(Planted::ForgetToReport) || !last.0.is_multiple_of(3) {
            done.news.push(News::Stored { origin, last, outcome });
        }
    }

    /// Appends a run: its log entries, changes and deletions.
    fn append(
        &mut self,
        at: usize,
        run: &Run,
        entries: &[(DocumentId, Opened)],
        done: &mut Done,
    ) -> Result<(), Stored> {
        let (origin, last) = (run.origin, run.last);
        let chains = entries.iter().fold(run.chain_before, |chain, (id, opened)| opened.chain(chain, id));
        if chains != run.chain {
            let origin = run.origin;
            self.violate(Invariant::OneEntryPerSeq, || format!("r{at} mixes two logs of {origin:?}"));
        }
        if let Err(found) = self.regions[at].disk.append(run) {
            if found.seq.0 + 1 == run.first.0 {
                self.violate(Invariant::OneEntryPerSeq, || {
                    format!("r{at} is handed another log of {origin:?}")
                });
            }
            return Err(Stored::OutOfStep { seq: found.seq, chain: found.chain });
        }
        self.moved.insert((at, origin));
        if let Err(violation) = self.ledger.record(origin, &run.group, run.first, entries) {
            self.violate(violation.invariant, || format!("r{at}: {}", violation.detail));
            return Ok(());
        }
        if !self.ledger.is_chain(origin, last, run.chain) {
            self.violate(Invariant::OneEntryPerSeq, || {
                format!("r{at}: {origin:?} has a wrong chain at {last:?}")
            });
        }
        self.ledger.note_reached(at, origin, last);
        let is_own = self.regions[at].disk.origins[&origin].region == self.regions[at].name;
        self.store_changes(at, entries, is_own, done);
        for (document, opened) in entries {
            if let Opened::Tombstone { deleted_at_ms } = opened {
                self.store_deletion(at, document, *deleted_at_ms, done);
            }
            if self.regions[at].disk.is_deleted(document) && !self.is_planted(Planted::KeepDeletedBytes) {
                self.regions[at].disk.erase(document);
            }
        }
        Ok(())
    }

    fn store_changes(&mut self, at: usize, entries: &[(DocumentId, Opened)], is_own: bool, done: &mut Done) {
        let logs_only = self.is_planted(Planted::LogWithoutChanges) && !is_own;
        for (number, (document, opened)) in entries.iter().enumerate() {
            done.touched.insert(document.clone());
            let drops = self.is_planted(Planted::DropWrite) && is_own && number == 1;
            if let Opened::Change(change) = opened
                && !logs_only
                && !drops
            {
                self.store_change(at, document, change.hash);
            }
        }
    }

    pub fn store_change(&mut self, at: usize, document: &DocumentId, hash: ChangeHash) {
        let group = self.group_of(document);
        let made = self.changes[&hash].clone();
        let resurrects = self.is_planted(Planted::Resurrect);
        self.touch(at, document);
        let row = self.regions[at].disk.row(document, &group);
        if row.deleted_at_ms.is_none() || resurrects {
            if !row.holds(&hash) {
                row.changes.insert(hash, made);
            }
            self.ledger.lost.remove(&(document.clone(), hash));
        }
    }

    fn store_deletion(&mut self, at: usize, document: &DocumentId, deleted_at_ms: u64, done: &mut Done) {
        self.count("deletions");
        self.touch(at, document);
        let group = self.group_of(document);
        let keeps = self.is_planted(Planted::KeepDeletedBytes);
        let region = &mut self.regions[at];
        if keeps {
            let row = region.disk.row(document, &group);
            row.deleted_at_ms = Some(row.deleted_at_ms.map_or(deleted_at_ms, |it| it.min(deleted_at_ms)));
            row.changes.clear();
            row.base = None;
        } else {
            region.disk.delete(document, &group, deleted_at_ms);
        }
        region.deleted.insert(document.clone());
        done.dropped.insert(document.clone(), true);
    }

    /// What another region has of a document.
    pub fn store_contents(&mut self, at: usize, contents: &DocumentContents, done: &mut Done) {
        if self.is_planted(Planted::AdoptWithoutPages) {
            return;
        }
        let document = &contents.document;
        done.touched.insert(document.clone());
        if let Some(deleted_at_ms) = contents.deleted_at_ms {
            return self.store_deletion(at, document, deleted_at_ms, done);
        }
        if let Some(base) = &contents.base {
            self.store_base(at, document, base);
            done.dropped.entry(document.clone()).or_default();
        }
        let hashes: Vec<ChangeHash> = contents.changes.iter().map(name_of).collect();
        hashes.iter().for_each(|hash| self.store_change(at, document, *hash));
    }

    pub fn store_adoption(&mut self, at: usize, origins: &[Progress]) {
        self.count("adoptions");
        for progress in origins {
            let over_log = self.is_planted(Planted::AdoptOverLog);
            let disk = &mut self.regions[at].disk;
            let floor = disk.origins.get(&progress.origin).map_or(Seq(0), |row| row.floor);
            disk.adopt(progress);
            if over_log && let Some(row) = disk.origins.get_mut(&progress.origin) {
                row.floor = floor;
            }
            if !self.ledger.is_chain(progress.origin, progress.seq, progress.chain) {
                self.violate(Invariant::OneEntryPerSeq, || format!("r{at} adopts {progress:?}"));
            }
            self.ledger.note_reached(at, progress.origin, progress.seq);
            self.moved.insert((at, progress.origin));
        }
    }
}
