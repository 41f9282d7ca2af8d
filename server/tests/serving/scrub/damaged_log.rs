//! Log entries that a disk has damaged or lost reach nobody, and keep nothing else from anybody.

use super::*;
use crate::support::linked_to;

const DAMAGED_RUNS: &str = "isobar_stored_log_runs_damaged_total";

/// A stored run, as the file has it.
struct LoggedRun {
    last_seq: i64,
    chain_before: Vec<u8>,
    body: Vec<u8>,
}

/// The third run of the only log there is.
async fn third_run(connection: &mut SqliteConnection) -> LoggedRun {
    let read = "SELECT last_seq, chain_before, body FROM log ORDER BY last_seq LIMIT 1 OFFSET 2";
    let row = sqlx::query(read).fetch_one(connection).await.unwrap();
    LoggedRun { last_seq: row.get(0), chain_before: row.get(1), body: row.get(2) }
}

/// A region wrote two documents, a change in each run, and something was done to the third run. Another joins it. Both
/// come to hold the same over the link they have. Returns how often damage was found.
async fn joined_after(spoil: impl AsyncFnOnce(&mut SqliteConnection, LoggedRun)) -> f64 {
    let directory = tempfile::tempdir().unwrap();
    let (file, there_file) = (directory.path().join("here.db"), directory.path().join("there.db"));
    let key = ClusterKey::random();
    let there = start(region("there", &key, None), &there_file).await;
    let (_, first) = written(&there, "first", 5).await;
    let (_, second) = written(&there, "second", 2).await;
    there.stop().await.unwrap();
    let mut connection = beside(&there_file).await;
    let run = third_run(&mut connection).await;
    spoil(&mut connection, run).await;
    connection.close().await.unwrap();

    let there = start(region("there", &key, None), &there_file).await;
    let here = start(region("here", &key, Some(&there)), &file).await;
    let link = linked_to(&here, "there").await;
    let cluster = Cluster { _directory: directory, here, there, file, there_file, key };
    cluster.settled(&[&first, &second]).await;

    // What is written since arrives as ever, in both directions.
    for node in [&cluster.here, &cluster.there] {
        cluster.written(node, &format!("since-{}", node.clients.port()), 2).await;
    }
    assert_eq!(linked_to(&cluster.here, "there").await, link, "the link was closed");
    for node in [&cluster.here, &cluster.there] {
        assert_eq!(node.metric("isobar_origins_forked_total").await, 0.0);
    }
    cluster.there.metric(DAMAGED_RUNS).await
}

async fn replace(connection: &mut SqliteConnection, run: LoggedRun) {
    let LoggedRun { last_seq, chain_before, body } = run;
    let update = sqlx::query("UPDATE log SET chain_before = ?2, body = ?3 WHERE last_seq = ?1")
        .bind(last_seq)
        .bind(chain_before)
        .bind(body)
        .execute(connection)
        .await
        .unwrap();
    assert_eq!(update.rows_affected(), 1);
}

/// What is damaged is found, and held back.
async fn held_back(damage: impl FnOnce(&mut LoggedRun)) {
    let found = joined_after(async |connection, mut run| {
        damage(&mut run);
        replace(connection, run).await;
    });
    assert!(found.await >= 1.0);
}

#[tokio::test]
async fn a_damaged_change_in_the_log_costs_neither_the_link_nor_a_document() {
    held_back(|run| *run.body.last_mut().unwrap() ^= 1).await;
}

#[tokio::test]
async fn a_damaged_document_id_in_the_log_is_not_taken_for_another_document() {
    // After the version, the kind and the length.
    held_back(|run| run.body[4] ^= 1).await;
}

#[tokio::test]
async fn a_damaged_chain_in_the_log_is_not_taken_for_another_log() {
    held_back(|run| run.chain_before[0] ^= 1).await;
}

#[tokio::test]
async fn a_row_that_the_log_has_lost_is_made_up_for() {
    let found = joined_after(async |connection, run| {
        let delete = sqlx::query("DELETE FROM log WHERE last_seq = ?").bind(run.last_seq);
        assert_eq!(delete.execute(connection).await.unwrap().rows_affected(), 1);
    });
    assert_eq!(found.await, 0.0, "what is there is sound");
}
