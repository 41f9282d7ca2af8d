//! Hashing stored bytes again, a little at a time, for as long as the node runs.
//!
//! Disks forget. A change whose bytes do not match its name any more, a row that does not decode, a base whose parts do not
//! agree: whatever is found is reported once, and mended with what another region has. What cannot be mended is tried
//! again; without any other region the document is quarantined, and nothing else is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isobar_protocol::ids::DocumentId;

use crate::commit::Committer;
use crate::documents::{Damage, Documents};
use crate::replication::Replication;
use crate::storage::{Storage, StorageError};
use crate::telemetry::Metrics;

/// Documents listed at a time.
const PAGE_DOCUMENTS: u32 = 256;

/// What looking at a document costs beside its bytes, in bytes: a small one is a page of the database.
const DOCUMENT_BYTES: usize = 4 << 10;

/// Between two walks through everything, however little there is.
const PAUSE: Duration = Duration::from_secs(60);

/// How often documents that could not be mended are tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How long another region is waited for, after the first damage was found, before a document is quarantined.
const PEERS_PATIENCE: Duration = Duration::from_secs(30);

/// Damaged documents that are remembered, to be mended; others are found again by the next walk.
const DAMAGED_MAX: usize = 1_000;

/// The walk.
pub struct Verifier {
    pub storage: Arc<dyn Storage>,
    pub documents: Arc<Documents>,
    pub committer: Committer,
    pub replication: Option<Replication>,
    pub metrics: Arc<Metrics>,
    /// How many bytes are read in a second.
    pub bytes_per_second: u64,
}

/// A document that is not mended yet.
struct Damaged {
    found: Vec<Damage>,
    since: Instant,
    is_quarantined: bool,
}

type Open = BTreeMap<DocumentId, Damaged>;

impl Verifier {
    /// Walks for ever; to be run as a task.
    pub async fn run(self) {
        let mut open = Open::new();
        let mut retried = Instant::now();
        loop {
            if self.is_up_to_it()
                && let Err(error) = self.walk(&mut open, &mut retried).await
            {
                tracing::warn!(%error, "stored bytes not verified");
            }
            let ends = Instant::now() + PAUSE;
            while Instant::now() < ends {
                tokio::time::sleep(RETRY).await;
                self.retry(&mut open, &mut retried).await;
            }
        }
    }

    /// Of several nodes only the one that keeps the links can mend anything; it looks for all.
    fn is_up_to_it(&self) -> bool {
        self.replication.as_ref().is_none_or(Replication::keeps_links)
    }

    async fn walk(&self, open: &mut Open, retried: &mut Instant) -> Result<(), StorageError> {
        let mut after: Option<DocumentId> = None;
        loop {
            let listed = self.storage.list_documents(after.as_ref(), PAGE_DOCUMENTS).await?;
            let is_last = listed.len() < PAGE_DOCUMENTS as usize;
            for document in listed {
                let bytes = match self.documents.inspect(&document.id, true).await {
                    Ok(Some(inspection)) => {
                        self.metrics.verified_bytes.increment(inspection.bytes as u64);
                        self.found(&document.id, inspection.damage, open).await;
                        inspection.bytes
                    }
                    Ok(None) => 0,
                    Err(error) => {
                        tracing::warn!(document = %document.id, %error, "stored document not verified");
                        0
                    }
                };
                let cost = (bytes + DOCUMENT_BYTES) as f64 / self.bytes_per_second as f64;
                tokio::time::sleep(Duration::from_secs_f64(cost)).await;
                self.retry(open, retried).await;
                after = Some(document.id);
            }
            if is_last {
                return Ok(());
            }
        }
    }

    /// Reports damage that is new, and has it mended.
    async fn found(&self, id: &DocumentId, damage: Vec<Damage>, open: &mut Open) {
        if damage.is_empty() {
            open.remove(id);
            return;
        }
        let known = open.get(id).map(|it| it.found.clone()).unwrap_or_default();
        for damage in damage.iter().filter(|it| !known.contains(it)) {
            tracing::error!(document = %id, %damage, "stored bytes are damaged");
            match damage {
                Damage::Change(_) => self.metrics.changes_damaged.increment(1),
                Damage::Row(names) => self.metrics.changes_damaged.increment(names.len().max(1) as u64),
                Damage::Base(_) => self.metrics.bases_damaged.increment(1),
            }
        }
        if open.contains_key(id) || open.len() < DAMAGED_MAX {
            let entry = open.entry(id.clone()).or_insert_with(|| Damaged {
                found: Vec::new(),
                since: Instant::now(),
                is_quarantined: false,
            });
            entry.found = damage;
            self.mend(id, open).await;
        }
    }

    async fn retry(&self, open: &mut Open, retried: &mut Instant) {
        if open.is_empty() || retried.elapsed() < RETRY || !self.is_up_to_it() {
            return;
        }
        *retried = Instant::now();
        let ids: Vec<DocumentId> = open.keys().cloned().collect();
        for id in ids {
            self.mend(&id, open).await;
        }
    }

    async fn mend(&self, id: &DocumentId, open: &mut Open) {
        let fetched = match &self.replication {
            Some(replication) => replication.mend(id, &self.documents, &self.committer).await,
            None => Ok(false),
        };
        match fetched {
            Ok(true) => {}
            Ok(false) => return self.nobody_helps(id, open).await,
            Err(error) => {
                tracing::warn!(document = %id, %error, "damaged document not mended yet");
                return;
            }
        }
        match self.documents.inspect(id, true).await {
            Ok(Some(inspection)) if !inspection.damage.is_empty() => self.nobody_helps(id, open).await,
            Ok(_) => {
                open.remove(id);
                self.metrics.damage_mended.increment(1);
                tracing::warn!(document = %id, "damaged document mended from another region");
            }
            Err(error) => tracing::warn!(document = %id, %error, "mended document not verified yet"),
        }
    }

    /// Takes a document out of service that no region has whole, or that there is no other region for.
    async fn nobody_helps(&self, id: &DocumentId, open: &mut Open) {
        let Some(damaged) = open.get_mut(id) else { return };
        let is_alone = self.replication.is_none() || damaged.since.elapsed() >= PEERS_PATIENCE;
        if damaged.is_quarantined || !is_alone {
            return;
        }
        let Some(first) = damaged.found.first() else { return };
        match self.documents.quarantine_damaged(id, first).await {
            Ok(()) => damaged.is_quarantined = true,
            Err(error) => tracing::warn!(document = %id, %error, "quarantine not recorded"),
        }
    }
}
