//! Many documents, each with a few clients who take turns to edit it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{observe, run_clock, stopped_clock};
use crate::client::{Crowd, JOIN_PATIENCE, Part, PlannedEdit, Timeline};
use crate::results::Sample;
use crate::servers::{Environment, Kind, Server};
use crate::session::Session;
use crate::workload::{Chain, Document};

/// Clients that connect at once; more than that would test the listen backlog.
const CONNECT_BATCH: u32 = 50;

pub struct Load {
    pub chain: Arc<Chain>,
    pub documents: u32,
    /// Per document; each makes one edit a second.
    pub clients: u32,
}

pub async fn run(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    let server = Server::start(environment, kind).await?;
    let (clock_start, clock) = stopped_clock();
    let mut crowd = Crowd::default();
    let timelines: Vec<_> = (0..load.documents).map(|_| Timeline::new(load.chain.links())).collect();
    let deadline = Instant::now() + JOIN_PATIENCE;
    let left = || deadline.saturating_duration_since(Instant::now());
    // The first client of each document uploads it, so all first ones go first.
    for client in 0..load.clients {
        for number in 0..load.documents {
            let document = Document::numbered(number, &load.chain);
            if client == 0 {
                server.create(&document).await?;
            }
            let name = format!("bench-{number}-{client}");
            let holds = u32::from(client == 0);
            let session = Session::new(kind.dialect(), name, document.clone(), holds);
            let timeline = Arc::clone(&timelines[number as usize]);
            let part = Part { timeline, edits: planned_edits(load, number, client) };
            crowd.add(server.address(&document), session, part, clock.clone());
            if crowd.size.is_multiple_of(CONNECT_BATCH) || number + 1 == load.documents {
                crowd.progress.wait_joined(crowd.size, left()).await;
            }
        }
    }
    let joined = crowd.progress.wait_joined(crowd.size, left()).await;
    ensure!(joined > 0, "no client could join");

    let duration = Duration::from_secs(u64::from(load.chain.links() / load.clients));
    let patience = duration + Duration::from_secs(15);
    let (before, after) = run_clock(&server, &clock_start, &crowd, patience).await;
    let mut sample = Sample::default();
    let total = crowd.size;
    if joined < total {
        sample.notes.push(format!("only {joined} of {total} clients could join"));
    }
    let delivered = observe(crowd.finish().await, total, &mut sample);
    after.per(&before, delivered, &mut sample);
    Ok(sample)
}

/// The links of one client: every `clients`-th, a second apart, documents spread over the second.
fn planned_edits(load: &Load, document: u32, client: u32) -> Vec<PlannedEdit> {
    let turn = Duration::from_secs(1) / load.clients;
    let offset = turn * document / load.documents;
    let links = (1..load.chain.links()).filter(|link| (link - 1) % load.clients == client);
    links.map(|link| PlannedEdit { link, at: offset + turn * (link - 1) }).collect()
}
