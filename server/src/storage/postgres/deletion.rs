//! Deletions within an append's transaction, and the erasing of the log that follows (clauses 12 and 18).

use isobar_protocol::ids::Seq;
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use super::{BULK_TIMEOUT, CALL_TIMEOUT, PostgresStorage, failed};
use crate::storage::failure::{clamped, unsigned};
use crate::storage::log_run::ErasureBudget;
use crate::storage::rows::{FoundLog, LogRow};
use crate::storage::{Deletion, ErasureStep, StorageError, schema};

/// Appends and installs of bases wait for the locks, and begin to read after they were given: none can pass over the
/// tombstone and store what is being deleted. Reads do not wait.
const LOCK: [&str; 2] =
    ["LOCK TABLE documents IN SHARE ROW EXCLUSIVE MODE", "LOCK TABLE bases IN SHARE ROW EXCLUSIVE MODE"];

/// Only who erases wants this table: of two nodes that do, one goes on where the other has come to.
const LOCK_CURSORS: &str = "LOCK TABLE erasure_cursors IN SHARE ROW EXCLUSIVE MODE";

/// Deletes documents within the transaction that `connection` has open; last in it, so that the locks are short. The log
/// is left for later.
pub(super) async fn delete(connection: &mut PgConnection, deletions: &[Deletion]) -> Result<(), sqlx::Error> {
    for statement in LOCK {
        sqlx::query(statement).execute(&mut *connection).await?;
    }
    for deletion in schema::ordered(deletions) {
        sqlx::query(schema::PUT_TOMBSTONE)
            .bind(deletion.document.as_bytes())
            .bind(deletion.group.as_str())
            .bind(clamped(deletion.deleted_at_ms))
            .execute(&mut *connection)
            .await?;
        for statement in schema::DELETE_DOCUMENT {
            sqlx::query(statement).bind(deletion.document.as_bytes()).execute(&mut *connection).await?;
        }
    }
    Ok(())
}

/// One step of erasing: one transaction, for which no append waits.
pub(super) async fn erase_step(
    storage: &PostgresStorage,
    runs_max: usize,
) -> Result<ErasureStep, StorageError> {
    let count = sqlx::query_as(schema::COUNT_UNERASED);
    let unerased: Vec<(i64,)> = storage.fetch_all(CALL_TIMEOUT, count).await?;
    if unerased == [(0,)] {
        return Ok(ErasureStep::default());
    }
    let mut lease = storage.readers.lease().await?;
    let work = transaction(&mut lease.connection, runs_max);
    let step = storage.readers.finish(BULK_TIMEOUT, work).await?;
    lease.give_back();
    Ok(step)
}

async fn transaction(connection: &mut PgConnection, runs_max: usize) -> Result<ErasureStep, StorageError> {
    let mut transaction = connection.begin().await.map_err(failed)?;
    sqlx::query(LOCK_CURSORS).execute(&mut *transaction).await.map_err(failed)?;
    let step = step(&mut transaction, runs_max).await?;
    transaction.commit().await.map_err(failed)?;
    Ok(step)
}

async fn step(connection: &mut PgConnection, runs_max: usize) -> Result<ErasureStep, StorageError> {
    sqlx::query(schema::BEGIN_ERASURE).execute(&mut *connection).await.map_err(failed)?;
    let unsearched = sqlx::query_as(schema::READ_UNSEARCHED).bind(clamped(runs_max as u64));
    let origins: Vec<(Vec<u8>, i64)> = unsearched.fetch_all(&mut *connection).await.map_err(failed)?;
    let mut budget = ErasureBudget::new(runs_max);
    let (all_listed, mut at_end) = (origins.len() < runs_max, true);
    for (origin, after) in origins {
        at_end = !budget.is_spent() && erase_on(connection, &origin, after, &mut budget).await?;
        if !at_end {
            break;
        }
    }
    if all_listed && at_end {
        for statement in schema::FINISH_ERASURE {
            sqlx::query(statement).execute(&mut *connection).await.map_err(failed)?;
        }
    }
    let count = sqlx::query_scalar(schema::COUNT_UNERASED);
    let unerased: i64 = count.fetch_one(&mut *connection).await.map_err(failed)?;
    Ok(ErasureStep { runs_erased: budget.rewritten, deletions_left: unsigned(unerased)? })
}

/// Goes on in one origin's log. Returns whether its end was reached.
async fn erase_on(
    connection: &mut PgConnection,
    origin: &[u8],
    after: i64,
    budget: &mut ErasureBudget,
) -> Result<bool, StorageError> {
    let read = sqlx::query_as(schema::READ_LOG)
        .bind(origin)
        .bind(after)
        .bind(clamped(budget.bytes as u64))
        .bind(clamped(budget.runs as u64));
    let rows: Vec<LogRow> = read.fetch_all(&mut *connection).await.map_err(failed)?;
    let found = FoundLog::from_rows(rows)?;
    for run in &found.runs {
        if let Some(body) = budget.erase(run, &found.unerased) {
            let replace = sqlx::query(schema::REPLACE_BODY).bind(origin).bind(clamped(run.last.0));
            replace.bind(&body[..]).execute(&mut *connection).await.map_err(failed)?;
        }
    }
    let (Seq(reached), at_end) = found.reach();
    let put = sqlx::query(schema::PUT_CURSOR).bind(origin).bind(clamped(reached));
    put.execute(connection).await.map_err(failed)?;
    Ok(at_end)
}
