//! Appending to the store in memory: first every counter is compared, then everything is stored.

use isobar_protocol::ids::{DocumentId, OriginId};

use super::{Database, LoggedRun, Origin, Tombstone};
use crate::storage::clock::now_ms;
use crate::storage::log_run::{FoundCounter, erase, judge_refused};
use crate::storage::{
    Batch, Deletion, DocumentAppend, DocumentState, RunAppend, StorageError, StoredRun, Writer, two_groups,
};

pub(super) fn append(database: &mut Database, batch: &Batch) -> Result<(), StorageError> {
    if !batch.runs.iter().all(|run| database.is_next(run)) {
        let found: Vec<_> = batch.runs.iter().map(|run| database.found_counter(run)).collect();
        return judge_refused(&batch.runs, &found);
    }
    // What may fail comes before anything is changed.
    let gone: Vec<&DocumentId> = batch.deletions.iter().map(|deletion| &deletion.document).collect();
    let erased = database.erased_runs(&gone)?;
    let runs: Result<Vec<StoredRun>, StorageError> =
        batch.runs.iter().map(|run| stored(run, &gone)).collect();
    for (run, stored) in batch.runs.iter().zip(runs?) {
        database.store_run(run, stored);
    }
    for (origin, run) in erased {
        let logged = database.origins.get_mut(&origin).and_then(|origin| origin.log.get_mut(&run.last));
        logged.expect("it was found under the same lock").run = run;
    }
    batch.changes.iter().for_each(|append| database.store_changes(append));
    batch.deletions.iter().for_each(|deletion| database.delete(deletion));
    Ok(())
}

fn stored(run: &RunAppend, gone: &[&DocumentId]) -> Result<StoredRun, StorageError> {
    let body = erase(&run.body, gone)?.unwrap_or_else(|| run.body.clone());
    Ok(StoredRun { first: run.first, last: run.last, chain_before: run.chain_before, body })
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

    /// The stored runs that hold changes of these documents, without them.
    fn erased_runs(&self, gone: &[&DocumentId]) -> Result<Vec<(OriginId, StoredRun)>, StorageError> {
        let mut erased = Vec::new();
        if gone.is_empty() {
            return Ok(erased);
        }
        for (&id, origin) in &self.origins {
            for LoggedRun { run, .. } in origin.log.values() {
                if let Some(body) = erase(&run.body, gone)? {
                    erased.push((id, StoredRun { body, ..run.clone() }));
                }
            }
        }
        Ok(erased)
    }

    fn store_run(&mut self, run: &RunAppend, stored: StoredRun) {
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
        let Deletion { document, group, deleted_at_ms } = deletion.clone();
        let group = removed.map_or(group, |it| it.group);
        let tombstone = self.tombstones.entry(document).or_insert(Tombstone { group, deleted_at_ms });
        tombstone.deleted_at_ms = tombstone.deleted_at_ms.min(deleted_at_ms);
    }
}
