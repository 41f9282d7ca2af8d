//! The storage contract's suite: each test holds for memory, SQLite and Postgres, and is named after the clause of
//! `isobar::storage` that it checks.
//!
//! Postgres is the server that `ISOBAR_TEST_DATABASE_URL` names, or one that the test starts for itself.

#![allow(clippy::unwrap_used, reason = "a test that meets an error shall fail")]

mod append;
mod documents;
mod fixture;
mod log;
mod opening;
mod postgres;
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
    documents::clause_6_loads_that_race_compaction_miss_nothing,
    documents::clause_7_a_base_replaces_only_the_one_it_was_made_from,
    documents::clause_7_installing_removes_nothing_and_pruning_ends_with_its_generation,
    documents::clause_7_pruning_takes_changes_out_of_whatever_they_were_appended_with,
    documents::clause_7_two_nodes_may_prune_a_document_at_once,
    documents::clause_7_of_two_installs_at_once_one_is_refused,
    documents::clause_11_documents_do_not_touch_each_other,
    log::a_reader_gets_what_follows_its_cursor_up_to_its_limit,
    log::clause_8_truncation_removes_a_prefix_and_keeps_the_counter,
    log::clause_8_a_repeated_append_is_recognised_after_truncation,
    opening::clause_9_nodes_that_open_at_once_all_succeed,
    opening::clause_10_the_storage_id_stays_and_another_region_is_refused,
    opening::statistics_count_documents_and_changes,
    opening::a_closed_storage_refuses_calls,
}
