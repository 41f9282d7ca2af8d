//! Real processes, real databases, real faults: three regions under load, and a checker of what they acknowledged.
//!
//! Three regions, each an `isobar serve` process, are linked through proxies that can be cut; on Postgres one of them has two
//! processes on its database. Writers edit documents at any of them and move on when theirs dies. A plan drawn from a seed
//! kills regions, and of the one with two processes the keeper of the links and the other one, cuts and drops links, puts old
//! copies of databases back, takes databases away and deletes documents. When it is over everything heals, and then:
//!
//! - a region that was killed has, on its own disk, every change that it ever acknowledged (looked at before it meets
//!   anybody);
//! - when one of its two processes was killed, the other gives every change that either has acknowledged;
//! - all regions have equal vectors, and all processes give equal heads;
//! - every acknowledged change is in every region, while the writers are away. Excused are those that only a disk had which
//!   was put back or taken away; they are counted, and there once the writers have been back;
//! - deleted documents stay deleted, although the writers offer them again and again;
//! - no process has ended by itself, panicked, or logged an error.
//!
//! # Running it
//!
//! The tests have fixed seeds and a load of some seconds. `CAMPAIGN_SECONDS` makes it longer (a round of all faults takes 16),
//! `CAMPAIGN_SEED` chooses another plan. `cargo xtask campaign` sets them:
//!
//! ```text
//! cargo xtask campaign --seconds 600 --seed 7 --database sqlite
//! ```
//!
//! A failure prints the seed and the plan. The plan is the same for the same seed; what the processes do meanwhile is
//! not, so a failure may take several runs to come back.
//!
//! What it does not do: lose power (a killed process leaves its writes to the kernel), fill disks, or lose single packets.
//! The processes listen on addresses of 127.0.0.0/8 other than 127.0.0.1, which takes Linux.

#![allow(clippy::unwrap_used, reason = "a test that meets an error shall fail")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

mod campaign;
mod client;
mod ledger;
mod plan;
mod region;
mod writer;

use campaign::Campaign;
use plan::REGIONS;
use region::Database;

/// How long the load lasts unless it is said otherwise.
const LENGTH: Duration = Duration::from_secs(16);

/// How long anything may take that has to happen in the end. Regions that have long not reached each other pause up to
/// half a minute before they try again.
const DEADLINE: Duration = Duration::from_secs(120);

/// How often a condition is looked at that nothing announces.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What the regions keep their documents in.
#[derive(Debug, Clone, Copy)]
enum Flavour {
    Sqlite,
    Postgres,
}

impl Flavour {
    /// The region that has more than one node: only a server can be shared.
    fn region_of_several(self) -> Option<usize> {
        match self {
            Self::Sqlite => None,
            Self::Postgres => Some(0),
        }
    }

    async fn databases(self, directory: &Path) -> Vec<Database> {
        match self {
            Self::Sqlite => (0..REGIONS)
                .map(|number| Database::Sqlite { directory: directory.join(format!("region-{number}")) })
                .collect(),
            Self::Postgres => {
                let server = Arc::new(isobar_testkit::shared().unwrap());
                let name = |number| format!("isobar_campaign_{}_{number}", std::process::id());
                let database = |number| Database::Postgres { server: server.clone(), name: name(number) };
                (0..REGIONS).map(database).collect()
            }
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a whole number, not {value:?}")))
}

async fn run(flavour: Flavour, seed: u64) {
    let seed = setting("CAMPAIGN_SEED").unwrap_or(seed);
    let length = setting("CAMPAIGN_SECONDS").map_or(LENGTH, Duration::from_secs);
    Campaign::begin(flavour, seed, length).await.run().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_regions_on_sqlite_lose_nothing_that_they_acknowledged() {
    run(Flavour::Sqlite, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_regions_on_postgres_lose_nothing_that_they_acknowledged() {
    run(Flavour::Postgres, 2).await;
}
