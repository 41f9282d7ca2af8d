//! The world: regions, the network and clients on one heap of events, in virtual time, out of one seed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use isobar_protocol::config::ACKNOWLEDGE_AFTER_MS;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use isobar_protocol::replica::{LinkId, Moment, Replica};
use uuid::Uuid;

use crate::change_bytes::Made;
use crate::client::Client;
use crate::disk::{Disk, OriginRow};
use crate::events::{Agenda, Event};
use crate::ledger::{Invariant, Ledger, Violation};
use crate::network::{Connection, Pair};
use crate::plan::{Plan, Planted};
use crate::region::{Clock, Node, Region};
use crate::rng::Rng;
use crate::scrubs::RunningScrub;
use crate::staging::Touched;
use crate::trace;

/// How many events may pass between two looks at everything. What an event touches is looked at after it.
const AUDIT_EVERY: u64 = 256;

/// Timers are slower when faults are over: most of the time passes then, and little happens in it.
const CALM_TICK_MS: u64 = 100;

/// After a call a node's timer goes on so fast as the plan says for so long, as what is soon to be acknowledged waits for it.
/// Where nothing happens it is slower: most of the time passes like that.
const BUSY_MS: u64 = ACKNOWLEDGE_AFTER_MS * 11 / 10;
const IDLE_TICK_MS: u64 = 500;
const CALM_IDLE_TICK_MS: u64 = 1_000;

/// More events than any schedule needs: one that has so many goes round in circles.
const EVENTS_MAX: u64 = 2_000_000;

/// How often what happened; to see that schedules reach what they are for.
pub type Tally = BTreeMap<&'static str, u64>;

/// A tally while it is made: it is added to all the time, and by few places, so names are found by where they are written.
#[derive(Debug, Default)]
pub struct Counts(Vec<(&'static str, u64)>);

impl Counts {
    pub fn add(&mut self, what: &'static str) {
        match self.0.iter_mut().find(|(name, _)| std::ptr::eq(*name, what)) {
            Some((_, count)) => *count += 1,
            None => self.0.push((what, 1)),
        }
    }

    pub fn has(&self, what: &str) -> bool {
        self.0.iter().any(|(name, _)| *name == what)
    }

    pub fn tally(&self) -> Tally {
        let mut tally = Tally::new();
        self.0.iter().for_each(|(name, count)| *tally.entry(name).or_default() += count);
        tally
    }
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub planted: Option<Planted>,
    /// Faults are over.
    pub calm: bool,
    /// Every region has everything: no entry and no document may be sent.
    pub silent: bool,
    agenda: Agenda,
    pub regions: Vec<Region>,
    pub pairs: Vec<Pair>,
    pub connections: Vec<Connection>,
    pub clients: Vec<Client>,
    pub documents: Vec<(DocumentId, PlacementGroup)>,
    pub changes: HashMap<ChangeHash, Arc<Made>>,
    pub writes_left: usize,
    pub ledger: Ledger,
    pub violation: Option<Violation>,
    pub counts: Counts,
    pub events: u64,
    /// The next connection on which a frame of this kind is sent breaks.
    pub trap: Option<&'static str>,
    /// What the present step has changed on disks.
    pub touched: Touched,
    pub moved: BTreeSet<(usize, OriginId)>,
    /// How far each region's origins were looked at.
    pub looked_at: HashMap<(usize, OriginId), Seq>,
    /// Counts what sessions said.
    pub said: u64,
    pub running_scrub: Option<RunningScrub>,
    pub scrub_turns: u64,
    pub scrub_is_scheduled: bool,
    links: u64,
}

impl World {
    pub fn new(seed: u64, planted: Option<Planted>) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        trace::note(|| format!("seed {seed}: {plan:?}"));
        let mut world = Self {
            now: 0,
            writes_left: plan.writes,
            rng,
            planted,
            calm: false,
            silent: false,
            agenda: Agenda::default(),
            regions: Vec::new(),
            pairs: Vec::new(),
            connections: Vec::new(),
            clients: Vec::new(),
            documents: Vec::new(),
            changes: HashMap::new(),
            ledger: Ledger::default(),
            violation: None,
            counts: Counts::default(),
            events: 0,
            trap: None,
            touched: Touched::new(),
            moved: BTreeSet::new(),
            looked_at: HashMap::new(),
            said: 0,
            running_scrub: None,
            scrub_turns: 0,
            scrub_is_scheduled: false,
            links: 0,
            plan,
        };
        world.ledger.may_fork = planted == Some(Planted::ForkOrigins);
        world.lay_out();
        world
    }

    fn lay_out(&mut self) {
        let [all, two] = ["all", "two"].map(|name| PlacementGroup::new(name).expect("a short name"));
        for number in 0..self.plan.regions {
            let mut groups = BTreeSet::from([all.clone()]);
            if self.plan.two_groups && number < 2 {
                groups.insert(two.clone());
            }
            let name = RegionName::new(&format!("r{number}")).expect("a short name");
            let clock =
                Clock { offset_ms: self.rng.range(0, 100_000), rate_permille: self.rng.range(950, 1050) };
            self.regions.push(Region {
                name,
                groups,
                joined: false,
                gone: false,
                disk: Disk::default(),
                disk_number: 0,
                copies: Vec::new(),
                node: None,
                life: 0,
                clock,
                day_offset_ms: self.rng.range(100_000, 200_000),
                paused_until: 0,
                effects_left: None,
                deleted: BTreeSet::new(),
            });
            for other in 0..number {
                let ends = if self.rng.chance(50) { [other, number] } else { [number, other] };
                self.pairs.push(Pair::new(ends));
            }
            match self.plan.joins_at_ms {
                Some(at) if number + 1 == self.plan.regions => self.after(at, Event::Join),
                _ => {
                    self.regions[number].joined = true;
                    self.after(0, Event::Start(number));
                }
            }
        }
        for number in 0..self.plan.documents {
            let group = if self.plan.two_groups && number % 2 == 1 { &two } else { &all };
            let id = DocumentId::from_slice(&[b'd', number as u8]).expect("two bytes");
            self.documents.push((id, group.clone()));
        }
        for number in 0..self.plan.clients {
            let region = self.rng.below(self.plan.regions);
            self.clients.push(Client { actor: number as u8 + 1, region, views: BTreeMap::new() });
            self.after(self.plan.turn_every_ms, Event::Turn(number));
        }
        self.after(self.plan.fault_every_ms, Event::Fault);
        if let Some(at) = self.plan.leaves_at_ms {
            let who = self.rng.below(self.plan.regions);
            self.after(at, Event::Leave(who));
        }
    }

    pub fn count(&mut self, what: &'static str) {
        self.counts.add(what);
    }

    /// The first violation counts.
    pub fn violate(&mut self, invariant: Invariant, detail: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let detail = detail();
            trace::note(|| format!("VIOLATION {invariant:?}: {detail}"));
            self.violation = Some(Violation { invariant, detail });
        }
    }

    pub fn is_planted(&self, planted: Planted) -> bool {
        self.planted == Some(planted)
    }

    pub fn after(&mut self, delay_ms: u64, event: Event) {
        self.at(self.now + delay_ms, event);
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.agenda.add(at, event);
    }

    pub fn new_link(&mut self) -> LinkId {
        self.links += 1;
        LinkId(self.links)
    }

    pub fn group_of(&self, document: &DocumentId) -> PlacementGroup {
        let found = self.documents.iter().find(|(id, _)| id == document);
        found.expect("documents are made at the beginning").1.clone()
    }

    /// Runs events up to a moment, or the first violation.
    pub fn run_until(&mut self, until: u64) {
        while self.violation.is_none() {
            let Some((at, number, event)) = self.agenda.next(until) else { break };
            self.now = at;
            self.events += 1;
            self.step(number, event);
            self.audit_step();
            if self.events.is_multiple_of(AUDIT_EVERY) {
                self.audit();
            }
            if self.events > EVENTS_MAX {
                self.violate(Invariant::Bounded, || "too many events".to_owned());
            }
        }
        self.now = self.now.max(until);
    }

    fn step(&mut self, number: u64, event: Event) {
        if let Some(region) = self.concerned(&event)
            && self.regions[region].paused_until > self.now
        {
            // Under the same number: what waits for the end of a pause stays in its order, however often the pause is extended.
            let at = self.regions[region].paused_until;
            return self.agenda.put_back(at, number, event);
        }
        if !matches!(event, Event::Tick(..) | Event::Turn(_) | Event::Scrub) {
            trace::note(|| format!("{} {event:?}", self.now));
        }
        match event {
            Event::Tick(region, life) => {
                if self.lives(region, life) {
                    self.tick(region);
                }
            }
            Event::Deliver { connection, from } => self.deliver(connection, from),
            Event::LinkUp { connection, side } => self.link_up(connection, side),
            Event::LinkDown { connection, side } => self.link_down(connection, side),
            Event::Dial(pair) => self.dial(pair),
            Event::CommitDone(region, life) => {
                if self.lives(region, life) {
                    self.commit_done(region);
                }
            }
            Event::Committed(region, life) => {
                if self.lives(region, life) {
                    self.committed(region);
                }
            }
            Event::LateCommit { region, disk, batch } => self.late_commit(region, disk, &batch),
            Event::Adopt { region, life, origins } => {
                if self.lives(region, life) {
                    self.adopt(region, origins);
                }
            }
            Event::Adopted { region, life, origins } => {
                if self.lives(region, life) {
                    self.call(region, |replica, now| replica.adopted(now, &origins));
                }
            }
            Event::BaseMade { region, life, document, base } => {
                if self.lives(region, life) {
                    self.install(region, document, base);
                }
            }
            Event::BaseInstalled { region, life, document, generation, load } => {
                if self.lives(region, life) {
                    self.base_installed(region, &document, generation, load);
                }
            }
            Event::Prune { region, life, document } => {
                if self.lives(region, life) {
                    self.prune(region, &document);
                }
            }
            Event::LogRead { region, life, link, origin, after, bytes_max } => {
                if self.lives(region, life) {
                    self.log_read(region, link, origin, after, bytes_max);
                }
            }
            Event::PageRead { region, life, link, after, groups } => {
                if self.lives(region, life) {
                    self.page_read(region, link, after, &groups);
                }
            }
            Event::Turn(client) => self.turn(client),
            Event::Offer { client, region, life, document, changes } => {
                if self.lives(region, life) {
                    self.offer(client, region, &document, &changes);
                }
            }
            Event::Acknowledged { client, document, changes } => {
                self.hear_acknowledgement(client, &document, &changes);
            }
            Event::Fault => self.fault(),
            Event::Heal { pair, from } => self.heal(pair, from),
            Event::Start(region) => self.start(region),
            Event::Join => self.join(),
            Event::Leave(region) => self.leave(region),
            Event::Scrub => self.scrub(),
        }
    }

    /// The region that an event happens in, if it stands still when the region does.
    fn concerned(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Tick(region, _)
            | Event::CommitDone(region, _)
            | Event::Committed(region, _)
            | Event::Adopt { region, .. }
            | Event::Adopted { region, .. }
            | Event::BaseMade { region, .. }
            | Event::BaseInstalled { region, .. }
            | Event::Prune { region, .. }
            | Event::LogRead { region, .. }
            | Event::PageRead { region, .. }
            | Event::Offer { region, .. } => Some(*region),
            Event::Deliver { connection, from } => Some(self.connections[*connection].ends[1 - from]),
            Event::LinkUp { connection, side } | Event::LinkDown { connection, side } => {
                Some(self.connections[*connection].ends[*side])
            }
            _ => None,
        }
    }

    fn lives(&self, region: usize, life: u64) -> bool {
        self.regions[region].node.is_some() && self.regions[region].life == life
    }

    /// Calls a region's replica, if there is one, and performs what it wants done.
    pub fn call(&mut self, region: usize, call: impl FnOnce(&mut Replica, Moment)) {
        let Some(node) = &mut self.regions[region].node else { return };
        node.called_at = self.now;
        self.tick_by(region, self.now + self.tick_every_ms());
        self.call_quietly(region, call);
    }

    fn call_quietly(&mut self, region: usize, call: impl FnOnce(&mut Replica, Moment)) {
        let now = self.regions[region].clock.at(self.now);
        let Some(node) = &mut self.regions[region].node else { return };
        call(&mut node.replica, now);
        node.effects.extend(node.replica.effects());
        self.perform_effects(region);
    }

    /// A node's timer.
    fn tick(&mut self, at: usize) {
        let life = self.regions[at].life;
        let node = self.regions[at].node.as_mut().expect("it lives");
        if node.tick_at > self.now {
            // It was called meanwhile, and has ticked earlier instead.
            return;
        }
        node.tick_at = u64::MAX;
        let is_busy = self.now <= node.called_at + BUSY_MS;
        self.call_quietly(at, |replica, now| replica.tick(now));
        if self.lives(at, life) {
            self.refresh_interests(at);
            self.observe(at);
        }
        let every = match is_busy {
            true => self.tick_every_ms(),
            false if self.calm => CALM_IDLE_TICK_MS,
            false => IDLE_TICK_MS,
        };
        self.tick_by(at, self.now + every);
    }

    fn tick_every_ms(&self) -> u64 {
        if self.calm { self.plan.tick_every_ms.max(CALM_TICK_MS) } else { self.plan.tick_every_ms }
    }

    /// Sees to it that a node's timer is through at some moment at the latest.
    fn tick_by(&mut self, at: usize, moment: u64) {
        let Region { life, node: Some(node), .. } = &mut self.regions[at] else { return };
        if node.tick_at > moment {
            node.tick_at = moment;
            let tick = Event::Tick(at, *life);
            self.at(moment, tick);
        }
    }

    /// Starts a node from what is on its disk, under new origins.
    pub fn start(&mut self, at: usize) {
        if self.regions[at].node.is_some() || self.regions[at].gone {
            return;
        }
        self.count("starts");
        if self.is_planted(Planted::LoseRun) {
            self.lose_run(at);
        }
        let groups = self.regions[at].groups.clone();
        let own: BTreeMap<PlacementGroup, OriginId> =
            groups.iter().map(|group| (group.clone(), self.claim(at, group))).collect();
        let region = &mut self.regions[at];
        region.life += 1;
        let origins = region.disk.vector();
        let replica = Replica::new(region.name.clone(), groups, origins, own.values().copied().collect());
        region.node = Some(Node::new(replica, own));
        let reached: Vec<(OriginId, Seq)> =
            region.disk.origins.iter().map(|(id, row)| (*id, row.seq)).collect();
        reached.iter().for_each(|(origin, seq)| self.ledger.note_reached(at, *origin, *seq));
        self.tick_by(at, self.now + self.plan.tick_every_ms);
        for pair in 0..self.pairs.len() {
            if self.pairs[pair].ends.contains(&at) {
                self.dial_soon(pair);
            }
        }
        self.audit_region(at);
    }

    /// Claims an origin for a group: a new one, whatever is there.
    fn claim(&mut self, at: usize, group: &PlacementGroup) -> OriginId {
        let keeps = self.is_planted(Planted::KeepOrigin) || self.is_planted(Planted::ForkOrigins);
        let keeps_unwritten = self.is_planted(Planted::KeepUnwrittenOrigin);
        let disk = &mut self.regions[at].disk;
        if let Some(claimed) = disk.claimed.get(group)
            && (keeps || keeps_unwritten && disk.origins[claimed].seq == Seq(0))
        {
            return *claimed;
        }
        let origin = OriginId(Uuid::from_u64_pair(self.rng.next(), self.rng.next()));
        let row = OriginRow::new(self.regions[at].name.clone(), group.clone());
        let disk = &mut self.regions[at].disk;
        disk.claimed.insert(group.clone(), origin);
        disk.origins.insert(origin, row);
        origin
    }

    /// The last region joins, empty or with a copy of the first one's disk.
    fn join(&mut self) {
        let last = self.regions.len() - 1;
        if self.regions[last].joined || self.regions[last].gone {
            return;
        }
        self.count("joins");
        self.regions[last].joined = true;
        if self.plan.joins_with_copy && self.regions[0].groups == self.regions[last].groups {
            self.count("joins with a copy");
            self.regions[last].disk = self.regions[0].disk.clone();
            self.regions[last].deleted = self.regions[0].deleted.clone();
        }
        self.start(last);
    }
}
