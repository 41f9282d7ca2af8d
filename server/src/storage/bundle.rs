//! How the changes of a tail are packed into rows.
//!
//! One append writes one bundle per document rather than a row per change: hashes are random, so an index over them
//! would touch a page for each change, while bundles of a document stand behind each other. A bundle's key is
//! (document, origin, seq of its first change's log entry). Its two columns are
//!
//! ```text
//! hashes  = hash*              32 bytes each
//! changes = (length bytes)*    length: unsigned LEB128; as many as there are hashes
//! ```
//!
//! No index finds a change by its hash. So a change that comes a second time stands in a second bundle until it is
//! pruned; whoever reads a tail takes the first of them, and sees each change once. It comes twice only where two
//! nodes receive it at once: a node knows what its documents hold.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};

use super::packing::{push_leb128, take, take_leb128};
use super::{DocumentAppend, StorageError, StoredChange};

/// Bytes of changes after which a bundle ends. Pruning rewrites what it removes only a part of, and a row is held in
/// memory several times on its way; a single larger change is a bundle of its own.
const BUNDLE_BYTES_MAX: usize = 256 << 10;

/// Changes of one document that were appended together.
pub(super) struct Bundle<'a> {
    pub document: &'a DocumentId,
    /// It is stored only if the document is of this group.
    pub group: &'a PlacementGroup,
    pub origin: OriginId,
    /// The log entry of the bundle's first change.
    pub first: Seq,
    pub hashes: Vec<u8>,
    pub changes: Vec<u8>,
}

impl<'a> Bundle<'a> {
    /// # Panics
    /// If there are no changes.
    fn of(append: &'a DocumentAppend, changes: &[(Seq, StoredChange)]) -> Self {
        let (first, _) = changes.first().expect("a bundle holds at least one change");
        let bytes: usize = changes.iter().map(|(_, change)| change.bytes.len() + 4).sum();
        let mut bundle = Self {
            document: &append.document,
            group: &append.group,
            origin: append.origin,
            first: *first,
            hashes: Vec::with_capacity(changes.len() * 32),
            changes: Vec::with_capacity(bytes),
        };
        for (_, change) in changes {
            bundle.hashes.extend_from_slice(change.hash.as_bytes());
            push_leb128(&mut bundle.changes, change.bytes.len() as u64);
            bundle.changes.extend_from_slice(&change.bytes);
        }
        bundle
    }
}

/// Bundles a batch's changes, in the order of their documents: neighbours go to the same page.
pub(super) fn bundle(batch: &[DocumentAppend]) -> Vec<Bundle<'_>> {
    let mut bundles = Vec::with_capacity(batch.len());
    for append in batch {
        let mut rest = &append.changes[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(fitting(rest));
            bundles.push(Bundle::of(append, now));
            rest = later;
        }
    }
    bundles.sort_by(|bundle, other| {
        (bundle.document, bundle.origin, bundle.first).cmp(&(other.document, other.origin, other.first))
    });
    bundles
}

/// How many of the changes go into one bundle: at least one.
fn fitting(changes: &[(Seq, StoredChange)]) -> usize {
    let mut bytes = 0;
    let within = changes.iter().take_while(|(_, change)| {
        bytes += change.bytes.len();
        bytes <= BUNDLE_BYTES_MAX
    });
    within.count().max(1)
}

/// A bundle whose columns do not decode: the database is damaged.
#[derive(Debug, thiserror::Error)]
#[error("a bundle of {hashes_bytes} bytes of hashes and {changes_bytes} of changes does not decode")]
struct DamagedBundle {
    hashes_bytes: usize,
    changes_bytes: usize,
}

/// The changes of a bundle. They share its buffer.
fn unpack(hashes: &[u8], changes: &Bytes) -> Result<Vec<StoredChange>, StorageError> {
    let damaged = || DamagedBundle { hashes_bytes: hashes.len(), changes_bytes: changes.len() };
    try_unpack(hashes, changes).ok_or_else(|| StorageError::Fatal(Box::new(damaged())))
}

fn try_unpack(hashes: &[u8], changes: &Bytes) -> Option<Vec<StoredChange>> {
    let mut rest = &changes[..];
    let mut unpacked = Vec::with_capacity(hashes.len() / 32);
    for hash in hashes.chunks(32) {
        let hash = ChangeHash::from_slice(hash).ok()?;
        let length = usize::try_from(take_leb128(&mut rest)?).ok()?;
        let bytes = changes.slice_ref(take(&mut rest, length)?);
        unpacked.push(StoredChange { hash, bytes });
    }
    rest.is_empty().then_some(unpacked)
}

/// A tail while its bundles are read, in whatever order the database gives them.
#[derive(Default)]
pub(super) struct Tail {
    bundles: Vec<(Seq, Vec<StoredChange>)>,
    damaged: Vec<Vec<ChangeHash>>,
}

impl Tail {
    pub fn push(&mut self, first: Seq, hashes: &[u8], changes: &Bytes) {
        match try_unpack(hashes, changes) {
            Some(unpacked) => self.bundles.push((first, unpacked)),
            None => self.damaged.push(names(hashes)),
        }
    }

    /// For each bundle that did not decode, the names in it.
    pub fn take_damaged(&mut self) -> Vec<Vec<ChangeHash>> {
        std::mem::take(&mut self.damaged)
    }

    /// Each change once: of those that an origin brought twice, the earlier.
    pub fn into_changes(mut self) -> Vec<StoredChange> {
        self.bundles.sort_by_key(|(first, _)| *first);
        let mut changes: Vec<StoredChange> =
            self.bundles.into_iter().flat_map(|(_, changes)| changes).collect();
        let mut seen = HashSet::with_capacity(changes.len());
        changes.retain(|change| seen.insert(change.hash));
        changes
    }
}

/// The names in a bundle, as far as they are whole.
fn names(hashes: &[u8]) -> Vec<ChangeHash> {
    hashes.chunks(32).filter_map(|hash| ChangeHash::from_slice(hash).ok()).collect()
}

/// A bundle of one document, whole.
#[derive(sqlx::FromRow)]
pub(super) struct WholeBundle {
    pub origin: Vec<u8>,
    pub first_seq: i64,
    pub hashes: Vec<u8>,
    pub changes: Vec<u8>,
}

/// What is to be done with a bundle.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mending {
    Keep,
    /// Its changes are to be these.
    Replace(Vec<u8>),
    Remove,
}

impl WholeBundle {
    pub fn mending(&self, good: &HashMap<ChangeHash, Bytes>) -> Mending {
        let stored = Bytes::copy_from_slice(&self.changes);
        let Some(unpacked) = try_unpack(&self.hashes, &stored) else { return Mending::Remove };
        let mut changes = Vec::with_capacity(self.changes.len());
        for StoredChange { hash, bytes } in &unpacked {
            let bytes = good.get(hash).unwrap_or(bytes);
            push_leb128(&mut changes, bytes.len() as u64);
            changes.extend_from_slice(bytes);
        }
        if changes == self.changes { Mending::Keep } else { Mending::Replace(changes) }
    }
}

/// Changes by their names.
pub(super) fn by_name(changes: &[StoredChange]) -> HashMap<ChangeHash, Bytes> {
    changes.iter().map(|change| (change.hash, change.bytes.clone())).collect()
}

/// How much of a bundle a set of hashes covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coverage {
    None,
    Part,
    Whole,
}

fn coverage(hashes: &[u8], covered: &HashSet<ChangeHash>) -> Coverage {
    let is_covered = |hash: &[u8]| ChangeHash::from_slice(hash).is_ok_and(|hash| covered.contains(&hash));
    let count = hashes.chunks(32).filter(|hash| is_covered(hash)).count();
    match count {
        0 => Coverage::None,
        count if count * 32 == hashes.len() => Coverage::Whole,
        _ => Coverage::Part,
    }
}

/// A bundle of one document as pruning finds it, without its changes.
#[derive(sqlx::FromRow)]
pub(super) struct FoundBundle {
    pub origin: Vec<u8>,
    pub first_seq: i64,
    pub hashes: Vec<u8>,
}

/// The bundles of a document that pruning is about.
pub(super) struct CoveredBundles {
    pub whole: Vec<FoundBundle>,
    pub part: Vec<FoundBundle>,
}

impl CoveredBundles {
    pub fn among(found: Vec<FoundBundle>, covered: &HashSet<ChangeHash>) -> Self {
        let (mut whole, mut part) = (Vec::new(), Vec::new());
        for bundle in found {
            match coverage(&bundle.hashes, covered) {
                Coverage::None => {}
                Coverage::Part => part.push(bundle),
                Coverage::Whole => whole.push(bundle),
            }
        }
        Self { whole, part }
    }
}

/// How often pruning starts again when another node prunes the same document meanwhile. Each time there is less left.
pub(super) const PRUNE_ATTEMPTS_MAX: u32 = 5;

/// What a call gets whose attempts were all disturbed.
pub(super) fn prune_disturbed() -> StorageError {
    StorageError::Transient("another node is pruning the same document".into())
}

/// The two columns of a bundle without its covered changes.
pub(super) fn without(
    hashes: &[u8],
    changes: &Bytes,
    covered: &HashSet<ChangeHash>,
) -> Result<(Vec<u8>, Vec<u8>), StorageError> {
    let (mut kept_hashes, mut kept_changes) = (Vec::new(), Vec::new());
    for change in unpack(hashes, changes)?.iter().filter(|change| !covered.contains(&change.hash)) {
        kept_hashes.extend_from_slice(change.hash.as_bytes());
        push_leb128(&mut kept_changes, change.bytes.len() as u64);
        kept_changes.extend_from_slice(&change.bytes);
    }
    Ok((kept_hashes, kept_changes))
}

#[cfg(test)]
mod tests {
    use isobar_protocol::ids::PlacementGroup;
    use uuid::Uuid;

    use super::*;

    fn change(number: u8, bytes: usize) -> StoredChange {
        StoredChange { hash: ChangeHash([number; 32]), bytes: Bytes::from(vec![number; bytes]) }
    }

    fn document(number: u8) -> DocumentId {
        DocumentId::from_slice(&[number; 16]).unwrap()
    }

    fn append(to: u8, changes: Vec<(u64, StoredChange)>) -> DocumentAppend {
        DocumentAppend {
            document: document(to),
            group: PlacementGroup::new("everywhere").unwrap(),
            origin: OriginId(Uuid::from_u128(1)),
            changes: changes.into_iter().map(|(seq, change)| (Seq(seq), change)).collect(),
        }
    }

    /// The columns of a bundle of these changes.
    fn columns(changes: &[StoredChange]) -> (Vec<u8>, Bytes) {
        let append = append(1, (1..).zip(changes.iter().cloned()).collect());
        let bundle = Bundle::of(&append, &append.changes);
        (bundle.hashes, bundle.changes.into())
    }

    fn unpacked(bundle: &Bundle<'_>) -> Vec<StoredChange> {
        unpack(&bundle.hashes, &Bytes::copy_from_slice(&bundle.changes)).unwrap()
    }

    #[test]
    fn a_batch_becomes_a_bundle_per_document_keyed_by_its_first_entry() {
        let batch =
            [append(2, vec![(7, change(1, 10)), (10, change(2, 0))]), append(1, vec![(9, change(3, 200))])];
        let bundles = bundle(&batch);
        let keys: Vec<_> = bundles.iter().map(|bundle| (bundle.document.clone(), bundle.first.0)).collect();
        assert_eq!(keys, [(document(1), 9), (document(2), 7)]);
        assert_eq!(unpacked(&bundles[0]), [change(3, 200)]);
        assert_eq!(unpacked(&bundles[1]), [change(1, 10), change(2, 0)]);
    }

    #[test]
    fn large_changes_make_bundles_of_their_own_each_keyed_by_its_first_entry() {
        let half = BUNDLE_BYTES_MAX / 2;
        let sizes = [half, half, 1, 3 * half, 1];
        let changes: Vec<_> = sizes.iter().zip(0..).map(|(&size, number)| change(number, size)).collect();
        let batch = [append(1, [1, 5, 6, 8, 9].into_iter().zip(changes.iter().cloned()).collect())];
        let bundles = bundle(&batch);
        let firsts: Vec<_> = bundles.iter().map(|bundle| bundle.first.0).collect();
        assert_eq!(firsts, [1, 6, 8, 9]);
        assert!(bundles.iter().flat_map(unpacked).eq(changes));
    }

    #[test]
    fn a_tail_holds_each_change_once_and_the_first_counts() {
        let mut tail = Tail::default();
        let (hashes, changes) = columns(&[change(2, 4), change(1, 9)]);
        tail.push(Seq(2), &hashes, &changes);
        let (hashes, changes) = columns(&[change(1, 5)]);
        tail.push(Seq(1), &hashes, &changes);
        tail.push(Seq(3), &hashes, &changes.slice(1..));
        assert_eq!(tail.take_damaged(), [[change(1, 5).hash]]);
        assert_eq!(tail.into_changes(), [change(1, 5), change(2, 4)]);
    }

    #[test]
    fn covered_changes_leave_a_bundle_and_the_others_stay() {
        let (hashes, changes) = columns(&[change(1, 300), change(2, 2), change(3, 0)]);
        let covers = |numbers: &[u8]| numbers.iter().map(|&number| ChangeHash([number; 32])).collect();
        assert_eq!(coverage(&hashes, &covers(&[7])), Coverage::None);
        assert_eq!(coverage(&hashes, &covers(&[2, 7])), Coverage::Part);
        assert_eq!(coverage(&hashes, &covers(&[1, 2, 3, 7])), Coverage::Whole);
        let (hashes, changes) = without(&hashes, &changes, &covers(&[2])).unwrap();
        assert_eq!(unpack(&hashes, &changes.into()).unwrap(), [change(1, 300), change(3, 0)]);
    }

    #[test]
    fn damaged_bundles_are_refused_and_never_panic() {
        let (hashes, changes) = columns(&[change(1, 300), change(2, 2)]);
        for length in 0..changes.len() {
            assert!(unpack(&hashes, &changes.slice(..length)).is_err(), "changes cut to {length}");
        }
        for length in 0..hashes.len() {
            assert!(unpack(&hashes[..length], &changes).is_err(), "hashes cut to {length}");
        }
    }
}
