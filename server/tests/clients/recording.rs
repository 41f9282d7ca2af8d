//! A recorded editing session as the changes that an editor would have made of it, one for each edit.
//!
//! The changes are put together from their operations. A document that applied the edits one by one would end with
//! the same changes, but spends a minute on what is not the matter here.

use std::fs;
use std::io::Read;
use std::path::Path;

use automerge::legacy::{ElementId, Key, ObjectId, Op, OpId, OpType};
use automerge::{ActorId, Change, ChangeHash, ExpandedChange, ObjType, ScalarValue};
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
struct Edit {
    patches: Vec<Patch>,
}

pub struct Recording {
    edits: Vec<Edit>,
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

    /// The changes, in order: one that makes the text, and one for each edit.
    pub fn changes(&self) -> Vec<Change> {
        let mut author = Author::new();
        let mut changes = vec![author.begin()];
        changes.extend(self.edits.iter().map(|edit| author.edit(&edit.patches)));
        changes
    }
}

/// The one writer: where the document stands, as far as the next change depends on it.
struct Author {
    actor: ActorId,
    /// The counters of the operations that inserted the characters that are there, in their order.
    elements: Vec<u64>,
    next_counter: u64,
    next_seq: u64,
    head: Option<ChangeHash>,
}

impl Author {
    fn new() -> Self {
        Self { actor: ActorId::random(), elements: Vec::new(), next_counter: 1, next_seq: 1, head: None }
    }

    fn begin(&mut self) -> Change {
        let make = Op {
            action: OpType::Make(ObjType::Text),
            obj: ObjectId::Root,
            key: Key::Map(TEXT.into()),
            pred: Vec::new().into(),
            insert: false,
        };
        self.commit(vec![make])
    }

    fn edit(&mut self, patches: &[Patch]) -> Change {
        let mut operations = Vec::new();
        let mut counter = self.next_counter;
        for (position, deleted, inserted) in patches {
            let removed: Vec<u64> = self.elements.drain(*position..position + deleted).collect();
            operations.extend(removed.into_iter().map(|element| self.delete(element)));
            counter += *deleted as u64;
            for (offset, character) in inserted.chars().enumerate() {
                let at = position + offset;
                operations.push(self.insert(at, character));
                self.elements.insert(at, counter);
                counter += 1;
            }
        }
        self.commit(operations)
    }

    fn delete(&self, element: u64) -> Op {
        let id = self.operation(element);
        Op {
            action: OpType::Delete,
            obj: self.text(),
            key: Key::Seq(ElementId::Id(id.clone())),
            pred: vec![id].into(),
            insert: false,
        }
    }

    fn insert(&self, at: usize, character: char) -> Op {
        let after = at.checked_sub(1).map(|before| self.operation(self.elements[before]));
        Op {
            action: OpType::Put(ScalarValue::Str(character.to_string().into())),
            obj: self.text(),
            key: Key::Seq(after.map_or(ElementId::Head, ElementId::Id)),
            pred: Vec::new().into(),
            insert: true,
        }
    }

    fn operation(&self, counter: u64) -> OpId {
        OpId::new(counter, &self.actor)
    }

    /// The text was made by the first operation of all.
    fn text(&self) -> ObjectId {
        ObjectId::Id(self.operation(1))
    }

    fn commit(&mut self, operations: Vec<Op>) -> Change {
        let count = operations.len() as u64;
        let change = Change::from(ExpandedChange {
            operations,
            actor_id: self.actor.clone(),
            hash: None,
            seq: self.next_seq,
            start_op: self.next_counter.try_into().expect("counters begin at one"),
            time: 0,
            message: None,
            deps: self.head.into_iter().collect(),
            extra_bytes: Vec::new(),
            author: None,
        });
        self.next_counter += count;
        self.next_seq += 1;
        self.head = Some(change.hash());
        change
    }
}
