//! The scenarios, their sizes, and the order in which they run.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use tokio::sync::watch;

use crate::client::{Crowd, Observation};
use crate::process;
use crate::results::{Sample, percentile_ms};
use crate::servers::{Kind, Server};

pub mod durable;
pub mod fanout;
pub mod idle;
pub mod join;
pub mod many;

/// A scenario, as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    /// One writer, many readers, a small document.
    Fanout,
    /// The same on the 260,000-edit document (needs the trace).
    Large,
    /// Many documents with a few clients each, who all edit.
    Many,
    /// A client that knows nothing fetches the 260,000-edit document (needs the trace).
    Join,
    /// Connections that do nothing.
    Idle,
    /// Writes as fast as they are acknowledged, then kill -9.
    Durable,
}

impl Name {
    pub const ALL: [Self; 6] = [Self::Fanout, Self::Large, Self::Many, Self::Join, Self::Idle, Self::Durable];

    /// Whether a scenario tells anything about a server that another one of the same run does not.
    pub fn concerns(self, kind: Kind) -> bool {
        match self {
            Self::Fanout => true,
            Self::Durable => kind != Kind::IsobarGathered && !kind.is_bare(),
            Self::Large | Self::Many | Self::Join | Self::Idle => kind != Kind::IsobarGathered,
        }
    }

    pub fn is_slow(self) -> bool {
        self.needs_trace() || self == Self::Many
    }

    pub fn needs_trace(self) -> bool {
        matches!(self, Self::Large | Self::Join)
    }
}

/// How much of everything.
#[derive(Debug, Clone, Serialize)]
pub struct Sizes {
    pub rounds: u32,
    /// For the scenarios that take minutes: many documents, and those on the large document.
    pub slow_rounds: u32,
    pub fanout_readers: Vec<u32>,
    pub fanout_seconds: u32,
    pub large_readers: u32,
    pub large_seconds: u32,
    pub many_documents: u32,
    pub many_clients: u32,
    pub many_seconds: u32,
    pub joins: u32,
    pub idle_connections: u32,
    pub idle_documents: u32,
    pub idle_seconds: u32,
    pub durable_clients: u32,
    pub durable_window: u32,
    pub durable_seconds: u32,
}

impl Sizes {
    /// Under three minutes for all servers.
    pub fn quick() -> Self {
        Self {
            rounds: 1,
            slow_rounds: 1,
            fanout_readers: vec![100],
            fanout_seconds: 3,
            large_readers: 5,
            large_seconds: 2,
            many_documents: 50,
            many_clients: 5,
            many_seconds: 3,
            joins: 10,
            idle_connections: 1000,
            idle_documents: 100,
            idle_seconds: 1,
            durable_clients: 50,
            durable_window: 32,
            durable_seconds: 2,
        }
    }

    /// About half an hour for all servers.
    pub fn full() -> Self {
        Self {
            rounds: 3,
            slow_rounds: 1,
            fanout_readers: vec![100, 300],
            fanout_seconds: 8,
            large_readers: 20,
            large_seconds: 3,
            many_documents: 200,
            many_clients: 5,
            many_seconds: 8,
            joins: 50,
            idle_connections: 2000,
            idle_documents: 100,
            idle_seconds: 3,
            durable_clients: 50,
            durable_window: 64,
            durable_seconds: 4,
        }
    }
}

/// CPU of server, database and generator at one moment.
struct CpuMark {
    server: Duration,
    database: Duration,
    generator: Duration,
}

impl CpuMark {
    fn now(server: &Server<'_>) -> Self {
        let generator = process::cpu_time_of_this();
        Self { server: server.cpu(), database: server.database_cpu(), generator }
    }

    /// Adds what was used since, per `count` of something, in microseconds.
    fn per(&self, earlier: &Self, count: u64, sample: &mut Sample) {
        if count == 0 {
            return;
        }
        let per = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64() * 1e6 / count as f64;
        sample.set("cpu_us", per(self.server, earlier.server));
        sample.set("generator_cpu_us", per(self.generator, earlier.generator));
        if self.database > Duration::ZERO {
            sample.set("database_cpu_us", per(self.database, earlier.database));
        }
    }
}

/// Starts the crowds' clock, waits until `complete` says that everything has arrived or `patience` is over, and
/// returns the CPU used between.
async fn run_clock(
    server: &Server<'_>,
    clock: &watch::Sender<Option<std::time::Instant>>,
    crowd: &Crowd,
    patience: Duration,
) -> (CpuMark, CpuMark) {
    server.settle(Duration::from_millis(300), Duration::from_secs(20)).await;
    let before = CpuMark::now(server);
    clock.send_replace(Some(std::time::Instant::now() + Duration::from_millis(20)));
    crowd.progress.wait_complete(crowd.size, patience).await;
    (before, CpuMark::now(server))
}

/// Writes what a crowd saw into a sample: latencies, bytes, and how many have everything.
fn observe(observations: Vec<Observation>, expected: u32, sample: &mut Sample) -> u64 {
    let mut latencies = Vec::new();
    let (mut delivered, mut complete) = (0, 0);
    let mut traffic = crate::client::Traffic::default();
    let mut failures = Vec::new();
    for seen in observations {
        latencies.extend(seen.latencies_us);
        delivered += seen.delivered;
        complete += u32::from(seen.is_complete);
        traffic.add(&seen.traffic);
        failures.extend(seen.failure);
    }
    if let Some(failure) = failures.first() {
        sample.notes.push(format!("{} clients failed, one with: {failure}", failures.len()));
    }
    sample.set("delivered", delivered as f64);
    sample.set("converged", f64::from(complete));
    sample.set("clients", f64::from(expected));
    if delivered == 0 {
        return 0;
    }
    let per = |count: u64| count as f64 / delivered as f64;
    sample.set("bytes_down", per(traffic.bytes_down));
    sample.set("bytes_up", per(traffic.bytes_up));
    sample.set("frames_down", per(traffic.frames_down));
    for (name, percent) in [("p50_ms", 50.0), ("p99_ms", 99.0)] {
        if let Some(value) = percentile_ms(&mut latencies, percent) {
            sample.set(name, value);
        }
    }
    delivered
}

/// A sample, whatever happened.
pub fn sample_of(outcome: Result<Sample>) -> Sample {
    outcome.unwrap_or_else(|error| Sample::failed(format!("{error:#}")))
}

/// A clock that has not started.
fn stopped_clock() -> (watch::Sender<Option<std::time::Instant>>, crate::client::Clock) {
    watch::channel(None)
}

/// A part without edits.
fn reader(timeline: &Arc<crate::client::Timeline>) -> crate::client::Part {
    crate::client::Part { timeline: Arc::clone(timeline), edits: Vec::new() }
}
