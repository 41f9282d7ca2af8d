//! What no honest client sends: refused at the door, named in a metric, never stored, never relayed, and nobody else
//! notices.

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT};
use bytes::Bytes;
use isobar::storage::Storage;
use isobar::storage::memory::MemoryStorage;
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId};
use isobar_protocol::sync_message::{Have, SyncMessage, SyncVersion};
use isobar_protocol::wire::{self, PeerMetadata};
use tokio_tungstenite::tungstenite::Message;

use crate::draft::*;
use crate::support::{Client, Ended, Heard, Node, document_id, eventually, number, put, settings};

/// The code with which the server closes on a client that broke the protocol.
const POLICY: u16 = 1008;

/// A document with an author and a reader, another document with its author, and somebody who means harm.
struct Scene {
    store: MemoryStorage,
    node: Node,
    document: DocumentId,
    author: Client,
    reader: Client,
    elsewhere: Client,
    attacker: Client,
}

impl Scene {
    async fn new() -> Self {
        Self::on(Node::start_with).await
    }

    async fn on<F: Future<Output = Node>>(
        start: impl FnOnce(isobar::config::Settings, MemoryStorage) -> F,
    ) -> Self {
        let store = MemoryStorage::new();
        let node = start(settings(), store.reopen()).await;
        let document = document_id("the document");
        let mut author = Client::join(node.clients, "author").await;
        let mut doc = AutoCommit::new().with_actor([1; 16].into());
        for value in 0..3 {
            put(&mut doc, "edits", value);
        }
        author.share(&document, doc).await;
        author.in_step(&document).await;
        let mut reader = Client::join(node.clients, "reader").await;
        reader.fetch(&document).await;
        let mut elsewhere = Client::join(node.clients, "elsewhere").await;
        let other = document_id("another document");
        elsewhere.share(&other, AutoCommit::new()).await;
        elsewhere.write(&other, |doc| put(doc, "edits", 0)).await;
        let attacker = Client::join(node.clients, "attacker").await;
        Self { store, node, document, author, reader, elsewhere, attacker }
    }

    fn heads(&mut self) -> Vec<ChangeHash> {
        let document = self.document.clone();
        self.author.open(&document).heads()
    }

    /// A change that anybody could append, for a test to spoil.
    fn draft(&mut self) -> Draft {
        let deps = self.heads().into_iter().map(|head| head.0).collect();
        Draft { deps, actor: vec![7; 16], seq: 1, start_op: 4, ..Draft::honest() }
    }

    async fn offer(&mut self, changes: Vec<Vec<u8>>) {
        let heads = self.heads();
        let changes = changes.into_iter().map(Bytes::from).collect();
        self.attacker.offer(&self.document, heads, changes).await;
    }

    /// Offers these changes and asserts that they are refused for this reason.
    async fn assert_refused(mut self, reason: &str, changes: Vec<Vec<u8>>) {
        assert_eq!(self.node.refused(reason).await, 0.0);
        self.offer(changes).await;
        self.assert_attacker_is_gone(reason).await;
        self.assert_nobody_noticed().await;
    }

    async fn assert_attacker_is_gone(&mut self, reason: &str) {
        let ended = self.attacker.ended().await;
        assert_eq!(ended.code, POLICY, "{ended:?}");
        assert!(ended.error.as_ref().is_some_and(|error| !error.is_empty()), "{ended:?}");
        assert_eq!(self.node.refused(reason).await, 1.0, "{ended:?}");
    }

    /// Everybody else carries on, and nobody has or ever gets what was refused.
    async fn assert_nobody_noticed(self) {
        let Self { store, node, document, mut author, mut reader, mut elsewhere, attacker } = self;
        elsewhere.write(&document_id("another document"), |doc| put(doc, "edits", 1)).await;
        author.write(&document, |doc| put(doc, "edits", 100)).await;
        reader
            .until("the reader has the edit", |reader| {
                number(&reader.open(&document).doc, "edits") == Some(100)
            })
            .await;
        let honest = hashes(&mut author.open(&document).doc);
        assert_eq!(hashes(&mut reader.open(&document).doc), honest, "only honest changes were relayed");
        reader.write(&document, |doc| put(doc, "reader", 1)).await;
        author
            .until("the author has the reader's edit", |author| {
                number(&author.open(&document).doc, "reader") == Some(1)
            })
            .await;
        let honest = hashes(&mut author.open(&document).doc);
        drop((author, reader, elsewhere, attacker));
        node.stop().await.unwrap();

        let stored = store.reopen().load_document(&document).await.unwrap().unwrap();
        let mut tail: Vec<[u8; 32]> = stored.tail.iter().map(|change| change.hash.0).collect();
        tail.sort_unstable();
        assert_eq!(tail, honest, "only honest changes were stored");
        assert_eq!(store.reopen().statistics().await.unwrap().documents, 2);

        let node = Node::start(store.reopen()).await;
        let mut cold = Client::join(node.clients, "cold").await;
        cold.fetch(&document).await;
        assert_eq!(hashes(&mut cold.open(&document).doc), honest);
        assert_eq!(node.metric("isobar_documents_quarantined_total").await, 0.0);
    }
}

/// All changes of a document, in ascending order.
fn hashes(doc: &mut AutoCommit) -> Vec<[u8; 32]> {
    let mut all: Vec<[u8; 32]> = doc.get_changes(&[]).iter().map(|change| change.hash().0).collect();
    all.sort_unstable();
    all
}

fn sealed(draft: &Draft) -> Vec<u8> {
    sealed_as(1, &draft.data())
}

fn long(count: i64) -> Vec<u8> {
    let mut rest = count;
    let mut out = Vec::new();
    while rest >= 0x40 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
    out
}

/// A chunk around what an automerge document is saved as, after a change to its contents.
fn respoilt(mut saved: Vec<u8>, spoil: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let length_at = 9;
    let header = length_at + saved[length_at..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
    let mut data = saved.split_off(header);
    spoil(&mut data);
    sealed_as(saved[8], &data)
}

#[tokio::test]
async fn the_change_that_the_tests_spoil_is_taken_and_relayed_when_it_is_whole() {
    let mut scene = Scene::new().await;
    let draft = scene.draft();
    scene.offer(vec![sealed(&draft)]).await;
    let document = scene.document.clone();
    scene.reader.until("the change", |reader| number(&reader.open(&document).doc, "b") == Some(2)).await;
    assert_eq!(scene.node.metric("isobar_committed_changes_total").await, 5.0);
}

#[tokio::test]
async fn a_first_seq_other_than_one_is_refused() {
    let mut scene = Scene::new().await;
    let draft = Draft { seq: 2, ..scene.draft() };
    scene.assert_refused("seq_gap", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn a_gap_in_an_authors_seqs_is_refused() {
    let mut scene = Scene::new().await;
    let draft = Draft { actor: vec![1; 16], seq: 5, ..scene.draft() };
    scene.assert_refused("seq_gap", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn a_change_that_forgets_its_authors_last_is_refused() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let first = scene.author.open(&document).doc.get_changes(&[])[0].hash().0;
    let draft = Draft { deps: vec![first], actor: vec![1; 16], seq: 4, ..scene.draft() };
    scene.assert_refused("previous_not_ancestor", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn an_operation_that_names_an_unknown_actor_is_refused() {
    let mut scene = Scene::new().await;
    let draft = scene.draft().with_others(&[&[3]]).with_predecessors(&[2, 1], &[0x7e, 1, 0]);
    scene.assert_refused("unknown_actor", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn operations_that_start_where_a_dependency_stands_are_refused() {
    let mut scene = Scene::new().await;
    let draft = Draft { start_op: 3, ..scene.draft() };
    scene.assert_refused("start_op_too_low", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn operations_that_would_use_the_counter_up_are_refused() {
    let mut scene = Scene::new().await;
    let draft = Draft { start_op: 4_000_000_000, ..scene.draft() };
    scene.assert_refused("counter_too_large", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn operations_that_jump_ahead_are_refused() {
    let mut scene = Scene::new().await;
    let draft = Draft { start_op: 2_000_000_000, ..scene.draft() };
    scene.assert_refused("start_op_too_high", vec![sealed(&draft)]).await;
}

#[tokio::test]
async fn a_seq_used_twice_is_not_taken_and_its_sender_keeps_reading() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let deps = scene.author.open(&document).doc.get_changes(&[])[0].hash().0;
    let draft = Draft { deps: vec![deps], actor: vec![1; 16], seq: 2, start_op: 2, ..scene.draft() };
    let twin = sealed(&draft);
    scene.attacker.documents.entry(document.clone()).or_default();
    scene.offer(vec![twin]).await;
    // It still has its connection, and this document's later changes as well as its other documents.
    let own = document_id("another document");
    scene.attacker.fetch(&own).await;
    assert_eq!(scene.node.refused("seq_reused").await, 1.0);
    scene.author.write(&document, |doc| put(doc, "edits", 50)).await;
    scene
        .attacker
        .until("later edits are relayed to it", |attacker| {
            number(&attacker.open(&document).doc, "edits") == Some(50)
        })
        .await;
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_small_change_that_claims_millions_of_operations_is_refused() {
    let mut scene = Scene::new().await;
    let millions = long(20_000_000);
    let column = |value: u8| [&millions[..], &[value]].concat();
    let bomb = scene
        .draft()
        .with(KEY_TEXT, &[&millions[..], &[1, b'a']].concat())
        .with(INSERT, &[0x80, 0xda, 0xc4, 0x09])
        .with(ACTION, &column(1))
        .with(VALUE_TYPE, &column(0))
        .with(VALUE, &[])
        .with(PREDECESSORS, &column(0));
    let bomb = sealed(&bomb);
    assert!(bomb.len() < 250);
    scene.assert_refused("too_many_operations", vec![bomb]).await;
}

#[tokio::test]
async fn a_compressed_change_that_inflates_beyond_the_limit_is_refused() {
    let scene = Scene::new().await;
    let deflated = miniz_oxide::deflate::compress_to_vec(&vec![0; 256 << 20], 1);
    assert!(deflated.len() < 4 << 20);
    scene.assert_refused("inflation_too_large", vec![sealed_as(2, &deflated)]).await;
}

#[tokio::test]
async fn a_change_with_a_wrong_checksum_is_refused() {
    let mut scene = Scene::new().await;
    let mut change = sealed(&scene.draft());
    change[5] ^= 1;
    scene.assert_refused("wrong_checksum", vec![change]).await;
}

#[tokio::test]
async fn what_stands_before_a_refused_change_in_the_same_message_is_kept() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let honest = scene.draft();
    let gap = Draft { actor: vec![8; 16], seq: 2, ..scene.draft() };
    scene.offer(vec![sealed(&honest), sealed(&gap)]).await;
    scene.assert_attacker_is_gone("seq_gap").await;
    scene.reader.until("the good change", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    scene.author.until("the good change", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    scene.assert_nobody_noticed().await;
}

/// A change whose author's first change is numbered 2, which shows when its parent is there.
fn spoilt_child_of(parent: &Draft) -> Draft {
    let parent_hash = automerge::Change::from_bytes(sealed(parent)).unwrap().hash().0;
    Draft { deps: vec![parent_hash], actor: vec![8; 16], seq: 2, start_op: 6, ..Draft::honest() }
}

#[tokio::test]
async fn a_spoilt_change_does_not_slip_in_before_what_it_depends_on() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let parent = scene.draft();
    scene.offer(vec![sealed(&spoilt_child_of(&parent)), sealed(&parent)]).await;
    scene.reader.until("the parent", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    scene.author.until("the parent", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    scene.assert_attacker_is_gone("seq_gap").await;
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_spoilt_change_that_waited_is_refused_when_another_client_brings_its_parent() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let parent = scene.draft();
    scene.offer(vec![sealed(&spoilt_child_of(&parent))]).await;
    eventually("it waits", async || scene.node.metric("isobar_pending_changes").await == 1.0).await;
    assert_eq!(scene.node.refused("seq_gap").await, 0.0);
    let mut honest = Client::join(scene.node.clients, "honest").await;
    let heads = scene.heads();
    honest.offer(&document, heads, vec![sealed(&parent).into()]).await;
    scene.reader.until("the parent", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    scene.author.until("the parent", |it| number(&it.open(&document).doc, "b") == Some(2)).await;
    assert_eq!(scene.node.refused("seq_gap").await, 1.0);
    honest.ephemeral(&document, 1, b"still here").await;
    while !matches!(scene.reader.hear().await, Heard::Ephemeral { .. }) {}
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_flood_of_changes_without_their_dependencies_is_refused() {
    let scene = Scene::new().await;
    let orphans = (0..20_u8).map(|author| {
        let mut doc = AutoCommit::new().with_actor([100 + author; 16].into());
        put(&mut doc, "first", 1);
        doc.put(ROOT, "large", "x".repeat(1 << 20)).unwrap();
        doc.commit();
        doc.get_changes(&[])[1].raw_bytes().to_vec()
    });
    let orphans = orphans.collect();
    scene.assert_refused("pending_full", orphans).await;
}

#[tokio::test]
async fn a_damaged_document_chunk_is_refused() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    let mut saved = scene.author.open(&document).doc.save();
    let last = saved.len() - 1;
    saved[last] ^= 1;
    scene.assert_refused("document_refused", vec![saved]).await;
}

#[tokio::test]
async fn a_document_chunk_that_automerge_refuses_is_refused() {
    let mut scene = Scene::new().await;
    let document = scene.document.clone();
    // The checksum is right, the hash of the head is not.
    let head_at = 1 + 17 + 1;
    let saved = respoilt(scene.author.open(&document).doc.save(), |data| data[head_at] ^= 1);
    scene.assert_refused("document_does_not_apply", vec![saved]).await;
}

#[tokio::test]
async fn a_document_chunk_that_claims_millions_of_operations_is_refused() {
    let scene = Scene::new().await;
    // No actors, no heads, no changes; one column of operations, which claims 10^9 of them.
    let runs = [long(1_000_000_000), vec![1]].concat();
    let data = [&[0, 0, 0, 1, 66, runs.len() as u8][..], &runs].concat();
    scene.assert_refused("document_refused", vec![sealed_as(0, &data)]).await;
}

#[tokio::test]
async fn a_document_chunk_that_inflates_beyond_the_limit_is_refused() {
    let scene = Scene::new().await;
    let column = miniz_oxide::deflate::compress_to_vec(&vec![0; 300 << 20], 1);
    let mut data = vec![0, 0, 0, 1, 66 | 8];
    let mut length = column.len();
    while length >= 0x80 {
        data.push(length as u8 | 0x80);
        length >>= 7;
    }
    data.push(length as u8);
    data.extend_from_slice(&column);
    scene.assert_refused("document_refused", vec![sealed_as(0, &data)]).await;
}

#[tokio::test]
async fn bytes_that_are_no_chunk_are_refused() {
    let scene = Scene::new().await;
    scene.assert_refused("malformed_chunk", vec![vec![0x55; 40]]).await;
}

/// A message in version 1 with one Bloom filter of these bytes.
fn with_filter(filter: &[u8]) -> Vec<u8> {
    [&[0x42, 0, 0, 1, 0, filter.len() as u8], filter, &[0]].concat()
}

async fn assert_message_refused(data: &[u8]) {
    let mut scene = Scene::new().await;
    let frame = scene.attacker.sync_frame(&scene.document, data);
    scene.attacker.send_raw(frame).await;
    scene.assert_attacker_is_gone("malformed_sync_message").await;
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_bloom_filter_without_bits_is_refused() {
    assert_message_refused(&with_filter(&[1, 0, 7])).await;
}

#[tokio::test]
async fn a_bloom_filter_with_millions_of_probes_is_refused() {
    assert_message_refused(&with_filter(&[1, 10, 0x80, 0x80, 0x80, 0x80, 0x01, 0xff, 0xff])).await;
}

#[tokio::test]
async fn a_sync_message_of_an_unknown_version_is_refused() {
    assert_message_refused(&[0x44, 0, 0, 0, 0]).await;
}

#[tokio::test]
async fn a_sync_message_that_claims_more_hashes_than_it_has_is_refused() {
    assert_message_refused(&[0x42, 0xff, 0xff, 0xff, 0xff, 0x0f]).await;
}

#[tokio::test]
async fn a_sync_message_cut_short_anywhere_is_refused() {
    let mut scene = Scene::new().await;
    let message = SyncMessage {
        version: SyncVersion::V1,
        heads: scene.heads(),
        need: vec![ChangeHash([9; 32])],
        have: vec![Have::default()],
        changes: vec![sealed(&scene.draft()).into()],
        flags: None,
    };
    let whole = message.encode();
    let cuts: Vec<usize> = (0..whole.len()).step_by(11).chain([whole.len() - 1]).collect();
    for cut in &cuts {
        let mut attacker = Client::join(scene.node.clients, "another attacker").await;
        attacker.send_raw(attacker.sync_frame(&scene.document, &whole[..*cut])).await;
        assert_eq!(attacker.ended().await.code, POLICY, "cut at {cut}");
    }
    assert_eq!(scene.node.refused("malformed_sync_message").await, cuts.len() as f64);
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_frame_cut_short_anywhere_is_refused() {
    let mut scene = Scene::new().await;
    let whole = scene.attacker.sync_frame(&scene.document, &[0x42, 0, 0, 0, 0]);
    let cuts: Vec<usize> = (0..whole.len()).step_by(11).chain([whole.len() - 1]).collect();
    for cut in &cuts {
        let mut attacker = Client::join(scene.node.clients, "another attacker").await;
        attacker.send_raw(whole[..*cut].to_vec()).await;
        assert_eq!(attacker.ended().await.code, POLICY, "cut at {cut}");
    }
    assert_eq!(scene.node.refused("malformed_frame").await, cuts.len() as f64);
    // The whole frame is in order.
    scene.attacker.send_raw(whole).await;
    let document = scene.document.clone();
    scene.attacker.documents.entry(document.clone()).or_default();
    scene.attacker.in_step(&document).await;
    scene.assert_nobody_noticed().await;
}

async fn assert_frame_refused(reason: &str, frame: Message) {
    let mut scene = Scene::new().await;
    scene.attacker.send(frame).await;
    scene.assert_attacker_is_gone(reason).await;
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn what_is_not_cbor_is_refused() {
    assert_frame_refused("malformed_frame", Message::Binary(vec![0xff; 20].into())).await;
}

#[tokio::test]
async fn nesting_without_end_is_refused() {
    let mut frame = vec![0xa1, 0x61, b'x'];
    frame.resize(1 << 20, 0x81);
    assert_frame_refused("malformed_frame", Message::Binary(frame.into())).await;
}

#[tokio::test]
async fn a_text_frame_is_refused() {
    assert_frame_refused("text_frame", Message::Text("{\"type\":\"sync\"}".into())).await;
}

#[tokio::test]
async fn a_second_join_is_refused() {
    let join = wire::encode_join(&PeerId::new("attacker").unwrap(), &PeerMetadata::default());
    assert_frame_refused("second_join", Message::Binary(join.into())).await;
}

#[tokio::test]
async fn an_endless_session_id_is_refused() {
    let id = PeerId::new("attacker").unwrap();
    let document = document_id("the document");
    let frame = wire::encode_ephemeral("attacker", &id, &document, &"s".repeat(1 << 20), 1, &[1]);
    assert_frame_refused("malformed_frame", Message::Binary(frame.into())).await;
}

#[tokio::test]
async fn a_frame_beyond_the_limit_is_refused() {
    let mut scene = Scene::on(|mut settings, store| {
        settings.frame_bytes_max = 64 << 10;
        Node::start_with(settings, store)
    })
    .await;
    scene.attacker.try_send_raw(vec![0; (64 << 10) + 1]).await;
    scene.assert_attacker_is_gone("frame_too_large").await;
    scene.assert_nobody_noticed().await;
}

#[tokio::test]
async fn a_frame_far_beyond_the_limit_is_refused_before_it_has_come() {
    let mut scene = Scene::on(|mut settings, store| {
        settings.frame_bytes_max = 64 << 10;
        Node::start_with(settings, store)
    })
    .await;
    scene.attacker.try_send_raw(vec![0; 32 << 20]).await;
    // It may be cut off while it is still sending.
    let ended = scene.attacker.ended().await;
    assert!([0, POLICY].contains(&ended.code), "{ended:?}");
    assert_eq!(scene.node.refused("frame_too_large").await, 1.0);
    scene.assert_nobody_noticed().await;
}

async fn assert_first_frame_refused(reason: &str, frame: Message) -> Ended {
    let scene = Scene::new().await;
    let mut stranger = Client::connect(scene.node.clients).await;
    stranger.send(frame).await;
    let ended = stranger.ended().await;
    assert_eq!(ended.code, POLICY, "{ended:?}");
    assert_eq!(scene.node.refused(reason).await, 1.0, "{ended:?}");
    scene.assert_nobody_noticed().await;
    ended
}

#[tokio::test]
async fn a_first_frame_that_is_no_join_is_refused() {
    let id = PeerId::new("stranger").unwrap();
    let frame = wire::encode_sync(false, &id, &id, &document_id("the document"), &[0x42, 0, 0, 0, 0]);
    assert_first_frame_refused("no_join", Message::Binary(frame.into())).await;
}

#[tokio::test]
async fn a_first_frame_that_is_no_cbor_is_refused() {
    assert_first_frame_refused("malformed_frame", Message::Binary(vec![1].into())).await;
}

#[tokio::test]
async fn a_first_frame_of_text_is_refused() {
    assert_first_frame_refused("text_frame", Message::Text("hello".into())).await;
}

#[tokio::test]
async fn a_version_that_does_not_exist_is_refused_by_name() {
    let mut join = wire::encode_join(&PeerId::new("stranger").unwrap(), &PeerMetadata::default());
    // The only "1" of one character is the version.
    let at = join.windows(2).rposition(|pair| pair == [0x61, b'1']).unwrap();
    join[at + 1] = b'2';
    let ended = assert_first_frame_refused("unsupported_version", Message::Binary(join.into())).await;
    assert_eq!(ended.error.as_deref(), Some("unsupported protocol version"));
}
