//! Receipts: telling the core what followed documents hold, asking other regions and answering them.

use std::sync::Arc;

use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::link::LinkFrame;
use isobar_protocol::receipts::{Checkpoint, Effect};
use isobar_protocol::replica::LinkId;

use super::Task;
use crate::receipts::Observed;

impl Task {
    /// Takes in what followed documents hold now. The heads were taken before, so the logs' positions are read after them.
    pub(super) fn observe(&mut self, observed: Vec<Observed>, left: &[DocumentId]) {
        let now = self.now();
        left.iter().for_each(|document| self.receipts.forget(document));
        let mut targets = std::collections::BTreeMap::new();
        for Observed { document, group, baseline, heads, is_closed } in observed {
            if !self.replica.groups().contains(&group) {
                // Nothing of it goes to other regions.
                continue;
            }
            let target = targets.entry(group.clone()).or_insert_with(|| {
                let mut target = self.replica.target(&group);
                // The replica may not have been told yet what the heads hold already.
                let own = self.parts.committer.progress();
                let own = own.borrow();
                own.iter().filter(|it| it.group == group).for_each(|it| target.raise(it.origin, it.seq));
                Arc::new(target)
            });
            let checkpoint = Checkpoint { baseline, heads, is_closed, target: target.clone() };
            self.receipts.observe(now, document, group, checkpoint, &self.replica);
        }
        self.perform_receipts();
    }

    pub(super) fn perform_receipts(&mut self) {
        for effect in self.receipts.effects() {
            match effect {
                Effect::Ask { link, request, document, heads } => {
                    self.send(link, LinkFrame::HeadsRequest { request, document, heads });
                }
                Effect::Reached { link, document, heads } => {
                    if let Some(up) = self.links.get(&link) {
                        let (region, storage) = (&up.peer.region, &up.peer.storage_id);
                        self.parts.receipts.reached(&document, region, storage, heads);
                    }
                }
            }
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
