//! From marked subscriptions to the socket: each message is made when the socket takes it.

use std::sync::{Arc, OnceLock};

use axum::extract::ws::Message;
use bytes::Bytes;
use isobar_protocol::ids::PeerId;
use isobar_protocol::sync_message::{SyncMessage, SyncVersion};
use isobar_protocol::wire::{self, SharedSyncFrame};
use tokio::time::Instant;

use super::{Connection, Ending, GATHER, Search, WRITE_BYTES, unreadable};
use crate::documents::{Document, LoadError, Outgoing, joined};
use crate::node::Node;
use crate::outbox::{LossyFrame, Slot};
use crate::replication::SearchOutcome;
use crate::telemetry::MaterialiseReason;

impl Connection {
    /// Writes what there is to say, up to what the socket should be given at once; the rest stays marked.
    pub(super) async fn fill(&mut self) -> Result<(), Ending> {
        let mut written = 0;
        if std::mem::take(&mut self.woken) {
            let mut marked = std::mem::take(&mut self.marked);
            let frames = self.outbox.take(&mut marked);
            marked.drain(..).for_each(|slot| self.mark(slot));
            self.marked = marked;
            for frame in frames {
                written += self.send_lossy(frame)?;
            }
        }
        let mut next = 0;
        while next < self.dirty.len() && written < WRITE_BYTES {
            let slot = self.dirty[next];
            self.subscriptions[slot.0 as usize].dirty = false;
            next += 1;
            written += self.send_sync(slot).await?;
        }
        self.dirty.drain(..next);
        Ok(())
    }

    fn send_lossy(&mut self, frame: LossyFrame) -> Result<usize, Ending> {
        let bytes = match frame {
            LossyFrame::Ephemeral(it) => {
                wire::encode_ephemeral(&it.sender, &self.peer, &it.document, &it.session, it.count, &it.data)
            }
            LossyFrame::RemoteHeads { document, heads } => match self.watched.contains(&heads.storage_id) {
                true => {
                    wire::encode_remote_heads_changed(&self.node.peer_id, &self.peer, &document, &[heads])
                }
                false => return Ok(0),
            },
        };
        self.send_bytes(bytes)
    }

    pub(super) fn send_bytes(&mut self, bytes: Vec<u8>) -> Result<usize, Ending> {
        let length = bytes.len();
        self.send(Message::Binary(bytes.into()))?;
        Ok(length)
    }

    /// Sends what a subscription has to say, if anything; returns the bytes.
    async fn send_sync(&mut self, slot: Slot) -> Result<usize, Ending> {
        let now = Instant::now();
        let subscription = &mut self.subscriptions[slot.0 as usize];
        if self.answers_each && subscription.session.is_behind() && now < subscription.last_sent + GATHER {
            if !std::mem::replace(&mut subscription.held, true) {
                let until = subscription.last_sent + GATHER;
                self.held.push((until, slot));
                self.arm_timer(until, false);
            }
            return Ok(0);
        }
        subscription.held = false;
        let mut elsewhere = None;
        if let Search::Running(over) = &subscription.search
            && let Some(urls) = over.get()
        {
            elsewhere = Some(urls.clone()).filter(|urls| self.hears_elsewhere && !urls.is_empty());
            subscription.search = Search::Over;
            subscription.session.answer_again();
        }
        let document = subscription.document.clone();
        let outgoing = document.lock().generate(
            subscription.key,
            &mut subscription.session,
            &self.node.peer_id,
            document.id(),
        );
        let reported = self.report_heads(slot)?;
        let reported = reported + self.report_receipts(slot)?;
        let Some(outgoing) = outgoing else { return Ok(reported) };
        if matches!(outgoing, Outgoing::Unavailable) && self.search(slot) {
            return Ok(reported);
        }
        self.subscriptions[slot.0 as usize].last_sent = now;
        let said = match elsewhere {
            // Before the answer that ends the client's own search.
            Some(urls) if matches!(outgoing, Outgoing::Unavailable) => {
                self.send_bytes(wire::encode_elsewhere(&self.node.peer_id, &self.peer, document.id(), &urls))?
            }
            _ => 0,
        };
        let bytes = frame(&self.node, &self.peer, &document, outgoing).await?;
        Ok(reported + said + self.send_bytes(bytes)?)
    }
}

impl Connection {
    /// Looks for a document that is not here in the other regions, once. Returns whether its outcome is to be waited for.
    fn search(&mut self, slot: Slot) -> bool {
        let Some(replication) = self.node.replication.as_ref().filter(|it| it.can_search()) else {
            return false;
        };
        let subscription = &mut self.subscriptions[slot.0 as usize];
        let document = subscription.document.clone();
        match subscription.search {
            Search::Running(_) => return true,
            Search::Over => return false,
            Search::NotYet if document.lock().is_withheld() => return false,
            Search::NotYet => {}
        }
        let over = Arc::new(OnceLock::new());
        subscription.search = Search::Running(over.clone());
        let (replication, key, group) = (replication.clone(), subscription.key, self.group.clone());
        let outbox = Arc::downgrade(&self.outbox);
        tokio::spawn(async move {
            let urls = match replication.search(document.id().clone(), group).await {
                SearchOutcome::Elsewhere { urls } => urls,
                SearchOutcome::Found | SearchOutcome::Absent => Vec::new(),
            };
            let _ = over.set(urls);
            // The subscription ends with its connection.
            if outbox.upgrade().is_some() {
                document.mark(key);
            }
        });
        true
    }
}

/// Encodes what a session has to say, for this peer.
async fn frame(
    node: &Node,
    peer: &PeerId,
    document: &Arc<Document>,
    outgoing: Outgoing,
) -> Result<Vec<u8>, Ending> {
    let metrics = &node.metrics;
    match outgoing {
        Outgoing::Unavailable => {
            metrics.unavailable_sent.increment(1);
            Ok(wire::encode_unavailable(&node.peer_id, peer, document.id()))
        }
        Outgoing::Shared(frame) => {
            metrics.sync_messages_shared.increment(1);
            Ok(frame.for_target(peer))
        }
        Outgoing::Whole { key, message } => {
            metrics.sync_messages_single.increment(1);
            let message = match prepend_base(node, document, message).await {
                Ok(message) => message,
                Err(error) => return withheld(node, peer, document, &error),
            };
            let frame = Arc::new(SharedSyncFrame::new(&node.peer_id, document.id(), &message));
            document.share(key, &frame);
            Ok(frame.for_target(peer))
        }
        Outgoing::Single { mut message, with_base } => {
            metrics.sync_messages_single.increment(1);
            if with_base {
                message = match prepend_base(node, document, message).await {
                    Ok(message) => message,
                    Err(error) => return withheld(node, peer, document, &error),
                };
            }
            if message.version == SyncVersion::V2 {
                message = joined(message);
            }
            let data = message.encode();
            Ok(wire::encode_sync(false, &node.peer_id, peer, document.id(), &data))
        }
    }
}

/// What is said instead when the base cannot be read.
fn withheld(node: &Node, peer: &PeerId, document: &Document, error: &LoadError) -> Result<Vec<u8>, Ending> {
    unreadable(node, document, error)?;
    node.metrics.unavailable_sent.increment(1);
    Ok(wire::encode_unavailable(&node.peer_id, peer, document.id()))
}

/// Puts the base before the changes of a message: its chunk, or its changes for a client that knows no chunks.
async fn prepend_base(
    node: &Node,
    document: &Document,
    mut message: SyncMessage,
) -> Result<SyncMessage, LoadError> {
    let documents = &node.documents;
    let chunk = documents.base_chunk(document).await?;
    let mut changes: Vec<Bytes> = match message.version {
        SyncVersion::V2 => vec![chunk],
        SyncVersion::V1 => documents.materialiser().split(MaterialiseReason::OldClient, chunk, false).await?,
    };
    changes.append(&mut message.changes);
    message.changes = changes;
    Ok(if message.version == SyncVersion::V2 { joined(message) } else { message })
}
