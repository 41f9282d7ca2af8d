//! A throw-away Postgres, and what bare batched inserts reach on each kind of database.
//!
//! The inserts are the floor for durable writes: the same bytes into one table, in transactions of many rows, by one
//! connection, with nothing decoded, checked or sent.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use isobar_testkit::{Durability, PostgresCluster};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};

use crate::workload::Chain;

/// Rows per transaction: about what a busy group commit gathers.
pub const BATCH_ROWS: usize = 500;

/// A Postgres cluster for one run of the benchmark.
pub struct Postgres {
    cluster: PostgresCluster,
    pid: u32,
    databases: AtomicU32,
}

impl Postgres {
    /// Starts a cluster whose commits wait for the disk.
    pub async fn start() -> Result<Self> {
        let cluster = PostgresCluster::start(Durability::Disk).context("starting Postgres")?;
        let mut connection = PgConnection::connect(&cluster.url("postgres")).await?;
        let (backend,): (i32,) = sqlx::query_as("select pg_backend_pid()").fetch_one(&mut connection).await?;
        let status = std::fs::read_to_string(format!("/proc/{backend}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        let pid =
            parent.and_then(|pid| pid.trim().parse().ok()).context("the backend's parent is Postgres")?;
        connection.close().await?;
        Ok(Self { cluster, pid, databases: AtomicU32::new(0) })
    }

    /// Creates an empty database and returns its URL.
    pub async fn create_database(&self) -> Result<String> {
        let name = format!("bench_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(&self.cluster.url("postgres")).await?;
        sqlx::query(sqlx::AssertSqlSafe(format!("create database {name}"))).execute(&mut connection).await?;
        connection.close().await?;
        Ok(self.cluster.url(&name))
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }
}

/// The rows of one batch: a document id, and hash and bytes of changes. Rows are told apart by the document id.
struct Rows<'c> {
    chain: &'c Chain,
    next: u64,
}

impl Rows<'_> {
    /// Document ids, hashes and changes.
    fn next_batch(&mut self) -> [Vec<Vec<u8>>; 3] {
        let mut columns = [const { Vec::new() }; 3];
        for _ in 0..BATCH_ROWS {
            let edits = u64::from(self.chain.links() - 1);
            let link = self.chain.link((1 + self.next % edits) as u32);
            columns[0].push([[0; 8], (self.next / edits).to_be_bytes()].concat());
            columns[1].push(link.hash.to_vec());
            columns[2].push(link.chunk.to_vec());
            self.next += 1;
        }
        columns
    }
}

/// Rows per second that one connection inserts into SQLite, with the settings of an embedded node.
pub async fn sqlite_inserts_per_s(directory: &Path, chain: &Chain, duration: Duration) -> Result<f64> {
    let file = tempfile::Builder::new().prefix("inserts-").tempdir_in(directory)?;
    let mut connection: SqliteConnection = SqliteConnectOptions::new()
        .filename(file.path().join("bare.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await?;
    let table = "create table changes (document_id blob, change_hash blob, bytes blob, \
                 primary key (document_id, change_hash)) without rowid";
    sqlx::query(table).execute(&mut connection).await?;
    let mut rows = Rows { chain, next: 0 };
    let began = Instant::now();
    while began.elapsed() < duration {
        let [documents, hashes, changes] = rows.next_batch();
        let mut transaction = connection.begin().await?;
        for ((document, hash), change) in documents.iter().zip(&hashes).zip(&changes) {
            let insert = sqlx::query("insert into changes values (?, ?, ?)");
            insert.bind(document).bind(hash).bind(change).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
    }
    let rate = rows.next as f64 / began.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(rate)
}

/// Rows per second that one connection inserts into Postgres.
pub async fn postgres_inserts_per_s(postgres: &Postgres, chain: &Chain, duration: Duration) -> Result<f64> {
    let mut connection = PgConnection::connect(&postgres.create_database().await?).await?;
    let table = "create table changes (document_id bytea, change_hash bytea, bytes bytea, \
                 primary key (document_id, change_hash))";
    sqlx::query(table).execute(&mut connection).await?;
    let mut rows = Rows { chain, next: 0 };
    let began = Instant::now();
    while began.elapsed() < duration {
        let [documents, hashes, changes] = rows.next_batch();
        let insert =
            sqlx::query("insert into changes select * from unnest($1::bytea[], $2::bytea[], $3::bytea[])");
        insert.bind(documents).bind(hashes).bind(changes).execute(&mut connection).await?;
    }
    let rate = rows.next as f64 / began.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(rate)
}
