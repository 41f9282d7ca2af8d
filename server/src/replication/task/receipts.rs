//! Receipts: telling the core what followed documents hold, asking other regions and answering them.

use std::collections::BTreeMap;
use std::sync::Arc;

use isobar_protocol::ids::{ChangeHash, DocumentId, PlacementGroup};
use isobar_protocol::link::LinkFrame;
use isobar_protocol::notice::Observation;
use isobar_protocol::receipts::{Checkpoint, Effect, Observer, Subject, Target};
use isobar_protocol::replica::LinkId;

use super::Task;
use crate::storage::StoredOrigin;

/// Heads up to which somebody holds a document.
pub(super) type Held = (DocumentId, Vec<ChangeHash>);

impl Task {
    /// Takes in what documents hold now that are followed at a node. The heads were taken before, so the logs' positions are
    /// read after them: those that the replica knows, those that were followed here and, of a sibling's heads, those that the
    /// database says (`origins`).
    pub(super) fn observe(
        &mut self,
        observer: Observer,
        observed: Vec<Observation>,
        left: Vec<DocumentId>,
        origins: &[StoredOrigin],
    ) {
        let now = self.now();
        left.into_iter().for_each(|document| self.receipts.forget(&Subject { document, observer }));
        let mut targets = BTreeMap::new();
        for Observation { document, group, baseline, heads, is_closed } in observed {
            if !self.replica.groups().contains(&group) {
                // Nothing of it goes to other regions.
                continue;
            }
            let target = match targets.get(&group) {
                Some(target) => Arc::clone(target),
                None => {
                    let target = Arc::new(self.target(&group, origins));
                    targets.insert(group.clone(), target.clone());
                    target
                }
            };
            let checkpoint = Checkpoint { baseline, heads, is_closed, target };
            self.receipts.observe(now, Subject { document, observer }, group, checkpoint, &self.replica);
        }
        self.perform_receipts();
    }

    /// How far the logs of a group have been taken in; nowhere less than it was said to be before.
    fn target(&mut self, group: &PlacementGroup, origins: &[StoredOrigin]) -> Target {
        let mut target = self.replica.target(group);
        // The replica may not have been told yet what the heads hold already.
        let own = self.parts.committer.progress();
        own.borrow().iter().filter(|it| it.group == *group).for_each(|it| target.raise(it.origin, it.seq));
        let followed = self.parts.exchange.followed(group);
        followed.into_iter().for_each(|(origin, seq)| target.raise(origin, seq));
        let stored = origins.iter().filter(|it| it.group == *group);
        stored.for_each(|it| target.raise(it.id, it.seq));
        let former = self.targets.remove(group).unwrap_or_default();
        former.iter().for_each(|(origin, seq)| target.raise(*origin, *seq));
        self.targets.insert(group.clone(), target.clone());
        target
    }

    pub(super) fn perform_receipts(&mut self) {
        let mut for_siblings: BTreeMap<(Observer, LinkId), Vec<Held>> = BTreeMap::new();
        for effect in self.receipts.effects() {
            match effect {
                Effect::Ask { link, request, document, heads } => {
                    self.send(link, LinkFrame::HeadsRequest { request, document, heads });
                }
                Effect::Reached { link, subject, heads } if subject.observer != Observer::HERE => {
                    for_siblings.entry((subject.observer, link)).or_default().push((subject.document, heads));
                }
                Effect::Reached { link, subject, heads } => {
                    if let Some(up) = self.links.get(&link) {
                        let (region, storage) = (&up.peer.region, &up.peer.storage_id);
                        self.parts.receipts.reached(&subject.document, region, storage, heads);
                    }
                }
            }
        }
        for ((observer, link), documents) in for_siblings {
            self.tell_reached(observer, link, documents);
        }
    }

    /// Another region asks whether it has company.
    pub(super) fn answer_heads(
        &self,
        link: LinkId,
        request: u64,
        document: DocumentId,
        heads: Vec<ChangeHash>,
    ) {
        let Some(up) = self.links.get(&link) else { return };
        let groups = up.peer.groups.clone();
        let documents = self.parts.documents.clone();
        let refusal = LinkFrame::HeadsAnswer { request, has: false };
        let has_place = up.answers.answer(refusal, async move {
            let held = documents.holds(&document, &heads).await;
            let has = held.unwrap_or_else(|error| {
                tracing::warn!(%document, %error, "document not looked up");
                false
            });
            // Of what is not for it, a region does not learn that it is here.
            let group = documents.resident(&document).and_then(|it| it.settled_group());
            let has = has && group.is_some_and(|group| groups.contains(&group));
            LinkFrame::HeadsAnswer { request, has }
        });
        self.parts.metrics.link_answers_refused.increment(u64::from(!has_place));
    }

    pub(super) fn heads_answered(&mut self, link: LinkId, request: u64, has: bool) {
        self.receipts.answered(self.now(), link, request, has, &self.replica);
        self.perform_receipts();
    }
}
