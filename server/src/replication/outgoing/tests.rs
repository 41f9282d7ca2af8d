use bytes::Bytes;
use isobar_protocol::ids::Seq;
use isobar_protocol::log::Chain;

use super::*;

fn entries(origin: u128, first: u64, bytes: usize) -> LinkFrame {
    let origin = OriginId(uuid::Uuid::from_u128(origin));
    LinkFrame::Entries { origin, first: Seq(first), chain: Chain::START, body: Bytes::from(vec![0; bytes]) }
}

fn ping() -> LinkFrame {
    LinkFrame::Ping { sent_ms: 1 }
}

fn never() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(3600))
}

/// Takes one frame.
async fn one(outgoing: &Outgoing, free_at: Option<Instant>) -> LinkFrame {
    let mut frame = None;
    let taken = outgoing.take(free_at, |next| {
        frame = Some(next);
        false
    });
    tokio::time::timeout(Duration::from_secs(20), taken).await.expect("something may go").unwrap();
    frame.unwrap()
}

/// Takes everything, frame by frame.
async fn all(outgoing: &Outgoing) -> Vec<LinkFrame> {
    let mut taken = Vec::new();
    while outgoing.len() > 0 {
        taken.push(one(outgoing, None).await);
    }
    taken
}

#[tokio::test]
async fn a_live_edit_goes_before_a_backlog_and_a_sign_of_life_before_both() {
    let outgoing = Outgoing::default();
    let backlog: Vec<_> = (0..8).map(|at| entries(1, at + 1, 200_000)).collect();
    backlog.iter().for_each(|frame| outgoing.push_catch_up(frame.clone()));
    assert_eq!(one(&outgoing, None).await, backlog[0]);
    outgoing.push(entries(2, 1, 200));
    outgoing.push(ping());
    let mut expected = vec![ping(), entries(2, 1, 200)];
    expected.extend_from_slice(&backlog[1..]);
    assert_eq!(all(&outgoing).await, expected);
}

#[tokio::test]
async fn an_origin_keeps_its_order_when_it_has_caught_up() {
    let outgoing = Outgoing::default();
    outgoing.push_catch_up(entries(1, 1, 1_000));
    outgoing.push(entries(1, 2, 10));
    outgoing.push(LinkFrame::Truncated { origin: OriginId(uuid::Uuid::from_u128(1)), floor: Seq(9) });
    outgoing.push(entries(2, 1, 10));
    let taken = all(&outgoing).await;
    assert_eq!(taken[..3], [entries(2, 1, 10), entries(1, 1, 1_000), entries(1, 2, 10)]);
    assert!(matches!(taken[3], LinkFrame::Truncated { .. }));
    // Nothing of it waits any more.
    outgoing.push_catch_up(entries(3, 1, 1_000));
    outgoing.push(entries(1, 3, 10));
    assert_eq!(all(&outgoing).await, [entries(1, 3, 10), entries(3, 1, 1_000)]);
}

#[tokio::test]
async fn a_backlog_has_half_of_a_link_that_is_full_of_live_edits() {
    let outgoing = Outgoing::default();
    (0..10).for_each(|at| outgoing.push_catch_up(entries(1, at + 1, 10_000)));
    (0..100).for_each(|at| outgoing.push(entries(2, at + 1, 1_000)));
    let taken = all(&outgoing).await;
    let is_bulk = |frame: &LinkFrame| weight(frame) > 10_000;
    assert!(!is_bulk(&taken[0]), "live edits go first");
    let (mut bulk, mut live) = (0, 0);
    for frame in &taken[..taken.len() - 10] {
        *(if is_bulk(frame) { &mut bulk } else { &mut live }) += weight(frame);
        assert!(bulk <= live, "{bulk} bytes of backlog after {live} of live edits");
    }
    assert!(bulk > live / 2, "{bulk} bytes of backlog beside {live} of live edits");
}

#[tokio::test]
async fn only_what_keeps_the_link_alive_goes_while_bytes_are_spent() {
    let outgoing = Outgoing::default();
    outgoing.push(entries(1, 1, 10));
    outgoing.push_catch_up(entries(2, 1, 10));
    outgoing.push_presence(LinkFrame::Unsubscribe { origin: OriginId(uuid::Uuid::nil()) });
    outgoing.push(ping());
    assert_eq!(one(&outgoing, never()).await, ping());
    let taken = outgoing.take(never(), |_| true);
    let taken = tokio::time::timeout(Duration::from_millis(50), taken).await;
    assert!(taken.is_err(), "it is held back");
    // Until it is time.
    let mut frames = 0;
    let held = outgoing.take(Some(Instant::now() + Duration::from_millis(20)), |_| {
        frames += 1;
        true
    });
    assert!(held.await.unwrap() > Duration::ZERO);
    assert_eq!(frames, 3);
    // A link that ends does not wait for it.
    outgoing.push(entries(1, 2, 10));
    outgoing.close();
    assert_eq!(outgoing.take(never(), |_| true).await, None);
}
