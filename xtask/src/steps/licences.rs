//! The licences of everything that is built or tested with. `deny.toml` is the only list of what is allowed.
//!
//! `cargo deny` checks the rest of that file, where it is installed. Licences are checked here in any case: of the
//! Rust packages from cargo's metadata, of the JavaScript packages from the lock files. So is that no Rust package
//! comes from elsewhere than crates.io.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process::Run;
use crate::workspace::{self, Package};

/// What cargo calls crates.io, whatever mirror it is fetched from.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct NpmLock {
    packages: BTreeMap<String, NpmPackage>,
}

#[derive(Deserialize)]
struct NpmPackage {
    license: Option<String>,
}

pub fn run() -> Result<()> {
    let allowed = read_allowed()?;
    let mut refused = rust_packages(&allowed)?;
    refused.extend(npm_packages(&allowed)?);
    if !refused.is_empty() {
        bail!("packages that deny.toml does not allow:\n  {}", refused.join("\n  "));
    }
    cargo_deny()
}

fn read_allowed() -> Result<Vec<String>> {
    let text = fs::read_to_string("deny.toml").context("deny.toml")?;
    let deny: Deny = toml::from_str(&text).context("deny.toml")?;
    Ok(deny.licenses.allow)
}

fn rust_packages(allowed: &[String]) -> Result<Vec<String>> {
    let packages = workspace::metadata()?.packages;
    let foreign: Vec<&Package> = packages.iter().filter(|package| package.source.is_some()).collect();
    println!("{} Rust packages", foreign.len());
    let refusals = foreign.into_iter().filter_map(|package| {
        let foreign_source = package.source.as_deref().filter(|source| *source != CRATES_IO);
        let refusal = foreign_source
            .map(|source| format!("comes from {source}"))
            .or_else(|| refusal(package.license.as_deref(), allowed))?;
        Some(format!("{} {}: {refusal}", package.name, package.version))
    });
    Ok(refusals.collect())
}

fn npm_packages(allowed: &[String]) -> Result<Vec<String>> {
    let files = Command::new("git").args(["ls-files", "*package-lock.json"]).read()?;
    let mut refused = Vec::new();
    for file in files.lines() {
        let lock: NpmLock = serde_json::from_str(&fs::read_to_string(file)?).context(file.to_owned())?;
        // The entry without a path is the folder's own package.
        let foreign = lock.packages.iter().filter(|(path, _)| !path.is_empty());
        println!("{} JavaScript packages in {file}", foreign.clone().count());
        refused.extend(foreign.filter_map(|(path, package)| {
            Some(format!("{path} in {file}: {}", refusal(package.license.as_deref(), allowed)?))
        }));
    }
    Ok(refused)
}

/// Why a licence is not acceptable, or `None` if it is.
fn refusal(licence: Option<&str>, allowed: &[String]) -> Option<String> {
    let Some(text) = licence else { return Some("names no licence".to_owned()) };
    let expression = match spdx::Expression::parse_mode(text, spdx::ParseMode::LAX) {
        Ok(expression) => expression,
        Err(error) => return Some(format!("{text} is not a licence expression: {}", error.reason)),
    };
    let acceptable = expression.evaluate(|requirement| allowed.contains(&requirement.to_string()));
    (!acceptable).then(|| text.to_owned())
}

fn cargo_deny() -> Result<()> {
    if !Command::new("cargo").args(["deny", "--version"]).succeeds() {
        println!("cargo-deny is not installed: bans are not checked (cargo install cargo-deny)");
        return Ok(());
    }
    // Advisories would need their database from the network, so they are a command of their own.
    Command::new("cargo").args(["deny", "--offline", "check", "bans", "licenses", "sources"]).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Vec<String> {
        ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).to_vec()
    }

    #[test]
    fn one_allowed_alternative_is_enough() {
        assert_eq!(refusal(Some("GPL-3.0-only OR MIT"), &allowed()), None);
        assert_eq!(refusal(Some("MIT/Apache-2.0"), &allowed()), None);
        assert_eq!(refusal(Some("Apache-2.0 WITH LLVM-exception"), &allowed()), None);
    }

    #[test]
    fn every_part_of_a_conjunction_must_be_allowed() {
        assert_eq!(refusal(Some("MIT AND Apache-2.0"), &allowed()), None);
        assert!(refusal(Some("MIT AND GPL-3.0-only"), &allowed()).is_some());
        assert!(refusal(Some("(MIT OR Apache-2.0) AND Unicode-3.0"), &allowed()).is_some());
    }

    #[test]
    fn a_missing_or_unreadable_licence_is_refused() {
        assert!(refusal(None, &allowed()).is_some());
        assert!(refusal(Some("SEE LICENSE IN FILE"), &allowed()).is_some());
        assert!(refusal(Some("AGPL-3.0-only"), &allowed()).is_some());
        assert!(refusal(Some("Apache-2.0 WITH Classpath-exception-2.0"), &allowed()).is_some());
    }
}
