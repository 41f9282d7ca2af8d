//! "Saved in …": telling a client what other storages hold, this region's first of all.
//!
//! A client names the storages that it watches. The region's own storage is reported from what is durable; others
//! from what their owners report through their own connections.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use isobar_protocol::config::REMOTE_HEADS_STORAGES_MAX;
use isobar_protocol::ids::{DocumentId, StorageId};
use isobar_protocol::wire::{self, PeerMetadata, RemoteHeads};

use super::{Connection, Ending};
use crate::outbox::{LossyFrame, Slot};

/// The storages that a client watches.
pub(super) struct Watched {
    region: StorageId,
    /// The client's own storage: it knows what that has.
    own: Option<StorageId>,
    storages: HashSet<StorageId>,
}

impl Watched {
    pub(super) fn new(region: &StorageId, metadata: &PeerMetadata) -> Self {
        Self { region: region.clone(), own: metadata.storage_id.clone(), storages: HashSet::new() }
    }

    pub(super) fn contains(&self, storage: &StorageId) -> bool {
        self.storages.contains(storage) && self.own.as_ref() != Some(storage)
    }

    fn region(&self) -> bool {
        self.storages.contains(&self.region)
    }

    pub(super) fn others(&self) -> bool {
        self.storages.iter().any(|storage| *storage != self.region)
    }
}

impl Connection {
    pub(super) fn change_watched(&mut self, add: Vec<StorageId>, remove: &[StorageId]) {
        for storage in remove {
            self.watched.storages.remove(storage);
        }
        for storage in add {
            if self.watched.storages.len() < REMOTE_HEADS_STORAGES_MAX {
                self.watched.storages.insert(storage);
            }
        }
        for slot in (0..self.subscriptions.len() as u32).map(Slot) {
            self.subscriptions[slot.0 as usize].reported.clear();
            self.watch_others(slot);
            self.follow_receipts(slot);
            self.mark(slot);
        }
    }

    /// Tells the document whether this client watches storages other than the region's, and passes on what is known.
    pub(super) fn watch_others(&mut self, slot: Slot) {
        let subscription = &self.subscriptions[slot.0 as usize];
        let known = subscription.document.watch(subscription.key, self.watched.others());
        for heads in known {
            let document = subscription.document.id().clone();
            self.outbox.push(LossyFrame::RemoteHeads { document, heads });
        }
    }

    pub(super) fn receive_remote_heads(&mut self, document: &DocumentId, heads: Vec<RemoteHeads>) {
        let Some(slot) = self.slots.get(document) else { return };
        let subscription = &self.subscriptions[slot.0 as usize];
        for heads in heads {
            // What a region has is for the region to say. The client may believe what it says, so it is no breach.
            if self.is_region_storage(&heads.storage_id) {
                self.node.metrics.region_claims_dropped.increment(1);
                continue;
            }
            subscription.document.note_remote_heads(heads, subscription.key);
        }
    }

    fn is_region_storage(&self, storage: &StorageId) -> bool {
        *storage == self.node.storage_id
            || self
                .node
                .replication
                .as_ref()
                .is_some_and(|replication| replication.is_region_storage(storage))
    }

    /// Reports the region's durable heads to a client that watches them, if they have moved. Returns the bytes sent.
    pub(super) fn report_heads(&mut self, slot: Slot) -> Result<usize, Ending> {
        if !self.watched.region() {
            return Ok(0);
        }
        let subscription = &mut self.subscriptions[slot.0 as usize];
        let heads = subscription.document.lock().graph().heads();
        if heads.is_empty() || heads == subscription.reported {
            return Ok(0);
        }
        subscription.reported.clone_from(&heads);
        let document = subscription.document.id().clone();
        let report = RemoteHeads { storage_id: self.node.storage_id.clone(), heads, timestamp: now_ms() };
        let frame = wire::encode_remote_heads_changed(&self.node.peer_id, &self.peer, &document, &[report]);
        self.send_bytes(frame)
    }
}

pub(super) fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_millis() as f64)
}
