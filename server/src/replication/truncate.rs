//! Giving up log entries that every region has.
//!
//! An origin's entries go once each member region has acknowledged them and they are of a certain age. A member is whoever
//! was ever linked. One that was not linked for long is marked ([`super::members`]), and not waited for any more: it will fetch a
//! snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::ids::{RegionName, Seq};
use tokio::time::Instant;

use super::Replication;
use crate::storage::{Member, Storage, StorageError, StoredOrigin};
use crate::telemetry::Metrics;

/// What is kept for how long.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// How often logs are looked at.
    pub every: Duration,
    /// How long entries are kept that everybody has.
    pub entries: Duration,
    /// After so long without a link a member is not waited for.
    pub silence: Duration,
}

impl Replication {
    /// The members that are waited for, and how far each has the origin. A region that is not in the origin's group never
    /// has it; one that was not linked since the node started may be in it.
    fn awaited(&self, origin: &StoredOrigin) -> BTreeMap<RegionName, Seq> {
        let members = self.members();
        let known = self.shared.known.lock();
        let in_group =
            |region: &RegionName| known.get(region).is_none_or(|peer| peer.groups.contains(&origin.group));
        let is_awaited = |it: &Member| !it.needs_snapshot || self.is_linked_to(&it.region);
        let members = members.into_iter().filter(|it| is_awaited(it) && in_group(&it.region));
        members.map(|it| (it.region.clone(), self.acknowledged(&it.region, origin.id))).collect()
    }

    /// The seq up to which everybody has an origin.
    fn everybody_has(&self, origin: &StoredOrigin) -> Seq {
        let least = self.awaited(origin).into_values().min();
        least.unwrap_or(origin.seq).min(origin.seq)
    }

    /// Truncates the logs now and then; to be run as a task.
    pub async fn truncate_logs(self, storage: Arc<dyn Storage>, metrics: Arc<Metrics>, keep: Keep) {
        let mut ticks = tokio::time::interval_at(Instant::now() + keep.every, keep.every);
        loop {
            ticks.tick().await;
            if !self.keeps_links() {
                continue;
            }
            if let Err(error) = self.truncate_all(&*storage, &metrics, keep).await {
                tracing::warn!(%error, "logs not truncated");
            }
        }
    }

    async fn truncate_all(
        &self,
        storage: &dyn Storage,
        metrics: &Metrics,
        keep: Keep,
    ) -> Result<(), StorageError> {
        self.mark_silent(storage, metrics, keep.silence).await?;
        let mut held = 0;
        for origin in storage.origins().await? {
            let up_to = self.everybody_has(&origin);
            held += origin.seq.0 - up_to.0;
            storage.truncate_log(origin.id, up_to, keep.entries).await?;
        }
        metrics.log_entries_held.set(held as f64);
        metrics.log_truncations.increment(1);
        Ok(())
    }
}
