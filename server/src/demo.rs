//! `isobar demo`: three regions in one process, with simulated distance between them.
//!
//! Each region is what `isobar serve` runs, with a database of its own; what is simulated is the network between them
//! ([`links`]), which the control ([`control`]) cuts and heals. Everything listens on loopback.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tempfile::TempDir;
use tokio::net::TcpListener;

use self::links::Distance;
use self::regions::Regions;
use crate::config::{ClusterKey, Settings};

mod control;
pub mod links;
mod regions;

/// The regions.
const NAMES: [&str; 3] = ["frankfurt", "virginia", "singapore"];

/// One-way times between them, in the order of their pairs: about what the public internet takes.
const ONE_WAY_MS: [u64; 3] = [45, 80, 110];

/// How far the ports of a region are from those of the one before.
const PORT_STEP: u16 = 20;

/// Where the control's port is, from the first.
const CONTROL_PORT: u16 = 90;

/// How often it is looked whether the regions are linked, until they are.
const LINKED_LOOK_EVERY: Duration = Duration::from_millis(100);

/// The flags of `isobar demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where the regions' databases are kept
    #[arg(long, value_name = "DIR", default_value = "isobar-demo-data")]
    pub data: PathBuf,

    /// Start with empty databases, in a temporary directory that is removed at the end.
    #[arg(long, conflicts_with = "data")]
    pub fresh: bool,

    /// The first port. Clients are at PORT, PORT+20 and PORT+40; other regions one above, operators two above; the
    /// control is at PORT+90
    #[arg(long, value_name = "PORT", default_value_t = 4400, value_parser = clap::value_parser!(u16).range(1..=65_000))]
    pub port: u16,

    /// One-way time between two regions in milliseconds, such as frankfurt-virginia=45; give it once for each pair
    #[arg(long = "delay", value_name = "A-B=MS")]
    pub delays: Vec<String>,

    /// What to log to standard error, such as "info" or "warn,isobar=debug"
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub log: String,
}

/// Where the databases are, for as long as the demo runs.
struct Data {
    directory: PathBuf,
    _removed_at_end: Option<TempDir>,
    /// Held, so that a second demo does not take the databases away from the first.
    _lock: File,
}

/// Runs until `stop` resolves, then drains every region.
pub async fn run(args: &DemoArgs, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut distances = ONE_WAY_MS.map(|ms| Distance::of(Duration::from_millis(ms)));
    for delay in &args.delays {
        let (pair, one_way) = regions::parse_delay(delay, &NAMES)?;
        distances[pair].one_way = one_way;
    }
    // First of all, as a second demo on the same ports ends here, before it touches anything.
    let control_address = loopback(args.port + CONTROL_PORT);
    let listener = TcpListener::bind(control_address).await.with_context(|| {
        format!("cannot listen on {control_address}; another demo? --port moves all ports")
    })?;
    let data = Data::open(args)?;
    let settings = settings(args.port, &data.directory);
    let regions = Arc::new(Regions::lay_out(settings, &distances).await?);
    if let Err(error) = regions.start_all().await {
        // Those that are up hold nothing yet.
        let _ = regions.drain_all().await;
        return Err(error);
    }
    let control = control::routes(regions.clone());
    print!("{}", announcement(&regions, &data.directory, control_address).await);
    let served = tokio::spawn(async move { axum::serve(listener, control).await });
    let linked = tokio::spawn(say_when_linked(regions.clone()));
    stop.await;
    println!("Stopping.");
    linked.abort();
    served.abort();
    regions.drain_all().await
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// What each region would be given by an operator.
fn settings(port: u16, directory: &Path) -> Vec<Settings> {
    let cluster_key = ClusterKey::random();
    let first_ports = (0..).map(|index| port + index * PORT_STEP);
    let settings = NAMES.iter().zip(first_ports).map(|(name, port)| Settings {
        region: (*name).to_owned(),
        database: format!("sqlite:{}", directory.join(format!("{name}.db")).display()),
        listen: loopback(port),
        peer_listen: Some(loopback(port + 1)),
        admin_listen: loopback(port + 2),
        advertise: Some(format!("ws://{}", loopback(port))),
        cluster_id: "isobar-demo".to_owned(),
        cluster_key: Some(cluster_key.clone()),
        ..Settings::default()
    });
    settings.collect()
}

impl Data {
    fn open(args: &DemoArgs) -> anyhow::Result<Self> {
        let temporary = args.fresh.then(|| TempDir::with_prefix("isobar-demo-")).transpose()?;
        let directory = temporary.as_ref().map_or(args.data.as_path(), TempDir::path).to_owned();
        let shown = directory.display();
        std::fs::create_dir_all(&directory).with_context(|| format!("{shown} cannot be made"))?;
        let lock =
            File::create(directory.join("lock")).with_context(|| format!("{shown} cannot be written to"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { directory, _removed_at_end: temporary, _lock: lock }),
            Err(std::fs::TryLockError::WouldBlock) => {
                bail!("another demo runs on {shown}; --data or --fresh says otherwise")
            }
            Err(std::fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("{shown} cannot be locked"))
            }
        }
    }
}

/// What is running and where, and what to try.
async fn announcement(regions: &Regions, directory: &Path, control: SocketAddr) -> String {
    let mut text = "Three regions run in this process. Ctrl-C stops them.\n\n".to_owned();
    for region in regions.region_states().await {
        text += &format!("  {:<10} clients {}   operators {}\n", region.name, region.clients, region.admin);
    }
    for link in regions.link_states() {
        text += &format!("  {:<22} {} ms one way\n", link.between.join(" – "), link.one_way_ms);
    }
    text += &format!("  data       {}\n  control    http://{control}\n\n", directory.display());
    let [a, b, c] = NAMES;
    text += &format!("  curl http://{control}/state\n");
    text += &format!("  curl -X POST http://{control}/links/{a}/{b}/cut\n");
    text + &format!("  curl -X POST http://{control}/regions/{c}/kill\n\n")
}

/// Says in one line that every link carries a connection, as soon as it is so.
async fn say_when_linked(regions: Arc<Regions>) {
    let mut looks = tokio::time::interval(LINKED_LOOK_EVERY);
    loop {
        looks.tick().await;
        if regions.link_states().iter().all(|link| link.connected) {
            println!("Linked: {} reach each other.", NAMES.join(", "));
            return;
        }
    }
}
