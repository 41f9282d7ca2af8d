//! `cargo xtask campaign`: real processes on real databases under kills, cuts and restores, for as long as one likes.

use std::process::Command;

use anyhow::Result;

use crate::postgres::SharedPostgres;
use crate::process::Run;

/// Run three regions as processes, kill and cut them under load, and check that nothing acknowledged is lost.
///
/// Runs on SQLite and then on a throw-away Postgres. A failure prints the seed and the plan; what the processes do besides
/// is not the same each time.
#[derive(clap::Args)]
pub struct Arguments {
    /// How long the load lasts on each database; a round of all faults takes 16 seconds.
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// Another plan of faults than the tests' own.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// On this database only.
    #[arg(long, value_name = "DATABASE")]
    database: Option<Database>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Database {
    Sqlite,
    Postgres,
}

impl Database {
    /// What the names of its tests hold.
    fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "on_sqlite",
            Self::Postgres => "on_postgres",
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let mut postgres = SharedPostgres::default();
    let mut command = Command::new("cargo");
    command
        .args(["test", "--locked", "--package", "isobar", "--test", "campaign"])
        .args(["--", "--nocapture", "--test-threads", "1"])
        .env("CAMPAIGN_SECONDS", arguments.seconds.to_string());
    if let Some(seed) = arguments.seed {
        command.env("CAMPAIGN_SEED", seed.to_string());
    }
    command.args(arguments.database.map(Database::name));
    if arguments.database != Some(Database::Sqlite) {
        command.envs(postgres.environment()?);
    }
    command.run()
}
