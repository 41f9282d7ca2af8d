//! Presence between the nodes of a region.
//!
//! A message goes one hop among the nodes: whoever hears it from a sibling relays it to its clients, and the keeper of the links
//! to other regions. What a document has seen of an author it drops.

use std::sync::Arc;

use isobar_protocol::config::PRESENCE_DATA_BYTES_MAX;
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::notice::Notice;
use uuid::Uuid;

use super::Exchange;
use crate::outbox::Ephemeral;
use crate::siblings::interests::Wanted;

impl Exchange {
    /// Passes a client's message on to the siblings that want it, for themselves or for other regions; lossy.
    pub(crate) fn relay(&self, group: &PlacementGroup, message: &Ephemeral) {
        if !self.has_siblings() {
            return;
        }
        let wanted = self.interests.lock().wanted(&message.document, group);
        if wanted != (Wanted { by_sessions: false, by_regions: false }) {
            self.tell_presence(false, group, message);
        }
    }

    /// Passes a message of another region on to the siblings that want it; lossy.
    pub(crate) fn relay_from_region(&self, group: &PlacementGroup, message: &Ephemeral) {
        if self.has_siblings() && self.interests.lock().wanted(&message.document, group).by_sessions {
            self.tell_presence(true, group, message);
        }
    }

    fn tell_presence(&self, from_region: bool, group: &PlacementGroup, message: &Ephemeral) {
        let Ephemeral { sender, document, session, count, data } = message;
        if data.len() > PRESENCE_DATA_BYTES_MAX {
            return self.parts.metrics.lossy_dropped.increment(1);
        }
        let notice = Notice::Presence {
            from_region,
            group: group.clone(),
            document: document.clone(),
            sender: sender.clone(),
            session: session.clone(),
            count: *count,
            data: data.clone(),
        };
        let told = self.notices.tell_lossy(notice.encode());
        self.count_told(told);
        self.parts.metrics.lossy_dropped.increment(u64::from(!told));
    }

    /// Takes a sibling's message for the clients here and, if it is a client's and this node keeps the links, for other regions.
    pub(super) fn hear_presence(&self, from_region: bool, group: &PlacementGroup, message: Ephemeral) {
        let message = Arc::new(message);
        if let Some(document) = self.parts.documents.resident(&message.document) {
            let Some(dropped) = document.relay(None, &message) else { return };
            self.parts.metrics.lossy_dropped.increment(dropped);
        }
        if let Some(inbox) = self.inbox.get().filter(|_| !from_region && self.keeps_links()) {
            inbox.relay(group, &message);
        }
    }

    /// What the sessions of siblings have open.
    pub(crate) fn open_at_siblings(&self) -> Vec<(DocumentId, PlacementGroup)> {
        self.interests.lock().open_at_siblings()
    }

    /// The group of a document that a sibling's sessions have open.
    pub(crate) fn group_of(&self, document: &DocumentId) -> Option<PlacementGroup> {
        self.interests.lock().group_of(document)
    }

    /// Whether a sibling has said lately that its sessions have documents open.
    pub(crate) fn is_heard(&self, node: &Uuid) -> bool {
        self.interests.lock().is_heard(node)
    }

    /// What other regions want, as the one that keeps the links knows.
    pub(crate) fn regions_want(&self, documents: Vec<DocumentId>) {
        *self.regions_want.lock() = documents;
    }
}
