//! Seats on one Postgres database (clause 14).

use std::time::Duration;

use bytes::Bytes;
use isobar::storage::Storage;
use isobar::storage::postgres::PostgresStorage;
use isobar::storage::seat::{Seat, SeatEvent};
use isobar_testkit::shared;

use crate::fixture::PostgresDatabase;

async fn seat(database: &PostgresDatabase) -> Seat {
    PostgresStorage::connect(&database.url).await.unwrap().take_seat().await.unwrap()
}

/// Waits for an event, and returns those before it.
async fn until(seat: &mut Seat, wanted: &SeatEvent) -> Vec<SeatEvent> {
    let mut before = Vec::new();
    let waiting = async {
        loop {
            let event = seat.events.recv().await.expect("the seat goes on");
            if event == *wanted {
                return;
            }
            before.push(event);
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    assert!(done.is_ok(), "no {wanted:?}, only {before:?}");
    before
}

#[tokio::test]
async fn clause_14_seats_differ_and_a_dropped_one_and_its_links_go_to_others() {
    let database = PostgresDatabase::create(shared().unwrap()).await;
    let mut first = seat(&database).await;
    until(&mut first, &SeatEvent::KeepsLinks(true)).await;
    let mut second = seat(&database).await;
    assert_eq!((first.slot, second.slot), (0, 1));
    let before = until(&mut second, &SeatEvent::Siblings(1)).await;
    assert_eq!(before, [SeatEvent::Resumed], "two keep the links");
    until(&mut first, &SeatEvent::Siblings(1)).await;
    drop(first);
    until(&mut second, &SeatEvent::KeepsLinks(true)).await;
    assert_eq!(seat(&database).await.slot, 0);
}

#[tokio::test]
async fn clause_14_notices_come_whole_and_in_order_to_others_only_and_garbage_harms_nobody() {
    let database = PostgresDatabase::create(shared().unwrap()).await;
    let mut first = seat(&database).await;
    let mut second = seat(&database).await;
    let channel = "DO $$ BEGIN PERFORM pg_notify('isobar_' || (hashtext('isobar ' || current_schema()) & 2147483647), \
                   garbage) FROM unnest(ARRAY['', 'x', '00000000-0000-0000-0000-000000000000 1 0 9 +f']) AS g (garbage); END $$";
    database.run(channel).await;
    let large: Bytes = (0..200_000_u32).map(|byte| byte as u8).collect();
    let told = [Bytes::from_static(b"one"), large, Bytes::new(), Bytes::from_static(b"four")];
    for notice in &told {
        assert!(first.notices.tell(notice.clone()));
    }
    let last = SeatEvent::Told { by: first.node, notice: told[3].clone() };
    let mut heard = until(&mut second, &last).await;
    heard.retain(|event| matches!(event, SeatEvent::Told { .. }));
    let expected = told[..3].iter().map(|notice| SeatEvent::Told { by: first.node, notice: notice.clone() });
    assert!(heard.into_iter().eq(expected));
    second.notices.tell(Bytes::from_static(b"end"));
    let before =
        until(&mut first, &SeatEvent::Told { by: second.node, notice: Bytes::from_static(b"end") }).await;
    assert!(!before.iter().any(|event| matches!(event, SeatEvent::Told { .. })), "{before:?}");
}

#[tokio::test]
async fn clause_14_a_lost_connection_gives_up_the_links_and_resumes() {
    let database = PostgresDatabase::create(shared().unwrap()).await;
    let mut first = seat(&database).await;
    until(&mut first, &SeatEvent::KeepsLinks(true)).await;
    database
        .run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1000")
        .await;
    until(&mut first, &SeatEvent::KeepsLinks(false)).await;
    until(&mut first, &SeatEvent::Resumed).await;
    until(&mut first, &SeatEvent::KeepsLinks(true)).await;
    assert_eq!(seat(&database).await.slot, 1);
}
