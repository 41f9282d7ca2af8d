//! How fast appends are, beside what the same database does with bare inserts.
//!
//! For SQLite and Postgres and for several batch sizes, rounds alternate between (a) inserting changes into one plain
//! table, a statement and a durable commit per batch, and (b) [`Storage::append`] of the same batches. Prints
//! changes per second, their ratio, and the bytes that a change occupies on disk.
//!
//! ```text
//! cargo run --release -p isobar --example append_throughput [SECONDS_PER_ROUND]
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use isobar::storage::{self, Batch, ClaimedOrigin, DocumentAppend, RunAppend, Storage, StoredChange, Writer};
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup, RegionName, Seq};
use isobar_protocol::log::{self, Chain, Content, Entry};
use isobar_testkit::{Durability, PostgresCluster};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;
use uuid::Uuid;

const BATCHES: [usize; 4] = [1, 16, 64, 512];
const DOCUMENTS: usize = 20;
const CHANGE_BYTES: usize = 120;
const ROUNDS: u32 = 5;

/// Makes batches of changes that no two have in common.
struct Source {
    documents: Vec<DocumentId>,
    state: u64,
}

impl Source {
    fn new() -> Self {
        let documents = (0..DOCUMENTS).map(|_| DocumentId::from_slice(Uuid::new_v4().as_bytes()));
        Self { documents: documents.map(|id| id.expect("16 bytes are an id")).collect(), state: 1 }
    }

    /// SplitMix64: as good as a hash, and cheap enough not to matter.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn random_bytes(&mut self, count: usize) -> Vec<u8> {
        let words = (0..count.div_ceil(8)).flat_map(|_| self.random().to_le_bytes());
        words.take(count).collect()
    }

    fn batch(&mut self, size: usize) -> Vec<(DocumentId, Vec<StoredChange>)> {
        let used = size.min(DOCUMENTS);
        let first = self.random() as usize;
        (0..used)
            .map(|place| {
                let count = size / used + usize::from(place < size % used);
                let change = |_| StoredChange {
                    hash: ChangeHash(self.random_bytes(32).try_into().expect("32 bytes")),
                    bytes: Bytes::from(self.random_bytes(CHANGE_BYTES)),
                };
                let changes = (0..count).map(change).collect();
                (self.documents[(first + place) % DOCUMENTS].clone(), changes)
            })
            .collect()
    }
}

/// One plain table, and one statement per batch, which commits by itself.
enum Bare {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Bare {
    async fn sqlite(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let mut connection = SqliteConnection::connect_with(&options).await?;
        let create =
            "CREATE TABLE plain (id INTEGER PRIMARY KEY, document_id BLOB NOT NULL, bytes BLOB NOT NULL)";
        sqlx::query(create).execute(&mut connection).await?;
        Ok(Self::Sqlite(connection))
    }

    async fn postgres(url: &str) -> Result<Self> {
        let mut connection = PgConnection::connect(url).await?;
        let create =
            "CREATE TABLE plain (id bigserial PRIMARY KEY, document_id bytea NOT NULL, bytes bytea NOT NULL)";
        sqlx::query(create).execute(&mut connection).await?;
        Ok(Self::Postgres(connection))
    }

    async fn insert(&mut self, batch: &[(DocumentId, Vec<StoredChange>)], rows: usize) -> Result<()> {
        let changes = || {
            batch
                .iter()
                .flat_map(|(document, changes)| changes.iter().map(move |change| (document, &change.bytes)))
        };
        match self {
            Self::Sqlite(connection) => {
                let values = vec!["(?, ?)"; rows].join(", ");
                let sql = AssertSqlSafe(format!("INSERT INTO plain (document_id, bytes) VALUES {values}"));
                let mut query = sqlx::query(sql);
                for (document, bytes) in changes() {
                    query = query.bind(document.as_bytes()).bind(&bytes[..]);
                }
                query.execute(connection).await?;
            }
            Self::Postgres(connection) => {
                let (documents, bytes): (Vec<&[u8]>, Vec<&[u8]>) =
                    changes().map(|(document, bytes)| (document.as_bytes(), &bytes[..])).unzip();
                let sql =
                    "INSERT INTO plain (document_id, bytes) SELECT * FROM unnest($1::bytea[], $2::bytea[])";
                sqlx::query(sql).bind(documents).bind(bytes).execute(connection).await?;
            }
        }
        Ok(())
    }
}

/// The storage under test, as its one writer sees it.
struct Appender {
    storage: Arc<dyn Storage>,
    origin: ClaimedOrigin,
    last: Seq,
    chain: Chain,
}

impl Appender {
    async fn open(url: &str) -> Result<Self> {
        let storage = storage::open(url).await?;
        let (region, group) = (RegionName::new("here")?, PlacementGroup::new("everywhere")?);
        let origin = storage.claim_origin(&region, &group, 0, false).await?;
        let (last, chain) = (origin.last_seq, origin.chain);
        Ok(Self { storage, origin, last, chain })
    }

    /// As the group commit does: packs the entries, moves the chain on, appends.
    async fn append(&mut self, batch: &[(DocumentId, Vec<StoredChange>)]) -> Result<()> {
        let first = Seq(self.last.0 + 1);
        let (mut entries, mut changes, mut chain) = (Vec::new(), Vec::new(), self.chain);
        for (document, stored) in batch {
            let mut numbered = Vec::with_capacity(stored.len());
            for change in stored {
                let content = Content::Change { hash: change.hash, bytes: change.bytes.clone() };
                chain = chain.after(document, &content);
                self.last.0 += 1;
                numbered.push((self.last, change.clone()));
                entries.push(Entry { document: document.clone(), content });
            }
            let (document, group) = (document.clone(), self.origin.group.clone());
            changes.push(DocumentAppend { document, group, origin: self.origin.id, changes: numbered });
        }
        let run = RunAppend {
            origin: self.origin.id,
            writer: Writer::Own { incarnation: self.origin.incarnation },
            group: self.origin.group.clone(),
            first,
            last: self.last,
            chain_before: std::mem::replace(&mut self.chain, chain),
            chain,
            body: log::encode_run(&entries).into(),
        };
        self.storage.append(&Batch { runs: vec![run], changes, deletions: Vec::new() }).await?;
        Ok(())
    }
}

/// What one side did over all rounds. Making the batches is not counted.
#[derive(Default)]
struct Tally {
    changes: u64,
    time: Duration,
}

impl Tally {
    fn per_second(&self) -> f64 {
        self.changes as f64 / self.time.as_secs_f64()
    }
}

async fn measure(
    bare: &mut Bare,
    appender: &mut Appender,
    size: usize,
    round: Duration,
) -> Result<(Tally, Tally)> {
    let mut source = Source::new();
    let (mut bare_tally, mut append_tally) = (Tally::default(), Tally::default());
    for counted in 0..=ROUNDS {
        for side in [0, 1] {
            let tally = if side == 0 { &mut bare_tally } else { &mut append_tally };
            let mut spent = Duration::ZERO;
            // The first round goes on until the write-ahead log has its full length.
            let at_least = if counted == 0 { 1_500 } else { 0 };
            let mut batches = 0;
            while spent < round || batches < at_least {
                batches += 1;
                let batch = source.batch(size);
                let begun = Instant::now();
                match side {
                    0 => bare.insert(&batch, size).await?,
                    _ => appender.append(&batch).await?,
                }
                spent += begun.elapsed();
                tally.changes += size as u64;
            }
            tally.time += spent;
        }
        if counted == 0 {
            // The first round fills caches and prepares statements.
            (bare_tally.time, append_tally.time) = (Duration::ZERO, Duration::ZERO);
            (bare_tally.changes, append_tally.changes) = (0, 0);
        }
    }
    Ok((bare_tally, append_tally))
}

fn print(database: &str, size: usize, bare: &Tally, append: &Tally, bytes: (f64, f64)) {
    let (bare, append) = (bare.per_second(), append.per_second());
    println!(
        "| {database:8} | {size:5} | {bare:12.0} | {append:14.0} | {:5.2} | {:12.0} | {:14.0} |",
        append / bare,
        bytes.0,
        bytes.1
    );
}

async fn run_sqlite(size: usize, round: Duration) -> Result<()> {
    let directory = TempDir::new()?;
    let (bare_path, path) = (directory.path().join("bare.db"), directory.path().join("isobar.db"));
    let mut bare = Bare::sqlite(&bare_path).await?;
    let mut appender = Appender::open(&format!("sqlite:{}", path.display())).await?;
    let tallies = measure(&mut bare, &mut appender, size, round).await?;
    let Bare::Sqlite(mut connection) = bare else { unreachable!("it was opened as SQLite") };
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM plain").fetch_one(&mut connection).await?;
    connection.close().await?;
    appender.storage.close().await;
    let bytes = (
        std::fs::metadata(bare_path)?.len() as f64 / rows as f64,
        std::fs::metadata(path)?.len() as f64 / appender.last.0 as f64,
    );
    print("sqlite", size, &tallies.0, &tallies.1, bytes);
    Ok(())
}

async fn run_postgres(cluster: &PostgresCluster, size: usize, round: Duration) -> Result<()> {
    let name = format!("throughput_{size}");
    let mut maintenance = PgConnection::connect(&cluster.url("postgres")).await?;
    sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut maintenance).await?;
    let url = cluster.url(&name);
    let mut bare = Bare::postgres(&url).await?;
    let mut appender = Appender::open(&url).await?;
    let tallies = measure(&mut bare, &mut appender, size, round).await?;
    let Bare::Postgres(mut connection) = bare else { unreachable!("it was opened as Postgres") };
    let (bare_bytes, rows, append_bytes): (i64, i64, i64) = sqlx::query_as(
        "SELECT pg_total_relation_size('plain'), (SELECT count(*) FROM plain), (SELECT sum(pg_total_relation_size(t)) \
         FROM unnest(ARRAY['origins', 'log', 'documents', 'changes']::regclass[]) AS t)::bigint",
    )
    .fetch_one(&mut connection)
    .await?;
    let bytes = (bare_bytes as f64 / rows as f64, append_bytes as f64 / appender.last.0 as f64);
    print("postgres", size, &tallies.0, &tallies.1, bytes);
    connection.close().await?;
    appender.storage.close().await;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let seconds =
        std::env::args().nth(1).map_or(Ok(1.0), |text| text.parse()).context("seconds per round")?;
    let round = Duration::from_secs_f64(seconds);
    println!(
        "| database | batch | bare changes/s | append changes/s | ratio | bare bytes/change | bytes/change |"
    );
    println!("|---|---|---|---|---|---|---|");
    for size in BATCHES {
        run_sqlite(size, round).await?;
    }
    let cluster = PostgresCluster::start(Durability::Disk)?;
    for size in BATCHES {
        run_postgres(&cluster, size, round).await?;
    }
    Ok(())
}
