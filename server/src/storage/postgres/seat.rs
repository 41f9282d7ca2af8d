//! A seat among the nodes of a region, kept by locks of a Postgres session.
//!
//! One connection holds the advisory locks of the seat's slot and, on one node, of the keeper of the links; it also hears
//! the notices. Postgres frees the locks when the connection ends. A second connection tells the notices, so that telling
//! never holds up hearing. Locks and channel are named after the schema, so regions in schemas of one database do not meet.
//!
//! A payload is `node number part parts hex`. Whatever else comes through the channel is passed over.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions};
use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use super::connections::connect;
use super::failed;
use crate::storage::StorageError;
use crate::storage::seat::{EVENTS_MAX, NOTICE_BYTES_MAX, Notices, Seat, SeatEvent, ToTell};

/// Nodes of one region at most.
const SLOTS_MAX: i32 = 64;

/// The keeper's lock, beside those of the slots.
const KEEPER: i32 = 1_000;

/// Bytes of a notice in one payload; in hexadecimal and with its head it stays below Postgres's 8000.
const PART_BYTES: usize = 3_900;

/// Parts told in one transaction at most, but for the parts of one notice.
const GATHERED_MAX: usize = 64;

const POLL: Duration = Duration::from_secs(1);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The server gives up a silent machine after about 5 + 3 × 3 seconds.
const KEEPALIVE: &str = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 3; \
     SET tcp_keepalives_count = 3; SET tcp_user_timeout = 14000";

/// The schema's number: the class of its locks, and part of its channel's name.
const CLASS: &str = "SELECT hashtext('isobar ' || current_schema()) & 2147483647, pg_backend_pid()";

const COUNT: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 \
     AND classid = $1::int8::oid AND objid < $2::int8::oid \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// Ends this node's former session if that still has the slot: its end has not come to the server's ears.
const END_FORMER: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND granted \
     AND objsubid = 2 AND classid = $1::int8::oid AND objid = $2::int8::oid AND pid = $3 \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// The connection that holds the locks.
struct Session {
    listener: PgListener,
    class: i32,
    pid: i32,
}

impl Session {
    async fn open(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(ANSWER_TIMEOUT)
            .connect_with(options.clone())
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        sqlx::raw_sql(KEEPALIVE).execute(&mut listener).await?;
        let (class, pid): (i32, i32) = sqlx::query_as(CLASS).fetch_one(&mut listener).await?;
        listener.listen(&channel(class)).await?;
        Ok(Self { listener, class, pid })
    }

    async fn lock(&mut self, key: i32) -> Result<bool, sqlx::Error> {
        let lock = sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)").bind(self.class).bind(key);
        lock.fetch_one(&mut self.listener).await
    }

    async fn siblings(&mut self) -> Result<usize, sqlx::Error> {
        let count = sqlx::query_scalar(COUNT).bind(i64::from(self.class)).bind(i64::from(SLOTS_MAX));
        let seats: i64 = count.fetch_one(&mut self.listener).await?;
        Ok(usize::try_from(seats - 1).unwrap_or(0))
    }

    /// Takes the slot again; false if another node has it.
    async fn take_again(&mut self, slot: i32, former: i32) -> Result<bool, sqlx::Error> {
        if self.lock(slot).await? {
            return Ok(true);
        }
        let end =
            sqlx::query_scalar(END_FORMER).bind(i64::from(self.class)).bind(i64::from(slot)).bind(former);
        let ended: i64 = end.fetch_one(&mut self.listener).await?;
        if ended == 0 {
            // It may have ended between the two questions.
            return self.lock(slot).await;
        }
        Err(sqlx::Error::PoolTimedOut)
    }
}

fn channel(class: i32) -> String {
    format!("isobar_{class}")
}

pub(super) async fn take(options: PgConnectOptions) -> Result<Seat, StorageError> {
    let opening = timeout(ANSWER_TIMEOUT, Session::open(&options)).await;
    let mut session = opening.map_err(|late| StorageError::Transient(late.into()))?.map_err(failed)?;
    let mut slot = 0;
    while !session.lock(slot).await.map_err(failed)? {
        slot += 1;
        if slot == SLOTS_MAX {
            return Err(StorageError::Transient("all seats of the region are taken".into()));
        }
    }
    let node = Uuid::new_v4();
    let (notices, queue) = Notices::queue();
    let (events, received) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(tell(options.clone(), node, channel(session.class), queue, events.clone()));
    tokio::spawn(
        Keeping { options, node, slot, events, heard: HashMap::new(), keeps: false, siblings: None }
            .run(session),
    );
    Ok(Seat { node, slot: slot.unsigned_abs(), notices, events: received })
}

struct Keeping {
    options: PgConnectOptions,
    node: Uuid,
    slot: i32,
    events: mpsc::Sender<SeatEvent>,
    /// The notice of each sibling of which parts are missing: its number, and what has come.
    heard: HashMap<Uuid, (u64, usize, Vec<u8>)>,
    keeps: bool,
    siblings: Option<usize>,
}

impl Keeping {
    async fn run(mut self, mut session: Session) {
        loop {
            self.say(SeatEvent::Resumed).await;
            let left = self.keep(&mut session).await;
            let former = session.pid;
            drop(session);
            self.heard.clear();
            self.set_keeps(false).await;
            if left {
                return;
            }
            session = loop {
                if self.events.is_closed() {
                    return;
                }
                match timeout(ANSWER_TIMEOUT, self.resume(former)).await {
                    Ok(Ok(Some(session))) => break session,
                    Ok(Ok(None)) => return self.say(SeatEvent::Lost).await,
                    Ok(Err(error)) => tracing::warn!(%error, "out of touch with the siblings"),
                    Err(_) => tracing::warn!("out of touch with the siblings: no answer"),
                }
                tokio::time::sleep(POLL).await;
            };
        }
    }

    async fn resume(&self, former: i32) -> Result<Option<Session>, sqlx::Error> {
        let mut session = Session::open(&self.options).await?;
        Ok(session.take_again(self.slot, former).await?.then_some(session))
    }

    /// Returns true when the seat was dropped, false when the connection is lost.
    async fn keep(&mut self, session: &mut Session) -> bool {
        let mut poll = tokio::time::interval(POLL);
        loop {
            let events = self.events.clone();
            let heard = tokio::select! {
                () = events.closed() => {
                    let free = sqlx::query("SELECT pg_advisory_unlock_all()").execute(&mut session.listener);
                    // The locks go with the connection in any case.
                    let _ = timeout(ANSWER_TIMEOUT, free).await;
                    return true;
                }
                heard = session.listener.try_recv() => heard,
                _ = poll.tick() => {
                    match timeout(ANSWER_TIMEOUT, self.look(session)).await {
                        Ok(Ok(())) => continue,
                        Ok(Err(_)) | Err(_) => return false,
                    }
                }
            };
            match heard {
                Ok(Some(notification)) => self.hear(notification.payload()).await,
                Ok(None) | Err(_) => return false,
            }
        }
    }

    async fn look(&mut self, session: &mut Session) -> Result<(), sqlx::Error> {
        if !self.keeps && session.lock(KEEPER).await? {
            self.set_keeps(true).await;
        }
        let siblings = session.siblings().await?;
        if self.siblings.replace(siblings) != Some(siblings) {
            self.say(SeatEvent::Siblings(siblings)).await;
        }
        Ok(())
    }

    async fn hear(&mut self, payload: &str) {
        let Some(part) = Part::parse(payload).filter(|part| part.node != self.node) else { return };
        if self.heard.len() >= SLOTS_MAX.unsigned_abs() as usize && !self.heard.contains_key(&part.node) {
            self.heard.clear();
        }
        let (number, next, bytes) = self.heard.entry(part.node).or_default();
        if part.index == 0 {
            (*number, *next) = (part.number, 0);
            bytes.clear();
        }
        let fits = *number == part.number && *next == part.index;
        if !fits || bytes.len() + part.bytes.len() > NOTICE_BYTES_MAX {
            self.heard.remove(&part.node);
            return;
        }
        *next += 1;
        bytes.extend_from_slice(&part.bytes);
        if *next == part.count {
            let notice = Bytes::from(std::mem::take(bytes));
            self.heard.remove(&part.node);
            self.say(SeatEvent::Told { by: part.node, notice }).await;
        }
    }

    async fn set_keeps(&mut self, keeps: bool) {
        if std::mem::replace(&mut self.keeps, keeps) != keeps {
            self.say(SeatEvent::KeepsLinks(keeps)).await;
        }
    }

    async fn say(&self, event: SeatEvent) {
        // Nobody listens any more when the seat was dropped.
        let _ = self.events.send(event).await;
    }
}

struct Part {
    node: Uuid,
    number: u64,
    index: usize,
    count: usize,
    bytes: Vec<u8>,
}

impl Part {
    fn parse(payload: &str) -> Option<Self> {
        let mut words = payload.split(' ');
        let node = Uuid::parse_str(words.next()?).ok()?;
        let number = words.next()?.parse().ok()?;
        let index: usize = words.next()?.parse().ok()?;
        let count: usize = words.next()?.parse().ok()?;
        let digits = words.next()?.as_bytes();
        let bytes = digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        let bytes = bytes.collect::<Option<Vec<u8>>>()?;
        let whole = words.next().is_none() && index < count && digits.len().is_multiple_of(2);
        whole.then_some(Self { node, number, index, count, bytes })
    }
}

fn write_parts(node: Uuid, number: u64, notice: &[u8], payloads: &mut Vec<String>) {
    let count = notice.len().div_ceil(PART_BYTES).max(1);
    for index in 0..count {
        let end = notice.len().min((index + 1) * PART_BYTES);
        let mut payload = format!("{node} {number} {index} {count} ");
        for byte in &notice[index * PART_BYTES..end] {
            write!(payload, "{byte:02x}").expect("a string takes everything");
        }
        payloads.push(payload);
    }
}

/// Tells what is queued until the seat is dropped. What cannot be told is lost.
async fn tell(
    options: PgConnectOptions,
    node: Uuid,
    channel: String,
    mut queue: ToTell,
    events: mpsc::Sender<SeatEvent>,
) {
    let mut connection: Option<PgConnection> = None;
    let mut number = 0;
    loop {
        let first = tokio::select! {
            () = events.closed() => return,
            first = queue.next() => first,
        };
        let Some(mut notice) = first else { return };
        let mut payloads = Vec::new();
        loop {
            number += 1;
            write_parts(node, number, &notice, &mut payloads);
            if payloads.len() >= GATHERED_MAX {
                break;
            }
            match queue.try_next() {
                Some(next) => notice = next,
                None => break,
            }
        }
        let sending = send(&options, &mut connection, &channel, &payloads);
        if !matches!(timeout(ANSWER_TIMEOUT, sending).await, Ok(Ok(()))) {
            connection = None;
            tracing::warn!(lost = payloads.len(), "siblings could not be told");
        }
    }
}

async fn send(
    options: &PgConnectOptions,
    connection: &mut Option<PgConnection>,
    channel: &str,
    payloads: &[String],
) -> Result<(), StorageError> {
    let connection = match connection {
        Some(connection) => connection,
        None => {
            let mut fresh = connect(options).await?;
            sqlx::query("SET synchronous_commit = off").execute(&mut fresh).await.map_err(failed)?;
            connection.insert(fresh)
        }
    };
    let tell = sqlx::query("SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS told (payload)");
    tell.bind(channel).bind(payloads).execute(connection).await.map_err(failed)?;
    Ok(())
}
