//! The demo's regions and the ways between them: what can be started, killed, cut and healed.
//!
//! Every region is an [`App`] on a runtime of its own. To kill it is to drop that runtime: whatever it was doing ends in
//! mid-stride, as in a process that is killed, except that a database call under way finishes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinHandle;

use super::links::{Distance, Passage, Proxy};
use crate::app::App;
use crate::config::{PeerAddress, Settings};

/// Threads of a region. Two, so that one that computes does not keep it from answering.
const REGION_THREADS: usize = 2;

/// How long a kill waits for a database call that is under way.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// What a demo consists of; no more regions come later.
pub struct Regions {
    regions: Vec<Region>,
    links: Vec<Link>,
}

/// One region, up or down.
struct Region {
    settings: Settings,
    running: Mutex<Option<Running>>,
}

struct Running {
    /// Present until the value is dropped.
    runtime: Option<Runtime>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<anyhow::Result<()>>,
}

/// Both ways between two regions.
struct Link {
    between: [String; 2],
    usual: Distance,
    ways: [Proxy; 2],
}

/// What is asked about or acted upon and does not exist, or cannot be done now.
#[derive(Debug, thiserror::Error)]
pub enum RegionsError {
    /// Nothing was changed.
    #[error("there is no region {0:?}; there are {1}")]
    NoRegion(String, String),
    /// Nothing was changed.
    #[error("there is no link between {0:?} and {1:?}; there are {2}")]
    NoLink(String, String, String),
    /// Nothing was changed.
    #[error("{0}")]
    Already(String),
    /// The region is down.
    #[error("{0:#}")]
    Start(anyhow::Error),
}

/// A region, as `/state` shows it.
#[derive(Debug, Serialize)]
pub struct RegionState {
    pub name: String,
    /// "up", "down", or "failed" if it ended by itself.
    pub state: &'static str,
    pub clients: String,
    pub admin: String,
}

/// A link, as `/state` shows it.
#[derive(Debug, Serialize)]
pub struct LinkState {
    pub between: [String; 2],
    /// "open", "cut" or "refused".
    pub state: &'static str,
    /// Whether a connection is open on it that has delivered in both directions.
    pub connected: bool,
    pub one_way_ms: u64,
    pub bytes_per_second: Option<u64>,
    pub bytes_delivered: u64,
}

impl Regions {
    /// Makes the links of regions that have settings each, and enters the peers there. `distances` has a value for every
    /// pair, in the order of [`pairs`]. Nothing runs yet.
    pub async fn lay_out(mut settings: Vec<Settings>, distances: &[Distance]) -> anyhow::Result<Self> {
        let mut links = Vec::new();
        for ((a, b), usual) in pairs(settings.len()).zip(distances) {
            let way = async |settings: &mut [Settings], from: usize, to: usize| -> anyhow::Result<Proxy> {
                let target = settings[to].peer_listener().context("a region of a demo listens for peers")?;
                let proxy = Proxy::start(target, *usual).await?;
                settings[from].peers.push(PeerAddress::WebSocket(format!("ws://{}", proxy.address())));
                Ok(proxy)
            };
            let ways = [way(&mut settings, a, b).await?, way(&mut settings, b, a).await?];
            let between = [a, b].map(|it| settings[it].region.clone());
            links.push(Link { between, usual: *usual, ways });
        }
        let regions =
            settings.into_iter().map(|settings| Region { settings, running: Mutex::new(None) }).collect();
        Ok(Self { regions, links })
    }

    /// Starts every region; all at once, as each waits for its disk.
    pub async fn start_all(&self) -> anyhow::Result<()> {
        let starts = self.regions.iter().map(|region| async {
            region.start().await.with_context(|| format!("region {}", region.settings.region))
        });
        futures_util::future::try_join_all(starts).await.map(drop)
    }

    pub async fn start(&self, name: &str) -> Result<(), RegionsError> {
        self.region(name)?.start().await
    }

    /// Ends a region in mid-stride.
    pub async fn kill(&self, name: &str) -> Result<(), RegionsError> {
        let mut running = self.region(name)?.running.lock().await;
        let Some(mut killed) = running.take() else {
            return Err(RegionsError::Already(format!("region {name} is down already")));
        };
        if let Some(runtime) = killed.runtime.take() {
            let shut = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(KILL_PATIENCE));
            shut.await.expect("shutting a runtime down does not panic");
        }
        Ok(())
    }

    /// Stops every region that is up as an operator would; reports the first that failed.
    pub async fn drain_all(&self) -> anyhow::Result<()> {
        let drains = self.regions.iter().map(async |region| {
            let Some(mut running) = region.running.lock().await.take() else { return Ok(()) };
            // It may have ended by itself.
            let _ = running.stop_now();
            let drained = (&mut running.ended).await;
            drained?.with_context(|| format!("region {}", region.settings.region))
        });
        futures_util::future::join_all(drains).await.into_iter().collect()
    }

    pub fn cut(&self, a: &str, b: &str) -> Result<(), RegionsError> {
        self.link(a, b).map(|link| link.ways.iter().for_each(Proxy::cut))
    }

    /// Puts a link back to what it was at the start.
    pub fn heal(&self, a: &str, b: &str) -> Result<(), RegionsError> {
        let link = self.link(a, b)?;
        for way in &link.ways {
            way.set_distance(link.usual);
            way.heal();
        }
        Ok(())
    }

    /// Makes a link slow; what is not said is as it was at the start.
    pub fn slow(
        &self,
        (a, b): (&str, &str),
        one_way: Option<Duration>,
        bytes_per_second: Option<u64>,
    ) -> Result<(), RegionsError> {
        let link = self.link(a, b)?;
        let one_way = one_way.unwrap_or(link.usual.one_way);
        link.ways.iter().for_each(|way| way.set_distance(Distance { one_way, bytes_per_second }));
        Ok(())
    }

    pub async fn region_states(&self) -> Vec<RegionState> {
        futures_util::future::join_all(self.regions.iter().map(Region::state)).await
    }

    pub fn link_states(&self) -> Vec<LinkState> {
        self.links.iter().map(Link::state).collect()
    }

    fn region(&self, name: &str) -> Result<&Region, RegionsError> {
        let found = self.regions.iter().find(|it| it.settings.region == name);
        found.ok_or_else(|| {
            let there_are: Vec<_> = self.regions.iter().map(|it| it.settings.region.as_str()).collect();
            RegionsError::NoRegion(name.to_owned(), there_are.join(", "))
        })
    }

    fn link(&self, a: &str, b: &str) -> Result<&Link, RegionsError> {
        let found = self.links.iter().find(|it| it.between == [a, b] || it.between == [b, a]);
        found.ok_or_else(|| {
            let there_are: Vec<_> = self.links.iter().map(|it| it.between.join("/")).collect();
            RegionsError::NoLink(a.to_owned(), b.to_owned(), there_are.join(", "))
        })
    }
}

impl Region {
    async fn start(&self) -> Result<(), RegionsError> {
        let mut running = self.running.lock().await;
        if running.as_ref().is_some_and(|it| !it.ended.is_finished()) {
            return Err(RegionsError::Already(format!("region {} is up already", self.settings.region)));
        }
        *running = None;
        *running = Some(Running::start(self.settings.clone()).await.map_err(RegionsError::Start)?);
        Ok(())
    }

    async fn state(&self) -> RegionState {
        let state = match &*self.running.lock().await {
            None => "down",
            Some(running) if running.ended.is_finished() => "failed",
            Some(_) => "up",
        };
        let name = self.settings.region.clone();
        let url = |scheme: &str, address: SocketAddr| format!("{scheme}://{address}");
        let clients = url("ws", self.settings.listen);
        RegionState { name, state, clients, admin: url("http", self.settings.admin_listen) }
    }
}

impl Running {
    async fn start(settings: Settings) -> anyhow::Result<Self> {
        let region = settings.region.clone();
        let name = region.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(REGION_THREADS)
            .thread_name(&region)
            // Every log line of a region's threads says whose it is.
            .on_thread_start(move || std::mem::forget(tracing::error_span!("region", name).entered()))
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        // On a thread of its own: the compiler cannot prove that opening a database may move between threads.
        let handle = runtime.handle().clone();
        let started = runtime.spawn_blocking(move || handle.block_on(App::start(settings)));
        // From here on the runtime ends with the value, whatever happens.
        let mut running = Self { ended: tokio::spawn(async { Ok(()) }), stop, runtime: Some(runtime) };
        let app = started.await??;
        let runtime = running.runtime.as_ref().expect("it is taken when the value is dropped");
        running.ended = runtime.spawn(async move {
            let ended = app.run_until(async { drop(stopped.await) }).await;
            if let Err(error) = &ended {
                tracing::error!(error = format!("{error:#}"), "region ended by itself");
            }
            ended
        });
        Ok(running)
    }

    /// Asks the region to drain.
    fn stop_now(&mut self) -> Result<(), ()> {
        std::mem::replace(&mut self.stop, oneshot::channel().0).send(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // To wait for it is not allowed on a thread that runs tasks.
            runtime.shutdown_background();
        }
    }
}

impl Link {
    fn state(&self) -> LinkState {
        let [there, back] = &self.ways;
        let delivered = [there.delivered(), back.delivered()];
        let passage = there.passage();
        LinkState {
            between: self.between.clone(),
            state: match passage {
                Passage::Open => "open",
                Passage::Cut => "cut",
                Passage::Refused => "refused",
            },
            connected: passage == Passage::Open && delivered.iter().any(|it| it.connections > 0),
            one_way_ms: there.distance().one_way.as_millis() as u64,
            bytes_per_second: there.distance().bytes_per_second,
            bytes_delivered: delivered.iter().map(|it| it.bytes_there + it.bytes_back).sum(),
        }
    }
}

/// Every pair of `count` things, in order.
pub fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}

/// Reads `a-b=45`: the one-way time between two of the named regions, in milliseconds, as an index into their pairs.
pub fn parse_delay(text: &str, names: &[&str]) -> anyhow::Result<(usize, Duration)> {
    let form = || format!("a delay is A-B=MILLISECONDS, such as {}-{}=45", names[0], names[1]);
    let (between, ms) = text.split_once('=').with_context(form)?;
    let one_way = Duration::from_millis(ms.parse().ok().with_context(form)?);
    if one_way > super::links::ONE_WAY_MAX {
        bail!("a delay is at most {} ms", super::links::ONE_WAY_MAX.as_millis());
    }
    let written: BTreeMap<String, usize> = pairs(names.len())
        .enumerate()
        .flat_map(|(index, (a, b))| {
            [(format!("{}-{}", names[a], names[b]), index), (format!("{}-{}", names[b], names[a]), index)]
        })
        .collect();
    let index =
        written.get(between).with_context(|| format!("{}; the regions are {}", form(), names.join(", ")))?;
    Ok((*index, one_way))
}
