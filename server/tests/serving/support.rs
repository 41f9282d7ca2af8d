//! What the tests stand on: a node, its clients, and a storage that can be held, failed and killed.

use std::time::Duration;

mod client;
mod line;
mod node;
mod storage;

pub use client::{Client, Ended, Heard, document_id, number, put};
pub use node::{Node, ask, get, linked_to, settings};
pub use storage::{Faults, FaultyStorage, append};

/// How long anything may take that is expected to happen. Far beyond what it takes, so that a busy machine fails
/// no test.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How often a condition is looked at that nothing announces.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Waits for something that has to happen, and fails the test if it does not in time.
pub async fn in_time<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, event).await {
        Ok(value) => value,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// Waits until a condition holds.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    in_time(what, async {
        while !condition().await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    })
    .await;
}
