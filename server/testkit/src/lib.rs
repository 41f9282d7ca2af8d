//! What tests and benchmarks need around the server: a throw-away Postgres.
//!
//! [`PostgresCluster`] runs one in a temporary directory. [`shared`] is what a test calls: it uses the server that
//! `ISOBAR_TEST_DATABASE_URL` names, and starts a cluster of its own only where there is none. A run of many tests
//! starts one with the `with-postgres` program (or [`PostgresCluster::start`]) and sets that variable.
//!
//! Nothing here connects to the database or knows its contents.

mod postgres;

pub use postgres::{Durability, PostgresCluster};

use std::io;

/// The environment variable that names a running server: a URL with any database of it.
pub const DATABASE_URL_VARIABLE: &str = "ISOBAR_TEST_DATABASE_URL";

/// A Postgres server that a test may create databases in.
pub enum TestServer {
    /// Somebody else's, who also stops it.
    Given {
        url: String,
    },
    Own(PostgresCluster),
}

impl TestServer {
    /// The URL of the database `name`. Without one, of the database that a test connects to in order to create its
    /// own.
    pub fn url(&self, name: Option<&str>) -> String {
        match self {
            Self::Given { url } => match (name, url.rsplit_once('/')) {
                (Some(name), Some((server, _))) => format!("{server}/{name}"),
                _ => url.clone(),
            },
            Self::Own(cluster) => cluster.url(name.unwrap_or("postgres")),
        }
    }
}

/// The server for a test: the given one, else a new cluster that ends with the value.
pub fn shared() -> io::Result<TestServer> {
    match std::env::var(DATABASE_URL_VARIABLE) {
        Ok(url) if !url.is_empty() => Ok(TestServer::Given { url }),
        _ => PostgresCluster::start(Durability::None).map(TestServer::Own),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_server_keeps_its_address_for_other_databases() {
        let server = TestServer::Given { url: "postgres://isobar@127.0.0.1:5433/postgres".to_owned() };
        assert_eq!(server.url(Some("other")), "postgres://isobar@127.0.0.1:5433/other");
        assert_eq!(server.url(None), "postgres://isobar@127.0.0.1:5433/postgres");
    }
}
