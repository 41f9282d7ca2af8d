//! Storage in Postgres, for regions of more than one node.
//!
//! An append is one statement, so it costs one round trip and is a transaction by itself: its first part raises the
//! counter, whose row lock makes the order of seqs the order of commits, and the other parts insert only if that
//! part found the counter where it should be. Batches that delete documents, or are too large for a statement, are
//! several statements in a transaction.
//!
//! Appends have connections of their own, so that loads cannot hold them up.

mod append;
mod connections;
mod deletion;
mod mend;
mod open;
mod origins;
mod prune;
mod seat;
mod statistics;

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::config::LINK_LINEAGE_MAX;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgConnection, PgQueryResult, PgRow};
use sqlx::query::{Query, QueryAs};
use sqlx::{Connection, FromRow, Postgres};

use self::connections::Connections;
use super::clock::{before_now_ms, now_ms};
use super::failure::{clamped, classify, intact, signed, unsigned};
use super::log_run::{FoundCounter, check, judge_refused};
use super::rows::{
    AcknowledgementRow, ContentsRow, CounterRow, ListedRow, MemberRow, MissingRow, OriginRow,
    loaded_document, node_id, read_runs, state_columns,
};
use super::{
    Acknowledgement, Batch, ClaimedOrigin, DocumentState, ErasureStep, ListedDocument, Member, NewBase,
    RunAppend, Storage, StorageError, StorageStatistics, StoredChange, StoredDocument, StoredOrigin,
    StoredRun, new_storage_id, schema,
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
type StatementAs<'q, T> = QueryAs<'q, Postgres, T, PgArguments>;

/// A Postgres database that is connected.
pub struct PostgresStorage {
    writers: Connections,
    readers: Connections,
    options: PgConnectOptions,
}

impl PostgresStorage {
    /// Connects to the database at `url` (`postgres://user:password@host:port/database`) and migrates it
    /// (clause 9).
    pub async fn connect(url: &str) -> Result<Self, StorageError> {
        let options = open::open(url).await?;
        Ok(Self {
            writers: Connections::new(options.clone(), WRITERS_MAX),
            readers: Connections::new(options.clone(), READERS_MAX),
            options,
        })
    }

    async fn fetch_all<T>(&self, limit: Duration, query: StatementAs<'_, T>) -> Result<Vec<T>, StorageError>
    where
        T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
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
        let query = sqlx::query_as(statement).bind(document.as_bytes());
        let rows: Vec<ContentsRow> = self.fetch_all(BULK_TIMEOUT, query).await?;
        rows.into_iter().next().map(ContentsRow::contents).transpose()
    }

    async fn found_region(&self) -> Result<Option<(String, String)>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::READ_REGION)).await?;
        Ok(rows.into_iter().next())
    }

    async fn read_counter(&self, run: &RunAppend) -> Result<Option<FoundCounter>, StorageError> {
        let query =
            sqlx::query_as(schema::READ_COUNTER).bind(&run.origin.0.as_bytes()[..]).bind(signed(run.last.0));
        let rows: Vec<CounterRow> = self.fetch_all(BULK_TIMEOUT, query).await?;
        rows.into_iter().next().map(CounterRow::found).transpose()
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
        anew: bool,
    ) -> Result<ClaimedOrigin, StorageError> {
        if let Some((name, _)) = self.found_region().await? {
            schema::check_region(region, &name)?;
        }
        let mut lease = self.readers.lease().await?;
        let work = origins::claim(&mut lease.connection, region, group, slot, anew);
        let row = self.readers.finish(CALL_TIMEOUT, work).await?;
        lease.give_back();
        row.claimed(group)
    }

    async fn take_seat(&self) -> Result<super::seat::Seat, StorageError> {
        seat::take(self.options.clone()).await
    }

    async fn register_node(&self, node: NodeId) -> Result<(), StorageError> {
        self.execute(sqlx::query(schema::REGISTER_NODE).bind(&node.0[..])).await?;
        self.execute(sqlx::query(schema::FORGET_NODES).bind(LINK_LINEAGE_MAX as i64)).await?;
        Ok(())
    }

    async fn registered_nodes(&self) -> Result<Vec<NodeId>, StorageError> {
        let read = sqlx::query_as(schema::READ_NODES).bind(LINK_LINEAGE_MAX as i64);
        let rows: Vec<(Vec<u8>,)> = self.fetch_all(CALL_TIMEOUT, read).await?;
        rows.iter().map(|(id,)| node_id(id)).collect()
    }

    async fn origins(&self) -> Result<Vec<StoredOrigin>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::READ_ORIGINS)).await?;
        rows.into_iter().map(OriginRow::origin).collect()
    }

    async fn append(&self, batch: &Batch) -> Result<(), StorageError> {
        check(batch);
        if append::append(self, batch).await? {
            return Ok(());
        }
        let mut found = Vec::new();
        for run in &batch.runs {
            found.push(self.read_counter(run).await?);
        }
        judge_refused(&batch.runs, &found)
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let query = sqlx::query_as(schema::LOAD_DOCUMENT).bind(document.as_bytes());
        loaded_document(self.fetch_all(BULK_TIMEOUT, query).await?)
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
        let query = sqlx::query_as(schema::READ_GENERATION).bind(document.as_bytes());
        let rows: Vec<(i64,)> = self.fetch_all(CALL_TIMEOUT, query).await?;
        let found = rows.first().map_or(0, |(generation,)| *generation);
        Err(StorageError::Conflict { expected: replaces, found: unsigned(found)? })
    }

    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError> {
        let covered: HashSet<ChangeHash> = covered.iter().copied().collect();
        prune::prune(self, document, &covered).await
    }

    async fn mend_changes(&self, document: &DocumentId, good: &[StoredChange]) -> Result<(), StorageError> {
        mend::mend(self, document, good).await
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
        bytes_max: usize,
    ) -> Result<Vec<StoredRun>, StorageError> {
        let query = sqlx::query_as(schema::READ_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(after.0))
            .bind(clamped(bytes_max.max(1) as u64))
            .bind(schema::RUNS_READ_MAX);
        read_runs(self.fetch_all(BULK_TIMEOUT, query).await?, after)
    }

    async fn truncate_log(
        &self,
        origin: OriginId,
        up_to: Seq,
        older_than: Duration,
    ) -> Result<(), StorageError> {
        let query = sqlx::query(schema::TRUNCATE_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(up_to.0))
            .bind(before_now_ms(older_than));
        self.execute(query).await.map(drop)
    }

    async fn erase_step(&self, runs_max: usize) -> Result<ErasureStep, StorageError> {
        deletion::erase_step(self, runs_max).await
    }

    async fn adopt_origins(
        &self,
        origins: &[StoredOrigin],
        missing: &[MissingDocument],
    ) -> Result<(), StorageError> {
        let mut lease = self.readers.lease().await?;
        let work = origins::adopt(&mut lease.connection, origins, missing);
        self.readers.finish(BULK_TIMEOUT, work).await?;
        lease.give_back();
        Ok(())
    }

    async fn missing_documents(&self) -> Result<Vec<MissingDocument>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::READ_MISSING_DOCUMENTS)).await?;
        rows.into_iter().map(MissingRow::missing).collect()
    }

    async fn document_found(&self, document: &DocumentId) -> Result<(), StorageError> {
        let query = sqlx::query(schema::REMOVE_MISSING_DOCUMENT).bind(document.as_bytes());
        self.execute(query).await.map(drop)
    }

    async fn note_acknowledgements(&self, news: &[Acknowledgement]) -> Result<(), StorageError> {
        let mut lease = self.readers.lease().await?;
        let work = origins::note_acknowledgements(&mut lease.connection, news);
        self.readers.finish(CALL_TIMEOUT, work).await?;
        lease.give_back();
        Ok(())
    }

    async fn acknowledgements(&self) -> Result<Vec<Acknowledgement>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::READ_ACKNOWLEDGEMENTS)).await?;
        rows.into_iter().map(AcknowledgementRow::acknowledgement).collect()
    }

    async fn note_member(&self, member: &Member) -> Result<(), StorageError> {
        let query = sqlx::query(schema::NOTE_MEMBER)
            .bind(member.region.as_str())
            .bind(clamped(member.linked_at_ms))
            .bind(member.needs_snapshot);
        self.execute(query).await.map(drop)
    }

    async fn members(&self) -> Result<Vec<Member>, StorageError> {
        let rows = self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::READ_MEMBERS)).await?;
        rows.into_iter().map(MemberRow::member).collect()
    }

    async fn forget_member(&self, region: &RegionName) -> Result<bool, StorageError> {
        let mut lease = self.readers.lease().await?;
        let work = origins::forget_member(&mut lease.connection, region);
        let was_known = self.readers.finish(CALL_TIMEOUT, work).await?;
        lease.give_back();
        Ok(was_known)
    }

    async fn find_document(&self, document: &DocumentId) -> Result<Option<ListedDocument>, StorageError> {
        let query = sqlx::query_as(schema::FIND_DOCUMENT).bind(document.as_bytes());
        let rows: Vec<ListedRow> = self.fetch_all(CALL_TIMEOUT, query).await?;
        rows.into_iter().next().map(ListedRow::listed).transpose()
    }

    async fn list_documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let query = sqlx::query_as(schema::LIST_DOCUMENTS)
            .bind(after.map_or(&[][..], DocumentId::as_bytes))
            .bind(i64::from(limit));
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        rows.into_iter().map(ListedRow::listed).collect()
    }

    async fn list_quarantined(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let query = sqlx::query_as(schema::LIST_QUARANTINED)
            .bind(after.map_or(&[][..], DocumentId::as_bytes))
            .bind(i64::from(limit));
        let rows = self.fetch_all(CALL_TIMEOUT, query).await?;
        rows.into_iter().map(ListedRow::listed).collect()
    }

    async fn count_quarantined(&self) -> Result<u64, StorageError> {
        let rows: Vec<(i64,)> =
            self.fetch_all(CALL_TIMEOUT, sqlx::query_as(schema::COUNT_QUARANTINED)).await?;
        unsigned(rows.first().map_or(0, |(count,)| *count))
    }

    async fn create_document(
        &self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<(), StorageError> {
        let query = sqlx::query(schema::CREATE_DOCUMENT)
            .bind(document.as_bytes())
            .bind(group.as_str())
            .bind(now_ms());
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
