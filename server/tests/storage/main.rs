//! The storage contract's suite: each test holds for memory, SQLite and Postgres, and is named after the clause of
//! `isobar::storage` that it checks.
//!
//! Postgres is the server that `ISOBAR_TEST_DATABASE_URL` names, or one that the test starts for itself.

#![allow(clippy::unwrap_used, reason = "a test that meets an error shall fail")]

mod append;
mod deletion;
mod documents;
mod fixture;
mod groups;
mod log;
mod opening;
mod postgres;
mod regions;
mod seat;
mod sqlite;

/// Instantiates the contract's tests for each implementation.
macro_rules! contract {
    ($($module:ident :: $test:ident),* $(,)?) => {
        contract!(@ in_memory, memory, $($module :: $test),*);
        contract!(@ in_sqlite, sqlite, $($module :: $test),*);
        contract!(@ in_postgres, postgres, $($module :: $test),*);
    };
    (@ $implementation:ident, $open:ident, $($module:ident :: $test:ident),*) => {
        mod $implementation {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    crate::$module::$test(crate::fixture::Database::$open().await).await;
                }
            )*
        }
    };
}

contract! {
    append::clause_1_an_appended_batch_is_there_after_a_crash,
    append::clause_1_large_batches_and_large_changes_are_kept_whole,
    append::clause_1_empty_bytes_and_long_ids_are_kept,
    append::clause_2_origins_that_append_at_once_have_dense_logs_at_every_moment,
    append::clause_2_a_writer_that_miscounts_is_stopped,
    append::clause_3_a_change_that_is_held_keeps_its_bytes,
    append::clause_3_two_origins_may_bring_the_same_change,
    append::clause_4_an_older_incarnation_is_fenced_and_stores_nothing,
    append::clause_4_claims_count_incarnations_and_find_the_counter,
    append::clause_5_a_repeated_append_is_answered_as_the_success_it_was,
    append::clause_5_a_batch_that_committed_before_a_claim_is_not_denied,
    documents::an_unknown_document_is_none,
    documents::a_document_keeps_its_group_and_state,
    documents::quarantined_documents_are_listed_and_counted_among_others,
    documents::clause_6_loads_that_race_compaction_miss_nothing,
    documents::clause_7_a_base_replaces_only_the_one_it_was_made_from,
    documents::clause_7_installing_removes_nothing_and_pruning_ends_with_its_generation,
    documents::clause_7_pruning_takes_changes_out_of_whatever_they_were_appended_with,
    documents::clause_7_two_nodes_may_prune_a_document_at_once,
    documents::clause_7_of_two_installs_at_once_one_is_refused,
    documents::clause_11_documents_do_not_touch_each_other,
    documents::clause_15_mending_gives_every_stored_copy_its_bytes_and_adds_nothing,
    log::a_reader_gets_what_follows_its_cursor_up_to_its_limit,
    log::clause_8_truncation_removes_a_prefix_and_keeps_the_counter,
    log::clause_8_a_repeated_append_is_recognised_after_truncation,
    deletion::clause_12_a_deletion_takes_the_bytes_at_once_and_the_log_keeps_the_names,
    deletion::clause_12_nothing_brings_a_deleted_document_back,
    deletion::clause_12_changes_and_the_deletion_of_their_document_may_come_together,
    deletion::clause_12_changes_and_deletions_without_a_log_entry_may_be_repeated,
    deletion::clause_12_a_deletion_that_is_refused_deletes_nothing,
    deletion::clause_12_a_deletion_that_races_appends_leaves_nothing_behind,
    deletion::clause_18_a_long_log_is_erased_in_bounded_steps_that_go_on_after_a_crash,
    deletion::clause_18_what_comes_before_the_end_of_a_pass_is_erased_by_it,
    deletion::clause_18_deletions_that_come_together_are_erased_in_one_pass_and_later_ones_in_the_next,
    deletion::clause_18_a_log_may_be_truncated_while_it_is_erased,
    deletion::clause_18_two_nodes_may_erase_at_once,
    deletion::a_listing_shows_every_document_once_and_in_order,
    regions::clause_2_a_batch_may_hold_runs_of_several_origins,
    regions::clause_4_an_origin_that_was_replaced_is_fenced_for_ever,
    regions::clause_4_entries_of_an_own_origin_that_come_back_fence_whoever_held_it,
    regions::clause_4_a_fenced_run_leaves_nothing_of_its_batch,
    regions::clause_5_entries_that_another_node_stored_first_are_out_of_step,
    regions::clause_5_a_repeated_batch_of_several_runs_is_recognised,
    regions::clause_5_the_same_run_from_another_node_does_not_stand_for_the_rest_of_a_batch,
    regions::clause_4_an_origin_is_claimed_until_it_is_replaced_or_comes_from_elsewhere,
    regions::clause_5_two_nodes_that_store_the_same_logs_leave_no_hole_and_no_duplicate,
    groups::clause_19_what_comes_under_another_group_is_logged_and_not_merged,
    groups::clause_19_of_two_groups_in_one_batch_the_first_has_the_document,
    groups::clause_19_writers_that_create_documents_in_two_groups_at_once_mix_nothing,
    groups::clause_19_a_tombstone_is_of_the_group_of_its_document,
    log::clause_8_truncation_spares_what_is_young,
    log::clause_13_adopted_origins_go_forward_and_leave_their_logs_truncated,
    log::clause_13_what_a_snapshot_lacked_is_noted_until_it_is_found,
    log::clause_16_members_are_remembered_until_they_are_forgotten,
    log::acknowledgements_go_forward_only,
    opening::clause_9_nodes_that_open_at_once_all_succeed,
    opening::clause_10_the_storage_id_stays_and_another_region_is_refused,
    opening::clause_17_nodes_are_registered_in_order_and_the_newest_are_remembered,
    opening::statistics_count_documents_and_changes,
    opening::a_closed_storage_refuses_calls,
}
