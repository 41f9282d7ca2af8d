//! Runs the same load side by side against Isobar, its peers and a bare broadcast server.

mod bare;
mod client;
mod database;
mod frames;
mod peers;
mod plan;
mod process;
mod regions;
mod report;
mod results;
mod scenario;
mod servers;
mod session;
mod targets;
mod trace;
mod workload;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::scenario::Name;
use crate::servers::Kind;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs the same load, side by side, against Isobar on SQLite and on Postgres, the Automerge sync servers that npm
/// and crates.io offer, y-sweet, and a bare WebSocket broadcast server, which is the floor.
///
/// Each server runs in a process of its own on loopback; one load generator drives all of them, and reads their CPU
/// and memory from the kernel. Rounds are interleaved across servers and medians reported. Ratios are the figures
/// that count: they are compared with the numbers that Isobar means to reach.
///
/// Peers are installed on demand below target/bench-peers, from npm and crates.io. One that cannot be installed is
/// reported and left out.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  cargo run --release -p isobar-bench -- --quick
  cargo run --release -p isobar-bench -- --data ../shared/data
  cargo run --release -p isobar-bench -- --scenario fanout --server isobar-sqlite,bare-answered,y-sweet --rounds 5")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Subcommands>,

    /// Small sizes and one round: some three minutes instead of half an hour. Leaves the scenarios on the large document
    /// out unless they are named.
    #[arg(long)]
    quick: bool,

    /// What to run; everything by default.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    scenario: Vec<Name>,

    /// Whom to measure; everybody by default. Ratios need the servers they compare.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    server: Vec<Kind>,

    /// How many times each scenario runs on each server.
    #[arg(long)]
    rounds: Option<u32>,

    /// A directory with automerge-paper.json.gz, the editing trace of 259,778 edits. Without it, the scenarios on
    /// the large document are skipped.
    #[arg(long, env = "ISOBAR_TRACE_DATA", value_name = "DIR")]
    data: Option<PathBuf>,

    /// A built isobar to measure; by default it is built in release mode.
    #[arg(long, value_name = "PATH")]
    isobar: Option<PathBuf>,

    /// Leaves out peers that are not installed, instead of installing them.
    #[arg(long)]
    no_install: bool,

    /// Where the JSON goes.
    #[arg(long, default_value = "bench-results", value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    Regions(regions::Arguments),
    /// The bare broadcast server, which the benchmark starts for itself.
    #[command(hide = true)]
    Bare {
        #[arg(long)]
        file: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        match &arguments.command {
            Some(Subcommands::Bare { file }) => return bare::serve(file.clone()).await,
            Some(Subcommands::Regions(arguments)) => return regions::run(arguments).await,
            None => {}
        }
        let mut terminate = signal(SignalKind::terminate())?;
        // Whichever way this ends, dropping the run ends the servers.
        tokio::select! {
            outcome = plan::run(arguments.into()) => outcome,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the servers were ended"),
            _ = terminate.recv() => bail!("terminated; the servers were ended"),
        }
    })
}

impl From<Arguments> for plan::Options {
    fn from(arguments: Arguments) -> Self {
        let all = |chosen: Vec<Kind>| if chosen.is_empty() { Kind::ALL.to_vec() } else { chosen };
        let is_quick = arguments.quick;
        let by_default = Name::ALL.into_iter().filter(|name| !is_quick || !name.needs_trace());
        let chosen = arguments.scenario;
        Self {
            is_quick,
            scenarios: if chosen.is_empty() { by_default.collect() } else { chosen },
            servers: all(arguments.server),
            rounds: arguments.rounds,
            data: arguments.data,
            isobar: arguments.isobar,
            may_install: !arguments.no_install,
            out: arguments.out,
        }
    }
}
