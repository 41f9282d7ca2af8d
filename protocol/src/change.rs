//! One change: who made it, after which changes, and how many operations it has.
//!
//! Only the header is decoded; the operations stay columns of bytes. They are walked once, run by run, to count
//! them and to refuse what stock Automerge cannot take. A change that [`Change::parse`] returns has a hash that
//! was computed here from its bytes, and is one that `automerge::Change::from_bytes` reads as well.
//!
//! Whether it fits a document is not decided here: the sequence of its actor, its dependencies and where its
//! operations may start are the change graph's business.

mod operations;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::chunk::{Chunk, ChunkError, ChunkKind, InflationProblem, chunks, content_hash, inflate};
use crate::columns::Headers;
use crate::config::{
    CHANGE_COLUMNS_MAX, CHANGE_DEPENDENCIES_MAX, CHANGE_OTHER_ACTORS_MAX, Limits, MAX_OP_MAX,
};
use crate::ids::{ActorId, ChangeHash, IdError};
use crate::leb128::{ReadError, Reader};

/// A change that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The bytes are not one whole chunk.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The chunk is a document or a bundle, or more than one chunk was given.
    #[error("not exactly one change chunk")]
    NotOneChange,
    #[error("{bytes} bytes, at most {bytes_max} are allowed")]
    TooLarge { bytes: usize, bytes_max: usize },
    /// The compressed form is not valid, or inflates to more than the limit.
    #[error("the compressed change: {0}")]
    Inflation(InflationProblem),
    #[error("the checksum does not match the contents")]
    Checksum,
    #[error(transparent)]
    Header(#[from] ReadError),
    #[error("actor: {0}")]
    Actor(#[from] IdError),
    #[error("the message is not UTF-8")]
    Message,
    /// A dependency stands twice, or out of order.
    #[error("the dependencies are not in strictly ascending order")]
    DependencyOrder,
    #[error("the sequence number is zero")]
    SeqZero,
    #[error("the first operation has counter zero")]
    StartOpZero,
    /// The last operation's counter is above what 32 bits hold, less a reserve.
    #[error("operation counters reach {0}, which is too large")]
    CounterTooLarge(u64),
    /// The other actors are not in strictly ascending order, or the author is among them.
    #[error("an actor is named twice, or out of order")]
    ActorOrder,
    /// An actor is listed that no operation refers to.
    #[error("an actor is named that no operation refers to")]
    UnusedActor,
    #[error("{operations} operations, at most {operations_max} are allowed")]
    TooManyOperations { operations: u64, operations_max: u64 },
    /// A column cannot be decoded, or does not agree with the others.
    #[error("column {column}: {problem}")]
    Column { column: u32, problem: ColumnProblem },
}

/// What is wrong with a column of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ColumnProblem {
    /// Columns must ascend by specification, and the predecessors of an operation by id.
    #[error("out of order, or present twice")]
    Order,
    /// Automerge ignores it, and so loses it: the change would no longer have its hash.
    #[error("is not known")]
    Unknown,
    #[error("has no bytes")]
    Empty,
    #[error("compressed, which is not allowed in a change")]
    Deflated,
    #[error("runs are malformed at byte {at}")]
    Runs { at: usize },
    #[error("has a different number of values than there are operations")]
    Count,
    #[error("names an actor that the change does not list")]
    Actor,
    #[error("refers to an operation that cannot come before the one that refers to it")]
    Counter,
    #[error("holds an unknown action")]
    Action,
    #[error("holds a value that is not valid")]
    Value,
}

impl ChangeError {
    /// A short, stable name of the reason, for use as a metric label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Chunk(_) => "malformed_chunk",
            Self::NotOneChange => "not_one_change",
            Self::TooLarge { .. } => "too_large",
            Self::Inflation(InflationProblem::TooLarge) => "inflation_too_large",
            Self::Inflation(InflationProblem::Invalid) => "malformed_compression",
            Self::Checksum => "wrong_checksum",
            Self::Header(_) => "malformed_header",
            Self::Actor(_) => "bad_actor",
            Self::Message => "bad_message",
            Self::DependencyOrder => "duplicate_dependencies",
            Self::SeqZero => "seq_zero",
            Self::StartOpZero => "start_op_zero",
            Self::CounterTooLarge(_) => "counter_too_large",
            Self::ActorOrder => "duplicate_actor",
            Self::UnusedActor => "unused_actor",
            Self::TooManyOperations { .. } => "too_many_operations",
            Self::Column { problem: ColumnProblem::Actor, .. } => "unknown_actor",
            Self::Column { problem: ColumnProblem::Action, .. } => "unknown_action",
            Self::Column { .. } => "malformed_column",
        }
    }
}

/// A change, checked as far as it can be without its document.
#[derive(Debug, Clone)]
pub struct Change {
    pub hash: ChangeHash,
    /// The changes that its author had seen, in ascending order.
    pub deps: SmallVec<[ChangeHash; 2]>,
    pub actor: ActorId,
    /// Which of its actor's changes it is; the first is 1.
    pub seq: u64,
    /// The counter of its first operation; at least 1.
    pub start_op: u64,
    /// How many operations it has; may be zero.
    pub op_count: u64,
    /// The actors besides its own whose operations it refers to.
    pub other_actors: Vec<ActorId>,
    /// The chunk as it came, deflated or not.
    pub bytes: Bytes,
}

/// The hash of a change chunk, whatever else it holds; `None` if it is no change chunk or its checksum is wrong.
pub fn change_name(bytes: &Bytes, limits: &Limits) -> Option<ChangeHash> {
    let mut all = chunks(bytes.clone());
    let (Some(Ok(chunk)), None) = (all.next(), all.next()) else { return None };
    let hash = match chunk.kind {
        ChunkKind::Change => content_hash(ChunkKind::Change, chunk.data()),
        ChunkKind::DeflatedChange => {
            let data = inflate(chunk.data(), limits.change_bytes_max).ok()?;
            content_hash(ChunkKind::Change, &data)
        }
        ChunkKind::Document | ChunkKind::Bundle => return None,
    };
    (hash.as_bytes()[..4] == chunk.checksum).then_some(hash)
}

impl Change {
    /// Reads exactly one change chunk.
    pub fn decode(bytes: Bytes, limits: &Limits) -> Result<Self, ChangeError> {
        let mut all = chunks(bytes);
        let chunk = all.next().ok_or(ChangeError::NotOneChange)??;
        if all.next().is_some() {
            return Err(ChangeError::NotOneChange);
        }
        Self::parse(&chunk, limits)
    }

    /// Reads a change out of its chunk.
    pub fn parse(chunk: &Chunk, limits: &Limits) -> Result<Self, ChangeError> {
        let bytes_max = limits.change_bytes_max;
        if chunk.bytes.len() > bytes_max {
            return Err(ChangeError::TooLarge { bytes: chunk.bytes.len(), bytes_max });
        }
        match chunk.kind {
            ChunkKind::Change => Self::from_data(chunk, chunk.data(), limits),
            ChunkKind::DeflatedChange => {
                let data = inflate(chunk.data(), bytes_max).map_err(ChangeError::Inflation)?;
                Self::from_data(chunk, &data, limits)
            }
            ChunkKind::Document | ChunkKind::Bundle => Err(ChangeError::NotOneChange),
        }
    }

    /// The counter of the last operation; one less than `start_op` if there are none.
    pub fn max_op(&self) -> u64 {
        self.start_op + self.op_count - 1
    }

    fn from_data(chunk: &Chunk, data: &[u8], limits: &Limits) -> Result<Self, ChangeError> {
        let hash = content_hash(ChunkKind::Change, data);
        if hash.as_bytes()[..4] != chunk.checksum {
            return Err(ChangeError::Checksum);
        }
        let mut reader = Reader::new(data);
        let deps = read_deps(&mut reader)?;
        let actor = read_actor(&mut reader)?;
        let seq = reader.unsigned("seq")?;
        let start_op = reader.unsigned("start_op")?;
        reader.signed("time")?;
        std::str::from_utf8(reader.length_prefixed("message")?).map_err(|_| ChangeError::Message)?;
        let other_actors = read_other_actors(&mut reader, &actor)?;
        if seq == 0 {
            return Err(ChangeError::SeqZero);
        }
        if start_op == 0 {
            return Err(ChangeError::StartOpZero);
        }
        let columns = Headers::read(&mut reader, CHANGE_COLUMNS_MAX)?.columns(&mut reader)?;
        let context = operations::Context {
            start_op,
            other_actors: other_actors.len(),
            actors_before_own: other_actors.partition_point(|other| *other < actor),
            operations_max: limits.change_ops_max,
        };
        // A counter that is too large is refused first, so that the walk can add to it.
        check_counter(start_op)?;
        let op_count = operations::walk(&columns, &context)?;
        check_counter(start_op + op_count - 1)?;
        Ok(Self { hash, deps, actor, seq, start_op, op_count, other_actors, bytes: chunk.bytes.clone() })
    }
}

fn check_counter(counter: u64) -> Result<(), ChangeError> {
    match counter <= MAX_OP_MAX {
        true => Ok(()),
        false => Err(ChangeError::CounterTooLarge(counter)),
    }
}

fn read_deps(reader: &mut Reader<'_>) -> Result<SmallVec<[ChangeHash; 2]>, ChangeError> {
    let count = reader.count("dependencies", 32, CHANGE_DEPENDENCIES_MAX)?;
    let mut deps = SmallVec::with_capacity(count);
    for _ in 0..count {
        deps.push(reader.hash("dependency")?);
    }
    if deps.windows(2).any(|pair: &[ChangeHash]| pair[0] >= pair[1]) {
        return Err(ChangeError::DependencyOrder);
    }
    Ok(deps)
}

fn read_actor(reader: &mut Reader<'_>) -> Result<ActorId, ChangeError> {
    Ok(ActorId::from_slice(reader.length_prefixed("actor")?)?)
}

fn read_other_actors(reader: &mut Reader<'_>, author: &ActorId) -> Result<Vec<ActorId>, ChangeError> {
    let count = reader.count("other actors", 2, CHANGE_OTHER_ACTORS_MAX)?;
    let mut actors = Vec::with_capacity(count.min(64));
    for _ in 0..count {
        actors.push(read_actor(reader)?);
    }
    let ascending = actors.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || actors.contains(author) {
        return Err(ChangeError::ActorOrder);
    }
    Ok(actors)
}
