//! One client's synchronisation of one document: Automerge's sync protocol, from the change graph alone.
//!
//! The other side is any standard Automerge peer. This side never has the document: it answers from hashes,
//! dependencies and bytes.
//!
//! Once it is known what the peer has, the state of a session is one position, `synced`: the transport is ordered and
//! reliable, so everything before it has been sent to the peer or came from it. What is durable beyond it is what the
//! next message carries, whenever that is built: messages are made *late*, when the socket takes one, and a peer
//! that was slow gets one message with everything. Sessions that stand at the same position get the same bytes
//! ([`Reply::Span`]).
//!
//! What the peer has is worked out anew ([`SyncSession`] calls that *placing* it) at its first message and whenever
//! it shows that it lost something: empty heads, a reset, heads that fall behind what it had confirmed.
//!
//! # The `have` of our messages
//!
//! Every message brings the peer to our heads, so each says `have = {last_sync: our heads, no filter}`: the peer then
//! owes us exactly what is not an ancestor of them, and no Bloom filter is built. A peer that could not apply the
//! message does not know these heads, answers with a reset, and is placed anew. The exception is a peer that
//! ignores our changes (it is read-only, or keeps answering with the same): it is told the heads it has reported, and
//! a filter of the rest if it needs one, so that it can still send what it has itself.
//!
//! # Quiet
//!
//! A session replies to what calls for a reply, and stops. Heads that are not here and came without their changes
//! call for one when they are first reported: the peer sends its changes when it knows our heads, and one that does
//! not send them then (they were refused, or are not to be taken) will not send them because it is asked again. Replies
//! that the peer does not follow with anything new are counted and limited, so that a peer that cannot apply what it
//! gets, or that has another idea of the protocol, does not keep both busy for ever.

use smallvec::SmallVec;

use crate::bloom::BloomFilter;
use crate::config::{FRUITLESS_REPLIES_MAX, UNANSWERED_MESSAGES_MAX};
use crate::graph::Graph;
use crate::ids::ChangeHash;
use crate::sync_message::{Have, SyncFlags, SyncMessage, SyncVersion};

mod positions;

use positions::Positions;

/// What to send to the peer.
#[derive(Debug, Clone)]
pub enum Reply {
    /// The document does not exist here; it will be sent if it appears.
    Unavailable,
    /// Everything durable in these positions, nothing else: [`span_message`] builds it, once for all sessions that
    /// need the same. An empty span acknowledges.
    Span { from: u64, to: u64 },
    /// Everything that is durable, base and tail, for a peer that knows V2: [`whole_message`], and the bytes of the base
    /// before its changes.
    Whole { to: u64 },
    /// A message for this peer only. If `with_base` is set, the bytes of the base go before the changes: as one V2
    /// chunk, or, for a peer that does not know V2, as the base's single changes.
    Single { message: Box<SyncMessage>, with_base: bool },
}

/// A peer's sync of one document. See the module.
#[derive(Debug)]
pub struct SyncSession {
    /// We refuse the peer's changes, and say so.
    read_only: bool,
    peer: Peer,
    place: Place,
    /// Positions that came from the peer, beyond what it was last sent.
    received: Positions,
    /// The heads in our last message.
    told: Option<Vec<ChangeHash>>,
    reply_due: bool,
    fruitless_replies: u8,
    unanswered: u8,
}

/// What the peer said of itself, last.
#[derive(Debug, Default)]
struct Peer {
    heard: bool,
    v2: bool,
    read_only: bool,
    heads: Vec<ChangeHash>,
    have: Vec<Have>,
    need: Vec<ChangeHash>,
}

/// What the peer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// To be worked out from its last message.
    Unknown,
    /// Everything before this position, and `received`.
    Synced(u64),
}

impl SyncSession {
    /// A session that accepts the peer's changes, or, if `read_only`, refuses them.
    pub fn new(read_only: bool) -> Self {
        Self {
            read_only,
            peer: Peer::default(),
            place: Place::Unknown,
            received: Positions::default(),
            told: None,
            reply_due: false,
            fruitless_replies: 0,
            unanswered: 0,
        }
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Takes in what a message says, its changes excepted: these the caller has offered to the graph first, and passes
    /// the positions at which they stand, new or not. New ones are acknowledged when they are durable.
    pub fn receive(
        &mut self,
        mut message: SyncMessage,
        changes_at: impl IntoIterator<Item = u64>,
        graph: &Graph,
    ) {
        message.heads.sort_unstable();
        message.heads.dedup();
        self.unanswered = 0;
        self.take_flags(&message);
        if self.peer_lost_something(&message, graph) {
            self.place = Place::Unknown;
            self.received = Positions::default();
        }
        let positions: Vec<u64> = changes_at.into_iter().collect();
        let brought_changes = !message.changes.is_empty();
        let staged_any = positions.iter().any(|position| *position >= graph.durable_end());
        self.received.extend(positions);
        if staged_any || message.heads != self.peer.heads {
            self.fruitless_replies = 0;
        }
        let placed = self.place != Place::Unknown;
        if placed && !brought_changes && graph.heads_are(&message.heads) {
            // The answer to our message, or it has our changes from elsewhere: both sides have the same. That the peer
            // knows it shows in what it takes for synchronised. A message that it sent before it could know of a commit
            // must not stand in for the acknowledgement of that commit.
            let knows = message.have.iter().any(|have| graph.heads_are(&have.last_sync));
            self.reached_end(graph);
            if knows && !self.told_heads(graph) {
                self.told = Some(graph.heads());
            }
        } else if !staged_any {
            // New changes are answered when they are durable. An older answer that crossed our last message needs
            // none: what it lacks is on its way.
            self.reply_due |= !placed || brought_changes || self.owes_changes(&message, graph);
        }
        self.peer.heard = true;
        self.peer.heads = message.heads;
        self.peer.need = message.need;
        // What the peer has counts only when it is placed; a filter of a large document is not kept beyond that.
        self.peer.have = if placed { Vec::new() } else { message.have };
    }

    /// Whether the peer reports for the first time a head that is not here, which it may not have sent for want of
    /// knowing our heads.
    fn owes_changes(&self, message: &SyncMessage, graph: &Graph) -> bool {
        let is_new = |head: &ChangeHash| self.peer.heads.binary_search(head).is_err();
        !self.read_only && message.heads.iter().any(|head| is_new(head) && graph.position(head).is_none())
    }

    fn take_flags(&mut self, message: &SyncMessage) {
        let Some(flags) = message.flags else { return };
        self.peer.v2 = true;
        let read_only = flags.contains(SyncFlags::READ_ONLY);
        if flags.contains(SyncFlags::SYNC_RESET) || (self.peer.read_only && !read_only) {
            self.place = Place::Unknown;
        }
        self.peer.read_only = read_only;
    }

    /// Whether the peer shows that it no longer has what it had, or never got what we sent.
    fn peer_lost_something(&self, message: &SyncMessage, graph: &Graph) -> bool {
        if message.heads.is_empty() {
            return true;
        }
        let reset = matches!(&message.have[..], [have] if have.last_sync.is_empty() && have.bloom.is_empty());
        if reset && message.changes.is_empty() && !graph.heads_are(&message.heads) {
            return true;
        }
        if self.peer.heads == message.heads || graph.heads_are(&message.heads) {
            return false;
        }
        // Heads that it had reported must be among the ancestors of those it reports now.
        let known = |heads: &[ChangeHash]| -> SmallVec<[u64; 4]> {
            heads.iter().filter_map(|head| graph.position(head)).collect()
        };
        let now = known(&message.heads);
        now.len() == message.heads.len() && !graph.includes(&now, &known(&self.peer.heads))
    }

    /// Whether the peer has not been heard since the last message to it.
    pub fn awaits_answer(&self) -> bool {
        self.unanswered > 0
    }

    /// Has the next [`Self::generate`] answer the peer's last message again: it was answered before all was known.
    pub fn answer_again(&mut self) {
        self.reply_due = true;
    }

    /// Whether the peer has left so many messages unanswered that gathering more changes serves it better than another
    /// message. Stock clients answer each message when they have applied it, which on a large document takes a browser
    /// a tenth of a second, whether the message brings one change or fifty.
    pub fn is_behind(&self) -> bool {
        self.unanswered >= UNANSWERED_MESSAGES_MAX
    }

    /// What to send now, if anything. The caller sends it: the session takes it as sent.
    pub fn generate(&mut self, graph: &Graph) -> Option<Reply> {
        if !self.peer.heard {
            return None;
        }
        if graph.is_empty() && self.peer.heads.is_empty() {
            let due = std::mem::take(&mut self.reply_due);
            // Changes that are being committed make the document available in a moment.
            return (due && graph.staged_end() == 0).then_some(Reply::Unavailable);
        }
        let due = std::mem::take(&mut self.reply_due);
        let lacking = self.lacking(graph);
        if self.told_heads(graph) {
            let called_for = due || lacking != Lacking::Nothing;
            if !called_for || self.fruitless_replies >= FRUITLESS_REPLIES_MAX {
                return None;
            }
            self.fruitless_replies += 1;
        }
        let reply = self.compose(graph, lacking);
        self.mark_sent(graph);
        Some(reply)
    }

    /// Whether [`Self::generate`] has nothing to send, as far as shows at a glance: the peer has all of it, and was told so.
    pub fn is_in_step(&self, graph: &Graph) -> bool {
        !self.reply_due
            && self.peer.need.is_empty()
            && self.place == Place::Synced(graph.durable_end())
            && self.received.is_empty()
            && self.told_heads(graph)
    }

    fn told_heads(&self, graph: &Graph) -> bool {
        self.told.as_ref().is_some_and(|told| graph.heads_are(told))
    }

    fn mark_sent(&mut self, graph: &Graph) {
        self.reached_end(graph);
        self.told = Some(graph.heads());
        self.unanswered = self.unanswered.saturating_add(1);
        self.peer.have = Vec::new();
        self.peer.need = Vec::new();
    }

    /// The peer has, or has been sent, all that is durable.
    fn reached_end(&mut self, graph: &Graph) {
        let end = graph.durable_end();
        self.received.forget_before(end);
        self.place = Place::Synced(end);
    }

    fn lacking(&self, graph: &Graph) -> Lacking {
        if self.peer.read_only {
            return Lacking::Nothing;
        }
        let end = graph.durable_end();
        let lacking = match self.place {
            Place::Unknown => self.placed(graph),
            Place::Synced(position) if position < graph.tail_start() => Lacking::Everything,
            Place::Synced(position) => {
                let gaps = self.received.gaps_in(position..end);
                match &gaps[..] {
                    [] => Lacking::Nothing,
                    [gap] if gap.end == end => Lacking::From(gap.start),
                    _ => Lacking::Positions(gaps.into_iter().flatten().collect()),
                }
            }
        };
        match self.with_needs(lacking, graph) {
            Lacking::Everything if !graph.has_base() && end > 0 => Lacking::From(0),
            Lacking::Everything if !graph.has_base() => Lacking::Nothing,
            lacking => lacking,
        }
    }

    /// Works out what the peer lacks from its heads, its last synchronised heads and its filters.
    fn placed(&self, graph: &Graph) -> Lacking {
        if self.peer.heads.is_empty() {
            return Lacking::Everything;
        }
        let claimed = self.peer.have.iter().flat_map(|have| &have.last_sync);
        // Heads that are not known may be new or may lie inside the base; the index is not loaded to find out. Unless
        // the filter says that the peer has the base, it is sent everything, which is right in both cases.
        let known: Vec<u64> =
            self.peer.heads.iter().chain(claimed).filter_map(|hash| graph.position(hash)).collect();
        let filtered = |hash: &ChangeHash| self.peer.have.iter().any(|have| have.bloom.contains(hash));
        if !graph.covers_base(&known) && !graph.base_heads().all(filtered) {
            return Lacking::Everything;
        }
        let mut lacking = Vec::new();
        let mut is_lacking = vec![false; (graph.durable_end() - graph.tail_start()) as usize];
        for position in graph.beyond(&known) {
            let descends = graph
                .parents(position)
                .iter()
                .filter_map(|parent| parent.checked_sub(graph.tail_start()))
                .any(|offset| is_lacking[offset as usize]);
            let hash = graph.hash(position);
            if descends || !self.received.contains(position) && hash.is_none_or(|hash| !filtered(&hash)) {
                is_lacking[(position - graph.tail_start()) as usize] = true;
                lacking.push(position);
            }
        }
        Lacking::at(lacking)
    }

    /// Adds what the peer asked for by name.
    fn with_needs(&self, lacking: Lacking, graph: &Graph) -> Lacking {
        if self.peer.need.is_empty() || lacking == Lacking::Everything {
            return lacking;
        }
        let mut positions = match lacking {
            Lacking::Nothing | Lacking::Everything => Vec::new(),
            Lacking::From(position) => (position..graph.durable_end()).collect(),
            Lacking::Positions(positions) => positions,
        };
        for hash in &self.peer.need {
            match graph.durable_position(hash) {
                Some(position) => positions.push(position),
                // Its own bytes were given up when the base took it in.
                None if graph.is_in_base_or_unknown(hash) => return Lacking::Everything,
                None => {}
            }
        }
        positions.sort_unstable();
        positions.dedup();
        Lacking::at(positions)
    }

    fn compose(&self, graph: &Graph, lacking: Lacking) -> Reply {
        let end = graph.durable_end();
        let need = if self.read_only { Vec::new() } else { graph.missing_from(&self.peer.heads) };
        // A peer that keeps answering with the same does not apply what we send, whatever it says.
        let applies = !self.peer.read_only && self.fruitless_replies < 2;
        let plain = need.is_empty() && self.peer.v2 && applies && !self.read_only;
        match &lacking {
            Lacking::Nothing if plain => return Reply::Span { from: end, to: end },
            Lacking::From(from) if plain => return Reply::Span { from: *from, to: end },
            Lacking::Everything if plain => return Reply::Whole { to: end },
            _ => {}
        }
        let with_base = lacking == Lacking::Everything;
        let changes = match lacking {
            Lacking::Nothing => Vec::new(),
            Lacking::Everything => graph.bytes_at(graph.tail_start()..end),
            Lacking::From(from) => graph.bytes_at(from..end),
            Lacking::Positions(positions) => graph.bytes_at(positions),
        };
        let mut flags = our_flags();
        if self.read_only {
            flags = flags.with(SyncFlags::READ_ONLY);
        }
        let message = SyncMessage {
            version: if self.peer.v2 { SyncVersion::V2 } else { SyncVersion::V1 },
            heads: graph.heads(),
            need,
            have: vec![if applies { have_all(graph) } else { self.honest_have(graph) }],
            changes,
            flags: Some(flags),
        };
        Reply::Single { message: Box::new(message), with_base }
    }

    /// What we have, told to a peer that does not take our changes: what it has reported itself. Only if it reports
    /// something that is not here does it need a filter of the rest to know what to send.
    fn honest_have(&self, graph: &Graph) -> Have {
        let reported = self.peer.heads.iter().filter(|head| graph.is_durable(head)).copied();
        let last_sync: Vec<ChangeHash> = reported.collect();
        if last_sync.len() == self.peer.heads.len() {
            return Have { last_sync, bloom: BloomFilter::default() };
        }
        let known: Vec<u64> = last_sync.iter().filter_map(|hash| graph.position(hash)).collect();
        let ours: Vec<ChangeHash> =
            graph.beyond(&known).into_iter().filter_map(|position| graph.hash(position)).collect();
        Have { last_sync, bloom: BloomFilter::from_hashes(ours.iter()) }
    }
}

/// What every message of ours says of us.
fn our_flags() -> SyncFlags {
    SyncFlags::default().with(SyncFlags::SUPPORTS_SYNC_RESET)
}

/// The `have` of a message that brings the peer to our heads.
fn have_all(graph: &Graph) -> Have {
    Have { last_sync: graph.heads(), bloom: BloomFilter::default() }
}

/// The message of [`Reply::Span`]: our heads, and what is durable in these positions.
///
/// # Panics
/// If the span does not end where the graph is durable now: build it under the lock under which it was asked for.
pub fn span_message(graph: &Graph, from: u64, to: u64) -> SyncMessage {
    assert_eq!(to, graph.durable_end(), "a span ends at the heads it is sent with");
    SyncMessage {
        version: SyncVersion::V2,
        heads: graph.heads(),
        need: Vec::new(),
        have: vec![have_all(graph)],
        changes: graph.bytes_at(from..to),
        flags: Some(our_flags()),
    }
}

/// The message of [`Reply::Whole`], without the bytes of the base that it begins with.
pub fn whole_message(graph: &Graph) -> SyncMessage {
    span_message(graph, graph.tail_start(), graph.durable_end())
}

/// What the peer does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Lacking {
    Nothing,
    /// The base and the whole tail.
    Everything,
    /// Everything durable from this position on; there is something.
    From(u64),
    /// Not empty.
    Positions(Vec<u64>),
}

impl Lacking {
    fn at(positions: Vec<u64>) -> Self {
        if positions.is_empty() { Lacking::Nothing } else { Lacking::Positions(positions) }
    }
}
