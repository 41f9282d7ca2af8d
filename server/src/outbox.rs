//! What waits to be sent on one client's connection.
//!
//! Sync messages do not wait here: only the fact that a subscription has something to say. The message is built when
//! the socket takes it. Frames that cannot be rebuilt, presence above all, wait in a short queue that drops the
//! oldest: they are lossy by nature.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use isobar_protocol::ids::DocumentId;
use parking_lot::Mutex;

/// Lossy frames that wait on one connection at most. Presence sends a few a second for each person in a document.
const FRAMES_MAX: usize = 256;

/// Bytes of lossy frames that wait on one connection at most.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// The number of a subscription within its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub u32);

/// An ephemeral message on its way to many connections.
#[derive(Debug)]
pub struct Ephemeral {
    pub sender: String,
    pub document: DocumentId,
    pub session: String,
    pub count: u64,
    pub data: bytes::Bytes,
}

/// A frame whose target is filled in when it is sent.
#[derive(Debug, Clone)]
pub enum LossyFrame {
    Ephemeral(Arc<Ephemeral>),
    RemoteHeads { document: DocumentId, heads: isobar_protocol::wire::RemoteHeads },
}

impl LossyFrame {
    fn bytes(&self) -> usize {
        match self {
            LossyFrame::Ephemeral(it) => it.data.len() + it.session.len() + 256,
            LossyFrame::RemoteHeads { heads, .. } => heads.heads.len() * 64 + 256,
        }
    }
}

/// Why a connection is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// The same client has joined on another connection.
    Replaced,
    /// The node is shutting down.
    Drain,
}

#[derive(Debug, Default)]
struct Waiting {
    closing: Option<Closing>,
    dirty: Vec<Slot>,
    frames: VecDeque<LossyFrame>,
    frame_bytes: usize,
}

/// Shared between a connection and the documents it subscribes to.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    woken: AtomicBool,
    waker: AtomicWaker,
}

impl Outbox {
    /// Notes that a subscription may have something to say. The caller sees to it that a slot is noted once until
    /// it is taken.
    pub fn mark(&self, slot: Slot) {
        self.waiting.lock().dirty.push(slot);
        self.wake();
    }

    /// Queues a frame; returns how many older ones were dropped to make room.
    pub fn push(&self, frame: LossyFrame) -> u64 {
        if frame.bytes() > FRAME_BYTES_MAX {
            // It shall not push everybody else's out before it is dropped itself.
            return 1;
        }
        let mut dropped = 0;
        {
            let mut waiting = self.waiting.lock();
            waiting.frame_bytes += frame.bytes();
            waiting.frames.push_back(frame);
            while waiting.frames.len() > FRAMES_MAX || waiting.frame_bytes > FRAME_BYTES_MAX {
                let Some(oldest) = waiting.frames.pop_front() else { break };
                waiting.frame_bytes -= oldest.bytes();
                dropped += 1;
            }
        }
        self.wake();
        dropped
    }

    /// Asks the connection to end.
    pub fn close(&self, closing: Closing) {
        self.waiting.lock().closing.get_or_insert(closing);
        self.wake();
    }

    /// Why the connection is asked to end, if it is.
    pub fn closing(&self) -> Option<Closing> {
        self.waiting.lock().closing
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Ready, once, when something has come to wait since it was last ready. For the connection's task alone.
    pub fn poll_woken(&self, context: &mut Context<'_>) -> Poll<()> {
        // Registered first: what comes between the two lines wakes the task.
        self.waker.register(context.waker());
        if self.woken.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Takes all that waits; the vector is reused.
    pub fn take(&self, marked: &mut Vec<Slot>) -> VecDeque<LossyFrame> {
        let mut waiting = self.waiting.lock();
        marked.append(&mut waiting.dirty);
        waiting.frame_bytes = 0;
        std::mem::take(&mut waiting.frames)
    }
}
