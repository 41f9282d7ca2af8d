//! `cargo xtask bench`: the side-by-side load, in its release build.

use std::process::Command;

use anyhow::Result;

use crate::process::Run;

/// Measure Isobar beside its peers and a bare broadcast server.
///
/// Everything after `bench` goes to the benchmark: `cargo xtask bench --help` is its help.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "BENCHMARK OPTIONS")]
    benchmark: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    Command::new("cargo")
        .args(["run", "--release", "--locked", "--package", "isobar-bench", "--"])
        .args(&arguments.benchmark)
        .run()
}
