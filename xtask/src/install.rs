//! Installing Debian packages, where that is possible, and saying clearly what is missing where it is not.

use std::process::Command;
use std::sync::OnceLock;

use anyhow::Result;

use crate::process::Run;

/// Something that a step needs is not on this machine and could not be installed. `--allow-skips` turns it into
/// a skipped step.
#[derive(Debug)]
pub struct Missing(pub String);

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// Installs Debian packages.
///
/// # Errors
/// [`Missing`] with `purpose` and the packages' names where this is not Debian, not root, or the packages cannot
/// be had.
pub fn debian(purpose: &str, packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if !is_root() || !Command::new("apt-get").arg("--version").succeeds() {
        return Err(Missing(format!(
            "{purpose} is missing: install it (on Debian: apt-get install {names})"
        ))
        .into());
    }
    println!("installing {purpose}");
    update_lists();
    apt_get(&["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages)
        .run()
        .map_err(|error| Missing(format!("{purpose} could not be installed: {error:#}")).into())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").read().is_ok_and(|id| id.trim() == "0")
}

/// Refreshes the package lists once per run. A failure shows in the installation that follows, if it matters.
fn update_lists() {
    static UPDATED: OnceLock<bool> = OnceLock::new();
    UPDATED.get_or_init(|| apt_get(&["update", "--quiet"]).run().is_ok());
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
    command
}
