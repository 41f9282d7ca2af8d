//! Counting what a document or bundle chunk claims to hold, before Automerge is asked to load it.
//!
//! A few bytes of run-length encoding can claim millions of rows, and a few kilobytes of deflate can become
//! gigabytes. Automerge materialises both. The census inflates each column under a limit and reads the headers of
//! its runs, so that its own cost follows the bytes and not the claims. It decodes no value, and says nothing on
//! whether the chunk is valid otherwise.

use std::borrow::Cow;

use crate::chunk::{Chunk, ChunkError, ChunkKind, InflationProblem, check_checksum, inflate};
use crate::columns::{Column, ColumnType, Headers, count_values};
use crate::config::{CHANGE_COLUMNS_MAX, CHANGE_DEPENDENCIES_MAX, CHANGE_OTHER_ACTORS_MAX, Limits};
use crate::leb128::{ReadError, Reader};

/// What a document or bundle chunk holds, by its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Census {
    pub changes: u64,
    /// Rows in the table of operations. A document keeps no rows for deletions.
    pub operations: u64,
    /// The size of all columns once inflated.
    pub inflated_bytes: u64,
}

/// Counts the changes and operations of a document or bundle from the headers of its columns' runs.
///
/// No column may claim more than `limits.document_ops_max` values, nor all columns together inflate to more than
/// `limits.document_bytes_max`. The checksum is checked as well.
pub fn census(chunk: &Chunk, limits: &Limits) -> Result<Census, ChunkError> {
    let kind = chunk.kind;
    if !matches!(kind, ChunkKind::Document | ChunkKind::Bundle) {
        return Err(ChunkError::NotCounted);
    }
    check_checksum(chunk)?;
    let mut reader = Reader::new(chunk.data());
    if kind == ChunkKind::Bundle {
        skip_hashes(&mut reader, "dependencies")?;
    }
    skip_actors(&mut reader)?;
    let mut counter = Counter { limits, inflated_bytes: 0 };
    let (changes, operations) = match kind {
        ChunkKind::Document => {
            let heads = skip_hashes(&mut reader, "heads")?;
            let changes = Headers::read(&mut reader, CHANGE_COLUMNS_MAX)?;
            let operations = Headers::read(&mut reader, CHANGE_COLUMNS_MAX)?;
            let counts = (
                counter.count(&changes.columns(&mut reader)?)?,
                counter.count(&operations.columns(&mut reader)?)?,
            );
            skip_head_indexes(&mut reader, heads)?;
            counts
        }
        _ => {
            let changes = Headers::read(&mut reader, CHANGE_COLUMNS_MAX)?.columns(&mut reader)?;
            let operations = Headers::read(&mut reader, CHANGE_COLUMNS_MAX)?.columns(&mut reader)?;
            (counter.count(&changes)?, counter.count(&operations)?)
        }
    };
    match reader.remaining() {
        0 => Ok(Census { changes, operations, inflated_bytes: counter.inflated_bytes }),
        left => Err(ChunkError::Trailing(left)),
    }
}

struct Counter<'l> {
    limits: &'l Limits,
    inflated_bytes: u64,
}

impl Counter<'_> {
    /// The number of rows: the most values of any column that has one value per row.
    fn count(&mut self, columns: &[Column<'_>]) -> Result<u64, ChunkError> {
        let mut rows = 0;
        // Columns of the same id as a group hold any number of values per row.
        let mut group = None;
        for (index, column) in columns.iter().enumerate() {
            if index > 0 && columns[index - 1].name() >= column.name() {
                return Err(ChunkError::ColumnOrder { column: column.name() });
            }
            let values = self.values(column)?;
            if column.kind() == ColumnType::Group {
                group = Some(column.id());
            }
            if column.kind() == ColumnType::Group || group != Some(column.id()) {
                rows = rows.max(values);
            }
        }
        Ok(rows)
    }

    /// How many values a column has; none for bytes whose lengths stand elsewhere.
    fn values(&mut self, column: &Column<'_>) -> Result<u64, ChunkError> {
        let name = column.name();
        let left = self.limits.document_bytes_max.saturating_sub(self.inflated_bytes as usize);
        let data = match column.is_deflated() {
            true => inflate(column.data, left).map(Cow::Owned),
            false if column.data.len() > left => Err(InflationProblem::TooLarge),
            false => Ok(Cow::Borrowed(column.data)),
        };
        let data = data.map_err(|problem| ChunkError::Inflation { column: name, problem })?;
        self.inflated_bytes += data.len() as u64;
        if column.kind() == ColumnType::Raw {
            return Ok(0);
        }
        let values_max = self.limits.document_ops_max;
        count_values(column, &data, values_max).map_err(|ReadError { at, problem, .. }| ChunkError::Column {
            column: name,
            at,
            problem,
        })
    }
}

/// Skips a counted list of hashes and returns how many there were.
fn skip_hashes(reader: &mut Reader<'_>, field: &'static str) -> Result<usize, ReadError> {
    let count = reader.count(field, 32, CHANGE_DEPENDENCIES_MAX)?;
    reader.take(field, 32 * count)?;
    Ok(count)
}

fn skip_actors(reader: &mut Reader<'_>) -> Result<(), ReadError> {
    let count = reader.count("actors", 1, CHANGE_OTHER_ACTORS_MAX)?;
    for _ in 0..count {
        reader.length_prefixed("actor")?;
    }
    Ok(())
}

/// A document ends with the indexes of its heads; older writers left them out.
fn skip_head_indexes(reader: &mut Reader<'_>, heads: usize) -> Result<(), ReadError> {
    if reader.is_empty() {
        return Ok(());
    }
    for _ in 0..heads {
        reader.unsigned("head index")?;
    }
    Ok(())
}
