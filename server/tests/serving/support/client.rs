//! A standard Automerge peer on a WebSocket, which also sends whatever a test wants it to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use automerge::sync::{Message as AutomergeMessage, State, SyncDoc};
use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT, ReadDoc};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use isobar_protocol::chunk::{ChunkKind, chunks};
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId, StorageId};
use isobar_protocol::sync_message::{Have, SyncFlags, SyncMessage, SyncVersion};
use isobar_protocol::wire::{
    self, ClientFrame, ElsewhereFrame, PeerFrame, PeerMetadata, ReceiptFrame, Saved,
};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

use super::in_time;
use super::line::Line;

/// A document id for a test, by name.
pub fn document_id(name: &str) -> DocumentId {
    DocumentId::from_slice(name.as_bytes()).unwrap()
}

/// Puts a number under a key of the document's root and commits: one change of one operation.
pub fn put(doc: &mut AutoCommit, key: &str, value: i64) {
    doc.put(ROOT, key, value).unwrap();
    doc.commit();
}

/// The number under a key of the document's root.
pub fn number(doc: &AutoCommit, key: &str) -> Option<i64> {
    doc.get(ROOT, key).unwrap().and_then(|(value, _)| value.as_i64())
}

/// A document on a client.
#[derive(Default)]
pub struct Open {
    pub doc: AutoCommit,
    pub state: State,
    /// The heads in the server's last message.
    pub server_heads: Vec<ChangeHash>,
    /// How often the server said that it does not have the document.
    pub unavailable: usize,
    /// Sync messages received: how many changes and whole documents each held.
    pub received: Vec<(usize, usize)>,
}

impl Open {
    pub fn heads(&mut self) -> Vec<ChangeHash> {
        let mut heads: Vec<ChangeHash> =
            self.doc.get_heads().into_iter().map(|head| ChangeHash(head.0)).collect();
        heads.sort_unstable();
        heads
    }

    /// Whether client and server have the same, and the server has said so.
    pub fn in_step(&mut self) -> bool {
        !self.server_heads.is_empty() && self.heads() == self.server_heads
    }
}

/// Something that came from the server, after the client has taken it in.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    Sync { document: DocumentId, heads: Vec<ChangeHash> },
    Unavailable(DocumentId),
    Elsewhere(ElsewhereFrame),
    Ephemeral { sender: String, count: u64, data: Vec<u8> },
    RemoteHeads(DocumentId),
    Receipt(ReceiptFrame),
    Error(String),
    Ping,
    Pong,
    Ended(Ended),
}

/// How a connection ended: the close frame's code and reason; code 0 if there was none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ended {
    pub code: u16,
    pub reason: String,
    /// The text of the error frame before it.
    pub error: Option<String>,
}

pub struct Client {
    pub peer: PeerId,
    pub server: PeerId,
    pub documents: BTreeMap<DocumentId, Open>,
    /// Sends messages without the flags that say that version 2 is understood.
    pub is_old: bool,
    /// The last receipt of each document, by region.
    pub receipts: BTreeMap<(DocumentId, String), Saved>,
    /// What was reported of other storages last.
    pub remote_heads: BTreeMap<(DocumentId, StorageId), Vec<ChangeHash>>,
    /// The presence that came, by sender, in its order.
    pub presence: Vec<(String, u64)>,
    socket: WebSocketStream<Line>,
    error: Option<String>,
}

impl Client {
    /// A connection that has not joined.
    pub async fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).await.expect("the node takes the connection")
    }

    pub async fn try_connect(address: SocketAddr) -> Result<Self, tungstenite::Error> {
        Self::over(address, TcpStream::connect(address).await?).await
    }

    /// A connection that takes little at a time: what is not read soon waits on the server's side.
    pub async fn join_narrowly(address: SocketAddr, name: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let stream = socket.connect(address).await.unwrap();
        let mut client = Self::over(address, stream).await.unwrap();
        client.say_join(name).await;
        client
    }

    async fn over(address: SocketAddr, stream: TcpStream) -> Result<Self, tungstenite::Error> {
        Self::to(&format!("ws://{address}/"), stream).await
    }

    async fn to(url: &str, stream: TcpStream) -> Result<Self, tungstenite::Error> {
        in_time("a WebSocket", async {
            stream.set_nodelay(true)?;
            let (socket, _) = tokio_tungstenite::client_async(url, Line::new(stream)).await?;
            Ok(Self {
                peer: PeerId::new("nobody").unwrap(),
                server: PeerId::new("unknown").unwrap(),
                documents: BTreeMap::new(),
                is_old: false,
                receipts: BTreeMap::new(),
                remote_heads: BTreeMap::new(),
                presence: Vec::new(),
                socket,
                error: None,
            })
        })
        .await
    }

    /// A client that says something in its URL, and announces extras.
    pub async fn join_as(
        address: SocketAddr,
        query: &str,
        name: &str,
        extras: &[&str],
    ) -> Result<Self, tungstenite::Error> {
        let stream = TcpStream::connect(address).await?;
        let mut client = Self::to(&format!("ws://{address}/{query}"), stream).await?;
        let extras = extras.iter().map(|&extra| extra.to_owned()).collect();
        client.say_join_with(name, &PeerMetadata { extras, ..PeerMetadata::default() }).await;
        Ok(client)
    }

    pub async fn join(address: SocketAddr, name: &str) -> Self {
        let mut client = Self::connect(address).await;
        client.say_join(name).await;
        client
    }

    /// From now on the connection brings so many bytes at a time.
    pub fn throttle(&mut self, every: Duration, bytes: usize) {
        self.socket.get_mut().throttle(every, bytes);
    }

    pub async fn say_join(&mut self, name: &str) {
        self.say_join_with(name, &PeerMetadata::default()).await;
    }

    async fn say_join_with(&mut self, name: &str, metadata: &PeerMetadata) {
        self.peer = PeerId::new(name).unwrap();
        self.send_raw(wire::encode_join(&self.peer, metadata)).await;
        let Message::Binary(frame) = self.next_message().await.expect("an answer to the join") else {
            panic!("the answer to a join is binary");
        };
        self.server = PeerFrame::decode(&frame).unwrap().expect("a peer frame").sender_id;
    }

    pub async fn send_raw(&mut self, frame: impl Into<Bytes>) {
        self.send(Message::Binary(frame.into())).await;
    }

    pub async fn send(&mut self, message: Message) {
        in_time("the socket takes a message", self.socket.send(message)).await.unwrap();
    }

    /// As [`Self::send_raw`], for a server that may have hung up already.
    pub async fn try_send_raw(&mut self, frame: impl Into<Bytes>) {
        let _ =
            in_time("the socket takes it or fails", self.socket.send(Message::Binary(frame.into()))).await;
    }

    pub fn sync_frame(&self, document: &DocumentId, data: &[u8]) -> Vec<u8> {
        wire::encode_sync(false, &self.peer, &self.server, document, data)
    }

    /// Sends changes as a peer does that says it has their last.
    pub async fn offer(&mut self, document: &DocumentId, heads: Vec<ChangeHash>, changes: Vec<Bytes>) {
        let message = SyncMessage {
            version: SyncVersion::V2,
            heads,
            need: Vec::new(),
            have: vec![Have::default()],
            changes,
            flags: Some(SyncFlags::default().with(SyncFlags::SUPPORTS_SYNC_RESET)),
        };
        let frame = self.sync_frame(document, &message.encode());
        self.try_send_raw(frame).await;
    }

    pub async fn ephemeral(&mut self, document: &DocumentId, count: u64, data: &[u8]) {
        let frame =
            wire::encode_ephemeral(self.peer.as_str(), &self.server, document, "session", count, data);
        self.send_raw(frame).await;
    }

    pub fn open(&mut self, document: &DocumentId) -> &mut Open {
        self.documents.get_mut(document).expect("the document is open")
    }

    /// Opens a document, and asks the server for it if it is empty.
    pub async fn share(&mut self, document: &DocumentId, doc: AutoCommit) {
        self.documents.insert(document.clone(), Open { doc, ..Open::default() });
        self.speak(document).await;
    }

    /// Asks for a document and waits until it is there, in step with the server.
    pub async fn fetch(&mut self, document: &DocumentId) {
        self.share(document, AutoCommit::new()).await;
        self.in_step(document).await;
    }

    /// Edits and tells the server, as far as Automerge's protocol allows at the moment.
    pub async fn edit(&mut self, document: &DocumentId, edit: impl FnOnce(&mut AutoCommit)) {
        let open = self.open(document);
        edit(&mut open.doc);
        open.doc.commit();
        self.speak(document).await;
    }

    /// Edits and waits for the acknowledgement.
    pub async fn write(&mut self, document: &DocumentId, edit: impl FnOnce(&mut AutoCommit)) {
        self.edit(document, edit).await;
        self.in_step(document).await;
    }

    /// Says what there is to say about a document.
    pub async fn speak(&mut self, document: &DocumentId) {
        let is_old = self.is_old;
        let open = self.open(document);
        let request = open.doc.get_heads().is_empty();
        let Some(mut message) = open.doc.sync().generate_sync_message(&mut open.state) else { return };
        if is_old {
            message.flags = None;
        }
        let frame = wire::encode_sync(request, &self.peer, &self.server, document, &message.encode());
        self.send_raw(frame).await;
    }

    /// Waits until client and server have the same of a document and the server has said so.
    pub async fn in_step(&mut self, document: &DocumentId) {
        self.until("client and server are in step", |client| client.open(document).in_step()).await;
    }

    /// Takes in what comes until a condition holds.
    pub async fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        in_time(what, async {
            while !condition(self) {
                if let Heard::Ended(ended) = self.hear().await {
                    panic!("the connection ended ({ended:?}) before {what}");
                }
            }
        })
        .await;
    }

    /// Waits for the next thing from the server and takes it in: changes are applied and answered.
    pub async fn hear(&mut self) -> Heard {
        match self.next_message().await {
            Some(Message::Binary(frame)) => self.take(&frame).await,
            Some(Message::Ping(_)) => Heard::Ping,
            Some(Message::Pong(_)) => Heard::Pong,
            Some(Message::Close(Some(close))) => Heard::Ended(Ended {
                code: close.code.into(),
                reason: close.reason.as_str().to_owned(),
                error: self.error.take(),
            }),
            Some(Message::Close(None)) | None => {
                Heard::Ended(Ended { error: self.error.take(), ..Ended::default() })
            }
            Some(other) => panic!("the server sent {other:?}"),
        }
    }

    async fn next_message(&mut self) -> Option<Message> {
        match in_time("something from the server", self.socket.next()).await? {
            Err(tungstenite::Error::Capacity(error)) => panic!("the test client's own limits: {error}"),
            message => message.ok(),
        }
    }

    async fn take(&mut self, frame: &[u8]) -> Heard {
        match ClientFrame::decode(frame).expect("the server's frames are well formed") {
            ClientFrame::Sync { document, data, .. } => {
                let heads = self.take_sync(&document, data).await;
                Heard::Sync { document, heads }
            }
            ClientFrame::Unavailable { document, .. } => {
                if let Some(open) = self.documents.get_mut(&document) {
                    open.unavailable += 1;
                }
                Heard::Unavailable(document)
            }
            ClientFrame::Ephemeral { sender_id, count, data, .. } => {
                self.presence.push((sender_id.to_owned(), count));
                Heard::Ephemeral { sender: sender_id.to_owned(), count, data: data.to_vec() }
            }
            ClientFrame::RemoteHeadsChanged { document, heads, .. } => {
                for it in heads {
                    self.remote_heads.insert((document.clone(), it.storage_id), it.heads);
                }
                Heard::RemoteHeads(document)
            }
            ClientFrame::Error { message } => {
                self.error = Some(message.to_owned());
                Heard::Error(message.to_owned())
            }
            other => match (ElsewhereFrame::decode(frame).unwrap(), ReceiptFrame::decode(frame).unwrap()) {
                (Some(elsewhere), _) => Heard::Elsewhere(elsewhere),
                (_, Some(receipt)) => {
                    for it in receipt.saved.iter().cloned() {
                        self.receipts.insert((receipt.document.clone(), it.region.to_string()), it);
                    }
                    Heard::Receipt(receipt)
                }
                _ => panic!("the server sent {other:?}"),
            },
        }
    }

    async fn take_sync(&mut self, document: &DocumentId, data: &[u8]) -> Vec<ChangeHash> {
        let read = SyncMessage::decode(Bytes::copy_from_slice(data)).unwrap();
        let Some(open) = self.documents.get_mut(document) else { return read.heads };
        let mut held = (0, 0);
        for chunk in read.changes.iter().flat_map(|entry| chunks(entry.clone())) {
            match chunk.unwrap().kind {
                ChunkKind::Change | ChunkKind::DeflatedChange => held.0 += 1,
                ChunkKind::Document | ChunkKind::Bundle => held.1 += 1,
            }
        }
        open.received.push(held);
        open.server_heads = read.heads.clone();
        let message = AutomergeMessage::decode(data).unwrap();
        open.doc.sync().receive_sync_message(&mut open.state, message).unwrap();
        self.speak(document).await;
        read.heads
    }

    /// Reads to the end of the connection.
    pub async fn ended(&mut self) -> Ended {
        in_time("the connection ends", async {
            loop {
                if let Heard::Ended(ended) = self.hear().await {
                    return ended;
                }
            }
        })
        .await
    }
}
