//! Replication between regions: which entries are asked from whom, sent to whom, stored in which order.
//!
//! One [`Replica`] speaks for a node on all of its links. It keeps no entry: it reads the log by asking its caller to
//! ([`Effect::ReadLog`]), so a slow peer costs a cursor and not memory; and it hands received runs over to be stored
//! ([`Effect::Append`]) and hears when they are durable ([`Replica::stored`]). Push and catch-up are the same stream:
//! whoever subscribed an origin gets what is after its cursor, and then what is appended.
//!
//! - **Routes.** The receiver asks. It takes each origin from one peer: from the origin's own region while that link is
//!   up, else from the one with the shortest round trip that has it; when another is ahead for a while, from that one.
//! - **Order.** Only the entry after the last one received is taken. Nothing else is kept, so there never is a gap.
//! - **Acknowledgement.** What is durable here is announced to every peer, soon to whom it came from, at leisure to others.
//! - **Windows.** What is sent and not acknowledged is bounded for each link; streams that catch up share a smaller
//!   window, so that live edits of other origins do not wait behind a backlog.
//! - **Chains.** Every run and every subscription carries the running hash. Two logs that disagree in it are never mixed:
//!   the origin is given up on and reported ([`Effect::OriginForked`]).
//! - **Snapshots.** When nobody holds the entries any more that are missing here, documents are fetched page by page, and the
//!   vector that the first page was taken at is adopted after the last, together with a note of what could not be had.
//!
//! # Invariants
//!
//! - What is announced or sent is durable: the replica learns of entries by [`Replica::stored`] only.
//! - `durable` never goes back, and runs are handed over in the order of their seqs, without gaps.
//! - Nothing about a group is sent to a peer outside of it, nor taken from one.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::config::{
    ACKNOWLEDGE_AFTER_MS, ANNOUNCE_EVERY_MS, LINK_SILENCE_MS, ORIGINS_MAX, PING_EVERY_MS, ROUTES_EVERY_MS,
};
use crate::ids::{DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use crate::link::handshake::NodeId;
use crate::link::{DocumentContents, LinkFrame, MissingDocument, Progress};
use crate::log::{Chain, Opened};
use crate::planted::{self, Fault};
use crate::receipts::{Announced, Target};

mod incoming;
mod lag;
mod routes;
mod snapshot;
mod streams;

use lag::Samples;
use routes::Route;
use snapshot::Fetch;

pub use snapshot::{FetchStatus, Page};
use streams::Stream;

/// A moment on the caller's clock, in milliseconds. It never goes back; where it begins does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

/// A link, for as long as it lives; the caller numbers them and never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// Who is at the other end of a link, as the handshake proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub region: RegionName,
    /// The process at the other end.
    pub node: NodeId,
    /// The region's storage, as clients know it.
    pub storage_id: StorageId,
    /// The placement groups whose documents the region holds.
    pub groups: BTreeSet<PlacementGroup>,
    /// Where the region's clients reach it.
    pub client_url: Option<String>,
    /// Extensions that the node understands.
    pub features: BTreeSet<String>,
}

/// A run that was received in order, for the caller to store.
#[derive(Debug, Clone)]
pub struct ReceivedRun {
    pub origin: OriginId,
    pub region: RegionName,
    pub group: PlacementGroup,
    pub first: Seq,
    pub last: Seq,
    pub chain_before: Chain,
    pub chain: Chain,
    /// The entries, taken apart: each change was parsed and its hash computed from its bytes.
    pub entries: Vec<(DocumentId, Opened)>,
    /// The same, packed, to be stored as it is.
    pub body: Bytes,
}

/// What came of a log read.
#[derive(Debug, Clone)]
pub enum LogRead {
    /// The runs from the one with the entry after the cursor on; empty if there is none yet.
    Runs(Vec<LogSlice>),
    /// The log begins after `floor`.
    Truncated { floor: Seq },
    /// It cannot be read at the moment; it is asked for again later.
    Failed,
}

/// A run as it is stored.
#[derive(Debug, Clone)]
pub struct LogSlice {
    pub first: Seq,
    pub last: Seq,
    pub chain_before: Chain,
    pub body: Bytes,
}

/// What came of an [`Effect::Append`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is durable.
    Durable,
    /// It was not stored, and the origin stands here now: another node of the region stored its entries.
    OutOfStep { seq: Seq, chain: Chain },
}

/// What the caller is to do, in this order.
#[derive(Debug)]
pub enum Effect {
    Send {
        link: LinkId,
        frame: LinkFrame,
    },
    /// Send entries of a stream that catches up: behind what else is sent, but in the order of the origin's entries.
    SendCatchUp {
        link: LinkId,
        frame: LinkFrame,
    },
    /// Send what was sent, then close.
    Close {
        link: LinkId,
        reason: &'static str,
    },
    /// Read the log and answer with [`Replica::log_read`].
    ReadLog {
        link: LinkId,
        origin: OriginId,
        after: Seq,
        bytes_max: usize,
    },
    /// Store a run; answer with [`Replica::stored`]. Runs of an origin are to be stored in the order in which they are
    /// handed over.
    Append(Box<ReceivedRun>),
    /// Read a page of documents for a peer of these groups; answer with [`Replica::page_read`].
    ReadPage {
        link: LinkId,
        after: Option<DocumentId>,
        groups: BTreeSet<PlacementGroup>,
    },
    /// Take what is not here yet out of these documents and store it; answer with [`Replica::page_stored`], and with which
    /// of them could not be stored.
    StorePage {
        documents: Vec<DocumentContents>,
    },
    /// Raise the stored counters to these, durably, and in the same transaction note that these documents lack some of what
    /// the counters claim; then call [`Replica::adopted`].
    AdoptOrigins {
        origins: Vec<Progress>,
        missing: Vec<MissingDocument>,
    },
    /// A region has everything of this origin up to here, durably.
    Acknowledged {
        region: RegionName,
        origin: OriginId,
        seq: Seq,
    },
    /// Two different logs exist under one origin. Somebody must look at it.
    OriginForked {
        origin: OriginId,
        region: RegionName,
        seq: Seq,
    },
    /// A peer has more of this node's own origin than the node itself: its database lost what was durable. It must
    /// write no more under it.
    OwnOriginLost {
        origin: OriginId,
    },
}

/// What is known of an origin.
#[derive(Debug)]
struct Origin {
    region: RegionName,
    group: PlacementGroup,
    /// This node writes it.
    own: bool,
    /// Another node of the region writes it, into the same database: it is taken from nobody.
    sibling: bool,
    durable: (Seq, Chain),
    /// Handed over to be stored; never before `durable`.
    received: (Seq, Chain),
    /// The farthest that was ever handed over, also if it had to be asked for again: what of it is in documents stays there.
    handed: Seq,
    /// Handed over and not answered yet: last seq and the chain there.
    storing: BTreeMap<Seq, Chain>,
    /// Two logs exist; nothing of it is taken or sent any more.
    forked: bool,
    route: Option<Route>,
    /// Of an own origin: when it had grown how far.
    samples: Samples,
}

impl Origin {
    fn new(progress: &Progress, own: bool) -> Self {
        let at = (progress.seq, progress.chain);
        Self {
            region: progress.region.clone(),
            group: progress.group.clone(),
            own,
            sibling: false,
            durable: at,
            received: at,
            handed: at.0,
            storing: BTreeMap::new(),
            forked: false,
            route: None,
            samples: Samples::default(),
        }
    }
}

/// A link that is up.
#[derive(Debug)]
struct Link {
    peer: Peer,
    /// What the peer has announced.
    theirs: BTreeMap<OriginId, Seq>,
    /// Where the peer's log begins, as far as it has said so.
    floors: BTreeMap<OriginId, Seq>,
    /// What was announced to the peer last.
    announced: BTreeMap<OriginId, Seq>,
    announce_at: Moment,
    streams: BTreeMap<OriginId, Stream>,
    /// Streams that may have something to read.
    due: BTreeSet<OriginId>,
    /// Reads that are under way.
    reads: usize,
    /// Bytes sent and not acknowledged, on all streams and on those that catch up.
    in_flight_bytes: usize,
    catching_up_bytes: usize,
    round_trip_ms: Option<u64>,
    heard_at: Moment,
    ping_at: Moment,
    /// A page is being read for the peer; the vector is what goes with the first one.
    serving: Option<Vec<Progress>>,
}

/// See the module.
#[derive(Debug)]
pub struct Replica {
    region: RegionName,
    groups: BTreeSet<PlacementGroup>,
    origins: BTreeMap<OriginId, Origin>,
    links: BTreeMap<LinkId, Link>,
    fetch: Option<Fetch>,
    /// When routes are looked at next.
    routes_at: Moment,
    effects: Vec<Effect>,
}

/// A link as operators see it.
#[derive(Debug, Clone)]
pub struct LinkStatus {
    pub link: LinkId,
    pub region: RegionName,
    pub round_trip_ms: Option<u64>,
    pub in_flight_bytes: usize,
    /// Entries the peer has announced that are not durable here.
    pub behind: u64,
    /// Entries that are durable here and not announced by the peer.
    pub ahead: u64,
    /// Since when the oldest entry of this node's own that the peer has not announced has been durable here; nothing if it
    /// has them all.
    pub unacknowledged_since: Option<Moment>,
    /// Origins that are taken from this peer.
    pub routes: usize,
    pub fetches_snapshot: bool,
}

impl Replica {
    /// A replica of a node that holds these groups and has stored these origins. `own` are those that it writes.
    pub fn new(
        region: RegionName,
        groups: BTreeSet<PlacementGroup>,
        origins: Vec<Progress>,
        own: BTreeSet<OriginId>,
    ) -> Self {
        let origins =
            origins.iter().map(|it| (it.origin, Origin::new(it, own.contains(&it.origin)))).collect();
        Self {
            region,
            groups,
            origins,
            links: BTreeMap::new(),
            fetch: None,
            routes_at: Moment(0),
            effects: Vec::new(),
        }
    }

    /// A link is up, and its peer has proved who it is.
    pub fn link_opened(&mut self, now: Moment, link: LinkId, peer: Peer) {
        let opened = Link {
            theirs: planted::announced_before(&self.region, &peer.region),
            peer,
            floors: BTreeMap::new(),
            announced: BTreeMap::new(),
            announce_at: Moment(now.0 + ANNOUNCE_EVERY_MS),
            streams: BTreeMap::new(),
            due: BTreeSet::new(),
            reads: 0,
            in_flight_bytes: 0,
            catching_up_bytes: 0,
            round_trip_ms: None,
            heard_at: now,
            ping_at: now,
            serving: None,
        };
        self.links.insert(link, opened);
        // Also when there is nothing to announce: the peer learns that this is all.
        let origins = self.news_for(link);
        self.send(link, LinkFrame::Have { origins });
        self.ping(now, link);
    }

    /// A link is gone. What was sent on it and not acknowledged is sent again on the next.
    pub fn link_closed(&mut self, now: Moment, link: LinkId) {
        let Some(closed) = self.links.remove(&link) else { return };
        planted::link_closed(&self.region, &closed.peer.region, closed.theirs);
        for origin in self.origins.values_mut() {
            if origin.route.is_some_and(|route| route.link == link) {
                origin.route = None;
            }
        }
        self.fetch_lost(now, link);
        self.choose_routes(now);
    }

    /// A frame has come. Frames that make no sense at this moment are passed over: they may have been sent before
    /// something that crossed them.
    pub fn receive(&mut self, now: Moment, link: LinkId, frame: LinkFrame) {
        match self.links.get_mut(&link) {
            Some(known) => known.heard_at = now,
            None => return,
        }
        match frame {
            LinkFrame::Have { origins } => self.receive_have(now, link, &origins),
            LinkFrame::Subscribe { origin, after, chain } => self.subscribed(now, link, origin, after, chain),
            LinkFrame::Unsubscribe { origin } => self.unsubscribed(now, link, origin),
            LinkFrame::Entries { origin, first, chain, body } => {
                self.receive_entries(now, link, origin, first, chain, &body);
            }
            LinkFrame::Truncated { origin, floor } => self.receive_truncated(now, link, origin, floor),
            LinkFrame::SnapshotRequest { after } => self.page_requested(link, after),
            LinkFrame::SnapshotPage { vector, documents, next } => {
                self.receive_page(link, vector, documents, next);
            }
            LinkFrame::Missing { documents } => self.receive_missing(now, link, documents),
            LinkFrame::Ping { sent_ms } => self.send(link, LinkFrame::Pong { sent_ms }),
            LinkFrame::Pong { sent_ms } => {
                if let Some(link) = self.links.get_mut(&link) {
                    link.round_trip_ms = Some(now.0.saturating_sub(sent_ms));
                }
            }
            _ => {}
        }
    }

    /// Entries of an own origin are durable up to here. An origin that is not known yet becomes known.
    pub fn own_appended(&mut self, now: Moment, progress: Progress) {
        let origin = self.origins.entry(progress.origin).or_insert_with(|| Origin::new(&progress, true));
        if progress.seq >= origin.durable.0 {
            origin.durable = (progress.seq, progress.chain);
            origin.received = origin.durable;
            origin.samples.note(now, progress.seq);
        }
        // Who has not heard of the origin cannot have asked for it.
        let unaware = self.links.iter().filter(|(_, link)| !link.announced.contains_key(&progress.origin));
        let unaware: Vec<LinkId> = unaware.map(|(link, _)| *link).collect();
        unaware.into_iter().for_each(|link| self.announce(now, link));
        self.pump_origin(now, progress.origin);
    }

    /// Another node of the region, which stores into the same database, has stored entries of its own origin up to here. An
    /// origin that does not move is what it was: nobody may be writing it any more.
    pub fn sibling_appended(&mut self, now: Moment, progress: Progress) {
        let id = progress.origin;
        match self.origins.get(&id) {
            None if !self.has_room() => return,
            None => {}
            Some(known) if known.own || known.forked || known.durable.0 >= progress.seq => return,
            Some(_) => {}
        }
        let origin = self.origins.entry(id).or_insert_with(|| Origin::new(&progress, false));
        origin.sibling = true;
        origin.durable = (progress.seq, progress.chain);
        if origin.received.0 < origin.durable.0 {
            origin.received = origin.durable;
        }
        if let Some(route) = origin.route.take() {
            self.send(route.link, LinkFrame::Unsubscribe { origin: id });
        }
        let unaware = self.links.iter().filter(|(_, link)| !link.announced.contains_key(&id));
        let unaware: Vec<LinkId> = unaware.map(|(link, _)| *link).collect();
        unaware.into_iter().for_each(|link| self.announce(now, link));
        self.pump_origin(now, id);
    }

    /// Time has passed: to be called every ten milliseconds or so.
    pub fn tick(&mut self, now: Moment) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            let Link { heard_at, ping_at, announce_at, .. } = self.links[&link];
            if now.0.saturating_sub(heard_at.0) > LINK_SILENCE_MS {
                self.effects.push(Effect::Close { link, reason: "no sign of life" });
                self.link_closed(now, link);
                continue;
            }
            if now >= ping_at {
                self.ping(now, link);
            }
            if now >= announce_at {
                self.announce(now, link);
            }
            self.pump_link(now, link);
        }
        if now >= self.routes_at {
            self.routes_at = Moment(now.0 + ROUTES_EVERY_MS);
            self.choose_routes(now);
        }
    }

    /// What is to be done now, in this order. To be called after every other call.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// How far the logs of a group have been taken in here, committed or not: at least as far as anything that documents hold
    /// because of them. Those of this node itself are as far as the replica was told.
    pub fn target(&self, group: &PlacementGroup) -> Target {
        let mut target = Target::default();
        let of_group = self.origins.iter().filter(|(_, origin)| origin.group == *group);
        of_group.for_each(|(id, origin)| target.raise(*id, origin.handed.max(origin.durable.0)));
        target
    }

    /// [`Self::target`] of all groups that the peer of a link is in as well.
    pub fn shared_target(&self, link: LinkId) -> Target {
        let mut target = Target::default();
        let Some(known) = self.links.get(&link) else { return target };
        let shared = self.groups.intersection(&known.peer.groups);
        shared.for_each(|group| target.raise_all(&self.target(group)));
        target
    }

    /// Whether everything up to the target is durable here.
    pub fn has(&self, target: &Target) -> bool {
        let durable = |origin| self.origins.get(origin).map_or(Seq(0), |it| it.durable.0);
        target.iter().all(|(origin, seq)| *seq <= durable(origin))
    }

    /// Whether documents are being fetched whole: until that is done they hold what no log position here stands for.
    pub fn fetches_snapshot(&self) -> bool {
        self.fetch.is_some()
    }

    /// The placement groups that its region is in.
    pub fn groups(&self) -> &BTreeSet<PlacementGroup> {
        &self.groups
    }

    /// The region that it replicates for.
    pub fn region(&self) -> &RegionName {
        &self.region
    }

    /// How far this region has every origin, durably.
    pub fn vector(&self) -> Vec<Progress> {
        self.origins.iter().map(|(id, origin)| progress(*id, origin)).collect()
    }

    /// How far an origin is durable here, and the chain there.
    pub fn position(&self, origin: OriginId) -> Option<(Seq, Chain)> {
        self.origins.get(&origin).map(|origin| origin.durable)
    }

    /// Origins of which two logs exist.
    pub fn forked(&self) -> impl Iterator<Item = OriginId> {
        self.origins.iter().filter(|(_, origin)| origin.forked).map(|(id, _)| *id)
    }

    /// The links that are up.
    pub fn links(&self) -> impl Iterator<Item = LinkStatus> {
        self.links.iter().map(|(id, link)| self.status(*id, link))
    }

    fn status(&self, id: LinkId, link: &Link) -> LinkStatus {
        let (mut behind, mut ahead) = (0, 0);
        let mut unacknowledged_since: Option<Moment> = None;
        for (origin, known) in &self.origins {
            if !self.shares(link, &known.group) {
                continue;
            }
            let theirs = link.theirs.get(origin).map_or(0, |seq| seq.0);
            behind += theirs.saturating_sub(known.durable.0.0);
            ahead += known.durable.0.0.saturating_sub(theirs);
            let since = known.samples.since(Seq(theirs));
            unacknowledged_since = unacknowledged_since.into_iter().chain(since).min();
        }
        let routed = self.origins.values().filter(|it| it.route.is_some_and(|route| route.link == id));
        LinkStatus {
            link: id,
            region: link.peer.region.clone(),
            round_trip_ms: link.round_trip_ms,
            in_flight_bytes: link.in_flight_bytes,
            behind,
            ahead,
            unacknowledged_since,
            routes: routed.count(),
            fetches_snapshot: self.fetch.as_ref().is_some_and(|fetch| fetch.is_from(id)),
        }
    }

    fn send(&mut self, link: LinkId, frame: LinkFrame) {
        self.effects.push(Effect::Send { link, frame });
    }

    fn ping(&mut self, now: Moment, link: LinkId) {
        if let Some(known) = self.links.get_mut(&link) {
            known.ping_at = Moment(now.0 + PING_EVERY_MS);
            self.send(link, LinkFrame::Ping { sent_ms: now.0 });
        }
    }

    /// Whether both ends of a link hold a group.
    fn shares(&self, link: &Link, group: &PlacementGroup) -> bool {
        self.groups.contains(group) && link.peer.groups.contains(group)
    }

    /// Whether origins of a group may be sent over a link.
    fn may_send(&self, link: &Link, group: &PlacementGroup) -> bool {
        self.shares(link, group) || planted::is(Fault::SendOutsideGroups)
    }

    /// Whether origins of a group are taken from a link.
    fn may_take(&self, link: &Link, group: &PlacementGroup) -> bool {
        self.shares(link, group) || planted::is(Fault::TakeOutsideGroups)
    }

    /// What has become durable since the last announcement to this peer; it counts as announced.
    fn news_for(&mut self, link: LinkId) -> Vec<Progress> {
        let Some(known) = self.links.get(&link) else { return Vec::new() };
        let is_news = |(id, origin): &(&OriginId, &Origin)| {
            !origin.forked
                && (origin.own || origin.sibling || origin.durable.0 > Seq(0))
                && self.may_send(known, &origin.group)
                && known.announced.get(id).is_none_or(|seq| *seq < origin.durable.0)
        };
        let news: Vec<Progress> =
            self.origins.iter().filter(is_news).map(|(id, origin)| progress(*id, origin)).collect();
        let known = self.links.get_mut(&link).expect("it was there a moment ago");
        known.announced.extend(news.iter().map(|it| (it.origin, it.seq)));
        news
    }

    fn announce(&mut self, now: Moment, link: LinkId) {
        let origins = self.news_for(link);
        if let Some(known) = self.links.get_mut(&link) {
            known.announce_at = Moment(now.0 + ANNOUNCE_EVERY_MS);
        }
        if !origins.is_empty() {
            self.send(link, LinkFrame::Have { origins });
        }
    }

    /// Sees to it that the peer soon hears that something of what it sent is durable.
    fn acknowledge_soon(&mut self, now: Moment, link: LinkId) {
        if let Some(known) = self.links.get_mut(&link) {
            known.announce_at = known.announce_at.min(Moment(now.0 + ACKNOWLEDGE_AFTER_MS));
        }
    }

    /// Gives an origin up: two logs exist under its name, and whatever is done with them would mix them.
    fn fork(&mut self, now: Moment, id: OriginId, seq: Seq) {
        let Some(origin) = self.origins.get_mut(&id) else { return };
        if std::mem::replace(&mut origin.forked, true) {
            return;
        }
        let (region, route) = (origin.region.clone(), origin.route.take());
        if let Some(route) = route {
            self.send(route.link, LinkFrame::Unsubscribe { origin: id });
        }
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.unsubscribed(now, link, id);
        }
        self.effects.push(Effect::OriginForked { origin: id, region, seq });
    }

    /// How many origins are known, of all regions.
    pub fn origin_count(&self) -> usize {
        self.origins.len()
    }

    /// Whether one more origin may become known.
    fn has_room(&self) -> bool {
        self.origins.len() < ORIGINS_MAX
    }
}

/// Whether two logs that stand at one seq are one.
fn agree(one: Chain, other: Chain) -> bool {
    one == other || planted::is(Fault::SkipChainCheck)
}

impl Announced for Replica {
    fn covers(&self, link: LinkId, target: &Target) -> bool {
        let Some(known) = self.links.get(&link) else { return false };
        target.iter().all(|(origin, seq)| *seq <= known.theirs.get(origin).copied().unwrap_or(Seq(0)))
    }
}

fn progress(id: OriginId, origin: &Origin) -> Progress {
    let (seq, chain) = if planted::is(Fault::AnnounceUnstored) { origin.received } else { origin.durable };
    Progress { origin: id, region: origin.region.clone(), group: origin.group.clone(), seq, chain }
}
