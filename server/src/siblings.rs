//! The nodes that share this node's database: hearing them, telling them, and following what they store.
//!
//! A node reads the logs of its siblings from the database. Notices only say when: a sibling that has appended tells so, and
//! whoever hears it looks at once; everybody looks once a second in any case. So nothing is lost with a notice.
//!
//! - [`follow`] reads the logs and has the documents in memory take what they say.
//! - [`exchange`] is all else that passes between nodes: presence, searches, receipts, which regions are linked. Notices of it
//!   may be lost, and are made good or missed by nobody.
//! - [`interests`], [`keeper`] and [`search`] decide for it.
//!
//! This module does not know how nodes find each other: that is [`crate::storage::seat`].

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use isobar_protocol::notice::Notice;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::commit::Written;
use crate::storage::seat::{Notices, Seat, SeatEvent};
use crate::telemetry::Metrics;

pub mod exchange;
pub mod follow;
mod interests;
mod keeper;
mod search;

use exchange::Exchange;
use follow::Follower;

pub(crate) use search::SAID_EVERY as SEARCH_SAID_EVERY;

/// Pause after saying so. What is committed meanwhile is said once.
const APPENDED_PAUSE: Duration = Duration::from_millis(2);

/// What the follower is woken for.
#[derive(Default)]
struct Wake {
    look: Notify,
    /// Notices may have been missed.
    resumed: AtomicBool,
}

/// What this node is among its siblings. Its seat is given up by [`Siblings::leave`].
pub struct Siblings {
    keeps_links: watch::Receiver<bool>,
    failed: watch::Receiver<Option<&'static str>>,
    leaving: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Siblings {
    /// Starts to follow the siblings. A seat that has none for ever costs nothing.
    pub fn start(
        seat: Seat,
        exchange: Arc<Exchange>,
        follower: Follower,
        written: Arc<Written>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let Seat { notices, mut events, .. } = seat;
        let (keeps, keeps_links) = watch::channel(false);
        let (failing, failed) = watch::channel(None);
        let wake = Arc::new(Wake::default());
        let leaving = CancellationToken::new();
        let spawn = |work: Work| {
            let (leaving, failing) = (leaving.clone(), failing.clone());
            tokio::spawn(async move {
                if let Some(Err(_)) = leaving.run_until_cancelled(AssertUnwindSafe(work).catch_unwind()).await
                {
                    failing.send_replace(Some("a task that follows the siblings has panicked"));
                }
            })
        };
        let mut tasks = Vec::new();
        if notices.can_be_heard() {
            let (told, heard) = (notices, wake.clone());
            tasks.push(spawn(Box::pin(tell_appended(written, told))));
            tasks.push(spawn(Box::pin(async move { follow(follower, &heard).await })));
            tasks.push(spawn(Box::pin(exchange.clone().run())));
        }
        let hearing = Hearing { wake, exchange, keeps, failing: failing.clone(), metrics };
        // Who is alone need not wait to learn it.
        while let Ok(event) = events.try_recv() {
            hearing.take(event);
        }
        tasks.push(spawn(Box::pin(hearing.run(events))));
        Self { keeps_links, failed, leaving, tasks }
    }

    /// Whether this node keeps the region's links, now and whenever that changes.
    pub fn keeps_links(&self) -> watch::Receiver<bool> {
        self.keeps_links.clone()
    }

    /// Resolves to the reason for which this node must not go on: another has taken its seat, or what it shows would grow old.
    pub async fn failed(&self) -> &'static str {
        let mut failed = self.failed.clone();
        let reason = failed.wait_for(Option::is_some).await.map(|reason| *reason);
        match reason {
            Ok(Some(reason)) => reason,
            _ => std::future::pending().await,
        }
    }

    /// Gives the seat up. Call it when nothing is written any more: another node may take it, and its log, at once.
    pub async fn leave(mut self) {
        self.leaving.cancel();
        for task in std::mem::take(&mut self.tasks) {
            let _ = task.await;
        }
    }
}

impl Drop for Siblings {
    fn drop(&mut self) {
        self.leaving.cancel();
    }
}

type Work = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Takes what happens to the seat, and passes it on. Without it the node does not keep the links.
struct Hearing {
    wake: Arc<Wake>,
    exchange: Arc<Exchange>,
    keeps: watch::Sender<bool>,
    failing: watch::Sender<Option<&'static str>>,
    metrics: Arc<Metrics>,
}

impl Hearing {
    fn take(&self, event: SeatEvent) {
        match event {
            SeatEvent::Told { by, notice } => self.hear(by, &notice),
            SeatEvent::Resumed => {
                self.exchange.resumed();
                self.wake.resumed.store(true, Ordering::Release);
                self.wake.look.notify_one();
            }
            SeatEvent::KeepsLinks(keeps) => {
                tracing::info!(keeps, "the region's links");
                self.metrics.keeps_links.set(f64::from(u8::from(keeps)));
                self.exchange.keeps_links_is(keeps);
                self.keeps.send_replace(keeps);
            }
            SeatEvent::Siblings(count) => {
                tracing::info!(count, "siblings");
                self.metrics.siblings.set(count as f64);
                self.exchange.siblings_are(count);
            }
            SeatEvent::Lost => {
                self.failing.send_replace(Some(
                    "another node has this node's seat: it was out of touch with the database for too long",
                ));
            }
        }
    }

    fn hear(&self, by: uuid::Uuid, notice: &Bytes) {
        self.metrics.notices_heard.increment(1);
        match Notice::decode(notice) {
            Ok(Some(Notice::Appended)) => self.wake.look.notify_one(),
            Ok(Some(Notice::Stored { documents })) => {
                if !self.exchange.note_unlogged(documents) {
                    self.wake.resumed.store(true, Ordering::Release);
                }
                self.wake.look.notify_one();
            }
            Ok(Some(notice)) => self.exchange.hear(by, notice),
            // A later version's.
            Ok(None) => {}
            Err(error) => {
                self.metrics.notices_malformed.increment(1);
                tracing::debug!(%by, %error, "malformed notice");
            }
        }
    }

    /// Owns the events, and so the seat.
    async fn run(self, mut events: mpsc::Receiver<SeatEvent>) {
        while let Some(event) = events.recv().await {
            self.take(event);
        }
        // Nothing more can happen. What was said last stands.
        std::future::pending().await
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        self.keeps.send_replace(false);
    }
}

/// Tells the siblings when something was appended.
async fn tell_appended(written: Arc<Written>, notices: Notices) {
    let appended = Notice::Appended.encode();
    loop {
        written.wait().await;
        // If it is dropped, they find out within a second.
        notices.tell(appended.clone());
        tokio::time::sleep(APPENDED_PAUSE).await;
    }
}

async fn follow(mut follower: Follower, wake: &Wake) {
    let mut looks = tokio::time::interval(follow::LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = wake.look.notified() => {}
            _ = looks.tick() => {}
        }
        if wake.resumed.swap(false, Ordering::AcqRel) {
            follower.refresh_later();
        }
        follower.look().await;
    }
}
