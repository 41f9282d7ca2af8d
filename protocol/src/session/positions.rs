//! Which positions came from the peer itself.

use std::ops::Range;

use smallvec::SmallVec;

/// A set of positions, as ascending ranges that neither touch nor overlap.
#[derive(Debug, Default)]
pub(super) struct Positions {
    ranges: SmallVec<[Range<u64>; 1]>,
}

impl Positions {
    pub(super) fn extend(&mut self, mut positions: Vec<u64>) {
        if positions.is_empty() {
            return;
        }
        positions.sort_unstable();
        let mut all: Vec<Range<u64>> = self.ranges.drain(..).collect();
        for position in positions {
            match all.last_mut() {
                Some(last) if last.end == position => last.end += 1,
                Some(last) if last.contains(&position) => {}
                _ => all.push(position..position + 1),
            }
        }
        all.sort_unstable_by_key(|range| range.start);
        for range in all {
            match self.ranges.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => self.ranges.push(range),
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn contains(&self, position: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= position);
        after > 0 && position < self.ranges[after - 1].end
    }

    pub(super) fn forget_before(&mut self, start: u64) {
        self.ranges.retain(|range| range.end > start);
    }

    /// What `span` has beside these positions.
    pub(super) fn gaps_in(&self, span: Range<u64>) -> SmallVec<[Range<u64>; 2]> {
        let mut gaps = SmallVec::new();
        let mut at = span.start;
        for range in &self.ranges {
            if at < range.start.min(span.end) {
                gaps.push(at..range.start.min(span.end));
            }
            at = at.max(range.end);
        }
        if at < span.end {
            gaps.push(at..span.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn positions_are_a_set_and_know_their_gaps(
            first in prop::collection::vec(0..60_u64, 0..40),
            second in prop::collection::vec(0..60_u64, 0..40),
            start in 0..60_u64,
            length in 0..30_u64,
        ) {
            let all: BTreeSet<u64> = first.iter().chain(&second).copied().collect();
            let mut positions = Positions::default();
            positions.extend(first);
            positions.extend(second);
            prop_assert!((0..61).all(|it| positions.contains(it) == all.contains(&it)));
            let gaps: Vec<u64> = positions.gaps_in(start..start + length).into_iter().flatten().collect();
            let expected: Vec<u64> = (start..start + length).filter(|it| !all.contains(it)).collect();
            prop_assert_eq!(gaps, expected);
            positions.forget_before(start);
            prop_assert!((start..61).all(|it| positions.contains(it) == all.contains(&it)));
        }
    }
}
