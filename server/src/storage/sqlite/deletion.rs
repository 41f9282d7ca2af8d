//! Deletions within an append's transaction, and the erasing of the log that follows (clauses 12 and 18).

use isobar_protocol::ids::Seq;
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::{SqliteStorage, failed};
use crate::storage::failure::{clamped, unsigned};
use crate::storage::log_run::ErasureBudget;
use crate::storage::rows::{FoundLog, LogRow};
use crate::storage::{Deletion, ErasureStep, StorageError, schema};

/// Deletes documents within the transaction that `connection` has open. The log is left for later.
pub(super) async fn delete(
    connection: &mut SqliteConnection,
    deletions: &[Deletion],
) -> Result<(), sqlx::Error> {
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

/// One step of erasing: one transaction.
pub(super) async fn erase_step(
    storage: &SqliteStorage,
    runs_max: usize,
) -> Result<ErasureStep, StorageError> {
    // Without the write lock, because most of the time there is nothing to do.
    let count = sqlx::query_scalar(schema::COUNT_UNERASED);
    let unerased: i64 = count.fetch_one(&storage.readers).await.map_err(failed)?;
    if unerased == 0 {
        return Ok(ErasureStep::default());
    }
    let mut writer = storage.writer().await?;
    let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    let step = step(&mut transaction, runs_max).await?;
    transaction.commit().await.map_err(failed)?;
    Ok(step)
}

async fn step(connection: &mut SqliteConnection, runs_max: usize) -> Result<ErasureStep, StorageError> {
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
    connection: &mut SqliteConnection,
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
            replace.bind(Vec::from(body)).execute(&mut *connection).await.map_err(failed)?;
        }
    }
    let (Seq(reached), at_end) = found.reach();
    let put = sqlx::query(schema::PUT_CURSOR).bind(origin).bind(clamped(reached));
    put.execute(connection).await.map_err(failed)?;
    Ok(at_end)
}
