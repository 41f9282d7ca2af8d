//! Sending: who subscribed which origin, how far it was sent, and how much is under way.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{Effect, Link, LinkId, LogRead, LogSlice, Moment, Replica, agree};
use crate::config::{
    CATCH_UP_ENTRIES, CATCH_UP_WINDOW_BYTES, ENTRIES_BYTES, LINK_WINDOW_BYTES, READ_RETRY_MS,
};
use crate::ids::{OriginId, Seq};
use crate::link::LinkFrame;
use crate::log::{Chain, Entry, decode_run, encode_run, join_bodies};

/// An origin on its way to one peer.
#[derive(Debug)]
pub(super) struct Stream {
    /// What was sent, up to here.
    cursor: Seq,
    /// The chain that the peer says it has at the cursor, until it was compared with the log's.
    claimed: Option<Chain>,
    in_flight: VecDeque<InFlight>,
    reading: bool,
    /// No read before this moment: the last one failed.
    retry_at: Moment,
}

#[derive(Debug)]
struct InFlight {
    last: Seq,
    bytes: usize,
    catching_up: bool,
}

/// What a read was turned into.
enum Cut {
    /// In order, at least one.
    Frames(Vec<LogSlice>),
    /// The log's chain at the cursor is another.
    Forked,
    /// The log does not hold the entry after the cursor.
    Nothing,
}

impl Link {
    /// Gives the room back that a frame took in the windows.
    fn arrived(&mut self, sent: &InFlight) {
        self.in_flight_bytes -= sent.bytes;
        self.catching_up_bytes -= if sent.catching_up { sent.bytes } else { 0 };
    }
}

impl Replica {
    pub(super) fn subscribed(&mut self, now: Moment, link: LinkId, id: OriginId, after: Seq, chain: Chain) {
        self.unsubscribed(now, link, id);
        let Some(origin) = self.origins.get(&id) else { return };
        let Some(known) = self.links.get(&link) else { return };
        if origin.forked || !self.may_send(known, &origin.group) {
            return;
        }
        if after == origin.durable.0 && !agree(chain, origin.durable.1) {
            return self.fork(now, id, after);
        }
        let stream = Stream {
            cursor: after,
            claimed: (after > Seq(0) && after != origin.durable.0).then_some(chain),
            in_flight: VecDeque::new(),
            reading: false,
            retry_at: now,
        };
        let known = self.links.get_mut(&link).expect("it was there a moment ago");
        known.streams.insert(id, stream);
        known.due.insert(id);
        self.pump_link(now, link);
    }

    pub(super) fn unsubscribed(&mut self, now: Moment, link: LinkId, id: OriginId) {
        let Some(known) = self.links.get_mut(&link) else { return };
        let Some(stream) = known.streams.remove(&id) else { return };
        stream.in_flight.iter().for_each(|sent| known.arrived(sent));
        self.pump_link(now, link);
    }

    /// The peer has everything up to `seq`.
    pub(super) fn acknowledged(&mut self, now: Moment, link: LinkId, id: OriginId, seq: Seq) {
        let Some(known) = self.links.get_mut(&link) else { return };
        while let Some(sent) =
            known.streams.get_mut(&id).and_then(|it| it.in_flight.pop_front_if(|sent| sent.last <= seq))
        {
            known.arrived(&sent);
        }
        self.pump_link(now, link);
    }

    /// Goes on with an origin on every link: more of it is durable.
    pub(super) fn pump_origin(&mut self, now: Moment, id: OriginId) {
        let streaming = self.links.iter_mut().filter(|(_, it)| it.streams.contains_key(&id));
        let links: Vec<LinkId> = streaming
            .map(|(link, known)| {
                known.due.insert(id);
                *link
            })
            .collect();
        links.into_iter().for_each(|link| self.pump_link(now, link));
    }

    /// Reads for the link's streams as far as its windows allow; for those that are nearly in step first.
    pub(super) fn pump_link(&mut self, now: Moment, link: LinkId) {
        let Some(known) = self.links.get_mut(&link) else { return };
        let mut due: Vec<(u64, OriginId)> = Vec::new();
        known.due.retain(|id| {
            let durable = self.origins.get(id).map_or(Seq(0), |origin| origin.durable.0);
            let Some(stream) = known.streams.get(id) else { return false };
            // One that is being read for comes back with the answer.
            let waits = !stream.reading && stream.cursor < durable;
            if waits && now >= stream.retry_at {
                due.push((durable.0 - stream.cursor.0, *id));
            }
            waits
        });
        due.sort_unstable();
        for (behind, id) in due {
            // What reads may bring that are under way counts as sent.
            let catches_up = behind > CATCH_UP_ENTRIES;
            let used = known.in_flight_bytes + known.reads * ENTRIES_BYTES;
            let catching_up = known.catching_up_bytes + known.reads * ENTRIES_BYTES;
            if used >= LINK_WINDOW_BYTES || catches_up && catching_up >= CATCH_UP_WINDOW_BYTES {
                break;
            }
            let stream = known.streams.get_mut(&id).expect("it was found there");
            stream.reading = true;
            known.reads += 1;
            known.due.remove(&id);
            let after = stream.cursor;
            self.effects.push(Effect::ReadLog { link, origin: id, after, bytes_max: ENTRIES_BYTES });
        }
    }

    /// The answer to an [`Effect::ReadLog`], whose cursor was `after`.
    pub fn log_read(&mut self, now: Moment, link: LinkId, id: OriginId, after: Seq, read: LogRead) {
        let Some(origin) = self.origins.get(&id) else { return };
        let durable = origin.durable.0;
        let Some(known) = self.links.get_mut(&link) else { return };
        known.reads = known.reads.saturating_sub(1);
        known.due.insert(id);
        let Some(stream) = known.streams.get_mut(&id).filter(|it| it.reading && it.cursor == after) else {
            // It is of a subscription that was renewed meanwhile.
            return self.pump_link(now, link);
        };
        stream.reading = false;
        let runs = match read {
            LogRead::Runs(runs) => runs,
            LogRead::Truncated { floor } => {
                self.unsubscribed(now, link, id);
                return self.send(link, LinkFrame::Truncated { origin: id, floor });
            }
            LogRead::Failed => Vec::new(),
        };
        match cut(after, stream.claimed, &runs, durable) {
            Cut::Forked => self.fork(now, id, after),
            Cut::Nothing => stream.retry_at = Moment(now.0 + READ_RETRY_MS),
            Cut::Frames(frames) => self.send_frames(link, id, frames, durable),
        }
        self.pump_link(now, link);
    }

    fn send_frames(&mut self, link: LinkId, id: OriginId, frames: Vec<LogSlice>, durable: Seq) {
        let Some(known) = self.links.get_mut(&link) else { return };
        let Some(stream) = known.streams.get_mut(&id) else { return };
        let catching_up = durable.0 - stream.cursor.0 > CATCH_UP_ENTRIES;
        stream.claimed = None;
        for LogSlice { first, last, chain_before: chain, body } in frames {
            stream.cursor = last;
            known.in_flight_bytes += body.len();
            known.catching_up_bytes += if catching_up { body.len() } else { 0 };
            stream.in_flight.push_back(InFlight { last, bytes: body.len(), catching_up });
            let frame = LinkFrame::Entries { origin: id, first, chain, body };
            self.effects.push(match catching_up {
                true => Effect::SendCatchUp { link, frame },
                false => Effect::Send { link, frame },
            });
        }
    }
}

/// Cuts what was read into frames that begin after the cursor.
fn cut(cursor: Seq, claimed: Option<Chain>, runs: &[LogSlice], durable: Seq) -> Cut {
    let Some((first, more)) = runs.split_first() else { return Cut::Nothing };
    if first.first.0 > cursor.0 + 1 || first.last <= cursor {
        return Cut::Nothing;
    }
    let Some(first) = after_cursor(cursor, first) else { return Cut::Nothing };
    if claimed.is_some_and(|chain| !agree(chain, first.chain_before)) {
        return Cut::Forked;
    }
    let mut slices = vec![first];
    slices.extend(more.iter().cloned());
    // The log may hold what this replica has not been told of yet: it is not durable for all it knows.
    slices.retain(|slice| slice.last <= durable);
    match slices.is_empty() {
        true => Cut::Nothing,
        false => Cut::Frames(join(slices)),
    }
}

/// The part of a run that is after the cursor, with the chain there; `None` if the run does not decode.
fn after_cursor(cursor: Seq, run: &LogSlice) -> Option<LogSlice> {
    if run.first.0 == cursor.0 + 1 {
        return Some(run.clone());
    }
    let entries = decode_run(&run.body).ok()?;
    let skip = usize::try_from(cursor.0 + 1 - run.first.0).ok()?;
    let (skipped, rest) = entries.split_at_checked(skip)?;
    Some(LogSlice {
        first: Seq(cursor.0 + 1),
        last: run.last,
        chain_before: run.chain_before.after_all(skipped),
        body: encode_run(rest).into(),
    })
}

/// Puts small runs together and takes large ones apart.
fn join(slices: Vec<LogSlice>) -> Vec<LogSlice> {
    let mut frames = Vec::new();
    let mut gathered: Vec<LogSlice> = Vec::new();
    let mut bytes = 0;
    for slice in slices {
        if bytes + slice.body.len() > ENTRIES_BYTES && !gathered.is_empty() {
            frames.push(joined(&gathered));
            gathered.clear();
            bytes = 0;
        }
        if slice.body.len() > 2 * ENTRIES_BYTES {
            frames.extend(split(slice));
        } else {
            bytes += slice.body.len();
            gathered.push(slice);
        }
    }
    if !gathered.is_empty() {
        frames.push(joined(&gathered));
    }
    frames
}

fn joined(slices: &[LogSlice]) -> LogSlice {
    let bodies: Vec<Bytes> = slices.iter().map(|slice| slice.body.clone()).collect();
    let (first, last) = (&slices[0], &slices[slices.len() - 1]);
    LogSlice {
        first: first.first,
        last: last.last,
        chain_before: first.chain_before,
        body: join_bodies(&bodies),
    }
}

/// Cuts a large run into parts of about the size of a frame. One that does not decode goes out whole: the receiver says
/// what is wrong with it.
fn split(slice: LogSlice) -> Vec<LogSlice> {
    let Ok(entries) = decode_run(&slice.body) else { return vec![slice] };
    let mut parts = Vec::new();
    let (mut first, mut chain_before) = (slice.first, slice.chain_before);
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let mut bytes = 0;
        let fitting = rest.iter().take_while(|entry| {
            bytes += entry_bytes(entry);
            bytes <= ENTRIES_BYTES
        });
        let (part, later) = rest.split_at(fitting.count().max(1));
        let last = Seq(first.0 + part.len() as u64 - 1);
        parts.push(LogSlice { first, last, chain_before, body: encode_run(part).into() });
        (first, chain_before, rest) = (Seq(last.0 + 1), chain_before.after_all(part), later);
    }
    parts
}

fn entry_bytes(entry: &Entry) -> usize {
    match &entry.content {
        crate::log::Content::Change { bytes, .. } => bytes.len() + 8,
        _ => 64,
    }
}
