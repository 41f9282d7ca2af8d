//! What was measured: samples by scenario, server and round.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::servers::Kind;

/// One scenario on one server in one round: figures by name, or why there are none.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Sample {
    pub figures: BTreeMap<&'static str, f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// What a reader of the figures should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Sample {
    pub fn failed(reason: String) -> Self {
        Self { failure: Some(reason), ..Self::default() }
    }

    pub fn set(&mut self, name: &'static str, value: f64) {
        self.figures.insert(name, value);
    }
}

/// All samples of a run.
#[derive(Debug, Default, Serialize)]
pub struct Results {
    pub scenarios: BTreeMap<&'static str, BTreeMap<Kind, Vec<Sample>>>,
    /// Scenarios and servers that were left out, and why.
    pub skipped: BTreeMap<String, String>,
}

impl Results {
    pub fn add(&mut self, scenario: &'static str, kind: Kind, sample: Sample) {
        self.scenarios.entry(scenario).or_default().entry(kind).or_default().push(sample);
    }

    /// The median of a figure over the rounds that have it.
    pub fn median(&self, scenario: &str, kind: Kind, figure: &str) -> Option<f64> {
        let samples = self.scenarios.get(scenario)?.get(&kind)?;
        median(samples.iter().filter_map(|sample| sample.figures.get(figure).copied()).collect())
    }

    /// The largest value of a figure in any round.
    pub fn largest(&self, scenario: &str, kind: Kind, figure: &str) -> Option<f64> {
        let samples = self.scenarios.get(scenario)?.get(&kind)?;
        samples.iter().filter_map(|sample| sample.figures.get(figure).copied()).max_by(f64::total_cmp)
    }

    /// The most rounds that any server had.
    pub fn rounds(&self) -> usize {
        self.scenarios.values().flat_map(|servers| servers.values().map(Vec::len)).max().unwrap_or(0)
    }

    /// The first failure of a server in a scenario.
    pub fn failure(&self, scenario: &str, kind: Kind) -> Option<&str> {
        let samples = self.scenarios.get(scenario)?.get(&kind)?;
        samples.iter().find_map(|sample| sample.failure.as_deref())
    }

    /// Distinct notes of a server in a scenario.
    pub fn notes(&self, scenario: &str, kind: Kind) -> Vec<&str> {
        let samples = self.scenarios.get(scenario).and_then(|servers| servers.get(&kind));
        let mut notes: Vec<&str> =
            samples.into_iter().flatten().flat_map(|s| &s.notes).map(|n| &**n).collect();
        notes.sort_unstable();
        notes.dedup();
        notes
    }
}

/// The median; of an even number, the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[length / 2]),
        length => Some((values[length / 2 - 1] + values[length / 2]) / 2.0),
    }
}

/// The value below which `percent` of the values lie, in milliseconds; sorts the microseconds it is given.
pub fn percentile_ms(latencies_us: &mut [u32], percent: f64) -> Option<f64> {
    latencies_us.sort_unstable();
    let last = latencies_us.len().checked_sub(1)?;
    let at = (last as f64 * percent / 100.0).round() as usize;
    Some(f64::from(latencies_us[at]) / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_take_the_middle_and_the_tail() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
        let mut latencies: Vec<u32> = (0..=100).rev().map(|ms| ms * 1000).collect();
        assert_eq!(percentile_ms(&mut latencies, 99.0), Some(99.0));
        assert_eq!(percentile_ms(&mut [], 99.0), None);
    }

    #[test]
    fn a_failed_round_does_not_enter_the_median() {
        let mut results = Results::default();
        for value in [1.0, 9.0] {
            let mut sample = Sample::default();
            sample.set("cpu", value);
            results.add("fan-out", Kind::Samod, sample);
        }
        results.add("fan-out", Kind::Samod, Sample::failed("died".into()));
        assert_eq!(results.median("fan-out", Kind::Samod, "cpu"), Some(5.0));
        assert_eq!(results.failure("fan-out", Kind::Samod), Some("died"));
        assert_eq!(results.median("fan-out", Kind::YSweet, "cpu"), None);
    }
}
