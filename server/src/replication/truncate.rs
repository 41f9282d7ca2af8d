//! Giving up log entries that every region has.
//!
//! An origin's entries go once each member region has acknowledged them and they are of a certain age. A member is whoever
//! was ever linked. One that has not been heard of for long is not waited for any more: it will fetch a snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::ids::{RegionName, Seq};
use tokio::time::Instant;

use super::Replication;
use crate::storage::{Storage, StoredOrigin};
use crate::telemetry::Metrics;

/// How often it is done.
const INTERVAL: Duration = Duration::from_secs(60);

/// After so long without a link a member is not waited for.
const SILENCE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

impl Replication {
    /// The members that are waited for, and how far each has the origin. A region that is not in the origin's group never
    /// has it; one that was not linked since the node started may be in it.
    fn awaited(&self, origin: &StoredOrigin) -> BTreeMap<RegionName, Seq> {
        let known = self.shared.known.lock();
        let in_group = |region| known.get(region).is_none_or(|peer| peer.groups.contains(&origin.group));
        let heard = self.shared.heard.lock();
        let members = heard.iter().filter(|(_, at)| at.elapsed() < SILENCE_MAX);
        let members = members.filter(|(region, _)| in_group(region));
        members.map(|(region, _)| (region.clone(), self.acknowledged(region, origin.id))).collect()
    }

    /// The seq up to which everybody has an origin.
    fn everybody_has(&self, origin: &StoredOrigin) -> Seq {
        let least = self.awaited(origin).into_values().min();
        least.unwrap_or(origin.seq).min(origin.seq)
    }

    /// Truncates the logs now and then; to be run as a task.
    pub async fn truncate_logs(self, storage: Arc<dyn Storage>, metrics: Arc<Metrics>, keep: Duration) {
        let mut ticks = tokio::time::interval_at(Instant::now() + INTERVAL, INTERVAL);
        loop {
            ticks.tick().await;
            if !self.keeps_links() {
                continue;
            }
            let origins = match storage.origins().await {
                Ok(origins) => origins,
                Err(error) => {
                    tracing::warn!(%error, "logs not truncated");
                    continue;
                }
            };
            for origin in origins {
                let up_to = self.everybody_has(&origin);
                match storage.truncate_log(origin.id, up_to, keep).await {
                    Ok(()) => metrics.log_truncated_seq.set(up_to.0 as f64),
                    Err(error) => tracing::warn!(%error, "log not truncated"),
                }
            }
        }
    }
}
