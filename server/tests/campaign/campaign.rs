//! A campaign: three regions, the ways between them, the load and the faults.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use isobar::demo::links::{Distance, Proxy};
use isobar_protocol::ids::DocumentId;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::client::{hashes, read};
use crate::ledger::{Deleted, Hashes, Ledger};
use crate::plan::{Fault, REGIONS, Random, Step, plan};
use crate::region::{Door, Node, Region, ask};
use crate::writer::Writer;
use crate::{DEADLINE, Flavour, LOOK_EVERY};

mod ending;

use ending::missing;

const NAMES: [&str; REGIONS] = ["eu", "us", "ap"];
const DOCUMENTS: usize = 4;
const WRITERS: usize = 6;

/// Nodes of the region that has several.
const NODES: usize = 2;

/// Between two regions, one way.
const DISTANCE: Duration = Duration::from_millis(5);

/// How long a node may take to give its clients what its sibling has acknowledged: it looks each second, and may be busy.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);

/// How much of each node's log is shown when a campaign fails.
const LOG_LINES_SHOWN: usize = 60;

pub struct Campaign {
    seed: u64,
    length: Duration,
    steps: Vec<Step>,
    regions: Vec<Region>,
    /// The region of which single nodes are killed.
    several: Option<usize>,
    ways: Vec<Way>,
    ledger: Arc<Ledger>,
    random: Random,
    _directory: TempDir,
}

/// Where the nodes of one region dial a node of another.
struct Way {
    from: usize,
    to: usize,
    proxy: Proxy,
}

impl Campaign {
    pub async fn begin(flavour: Flavour, seed: u64, length: Duration) -> Self {
        let directory = TempDir::with_prefix("isobar-campaign-").unwrap();
        let mut random = Random::new(!seed);
        let live = (0..DOCUMENTS).map(|_| new_document()).collect();
        let databases = flavour.databases(directory.path()).await;
        let several = flavour.region_of_several();
        let mut regions = Vec::new();
        for (number, (name, database)) in NAMES.into_iter().zip(databases).enumerate() {
            database.empty().await;
            let mut region = Region::new(name, database);
            for node in 0..(if several == Some(number) { NODES } else { 1 }) {
                region.add_node(number, host(number + REGIONS * node, &mut random), directory.path());
            }
            regions.push(region);
        }
        let ways = build_ways(&mut regions).await;
        let ledger = Arc::new(Ledger::new(live));
        let steps = plan(seed, length, several);
        Self { seed, length, steps, regions, several, ways, ledger, random, _directory: directory }
    }

    /// Runs to the end.
    pub async fn run(mut self) {
        for region in &mut self.regions {
            region.start().await;
        }
        let doors: Arc<[Door]> = self.nodes().map(|node| node.door.clone()).collect();
        let stop = CancellationToken::new();
        let mut working = JoinSet::new();
        for number in 0..WRITERS {
            let writer = Writer::new(number, self.seed, self.ledger.clone());
            working.spawn(writer.work(doors.clone(), stop.clone()));
        }
        let began = Instant::now();
        for step in std::mem::take(&mut self.steps) {
            tokio::time::sleep_until(began + step.at).await;
            for region in &self.regions {
                region.note(&step.to_string());
            }
            self.cause(step.fault).await;
        }
        tokio::time::sleep_until(began + self.length).await;
        stop.cancel();
        let mut writers = working.join_all().await;
        self.heal_everything();

        // The writers are gone, and with them whoever could bring back what a region has lost.
        let contents = self.converged("without the writers").await;
        self.assert_held("promised", &self.ledger.promised(), &contents);
        let missing = missing(&self.ledger.acknowledged(), &contents).len();

        self.deliver_all(&mut writers, &doors).await;
        let contents = self.converged("with the writers").await;
        self.assert_held("acknowledged", &self.ledger.acknowledged(), &contents);
        self.assert_held("written", &self.written(&mut writers), &contents);
        self.finish(&writers, missing).await;
    }

    async fn cause(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { region } => {
                self.regions[region].kill();
                self.assert_durable(region).await;
                self.regions[region].start().await;
            }
            Fault::KillOne { region, keeper } => self.kill_one(region, keeper).await,
            Fault::Copy { region } => {
                self.regions[region].kill();
                self.assert_durable(region).await;
                self.regions[region].database.copy().await;
                self.regions[region].start().await;
            }
            Fault::Isolate { region } => self.ways_of(region).for_each(Proxy::cut),
            Fault::Restore { region } => self.roll_back(region, true).await,
            Fault::Empty { region } => self.roll_back(region, false).await,
            Fault::Cut { from, to } => self.way(from, to).for_each(Proxy::cut),
            Fault::Refuse { from, to } => self.way(from, to).for_each(Proxy::refuse),
            Fault::Heal { from, to } => self.way(from, to).for_each(Proxy::heal),
            Fault::Delete { region } => {
                let live = self.ledger.live();
                let document = live[self.random.below(live.len())].clone();
                self.ledger.delete(Deleted { document: document.clone(), by: region }, new_document());
                self.delete(region, &document).await;
            }
        }
    }

    /// Kills a node of a region that has several. The others go on, and one of them keeps the links.
    async fn kill_one(&mut self, region: usize, keeper: bool) {
        let kept_by = self.regions[region].keeper().await;
        let number = if keeper { kept_by } else { (kept_by + 1) % NODES };
        self.regions[region].nodes[number].kill();
        let left = (number + 1) % NODES;
        self.assert_followed(region, left).await;
        assert_eq!(self.regions[region].keeper().await, left);
        self.regions[region].start_node(number).await;
    }

    /// What a region has acknowledged stands on its own disk, whoever else has it.
    async fn assert_durable(&self, region: usize) {
        let inspection = self.regions[region].inspect().await;
        let lost = self.lost(&self.ledger.promised_by(region), inspection.clients).await.unwrap();
        let first = lost.first();
        assert!(lost.is_empty(), "region {region} was killed and lost {} changes: {first:?}", lost.len());
        inspection.end();
    }

    /// What any node of a region has acknowledged its node `left` gives its clients, as soon as it has read what the
    /// others wrote.
    async fn assert_followed(&self, region: usize, left: usize) {
        let promised = self.ledger.promised_by(region);
        let deadline = Instant::now() + FOLLOWED_WITHIN;
        loop {
            let lost = self.lost(&promised, self.regions[region].nodes[left].door.clients).await.unwrap();
            let Some(first) = lost.first() else { return };
            assert!(
                Instant::now() < deadline,
                "a node of region {region} was killed, and the other lacks {} changes: {first}",
                lost.len()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What of these changes a node does not give somebody who has nothing.
    async fn lost(
        &self,
        promised: &HashMap<DocumentId, Hashes>,
        clients: SocketAddr,
    ) -> anyhow::Result<Vec<String>> {
        let documents: Vec<_> = promised.keys().cloned().collect();
        let mut held = HashMap::new();
        for (document, doc) in documents.iter().zip(read(clients, &documents).await?) {
            held.extend(doc.map(|mut doc| (document.clone(), hashes(&mut doc))));
        }
        let missing = missing(promised, &held);
        Ok(missing.iter().map(|(document, hash)| self.ledger.describe(document, hash)).collect())
    }

    /// Takes a region's disk back to its copy, or to nothing.
    async fn roll_back(&mut self, region: usize, to_copy: bool) {
        self.regions[region].kill();
        self.assert_durable(region).await;
        let elsewhere = self.elsewhere(region).await;
        self.ledger.roll_back(region, self.regions[region].life() + 1, &elsewhere);
        match to_copy {
            true => self.regions[region].database.restore().await,
            false => self.regions[region].database.empty().await,
        }
        self.regions[region].start().await;
        self.ways_of(region).for_each(Proxy::heal);
    }

    /// What the others have of every document. A deletion that has reached neither of them is repeated there: its
    /// tombstone is gone with the disk.
    async fn elsewhere(&self, region: usize) -> HashMap<DocumentId, Hashes> {
        let deleted = self.ledger.deleted();
        let mut documents = self.ledger.live();
        documents.extend(deleted.iter().map(|it| it.document.clone()));
        let mut held: HashMap<DocumentId, Hashes> = HashMap::new();
        let mut served = HashMap::new();
        for door in self.nodes().map(|node| &node.door).filter(|door| door.region != region) {
            let read = read(door.clients, &documents).await.unwrap();
            for (document, doc) in documents.iter().zip(read) {
                let Some(mut doc) = doc else { continue };
                served.insert(document.clone(), door.region);
                held.entry(document.clone()).or_default().extend(hashes(&mut doc));
            }
        }
        for Deleted { document, by } in deleted {
            if let Some(&other) = served.get(&document).filter(|_| by == region) {
                self.delete(other, &document).await;
                self.ledger.deleted_again(&document, other);
            }
        }
        held
    }

    async fn delete(&self, region: usize, document: &DocumentId) {
        let path = format!("/admin/v1/documents/{document}");
        // Of several, the one that was added last: it is as good as any.
        let node = self.regions[region].nodes.last().expect("a region has a node");
        let (status, body) = ask(node.admin, "DELETE", &path).await.unwrap();
        assert_eq!(status, 204, "region {region} does not delete {document}: {body}");
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.regions.iter().flat_map(|region| &region.nodes)
    }

    /// Whatever `from` dials of `to`.
    fn way(&self, from: usize, to: usize) -> impl Iterator<Item = &Proxy> {
        self.ways.iter().filter(move |way| (way.from, way.to) == (from, to)).map(|way| &way.proxy)
    }

    fn ways_of(&self, region: usize) -> impl Iterator<Item = &Proxy> {
        self.ways.iter().filter(move |way| way.from == region || way.to == region).map(|way| &way.proxy)
    }

    fn heal_everything(&self) {
        self.ways.iter().for_each(|way| way.proxy.heal());
        self.regions.iter().for_each(|region| region.note("everything heals"));
    }

    /// Every writer brings what it has to a node.
    async fn deliver_all(&mut self, writers: &mut [Writer], doors: &[Door]) {
        let chosen: Vec<_> = writers.iter().map(|_| &doors[self.random.below(doors.len())]).collect();
        let delivering = writers.iter_mut().zip(chosen).map(async |(writer, door)| {
            let (number, at) = (writer.number, door.clients);
            let delivered = tokio::time::timeout(DEADLINE, writer.deliver(door)).await;
            delivered
                .unwrap_or_else(|_| panic!("writer {number} is not in step with the node at {at} in time"))
                .unwrap_or_else(|error| panic!("writer {number} at the node at {at}: {error}"));
        });
        futures_util::future::join_all(delivering).await;
    }

    /// All that the writers hold of documents that exist.
    fn written(&self, writers: &mut [Writer]) -> HashMap<DocumentId, Hashes> {
        let live = self.ledger.live();
        let mut written: HashMap<DocumentId, Hashes> = HashMap::new();
        for writer in writers {
            for (document, doc) in writer.documents.iter_mut().filter(|(id, _)| live.contains(id)) {
                written.entry(document.clone()).or_default().extend(hashes(doc));
            }
        }
        written
    }
}

impl Drop for Campaign {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for node in self.nodes() {
            let logged = node.logged();
            let lines: Vec<_> = logged.lines().collect();
            let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
            eprintln!("==== the end of {}'s log\n{}", node.name, shown.join("\n"));
        }
        let seconds = self.length.as_secs_f64();
        eprintln!("==== CAMPAIGN_SEED={} CAMPAIGN_SECONDS={seconds}", self.seed);
        plan(self.seed, self.length, self.several).iter().for_each(|step| eprintln!("{step}"));
    }
}

/// A way from each region to each node of each other, as the regions will dial them.
async fn build_ways(regions: &mut [Region]) -> Vec<Way> {
    let mut ways = Vec::new();
    for from in 0..regions.len() {
        let mut peers = Vec::new();
        for node in regions.iter().flat_map(|region| &region.nodes).filter(|it| it.door.region != from) {
            let proxy = Proxy::start(node.peer, Distance::of(DISTANCE)).await.unwrap();
            peers.push(format!("ws://{}", proxy.address()));
            ways.push(Way { from, to: node.door.region, proxy });
        }
        regions[from].peers = peers;
    }
    ways
}

fn new_document() -> DocumentId {
    DocumentId::from_slice(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

/// An address of loopback that no other test uses, in this process or another.
fn host(number: usize, random: &mut Random) -> Ipv4Addr {
    let [.., middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 10 + number as u8 + 10 * random.below(24) as u8, middle, low)
}
