//! From queued items to one transaction: who logs what, under which seq, stored under which key.

use std::collections::HashMap;

use bytes::Bytes;
use isobar_protocol::ids::{DocumentId, OriginId, PlacementGroup, Seq};
use isobar_protocol::log::{Chain, Content, Entry, encode_run, join_bodies};
use uuid::Uuid;

use super::{Item, Logged};
use crate::storage::{Batch, ClaimedOrigin, Deletion, DocumentAppend, RunAppend, StoredChange, Writer};

/// One of this node's origins, and where its log stands.
pub(super) struct OwnLog {
    pub(super) origin: ClaimedOrigin,
    pub(super) seq: Seq,
    pub(super) chain: Chain,
    /// Bytes of the runs that were appended since it was claimed.
    pub(super) bytes: u64,
}

impl OwnLog {
    pub(super) fn new(origin: ClaimedOrigin) -> Self {
        Self { seq: origin.last_seq, chain: origin.chain, bytes: 0, origin }
    }
}

/// Keys for changes that this node stores and does not log. No append of this or another process uses one again.
pub(super) struct UnloggedKeys {
    origin: OriginId,
    last: Seq,
}

impl UnloggedKeys {
    pub(super) fn new() -> Self {
        Self { origin: OriginId(Uuid::new_v4()), last: Seq(0) }
    }

    fn next(&mut self) -> Seq {
        self.last = Seq(self.last.0 + 1);
        self.last
    }
}

/// Changes by document, in the order in which the documents came up.
#[derive(Default)]
struct ByDocument {
    parts: Vec<(DocumentId, PlacementGroup, Vec<StoredChange>)>,
    places: HashMap<DocumentId, usize>,
}

impl ByDocument {
    fn push(&mut self, document: &DocumentId, group: &PlacementGroup, change: StoredChange) {
        let known = self.places.get(document).copied();
        // What came under two groups stays apart: which of them the document is of is for storage to say.
        let place = known.filter(|place| self.parts[*place].1 == *group).unwrap_or_else(|| {
            self.parts.push((document.clone(), group.clone(), Vec::new()));
            self.places.insert(document.clone(), self.parts.len() - 1);
            self.parts.len() - 1
        });
        self.parts[place].2.push(change);
    }
}

/// Puts a batch together.
pub(super) struct Assembly<'a> {
    logs: &'a [OwnLog],
    own: Vec<ByDocument>,
    tombstones: Vec<Vec<Deletion>>,
    unlogged: ByDocument,
    received: Vec<Vec<&'a RunAppend>>,
    deletions: Vec<Deletion>,
}

impl<'a> Assembly<'a> {
    /// The transaction that stores `items`, and how it moves each of the own logs on.
    pub(super) fn batch(items: &'a [Item], logs: &'a [OwnLog], keys: &mut UnloggedKeys) -> Batch {
        let mut assembly = Self {
            logs,
            own: logs.iter().map(|_| ByDocument::default()).collect(),
            tombstones: logs.iter().map(|_| Vec::new()).collect(),
            unlogged: ByDocument::default(),
            received: Vec::new(),
            deletions: Vec::new(),
        };
        items.iter().for_each(|item| assembly.add(item));
        assembly.finish(keys)
    }

    /// The place of the log for a group.
    fn log_of(&self, group: &PlacementGroup) -> Option<usize> {
        self.logs.iter().position(|log| log.origin.group == *group)
    }

    fn add(&mut self, item: &'a Item) {
        match item {
            Item::Changes(submission) => {
                // A document of a group that this node has left is served from here and stored, and replicated no more.
                let log = self.log_of(&submission.group);
                for staged in &submission.changes {
                    let to = match (staged.logged, log) {
                        (Logged::Stored, _) => continue,
                        (Logged::Own, Some(log)) => &mut self.own[log],
                        (Logged::Own, None) | (Logged::Elsewhere, _) => &mut self.unlogged,
                    };
                    to.push(submission.document.id(), &submission.group, staged.change.clone());
                }
            }
            Item::Received(received) => {
                for cold in &received.cold {
                    for change in &cold.changes {
                        self.unlogged.push(&cold.document, &cold.group, change.clone());
                    }
                }
                self.deletions.extend(received.deletions.iter().cloned());
                if let Some(run) = &received.run {
                    match self.received.iter_mut().find(|runs| runs[0].origin == run.origin) {
                        Some(runs) => runs.push(run),
                        None => self.received.push(vec![run]),
                    }
                }
            }
            Item::Deletion(local) => {
                if let Some(log) = self.log_of(&local.deletion.group) {
                    self.tombstones[log].push(local.deletion.clone());
                }
                self.deletions.push(local.deletion.clone());
            }
        }
    }

    fn finish(self, keys: &mut UnloggedKeys) -> Batch {
        let mut batch = Batch { deletions: self.deletions, ..Batch::default() };
        for ((log, changes), tombstones) in self.logs.iter().zip(self.own).zip(self.tombstones) {
            if let Some(run) = own_run(log, changes, tombstones, &mut batch.changes) {
                batch.runs.push(run);
            }
        }
        for (document, group, changes) in self.unlogged.parts {
            let changes = changes.into_iter().map(|change| (keys.next(), change)).collect();
            batch.changes.push(DocumentAppend { document, group, origin: keys.origin, changes });
        }
        batch.runs.extend(self.received.iter().map(|runs| joined(runs)));
        batch
    }
}

/// The next run of an own log. What it holds of each document goes into `appends`.
fn own_run(
    log: &OwnLog,
    changes: ByDocument,
    tombstones: Vec<Deletion>,
    appends: &mut Vec<DocumentAppend>,
) -> Option<RunAppend> {
    let origin = &log.origin;
    let mut entries = Vec::new();
    let mut seq = log.seq;
    for (document, group, changes) in changes.parts {
        let mut keyed = Vec::with_capacity(changes.len());
        for change in changes {
            seq = Seq(seq.0 + 1);
            let content = Content::Change { hash: change.hash, bytes: change.bytes.clone() };
            entries.push(Entry { document: document.clone(), content });
            keyed.push((seq, change));
        }
        appends.push(DocumentAppend { document, group, origin: origin.id, changes: keyed });
    }
    for Deletion { document, deleted_at_ms, .. } in tombstones {
        seq = Seq(seq.0 + 1);
        entries.push(Entry { document, content: Content::Tombstone { deleted_at_ms } });
    }
    if entries.is_empty() {
        return None;
    }
    let chain = log.chain.after_all(&entries);
    Some(RunAppend {
        origin: origin.id,
        writer: Writer::Own { incarnation: origin.incarnation },
        group: origin.group.clone(),
        first: Seq(log.seq.0 + 1),
        last: seq,
        chain_before: log.chain,
        chain,
        body: encode_run(&entries).into(),
    })
}

/// Several runs of one origin that follow each other, as one: bodies are put together without being taken apart.
fn joined(runs: &[&RunAppend]) -> RunAppend {
    let (first, last) = (runs[0], runs[runs.len() - 1]);
    let bodies: Vec<Bytes> = runs.iter().map(|run| run.body.clone()).collect();
    RunAppend { last: last.last, chain: last.chain, body: join_bodies(&bodies), ..first.clone() }
}
