//! Several regions in one process, in virtual time, under every fault that can be thought of: the same core that the server
//! runs, with a simulated shell around it. What must be true is checked as it happens (`checks` says what is looked at when),
//! and at the end, when all has healed, every region must have come to the same.
//!
//! A schedule is a seed. `cargo xtask simulate` runs many of them. `SIMULATION_SEEDS` sets how many are run, `SIMULATION_FIRST` which is
//! the first, `SIMULATION_THREADS` on how many threads; `SIMULATION_SEED` runs one and prints what happened in it. A schedule
//! that fails is run again for its trace, of which the end is printed. The same seed is the same schedule, to the byte.
//!
//! Schedules are short, and dense in faults: for the same work many of these find more than few long ones. Time in which nothing
//! happens costs next to nothing, as timers slow down in it and regions are compared only where something has changed.
//!
//! What it cannot see: the server's own shell, that is SQL, tasks, framing and TLS. What it does not play yet: several nodes on
//! one database.

mod bases;
mod change_bytes;
mod checks;
mod client;
mod commits;
mod disk;
mod effects;
mod events;
mod faults;
mod ledger;
mod network;
mod plan;
mod planted;
mod presence;
mod receipts;
mod region;
#[allow(dead_code, reason = "the other tests use more of it")]
#[path = "../convergence/rng.rs"]
mod rng;
mod scrubs;
mod settle;
mod staging;
mod storing;
mod trace;
mod turns;
mod wires;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ledger::{Invariant, Violation};
use plan::Planted;
use world::{Tally, World};

/// As in the server. A schedule makes and drops small things all the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many seeds are run if nobody says otherwise.
const SEEDS: u64 = 1_000;

/// How much of a trace is printed when a schedule fails, in lines and in bytes of a line.
const TRACE_LINES: usize = 120;
const TRACE_LINE_BYTES: usize = 400;

/// So many seeds between two lines about how far a long run is.
const PROGRESS_EVERY: u64 = 10_000;

/// What every 1000 schedules must have met, so that passing means something.
const REACHED: [&str; 38] = [
    "acknowledged",
    "adoptions",
    "bases",
    "bases taken whole",
    "clones",
    "closes",
    "crashes after a commit",
    "crashes between effects",
    "crashes during a commit",
    "cuts",
    "deleted documents",
    "events",
    "failed commits",
    "failed commits that were done",
    "frames that arrive twice",
    "joins with a copy",
    "late commits",
    "lookings away",
    "lost acknowledgements",
    "lost from Entries on",
    "lost from Have on",
    "lost from Unsubscribe on",
    "losses found",
    "pages",
    "pending",
    "presence",
    "prunings",
    "quarantined documents",
    "receipts",
    "reconnections",
    "regions that left",
    "replays",
    "rollbacks",
    "scrubs",
    "scrubs interrupted",
    "scrubs that saw documents move",
    "truncated reads",
    "truncations",
];

/// What so many schedules must have met besides: connections that broke at frames of every kind, for one.
const MANY: u64 = 10_000;
const REACHED_BY_MANY: [&str; 11] = [
    "fenced commits",
    "lost from HeadsAnswer on",
    "lost from HeadsRequest on",
    "lost from Interest on",
    "lost from Ping on",
    "lost from Pong on",
    "lost from Presence on",
    "lost from SnapshotPage on",
    "lost from SnapshotRequest on",
    "lost from Subscribe on",
    "lost from Truncated on",
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one schedule. A panic, the core's assertions among them, is a violation like any other.
fn run(seed: u64, planted: Option<Planted>) -> Result<Tally, Violation> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, planted).run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        Err(Violation { invariant: Invariant::NoPanic, detail: text.to_owned() })
    })
}

/// Runs one schedule and returns its trace, too.
fn run_traced(seed: u64) -> (Result<Tally, Violation>, Vec<String>) {
    trace::begin(true);
    let result = run(seed, None);
    (result, trace::end())
}

/// Runs a schedule that is expected to keep every invariant; says where it does not.
fn must_keep(seed: u64) -> Tally {
    run(seed, None).unwrap_or_else(|violation| {
        let (_, lines) = run_traced(seed);
        for line in &lines[lines.len().saturating_sub(TRACE_LINES)..] {
            eprintln!("{}", line.get(..TRACE_LINE_BYTES).unwrap_or(line));
        }
        eprintln!("to replay it: SIMULATION_SEED={seed} cargo test -p isobar-protocol --test simulation every_schedule -- --nocapture");
        panic!("SIMULATION_SEED={seed} violates {:?}: {}", violation.invariant, violation.detail);
    })
}

/// Runs seeds on some threads; adds up what happened.
fn run_all(first: u64, seeds: u64) -> Tally {
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let threads = number("SIMULATION_THREADS").unwrap_or(processors);
    let worker = || {
        let mut sum = Tally::new();
        loop {
            let done = next.fetch_add(1, Ordering::Relaxed);
            if done > 0 && done <= seeds && done.is_multiple_of(PROGRESS_EVERY) {
                println!("{done} schedules, {:.0} a second", done as f64 / begun.elapsed().as_secs_f64());
            }
            if done >= seeds {
                return sum;
            }
            for (what, count) in must_keep(first + done) {
                *sum.entry(what).or_default() += count;
            }
        }
    };
    let mut all = Tally::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for finished in workers {
            let sum = finished.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (what, count) in sum {
                *all.entry(what).or_default() += count;
            }
        }
    });
    all
}

#[test]
fn every_schedule_keeps_every_invariant() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let (result, lines) = run_traced(seed);
        lines.iter().for_each(|line| println!("{line}"));
        let tally = result.unwrap_or_else(|violation| panic!("seed {seed} violates {violation:?}"));
        return println!("{tally:#?}");
    }
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS);
    let tally = run_all(number("SIMULATION_FIRST").unwrap_or(0), seeds);
    println!("{tally:#?}");
    let mut wanted: Vec<&str> = Vec::new();
    wanted.extend((seeds >= SEEDS).then_some(REACHED).into_iter().flatten());
    wanted.extend((seeds >= MANY).then_some(REACHED_BY_MANY).into_iter().flatten());
    wanted.retain(|what| !tally.contains_key(what));
    assert!(wanted.is_empty(), "no schedule had any: {wanted:?}");
}

#[test]
fn the_same_seed_is_the_same_schedule_to_the_byte() {
    for seed in 0..12 {
        let (_, first) = run_traced(seed);
        let (_, second) = run_traced(seed);
        assert!(first.len() > 100, "seed {seed} does next to nothing");
        assert_eq!(first, second, "seed {seed}");
    }
    assert_ne!(run_traced(1).1, run_traced(2).1, "seeds make a difference");
}
