//! Faults as they happen.

use isobar_protocol::ids::{OriginId, RegionName, Seq};
use isobar_protocol::link::{LinkFrame, codec};

use crate::events::Event;
use crate::ledger::Invariant;
use crate::plan::{Fault, Planted};
use crate::region::{Own, Submission};
use crate::trace;
use crate::world::World;

/// How many copies of a disk are kept.
const COPIES_MAX: usize = 2;

impl World {
    pub fn fault(&mut self) {
        if self.calm {
            return;
        }
        let delay = self.rng.range(1, 2 * self.plan.fault_every_ms);
        self.after(delay, Event::Fault);
        let Some(fault) = self.rng.pick(&self.plan.faults.clone()).copied() else { return };
        let at = self.rng.below(self.regions.len());
        trace::note(|| format!("{} r{at} {fault:?}", self.now));
        match fault {
            Fault::Reset => self.reset(),
            Fault::Cut => self.cut(),
            Fault::Pause => {
                let longest = self.within(20_000);
                let pause = self.rng.range(10, longest);
                let region = &mut self.regions[at];
                region.paused_until = region.paused_until.max(self.now + pause);
            }
            Fault::Crash => self.crash(at),
            Fault::CrashInside => self.regions[at].effects_left = Some(self.rng.range(0, 30)),
            Fault::Copy => self.copy(at),
            Fault::Rollback => self.roll_back(at),
            Fault::Truncate => self.truncate(at),
            Fault::TruncateByForce => self.truncate_by_force(at),
            Fault::Replay => self.replay(),
            Fault::Evict => {
                if let Some(node) = &mut self.regions[at].node
                    && node.is_idle()
                {
                    // What a base is made from stays in memory.
                    node.graphs.retain(|document, _| node.compacting.contains(document));
                    node.ways.retain(|document, _| node.compacting.contains(document));
                }
            }
            Fault::Delete => self.delete(at),
            Fault::Clone => self.clone_client(),
            Fault::ClockJump => {
                let region = &mut self.regions[at];
                region.clock.offset_ms += self.rng.range(1, 60_000);
                region.day_offset_ms = self.rng.range(0, 300_000);
            }
            Fault::Compact => self.compact(at),
        }
    }

    /// What lasts longer than the schedule has faults would leave nothing to happen after it.
    fn within(&self, longest_ms: u64) -> u64 {
        longest_ms.min(self.plan.faults_until_ms)
    }

    /// A connection breaks, now or when some kind of frame is sent that there are few of.
    fn reset(&mut self) {
        if self.trap.is_none() && self.rng.chance(50) {
            self.trap = self.rng.pick(&TRAPS).copied();
            return;
        }
        let open = self.connections.iter().enumerate().filter(|(_, it)| it.open.contains(&true));
        let open: Vec<usize> = open.map(|(number, _)| number).collect();
        let Some(connection) = self.rng.pick(&open).copied() else { return };
        self.break_connection(connection, None);
    }

    /// A connection is torn: what is on its way is lost, from some frame on, and each side hears of it when it does.
    /// That is the last one from the side named, if one is.
    pub fn break_connection(&mut self, connection: usize, last_from: Option<usize>) {
        self.count("resets");
        for side in 0..2 {
            // Of what leads to this side some still arrives, up to any frame.
            let stream = &mut self.connections[connection].streams[1 - side];
            let arrive = match last_from {
                Some(from) if from == 1 - side => stream.frames.len() - 1,
                _ => self.rng.below(stream.frames.len() + 1) * usize::from(self.rng.chance(50)),
            };
            let lost = stream.frames.split_off(arrive);
            stream.held_up = stream.held_up.min(arrive);
            let hears_at = stream.arrives_at.max(self.now) * u64::from(arrive > 0);
            let hears_at = hears_at.max(self.now + self.rng.range(0, 300));
            if let Some(first) = lost.front() {
                let first = codec::decode(first.clone()).expect("what a region sends decodes");
                self.count(kind_of(&first));
            }
            self.at(hears_at, Event::LinkDown { connection, side });
        }
    }

    fn cut(&mut self) {
        let pair = self.rng.below(self.pairs.len());
        let both = self.rng.chance(50);
        let direction = self.rng.below(2);
        self.count("cuts");
        // Some end before anybody notices, some after the silence was noticed.
        let short = self.within(3_000);
        let lasts =
            if self.rng.chance(50) { self.rng.range(50, short) } else { self.rng.range(3_000, 40_000) };
        for from in 0..2 {
            if both || from == direction {
                self.pairs[pair].cut[from] = true;
                self.after(lasts, Event::Heal { pair, from });
            }
        }
    }

    /// The node dies. Its peers hear of it if they can be told; what it sent may still arrive.
    pub fn crash(&mut self, at: usize) {
        let Some(mut node) = self.regions[at].node.take() else { return };
        self.count("crashes");
        self.outlive(at, node.batch.take());
        trace::note(|| format!("{} r{at} crashes", self.now));
        self.regions[at].effects_left = None;
        for connection in 0..self.connections.len() {
            let ends = self.connections[connection].ends;
            let Some(side) = ends.iter().position(|end| *end == at) else { continue };
            if !std::mem::replace(&mut self.connections[connection].open[side], false) {
                continue;
            }
            let pair = self.connections[connection].pair;
            if self.rng.chance(70) && !self.pairs[pair].cut[side] {
                let arrives = self.connections[connection].streams[side].arrives_at.max(self.now + 1);
                self.at(arrives, Event::LinkDown { connection, side: 1 - side });
            }
        }
        let longest = self.within(9_000) / 3;
        let delay = self.rng.range(10, longest);
        self.after(delay, Event::Start(at));
    }

    /// A region leaves for good: the others wait for it no more. What only it had is lost.
    pub fn leave(&mut self, at: usize) {
        if self.calm || !self.regions[at].joined {
            return;
        }
        self.count("regions that left");
        self.crash(at);
        let region = &mut self.regions[at];
        (region.gone, region.joined) = (true, false);
        let known: Vec<(OriginId, Seq)> = region.disk.origins.iter().map(|(id, it)| (*id, it.seq)).collect();
        for (origin, seq) in known {
            let reached =
                self.staying().filter_map(|it| it.disk.origins.get(&origin)).map(|row| row.seq).max();
            if reached.unwrap_or(Seq(0)) < seq {
                self.ledger.rolled_back.insert(origin);
            }
        }
        self.note_lost();
    }

    /// Writes down what was promised and is on no disk any more.
    fn note_lost(&mut self) {
        let disks: Vec<_> = self.staying().map(|region| &region.disk).collect();
        let gone = |(document, hash): &&(_, _)| !disks.iter().any(|disk| disk.holds(document, hash));
        let gone: Vec<_> = self.ledger.acknowledged.iter().filter(gone).cloned().collect();
        self.ledger.lost.extend(gone);
    }

    fn copy(&mut self, at: usize) {
        let region = &mut self.regions[at];
        if region.copies.len() >= COPIES_MAX {
            region.copies.remove(0);
        }
        region.copies.push(region.disk.clone());
    }

    /// The disk is replaced by an older copy. What was only there is lost, and that is written down.
    fn roll_back(&mut self, at: usize) {
        let Some(copy) = self.rng.pick(&self.regions[at].copies).cloned() else { return };
        self.crash(at);
        self.count("rollbacks");
        let region = &mut self.regions[at];
        for (origin, row) in &region.disk.origins {
            let left = copy.origins.get(origin).map_or(Seq(0), |row| row.seq);
            if left < row.seq {
                self.ledger.rolled_back.insert(*origin);
            }
        }
        region.deleted = copy.documents.keys().filter(|it| copy.is_deleted(it)).cloned().collect();
        region.disk = copy;
        region.disk_number += 1;
        self.looked_at.retain(|(region, _), _| *region != at);
        self.note_lost();
    }

    /// Every origin's log is truncated to what all other members of its group have acknowledged.
    fn truncate(&mut self, at: usize) {
        let forgets = self.is_planted(Planted::TruncateEarly);
        let rows = self.regions[at].disk.origins.iter();
        let origins: Vec<_> = rows.map(|(id, row)| (*id, row.group.clone(), row.seq)).collect();
        for (origin, group, seq) in origins {
            let members = self.regions.iter().enumerate();
            let members: Vec<(usize, RegionName)> = members
                .filter(|(number, it)| *number != at && it.joined && it.groups.contains(&group))
                .map(|(number, it)| (number, it.name.clone()))
                .collect();
            let acknowledged = members.iter().skip(usize::from(forgets)).map(|(_, name)| {
                self.regions[at].disk.acknowledged.get(&(name.clone(), origin)).copied().unwrap_or(Seq(0))
            });
            let up_to = acknowledged.min().unwrap_or(seq).min(seq);
            let before = self.regions[at].disk.origins[&origin].floor;
            let floor = self.regions[at].disk.truncate(origin, up_to);
            if floor > before {
                self.count("truncations");
                members.iter().for_each(|(member, _)| self.check_truncation(at, *member, origin, floor));
            }
        }
        self.audit_region(at);
    }

    /// Nobody may still need what is gone: each member had it on its disk.
    fn check_truncation(&mut self, at: usize, member: usize, origin: OriginId, floor: Seq) {
        let reached = self.ledger.reached.get(&(member, origin)).copied().unwrap_or(Seq(0));
        if reached < floor {
            self.violate(Invariant::TruncatedWhenAcknowledged, || {
                format!("r{at} truncates {origin:?} to {floor:?}, r{member} had {reached:?} at most")
            });
        }
    }

    fn truncate_by_force(&mut self, at: usize) {
        let disk = &mut self.regions[at].disk;
        let origins: Vec<(OriginId, Seq)> = disk.origins.iter().map(|(id, row)| (*id, row.seq)).collect();
        for (origin, seq) in origins {
            disk.truncate(origin, seq);
        }
        self.count("forced truncations");
        self.audit_region(at);
    }

    /// A frame that was received once is received again, on the link of today.
    fn replay(&mut self) {
        let pair = self.rng.below(self.pairs.len());
        let from = self.rng.below(2);
        let ends = self.pairs[pair].ends;
        let lives = [self.regions[ends[from]].life, self.regions[ends[1 - from]].life];
        let Some(connection) = self.pairs[pair].connection else { return };
        let known = self.pairs[pair].remembered[from].iter().filter(|it| it.lives[0] == lives[0]);
        let frames: Vec<_> = known.map(|it| it.frame.clone()).collect();
        let Some(frame) = self.rng.pick(&frames).cloned() else { return };
        if !self.connections[connection].open[1 - from]
            || self.regions[ends[1 - from]].paused_until > self.now
        {
            return;
        }
        self.count("replays");
        trace::note(|| format!("  again {frame:?}"));
        let link = self.connections[connection].links[1 - from];
        self.receive(ends[1 - from], link, frame);
    }

    /// Somebody deletes a document.
    fn delete(&mut self, at: usize) {
        if self.regions[at].node.is_none() {
            return;
        }
        let here = self.regions[at].disk.documents.keys().cloned().collect::<Vec<_>>();
        let Some(document) = self.rng.pick(&here).cloned() else { return };
        if self.regions[at].disk.is_deleted(&document) {
            return;
        }
        let group = self.group_of(&document);
        let deleted_at_ms = self.regions[at].day_ms(self.now);
        let content = Own::Tombstone { deleted_at_ms };
        self.submit(at, Submission::Own { group, document, content });
    }

    /// A client's copy wakes up at another region, with the same actor.
    fn clone_client(&mut self) {
        if self.clients.len() >= 2 * self.plan.clients {
            return;
        }
        self.count("clones");
        let mut copy = self.clients[self.rng.below(self.clients.len())].clone();
        copy.region = self.rng.below(self.regions.len());
        self.clients.push(copy);
        let number = self.clients.len() - 1;
        self.after(1, Event::Turn(number));
    }

    /// A run of the middle or the end is gone.
    pub fn lose_run(&mut self, at: usize) {
        let disk = &mut self.regions[at].disk;
        let Some(row) = disk.origins.values_mut().find(|row| row.runs.len() > 1) else { return };
        row.runs.pop_last();
    }
}

/// What a frame is called in the tally when it is the first that is lost with its connection.
pub fn kind_of(frame: &LinkFrame) -> &'static str {
    match frame {
        LinkFrame::Have { .. } => "lost from Have on",
        LinkFrame::Subscribe { .. } => "lost from Subscribe on",
        LinkFrame::Unsubscribe { .. } => "lost from Unsubscribe on",
        LinkFrame::Entries { .. } => "lost from Entries on",
        LinkFrame::Truncated { .. } => "lost from Truncated on",
        LinkFrame::SnapshotRequest { .. } => "lost from SnapshotRequest on",
        LinkFrame::SnapshotPage { .. } => "lost from SnapshotPage on",
        LinkFrame::Interest { .. } => "lost from Interest on",
        LinkFrame::Presence { .. } => "lost from Presence on",
        LinkFrame::HeadsRequest { .. } => "lost from HeadsRequest on",
        LinkFrame::HeadsAnswer { .. } => "lost from HeadsAnswer on",
        LinkFrame::Ping { .. } => "lost from Ping on",
        LinkFrame::Pong { .. } => "lost from Pong on",
        _ => "lost from another frame on",
    }
}

/// Kinds of frames that there are few of.
const TRAPS: [&str; 4] = [
    "lost from SnapshotPage on",
    "lost from SnapshotRequest on",
    "lost from Truncated on",
    "lost from Unsubscribe on",
];
