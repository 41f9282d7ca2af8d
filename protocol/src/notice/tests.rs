use proptest::prelude::*;

use super::*;
use crate::config::DOCUMENT_ID_BYTES_MAX;

fn document(name: u8) -> DocumentId {
    DocumentId::from_slice(&[name; 16]).unwrap()
}

fn group() -> PlacementGroup {
    PlacementGroup::new("eu-only").unwrap()
}

fn storage() -> StorageId {
    StorageId::new("a storage").unwrap()
}

fn region(name: &str, url: Option<&str>, link: Option<u64>) -> KnownRegion {
    KnownRegion {
        region: RegionName::new(name).unwrap(),
        storage_id: storage(),
        client_url: url.map(str::to_owned),
        link: link.map(LinkId),
    }
}

fn observation(name: u8, is_closed: bool) -> Observation {
    let heads = vec![ChangeHash([1; 32]), ChangeHash([2; 32])];
    Observation { document: document(name), group: group(), baseline: Baseline(7), heads, is_closed }
}

fn all() -> Vec<Notice> {
    let node = Uuid::from_u128(5);
    let scopes = [Scope::Regions, Scope::Sessions(group())];
    let interests = scopes.into_iter().map(|scope| Notice::Interest {
        anew: scope == Scope::Regions,
        scope,
        add: vec![document(1)],
        remove: vec![document(2), document(3)],
    });
    let outcomes = [Standing::Absent, Standing::Here, Standing::Elsewhere { urls: vec!["wss://x".into()] }];
    let searched = outcomes.into_iter().map(|outcome| Notice::Searched { node, request: 300, outcome });
    let others = [
        Notice::Appended,
        Notice::Stored { documents: vec![document(1), document(2)] },
        Notice::Presence {
            from_region: true,
            group: group(),
            document: document(1),
            sender: "sender".into(),
            session: "session".into(),
            count: 1 << 40,
            data: Bytes::from_static(b"cursor"),
        },
        Notice::Keeping {
            regions: vec![region("fra", Some("wss://fra"), Some(9)), region("iad", None, None)],
            observers: vec![ObserverStanding { node, epoch: 1, taken: 2, told: 3 }],
        },
        Notice::Search { request: 1, group: group(), document: document(4) },
        Notice::Searching { node, request: u64::MAX },
        Notice::Observed {
            epoch: 1,
            number: 2,
            observed: vec![observation(1, true), observation(2, false)],
            left: vec![document(3)],
        },
        Notice::Reached {
            node,
            epoch: 1,
            region: RegionName::new("fra").unwrap(),
            storage_id: storage(),
            link: LinkId(9),
            documents: vec![(document(1), vec![ChangeHash([3; 32])]), (document(2), Vec::new())],
        },
    ];
    others.into_iter().chain(interests).chain(searched).collect()
}

#[test]
fn every_notice_is_read_as_it_was_written_and_may_grow() {
    for notice in all() {
        let bytes = notice.encode();
        assert_eq!(Notice::decode(&bytes).unwrap(), Some(notice.clone()));
        let grown: Bytes = [&bytes[..], b"a later version's field"].concat().into();
        assert_eq!(Notice::decode(&grown).unwrap(), Some(notice));
    }
}

#[test]
fn a_notice_that_was_cut_is_refused_and_an_unknown_one_passed_over() {
    for notice in all() {
        let bytes = notice.encode();
        for end in 1..bytes.len() {
            assert!(Notice::decode(&bytes.slice(..end)).is_err(), "{notice:?} cut at {end}");
        }
    }
    assert!(Notice::decode(&Bytes::new()).is_err());
    assert_eq!(Notice::decode(&Bytes::from_static(&[200, 1, 2])).unwrap(), None);
}

#[test]
fn items_are_cut_into_parts_that_fit() {
    assert_eq!(parts(Vec::<usize>::new(), |it| *it), [vec![]]);
    assert_eq!(parts(vec![1, 2], |it| *it), [vec![1, 2]]);
    let max = NOTICE_ITEM_BYTES;
    assert_eq!(
        parts(vec![max, 1, max - 1, 1, 2 * max], |it| *it),
        [vec![max], vec![1, max - 1], vec![1], vec![2 * max]]
    );
    // The largest of what stands in a part fits beside it into a notice of 256 KiB.
    let heads = vec![ChangeHash([1; 32]); RECEIPT_HEADS_MAX];
    let document = DocumentId::from_slice(&[1; DOCUMENT_ID_BYTES_MAX]).unwrap();
    let large = Observation { document, heads, ..observation(1, true) };
    let observed = vec![large; 4];
    for observed in parts(observed, Observation::weight) {
        let notice = Notice::Observed { epoch: 1, number: 1, observed, left: Vec::new() };
        assert!(notice.encode().len() < 128 << 10);
    }
}

proptest! {
    #[test]
    fn garbage_is_refused_or_has_one_encoding(bytes in proptest::collection::vec(0..20_u8, 0..200), kind in 0..12_u8) {
        let bytes: Bytes = std::iter::once(kind).chain(bytes).collect();
        if let Ok(Some(notice)) = Notice::decode(&bytes) {
            prop_assert!(bytes.starts_with(&notice.encode()));
        }
    }
}
