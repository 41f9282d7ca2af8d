#![no_main]
//! Sync messages: what we accept, automerge reads alike; and it survives being encoded.

use bytes::Bytes;
use isobar_protocol::sync_message::SyncMessage;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(ours) = SyncMessage::decode(Bytes::copy_from_slice(data)) else { return };
    let theirs = automerge::sync::Message::decode(data).expect("automerge takes what we take");
    assert!(ours.heads.iter().map(|hash| hash.0).eq(theirs.heads.iter().map(|hash| hash.0)));
    assert!(ours.need.iter().map(|hash| hash.0).eq(theirs.need.iter().map(|hash| hash.0)));
    assert!(
        ours.changes.iter().map(|change| &change[..]).eq(theirs.changes.iter().filter(|c| !c.is_empty()))
    );
    let probe = [data.len() as u8; 32];
    for (ours, theirs) in ours.have.iter().zip(&theirs.have) {
        let found = ours.bloom.contains(&isobar_protocol::ids::ChangeHash(probe));
        assert_eq!(found, theirs.bloom.contains_hash(&automerge::ChangeHash(probe)));
    }
    let encoded = ours.encode();
    assert_eq!(encoded.len(), ours.encoded_bytes());
    assert_eq!(SyncMessage::decode(encoded.into()).as_ref(), Ok(&ours));
});
