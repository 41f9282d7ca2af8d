//! Documents that a snapshot lacked: asking for them by their names until they are whole.
//!
//! The vector that was adopted claims entries of them that are not here, and that no log will bring. Each is noted in the
//! database (contract clause 13), and asked of one region after the other, at growing intervals, of those that have announced
//! everything that was taken in here when the document was noted: what such a region has of it is at least what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;

use isobar_protocol::ids::{DocumentId, PlacementGroup, RegionName};
use isobar_protocol::link::{DocumentContents, LinkFrame, MissingDocument, Progress};
use isobar_protocol::receipts::{Announced, Target};
use isobar_protocol::replica::{LinkId, Moment};
use tokio::sync::oneshot;

use super::Task;
use crate::replication::{Event, snapshot};

/// Questions under way at a time. Each answer may be a large document.
const ASKED_AT_ONCE: usize = 4;

/// How long after an answer that did not help the next region is asked, first and at most. Most of what is missing was
/// changing at the moment when it was read; what is damaged waits for somebody to mend it.
const PAUSE_MS: u64 = 1_000;
const PAUSE_MS_MAX: u64 = 600_000;

/// How long an answer is waited for. A large document may come slowly.
const PATIENCE_MS: u64 = 120_000;

/// A question that is under way.
struct Asked {
    request: u64,
    link: LinkId,
    until: Moment,
}

/// A document that is missing.
struct Want {
    group: PlacementGroup,
    /// Who has announced this has all that is missing.
    target: Arc<Target>,
    ask_at: Moment,
    pause_ms: u64,
    asked_last: Option<RegionName>,
    asked: Option<Asked>,
}

impl Want {
    fn put_off(&mut self, now: Moment) {
        self.asked = None;
        self.ask_at = Moment(now.0 + self.pause_ms);
        self.pause_ms = (self.pause_ms * 2).min(PAUSE_MS_MAX);
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Wanted {
    wants: BTreeMap<DocumentId, Want>,
    /// Ends when what was noted last about missing documents is in the database.
    last_noted: Option<oneshot::Receiver<()>>,
}

impl Wanted {
    pub(super) fn documents(&self) -> impl Iterator<Item = DocumentId> {
        self.wants.keys().cloned()
    }

    pub(super) fn is_asked(&self, link: LinkId, request: u64) -> bool {
        self.wanting(link, request).is_some()
    }

    fn wanting(&self, link: LinkId, request: u64) -> Option<&DocumentId> {
        let is = |want: &Want| want.asked.as_ref().is_some_and(|it| (it.link, it.request) == (link, request));
        self.wants.iter().find(|(_, want)| is(want)).map(|(document, _)| document)
    }

    pub(super) fn link_closed(&mut self, link: LinkId) {
        let waiting = self.wants.values_mut();
        waiting.filter(|want| want.asked.as_ref().is_some_and(|it| it.link == link)).for_each(|want| {
            want.asked = None;
        });
    }

    /// Takes a place behind what was noted before.
    fn take_turn(&mut self) -> (Option<oneshot::Receiver<()>>, oneshot::Sender<()>) {
        let (done, is_done) = oneshot::channel();
        (self.last_noted.replace(is_done), done)
    }
}

impl Task {
    /// Raises the counters to a snapshot's, and notes what it lacked.
    pub(super) fn adopt(&mut self, origins: Vec<Progress>, missing: Vec<MissingDocument>) {
        let (previous, done) = self.wanted.take_turn();
        let parts = self.parts.clone();
        self.spawn(async move {
            if let Some(previous) = previous {
                let _ = previous.await;
            }
            snapshot::adopt(&parts, &origins, &missing).await;
            let _ = done.send(());
            Event::Adopted { origins, missing }
        });
    }

    /// Begins to ask for documents that are noted to be missing.
    pub(in crate::replication) fn want(&mut self, missing: Vec<MissingDocument>) {
        let now = self.now();
        if !missing.is_empty() {
            tracing::error!(
                documents = missing.len(),
                "documents are missing, asking the other regions for them"
            );
        }
        let mut targets: BTreeMap<PlacementGroup, Arc<Target>> = BTreeMap::new();
        for MissingDocument { document, group } in missing {
            let target = targets.entry(group.clone()).or_insert_with(|| self.replica.target(&group).into());
            let target = target.clone();
            let (ask_at, pause_ms) = (now, PAUSE_MS);
            let want = Want { group, target, ask_at, pause_ms, asked_last: None, asked: None };
            // Also if it was missing before: an answer to what was asked then may lack what is missing now.
            self.wanted.wants.insert(document, want);
        }
        self.parts.metrics.documents_missing.set(self.wanted.wants.len() as f64);
    }

    /// Asks for some of those whose time has come.
    pub(super) fn ask_for_wanted(&mut self) {
        let now = self.now();
        for want in self.wanted.wants.values_mut() {
            if want.asked.as_ref().is_some_and(|it| it.until <= now) {
                want.put_off(now);
            }
        }
        let wants = &self.wanted.wants;
        let under_way = wants.values().filter(|want| want.asked.is_some()).count();
        let due = wants.iter().filter(|(_, want)| want.asked.is_none() && want.ask_at <= now);
        let due = due.map(|(document, _)| document.clone());
        let due: Vec<DocumentId> = due.take(ASKED_AT_ONCE.saturating_sub(under_way)).collect();
        due.into_iter().for_each(|document| self.ask_for(document));
    }

    fn ask_for(&mut self, document: DocumentId) {
        let now = self.now();
        let Some(want) = self.wanted.wants.get_mut(&document) else { return };
        let able = self.links.iter().filter(|(link, up)| {
            up.peer.groups.contains(&want.group) && self.replica.covers(**link, &want.target)
        });
        let able: BTreeMap<&RegionName, LinkId> = able.map(|(link, up)| (&up.peer.region, *link)).collect();
        let next =
            able.iter().find(|(region, _)| want.asked_last.as_ref().is_none_or(|last| **region > last));
        let Some((region, link)) = next.or(able.first_key_value()) else {
            // Nobody at the moment; others have their turn.
            want.ask_at = Moment(now.0 + PAUSE_MS);
            return;
        };
        let (region, link) = ((*region).clone(), *link);
        let request = self.exchange.new_request();
        want.asked_last = Some(region);
        want.asked = Some(Asked { request, link, until: Moment(now.0 + PATIENCE_MS) });
        self.send(link, LinkFrame::DocumentRequest { request, document });
    }

    pub(super) fn wanted_answered(&mut self, link: LinkId, request: u64, contents: Option<DocumentContents>) {
        let now = self.now();
        let Some(document) = self.wanted.wanting(link, request).cloned() else { return };
        let Some(want) = self.wanted.wants.get_mut(&document) else { return };
        let is_it =
            |contents: &DocumentContents| contents.document == document && contents.group == want.group;
        let Some(contents) = contents.filter(is_it) else { return want.put_off(now) };
        let parts = self.parts.clone();
        self.spawn(async move {
            let stored = snapshot::store(&parts, contents).await;
            Event::WantedStored { document, request, stored }
        });
    }

    /// What was asked for is stored, or cannot be used.
    pub(super) fn wanted_stored(&mut self, document: &DocumentId, request: u64, stored: bool) {
        let now = self.now();
        let fetches = self.replica.fetches_snapshot();
        let Some(want) = self.wanted.wants.get_mut(document) else { return };
        if want.asked.as_ref().is_none_or(|it| it.request != request) {
            return;
        }
        // A snapshot may be about to note it anew, and what is stored may lack what that one's vector claims.
        if !stored || fetches {
            return want.put_off(now);
        }
        self.wanted.wants.remove(document);
        tracing::info!(%document, "document that was missing is whole");
        self.parts.metrics.documents_missing.set(self.wanted.wants.len() as f64);
        let (previous, done) = self.wanted.take_turn();
        let (parts, document) = (self.parts.clone(), document.clone());
        tokio::spawn(async move {
            if let Some(previous) = previous {
                let _ = previous.await;
            }
            snapshot::note_found(&parts, &document).await;
            let _ = done.send(());
        });
    }
}
