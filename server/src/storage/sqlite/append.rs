//! An append as one script: the transaction, from its beginning to its commit, as a single command to the
//! connection's thread. A command per statement would change threads a dozen times per append.

use std::fmt::Write;

use isobar_protocol::ids::{DocumentId, PlacementGroup, Seq};
use sqlx::error::{BoxDynError, ErrorKind};
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{Arguments, AssertSqlSafe};

use super::{deletion, failed};
use crate::storage::bundle::{Bundle, bundle};
use crate::storage::clock::now_ms;
use crate::storage::failure::signed;
use crate::storage::schema::two_groups;
use crate::storage::{Batch, RunAppend, StorageError, Writer, schema};

/// Takes the write lock at once: a transaction that begins by reading may find, when it wants to write, that what
/// it read is old, and has to start again.
const BEGIN: &str = "BEGIN IMMEDIATE";

const RAISE_OWN: &str = "\
    ; UPDATE origins SET seq = ?, chain = ? WHERE id = ? AND seq = ? - 1 AND incarnation = ?";

/// Before the first run of another region's origin.
const CREATE_OTHER: &str = "\
    ; INSERT INTO origins (id, region, placement_group, slot, incarnation, seq, chain) \
    VALUES (?, ?, ?, NULL, 0, 0, zeroblob(16)) ON CONFLICT (id) DO NOTHING";

/// An origin whose entries come from elsewhere is nobody's own any more: whoever holds it is fenced.
const RAISE_OTHER: &str = "\
    ; UPDATE origins SET seq = ?, chain = ?, incarnation = incarnation + (slot IS NOT NULL), slot = NULL \
    WHERE id = ? AND seq = ? - 1";

/// A counter that was not raised leaves the log's row without its `first_seq`, which may not be null: the script
/// fails there, and nothing after it runs.
const INSERT_RUN: &str = "\
    ; INSERT INTO log (origin, last_seq, first_seq, appended_at, chain_before, body) \
    VALUES (?, ?, CASE changes() WHEN 1 THEN ? END, ?, ?, ?)";

/// A statement over many rows: what stands before, between and after them.
struct Rows {
    head: &'static str,
    row: &'static str,
    tail: &'static str,
}

/// The conflict has its column named, because `OR IGNORE` would also swallow other violations.
const INSERT_DOCUMENTS: Rows = Rows {
    head: "; INSERT INTO documents (id, placement_group, state, created_at) \
           SELECT column1, column2, 0, column3 FROM (VALUES ",
    row: "(?, ?, ?)",
    tail: concat!(
        ") WHERE NOT EXISTS (SELECT 1 FROM tombstones WHERE document_id = column1) \
         ON CONFLICT (id) DO UPDATE SET state = 1, state_reason = ",
        two_groups!("documents.placement_group", "excluded.placement_group"),
        " WHERE documents.placement_group <> excluded.placement_group"
    ),
};

/// A document that was deleted is not there, and one of another group takes nothing.
const INSERT_BUNDLES: Rows = Rows {
    head: "; INSERT INTO changes (document_id, origin, first_seq, hashes, changes) \
           SELECT column1, column2, column3, column4, column5 FROM (VALUES ",
    row: "(?, ?, ?, ?, ?, ?)",
    tail: ") WHERE EXISTS (SELECT 1 FROM documents WHERE id = column1 AND placement_group = column6)",
};

/// Without a run there is no counter by which a repeated batch would be known.
const REPEATABLE: &str = " ON CONFLICT (document_id, origin, first_seq) DO NOTHING";

/// Most rows of one statement: far below SQLite's 32,766 parameters.
const STATEMENT_ROWS_MAX: usize = 64;

/// Up to this many documents, a script is worth keeping prepared: a batch of that shape will come again.
const KEPT_DOCUMENTS_MAX: usize = 32;

/// What came of an append's transaction.
pub(super) enum Appended {
    Committed,
    /// A counter stood elsewhere, or an incarnation is an older one. The transaction is still open.
    Refused,
}

/// Runs the whole append. Unless it has committed, the transaction may be open.
pub(super) async fn run(connection: &mut SqliteConnection, batch: &Batch) -> Result<Appended, StorageError> {
    let mut script = script(batch).map_err(|error| failed(sqlx::Error::Encode(error)))?;
    if batch.deletions.is_empty() {
        script.text.push_str("; COMMIT");
    }
    let query = sqlx::query_with(AssertSqlSafe(script.text), script.arguments).persistent(script.keep);
    match query.execute(&mut *connection).await {
        Ok(_) => {}
        Err(sqlx::Error::Database(error)) if error.kind() == ErrorKind::NotNullViolation => {
            return Ok(Appended::Refused);
        }
        Err(error) => return Err(failed(error)),
    }
    if !batch.deletions.is_empty() {
        deletion::delete(connection, &batch.deletions).await.map_err(failed)?;
        sqlx::raw_sql("COMMIT").execute(connection).await.map_err(failed)?;
    }
    Ok(Appended::Committed)
}

/// Statements and what their parameters stand for.
struct Script {
    text: String,
    arguments: SqliteArguments,
    /// Whether the database is to keep it prepared.
    keep: bool,
}

fn script(batch: &Batch) -> Result<Script, BoxDynError> {
    let documents = schema::documents(&batch.changes);
    let keep = documents.created.len() <= KEPT_DOCUMENTS_MAX && documents.regrouped.is_empty();
    let mut script = Script { text: String::from(BEGIN), arguments: SqliteArguments::default(), keep };
    let now = now_ms();
    for run in &batch.runs {
        script.push_run(run, now)?;
    }
    let parts = documents.created.chunks(STATEMENT_ROWS_MAX);
    for part in parts.chain(documents.regrouped.chunks(STATEMENT_ROWS_MAX)) {
        script.push_rows(&INSERT_DOCUMENTS, part.len());
        for document in part {
            script.bind_document(*document, now)?;
        }
    }
    let bundles = bundle(&batch.changes);
    for part in bundles.chunks(STATEMENT_ROWS_MAX) {
        script.push_rows(&INSERT_BUNDLES, part.len());
        if batch.runs.is_empty() {
            script.text.push_str(REPEATABLE);
        }
        for bundle in part {
            script.bind_bundle(bundle)?;
        }
    }
    Ok(script)
}

impl Script {
    fn push_rows(&mut self, Rows { head, row, tail }: &Rows, count: usize) {
        let rows = vec![*row; count].join(", ");
        write!(self.text, "{head}{rows}{tail}").expect("a string takes any text");
    }

    fn push_run(&mut self, run: &RunAppend, now: i64) -> Result<(), BoxDynError> {
        let id = &run.origin.0.as_bytes()[..];
        if let Writer::Other { region } = &run.writer
            && run.first == Seq(1)
        {
            self.text.push_str(CREATE_OTHER);
            self.arguments.add(id)?;
            self.arguments.add(region.as_str())?;
            self.arguments.add(run.group.as_str())?;
        }
        self.text.push_str(match run.writer {
            Writer::Own { .. } => RAISE_OWN,
            Writer::Other { .. } => RAISE_OTHER,
        });
        self.arguments.add(signed(run.last.0))?;
        self.arguments.add(&run.chain.0[..])?;
        self.arguments.add(id)?;
        self.arguments.add(signed(run.first.0))?;
        if let Writer::Own { incarnation } = run.writer {
            self.arguments.add(signed(incarnation.0))?;
        }
        self.text.push_str(INSERT_RUN);
        self.arguments.add(id)?;
        self.arguments.add(signed(run.last.0))?;
        self.arguments.add(signed(run.first.0))?;
        self.arguments.add(now)?;
        self.arguments.add(&run.chain_before.0[..])?;
        self.arguments.add(&run.body[..])
    }

    fn bind_document(
        &mut self,
        (document, group): (&DocumentId, &PlacementGroup),
        created_at: i64,
    ) -> Result<(), BoxDynError> {
        self.arguments.add(document.as_bytes())?;
        self.arguments.add(group.as_str())?;
        self.arguments.add(created_at)
    }

    fn bind_bundle(&mut self, bundle: &Bundle<'_>) -> Result<(), BoxDynError> {
        self.arguments.add(bundle.document.as_bytes())?;
        self.arguments.add(&bundle.origin.0.as_bytes()[..])?;
        self.arguments.add(signed(bundle.first.0))?;
        self.arguments.add(&bundle.hashes[..])?;
        self.arguments.add(&bundle.changes[..])?;
        self.arguments.add(bundle.group.as_str())
    }
}
