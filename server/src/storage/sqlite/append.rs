//! An append as one script: the transaction, from its beginning to its commit, as a single command to the
//! connection's thread. A command per statement would change threads a dozen times per append.

use std::fmt::Write;

use sqlx::error::{BoxDynError, ErrorKind};
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{Arguments, AssertSqlSafe};

use crate::storage::bundle::{Bundle, bundle};
use crate::storage::failure::signed;
use crate::storage::log_run::LogRun;
use crate::storage::schema;
use crate::storage::{ClaimedOrigin, DocumentAppend};

/// Takes the write lock at once: a transaction that begins by reading may find, when it wants to write, that what
/// it read is old, and has to start again.
///
/// A counter that was not raised leaves the log's row without its `first_seq`, which may not be null: the script
/// fails there, and nothing after it runs.
const BEGIN: &str = "\
    BEGIN IMMEDIATE; \
    UPDATE origins SET seq = ? WHERE id = ? AND incarnation = ? AND seq = ? - 1; \
    INSERT INTO log (origin, last_seq, first_seq, entries) VALUES (?, ?, CASE changes() WHEN 1 THEN ? END, ?)";

/// The conflict has its column named, because `OR IGNORE` would also swallow other violations.
const INSERT_DOCUMENTS: (&str, &str, &str) = (
    "; INSERT INTO documents (id, placement_group, state, created_at) VALUES ",
    "(?, ?, 0, ?)",
    " ON CONFLICT (id) DO NOTHING",
);

const INSERT_BUNDLES: (&str, &str, &str) = (
    "; INSERT INTO changes (document_id, origin, first_seq, hashes, changes) VALUES ",
    "(?, ?, ?, ?, ?)",
    "",
);

/// Most rows of one statement: far below SQLite's 32,766 parameters.
const STATEMENT_ROWS_MAX: usize = 64;

/// Up to this many documents, a script is worth keeping prepared: a batch of that shape will come again.
const KEPT_DOCUMENTS_MAX: usize = 32;

/// What came of an append's transaction.
pub(super) enum Appended {
    Committed,
    /// The counter stood elsewhere, or the incarnation is an older one. The transaction is still open.
    Refused,
}

/// Runs the whole append. Unless it has committed, the transaction may be open.
pub(super) async fn run(
    connection: &mut SqliteConnection,
    origin: &ClaimedOrigin,
    run: &LogRun,
    batch: &[DocumentAppend],
) -> Result<Appended, sqlx::Error> {
    let documents = schema::documents(batch);
    let bundles = bundle(run.first, batch);
    let mut script = String::from(BEGIN);
    push_rows(&mut script, INSERT_DOCUMENTS, documents.len());
    push_rows(&mut script, INSERT_BUNDLES, bundles.len());
    script.push_str("; COMMIT");
    let mut arguments = SqliteArguments::default();
    bind_run(&mut arguments, origin, run).map_err(sqlx::Error::Encode)?;
    let created_at = schema::now_ms();
    for document in &documents {
        bind_document(&mut arguments, document.as_bytes(), origin, created_at)
            .map_err(sqlx::Error::Encode)?;
    }
    for bundle in bundles {
        bind_bundle(&mut arguments, origin, bundle).map_err(sqlx::Error::Encode)?;
    }
    let keep = documents.len() <= KEPT_DOCUMENTS_MAX;
    let query = sqlx::query_with(AssertSqlSafe(script), arguments).persistent(keep);
    match query.execute(connection).await {
        Ok(_) => Ok(Appended::Committed),
        Err(sqlx::Error::Database(error)) if error.kind() == ErrorKind::NotNullViolation => {
            Ok(Appended::Refused)
        }
        Err(error) => Err(error),
    }
}

fn push_rows(script: &mut String, (head, row, tail): (&str, &str, &str), rows: usize) {
    for first in (0..rows).step_by(STATEMENT_ROWS_MAX) {
        let count = (rows - first).min(STATEMENT_ROWS_MAX);
        write!(script, "{head}{}{tail}", vec![row; count].join(", ")).expect("a string takes any text");
    }
}

fn bind_run(
    arguments: &mut SqliteArguments,
    origin: &ClaimedOrigin,
    run: &LogRun,
) -> Result<(), BoxDynError> {
    let id = &origin.id.0.as_bytes()[..];
    arguments.add(signed(run.last.0))?;
    arguments.add(id)?;
    arguments.add(signed(origin.incarnation.0))?;
    arguments.add(signed(run.first.0))?;
    arguments.add(id)?;
    arguments.add(signed(run.last.0))?;
    arguments.add(signed(run.first.0))?;
    arguments.add(&run.entries[..])
}

fn bind_document(
    arguments: &mut SqliteArguments,
    document: &[u8],
    origin: &ClaimedOrigin,
    created_at: i64,
) -> Result<(), BoxDynError> {
    arguments.add(document)?;
    arguments.add(origin.group.as_str())?;
    arguments.add(created_at)
}

fn bind_bundle(
    arguments: &mut SqliteArguments,
    origin: &ClaimedOrigin,
    bundle: Bundle<'_>,
) -> Result<(), BoxDynError> {
    arguments.add(bundle.document.as_bytes())?;
    arguments.add(&origin.id.0.as_bytes()[..])?;
    arguments.add(signed(bundle.first.0))?;
    arguments.add(bundle.hashes)?;
    arguments.add(bundle.changes)
}
