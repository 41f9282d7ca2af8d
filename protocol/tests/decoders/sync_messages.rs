//! Sync messages and Bloom filters, to and from automerge.

use automerge::sync::{self, SyncDoc};
use automerge::{AutoCommit, ChangeHash as TheirHash};
use bytes::Bytes;
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::ids::ChangeHash;
use isobar_protocol::sync_message::{Have, SyncFlags, SyncMessage, SyncVersion};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::authors::follow;

fn bytes_of(filter: &BloomFilter) -> Vec<u8> {
    let mut out = Vec::new();
    filter.encode_into(&mut out);
    assert_eq!(out.len(), filter.encoded_bytes());
    out
}

fn raw(hashes: &[TheirHash]) -> Vec<[u8; 32]> {
    hashes.iter().map(|hash| hash.0).collect()
}

fn ours_raw(hashes: &[ChangeHash]) -> Vec<[u8; 32]> {
    hashes.iter().map(|hash| hash.0).collect()
}

fn assert_equal(ours: &SyncMessage, theirs: &sync::Message) {
    assert_eq!(ours_raw(&ours.heads), raw(&theirs.heads));
    assert_eq!(ours_raw(&ours.need), raw(&theirs.need));
    assert_eq!(ours.have.len(), theirs.have.len());
    for (ours, theirs) in ours.have.iter().zip(&theirs.have) {
        assert_eq!(ours_raw(&ours.last_sync), raw(&theirs.last_sync));
        assert_eq!(bytes_of(&ours.bloom), theirs.bloom.to_bytes());
    }
    assert_eq!(ours.changes, theirs.changes.iter().map(Bytes::copy_from_slice).collect::<Vec<_>>());
    assert_eq!(ours.version == SyncVersion::V2, theirs.version == sync::MessageVersion::V2);
    assert_eq!(ours.flags.is_some(), theirs.flags.is_some());
    for bit in [SyncFlags::SYNC_RESET, SyncFlags::READ_ONLY, SyncFlags::SUPPORTS_SYNC_RESET] {
        let theirs = theirs.flags.is_some_and(|flags| flags.contains(bit));
        assert_eq!(ours.flags.is_some_and(|flags| flags.contains(bit)), theirs);
    }
}

/// Reads and writes a message of automerge's, and lets automerge read what was written.
fn pass_through(theirs: sync::Message) -> sync::Message {
    let bytes = Bytes::from(theirs.clone().encode());
    let ours = SyncMessage::decode(bytes.clone()).unwrap();
    assert_equal(&ours, &theirs);
    for change in &ours.changes {
        assert!(bytes.as_ptr_range().contains(&change.as_ptr()), "changes share the message's bytes");
    }
    let again = ours.encode();
    assert_eq!(again.len(), ours.encoded_bytes());
    assert_eq!(again, bytes);
    sync::Message::decode(&again).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn peers_whose_messages_pass_through_ours_converge(script in vec(any::<u8>(), 0..90), shares in any::<bool>()) {
        let mut left = follow(&script);
        let mut right = if shares { left.fork() } else { AutoCommit::new() };
        edit(&mut left, "left");
        edit(&mut right, "right");
        let (mut left_state, mut right_state) = (sync::State::new(), sync::State::new());
        let mut messages = 0;
        loop {
            let to_right = left.sync().generate_sync_message(&mut left_state);
            let to_left = right.sync().generate_sync_message(&mut right_state);
            if to_right.is_none() && to_left.is_none() {
                break;
            }
            if let Some(message) = to_right {
                messages += 1;
                right.sync().receive_sync_message(&mut right_state, pass_through(message)).unwrap();
            }
            if let Some(message) = to_left {
                messages += 1;
                left.sync().receive_sync_message(&mut left_state, pass_through(message)).unwrap();
            }
        }
        prop_assert!(messages >= 4);
        prop_assert_eq!(left.get_heads(), right.get_heads());
    }

    #[test]
    fn filters_are_those_of_automerge(inside in vec(any::<[u8; 32]>(), 0..200), outside in vec(any::<[u8; 32]>(), 0..50)) {
        let ours: Vec<_> = inside.iter().map(|hash| ChangeHash(*hash)).collect();
        let theirs = sync::BloomFilter::from_hashes(inside.iter().map(|hash| TheirHash(*hash)));
        let filter = BloomFilter::from_hashes(ours.iter());
        prop_assert_eq!(bytes_of(&filter), theirs.to_bytes());
        let decoded = BloomFilter::decode(theirs.to_bytes().into()).unwrap();
        prop_assert_eq!(&decoded, &filter);
        prop_assert_eq!(decoded.entries() as usize, inside.len());
        prop_assert!(ours.iter().all(|hash| filter.contains(hash)));
        for hash in outside {
            prop_assert_eq!(filter.contains(&ChangeHash(hash)), theirs.contains_hash(&TheirHash(hash)));
        }
    }

    #[test]
    fn messages_survive_their_encoding(message in message()) {
        let encoded = message.encode();
        prop_assert_eq!(encoded.len(), message.encoded_bytes());
        let theirs = sync::Message::decode(&encoded).unwrap();
        assert_equal(&message, &theirs);
        prop_assert_eq!(SyncMessage::decode(encoded.into()).unwrap(), message);
    }

    #[test]
    fn a_damaged_message_is_refused_or_read_alike(
        message in message(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut encoded = message.encode();
        for (at, value) in flips {
            let at = at.index(encoded.len());
            encoded[at] = value;
        }
        encoded.truncate(1 + cut.index(2 * encoded.len()));
        if let Ok(ours) = SyncMessage::decode(encoded.clone().into()) {
            let theirs = sync::Message::decode(&encoded).expect("automerge takes what we take");
            let dropped = theirs.changes.iter().filter(|change| change.is_empty()).count();
            prop_assert_eq!(ours.changes.len() + dropped, theirs.changes.len());
            prop_assert_eq!(ours_raw(&ours.heads), raw(&theirs.heads));
            // A filter that we accept divides by nothing and is probed a bounded number of times.
            for have in &theirs.have {
                have.bloom.contains_hash(&TheirHash([9; 32]));
            }
        }
    }
}

fn edit(document: &mut AutoCommit, by: &str) {
    use automerge::transaction::Transactable;
    document.set_actor(automerge::ActorId::from(by.as_bytes()));
    for index in 0..4 {
        document.put(automerge::ROOT, by, index).unwrap();
        document.commit();
    }
}

fn hashes() -> impl Strategy<Value = Vec<ChangeHash>> {
    vec(any::<[u8; 32]>(), 0..6).prop_map(|mut hashes| {
        hashes.sort();
        hashes.into_iter().map(ChangeHash).collect()
    })
}

fn message() -> impl Strategy<Value = SyncMessage> {
    let have = (hashes(), vec(any::<[u8; 32]>(), 0..40)).prop_map(|(last_sync, inside)| {
        let inside: Vec<_> = inside.into_iter().map(ChangeHash).collect();
        Have { last_sync, bloom: BloomFilter::from_hashes(inside.iter()) }
    });
    let changes = vec(vec(any::<u8>(), 10..300).prop_map(Bytes::from), 0..5);
    let flags = proptest::option::of((0_u8..8).prop_map(|bits| SyncFlags::default().with(bits)));
    (any::<bool>(), hashes(), hashes(), vec(have, 0..3), changes, flags).prop_map(
        |(v2, heads, need, have, changes, flags)| {
            let version = if v2 { SyncVersion::V2 } else { SyncVersion::V1 };
            SyncMessage { version, heads, need, have, changes, flags }
        },
    )
}
