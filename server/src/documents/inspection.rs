//! Looking at what storage holds of a document, without bringing it into memory and without the CRDT: what it comes to for a
//! scrub, and whether its bytes still are what their names say.
//!
//! What is looked at is what a load would find, not what is in memory: what was dropped or damaged on disk shows. The
//! rules of the graph's door do not count here. Changes that do not fit each other are held all the same, in every region.

use std::collections::{BTreeSet, HashMap};

use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::change::{Change, change_name};
use isobar_protocol::config::Limits;
use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use isobar_protocol::scrub::{Fingerprint, Held, fingerprint};

use super::contents::{BASE_READS_MAX, CheckedBase};
use super::{Documents, PARSE_INLINE_BYTES};
use crate::storage::{DocumentState, StorageError, StoredBase, StoredChange, StoredDocument};

/// Something stored that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("the bytes of change {0} do not match its name")]
    Change(ChangeHash),
    /// With the names in it that can be read.
    #[error("a row of {} changes does not decode", .0.len())]
    Row(Vec<ChangeHash>),
    #[error("the base: {0}")]
    Base(String),
}

/// What storage holds of a document.
#[derive(Debug)]
pub struct Inspection {
    pub group: PlacementGroup,
    pub state: DocumentState,
    /// Nothing if it exists and has no change that can be read.
    pub held: Option<Held>,
    pub damage: Vec<Damage>,
    /// Bytes that were read for it.
    pub bytes: usize,
}

impl Inspection {
    pub fn fingerprint(&self, id: &DocumentId) -> Option<Fingerprint> {
        self.held.as_ref().map(|held| fingerprint(id, held))
    }
}

/// What is read of a tail.
#[derive(Default)]
pub(super) struct ReadTail {
    pub(super) changes: Vec<Change>,
    /// Changes with their right names that a newer program let in.
    unreadable: BTreeSet<ChangeHash>,
    pub(super) damaged: Vec<ChangeHash>,
}

impl Documents {
    /// Looks at what storage holds; nothing if it does not know the document. `deep` also reads the base through.
    pub async fn inspect(&self, id: &DocumentId, deep: bool) -> Result<Option<Inspection>, StorageError> {
        for _ in 0..BASE_READS_MAX {
            let Some(stored) = self.storage.load_document(id).await? else { return Ok(None) };
            if let Some(inspection) = self.look_at(id, stored, deep).await? {
                return Ok(Some(inspection));
            }
        }
        Err(StorageError::Transient("its base is replaced all the time".into()))
    }

    /// Nothing if the base was replaced meanwhile.
    async fn look_at(
        &self,
        id: &DocumentId,
        stored: StoredDocument,
        deep: bool,
    ) -> Result<Option<Inspection>, StorageError> {
        let StoredDocument { group, state, base, tail, damaged_rows } = stored;
        let mut bytes = tail.iter().map(|change| 32 + change.bytes.len()).sum();
        let mut damage: Vec<Damage> = damaged_rows.into_iter().map(Damage::Row).collect();
        if matches!(state, DocumentState::Deleted { .. }) {
            let held = Some(Held::Deleted);
            return Ok(Some(Inspection { group, state, held, damage, bytes }));
        }
        let tail = read_tail(tail).await;
        damage.extend(tail.damaged.iter().copied().map(Damage::Change));
        let mut covered = Covered::default();
        if let Some(base) = &base {
            match BaseSummary::decode(&base.summary) {
                Ok(summary) => covered.heads = summary.heads.iter().map(|head| head.hash).collect(),
                Err(error) => damage.push(Damage::Base(error.to_string())),
            }
            if deep && damage.iter().all(|it| !matches!(it, Damage::Base(_))) {
                let Some((read, found)) = self.read_base_through(id, base).await? else { return Ok(None) };
                bytes += read;
                damage.extend(found.map(Damage::Base));
            }
            if !base.pruned || covered.may_hold_more(&tail.changes) {
                let Some(index) = self.index_of(id, base).await? else { return Ok(None) };
                match index {
                    Ok(index) => covered.index = Some(index),
                    // One base is one damage, in however many ways it shows.
                    Err(_) if damage.iter().any(|it| matches!(it, Damage::Base(_))) => {}
                    Err(error) => damage.push(Damage::Base(error)),
                }
            }
        }
        let held = held(&covered, &tail);
        Ok(Some(Inspection { group, state, held, damage, bytes }))
    }

    /// The base's index, or what is wrong with it. Nothing if there is another base by now.
    pub(super) async fn index_of(
        &self,
        id: &DocumentId,
        base: &StoredBase,
    ) -> Result<Option<Result<BaseIndex, String>>, StorageError> {
        let Some((generation, bytes)) = self.storage.read_base_index(id).await? else {
            return Ok(Some(Err("its index is not there".to_owned())));
        };
        if generation != base.generation {
            return Ok(None);
        }
        let decoded = tokio::task::spawn_blocking(move || BaseIndex::decode(&bytes)).await;
        Ok(Some(match decoded {
            Ok(Ok(index)) => Ok(index),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("its index cannot be read".to_owned()),
        }))
    }

    /// Reads all parts of a base: how many bytes, and what is wrong with them. Nothing if there is another base by now.
    async fn read_base_through(
        &self,
        id: &DocumentId,
        base: &StoredBase,
    ) -> Result<Option<(usize, Option<String>)>, StorageError> {
        let Some(contents) = self.base_contents(id, base).await? else {
            let found = self.storage.load_document(id).await?.and_then(|it| it.base);
            let is_same = found.is_some_and(|it| it.generation == base.generation);
            return Ok(is_same.then(|| (0, Some("a part of it is not there".to_owned()))));
        };
        let bytes = contents.summary.len() + contents.index.len() + contents.chunk.len();
        let checked = tokio::task::spawn_blocking(move || CheckedBase::new(contents)).await;
        let wrong = match checked {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("it cannot be read".to_owned()),
        };
        Ok(Some((bytes, wrong)))
    }
}

/// What a base covers, as far as it had to be found out.
#[derive(Default)]
struct Covered {
    heads: BTreeSet<ChangeHash>,
    index: Option<BaseIndex>,
}

impl Covered {
    fn contains(&self, hash: &ChangeHash) -> bool {
        self.heads.contains(hash)
            || self.index.as_ref().is_some_and(|index| index.position_of(hash).is_some())
    }

    /// Whether the tail refers to the inside of the base, or may hold some of it.
    fn may_hold_more(&self, tail: &[Change]) -> bool {
        let here: BTreeSet<ChangeHash> = tail.iter().map(|change| change.hash).collect();
        let is_outside = |dep: &ChangeHash| here.contains(dep) || self.heads.contains(dep);
        tail.iter().any(|change| change.deps.is_empty() || !change.deps.iter().all(is_outside))
    }
}

/// Reads a tail, on a blocking thread if that takes longer than a millisecond.
pub(super) async fn read_tail(tail: Vec<StoredChange>) -> ReadTail {
    let bytes: usize = tail.iter().map(|change| change.bytes.len()).sum();
    match bytes > PARSE_INLINE_BYTES {
        false => read_tail_now(tail),
        true => tokio::task::spawn_blocking(move || read_tail_now(tail)).await.unwrap_or_default(),
    }
}

fn read_tail_now(tail: Vec<StoredChange>) -> ReadTail {
    let limits = Limits::stored();
    let mut read = ReadTail::default();
    for StoredChange { hash, bytes } in tail {
        match Change::decode(bytes.clone(), &limits) {
            Ok(change) if change.hash == hash => read.changes.push(change),
            Err(_) if change_name(&bytes, &limits) == Some(hash) => _ = read.unreadable.insert(hash),
            _ => read.damaged.push(hash),
        }
    }
    read
}

/// Sorts what is held into what has all of its past and what has not.
fn held(covered: &Covered, tail: &ReadTail) -> Option<Held> {
    let outside = tail.changes.iter().filter(|change| !covered.contains(&change.hash));
    let mut waiting: HashMap<ChangeHash, &Change> = outside.map(|change| (change.hash, change)).collect();
    let mut heads = covered.heads.clone();
    let mut dependents: HashMap<ChangeHash, Vec<ChangeHash>> = HashMap::new();
    let mut missing: HashMap<ChangeHash, usize> = HashMap::new();
    let mut ready = Vec::new();
    for change in waiting.values() {
        let lacking = change.deps.iter().filter(|dep| !covered.contains(dep));
        let mut count = 0;
        for dep in lacking {
            dependents.entry(*dep).or_default().push(change.hash);
            count += 1;
        }
        match count {
            0 => ready.push(change.hash),
            count => _ = missing.insert(change.hash, count),
        }
    }
    let mut named: BTreeSet<ChangeHash> = BTreeSet::new();
    while let Some(hash) = ready.pop() {
        let Some(change) = waiting.remove(&hash) else { continue };
        heads.insert(hash);
        named.extend(change.deps.iter().copied());
        for dependent in dependents.remove(&hash).unwrap_or_default() {
            if let Some(count) = missing.get_mut(&dependent) {
                *count -= 1;
                if *count == 0 {
                    ready.push(dependent);
                }
            }
        }
    }
    heads.retain(|head| !named.contains(head));
    let pending: BTreeSet<ChangeHash> = waiting.into_keys().chain(tail.unreadable.iter().copied()).collect();
    (!heads.is_empty() || !pending.is_empty()).then_some(Held::Changes { heads, pending })
}

#[cfg(test)]
mod tests {
    use automerge::transaction::Transactable;
    use automerge::{AutoCommit, ROOT};

    use super::*;

    fn stored(count: i64) -> Vec<StoredChange> {
        let mut document = AutoCommit::new();
        for edit in 0..count {
            document.put(ROOT, "edits", edit).unwrap();
            document.commit();
        }
        let changes = document.get_changes(&[]).into_iter().map(|change| StoredChange {
            hash: ChangeHash(change.hash().0),
            bytes: change.raw_bytes().to_vec().into(),
        });
        changes.collect()
    }

    fn of(tail: Vec<StoredChange>) -> (Option<Held>, Vec<ChangeHash>) {
        let read = read_tail_now(tail);
        (held(&Covered::default(), &read), read.damaged)
    }

    fn changes(heads: &[ChangeHash], pending: &[ChangeHash]) -> Option<Held> {
        let set = |hashes: &[ChangeHash]| hashes.iter().copied().collect();
        Some(Held::Changes { heads: set(heads), pending: set(pending) })
    }

    #[test]
    fn a_change_that_is_gone_from_the_middle_shows_in_what_is_held() {
        let all = stored(4);
        let hashes: Vec<ChangeHash> = all.iter().map(|change| change.hash).collect();
        assert_eq!(of(all.clone()), (changes(&hashes[3..], &[]), Vec::new()));
        let mut without = all.clone();
        without.remove(1);
        assert_eq!(of(without).0, changes(&hashes[..1], &hashes[2..]));
        let covered = Covered { heads: hashes[1..2].iter().copied().collect(), index: None };
        assert_eq!(held(&covered, &read_tail_now(all[2..].to_vec())), changes(&hashes[3..], &[]));
        assert!(!covered.may_hold_more(&read_tail_now(all[2..].to_vec()).changes));
        assert!(covered.may_hold_more(&read_tail_now(all[1..].to_vec()).changes));
        assert_eq!(of(Vec::new()).0, None);
    }

    #[test]
    fn bytes_that_do_not_match_their_name_are_damaged_and_not_held() {
        let mut all = stored(3);
        let hashes: Vec<ChangeHash> = all.iter().map(|change| change.hash).collect();
        let mut spoilt = all[2].bytes.to_vec();
        *spoilt.last_mut().unwrap() ^= 1;
        all[2].bytes = spoilt.into();
        assert_eq!(of(all.clone()), (changes(&hashes[1..2], &[]), vec![hashes[2]]));
        // Good bytes of another change are no better.
        all[2].bytes = all[0].bytes.clone();
        assert_eq!(of(all), (changes(&hashes[1..2], &[]), vec![hashes[2]]));
    }
}
