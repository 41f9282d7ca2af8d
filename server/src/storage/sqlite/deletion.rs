//! Deletions within an append's transaction (clause 12).
//!
//! Which runs hold a deleted document's changes is not indexed: the log has to be read through. Most of that happens before
//! the transaction, so that other appends do not wait for it; what was appended meanwhile is read within.

use std::collections::{BTreeMap, BTreeSet};

use isobar_protocol::ids::DocumentId;
use isobar_protocol::log::changes_head;
use sqlx::sqlite::SqliteConnection;

use super::{SqliteStorage, failed};
use crate::storage::failure::clamped;
use crate::storage::log_run::{RUNS_SEARCHED_MAX, erase};
use crate::storage::{Deletion, StorageError, schema};

/// The runs of `$1` that end after `$2`, and whether they may hold changes of a document.
const SEARCH: &str = "\
    SELECT last_seq, instr(body, $3) > 0 FROM log WHERE origin = $1 AND last_seq > $2 ORDER BY last_seq LIMIT $4";

const READ_BODY: &str = "SELECT body FROM log WHERE origin = $1 AND last_seq = $2";

/// What was found before the transaction.
#[derive(Default)]
pub(super) struct Seen {
    /// Runs that may hold changes of the documents, by origin and last seq.
    runs: BTreeSet<(Vec<u8>, i64)>,
    /// Up to where each origin's log was read through for all of the documents.
    searched: BTreeMap<Vec<u8>, i64>,
}

/// Reads the log through before the transaction. Does nothing without deletions.
pub(super) async fn look(storage: &SqliteStorage, deletions: &[Deletion]) -> Result<Seen, StorageError> {
    let mut seen = Seen::default();
    if !deletions.is_empty() {
        let mut reader = storage.readers.acquire().await.map_err(failed)?;
        seen.search(&mut reader, deletions).await.map_err(failed)?;
    }
    Ok(seen)
}

impl Seen {
    /// Reads on from where the last search ended.
    async fn search(
        &mut self,
        connection: &mut SqliteConnection,
        deletions: &[Deletion],
    ) -> Result<(), sqlx::Error> {
        let origins: Vec<(Vec<u8>, i64)> =
            sqlx::query_as("SELECT id, seq FROM origins").fetch_all(&mut *connection).await?;
        for (origin, seq) in origins {
            let after = self.searched.insert(origin.clone(), seq).unwrap_or(0);
            for deletion in deletions {
                self.search_origin(connection, &origin, after, &deletion.document).await?;
            }
        }
        Ok(())
    }

    async fn search_origin(
        &mut self,
        connection: &mut SqliteConnection,
        origin: &[u8],
        mut after: i64,
        document: &DocumentId,
    ) -> Result<(), sqlx::Error> {
        loop {
            let page: Vec<(i64, bool)> = sqlx::query_as(SEARCH)
                .bind(origin)
                .bind(after)
                .bind(changes_head(document))
                .bind(RUNS_SEARCHED_MAX)
                .fetch_all(&mut *connection)
                .await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = *last;
            let holding = page.into_iter().filter(|(_, holds)| *holds);
            self.runs.extend(holding.map(|(last, _)| (origin.to_vec(), last)));
        }
    }
}

/// Deletes documents within the transaction that `connection` has open.
pub(super) async fn delete(
    connection: &mut SqliteConnection,
    deletions: &[Deletion],
    mut seen: Seen,
) -> Result<(), StorageError> {
    seen.search(connection, deletions).await.map_err(failed)?;
    let documents: Vec<&DocumentId> = deletions.iter().map(|deletion| &deletion.document).collect();
    for (origin, last) in &seen.runs {
        erase_run(connection, origin, *last, &documents).await?;
    }
    for deletion in deletions {
        remove(connection, deletion).await.map_err(failed)?;
    }
    Ok(())
}

async fn erase_run(
    connection: &mut SqliteConnection,
    origin: &[u8],
    last: i64,
    documents: &[&DocumentId],
) -> Result<(), StorageError> {
    let read = sqlx::query_scalar(READ_BODY).bind(origin).bind(last).fetch_optional(&mut *connection);
    // A run may have been truncated since it was found.
    let Some::<Vec<u8>>(body) = read.await.map_err(failed)? else { return Ok(()) };
    let Some(erased) = erase(&body.into(), documents)? else { return Ok(()) };
    let replace = sqlx::query(schema::REPLACE_BODY).bind(origin).bind(last).bind(Vec::from(erased));
    replace.execute(connection).await.map(drop).map_err(failed)
}

async fn remove(connection: &mut SqliteConnection, deletion: &Deletion) -> Result<(), sqlx::Error> {
    sqlx::query(schema::PUT_TOMBSTONE)
        .bind(deletion.document.as_bytes())
        .bind(deletion.group.as_str())
        .bind(clamped(deletion.deleted_at_ms))
        .execute(&mut *connection)
        .await?;
    for statement in schema::DELETE_DOCUMENT {
        sqlx::query(statement).bind(deletion.document.as_bytes()).execute(&mut *connection).await?;
    }
    Ok(())
}
