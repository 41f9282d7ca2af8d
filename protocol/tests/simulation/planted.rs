//! Mistakes that the shell is told to make. Each must be noticed, by the invariant that it breaks.
//!
//! A mistake may show in more than one way, depending on what comes first; the ways are named.

use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::run;

/// Schedules that a mistake may need until it shows.
const SEEDS_MAX: u64 = 2_000;

/// Runs schedules with a mistake until one of these invariants notices it. Others must not.
fn must_be_noticed(planted: Planted, by: &[Invariant]) {
    for seed in 0..SEEDS_MAX {
        if let Err(violation) = run(seed, Some(planted)) {
            println!("{planted:?}: seed {seed}, {:?}: {}", violation.invariant, violation.detail);
            assert!(by.contains(&violation.invariant), "{planted:?} shows otherwise: {violation:?}");
            return;
        }
    }
    panic!("{planted:?} was not noticed in {SEEDS_MAX} schedules");
}

#[test]
fn an_acknowledgement_before_the_commit_is_noticed() {
    must_be_noticed(Planted::AcknowledgeBeforeCommit, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn an_announcement_before_the_commit_is_noticed() {
    must_be_noticed(Planted::AnnounceBeforeCommit, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn a_run_reported_as_stored_before_the_commit_is_noticed() {
    must_be_noticed(Planted::ReportStoredBeforeCommit, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn an_entry_left_out_of_a_frame_is_noticed() {
    must_be_noticed(Planted::SkipEntry, &[Invariant::DenseLog]);
}

#[test]
fn heads_without_their_dependencies_are_noticed() {
    must_be_noticed(Planted::ForgetDependencies, &[Invariant::CausalVisibility]);
}

#[test]
fn an_origin_used_again_after_a_rollback_is_noticed() {
    must_be_noticed(Planted::KeepOrigin, &[Invariant::OneEntryPerSeq]);
}

/// A copy that was made before the first entry does not show that entries were written later.
#[test]
fn an_origin_used_again_because_it_looks_unwritten_is_noticed() {
    must_be_noticed(Planted::KeepUnwrittenOrigin, &[Invariant::OneEntryPerSeq]);
}

#[test]
fn a_resurrected_document_is_noticed() {
    must_be_noticed(Planted::Resurrect, &[Invariant::NoResurrection]);
}

#[test]
fn pages_without_deletions_are_noticed() {
    must_be_noticed(Planted::ForgetTombstonesInPages, &[Invariant::AcknowledgedMeansKept]);
}

#[test]
fn a_truncation_that_forgets_a_member_is_noticed() {
    must_be_noticed(Planted::TruncateEarly, &[Invariant::TruncatedWhenAcknowledged]);
}

#[test]
fn a_write_that_a_commit_drops_is_noticed() {
    must_be_noticed(
        Planted::DropWrite,
        &[Invariant::DurableBeforeAdvertised, Invariant::AcknowledgedMeansKept],
    );
}

#[test]
fn a_run_that_is_logged_without_its_changes_is_noticed() {
    must_be_noticed(
        Planted::LogWithoutChanges,
        &[Invariant::DurableBeforeAdvertised, Invariant::AcknowledgedMeansKept],
    );
}

#[test]
fn a_run_lost_at_a_restart_is_noticed() {
    must_be_noticed(Planted::LoseRun, &[Invariant::DenseLog]);
}

#[test]
fn a_log_that_is_said_to_hold_what_a_snapshot_brought_is_noticed() {
    must_be_noticed(Planted::AdoptOverLog, &[Invariant::DenseLog]);
}

#[test]
fn counters_raised_without_the_pages_are_noticed() {
    must_be_noticed(Planted::AdoptWithoutPages, &[Invariant::AcknowledgedMeansKept]);
}

#[test]
fn entries_logged_under_another_group_are_noticed() {
    must_be_noticed(Planted::WrongGroup, &[Invariant::Residency, Invariant::AcknowledgedMeansKept]);
}

#[test]
fn cloned_actors_that_nobody_is_told_of_are_noticed() {
    must_be_noticed(Planted::IgnoreClones, &[Invariant::CausalVisibility]);
}

#[test]
fn bytes_of_deleted_documents_in_the_log_are_noticed() {
    must_be_noticed(Planted::KeepDeletedBytes, &[Invariant::NoResurrection]);
}

#[test]
fn a_run_that_is_never_reported_as_stored_is_noticed() {
    must_be_noticed(Planted::ForgetToReport, &[Invariant::Convergence]);
}

#[test]
fn presence_that_goes_everywhere_is_noticed() {
    must_be_noticed(Planted::PresenceToAll, &[Invariant::Presence, Invariant::Residency]);
}

#[test]
fn presence_that_is_passed_on_is_noticed() {
    must_be_noticed(Planted::PassPresenceOn, &[Invariant::Presence]);
}

#[test]
fn interests_that_a_new_link_is_not_told_of_are_noticed() {
    must_be_noticed(Planted::ForgetInterests, &[Invariant::Presence]);
}

#[test]
fn a_second_look_without_waiting_is_noticed() {
    must_be_noticed(Planted::LookWithoutWaiting, &[Invariant::Scrub]);
}

#[test]
fn positions_noted_before_the_look_are_noticed() {
    must_be_noticed(Planted::PlaceBeforeLooking, &[Invariant::Scrub]);
}
