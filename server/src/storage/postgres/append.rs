//! An append as one statement: one round trip, and a transaction by itself.

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::{Arguments, Connection};

use super::{BULK_TIMEOUT, CALL_TIMEOUT, PostgresStorage, deletion, failed};
use crate::storage::bundle::{Bundle, bundle};
use crate::storage::clock::now_ms;
use crate::storage::failure::signed;
use crate::storage::schema::two_groups;
use crate::storage::{Batch, RunAppend, StorageError, Writer, schema};

/// Most bytes of bundles in one statement. The protocol's limit is 1 GiB, and both sides hold a statement in memory
/// more than once.
const STATEMENT_BYTES_MAX: usize = 32 << 20;

/// Inserts documents and bundles. What it reads from, `raised`, is empty unless the counters were raised.
///
/// Documents that are there in their group, as nearly all are, are passed over without being locked. An insert that finds a
/// document nevertheless, because another node created it meanwhile or because it is of another group, returns the group that
/// it has; a bundle is stored only where that is its own (clause 19).
macro_rules! insert_contents {
    ($on_conflict:literal) => {
        concat!(
            "created AS ( \
                INSERT INTO documents (id, placement_group, state, created_at) \
                SELECT d.id, d.placement_group, 0, $1 \
                FROM raised, unnest($2::bytea[], $3::text[]) AS d (id, placement_group) \
                WHERE NOT EXISTS (SELECT 1 FROM tombstones t WHERE t.document_id = d.id) \
                    AND NOT EXISTS (SELECT 1 FROM documents o \
                        WHERE o.id = d.id AND o.placement_group = d.placement_group) \
                ON CONFLICT (id) DO UPDATE SET \
                    state = CASE WHEN documents.placement_group = excluded.placement_group \
                        THEN documents.state ELSE 1 END, \
                    state_reason = CASE WHEN documents.placement_group = excluded.placement_group \
                        THEN documents.state_reason ELSE ",
            two_groups!("documents.placement_group", "excluded.placement_group"),
            " END \
                RETURNING id, placement_group \
            ), stored AS ( \
                INSERT INTO changes (document_id, origin, first_seq, hashes, changes) \
                SELECT b.document_id, b.origin, b.first_seq, b.hashes, b.changes \
                FROM raised, \
                    unnest($4::bytea[], $5::bytea[], $6::bigint[], $7::bytea[], $8::bytea[], $9::text[]) \
                    AS b (document_id, origin, first_seq, hashes, changes, placement_group) \
                    LEFT JOIN documents d ON d.id = b.document_id \
                    LEFT JOIN created c ON c.id = b.document_id \
                WHERE coalesce(c.placement_group, d.placement_group) = b.placement_group \
                    AND NOT EXISTS (SELECT 1 FROM tombstones t WHERE t.document_id = b.document_id) ",
            $on_conflict,
            ") SELECT all_raised FROM raised"
        )
    };
}

/// With one run of an own origin, the case that is to be fast.
const APPEND_OWN: &str = concat!(
    "WITH raised AS ( \
        UPDATE origins SET seq = $12, chain = $15 WHERE id = $10 AND incarnation = $13 AND seq = $11 - 1 \
        RETURNING 1 AS all_raised \
    ), appended AS ( \
        INSERT INTO log (origin, last_seq, first_seq, appended_at, chain_before, body) \
        SELECT $10, $12, $11, $1, $14, $16 FROM raised \
    ), ",
    insert_contents!("")
);

/// With any runs. Divides by zero, which undoes the whole statement, unless every counter is raised.
///
/// An origin whose entries come from elsewhere is nobody's own any more: whoever holds it is fenced. The counters of other
/// regions' origins are raised in the order of their ids, so that two nodes do not wait for each other in a circle.
const APPEND_RUNS: &str = concat!(
    "WITH runs AS ( \
        SELECT * FROM unnest( \
            $10::bytea[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bytea[], $15::bytea[], $16::bytea[], \
            $17::text[], $18::text[] \
        ) AS r (origin, first_seq, last_seq, incarnation, chain_before, chain, body, region, placement_group) \
    ), own AS ( \
        UPDATE origins SET seq = r.last_seq, chain = r.chain FROM runs r \
        WHERE id = r.origin AND origins.incarnation = r.incarnation AND seq = r.first_seq - 1 RETURNING 1 \
    ), other AS ( \
        INSERT INTO origins (id, region, placement_group, slot, incarnation, seq, chain) \
        SELECT r.origin, r.region, r.placement_group, NULL, 0, r.last_seq, r.chain FROM runs r \
        WHERE r.region IS NOT NULL \
            AND (r.first_seq = 1 OR EXISTS (SELECT 1 FROM origins o WHERE o.id = r.origin)) \
        ORDER BY r.origin \
        ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, chain = excluded.chain, slot = NULL, \
            incarnation = origins.incarnation + CASE WHEN origins.slot IS NULL THEN 0 ELSE 1 END \
        WHERE origins.seq = (SELECT r.first_seq - 1 FROM runs r WHERE r.origin = excluded.id) RETURNING 1 \
    ), raised AS ( \
        SELECT 1 / CASE \
            WHEN (SELECT count(*) FROM own) + (SELECT count(*) FROM other) = (SELECT count(*) FROM runs) THEN 1 \
            ELSE 0 END AS all_raised \
    ), appended AS ( \
        INSERT INTO log (origin, last_seq, first_seq, appended_at, chain_before, body) \
        SELECT r.origin, r.last_seq, r.first_seq, $1, r.chain_before, r.body FROM raised, runs r \
    ), ",
    insert_contents!("")
);

/// More of a batch whose counters are raised.
const APPEND_MORE: &str = concat!("WITH raised AS (SELECT 1 AS all_raised), ", insert_contents!(""));

/// Without a run there is no counter by which a repeated batch would be known.
const APPEND_REPEATABLY: &str = concat!(
    "WITH raised AS (SELECT 1 AS all_raised), ",
    insert_contents!("ON CONFLICT (document_id, origin, first_seq) DO NOTHING")
);

/// Documents of a batch that come up in it under a second group, when they are there.
const QUARANTINE_REGROUPED: &str = concat!(
    "UPDATE documents d SET state = 1, state_reason = ",
    two_groups!("d.placement_group", "r.placement_group"),
    " FROM unnest($1::bytea[], $2::text[]) AS r (id, placement_group) \
      WHERE d.id = r.id AND d.placement_group <> r.placement_group"
);

const DIVISION_BY_ZERO: &str = "22012";

/// Appends a batch; `false` if some counter was elsewhere or some incarnation is an older one, and nothing was stored.
pub(super) async fn append(storage: &PostgresStorage, batch: &Batch) -> Result<bool, StorageError> {
    let statements = statements(batch).map_err(|error| failed(sqlx::Error::Encode(error)))?;
    let bytes: usize = batch.runs.iter().map(|run| run.body.len()).sum();
    let is_bulk = statements.len() > 1 || bytes > STATEMENT_BYTES_MAX || !batch.deletions.is_empty();
    let limit = if is_bulk { BULK_TIMEOUT } else { CALL_TIMEOUT };
    let mut lease = storage.writers.lease().await?;
    let work = run(&mut lease.connection, statements, batch);
    let raised = storage.writers.finish(limit, work).await?;
    lease.give_back();
    Ok(raised)
}

struct Statement {
    text: &'static str,
    arguments: PgArguments,
}

/// The batch in as many statements as its size asks for: at least one, and the first raises the counters.
fn statements(batch: &Batch) -> Result<Vec<Statement>, BoxDynError> {
    let now = now_ms();
    let documents = schema::documents(&batch.changes);
    let mut created = document_columns(&documents.created);
    let mut statements = Vec::new();
    for part in bundle_columns(bundle(&batch.changes)) {
        let mut arguments = PgArguments::default();
        arguments.add(now)?;
        let (ids, groups) = std::mem::take(&mut created);
        arguments.add(ids)?;
        arguments.add(groups)?;
        part.bind(&mut arguments)?;
        let text = match (&batch.runs[..], statements.is_empty()) {
            ([], _) => APPEND_REPEATABLY,
            (_, false) => APPEND_MORE,
            ([run @ RunAppend { writer: Writer::Own { incarnation }, .. }], true) => {
                bind_own(&mut arguments, run, signed(incarnation.0))?;
                APPEND_OWN
            }
            (runs, true) => {
                bind_runs(&mut arguments, runs)?;
                APPEND_RUNS
            }
        };
        statements.push(Statement { text, arguments });
    }
    if !documents.regrouped.is_empty() {
        let mut arguments = PgArguments::default();
        let (ids, groups) = document_columns(&documents.regrouped);
        arguments.add(ids)?;
        arguments.add(groups)?;
        statements.push(Statement { text: QUARANTINE_REGROUPED, arguments });
    }
    Ok(statements)
}

fn document_columns<'a>(documents: &[(&'a DocumentId, &'a PlacementGroup)]) -> (Vec<&'a [u8]>, Vec<&'a str>) {
    documents.iter().map(|(id, group)| (id.as_bytes(), group.as_str())).unzip()
}

/// The columns of many bundles, one array each.
#[derive(Default)]
struct BundleColumns<'a> {
    documents: Vec<&'a [u8]>,
    origins: Vec<Vec<u8>>,
    first_seqs: Vec<i64>,
    hashes: Vec<Vec<u8>>,
    changes: Vec<Vec<u8>>,
    groups: Vec<&'a str>,
}

impl BundleColumns<'_> {
    fn bind(self, arguments: &mut PgArguments) -> Result<(), BoxDynError> {
        arguments.add(self.documents)?;
        arguments.add(self.origins)?;
        arguments.add(self.first_seqs)?;
        arguments.add(self.hashes)?;
        arguments.add(self.changes)?;
        arguments.add(self.groups)
    }
}

/// Splits bundles so that each part fits a statement; the first part may be the only one, and empty.
fn bundle_columns(bundles: Vec<Bundle<'_>>) -> Vec<BundleColumns<'_>> {
    let mut parts = vec![BundleColumns::default()];
    let mut part_bytes = 0;
    for bundle in bundles {
        if part_bytes > 0 && part_bytes + bundle.changes.len() > STATEMENT_BYTES_MAX {
            parts.push(BundleColumns::default());
            part_bytes = 0;
        }
        part_bytes += bundle.changes.len();
        let part = parts.last_mut().expect("there is a first part, and none is removed");
        part.documents.push(bundle.document.as_bytes());
        part.origins.push(bundle.origin.0.as_bytes().to_vec());
        part.first_seqs.push(signed(bundle.first.0));
        part.hashes.push(bundle.hashes);
        part.changes.push(bundle.changes);
        part.groups.push(bundle.group.as_str());
    }
    parts
}

fn bind_own(arguments: &mut PgArguments, run: &RunAppend, incarnation: i64) -> Result<(), BoxDynError> {
    arguments.add(&run.origin.0.as_bytes()[..])?;
    arguments.add(signed(run.first.0))?;
    arguments.add(signed(run.last.0))?;
    arguments.add(incarnation)?;
    arguments.add(&run.chain_before.0[..])?;
    arguments.add(&run.chain.0[..])?;
    arguments.add(&run.body[..])
}

/// Own runs have an incarnation and no region, others the other way round.
fn bind_runs(arguments: &mut PgArguments, runs: &[RunAppend]) -> Result<(), BoxDynError> {
    let incarnation = |run: &RunAppend| match run.writer {
        Writer::Own { incarnation } => Some(signed(incarnation.0)),
        Writer::Other { .. } => None,
    };
    let region = |run: &RunAppend| match &run.writer {
        Writer::Own { .. } => None,
        Writer::Other { region } => Some(region.as_str().to_owned()),
    };
    arguments.add(runs.iter().map(|run| &run.origin.0.as_bytes()[..]).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| signed(run.first.0)).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| signed(run.last.0)).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(incarnation).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| &run.chain_before.0[..]).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| &run.chain.0[..]).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| &run.body[..]).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(region).collect::<Vec<_>>())?;
    arguments.add(runs.iter().map(|run| run.group.as_str()).collect::<Vec<_>>())
}

/// Runs one statement; whether the counters were raised.
async fn execute(connection: &mut PgConnection, statement: Statement) -> Result<bool, sqlx::Error> {
    let rows = sqlx::query_with(statement.text, statement.arguments)
        // Reads up to the server's being ready again. The row by itself says nothing: a transaction of one
        // statement commits after its row was sent.
        .fetch_all(connection)
        .await;
    match rows {
        Ok(rows) => Ok(!rows.is_empty()),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(DIVISION_BY_ZERO) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A single statement is a transaction by itself; else there is one around them.
async fn run(
    connection: &mut PgConnection,
    statements: Vec<Statement>,
    batch: &Batch,
) -> Result<bool, StorageError> {
    let mut statements = statements.into_iter();
    let first = statements.next().expect("a batch is at least one statement");
    if statements.len() == 0 && batch.deletions.is_empty() {
        return execute(connection, first).await.map_err(failed);
    }
    let mut transaction = connection.begin().await.map_err(failed)?;
    if !execute(&mut transaction, first).await.map_err(failed)? {
        transaction.rollback().await.map_err(failed)?;
        return Ok(false);
    }
    for more in statements {
        execute(&mut transaction, more).await.map_err(failed)?;
    }
    if !batch.deletions.is_empty() {
        deletion::delete(&mut transaction, &batch.deletions).await.map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)?;
    Ok(true)
}
