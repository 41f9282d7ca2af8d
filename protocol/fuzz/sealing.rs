//! Chunks with the checksum that belongs to their contents, which a fuzzer would never guess.

use sha2::{Digest, Sha256};

const MAGIC: [u8; 4] = [0x85, 0x6f, 0x4a, 0x83];

fn length(mut value: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn checksum(kind: u8, contents: &[u8]) -> [u8; 4] {
    let hasher = Sha256::new().chain_update([kind]).chain_update(length(contents.len()));
    let hash = hasher.chain_update(contents).finalize();
    [hash[0], hash[1], hash[2], hash[3]]
}

fn chunk(kind: u8, checksum: [u8; 4], data: &[u8]) -> Vec<u8> {
    [&MAGIC[..], &checksum, &[kind], &length(data.len()), data].concat()
}

/// A chunk of a kind around its contents.
pub fn sealed(kind: u8, contents: &[u8]) -> Vec<u8> {
    chunk(kind, checksum(kind, contents), contents)
}

/// A compressed change around a deflate stream. The checksum is right if the stream inflates to a megabyte at most.
pub fn sealed_deflated(stream: &[u8]) -> Vec<u8> {
    let contents = miniz_oxide::inflate::decompress_to_vec_with_limit(stream, 1 << 20).unwrap_or_default();
    chunk(2, checksum(1, &contents), stream)
}
