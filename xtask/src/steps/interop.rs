//! The unmodified JavaScript client against a running region.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::install;
use crate::npm;
use crate::postgres::SharedPostgres;
use crate::process::Run;
use crate::workspace::{self, INTEROP};

pub fn run(postgres: &mut SharedPostgres) -> Result<()> {
    npm::require_node()?;
    npm::install(INTEROP)?;
    if !Command::new("psql").arg("--version").succeeds() {
        install::debian("psql", &["postgresql-client"])?;
    }
    // The very build of the Rust tests: another selection of packages would choose other features and build it all
    // again.
    Command::new("cargo").args(["test", "--quiet", "--locked", "--workspace", "--no-run"]).run()?;
    Command::new("node")
        // A stock client that was closed while it was offline keeps a timer, which must not hold up the run.
        .args(["--test", "--test-force-exit", "--test-reporter=spec"])
        .args(test_files()?)
        .current_dir(INTEROP)
        .env("ISOBAR_BINARY", workspace::target_directory()?.join("debug/isobar"))
        .envs(postgres.environment()?)
        .run()
}

/// The test files by name, since older versions of the runner know no patterns.
fn test_files() -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(INTEROP)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".test.mjs") {
            files.push(name);
        }
    }
    files.sort();
    Ok(files)
}
