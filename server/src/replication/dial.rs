//! Keeping a link to each configured peer.
//!
//! Each address has a task that dials, serves the link until it ends, and dials again after a pause that grows with
//! failures and is drawn at random below its bound, so that regions do not come back all at once. A DNS name is looked up now
//! and then, and stands for all of its addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, InvalidMessage};
use tokio_tungstenite::tungstenite::http::StatusCode;
use tokio_tungstenite::{WebSocketStream, client_async_with_config, tungstenite};

use isobar_protocol::ids::RegionName;
use isobar_protocol::link::handshake::{HandshakeError, Refusal};

use super::link::{Line, LinkError, serve, shake_hands, socket_config};
use super::{Identities, Replication, tls};
use crate::config::PeerAddress;
use crate::config::cluster::tls_name;
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

/// Whom to dial.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    /// Host and port.
    address: String,
    /// What the request is for.
    url: String,
}

impl Target {
    fn of(url: String) -> Self {
        Self { address: host_and_port(&url).to_owned(), url }
    }

    /// The name that the certificate has to have, if TLS is to be spoken.
    fn tls_name(&self) -> Option<ServerName<'static>> {
        let host = host_and_port(&self.url).rsplit_once(':').map_or("", |(host, _)| host);
        let name = self.url.starts_with("wss://").then(|| tls_name(host));
        name.map(|name| name.expect("addresses of peers were checked when they were read"))
    }
}

/// Keeps links to all of these peers while this node keeps the region's links; to be run as a task.
pub async fn keep_links(
    replication: Replication,
    identities: Identities,
    metrics: Arc<Metrics>,
    peers: Vec<PeerAddress>,
) {
    loop {
        replication.until_keeping(true).await;
        let keeping = keep_all(replication.clone(), identities.clone(), metrics.clone(), peers.clone());
        tokio::select! {
            () = keeping => return,
            // What was dialled is dropped.
            () = replication.until_keeping(false) => {}
        }
    }
}

async fn keep_all(
    replication: Replication,
    identities: Identities,
    metrics: Arc<Metrics>,
    peers: Vec<PeerAddress>,
) {
    let mut tasks = JoinSet::new();
    for peer in peers {
        let (replication, identities, metrics) = (replication.clone(), identities.clone(), metrics.clone());
        match peer {
            PeerAddress::Dns { name, port, tls } => {
                let scheme = if tls { "wss" } else { "ws" };
                let url = format!("{scheme}://{name}:{port}");
                tasks.spawn(keep_named(replication, identities, metrics, Target::of(url)))
            }
            PeerAddress::WebSocket(url) => {
                tasks.spawn(keep_link(replication, identities, metrics, Target::of(url)))
            }
        };
    }
    while tasks.join_next().await.is_some() {}
}

/// Keeps a link to every address that a DNS name stands for. With TLS each is to have a certificate with that name.
async fn keep_named(replication: Replication, identities: Identities, metrics: Arc<Metrics>, named: Target) {
    let mut tasks = JoinSet::new();
    let mut known = BTreeMap::new();
    let mut failing = false;
    loop {
        match tokio::net::lookup_host(&named.address).await {
            Ok(addresses) => {
                failing = false;
                let target = |address: SocketAddr| Target { address: address.to_string(), ..named.clone() };
                let targets: BTreeSet<Target> = addresses.map(target).collect();
                known.retain(|target, task: &mut tokio::task::AbortHandle| {
                    let stays = targets.contains(target);
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                for target in targets {
                    known.entry(target.clone()).or_insert_with(|| {
                        tasks.spawn(keep_link(
                            replication.clone(),
                            identities.clone(),
                            metrics.clone(),
                            target,
                        ))
                    });
                }
            }
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(name = named.address, %error, "peers' name not found");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOKUP_INTERVAL).await;
    }
}

async fn keep_link(replication: Replication, identities: Identities, metrics: Arc<Metrics>, target: Target) {
    let Target { address, url } = &target;
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
        let ended = link_once(&replication, &identities, &metrics, &target, &mut region).await;
        if started.elapsed() >= LIVED {
            bound = PAUSE_FIRST;
            failing = false;
        }
        match ended {
            Err(LinkError::Handshake(HandshakeError::Refused(Refusal::KeptElsewhere))) => {
                // Its sibling may go at any moment, and this one be asked for.
                bound = PAUSE_FIRST;
                failing = false;
                tracing::debug!(url, "another node of the region keeps its links");
            }
            Err(LinkError::Superfluous) | Ok(()) => {}
            // Said once: it is tried again and again.
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(url, address, %error, "peer not linked, trying on");
            }
            Err(error) => tracing::debug!(url, address, %error, "peer not linked"),
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
    identities: &Identities,
    metrics: &Metrics,
    target: &Target,
    region: &mut Option<RegionName>,
) -> Result<(), LinkError> {
    let connected = tokio::time::timeout(CONNECT_PATIENCE, connect(identities, target)).await;
    let mut socket = connected.map_err(|_| LinkError::TimedOut)??;
    let identity = replication.identify(&identities.node).await.ok_or(LinkError::TimedOut)?;
    let proved = shake_hands(&mut socket, &identity, true).await?;
    *region = Some(proved.peer.region.clone());
    serve(replication, metrics, socket, proved, true).await
}

async fn connect(identities: &Identities, target: &Target) -> Result<WebSocketStream<Line>, LinkError> {
    let io = |error| LinkError::from(tungstenite::Error::Io(error));
    let stream = TcpStream::connect(&target.address).await.map_err(io)?;
    let _ = stream.set_nodelay(true);
    let line: Line = match target.tls_name() {
        None => Box::new(stream),
        Some(name) => {
            let connector = TlsConnector::from(identities.tls.configs().await.client);
            Box::new(connector.connect(name, stream).await.map_err(not_secured)?)
        }
    };
    match client_async_with_config(&target.url, line, Some(socket_config())).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(answer)) if answer.status() == StatusCode::UPGRADE_REQUIRED => {
            Err(LinkError::TlsExpected)
        }
        // With TLS 1.3 the dialler is through before the listener has looked at its certificate.
        Err(tungstenite::Error::Io(error)) if tls::cause(&error).is_some() => Err(LinkError::Tls(error)),
        Err(error) => Err(error.into()),
    }
}

fn not_secured(error: std::io::Error) -> LinkError {
    match tls::cause(&error) {
        // It answered with text.
        Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => LinkError::TlsUnexpected,
        _ => LinkError::Tls(error),
    }
}

/// What stands between `ws://` or `wss://` and the path, if there is one.
fn host_and_port(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}
