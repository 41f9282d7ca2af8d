//! `cargo xtask fuzz`: untrusted bytes for every decoder. `protocol/fuzz/README.md` says what each target asserts.
//!
//! The targets are built for libFuzzer with the stable compiler; cargo-fuzz is not needed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::install;
use crate::process::Run;
use crate::workspace;

const FOLDER: &str = "protocol/fuzz";

/// Makes the compiler count edges and report comparisons, as libFuzzer wants it.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// How long each target runs within `cargo xtask test`.
const BRIEF_SECONDS: u32 = 10;

/// Two at a time, since that is how many cores the smallest machine for this has.
const AT_ONCE: usize = 2;

/// Longer inputs find nothing that shorter ones do not, and take longer.
const INPUT_BYTES_MAX: u32 = 8_192;

/// An input that takes longer than this is a finding.
const INPUT_SECONDS_MAX: u32 = 20;

/// Lines of a failed target's output to show.
const FAILURE_LINES: usize = 40;

/// Feed the decoders with untrusted bytes and see that no assertion fails.
///
/// New inputs are kept in protocol/fuzz/corpus and found again by the next run; one that fails an assertion is
/// written to protocol/fuzz/artifacts.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only these targets (default: all of them).
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each target runs.
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u32,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let known = targets()?;
    let chosen = match &arguments.targets[..] {
        [] => known,
        chosen => {
            if let Some(unknown) = chosen.iter().find(|target| !known.contains(target)) {
                bail!("there is no fuzz target {unknown}; there are {}", known.join(", "));
            }
            chosen.to_vec()
        }
    };
    fuzz(&chosen, arguments.seconds)
}

/// Every target for a moment.
pub fn briefly() -> Result<()> {
    fuzz(&targets()?, BRIEF_SECONDS)
}

fn fuzz(targets: &[String], seconds: u32) -> Result<()> {
    let programs = build()?;
    let waiting = Mutex::new(targets.iter());
    let failed = Mutex::new(Vec::new());
    let work = || {
        while let Some(target) = next(&waiting) {
            if let Err(error) = fuzz_one(&programs, target, seconds) {
                failed.lock().expect("no thread panics").push(format!("{target}: {error:#}"));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().expect("no thread panics");
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// The next target that no thread has taken yet.
fn next<'a>(waiting: &Mutex<std::slice::Iter<'a, String>>) -> Option<&'a String> {
    waiting.lock().expect("no thread panics").next()
}

/// The names of the targets, from the package itself.
fn targets() -> Result<Vec<String>> {
    let package = workspace::package_in(FOLDER)?;
    let programs = package.targets.into_iter().filter(|target| target.kind.iter().any(|kind| kind == "bin"));
    Ok(programs.map(|target| target.name).collect())
}

/// Builds every target and returns the folder of the programs.
fn build() -> Result<PathBuf> {
    if !Command::new("c++").arg("--version").succeeds() {
        install::debian("a C++ compiler for libFuzzer", &["g++"])?;
    }
    let host = workspace::host()?;
    // The explicit target keeps the flags away from build scripts.
    Command::new("cargo")
        .args(["build", "--release", "--locked", "--target", &host])
        .args(["--manifest-path", &format!("{FOLDER}/Cargo.toml")])
        .args(["--target-dir", &format!("{FOLDER}/target")])
        .env("RUSTFLAGS", FLAGS)
        .run()?;
    Ok(Path::new(FOLDER).join("target").join(host).join("release"))
}

fn fuzz_one(programs: &Path, target: &str, seconds: u32) -> Result<()> {
    let folder = Path::new(FOLDER);
    let (corpus, artifacts) = (folder.join("corpus").join(target), folder.join("artifacts").join(target));
    for folder in [&corpus, &artifacts] {
        std::fs::create_dir_all(folder)?;
    }
    let Output { status, stderr, .. } = Command::new(programs.join(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([corpus, folder.join("seeds").join(target)])
        .output()
        .with_context(|| format!("cannot run the fuzz target {target}"))?;
    let report = String::from_utf8_lossy(&stderr);
    if !status.success() {
        let lines: Vec<&str> = report.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(FAILURE_LINES)..].join("\n"));
        bail!("failed; the input is in {}", artifacts.display());
    }
    println!("{target:<16} {}", report.lines().last().unwrap_or_default());
    Ok(())
}
