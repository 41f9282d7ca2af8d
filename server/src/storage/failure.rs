//! How errors of sqlx become [`StorageError`]s. What depends on the database is asked of a predicate.
//!
//! The rule: whatever may pass by itself, or by connecting anew, is transient. All else is fatal, and that is the
//! default: an error nobody has thought about shall stop the node rather than be retried for ever.

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;

use super::StorageError;

/// Whether an error that the database itself reported may pass.
pub(super) type MayPass = fn(&dyn DatabaseError) -> bool;

/// Classifies an error of a call. `Io` is a lost connection, and `Tls` one that was lost while it was set up.
/// A closed pool stays closed, so repeating a call on it is pointless: fatal.
pub(super) fn classify(error: sqlx::Error, may_pass: MayPass) -> StorageError {
    let transient = match &error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Database(reported) => may_pass(reported.as_ref()),
        _ => false,
    };
    match error {
        sqlx::Error::Migrate(error) => classify_migration(*error, may_pass),
        error if transient => StorageError::Transient(Box::new(error)),
        error => StorageError::Fatal(Box::new(error)),
    }
}

/// Classifies an error of a migration: that of its statement, else (a checksum that differs) fatal.
pub(super) fn classify_migration(error: MigrateError, may_pass: MayPass) -> StorageError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => classify(error, may_pass),
        error => StorageError::Fatal(Box::new(error)),
    }
}

/// A number from the database that can only be negative if the database is damaged.
pub(super) fn unsigned(number: i64) -> Result<u64, StorageError> {
    u64::try_from(number).map_err(|error| StorageError::Fatal(Box::new(error)))
}

/// A number for the database. Seqs, generations and incarnations count up from zero and never get this far.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).expect("counters stay below 2^63")
}

/// A cursor for the database: unlike a counter it may come from elsewhere, and one beyond all counters is as good as
/// the last.
pub(super) fn clamped(cursor: u64) -> i64 {
    i64::try_from(cursor).unwrap_or(i64::MAX)
}

/// An id or name from the database that does not fit its own limits: the database is damaged.
pub(super) fn intact<T>(parsed: Result<T, isobar_protocol::ids::IdError>) -> Result<T, StorageError> {
    parsed.map_err(|error| StorageError::Fatal(Box::new(error)))
}
