//! Deletions within an append's transaction (clause 12).
//!
//! Which runs hold a deleted document's changes is not indexed: the log has to be read through. Most of that happens before
//! the transaction, so that the origin's other appends do not wait for it; what was appended meanwhile is read within.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use isobar_protocol::ids::DocumentId;
use isobar_protocol::log::changes_head;
use sqlx::postgres::PgConnection;

use super::failed;
use crate::storage::failure::clamped;
use crate::storage::log_run::{RUNS_SEARCHED_MAX, erase};
use crate::storage::{Deletion, StorageError, schema};

/// The runs of `$1` that end after `$2`, and whether they may hold changes of a document.
const SEARCH: &str = "\
    SELECT last_seq, position($3::bytea IN body) > 0 FROM log \
    WHERE origin = $1 AND last_seq > $2 ORDER BY last_seq LIMIT $4";

/// Locked: another node may be erasing another document's changes from it.
const READ_BODY: &str = "SELECT body FROM log WHERE origin = $1 AND last_seq = $2 FOR UPDATE";

/// Appends and installs of bases wait for the locks, and begin to read after they were given: none can pass over the
/// tombstone and store what is being deleted. Reads do not wait.
const LOCK: [&str; 2] =
    ["LOCK TABLE documents IN SHARE ROW EXCLUSIVE MODE", "LOCK TABLE bases IN SHARE ROW EXCLUSIVE MODE"];

/// The runs that were found so far.
#[derive(Default)]
pub(super) struct Seen {
    /// Runs that may hold changes of the documents, by origin and last seq.
    runs: BTreeSet<(Vec<u8>, i64)>,
    /// Up to where each origin's log was read through for all of the documents.
    searched: BTreeMap<Vec<u8>, i64>,
}

impl Seen {
    /// Reads on from where the last search ended.
    pub async fn search(
        &mut self,
        connection: &mut PgConnection,
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
        connection: &mut PgConnection,
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
    connection: &mut PgConnection,
    deletions: &[Deletion],
    mut seen: Seen,
) -> Result<(), StorageError> {
    seen.search(connection, deletions).await.map_err(failed)?;
    let documents: Vec<&DocumentId> = deletions.iter().map(|deletion| &deletion.document).collect();
    for (origin, last) in &seen.runs {
        erase_run(connection, origin, *last, &documents).await?;
    }
    remove(connection, deletions).await.map_err(failed)
}

async fn erase_run(
    connection: &mut PgConnection,
    origin: &[u8],
    last: i64,
    documents: &[&DocumentId],
) -> Result<(), StorageError> {
    let read = sqlx::query_scalar(READ_BODY).bind(origin).bind(last).fetch_optional(&mut *connection);
    // A run may have been truncated since it was found.
    let Some::<Vec<u8>>(body) = read.await.map_err(failed)? else { return Ok(()) };
    let Some(erased) = erase(&Bytes::from(body), documents)? else { return Ok(()) };
    let replace = sqlx::query(schema::REPLACE_BODY).bind(origin).bind(last).bind(&erased[..]);
    replace.execute(connection).await.map(drop).map_err(failed)
}

/// Last in the transaction, so that the locks are short.
async fn remove(connection: &mut PgConnection, deletions: &[Deletion]) -> Result<(), sqlx::Error> {
    for statement in LOCK {
        sqlx::query(statement).execute(&mut *connection).await?;
    }
    for deletion in deletions {
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
