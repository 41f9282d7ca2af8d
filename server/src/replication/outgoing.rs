//! What waits to be sent on one link, and in which order it goes.
//!
//! Frames wait in lanes. What keeps the link alive and in step goes at once, always. What people wait for — edits as
//! they are made, questions, then presence — goes before whole documents and entries of streams that catch up; while both
//! wait, those get a turn when as many bytes went before them, so that they have half of the link and are never shut out.
//! Entries of one origin keep their order, whatever lanes they would belong to.
//!
//! A frame that is long is cut into parts when it is queued, if the peer takes parts, so that nothing waits for all of it.
//!
//! Entries are bounded by the link's window, and the rest is small and rare; presence is lossy and has a short queue of its own,
//! out of which the oldest falls first. Whole documents are bounded by who reads them: it waits for room ([`Outgoing::until_room`]).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isobar_protocol::config::LINK_PART_BYTES;
use isobar_protocol::ids::OriginId;
use isobar_protocol::link::{DocumentContents, LinkFrame, codec};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::parts;

/// Presence frames that wait on one link at most.
const PRESENCE_MAX: usize = 1_024;

/// Bytes of whole documents and entries that catch up which wait on one link, beyond which no more documents are read for it.
/// As much as the window of entries; what was read at last may go beyond.
pub(super) const BULK_BYTES_MAX: usize = 4 << 20;

/// What a small frame is taken to weigh, in bytes.
const SMALL_BYTES: usize = 64;

/// A frame of the lane that may be shut out for a while.
struct Bulk {
    frame: LinkFrame,
    /// Whose entries it is about, or is a part of.
    origin: Option<OriginId>,
}

#[derive(Default)]
struct Waiting {
    /// Never held back.
    vital: VecDeque<LinkFrame>,
    live: VecDeque<LinkFrame>,
    presence: VecDeque<LinkFrame>,
    bulk: VecDeque<Bulk>,
    bulk_bytes: usize,
    /// How many frames of each origin are in `bulk`.
    in_bulk: HashMap<OriginId, usize>,
    /// Bytes that went before `bulk` and gave it no turn yet.
    owed_bytes: usize,
}

/// Whose entries a frame is about, if their order matters.
fn origin_of(frame: &LinkFrame) -> Option<OriginId> {
    match frame {
        LinkFrame::Entries { origin, .. } | LinkFrame::Truncated { origin, .. } => Some(*origin),
        _ => None,
    }
}

/// Bytes of a frame, roughly.
fn weight(frame: &LinkFrame) -> usize {
    let contents = |it: &DocumentContents| {
        let base = it.base.as_ref().map_or(0, |it| it.summary.len() + it.index.len() + it.chunk.len());
        base + it.changes.iter().map(|change| change.len()).sum::<usize>()
    };
    SMALL_BYTES
        + match frame {
            LinkFrame::Entries { body, .. } => body.len(),
            LinkFrame::SnapshotPage { documents, .. } => documents.iter().map(contents).sum(),
            LinkFrame::DocumentAnswer { contents: Some(document), .. } => contents(document),
            LinkFrame::Presence { data, .. } => data.len(),
            LinkFrame::Part { bytes, .. } => bytes.len(),
            _ => 0,
        }
}

impl Waiting {
    /// Queues a frame, given as one or as its parts, in the lane that is its own.
    fn push(&mut self, frame: LinkFrame, parts: Vec<LinkFrame>, catching_up: bool) {
        let origin = origin_of(&frame);
        let behind_its_own = origin.is_some_and(|origin| self.in_bulk.contains_key(&origin));
        let whole_documents = matches!(
            frame,
            LinkFrame::SnapshotPage { .. } | LinkFrame::DocumentAnswer { .. } | LinkFrame::Missing { .. }
        );
        if whole_documents || catching_up || behind_its_own {
            let frames = if parts.is_empty() { vec![frame] } else { parts };
            return frames.into_iter().for_each(|frame| self.push_bulk(frame, origin));
        }
        if !parts.is_empty() {
            return self.live.extend(parts);
        }
        match frame {
            LinkFrame::Ping { .. }
            | LinkFrame::Pong { .. }
            | LinkFrame::Have { .. }
            | LinkFrame::Subscribe { .. }
            | LinkFrame::Unsubscribe { .. }
            | LinkFrame::Failed { .. } => self.vital.push_back(frame),
            _ => self.live.push_back(frame),
        }
    }

    fn push_bulk(&mut self, frame: LinkFrame, origin: Option<OriginId>) {
        origin.into_iter().for_each(|origin| *self.in_bulk.entry(origin).or_default() += 1);
        self.bulk_bytes += weight(&frame);
        self.bulk.push_back(Bulk { frame, origin });
    }

    /// What goes next; with no bytes to spend, of what is never held back.
    fn next(&mut self, may_spend: bool) -> Option<LinkFrame> {
        if !self.vital.is_empty() || !may_spend {
            return self.vital.pop_front();
        }
        if self.bulk.front().is_some_and(|it| weight(&it.frame) <= self.owed_bytes) {
            return self.next_of_bulk();
        }
        match self.live.pop_front().or_else(|| self.presence.pop_front()) {
            Some(frame) => {
                self.owed_bytes += if self.bulk.is_empty() { 0 } else { weight(&frame) };
                Some(frame)
            }
            None => self.next_of_bulk(),
        }
    }

    fn next_of_bulk(&mut self) -> Option<LinkFrame> {
        let Bulk { frame, origin } = self.bulk.pop_front()?;
        self.owed_bytes = self.owed_bytes.saturating_sub(weight(&frame));
        self.bulk_bytes = self.bulk_bytes.saturating_sub(weight(&frame));
        if self.bulk.is_empty() {
            self.owed_bytes = 0;
        }
        if let Some(origin) = origin
            && let Some(count) = self.in_bulk.get_mut(&origin)
        {
            *count -= 1;
            if *count == 0 {
                self.in_bulk.remove(&origin);
            }
        }
        Some(frame)
    }

    fn len(&self) -> usize {
        self.vital.len() + self.live.len() + self.presence.len() + self.bulk.len()
    }
}

/// See the module. Shared between the replication task and the link's.
#[derive(Default)]
pub(super) struct Outgoing {
    waiting: Mutex<Waiting>,
    news: Notify,
    /// Told when documents may be read again.
    room: Notify,
    closed: CancellationToken,
    /// Whether long frames are cut.
    cuts: bool,
    next_transfer: AtomicU64,
}

impl Outgoing {
    /// To a peer that takes parts, or that does not.
    pub(super) fn to(peer_takes_parts: bool) -> Self {
        Self { cuts: peer_takes_parts, ..Self::default() }
    }

    pub(super) fn push(&self, frame: LinkFrame) {
        self.queue(frame, false);
    }

    /// Queues a frame of a stream that catches up.
    pub(super) fn push_catch_up(&self, frame: LinkFrame) {
        self.queue(frame, true);
    }

    fn queue(&self, frame: LinkFrame, catching_up: bool) {
        let parts = match self.cuts && weight(&frame) > LINK_PART_BYTES + SMALL_BYTES {
            // Encoded before the lock is taken: a document may be large.
            true => {
                let transfer = self.next_transfer.fetch_add(1, Ordering::Relaxed);
                parts::cut(transfer, codec::encode(&frame).into()).collect()
            }
            false => Vec::new(),
        };
        self.waiting.lock().push(frame, parts, catching_up);
        self.news.notify_one();
    }

    /// Queues presence; returns whether an older frame was dropped for it.
    pub(super) fn push_presence(&self, frame: LinkFrame) -> bool {
        let mut waiting = self.waiting.lock();
        waiting.presence.push_back(frame);
        let full = waiting.presence.len() > PRESENCE_MAX;
        if full {
            waiting.presence.pop_front();
        }
        drop(waiting);
        self.news.notify_one();
        full
    }

    /// Sends what waits and may go, then ends the link.
    pub(super) fn close(&self) {
        self.closed.cancel();
        self.news.notify_one();
    }

    /// Resolves when the link is to end.
    pub(super) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// The next frames in their order, as many as `fits` takes; before `free_at` only those that are never held back.
    /// Answers how long frames were held back for it, or nothing once the link is to end.
    pub(super) async fn take(
        &self,
        free_at: Option<Instant>,
        mut fits: impl FnMut(LinkFrame) -> bool,
    ) -> Option<Duration> {
        let mut held_since: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let free_at = free_at.filter(|at| *at > now);
            let held = {
                let mut waiting = self.waiting.lock();
                let mut taken = false;
                while let Some(frame) = waiting.next(free_at.is_none()) {
                    taken = true;
                    if !fits(frame) {
                        break;
                    }
                }
                if taken {
                    if waiting.bulk_bytes < BULK_BYTES_MAX {
                        self.room.notify_waiters();
                    }
                    return Some(held_since.map_or(Duration::ZERO, |since| now - since));
                }
                if self.closed.is_cancelled() {
                    return None;
                }
                waiting.len() > 0
            };
            match free_at {
                Some(at) if held => {
                    held_since.get_or_insert(now);
                    tokio::select! {
                        () = self.news.notified() => {}
                        () = tokio::time::sleep_until(at.into()) => {}
                    }
                }
                _ => self.news.notified().await,
            }
        }
    }

    /// Resolves when a whole document may be read for the link, or the link has ended.
    pub(super) async fn until_room(&self) {
        loop {
            let room = self.room.notified();
            if self.bulk_bytes() < BULK_BYTES_MAX {
                return;
            }
            tokio::select! {
                () = room => {}
                () = self.closed() => return,
            }
        }
    }

    /// Bytes of whole documents and entries that catch up.
    pub(super) fn bulk_bytes(&self) -> usize {
        self.waiting.lock().bulk_bytes
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.lock().len()
    }
}

#[cfg(test)]
mod tests;
