//! Reading what siblings append, for the documents in memory.
//!
//! The follower has a position in the log of every origin that this node does not write. Entries after it are offered to
//! documents in memory as ones that are stored; of others they are passed over, as the next load reads them. What this
//! node's committer stored itself went through the documents already and is not read.
//!
//! # Invariant
//!
//! The first positions are read before any document is loaded, so every document in memory has, or is offered, everything
//! that is stored.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::config::Limits;
use isobar_protocol::ids::{OriginId, Seq};
use isobar_protocol::log::{Opened, open_run};

use super::exchange::{self, Exchange};
use crate::commit::Committer;
use crate::documents::Documents;
use crate::storage::{Storage, StorageError, StoredOrigin, StoredRun};
use crate::telemetry::Metrics;

/// How often the logs are looked at without having been told to.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Bytes of a log that are read at once.
const READ_BYTES: usize = 256 << 10;

/// Where each origin stood at some moment.
#[derive(Debug, Default)]
pub struct Positions(HashMap<OriginId, Seq>);

impl Positions {
    /// To be read before any document is loaded.
    pub async fn read(storage: &dyn Storage) -> Result<Self, StorageError> {
        Ok(Self(storage.origins().await?.into_iter().map(|it| (it.id, it.seq)).collect()))
    }
}

/// Is told of the origins of others whenever they were read.
type OnOrigins = Box<dyn Fn(&[StoredOrigin]) + Send>;

/// See the module.
pub struct Follower {
    storage: Arc<dyn Storage>,
    documents: Arc<Documents>,
    committer: Committer,
    metrics: Arc<Metrics>,
    own: HashSet<OriginId>,
    positions: HashMap<OriginId, Seq>,
    /// The documents in memory may lack what no log says.
    refresh_due: bool,
    failing: bool,
    exchange: Arc<Exchange>,
    on_origins: OnOrigins,
}

impl Follower {
    /// `on_origins` is told of the origins of others whenever they were read.
    pub fn new(
        storage: Arc<dyn Storage>,
        exchange: Arc<Exchange>,
        Positions(positions): Positions,
        on_origins: impl Fn(&[StoredOrigin]) + Send + 'static,
    ) -> Self {
        let exchange::Parts { documents, committer, metrics, .. } = exchange.parts.clone();
        let own = committer.progress().borrow().iter().map(|log| log.origin).collect();
        Self {
            storage,
            documents,
            committer,
            metrics,
            exchange,
            own,
            positions,
            refresh_due: false,
            failing: false,
            on_origins: Box::new(on_origins),
        }
    }

    /// Has the next look bring every document in memory up to what is stored.
    pub(super) fn refresh_later(&mut self) {
        self.refresh_due = true;
    }

    /// Takes what was appended since the last look. What fails is tried again by the next.
    pub(super) async fn look(&mut self) {
        match self.follow().await {
            Ok(()) => self.failing = false,
            Err(error) if !std::mem::replace(&mut self.failing, true) => {
                tracing::warn!(%error, "siblings' logs not read, trying on");
            }
            Err(_) => {}
        }
        for document in self.exchange.take_unlogged() {
            if let Err(error) = self.documents.refresh(&document, &self.committer).await {
                tracing::warn!(%document, %error, "document not refreshed");
                self.refresh_due = true;
            }
        }
        if std::mem::take(&mut self.refresh_due) && !self.documents.refresh_all(&self.committer).await {
            self.refresh_due = true;
        }
    }

    async fn follow(&mut self) -> Result<(), StorageError> {
        let mut origins = self.storage.origins().await?;
        origins.retain(|origin| !self.own.contains(&origin.id));
        (self.on_origins)(&origins);
        for origin in &origins {
            self.follow_origin(origin).await?;
        }
        Ok(())
    }

    async fn follow_origin(&mut self, origin: &StoredOrigin) -> Result<(), StorageError> {
        if self.positions.get(&origin.id).is_some_and(|position| *position > origin.seq) {
            // The database has lost commits, in a failover perhaps. What comes back is news again.
            tracing::warn!(origin = %origin.id.0, seq = origin.seq.0, "a log is shorter than it was");
            self.positions.insert(origin.id, origin.seq);
            self.refresh_due = true;
            return Ok(());
        }
        loop {
            // Of an origin that is new everything is news.
            let before = self.positions.get(&origin.id).copied().unwrap_or(Seq(0));
            let position = self.committer.written().reach(origin.id, before);
            self.positions.insert(origin.id, position);
            if position >= origin.seq {
                return Ok(());
            }
            let runs = match self.storage.read_log(origin.id, position, READ_BYTES).await {
                Ok(runs) => runs,
                Err(StorageError::Truncated { .. }) => {
                    self.positions.insert(origin.id, origin.seq);
                    self.refresh_due = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            let Some(last) = runs.last().map(|run| run.last) else { return Ok(()) };
            for run in runs {
                self.take(origin, &run).await;
            }
            self.positions.insert(origin.id, last);
        }
    }

    async fn take(&mut self, origin: &StoredOrigin, run: &StoredRun) {
        // Before any of it is in a document: then heads that hold it are never looked at without it.
        self.exchange.note_followed(origin, run.last);
        match open_run(&run.body, &Limits::stored()) {
            Ok(entries) => {
                if entries.iter().any(|(_, opened)| matches!(opened, Opened::Tombstone { .. })) {
                    // Bytes of deleted documents go at once, and storage gives them to nobody any more.
                    self.committer.recent_log().clear();
                }
                let followed = self.documents.follow(entries, &origin.group, &self.committer);
                let taken = followed.await;
                self.metrics.followed_changes.increment(taken);
            }
            Err(error) => {
                tracing::error!(origin = %origin.id.0, %error, "a stored run of log entries is malformed");
                self.refresh_due = true;
            }
        }
    }
}
