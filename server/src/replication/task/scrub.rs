//! Comparing with other regions: answering their questions, and asking them ours.
//!
//! Of a placement group nothing goes to a region outside of it, not even a fingerprint; contents are taken of groups that
//! both regions are in.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::link::{DocumentContents, Fingerprints, LinkFrame};
use isobar_protocol::receipts::Target;
use isobar_protocol::replica::LinkId;
use isobar_protocol::scrub::Cut;
use tokio::sync::{Semaphore, oneshot};

use super::{Task, Up};
use crate::replication::scrub::{raise_stored, take_offered};

/// Requests of other regions that are answered at once; what comes beyond is not answered, and asked again by the next
/// check. Each may read the documents it asks for.
const ANSWERS_MAX: usize = 16;

/// Documents that are taken at once from regions that found something missing here. They send one after the other.
const OFFERS_MAX: usize = 4;

/// Where the numbers of questions begin that checks ask: searches count from 1.
const FIRST_REQUEST: u64 = 1 << 40;

/// Marks contents that nobody asked for.
pub(in crate::replication) const OFFER: u64 = 0;

/// What a check asks the peer.
#[derive(Debug)]
pub(in crate::replication) enum Question {
    Prefix(Vec<u8>),
    Documents(Vec<DocumentId>),
    Positions,
    Contents(DocumentId),
}

impl Question {
    fn frame(self, request: u64) -> LinkFrame {
        match self {
            Self::Prefix(prefix) => LinkFrame::ScrubRequest { request, prefix },
            Self::Documents(documents) => LinkFrame::FingerprintsRequest { request, documents },
            Self::Positions => LinkFrame::PositionsRequest { request },
            Self::Contents(document) => LinkFrame::DocumentRequest { request, document },
        }
    }
}

/// What a check needs of the task.
pub(in crate::replication) enum ScrubCall {
    /// Ask the peer. The answer's sender is dropped when the link closes.
    Ask { link: LinkId, question: Question, answer: oneshot::Sender<LinkFrame> },
    /// How far the logs of the shared groups have been taken in here; nothing while a snapshot is fetched.
    Positions { link: LinkId, answer: oneshot::Sender<Option<Target>> },
    /// Whether both sides have reached a cut.
    IsReached { link: LinkId, cut: Cut, answer: oneshot::Sender<bool> },
    /// Send contents that the peer lacks.
    Offer { link: LinkId, contents: DocumentContents },
}

/// Questions that wait for their answers, and the room for answering.
pub(super) struct Scrubs {
    next_request: u64,
    waiting: HashMap<u64, (LinkId, oneshot::Sender<LinkFrame>)>,
    answering: Arc<Semaphore>,
    taking: Arc<Semaphore>,
}

impl Default for Scrubs {
    fn default() -> Self {
        Self {
            next_request: FIRST_REQUEST,
            waiting: HashMap::new(),
            answering: Arc::new(Semaphore::new(ANSWERS_MAX)),
            taking: Arc::new(Semaphore::new(OFFERS_MAX)),
        }
    }
}

impl Scrubs {
    pub(super) fn link_closed(&mut self, link: LinkId) {
        self.waiting.retain(|_, (of, _)| *of != link);
    }

    /// Forgets questions that nobody waits for any more.
    pub(super) fn expire(&mut self) {
        self.waiting.retain(|_, (_, answer)| !answer.is_closed());
    }
}

impl Task {
    pub(super) fn scrub_call(&mut self, call: ScrubCall) {
        match call {
            ScrubCall::Ask { link, question, answer } => {
                if self.links.contains_key(&link) {
                    self.scrubs.next_request += 1;
                    let request = self.scrubs.next_request;
                    self.scrubs.waiting.insert(request, (link, answer));
                    self.send(link, question.frame(request));
                }
            }
            ScrubCall::Positions { link, answer } => {
                if self.links.contains_key(&link) {
                    let _ = answer.send(self.positions(link));
                }
            }
            ScrubCall::IsReached { link, cut, answer } => {
                if self.links.contains_key(&link) {
                    use isobar_protocol::receipts::Announced;
                    let reached = self.replica.covers(link, &cut.ours) && self.replica.has(&cut.theirs);
                    let _ = answer.send(reached);
                }
            }
            ScrubCall::Offer { link, contents } => {
                // What does not fit through the link would end it.
                let fits = |up: &Up| contents.bytes() <= up.audience.contents_bytes_max;
                if self.links.get(&link).is_some_and(fits) {
                    self.send(link, LinkFrame::DocumentAnswer { request: OFFER, contents: Some(contents) });
                }
            }
        }
    }

    /// Handles a frame that is about a check; gives others back.
    pub(super) fn receive_scrub(&mut self, link: LinkId, frame: LinkFrame) -> Option<LinkFrame> {
        match frame {
            LinkFrame::ScrubRequest { request, prefix } => self.answer_prefix(link, request, prefix),
            LinkFrame::FingerprintsRequest { request, documents } => {
                self.answer_documents(link, request, documents);
            }
            LinkFrame::PositionsRequest { request } => self.answer_positions(link, request),
            LinkFrame::DocumentAnswer { request: OFFER, contents } => self.take_offer(link, contents),
            LinkFrame::ScrubAnswer { request, .. }
            | LinkFrame::PositionsAnswer { request, .. }
            | LinkFrame::DocumentAnswer { request, .. }
                if request > FIRST_REQUEST =>
            {
                self.hand_answer(link, request, frame);
            }
            other => return Some(other),
        }
        None
    }

    fn hand_answer(&mut self, link: LinkId, request: u64, frame: LinkFrame) {
        if self.scrubs.waiting.get(&request).is_some_and(|(of, _)| *of == link)
            && let Some((_, answer)) = self.scrubs.waiting.remove(&request)
        {
            let _ = answer.send(frame);
        }
    }

    /// The groups that both ends of a link are in.
    fn shared_groups(&self, link: LinkId) -> BTreeSet<PlacementGroup> {
        let peer = self.links.get(&link).map(|up| &up.peer.groups);
        peer.map(|theirs| theirs & self.replica.groups()).unwrap_or_default()
    }

    /// How far the logs have been taken in that the peer is to have, as far as is known here.
    fn positions(&self, link: LinkId) -> Option<Target> {
        if self.replica.fetches_snapshot() {
            return None;
        }
        let mut target = self.replica.shared_target(link);
        let groups = self.shared_groups(link);
        // The replica may not have been told yet what documents hold already.
        let own = self.parts.committer.progress();
        let own = own.borrow();
        own.iter().filter(|it| groups.contains(&it.group)).for_each(|it| target.raise(it.origin, it.seq));
        Some(target)
    }

    fn answer_prefix(&self, link: LinkId, request: u64, prefix: Vec<u8>) {
        let Ok(permit) = self.scrubs.answering.clone().try_acquire_owned() else { return };
        let (groups, surveyor) = (self.shared_groups(link), self.parts.surveyor.clone());
        self.spawn_reply(link, async move {
            let _permit = permit;
            // Whoever begins a check wants to see what is stored now; what comes after it is about the same.
            let survey = if prefix.is_empty() { surveyor.fresh().await } else { surveyor.latest().await };
            let survey = survey.inspect_err(|error| tracing::warn!(%error, "documents not surveyed")).ok()?;
            let answer = tokio::task::spawn_blocking(move || survey.answer(&prefix, &groups)).await;
            Some(LinkFrame::ScrubAnswer { request, fingerprints: answer.ok()?? })
        });
    }

    fn answer_documents(&self, link: LinkId, request: u64, documents: Vec<DocumentId>) {
        let Ok(permit) = self.scrubs.answering.clone().try_acquire_owned() else { return };
        let (groups, surveyor) = (self.shared_groups(link), self.parts.surveyor.clone());
        self.spawn_reply(link, async move {
            let _permit = permit;
            let found = surveyor.look_at(&documents, &groups).await;
            let found = found.inspect_err(|error| tracing::warn!(%error, "documents not looked at")).ok()?;
            Some(LinkFrame::ScrubAnswer { request, fingerprints: Fingerprints::Documents(found) })
        });
    }

    fn answer_positions(&self, link: LinkId, request: u64) {
        let (target, groups) = (self.positions(link), self.shared_groups(link));
        let storage = self.parts.storage.clone();
        self.spawn_reply(link, async move {
            let positions = match target {
                None => None,
                Some(mut target) => {
                    raise_stored(&*storage, &groups, &mut target).await.ok()?;
                    Some(target.iter().map(|(origin, seq)| (*origin, *seq)).collect())
                }
            };
            Some(LinkFrame::PositionsAnswer { request, positions })
        });
    }

    /// Takes a document of which another region has found that it is missing here, or a part of it.
    fn take_offer(&self, link: LinkId, contents: Option<DocumentContents>) {
        let Some(up) = self.links.get(&link) else { return };
        let groups = self.shared_groups(link);
        let Some(contents) = contents.filter(|it| groups.contains(&it.group)) else { return };
        let Ok(permit) = self.scrubs.taking.clone().try_acquire_owned() else {
            return tracing::warn!(region = %up.peer.region, "too many documents offered at once");
        };
        let (parts, region) = (self.parts.clone(), up.peer.region.clone());
        tokio::spawn(async move {
            take_offered(&parts, &region, contents).await;
            drop(permit);
        });
    }

    /// Answers when that is ready, unless there is nothing to say.
    fn spawn_reply(&self, link: LinkId, work: impl Future<Output = Option<LinkFrame>> + Send + 'static) {
        let Some(up) = self.links.get(&link) else { return };
        let outgoing = up.outgoing.clone();
        tokio::spawn(async move {
            if let Some(frame) = work.await {
                outgoing.push(frame);
            }
        });
    }
}
