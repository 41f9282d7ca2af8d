//! Checks: comparing this region with the others, on a timer and on demand, and putting back what was lost.
//!
//! What is compared, and when a difference counts, is the core's to say ([`isobar_protocol::scrub::Comparison`]). Here the answers are fetched, both
//! sides' documents looked at, and what was found is repaired: what lacks something here is asked for, what lacks something
//! there is sent, and both are looked at again.
//!
//! A node that does not keep its region's links checks nothing; the one that does checks for all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isobar_protocol::ids::{DocumentId, PlacementGroup, RegionName};
use isobar_protocol::link::{DocumentContents, LinkFrame};
use isobar_protocol::receipts::Target;
use isobar_protocol::replica::LinkId;
use isobar_protocol::scrub::{Difference, ScrubError};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::task::scrub::{Question, ScrubCall};
use super::{Event, Parts, Replication};
use crate::commit::Committer;
use crate::documents::{Documents, MendError};
use crate::storage::{Storage, StorageError};

mod check;

use check::Check;

/// How long any other answer is waited for.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// Differing documents of one check that are named to operators. All are logged.
const DIVERGENCES_MAX: usize = 1_000;

/// What came of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing differs, but for what was on its way.
    Equal,
    /// Something did, and does not any more.
    Repaired,
    /// Something differs.
    Diverged,
    /// The other region did not get as far as this one was, or the other way round.
    Behind,
    /// One of the two is fetching a snapshot.
    PutOff,
    /// The link closed meanwhile.
    Interrupted,
    /// The other region did not answer, or what cannot be: it may be of an older version.
    Unanswered,
    /// The database did not answer.
    Failed,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Repaired => "repaired",
            Self::Diverged => "diverged",
            Self::Behind => "behind",
            Self::PutOff => "put_off",
            Self::Interrupted => "interrupted",
            Self::Unanswered => "unanswered",
            Self::Failed => "failed",
        }
    }
}

/// A document in which two regions differed.
#[derive(Debug, Clone)]
pub struct Divergence {
    pub document: DocumentId,
    pub difference: Difference,
    /// Whether it came to the same by the check.
    pub repaired: bool,
}

/// The last check with a region.
#[derive(Debug, Clone)]
pub struct Checked {
    pub finished_at: SystemTime,
    pub outcome: Outcome,
    /// Documents that differed and were on their way.
    pub moving: usize,
    pub divergences: Vec<Divergence>,
    /// Whether there are, or may be, more divergences than these.
    pub more: bool,
}

/// What is known of checks.
#[derive(Default)]
pub(super) struct Checks {
    wanted: Notify,
    /// One is asked for or under way.
    under_way: AtomicBool,
    last: Mutex<BTreeMap<RegionName, Checked>>,
}

impl From<ScrubError> for Outcome {
    fn from(error: ScrubError) -> Self {
        tracing::warn!(%error, "a region's answer to a check cannot be");
        Self::Unanswered
    }
}

impl From<StorageError> for Outcome {
    fn from(error: StorageError) -> Self {
        tracing::warn!(%error, "documents not compared");
        Self::Failed
    }
}

impl Replication {
    /// Has this region compared with all that are linked. Returns false if that is being done already.
    pub fn check_now(&self) -> bool {
        let begins = !self.shared.checks.under_way.swap(true, Ordering::SeqCst);
        if begins {
            self.shared.checks.wanted.notify_one();
        }
        begins
    }

    /// Whether a check is asked for or under way.
    pub fn is_checking(&self) -> bool {
        self.shared.checks.under_way.load(Ordering::SeqCst)
    }

    /// The last check with each region.
    pub fn checked(&self) -> BTreeMap<RegionName, Checked> {
        self.shared.checks.last.lock().clone()
    }

    /// Checks now and then, and whenever somebody asks; to be run as a task. Without an interval only on demand.
    pub async fn run_checks(self, parts: Parts, interval: Option<Duration>) {
        loop {
            let due = async {
                match interval {
                    // Regions that were started together do not all begin at once.
                    Some(interval) => tokio::time::sleep(interval.mul_f64(0.75 + 0.5 * random())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => self.shared.checks.under_way.store(true, Ordering::SeqCst),
                () = self.shared.checks.wanted.notified() => {}
            }
            if self.keeps_links() {
                self.check_all(&parts).await;
            }
            self.shared.checks.under_way.store(false, Ordering::SeqCst);
        }
    }

    async fn check_all(&self, parts: &Parts) {
        let linked: Vec<(RegionName, LinkId)> =
            self.shared.linked.lock().iter().map(|(region, link)| (region.clone(), *link)).collect();
        if linked.is_empty() {
            return;
        }
        let survey = parts.surveyor.fresh().await;
        for (region, link) in linked {
            let check =
                Check { replication: self, parts, region: &region, link, groups: self.shared_with(&region) };
            let checked = match &survey {
                Ok(survey) => check.run(survey).await,
                Err(error) => {
                    tracing::warn!(%error, "documents not surveyed");
                    Checked::without(Outcome::Failed)
                }
            };
            tracing::info!(%region, outcome = checked.outcome.name(), differences = checked.divergences.len(),
                moving = checked.moving, "region checked");
            parts.metrics.scrubbed(checked.outcome.name());
            let since_epoch = checked.finished_at.duration_since(UNIX_EPOCH).unwrap_or_default();
            parts.metrics.scrub_finished_at.set(since_epoch.as_secs_f64());
            self.shared.checks.last.lock().insert(region, checked);
        }
        parts.surveyor.tidy();
    }

    /// The groups that both this region and another are in.
    fn shared_with(&self, region: &RegionName) -> BTreeSet<PlacementGroup> {
        let known = self.shared.known.lock();
        known.get(region).map(|peer| &peer.groups & &self.shared.groups).unwrap_or_default()
    }

    /// Asks a region something; nothing if its link closes or it does not answer in time.
    async fn ask(&self, link: LinkId, question: Question, patience: Duration) -> Result<LinkFrame, Outcome> {
        let (answer, answered) = oneshot::channel();
        self.call(ScrubCall::Ask { link, question, answer }).await;
        match tokio::time::timeout(patience, answered).await {
            Ok(Ok(frame)) => Ok(frame),
            Ok(Err(_)) => Err(Outcome::Interrupted),
            Err(_) => Err(Outcome::Unanswered),
        }
    }

    async fn call(&self, call: ScrubCall) {
        // If nobody takes it any more its answer is dropped, too.
        let _ = self.events.send(Event::Scrub(call)).await;
    }

    /// All of a document that a region holds, if it is of one of these groups.
    async fn fetch(
        &self,
        link: LinkId,
        document: &DocumentId,
        groups: &BTreeSet<PlacementGroup>,
    ) -> Result<Option<DocumentContents>, Outcome> {
        match self.ask(link, Question::Contents(document.clone()), ANSWER_PATIENCE).await? {
            LinkFrame::DocumentAnswer { contents, .. } => {
                Ok(contents.filter(|it| it.document == *document && groups.contains(&it.group)))
            }
            _ => Err(Outcome::Unanswered),
        }
    }

    /// Mends a document of which damaged bytes are stored with what linked regions have. Returns whether one of them helped.
    pub(crate) async fn mend(
        &self,
        document: &DocumentId,
        documents: &Arc<Documents>,
        committer: &Committer,
    ) -> Result<bool, MendError> {
        let linked: Vec<(RegionName, LinkId)> =
            self.shared.linked.lock().iter().map(|(region, link)| (region.clone(), *link)).collect();
        let mut last = Ok(false);
        for (region, link) in linked {
            let groups = self.shared_with(&region);
            let Ok(Some(contents)) = self.fetch(link, document, &groups).await else { continue };
            match documents.mend(contents, committer).await {
                Ok(_) => return Ok(true),
                Err(MendError::NotCovered) => {}
                Err(error) => last = Err(error),
            }
        }
        last
    }
}

impl Checked {
    fn without(outcome: Outcome) -> Self {
        let finished_at = SystemTime::now();
        Self { finished_at, outcome, moving: 0, divergences: Vec::new(), more: false }
    }
}

/// Raises a target to what is stored: siblings may have stored more than the task has been told of.
pub(super) async fn raise_stored(
    storage: &dyn Storage,
    groups: &BTreeSet<PlacementGroup>,
    target: &mut Target,
) -> Result<(), StorageError> {
    let origins = storage.origins().await?;
    origins.iter().filter(|it| groups.contains(&it.group)).for_each(|it| target.raise(it.id, it.seq));
    Ok(())
}

/// Takes a document that another region found to be missing here, or a part of it.
pub(super) async fn take_offered(parts: &Parts, region: &RegionName, contents: DocumentContents) {
    let document = contents.document.clone();
    match parts.documents.mend(contents, &parts.committer).await {
        Ok(mended) if mended.is_something() => {
            parts.exchange.stored(vec![document.clone()]);
            parts.metrics.scrub_differences.increment(1);
            parts.metrics.scrub_repaired.increment(1);
            tracing::error!(%region, %document, ?mended, "another region had what was lost here, it is stored again");
        }
        Ok(_) => {}
        Err(error) => tracing::error!(%region, %document, %error, "another region's document does not help"),
    }
}

/// A number between 0 and 1.
fn random() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}
