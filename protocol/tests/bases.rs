//! What a graph can tell of its base without the index, when it asks for it, and what a base's records survive.

#[path = "hostile/drafts.rs"]
#[expect(dead_code, reason = "the tests of hostile changes use all of it")]
mod drafts;

use std::sync::Arc;

use drafts::Draft;
use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::config::Limits;
use isobar_protocol::graph::{Graph, Ingested, Refusal};

const ANNA: u8 = 1;
const BEN: u8 = 2;
const CARL: u8 = 3;

/// Anna, Ben and Anna again, one after the other, then Ben; all in the base.
fn line() -> (Graph, Arc<BaseIndex>, [Draft; 4]) {
    let a1 = Draft::new(ANNA, 1, 1, &[]);
    let b1 = Draft::new(BEN, 1, 2, &[&a1.change()]);
    let a2 = Draft::new(ANNA, 2, 3, &[&b1.change()]);
    let b2 = Draft::new(BEN, 2, 4, &[&a2.change()]);
    let drafts = [a1, b1, a2, b2];
    let mut graph = Graph::new();
    for draft in &drafts {
        assert!(matches!(offer(&mut graph, draft), Ingested::Staged(_)));
    }
    graph.advance_durable(4);
    let (summary, entries) = graph.summarise(4);
    let index = Arc::new(BaseIndex::default().extended(entries.into_iter()));
    graph.rebase(summary);
    (graph, index, drafts)
}

fn offer(graph: &mut Graph, draft: &Draft) -> Ingested {
    graph.ingest(draft.change(), &Limits::default()).expect("an honest change")
}

#[test]
fn an_author_who_names_the_heads_and_their_own_last_change_needs_no_index() {
    let (mut graph, _, [_, _, a2, b2]) = line();
    // As stock Automerge writes it: Anna's last change is no head, and is named all the same.
    let next = Draft::new(ANNA, 3, 5, &[&a2.change(), &b2.change()]).overwriting(BEN, 4);
    assert_eq!(offer(&mut graph, &next), Ingested::Staged(4..5));
    graph.advance_durable(5);
    assert_eq!(graph.heads(), [next.change().hash]);
}

#[test]
fn a_change_that_builds_on_the_inside_asks_for_the_index_and_is_judged_by_it() {
    let (mut graph, index, [a1, b1, ..]) = line();
    let branch = Draft::new(CARL, 1, 3, &[&b1.change()]).overwriting(ANNA, 1);
    assert_eq!(offer(&mut graph, &branch), Ingested::NeedsIndex);
    assert_eq!((graph.change_count(), graph.pending_count()), (4, 0));
    graph.attach_index(index);
    // Ben is not among the ancestors of what builds on Anna's first change.
    let stranger = Draft::new(CARL, 1, 3, &[&a1.change()]).overwriting(BEN, 2);
    graph.ingest(stranger.change(), &Limits::default()).expect_err("an unknown author");
    assert_eq!(offer(&mut graph, &branch), Ingested::Staged(4..5));
    graph.detach_index();
    // What builds on the tail needs it no more.
    let on_top = Draft::new(CARL, 2, 4, &[&branch.change()]);
    assert_eq!(offer(&mut graph, &on_top), Ingested::Staged(5..6));
}

#[test]
fn a_change_of_the_tail_reaches_no_more_of_a_new_base_than_it_descends_from() {
    let mut graph = Graph::new();
    let root = Draft::new(ANNA, 1, 1, &[]);
    let left = Draft::new(BEN, 1, 2, &[&root.change()]);
    let right = Draft::new(CARL, 1, 2, &[&root.change()]);
    let on_left = Draft::new(ANNA, 2, 3, &[&left.change()]);
    for draft in [&root, &left, &right, &on_left] {
        assert!(matches!(offer(&mut graph, draft), Ingested::Staged(_)));
    }
    graph.advance_durable(4);
    let (summary, entries) = graph.summarise(3);
    graph.rebase(summary);
    // Carl's change is in the base, which the tail covers by half.
    let without_own = Draft::new(CARL, 2, 4, &[&on_left.change()]);
    assert_eq!(offer(&mut graph, &without_own), Ingested::NeedsIndex);
    graph.attach_index(Arc::new(BaseIndex::default().extended(entries.into_iter())));
    let refused = graph.ingest(without_own.change(), &Limits::default());
    assert_eq!(refused, Err(Refusal::PreviousNotAncestor));
    let with_own = Draft::new(CARL, 2, 4, &[&on_left.change(), &right.change()]);
    assert_eq!(offer(&mut graph, &with_own), Ingested::Staged(4..5));
}

#[test]
fn what_is_in_the_base_is_known_or_asked_for() {
    let (mut graph, index, drafts) = line();
    let ingested: Vec<Ingested> = drafts.iter().map(|draft| offer(&mut graph, draft)).collect();
    // The last changes of both authors are known without the index.
    let (asked, known) = (Ingested::NeedsIndex, Ingested::Known);
    assert_eq!(ingested, [asked.clone(), asked, known.clone(), known.clone()]);
    graph.attach_index(index);
    assert!(drafts.iter().all(|draft| offer(&mut graph, draft) == known));
}

#[test]
fn a_change_for_which_others_wait_asks_for_the_index_they_need() {
    let (mut graph, index, [_, b1, _, b2]) = line();
    let missing = Draft::new(CARL, 1, 5, &[&b2.change()]);
    let child = Draft::new(7, 1, 6, &[&missing.change(), &b1.change()]);
    graph.attach_index(index.clone());
    assert_eq!(offer(&mut graph, &child), Ingested::Pending);
    graph.detach_index();
    assert_eq!(offer(&mut graph, &missing), Ingested::NeedsIndex);
    assert_eq!((graph.change_count(), graph.pending_count()), (4, 1));
    graph.attach_index(index);
    assert_eq!(offer(&mut graph, &missing), Ingested::Staged(4..6));
    assert_eq!(graph.pending_count(), 0);
}

#[test]
fn an_author_whose_first_change_was_rolled_back_leaves_no_gap_in_a_base() {
    let mut graph = Graph::new();
    let lost = Draft::new(ANNA, 1, 1, &[]);
    offer(&mut graph, &lost);
    graph.roll_back_staged();
    assert_eq!((graph.change_count(), graph.tail_bytes()), (0, 0));
    let kept = Draft::new(BEN, 1, 1, &[]);
    assert_eq!(offer(&mut graph, &kept), Ingested::Staged(0..1));
    graph.advance_durable(1);
    let (summary, entries) = graph.summarise(1);
    assert_eq!((summary.actors.len(), entries[0].actor), (1, 0));
    assert_eq!(summary.actors[0].id, kept.change().actor);
    assert_eq!(offer(&mut graph, &lost), Ingested::Staged(1..2));
}

#[test]
fn damaged_records_are_errors() {
    let (graph, index, _) = line();
    let (summary, _) = graph.summarise(4);
    assert_eq!(BaseSummary::decode(&summary.encode()), Ok(summary.clone()));
    assert_eq!(BaseIndex::decode(&index.encode()).as_ref(), Ok(&*index));
    for bytes in [summary.encode(), index.encode()] {
        for end in 0..bytes.len() {
            assert!(BaseSummary::decode(&bytes[..end]).is_err() && BaseIndex::decode(&bytes[..end]).is_err());
        }
        for at in 0..bytes.len() {
            // Whatever comes out, nothing panics.
            let mut damaged = bytes.to_vec();
            damaged[at] ^= 0xff;
            let _ = (BaseSummary::decode(&damaged), BaseIndex::decode(&damaged));
        }
    }
}
