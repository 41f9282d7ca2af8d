//! What the graph's door refuses: changes that are well-formed by themselves, and crash or spoil the document of every
//! stock peer that applies them. Each is refused whether the history it attacks is in the tail, in a base, or in a base
//! whose index is at hand; nothing is changed by it; and the next honest change is accepted.

#[path = "hostile/drafts.rs"]
mod drafts;
#[path = "hostile/effort.rs"]
mod effort;
#[path = "hostile/pending.rs"]
mod pending;
#[path = "hostile/stock.rs"]
mod stock;

use std::sync::Arc;

use drafts::Draft;
use isobar_protocol::base::BaseIndex;
use isobar_protocol::change::Change;
use isobar_protocol::config::{Limits, MAX_OP_MAX, START_OP_JUMP_MAX};
use isobar_protocol::graph::{Graph, Ingested, Refusal};

const ANNA: u8 = 1;
const BEN: u8 = 2;
const CARL: u8 = 3;
const EVE: u8 = 6;
const NOBODY: u8 = 9;

/// Anna, Ben and Anna write one after the other; Carl writes beside the last two.
///
/// ```text
/// a1 (op 1) ── b1 (op 2) ── a2 (ops 3, 4)
///      └────── c1 (op 2)
/// ```
pub struct History {
    pub a1: Draft,
    pub b1: Draft,
    pub a2: Draft,
    pub c1: Draft,
}

impl History {
    pub fn written() -> Self {
        let a1 = Draft::new(ANNA, 1, 1, &[]);
        let b1 = Draft::new(BEN, 1, 2, &[&a1.change()]);
        let a2 = Draft::new(ANNA, 2, 3, &[&b1.change()]).with_ops(2);
        let c1 = Draft::new(CARL, 1, 2, &[&a1.change()]);
        Self { a1, b1, a2, c1 }
    }

    pub fn all(&self) -> [&Draft; 4] {
        [&self.a1, &self.b1, &self.a2, &self.c1]
    }

    /// What an honest client sends next.
    fn honest(&self) -> Change {
        Draft::new(BEN, 2, 5, &[&self.a2.change(), &self.c1.change()]).change()
    }
}

/// Where the history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    InTail,
    InBase,
    InBaseWithIndex,
    /// The first two changes in a base, the others in the tail.
    Split,
}

const EVERYWHERE: [Kept; 4] = [Kept::InTail, Kept::InBase, Kept::InBaseWithIndex, Kept::Split];

struct Keeper {
    graph: Graph,
    index: Arc<BaseIndex>,
}

impl Keeper {
    fn new(history: &History, kept: Kept) -> Self {
        let mut graph = Graph::new();
        for draft in history.all() {
            let staged = graph.ingest(draft.change(), &Limits::default());
            assert!(matches!(staged, Ok(Ingested::Staged(_))));
        }
        graph.advance_durable(graph.staged_end());
        let cut = match kept {
            Kept::InTail => 0,
            Kept::Split => 2,
            _ => graph.durable_end(),
        };
        let (summary, entries) = graph.summarise(cut);
        let index = Arc::new(BaseIndex::default().extended(entries.into_iter()));
        graph.rebase(summary);
        if kept == Kept::InBaseWithIndex {
            graph.attach_index(index.clone());
        }
        Self { graph, index }
    }

    /// Offers a change, with the index if it is asked for.
    fn offer(&mut self, change: &Change, limits: &Limits) -> Result<Ingested, Refusal> {
        match self.graph.ingest(change.clone(), limits)? {
            Ingested::NeedsIndex => {
                assert!(!self.graph.has_index(), "asked for the index that is attached");
                self.graph.attach_index(self.index.clone());
                self.graph.ingest(change.clone(), limits)
            }
            other => Ok(other),
        }
    }
}

/// Offers the change everywhere, and looks around.
fn assert_refused(name: &str, history: &History, attack: &Draft, expected: Refusal) {
    for kept in EVERYWHERE {
        let mut keeper = Keeper::new(history, kept);
        let heads = keeper.graph.heads();
        let refused = keeper.offer(&attack.change(), &Limits::default());
        assert_eq!(refused, Err(expected), "{name}, {kept:?}");
        assert_eq!(keeper.graph.heads(), heads, "{name}, {kept:?}");
        assert_eq!((keeper.graph.change_count(), keeper.graph.durable_end()), (4, 4), "{name}, {kept:?}");
        assert_eq!(keeper.graph.pending_count(), 0, "{name}, {kept:?}");
        assert_eq!(keeper.graph.position(&attack.change().hash), None, "{name}, {kept:?}");
        let honest = history.honest();
        assert_eq!(keeper.offer(&honest, &Limits::default()), Ok(Ingested::Staged(4..5)), "{name}, {kept:?}");
        keeper.graph.advance_durable(5);
        assert_eq!(keeper.graph.heads(), [honest.hash], "{name}, {kept:?}");
    }
}

/// The attacks that the graph answers alike wherever the history is kept.
pub struct Attacks {
    pub seq_gap: Draft,
    pub first_seq_is_not_one: Draft,
    pub seq_reused: Draft,
    pub actor_of_another_branch: Draft,
    pub actor_of_nobody: Draft,
    pub start_op_of_a_dependency: Draft,
    pub start_op_far_above: Draft,
    pub previous_not_ancestor: Draft,
}

impl Attacks {
    pub fn on(history: &History) -> Self {
        let (b1, a2, c1) = (&history.b1.change(), &history.a2.change(), &history.c1.change());
        Self {
            seq_gap: Draft::new(ANNA, 4, 5, &[a2, c1]),
            first_seq_is_not_one: Draft::new(EVE, 2, 5, &[a2, c1]),
            seq_reused: Draft::new(ANNA, 2, 4, &[b1]),
            actor_of_another_branch: Draft::new(EVE, 1, 5, &[a2]).overwriting(CARL, 2),
            actor_of_nobody: Draft::new(EVE, 1, 5, &[a2, c1]).overwriting(NOBODY, 2),
            start_op_of_a_dependency: Draft::new(EVE, 1, 4, &[a2, c1]),
            start_op_far_above: Draft::new(EVE, 1, 4 + START_OP_JUMP_MAX + 1, &[a2, c1]),
            previous_not_ancestor: Draft::new(ANNA, 3, 5, &[c1]),
        }
    }
}

#[test]
fn honest_changes_are_accepted_wherever_the_history_is() {
    let history = History::written();
    let (a2, c1) = (&history.a2.change(), &history.c1.change());
    let honest = [
        Draft::new(ANNA, 3, 5, &[a2]),
        Draft::new(EVE, 1, 5, &[a2]).overwriting(BEN, 2),
        Draft::new(EVE, 1, 5, &[a2, c1]).overwriting(CARL, 2),
        Draft::new(EVE, 1, 4 + START_OP_JUMP_MAX, &[a2, c1]),
        Draft::new(EVE, 1, 5, &[a2, c1]).with_ops(0),
        // Carl did not see what happened beside him.
        Draft::new(CARL, 2, 3, &[c1]),
        Draft::new(EVE, 1, 1, &[]),
        Draft::new(EVE, 1, 3, &[&history.b1.change()]).overwriting(ANNA, 1),
    ];
    for draft in honest {
        for kept in EVERYWHERE {
            let offered = Keeper::new(&history, kept).offer(&draft.change(), &Limits::default());
            assert_eq!(offered, Ok(Ingested::Staged(4..5)), "{draft:?}, {kept:?}");
        }
    }
}

#[test]
fn sequence_numbers_follow_each_other() {
    let history = History::written();
    let attacks = Attacks::on(&history);
    assert_refused("seq gap", &history, &attacks.seq_gap, Refusal::SeqGap { last: 2, found: 4 });
    let expected = Refusal::SeqGap { last: 0, found: 2 };
    assert_refused("first seq", &history, &attacks.first_seq_is_not_one, expected);
    assert_refused("seq reused", &history, &attacks.seq_reused, Refusal::SeqReused { seq: 2 });
}

#[test]
fn an_author_builds_on_their_own_last_change() {
    let history = History::written();
    let attack = Attacks::on(&history).previous_not_ancestor;
    assert_refused("previous", &history, &attack, Refusal::PreviousNotAncestor);
    let rootless = Draft::new(ANNA, 3, 1, &[]);
    assert_refused("previous of a root", &history, &rootless, Refusal::PreviousNotAncestor);
}

#[test]
fn what_was_rolled_back_leaves_nothing_behind_that_attacks_could_build_on() {
    let history = History::written();
    let (a2, c1) = (&history.a2.change(), &history.c1.change());
    for kept in EVERYWHERE {
        let mut keeper = Keeper::new(&history, kept);
        let (heads, bytes) = (keeper.graph.heads(), keeper.graph.tail_bytes());
        let merge = Draft::new(EVE, 1, 5, &[a2, c1]).change();
        assert_eq!(keeper.offer(&merge, &Limits::default()), Ok(Ingested::Staged(4..5)));
        keeper.graph.roll_back_staged();
        assert_eq!((keeper.graph.heads(), keeper.graph.tail_bytes()), (heads, bytes));
        assert_eq!((keeper.graph.change_count(), keeper.graph.position(&merge.hash)), (4, None));
        // In the place of the merge stands a change that does not know Carl.
        let ben = Draft::new(BEN, 2, 5, &[a2]).change();
        assert_eq!(keeper.offer(&ben, &Limits::default()), Ok(Ingested::Staged(4..5)));
        let attack = Draft::new(CARL, 2, 6, &[&ben]).change();
        assert_eq!(keeper.offer(&attack, &Limits::default()), Err(Refusal::PreviousNotAncestor), "{kept:?}");
        let honest = Draft::new(CARL, 2, 6, &[&ben, c1]).change();
        assert_eq!(keeper.offer(&honest, &Limits::default()), Ok(Ingested::Staged(5..6)), "{kept:?}");
    }
}

#[test]
fn operations_name_authors_among_the_ancestors() {
    let history = History::written();
    let attacks = Attacks::on(&history);
    assert_refused("nobody", &history, &attacks.actor_of_nobody, Refusal::UnknownActor);
    assert_refused("other branch", &history, &attacks.actor_of_another_branch, Refusal::UnknownActor);
}

#[test]
fn operations_start_just_above_the_dependencies() {
    let history = History::written();
    let attacks = Attacks::on(&history);
    let low = Refusal::StartOpTooLow { start_op: 4, reached: 4 };
    assert_refused("low", &history, &attacks.start_op_of_a_dependency, low);
    let start_op = attacks.start_op_far_above.start_op;
    let high = Refusal::StartOpTooHigh { max_op: start_op, reached: 4 };
    assert_refused("high", &history, &attacks.start_op_far_above, high);
}

#[test]
fn counters_that_would_use_up_the_document_are_not_even_read() {
    let draft = Draft::new(EVE, 1, 4_000_000_000, &[]);
    assert!(draft.start_op > MAX_OP_MAX);
    Change::decode(draft.bytes(), &Limits::default()).expect_err("too large");
    // Nor do they creep up to the end, one allowed jump after the other.
    let mut graph = Graph::new();
    let mut last = Draft::new(EVE, 1, 1, &[]);
    let refusal = loop {
        if let Err(refusal) = graph.ingest(last.change(), &Limits::default()) {
            break refusal;
        }
        let next = last.start_op + START_OP_JUMP_MAX;
        let Ok(_) = Change::decode(
            Draft::new(EVE, last.seq + 1, next, &[&last.change()]).bytes(),
            &Limits::default(),
        ) else {
            return;
        };
        last = Draft::new(EVE, last.seq + 1, next, &[&last.change()]);
    };
    panic!("refused at {}: {refusal}", last.start_op);
}
