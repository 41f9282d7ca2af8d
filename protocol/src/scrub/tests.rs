use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Holdings = BTreeMap<DocumentId, Fingerprint>;

fn id(number: u64) -> DocumentId {
    DocumentId::from_slice(&number.to_be_bytes()).unwrap()
}

fn changes(heads: &[ChangeHash], pending: &[ChangeHash]) -> Held {
    Held::Changes { heads: heads.iter().copied().collect(), pending: pending.iter().copied().collect() }
}

/// The differences of a report, and whether there are more.
fn told(report: &Report) -> (BTreeMap<DocumentId, Difference>, bool) {
    let difference = |(document, seen): (&DocumentId, &Seen)| {
        (document.clone(), seen.difference().expect("only what differs is reported"))
    };
    (report.differences.iter().map(difference).collect(), report.more)
}

fn print(number: u64) -> Fingerprint {
    fingerprint(&id(number), &changes(&[], &[]))
}

fn held(numbers: impl IntoIterator<Item = u64>) -> Holdings {
    numbers.into_iter().map(|number| (id(number), print(number))).collect()
}

fn answered(prefix: &[u8], holdings: &Holdings) -> Fingerprints {
    answer(prefix, holdings.clone()).unwrap()
}

/// Runs a scrub to its end, and returns what was asked too.
fn scrubbed(theirs: &Holdings, ours: &Holdings) -> (Report, Vec<Vec<u8>>) {
    let (mut scrub, first) = Scrub::new();
    let (mut asked, mut to_ask) = (Vec::new(), vec![first]);
    while let Some(prefix) = to_ask.pop() {
        assert!(!asked.contains(&prefix), "asked twice for {prefix:?}");
        let next = scrub.answer(&prefix, &answered(&prefix, theirs), &answered(&prefix, ours)).unwrap();
        asked.push(prefix);
        to_ask.extend(next);
        assert!(to_ask.len() <= OPEN_REQUESTS_MAX);
        assert_eq!(scrub.is_finished(), to_ask.is_empty());
    }
    (scrub.into_report(), asked)
}

/// The differences there are.
fn expected(theirs: &Holdings, ours: &Holdings) -> BTreeMap<DocumentId, Difference> {
    let difference = |document| match (theirs.get(document), ours.get(document)) {
        (Some(_), None) => Some(Difference::MissingHere),
        (None, Some(_)) => Some(Difference::MissingThere),
        (their, our) => (their != our).then_some(Difference::Different),
    };
    let documents = theirs.keys().chain(ours.keys());
    documents.filter_map(|document| Some((document.clone(), difference(document)?))).collect()
}

/// Both sides from one base of `count` documents, changed here and there.
fn changed(count: u64, changes: &[(u64, u8)]) -> (Holdings, Holdings) {
    let (mut theirs, mut ours) = (held(0..count), held(0..count));
    for (number, kind) in changes {
        let document = id(*number);
        match kind % 4 {
            0 => _ = theirs.remove(&document),
            1 => _ = ours.remove(&document),
            2 => _ = theirs.insert(document, [1; 16]),
            _ => _ = ours.insert(document, [2; 16]),
        }
    }
    (theirs, ours)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn small_sets_differ_in_exactly_what_is_found(
        changes in prop::collection::vec((0..300_u64, any::<u8>()), 0..80), count in 0..250_u64,
    ) {
        let (theirs, ours) = changed(count, &changes);
        let (report, _) = scrubbed(&theirs, &ours);
        prop_assert_eq!(told(&report), (expected(&theirs, &ours), false));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]
    /// Sets that are told by buckets first, also where one side lists what the other cannot.
    #[test]
    fn large_sets_differ_in_exactly_what_is_found(
        changes in prop::collection::vec((0..9_500_u64, any::<u8>()), 0..8), count in 4_000..9_000_u64,
        cut in 0..3_usize,
    ) {
        let (mut theirs, mut ours) = changed(count, &changes);
        // One side is without a stretch, so that it may be small enough for a list.
        let stretch = |holdings: &mut Holdings| holdings.retain(|document, _| *document < id(count - 30));
        match cut {
            0 => stretch(&mut theirs),
            1 => stretch(&mut ours),
            _ => {}
        }
        let (report, _) = scrubbed(&theirs, &ours);
        prop_assert_eq!(told(&report), (expected(&theirs, &ours), false));
    }
}

#[test]
fn equal_sets_cost_one_request() {
    for count in [0, 100, 20_000] {
        let (report, asked) = scrubbed(&held(0..count), &held(0..count));
        assert_eq!((report, asked), (Report::default(), vec![vec![]]));
    }
}

#[test]
fn only_buckets_that_differ_are_asked_for() {
    let theirs = held(0..20_000);
    let mut ours = theirs.clone();
    ours.remove(&id(77));
    let (report, asked) = scrubbed(&theirs, &ours);
    assert_eq!(told(&report).0, BTreeMap::from([(id(77), Difference::MissingHere)]));
    assert_eq!(asked, [vec![], bucket(&id(77))[..1].to_vec()]);
}

#[test]
fn a_report_is_bounded_and_says_that_there_is_more() {
    let (report, asked) = scrubbed(&held(0..DIFFERENCES_MAX as u64 * 2), &Holdings::new());
    assert_eq!(report.differences.len(), DIFFERENCES_MAX);
    assert!(report.more);
    assert!(asked.len() < SCRUB_BUCKETS, "a full report is not asked for more");
    assert!(told(&report).0.values().all(|difference| *difference == Difference::MissingHere));
}

#[test]
fn a_report_that_is_just_full_has_no_more() {
    let (report, _) = scrubbed(&held(0..DIFFERENCES_MAX as u64), &Holdings::new());
    assert_eq!((report.differences.len(), report.more), (DIFFERENCES_MAX, false));
}

/// Documents that all fall below one prefix of two bytes, in the order of their ids.
fn crowd(count: usize) -> (Vec<u8>, Vec<(DocumentId, Fingerprint)>) {
    let prefix = bucket(&id(0))[..2].to_vec();
    let mut documents: Vec<_> =
        (0..).map(id).filter(|document| bucket(document).starts_with(&prefix)).take(count).collect();
    documents.sort();
    (prefix, documents.into_iter().map(|document| (document, [0; 16])).collect())
}

#[test]
fn the_longest_prefix_lists_documents_however_many() {
    let (prefix, documents) = crowd(20);
    let other = (id(1), [3; 16]);
    let found = answer(&prefix, documents.iter().cloned().chain([other.clone()])).unwrap();
    assert!(!bucket(&other.0).starts_with(&prefix), "what is elsewhere is left out");
    assert_eq!(found, Fingerprints::Documents(documents));
    assert_eq!(answer(&[1, 2, 3], []), None);
}

#[test]
fn lists_are_sorted_whatever_order_documents_are_read_in() {
    let documents: Vec<_> = held(0..50).into_iter().collect();
    let backwards = answer(&[], documents.iter().rev().cloned()).unwrap();
    assert_eq!(backwards, Fingerprints::Documents(documents));
}

#[test]
fn a_list_that_is_cut_says_nothing_of_what_is_behind_it() {
    // The comparison itself: nobody checks here where the documents fall.
    let all: Vec<_> = (0..SCRUB_DOCUMENTS_MAX as u64 + 9).map(|number| (id(number), [0; 16])).collect();
    let cut = &all[..SCRUB_DOCUMENTS_MAX];
    let mut ours = all[3..].to_vec();
    ours.truncate(SCRUB_DOCUMENTS_MAX);
    let (mut scrub, _) = Scrub::new();
    scrub.compare(cut, &ours);
    let report = scrub.into_report();
    let missing = [0, 1, 2].map(|number| (id(number), Difference::MissingHere));
    assert_eq!(told(&report), (missing.into(), true));
    let (mut scrub, _) = Scrub::new();
    scrub.compare(&ours, cut);
    let missing = [0, 1, 2].map(|number| (id(number), Difference::MissingThere));
    assert_eq!(told(&scrub.into_report()), (missing.into(), true));
}

#[test]
fn answers_that_cannot_be_are_refused_and_change_nothing() {
    let none = Fingerprints::Documents(Vec::new());
    let full = |count| Fingerprints::Buckets(vec![(1, [1; 16]); count]);
    let (mut scrub, _) = Scrub::new();
    assert_eq!(scrub.answer(&[1], &none, &none), Err(ScrubError::NotAsked));
    assert_eq!(scrub.answer(&[], &full(255), &none), Err(ScrubError::Buckets(255)));
    let twice = Fingerprints::Documents(vec![(id(1), [0; 16]), (id(1), [1; 16])]);
    assert_eq!(scrub.answer(&[], &twice, &none), Err(ScrubError::Misplaced));
    let next = scrub.answer(&[], &full(256), &none).unwrap();
    assert_eq!(next, [[0], [1], [2], [3]]);
    let elsewhere = (0..).map(id).find(|document| bucket(document)[0] != 0).unwrap();
    let elsewhere = Fingerprints::Documents(vec![(elsewhere, [0; 16])]);
    assert_eq!(scrub.answer(&[0], &elsewhere, &none), Err(ScrubError::Misplaced));
    assert_eq!(scrub.answer(&[0], &full(256), &none).unwrap(), [[4]]);
    assert_eq!(scrub.answer(&[0], &none, &none), Err(ScrubError::NotAsked), "an answer counts once");
    for first in 1..=u8::MAX {
        scrub.answer(&[first], &none, &none).unwrap();
    }
    assert_eq!(scrub.answer(&[0, 0], &full(256), &none), Err(ScrubError::TooDeep));
    assert!(!scrub.is_finished());
    assert_eq!(scrub.into_report(), Report::default());
}

#[test]
fn a_fingerprint_depends_on_all_that_it_stands_for() {
    let (one, other) = (ChangeHash([1; 32]), ChangeHash([2; 32]));
    let all = [
        (id(1), changes(&[one, other], &[])),
        (id(2), changes(&[one, other], &[])),
        (id(1), changes(&[one], &[])),
        (id(1), changes(&[one], &[other])),
        (id(1), changes(&[], &[one, other])),
        (id(1), changes(&[], &[])),
        (id(1), Held::Deleted),
        (id(2), Held::Deleted),
    ];
    let prints: BTreeSet<Fingerprint> = all.iter().map(|(id, held)| fingerprint(id, held)).collect();
    assert_eq!(prints.len(), all.len());
    assert_eq!(fingerprint(&id(1), &changes(&[other, one], &[])), fingerprint(&all[0].0, &all[0].1));
}
