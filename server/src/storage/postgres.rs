//! Storage in Postgres, for regions of more than one node.
//!
//! An append is one statement, so it costs one round trip and is a transaction by itself: its first part raises the
//! counter, whose row lock makes the order of seqs the order of commits, and the other parts insert only if that
//! part found the counter where it should be.
//!
//! Appends have connections of their own, so that loads cannot hold them up.

mod append;
mod connections;
mod open;
mod prune;
mod statistics;

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgArguments, PgConnection, PgQueryResult, PgRow};
use sqlx::query::Query;
use sqlx::{Connection, Postgres, Row};
use uuid::Uuid;

use self::connections::Connections;
use super::bundle::Tail;
use super::failure::{clamped, classify, intact, signed, unsigned};
use super::log_run::{FoundCounter, LogRun, gather, judge_refused};
use super::schema::{self, state_columns, state_from_columns};
use super::{
    ClaimedOrigin, DocumentAppend, DocumentState, LogEntry, NewBase, Storage, StorageError,
    StorageStatistics, StoredBase, StoredDocument, new_storage_id,
};

/// Connections for appends. An origin's appends follow each other; this allows a few origins and the writes of
/// compaction.
const WRITERS_MAX: u32 = 4;

/// Connections for everything else. A server accepts a hundred by default, and a region has several nodes.
const READERS_MAX: u32 = 8;

/// How long a call may take that moves little data. Far beyond what a healthy database needs, and still short enough
/// that clients are told soon.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a call may take that moves a whole document.
const BULK_TIMEOUT: Duration = Duration::from_secs(60);

type Statement<'q> = Query<'q, Postgres, PgArguments>;

/// A Postgres database that is connected.
pub struct PostgresStorage {
    writers: Connections,
    readers: Connections,
}

impl PostgresStorage {
    /// Connects to the database at `url` (`postgres://user:password@host:port/database`) and migrates it
    /// (clause 9).
    pub async fn connect(url: &str) -> Result<Self, StorageError> {
        let options = open::open(url).await?;
        Ok(Self {
            writers: Connections::new(options.clone(), WRITERS_MAX),
            readers: Connections::new(options, READERS_MAX),
        })
    }

    async fn fetch_all(&self, limit: Duration, query: Statement<'_>) -> Result<Vec<PgRow>, StorageError> {
        let mut lease = self.readers.lease().await?;
        let rows = self.readers.finish(limit, query.fetch_all(&mut lease.connection)).await?;
        lease.give_back();
        Ok(rows)
    }

    async fn execute(&self, query: Statement<'_>) -> Result<PgQueryResult, StorageError> {
        let mut lease = self.readers.lease().await?;
        let done = self.readers.finish(CALL_TIMEOUT, query.execute(&mut lease.connection)).await?;
        lease.give_back();
        Ok(done)
    }

    async fn read_contents(
        &self,
        statement: &'static str,
        document: &DocumentId,
    ) -> Result<Option<(u64, Bytes)>, StorageError> {
        let rows = self.fetch_all(BULK_TIMEOUT, sqlx::query(statement).bind(document.as_bytes())).await?;
        rows.first()
            .map(|row| Ok((unsigned(column(row, "generation")?)?, bytes(row, "contents")?)))
            .transpose()
    }

    async fn found_region(&self) -> Result<Option<(String, String)>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query(schema::READ_REGION)).await?;
        rows.first().map(|row| Ok((column(row, "name")?, column(row, "storage_id")?))).transpose()
    }

    async fn read_counter(&self, origin: OriginId, end: Seq) -> Result<FoundCounter, StorageError> {
        let query = sqlx::query(schema::READ_COUNTER).bind(&origin.0.as_bytes()[..]).bind(signed(end.0));
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        let Some(row) = rows.first() else {
            return Err(StorageError::Fatal(format!("origin {origin:?} is not in the database").into()));
        };
        let has_run = column::<Option<i64>>(row, "first_seq")?.is_some();
        Ok(FoundCounter {
            incarnation: Incarnation(unsigned(column(row, "incarnation")?)?),
            seq: Seq(unsigned(column(row, "seq")?)?),
            run_at_end: if has_run { Some(run_from_row(row, end)?) } else { None },
        })
    }
}

/// Whether an error that Postgres reported may pass, by its SQLSTATE.
///
/// Class 08 is a lost connection and class 40 asks for a retry. 53200, 53300 and 53400 are limits that others exhaust
/// (53100, a full disk, is not among them). 55006 and 55P03 are locks, 57014 a cancelled or overlong statement,
/// 57P01 to 57P03 and 57P05 a server that stops, starts or ends the session, 25P03 a transaction that stood idle.
fn may_pass(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    match &*code {
        "53200" | "53300" | "53400" | "55006" | "55P03" | "57014" | "57P01" | "57P02" | "57P03" | "57P05"
        | "25P03" => true,
        code => code.starts_with("08") || code.starts_with("40"),
    }
}

fn failed(error: sqlx::Error) -> StorageError {
    classify(error, may_pass)
}

fn column<'r, T>(row: &'r PgRow, name: &str) -> Result<T, StorageError>
where
    T: sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>,
{
    row.try_get(name).map_err(failed)
}

fn bytes(row: &PgRow, name: &str) -> Result<Bytes, StorageError> {
    column::<&[u8]>(row, name).map(Bytes::copy_from_slice)
}

fn run_from_row(row: &PgRow, last: Seq) -> Result<LogRun, StorageError> {
    let first = Seq(unsigned(column(row, "first_seq")?)?);
    Ok(LogRun { first, last, entries: column(row, "entries")? })
}

fn document_from_row(row: &PgRow) -> Result<StoredDocument, StorageError> {
    let base = match column::<Option<i64>>(row, "generation")? {
        None => None,
        Some(generation) => Some(StoredBase {
            generation: unsigned(generation)?,
            summary: bytes(row, "summary")?,
            chunk_bytes: unsigned(column(row, "chunk_bytes")?)?,
            pruned: column(row, "pruned")?,
        }),
    };
    Ok(StoredDocument {
        group: intact(PlacementGroup::new(column(row, "placement_group")?))?,
        state: state_from_columns(column(row, "state")?, column(row, "state_reason")?)?,
        base,
        tail: Vec::new(),
    })
}

/// Replaces a base in one transaction; `false` if the one to be replaced is not there.
async fn put_base(
    connection: &mut PgConnection,
    document: &DocumentId,
    replaces: u64,
    base: &NewBase,
) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let statement = if replaces == 0 { schema::INSERT_BASE } else { schema::UPDATE_BASE };
    let mut put = sqlx::query(statement)
        .bind(document.as_bytes())
        .bind(signed(replaces + 1))
        .bind(signed(base.chunk.len() as u64))
        .bind(&base.summary[..]);
    if replaces > 0 {
        put = put.bind(signed(replaces));
    }
    if put.execute(&mut *transaction).await?.rows_affected() == 0 {
        transaction.rollback().await?;
        return Ok(false);
    }
    sqlx::query(schema::PUT_BASE_CONTENTS)
        .bind(document.as_bytes())
        .bind(signed(replaces + 1))
        .bind(&base.index[..])
        .bind(&base.chunk[..])
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(true)
}

#[async_trait]
impl Storage for PostgresStorage {
    async fn region_identity(&self, region: &RegionName) -> Result<StorageId, StorageError> {
        let offered = new_storage_id();
        if self.found_region().await?.is_none() {
            let put = sqlx::query(schema::PUT_REGION).bind(region.as_str()).bind(offered.as_str());
            self.execute(put).await?;
        }
        // Read again: another node's may have been first.
        let Some((name, storage_id)) = self.found_region().await? else {
            return Err(StorageError::Fatal("the region's row is gone".into()));
        };
        schema::check_region(region, &name)?;
        intact(StorageId::new(&storage_id))
    }

    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
    ) -> Result<ClaimedOrigin, StorageError> {
        if let Some((name, _)) = self.found_region().await? {
            schema::check_region(region, &name)?;
        }
        let id = Uuid::new_v4();
        let query = sqlx::query(schema::CLAIM_ORIGIN)
            .bind(&id.as_bytes()[..])
            .bind(region.as_str())
            .bind(group.as_str())
            .bind(i64::from(slot));
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        let Some(row) = rows.first() else {
            return Err(StorageError::Fatal("claiming an origin returned nothing".into()));
        };
        Ok(ClaimedOrigin {
            id: schema::origin_id(column(row, "id")?)?,
            group: group.clone(),
            incarnation: Incarnation(unsigned(column(row, "incarnation")?)?),
            last_seq: Seq(unsigned(column(row, "seq")?)?),
        })
    }

    async fn append(
        &self,
        origin: &ClaimedOrigin,
        first_seq: Seq,
        batch: &[DocumentAppend],
    ) -> Result<Seq, StorageError> {
        let Some(run) = LogRun::pack(first_seq, batch) else {
            return Ok(Seq(first_seq.0 - 1));
        };
        let bytes: usize =
            batch.iter().flat_map(|append| &append.changes).map(|change| change.bytes.len()).sum();
        let limit = if bytes > append::STATEMENT_BYTES_MAX { BULK_TIMEOUT } else { CALL_TIMEOUT };
        let mut lease = self.writers.lease().await?;
        let work = append::append_batch(&mut lease.connection, origin, &run, batch);
        let raised = self.writers.finish(limit, work).await?;
        lease.give_back();
        if raised {
            return Ok(run.last);
        }
        let found = self.read_counter(origin.id, run.last).await?;
        judge_refused(origin, &run, found)
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let query = sqlx::query(schema::LOAD_DOCUMENT).bind(document.as_bytes());
        let mut loaded = None;
        let mut tail = Tail::default();
        for row in &self.fetch_all(BULK_TIMEOUT, query).await? {
            if column::<Option<&str>>(row, "placement_group")?.is_some() {
                loaded = Some(document_from_row(row)?);
            } else {
                let first = Seq(unsigned(column(row, "first_seq")?)?);
                tail.push(first, column(row, "hashes")?, &bytes(row, "changes")?)?;
            }
        }
        Ok(loaded.map(|document| StoredDocument { tail: tail.into_changes(), ..document }))
    }

    async fn read_base_chunk(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        self.read_contents(schema::READ_BASE_CHUNK, document).await
    }

    async fn read_base_index(&self, document: &DocumentId) -> Result<Option<(u64, Bytes)>, StorageError> {
        self.read_contents(schema::READ_BASE_INDEX, document).await
    }

    async fn install_base(
        &self,
        document: &DocumentId,
        replaces: u64,
        base: NewBase,
    ) -> Result<u64, StorageError> {
        let mut lease = self.readers.lease().await?;
        let work = put_base(&mut lease.connection, document, replaces, &base);
        let installed = self.readers.finish(BULK_TIMEOUT, work).await?;
        lease.give_back();
        if installed {
            return Ok(replaces + 1);
        }
        let query = sqlx::query(schema::READ_GENERATION).bind(document.as_bytes());
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        let found = rows.first().map(|row| column(row, "generation")).transpose()?;
        Err(StorageError::Conflict { expected: replaces, found: unsigned(found.unwrap_or(0))? })
    }

    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError> {
        let covered: HashSet<ChangeHash> = covered.iter().copied().collect();
        prune::prune(self, document, &covered).await
    }

    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError> {
        let query = sqlx::query(schema::FINISH_PRUNE).bind(document.as_bytes()).bind(clamped(generation));
        self.execute(query).await.map(drop)
    }

    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError> {
        let (state, reason) = state_columns(state);
        // Postgres has no NUL in its texts, and the reason may quote a client's.
        let reason = reason.map(|reason| reason.replace('\0', "\u{fffd}"));
        let query = sqlx::query(schema::SET_STATE).bind(document.as_bytes()).bind(state).bind(reason);
        self.execute(query).await.map(drop)
    }

    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        limit: u32,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let query = sqlx::query(schema::READ_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(after.0))
            .bind(clamped(after.0.saturating_add(u64::from(limit))));
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        let runs: Result<Vec<LogRun>, StorageError> =
            rows.iter().map(|row| run_from_row(row, Seq(unsigned(column(row, "last_seq")?)?))).collect();
        gather(&runs?, after, limit as usize)
    }

    async fn truncate_log(&self, origin: OriginId, up_to: Seq) -> Result<(), StorageError> {
        let query = sqlx::query(schema::TRUNCATE_LOG).bind(&origin.0.as_bytes()[..]).bind(clamped(up_to.0));
        self.execute(query).await.map(drop)
    }

    async fn statistics(&self) -> Result<StorageStatistics, StorageError> {
        statistics::read(self).await
    }

    async fn check(&self) -> Result<(), StorageError> {
        self.execute(sqlx::query("SELECT 1")).await.map(drop)
    }

    async fn close(&self) {
        self.writers.close().await;
        self.readers.close().await;
    }
}
