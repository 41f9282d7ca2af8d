//! `cargo xtask test`: every check of the project, one step after another, with a summary.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::install::Missing;
use crate::steps::{Outcome, Scene, Step};

/// Run every check: formatting, lints, licences, wasm, Rust and JavaScript tests, fuzzing.
///
/// Installs what the tests need where it can (Debian packages as root, npm packages, Rust targets). A throw-away
/// Postgres is started for the run and removed after it. A step that fails does not keep the others from running;
/// the summary names every one.
///
/// Set ISOBAR_TRACE_DATA to a folder with automerge-paper.json.gz to include the recorded editing trace.
#[derive(clap::Args)]
pub struct Arguments {
    /// Run only these steps (repeatable).
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
    /// Leave these steps out (repeatable).
    #[arg(long, value_name = "STEP")]
    skip: Vec<Step>,
    /// Skip a step, with a clear line, where something it needs can neither be found nor installed.
    #[arg(long)]
    allow_skips: bool,
}

impl Arguments {
    fn chosen(&self) -> Vec<Step> {
        let wanted = |step: &Step| self.only.is_empty() || self.only.contains(step);
        Step::ALL.into_iter().filter(wanted).filter(|step| !self.skip.contains(step)).collect()
    }
}

/// How a step went, and how long it took.
struct Report {
    step: Step,
    result: Result<Outcome>,
    took: Duration,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let mut scene = Scene::default();
    let begun = Instant::now();
    let reports: Vec<Report> = arguments
        .chosen()
        .into_iter()
        .map(|step| carry_out(step, &mut scene, arguments.allow_skips))
        .collect();
    summarise(&reports, begun.elapsed())
}

fn carry_out(step: Step, scene: &mut Scene, allow_skips: bool) -> Report {
    println!("\n=== {}: {}", step.name(), step.purpose());
    let begun = Instant::now();
    let result = step.run(scene).or_else(|error| match error.downcast::<Missing>() {
        Ok(Missing(what)) if allow_skips => Ok(Outcome::Skipped(what)),
        Ok(missing) => Err(missing.into()),
        Err(error) => Err(error),
    });
    let took = begun.elapsed();
    println!("=== {}: {} after {:.1} s", step.name(), word(&result), took.as_secs_f64());
    Report { step, result, took }
}

fn word(result: &Result<Outcome>) -> &'static str {
    match result {
        Ok(Outcome::Passed) => "passed",
        Ok(Outcome::Skipped(_)) => "SKIPPED",
        Err(_) => "FAILED",
    }
}

fn summarise(reports: &[Report], took: Duration) -> Result<()> {
    println!("\n=== summary");
    for Report { step, result, took } in reports {
        print!("{:<9} {:<8} {:>6.1} s", step.name(), word(result), took.as_secs_f64());
        match result {
            Ok(Outcome::Passed) => println!(),
            Ok(Outcome::Skipped(reason)) => println!("  {reason}"),
            Err(error) => println!("  {error:#}"),
        }
    }
    println!("{:<18} {:>6.1} s", "in all", took.as_secs_f64());
    let failed = reports.iter().filter(|report| report.result.is_err()).count();
    if failed > 0 {
        bail!("{failed} of {} steps failed", reports.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_and_skip_choose_steps_in_their_order() {
        let all = Arguments { only: vec![], skip: vec![], allow_skips: false };
        assert_eq!(all.chosen(), Step::ALL);
        let some = Arguments {
            only: vec![Step::Interop, Step::Format],
            skip: vec![Step::Interop],
            allow_skips: false,
        };
        assert_eq!(some.chosen(), [Step::Format]);
    }
}
