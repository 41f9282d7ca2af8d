//! Which regions want the presence of which documents; and which nodes of a region do, whose "links" are then the notices
//! they tell each other.
//!
//! A region tells its peers of the documents that its sessions have open, and gets their presence from each of them;
//! nobody passes on what came from another region, so it cannot go round in circles. It is wanted for a while longer
//! than the last session is there: people come back.
//!
//! Nothing here carries presence, and nothing is kept of it: what a link does not take is lost, and the next one makes up
//! for it.
//!
//! # Invariants
//!
//! - A peer is told of documents of the groups that it is in, and gets presence of those, whatever it asks for.
//! - Whoever is linked anew is told of all that is wanted.
//! - At most [`INTEREST_DOCUMENTS_MAX`] documents are wanted, and as many are remembered of all peers together.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{INTEREST_DOCUMENTS_MAX, INTEREST_LINGER_MS};
use crate::ids::{DocumentId, PlacementGroup};
use crate::link::LinkFrame;
use crate::planted::{self, Fault};
use crate::replica::{LinkId, Moment};

/// A document of which presence is wanted here.
#[derive(Debug)]
struct Wanted {
    group: PlacementGroup,
    /// Since when there is no session any more, if there is none.
    since: Option<Moment>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Interests {
    wanted: BTreeMap<DocumentId, Wanted>,
    /// The groups of each peer.
    links: BTreeMap<LinkId, BTreeSet<PlacementGroup>>,
    wanted_by: BTreeMap<DocumentId, BTreeSet<LinkId>>,
}

impl Interests {
    /// A link is up. The frame tells its peer what is wanted here.
    pub fn link_opened(&mut self, link: LinkId, groups: BTreeSet<PlacementGroup>) -> LinkFrame {
        let wanted = self.wanted.iter().filter(|(_, it)| groups.contains(&it.group));
        let add = wanted.map(|(document, _)| document.clone()).collect();
        self.links.insert(link, groups);
        LinkFrame::Interest { add, remove: Vec::new() }
    }

    pub fn link_closed(&mut self, link: LinkId) {
        self.links.remove(&link);
        if planted::is(Fault::KeepInterests) {
            return;
        }
        self.wanted_by.retain(|_, links| {
            links.remove(&link);
            !links.is_empty()
        });
    }

    /// Compares what sessions have open with what the peers were told. Returns what they are to be told now. To be called
    /// about twice a second.
    pub fn refresh(
        &mut self,
        now: Moment,
        open: impl IntoIterator<Item = (DocumentId, PlacementGroup)>,
    ) -> Vec<(LinkId, LinkFrame)> {
        let open: BTreeMap<DocumentId, PlacementGroup> =
            open.into_iter().take(INTEREST_DOCUMENTS_MAX).collect();
        let mut remove = Vec::new();
        self.wanted.retain(|document, wanted| {
            wanted.since = if open.contains_key(document) { None } else { wanted.since.or(Some(now)) };
            let keep = wanted.since.is_none_or(|since| now.0.saturating_sub(since.0) < INTEREST_LINGER_MS);
            if !keep {
                remove.push((document.clone(), wanted.group.clone()));
            }
            keep
        });
        let room = INTEREST_DOCUMENTS_MAX.saturating_sub(self.wanted.len());
        let new = open.into_iter().filter(|(document, _)| !self.wanted.contains_key(document));
        let add: Vec<(DocumentId, PlacementGroup)> = new.take(room).collect();
        self.wanted.extend(
            add.iter()
                .map(|(document, group)| (document.clone(), Wanted { group: group.clone(), since: None })),
        );
        self.links.iter().filter_map(|(link, groups)| Some((*link, news(groups, &add, &remove)?))).collect()
    }

    /// A peer says what is wanted there.
    pub fn received(&mut self, link: LinkId, add: Vec<DocumentId>, remove: &[DocumentId]) {
        if !self.links.contains_key(&link) {
            return;
        }
        for document in add {
            if self.wanted_by.len() < INTEREST_DOCUMENTS_MAX || self.wanted_by.contains_key(&document) {
                self.wanted_by.entry(document).or_default().insert(link);
            }
        }
        for document in remove {
            if let Some(links) = self.wanted_by.get_mut(document) {
                links.remove(&link);
                if links.is_empty() {
                    self.wanted_by.remove(document);
                }
            }
        }
    }

    /// Whether any peer wants anything.
    pub fn is_anything_wanted(&self) -> bool {
        !self.wanted_by.is_empty()
    }

    /// All that peers want, with the groups of those who do.
    pub fn wanted_by_peers(&self) -> impl Iterator<Item = (&DocumentId, &PlacementGroup)> {
        self.wanted_by.iter().flat_map(|(document, links)| {
            let groups = links.iter().filter_map(|link| self.links.get(link)).flatten();
            groups.map(move |group| (document, group))
        })
    }

    /// The links over which presence of this region's sessions in a document of this group is to be sent.
    pub fn recipients<'a>(
        &'a self,
        document: &DocumentId,
        group: &'a PlacementGroup,
    ) -> impl Iterator<Item = LinkId> + use<'a> {
        // Whoever said that it wants the document need not be of its group.
        let links = self.wanted_by.get(document).into_iter().flatten().copied();
        links.filter(|link| self.is_welcome(*link, group))
    }

    /// Whether presence in a document of this group is taken from a link.
    pub fn is_welcome(&self, link: LinkId, group: &PlacementGroup) -> bool {
        self.links.get(&link).is_some_and(|groups| groups.contains(group))
    }
}

/// What is new to a peer of these groups, if anything is.
fn news(
    groups: &BTreeSet<PlacementGroup>,
    add: &[(DocumentId, PlacementGroup)],
    remove: &[(DocumentId, PlacementGroup)],
) -> Option<LinkFrame> {
    let theirs = |all: &[(DocumentId, PlacementGroup)]| -> Vec<DocumentId> {
        let theirs = all.iter().filter(|(_, group)| groups.contains(group));
        theirs.map(|(document, _)| document.clone()).collect()
    };
    let (add, remove) = (theirs(add), theirs(remove));
    let is_news = !add.is_empty() || !remove.is_empty();
    is_news.then_some(LinkFrame::Interest { add, remove })
}

#[cfg(test)]
mod tests;
