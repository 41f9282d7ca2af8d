//! Appending to the store in memory: first every counter is compared, then everything is stored.

use super::erasure::Pass;
use super::{Database, LoggedRun, Origin, Tombstone};
use crate::storage::clock::now_ms;
use crate::storage::log_run::{FoundCounter, judge_refused};
use crate::storage::{
    Batch, Deletion, DocumentAppend, DocumentState, RunAppend, StorageError, StoredRun, Writer, two_groups,
};

pub(super) fn append(database: &mut Database, batch: &Batch) -> Result<(), StorageError> {
    if !batch.runs.iter().all(|run| database.is_next(run)) {
        let found: Vec<_> = batch.runs.iter().map(|run| database.found_counter(run)).collect();
        return judge_refused(&batch.runs, &found);
    }
    batch.runs.iter().for_each(|run| database.store_run(run));
    batch.changes.iter().for_each(|append| database.store_changes(append));
    batch.deletions.iter().for_each(|deletion| database.delete(deletion));
    Ok(())
}

impl Database {
    /// Whether the run's origin stands right before it, and whoever writes it may.
    fn is_next(&self, run: &RunAppend) -> bool {
        let found = self.origins.get(&run.origin);
        let follows = found.map_or(0, |origin| origin.seq.0) + 1 == run.first.0;
        follows
            && match run.writer {
                Writer::Own { incarnation } => found.is_some_and(|origin| origin.incarnation == incarnation),
                Writer::Other { .. } => true,
            }
    }

    fn found_counter(&self, run: &RunAppend) -> Option<FoundCounter> {
        self.origins.get(&run.origin).map(|origin| FoundCounter {
            incarnation: origin.incarnation,
            seq: origin.seq,
            chain: origin.chain,
            run_at_end: origin.log.get(&run.last).map(|logged| logged.run.clone()),
        })
    }

    fn store_run(&mut self, run: &RunAppend) {
        let RunAppend { first, last, chain_before, ref body, .. } = *run;
        let stored = StoredRun { first, last, chain_before, body: body.clone() };
        let origin = match &run.writer {
            Writer::Own { .. } => self.origins.get_mut(&run.origin).expect("its incarnation was compared"),
            Writer::Other { region } => {
                let new = || Origin::new(region.clone(), run.group.clone(), None);
                let origin = self.origins.entry(run.origin).or_insert_with(new);
                origin.replace();
                origin
            }
        };
        (origin.seq, origin.chain) = (run.last, run.chain);
        origin.log.insert(run.last, LoggedRun { appended_at_ms: now_ms(), run: stored });
    }

    fn store_changes(&mut self, append: &DocumentAppend) {
        let Some(document) = self.document_mut(&append.document, &append.group) else { return };
        if document.group != append.group {
            let reason = two_groups(&document.group, &append.group);
            document.state = DocumentState::Quarantined { reason };
            return;
        }
        for (_, change) in &append.changes {
            document.changes.entry(change.hash).or_insert_with(|| change.bytes.clone());
        }
    }

    fn delete(&mut self, deletion: &Deletion) {
        let removed = self.documents.remove(&deletion.document);
        self.unerased.insert(deletion.document.clone(), Pass::Next);
        let Deletion { document, group, deleted_at_ms } = deletion.clone();
        let group = removed.map_or(group, |it| it.group);
        let tombstone = self.tombstones.entry(document).or_insert(Tombstone { group, deleted_at_ms });
        tombstone.deleted_at_ms = tombstone.deleted_at_ms.min(deleted_at_ms);
    }
}
