//! Receipts: which other regions hold a document up to which heads.
//!
//! Nothing is sent for each change. A region says how far it has every log anyway, and what is here of a document is
//! in the logs, so a peer that has the logs as far as they may concern the document has the document. What cannot be told from the
//! logs is asked, once: a few bytes for each document that somebody wants receipts of.
//!
//! # Why a receipt is true
//!
//! A [`Checkpoint`] is a document's durable heads, and a [`Target`] that is read *after* them: how far every log of the
//! document's group has been taken in here, committed or not. Changes reach a document in three ways:
//!
//! 1. from a client of this node: they stand in the node's own log, durable no later than in the document;
//! 2. with a run of another log: the target counts the run from the moment at which it was handed over to be stored, or was
//!    found in the database where another node of the region had stored it, before any of its changes is in the document;
//! 3. otherwise — loaded from storage, or fetched whole by a search or a snapshot. Which logs name them is not known, and these
//!    may be ahead of everything here.
//!
//! So a peer that has announced, on its present link, everything of a target has all changes of the first two kinds. For those
//! of the third the document has a *baseline*: a number that is new whenever changes came in that way. The peer is asked whether
//! it has some heads that were taken under the baseline; if it says so, it has everything that ever came in the third way
//! under that number, and from then on its log positions are enough. A document that began with nothing needs no question
//! ([`Baseline::NOTHING`]). Changes that are waiting for a dependency are in no heads yet and may come to be later, so
//! heads that were taken with some waiting prove nothing beyond themselves ([`Checkpoint::is_closed`]).
//!
//! # Several nodes
//!
//! The nodes of a region that share its database have each its own order of a document's changes and its own baselines, so
//! what one of them observes says nothing of another: all state is kept by [`Subject`]. Of a sibling's observation the same
//! must hold: the target is read after the sibling's heads and counts the sibling's own log, and every run that brought
//! it changes, as the database has them by then.
//!
//! # Links
//!
//! What a peer has announced or answered counts for its link only: a region that was restored from an older copy comes back
//! on a new one, and is asked anew. Regions outside of the document's group are not looked at. A region that is down delays
//! nobody's receipts but its own.
//!
//! # Bounds
//!
//! State is in proportion to followed documents, each counted for every node that follows it, times links; questions under
//! way are at most [`RECEIPT_QUESTIONS_MAX`] on a link.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;

use crate::config::{
    RECEIPT_ANSWER_PATIENCE_MS, RECEIPT_ASK_AGAIN_MS, RECEIPT_LOOK_EVERY_MS, RECEIPT_QUESTIONS_MAX,
};
use crate::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, Seq};
use crate::planted::{self, Fault};
use crate::replica::{LinkId, Moment};

/// How far the logs of a group have been taken in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target(BTreeMap<OriginId, Seq>);

impl Target {
    /// Raises one log's position.
    pub fn raise(&mut self, origin: OriginId, seq: Seq) {
        let known = self.0.entry(origin).or_insert(seq);
        *known = seq.max(*known);
    }

    /// Raises every log's position to the other target's.
    pub fn raise_all(&mut self, other: &Self) {
        other.iter().for_each(|(origin, seq)| self.raise(*origin, *seq));
    }

    pub fn iter(&self) -> impl Iterator<Item = (&OriginId, &Seq)> {
        self.0.iter()
    }
}

/// Who knows what peers have announced on their present links.
pub trait Announced {
    /// Whether the peer of a link has everything up to the target.
    fn covers(&self, link: LinkId, target: &Target) -> bool;
}

/// Stands for all that came into a document otherwise than with a log's run or from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Baseline(pub u64);

impl Baseline {
    /// Nothing did: the document began empty here.
    pub const NOTHING: Self = Self(0);
}

/// A node of this region that has documents observed for its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Observer(pub Uuid);

impl Observer {
    /// The node that keeps the links itself.
    pub const HERE: Self = Self(Uuid::nil());
}

/// A document, as one node of this region has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub document: DocumentId,
    pub observer: Observer,
}

impl Subject {
    /// A document at the node that keeps the links.
    pub fn here(document: DocumentId) -> Self {
        Self { document, observer: Observer::HERE }
    }
}

/// What a document holds at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub baseline: Baseline,
    /// Durable here. Never empty.
    pub heads: Vec<ChangeHash>,
    /// No change was waiting for a dependency.
    pub is_closed: bool,
    /// Read after the heads.
    pub target: Arc<Target>,
}

/// What the caller is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Ask the peer whether all of these heads are durable there; the answer goes to [`Receipts::answered`].
    Ask { link: LinkId, request: u64, document: DocumentId, heads: Vec<ChangeHash> },
    /// The peer of this link has the document up to these heads.
    Reached { link: LinkId, subject: Subject, heads: Vec<ChangeHash> },
}

/// A followed document.
#[derive(Debug)]
struct Followed {
    group: PlacementGroup,
    number: u64,
    latest: Arc<Checkpoint>,
}

/// A checkpoint with its number; later ones have larger numbers, and targets that are nowhere smaller.
#[derive(Debug, Clone)]
struct Numbered {
    number: u64,
    checkpoint: Arc<Checkpoint>,
}

/// How the peer of a link stands to a document.
#[derive(Debug)]
struct Standing {
    /// The number of the last checkpoint that it reached.
    reached: u64,
    /// The baseline that it holds for certain.
    confirmed: Option<Baseline>,
    /// Waits for the logs to get there. Stands in the link's `waiting`.
    awaited: Option<Numbered>,
    question: Question,
    /// Whether the last answer was no: then the logs must get there before it is asked again, or time pass.
    denied: bool,
    /// When it is asked in any case, if the logs do not get there before.
    ask_again_at: Moment,
}

impl Standing {
    fn new() -> Self {
        Self {
            reached: 0,
            confirmed: None,
            awaited: None,
            question: Question::None,
            denied: false,
            ask_again_at: Moment(0),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    None,
    /// Stands in the link's `to_ask`.
    Due,
    Asked,
}

#[derive(Debug)]
struct Asked {
    subject: Subject,
    asked: Numbered,
    until: Moment,
}

#[derive(Debug)]
struct Link {
    groups: BTreeSet<PlacementGroup>,
    standings: BTreeMap<Subject, Standing>,
    /// By the number of what is awaited, so that the first is the one whose target is nearest.
    waiting: BTreeMap<PlacementGroup, BTreeSet<(u64, Subject)>>,
    /// The peer's logs are far enough and it denied what was asked: only time tells.
    denied: BTreeSet<Subject>,
    to_ask: BTreeSet<Subject>,
    asked: BTreeMap<u64, Asked>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Receipts {
    followed: BTreeMap<Subject, Followed>,
    links: BTreeMap<LinkId, Link>,
    last_number: u64,
    last_request: u64,
    look_at: Option<Moment>,
    effects: Vec<Effect>,
}

impl Receipts {
    /// What is to be done now. To be called after every other call.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// A link is up to a region of these groups.
    pub fn link_opened(
        &mut self,
        now: Moment,
        link: LinkId,
        groups: BTreeSet<PlacementGroup>,
        announced: &impl Announced,
    ) {
        let opened = Link {
            groups,
            standings: BTreeMap::new(),
            waiting: BTreeMap::new(),
            denied: BTreeSet::new(),
            to_ask: BTreeSet::new(),
            asked: BTreeMap::new(),
        };
        self.links.insert(link, opened);
        let subjects: Vec<Subject> = self.followed.keys().cloned().collect();
        subjects.iter().for_each(|subject| self.consider(now, link, subject, announced));
        self.ask(now, link);
    }

    /// A link is gone, and with it all that was known of its peer.
    pub fn link_closed(&mut self, link: LinkId) {
        self.links.remove(&link);
    }

    /// Somebody wants receipts of a document, or it has moved on. The targets of a group must not go back from one call to
    /// the next.
    pub fn observe(
        &mut self,
        now: Moment,
        subject: Subject,
        group: PlacementGroup,
        checkpoint: Checkpoint,
        announced: &impl Announced,
    ) {
        let is_known = self.followed.get(&subject).is_some_and(|followed| {
            let Checkpoint { baseline, heads, is_closed, .. } = &*followed.latest;
            (baseline, heads, is_closed) == (&checkpoint.baseline, &checkpoint.heads, &checkpoint.is_closed)
        });
        if !is_known {
            self.last_number += 1;
            let latest = Arc::new(checkpoint);
            self.followed.insert(subject.clone(), Followed { group, number: self.last_number, latest });
        }
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.consider(now, link, &subject, announced);
            self.ask(now, link);
        }
    }

    /// Nobody wants receipts of a document any more.
    pub fn forget(&mut self, subject: &Subject) {
        let Some(followed) = self.followed.remove(subject) else { return };
        for link in self.links.values_mut() {
            let Some(standing) = link.standings.remove(subject) else { continue };
            link.to_ask.remove(subject);
            link.denied.remove(subject);
            if let (Some(awaited), Some(waiting)) = (standing.awaited, link.waiting.get_mut(&followed.group))
            {
                waiting.remove(&(awaited.number, subject.clone()));
            }
        }
    }

    /// The peer of a link has announced something.
    pub fn announced(&mut self, now: Moment, link: LinkId, announced: &impl Announced) {
        let Some(known) = self.links.get(&link) else { return };
        let groups: Vec<PlacementGroup> = known.waiting.keys().cloned().collect();
        for group in groups {
            while let Some((subject, awaited)) = self.next_covered(link, &group, announced) {
                let standing = self.standing(link, &subject);
                if standing.confirmed == Some(awaited.checkpoint.baseline) || is_bare(&awaited.checkpoint) {
                    self.reach(link, &subject, &awaited);
                }
                // What was denied may be there by now.
                self.standing(link, &subject).denied = false;
                self.consider(now, link, &subject, announced);
            }
        }
        self.ask(now, link);
    }

    /// Takes out the first document of a group that waits for no more than what was announced.
    fn next_covered(
        &mut self,
        link: LinkId,
        group: &PlacementGroup,
        announced: &impl Announced,
    ) -> Option<(Subject, Numbered)> {
        let known = self.links.get_mut(&link)?;
        let waiting = known.waiting.get_mut(group)?;
        let (_, subject) = waiting.first()?;
        let standing = known.standings.get_mut(subject)?;
        let awaited = standing.awaited.take_if(|it| announced.covers(link, &it.checkpoint.target))?;
        let (_, subject) = waiting.pop_first()?;
        Some((subject, awaited))
    }

    /// A node does not observe anything any more.
    pub fn forget_observer(&mut self, observer: Observer) {
        let all = self.followed.keys().filter(|subject| subject.observer == observer);
        let all: Vec<Subject> = all.cloned().collect();
        all.iter().for_each(|subject| self.forget(subject));
    }

    /// The peer's answer to a question.
    pub fn answered(
        &mut self,
        now: Moment,
        link: LinkId,
        request: u64,
        has: bool,
        announced: &impl Announced,
    ) {
        let Some(known) = self.links.get_mut(&link) else { return };
        let Some(Asked { subject, asked, .. }) = known.asked.remove(&request) else { return };
        // The document may have been given up, and even taken up again, since.
        if let Some(standing) = known.standings.get_mut(&subject) {
            standing.question = Question::None;
            standing.denied = !has;
            standing.ask_again_at = Moment(now.0 + RECEIPT_ASK_AGAIN_MS);
            if has && asked.checkpoint.is_closed {
                standing.confirmed = Some(asked.checkpoint.baseline);
            }
            if has {
                self.reach(link, &subject, &asked);
            }
            self.consider(now, link, &subject, announced);
        }
        self.ask(now, link);
    }

    /// Time has passed: to be called now and then.
    pub fn tick(&mut self, now: Moment, announced: &impl Announced) {
        if self.look_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_at = Some(Moment(now.0 + RECEIPT_LOOK_EVERY_MS));
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            let known = &self.links[&link];
            let late = known.asked.iter().filter(|(_, asked)| asked.until <= now);
            let late: Vec<u64> = late.map(|(request, _)| *request).collect();
            late.into_iter().for_each(|request| self.answered(now, link, request, false, announced));
            let known = &self.links[&link];
            let waiting = known.waiting.values().flatten().map(|(_, subject)| subject);
            let unsettled: Vec<Subject> = waiting.chain(&known.denied).cloned().collect();
            for subject in unsettled {
                if self.standing(link, &subject).ask_again_at <= now {
                    self.want_answer(link, &subject);
                }
            }
            self.ask(now, link);
        }
    }

    fn standing(&mut self, link: LinkId, subject: &Subject) -> &mut Standing {
        let known = self.links.get_mut(&link).expect("whoever asks has seen the link");
        known.standings.entry(subject.clone()).or_insert_with(Standing::new)
    }

    /// Looks whether the peer of a link has a document's latest checkpoint, and what to wait for if not.
    fn consider(&mut self, now: Moment, link: LinkId, subject: &Subject, announced: &impl Announced) {
        let Some(followed) = self.followed.get(subject) else { return };
        let latest = Numbered { number: followed.number, checkpoint: followed.latest.clone() };
        let group = followed.group.clone();
        if !self.links.get(&link).is_some_and(|known| known.groups.contains(&group)) {
            return;
        }
        let standing = self.standing(link, subject);
        if standing.reached >= latest.number {
            return;
        }
        let is_confirmed =
            standing.confirmed == Some(latest.checkpoint.baseline) || is_bare(&latest.checkpoint);
        let is_denied = standing.denied;
        match announced.covers(link, &latest.checkpoint.target) {
            true if is_confirmed => self.reach(link, subject, &latest),
            _ if !is_confirmed && !is_denied => self.want_answer(link, subject),
            true => {
                let known = self.links.get_mut(&link).expect("it was there a moment ago");
                known.denied.insert(subject.clone());
            }
            false => self.await_logs(now, link, subject, &group, latest),
        }
    }

    /// Has a document wait until the peer's logs are as far as the checkpoint calls for, unless it waits for an earlier one.
    fn await_logs(
        &mut self,
        now: Moment,
        link: LinkId,
        subject: &Subject,
        group: &PlacementGroup,
        checkpoint: Numbered,
    ) {
        let standing = self.standing(link, subject);
        if standing.awaited.is_some() {
            return;
        }
        let number = checkpoint.number;
        standing.awaited = Some(checkpoint);
        // The logs get there by themselves; it is asked only if that takes long.
        standing.ask_again_at = Moment(now.0 + RECEIPT_ASK_AGAIN_MS);
        let known = self.links.get_mut(&link).expect("it was there a moment ago");
        known.waiting.entry(group.clone()).or_default().insert((number, subject.clone()));
    }

    fn want_answer(&mut self, link: LinkId, subject: &Subject) {
        let standing = self.standing(link, subject);
        if standing.question == Question::None {
            standing.question = Question::Due;
            let known = self.links.get_mut(&link).expect("it was there a moment ago");
            known.denied.remove(subject);
            known.to_ask.insert(subject.clone());
        }
    }

    /// Asks as many of the due questions as may be under way.
    fn ask(&mut self, now: Moment, link: LinkId) {
        let Some(known) = self.links.get_mut(&link) else { return };
        while known.asked.len() < RECEIPT_QUESTIONS_MAX
            && let Some(subject) = known.to_ask.pop_first()
        {
            let (Some(followed), Some(standing)) =
                (self.followed.get(&subject), known.standings.get_mut(&subject))
            else {
                continue;
            };
            standing.question = Question::Asked;
            self.last_request += 1;
            let asked = Numbered { number: followed.number, checkpoint: followed.latest.clone() };
            let heads = asked.checkpoint.heads.clone();
            let until = Moment(now.0 + RECEIPT_ANSWER_PATIENCE_MS);
            let document = subject.document.clone();
            known.asked.insert(self.last_request, Asked { subject, asked, until });
            self.effects.push(Effect::Ask { link, request: self.last_request, document, heads });
        }
    }

    fn reach(&mut self, link: LinkId, subject: &Subject, reached: &Numbered) {
        let standing = self.standing(link, subject);
        if reached.number > standing.reached {
            standing.reached = reached.number;
            let heads = reached.checkpoint.heads.clone();
            self.effects.push(Effect::Reached { link, subject: subject.clone(), heads });
        }
        let standing = self.standing(link, subject);
        // What is awaited and older is reached with it.
        if let Some(awaited) = standing.awaited.take_if(|it| it.number <= reached.number) {
            let number = awaited.number;
            let known = self.links.get_mut(&link).expect("it was there a moment ago");
            known.waiting.values_mut().for_each(|waiting| {
                waiting.remove(&(number, subject.clone()));
            });
        }
    }
}

/// Whether all of it came from clients and with runs.
fn is_bare(checkpoint: &Checkpoint) -> bool {
    checkpoint.baseline == Baseline::NOTHING || planted::is(Fault::ReceiptUnasked)
}

#[cfg(test)]
mod tests;
