//! Seats among the handles to one store in memory: what a database's locks and notifications are to processes.
//!
//! The first to come keeps the links until it leaves; then the one with the lowest slot.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc::{self, error::TrySendError};
use uuid::Uuid;

use super::Database;
use crate::storage::seat::{EVENTS_MAX, Notices, Seat, SeatEvent, ToTell};

/// A seat that is taken.
#[derive(Debug)]
pub(super) struct Taken {
    node: Uuid,
    events: mpsc::Sender<SeatEvent>,
    /// Something could not be said, because too much waited.
    missed: bool,
}

impl Taken {
    /// Says something without waiting. What finds no room is made good by [`SeatEvent::Resumed`] later.
    fn say(&mut self, event: SeatEvent) {
        if self.missed && self.events.try_send(SeatEvent::Resumed).is_err() {
            return;
        }
        self.missed = matches!(self.events.try_send(event), Err(TrySendError::Full(_)));
    }
}

impl Database {
    fn say_siblings(&mut self) {
        let siblings = self.seats.len().saturating_sub(1);
        self.seats.values_mut().for_each(|seat| seat.say(SeatEvent::Siblings(siblings)));
    }

    fn tell_others(&mut self, by: Uuid, notice: &Bytes) {
        let others = self.seats.values_mut().filter(|seat| seat.node != by);
        others.for_each(|seat| seat.say(SeatEvent::Told { by, notice: notice.clone() }));
    }

    fn leave(&mut self, slot: u32, node: Uuid) {
        self.seats.remove(&slot);
        if self.keeper == Some(node) {
            self.keeper = None;
            if let Some(seat) = self.seats.values_mut().next() {
                self.keeper = Some(seat.node);
                seat.say(SeatEvent::KeepsLinks(true));
            }
        }
        self.say_siblings();
    }
}

/// Takes the lowest seat that is free.
pub(super) fn take(database: &Arc<Mutex<Database>>) -> Seat {
    let node = Uuid::new_v4();
    let (notices, queue) = Notices::queue();
    let (events, received) = mpsc::channel(EVENTS_MAX);
    let slot = {
        let mut database = database.lock();
        let slot =
            (0..).find(|slot| !database.seats.contains_key(slot)).expect("there are more slots than nodes");
        let mut seat = Taken { node, events: events.clone(), missed: false };
        seat.say(SeatEvent::Resumed);
        if database.keeper.is_none() {
            database.keeper = Some(node);
            seat.say(SeatEvent::KeepsLinks(true));
        }
        database.seats.insert(slot, seat);
        database.say_siblings();
        slot
    };
    tokio::spawn(keep(database.clone(), node, slot, events, queue));
    Seat { node, slot, notices, events: received }
}

/// Passes notices on until the seat is dropped.
async fn keep(
    database: Arc<Mutex<Database>>,
    node: Uuid,
    slot: u32,
    events: mpsc::Sender<SeatEvent>,
    mut queue: ToTell,
) {
    loop {
        tokio::select! {
            () = events.closed() => break,
            Some(notice) = queue.next() => database.lock().tell_others(node, &notice),
        }
    }
    database.lock().leave(slot, node);
}
