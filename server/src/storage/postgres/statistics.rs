//! Sizes for operators, without reading large tables through.

use super::{CALL_TIMEOUT, PostgresStorage, column};
use crate::storage::failure::unsigned;
use crate::storage::{StorageError, StorageStatistics};

/// From this many rows on, the planner's estimate is good enough; below, counting is quick.
const ESTIMATED_FROM_ROWS: f32 = 100_000.0;

pub(super) async fn read(storage: &PostgresStorage) -> Result<StorageStatistics, StorageError> {
    Ok(StorageStatistics {
        documents: rows(storage, "documents", "SELECT count(*) FROM documents").await?,
        changes: rows(storage, "changes", "SELECT count(*) FROM changes").await?,
        disk_bytes: number(storage, "SELECT pg_database_size(current_database())").await?
            + wal_bytes(storage).await?,
    })
}

async fn rows(storage: &PostgresStorage, table: &str, count: &'static str) -> Result<u64, StorageError> {
    let query = sqlx::query("SELECT reltuples FROM pg_class WHERE oid = to_regclass($1)").bind(table);
    let found = storage.fetch_all(CALL_TIMEOUT, query).await?;
    let estimate: f32 = found.first().map(|row| column(row, "reltuples")).transpose()?.unwrap_or(0.0);
    if estimate >= ESTIMATED_FROM_ROWS {
        return Ok(estimate as u64);
    }
    number(storage, count).await
}

/// The write-ahead log belongs to the whole cluster, and only a privileged role may see its size: else 0.
async fn wal_bytes(storage: &PostgresStorage) -> Result<u64, StorageError> {
    let allowed = sqlx::query("SELECT has_function_privilege('pg_ls_waldir()', 'execute') AS allowed");
    let rows = storage.fetch_all(CALL_TIMEOUT, allowed).await?;
    if !rows.first().map(|row| column(row, "allowed")).transpose()?.unwrap_or(false) {
        return Ok(0);
    }
    number(storage, "SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_waldir()").await
}

async fn number(storage: &PostgresStorage, statement: &'static str) -> Result<u64, StorageError> {
    let rows = storage.fetch_all(CALL_TIMEOUT, sqlx::query(statement)).await?;
    let Some(row) = rows.first() else {
        return Err(StorageError::Fatal("a statistic returned nothing".into()));
    };
    unsigned(sqlx::Row::try_get(row, 0).map_err(super::failed)?)
}
