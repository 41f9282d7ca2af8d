//! Comparing what two regions hold, and finding the documents in which they differ.
//!
//! Each document has a [`fingerprint`] of its heads. Documents fall into buckets by the first bytes of their hashed ids,
//! and a bucket is told by how many documents are in it and their fingerprints combined by exclusive or: two
//! regions that hold the same agree in 256 buckets, which is one answer of 5 KiB. Below those that differ the
//! asking side goes on, one byte further, until single documents are listed. Both sides look at documents that change
//! meanwhile, so a difference is a reason to look again, which [`Comparison`] does at the right moment.
//!
//! [`answer`] is the answering side, and gives the asker its own view of a prefix as well; [`Scrub`] is the asking side.
//! Neither reads storage nor knows links: fingerprints come in, prefixes and documents go out.
//!
//! # Invariants
//!
//! - Every prefix that is handed out to be asked is asked once, and a scrub ends: prefixes only grow, to
//!   [`SCRUB_PREFIX_BYTES_MAX`] bytes.
//! - At most [`OPEN_REQUESTS_MAX`] requests are open, and at most [`DIFFERENCES_MAX`] documents are kept.
//! - If nothing changes meanwhile, what is found differs, and all that differs is found, unless [`Report::more`] says
//!   otherwise. (Two sets with the same count and combination in a bucket go unnoticed: by accident one in 2^128.)

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sha2::{Digest, Sha256};

use crate::config::{
    SCRUB_BUCKETS, SCRUB_DOCUMENTS_MAX, SCRUB_PREFIX_BYTES_MAX, SCRUB_SMALL_BUCKET_DOCUMENTS,
};
use crate::ids::{ChangeHash, DocumentId};
use crate::link::Fingerprints;

mod comparison;

pub use comparison::{Comparison, Cut, Step, Verdict};

/// Most requests that are open at once. Each answer takes the other side a pass over its documents.
pub const OPEN_REQUESTS_MAX: usize = 4;

/// Most documents that one scrub reports. Beyond that the regions have not lost a few changes but a log, and the next
/// scrub finds the rest.
pub const DIFFERENCES_MAX: usize = 10_000;

/// What a document holds comes to: a SHA-256 cut to 16 bytes. It guards against accidents.
pub type Fingerprint = [u8; 16];

/// What a fingerprint stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    Changes {
        /// The changes that have all of their past, and that no other such change depends on.
        heads: BTreeSet<ChangeHash>,
        /// The changes that lack some of their past.
        pending: BTreeSet<ChangeHash>,
    },
    /// There is a tombstone; when it was made does not count.
    Deleted,
}

/// The fingerprint of a document.
pub fn fingerprint(document: &DocumentId, held: &Held) -> Fingerprint {
    let mut hasher = Sha256::new();
    hasher.update([document.as_bytes().len() as u8]);
    hasher.update(document.as_bytes());
    match held {
        Held::Deleted => hasher.update([1]),
        Held::Changes { heads, pending } => {
            hasher.update([0]);
            hasher.update((heads.len() as u64).to_le_bytes());
            heads.iter().chain(pending).for_each(|hash| hasher.update(hash.as_bytes()));
        }
    }
    let digest = hasher.finalize();
    std::array::from_fn(|at| digest[at])
}

/// Where a document falls: the bytes of its hashed id.
pub fn bucket(document: &DocumentId) -> [u8; 32] {
    Sha256::digest(document.as_bytes()).into()
}

/// The answer to a request: the fingerprints of the documents below a prefix. Every document is given once. `None` if
/// the prefix is too long.
///
/// A list that is as long as it may be ([`SCRUB_DOCUMENTS_MAX`]) says nothing of documents with ids after its last.
pub fn answer(
    prefix: &[u8],
    documents: impl IntoIterator<Item = (DocumentId, Fingerprint)>,
) -> Option<Fingerprints> {
    if prefix.len() > SCRUB_PREFIX_BYTES_MAX {
        return None;
    }
    let mut below = Below::new(prefix.len() == SCRUB_PREFIX_BYTES_MAX);
    for (document, fingerprint) in documents {
        let hashed = bucket(&document);
        if hashed.starts_with(prefix) {
            below.add(hashed[prefix.len()], document, fingerprint);
        }
    }
    Some(below.finish())
}

/// What was met below a prefix, in both resolutions until it is clear which is sent.
struct Below {
    buckets: Vec<(u64, Fingerprint)>,
    /// Those with the lowest ids, at most `documents_max`.
    documents: BTreeMap<DocumentId, Fingerprint>,
    documents_max: usize,
    /// Whether the documents are listed however many there are.
    last: bool,
    met: usize,
}

impl Below {
    fn new(last: bool) -> Self {
        let documents_max = if last { SCRUB_DOCUMENTS_MAX } else { SCRUB_SMALL_BUCKET_DOCUMENTS };
        let buckets = vec![(0, [0; 16]); SCRUB_BUCKETS];
        Self { buckets, documents: BTreeMap::new(), documents_max, last, met: 0 }
    }

    fn add(&mut self, at: u8, document: DocumentId, fingerprint: Fingerprint) {
        self.met += 1;
        let (count, combined) = &mut self.buckets[usize::from(at)];
        *count += 1;
        combined.iter_mut().zip(fingerprint).for_each(|(byte, other)| *byte ^= other);
        self.documents.insert(document, fingerprint);
        if self.documents.len() > self.documents_max {
            self.documents.pop_last();
        }
    }

    fn finish(self) -> Fingerprints {
        match self.last || self.met <= self.documents_max {
            true => Fingerprints::Documents(self.documents.into_iter().collect()),
            false => Fingerprints::Buckets(self.buckets),
        }
    }
}

/// In what a document differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The other region has it, this one does not.
    MissingHere,
    /// This region has it, the other does not.
    MissingThere,
    /// Both have it, not alike.
    Different,
}

/// What was seen of a document on both sides; nothing where it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub theirs: Option<Fingerprint>,
    pub ours: Option<Fingerprint>,
}

impl Seen {
    /// In what the two differ, if they do.
    pub fn difference(self) -> Option<Difference> {
        match (self.theirs, self.ours) {
            (theirs, ours) if theirs == ours => None,
            (Some(_), None) => Some(Difference::MissingHere),
            (None, _) => Some(Difference::MissingThere),
            (Some(_), Some(_)) => Some(Difference::Different),
        }
    }
}

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The documents that differ, and how they were seen.
    pub differences: BTreeMap<DocumentId, Seen>,
    /// Whether there were, or may be, more than these.
    pub more: bool,
}

/// An answer that cannot be: a peer that does not keep to the protocol. The scrub is as it was before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScrubError {
    #[error("fingerprints below a prefix that was not asked for")]
    NotAsked,
    #[error("{0} buckets, there are {SCRUB_BUCKETS} below a prefix")]
    Buckets(usize),
    #[error("buckets below the longest prefix")]
    TooDeep,
    #[error("a document that is not below the prefix, or out of order")]
    Misplaced,
    #[error("a document that was not asked for")]
    NotWanted,
}

/// A comparison with one peer that is under way.
#[derive(Debug)]
pub struct Scrub {
    open: BTreeSet<Vec<u8>>,
    /// To be asked when an answer has come.
    waiting: VecDeque<Vec<u8>>,
    report: Report,
}

impl Scrub {
    /// Begins; the first prefix to ask for is the empty one, which has the answer to itself.
    pub fn new() -> (Self, Vec<u8>) {
        let scrub =
            Self { open: BTreeSet::from([Vec::new()]), waiting: VecDeque::new(), report: Report::default() };
        (scrub, Vec::new())
    }

    /// Takes the peer's answer for a prefix and this region's own, which [`answer`] made, and returns the prefixes
    /// to ask for next. If the two are in different resolutions, each further byte is asked.
    pub fn answer(
        &mut self,
        prefix: &[u8],
        theirs: &Fingerprints,
        ours: &Fingerprints,
    ) -> Result<Vec<Vec<u8>>, ScrubError> {
        if !self.open.contains(prefix) {
            return Err(ScrubError::NotAsked);
        }
        check(prefix, theirs)?;
        check(prefix, ours)?;
        self.open.remove(prefix);
        match (theirs, ours) {
            (Fingerprints::Documents(theirs), Fingerprints::Documents(ours)) => self.compare(theirs, ours),
            _ => self.descend(prefix, &buckets(prefix, theirs), &buckets(prefix, ours)),
        }
        Ok(self.next_requests())
    }

    /// Whether every answer has come.
    pub fn is_finished(&self) -> bool {
        self.open.is_empty()
    }

    /// What was found; all of it once the scrub is finished.
    pub fn into_report(self) -> Report {
        self.report
    }

    fn descend(&mut self, prefix: &[u8], theirs: &[(u64, Fingerprint)], ours: &[(u64, Fingerprint)]) {
        for (next, (theirs, ours)) in (0..=u8::MAX).zip(theirs.iter().zip(ours)) {
            if theirs != ours {
                self.waiting.push_back([prefix, &[next]].concat());
            }
        }
    }

    /// Compares two lists in the order of ids, as far as both reach.
    fn compare(&mut self, theirs: &[(DocumentId, Fingerprint)], ours: &[(DocumentId, Fingerprint)]) {
        let reach = [theirs, ours].into_iter().filter(|list| list.len() >= SCRUB_DOCUMENTS_MAX);
        let reach = reach.filter_map(|list| list.last()).map(|(document, _)| document).min();
        self.report.more |= reach.is_some();
        let within = |(document, _): &&(DocumentId, Fingerprint)| reach.is_none_or(|last| document <= last);
        let mut theirs = theirs.iter().take_while(within).peekable();
        let mut ours = ours.iter().take_while(within).peekable();
        loop {
            let order = match (theirs.peek(), ours.peek()) {
                (None, None) => return,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((their_id, _)), Some((our_id, _))) => their_id.cmp(our_id),
            };
            let their = theirs.next_if(|_| order.is_le());
            let our = ours.next_if(|_| order.is_ge());
            let seen = Seen { theirs: their.map(|it| it.1), ours: our.map(|it| it.1) };
            if let Some((document, _)) = their.or(our).filter(|_| seen.difference().is_some()) {
                self.found(document, seen);
            }
        }
    }

    fn found(&mut self, document: &DocumentId, seen: Seen) {
        match self.report.differences.len() < DIFFERENCES_MAX {
            true => _ = self.report.differences.insert(document.clone(), seen),
            false => self.report.more = true,
        }
    }

    fn next_requests(&mut self) -> Vec<Vec<u8>> {
        // A full report grows no more: what is still to be asked could only say that there is more.
        if self.report.differences.len() >= DIFFERENCES_MAX && !self.waiting.is_empty() {
            self.report.more = true;
            self.waiting.clear();
        }
        let free = OPEN_REQUESTS_MAX.saturating_sub(self.open.len()).min(self.waiting.len());
        let next: Vec<_> = self.waiting.drain(..free).collect();
        self.open.extend(next.iter().cloned());
        next
    }
}

/// That an answer can be one for this prefix.
fn check(prefix: &[u8], fingerprints: &Fingerprints) -> Result<(), ScrubError> {
    match fingerprints {
        Fingerprints::Buckets(_) if prefix.len() >= SCRUB_PREFIX_BYTES_MAX => Err(ScrubError::TooDeep),
        Fingerprints::Buckets(buckets) if buckets.len() != SCRUB_BUCKETS => {
            Err(ScrubError::Buckets(buckets.len()))
        }
        Fingerprints::Buckets(_) => Ok(()),
        Fingerprints::Documents(documents) => {
            let ascend = documents.is_sorted_by(|(one, _), (next, _)| one < next);
            let below = documents.iter().all(|(document, _)| bucket(document).starts_with(prefix));
            if ascend && below { Ok(()) } else { Err(ScrubError::Misplaced) }
        }
    }
}

/// Documents as the buckets that they make, to be compared with a side that has too many to list.
fn buckets(prefix: &[u8], fingerprints: &Fingerprints) -> Vec<(u64, Fingerprint)> {
    match fingerprints {
        Fingerprints::Buckets(buckets) => buckets.clone(),
        Fingerprints::Documents(documents) => {
            let mut below = Below::new(false);
            for (document, fingerprint) in documents {
                below.add(bucket(document)[prefix.len()], document.clone(), *fingerprint);
            }
            below.buckets
        }
    }
}

#[cfg(test)]
mod tests;
