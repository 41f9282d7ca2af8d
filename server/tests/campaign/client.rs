//! A standard Automerge peer to which a connection that ends is everyday life.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use automerge::AutoCommit;
use automerge::sync::{Message as AutomergeMessage, State, SyncDoc};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId};
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::{self, ClientFrame, PeerFrame, PeerMetadata};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// How long a connection may take to be made, and a document to be read.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection that has joined.
pub struct Session {
    socket: WebSocketStream<TcpStream>,
    peer: PeerId,
    server: PeerId,
}

/// What a server says that matters here.
pub enum Heard {
    Sync { document: DocumentId, message: Vec<u8> },
    Unavailable(DocumentId),
    Other,
}

/// A document, as one connection synchronises it.
#[derive(Default)]
pub struct Progress {
    state: State,
    pub server_heads: Vec<ChangeHash>,
    pub is_unavailable: bool,
    /// What the server's heads have covered so far.
    covered: HashSet<ChangeHash>,
}

impl Session {
    pub async fn join(address: SocketAddr, name: &str) -> anyhow::Result<Self> {
        tokio::time::timeout(PATIENCE, Self::join_patiently(address, name)).await?
    }

    async fn join_patiently(address: SocketAddr, name: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut socket, _) = tokio_tungstenite::client_async(format!("ws://{address}/"), stream).await?;
        let peer = PeerId::new(name)?;
        let join = wire::encode_join(&peer, &PeerMetadata::default());
        socket.send(Message::Binary(join.into())).await?;
        let Message::Binary(frame) = socket.next().await.context("no answer to the join")?? else {
            bail!("the answer to a join is binary");
        };
        let server = PeerFrame::decode(&frame)?.context("a peer frame is the answer to a join")?.sender_id;
        Ok(Self { socket, peer, server })
    }

    /// Says what there is to say about a document.
    pub async fn say(
        &mut self,
        document: &DocumentId,
        doc: &mut AutoCommit,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        let request = doc.get_heads().is_empty();
        let Some(message) = doc.sync().generate_sync_message(&mut progress.state) else { return Ok(()) };
        let frame = wire::encode_sync(request, &self.peer, &self.server, document, &message.encode());
        Ok(self.socket.send(Message::Binary(frame.into())).await?)
    }

    /// The next thing from the server. May be given up and called again.
    pub async fn hear(&mut self) -> anyhow::Result<Heard> {
        let frame = match self.socket.next().await.context("the connection has ended")?? {
            Message::Binary(frame) => frame,
            Message::Close(_) => bail!("the server closes the connection"),
            _ => return Ok(Heard::Other),
        };
        Ok(match ClientFrame::decode(&frame)? {
            ClientFrame::Sync { document, data, .. } => Heard::Sync { document, message: data.to_vec() },
            ClientFrame::Unavailable { document, .. } => Heard::Unavailable(document),
            ClientFrame::Error { message } => bail!("the server says: {message}"),
            _ => Heard::Other,
        })
    }

    /// Takes a sync message in and answers it. Returns what the server's heads cover by it for the first time.
    pub async fn take(
        &mut self,
        document: &DocumentId,
        message: &[u8],
        doc: &mut AutoCommit,
        progress: &mut Progress,
    ) -> anyhow::Result<Vec<ChangeHash>> {
        progress.server_heads = SyncMessage::decode(Bytes::copy_from_slice(message))?.heads;
        doc.sync().receive_sync_message(&mut progress.state, AutomergeMessage::decode(message)?)?;
        self.say(document, doc, progress).await?;
        Ok(progress.newly_covered(doc))
    }
}

impl Progress {
    fn newly_covered(&mut self, doc: &mut AutoCommit) -> Vec<ChangeHash> {
        let mut found = Vec::new();
        let mut next = self.server_heads.clone();
        while let Some(hash) = next.pop() {
            if self.covered.contains(&hash) {
                continue;
            }
            let Some(change) = doc.get_change_meta_by_hash(&automerge::ChangeHash(hash.0)) else { continue };
            next.extend(change.deps.iter().map(|it| ChangeHash(it.0)));
            self.covered.insert(hash);
            found.push(hash);
        }
        found
    }

    /// Whether client and server have the same, and the server has said so.
    pub fn in_step(&self, doc: &mut AutoCommit) -> bool {
        !self.server_heads.is_empty() && heads(doc) == self.server_heads
    }
}

pub fn heads(doc: &mut AutoCommit) -> Vec<ChangeHash> {
    let mut heads: Vec<_> = doc.get_heads().into_iter().map(|it| ChangeHash(it.0)).collect();
    heads.sort_unstable();
    heads
}

pub fn hashes(doc: &mut AutoCommit) -> HashSet<ChangeHash> {
    doc.get_changes_meta(&[]).into_iter().map(|it| ChangeHash(it.hash.0)).collect()
}

/// What somebody gets who has nothing and asks for these documents; `None` for what the server does not give.
pub async fn read(address: SocketAddr, documents: &[DocumentId]) -> anyhow::Result<Vec<Option<AutoCommit>>> {
    let mut read = Vec::new();
    for document in documents {
        let one = tokio::time::timeout(PATIENCE, read_one(address, document)).await;
        read.push(one.with_context(|| format!("{document} is not read in time"))??);
    }
    Ok(read)
}

async fn read_one(address: SocketAddr, document: &DocumentId) -> anyhow::Result<Option<AutoCommit>> {
    let mut session = Session::join(address, &format!("reader-{}", uuid::Uuid::new_v4().simple())).await?;
    let (mut doc, mut progress) = (AutoCommit::new(), Progress::default());
    session.say(document, &mut doc, &mut progress).await?;
    while !progress.in_step(&mut doc) {
        match session.hear().await? {
            Heard::Sync { document: about, message } if about == *document => {
                session.take(document, &message, &mut doc, &mut progress).await?;
            }
            Heard::Unavailable(about) if about == *document => return Ok(None),
            _ => {}
        }
    }
    Ok(Some(doc))
}
