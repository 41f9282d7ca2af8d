//! Connections as they come and go, and frames on their way.

use isobar_protocol::link::{LinkFrame, codec};
use isobar_protocol::replica::LinkId;

use crate::events::Event;
use crate::faults::kind_of;
use crate::network::{Connection, REMEMBERED_MAX, Remembered, Stream};
use crate::world::World;

/// After so long a dial is given up.
const HANDSHAKE_WITHIN_MS: u64 = 2_000;

impl World {
    pub fn dial_soon(&mut self, pair: usize) {
        if !self.pairs[pair].dialling {
            self.pairs[pair].dialling = true;
            let delay = self.rng.range(1, 500);
            self.after(delay, Event::Dial(pair));
        }
    }

    /// The dialler of a pair connects, unless it believes that it is connected.
    pub fn dial(&mut self, pair: usize) {
        self.pairs[pair].dialling = false;
        let ends = self.pairs[pair].ends;
        if let Some(connection) = self.pairs[pair].connection
            && self.connections[connection].open[0]
        {
            return;
        }
        if self.regions[ends[0]].node.is_none() || self.regions[ends[1]].gone {
            return;
        }
        let unreachable = self.regions[ends[1]].node.is_none() || self.pairs[pair].cut.contains(&true);
        if unreachable {
            return self.dial_soon(pair);
        }
        let links = [self.new_link(), self.new_link()];
        self.connections.push(Connection {
            pair,
            ends,
            links,
            open: [false; 2],
            streams: [Stream::default(), Stream::default()],
            disk_numbers: [0; 2],
        });
        let connection = self.connections.len() - 1;
        let there = self.latency();
        self.after(there, Event::LinkUp { connection, side: 1 });
        // Until the handshake is over or has taken too long, nobody dials again.
        self.pairs[pair].dialling = true;
        self.after(HANDSHAKE_WITHIN_MS, Event::Dial(pair));
    }

    pub fn latency(&mut self) -> u64 {
        self.rng.range(1, self.plan.latency_ms.max(2))
    }

    /// A side is through with the handshake: first who was dialled, then, when its answer has come, who dialled.
    pub fn link_up(&mut self, connection: usize, side: usize) {
        let Connection { pair, ends, links, .. } = &self.connections[connection];
        let (pair, ends, link) = (*pair, *ends, links[side]);
        if self.regions[ends[side]].node.is_none() || self.pairs[pair].cut.contains(&true) {
            // The other side hears of it by silence.
            return;
        }
        if side == 0 {
            let other = self.pairs[pair].connection.filter(|other| self.connections[*other].open[0]);
            if other.is_some() {
                return self.after(1, Event::LinkDown { connection, side: 1 });
            }
            self.pairs[pair].connection = Some(connection);
        } else {
            let arrives = self.now + self.latency();
            self.connections[connection].streams[1].arrives_at = arrives;
            self.at(arrives, Event::LinkUp { connection, side: 0 });
        }
        self.count("links");
        self.connections[connection].open[side] = true;
        self.has_moved(|it| it.ends == ends);
        if side == 1 {
            // Whoever was dialled comes up first, and what it says is of this disk.
            self.connections[connection].disk_numbers = ends.map(|end| self.regions[end].disk_number);
        }
        let peer = self.regions[ends[1 - side]].peer();
        let node = self.regions[ends[side]].node.as_mut().expect("it was there a moment ago");
        node.links.insert(link, (connection, side));
        self.call(ends[side], |replica, now| replica.link_opened(now, link, peer));
        if self.connections[connection].open[side] {
            self.offer_interests(ends[side], link, ends[1 - side]);
            let groups = self.regions[ends[1 - side]].groups.clone();
            self.call_receipts(ends[side], |receipts, replica, now| {
                receipts.link_opened(now, link, groups, replica);
            });
        }
    }

    /// A side learns that its link is gone.
    pub fn link_down(&mut self, connection: usize, side: usize) {
        let Connection { pair, ends, links, open, .. } = &mut self.connections[connection];
        if !std::mem::replace(&mut open[side], false) {
            return;
        }
        let (pair, region, link) = (*pair, ends[side], links[side]);
        if let Some(node) = &mut self.regions[region].node {
            node.links.remove(&link);
            node.reads.remove(&link);
            node.interests.link_closed(link);
            node.receipts.link_closed(link);
        }
        self.call(region, |replica, now| replica.link_closed(now, link));
        if side == 0 {
            self.dial_soon(pair);
        }
    }

    /// A side closes its link; the other hears of it if nothing is between them.
    pub fn close(&mut self, connection: usize, side: usize) {
        let pair = self.connections[connection].pair;
        if !self.pairs[pair].cut[side] {
            let arrives = self.connections[connection].streams[side].arrives_at.max(self.now + 1);
            self.at(arrives, Event::LinkDown { connection, side: 1 - side });
        }
        self.link_down(connection, side);
    }

    pub fn send(&mut self, connection: usize, side: usize, frame: &LinkFrame) {
        let arrives = self.now + self.latency();
        let stream = &mut self.connections[connection].streams[side];
        stream.frames.push_back(codec::encode(frame).into());
        stream.arrives_at = stream.arrives_at.max(arrives);
        let arrives = stream.arrives_at;
        self.at(arrives, Event::Deliver { connection, from: side });
        if self.trap.is_some_and(|kind| kind == kind_of(frame)) {
            self.trap = None;
            self.break_connection(connection, Some(side));
        }
    }

    pub fn deliver(&mut self, connection: usize, from: usize) {
        let Connection { pair, ends, links, open, streams, .. } = &mut self.connections[connection];
        if self.pairs[*pair].cut[from] {
            streams[from].held_up += 1;
            return;
        }
        let Some(frame) = streams[from].frames.pop_front() else { return };
        if !open[1 - from] {
            return;
        }
        let frame = codec::decode(frame).expect("what a region sends decodes");
        let (pair, sender, receiver, link) = (*pair, ends[from], ends[1 - from], links[1 - from]);
        self.remember(pair, from, [sender, receiver], &frame);
        self.count("frames");
        if self.plan.twice_percent > 0 && !self.calm && self.rng.chance(self.plan.twice_percent) {
            self.count("frames that arrive twice");
            self.receive(receiver, link, frame.clone());
        }
        self.receive(receiver, link, frame);
    }

    pub fn receive(&mut self, at: usize, link: LinkId, frame: LinkFrame) {
        let Some(frame) = self.receive_presence(at, link, frame) else { return };
        let Some(frame) = self.receive_receipt(at, link, frame) else { return };
        let announces = matches!(frame, LinkFrame::Have { .. });
        self.call(at, |replica, now| replica.receive(now, link, frame));
        if announces {
            self.call_receipts(at, |receipts, replica, now| receipts.announced(now, link, replica));
        }
    }

    /// Keeps a frame that may be received again much later: not those that mean something at their moment only, as a link is in
    /// order.
    fn remember(&mut self, pair: usize, from: usize, ends: [usize; 2], frame: &LinkFrame) {
        let again = matches!(
            frame,
            LinkFrame::Have { .. }
                | LinkFrame::Entries { .. }
                | LinkFrame::Subscribe { .. }
                | LinkFrame::Truncated { .. }
                | LinkFrame::Ping { .. }
                | LinkFrame::Pong { .. }
        );
        if !again {
            return;
        }
        let lives = ends.map(|end| self.regions[end].life);
        let remembered = &mut self.pairs[pair].remembered[from];
        remembered.push_back(Remembered { lives, frame: frame.clone() });
        if remembered.len() > REMEMBERED_MAX {
            remembered.pop_front();
        }
    }

    /// What was held up by a cut goes on.
    pub fn heal(&mut self, pair: usize, from: usize) {
        self.pairs[pair].cut[from] = false;
        for connection in 0..self.connections.len() {
            if self.connections[connection].pair == pair {
                let held_up = std::mem::take(&mut self.connections[connection].streams[from].held_up);
                let latency = self.latency();
                let arrives = self.connections[connection].streams[from].arrives_at.max(self.now + latency);
                self.connections[connection].streams[from].arrives_at = arrives;
                (0..held_up).for_each(|_| self.at(arrives, Event::Deliver { connection, from }));
            }
        }
    }
}
