//! What the nodes of one region tell each other, and how it looks in bytes.
//!
//! Nodes that share a database follow each other's logs; everything else that passes between them are notices. A notice
//! goes to all siblings at once, in the order in which its sender told it, and may be lost: whatever matters is told again, or
//! somebody notices that it is missing. Only one node, the *keeper*, has links to other regions; the others learn through it
//! what those have, and it speaks to them for all.
//!
//! # Bytes
//!
//! A notice is a byte that says what it is and the fields of its variant, in the order in which [`Notice`] declares them, as
//! in [`crate::link::codec`]: numbers are unsigned LEB128, what has no fixed size stands behind its length, lists behind their
//! count. Nodes of different versions share a region while it is updated: unknown notices are passed over, and what follows
//! the known fields is not looked at. Every count and length is bounded by what follows and by a limit.

use bytes::Bytes;
use uuid::Uuid;

use crate::config::{
    CLIENT_URL_BYTES_MAX, ELSEWHERE_URLS_MAX, INTEREST_DOCUMENTS_MAX, NOTICE_NODES_MAX, NOTICE_REGIONS_MAX,
    PEER_ID_BYTES_MAX, PRESENCE_DATA_BYTES_MAX, RECEIPT_HEADS_MAX, SNAPSHOT_PAGE_DOCUMENTS_MAX,
};
use crate::ids::{ChangeHash, DocumentId, PlacementGroup, RegionName, StorageId};
use crate::leb128::{ReadError, write_unsigned};
use crate::link::Standing;
use crate::link::codec::fields::{Fields, put_bytes, put_list, put_option};
use crate::receipts::Baseline;
use crate::replica::LinkId;

#[cfg(test)]
mod tests;

/// Bytes of ids, heads and the like that are put into one notice; what is more goes into several.
pub const NOTICE_ITEM_BYTES: usize = 96 << 10;

/// A notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The sender has appended to a log.
    Appended,
    /// The sender has stored contents of these documents that no log here need name.
    Stored { documents: Vec<DocumentId> },
    /// The presence of which documents the sender wants to hear of. With `anew`, what it said before on this scope counts
    /// no more.
    Interest { scope: Scope, anew: bool, add: Vec<DocumentId>, remove: Vec<DocumentId> },
    /// An ephemeral message of a client of the sender, or of another region if `from_region`.
    Presence {
        from_region: bool,
        group: PlacementGroup,
        document: DocumentId,
        sender: String,
        session: String,
        count: u64,
        data: Bytes,
    },
    /// The sender keeps the region's links: which regions it knows, and how it stands to those whom it gives receipts.
    Keeping { regions: Vec<KnownRegion>, observers: Vec<ObserverStanding> },
    /// Asks the keeper to look for a document in the other regions of a group.
    Search { request: u64, group: PlacementGroup, document: DocumentId },
    /// The keeper is looking for what `node` asked for.
    Searching { node: Uuid, request: u64 },
    /// What came of it. `Here`: it was somewhere and is in the database now.
    Searched { node: Uuid, request: u64, outcome: Standing },
    /// What documents hold at the sender of which somebody there wants receipts, and those of which nobody does any more.
    /// Numbered from 1 within an epoch; the first of an epoch makes void all that was said in earlier ones.
    Observed { epoch: u64, number: u64, observed: Vec<Observation>, left: Vec<DocumentId> },
    /// To the observer `node`: the region at the other end of the link holds these documents up to these heads.
    Reached {
        node: Uuid,
        epoch: u64,
        region: RegionName,
        storage_id: StorageId,
        link: LinkId,
        documents: Vec<(DocumentId, Vec<ChangeHash>)>,
    },
}

/// Whose interest in presence it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Sessions of the sender, in documents of this group.
    Sessions(PlacementGroup),
    /// Other regions that are linked to the sender.
    Regions,
}

/// Another region, as the keeper knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownRegion {
    pub region: RegionName,
    pub storage_id: StorageId,
    pub client_url: Option<String>,
    /// The link that is up, if one is.
    pub link: Option<LinkId>,
}

/// How the keeper stands to a node that observes documents for its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObserverStanding {
    pub node: Uuid,
    pub epoch: u64,
    /// The number of the last of its observations that was taken.
    pub taken: u64,
    /// How many notices of reached documents it was told in this epoch.
    pub told: u64,
}

/// The durable heads of a document at one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    pub document: DocumentId,
    pub group: PlacementGroup,
    /// A number of the observing node.
    pub baseline: Baseline,
    pub heads: Vec<ChangeHash>,
    pub is_closed: bool,
}

impl Observation {
    /// Bytes in a notice, roughly.
    pub fn weight(&self) -> usize {
        self.document.as_bytes().len() + self.group.as_str().len() + 32 * self.heads.len() + 16
    }
}

/// The first byte of each notice. A number that was used once is never given another meaning.
mod kind {
    pub const APPENDED: u8 = 0;
    pub const STORED: u8 = 1;
    pub const INTEREST: u8 = 2;
    pub const PRESENCE: u8 = 3;
    pub const KEEPING: u8 = 4;
    pub const SEARCH: u8 = 5;
    pub const SEARCHING: u8 = 6;
    pub const SEARCHED: u8 = 7;
    pub const OBSERVED: u8 = 8;
    pub const REACHED: u8 = 9;
}

impl Notice {
    // One arm per notice: longer than a function should be, but it reads as a table.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(128);
        match self {
            Self::Appended => out.push(kind::APPENDED),
            Self::Stored { documents } => {
                out.push(kind::STORED);
                put_list(&mut out, documents, put_document);
            }
            Self::Interest { scope, anew, add, remove } => {
                out.push(kind::INTEREST);
                let group = match scope {
                    Scope::Sessions(group) => Some(group),
                    Scope::Regions => None,
                };
                put_option(&mut out, group, |out, group| put_bytes(out, group.as_str().as_bytes()));
                out.push(u8::from(*anew));
                put_list(&mut out, add, put_document);
                put_list(&mut out, remove, put_document);
            }
            Self::Presence { from_region, group, document, sender, session, count, data } => {
                out.reserve(data.len());
                out.extend([kind::PRESENCE, u8::from(*from_region)]);
                put_bytes(&mut out, group.as_str().as_bytes());
                put_document(&mut out, document);
                put_bytes(&mut out, sender.as_bytes());
                put_bytes(&mut out, session.as_bytes());
                write_unsigned(&mut out, *count);
                put_bytes(&mut out, data);
            }
            Self::Keeping { regions, observers } => {
                out.push(kind::KEEPING);
                put_list(&mut out, regions, put_region);
                put_list(&mut out, observers, put_standing);
            }
            Self::Search { request, group, document } => {
                put_request(&mut out, kind::SEARCH, None, *request);
                put_bytes(&mut out, group.as_str().as_bytes());
                put_document(&mut out, document);
            }
            Self::Searching { node, request } => put_request(&mut out, kind::SEARCHING, Some(node), *request),
            Self::Searched { node, request, outcome } => {
                put_request(&mut out, kind::SEARCHED, Some(node), *request);
                put_outcome(&mut out, outcome);
            }
            Self::Observed { epoch, number, observed, left } => {
                put_request(&mut out, kind::OBSERVED, None, *epoch);
                write_unsigned(&mut out, *number);
                put_list(&mut out, observed, put_observation);
                put_list(&mut out, left, put_document);
            }
            Self::Reached { node, epoch, region, storage_id, link, documents } => {
                put_request(&mut out, kind::REACHED, Some(node), *epoch);
                put_bytes(&mut out, region.as_str().as_bytes());
                put_bytes(&mut out, storage_id.as_str().as_bytes());
                write_unsigned(&mut out, link.0);
                put_list(&mut out, documents, |out, (document, heads)| {
                    put_document(out, document);
                    put_list(out, heads, put_head);
                });
            }
        }
        out.into()
    }

    /// Reads a notice; nothing if it is of a kind that is not known here.
    pub fn decode(notice: &Bytes) -> Result<Option<Self>, ReadError> {
        let fields = &mut Fields::new(notice);
        Ok(Some(match fields.byte("kind")? {
            kind::APPENDED => Self::Appended,
            kind::STORED => Self::Stored { documents: documents(fields, SNAPSHOT_PAGE_DOCUMENTS_MAX)? },
            kind::INTEREST => Self::Interest {
                scope: fields.option("scope", Fields::group)?.map_or(Scope::Regions, Scope::Sessions),
                anew: truth(fields)?,
                add: documents(fields, INTEREST_DOCUMENTS_MAX)?,
                remove: documents(fields, INTEREST_DOCUMENTS_MAX)?,
            },
            kind::PRESENCE => presence(fields)?,
            kind::KEEPING => Self::Keeping {
                regions: fields.list("regions", 4, NOTICE_REGIONS_MAX, region)?,
                observers: fields.list("observers", 19, NOTICE_NODES_MAX, standing)?,
            },
            kind::SEARCH => Self::Search {
                request: fields.unsigned("request")?,
                group: fields.group()?,
                document: fields.document()?,
            },
            kind::SEARCHING => Self::Searching { node: node(fields)?, request: fields.unsigned("request")? },
            kind::SEARCHED => Self::Searched {
                node: node(fields)?,
                request: fields.unsigned("request")?,
                outcome: outcome(fields)?,
            },
            kind::OBSERVED => Self::Observed {
                epoch: fields.unsigned("epoch")?,
                number: fields.unsigned("number")?,
                observed: fields.list("observed", 7, OBSERVED_MAX, observation)?,
                left: documents(fields, OBSERVED_MAX)?,
            },
            kind::REACHED => Self::Reached {
                node: node(fields)?,
                epoch: fields.unsigned("epoch")?,
                region: fields.region()?,
                storage_id: fields.name("storage", StorageId::new)?,
                link: LinkId(fields.unsigned("link")?),
                documents: fields
                    .list("documents", 3, OBSERVED_MAX, |fields| Ok((fields.document()?, heads(fields)?)))?,
            },
            _ => return Ok(None),
        }))
    }
}

/// Documents in one notice of observations at most; bytes bound it first.
const OBSERVED_MAX: usize = NOTICE_ITEM_BYTES;

/// Cuts items into parts that fit into notices; there is at least one part.
pub fn parts<T>(items: Vec<T>, weight: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = 0;
    for item in items {
        let more = weight(&item);
        let is_full = bytes + more > NOTICE_ITEM_BYTES;
        match parts.last_mut() {
            Some(part) if !is_full || part.is_empty() => part.push(item),
            _ => {
                bytes = 0;
                parts.push(vec![item]);
            }
        }
        bytes += more;
    }
    parts
}

fn put_document(out: &mut Vec<u8>, document: &DocumentId) {
    put_bytes(out, document.as_bytes());
}

fn put_head(out: &mut Vec<u8>, head: &ChangeHash) {
    out.extend_from_slice(head.as_bytes());
}

fn put_request(out: &mut Vec<u8>, kind: u8, node: Option<&Uuid>, request: u64) {
    out.push(kind);
    node.into_iter().for_each(|node| out.extend_from_slice(node.as_bytes()));
    write_unsigned(out, request);
}

fn put_region(out: &mut Vec<u8>, region: &KnownRegion) {
    put_bytes(out, region.region.as_str().as_bytes());
    put_bytes(out, region.storage_id.as_str().as_bytes());
    put_option(out, region.client_url.as_ref(), |out, url| put_bytes(out, url.as_bytes()));
    put_option(out, region.link.as_ref(), |out, link| write_unsigned(out, link.0));
}

fn put_standing(out: &mut Vec<u8>, standing: &ObserverStanding) {
    out.extend_from_slice(standing.node.as_bytes());
    [standing.epoch, standing.taken, standing.told].into_iter().for_each(|it| write_unsigned(out, it));
}

fn put_observation(out: &mut Vec<u8>, observation: &Observation) {
    put_document(out, &observation.document);
    put_bytes(out, observation.group.as_str().as_bytes());
    write_unsigned(out, observation.baseline.0);
    put_list(out, &observation.heads, put_head);
    out.push(u8::from(observation.is_closed));
}

fn put_outcome(out: &mut Vec<u8>, outcome: &Standing) {
    match outcome {
        Standing::Absent | Standing::Deleted => out.push(0),
        Standing::Here => out.push(1),
        Standing::Elsewhere { urls } => {
            out.push(2);
            put_list(out, urls, |out, url| put_bytes(out, url.as_bytes()));
        }
    }
}

fn node(fields: &mut Fields<'_>) -> Result<Uuid, ReadError> {
    fields.array("node").map(Uuid::from_bytes)
}

fn truth(fields: &mut Fields<'_>) -> Result<bool, ReadError> {
    Ok(fields.option("truth", |_| Ok(()))?.is_some())
}

fn url(fields: &mut Fields<'_>) -> Result<String, ReadError> {
    fields.text("url", CLIENT_URL_BYTES_MAX).map(str::to_owned)
}

fn documents(fields: &mut Fields<'_>, count_max: usize) -> Result<Vec<DocumentId>, ReadError> {
    fields.list("documents", 2, count_max, Fields::document)
}

fn heads(fields: &mut Fields<'_>) -> Result<Vec<ChangeHash>, ReadError> {
    fields.list("heads", 32, RECEIPT_HEADS_MAX, |fields| fields.array("head").map(ChangeHash))
}

fn presence(fields: &mut Fields<'_>) -> Result<Notice, ReadError> {
    Ok(Notice::Presence {
        from_region: truth(fields)?,
        group: fields.group()?,
        document: fields.document()?,
        sender: fields.text("sender", PEER_ID_BYTES_MAX)?.to_owned(),
        session: fields.text("session", PEER_ID_BYTES_MAX)?.to_owned(),
        count: fields.unsigned("count")?,
        data: fields.bytes_within("presence data", PRESENCE_DATA_BYTES_MAX)?,
    })
}

fn region(fields: &mut Fields<'_>) -> Result<KnownRegion, ReadError> {
    Ok(KnownRegion {
        region: fields.region()?,
        storage_id: fields.name("storage", StorageId::new)?,
        client_url: fields.option("url", url)?,
        link: fields.option("link", |fields| fields.unsigned("link").map(LinkId))?,
    })
}

fn standing(fields: &mut Fields<'_>) -> Result<ObserverStanding, ReadError> {
    Ok(ObserverStanding {
        node: node(fields)?,
        epoch: fields.unsigned("epoch")?,
        taken: fields.unsigned("taken")?,
        told: fields.unsigned("told")?,
    })
}

fn observation(fields: &mut Fields<'_>) -> Result<Observation, ReadError> {
    Ok(Observation {
        document: fields.document()?,
        group: fields.group()?,
        baseline: Baseline(fields.unsigned("baseline")?),
        heads: heads(fields)?,
        is_closed: truth(fields)?,
    })
}

fn outcome(fields: &mut Fields<'_>) -> Result<Standing, ReadError> {
    let malformed = fields.malformed("outcome");
    match fields.byte("outcome")? {
        0 => Ok(Standing::Absent),
        1 => Ok(Standing::Here),
        2 => Ok(Standing::Elsewhere { urls: fields.list("urls", 1, ELSEWHERE_URLS_MAX, url)? }),
        _ => Err(malformed),
    }
}
