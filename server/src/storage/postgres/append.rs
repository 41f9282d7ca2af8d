//! An append as one statement: one round trip, and a transaction by itself.

use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::storage::bundle::{Bundle, bundle};
use crate::storage::failure::signed;
use crate::storage::log_run::LogRun;
use crate::storage::schema;
use crate::storage::{ClaimedOrigin, DocumentAppend};
use isobar_protocol::ids::DocumentId;

/// Most bytes of changes in one statement. The protocol's limit is 1 GiB, and both sides hold a statement in memory
/// more than once.
pub(super) const STATEMENT_BYTES_MAX: usize = 32 << 20;

const INSERT_BUNDLES: &str = "\
    INSERT INTO changes (document_id, origin, first_seq, hashes, changes) \
    SELECT b.document_id, $1, b.first_seq, b.hashes, b.changes \
    FROM unnest($2::bytea[], $3::bigint[], $4::bytea[], $5::bytea[]) AS b (document_id, first_seq, hashes, changes)";

/// An append. The parts that insert read from `counter`, so they do nothing unless it was raised.
const APPEND: &str = "\
    WITH counter AS ( \
        UPDATE origins SET seq = $2 WHERE id = $1 AND incarnation = $4 AND seq = $3 - 1 RETURNING seq \
    ), appended AS ( \
        INSERT INTO log (origin, last_seq, first_seq, entries) SELECT $1, $2, $3, $5 FROM counter \
    ), created AS ( \
        INSERT INTO documents (id, placement_group, state, created_at) \
        SELECT d.id, $6, 0, $7 FROM counter, unnest($8::bytea[]) AS d (id) ON CONFLICT DO NOTHING \
    ), stored AS ( \
        INSERT INTO changes (document_id, origin, first_seq, hashes, changes) \
        SELECT b.document_id, $1, b.first_seq, b.hashes, b.changes \
        FROM counter, unnest($9::bytea[], $10::bigint[], $11::bytea[], $12::bytea[]) \
            AS b (document_id, first_seq, hashes, changes) \
    ) SELECT seq FROM counter";

/// The columns of many bundles, one array each.
#[derive(Default)]
struct BundleColumns<'a> {
    documents: Vec<&'a [u8]>,
    first_seqs: Vec<i64>,
    hashes: Vec<Vec<u8>>,
    changes: Vec<Vec<u8>>,
}

/// Splits bundles so that each part fits a statement; the first part may be the only one.
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
        part.first_seqs.push(signed(bundle.first.0));
        part.hashes.push(bundle.hashes);
        part.changes.push(bundle.changes);
    }
    parts
}

/// The append statement with a batch's first bundles; whether it raised the counter.
async fn append_first(
    connection: &mut PgConnection,
    origin: &ClaimedOrigin,
    run: &LogRun,
    bundles: &BundleColumns<'_>,
    documents: &[&[u8]],
) -> Result<bool, sqlx::Error> {
    let row = sqlx::query(APPEND)
        .bind(&origin.id.0.as_bytes()[..])
        .bind(signed(run.last.0))
        .bind(signed(run.first.0))
        .bind(signed(origin.incarnation.0))
        .bind(&run.entries)
        .bind(origin.group.as_str())
        .bind(schema::now_ms())
        .bind(documents)
        .bind(&bundles.documents)
        .bind(&bundles.first_seqs)
        .bind(&bundles.hashes)
        .bind(&bundles.changes)
        // Reads up to the server's being ready again. The row by itself says nothing: a transaction of one
        // statement commits after its row was sent.
        .fetch_all(connection)
        .await?;
    Ok(!row.is_empty())
}

/// Appends a batch in one statement, or in one transaction if it is too large for that; whether the counter was
/// raised.
pub(super) async fn append_batch(
    connection: &mut PgConnection,
    origin: &ClaimedOrigin,
    run: &LogRun,
    batch: &[DocumentAppend],
) -> Result<bool, sqlx::Error> {
    let documents: Vec<&[u8]> = schema::documents(batch).into_iter().map(DocumentId::as_bytes).collect();
    let parts = bundle_columns(bundle(run.first, batch));
    let (first, more) = parts.split_first().expect("there is a first part");
    if more.is_empty() {
        return append_first(connection, origin, run, first, &documents).await;
    }
    let mut transaction = connection.begin().await?;
    let raised = append_first(&mut transaction, origin, run, first, &documents).await?;
    if raised {
        for part in more {
            sqlx::query(INSERT_BUNDLES)
                .bind(&origin.id.0.as_bytes()[..])
                .bind(&part.documents)
                .bind(&part.first_seqs)
                .bind(&part.hashes)
                .bind(&part.changes)
                .execute(&mut *transaction)
                .await?;
        }
    }
    transaction.commit().await?;
    Ok(raised)
}
