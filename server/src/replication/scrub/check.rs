//! One check with one region: the core's comparison, fed; and the repair of what it found.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::ids::{DocumentId, PlacementGroup, RegionName};
use isobar_protocol::link::{Fingerprints, LinkFrame};
use isobar_protocol::receipts::Target;
use isobar_protocol::replica::LinkId;
use isobar_protocol::scrub::{Comparison, Cut, Difference, Fingerprint, Seen, Step, Verdict};
use tokio::sync::oneshot;

use super::{ANSWER_PATIENCE, Checked, DIVERGENCES_MAX, Divergence, Outcome, raise_stored};
use crate::replication::snapshot::shared;
use crate::replication::task::scrub::{Question, ScrubCall};
use crate::replication::{Parts, Replication};
use crate::scrub::Survey;
use crate::storage::{DocumentState, ListedDocument};

/// How long an answer is waited for that takes the other side a pass through all of its documents.
const SURVEY_PATIENCE: Duration = Duration::from_secs(30 * 60);

/// How long both sides may take to get as far as the other was. A region that is catching up is compared another time.
const CUT_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether they have.
const CUT_LOOK_EVERY: Duration = Duration::from_millis(50);

/// Looks whether the other side has come to the same, each after twice as long a pause as the one before: five seconds.
const CONFIRM_LOOKS: u32 = 7;
const CONFIRM_FIRST: Duration = Duration::from_millis(40);

/// One check with one region.
pub(super) struct Check<'a> {
    pub(super) replication: &'a Replication,
    pub(super) parts: &'a Parts,
    pub(super) region: &'a RegionName,
    pub(super) link: LinkId,
    pub(super) groups: BTreeSet<PlacementGroup>,
}

impl Check<'_> {
    pub(super) async fn run(&self, survey: &Arc<Survey>) -> Checked {
        let verdict = match self.compare(survey).await {
            Ok(verdict) => verdict,
            Err(outcome) => return Checked::without(outcome),
        };
        let mut divergences = Vec::new();
        let (mut found, mut all_repaired) = (0, true);
        for (document, difference) in verdict.kinds() {
            if self.is_deleted_in_another_group(document, difference).await.unwrap_or(false) {
                continue;
            }
            found += 1;
            tracing::error!(region = %self.region, %document, ?difference, "regions differ in a document");
            self.parts.metrics.scrub_differences.increment(1);
            let seen = verdict.differences[document];
            let repaired = self.repair(document, difference, seen).await;
            all_repaired &= repaired;
            self.parts.metrics.scrub_repaired.increment(u64::from(repaired));
            if divergences.len() < DIVERGENCES_MAX {
                divergences.push(Divergence { document: document.clone(), difference, repaired });
            }
        }
        let outcome = match (found, all_repaired) {
            (0, _) => Outcome::Equal,
            (_, true) => Outcome::Repaired,
            (_, false) => Outcome::Diverged,
        };
        let more = verdict.more || survey.is_cut || found > divergences.len();
        Checked { moving: verdict.moving, divergences, more, ..Checked::without(outcome) }
    }

    async fn compare(&self, survey: &Arc<Survey>) -> Result<Verdict, Outcome> {
        let (mut comparison, first) = Comparison::begin();
        let mut steps = VecDeque::from([first]);
        loop {
            match steps.pop_front() {
                Some(Step::AskPrefix(prefix)) => {
                    let theirs = self.fingerprints(Question::Prefix(prefix.clone()), SURVEY_PATIENCE).await?;
                    let (survey, groups, of) = (survey.clone(), self.groups.clone(), prefix.clone());
                    let ours = tokio::task::spawn_blocking(move || survey.answer(&of, &groups)).await;
                    let ours = ours.ok().flatten().ok_or(Outcome::Failed)?;
                    steps.extend(comparison.answered(&prefix, &theirs, &ours)?);
                }
                Some(Step::AskPositions) => {
                    comparison.placed(self.cut().await?);
                    let cut = comparison.awaited().cloned().ok_or(Outcome::Failed)?;
                    self.wait_for(cut).await?;
                    steps.extend(comparison.reached());
                }
                Some(Step::AskDocuments(documents)) => {
                    let (theirs, ours) = self.look_at(&documents).await?;
                    steps.push_back(comparison.looked_again(&theirs, &ours)?);
                }
                Some(Step::Finish(verdict)) => return Ok(verdict),
                None => return Err(Outcome::Failed),
            }
        }
    }

    async fn fingerprints(&self, question: Question, patience: Duration) -> Result<Fingerprints, Outcome> {
        match self.replication.ask(self.link, question, patience).await? {
            LinkFrame::ScrubAnswer { fingerprints, .. } => Ok(fingerprints),
            _ => Err(Outcome::Unanswered),
        }
    }

    /// Both sides' positions, noted now.
    async fn cut(&self) -> Result<Cut, Outcome> {
        let (answer, answered) = oneshot::channel();
        self.replication.call(ScrubCall::Positions { link: self.link, answer }).await;
        let mut ours = answered.await.map_err(|_| Outcome::Interrupted)?.ok_or(Outcome::PutOff)?;
        raise_stored(&*self.parts.storage, &self.groups, &mut ours).await?;
        match self.replication.ask(self.link, Question::Positions, ANSWER_PATIENCE).await? {
            LinkFrame::PositionsAnswer { positions, .. } => {
                let mut theirs = Target::default();
                let positions = positions.ok_or(Outcome::PutOff)?;
                positions.into_iter().for_each(|(origin, seq)| theirs.raise(origin, seq));
                Ok(Cut { ours, theirs })
            }
            _ => Err(Outcome::Unanswered),
        }
    }

    async fn wait_for(&self, cut: Cut) -> Result<(), Outcome> {
        let reached = async {
            loop {
                let (answer, answered) = oneshot::channel();
                let (link, cut) = (self.link, cut.clone());
                self.replication.call(ScrubCall::IsReached { link, cut, answer }).await;
                if answered.await.map_err(|_| Outcome::Interrupted)? {
                    return Ok(());
                }
                tokio::time::sleep(CUT_LOOK_EVERY).await;
            }
        };
        tokio::time::timeout(CUT_PATIENCE, reached).await.unwrap_or(Err(Outcome::Behind))
    }

    /// Both sides' fingerprints of these documents, as they are now.
    async fn look_at(&self, documents: &[DocumentId]) -> Result<(Listed, Listed), Outcome> {
        let question = Question::Documents(documents.to_vec());
        let Fingerprints::Documents(theirs) = self.fingerprints(question, ANSWER_PATIENCE).await? else {
            return Err(Outcome::Unanswered);
        };
        let ours = self.parts.surveyor.look_at(documents, &self.groups).await?;
        Ok((theirs, ours))
    }

    /// Whether the document was deleted on one side in a group that the two do not share, so that side does not list it. The
    /// deletion wins, and nothing was lost: the other side is given it.
    async fn is_deleted_in_another_group(
        &self,
        document: &DocumentId,
        difference: Difference,
    ) -> Result<bool, Outcome> {
        let Parts { documents, committer, storage, .. } = self.parts;
        let ours = storage.find_document(document).await?;
        let is_deleted = |it: &ListedDocument| matches!(it.state, DocumentState::Deleted { .. });
        if ours.filter(is_deleted).is_some_and(|it| !self.groups.contains(&it.group)) {
            let tombstone = documents.contents(document).await.ok().flatten();
            if let Some(contents) = tombstone.and_then(|it| shared(it, &self.groups)) {
                self.replication.call(ScrubCall::Offer { link: self.link, contents }).await;
            }
            return Ok(true);
        }
        if difference != Difference::MissingThere {
            return Ok(false);
        }
        let theirs = self.replication.fetch(self.link, document, &self.groups).await?;
        let Some(tombstone) = theirs.filter(|it| it.deleted_at_ms.is_some()) else { return Ok(false) };
        Ok(documents.mend(tombstone, committer).await.is_ok())
    }

    /// Has both sides take what they lack of a document. Returns whether they came to the same.
    async fn repair(&self, document: &DocumentId, difference: Difference, seen: Seen) -> bool {
        let repaired = self.try_repair(document, difference, seen).await;
        repaired.unwrap_or_else(|outcome| {
            tracing::warn!(region = %self.region, %document, outcome = outcome.name(), "document not repaired yet");
            false
        })
    }

    async fn try_repair(
        &self,
        document: &DocumentId,
        difference: Difference,
        seen: Seen,
    ) -> Result<bool, Outcome> {
        let Parts { documents, committer, .. } = self.parts;
        if difference != Difference::MissingThere
            && let Some(contents) = self.replication.fetch(self.link, document, &self.groups).await?
        {
            match documents.mend(contents, committer).await {
                Ok(_) => self.parts.exchange.stored(vec![document.clone()]),
                Err(error) => {
                    tracing::error!(region = %self.region, %document, %error, "another region's document does not help");
                }
            }
        }
        let ours = documents.inspect(document, false).await?;
        if ours.as_ref().and_then(|it| it.fingerprint(document)) == seen.theirs {
            return Ok(true);
        }
        if !ours.is_some_and(|it| self.groups.contains(&it.group)) {
            return Ok(false);
        }
        match documents.contents(document).await {
            Ok(Some(contents)) => {
                self.replication.call(ScrubCall::Offer { link: self.link, contents }).await;
                self.confirm(document).await
            }
            Ok(None) => Ok(false),
            Err(error) => {
                tracing::error!(%document, %error, "stored document is damaged, not passed on");
                Ok(false)
            }
        }
    }

    /// Waits a little for the two to come to the same.
    async fn confirm(&self, document: &DocumentId) -> Result<bool, Outcome> {
        let mut pause = CONFIRM_FIRST;
        for _ in 0..CONFIRM_LOOKS {
            tokio::time::sleep(pause).await;
            pause *= 2;
            let (theirs, ours) = self.look_at(std::slice::from_ref(document)).await?;
            if theirs == ours {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

type Listed = Vec<(DocumentId, Fingerprint)>;
