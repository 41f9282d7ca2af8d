//! Presence: sessions look at documents and say where they are, and the regions that want it get it, once.

use std::collections::BTreeSet;

use bytes::Bytes;
use isobar_protocol::config::INTEREST_LINGER_MS;
use isobar_protocol::ids::DocumentId;
use isobar_protocol::link::LinkFrame;
use isobar_protocol::replica::LinkId;

use crate::ledger::Invariant;
use crate::plan::Planted;
use crate::trace;
use crate::world::World;

/// How often a node compares what is open with what it told its peers.
const REFRESH_EVERY_MS: u64 = 500;

/// How many schedules of a hundred end with new connections between all, and with nobody looking. That takes long, in events: not
/// every schedule has to.
const RECONNECTS_PERCENT: u32 = 25;
const LOOKS_AWAY_PERCENT: u32 = 5;

/// How long all regions may take to be linked to each other when nothing is in the way.
const LINKED_WITHIN_MS: u64 = 60_000;

/// How long what was said may take when all are linked: a refresh on a slow clock, and the way.
const HEARD_WITHIN_MS: u64 = 2_000;

impl World {
    /// A client opens or leaves a document, or says something in one that is open.
    pub fn be_present(&mut self, at: usize, document: &DocumentId) {
        let group = self.group_of(document);
        let says = self.rng.chance(60);
        let Some(node) = &mut self.regions[at].node else { return };
        if node.open.contains_key(document) && says {
            return self.say(at, document);
        }
        if node.open.remove(document).is_none() {
            node.open.insert(document.clone(), group);
            node.opened.insert(document.clone());
        }
    }

    /// A session of a region says something in a document.
    pub fn say(&mut self, at: usize, document: &DocumentId) {
        self.said += 1;
        let frame = LinkFrame::Presence {
            document: document.clone(),
            sender: self.regions[at].name.as_str().to_owned(),
            session: String::new(),
            count: self.said,
            data: Bytes::new(),
        };
        self.relay(at, document, &frame);
    }

    fn relay(&mut self, at: usize, document: &DocumentId, frame: &LinkFrame) {
        let group = self.group_of(document);
        let to_all = self.is_planted(Planted::PresenceToAll);
        let Some(node) = &self.regions[at].node else { return };
        let links: Vec<LinkId> = match to_all {
            true => node.links.keys().copied().collect(),
            false => node.interests.recipients(document, &group).collect(),
        };
        links.into_iter().for_each(|link| self.send_beside(at, link, frame));
    }

    /// A link is up: its peer is told what is wanted here.
    pub fn offer_interests(&mut self, at: usize, link: LinkId, peer: usize) {
        let groups = self.regions[peer].groups.clone();
        let node = self.regions[at].node.as_mut().expect("it has just opened a link");
        let frame = node.interests.link_opened(link, groups);
        if !self.is_planted(Planted::ForgetInterests) {
            self.send_beside(at, link, &frame);
        }
    }

    pub fn refresh_interests(&mut self, at: usize) {
        let now = self.regions[at].clock.at(self.now);
        let node = self.regions[at].node.as_mut().expect("its timer runs");
        if now.0 < node.refreshed_at.0 + REFRESH_EVERY_MS {
            return;
        }
        node.refreshed_at = now;
        let news = node.interests.refresh(now, node.open.clone());
        news.into_iter().for_each(|(link, frame)| self.send_beside(at, link, &frame));
    }

    /// Takes a frame that is about presence; gives others back.
    pub fn receive_presence(&mut self, at: usize, link: LinkId, frame: LinkFrame) -> Option<LinkFrame> {
        let Some(node) = &mut self.regions[at].node else { return Some(frame) };
        match frame {
            LinkFrame::Interest { add, remove } => node.interests.received(link, add, &remove),
            LinkFrame::Presence { ref document, count, .. } => {
                let wanted = node.opened.contains(document);
                node.heard.insert(count);
                let document = document.clone();
                self.count("presence");
                if !wanted {
                    self.violate(Invariant::Presence, || {
                        format!("r{at} gets presence of {document:?}, where nobody looked")
                    });
                }
                if self.is_planted(Planted::PassPresenceOn) {
                    self.relay(at, &document, &frame);
                }
            }
            other => return Some(other),
        }
        None
    }

    /// Holds presence that a region sends against where it comes from.
    pub fn check_presence_frame(&mut self, at: usize, to: usize, document: &DocumentId, sender: &str) {
        let group = self.group_of(document);
        self.check_residency(at, to, document, &group);
        if sender != self.regions[at].name.as_str() {
            self.violate(Invariant::Presence, || format!("r{at} passes on to r{to} what {sender} said"));
        }
    }

    /// When all has healed, in some schedules after connections have come and gone once more: who looks hears everybody else
    /// once, and where nobody looks any more nothing is sent.
    pub fn check_presence(&mut self) {
        self.look_everywhere();
        if self.rng.chance(RECONNECTS_PERCENT) {
            self.run_until(self.now + HEARD_WITHIN_MS);
            self.break_all();
        }
        self.wait_for_links();
        self.run_until(self.now + HEARD_WITHIN_MS);
        for (document, group) in self.documents.clone() {
            let members = self.members(&group);
            for &at in &members {
                self.say(at, &document);
                let said = self.said;
                self.run_until(self.now + self.plan.latency_ms.max(2));
                let deaf = members.iter().find(|other| **other != at && !self.hears(**other, said));
                if let Some(deaf) = deaf {
                    self.violate(Invariant::Presence, || {
                        format!("r{deaf} does not hear r{at} in {document:?}")
                    });
                }
            }
        }
        if self.rng.chance(LOOKS_AWAY_PERCENT) {
            self.look_away();
        }
    }

    fn break_all(&mut self) {
        self.count("reconnections");
        for pair in 0..self.pairs.len() {
            if let Some(connection) = self.pairs[pair].connection {
                self.close(connection, 0);
            }
        }
    }

    fn hears(&self, at: usize, said: u64) -> bool {
        self.regions[at].node.as_ref().is_some_and(|node| node.heard.contains(&said))
    }

    fn look_everywhere(&mut self) {
        for region in &mut self.regions {
            let theirs = self.documents.iter().filter(|(_, group)| region.groups.contains(group));
            let Some(node) = &mut region.node else { continue };
            node.open = theirs.cloned().collect();
            node.opened.extend(node.open.keys().cloned());
        }
    }

    fn look_away(&mut self) {
        self.count("lookings away");
        for node in self.regions.iter_mut().filter_map(|region| region.node.as_mut()) {
            node.open.clear();
        }
        // A clock may be slow.
        self.run_until(self.now + INTEREST_LINGER_MS * 11 / 10 + HEARD_WITHIN_MS);
        for at in 0..self.regions.len() {
            let Some(node) = &self.regions[at].node else { continue };
            if node.interests.is_anything_wanted() {
                self.violate(Invariant::Presence, || format!("r{at} would still send presence"));
            }
        }
    }

    fn wait_for_links(&mut self) {
        let until = self.now + LINKED_WITHIN_MS;
        while self.violation.is_none() && !self.is_linked_everywhere() {
            if self.now >= until {
                return self.violate(Invariant::Convergence, || "regions stay apart".to_owned());
            }
            self.run_until(self.now + REFRESH_EVERY_MS);
        }
        trace::note(|| format!("{} all are linked", self.now));
    }

    fn is_linked_everywhere(&self) -> bool {
        let linked: BTreeSet<usize> = (0..self.pairs.len())
            .filter(|pair| {
                if self.pairs[*pair].ends.iter().any(|end| self.regions[*end].gone) {
                    return true;
                }
                let connection = self.pairs[*pair].connection.map(|it| &self.connections[it]);
                connection.is_some_and(|it| it.open == [true, true])
            })
            .collect();
        linked.len() == self.pairs.len()
    }
}
