//! How many bytes of the node's own logs another region lacks, by a few samples: how many bytes a log had at which seq.
//!
//! Like the lag in time it is about what was written since the node started. It is never less than what is lacking, and more
//! by the distance of two samples at most: a five-hundredth of what was written, or a run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use isobar_protocol::ids::{OriginId, PlacementGroup, Seq};

use crate::commit::OwnProgress;

/// Samples of one log at most. When there are more, twice as far apart are enough.
const SAMPLES_MAX: usize = 1_024;

struct Log {
    group: PlacementGroup,
    /// How many bytes the log had at which seq. Both rise.
    samples: VecDeque<(Seq, u64)>,
    /// Least bytes between two samples.
    spacing_bytes: u64,
    /// How far the log is.
    end: (Seq, u64),
}

impl Log {
    fn new(group: PlacementGroup) -> Self {
        Self { group, samples: VecDeque::new(), spacing_bytes: 1, end: (Seq(0), 0) }
    }

    fn note(&mut self, seq: Seq, bytes: u64) {
        self.end = (seq, bytes);
        let spacing_bytes = self.spacing_bytes;
        if self.samples.back().is_none_or(|(_, last)| bytes - last >= spacing_bytes) {
            self.samples.push_back((seq, bytes));
        }
        if self.samples.len() > SAMPLES_MAX {
            self.spacing_bytes *= 2;
            let mut kept = None;
            self.samples.retain(|(_, bytes)| {
                let keep = kept.is_none_or(|kept| bytes - kept >= spacing_bytes * 2);
                kept = if keep { Some(*bytes) } else { kept };
                keep
            });
        }
    }

    fn after(&self, seq: Seq) -> u64 {
        if seq >= self.end.0 {
            return 0;
        }
        let reached = self.samples.partition_point(|(at, _)| *at <= seq);
        let before = reached.checked_sub(1).and_then(|place| self.samples.get(place));
        self.end.1 - before.map_or(0, |(_, bytes)| *bytes)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct LogBytes(BTreeMap<OriginId, Log>);

impl LogBytes {
    pub(super) fn note(&mut self, own: &OwnProgress) {
        let log = self.0.entry(own.origin).or_insert_with(|| Log::new(own.group.clone()));
        log.note(own.seq, own.bytes);
    }

    /// The bytes that a region of these groups lacks which has each origin that far.
    pub(super) fn lacking(&self, groups: &BTreeSet<PlacementGroup>, has: impl Fn(OriginId) -> Seq) -> u64 {
        let logs = self.0.iter().filter(|(_, log)| groups.contains(&log.group));
        logs.map(|(origin, log)| log.after(has(*origin))).sum()
    }
}

#[cfg(test)]
mod tests {
    use isobar_protocol::log::Chain;

    use super::*;

    fn own(origin: u128, group: &str, seq: u64, bytes: u64) -> OwnProgress {
        OwnProgress {
            origin: OriginId(uuid::Uuid::from_u128(origin)),
            group: PlacementGroup::new(group).unwrap(),
            seq: Seq(seq),
            chain: Chain::START,
            bytes,
        }
    }

    fn groups(names: &[&str]) -> BTreeSet<PlacementGroup> {
        names.iter().map(|name| PlacementGroup::new(name).unwrap()).collect()
    }

    #[test]
    fn a_region_lacks_the_bytes_after_what_it_has_of_the_groups_that_it_is_in() {
        let mut bytes = LogBytes::default();
        for own in [own(1, "a", 0, 0), own(1, "a", 2, 100), own(1, "a", 5, 700), own(2, "b", 3, 50)] {
            bytes.note(&own);
        }
        let lacking = |names: &[&str], seq| bytes.lacking(&groups(names), |_| Seq(seq));
        assert_eq!(lacking(&["a"], 0), 700);
        assert_eq!(lacking(&["a"], 2), 600);
        // Between two samples it is what is lacking after the earlier one.
        assert_eq!(lacking(&["a"], 4), 600);
        assert_eq!(lacking(&["a", "b"], 2), 650);
        assert_eq!(lacking(&["a", "b"], 9), 0);
        assert_eq!(lacking(&[], 0), 0);
    }

    #[test]
    fn samples_are_bounded_and_never_say_too_little() {
        let mut bytes = LogBytes::default();
        const END: u64 = 20_000;
        (0..=END).for_each(|seq| bytes.note(&own(1, "a", seq, seq * 10)));
        let log = bytes.0.values().next().unwrap();
        assert!(log.samples.len() <= SAMPLES_MAX);
        for seq in (0..=END).step_by(7) {
            let (said, true_bytes) = (log.after(Seq(seq)), (END - seq) * 10);
            assert!((true_bytes..=true_bytes + END / 10).contains(&said), "{said} after {seq}");
        }
        assert_eq!(log.after(Seq(END)), 0);
    }
}
