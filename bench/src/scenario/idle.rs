//! Connections that have a document open and do nothing: what they cost in memory and CPU.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{CpuMark, reader, stopped_clock};
use crate::client::{Crowd, Timeline};
use crate::results::Sample;
use crate::servers::{Environment, Kind, Server};
use crate::session::Session;
use crate::workload::{Chain, Document};

/// Clients that connect at once.
const CONNECT_BATCH: u32 = 50;

/// How long all connections together may take. A server that needs longer is said to have given up.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

pub struct Load {
    pub chain: std::sync::Arc<Chain>,
    pub connections: u32,
    pub documents: u32,
    pub seconds: u32,
}

pub async fn run(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    let server = Server::start(environment, kind).await?;
    let (_clock_start, clock) = stopped_clock();
    let timeline = Timeline::new(load.chain.links());
    let mut crowds = [Crowd::default(), Crowd::default()];
    let mut resident = [0; 2];
    let deadline = Instant::now() + CONNECT_PATIENCE;
    // First whoever uploads the documents, then the connections that are counted.
    for (phase, count) in [load.documents, load.connections].into_iter().enumerate() {
        for number in 0..count {
            let document = Document::numbered(number % load.documents, &load.chain);
            if phase == 0 {
                server.create(&document).await?;
            }
            let name = format!("bench-{phase}-{number}");
            let holds = u32::from(phase == 0);
            let session = Session::new(kind.dialect(), name, document.clone(), holds);
            crowds[phase].add(server.address(&document), session, reader(&timeline), clock.clone());
            if (number + 1) % CONNECT_BATCH == 0 || number + 1 == count {
                let progress = &crowds[phase].progress;
                let joined = progress
                    .wait_joined(number + 1, deadline.saturating_duration_since(Instant::now()))
                    .await;
                if joined <= number {
                    let [first, second] = crowds;
                    let mut seen = first.finish().await;
                    seen.extend(second.finish().await);
                    let why =
                        seen.into_iter().find_map(|seen| seen.failure).unwrap_or_else(|| "no answer".into());
                    bail!("phase {phase}: {joined} of {} clients could join: {why}", number + 1);
                }
            }
        }
        server.settle(Duration::from_millis(300), Duration::from_secs(10)).await;
        resident[phase] = server.resident_bytes();
    }
    let before = CpuMark::now(&server);
    tokio::time::sleep(Duration::from_secs(load.seconds.into())).await;
    let after = CpuMark::now(&server);

    let mut sample = Sample::default();
    let grown = resident[1] as f64 - resident[0] as f64;
    sample.set("kib_per_connection", grown / 1024.0 / f64::from(load.connections));
    sample.set("resident_mib", resident[1] as f64 / f64::from(1 << 20));
    let busy = after.server.saturating_sub(before.server).as_secs_f64() / f64::from(load.seconds);
    sample.set("idle_cpu_percent", busy * 100.0);
    for crowd in crowds {
        crowd.finish().await;
    }
    Ok(sample)
}
