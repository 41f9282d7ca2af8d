//! What receipts need to know of a document: its durable heads, whether heads of others are durable here, and by which
//! ways its changes came (`isobar_protocol::receipts` says why that matters).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use isobar_protocol::config::RECEIPT_HEADS_MAX;
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use isobar_protocol::receipts::Baseline;

use super::{Document, Documents, LoadError};

/// By which ways a document's changes came.
#[derive(Debug)]
pub(super) struct Ways {
    baseline: Baseline,
    /// How many contents of other regions are being taken in.
    contents: u32,
    /// Where the changes end that were staged and came otherwise than from a client or with a run, or had waited for a
    /// dependency, until they are seen to be durable; 0 if there are none.
    otherwise_end: u64,
}

impl Ways {
    /// Of a document that was found in storage, or not.
    pub(super) fn of_loaded(exists: bool) -> Self {
        Self {
            baseline: if exists { new_baseline() } else { Baseline::NOTHING },
            contents: 0,
            otherwise_end: 0,
        }
    }

    /// Changes before this position were staged that no log here need name.
    pub(super) fn staged_otherwise(&mut self, end: u64) {
        self.otherwise_end = end;
    }

    /// The baseline of what is durable now, and whether all that came otherwise is durable. As long as it is not, what
    /// becomes durable of it is under a baseline of its own at each look.
    fn look(&mut self, durable_end: u64) -> (Baseline, bool) {
        if self.contents == 0 && self.otherwise_end == 0 {
            return (self.baseline, true);
        }
        self.baseline = new_baseline();
        if durable_end >= self.otherwise_end {
            self.otherwise_end = 0;
        }
        (self.baseline, self.contents == 0 && self.otherwise_end == 0)
    }
}

/// A number that no document of this process has had.
fn new_baseline() -> Baseline {
    static LAST: AtomicU64 = AtomicU64::new(Baseline::NOTHING.0);
    Baseline(LAST.fetch_add(1, Ordering::Relaxed) + 1)
}

/// What is durable of a document at one moment.
pub(crate) struct Durable {
    pub(crate) group: PlacementGroup,
    pub(crate) heads: Vec<ChangeHash>,
    pub(crate) baseline: Baseline,
    /// No change waits for a dependency, or is on its way in otherwise than from a client or with a run.
    pub(crate) is_closed: bool,
}

/// Another region's contents on their way into a document. When it is dropped they are there, as far as they ever will be.
pub(super) struct TakingContents(Arc<Document>);

impl TakingContents {
    pub(super) fn begin(document: &Arc<Document>) -> Self {
        document.lock().ways.contents += 1;
        Self(document.clone())
    }
}

impl Drop for TakingContents {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ways.contents -= 1;
        state.ways.baseline = new_baseline();
    }
}

impl Document {
    /// What is durable; nothing while that is nothing, and of a document that is out of service or has too many heads to name.
    pub(crate) fn durable(&self) -> Option<Durable> {
        let mut state = self.lock();
        let durable_end = state.graph.durable_end();
        if state.is_withheld() || durable_end == 0 {
            return None;
        }
        let (baseline, is_settled) = state.ways.look(durable_end);
        let heads = state.graph.heads();
        (heads.len() <= RECEIPT_HEADS_MAX).then(|| Durable {
            group: state.group.clone(),
            heads,
            baseline,
            is_closed: is_settled && state.graph.pending_count() == 0,
        })
    }

    /// Where the durable changes end: it moves whenever the durable heads do.
    pub(crate) fn durable_end(&self) -> u64 {
        self.lock().graph.durable_end()
    }
}

impl Documents {
    /// Whether all of these changes of a document are durable here and in service.
    pub(crate) async fn holds(&self, id: &DocumentId, heads: &[ChangeHash]) -> Result<bool, LoadError> {
        let document = self.open(id).await?;
        let missing = |document: &Document| -> Option<Vec<ChangeHash>> {
            let state = document.lock();
            let graph = state.graph();
            let is_durable =
                |head: &ChangeHash| graph.position(head).is_some_and(|it| it < graph.durable_end());
            (!state.is_withheld()).then(|| heads.iter().filter(|head| !is_durable(head)).copied().collect())
        };
        match missing(&document) {
            None => Ok(false),
            Some(missing) if missing.is_empty() => Ok(true),
            Some(_) if !document.lock().graph().has_base() => Ok(false),
            // Only the index tells what is inside the base.
            Some(missing) => {
                let (_, index) = self.read_index(id).await?;
                Ok(missing.iter().all(|head| index.position_of(head).is_some()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_holds_until_something_comes_in_otherwise() {
        let mut empty = Ways::of_loaded(false);
        assert_eq!(empty.look(3), (Baseline::NOTHING, true));
        let mut ways = Ways::of_loaded(true);
        let (first, is_closed) = ways.look(3);
        assert!(is_closed && first != Baseline::NOTHING);
        assert_eq!(ways.look(5), (first, true), "what clients and runs bring changes nothing");

        // Half of what came is durable: it is under no baseline that could be confirmed.
        ways.staged_otherwise(8);
        let (second, is_closed) = ways.look(6);
        assert!(!is_closed && second != first);
        let (third, is_closed) = ways.look(7);
        assert!(!is_closed && third != second, "more of it is durable than before");
        let (fourth, is_closed) = ways.look(8);
        assert!(is_closed && fourth != third);
        assert_eq!(ways.look(9), (fourth, true));

        ways.contents = 1;
        let (fifth, is_closed) = ways.look(9);
        assert!(!is_closed && fifth != fourth);
    }
}
