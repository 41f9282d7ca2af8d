#![no_main]
//! Notices between the nodes of a region: what we accept has one encoding, and what a newer version appends is ignored.

use bytes::Bytes;
use isobar_protocol::notice::Notice;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(Some(notice)) = Notice::decode(&Bytes::copy_from_slice(data)) else { return };
    let encoded = notice.encode();
    assert!(data.starts_with(&encoded));
    assert_eq!(Notice::decode(&encoded), Ok(Some(notice)));
});
