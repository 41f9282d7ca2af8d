//! Origins and what other regions have of them.

use isobar_protocol::ids::{PlacementGroup, RegionName};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::log::Chain;
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::{failed, found_region};
use crate::storage::failure::clamped;
use crate::storage::rows::ClaimedRow;
use crate::storage::{Acknowledgement, ClaimedOrigin, StorageError, StoredOrigin, schema};

pub(super) async fn claim(
    connection: &mut SqliteConnection,
    region: &RegionName,
    group: &PlacementGroup,
    slot: u32,
    anew: bool,
) -> Result<ClaimedOrigin, StorageError> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    if let Some((name, _)) = found_region(&mut transaction).await? {
        schema::check_region(region, &name)?;
    }
    if anew {
        sqlx::query(schema::REPLACE_ORIGIN)
            .bind(region.as_str())
            .bind(group.as_str())
            .bind(i64::from(slot))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    let row: ClaimedRow = sqlx::query_as(schema::CLAIM_ORIGIN)
        .bind(&Uuid::new_v4().as_bytes()[..])
        .bind(region.as_str())
        .bind(group.as_str())
        .bind(i64::from(slot))
        .bind(&Chain::START.0[..])
        .fetch_one(&mut *transaction)
        .await
        .map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    row.claimed(group)
}

pub(super) async fn adopt(
    connection: &mut SqliteConnection,
    origins: &[StoredOrigin],
    missing: &[MissingDocument],
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    for origin in origins {
        let raised = sqlx::query(schema::ADOPT_ORIGIN)
            .bind(&origin.id.0.as_bytes()[..])
            .bind(origin.region.as_str())
            .bind(origin.group.as_str())
            .bind(clamped(origin.seq.0))
            .bind(&origin.chain.0[..])
            .execute(&mut *transaction)
            .await?;
        if raised.rows_affected() > 0 {
            sqlx::query(schema::DELETE_RUNS)
                .bind(&origin.id.0.as_bytes()[..])
                .bind(clamped(origin.seq.0))
                .execute(&mut *transaction)
                .await?;
        }
    }
    for lacking in missing {
        sqlx::query(schema::PUT_MISSING_DOCUMENT)
            .bind(lacking.document.as_bytes())
            .bind(lacking.group.as_str())
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await
}

pub(super) async fn note_acknowledgements(
    connection: &mut SqliteConnection,
    news: &[Acknowledgement],
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    for new in news {
        sqlx::query(schema::NOTE_ACKNOWLEDGEMENT)
            .bind(new.region.as_str())
            .bind(&new.origin.0.as_bytes()[..])
            .bind(clamped(new.seq.0))
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await
}

pub(super) async fn forget_member(
    connection: &mut SqliteConnection,
    region: &RegionName,
) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query(schema::REMOVE_ACKNOWLEDGEMENTS).bind(region.as_str()).execute(&mut *transaction).await?;
    let removed = sqlx::query(schema::REMOVE_MEMBER).bind(region.as_str()).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(removed.rows_affected() > 0)
}
