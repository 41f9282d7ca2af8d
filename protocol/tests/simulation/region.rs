//! A region: its disk, and the node that runs on it. What the node knows beyond the disk dies with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use isobar_protocol::config::Limits;
use isobar_protocol::graph::Graph;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, StorageId};
use isobar_protocol::interest::Interests;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::link::{DocumentContents, Progress};
use isobar_protocol::log::Opened;
use isobar_protocol::replica::{Effect, LinkId, Moment, Peer, ReceivedRun, Replica};

use crate::change_bytes::Made;
use crate::disk::Disk;

#[derive(Debug)]
pub struct Region {
    pub name: RegionName,
    pub groups: BTreeSet<PlacementGroup>,
    /// A member of its groups: whom others wait for before they truncate.
    pub joined: bool,
    pub disk: Disk,
    pub copies: Vec<Disk>,
    pub node: Option<Node>,
    /// Counts starts.
    pub life: u64,
    pub clock: Clock,
    pub paused_until: u64,
    /// Crash before so many more effects are performed.
    pub effects_left: Option<u64>,
    /// Documents that were seen deleted on this disk.
    pub deleted: BTreeSet<DocumentId>,
}

/// A clock that is off, and goes too fast or too slowly.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub offset_ms: u64,
    pub rate_permille: u64,
}

impl Clock {
    pub fn at(&self, now: u64) -> Moment {
        Moment(self.offset_ms + now * self.rate_permille / 1000)
    }
}

#[derive(Debug)]
pub struct Node {
    pub replica: Replica,
    pub own: BTreeMap<PlacementGroup, OriginId>,
    pub graphs: BTreeMap<DocumentId, Graph>,
    /// Documents of which a stored change was refused; they are served no more.
    pub refused: BTreeSet<DocumentId>,
    pub queue: Vec<Submission>,
    pub committing: Vec<Submission>,
    pub effects: VecDeque<Effect>,
    /// The connection and side of each link.
    pub links: BTreeMap<LinkId, (usize, usize)>,
    /// Log reads that are under way, by link.
    pub reads: BTreeMap<LinkId, usize>,
    pub interests: Interests,
    pub refreshed_at: Moment,
    /// Documents that sessions have open, and those that any had.
    pub open: BTreeMap<DocumentId, PlacementGroup>,
    pub opened: BTreeSet<DocumentId>,
    /// Numbers of what was said in other regions.
    pub heard: BTreeSet<u64>,
}

/// What waits for a commit.
#[derive(Debug)]
pub enum Submission {
    Own { group: PlacementGroup, document: DocumentId, content: Own },
    Run(Box<ReceivedRun>),
    Page(Vec<DocumentContents>),
    Adopt(Vec<Progress>),
}

#[derive(Debug)]
pub enum Own {
    Change(Arc<Made>),
    Tombstone { deleted_at_ms: u64 },
}

impl Submission {
    /// The changes it brings.
    pub fn changes<'a>(
        &'a self,
        made: &'a std::collections::HashMap<ChangeHash, Arc<Made>>,
    ) -> Vec<(&'a DocumentId, &'a Arc<Made>)> {
        match self {
            Self::Own { document, content: Own::Change(change), .. } => vec![(document, change)],
            Self::Own { .. } | Self::Adopt(_) => Vec::new(),
            Self::Run(run) => {
                let changes = run.entries.iter().filter_map(|(document, opened)| match opened {
                    Opened::Change(change) => Some((document, &made[&change.hash])),
                    _ => None,
                });
                changes.collect()
            }
            Self::Page(documents) => {
                let hashes = documents.iter().flat_map(|it| {
                    it.changes.iter().map(move |bytes| (&it.document, &made[&name_of(bytes)]))
                });
                hashes.collect()
            }
        }
    }
}

/// The hash of a change from its bytes.
pub fn name_of(bytes: &bytes::Bytes) -> ChangeHash {
    isobar_protocol::change::change_name(bytes, &Limits::stored()).expect("only changes are sent in pages")
}

impl Region {
    pub fn peer(&self) -> Peer {
        Peer {
            region: self.name.clone(),
            storage_id: StorageId::new(self.name.as_str()).expect("a short name"),
            groups: self.groups.clone(),
            node: NodeId([0; 16]),
            client_url: None,
            features: BTreeSet::new(),
        }
    }
}

impl Node {
    pub fn new(replica: Replica, own: BTreeMap<PlacementGroup, OriginId>) -> Self {
        Self {
            replica,
            own,
            graphs: BTreeMap::new(),
            refused: BTreeSet::new(),
            queue: Vec::new(),
            committing: Vec::new(),
            effects: VecDeque::new(),
            links: BTreeMap::new(),
            reads: BTreeMap::new(),
            interests: Interests::default(),
            refreshed_at: Moment(0),
            open: BTreeMap::new(),
            opened: BTreeSet::new(),
            heard: BTreeSet::new(),
        }
    }

    /// What was submitted and is not durable, in the order of submission.
    pub fn submitted(&self) -> impl Iterator<Item = &Submission> {
        self.committing.iter().chain(&self.queue)
    }
}
