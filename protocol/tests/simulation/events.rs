//! What happens in a world, each at its moment. Numbers of regions, connections and clients are their places in the world's lists;
//! a life is the number of a node's start, so that what was meant for a node that died finds nobody.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::sync::Arc;

use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::Progress;
use isobar_protocol::replica::LinkId;

use crate::bases::NewBase;
use crate::change_bytes::Made;
use crate::commits::Batch;

#[derive(Debug)]
pub enum Event {
    /// A node's timer; the second number is the node's life, here and below.
    Tick(usize, u64),
    Deliver {
        connection: usize,
        from: usize,
    },
    LinkUp {
        connection: usize,
        side: usize,
    },
    LinkDown {
        connection: usize,
        side: usize,
    },
    Dial(usize),
    CommitDone(usize, u64),
    /// The node goes on after a commit.
    Committed(usize, u64),
    /// A commit is done whose node has died.
    LateCommit {
        region: usize,
        disk: u64,
        batch: Box<Batch>,
    },
    /// A snapshot's vector is to be adopted; and is.
    Adopt {
        region: usize,
        life: u64,
        origins: Vec<Progress>,
    },
    Adopted {
        region: usize,
        life: u64,
        origins: Vec<Progress>,
    },
    BaseMade {
        region: usize,
        life: u64,
        document: DocumentId,
        base: Box<NewBase>,
    },
    BaseInstalled {
        region: usize,
        life: u64,
        document: DocumentId,
        generation: u64,
        load: u64,
    },
    Prune {
        region: usize,
        life: u64,
        document: DocumentId,
    },
    LogRead {
        region: usize,
        life: u64,
        link: LinkId,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    },
    PageRead {
        region: usize,
        life: u64,
        link: LinkId,
        after: Option<DocumentId>,
        groups: BTreeSet<PlacementGroup>,
    },
    Turn(usize),
    /// What a client sent arrives.
    Offer {
        client: usize,
        region: usize,
        life: u64,
        document: DocumentId,
        changes: Vec<Arc<Made>>,
    },
    /// A client hears that changes of its own are kept.
    Acknowledged {
        client: usize,
        document: DocumentId,
        changes: Vec<ChangeHash>,
    },
    Fault,
    Heal {
        pair: usize,
        from: usize,
    },
    Start(usize),
    Join,
    /// A region leaves for good.
    Leave(usize),
    /// A comparison goes on, or begins.
    Scrub,
}

/// What is to happen, in the order of moments, and of numbers within one. Events are large: what is sorted is their places.
#[derive(Debug, Default)]
pub struct Agenda {
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    last_number: u64,
}

impl Agenda {
    pub fn add(&mut self, at: u64, event: Event) {
        self.last_number += 1;
        self.put_back(at, self.last_number, event);
    }

    /// Adds an event under the number that it had before.
    pub fn put_back(&mut self, at: u64, number: u64, event: Event) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.order.push(Reverse((at, number, place)));
    }

    /// Takes out the first event if it is to happen up to some moment; with its own, and its number.
    pub fn next(&mut self, until: u64) -> Option<(u64, u64, Event)> {
        self.order.peek().filter(|Reverse((at, ..))| *at <= until)?;
        let Reverse((at, number, place)) = self.order.pop()?;
        self.free.push(place);
        Some((at, number, self.events[place].take()?))
    }
}
