//! A campaign: three regions, the ways between them, the load, the faults, and what must be true in the end.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use isobar::demo::links::{Distance, Proxy};
use isobar_protocol::ids::{ChangeHash, DocumentId};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::client::{hashes, heads, read};
use crate::ledger::{Counts, Deleted, Hashes, Ledger};
use crate::plan::{Fault, REGIONS, Random, Step, plan};
use crate::region::{Door, Region, ask};
use crate::writer::Writer;
use crate::{DEADLINE, Flavour, LOOK_EVERY};

const NAMES: [&str; REGIONS] = ["eu", "us", "ap"];
const DOCUMENTS: usize = 4;
const WRITERS: usize = 6;

/// Between two regions, one way.
const DISTANCE: Duration = Duration::from_millis(5);

/// How much of each region's log is shown when a campaign fails.
const LOG_LINES_SHOWN: usize = 60;

pub struct Campaign {
    seed: u64,
    length: Duration,
    steps: Vec<Step>,
    regions: Vec<Region>,
    /// `ways[from][to]` is where `from` dials `to`.
    ways: Vec<Vec<Option<Proxy>>>,
    ledger: Arc<Ledger>,
    random: Random,
    _directory: TempDir,
}

/// The documents of a region, as somebody gets them who has nothing.
type Contents = BTreeMap<DocumentId, Option<Vec<ChangeHash>>>;

impl Campaign {
    pub async fn begin(flavour: Flavour, seed: u64, length: Duration) -> Self {
        let directory = TempDir::with_prefix("isobar-campaign-").unwrap();
        let mut random = Random::new(!seed);
        let live = (0..DOCUMENTS).map(|_| new_document()).collect();
        let databases = flavour.databases(directory.path()).await;
        let mut regions = Vec::new();
        for (number, (name, database)) in NAMES.into_iter().zip(databases).enumerate() {
            database.empty().await;
            let host = host(number, &mut random);
            regions.push(Region::new(number, name, host, directory.path(), database));
        }
        let mut ways = Vec::new();
        for from in 0..REGIONS {
            let mut row = Vec::new();
            for (to, region) in regions.iter().enumerate() {
                row.push(match from == to {
                    true => None,
                    false => Some(Proxy::start(region.peer, Distance::of(DISTANCE)).await.unwrap()),
                });
            }
            regions[from].peers = row.iter().flatten().map(|way| format!("ws://{}", way.address())).collect();
            ways.push(row);
        }
        let ledger = Arc::new(Ledger::new(live));
        let steps = plan(seed, length);
        Self { seed, length, steps, regions, ways, ledger, random, _directory: directory }
    }

    /// Runs to the end.
    pub async fn run(mut self) {
        for region in &mut self.regions {
            region.start().await;
        }
        let doors: Arc<[Door]> = self.regions.iter().map(|region| region.door.clone()).collect();
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
            Fault::Copy { region } => {
                self.regions[region].kill();
                self.assert_durable(region).await;
                self.regions[region].database.copy().await;
                self.regions[region].start().await;
            }
            Fault::Isolate { region } => self.ways_of(region).for_each(Proxy::cut),
            Fault::Restore { region } => self.roll_back(region, true).await,
            Fault::Empty { region } => self.roll_back(region, false).await,
            Fault::Cut { from, to } => self.way(from, to).cut(),
            Fault::Refuse { from, to } => self.way(from, to).refuse(),
            Fault::Heal { from, to } => self.way(from, to).heal(),
            Fault::Delete { region } => {
                let live = self.ledger.live();
                let document = live[self.random.below(live.len())].clone();
                self.ledger.delete(Deleted { document: document.clone(), by: region }, new_document());
                self.delete(region, &document).await;
            }
        }
    }

    /// What a region has acknowledged stands on its own disk, whoever else has it.
    async fn assert_durable(&self, region: usize) {
        let promised = self.ledger.promised_by(region);
        let documents: Vec<_> = promised.keys().cloned().collect();
        let inspection = self.regions[region].inspect().await;
        let read = read(inspection.clients, &documents).await.unwrap();
        for (document, doc) in documents.iter().zip(read) {
            let held = doc.map(|mut doc| hashes(&mut doc)).unwrap_or_default();
            let lost: Vec<_> = promised[document].difference(&held).collect();
            let first = lost.first().map(|hash| self.ledger.describe(document, hash));
            assert!(lost.is_empty(), "region {region} was killed and lost {} changes: {first:?}", lost.len());
        }
        inspection.end();
    }

    /// Takes a region's disk back to its copy, or to nothing.
    async fn roll_back(&mut self, region: usize, to_copy: bool) {
        self.regions[region].kill();
        self.assert_durable(region).await;
        let elsewhere = self.elsewhere(region).await;
        self.ledger.roll_back(region, self.regions[region].door.life() + 1, &elsewhere);
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
        for other in (0..REGIONS).filter(|it| *it != region) {
            let read = read(self.regions[other].door.clients, &documents).await.unwrap();
            for (document, doc) in documents.iter().zip(read) {
                let Some(mut doc) = doc else { continue };
                served.insert(document.clone(), other);
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
        let (status, body) = ask(self.regions[region].admin, "DELETE", &path).await.unwrap();
        assert_eq!(status, 204, "region {region} does not delete {document}: {body}");
    }

    fn way(&self, from: usize, to: usize) -> &Proxy {
        self.ways[from][to].as_ref().expect("there is a way from each region to each other")
    }

    fn ways_of(&self, region: usize) -> impl Iterator<Item = &Proxy> {
        let others = (0..REGIONS).filter(move |other| *other != region);
        others.flat_map(move |other| [self.way(region, other), self.way(other, region)])
    }

    fn heal_everything(&self) {
        self.ways.iter().flatten().flatten().for_each(Proxy::heal);
        self.regions.iter().for_each(|region| region.note("everything heals"));
    }

    /// Every writer brings what it has to a region.
    async fn deliver_all(&mut self, writers: &mut [Writer], doors: &[Door]) {
        let regions: Vec<_> = writers.iter().map(|_| self.random.below(REGIONS)).collect();
        let delivering = writers.iter_mut().zip(regions).map(async |(writer, region)| {
            let number = writer.number;
            let delivered = tokio::time::timeout(DEADLINE, writer.deliver(&doors[region])).await;
            delivered
                .unwrap_or_else(|_| panic!("writer {number} is not in step with region {region} in time"))
                .unwrap_or_else(|error| panic!("writer {number} at region {region}: {error}"));
        });
        futures_util::future::join_all(delivering).await;
    }

    /// Waits until all regions have the same, and say so. Returns it.
    async fn converged(&self, when: &str) -> HashMap<DocumentId, Hashes> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.look().await {
                Ok(contents) => return contents,
                Err(reason) if Instant::now() > deadline => panic!("no convergence {when}: {reason:#}"),
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// What all regions have, or why they have not the same.
    async fn look(&self) -> anyhow::Result<HashMap<DocumentId, Hashes>> {
        let mut vectors = Vec::new();
        for region in &self.regions {
            let (_, text) = ask(region.admin, "GET", "/admin/v1/convergence").await?;
            vectors.push(equal_vector(&serde_json::from_str(&text)?)?);
        }
        anyhow::ensure!(vectors.iter().all(|it| *it == vectors[0]), "vectors differ: {vectors:#?}");
        let mut all: Option<(Contents, HashMap<DocumentId, Hashes>)> = None;
        for region in &self.regions {
            let (contents, held) = self.contents(region).await?;
            let (first, _) = all.get_or_insert_with(|| (contents.clone(), held));
            anyhow::ensure!(*first == contents, "{} has {contents:#?}, not {first:#?}", region.name);
        }
        Ok(all.expect("there are regions").1)
    }

    async fn contents(&self, region: &Region) -> anyhow::Result<(Contents, HashMap<DocumentId, Hashes>)> {
        let live = self.ledger.live();
        let deleted: Vec<_> = self.ledger.deleted().into_iter().map(|it| it.document).collect();
        let (mut contents, mut held) = (Contents::new(), HashMap::new());
        for (document, doc) in live.iter().zip(read(region.door.clients, &live).await?) {
            contents.insert(document.clone(), None);
            let Some(mut doc) = doc else { continue };
            contents.insert(document.clone(), Some(heads(&mut doc)));
            held.insert(document.clone(), hashes(&mut doc));
        }
        for (document, doc) in deleted.iter().zip(read(region.door.clients, &deleted).await?) {
            anyhow::ensure!(doc.is_none(), "{document} is deleted, and {} has it", region.name);
        }
        Ok((contents, held))
    }

    fn assert_held(
        &self,
        what: &str,
        expected: &HashMap<DocumentId, Hashes>,
        contents: &HashMap<DocumentId, Hashes>,
    ) {
        let missing = missing(expected, contents);
        let shown: Vec<_> =
            missing.iter().take(10).map(|(id, hash)| self.ledger.describe(id, hash)).collect();
        assert!(
            missing.is_empty(),
            "{} changes are {what}, and no region has them: {shown:#?}",
            missing.len()
        );
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

    /// That the campaign was one, and that nothing went wrong which nobody noticed.
    async fn finish(mut self, writers: &[Writer], missing: usize) {
        let counts = self.ledger.counts();
        let edits: i64 = writers.iter().map(|it| it.edits).sum();
        let Counts { acknowledged, by_region, rolled_back, deleted } = counts;
        println!(
            "seed {}: {edits} edits, {acknowledged} acknowledged {by_region:?}, {rolled_back} on rolled back disks only, \
             {missing} of these brought back by writers in the end, {deleted} documents deleted",
            self.seed
        );
        assert!(counts.by_region.iter().all(|count| *count > 50), "too little load: {counts:?}");
        assert!(missing <= counts.rolled_back, "{missing} were missing, {counts:?}");
        for region in &mut self.regions {
            region.kill();
            let logged = region.logged();
            let wrong = logged.lines().find(|line| line.contains("panicked") || line.contains(" ERROR "));
            assert_eq!(wrong, None, "region {} has logged it", region.name);
        }
        for region in &self.regions {
            region.database.remove().await;
        }
    }
}

impl Drop for Campaign {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for region in &self.regions {
            let logged = region.logged();
            let lines: Vec<_> = logged.lines().collect();
            let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
            eprintln!("==== the end of {}'s log\n{}", region.name, shown.join("\n"));
        }
        let seconds = self.length.as_secs_f64();
        eprintln!("==== CAMPAIGN_SEED={} CAMPAIGN_SECONDS={seconds}", self.seed);
        plan(self.seed, self.length).iter().for_each(|step| eprintln!("{step}"));
    }
}

fn new_document() -> DocumentId {
    DocumentId::from_slice(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

/// An address of loopback that no other test uses, in this process or another.
fn host(number: usize, random: &mut Random) -> Ipv4Addr {
    let [.., middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 10 + number as u8 + 10 * random.below(24) as u8, middle, low)
}

/// A region's vector, if it finds every other region equal.
fn equal_vector(convergence: &Value) -> anyhow::Result<BTreeMap<String, u64>> {
    let regions = convergence["regions"].as_object().map_or(0, |it| it.len());
    let equal = convergence["regions"].as_object().into_iter().flatten();
    let equal = equal.filter(|(_, standing)| standing["state"] == "equal").count();
    anyhow::ensure!(regions == REGIONS - 1 && equal == regions, "not all are equal: {convergence}");
    anyhow::ensure!(convergence["forked_origins"] == Value::Array(Vec::new()), "forks: {convergence}");
    let vector: BTreeMap<String, u64> = serde_json::from_value(convergence["vector"].clone())?;
    // An origin that nothing was written under need not be known elsewhere.
    Ok(vector.into_iter().filter(|(_, seq)| *seq > 0).collect())
}

/// What of the expected changes is not there.
fn missing(
    expected: &HashMap<DocumentId, Hashes>,
    contents: &HashMap<DocumentId, Hashes>,
) -> Vec<(DocumentId, ChangeHash)> {
    let nothing = Hashes::new();
    let of_one = |(document, hashes): (&DocumentId, &Hashes)| {
        let held = contents.get(document).unwrap_or(&nothing);
        hashes.difference(held).map(|hash| (document.clone(), *hash)).collect::<Vec<_>>()
    };
    expected.iter().flat_map(of_one).collect()
}
