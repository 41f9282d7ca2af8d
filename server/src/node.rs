//! What the parts of a running node share.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use isobar_protocol::ids::{PeerId, StorageId};
use parking_lot::Mutex;

use crate::commit::Committer;
use crate::config::Settings;
use crate::documents::Documents;
use crate::outbox::{Closing, Outbox};
use crate::receipts::Receipts;
use crate::replication::Replication;
use crate::siblings::exchange::Exchange;
use crate::storage::Storage;
use crate::telemetry::Metrics;

/// A running node, as its connections and HTTP handlers see it.
pub struct Node {
    pub settings: Settings,
    /// This process, to clients.
    pub peer_id: PeerId,
    /// The region's storage, to clients: the same for all nodes and over restarts.
    pub storage_id: StorageId,
    pub storage: Arc<dyn Storage>,
    pub documents: Arc<Documents>,
    pub committer: Committer,
    /// Nothing if the node has nothing to do with other regions.
    pub replication: Option<Replication>,
    /// What passes between this node and its siblings.
    pub exchange: Arc<Exchange>,
    pub receipts: Arc<Receipts>,
    pub sessions: Sessions,
    pub metrics: Arc<Metrics>,
    pub draining: AtomicBool,
}

impl Node {
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// The clients that have joined, by peer id. There is one connection for each: a second join takes the place of the
/// first, whose socket may be dead without anybody having noticed.
#[derive(Default)]
pub struct Sessions {
    by_peer: Mutex<HashMap<PeerId, (u64, Arc<Outbox>)>>,
    next: AtomicU64,
}

impl Sessions {
    /// Enters a client; the one that had the same id is told to go. Returns a number to leave with.
    pub fn enter(&self, peer: &PeerId, outbox: &Arc<Outbox>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let previous = self.by_peer.lock().insert(peer.clone(), (number, outbox.clone()));
        if let Some((_, outbox)) = previous {
            outbox.close(Closing::Replaced);
        }
        number
    }

    pub fn leave(&self, peer: &PeerId, number: u64) {
        let mut by_peer = self.by_peer.lock();
        if by_peer.get(peer).is_some_and(|(current, _)| *current == number) {
            by_peer.remove(peer);
        }
    }

    pub fn outboxes(&self) -> Vec<Arc<Outbox>> {
        self.by_peer.lock().values().map(|(_, outbox)| outbox.clone()).collect()
    }
}
