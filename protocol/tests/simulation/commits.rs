//! Committing: one batch at a time goes to the disk, whole or not at all; what the node does after it are steps of their own,
//! and the node may die before any of them.
//!
//! A commit may fail passingly and be repeated as it stands, and it may have been done although it is reported as failed. A node
//! that dies while its commit is under way does not know whether it is done, and it may be done long after.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::Progress;
use isobar_protocol::log::{Chain, Content, Entry, Opened, encode_run};
use isobar_protocol::replica::Stored;

use crate::disk::Run;
use crate::events::Event;
use crate::plan::Planted;
use crate::region::{Own, Submission};
use crate::trace;
use crate::world::World;

/// How often a commit fails passingly, and how often it was done all the same, in percent.
const FAILS_PERCENT: u32 = 4;
const DONE_ALL_THE_SAME_PERCENT: u32 = 40;

/// How often a commit is done after its node has died, in percent.
const OUTLIVES_PERCENT: u32 = 60;

/// What is committed at once.
#[derive(Debug)]
pub struct Batch {
    pub items: Vec<Submission>,
    /// The runs of own origins, numbered from where the node believes them to be.
    own: Vec<(Run, Vec<(DocumentId, Opened)>)>,
    /// The number of the last submission in it.
    last: u64,
}

/// What a node does after a commit, one step after the other.
#[derive(Debug)]
pub enum After {
    /// The document is not in memory any more: it was deleted, or something of it that was staged is not stored.
    Drop {
        document: DocumentId,
        deleted: bool,
    },
    Advance(DocumentId),
    Acknowledge(DocumentId),
    Tell(News),
    /// Records which documents are not served, as far as the reason is durable.
    Quarantine {
        last: u64,
    },
}

/// What the replica hears after a commit.
#[derive(Debug)]
pub enum News {
    Own(Progress),
    Stored { origin: OriginId, last: Seq, outcome: Stored },
    PageStored,
}

/// What a commit has done to the disk.
#[derive(Debug, Default)]
pub struct Done {
    pub news: Vec<News>,
    pub touched: BTreeSet<DocumentId>,
    pub dropped: BTreeMap<DocumentId, bool>,
}

impl World {
    pub fn start_commit(&mut self, at: usize) {
        let life = self.regions[at].life;
        let Some(node) = &mut self.regions[at].node else { return };
        if node.queue.is_empty() || node.batch.is_some() || !node.after.is_empty() {
            return;
        }
        // Documents of a page are stored one by one.
        let page = node.queue.iter().position(|item| matches!(item, Submission::Contents { .. }));
        let items: Vec<Submission> = node.queue.drain(..page.map_or(node.queue.len(), |it| it + 1)).collect();
        let last = node.submissions - node.queue.len() as u64;
        let own = self.own_runs(at, &items);
        let node = self.regions[at].node.as_mut().expect("it was there a moment ago");
        node.batch = Some(Batch { items, own, last });
        let delay = self.rng.range(1, self.plan.commit_ms.max(2));
        self.after(delay, Event::CommitDone(at, life));
        self.survives_step(at);
    }

    /// The answer of the database: done, or failed for now. Then it is tried again.
    pub fn commit_done(&mut self, at: usize) {
        let node = self.regions[at].node.as_mut().expect("it lives");
        let Some(batch) = node.batch.take() else { return };
        let life = self.regions[at].life;
        if !self.calm && self.rng.chance(FAILS_PERCENT) {
            self.count("failed commits");
            if self.rng.chance(DONE_ALL_THE_SAME_PERCENT) {
                self.count("failed commits that were done");
                self.store(at, &batch);
            }
            trace::note(|| format!("  r{at} commit fails"));
            self.regions[at].node.as_mut().expect("it lives").batch = Some(batch);
            let delay = self.rng.range(1, 50);
            return self.after(delay, Event::CommitDone(at, life));
        }
        let done = self.store(at, &batch);
        let tells_first = self.rng.chance(50);
        let node = self.regions[at].node.as_mut().expect("it lives");
        for (run, _) in &batch.own {
            node.positions.insert(run.origin, (run.last, run.chain));
        }
        node.after = steps(done, batch.last, tells_first);
        let delay = self.rng.range(0, 3);
        self.after(delay, Event::Committed(at, life));
    }

    /// Takes the steps after a commit. The node may die before any of them.
    pub fn committed(&mut self, at: usize) {
        loop {
            if !self.survives_step(at) {
                return;
            }
            let Some(node) = &mut self.regions[at].node else { return };
            let Some(step) = node.after.pop_front() else { break };
            trace::note(|| format!("  r{at} {step:?}"));
            match step {
                After::Drop { document, deleted } => {
                    node.forget(&document);
                    if deleted {
                        node.refused.remove(&document);
                    }
                }
                After::Advance(document) => self.advance(at, &document),
                After::Acknowledge(document) => {
                    self.acknowledge(at, &document);
                    self.observe_document(at, &document);
                }
                After::Tell(news) => self.call(at, |replica, now| match news {
                    News::Own(progress) => replica.own_appended(now, progress),
                    News::Stored { origin, last, outcome } => replica.stored(now, origin, last, outcome),
                    News::PageStored => replica.page_stored(now, Vec::new()),
                }),
                After::Quarantine { last } => self.record_refused(at, last),
            }
        }
        if !self.calm && self.plan.compact_percent > 0 && self.rng.chance(self.plan.compact_percent) {
            self.compact(at);
        }
        self.start_commit(at);
    }

    fn record_refused(&mut self, at: usize, last: u64) {
        let region = &mut self.regions[at];
        let Some(node) = &mut region.node else { return };
        node.durable_submission = last;
        for (document, reason) in &node.refused {
            if *reason <= last
                && let Some(row) = region.disk.documents.get_mut(document)
            {
                row.quarantined = row.deleted_at_ms.is_none();
            }
        }
    }

    /// The node dies while a commit is under way. The database may be done with it before, after, or never.
    pub fn outlive(&mut self, at: usize, batch: Option<Batch>) {
        if let Some(batch) = batch
            && self.rng.chance(OUTLIVES_PERCENT)
        {
            let delay = self.rng.range(1, 2_000);
            let disk = self.regions[at].disk_number;
            self.after(delay, Event::LateCommit { region: at, disk, batch: Box::new(batch) });
        }
    }

    /// A commit whose node has died is done, unless the next has claimed the origins since. (One that has only received runs
    /// could be done even then, as if by another node of the region; that is not played here.)
    pub fn late_commit(&mut self, at: usize, disk: u64, batch: &Batch) {
        let region = &self.regions[at];
        if region.disk_number != disk || region.gone || self.is_planted(Planted::ForkOrigins) {
            return;
        }
        let is_fenced = |(run, _): &(Run, _)| region.disk.claimed.get(&run.group) != Some(&run.origin);
        if batch.own.iter().any(is_fenced) && !self.is_planted(Planted::SkipFence) {
            return self.count("fenced commits");
        }
        if region.node.is_none() || !batch.own.is_empty() {
            self.count("late commits");
            self.store(at, batch);
        }
    }

    /// What is being committed is on the disk, all of it. Says what it has come to; a batch that was done before comes to the
    /// same again.
    fn store(&mut self, at: usize, batch: &Batch) -> Done {
        self.count("commits");
        let mut done = Done::default();
        for item in &batch.items {
            match item {
                Submission::Own { .. } => {}
                Submission::Run(run) => self.store_run(at, run, &mut done),
                Submission::Contents { contents, is_last } => {
                    if let Some(contents) = contents {
                        self.store_contents(at, contents, &mut done);
                    }
                    if *is_last {
                        done.news.push(News::PageStored);
                    }
                }
            }
        }
        for (run, entries) in &batch.own {
            self.store_own(at, run, entries, &mut done);
        }
        done
    }

    fn own_runs(&self, at: usize, items: &[Submission]) -> Vec<(Run, Vec<(DocumentId, Opened)>)> {
        let mut groups: BTreeMap<&PlacementGroup, Vec<(DocumentId, Opened)>> = BTreeMap::new();
        for item in items {
            let Submission::Own { group, document, content } = item else { continue };
            let opened = match content {
                Own::Change(made) => Opened::Change(made.change.clone()),
                Own::Tombstone { deleted_at_ms } => Opened::Tombstone { deleted_at_ms: *deleted_at_ms },
            };
            groups.entry(group).or_default().push((document.clone(), opened));
        }
        let mut positions = self.regions[at].node.as_ref().expect("only nodes write").positions.clone();
        let mut runs = Vec::new();
        for (group, entries) in groups {
            let run = self.own_run(at, group, &entries, &positions);
            positions.insert(run.origin, (run.last, run.chain));
            runs.push((run, entries));
        }
        runs
    }

    /// The run that own entries make, and how far the origin is with it.
    pub fn own_run(
        &self,
        at: usize,
        group: &PlacementGroup,
        entries: &[(DocumentId, Opened)],
        positions: &BTreeMap<OriginId, (Seq, Chain)>,
    ) -> Run {
        let region = &self.regions[at];
        let node = region.node.as_ref().expect("only nodes write");
        let wrong = self.is_planted(Planted::WrongGroup);
        let origin =
            if wrong { *node.own.values().next().expect("there is a group") } else { node.own[group] };
        let (seq, chain_before) = positions[&origin];
        let row = &region.disk.origins[&origin];
        Run {
            origin,
            region: row.region.clone(),
            group: row.group.clone(),
            first: Seq(seq.0 + 1),
            last: Seq(seq.0 + entries.len() as u64),
            chain_before,
            chain: entries
                .iter()
                .fold(chain_before, |chain, (document, opened)| opened.chain(chain, document)),
            body: body_of(entries),
        }
    }

    /// Moves a resident graph's durable end over what is on the disk, and looks whether its heads are right.
    fn advance(&mut self, at: usize, document: &DocumentId) {
        let drops = self.is_planted(Planted::DropWrite) || self.is_planted(Planted::LogWithoutChanges);
        let region = &mut self.regions[at];
        let Some(graph) = region.node.as_mut().and_then(|node| node.graphs.get_mut(document)) else { return };
        let mut end = graph.durable_end();
        while let Some(hash) = graph.hash(end)
            && (drops || region.disk.holds(document, &hash))
        {
            end += 1;
        }
        graph.advance_durable(end);
        // A change that waited for its dependency and then turned out to break a rule was dropped without a word.
        let is_here = |hash| graph.position(hash).is_some() || graph.is_pending(hash);
        let row = region.disk.documents.get(document);
        let dropped =
            row.is_some_and(|row| !row.changes.keys().all(|hash| is_here(hash) || row.covers(hash)));
        let ignores = self.is_planted(Planted::LogWithoutChanges) || self.is_planted(Planted::IgnoreClones);
        if dropped && !ignores {
            self.count("dropped without a word");
            return self.refuse(at, document);
        }
        self.check_heads(at, document);
    }

    /// Raises the counters to a snapshot's, unless the database has something else to do.
    pub fn adopt(&mut self, at: usize, origins: Vec<Progress>) {
        let life = self.regions[at].life;
        if !self.calm && self.rng.chance(FAILS_PERCENT) {
            self.count("failed adoptions");
            if self.rng.chance(DONE_ALL_THE_SAME_PERCENT) {
                self.store_adoption(at, &origins);
            }
            let delay = self.rng.range(1, 500);
            return self.after(delay, Event::Adopt { region: at, life, origins });
        }
        self.store_adoption(at, &origins);
        let delay = self.rng.range(0, 5);
        self.after(delay, Event::Adopted { region: at, life, origins });
    }
}

/// What comes after a commit. Documents and the replica hear of it independently of each other.
fn steps(done: Done, last: u64, tells_first: bool) -> VecDeque<After> {
    let drops = done.dropped.into_iter().map(|(document, deleted)| After::Drop { document, deleted });
    let advances = done.touched.iter().cloned().map(After::Advance);
    let acknowledges = done.touched.iter().cloned().map(After::Acknowledge);
    let documents = drops.chain(advances).chain([After::Quarantine { last }]).chain(acknowledges);
    let tells = done.news.into_iter().map(After::Tell);
    match tells_first {
        true => tells.chain(documents).collect(),
        false => documents.chain(tells).collect(),
    }
}

fn body_of(entries: &[(DocumentId, Opened)]) -> bytes::Bytes {
    let entries: Vec<Entry> = entries
        .iter()
        .map(|(document, opened)| Entry {
            document: document.clone(),
            content: Content::from(opened.clone()),
        })
        .collect();
    encode_run(&entries).into()
}
