//! How fast one link may send: a budget of bytes a second.
//!
//! What is sent is paid for afterwards: the next that can wait goes when the time has passed that it took. So a message of any
//! size can go, and nothing that cannot wait has to.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Time that was not used and may be made up for: timers wake late by about a tenth of it.
const UNUSED_MAX: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: Option<NonZeroU64>,
    free_at: Instant,
}

impl Pace {
    pub(super) fn new(bytes_per_second: Option<NonZeroU64>, now: Instant) -> Self {
        Self { bytes_per_second, free_at: now }
    }

    /// When the next message may go that can wait; nothing if there is no limit.
    pub(super) fn free_at(&self) -> Option<Instant> {
        self.bytes_per_second.map(|_| self.free_at)
    }

    /// Counts what was sent.
    pub(super) fn sent(&mut self, now: Instant, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        let earliest = now.checked_sub(UNUSED_MAX).unwrap_or(now);
        let took = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        self.free_at = self.free_at.max(earliest) + took;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holds_as_many_bytes_as_the_limit_says() {
        let start = Instant::now();
        let mut pace = Pace::new(NonZeroU64::new(100_000), start);
        let (mut now, mut sent) = (start, 0);
        while now - start < Duration::from_secs(10) {
            pace.sent(now, 7_000);
            sent += 7_000;
            // Late now and then.
            now = pace.free_at().unwrap().max(now) + Duration::from_millis(1);
        }
        assert!((985_000..=1_010_000).contains(&sent), "{sent} bytes in 10 seconds");
    }

    #[test]
    fn silence_is_not_saved_up() {
        let start = Instant::now();
        let mut pace = Pace::new(NonZeroU64::new(100_000), start);
        let later = start + Duration::from_secs(60);
        pace.sent(later, 50_000);
        assert_eq!(pace.free_at(), Some(later + Duration::from_millis(490)));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut pace = Pace::new(None, Instant::now());
        pace.sent(Instant::now(), usize::MAX);
        assert_eq!(pace.free_at(), None);
    }
}
