//! The inputs that the fuzzers start from, in `fuzz/seeds/<target>/`: each is accepted by its decoder.
//!
//! `ISOBAR_WRITE_SEEDS=1 cargo test -p isobar-protocol --test decoders seeds` writes them anew.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use automerge::sync::{self, SyncDoc};
use automerge::transaction::Transactable;
use automerge::{AutoCommit, ROOT, SaveOptions};
use bytes::Bytes;
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{ChunkKind, census, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::ids::{ChangeHash, DocumentId, PeerId, StorageId};
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::{
    ClientFrame, PeerMetadata, RemoteHeads, encode_ephemeral, encode_error, encode_join,
    encode_remote_heads_changed, encode_remote_subscription_change, encode_sync, encode_unavailable,
};

use crate::authors::follow;
use crate::draft::sealed_as;

fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target)
}

/// Writes the seeds if that is asked for, and returns those that are there.
fn seeds(target: &str, make: impl FnOnce() -> Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let folder = folder(target);
    if std::env::var_os("ISOBAR_WRITE_SEEDS").is_some() {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        for (index, seed) in make().into_iter().enumerate() {
            fs::write(folder.join(format!("{index:02}")), seed).unwrap();
        }
    }
    let files = fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    let files: Vec<_> = files.collect();
    assert!(files.len() >= 4, "{target} has seeds");
    files
}

/// A script that makes the authors do each thing they can, more than once.
fn script(salt: u8) -> Vec<u8> {
    (0..60_u8).flat_map(|step| [step.wrapping_mul(37) ^ salt, step, step.wrapping_mul(11)]).collect()
}

fn contents(chunk: &[u8]) -> Vec<u8> {
    let mut all = chunks(Bytes::copy_from_slice(chunk));
    all.next().unwrap().unwrap().data().to_vec()
}

/// A compressed change around a deflate stream.
fn sealed_deflated(stream: &[u8]) -> Vec<u8> {
    let mut contents = Vec::new();
    flate2::read::DeflateDecoder::new(stream).read_to_end(&mut contents).unwrap();
    let mut chunk = sealed_as(2, stream);
    chunk[4..8].copy_from_slice(&sealed_as(1, &contents)[4..8]);
    chunk
}

fn under(form: u8, contents: &[u8]) -> Vec<u8> {
    [&[form], contents].concat()
}

#[test]
fn change_seeds_are_accepted() {
    let make = || {
        let mut document = follow(&script(3));
        document.put(ROOT, "long", "automerge compresses changes of more than 256 bytes ".repeat(8)).unwrap();
        let changes = document.get_changes(&[]);
        let mut seeds: Vec<_> = changes.iter().map(|c| under(1, &contents(c.raw_bytes()))).collect();
        seeds.dedup_by_key(|seed| seed.len());
        seeds.truncate(24);
        for mut change in changes.into_iter().rev().take(8) {
            let bytes = change.bytes();
            if bytes[8] == 2 {
                seeds.push(under(2, &contents(&bytes)));
            }
            seeds.push(under(0, &bytes));
        }
        seeds
    };
    for seed in seeds("change", make) {
        let chunk = match seed[0] {
            1 => sealed_as(1, &seed[1..]),
            2 => sealed_deflated(&seed[1..]),
            _ => seed[1..].to_vec(),
        };
        Change::decode(chunk.into(), &Limits::default()).unwrap();
    }
}

#[test]
fn document_census_seeds_are_accepted() {
    let make = || {
        let mut all = Vec::new();
        for salt in [3, 90] {
            let mut document = follow(&script(salt));
            for deflate in [false, true] {
                let saved = document.save_with_options(SaveOptions { deflate, retain_orphans: false });
                all.push(under(1, &contents(&saved)));
            }
            let hashes: Vec<_> = document.get_changes(&[]).iter().map(|change| change.hash()).collect();
            all.push(under(2, &contents(document.document().bundle(hashes).unwrap().bytes())));
            let tail = document.get_changes(&[]).pop().unwrap();
            all.push(under(0, &[document.save(), tail.raw_bytes().to_vec()].concat()));
        }
        all.push(under(1, &contents(&AutoCommit::new().save())));
        all
    };
    for seed in seeds("document_census", make) {
        let bytes = match seed[0] {
            0 => seed[1..].to_vec(),
            form => sealed_as(if form == 1 { 0 } else { 3 }, &seed[1..]),
        };
        for chunk in chunks(bytes.into()) {
            let chunk = chunk.unwrap();
            if matches!(chunk.kind, ChunkKind::Document | ChunkKind::Bundle) {
                census(&chunk, &Limits::default()).unwrap();
            }
        }
    }
}

#[test]
fn sync_message_seeds_are_accepted() {
    let make = || {
        let mut left = follow(&script(9));
        let past = left.get_changes(&[])[3].hash();
        let mut right = left.fork_at(&[past]).unwrap();
        let (mut left_state, mut right_state) = (sync::State::new(), sync::State::new());
        let mut messages = Vec::new();
        for _ in 0..5 {
            if let Some(message) = left.sync().generate_sync_message(&mut left_state) {
                messages.push(message.clone().encode());
                right.sync().receive_sync_message(&mut right_state, message).unwrap();
            }
            if let Some(message) = right.sync().generate_sync_message(&mut right_state) {
                messages.push(message.clone().encode());
                left.sync().receive_sync_message(&mut left_state, message).unwrap();
            }
        }
        messages.push(vec![0x42, 0, 0, 0, 0, 1, 2]);
        messages
    };
    for seed in seeds("sync_message", make) {
        SyncMessage::decode(seed.into()).unwrap();
    }
}

#[test]
fn bloom_seeds_are_accepted() {
    let make = || {
        let filter = |entries: u8| {
            let hashes: Vec<_> = (0..entries).map(|index| ChangeHash([index.wrapping_mul(67); 32])).collect();
            let mut seed = vec![67; 32];
            BloomFilter::from_hashes(hashes.iter()).encode_into(&mut seed);
            seed
        };
        [0, 1, 2, 10, 100, 200].map(filter).to_vec()
    };
    for seed in seeds("bloom", make) {
        BloomFilter::decode(seed[32..].to_vec().into()).unwrap();
    }
}

#[test]
fn frame_seeds_are_accepted() {
    let make = || {
        let (me, you) = (PeerId::new("peer-1").unwrap(), PeerId::new("server").unwrap());
        let document = DocumentId::from_slice(&[7; 16]).unwrap();
        let storage_id = StorageId::new("disk").unwrap();
        let heads = vec![ChangeHash([1; 32])];
        let remote = RemoteHeads { storage_id: storage_id.clone(), heads, timestamp: 1.7e12 };
        let extras = vec!["receipts".to_owned()];
        let metadata =
            PeerMetadata { storage_id: Some(storage_id.clone()), is_ephemeral: Some(true), extras };
        vec![
            encode_join(&me, &metadata),
            encode_error("server", "peer-1", "no"),
            encode_unavailable(&me, &you, &document),
            encode_ephemeral("peer-2", &you, &document, "session", 1 << 40, &[1, 2, 3]),
            encode_remote_subscription_change(&me, &you, std::slice::from_ref(&storage_id), &[]),
            encode_remote_heads_changed(&me, &you, &document, &[remote]),
            encode_sync(true, &me, &you, &document, &[0x42, 0, 0, 0, 0]),
            encode_sync(false, &me, &you, &document, &[0x43, 0, 0, 0, 0, 2, 2, 0x84]),
            // A frame with an indefinite map, null, undefined, tags and floats.
            [
                &b"\xbf\x64type\x69ephemeral\x65count\xf9\x3c\x00\x68senderId\x61a\x68targetId\xf6\x61x\xf7"[..],
                b"\x69sessionId\x61s\x6adocumentId\x78\x1c4NMNnkMhL8jXrdJ9jamS58PAVdXu\x64data\xd8\x40\x41\x01\xff",
            ]
            .concat(),
        ]
    };
    for seed in seeds("frame", make) {
        ClientFrame::decode(&seed).unwrap();
    }
}
