//! One client's connection: frames in, frames out, many documents on one socket.
//!
//! A connection is one task. It reads frames as they come, and writes when the socket takes it: as long as a write is
//! under way nothing new is generated, so a slow reader costs no memory and is caught up with one message per
//! document. Reading goes on meanwhile.
//!
//! Nothing a client sends can harm anybody else: what is malformed or refused closes this connection, with an error
//! that says why.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use futures_util::{Sink, Stream};
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId, PlacementGroup};
use isobar_protocol::session::SyncSession;
use isobar_protocol::wire::{
    self, ClientFrame, EXTRA_ELSEWHERE, EXTRA_GATHERED_ANSWERS, EXTRA_RECEIPTS, LastDocument,
    PROTOCOL_VERSION, PeerMetadata,
};
use tokio::time::{Instant, Sleep};

use crate::commit::ByteBudget;
use crate::documents::{Document, LoadError, SubscriberKey};
use crate::http::Traffic;
use crate::node::Node;
use crate::outbox::{Closing, Outbox, Slot};

mod incoming;
mod outgoing;
mod receipts;
mod remote_heads;

use receipts::Following;
use remote_heads::Watched;

/// A client must say who it is within this time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection is closed when so many times in a row the setting `ping_seconds` has passed without a sign of life. Stock
/// clients answer pings but send none; a browser that applies a large message cannot answer for a while. Times are
/// counted, not added up: when this process has been standing still, nobody could make himself heard.
const SILENCES_MAX: u32 = 3;

/// How long more changes are gathered for a client that has not answered several messages.
const GATHER: Duration = Duration::from_millis(50);

/// How long a client that is told to come back is given to answer what it was sent last. Acknowledgements are not
/// answered, so a writer always takes this long.
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);

/// Bytes of a client's changes that may wait for their commit. Beyond it the client is not read from.
const UNCOMMITTED_BYTES_MAX: usize = 4 << 20;

/// Bytes handed to the socket before they are flushed.
const WRITE_BYTES: usize = 256 << 10;

/// Ephemeral messages a client may send a second, and at once after a pause. A hand-moved cursor makes 60.
const EPHEMERALS_PER_SECOND: f64 = 100.0;
const EPHEMERALS_BURST: f64 = 200.0;

/// Why a connection ends.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The client closed, or the network did.
    Gone,
    /// The client broke the protocol. `reason` is counted, `message` is sent.
    Protocol { reason: &'static str, message: String },
    /// The client said that it leaves.
    Leaves,
    /// The same peer id joined on another connection.
    Replaced,
    /// The client gave no sign of life, or took nothing.
    Silent,
    /// The server is going away; come back.
    Drain,
    /// Something the client asked for cannot be had at the moment; come back.
    TryAgain,
}

impl Ending {
    pub(crate) fn protocol(reason: &'static str, message: impl ToString) -> Self {
        Self::Protocol { reason, message: message.to_string() }
    }

    fn close_frame(&self) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Self::Gone => return None,
            Self::Protocol { message, .. } => (close_code::POLICY, message.as_str()),
            Self::Leaves => (close_code::NORMAL, "goodbye"),
            Self::Replaced => (close_code::NORMAL, "this peer id joined on another connection"),
            Self::Silent => (close_code::NORMAL, "no sign of life"),
            Self::Drain => (close_code::RESTART, "the server is going away, come back"),
            Self::TryAgain => (close_code::AGAIN, "storage is unavailable, come back"),
        };
        // A close reason holds 123 bytes at most.
        let end = (0..=reason.len().min(120)).rev().find(|it| reason.is_char_boundary(*it)).unwrap_or(0);
        Some(CloseFrame { code, reason: reason[..end].into() })
    }
}

/// One document on this connection.
struct Subscription {
    /// Ends before the subscription it follows with.
    following: Option<Following>,
    document: Arc<Document>,
    key: SubscriberKey,
    session: SyncSession,
    last_sent: Instant,
    /// Set while more changes are gathered.
    held: bool,
    /// Stands in the connection's `dirty`.
    dirty: bool,
    /// The heads that were last reported to a client that watches this region's storage.
    reported: Vec<ChangeHash>,
    search: Search,
}

/// Whether a document that is not here was looked for in the other regions.
#[derive(Default)]
enum Search {
    #[default]
    NotYet,
    /// Set when it is over, to the addresses of regions that have the document and may not send it; the subscription
    /// is marked then.
    Running(Arc<OnceLock<Vec<String>>>),
    Over,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // Nobody is to mark a place that is another's by then.
        self.following = None;
        self.document.unsubscribe(self.key);
    }
}

/// See the module.
pub struct Connection {
    node: Arc<Node>,
    socket: WebSocket,
    peer: PeerId,
    outbox: Arc<Outbox>,
    subscriptions: Vec<Subscription>,
    slots: HashMap<DocumentId, Slot>,
    last_document: LastDocument,
    /// Subscriptions that may have something to say, each once.
    dirty: Vec<Slot>,
    /// Empty between uses; it keeps its memory.
    marked: Vec<Slot>,
    held: Vec<(Instant, Slot)>,
    uncommitted: ByteBudget,
    watched: Watched,
    /// The client answers messages one by one, so unanswered ones tell how far it is behind.
    answers_each: bool,
    /// The client is to be told where a document is that this region may not hold.
    hears_elsewhere: bool,
    /// The client is to be told which regions hold its documents.
    hears_receipts: bool,
    /// The placement group of the documents that the client creates.
    group: PlacementGroup,
    ephemerals: TokenBucket,
    flushing: bool,
    traffic: Traffic,
    /// When a sign of life is looked for next.
    look_at: Instant,
    /// How often in a row there was none.
    silences: u32,
    /// The traffic at the last look.
    read_bytes: u64,
    written_bytes: u64,
    /// Something waits in the outbox.
    woken: bool,
    /// The socket is looked at next, whatever waits in the outbox.
    is_sockets_turn: bool,
    timer: Pin<Box<Sleep>>,
}

/// What a connection waits for.
enum Event {
    Frame(Message),
    Flushed,
    Woken,
    Timer,
}

impl Connection {
    /// Serves a client until it ends.
    pub async fn serve(node: Arc<Node>, mut socket: WebSocket, group: PlacementGroup, traffic: Traffic) {
        let joined = tokio::time::timeout(JOIN_TIMEOUT, join(&node, &mut socket)).await;
        let outcome =
            joined.unwrap_or_else(|_| Err(Ending::protocol("no_join", "no join within ten seconds")));
        let (peer, socket, ending) = match outcome {
            Err(ending) => (None, socket, ending),
            Ok((peer, metadata)) => {
                let outbox = Arc::new(Outbox::default());
                let entered = Entered::new(&node, &peer, &outbox);
                let mut connection =
                    Self::new(node.clone(), socket, peer.clone(), traffic, outbox, &metadata, group);
                let ending = connection.run().await;
                // Ends the subscriptions.
                let Self { socket, .. } = connection;
                drop(entered);
                (Some(peer), socket, ending)
            }
        };
        finish(&node, socket, peer.as_ref(), ending).await;
    }

    fn new(
        node: Arc<Node>,
        socket: WebSocket,
        peer: PeerId,
        traffic: Traffic,
        outbox: Arc<Outbox>,
        metadata: &PeerMetadata,
        group: PlacementGroup,
    ) -> Self {
        let now = Instant::now();
        let ping_after = node.settings.ping();
        Self {
            watched: Watched::new(&node.storage_id, metadata),
            answers_each: !has_extra(metadata, EXTRA_GATHERED_ANSWERS),
            hears_elsewhere: has_extra(metadata, EXTRA_ELSEWHERE),
            hears_receipts: has_extra(metadata, EXTRA_RECEIPTS),
            group,
            node,
            socket,
            peer,
            outbox,
            subscriptions: Vec::new(),
            slots: HashMap::new(),
            last_document: LastDocument::default(),
            dirty: Vec::new(),
            marked: Vec::new(),
            held: Vec::new(),
            uncommitted: ByteBudget::new(UNCOMMITTED_BYTES_MAX),
            ephemerals: TokenBucket::full(now),
            flushing: false,
            traffic,
            look_at: now + ping_after,
            silences: 0,
            read_bytes: 0,
            written_bytes: 0,
            woken: false,
            is_sockets_turn: false,
            timer: Box::pin(tokio::time::sleep(ping_after)),
        }
    }

    async fn run(&mut self) -> Ending {
        loop {
            let step = match self.event().await {
                Ok(Event::Frame(message)) => self.receive(message).await,
                Ok(Event::Timer) => self.tick(),
                Ok(Event::Flushed) => Ok(()),
                Ok(Event::Woken) => {
                    self.woken = true;
                    match self.outbox.closing() {
                        None => Ok(()),
                        Some(Closing::Replaced) => return Ending::Replaced,
                        Some(Closing::Drain) => return self.wind_down().await,
                    }
                }
                Err(ending) => Err(ending),
            };
            if let Err(ending) = step {
                return ending;
            }
            if !self.flushing
                && let Err(ending) = self.fill().await
            {
                return ending;
            }
        }
    }

    async fn event(&mut self) -> Result<Event, Ending> {
        std::future::poll_fn(|context| {
            // First, or a client that never stops sending would put deadlines off for ever.
            if self.timer.as_mut().poll(context).is_ready() {
                return Poll::Ready(Ok(Event::Timer));
            }
            // What is to be sent before what may have come, as a look at a socket on which nothing has costs a good part of
            // what sending does; but in turns, or who never stops marking would keep the client from being heard.
            if !std::mem::replace(&mut self.is_sockets_turn, false)
                && self.outbox.poll_woken(context).is_ready()
            {
                self.is_sockets_turn = true;
                return Poll::Ready(Ok(Event::Woken));
            }
            if let Poll::Ready(event) = self.poll_socket(context) {
                return Poll::Ready(event);
            }
            self.outbox.poll_woken(context).map(|()| Ok(Event::Woken))
        })
        .await
    }

    fn poll_socket(&mut self, context: &mut Context<'_>) -> Poll<Result<Event, Ending>> {
        if self.flushing {
            match Pin::new(&mut self.socket).poll_flush(context) {
                Poll::Ready(Ok(())) => {
                    self.flushing = false;
                    if self.woken || !self.dirty.is_empty() {
                        return Poll::Ready(Ok(Event::Flushed));
                    }
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Ending::Gone)),
                Poll::Pending => {}
            }
        }
        match Pin::new(&mut self.socket).poll_next(context) {
            Poll::Ready(Some(Ok(message))) => Poll::Ready(Ok(Event::Frame(message))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Err(read_failed(&error))),
            Poll::Ready(None) => Poll::Ready(Err(Ending::Gone)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Takes one message; `start_send` accepts it whatever the state of the socket, and the flush follows.
    fn send(&mut self, message: Message) -> Result<(), Ending> {
        if let Message::Binary(bytes) = &message {
            self.node.metrics.frames_sent.increment(1);
            self.node.metrics.frame_bytes_sent.increment(bytes.len() as u64);
        }
        self.flushing = true;
        Pin::new(&mut self.socket).start_send(message).map_err(|_| Ending::Gone)
    }

    /// Looks after deadlines: signs of life, writes that do not go on, changes held back.
    fn tick(&mut self) -> Result<(), Ending> {
        let now = Instant::now();
        self.release_held(now);
        let ping_after = self.node.settings.ping();
        if now >= self.look_at {
            self.look_at = now + ping_after;
            self.look_for_life()?;
        }
        self.arm_timer(self.look_at, true);
        Ok(())
    }

    fn look_for_life(&mut self) -> Result<(), Ending> {
        let (read, written) = (self.traffic.read_bytes(), self.traffic.written_bytes());
        // Parts of a frame count as well: a large one may take minutes. As long as the network takes more of one of ours,
        // somebody is reading it, and no ping would be answered before its end has arrived.
        let alive = read != self.read_bytes || self.flushing && written != self.written_bytes;
        (self.read_bytes, self.written_bytes) = (read, written);
        self.silences = if alive { 0 } else { self.silences + 1 };
        match self.silences {
            0 => Ok(()),
            SILENCES_MAX.. => Err(Ending::Silent),
            // Its answer would wait behind what the client does not take.
            _ if self.flushing => Ok(()),
            _ => self.send(Message::Ping(bytes::Bytes::new())),
        }
    }

    /// Sets the timer to the deadline, or to that of the first subscription held back.
    fn arm_timer(&mut self, deadline: Instant, expired: bool) {
        let first = self.held.iter().map(|(at, _)| *at).min();
        let deadline = first.map_or(deadline, |at| at.min(deadline));
        if expired || deadline < self.timer.deadline() {
            self.timer.as_mut().reset(deadline);
        }
    }

    fn release_held(&mut self, now: Instant) {
        let (released, held) = std::mem::take(&mut self.held).into_iter().partition(|(at, _)| *at <= now);
        self.held = held;
        let released: Vec<(Instant, Slot)> = released;
        released.into_iter().for_each(|(_, slot)| self.mark(slot));
    }

    /// Notes that a subscription may have something to say. Once: a client that sends and does not read would have the
    /// list grow.
    fn mark(&mut self, slot: Slot) {
        if !std::mem::replace(&mut self.subscriptions[slot.0 as usize].dirty, true) {
            self.dirty.push(slot);
        }
    }

    /// The subscription to a document, made if there is none.
    async fn subscribe(&mut self, document: DocumentId) -> Result<Slot, Ending> {
        if let Some(slot) = self.slots.get(&document) {
            return Ok(*slot);
        }
        if self.subscriptions.len() >= self.node.settings.connection_documents_max {
            return Err(Ending::protocol("too_many_documents", "too many documents on one connection"));
        }
        let loaded = self.node.documents.open_in(&document, &self.group).await;
        let loaded = loaded.map_err(|error| load_failed(&document, &error))?;
        Ok(self.subscribe_to(loaded))
    }

    fn subscribe_to(&mut self, document: Arc<Document>) -> Slot {
        let slot = Slot(self.subscriptions.len() as u32);
        let key = document.subscribe(&self.outbox, slot);
        self.slots.insert(document.id().clone(), slot);
        let now = Instant::now();
        let session = SyncSession::new(false);
        self.subscriptions.push(Subscription {
            following: None,
            document,
            key,
            session,
            last_sent: now - GATHER,
            held: false,
            dirty: false,
            reported: Vec::new(),
            search: Search::NotYet,
        });
        self.watch_others(slot);
        self.follow_receipts(slot);
        slot
    }

    /// Lets what is being committed finish and be acknowledged, then ends.
    async fn wind_down(&mut self) -> Ending {
        let patience = self.node.settings.drain() / 4;
        // What was held back in order to gather more goes out now.
        self.answers_each = false;
        let held = std::mem::take(&mut self.held);
        held.into_iter().for_each(|(_, slot)| self.mark(slot));
        let settled = tokio::time::timeout(patience, async {
            let _committed = self.uncommitted.acquire(UNCOMMITTED_BYTES_MAX).await;
            self.acknowledge_all().await
        })
        .await;
        if matches!(settled, Ok(Ok(()))) {
            let _ = tokio::time::timeout(ANSWER_PATIENCE, self.hear_answers()).await;
        }
        Ending::Drain
    }

    /// Reads until the client has answered what it was sent. A stock client that finds its socket closing when it wants
    /// to answer throws half-way through applying a message, and that document is unusable to it afterwards.
    async fn hear_answers(&mut self) -> Result<(), Ending> {
        while self.subscriptions.iter().any(|it| it.session.awaits_answer()) {
            if let Event::Frame(message) = self.event().await? {
                self.receive(message).await?;
            }
            if !self.flushing {
                self.woken = true;
                self.fill().await?;
            }
        }
        Ok(())
    }

    async fn acknowledge_all(&mut self) -> Result<(), Ending> {
        loop {
            while self.flushing {
                std::future::poll_fn(|context| Pin::new(&mut self.socket).poll_flush(context))
                    .await
                    .map_err(|_| Ending::Gone)?;
                self.flushing = false;
            }
            self.woken = true;
            self.fill().await?;
            if !self.flushing {
                return Ok(());
            }
        }
    }
}

/// The connection's place among the joined ones; it is left with the value.
struct Entered {
    node: Arc<Node>,
    peer: PeerId,
    number: u64,
}

impl Entered {
    fn new(node: &Arc<Node>, peer: &PeerId, outbox: &Arc<Outbox>) -> Self {
        let number = node.sessions.enter(peer, outbox);
        if node.is_draining() {
            // It joined after those who are here were told to go.
            outbox.close(Closing::Drain);
        }
        Self { node: node.clone(), peer: peer.clone(), number }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.node.sessions.leave(&self.peer, self.number);
    }
}

/// Tells a broken connection from a frame that the WebSocket layer refused.
fn read_failed(error: &axum::Error) -> Ending {
    let text = error.to_string();
    match text.contains("too long") || text.contains("too big") {
        true => Ending::protocol("frame_too_large", text),
        false => Ending::Gone,
    }
}

/// What follows when stored parts of a document cannot be read. A storage that fails ends the connection; damage is the
/// document's own affair, and the client's other documents carry on.
fn unreadable(node: &Node, document: &Document, error: &LoadError) -> Result<(), Ending> {
    match error {
        LoadError::Storage(_) => Err(load_failed(document.id(), error)),
        _ => {
            node.documents.withhold(document, error);
            Ok(())
        }
    }
}

fn load_failed(document: &DocumentId, error: &LoadError) -> Ending {
    tracing::warn!(%document, %error, "document not loaded");
    Ending::TryAgain
}

/// Reads the first frame, which must be a join, and answers it.
async fn join(node: &Node, socket: &mut WebSocket) -> Result<(PeerId, PeerMetadata), Ending> {
    let frame = loop {
        match socket.recv().await {
            Some(Ok(Message::Binary(frame))) => break frame,
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Text(_))) => return Err(Ending::protocol("text_frame", "frames are binary")),
            Some(Err(error)) => return Err(read_failed(&error)),
            Some(Ok(Message::Close(_))) | None => return Err(Ending::Gone),
        }
    };
    node.metrics.frames_received.increment(1);
    let (sender, metadata, versions) = match ClientFrame::decode(&frame) {
        Ok(ClientFrame::Join { sender_id, metadata, versions }) => (sender_id, metadata, versions),
        Ok(_) => return Err(Ending::protocol("no_join", "the first message must be a join")),
        Err(error) => return Err(Ending::protocol("malformed_frame", error)),
    };
    if versions.is_some_and(|versions| !versions.contains(&PROTOCOL_VERSION)) {
        return Err(Ending::protocol("unsupported_version", "unsupported protocol version"));
    }
    let ours = PeerMetadata {
        storage_id: Some(node.storage_id.clone()),
        is_ephemeral: Some(false),
        extras: EXTRAS.into_iter().filter(|it| has_extra(&metadata, it)).map(str::to_owned).collect(),
    };
    let answer = wire::encode_peer(&node.peer_id, &sender, &ours);
    socket.send(Message::Binary(answer.into())).await.map_err(|_| Ending::Gone)?;
    Ok((sender, metadata))
}

/// What a client may announce.
const EXTRAS: [&str; 3] = [EXTRA_GATHERED_ANSWERS, EXTRA_ELSEWHERE, EXTRA_RECEIPTS];

/// Whether the client announced an extra.
fn has_extra(metadata: &PeerMetadata, name: &str) -> bool {
    metadata.extras.iter().any(|extra| extra == name)
}

/// Says why, closes, and waits a moment for the client to do the same.
async fn finish(node: &Node, mut socket: WebSocket, peer: Option<&PeerId>, ending: Ending) {
    tracing::debug!(?peer, ?ending, "connection ended");
    let Some(close) = ending.close_frame() else { return };
    let say = async {
        if let Ending::Protocol { reason, message } = &ending {
            node.metrics.refused(reason);
            let target = peer.map_or("", PeerId::as_str);
            let frame = wire::encode_error(node.peer_id.as_str(), target, message);
            socket.send(Message::Binary(frame.into())).await?;
        }
        socket.send(Message::Close(Some(close))).await?;
        // Until the client's own close has come, or the patience below ends.
        while let Some(Ok(_)) = socket.recv().await {}
        Ok::<(), axum::Error>(())
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), say).await;
}

/// A rate with a burst.
struct TokenBucket {
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    fn full(now: Instant) -> Self {
        Self { tokens: EPHEMERALS_BURST, filled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let gained = now.duration_since(self.filled).as_secs_f64() * EPHEMERALS_PER_SECOND;
        self.filled = now;
        self.tokens = (self.tokens + gained).min(EPHEMERALS_BURST);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}
