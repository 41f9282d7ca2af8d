//! Taking the links that other regions open.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_tungstenite::accept_async_with_config;

use isobar_protocol::link::handshake::Identity;

use super::Replication;
use super::link::{LinkError, serve, shake_hands, socket_config};
use crate::telemetry::Metrics;

/// Links and attempts at the same time at most. Tens of regions need tens; the rest are strangers.
const CONNECTIONS_MAX: usize = 256;

/// How long the upgrade to a WebSocket may take.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(5);

/// Pause after the listener fails, as it does when file descriptors run out.
const RETRY: Duration = Duration::from_millis(500);

/// Accepts links; to be run as a task.
pub async fn accept_links(
    replication: Replication,
    identity: Arc<Identity>,
    metrics: Arc<Metrics>,
    listener: TcpListener,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "link not accepted");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if connections.len() >= CONNECTIONS_MAX {
            continue;
        }
        let (replication, identity, metrics) = (replication.clone(), identity.clone(), metrics.clone());
        connections.spawn(async move {
            if let Err(error) = accept(&replication, &identity, &metrics, stream).await {
                tracing::debug!(%error, "link ended");
            }
        });
    }
}

async fn accept(
    replication: &Replication,
    identity: &Identity,
    metrics: &Metrics,
    stream: TcpStream,
) -> Result<(), LinkError> {
    let _ = stream.set_nodelay(true);
    let upgrade = accept_async_with_config(stream, Some(socket_config()));
    let upgraded = tokio::time::timeout(UPGRADE_PATIENCE, upgrade).await;
    let mut socket = upgraded.map_err(|_| LinkError::TimedOut)??;
    let peer = shake_hands(&mut socket, identity, false).await.inspect_err(|error| {
        metrics.links_refused.increment(1);
        tracing::warn!(%error, "link refused");
    })?;
    serve(replication, metrics, socket, peer, false).await
}
