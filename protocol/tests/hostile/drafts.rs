//! Changes written by hand: well-formed, with their right hash and checksum, and with any header one likes.

use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::config::Limits;
use isobar_protocol::ids::ChangeHash;
use sha2::{Digest, Sha256};

const CHANGE: u8 = 1;

/// A change whose operations each put a number under the key "k".
#[derive(Debug, Clone)]
pub struct Draft {
    pub deps: Vec<ChangeHash>,
    pub actor: u8,
    pub seq: u64,
    pub start_op: u64,
    pub ops: u8,
    /// An operation of another actor that the first operation overwrites: its actor and counter.
    pub overwrites: Option<(u8, u64)>,
}

impl Draft {
    pub fn new(actor: u8, seq: u64, start_op: u64, deps: &[&Change]) -> Self {
        let mut deps: Vec<ChangeHash> = deps.iter().map(|dependency| dependency.hash).collect();
        deps.sort_unstable();
        Self { deps, actor, seq, start_op, ops: 1, overwrites: None }
    }

    pub fn with_ops(mut self, ops: u8) -> Self {
        self.ops = ops;
        self
    }

    pub fn overwriting(mut self, actor: u8, counter: u64) -> Self {
        self.overwrites = Some((actor, counter));
        self
    }

    fn data(&self) -> Vec<u8> {
        let mut out = Vec::new();
        unsigned(&mut out, self.deps.len() as u64);
        self.deps.iter().for_each(|hash| out.extend_from_slice(hash.as_bytes()));
        out.extend_from_slice(&[1, self.actor]);
        unsigned(&mut out, self.seq);
        unsigned(&mut out, self.start_op);
        // Time, message.
        out.extend_from_slice(&[0, 0]);
        match self.overwrites {
            Some((actor, _)) => out.extend_from_slice(&[1, 1, actor]),
            None => out.push(0),
        }
        let columns = self.columns();
        unsigned(&mut out, columns.len() as u64);
        for (name, bytes) in &columns {
            unsigned(&mut out, *name);
            unsigned(&mut out, bytes.len() as u64);
        }
        columns.iter().for_each(|(_, bytes)| out.extend_from_slice(bytes));
        out
    }

    /// The columns of keys, insertion marks, actions, values and predecessors.
    fn columns(&self) -> Vec<(u64, Vec<u8>)> {
        if self.ops == 0 {
            return Vec::new();
        }
        // A run of several equal values, or one literal.
        let run = |value: &[u8]| match self.ops {
            1 => [&[0x7f], value].concat(),
            ops => [&[ops], value].concat(),
        };
        let mut columns = vec![
            (21, run(&[1, b'k'])),
            (52, vec![self.ops]),
            (66, run(&[1])),
            (86, run(&[0x14])),
            (87, (0..self.ops).map(|value| value & 0x3f).collect()),
        ];
        match self.overwrites {
            None => columns.push((112, run(&[0]))),
            Some((_, counter)) => {
                assert_eq!(self.ops, 1, "only a single operation overwrites");
                columns.push((112, vec![0x7f, 1]));
                columns.push((113, vec![0x7f, 1]));
                let mut counters = vec![0x7f];
                signed(&mut counters, counter as i64);
                columns.push((115, counters));
            }
        }
        columns
    }

    pub fn bytes(&self) -> Bytes {
        let data = self.data();
        let mut hashed = vec![CHANGE];
        unsigned(&mut hashed, data.len() as u64);
        hashed.extend_from_slice(&data);
        let hash = Sha256::digest(&hashed);
        [&[0x85, 0x6f, 0x4a, 0x83], &hash[..4], &hashed].concat().into()
    }

    pub fn change(&self) -> Change {
        Change::decode(self.bytes(), &Limits::default()).expect("well-formed")
    }

    /// The same as stock Automerge reads it.
    pub fn stock(&self) -> automerge::Change {
        automerge::Change::from_bytes(self.bytes().to_vec()).expect("well-formed for Automerge, too")
    }
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn signed(out: &mut Vec<u8>, mut value: i64) {
    while !(-0x40..0x40).contains(&value) {
        out.push(value as u8 & 0x7f | 0x80);
        value >>= 7;
    }
    out.push(value as u8 & 0x7f);
}
