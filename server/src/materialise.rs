//! The few places where a document is opened with the CRDT: bounded, off the async threads, guarded.
//!
//! Relaying never comes here. Automerge may panic on input that it was never meant to see and takes tens of times a
//! document's size in memory, so every use runs on a blocking thread, under a budget of bytes, and inside
//! `catch_unwind`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use automerge::Automerge;
use bytes::Bytes;
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{census, chunks};
use isobar_protocol::config::Limits;
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
    /// It has more operations than are opened in this process, whatever its size in bytes.
    #[error("more than {operations_max} operations")]
    TooLarge { operations_max: u64 },
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
        limits: Limits,
    ) -> Result<Bytes, MaterialiseError> {
        let old_bytes = old.as_ref().map_or(0, Bytes::len);
        let change_bytes: usize = changes.iter().map(Bytes::len).sum();
        let bytes = old_bytes * BYTES_PER_DOCUMENT_BYTE + change_bytes * BYTES_PER_CHANGE_BYTE;
        self.run(MaterialiseReason::Compaction, bytes, move || {
            check_operations(old.as_ref(), &changes, &limits)?;
            make_base(old, &changes, &heads)
        })
        .await
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

/// Memory goes by operations, and a change of 70 bytes can claim millions of them. Counted without opening anything.
fn check_operations(old: Option<&Bytes>, changes: &[Bytes], limits: &Limits) -> Result<(), MaterialiseError> {
    let too_large = MaterialiseError::TooLarge { operations_max: limits.document_ops_max };
    let unlimited = Limits::stored();
    let refused = |error: &dyn std::error::Error| MaterialiseError::Refused(error.to_string());
    let mut operations: u64 = 0;
    for chunk in old.into_iter().flat_map(|old| chunks(old.clone())) {
        let census = census(&chunk.map_err(|error| refused(&error))?, &unlimited);
        operations = operations.saturating_add(census.map_err(|error| refused(&error))?.operations);
    }
    for change in changes {
        let change = Change::decode(change.clone(), &unlimited).map_err(|error| refused(&error))?;
        operations = operations.saturating_add(change.op_count);
        if operations > limits.document_ops_max {
            return Err(too_large);
        }
    }
    if operations > limits.document_ops_max { Err(too_large) } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use automerge::transaction::Transactable;
    use automerge::{AutoCommit, ObjType, ROOT};

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer_and_frees_what_it_had() {
        let materialiser = Materialiser::new(Arc::new(Metrics::new()));
        for _ in 0..3 {
            // Each takes the whole budget, so the next waits for ever if one is not given back.
            let job = || -> Result<(), MaterialiseError> { panic!("as automerge does") };
            let outcome = materialiser.run(MaterialiseReason::Upload, BUDGET_BYTES, job).await;
            assert!(matches!(outcome, Err(MaterialiseError::Panicked)));
        }
        assert_eq!(materialiser.budget.used_bytes(), 0);
    }

    #[tokio::test]
    async fn a_base_of_too_many_operations_is_refused_before_anything_is_opened() {
        let mut document = AutoCommit::new();
        let text = document.put_object(ROOT, "text", ObjType::Text).unwrap();
        document.splice_text(&text, 0, 0, &"x".repeat(99)).unwrap();
        let heads: Vec<ChangeHash> = document.get_heads().iter().map(|head| ChangeHash(head.0)).collect();
        let changes: Vec<Bytes> =
            document.get_changes(&[]).iter().map(|change| change.raw_bytes().to_vec().into()).collect();
        let materialiser = Materialiser::new(Arc::new(Metrics::new()));
        let enough = Limits { document_ops_max: 100, ..Limits::default() };
        let base = materialiser.make_base(None, changes.clone(), heads.clone(), enough).await.unwrap();

        let too_few = Limits { document_ops_max: 99, ..Limits::default() };
        let refused = materialiser.make_base(None, changes, heads.clone(), too_few.clone()).await;
        assert!(matches!(refused, Err(MaterialiseError::TooLarge { operations_max: 99 })));
        let refused = materialiser.make_base(Some(base), Vec::new(), heads, too_few).await;
        assert!(matches!(refused, Err(MaterialiseError::TooLarge { operations_max: 99 })));
    }
}
