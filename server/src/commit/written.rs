//! Which parts of other origins' logs this node stored itself, for whoever reads the logs behind it: what went through its own
//! documents need not be looked at again.
//!
//! Nothing depends on it: a part that is not remembered is read and found known.

use std::collections::{HashMap, VecDeque};

use isobar_protocol::ids::{OriginId, Seq};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Parts remembered of an origin. They are usually one, which grows; nodes that take turns make more.
const PARTS_MAX: usize = 64;

/// Origins of which parts are remembered.
const ORIGINS_MAX: usize = 4_096;

/// See the module.
#[derive(Debug, Default)]
pub struct Written {
    parts: Mutex<HashMap<OriginId, VecDeque<(Seq, Seq)>>>,
    /// Told of every commit that appended to a log, also of this node's own.
    appended: Notify,
}

impl Written {
    /// Remembers that entries `first` to `last` were stored here.
    pub(super) fn note(&self, origin: OriginId, first: Seq, last: Seq) {
        let mut all = self.parts.lock();
        if all.len() >= ORIGINS_MAX && !all.contains_key(&origin) {
            all.clear();
        }
        let parts = all.entry(origin).or_default();
        match parts.back_mut() {
            Some((_, end)) if end.0 + 1 == first.0 => *end = last,
            _ => parts.push_back((first, last)),
        }
        if parts.len() > PARTS_MAX {
            parts.pop_front();
        }
    }

    pub(super) fn appended(&self) {
        self.appended.notify_one();
    }

    /// Resolves when something was appended since this resolved last. For one task.
    pub async fn wait(&self) {
        self.appended.notified().await;
    }

    /// How far everything after `position` was stored here; `position` if the next entry was not. What is before is forgotten.
    pub fn reach(&self, origin: OriginId, mut position: Seq) -> Seq {
        let mut all = self.parts.lock();
        let Some(parts) = all.get_mut(&origin) else { return position };
        parts.retain(|(first, last)| {
            if first.0 <= position.0 + 1 && *last > position {
                position = *last;
            }
            *last > position
        });
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_the_position_without_a_gap_was_written_here() {
        let (written, origin) = (Written::default(), OriginId(uuid::Uuid::from_u128(1)));
        written.note(origin, Seq(3), Seq(4));
        written.note(origin, Seq(5), Seq(6));
        written.note(origin, Seq(9), Seq(9));
        assert_eq!(written.reach(origin, Seq(1)), Seq(1), "entry 2 is a sibling's");
        assert_eq!(written.reach(origin, Seq(2)), Seq(6));
        assert_eq!(written.reach(origin, Seq(6)), Seq(6));
        assert_eq!(written.reach(origin, Seq(8)), Seq(9));
        assert_eq!(written.reach(OriginId(uuid::Uuid::from_u128(2)), Seq(0)), Seq(0));
    }
}
