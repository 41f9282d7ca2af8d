//! Taking the links that other regions open.
//!
//! Whoever connects says with its first byte whether it speaks TLS. One that does not do as this listener does is told so, in
//! plain HTTP, which a dialler of either kind can make sense of.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{WebSocketStream, accept_async_with_config, tungstenite};

use isobar_protocol::link::handshake::Refusal;

use super::link::{Line, LinkError, Proved, refuse_peer, serve, shake_hands, socket_config};
use super::{Identities, Replication};
use crate::telemetry::Metrics;

/// Links and attempts at the same time at most. Tens of regions need tens; the rest are strangers.
const CONNECTIONS_MAX: usize = 256;

/// Of them, those that have not proved yet who they are. All regions may come back at once; strangers never take up the
/// rest.
const UNPROVED_MAX: usize = 128;

/// How long TLS and the upgrade to a WebSocket may take.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(5);

/// Pause after the listener fails, as it does when file descriptors run out.
const RETRY: Duration = Duration::from_millis(500);

/// The first byte of whoever speaks TLS.
const TLS_HANDSHAKE: u8 = 22;

/// What somebody is told who speaks TLS where it is not spoken.
const NO_TLS_HERE: &str = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// What somebody is told who does not where it is.
const TLS_HERE: &str = "HTTP/1.1 426 Upgrade Required\r\nUpgrade: TLS/1.0\r\nConnection: Upgrade, close\r\nContent-Length: 0\r\n\r\n";

/// Bytes that are read of somebody who was refused, so that the refusal is not lost with what was not read.
const REFUSED_BYTES_MAX: u64 = 64 << 10;

/// How long somebody who was refused may take to hear it.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);

/// Accepts links; to be run as a task.
pub async fn accept_links(
    replication: Replication,
    identities: Identities,
    metrics: Arc<Metrics>,
    listener: TcpListener,
) {
    let unproved = Arc::new(Semaphore::new(UNPROVED_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "link not accepted");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let permit = unproved.clone().try_acquire_owned().ok();
        let Some(permit) = permit.filter(|_| connections.len() < CONNECTIONS_MAX) else {
            metrics.links_refused.increment(1);
            tracing::debug!(%address, "link refused, too many connections");
            continue;
        };
        let (replication, identities, metrics) = (replication.clone(), identities.clone(), metrics.clone());
        connections.spawn(async move {
            match prove(&replication, &identities, stream, permit).await {
                Ok((socket, proved)) => {
                    if let Err(error) = serve(&replication, &metrics, socket, proved, false).await {
                        tracing::debug!(%address, %error, "link ended");
                    }
                }
                Err(error @ LinkError::KeptElsewhere) => tracing::debug!(%address, %error, "link refused"),
                // Somebody who only looks whether there is a listener.
                Err(LinkError::Closed) => tracing::debug!(%address, "closed before it was a link"),
                Err(error) => {
                    metrics.links_refused.increment(1);
                    tracing::warn!(%address, %error, "link refused");
                }
            }
        });
    }
}

/// Has the other end prove who it is; the permit is given back afterwards.
async fn prove(
    replication: &Replication,
    identities: &Identities,
    stream: TcpStream,
    _unproved: OwnedSemaphorePermit,
) -> Result<(WebSocketStream<Line>, Proved), LinkError> {
    let _ = stream.set_nodelay(true);
    let upgrade = async {
        let line = secure(identities, stream).await?;
        Ok::<_, LinkError>(accept_async_with_config(line, Some(socket_config())).await?)
    };
    let upgraded = tokio::time::timeout(UPGRADE_PATIENCE, upgrade).await;
    let mut socket = upgraded.map_err(|_| LinkError::TimedOut)??;
    if !replication.keeps_links() {
        refuse_peer(&mut socket, Refusal::KeptElsewhere).await?;
        return Err(LinkError::KeptElsewhere);
    }
    let identity = replication.identify(&identities.node).await.ok_or(LinkError::TimedOut)?;
    let proved = shake_hands(&mut socket, &identity, false).await?;
    Ok((socket, proved))
}

/// Puts TLS on a connection, if that is what this listener does.
async fn secure(identities: &Identities, stream: TcpStream) -> Result<Line, LinkError> {
    let mut first = [0];
    let io = |error| LinkError::from(tungstenite::Error::Io(error));
    if stream.peek(&mut first).await.map_err(io)? == 0 {
        return Err(LinkError::Closed);
    }
    match (identities.tls.configs().await.server, first[0] == TLS_HANDSHAKE) {
        (None, false) => Ok(Box::new(stream)),
        (None, true) => {
            refuse(stream, NO_TLS_HERE).await;
            Err(LinkError::TlsUnexpected)
        }
        (Some(_), false) => {
            refuse(stream, TLS_HERE).await;
            Err(LinkError::TlsExpected)
        }
        (Some(config), true) => match TlsAcceptor::from(config).accept(stream).into_fallible().await {
            Ok(stream) => Ok(Box::new(stream)),
            Err((error, stream)) => {
                // The reason was sent.
                refuse(stream, "").await;
                Err(LinkError::Tls(error))
            }
        },
    }
}

/// Says something and ends the connection in order: closed with something unread it would be reset, and what was said
/// perhaps lost.
async fn refuse(mut stream: TcpStream, say: &str) {
    let said = async {
        stream.write_all(say.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = stream.take(REFUSED_BYTES_MAX);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // It is gone, or does not care.
    let _ = tokio::time::timeout(REFUSAL_PATIENCE, said).await;
}
