//! Replication: this node's links to other regions, and the task that keeps the log in step with theirs.
//!
//! One task owns the [`Replica`], which decides everything; this module reads events — frames, commits, answers — hands
//! them over and performs the effects. Sockets are read and written by a task for each link ([`link`]); what takes
//! time (reading the log, storing a run, reading a page) is done in tasks of its own, which report back as events.
//!
//! - [`dial`] keeps a link to each configured peer, [`accept`] takes the links that others open.
//! - [`exchange`] answers and asks what is not about the log: where a document is, presence.
//! - [`snapshot`] reads and stores pages of documents.
//! - [`truncate`] gives up log entries that every region has.
//!
//! # Bounds
//!
//! The queue of events is bounded; a link's socket is not read while it is full. What waits to be sent is bounded by the
//! replica's windows ([`outgoing`]). A run that is being stored counts against the committer's budget.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::link::{LinkFrame, Progress};
use isobar_protocol::replica::{
    Effect, LinkId, LinkStatus, LogRead, LogSlice, Moment, Peer, ReceivedRun, Replica, Stored,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use crate::commit::{Committer, OwnProgress};
use crate::documents::Documents;
use crate::outbox::Ephemeral;
use crate::storage::{Acknowledgement, Storage, StorageError, StoredRun};
use crate::telemetry::Metrics;

mod accept;
mod dial;
mod envelope;
mod exchange;
mod link;
mod outgoing;
mod snapshot;
mod truncate;

use exchange::Exchange;
use outgoing::Outgoing;

pub use accept::accept_links;
pub use dial::keep_links;

/// Events that wait at most. A frame is at most some hundred kilobytes, unless it is a whole document.
const EVENTS_MAX: usize = 256;

/// How often the replica is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// How often interests, metrics and acknowledgements are looked after.
const UPKEEP: Duration = Duration::from_millis(500);

/// Pause before something that failed in the database is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// What happens.
enum Event {
    /// A link was opened; the answer says whether it is kept.
    Opened {
        link: LinkId,
        peer: Peer,
        dialled_here: bool,
        outgoing: Arc<Outgoing>,
        kept: oneshot::Sender<bool>,
    },
    Closed {
        link: LinkId,
    },
    Frame {
        link: LinkId,
        frame: LinkFrame,
    },
    LogRead {
        link: LinkId,
        origin: OriginId,
        after: Seq,
        read: LogRead,
    },
    Stored {
        origin: OriginId,
        last: Seq,
        outcome: Stored,
    },
    PageRead {
        link: LinkId,
        page: Option<snapshot::Page>,
    },
    PageStored,
    Adopted {
        origins: Vec<Progress>,
    },
    /// Look for a document in the other regions of a group.
    Search {
        document: DocumentId,
        group: PlacementGroup,
        found: oneshot::Sender<SearchOutcome>,
    },
    /// Something that was asked for another region's sake is done.
    Reply {
        link: LinkId,
        frame: LinkFrame,
    },
    /// Contents that a search fetched are stored.
    Fetched {
        request: u64,
    },
    Presence(Arc<Ephemeral>),
}

/// What came of a search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SearchOutcome {
    /// It was somewhere and is here now.
    Found,
    /// Nobody who answered has it.
    Absent,
    /// It is of a placement group that this region is not in. Clients reach its regions here, as far as they say.
    Elsewhere { urls: Vec<String> },
}

/// Another region, as it said last who it is.
#[derive(Debug, Clone)]
pub struct Known {
    pub peer: Peer,
    /// Whether a link to it is up.
    pub up: bool,
}

/// What replication needs of the node.
#[derive(Clone)]
pub struct Parts {
    pub storage: Arc<dyn Storage>,
    pub documents: Arc<Documents>,
    pub committer: Committer,
    pub metrics: Arc<Metrics>,
    /// Where this region's clients reach it.
    pub advertise: Option<String>,
}

/// How far the regions are, for operators and for truncation.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub vector: Vec<Progress>,
    pub links: Vec<LinkStatus>,
    /// Origins of which two logs exist.
    pub forked: Vec<OriginId>,
}

/// A handle to the replication of a node. Cheap to clone.
#[derive(Clone)]
pub struct Replication {
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
}

/// What is seen from outside the task.
struct Shared {
    next_link: AtomicU64,
    /// By region, of the links that are up.
    linked: Mutex<HashMap<RegionName, LinkId>>,
    view: Mutex<View>,
    acknowledged: Mutex<HashMap<(RegionName, OriginId), Seq>>,
    /// The regions that were linked since the node started, as they said last who they are.
    known: Mutex<BTreeMap<RegionName, Peer>>,
    /// When each region was last linked.
    heard: Mutex<HashMap<RegionName, Instant>>,
    /// Whether any peer wants presence; a cheap look before anything is queued.
    presence_wanted: AtomicBool,
    /// Set once when this node must not write any more.
    fatal: watch::Sender<Option<String>>,
}

impl Replication {
    /// The replication of a node that writes `own` origins, and the task that does it.
    pub async fn new(
        region: RegionName,
        groups: BTreeSet<PlacementGroup>,
        own: BTreeSet<OriginId>,
        parts: Parts,
    ) -> Result<(Self, impl Future<Output = ()> + Send), StorageError> {
        let origins = parts.storage.origins().await?;
        let acknowledged = parts.storage.acknowledgements().await?;
        let now = Instant::now();
        let heard = acknowledged.iter().map(|it| (it.region.clone(), now)).collect();
        let acknowledged = acknowledged.into_iter().map(|it| ((it.region, it.origin), it.seq)).collect();
        let (events, queue) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Shared {
            next_link: AtomicU64::new(1),
            linked: Mutex::default(),
            view: Mutex::default(),
            acknowledged: Mutex::new(acknowledged),
            known: Mutex::default(),
            heard: Mutex::new(heard),
            presence_wanted: AtomicBool::new(false),
            fatal: watch::Sender::new(None),
        });
        let origins = origins.into_iter().map(|it| Progress {
            origin: it.id,
            region: it.region,
            group: it.group,
            seq: it.seq,
            chain: it.chain,
        });
        let replica = Replica::new(region, groups, origins.collect(), own);
        let handle = Self { events: events.clone(), shared: shared.clone() };
        let task = Task::new(replica, parts, shared, &events);
        Ok((handle, task.run(queue)))
    }

    /// Looks for a document that is not here in the other regions of a group, and fetches it. Only they learn its id.
    pub async fn search(&self, document: DocumentId, group: PlacementGroup) -> SearchOutcome {
        let (found, answer) = oneshot::channel();
        if self.events.send(Event::Search { document, group, found }).await.is_err() {
            return SearchOutcome::Absent;
        }
        answer.await.unwrap_or(SearchOutcome::Absent)
    }

    /// The other regions that were linked since the node started.
    pub fn known(&self) -> Vec<Known> {
        let known: Vec<Peer> = self.shared.known.lock().values().cloned().collect();
        let linked = self.shared.linked.lock();
        known.into_iter().map(|peer| Known { up: linked.contains_key(&peer.region), peer }).collect()
    }

    /// Passes presence on to the regions that want it; lossy.
    pub fn relay(&self, message: &Arc<Ephemeral>) {
        if self.shared.presence_wanted.load(Ordering::Relaxed) {
            let _ = self.events.try_send(Event::Presence(message.clone()));
        }
    }

    /// Whether a region is linked.
    fn is_linked_to(&self, region: &RegionName) -> bool {
        self.shared.linked.lock().contains_key(region)
    }

    /// Whether any other region is linked.
    pub fn is_linked(&self) -> bool {
        !self.shared.linked.lock().is_empty()
    }

    pub fn view(&self) -> View {
        self.shared.view.lock().clone()
    }

    /// The other regions that were ever linked.
    pub fn members(&self) -> Vec<RegionName> {
        self.shared.heard.lock().keys().cloned().collect()
    }

    /// How far a region has stored an origin, as it said last.
    pub fn acknowledged(&self, region: &RegionName, origin: OriginId) -> Seq {
        let acknowledged = self.shared.acknowledged.lock();
        acknowledged.get(&(region.clone(), origin)).copied().unwrap_or(Seq(0))
    }

    /// Resolves when this node must not go on writing, with the reason.
    pub async fn failed(&self) -> String {
        let mut fatal = self.shared.fatal.subscribe();
        let reason = fatal.wait_for(Option::is_some).await;
        reason.ok().and_then(|reason| reason.clone()).unwrap_or_default()
    }
}

/// A link that is up, as the task sees it.
struct Up {
    peer: Peer,
    /// Whether the region whose name comes first dialled it: of two links between the same regions that one stays.
    dialled_by_first: bool,
    outgoing: Arc<Outgoing>,
}

/// The task. See the module.
struct Task {
    replica: Replica,
    parts: Parts,
    shared: Arc<Shared>,
    events: mpsc::WeakSender<Event>,
    links: HashMap<LinkId, Up>,
    exchange: Exchange,
    /// Ends when the last run of an origin has taken its place in the queue to the log.
    last_placed: HashMap<OriginId, oneshot::Receiver<()>>,
    /// Acknowledgements that are not noted in the database yet.
    unnoted: HashMap<(RegionName, OriginId), Seq>,
    started: Instant,
}

impl Task {
    fn new(replica: Replica, parts: Parts, shared: Arc<Shared>, events: &mpsc::Sender<Event>) -> Self {
        Self {
            replica,
            parts,
            shared,
            events: events.downgrade(),
            links: HashMap::new(),
            exchange: Exchange::default(),
            last_placed: HashMap::new(),
            unnoted: HashMap::new(),
            started: Instant::now(),
        }
    }

    fn now(&self) -> Moment {
        Moment(self.started.elapsed().as_millis() as u64)
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Event>) {
        let mut progress = self.parts.committer.progress();
        progress.mark_changed();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut upkeep = tokio::time::interval(UPKEEP);
        upkeep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                event = queue.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                Ok(()) = progress.changed() => {
                    let now = self.now();
                    let own = progress.borrow_and_update().clone();
                    let region = self.replica.region().clone();
                    own.into_iter().for_each(|own| {
                        let OwnProgress { origin, group, seq, chain } = own;
                        let progress = Progress { origin, region: region.clone(), group, seq, chain };
                        self.replica.own_appended(now, progress);
                    });
                }
                _ = ticks.tick(), if !self.links.is_empty() => self.replica.tick(self.now()),
                _ = upkeep.tick() => self.look_after(),
            }
            self.perform_all();
        }
    }

    fn handle(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Opened { link, peer, dialled_here, outgoing, kept } => {
                let keep = self.open(link, peer, dialled_here, outgoing);
                let _ = kept.send(keep);
            }
            Event::Closed { link } => self.closed(link),
            Event::Frame { link, frame } => self.receive(link, frame),
            Event::LogRead { link, origin, after, read } => {
                self.replica.log_read(now, link, origin, after, read);
            }
            Event::Stored { origin, last, outcome } => self.replica.stored(now, origin, last, outcome),
            Event::PageRead { link, page } => self.replica.page_read(now, link, page),
            Event::PageStored => self.replica.page_stored(now),
            Event::Adopted { origins } => self.replica.adopted(now, &origins),
            Event::Search { document, group, found } => self.search(document, group, found),
            Event::Reply { link, frame } => self.send(link, frame),
            Event::Fetched { request } => self.exchange.settle(request, &SearchOutcome::Found),
            Event::Presence(message) => self.relay_presence(&message),
        }
    }

    /// Takes a link up, unless there is one to that region which goes before it.
    fn open(&mut self, link: LinkId, peer: Peer, dialled_here: bool, outgoing: Arc<Outgoing>) -> bool {
        let dialled_by_first = dialled_here == (*self.replica.region() < peer.region);
        let previous = self.shared.linked.lock().get(&peer.region).copied();
        if let Some(previous) = previous {
            // Another process of the region means that the one of the link is gone, whether or not that was noticed.
            let stays = self
                .links
                .get(&previous)
                .is_some_and(|it| it.dialled_by_first && !dialled_by_first && it.peer.node == peer.node);
            if stays {
                return false;
            }
            self.close(previous, "another link to this region took its place");
        }
        tracing::info!(region = %peer.region, "region linked");
        self.parts.metrics.linked(&peer.region, true);
        self.shared.linked.lock().insert(peer.region.clone(), link);
        self.shared.known.lock().insert(peer.region.clone(), peer.clone());
        self.shared.heard.lock().insert(peer.region.clone(), Instant::now());
        self.replica.link_opened(self.now(), link, peer.clone());
        self.links.insert(link, Up { peer, dialled_by_first, outgoing });
        self.offer_interests(link);
        self.offer_searches(link);
        true
    }

    fn close(&mut self, link: LinkId, reason: &str) {
        if let Some(up) = self.links.get(&link) {
            tracing::info!(region = %up.peer.region, reason, "link closed");
            up.outgoing.push(LinkFrame::Failed { message: reason.to_owned() });
            up.outgoing.close();
        }
        self.closed(link);
    }

    fn closed(&mut self, link: LinkId) {
        let Some(up) = self.links.remove(&link) else { return };
        up.outgoing.close();
        let mut linked = self.shared.linked.lock();
        if linked.get(&up.peer.region) == Some(&link) {
            linked.remove(&up.peer.region);
            tracing::warn!(region = %up.peer.region, "region not linked any more");
            self.parts.metrics.linked(&up.peer.region, false);
        }
        drop(linked);
        self.exchange.link_closed(link);
        self.replica.link_closed(self.now(), link);
    }

    fn receive(&mut self, link: LinkId, frame: LinkFrame) {
        let Some(up) = self.links.get(&link) else { return };
        if let LinkFrame::Failed { message } = &frame {
            tracing::warn!(region = %up.peer.region, message, "region ended the link");
            return self.closed(link);
        }
        if let Some(frame) = self.receive_exchange(link, frame) {
            self.replica.receive(self.now(), link, frame);
        }
    }

    fn send(&self, link: LinkId, frame: LinkFrame) {
        if let Some(up) = self.links.get(&link) {
            up.outgoing.push(frame);
        }
    }

    /// Performs effects until there are none: some are answered at once, which makes more.
    fn perform_all(&mut self) {
        loop {
            let effects = self.replica.effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.perform(effect));
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Send { link, frame } => self.send(link, frame),
            Effect::Close { link, reason } => self.close(link, reason),
            Effect::ReadLog { link, origin, after, bytes_max } => {
                self.read_log(link, origin, after, bytes_max);
            }
            Effect::Append(run) => self.append(*run),
            Effect::ReadPage { link, after, groups } => {
                let parts = self.parts.clone();
                self.spawn(async move {
                    let page = snapshot::read_page(&parts, after, &groups).await;
                    Event::PageRead { link, page }
                });
            }
            Effect::StorePage { documents } => {
                let parts = self.parts.clone();
                self.spawn(async move {
                    snapshot::store_page(&parts, documents).await;
                    Event::PageStored
                });
            }
            Effect::AdoptOrigins { origins } => {
                let parts = self.parts.clone();
                self.spawn(async move {
                    snapshot::adopt(&parts, &origins).await;
                    Event::Adopted { origins }
                });
            }
            Effect::Acknowledged { region, origin, seq } => {
                self.shared.acknowledged.lock().insert((region.clone(), origin), seq);
                self.unnoted.insert((region, origin), seq);
            }
            Effect::OriginForked { origin, region, seq } => {
                self.parts.metrics.origins_forked.increment(1);
                tracing::error!(origin = %origin.0, %region, seq = seq.0,
                    "two logs exist under one origin, it is not replicated any more");
            }
            Effect::OwnOriginLost { origin } => {
                let reason =
                    format!("the database has lost entries of origin {} that were durable", origin.0);
                self.shared
                    .fatal
                    .send_if_modified(|fatal| fatal.is_none() && fatal.replace(reason).is_none());
            }
        }
    }

    /// Runs something beside, and takes its outcome as an event.
    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let Some(events) = self.events.upgrade() else { return };
        tokio::spawn(async move {
            let event = work.await;
            let _ = events.send(event).await;
        });
    }

    fn read_log(&mut self, link: LinkId, origin: OriginId, after: Seq, bytes_max: usize) {
        if let Some(runs) = self.parts.committer.recent_log().read(origin, after, bytes_max) {
            let read = LogRead::Runs(runs.into_iter().map(slice).collect());
            return self.replica.log_read(self.now(), link, origin, after, read);
        }
        let storage = self.parts.storage.clone();
        self.spawn(async move {
            let read = match storage.read_log(origin, after, bytes_max).await {
                Ok(runs) => LogRead::Runs(runs.into_iter().map(slice).collect()),
                Err(StorageError::Truncated { floor }) => LogRead::Truncated { floor },
                Err(error) => {
                    tracing::warn!(%error, "log not read");
                    LogRead::Failed
                }
            };
            Event::LogRead { link, origin, after, read }
        });
    }

    /// Hands a run to the documents and the committer. Runs of an origin take their places in the queue one after the
    /// other; waiting for the commit they do together.
    fn append(&mut self, run: ReceivedRun) {
        let (origin, last) = (run.origin, run.last);
        let (placed, is_placed) = oneshot::channel();
        let previous = self.last_placed.insert(origin, is_placed);
        let parts = self.parts.clone();
        self.spawn(async move {
            if let Some(previous) = previous {
                let _ = previous.await;
            }
            let stored = parts.documents.apply(run, &parts.committer).await;
            let _ = placed.send(());
            Event::Stored { origin, last, outcome: stored.await }
        });
    }

    fn look_after(&mut self) {
        self.refresh_interests();
        self.exchange.expire();
        let links: Vec<LinkStatus> = self.replica.links().collect();
        let waiting: usize = self.links.values().map(|up| up.outgoing.len()).sum();
        self.parts.metrics.link_frames_waiting.set(waiting as f64);
        for status in &links {
            self.parts.metrics.link(status);
            self.shared.heard.lock().insert(status.region.clone(), Instant::now());
        }
        let forked = self.replica.forked().collect();
        *self.shared.view.lock() = View { vector: self.replica.vector(), links, forked };
        self.note_acknowledgements();
    }

    fn note_acknowledgements(&mut self) {
        if self.unnoted.is_empty() {
            return;
        }
        let news = self.unnoted.drain();
        let news: Vec<Acknowledgement> =
            news.map(|((region, origin), seq)| Acknowledgement { region, origin, seq }).collect();
        let storage = self.parts.storage.clone();
        tokio::spawn(async move {
            // What is lost here is said again by the peer's next announcement, or after its next connection.
            if let Err(error) = storage.note_acknowledgements(&news).await {
                tracing::warn!(%error, "acknowledgements not noted");
            }
        });
    }
}

fn slice(run: StoredRun) -> LogSlice {
    LogSlice { first: run.first, last: run.last, chain_before: run.chain_before, body: run.body }
}
