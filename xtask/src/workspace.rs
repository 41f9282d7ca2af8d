//! Where things are in this workspace, and what it is made of.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::process::Run;

/// The JavaScript tests, relative to the workspace.
pub const INTEROP: &str = "server/tests/interop";

/// What `cargo metadata` says, as far as it is needed here.
#[derive(Deserialize)]
pub struct Metadata {
    pub packages: Vec<Package>,
    pub target_directory: PathBuf,
}

#[derive(Deserialize)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// An SPDX expression; absent where the package names a licence file instead.
    pub license: Option<String>,
    /// Absent for the packages of this workspace.
    pub source: Option<String>,
    pub targets: Vec<Target>,
}

/// What cargo builds of a package.
#[derive(Deserialize)]
pub struct Target {
    pub name: String,
    pub kind: Vec<String>,
}

/// The folder of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask stands in the workspace").to_owned()
}

/// The workspace with every package it depends on, on any platform.
pub fn metadata() -> Result<Metadata> {
    read_metadata(&[])
}

/// Where cargo puts what it builds.
pub fn target_directory() -> Result<PathBuf> {
    Ok(read_metadata(&["--no-deps"])?.target_directory)
}

/// The package in a folder of its own, outside of this workspace.
pub fn package_in(folder: &str) -> Result<Package> {
    let manifest = format!("{folder}/Cargo.toml");
    let packages = read_metadata(&["--no-deps", "--manifest-path", &manifest])?.packages;
    packages.into_iter().next().with_context(|| format!("{manifest} describes no package"))
}

/// The platform that this compiler builds for unless told otherwise.
pub fn host() -> Result<String> {
    let version = Command::new("rustc").arg("-vV").read()?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

fn read_metadata(arguments: &[&str]) -> Result<Metadata> {
    let text = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(arguments)
        .read()?;
    serde_json::from_str(&text).context("cargo metadata printed something else than metadata")
}
