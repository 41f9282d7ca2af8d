//! Connections to Postgres, leased one call at a time.
//!
//! sqlx's own pool asks the server a question whenever a connection comes back, and has no limit on how long a
//! query may hang when the server's machine is gone. Here a connection returns only after its call has
//! succeeded, with nothing outstanding; one whose call failed, took too long or was cancelled is dropped, and the
//! server rolls back whatever it had begun.

use std::future::Future;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::failed;
use crate::storage::StorageError;

/// How long to wait for a free connection, and then again to connect. A region's database is a few milliseconds
/// away; one that has not answered by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that rested longer is asked whether it still lives, at the cost of a round trip. A busy one is not.
const TRUSTED_IDLE: Duration = Duration::from_secs(2);

/// A connection is replaced at this age, so that connections follow a load balancer or a new address.
const AGE_MAX: Duration = Duration::from_secs(30 * 60);

/// An error of a call, classified.
pub(super) struct CallError(StorageError);

impl From<sqlx::Error> for CallError {
    fn from(error: sqlx::Error) -> Self {
        Self(failed(error))
    }
}

impl From<StorageError> for CallError {
    fn from(error: StorageError) -> Self {
        Self(error)
    }
}

pub(super) struct Connections {
    options: PgConnectOptions,
    permits: Semaphore,
    permits_max: u32,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: PgConnection,
    connected: Instant,
    rested: Instant,
}

/// A connection for one call. Dropping it closes the connection; [`Lease::give_back`] keeps it.
pub(super) struct Lease<'a> {
    pub connection: PgConnection,
    connected: Instant,
    home: &'a Connections,
    _permit: SemaphorePermit<'a>,
}

impl Connections {
    pub fn new(options: PgConnectOptions, permits_max: u32) -> Self {
        let permits = Semaphore::new(permits_max as usize);
        Self { options, permits, permits_max, idle: Mutex::default() }
    }

    /// A connection that works, as far as can be known.
    pub async fn lease(&self) -> Result<Lease<'_>, StorageError> {
        let permit = match timeout(CONNECT_TIMEOUT, self.permits.acquire()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(StorageError::Fatal("the storage is closed".into())),
            Err(_) => {
                return Err(StorageError::Transient("every connection to the database is in use".into()));
            }
        };
        let kept = self.kept().await;
        let (connection, connected) = match kept {
            Some(kept) => kept,
            None => (connect(&self.options).await?, Instant::now()),
        };
        Ok(Lease { connection, connected, home: self, _permit: permit })
    }

    async fn kept(&self) -> Option<(PgConnection, Instant)> {
        let mut idle = self.idle.lock().pop()?;
        if idle.connected.elapsed() > AGE_MAX {
            return None;
        }
        if idle.rested.elapsed() > TRUSTED_IDLE {
            let answer = timeout(CONNECT_TIMEOUT, idle.connection.ping()).await;
            if !matches!(answer, Ok(Ok(()))) {
                self.idle.lock().clear();
                return None;
            }
        }
        Some((idle.connection, idle.connected))
    }

    /// Waits for `work` on a leased connection and classifies its error. When the connection is lost, those that
    /// rest are not trusted either: a restarted server has forgotten them all.
    pub async fn finish<T, E: Into<CallError>>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, StorageError> {
        let outcome = match timeout(limit, work).await {
            Ok(outcome) => outcome.map_err(|error| error.into().0),
            Err(_) => Err(StorageError::Transient(format!("no answer within {limit:?}").into())),
        };
        if matches!(outcome, Err(StorageError::Transient(_))) {
            self.idle.lock().clear();
        }
        outcome
    }

    /// Waits for the leases that are out, then closes. Later leases fail.
    pub async fn close(&self) {
        let all = self.permits.acquire_many(self.permits_max).await;
        self.permits.close();
        drop(all);
        let idle = std::mem::take(&mut *self.idle.lock());
        for Idle { connection, .. } in idle {
            // The server notices either way; a goodbye only spares its log a line.
            let _ = timeout(CONNECT_TIMEOUT, connection.close()).await;
        }
    }
}

impl Lease<'_> {
    /// Keeps the connection for the next call. Only for a connection with nothing outstanding.
    pub fn give_back(self) {
        let Self { connection, connected, home, .. } = self;
        home.idle.lock().push(Idle { connection, connected, rested: Instant::now() });
    }
}

/// A new connection.
pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, StorageError> {
    match timeout(CONNECT_TIMEOUT, options.connect()).await {
        Ok(outcome) => outcome.map_err(failed),
        Err(_) => Err(StorageError::Transient("the database did not accept a connection in time".into())),
    }
}
