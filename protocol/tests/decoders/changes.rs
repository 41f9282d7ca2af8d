//! Changes: equal to what automerge reads, and never more lenient than it.

use automerge::legacy::OpType;
use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{Chunk, chunks};
use isobar_protocol::config::Limits;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::authors::follow;
use crate::draft::sealed_as;

fn script() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..180)
}

fn assert_equal(ours: &Change, theirs: &automerge::Change) {
    assert_eq!(ours.hash.0, theirs.hash().0);
    assert_eq!(ours.deps.iter().map(|hash| hash.0).collect::<Vec<_>>(), hashes(theirs.deps()));
    assert_eq!(ours.actor.as_bytes(), theirs.actor_id().to_bytes());
    assert_eq!(ours.seq, theirs.seq());
    assert_eq!(ours.start_op, theirs.start_op().get());
    assert_eq!(ours.op_count, theirs.len() as u64);
    assert_eq!(ours.max_op(), theirs.max_op());
    let others: Vec<_> = theirs.other_actor_ids().iter().map(|actor| actor.to_bytes()).collect();
    assert_eq!(ours.other_actors.iter().map(|actor| actor.as_bytes()).collect::<Vec<_>>(), others);
}

fn hashes(list: &[automerge::ChangeHash]) -> Vec<[u8; 32]> {
    list.iter().map(|hash| hash.0).collect()
}

fn sealed(data: &[u8]) -> Bytes {
    sealed_as(1, data).into()
}

fn only_chunk(bytes: &[u8]) -> Chunk {
    let mut all = chunks(Bytes::copy_from_slice(bytes));
    let chunk = all.next().unwrap().unwrap();
    assert!(all.next().is_none());
    chunk
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn changes_read_as_automerge_reads_them(script in script()) {
        let mut document = follow(&script);
        for theirs in document.get_changes(&[]) {
            let raw = Change::decode(Bytes::copy_from_slice(theirs.raw_bytes()), &Limits::default()).unwrap();
            assert_equal(&raw, &theirs);
            let mut deflated = theirs.clone();
            let deflated = Bytes::from(deflated.bytes().into_owned());
            let ours = Change::decode(deflated.clone(), &Limits::default()).unwrap();
            assert_equal(&ours, &theirs);
            prop_assert_eq!(ours.bytes, deflated);
        }
    }

    #[test]
    fn what_is_accepted_automerge_accepts_and_would_write(
        script in script(),
        which in any::<prop::sample::Index>(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut document = follow(&script);
        let changes = document.get_changes(&[]);
        let theirs = which.get(&changes);
        let mut data = only_chunk(theirs.raw_bytes()).data().to_vec();
        for (at, value) in flips {
            let at = at.index(data.len());
            data[at] = value;
        }
        let mutant = sealed(&data);
        let Ok(ours) = Change::decode(mutant.clone(), &Limits::default()) else { return Ok(()) };
        let theirs = automerge::Change::from_bytes(mutant.to_vec()).expect("automerge takes what we take");
        assert_equal(&ours, &theirs);
        assert_is_what_automerge_writes(&theirs);
    }
}

/// Automerge rebuilds changes from their values when it loads a document: one that it would write otherwise would then
/// have lost its hash.
fn assert_is_what_automerge_writes(change: &automerge::Change) {
    let expanded = change.decode();
    // An increment by an unsigned number is kept as such in a document, but not in this expanded form.
    let increments = expanded.operations.iter().any(|op| matches!(op.action, OpType::Increment(_)));
    if !increments {
        assert_eq!(automerge::Change::from(expanded).hash(), change.hash());
    }
}
