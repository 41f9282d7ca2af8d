//! The core must compile for wasm32: it is the proof that it has no socket, clock or thread in it.
//!
//! The standard library for wasm32 comes from rustup where that works, else from Debian's own toolchain, which
//! brings the library's source and builds it.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::install;
use crate::process::Run;
use crate::workspace;

const TARGET: &str = "wasm32-unknown-unknown";

pub fn run() -> Result<()> {
    if rustup_has_target() || Command::new("rustup").args(["target", "add", TARGET]).run().is_ok() {
        return build(&mut Command::new("cargo"), "wasm");
    }
    println!("rustup cannot provide {TARGET}; Debian's Rust can");
    with_debian()
}

fn rustup_has_target() -> bool {
    let installed = Command::new("rustup").args(["target", "list", "--installed"]).read();
    installed.is_ok_and(|targets| targets.lines().any(|target| target == TARGET))
}

/// Debian's cargo builds the standard library too. `RUSTC_BOOTSTRAP` lets its stable compiler do so.
fn with_debian() -> Result<()> {
    let (cargo, rustc) = ("/usr/bin/cargo", "/usr/bin/rustc");
    if !Path::new(cargo).exists() || !source_of(rustc).is_some_and(|source| source.exists()) {
        let packages = ["rustc-web", "cargo-web", "rust-web-src", "lld-22"];
        install::debian("a Rust toolchain for wasm32", &packages)?;
    }
    let mut command = Command::new(cargo);
    command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    command.env("RUSTFLAGS", "--cfg getrandom_backend=\"wasm_js\"");
    command.env_remove("RUSTUP_TOOLCHAIN").arg("-Zbuild-std=std,panic_abort");
    build(&mut command, "wasm-debian")
}

/// Where this compiler's standard library would have its source.
fn source_of(rustc: &str) -> Option<std::path::PathBuf> {
    let sysroot = Command::new(rustc).args(["--print", "sysroot"]).read().ok()?;
    Some(Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library"))
}

/// Builds into a folder of its own, since flags and toolchain differ from the workspace's.
fn build(cargo: &mut Command, folder: &str) -> Result<()> {
    let target = workspace::target_directory()?.join(folder);
    cargo
        .args(["build", "--locked", "--package", "isobar-protocol", "--target", TARGET, "--target-dir"])
        .arg(target)
        .run()
}
