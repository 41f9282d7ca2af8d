//! A region: its disk, and the node that runs on it. What the node knows beyond the disk dies with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use isobar_protocol::config::Limits;
use isobar_protocol::graph::Graph;
use isobar_protocol::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq, StorageId};
use isobar_protocol::interest::Interests;
use isobar_protocol::link::DocumentContents;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::log::{Chain, Opened};
use isobar_protocol::receipts::{Baseline, Receipts};
use isobar_protocol::replica::{Effect, LinkId, Moment, Peer, ReceivedRun, Replica};

use crate::change_bytes::Made;
use crate::commits::{After, Batch};
use crate::disk::Disk;
use crate::receipts::Ways;

#[derive(Debug)]
pub struct Region {
    pub name: RegionName,
    pub groups: BTreeSet<PlacementGroup>,
    /// A member of its groups: whom others wait for before they truncate.
    pub joined: bool,
    /// It has left for good.
    pub gone: bool,
    pub disk: Disk,
    /// Counts how often the disk was replaced by another.
    pub disk_number: u64,
    pub copies: Vec<Disk>,
    pub node: Option<Node>,
    /// Counts starts.
    pub life: u64,
    pub clock: Clock,
    /// The time of day as the machine has it. Unlike the clock it may be set back.
    pub day_offset_ms: u64,
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
    /// How far each own origin is, for all that the node knows.
    pub positions: BTreeMap<OriginId, (Seq, Chain)>,
    pub graphs: BTreeMap<DocumentId, Graph>,
    /// The base that each graph has, and the number of the graph.
    pub generations: BTreeMap<DocumentId, (u64, u64)>,
    loads: u64,
    pub ways: BTreeMap<DocumentId, Ways>,
    /// Documents of which a change was refused that others have accepted; they are served no more. With the number of the
    /// submission that had been made last: when that is durable, so is the reason.
    pub refused: BTreeMap<DocumentId, u64>,
    pub queue: VecDeque<Submission>,
    /// Counts submissions, and how many are known to be durable.
    pub submissions: u64,
    pub durable_submission: u64,
    /// A commit that is under way, and what is left to be done after the last.
    pub batch: Option<Batch>,
    pub after: VecDeque<After>,
    /// Documents of which a base is being made or pruned.
    pub compacting: BTreeSet<DocumentId>,
    pub receipts: Receipts,
    baselines: u64,
    pub observed_at: Moment,
    pub effects: VecDeque<Effect>,
    /// When it was called last, and when its timer is through; by the world's clock.
    pub called_at: u64,
    pub tick_at: u64,
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
    Own {
        group: PlacementGroup,
        document: DocumentId,
        content: Own,
    },
    Run(Box<ReceivedRun>),
    /// A document of a page; none if the page is empty.
    Contents {
        contents: Option<Box<DocumentContents>>,
        is_last: bool,
    },
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
            Self::Own { .. } => Vec::new(),
            Self::Run(run) => {
                let changes = run.entries.iter().filter_map(|(document, opened)| match opened {
                    Opened::Change(change) => Some((document, &made[&change.hash])),
                    _ => None,
                });
                changes.collect()
            }
            // What a base brings is found when the document is loaded anew.
            Self::Contents { contents, .. } => {
                let hashes = contents.iter().flat_map(|it| {
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
    /// Milliseconds of the day's time, as the machine has it.
    pub fn day_ms(&self, now: u64) -> u64 {
        self.day_offset_ms + now
    }

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
        let vector = replica.vector();
        let mine = vector.iter().filter(|it| own.values().any(|id| *id == it.origin));
        Self {
            positions: mine.map(|it| (it.origin, (it.seq, it.chain))).collect(),
            replica,
            own,
            graphs: BTreeMap::new(),
            generations: BTreeMap::new(),
            loads: 0,
            ways: BTreeMap::new(),
            refused: BTreeMap::new(),
            queue: VecDeque::new(),
            submissions: 0,
            durable_submission: 0,
            batch: None,
            after: VecDeque::new(),
            compacting: BTreeSet::new(),
            receipts: Receipts::default(),
            baselines: Baseline::NOTHING.0,
            observed_at: Moment(0),
            effects: VecDeque::new(),
            called_at: 0,
            tick_at: u64::MAX,
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
        self.batch.iter().flat_map(|batch| &batch.items).chain(&self.queue)
    }

    /// Whether everything that was submitted is durable, and the node has taken note of it.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.batch.is_none() && self.after.is_empty()
    }

    pub fn push(&mut self, submission: Submission) {
        self.submissions += 1;
        self.queue.push_back(submission);
    }

    /// Lets go of a document in memory.
    pub fn forget(&mut self, document: &DocumentId) {
        self.graphs.remove(document);
        self.ways.remove(document);
    }

    /// A number that no graph of this node has had.
    pub fn new_load(&mut self) -> u64 {
        self.loads += 1;
        self.loads
    }

    /// A number that no document of this node has had.
    pub fn new_baseline(&mut self) -> Baseline {
        self.baselines += 1;
        Baseline(self.baselines)
    }
}
