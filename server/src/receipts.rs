//! Receipts: who wants to hear which regions hold which documents, and what is known of that.
//!
//! Clients follow documents; the documents' durable heads are taken now and then, told to their followers as what this
//! region holds, and handed to replication, which finds out about the other regions and reports back. A follower is only
//! marked: its connection asks for what is new when its socket takes a frame.
//!
//! A document that nobody follows costs nothing, and a followed one is looked at [`INTERVAL`] after it was looked at last at
//! the earliest, however often it changes.
//!
//! What is known of another region is forgotten when its link ends: who comes later hears of it again when the region, on
//! its next link, has shown that it still holds it.
//!
//! Why a receipt is true is told in `isobar_protocol::receipts`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use isobar_protocol::ids::{ChangeHash, DocumentId, RegionName, StorageId};
use isobar_protocol::notice::Observation;
use isobar_protocol::wire::Saved;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::documents::{Document, SubscriberKey};
use crate::replication::Replication;

/// How often followed documents are looked at, and their followers told: ten frames a second for each at most.
const INTERVAL: Duration = Duration::from_millis(100);

/// What a region holds, and which version of the document's state brought it.
#[derive(Debug)]
struct Known {
    storage_id: StorageId,
    heads: Vec<ChangeHash>,
    version: u64,
}

/// A document that somebody follows.
struct Followed {
    document: Arc<Document>,
    followers: Vec<SubscriberKey>,
    regions: BTreeMap<RegionName, Known>,
    /// Rises with everything that becomes known.
    version: u64,
}

#[derive(Default)]
struct State {
    documents: HashMap<DocumentId, Followed>,
    /// Documents to look at.
    moved: HashSet<DocumentId>,
    /// Documents whose followers are to be told.
    untold: HashSet<DocumentId>,
    /// Documents that nobody follows any more, for replication to forget.
    left: Vec<DocumentId>,
}

/// See the module.
pub struct Receipts {
    region: RegionName,
    storage_id: StorageId,
    state: Mutex<State>,
    news: Notify,
}

impl Followed {
    fn note(&mut self, region: &RegionName, storage_id: &StorageId, heads: Vec<ChangeHash>) {
        self.version += 1;
        let known = Known { storage_id: storage_id.clone(), heads, version: self.version };
        self.regions.insert(region.clone(), known);
    }
}

impl Receipts {
    /// Receipts for the clients of a node of this region.
    pub fn new(region: RegionName, storage_id: StorageId) -> Arc<Self> {
        Arc::new(Self { region, storage_id, state: Mutex::default(), news: Notify::new() })
    }

    /// Has a subscriber of a document marked when more becomes known of it.
    pub(crate) fn follow(&self, document: &Arc<Document>, key: SubscriberKey) {
        let mut state = self.state.lock();
        let followed = state.documents.entry(document.id().clone()).or_insert_with(|| Followed {
            document: document.clone(),
            followers: Vec::new(),
            regions: BTreeMap::new(),
            version: 0,
        });
        followed.followers.push(key);
        state.moved.insert(document.id().clone());
        drop(state);
        self.news.notify_one();
    }

    pub(crate) fn unfollow(&self, id: &DocumentId, key: SubscriberKey) {
        let mut state = self.state.lock();
        let Some(followed) = state.documents.get_mut(id) else { return };
        if let Some(place) = followed.followers.iter().position(|it| *it == key) {
            followed.followers.swap_remove(place);
        }
        if followed.followers.is_empty() {
            state.documents.remove(id);
            state.left.push(id.clone());
            drop(state);
            self.news.notify_one();
        }
    }

    /// A followed document may have other durable heads.
    pub(crate) fn moved(&self, id: &DocumentId) {
        if self.state.lock().moved.insert(id.clone()) {
            self.news.notify_one();
        }
    }

    /// What has become known of a document since a version, and the version now.
    pub(crate) fn since(&self, id: &DocumentId, version: u64) -> (Vec<Saved>, u64) {
        let state = self.state.lock();
        let Some(followed) = state.documents.get(id) else { return (Vec::new(), version) };
        let news = followed.regions.iter().filter(|(_, known)| known.version > version);
        let news = news.map(|(region, known)| Saved {
            region: region.clone(),
            storage_id: known.storage_id.clone(),
            heads: known.heads.clone(),
        });
        (news.collect(), followed.version)
    }

    /// Another region holds a document up to these heads.
    pub(crate) fn reached(
        &self,
        id: &DocumentId,
        region: &RegionName,
        storage: &StorageId,
        heads: Vec<ChangeHash>,
    ) {
        let mut state = self.state.lock();
        let Some(followed) = state.documents.get_mut(id) else { return };
        followed.note(region, storage, heads);
        if state.untold.insert(id.clone()) {
            self.news.notify_one();
        }
    }

    /// Another region is not linked any more, and what it holds is not known for certain.
    pub(crate) fn forget(&self, region: &RegionName) {
        let mut state = self.state.lock();
        state.documents.values_mut().for_each(|followed| {
            followed.regions.remove(region);
        });
    }

    /// Whoever finds out about other regions begins anew: all followed documents are looked at again.
    pub(crate) fn look_anew(&self) {
        let mut state = self.state.lock();
        let State { documents, moved, .. } = &mut *state;
        moved.extend(documents.keys().cloned());
        let is_due = !moved.is_empty();
        drop(state);
        if is_due {
            self.news.notify_one();
        }
    }

    /// Looks at documents and tells followers; to be run as a task.
    pub async fn run(self: Arc<Self>, replication: Option<Replication>) {
        loop {
            self.news.notified().await;
            // Before the documents are looked at: who leaves after that is forgotten after what is observed now.
            let left = std::mem::take(&mut self.state.lock().left);
            let observed = self.look();
            if let Some(replication) = &replication {
                replication.observe(observed, left).await;
            }
            self.tell();
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Takes the durable heads of the documents that have moved.
    fn look(&self) -> Vec<Observation> {
        let moved = std::mem::take(&mut self.state.lock().moved);
        let mut observed = Vec::new();
        for id in moved {
            let mut state = self.state.lock();
            let Some(followed) = state.documents.get_mut(&id) else { continue };
            let Some(durable) = followed.document.durable() else { continue };
            let is_news = followed.regions.get(&self.region).is_none_or(|known| known.heads != durable.heads);
            if is_news {
                followed.note(&self.region, &self.storage_id, durable.heads.clone());
                state.untold.insert(id.clone());
            }
            let (group, heads) = (durable.group, durable.heads);
            let (baseline, is_closed) = (durable.baseline, durable.is_closed);
            observed.push(Observation { document: id, group, baseline, heads, is_closed });
        }
        observed
    }

    /// Marks the followers of what has become known.
    fn tell(&self) {
        let mut state = self.state.lock();
        let State { documents, untold, .. } = &mut *state;
        for id in untold.drain() {
            let Some(followed) = documents.get(&id) else { continue };
            followed.followers.iter().for_each(|key| followed.document.mark(*key));
        }
    }
}
