//! The Rust tests of every crate, and the recorded trace among them that runs by itself.

use std::env;
use std::process::Command;

use anyhow::{Result, bail};

use crate::npm;
use crate::postgres::SharedPostgres;
use crate::process::Run;
use crate::steps::Outcome;
use crate::workspace::INTEROP;

/// Names the folder that holds the recorded editing traces.
const TRACE_DATA: &str = "ISOBAR_TRACE_DATA";

/// Every test of the workspace but the trace, which has a step of its own.
pub fn run(postgres: &mut SharedPostgres) -> Result<()> {
    // One test has a JavaScript client as its partner. The interop step insists on Node, this one does not.
    match npm::require_node() {
        Ok(()) => npm::install(INTEROP)?,
        Err(missing) => println!("left out: the test of a Rust beside a JavaScript client ({missing})"),
    }
    let mut command = if nextest_is_there() {
        let mut command = Command::new("cargo");
        command.args(["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]);
        command
    } else {
        println!("cargo-nextest is not installed: cargo test does the same, one crate after another");
        let mut command = Command::new("cargo");
        command.args(["test", "--locked", "--workspace", "--no-fail-fast"]);
        command
    };
    command.envs(postgres.environment()?).env_remove(TRACE_DATA).run()
}

/// The recorded editing session, alone on the machine since it measures, too.
pub fn trace(postgres: &mut SharedPostgres) -> Result<Outcome> {
    let Some(folder) = env::var_os(TRACE_DATA) else {
        return Ok(Outcome::Skipped(format!("{TRACE_DATA} does not name a folder with the traces")));
    };
    // Tests run in their crate's folder, so a relative path must be made absolute here.
    let Ok(folder) = std::path::absolute(&folder).and_then(|path| path.canonicalize()) else {
        bail!("{TRACE_DATA} names {}, which does not exist", folder.display());
    };
    Command::new("cargo")
        .args(["test", "--locked", "--workspace", "--test", "clients"])
        .args(["--", "trace::", "--nocapture", "--test-threads", "1"])
        .envs(postgres.environment()?)
        .env(TRACE_DATA, folder)
        .run()?;
    Ok(Outcome::Passed)
}

fn nextest_is_there() -> bool {
    Command::new("cargo").args(["nextest", "--version"]).succeeds()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the tests plant in the core may be in no server, whatever else is built beside it.
    #[test]
    fn nothing_that_is_planted_is_in_the_server() {
        let features = |edges: &str| {
            Command::new("cargo")
                .args(["tree", "--locked", "--package", "isobar", "--package", "isobar-bench"])
                .args(["--edges", edges, "--format", "{p} [{f}]", "--prefix", "none"])
                .read()
                .expect("cargo tree lists the packages")
        };
        let core = |tree: &str| -> Vec<String> {
            let lines = tree.lines().filter(|line| line.starts_with("isobar-protocol "));
            lines.map(str::to_owned).collect()
        };
        let built = core(&features("normal,build"));
        assert!(!built.is_empty(), "the server is built on the core");
        assert!(built.iter().all(|line| !line.contains("planted")), "{built:?}");
    }
}
