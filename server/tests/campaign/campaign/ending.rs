//! What must be true in the end.

use std::collections::{BTreeMap, HashMap};

use isobar_protocol::ids::{ChangeHash, DocumentId};
use serde_json::Value;
use tokio::time::Instant;

use super::Campaign;
use crate::client::{hashes, heads, read};
use crate::ledger::{Counts, Hashes};
use crate::plan::REGIONS;
use crate::region::{Node, Region, ask};
use crate::writer::Writer;
use crate::{DEADLINE, LOOK_EVERY};

/// The documents of a node, as somebody gets them who has nothing.
type Contents = BTreeMap<DocumentId, Option<Vec<ChangeHash>>>;

impl Campaign {
    /// Waits until all nodes have the same, and all regions say so. Returns it.
    pub(super) async fn converged(&self, when: &str) -> HashMap<DocumentId, Hashes> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.look().await {
                Ok(contents) => return contents,
                Err(reason) if Instant::now() > deadline => panic!("no convergence {when}: {reason:#}"),
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// What all nodes have, or why they have not the same.
    async fn look(&self) -> anyhow::Result<HashMap<DocumentId, Hashes>> {
        let mut vectors = Vec::new();
        for region in &self.regions {
            vectors.push(vector(region).await?);
        }
        anyhow::ensure!(vectors.iter().all(|it| *it == vectors[0]), "vectors differ: {vectors:#?}");
        let mut all: Option<(Contents, HashMap<DocumentId, Hashes>)> = None;
        for node in self.regions.iter().flat_map(|region| &region.nodes) {
            let (contents, held) = self.contents(node).await?;
            let (first, _) = all.get_or_insert_with(|| (contents.clone(), held));
            anyhow::ensure!(*first == contents, "{} has {contents:#?}, not {first:#?}", node.name);
        }
        Ok(all.expect("there are nodes").1)
    }

    async fn contents(&self, node: &Node) -> anyhow::Result<(Contents, HashMap<DocumentId, Hashes>)> {
        let live = self.ledger.live();
        let deleted: Vec<_> = self.ledger.deleted().into_iter().map(|it| it.document).collect();
        let (mut contents, mut held) = (Contents::new(), HashMap::new());
        for (document, doc) in live.iter().zip(read(node.door.clients, &live).await?) {
            contents.insert(document.clone(), None);
            let Some(mut doc) = doc else { continue };
            contents.insert(document.clone(), Some(heads(&mut doc)));
            held.insert(document.clone(), hashes(&mut doc));
        }
        for (document, doc) in deleted.iter().zip(read(node.door.clients, &deleted).await?) {
            anyhow::ensure!(doc.is_none(), "{document} is deleted, and {} has it", node.name);
        }
        Ok((contents, held))
    }

    pub(super) fn assert_held(
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

    /// That the campaign was one, and that nothing went wrong which nobody noticed.
    pub(super) async fn finish(mut self, writers: &[Writer], missing: usize) {
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
        self.regions.iter_mut().for_each(Region::kill);
        for node in self.regions.iter().flat_map(|region| &region.nodes) {
            let logged = node.logged();
            let wrong = logged.lines().find(|line| line.contains("panicked") || line.contains(" ERROR "));
            assert_eq!(wrong, None, "node {} has logged it", node.name);
        }
        for region in &self.regions {
            region.database.remove().await;
        }
    }
}

/// A region's vector, if the one of its nodes that keeps the links finds every other region equal.
async fn vector(region: &Region) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut kept = Vec::new();
    for node in &region.nodes {
        let (_, text) = ask(node.admin, "GET", "/admin/v1/convergence").await?;
        let convergence: Value = serde_json::from_str(&text)?;
        if convergence["keeps_links"] == true {
            kept.push(equal_vector(&convergence)?);
        }
    }
    anyhow::ensure!(kept.len() == 1, "{} nodes of {} keep its links", kept.len(), region.name);
    Ok(kept.remove(0))
}

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
pub(super) fn missing(
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
