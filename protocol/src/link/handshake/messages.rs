//! How the handshake's messages look in bytes.
//!
//! ```text
//! opening    1 versions cluster nonce              and whatever a newer version appends
//! proved     kind contents proof                   kind: 2 challenge, 3 introduction, 4 welcome; and nothing more
//! refusal    255 reason
//!
//! challenge  = versions nonce
//! hello      = region node storage_id group* feature* client_url? lineage
//! lineage    = node*                               or, of an older version, nothing at all
//! versions   = min max                             unsigned LEB128
//! ```
//!
//! Nonces, proofs and node ids have no length; everything else stands behind its own. Groups and features ascend, each once.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{HandshakeError, Hello, NodeId, Nonce, Refusal, Versions};
use crate::config::{
    CLIENT_URL_BYTES_MAX, HANDSHAKE_BYTES_MAX, LINK_FEATURE_BYTES_MAX, LINK_FEATURES_MAX, LINK_LINEAGE_MAX,
    PEER_ID_BYTES_MAX, REGION_GROUPS_MAX,
};
use crate::ids::StorageId;
use crate::leb128::{ReadError, write_unsigned};
use crate::link::codec::fields::{Fields, put_bytes, put_list, put_option};

/// The first byte of each message.
pub mod kind {
    pub const OPENING: u8 = 1;
    pub const CHALLENGE: u8 = 2;
    pub const INTRODUCTION: u8 = 3;
    pub const WELCOME: u8 = 4;
    pub const REFUSAL: u8 = 255;
}

/// Bytes of a node's id.
const NODE_BYTES: usize = 16;

const REASON_MALFORMED: u8 = 1;
const REASON_OTHER_CLUSTER: u8 = 2;
const REASON_NO_COMMON_VERSION: u8 = 3;
const REASON_WRONG_KEY: u8 = 4;
const REASON_OWN_REGION: u8 = 5;
const REASON_KEPT_ELSEWHERE: u8 = 6;

/// The dialler's first message.
pub struct Opening<'a> {
    pub versions: Versions,
    pub cluster: &'a str,
    pub nonce: Nonce,
}

impl<'a> Opening<'a> {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![kind::OPENING];
        put_versions(&mut out, self.versions);
        put_bytes(&mut out, self.cluster.as_bytes());
        out.extend_from_slice(&self.nonce.0);
        out
    }

    pub fn decode(message: &'a Bytes) -> Result<Self, HandshakeError> {
        let mut fields = message_of(kind::OPENING, message)?;
        let versions = versions(&mut fields)?;
        let cluster = fields.text("cluster", PEER_ID_BYTES_MAX)?;
        let nonce = fields.array("nonce").map(Nonce)?;
        Ok(Self { versions, cluster, nonce })
    }
}

/// A message behind the opening, as it is sent.
pub struct Proved {
    pub contents: Bytes,
    pub proof: [u8; 32],
}

impl Proved {
    pub fn encode(&self, kind: u8) -> Vec<u8> {
        let mut out = vec![kind];
        put_bytes(&mut out, &self.contents);
        out.extend_from_slice(&self.proof);
        out
    }

    pub fn decode(kind: u8, message: &Bytes) -> Result<Self, HandshakeError> {
        let mut fields = message_of(kind, message)?;
        let contents = fields.bytes_within("contents", HANDSHAKE_BYTES_MAX)?;
        let proof = fields.array("proof")?;
        fields.end()?;
        Ok(Self { contents, proof })
    }
}

/// The contents of the acceptor's first message.
pub struct Challenge {
    pub versions: Versions,
    pub nonce: Nonce,
}

impl Challenge {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_versions(&mut out, self.versions);
        out.extend_from_slice(&self.nonce.0);
        out
    }

    pub fn decode(contents: Bytes) -> Result<Self, HandshakeError> {
        let mut fields = Fields::new(&contents);
        Ok(Self { versions: versions(&mut fields)?, nonce: fields.array("nonce").map(Nonce)? })
    }
}

impl Hello {
    /// The contents of a message, without its proof. Whoever fills a hello keeps to the limits, or is refused.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, self.region.as_str());
        out.extend_from_slice(&self.node.0);
        put_text(&mut out, self.storage_id.as_str());
        let groups: Vec<_> = self.groups.iter().collect();
        put_list(&mut out, &groups, |out, group| put_text(out, group.as_str()));
        let features: Vec<_> = self.features.iter().collect();
        put_list(&mut out, &features, |out, feature| put_text(out, feature));
        put_option(&mut out, self.client_url.as_ref(), |out, url| put_text(out, url));
        if let Some(lineage) = &self.lineage {
            put_list(&mut out, lineage, |out, node| out.extend_from_slice(&node.0));
        }
        out
    }

    pub fn decode(contents: Bytes) -> Result<Self, ReadError> {
        let mut fields = Fields::new(&contents);
        Ok(Self {
            region: fields.region()?,
            node: fields.array("node").map(NodeId)?,
            storage_id: fields.name("storage id", StorageId::new)?,
            groups: ascending(&mut fields, "placement groups", REGION_GROUPS_MAX, Fields::group)?,
            features: ascending(&mut fields, "features", LINK_FEATURES_MAX, |fields| {
                fields.text("feature", LINK_FEATURE_BYTES_MAX).map(str::to_owned)
            })?,
            client_url: fields.option("client address", |fields| {
                fields.text("client address", CLIENT_URL_BYTES_MAX).map(str::to_owned)
            })?,
            lineage: match fields.end() {
                Ok(()) => None,
                Err(_) => Some(fields.list("lineage", NODE_BYTES, LINK_LINEAGE_MAX, |fields| {
                    fields.array("node").map(NodeId)
                })?),
            },
        })
    }
}

/// A list without repetitions; each item takes at least the byte of its length.
fn ascending<'a, T: Ord>(
    fields: &mut Fields<'a>,
    field: &'static str,
    count_max: usize,
    item: impl FnMut(&mut Fields<'a>) -> Result<T, ReadError>,
) -> Result<BTreeSet<T>, ReadError> {
    let malformed = fields.malformed(field);
    let items = fields.list(field, 1, count_max, item)?;
    match items.windows(2).all(|pair| pair[0] < pair[1]) {
        true => Ok(items.into_iter().collect()),
        false => Err(malformed),
    }
}

pub fn encode_refusal(refusal: Refusal) -> Vec<u8> {
    let reason = match refusal {
        Refusal::Malformed => REASON_MALFORMED,
        Refusal::OtherCluster => REASON_OTHER_CLUSTER,
        Refusal::NoCommonVersion => REASON_NO_COMMON_VERSION,
        Refusal::WrongKey => REASON_WRONG_KEY,
        Refusal::OwnRegion => REASON_OWN_REGION,
        Refusal::KeptElsewhere => REASON_KEPT_ELSEWHERE,
        Refusal::Other(reason) => reason,
    };
    vec![kind::REFUSAL, reason]
}

/// `None` if the message is something else.
pub fn decode_refusal(message: &Bytes) -> Result<Option<Refusal>, ReadError> {
    let mut fields = Fields::new(message);
    if fields.byte("message type")? != kind::REFUSAL {
        return Ok(None);
    }
    Ok(Some(match fields.byte("reason")? {
        REASON_MALFORMED => Refusal::Malformed,
        REASON_OTHER_CLUSTER => Refusal::OtherCluster,
        REASON_NO_COMMON_VERSION => Refusal::NoCommonVersion,
        REASON_WRONG_KEY => Refusal::WrongKey,
        REASON_OWN_REGION => Refusal::OwnRegion,
        REASON_KEPT_ELSEWHERE => Refusal::KeptElsewhere,
        other => Refusal::Other(other),
    }))
}

/// The fields of a message of this type.
fn message_of(kind: u8, message: &Bytes) -> Result<Fields<'_>, HandshakeError> {
    let mut fields = Fields::new(message);
    match fields.byte("message type")? {
        found if found == kind => Ok(fields),
        other => Err(HandshakeError::OutOfTurn(other)),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_bytes(out, text.as_bytes());
}

fn put_versions(out: &mut Vec<u8>, versions: Versions) {
    write_unsigned(out, versions.min.into());
    write_unsigned(out, versions.max.into());
}

fn versions(fields: &mut Fields<'_>) -> Result<Versions, ReadError> {
    let malformed = fields.malformed("versions");
    let (min, max) = (fields.unsigned_32("version")?, fields.unsigned_32("version")?);
    match min >= 1 && min <= max {
        true => Ok(Versions { min, max }),
        false => Err(malformed),
    }
}
