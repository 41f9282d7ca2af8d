#![no_main]
//! Frames between regions: what we accept has one encoding, and what a newer version appends is ignored.

use bytes::Bytes;
use isobar_protocol::link::codec::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(frame) = decode(Bytes::copy_from_slice(data)) else { return };
    let encoded = encode(&frame);
    assert!(data.starts_with(&encoded));
    assert_eq!(decode(encoded.into()), Ok(frame));
});
