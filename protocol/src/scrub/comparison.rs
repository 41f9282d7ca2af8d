//! One comparison of two regions in a consistent cut: what it calls a difference is one.
//!
//! Regions write all the time, so that one look at both finds documents that differ and are only on their way. A
//! comparison looks twice:
//!
//! 1. **Look.** Both sides' fingerprints are compared ([`Scrub`]).
//! 2. **Place.** *After* that each side notes how far it has taken in the logs ([`Step::AskPositions`]): at least as far as
//!    anything that its documents held when they were looked at.
//! 3. **Wait** until each side has the logs durably as far as the other noted ([`Comparison::awaited`]).
//! 4. **Look again** at those that differed. A difference counts if both sides show what they showed before, and still differ.
//!
//! # Why that is sound
//!
//! Call what two regions hold of a document `a`, `b` at the first look and `a'`, `b'` at the second. All of `b` that came by a
//! log stands before the positions noted afterwards, and so is in `a'`, unless it was lost; likewise `a` in `b'`. So if
//! nothing was lost and `a' = a`, `b' = b`, then `b` is within `a` and `a` within `b`: they are equal. What is edited all the time is
//! not reported and not cleared either; the next comparison finds it quiet, or the one after.
//!
//! Positions that are noted *before* the look would not do: a change that arrives between the two is seen and not waited for.
//! The first look may be as old as it likes, the second must be taken after the wait. What came by no log is beyond this:
//! while a region fetches a snapshot it is not compared, and what a search brought ahead of a log that nobody can send at the
//! moment may be reported, which is true: it is missing there. The same holds of an entry that came erased, because its sender knew
//! of the document's deletion, ahead of the tombstone in another log: until that comes, too, one side has what the other never
//! got. Both are rare, and what is done about it is right either way: the document is given back, and goes with the tombstone.
//!
//! A comparison is of one link. When that closes it is of no more use: positions count for the present link only, because a
//! region that was restored from an older copy comes back on a new one.

use std::collections::BTreeMap;

use super::{Difference, Fingerprint, Scrub, ScrubError, Seen};
use crate::config::SCRUB_DOCUMENTS_ASKED_MAX;
use crate::ids::DocumentId;
use crate::link::Fingerprints;
use crate::receipts::Target;

/// What the caller is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Ask the peer for its fingerprints below this prefix; the answer goes to [`Comparison::answered`].
    AskPrefix(Vec<u8>),
    /// Note how far this region has taken in the logs of the groups that both are in, and ask the peer for the same; both go to
    /// [`Comparison::placed`].
    AskPositions,
    /// Fingerprint these documents now, and ask the peer to; both go to [`Comparison::looked_again`].
    AskDocuments(Vec<DocumentId>),
    /// It is over.
    Finish(Verdict),
}

/// How far each side has to get before the second look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// This region's positions: the peer must have announced them.
    pub ours: Target,
    /// The peer's: they must be durable here.
    pub theirs: Target,
}

/// What came of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Documents that differ and did not change while they should have come to the same.
    pub differences: BTreeMap<DocumentId, Seen>,
    /// How many differed and changed meanwhile. They are neither lost nor cleared.
    pub moving: usize,
    /// Whether there are, or may be, more differences than were looked at.
    pub more: bool,
}

impl Verdict {
    /// What the regions differ in.
    pub fn kinds(&self) -> impl Iterator<Item = (&DocumentId, Difference)> {
        self.differences.iter().filter_map(|(document, seen)| Some((document, seen.difference()?)))
    }
}

/// What was seen at the first look.
#[derive(Debug, Default)]
struct FirstLook {
    /// To be looked at again.
    seen: BTreeMap<DocumentId, Seen>,
    more: bool,
}

#[derive(Debug)]
enum Phase {
    Looking(Scrub),
    Placing(FirstLook),
    Waiting(FirstLook, Cut),
    LookingAgain { first: FirstLook, asked: Vec<DocumentId>, verdict: Verdict },
    Finished,
}

/// See the module.
#[derive(Debug)]
pub struct Comparison(Phase);

impl Comparison {
    pub fn begin() -> (Self, Step) {
        let (scrub, prefix) = Scrub::new();
        (Self(Phase::Looking(scrub)), Step::AskPrefix(prefix))
    }

    /// Takes both sides' fingerprints below a prefix. If it fails the peer does not keep to the protocol, and nothing has
    /// changed.
    pub fn answered(
        &mut self,
        prefix: &[u8],
        theirs: &Fingerprints,
        ours: &Fingerprints,
    ) -> Result<Vec<Step>, ScrubError> {
        let Phase::Looking(scrub) = &mut self.0 else { return Err(ScrubError::NotAsked) };
        let next = scrub.answer(prefix, theirs, ours)?;
        if !scrub.is_finished() {
            return Ok(next.into_iter().map(Step::AskPrefix).collect());
        }
        let Phase::Looking(scrub) = std::mem::replace(&mut self.0, Phase::Finished) else {
            return Ok(Vec::new());
        };
        let report = scrub.into_report();
        let first = FirstLook { seen: report.differences, more: report.more };
        if first.seen.is_empty() {
            return Ok(vec![self.finish(Verdict { more: first.more, ..Verdict::default() })]);
        }
        self.0 = Phase::Placing(first);
        Ok(vec![Step::AskPositions])
    }

    /// Takes the positions that were noted after the first look.
    pub fn placed(&mut self, cut: Cut) {
        self.0 = match std::mem::replace(&mut self.0, Phase::Finished) {
            Phase::Placing(first) => Phase::Waiting(first, cut),
            other => other,
        };
    }

    /// What is waited for, if it is.
    pub fn awaited(&self) -> Option<&Cut> {
        match &self.0 {
            Phase::Waiting(_, cut) => Some(cut),
            _ => None,
        }
    }

    /// Both sides have reached the cut.
    pub fn reached(&mut self) -> Option<Step> {
        match std::mem::replace(&mut self.0, Phase::Finished) {
            Phase::Waiting(first, _) => Some(self.ask_next(first, Verdict::default())),
            other => {
                self.0 = other;
                None
            }
        }
    }

    /// Takes both sides' fingerprints of the documents that were asked for last, in the order of their ids. If it fails the
    /// peer does not keep to the protocol, and nothing has changed.
    pub fn looked_again(
        &mut self,
        theirs: &[(DocumentId, Fingerprint)],
        ours: &[(DocumentId, Fingerprint)],
    ) -> Result<Step, ScrubError> {
        let Phase::LookingAgain { first, asked, verdict } = &mut self.0 else {
            return Err(ScrubError::NotAsked);
        };
        if [theirs, ours].into_iter().flatten().any(|(document, _)| asked.binary_search(document).is_err()) {
            return Err(ScrubError::NotWanted);
        }
        let theirs: BTreeMap<&DocumentId, Fingerprint> =
            theirs.iter().map(|(id, print)| (id, *print)).collect();
        let ours: BTreeMap<&DocumentId, Fingerprint> = ours.iter().map(|(id, print)| (id, *print)).collect();
        for document in std::mem::take(asked) {
            let now = Seen { theirs: theirs.get(&document).copied(), ours: ours.get(&document).copied() };
            let Some(before) = first.seen.remove(&document) else { continue };
            match (now.difference(), now == before) {
                (None, _) => {}
                (Some(_), true) => _ = verdict.differences.insert(document, now),
                (Some(_), false) => verdict.moving += 1,
            }
        }
        let (first, verdict) = (std::mem::take(first), std::mem::take(verdict));
        Ok(self.ask_next(first, verdict))
    }

    fn ask_next(&mut self, first: FirstLook, mut verdict: Verdict) -> Step {
        if first.seen.is_empty() {
            verdict.more |= first.more;
            return self.finish(verdict);
        }
        let asked: Vec<DocumentId> = first.seen.keys().take(SCRUB_DOCUMENTS_ASKED_MAX).cloned().collect();
        let step = Step::AskDocuments(asked.clone());
        self.0 = Phase::LookingAgain { first, asked, verdict };
        step
    }

    fn finish(&mut self, verdict: Verdict) -> Step {
        self.0 = Phase::Finished;
        Step::Finish(verdict)
    }
}

#[cfg(test)]
mod tests;
