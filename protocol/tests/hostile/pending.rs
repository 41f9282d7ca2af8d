//! Changes whose dependencies never come.

use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Ingested, Refusal};

use crate::drafts::Draft;
use crate::{ANNA, Attacks, EVE, EVERYWHERE, History, Keeper, Kept};

/// A change that nobody has, and one built on it for each actor from 10 on.
fn orphans(count: u8) -> (Draft, Vec<Draft>) {
    let missing = Draft::new(EVE, 1, 1, &[]);
    let change = missing.change();
    let orphans = (0..count).map(|number| Draft::new(10 + number, 1, 2, &[&change])).collect();
    (missing, orphans)
}

#[test]
fn a_flood_of_orphans_fills_its_bounds_and_no_more() {
    let history = History::written();
    let (missing, orphans) = orphans(20);
    let few = Limits { pending_changes_max: 10, ..Limits::default() };
    let small = Limits { pending_bytes_max: 5_000, ..Limits::default() };
    for (kept, limits) in EVERYWHERE.iter().flat_map(|kept| [(*kept, &few), (*kept, &small)]) {
        let mut keeper = Keeper::new(&history, kept);
        let results: Vec<_> = orphans.iter().map(|orphan| keeper.offer(&orphan.change(), limits)).collect();
        let waiting = keeper.graph.pending_count();
        assert!((5..=10).contains(&waiting), "{waiting} wait");
        assert!(results[..waiting].iter().all(|it| *it == Ok(Ingested::Pending)));
        assert!(results[waiting..].iter().all(|it| *it == Err(Refusal::PendingFull)));
        // Others are not held up, and what waited goes on when its dependency comes.
        assert_eq!(keeper.offer(&history.honest(), limits), Ok(Ingested::Staged(4..5)));
        let staged = keeper.offer(&missing.change(), limits);
        assert_eq!(staged, Ok(Ingested::Staged(5..6 + waiting as u64)));
        assert_eq!(keeper.graph.pending_count(), 0);
        assert_eq!(keeper.offer(&orphans[19].change(), limits).map(|it| it != Ingested::Pending), Ok(true));
    }
}

#[test]
fn what_waits_for_a_refused_change_is_forgotten() {
    let history = History::written();
    for attack in [Attacks::on(&history).seq_gap, Attacks::on(&history).start_op_of_a_dependency] {
        let mut keeper = Keeper::new(&history, Kept::InTail);
        let child = Draft::new(20, 1, 9, &[&attack.change(), &history.a1.change()]);
        let grandchild = Draft::new(21, 1, 10, &[&child.change()]);
        for orphan in [&grandchild, &child] {
            assert_eq!(keeper.offer(&orphan.change(), &Limits::default()), Ok(Ingested::Pending));
        }
        keeper.offer(&attack.change(), &Limits::default()).expect_err("refused");
        assert_eq!(keeper.graph.pending_count(), 0);
        assert_eq!(keeper.graph.change_count(), 4);
    }
}

#[test]
fn a_change_that_breaks_a_rule_when_it_is_complete_is_forgotten_with_what_waits_for_it() {
    let history = History::written();
    let mut keeper = Keeper::new(&history, Kept::InTail);
    let missing = Draft::new(EVE, 1, 5, &[&history.a2.change()]);
    let bad = Draft::new(ANNA, 9, 6, &[&missing.change()]);
    let child = Draft::new(20, 1, 7, &[&bad.change()]);
    let good = Draft::new(21, 1, 6, &[&missing.change()]);
    for orphan in [&child, &bad, &good] {
        assert_eq!(keeper.offer(&orphan.change(), &Limits::default()), Ok(Ingested::Pending));
    }
    assert_eq!(keeper.offer(&missing.change(), &Limits::default()), Ok(Ingested::Staged(4..6)));
    assert_eq!(keeper.graph.pending_count(), 0);
    assert_eq!(keeper.graph.position(&bad.change().hash), None);
    assert!(keeper.graph.position(&good.change().hash).is_some());
}

#[test]
fn a_change_that_waits_for_many_waits_for_each_of_them() {
    let history = History::written();
    let mut keeper = Keeper::new(&history, Kept::InTail);
    let parts: Vec<Draft> = (0..50).map(|number| Draft::new(100 + number, 1, 1, &[])).collect();
    let changes: Vec<_> = parts.iter().map(Draft::change).collect();
    let all = Draft::new(EVE, 1, 2, &changes.iter().collect::<Vec<_>>()).change();
    assert_eq!(keeper.offer(&all, &Limits::default()), Ok(Ingested::Pending));
    assert_eq!(keeper.graph.missing_from(&[all.hash]).len(), 50);
    for change in &changes[..49] {
        let staged = keeper.offer(change, &Limits::default());
        assert!(matches!(staged, Ok(Ingested::Staged(range)) if range.end - range.start == 1));
    }
    // What has arrived is lost again before the last one comes.
    keeper.graph.roll_back_staged();
    assert!(matches!(keeper.offer(&changes[49], &Limits::default()), Ok(Ingested::Staged(_))));
    assert_eq!(keeper.graph.pending_count(), 1);
    assert_eq!(keeper.graph.missing_from(&[all.hash]).len(), 49);
    for change in &changes[..49] {
        keeper.offer(change, &Limits::default()).expect("accepted");
    }
    assert_eq!(keeper.graph.pending_count(), 0);
    assert_eq!(keeper.graph.position(&all.hash), Some(4 + 50));
}
