//! Storage in an embedded SQLite database, the default of a single node.
//!
//! One connection writes, a few read. The writer is a task queue by itself: whoever holds its lock has the
//! database's only write transaction. Readers see the last commit and wait for nobody. Several processes may have
//! the file open; the write lock of the file keeps them apart, at the price of waiting.
//!
//! The file does not shrink by itself: what pruning frees is reused.

mod append;
mod deletion;
mod mend;
mod open;
mod origins;
mod prune;
mod rows;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::config::LINK_LINEAGE_MAX;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::link::handshake::NodeId;
use sqlx::error::DatabaseError;
use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, SqlitePool};
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};

use self::append::Appended;
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

/// A SQLite database that is open.
pub struct SqliteStorage {
    path: PathBuf,
    /// `None` once closed.
    writer: Mutex<Option<Writer>>,
    readers: SqlitePool,
}

struct Writer {
    connection: SqliteConnection,
    /// True while an append's script runs, and after one that was given up: its transaction may be open.
    unsettled: bool,
}

impl SqliteStorage {
    /// Opens the database in the file `path`, creating file and directory as need be, and migrates it (clause 9).
    pub async fn open(path: &Path) -> Result<Self, StorageError> {
        let (writer, readers) = open::open(path).await?;
        Ok(Self {
            path: path.to_owned(),
            writer: Mutex::new(Some(Writer { connection: writer, unsettled: false })),
            readers,
        })
    }

    async fn settled_writer(&self) -> Result<MappedMutexGuard<'_, Writer>, StorageError> {
        let mut writer = MutexGuard::try_map(self.writer.lock().await, Option::as_mut)
            .map_err(|_| StorageError::Fatal("the storage is closed".into()))?;
        writer.settle().await?;
        Ok(writer)
    }

    async fn writer(&self) -> Result<MappedMutexGuard<'_, SqliteConnection>, StorageError> {
        Ok(MappedMutexGuard::map(self.settled_writer().await?, |writer| &mut writer.connection))
    }

    async fn read_contents(
        &self,
        statement: &'static str,
        document: &DocumentId,
    ) -> Result<Option<(u64, Bytes)>, StorageError> {
        let row: Option<ContentsRow> = sqlx::query_as(statement)
            .bind(document.as_bytes())
            .fetch_optional(&self.readers)
            .await
            .map_err(failed)?;
        row.map(ContentsRow::contents).transpose()
    }
}

impl Writer {
    /// Ends what an append left open.
    async fn settle(&mut self) -> Result<(), StorageError> {
        if !self.unsettled {
            return Ok(());
        }
        match sqlx::raw_sql("ROLLBACK").execute(&mut self.connection).await {
            // Code 1: there was nothing to roll back.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("1") => {}
            outcome => outcome.map(drop).map_err(failed)?,
        }
        self.unsettled = false;
        Ok(())
    }
}

/// Whether an error that SQLite reported may pass: another process holds a lock (5 busy, 6 locked, 15 the locking
/// protocol of the write-ahead log), or the statement was interrupted (9). What remains is the disk (10 I/O error, 13
/// full, 14 cannot open), the file (8 read-only, 11 corrupt, 26 no database), memory (7), or a mistake of ours.
fn may_pass(error: &dyn DatabaseError) -> bool {
    let code: Option<u32> = error.code().and_then(|code| code.parse().ok());
    matches!(code.map(|extended| extended & 0xff), Some(5 | 6 | 9 | 15))
}

fn failed(error: sqlx::Error) -> StorageError {
    classify(error, may_pass)
}

/// Finds out what a run met whose counter was elsewhere.
async fn read_counter(
    connection: &mut SqliteConnection,
    run: &RunAppend,
) -> Result<Option<FoundCounter>, StorageError> {
    let row: Option<CounterRow> = sqlx::query_as(schema::READ_COUNTER)
        .bind(&run.origin.0.as_bytes()[..])
        .bind(signed(run.last.0))
        .fetch_optional(connection)
        .await
        .map_err(failed)?;
    row.map(CounterRow::found).transpose()
}

async fn found_region(connection: &mut SqliteConnection) -> Result<Option<(String, String)>, StorageError> {
    sqlx::query_as(schema::READ_REGION).fetch_optional(connection).await.map_err(failed)
}

#[async_trait]
impl Storage for SqliteStorage {
    async fn region_identity(&self, region: &RegionName) -> Result<StorageId, StorageError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        if let Some((name, storage_id)) = found_region(&mut transaction).await? {
            schema::check_region(region, &name)?;
            return intact(StorageId::new(&storage_id));
        }
        let storage_id = new_storage_id();
        sqlx::query(schema::PUT_REGION)
            .bind(region.as_str())
            .bind(storage_id.as_str())
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(storage_id)
    }

    async fn claim_origin(
        &self,
        region: &RegionName,
        group: &PlacementGroup,
        slot: u32,
        anew: bool,
    ) -> Result<ClaimedOrigin, StorageError> {
        let mut writer = self.writer().await?;
        origins::claim(&mut writer, region, group, slot, anew).await
    }

    async fn register_node(&self, node: NodeId) -> Result<(), StorageError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let register = sqlx::query(schema::REGISTER_NODE).bind(&node.0[..]);
        register.execute(&mut *transaction).await.map_err(failed)?;
        let forget = sqlx::query(schema::FORGET_NODES).bind(LINK_LINEAGE_MAX as i64);
        forget.execute(&mut *transaction).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    async fn registered_nodes(&self) -> Result<Vec<NodeId>, StorageError> {
        let read = sqlx::query_scalar(schema::READ_NODES).bind(LINK_LINEAGE_MAX as i64);
        let rows: Vec<Vec<u8>> = read.fetch_all(&self.readers).await.map_err(failed)?;
        rows.iter().map(|id| node_id(id)).collect()
    }

    async fn origins(&self) -> Result<Vec<StoredOrigin>, StorageError> {
        let rows: Vec<OriginRow> =
            sqlx::query_as(schema::READ_ORIGINS).fetch_all(&self.readers).await.map_err(failed)?;
        rows.into_iter().map(OriginRow::origin).collect()
    }

    async fn append(&self, batch: &Batch) -> Result<(), StorageError> {
        check(batch);
        if batch.runs.is_empty() && batch.changes.is_empty() && batch.deletions.is_empty() {
            return Ok(());
        }
        let mut writer = self.settled_writer().await?;
        writer.unsettled = true;
        let appended = append::run(&mut writer.connection, batch).await?;
        if let Appended::Committed = appended {
            writer.unsettled = false;
            return Ok(());
        }
        writer.settle().await?;
        let mut found = Vec::new();
        for run in &batch.runs {
            found.push(read_counter(&mut writer.connection, run).await?);
        }
        judge_refused(&batch.runs, &found)
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let query = sqlx::query_as(schema::LOAD_DOCUMENT).bind(document.as_bytes());
        loaded_document(query.fetch_all(&self.readers).await.map_err(failed)?)
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
        let generation = replaces + 1;
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let statement = if replaces == 0 { schema::INSERT_BASE } else { schema::UPDATE_BASE };
        let mut put = sqlx::query(statement)
            .bind(document.as_bytes())
            .bind(signed(generation))
            .bind(signed(base.chunk.len() as u64))
            .bind(&base.summary[..]);
        if replaces > 0 {
            put = put.bind(signed(replaces));
        }
        if put.execute(&mut *transaction).await.map_err(failed)?.rows_affected() == 0 {
            let found: Option<i64> = sqlx::query_scalar(schema::READ_GENERATION)
                .bind(document.as_bytes())
                .fetch_optional(&mut *transaction)
                .await
                .map_err(failed)?;
            return Err(StorageError::Conflict { expected: replaces, found: unsigned(found.unwrap_or(0))? });
        }
        sqlx::query(schema::PUT_BASE_CONTENTS)
            .bind(document.as_bytes())
            .bind(signed(generation))
            .bind(Vec::from(base.index))
            .bind(Vec::from(base.chunk))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(generation)
    }

    async fn prune_changes(&self, document: &DocumentId, covered: &[ChangeHash]) -> Result<(), StorageError> {
        let covered: HashSet<ChangeHash> = covered.iter().copied().collect();
        prune::prune(self, document, &covered).await
    }

    async fn mend_changes(&self, document: &DocumentId, good: &[StoredChange]) -> Result<(), StorageError> {
        mend::mend(self, document, good).await
    }

    async fn finish_prune(&self, document: &DocumentId, generation: u64) -> Result<(), StorageError> {
        sqlx::query(schema::FINISH_PRUNE)
            .bind(document.as_bytes())
            .bind(signed(generation))
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn set_state(&self, document: &DocumentId, state: &DocumentState) -> Result<(), StorageError> {
        let (state, reason) = state_columns(state);
        sqlx::query(schema::SET_STATE)
            .bind(document.as_bytes())
            .bind(state)
            .bind(reason)
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn read_log(
        &self,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    ) -> Result<Vec<StoredRun>, StorageError> {
        let rows = sqlx::query_as(schema::READ_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(after.0))
            .bind(clamped(bytes_max.max(1) as u64))
            .bind(schema::RUNS_READ_MAX)
            .fetch_all(&self.readers)
            .await
            .map_err(failed)?;
        read_runs(rows, after)
    }

    async fn truncate_log(
        &self,
        origin: OriginId,
        up_to: Seq,
        older_than: Duration,
    ) -> Result<(), StorageError> {
        sqlx::query(schema::TRUNCATE_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(up_to.0))
            .bind(before_now_ms(older_than))
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn erase_step(&self, runs_max: usize) -> Result<ErasureStep, StorageError> {
        deletion::erase_step(self, runs_max).await
    }

    async fn adopt_origins(
        &self,
        origins: &[StoredOrigin],
        missing: &[MissingDocument],
    ) -> Result<(), StorageError> {
        let mut writer = self.writer().await?;
        origins::adopt(&mut writer, origins, missing).await.map_err(failed)
    }

    async fn missing_documents(&self) -> Result<Vec<MissingDocument>, StorageError> {
        let rows: Vec<MissingRow> =
            sqlx::query_as(schema::READ_MISSING_DOCUMENTS).fetch_all(&self.readers).await.map_err(failed)?;
        rows.into_iter().map(MissingRow::missing).collect()
    }

    async fn document_found(&self, document: &DocumentId) -> Result<(), StorageError> {
        sqlx::query(schema::REMOVE_MISSING_DOCUMENT)
            .bind(document.as_bytes())
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn note_acknowledgements(&self, news: &[Acknowledgement]) -> Result<(), StorageError> {
        let mut writer = self.writer().await?;
        origins::note_acknowledgements(&mut writer, news).await.map_err(failed)
    }

    async fn acknowledgements(&self) -> Result<Vec<Acknowledgement>, StorageError> {
        let rows: Vec<AcknowledgementRow> =
            sqlx::query_as(schema::READ_ACKNOWLEDGEMENTS).fetch_all(&self.readers).await.map_err(failed)?;
        rows.into_iter().map(AcknowledgementRow::acknowledgement).collect()
    }

    async fn note_member(&self, member: &Member) -> Result<(), StorageError> {
        sqlx::query(schema::NOTE_MEMBER)
            .bind(member.region.as_str())
            .bind(clamped(member.linked_at_ms))
            .bind(member.needs_snapshot)
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn members(&self) -> Result<Vec<Member>, StorageError> {
        let rows: Vec<MemberRow> =
            sqlx::query_as(schema::READ_MEMBERS).fetch_all(&self.readers).await.map_err(failed)?;
        rows.into_iter().map(MemberRow::member).collect()
    }

    async fn forget_member(&self, region: &RegionName) -> Result<bool, StorageError> {
        let mut writer = self.writer().await?;
        origins::forget_member(&mut writer, region).await.map_err(failed)
    }

    async fn find_document(&self, document: &DocumentId) -> Result<Option<ListedDocument>, StorageError> {
        let row: Option<ListedRow> = sqlx::query_as(schema::FIND_DOCUMENT)
            .bind(document.as_bytes())
            .fetch_optional(&self.readers)
            .await
            .map_err(failed)?;
        row.map(ListedRow::listed).transpose()
    }

    async fn list_documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let rows: Vec<ListedRow> = sqlx::query_as(schema::LIST_DOCUMENTS)
            .bind(after.map_or(&[][..], DocumentId::as_bytes))
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failed)?;
        rows.into_iter().map(ListedRow::listed).collect()
    }

    async fn list_quarantined(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<ListedDocument>, StorageError> {
        let rows: Vec<ListedRow> = sqlx::query_as(schema::LIST_QUARANTINED)
            .bind(after.map_or(&[][..], DocumentId::as_bytes))
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failed)?;
        rows.into_iter().map(ListedRow::listed).collect()
    }

    async fn count_quarantined(&self) -> Result<u64, StorageError> {
        let (count,): (i64,) =
            sqlx::query_as(schema::COUNT_QUARANTINED).fetch_one(&self.readers).await.map_err(failed)?;
        unsigned(count)
    }

    async fn create_document(
        &self,
        document: &DocumentId,
        group: &PlacementGroup,
    ) -> Result<(), StorageError> {
        sqlx::query(schema::CREATE_DOCUMENT)
            .bind(document.as_bytes())
            .bind(group.as_str())
            .bind(now_ms())
            .execute(&mut *self.writer().await?)
            .await
            .map_err(failed)?;
        Ok(())
    }

    /// Counts, which reads the tables through, but not what overflows from their pages.
    async fn statistics(&self) -> Result<StorageStatistics, StorageError> {
        let counted: (i64, i64) =
            sqlx::query_as(schema::COUNT_ROWS).fetch_one(&self.readers).await.map_err(failed)?;
        let file_bytes = ["", "-wal", "-shm"].into_iter().map(|suffix| {
            let mut name = self.path.clone().into_os_string();
            name.push(suffix);
            std::fs::metadata(name).map_or(0, |file| file.len())
        });
        Ok(StorageStatistics {
            documents: unsigned(counted.0)?,
            changes: unsigned(counted.1)?,
            disk_bytes: file_bytes.sum(),
        })
    }

    async fn check(&self) -> Result<(), StorageError> {
        sqlx::query("SELECT 1").execute(&self.readers).await.map(drop).map_err(failed)
    }

    async fn close(&self) {
        self.readers.close().await;
        let writer = self.writer.lock().await.take();
        if let Some(writer) = writer
            && let Err(error) = writer.connection.close().await
        {
            tracing::warn!(%error, "closing the database failed");
        }
    }
}
