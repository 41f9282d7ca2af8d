#![no_main]
//! Changes: what we accept, automerge accepts with the same hash, and would write in the same form.
//!
//! The first byte of the input says whether the rest is a whole chunk, the contents of a change, or a deflate stream.

use automerge::legacy::OpType;
use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::config::Limits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((form, data)) = data.split_first() else { return };
    let chunk = match form % 3 {
        0 => data.to_vec(),
        1 => sealing::sealed(1, data),
        _ => sealing::sealed_deflated(data),
    };
    // Small limits, so that automerge does not take long over what is within them.
    let limits = Limits { change_bytes_max: 64 << 10, change_ops_max: 2_000, ..Limits::default() };
    let Ok(ours) = Change::decode(Bytes::copy_from_slice(&chunk), &limits) else { return };
    let theirs = automerge::Change::from_bytes(chunk).expect("automerge takes what we take");
    assert_eq!(ours.hash.0, theirs.hash().0);
    assert_eq!(ours.op_count, theirs.len() as u64);
    assert_eq!(ours.max_op(), theirs.max_op());
    assert_eq!((ours.seq, ours.start_op), (theirs.seq(), theirs.start_op().get()));
    assert!(ours.deps.iter().map(|hash| hash.0).eq(theirs.deps().iter().map(|hash| hash.0)));
    let expanded = theirs.decode();
    // An increment by an unsigned number is kept as such in a document, but not in the expanded form.
    if !expanded.operations.iter().any(|op| matches!(op.action, OpType::Increment(_))) {
        assert_eq!(automerge::Change::from(expanded).hash(), theirs.hash());
    }
});
