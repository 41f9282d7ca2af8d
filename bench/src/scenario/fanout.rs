//! One writer types, everybody else reads.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{observe, reader, run_clock, stopped_clock};
use crate::client::{Crowd, JOIN_PATIENCE, Part, PlannedEdit, Timeline};
use crate::results::Sample;
use crate::servers::{Environment, Kind, Server};
use crate::session::Session;
use crate::workload::{Chain, Document};

/// Edits per second of the writer: a fast typist, or a few at once.
pub const EDITS_PER_SECOND: u32 = 20;

/// One run. The chain's links after the first are the edits.
pub struct Load {
    pub chain: Arc<Chain>,
    pub readers: u32,
    /// How long after the last edit readers are waited for.
    pub drain: Duration,
}

pub async fn run(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    let server = Server::start(environment, kind).await?;
    let document = Document::numbered(1, &load.chain);
    server.create(&document).await?;
    let timeline = Timeline::new(load.chain.links());
    let (clock_start, clock) = stopped_clock();

    let mut writers = Crowd::default();
    let gap = Duration::from_secs(1) / EDITS_PER_SECOND;
    let edits = (1..load.chain.links()).map(|link| PlannedEdit { link, at: gap * (link - 1) }).collect();
    let writer = Session::new(kind.dialect(), "bench-writer".into(), document.clone(), 1);
    let part = Part { timeline: Arc::clone(&timeline), edits };
    writers.add(server.address(&document), writer, part, clock.clone());
    if writers.progress.wait_joined(1, 2 * JOIN_PATIENCE).await < 1 {
        let failure = writers.finish().await.pop().and_then(|seen| seen.failure);
        anyhow::bail!("the writer could not upload: {}", failure.unwrap_or_else(|| "no answer".into()));
    }

    let mut readers = Crowd::default();
    for number in 0..load.readers {
        let session = Session::new(kind.dialect(), format!("bench-reader-{number}"), document.clone(), 0);
        readers.add(server.address(&document), session, reader(&timeline), clock.clone());
    }
    let joined = readers.progress.wait_joined(load.readers, JOIN_PATIENCE).await;
    ensure!(joined > 0, "no reader could join");

    let duration = gap * load.chain.links();
    let (before, after) = run_clock(&server, &clock_start, &readers, duration + load.drain).await;
    let mut sample = Sample::default();
    if joined < load.readers {
        sample.notes.push(format!("only {joined} of {} readers could join", load.readers));
    }
    let delivered = observe(readers.finish().await, load.readers, &mut sample);
    writers.finish().await;
    after.per(&before, delivered, &mut sample);
    Ok(sample)
}
