//! The statements and checks that both databases share, word for word.

use isobar_protocol::ids::{DocumentId, PlacementGroup, RegionName};
use sqlx::migrate::Migrator;

use super::failure::intact;
use super::{Deletion, DocumentAppend, StorageError};

/// One snapshot of a document: one row holds the document and its base, or its tombstone, each other row a bundle of
/// changes. One statement, because that is what sees one snapshot in either database (clause 6).
pub(super) const LOAD_DOCUMENT: &str = "\
    SELECT d.placement_group, d.state, d.state_reason, CAST(NULL AS bigint) AS deleted_at, \
           b.generation, b.pruned, b.chunk_bytes, b.summary, \
           NULL AS first_seq, NULL AS hashes, NULL AS changes \
    FROM documents d LEFT JOIN bases b ON b.document_id = d.id WHERE d.id = $1 \
    UNION ALL \
    SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, first_seq, hashes, changes \
    FROM changes WHERE document_id = $1 \
    UNION ALL \
    SELECT placement_group, 2, NULL, deleted_at, NULL, NULL, NULL, NULL, NULL, NULL, NULL \
    FROM tombstones WHERE document_id = $1";

pub(super) const FIND_DOCUMENT: &str = "\
    SELECT id, placement_group, state, state_reason, CAST(NULL AS bigint) AS deleted_at \
    FROM documents WHERE id = $1 \
    UNION ALL \
    SELECT document_id, placement_group, 2, NULL, deleted_at FROM tombstones WHERE document_id = $1";

/// The reason of `super::two_groups` for the two expressions.
macro_rules! two_groups {
    ($own:literal, $other:literal) => {
        concat!(
            "'created in two placement groups: ' || ",
            $own,
            " || ' here, ' || ",
            $other,
            " || ' elsewhere'"
        )
    };
}
pub(super) use two_groups;

/// Documents and tombstones after `$1`, at most `$2` of them.
pub(super) const LIST_DOCUMENTS: &str = "\
    SELECT id, placement_group, state, state_reason, CAST(NULL AS bigint) AS deleted_at FROM ( \
        SELECT * FROM documents WHERE id > $1 ORDER BY id LIMIT $2 \
    ) AS d \
    UNION ALL \
    SELECT document_id, placement_group, 2, NULL, deleted_at FROM ( \
        SELECT * FROM tombstones WHERE document_id > $1 ORDER BY document_id LIMIT $2 \
    ) AS t \
    ORDER BY id LIMIT $2";

/// Quarantined documents after `$1`, at most `$2` of them. The state is a literal, so that the index of those is used.
pub(super) const LIST_QUARANTINED: &str = "\
    SELECT id, placement_group, state, state_reason, CAST(NULL AS bigint) AS deleted_at FROM documents \
    WHERE state = 1 AND id > $1 ORDER BY id LIMIT $2";

pub(super) const COUNT_QUARANTINED: &str = "SELECT count(*) FROM documents WHERE state = 1";

/// `$3` is the moment.
pub(super) const CREATE_DOCUMENT: &str = "\
    INSERT INTO documents (id, placement_group, state, created_at) SELECT $1, $2, 0, $3 \
    WHERE NOT EXISTS (SELECT 1 FROM tombstones WHERE document_id = $1) ON CONFLICT (id) DO NOTHING";

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

/// The bundles of a document, whole.
pub(super) const READ_BUNDLES: &str =
    "SELECT origin, first_seq, hashes, changes FROM changes WHERE document_id = $1";

/// Only if the bundle is still the one that was found (`$4`).
pub(super) const REMOVE_BUNDLE: &str =
    "DELETE FROM changes WHERE document_id = $1 AND origin = $2 AND first_seq = $3 AND hashes = $4";

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

/// The origin's counter, and its runs that end after `$2`: the first, and those before which less than `$3` bytes of
/// bodies stand; at most `$4`. One row without a run if there is none. The lengths are looked at first, so that no body
/// is read in vain.
///
/// The documents whose deletions are not erased yet come as rows without a counter, in place of a body: one statement, so that
/// they are those of the same snapshot as the runs.
pub(super) const READ_LOG: &str = "\
    SELECT o.seq AS seq, l.first_seq AS first_seq, l.last_seq AS last_seq, l.chain_before AS chain_before, \
           l.body AS body \
    FROM origins o LEFT JOIN log l ON l.origin = o.id AND l.last_seq > $2 AND l.last_seq <= coalesce(( \
        SELECT max(m.last_seq) FROM ( \
            SELECT n.last_seq, sum(n.bytes) OVER (ORDER BY n.last_seq) - n.bytes AS bytes_before FROM ( \
                SELECT last_seq, length(body) AS bytes FROM log \
                WHERE origin = $1 AND last_seq > $2 ORDER BY last_seq LIMIT $4 \
            ) AS n \
        ) AS m WHERE m.bytes_before < $3 \
    ), 0) \
    WHERE o.id = $1 \
    UNION ALL \
    SELECT NULL, NULL, NULL, NULL, document_id FROM tombstones WHERE erasure > 0 \
    ORDER BY last_seq";

/// Two nodes that are started at once may get the same number.
pub(super) const REGISTER_NODE: &str = "\
    INSERT INTO nodes (id, number) SELECT $1, coalesce(max(number), 0) + 1 FROM nodes";

/// Forgets all but the newest `$1`.
pub(super) const FORGET_NODES: &str =
    "DELETE FROM nodes WHERE number <= (SELECT max(number) FROM nodes) - $1";

pub(super) const READ_NODES: &str = "SELECT id FROM nodes ORDER BY number DESC, id LIMIT $1";

/// How many runs one read of the log returns at most.
pub(super) const RUNS_READ_MAX: i64 = 512;

/// Removes the runs up to `$2` that were appended at `$3` or earlier, without leaving a hole. Keeps the run of the origin's
/// last entry, which a repeated append is recognised by.
pub(super) const TRUNCATE_LOG: &str = "\
    DELETE FROM log WHERE origin = $1 AND last_seq <= $2 \
    AND last_seq < (SELECT seq FROM origins WHERE id = $1) \
    AND last_seq < coalesce(( \
        SELECT last_seq FROM log WHERE origin = $1 AND last_seq <= $2 AND appended_at > $3 \
        ORDER BY last_seq LIMIT 1 \
    ), 9223372036854775807)";

/// What a run finds whose counter was elsewhere; `$2` is where it would have ended.
pub(super) const READ_COUNTER: &str = "\
    SELECT o.incarnation, o.seq, o.chain, l.first_seq, l.last_seq, l.chain_before, l.body \
    FROM origins o LEFT JOIN log l ON l.origin = o.id AND l.last_seq = $2 WHERE o.id = $1";

/// Erases changes from a run.
pub(super) const REPLACE_BODY: &str = "UPDATE log SET body = $3 WHERE origin = $1 AND last_seq = $2";

/// The earliest time counts, and the group is the document's, if there is one (clause 19). A document that is deleted again is
/// erased again: entries may have come since.
pub(super) const PUT_TOMBSTONE: &str = "\
    INSERT INTO tombstones (document_id, placement_group, deleted_at, erasure) \
    SELECT $1, coalesce((SELECT placement_group FROM documents WHERE id = $1), $2), $3, 2 WHERE true \
    ON CONFLICT (document_id) DO UPDATE SET erasure = 2, deleted_at = \
        CASE WHEN tombstones.deleted_at < excluded.deleted_at THEN tombstones.deleted_at ELSE excluded.deleted_at END";

pub(super) const COUNT_UNERASED: &str = "SELECT count(*) FROM tombstones WHERE erasure > 0";

/// Takes the deletions that wait into the next pass over the log, unless one is under way.
pub(super) const BEGIN_ERASURE: &str = "\
    UPDATE tombstones SET erasure = 1 WHERE erasure = 2 AND NOT EXISTS (SELECT 1 FROM erasure_cursors)";

/// At most `$1` origins with entries that the pass has not come to, and how far it has come in each.
pub(super) const READ_UNSEARCHED: &str = "\
    SELECT o.id, coalesce(c.last_seq, 0) FROM origins o LEFT JOIN erasure_cursors c ON c.origin = o.id \
    WHERE o.seq > coalesce(c.last_seq, 0) ORDER BY o.id LIMIT $1";

pub(super) const PUT_CURSOR: &str = "\
    INSERT INTO erasure_cursors (origin, last_seq) VALUES ($1, $2) \
    ON CONFLICT (origin) DO UPDATE SET last_seq = excluded.last_seq";

/// When the pass has come to the end of every log.
pub(super) const FINISH_ERASURE: [&str; 2] =
    ["UPDATE tombstones SET erasure = 0 WHERE erasure = 1", "DELETE FROM erasure_cursors"];

/// All that a document has but its tombstone.
pub(super) const DELETE_DOCUMENT: [&str; 4] = [
    "DELETE FROM documents WHERE id = $1",
    "DELETE FROM changes WHERE document_id = $1",
    "DELETE FROM bases WHERE document_id = $1",
    "DELETE FROM base_contents WHERE document_id = $1",
];

pub(super) const READ_REGION: &str = "SELECT name, storage_id FROM region";

pub(super) const PUT_REGION: &str =
    "INSERT INTO region (only_row, name, storage_id) VALUES (1, $1, $2) ON CONFLICT (only_row) DO NOTHING";

/// Takes the slot from its origin, and fences whoever holds it (clause 4).
pub(super) const REPLACE_ORIGIN: &str = "\
    UPDATE origins SET slot = NULL, incarnation = incarnation + 1 \
    WHERE region = $1 AND placement_group = $2 AND slot = $3";

/// Creates an origin, or counts its incarnation up.
pub(super) const CLAIM_ORIGIN: &str = "\
    INSERT INTO origins (id, region, placement_group, slot, incarnation, seq, chain) \
    VALUES ($1, $2, $3, $4, 1, 0, $5) \
    ON CONFLICT (region, placement_group, slot) DO UPDATE SET incarnation = origins.incarnation + 1 \
    RETURNING id, incarnation, seq, chain";

pub(super) const READ_ORIGINS: &str =
    "SELECT id, region, placement_group, seq, chain, slot IS NOT NULL AS claimed FROM origins ORDER BY id";

/// Raises an origin, or creates it. Whoever held it is fenced.
pub(super) const ADOPT_ORIGIN: &str = "\
    INSERT INTO origins (id, region, placement_group, slot, incarnation, seq, chain) \
    VALUES ($1, $2, $3, NULL, 0, $4, $5) \
    ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, chain = excluded.chain, slot = NULL, \
        incarnation = origins.incarnation + CASE WHEN origins.slot IS NULL THEN 0 ELSE 1 END \
    WHERE origins.seq < excluded.seq";

/// The runs that an adopted counter leaves below it.
pub(super) const DELETE_RUNS: &str = "DELETE FROM log WHERE origin = $1 AND last_seq <= $2";

pub(super) const NOTE_ACKNOWLEDGEMENT: &str = "\
    INSERT INTO acknowledgements (region, origin, seq) VALUES ($1, $2, $3) \
    ON CONFLICT (region, origin) DO UPDATE SET seq = excluded.seq WHERE acknowledgements.seq < excluded.seq";

pub(super) const READ_ACKNOWLEDGEMENTS: &str =
    "SELECT region, origin, seq FROM acknowledgements ORDER BY region, origin";

/// What a snapshot lacked.
pub(super) const PUT_MISSING_DOCUMENT: &str = "\
    INSERT INTO missing_documents (document_id, placement_group) VALUES ($1, $2) \
    ON CONFLICT (document_id) DO NOTHING";

pub(super) const READ_MISSING_DOCUMENTS: &str =
    "SELECT document_id, placement_group FROM missing_documents ORDER BY document_id";

pub(super) const REMOVE_MISSING_DOCUMENT: &str = "DELETE FROM missing_documents WHERE document_id = $1";

pub(super) const NOTE_MEMBER: &str = "\
    INSERT INTO members (region, linked_at, needs_snapshot) VALUES ($1, $2, $3) \
    ON CONFLICT (region) DO UPDATE SET needs_snapshot = excluded.needs_snapshot, linked_at = \
        CASE WHEN members.linked_at < excluded.linked_at THEN excluded.linked_at ELSE members.linked_at END";

pub(super) const READ_MEMBERS: &str = "SELECT region, linked_at, needs_snapshot FROM members ORDER BY region";

pub(super) const REMOVE_ACKNOWLEDGEMENTS: &str = "DELETE FROM acknowledgements WHERE region = $1";

pub(super) const REMOVE_MEMBER: &str = "DELETE FROM members WHERE region = $1";

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

type Placed<'a> = (&'a DocumentId, &'a PlacementGroup);

/// The documents of a batch.
pub(super) struct BatchDocuments<'a> {
    /// Each once, with the group in which it is created if it does not exist, and in order: two writers that create the same
    /// documents wait for each other in the same order instead of in a circle.
    pub created: Vec<Placed<'a>>,
    /// Those that come up again under another group.
    pub regrouped: Vec<Placed<'a>>,
}

pub(super) fn documents(batch: &[DocumentAppend]) -> BatchDocuments<'_> {
    let mut all: Vec<Placed<'_>> = batch.iter().map(|append| (&append.document, &append.group)).collect();
    // Stable, so that of two groups the first in the batch creates the document.
    all.sort_by_key(|(id, _)| *id);
    let mut documents = BatchDocuments { created: Vec::with_capacity(all.len()), regrouped: Vec::new() };
    for (id, group) in all {
        match documents.created.last() {
            Some((last, of)) if *last == id && *of == group => {}
            Some((last, _)) if *last == id => documents.regrouped.push((id, group)),
            _ => documents.created.push((id, group)),
        }
    }
    documents
}

/// Deletions in the order of their documents: whoever locks several tombstones does so in this order.
pub(super) fn ordered(deletions: &[Deletion]) -> Vec<&Deletion> {
    let mut ordered: Vec<&Deletion> = deletions.iter().collect();
    ordered.sort_by_key(|deletion| &deletion.document);
    ordered
}
