//! Clients with sockets: a [`Session`] over a WebSocket, and what it saw.
//!
//! One connection is one task. A reader waits for frames and sends its answers in one flush, so that the generator
//! costs little more than the system calls that any client needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::session::{Dialect, Session};
use crate::workload::Document;

/// How long a client may take to connect and to have its document, unless a scenario says otherwise.
pub const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of payload and WebSocket framing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Traffic {
    pub frames_down: u64,
    pub bytes_down: u64,
    pub frames_up: u64,
    pub bytes_up: u64,
}

impl Traffic {
    pub fn add(&mut self, other: &Traffic) {
        self.frames_down += other.frames_down;
        self.bytes_down += other.bytes_down;
        self.frames_up += other.frames_up;
        self.bytes_up += other.bytes_up;
    }

    pub fn since(&self, earlier: &Traffic) -> Traffic {
        Traffic {
            frames_down: self.frames_down - earlier.frames_down,
            bytes_down: self.bytes_down - earlier.bytes_down,
            frames_up: self.frames_up - earlier.frames_up,
            bytes_up: self.bytes_up - earlier.bytes_up,
        }
    }
}

/// The size of a WebSocket frame's head, without a mask.
fn frame_head_bytes(payload: usize) -> u64 {
    match payload {
        0..=125 => 2,
        126..=0xffff => 4,
        _ => 10,
    }
}

/// Where a client connects.
#[derive(Debug, Clone)]
pub struct Address {
    /// `host:port`.
    pub authority: String,
    pub path: String,
}

/// A connected client.
pub struct Client {
    socket: WebSocketStream<TcpStream>,
    pub session: Session,
    pub traffic: Traffic,
    out: Vec<Bytes>,
}

impl Client {
    /// Connects and sends the opening frames.
    pub async fn connect(address: &Address, session: Session) -> Result<Self> {
        let stream = TcpStream::connect(&address.authority).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let url = format!("ws://{}{}", address.authority, address.path);
        let config = WebSocketConfig::default()
            .max_message_size(Some(1 << 30))
            .max_frame_size(Some(1 << 30))
            // The default of 128 KiB for each of thousands of connections would be most of what the generator touches.
            .read_buffer_size(16 << 10);
        let (socket, _) = client_async_with_config(url, stream, Some(config)).await.context("upgrading")?;
        let mut client = Self { socket, session, traffic: Traffic::default(), out: Vec::new() };
        client.session.open(&mut client.out);
        client.flush().await?;
        Ok(client)
    }

    /// Reads one frame and answers it. Fails when the connection has ended.
    pub async fn step(&mut self) -> Result<()> {
        let message = self.socket.next().await;
        self.take(message).await
    }

    /// [`Client::step`], unless nothing arrives within `wait`. Only the reading is given up, never an answer.
    ///
    /// Tells whether something arrived.
    pub async fn step_within(&mut self, wait: Duration) -> Result<bool> {
        match tokio::time::timeout(wait, self.socket.next()).await {
            Ok(message) => self.take(message).await.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    async fn take(&mut self, message: Option<Result<Message, WebSocketError>>) -> Result<()> {
        match message.context("the server closed the connection")?? {
            Message::Binary(frame) => {
                self.traffic.frames_down += 1;
                self.traffic.bytes_down += frame.len() as u64 + frame_head_bytes(frame.len());
                self.session.receive(&frame, &mut self.out)?;
                self.flush().await
            }
            Message::Close(_) => bail!("the server closed the connection"),
            // tungstenite has queued the pong; it leaves with the next flush.
            Message::Ping(_) => Ok(self.socket.flush().await?),
            _ => Ok(()),
        }
    }

    /// Makes and sends the next edit.
    pub async fn edit(&mut self) -> Result<()> {
        self.session.edit(&mut self.out);
        self.flush().await
    }

    /// Sends what a client that gathers its answers has gathered.
    async fn answer_gathered(&mut self) -> Result<()> {
        self.session.gathered_answer(&mut self.out);
        self.flush().await
    }

    async fn flush(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        for frame in self.out.drain(..) {
            self.traffic.frames_up += 1;
            self.traffic.bytes_up += frame.len() as u64 + frame_head_bytes(frame.len()) + 4;
            self.socket.feed(Message::Binary(frame)).await?;
        }
        Ok(self.socket.flush().await?)
    }

    /// Steps until the session satisfies `done`.
    pub async fn until(&mut self, patience: Duration, done: impl Fn(&Session) -> bool) -> Result<()> {
        let steps = async {
            while !done(&self.session) {
                if self.session.is_unavailable() && self.session.held() == 0 {
                    bail!("the server does not have the document");
                }
                self.step().await?;
            }
            Ok(())
        };
        tokio::time::timeout(patience, steps).await.with_context(|| format!("nothing within {patience:?}"))?
    }

    pub async fn close(self) {
        self.into_session().1.await;
    }

    /// What the client knows, and the closing of its connection.
    pub fn into_session(mut self) -> (Session, impl Future<Output = ()>) {
        let closing = async move {
            let _ = tokio::time::timeout(Duration::from_secs(1), self.socket.close(None)).await;
        };
        (self.session, closing)
    }
}

/// When each link of a chain was sent, shared by the writer and its readers. Microseconds after `start`; 0 is never.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    sent_us: Vec<AtomicU64>,
}

impl Timeline {
    pub fn new(links: u32) -> Arc<Self> {
        let sent_us = (0..links).map(|_| AtomicU64::new(0)).collect();
        // One microsecond before now, so that 0 stays free for "never".
        Arc::new(Self { start: Instant::now() - Duration::from_micros(1), sent_us })
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    pub fn mark_sent(&self, link: u32) {
        self.sent_us[link as usize].store(self.now_us(), Ordering::Relaxed);
    }

    /// Adds the latencies of links `from..to`, which have just arrived, to `latencies`.
    fn collect(&self, from: u32, to: u32, latencies: &mut Vec<u32>) {
        let now = self.now_us();
        for sent in &self.sent_us[from as usize..to as usize] {
            match sent.load(Ordering::Relaxed) {
                0 => {}
                sent => latencies.push(now.saturating_sub(sent) as u32),
            }
        }
    }
}

/// What many clients show while they run.
#[derive(Debug, Default)]
pub struct Progress {
    pub joined: AtomicU32,
    /// Clients that hold their whole chain.
    pub complete: AtomicU32,
    pub failed: AtomicU32,
    pub stop: AtomicBool,
}

impl Progress {
    /// Waits until `count` of `total` clients have joined or failed. Returns how many joined.
    pub async fn wait_joined(&self, total: u32, patience: Duration) -> u32 {
        wait_for(patience, || {
            self.joined.load(Ordering::Relaxed) + self.failed.load(Ordering::Relaxed) >= total
        })
        .await;
        self.joined.load(Ordering::Relaxed)
    }

    /// Waits until all clients hold everything or have failed; tells whether they did.
    pub async fn wait_complete(&self, total: u32, patience: Duration) -> bool {
        wait_for(patience, || {
            self.complete.load(Ordering::Relaxed) + self.failed.load(Ordering::Relaxed) >= total
        })
        .await
    }
}

/// Polls a condition until it holds, at most for `patience`; tells whether it did.
pub async fn wait_for(patience: Duration, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

/// What a client saw from the start of the clock.
#[derive(Debug, Default)]
pub struct Observation {
    pub latencies_us: Vec<u32>,
    pub delivered: u64,
    pub traffic: Traffic,
    pub is_complete: bool,
    pub failure: Option<String>,
}

/// A group of clients that run until told to stop.
pub struct Crowd {
    tasks: JoinSet<Observation>,
    pub progress: Arc<Progress>,
    pub size: u32,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), progress: Arc::default(), size: 0 }
    }
}

/// How a client of a crowd behaves after it has joined.
#[derive(Debug, Clone)]
pub struct Part {
    pub timeline: Arc<Timeline>,
    /// Edits that this client makes, and when; empty for a reader.
    pub edits: Vec<PlannedEdit>,
}

/// An edit of a link at a time after the start of the clock.
#[derive(Debug, Clone, Copy)]
pub struct PlannedEdit {
    pub link: u32,
    pub at: Duration,
}

/// When a crowd's clock starts; `None` until then.
pub type Clock = tokio::sync::watch::Receiver<Option<Instant>>;

impl Crowd {
    /// Adds a client that connects, joins, and plays its part.
    pub fn add(&mut self, address: Address, session: Session, part: Part, clock: Clock) {
        self.size += 1;
        let progress = Arc::clone(&self.progress);
        self.tasks.spawn(async move {
            let mut observation = Observation::default();
            let played = play(&address, session, part, clock, &progress, &mut observation).await;
            if let Err(error) = played {
                progress.failed.fetch_add(1, Ordering::Relaxed);
                observation.failure = Some(format!("{error:#}"));
            }
            observation
        });
    }

    /// Ends all clients and returns what they saw.
    pub async fn finish(mut self) -> Vec<Observation> {
        self.progress.stop.store(true, Ordering::Relaxed);
        let mut observations = Vec::new();
        let deadline = tokio::time::Instant::now() + FINISH_PATIENCE;
        while let Ok(Some(observation)) = tokio::time::timeout_at(deadline, self.tasks.join_next()).await {
            observations.push(observation.expect("a client task does not panic"));
        }
        // Who is stuck in sending to a server that does not read is given up with the join set.
        observations
    }
}

/// How long clients may take to stop.
const FINISH_PATIENCE: Duration = Duration::from_secs(5);

/// How often a client that gathers its answers sends one.
const GATHERED_ANSWER_EVERY: Duration = Duration::from_secs(1);

/// How often a waiting client looks whether it should stop.
const STOP_CHECK: Duration = Duration::from_millis(200);

async fn play(
    address: &Address,
    session: Session,
    part: Part,
    clock: Clock,
    progress: &Progress,
    seen: &mut Observation,
) -> Result<()> {
    let mut client = join(address, &session, JOIN_PATIENCE).await?;
    progress.joined.fetch_add(1, Ordering::Relaxed);
    let (traffic_before, mut last_answer) = (client.traffic, Instant::now());
    let links = client.session.document().chain.links();
    let mut planned = part.edits.into_iter().peekable();
    while !progress.stop.load(Ordering::Relaxed) {
        let held = client.session.held();
        // An edit waits for the one it depends on, and for its time.
        let due = planned.peek().filter(|edit| edit.link == held).copied();
        let start = *clock.borrow();
        let wait = match (due, start) {
            (Some(edit), Some(start)) => (start + edit.at).saturating_duration_since(Instant::now()),
            (Some(_), None) => Duration::from_millis(5),
            (None, _) => STOP_CHECK,
        };
        if due.is_some() && start.is_some() && wait.is_zero() {
            part.timeline.mark_sent(held);
            client.edit().await?;
            planned.next();
        } else {
            client.step_within(wait).await?;
            let now_held = client.session.held();
            part.timeline.collect(held, now_held, &mut seen.latencies_us);
            seen.delivered += u64::from(now_held - held);
        }
        if last_answer.elapsed() >= GATHERED_ANSWER_EVERY {
            client.answer_gathered().await?;
            last_answer = Instant::now();
        }
        seen.traffic = client.traffic.since(&traffic_before);
        if client.session.held() == links && !seen.is_complete {
            seen.is_complete = true;
            progress.complete.fetch_add(1, Ordering::Relaxed);
        }
    }
    client.close().await;
    Ok(())
}

/// Uploads a document and waits for the acknowledgement. The client stays connected.
pub async fn upload(address: &Address, dialect: Dialect, document: &Document, name: &str) -> Result<Client> {
    let session = Session::new(dialect, format!("bench-{name}"), document.clone(), 1);
    join(address, &session, 2 * JOIN_PATIENCE).await.context("uploading")
}

/// How long a client waits before it connects again. Stock clients wait five seconds.
const RECONNECT_WAIT: Duration = Duration::from_secs(1);

/// Connects and waits until the document is here. A lost connection is made anew, as stock clients do: the stock
/// servers drop clients whose pings they have not answered because they were busy with a large document themselves.
async fn join(address: &Address, session: &Session, patience: Duration) -> Result<Client> {
    let deadline = Instant::now() + patience;
    let mut last_error: Option<anyhow::Error> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let attempt = async {
            let mut client = Client::connect(address, session.afresh()).await?;
            client.until(left, Session::is_joined).await?;
            Ok::<_, anyhow::Error>(client)
        };
        match tokio::time::timeout(left, attempt).await {
            Ok(Ok(client)) => return Ok(client),
            Ok(Err(error)) => {
                last_error = Some(error);
                tokio::time::sleep(RECONNECT_WAIT).await;
            }
            Err(_) => {
                let why = last_error.map(|error| format!("; before: {error:#}")).unwrap_or_default();
                bail!("nothing within {patience:?}{why}");
            }
        }
    }
}
