//! Giving damaged changes their bytes back.

use isobar_protocol::ids::DocumentId;
use sqlx::Connection;

use super::{SqliteStorage, failed};
use crate::storage::bundle::{Mending, WholeBundle, by_name};
use crate::storage::{StorageError, StoredChange, schema};

/// Replaces the bytes of stored changes, and removes bundles that do not decode. A bundle that another process changed
/// meanwhile stays what it is.
pub(super) async fn mend(
    storage: &SqliteStorage,
    document: &DocumentId,
    good: &[StoredChange],
) -> Result<(), StorageError> {
    let good = by_name(good);
    let mut writer = storage.writer().await?;
    let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    let read = sqlx::query_as(schema::READ_BUNDLES).bind(document.as_bytes());
    let bundles: Vec<WholeBundle> = read.fetch_all(&mut *transaction).await.map_err(failed)?;
    for bundle in &bundles {
        let mending = bundle.mending(&good);
        let statement = match mending {
            Mending::Keep => continue,
            Mending::Replace(_) => schema::REPLACE_BUNDLE,
            Mending::Remove => schema::REMOVE_BUNDLE,
        };
        let mut query = sqlx::query(statement)
            .bind(document.as_bytes())
            .bind(&bundle.origin)
            .bind(bundle.first_seq)
            .bind(&bundle.hashes);
        if let Mending::Replace(changes) = mending {
            query = query.bind(&bundle.hashes).bind(changes);
        }
        query.execute(&mut *transaction).await.map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}
