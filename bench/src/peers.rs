//! Gets the programs that are not Isobar: from npm and crates.io, through their ordinary clients, once.
//!
//! What is installed lies in `target/bench-peers/`. A peer that cannot be had is reported and left out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::servers::Kind;

/// Where the peers' sources lie: this package's `peers` directory.
pub fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")
}

/// Builds Isobar itself, in the same profile and directory as this program, and returns its path.
pub fn build_isobar(target: &Path) -> Result<PathBuf> {
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--quiet", "--package", "isobar", "--manifest-path"]);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).arg("--target-dir").arg(target);
    run(command, "building isobar")?;
    Ok(target.join("release/isobar"))
}

/// Installs what a server needs below `peers`, unless it is there.
pub fn ensure_installed(kind: Kind, peers: &Path, may_install: bool) -> Result<()> {
    match kind {
        Kind::SyncServer => {
            let directory = peers.join("sync-server");
            let package = "@automerge/automerge-repo-sync-server";
            npm(&directory, package, "0.2.8", may_install, |_| {
                let manifest = format!("{{\"private\":true,\"dependencies\":{{\"{package}\":\"0.2.8\"}}}}\n");
                Ok(fs::write(directory.join("package.json"), manifest)?)
            })
        }
        Kind::AutomergeRepo => {
            let directory = peers.join("automerge-repo");
            npm(&directory, "@automerge/automerge-repo", "2.5.6", may_install, |from| {
                fs::copy(from.join("automerge-repo/package.json"), directory.join("package.json"))?;
                Ok(())
            })?;
            fs::copy(source().join("automerge-repo/server.mjs"), directory.join("server.mjs"))?;
            Ok(())
        }
        Kind::Samod => {
            let built = peers.join("samod-build/release/samod-server");
            let mut command = Command::new("cargo");
            command.args(["build", "--release", "--locked", "--manifest-path"]);
            command.arg(source().join("samod-server/Cargo.toml"));
            command.arg("--target-dir").arg(peers.join("samod-build"));
            cargo(&built, command, "samod-server", may_install)
        }
        Kind::YSweet => {
            let built = peers.join("y-sweet/bin/y-sweet");
            let mut command = Command::new("cargo");
            command.args(["install", "y-sweet", "--version", "0.9.1", "--locked", "--root"]);
            command.arg(peers.join("y-sweet")).arg("--target-dir").arg(peers.join("y-sweet-build"));
            cargo(&built, command, "y-sweet", may_install)
        }
        _ => Ok(()),
    }
}

fn npm(
    directory: &Path,
    package: &str,
    version: &str,
    may_install: bool,
    write_manifest: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let installed = directory.join("node_modules").join(package).join("package.json");
    let is_current = |manifest: String| manifest.contains(&format!("\"version\": \"{version}\""));
    if fs::read_to_string(&installed).is_ok_and(is_current) {
        return Ok(());
    }
    ensure!(may_install, "not installed, and --no-install was given");
    eprintln!("installing {package} {version} from npm");
    fs::create_dir_all(directory)?;
    write_manifest(&source())?;
    let mut command = Command::new("npm");
    command.args(["install", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(directory);
    run(command, package)
}

fn cargo(built: &Path, command: Command, name: &str, may_install: bool) -> Result<()> {
    if built.exists() {
        return Ok(());
    }
    ensure!(may_install, "not installed, and --no-install was given");
    eprintln!("building {name} from crates.io, which takes some minutes");
    run(command, name)
}

fn run(mut command: Command, what: &str) -> Result<()> {
    let output =
        command.output().with_context(|| format!("{what}: {:?} did not start", command.get_program()))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = errors.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
    bail!("{what} failed ({}): {}", output.status, last.into_iter().rev().collect::<Vec<_>>().join(" | "));
}
