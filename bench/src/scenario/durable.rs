//! Writes as fast as they are acknowledged; then `kill -9` in mid-stream, and a count of what was acknowledged and
//! is not there any more.
//!
//! Each client has a document of its own and keeps a fixed number of changes under way, one per frame. An Automerge
//! server acknowledges by naming a change under its heads; y-sweet by echoing a sync status, which is what its
//! clients show as "saved".

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::client::{Address, Client, upload};
use crate::results::Sample;
use crate::scenario::CpuMark;
use crate::servers::{Environment, Kind, Server};
use crate::session::Session;
use crate::workload::{Chain, Document};

/// How long a restarted server may take to give a document back.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(20);

/// Writing time before the clock starts, so that buffers and caches are warm.
const WARM_UP: Duration = Duration::from_millis(500);

pub struct Load {
    pub chain: Arc<Chain>,
    pub clients: u32,
    /// Changes under way per client.
    pub window: u32,
    pub duration: Duration,
}

pub async fn run(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    let mut server = Server::start(environment, kind).await?;
    let mut writers: JoinSet<(Document, u32)> = JoinSet::new();
    let stop = Arc::new(AtomicBool::new(false));
    let mut counters = Vec::new();
    for client in upload_all(&server, kind, load).await? {
        let counter = Arc::new(AtomicU32::new(client.session.acknowledged()));
        counters.push(Arc::clone(&counter));
        writers.spawn(write(client, load.window, Arc::clone(&stop), counter));
    }
    let total = || counters.iter().map(|counter| u64::from(counter.load(Ordering::Relaxed))).sum::<u64>();

    tokio::time::sleep(WARM_UP).await;
    let (began, before, acknowledged_before) = (Instant::now(), CpuMark::now(&server), total());
    tokio::time::sleep(load.duration).await;
    let acknowledged = total() - acknowledged_before;
    let (elapsed, after) = (began.elapsed(), CpuMark::now(&server));
    // In mid-stream: the writers still write, and what reaches them until their sockets break was acknowledged.
    server.check_alive()?;
    server.kill();
    stop.store(true, Ordering::Relaxed);
    let mut promised = Vec::new();
    while let Some(writer) = writers.join_next().await {
        promised.push(writer?);
    }

    let mut sample = Sample::default();
    sample.set("acknowledged_per_s", acknowledged as f64 / elapsed.as_secs_f64());
    after.per(&before, acknowledged, &mut sample);
    let exhausted = promised.iter().filter(|(_, links)| *links == load.chain.links()).count();
    if exhausted > 0 {
        sample.notes.push(format!("{exhausted} writers ran out of prepared changes"));
    }
    server.restart().await?;
    count_lost(&server, kind, promised, &mut sample).await;
    Ok(sample)
}

/// The clients, each with its document uploaded.
async fn upload_all(server: &Server<'_>, kind: Kind, load: &Load) -> Result<Vec<Client>> {
    let mut uploads = JoinSet::new();
    for number in 0..load.clients {
        let document = Document::numbered(number, &load.chain);
        server.create(&document).await?;
        let address = server.address(&document);
        uploads.spawn(async move {
            upload(&address, kind.dialect(), &document, &format!("writer-{number}")).await
        });
    }
    uploads.join_all().await.into_iter().collect()
}

/// Writes until told to stop or the connection breaks; returns how many links were acknowledged.
async fn write(
    mut client: Client,
    window: u32,
    stop: Arc<AtomicBool>,
    counter: Arc<AtomicU32>,
) -> (Document, u32) {
    let links = client.session.document().chain.links();
    let mut is_broken = false;
    while !is_broken && !stop.load(Ordering::Relaxed) {
        while !is_broken
            && client.session.held() < links
            && client.session.held() - client.session.acknowledged() < window
        {
            is_broken = client.edit().await.is_err();
        }
        is_broken = is_broken || client.step_within(Duration::from_millis(200)).await.is_err();
        counter.store(client.session.acknowledged(), Ordering::Relaxed);
    }
    // What the kernel has received before the server died was sent by it, so it counts.
    while client.step_within(Duration::from_millis(200)).await.is_ok_and(|stepped| stepped) {}
    (client.session.document().clone(), client.session.acknowledged())
}

/// Asks for every document again, with clients that know nothing, and counts the links that are missing.
async fn count_lost(server: &Server<'_>, kind: Kind, promised: Vec<(Document, u32)>, sample: &mut Sample) {
    let mut readers = JoinSet::new();
    let (mut acknowledged, mut lost, mut unanswered) = (0_u64, 0_u64, 0_u32);
    for (number, (document, links)) in promised.into_iter().enumerate() {
        let address = server.address(&document);
        acknowledged += u64::from(links);
        readers.spawn(async move { (links, recovered(&address, kind, document, number).await) });
    }
    while let Some(reader) = readers.join_next().await {
        let (links, recovered) = reader.expect("a reader does not panic");
        match recovered {
            Ok(held) => lost += u64::from(links.saturating_sub(held)),
            Err(_) => {
                unanswered += 1;
                lost += u64::from(links);
            }
        }
    }
    sample.set("acknowledged", acknowledged as f64);
    sample.set("lost", lost as f64);
    if unanswered > 0 {
        sample
            .notes
            .push(format!("{unanswered} documents were not given back after the restart, counted as lost"));
    }
}

/// How many links a restarted server still has of a document; none if it says that it does not have it.
async fn recovered(address: &Address, kind: Kind, document: Document, number: usize) -> Result<u32> {
    let session = Session::new(kind.dialect(), format!("bench-recovery-{number}"), document, 0);
    let mut client = Client::connect(address, session).await?;
    let outcome = client.until(RECOVERY_PATIENCE, Session::is_joined).await;
    if client.session.is_unavailable() {
        return Ok(0);
    }
    ensure!(outcome.is_ok(), "no answer");
    let held = client.session.held();
    client.close().await;
    Ok(held)
}
