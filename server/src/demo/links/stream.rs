//! One connection through a proxy: two flows, each a reader that stamps what it reads and a writer that waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::{BUFFER_BYTES_MAX, Condition, Lane, Passage, Way};

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// How many reads a second a limited bandwidth is spread over, so that it flows instead of coming in blocks.
const READS_PER_SECOND: u64 = 20;

/// What is on its way.
struct Parcel {
    /// Not to be delivered before.
    due: Instant,
    content: Content,
}

enum Content {
    Bytes(Bytes, OwnedSemaphorePermit),
    /// The sender has shut down its side.
    End,
    /// The sender's connection was reset.
    Reset,
}

/// Carries bytes both ways until both sides have ended. Returns false if one of them was reset.
///
/// Once the passage has been healed more often than `healed` nothing moves any more; the caller ends it then.
pub async fn relay(from: &mut TcpStream, to: &mut TcpStream, way: &Way, healed: u64) -> bool {
    for stream in [&*from, &*to] {
        // A keystroke is one small packet. Where it fails the connection has gone, which shows at once.
        let _ = stream.set_nodelay(true);
    }
    let (from_read, from_write) = from.split();
    let (to_read, to_write) = to.split();
    let heard = Heard { way, sides: AtomicU8::new(0) };
    let flow = |lane, side| Flow { lane, side, healed, heard: &heard, condition: way.condition.clone() };
    let (there, back) = (flow(&way.there, 1), flow(&way.back, 2));
    tokio::try_join!(there.carry(from_read, to_write), back.carry(to_read, from_write)).is_ok()
}

/// Counts a connection as long as it is open, once it has delivered in both directions.
struct Heard<'a> {
    way: &'a Way,
    sides: AtomicU8,
}

impl Heard<'_> {
    const BOTH: u8 = 3;

    fn delivered(&self, side: u8) {
        let before = self.sides.fetch_or(side, Ordering::Relaxed);
        if before != Self::BOTH && before | side == Self::BOTH {
            self.way.connections.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        if *self.sides.get_mut() == Self::BOTH {
            self.way.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// One direction of a connection.
struct Flow<'a> {
    lane: &'a Lane,
    side: u8,
    healed: u64,
    heard: &'a Heard<'a>,
    condition: watch::Receiver<Condition>,
}

/// The connection was reset, by one side or the other.
struct WasReset;

impl Flow<'_> {
    async fn carry(&self, read: ReadHalf<'_>, write: WriteHalf<'_>) -> Result<(), WasReset> {
        // Bounded by the room that its parcels hold, in bytes.
        let (sender, parcels) = mpsc::unbounded_channel();
        tokio::join!(self.read_all(read, sender), self.deliver_all(parcels, write)).1
    }

    /// Reads to the end, no faster than the lane takes it and there is room.
    async fn read_all(&self, mut read: ReadHalf<'_>, sender: mpsc::UnboundedSender<Parcel>) {
        let room = Arc::new(Semaphore::new(BUFFER_BYTES_MAX));
        let mut buffer = vec![0; READ_BYTES];
        loop {
            self.open().await;
            let rate = self.condition.borrow().distance.bytes_per_second;
            let bytes_max = rate.map_or(READ_BYTES, |it| (it / READS_PER_SECOND).clamp(1, 64 << 10) as usize);
            let room = room.clone().acquire_many_owned(bytes_max as u32);
            let mut room = room.await.expect("the semaphore is never closed");
            let content = tokio::select! {
                // Nobody to deliver to: the connection is over.
                () = sender.closed() => return,
                read = read.read(&mut buffer[..bytes_max]) => match read {
                    Ok(0) => Content::End,
                    Ok(bytes) => {
                        drop(room.split(bytes_max - bytes));
                        Content::Bytes(Bytes::copy_from_slice(&buffer[..bytes]), room)
                    }
                    Err(_) => Content::Reset,
                },
            };
            let (distance, now) = (self.condition.borrow().distance, Instant::now());
            let bytes = if let Content::Bytes(bytes, _) = &content { bytes.len() } else { 0 };
            let over = !matches!(content, Content::Bytes(..));
            let left_at = self.lane.leave(now, bytes, distance.bytes_per_second);
            if sender.send(Parcel { due: left_at + distance.one_way, content }).is_err() || over {
                return;
            }
            sleep_until(left_at).await;
        }
    }

    /// Delivers what is due, in order.
    async fn deliver_all(
        &self,
        mut parcels: mpsc::UnboundedReceiver<Parcel>,
        mut write: WriteHalf<'_>,
    ) -> Result<(), WasReset> {
        while let Some(Parcel { due, content }) = parcels.recv().await {
            sleep_until(due).await;
            match content {
                Content::Bytes(bytes, _room) => self.deliver(&bytes, &mut write).await?,
                Content::End => {
                    self.open().await;
                    return write.shutdown().await.map_err(|_| WasReset);
                }
                Content::Reset => {
                    self.open().await;
                    return Err(WasReset);
                }
            }
        }
        Ok(())
    }

    async fn deliver(&self, mut bytes: &[u8], write: &mut WriteHalf<'_>) -> Result<(), WasReset> {
        let mut condition = self.condition.clone();
        while !bytes.is_empty() {
            self.open().await;
            tokio::select! {
                biased;
                // A target that takes its time gets nothing more once the way is cut.
                _ = condition.wait_for(|it| it.passage != Passage::Open) => {}
                written = write.write(bytes) => {
                    let written = written.map_err(|_| WasReset)?;
                    self.lane.bytes.fetch_add(written as u64, Ordering::Relaxed);
                    self.heard.delivered(self.side);
                    bytes = &bytes[written..];
                }
            }
        }
        Ok(())
    }

    /// Waits while the way is cut; for ever, if it has been cut and healed since the connection was made.
    async fn open(&self) {
        let mut condition = self.condition.clone();
        let open = condition.wait_for(|it| it.passage == Passage::Open && it.healed == self.healed);
        if open.await.is_err() {
            // The proxy is gone, and its task ends this one.
            std::future::pending().await
        }
    }
}
