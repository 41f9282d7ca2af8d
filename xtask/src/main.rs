//! What the README's commands call: building, running, testing and measuring Isobar.

mod bench;
mod campaign;
mod demo;
mod fuzz;
mod install;
mod npm;
mod postgres;
mod process;
mod simulate;
mod steps;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, runs, tests and measures Isobar.
///
/// Start with `cargo xtask demo` to see it run and `cargo xtask test` to see that it works. Both install what they
/// need, need no configuration, and say what they do.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Arguments),
    Test(test::Arguments),
    Fuzz(fuzz::Arguments),
    Bench(bench::Arguments),
    Simulate(simulate::Arguments),
    Campaign(campaign::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    // Every path below is relative to the workspace, wherever the command was given.
    std::env::set_current_dir(workspace::root())?;
    match arguments.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Simulate(arguments) => simulate::run(&arguments),
        Command::Campaign(arguments) => campaign::run(&arguments),
    }
}
