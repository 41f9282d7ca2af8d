//! Why the door is needed: what stock Automerge does with the same changes. Should one of these fail after an upgrade,
//! Automerge has learnt to defend itself; clients in the field have not.

use std::panic::{AssertUnwindSafe, catch_unwind};

use automerge::transaction::Transactable;
use automerge::{AutoCommit, Automerge, ROOT};

use crate::drafts::Draft;
use crate::{Attacks, EVE, History};

fn applied(drafts: &[&Draft]) -> Automerge {
    let mut document = Automerge::new();
    document.apply_changes(drafts.iter().map(|draft| draft.stock())).expect("honest changes");
    document
}

/// Whether applying the change makes the peer panic.
fn panics(document: &Automerge, attack: &Draft) -> bool {
    let mut document = document.clone();
    let change = attack.stock();
    catch_unwind(AssertUnwindSafe(|| drop(document.apply_changes([change])))).is_err()
}

#[test]
fn the_honest_history_saves_and_loads() {
    let history = History::written();
    let mut document = applied(&history.all());
    let next = Draft::new(EVE, 1, 5, &[&history.a2.change()]).overwriting(crate::BEN, 2);
    assert!(!panics(&document, &next));
    document.apply_changes([next.stock()]).expect("honest");
    assert_eq!(Automerge::load(&document.save()).expect("loads").get_heads(), document.get_heads());
}

#[test]
fn gaps_in_the_sequence_make_stock_peers_panic() {
    let history = History::written();
    let (document, attacks) = (applied(&history.all()), Attacks::on(&history));
    assert!(panics(&document, &attacks.seq_gap));
    assert!(panics(&document, &attacks.first_seq_is_not_one));
}

#[test]
fn unknown_authors_make_stock_peers_panic() {
    let history = History::written();
    let attacks = Attacks::on(&history);
    assert!(panics(&applied(&history.all()), &attacks.actor_of_nobody));
    // One that another branch has is known to a peer that has that branch, and crashes one that has not.
    assert!(!panics(&applied(&history.all()), &attacks.actor_of_another_branch));
    assert!(panics(&applied(&[&history.a1, &history.b1, &history.a2]), &attacks.actor_of_another_branch));
}

#[test]
fn a_successor_that_does_not_descend_makes_a_stock_peer_panic_that_gets_it_first() {
    let history = History::written();
    let attack = Attacks::on(&history).previous_not_ancestor;
    assert!(!panics(&applied(&history.all()), &attack));
    assert!(panics(&applied(&[&history.a1, &history.c1]), &attack));
}

#[test]
fn low_counters_make_a_document_that_never_loads_again() {
    let history = History::written();
    let mut document = applied(&history.all());
    document.apply_changes([Attacks::on(&history).start_op_of_a_dependency.stock()]).expect("it is accepted");
    let saved = document.save();
    Automerge::load(&saved).expect_err("it does not load");
}

#[test]
fn a_number_used_twice_is_an_error_to_stock_peers() {
    let history = History::written();
    let mut document = applied(&history.all());
    document.apply_changes([Attacks::on(&history).seq_reused.stock()]).expect_err("an error each time");
}

#[test]
fn huge_counters_are_taken_and_used_up() {
    let mut document = AutoCommit::new();
    document.apply_changes([Draft::new(EVE, 1, u64::from(u32::MAX), &[]).stock()]).expect("it is accepted");
    let edited = catch_unwind(AssertUnwindSafe(|| {
        document.put(ROOT, "k", 1).expect("an ordinary edit");
        document.commit();
        Automerge::load(&document.save()).is_ok()
    }));
    assert!(!matches!(edited, Ok(true)), "nobody can edit any more");
}
