//! One link's socket: the handshake, then frames in and out until it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use isobar_protocol::config::LINK_FRAME_BYTES_MAX;
use isobar_protocol::link::FEATURE_PARTS;
use isobar_protocol::link::handshake::{
    Agreed, Handshake, HandshakeError, Hello, Identity, NodeId, Nonce, Refusal, Step,
};
use isobar_protocol::link::{CLONED, LinkFrame};
use isobar_protocol::replica::{LinkId, Peer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};

use super::envelope::{Envelope, Opener, Sealer, message_bytes_max};
use super::outgoing::Outgoing;
use super::pace::Pace;
use super::parts::{Assembly, FrameLimits, PartsError};
use super::{Event, Replication, Verdict};
use crate::telemetry::{LinkSent, Metrics};

/// How long the handshake may take.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// How long what was sent last is given to leave when a link is closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// Why a link ended or never came to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the connection failed: {0}")]
    Socket(#[from] Box<tungstenite::Error>),
    #[error("the connection was closed")]
    Closed,
    #[error("TLS failed: {0}")]
    Tls(std::io::Error),
    /// A dialler without TLS met a listener with it.
    #[error("the listener speaks TLS: it is dialled as wss:// or dns+wss://")]
    TlsExpected,
    /// A dialler with TLS met a listener without it.
    #[error("the listener does not speak TLS: it needs peer_tls_cert, or is dialled as ws:// or dns://")]
    TlsUnexpected,
    #[error("no answer in time")]
    TimedOut,
    #[error("the peer was refused: {0}")]
    Handshake(#[from] HandshakeError),
    #[error("the peer sent what cannot be read: {0}")]
    Envelope(#[from] super::envelope::EnvelopeError),
    #[error("the peer sent what cannot be put together: {0}")]
    Parts(#[from] PartsError),
    #[error("compression failed: {0}")]
    Compression(#[from] std::io::Error),
    /// There is a link to that region already, and it goes before this one.
    #[error("another link to this region is up")]
    Superfluous,
    /// There is a link to that region already, by a node on another database; the other end was told.
    #[error("{CLONED}")]
    Cloned,
    /// This node is not the one of its region that links to others; the other end was told.
    #[error("another node of this region keeps its links")]
    KeptElsewhere,
}

impl From<tungstenite::Error> for LinkError {
    fn from(error: tungstenite::Error) -> Self {
        Self::Socket(Box::new(error))
    }
}

/// Who is at the other end, as it has proved.
pub(super) struct Proved {
    pub(super) peer: Peer,
    /// The nodes that were started on its database, if it says so.
    pub(super) lineage: Option<Vec<NodeId>>,
}

/// The bytes of a link, with or without TLS.
pub(super) type Line = Box<dyn Duplex>;

/// What reads and writes.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// How both ends set their sockets up.
pub(super) fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(message_bytes_max(LINK_FRAME_BYTES_MAX)))
        .max_frame_size(Some(message_bytes_max(LINK_FRAME_BYTES_MAX)))
}

/// Proves to the other end who this node is, and has it prove who it is.
pub(super) async fn shake_hands<S>(
    socket: &mut WebSocketStream<S>,
    identity: &Identity,
    dialled_here: bool,
) -> Result<Proved, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let proving = async {
        let agreed = prove(socket, identity, dialled_here).await;
        if let Err(LinkError::Handshake(error)) = &agreed
            && let Some(refusal) = error.refusal()
        {
            say(socket, refusal).await?;
        }
        agreed
    };
    let agreed =
        tokio::time::timeout(HANDSHAKE_PATIENCE, proving).await.map_err(|_| LinkError::TimedOut)??;
    let Hello { region, node, storage_id, groups, features, client_url, lineage } = agreed.peer;
    Ok(Proved { peer: Peer { region, node, storage_id, groups, client_url, features }, lineage })
}

/// Hears who is at the other end, and refuses it.
pub(super) async fn refuse_peer<S>(socket: &mut WebSocketStream<S>, refusal: Refusal) -> Result<(), LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let refusing = async {
        // A socket that is closed with something unread may take what was said last with it.
        hear(socket).await?;
        say(socket, refusal.encode()).await
    };
    tokio::time::timeout(HANDSHAKE_PATIENCE, refusing).await.map_err(|_| LinkError::TimedOut)?
}

async fn prove<S>(
    socket: &mut WebSocketStream<S>,
    identity: &Identity,
    dialled_here: bool,
) -> Result<Agreed, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut handshake = match dialled_here {
        false => Handshake::accept(identity.clone(), nonce()),
        true => {
            let (handshake, opening) = Handshake::dial(identity.clone(), nonce());
            say(socket, opening).await?;
            handshake
        }
    };
    loop {
        let message = hear(socket).await?;
        match handshake.receive(&message)? {
            Step::Answer { handshake: next, send } => {
                say(socket, send).await?;
                handshake = next;
            }
            Step::Done { agreed, send } => {
                if let Some(send) = send {
                    say(socket, send).await?;
                }
                return Ok(agreed);
            }
        }
    }
}

/// Random bytes from the generator of identifiers: 244 of their 256 bits are random.
fn nonce() -> Nonce {
    let halves = [uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes()];
    let mut nonce = [0; 32];
    nonce.copy_from_slice(halves.as_flattened());
    Nonce(nonce)
}

async fn say<S>(socket: &mut WebSocketStream<S>, message: Vec<u8>) -> Result<(), LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Ok(socket.send(Message::Binary(message.into())).await?)
}

async fn hear<S>(socket: &mut WebSocketStream<S>) -> Result<Bytes, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match socket.next().await {
            Some(Ok(Message::Binary(message))) => return Ok(message),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(_)) | None => return Err(LinkError::Closed),
            Some(Err(error)) => return Err(error.into()),
        }
    }
}

/// Serves a link whose peer has proved who it is, until it ends.
pub(super) async fn serve<S>(
    replication: &Replication,
    metrics: &Metrics,
    socket: WebSocketStream<S>,
    Proved { peer, lineage }: Proved,
    dialled_here: bool,
) -> Result<(), LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let link = LinkId(replication.shared.next_link.fetch_add(1, Ordering::Relaxed));
    let limits = replication.shared.frame_limits;
    let outgoing = Arc::new(Outgoing::to(peer.features.contains(FEATURE_PARTS)));
    let pace = Pace::new(replication.shared.peer_rate_limit, Instant::now());
    let counted = metrics.link_sent(&peer.region);
    let (kept, is_kept) = oneshot::channel();
    let opened = Event::Opened { link, peer, lineage, dialled_here, outgoing: outgoing.clone(), kept };
    let (sink, mut stream) = socket.split();
    let first = match dialled_here {
        true => None,
        false => Some(first_message(&mut stream).await?),
    };
    replication.events.send(opened).await.map_err(|_| LinkError::Closed)?;
    match is_kept.await.unwrap_or(Verdict::Superfluous) {
        Verdict::Kept => {}
        Verdict::Superfluous => {
            metrics.links_superfluous.increment(1);
            return Err(LinkError::Superfluous);
        }
        Verdict::Cloned => {
            outgoing.push(LinkFrame::Failed { message: CLONED.to_owned() });
            outgoing.close();
            let refusing = async {
                write(metrics, &counted, &outgoing, pace, sink).await?;
                // Closed with something unread it would be reset, and what was said perhaps lost.
                while stream.next().await.is_some_and(|message| message.is_ok()) {}
                Ok(())
            };
            let refused: Result<Result<(), LinkError>, _> =
                tokio::time::timeout(CLOSE_PATIENCE, refusing).await;
            return refused.unwrap_or(Ok(())).and(Err(LinkError::Cloned));
        }
    }
    let stream = futures_util::stream::iter(first.map(Ok)).chain(stream);
    let ended = tokio::select! {
        ended = read(replication, metrics, link, &limits, stream) => ended,
        ended = write(metrics, &counted, &outgoing, pace, sink) => ended,
        () = async { outgoing.closed().await; tokio::time::sleep(CLOSE_PATIENCE).await } => Ok(()),
    };
    let _ = replication.events.send(Event::Closed { link }).await;
    ended
}

/// What a dialler says first. One that is linked to this region already says nothing and closes: until it speaks, a link that
/// is up is left alone.
async fn first_message(
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
) -> Result<Message, LinkError> {
    let message = tokio::time::timeout(HANDSHAKE_PATIENCE, stream.next()).await;
    Ok(message.map_err(|_| LinkError::TimedOut)?.ok_or(LinkError::Closed)??)
}

async fn read(
    replication: &Replication,
    metrics: &Metrics,
    link: LinkId,
    limits: &FrameLimits,
    mut stream: impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
) -> Result<(), LinkError> {
    let mut opener = Opener::new(limits.frame_bytes_max)?;
    let mut assembly = Assembly::new(limits);
    while let Some(message) = stream.next().await {
        let message = match message? {
            Message::Binary(message) => message,
            Message::Close(_) => return Ok(()),
            _ => continue,
        };
        metrics.link_bytes_received.increment(message.len() as u64);
        for frame in opener.open(&message)? {
            let Some(frame) = assembly.receive(frame)? else { continue };
            let event = Event::Frame { link, frame };
            replication.events.send(event).await.map_err(|_| LinkError::Closed)?;
        }
    }
    Ok(())
}

async fn write(
    metrics: &Metrics,
    counted: &LinkSent,
    outgoing: &Outgoing,
    mut pace: Pace,
    mut sink: impl Sink<Message, Error = tungstenite::Error> + Unpin,
) -> Result<(), LinkError> {
    let mut sealer = Sealer::new()?;
    loop {
        let mut envelope = Envelope::default();
        let taken = outgoing.take(pace.free_at(), |frame| {
            envelope.push(&frame);
            !envelope.is_full()
        });
        let Some(held) = taken.await else {
            sink.close().await?;
            return Ok(());
        };
        counted.throttled_microseconds.increment(held.as_micros() as u64);
        let (message, raw) = sealer.seal(envelope)?;
        metrics.link_bytes_sent.increment(message.len() as u64);
        counted.bytes.increment(message.len() as u64);
        pace.sent(Instant::now(), message.len());
        metrics.link_bytes_before_compression.increment(raw as u64);
        sink.send(Message::Binary(message)).await?;
    }
}
