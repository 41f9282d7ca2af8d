//! Mistakes that the core ([`Fault`]) and the shell around it ([`Planted`]) are told to make. Each must be noticed, by the
//! invariant that it breaks.
//!
//! A mistake may show in more than one way, depending on what comes first; the ways are named.

use isobar_protocol::planted::{Fault, with};

use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::run;

/// Schedules that a mistake may need until it shows.
const SEEDS_MAX: u64 = 10_000;

/// Schedules in which nothing may be noticed.
const SEEDS_CLEAN: u64 = 500;

/// Runs schedules with mistakes until one of these invariants notices. Others must not.
fn notice(shell: Option<Planted>, core: &[Fault], by: &[Invariant]) {
    for seed in 0..SEEDS_MAX {
        if let Err(violation) = with(core, || run(seed, shell)) {
            println!("{shell:?}, {core:?}: seed {seed}, {:?}: {}", violation.invariant, violation.detail);
            assert!(by.contains(&violation.invariant), "{shell:?}, {core:?}: shows otherwise: {violation:?}");
            return;
        }
    }
    panic!("{shell:?}, {core:?}: not noticed in {SEEDS_MAX} schedules");
}

fn must_be_noticed(planted: Planted, by: &[Invariant]) {
    notice(Some(planted), &[], by);
}

fn must_be_noticed_in_the_core(fault: Fault, by: &[Invariant]) {
    notice(None, &[fault], by);
}

/// Runs schedules in which the core meets what it should get along with, except that these invariants may suffer.
fn must_be_borne(shell: Planted, core: &[Fault], but: &[Invariant]) {
    for seed in 0..SEEDS_CLEAN {
        if let Err(violation) = with(core, || run(seed, Some(shell))) {
            assert!(but.contains(&violation.invariant), "{shell:?}, {core:?}: seed {seed}: {violation:?}");
        }
    }
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
    // Where it is the last of a frame, it is what never arrives.
    must_be_noticed(Planted::SkipEntry, &[Invariant::DenseLog, Invariant::Convergence]);
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
    // Where the document was deleted twice, only the time of the deletion may be missing.
    let ways = [Invariant::AcknowledgedMeansKept, Invariant::Convergence];
    must_be_noticed(Planted::ForgetTombstonesInPages, &ways);
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
fn entries_taken_after_a_gap_are_noticed() {
    must_be_noticed_in_the_core(Fault::TakeAfterGap, &[Invariant::DenseLog]);
}

/// Two logs come to be under one name; where their chains are compared, no region mixes them.
#[test]
fn logs_that_are_mixed_for_want_of_a_chain_check_are_noticed() {
    must_be_borne(Planted::ForkOrigins, &[], &[]);
    notice(Some(Planted::ForkOrigins), &[Fault::SkipChainCheck], &[Invariant::OneEntryPerSeq]);
}

#[test]
fn an_announcement_of_what_was_only_handed_over_is_noticed() {
    must_be_noticed_in_the_core(Fault::AnnounceUnstored, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn a_run_that_counts_as_durable_when_handed_over_is_noticed() {
    must_be_noticed_in_the_core(Fault::CountUnstored, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn a_sender_that_ignores_groups_is_noticed() {
    must_be_noticed_in_the_core(Fault::SendOutsideGroups, &[Invariant::Residency]);
}

/// What is sent beyond the groups is not taken, although links and snapshots fail over it; where it is, that is noticed.
#[test]
fn a_receiver_that_ignores_groups_is_noticed() {
    must_be_borne(Planted::TrustSenders, &[Fault::SendOutsideGroups], &[Invariant::Convergence]);
    let both = [Fault::SendOutsideGroups, Fault::TakeOutsideGroups];
    notice(Some(Planted::TrustSenders), &both, &[Invariant::Residency]);
}

#[test]
fn a_vector_adopted_before_the_last_page_is_noticed() {
    must_be_noticed_in_the_core(Fault::AdoptEarly, &[Invariant::AcknowledgedMeansKept]);
}

#[test]
fn a_snapshot_that_goes_on_with_whoever_is_there_is_noticed() {
    must_be_noticed_in_the_core(Fault::ResumeAnywhere, &[Invariant::AcknowledgedMeansKept]);
}

#[test]
fn a_region_that_fetches_no_snapshot_is_noticed() {
    must_be_noticed_in_the_core(Fault::IgnoreTruncated, &[Invariant::Convergence]);
}

#[test]
fn interests_of_links_that_are_gone_are_noticed() {
    must_be_noticed_in_the_core(Fault::KeepInterests, &[Invariant::Presence]);
}

#[test]
fn a_change_let_in_without_its_dependencies_is_noticed() {
    // Where the author's own change before is what is missing, the change is refused, in that region alone.
    let ways = [Invariant::CausalVisibility, Invariant::Convergence];
    must_be_noticed_in_the_core(Fault::LetInIncomplete, &ways);
}

#[test]
fn heads_shown_before_they_are_durable_are_noticed() {
    must_be_noticed_in_the_core(Fault::ShowStaged, &[Invariant::DurableBeforeAdvertised]);
}

#[test]
fn two_changes_with_one_number_let_in_are_noticed() {
    must_be_noticed_in_the_core(Fault::LetInReused, &[Invariant::Convergence]);
}

#[test]
fn a_commit_under_an_origin_that_was_replaced_is_noticed() {
    must_be_noticed(Planted::SkipFence, &[Invariant::OneWriter]);
}

#[test]
fn changes_removed_that_no_base_covers_are_noticed() {
    must_be_noticed(Planted::PruneTooMuch, &[Invariant::AcknowledgedMeansKept]);
}

#[test]
fn a_base_that_forgets_heads_is_noticed() {
    must_be_noticed_in_the_core(Fault::ForgetBaseHeads, &[Invariant::CausalVisibility]);
}

#[test]
fn a_base_that_forgets_its_authors_is_noticed() {
    must_be_noticed_in_the_core(Fault::ForgetBaseAuthors, &[Invariant::Convergence]);
}

#[test]
fn receipts_for_what_a_peer_had_on_a_former_link_are_noticed() {
    must_be_noticed_in_the_core(Fault::KeepAnnounced, &[Invariant::TrueReceipts]);
}

#[test]
fn receipts_for_what_no_log_names_and_nobody_asked_about_are_noticed() {
    must_be_noticed_in_the_core(Fault::ReceiptUnasked, &[Invariant::TrueReceipts]);
}

#[test]
fn a_second_look_without_waiting_is_noticed() {
    must_be_noticed(Planted::LookWithoutWaiting, &[Invariant::Scrub]);
}

#[test]
fn positions_noted_before_the_look_are_noticed() {
    must_be_noticed(Planted::PlaceBeforeLooking, &[Invariant::Scrub]);
}
