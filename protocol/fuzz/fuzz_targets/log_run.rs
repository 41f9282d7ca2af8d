#![no_main]
//! Runs of log entries: what is opened agrees with what is counted, packed again and erased.
//!
//! The first byte of the input says whether the rest is a body, or sections whose changes are to be sealed: there each
//! byte pair begins an entry, of a kind and a length.

use bytes::Bytes;
use isobar_protocol::config::Limits;
use isobar_protocol::ids::{ChangeHash, DocumentId};
use isobar_protocol::log::{Chain, Content, Entry, decode_run, encode_run, erase, open_run, run_length};
use libfuzzer_sys::fuzz_target;

/// Entries as the input asks for them; their changes have a checksum that agrees, and need not be changes.
fn body_of(mut data: &[u8]) -> Vec<u8> {
    let mut entries = Vec::new();
    while let [kind, length, rest @ ..] = data {
        let (contents, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        let content = match kind % 4 {
            0 | 1 => {
                Content::Change { hash: ChangeHash([0; 32]), bytes: sealing::sealed(1, contents).into() }
            }
            2 => Content::Tombstone { deleted_at_ms: contents.len() as u64 },
            _ => Content::Erased { hash: ChangeHash([*length; 32]) },
        };
        let document = DocumentId::from_slice(&[kind >> 6 | 1]).expect("an id of one byte");
        entries.push(Entry { document, content });
        data = rest;
    }
    encode_run(&entries)
}

fn chain_over(entries: &[Entry]) -> Chain {
    entries.iter().fold(Chain::START, |chain, entry| chain.after(&entry.document, &entry.content))
}

fuzz_target!(|data: &[u8]| {
    let Some((form, data)) = data.split_first() else { return };
    let body = Bytes::from(if form % 2 == 0 { data.to_vec() } else { body_of(data) });
    let length = run_length(&body);
    let limits = Limits { change_bytes_max: 64 << 10, change_ops_max: 2_000, ..Limits::default() };
    let Ok(opened) = open_run(&body, &limits) else { return };
    assert_eq!(length, Ok(opened.len() as u64));
    let chain = opened.iter().fold(Chain::START, |chain, (document, opened)| opened.chain(chain, document));
    let entries = decode_run(&body).expect("whatever the limits are");
    assert_eq!(chain_over(&entries), chain);
    assert_eq!(decode_run(&encode_run(&entries).into()).as_ref(), Ok(&entries));
    let Some(first) = entries.first() else { return };
    if let Some(erased) = erase(&body, &first.document).expect("it was opened") {
        let erased = decode_run(&erased.into()).expect("it was packed here");
        assert_eq!((erased.len(), chain_over(&erased)), (entries.len(), chain));
    }
});
