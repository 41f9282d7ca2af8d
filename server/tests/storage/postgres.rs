//! What only Postgres has: a server that stops, breaks connections, or is set up otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use isobar::storage::postgres::PostgresStorage;
use isobar::storage::{Batch, ClaimedOrigin, Storage, StorageError};
use isobar_protocol::ids::Seq;
use isobar_testkit::{Durability, PostgresCluster, TestServer};
use sqlx::Connection;

use crate::fixture::*;

async fn database() -> PostgresDatabase {
    PostgresDatabase::create(isobar_testkit::shared().unwrap()).await
}

async fn open(database: &PostgresDatabase) -> Arc<dyn Storage> {
    isobar::storage::open(&database.url).await.unwrap()
}

/// Appends until the answer is definite, as the group commit does. Returns how often it had to repeat.
async fn append_definitely(
    storage: &dyn Storage,
    origin: &ClaimedOrigin,
    first: Seq,
    batch: &[Arriving],
) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut repeated = 0;
    loop {
        match append_own(storage, origin, first, batch).await {
            Err(StorageError::Transient(_)) if Instant::now() < deadline => repeated += 1,
            outcome => {
                outcome.unwrap();
                return repeated;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clause_5_appends_whose_backend_is_terminated_leave_no_hole_and_no_duplicate() {
    let database = database().await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    let mut killer = database.connect().await;
    let done = Arc::new(AtomicBool::new(false));
    let killing = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                             WHERE datname = current_database() AND pid <> pg_backend_pid()";
            while !done.load(Ordering::SeqCst) {
                sqlx::query(terminate).execute(&mut killer).await.unwrap();
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        }
    });
    let batches: Vec<_> =
        (0..150_u32).map(|place| vec![append((place % 5) as u8, place * 8..place * 8 + 8)]).collect();
    let mut repeated = 0;
    for (batch, first) in batches.iter().zip((1..).step_by(8)) {
        repeated += append_definitely(&*storage, &origin, Seq(first), batch).await;
    }
    done.store(true, Ordering::SeqCst);
    killing.await.unwrap();
    assert!(repeated > 0, "no append met a terminated backend");
    let storage = open(&database).await;
    assert_eq!(whole_log(&*storage, &origin).await, expected_log(&batches));
    let mut held = 0;
    for number in 0..5 {
        held += load(&*storage, number).await.tail.len();
    }
    assert_eq!(held, 150 * 8);
}

#[tokio::test]
async fn clause_1_a_commit_that_fails_is_not_answered_as_a_success() {
    let database = database().await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    // Fails at the commit, after the statement has returned its row.
    database
        .run(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$; \
             CREATE CONSTRAINT TRIGGER refused AFTER INSERT ON log DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await;
    let refused = append_own(&*storage, &origin, Seq(2), &[append(2, 1..2)]).await;
    assert!(matches!(refused, Err(StorageError::Fatal(_))), "{refused:?}");
    assert!(storage.load_document(&document(2)).await.unwrap().is_none());
    assert_eq!(whole_log(&*storage, &origin).await.len(), 1);
    database.run("DROP TRIGGER refused ON log").await;
    assert_eq!(append_own(&*storage, &origin, Seq(2), &[append(2, 1..2)]).await.unwrap(), Seq(2));
}

#[tokio::test]
async fn clause_1_a_batch_that_fails_halfway_leaves_nothing() {
    let database = database().await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    database.run("ALTER TABLE changes ADD CHECK (position('of change 3'::bytea IN changes) = 0)").await;
    let refused = append_own(&*storage, &origin, Seq(1), &[append(1, 0..3), append(2, 3..4)]).await;
    assert!(matches!(refused, Err(StorageError::Fatal(_))), "{refused:?}");
    assert!(storage.load_document(&document(1)).await.unwrap().is_none());
    assert!(storage.load_document(&document(2)).await.unwrap().is_none());
    assert_eq!(whole_log(&*storage, &origin).await, []);
    assert_eq!(append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap(), Seq(2));
}

#[tokio::test]
async fn clause_1_commits_wait_for_the_disk_whatever_the_database_defaults_to() {
    let database = database().await;
    PostgresStorage::connect(&database.url).await.unwrap().close().await;
    database
        .run(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$; \
             CREATE FUNCTION check_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 IF current_setting('synchronous_commit') <> 'on' THEN RAISE 'commits do not wait'; END IF; \
                 RETURN NEW; \
             END $$; \
             CREATE TRIGGER commit_waits BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION check_commit()",
        )
        .await;
    let insert = "INSERT INTO log VALUES ('o', 1, 1, '', 1, '')";
    assert!(
        sqlx::query(insert).execute(&mut database.connect().await).await.is_err(),
        "the check checks nothing"
    );
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    assert_eq!(append_own(&*storage, &origin, Seq(1), &[append(1, 0..1)]).await.unwrap(), Seq(1));
}

#[tokio::test]
async fn a_stopped_server_is_transient_within_seconds_and_what_was_appended_survives_it() {
    let cluster = PostgresCluster::start(Durability::None).unwrap();
    let mut database = PostgresDatabase::create(TestServer::Own(cluster)).await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..3)]).await.unwrap();

    let TestServer::Own(cluster) = database.server_mut() else { unreachable!() };
    cluster.crash().unwrap();
    let stopped = Instant::now();
    for _ in 0..2 {
        let refused = append_own(&*storage, &origin, Seq(4), &[append(1, 3..4)]).await;
        assert!(matches!(refused, Err(StorageError::Transient(_))), "{refused:?}");
        assert!(matches!(storage.check().await, Err(StorageError::Transient(_))));
        assert!(matches!(storage.load_document(&document(1)).await, Err(StorageError::Transient(_))));
    }
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());

    cluster.restart().unwrap();
    append_definitely(&*storage, &origin, Seq(4), &[append(1, 3..4)]).await;
    assert_eq!(whole_log(&*storage, &origin).await, expected_log(&[vec![append(1, 0..4)]]));
    assert_eq!(tail(&*storage, 1).await, sorted(changes(0..4)));
}

#[tokio::test]
async fn a_server_that_accepts_and_never_answers_is_transient_within_seconds() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://isobar@{}/isobar", silent.local_addr().unwrap());
    let begun = Instant::now();
    let refused = isobar::storage::open(&url).await.map(drop);
    assert!(matches!(refused, Err(StorageError::Transient(_))), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn clause_9_a_newer_schema_is_refused_and_left_as_it_is() {
    let database = database().await;
    open(&database).await.close().await;
    database.run("INSERT INTO _sqlx_migrations VALUES (9999, 'future', now(), true, '\\x00', 0)").await;
    database.run("DROP TABLE changes").await;
    let refused = isobar::storage::open(&database.url).await.map(drop);
    assert!(
        matches!(refused, Err(StorageError::NewerSchema { found: 9999, supported }) if supported < 9999),
        "{refused:?}"
    );
    let tables = "SELECT count(*) FROM pg_tables WHERE tablename = 'changes'";
    let tables: i64 = sqlx::query_scalar(tables).fetch_one(&mut database.connect().await).await.unwrap();
    assert_eq!(tables, 0);
}

#[tokio::test]
async fn clause_18_a_deletion_does_without_the_log_until_it_is_erased() {
    let database = database().await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2)]).await.unwrap();
    let mut beside = database.connect().await;
    let mut lock = beside.begin().await.unwrap();
    sqlx::query("LOCK TABLE log IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    let unlogged = Batch { runs: Vec::new(), ..deletion(&origin, 3, 1, 500) };
    let deleted = tokio::time::timeout(Duration::from_secs(5), storage.append(&unlogged)).await;
    deleted.expect("a deletion waited for the log").unwrap();
    assert_eq!(load(&*storage, 1).await.tail, []);
    lock.rollback().await.unwrap();
    assert!(whole_log(&*storage, &origin).await.iter().all(|entry| entry.erased));
    let holding = "SELECT count(*) FROM log WHERE position('the bytes of change'::bytea IN body) > 0";
    for left in [1, 0] {
        let found: i64 = sqlx::query_scalar(holding).fetch_one(&mut beside).await.unwrap();
        assert_eq!(found, left);
        erase_all(&*storage, 10).await;
    }
}

#[tokio::test]
async fn clause_18_appends_do_not_wait_for_a_step_of_erasing() {
    let database = database().await;
    let storage = open(&database).await;
    let origin = claim(&*storage, 0).await;
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2), append(2, 2..3)]).await.unwrap();
    storage.append(&deletion(&origin, 4, 1, 500)).await.unwrap();
    let mut beside = database.connect().await;
    let mut lock = beside.begin().await.unwrap();
    // Holds the step up in its middle, when it wants to replace the run.
    sqlx::query("SELECT 1 FROM log FOR UPDATE").fetch_all(&mut *lock).await.unwrap();
    let step = tokio::spawn({
        let storage = Arc::clone(&storage);
        async move { storage.erase_step(10).await }
    });
    let waiting = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                   AND datname = current_database() AND query LIKE 'UPDATE log%')";
    let mut watcher = database.connect().await;
    while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&mut watcher).await.unwrap() {
        assert!(!step.is_finished(), "the step was not held up");
        tokio::task::yield_now().await;
    }
    let appends = async {
        append_own(&*storage, &origin, Seq(5), &[append(2, 3..4), append(3, 4..5)]).await.unwrap();
        storage.append(&deletion(&origin, 7, 2, 500)).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(5), appends).await.expect("an append waited for the step");
    lock.rollback().await.unwrap();
    step.await.unwrap().unwrap();
    erase_all(&*storage, 10).await;
    let log = whole_log(&*storage, &origin).await;
    assert_eq!(
        log.iter().map(|it| it.erased).collect::<Vec<_>>(),
        [true, true, true, false, true, false, false]
    );
}

#[tokio::test]
async fn clause_11_a_locked_document_holds_up_no_other() {
    let database = database().await;
    let storage = open(&database).await;
    let (origin, other) = (claim(&*storage, 0).await, claim(&*storage, 1).await);
    append_own(&*storage, &origin, Seq(1), &[append(1, 0..2), append(2, 0..2)]).await.unwrap();
    storage.install_base(&document(1), 0, base(b"one")).await.unwrap();
    let mut beside = database.connect().await;
    let mut lock = beside.begin().await.unwrap();
    for statement in [
        "SELECT id FROM documents WHERE id = $1 FOR UPDATE",
        "SELECT document_id FROM bases WHERE document_id = $1 FOR UPDATE",
        "SELECT document_id FROM changes WHERE document_id = $1 FOR UPDATE",
    ] {
        sqlx::query(statement).bind(document(1).as_bytes()).fetch_all(&mut *lock).await.unwrap();
    }
    let calls = async {
        append_own(&*storage, &origin, Seq(5), &[append(2, 2..3)]).await.unwrap();
        append_own(&*storage, &other, Seq(1), &[append(3, 0..1)]).await.unwrap();
        storage.install_base(&document(2), 0, base(b"two")).await.unwrap();
        storage.prune_changes(&document(2), &[hash(0)]).await.unwrap();
        storage.finish_prune(&document(2), 1).await.unwrap();
        (load(&*storage, 1).await, load(&*storage, 2).await)
    };
    let (one, two) =
        tokio::time::timeout(Duration::from_secs(5), calls).await.expect("a call waited for the lock");
    assert_eq!((one.tail.len(), two.tail.len()), (2, 2));
    lock.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clause_15_a_row_that_does_not_decode_costs_nothing_but_itself() {
    let database = database().await;
    let storage = open(&database).await;
    let spoil = || database.run("UPDATE changes SET changes = '\\xff'::bytea WHERE first_seq = 5");
    crate::documents::a_spoilt_row_costs_nothing_but_itself(storage, async || spoil().await).await;
}
