//! The durable half of a region: what a database holds, and nothing of what it means.
//!
//! It keeps the storage's contract: dense logs in runs, each change once, deletions that erase, truncation that leaves a
//! prefix out, counters that are adopted forward. A copy of it is a copy of the database.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::link::Progress;
use isobar_protocol::log::{self, Chain};
use isobar_protocol::replica::LogSlice;
use isobar_protocol::scrub::Fingerprint;

use crate::change_bytes::Made;

#[derive(Debug, Clone, Default)]
pub struct Disk {
    pub origins: BTreeMap<OriginId, OriginRow>,
    pub documents: BTreeMap<DocumentId, DocumentRow>,
    /// How far other regions say that they have each origin.
    pub acknowledged: BTreeMap<(RegionName, OriginId), Seq>,
    /// The origin that this region claimed last for each group.
    pub claimed: BTreeMap<PlacementGroup, OriginId>,
    /// Fingerprints of documents that have not changed since they were taken.
    pub prints: BTreeMap<DocumentId, Option<Fingerprint>>,
}

#[derive(Debug, Clone)]
pub struct OriginRow {
    pub region: RegionName,
    pub group: PlacementGroup,
    pub seq: Seq,
    pub chain: Chain,
    /// The log holds what is after it.
    pub floor: Seq,
    /// By first seq.
    pub runs: BTreeMap<u64, LogSlice>,
}

#[derive(Debug, Clone)]
pub struct DocumentRow {
    pub group: PlacementGroup,
    pub deleted_at_ms: Option<u64>,
    /// Two changes of one author with one number.
    pub quarantined: bool,
    pub base: Option<BaseRow>,
    /// Those that are not in the base; and, until it is pruned, some that are.
    pub changes: BTreeMap<ChangeHash, Arc<Made>>,
}

/// How the changes of a document hang together.
#[derive(Debug, PartialEq, Eq)]
pub struct Shape {
    /// Those whose whole past is here, and that no other of them names.
    pub heads: BTreeSet<ChangeHash>,
    /// Those that lack some of their past.
    pub pending: BTreeSet<ChangeHash>,
}

/// A base. Its chunk is the names of what it covers: nobody here opens one.
#[derive(Debug, Clone)]
pub struct BaseRow {
    pub generation: u64,
    pub summary: Arc<BaseSummary>,
    pub index: Arc<BaseIndex>,
    pub covered: Arc<BTreeMap<ChangeHash, Arc<Made>>>,
    pub pruned: bool,
}

/// A run to be appended.
#[derive(Debug, Clone)]
pub struct Run {
    pub origin: OriginId,
    pub region: RegionName,
    pub group: PlacementGroup,
    pub first: Seq,
    pub last: Seq,
    pub chain_before: Chain,
    pub chain: Chain,
    pub body: Bytes,
}

/// The origin stands elsewhere; nothing was stored.
pub struct OutOfStep {
    pub seq: Seq,
    pub chain: Chain,
}

impl Disk {
    /// Appends a run. One that was appended before is recognised by where the origin stands.
    pub fn append(&mut self, run: &Run) -> Result<(), OutOfStep> {
        let new = || OriginRow::new(run.region.clone(), run.group.clone());
        let row = self.origins.entry(run.origin).or_insert_with(new);
        if row.seq == run.last && row.chain == run.chain {
            return Ok(());
        }
        if row.seq.0 + 1 != run.first.0 || row.chain != run.chain_before {
            return Err(OutOfStep { seq: row.seq, chain: row.chain });
        }
        let slice = LogSlice {
            first: run.first,
            last: run.last,
            chain_before: run.chain_before,
            body: run.body.clone(),
        };
        row.runs.insert(run.first.0, slice);
        row.seq = run.last;
        row.chain = run.chain;
        Ok(())
    }

    pub fn row(&mut self, document: &DocumentId, group: &PlacementGroup) -> &mut DocumentRow {
        self.documents.entry(document.clone()).or_insert_with(|| DocumentRow {
            group: group.clone(),
            deleted_at_ms: None,
            quarantined: false,
            base: None,
            changes: BTreeMap::new(),
        })
    }

    /// Deletes a document; the earliest time counts.
    pub fn delete(&mut self, document: &DocumentId, group: &PlacementGroup, at_ms: u64) {
        let row = self.row(document, group);
        row.deleted_at_ms = Some(row.deleted_at_ms.map_or(at_ms, |before| before.min(at_ms)));
        row.changes.clear();
        row.base = None;
        row.quarantined = false;
        self.erase(document);
    }

    /// Whether an entry of a document came erased, from a region that knew of its deletion, and the tombstone has not come
    /// yet: it is in another log.
    pub fn is_erased_ahead(&self, document: &DocumentId) -> bool {
        let is_deleted = self.documents.get(document).is_some_and(|row| row.deleted_at_ms.is_some());
        let bodies = self.origins.values().flat_map(|row| row.runs.values()).map(|run| &run.body);
        let mut entries = bodies.flat_map(|body| log::decode_run(body).expect("stored runs decode"));
        let is_erased =
            |it: log::Entry| it.document == *document && matches!(it.content, log::Content::Erased { .. });
        !is_deleted && entries.any(is_erased)
    }

    /// Erases a document's changes from every run.
    pub fn erase(&mut self, document: &DocumentId) {
        for run in self.origins.values_mut().flat_map(|row| row.runs.values_mut()) {
            if let Some(erased) = log::erase(&run.body, document).expect("stored runs decode") {
                run.body = erased.into();
            }
        }
    }

    /// The runs from the one with the entry after `after` on; the log's floor if they are gone.
    pub fn read_log(&self, origin: OriginId, after: Seq, bytes_max: usize) -> Result<Vec<LogSlice>, Seq> {
        let Some(row) = self.origins.get(&origin) else { return Ok(Vec::new()) };
        if after < row.floor {
            return Err(row.floor);
        }
        let mut bytes = 0;
        let after = row.runs.values().filter(|run| run.last > after);
        let fitting = after.take_while(|run| {
            let first = bytes == 0;
            bytes += run.body.len();
            first || bytes <= bytes_max
        });
        Ok(fitting.cloned().collect())
    }

    /// Removes whole runs up to `up_to`, never the last one. Returns where the log begins now.
    pub fn truncate(&mut self, origin: OriginId, up_to: Seq) -> Seq {
        let Some(row) = self.origins.get_mut(&origin) else { return Seq(0) };
        let newest = row.seq;
        row.runs.retain(|_, run| run.last > up_to || run.last == newest);
        row.floor = row.runs.values().next().map_or(row.floor, |run| Seq(run.first.0 - 1));
        row.floor
    }

    /// Raises counters to those of a snapshot; never lowers one.
    pub fn adopt(&mut self, progress: &Progress) {
        let row = self
            .origins
            .entry(progress.origin)
            .or_insert_with(|| OriginRow::new(progress.region.clone(), progress.group.clone()));
        if progress.seq > row.seq {
            (row.seq, row.chain, row.floor) = (progress.seq, progress.chain, progress.seq);
            row.runs.clear();
        }
    }

    pub fn vector(&self) -> Vec<Progress> {
        let progress = |(id, row): (&OriginId, &OriginRow)| Progress {
            origin: *id,
            region: row.region.clone(),
            group: row.group.clone(),
            seq: row.seq,
            chain: row.chain,
        };
        self.origins.iter().map(progress).collect()
    }

    pub fn holds(&self, document: &DocumentId, hash: &ChangeHash) -> bool {
        self.documents.get(document).is_some_and(|row| row.holds(hash))
    }

    pub fn is_deleted(&self, document: &DocumentId) -> bool {
        self.documents.get(document).is_some_and(|row| row.deleted_at_ms.is_some())
    }
}

impl OriginRow {
    pub fn new(region: RegionName, group: PlacementGroup) -> Self {
        let runs = BTreeMap::new();
        Self { region, group, seq: Seq(0), chain: Chain::START, floor: Seq(0), runs }
    }
}

impl DocumentRow {
    pub fn holds(&self, hash: &ChangeHash) -> bool {
        self.changes.contains_key(hash) || self.covers(hash)
    }

    /// Whether the base has it.
    pub fn covers(&self, hash: &ChangeHash) -> bool {
        self.base.as_ref().is_some_and(|base| base.covered.contains_key(hash))
    }

    /// All that is here, each once, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Made>> {
        let covered = self.base.iter().flat_map(|base| base.covered.values());
        covered.chain(self.changes.values().filter(|made| !self.covers(&made.change.hash)))
    }

    /// Whether anything is here.
    pub fn is_empty(&self) -> bool {
        self.base.is_none() && self.changes.is_empty()
    }

    /// What follows from what is stored, as far as it counts.
    pub fn shape(&self, counts: impl Fn(&ChangeHash) -> bool) -> Shape {
        let mut made: Vec<&Arc<Made>> = self.all().filter(|made| counts(&made.change.hash)).collect();
        made.sort_unstable_by_key(|made| made.number);
        let numbers = made.last().map_or(0, |made| made.number + 1);
        let (mut complete, mut named) = (vec![false; numbers], vec![false; numbers]);
        for made in &made {
            if made.deps.iter().all(|it| complete[*it]) {
                complete[made.number] = true;
                made.deps.iter().for_each(|it| named[*it] = true);
            }
        }
        let of = |wanted: &dyn Fn(usize) -> bool| {
            made.iter().filter(|made| wanted(made.number)).map(|made| made.change.hash).collect()
        };
        Shape { heads: of(&|it| complete[it] && !named[it]), pending: of(&|it| !complete[it]) }
    }
}
