//! Statements over many rows at once, from a small fixed set of texts, so that each is prepared once.

use std::sync::LazyLock;

use sqlx::Arguments;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};

use crate::storage::bundle::FoundBundle;

/// How many rows the texts take. The largest stays far below SQLite's 32,766 parameters; the ladder covers any
/// number of rows with few statements.
const RUNGS: [usize; 4] = [256, 32, 4, 1];

static DELETE_BUNDLES: LazyLock<[String; RUNGS.len()]> = LazyLock::new(|| {
    let keys = |rows| vec!["(?, ?, ?)"; rows].join(", ");
    let head = "DELETE FROM changes WHERE (document_id, origin, first_seq) IN (VALUES ";
    RUNGS.map(|rows| format!("{head}{})", keys(rows)))
});

/// Deletes bundles of one document.
pub(super) async fn delete_bundles(
    connection: &mut SqliteConnection,
    document: &[u8],
    mut bundles: &[FoundBundle],
) -> Result<(), sqlx::Error> {
    for (rung, sql) in RUNGS.into_iter().zip(&*DELETE_BUNDLES) {
        while bundles.len() >= rung {
            let (now, later) = bundles.split_at(rung);
            bundles = later;
            let mut arguments = SqliteArguments::default();
            for bundle in now {
                arguments.add(document).map_err(sqlx::Error::Encode)?;
                arguments.add(&bundle.origin[..]).map_err(sqlx::Error::Encode)?;
                arguments.add(bundle.first_seq).map_err(sqlx::Error::Encode)?;
            }
            sqlx::query_with(sql.as_str(), arguments).execute(&mut *connection).await?;
        }
    }
    Ok(())
}
