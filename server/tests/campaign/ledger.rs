//! What the regions have promised: which changes were acknowledged, by whom and when.
//!
//! A change is acknowledged by a region when its hash is covered by the heads in one of the region's sync messages. The
//! region keeps it then, unless its disk is taken back to an earlier state: what nobody else had at that moment is
//! *rolled back*, its acknowledgement is void, and it comes back from the clients that hold it.
//!
//! Each start of a region begins a new *life*; an acknowledgement is the life's in which its connection was made.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use isobar_protocol::ids::{ChangeHash, DocumentId};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::plan::REGIONS;

/// The changes of a document.
pub type Hashes = HashSet<ChangeHash>;

#[derive(Debug, Clone, Copy)]
struct Acknowledged {
    life: u64,
    at: Duration,
    /// The disk that it stood for was taken back.
    void: bool,
}

/// A deletion that an operator was told is done.
#[derive(Debug, Clone)]
pub struct Deleted {
    pub document: DocumentId,
    pub by: usize,
}

pub struct Ledger {
    started: Instant,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    live: Vec<DocumentId>,
    deleted: Vec<Deleted>,
    /// By region, for each change.
    acknowledged: HashMap<DocumentId, HashMap<ChangeHash, [Option<Acknowledged>; REGIONS]>>,
    /// The first life since the region's disk was last taken back.
    disk_since: [u64; REGIONS],
    rolled_back: usize,
}

/// How much there was.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Changes that a region has acknowledged, of documents that exist.
    pub acknowledged: usize,
    pub by_region: [usize; REGIONS],
    /// Changes that only a disk had that was taken back.
    pub rolled_back: usize,
    pub deleted: usize,
}

impl Ledger {
    pub fn new(live: Vec<DocumentId>) -> Self {
        Self { started: Instant::now(), books: Mutex::new(Books { live, ..Books::default() }) }
    }

    pub fn live(&self) -> Vec<DocumentId> {
        self.books.lock().live.clone()
    }

    pub fn deleted(&self) -> Vec<Deleted> {
        self.books.lock().deleted.clone()
    }

    /// Notes that a document is about to be deleted, and which one takes its place.
    pub fn delete(&self, deleted: Deleted, successor: DocumentId) {
        let mut books = self.books.lock();
        books.live.retain(|it| *it != deleted.document);
        books.live.push(successor);
        books.acknowledged.remove(&deleted.document);
        books.deleted.push(deleted);
    }

    /// Notes that a deletion was repeated elsewhere.
    pub fn deleted_again(&self, document: &DocumentId, by: usize) {
        let mut books = self.books.lock();
        books.deleted.iter_mut().filter(|it| it.document == *document).for_each(|it| it.by = by);
    }

    pub fn acknowledge(&self, document: &DocumentId, hashes: &[ChangeHash], region: usize, life: u64) {
        let at = self.started.elapsed();
        let mut books = self.books.lock();
        if !books.live.contains(document) {
            return;
        }
        let void = life < books.disk_since[region];
        let changes = books.acknowledged.entry(document.clone()).or_default();
        for hash in hashes {
            let entry = &mut changes.entry(*hash).or_default()[region];
            if entry.is_none_or(|it| it.life < life) {
                *entry = Some(Acknowledged { life, at, void });
            }
        }
    }

    /// What a region has acknowledged since its disk was last taken back.
    pub fn promised_by(&self, region: usize) -> HashMap<DocumentId, Hashes> {
        let books = self.books.lock();
        let since = books.disk_since[region];
        books.select(|by| by[region].is_some_and(|it| it.life >= since && !it.void))
    }

    /// What any region has acknowledged and nothing excuses the loss of.
    pub fn promised(&self) -> HashMap<DocumentId, Hashes> {
        self.books.lock().select(|by| by.iter().flatten().any(|it| !it.void))
    }

    /// Everything that was ever acknowledged, of documents that exist.
    pub fn acknowledged(&self) -> HashMap<DocumentId, Hashes> {
        self.books.lock().select(|_| true)
    }

    /// A region's disk is taken back: it begins its life `life` without what stood there. What is `elsewhere` stays
    /// promised; of the rest, all promises are void that were made for disks that do not exist any more.
    pub fn roll_back(&self, region: usize, life: u64, elsewhere: &HashMap<DocumentId, Hashes>) {
        let mut books = self.books.lock();
        books.disk_since[region] = life;
        let since = books.disk_since;
        let mut rolled_back = 0;
        for (document, changes) in &mut books.acknowledged {
            let held = elsewhere.get(document);
            let gone = changes.iter_mut().filter(|(hash, _)| held.is_none_or(|it| !it.contains(hash)));
            for (_, by) in gone {
                let promises = by
                    .iter_mut()
                    .zip(since)
                    .filter_map(|(it, since)| it.as_mut().filter(|it| !it.void && it.life < since));
                rolled_back += usize::from(promises.map(|it| it.void = true).count() > 0);
            }
        }
        books.rolled_back += rolled_back;
    }

    pub fn counts(&self) -> Counts {
        let books = self.books.lock();
        let mut by_region = [0; REGIONS];
        for by in books.acknowledged.values().flat_map(HashMap::values) {
            by_region.iter_mut().zip(by).for_each(|(count, it)| *count += usize::from(it.is_some()));
        }
        Counts {
            acknowledged: books.acknowledged.values().map(HashMap::len).sum(),
            by_region,
            rolled_back: books.rolled_back,
            deleted: books.deleted.len(),
        }
    }

    /// Who acknowledged a change, and when.
    pub fn describe(&self, document: &DocumentId, hash: &ChangeHash) -> String {
        let books = self.books.lock();
        let by = books.acknowledged.get(document).and_then(|it| it.get(hash));
        let by = by.into_iter().flatten().enumerate().filter_map(|(region, it)| Some((region, (*it)?)));
        let said = by.map(|(region, it)| {
            let void = if it.void { ", void" } else { "" };
            format!("region {region} in life {} at {:.2} s{void}", it.life, it.at.as_secs_f64())
        });
        format!("{hash} of {document}: {}", said.collect::<Vec<_>>().join("; "))
    }
}

impl Books {
    fn select(
        &self,
        wanted: impl Fn(&[Option<Acknowledged>; REGIONS]) -> bool,
    ) -> HashMap<DocumentId, Hashes> {
        let of_one = |changes: &HashMap<ChangeHash, [Option<Acknowledged>; REGIONS]>| {
            changes.iter().filter(|(_, by)| wanted(by)).map(|(hash, _)| *hash).collect::<Hashes>()
        };
        self.acknowledged.iter().map(|(document, changes)| (document.clone(), of_one(changes))).collect()
    }
}
