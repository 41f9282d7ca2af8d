//! Assembly: opens the storage, starts the tasks and the listeners, and takes them down in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use isobar_protocol::ids::{PeerId, RegionName};
use isobar_protocol::link::Progress;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::commit::Committer;
use crate::config::Settings;
use crate::documents::Documents;
use crate::http::{self, CountingListener, Traffic};
use crate::materialise::Materialiser;
use crate::node::{Node, Sessions};
use crate::outbox::Closing;
use crate::receipts::Receipts;
use crate::replication::{Parts, PeerTls, Replication};
use crate::scrub::Surveyor;
use crate::scrub::verify::Verifier;
use crate::siblings::Siblings;
use crate::siblings::exchange::{self, Exchange};
use crate::siblings::follow::{Follower, Positions};
use crate::storage::{self, ClaimedOrigin, Storage, StorageError, StoredOrigin};
use crate::telemetry::Metrics;

mod erasure;
mod regions;

use regions::Regions;

/// How often idle documents are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// How often quarantined documents are counted.
const QUARANTINE_COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// How often the log is truncated.
const TRUNCATE_INTERVAL: Duration = Duration::from_secs(60);

/// How long log entries are kept for siblings to follow. Who is behind for longer reads its documents anew.
const SIBLINGS_KEEP: Duration = Duration::from_secs(60);

/// A node that is being served.
pub struct App {
    pub client_address: SocketAddr,
    pub admin_address: SocketAddr,
    /// Where other regions reach this one, if they may.
    pub peer_address: Option<SocketAddr>,
    pub node: Arc<Node>,
    connections: TaskTracker,
    stop_clients: CancellationToken,
    stop_admin: CancellationToken,
    stop_upkeep: CancellationToken,
    listeners: Vec<JoinHandle<()>>,
    upkeep: FuturesUnordered<JoinHandle<()>>,
    siblings: Siblings,
    committer: JoinHandle<Result<(), StorageError>>,
}

impl App {
    /// Opens the database and starts a node on it. When this returns, its listeners accept.
    pub async fn start(settings: Settings) -> anyhow::Result<Self> {
        // What is wrong with certificates is said before anything is made.
        PeerTls::load(&settings)?;
        let storage = storage::open(&settings.database).await.context("the database cannot be opened")?;
        Self::start_with(settings, storage).await
    }

    /// As [`App::start`], on a storage that is open.
    pub async fn start_with(settings: Settings, storage: Arc<dyn Storage>) -> anyhow::Result<Self> {
        let region = RegionName::new(&settings.region)?;
        let storage_id = storage.region_identity(&region).await?;
        let seat = storage.take_seat().await.context("no seat among the region's nodes")?;
        let origins = claim_origins(&settings, &region, seat.slot, &*storage).await?;
        let positions = Positions::read(&*storage).await?;

        let metrics = Arc::new(Metrics::new());
        let (documents, compactor) = Documents::new(
            storage.clone(),
            metrics.clone(),
            Materialiser::new(metrics.clone()),
            settings.limits(),
            settings.resident_bytes_max,
            settings.idle(),
        );
        let (committer, commits) =
            Committer::new(storage.clone(), origins, documents.clone(), metrics.clone());
        let peer_id = PeerId::new(&format!("isobar-{region}-{}", uuid::Uuid::new_v4().simple()))?;
        let (following, followed) = watch::channel(Vec::new());
        let receipts = Receipts::new(region.clone(), storage_id.clone());
        let exchange = Exchange::new(
            &seat,
            exchange::Parts {
                documents: documents.clone(),
                committer: committer.clone(),
                receipts: receipts.clone(),
                metrics: metrics.clone(),
            },
        );
        let progress = region_progress(&region, following);
        let follower = Follower::new(storage.clone(), exchange.clone(), positions, progress);
        let shares_database = seat.notices.can_be_heard();
        let siblings =
            Siblings::start(seat, exchange.clone(), follower, committer.written().clone(), metrics.clone());
        let parts = Parts {
            storage: storage.clone(),
            documents: documents.clone(),
            committer: committer.clone(),
            metrics: metrics.clone(),
            receipts: receipts.clone(),
            surveyor: Surveyor::new(storage.clone(), documents.clone()),
            advertise: settings.advertise.clone(),
            groups: settings.groups.clone(),
            peer_rate_limit: settings.peer_rate_limit,
            frame_limits: settings.frame_limits,
            exchange: exchange.clone(),
            keeps_links: siblings.keeps_links(),
            siblings: followed,
        };
        let stop_upkeep = CancellationToken::new();
        let regions = Regions::start(&settings, &storage_id, parts, &stop_upkeep).await?;
        let clients = listen(settings.listen).await?;
        let admin = listen(settings.admin_listen).await?;
        let node = Arc::new(Node {
            settings,
            peer_id,
            storage_id,
            storage,
            documents,
            committer,
            replication: regions.replication,
            exchange,
            receipts: receipts.clone(),
            sessions: Sessions::default(),
            metrics,
            draining: AtomicBool::new(false),
        });
        let connections = TaskTracker::new();
        let stop_clients = CancellationToken::new();
        let stop_admin = CancellationToken::new();
        let client_routes = http::client_routes(node.clone(), connections.clone());
        let admin_routes = http::admin_routes(node.clone(), connections.clone());
        let mut upkeep = vec![
            tokio::spawn(cancellable(stop_upkeep.clone(), compactor.run())),
            tokio::spawn(cancellable(stop_upkeep.clone(), sweep(node.clone()))),
            tokio::spawn(cancellable(stop_upkeep.clone(), erasure::run(node.clone()))),
            tokio::spawn(cancellable(stop_upkeep.clone(), count_quarantined(node.clone()))),
        ];
        let follow = receipts.run(node.replication.clone());
        upkeep.push(tokio::spawn(cancellable(stop_upkeep.clone(), follow)));
        upkeep.extend(regions.tasks);
        if let Some(verifier) = verifier(&node) {
            upkeep.push(tokio::spawn(cancellable(stop_upkeep.clone(), verifier.run())));
        }
        if node.replication.is_none() {
            upkeep.push(tokio::spawn(cancellable(
                stop_upkeep.clone(),
                truncate(node.clone(), shares_database),
            )));
        }
        Ok(Self {
            peer_address: regions.address,
            client_address: clients.local_addr()?,
            admin_address: admin.local_addr()?,
            listeners: vec![
                serve(clients, client_routes, stop_clients.clone()),
                serve(admin, admin_routes, stop_admin.clone()),
            ],
            upkeep: upkeep.into_iter().collect(),
            siblings,
            committer: tokio::spawn(commits),
            node,
            connections,
            stop_clients,
            stop_admin,
            stop_upkeep,
        })
    }

    /// Serves until `stop` resolves, then drains; or until the storage fails for good.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::select! {
            () = stop => self.drain().await,
            reason = failed(self.node.replication.as_ref()) => {
                anyhow::bail!("{reason}; started again, the node takes a new log and fetches what it lost")
            }
            reason = self.siblings.failed() => anyhow::bail!("{reason}"),
            error = panicked(&mut self.upkeep) => {
                Err(error).context("a task of the node has panicked; without it what is served would grow old")
            }
            failed = &mut self.committer => {
                failed?.context("the storage failed, nothing more can be acknowledged")?;
                anyhow::bail!("the committer stopped by itself")
            }
        }
    }

    /// Takes no more clients, tells those there are to come back, spread over time so that they do not return all at
    /// once, finishes what is being committed, and closes the storage.
    async fn drain(self) -> anyhow::Result<()> {
        let patience = self.node.settings.drain();
        tracing::info!(connections = self.connections.len(), "draining");
        self.node.draining.store(true, Ordering::Relaxed);
        // Whoever comes now is refused by the network, which every client takes for "not there, try again": the stock
        // client for Node throws at any other refusal. Operators can still look.
        self.stop_clients.cancel();
        self.connections.close();
        close_spread(&self.node, patience / 2).await;
        if tokio::time::timeout(patience / 2, self.connections.wait()).await.is_err() {
            tracing::warn!(connections = self.connections.len(), "connections left over are cut");
        }
        self.stop_admin.cancel();
        self.stop_upkeep.cancel();
        for task in self.listeners.into_iter().chain(self.upkeep) {
            let _ = tokio::time::timeout(Duration::from_secs(1), task).await;
        }
        let storage = self.node.storage.clone();
        // Everything submitted is committed before the handles are gone: the budget is empty then.
        self.node.committer.settled(patience).await;
        // Whoever takes the seat now may take the log, too: nothing is written any more.
        self.siblings.leave().await;
        storage.close().await;
        if self.committer.is_finished() {
            self.committer.await?.context("the storage failed, not everything was committed")?;
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// Asks every connection to end, at moments spread evenly over `spread`, or at once if there are few.
async fn close_spread(node: &Node, spread: Duration) {
    const AT_ONCE: usize = 100;
    let outboxes = node.sessions.outboxes();
    let steps = outboxes.len().div_ceil(AT_ONCE).max(1) as u32;
    for (step, some) in outboxes.chunks(AT_ONCE).enumerate() {
        if step > 0 {
            tokio::time::sleep(spread / steps).await;
        }
        some.iter().for_each(|outbox| outbox.close(Closing::Drain));
    }
}

/// Claims a log for each group whose documents this region holds. A node that has to do with other regions takes new ones.
async fn claim_origins(
    settings: &Settings,
    region: &RegionName,
    slot: u32,
    storage: &dyn Storage,
) -> anyhow::Result<Vec<ClaimedOrigin>> {
    let anew = settings.peer_listener().is_some();
    let mut origins = Vec::new();
    for group in settings.groups.of(region) {
        let origin = storage.claim_origin(region, &group, slot, anew).await?;
        tracing::info!(%region, %group, origin = %origin.id.0, seq = origin.last_seq.0, "origin claimed");
        origins.push(origin);
    }
    Ok(origins)
}

/// What hashes stored bytes again, unless that is switched off.
fn verifier(node: &Node) -> Option<Verifier> {
    let bytes_per_second = node.settings.verify_rate;
    (bytes_per_second > 0).then(|| Verifier {
        storage: node.storage.clone(),
        documents: node.documents.clone(),
        committer: node.committer.clone(),
        replication: node.replication.clone(),
        metrics: node.metrics.clone(),
        bytes_per_second,
    })
}

/// Passes on how far the origins of this region are that other nodes write. Former ones are written by nobody: what they
/// lost comes back from other regions.
fn region_progress(
    region: &RegionName,
    following: watch::Sender<Vec<Progress>>,
) -> impl Fn(&[StoredOrigin]) + Send + use<> {
    let region = region.clone();
    move |origins| {
        let ours = origins.iter().filter(|origin| origin.region == region && origin.claimed);
        let ours = ours.map(|it| Progress {
            origin: it.id,
            region: it.region.clone(),
            group: it.group.clone(),
            seq: it.seq,
            chain: it.chain,
        });
        let ours: Vec<Progress> = ours.collect();
        following.send_if_modified(|known| {
            let moved = *known != ours;
            *known = ours;
            moved
        });
    }
}

/// Resolves when one of these tasks has panicked. That one has ended is no fault.
async fn panicked(tasks: &mut FuturesUnordered<JoinHandle<()>>) -> JoinError {
    while let Some(ended) = tasks.next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            return error;
        }
    }
    std::future::pending().await
}

/// Resolves when replication finds that this node must not write any more.
async fn failed(replication: Option<&Replication>) -> String {
    match replication {
        Some(replication) => replication.failed().await,
        None => std::future::pending().await,
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

fn serve(listener: TcpListener, routes: Router, stop: CancellationToken) -> JoinHandle<()> {
    let listener = CountingListener(listener);
    let routes = routes.into_make_service_with_connect_info::<Traffic>();
    tokio::spawn(async move {
        let served = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "listener failed");
        }
    })
}

async fn cancellable(stop: CancellationToken, work: impl Future<Output = ()>) {
    stop.run_until_cancelled(work).await;
}

async fn sweep(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        node.documents.sweep();
        node.metrics.run_upkeep();
    }
}

/// Reports how many documents are quarantined. Counted in storage, because siblings and operators set that state as well.
async fn count_quarantined(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(QUARANTINE_COUNT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match node.storage.count_quarantined().await {
            Ok(count) => node.metrics.in_quarantine.set(count as f64),
            Err(error) => tracing::debug!(%error, "quarantined documents not counted"),
        }
    }
}

/// Gives up log entries that no region needs any more. A single region has nobody to send them to; but siblings, if there
/// can be any, read them for a while.
async fn truncate(node: Arc<Node>, shares_database: bool) {
    let keep = if shares_database { SIBLINGS_KEEP } else { Duration::ZERO };
    let mut ticks = tokio::time::interval(TRUNCATE_INTERVAL);
    let progress = node.committer.progress();
    loop {
        ticks.tick().await;
        let logs = progress.borrow().clone();
        for log in logs {
            if let Err(error) = node.storage.truncate_log(log.origin, log.seq, keep).await {
                tracing::warn!(%error, "log not truncated");
            }
        }
        node.metrics.log_truncations.increment(1);
    }
}

/// Resolves at SIGTERM or Ctrl-C.
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).expect("signal handlers can be installed");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
