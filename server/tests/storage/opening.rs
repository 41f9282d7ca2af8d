//! Clauses 9 and 10: opening, and what else concerns the whole database.

use futures_util::future::join_all;
use isobar::storage::StorageError;
use isobar_protocol::ids::{RegionName, Seq};

use crate::fixture::*;

pub async fn clause_9_nodes_that_open_at_once_all_succeed(database: Database) {
    let opened = join_all((0..6).map(|_| database.open())).await;
    let region = region();
    let ids = join_all(opened.iter().map(|storage| storage.region_identity(&region))).await;
    for id in &ids {
        assert_eq!(id.as_ref().unwrap(), ids[0].as_ref().unwrap());
    }
    let origin = claim(&*opened[0], 0).await;
    opened[0].append(&origin, Seq(1), &[append(1, 0..3)]).await.unwrap();
    assert_eq!(load(&*opened[5], 1).await.tail.len(), 3);
}

pub async fn clause_10_the_storage_id_stays_and_another_region_is_refused(database: Database) {
    let storage = database.open().await;
    let id = storage.region_identity(&region()).await.unwrap();
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);
    let database = database.crashed();
    let storage = database.open().await;
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);

    let other = RegionName::new("us").unwrap();
    let refused = storage.region_identity(&other).await;
    assert!(
        matches!(refused, Err(StorageError::OtherRegion { expected, found }) if expected == other && found == region())
    );
    let refused = storage.claim_origin(&other, &group(), 0).await;
    assert!(matches!(refused, Err(StorageError::OtherRegion { .. })));
    assert_eq!(claim(&*storage, 0).await.incarnation.0, 1);
    assert_eq!(storage.region_identity(&region()).await.unwrap(), id);
}

pub async fn statistics_count_documents_and_changes(database: Database) {
    let storage = database.open().await;
    let empty = storage.statistics().await.unwrap();
    assert_eq!((empty.documents, empty.changes), (0, 0));
    let origin = claim(&*storage, 0).await;
    storage.append(&origin, Seq(1), &[append(1, 0..5), append(2, 0..1)]).await.unwrap();
    let found = storage.statistics().await.unwrap();
    assert_eq!((found.documents, found.changes), (2, 6));
    assert!(matches!(database, Database::Memory(_)) || found.disk_bytes > 4_096);
    storage.check().await.unwrap();
}

pub async fn a_closed_storage_refuses_calls(database: Database) {
    let storage = database.open().await;
    let origin = claim(&*storage, 0).await;
    storage.append(&origin, Seq(1), &[append(1, 0..1)]).await.unwrap();
    storage.close().await;
    assert!(matches!(storage.check().await, Err(StorageError::Fatal(_))));
    let refused = storage.append(&origin, Seq(2), &[append(1, 1..2)]).await;
    assert!(matches!(refused, Err(StorageError::Fatal(_))));
    assert!(matches!(storage.load_document(&document(1)).await, Err(StorageError::Fatal(_))));
    storage.close().await;
    assert_eq!(load(&*database.open().await, 1).await.tail.len(), 1);
}
