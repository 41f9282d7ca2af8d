#![no_main]
//! Chunks and their census: nothing panics, and the limits hold.
//!
//! The first byte of the input says whether the rest is raw chunks, the contents of a document or of a bundle.

use bytes::Bytes;
use isobar_protocol::chunk::{census, chunks};
use isobar_protocol::config::Limits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((form, data)) = data.split_first() else { return };
    let bytes = match form % 3 {
        0 => data.to_vec(),
        1 => sealing::sealed(0, data),
        _ => sealing::sealed(3, data),
    };
    let limits = Limits { document_bytes_max: 1 << 20, document_ops_max: 100_000, ..Limits::default() };
    let input = Bytes::from(bytes);
    let mut covered = 0;
    for chunk in chunks(input.clone()) {
        let Ok(chunk) = chunk else { return };
        assert_eq!(chunk.bytes, input[covered..covered + chunk.bytes.len()]);
        covered += chunk.bytes.len();
        if let Ok(census) = census(&chunk, &limits) {
            assert!(census.operations <= 100_000 && census.changes <= 100_000);
            assert!(census.inflated_bytes <= 1 << 20);
        }
    }
    assert_eq!(covered, input.len());
});
