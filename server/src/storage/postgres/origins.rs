//! Origins and what other regions have of them.

use std::collections::BTreeMap;

use isobar_protocol::ids::{PlacementGroup, RegionName};
use isobar_protocol::link::MissingDocument;
use isobar_protocol::log::Chain;
use sqlx::Connection;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::storage::failure::clamped;
use crate::storage::rows::ClaimedRow;
use crate::storage::{Acknowledgement, StoredOrigin, schema};

/// In one transaction: of two nodes that claim the same slot at once, the second finds the first one's claim.
pub(super) async fn claim(
    connection: &mut PgConnection,
    region: &RegionName,
    group: &PlacementGroup,
    slot: u32,
    anew: bool,
) -> Result<ClaimedRow, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    if anew {
        sqlx::query(schema::REPLACE_ORIGIN)
            .bind(region.as_str())
            .bind(group.as_str())
            .bind(i64::from(slot))
            .execute(&mut *transaction)
            .await?;
    }
    let row = sqlx::query_as(schema::CLAIM_ORIGIN)
        .bind(&Uuid::new_v4().as_bytes()[..])
        .bind(region.as_str())
        .bind(group.as_str())
        .bind(i64::from(slot))
        .bind(&Chain::START.0[..])
        .fetch_one(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(row)
}

/// In the order of their ids, as appends raise them.
pub(super) async fn adopt(
    connection: &mut PgConnection,
    origins: &[StoredOrigin],
    missing: &[MissingDocument],
) -> Result<(), sqlx::Error> {
    let mut ordered: Vec<&StoredOrigin> = origins.iter().collect();
    ordered.sort_by_key(|origin| origin.id);
    let mut transaction = connection.begin().await?;
    for origin in ordered {
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

const NOTE_ACKNOWLEDGEMENTS: &str = "\
    INSERT INTO acknowledgements (region, origin, seq) \
    SELECT * FROM unnest($1::text[], $2::bytea[], $3::bigint[]) \
    ON CONFLICT (region, origin) DO UPDATE SET seq = excluded.seq WHERE acknowledgements.seq < excluded.seq";

/// In order and each row once, which is what one statement can do without waiting in a circle.
pub(super) async fn note_acknowledgements(
    connection: &mut PgConnection,
    news: &[Acknowledgement],
) -> Result<(), sqlx::Error> {
    let mut latest: BTreeMap<(&str, &[u8]), i64> = BTreeMap::new();
    for new in news {
        let seq = latest.entry((new.region.as_str(), &new.origin.0.as_bytes()[..])).or_default();
        *seq = clamped(new.seq.0).max(*seq);
    }
    let (keys, seqs): (Vec<_>, Vec<i64>) = latest.into_iter().unzip();
    let (regions, origins): (Vec<&str>, Vec<&[u8]>) = keys.into_iter().unzip();
    sqlx::query(NOTE_ACKNOWLEDGEMENTS)
        .bind(regions)
        .bind(origins)
        .bind(seqs)
        .execute(connection)
        .await
        .map(drop)
}

pub(super) async fn forget_member(
    connection: &mut PgConnection,
    region: &RegionName,
) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    sqlx::query(schema::REMOVE_ACKNOWLEDGEMENTS).bind(region.as_str()).execute(&mut *transaction).await?;
    let removed = sqlx::query(schema::REMOVE_MEMBER).bind(region.as_str()).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(removed.rows_affected() > 0)
}
