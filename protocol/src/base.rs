//! What is known of a base without opening it.
//!
//! A base is one Automerge document chunk that covers the first `n` changes of a document. Three things are kept
//! beside it: the [`BaseSummary`], small and always in memory while the document is live; the [`BaseIndex`], large
//! and loaded only when a change arrives that refers to the inside of the base; and the chunk itself, which nobody
//! but a client (or the next compaction) ever opens.
//!
//! Positions count a document's changes in the order in which this region could apply them, from 0. A base covers
//! positions `0..change_count`.
//!
//! Both have an encoding of their own for storage: little-endian integers behind a version byte. It is read back
//! only by the program that wrote it or a newer one, but a damaged one is an error, never a panic.

use std::collections::BTreeSet;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use smallvec::SmallVec;

use crate::ids::{ActorId, ChangeHash};

mod actor_set;

pub use actor_set::ActorSet;

const SUMMARY_VERSION: u8 = 1;
const INDEX_VERSION: u8 = 1;

/// Stored bytes that are not a summary or an index; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stored {what} is damaged or from a newer program")]
pub struct BaseDamaged {
    what: &'static str,
}

/// A head of the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseHead {
    pub hash: ChangeHash,
    pub position: u64,
    pub max_op: u64,
    /// The authors among the head and its ancestors, as indexes into [`BaseSummary::actors`].
    pub actors: ActorSet,
}

/// Where an author stands at the end of the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseActor {
    pub id: ActorId,
    pub last_seq: u64,
    pub last_position: u64,
    /// Stock authors name their own last change as a dependency, so that this one is asked for without the index.
    pub last_hash: ChangeHash,
}

/// The facts of a base that every change after it is checked against.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BaseSummary {
    pub change_count: u64,
    pub max_op: u64,
    pub heads: Vec<BaseHead>,
    pub actors: Vec<BaseActor>,
}

impl BaseSummary {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(SUMMARY_VERSION);
        out.put_u64_le(self.change_count);
        out.put_u64_le(self.max_op);
        out.put_u32_le(self.actors.len() as u32);
        for actor in &self.actors {
            out.put_u16_le(actor.id.as_bytes().len() as u16);
            out.put_slice(actor.id.as_bytes());
            out.put_u64_le(actor.last_seq);
            out.put_u64_le(actor.last_position);
            out.put_slice(actor.last_hash.as_bytes());
        }
        out.put_u32_le(self.heads.len() as u32);
        for head in &self.heads {
            out.put_slice(head.hash.as_bytes());
            out.put_u64_le(head.position);
            out.put_u64_le(head.max_op);
            out.put_u32_le(head.actors.run_count() as u32);
            for run in head.actors.runs() {
                out.put_u32_le(run.start);
                out.put_u32_le(run.end);
            }
        }
        out.freeze()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BaseDamaged> {
        Self::read(bytes).ok_or(BaseDamaged { what: "base summary" })
    }

    fn read(mut input: &[u8]) -> Option<Self> {
        if input.try_get_u8().ok()? != SUMMARY_VERSION {
            return None;
        }
        let change_count = input.try_get_u64_le().ok()?;
        let max_op = input.try_get_u64_le().ok()?;
        let actor_count = input.try_get_u32_le().ok()?;
        let mut actors = Vec::new();
        for _ in 0..actor_count {
            actors.push(Self::read_actor(&mut input)?);
        }
        let head_count = input.try_get_u32_le().ok()?;
        let mut heads = Vec::new();
        for _ in 0..head_count {
            heads.push(Self::read_head(&mut input, actor_count)?);
        }
        input.is_empty().then_some(Self { change_count, max_op, heads, actors })
    }

    fn read_actor(input: &mut &[u8]) -> Option<BaseActor> {
        let length = usize::from(input.try_get_u16_le().ok()?);
        let (id, rest) = input.split_at_checked(length)?;
        *input = rest;
        let id = ActorId::from_slice(id).ok()?;
        let last_seq = input.try_get_u64_le().ok()?;
        let last_position = input.try_get_u64_le().ok()?;
        let last_hash = read_hash(input)?;
        Some(BaseActor { id, last_seq, last_position, last_hash })
    }

    fn read_head(input: &mut &[u8], actor_count: u32) -> Option<BaseHead> {
        let hash = read_hash(input)?;
        let position = input.try_get_u64_le().ok()?;
        let max_op = input.try_get_u64_le().ok()?;
        let count = input.try_get_u32_le().ok()?;
        let mut runs = Vec::new();
        for _ in 0..count {
            runs.push(input.try_get_u32_le().ok()?..input.try_get_u32_le().ok()?);
        }
        let actors = ActorSet::from_runs(runs.into_iter(), actor_count)?;
        Some(BaseHead { hash, position, max_op, actors })
    }
}

fn read_hash(input: &mut &[u8]) -> Option<ChangeHash> {
    let (hash, rest) = input.split_first_chunk::<32>()?;
    *input = rest;
    Some(ChangeHash(*hash))
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn read_varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = input.try_get_u8().ok()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// One change of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseEntry {
    pub hash: ChangeHash,
    /// Index into [`BaseSummary::actors`].
    pub actor: u32,
    pub max_op: u64,
    /// Positions of its dependencies; all smaller than its own.
    pub parents: SmallVec<[u64; 2]>,
}

/// Every change of a base by hash and by position: about 40 bytes a change stored, 65 in memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BaseIndex {
    hashes: Vec<ChangeHash>,
    actors: Vec<u32>,
    max_ops: Vec<u64>,
    /// `parents[parent_ends[i - 1]..parent_ends[i]]` are the dependencies of change `i`.
    parents: Vec<u64>,
    parent_ends: Vec<u32>,
    // What follows is derived.
    /// Positions in the order of their hashes.
    by_hash: Vec<u32>,
    /// Whether everything before a position is among its ancestors.
    covers: Vec<bool>,
    /// Where each author's first change stands.
    first_positions: Vec<u64>,
}

impl BaseIndex {
    /// Appends entries in position order.
    pub fn extended(&self, entries: impl Iterator<Item = BaseEntry>) -> Self {
        let mut index = self.clone();
        for entry in entries {
            index.hashes.push(entry.hash);
            index.actors.push(entry.actor);
            index.max_ops.push(entry.max_op);
            index.parents.extend_from_slice(&entry.parents);
            index.parent_ends.push(index.parents.len() as u32);
        }
        index.derive();
        index
    }

    /// The index of the first `len` changes: that of an earlier base, if this one goes on from it.
    ///
    /// # Panics
    /// If it is shorter.
    pub fn prefix(mut self, len: usize) -> Self {
        assert!(len <= self.len(), "a later base covers more");
        self.hashes.truncate(len);
        self.actors.truncate(len);
        self.max_ops.truncate(len);
        self.parent_ends.truncate(len);
        self.parents.truncate(self.parent_ends.last().map_or(0, |end| *end as usize));
        self.derive();
        self
    }

    fn derive(&mut self) {
        self.by_hash = (0..self.hashes.len() as u32).collect();
        let hashes = &self.hashes;
        self.by_hash.sort_unstable_by_key(|position| hashes[*position as usize]);
        self.covers = Vec::with_capacity(self.len());
        self.first_positions = Vec::new();
        let mut is_head = vec![false; self.len()];
        let mut head_count = 0_usize;
        for position in 0..self.len() {
            for parent in self.parents(position) {
                head_count -= usize::from(std::mem::replace(&mut is_head[*parent as usize], false));
            }
            is_head[position] = true;
            head_count += 1;
            self.covers.push(head_count == 1);
            // Authors are numbered in the order of their first change.
            if self.actors[position] as usize == self.first_positions.len() {
                self.first_positions.push(position as u64);
            }
        }
    }

    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// What it occupies in memory.
    pub fn resident_bytes(&self) -> usize {
        self.hashes.len() * (32 + 4 + 8 + 4 + 4 + 1) + (self.parents.len() + self.first_positions.len()) * 8
    }

    /// The hashes of its changes, in the order of their positions.
    pub fn hashes(&self) -> &[ChangeHash] {
        &self.hashes
    }

    pub fn position_of(&self, hash: &ChangeHash) -> Option<u64> {
        let found =
            self.by_hash.binary_search_by_key(hash, |position| self.hashes[*position as usize]).ok()?;
        Some(u64::from(self.by_hash[found]))
    }

    pub(crate) fn max_op(&self, position: u64) -> u64 {
        self.max_ops[position as usize]
    }

    fn parents(&self, position: usize) -> &[u64] {
        let start = if position == 0 { 0 } else { self.parent_ends[position - 1] as usize };
        &self.parents[start..self.parent_ends[position] as usize]
    }

    /// What the `entries` (positions in the base) descend from, themselves included. Walks down until one change has
    /// everything before it, so it takes as long as there are changes beside each other; `None` if more than `steps_max`.
    pub(crate) fn closure(&self, entries: &[u64], steps_max: u64) -> Option<BaseClosure> {
        let mut open: BTreeSet<u64> = entries.iter().copied().collect();
        let mut closure = BaseClosure::default();
        let mut actors = BTreeSet::new();
        // Parents stand before their children, so taking the last first sees every child before its parents.
        while let Some(position) = open.pop_last() {
            if self.covers[position as usize] {
                closure.full_to = position + 1;
                break;
            }
            if closure.members.len() as u64 >= steps_max {
                return None;
            }
            closure.members.push(position);
            actors.insert(self.actors[position as usize]);
            open.extend(self.parents(position as usize));
        }
        closure.members.reverse();
        let count = self.first_positions.partition_point(|first| *first < closure.full_to);
        closure.actors = ActorSet::first(count as u32).union(&actors.into_iter().collect());
        Some(closure)
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(5 + self.resident_bytes());
        out.put_u8(INDEX_VERSION);
        out.put_u32_le(self.hashes.len() as u32);
        for hash in &self.hashes {
            out.put_slice(hash.as_bytes());
        }
        for position in 0..self.len() {
            put_varint(&mut out, u64::from(self.actors[position]));
            put_varint(&mut out, self.max_ops[position]);
            let parents = self.parents(position);
            put_varint(&mut out, parents.len() as u64);
            for parent in parents {
                // Nearly always the change before, so a distance takes one byte where a position takes three.
                put_varint(&mut out, position as u64 - parent);
            }
        }
        out.freeze()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BaseDamaged> {
        Self::read(bytes).ok_or(BaseDamaged { what: "base index" })
    }

    fn read(mut input: &[u8]) -> Option<Self> {
        if input.try_get_u8().ok()? != INDEX_VERSION {
            return None;
        }
        let count = input.try_get_u32_le().ok()? as usize;
        if input.len() < count.checked_mul(32)? {
            return None;
        }
        let mut index = Self::default();
        for _ in 0..count {
            index.hashes.push(read_hash(&mut input)?);
        }
        for position in 0..count as u64 {
            index.actors.push(u32::try_from(read_varint(&mut input)?).ok()?);
            index.max_ops.push(read_varint(&mut input)?);
            for _ in 0..read_varint(&mut input)? {
                let distance = read_varint(&mut input)?;
                if distance == 0 || distance > position {
                    return None;
                }
                index.parents.push(position - distance);
            }
            index.parent_ends.push(index.parents.len() as u32);
        }
        if !input.is_empty() {
            return None;
        }
        index.derive();
        Some(index)
    }
}

/// The part of a base that some changes descend from.
#[derive(Debug, Default)]
pub(crate) struct BaseClosure {
    /// Everything before this position is in it.
    full_to: u64,
    /// What else is in it, ascending.
    members: Vec<u64>,
    /// The authors in it.
    pub(crate) actors: ActorSet,
}

impl BaseClosure {
    pub(crate) fn contains(&self, position: u64) -> bool {
        position < self.full_to || self.members.binary_search(&position).is_ok()
    }

    /// How many changes were looked at.
    pub(crate) fn steps(&self) -> usize {
        1 + self.members.len()
    }
}
