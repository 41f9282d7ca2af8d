//! A node's place among the nodes that share a region's database.
//!
//! Nodes of one region find each other through the database they share, and need no other address of each other: each
//! takes a seat, with a number that no other living node has; one of them keeps the region's links to others; and all can
//! tell each other things. A database that only one process opens has one seat ([`Seat::alone`]).
//!
//! A notice is a hint or is worth losing: it goes to the nodes that are there at the moment, in the order in which one
//! node told them, and what was told while a node was out of touch is lost to it. That node learns that it was
//! ([`SeatEvent::Resumed`]), and looks at what it may have missed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Notices that wait to be told at most. More are dropped.
pub const NOTICES_MAX: usize = 4_096;

/// Bytes of notices that wait to be told at most: what a database takes in a second or so.
pub const NOTICES_BYTES_MAX: usize = 8 << 20;

/// Bytes of one notice at most.
pub const NOTICE_BYTES_MAX: usize = 256 << 10;

/// Events that wait at most.
pub const EVENTS_MAX: usize = 1_024;

/// What happens among the nodes of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeatEvent {
    /// A sibling told this.
    Told { by: Uuid, notice: Bytes },
    /// Notices may have been missed: the node has just taken its seat, or was out of touch with the database.
    Resumed,
    /// From now on this node keeps the region's links, or does not any more. Two nodes may believe that they do for a
    /// moment, so nothing may depend on there being one.
    KeepsLinks(bool),
    /// How many other nodes there are.
    Siblings(usize),
    /// Another node has this seat by now: this one was out of touch for too long, and has to stop writing.
    Lost,
}

/// A node's seat, until it is dropped.
pub struct Seat {
    /// Names this process to its siblings.
    pub node: Uuid,
    /// The lowest number that was free.
    pub slot: u32,
    pub notices: Notices,
    /// Begins with [`SeatEvent::Resumed`]; ends when nothing more can happen, which is at once if there can be no siblings.
    pub events: mpsc::Receiver<SeatEvent>,
}

/// Tells the siblings. Cheap to clone.
#[derive(Clone)]
pub struct Notices(Option<Told>);

#[derive(Clone)]
struct Told {
    queue: mpsc::Sender<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// The other end: notices that wait to be told.
pub(super) struct ToTell {
    queue: mpsc::Receiver<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
}

impl ToTell {
    /// The next notice; nothing when nobody can tell any more. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        self.queue.recv().await.inspect(|it| self.taken(it))
    }

    /// The next notice if one waits.
    pub(super) fn try_next(&mut self) -> Option<Bytes> {
        self.queue.try_recv().ok().inspect(|it| self.taken(it))
    }

    fn taken(&self, notice: &Bytes) {
        self.waiting_bytes.fetch_sub(notice.len(), Ordering::Relaxed);
    }
}

impl Told {
    /// Puts a notice into the queue unless it is filled by more than this part.
    fn offer(&self, notice: Bytes, part: usize) -> bool {
        let bytes = notice.len();
        let waiting = self.queue.max_capacity() - self.queue.capacity();
        let waiting_bytes = self.waiting_bytes.load(Ordering::Relaxed);
        if bytes > NOTICE_BYTES_MAX
            || waiting >= NOTICES_MAX / part
            || waiting_bytes + bytes > NOTICES_BYTES_MAX / part
        {
            return false;
        }
        // Before it can be taken out.
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let queued = self.queue.try_send(notice).is_ok();
        if !queued {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        queued
    }
}

impl Notices {
    /// Notices of a seat with siblings, to be taken from the receiver.
    pub(super) fn queue() -> (Self, ToTell) {
        let (sender, queue) = mpsc::channel(NOTICES_MAX);
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let told = Told { queue: sender, waiting_bytes: waiting_bytes.clone() };
        (Self(Some(told)), ToTell { queue, waiting_bytes })
    }

    /// Tells all siblings. Returns false if the notice was dropped: too large, or too many wait.
    pub fn tell(&self, notice: Bytes) -> bool {
        self.0.as_ref().is_none_or(|told| told.offer(notice, 1))
    }

    /// As [`Self::tell`], for what may be lost sooner: it leaves half of the room to others.
    pub fn tell_lossy(&self, notice: Bytes) -> bool {
        self.0.as_ref().is_none_or(|told| told.offer(notice, 2))
    }

    /// Whether there can be siblings at all.
    pub fn can_be_heard(&self) -> bool {
        self.0.is_some()
    }
}

impl Seat {
    /// The seat of a node that has its database for itself.
    pub(super) fn alone() -> Self {
        let (sender, events) = mpsc::channel(2);
        for event in [SeatEvent::Resumed, SeatEvent::KeepsLinks(true)] {
            sender.try_send(event).expect("there is room for two");
        }
        Self { node: Uuid::new_v4(), slot: 0, notices: Notices(None), events }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_bounded_in_number_and_bytes_and_the_lossy_leave_room() {
        let (notices, mut queue) = Notices::queue();
        let told =
            |notice: &Bytes| (0..2 * NOTICES_MAX).take_while(|_| notices.tell_lossy(notice.clone())).count();
        assert_eq!(told(&Bytes::from_static(b"small")), NOTICES_MAX / 2);
        assert!(notices.tell(Bytes::from_static(b"more important")));
        while queue.try_next().is_some() {}
        let large = Bytes::from(vec![0; NOTICE_BYTES_MAX]);
        assert_eq!(told(&large), NOTICES_BYTES_MAX / 2 / NOTICE_BYTES_MAX);
        assert!(notices.tell(large.clone()));
        assert!(!notices.tell([&large[..], b"!"].concat().into()), "it is too large");
        while queue.try_next().is_some() {}
        assert_eq!(queue.waiting_bytes.load(Ordering::Relaxed), 0);
        assert!(Notices(None).tell(large), "nobody hears it, and nothing is lost");
    }
}
