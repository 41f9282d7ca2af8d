//! The numbers to reach, each a ratio or difference between two servers of the same run.

use std::fmt;

use serde::Serialize;

use crate::report::{DURABLE, FANOUT_100, FANOUT_300, IDLE, JOIN, LARGE};
use crate::results::Results;
use crate::servers::Kind;

/// What became of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Reached,
    NotReached,
    NotMeasured,
}

/// One target, for one of Isobar's databases.
#[derive(Debug, Serialize)]
pub struct Verdict {
    pub target: String,
    pub measured: Option<f64>,
    pub bound: f64,
    pub is_at_least: bool,
    pub outcome: Outcome,
}

impl Verdict {
    fn at_most(target: String, measured: Option<f64>, bound: f64) -> Self {
        Self::new(target, measured, bound, false)
    }

    fn at_least(target: String, measured: Option<f64>, bound: f64) -> Self {
        Self::new(target, measured, bound, true)
    }

    fn new(target: String, measured: Option<f64>, bound: f64, is_at_least: bool) -> Self {
        let outcome = match measured {
            None => Outcome::NotMeasured,
            Some(value) if (is_at_least && value >= bound) || (!is_at_least && value <= bound) => {
                Outcome::Reached
            }
            Some(_) => Outcome::NotReached,
        };
        Self { target, measured, bound, is_at_least, outcome }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            Outcome::Reached => "reached",
            Outcome::NotReached => "NOT REACHED",
            Outcome::NotMeasured => "not measured",
        };
        let relation = if self.is_at_least { "≥" } else { "≤" };
        let measured = self.measured.map(|value| format!("{value:.3}")).unwrap_or_else(|| "-".into());
        write!(f, "{outcome:12} {measured:>9} {relation} {:<6.3} {}", self.bound, self.target)
    }
}

const AUTOMERGE_PEERS: [Kind; 3] = [Kind::SyncServer, Kind::AutomergeRepo, Kind::Samod];

/// Compares the medians with the targets, for each of Isobar's databases that was measured.
pub fn judge(results: &Results) -> Vec<Verdict> {
    let measured = |kind: Kind| results.scenarios.values().any(|servers| servers.contains_key(&kind));
    let mut verdicts = Vec::new();
    for isobar in [Kind::IsobarSqlite, Kind::IsobarPostgres].into_iter().filter(|kind| measured(*kind)) {
        let figures = Figures { results, isobar };
        figures.fan_out(&mut verdicts);
        figures.cold_join(&mut verdicts);
        figures.memory_and_durability(&mut verdicts);
    }
    if measured(Kind::IsobarGathered) {
        for scenario in [FANOUT_100, FANOUT_300] {
            let figures = Figures { results, isobar: Kind::IsobarGathered };
            let ratio = figures.ratio(scenario, "cpu_us", Kind::BareSilent);
            verdicts.push(Verdict::at_most(figures.label(scenario, "CPU / bare, silent"), ratio, 1.2));
        }
    }
    verdicts
}

struct Figures<'r> {
    results: &'r Results,
    isobar: Kind,
}

impl Figures<'_> {
    fn label(&self, scenario: &str, what: &str) -> String {
        format!("{}: {scenario}: {what}", self.isobar.name())
    }

    fn ratio(&self, scenario: &str, figure: &str, other: Kind) -> Option<f64> {
        let ours = self.results.median(scenario, self.isobar, figure)?;
        let theirs = self.results.median(scenario, other, figure)?;
        (theirs > 0.0).then_some(ours / theirs)
    }

    fn fan_out(&self, verdicts: &mut Vec<Verdict>) {
        for scenario in [FANOUT_100, FANOUT_300] {
            let ratio = self.ratio(scenario, "cpu_us", Kind::BareAnswered);
            verdicts.push(Verdict::at_most(self.label(scenario, "CPU / bare, answered"), ratio, 1.2));
        }
        for (scenario, bound) in [(FANOUT_100, 0.1), (LARGE, 0.01)] {
            for peer in AUTOMERGE_PEERS {
                let label = self.label(scenario, &format!("CPU / {}", peer.name()));
                verdicts.push(Verdict::at_most(label, self.ratio(scenario, "cpu_us", peer), bound));
            }
        }
        let p99 = self.ratio(FANOUT_300, "p99_ms", Kind::YSweet);
        verdicts.push(Verdict::at_most(self.label(FANOUT_300, "p99 / y-sweet"), p99, 1.0));
    }

    fn cold_join(&self, verdicts: &mut Vec<Verdict>) {
        let file = self.ratio(JOIN, "cpu_ms", Kind::BareSilent);
        verdicts.push(Verdict::at_most(self.label(JOIN, "CPU / static file"), file, 2.0));
        let yjs = self.ratio(JOIN, "cpu_ms", Kind::YSweet);
        verdicts.push(Verdict::at_most(self.label(JOIN, "CPU / y-sweet"), yjs, 2.0));
        for peer in AUTOMERGE_PEERS {
            let label = self.label(JOIN, &format!("CPU / {}", peer.name()));
            verdicts.push(Verdict::at_most(label, self.ratio(JOIN, "cpu_ms", peer), 0.02));
        }
    }

    fn memory_and_durability(&self, verdicts: &mut Vec<Verdict>) {
        let ours = self.results.median(IDLE, self.isobar, "kib_per_connection");
        let bare = self.results.median(IDLE, Kind::BareAnswered, "kib_per_connection");
        let above = ours.zip(bare).map(|(ours, bare)| ours - bare);
        verdicts.push(Verdict::at_most(self.label(IDLE, "KiB above bare"), above, 16.0));

        let rate = self.results.median(DURABLE, self.isobar, "acknowledged_per_s");
        let inserts = self.results.median(DURABLE, self.isobar, "inserts_per_s");
        let share = rate.zip(inserts).map(|(rate, inserts)| rate / inserts);
        verdicts.push(Verdict::at_least(self.label(DURABLE, "rate / bare inserts"), share, 0.5));
        let lost = self.results.largest(DURABLE, self.isobar, "lost");
        verdicts.push(Verdict::at_most(self.label(DURABLE, "acknowledged changes lost"), lost, 0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sample;

    fn results(figures: &[(&'static str, Kind, &'static str, f64)]) -> Results {
        let mut results = Results::default();
        for (scenario, kind, figure, value) in figures {
            let mut sample = Sample::default();
            sample.set(figure, *value);
            results.add(scenario, *kind, sample);
        }
        results
    }

    fn outcome(verdicts: &[Verdict], part: &str) -> Outcome {
        verdicts.iter().find(|verdict| verdict.target.contains(part)).unwrap().outcome
    }

    #[test]
    fn a_target_is_reached_at_its_bound_and_not_above_it() {
        let at = |ours: f64| {
            results(&[
                (FANOUT_100, Kind::IsobarSqlite, "cpu_us", ours),
                (FANOUT_100, Kind::BareAnswered, "cpu_us", 10.0),
            ])
        };
        assert_eq!(outcome(&judge(&at(12.0)), "100 readers: CPU / bare"), Outcome::Reached);
        assert_eq!(outcome(&judge(&at(12.1)), "100 readers: CPU / bare"), Outcome::NotReached);
        assert_eq!(outcome(&judge(&at(12.0)), "300 readers: CPU / bare"), Outcome::NotMeasured);
    }

    #[test]
    fn one_lost_change_in_any_round_is_one_too_many() {
        let lost = results(&[
            (DURABLE, Kind::IsobarPostgres, "lost", 0.0),
            (DURABLE, Kind::IsobarPostgres, "lost", 0.0),
            (DURABLE, Kind::IsobarPostgres, "lost", 1.0),
        ]);
        assert_eq!(outcome(&judge(&lost), "lost"), Outcome::NotReached);
    }
}
