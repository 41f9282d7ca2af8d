use super::*;

const FIRST: LinkId = LinkId(1);
const SECOND: LinkId = LinkId(2);

fn document(name: u8) -> DocumentId {
    DocumentId::from_slice(&[name]).expect("one byte")
}

fn group(name: &str) -> PlacementGroup {
    PlacementGroup::new(name).expect("a short name")
}

fn groups(names: &[&str]) -> BTreeSet<PlacementGroup> {
    names.iter().map(|name| group(name)).collect()
}

fn interest(add: &[u8], remove: &[u8]) -> LinkFrame {
    let documents = |names: &[u8]| names.iter().map(|name| document(*name)).collect();
    LinkFrame::Interest { add: documents(add), remove: documents(remove) }
}

fn open(names: &[(u8, &str)]) -> Vec<(DocumentId, PlacementGroup)> {
    names.iter().map(|(name, of)| (document(*name), group(of))).collect()
}

#[test]
fn peers_are_told_once_of_what_is_open_and_of_what_is_not_any_more_after_a_while() {
    let mut interests = Interests::default();
    assert_eq!(interests.link_opened(FIRST, groups(&["all"])), interest(&[], &[]));
    let told = interests.refresh(Moment(0), open(&[(1, "all")]));
    assert_eq!(told, vec![(FIRST, interest(&[1], &[]))]);
    assert!(interests.refresh(Moment(500), open(&[(1, "all")])).is_empty(), "nothing is new");
    assert!(interests.refresh(Moment(1_000), open(&[])).is_empty(), "it lingers");
    assert!(interests.refresh(Moment(1_000 + INTEREST_LINGER_MS - 1), open(&[])).is_empty());
    let told = interests.refresh(Moment(1_000 + INTEREST_LINGER_MS), open(&[]));
    assert_eq!(told, vec![(FIRST, interest(&[], &[1]))]);
}

#[test]
fn who_comes_back_in_time_is_not_mentioned() {
    let mut interests = Interests::default();
    interests.link_opened(FIRST, groups(&["all"]));
    interests.refresh(Moment(0), open(&[(1, "all")]));
    interests.refresh(Moment(500), open(&[]));
    interests.refresh(Moment(INTEREST_LINGER_MS), open(&[(1, "all")]));
    assert!(interests.refresh(Moment(2 * INTEREST_LINGER_MS), open(&[(1, "all")])).is_empty());
}

#[test]
fn a_new_link_is_told_of_all_that_is_wanted_in_its_groups() {
    let mut interests = Interests::default();
    interests.refresh(Moment(0), open(&[(1, "all"), (2, "two")]));
    assert_eq!(interests.link_opened(FIRST, groups(&["all"])), interest(&[1], &[]));
    assert_eq!(interests.link_opened(SECOND, groups(&["all", "two"])), interest(&[1, 2], &[]));
    let told = interests.refresh(Moment(500), open(&[(1, "all"), (2, "two"), (3, "two")]));
    assert_eq!(told, vec![(SECOND, interest(&[3], &[]))], "the first is not in the group");
}

#[test]
fn presence_goes_to_those_who_want_it_and_are_in_the_group() {
    let mut interests = Interests::default();
    interests.link_opened(FIRST, groups(&["all"]));
    interests.link_opened(SECOND, groups(&["all", "two"]));
    for link in [FIRST, SECOND] {
        interests.received(link, vec![document(1), document(2)], &[]);
    }
    let to = |interests: &Interests, name, of| -> Vec<LinkId> {
        interests.recipients(&document(name), &group(of)).collect()
    };
    assert_eq!(to(&interests, 1, "all"), [FIRST, SECOND]);
    assert_eq!(to(&interests, 2, "two"), [SECOND], "the first asked, and is not in the group");
    assert_eq!(to(&interests, 3, "all"), []);
    interests.received(SECOND, vec![], &[document(1)]);
    assert_eq!(to(&interests, 1, "all"), [FIRST]);
    interests.link_closed(FIRST);
    assert_eq!(to(&interests, 1, "all"), []);
    assert!(!interests.is_welcome(FIRST, &group("all")), "it is gone");
    assert!(interests.is_anything_wanted());
    interests.link_closed(SECOND);
    assert!(!interests.is_anything_wanted());
}

#[test]
fn what_peers_want_is_bounded_and_strangers_are_not_heard() {
    let mut interests = Interests::default();
    interests.received(FIRST, vec![document(1)], &[]);
    assert!(!interests.is_anything_wanted());
    interests.link_opened(FIRST, groups(&["all"]));
    let many = |from: u32| -> Vec<DocumentId> {
        let ids = (from..from + INTEREST_DOCUMENTS_MAX as u32).map(u32::to_be_bytes);
        ids.map(|id| DocumentId::from_slice(&id).expect("four bytes")).collect()
    };
    interests.received(FIRST, many(0), &[]);
    interests.received(FIRST, many(1_000_000), &[]);
    assert_eq!(interests.wanted_by.len(), INTEREST_DOCUMENTS_MAX);
    let open: Vec<_> = many(0).into_iter().chain(many(1_000_000)).map(|id| (id, group("all"))).collect();
    interests.refresh(Moment(0), open);
    assert_eq!(interests.wanted.len(), INTEREST_DOCUMENTS_MAX);
}
