//! Documents that were created in two placement groups.
//!
//! In a region a document is of one group, the first that is stored. Nothing of it that comes under another group is merged: in a
//! document, bytes of the two could not be told apart any more, and would go to regions that are only in one of them. The
//! foreign log entries are stored and relayed as all are, within their own group; the document is quarantined.
//!
//! Storage decides, in the transaction that would store the changes (contract clause 19), so a document need not be loaded for it
//! and no crash comes between. What is here keeps the same out of documents in memory, and tells the operator.

use std::collections::HashSet;
use std::sync::Arc;

use isobar_protocol::ids::{DocumentId, PlacementGroup};

use super::replication::Part;
use super::{Document, Documents};
use crate::commit::{Committer, Stopped};
use crate::storage::{DocumentState, StorageError, two_groups};

/// Documents that are remembered as reported. When there are more, some are reported again.
const REPORTED_MAX: usize = 65_536;

/// The documents that were reported by this process.
#[derive(Default)]
pub(super) struct Conflicts(HashSet<DocumentId>);

impl Conflicts {
    /// Returns whether the document is new.
    fn note(&mut self, document: &DocumentId) -> bool {
        if self.0.len() >= REPORTED_MAX {
            self.0.clear();
        }
        self.0.insert(document.clone())
    }
}

impl Documents {
    /// Settles the group of a document that changes of this group come to; why it is to be quarantined if it has another. Whoever
    /// is told so quarantines it and says so.
    pub(super) fn conflict(&self, document: &Document, group: &PlacementGroup) -> Option<String> {
        let own = document.settle_group(group).err()?;
        self.conflicts.lock().note(document.id());
        Some(two_groups(&own, group))
    }

    /// Looks, after the commit, whether storage has left changes out because their document is of another group. Only a region
    /// of several groups gets such changes.
    pub(super) async fn was_left_out(&self, part: &Part, committer: &Committer) -> bool {
        if committer.progress().borrow().len() < 2 {
            return false;
        }
        // If it cannot be read nothing is lost but the report: storage has quarantined the document.
        let Ok(Some(found)) = self.storage.find_document(&part.document).await else { return false };
        let is_conflict = found.group != part.group && !matches!(found.state, DocumentState::Deleted { .. });
        if is_conflict {
            self.report_conflict(&part.document, &two_groups(&found.group, &part.group));
        }
        is_conflict
    }

    /// Quarantines a document of which another region's copy is of another group.
    pub(super) async fn quarantine_conflict(
        &self,
        id: &DocumentId,
        own: &PlacementGroup,
        other: &PlacementGroup,
    ) -> Result<(), StorageError> {
        let reason = two_groups(own, other);
        self.report_conflict(id, &reason);
        self.storage.set_state(id, &DocumentState::Quarantined { reason }).await
    }

    /// The same for one in memory, which need not be in storage yet.
    pub(super) async fn refuse_copy(
        self: &Arc<Self>,
        document: &Document,
        own: &PlacementGroup,
        other: &PlacementGroup,
        committer: &Committer,
    ) -> Result<(), RefusalError> {
        // What has created it stands in the queue at the latest.
        let permits = committer.reserve_received(0).await;
        self.store(Vec::new(), permits, committer).await?;
        Ok(self.quarantine_conflict(document.id(), own, other).await?)
    }

    fn report_conflict(&self, id: &DocumentId, reason: &str) {
        if self.conflicts.lock().note(id) {
            tracing::error!(document = %id, reason, "document quarantined");
            self.metrics.quarantines.increment(1);
        }
        if let Some(document) = self.resident(id) {
            document.lock().quarantine();
        }
    }
}

/// Why it is not known whether a document was quarantined.
#[derive(Debug, thiserror::Error)]
pub(super) enum RefusalError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}
