//! Taking covered changes out of their bundles.

use std::collections::HashSet;

use isobar_protocol::ids::{ChangeHash, DocumentId};
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::rows::delete_bundles;
use super::{SqliteStorage, failed};
use crate::storage::StorageError;
use crate::storage::bundle::{CoveredBundles, FoundBundle, PRUNE_ATTEMPTS_MAX, prune_disturbed, without};
use crate::storage::schema;

/// Removes covered changes. Starts again where another process changed a bundle meanwhile.
pub(super) async fn prune(
    storage: &SqliteStorage,
    document: &DocumentId,
    covered: &HashSet<ChangeHash>,
) -> Result<(), StorageError> {
    for _ in 0..PRUNE_ATTEMPTS_MAX {
        // Found outside the transaction, so that appends do not wait for it.
        let bundles = covered_bundles(storage, document, covered).await?;
        if bundles.whole.is_empty() && bundles.part.is_empty() {
            return Ok(());
        }
        let mut writer = storage.writer().await?;
        let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let whole = delete_bundles(&mut transaction, document.as_bytes(), &bundles.whole);
        whole.await.map_err(failed)?;
        let mut undisturbed = true;
        for bundle in &bundles.part {
            undisturbed &= shrink_bundle(&mut transaction, document, bundle, covered).await?;
        }
        transaction.commit().await.map_err(failed)?;
        if undisturbed {
            return Ok(());
        }
    }
    Err(prune_disturbed())
}

async fn covered_bundles(
    storage: &SqliteStorage,
    document: &DocumentId,
    covered: &HashSet<ChangeHash>,
) -> Result<CoveredBundles, StorageError> {
    let query = sqlx::query_as(schema::READ_BUNDLE_HASHES).bind(document.as_bytes());
    let found: Vec<FoundBundle> = query.fetch_all(&storage.readers).await.map_err(failed)?;
    Ok(CoveredBundles::among(found, covered))
}

/// Rewrites a bundle without its covered changes; `false` if it is no longer what was found.
async fn shrink_bundle(
    connection: &mut SqliteConnection,
    document: &DocumentId,
    found: &FoundBundle,
    covered: &HashSet<ChangeHash>,
) -> Result<bool, StorageError> {
    let changes: Option<Vec<u8>> = sqlx::query_scalar(schema::READ_BUNDLE_CHANGES)
        .bind(document.as_bytes())
        .bind(&found.origin)
        .bind(found.first_seq)
        .bind(&found.hashes)
        .fetch_optional(&mut *connection)
        .await
        .map_err(failed)?;
    let Some(changes) = changes else { return Ok(false) };
    let (hashes, changes) = without(&found.hashes, &changes.into(), covered)?;
    let replaced = sqlx::query(schema::REPLACE_BUNDLE)
        .bind(document.as_bytes())
        .bind(&found.origin)
        .bind(found.first_seq)
        .bind(&found.hashes)
        .bind(hashes)
        .bind(changes)
        .execute(connection)
        .await
        .map_err(failed)?;
    Ok(replaced.rows_affected() == 1)
}
