//! `cargo xtask demo`: one region on the embedded database, with nothing to configure.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::Run;
use crate::workspace;

/// Build Isobar and run one region on its embedded database.
///
/// Serves on loopback only and keeps its data under ./isobar-data, so that documents are there again after a
/// restart. Runs until Ctrl-C.
#[derive(clap::Args)]
pub struct Arguments {
    /// Passed on to `isobar serve`; see `cargo xtask demo -- --help`.
    #[arg(last = true, value_name = "SERVE OPTIONS")]
    serve: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    println!("Building Isobar (a few minutes the first time) …");
    Command::new("cargo").args(["build", "--release", "--locked", "--package", "isobar"]).run()?;
    let program = workspace::target_directory()?.join("release/isobar");
    println!(
        "\n\
         Starting one Isobar region.\n\
         \x20 clients    any automerge-repo client, by WebSocket, at the address that follows\n\
         \x20 operators  /livez, /readyz and /metrics at the admin address that follows\n\
         \x20 data       {} (delete it to start afresh)\n\
         \x20 stop       Ctrl-C\n",
        workspace::root().join("isobar-data").display(),
    );
    // Becomes the server, so that signals reach it and nothing else.
    let error = Command::new(&program).arg("serve").args(&arguments.serve).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
