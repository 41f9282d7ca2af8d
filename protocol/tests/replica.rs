//! Replication rule by rule: a few replicas over logs in memory, every frame delivered at once and in order.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::link::{DocumentContents, LinkFrame, MissingDocument, Progress};
use isobar_protocol::log::{Chain, Content, Entry, encode_run};
use isobar_protocol::replica::{Effect, LinkId, LogRead, LogSlice, Moment, Page, Peer, Replica, Stored};
use uuid::Uuid;

/// A region: a replica, and the log it stores.
struct Region {
    name: RegionName,
    replica: Replica,
    origin: OriginId,
    log: BTreeMap<OriginId, Vec<LogSlice>>,
    floors: BTreeMap<OriginId, Seq>,
    documents: BTreeSet<DocumentId>,
    /// Documents that it can neither give nor store.
    damaged: BTreeSet<DocumentId>,
    /// What was noted to be missing when a vector was adopted.
    missing: Vec<MissingDocument>,
    forked: Vec<OriginId>,
    lost: Vec<OriginId>,
}

/// Regions and the links between them, by both ends' numbers.
struct World {
    now: Moment,
    regions: Vec<Region>,
    /// (region, link) to the other end's.
    links: BTreeMap<(usize, LinkId), (usize, LinkId)>,
    queue: VecDeque<(usize, LinkId, LinkFrame)>,
    next_link: u64,
    sent: Vec<(usize, LinkFrame)>,
}

fn group() -> PlacementGroup {
    PlacementGroup::new("default").unwrap()
}

fn document(number: u64) -> DocumentId {
    DocumentId::from_slice(&number.to_be_bytes()).unwrap()
}

impl World {
    fn new(names: &[&str]) -> Self {
        let regions = names.iter().enumerate().map(|(at, name)| {
            let name = RegionName::new(name).unwrap();
            let origin = OriginId(Uuid::from_u128(at as u128 + 1));
            let own = BTreeSet::from([origin]);
            Region {
                replica: Replica::new(name.clone(), BTreeSet::from([group()]), Vec::new(), own),
                name,
                origin,
                log: BTreeMap::new(),
                floors: BTreeMap::new(),
                documents: BTreeSet::new(),
                damaged: BTreeSet::new(),
                missing: Vec::new(),
                forked: Vec::new(),
                lost: Vec::new(),
            }
        });
        Self {
            now: Moment(1_000),
            regions: regions.collect(),
            links: BTreeMap::new(),
            queue: VecDeque::new(),
            next_link: 1,
            sent: Vec::new(),
        }
    }

    fn peer(&self, region: usize) -> Peer {
        let name = &self.regions[region].name;
        Peer {
            region: name.clone(),
            node: NodeId([region as u8; 16]),
            storage_id: StorageId::new(name.as_str()).unwrap(),
            groups: BTreeSet::from([group()]),
            client_url: None,
            features: BTreeSet::new(),
        }
    }

    fn link(&mut self, a: usize, b: usize) {
        let (at_a, at_b) = (LinkId(self.next_link), LinkId(self.next_link + 1));
        self.next_link += 2;
        self.links.insert((a, at_a), (b, at_b));
        self.links.insert((b, at_b), (a, at_a));
        let (peer_a, peer_b) = (self.peer(a), self.peer(b));
        self.regions[a].replica.link_opened(self.now, at_a, peer_b);
        self.regions[b].replica.link_opened(self.now, at_b, peer_a);
        self.settle();
    }

    fn cut(&mut self, a: usize, b: usize) {
        let found = self.links.iter().find(|((from, _), (to, _))| *from == a && *to == b);
        let (&(_, at_a), &(_, at_b)) = found.expect("they are linked");
        self.links.remove(&(a, at_a));
        self.links.remove(&(b, at_b));
        self.regions[a].replica.link_closed(self.now, at_a);
        self.regions[b].replica.link_closed(self.now, at_b);
        self.settle();
    }

    /// Appends `count` deletions to a region's own log: the simplest entries there are.
    fn write(&mut self, at: usize, count: u64) {
        let region = &mut self.regions[at];
        let log = region.log.entry(region.origin).or_default();
        let end = log.last().map_or((Seq(0), Chain::START), end_of);
        let entries: Vec<Entry> = (1..=count)
            .map(|number| Entry {
                document: document(at as u64 * 1_000_000 + end.0.0 + number),
                content: Content::Tombstone { deleted_at_ms: number },
            })
            .collect();
        region.documents.extend(entries.iter().map(|entry| entry.document.clone()));
        let run = LogSlice {
            first: Seq(end.0.0 + 1),
            last: Seq(end.0.0 + count),
            chain_before: end.1,
            body: encode_run(&entries).into(),
        };
        let (seq, chain) = end_of(&run);
        log.push(run);
        let progress =
            Progress { origin: region.origin, region: region.name.clone(), group: group(), seq, chain };
        region.replica.own_appended(self.now, progress);
        self.settle();
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(10) {
            self.now.0 += 10;
            self.regions.iter_mut().for_each(|region| region.replica.tick(self.now));
            self.settle();
        }
    }

    /// Performs every effect and delivers every frame.
    fn settle(&mut self) {
        loop {
            for at in 0..self.regions.len() {
                loop {
                    let effects = self.regions[at].replica.effects();
                    if effects.is_empty() {
                        break;
                    }
                    effects.into_iter().for_each(|effect| self.perform(at, effect));
                }
            }
            let Some((to, link, frame)) = self.queue.pop_front() else { return };
            self.regions[to].replica.receive(self.now, link, frame);
        }
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        let now = self.now;
        match effect {
            Effect::Send { link, frame } | Effect::SendCatchUp { link, frame } => {
                if let Some((to, there)) = self.links.get(&(at, link)).copied() {
                    self.sent.push((at, frame.clone()));
                    self.queue.push_back((to, there, frame));
                }
            }
            Effect::Close { reason, .. } => panic!("a link was closed: {reason}"),
            Effect::ReadLog { link, origin, after, .. } => {
                let region = &mut self.regions[at];
                let read = match region.floors.get(&origin) {
                    Some(floor) if *floor > after => LogRead::Truncated { floor: *floor },
                    _ => {
                        let runs = region.log.get(&origin).into_iter().flatten();
                        LogRead::Runs(runs.filter(|run| run.last > after).take(3).cloned().collect())
                    }
                };
                region.replica.log_read(now, link, origin, after, read);
            }
            Effect::Append(run) => {
                let region = &mut self.regions[at];
                region.documents.extend(run.entries.iter().map(|(document, _)| document.clone()));
                let log = region.log.entry(run.origin).or_default();
                let end = log.last().map_or(Seq(0), |run| run.last);
                assert!(run.first.0 == end.0 + 1 || !region.floors.is_empty(), "a gap");
                log.push(LogSlice {
                    first: run.first,
                    last: run.last,
                    chain_before: run.chain_before,
                    body: run.body,
                });
                region.replica.stored(now, run.origin, run.last, Stored::Durable);
            }
            Effect::ReadPage { link, after, .. } => {
                let region = &mut self.regions[at];
                let rest =
                    region.documents.iter().filter(|it| after.as_ref().is_none_or(|after| *it > after));
                let page: Vec<DocumentId> = rest.take(2).cloned().collect();
                let next = page.last().cloned().filter(|_| page.len() == 2);
                let (damaged, whole): (Vec<_>, Vec<_>) =
                    page.into_iter().partition(|it| region.damaged.contains(it));
                let page = Page {
                    documents: whole.iter().map(deleted).collect(),
                    missing: damaged.iter().map(missing).collect(),
                    next,
                };
                region.replica.page_read(now, link, Some(page));
            }
            Effect::StorePage { documents } => {
                let region = &mut self.regions[at];
                let documents = documents.into_iter().map(|it| it.document);
                let (damaged, whole): (Vec<_>, Vec<_>) =
                    documents.partition(|it| region.damaged.contains(it));
                region.documents.extend(whole);
                region.replica.page_stored(now, damaged.iter().map(missing).collect());
            }
            Effect::AdoptOrigins { origins, missing } => {
                let region = &mut self.regions[at];
                region.missing.extend(missing);
                for adopted in &origins {
                    region.floors.insert(adopted.origin, adopted.seq);
                    region.log.remove(&adopted.origin);
                }
                region.replica.adopted(now, &origins);
            }
            Effect::Acknowledged { .. } => {}
            Effect::OriginForked { origin, .. } => self.regions[at].forked.push(origin),
            Effect::OwnOriginLost { origin } => self.regions[at].lost.push(origin),
        }
    }

    fn seq(&self, at: usize, of: usize) -> u64 {
        let origin = self.regions[of].origin;
        let vector = self.regions[at].replica.vector();
        vector.iter().find(|it| it.origin == origin).map_or(0, |it| it.seq.0)
    }
}

fn end_of(run: &LogSlice) -> (Seq, Chain) {
    let entries = isobar_protocol::log::decode_run(&run.body).unwrap();
    let chain = run.chain_before.after_all(&entries);
    (run.last, chain)
}

fn deleted(document: &DocumentId) -> DocumentContents {
    DocumentContents {
        document: document.clone(),
        group: group(),
        deleted_at_ms: Some(1),
        base: None,
        changes: Vec::new(),
    }
}

fn missing(document: &DocumentId) -> MissingDocument {
    MissingDocument { document: document.clone(), group: group() }
}

#[test]
fn an_append_reaches_every_linked_region_once() {
    let mut world = World::new(&["a", "b", "c"]);
    world.link(0, 1);
    world.link(1, 2);
    world.link(0, 2);
    world.pass(2_000);
    world.sent.clear();
    world.write(0, 3);
    assert_eq!([world.seq(1, 0), world.seq(2, 0)], [3, 3]);
    let entries = world.sent.iter().filter(|(_, frame)| matches!(frame, LinkFrame::Entries { .. }));
    assert_eq!(entries.count(), 2, "one for each of the others");
}

#[test]
fn what_was_written_before_a_link_is_caught_up_on() {
    let mut world = World::new(&["a", "b"]);
    (0..20).for_each(|_| world.write(0, 7));
    world.write(1, 5);
    world.link(0, 1);
    assert_eq!([world.seq(1, 0), world.seq(0, 1)], [140, 5]);
    assert_eq!(world.regions[0].documents, world.regions[1].documents);
}

#[test]
fn a_third_region_relays_when_two_have_lost_each_other() {
    let mut world = World::new(&["a", "b", "c"]);
    world.link(0, 1);
    world.link(1, 2);
    world.link(0, 2);
    world.write(0, 1);
    world.cut(0, 2);
    world.write(0, 4);
    world.pass(3_000);
    assert_eq!(world.seq(2, 0), 5);
    world.link(0, 2);
    world.sent.clear();
    world.write(0, 1);
    world.pass(100);
    assert_eq!(world.seq(2, 0), 6);
    let relayed =
        world.sent.iter().filter(|(from, frame)| *from == 1 && matches!(frame, LinkFrame::Entries { .. }));
    assert_eq!(relayed.count(), 0, "the direct link has taken over");
}

#[test]
fn entries_that_come_twice_or_too_early_leave_no_trace() {
    let mut world = World::new(&["a", "b"]);
    world.link(0, 1);
    world.write(0, 2);
    world.write(0, 2);
    let frames: Vec<LinkFrame> = world.sent.iter().map(|(_, frame)| frame.clone()).collect();
    let link = *world.links.keys().find(|(region, _)| *region == 1).map(|(_, link)| link).unwrap();
    for frame in frames.iter().filter(|frame| matches!(frame, LinkFrame::Entries { .. })) {
        world.regions[1].replica.receive(world.now, link, frame.clone());
    }
    let LinkFrame::Entries { origin, chain, body, .. } =
        frames.iter().find(|frame| matches!(frame, LinkFrame::Entries { .. })).unwrap().clone()
    else {
        unreachable!()
    };
    world.regions[1].replica.receive(
        world.now,
        link,
        LinkFrame::Entries { origin, first: Seq(9), chain, body },
    );
    world.settle();
    assert_eq!(world.seq(1, 0), 4);
    assert!(world.regions[1].forked.is_empty());
    world.write(0, 1);
    world.pass(100);
    assert_eq!(world.seq(1, 0), 5);
}

#[test]
fn a_region_behind_a_truncated_log_fetches_documents_and_goes_on() {
    let mut world = World::new(&["a", "b"]);
    (0..5).for_each(|_| world.write(0, 3));
    let origin = world.regions[0].origin;
    world.regions[0].log.get_mut(&origin).unwrap().retain(|run| run.first.0 > 9);
    world.regions[0].floors.insert(origin, Seq(9));
    world.link(0, 1);
    world.pass(1_000);
    assert_eq!(world.seq(1, 0), 15);
    assert_eq!(world.regions[0].documents, world.regions[1].documents);
    world.write(0, 2);
    world.pass(100);
    assert_eq!(world.seq(1, 0), 17);
}

#[test]
fn two_logs_under_one_origin_are_never_mixed() {
    let mut world = World::new(&["a", "b"]);
    world.link(0, 1);
    world.write(0, 3);
    world.cut(0, 1);
    // The region's database goes back, and other entries get the same numbers.
    let origin = world.regions[0].origin;
    world.regions[0].log.clear();
    world.regions[0].replica = Replica::new(
        world.regions[0].name.clone(),
        BTreeSet::from([group()]),
        Vec::new(),
        BTreeSet::from([origin]),
    );
    let log = Entry { document: document(77), content: Content::Tombstone { deleted_at_ms: 9 } };
    let body: Bytes = encode_run([&log, &log, &log, &log]).into();
    let run = LogSlice { first: Seq(1), last: Seq(4), chain_before: Chain::START, body };
    let (seq, chain) = end_of(&run);
    world.regions[0].log.insert(origin, vec![run]);
    let region = world.regions[0].name.clone();
    world.regions[0].replica.own_appended(world.now, Progress { origin, region, group: group(), seq, chain });
    world.link(0, 1);
    world.pass(1_000);
    assert_eq!(world.seq(1, 0), 3, "nothing of the second log was taken");
    assert!(!world.regions[1].documents.contains(&document(77)));
    assert!(world.regions.iter().any(|region| region.forked == [origin]));
}

#[test]
fn a_peer_that_has_more_of_an_own_origin_shows_that_it_was_lost() {
    let mut world = World::new(&["a", "b"]);
    world.link(0, 1);
    world.write(0, 3);
    world.cut(0, 1);
    let origin = world.regions[0].origin;
    world.regions[0].log.clear();
    let name = world.regions[0].name.clone();
    let own = BTreeSet::from([origin]);
    world.regions[0].replica = Replica::new(name, BTreeSet::from([group()]), Vec::new(), own);
    world.write(0, 1);
    world.link(0, 1);
    assert!(world.regions[0].lost.contains(&origin));
}

#[test]
fn what_a_sibling_stores_is_sent_and_neither_taken_back_nor_taken_for_lost() {
    let mut world = World::new(&["a", "b"]);
    world.link(0, 1);
    let sibling = OriginId(Uuid::from_u128(99));
    let entry = Entry { document: document(77), content: Content::Tombstone { deleted_at_ms: 9 } };
    let mut end = (Seq(0), Chain::START);
    for _ in 0..5 {
        let body = encode_run([&entry, &entry]).into();
        let run = LogSlice { first: Seq(end.0.0 + 1), last: Seq(end.0.0 + 2), chain_before: end.1, body };
        end = end_of(&run);
        world.regions[0].log.entry(sibling).or_default().push(run);
        let progress = of_sibling(&world, sibling, end);
        world.regions[0].replica.sibling_appended(world.now, progress);
        world.settle();
        world.pass(500);
        assert_eq!(seq_of(&world, 1, sibling), end.0);
    }
    let taken_back = |(from, frame): &(usize, LinkFrame)| {
        *from == 1 && matches!(frame, LinkFrame::Entries { origin, .. } if *origin == sibling)
    };
    assert!(!world.sent.iter().any(taken_back), "it went to and fro");
    let asked = |(from, frame): &(usize, LinkFrame)| {
        *from == 0 && matches!(frame, LinkFrame::Subscribe { origin, .. } if *origin == sibling)
    };
    assert!(!world.sent.iter().any(asked), "the database has it already");

    // Another node of the region has passed more of it on than this one knows of.
    let more = Progress { seq: Seq(12), ..of_sibling(&world, sibling, (Seq(12), Chain([7; 16]))) };
    let link = *world.links.keys().find(|(region, _)| *region == 0).map(|(_, link)| link).unwrap();
    world.regions[0].replica.receive(world.now, link, LinkFrame::Have { origins: vec![more] });
    world.settle();
    world.pass(500);
    assert_eq!(world.regions[0].lost, []);
    // What is behind changes nothing.
    let behind = of_sibling(&world, sibling, (Seq(1), Chain([8; 16])));
    world.regions[0].replica.sibling_appended(world.now, behind);
    assert_eq!(seq_of(&world, 0, sibling), Seq(10));
}

fn of_sibling(world: &World, origin: OriginId, (seq, chain): (Seq, Chain)) -> Progress {
    Progress { origin, region: world.regions[0].name.clone(), group: group(), seq, chain }
}

fn seq_of(world: &World, at: usize, origin: OriginId) -> Seq {
    let vector = world.regions[at].replica.vector();
    vector.iter().find(|it| it.origin == origin).map_or(Seq(0), |it| it.seq)
}

#[test]
fn what_a_snapshot_lacks_is_noted_when_its_vector_is_adopted_and_holds_up_nothing() {
    let mut world = World::new(&["a", "b"]);
    (0..5).for_each(|_| world.write(0, 3));
    let origin = world.regions[0].origin;
    world.regions[0].log.remove(&origin);
    world.regions[0].floors.insert(origin, Seq(15));
    let [not_given, not_stored] = [document(4), document(11)];
    world.regions[0].damaged.insert(not_given.clone());
    world.regions[1].damaged.insert(not_stored.clone());
    world.link(0, 1);
    world.pass(1_000);
    assert_eq!(world.seq(1, 0), 15);
    assert_eq!(world.regions[1].missing, [missing(&not_given), missing(&not_stored)]);
    let mut expected = world.regions[0].documents.clone();
    expected.retain(|it| *it != not_given && *it != not_stored);
    assert_eq!(world.regions[1].documents, expected);
}
