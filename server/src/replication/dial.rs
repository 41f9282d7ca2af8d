//! Keeping a link to each configured peer.
//!
//! Each address has a task that dials, serves the link until it ends, and dials again after a pause that grows with
//! failures and is drawn at random below its bound, so that regions do not come back all at once. A DNS name is looked up now
//! and then, and stands for all of its addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::client_async_with_config;

use isobar_protocol::ids::RegionName;
use isobar_protocol::link::handshake::Identity;

use super::Replication;
use super::link::{LinkError, serve, shake_hands, socket_config};
use crate::config::PeerAddress;
use crate::telemetry::Metrics;

/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Bounds of the pause before the next attempt.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_LAST: Duration = Duration::from_secs(30);

/// A link that lived so long was no failure.
const LIVED: Duration = Duration::from_secs(10);

/// How often it is looked whether a link that the other side opened is still up.
const LINKED_PAUSE: Duration = Duration::from_millis(500);

/// How often DNS names are looked up.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(60);

/// Keeps links to all of these peers; to be run as a task.
pub async fn keep_links(
    replication: Replication,
    identity: Arc<Identity>,
    metrics: Arc<Metrics>,
    peers: Vec<PeerAddress>,
) {
    let mut tasks = JoinSet::new();
    for peer in peers {
        let (replication, identity, metrics) = (replication.clone(), identity.clone(), metrics.clone());
        match peer {
            PeerAddress::Dns { name, port } => {
                tasks.spawn(keep_named(replication, identity, metrics, format!("{name}:{port}")))
            }
            PeerAddress::WebSocket(url) => tasks.spawn(keep_link(replication, identity, metrics, url)),
        };
    }
    while tasks.join_next().await.is_some() {}
}

/// Keeps a link to every address that a DNS name stands for.
async fn keep_named(replication: Replication, identity: Arc<Identity>, metrics: Arc<Metrics>, name: String) {
    let mut tasks = JoinSet::new();
    let mut known = BTreeMap::new();
    let mut failing = false;
    loop {
        match tokio::net::lookup_host(&name).await {
            Ok(addresses) => {
                failing = false;
                let addresses: BTreeSet<String> = addresses.map(|it| format!("ws://{it}")).collect();
                known.retain(|address, task: &mut tokio::task::AbortHandle| {
                    let stays = addresses.contains(address);
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                for address in addresses {
                    known.entry(address.clone()).or_insert_with(|| {
                        tasks.spawn(keep_link(
                            replication.clone(),
                            identity.clone(),
                            metrics.clone(),
                            address,
                        ))
                    });
                }
            }
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(name, %error, "peers' name not found");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOKUP_INTERVAL).await;
    }
}

async fn keep_link(replication: Replication, identity: Arc<Identity>, metrics: Arc<Metrics>, url: String) {
    let mut bound = PAUSE_FIRST;
    let mut failing = false;
    // Who answered last.
    let mut region: Option<RegionName> = None;
    loop {
        while region.as_ref().is_some_and(|region| replication.is_linked_to(region)) {
            // By a link that the other side opened.
            failing = false;
            bound = PAUSE_FIRST;
            tokio::time::sleep(LINKED_PAUSE).await;
        }
        let started = Instant::now();
        let ended = link_once(&replication, &identity, &metrics, &url, &mut region).await;
        if started.elapsed() >= LIVED {
            bound = PAUSE_FIRST;
            failing = false;
        }
        match ended {
            Err(LinkError::Superfluous) | Ok(()) => {}
            // Said once: it is tried again and again.
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(url, %error, "peer not linked, trying on");
            }
            Err(error) => tracing::debug!(url, %error, "peer not linked"),
        }
        tokio::time::sleep(bound.mul_f64(random_fraction())).await;
        bound = (bound * 2).min(PAUSE_LAST);
    }
}

/// Any number from 0 up to 1; the identifiers' generator is random enough for a pause.
fn random_fraction() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}

async fn link_once(
    replication: &Replication,
    identity: &Identity,
    metrics: &Metrics,
    url: &str,
    region: &mut Option<RegionName>,
) -> Result<(), LinkError> {
    let connect = async {
        let stream = TcpStream::connect(host_and_port(url))
            .await
            .map_err(|error| LinkError::from(tokio_tungstenite::tungstenite::Error::Io(error)))?;
        let _ = stream.set_nodelay(true);
        let (socket, _) = client_async_with_config(url, stream, Some(socket_config())).await?;
        Ok::<_, LinkError>(socket)
    };
    let mut socket =
        tokio::time::timeout(CONNECT_PATIENCE, connect).await.map_err(|_| LinkError::TimedOut)??;
    let peer = shake_hands(&mut socket, identity, true).await?;
    *region = Some(peer.region.clone());
    serve(replication, metrics, socket, peer, true).await
}

/// What stands between `ws://` and the path, if there is one.
fn host_and_port(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}
