//! Receiving: announcements, entries, and what became of those that were handed over.

use bytes::Bytes;

use super::{Effect, LinkId, Moment, Origin, ReceivedRun, Replica, Stored, agree};
use crate::config::{Limits, RENEW_PATIENCE_MS};
use crate::ids::{DocumentId, OriginId, Seq};
use crate::link::Progress;
use crate::log::{Chain, Content, Entry, Opened, encode_run, open_run};
use crate::planted::{self, Fault};

impl Replica {
    pub(super) fn receive_have(&mut self, now: Moment, link: LinkId, origins: &[Progress]) {
        for theirs in origins {
            self.note_progress(now, link, theirs);
        }
        self.choose_routes(now);
    }

    fn note_progress(&mut self, now: Moment, link: LinkId, theirs: &Progress) {
        let id = theirs.origin;
        let Some(known) = self.links.get(&link) else { return };
        if !self.may_take(known, &theirs.group) {
            return;
        }
        if !self.origins.contains_key(&id) {
            if !self.has_room() {
                return;
            }
            let nothing = Progress { seq: Seq(0), chain: Chain::START, ..theirs.clone() };
            self.origins.insert(id, Origin::new(&nothing, false));
        }
        let origin = &self.origins[&id];
        if origin.group != theirs.group {
            return;
        }
        if origin.durable.0 == theirs.seq && !agree(origin.durable.1, theirs.chain) {
            return self.fork(now, id, theirs.seq);
        }
        if origin.own && theirs.seq > origin.durable.0 {
            self.effects.push(Effect::OwnOriginLost { origin: id });
        }
        let region = known.peer.region.clone();
        let known = self.links.get_mut(&link).expect("it was there a moment ago");
        if known.theirs.get(&id).is_some_and(|before| *before >= theirs.seq) {
            return;
        }
        known.theirs.insert(id, theirs.seq);
        self.effects.push(Effect::Acknowledged { region, origin: id, seq: theirs.seq });
        self.acknowledged(now, link, id, theirs.seq);
    }

    pub(super) fn receive_truncated(&mut self, now: Moment, link: LinkId, id: OriginId, floor: Seq) {
        let Some(known) = self.links.get_mut(&link) else { return };
        known.floors.insert(id, floor);
        let Some(origin) = self.origins.get_mut(&id) else { return };
        if origin.route.is_some_and(|route| route.link == link) {
            // The peer has dropped the subscription.
            origin.route = None;
        }
        self.choose_routes(now);
    }

    /// Takes the entries after what was received, and hands them over. What comes twice is passed over; what comes too
    /// early is asked for again, and not kept.
    pub(super) fn receive_entries(
        &mut self,
        now: Moment,
        link: LinkId,
        id: OriginId,
        first: Seq,
        chain: Chain,
        body: &Bytes,
    ) {
        let Some(known) = self.links.get(&link) else { return };
        let Some(origin) = self.origins.get(&id) else { return };
        if origin.own
            || origin.sibling
            || origin.forked
            || first == Seq(0)
            || !self.may_take(known, &origin.group)
        {
            return;
        }
        let is_early = first.0 > origin.received.0.0 + 1;
        if is_early && !planted::is(Fault::TakeAfterGap) {
            let renewed = |at: Option<Moment>| at.is_some_and(|at| now.0 - at.0 < RENEW_PATIENCE_MS);
            if origin.route.is_some_and(|route| route.link == link && !renewed(route.renewed_at)) {
                self.renew_route(now, id);
            }
            return;
        }
        let Ok(entries) = open_run(body, &Limits::stored()) else {
            self.effects.push(Effect::Close { link, reason: "a run of log entries is malformed" });
            return self.link_closed(now, link);
        };
        let last = Seq(first.0 + (entries.len() as u64).max(1) - 1);
        if entries.is_empty() || last <= origin.received.0 {
            return;
        }
        let skip = (origin.received.0.0 + 1).saturating_sub(first.0) as usize;
        let (chain_before, after) = chains(chain, &entries, skip);
        if !is_early && !agree(chain_before, origin.received.1) {
            return self.fork(now, id, origin.received.0);
        }
        self.hand_over(link, id, entries, skip, body, (last, after));
    }

    fn hand_over(
        &mut self,
        link: LinkId,
        id: OriginId,
        mut entries: Vec<(DocumentId, Opened)>,
        skip: usize,
        body: &Bytes,
        end: (Seq, Chain),
    ) {
        let origin = self.origins.get_mut(&id).expect("it was there a moment ago");
        if let Some(route) = origin.route.as_mut().filter(|route| route.link == link) {
            route.renewed_at = None;
        }
        let (before, chain_before) = std::mem::replace(&mut origin.received, end);
        origin.handed = origin.handed.max(end.0);
        origin.storing.insert(end.0, end.1);
        if planted::is(Fault::CountUnstored) {
            origin.durable = end;
        }
        entries.drain(..skip);
        let body = if skip == 0 { body.clone() } else { repacked(&entries) };
        let run = ReceivedRun {
            origin: id,
            region: origin.region.clone(),
            group: origin.group.clone(),
            first: Seq(before.0 + 1),
            last: end.0,
            chain_before,
            chain: end.1,
            entries,
            body,
        };
        self.effects.push(Effect::Append(Box::new(run)));
    }

    /// What became of a run that ended at `last`.
    pub fn stored(&mut self, now: Moment, id: OriginId, last: Seq, outcome: Stored) {
        let Some(origin) = self.origins.get_mut(&id) else { return };
        let chain = origin.storing.remove(&last);
        let reached = match (outcome, chain) {
            (Stored::Durable, Some(chain)) => (last, chain),
            (Stored::Durable, None) => return,
            (Stored::OutOfStep { seq, chain }, _) => (seq, chain),
        };
        if reached.0 > origin.durable.0 {
            origin.durable = reached;
        }
        let mut renew = false;
        if origin.durable.0 > origin.received.0
            || origin.storing.is_empty() && origin.received.0 > origin.durable.0
        {
            // Somebody else has stored more, or what was handed over is not there: it is asked for from here.
            origin.received = origin.durable;
            renew = true;
        }
        let route = origin.route;
        if renew {
            self.renew_route(now, id);
        }
        if let Some(route) = route {
            self.acknowledge_soon(now, route.link);
        }
        self.pump_origin(now, id);
    }
}

/// The chain after the first `skip` entries and after all.
fn chains(before: Chain, entries: &[(DocumentId, Opened)], skip: usize) -> (Chain, Chain) {
    let (skipped, rest) = entries.split_at(skip);
    let over = |before: Chain, entries: &[(DocumentId, Opened)]| {
        entries.iter().fold(before, |chain, (document, opened)| opened.chain(chain, document))
    };
    let middle = over(before, skipped);
    (middle, over(middle, rest))
}

fn repacked(entries: &[(DocumentId, Opened)]) -> Bytes {
    let entries: Vec<Entry> = entries
        .iter()
        .map(|(document, opened)| Entry {
            document: document.clone(),
            content: Content::from(opened.clone()),
        })
        .collect();
    encode_run(&entries).into()
}
