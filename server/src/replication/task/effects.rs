//! Performing what the replica decides. What takes time is done in tasks of its own, which report back as events.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use isobar_protocol::ids::{OriginId, Seq};
use isobar_protocol::replica::{Effect, LinkId, LogRead, ReceivedRun};
use tokio::sync::oneshot;

use super::Task;
use crate::replication::snapshot::{self, Audience};
use crate::replication::{Event, stored_log};

impl Task {
    /// Performs effects until there are none: some are answered at once, which makes more.
    pub(super) fn perform_all(&mut self) {
        loop {
            let effects = self.replica.effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.perform(effect));
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Send { link, frame } => self.send(link, frame),
            Effect::SendCatchUp { link, frame } => {
                if let Some(up) = self.links.get(&link) {
                    up.outgoing.push_catch_up(frame);
                }
            }
            Effect::Close { link, reason } => self.close(link, reason),
            Effect::ReadLog { link, origin, after, bytes_max } => {
                self.read_log(link, origin, after, bytes_max);
            }
            Effect::Append(run) => self.append(*run),
            Effect::ReadPage { link, after, groups } => {
                let Some(up) = self.links.get(&link) else { return };
                let audience = Audience { groups, ..up.audience.clone() };
                let (parts, outgoing) = (self.parts.clone(), up.outgoing.clone());
                self.spawn(async move {
                    outgoing.until_room().await;
                    let page = snapshot::read_page(&parts, after, &audience).await;
                    Event::PageRead { link, page }
                });
            }
            Effect::StorePage { documents } => {
                let bytes = documents.iter().map(|it| it.bytes() as u64).sum();
                self.parts.metrics.snapshot_documents.increment(documents.len() as u64);
                self.parts.metrics.snapshot_bytes.increment(bytes);
                let parts = self.parts.clone();
                self.spawn(async move {
                    Event::PageStored { unusable: snapshot::store_page(&parts, documents).await }
                });
            }
            Effect::AdoptOrigins { origins, missing } => self.adopt(origins, missing),
            Effect::Acknowledged { region, origin, seq } => {
                self.shared.acknowledged.lock().insert((region.clone(), origin), seq);
                self.unnoted.insert((region, origin), seq);
            }
            Effect::OriginForked { origin, region, seq } => {
                self.parts.metrics.origins_forked.increment(1);
                tracing::error!(origin = %origin.0, %region, seq = seq.0,
                    "two logs exist under one origin, it is not replicated any more");
            }
            Effect::OwnOriginLost { origin } => {
                let reason =
                    format!("the database has lost entries of origin {} that were durable", origin.0);
                self.shared.fail(reason);
            }
        }
    }

    /// Runs something beside, and takes its outcome as an event. A panic is the node's end: what waits for the outcome would
    /// wait for ever.
    pub(super) fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let Some(events) = self.events.upgrade() else { return };
        let shared = self.shared.clone();
        tokio::spawn(async move {
            match AssertUnwindSafe(work).catch_unwind().await {
                Ok(event) => _ = events.send(event).await,
                Err(_) => shared.fail("a task of the replication has panicked".to_owned()),
            }
        });
    }

    fn read_log(&mut self, link: LinkId, origin: OriginId, after: Seq, bytes_max: usize) {
        // Only what the database says to be the end is one: a sibling may have stored more.
        let recent = self.parts.committer.recent_log().read(origin, after, bytes_max);
        if let Some(runs) = recent.filter(|runs| !runs.is_empty()) {
            let read = LogRead::Runs(runs.into_iter().map(stored_log::slice).collect());
            return self.replica.log_read(self.now(), link, origin, after, read);
        }
        let end = self.replica.position(origin);
        let parts = self.parts.clone();
        self.spawn(async move {
            let read = stored_log::read(&parts.storage, &parts.metrics, origin, after, bytes_max, end).await;
            Event::LogRead { link, origin, after, read }
        });
    }

    /// Hands a run to the documents and the committer. Runs of an origin take their places in the queue one after the
    /// other; waiting for the commit they do together.
    fn append(&mut self, run: ReceivedRun) {
        let (origin, last) = (run.origin, run.last);
        let (placed, is_placed) = oneshot::channel();
        let previous = self.last_placed.insert(origin, is_placed);
        let parts = self.parts.clone();
        self.spawn(async move {
            if let Some(previous) = previous {
                let _ = previous.await;
            }
            let stored = parts.documents.apply(run, &parts.committer).await;
            let _ = placed.send(());
            Event::Stored { origin, last, outcome: stored.await }
        });
    }
}
