//! The other regions that were ever linked: when each was last, and which are not waited for any more.
//!
//! A member is waited for before log entries are given up ([`super::truncate`]), until it has been away for too long; then it
//! *needs a snapshot*, which is noted before anything is given up without it. When it is linked again it is waited for
//! as before: what it lacks it gets from the logs, or as a snapshot. What is known of members is in the database, since neither a start of a
//! node nor another node that keeps the links may begin a silence anew.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isobar_protocol::ids::RegionName;

use super::{Replication, Shared};
use crate::storage::{Member, Storage, StorageError};
use crate::telemetry::Metrics;

/// How often it is noted of a region that it is linked: by so much a silence may seem longer after a crash.
pub(super) const NOTE_EVERY: Duration = Duration::from_secs(60);

/// Why a region was not forgotten. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    #[error("the region is linked: stop it first, and take it out of the peers")]
    Linked,
    /// Whether it is linked is not known here.
    #[error(
        "another node of this region keeps its links, and knows whether the region is linked: ask that one"
    )]
    KeptElsewhere,
    #[error("no such region was ever linked, or it was forgotten")]
    Unknown,
    #[error(transparent)]
    Storage(#[from] StorageError),
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

impl Shared {
    /// Takes up what the database has of members. Those that are linked stay as they are.
    pub(super) async fn read_members(&self, storage: &dyn Storage) -> Result<(), StorageError> {
        let noted = storage.members().await?;
        let linked = self.linked.lock();
        let mut members = self.members.lock();
        members.retain(|region, _| linked.contains_key(region));
        for member in noted {
            members.entry(member.region.clone()).or_insert(member);
        }
        Ok(())
    }

    /// A region is linked at this moment. Returns what there is to be noted.
    pub(super) fn is_linked_now(&self, region: &RegionName) -> Member {
        let member = Member { region: region.clone(), linked_at_ms: now_ms(), needs_snapshot: false };
        let before = self.members.lock().insert(region.clone(), member.clone());
        if before.is_some_and(|it| it.needs_snapshot) {
            tracing::info!(%region, "region is back, and is waited for again");
        }
        member
    }
}

impl Replication {
    /// The other regions that were ever linked.
    pub fn members(&self) -> Vec<Member> {
        self.shared.members.lock().values().cloned().collect()
    }

    /// Marks those that have been away for too long, durably; to be called before anything is given up without them.
    pub(super) async fn mark_silent(
        &self,
        storage: &dyn Storage,
        metrics: &Metrics,
        silence: Duration,
    ) -> Result<(), StorageError> {
        self.shared.read_members(storage).await?;
        let silence_ms = u64::try_from(silence.as_millis()).unwrap_or(u64::MAX);
        let now_ms = now_ms();
        for mut member in self.members() {
            let is_silent = now_ms.saturating_sub(member.linked_at_ms) >= silence_ms;
            if is_silent && !member.needs_snapshot && !self.is_linked_to(&member.region) {
                member.needs_snapshot = true;
                storage.note_member(&member).await?;
                if self.is_linked_to(&member.region) {
                    // It came at this moment, which is noted as well.
                    continue;
                }
                self.shared.members.lock().insert(member.region.clone(), member.clone());
                tracing::warn!(region = %member.region, "region was away for too long, and is not waited for any more");
            }
            metrics.needs_snapshot(&member.region, member.needs_snapshot);
        }
        Ok(())
    }

    /// Forgets a region that is not linked and will not be again: nothing is kept for it.
    pub async fn forget(&self, region: &RegionName, storage: &dyn Storage) -> Result<(), ForgetError> {
        if !self.keeps_links() {
            return Err(ForgetError::KeptElsewhere);
        }
        if self.is_linked_to(region) {
            return Err(ForgetError::Linked);
        }
        let was_known = storage.forget_member(region).await?;
        self.shared.members.lock().remove(region);
        self.shared.known.lock().remove(region);
        self.shared.acknowledged.lock().retain(|(of, _), _| of != region);
        if !was_known {
            return Err(ForgetError::Unknown);
        }
        tracing::info!(%region, "region forgotten");
        Ok(())
    }
}
