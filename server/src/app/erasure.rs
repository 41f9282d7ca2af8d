//! Erasing what deleted documents have left in stored logs.
//!
//! Each node does it, also for deletions that came by another: steps of several nodes are harmless beside each other, and
//! none has to know whether another is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::node::Node;

/// How often deletions are looked for, which is one cheap question.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs that one step reads at most: on SQLite commits wait for it.
const STEP_RUNS_MAX: usize = 256;

/// Erases deletions now and then; to be run as a task.
pub(super) async fn run(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        while erase_some(&node).await {}
    }
}

/// One step, and as long a pause, so that others have the database for half of the time at least. Returns whether something
/// is left to do at once.
async fn erase_some(node: &Node) -> bool {
    let begun = Instant::now();
    match node.storage.erase_step(STEP_RUNS_MAX).await {
        Ok(step) => {
            node.metrics.log_runs_erased.increment(step.runs_erased);
            node.metrics.deletions_unerased.set(step.deletions_left as f64);
            if step.deletions_left > 0 {
                tokio::time::sleep(begun.elapsed()).await;
            }
            step.deletions_left > 0
        }
        Err(error) => {
            tracing::warn!(%error, "deleted documents not erased from the log yet");
            false
        }
    }
}
