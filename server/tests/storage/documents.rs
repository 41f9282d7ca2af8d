//! Clauses 6, 7, 11 and 15: documents and their bases.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use isobar::storage::{DocumentState, ListedDocument, Storage, StorageError, StoredBase, StoredChange};
use isobar_protocol::ids::{ChangeHash, Seq};

use crate::fixture::*;

pub async fn an_unknown_document_is_none(database: Database) {
    let storage = database.open().await;
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    assert_eq!(storage.read_base_chunk(&document(1)).await.unwrap(), None);
    assert_eq!(storage.read_base_index(&document(1)).await.unwrap(), None);
    storage.prune_changes(&document(1), &[hash(1)]).await.unwrap();
    storage.finish_prune(&document(1), 1).await.unwrap();
    storage.set_state(&document(1), &DocumentState::Live).await.unwrap();
    let refused = storage.install_base(&document(1), 0, base(b"one")).await;
    assert!(matches!(refused, Err(StorageError::Conflict { expected: 0, found: 0 })));
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    assert_eq!(storage.read_base_chunk(&document(1)).await.unwrap(), None);
}

pub async fn a_document_keeps_its_group_and_state(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    let loaded = load(&*storage, 1).await;
    assert_eq!((loaded.group, loaded.state, loaded.base), (group(), DocumentState::Live, None));

    let quarantined = DocumentState::Quarantined { reason: "does not apply: \u{1f4a5}".to_owned() };
    storage.set_state(&document(1), &quarantined).await.unwrap();
    append_own(&*storage, &origin, Seq(2), &[append(1, 1..2)]).await.unwrap();
    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(load(&*storage, 1).await.state, quarantined);
    // A NUL may come from a client's text; what is kept in its place is the database's affair.
    let hostile = DocumentState::Quarantined { reason: "a\0b".to_owned() };
    storage.set_state(&document(1), &hostile).await.unwrap();
    assert!(matches!(load(&*storage, 1).await.state, DocumentState::Quarantined { .. }));
    storage.set_state(&document(1), &DocumentState::Live).await.unwrap();
    assert_eq!(load(&*storage, 1).await.state, DocumentState::Live);
}

pub async fn quarantined_documents_are_listed_and_counted_among_others(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let all: Vec<_> = (1..10).map(|number| append(number, [u32::from(number)])).collect();
    append_own(&*storage, &origin, Seq(1), &all).await.unwrap();
    assert_eq!(storage.count_quarantined().await.unwrap(), 0);
    assert_eq!(storage.list_quarantined(None, 10).await.unwrap(), []);
    let because = |number: u8| DocumentState::Quarantined { reason: format!("poison {number}") };
    for number in [2, 3, 5, 8] {
        storage.set_state(&document(number), &because(number)).await.unwrap();
    }
    let found = async |after: Option<u8>, limit| {
        let after = after.map(document);
        storage.list_quarantined(after.as_ref(), limit).await.unwrap()
    };
    let listed = |number| ListedDocument { id: document(number), group: group(), state: because(number) };
    assert_eq!(found(None, 10).await, [2, 3, 5, 8].map(listed));
    assert_eq!(found(None, 2).await, [2, 3].map(listed));
    assert_eq!(found(Some(3), 2).await, [5, 8].map(listed));
    assert_eq!(found(Some(8), 2).await, []);
    assert_eq!(storage.count_quarantined().await.unwrap(), 4);

    // What was mended or deleted is not quarantined any more.
    storage.set_state(&document(5), &DocumentState::Live).await.unwrap();
    storage.append(&deletion(&origin, 10, 3, 500)).await.unwrap();
    assert_eq!(found(None, 10).await, [2, 8].map(listed));
    assert_eq!(storage.count_quarantined().await.unwrap(), 2);
}

/// The changes that a test's base covers are those below the number that its summary says.
fn covers(base: &Option<StoredBase>) -> u32 {
    base.as_ref().map_or(0, |base| u32::from_be_bytes(base.summary[..].try_into().unwrap()))
}

/// What the writer and the reader of a race tell each other.
#[derive(Default)]
struct Race {
    /// How many changes are committed.
    committed: AtomicU32,
    /// How many loads have ended.
    loads: AtomicU32,
}

impl Race {
    /// Waits until a load has begun and ended meanwhile: the first to end may have begun before.
    async fn a_load_passes(&self) {
        let before = self.loads.load(Ordering::SeqCst);
        while self.loads.load(Ordering::SeqCst) < before + 2 {
            tokio::task::yield_now().await;
        }
    }
}

/// Appends 40 times 25 changes to document 1; after each, replaces the base by one that covers them all, and prunes.
async fn write_and_compact(storage: Arc<dyn Storage>, race: Arc<Race>) {
    let origin = claim(&*storage, 0).await;
    for round in 0..40_u32 {
        let (first, end) = (round * 25, round * 25 + 25);
        let batch = [append(1, first..end)];
        append_own(&*storage, &origin, Seq(u64::from(first) + 1), &batch).await.unwrap();
        race.committed.store(end, Ordering::SeqCst);
        let generation = u64::from(round);
        let generation =
            storage.install_base(&document(1), generation, base(&end.to_be_bytes())).await.unwrap();
        if round % 8 == 0 {
            race.a_load_passes().await;
        }
        let covered: Vec<ChangeHash> = (first..end).map(hash).collect();
        for step in covered.chunks(10) {
            storage.prune_changes(&document(1), step).await.unwrap();
        }
        storage.finish_prune(&document(1), generation).await.unwrap();
    }
}

pub async fn clause_6_loads_that_race_compaction_miss_nothing(database: Database) {
    let (writer, reader) = (database.open().await, database.open().await);
    let race = Arc::new(Race::default());
    let writing = tokio::spawn(write_and_compact(writer, Arc::clone(&race)));
    let mut unpruned_seen = 0;
    while !writing.is_finished() {
        let at_least = race.committed.load(Ordering::SeqCst);
        let loaded = reader.load_document(&document(1)).await.unwrap();
        race.loads.fetch_add(1, Ordering::SeqCst);
        let Some(loaded) = loaded else {
            assert_eq!(at_least, 0);
            continue;
        };
        let covered = covers(&loaded.base);
        let tail: BTreeSet<ChangeHash> = loaded.tail.iter().map(|change| change.hash).collect();
        for number in covered..at_least {
            assert!(tail.contains(&hash(number)), "change {number} is neither in the base nor in the tail");
        }
        if loaded.base.is_some_and(|base| base.pruned) {
            assert!(
                (0..covered).all(|number| !tail.contains(&hash(number))),
                "pruned, but covered changes stay"
            );
        } else {
            unpruned_seen += 1;
        }
        let chunk = reader.read_base_chunk(&document(1)).await.unwrap();
        if let Some((generation, chunk)) = chunk {
            let covered = u32::try_from(generation).unwrap() * 25;
            assert_eq!(chunk, base(&covered.to_be_bytes()).chunk);
        }
    }
    writing.await.unwrap();
    assert!(unpruned_seen >= 5, "only {unpruned_seen} loads met a compaction");
    let loaded = load(&*reader, 1).await;
    assert_eq!((covers(&loaded.base), loaded.tail.len()), (1_000, 0));
    assert_eq!(loaded.base.map(|base| (base.generation, base.pruned)), Some((40, true)));
}

pub async fn clause_7_a_base_replaces_only_the_one_it_was_made_from(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    let refused = storage.install_base(&document(1), 1, base(b"early")).await;
    assert!(matches!(refused, Err(StorageError::Conflict { expected: 1, found: 0 })));
    assert_eq!(load(&*storage, 1).await.base, None);

    assert_eq!(storage.install_base(&document(1), 0, base(b"one")).await.unwrap(), 1);
    let refused = storage.install_base(&document(1), 0, base(b"another")).await;
    assert!(matches!(refused, Err(StorageError::Conflict { expected: 0, found: 1 })));
    assert_eq!(storage.install_base(&document(1), 1, base(b"two")).await.unwrap(), 2);
    let refused = storage.install_base(&document(1), 1, base(b"late")).await;
    assert!(matches!(refused, Err(StorageError::Conflict { expected: 1, found: 2 })));

    let database = database.crashed();
    let storage = database.open().await;
    let (expected, loaded) = (base(b"two"), load(&*storage, 1).await.base.unwrap());
    assert_eq!((loaded.generation, loaded.pruned), (2, false));
    assert_eq!((loaded.summary, loaded.chunk_bytes), (expected.summary, expected.chunk.len() as u64));
    assert_eq!(storage.read_base_chunk(&document(1)).await.unwrap(), Some((2, expected.chunk)));
    assert_eq!(storage.read_base_index(&document(1)).await.unwrap(), Some((2, expected.index)));
}

pub async fn clause_7_installing_removes_nothing_and_pruning_ends_with_its_generation(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..700)]).await.unwrap();
    storage.install_base(&document(1), 0, base(b"one")).await.unwrap();
    assert_eq!(load(&*storage, 1).await.tail.len(), 700);

    // Some that are not there among them.
    let covered: Vec<ChangeHash> = (0..333).chain(5_000..5_003).map(hash).collect();
    storage.prune_changes(&document(1), &covered).await.unwrap();
    storage.prune_changes(&document(1), &[]).await.unwrap();
    assert_eq!(tail(&*storage, 1).await, sorted(changes(333..700)));
    assert!(!load(&*storage, 1).await.base.unwrap().pruned);

    storage.install_base(&document(1), 1, base(b"two")).await.unwrap();
    storage.finish_prune(&document(1), 1).await.unwrap();
    assert!(!load(&*storage, 1).await.base.unwrap().pruned, "an old base's pruning ended the new one's");
    storage.finish_prune(&document(1), 2).await.unwrap();
    assert!(load(&*storage, 1).await.base.unwrap().pruned);
    let empty = isobar::storage::NewBase { summary: Bytes::new(), index: Bytes::new(), chunk: Bytes::new() };
    storage.install_base(&document(1), 2, empty).await.unwrap();
    assert!(!load(&*storage, 1).await.base.unwrap().pruned);
    assert_eq!(storage.read_base_index(&document(1)).await.unwrap(), Some((3, Bytes::new())));
    assert_eq!(whole_log(&*storage, &origin).await.len(), 700);
}

pub async fn clause_7_pruning_takes_changes_out_of_whatever_they_were_appended_with(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    // Alone, by threes, and all together; 301 appends, so that every size of statement is used.
    let mut batch: Vec<_> = (0..301).map(|number| append(1, [number])).collect();
    batch.extend((301..601).step_by(3).map(|first| append(1, first..first + 3)));
    batch.push(append(1, 601..701));
    append_own(&*storage, &origin, Seq(1), &batch).await.unwrap();
    // A change that came twice goes entirely.
    append_own(&*storage, &origin, Seq(702), &[append(1, [2, 302, 650, 701])]).await.unwrap();

    let covered: Vec<ChangeHash> = (0..701).filter(|number| number % 7 != 0).map(hash).collect();
    storage.prune_changes(&document(1), &covered).await.unwrap();
    let kept = (0..701).filter(|number| number % 7 == 0).chain([701]);
    assert_eq!(tail(&*storage, 1).await, sorted(changes(kept)));
}

pub async fn clause_7_two_nodes_may_prune_a_document_at_once(database: Database) {
    let (one, other) = (database.open().await, database.open().await);
    let origin = claim(&*one, 0).await;
    let batch: Vec<_> = (0..400).step_by(10).map(|first| append(1, first..first + 10)).collect();
    append_own(&*one, &origin, Seq(1), &batch).await.unwrap();
    let covered = |remainder| -> Vec<ChangeHash> {
        (0..400).filter(|number| number % 3 == remainder).map(hash).collect()
    };
    let prune = async |storage: &dyn Storage, covered: &[ChangeHash]| {
        while let Err(error) = storage.prune_changes(&document(1), covered).await {
            assert!(matches!(error, StorageError::Transient(_)), "{error}");
        }
    };
    let (zeros, ones) = (covered(0), covered(1));
    tokio::join!(prune(&*one, &zeros), prune(&*other, &ones));
    let kept = (0..400).filter(|number| number % 3 == 2);
    assert_eq!(tail(&*one, 1).await, sorted(changes(kept)));
}

pub async fn clause_7_of_two_installs_at_once_one_is_refused(database: Database) {
    let (one, other) = (database.open().await, database.open().await);
    let origin = claim(&*one, 0).await;
    append_own(&*one, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    for generation in 0..20 {
        let document = document(1);
        let (first, second) = tokio::join!(
            one.install_base(&document, generation, base(b"one")),
            other.install_base(&document, generation, base(b"other")),
        );
        let kept = if first.is_ok() { base(b"one") } else { base(b"other") };
        let (installed, refused) = if first.is_ok() { (first, second) } else { (second, first) };
        assert_eq!(installed.unwrap(), generation + 1);
        assert!(matches!(refused, Err(StorageError::Conflict { found, .. }) if found == generation + 1));
        assert_eq!(load(&*one, 1).await.base.unwrap().summary, kept.summary);
        let chunk = one.read_base_chunk(&document).await.unwrap();
        assert_eq!(chunk, Some((generation + 1, kept.chunk)));
    }
}

pub async fn clause_11_documents_do_not_touch_each_other(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    // The same changes in both.
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..5), append(2, 0..5)]).await.unwrap();
    storage.install_base(&document(2), 0, base(b"two")).await.unwrap();
    let before = load(&*storage, 2).await;

    storage.install_base(&document(1), 0, base(b"one")).await.unwrap();
    storage.prune_changes(&document(1), &(0..5).map(hash).collect::<Vec<_>>()).await.unwrap();
    storage.finish_prune(&document(1), 1).await.unwrap();
    let quarantined = DocumentState::Quarantined { reason: "poison".to_owned() };
    storage.set_state(&document(1), &quarantined).await.unwrap();

    assert_eq!(load(&*storage, 1).await.tail, []);
    let after = load(&*storage, 2).await;
    assert_eq!((after.state, after.base), (before.state, before.base));
    assert_eq!(sorted(after.tail), sorted(before.tail));
    assert_eq!(storage.read_base_chunk(&document(2)).await.unwrap(), Some((1, base(b"two").chunk)));
}

pub async fn clause_15_mending_gives_every_stored_copy_its_bytes_and_adds_nothing(database: Database) {
    let storage = database.open().await;
    let (one, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    append_own(&*storage, &one, Seq(1), &[append(1, 0..3), append(2, 0..1)]).await.unwrap();
    append_own(&*storage, &other, Seq(1), &[append(1, 1..2)]).await.unwrap();
    let better = StoredChange { bytes: vec![9; 300].into(), ..change(1) };
    storage.mend_changes(&document(1), &[better.clone(), change(7)]).await.unwrap();
    storage.mend_changes(&document(3), &[change(7)]).await.unwrap();
    assert_eq!(tail(&*storage, 1).await, sorted(vec![change(0), better, change(2)]));
    assert_eq!(tail(&*storage, 2).await, changes(0..1));
    assert_eq!(load(&*storage, 1).await.damaged_rows, Vec::<Vec<ChangeHash>>::new());
    assert!(storage.load_document(&document(3)).await.unwrap().is_none());
}

/// Whoever spoils rows does it behind the storage's back, and only in document 1: the row of changes 2 and 3.
pub async fn a_spoilt_row_costs_nothing_but_itself(storage: Arc<dyn Storage>, spoil: impl AsyncFnOnce()) {
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2), append(2, 0..2)]).await.unwrap();
    append_own(&*storage, &origin, Seq(5), &[append(1, 2..4)]).await.unwrap();
    spoil().await;
    let loaded = load(&*storage, 1).await;
    assert_eq!(sorted(loaded.tail), sorted(changes(0..2)));
    assert_eq!(loaded.damaged_rows, [[hash(2), hash(3)]]);
    assert_eq!(tail(&*storage, 2).await, sorted(changes(0..2)));
    append_own(&*storage, &origin, Seq(7), &[append(1, 2..4)]).await.unwrap();
    storage.mend_changes(&document(1), &changes(2..4)).await.unwrap();
    let mended = load(&*storage, 1).await;
    assert_eq!(sorted(mended.tail), sorted(changes(0..4)));
    assert_eq!(mended.damaged_rows, Vec::<Vec<ChangeHash>>::new());
}
