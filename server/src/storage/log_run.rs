//! Runs of log entries as storage sees them: which of them a reader gets, what a refused append turns out to be, and how
//! deleted documents' changes leave them.
//!
//! A run's body is packed by [`isobar_protocol::log`], and opaque here except to [`erase`].

use std::collections::BTreeSet;

use bytes::Bytes;
use isobar_protocol::ids::{DocumentId, Incarnation, Seq};
use isobar_protocol::log::{self, Chain};

use super::{Batch, RunAppend, StorageError, StoredRun, Writer};

/// About how many bytes of runs one step of erasing reads: what it keeps others waiting for.
const ERASE_BYTES_MAX: usize = 4 << 20;

/// Checks what every implementation relies on.
///
/// # Panics
/// If a run is empty, begins at 0, exceeds what the databases count with (2^63 − 1) or comes twice in its origin, or if
/// a document's changes are none or not ascending: these would corrupt the log.
pub(super) fn check(batch: &Batch) {
    for (place, run) in batch.runs.iter().enumerate() {
        assert!(run.first.0 > 0, "the first entry of a log is 1");
        assert!(run.first <= run.last, "a run holds at least one entry");
        assert!(i64::try_from(run.last.0).is_ok(), "seqs stay below 2^63");
        let others = &batch.runs[..place];
        assert!(others.iter().all(|other| other.origin != run.origin), "an origin has one run in a batch");
    }
    for append in &batch.changes {
        assert!(!append.changes.is_empty(), "an append holds at least one change");
        let seqs = append.changes.iter().map(|(seq, _)| *seq);
        assert!(
            seqs.is_sorted_by(|seq, next| seq < next),
            "a document's changes are in the order of their seqs"
        );
    }
}

/// What a reader at `after` gets of an origin whose counter stands at `seq`: `runs` are those that end after `after`
/// (clauses 8 and 15).
pub(super) fn gather(seq: Seq, after: Seq, mut runs: Vec<StoredRun>) -> Result<Vec<StoredRun>, StorageError> {
    let Some(oldest) = runs.first() else {
        return if after < seq { Err(StorageError::Truncated { floor: seq }) } else { Ok(runs) };
    };
    if oldest.first.0 > after.0 + 1 {
        return Err(StorageError::Truncated { floor: Seq(oldest.first.0 - 1) });
    }
    let follows = |[run, next]: &[StoredRun; 2]| next.first.0 == run.last.0 + 1;
    let followed = runs.array_windows().take_while(|pair| follows(pair)).count();
    if followed + 1 < runs.len() {
        let (run, next) = (&runs[followed], &runs[followed + 1]);
        tracing::error!(after = run.last.0, first = next.first.0, last = next.last.0, "the log has a hole");
        runs.truncate(followed + 1);
    }
    Ok(runs)
}

/// What an implementation finds in place of the counter that a run expected.
pub(super) struct FoundCounter {
    pub incarnation: Incarnation,
    pub seq: Seq,
    pub chain: Chain,
    /// The run that ends where the refused run would have ended.
    pub run_at_end: Option<StoredRun>,
}

impl FoundCounter {
    /// Whether `run` is stored. A deletion may have changed its body since; the chain says the same then.
    fn holds(&self, run: &RunAppend) -> bool {
        let same_body =
            |found: &StoredRun| found.body == run.body || (self.seq == run.last && self.chain == run.chain);
        self.run_at_end.as_ref().is_some_and(|found| {
            found.first == run.first && found.chain_before == run.chain_before && same_body(found)
        })
    }
}

/// Decides about a batch of which some counter was not where it should be (clauses 4 and 5). `found` has what each of
/// `runs` met; `None` for an origin that is not known. Nothing of the batch was stored by the attempt that was refused.
///
/// # Panics
/// If the incarnation of an own run is current, and the run neither follows the last one nor is it: two writers share
/// an incarnation.
pub(super) fn judge_refused(runs: &[RunAppend], found: &[Option<FoundCounter>]) -> Result<(), StorageError> {
    if is_stored(runs, found) {
        return Ok(());
    }
    for (run, found) in runs.iter().zip(found) {
        let Writer::Own { incarnation } = run.writer else { continue };
        let Some(found) = found else {
            return Err(StorageError::Fatal(
                format!("origin {:?} is not in the database", run.origin).into(),
            ));
        };
        if found.incarnation != incarnation {
            return Err(StorageError::Fenced { origin: run.origin, ours: incarnation });
        }
        assert!(
            found.seq.0 + 1 == run.first.0,
            "origin {:?} stands at {:?}, but its only writer expected to append {:?}..={:?}: two writers share {:?}",
            run.origin,
            found.seq,
            run.first,
            run.last,
            incarnation
        );
    }
    for (run, found) in runs.iter().zip(found) {
        let seq = found.as_ref().map_or(Seq(0), |found| found.seq);
        if matches!(run.writer, Writer::Other { .. }) && seq.0 + 1 != run.first.0 {
            return Err(StorageError::OutOfStep { origin: run.origin, seq });
        }
    }
    Err(StorageError::Transient("another node was appending at the same moment".into()))
}

/// Whether the batch had committed before. A run of this node's own is there only if the whole batch is. Runs of other
/// regions' origins say nothing of the batch: another node may have stored the very same, and nothing else of it.
fn is_stored(runs: &[RunAppend], found: &[Option<FoundCounter>]) -> bool {
    let has_own = runs.iter().any(|run| matches!(run.writer, Writer::Own { .. }));
    runs.iter().zip(found).all(|(run, found)| {
        let Some(found) = found else { return false };
        match run.writer {
            // A batch that committed before the origin was claimed is safe, and saying otherwise would be untrue.
            Writer::Own { incarnation } => {
                found.holds(run) && (found.incarnation != incarnation || found.seq == run.last)
            }
            Writer::Other { .. } => has_own && found.seq >= run.last,
        }
    })
}

/// A run's body without the changes of `documents`; `None` if it holds none of them (clause 12), or cannot be read: then it
/// has no reader either, and shall not keep what is behind it from anybody.
fn erase(run: &StoredRun, documents: &BTreeSet<DocumentId>) -> Option<Bytes> {
    if documents.is_empty() {
        return None;
    }
    let erased = log::erase_where(&run.body, |document| documents.contains(document));
    let erased = erased.unwrap_or_else(|error| {
        tracing::error!(%error, first = run.first.0, last = run.last.0, "a stored run cannot be erased");
        None
    });
    erased.map(Bytes::from)
}

/// Runs as a reader gets them while the changes of `unerased` may still stand in the log (clause 12).
pub(super) fn erase_all(mut runs: Vec<StoredRun>, unerased: &BTreeSet<DocumentId>) -> Vec<StoredRun> {
    for run in &mut runs {
        if let Some(body) = erase(run, unerased) {
            run.body = body;
        }
    }
    runs
}

/// What one step of erasing may still read, and what it has done (clause 18).
pub(super) struct ErasureBudget {
    pub runs: usize,
    pub bytes: usize,
    /// Runs that were rewritten.
    pub rewritten: u64,
}

impl ErasureBudget {
    pub fn new(runs: usize) -> Self {
        Self { runs, bytes: ERASE_BYTES_MAX, rewritten: 0 }
    }

    pub fn is_spent(&self) -> bool {
        self.runs == 0 || self.bytes == 0
    }

    /// Counts a run that was read. Returns what is to be stored in place of its body, if anything is.
    pub fn erase(&mut self, run: &StoredRun, unerased: &BTreeSet<DocumentId>) -> Option<Bytes> {
        self.runs = self.runs.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(run.body.len());
        let erased = erase(run, unerased);
        self.rewritten += u64::from(erased.is_some());
        erased
    }
}

#[cfg(test)]
mod tests {
    use isobar_protocol::ids::{OriginId, PlacementGroup, RegionName};
    use uuid::Uuid;

    use super::*;

    fn chain(number: u64) -> Chain {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        Chain(bytes)
    }

    fn run(first: u64, last: u64, writer: Writer) -> RunAppend {
        RunAppend {
            origin: OriginId(Uuid::from_u128(7)),
            writer,
            group: PlacementGroup::new("everywhere").unwrap(),
            first: Seq(first),
            last: Seq(last),
            chain_before: chain(first - 1),
            chain: chain(last),
            body: Bytes::from(format!("{first} to {last}")),
        }
    }

    fn own(first: u64, last: u64) -> RunAppend {
        run(first, last, Writer::Own { incarnation: Incarnation(2) })
    }

    fn other(first: u64, last: u64) -> RunAppend {
        run(first, last, Writer::Other { region: RegionName::new("us").unwrap() })
    }

    fn stored(run: &RunAppend) -> StoredRun {
        let RunAppend { first, last, chain_before, ref body, .. } = *run;
        StoredRun { first, last, chain_before, body: body.clone() }
    }

    fn found(incarnation: u64, seq: u64, at_end: Option<&RunAppend>) -> Option<FoundCounter> {
        let incarnation = Incarnation(incarnation);
        Some(FoundCounter { incarnation, seq: Seq(seq), chain: chain(seq), run_at_end: at_end.map(stored) })
    }

    #[test]
    fn a_reader_below_the_floor_is_refused() {
        let runs = || vec![stored(&own(5, 8)), stored(&own(9, 9))];
        assert_eq!(gather(Seq(9), Seq(4), runs()).unwrap().len(), 2);
        assert_eq!(gather(Seq(9), Seq(6), runs()).unwrap().len(), 2);
        let refused = gather(Seq(9), Seq(3), runs());
        assert!(matches!(refused, Err(StorageError::Truncated { floor: Seq(4) })));
        assert_eq!(gather(Seq(9), Seq(9), Vec::new()).unwrap(), []);
        let refused = gather(Seq(9), Seq(8), Vec::new());
        assert!(matches!(refused, Err(StorageError::Truncated { floor: Seq(9) })));
    }

    #[test]
    fn a_reader_gets_what_is_before_a_hole_and_then_is_refused() {
        let runs = || [own(1, 1), own(2, 4), own(6, 6), own(7, 7)].map(|run| stored(&run));
        assert_eq!(gather(Seq(7), Seq(0), runs().to_vec()).unwrap(), runs()[..2]);
        let refused = gather(Seq(7), Seq(4), runs()[2..].to_vec());
        assert!(matches!(refused, Err(StorageError::Truncated { floor: Seq(5) })));
    }

    #[test]
    fn a_batch_that_had_committed_is_a_success() {
        assert!(judge_refused(&[own(3, 5)], &[found(2, 5, Some(&own(3, 5)))]).is_ok());
        assert!(judge_refused(&[own(3, 5)], &[found(9, 8, Some(&own(3, 5)))]).is_ok());
        let both = [own(3, 5), other(1, 2)];
        assert!(judge_refused(&both, &[found(2, 5, Some(&own(3, 5))), found(0, 4, None)]).is_ok());
        let mut erased = own(3, 5);
        erased.body = Bytes::from_static(b"shorter");
        assert!(judge_refused(&[own(3, 5)], &[found(2, 5, Some(&erased))]).is_ok());
    }

    #[test]
    fn an_older_incarnation_is_fenced_whatever_else_is_refused() {
        let runs = [other(3, 5), own(3, 5)];
        for at in [found(3, 2, None), found(3, 5, Some(&own(4, 5)))] {
            let refused = judge_refused(&runs, &[found(0, 9, None), at]);
            assert!(matches!(refused, Err(StorageError::Fenced { ours: Incarnation(2), .. })));
        }
    }

    #[test]
    fn another_nodes_entries_are_out_of_step() {
        for (at, stands) in [(found(0, 9, None), 9), (found(0, 5, Some(&other(4, 5))), 5), (None, 0)] {
            let refused = judge_refused(&[own(3, 5), other(3, 5)], &[found(2, 2, None), at]);
            assert!(matches!(refused, Err(StorageError::OutOfStep { seq, .. }) if seq == Seq(stands)));
        }
        let refused = judge_refused(&[other(3, 5)], &[found(0, 2, None)]);
        assert!(matches!(refused, Err(StorageError::Transient(_))));
        // The same entries do not tell whether the rest of the batch is stored.
        let refused = judge_refused(&[other(3, 5)], &[found(0, 5, Some(&other(3, 5)))]);
        assert!(matches!(refused, Err(StorageError::OutOfStep { seq: Seq(5), .. })));
    }

    #[test]
    #[should_panic(expected = "two writers share")]
    fn two_writers_of_one_incarnation_are_stopped() {
        let _ = judge_refused(&[own(3, 5)], &[found(2, 5, Some(&own(4, 5)))]);
    }
}
