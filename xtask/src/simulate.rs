//! `cargo xtask simulate`: many schedules of the simulator, in its release build.

use std::process::Command;

use anyhow::Result;

use crate::process::Run;

/// Run whole clusters of regions in virtual time under faults, a schedule for each seed.
///
/// Prints how far it is and how many schedules it runs a second. The first schedule that violates an invariant ends the
/// run: its seed and the end of its trace are printed, and the command that replays it.
#[derive(clap::Args)]
pub struct Arguments {
    /// How many schedules; a hundred thousand take a minute or two.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    seeds: u64,
    /// The seed of the first schedule; the others follow it.
    #[arg(long, value_name = "S", default_value_t = 0)]
    first_seed: u64,
    /// How many run at once (default: one for each processor).
    #[arg(long, value_name = "T")]
    threads: Option<u64>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let mut command = Command::new("cargo");
    command
        .args(["test", "--release", "--locked", "--package", "isobar-protocol", "--test", "simulation"])
        .args(["--", "--exact", "every_schedule_keeps_every_invariant", "--nocapture"])
        .env("SIMULATION_SEEDS", arguments.seeds.to_string())
        .env("SIMULATION_FIRST", arguments.first_seed.to_string())
        .env_remove("SIMULATION_SEED");
    if let Some(threads) = arguments.threads {
        command.env("SIMULATION_THREADS", threads.to_string());
    }
    command.run()
}
