//! Clauses 2, 4 and 5, where a batch has several runs and origins come and go.

use std::sync::Arc;

use isobar::storage::{Batch, Storage, StorageError, Writer};
use isobar_protocol::ids::{Incarnation, OriginId, Seq};

use crate::fixture::*;

pub async fn clause_2_a_batch_may_hold_runs_of_several_origins(database: Database) {
    let storage = database.open().await;
    let (one, two) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    let others = [new_origin(), new_origin()];
    let batches = [
        own_batch(&one, 1, &[append(1, 0..3), append(2, 3..4)]),
        own_batch(&two, 1, &[append(3, 4..5)]),
        other_batch(others[0], 1, &[append(1, 2..6)]),
        other_batch(others[1], 1, &[append(4, 7..8)]),
    ];
    storage.append(&joined(batches.clone())).await.unwrap();
    let next = other_batch(others[0], 5, &[append(1, 6..7)]);
    storage.append(&next).await.unwrap();

    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(
        tail(&*storage, 1).await,
        sorted(changes(0..7).into_iter().filter(|c| c.hash != hash(3)).chain([change(3)]).collect())
    );
    assert_eq!(tail(&*storage, 4).await, changes(7..8));
    assert_eq!(load(&*storage, 4).await.group, group());
    assert_eq!(whole_log(&*storage, &one).await.len(), 4);
    assert_eq!(whole_log_of(&*storage, others[0]).await, expected_log(&[vec![append(1, 2..7)]]));
    let stored = storage.origins().await.unwrap();
    assert_eq!(stored.len(), 4);
    for (batch, region) in batches[..2]
        .iter()
        .map(|batch| (batch, region()))
        .chain([(&next, elsewhere()), (&batches[3], elsewhere())])
    {
        let run = &batch.runs[0];
        let found = stored.iter().find(|origin| origin.id == run.origin).unwrap();
        assert_eq!(
            (&found.region, &found.group, found.seq, found.chain),
            (&region, &group(), run.last, run.chain)
        );
    }
    assert_eq!(claim(&*storage, 0).await.chain, batches[0].runs[0].chain);
}

pub async fn clause_4_an_origin_that_was_replaced_is_fenced_for_ever(database: Database) {
    let storage = database.open().await;
    let claim_anew = async || storage.claim_origin(&region(), &group(), 0, true).await.unwrap();
    let first = claim_anew().await;
    // Also if it has not been written to: a copy of the database may be.
    let second = claim_anew().await;
    assert_ne!(second.id, first.id);
    assert_eq!((second.incarnation, second.last_seq), (Incarnation(1), Seq(0)));
    append_own(&*storage, &second, Seq(1), &[append(1, 0..2)]).await.unwrap();

    let mut origins = vec![first, second.clone()];
    for _ in 0..2 {
        let new = claim_anew().await;
        assert!(origins.iter().all(|old| old.id != new.id));
        assert_eq!((new.incarnation, new.last_seq, new.chain), (Incarnation(1), Seq(0), chain(0)));
        for old in &origins {
            for first in [1, 2, 3] {
                let refused = append_own(&*storage, old, Seq(first), &[append(2, 7..9)]).await;
                assert!(
                    matches!(refused, Err(StorageError::Fenced { origin, .. }) if origin == old.id),
                    "{refused:?}"
                );
            }
        }
        append_own(&*storage, &new, Seq(1), &[append(1, 2..3)]).await.unwrap();
        origins.push(new);
    }
    assert!(storage.load_document(&document(2)).await.unwrap().is_none());
    assert_eq!(whole_log(&*storage, &second).await, expected_log(&[vec![append(1, 0..2)]]));
    let kept = storage.claim_origin(&region(), &group(), 0, false).await.unwrap();
    assert_eq!((kept.id, kept.incarnation, kept.last_seq), (origins[3].id, Incarnation(2), Seq(1)));
    assert_eq!(storage.origins().await.unwrap().len(), 4);
}

pub async fn clause_4_entries_of_an_own_origin_that_come_back_fence_whoever_held_it(database: Database) {
    let storage = database.open().await;
    let mine = claim(&*storage, 0).await;
    append_own(&*storage, &mine, Seq(1), &[append(1, 0..2)]).await.unwrap();
    let back = batch(mine.id, Writer::Other { region: region() }, Seq(3), &[append(1, 2..3)]);
    storage.append(&back).await.unwrap();
    for first in [3, 4] {
        let refused = append_own(&*storage, &mine, Seq(first), &[append(1, 8..9)]).await;
        assert!(matches!(refused, Err(StorageError::Fenced { .. })), "{refused:?}");
    }
    assert_eq!(whole_log(&*storage, &mine).await, expected_log(&[vec![append(1, 0..3)]]));
    let new = claim(&*storage, 0).await;
    assert_ne!(new.id, mine.id);

    append_own(&*storage, &new, Seq(1), &[append(1, 3..4)]).await.unwrap();
    let mut adopted =
        storage.origins().await.unwrap().into_iter().find(|origin| origin.id == new.id).unwrap();
    adopted.seq = Seq(5);
    storage.adopt_origins(&[adopted], &[]).await.unwrap();
    let refused = append_own(&*storage, &new, Seq(2), &[append(1, 8..9)]).await;
    assert!(matches!(refused, Err(StorageError::Fenced { .. })), "{refused:?}");
}

pub async fn clause_4_a_fenced_run_leaves_nothing_of_its_batch(database: Database) {
    let storage = database.open().await;
    let old = claim(&*storage, 0).await;
    let (new, beside, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await, new_origin());
    let refused = storage
        .append(&joined([
            other_batch(other, 1, &[append(1, 0..1)]),
            own_batch(&beside, 1, &[append(2, 1..2)]),
            own_batch(&old, 1, &[append(3, 2..3)]),
        ]))
        .await;
    assert!(matches!(refused, Err(StorageError::Fenced { origin, .. }) if origin == old.id), "{refused:?}");
    assert_nothing_stored(&*storage, &[new.id, beside.id]).await;
}

/// No document is there, and of origins only these, which are empty.
async fn assert_nothing_stored(storage: &dyn Storage, origins: &[OriginId]) {
    assert_eq!(storage.list_documents(None, 10).await.unwrap(), []);
    let mut found: Vec<OriginId> = storage.origins().await.unwrap().iter().map(|origin| origin.id).collect();
    let mut expected = origins.to_vec();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    for &origin in origins {
        assert_eq!(whole_log_of(storage, origin).await, []);
    }
}

pub async fn clause_5_entries_that_another_node_stored_first_are_out_of_step(database: Database) {
    let storage = database.open().await;
    let (mine, known, unknown) = (claim(&*storage, 0).await, new_origin(), new_origin());
    let refused = storage
        .append(&joined([
            own_batch(&mine, 1, &[append(1, 0..1)]),
            other_batch(unknown, 3, &[append(2, 1..2)]),
        ]))
        .await;
    assert!(
        matches!(refused, Err(StorageError::OutOfStep { origin, seq: Seq(0) }) if origin == unknown),
        "{refused:?}"
    );
    assert_nothing_stored(&*storage, &[mine.id]).await;

    storage.append(&other_batch(known, 1, &[append(3, 0..4)])).await.unwrap();
    // Behind, ahead, and the same seqs cut otherwise.
    for (first, count) in [(1, 2), (3, 2), (4, 5), (6, 1), (9, 1)] {
        let refused = storage
            .append(&joined([
                own_batch(&mine, 1, &[append(1, 0..1)]),
                other_batch(known, first, &[append(3, 10..10 + count)]),
                other_batch(unknown, 1, &[append(2, 1..2)]),
            ]))
            .await;
        assert!(
            matches!(refused, Err(StorageError::OutOfStep { origin, seq: Seq(4) }) if origin == known),
            "{refused:?}"
        );
    }
    assert_eq!(storage.origins().await.unwrap().len(), 2);
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    assert_eq!(whole_log(&*storage, &mine).await, []);
    assert_eq!(whole_log_of(&*storage, known).await, expected_log(&[vec![append(3, 0..4)]]));
    storage.append(&other_batch(known, 5, &[append(3, 4..5)])).await.unwrap();
}

pub async fn clause_5_a_repeated_batch_of_several_runs_is_recognised(database: Database) {
    let storage = database.open().await;
    let (mine, other) = (claim(&*storage, 0).await, new_origin());
    let batch = joined([own_batch(&mine, 1, &[append(1, 0..2)]), other_batch(other, 1, &[append(1, 2..4)])]);
    for _ in 0..3 {
        storage.append(&batch).await.unwrap();
    }
    // Another node goes on with the other region's log.
    storage.append(&other_batch(other, 3, &[append(1, 4..5)])).await.unwrap();
    storage.append(&batch).await.unwrap();
    assert_eq!(whole_log(&*storage, &mine).await.len(), 2);
    assert_eq!(whole_log_of(&*storage, other).await.len(), 3);
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..5)));
}

pub async fn clause_5_the_same_run_from_another_node_does_not_stand_for_the_rest_of_a_batch(
    database: Database,
) {
    let storage = database.open().await;
    let other = new_origin();
    storage.append(&other_batch(other, 1, &[append(1, 0..2)])).await.unwrap();
    // The same entries, and beside them the contents of a document that no log here names.
    let contents = Batch { runs: Vec::new(), ..other_batch(new_origin(), 1, &[append(2, 0..3)]) };
    let refused = storage.append(&joined([other_batch(other, 1, &[append(1, 0..2)]), contents])).await;
    assert!(
        matches!(refused, Err(StorageError::OutOfStep { origin, seq: Seq(2) }) if origin == other),
        "{refused:?}"
    );
    assert!(storage.load_document(&document(2)).await.unwrap().is_none());
}

pub async fn clause_4_an_origin_is_claimed_until_it_is_replaced_or_comes_from_elsewhere(database: Database) {
    let storage = database.open().await;
    let claimed = async |id: OriginId| {
        let origins = storage.origins().await.unwrap();
        origins.iter().find(|it| it.id == id).unwrap().claimed
    };
    let (replaced, returned) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    let other = new_origin();
    storage.append(&other_batch(other, 1, &[append(1, 0..1)])).await.unwrap();
    assert!(claimed(replaced.id).await && claimed(returned.id).await && !claimed(other).await);
    let new = storage.claim_origin(&region(), &group(), 0, true).await.unwrap();
    storage.append(&other_batch(returned.id, 1, &[append(1, 1..2)])).await.unwrap();
    assert!(claimed(new.id).await && !claimed(replaced.id).await && !claimed(returned.id).await);
}

/// Stores 60 entries of each origin, in whatever steps another writer leaves, with one own change each time.
async fn store_others(storage: Arc<dyn Storage>, slot: u32, mut others: Vec<OriginId>) {
    let mine = claim(&*storage, slot).await;
    if slot > 0 {
        others.reverse();
    }
    let mut seqs = vec![0; others.len()];
    let mut own_seq = 0;
    while seqs.iter().any(|seq| *seq < 60) {
        let runs = others.iter().zip(&seqs).filter(|(_, seq)| **seq < 60);
        let others_batches =
            runs.map(|(origin, seq)| other_batch(*origin, seq + 1, &[append(1, [*seq as u32])]));
        let own = own_batch(&mine, own_seq + 1, &[append(2, [slot * 1_000 + own_seq as u32])]);
        match storage.append(&joined(others_batches.chain([own]))).await {
            Ok(()) => {
                own_seq += 1;
                seqs.iter_mut().for_each(|seq| *seq = (*seq + 1).min(60));
            }
            Err(StorageError::OutOfStep { origin, seq }) => {
                let place = others.iter().position(|other| *other == origin).unwrap();
                assert!(seq.0 > seqs[place], "told to go back");
                seqs[place] = seq.0;
            }
            Err(StorageError::Transient(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

pub async fn clause_5_two_nodes_that_store_the_same_logs_leave_no_hole_and_no_duplicate(database: Database) {
    let others = vec![new_origin(), new_origin(), new_origin()];
    let (one, two) = (database.open().await, database.open().await);
    let running =
        [(one, 0), (two, 1)].map(|(storage, slot)| tokio::spawn(store_others(storage, slot, others.clone())));
    for node in running {
        node.await.unwrap();
    }
    let storage = database.open().await;
    for other in others {
        assert_eq!(whole_log_of(&*storage, other).await, expected_log(&[vec![append(1, 0..60)]]));
    }
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..60)));
}
