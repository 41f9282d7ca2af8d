//! Fetching and serving whole documents, for a region that is behind what anybody's log still holds.
//!
//! The vector that was taken before the first page is adopted after the last: every document was read later than that, so
//! it holds at least what the vector covers. Pages are asked for one by one, each when the one before is stored. When the
//! link is lost on the way, the fetch goes on with the same region, or with one that has everything the vector covers.
//!
//! A document that the peer cannot give, or that cannot be stored here, holds up nobody. The vector would claim what is not
//! here, so these documents are noted in the transaction that adopts it; whoever reads the notes asks for them by name.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effect, LinkId, Moment, Origin, Replica};
use crate::config::{FETCH_PATIENCE_MS, SNAPSHOT_MISSING_MAX};
use crate::ids::{DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use crate::link::{DocumentContents, LinkFrame, MissingDocument, Progress};
use crate::planted::{self, Fault};

/// A snapshot that is being fetched.
#[derive(Debug)]
pub(super) struct Fetch {
    /// Nothing while no link is there to go on with.
    link: Option<LinkId>,
    region: RegionName,
    /// When the link was lost, if there is none.
    lost_at: Moment,
    /// Empty until the first page has come.
    vector: Vec<Progress>,
    /// What could not be had so far.
    missing: BTreeMap<DocumentId, PlacementGroup>,
    begun_at: Moment,
    /// What has come so far.
    documents: u64,
    bytes: u64,
    stage: Stage,
}

/// How far a fetch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchStatus {
    /// The region that it goes on with, or went on with last.
    pub region: RegionName,
    /// What has come so far, and what could not be had.
    pub documents: u64,
    pub bytes: u64,
    pub missing: usize,
    pub running_ms: u64,
}

/// A page of documents, as it was read for a peer.
#[derive(Debug, Clone, Default)]
pub struct Page {
    pub documents: Vec<DocumentContents>,
    /// Documents that belong into the page and cannot be given.
    pub missing: Vec<MissingDocument>,
    /// What to ask for next; nothing after the last page.
    pub next: Option<DocumentId>,
}

#[derive(Debug)]
enum Stage {
    /// A page after this document is asked for.
    Asking(Option<DocumentId>),
    /// A page is being stored; the one after it is to be asked for next, if there is one.
    Storing(Option<DocumentId>),
    Adopting,
}

impl Fetch {
    fn is_asking(&self) -> bool {
        matches!(self.stage, Stage::Asking(_))
    }

    pub(super) fn is_from(&self, link: LinkId) -> bool {
        self.link == Some(link)
    }
}

impl Replica {
    /// Begins or goes on with a fetch, if there is one to be made.
    pub(super) fn start_fetch(&mut self, now: Moment) {
        // The region may have lost what the vector covers, so that nobody ever has it all again.
        let given_up = self.fetch.as_ref().is_some_and(|fetch| {
            fetch.link.is_none() && now.0 - fetch.lost_at.0 >= FETCH_PATIENCE_MS && fetch.is_asking()
        });
        if given_up {
            self.fetch = None;
        }
        match &self.fetch {
            Some(fetch) if fetch.link.is_none() => self.resume_fetch(),
            Some(_) => {}
            None => {
                if let Some(link) =
                    self.origins.iter().find_map(|(id, origin)| self.snapshot_link(*id, origin))
                {
                    let region = self.links[&link].peer.region.clone();
                    let stage = Stage::Asking(None);
                    self.fetch = Some(Fetch {
                        link: Some(link),
                        region,
                        lost_at: now,
                        vector: Vec::new(),
                        missing: BTreeMap::new(),
                        begun_at: now,
                        documents: 0,
                        bytes: 0,
                        stage,
                    });
                    self.send(link, LinkFrame::SnapshotRequest { after: None });
                }
            }
        }
    }

    /// How far the fetch is that is under way, if there is one.
    pub fn fetch_status(&self, now: Moment) -> Option<FetchStatus> {
        self.fetch.as_ref().map(|fetch| FetchStatus {
            region: fetch.region.clone(),
            documents: fetch.documents,
            bytes: fetch.bytes,
            missing: fetch.missing.len(),
            running_ms: now.0.saturating_sub(fetch.begun_at.0),
        })
    }

    /// The peer to fetch from because of this origin: nobody's log holds what is missing here, and that peer has it.
    fn snapshot_link(&self, id: OriginId, origin: &Origin) -> Option<LinkId> {
        let gains =
            |link: LinkId| self.links[&link].theirs.get(&id).is_some_and(|seq| *seq > origin.received.0);
        if origin.own
            || origin.sibling
            || origin.forked
            || planted::is(Fault::IgnoreTruncated)
            || origin.route.is_some_and(|route| gains(route.link))
        {
            return None;
        }
        let truncated = self.links.iter().filter(|(_, link)| {
            let floor = link.floors.get(&id);
            floor.is_some_and(|floor| *floor > origin.received.0) && self.shares(link, &origin.group)
        });
        truncated.min_by_key(|(_, link)| link.round_trip_ms.unwrap_or(u64::MAX)).map(|(id, _)| *id)
    }

    fn resume_fetch(&mut self) {
        let Some(fetch) = &self.fetch else { return };
        let covers = |link: &LinkId| {
            let theirs = &self.links[link].theirs;
            planted::is(Fault::ResumeAnywhere)
                || fetch.vector.iter().all(|it| theirs.get(&it.origin).is_some_and(|seq| *seq >= it.seq))
        };
        let same = |link: &LinkId| self.links[link].peer.region == fetch.region;
        let link =
            self.links.keys().find(|it| same(it) && covers(it)).or(self.links.keys().find(|it| covers(it)));
        let (Some(link), Stage::Asking(after)) = (link.copied(), &fetch.stage) else { return };
        let after = after.clone();
        let region = self.links[&link].peer.region.clone();
        if let Some(fetch) = &mut self.fetch {
            fetch.link = Some(link);
            fetch.region = region;
        }
        self.send(link, LinkFrame::SnapshotRequest { after });
    }

    pub(super) fn fetch_lost(&mut self, now: Moment, link: LinkId) {
        let Some(fetch) = &mut self.fetch else { return };
        if fetch.link != Some(link) {
            return;
        }
        fetch.link = None;
        fetch.lost_at = now;
        if fetch.vector.is_empty() {
            self.fetch = None;
        }
    }

    /// The page that comes next lacks these.
    pub(super) fn receive_missing(&mut self, now: Moment, link: LinkId, documents: Vec<MissingDocument>) {
        let Some(known) = self.links.get(&link) else { return };
        if documents.iter().any(|it| !self.shares(known, &it.group)) {
            self.effects.push(Effect::Close { link, reason: "a page lacks documents of other groups" });
            return;
        }
        let is_due = |fetch: &&mut Fetch| fetch.link == Some(link) && fetch.is_asking();
        let Some(fetch) = self.fetch.as_mut().filter(is_due) else { return };
        if fetch.missing.len() + documents.len() > SNAPSHOT_MISSING_MAX {
            self.fetch = None;
            self.effects.push(Effect::Close { link, reason: "the snapshot lacks too many documents" });
            return self.link_closed(now, link);
        }
        fetch.missing.extend(documents.into_iter().map(|it| (it.document, it.group)));
    }

    /// A page has come.
    pub(super) fn receive_page(
        &mut self,
        link: LinkId,
        vector: Vec<Progress>,
        documents: Vec<DocumentContents>,
        next: Option<DocumentId>,
    ) {
        let Some(known) = self.links.get(&link) else { return };
        let shared = |group: &PlacementGroup| self.may_take(known, group);
        if documents.iter().any(|it| !shared(&it.group)) || vector.iter().any(|it| !shared(&it.group)) {
            self.effects.push(Effect::Close { link, reason: "a page holds documents of other groups" });
            return;
        }
        let Some(fetch) = self.fetch.as_mut().filter(|fetch| fetch.link == Some(link)) else { return };
        let Stage::Asking(after) = &fetch.stage else { return };
        if after.is_none() {
            fetch.vector = vector;
        }
        fetch.stage = Stage::Storing(next);
        if planted::is(Fault::AdoptEarly) && !fetch.vector.is_empty() {
            self.effects.push(Effect::AdoptOrigins { origins: fetch.vector.clone(), missing: Vec::new() });
        }
        fetch.documents += documents.len() as u64;
        fetch.bytes += documents.iter().map(|it| it.bytes() as u64).sum::<u64>();
        self.effects.push(Effect::StorePage { documents });
    }

    /// The answer to an [`Effect::StorePage`], with the documents that cannot be stored as they were sent.
    pub fn page_stored(&mut self, now: Moment, unusable: Vec<MissingDocument>) {
        let Some(fetch) = &mut self.fetch else { return };
        let Stage::Storing(next) = &mut fetch.stage else { return };
        // A page's documents are few beside the limit of those that may be missing.
        fetch.missing.extend(unusable.into_iter().map(|it| (it.document, it.group)));
        match next.take() {
            Some(next) => {
                fetch.stage = Stage::Asking(Some(next.clone()));
                match fetch.link {
                    Some(link) => self.send(link, LinkFrame::SnapshotRequest { after: Some(next) }),
                    None => self.start_fetch(now),
                }
            }
            None => {
                fetch.stage = Stage::Adopting;
                let mut origins = fetch.vector.clone();
                origins.retain(|it| self.origins.get(&it.origin).is_none_or(|ours| adopts(ours, it)));
                let missing = std::mem::take(&mut fetch.missing).into_iter();
                let missing = missing.map(|(document, group)| MissingDocument { document, group }).collect();
                self.effects.push(Effect::AdoptOrigins { origins, missing });
            }
        }
    }

    /// The answer to an [`Effect::AdoptOrigins`]: these counters are raised, durably.
    pub fn adopted(&mut self, now: Moment, origins: &[Progress]) {
        self.fetch = None;
        for adopted in origins {
            let origin = self.origins.entry(adopted.origin).or_insert_with(|| Origin::new(adopted, false));
            if adopts(origin, adopted) {
                origin.durable = (adopted.seq, adopted.chain);
            }
            if origin.durable.0 > origin.received.0 {
                origin.received = origin.durable;
                self.renew_route(now, adopted.origin);
            }
        }
        // Who is subscribed here below what was adopted must hear that the log does not hold it.
        origins.iter().for_each(|adopted| self.pump_origin(now, adopted.origin));
        self.choose_routes(now);
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        links.into_iter().for_each(|link| self.announce(now, link));
    }

    /// A peer asks for a page.
    pub(super) fn page_requested(&mut self, link: LinkId, after: Option<DocumentId>) {
        let Some(known) = self.links.get(&link) else { return };
        let may_send = |group: &&PlacementGroup| self.may_send(known, group);
        let groups: BTreeSet<PlacementGroup> = self.groups.iter().filter(may_send).cloned().collect();
        let vector = match after {
            Some(_) => Vec::new(),
            None => {
                self.vector().into_iter().filter(|it| groups.contains(&it.group) && it.seq > Seq(0)).collect()
            }
        };
        let known = self.links.get_mut(&link).expect("it was there a moment ago");
        if known.serving.is_some() {
            return;
        }
        known.serving = Some(vector);
        self.effects.push(Effect::ReadPage { link, after, groups });
    }

    /// The answer to an [`Effect::ReadPage`]. Nothing if it cannot be read: the link is closed, and the peer asks somebody
    /// else, or again.
    pub fn page_read(&mut self, now: Moment, link: LinkId, page: Option<Page>) {
        let Some(vector) = self.links.get_mut(&link).and_then(|known| known.serving.take()) else { return };
        match page {
            Some(Page { documents, missing, next }) => {
                if !missing.is_empty() {
                    self.send(link, LinkFrame::Missing { documents: missing });
                }
                self.send(link, LinkFrame::SnapshotPage { vector, documents, next });
            }
            None => {
                self.effects.push(Effect::Close { link, reason: "a page of documents cannot be read" });
                self.link_closed(now, link);
            }
        }
    }
}

fn adopts(ours: &Origin, vector: &Progress) -> bool {
    !ours.own && !ours.sibling && !ours.forked && ours.durable.0 < vector.seq
}
