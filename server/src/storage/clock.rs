//! The time of day, for what is stored with its moment.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds of Unix time.
pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, clamped_ms)
}

/// The moment that was `ago` before now, in milliseconds of Unix time.
pub(super) fn before_now_ms(ago: Duration) -> i64 {
    now_ms().saturating_sub(clamped_ms(ago))
}

fn clamped_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
