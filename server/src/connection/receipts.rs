//! "Saved in …": telling a client which regions hold its documents.
//!
//! Clients that announced the extra are sent receipts; stock clients that watch the storages of regions are sent the same as
//! remote heads. Nobody else is followed.

use std::sync::Arc;

use isobar_protocol::wire::{self, RemoteHeads, Saved};

use super::remote_heads::now_ms;
use super::{Connection, Ending};
use crate::documents::{Document, SubscriberKey};
use crate::outbox::Slot;
use crate::receipts::Receipts;

/// A client's wish to hear of a document's receipts; it ends with the value.
pub(super) struct Following {
    receipts: Arc<Receipts>,
    document: Arc<Document>,
    key: SubscriberKey,
    /// The version that the client was told.
    told: u64,
    /// Where the durable changes ended when that was last passed on.
    end: u64,
}

impl Following {
    fn begin(receipts: &Arc<Receipts>, document: &Arc<Document>, key: SubscriberKey) -> Self {
        receipts.follow(document, key);
        Self { receipts: receipts.clone(), document: document.clone(), key, told: 0, end: 0 }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.receipts.unfollow(self.document.id(), self.key);
    }
}

impl Connection {
    /// Begins or ends to follow a document, as the client wishes now.
    pub(super) fn follow_receipts(&mut self, slot: Slot) {
        let wanted = self.hears_receipts || self.watched.others();
        let subscription = &mut self.subscriptions[slot.0 as usize];
        subscription.following = match (wanted, subscription.following.take()) {
            (false, _) => None,
            (true, Some(mut following)) => {
                // It may watch other storages than before.
                following.told = 0;
                Some(following)
            }
            (true, None) => {
                let receipts = &self.node.receipts;
                Some(Following::begin(receipts, &subscription.document, subscription.key))
            }
        };
    }

    /// Tells a client that follows a document what has become known since it was told last. Returns the bytes sent.
    pub(super) fn report_receipts(&mut self, slot: Slot) -> Result<usize, Ending> {
        let subscription = &mut self.subscriptions[slot.0 as usize];
        let Some(following) = &mut subscription.following else { return Ok(0) };
        let document = subscription.document.clone();
        let end = document.durable_end();
        if std::mem::replace(&mut following.end, end) != end {
            following.receipts.moved(document.id());
        }
        let (saved, version) = following.receipts.since(document.id(), following.told);
        following.told = version;
        if saved.is_empty() {
            return Ok(0);
        }
        if self.hears_receipts {
            let frame = wire::encode_receipt(&self.node.peer_id, &self.peer, document.id(), &saved);
            return self.send_bytes(frame);
        }
        // Its own region's heads it hears as soon as they are durable.
        let watched =
            |it: &Saved| it.storage_id != self.node.storage_id && self.watched.contains(&it.storage_id);
        let watched = saved.into_iter().filter(watched);
        let heads: Vec<RemoteHeads> = watched
            .map(|Saved { storage_id, heads, .. }| RemoteHeads { storage_id, heads, timestamp: now_ms() })
            .collect();
        if heads.is_empty() {
            return Ok(0);
        }
        let frame = wire::encode_remote_heads_changed(&self.node.peer_id, &self.peer, document.id(), &heads);
        self.send_bytes(frame)
    }
}
