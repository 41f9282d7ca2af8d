//! What a session says and what it leaves unsaid, message by message.

#[path = "hostile/drafts.rs"]
#[expect(dead_code, reason = "the tests of hostile changes use all of it")]
mod drafts;

use drafts::Draft;
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::change::Change;
use isobar_protocol::config::{FRUITLESS_REPLIES_MAX, Limits, UNANSWERED_MESSAGES_MAX};
use isobar_protocol::graph::{Graph, Ingested};
use isobar_protocol::ids::ChangeHash;
use isobar_protocol::session::{Reply, SyncSession, span_message};
use isobar_protocol::sync_message::{Have, SyncFlags, SyncMessage, SyncVersion};

/// A document in which one author writes change after change.
struct Document {
    graph: Graph,
    changes: Vec<Change>,
}

impl Document {
    fn new(changes: u64) -> Self {
        let mut document = Self { graph: Graph::new(), changes: Vec::new() };
        (0..changes).for_each(|_| document.write());
        document
    }

    /// One more change, durable.
    fn write(&mut self) {
        self.stage();
        self.graph.advance_durable(self.graph.staged_end());
    }

    fn stage(&mut self) {
        let number = self.changes.len() as u64 + 1;
        let deps: Vec<&Change> = self.changes.last().into_iter().collect();
        let change = Draft::new(1, number, number, &deps).change();
        let staged = self.graph.ingest(change.clone(), &Limits::default());
        assert!(matches!(staged, Ok(Ingested::Staged(_))));
        self.changes.push(change);
    }

    fn reader(&self) -> SyncSession {
        let mut session = SyncSession::new(false);
        session.receive(says(self.graph.heads()), [], &self.graph);
        assert_eq!(span(session.generate(&self.graph)), (self.graph.durable_end(), self.graph.durable_end()));
        session.receive(says(self.graph.heads()), [], &self.graph);
        assert!(session.is_in_step(&self.graph));
        assert!(session.generate(&self.graph).is_none());
        session
    }
}

/// A message of a peer that has these heads, and brings nothing.
fn says(heads: Vec<ChangeHash>) -> SyncMessage {
    let have = vec![Have { last_sync: heads.clone(), bloom: BloomFilter::default() }];
    let flags = Some(SyncFlags::default().with(SyncFlags::SUPPORTS_SYNC_RESET));
    SyncMessage { version: SyncVersion::V2, heads, need: Vec::new(), have, changes: Vec::new(), flags }
}

fn brings(change: &Change) -> SyncMessage {
    SyncMessage { changes: vec![change.bytes.clone()], ..says(vec![change.hash]) }
}

#[track_caller]
fn span(reply: Option<Reply>) -> (u64, u64) {
    match reply {
        Some(Reply::Span { from, to }) => (from, to),
        other => panic!("a span is expected, not {other:?}"),
    }
}

#[test]
fn readers_in_step_all_get_the_same_span_once() {
    let mut document = Document::new(3);
    let mut readers: Vec<SyncSession> = (0..20).map(|_| document.reader()).collect();
    document.write();
    for reader in &mut readers {
        assert!(!reader.is_in_step(&document.graph));
        assert_eq!(span(reader.generate(&document.graph)), (3, 4));
        assert!(reader.generate(&document.graph).is_none(), "said once");
    }
    let message = span_message(&document.graph, 3, 4);
    assert_eq!(message.changes, [document.changes[3].bytes.clone()]);
    assert_eq!(message.heads, [document.changes[3].hash]);
    for reader in &mut readers {
        reader.receive(says(document.graph.heads()), [], &document.graph);
        assert!(reader.is_in_step(&document.graph), "an answer leaves nothing to say");
        assert!(reader.generate(&document.graph).is_none(), "an answer is not answered");
    }
}

#[test]
fn what_happened_meanwhile_goes_into_one_message() {
    let mut document = Document::new(1);
    let mut reader = document.reader();
    (0..5).for_each(|_| document.write());
    assert_eq!(span(reader.generate(&document.graph)), (1, 6));
    // The answer to an older message crosses newer changes and calls for nothing by itself.
    document.write();
    assert_eq!(span(reader.generate(&document.graph)), (6, 7));
    reader.receive(says(vec![document.changes[5].hash]), [], &document.graph);
    assert!(reader.generate(&document.graph).is_none());
}

#[test]
fn what_is_not_durable_is_neither_sent_nor_told() {
    let mut document = Document::new(1);
    let mut reader = document.reader();
    let told = document.graph.heads();
    document.stage();
    assert!(reader.generate(&document.graph).is_none());
    let mut newcomer = SyncSession::new(false);
    newcomer.receive(says(Vec::new()), [], &document.graph);
    assert_eq!(span(newcomer.generate(&document.graph)), (0, 1));
    assert_eq!(span_message(&document.graph, 0, 1).heads, told);
    document.graph.advance_durable(2);
    assert_eq!(span(reader.generate(&document.graph)), (1, 2));
}

#[test]
fn a_writer_gets_an_acknowledgement_when_its_change_is_durable_and_not_the_change() {
    let mut document = Document::new(1);
    let mut writer = document.reader();
    document.stage();
    writer.receive(brings(&document.changes[1]), [1], &document.graph);
    assert!(writer.generate(&document.graph).is_none(), "not before it is durable");
    document.graph.advance_durable(2);
    assert_eq!(span(writer.generate(&document.graph)), (2, 2));
    // What others wrote after it is sent, and only that.
    document.stage();
    writer.receive(brings(&document.changes[2]), [2], &document.graph);
    document.write();
    assert_eq!(span(writer.generate(&document.graph)), (3, 4));
}

#[test]
fn an_acknowledgement_is_not_lost_to_a_message_that_crosses_the_commit() {
    let mut document = Document::new(1);
    let mut writer = document.reader();
    document.stage();
    writer.receive(brings(&document.changes[1]), [1], &document.graph);
    document.graph.advance_durable(2);
    // Sent before the commit, and read before our answer to it: the writer still takes the first change for all
    // that we have.
    let unaware = Have {
        last_sync: vec![document.changes[0].hash],
        bloom: BloomFilter::from_hashes([&document.changes[1].hash].into_iter()),
    };
    writer.receive(SyncMessage { have: vec![unaware], ..says(document.graph.heads()) }, [], &document.graph);
    assert_eq!(span(writer.generate(&document.graph)), (2, 2));
    writer.receive(says(document.graph.heads()), [], &document.graph);
    assert!(writer.generate(&document.graph).is_none(), "told once");
}

#[test]
fn a_change_that_is_durable_already_is_acknowledged_at_once() {
    let mut document = Document::new(1);
    let mut writer = document.reader();
    document.write();
    writer.receive(brings(&document.changes[1]), [1], &document.graph);
    assert_eq!(span(writer.generate(&document.graph)), (2, 2));
    writer.receive(brings(&document.changes[1]), [1], &document.graph);
    assert_eq!(span(writer.generate(&document.graph)), (2, 2));
}

#[test]
fn who_has_it_from_elsewhere_is_not_sent_it() {
    let mut document = Document::new(1);
    let mut reader = document.reader();
    document.write();
    reader.receive(says(document.graph.heads()), [], &document.graph);
    assert!(reader.generate(&document.graph).is_none());
    document.write();
    assert_eq!(span(reader.generate(&document.graph)), (2, 3));
}

#[test]
fn changes_asked_for_by_name_are_sent_even_if_they_are_in_the_base() {
    let mut document = Document::new(6);
    let mut reader = document.reader();
    let asks = |document: &Document, at: usize| SyncMessage {
        need: vec![document.changes[at].hash, ChangeHash([9; 32])],
        ..says(vec![document.changes[5].hash])
    };
    // The heads differ, so that the message is no answer.
    document.write();
    assert_eq!(span(reader.generate(&document.graph)), (6, 7));
    reader.receive(asks(&document, 2), [], &document.graph);
    match reader.generate(&document.graph) {
        Some(Reply::Single { message, with_base: false }) => {
            assert_eq!(message.changes, [document.changes[2].bytes.clone()]);
        }
        other => panic!("one change is expected, not {other:?}"),
    }
    let (summary, _) = document.graph.summarise(4);
    document.graph.rebase(summary);
    let mut reader = SyncSession::new(false);
    reader.receive(asks(&document, 2), [], &document.graph);
    assert!(matches!(reader.generate(&document.graph), Some(Reply::Whole { to: 7 })));
}

#[test]
fn what_builds_on_a_change_that_a_peer_lacks_is_sent_whatever_the_filter_says() {
    let document = Document::new(5);
    let hashes: Vec<ChangeHash> = document.changes.iter().map(|change| change.hash).collect();
    let wrongly = [hashes[0], hashes[2]];
    let have = vec![Have { last_sync: Vec::new(), bloom: BloomFilter::from_hashes(wrongly.iter()) }];
    let mut session = SyncSession::new(false);
    let message = SyncMessage { have, ..says(vec![hashes[0]]) };
    session.receive(message, [], &document.graph);
    match session.generate(&document.graph) {
        Some(Reply::Single { message, with_base: false }) => {
            let missing: Vec<_> = document.changes[1..].iter().map(|change| change.bytes.clone()).collect();
            assert_eq!(message.changes, missing);
        }
        other => panic!("four changes are expected, not {other:?}"),
    }
}

#[test]
fn a_peer_has_the_base_if_its_heads_or_its_filter_say_so() {
    let mut document = Document::new(6);
    let (summary, _) = document.graph.summarise(4);
    document.graph.rebase(summary);
    let base_head = document.changes[3].hash;
    let own = ChangeHash([7; 32]);
    let reply = |heads: &[ChangeHash], last_sync: &[ChangeHash], filter: &[ChangeHash]| {
        let mut session = SyncSession::new(false);
        let bloom = BloomFilter::from_hashes(filter.iter());
        let have = vec![Have { last_sync: last_sync.to_vec(), bloom }];
        session.receive(SyncMessage { have, ..says(heads.to_vec()) }, [], &document.graph);
        session.generate(&document.graph)
    };
    let tail = |reply: Option<Reply>| match reply {
        Some(Reply::Single { message, with_base: false }) => message.changes.len(),
        other => panic!("single changes are expected, not {other:?}"),
    };
    // A head of its own says nothing; what it shares with us, or its filter, does.
    assert!(matches!(reply(&[own], &[], &[own]), Some(Reply::Whole { to: 6 })));
    assert!(matches!(reply(&[own], &[ChangeHash([8; 32])], &[own]), Some(Reply::Whole { to: 6 })));
    assert!(matches!(reply(&[document.changes[1].hash], &[], &[]), Some(Reply::Whole { to: 6 })));
    assert_eq!(tail(reply(&[own], &[], &[own, base_head])), 2);
    assert_eq!(tail(reply(&[own], &[base_head], &[own])), 2);
    assert_eq!(tail(reply(&[document.changes[4].hash], &[], &[])), 1);
}

#[test]
fn heads_that_fall_back_show_a_loss() {
    let document = Document::new(6);
    let mut reader = document.reader();
    reader.receive(says(vec![document.changes[2].hash]), [], &document.graph);
    match reader.generate(&document.graph) {
        Some(Reply::Single { message, .. }) => assert_eq!(message.changes.len(), 3),
        other => panic!("three changes are expected, not {other:?}"),
    }
}

#[test]
fn a_peer_that_resets_is_placed_by_what_it_says_then() {
    let document = Document::new(6);
    let mut reader = document.reader();
    let flags = SyncFlags::default().with(SyncFlags::SYNC_RESET);
    let have = vec![Have { last_sync: vec![document.changes[3].hash], bloom: BloomFilter::default() }];
    // Its heads are where they were; it only wants to be told again.
    let message = SyncMessage { flags: Some(flags), have, ..says(document.graph.heads()) };
    reader.receive(message, [], &document.graph);
    assert_eq!(span(reader.generate(&document.graph)), (6, 6));
}

#[test]
fn a_peer_that_takes_nothing_is_sent_nothing_and_can_give() {
    let mut document = Document::new(3);
    let mut giver = SyncSession::new(false);
    let read_only = Some(SyncFlags::default().with(SyncFlags::READ_ONLY));
    let heads = vec![document.changes[0].hash];
    giver.receive(SyncMessage { flags: read_only, ..says(heads.clone()) }, [], &document.graph);
    let told = |reply: Option<Reply>| match reply {
        Some(Reply::Single { message, with_base: false }) => *message,
        other => panic!("a message of its own is expected, not {other:?}"),
    };
    let message = told(giver.generate(&document.graph));
    assert!(message.changes.is_empty());
    // It sends what is not among the ancestors of this, so it must not be more than it has.
    assert_eq!(message.have, [Have { last_sync: heads.clone(), bloom: BloomFilter::default() }]);
    document.write();
    assert!(told(giver.generate(&document.graph)).changes.is_empty());
    // When it takes changes again, it is sent what it has missed.
    giver.receive(says(heads), [], &document.graph);
    match giver.generate(&document.graph) {
        Some(Reply::Single { message, .. }) => assert_eq!(message.changes.len(), 3),
        other => panic!("three changes are expected, not {other:?}"),
    }
}

#[test]
fn a_session_that_refuses_changes_says_so_and_asks_for_none() {
    let document = Document::new(2);
    let mut session = SyncSession::new(true);
    session.receive(says(vec![ChangeHash([7; 32])]), [], &document.graph);
    match session.generate(&document.graph) {
        Some(Reply::Single { message, .. }) => {
            assert!(message.flags.is_some_and(|flags| flags.contains(SyncFlags::READ_ONLY)));
            assert_eq!((message.need.len(), message.changes.len()), (0, 2));
        }
        other => panic!("a message of its own is expected, not {other:?}"),
    }
    session.receive(says(vec![ChangeHash([7; 32]), document.changes[1].hash]), [], &document.graph);
    assert!(session.generate(&document.graph).is_none(), "nothing is owed");
}

#[test]
fn a_reader_whom_a_base_has_overtaken_gets_the_whole_document() {
    let mut document = Document::new(2);
    let (mut slow, mut quick) = (document.reader(), document.reader());
    (0..4).for_each(|_| document.write());
    assert_eq!(span(quick.generate(&document.graph)), (2, 6));
    let (summary, _) = document.graph.summarise(4);
    document.graph.rebase(summary);
    document.write();
    assert!(matches!(slow.generate(&document.graph), Some(Reply::Whole { to: 7 })));
    assert_eq!(span(quick.generate(&document.graph)), (6, 7));
}

#[test]
fn a_document_that_is_not_here_is_unavailable_once_and_sent_when_it_appears() {
    let mut document = Document::new(0);
    let mut reader = SyncSession::new(false);
    assert!(reader.generate(&document.graph).is_none(), "nobody asked");
    reader.receive(says(Vec::new()), [], &document.graph);
    assert!(matches!(reader.generate(&document.graph), Some(Reply::Unavailable)));
    assert!(reader.generate(&document.graph).is_none());
    document.stage();
    reader.receive(says(Vec::new()), [], &document.graph);
    assert!(reader.generate(&document.graph).is_none(), "about to be available");
    document.graph.advance_durable(1);
    assert_eq!(span(reader.generate(&document.graph)), (0, 1));
}

#[test]
fn a_peer_that_never_applies_is_answered_a_few_times_and_again_when_it_moves() {
    let document = Document::new(3);
    let mut deaf = SyncSession::new(false);
    let replies = (0..50).filter(|_| {
        deaf.receive(says(Vec::new()), [], &document.graph);
        deaf.generate(&document.graph).is_some()
    });
    assert_eq!(replies.count(), 1 + usize::from(FRUITLESS_REPLIES_MAX));
    deaf.receive(says(vec![document.changes[0].hash]), [], &document.graph);
    deaf.receive(says(Vec::new()), [], &document.graph);
    assert_eq!(span(deaf.generate(&document.graph)), (0, 3));
}

#[test]
fn heads_that_were_refused_are_asked_for_once_however_often_they_are_reported() {
    let mut document = Document::new(1);
    let mut session = document.reader();
    let refused = ChangeHash([7; 32]);
    let with_refused = |heads: Vec<ChangeHash>| says([heads, vec![refused]].concat());
    session.receive(with_refused(document.graph.heads()), [], &document.graph);
    assert_eq!(span(session.generate(&document.graph)), (1, 1));
    for end in 2..10 {
        session.receive(with_refused(document.graph.heads()), [], &document.graph);
        assert!(session.generate(&document.graph).is_none());
        document.write();
        assert_eq!(span(session.generate(&document.graph)), (end - 1, end));
    }
}

#[test]
fn a_peer_is_behind_after_some_messages_without_an_answer() {
    let mut document = Document::new(1);
    let mut reader = document.reader();
    for _ in 0..UNANSWERED_MESSAGES_MAX {
        assert!(!reader.is_behind());
        document.write();
        span(reader.generate(&document.graph));
    }
    assert!(reader.is_behind());
    reader.receive(says(document.graph.heads()), [], &document.graph);
    assert!(!reader.is_behind());
}
