use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::config::{
    DOCUMENT_ID_BYTES_MAX, INTEREST_DOCUMENTS_MAX, LINK_FRAME_BYTES_MAX, LINK_ORIGINS_MAX,
    LINK_REASON_BYTES_MAX, PRESENCE_DATA_BYTES_MAX, SCRUB_BUCKETS, SCRUB_DOCUMENTS_MAX,
    SCRUB_PREFIX_BYTES_MAX, SNAPSHOT_MISSING_MAX, SNAPSHOT_PAGE_DOCUMENTS_MAX,
};
use crate::ids::{ChangeHash, DocumentId, OriginId, PlacementGroup, RegionName, Seq};
use crate::leb128::ReadProblem;
use crate::link::{BaseContents, DocumentContents, Fingerprints, MissingDocument, Progress, Standing};
use crate::log::Chain;

fn document() -> impl Strategy<Value = DocumentId> {
    vec(any::<u8>(), 1..=DOCUMENT_ID_BYTES_MAX).prop_map(|id| DocumentId::from_slice(&id).unwrap())
}

fn payload() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..300).prop_map(Bytes::from)
}

fn change() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), CHANGE_BYTES_MIN..200).prop_map(Bytes::from)
}

fn origin() -> impl Strategy<Value = OriginId> {
    any::<u128>().prop_map(|id| OriginId(Uuid::from_u128(id)))
}

fn chain() -> impl Strategy<Value = Chain> {
    any::<[u8; 16]>().prop_map(Chain)
}

fn progress() -> impl Strategy<Value = Progress> {
    (origin(), "\\PC{1,20}", "[a-z]{1,256}", any::<u64>(), chain()).prop_map(
        |(origin, region, group, seq, chain)| Progress {
            origin,
            region: RegionName::new(&region).unwrap(),
            group: PlacementGroup::new(&group).unwrap(),
            seq: Seq(seq),
            chain,
        },
    )
}

fn base() -> impl Strategy<Value = BaseContents> {
    (payload(), payload(), payload()).prop_map(|(summary, index, chunk)| BaseContents {
        summary,
        index,
        chunk,
    })
}

fn contents() -> impl Strategy<Value = DocumentContents> {
    let state = prop_oneof![
        (option::of(base()), vec(change(), 0..6)).prop_map(|(base, changes)| (None, base, changes)),
        any::<u64>().prop_map(|deleted_at_ms| (Some(deleted_at_ms), None, Vec::new())),
    ];
    (document(), "[a-z]{1,20}", state).prop_map(|(document, group, (deleted_at_ms, base, changes))| {
        let group = PlacementGroup::new(&group).unwrap();
        DocumentContents { document, group, deleted_at_ms, base, changes }
    })
}

fn fingerprints() -> impl Strategy<Value = Fingerprints> {
    prop_oneof![
        vec(any::<(u64, [u8; 16])>(), SCRUB_BUCKETS).prop_map(Fingerprints::Buckets),
        vec((document(), any::<[u8; 16]>()), 0..20).prop_map(Fingerprints::Documents),
    ]
}

fn frame_of_the_log() -> impl Strategy<Value = LinkFrame> {
    prop_oneof![
        vec(progress(), 0..8).prop_map(|origins| LinkFrame::Have { origins }),
        (origin(), any::<u64>(), chain()).prop_map(|(origin, after, chain)| LinkFrame::Subscribe {
            origin,
            after: Seq(after),
            chain
        }),
        origin().prop_map(|origin| LinkFrame::Unsubscribe { origin }),
        (origin(), any::<u64>(), chain(), payload()).prop_map(|(origin, first, chain, body)| {
            LinkFrame::Entries { origin, first: Seq(first), chain, body }
        }),
        (origin(), any::<u64>())
            .prop_map(|(origin, floor)| LinkFrame::Truncated { origin, floor: Seq(floor) }),
        option::of(document()).prop_map(|after| LinkFrame::SnapshotRequest { after }),
        (vec(progress(), 0..4), vec(contents(), 0..4), option::of(document()))
            .prop_map(|(vector, documents, next)| LinkFrame::SnapshotPage { vector, documents, next }),
        vec((document(), "[a-z]{1,20}"), 0..5).prop_map(|documents| {
            let missing = |(document, group): (DocumentId, String)| MissingDocument {
                document,
                group: PlacementGroup::new(&group).unwrap(),
            };
            LinkFrame::Missing { documents: documents.into_iter().map(missing).collect() }
        }),
        (any::<u64>(), any::<u64>(), payload()).prop_map(|(transfer, left, bytes)| LinkFrame::Part {
            transfer,
            left,
            bytes
        }),
        any::<u64>().prop_map(|sent_ms| LinkFrame::Ping { sent_ms }),
        any::<u64>().prop_map(|sent_ms| LinkFrame::Pong { sent_ms }),
    ]
}

fn frame_beside_the_log() -> impl Strategy<Value = LinkFrame> {
    let standing = prop_oneof![
        Just(Standing::Absent),
        Just(Standing::Here),
        Just(Standing::Deleted),
        vec("\\PC{0,30}", 0..4).prop_map(|urls| Standing::Elsewhere { urls }),
    ];
    let request = any::<u64>;
    prop_oneof![
        (vec(document(), 0..9), vec(document(), 0..9))
            .prop_map(|(add, remove)| LinkFrame::Interest { add, remove }),
        (document(), "\\PC{0,30}", "\\PC{0,30}", any::<u64>(), payload()).prop_map(
            |(document, sender, session, count, data)| LinkFrame::Presence {
                document,
                sender,
                session,
                count,
                data
            }
        ),
        (request(), document()).prop_map(|(request, document)| LinkFrame::Find { request, document }),
        (request(), standing).prop_map(|(request, standing)| LinkFrame::Found { request, standing }),
        (request(), document(), vec(any::<[u8; 32]>().prop_map(ChangeHash), 0..5))
            .prop_map(|(request, document, heads)| LinkFrame::HeadsRequest { request, document, heads }),
        (request(), any::<bool>()).prop_map(|(request, has)| LinkFrame::HeadsAnswer { request, has }),
        (request(), document())
            .prop_map(|(request, document)| LinkFrame::DocumentRequest { request, document }),
        (request(), option::of(contents()))
            .prop_map(|(request, contents)| LinkFrame::DocumentAnswer { request, contents }),
        (request(), vec(any::<u8>(), 0..=SCRUB_PREFIX_BYTES_MAX))
            .prop_map(|(request, prefix)| LinkFrame::ScrubRequest { request, prefix }),
        (request(), fingerprints())
            .prop_map(|(request, fingerprints)| LinkFrame::ScrubAnswer { request, fingerprints }),
        (request(), vec(document(), 0..5))
            .prop_map(|(request, documents)| LinkFrame::FingerprintsRequest { request, documents }),
        request().prop_map(|request| LinkFrame::PositionsRequest { request }),
        (request(), option::of(vec((origin(), any::<u64>().prop_map(Seq)), 0..5)))
            .prop_map(|(request, positions)| LinkFrame::PositionsAnswer { request, positions }),
        "\\PC{0,200}".prop_map(|message| LinkFrame::Failed { message }),
    ]
}

fn frame() -> impl Strategy<Value = LinkFrame> {
    prop_oneof![frame_of_the_log(), frame_beside_the_log()]
}

fn decoded(bytes: &[u8]) -> Result<LinkFrame, LinkFrameError> {
    decode(Bytes::copy_from_slice(bytes))
}

fn problem(bytes: &[u8]) -> ReadProblem {
    match decoded(bytes) {
        Err(LinkFrameError::Malformed(error)) => error.problem,
        other => panic!("expected a malformed frame, found {other:?}"),
    }
}

proptest! {
    #[test]
    fn a_frame_comes_back_as_it_was(frame in frame()) {
        prop_assert_eq!(decode(encode(&frame).into()), Ok(frame));
    }

    #[test]
    fn a_frame_that_ends_too_early_is_refused(frame in frame()) {
        let bytes = Bytes::from(encode(&frame));
        for length in 0..bytes.len() {
            let refused = matches!(decode(bytes.slice(..length)), Err(LinkFrameError::Malformed(_)));
            prop_assert!(refused, "cut to {length} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn fields_that_a_newer_version_appends_are_ignored(frame in frame(), more in vec(any::<u8>(), 1..40)) {
        let bytes = [encode(&frame), more].concat();
        prop_assert_eq!(decode(bytes.into()), Ok(frame));
    }

    /// What is accepted after the damage is another frame, and has exactly one encoding.
    #[test]
    fn a_damaged_frame_is_refused_or_is_another_one(frame in frame(), at: prop::sample::Index, flip in 1..=255_u8) {
        let mut bytes = encode(&frame);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(other) = decoded(&bytes) {
            prop_assert!(bytes.starts_with(&encode(&other)));
        }
    }

    #[test]
    fn noise_is_refused_or_is_a_frame_with_one_encoding(kind in 0..48_u8, noise in vec(any::<u8>(), 0..400)) {
        let bytes = [vec![kind], noise].concat();
        if let Ok(frame) = decoded(&bytes) {
            prop_assert!(bytes.starts_with(&encode(&frame)));
        }
    }
}

#[test]
fn the_layout_of_a_frame_is_fixed() {
    let frame = LinkFrame::Entries {
        origin: OriginId(Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)),
        first: Seq(300),
        chain: Chain([7; 16]),
        body: Bytes::from_static(&[2, 9]),
    };
    let expected = [&[4][..], &(1..=16).collect::<Vec<u8>>(), &[0xac, 0x02], &[7; 16], &[2, 2, 9]].concat();
    assert_eq!(encode(&frame), expected);
}

#[test]
fn a_frame_of_a_newer_peer_is_told_from_a_malformed_one() {
    assert_eq!(decoded(&[19, 1, 2, 3]), Err(LinkFrameError::UnknownFrame(19)));
    assert_eq!(decoded(&[0]), Err(LinkFrameError::UnknownFrame(0)));
    assert_eq!(problem(&[]), ReadProblem::Truncated);
    assert_eq!(problem(&[8]), ReadProblem::Truncated);
    assert_eq!(problem(&[8, 0x80, 0]), ReadProblem::Overlong);
}

#[test]
fn payloads_share_the_frames_buffer() {
    let body = Bytes::from(vec![5; 4_096]);
    let frame =
        LinkFrame::Entries { origin: OriginId(Uuid::nil()), first: Seq(1), chain: Chain::START, body };
    let bytes = Bytes::from(encode(&frame));
    let Ok(LinkFrame::Entries { body, .. }) = decode(bytes.clone()) else { panic!("a frame of entries") };
    assert!(bytes.as_ptr_range().contains(&body.as_ptr()));
}

/// A frame's first fields, a count, and enough bytes behind it for the count to be possible.
fn counted(head: &[u8], count: usize, item_bytes: usize) -> Vec<u8> {
    let mut bytes = head.to_vec();
    crate::leb128::write_unsigned(&mut bytes, count as u64);
    bytes.resize(bytes.len() + count * item_bytes, 1);
    bytes
}

#[test]
fn counts_beyond_their_limits_are_refused() {
    let counts = [
        (&[kind::HAVE][..], LINK_ORIGINS_MAX, 37),
        (&[kind::SNAPSHOT_PAGE], LINK_ORIGINS_MAX, 37),
        (&[kind::SNAPSHOT_PAGE, 0], SNAPSHOT_PAGE_DOCUMENTS_MAX, 6),
        (&[kind::INTEREST], INTEREST_DOCUMENTS_MAX, 2),
        (&[kind::INTEREST, 0], INTEREST_DOCUMENTS_MAX, 2),
        (&[kind::PRESENCE, 1, 9, 0, 0, 0], PRESENCE_DATA_BYTES_MAX, 1),
        (&[kind::SCRUB_REQUEST, 0], SCRUB_PREFIX_BYTES_MAX, 1),
        (&[kind::SCRUB_ANSWER, 0, FINGERPRINTS_DOCUMENTS], SCRUB_DOCUMENTS_MAX, 18),
        (&[kind::MISSING], SNAPSHOT_MISSING_MAX, 4),
        (&[kind::FAILED], LINK_REASON_BYTES_MAX, 1),
    ];
    for (head, count_max, item_bytes) in counts {
        let at = head.len();
        match decoded(&counted(head, count_max + 1, item_bytes)) {
            Err(LinkFrameError::Malformed(error)) => {
                assert_eq!((error.at, error.problem), (at, ReadProblem::TooLarge), "{head:?}");
            }
            other => panic!("{head:?}: expected to be refused, found {other:?}"),
        }
        // One fewer is no longer refused for its count.
        if let Err(LinkFrameError::Malformed(error)) = decoded(&counted(head, count_max, item_bytes)) {
            assert_ne!(error.at, at, "{head:?}");
        }
    }
}

#[test]
fn a_count_that_the_frame_cannot_hold_is_refused_before_anything_is_allocated() {
    for head in [&[kind::HAVE][..], &[kind::SNAPSHOT_PAGE, 0], &[kind::INTEREST]] {
        let mut bytes = counted(head, 1_000, 0);
        bytes.extend([1; 50]);
        assert_eq!(problem(&bytes), ReadProblem::Truncated, "{head:?}");
    }
    let changes = [&[kind::DOCUMENT_ANSWER, 0, 1, 1, 9, 1, b'g', CONTENTS_CHANGES, 3][..], &[1; 32]].concat();
    assert_eq!(problem(&changes), ReadProblem::Truncated, "three changes take 33 bytes at least");
}

#[test]
fn a_frame_beyond_the_limit_is_refused_unread() {
    let bytes = vec![kind::PING; LINK_FRAME_BYTES_MAX + 1];
    let refused = LinkFrameError::TooLong { bytes: bytes.len(), bytes_max: LINK_FRAME_BYTES_MAX };
    let bytes = Bytes::from(bytes);
    assert_eq!(decode(bytes.clone()), Err(refused));
    assert!(decode_parted(bytes).is_ok(), "what comes in parts may be longer");
}

#[test]
fn values_that_do_not_exist_are_refused() {
    let refused = [
        ("standing", vec![kind::FOUND, 0, 4]),
        ("option", vec![kind::SNAPSHOT_REQUEST, 2, 1, 1]),
        ("form of fingerprints", vec![kind::SCRUB_ANSWER, 0, 2, 0]),
        ("form of contents", vec![kind::DOCUMENT_ANSWER, 0, 1, 1, 9, 1, b'g', 3, 0]),
        ("empty document id", vec![kind::FIND, 0, 0]),
        ("empty group", vec![kind::DOCUMENT_ANSWER, 0, 1, 1, 9, 0, 0, 0]),
        ("reason that is not UTF-8", vec![kind::FAILED, 1, 0xff]),
        (
            "change shorter than its header",
            [&[kind::DOCUMENT_ANSWER, 0, 1, 1, 9, 1, b'g', 0, 1, 9][..], &[1; 9], &[0]].concat(),
        ),
    ];
    for (what, bytes) in refused {
        assert_eq!(problem(&bytes), ReadProblem::Malformed, "{what}");
    }
}

#[test]
fn a_deleted_document_carries_nothing_else() {
    let contents = DocumentContents {
        document: DocumentId::from_slice(&[1]).unwrap(),
        group: PlacementGroup::new("g").unwrap(),
        deleted_at_ms: Some(5),
        base: None,
        changes: vec![Bytes::from(vec![8; 20])],
    };
    let bytes = encode(&LinkFrame::DocumentAnswer { request: 1, contents: Some(contents.clone()) });
    let expected = Some(DocumentContents { changes: Vec::new(), ..contents });
    assert_eq!(decoded(&bytes), Ok(LinkFrame::DocumentAnswer { request: 1, contents: expected }));
}

#[test]
fn a_reason_that_is_too_long_is_cut_between_characters() {
    let message = "é".repeat(LINK_REASON_BYTES_MAX);
    let bytes = encode(&LinkFrame::Failed { message: format!("a{message}") });
    let Ok(LinkFrame::Failed { message: cut }) = decoded(&bytes) else { panic!("a reason") };
    assert_eq!(cut.len(), LINK_REASON_BYTES_MAX - 1);
    assert!(cut.starts_with("aéé") && cut.ends_with('é'));
}
