//! The newest runs of every origin, kept in memory so that links which keep up are served without the database.
//!
//! It is a copy of what is durable and nothing depends on it: whatever it does not hold is read from storage. It knows
//! only what this node stored itself; a sibling's runs are not here.
//!
//! # Invariants
//!
//! - The runs kept of an origin follow each other without a gap and end where its log ended when this node last wrote.
//! - All bodies together are at most [`RECENT_BYTES_MAX`] bytes.
//! - Nothing of a deleted document is kept.

use std::collections::{HashMap, VecDeque};

use isobar_protocol::ids::{OriginId, Seq};
use parking_lot::Mutex;

use crate::storage::StoredRun;

/// Bytes of bodies that are kept: some seconds of heavy writing, so that a link may fall behind by a few round trips.
pub const RECENT_BYTES_MAX: usize = 8 << 20;

/// What a run costs beside its body.
const RUN_OVERHEAD_BYTES: usize = 128;

/// See the module.
#[derive(Debug, Default)]
pub struct RecentLog {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    origins: HashMap<OriginId, Recent>,
    /// The origin of each kept run, oldest first.
    order: VecDeque<OriginId>,
    bytes: usize,
}

#[derive(Debug)]
struct Recent {
    runs: VecDeque<StoredRun>,
    end: Seq,
}

fn cost_bytes(run: &StoredRun) -> usize {
    run.body.len() + RUN_OVERHEAD_BYTES
}

impl RecentLog {
    /// The runs from the one with the entry after `after` on, in order, up to about `bytes_max` bytes, at least one;
    /// none if `after` is the end. `None`: it has to be read from storage.
    pub fn read(&self, origin: OriginId, after: Seq, bytes_max: usize) -> Option<Vec<StoredRun>> {
        let state = self.state.lock();
        let recent = state.origins.get(&origin)?;
        if after == recent.end {
            return Some(Vec::new());
        }
        let start = recent.runs.partition_point(|run| run.last <= after);
        let first = recent.runs.get(start)?;
        if first.first.0 > after.0 + 1 {
            return None;
        }
        let mut bytes = 0;
        let fits = |run: &&StoredRun| {
            let fits = bytes == 0 || bytes + run.body.len() <= bytes_max;
            bytes += run.body.len();
            fits
        };
        Some(recent.runs.range(start..).take_while(fits).cloned().collect())
    }

    /// Keeps a run that is durable now.
    pub(crate) fn push(&self, origin: OriginId, run: StoredRun) {
        let mut state = self.state.lock();
        if state.origins.get(&origin).is_some_and(|recent| recent.end.0 + 1 != run.first.0) {
            // A snapshot was adopted in between, or a sibling wrote.
            state.forget(origin);
        }
        state.bytes += cost_bytes(&run);
        state.order.push_back(origin);
        let new = || Recent { runs: VecDeque::new(), end: run.last };
        let recent = state.origins.entry(origin).or_insert_with(new);
        recent.end = run.last;
        recent.runs.push_back(run);
        while state.bytes > RECENT_BYTES_MAX {
            state.drop_oldest();
        }
    }

    /// Notes that an origin's log has moved on by what is not to be kept.
    pub(crate) fn skip_to(&self, origin: OriginId, end: Seq) {
        let mut state = self.state.lock();
        state.forget(origin);
        state.origins.insert(origin, Recent { runs: VecDeque::new(), end });
    }

    /// Gives up every run; where the logs end is still known.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock();
        state.origins.values_mut().for_each(|recent| recent.runs.clear());
        state.order.clear();
        state.bytes = 0;
    }
}

impl State {
    fn drop_oldest(&mut self) {
        let Some(origin) = self.order.pop_front() else { return };
        let run = self.origins.get_mut(&origin).and_then(|recent| recent.runs.pop_front());
        self.bytes -= run.map_or(0, |run| cost_bytes(&run));
    }

    fn forget(&mut self, origin: OriginId) {
        if let Some(recent) = self.origins.remove(&origin) {
            self.bytes -= recent.runs.iter().map(cost_bytes).sum::<usize>();
            self.order.retain(|it| *it != origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use isobar_protocol::log::Chain;
    use uuid::Uuid;

    use super::*;

    const ORIGIN: OriginId = OriginId(Uuid::from_u128(1));
    const OTHER: OriginId = OriginId(Uuid::from_u128(2));

    fn run(first: u64, last: u64, bytes: usize) -> StoredRun {
        let body = vec![0; bytes].into();
        StoredRun { first: Seq(first), last: Seq(last), chain_before: Chain::START, body }
    }

    fn firsts(read: Option<Vec<StoredRun>>) -> Option<Vec<u64>> {
        read.map(|runs| runs.iter().map(|run| run.first.0).collect())
    }

    #[test]
    fn runs_after_a_cursor_are_read_and_the_end_is_empty() {
        let log = RecentLog::default();
        log.push(ORIGIN, run(5, 7, 10));
        log.push(ORIGIN, run(8, 8, 10));
        assert_eq!(firsts(log.read(ORIGIN, Seq(4), 1000)), Some(vec![5, 8]));
        assert_eq!(firsts(log.read(ORIGIN, Seq(6), 1000)), Some(vec![5, 8]));
        assert_eq!(firsts(log.read(ORIGIN, Seq(7), 1000)), Some(vec![8]));
        assert_eq!(firsts(log.read(ORIGIN, Seq(4), 1)), Some(vec![5]), "at least one");
        assert_eq!(firsts(log.read(ORIGIN, Seq(8), 1000)), Some(vec![]));
    }

    #[test]
    fn what_is_not_kept_is_a_miss() {
        let log = RecentLog::default();
        assert_eq!(log.read(ORIGIN, Seq(0), 1000), None);
        log.push(ORIGIN, run(5, 7, 10));
        assert_eq!(log.read(ORIGIN, Seq(3), 1000), None);
        assert_eq!(log.read(ORIGIN, Seq(9), 1000), None, "beyond what is known");
        assert_eq!(log.read(OTHER, Seq(4), 1000), None);
        log.push(ORIGIN, run(20, 21, 10));
        assert_eq!(log.read(ORIGIN, Seq(4), 1000), None, "there is a gap after it");
        assert_eq!(firsts(log.read(ORIGIN, Seq(19), 1000)), Some(vec![20]));
        log.clear();
        assert_eq!(log.read(ORIGIN, Seq(19), 1000), None);
        assert_eq!(firsts(log.read(ORIGIN, Seq(21), 1000)), Some(vec![]));
    }

    #[test]
    fn its_bytes_are_bounded_over_all_origins_and_the_oldest_go_first() {
        let log = RecentLog::default();
        let large = RECENT_BYTES_MAX / 4;
        log.push(OTHER, run(1, 1, large));
        (1..=4).for_each(|seq| log.push(ORIGIN, run(seq, seq, large)));
        assert!(log.state.lock().bytes <= RECENT_BYTES_MAX);
        assert_eq!(log.read(OTHER, Seq(0), 1000), None);
        assert_eq!(log.read(ORIGIN, Seq(0), 1000), None);
        assert_eq!(firsts(log.read(ORIGIN, Seq(1), usize::MAX)), Some(vec![2, 3, 4]));
        log.push(ORIGIN, run(5, 5, RECENT_BYTES_MAX + 1));
        assert_eq!(log.read(ORIGIN, Seq(4), 1000), None, "larger than all there may be");
        assert_eq!(firsts(log.read(ORIGIN, Seq(5), 1000)), Some(vec![]));
        assert_eq!(log.state.lock().bytes, 0);
    }
}
