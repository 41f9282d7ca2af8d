//! Storage in an embedded SQLite database, the default of a single node.
//!
//! One connection writes, a few read. The writer is a task queue by itself: whoever holds its lock has the
//! database's only write transaction. Readers see the last commit and wait for nobody. Several processes may have
//! the file open; the write lock of the file keeps them apart, at the price of waiting.
//!
//! The file does not shrink by itself: what pruning frees is reused.

mod append;
mod open;
mod prune;
mod rows;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, Incarnation, OriginId, PlacementGroup, RegionName, Seq, StorageId,
};
use sqlx::error::DatabaseError;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Connection, Row, SqlitePool};
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};
use uuid::Uuid;

use self::append::Appended;
use super::bundle::Tail;
use super::failure::{clamped, classify, intact, signed, unsigned};
use super::log_run::{FoundCounter, LogRun, gather, judge_refused};
use super::schema::{self, state_columns, state_from_columns};
use super::{
    ClaimedOrigin, DocumentAppend, DocumentState, LogEntry, NewBase, Storage, StorageError,
    StorageStatistics, StoredBase, StoredDocument, new_storage_id,
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
        let row = sqlx::query(statement).bind(document.as_bytes()).fetch_optional(&self.readers).await;
        row.map_err(failed)?
            .map(|row| Ok((unsigned(column(&row, "generation")?)?, bytes(&row, "contents")?)))
            .transpose()
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

fn column<'r, T>(row: &'r SqliteRow, name: &str) -> Result<T, StorageError>
where
    T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    row.try_get(name).map_err(failed)
}

fn bytes(row: &SqliteRow, name: &str) -> Result<Bytes, StorageError> {
    column::<Vec<u8>>(row, name).map(Bytes::from)
}

fn run_from_row(row: &SqliteRow, last: Seq) -> Result<LogRun, StorageError> {
    let first = Seq(unsigned(column(row, "first_seq")?)?);
    Ok(LogRun { first, last, entries: column(row, "entries")? })
}

fn document_from_row(row: &SqliteRow) -> Result<StoredDocument, StorageError> {
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

/// Finds out what an append met whose counter was elsewhere.
async fn read_counter(
    connection: &mut SqliteConnection,
    origin: OriginId,
    end: Seq,
) -> Result<FoundCounter, StorageError> {
    let row = sqlx::query(schema::READ_COUNTER)
        .bind(&origin.0.as_bytes()[..])
        .bind(signed(end.0))
        .fetch_optional(connection)
        .await
        .map_err(failed)?
        .ok_or_else(|| StorageError::Fatal(format!("origin {origin:?} is not in the database").into()))?;
    let has_run = column::<Option<i64>>(&row, "first_seq")?.is_some();
    Ok(FoundCounter {
        incarnation: Incarnation(unsigned(column(&row, "incarnation")?)?),
        seq: Seq(unsigned(column(&row, "seq")?)?),
        run_at_end: if has_run { Some(run_from_row(&row, end)?) } else { None },
    })
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
    ) -> Result<ClaimedOrigin, StorageError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        if let Some((name, _)) = found_region(&mut transaction).await? {
            schema::check_region(region, &name)?;
        }
        let row = sqlx::query(schema::CLAIM_ORIGIN)
            .bind(&Uuid::new_v4().as_bytes()[..])
            .bind(region.as_str())
            .bind(group.as_str())
            .bind(i64::from(slot))
            .fetch_one(&mut *transaction)
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(ClaimedOrigin {
            id: schema::origin_id(column(&row, "id")?)?,
            group: group.clone(),
            incarnation: Incarnation(unsigned(column(&row, "incarnation")?)?),
            last_seq: Seq(unsigned(column(&row, "seq")?)?),
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
        let mut writer = self.settled_writer().await?;
        writer.unsettled = true;
        match append::run(&mut writer.connection, origin, &run, batch).await.map_err(failed)? {
            Appended::Committed => {
                writer.unsettled = false;
                Ok(run.last)
            }
            Appended::Refused => {
                writer.settle().await?;
                let found = read_counter(&mut writer.connection, origin.id, run.last).await?;
                judge_refused(origin, &run, found)
            }
        }
    }

    async fn load_document(&self, document: &DocumentId) -> Result<Option<StoredDocument>, StorageError> {
        let rows =
            sqlx::query(schema::LOAD_DOCUMENT).bind(document.as_bytes()).fetch_all(&self.readers).await;
        let mut loaded = None;
        let mut tail = Tail::default();
        for row in &rows.map_err(failed)? {
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
        limit: u32,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let rows = sqlx::query(schema::READ_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(after.0))
            .bind(clamped(after.0.saturating_add(u64::from(limit))))
            .fetch_all(&self.readers)
            .await
            .map_err(failed)?;
        let runs: Result<Vec<LogRun>, StorageError> =
            rows.iter().map(|row| run_from_row(row, Seq(unsigned(column(row, "last_seq")?)?))).collect();
        gather(&runs?, after, limit as usize)
    }

    async fn truncate_log(&self, origin: OriginId, up_to: Seq) -> Result<(), StorageError> {
        sqlx::query(schema::TRUNCATE_LOG)
            .bind(&origin.0.as_bytes()[..])
            .bind(clamped(up_to.0))
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
