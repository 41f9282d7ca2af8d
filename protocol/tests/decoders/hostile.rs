//! Changes that an honest author never makes. Each test takes one that is accepted and spoils one thing.

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use bytes::Bytes;
use isobar_protocol::change::{Change, ChangeError, ColumnProblem};
use isobar_protocol::chunk::{ChunkError, InflationProblem};
use isobar_protocol::config::{Limits, MAX_OP_MAX};

use crate::draft::*;

impl Draft {
    fn decode(&self) -> Result<Change, ChangeError> {
        Change::decode(sealed_as(1, &self.data()).into(), &Limits::default())
    }

    fn automerge_accepts(&self) -> bool {
        automerge::Change::from_bytes(sealed_as(1, &self.data())).is_ok()
    }
}

fn refusal(draft: Draft) -> ChangeError {
    draft.decode().expect_err("a spoilt change is refused")
}

#[track_caller]
fn assert_refused(draft: Draft, column: u32, problem: ColumnProblem) {
    assert_eq!(refusal(draft), ChangeError::Column { column, problem });
}

#[test]
fn the_honest_change_is_accepted() {
    let change = Draft::honest().decode().unwrap();
    assert_eq!((change.seq, change.start_op, change.op_count, change.max_op()), (3, 10, 2, 11));
    assert!(Draft::honest().automerge_accepts());
    let empty = Draft { columns: Vec::new(), ..Draft::honest() }.decode().unwrap();
    assert_eq!((empty.op_count, empty.max_op()), (0, 9));
}

#[test]
fn a_checksum_that_is_not_of_the_contents_is_refused_though_automerge_takes_it() {
    let mut bytes = sealed_as(1, &Draft::honest().data());
    bytes[5] ^= 1;
    assert!(automerge::Change::from_bytes(bytes.clone()).is_ok());
    let refused = Change::decode(bytes.into(), &Limits::default()).unwrap_err();
    assert_eq!(refused, ChangeError::Checksum);
    assert_eq!(refused.reason(), "wrong_checksum");
}

#[test]
fn a_run_that_claims_millions_of_operations_is_refused_by_its_header() {
    let twenty_million = [0x80, 0xda, 0xc4, 0x09];
    let column = |value: u8| [&twenty_million[..], &[value]].concat();
    let bomb = Draft::honest()
        .with(KEY_TEXT, &[&twenty_million[..], &[1, b'a']].concat())
        .with(INSERT, &twenty_million)
        .with(ACTION, &column(1))
        .with(VALUE_TYPE, &column(0))
        .with(VALUE, &[])
        .with(PREDECESSORS, &column(0));
    assert!(bomb.data().len() < 160);
    let started = std::time::Instant::now();
    let refused = refusal(bomb.clone());
    let operations = 20_000_000;
    assert_eq!(refused, ChangeError::TooManyOperations { operations, operations_max: 4_000_000 });
    // Automerge takes seconds for what is refused here without a step per operation.
    assert!(started.elapsed().as_secs() < 1);
    let limits = Limits { change_ops_max: operations, ..Limits::default() };
    let accepted = Change::decode(sealed_as(1, &bomb.data()).into(), &limits).unwrap();
    assert_eq!(accepted.op_count, operations);
}

#[test]
fn a_group_that_claims_millions_of_predecessors_is_refused() {
    let draft = Draft::honest().with_predecessors(&[2, 0], &[2, 0]);
    assert_refused(
        draft.with(PREDECESSORS, &[2, 0xff, 0xff, 0xff, 0x7f]),
        PREDECESSORS,
        ColumnProblem::Count,
    );
}

#[test]
fn a_change_that_inflates_beyond_the_limit_is_refused() {
    let mut document = AutoCommit::new();
    document.put(ROOT, "text", "x".repeat(200_000)).unwrap();
    let mut change = document.get_changes(&[]).remove(0);
    let deflated = Bytes::from(change.bytes().into_owned());
    assert!(deflated.len() < 1_000);
    let limits = |change_bytes_max| Limits { change_bytes_max, ..Limits::default() };
    assert!(Change::decode(deflated.clone(), &limits(201_000)).is_ok());
    let refused = Change::decode(deflated.clone(), &limits(199_000)).unwrap_err();
    assert_eq!(refused, ChangeError::Inflation(InflationProblem::TooLarge));
    assert_eq!(refused.reason(), "inflation_too_large");
    let refused = Change::decode(deflated.clone(), &limits(100)).unwrap_err();
    assert!(matches!(refused, ChangeError::TooLarge { .. }));
    // Bytes after the end of the compressed stream would give one change many forms.
    let mut longer = deflated.to_vec();
    let length_at = 9;
    assert!(longer[length_at] & 0x7f < 0x7f);
    longer[length_at] += 1;
    longer.push(0);
    let refused = Change::decode(longer.into(), &Limits::default()).unwrap_err();
    assert_eq!(refused, ChangeError::Inflation(InflationProblem::Invalid));
}

#[test]
fn numbers_of_the_header_are_bounded() {
    assert_eq!(refusal(Draft { seq: 0, ..Draft::honest() }), ChangeError::SeqZero);
    assert_eq!(refusal(Draft { start_op: 0, ..Draft::honest() }), ChangeError::StartOpZero);
    for start_op in [4_000_000_000, u64::MAX, MAX_OP_MAX, MAX_OP_MAX + 1] {
        let refused = refusal(Draft { start_op, ..Draft::honest() });
        assert!(matches!(refused, ChangeError::CounterTooLarge(_)), "{refused:?}");
    }
    assert!(Draft { start_op: MAX_OP_MAX - 1, ..Draft::honest() }.decode().is_ok());
}

#[test]
fn dependencies_stand_once_and_in_order() {
    for deps in [vec![[1; 32], [1; 32]], vec![[2; 32], [1; 32]]] {
        assert_eq!(refusal(Draft { deps, ..Draft::honest() }), ChangeError::DependencyOrder);
    }
    // A count that the input cannot hold allocates nothing.
    let mut data = vec![0xff; 9];
    data.push(1);
    let refused = Change::decode(sealed_as(1, &data).into(), &Limits::default()).unwrap_err();
    assert!(matches!(refused, ChangeError::Header(_)), "{refused:?}");
}

#[test]
fn actors_are_well_formed_and_the_message_is_text() {
    assert!(matches!(refusal(Draft { actor: vec![], ..Draft::honest() }), ChangeError::Actor(_)));
    assert!(matches!(refusal(Draft { actor: vec![1; 129], ..Draft::honest() }), ChangeError::Actor(_)));
    assert_eq!(refusal(Draft { message: vec![0xff], ..Draft::honest() }), ChangeError::Message);
    let used = Draft::honest().with_predecessors(&[0x7e, 1, 2], &[2, 1]);
    assert!(used.clone().with_others(&[&[3], &[6]]).decode().is_ok());
    for others in [[&[6], &[3]], [&[3], &[3]]] {
        assert_eq!(refusal(used.clone().with_others(&[others[0], others[1]])), ChangeError::ActorOrder);
    }
    assert_eq!(refusal(used.with_others(&[&[3], &[5; 16]])), ChangeError::ActorOrder);
    assert_eq!(refusal(Draft::honest().with_others(&[&[3]])), ChangeError::UnusedActor);
}

#[test]
fn an_actor_index_beyond_the_list_is_refused_in_every_column() {
    let unknown = ColumnProblem::Actor;
    let honest = || Draft::honest().with_others(&[&[3]]);
    assert_refused(honest().with(OBJECT_ACTOR, &[2, 2]).with(OBJECT_COUNTER, &[2, 1]), OBJECT_ACTOR, unknown);
    let keyed = honest().with(KEY_TEXT, &[]).with(KEY_COUNTER, &[2, 1]);
    assert!(keyed.clone().with(KEY_ACTOR, &[2, 1]).decode().is_ok());
    assert_refused(keyed.with(KEY_ACTOR, &[0x7e, 1, 2]), KEY_ACTOR, unknown);
    assert_refused(honest().with_predecessors(&[0x7e, 0, 2], &[2, 1]), PREDECESSOR_ACTOR, unknown);
    // Beyond 32 bits stock automerge panics.
    let huge = [2, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    assert_refused(honest().with_predecessors(&huge, &[2, 1]), PREDECESSOR_ACTOR, unknown);
}

#[test]
fn an_operation_refers_to_earlier_ones_only() {
    let late = ColumnProblem::Counter;
    // The operations have the counters 10 and 11.
    assert!(Draft::honest().with_predecessors(&[2, 0], &[0x7e, 9, 1]).decode().is_ok());
    assert_refused(Draft::honest().with_predecessors(&[2, 0], &[0x7e, 9, 2]), PREDECESSOR_COUNTER, late);
    assert_refused(Draft::honest().with_predecessors(&[2, 0], &[0x7e, 10, 0]), PREDECESSOR_COUNTER, late);
    assert_refused(Draft::honest().with_predecessors(&[2, 0], &[2, 0]), PREDECESSOR_COUNTER, late);
    assert_refused(Draft::honest().with_predecessors(&[2, 0], &[0x7e, 1, 0x7f]), PREDECESSOR_COUNTER, late);
    let object = |counter| Draft::honest().with(OBJECT_ACTOR, &[2, 0]).with(OBJECT_COUNTER, &[2, counter]);
    assert!(object(9).decode().is_ok());
    assert_refused(object(10), OBJECT_COUNTER, late);
    assert_refused(object(0), OBJECT_COUNTER, late);
    let key = |counters: &[u8]| {
        Draft::honest().with(KEY_TEXT, &[]).with(KEY_ACTOR, &[2, 0]).with(KEY_COUNTER, counters)
    };
    assert!(key(&[0x7e, 9, 1]).decode().is_ok());
    assert_refused(key(&[0x7e, 9, 2]), KEY_COUNTER, late);
    // A sum beyond 63 bits.
    let huge = [0x7e, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 1];
    assert_refused(key(&huge), KEY_COUNTER, late);
}

#[test]
fn predecessors_of_one_operation_ascend() {
    let draft = |actors: &[u8], counters: &[u8]| {
        let draft = Draft::honest().with_others(&[&[3], &[6]]).with(PREDECESSORS, &[0x7e, 4, 0]);
        draft.with(PREDECESSOR_ACTOR, actors).with(PREDECESSOR_COUNTER, counters)
    };
    // By actor the order is 1, 0, 2: the author's id stands between the others'.
    assert!(draft(&[0x7c, 1, 0, 2, 1], &[0x7f, 7, 2, 0, 0x7f, 1]).decode().is_ok());
    let twice = draft(&[0x7f, 1, 2, 0, 0x7f, 2], &[0x7f, 7, 2, 0, 0x7f, 1]);
    assert_refused(twice, PREDECESSOR_COUNTER, ColumnProblem::Order);
    let unsorted = draft(&[0x7c, 0, 1, 2, 1], &[0x7f, 7, 2, 0, 0x7f, 1]);
    assert_refused(unsorted, PREDECESSOR_COUNTER, ColumnProblem::Order);
    let falling = draft(&[0x7c, 1, 0, 2, 1], &[0x7e, 7, 0x7f, 2, 1]);
    assert_refused(falling, PREDECESSOR_COUNTER, ColumnProblem::Order);
}

#[test]
fn every_column_has_one_value_per_operation() {
    let count = ColumnProblem::Count;
    for (column, short, long) in [
        (KEY_TEXT, &[0x7f, 1, b'a'][..], &[0x7d, 1, b'a', 1, b'b', 1, b'c'][..]),
        (INSERT, &[1], &[3]),
        (VALUE_TYPE, &[0x7f, 0x14], &[3, 0x14]),
        (PREDECESSORS, &[0x7f, 0], &[3, 0]),
    ] {
        assert_refused(Draft::honest().with(column, short), column, count);
        assert_refused(Draft::honest().with(column, long), column, count);
    }
    for column in [INSERT, VALUE_TYPE, PREDECESSORS] {
        assert!(Draft::honest().with(column, &[]).decode().is_err());
    }
    assert_refused(Draft::honest().with(VALUE, &[1, 2, 3]), VALUE, count);
    assert_refused(Draft::honest().with(VALUE, &[1]), VALUE, ColumnProblem::Runs { at: 1 });
    let surplus = Draft::honest().with_predecessors(&[3, 0], &[3, 1]);
    assert_refused(surplus, PREDECESSOR_ACTOR, count);
    let missing = Draft::honest().with_predecessors(&[0x7f, 0], &[2, 1]);
    assert_refused(missing, PREDECESSOR_ACTOR, count);
}

#[test]
fn columns_are_known_plain_ordered_and_not_empty() {
    assert_refused(Draft::honest().with(ACTION | 8, &[0]), ACTION, ColumnProblem::Deflated);
    assert_refused(Draft::honest().with(210, &[2, 0]), 210, ColumnProblem::Unknown);
    let mut draft = Draft::honest();
    draft.columns.swap(1, 2);
    assert_refused(draft, INSERT, ColumnProblem::Order);
    let mut draft = Draft::honest();
    draft.columns.insert(1, (KEY_TEXT, vec![2, 0]));
    assert_refused(draft, KEY_TEXT, ColumnProblem::Order);
    let mut draft = Draft::honest();
    draft.columns.insert(0, (KEY_ACTOR, vec![]));
    assert_refused(draft, KEY_ACTOR, ColumnProblem::Empty);
    assert_refused(Draft::honest().with(EXPAND, &[2]), EXPAND, ColumnProblem::Empty);
}

#[test]
fn actions_and_values_fit_each_other() {
    let action = |action: u8, kind: u8, values: &[u8]| {
        Draft::honest().with(ACTION, &[2, action]).with(VALUE_TYPE, &[2, kind]).with(VALUE, values)
    };
    assert_refused(action(8, 0, &[]), ACTION, ColumnProblem::Action);
    assert_refused(Draft::honest().with(ACTION, &[0x00, 2, 2, 1]), ACTION, ColumnProblem::Action);
    // Increments by a text make stock automerge fail; so does a deletion of nothing, when it is saved.
    assert_refused(action(5, 0x16, b"ab"), ACTION, ColumnProblem::Value);
    assert!(action(5, 0x14, &[1, 2]).decode().is_ok());
    assert_refused(action(3, 0, &[]), ACTION, ColumnProblem::Value);
    assert_refused(action(0, 0x14, &[1, 2]), ACTION, ColumnProblem::Value);
    // Deletions and increments of elements that they would insert themselves.
    let inserting = |action| {
        let elements =
            Draft::honest().with(KEY_TEXT, &[]).with(KEY_ACTOR, &[2, 0]).with(KEY_COUNTER, &[0x7e, 5, 1]);
        let elements = elements.with(ACTION, &[2, action]).with_predecessors(&[2, 0], &[0x7e, 5, 1]);
        match action {
            5 => elements.with(VALUE_TYPE, &[2, 0x14]).with(VALUE, &[1, 2]),
            _ => elements.with(VALUE_TYPE, &[2, 0]).with(VALUE, &[]),
        }
    };
    for action in [3, 5] {
        assert!(inserting(action).decode().is_ok());
        assert_refused(inserting(action).with(INSERT, &[0, 2]), ACTION, ColumnProblem::Value);
    }
    assert!(action(0, 0, &[]).decode().is_ok());
    // A mark is an insert.
    assert_refused(action(7, 0, &[]), ACTION, ColumnProblem::Value);
    for (kind, values) in [
        (0x14, &[0x80, 0x00][..]),
        (0x24, &[0x80, 0x00, 0x80, 0x00]),
        (0x16, &[0xff, b'a']),
        (0x15, &[1, 2]),
        (0x05, &[]),
        (0x06, &[9]),
        (0x10, &[1, 2]),
        (0x03, &[]),
    ] {
        assert!(action(1, kind, values).decode().is_err(), "{kind:#x}");
    }
    assert!(action(1, 0x06, &[]).decode().is_ok());
    assert!(action(1, 0x1f, &[1, 2]).decode().is_ok());
}

#[test]
fn keys_are_a_text_or_an_element() {
    let wrong = ColumnProblem::Value;
    let inserts = |draft: Draft| draft.with(INSERT, &[0, 2]);
    // An insert under a text.
    assert_refused(inserts(Draft::honest()), KEY_ACTOR, wrong);
    // At the head of a list, which is the element 0 of nobody: only inserts.
    let at_head = Draft::honest().with(KEY_TEXT, &[]).with(KEY_COUNTER, &[2, 0]);
    assert!(inserts(at_head.clone()).decode().is_ok());
    assert_refused(at_head, KEY_ACTOR, wrong);
    // No key, and two.
    assert_refused(Draft::honest().with(KEY_TEXT, &[]), KEY_ACTOR, wrong);
    let both = Draft::honest().with(KEY_ACTOR, &[2, 0]).with(KEY_COUNTER, &[2, 1]);
    assert_refused(both, KEY_ACTOR, wrong);
    // An object of nobody.
    assert_refused(Draft::honest().with(OBJECT_ACTOR, &[2, 0]), OBJECT_COUNTER, wrong);
}

#[test]
fn runs_in_another_form_than_automerge_writes_are_refused() {
    for runs in [
        &[0x7e, 1, 1][..],                                             // a repetition as literals
        &[1, 1, 0x7f, 1],                                              // a run of one
        &[0x7f, 1, 0x7f, 1],                                           // literals after literals
        &[2, 1, 0, 0],                                                 // a run of no nulls
        &[0x82, 0x00, 1],                                              // a count that is longer than need be
        &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7f], // the least 64-bit count
        &[2],
    ] {
        let refused = refusal(Draft::honest().with(ACTION, runs));
        let expected =
            matches!(refused, ChangeError::Column { column: ACTION, problem: ColumnProblem::Runs { .. } });
        assert!(expected, "{runs:?}: {refused:?}");
    }
    for flags in [&[0, 0, 2][..], &[1, 0, 1], &[0]] {
        assert!(Draft::honest().with(INSERT, flags).decode().is_err(), "{flags:?}");
    }
}

#[test]
fn anything_but_one_change_chunk_is_refused() {
    let decode = |bytes: Vec<u8>| Change::decode(bytes.into(), &Limits::default()).unwrap_err();
    let honest = sealed_as(1, &Draft::honest().data());
    assert_eq!(decode([&honest[..], &honest].concat()), ChangeError::NotOneChange);
    assert_eq!(decode(Vec::new()), ChangeError::NotOneChange);
    assert_eq!(decode(AutoCommit::new().save()), ChangeError::NotOneChange);
    assert_eq!(decode([&honest[..], &[0]].concat()), ChangeError::NotOneChange);
    let mut unknown = honest.clone();
    unknown[8] = 9;
    assert_eq!(decode(unknown), ChangeError::Chunk(ChunkError::Kind(9)));
    assert!(matches!(decode(honest[..honest.len() - 1].to_vec()), ChangeError::Chunk(ChunkError::Read(_))));
    assert!(matches!(decode(vec![0; 40]), ChangeError::Chunk(ChunkError::Magic { at: 0 })));
}
