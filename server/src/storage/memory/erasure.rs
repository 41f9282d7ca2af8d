//! Erasing what deleted documents have left in the log (clause 18).

use std::collections::BTreeSet;
use std::ops::Bound;

use isobar_protocol::ids::{DocumentId, OriginId, Seq};

use super::Database;
use crate::storage::ErasureStep;
use crate::storage::log_run::ErasureBudget;

/// In which pass over the log a deletion is erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    UnderWay,
    Next,
}

impl Database {
    pub(super) fn unerased(&self) -> BTreeSet<DocumentId> {
        self.unerased.keys().cloned().collect()
    }

    pub(super) fn erase_step(&mut self, runs_max: usize) -> ErasureStep {
        if self.unerased.is_empty() {
            return ErasureStep::default();
        }
        if self.erasure_cursors.is_empty() {
            self.unerased.values_mut().for_each(|pass| *pass = Pass::UnderWay);
        }
        let mut budget = ErasureBudget::new(runs_max);
        let origins: Vec<OriginId> = self.origins.keys().copied().collect();
        if origins.into_iter().all(|origin| self.erase_on(origin, &mut budget)) {
            self.unerased.retain(|_, pass| *pass == Pass::Next);
            self.erasure_cursors.clear();
        }
        ErasureStep { runs_erased: budget.rewritten, deletions_left: self.unerased.len() as u64 }
    }

    /// Goes on in one origin's log. Returns whether its end was reached.
    fn erase_on(&mut self, id: OriginId, budget: &mut ErasureBudget) -> bool {
        let unerased = self.unerased();
        let cursor = self.erasure_cursors.entry(id).or_insert(Seq(0));
        let Some(origin) = self.origins.get_mut(&id) else { return true };
        let following = (Bound::Excluded(*cursor), Bound::Unbounded);
        for (last, logged) in origin.log.range_mut(following) {
            if budget.is_spent() {
                return false;
            }
            if let Some(body) = budget.erase(&logged.run, &unerased) {
                logged.run.body = body;
            }
            *cursor = *last;
        }
        true
    }
}
