//! What regions ask each other beside the log: where a document is, all of one, presence.
//!
//! A search asks every linked region whether it has a document that is not here, and fetches it from the first that does:
//! its log entries may stand behind a backlog. Which regions get a document's presence is the core's to say
//! ([`isobar_protocol::interest`]).
//!
//! Nothing of a placement group goes to a region outside of it, nor is it taken from one: not contents, not presence, not ids of
//! documents whose group is known here. Of a document that is asked for by its id, the asker is only told that it is elsewhere,
//! and where.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use isobar_protocol::config::{ELSEWHERE_URLS_MAX, PRESENCE_DATA_BYTES_MAX};
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::interest::Interests;
use isobar_protocol::link::{LinkFrame, Standing};
use isobar_protocol::replica::LinkId;
use tokio::sync::oneshot;

use super::Task;
use crate::outbox::Ephemeral;
use crate::replication::{Event, SearchOutcome, snapshot};

/// How long regions are given to say whether they have a document.
const FIND_PATIENCE: Duration = Duration::from_millis(1_500);

/// How long fetching one may take.
const FETCH_PATIENCE: Duration = Duration::from_secs(15);

/// Searches at the same time. More are answered with "not found": the document is sent when its log entries come.
const SEARCHES_MAX: usize = 1_024;

/// A document that is looked for.
struct Search {
    document: DocumentId,
    /// Only regions of this group are asked.
    group: PlacementGroup,
    /// Addresses of regions that hold it, from those that may not send it.
    elsewhere: Option<BTreeSet<String>>,
    /// Regions that have not answered yet.
    asked: HashSet<LinkId>,
    fetching: Option<LinkId>,
    until: Instant,
    waiting: Vec<oneshot::Sender<SearchOutcome>>,
}

impl Search {
    /// What is known if nobody sends it.
    fn outcome(&self) -> SearchOutcome {
        match &self.elsewhere {
            None => SearchOutcome::Absent,
            Some(urls) => SearchOutcome::Elsewhere { urls: urls.iter().cloned().collect() },
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Exchange {
    next_request: u64,
    searches: HashMap<u64, Search>,
    interests: Interests,
}

impl Exchange {
    /// Ends a search.
    pub(super) fn settle(&mut self, request: u64, outcome: &SearchOutcome) {
        if let Some(search) = self.searches.remove(&request) {
            for waiting in search.waiting {
                let _ = waiting.send(outcome.clone());
            }
        }
    }

    /// A number for a question that is not a search's.
    pub(super) fn new_request(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request
    }

    /// Ends a search that nobody answered with the document.
    pub(super) fn give_up(&mut self, request: u64) {
        if let Some(search) = self.searches.get(&request) {
            let outcome = search.outcome();
            self.settle(request, &outcome);
        }
    }

    /// Ends the searches that have taken too long.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        let expired: Vec<u64> =
            self.searches.iter().filter(|(_, it)| it.until <= now).map(|(request, _)| *request).collect();
        expired.into_iter().for_each(|request| self.give_up(request));
    }

    pub(super) fn link_closed(&mut self, link: LinkId) {
        self.interests.link_closed(link);
        // Nothing is given up here: another link to the region may be about to take the place of this one.
        for search in self.searches.values_mut() {
            search.asked.remove(&link);
            if search.fetching == Some(link) {
                search.fetching = None;
                search.until = Instant::now() + FIND_PATIENCE;
            }
        }
    }
}

impl Task {
    /// Handles a frame that is not about the log; gives others back.
    pub(super) fn receive_exchange(&mut self, link: LinkId, frame: LinkFrame) -> Option<LinkFrame> {
        match frame {
            LinkFrame::Find { request, document } => self.answer_find(link, request, document),
            LinkFrame::Found { request, standing } => self.found(link, request, standing),
            LinkFrame::DocumentRequest { request, document } => self.answer_request(link, request, document),
            LinkFrame::DocumentAnswer { request, contents } => self.fetched(link, request, contents),
            LinkFrame::Interest { add, remove } => self.note_interest(link, add, &remove),
            LinkFrame::Presence { document, sender, session, count, data } => {
                self.receive_presence(link, Ephemeral { sender, document, session, count, data });
            }
            LinkFrame::HeadsRequest { request, document, heads } => {
                self.answer_heads(link, request, document, heads);
            }
            LinkFrame::HeadsAnswer { request, has } => self.heads_answered(link, request, has),
            other => return Some(other),
        }
        None
    }

    /// Whether the region at the other end of a link is in a group.
    fn is_member(&self, link: LinkId, group: &PlacementGroup) -> bool {
        self.links.get(&link).is_some_and(|up| up.peer.groups.contains(group))
    }

    fn receive_presence(&self, link: LinkId, message: Ephemeral) {
        let siblings = &self.parts.exchange;
        let document = self.parts.documents.resident(&message.document);
        let group = document.as_ref().and_then(|document| document.settled_group());
        let Some(group) = group.or_else(|| siblings.group_of(&message.document)) else { return };
        if !self.exchange.interests.is_welcome(link, &group) {
            return;
        }
        let message = Arc::new(message);
        if let Some(document) = document {
            let Some(dropped) = document.relay(None, &message) else { return };
            self.parts.metrics.lossy_dropped.increment(dropped);
        }
        siblings.relay_from_region(&group, &message);
    }

    pub(super) fn search(
        &mut self,
        document: DocumentId,
        group: PlacementGroup,
        found: oneshot::Sender<SearchOutcome>,
    ) {
        let asked: HashSet<LinkId> =
            self.links.keys().copied().filter(|link| self.is_member(*link, &group)).collect();
        let exchange = &mut self.exchange;
        let same = exchange.searches.values_mut().find(|it| it.document == document && it.group == group);
        if let Some(search) = same {
            return search.waiting.push(found);
        }
        if asked.is_empty() || exchange.searches.len() >= SEARCHES_MAX {
            let _ = found.send(SearchOutcome::Absent);
            return;
        }
        exchange.next_request += 1;
        let request = exchange.next_request;
        for link in &asked {
            self.send(*link, LinkFrame::Find { request, document: document.clone() });
        }
        let search = Search {
            document,
            group,
            elsewhere: None,
            asked,
            fetching: None,
            until: Instant::now() + FIND_PATIENCE,
            waiting: vec![found],
        };
        self.exchange.searches.insert(request, search);
    }

    fn answer_find(&self, link: LinkId, request: u64, document: DocumentId) {
        let Some(up) = self.links.get(&link) else { return };
        let groups = up.peer.groups.clone();
        let (parts, shared) = (self.parts.clone(), self.shared.clone());
        let refusal = LinkFrame::Found { request, standing: Standing::Absent };
        let has_place = up.answers.answer(refusal, async move {
            let standing = match snapshot::standing(&parts, &document, &groups).await {
                snapshot::Found::Standing(standing) => standing,
                snapshot::Found::Outside(group) => {
                    let known = shared.known.lock();
                    let members = known.values().filter(|peer| peer.groups.contains(&group));
                    let others = members.filter_map(|peer| peer.client_url.clone());
                    let urls = parts.advertise.iter().cloned().chain(others);
                    Standing::Elsewhere { urls: urls.take(ELSEWHERE_URLS_MAX).collect() }
                }
            };
            LinkFrame::Found { request, standing }
        });
        self.parts.metrics.link_answers_refused.increment(u64::from(!has_place));
    }

    fn found(&mut self, link: LinkId, request: u64, standing: Standing) {
        let Some(search) = self.exchange.searches.get_mut(&request) else { return };
        if !search.asked.remove(&link) {
            return;
        }
        match standing {
            Standing::Here | Standing::Deleted if search.fetching.is_none() => {
                search.fetching = Some(link);
                search.until = Instant::now() + FETCH_PATIENCE;
                let document = search.document.clone();
                return self.send(link, LinkFrame::DocumentRequest { request, document });
            }
            Standing::Elsewhere { urls } => {
                let known = search.elsewhere.get_or_insert_default();
                let room = ELSEWHERE_URLS_MAX.saturating_sub(known.len());
                known.extend(urls.into_iter().take(room));
            }
            Standing::Here | Standing::Deleted | Standing::Absent => {}
        }
        if search.asked.is_empty() && search.fetching.is_none() {
            self.exchange.give_up(request);
        }
    }

    fn answer_request(&self, link: LinkId, request: u64, document: DocumentId) {
        let Some(up) = self.links.get(&link) else { return };
        let audience = up.audience.clone();
        let parts = self.parts.clone();
        let refusal = LinkFrame::DocumentAnswer { request, contents: None };
        let has_place = up.answers.answer_document(refusal, async move {
            let contents = snapshot::contents(&parts, &document, &audience).await;
            LinkFrame::DocumentAnswer { request, contents }
        });
        self.parts.metrics.link_answers_refused.increment(u64::from(!has_place));
    }

    fn fetched(
        &mut self,
        link: LinkId,
        request: u64,
        contents: Option<isobar_protocol::link::DocumentContents>,
    ) {
        if self.wanted.is_asked(link, request) {
            return self.wanted_answered(link, request, contents);
        }
        let Some(search) = self.exchange.searches.get(&request) else { return };
        if search.fetching != Some(link) {
            return;
        }
        // It must be the document that was asked for: a page may hold others, an answer may not.
        // And of a group that both regions are in.
        let is_shared =
            |group: &PlacementGroup| self.replica.groups().contains(group) && self.is_member(link, group);
        let wanted = search.document.clone();
        let Some(contents) = contents.filter(|it| it.document == wanted && is_shared(&it.group)) else {
            return self.exchange.give_up(request);
        };
        let parts = self.parts.clone();
        self.spawn(
            async move { Event::Fetched { request, stored: snapshot::store(&parts, contents).await } },
        );
    }

    /// Tells the other regions what sessions of this node and its siblings have opened, and what none has open any more; and the
    /// siblings what other regions have.
    pub(super) fn refresh_interests(&mut self) {
        let mut open = self.parts.documents.subscribed();
        open.extend(self.parts.exchange.open_at_siblings());
        self.parts.metrics.presence_documents.set(open.len() as f64);
        let now = self.now();
        let news = self.exchange.interests.refresh(now, open);
        news.into_iter().for_each(|(link, frame)| self.send(link, frame));
        let wanted: BTreeSet<&DocumentId> =
            self.exchange.interests.wanted_by_peers().map(|(document, _)| document).collect();
        self.parts.exchange.regions_want(wanted.into_iter().cloned().collect());
    }

    /// Has a new link's region take part in the searches that are under way.
    pub(super) fn offer_searches(&mut self, link: LinkId) {
        let groups = self.links.get(&link).map(|up| up.peer.groups.clone()).unwrap_or_default();
        let mut frames = Vec::new();
        for (request, search) in &mut self.exchange.searches {
            if groups.contains(&search.group) && search.fetching.is_none() {
                search.asked.insert(link);
                frames.push(LinkFrame::Find { request: *request, document: search.document.clone() });
            }
        }
        frames.into_iter().for_each(|frame| self.send(link, frame));
    }

    /// Tells a new link of all that is wanted of its groups.
    pub(super) fn offer_interests(&mut self, link: LinkId) {
        let Some(up) = self.links.get(&link) else { return };
        let frame = self.exchange.interests.link_opened(link, up.peer.groups.clone());
        self.send(link, frame);
    }

    fn note_interest(&mut self, link: LinkId, add: Vec<DocumentId>, remove: &[DocumentId]) {
        self.exchange.interests.received(link, add, remove);
        self.note_whether_presence_is_wanted();
    }

    fn note_whether_presence_is_wanted(&self) {
        let wanted = self.exchange.interests.is_anything_wanted();
        self.shared.presence_wanted.store(wanted, Ordering::Relaxed);
    }

    pub(super) fn relay_presence(&self, group: &PlacementGroup, message: &Ephemeral) {
        if message.data.len() > PRESENCE_DATA_BYTES_MAX {
            return self.parts.metrics.lossy_dropped.increment(1);
        }
        let recipients = self.exchange.interests.recipients(&message.document, group);
        for up in recipients.filter_map(|link| self.links.get(&link)) {
            let dropped = up.outgoing.push_presence(LinkFrame::Presence {
                document: message.document.clone(),
                sender: message.sender.clone(),
                session: message.session.clone(),
                count: message.count,
                data: message.data.clone(),
            });
            self.parts.metrics.lossy_dropped.increment(u64::from(dropped));
        }
    }
}
