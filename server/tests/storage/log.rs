//! Clause 8: reading and truncating the log.

use isobar::storage::StorageError;
use isobar_protocol::ids::{OriginId, Seq};

use crate::fixture::*;

pub async fn a_reader_gets_what_follows_its_cursor_up_to_its_limit(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let batches: Vec<_> = (0..10).map(|place| vec![append(1, place * 10..place * 10 + 10)]).collect();
    for (place, batch) in batches.iter().enumerate() {
        storage.append(&origin, Seq(place as u64 * 10 + 1), batch).await.unwrap();
    }
    let expected = expected_log(&batches);
    for (after, limit) in [(0, 1), (0, 10), (0, 1_000), (5, 3), (5, 5), (5, 6), (9, 2), (10, 10), (95, 50)] {
        let entries = storage.read_log(origin.id, Seq(after as u64), limit).await.unwrap();
        let end = expected.len().min(after + limit as usize);
        assert_eq!(entries, expected[after..end], "after {after}, limit {limit}");
    }
    for (after, limit) in [(0, 0), (100, 10), (101, 10), (u64::MAX, u32::MAX)] {
        assert_eq!(storage.read_log(origin.id, Seq(after), limit).await.unwrap(), []);
    }
    let unknown = OriginId(uuid::Uuid::new_v4());
    assert_eq!(storage.read_log(unknown, Seq(0), 10).await.unwrap(), []);
}

pub async fn clause_8_truncation_removes_a_prefix_and_keeps_the_counter(database: Database) {
    let storage = database.open().await;
    let (origin, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    for place in 0..5_u32 {
        let batch = [append(1, place * 4..place * 4 + 4)];
        storage.append(&origin, Seq(u64::from(place) * 4 + 1), &batch).await.unwrap();
        storage.append(&other, Seq(u64::from(place) * 4 + 1), &batch).await.unwrap();
    }
    let whole = whole_log(&*storage, &origin).await;

    storage.truncate_log(origin.id, Seq(8)).await.unwrap();
    for after in [0, 3, 7] {
        let refused = storage.read_log(origin.id, Seq(after), 10).await;
        assert!(
            matches!(refused, Err(StorageError::Truncated { floor: Seq(8) })),
            "after {after}: {refused:?}"
        );
    }
    assert_eq!(storage.read_log(origin.id, Seq(8), 100).await.unwrap(), whole[8..]);
    // In the middle of a run: what follows stays, and what was asked to go may stay a while.
    storage.truncate_log(origin.id, Seq(14)).await.unwrap();
    assert_eq!(storage.read_log(origin.id, Seq(14), 100).await.unwrap(), whole[14..]);
    assert!(matches!(storage.read_log(origin.id, Seq(8), 1).await, Err(StorageError::Truncated { .. })));

    storage.truncate_log(origin.id, Seq(u64::MAX)).await.unwrap();
    assert_eq!(storage.read_log(origin.id, Seq(20), 10).await.unwrap(), []);
    assert!(matches!(storage.read_log(origin.id, Seq(15), 1).await, Err(StorageError::Truncated { .. })));
    assert_eq!(claim(&*storage, 0).await.last_seq, Seq(20));
    assert_eq!(whole_log(&*storage, &other).await, whole);
    assert_eq!(load(&*storage, 1).await.tail.len(), 20);
}

pub async fn clause_8_a_repeated_append_is_recognised_after_truncation(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    storage.append(&origin, Seq(1), &[append(1, 0..4)]).await.unwrap();
    storage.append(&origin, Seq(5), &[append(1, 4..6)]).await.unwrap();
    storage.truncate_log(origin.id, Seq(6)).await.unwrap();
    assert_eq!(storage.append(&origin, Seq(5), &[append(1, 4..6)]).await.unwrap(), Seq(6));
    assert_eq!(storage.append(&origin, Seq(7), &[append(1, 6..7)]).await.unwrap(), Seq(7));
    assert_eq!(storage.read_log(origin.id, Seq(6), 10).await.unwrap().len(), 1);
}
