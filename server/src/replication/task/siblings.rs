//! What the node that keeps the links does for its siblings: it searches for them, finds out who has what they observe, and says
//! how the regions are linked.
//!
//! # Order
//!
//! What a sibling observes is numbered; what does not follow the last is passed over, and the sibling, which is told by each
//! statement how far its observations were taken, begins anew ([`crate::siblings`] tells the other half). How far the logs are
//! is read from the database after an observation has come and before it is handed to the core, so what the sibling's
//! heads hold by its own log or by a run counts (`isobar_protocol::receipts`).

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use isobar_protocol::config::NOTICE_NODES_MAX;
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::link::Standing;
use isobar_protocol::notice::{Notice, Observation, ObserverStanding, parts};
use isobar_protocol::receipts::Observer;
use isobar_protocol::replica::LinkId;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::Task;
use super::receipts::Held;
use crate::replication::{Event, SearchOutcome};
use crate::siblings::SEARCH_SAID_EVERY;
use crate::storage::StoredOrigin;

/// How often it is said how the regions are linked and how far observations were taken.
const STATE_EVERY: Duration = Duration::from_secs(1);

/// Observations that wait for the logs' positions at most. What is more is passed over, and observed anew.
const WAITING_MAX: usize = 256;

/// A node that says nothing of itself for that long observes nothing any more. One that was only quiet begins anew.
const SILENCE: Duration = Duration::from_secs(30);

/// How far the observations of a node were taken.
#[derive(Debug)]
struct Taken {
    epoch: u64,
    number: u64,
    /// Notices of reached documents that it was told.
    told: u64,
    heard: Instant,
}

/// A sibling's observations that wait for the logs' positions.
#[derive(Debug)]
struct Waiting {
    observer: Observer,
    /// What it observed before is void.
    is_first: bool,
    observed: Vec<Observation>,
    left: Vec<DocumentId>,
}

/// The siblings that observe documents for their clients.
#[derive(Debug, Default)]
pub(super) struct Observers {
    by_node: BTreeMap<Uuid, Taken>,
    waiting: Vec<Waiting>,
    /// Those for which the logs' positions are being read.
    reading: Vec<Waiting>,
    stated: Option<Instant>,
}

impl Observers {
    /// Takes an observation, unless one before it is missing. Returns whether the logs' positions are to be read.
    fn take(
        &mut self,
        (by, epoch, number): (Uuid, u64, u64),
        observed: Vec<Observation>,
        left: Vec<DocumentId>,
        now: Instant,
    ) -> bool {
        let is_first = number == 1;
        let known = self.by_node.get_mut(&by);
        let follows = known.is_some_and(|it| it.epoch == epoch && it.number + 1 == number);
        let has_room = self.by_node.len() < NOTICE_NODES_MAX || self.by_node.contains_key(&by);
        if !(is_first && has_room || follows) || self.waiting.len() >= WAITING_MAX {
            return false;
        }
        if is_first {
            self.by_node.insert(by, Taken { epoch, number, told: 0, heard: now });
        } else if let Some(taken) = self.by_node.get_mut(&by) {
            (taken.number, taken.heard) = (number, now);
        }
        self.waiting.push(Waiting { observer: Observer(by), is_first, observed, left });
        self.begin_reading()
    }

    /// Takes what waits as that for which the positions are read now, unless they are being read for other.
    fn begin_reading(&mut self) -> bool {
        let begins = self.reading.is_empty() && !self.waiting.is_empty();
        if begins {
            self.reading = std::mem::take(&mut self.waiting);
        }
        begins
    }

    /// A node is told of reached documents. Returns its epoch.
    fn told(&mut self, observer: Observer) -> Option<u64> {
        let taken = self.by_node.get_mut(&observer.0)?;
        taken.told += 1;
        Some(taken.epoch)
    }

    fn standings(&self) -> Vec<ObserverStanding> {
        let standing = |(node, taken): (&Uuid, &Taken)| ObserverStanding {
            node: *node,
            epoch: taken.epoch,
            taken: taken.number,
            told: taken.told,
        };
        self.by_node.iter().map(standing).collect()
    }

    /// Takes out the nodes that are gone.
    fn take_silent(&mut self, now: Instant, is_heard: impl Fn(&Uuid) -> bool) -> Vec<Observer> {
        let mut gone = Vec::new();
        self.by_node.retain(|node, taken| {
            if is_heard(node) {
                taken.heard = now;
            }
            let stays = now.duration_since(taken.heard) < SILENCE;
            if !stays {
                gone.push(Observer(*node));
            }
            stays
        });
        gone
    }
}

impl Task {
    /// A sibling says something to the node that keeps the links.
    pub(super) fn told(&mut self, by: Uuid, notice: Notice) {
        match notice {
            Notice::Search { request, group, document } => self.search_for(by, request, document, group),
            Notice::Observed { epoch, number, observed, left } => {
                let is_due = self.observers.take((by, epoch, number), observed, left, Instant::now());
                if is_due {
                    self.read_origins();
                }
            }
            _ => {}
        }
    }

    fn search_for(&mut self, node: Uuid, request: u64, document: DocumentId, group: PlacementGroup) {
        if !self.replica.groups().contains(&group) {
            return;
        }
        let (found, mut outcome) = oneshot::channel();
        self.search(document, group, found);
        let exchange = self.parts.exchange.clone();
        tokio::spawn(async move {
            // It ends with the task at the latest.
            let outcome = loop {
                match tokio::time::timeout(SEARCH_SAID_EVERY, &mut outcome).await {
                    Ok(outcome) => break outcome.unwrap_or(SearchOutcome::Absent),
                    Err(_) => exchange.tell(&Notice::Searching { node, request }),
                };
            };
            let outcome = match outcome {
                SearchOutcome::Found => Standing::Here,
                SearchOutcome::Absent => Standing::Absent,
                SearchOutcome::Elsewhere { urls } => Standing::Elsewhere { urls },
            };
            exchange.tell(&Notice::Searched { node, request, outcome });
        });
    }

    fn read_origins(&self) {
        let storage = self.parts.storage.clone();
        self.spawn(async move {
            let origins = storage.origins().await;
            let origins =
                origins.inspect_err(|error| tracing::warn!(%error, "origins not read for receipts"));
            Event::OriginsRead(origins.ok())
        });
    }

    pub(super) fn origins_read(&mut self, origins: Option<Vec<StoredOrigin>>) {
        for Waiting { observer, is_first, observed, left } in std::mem::take(&mut self.observers.reading) {
            if is_first {
                self.receipts.forget_observer(observer);
            }
            match &origins {
                Some(origins) => self.observe(observer, observed, left, origins),
                None => self.forget_observer(observer),
            }
        }
        if self.observers.begin_reading() {
            self.read_origins();
        }
    }

    /// A node observes nothing any more; if it does, it learns that it has to begin anew.
    fn forget_observer(&mut self, observer: Observer) {
        self.observers.by_node.remove(&observer.0);
        self.observers.waiting.retain(|it| it.observer != observer);
        self.receipts.forget_observer(observer);
    }

    pub(super) fn tell_reached(&mut self, observer: Observer, link: LinkId, documents: Vec<Held>) {
        let Some(up) = self.links.get(&link) else { return };
        let weight = |(document, heads): &Held| document.as_bytes().len() + 32 * heads.len() + 4;
        for documents in parts(documents, weight) {
            // Counted before it is told: if it is dropped, the node finds that it lacks one.
            let Some(epoch) = self.observers.told(observer) else { return };
            self.parts.exchange.tell(&Notice::Reached {
                node: observer.0,
                epoch,
                region: up.peer.region.clone(),
                storage_id: up.peer.storage_id.clone(),
                link,
                documents,
            });
        }
    }

    /// Says how the regions are linked, and how far observations were taken.
    pub(super) fn state_keeping(&mut self) {
        self.observers.stated = Some(Instant::now());
        // Links that end because another node keeps them are for that one to speak of.
        if self.parts.exchange.has_siblings() && *self.parts.keeps_links.borrow() {
            let regions = self.shared.regions();
            let mut known: HashSet<_> = regions.iter().map(|it| it.region.clone()).collect();
            let mut all = regions;
            // Those that only former keepers had.
            all.extend(
                self.parts.exchange.regions().into_iter().filter(|it| known.insert(it.region.clone())),
            );
            let observers = self.observers.standings();
            self.parts.exchange.tell(&Notice::Keeping { regions: all, observers });
        }
    }

    pub(super) fn look_after_siblings(&mut self) {
        let exchange = self.parts.exchange.clone();
        let gone = self.observers.take_silent(Instant::now(), |node| exchange.is_heard(node));
        gone.into_iter().for_each(|observer| self.forget_observer(observer));
        if self.observers.stated.is_none_or(|stated| stated.elapsed() >= STATE_EVERY) {
            self.state_keeping();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Uuid = Uuid::from_u128(1);

    fn take(observers: &mut Observers, epoch: u64, number: u64) -> bool {
        observers.take((NODE, epoch, number), Vec::new(), Vec::new(), Instant::now())
    }

    fn taken(observers: &Observers) -> Vec<(u64, u64, u64)> {
        observers.standings().iter().map(|it| (it.epoch, it.taken, it.told)).collect()
    }

    #[test]
    fn observations_are_taken_in_their_order_and_none_after_a_gap() {
        let mut observers = Observers::default();
        assert!(!take(&mut observers, 1, 2), "the first is missing");
        assert!(taken(&observers).is_empty());
        assert!(take(&mut observers, 1, 1), "the logs are to be read");
        assert!(!take(&mut observers, 1, 2), "they are being read, for what came before");
        assert_eq!((observers.reading.len(), observers.waiting.len()), (1, 1));
        assert!(!take(&mut observers, 1, 4));
        assert!(!take(&mut observers, 2, 3), "of an epoch that was not begun");
        assert_eq!((observers.told(Observer(NODE)), taken(&observers)), (Some(1), vec![(1, 2, 1)]));

        observers.reading.clear();
        assert!(observers.begin_reading(), "they are read again, for what came since");
        assert!(!observers.waiting.iter().any(|it| it.is_first));
        take(&mut observers, 2, 1);
        assert_eq!(taken(&observers), [(2, 1, 0)]);
        assert!(observers.waiting[0].is_first);
    }

    #[test]
    fn what_waits_is_bounded_and_a_silent_node_is_given_up() {
        let mut observers = Observers::default();
        for number in 1..=2 * WAITING_MAX as u64 {
            take(&mut observers, 1, number);
        }
        assert_eq!(taken(&observers), [(1, WAITING_MAX as u64 + 1, 0)]);
        let now = Instant::now();
        assert!(observers.take_silent(now + SILENCE, |_| true).is_empty());
        assert!(observers.take_silent(now + SILENCE + SILENCE / 2, |_| false).is_empty());
        assert_eq!(observers.take_silent(now + 2 * SILENCE, |_| false), [Observer(NODE)]);
        assert_eq!(observers.told(Observer(NODE)), None);
    }
}
