//! What the outside knows: every entry that was ever durable under an origin, and what was promised to clients.
//!
//! It judges what regions store and send. Nothing in the world under test reads it.

use std::collections::{BTreeMap, BTreeSet};

use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::log::{Chain, Opened};

use crate::disk::Disk;

/// What must be true, as the architecture names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    DurableBeforeAdvertised,
    DenseLog,
    /// `(origin, seq)` names one entry for ever.
    OneEntryPerSeq,
    /// Nobody writes under an origin that was replaced.
    OneWriter,
    CausalVisibility,
    AcknowledgedMeansKept,
    TruncatedWhenAcknowledged,
    NoResurrection,
    Residency,
    /// What is said to be in another region is there.
    TrueReceipts,
    Bounded,
    Convergence,
    /// It reaches those who want it and may have it, from where it was said.
    Presence,
    /// A comparison reports what was lost, and nothing else.
    Scrub,
    /// After all is settled, no entry and no document is sent any more.
    Silence,
    /// The core's own assertions.
    NoPanic,
}

#[derive(Debug, Clone)]
pub struct Violation {
    pub invariant: Invariant,
    pub detail: String,
}

/// The name of an entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    Change(ChangeHash),
    Tombstone(u64),
}

impl Name {
    pub fn of(opened: &Opened) -> Self {
        match opened {
            Opened::Change(change) => Self::Change(change.hash),
            Opened::Erased { hash } | Opened::Unreadable { hash, .. } => Self::Change(*hash),
            Opened::Tombstone { deleted_at_ms } => Self::Tombstone(*deleted_at_ms),
        }
    }
}

/// An origin's log as it was written, all of it.
#[derive(Debug)]
pub struct Written {
    pub group: PlacementGroup,
    pub entries: Vec<(DocumentId, Name)>,
    /// `chains[seq]`.
    pub chains: Vec<Chain>,
}

#[derive(Debug, Default)]
pub struct Ledger {
    pub logs: BTreeMap<OriginId, Written>,
    /// How far each region, by number, ever had an origin durably.
    pub reached: BTreeMap<(usize, OriginId), Seq>,
    pub acknowledged: BTreeSet<(DocumentId, ChangeHash)>,
    /// Acknowledged, and gone with the only disk that had it.
    pub lost: BTreeSet<(DocumentId, ChangeHash)>,
    /// Origins of which some region's disk lost entries.
    pub rolled_back: BTreeSet<OriginId>,
    /// Where each change stands in logs.
    places: BTreeMap<(DocumentId, ChangeHash), Vec<(OriginId, Seq)>>,
    /// Origins that two logs are under, in schedules that have such. Nothing more is known of them.
    pub forked: BTreeSet<OriginId>,
    pub may_fork: bool,
    tombstones: BTreeMap<DocumentId, Vec<(OriginId, Seq)>>,
}

impl Ledger {
    /// Takes note of entries that are durable somewhere, and says if another entry has their place.
    pub fn record(
        &mut self,
        origin: OriginId,
        group: &PlacementGroup,
        first: Seq,
        entries: &[(DocumentId, Opened)],
    ) -> Result<(), Violation> {
        if self.forked.contains(&origin) {
            return Ok(());
        }
        let written = self.logs.entry(origin).or_insert_with(|| Written {
            group: group.clone(),
            entries: Vec::new(),
            chains: vec![Chain::START],
        });
        for (at, (document, opened)) in (first.0..).zip(entries) {
            let name = Name::of(opened);
            match written.entries.get(at as usize - 1) {
                Some(found) if *found == (document.clone(), name.clone()) => continue,
                Some(_) if self.may_fork => {
                    self.forked.insert(origin);
                    return Ok(());
                }
                Some(found) => {
                    let detail = format!("{origin:?} {at} is {found:?} and now {name:?} of {document:?}");
                    return Err(Violation { invariant: Invariant::OneEntryPerSeq, detail });
                }
                None if written.entries.len() as u64 + 1 == at => {}
                None => {
                    let detail = format!("{origin:?} {at} follows {}", written.entries.len());
                    return Err(Violation { invariant: Invariant::DenseLog, detail });
                }
            }
            written.chains.push(opened.chain(written.chains[at as usize - 1], document));
            let place = (origin, Seq(at));
            match &name {
                Name::Change(hash) => {
                    self.places.entry((document.clone(), *hash)).or_default().push(place);
                }
                Name::Tombstone(_) => self.tombstones.entry(document.clone()).or_default().push(place),
            }
            written.entries.push((document.clone(), name));
        }
        Ok(())
    }

    /// The chain of an origin at a seq; `None` if nothing was ever durable there.
    pub fn chain(&self, origin: OriginId, seq: Seq) -> Option<Chain> {
        if seq == Seq(0) {
            return Some(Chain::START);
        }
        self.logs.get(&origin)?.chains.get(seq.0 as usize).copied()
    }

    /// Whether this is the chain of an origin at a seq.
    pub fn is_chain(&self, origin: OriginId, seq: Seq, chain: Chain) -> bool {
        self.forked.contains(&origin) || self.chain(origin, seq) == Some(chain)
    }

    pub fn note_reached(&mut self, region: usize, origin: OriginId, seq: Seq) {
        let reached = self.reached.entry((region, origin)).or_insert(Seq(0));
        *reached = (*reached).max(seq);
    }

    /// Whether some disk's vector covers an entry that names this change.
    pub fn is_covered(&self, document: &DocumentId, hash: &ChangeHash, disks: &[&Disk]) -> bool {
        self.places.get(&(document.clone(), *hash)).is_some_and(|places| any_covers(places, disks))
    }

    /// Whether anybody ever deleted the document durably.
    pub fn was_deleted(&self, document: &DocumentId) -> bool {
        self.tombstones.contains_key(document)
    }

    /// Documents whose deletion was durable once, and is in nobody's log any more.
    pub fn forgotten_deletions(&self, disks: &[&Disk]) -> BTreeSet<DocumentId> {
        let forgotten =
            self.tombstones.iter().filter(|(_, places)| places.iter().any(|it| !any_covers(&[*it], disks)));
        forgotten.map(|(document, _)| document.clone()).collect()
    }
}

fn any_covers(places: &[(OriginId, Seq)], disks: &[&Disk]) -> bool {
    let covers = |(origin, seq): &(OriginId, Seq)| {
        disks.iter().any(|it| it.origins.get(origin).is_some_and(|row| row.seq >= *seq))
    };
    places.iter().any(covers)
}
