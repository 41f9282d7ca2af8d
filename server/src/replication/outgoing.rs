//! What waits to be sent on one link.
//!
//! Entries are bounded by the link's window, answers by the peer's questions, and the rest is small and rare; presence is
//! lossy and has a short queue of its own, out of which the oldest falls first.

use std::collections::VecDeque;

use isobar_protocol::link::LinkFrame;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Presence frames that wait on one link at most.
const PRESENCE_MAX: usize = 1_024;

#[derive(Default)]
struct Waiting {
    frames: VecDeque<LinkFrame>,
    presence: VecDeque<LinkFrame>,
}

/// See the module. Shared between the replication task and the link's.
#[derive(Default)]
pub(super) struct Outgoing {
    waiting: Mutex<Waiting>,
    news: Notify,
    closed: CancellationToken,
}

impl Outgoing {
    pub(super) fn push(&self, frame: LinkFrame) {
        self.waiting.lock().frames.push_back(frame);
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

    /// Sends what waits, then ends the link.
    pub(super) fn close(&self) {
        self.closed.cancel();
        self.news.notify_one();
    }

    /// Resolves when the link is to end.
    pub(super) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// The next frames, presence first, as many as `fits` takes; nothing once the link is to end.
    pub(super) async fn take(&self, mut fits: impl FnMut(LinkFrame) -> bool) -> Option<()> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                let mut taken = false;
                while let Some(frame) = waiting.presence.pop_front().or_else(|| waiting.frames.pop_front()) {
                    taken = true;
                    if !fits(frame) {
                        break;
                    }
                }
                if taken {
                    if !waiting.frames.is_empty() || !waiting.presence.is_empty() {
                        self.news.notify_one();
                    }
                    return Some(());
                }
                if self.closed.is_cancelled() {
                    return None;
                }
            }
            self.news.notified().await;
        }
    }

    pub(super) fn len(&self) -> usize {
        let waiting = self.waiting.lock();
        waiting.frames.len() + waiting.presence.len()
    }
}
