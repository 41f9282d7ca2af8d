//! Reading logs for other regions, and looking at what was read before any of it is sent.
//!
//! Disks forget. A peer that is sent damaged entries closes the link, or takes the log for another one and refuses it for
//! good, and all documents wait for one bad row. So a run whose entries are not those that the chain counts is served to
//! nobody: the log counts as given up to its end, and who is behind it fetches the documents themselves.

use std::sync::Arc;

use isobar_protocol::ids::{OriginId, Seq};
use isobar_protocol::log::{Chain, RunError, measure_run};
use isobar_protocol::replica::{LogRead, LogSlice};

use crate::storage::{Storage, StorageError, StoredRun};
use crate::telemetry::Metrics;

/// More bytes than this are looked at on a blocking thread: hashing them takes a while, and clients wait for this one.
const CHECK_INLINE_BYTES: usize = 16 << 10;

/// A run as it may be sent.
pub fn slice(run: StoredRun) -> LogSlice {
    LogSlice { first: run.first, last: run.last, chain_before: run.chain_before, body: run.body }
}

/// Reads the entries of an origin after `after`. `end` is where this node knows the log to stand, if it knows it.
pub async fn read(
    storage: &Arc<dyn Storage>,
    metrics: &Metrics,
    origin: OriginId,
    after: Seq,
    bytes_max: usize,
    end: Option<(Seq, Chain)>,
) -> LogRead {
    let runs = match storage.read_log(origin, after, bytes_max).await {
        Ok(runs) => runs,
        Err(StorageError::Truncated { floor }) => return LogRead::Truncated { floor },
        Err(error) => {
            tracing::warn!(%error, "log not read");
            return LogRead::Failed;
        }
    };
    let Some(last) = runs.last().map(|run| run.last) else { return LogRead::Runs(Vec::new()) };
    let chain_after = match end {
        Some((seq, chain)) if seq == last => Some(chain),
        _ => chain_before_next(storage, origin, last).await,
    };
    let bytes: usize = runs.iter().map(|run| run.body.len()).sum();
    let check = move || sound(runs, chain_after);
    let (runs, damage) = match bytes > CHECK_INLINE_BYTES {
        false => check(),
        true => match tokio::task::spawn_blocking(check).await {
            Ok(checked) => checked,
            Err(_) => return LogRead::Failed,
        },
    };
    if let Some(Damage { first, last, what }) = damage {
        metrics.log_runs_damaged.increment(1);
        tracing::error!(origin = %origin.0, first = first.0, last = last.0, %what,
            "stored log entries are damaged; regions behind them fetch documents instead");
        if runs.is_empty() {
            return LogRead::Truncated { floor: last };
        }
    }
    LogRead::Runs(runs.into_iter().map(slice).collect())
}

/// The chain at `seq` as the run after it has it.
async fn chain_before_next(storage: &Arc<dyn Storage>, origin: OriginId, seq: Seq) -> Option<Chain> {
    let next = storage.read_log(origin, seq, 1).await.ok()?;
    next.first().filter(|run| run.first.0 == seq.0 + 1).map(|run| run.chain_before)
}

/// The first run that is not what it was.
#[derive(Debug, PartialEq, Eq)]
struct Damage {
    first: Seq,
    last: Seq,
    what: Fault,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Unreadable(#[from] RunError),
    #[error("it holds {found} entries")]
    Count { found: u64 },
    #[error("the chain after it is another")]
    Chain,
}

/// The runs before the first that is damaged, and what is wrong with that one.
fn sound(mut runs: Vec<StoredRun>, chain_after: Option<Chain>) -> (Vec<StoredRun>, Option<Damage>) {
    for place in 0..runs.len() {
        let run = &runs[place];
        let expected = runs.get(place + 1).map(|next| next.chain_before).or(chain_after);
        if let Err(what) = check(run, expected) {
            let damage = Damage { first: run.first, last: run.last, what };
            runs.truncate(place);
            return (runs, Some(damage));
        }
    }
    (runs, None)
}

fn check(run: &StoredRun, expected: Option<Chain>) -> Result<(), Fault> {
    let (found, chain) = measure_run(run.chain_before, &run.body)?;
    if run.first.0.checked_add(found) != run.last.0.checked_add(1) {
        return Err(Fault::Count { found });
    }
    match expected.is_none_or(|expected| expected == chain) {
        true => Ok(()),
        false => Err(Fault::Chain),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use isobar_protocol::ids::{ChangeHash, DocumentId};
    use isobar_protocol::log::{Content, Entry, encode_run};

    use super::*;

    fn entries(number: u8) -> [Entry; 2] {
        let document = DocumentId::from_slice(&[number; 16]).unwrap();
        let erased = Content::Erased { hash: ChangeHash([number; 32]) };
        let tombstone = Content::Tombstone { deleted_at_ms: u64::from(number) };
        [erased, tombstone].map(|content| Entry { document: document.clone(), content })
    }

    /// Three runs of two entries, and the chain after them.
    fn log() -> (Vec<StoredRun>, Chain) {
        let mut chain = Chain::START;
        let runs = (0..3).map(|number| {
            let entries = entries(number);
            let chain_before = chain;
            chain = chain.after_all(&entries);
            let (first, last) = (Seq(u64::from(number) * 2 + 1), Seq(u64::from(number) * 2 + 2));
            StoredRun { first, last, chain_before, body: encode_run(&entries).into() }
        });
        (runs.collect(), chain)
    }

    fn damaged(spoil: impl FnOnce(&mut Vec<StoredRun>)) -> (usize, Option<Fault>) {
        let (mut runs, chain) = log();
        spoil(&mut runs);
        let (sound, damage) = sound(runs, Some(chain));
        (sound.len(), damage.map(|it| it.what))
    }

    fn flip(run: &mut StoredRun, at: usize) {
        let mut body = run.body.to_vec();
        body[at] ^= 1;
        run.body = Bytes::from(body);
    }

    #[test]
    fn what_is_as_it_was_is_served_whole() {
        assert_eq!(damaged(|_| {}), (3, None));
        let (runs, _) = log();
        assert_eq!(sound(runs, None).1, None, "what follows may not be known");
    }

    #[test]
    fn every_flipped_bit_of_a_run_is_noticed() {
        let length = log().0[1].body.len();
        for at in 0..length {
            let (sound, damage) = damaged(|runs| flip(&mut runs[1], at));
            assert_eq!(sound, 1, "byte {at}: {damage:?}");
        }
        let (_, damage) = damaged(|runs| flip(&mut runs[1], 4));
        assert_eq!(damage, Some(Fault::Chain), "another document");
        assert!(matches!(damaged(|runs| flip(&mut runs[2], 0)), (2, Some(Fault::Unreadable(_)))));
    }

    #[test]
    fn a_run_with_other_entries_or_after_another_chain_is_noticed() {
        let (_, damage) = damaged(|runs| runs[1].body = encode_run(&entries(1)[..1]).into());
        assert_eq!(damage, Some(Fault::Count { found: 1 }));
        assert_eq!(damaged(|runs| runs[2].chain_before.0[3] ^= 1), (1, Some(Fault::Chain)));
        assert_eq!(damaged(|runs| runs[0].chain_before.0[3] ^= 1), (0, Some(Fault::Chain)));
        let (runs, mut chain) = log();
        chain.0[0] ^= 1;
        assert_eq!(sound(runs, Some(chain)).0.len(), 2, "the end is where it is known to be");
    }
}
