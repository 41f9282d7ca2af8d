//! Changes written by hand: a header, and no operations. Nothing smaller passes for a change.

use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::config::Limits;
use isobar_protocol::ids::ChangeHash;
use sha2::{Digest, Sha256};

const CHANGE_CHUNK: u8 = 1;

/// A change as the whole simulation knows it.
#[derive(Debug)]
pub struct Made {
    /// Counts changes in the order in which they were made: dependencies have smaller numbers.
    pub number: usize,
    /// The numbers of the dependencies.
    pub deps: Vec<usize>,
    pub change: Change,
}

/// The header of a change; `salt` tells two with the same header apart.
pub struct Draft<'a> {
    /// Ascending.
    pub deps: &'a [ChangeHash],
    pub actor: u8,
    pub seq: u64,
    pub start_op: u64,
    pub salt: u64,
}

impl Draft<'_> {
    pub fn change(&self) -> Change {
        let mut data = Vec::with_capacity(64);
        unsigned(&mut data, self.deps.len() as u64);
        self.deps.iter().for_each(|hash| data.extend_from_slice(hash.as_bytes()));
        data.extend_from_slice(&[1, self.actor]);
        unsigned(&mut data, self.seq);
        unsigned(&mut data, self.start_op);
        // Time; the message, which is the salt in hexadecimal; no other actors; no columns.
        data.push(0);
        let message = format!("{:x}", self.salt);
        unsigned(&mut data, message.len() as u64);
        data.extend_from_slice(message.as_bytes());
        data.extend_from_slice(&[0, 0]);
        let mut hashed = vec![CHANGE_CHUNK];
        unsigned(&mut hashed, data.len() as u64);
        hashed.extend_from_slice(&data);
        let hash = Sha256::digest(&hashed);
        let bytes: Bytes = [&[0x85, 0x6f, 0x4a, 0x83], &hash[..4], &hashed].concat().into();
        Change::decode(bytes, &Limits::default()).expect("a header alone is a change")
    }
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
