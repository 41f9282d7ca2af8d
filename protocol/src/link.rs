//! What travels between regions.
//!
//! A link is an ordered, reliable stream of frames between two nodes, kept open for as long as both live. It begins
//! with a handshake ([`handshake`]) in which both prove that they hold the cluster's key; after it, both send
//! [`LinkFrame`]s whenever they like. What the frames mean is [`crate::replica`]'s business, and for presence, searches
//! and scrubs that of the modules named after them; here is only what they look like ([`codec`]).

pub mod codec;
pub mod handshake;

use bytes::Bytes;

use crate::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use crate::log::Chain;

/// The feature of a node that takes frames in parts ([`LinkFrame::Part`]).
pub const FEATURE_PARTS: &str = "parts";

/// How far somebody has an origin's log: everything up to and including `seq`, durably.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub origin: OriginId,
    /// The region whose node writes the origin.
    pub region: RegionName,
    pub group: PlacementGroup,
    pub seq: Seq,
    pub chain: Chain,
}

/// A frame between regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkFrame {
    /// How far the sender has these origins; those that are not named are as they were. It announces what can be had, and
    /// acknowledges what was sent.
    Have {
        origins: Vec<Progress>,
    },
    /// Asks for an origin's entries after `after`, now and from now on; `chain` is the asker's there.
    Subscribe {
        origin: OriginId,
        after: Seq,
        chain: Chain,
    },
    /// Takes that back.
    Unsubscribe {
        origin: OriginId,
    },
    /// Consecutive entries, from `first` on; `chain` is the one before the first of them.
    Entries {
        origin: OriginId,
        first: Seq,
        chain: Chain,
        body: Bytes,
    },
    /// The answer to a subscription below what the sender's log still holds: it begins after `floor`.
    Truncated {
        origin: OriginId,
        floor: Seq,
    },
    /// Asks for a page of documents with ids after `after`, of the groups that both regions hold.
    SnapshotRequest {
        after: Option<DocumentId>,
    },
    /// A page. `vector` is what its contents cover at least: taken before the documents were read. `next` is what to ask for
    /// next; nothing after the last page.
    SnapshotPage {
        vector: Vec<Progress>,
        documents: Vec<DocumentContents>,
        next: Option<DocumentId>,
    },
    /// Documents that the next page should hold and does not, because the sender cannot give them at the moment.
    Missing {
        documents: Vec<MissingDocument>,
    },
    /// A part of a frame that is longer than [`crate::config::LINK_PART_BYTES`]. The parts of a frame have its transfer's
    /// number and come in their order; other frames, and one other transfer, may come between them.
    Part {
        transfer: u64,
        /// Bytes of the frame that come after this part; none after the last.
        left: u64,
        bytes: Bytes,
    },
    /// A sign of life to be returned at once; the number is the sender's own clock.
    Ping {
        sent_ms: u64,
    },
    Pong {
        sent_ms: u64,
    },
    /// The sender has sessions that want to see presence in these documents, or none any more.
    Interest {
        add: Vec<DocumentId>,
        remove: Vec<DocumentId>,
    },
    /// An ephemeral message of a client of the sender's region.
    Presence {
        document: DocumentId,
        sender: String,
        session: String,
        count: u64,
        data: Bytes,
    },
    /// Asks whether the receiver has a document.
    Find {
        request: u64,
        document: DocumentId,
    },
    Found {
        request: u64,
        standing: Standing,
    },
    /// Asks for all of a document.
    DocumentRequest {
        request: u64,
        document: DocumentId,
    },
    DocumentAnswer {
        request: u64,
        contents: Option<DocumentContents>,
    },
    /// Asks for the fingerprints of the documents whose hashed ids begin with `prefix`.
    ScrubRequest {
        request: u64,
        prefix: Vec<u8>,
    },
    ScrubAnswer {
        request: u64,
        fingerprints: Fingerprints,
    },
    /// Asks for the fingerprints of these documents, as they are now; the answer is a [`LinkFrame::ScrubAnswer`] that lists
    /// those that there are.
    FingerprintsRequest {
        request: u64,
        documents: Vec<DocumentId>,
    },
    /// Asks how far the receiver has taken in the logs of the groups that both are in, committed or not.
    PositionsRequest {
        request: u64,
    },
    /// Nothing if the sender holds what no log position stands for, because it is fetching a snapshot.
    PositionsAnswer {
        request: u64,
        positions: Option<Vec<(OriginId, Seq)>>,
    },
    /// Asks whether all of these changes of a document are durable at the receiver.
    HeadsRequest {
        request: u64,
        document: DocumentId,
        heads: Vec<ChangeHash>,
    },
    HeadsAnswer {
        request: u64,
        has: bool,
    },
    /// The sender ends the link, and says why: a text for the log, or [`CLONED`].
    Failed {
        message: String,
    },
}

/// What [`LinkFrame::Failed`] says to a node that goes by the name of a region which is linked already, by a node on another
/// database.
pub const CLONED: &str = "a node on another database is linked under this region's name";

/// Where a document is, as far as a region knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Absent,
    Here,
    Deleted,
    /// It exists and is nothing for the asker: its placement group is of other regions. Where their clients go, as far
    /// as that is known.
    Elsewhere {
        urls: Vec<String>,
    },
}

/// All of a document that a region holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentContents {
    pub document: DocumentId,
    pub group: PlacementGroup,
    /// Set when the document was deleted: then there is nothing else.
    pub deleted_at_ms: Option<u64>,
    pub base: Option<BaseContents>,
    /// Changes, each a chunk; with what the base covers, closed under dependencies except for pending ones.
    pub changes: Vec<Bytes>,
}

impl DocumentContents {
    /// How many bytes it takes in a frame, or a few more.
    pub fn bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, |it| it.summary.len() + it.index.len() + it.chunk.len());
        let changes: usize = self.changes.iter().map(|change| change.len() + CHANGE_LENGTH_BYTES).sum();
        base + changes + CONTENTS_FIELDS_BYTES
    }
}

/// What a change's length takes in front of it, at most: 256 MiB.
const CHANGE_LENGTH_BYTES: usize = 4;

/// What contents have beside base and changes: id, group, and lengths.
const CONTENTS_FIELDS_BYTES: usize = 384;

/// A document that a region should have given and could not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MissingDocument {
    pub document: DocumentId,
    pub group: PlacementGroup,
}

/// A base, in the forms in which it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseContents {
    pub summary: Bytes,
    pub index: Bytes,
    pub chunk: Bytes,
}

/// Fingerprints below a prefix, in one of two resolutions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fingerprints {
    /// One for each next byte of the hashed id: how many documents, and their fingerprints combined by exclusive or.
    Buckets(Vec<(u64, [u8; 16])>),
    /// One for each document.
    Documents(Vec<(DocumentId, [u8; 16])>),
}
