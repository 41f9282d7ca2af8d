//! Client frames: as JavaScript peers emit them, as we emit them, and as nobody should.

use bytes::Bytes;
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::config::{CBOR_DEPTH_MAX, FRAME_KEYS_MAX, REMOTE_HEADS_STORAGES_MAX};
use isobar_protocol::ids::{ChangeHash, DocumentId, IdError, PeerId, RegionName, StorageId};
use isobar_protocol::sync_message::{Have, SyncFlags, SyncMessage, SyncVersion};
use isobar_protocol::wire::{
    CborProblem, ClientFrame, PeerFrame, PeerMetadata, ReceiptFrame, RemoteHeads, Saved, SharedSyncFrame,
    WireError, encode_ephemeral, encode_error, encode_join, encode_peer, encode_receipt,
    encode_remote_heads_changed, encode_remote_subscription_change, encode_sync, encode_unavailable,
};
use proptest::collection::vec;
use proptest::prelude::*;

const DOCUMENT: &str = "4NMNnkMhL8jXrdJ9jamS58PAVdXu";

fn document() -> DocumentId {
    DocumentId::from_text(DOCUMENT).unwrap()
}

fn peer(text: &str) -> PeerId {
    PeerId::new(text).unwrap()
}

fn storage(text: &str) -> StorageId {
    StorageId::new(text).unwrap()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

/// CBOR written by hand.
#[derive(Default, Clone)]
struct Cbor(Vec<u8>);

impl Cbor {
    /// A map of so many keys, in the 16-bit form that the JavaScript encoder uses.
    fn map(keys: u16) -> Self {
        Self(vec![0xb9]).raw(&keys.to_be_bytes())
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        self.raw(&[0x79]).raw(&(text.len() as u16).to_be_bytes()).raw(text.as_bytes())
    }

    fn pair(self, key: &str, value: &[u8]) -> Self {
        self.text(key).raw(value)
    }

    fn texts(self, key: &str, value: &str) -> Self {
        self.text(key).text(value)
    }

    fn decode(&self) -> Result<ClientFrame<'_>, WireError> {
        ClientFrame::decode(&self.0)
    }
}

/// A sync frame without its data, which makes the last of five keys.
fn sync_without_data() -> Cbor {
    Cbor::map(5)
        .texts("type", "sync")
        .texts("senderId", "me")
        .texts("documentId", DOCUMENT)
        .texts("targetId", "you")
}

#[test]
fn frames_of_the_javascript_client_are_read() {
    let join = from_hex(
        "b900046474797065646a6f696e6873656e646572496466706565722d316c706565724d65746164617461b900026973746f726167\
         6549646833373630646633376b6973457068656d6572616cf47819737570706f7274656450726f746f636f6c56657273696f6e73\
         816131",
    );
    let expected = ClientFrame::Join {
        sender_id: peer("peer-1"),
        metadata: PeerMetadata {
            storage_id: Some(storage("3760df37")),
            is_ephemeral: Some(false),
            extras: vec![],
        },
        versions: Some(vec!["1"]),
    };
    assert_eq!(ClientFrame::decode(&join), Ok(expected));

    let join_with_undefined = from_hex(
        "b900046474797065646a6f696e6873656e646572496466706565722d316c706565724d65746164617461b900026973746f726167\
         654964f76b6973457068656d6572616cf57819737570706f7274656450726f746f636f6c56657273696f6e73f7",
    );
    let expected = ClientFrame::Join {
        sender_id: peer("peer-1"),
        metadata: PeerMetadata { is_ephemeral: Some(true), ..PeerMetadata::default() },
        versions: None,
    };
    assert_eq!(ClientFrame::decode(&join_with_undefined), Ok(expected));

    let sync = from_hex(
        "b9000564747970656473796e636464617461454200000000687461726765744964667365727665726a646f63756d656e74496478\
         1c344e4d4e6e6b4d684c386a5872644a396a616d5335385041566458756873656e646572496466706565722d31",
    );
    let data = &[0x42, 0, 0, 0, 0];
    let expected = ClientFrame::Sync { request: false, sender_id: "peer-1", document: document(), data };
    assert_eq!(ClientFrame::decode(&sync), Ok(expected));

    let subscribe = from_hex(
        "b900056474797065781a72656d6f74652d737562736372697074696f6e2d6368616e676568746172676574496466736572766572\
         6361646482616161626672656d6f7665f76873656e646572496466706565722d31",
    );
    let expected = ClientFrame::RemoteSubscriptionChange {
        sender_id: "peer-1",
        add: vec![storage("a"), storage("b")],
        remove: vec![],
    };
    assert_eq!(ClientFrame::decode(&subscribe), Ok(expected));
}

#[test]
fn counts_are_read_as_integers_and_as_floats() {
    let count = |value: &[u8]| {
        let frame = Cbor::map(6)
            .texts("type", "ephemeral")
            .texts("senderId", "author")
            .texts("documentId", DOCUMENT)
            .texts("sessionId", "session")
            .pair("data", &[0x41, 7])
            .pair("count", value);
        match frame.decode()? {
            ClientFrame::Ephemeral {
                sender_id: "author", session_id: "session", count, data: &[7], ..
            } => Ok(count),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(count(&[0x17]), Ok(23));
    assert_eq!(count(&[0x1a, 0, 1, 0x11, 0x70]), Ok(70_000));
    assert_eq!(count(&[0x1b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Ok(u64::MAX));
    assert_eq!(count(&[&[0xfb][..], &4_294_967_296_f64.to_be_bytes()].concat()), Ok(1 << 32));
    assert_eq!(count(&[&[0xfa][..], &1_024_f32.to_be_bytes()].concat()), Ok(1_024));
    assert_eq!(count(&[0xf9, 0x3c, 0x00]), Ok(1));
    assert_eq!(count(&[0xf9, 0x7b, 0xff]), Ok(65_504));
    for value in [-1.0, 0.5, f64::NAN, f64::INFINITY, 1e300] {
        let float = [&[0xfb][..], &value.to_be_bytes()].concat();
        assert_eq!(count(&float), Err(WireError::Range("count")), "{value}");
    }
    assert_eq!(count(&[0xf9, 0x7c, 0x00]), Err(WireError::Range("count")));
    assert_eq!(count(&[0x20]), Err(WireError::Range("count")));
    assert_eq!(count(&[0xf6]), Err(WireError::Missing("count")));
    assert!(matches!(
        count(&[0x61, b'1']),
        Err(WireError::Value { field: "count", problem: CborProblem::Type, .. })
    ));
}

#[test]
fn key_order_unknown_keys_indefinite_maps_and_tags_do_not_matter() {
    let nested = [0xbf, 0x01, 0x9f, 0xf6, 0xff, 0x61, b'k', 0xc1, 0x1a, 0, 0, 0, 0, 0xff];
    let frame = Cbor(vec![0xbf])
        .pair("data", &[0xd8, 64, 0x42, 1, 2])
        .pair("unknown", &nested)
        // Keys that are no text.
        .raw(&[0x05, 0xf5])
        .raw(&[0x7f, 0x61, b'a', 0xff, 0x00])
        .texts("documentId", DOCUMENT)
        .texts("senderId", "me")
        .texts("type", "request")
        .raw(&[0xff]);
    let expected = ClientFrame::Sync { request: true, sender_id: "me", document: document(), data: &[1, 2] };
    assert_eq!(frame.decode(), Ok(expected));
    let alias = Cbor::map(3).texts("type", "join").texts("senderId", "me").text("metadata");
    let alias = alias.raw(&[0xa1]).texts("storageId", "disk");
    let Ok(ClientFrame::Join { metadata, versions: None, .. }) = alias.decode() else { panic!("a join") };
    assert_eq!(metadata.storage_id, Some(storage("disk")));
}

#[test]
fn an_unknown_type_is_known_as_such_whatever_its_fields_are() {
    let frame = Cbor::map(3).texts("type", "from-the-future").pair("data", &[0xa0]).pair("senderId", &[0x01]);
    assert_eq!(frame.decode(), Ok(ClientFrame::Unknown { kind: "from-the-future" }));
    assert_eq!(frame.decode().unwrap().sender_id(), None);
    let peer_frame = encode_peer(&peer("a"), &peer("b"), &PeerMetadata::default());
    assert_eq!(ClientFrame::decode(&peer_frame), Ok(ClientFrame::Unknown { kind: "peer" }));
}

#[test]
fn missing_and_malformed_fields_are_named() {
    assert_eq!(Cbor::map(0).decode(), Err(WireError::Missing("type")));
    assert_eq!(sync_without_data().pair("data", &[0xf7]).decode(), Err(WireError::Missing("data")));
    let at = sync_without_data().text("data").0.len();
    let wrong = |field, problem, at| Err(WireError::Value { field, at, problem });
    let text = sync_without_data().texts("data", "x");
    assert_eq!(text.decode(), wrong("data", CborProblem::Type, at));
    let tagged = sync_without_data().pair("data", &[0xd8, 65, 0x41, 1]);
    assert_eq!(tagged.decode(), wrong("data", CborProblem::Type, at + 2));
    let short = sync_without_data().pair("data", &[0x5b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(short.decode(), Err(WireError::Value { problem: CborProblem::Truncated, .. })));
    let id = Cbor::map(4).texts("type", "sync").texts("senderId", "me").pair("data", &[0x41, 1]);
    let refused = id.clone().texts("documentId", "4NMNnkMhL8jXrdJ9jamS58PAVdXv");
    let problem = IdError::NotBase58Check;
    assert_eq!(refused.decode(), Err(WireError::Id { field: "documentId", problem }));
    assert!(matches!(id.texts("documentId", "").decode(), Err(WireError::Id { .. })));
    let join = Cbor::map(2).texts("type", "join").texts("senderId", &"x".repeat(257));
    assert!(matches!(join.decode(), Err(WireError::Id { field: "senderId", .. })));
    assert!(matches!(ClientFrame::decode(b"[1,2]"), Err(WireError::Value { field: "frame", at: 0, .. })));
    let trailing = sync_without_data().pair("data", &[0x41, 1]).raw(&[0]);
    assert_eq!(trailing.decode(), Err(WireError::Trailing { at: trailing.0.len() - 1 }));
    let not_utf8 = Cbor::map(1).pair("type", &[0x62, 0xff, 0xff]);
    assert!(matches!(not_utf8.decode(), Err(WireError::Value { problem: CborProblem::Utf8, .. })));
}

#[test]
fn nesting_and_counts_are_bounded() {
    let nested = |depth| Cbor::map(2).pair("unknown", &vec![0x81; depth]).raw(&[0]).texts("type", "x");
    assert!(nested(CBOR_DEPTH_MAX - 1).decode().is_ok());
    let refused = nested(CBOR_DEPTH_MAX);
    assert!(matches!(refused.decode(), Err(WireError::Value { problem: CborProblem::Depth, .. })));
    assert!(nested(1_000_000).decode().is_err());
    // More items than there are atoms, announced in nine bytes.
    let endless = Cbor::map(1).pair("x", &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(endless.decode(), Err(WireError::Value { problem: CborProblem::Truncated, .. })));
    let keys = (0..=FRAME_KEYS_MAX).fold(Cbor(vec![0xbf]), |frame, _| frame.pair("k", &[0])).raw(&[0xff]);
    assert!(matches!(keys.decode(), Err(WireError::TooMany { field: "keys", .. })));
    let watch = |count: usize| {
        let frame =
            Cbor::map(3).texts("type", "remote-subscription-change").texts("senderId", "me").text("add");
        (0..count).fold(frame.raw(&[0x9f]), |frame, _| frame.text("s")).raw(&[0xff])
    };
    assert!(watch(REMOTE_HEADS_STORAGES_MAX).decode().is_ok());
    assert!(matches!(
        watch(REMOTE_HEADS_STORAGES_MAX + 1).decode(),
        Err(WireError::TooMany { field: "add", .. })
    ));
}

#[test]
fn extras_are_read_and_foreign_values_under_their_key_ignored() {
    let join = |value: &[u8]| {
        let frame = Cbor::map(3).texts("type", "join").texts("senderId", "me").text("peerMetadata");
        match frame.raw(&[0xa1]).pair("isobar", value).decode() {
            Ok(ClientFrame::Join { metadata, .. }) => metadata.extras,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(join(&[0x82, 0x61, b'a', 0x61, b'b']), ["a", "b"]);
    assert!(join(&[0x01]).is_empty());
    assert!(join(&[0x81, 0x05]).is_empty());
    let many = [&[0x91][..], &[0x61, b'a'].repeat(17)].concat();
    assert!(join(&many).is_empty());
    let long = [&[0x81, 0x78, 33][..], &[b'a'; 33]].concat();
    assert!(join(&long).is_empty());
}

#[test]
fn times_are_finite_and_not_negative() {
    let heads = |timestamp: f64| {
        let frame = Cbor::map(4)
            .texts("type", "remote-heads-changed")
            .texts("senderId", "me")
            .texts("documentId", DOCUMENT)
            .text("newHeads")
            .raw(&[0xa1])
            .text("disk")
            .raw(&[0xa2])
            .pair("heads", &[0x80])
            .pair("timestamp", &[&[0xfb][..], &timestamp.to_be_bytes()].concat());
        match frame.decode()? {
            ClientFrame::RemoteHeadsChanged { heads, .. } => Ok(heads[0].timestamp),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(heads(1.5), Ok(1.5));
    for timestamp in [f64::INFINITY, f64::NAN, -1.0] {
        assert_eq!(heads(timestamp), Err(WireError::Range("timestamp")));
    }
}

#[test]
fn every_prefix_of_a_frame_is_refused() {
    let heads = RemoteHeads { storage_id: storage("s"), heads: vec![ChangeHash([3; 32])], timestamp: 1.7e12 };
    for frame in [
        encode_join(&peer("me"), &metadata()),
        encode_ephemeral("author", &peer("you"), &document(), "session", 5, b"data"),
        encode_remote_heads_changed(&peer("me"), &peer("you"), &document(), &[heads]),
    ] {
        assert!(ClientFrame::decode(&frame).is_ok());
        for end in 0..frame.len() {
            assert!(ClientFrame::decode(&frame[..end]).is_err());
        }
    }
}

fn metadata() -> PeerMetadata {
    let extras = vec!["receipts".to_owned()];
    PeerMetadata { storage_id: Some(storage("disk")), is_ephemeral: Some(false), extras }
}

#[test]
fn what_is_encoded_is_decoded() {
    let (me, you) = (peer("me"), peer("you"));
    let join = encode_join(&me, &metadata());
    let expected =
        ClientFrame::Join { sender_id: me.clone(), metadata: metadata(), versions: Some(vec!["1"]) };
    assert_eq!(ClientFrame::decode(&join), Ok(expected));
    let expected = PeerFrame {
        sender_id: me.clone(),
        target_id: you.clone(),
        metadata: metadata(),
        version: Some("1".to_owned()),
    };
    assert_eq!(PeerFrame::decode(&encode_peer(&me, &you, &metadata())), Ok(Some(expected)));
    assert_eq!(PeerFrame::decode(&join), Ok(None));
    let frame = encode_error("me", "you", "unsupported protocol version");
    assert_eq!(
        ClientFrame::decode(&frame),
        Ok(ClientFrame::Error { message: "unsupported protocol version" })
    );
    let frame = encode_unavailable(&me, &you, &document());
    let expected = ClientFrame::Unavailable { sender_id: "me", document: document() };
    assert_eq!(ClientFrame::decode(&frame), Ok(expected));
    let (add, remove) = (vec![storage("eu"), storage("us")], vec![storage("asia")]);
    let frame = encode_remote_subscription_change(&me, &you, &add, &remove);
    let expected = ClientFrame::RemoteSubscriptionChange { sender_id: "me", add, remove };
    assert_eq!(ClientFrame::decode(&frame), Ok(expected));
    let remote = |name, timestamp| RemoteHeads {
        storage_id: storage(name),
        heads: vec![ChangeHash([1; 32]), ChangeHash([2; 32])],
        timestamp,
    };
    let heads = vec![remote("eu", 1_763_920_000_123.0), remote("us", 0.0)];
    let frame = encode_remote_heads_changed(&me, &you, &document(), &heads);
    let expected = ClientFrame::RemoteHeadsChanged { sender_id: "me", document: document(), heads };
    assert_eq!(ClientFrame::decode(&frame), Ok(expected));
}

#[test]
fn numbers_beyond_32_bits_leave_as_floats() {
    let count = |count| encode_ephemeral("a", &peer("you"), &document(), "s", count, b"d");
    let contains = |frame: &[u8], part: &[u8]| frame.windows(part.len()).any(|window| window == part);
    assert!(contains(&count(u64::from(u32::MAX)), &[0x1a, 0xff, 0xff, 0xff, 0xff]));
    assert!(contains(&count(1 << 32), &[&[0xfb][..], &4_294_967_296_f64.to_be_bytes()].concat()));
    let heads = RemoteHeads { storage_id: storage("s"), heads: vec![], timestamp: 5.0 };
    let frame = encode_remote_heads_changed(&peer("me"), &peer("you"), &document(), &[heads]);
    assert!(contains(&frame, &[&[0xfb][..], &5_f64.to_be_bytes()].concat()));
}

proptest! {
    #[test]
    fn sync_and_ephemeral_frames_survive_their_encoding(
        request in any::<bool>(),
        sender in "[a-zA-Z0-9-]{1,60}",
        target in "\\PC{1,60}",
        id in vec(any::<u8>(), 1..=64),
        data in vec(any::<u8>(), 1..400),
        count in 0_u64..1 << 53,
    ) {
        let document = DocumentId::from_slice(&id).unwrap();
        let frame = encode_sync(request, &peer(&sender), &peer(&target), &document, &data);
        let expected = ClientFrame::Sync { request, sender_id: &sender, document: document.clone(), data: &data };
        prop_assert_eq!(ClientFrame::decode(&frame), Ok(expected));
        let frame = encode_ephemeral(&sender, &peer(&target), &document, "session", count, &data);
        let session_id = "session";
        let expected = ClientFrame::Ephemeral { sender_id: &sender, document, session_id, count, data: &data };
        prop_assert_eq!(ClientFrame::decode(&frame), Ok(expected));
    }

    #[test]
    fn a_shared_frame_is_the_frame_for_each_target(
        targets in vec("\\PC{1,64}", 1..5),
        change in vec(any::<u8>(), 10..500),
        entries in 0_usize..30,
    ) {
        let hashes: Vec<_> = (0..entries).map(|index| ChangeHash([index as u8; 32])).collect();
        let have = Have { last_sync: hashes.clone(), bloom: BloomFilter::from_hashes(hashes.iter()) };
        let message = SyncMessage {
            version: SyncVersion::V2,
            heads: hashes,
            need: vec![],
            have: vec![have],
            changes: vec![Bytes::from(change)],
            flags: Some(SyncFlags::default()),
        };
        let shared = SharedSyncFrame::new(&peer("me"), &document(), &message);
        for target in targets {
            let target = peer(&target);
            let frame = shared.for_target(&target);
            prop_assert_eq!(frame.capacity(), frame.len());
            prop_assert_eq!(frame, encode_sync(false, &peer("me"), &target, &document(), &message.encode()));
        }
    }

    #[test]
    fn a_damaged_frame_never_panics(
        which in 0_usize..4,
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let heads = RemoteHeads { storage_id: storage("s"), heads: vec![ChangeHash([3; 32])], timestamp: 5.0 };
        let mut frame = [
            encode_join(&peer("me"), &metadata()),
            encode_ephemeral("author", &peer("you"), &document(), "session", 1 << 40, b"data"),
            encode_remote_heads_changed(&peer("me"), &peer("you"), &document(), &[heads]),
            encode_remote_subscription_change(&peer("me"), &peer("you"), &[storage("a")], &[storage("b")]),
        ][which].clone();
        for (at, value) in flips {
            let at = at.index(frame.len());
            frame[at] = value;
        }
        let _ = ClientFrame::decode(&frame);
        let _ = PeerFrame::decode(&frame);
    }
}

#[test]
fn a_receipt_is_read_as_it_was_written_and_is_nothing_to_others() {
    let saved = |region: &str, heads: Vec<ChangeHash>| Saved {
        region: RegionName::new(region).unwrap(),
        storage_id: storage(region),
        heads,
    };
    let saved =
        vec![saved("frankfurt", vec![ChangeHash([3; 32]), ChangeHash([4; 32])]), saved("tokyo", vec![])];
    let frame = encode_receipt(&peer("server"), &peer("client"), &document(), &saved);
    let receipt = ReceiptFrame { document: document(), saved };
    assert_eq!(ReceiptFrame::decode(&frame), Ok(Some(receipt)));
    assert_eq!(ClientFrame::decode(&frame), Ok(ClientFrame::Unknown { kind: "isobar-receipt" }));
    let other = encode_unavailable(&peer("server"), &peer("client"), &document());
    assert_eq!(ReceiptFrame::decode(&other), Ok(None));
    let nothing = Cbor::map(2).texts("type", "isobar-receipt").texts("documentId", DOCUMENT);
    assert_eq!(ReceiptFrame::decode(&nothing.0), Err(WireError::Missing("saved")));
    for end in 0..frame.len() {
        assert!(ReceiptFrame::decode(&frame[..end]).is_err(), "cut at {end}");
    }
}
