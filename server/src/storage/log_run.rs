//! How a run of consecutive log entries is packed into one row, and what a refused append turns out to be.
//!
//! One append writes one run. An entry's seq is not stored: it follows from the run's first seq and the entry's
//! place. A run is, in this order and without padding:
//!
//! ```text
//! run      = version section*          version: one byte, 1
//! section  = id_length id count hash*  id_length: one byte; count: unsigned LEB128, at least 1
//! hash     = 32 bytes
//! ```
//!
//! A section holds entries of one document that follow each other, so that an id stands once for all of them. The
//! same batch always packs to the same bytes; that is what a repeated append is recognised by.

use isobar_protocol::ids::{ChangeHash, DocumentId, Incarnation, Seq};

use super::packing::{push_leb128, take, take_leb128};
use super::{ClaimedOrigin, DocumentAppend, LogEntry, StorageError};

const VERSION: u8 = 1;

/// A stored run that does not decode: the database is damaged, or a newer program wrote it.
#[derive(Debug, thiserror::Error)]
#[error("log run {first:?}..={last:?} does not decode")]
pub(super) struct DamagedRun {
    first: Seq,
    last: Seq,
}

/// A run of entries as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogRun {
    pub first: Seq,
    pub last: Seq,
    pub entries: Vec<u8>,
}

impl LogRun {
    /// Packs a batch; `None` if it holds no change.
    ///
    /// # Panics
    /// If `first` is 0, or the seqs would exceed what the databases count with (2^63 − 1).
    pub fn pack(first: Seq, batch: &[DocumentAppend]) -> Option<Self> {
        assert!(first.0 > 0, "the first entry of a log is 1");
        let count: u64 = batch.iter().map(|append| append.changes.len() as u64).sum();
        let end = first.0.checked_add(count).expect("seqs stay below 2^63");
        assert!(i64::try_from(end).is_ok(), "seqs stay below 2^63");
        let last = Seq(end - 1);
        let mut entries = Vec::with_capacity(1 + batch.len() * 20 + count as usize * 32);
        entries.push(VERSION);
        for append in batch.iter().filter(|append| !append.changes.is_empty()) {
            let id = append.document.as_bytes();
            entries.push(u8::try_from(id.len()).expect("a document id is at most 64 bytes"));
            entries.extend_from_slice(id);
            push_leb128(&mut entries, append.changes.len() as u64);
            append.changes.iter().for_each(|change| entries.extend_from_slice(change.hash.as_bytes()));
        }
        (count > 0).then_some(Self { first, last, entries })
    }

    /// The entries of the run with a seq above `after`, at most `limit` of them.
    pub fn unpack(&self, after: Seq, limit: usize) -> Result<Vec<LogEntry>, DamagedRun> {
        let mut unpacked = Vec::new();
        let end = decode(&self.entries, self.first, |seq, document, hash| {
            if seq > after && unpacked.len() < limit {
                unpacked.push(LogEntry { seq, document: document.clone(), hash });
            }
        });
        match end {
            Some(end) if end.0 == self.last.0 + 1 => Ok(unpacked),
            _ => Err(DamagedRun { first: self.first, last: self.last }),
        }
    }
}

/// Calls `each` for every entry and returns the seq after the last one; `None` if the bytes are not a run.
fn decode(mut bytes: &[u8], first: Seq, mut each: impl FnMut(Seq, &DocumentId, ChangeHash)) -> Option<Seq> {
    if take(&mut bytes, 1)? != [VERSION] {
        return None;
    }
    let mut seq = first;
    while !bytes.is_empty() {
        let id_length = usize::from(take(&mut bytes, 1)?[0]);
        let document = DocumentId::from_slice(take(&mut bytes, id_length)?).ok()?;
        let count = usize::try_from(take_leb128(&mut bytes)?).ok()?;
        for hash in take(&mut bytes, count.checked_mul(32)?)?.chunks_exact(32) {
            each(seq, &document, ChangeHash::from_slice(hash).ok()?);
            seq = Seq(seq.0 + 1);
        }
    }
    Some(seq)
}

/// Gathers up to `limit` entries after `after` from runs that follow each other (clause 8).
pub(super) fn gather(runs: &[LogRun], after: Seq, limit: usize) -> Result<Vec<LogEntry>, StorageError> {
    let Some(oldest) = runs.first() else {
        return Ok(Vec::new());
    };
    if oldest.first.0 > after.0 + 1 {
        return Err(StorageError::Truncated { floor: Seq(oldest.first.0 - 1) });
    }
    let mut entries: Vec<LogEntry> = Vec::new();
    let mut next = oldest.first;
    for run in runs {
        if run.first != next {
            return Err(StorageError::Fatal(Box::new(DamagedRun { first: next, last: run.last })));
        }
        next = Seq(run.last.0 + 1);
        let more = run.unpack(after, limit - entries.len());
        entries.extend(more.map_err(|damage| StorageError::Fatal(Box::new(damage)))?);
        if entries.len() == limit {
            break;
        }
    }
    Ok(entries)
}

/// What an implementation finds in place of the counter that an append expected.
pub(super) struct FoundCounter {
    pub incarnation: Incarnation,
    pub seq: Seq,
    /// The run that ends where the refused batch would have ended.
    pub run_at_end: Option<LogRun>,
}

/// Decides about an append whose counter was not where it should be (clauses 4 and 5): it is already stored, or
/// the origin was claimed by another node.
///
/// # Panics
/// If the incarnation is current and the batch is not the one that was stored last: two writers share an
/// incarnation.
pub(super) fn judge_refused(
    origin: &ClaimedOrigin,
    run: &LogRun,
    found: FoundCounter,
) -> Result<Seq, StorageError> {
    let already_stored = found.run_at_end.as_ref() == Some(run);
    let current = found.incarnation == origin.incarnation;
    // A batch that committed before the origin was claimed is safe, and saying otherwise would be untrue.
    if already_stored && (!current || found.seq == run.last) {
        return Ok(run.last);
    }
    assert!(
        !current,
        "origin {:?} stands at {:?}, but its only writer expected to append {:?}..={:?}: two writers share {:?}",
        origin.id, found.seq, run.first, run.last, origin.incarnation
    );
    Err(StorageError::Fenced { origin: origin.id, ours: origin.incarnation })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::storage::StoredChange;

    fn append(document: u8, hashes: &[u8]) -> DocumentAppend {
        DocumentAppend {
            document: DocumentId::from_slice(&[document; 16]).unwrap(),
            changes: hashes
                .iter()
                .map(|&hash| StoredChange { hash: ChangeHash([hash; 32]), bytes: Bytes::new() })
                .collect(),
        }
    }

    #[test]
    fn a_run_unpacks_to_the_entries_that_were_packed() {
        let run = LogRun::pack(Seq(5), &[append(1, &[10, 11]), append(2, &[20])]).unwrap();
        assert_eq!(run.last, Seq(7));
        assert_eq!(run.entries.len(), 1 + 2 * 18 + 3 * 32);
        let seen: Vec<_> = run.unpack(Seq(0), 10).unwrap();
        let short: Vec<_> = seen.iter().map(|e| (e.seq.0, e.document.as_bytes()[0], e.hash.0[0])).collect();
        assert_eq!(short, [(5, 1, 10), (6, 1, 11), (7, 2, 20)]);
        assert_eq!(run.unpack(Seq(5), 1).unwrap(), seen[1..2]);
    }

    #[test]
    fn a_batch_without_changes_is_no_run() {
        assert_eq!(LogRun::pack(Seq(1), &[]), None);
        assert_eq!(LogRun::pack(Seq(1), &[append(1, &[])]), None);
    }

    #[test]
    fn a_long_section_counts_beyond_one_byte() {
        let hashes: Vec<u8> = (0..=255).cycle().take(1_000).collect();
        let run = LogRun::pack(Seq(1), &[append(1, &hashes)]).unwrap();
        assert_eq!(run.entries.len(), 1 + 17 + 2 + 1_000 * 32);
        assert_eq!(run.unpack(Seq(999), 10).unwrap().len(), 1);
    }

    #[test]
    fn damaged_runs_are_refused_and_never_panic() {
        let run = LogRun::pack(Seq(1), &[append(1, &[1, 2]), append(2, &[3])]).unwrap();
        for length in 0..run.entries.len() {
            let cut = LogRun { entries: run.entries[..length].to_vec(), ..run.clone() };
            assert!(cut.unpack(Seq(0), 10).is_err(), "cut to {length} bytes");
        }
        let mut newer = run.clone();
        newer.entries[0] = 2;
        assert!(newer.unpack(Seq(0), 10).is_err());
        let mut endless = run.clone();
        endless.entries.truncate(18);
        endless.entries.extend_from_slice(&[0xff; 12]);
        assert!(endless.unpack(Seq(0), 10).is_err());
    }

    #[test]
    fn a_hole_between_runs_is_noticed() {
        let first = LogRun::pack(Seq(1), &[append(1, &[1])]).unwrap();
        let third = LogRun::pack(Seq(3), &[append(1, &[3])]).unwrap();
        assert!(matches!(gather(&[first, third], Seq(0), 10), Err(StorageError::Fatal(_))));
    }
}
