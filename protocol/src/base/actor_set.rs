//! Which authors are among a change's ancestors.
//!
//! Authors are numbered in the order of their first change, so that the authors somebody knows are nearly always all
//! of the first so many; the exceptions are those who write at the same time. Kept as runs, a set is a few words
//! where a list would grow with every browser tab that ever edited the document.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

/// A set of author numbers, as ascending runs that neither touch nor overlap.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ActorSet {
    runs: SmallVec<[Range<u32>; 1]>,
}

impl ActorSet {
    /// The first `count` authors.
    pub fn first(count: u32) -> Self {
        if count == 0 { Self::default() } else { Self { runs: smallvec![0..count] } }
    }

    /// From runs that are ascending and do not touch; nothing if they are not, or not below `end`.
    pub(super) fn from_runs(runs: impl Iterator<Item = Range<u32>>, end: u32) -> Option<Self> {
        let mut set = Self::default();
        for run in runs {
            let follows = set.runs.last().is_none_or(|last| last.end < run.start);
            if !follows || run.is_empty() || run.end > end {
                return None;
            }
            set.runs.push(run);
        }
        Some(set)
    }

    pub(super) fn runs(&self) -> &[Range<u32>] {
        &self.runs
    }

    /// How many runs there are: what the set costs to keep and to merge.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    pub fn contains(&self, actor: u32) -> bool {
        let after = self.runs.partition_point(|run| run.start <= actor);
        after > 0 && actor < self.runs[after - 1].end
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.runs.iter().cloned().flatten()
    }

    #[must_use]
    pub fn with(&self, actor: u32) -> Self {
        self.union(&Self { runs: smallvec![actor..actor + 1] })
    }

    pub fn includes(&self, other: &Self) -> bool {
        other.runs.iter().all(|run| {
            let after = self.runs.partition_point(|own| own.start <= run.start);
            after > 0 && run.end <= self.runs[after - 1].end
        })
    }

    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut runs: SmallVec<[Range<u32>; 1]> =
            SmallVec::with_capacity(self.runs.len().max(other.runs.len()));
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        while let Some(run) = match (left.peek(), right.peek()) {
            (Some(a), Some(b)) if a.start <= b.start => left.next(),
            (Some(_), None) => left.next(),
            (_, Some(_)) => right.next(),
            (None, None) => None,
        } {
            match runs.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => runs.push(run.clone()),
            }
        }
        Self { runs }
    }
}

/// From numbers in ascending order.
impl FromIterator<u32> for ActorSet {
    fn from_iter<I: IntoIterator<Item = u32>>(actors: I) -> Self {
        let mut runs: SmallVec<[Range<u32>; 1]> = SmallVec::new();
        for actor in actors {
            match runs.last_mut() {
                Some(last) if last.end == actor => last.end += 1,
                Some(last) if last.end > actor => {}
                _ => runs.push(actor..actor + 1),
            }
        }
        Self { runs }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_of_runs_is_a_set(a in prop::collection::btree_set(0..60_u32, 0..30),
                                  b in prop::collection::btree_set(0..60_u32, 0..30)) {
            let set = |numbers: &BTreeSet<u32>| numbers.iter().copied().collect::<ActorSet>();
            let (left, right) = (set(&a), set(&b));
            prop_assert_eq!(left.iter().collect::<BTreeSet<u32>>(), a.clone());
            prop_assert_eq!(left.union(&right), set(&a.union(&b).copied().collect()));
            prop_assert_eq!(left.includes(&right), a.is_superset(&b));
            for number in 0..61 {
                prop_assert_eq!(left.contains(number), a.contains(&number));
            }
            let again = ActorSet::from_runs(left.runs().iter().cloned(), 60);
            prop_assert_eq!(again, Some(left));
        }
    }

    #[test]
    fn runs_that_touch_or_run_over_the_end_are_refused() {
        assert_eq!(ActorSet::from_runs([0..2, 2..3].into_iter(), 9), None);
        assert_eq!(ActorSet::from_runs([4..5, 0..2].into_iter(), 9), None);
        assert_eq!(ActorSet::from_runs(std::iter::once(3..3), 9), None);
        assert_eq!(ActorSet::from_runs(std::iter::once(0..10), 9), None);
    }
}
