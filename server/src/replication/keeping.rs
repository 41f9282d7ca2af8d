//! When this node replicates: whenever it keeps the region's links, each time with a replica made anew from storage.
//!
//! Between such times siblings store what other regions send, and nothing in memory would know of it. What was under way at
//! the end of one time reports to nobody.

use std::collections::BTreeSet;
use std::sync::Arc;

use isobar_protocol::ids::{OriginId, PlacementGroup, RegionName};
use isobar_protocol::link::{LinkFrame, MissingDocument, Progress};
use isobar_protocol::replica::Replica;
use tokio::sync::{mpsc, watch};

use super::task::Task;
use super::{EVENTS_MAX, Event, Parts, RETRY, Shared, Verdict};
use crate::storage::{Storage, StorageError};

/// What a link is told that comes to a node that does not keep the links any more.
const KEPT_ELSEWHERE: &str = "another node of this region keeps its links";

/// See the module.
pub(super) struct Keeping {
    pub(super) region: RegionName,
    pub(super) groups: BTreeSet<PlacementGroup>,
    pub(super) own: BTreeSet<OriginId>,
    pub(super) parts: Parts,
    pub(super) shared: Arc<Shared>,
    pub(super) queue: mpsc::Receiver<Event>,
}

impl Shared {
    /// Takes up how far the other regions are, as it was noted last by whoever kept the links.
    pub(super) async fn read_acknowledgements(&self, storage: &dyn Storage) -> Result<(), StorageError> {
        self.read_members(storage).await?;
        let noted = storage.acknowledgements().await?;
        let mut acknowledged = self.acknowledged.lock();
        for it in noted {
            let seq = acknowledged.entry((it.region, it.origin)).or_insert(it.seq);
            *seq = it.seq.max(*seq);
        }
        Ok(())
    }
}

/// Resolves to whether the value became this; false if it never will.
async fn becomes(keeps: &mut watch::Receiver<bool>, value: bool) -> bool {
    keeps.wait_for(|keeps| *keeps == value).await.is_ok()
}

impl Keeping {
    /// Runs until nobody has a handle any more, or this node will never keep the links again.
    pub(super) async fn run(mut self) {
        let mut keeps = self.parts.keeps_links.clone();
        loop {
            tokio::select! {
                keeps = becomes(&mut keeps, true) => if !keeps { return },
                event = self.queue.recv() => match event {
                    Some(event) => { refuse(event); continue }
                    None => return,
                },
            }
            let (replica, missing) = match self.prepare().await {
                Ok(made) => made,
                Err(error) => {
                    tracing::warn!(%error, "links not kept yet, trying on");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let (events, answers) = mpsc::channel(EVENTS_MAX);
            let mut task = Task::new(replica, self.parts.clone(), self.shared.clone(), &events);
            task.want(missing);
            // What was observed before was for another to find out.
            self.parts.receipts.look_anew();
            let ended = tokio::select! {
                () = task.run(&mut self.queue, answers) => true,
                _ = becomes(&mut keeps, false) => false,
            };
            task.end(KEPT_ELSEWHERE);
            self.shared.lineage.send_replace(None);
            if ended {
                return;
            }
        }
    }

    /// A replica of what is stored, and what snapshots of before lacked. From now on links can be made.
    async fn prepare(&self) -> Result<(Replica, Vec<MissingDocument>), StorageError> {
        let lineage = self.parts.storage.registered_nodes().await?;
        self.shared.read_acknowledgements(&*self.parts.storage).await?;
        let origins = self.parts.storage.origins().await?.into_iter().map(|it| Progress {
            origin: it.id,
            region: it.region,
            group: it.group,
            seq: it.seq,
            chain: it.chain,
        });
        let missing = self.parts.storage.missing_documents().await?;
        let origins = origins.collect();
        self.shared.lineage.send_replace(Some(lineage));
        Ok((Replica::new(self.region.clone(), self.groups.clone(), origins, self.own.clone()), missing))
    }
}

/// What comes while this node does not keep the links. Who waits for an answer learns that there is none.
fn refuse(event: Event) {
    if let Event::Opened { outgoing, kept, .. } = event {
        outgoing.push(LinkFrame::Failed { message: KEPT_ELSEWHERE.to_owned() });
        outgoing.close();
        let _ = kept.send(Verdict::Superfluous);
    }
}
