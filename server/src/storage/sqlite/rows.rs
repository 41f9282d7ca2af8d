//! Statements over many rows at once, from a small fixed set of texts, so that each is prepared once.

use std::sync::LazyLock;

use sqlx::error::BoxDynError;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};

/// How many rows the texts take. The largest stays far below SQLite's 32,766 parameters; the ladder covers any
/// number of rows with few statements.
const RUNGS: [usize; 4] = [256, 32, 4, 1];

/// A statement in one text per rung.
pub(super) struct ManyRows([String; RUNGS.len()]);

/// `$1`: document, `$2`: change hash, `$3`: bytes, and so on for each row. A named conflict target, because
/// `OR IGNORE` would also swallow a violated `NOT NULL`.
pub(super) static INSERT_CHANGES: LazyLock<ManyRows> = LazyLock::new(|| {
    ManyRows::new(
        "INSERT INTO changes (document_id, change_hash, bytes) VALUES ",
        "(?, ?, ?)",
        " ON CONFLICT (document_id, change_hash) DO NOTHING",
    )
});

/// For each row: document, placement group, time of creation.
pub(super) static INSERT_DOCUMENTS: LazyLock<ManyRows> = LazyLock::new(|| {
    ManyRows::new(
        "INSERT INTO documents (id, placement_group, state, created_at) VALUES ",
        "(?, ?, 0, ?)",
        " ON CONFLICT (id) DO NOTHING",
    )
});

/// For each row: document, change hash.
pub(super) static DELETE_CHANGES: LazyLock<ManyRows> = LazyLock::new(|| {
    ManyRows::new("DELETE FROM changes WHERE (document_id, change_hash) IN (VALUES ", "(?, ?)", ")")
});

impl ManyRows {
    fn new(head: &str, row: &str, tail: &str) -> Self {
        Self(RUNGS.map(|rows| format!("{head}{}{tail}", vec![row; rows].join(", "))))
    }

    /// Runs the statement for all `rows`, whose values `bind` adds in the order of the text.
    pub async fn run<T: Sync>(
        &'static self,
        connection: &mut SqliteConnection,
        mut rows: &[T],
        bind: impl Fn(&mut SqliteArguments, &T) -> Result<(), BoxDynError> + Send + Sync,
    ) -> Result<(), sqlx::Error> {
        for (rung, sql) in RUNGS.into_iter().zip(&self.0) {
            while rows.len() >= rung {
                let (now, later) = rows.split_at(rung);
                rows = later;
                let mut arguments = SqliteArguments::default();
                for row in now {
                    bind(&mut arguments, row).map_err(sqlx::Error::Encode)?;
                }
                sqlx::query_with(sql.as_str(), arguments).execute(&mut *connection).await?;
            }
        }
        Ok(())
    }
}
