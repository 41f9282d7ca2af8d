//! Replication: this node's links to other regions, and the task that keeps the log in step with theirs.
//!
//! One task owns the [`Replica`], which decides everything; this module reads events — frames, commits, answers — hands
//! them over and performs the effects. Sockets are read and written by a task for each link ([`link`]); what takes
//! time (reading the log, storing a run, reading a page) is done in tasks of its own, which report back as events.
//!
//! - [`dial`] keeps a link to each configured peer, [`accept`] takes the links that others open.
//! - [`tls`] is how links are kept from others on the way.
//! - [`task`] is that task; its `effects` perform what the replica decides, and its `exchange` answers and asks what is
//!   not about the log: where a document is, presence.
//! - [`snapshot`] reads and stores pages of documents.
//! - [`parts`] is how frames travel that are longer than others.
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
use isobar_protocol::link::handshake::Identity;
use isobar_protocol::link::{LinkFrame, MissingDocument, Progress};
use isobar_protocol::replica::{FetchStatus, LinkId, LinkStatus, LogRead, Page, Peer, Stored};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use crate::commit::Committer;
use crate::documents::Documents;
use crate::outbox::Ephemeral;
use crate::receipts::{Observed, Receipts};
use crate::storage::{Member, Storage, StorageError};
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
mod snapshot;
mod task;
mod tls;
mod truncate;

use keeping::Keeping;
use outgoing::Outgoing;

pub use accept::accept_links;
pub use dial::keep_links;
pub use members::ForgetError;
pub use parts::FrameLimits;
pub use tls::PeerTls;
pub use truncate::Keep;

/// Events that wait at most. A frame is at most some hundred kilobytes, unless it is a whole document.
const EVENTS_MAX: usize = 256;

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
    Presence(Arc<Ephemeral>),
    /// What documents hold of which somebody wants receipts, and those of which nobody does any more.
    Observed {
        observed: Vec<Observed>,
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
    /// Where this region's clients reach it.
    pub advertise: Option<String>,
    /// Bytes a second that a link may send.
    pub peer_rate_limit: Option<NonZeroU64>,
    pub frame_limits: FrameLimits,
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
    /// Set once when this node must not write any more.
    fatal: watch::Sender<Option<String>>,
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
            fatal: watch::Sender::new(None),
        });
        shared.read_acknowledgements(&*parts.storage).await?;
        let handle = Self { events, shared: shared.clone() };
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

    /// Whether a storage is that of another region that was linked since the node started.
    pub fn is_region_storage(&self, storage: &StorageId) -> bool {
        self.shared.known.lock().values().any(|peer| peer.storage_id == *storage)
    }

    /// Has it found out which regions hold these documents; those of the second list are of interest to nobody any more.
    pub(crate) async fn observe(&self, observed: Vec<Observed>, left: Vec<DocumentId>) {
        if !observed.is_empty() || !left.is_empty() {
            let _ = self.events.send(Event::Observed { observed, left }).await;
        }
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
