//! From a frame to the graph: decode, check who sent it, take the changes apart, offer them, submit them.

use std::sync::Arc;

use axum::extract::ws::Message;
use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{Chunk, ChunkKind, census, chunks};
use isobar_protocol::graph::Refusal;
use isobar_protocol::ids::DocumentId;
use isobar_protocol::session::SyncSession;
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::ClientFrame;
use tokio::time::Instant;

use super::{Connection, Ending, Subscription, unreadable};
use crate::documents::{Incoming, Rejected};
use crate::node::Node;
use crate::outbox::{Ephemeral, Slot};
use crate::telemetry::MaterialiseReason;

/// More bytes of changes than this are taken apart on a blocking thread. Hashing them takes microseconds, but deflated ones
/// may become a thousand times as many bytes, and other clients wait for this thread.
const PARSE_INLINE_BYTES: usize = 16 << 10;

/// Longest session id of an ephemeral message: a document remembers it. Stock clients use a dozen characters.
const SESSION_ID_BYTES_MAX: usize = 256;

impl Connection {
    pub(super) async fn receive(&mut self, message: Message) -> Result<(), Ending> {
        match message {
            Message::Binary(frame) => self.receive_frame(frame).await,
            Message::Ping(_) => {
                // The WebSocket layer has queued the answer; it goes out with the next flush.
                self.flushing = true;
                Ok(())
            }
            Message::Pong(_) => Ok(()),
            Message::Close(_) => Err(Ending::Gone),
            Message::Text(_) => Err(Ending::protocol("text_frame", "frames are binary")),
        }
    }

    async fn receive_frame(&mut self, frame: Bytes) -> Result<(), Ending> {
        self.node.metrics.frames_received.increment(1);
        self.node.metrics.frame_bytes_received.increment(frame.len() as u64);
        let decoded = ClientFrame::decode_after(&frame, &mut self.last_document)
            .map_err(|error| Ending::protocol("malformed_frame", error))?;
        if decoded.sender_id().is_some_and(|sender| sender != self.peer.as_str()) {
            // Stock clients send presence of others back to where it came from.
            self.node.metrics.echoes_dropped.increment(1);
            return Ok(());
        }
        match decoded {
            ClientFrame::Sync { document, data, .. } => {
                let data = frame.slice_ref(data);
                self.receive_sync(document, data).await
            }
            ClientFrame::Ephemeral { session_id, .. } if session_id.len() > SESSION_ID_BYTES_MAX => {
                Err(Ending::protocol("malformed_frame", "the session id is too long"))
            }
            ClientFrame::Ephemeral { document, session_id, count, data, .. } => {
                let message = Ephemeral {
                    sender: self.peer.as_str().to_owned(),
                    document,
                    session: session_id.to_owned(),
                    count,
                    data: frame.slice_ref(data),
                };
                self.receive_ephemeral(message);
                Ok(())
            }
            ClientFrame::RemoteSubscriptionChange { add, remove, .. } => {
                self.change_watched(add, &remove);
                Ok(())
            }
            ClientFrame::RemoteHeadsChanged { document, heads, .. } => {
                self.receive_remote_heads(&document, heads);
                Ok(())
            }
            ClientFrame::Leave { .. } => Err(Ending::Leaves),
            ClientFrame::Error { message } => {
                tracing::debug!(peer = %self.peer, message, "client reports an error");
                Ok(())
            }
            ClientFrame::Join { .. } => Err(Ending::protocol("second_join", "already joined")),
            ClientFrame::Unavailable { .. } | ClientFrame::Unknown { .. } => Ok(()),
        }
    }

    async fn receive_sync(&mut self, document: DocumentId, data: Bytes) -> Result<(), Ending> {
        let message =
            SyncMessage::decode(data).map_err(|error| Ending::protocol("malformed_sync_message", error))?;
        let slot = self.subscribe(document).await?;
        if message.changes.is_empty() {
            self.take_in(slot, message, &Incoming::none());
            return Ok(());
        }
        let mut incoming = self.take_changes(slot, &message).await?;
        self.offer(slot, &mut incoming).await?;
        self.take_in(slot, message, &incoming);
        Ok(())
    }

    /// Takes in what a message says, after its changes. Most are answers of clients that now have everything, and call for
    /// nothing.
    fn take_in(&mut self, slot: Slot, message: SyncMessage, incoming: &Incoming) {
        let Subscription { document, session, .. } = &mut self.subscriptions[slot.0 as usize];
        let state = document.lock();
        let mut is_in_step = false;
        if !state.is_deleted() {
            session.receive(message, incoming.positions(state.graph()), state.graph());
            is_in_step = !state.is_withheld() && session.is_in_step(state.graph());
        }
        drop(state);
        if !is_in_step {
            self.mark(slot);
        }
    }

    /// Takes the changes out of a message and reserves room for them in the queues to the log.
    async fn take_changes(&mut self, slot: Slot, message: &SyncMessage) -> Result<Incoming, Ending> {
        let subscription = &self.subscriptions[slot.0 as usize];
        let withheld = subscription.document.lock().is_withheld();
        if subscription.session.is_read_only() || withheld {
            return Ok(Incoming::none());
        }
        let bytes: usize = message.changes.iter().map(Bytes::len).sum();
        // Before the work, so that a client that floods waits with little held for it.
        let permits = self.node.committer.reserve(&self.uncommitted, bytes).await;
        let changes = take_apart(&self.node, message.changes.clone(), bytes).await?;
        Ok(Incoming::new(changes, permits, self.group.clone()))
    }

    /// Offers changes to the document's graph. A change that is refused ends the connection, or the session's right to write.
    async fn offer(&mut self, slot: Slot, incoming: &mut Incoming) -> Result<(), Ending> {
        let subscription = &mut self.subscriptions[slot.0 as usize];
        let document = subscription.document.clone();
        match self.node.documents.offer(&document, incoming, &self.node.committer).await {
            Ok(None) => Ok(()),
            Err(error) => unreadable(&self.node, &document, &error),
            Ok(Some(Rejected { refusal: refusal @ Refusal::SeqReused { .. }, .. })) => {
                // Two copies of one author write: an honest client whose storage was copied. It keeps reading, is
                // told that its changes are not taken, and its other documents carry on.
                self.node.metrics.refused(refusal.reason());
                tracing::warn!(document = %document.id(), peer = %self.peer, %refusal, "change refused");
                subscription.session = SyncSession::new(true);
                Ok(())
            }
            Ok(Some(Rejected { refusal, .. })) => {
                tracing::warn!(document = %document.id(), peer = %self.peer, %refusal, "change refused");
                Err(Ending::protocol(refusal.reason(), refusal))
            }
        }
    }

    /// Relays presence. It never loads a document, but whoever sends it is interested in what others send.
    fn receive_ephemeral(&mut self, message: Ephemeral) {
        if !self.ephemerals.take(Instant::now()) {
            self.node.metrics.lossy_dropped.increment(1);
            return;
        }
        let slot = match self.slots.get(&message.document) {
            Some(slot) => *slot,
            None if self.subscriptions.len() >= self.node.settings.connection_documents_max => return,
            None => match self.node.documents.resident(&message.document) {
                Some(document) => self.subscribe_to(document),
                None => return,
            },
        };
        let subscription = &self.subscriptions[slot.0 as usize];
        let message = Arc::new(message);
        let Some(dropped) = subscription.document.relay(Some(subscription.key), &message) else { return };
        self.node.metrics.lossy_dropped.increment(dropped);
        let Some(group) = subscription.document.settled_group() else { return };
        if let Some(replication) = &self.node.replication {
            replication.relay(&group, &message);
        }
        self.node.exchange.relay(&group, &message);
    }
}

/// Cuts concatenated chunks into changes; whole documents are split by the CRDT.
async fn take_apart(node: &Node, entries: Vec<Bytes>, bytes: usize) -> Result<Vec<Change>, Ending> {
    let limits = node.documents.limits().clone();
    let parse = move || parse_chunks(entries, &limits);
    let parts = match bytes > PARSE_INLINE_BYTES {
        false => parse(),
        true => tokio::task::spawn_blocking(parse).await.map_err(|_| Ending::Gone)?,
    }?;
    let mut changes = Vec::new();
    for part in parts {
        match part {
            Part::Changes(more) => changes.extend(more),
            Part::Whole(chunk) => changes.extend(split(node, chunk).await?),
        }
    }
    Ok(changes)
}

async fn split(node: &Node, chunk: Chunk) -> Result<Vec<Change>, Ending> {
    let is_bundle = chunk.kind == ChunkKind::Bundle;
    let split = node.documents.materialiser().split(MaterialiseReason::Upload, chunk.bytes, is_bundle);
    let split = split.await.map_err(|error| Ending::protocol("document_does_not_apply", error))?;
    let limits = node.documents.limits().clone();
    let parse = move || split.into_iter().map(|bytes| Change::decode(bytes, &limits)).collect();
    let parsed: Result<Vec<Change>, _> =
        tokio::task::spawn_blocking(parse).await.map_err(|_| Ending::Gone)?;
    parsed.map_err(|error| Ending::protocol(error.reason(), error))
}

/// What the entries of a sync message contain.
enum Part {
    Changes(Vec<Change>),
    /// A document or bundle chunk that has passed the census.
    Whole(Chunk),
}

fn parse_chunks(entries: Vec<Bytes>, limits: &isobar_protocol::config::Limits) -> Result<Vec<Part>, Ending> {
    let mut parts = Vec::new();
    let mut changes = Vec::new();
    for chunk in entries.into_iter().flat_map(chunks) {
        let chunk = chunk.map_err(|error| Ending::protocol("malformed_chunk", error))?;
        match chunk.kind {
            ChunkKind::Change | ChunkKind::DeflatedChange => {
                let change = Change::parse(&chunk, limits);
                changes.push(change.map_err(|error| Ending::protocol(error.reason(), error))?);
            }
            ChunkKind::Document | ChunkKind::Bundle => {
                census(&chunk, limits).map_err(|error| Ending::protocol("document_refused", error))?;
                parts.push(Part::Changes(std::mem::take(&mut changes)));
                parts.push(Part::Whole(chunk));
            }
        }
    }
    parts.push(Part::Changes(changes));
    Ok(parts)
}
