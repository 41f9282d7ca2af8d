//! Histories contrived to make the door work hard.

use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::config::{ANCESTRY_STEPS_PER_CHANGE, Limits};
use isobar_protocol::graph::{Graph, Ingested, Refusal};

use crate::drafts::Draft;

const LONER: u8 = 251;
const RETURNING: u8 = 200;
const TYPIST: u8 = 250;
const LENGTH: u64 = 2_000;

/// Many authors make a change, one types for long, and then they all come back without naming their own last change:
/// for each, the way back to it is as long as the typing. A change that nobody ever builds on keeps every other from
/// having all that came before it, which would be a short cut.
fn returning_authors() -> Vec<Change> {
    let mut history = vec![Draft::new(LONER, 1, 1, &[]).change()];
    let mut next = |actor: u8, seq: u64| {
        let last = history.last().filter(|_| history.len() > 1);
        let deps: Vec<&Change> = last.into_iter().collect();
        let change = Draft::new(actor, seq, history.len() as u64, &deps).change();
        history.push(change);
    };
    (0..RETURNING).for_each(|actor| next(actor, 1));
    (1..=LENGTH).for_each(|seq| next(TYPIST, seq));
    (0..RETURNING).for_each(|actor| next(actor, 2));
    history
}

#[test]
fn work_is_in_proportion_to_the_history() {
    let history = returning_authors();
    let tight = Limits { ancestry_steps_max: 0, ..Limits::default() };
    let mut graph = Graph::new();
    let results: Vec<_> = history.iter().map(|change| graph.ingest(change.clone(), &tight)).collect();
    let accepted = results.iter().take_while(|it| matches!(it, Ok(Ingested::Staged(_)))).count();
    let came_back = accepted as u64 - 1 - u64::from(RETURNING) - LENGTH;
    let allowed = ANCESTRY_STEPS_PER_CHANGE * history.len() as u64 / LENGTH;
    assert!((1..=allowed).contains(&came_back), "{came_back} came back, the allowance is for {allowed}");
    assert_eq!(results[accepted], Err(Refusal::TooTangled));
    // A change as stock authors make it costs nothing and is accepted still.
    let last = &history[accepted - 1];
    let own = &history[(u64::from(RETURNING) + LENGTH) as usize];
    let ordinary = Draft::new(TYPIST, LENGTH + 1, accepted as u64 + 1, &[last, own]).change();
    assert!(matches!(graph.ingest(ordinary, &tight), Ok(Ingested::Staged(_))));
}

#[test]
fn a_change_that_waits_is_not_dropped_because_others_used_up_the_effort() {
    let history = returning_authors();
    let tight = Limits { ancestry_steps_max: 0, ..Limits::default() };
    let mut graph = Graph::new();
    let accepted = history.iter().take_while(|it| graph.ingest((*it).clone(), &tight).is_ok()).count() as u64;
    let came_back = (accepted - 1 - u64::from(RETURNING) - LENGTH) as u8;
    let last = &history[accepted as usize - 1];
    let typists_last = &history[(u64::from(RETURNING) + LENGTH) as usize];
    let dependency = Draft::new(TYPIST, LENGTH + 1, accepted + 1, &[last, typists_last]).change();
    let waiting = Draft::new(came_back, 2, accepted + 2, &[&dependency]).change();
    let hash = waiting.hash;
    assert_eq!(graph.ingest(waiting, &tight), Ok(Ingested::Pending));
    assert_eq!(graph.ingest(dependency, &tight), Ok(Ingested::Staged(accepted..accepted + 1)));
    assert!(graph.is_pending(&hash), "it may be checked again when the document is loaded");
}

#[test]
fn what_was_accepted_once_is_read_back_without_that_limit() {
    let history = returning_authors();
    for limits in [Limits::default(), Limits { ancestry_steps_max: u64::MAX, ..Limits::default() }] {
        let mut graph = Graph::new();
        for change in &history {
            assert!(matches!(graph.ingest(change.clone(), &limits), Ok(Ingested::Staged(_))));
        }
    }
}

#[test]
fn a_small_change_does_not_keep_the_message_it_came_in() {
    let root = Draft::new(1, 1, 1, &[]);
    let child = Draft::new(2, 1, 2, &[&root.change()]);
    let mut message = vec![0; 1 << 20];
    let mut change = |draft: &Draft| {
        let start = message.len();
        message.extend_from_slice(&draft.bytes());
        start..message.len()
    };
    let (root_at, child_at) = (change(&root), change(&child));
    let message = Bytes::from(message);
    let decode = |at| Change::decode(message.slice(at), &Limits::default()).expect("well-formed");
    let mut graph = Graph::new();
    assert_eq!(graph.ingest(decode(child_at), &Limits::default()), Ok(Ingested::Pending));
    assert!(message.is_unique(), "nothing pending shares it");
    assert_eq!(graph.ingest(decode(root_at), &Limits::default()), Ok(Ingested::Staged(0..2)));
    assert!(message.is_unique(), "nothing staged shares it");
    assert_eq!(graph.bytes_at(0..2), [root.bytes(), child.bytes()]);
}
