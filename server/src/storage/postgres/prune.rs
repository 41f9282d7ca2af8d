//! Taking covered changes out of their bundles. Each step is a transaction by itself: a tail that still holds some of
//! them is right, so nothing has to happen at once.

use std::collections::HashSet;

use isobar_protocol::ids::{ChangeHash, DocumentId};

use super::{BULK_TIMEOUT, CALL_TIMEOUT, PostgresStorage};
use crate::storage::StorageError;
use crate::storage::bundle::{CoveredBundles, FoundBundle, PRUNE_ATTEMPTS_MAX, prune_disturbed, without};
use crate::storage::schema;

const DELETE_BUNDLES: &str = "\
    DELETE FROM changes USING unnest($2::bytea[], $3::bigint[]) AS gone (origin, first_seq) \
    WHERE document_id = $1 AND changes.origin = gone.origin AND changes.first_seq = gone.first_seq";

/// Removes covered changes. Starts again where another node changed a bundle meanwhile.
pub(super) async fn prune(
    storage: &PostgresStorage,
    document: &DocumentId,
    covered: &HashSet<ChangeHash>,
) -> Result<(), StorageError> {
    for _ in 0..PRUNE_ATTEMPTS_MAX {
        let query = sqlx::query_as(schema::READ_BUNDLE_HASHES).bind(document.as_bytes());
        let found: Vec<FoundBundle> = storage.fetch_all(BULK_TIMEOUT, query).await?;
        let bundles = CoveredBundles::among(found, covered);
        delete_bundles(storage, document, &bundles.whole).await?;
        let mut undisturbed = true;
        for bundle in &bundles.part {
            undisturbed &= shrink_bundle(storage, document, bundle, covered).await?;
        }
        if undisturbed {
            return Ok(());
        }
    }
    Err(prune_disturbed())
}

async fn delete_bundles(
    storage: &PostgresStorage,
    document: &DocumentId,
    bundles: &[FoundBundle],
) -> Result<(), StorageError> {
    if bundles.is_empty() {
        return Ok(());
    }
    let origins: Vec<&[u8]> = bundles.iter().map(|bundle| &bundle.origin[..]).collect();
    let first_seqs: Vec<i64> = bundles.iter().map(|bundle| bundle.first_seq).collect();
    let query = sqlx::query(DELETE_BUNDLES).bind(document.as_bytes()).bind(origins).bind(first_seqs);
    storage.execute(query).await.map(drop)
}

/// Rewrites a bundle without its covered changes; `false` if it is no longer what was found.
async fn shrink_bundle(
    storage: &PostgresStorage,
    document: &DocumentId,
    found: &FoundBundle,
    covered: &HashSet<ChangeHash>,
) -> Result<bool, StorageError> {
    let read = sqlx::query_as(schema::READ_BUNDLE_CHANGES)
        .bind(document.as_bytes())
        .bind(&found.origin)
        .bind(found.first_seq)
        .bind(&found.hashes);
    let rows: Vec<(Vec<u8>,)> = storage.fetch_all(CALL_TIMEOUT, read).await?;
    let Some((changes,)) = rows.into_iter().next() else { return Ok(false) };
    let (hashes, changes) = without(&found.hashes, &changes.into(), covered)?;
    let replace = sqlx::query(schema::REPLACE_BUNDLE)
        .bind(document.as_bytes())
        .bind(&found.origin)
        .bind(found.first_seq)
        .bind(&found.hashes)
        .bind(hashes)
        .bind(changes);
    Ok(storage.execute(replace).await?.rows_affected() == 1)
}
