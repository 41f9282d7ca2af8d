//! Simulated distance: a TCP proxy on loopback that delays, throttles, cuts and refuses.
//!
//! A [`Proxy`] stands for the way that one region's connections take to another region. Every direction of every
//! connection is delayed by the same one-way time; bytes come out in the order in which they went in. With a bandwidth, all
//! connections of the proxy share it, in each direction.
//!
//! A cut is a partition as TCP sees it: nothing is delivered, nothing is reset, and who connects waits. When it heals,
//! what hung is reset instead of being delivered late: after a long partition TCP resumes nothing, and only who has
//! noticed and connects anew gets through.
//!
//! What it does not do: lose single packets (TCP would hide that), vary the delay, or delay the connecting itself, which
//! the loopback interface answers.
//!
//! # Invariants
//!
//! - Nothing is delivered earlier than one one-way time after it was read, nor anything while the proxy is cut.
//! - Each direction of a connection holds at most [`BUFFER_BYTES_MAX`]; beyond it the sender is not read from.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

mod stream;

/// Bytes on their way in one direction of a connection: what a window of TCP would hold at most.
pub const BUFFER_BYTES_MAX: usize = 8 << 20;

/// Longest one-way time that may be set: beyond it every heartbeat fails.
pub const ONE_WAY_MAX: Duration = Duration::from_secs(60);

/// Least bandwidth that may be set, in bytes per second.
pub const BYTES_PER_SECOND_MIN: u64 = 1024;

/// Connections through one proxy; whoever comes beyond that is reset.
const CONNECTIONS_MAX: usize = 64;

/// Whether anything gets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    Open,
    /// Connections hang silently, old ones and new ones.
    Cut,
    /// Connections are reset, old ones and new ones.
    Refused,
}

/// How long the way is, and how wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Distance {
    pub one_way: Duration,
    pub bytes_per_second: Option<u64>,
}

impl Distance {
    pub fn of(one_way: Duration) -> Self {
        Self { one_way, bytes_per_second: None }
    }
}

/// What a proxy does at the moment. The number rises when what hangs is to be given up.
#[derive(Debug, Clone, Copy)]
struct Condition {
    passage: Passage,
    distance: Distance,
    healed: u64,
}

/// What has come through a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    /// Connections that are open at this moment and have delivered bytes in both directions.
    pub connections: u64,
    /// Bytes that reached the target, and bytes that came back from it.
    pub bytes_there: u64,
    pub bytes_back: u64,
}

/// A way to one target. It ends with the value, and all connections through it with it.
pub struct Proxy {
    address: SocketAddr,
    condition: watch::Sender<Condition>,
    way: Arc<Way>,
    accepting: JoinHandle<()>,
}

/// What the connections of a proxy share.
struct Way {
    target: SocketAddr,
    condition: watch::Receiver<Condition>,
    there: Lane,
    back: Lane,
    connections: AtomicU64,
}

/// One direction of all connections of a proxy.
struct Lane {
    /// When the last bytes will have left, if there is a bandwidth.
    free_at: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Proxy {
    /// Listens on a free port of loopback and forwards to `target`, which need not be there yet.
    pub async fn start(target: SocketAddr, distance: Distance) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (condition, watched) = watch::channel(Condition { passage: Passage::Open, distance, healed: 0 });
        let way = Arc::new(Way {
            target,
            condition: watched,
            there: Lane::new(),
            back: Lane::new(),
            connections: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, way.clone()));
        Ok(Self { address, condition, way, accepting })
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn passage(&self) -> Passage {
        self.condition.borrow().passage
    }

    pub fn distance(&self) -> Distance {
        self.condition.borrow().distance
    }

    /// Applies to what is read from now on; what is on its way arrives as it was sent.
    pub fn set_distance(&self, distance: Distance) {
        let one_way = distance.one_way.min(ONE_WAY_MAX);
        let bytes_per_second = distance.bytes_per_second.map(|it| it.max(BYTES_PER_SECOND_MIN));
        self.condition.send_modify(|it| it.distance = Distance { one_way, bytes_per_second });
    }

    /// Delivers nothing any more and resets nothing.
    pub fn cut(&self) {
        self.condition.send_modify(|it| it.passage = Passage::Cut);
    }

    /// Resets every connection, and those that come.
    pub fn refuse(&self) {
        self.condition.send_modify(|it| it.passage = Passage::Refused);
    }

    /// Lets new connections through; those that hung in a cut are reset. Does nothing to a proxy that is open.
    pub fn heal(&self) {
        self.condition.send_modify(|it| {
            if it.passage != Passage::Open {
                it.passage = Passage::Open;
                it.healed += 1;
            }
        });
    }

    pub fn delivered(&self) -> Delivered {
        Delivered {
            connections: self.way.connections.load(Ordering::Relaxed),
            bytes_there: self.way.there.bytes.load(Ordering::Relaxed),
            bytes_back: self.way.back.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The connections are the task's, and end with it.
        self.accepting.abort();
    }
}

impl Lane {
    fn new() -> Self {
        Self { free_at: Mutex::new(Instant::now()), bytes: AtomicU64::new(0) }
    }

    /// When bytes that were read at `now` have left the sender, behind whatever left before.
    fn leave(&self, now: Instant, bytes: usize, bytes_per_second: Option<u64>) -> Instant {
        let Some(rate) = bytes_per_second else { return now };
        let mut free_at = self.free_at.lock();
        *free_at = (*free_at).max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        *free_at
    }
}

async fn accept(listener: TcpListener, way: Arc<Way>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((from, _)) if connections.len() < CONNECTIONS_MAX => {
                    connections.spawn(carry(from, way.clone()));
                }
                Ok((from, _)) => reset(&from),
                Err(error) => {
                    tracing::warn!(%error, "simulated link cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection to its end.
async fn carry(mut from: TcpStream, way: Arc<Way>) {
    let Condition { passage, distance, healed } = *way.condition.borrow();
    let mut watched = way.condition.clone();
    let given_up = watched.wait_for(|it| it.healed != healed || it.passage == Passage::Refused);
    if passage != Passage::Open {
        // Accepted, as if the answer were on its way, and not heard of again.
        let _ = given_up.await;
        return reset(&from);
    }
    let Ok(mut to) = TcpStream::connect(way.target).await else {
        // The refusal takes as long as an answer would.
        tokio::time::sleep(2 * distance.one_way).await;
        return reset(&from);
    };
    let orderly = tokio::select! {
        orderly = stream::relay(&mut from, &mut to, &way, healed) => orderly,
        _ = given_up => false,
    };
    if !orderly {
        reset(&from);
        reset(&to);
    }
}

/// Makes the end of a connection a reset, not an orderly one.
fn reset(stream: &TcpStream) {
    // The peer may have gone before.
    let _ = stream.set_zero_linger();
}
