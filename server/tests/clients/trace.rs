//! A recorded editing session, edit by edit: 259,778 keystrokes of one person writing a paper.
//!
//! Each edit is a change of its own, as an editor makes it. An Automerge document takes them one by one and syncs with a
//! running region as it sees fit; the server is killed; and another Automerge document, which starts empty, reads them back.
//!
//! `ISOBAR_TRACE_DATA` names the folder that holds the recording, `automerge-paper.json.gz` of the public editing
//! traces. Without it these tests say so and do nothing.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use automerge::sync::{self, SyncDoc};
use automerge::transaction::Transactable;
use automerge::{AutoCommit, ChangeHash, ObjType, ROOT, ReadDoc};
use futures_util::{FutureExt, SinkExt, StreamExt};
use isobar_protocol::ids::{DocumentId, PeerId};
use isobar_protocol::wire::{self, ClientFrame, PeerFrame, PeerMetadata};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use crate::recording::{Recording, TEXT};
use crate::region::{Kind, Region};

/// Stock clients gather what is typed for a moment before they sync. Without that they would be what is slow here: Automerge
/// goes through all it has ever sent whenever it hears of the other side.
const EDITS_PER_SYNC: usize = 400;

/// No answer of the server takes longer, on a busy machine and in a debug build.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// The recording, or `None`, with a line that says so, where there is none.
fn recording() -> Option<Recording> {
    let Some(folder) = std::env::var_os("ISOBAR_TRACE_DATA") else {
        println!("SKIPPED: ISOBAR_TRACE_DATA does not name the folder of automerge-paper.json.gz");
        return None;
    };
    Some(Recording::read(&Path::new(&folder).join("automerge-paper.json.gz")))
}

/// One client on its own connection, with one document.
struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    name: PeerId,
    server: PeerId,
    document: DocumentId,
}

impl Client {
    async fn join(region: &Region, name: &str, document: &DocumentId) -> Self {
        let limits = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (mut socket, _) = connect_async_with_config(region.url(), Some(limits), true).await.unwrap();
        let name = PeerId::new(name).unwrap();
        let metadata = PeerMetadata { is_ephemeral: Some(true), ..PeerMetadata::default() };
        socket.send(Message::binary(wire::encode_join(&name, &metadata))).await.unwrap();
        let answer = socket.next().await.unwrap().unwrap().into_data();
        let server = PeerFrame::decode(&answer).unwrap().expect("a join is answered by peer").sender_id;
        Self { socket, name, server, document: document.clone() }
    }

    async fn send(&mut self, request: bool, message: sync::Message) {
        let frame = wire::encode_sync(request, &self.name, &self.server, &self.document, &message.encode());
        self.socket.send(Message::binary(frame)).await.unwrap();
    }

    /// The next sync message of the server.
    async fn receive(&mut self) -> sync::Message {
        let arrival = async {
            loop {
                let message = self.socket.next().await.expect("the server keeps the connection").unwrap();
                let Message::Binary(frame) = message else { continue };
                match ClientFrame::decode(&frame).unwrap() {
                    ClientFrame::Sync { data, document, .. } => {
                        assert_eq!(document, self.document);
                        break sync::Message::decode(data).unwrap();
                    }
                    ClientFrame::Error { message } => panic!("the server refused: {message}"),
                    other => panic!("the server sent {other:?}"),
                }
            }
        };
        tokio::time::timeout(ANSWER_WITHIN, arrival).await.expect("the server answers in time")
    }
}

/// Types into a document of its own, and has Automerge decide what is sent when.
struct Writer {
    client: Client,
    doc: AutoCommit,
    state: sync::State,
    /// Everything up to this change is acknowledged, by its number.
    acknowledged: usize,
    number_of: HashMap<ChangeHash, usize>,
    messages: usize,
}

impl Writer {
    async fn join(region: &Region, document: &DocumentId) -> Self {
        Self {
            client: Client::join(region, "writer", document).await,
            doc: AutoCommit::new(),
            state: sync::State::new(),
            acknowledged: 0,
            number_of: HashMap::new(),
            messages: 0,
        }
    }

    /// Makes each edit a change, and returns when all of them are acknowledged.
    async fn type_all(&mut self, recording: &Recording) {
        let text = self.doc.put_object(ROOT, TEXT, ObjType::Text).unwrap();
        self.commit();
        for edits in recording.edits.chunks(EDITS_PER_SYNC) {
            for edit in edits {
                edit.apply_to(&mut self.doc, &text);
                self.commit();
            }
            self.say().await;
            while let Some(answer) = self.client.receive().now_or_never() {
                self.take(answer);
            }
        }
        while self.acknowledged < self.number_of.len() {
            let answer = self.client.receive().await;
            self.take(answer);
            self.say().await;
        }
    }

    fn commit(&mut self) {
        let change = self.doc.commit().expect("each edit changes something");
        let number = self.number_of.len() + 1;
        assert_eq!(self.number_of.insert(change, number), None);
    }

    async fn say(&mut self) {
        if let Some(message) = self.doc.sync().generate_sync_message(&mut self.state) {
            self.messages += 1;
            self.client.send(false, message).await;
        }
    }

    fn take(&mut self, answer: sync::Message) {
        assert!(answer.changes.is_empty(), "the only writer lacks nothing");
        for head in &answer.heads {
            let number = *self.number_of.get(head).expect("the server has only what was sent");
            assert!(number >= self.acknowledged, "acknowledged heads never go back");
            self.acknowledged = number;
        }
        self.doc.sync().receive_sync_message(&mut self.state, answer).unwrap();
    }
}

/// Reads the document as a stock client without storage does.
async fn read_cold(region: &Region, document: &DocumentId, expected: ChangeHash) -> AutoCommit {
    let mut client = Client::join(region, "reader", document).await;
    let mut copy = AutoCommit::new();
    let mut state = sync::State::new();
    while copy.get_heads() != [expected] {
        let request = copy.is_empty();
        let message = copy.sync().generate_sync_message(&mut state);
        if let Some(message) = message {
            client.send(request, message).await;
        }
        let message = client.receive().await;
        copy.sync().receive_sync_message(&mut state, message).unwrap();
    }
    copy
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn the_recorded_session_survives_byte_for_byte(kind: Kind) {
    let Some(recording) = recording() else { return };
    let mut region = Region::start(kind).await;
    let document = DocumentId::from_slice(uuid::Uuid::new_v4().as_bytes()).unwrap();
    let mut writer = Writer::join(&region, &document).await;
    let begun = Instant::now();
    writer.type_all(&recording).await;
    let typed = begun.elapsed();
    let written = region.resident_bytes();

    // Everything was acknowledged, so a crash at this moment loses nothing.
    let Writer { mut doc, messages, .. } = writer;
    region.crash();
    let begun = Instant::now();
    let mut copy = read_cold(&region, &document, doc.get_heads()[0]).await;
    let read = begun.elapsed();
    let (_, text) = copy.get(ROOT, TEXT).unwrap().expect("the document has a text");
    assert!(copy.text(&text).unwrap() == recording.text, "the text differs from the recording's");
    let changes = copy.get_changes_meta(&[]).len();
    assert_eq!(changes, recording.edits.len() + 1);

    println!(
        "{kind:?}: {changes} changes typed in {typed:.1?} ({:.0} a second) and sent in {messages} messages, \
         read cold in {read:.1?}, stored in {:.1} MiB",
        changes as f64 / typed.as_secs_f64(),
        mebibytes(region.database.stored_bytes().await),
    );
    for (when, memory) in [("after the writing", written), ("after the reading", region.resident_bytes())] {
        let Some((now, peak)) = memory else { continue };
        println!("{kind:?}: server memory {when} {:.1} MiB, at most {:.1}", mebibytes(now), mebibytes(peak));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recorded_session_survives_on_sqlite() {
    the_recorded_session_survives_byte_for_byte(Kind::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recorded_session_survives_on_postgres() {
    the_recorded_session_survives_byte_for_byte(Kind::Postgres).await;
}
