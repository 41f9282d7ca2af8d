//! Opening a Postgres database: how to connect, and its schema.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};

use super::connections::connect;
use super::{failed, may_pass};
use crate::storage::StorageError;
use crate::storage::failure::classify_migration;
use crate::storage::schema::{NEWEST_MIGRATION, refuse_newer};

/// How long a migration may take, including the wait for another node's.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Limits that the server keeps for a session whose client is gone: it shall not hold locks for long.
/// `synchronous_commit` makes a commit wait for the disk whatever the role's or database's default is.
const SESSION_SETTINGS: [(&str, &str); 7] = [
    ("synchronous_commit", "on"),
    ("statement_timeout", "60s"),
    ("lock_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "30s"),
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("jit", "off"),
];

/// The key of the advisory lock that migrations are run under: "isobar" in ASCII.
const MIGRATION_LOCK: i64 = 0x6973_6f62_6172;

/// Migrates the database at `url`, and says how sessions connect to it.
pub(super) async fn open(url: &str) -> Result<PgConnectOptions, StorageError> {
    let options = PgConnectOptions::from_str(url)
        .map_err(failed)?
        .application_name("isobar")
        .disable_statement_logging();
    let mut connection = connect(&options).await?;
    let migration = migrate(&mut connection, sqlx::migrate!("../migrations/postgres"));
    match tokio::time::timeout(MIGRATION_TIMEOUT, migration).await {
        Ok(outcome) => outcome?,
        Err(_) => return Err(StorageError::Transient("the migration did not end in time".into())),
    }
    let _ = connection.close().await;
    Ok(options.options(SESSION_SETTINGS))
}

/// Brings the schema up to date in one transaction under an advisory lock (clause 9).
async fn migrate(connection: &mut PgConnection, mut migrator: Migrator) -> Result<(), StorageError> {
    migrator.set_locking(false);
    let mut transaction = connection.begin().await.map_err(failed)?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(MIGRATION_LOCK)
        .execute(&mut *transaction)
        .await
        .map_err(failed)?;
    let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *transaction)
        .await
        .map_err(failed)?;
    if exists {
        let newest = sqlx::query_scalar(NEWEST_MIGRATION).fetch_one(&mut *transaction);
        refuse_newer(&migrator, newest.await.map_err(failed)?)?;
    }
    migrator.run(&mut *transaction).await.map_err(|error| classify_migration(error, may_pass))?;
    transaction.commit().await.map_err(failed)
}
