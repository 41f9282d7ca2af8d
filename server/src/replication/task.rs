//! The task that owns the replica: turns events into its calls, and keeps what is seen from outside up to date.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isobar_protocol::ids::{OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::link::{CLONED, FEATURE_PARTS, LinkFrame, Progress};
use isobar_protocol::receipts::{Observer, Receipts, Target};
use isobar_protocol::replica::{LinkId, LinkStatus, Moment, Peer, Replica};
use tokio::sync::{mpsc, oneshot};

use super::members::NOTE_EVERY;
use super::outgoing::Outgoing;
use super::snapshot::Audience;
use super::{Event, Lag, Parts, SearchOutcome, Shared, Verdict, View};
use crate::commit::OwnProgress;
use crate::storage::Acknowledgement;

mod answers;
mod clones;
mod effects;
mod exchange;
mod log_bytes;
mod missing;
mod receipts;
pub(super) mod scrub;
mod siblings;

use answers::Answers;
use clones::Doubt;
use exchange::Exchange;
use log_bytes::LogBytes;
use missing::Wanted;
use siblings::Observers;

/// How often the replica is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// How often interests, metrics and acknowledgements are looked after.
const UPKEEP: Duration = Duration::from_millis(500);

/// A link that is up, as the task sees it.
struct Up {
    peer: Peer,
    /// The nodes that were started on the peer's database, if it says so.
    lineage: Option<Vec<NodeId>>,
    /// Another node claims to be of the peer's region, and does not know the peer.
    doubt: Option<Doubt>,
    dialled_here: bool,
    /// Whether the region whose name comes first dialled it: of two links that were opened at once that one stays.
    dialled_by_first: bool,
    outgoing: Arc<Outgoing>,
    /// For whom documents are read that the peer asks for.
    audience: Audience,
    answers: Answers,
}

/// The task. See the module.
pub(super) struct Task {
    replica: Replica,
    parts: Parts,
    shared: Arc<Shared>,
    events: mpsc::WeakSender<Event>,
    links: HashMap<LinkId, Up>,
    exchange: Exchange,
    /// What a snapshot lacked.
    wanted: Wanted,
    log_bytes: LogBytes,
    receipts: Receipts,
    observers: Observers,
    /// The last target of each group.
    targets: BTreeMap<PlacementGroup, Target>,
    scrubs: scrub::Scrubs,
    /// Ends when the last run of an origin has taken its place in the queue to the log.
    last_placed: HashMap<OriginId, oneshot::Receiver<()>>,
    /// The regions that said last that another database goes by this region's name.
    cloned_by: BTreeSet<RegionName>,
    /// Acknowledgements that are not noted in the database yet.
    unnoted: HashMap<(RegionName, OriginId), Seq>,
    /// When it was noted last which regions are linked.
    members_noted: Instant,
    started: Instant,
}

impl Task {
    pub(super) fn new(
        replica: Replica,
        parts: Parts,
        shared: Arc<Shared>,
        events: &mpsc::Sender<Event>,
    ) -> Self {
        Self {
            replica,
            parts,
            shared,
            events: events.downgrade(),
            links: HashMap::new(),
            exchange: Exchange::default(),
            wanted: Wanted::default(),
            log_bytes: LogBytes::default(),
            receipts: Receipts::default(),
            observers: Observers::default(),
            targets: BTreeMap::new(),
            scrubs: scrub::Scrubs::default(),
            last_placed: HashMap::new(),
            cloned_by: BTreeSet::new(),
            unnoted: HashMap::new(),
            members_noted: Instant::now(),
            started: Instant::now(),
        }
    }

    fn now(&self) -> Moment {
        Moment(self.started.elapsed().as_millis() as u64)
    }

    /// Runs until `queue`, where links and the node put what happens, is closed. `answers` is where what was begun here reports.
    /// To be dropped only together with the task, or after [`Self::end`].
    pub(super) async fn run(
        &mut self,
        queue: &mut mpsc::Receiver<Event>,
        mut answers: mpsc::Receiver<Event>,
    ) {
        let mut progress = self.parts.committer.progress();
        progress.mark_changed();
        let mut siblings = self.parts.siblings.clone();
        siblings.mark_changed();
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
                Some(answer) = answers.recv() => self.handle(answer),
                Ok(()) = siblings.changed() => {
                    let now = self.now();
                    let siblings = siblings.borrow_and_update().clone();
                    siblings.into_iter().for_each(|it| self.replica.sibling_appended(now, it));
                }
                Ok(()) = progress.changed() => {
                    let now = self.now();
                    let own = progress.borrow_and_update().clone();
                    let region = self.replica.region().clone();
                    own.into_iter().for_each(|own| {
                        self.log_bytes.note(&own);
                        let OwnProgress { origin, group, seq, chain, .. } = own;
                        let progress = Progress { origin, region: region.clone(), group, seq, chain };
                        self.replica.own_appended(now, progress);
                    });
                }
                _ = ticks.tick(), if !self.links.is_empty() => {
                    let now = self.now();
                    self.replica.tick(now);
                    self.receipts.tick(now, &self.replica);
                    self.perform_receipts();
                }
                _ = upkeep.tick() => self.look_after(),
            }
            self.perform_all();
        }
    }

    /// Closes all links: another node keeps them now.
    pub(super) fn end(&mut self, reason: &str) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        links.into_iter().for_each(|link| self.close(link, reason));
        self.shared.presence_wanted.store(false, std::sync::atomic::Ordering::Relaxed);
        self.parts.exchange.regions_want(Vec::new());
        *self.shared.view.lock() = View::default();
    }

    fn handle(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Opened { link, peer, lineage, dialled_here, outgoing, kept } => {
                let dialled_by_first = dialled_here == (*self.replica.region() < peer.region);
                let takes_parts = peer.features.contains(FEATURE_PARTS);
                let contents_bytes_max = self.parts.frame_limits.contents_bytes_max(takes_parts);
                let audience = Audience { groups: peer.groups.clone(), contents_bytes_max };
                let answers = Answers::new(outgoing.clone());
                let doubt = None;
                let up =
                    Up { peer, lineage, doubt, dialled_here, dialled_by_first, outgoing, audience, answers };
                let _ = kept.send(self.open(link, up));
            }
            Event::Closed { link } => self.closed(link),
            Event::Frame { link, frame } => self.receive(link, frame),
            Event::LogRead { link, origin, after, read } => {
                self.replica.log_read(now, link, origin, after, read);
            }
            Event::Stored { origin, last, outcome } => self.replica.stored(now, origin, last, outcome),
            Event::PageRead { link, page } => self.replica.page_read(now, link, page),
            Event::PageStored { unusable } => self.replica.page_stored(now, unusable),
            Event::Adopted { origins, missing } => {
                self.replica.adopted(now, &origins);
                self.want(missing);
            }
            Event::Search { document, group, found } => self.search(document, group, found),
            Event::Fetched { request, stored: true } => {
                self.exchange.settle(request, &SearchOutcome::Found);
            }
            Event::Fetched { request, stored: false } => self.exchange.give_up(request),
            Event::WantedStored { document, request, stored } => {
                self.wanted_stored(&document, request, stored);
            }
            Event::Presence { group, message } => self.relay_presence(&group, &message),
            Event::Observed { observed, left } => self.observe(Observer::HERE, observed, left, &[]),
            Event::Told { by, notice } => self.told(by, notice),
            Event::OriginsRead(origins) => self.origins_read(origins),
            Event::Scrub(call) => self.scrub_call(call),
        }
    }

    /// Takes a link up, unless there is one to that region which goes before it.
    fn open(&mut self, link: LinkId, mut up: Up) -> Verdict {
        let previous = self.shared.linked.lock().get(&up.peer.region).copied();
        if let Some(previous) = previous {
            let verdict = self.judge(previous, &up);
            if verdict != Verdict::Kept {
                return verdict;
            }
            self.close(previous, "another link to this region took its place");
        }
        up.peer = self.in_known_groups(up.peer);
        let peer = up.peer.clone();
        tracing::info!(region = %peer.region, "region linked");
        self.parts.metrics.linked(&peer.region, true);
        self.shared.linked.lock().insert(peer.region.clone(), link);
        self.shared.known.lock().insert(peer.region.clone(), peer.clone());
        self.note_linked(&peer.region);
        up.audience.groups = peer.groups.clone();
        let groups = peer.groups.clone();
        self.replica.link_opened(self.now(), link, peer);
        self.links.insert(link, up);
        self.receipts.link_opened(self.now(), link, groups, &self.replica);
        self.perform_receipts();
        self.offer_interests(link);
        self.offer_searches(link);
        self.state_keeping();
        Verdict::Kept
    }

    /// The peer with those of its groups that this region's settings agree on: a region that is configured wrongly shall not
    /// be sent what all others keep from it.
    fn in_known_groups(&self, mut peer: Peer) -> Peer {
        let known = self.parts.groups.of(&peer.region);
        let claimed = std::mem::replace(&mut peer.groups, known);
        peer.groups.retain(|group| claimed.contains(group));
        if claimed != self.parts.groups.of(&peer.region) {
            tracing::warn!(region = %peer.region, ?claimed, agreed = ?peer.groups,
                "placement groups are configured otherwise in that region");
        }
        peer
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
        up.answers.close();
        self.parts.receipts.forget(&up.peer.region);
        let mut linked = self.shared.linked.lock();
        if linked.get(&up.peer.region) == Some(&link) {
            linked.remove(&up.peer.region);
            tracing::warn!(region = %up.peer.region, "region not linked any more");
            self.parts.metrics.linked(&up.peer.region, false);
            self.note_linked(&up.peer.region);
        }
        drop(linked);
        self.exchange.link_closed(link);
        self.wanted.link_closed(link);
        self.receipts.link_closed(link);
        self.scrubs.link_closed(link);
        self.replica.link_closed(self.now(), link);
        self.state_keeping();
    }

    fn receive(&mut self, link: LinkId, frame: LinkFrame) {
        let Some(up) = self.links.get(&link) else { return };
        if let LinkFrame::Failed { message } = &frame {
            tracing::warn!(region = %up.peer.region, message, "region ended the link");
            if message == CLONED {
                self.refused_as_clone(link);
            }
            return self.closed(link);
        }
        if let LinkFrame::Pong { sent_ms } = &frame {
            self.sign_of_life(link, *sent_ms);
        }
        let frame = self.receive_scrub(link, frame);
        if let Some(frame) = frame.and_then(|frame| self.receive_exchange(link, frame)) {
            let announces = matches!(frame, LinkFrame::Have { .. });
            self.replica.receive(self.now(), link, frame);
            if announces {
                self.receipts.announced(self.now(), link, &self.replica);
                self.perform_receipts();
            }
        }
    }

    fn send(&self, link: LinkId, frame: LinkFrame) {
        if let Some(up) = self.links.get(&link) {
            up.outgoing.push(frame);
        }
    }

    fn look_after(&mut self) {
        self.refresh_interests();
        self.exchange.expire();
        self.ask_for_wanted();
        self.look_after_siblings();
        self.scrubs.expire();
        let now = self.now();
        let links: Vec<LinkStatus> = self.replica.links().collect();
        let waiting: usize = self.links.values().map(|up| up.outgoing.len()).sum();
        self.parts.metrics.link_frames_waiting.set(waiting as f64);
        let answers: usize = self.links.values().map(|up| up.answers.under_way()).sum();
        self.parts.metrics.link_answers_waiting.set(answers as f64);
        if let Some(events) = self.events.upgrade() {
            let waiting = events.max_capacity() - events.capacity();
            self.parts.metrics.replication_events_waiting.set(waiting as f64);
        }
        self.parts.metrics.origins.set(self.replica.origin_count() as f64);
        let bulk_bytes: usize = self.links.values().map(|up| up.outgoing.bulk_bytes()).sum();
        self.parts.metrics.link_bytes_waiting.set(bulk_bytes as f64);
        for status in &links {
            self.parts.metrics.link(status, self.lag(now, status));
        }
        if self.members_noted.elapsed() >= NOTE_EVERY {
            self.members_noted = Instant::now();
            links.iter().for_each(|status| self.note_linked(&status.region));
        }
        let lags = links.iter().map(|status| self.lag(now, status)).collect();
        let forked = self.replica.forked().collect();
        let missing = self.wanted.documents().collect();
        let fetch = self.replica.fetch_status(now);
        *self.shared.view.lock() =
            View { vector: self.replica.vector(), links, lags, forked, missing, fetch };
        self.note_acknowledgements();
    }

    fn lag(&self, now: Moment, status: &LinkStatus) -> Lag {
        let acknowledged = self.shared.acknowledged.lock();
        let has = |origin| acknowledged.get(&(status.region.clone(), origin)).copied().unwrap_or(Seq(0));
        let groups = self.links.get(&status.link).map(|up| &up.peer.groups);
        Lag {
            ms: status.unacknowledged_since.map_or(0, |since| now.0.saturating_sub(since.0)),
            bytes: groups.map_or(0, |groups| self.log_bytes.lacking(groups, has)),
        }
    }

    /// Has it noted that a region was linked until now.
    fn note_linked(&self, region: &RegionName) {
        let member = self.shared.is_linked_now(region);
        self.parts.metrics.needs_snapshot(region, false);
        let storage = self.parts.storage.clone();
        tokio::spawn(async move {
            // It is said again soon, unless it is not so any more.
            if let Err(error) = storage.note_member(&member).await {
                tracing::warn!(region = %member.region, %error, "link not noted");
            }
        });
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
