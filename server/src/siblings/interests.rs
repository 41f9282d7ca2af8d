//! Which nodes of the region want the presence of which documents.
//!
//! Every node tells its siblings what its sessions have open; the keeper of the links also tells what other regions want, so
//! that a node sends presence to its siblings exactly if one of them, or a region behind one, has the document open. The
//! keeper tells the regions what the sessions of all nodes want; what regions want it tells no region.
//!
//! Notices get lost, so what was told before is told again as a whole every [`RESTATE_MS`], and at once when a sibling
//! comes. Of a sibling that has not been heard for [`SILENCE_MS`] nothing is believed any more.
//!
//! Nothing here sends or relays anything. The books are kept by [`isobar_protocol::interest`]; a "link" in them is one
//! sibling and one scope.

use std::collections::{BTreeMap, BTreeSet};

use isobar_protocol::config::NOTICE_NODES_MAX;
use isobar_protocol::ids::{DocumentId, PlacementGroup};
use isobar_protocol::interest::Interests;
use isobar_protocol::link::LinkFrame;
use isobar_protocol::notice::{Notice, Scope, parts};
use isobar_protocol::replica::{LinkId, Moment};
use uuid::Uuid;

/// How often everything is told again: that long presence may be missing after a lost notice.
const RESTATE_MS: u64 = 5_000;

/// How long a sibling that says nothing is believed to want what it wanted.
const SILENCE_MS: u64 = 16_000;

/// Stands for the groups of what regions want. No placement group has a name with a blank.
const OF_REGIONS: &str = "of regions";

/// See the module.
pub struct SiblingInterests {
    /// What this node's sessions have open; the links are scopes that were told.
    sessions: Interests,
    /// What other regions want of this node.
    regions: Interests,
    /// What siblings want.
    theirs: Interests,
    scopes: BTreeMap<Scope, LinkId>,
    siblings: BTreeMap<Uuid, Sibling>,
    last_link: u64,
    restate_at: Moment,
    of_regions: PlacementGroup,
}

#[derive(Default)]
struct Sibling {
    /// When it was heard last, in the time of [`Moment`].
    heard_ms: u64,
    links: BTreeMap<Scope, LinkId>,
}

/// What siblings want of a document's presence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub by_sessions: bool,
    pub by_regions: bool,
}

impl Default for SiblingInterests {
    fn default() -> Self {
        Self {
            sessions: Interests::default(),
            regions: Interests::default(),
            theirs: Interests::default(),
            scopes: BTreeMap::new(),
            siblings: BTreeMap::new(),
            last_link: 0,
            restate_at: Moment(0),
            of_regions: PlacementGroup::new(OF_REGIONS).expect("the name is short"),
        }
    }
}

impl SiblingInterests {
    /// Compares what is open here, and what regions want, with what the siblings were told. Returns what they are to be told.
    /// To be called about twice a second while there are siblings.
    pub fn refresh(
        &mut self,
        now: Moment,
        open: Vec<(DocumentId, PlacementGroup)>,
        regions_want: Vec<DocumentId>,
    ) -> Vec<Notice> {
        let groups: BTreeSet<&PlacementGroup> = open.iter().map(|(_, group)| group).collect();
        let scopes = groups.into_iter().cloned().map(Scope::Sessions);
        let scopes = scopes.chain((!regions_want.is_empty()).then_some(Scope::Regions));
        let new: Vec<Scope> = scopes.filter(|scope| !self.scopes.contains_key(scope)).collect();
        let regions_want = regions_want.into_iter().map(|it| (it, self.of_regions.clone()));
        let mut frames = self.sessions.refresh(now, open);
        frames.extend(self.regions.refresh(now, regions_want));
        if now >= self.restate_at {
            return self.restate(now, new);
        }
        let scope_of = |link| self.scopes.iter().find(|(_, of)| **of == link).map(|(scope, _)| scope.clone());
        let news = frames.into_iter().filter_map(|(link, frame)| Some((scope_of(link)?, frame)));
        let mut notices: Vec<Notice> =
            news.flat_map(|(scope, frame)| notices(&scope, false, frame)).collect();
        for scope in new {
            let frame = self.open_scope(&scope);
            notices.extend(self::notices(&scope, true, frame));
        }
        notices
    }

    /// Has everything told again at the next refresh: somebody may not know it.
    pub fn restate_soon(&mut self) {
        self.restate_at = Moment(0);
    }

    fn restate(&mut self, now: Moment, new: Vec<Scope>) -> Vec<Notice> {
        self.restate_at = Moment(now.0 + RESTATE_MS);
        let scopes: BTreeSet<Scope> = self.scopes.keys().cloned().chain(new).collect();
        let mut all = Vec::new();
        for scope in scopes {
            let frame = self.open_scope(&scope);
            if matches!(&frame, LinkFrame::Interest { add, .. } if add.is_empty()) {
                // Once it has been said that there is nothing, nothing need be said.
                if let Some(link) = self.scopes.remove(&scope) {
                    self.sessions.link_closed(link);
                    self.regions.link_closed(link);
                }
            }
            all.extend(notices(&scope, true, frame));
        }
        all
    }

    /// All that is wanted of a scope; what is new to it comes with the next refresh.
    fn open_scope(&mut self, scope: &Scope) -> LinkFrame {
        let link = match self.scopes.get(scope) {
            Some(link) => *link,
            None => {
                let link = self.next_link();
                self.scopes.insert(scope.clone(), link);
                link
            }
        };
        let groups = BTreeSet::from([self.group_of_scope(scope)]);
        match scope {
            Scope::Sessions(_) => self.sessions.link_opened(link, groups),
            Scope::Regions => self.regions.link_opened(link, groups),
        }
    }

    fn group_of_scope(&self, scope: &Scope) -> PlacementGroup {
        match scope {
            Scope::Sessions(group) => group.clone(),
            Scope::Regions => self.of_regions.clone(),
        }
    }

    fn next_link(&mut self) -> LinkId {
        self.last_link += 1;
        LinkId(self.last_link)
    }

    /// A sibling says what it wants.
    pub fn received(
        &mut self,
        now: Moment,
        by: Uuid,
        scope: Scope,
        anew: bool,
        (add, remove): (Vec<DocumentId>, &[DocumentId]),
    ) {
        if self.siblings.len() >= NOTICE_NODES_MAX && !self.siblings.contains_key(&by) {
            return;
        }
        let groups = BTreeSet::from([self.group_of_scope(&scope)]);
        let next = LinkId(self.last_link + 1);
        let sibling = self.siblings.entry(by).or_default();
        sibling.heard_ms = now.0;
        let link = *sibling.links.entry(scope).or_insert(next);
        if anew || link == next {
            self.last_link = self.last_link.max(link.0);
            self.theirs.link_closed(link);
            self.theirs.link_opened(link, groups);
        }
        self.theirs.received(link, add, remove);
    }

    /// Whether a sibling has said lately what it wants.
    pub fn is_heard(&self, node: &Uuid) -> bool {
        self.siblings.contains_key(node)
    }

    /// Forgets siblings that have not been heard for long.
    pub fn expire(&mut self, now: Moment) {
        let is_gone = |sibling: &Sibling| now.0.saturating_sub(sibling.heard_ms) > SILENCE_MS;
        let gone = self.siblings.iter().filter(|(_, sibling)| is_gone(sibling)).map(|(node, _)| *node);
        gone.collect::<Vec<_>>().into_iter().for_each(|node| self.forget(node));
    }

    /// There are no siblings any more.
    pub fn forget_all(&mut self) {
        let all: Vec<Uuid> = self.siblings.keys().copied().collect();
        all.into_iter().for_each(|node| self.forget(node));
    }

    fn forget(&mut self, node: Uuid) {
        let links = self.siblings.remove(&node).map(|it| it.links).unwrap_or_default();
        links.into_values().for_each(|link| self.theirs.link_closed(link));
    }

    /// Who wants the presence of a document of this group.
    pub fn wanted(&self, document: &DocumentId, group: &PlacementGroup) -> Wanted {
        let is_wanted = |group| self.theirs.recipients(document, group).next().is_some();
        Wanted { by_sessions: is_wanted(group), by_regions: is_wanted(&self.of_regions) }
    }

    /// The group of a document that a sibling's sessions have open.
    pub fn group_of(&self, document: &DocumentId) -> Option<PlacementGroup> {
        let scopes = self.siblings.values().flat_map(|sibling| sibling.links.keys());
        let groups: BTreeSet<&PlacementGroup> = scopes
            .filter_map(|scope| match scope {
                Scope::Sessions(group) => Some(group),
                Scope::Regions => None,
            })
            .collect();
        groups.into_iter().find(|group| self.theirs.recipients(document, group).next().is_some()).cloned()
    }

    /// What siblings' sessions have open.
    pub fn open_at_siblings(&self) -> Vec<(DocumentId, PlacementGroup)> {
        let all = self.theirs.wanted_by_peers().filter(|(_, group)| **group != self.of_regions);
        all.map(|(document, group)| (document.clone(), group.clone())).collect()
    }
}

/// A frame of the books as notices.
fn notices(scope: &Scope, mut anew: bool, frame: LinkFrame) -> Vec<Notice> {
    let LinkFrame::Interest { add, mut remove } = frame else { return Vec::new() };
    let weight = |document: &DocumentId| document.as_bytes().len() + 1;
    let removed = parts(std::mem::take(&mut remove), weight);
    let mut notices: Vec<Notice> = parts(add, weight)
        .into_iter()
        .map(|add| Notice::Interest {
            scope: scope.clone(),
            anew: std::mem::take(&mut anew),
            add,
            remove: Vec::new(),
        })
        .collect();
    notices.extend(removed.into_iter().filter(|it| !it.is_empty()).map(|remove| Notice::Interest {
        scope: scope.clone(),
        anew: false,
        add: Vec::new(),
        remove,
    }));
    notices
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Uuid = Uuid::from_u128(1);
    const TWO: Uuid = Uuid::from_u128(2);

    fn document(name: u8) -> DocumentId {
        DocumentId::from_slice(&[name; 16]).expect("sixteen bytes")
    }

    fn group(name: &str) -> PlacementGroup {
        PlacementGroup::new(name).expect("a short name")
    }

    fn open(names: &[u8]) -> Vec<(DocumentId, PlacementGroup)> {
        names.iter().map(|name| (document(*name), group("all"))).collect()
    }

    /// Tells one what the other said, as far as it is not lost.
    fn pass(now: u64, notices: Vec<Notice>, by: Uuid, to: &mut SiblingInterests) -> usize {
        let count = notices.len();
        for notice in notices {
            let Notice::Interest { scope, anew, add, remove } = notice else { panic!("{notice:?}") };
            to.received(Moment(now), by, scope, anew, (add, &remove));
        }
        count
    }

    const NOBODY: Wanted = Wanted { by_sessions: false, by_regions: false };
    const SESSIONS: Wanted = Wanted { by_sessions: true, by_regions: false };
    const REGIONS: Wanted = Wanted { by_sessions: false, by_regions: true };

    #[test]
    fn siblings_hear_what_is_open_and_what_regions_want_and_tell_the_two_apart() {
        let (mut left, mut right) = (SiblingInterests::default(), SiblingInterests::default());
        pass(0, left.refresh(Moment(0), open(&[1]), vec![document(2)]), ONE, &mut right);
        assert_eq!(right.wanted(&document(1), &group("all")), SESSIONS);
        assert_eq!(right.wanted(&document(1), &group("other")), NOBODY);
        assert_eq!(right.wanted(&document(2), &group("all")), REGIONS);
        assert_eq!(right.open_at_siblings(), open(&[1]), "what regions want is nothing for regions");
        assert_eq!((right.group_of(&document(1)), right.group_of(&document(2))), (Some(group("all")), None));

        let quiet = left.refresh(Moment(500), open(&[1]), vec![document(2)]);
        assert_eq!(pass(500, quiet, ONE, &mut right), 0, "nothing is new");
        let news = left.refresh(Moment(1_000), open(&[1, 3]), vec![document(2)]);
        assert_eq!(pass(1_000, news, ONE, &mut right), 1);
        assert_eq!(right.wanted(&document(3), &group("all")), SESSIONS);
    }

    #[test]
    fn what_was_lost_is_told_again_and_what_is_gone_is_taken_back() {
        let (mut left, mut right) = (SiblingInterests::default(), SiblingInterests::default());
        left.refresh(Moment(0), open(&[1]), Vec::new());
        let again = left.refresh(Moment(RESTATE_MS), open(&[1]), Vec::new());
        pass(RESTATE_MS, again, ONE, &mut right);
        assert_eq!(right.wanted(&document(1), &group("all")), SESSIONS);
        // It lingers for half a minute; then it is gone, whether or not that is heard at once.
        let gone = 100_000;
        left.refresh(Moment(RESTATE_MS + 500), Vec::new(), Vec::new());
        left.restate_soon();
        pass(gone, left.refresh(Moment(gone), Vec::new(), Vec::new()), ONE, &mut right);
        assert_eq!(right.wanted(&document(1), &group("all")), NOBODY);
        let last = left.refresh(Moment(gone + RESTATE_MS), Vec::new(), Vec::new());
        assert_eq!(pass(gone, last, ONE, &mut right), 0, "who wants nothing says nothing");
        pass(gone, left.refresh(Moment(gone + RESTATE_MS + 1), open(&[1]), Vec::new()), ONE, &mut right);
        assert_eq!(right.wanted(&document(1), &group("all")), SESSIONS, "at once when something is wanted");
    }

    #[test]
    fn a_sibling_that_is_silent_or_gone_wants_nothing() {
        let (mut left, mut right) = (SiblingInterests::default(), SiblingInterests::default());
        pass(0, left.refresh(Moment(0), open(&[1]), vec![document(2)]), ONE, &mut right);
        let mut other = SiblingInterests::default();
        pass(SILENCE_MS, other.refresh(Moment(0), open(&[1]), Vec::new()), TWO, &mut right);
        right.expire(Moment(SILENCE_MS + 1));
        assert_eq!(right.wanted(&document(1), &group("all")), SESSIONS, "the other is there");
        assert_eq!(right.wanted(&document(2), &group("all")), NOBODY);
        right.forget_all();
        assert_eq!(right.wanted(&document(1), &group("all")), NOBODY);
        assert!(right.theirs.wanted_by_peers().next().is_none());
    }

    #[test]
    fn many_documents_are_told_in_parts_that_fit() {
        let many = |from: u32| (from..from + 10_000).map(u32::to_be_bytes);
        let id = |bytes: [u8; 4]| DocumentId::from_slice(&bytes.repeat(16)).expect("as long as an id may be");
        let open: Vec<_> = many(0).map(|it| (id(it), group("all"))).collect();
        let notices = SiblingInterests::default().refresh(Moment(0), open.clone(), Vec::new());
        assert!(notices.len() > 1 && notices.iter().all(|it| it.encode().len() < 128 << 10));
        let mut right = SiblingInterests::default();
        pass(0, notices, ONE, &mut right);
        assert_eq!(right.open_at_siblings().len(), open.len());
    }
}
