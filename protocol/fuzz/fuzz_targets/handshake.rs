#![no_main]
//! The handshake: whichever message is awaited, nobody without the key gets to its end; and a hello has one encoding.
//!
//! The first byte of the input says whether the rest is a message or the contents of one, which only a holder of the key
//! can send.

use bytes::Bytes;
use isobar_protocol::ids::{RegionName, StorageId};
use isobar_protocol::link::handshake::{
    ClusterId, ClusterKey, Handshake, HandshakeError, Hello, Identity, NodeId, Nonce, Step, VERSIONS,
};
use libfuzzer_sys::fuzz_target;

fn identity(region: &str) -> Identity {
    Identity {
        key: ClusterKey::new(&[42; 32]).expect("long enough"),
        cluster: ClusterId::new("weather").expect("a short name"),
        versions: VERSIONS,
        hello: Hello {
            region: RegionName::new(region).expect("a short name"),
            node: NodeId([1; 16]),
            storage_id: StorageId::new(region).expect("a short name"),
            groups: Default::default(),
            features: Default::default(),
            client_url: None,
            lineage: Some(vec![NodeId([1; 16])]),
        },
    }
}

fn answered(step: Result<Step, HandshakeError>) -> (Handshake, Bytes) {
    match step {
        Ok(Step::Answer { handshake, send }) => (handshake, send.into()),
        other => panic!("expected an answer, found {other:?}"),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((form, data)) = data.split_first() else { return };
    let message = Bytes::copy_from_slice(data);
    if form % 2 == 1 {
        if let Ok(hello) = Hello::decode(message) {
            assert!(data.starts_with(&hello.encode()));
        }
        return;
    }
    let (dialler, opening) = Handshake::dial(identity("eu"), Nonce([1; 32]));
    let acceptor = Handshake::accept(identity("us"), Nonce([2; 32]));
    let (introduced, challenge) = answered(acceptor.receive(&opening.into()));
    let (welcomed, _) = answered(dialler.receive(&challenge));
    assert!(introduced.receive(&message).is_err());
    assert!(welcomed.receive(&message).is_err());
    let (dialler, _) = Handshake::dial(identity("eu"), Nonce([3; 32]));
    assert!(dialler.receive(&message).is_err());
    // Anybody may open; what is refused then is what follows.
    if let Ok(Step::Done { .. }) = Handshake::accept(identity("us"), Nonce([2; 32])).receive(&message) {
        panic!("an opening ends no handshake");
    }
});
