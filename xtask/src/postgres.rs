//! One throw-away Postgres for a whole run of tests, started when the first step asks for it.

use std::io::ErrorKind;

use anyhow::{Context, Result};
use isobar_testkit::{DATABASE_URL_VARIABLE, Durability, PostgresCluster};

use crate::install;

/// Stops and removes its cluster when it is dropped, or when this process ends in whatever way.
#[derive(Default)]
pub struct SharedPostgres {
    cluster: Option<PostgresCluster>,
}

impl SharedPostgres {
    /// The environment in which the tests find the cluster.
    ///
    /// # Errors
    /// [`install::Missing`] where there is no Postgres and it cannot be installed.
    pub fn environment(&mut self) -> Result<[(&'static str, String); 1]> {
        let cluster = match self.cluster.take() {
            Some(cluster) => cluster,
            None => start()?,
        };
        Ok([(DATABASE_URL_VARIABLE, self.cluster.insert(cluster).url("postgres"))])
    }
}

fn start() -> Result<PostgresCluster> {
    match PostgresCluster::start(Durability::None) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            install::debian("Postgres", &["postgresql"])?;
            PostgresCluster::start(Durability::None)
        }
        outcome => outcome,
    }
    .context("cannot start a Postgres for the tests")
}
