//! Submitting and committing: what is submitted is staged in the graphs at once, and durable with the commit that takes it.

use std::collections::BTreeSet;
use std::sync::Arc;

use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::{DocumentContents, Progress};
use isobar_protocol::log::{Chain, Content, Entry, Opened, encode_run};
use isobar_protocol::replica::{ReceivedRun, Stored};

use crate::change_bytes::Made;
use crate::disk::Run;
use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::region::{Own, Submission, name_of};
use crate::world::{Event, World};

/// What the replica hears after a commit.
enum News {
    Own(Progress),
    Stored { origin: OriginId, last: Seq, outcome: Stored },
    PageStored,
    Adopted(Vec<Progress>),
}

impl World {
    /// Brings a document's graph to life: what is durable, then what was submitted. `None` if the document is not served.
    pub fn graph(&mut self, at: usize, document: &DocumentId) -> Option<&mut Graph> {
        let node = self.regions[at].node.as_ref()?;
        let row = self.regions[at].disk.documents.get(document);
        let served = row.is_none_or(|row| row.deleted_at_ms.is_none() && !row.quarantined);
        if !served || node.refused.contains(document) {
            return None;
        }
        if !node.graphs.contains_key(document) {
            self.count("loads");
            let (graph, refused) = self.load(at, document);
            let region = &mut self.regions[at];
            let node = region.node.as_mut().expect("it was there a moment ago");
            if refused {
                self.refuse(at, document);
                return None;
            }
            node.graphs.insert(document.clone(), graph);
        }
        self.regions[at].node.as_mut()?.graphs.get_mut(document)
    }

    fn load(&self, at: usize, document: &DocumentId) -> (Graph, bool) {
        let mut graph = Graph::new();
        let mut refused = false;
        let limits = Limits::stored();
        if let Some(row) = self.regions[at].disk.documents.get(document) {
            for made in row.changes.values() {
                refused |= graph.ingest(made.change.clone(), &limits).is_err();
            }
        }
        graph.advance_durable(graph.staged_end());
        let row = self.regions[at].disk.documents.get(document);
        let is_here = |hash| graph.position(hash).is_some() || graph.is_pending(hash);
        refused |= row.is_some_and(|row| !row.changes.keys().all(is_here));
        let node = self.regions[at].node.as_ref().expect("only nodes load");
        let submitted = node.submitted().flat_map(|submission| submission.changes(&self.changes));
        for (_, made) in submitted.filter(|(id, _)| *id == document) {
            refused |= graph.ingest(made.change.clone(), &limits).is_err();
        }
        (graph, refused)
    }

    /// A stored change does not fit its document: the document is served no more. It is recorded with the next commit.
    fn refuse(&mut self, at: usize, document: &DocumentId) {
        if self.is_planted(Planted::IgnoreClones) {
            return;
        }
        self.count("refused");
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("only nodes refuse");
        node.graphs.remove(document);
        node.refused.insert(document.clone());
        if node.submitted().next().is_none()
            && let Some(row) = region.disk.documents.get_mut(document)
        {
            row.quarantined = true;
        }
    }

    /// Stages what is submitted, and has it committed.
    pub fn submit(&mut self, at: usize, submission: Submission) {
        let made = &self.changes;
        let changes: Vec<(DocumentId, Arc<Made>)> = match &submission {
            Submission::Own { .. } => Vec::new(),
            other => other.changes(made).into_iter().map(|(id, made)| (id.clone(), made.clone())).collect(),
        };
        let node = self.regions[at].node.as_mut().expect("only nodes submit");
        node.queue.push(submission);
        for (document, made) in changes {
            // A document that is not in memory is brought there when somebody wants it.
            let resident = self.regions[at].node.as_ref().is_some_and(|it| it.graphs.contains_key(&document));
            if (resident || self.rng.chance(50))
                && let Some(graph) = self.graph(at, &document)
            {
                let ingested = graph.ingest(made.change.clone(), &Limits::stored());
                let ingested = ingested.ok();
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
            self.regions[at].node.as_mut().expect("only nodes stage").queue.push(own);
        }
    }

    pub fn start_commit(&mut self, at: usize) {
        let region = &mut self.regions[at];
        let life = region.life;
        let Some(node) = &mut region.node else { return };
        if node.queue.is_empty() || !node.committing.is_empty() {
            return;
        }
        node.committing = std::mem::take(&mut node.queue);
        let delay = self.rng.range(1, self.plan.commit_ms.max(2));
        self.after(delay, Event::CommitDone(at, life));
    }

    pub fn commit_done(&mut self, at: usize) {
        let (news, touched) = self.commit(at);
        for document in &touched {
            self.advance(at, document);
        }
        for document in &touched {
            self.acknowledge(at, document);
        }
        for item in news {
            self.call(at, |replica, now| match item {
                News::Own(progress) => replica.own_appended(now, progress),
                News::Stored { origin, last, outcome } => replica.stored(now, origin, last, outcome),
                News::PageStored => replica.page_stored(now, Vec::new()),
                News::Adopted(origins) => replica.adopted(now, &origins),
            });
        }
        self.start_commit(at);
    }

    /// What was being committed is on the disk.
    fn commit(&mut self, at: usize) -> (Vec<News>, BTreeSet<DocumentId>) {
        self.count("commits");
        let node = self.regions[at].node.as_mut().expect("only nodes commit");
        let submissions = std::mem::take(&mut node.committing);
        let mut touched = BTreeSet::new();
        let mut news = Vec::new();
        let mut own: Vec<(PlacementGroup, DocumentId, Own)> = Vec::new();
        for submission in submissions {
            match submission {
                Submission::Own { group, document, content } => own.push((group, document, content)),
                Submission::Run(run) => news.extend(self.commit_run(at, &run, &mut touched)),
                Submission::Page(documents) => {
                    self.commit_page(at, &documents, &mut touched);
                    news.push(News::PageStored);
                }
                Submission::Adopt(origins) => {
                    self.commit_adoption(at, &origins);
                    news.push(News::Adopted(origins));
                }
            }
        }
        let groups: BTreeSet<PlacementGroup> = own.iter().map(|(group, ..)| group.clone()).collect();
        for group in groups {
            let entries = own.iter().filter(|(it, ..)| *it == group).map(|(_, document, content)| {
                let opened = match content {
                    Own::Change(made) => Opened::Change(made.change.clone()),
                    Own::Tombstone { deleted_at_ms } => Opened::Tombstone { deleted_at_ms: *deleted_at_ms },
                };
                (document.clone(), opened)
            });
            let entries = entries.collect();
            news.extend(self.commit_own(at, &group, entries, &mut touched));
        }
        let region = &mut self.regions[at];
        let node = region.node.as_mut().expect("only nodes commit");
        for document in &node.refused {
            if let Some(row) = region.disk.documents.get_mut(document) {
                row.quarantined = row.deleted_at_ms.is_none();
            }
        }
        (news, touched)
    }

    /// The run that own entries make, and how far the origin is with it.
    pub fn own_run(&self, at: usize, group: &PlacementGroup, entries: &[(DocumentId, Opened)]) -> Run {
        let region = &self.regions[at];
        let node = region.node.as_ref().expect("only nodes write");
        let wrong = self.is_planted(Planted::WrongGroup);
        let origin =
            if wrong { *node.own.values().next().expect("there is a group") } else { node.own[group] };
        let row = &region.disk.origins[&origin];
        let chain = entries.iter().fold(row.chain, |chain, (document, opened)| opened.chain(chain, document));
        Run {
            origin,
            region: row.region.clone(),
            group: row.group.clone(),
            first: Seq(row.seq.0 + 1),
            last: Seq(row.seq.0 + entries.len() as u64),
            chain_before: row.chain,
            chain,
            body: body_of(entries),
        }
    }

    fn commit_own(
        &mut self,
        at: usize,
        group: &PlacementGroup,
        entries: Vec<(DocumentId, Opened)>,
        touched: &mut BTreeSet<DocumentId>,
    ) -> Option<News> {
        let run = self.own_run(at, group, &entries);
        let progress = Progress {
            origin: run.origin,
            region: run.region.clone(),
            group: run.group.clone(),
            seq: run.last,
            chain: run.chain,
        };
        self.append(at, run, &entries, touched).expect("own runs follow what is stored");
        Some(News::Own(progress))
    }

    fn commit_run(
        &mut self,
        at: usize,
        run: &ReceivedRun,
        touched: &mut BTreeSet<DocumentId>,
    ) -> Option<News> {
        let ReceivedRun { origin, last, .. } = *run;
        let appended = self.append(
            at,
            Run {
                origin,
                region: run.region.clone(),
                group: run.group.clone(),
                first: run.first,
                last,
                chain_before: run.chain_before,
                chain: run.chain,
                body: run.body.clone(),
            },
            &run.entries,
            touched,
        );
        let outcome = match appended {
            Ok(()) => Stored::Durable,
            Err(outcome) => {
                self.count("out of step");
                // What was staged is not stored: its documents are brought to life again when they are wanted.
                let node = self.regions[at].node.as_mut().expect("only nodes commit");
                run.entries.iter().for_each(|(document, _)| drop(node.graphs.remove(document)));
                outcome
            }
        };
        if self.is_planted(Planted::ForgetToReport) && last.0.is_multiple_of(3) {
            return None;
        }
        Some(News::Stored { origin, last, outcome })
    }

    /// Appends a run: its log entries, changes and deletions.
    fn append(
        &mut self,
        at: usize,
        run: Run,
        entries: &[(DocumentId, Opened)],
        touched: &mut BTreeSet<DocumentId>,
    ) -> Result<(), Stored> {
        let (origin, group, first, last) = (run.origin, run.group.clone(), run.first, run.last);
        let chain: Chain = run.chain;
        if let Err(found) = self.regions[at].disk.append(run) {
            return Err(Stored::OutOfStep { seq: found.seq, chain: found.chain });
        }
        if let Err(violation) = self.ledger.record(origin, &group, first, entries) {
            self.violate(violation.invariant, || format!("r{at}: {}", violation.detail));
            return Ok(());
        }
        if self.ledger.chain(origin, last) != Some(chain) {
            self.violate(Invariant::OneEntryPerSeq, || {
                format!("r{at}: {origin:?} has a wrong chain at {last:?}")
            });
        }
        self.ledger.note_reached(at, origin, last);
        let is_own = self.regions[at].disk.origins[&origin].region == self.regions[at].name;
        let logs_only = self.is_planted(Planted::LogWithoutChanges) && !is_own;
        for (number, (document, opened)) in entries.iter().enumerate() {
            touched.insert(document.clone());
            let drops = self.is_planted(Planted::DropWrite) && is_own && number == 1;
            if let Opened::Change(change) = opened
                && !logs_only
                && !drops
            {
                self.store_change(at, document, change.hash);
            }
        }
        for (document, opened) in entries {
            if let Opened::Tombstone { deleted_at_ms } = opened {
                self.store_deletion(at, document, *deleted_at_ms);
            }
            if self.regions[at].disk.is_deleted(document) && !self.is_planted(Planted::KeepDeletedBytes) {
                self.regions[at].disk.erase(document);
            }
        }
        Ok(())
    }

    fn store_change(&mut self, at: usize, document: &DocumentId, hash: ChangeHash) {
        let group = self.group_of(document);
        let made = self.changes[&hash].clone();
        let resurrects = self.is_planted(Planted::Resurrect);
        let row = self.regions[at].disk.row(document, &group);
        if row.deleted_at_ms.is_none() || resurrects {
            row.changes.insert(hash, made);
            self.ledger.lost.remove(&(document.clone(), hash));
        }
    }

    fn store_deletion(&mut self, at: usize, document: &DocumentId, deleted_at_ms: u64) {
        self.count("deletions");
        let group = self.group_of(document);
        let keeps = self.is_planted(Planted::KeepDeletedBytes);
        let region = &mut self.regions[at];
        if keeps {
            let row = region.disk.row(document, &group);
            row.deleted_at_ms = Some(row.deleted_at_ms.map_or(deleted_at_ms, |it| it.min(deleted_at_ms)));
            row.changes.clear();
        } else {
            region.disk.delete(document, &group, deleted_at_ms);
        }
        region.deleted.insert(document.clone());
        let node = region.node.as_mut().expect("only nodes commit");
        node.graphs.remove(document);
        node.refused.remove(document);
    }

    fn commit_page(&mut self, at: usize, documents: &[DocumentContents], touched: &mut BTreeSet<DocumentId>) {
        if self.is_planted(Planted::AdoptWithoutPages) {
            return;
        }
        for contents in documents {
            touched.insert(contents.document.clone());
            match contents.deleted_at_ms {
                Some(deleted_at_ms) => self.store_deletion(at, &contents.document, deleted_at_ms),
                None => {
                    let hashes: Vec<ChangeHash> = contents.changes.iter().map(name_of).collect();
                    hashes.iter().for_each(|hash| self.store_change(at, &contents.document, *hash));
                }
            }
        }
    }

    fn commit_adoption(&mut self, at: usize, origins: &[Progress]) {
        self.count("adoptions");
        for progress in origins {
            let over_log = self.is_planted(Planted::AdoptOverLog);
            let disk = &mut self.regions[at].disk;
            let floor = disk.origins.get(&progress.origin).map_or(Seq(0), |row| row.floor);
            disk.adopt(progress);
            if over_log && let Some(row) = disk.origins.get_mut(&progress.origin) {
                row.floor = floor;
            }
            if self.ledger.chain(progress.origin, progress.seq) != Some(progress.chain) {
                self.violate(Invariant::OneEntryPerSeq, || format!("r{at} adopts {progress:?}"));
            }
            self.ledger.note_reached(at, progress.origin, progress.seq);
        }
        self.audit();
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
        let dropped = row.is_some_and(|row| !row.changes.keys().all(is_here));
        let ignores = self.is_planted(Planted::LogWithoutChanges) || self.is_planted(Planted::IgnoreClones);
        if dropped && !ignores {
            self.count("dropped without a word");
            return self.refuse(at, document);
        }
        self.check_heads(at, document);
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
