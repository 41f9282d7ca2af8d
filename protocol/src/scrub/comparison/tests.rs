use std::collections::BTreeSet;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::ids::{ChangeHash, OriginId, Seq};
use crate::scrub::{Held, answer, fingerprint};

const ORIGINS: [OriginId; 2] = [OriginId(Uuid::from_u128(1)), OriginId(Uuid::from_u128(2))];

fn id(number: u8) -> DocumentId {
    DocumentId::from_slice(&[number]).unwrap()
}

/// Two regions that write a log each and take each other's, in order. What they hold of a document are entries of the logs.
#[derive(Debug, Clone, Default)]
struct Pair {
    logs: [Vec<u8>; 2],
    /// How far each side has each log.
    vectors: [[usize; 2]; 2],
    /// Entries that a side has lost.
    lost: [BTreeSet<(usize, usize)>; 2],
}

impl Pair {
    fn write(&mut self, side: usize, document: u8) {
        self.logs[side].push(document);
        self.vectors[side][side] = self.logs[side].len();
    }

    /// A side takes some entries of the other's log.
    fn take(&mut self, side: usize, entries: usize) {
        let theirs = 1 - side;
        self.vectors[side][theirs] = (self.vectors[side][theirs] + entries).min(self.logs[theirs].len());
    }

    fn prints(&self, side: usize) -> BTreeMap<DocumentId, Fingerprint> {
        let mut held: BTreeMap<DocumentId, BTreeSet<ChangeHash>> = BTreeMap::new();
        for (log, entries) in self.logs.iter().enumerate() {
            for (at, document) in entries.iter().enumerate().take(self.vectors[side][log]) {
                if !self.lost[side].contains(&(log, at)) {
                    let hash = ChangeHash([log as u8 * 128 + at as u8; 32]);
                    held.entry(id(*document)).or_default().insert(hash);
                }
            }
        }
        let print = |(document, heads): (DocumentId, BTreeSet<ChangeHash>)| {
            let print = fingerprint(&document, &Held::Changes { heads, pending: BTreeSet::new() });
            (document, print)
        };
        held.into_iter().map(print).collect()
    }

    fn target(&self, side: usize) -> Target {
        let mut target = Target::default();
        (0..2).for_each(|log| target.raise(ORIGINS[log], Seq(self.vectors[side][log] as u64)));
        target
    }

    fn has(&self, side: usize, target: &Target) -> bool {
        let at = |origin: &OriginId| self.vectors[side][usize::from(*origin == ORIGINS[1])] as u64;
        target.iter().all(|(origin, seq)| seq.0 <= at(origin))
    }

    fn listed(&self, side: usize, asked: &[DocumentId]) -> Vec<(DocumentId, Fingerprint)> {
        self.prints(side).into_iter().filter(|(document, _)| asked.contains(document)).collect()
    }

    /// Side 0 compares itself with side 1; between any two steps `meanwhile` happens.
    fn compared(&mut self, mut meanwhile: impl FnMut(&mut Self)) -> Verdict {
        let (mut comparison, mut step) = Comparison::begin();
        loop {
            step = match step {
                Step::AskPrefix(prefix) => {
                    let ours = answer(&prefix, self.prints(0)).unwrap();
                    meanwhile(self);
                    let theirs = answer(&prefix, self.prints(1)).unwrap();
                    comparison.answered(&prefix, &theirs, &ours).unwrap().remove(0)
                }
                Step::AskPositions => {
                    let ours = self.target(0);
                    meanwhile(self);
                    comparison.placed(Cut { ours, theirs: self.target(1) });
                    while !comparison
                        .awaited()
                        .is_some_and(|cut| self.has(1, &cut.ours) && self.has(0, &cut.theirs))
                    {
                        meanwhile(self);
                        (0..2).for_each(|side| self.take(side, 1));
                    }
                    comparison.reached().unwrap()
                }
                Step::AskDocuments(asked) => {
                    let ours = self.listed(0, &asked);
                    meanwhile(self);
                    let theirs = self.listed(1, &asked);
                    comparison.looked_again(&theirs, &ours).unwrap()
                }
                Step::Finish(verdict) => return verdict,
            };
            meanwhile(self);
        }
    }
}

/// Something that happens: a side writes to a document, or takes some of the other's log.
fn events() -> impl Strategy<Value = Vec<(usize, u8, bool)>> {
    prop::collection::vec((0..2_usize, 0..6_u8, any::<bool>()), 0..60)
}

fn happen(pair: &mut Pair, (side, number, writes): (usize, u8, bool)) {
    match writes {
        true => pair.write(side, number),
        false => pair.take(side, usize::from(number)),
    }
}

proptest! {
    #[test]
    fn nothing_is_found_where_nothing_was_lost(before in events(), during in events(), pace in 1..4_usize) {
        let mut pair = Pair::default();
        before.into_iter().for_each(|event| happen(&mut pair, event));
        let mut during = during.into_iter();
        let verdict = pair.compared(|pair| during.by_ref().take(pace).for_each(|event| happen(pair, event)));
        prop_assert_eq!(verdict.differences, BTreeMap::new());
    }

    #[test]
    fn what_was_lost_is_found_exactly_if_its_document_is_quiet(
        before in events(), during in events(), side in 0..2_usize, which in any::<prop::sample::Index>(),
    ) {
        let mut pair = Pair::default();
        // Another document than those that are written to.
        pair.write(0, 9);
        pair.write(1, 9);
        before.into_iter().for_each(|event| happen(&mut pair, event));
        (0..2).for_each(|side| pair.take(side, 200));
        let entries = [(0, 0), (1, 0)];
        pair.lost[side].insert(entries[which.index(2)]);
        let mut during = during.into_iter();
        let verdict = pair.compared(|pair| during.by_ref().take(1).for_each(|event| happen(pair, event)));
        let found: Vec<(DocumentId, Difference)> = verdict.kinds().map(|(id, kind)| (id.clone(), kind)).collect();
        prop_assert_eq!(found, [(id(9), Difference::Different)]);
    }
}

#[test]
fn equal_regions_are_not_asked_for_positions() {
    let mut pair = Pair::default();
    pair.write(0, 1);
    pair.take(1, 1);
    assert_eq!(pair.compared(|_| {}), Verdict::default());
}

#[test]
fn a_document_that_is_written_to_all_the_time_is_counted_as_moving() {
    let mut pair = Pair::default();
    let mut room = 100;
    let verdict = pair.compared(|pair| {
        if room > 0 {
            room -= 1;
            pair.write(1, 5);
        }
    });
    assert_eq!((verdict.differences.len(), verdict.moving), (0, 1));
}

#[test]
fn what_comes_at_the_wrong_moment_or_was_not_asked_for_changes_nothing() {
    let (mut comparison, _) = Comparison::begin();
    let none = Fingerprints::Documents(Vec::new());
    let one = Fingerprints::Documents(vec![(id(1), [1; 16])]);
    assert_eq!(comparison.looked_again(&[], &[]), Err(ScrubError::NotAsked));
    assert_eq!(comparison.reached(), None);
    comparison.placed(Cut { ours: Target::default(), theirs: Target::default() });
    assert_eq!(comparison.awaited(), None, "nothing was seen yet");
    assert_eq!(comparison.answered(&[], &one, &none), Ok(vec![Step::AskPositions]));
    assert_eq!(comparison.answered(&[], &one, &none), Err(ScrubError::NotAsked));
    comparison.placed(Cut { ours: Target::default(), theirs: Target::default() });
    assert_eq!(comparison.reached(), Some(Step::AskDocuments(vec![id(1)])));
    assert_eq!(comparison.looked_again(&[(id(2), [1; 16])], &[]), Err(ScrubError::NotWanted));
    let seen = Seen { theirs: Some([1; 16]), ours: None };
    let verdict = Verdict { differences: BTreeMap::from([(id(1), seen)]), ..Verdict::default() };
    assert_eq!(comparison.looked_again(&[(id(1), [1; 16])], &[]), Ok(Step::Finish(verdict)));
    assert_eq!(comparison.looked_again(&[], &[]), Err(ScrubError::NotAsked));
}

#[test]
fn many_documents_are_looked_at_again_some_at_a_time() {
    let many: Vec<(DocumentId, Fingerprint)> = (0..SCRUB_DOCUMENTS_ASKED_MAX as u32 + 3)
        .map(|number| (DocumentId::from_slice(&number.to_be_bytes()).unwrap(), [7; 16]))
        .collect();
    let (mut comparison, _) = Comparison::begin();
    let none = Fingerprints::Documents(Vec::new());
    comparison.answered(&[], &Fingerprints::Documents(many.clone()), &none).unwrap();
    comparison.placed(Cut { ours: Target::default(), theirs: Target::default() });
    let mut step = comparison.reached().unwrap();
    let mut asked_for = Vec::new();
    while let Step::AskDocuments(asked) = step {
        asked_for.push(asked.len());
        let theirs: Vec<_> = many.iter().filter(|(id, _)| asked.contains(id)).cloned().collect();
        step = comparison.looked_again(&theirs, &[]).unwrap();
    }
    assert_eq!(asked_for, [SCRUB_DOCUMENTS_ASKED_MAX, 3]);
    let Step::Finish(verdict) = step else { panic!("it is over") };
    assert_eq!(verdict.differences.len(), many.len());
}
