//! A recorded editing session, edit by edit.

use std::fs;
use std::io::Read;
use std::path::Path;

use automerge::transaction::Transactable;
use automerge::{AutoCommit, ObjId};
use flate2::read::GzDecoder;
use serde::Deserialize;

/// The key of the text in the document's root.
pub const TEXT: &str = "text";

/// Where, how many characters are removed, and what is inserted.
type Patch = (usize, usize, String);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    start_content: String,
    end_content: String,
    txns: Vec<Edit>,
}

#[derive(Deserialize)]
pub struct Edit {
    patches: Vec<Patch>,
}

impl Edit {
    /// Does to a text what the writer did to theirs.
    pub fn apply_to(&self, document: &mut AutoCommit, text: &ObjId) {
        for (position, removed, inserted) in &self.patches {
            document.splice_text(text, *position, *removed as isize, inserted).unwrap();
        }
    }
}

pub struct Recording {
    pub edits: Vec<Edit>,
    /// What the edits end in.
    pub text: String,
}

impl Recording {
    /// Reads one file of the public editing traces, of the kind with a single writer.
    pub fn read(path: &Path) -> Self {
        let compressed = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut json = Vec::new();
        GzDecoder::new(&compressed[..]).read_to_end(&mut json).unwrap();
        let File { start_content, end_content, txns } = serde_json::from_slice(&json).unwrap();
        assert_eq!(start_content, "");
        Self { edits: txns, text: end_content }
    }
}
