//! The statements and checks that both databases share, word for word.

use isobar_protocol::ids::{DocumentId, OriginId, RegionName};
use sqlx::migrate::Migrator;
use uuid::Uuid;

use super::failure::intact;
use super::{DocumentAppend, DocumentState, StorageError};

/// One snapshot of a document: one row holds the document and its base, each other row a bundle of changes.
/// One statement, because that is what sees one snapshot in either database (clause 6).
pub(super) const LOAD_DOCUMENT: &str = "\
    SELECT d.placement_group, d.state, d.state_reason, b.generation, b.pruned, b.chunk_bytes, b.summary, \
           NULL AS first_seq, NULL AS hashes, NULL AS changes \
    FROM documents d LEFT JOIN bases b ON b.document_id = d.id WHERE d.id = $1 \
    UNION ALL \
    SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, first_seq, hashes, changes \
    FROM changes WHERE document_id = $1";

/// The bundles of a document, without their changes.
pub(super) const READ_BUNDLE_HASHES: &str =
    "SELECT origin, first_seq, hashes FROM changes WHERE document_id = $1";

/// Only if the bundle is still the one that was found (`$4`): another node may be pruning as well.
pub(super) const READ_BUNDLE_CHANGES: &str = "\
    SELECT changes FROM changes \
    WHERE document_id = $1 AND origin = $2 AND first_seq = $3 AND hashes = $4";

/// Only if the bundle is still the one that was found (`$4`).
pub(super) const REPLACE_BUNDLE: &str = "\
    UPDATE changes SET hashes = $5, changes = $6 \
    WHERE document_id = $1 AND origin = $2 AND first_seq = $3 AND hashes = $4";

pub(super) const READ_BASE_CHUNK: &str =
    "SELECT generation, chunk AS contents FROM base_contents WHERE document_id = $1";

pub(super) const READ_BASE_INDEX: &str =
    "SELECT generation, index_bytes AS contents FROM base_contents WHERE document_id = $1";

pub(super) const READ_GENERATION: &str = "SELECT generation FROM bases WHERE document_id = $1";

/// The first base of a document that exists.
pub(super) const INSERT_BASE: &str = "\
    INSERT INTO bases (document_id, generation, pruned, chunk_bytes, summary) \
    SELECT id, $2, false, $3, $4 FROM documents WHERE id = $1 \
    ON CONFLICT (document_id) DO NOTHING";

/// A later base; `$5` is the generation it replaces.
pub(super) const UPDATE_BASE: &str = "\
    UPDATE bases SET generation = $2, pruned = false, chunk_bytes = $3, summary = $4 \
    WHERE document_id = $1 AND generation = $5";

pub(super) const PUT_BASE_CONTENTS: &str = "\
    INSERT INTO base_contents (document_id, generation, index_bytes, chunk) VALUES ($1, $2, $3, $4) \
    ON CONFLICT (document_id) DO UPDATE \
    SET generation = excluded.generation, index_bytes = excluded.index_bytes, chunk = excluded.chunk";

pub(super) const FINISH_PRUNE: &str =
    "UPDATE bases SET pruned = true WHERE document_id = $1 AND generation = $2";

pub(super) const SET_STATE: &str = "UPDATE documents SET state = $2, state_reason = $3 WHERE id = $1";

/// The runs that hold the entries `$2 + 1 ..= $3`, and no further one: each is found by the log's key.
pub(super) const READ_LOG: &str = "\
    SELECT first_seq, last_seq, entries FROM log \
    WHERE origin = $1 AND last_seq > $2 AND last_seq <= coalesce( \
        (SELECT last_seq FROM log WHERE origin = $1 AND last_seq >= $3 ORDER BY last_seq LIMIT 1), \
        9223372036854775807) \
    ORDER BY last_seq";

/// Keeps the run of the origin's last entry, which a repeated append is recognised by.
pub(super) const TRUNCATE_LOG: &str = "\
    DELETE FROM log WHERE origin = $1 AND last_seq <= $2 \
    AND last_seq < (SELECT seq FROM origins WHERE id = $1)";

/// What an append finds whose counter was elsewhere; `$2` is where its batch would have ended.
pub(super) const READ_COUNTER: &str = "\
    SELECT o.incarnation, o.seq, l.first_seq, l.entries \
    FROM origins o LEFT JOIN log l ON l.origin = o.id AND l.last_seq = $2 WHERE o.id = $1";

pub(super) const READ_REGION: &str = "SELECT name, storage_id FROM region";

pub(super) const PUT_REGION: &str =
    "INSERT INTO region (only_row, name, storage_id) VALUES (1, $1, $2) ON CONFLICT (only_row) DO NOTHING";

/// Creates an origin, or counts its incarnation up.
pub(super) const CLAIM_ORIGIN: &str = "\
    INSERT INTO origins (id, region, placement_group, slot, incarnation, seq) VALUES ($1, $2, $3, $4, 1, 0) \
    ON CONFLICT (region, placement_group, slot) DO UPDATE SET incarnation = origins.incarnation + 1 \
    RETURNING id, incarnation, seq";

/// Documents and changes; a change that stands in two bundles counts twice.
pub(super) const COUNT_ROWS: &str = "\
    SELECT (SELECT count(*) FROM documents), (SELECT coalesce(sum(length(hashes) / 32), 0) FROM changes)";

pub(super) const NEWEST_MIGRATION: &str = "SELECT coalesce(max(version), 0) FROM _sqlx_migrations";

/// Refuses a database whose newest migration this program does not know (clause 9).
pub(super) fn refuse_newer(migrator: &Migrator, found: i64) -> Result<(), StorageError> {
    let supported = migrator.iter().map(|migration| migration.version).max().unwrap_or(0);
    if found > supported {
        return Err(StorageError::NewerSchema { found, supported });
    }
    Ok(())
}

/// Refuses another region's name (clause 10).
pub(super) fn check_region(expected: &RegionName, found: &str) -> Result<(), StorageError> {
    if expected.as_str() == found {
        return Ok(());
    }
    let found = intact(RegionName::new(found))?;
    Err(StorageError::OtherRegion { expected: expected.clone(), found })
}

/// An origin's id from its column.
pub(super) fn origin_id(bytes: &[u8]) -> Result<OriginId, StorageError> {
    Uuid::from_slice(bytes).map(OriginId).map_err(|error| StorageError::Fatal(Box::new(error)))
}

/// The documents of a batch, each once and in order: two writers that create the same documents wait for each other in
/// the same order instead of in a circle.
pub(super) fn documents(batch: &[DocumentAppend]) -> Vec<&DocumentId> {
    let mut documents: Vec<_> = batch.iter().map(|append| &append.document).collect();
    documents.sort_unstable();
    documents.dedup();
    documents
}

/// A document's state as its two columns.
pub(super) fn state_columns(state: &DocumentState) -> (i32, Option<&str>) {
    match state {
        DocumentState::Live => (0, None),
        DocumentState::Quarantined { reason } => (1, Some(reason)),
    }
}

/// A document's state from its two columns.
pub(super) fn state_from_columns(state: i32, reason: Option<String>) -> Result<DocumentState, StorageError> {
    match state {
        0 => Ok(DocumentState::Live),
        1 => Ok(DocumentState::Quarantined { reason: reason.unwrap_or_default() }),
        unknown => Err(StorageError::Fatal(format!("a document has the unknown state {unknown}").into())),
    }
}

/// Milliseconds of Unix time, for `created_at`.
pub(super) fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |elapsed| i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX))
}
