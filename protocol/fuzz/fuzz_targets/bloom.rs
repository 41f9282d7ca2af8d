#![no_main]
//! Bloom filters: what we accept has one encoding, and contains what automerge finds in it.
//!
//! The first 32 bytes of the input are the hash that is looked for.

use automerge::sync;
use bytes::Bytes;
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::ids::ChangeHash;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((hash, data)) = data.split_first_chunk::<32>() else { return };
    let Ok(ours) = BloomFilter::decode(Bytes::copy_from_slice(data)) else { return };
    let theirs = sync::BloomFilter::try_from(data).expect("automerge takes what we take");
    assert_eq!(ours.contains(&ChangeHash(*hash)), theirs.contains_hash(&automerge::ChangeHash(*hash)));
    let mut encoded = Vec::new();
    ours.encode_into(&mut encoded);
    assert_eq!(encoded, data);
});
