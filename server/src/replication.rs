//! Replication: this node's links to other regions, and the task that keeps the log in step with theirs.
//!
//! One task owns the [`Replica`], which decides everything; this module reads events — frames, commits, answers — hands
//! them over and performs the effects. Sockets are read and written by a task for each link ([`link`]); what takes
//! time (reading the log, storing a run, reading a page) is done in tasks of its own, which report back as events.
//!
//! - [`dial`] keeps a link to each configured peer, [`accept`] takes the links that others open.
//! - [`tls`] is how links are kept from others on the way.
//! - [`task`] is that task; its `effects` perform what the replica decides, and its `exchange` answers and asks what is
//!   not about the log: where a document is, presence; its `siblings` does for the region's other nodes what they cannot.
//! - [`snapshot`] reads and stores pages of documents.
//! - [`parts`] is how frames travel that are longer than others.
//! - [`scrub`] compares regions, and puts back what was lost; the task's `scrub` answers and asks for it.
//! - [`members`] remembers the regions that were ever linked; [`truncate`] gives up log entries that every region has.
//!
//! # Bounds
//!
//! The queue of events is bounded; a link's socket is not read while it is full. What waits to be sent is bounded by the
//! replica's windows ([`outgoing`]), and what is done for a peer that asks by `task`'s `answers`. A run that is being stored counts against the committer's budget.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::link::handshake::{Identity, NodeId};
use isobar_protocol::link::{LinkFrame, MissingDocument, Progress};
use isobar_protocol::notice::{KnownRegion, Notice, Observation};
use isobar_protocol::replica::{FetchStatus, LinkId, LinkStatus, LogRead, Page, Peer, Stored};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use crate::commit::Committer;
use crate::config::cluster::Groups;
use crate::documents::Documents;
use crate::outbox::Ephemeral;
use crate::receipts::Receipts;
use crate::scrub::Surveyor;
use crate::siblings::exchange::Exchange;
use crate::storage::{Member, Storage, StorageError, StoredOrigin};
use crate::telemetry::Metrics;

mod accept;
mod dial;
mod envelope;
mod keeping;
mod link;
mod members;
mod outgoing;
mod pace;
mod parts;
mod scrub;
mod snapshot;
mod stored_log;
mod task;
mod tls;
mod truncate;

use keeping::Keeping;
use outgoing::Outgoing;

pub use accept::accept_links;
pub use dial::keep_links;
pub use members::ForgetError;
pub use parts::FrameLimits;
pub use scrub::{Checked, Divergence, Outcome};
pub use tls::PeerTls;
pub use truncate::Keep;

/// Events that wait at most. A frame is at most some hundred kilobytes, unless it is a whole document.
const EVENTS_MAX: usize = 256;

/// Pause before something that failed in the database is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// How long a link waits for what is read when this node begins to keep the links.
const LINEAGE_PATIENCE: Duration = Duration::from_secs(5);

/// What becomes of a link that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Kept,
    /// There is one to that region already, which goes before it.
    Superfluous,
    /// There is one to that region already, by a node on another database.
    Cloned,
}

/// What happens.
enum Event {
    /// A link was opened; the answer says whether it is kept.
    Opened {
        link: LinkId,
        peer: Peer,
        /// The nodes that were started on the peer's database, if it says so.
        lineage: Option<Vec<NodeId>>,
        dialled_here: bool,
        outgoing: Arc<Outgoing>,
        kept: oneshot::Sender<Verdict>,
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
        page: Option<Page>,
    },
    PageStored {
        unusable: Vec<MissingDocument>,
    },
    Adopted {
        origins: Vec<Progress>,
        missing: Vec<MissingDocument>,
    },
    /// Look for a document in the other regions of a group.
    Search {
        document: DocumentId,
        group: PlacementGroup,
        found: oneshot::Sender<SearchOutcome>,
    },
    /// Contents that a search fetched are stored.
    Fetched {
        request: u64,
        stored: bool,
    },
    /// What came of storing a document that a snapshot had lacked.
    WantedStored {
        document: DocumentId,
        request: u64,
        stored: bool,
    },
    /// A client's message in a document of a group.
    Presence {
        group: PlacementGroup,
        message: Arc<Ephemeral>,
    },
    /// What a sibling says to the node that keeps the links.
    Told {
        by: Uuid,
        notice: Notice,
    },
    /// How far the logs were in the database after the first of what siblings observe was heard; nothing if that could not
    /// be read.
    OriginsRead(Option<Vec<StoredOrigin>>),
    /// Something that a check needs.
    Scrub(task::scrub::ScrubCall),
    /// What documents hold of which somebody wants receipts, and those of which nobody does any more.
    Observed {
        observed: Vec<Observation>,
        left: Vec<DocumentId>,
    },
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

/// As whom this node links.
#[derive(Clone)]
pub struct Identities {
    pub node: Arc<Identity>,
    pub tls: Arc<PeerTls>,
}

/// What replication needs of the node.
#[derive(Clone)]
pub struct Parts {
    pub storage: Arc<dyn Storage>,
    pub documents: Arc<Documents>,
    pub committer: Committer,
    pub metrics: Arc<Metrics>,
    pub receipts: Arc<Receipts>,
    pub surveyor: Arc<Surveyor>,
    /// Where this region's clients reach it.
    pub advertise: Option<String>,
    /// Which regions are in which placement groups.
    pub groups: Groups,
    /// Bytes a second that a link may send.
    pub peer_rate_limit: Option<NonZeroU64>,
    pub frame_limits: FrameLimits,
    /// What passes between this node and its siblings.
    pub exchange: Arc<Exchange>,
    /// Whether this node keeps the region's links.
    pub keeps_links: watch::Receiver<bool>,
    /// How far the origins of the region are stored that this node does not write.
    pub siblings: watch::Receiver<Vec<Progress>>,
}

/// What a peer lacks of what this node has written since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// How long it has lacked the oldest entry that it lacks.
    pub ms: u64,
    /// Bytes of all that it lacks.
    pub bytes: u64,
}

/// How far the regions are, for operators and for truncation.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub vector: Vec<Progress>,
    pub links: Vec<LinkStatus>,
    /// For each of the links.
    pub lags: Vec<Lag>,
    /// Origins of which two logs exist.
    pub forked: Vec<OriginId>,
    /// Documents that lack some of what the vector claims, because a snapshot lacked them.
    pub missing: Vec<DocumentId>,
    /// A snapshot that is being fetched.
    pub fetch: Option<FetchStatus>,
}

/// A handle to the replication of a node. Cheap to clone.
#[derive(Clone)]
pub struct Replication {
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
    exchange: Arc<Exchange>,
}

/// Where what siblings say to the node that keeps the links is handed over. Keeps nothing alive.
pub(crate) struct Inbox {
    events: mpsc::WeakSender<Event>,
    shared: Arc<Shared>,
}

impl Inbox {
    /// Hands over what a sibling says. What finds no room is lost, as a notice may be.
    pub(crate) fn hear(&self, by: Uuid, notice: Notice) {
        if let Some(events) = self.events.upgrade() {
            let _ = events.try_send(Event::Told { by, notice });
        }
    }

    /// Passes presence on to the regions that want it; lossy.
    pub(crate) fn relay(&self, group: &PlacementGroup, message: &Arc<Ephemeral>) {
        if let Some(events) = self.events.upgrade() {
            self.shared.relay(&events, group, message);
        }
    }
}

impl Shared {
    fn relay(&self, events: &mpsc::Sender<Event>, group: &PlacementGroup, message: &Arc<Ephemeral>) {
        if self.presence_wanted.load(Ordering::Relaxed) {
            let _ = events.try_send(Event::Presence { group: group.clone(), message: message.clone() });
        }
    }

    /// The other regions that were linked since the node started, and by which links they are.
    fn regions(&self) -> Vec<KnownRegion> {
        let known: Vec<Peer> = self.known.lock().values().cloned().collect();
        let linked = self.linked.lock();
        let region = |peer: Peer| KnownRegion {
            link: linked.get(&peer.region).copied(),
            region: peer.region,
            storage_id: peer.storage_id,
            client_url: peer.client_url,
        };
        known.into_iter().map(region).collect()
    }
}

/// What is seen from outside the task.
struct Shared {
    next_link: AtomicU64,
    peer_rate_limit: Option<NonZeroU64>,
    frame_limits: FrameLimits,
    /// By region, of the links that are up.
    linked: Mutex<HashMap<RegionName, LinkId>>,
    view: Mutex<View>,
    acknowledged: Mutex<HashMap<(RegionName, OriginId), Seq>>,
    /// The regions that were linked since the node started, as they said last who they are.
    known: Mutex<BTreeMap<RegionName, Peer>>,
    /// The regions that were ever linked.
    members: Mutex<BTreeMap<RegionName, Member>>,
    /// Whether any peer wants presence; a cheap look before anything is queued.
    presence_wanted: AtomicBool,
    keeps_links: watch::Receiver<bool>,
    /// The nodes that were started on this database; known while this node keeps the links.
    lineage: watch::Sender<Option<Vec<NodeId>>>,
    /// The groups that this region is in.
    groups: BTreeSet<PlacementGroup>,
    checks: scrub::Checks,
    /// Set once when this node must not write any more.
    fatal: watch::Sender<Option<String>>,
}

impl Shared {
    /// Has the node stop, for the first reason that is given.
    fn fail(&self, reason: String) {
        self.fatal.send_if_modified(|fatal| fatal.is_none() && fatal.replace(reason).is_none());
    }
}

impl Replication {
    /// The replication of a node that writes `own` origins, and the task that does it whenever this node keeps the region's
    /// links.
    pub async fn new(
        region: RegionName,
        groups: BTreeSet<PlacementGroup>,
        own: BTreeSet<OriginId>,
        parts: Parts,
    ) -> Result<(Self, impl Future<Output = ()> + Send), StorageError> {
        let (events, queue) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Shared {
            next_link: AtomicU64::new(1),
            peer_rate_limit: parts.peer_rate_limit,
            frame_limits: parts.frame_limits,
            linked: Mutex::default(),
            view: Mutex::default(),
            acknowledged: Mutex::default(),
            known: Mutex::default(),
            members: Mutex::default(),
            presence_wanted: AtomicBool::new(false),
            keeps_links: parts.keeps_links.clone(),
            lineage: watch::Sender::new(None),
            groups: groups.clone(),
            checks: scrub::Checks::default(),
            fatal: watch::Sender::new(None),
        });
        shared.read_acknowledgements(&*parts.storage).await?;
        let exchange = parts.exchange.clone();
        exchange.set_inbox(Inbox { events: events.downgrade(), shared: shared.clone() });
        let handle = Self { events, shared: shared.clone(), exchange };
        Ok((handle, Keeping { region, groups, own, parts, shared, queue }.run()))
    }

    /// Whether this node keeps the region's links to others.
    pub fn keeps_links(&self) -> bool {
        *self.shared.keeps_links.borrow()
    }

    /// Resolves when that is so, or is not so any more; never when it stays as it is for good.
    async fn until_keeping(&self, keeping: bool) {
        let mut keeps = self.shared.keeps_links.clone();
        let changed = keeps.wait_for(|keeps| *keeps == keeping).await.is_ok();
        if !changed && keeping {
            std::future::pending::<()>().await;
        }
    }

    /// What this node says of itself at present; nothing if it is not ready to in time.
    async fn identify(&self, identity: &Identity) -> Option<Identity> {
        let mut lineage = self.shared.lineage.subscribe();
        let known = tokio::time::timeout(LINEAGE_PATIENCE, lineage.wait_for(Option::is_some)).await;
        let mut identity = identity.clone();
        identity.hello.lineage = known.ok()?.ok()?.clone();
        Some(identity)
    }

    /// Looks for a document that is not here in the other regions of a group, and fetches it. Only they learn its id.
    pub async fn search(&self, document: DocumentId, group: PlacementGroup) -> SearchOutcome {
        if !self.keeps_links() {
            return self.exchange.search(&document, group).await;
        }
        let (found, answer) = oneshot::channel();
        if self.events.send(Event::Search { document, group, found }).await.is_err() {
            return SearchOutcome::Absent;
        }
        answer.await.unwrap_or(SearchOutcome::Absent)
    }

    /// The other regions that were linked to any node of this region that kept the links, and by which links they are.
    pub fn regions(&self) -> Vec<KnownRegion> {
        let told = self.exchange.regions().into_iter().map(|it| (it.region.clone(), it));
        let mut regions: BTreeMap<RegionName, KnownRegion> = told.collect();
        for region in self.shared.regions() {
            match regions.get_mut(&region.region) {
                // It was linked here, and is to the node that keeps the links now.
                Some(told) if region.link.is_none() && told.link.is_some() => {}
                Some(told) => *told = region,
                None => {
                    regions.insert(region.region.clone(), region);
                }
            }
        }
        regions.into_values().collect()
    }

    /// The other regions that were linked to this node since it started.
    pub fn known(&self) -> Vec<Known> {
        let known: Vec<Peer> = self.shared.known.lock().values().cloned().collect();
        let linked = self.shared.linked.lock();
        known.into_iter().map(|peer| Known { up: linked.contains_key(&peer.region), peer }).collect()
    }

    /// Whether a storage is that of another region that was linked to any node of this region that kept the links.
    pub fn is_region_storage(&self, storage: &StorageId) -> bool {
        self.shared.known.lock().values().any(|peer| peer.storage_id == *storage)
            || self.exchange.regions().iter().any(|region| region.storage_id == *storage)
    }

    /// Has it found out which regions hold these documents; those of the second list are of interest to nobody any more.
    pub(crate) async fn observe(&self, observed: Vec<Observation>, left: Vec<DocumentId>) {
        if !self.keeps_links() {
            self.exchange.observe(observed, left);
        } else if !observed.is_empty() || !left.is_empty() {
            let _ = self.events.send(Event::Observed { observed, left }).await;
        }
    }

    /// Passes presence on to the regions that want it; lossy.
    pub fn relay(&self, group: &PlacementGroup, message: &Arc<Ephemeral>) {
        self.shared.relay(&self.events, group, message);
    }

    /// Whether a region is linked.
    fn is_linked_to(&self, region: &RegionName) -> bool {
        self.shared.linked.lock().contains_key(region)
    }

    /// Whether any other region is linked.
    pub fn is_linked(&self) -> bool {
        !self.shared.linked.lock().is_empty()
    }

    /// Whether any other region is linked to this node or, if it does not keep the links, to the one that does.
    pub fn can_search(&self) -> bool {
        self.is_linked() || !self.keeps_links() && self.exchange.is_keeper_linked()
    }

    pub fn view(&self) -> View {
        self.shared.view.lock().clone()
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
