//! One live document: its graph, who is subscribed, and the bytes that several of them will be sent.
//!
//! Everything mutable stands behind one lock that is held for microseconds and never across an `await`. A commit
//! only marks the subscribers; each builds its message when its socket takes one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::change::Change;
use isobar_protocol::config::{Limits, REMOTE_HEADS_STORAGES_MAX};
use isobar_protocol::graph::{Graph, Ingested, Refusal};
use isobar_protocol::ids::{ActorId, ChangeHash, DocumentId, PeerId, PlacementGroup, StorageId};
use isobar_protocol::presence::Recent;
use isobar_protocol::session::{Reply, SyncSession, span_message, whole_message};
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::{RemoteHeads, SharedSyncFrame};
use parking_lot::{Mutex, MutexGuard};

use super::LoadError;
use super::receipts::Ways;
use crate::commit::{Committer, Logged, Permit, Staged, Submission};
use crate::outbox::{Ephemeral, LossyFrame, Outbox, Slot};
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

impl Subscriber {
    fn mark(&mut self) {
        if !std::mem::replace(&mut self.marked, true) {
            self.outbox.mark(self.slot);
        }
    }
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
    pub(super) group: PlacementGroup,
    /// Storage knows the document, or is about to: its group is settled.
    placed: bool,
    pub(super) quarantined: bool,
    deleted: bool,
    pub(super) ways: Ways,
    /// Changes among the pending ones that another origin's log names, and whether they are stored already.
    waiting: HashMap<ChangeHash, Logged>,
    pub(super) compacting: bool,
    /// No base is made before this moment: the last attempt failed, and each costs as much as a success.
    compaction_after: Instant,
    pub(super) last_commit: Instant,
    /// This node, not a sibling, stored what became durable last.
    stored_here: bool,
    pub(super) last_used: Instant,
    base_chunk: Option<(u64, Bytes)>,
    shared: Option<(SharedKey, Arc<SharedSyncFrame>)>,
    subscribers: Vec<Option<Subscriber>>,
    subscriber_count: usize,
    presence: Recent,
    remote_heads: BTreeMap<StorageId, RemoteHeads>,
}

/// Changes of one message or of one received run on their way into a graph.
pub struct Incoming {
    changes: std::collections::VecDeque<Change>,
    /// Those that have been offered, whatever became of them.
    offered: Vec<ChangeHash>,
    /// Changes of clients that waited for one of these and were refused when it came.
    dropped: Vec<Rejected>,
    permits: Option<Arc<[Permit]>>,
    foreign: Option<Foreign>,
    /// The placement group of the document if these changes create it.
    group: Option<PlacementGroup>,
}

/// What is known of changes that did not come from a client.
struct Foreign {
    /// They came with a run of their origin's log.
    in_run: bool,
    hashes: HashSet<ChangeHash>,
    logged: Logged,
}

impl Incoming {
    /// Nothing.
    pub fn none() -> Self {
        Self {
            changes: Default::default(),
            offered: Vec::new(),
            dropped: Vec::new(),
            permits: None,
            foreign: None,
            group: None,
        }
    }

    /// From a client, whose new documents are of this group.
    pub fn new(changes: Vec<Change>, permits: Arc<[Permit]>, group: PlacementGroup) -> Self {
        Self {
            changes: changes.into(),
            offered: Vec::new(),
            dropped: Vec::new(),
            permits: Some(permits),
            foreign: None,
            group: Some(group),
        }
    }

    /// From another region, of a document of this group.
    pub(super) fn foreign(
        changes: Vec<Change>,
        permits: Arc<[Permit]>,
        logged: Logged,
        in_run: bool,
        group: &PlacementGroup,
    ) -> Self {
        let hashes = changes.iter().map(|change| change.hash).collect();
        let foreign = Foreign { in_run, hashes, logged };
        Self { foreign: Some(foreign), ..Self::new(changes, permits, group.clone()) }
    }

    /// The changes of clients that were dropped meanwhile; of those that came with the same message one at most stands alone,
    /// as what becomes of its sender.
    pub(super) fn take_dropped(&mut self) -> (Vec<Rejected>, Option<Rejected>) {
        let is_own = |it: &Rejected| self.foreign.is_none() && self.offered.contains(&it.hash);
        let mut dropped = std::mem::take(&mut self.dropped);
        let own = dropped.iter().position(is_own).map(|place| dropped.swap_remove(place));
        (dropped, own)
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
    Refused(Rejected),
}

/// A change that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    pub hash: ChangeHash,
    pub refusal: Refusal,
    /// The change that has its author's number already, if it is known.
    pub other: Option<ChangeHash>,
}

impl Rejected {
    fn new(hash: ChangeHash, refusal: Refusal) -> Self {
        Self { hash, refusal, other: None }
    }
}

impl std::fmt::Display for Rejected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "change {}: {}", self.hash, self.refusal)?;
        self.other.map_or(Ok(()), |other| write!(f, ": {other}"))
    }
}

/// A document as it was found in storage.
pub(super) struct Loaded {
    pub(super) graph: Graph,
    /// The base's generation; 0 without a base.
    pub(super) generation: u64,
    pub(super) group: PlacementGroup,
    /// Storage knows it.
    pub(super) exists: bool,
    pub(super) quarantined: bool,
    pub(super) deleted: bool,
    /// Changes that are stored and lack a dependency.
    pub(super) waiting: Vec<ChangeHash>,
}

impl Loaded {
    pub(super) fn empty(group: PlacementGroup) -> Self {
        Self {
            graph: Graph::new(),
            generation: 0,
            group,
            exists: false,
            quarantined: false,
            deleted: false,
            waiting: Vec::new(),
        }
    }
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
    pub(super) fn new(id: DocumentId, loaded: Loaded, pending: PendingRoom) -> Self {
        let now = Instant::now();
        pending.changed(0, loaded.graph.pending_bytes());
        let state = DocumentState {
            graph: loaded.graph,
            generation: loaded.generation,
            group: loaded.group,
            placed: loaded.exists,
            quarantined: loaded.quarantined,
            deleted: loaded.deleted,
            ways: Ways::of_loaded(loaded.exists),
            waiting: loaded.waiting.into_iter().map(|hash| (hash, Logged::Stored)).collect(),
            compacting: false,
            compaction_after: now,
            last_commit: now,
            stored_here: true,
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
    /// grown enough for a new base. `stored_here` says that some of them were not stored by a sibling: of several nodes
    /// that have the document, the one that stores its changes makes its bases.
    pub fn committed(&self, end: u64, stored_here: bool) -> bool {
        let mut state = self.lock();
        if state.deleted {
            return false;
        }
        state.graph.advance_durable(end);
        state.last_commit = Instant::now();
        state.stored_here = stored_here;
        state.mark_all();
        stored_here && state.claim_compaction(BASE_CHANGES_MIN, BASE_FRACTION)
    }

    /// Records that the document was deleted for good, lets go of what it held, and marks every subscriber.
    pub(super) fn delete(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.deleted, true) {
            return;
        }
        self.pending.changed(state.graph.pending_bytes(), 0);
        let graph = std::mem::take(&mut state.graph);
        state.waiting = HashMap::new();
        state.shared = None;
        state.base_chunk = None;
        state.compacting = false;
        state.mark_all();
        drop(state);
        // Freeing a large graph takes longer than all else: nobody waits for it.
        drop(graph);
    }

    /// Offers the next changes to the graph and submits what was staged. Nothing is taken of a deleted document's.
    pub fn ingest(
        self: &Arc<Self>,
        incoming: &mut Incoming,
        committer: &Committer,
        limits: &Limits,
    ) -> IngestStep {
        let mut state = self.lock();
        if state.deleted {
            incoming.changes.clear();
            return IngestStep::Done;
        }
        let start = state.graph.staged_end();
        let pending_before = state.graph.pending_bytes();
        let some_waited = state.graph.pending_count() > 0;
        let step = match &incoming.foreign {
            // Another region has accepted them: they are taken in whatever room there is.
            Some(_) => {
                state.place(incoming.group.as_ref());
                state.offer(incoming, &Limits::stored())
            }
            None => state.offer(incoming, &self.pending.limits(limits, pending_before)),
        };
        self.pending.changed(pending_before, state.graph.pending_bytes());
        let end = state.graph.staged_end();
        if end > start {
            if some_waited || incoming.foreign.as_ref().is_some_and(|it| !it.in_run) {
                state.ways.staged_otherwise(end);
            }
            // Whoever waited for the document first did not create it.
            state.place(incoming.group.as_ref());
            let changes = state.staged(start..end, incoming.foreign.as_ref());
            let permits = incoming.permits.clone().expect("whoever brings changes has room for them");
            let group = state.group.clone();
            committer.submit(Submission { document: self.clone(), group, changes, end, permits });
        }
        step
    }

    /// Those of the changes that have no place in the graph: they are pending, were refused, or were not offered.
    pub(super) fn unplaced(&self, changes: &[Change]) -> Vec<StoredChange> {
        let state = self.lock();
        let unplaced = changes.iter().filter(|change| state.graph.position(&change.hash).is_none());
        unplaced.map(|it| StoredChange { hash: it.hash, bytes: it.bytes.clone() }).collect()
    }

    /// Notes that these changes are stored: those that are pending need not be when they are complete.
    pub(super) fn note_stored<'a>(&self, hashes: impl Iterator<Item = &'a ChangeHash>) {
        let mut state = self.lock();
        for hash in hashes {
            if let Some(logged) = state.waiting.get_mut(hash) {
                *logged = Logged::Stored;
            }
        }
    }

    /// Changes of other origins that the graph dropped, because something they waited for broke a rule or they did. Each is
    /// named once.
    pub(super) fn take_dropped(&self) -> Vec<ChangeHash> {
        let mut state = self.lock();
        let DocumentState { waiting, graph, .. } = &mut *state;
        waiting.extract_if(|hash, _| !graph.is_pending(hash)).map(|(hash, _)| hash).collect()
    }

    /// Takes a base into an empty document. Returns false, and changes nothing, if it is not empty any more.
    pub(super) fn adopt_base(&self, generation: u64, summary: BaseSummary, group: &PlacementGroup) -> bool {
        let mut state = self.lock();
        let is_empty = state.graph.staged_end() == 0 && state.graph.pending_count() == 0;
        if !is_empty || state.deleted || state.generation != 0 {
            return false;
        }
        state.graph = Graph::from_base(summary);
        state.generation = generation;
        state.place(Some(group));
        state.last_commit = Instant::now();
        state.mark_all();
        true
    }

    /// Takes a quarantined document into service again, with this graph unless it has one of its own: sessions stand in that.
    pub(super) fn serve_again(&self, graph: Graph, generation: u64, waiting: Vec<ChangeHash>) {
        let mut state = self.lock();
        if state.deleted {
            return;
        }
        if state.graph.staged_end() == 0 && state.graph.pending_count() == 0 {
            self.pending.changed(0, graph.pending_bytes());
            state.graph = graph;
            state.generation = generation;
            state.waiting = waiting.into_iter().map(|hash| (hash, Logged::Stored)).collect();
            state.ways = Ways::of_loaded(true);
            state.placed = true;
        }
        state.quarantined = false;
        state.mark_all();
    }

    /// How many changes wait for a dependency.
    pub fn pending_count(&self) -> usize {
        self.lock().graph.pending_count()
    }

    /// The generation of the base under its tail; 0 without one. Storage may have a later one, which a sibling made.
    pub fn base_generation(&self) -> u64 {
        self.lock().generation
    }

    pub fn group(&self) -> PlacementGroup {
        self.lock().group.clone()
    }

    /// The group, once it is settled: the document exists, or is about to.
    pub fn settled_group(&self) -> Option<PlacementGroup> {
        let state = self.lock();
        state.placed.then(|| state.group.clone())
    }

    /// Settles the group if that was not done; the one it has if that is another. A deleted document takes nothing in either
    /// case.
    pub(super) fn settle_group(&self, group: &PlacementGroup) -> Result<(), PlacementGroup> {
        let mut state = self.lock();
        if state.deleted {
            return Ok(());
        }
        state.place(Some(group));
        if state.group == *group { Ok(()) } else { Err(state.group.clone()) }
    }

    /// Attaches the index of this generation's base. Of a later base, which a sibling made, the part is taken that is the
    /// document's. Nothing happens if the document has a later base by now.
    pub fn attach_index(&self, generation: u64, index: BaseIndex) -> Result<(), LoadError> {
        let covered = {
            let state = self.lock();
            if generation < state.generation {
                return Ok(());
            }
            let covered = state.graph.tail_start();
            let is_own = state.generation == generation;
            if is_own && index.len() as u64 != covered || (index.len() as u64) < covered {
                return Err(LoadError::BaseIncomplete);
            }
            covered
        };
        // Cutting it takes long on a long one: not under the lock.
        let index = if index.len() as u64 == covered { index } else { index.prefix(covered as usize) };
        let mut state = self.lock();
        if state.graph.tail_start() == covered {
            state.graph.attach_index(Arc::new(index));
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

    /// Relays a presence frame to every subscriber but the one it came from. Returns how many frames were dropped for slow
    /// ones; nothing if the message is a repetition or out of date.
    pub fn relay(&self, from: Option<SubscriberKey>, message: &Arc<Ephemeral>) -> Option<u64> {
        let mut state = self.lock();
        if state.deleted || !state.presence.is_news(&message.sender, &message.session, message.count) {
            return None;
        }
        let others = state.subscribers.iter().enumerate();
        let others = others.filter(|(place, _)| from.is_none_or(|from| from.0 != *place));
        let dropped = others
            .filter_map(|(_, subscriber)| subscriber.as_ref())
            .map(|subscriber| subscriber.outbox.push(LossyFrame::Ephemeral(message.clone())));
        Some(dropped.sum())
    }

    pub(super) fn has_subscribers(&self) -> bool {
        self.lock().subscriber_count > 0
    }

    /// Has a subscriber's connection look at it again.
    pub fn mark(&self, key: SubscriberKey) {
        if let Some(Some(subscriber)) = self.lock().subscribers.get_mut(key.0) {
            subscriber.mark();
        }
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
            && state.stored_here
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
            let numbered = (change.actor.clone(), change.seq);
            let ingested = self.graph.ingest(change, limits);
            // Another region's are found by who noted that they wait.
            let of_clients = self.graph.dropped().iter().filter(|(hash, _)| !self.waiting.contains_key(hash));
            let of_clients = of_clients.map(|(hash, refusal)| Rejected::new(*hash, *refusal));
            incoming.dropped.extend(of_clients);
            match ingested {
                Ok(Ingested::NeedsIndex) => {
                    let again = again.expect("only a graph without its index asks for it");
                    incoming.changes.push_front(again);
                    return IngestStep::NeedsIndex;
                }
                Ok(Ingested::Staged(_)) => incoming.offered.push(hash),
                Ok(Ingested::Known | Ingested::Pending) => {
                    incoming.offered.push(hash);
                    if let Some(foreign) = &incoming.foreign
                        && self.graph.is_pending(&hash)
                    {
                        self.waiting.insert(hash, foreign.logged);
                    }
                }
                Err(refusal) => {
                    let other = match refusal {
                        Refusal::SeqReused { .. } => change_numbered(&self.graph, &numbered.0, numbered.1),
                        _ => None,
                    };
                    return IngestStep::Refused(Rejected { hash, refusal, other });
                }
            }
        }
        IngestStep::More
    }

    /// Settles the group, unless that was done.
    fn place(&mut self, group: Option<&PlacementGroup>) {
        if !std::mem::replace(&mut self.placed, true)
            && let Some(group) = group
        {
            self.group = group.clone();
        }
    }

    /// The changes at these positions, each with who logs it.
    fn staged(&mut self, positions: std::ops::Range<u64>, foreign: Option<&Foreign>) -> Vec<Staged> {
        let Self { graph, waiting, .. } = self;
        let staged = graph.changes(positions).map(|(hash, bytes)| {
            let waited = waiting.remove(&hash);
            let came = foreign.filter(|it| it.hashes.contains(&hash)).map(|it| it.logged);
            // Stored is stored, whichever of the two says so.
            let logged = match (waited, came) {
                (Some(Logged::Stored), _) => Logged::Stored,
                (waited, came) => came.or(waited).unwrap_or(Logged::Own),
            };
            Staged { change: StoredChange { hash, bytes: bytes.clone() }, logged }
        });
        staged.collect()
    }

    /// Whether the document is out of service: quarantined, or deleted.
    pub fn is_withheld(&self) -> bool {
        self.quarantined || self.deleted
    }

    pub fn is_deleted(&self) -> bool {
        self.deleted
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    fn mark_all(&mut self) {
        self.subscribers.iter_mut().flatten().for_each(Subscriber::mark);
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
        due && !self.is_withheld() && !std::mem::replace(&mut self.compacting, true)
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
        if self.is_withheld() {
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

/// The tail's change of this author with this number. Only asked for when two have it, so it may take long.
pub(super) fn change_numbered(graph: &Graph, actor: &ActorId, seq: u64) -> Option<ChangeHash> {
    let limits = Limits::stored();
    let mut tail = graph.changes(graph.tail_start()..graph.staged_end());
    let found = tail.find(|(_, bytes)| {
        Change::decode((*bytes).clone(), &limits).is_ok_and(|it| it.seq == seq && it.actor == *actor)
    });
    found.map(|(hash, _)| hash)
}

/// Puts the changes of a V2 message into one entry, as stock peers send them.
pub fn joined(mut message: SyncMessage) -> SyncMessage {
    if message.changes.len() > 1 {
        message.changes = vec![message.changes.concat().into()];
    }
    message
}
