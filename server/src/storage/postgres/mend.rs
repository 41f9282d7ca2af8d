//! Giving damaged changes their bytes back. Each step is a transaction by itself: a bundle is mended or it is not.

use isobar_protocol::ids::DocumentId;

use super::{BULK_TIMEOUT, PostgresStorage};
use crate::storage::bundle::{Mending, WholeBundle, by_name};
use crate::storage::{StorageError, StoredChange, schema};

/// Replaces the bytes of stored changes, and removes bundles that do not decode. A bundle that another node changed
/// meanwhile stays what it is.
pub(super) async fn mend(
    storage: &PostgresStorage,
    document: &DocumentId,
    good: &[StoredChange],
) -> Result<(), StorageError> {
    let good = by_name(good);
    let read = sqlx::query_as(schema::READ_BUNDLES).bind(document.as_bytes());
    let bundles: Vec<WholeBundle> = storage.fetch_all(BULK_TIMEOUT, read).await?;
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
        storage.execute(query).await?;
    }
    Ok(())
}
