use uuid::Uuid;

use super::*;

const NEAR: OriginId = OriginId(Uuid::from_u128(1));
const FAR: OriginId = OriginId(Uuid::from_u128(2));
const LINK: LinkId = LinkId(1);
const OTHER: LinkId = LinkId(2);
const START: Moment = Moment(1_000);

/// What peers have announced.
#[derive(Default)]
struct Positions(BTreeMap<(LinkId, OriginId), Seq>);

impl Positions {
    fn announce(&mut self, link: LinkId, origin: OriginId, seq: u64) {
        self.0.insert((link, origin), Seq(seq));
    }
}

impl Announced for Positions {
    fn covers(&self, link: LinkId, target: &Target) -> bool {
        target.iter().all(|(origin, seq)| self.0.get(&(link, *origin)).is_some_and(|theirs| theirs >= seq))
    }
}

fn document(number: u8) -> DocumentId {
    DocumentId::from_slice(&[number; 16]).unwrap()
}

fn subject(number: u8) -> Subject {
    Subject::here(document(number))
}

fn group(name: &str) -> PlacementGroup {
    PlacementGroup::new(name).unwrap()
}

fn heads(number: u8) -> Vec<ChangeHash> {
    vec![ChangeHash([number; 32])]
}

fn checkpoint(baseline: u64, head: u8, target: &[(OriginId, u64)]) -> Checkpoint {
    let mut logs = Target::default();
    target.iter().for_each(|(origin, seq)| logs.raise(*origin, Seq(*seq)));
    Checkpoint { baseline: Baseline(baseline), heads: heads(head), is_closed: true, target: Arc::new(logs) }
}

struct Scene {
    receipts: Receipts,
    positions: Positions,
}

impl Scene {
    /// Links to two regions of the group "all", of which the second is in "pair" as well.
    fn new() -> Self {
        let mut scene = Self { receipts: Receipts::default(), positions: Positions::default() };
        scene.open(LINK, &["all"]);
        scene.open(OTHER, &["all", "pair"]);
        scene
    }

    fn open(&mut self, link: LinkId, groups: &[&str]) -> Vec<Effect> {
        let groups = groups.iter().map(|name| group(name)).collect();
        self.receipts.link_opened(START, link, groups, &self.positions);
        self.receipts.effects()
    }

    fn close(&mut self, link: LinkId) {
        self.positions.0.retain(|(of, _), _| *of != link);
        self.receipts.link_closed(link);
    }

    fn observe(&mut self, name: &str, checkpoint: Checkpoint) -> Vec<Effect> {
        self.receipts.observe(START, subject(1), group(name), checkpoint, &self.positions);
        self.receipts.effects()
    }

    fn announce(&mut self, link: LinkId, origin: OriginId, seq: u64) -> Vec<Effect> {
        self.positions.announce(link, origin, seq);
        self.receipts.announced(START, link, &self.positions);
        self.receipts.effects()
    }

    fn answer(&mut self, link: LinkId, request: u64, has: bool) -> Vec<Effect> {
        self.receipts.answered(START, link, request, has, &self.positions);
        self.receipts.effects()
    }

    fn tick(&mut self, at_ms: u64) -> Vec<Effect> {
        self.receipts.tick(Moment(START.0 + at_ms), &self.positions);
        self.receipts.effects()
    }
}

fn reached(link: LinkId, head: u8) -> Effect {
    Effect::Reached { link, subject: subject(1), heads: heads(head) }
}

/// The request of the only effect, which asks for these heads.
fn asked(effects: &[Effect], on: LinkId, head: u8) -> u64 {
    match effects {
        [Effect::Ask { link, request, document: of, heads: asked }] => {
            assert_eq!((*link, of, asked), (on, &document(1), &heads(head)));
            *request
        }
        other => panic!("one question is expected: {other:?}"),
    }
}

#[test]
fn a_peer_that_has_every_log_so_far_has_the_document() {
    let mut scene = Scene::new();
    assert_eq!(scene.observe("all", checkpoint(0, 1, &[(NEAR, 5), (FAR, 2)])), []);
    assert_eq!(scene.announce(LINK, NEAR, 5), [], "the other log may have brought some of it");
    assert_eq!(scene.announce(LINK, FAR, 1), []);
    assert_eq!(scene.announce(LINK, FAR, 2), [reached(LINK, 1)]);
    assert_eq!(scene.announce(LINK, FAR, 3), [], "once");
    // The same again is no news, also to those who have it.
    assert_eq!(scene.observe("all", checkpoint(0, 1, &[(NEAR, 9), (FAR, 3)])), []);
}

#[test]
fn newer_heads_follow_when_the_logs_are_there() {
    let mut scene = Scene::new();
    scene.observe("all", checkpoint(0, 1, &[(NEAR, 5)]));
    scene.observe("all", checkpoint(0, 2, &[(NEAR, 6)]));
    scene.observe("all", checkpoint(0, 3, &[(NEAR, 7)]));
    assert_eq!(scene.announce(LINK, NEAR, 5), [reached(LINK, 1)]);
    assert_eq!(scene.announce(LINK, NEAR, 6), [], "between the two nothing is remembered");
    assert_eq!(scene.announce(LINK, NEAR, 7), [reached(LINK, 3)]);
    assert_eq!(scene.announce(OTHER, NEAR, 7), [reached(OTHER, 1), reached(OTHER, 3)]);
}

#[test]
fn a_region_outside_of_the_group_is_neither_asked_nor_counted() {
    let mut scene = Scene::new();
    let request = asked(&scene.observe("pair", checkpoint(4, 1, &[(NEAR, 5)])), OTHER, 1);
    assert_eq!(scene.announce(LINK, NEAR, 5), []);
    assert_eq!(scene.answer(LINK, request, true), []);
    assert_eq!(scene.answer(OTHER, request, true), [reached(OTHER, 1)]);
}

#[test]
fn what_came_otherwise_than_by_logs_is_asked_for_once() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    scene.announce(LINK, NEAR, 5);
    let request = asked(&scene.observe("all", checkpoint(7, 1, &[(NEAR, 5)])), LINK, 1);
    assert_eq!(scene.announce(LINK, NEAR, 9), [], "how far its logs are says nothing");
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
    assert_eq!(scene.observe("all", checkpoint(7, 2, &[(NEAR, 10)])), []);
    assert_eq!(scene.announce(LINK, NEAR, 10), [reached(LINK, 2)], "now they do");
    // Something came in again.
    let request = asked(&scene.observe("all", checkpoint(8, 3, &[(NEAR, 10)])), LINK, 3);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 3)]);
}

#[test]
fn heads_with_changes_waiting_beside_them_prove_only_themselves() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    scene.announce(LINK, NEAR, 5);
    let open = Checkpoint { is_closed: false, ..checkpoint(7, 1, &[(NEAR, 5)]) };
    let request = asked(&scene.observe("all", open), LINK, 1);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
    // What waited has found its place: no log need have brought it.
    let request = asked(&scene.observe("all", checkpoint(7, 2, &[(NEAR, 5)])), LINK, 2);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 2)]);
    assert_eq!(scene.observe("all", checkpoint(7, 3, &[(NEAR, 5)])), [reached(LINK, 3)]);
}

#[test]
fn a_denial_is_asked_again_when_the_logs_are_there_or_time_has_passed() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    let request = asked(&scene.observe("all", checkpoint(7, 1, &[(NEAR, 5)])), LINK, 1);
    assert_eq!(scene.answer(LINK, request, false), []);
    assert_eq!(scene.announce(LINK, NEAR, 4), []);
    let request = asked(&scene.announce(LINK, NEAR, 5), LINK, 1);
    assert_eq!(scene.answer(LINK, request, false), []);
    assert_eq!(scene.announce(LINK, NEAR, 6), [], "the logs cannot be why");
    assert_eq!(scene.tick(RECEIPT_ASK_AGAIN_MS - 1), []);
    let request = asked(&scene.tick(RECEIPT_ASK_AGAIN_MS + RECEIPT_LOOK_EVERY_MS), LINK, 1);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
    assert_eq!(scene.tick(10 * RECEIPT_ASK_AGAIN_MS), []);
}

#[test]
fn logs_that_do_not_get_there_are_made_up_for_by_a_question() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    scene.observe("all", checkpoint(0, 1, &[(NEAR, 5), (FAR, 9)]));
    assert_eq!(scene.announce(LINK, NEAR, 5), [], "the far one is forked, say");
    assert_eq!(scene.tick(1), []);
    let request = asked(&scene.tick(RECEIPT_ASK_AGAIN_MS + RECEIPT_LOOK_EVERY_MS), LINK, 1);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
}

#[test]
fn nothing_of_a_link_that_ended_counts_on_the_next() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    scene.announce(LINK, NEAR, 5);
    let request = asked(&scene.observe("all", checkpoint(7, 1, &[(NEAR, 5)])), LINK, 1);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
    scene.close(LINK);
    // The region has lost it: its logs are shorter, and it says no.
    let next = LinkId(3);
    let request = asked(&scene.open(next, &["all"]), next, 1);
    assert_eq!(scene.answer(LINK, request, true), [], "that link is gone");
    assert_eq!(scene.answer(next, request, false), []);
    assert_eq!(scene.announce(next, NEAR, 4), []);
    let request = asked(&scene.announce(next, NEAR, 5), next, 1);
    assert_eq!(scene.answer(next, request, true), [reached(next, 1)]);
}

#[test]
fn a_document_that_nobody_follows_is_forgotten() {
    let mut scene = Scene::new();
    scene.observe("all", checkpoint(0, 1, &[(NEAR, 5)]));
    scene.receipts.forget(&subject(1));
    assert_eq!(scene.announce(LINK, NEAR, 5), []);
    assert_eq!(scene.open(LinkId(3), &["all"]), []);
    let waiting = scene.receipts.links.values().flat_map(|link| link.waiting.values().flatten());
    assert_eq!(waiting.count(), 0);
    assert!(scene.receipts.links.values().all(|link| link.standings.is_empty()));
    // Followed again it is told again.
    assert_eq!(scene.observe("all", checkpoint(0, 1, &[(NEAR, 5)])), [reached(LINK, 1)]);
}

#[test]
fn questions_under_way_are_bounded_and_none_is_lost() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    let count = 3 * RECEIPT_QUESTIONS_MAX as u8;
    let mut under_way = Vec::new();
    for number in 0..count {
        let checkpoint = checkpoint(7, number, &[]);
        scene.receipts.observe(START, subject(number), group("all"), checkpoint, &scene.positions);
        under_way.extend(scene.receipts.effects());
    }
    assert_eq!(under_way.len(), RECEIPT_QUESTIONS_MAX);
    let mut told = 0;
    while let Some(effect) = under_way.pop() {
        let Effect::Ask { request, .. } = effect else {
            told += 1;
            continue;
        };
        under_way.extend(scene.answer(LINK, request, true));
        assert!(scene.receipts.links[&LINK].asked.len() <= RECEIPT_QUESTIONS_MAX);
    }
    assert_eq!(told, count);
}

#[test]
fn a_question_that_is_never_answered_is_asked_again() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    asked(&scene.observe("all", checkpoint(7, 1, &[(NEAR, 5)])), LINK, 1);
    assert_eq!(scene.tick(RECEIPT_ANSWER_PATIENCE_MS - 1), []);
    assert_eq!(scene.tick(RECEIPT_ANSWER_PATIENCE_MS + RECEIPT_LOOK_EVERY_MS), [], "it counts as denied");
    let again = RECEIPT_ANSWER_PATIENCE_MS + RECEIPT_ASK_AGAIN_MS + 2 * RECEIPT_LOOK_EVERY_MS;
    asked(&scene.tick(again), LINK, 1);
}

#[test]
fn what_is_known_of_one_nodes_document_says_nothing_of_anothers() {
    let mut scene = Scene::new();
    scene.close(OTHER);
    scene.announce(LINK, NEAR, 5);
    let sibling = Observer(Uuid::from_u128(1));
    let of = |observer| Subject { observer, ..subject(1) };
    let observe = |scene: &mut Scene, observer, checkpoint| {
        scene.receipts.observe(START, of(observer), group("all"), checkpoint, &scene.positions);
        scene.receipts.effects()
    };
    let request = asked(&scene.observe("all", checkpoint(7, 1, &[(NEAR, 5)])), LINK, 1);
    assert_eq!(scene.answer(LINK, request, true), [reached(LINK, 1)]);
    // The sibling numbers its baselines on its own, and has something else by the same number.
    let request = asked(&observe(&mut scene, sibling, checkpoint(7, 2, &[(NEAR, 5)])), LINK, 2);
    assert_eq!(scene.observe("all", checkpoint(7, 3, &[(NEAR, 5)])), [reached(LINK, 3)]);
    assert_eq!(scene.answer(LINK, request, false), []);
    assert_eq!(observe(&mut scene, sibling, checkpoint(7, 4, &[(NEAR, 5)])), []);

    scene.receipts.forget_observer(sibling);
    assert_eq!(scene.receipts.followed.keys().collect::<Vec<_>>(), [&subject(1)]);
    let theirs = observe(&mut scene, sibling, checkpoint(0, 4, &[(NEAR, 5)]));
    assert_eq!(theirs, [Effect::Reached { link: LINK, subject: of(sibling), heads: heads(4) }]);
}
