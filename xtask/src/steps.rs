//! The steps of `cargo xtask test`, in the order in which they find trouble cheapest.

mod interop;
mod licences;
mod rust;
mod wasm;

use std::process::Command;

use anyhow::Result;

use crate::fuzz;
use crate::postgres::SharedPostgres;
use crate::process::Run;

/// How a step went, if it did not fail.
pub enum Outcome {
    Passed,
    /// Not carried out, and why.
    Skipped(String),
}

/// What steps share.
#[derive(Default)]
pub struct Scene {
    pub postgres: SharedPostgres,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    Format,
    Licences,
    Lints,
    Wasm,
    Rust,
    Interop,
    Trace,
    Fuzz,
}

impl Step {
    pub const ALL: [Self; 8] = [
        Self::Format,
        Self::Licences,
        Self::Lints,
        Self::Wasm,
        Self::Rust,
        Self::Interop,
        Self::Trace,
        Self::Fuzz,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Licences => "licences",
            Self::Lints => "lints",
            Self::Wasm => "wasm",
            Self::Rust => "rust",
            Self::Interop => "interop",
            Self::Trace => "trace",
            Self::Fuzz => "fuzz",
        }
    }

    pub fn purpose(self) -> &'static str {
        match self {
            Self::Format => "every crate is formatted",
            Self::Licences => "every dependency's licence, source and version is allowed by deny.toml",
            Self::Lints => "no warning in any target of any crate",
            Self::Wasm => "the core compiles for the browser",
            Self::Rust => "the tests of every crate, on SQLite and on Postgres",
            Self::Interop => "unmodified JavaScript clients sync through a running region",
            Self::Trace => "a recorded editing session of 259,778 edits survives byte for byte",
            Self::Fuzz => "no decoder panics on untrusted bytes, for a minute",
        }
    }

    pub fn run(self, scene: &mut Scene) -> Result<Outcome> {
        match self {
            Self::Format => passed(format()),
            Self::Licences => passed(licences::run()),
            Self::Lints => passed(lints()),
            Self::Wasm => passed(wasm::run()),
            Self::Rust => passed(rust::run(&mut scene.postgres)),
            Self::Interop => passed(interop::run(&mut scene.postgres)),
            Self::Trace => rust::trace(&mut scene.postgres),
            Self::Fuzz => passed(fuzz::briefly()),
        }
    }
}

/// Packages outside the workspace, which have lock files of their own.
const OUTSIDE: [&str; 2] = ["protocol/fuzz/Cargo.toml", "bench/peers/samod-server/Cargo.toml"];

fn format() -> Result<()> {
    Command::new("cargo").args(["fmt", "--all", "--check"]).run()?;
    OUTSIDE.iter().try_for_each(|manifest| {
        Command::new("cargo").args(["fmt", "--check", "--manifest-path", manifest]).run()
    })
}

fn passed(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Passed)
}

fn lints() -> Result<()> {
    Command::new("cargo")
        .args(["clippy", "--locked", "--workspace", "--all-targets", "--keep-going"])
        .args(["--", "--deny", "warnings"])
        .run()
}
