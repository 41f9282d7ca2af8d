//! A writer: edits documents as fast as it is told to, at one region and then at another, and notes what is acknowledged.
//!
//! It stays at no region for long, goes to another when its own ends the connection, and offers everything it has
//! wherever it comes, deleted documents among it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use isobar_protocol::ids::DocumentId;
use tokio_util::sync::CancellationToken;

use crate::client::{Heard, Progress, Session};
use crate::ledger::Ledger;
use crate::plan::Random;
use crate::region::Door;

/// How often a writer edits.
const EDIT_EVERY: Duration = Duration::from_millis(30);

/// Pause before another region is tried: a region that is down refuses at once.
const MOVE_PAUSE: Duration = Duration::from_millis(20);

/// Keys of a document's root that all writers write to, in conflict with each other.
const KEYS: usize = 8;

pub struct Writer {
    pub number: usize,
    pub documents: HashMap<DocumentId, AutoCommit>,
    pub edits: i64,
    random: Random,
    ledger: Arc<Ledger>,
}

impl Writer {
    pub fn new(number: usize, seed: u64, ledger: Arc<Ledger>) -> Self {
        let random = Random::new(seed ^ (number as u64 + 1) << 32);
        Self { number, documents: HashMap::new(), edits: 0, random, ledger }
    }

    /// Works until it is stopped. What is not acknowledged by then only the writer has.
    pub async fn work(mut self, doors: Arc<[Door]>, stop: CancellationToken) -> Self {
        while !stop.is_cancelled() {
            let door = self.random.below(doors.len());
            let length = self.random.between_ms(1_500, 6_000);
            let at_one = tokio::time::timeout(length, self.work_at(&doors[door]));
            // However it ends, the next region is tried.
            let _ = stop.run_until_cancelled(at_one).await;
            let _ = stop.run_until_cancelled(tokio::time::sleep(MOVE_PAUSE)).await;
        }
        self
    }

    async fn work_at(&mut self, door: &Door) -> anyhow::Result<()> {
        let mut visit = Visit::begin(self, door).await?;
        let mut edits = tokio::time::interval(EDIT_EVERY);
        edits.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heard = visit.session.hear() => visit.take(self, heard?).await?,
                _ = edits.tick() => visit.edit(self).await?,
            }
        }
    }

    /// Brings everything to a region, and waits until it is in step with every document that exists.
    pub async fn deliver(&mut self, door: &Door) -> anyhow::Result<()> {
        let mut visit = Visit::begin(self, door).await?;
        let live = self.ledger.live();
        let is_done = |writer: &mut Self, visit: &Visit| {
            let of = |id: &DocumentId| (visit.progress.get(id), live.contains(id));
            writer.documents.iter_mut().all(|(id, doc)| match of(id) {
                (Some(progress), true) => progress.in_step(doc),
                (Some(progress), false) => progress.is_unavailable,
                (None, _) => false,
            })
        };
        while !is_done(self, &visit) {
            let heard = visit.session.hear().await?;
            visit.take(self, heard).await?;
        }
        Ok(())
    }
}

/// A writer's stay at a region.
struct Visit {
    session: Session,
    region: usize,
    life: u64,
    progress: HashMap<DocumentId, Progress>,
}

impl Visit {
    async fn begin(writer: &mut Writer, door: &Door) -> anyhow::Result<Self> {
        // Before the connection: it may be of a later life then, never of an earlier one.
        let life = door.life();
        let session = Session::join(door.clients, &format!("writer-{}", writer.number)).await?;
        let mut visit = Self { session, region: door.region, life, progress: HashMap::new() };
        for (document, doc) in &mut writer.documents {
            let progress = visit.progress.entry(document.clone()).or_default();
            visit.session.say(document, doc, progress).await?;
        }
        Ok(visit)
    }

    async fn take(&mut self, writer: &mut Writer, heard: Heard) -> anyhow::Result<()> {
        match heard {
            Heard::Sync { document, message } => {
                let Some(doc) = writer.documents.get_mut(&document) else { return Ok(()) };
                let progress = self.progress.entry(document.clone()).or_default();
                let covered = self.session.take(&document, &message, doc, progress).await?;
                progress.is_unavailable = false;
                writer.ledger.acknowledge(&document, &covered, self.region, self.life);
            }
            Heard::Unavailable(document) => {
                self.progress.entry(document).or_default().is_unavailable = true;
            }
            Heard::Other => {}
        }
        Ok(())
    }

    async fn edit(&mut self, writer: &mut Writer) -> anyhow::Result<()> {
        let live = writer.ledger.live();
        let document = &live[writer.random.below(live.len())];
        let progress = self.progress.entry(document.clone()).or_default();
        if progress.is_unavailable {
            return Ok(());
        }
        let key = format!("key {}", writer.random.below(KEYS));
        let doc = writer.documents.entry(document.clone()).or_default();
        writer.edits += 1;
        doc.put(ROOT, key, writer.edits)?;
        doc.commit();
        self.session.say(document, doc, progress).await
    }
}
