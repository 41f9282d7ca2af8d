//! Changes written field by field, to be spoilt in one of them.

use sha2::{Digest, Sha256};

pub const OBJECT_ACTOR: u32 = 1;
pub const OBJECT_COUNTER: u32 = 2;
pub const KEY_ACTOR: u32 = 17;
pub const KEY_COUNTER: u32 = 19;
pub const KEY_TEXT: u32 = 21;
pub const INSERT: u32 = 52;
pub const ACTION: u32 = 66;
pub const VALUE_TYPE: u32 = 86;
pub const VALUE: u32 = 87;
pub const PREDECESSORS: u32 = 112;
pub const PREDECESSOR_ACTOR: u32 = 113;
pub const PREDECESSOR_COUNTER: u32 = 115;
pub const EXPAND: u32 = 148;

/// The fields of a change, to be spoilt.
#[derive(Clone)]
pub struct Draft {
    pub deps: Vec<[u8; 32]>,
    pub actor: Vec<u8>,
    pub seq: u64,
    pub start_op: u64,
    pub message: Vec<u8>,
    pub other_actors: Vec<Vec<u8>>,
    pub columns: Vec<(u32, Vec<u8>)>,
}

impl Draft {
    /// Two operations: "a" is 1 and "b" is 2.
    pub fn honest() -> Self {
        Self {
            deps: vec![[1; 32], [2; 32]],
            actor: vec![5; 16],
            seq: 3,
            start_op: 10,
            message: b"done".to_vec(),
            other_actors: Vec::new(),
            columns: vec![
                (KEY_TEXT, vec![0x7e, 1, b'a', 1, b'b']),
                (INSERT, vec![2]),
                (ACTION, vec![2, 1]),
                (VALUE_TYPE, vec![2, 0x14]),
                (VALUE, vec![1, 2]),
                (PREDECESSORS, vec![2, 0]),
            ],
        }
    }

    pub fn with(mut self, column: u32, bytes: &[u8]) -> Self {
        self.columns.retain(|(name, _)| *name != column);
        if !bytes.is_empty() {
            self.columns.push((column, bytes.to_vec()));
        }
        self.columns.sort_by_key(|(name, _)| *name & !8);
        self
    }

    /// Both operations are given one predecessor, of the actor and with the counters that the columns say.
    pub fn with_predecessors(self, actors: &[u8], counters: &[u8]) -> Self {
        self.with(PREDECESSORS, &[2, 1]).with(PREDECESSOR_ACTOR, actors).with(PREDECESSOR_COUNTER, counters)
    }

    pub fn with_others(mut self, others: &[&[u8]]) -> Self {
        self.other_actors = others.iter().map(|actor| actor.to_vec()).collect();
        self
    }

    pub fn data(&self) -> Vec<u8> {
        let mut out = Vec::new();
        unsigned(&mut out, self.deps.len() as u64);
        self.deps.iter().for_each(|hash| out.extend_from_slice(hash));
        prefixed(&mut out, &self.actor);
        unsigned(&mut out, self.seq);
        unsigned(&mut out, self.start_op);
        out.push(0);
        prefixed(&mut out, &self.message);
        unsigned(&mut out, self.other_actors.len() as u64);
        self.other_actors.iter().for_each(|actor| prefixed(&mut out, actor));
        unsigned(&mut out, self.columns.len() as u64);
        for (name, bytes) in &self.columns {
            unsigned(&mut out, u64::from(*name));
            unsigned(&mut out, bytes.len() as u64);
        }
        self.columns.iter().for_each(|(_, bytes)| out.extend_from_slice(bytes));
        out
    }
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn prefixed(out: &mut Vec<u8>, bytes: &[u8]) {
    unsigned(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A chunk around these contents, with the checksum and length that belong to them.
pub fn sealed_as(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut length = Vec::new();
    let mut rest = data.len();
    while rest >= 0x80 {
        length.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    length.push(rest as u8);
    let hash = Sha256::new().chain_update([kind]).chain_update(&length).chain_update(data).finalize();
    [&[0x85, 0x6f, 0x4a, 0x83][..], &hash[..4], &[kind], &length, data].concat()
}
