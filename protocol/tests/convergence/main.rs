//! Standard Automerge peers around a server that has nothing but the change graph: whatever happens to messages,
//! commits, connections and memories, everybody ends with the same document and falls silent.
//!
//! A case is a seed and a kind of weather. `CONVERGENCE_CASES` sets the number of cases of each test;
//! `CONVERGENCE_SEED` runs one case of it and tells its story.

mod client;
mod rng;
mod server;
mod world;

use world::{CALM, Weather, World};

/// Prints the seed when a case panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the case with CONVERGENCE_SEED={} failed", self.0);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn run(cases: u64, weather: Weather) {
    if let Some(seed) = number("CONVERGENCE_SEED") {
        let _seed = Seed(seed);
        return World::new(seed, weather, true).run();
    }
    for seed in 0..number("CONVERGENCE_CASES").unwrap_or(cases) {
        let _seed = Seed(seed);
        World::new(seed, weather, false).run();
    }
}

#[test]
fn peers_converge_in_calm_weather() {
    run(400, CALM);
}

#[test]
fn peers_converge_over_lost_connections_and_failed_commits() {
    run(400, Weather { disconnects: 6, failed_commits: 3, merges: 3, restarts: 2, ..CALM });
}

#[test]
fn old_peers_converge_and_get_only_single_changes() {
    run(400, Weather { v1: 60, disconnects: 4, merges: 2, false_positives: 5, ..CALM });
}

#[test]
fn peers_that_lose_their_data_get_it_again() {
    run(400, Weather { losses: 6, disconnects: 3, merges: 2, v1: 20, ..CALM });
}

#[test]
fn changes_before_their_dependencies_are_completed() {
    run(
        800,
        Weather { orphans: 8, false_positives: 25, disconnects: 5, losses: 2, merges: 3, v1: 20, ..CALM },
    );
}

#[test]
fn read_only_peers_neither_take_nor_lose() {
    run(400, Weather { read_only: 10, v1: 15, disconnects: 4, merges: 2, ..CALM });
}

#[test]
fn bases_are_made_looked_into_and_sent() {
    run(400, Weather { bases: 12, disconnects: 5, merges: 3, losses: 3, v1: 20, ..CALM });
}

#[test]
fn peers_converge_when_everything_happens() {
    let all = Weather {
        steps: 100,
        clients_max: 5,
        v1: 20,
        read_only: 3,
        disconnects: 4,
        losses: 2,
        orphans: 4,
        false_positives: 10,
        merges: 3,
        failed_commits: 2,
        bases: 6,
        restarts: 2,
    };
    run(400, all);
}
