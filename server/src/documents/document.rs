//! One live document: its graph, who is subscribed, and the bytes that several of them will be sent.
//!
//! Everything mutable stands behind one lock that is held for microseconds and never across an `await`. A commit
//! only marks the subscribers; each builds its message when its socket takes one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use isobar_protocol::base::BaseIndex;
use isobar_protocol::change::Change;
use isobar_protocol::config::{Limits, REMOTE_HEADS_STORAGES_MAX};
use isobar_protocol::graph::{Graph, Ingested, Refusal};
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId, StorageId};
use isobar_protocol::presence::Recent;
use isobar_protocol::session::{Reply, SyncSession, span_message, whole_message};
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::{RemoteHeads, SharedSyncFrame};
use parking_lot::{Mutex, MutexGuard};

use super::LoadError;
use crate::commit::{Committer, Permit, Submission};
use crate::outbox::{LossyFrame, Outbox, Slot};
use crate::storage::StoredChange;

/// Changes offered to a graph under one hold of its lock. Other sessions of the document wait some milliseconds.
const INGEST_PER_LOCK: usize = 1_000;

/// Heads of another storage that are remembered and passed on. A document has one for each author who is writing.
const REMOTE_HEADS_MAX: usize = 256;

/// Raw changes kept behind the newest when a base is made, so that clients that were away for a moment still get
/// single changes: a browser pays half a second to merge a whole document, and a tenth for a few changes.
pub(super) const TAIL_CHANGES_KEPT: u64 = 1_024;

/// How long after a failure another base is tried.
const COMPACTION_RETRY: Duration = Duration::from_secs(60);

/// The least number of changes that is worth a base while the document is in use.
const BASE_CHANGES_MIN: u64 = 4_096;

/// On a large document, the fraction of what the base covers that is worth a new one: making it costs the whole.
const BASE_FRACTION: u64 = 8;

/// The same when nothing has been committed for a while.
const IDLE_BASE_CHANGES_MIN: u64 = 256;
const IDLE_BASE_FRACTION: u64 = 32;

/// A document in memory.
pub struct Document {
    id: DocumentId,
    state: Mutex<DocumentState>,
    pending: PendingRoom,
}

/// Room for changes that wait for a dependency, shared by all documents: they are no client's uncommitted bytes any
/// more, and nothing evicts them while somebody has the document open.
#[derive(Clone)]
pub(super) struct PendingRoom {
    used_bytes: Arc<AtomicUsize>,
    bytes_max: usize,
}

impl PendingRoom {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { used_bytes: Arc::default(), bytes_max }
    }

    /// The limits for a document, whose graph holds so much of the room.
    fn limits(&self, limits: &Limits, own_bytes: usize) -> Limits {
        let left = self.bytes_max.saturating_sub(self.used_bytes.load(Ordering::Relaxed));
        Limits { pending_bytes_max: limits.pending_bytes_max.min(own_bytes + left), ..limits.clone() }
    }

    fn changed(&self, before: usize, after: usize) {
        if after >= before {
            self.used_bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.used_bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}

impl Drop for Document {
    fn drop(&mut self) {
        self.pending.changed(self.state.get_mut().graph.pending_bytes(), 0);
    }
}

/// A subscriber's place in a document, to unsubscribe with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscriberKey(usize);

struct Subscriber {
    outbox: Arc<Outbox>,
    slot: Slot,
    /// Marked in the outbox and not taken yet.
    marked: bool,
    /// Wants to hear what storages other than the region's have.
    watches: bool,
}

/// What a shared frame contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedKey {
    Span { from: u64, to: u64 },
    Whole { generation: u64, to: u64 },
}

/// The lock's content.
pub struct DocumentState {
    pub(super) graph: Graph,
    /// The base's generation; 0 without a base.
    pub(super) generation: u64,
    pub(super) quarantined: bool,
    pub(super) compacting: bool,
    /// No base is made before this moment: the last attempt failed, and each costs as much as a success.
    compaction_after: Instant,
    pub(super) last_commit: Instant,
    pub(super) last_used: Instant,
    base_chunk: Option<(u64, Bytes)>,
    shared: Option<(SharedKey, Arc<SharedSyncFrame>)>,
    subscribers: Vec<Option<Subscriber>>,
    subscriber_count: usize,
    presence: Recent,
    remote_heads: BTreeMap<StorageId, RemoteHeads>,
}

/// Changes of one message on their way into a graph.
pub struct Incoming {
    changes: std::collections::VecDeque<Change>,
    /// Those that have been offered, whatever became of them.
    offered: Vec<ChangeHash>,
    permits: Option<Arc<[Permit; 2]>>,
}

impl Incoming {
    /// Nothing.
    pub fn none() -> Self {
        Self { changes: Default::default(), offered: Vec::new(), permits: None }
    }

    pub fn new(changes: Vec<Change>, permits: [Permit; 2]) -> Self {
        Self { changes: changes.into(), offered: Vec::new(), permits: Some(Arc::new(permits)) }
    }

    /// Where those changes stand that are in the graph. To be asked when all have been offered: a later change of the
    /// message may have completed an earlier one.
    pub fn positions(&self, graph: &Graph) -> Vec<u64> {
        self.offered.iter().filter_map(|hash| graph.position(hash)).collect()
    }
}

/// How far [`Document::ingest`] got.
#[derive(Debug, PartialEq, Eq)]
pub enum IngestStep {
    /// All changes have been offered.
    Done,
    /// There are more; others may take the lock first.
    More,
    /// The next change refers to the inside of the base: attach the index and go on.
    NeedsIndex,
    /// The next change was refused and taken out.
    Refused(Refusal),
}

/// What a session sends next.
pub enum Outgoing {
    Unavailable,
    Shared(Arc<SharedSyncFrame>),
    /// The frame is to be made from this message and the base's chunk, and shared under the key.
    Whole {
        key: SharedKey,
        message: SyncMessage,
    },
    Single {
        message: SyncMessage,
        with_base: bool,
    },
}

impl Document {
    pub(super) fn new(
        id: DocumentId,
        graph: Graph,
        generation: u64,
        quarantined: bool,
        pending: PendingRoom,
    ) -> Self {
        let now = Instant::now();
        pending.changed(0, graph.pending_bytes());
        let state = DocumentState {
            graph,
            generation,
            quarantined,
            compacting: false,
            compaction_after: now,
            last_commit: now,
            last_used: now,
            base_chunk: None,
            shared: None,
            subscribers: Vec::new(),
            subscriber_count: 0,
            presence: Recent::default(),
            remote_heads: BTreeMap::new(),
        };
        Self { id, state: Mutex::new(state), pending }
    }

    pub fn id(&self) -> &DocumentId {
        &self.id
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, DocumentState> {
        self.state.lock()
    }

    /// Records that staged changes before `end` are durable, and marks every subscriber. Returns whether the tail has
    /// grown enough for a new base.
    pub fn committed(&self, end: u64) -> bool {
        let mut state = self.lock();
        state.graph.advance_durable(end);
        state.last_commit = Instant::now();
        state.mark_all();
        state.claim_compaction(BASE_CHANGES_MIN, BASE_FRACTION)
    }

    /// Offers the next changes to the graph and submits what was staged.
    pub fn ingest(
        self: &Arc<Self>,
        incoming: &mut Incoming,
        committer: &Committer,
        limits: &Limits,
    ) -> IngestStep {
        let mut state = self.lock();
        let start = state.graph.staged_end();
        let pending_before = state.graph.pending_bytes();
        let step = state.offer(incoming, &self.pending.limits(limits, pending_before));
        self.pending.changed(pending_before, state.graph.pending_bytes());
        let end = state.graph.staged_end();
        if end > start {
            let changes = state.graph.changes(start..end);
            let changes = changes.map(|(hash, bytes)| StoredChange { hash, bytes: bytes.clone() }).collect();
            let permits = incoming.permits.clone().expect("whoever brings changes has room for them");
            committer.submit(Submission { document: self.clone(), changes, end, permits });
        }
        step
    }

    /// Attaches the index of this generation's base. Nothing happens if the document has another base by now.
    pub fn attach_index(&self, generation: u64, index: Arc<BaseIndex>) -> Result<(), LoadError> {
        let mut state = self.lock();
        if state.generation == generation {
            if index.len() as u64 != state.graph.tail_start() {
                return Err(LoadError::BaseIncomplete);
            }
            state.graph.attach_index(index);
        }
        Ok(())
    }

    /// Keeps a frame for the next session that needs the same.
    pub fn share(&self, key: SharedKey, frame: &Arc<SharedSyncFrame>) {
        self.lock().shared = Some((key, frame.clone()));
    }

    /// The base's chunk and generation, if somebody needed it recently.
    pub(super) fn cached_base_chunk(&self) -> Option<(u64, Bytes)> {
        let state = self.lock();
        state.base_chunk.clone().filter(|(generation, _)| *generation >= state.generation)
    }

    pub(super) fn cache_base_chunk(&self, generation: u64, chunk: &Bytes) {
        self.lock().base_chunk = Some((generation, chunk.clone()));
    }

    pub fn subscribe(&self, outbox: &Arc<Outbox>, slot: Slot) -> SubscriberKey {
        let mut state = self.lock();
        state.subscriber_count += 1;
        let subscriber = Some(Subscriber { outbox: outbox.clone(), slot, marked: false, watches: false });
        match state.subscribers.iter().position(Option::is_none) {
            Some(place) if state.subscriber_count <= state.subscribers.len() => {
                state.subscribers[place] = subscriber;
                SubscriberKey(place)
            }
            _ => {
                state.subscribers.push(subscriber);
                SubscriberKey(state.subscribers.len() - 1)
            }
        }
    }

    pub fn unsubscribe(&self, key: SubscriberKey) {
        let mut state = self.lock();
        state.subscribers[key.0] = None;
        state.subscriber_count -= 1;
        state.last_used = Instant::now();
        if state.subscriber_count == 0 {
            state.subscribers = Vec::new();
        }
    }

    /// Relays a presence frame to every other subscriber. Returns how many frames were dropped for slow ones; nothing
    /// happens if the message is a repetition or out of date.
    pub fn relay(&self, from: SubscriberKey, message: crate::outbox::Ephemeral) -> u64 {
        let mut state = self.lock();
        if !state.presence.is_news(&message.sender, &message.session, message.count) {
            return 0;
        }
        let message = Arc::new(message);
        let others = state.subscribers.iter().enumerate().filter(|(place, _)| *place != from.0);
        others
            .filter_map(|(_, subscriber)| subscriber.as_ref())
            .map(|subscriber| subscriber.outbox.push(LossyFrame::Ephemeral(message.clone())))
            .sum()
    }

    /// Notes what another storage has, if it is newer than what is known, and tells those who watch.
    pub fn note_remote_heads(&self, heads: RemoteHeads, from: SubscriberKey) {
        if heads.heads.len() > REMOTE_HEADS_MAX {
            return;
        }
        let mut state = self.lock();
        let newer = match state.remote_heads.get(&heads.storage_id) {
            Some(known) => heads.timestamp > known.timestamp,
            None => state.remote_heads.len() < REMOTE_HEADS_STORAGES_MAX,
        };
        if !newer {
            return;
        }
        for (place, subscriber) in state.subscribers.iter().enumerate() {
            let Some(subscriber) = subscriber.as_ref().filter(|it| it.watches && place != from.0) else {
                continue;
            };
            let frame = LossyFrame::RemoteHeads { document: self.id.clone(), heads: heads.clone() };
            subscriber.outbox.push(frame);
        }
        state.remote_heads.insert(heads.storage_id.clone(), heads);
    }

    /// Sets whether a subscriber wants to hear of other storages; returns what is known of them.
    pub fn watch(&self, key: SubscriberKey, watches: bool) -> Vec<RemoteHeads> {
        let mut state = self.lock();
        if let Some(subscriber) = &mut state.subscribers[key.0] {
            subscriber.watches = watches;
        }
        if watches { state.remote_heads.values().cloned().collect() } else { Vec::new() }
    }

    /// Drops what only saves work if somebody needs it again soon. Returns whether a base should be made now that
    /// nothing is going on.
    pub(super) fn tidy(&self, now: Instant, idle: Duration) -> bool {
        let mut state = self.lock();
        if now.duration_since(state.last_used) >= idle {
            state.shared = None;
            state.base_chunk = None;
            state.graph.detach_index();
        }
        now.duration_since(state.last_commit) >= idle
            && state.claim_compaction(IDLE_BASE_CHANGES_MIN, IDLE_BASE_FRACTION)
    }

    /// What the document occupies, and whether nobody needs it.
    pub(super) fn residency(&self) -> Residency {
        let state = self.lock();
        let cached = state.base_chunk.as_ref().map_or(0, |(_, chunk)| chunk.len());
        Residency {
            bytes: size_of::<DocumentState>() + state.graph.resident_bytes() + cached,
            pending: state.graph.pending_count(),
            idle_since: (state.subscriber_count == 0
                && !state.compacting
                && state.graph.staged_end() == state.graph.durable_end())
            .then_some(state.last_used),
        }
    }
}

/// What is needed to decide on eviction.
pub(super) struct Residency {
    pub(super) bytes: usize,
    pub(super) pending: usize,
    /// Since when nobody needs it, if nobody does.
    pub(super) idle_since: Option<Instant>,
}

impl DocumentState {
    fn offer(&mut self, incoming: &mut Incoming, limits: &Limits) -> IngestStep {
        for _ in 0..INGEST_PER_LOCK {
            let Some(change) = incoming.changes.pop_front() else { return IngestStep::Done };
            let hash = change.hash;
            let again = (self.graph.has_base() && !self.graph.has_index()).then(|| change.clone());
            match self.graph.ingest(change, limits) {
                Ok(Ingested::NeedsIndex) => {
                    let again = again.expect("only a graph without its index asks for it");
                    incoming.changes.push_front(again);
                    return IngestStep::NeedsIndex;
                }
                Ok(Ingested::Known | Ingested::Pending | Ingested::Staged(_)) => incoming.offered.push(hash),
                Err(refusal) => return IngestStep::Refused(refusal),
            }
        }
        IngestStep::More
    }

    pub fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    fn mark_all(&mut self) {
        for subscriber in self.subscribers.iter_mut().flatten() {
            if !std::mem::replace(&mut subscriber.marked, true) {
                subscriber.outbox.mark(subscriber.slot);
            }
        }
    }

    pub(super) fn quarantine(&mut self) {
        self.quarantined = true;
        self.compacting = false;
        self.mark_all();
    }

    /// Ends the claim on making a base; returns whether another is due, which is claimed then.
    pub(super) fn compacted(&mut self) -> bool {
        self.compacting = false;
        self.claim_compaction(BASE_CHANGES_MIN, BASE_FRACTION)
    }

    pub(super) fn put_compaction_off(&mut self) {
        self.compacting = false;
        self.compaction_after = Instant::now() + COMPACTION_RETRY;
    }

    /// Says that a base should be made, once: whoever is told so makes it.
    fn claim_compaction(&mut self, least: u64, fraction: u64) -> bool {
        let covered = self.graph.tail_start();
        let tail = self.graph.durable_end() - covered;
        let due = tail >= TAIL_CHANGES_KEPT + least.max(covered / fraction)
            && Instant::now() >= self.compaction_after;
        due && !self.quarantined && !std::mem::replace(&mut self.compacting, true)
    }

    /// What the session of a subscriber has to say now. What is answered counts as sent.
    pub fn generate(
        &mut self,
        key: SubscriberKey,
        session: &mut SyncSession,
        server: &PeerId,
        document: &DocumentId,
    ) -> Option<Outgoing> {
        if let Some(subscriber) = &mut self.subscribers[key.0] {
            subscriber.marked = false;
        }
        self.last_used = Instant::now();
        if self.quarantined {
            return Some(Outgoing::Unavailable);
        }
        Some(match session.generate(&self.graph)? {
            Reply::Unavailable => Outgoing::Unavailable,
            Reply::Single { message, with_base } => Outgoing::Single { message: *message, with_base },
            Reply::Span { from, to } => {
                let key = SharedKey::Span { from, to };
                Outgoing::Shared(self.shared(key).unwrap_or_else(|| {
                    let message = joined(span_message(&self.graph, from, to));
                    let frame = Arc::new(SharedSyncFrame::new(server, document, &message));
                    self.shared = Some((key, frame.clone()));
                    frame
                }))
            }
            Reply::Whole { to } => {
                let key = SharedKey::Whole { generation: self.generation, to };
                match self.shared(key) {
                    Some(frame) => Outgoing::Shared(frame),
                    None => Outgoing::Whole { key, message: whole_message(&self.graph) },
                }
            }
        })
    }

    fn shared(&self, key: SharedKey) -> Option<Arc<SharedSyncFrame>> {
        self.shared.as_ref().filter(|(have, _)| *have == key).map(|(_, frame)| frame.clone())
    }
}

/// Puts the changes of a V2 message into one entry, as stock peers send them.
pub fn joined(mut message: SyncMessage) -> SyncMessage {
    if message.changes.len() > 1 {
        message.changes = vec![message.changes.concat().into()];
    }
    message
}
