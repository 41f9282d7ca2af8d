//! Clauses 8 and 13: reading, truncating and passing over the log.

use std::time::Duration;

use isobar::storage::{Acknowledgement, Member, StorageError, StoredOrigin};
use isobar_protocol::ids::{RegionName, Seq};
use isobar_protocol::link::MissingDocument;

use crate::fixture::*;

pub async fn a_reader_gets_what_follows_its_cursor_up_to_its_limit(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    let batches: Vec<_> = (0..10).map(|place| vec![append(1, place * 10..place * 10 + 10)]).collect();
    for (place, batch) in batches.iter().enumerate() {
        append_own(&*storage, &origin, Seq(place as u64 * 10 + 1), batch).await.unwrap();
    }
    let expected = expected_log(&batches);
    let run_bytes = own_batch(&origin, 1, &batches[0]).runs[0].body.len();
    // A run is added as long as the bytes before it are fewer than asked for.
    for (after, bytes_max, end) in [
        (0, 0, 10),
        (0, 1, 10),
        (0, run_bytes, 10),
        (0, run_bytes + 10, 20),
        (5, 1, 10),
        (9, run_bytes * 2 + 11, 30),
        (10, 1, 20),
        (95, 1 << 20, 100),
        (0, usize::MAX, 100),
    ] {
        let entries = read_entries(&*storage, origin.id, Seq(after as u64), bytes_max).await.unwrap();
        assert_eq!(entries, expected[after..end], "after {after}, {bytes_max} bytes");
    }
    for (after, bytes_max) in [(100, 10), (101, 10), (u64::MAX, usize::MAX)] {
        assert_eq!(storage.read_log(origin.id, Seq(after), bytes_max).await.unwrap(), []);
    }
    assert_eq!(storage.read_log(new_origin(), Seq(0), 10).await.unwrap(), []);
}

pub async fn clause_8_truncation_removes_a_prefix_and_keeps_the_counter(database: Database) {
    let storage = database.open().await;
    let (origin, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    for place in 0..5_u32 {
        let batch = [append(1, place * 4..place * 4 + 4)];
        append_own(&*storage, &origin, Seq(u64::from(place) * 4 + 1), &batch).await.unwrap();
        append_own(&*storage, &other, Seq(u64::from(place) * 4 + 1), &batch).await.unwrap();
    }
    let whole = whole_log(&*storage, &origin).await;

    storage.truncate_log(origin.id, Seq(8), Duration::ZERO).await.unwrap();
    for after in [0, 3, 7] {
        let refused = storage.read_log(origin.id, Seq(after), 10).await;
        assert!(
            matches!(refused, Err(StorageError::Truncated { floor: Seq(8) })),
            "after {after}: {refused:?}"
        );
    }
    assert_eq!(read_entries(&*storage, origin.id, Seq(8), 1 << 20).await.unwrap(), whole[8..]);
    // In the middle of a run: what follows stays, and what was asked to go may stay a while.
    storage.truncate_log(origin.id, Seq(14), Duration::ZERO).await.unwrap();
    assert_eq!(read_entries(&*storage, origin.id, Seq(14), 1 << 20).await.unwrap(), whole[14..]);
    assert!(matches!(storage.read_log(origin.id, Seq(8), 1).await, Err(StorageError::Truncated { .. })));

    storage.truncate_log(origin.id, Seq(u64::MAX), Duration::ZERO).await.unwrap();
    assert_eq!(storage.read_log(origin.id, Seq(20), 10).await.unwrap(), []);
    assert!(matches!(storage.read_log(origin.id, Seq(15), 1).await, Err(StorageError::Truncated { .. })));
    assert_eq!(claim(&*storage, 0).await.last_seq, Seq(20));
    assert_eq!(whole_log(&*storage, &other).await, whole);
    assert_eq!(load(&*storage, 1).await.tail.len(), 20);
}

pub async fn clause_8_a_repeated_append_is_recognised_after_truncation(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..4)]).await.unwrap();
    append_own(&*storage, &origin, Seq(5), &[append(1, 4..6)]).await.unwrap();
    storage.truncate_log(origin.id, Seq(6), Duration::ZERO).await.unwrap();
    assert_eq!(append_own(&*storage, &origin, Seq(5), &[append(1, 4..6)]).await.unwrap(), Seq(6));
    assert_eq!(append_own(&*storage, &origin, Seq(7), &[append(1, 6..7)]).await.unwrap(), Seq(7));
    assert_eq!(storage.read_log(origin.id, Seq(6), 10).await.unwrap().len(), 1);
}

pub async fn clause_8_truncation_spares_what_is_young(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    for seq in 1..4 {
        append_own(&*storage, &origin, Seq(seq), &[append(1, [seq as u32])]).await.unwrap();
    }
    storage.truncate_log(origin.id, Seq(2), Duration::from_secs(3_600)).await.unwrap();
    assert_eq!(whole_log(&*storage, &origin).await.len(), 3);
    storage.truncate_log(origin.id, Seq(2), Duration::MAX).await.unwrap();
    assert_eq!(whole_log(&*storage, &origin).await.len(), 3);
    storage.truncate_log(origin.id, Seq(2), Duration::ZERO).await.unwrap();
    let refused = storage.read_log(origin.id, Seq(0), 1).await;
    assert!(matches!(refused, Err(StorageError::Truncated { floor: Seq(2) })), "{refused:?}");
}

pub async fn clause_13_adopted_origins_go_forward_and_leave_their_logs_truncated(database: Database) {
    let storage = database.open().await;
    let (known, unknown) = (new_origin(), new_origin());
    storage.append(&other_batch(known, 1, &[append(1, 0..4)])).await.unwrap();
    let adopted = |id, seq| StoredOrigin {
        id,
        region: elsewhere(),
        group: group(),
        seq: Seq(seq),
        chain: chain(seq),
        claimed: false,
    };
    storage.adopt_origins(&[adopted(known, 10), adopted(unknown, 7)], &[]).await.unwrap();
    storage.adopt_origins(&[adopted(unknown, 6), adopted(known, 10)], &[]).await.unwrap();
    let mut expected = vec![adopted(known, 10), adopted(unknown, 7)];
    expected.sort_by_key(|origin| origin.id);
    assert_eq!(storage.origins().await.unwrap(), expected);
    for (id, seq) in [(known, 10), (unknown, 7)] {
        for after in [0, 3, seq - 1] {
            let refused = storage.read_log(id, Seq(after), 1).await;
            assert!(
                matches!(refused, Err(StorageError::Truncated { floor }) if floor == Seq(seq)),
                "after {after}: {refused:?}"
            );
        }
        assert_eq!(storage.read_log(id, Seq(seq), 1).await.unwrap(), []);
    }
    storage.append(&other_batch(known, 11, &[append(1, 11..12)])).await.unwrap();
    assert_eq!(read_entries(&*storage, known, Seq(10), 1).await.unwrap().len(), 1);
    assert!(matches!(
        storage.read_log(known, Seq(9), 1).await,
        Err(StorageError::Truncated { floor: Seq(10) })
    ));
    assert_eq!(tail(&*storage, 1).await, sorted(changes((0..4).chain([11]))));
}

pub async fn acknowledgements_go_forward_only(database: Database) {
    let storage = database.open().await;
    let origins = {
        let mut origins = [new_origin(), new_origin()];
        origins.sort();
        origins
    };
    let acknowledged = |region: RegionName, origin, seq| Acknowledgement { region, origin, seq: Seq(seq) };
    assert_eq!(storage.acknowledgements().await.unwrap(), []);
    let news = [
        acknowledged(elsewhere(), origins[1], 5),
        acknowledged(elsewhere(), origins[0], 3),
        acknowledged(region(), origins[0], 9),
        acknowledged(elsewhere(), origins[1], 4),
    ];
    storage.note_acknowledgements(&news).await.unwrap();
    storage.note_acknowledgements(&[acknowledged(region(), origins[0], 8)]).await.unwrap();
    storage.note_acknowledgements(&[acknowledged(elsewhere(), origins[0], 4)]).await.unwrap();
    storage.note_acknowledgements(&[]).await.unwrap();
    let expected = [
        acknowledged(region(), origins[0], 9),
        acknowledged(elsewhere(), origins[0], 4),
        acknowledged(elsewhere(), origins[1], 5),
    ];
    let database = database.crashed();
    assert_eq!(database.open().await.acknowledgements().await.unwrap(), expected);
}

pub async fn clause_13_what_a_snapshot_lacked_is_noted_until_it_is_found(database: Database) {
    let storage = database.open().await;
    assert_eq!(storage.missing_documents().await.unwrap(), []);
    let missing = |number| MissingDocument { document: document(number), group: group() };
    let adopted = StoredOrigin {
        id: new_origin(),
        region: elsewhere(),
        group: group(),
        seq: Seq(7),
        chain: chain(7),
        claimed: false,
    };
    storage.adopt_origins(&[adopted], &[missing(2), missing(1)]).await.unwrap();
    // Also if the counters are there already.
    storage.adopt_origins(&[], &[missing(3), missing(2)]).await.unwrap();
    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(storage.missing_documents().await.unwrap(), [missing(1), missing(2), missing(3)]);
    storage.document_found(&document(2)).await.unwrap();
    storage.document_found(&document(9)).await.unwrap();
    assert_eq!(storage.missing_documents().await.unwrap(), [missing(1), missing(3)]);
}

pub async fn clause_16_members_are_remembered_until_they_are_forgotten(database: Database) {
    let storage = database.open().await;
    assert_eq!(storage.members().await.unwrap(), []);
    let member =
        |region: RegionName, linked_at_ms, needs_snapshot| Member { region, linked_at_ms, needs_snapshot };
    storage.note_member(&member(elsewhere(), 50, false)).await.unwrap();
    storage.note_member(&member(region(), 60, true)).await.unwrap();
    storage.note_member(&member(region(), 70, false)).await.unwrap();
    // The moment does not go back; what a region needs is as was said last.
    storage.note_member(&member(elsewhere(), 40, true)).await.unwrap();
    let acknowledged = Acknowledgement { region: elsewhere(), origin: new_origin(), seq: Seq(4) };
    storage.note_acknowledgements(&[acknowledged]).await.unwrap();
    let mut expected = [member(elsewhere(), 50, true), member(region(), 70, false)];
    expected.sort_by(|one, other| one.region.cmp(&other.region));
    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(storage.members().await.unwrap(), expected);

    assert!(storage.forget_member(&elsewhere()).await.unwrap());
    assert!(!storage.forget_member(&elsewhere()).await.unwrap());
    assert_eq!(storage.members().await.unwrap(), [member(region(), 70, false)]);
    assert_eq!(storage.acknowledgements().await.unwrap(), []);
}
