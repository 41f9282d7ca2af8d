//! Sizes for operators, without reading large tables through.

use super::{CALL_TIMEOUT, PostgresStorage};
use crate::storage::failure::unsigned;
use crate::storage::{StorageError, StorageStatistics};

/// From this many rows on, the planner's estimate is good enough; below, counting is quick.
const ESTIMATED_FROM_ROWS: f32 = 100_000.0;

pub(super) async fn read(storage: &PostgresStorage) -> Result<StorageStatistics, StorageError> {
    Ok(StorageStatistics {
        documents: match estimated_rows(storage, "documents").await? {
            Some(rows) => rows as u64,
            None => number(storage, "SELECT count(*) FROM documents").await?,
        },
        changes: changes(storage).await?,
        disk_bytes: number(storage, "SELECT pg_database_size(current_database())").await?
            + wal_bytes(storage).await?,
    })
}

/// A change that stands in two bundles counts twice.
async fn changes(storage: &PostgresStorage) -> Result<u64, StorageError> {
    let Some(bundles) = estimated_rows(storage, "changes").await? else {
        let count = "SELECT coalesce(sum(octet_length(hashes) / 32), 0)::bigint FROM changes";
        return number(storage, count).await;
    };
    let sampled = "SELECT coalesce(avg(octet_length(hashes) / 32), 1)::float4 AS average \
                   FROM changes TABLESAMPLE SYSTEM (1)";
    let rows: Vec<(f32,)> = storage.fetch_all(CALL_TIMEOUT, sqlx::query_as(sampled)).await?;
    let average = rows.first().map_or(1.0, |(average,)| *average);
    Ok((bundles * average) as u64)
}

/// The planner's estimate, where it is good enough.
async fn estimated_rows(storage: &PostgresStorage, table: &str) -> Result<Option<f32>, StorageError> {
    let query = sqlx::query_as("SELECT reltuples FROM pg_class WHERE oid = to_regclass($1)").bind(table);
    let found: Vec<(f32,)> = storage.fetch_all(CALL_TIMEOUT, query).await?;
    let estimate = found.first().map(|(estimate,)| *estimate);
    Ok(estimate.filter(|rows| *rows >= ESTIMATED_FROM_ROWS))
}

/// The write-ahead log belongs to the whole cluster, and only a privileged role may see its size: else 0.
async fn wal_bytes(storage: &PostgresStorage) -> Result<u64, StorageError> {
    let allowed = sqlx::query_as("SELECT has_function_privilege('pg_ls_waldir()', 'execute') AS allowed");
    let rows: Vec<(bool,)> = storage.fetch_all(CALL_TIMEOUT, allowed).await?;
    if !rows.first().is_some_and(|(allowed,)| *allowed) {
        return Ok(0);
    }
    number(storage, "SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_waldir()").await
}

async fn number(storage: &PostgresStorage, statement: &'static str) -> Result<u64, StorageError> {
    let rows: Vec<(i64,)> = storage.fetch_all(CALL_TIMEOUT, sqlx::query_as(statement)).await?;
    let Some((number,)) = rows.first() else {
        return Err(StorageError::Fatal("a statistic returned nothing".into()));
    };
    unsigned(*number)
}
