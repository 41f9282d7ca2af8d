//! What the nodes of a region tell each other beside the logs: presence, what no log names, and, through the keeper of the
//! links, what concerns other regions.
//!
//! Everybody tells all siblings; what is for one names it. Nothing is told while there are none, nothing waits for an answer
//! without a deadline, and what finds no room is dropped and counted. What is decided is decided by the state machines in
//! [`interests`](super::interests), [`keeper`](super::keeper) and [`search`](super::search); the keeper's half is
//! `replication/task/siblings`.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use isobar_protocol::config::SNAPSHOT_PAGE_DOCUMENTS_MAX;
use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::link::Standing;
use isobar_protocol::notice::{KnownRegion, Notice, Observation, parts};
use isobar_protocol::replica::Moment;
use parking_lot::Mutex;
use uuid::Uuid;

use super::interests::SiblingInterests;
use super::keeper::{Keeper, Step};
use super::search::{self, Searches};
use crate::commit::Committer;
use crate::documents::Documents;
use crate::outbox::Ephemeral;
use crate::receipts::Receipts;
use crate::replication::{Inbox, SearchOutcome};
use crate::storage::StoredOrigin;
use crate::storage::seat::{Notices, Seat};
use crate::telemetry::Metrics;

mod presence;

/// How often interests and silences are looked after.
const UPKEEP: Duration = Duration::from_millis(500);

/// Documents that wait to be read again because no log names what was stored of them. If there are more, all are read.
const UNLOGGED_MAX: usize = 4_096;

/// What the exchange needs of the node.
#[derive(Clone)]
pub struct Parts {
    pub documents: Arc<Documents>,
    pub committer: Committer,
    pub receipts: Arc<Receipts>,
    pub metrics: Arc<Metrics>,
}

/// See the module.
pub struct Exchange {
    pub(super) parts: Parts,
    notices: Notices,
    siblings: AtomicUsize,
    keeps_links: AtomicBool,
    interests: Mutex<SiblingInterests>,
    /// What other regions want to hear presence of, from this node that keeps the links.
    regions_want: Mutex<Vec<DocumentId>>,
    keeper: Mutex<Keeper>,
    searches: Mutex<Searches>,
    unlogged: Mutex<HashSet<DocumentId>>,
    /// How far logs were followed since the node started.
    followed: Mutex<HashMap<OriginId, (PlacementGroup, Seq)>>,
    /// Where what siblings say to a keeper goes.
    inbox: OnceLock<Inbox>,
    started: Instant,
}

impl Exchange {
    /// The exchange of the node that has this seat.
    pub fn new(seat: &Seat, parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            notices: seat.notices.clone(),
            siblings: AtomicUsize::new(0),
            keeps_links: AtomicBool::new(false),
            interests: Mutex::default(),
            regions_want: Mutex::default(),
            keeper: Mutex::new(Keeper::new(seat.node)),
            searches: Mutex::default(),
            unlogged: Mutex::default(),
            followed: Mutex::default(),
            inbox: OnceLock::new(),
            started: Instant::now(),
        })
    }

    /// Has what siblings say to a keeper handed over there.
    pub(crate) fn set_inbox(&self, inbox: Inbox) {
        let _ = self.inbox.set(inbox);
    }

    fn now(&self) -> Moment {
        Moment(self.started.elapsed().as_millis() as u64)
    }

    /// Whether there is anybody to tell anything.
    pub(crate) fn has_siblings(&self) -> bool {
        self.siblings.load(Ordering::Relaxed) > 0
    }

    fn keeps_links(&self) -> bool {
        self.keeps_links.load(Ordering::SeqCst)
    }

    /// Tells the siblings. Returns false if it was dropped.
    pub(crate) fn tell(&self, notice: &Notice) -> bool {
        let is_heard = self.has_siblings();
        let told = is_heard && self.notices.tell(notice.encode());
        if is_heard {
            self.count_told(told);
        }
        told
    }

    fn count_told(&self, told: bool) {
        let metrics = &self.parts.metrics;
        if told { &metrics.notices_told } else { &metrics.notices_dropped }.increment(1);
    }

    /// Looks after what is due; to be run as a task.
    pub(super) async fn run(self: Arc<Self>) {
        let mut upkeep = tokio::time::interval(UPKEEP);
        upkeep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            upkeep.tick().await;
            let now = self.now();
            self.keeper_says(|keeper| keeper.tick(now));
            if self.has_siblings() {
                self.refresh_interests(now);
            }
        }
    }

    fn refresh_interests(&self, now: Moment) {
        let open = self.parts.documents.subscribed();
        let regions_want = self.regions_want.lock().clone();
        let notices = {
            let mut interests = self.interests.lock();
            interests.expire(now);
            interests.refresh(now, open, regions_want)
        };
        notices.iter().for_each(|notice| {
            self.tell(notice);
        });
    }

    /// Takes what is new of the keeper, and does what follows from it before anything else becomes known of it.
    fn keeper_says(&self, news: impl FnOnce(&mut Keeper) -> Vec<Step>) {
        let mut keeper = self.keeper.lock();
        self.perform(news(&mut keeper));
    }

    fn perform(&self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Forget(region) => self.parts.receipts.forget(&region),
                Step::ObserveAnew => self.parts.receipts.look_anew(),
            }
        }
    }
}

/// What happens to the seat.
impl Exchange {
    pub(super) fn siblings_are(&self, count: usize) {
        let former = self.siblings.swap(count, Ordering::Relaxed);
        if count > former {
            self.interests.lock().restate_soon();
        }
        if count == 0 {
            self.interests.lock().forget_all();
        }
    }

    /// Notices may have been missed.
    pub(super) fn resumed(&self) {
        self.interests.lock().restate_soon();
        self.keeper_says(Keeper::lose);
    }

    /// This node keeps the region's links from now on, or does not any more.
    pub(super) fn keeps_links_is(&self, keeps: bool) {
        self.keeps_links.store(keeps, Ordering::SeqCst);
        self.keeper_says(Keeper::lose);
    }

    /// A sibling has told something other than that it has appended.
    pub(super) fn hear(self: &Arc<Self>, by: Uuid, notice: Notice) {
        let now = self.now();
        match notice {
            Notice::Interest { scope, anew, add, remove } => {
                self.interests.lock().received(now, by, scope, anew, (add, &remove));
            }
            Notice::Presence { from_region, group, document, sender, session, count, data } => {
                let message = Ephemeral { sender, document, session, count, data };
                self.hear_presence(from_region, &group, message);
            }
            Notice::Search { .. } | Notice::Observed { .. } => {
                if let Some(inbox) = self.inbox.get().filter(|_| self.keeps_links()) {
                    inbox.hear(by, notice);
                }
            }
            Notice::Keeping { regions, observers } if !self.keeps_links() => {
                self.keeper_says(|keeper| keeper.stated(now, by, regions, &observers));
            }
            Notice::Searching { node, request } if node == self.node() => {
                self.searches.lock().goes_on(request);
            }
            Notice::Searched { node, request, outcome } if node == self.node() => {
                self.searched(request, outcome);
            }
            Notice::Reached { node, epoch, region, storage_id, link, documents } if node == self.node() => {
                // As long as it is locked nobody finds that the link has ended.
                let mut keeper = self.keeper.lock();
                let Some(steps) = keeper.reached(by, epoch, &region, link) else { return };
                self.perform(steps);
                for (document, heads) in documents {
                    self.parts.receipts.reached(&document, &region, &storage_id, heads);
                }
            }
            Notice::Appended
            | Notice::Stored { .. }
            | Notice::Keeping { .. }
            | Notice::Searching { .. }
            | Notice::Searched { .. }
            | Notice::Reached { .. } => {}
        }
    }

    fn node(&self) -> Uuid {
        self.keeper.lock().node()
    }
}

/// What siblings have stored.
impl Exchange {
    /// What an origin's log says up to there is about to be taken by documents.
    pub(super) fn note_followed(&self, origin: &StoredOrigin, last: Seq) {
        self.followed.lock().insert(origin.id, (origin.group.clone(), last));
    }

    /// How far the logs of a group were followed: what documents hold by them is at most that.
    pub(crate) fn followed(&self, group: &PlacementGroup) -> Vec<(OriginId, Seq)> {
        let followed = self.followed.lock();
        let of_group = followed.iter().filter(|(_, (of, _))| of == group);
        of_group.map(|(origin, (_, seq))| (*origin, *seq)).collect()
    }

    /// Contents of these documents were stored here that no log here need name.
    pub(crate) fn stored(&self, documents: Vec<DocumentId>) {
        if !self.has_siblings() {
            return;
        }
        for documents in parts(documents, |it| it.as_bytes().len() + 1) {
            for documents in documents.chunks(SNAPSHOT_PAGE_DOCUMENTS_MAX) {
                self.tell(&Notice::Stored { documents: documents.to_vec() });
            }
        }
    }

    /// Has documents read again. Returns false if they are too many: then all have to be.
    pub(super) fn note_unlogged(&self, documents: Vec<DocumentId>) -> bool {
        let mut unlogged = self.unlogged.lock();
        unlogged.extend(documents);
        let is_in_bounds = unlogged.len() <= UNLOGGED_MAX;
        if !is_in_bounds {
            unlogged.clear();
        }
        is_in_bounds
    }

    pub(super) fn take_unlogged(&self) -> HashSet<DocumentId> {
        std::mem::take(&mut self.unlogged.lock())
    }
}

/// What this node asks of the keeper.
impl Exchange {
    /// The regions that a keeper has named since the node started, and how they are linked to it.
    pub(crate) fn regions(&self) -> Vec<KnownRegion> {
        self.keeper.lock().regions().cloned().collect()
    }

    /// Whether the keeper has a link to any region.
    pub(crate) fn is_keeper_linked(&self) -> bool {
        self.keeper.lock().is_linked()
    }

    /// Has the keeper look for a document, which is read here when it is stored.
    pub(crate) async fn search(&self, document: &DocumentId, group: PlacementGroup) -> SearchOutcome {
        let joined = self.searches.lock().join(document, &group);
        let Some((request, is_new, heard)) = joined else { return SearchOutcome::Absent };
        if is_new {
            self.tell(&Notice::Search { request, group, document: document.clone() });
        }
        match search::outcome(heard).await {
            Some(outcome) => outcome,
            None => {
                self.searches.lock().settle(request, SearchOutcome::Absent);
                SearchOutcome::Absent
            }
        }
    }

    fn searched(self: &Arc<Self>, request: u64, outcome: Standing) {
        let outcome = match outcome {
            Standing::Here => SearchOutcome::Found,
            Standing::Elsewhere { urls } => SearchOutcome::Elsewhere { urls },
            Standing::Absent | Standing::Deleted => SearchOutcome::Absent,
        };
        let document = self.searches.lock().document(request).cloned();
        let Some(document) = document.filter(|_| outcome == SearchOutcome::Found) else {
            return self.searches.lock().settle(request, outcome);
        };
        let exchange = self.clone();
        tokio::spawn(async move {
            let Parts { documents, committer, .. } = &exchange.parts;
            if let Err(error) = documents.refresh(&document, committer).await {
                tracing::warn!(%document, %error, "document not refreshed");
            }
            exchange.searches.lock().settle(request, outcome);
        });
    }

    /// Tells the keeper what followed documents hold, and which are followed no more.
    pub(crate) fn observe(&self, observed: Vec<Observation>, left: Vec<DocumentId>) {
        let observed = if self.parts.documents.is_applying() {
            // Changes of a run may be among the heads that is not in its log yet, where the keeper looks.
            observed.iter().for_each(|it| self.parts.receipts.moved(&it.document));
            Vec::new()
        } else {
            observed
        };
        let observed = parts(observed, Observation::weight).into_iter().map(|it| (it, Vec::new()));
        let left = parts(left, |it| it.as_bytes().len() + 1).into_iter().map(|it| (Vec::new(), it));
        for (observed, left) in left.chain(observed).filter(|it| !it.0.is_empty() || !it.1.is_empty()) {
            let next = self.keeper.lock().next_observation();
            let Some((epoch, number)) = next else { return };
            // If it is dropped, the keeper's next statements show it.
            self.tell(&Notice::Observed { epoch, number, observed, left });
        }
    }
}
