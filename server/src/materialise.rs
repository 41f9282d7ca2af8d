//! The few places where a document is opened with the CRDT: bounded, off the async threads, guarded.
//!
//! Relaying never comes here. Automerge may panic on input that it was never meant to see and takes tens of times a
//! document's size in memory, so every use runs on a blocking thread, under a budget of bytes, and inside
//! `catch_unwind`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use automerge::Automerge;
use bytes::Bytes;
use isobar_protocol::ids::ChangeHash;

use crate::commit::ByteBudget;
use crate::telemetry::{MaterialiseReason, Metrics};

/// Memory that materialised documents may take at once.
const BUDGET_BYTES: usize = 1 << 30;

/// How much memory Automerge takes for a byte of compact document, roughly: 33 to 68 MiB were measured for 140 KB
/// with 136,000 operations.
const BYTES_PER_DOCUMENT_BYTE: usize = 300;

/// The same for a byte of raw change chunks: 75 to 147 MiB for 5.5 MB.
const BYTES_PER_CHANGE_BYTE: usize = 27;

/// Why a document could not be materialised. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum MaterialiseError {
    /// Automerge refused the bytes.
    #[error("automerge refuses it: {0}")]
    Refused(String),
    /// Automerge panicked.
    #[error("automerge panicked on it")]
    Panicked,
    /// It applied, but to something else than it should have.
    #[error("the result has other heads than the changes that went in")]
    OtherHeads,
}

/// The bounded pool.
#[derive(Clone)]
pub struct Materialiser {
    budget: ByteBudget,
    metrics: Arc<Metrics>,
}

impl Materialiser {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { budget: ByteBudget::new(BUDGET_BYTES), metrics }
    }

    /// Splits document and bundle chunks into their changes.
    pub async fn split(
        &self,
        reason: MaterialiseReason,
        chunk: Bytes,
        is_bundle: bool,
    ) -> Result<Vec<Bytes>, MaterialiseError> {
        let bytes = chunk.len().saturating_mul(BYTES_PER_DOCUMENT_BYTE);
        self.run(reason, bytes, move || if is_bundle { split_bundle(&chunk) } else { split_document(&chunk) })
            .await
    }

    /// Makes the chunk of a base from the old one and the changes since, and proves it: it loads again, and has
    /// exactly the expected heads.
    pub async fn make_base(
        &self,
        old: Option<Bytes>,
        changes: Vec<Bytes>,
        heads: Vec<ChangeHash>,
    ) -> Result<Bytes, MaterialiseError> {
        let old_bytes = old.as_ref().map_or(0, Bytes::len);
        let change_bytes: usize = changes.iter().map(Bytes::len).sum();
        let bytes = old_bytes * BYTES_PER_DOCUMENT_BYTE + change_bytes * BYTES_PER_CHANGE_BYTE;
        self.run(MaterialiseReason::Compaction, bytes, move || make_base(old, &changes, &heads)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        reason: MaterialiseReason,
        bytes: usize,
        job: impl FnOnce() -> Result<T, MaterialiseError> + Send + 'static,
    ) -> Result<T, MaterialiseError> {
        let permit = self.budget.acquire(bytes).await;
        self.metrics.materialised(reason);
        let done = tokio::task::spawn_blocking(move || {
            // Held by the thread, not the caller: a caller that goes away does not free the memory.
            let _permit = permit;
            // Everything the job touches is its own and dropped with it.
            catch_unwind(AssertUnwindSafe(job)).unwrap_or(Err(MaterialiseError::Panicked))
        });
        done.await.unwrap_or(Err(MaterialiseError::Panicked))
    }
}

fn refused(error: automerge::AutomergeError) -> MaterialiseError {
    MaterialiseError::Refused(error.to_string())
}

fn split_document(chunk: &[u8]) -> Result<Vec<Bytes>, MaterialiseError> {
    let document = Automerge::load(chunk).map_err(refused)?;
    Ok(document.get_changes(&[]).into_iter().map(|change| change.raw_bytes().to_vec().into()).collect())
}

fn split_bundle(chunk: &[u8]) -> Result<Vec<Bytes>, MaterialiseError> {
    let to_error = |error: String| MaterialiseError::Refused(error);
    let bundle = automerge::Bundle::try_from(chunk).map_err(|error| to_error(error.to_string()))?;
    let changes = bundle.to_changes().map_err(|error| to_error(error.to_string()))?;
    Ok(changes.into_iter().map(|change| change.raw_bytes().to_vec().into()).collect())
}

fn make_base(old: Option<Bytes>, changes: &[Bytes], heads: &[ChangeHash]) -> Result<Bytes, MaterialiseError> {
    let mut document = match old {
        Some(chunk) => Automerge::load(&chunk).map_err(refused)?,
        None => Automerge::new(),
    };
    document.load_incremental(&changes.concat()).map_err(refused)?;
    expect_heads(&document, heads)?;
    let chunk = document.save();
    drop(document);
    expect_heads(&Automerge::load(&chunk).map_err(refused)?, heads)?;
    Ok(chunk.into())
}

fn expect_heads(document: &Automerge, heads: &[ChangeHash]) -> Result<(), MaterialiseError> {
    let mut found: Vec<[u8; 32]> = document.get_heads().into_iter().map(|head| head.0).collect();
    let mut expected: Vec<[u8; 32]> = heads.iter().map(|head| head.0).collect();
    found.sort_unstable();
    expected.sort_unstable();
    if found == expected { Ok(()) } else { Err(MaterialiseError::OtherHeads) }
}
