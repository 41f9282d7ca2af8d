//! The unmodified JavaScript client against one running region, and against two that are linked.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::install;
use crate::npm;
use crate::postgres::SharedPostgres;
use crate::process::Run;
use crate::workspace::{self, INTEROP};

/// Tests that make sense across regions only.
const ACROSS_REGIONS: &str = "regions.test.mjs";

pub fn run(postgres: &mut SharedPostgres) -> Result<()> {
    npm::require_node()?;
    npm::install(INTEROP)?;
    if !Command::new("psql").arg("--version").succeeds() {
        install::debian("psql", &["postgresql-client"])?;
    }
    // The very build of the Rust tests: another selection of packages would choose other features and build it all
    // again.
    Command::new("cargo").args(["test", "--quiet", "--locked", "--workspace", "--no-run"]).run()?;
    for regions in [1, 2] {
        println!("\ninterop: {regions} region(s), each test on SQLite and on Postgres");
        test(regions, postgres)?;
    }
    Ok(())
}

/// Runs the test files with each test's clients spread over this many regions.
fn test(regions: usize, postgres: &mut SharedPostgres) -> Result<()> {
    let mut files = test_files()?;
    // These start the regions they need by themselves, so once is enough.
    files.retain(|file| regions > 1 || file != ACROSS_REGIONS);
    Command::new("node")
        // A stock client that was closed while it was offline keeps a timer, which must not hold up the run.
        .args(["--test", "--test-force-exit", "--test-concurrency=2", "--test-reporter=spec"])
        .args(files)
        .current_dir(INTEROP)
        .env("ISOBAR_BINARY", workspace::target_directory()?.join("debug/isobar"))
        .env("ISOBAR_TEST_REGIONS", regions.to_string())
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
