//! How two nodes prove to each other that they hold the cluster's key, before anything else passes between them.
//!
//! ```text
//! dialler                                                acceptor
//!    Opening       versions, cluster, nonce          ──>
//!                  <──  versions, nonce, proof              Challenge
//!    Introduction  hello, proof                      ──>
//!                  <──  hello, proof                        Welcome
//! ```
//!
//! A proof is an HMAC-SHA256 under the cluster's key, over the name of the message that it stands in and the exact
//! bytes of everything that was sent before, both ways, and of that message up to the proof. Both nonces are among them,
//! so a proof is good for one handshake; and the message's name, so it is good in one place: it can be
//! neither replayed, nor reflected, nor mixed with another handshake's. Whoever changes a byte on the way is noticed
//! at the next proof.
//!
//! **A stranger gets nothing.** The acceptor is the first to prove itself, as it costs no further message. So the dialler
//! says who it is (region, node, storage, groups) only to a holder of the key, and the acceptor after that, to a
//! holder of the key. What a stranger who dials gets is the range of versions, a nonce, and a proof that says
//! nothing; with it guesses at the key could be tried offline, which is why a key has at least
//! [`CLUSTER_KEY_BYTES_MIN`] bytes, and should be random. What a stranger who is dialled gets is the range of versions and
//! the cluster's name, which is no secret.
//!
//! Whoever refuses may say why ([`HandshakeError::refusal`]) before it closes. That is no proof of anything, and for the log.
//!
//! # What it does not do
//!
//! It does not protect what follows: who can change bytes on the way can take over a link once it is proved, and
//! who can listen reads it. Between sites a link goes through TLS or a private network. Deadlines are the caller's, as is
//! randomness: a nonce is drawn anew for each handshake. Whether the two get on (who may link to whom, one
//! link or two) is decided above; only a region's link to itself is refused here.
//!
//! # Growth
//!
//! The opening's fields never change, so that any two versions can tell each other that they do not fit. A hello is
//! extended by fields at its end, which older nodes skip, but which the proof covers.

mod messages;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use self::messages::{Challenge, Opening, Proved, kind};
#[cfg(doc)]
use crate::config::LINK_LINEAGE_MAX;
use crate::config::{CLUSTER_KEY_BYTES_MIN, HANDSHAKE_BYTES_MAX};
use crate::ids::{IdError, PlacementGroup, RegionName, StorageId};
use crate::leb128::ReadError;

/// Opens everything that a proof is made over, so that no other use of the key yields one.
const DOMAIN: &[u8] = b"isobar link handshake 1";

/// The versions of the links' protocol that this program speaks.
pub const VERSIONS: Versions = Versions { min: 1, max: 1 };

/// A range of versions, both ends included; `min` is at least 1 and at most `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    pub min: u32,
    pub max: u32,
}

impl Versions {
    /// The highest version that both speak.
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// The secret that all nodes of a cluster share. There is no empty one.
#[derive(Clone)]
pub struct ClusterKey(Arc<[u8]>);

/// A cluster key that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a cluster key of {bytes} bytes, it takes at least {CLUSTER_KEY_BYTES_MIN} random ones")]
pub struct KeyTooShort {
    pub bytes: usize,
}

impl ClusterKey {
    /// At least [`CLUSTER_KEY_BYTES_MIN`] bytes; text is as good as binary.
    pub fn new(key: &[u8]) -> Result<Self, KeyTooShort> {
        match key.len() >= CLUSTER_KEY_BYTES_MIN {
            true => Ok(Self(Arc::from(key))),
            false => Err(KeyTooShort { bytes: key.len() }),
        }
    }
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

/// What a cluster is called: it tells clusters apart, it keeps nobody out. 1 to 256 bytes of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterId(Arc<str>);

impl ClusterId {
    pub fn new(text: &str) -> Result<Self, IdError> {
        // A peer id has the same bounds.
        crate::ids::PeerId::new(text).map(|_| Self(Arc::from(text)))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A node, for as long as it runs or longer: it tells nodes of one region apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 16]);

/// Random bytes of one handshake; never used for a second one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 32]);

/// What a node says of itself to who has proved the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub region: RegionName,
    pub node: NodeId,
    /// The region's storage, as clients know it.
    pub storage_id: StorageId,
    /// The placement groups whose documents the region holds.
    pub groups: BTreeSet<PlacementGroup>,
    /// Extensions that the node understands; what one of two does not know is not used between them.
    pub features: BTreeSet<String>,
    /// Where the region's clients reach it, for those that are sent on to it.
    pub client_url: Option<String>,
    /// The nodes that were started on the region's database, this one among them: at most [`LINK_LINEAGE_MAX`], the newest. It
    /// tells a successor or sibling of a node from one on a copy of its database. Nothing if the node is of a version that does
    /// not say.
    pub lineage: Option<Vec<NodeId>>,
}

/// What a node brings to each of its handshakes.
#[derive(Debug, Clone)]
pub struct Identity {
    pub key: ClusterKey,
    pub cluster: ClusterId,
    pub versions: Versions,
    pub hello: Hello,
}

/// What a handshake ends in: the other side holds the key, and this is what it said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The version that the link speaks.
    pub version: u32,
    pub peer: Hello,
}

/// A handshake that failed. It is over, and the connection is to be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("a malformed handshake: {0}")]
    Malformed(#[from] ReadError),
    #[error("a handshake message of {0} bytes, at most {HANDSHAKE_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// Another message was due.
    #[error("a handshake message of type {0} out of turn")]
    OutOfTurn(u8),
    #[error("the peer belongs to the cluster {0:?}")]
    OtherCluster(String),
    #[error("the peer speaks versions {theirs}, this node {ours}")]
    NoCommonVersion { ours: Versions, theirs: Versions },
    /// The other side holds another key; or the bytes were changed on the way, or are of another handshake.
    #[error("the peer could not prove that it holds the cluster's key")]
    WrongKey,
    /// It holds the key, and goes by this region's own name.
    #[error("the peer is of this node's own region, {0}")]
    OwnRegion(RegionName),
    /// The other side ended it. That it said why is not proof that it is so.
    #[error("the peer refused: {0}")]
    Refused(Refusal),
}

/// Why the other side ended a handshake, by its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it could not read a message")]
    Malformed,
    #[error("it belongs to another cluster")]
    OtherCluster,
    #[error("it speaks other versions")]
    NoCommonVersion,
    #[error("it holds another cluster key")]
    WrongKey,
    #[error("it goes by the same region name")]
    OwnRegion,
    /// It is one of several nodes of its region, and not the one that links to others at the moment.
    #[error("another node of its region keeps the links")]
    KeptElsewhere,
    /// A newer node's reason.
    #[error("reason {0}")]
    Other(u8),
}

impl Refusal {
    /// What to send before closing, by who refuses without a look at what the other side says.
    pub fn encode(self) -> Vec<u8> {
        messages::encode_refusal(self)
    }
}

impl HandshakeError {
    /// What to send before closing; nothing to who has refused already.
    pub fn refusal(&self) -> Option<Vec<u8>> {
        let reason = match self {
            Self::Malformed(_) | Self::TooLong(_) | Self::OutOfTurn(_) => Refusal::Malformed,
            Self::OtherCluster(_) => Refusal::OtherCluster,
            Self::NoCommonVersion { .. } => Refusal::NoCommonVersion,
            Self::WrongKey => Refusal::WrongKey,
            Self::OwnRegion(_) => Refusal::OwnRegion,
            Self::Refused(_) => return None,
        };
        Some(messages::encode_refusal(reason))
    }
}

/// One side of a handshake that is under way. After an error there is none.
#[derive(Debug)]
pub struct Handshake {
    identity: Identity,
    stage: Stage,
    transcript: Transcript,
}

/// What is awaited.
#[derive(Debug)]
enum Stage {
    /// By the acceptor, which will answer with its nonce.
    Opening(Nonce),
    /// By the dialler.
    Challenge,
    /// By the acceptor.
    Introduction { version: u32 },
    /// By the dialler.
    Welcome { version: u32 },
}

/// How a handshake goes on after a message.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "two are made for a link, and none is kept")]
pub enum Step {
    /// Send this, and wait for the next message.
    Answer { handshake: Handshake, send: Vec<u8> },
    /// Send what there is to send; after it come link frames.
    Done { agreed: Agreed, send: Option<Vec<u8>> },
}

impl Handshake {
    /// Begins as the dialler. The bytes are the first message.
    pub fn dial(identity: Identity, nonce: Nonce) -> (Self, Vec<u8>) {
        let opening = Opening { versions: identity.versions, cluster: identity.cluster.as_str(), nonce };
        let send = opening.encode();
        let mut transcript = Transcript::new(&identity.key);
        transcript.append(&send);
        (Self { identity, stage: Stage::Challenge, transcript }, send)
    }

    /// Begins as the acceptor.
    pub fn accept(identity: Identity, nonce: Nonce) -> Self {
        let transcript = Transcript::new(&identity.key);
        Self { identity, stage: Stage::Opening(nonce), transcript }
    }

    /// Takes the other side's next message.
    pub fn receive(self, message: &Bytes) -> Result<Step, HandshakeError> {
        if message.len() > HANDSHAKE_BYTES_MAX {
            return Err(HandshakeError::TooLong(message.len()));
        }
        if let Some(refusal) = messages::decode_refusal(message)? {
            return Err(HandshakeError::Refused(refusal));
        }
        match self.stage {
            Stage::Opening(nonce) => self.opened(message, nonce),
            Stage::Challenge => self.challenged(message),
            Stage::Introduction { version } => self.introduced(message, version),
            Stage::Welcome { version } => self.welcomed(message, version),
        }
    }

    fn opened(mut self, message: &Bytes, nonce: Nonce) -> Result<Step, HandshakeError> {
        let opening = Opening::decode(message)?;
        if opening.cluster != self.identity.cluster.as_str() {
            return Err(HandshakeError::OtherCluster(opening.cluster.to_owned()));
        }
        let version = self.common(opening.versions)?;
        self.transcript.append(message);
        let challenge = Challenge { versions: self.identity.versions, nonce };
        let send = self.transcript.prove(kind::CHALLENGE, challenge.encode());
        self.stage = Stage::Introduction { version };
        Ok(Step::Answer { handshake: self, send })
    }

    fn challenged(mut self, message: &Bytes) -> Result<Step, HandshakeError> {
        let challenge = Challenge::decode(self.transcript.verify(kind::CHALLENGE, message)?)?;
        let version = self.common(challenge.versions)?;
        let send = self.transcript.prove(kind::INTRODUCTION, self.identity.hello.encode());
        self.stage = Stage::Welcome { version };
        Ok(Step::Answer { handshake: self, send })
    }

    fn introduced(mut self, message: &Bytes, version: u32) -> Result<Step, HandshakeError> {
        let peer = self.hello(kind::INTRODUCTION, message)?;
        let send = self.transcript.prove(kind::WELCOME, self.identity.hello.encode());
        Ok(Step::Done { agreed: Agreed { version, peer }, send: Some(send) })
    }

    fn welcomed(mut self, message: &Bytes, version: u32) -> Result<Step, HandshakeError> {
        let peer = self.hello(kind::WELCOME, message)?;
        Ok(Step::Done { agreed: Agreed { version, peer }, send: None })
    }

    fn hello(&mut self, kind: u8, message: &Bytes) -> Result<Hello, HandshakeError> {
        let peer = Hello::decode(self.transcript.verify(kind, message)?)?;
        if peer.region == self.identity.hello.region {
            return Err(HandshakeError::OwnRegion(peer.region));
        }
        Ok(peer)
    }

    fn common(&self, theirs: Versions) -> Result<u32, HandshakeError> {
        let ours = self.identity.versions;
        ours.common(theirs).ok_or(HandshakeError::NoCommonVersion { ours, theirs })
    }
}

/// Everything that was sent so far, both ways, under the key.
#[derive(Clone)]
struct Transcript(Hmac<Sha256>);

impl Transcript {
    fn new(key: &ClusterKey) -> Self {
        let mac = Hmac::new_from_slice(&key.0).expect("HMAC takes keys of any length");
        let mut transcript = Self(mac);
        transcript.append(DOMAIN);
        transcript
    }

    /// Each message stands behind its length, so that no two lists of messages are the same bytes.
    fn append(&mut self, message: &[u8]) {
        self.0.update(&(message.len() as u64).to_be_bytes());
        self.0.update(message);
    }

    /// What is proved with a message: that its sender holds the key, and saw what was sent before. The type says who
    /// sends it, and where in the handshake.
    fn with(&self, kind: u8, contents: &[u8]) -> Hmac<Sha256> {
        let mut proved = self.clone();
        proved.append(&[kind]);
        proved.append(contents);
        proved.0
    }

    /// Makes a message of contents, and adds it to what was sent.
    fn prove(&mut self, kind: u8, contents: Vec<u8>) -> Vec<u8> {
        let proof = self.with(kind, &contents).finalize().into_bytes();
        let message = Proved { contents: Bytes::from(contents), proof: proof.into() }.encode(kind);
        self.append(&message);
        message
    }

    /// The contents of a received message whose proof is right. Nothing of a message is looked at before that.
    fn verify(&mut self, kind: u8, message: &Bytes) -> Result<Bytes, HandshakeError> {
        let Proved { contents, proof } = Proved::decode(kind, message)?;
        self.with(kind, &contents).verify_slice(&proof).map_err(|_| HandshakeError::WrongKey)?;
        self.append(message);
        Ok(contents)
    }
}

impl std::fmt::Debug for Transcript {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Transcript(..)")
    }
}
