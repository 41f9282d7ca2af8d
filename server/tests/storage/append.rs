//! Clauses 1 to 5: appending.

use std::sync::Arc;

use bytes::Bytes;
use isobar::storage::{Batch, ClaimedOrigin, Storage, StorageError, StoredChange};
use isobar_protocol::ids::{DocumentId, Incarnation, Seq};

use crate::fixture::*;

pub async fn clause_1_an_appended_batch_is_there_after_a_crash(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let batch = vec![append(1, 0..3), append(2, 3..5)];
    assert_eq!(append_own(&*storage, &origin, Seq(1), &batch).await.unwrap(), Seq(5));

    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..3)));
    assert_eq!(tail(&*storage, 2).await, sorted(changes(3..5)));
    assert_eq!(whole_log(&*storage, &origin).await, expected_log(&[batch]));
    assert_eq!(claim(&*storage, 0).await.last_seq, Seq(5));
}

pub async fn clause_1_large_batches_and_large_changes_are_kept_whole(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let many = vec![append(1, 0..9_000), append(2, 9_000..10_000)];
    assert_eq!(append_own(&*storage, &origin, Seq(1), &many).await.unwrap(), Seq(10_000));
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..9_000)));
    assert_eq!(tail(&*storage, 2).await.len(), 1_000);

    let large = |number: u32| StoredChange {
        hash: hash(number),
        bytes: (0..16 << 20).map(|place: u32| (place ^ number) as u8).collect(),
    };
    let large: Vec<StoredChange> = (20_000..20_003).map(large).collect();
    let batch = vec![Arriving { document: document(3), changes: large.clone() }];
    assert_eq!(append_own(&*storage, &origin, Seq(10_001), &batch).await.unwrap(), Seq(10_003));
    // Not `assert_eq`: it would print them.
    assert!(tail(&*storage, 3).await == sorted(large));
    let run = &storage.read_log(origin.id, Seq(10_000), 10).await.unwrap()[0];
    assert_eq!((run.first, run.last), (Seq(10_001), Seq(10_003)));
    assert!(run.body.len() > 48 << 20);
    // The batch was too large for one statement, and is still recognised as one.
    assert_eq!(append_own(&*storage, &origin, Seq(10_001), &batch).await.unwrap(), Seq(10_003));
}

pub async fn clause_1_empty_bytes_and_long_ids_are_kept(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let document = DocumentId::from_slice(&[0xff; 64]).unwrap();
    let empty = StoredChange { hash: hash(1), bytes: Bytes::new() };
    let batch = [Arriving { document: document.clone(), changes: vec![empty.clone()] }];
    append_own(&*storage, &origin, Seq(1), &batch).await.unwrap();
    assert_eq!(storage.load_document(&document).await.unwrap().unwrap().tail, [empty]);
    assert_eq!(
        storage.read_log(origin.id, Seq(0), 1).await.unwrap()[0].body,
        own_batch(&origin, 1, &batch).runs[0].body
    );
    storage.append(&Batch::default()).await.unwrap();
    assert_eq!(claim(&*storage, 0).await.last_seq, Seq(1));
}

/// Batches of one to five changes over three documents; `numbers` of different origins overlap by half.
fn batches(first_number: u32) -> Vec<Vec<Arriving>> {
    let mut next = first_number;
    let mut take = |count| {
        next += count;
        next - count..next
    };
    (0..40_u8)
        .map(|place| {
            vec![append(place % 3, take(1)), append((place + 1) % 3, take(u32::from(place % 4) + 1))]
        })
        .collect()
}

async fn append_all(storage: Arc<dyn Storage>, origin: ClaimedOrigin, batches: Vec<Vec<Arriving>>) {
    let mut last = origin.last_seq;
    for batch in &batches {
        let next = Seq(last.0 + 1);
        // Two writers that bring the same change may meet in a way that the database resolves by a retry.
        last = loop {
            match append_own(&*storage, &origin, next, batch).await {
                Err(StorageError::Transient(_)) => {}
                outcome => break outcome.unwrap(),
            }
        };
    }
}

pub async fn clause_2_origins_that_append_at_once_have_dense_logs_at_every_moment(database: Database) {
    let writers = [(database.open().await, batches(0)), (database.open().await, batches(70))];
    let reader = database.open().await;
    let mut running = Vec::new();
    let mut origins = Vec::new();
    for (slot, (storage, batches)) in writers.iter().enumerate() {
        let origin = claim(&**storage, slot as u32).await;
        origins.push(origin.clone());
        running.push(tokio::spawn(append_all(Arc::clone(storage), origin, batches.clone())));
    }
    let mut lengths = [0; 2];
    while !running.iter().all(|writer| writer.is_finished()) {
        for (length, origin) in lengths.iter_mut().zip(&origins) {
            let seen = whole_log(&*reader, origin).await.len();
            assert!(seen >= *length, "a log that was read became shorter");
            *length = seen;
        }
    }
    for writer in running {
        writer.await.unwrap();
    }
    let mut held = 0;
    for (origin, (_, batches)) in origins.iter().zip(&writers) {
        assert_eq!(whole_log(&*reader, origin).await, expected_log(batches));
    }
    for number in 0..3 {
        held += load(&*reader, number).await.tail.len();
    }
    let mut all: Vec<_> =
        writers.iter().flat_map(|(_, batches)| expected_log(batches)).map(|e| (e.document, e.hash)).collect();
    all.sort();
    all.dedup();
    assert_eq!(held, all.len());
}

pub async fn clause_2_a_writer_that_miscounts_is_stopped(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap();
    for first in [Seq(1), Seq(2), Seq(4)] {
        let (storage, origin) = (Arc::clone(&storage), origin.clone());
        let miscounted =
            tokio::spawn(async move { append_own(&*storage, &origin, first, &[append(1, 7..8)]).await });
        assert!(miscounted.await.unwrap_err().is_panic(), "an append at {first:?} went through");
    }
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..2)));
    assert_eq!(append_own(&*storage, &origin, Seq(3), &[append(1, 7..8)]).await.unwrap(), Seq(3));
}

pub async fn clause_3_a_change_that_is_held_keeps_its_bytes(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, [5])]).await.unwrap();
    let forged = StoredChange { hash: hash(5), bytes: change(7).bytes };
    let twice = change(6);
    let again = StoredChange { hash: hash(6), bytes: change(8).bytes };
    let batch = [
        Arriving { document: document(1), changes: vec![forged, twice.clone()] },
        Arriving { document: document(1), changes: vec![again] },
    ];
    assert_eq!(append_own(&*storage, &origin, Seq(2), &batch).await.unwrap(), Seq(4));
    assert_eq!(tail(&*storage, 1).await, sorted(vec![change(5), twice]));
    let log: Vec<_> = whole_log(&*storage, &origin).await.into_iter().map(|entry| entry.hash).collect();
    // The log has the bytes as they came.
    assert_eq!(log, [hash(5), hash(7), hash(6), hash(8)]);
}

pub async fn clause_3_two_origins_may_bring_the_same_change(database: Database) {
    let storage = database.open().await;
    let (one, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    append_own(&*storage, &one, Seq(1), &[append(1, 0..2)]).await.unwrap();
    append_own(&*storage, &other, Seq(1), &[append(1, 1..3)]).await.unwrap();
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..3)));
    assert_eq!(whole_log(&*storage, &one).await, expected_log(&[vec![append(1, 0..2)]]));
    assert_eq!(whole_log(&*storage, &other).await, expected_log(&[vec![append(1, 1..3)]]));
}

pub async fn clause_4_an_older_incarnation_is_fenced_and_stores_nothing(database: Database) {
    let (old_node, new_node) = (database.open().await, database.open().await);
    let old = claim(&*old_node, 0).await;
    append_own(&*old_node, &old, Seq(1), &[append(1, 0..1)]).await.unwrap();
    let new = claim(&*new_node, 0).await;

    let refused = append_own(&*old_node, &old, Seq(2), &[append(2, 1..2)]).await;
    assert!(
        matches!(refused, Err(StorageError::Fenced { origin, ours }) if origin == old.id && ours == old.incarnation)
    );
    assert!(new_node.load_document(&document(2)).await.unwrap().is_none());
    append_own(&*new_node, &new, Seq(2), &[append(1, 2..3)]).await.unwrap();
    let refused = append_own(&*old_node, &old, Seq(2), &[append(1, 3..4)]).await;
    assert!(matches!(refused, Err(StorageError::Fenced { .. })));
    assert_eq!(tail(&*new_node, 1).await, sorted(changes([0, 2])));
    assert_eq!(whole_log(&*new_node, &new).await.len(), 2);
}

pub async fn clause_4_claims_count_incarnations_and_find_the_counter(database: Database) {
    let storage = database.open().await;
    let first = claim(&*storage, 0).await;
    assert_eq!((first.incarnation, first.last_seq), (Incarnation(1), Seq(0)));
    append_own(&*storage, &first, Seq(1), &[append(1, 0..3)]).await.unwrap();
    let second = claim(&*database.open().await, 0).await;
    assert_eq!((second.id, second.incarnation, second.last_seq), (first.id, Incarnation(2), Seq(3)));
    let other = claim(&*storage, 1).await;
    assert_ne!(other.id, first.id);
    assert_eq!((other.incarnation, other.last_seq), (Incarnation(1), Seq(0)));
}

pub async fn clause_5_a_repeated_append_is_answered_as_the_success_it_was(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap();
    let batch = [append(1, 2..4), append(2, 4..5)];
    for _ in 0..3 {
        assert_eq!(append_own(&*storage, &origin, Seq(3), &batch).await.unwrap(), Seq(5));
    }
    assert_eq!(whole_log(&*storage, &origin).await.len(), 5);
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..4)));
    assert_eq!(append_own(&*storage, &origin, Seq(6), &[append(1, 5..6)]).await.unwrap(), Seq(6));
}

pub async fn clause_5_a_batch_that_committed_before_a_claim_is_not_denied(database: Database) {
    let storage = database.open().await;
    let old = claim(&*storage, 0).await;
    let batch = [append(1, 0..2)];
    append_own(&*storage, &old, Seq(1), &batch).await.unwrap();
    let new = claim(&*storage, 0).await;
    append_own(&*storage, &new, Seq(3), &[append(1, 2..3)]).await.unwrap();
    // "Fenced" would say that nothing was stored.
    assert_eq!(append_own(&*storage, &old, Seq(1), &batch).await.unwrap(), Seq(2));
    assert!(matches!(
        append_own(&*storage, &old, Seq(1), &[append(1, [0, 9])]).await,
        Err(StorageError::Fenced { .. })
    ));
    assert_eq!(whole_log(&*storage, &new).await.len(), 3);
}
