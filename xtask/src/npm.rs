//! Node and the JavaScript packages that the interop tests are made of.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::install::Missing;
use crate::process::Run;

/// The first version whose test runner can end although a stock client keeps a timer.
const NODE_LEAST: (u32, u32) = (20, 14);

/// Fails with [`Missing`] unless Node is recent enough.
pub fn require_node() -> Result<()> {
    let (major, minor) = NODE_LEAST;
    let wanted = format!("Node {major}.{minor} or newer is needed for the JavaScript interop tests");
    let Ok(version) = Command::new("node").arg("--version").read() else {
        return Err(Missing(format!("{wanted}, and `node` was not found")).into());
    };
    if parse_version(&version).is_none_or(|found| found < NODE_LEAST) {
        return Err(Missing(format!("{wanted}, found {}", version.trim())).into());
    }
    if !Command::new("npm").arg("--version").succeeds() {
        return Err(
            Missing("npm is needed for the JavaScript interop tests and was not found".to_owned()).into()
        );
    }
    Ok(())
}

/// Installs exactly the packages of `folder`'s lock file, unless they are there.
pub fn install(folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let locked = changed(&folder.join("package-lock.json")).context("the lock file is missing")?;
    if changed(&folder.join("node_modules/.package-lock.json")).is_some_and(|installed| installed >= locked) {
        return Ok(());
    }
    Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(folder).run()
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

/// Reads `v20.14.1` as (20, 14).
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix('v')?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_versions_are_read_and_compared_by_number() {
        assert_eq!(parse_version("v20.14.0\n"), Some((20, 14)));
        assert!(parse_version("v9.99.0").unwrap() < NODE_LEAST);
        assert!(parse_version("v22.0.0").unwrap() > NODE_LEAST);
        assert_eq!(parse_version("20.14.0"), None);
        assert_eq!(parse_version("v20"), None);
    }
}
