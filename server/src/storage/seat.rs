//! A node's place among the nodes that share a region's database.
//!
//! Nodes of one region find each other through the database they share, and need no other address of each other: each
//! takes a seat, with a number that no other living node has; one of them keeps the region's links to others; and all can
//! tell each other things. A database that only one process opens has one seat ([`Seat::alone`]).
//!
//! A notice is a hint or is worth losing: it goes to the nodes that are there at the moment, in the order in which one
//! node told them, and what was told while a node was out of touch is lost to it. That node learns that it was
//! ([`SeatEvent::Resumed`]), and looks at what it may have missed.

use bytes::Bytes;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Notices that wait to be told at most. More are dropped.
pub const NOTICES_MAX: usize = 4_096;

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
pub struct Notices(Option<mpsc::Sender<Bytes>>);

impl Notices {
    /// Notices of a seat with siblings, to be taken from the receiver.
    pub(super) fn queue() -> (Self, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(NOTICES_MAX);
        (Self(Some(sender)), receiver)
    }

    /// Tells all siblings. Returns false if the notice was dropped: too large, or too many wait.
    pub fn tell(&self, notice: Bytes) -> bool {
        match &self.0 {
            None => true,
            Some(queue) => notice.len() <= NOTICE_BYTES_MAX && queue.try_send(notice).is_ok(),
        }
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
