//! `cargo xtask demo`: three regions in one process, with nothing to configure.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::Run;
use crate::workspace;

/// Build Isobar and run three regions with simulated distance between them.
///
/// Serves on loopback only and keeps its data under ./isobar-demo-data, so that documents are there again after a
/// restart. Runs until Ctrl-C.
#[derive(clap::Args)]
pub struct Arguments {
    /// Passed on to `isobar demo`; see `cargo xtask demo -- --help`.
    #[arg(last = true, value_name = "DEMO OPTIONS")]
    demo: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    println!("Building Isobar (a few minutes the first time) …");
    Command::new("cargo").args(["build", "--release", "--locked", "--package", "isobar"]).run()?;
    let program = workspace::target_directory()?.join("release/isobar");
    println!(
        "\n\
         Starting three Isobar regions; any automerge-repo client can connect to each, by WebSocket.\n\
         Each answers operators with /livez, /readyz and /metrics. Delete the data to start afresh.\n"
    );
    // Becomes the server, so that signals reach it and nothing else.
    let error = Command::new(&program).arg("demo").args(&arguments.demo).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
