//! How old the entries of an own origin are, by a few samples: when the log had reached which seq.
//!
//! A replica keeps no entry, so how long a peer has been behind is not to be read from its cursor. Samples are taken as
//! the log grows, some milliseconds apart, and thinned where they stand close together in proportion to their age: what
//! is a second old is known to a few hundredths of it, and so is what is a day old.

use std::collections::VecDeque;

use super::Moment;
use crate::ids::Seq;

/// Samples of one origin at most.
const SAMPLES_MAX: usize = 128;

/// Entries that become durable within this time count as one sample.
const SPACING_MS: u64 = 10;

/// When an origin's log had grown to which seq. Both rise.
#[derive(Debug, Default)]
pub(super) struct Samples(VecDeque<(Moment, Seq)>);

impl Samples {
    /// The log ends at `seq` since now.
    pub(super) fn note(&mut self, now: Moment, seq: Seq) {
        match self.0.back_mut() {
            Some((_, last)) if *last >= seq => return,
            // The sample's time stays, that of its oldest entry: a peer may seem later by the spacing, never earlier.
            Some((at, last)) if now.0.saturating_sub(at.0) < SPACING_MS => {
                *last = seq;
                return;
            }
            _ => self.0.push_back((now, seq)),
        }
        if self.0.len() > SAMPLES_MAX {
            self.thin(now);
        }
    }

    /// Since when the oldest entry after `seq` has been there; nothing if there is none.
    pub(super) fn since(&self, seq: Seq) -> Option<Moment> {
        let first = self.0.partition_point(|(_, last)| *last <= seq);
        self.0.get(first).map(|(at, _)| *at)
    }

    /// Takes out the sample that is missed least: its entries count with the next one's. The first and the last stay.
    fn thin(&mut self, now: Moment) {
        let relative = |at: usize| {
            let gap = self.0[at + 1].0.0 - self.0[at - 1].0.0;
            let age = now.0.saturating_sub(self.0[at].0.0).max(1);
            gap as f64 / age as f64
        };
        let least = (1..self.0.len() - 1).min_by(|left, right| relative(*left).total_cmp(&relative(*right)));
        if let Some((at, _)) = least.and_then(|at| self.0.remove(at))
            && let Some(next) = least.and_then(|place| self.0.get_mut(place))
        {
            next.0 = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_entry_after_a_seq_tells_since_when() {
        let mut samples = Samples::default();
        assert_eq!(samples.since(Seq(0)), None);
        samples.note(Moment(1_000), Seq(3));
        samples.note(Moment(1_004), Seq(5));
        samples.note(Moment(2_000), Seq(9));
        samples.note(Moment(2_500), Seq(9));
        assert_eq!(samples.since(Seq(0)), Some(Moment(1_000)));
        assert_eq!(samples.since(Seq(4)), Some(Moment(1_000)), "it stands in the sample of the third");
        assert_eq!(samples.since(Seq(5)), Some(Moment(2_000)));
        assert_eq!(samples.since(Seq(8)), Some(Moment(2_000)));
        assert_eq!(samples.since(Seq(9)), None);
    }

    #[test]
    fn samples_are_few_and_old_ones_are_known_in_proportion_to_their_age() {
        let mut samples = Samples::default();
        // An entry each twenty milliseconds for an hour.
        let moment = |seq: u64| seq * 20;
        let last = 3_600_000 / 20;
        for seq in 1..=last {
            samples.note(Moment(moment(seq)), Seq(seq));
            assert!(samples.0.len() <= SAMPLES_MAX);
        }
        let now = moment(last);
        for behind in [1, 10, 100, 1_000, 10_000, 100_000] {
            let first_missing = last - behind + 1;
            let age = now - moment(first_missing);
            let told = now - samples.since(Seq(last - behind)).unwrap().0;
            assert!(told >= age, "{behind} entries behind: {told} ms instead of {age}");
            assert!(told <= age + age / 4 + 100, "{behind} entries behind: {told} ms instead of {age}");
        }
    }
}
