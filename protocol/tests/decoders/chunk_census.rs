//! Whole documents and bundles: counted as automerge counts them, and refused before they can blow up.

use std::io::Write;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT, SaveOptions};
use bytes::Bytes;
use isobar_protocol::chunk::{Chunk, ChunkError, ChunkKind, InflationProblem, census, chunks};
use isobar_protocol::config::Limits;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::authors::follow;
use crate::draft::sealed_as;

fn only_chunk(bytes: Vec<u8>) -> Chunk {
    let mut all = chunks(Bytes::from(bytes));
    let chunk = all.next().unwrap().unwrap();
    assert!(all.next().is_none());
    chunk
}

fn deletions(document: &mut AutoCommit) -> u64 {
    let is_deletion = |op: &automerge::legacy::Op| matches!(op.action, automerge::legacy::OpType::Delete);
    let changes = document.get_changes(&[]);
    let decoded = changes.iter().map(|change| change.decode());
    decoded.map(|change| change.operations.iter().filter(|op| is_deletion(op)).count() as u64).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn documents_and_bundles_count_as_automerge_counts_them(script in vec(any::<u8>(), 0..240)) {
        let mut document = follow(&script);
        let changes = document.get_changes(&[]);
        let operations = changes.iter().map(|change| change.len() as u64).sum::<u64>();
        let rows = operations - deletions(&mut document);
        let plain = SaveOptions { deflate: false, retain_orphans: false };
        for saved in [document.save(), document.save_with_options(plain)] {
            let chunk = only_chunk(saved);
            prop_assert_eq!(chunk.kind, ChunkKind::Document);
            let census = census(&chunk, &Limits::default()).unwrap();
            prop_assert_eq!(census.changes, changes.len() as u64);
            prop_assert_eq!(census.operations, rows);
        }
        let hashes: Vec<_> = changes.iter().map(|change| change.hash()).collect();
        let bundle = only_chunk(document.document().bundle(hashes).unwrap().bytes().to_vec());
        prop_assert_eq!(bundle.kind, ChunkKind::Bundle);
        let census = census(&bundle, &Limits::default()).unwrap();
        prop_assert_eq!(census.changes, changes.len() as u64);
        // Unlike a document, a bundle has rows for deletions.
        prop_assert_eq!(census.operations, operations);
    }

    #[test]
    fn a_damaged_document_never_panics_the_census(
        script in vec(any::<u8>(), 0..120),
        deflate in any::<bool>(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut document = follow(&script);
        let saved = document.save_with_options(SaveOptions { deflate, retain_orphans: false });
        let mut data = only_chunk(saved).data().to_vec();
        for (at, value) in flips {
            let at = at.index(data.len());
            data[at] = value;
        }
        let limits = Limits { document_ops_max: 10_000, document_bytes_max: 1 << 20, ..Limits::default() };
        if let Ok(census) = census(&only_chunk(sealed_as(0, &data)), &limits) {
            prop_assert!(census.operations <= 10_000 && census.changes <= 10_000);
            prop_assert!(census.inflated_bytes <= 1 << 20);
        }
    }
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A document chunk with one column of operations.
fn document_with_column(specification: u64, column: &[u8]) -> Chunk {
    let mut data = vec![0, 0, 0, 1];
    unsigned(&mut data, specification);
    unsigned(&mut data, column.len() as u64);
    data.extend_from_slice(column);
    only_chunk(sealed_as(0, &data))
}

#[test]
fn a_run_of_millions_is_refused_by_its_header() {
    // Two billion times the action "put", in six bytes.
    let runs = [0x80, 0x80, 0x80, 0x80, 0x08, 0x01];
    let refused = census(&document_with_column(66, &runs), &Limits::default());
    assert!(matches!(refused, Err(ChunkError::Column { column: 66, at: 0, .. })), "{refused:?}");
    let counted = census(&document_with_column(66, &[0xe4, 0, 1]), &Limits::default()).unwrap();
    assert_eq!((counted.operations, counted.changes), (100, 0));
}

#[test]
fn nulls_literals_texts_and_booleans_are_counted() {
    let count = |specification, column: &[u8]| {
        census(&document_with_column(specification, column), &Limits::default())
            .map(|census| census.operations)
    };
    assert_eq!(count(66, &[0x00, 0x05, 0x7e, 0x01, 0x80, 0x01]), Ok(7));
    assert_eq!(count(21, &[0x7d, 1, b'a', 0, 2, b'b', b'c', 2, 1, b'd']), Ok(5));
    assert_eq!(count(52, &[3, 1, 2]), Ok(6));
    assert_eq!(count(87, &[1, 2, 3]), Ok(0));
    // A text that is longer than what is left.
    assert!(matches!(count(21, &[0x7f, 9, b'a']), Err(ChunkError::Column { column: 21, .. })));
}

#[test]
fn a_column_that_inflates_beyond_the_limit_is_refused() {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![0; 4 << 20]).unwrap();
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 10_000);
    let chunk = document_with_column(87 | 8, &bomb);
    let limits = |document_bytes_max| Limits { document_bytes_max, ..Limits::default() };
    let refused = ChunkError::Inflation { column: 87, problem: InflationProblem::TooLarge };
    assert_eq!(census(&chunk, &limits((4 << 20) - 1)), Err(refused));
    assert_eq!(census(&chunk, &limits(4 << 20)).unwrap().inflated_bytes, 4 << 20);
}

#[test]
fn a_wrong_checksum_and_other_kinds_are_refused() {
    let mut document = AutoCommit::new();
    document.put(ROOT, "key", 1).unwrap();
    let mut saved = document.save();
    saved[4] ^= 1;
    assert_eq!(census(&only_chunk(saved), &Limits::default()), Err(ChunkError::Checksum));
    let change = document.get_changes(&[]).remove(0);
    let chunk = only_chunk(change.raw_bytes().to_vec());
    assert_eq!(census(&chunk, &Limits::default()), Err(ChunkError::NotCounted));
}
