//! Clauses 12 and 18: deletions, how they leave the log, and the listing that shows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use isobar::storage::{Deletion, DocumentState, ErasureStep, ListedDocument, Storage, StorageError};
use isobar_protocol::ids::{OriginId, Seq};

use crate::fixture::*;

fn deleted(deleted_at_ms: u64) -> DocumentState {
    DocumentState::Deleted { deleted_at_ms }
}

/// Checks that of a document its tombstone is left and nothing else.
async fn assert_deleted(storage: &dyn Storage, number: u8, deleted_at_ms: u64) {
    let loaded = load(storage, number).await;
    assert_eq!((loaded.group, loaded.state, loaded.base), (group(), deleted(deleted_at_ms), None));
    assert_eq!(loaded.tail, []);
    assert_eq!(storage.read_base_chunk(&document(number)).await.unwrap(), None);
    assert_eq!(storage.read_base_index(&document(number)).await.unwrap(), None);
}

pub async fn clause_12_a_deletion_takes_the_bytes_at_once_and_the_log_keeps_the_names(database: Database) {
    let storage = database.open().await;
    let (mine, other) = (claim(&*storage, 0).await, new_origin());
    let first = vec![append(1, 0..3), append(2, 3..5), append(1, 5..6)];
    storage
        .append(&joined([own_batch(&mine, 1, &first), other_batch(other, 1, &[append(1, 6..8)])]))
        .await
        .unwrap();
    append_own(&*storage, &mine, Seq(7), &[append(2, 8..9)]).await.unwrap();
    storage.install_base(&document(1), 0, base(b"one")).await.unwrap();
    storage.install_base(&document(2), 0, base(b"two")).await.unwrap();
    storage.append(&deletion(&mine, 8, 1, 500)).await.unwrap();

    let database = database.crashed();
    let storage = database.open().await;
    assert_deleted(&*storage, 1, 500).await;
    assert_eq!(tail(&*storage, 2).await, sorted(changes([3, 4, 8])));
    assert_eq!(load(&*storage, 2).await.base.unwrap().generation, 1);
    let statistics = storage.statistics().await.unwrap();
    assert_eq!((statistics.documents, statistics.changes), (1, 3));
    let erased = |mut entries: Vec<LogEntry>| {
        entries.iter_mut().for_each(|entry| entry.erased = entry.document == document(1));
        entries
    };
    let log = whole_log(&*storage, &mine).await;
    assert_eq!(log[..7], erased(expected_log(&[first, vec![append(2, 8..9)]])));
    assert_eq!((log.len(), log[7].document.clone()), (8, document(1)));
    assert_eq!(whole_log_of(&*storage, other).await, erased(expected_log(&[vec![append(1, 6..8)]])));
    // When nothing is left to be erased, what is read is what is stored.
    erase_all(&*storage, 100).await;
    assert_eq!(whole_log(&*storage, &mine).await, log);
    assert_eq!(whole_log_of(&*storage, other).await, erased(expected_log(&[vec![append(1, 6..8)]])));
}

pub async fn clause_12_nothing_brings_a_deleted_document_back(database: Database) {
    let storage = database.open().await;
    let (mine, other) = (claim(&*storage, 0).await, new_origin());
    append_own(&*storage, &mine, Seq(1), &[append(1, 0..2)]).await.unwrap();
    storage.append(&deletion(&mine, 3, 1, 500)).await.unwrap();
    erase_all(&*storage, 100).await;

    let late = joined([
        own_batch(&mine, 4, &[append(1, 2..3), append(2, 3..4)]),
        other_batch(other, 1, &[append(1, 4..6)]),
    ]);
    storage.append(&late).await.unwrap();
    let mut unlogged = own_batch(&mine, 9, &[append(1, 6..7)]);
    unlogged.runs.clear();
    storage.append(&unlogged).await.unwrap();
    storage.create_document(&document(1), &group()).await.unwrap();
    let quarantined = DocumentState::Quarantined { reason: "poison".to_owned() };
    storage.set_state(&document(1), &quarantined).await.unwrap();
    let refused = storage.install_base(&document(1), 0, base(b"one")).await;
    assert!(matches!(refused, Err(StorageError::Conflict { expected: 0, found: 0 })));
    assert_deleted(&*storage, 1, 500).await;
    let statistics = storage.statistics().await.unwrap();
    assert_eq!((statistics.documents, statistics.changes), (1, 1));
    // Whoever has not heard of the deletion yet gets the entries as they came.
    assert_eq!(whole_log(&*storage, &mine).await[3..].iter().filter(|entry| entry.erased).count(), 0);
    assert_eq!(whole_log_of(&*storage, other).await, expected_log(&[vec![append(1, 4..6)]]));

    storage.append(&deletion(&mine, 6, 1, 700)).await.unwrap();
    assert_deleted(&*storage, 1, 500).await;
    storage.append(&deletion(&mine, 7, 1, 300)).await.unwrap();
    assert_deleted(&*storage, 1, 300).await;
    // A deletion that comes again takes along what has come since.
    for _ in 0..2 {
        assert!(whole_log_of(&*storage, other).await.iter().all(|entry| entry.erased));
        erase_all(&*storage, 100).await;
    }
}

pub async fn clause_12_changes_and_the_deletion_of_their_document_may_come_together(database: Database) {
    let storage = database.open().await;
    let (mine, other) = (claim(&*storage, 0).await, new_origin());
    let mut batch =
        joined([own_batch(&mine, 1, &[append(1, 0..2)]), other_batch(other, 1, &[append(1, 2..3)])]);
    for number in [1, 3] {
        let deleted_at_ms = 100 + u64::from(number);
        batch.deletions.push(Deletion { document: document(number), group: group(), deleted_at_ms });
    }
    for _ in 0..3 {
        storage.append(&batch).await.unwrap();
    }
    assert_deleted(&*storage, 1, 101).await;
    assert_deleted(&*storage, 3, 103).await;
    assert!(whole_log(&*storage, &mine).await.iter().all(|entry| entry.erased));
    assert!(whole_log_of(&*storage, other).await.iter().all(|entry| entry.erased));
    assert_eq!(storage.statistics().await.unwrap().changes, 0);
    append_own(&*storage, &mine, Seq(3), &[append(2, 0..1)]).await.unwrap();
}

pub async fn clause_12_changes_and_deletions_without_a_log_entry_may_be_repeated(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let mut batch = own_batch(&mine, 1, &[append(1, 0..2), append(2, 2..3)]);
    batch.runs.clear();
    batch.deletions.push(Deletion { document: document(2), group: group(), deleted_at_ms: 9 });
    for _ in 0..2 {
        storage.append(&batch).await.unwrap();
    }
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..2)));
    assert_deleted(&*storage, 2, 9).await;
    assert_eq!(claim(&*storage, 0).await.last_seq, Seq(0));
}

pub async fn clause_12_a_deletion_that_is_refused_deletes_nothing(database: Database) {
    let storage = database.open().await;
    let old = claim(&*storage, 0).await;
    append_own(&*storage, &old, Seq(1), &[append(1, 0..2)]).await.unwrap();
    let new = claim(&*storage, 0).await;
    let refused = storage.append(&deletion(&old, 3, 1, 500)).await;
    assert!(matches!(refused, Err(StorageError::Fenced { .. })), "{refused:?}");
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..2)));
    assert_eq!(whole_log(&*storage, &new).await, expected_log(&[vec![append(1, 0..2)]]));
    append_own(&*storage, &new, Seq(3), &[append(1, 2..3)]).await.unwrap();
}

/// Origins with so many runs each, every third of document 1 and the others of document 2.
struct LongLog {
    origins: Vec<OriginId>,
    runs: u64,
}

impl LongLog {
    async fn append(storage: &dyn Storage, origins: usize, runs: u64) -> Self {
        let origins: Vec<OriginId> = (0..origins).map(|_| new_origin()).collect();
        for seq in 1..=runs {
            let of_one = |(place, origin): (usize, &OriginId)| {
                let number = place as u32 * 10_000 + seq as u32;
                other_batch(*origin, seq, &[append(Self::document_of(Seq(seq)), [number])])
            };
            storage.append(&joined(origins.iter().enumerate().map(of_one))).await.unwrap();
        }
        Self { origins, runs }
    }

    fn document_of(seq: Seq) -> u8 {
        if seq.0.is_multiple_of(3) { 1 } else { 2 }
    }

    /// How many runs hold changes of document 1.
    fn runs_to_erase(&self) -> u64 {
        self.origins.len() as u64 * (self.runs / 3)
    }

    /// Checks that readers find every entry, and those of document 1, and of no other, erased.
    async fn assert_erased(&self, storage: &dyn Storage) {
        for origin in &self.origins {
            let log = whole_log_of(storage, *origin).await;
            assert_eq!(log.len() as u64, self.runs);
            for entry in log {
                assert_eq!(entry.erased, Self::document_of(entry.seq) == 1, "{entry:?}");
            }
        }
    }
}

fn runs_erased(steps: &[ErasureStep]) -> u64 {
    steps.iter().map(|step| step.runs_erased).sum()
}

pub async fn clause_18_a_long_log_is_erased_in_bounded_steps_that_go_on_after_a_crash(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let long = LongLog::append(&*storage, 50, 60).await;
    storage.append(&deletion(&mine, 1, 1, 500)).await.unwrap();
    long.assert_erased(&*storage).await;
    let mut steps = Vec::new();
    for _ in 0..10 {
        steps.push(storage.erase_step(100).await.unwrap());
    }

    let database = database.crashed();
    let storage = database.open().await;
    long.assert_erased(&*storage).await;
    steps.extend(erase_all(&*storage, 100).await);
    // 3,000 runs and the one of the deletion: each is read once, and rewritten once at most.
    assert!((31..=32).contains(&steps.len()), "{} steps", steps.len());
    assert!(steps.iter().all(|step| step.runs_erased <= 100));
    assert_eq!(runs_erased(&steps), long.runs_to_erase());
    let (last, before) = steps.split_last().unwrap();
    assert!(before.iter().all(|step| step.deletions_left == 1));
    assert_eq!(last.deletions_left, 0);
    // What is read now is what is stored.
    long.assert_erased(&*storage).await;
    assert_eq!(load(&*storage, 2).await.tail.len(), 2_000);
    assert_eq!(storage.erase_step(100).await.unwrap(), ErasureStep::default());
}

pub async fn clause_18_what_comes_before_the_end_of_a_pass_is_erased_by_it(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let long = LongLog::append(&*storage, 4, 9).await;
    storage.append(&deletion(&mine, 1, 1, 500)).await.unwrap();
    storage.erase_step(30).await.unwrap();
    // To origins that the pass has come to and to others.
    for origin in &long.origins {
        storage.append(&other_batch(*origin, 10, &[append(2, 70..71), append(1, 71..73)])).await.unwrap();
    }
    append_own(&*storage, &mine, Seq(2), &[append(1, 80..82)]).await.unwrap();
    for finished in [false, true] {
        for origin in &long.origins {
            let late = read_entries(&*storage, *origin, Seq(9), usize::MAX).await.unwrap();
            assert_eq!(late.iter().map(|entry| entry.erased).collect::<Vec<_>>(), [false, true, true]);
        }
        let late = read_entries(&*storage, mine.id, Seq(1), usize::MAX).await.unwrap();
        assert!(late.len() == 2 && late.iter().all(|entry| entry.erased));
        assert_deleted(&*storage, 1, 500).await;
        if !finished {
            erase_all(&*storage, 30).await;
        }
    }
}

pub async fn clause_18_deletions_that_come_together_are_erased_in_one_pass_and_later_ones_in_the_next(
    database: Database,
) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let all: Vec<_> = (0..40).map(|number| append(number % 4, [u32::from(number)])).collect();
    for (one, seq) in all.iter().zip(1..) {
        append_own(&*storage, &mine, Seq(seq), std::slice::from_ref(one)).await.unwrap();
    }
    storage.append(&deletion(&mine, 41, 1, 500)).await.unwrap();
    storage.append(&deletion(&mine, 42, 2, 500)).await.unwrap();
    let mut steps = vec![storage.erase_step(20).await.unwrap()];
    storage.append(&deletion(&mine, 43, 3, 500)).await.unwrap();
    steps.extend(erase_all(&*storage, 20).await);
    let left: Vec<u64> = steps.iter().map(|step| step.deletions_left).collect();
    assert_eq!(left, [2, 3, 1, 1, 1, 0]);
    // Twenty of documents 1 and 2; of document 3 what stood behind the first step, and then the rest.
    assert_eq!(runs_erased(&steps), 30);
    let log = whole_log(&*storage, &mine).await;
    assert_eq!(log.len(), 43);
    for entry in &log[..40] {
        assert_eq!(entry.erased, entry.document != document(0), "{entry:?}");
    }
}

pub async fn clause_18_a_log_may_be_truncated_while_it_is_erased(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let long = LongLog::append(&*storage, 2, 12).await;
    storage.append(&deletion(&mine, 1, 1, 500)).await.unwrap();
    storage.erase_step(5).await.unwrap();
    for origin in &long.origins {
        storage.truncate_log(*origin, Seq(8), Duration::ZERO).await.unwrap();
    }
    for finished in [false, true] {
        for origin in &long.origins {
            let left = read_entries(&*storage, *origin, Seq(8), usize::MAX).await.unwrap();
            let erased: Vec<bool> = left.iter().map(|entry| entry.erased).collect();
            assert_eq!(erased, [true, false, false, true]);
            let refused = storage.read_log(*origin, Seq(0), usize::MAX).await;
            assert!(matches!(refused, Err(StorageError::Truncated { floor: Seq(8) })), "{refused:?}");
        }
        if !finished {
            erase_all(&*storage, 5).await;
        }
    }
}

pub async fn clause_18_two_nodes_may_erase_at_once(database: Database) {
    let (one, other) = (database.open().await, database.open().await);
    let mine = claim(&*one, 0).await;
    let long = LongLog::append(&*one, 10, 30).await;
    one.append(&deletion(&mine, 1, 1, 500)).await.unwrap();
    let (of_one, of_other) = tokio::join!(erase_all(&*one, 10), erase_all(&*other, 10));
    assert_eq!(runs_erased(&of_one) + runs_erased(&of_other), long.runs_to_erase());
    long.assert_erased(&*one).await;
}

pub async fn clause_12_a_deletion_that_races_appends_leaves_nothing_behind(database: Database) {
    let (one, other) = (database.open().await, database.open().await);
    let (writer, deleter) = (claim(&*one, 0).await, claim(&*other, 1).await);
    let done = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            let mut seq = 0;
            while !done.load(Ordering::SeqCst) {
                let all: Vec<_> = (1..6).map(|number| append(number, [seq as u32])).collect();
                match append_own(&*one, &writer, Seq(seq + 1), &all).await {
                    Ok(last) => seq = last.0,
                    Err(StorageError::Transient(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            seq
        }
    });
    while other.load_document(&document(5)).await.unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    let mut seq = 1;
    for number in 1..5 {
        match other.append(&deletion(&deleter, seq, number, 500)).await {
            Ok(()) => seq += 1,
            Err(StorageError::Transient(_)) => {
                other.append(&deletion(&deleter, seq, number, 500)).await.unwrap();
                seq += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    done.store(true, Ordering::SeqCst);
    let appended = writing.await.unwrap();
    assert!(appended > 0);
    for number in 1..5 {
        assert_deleted(&*other, number, 500).await;
    }
    let statistics = other.statistics().await.unwrap();
    assert_eq!((statistics.documents, statistics.changes), (1, appended / 5));
}

pub async fn a_listing_shows_every_document_once_and_in_order(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    let all: Vec<_> = (1..8).map(|number| append(number, [u32::from(number)])).collect();
    append_own(&*storage, &mine, Seq(1), &all).await.unwrap();
    storage.create_document(&document(0), &group()).await.unwrap();
    storage.create_document(&document(2), &group()).await.unwrap();
    let quarantined = DocumentState::Quarantined { reason: "poison".to_owned() };
    storage.set_state(&document(5), &quarantined).await.unwrap();
    storage.append(&deletion(&mine, 8, 3, 500)).await.unwrap();
    storage.append(&deletion(&mine, 9, 9, 600)).await.unwrap();
    let state = |number| match number {
        3 => deleted(500),
        5 => quarantined.clone(),
        9 => deleted(600),
        _ => DocumentState::Live,
    };
    let listed = |number| ListedDocument { id: document(number), group: group(), state: state(number) };
    let expected: Vec<_> = [0, 1, 2, 3, 4, 5, 6, 7, 9].into_iter().map(listed).collect();
    for limit in [1, 2, 4, 9, 10] {
        let mut found: Vec<ListedDocument> = Vec::new();
        loop {
            let after = found.last().map(|document| document.id.clone());
            let page = storage.list_documents(after.as_ref(), limit).await.unwrap();
            assert!(page.len() <= limit as usize);
            if page.is_empty() {
                break;
            }
            found.extend(page);
        }
        assert_eq!(found, expected);
    }
    assert_eq!(storage.list_documents(None, 0).await.unwrap(), []);
    assert_eq!(load(&*storage, 2).await.tail.len(), 1);
    assert_eq!(load(&*storage, 0).await.tail, []);
    assert_eq!(storage.install_base(&document(0), 0, base(b"zero")).await.unwrap(), 1);
}
