//! A recorded editing session, edit by edit: 259,778 keystrokes of one person writing a paper.
//!
//! Each edit is a change of its own, as an editor makes it. A client that speaks the standard protocol pushes them
//! through a running region in messages of 1 to 64; the server is killed; and an Automerge document that starts
//! empty reads them back.
//!
//! `ISOBAR_TRACE_DATA` names the folder that holds the recording, `automerge-paper.json.gz` of the public editing
//! traces. Without it these tests say so and do nothing.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use automerge::sync::{self, BloomFilter, Have, MessageFlags, MessageVersion, SyncDoc};
use automerge::{AutoCommit, ChangeHash, ROOT, ReadDoc};
use futures_util::{SinkExt, StreamExt};
use isobar_protocol::ids::{DocumentId, PeerId};
use isobar_protocol::wire::{self, ClientFrame, PeerFrame, PeerMetadata};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use crate::recording::{Recording, TEXT};
use crate::region::{Kind, Region};

/// Changes that may wait for their acknowledgement; about what an editor gathers in a minute without network.
const UNACKNOWLEDGED_MAX: usize = 1_024;

/// Messages bring 1, 2, … and at most this many changes, over and over.
const MESSAGE_CHANGES_MAX: usize = 64;

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

/// Pushes changes that stand in a row, each depending on the one before.
struct Writer<'a> {
    client: Client,
    changes: &'a [automerge::Change],
    position_of: HashMap<ChangeHash, usize>,
    sent: usize,
    acknowledged: usize,
}

impl Writer<'_> {
    /// Sends everything and waits until all of it is acknowledged.
    async fn push(&mut self) {
        // Before anything is sent, both sides say what they have, as stock clients do.
        self.client.send(false, self.message(0..0)).await;
        self.take_answer().await;
        let sizes = (1..=MESSAGE_CHANGES_MAX).cycle();
        for size in sizes {
            let next = self.sent..self.changes.len().min(self.sent + size);
            if next.is_empty() {
                break;
            }
            let message = self.message(next.clone());
            self.client.send(false, message).await;
            self.sent = next.end;
            while self.sent - self.acknowledged > UNACKNOWLEDGED_MAX {
                self.take_answer().await;
            }
        }
        while self.acknowledged < self.changes.len() {
            self.take_answer().await;
        }
    }

    async fn take_answer(&mut self) {
        let answer = self.client.receive().await;
        assert!(answer.changes.is_empty(), "the only writer lacks nothing");
        for head in answer.heads {
            let position = *self.position_of.get(&head).expect("the server has only what was sent");
            assert!(position < self.sent, "a change is acknowledged that was not sent yet");
            assert!(position >= self.acknowledged.saturating_sub(1), "acknowledged heads never go back");
            self.acknowledged = position + 1;
        }
    }

    /// What an automerge document with the changes up to the end of `changes` says, bringing these.
    fn message(&self, changes: std::ops::Range<usize>) -> sync::Message {
        let had = changes.end.max(1);
        let last_sync = self.acknowledged.checked_sub(1).map(|at| self.changes[at].hash());
        let unacknowledged = self.changes[self.acknowledged..had].iter();
        sync::Message {
            heads: vec![self.changes[had - 1].hash()],
            need: Vec::new(),
            have: vec![Have {
                last_sync: last_sync.into_iter().collect(),
                bloom: BloomFilter::from_hashes(unacknowledged.map(automerge::Change::hash)),
            }],
            changes: self.changes[changes]
                .iter()
                .map(|it| it.raw_bytes().to_vec())
                .collect::<Vec<_>>()
                .into(),
            flags: Some(MessageFlags::new()),
            version: MessageVersion::V1,
        }
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
    let begun = Instant::now();
    let changes = recording.changes();
    let made = begun.elapsed();

    let mut region = Region::start(kind).await;
    let document = DocumentId::from_slice(uuid::Uuid::new_v4().as_bytes()).unwrap();
    let mut writer = Writer {
        client: Client::join(&region, "writer", &document).await,
        changes: &changes,
        position_of: changes.iter().enumerate().map(|(at, change)| (change.hash(), at)).collect(),
        sent: 0,
        acknowledged: 0,
    };
    let begun = Instant::now();
    writer.push().await;
    let pushed = begun.elapsed();
    drop(writer);
    let written = region.resident_bytes();

    // Everything was acknowledged, so a crash at this moment loses nothing.
    region.crash();
    let head = changes.last().expect("there are changes").hash();
    let begun = Instant::now();
    let mut copy = read_cold(&region, &document, head).await;
    let read = begun.elapsed();
    let (_, text) = copy.get(ROOT, TEXT).unwrap().expect("the document has a text");
    assert!(copy.text(&text).unwrap() == recording.text, "the text differs from the recording's");
    assert_eq!(copy.get_changes_meta(&[]).len(), changes.len());

    let bytes: usize = changes.iter().map(|change| change.raw_bytes().len()).sum();
    println!(
        "{kind:?}: {} changes of {:.1} MiB made in {made:.1?}, pushed in {pushed:.1?} ({:.0} changes/s), \
         read cold in {read:.1?}, stored in {:.1} MiB",
        changes.len(),
        mebibytes(bytes as u64),
        changes.len() as f64 / pushed.as_secs_f64(),
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
