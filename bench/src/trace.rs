//! The large document: a real paper, typed in 259,778 edits, one change each.
//!
//! Replaying it takes a while in either CRDT, so the finished documents are kept in `target/bench-cache/`.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use automerge::transaction::{CommitOptions, Transactable};
use automerge::{ActorId, AutoCommit, ObjType, ROOT};
use flate2::bufread::GzDecoder;
use serde::Deserialize;
use yrs::updates::decoder::Decode;
use yrs::{ReadTxn, StateVector, Text, Transact, Update};

use crate::workload::{Seed, yjs_document};

/// The file within the data directory.
pub const FILE: &str = "automerge-paper.json.gz";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    start_content: String,
    end_content: String,
    txns: Vec<Transaction>,
}

#[derive(Deserialize)]
struct Transaction {
    /// Position, characters deleted, text inserted.
    patches: Vec<(u32, u32, String)>,
}

/// The finished documents.
pub struct Paper {
    automerge: Vec<u8>,
    yjs: Vec<u8>,
    /// Where the Automerge document lies, for the bare server to serve.
    pub automerge_path: PathBuf,
}

impl Paper {
    /// Reads the documents from the cache, or makes them from the trace in `data`.
    pub fn load(data: &Path, cache: &Path) -> Result<Self> {
        let automerge_path = cache.join("paper.automerge");
        let yjs_path = cache.join("paper.yjs");
        if !automerge_path.exists() || !yjs_path.exists() {
            eprintln!("replaying the trace of 259,778 edits, once");
            let (automerge, yjs) = replay(&read(&data.join(FILE))?)?;
            fs::create_dir_all(cache)?;
            fs::write(&yjs_path, yjs)?;
            fs::write(&automerge_path, automerge)?;
        }
        Ok(Self { automerge: fs::read(&automerge_path)?, yjs: fs::read(&yjs_path)?, automerge_path })
    }

    /// The documents, open for further edits.
    pub fn seed(&self) -> Result<Seed> {
        let yjs = yjs_document();
        yjs.transact_mut().apply_update(Update::decode_v1(&self.yjs)?)?;
        Ok(Seed { automerge: AutoCommit::load(&self.automerge)?, yjs })
    }

    pub fn automerge_bytes(&self) -> usize {
        self.automerge.len()
    }
}

fn read(path: &Path) -> Result<Trace> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let reader = BufReader::new(GzDecoder::new(BufReader::new(file)));
    serde_json::from_reader(reader).with_context(|| format!("reading {}", path.display()))
}

fn replay(trace: &Trace) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut document = AutoCommit::new().with_actor(ActorId::from([1; 16]));
    let text = document.put_object(ROOT, "text", ObjType::Text)?;
    document.splice_text(&text, 0, 0, &trace.start_content)?;
    let yjs = yjs_document();
    let yjs_text = yjs.get_or_insert_text("text");
    yjs_text.push(&mut yjs.transact_mut(), &trace.start_content);
    for transaction in &trace.txns {
        let mut yjs_transaction = yjs.transact_mut();
        for (position, deleted, inserted) in &transaction.patches {
            document.splice_text(&text, *position as usize, *deleted as isize, inserted)?;
            // The text is ASCII, so characters are bytes.
            if *deleted > 0 {
                yjs_text.remove_range(&mut yjs_transaction, *position, *deleted);
            }
            if !inserted.is_empty() {
                yjs_text.insert(&mut yjs_transaction, *position, inserted);
            }
        }
        document.commit_with(CommitOptions::default().with_time(0));
    }
    ensure!(automerge::ReadDoc::text(&document, &text)? == trace.end_content, "the replay ended elsewhere");
    let yjs = yjs.transact().encode_state_as_update_v1(&StateVector::default());
    Ok((document.save(), yjs))
}
