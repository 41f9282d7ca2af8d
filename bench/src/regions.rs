//! Two regions at a distance: how long an edit takes to a reader in the other one, what it costs in bytes between them, and
//! how fast a region that was away catches up.
//!
//! The distance is a TCP proxy on loopback that delays both directions. The floor of a delivery is its one-way time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use isobar::demo::links::{Distance, Proxy};
use serde::Serialize;
use tempfile::TempDir;

use crate::client::{Address, Client, Crowd, JOIN_PATIENCE, Part, PlannedEdit, Timeline, upload};
use crate::database::Postgres;
use crate::process::{ServerProcess, cpu_time, free_port};
use crate::results::percentile_ms;
use crate::servers::http_get;
use crate::session::{Dialect, Session};
use crate::workload::{Chain, Document, Seed};

/// What the regions share; any 32 bytes will do.
const CLUSTER_KEY: &str = "a key that only this benchmark has";

const START_PATIENCE: Duration = Duration::from_secs(20);

/// How long stragglers are waited for after the last edit.
const DRAIN: Duration = Duration::from_secs(5);

/// How long catching up may take.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);

/// Measure two Isobar regions at a distance: delivery, bytes between them, catching up.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A built isobar to measure.
    #[arg(long, value_name = "PATH")]
    isobar: PathBuf,

    /// The simulated distance.
    #[arg(long, default_value_t = 45)]
    one_way_ms: u64,

    /// Edits per second, each rate measured by itself.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 500, 1000, 2000])]
    rates: Vec<u32>,

    /// How long each rate is kept up.
    #[arg(long, default_value_t = 8)]
    seconds: u32,

    /// Documents that are edited at the same time, each by one writer and read by one reader.
    #[arg(long, default_value_t = 50)]
    documents: u32,

    /// Changes that are written while the second region is away.
    #[arg(long, default_value_t = 200_000)]
    catch_up_changes: u32,

    /// Keep the documents on Postgres instead of SQLite.
    #[arg(long)]
    postgres: bool,

    /// Where the JSON goes.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Delivery {
    edits_per_second: u32,
    delivered: u64,
    expected: u64,
    /// Beyond the one-way time.
    p50_ms: f64,
    p99_ms: f64,
    /// Between the regions, for each change: as sent, before compression, and the change's own.
    sent_bytes: f64,
    raw_bytes: f64,
    own_bytes: f64,
    writer_region_cpu_us: f64,
    reader_region_cpu_us: f64,
}

#[derive(Debug, Serialize)]
struct CatchUp {
    changes: u64,
    seconds: f64,
    changes_per_second: f64,
    sent_bytes: f64,
}

#[derive(Debug, Serialize)]
struct Results {
    database: &'static str,
    one_way_ms: u64,
    deliveries: Vec<Delivery>,
    catch_up: Option<CatchUp>,
}

/// One region's process.
struct Region {
    name: &'static str,
    database: String,
    process: ServerProcess,
    clients: String,
    admin: String,
}

struct Pair {
    scratch: TempDir,
    isobar: PathBuf,
    /// Accepts links; the writers are here.
    near: Region,
    /// Dials through the proxy; the readers are here.
    far: Region,
    proxy: Proxy,
}

pub async fn run(arguments: &Arguments) -> Result<()> {
    let postgres = match arguments.postgres {
        true => Some(Postgres::start().await?),
        false => None,
    };
    let mut results = Results {
        database: if arguments.postgres { "postgres" } else { "sqlite" },
        one_way_ms: arguments.one_way_ms,
        deliveries: Vec::new(),
        catch_up: None,
    };
    for rate in &arguments.rates {
        let pair = Pair::start(arguments, postgres.as_ref()).await?;
        let delivery = deliver(&pair, arguments, *rate).await?;
        println!(
            "{rate:>6} edits/s: +{:.1} ms p50, +{:.1} ms p99 beyond {} ms one way; {:.0} bytes sent for each change \
             ({:.0} uncompressed, {:.0} its own); CPU µs {:.0} + {:.0}; {} of {} delivered",
            delivery.p50_ms,
            delivery.p99_ms,
            arguments.one_way_ms,
            delivery.sent_bytes,
            delivery.raw_bytes,
            delivery.own_bytes,
            delivery.writer_region_cpu_us,
            delivery.reader_region_cpu_us,
            delivery.delivered,
            delivery.expected,
        );
        results.deliveries.push(delivery);
    }
    if arguments.catch_up_changes > 0 {
        let mut pair = Pair::start(arguments, postgres.as_ref()).await?;
        let caught = catch_up(&mut pair, arguments).await?;
        println!(
            "catching up on {} changes: {:.2} s, {:.0} changes/s, {:.0} bytes sent for each",
            caught.changes, caught.seconds, caught.changes_per_second, caught.sent_bytes
        );
        results.catch_up = Some(caught);
    }
    if let Some(out) = &arguments.out {
        std::fs::write(out, serde_json::to_string_pretty(&results)?)?;
    }
    Ok(())
}

impl Pair {
    async fn start(arguments: &Arguments, postgres: Option<&Postgres>) -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("isobar-regions-").tempdir()?;
        let mut databases = Vec::new();
        for name in ["near", "far"] {
            databases.push(match postgres {
                Some(postgres) => postgres.create_database().await?,
                None => format!("sqlite:{}", scratch.path().join(name).join("isobar.db").display()),
            });
        }
        let port = free_port()?;
        let isobar = std::path::absolute(&arguments.isobar)?;
        let listen = format!("127.0.0.1:{port}");
        let far_database = databases.pop().expect("there are two");
        let near_database = databases.pop().expect("there are two");
        let near = start(&isobar, scratch.path(), "near", near_database, &["--peer-listen", &listen]).await?;
        let distance = Distance::of(Duration::from_millis(arguments.one_way_ms));
        let proxy = Proxy::start(listen.parse()?, distance).await?;
        let far = start_far(&isobar, scratch.path(), far_database, &proxy).await?;
        let pair = Self { scratch, isobar, near, far, proxy };
        pair.wait_until_equal(START_PATIENCE).await?;
        Ok(pair)
    }

    /// Waits until the near region says that the far one has everything.
    async fn wait_until_equal(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let view = http_get(&self.near.admin, "/admin/v1/peers").await.unwrap_or_default();
            let peers: Vec<serde_json::Value> = serde_json::from_str(&view).unwrap_or_default();
            let is_equal = |peer: &serde_json::Value| {
                peer["region"] == "far" && peer["ahead_changes"] == 0 && peer["behind_changes"] == 0
            };
            if peers.iter().any(is_equal) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the regions are not equal within {patience:?}: {view}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn start_far(isobar: &Path, scratch: &Path, database: String, proxy: &Proxy) -> Result<Region> {
    let peer = format!("ws://{}", proxy.address());
    start(isobar, scratch, "far", database, &["--peer", &peer, "--peer-listen", "127.0.0.1:0"]).await
}

async fn start(
    isobar: &Path,
    scratch: &Path,
    name: &'static str,
    database: String,
    more: &[&str],
) -> Result<Region> {
    let mut command = Command::new(isobar);
    command.args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--region", name]);
    command.args(["--database", &database, "--log", "warn"]).args(more);
    command.env("ISOBAR_CLUSTER_KEY", CLUSTER_KEY);
    let log = scratch.join(format!("{name}-{}.log", free_port()?));
    let mut process = ServerProcess::start(command, &log)?;
    let clients = process.wait_for_line("clients: ws://", START_PATIENCE).await?;
    let admin = process.wait_for_line("admin: http://", START_PATIENCE).await?;
    let bare = |line: String| line.trim_end_matches('/').to_owned();
    Ok(Region { name, database, process, clients: bare(clients), admin: bare(admin) })
}

impl Region {
    fn address(&self) -> Address {
        Address { authority: self.clients.clone(), path: "/".to_owned() }
    }

    async fn metric(&self, name: &str) -> Result<f64> {
        let text =
            http_get(&self.admin, "/metrics").await.with_context(|| format!("metrics of {}", self.name))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(Ok(0.0), |value| Ok(value.trim().parse()?))
    }
}

/// What has passed between the regions and been used so far.
struct Mark {
    sent: f64,
    raw: f64,
    near_cpu: Duration,
    far_cpu: Duration,
}

impl Mark {
    async fn now(pair: &Pair) -> Result<Self> {
        Ok(Self {
            sent: pair.near.metric("isobar_link_bytes_sent_total").await?,
            raw: pair.near.metric("isobar_link_bytes_before_compression_total").await?,
            near_cpu: cpu_time(pair.near.process.pid()),
            far_cpu: cpu_time(pair.far.process.pid()),
        })
    }
}

async fn deliver(pair: &Pair, arguments: &Arguments, rate: u32) -> Result<Delivery> {
    let documents = arguments.documents.min(rate);
    let edits = rate * arguments.seconds / documents;
    let gap = Duration::from_secs(1) * documents / rate;
    let (clock_start, clock) = tokio::sync::watch::channel(None);
    let (mut writers, mut readers) = (Crowd::default(), Crowd::default());
    let mut timelines = Vec::new();
    let (mut links, mut own) = (0, 0);
    for number in 0..documents {
        // Hashes of one document must not be those of another: they would compress.
        let chain = Arc::new(Chain::build(Seed::numbered(number)?, edits as usize, 1)?);
        own += (1..chain.links()).map(|link| chain.link(link).chunk.len()).sum::<usize>();
        links = chain.links();
        let document = Document::numbered(number, &chain);
        let timeline = Timeline::new(chain.links());
        // Spread over the gap, so that the load is even.
        let offset = gap * number / documents;
        let planned = (1..chain.links()).map(|link| PlannedEdit { link, at: offset + gap * (link - 1) });
        let part = Part { timeline: Arc::clone(&timeline), edits: planned.collect() };
        let session = Session::new(Dialect::Automerge, format!("writer-{number}"), document.clone(), 1);
        writers.add(pair.near.address(), session, part, clock.clone());
        timelines.push((document, timeline));
    }
    ensure!(
        writers.progress.wait_joined(documents, JOIN_PATIENCE).await == documents,
        "writers could not join"
    );
    for (number, (document, timeline)) in timelines.into_iter().enumerate() {
        let session = Session::new(Dialect::Automerge, format!("reader-{number}"), document, 0);
        readers.add(pair.far.address(), session, Part { timeline, edits: Vec::new() }, clock.clone());
    }
    ensure!(
        readers.progress.wait_joined(documents, JOIN_PATIENCE).await == documents,
        "readers could not join"
    );
    let before = Mark::now(pair).await?;
    clock_start.send_replace(Some(Instant::now() + Duration::from_millis(50)));
    let patience = gap * links + DRAIN;
    readers.progress.wait_complete(documents, patience).await;
    let after = Mark::now(pair).await?;
    let (mut latencies, mut delivered) = (Vec::new(), 0);
    for seen in readers.finish().await {
        latencies.extend(seen.latencies_us);
        delivered += seen.delivered;
    }
    writers.finish().await;
    let expected = u64::from(documents) * u64::from(links - 1);
    let per = |amount: f64| amount / delivered.max(1) as f64;
    let one_way = arguments.one_way_ms as f64;
    let beyond =
        |latencies: &mut [u32], percent| percentile_ms(latencies, percent).unwrap_or(f64::NAN) - one_way;
    Ok(Delivery {
        edits_per_second: rate,
        delivered,
        expected,
        p50_ms: beyond(&mut latencies, 50.0),
        p99_ms: beyond(&mut latencies, 99.0),
        sent_bytes: per(after.sent - before.sent),
        raw_bytes: per(after.raw - before.raw),
        own_bytes: own as f64 / expected as f64,
        writer_region_cpu_us: per((after.near_cpu - before.near_cpu).as_secs_f64() * 1e6),
        reader_region_cpu_us: per((after.far_cpu - before.far_cpu).as_secs_f64() * 1e6),
    })
}

async fn catch_up(pair: &mut Pair, arguments: &Arguments) -> Result<CatchUp> {
    pair.far.process.kill();
    let writers = arguments.documents;
    let edits = arguments.catch_up_changes / writers;
    let mut writing = tokio::task::JoinSet::new();
    let mut changes = 0;
    for number in 0..writers {
        let chain = Arc::new(Chain::build(Seed::numbered(number)?, edits as usize, 1)?);
        changes += u64::from(chain.links());
        let document = Document::numbered(number, &chain);
        let client =
            upload(&pair.near.address(), Dialect::Automerge, &document, &format!("writer-{number}")).await?;
        writing.spawn(write_all(client));
    }
    while let Some(written) = writing.join_next().await {
        written??;
    }
    let before = pair.near.metric("isobar_link_bytes_sent_total").await?;
    let database = pair.far.database.clone();
    pair.far = start_far(&pair.isobar, pair.scratch.path(), database, &pair.proxy).await?;
    let started = Instant::now();
    pair.wait_until_equal(CATCH_UP_PATIENCE).await?;
    let seconds = started.elapsed().as_secs_f64();
    let sent = pair.near.metric("isobar_link_bytes_sent_total").await? - before;
    Ok(CatchUp {
        changes,
        seconds,
        changes_per_second: changes as f64 / seconds,
        sent_bytes: sent / changes as f64,
    })
}

/// Changes that one writer keeps under way.
const WINDOW: u32 = 256;

/// Writes a whole chain, as fast as it is acknowledged.
async fn write_all(mut client: Client) -> Result<()> {
    let links = client.session.document().chain.links();
    while client.session.acknowledged() < links {
        while client.session.held() < links && client.session.held() - client.session.acknowledged() < WINDOW
        {
            client.edit().await?;
        }
        client.step().await?;
    }
    client.close().await;
    Ok(())
}
