//! The tables on the terminal and the JSON beside them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;

use crate::results::Results;
use crate::scenario::Sizes;
use crate::servers::Kind;
use crate::targets::{self, Outcome};

pub const FANOUT_100: &str = "fan-out, 100 readers";
pub const FANOUT_300: &str = "fan-out, 300 readers";
pub const LARGE: &str = "fan-out, large document";
pub const MANY: &str = "many documents";
pub const JOIN: &str = "cold join";
pub const IDLE: &str = "idle connections";
pub const DURABLE: &str = "durable writes";

/// A column: heading, figure, digits after the point.
type Column = (&'static str, &'static str, usize);

const DELIVERY: &[Column] = &[
    ("CPU µs", "cpu_us", 1),
    ("database µs", "database_cpu_us", 1),
    ("generator µs", "generator_cpu_us", 1),
    ("p50 ms", "p50_ms", 1),
    ("p99 ms", "p99_ms", 1),
    ("bytes down", "bytes_down", 0),
    ("bytes up", "bytes_up", 0),
    ("frames", "frames_down", 2),
    ("converged", "converged", 0),
    ("of", "clients", 0),
];

/// The columns of each scenario, in the order in which they are printed.
const TABLES: &[(&str, &str, &[Column])] = &[
    (FANOUT_100, "one writer, 20 edits/s, a small document; costs per delivered change", DELIVERY),
    (FANOUT_300, "one writer, 20 edits/s, a small document; costs per delivered change", DELIVERY),
    (LARGE, "one writer, 20 edits/s, the 260,000-edit document; costs per delivered change", DELIVERY),
    (MANY, "every client one edit/s; costs per delivered change", DELIVERY),
    (
        JOIN,
        "a client that knows nothing gets the 260,000-edit document, then again after a restart of the server",
        &[
            ("CPU ms", "cpu_ms", 2),
            ("wall ms", "wall_ms", 1),
            ("bytes", "bytes", 0),
            ("restarted CPU ms", "restarted_cpu_ms", 1),
            ("restarted wall ms", "restarted_wall_ms", 1),
            ("upload ms", "upload_ms", 0),
            ("resident MiB", "resident_mib", 0),
        ],
    ),
    (
        IDLE,
        "connections with one open document each, doing nothing",
        &[
            ("KiB/connection", "kib_per_connection", 1),
            ("resident MiB", "resident_mib", 0),
            ("idle CPU %", "idle_cpu_percent", 2),
        ],
    ),
    (
        DURABLE,
        "changes as fast as they are acknowledged, then kill -9; costs per acknowledged change",
        &[
            ("acknowledged/s", "acknowledged_per_s", 0),
            ("CPU µs", "cpu_us", 1),
            ("database µs", "database_cpu_us", 1),
            ("generator µs", "generator_cpu_us", 1),
            ("bare inserts/s", "inserts_per_s", 0),
            ("lost", "lost", 0),
            ("of acknowledged", "acknowledged", 0),
        ],
    ),
];

/// Prints everything: a table per scenario, what was left out, and the targets.
pub fn print(results: &Results) {
    for (scenario, about, columns) in TABLES {
        if let Some(servers) = results.scenarios.get(scenario) {
            println!("\n{scenario}: {about}");
            print_table(results, scenario, servers.keys().copied(), columns);
        }
    }
    if !results.skipped.is_empty() {
        println!("\nleft out");
        results.skipped.iter().for_each(|(what, why)| println!("  {what}: {why}"));
    }
    println!("\ntargets (medians of {} or fewer rounds)", results.rounds());
    let (missing, judged): (Vec<_>, Vec<_>) =
        targets::judge(results).into_iter().partition(|verdict| verdict.outcome == Outcome::NotMeasured);
    judged.iter().for_each(|verdict| println!("  {verdict}"));
    if !missing.is_empty() {
        println!(
            "  {} more were not measured: a server or scenario they need was left out or failed",
            missing.len()
        );
    }
}

fn print_table(
    results: &Results,
    scenario: &str,
    servers: impl Iterator<Item = Kind> + Clone,
    columns: &[Column],
) {
    let medians =
        |kind: Kind| columns.iter().map(move |(_, figure, _)| results.median(scenario, kind, figure));
    let is_used = |at: &usize| servers.clone().any(|kind| medians(kind).nth(*at).flatten().is_some());
    let used: Vec<usize> = (0..columns.len()).filter(is_used).collect();
    let width = |at: usize| columns[at].0.chars().count().max(8);
    let heading: String = used.iter().map(|at| format!("  {:>1$}", columns[*at].0, width(*at))).collect();
    println!("  {:22}{heading}", "");
    for kind in servers {
        let cells = used.iter().map(|at| {
            let (_, figure, digits) = columns[*at];
            let cell = results.median(scenario, kind, figure).map(|value| format!("{value:.digits$}"));
            format!("  {:>1$}", cell.unwrap_or_else(|| "-".into()), width(*at))
        });
        println!("  {:22}{}", kind.name(), cells.collect::<String>());
    }
    for kind in Kind::ALL {
        if let Some(failure) = results.failure(scenario, kind) {
            println!("    {}: failed: {failure}", kind.name());
        }
        for note in results.notes(scenario, kind) {
            println!("    {}: {note}", kind.name());
        }
    }
}

/// What the figures were measured on.
#[derive(Serialize)]
struct Machine {
    cores: usize,
    processor: Option<String>,
    memory_kib: Option<u64>,
    kernel: String,
    load_average: String,
    node: Option<String>,
    postgres: Option<String>,
    seconds_since_1970: u64,
}

impl Machine {
    fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |file: &str, key: &str| {
            let line = file.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let version = |program: &str| {
            let output = Command::new(program).arg("--version").output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            memory_kib: memory.and_then(|text| text.split_whitespace().next()?.parse().ok()),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: read("/proc/loadavg").trim().to_owned(),
            node: version("node"),
            postgres: version("psql"),
            seconds_since_1970: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
        }
    }
}

/// Writes all samples with the machine's facts; returns the path.
pub fn write_json(results: &Results, sizes: &Sizes, out: &Path) -> Result<PathBuf> {
    fs::create_dir_all(out)?;
    let machine = Machine::read();
    let path = out.join(format!("{}.json", machine.seconds_since_1970));
    let servers: Vec<_> = Kind::ALL.iter().map(|kind| (kind, kind.name())).collect();
    let everything = serde_json::json!({
        "machine": machine,
        "version": env!("CARGO_PKG_VERSION"),
        "sizes": sizes,
        "servers": servers,
        "results": results,
        "targets": targets::judge(results),
    });
    fs::write(&path, serde_json::to_vec_pretty(&everything)?)?;
    Ok(path)
}
