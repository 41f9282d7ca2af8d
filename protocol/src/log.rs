//! The log of an origin: its entries, the runs in which they are stored and sent, and the chain over them.
//!
//! An entry says what its origin received: a change of a document, or that a document was deleted. A *run* is a
//! stretch of consecutive entries, and its body is what storage keeps and links carry, so that whoever passes entries
//! on need not take them apart. An entry's seq is not stored: it follows from the run's first seq and the entry's place. A
//! body is, without padding:
//!
//! ```text
//! body     = version section*          version: one byte, 2
//! section  = kind id_length id content kind, id_length: one byte each
//! content  = count (length bytes)*     kind 0, changes: count and lengths in unsigned LEB128, count at least 1
//!          | deleted_at                kind 1, a tombstone: milliseconds of Unix time, unsigned LEB128
//!          | count hash*               kind 2, erased changes: their bytes left with a deletion, their names stay
//! ```
//!
//! A section holds entries of one document that follow each other, so that an id stands once for all of them. A change's
//! hash is not there: who receives it has to compute it anyway. The same entries always make the same bytes.
//!
//! The *chain* is a running hash over the names of an origin's entries. Two logs that agree in it at a seq agree in
//! everything up to there; it shows that a number was used twice, which is what a database restored from a copy does.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::change::{Change, ChangeError, change_name};
use crate::config::Limits;
use crate::ids::{ChangeHash, DocumentId};
use crate::leb128::{ReadError, ReadProblem, Reader, write_unsigned};

const VERSION: u8 = 2;

const KIND_CHANGES: u8 = 0;
const KIND_TOMBSTONE: u8 = 1;
const KIND_ERASED: u8 = 2;

/// The running hash of an origin's log at some seq: a SHA-256 cut to 16 bytes. It guards against accidents, not against
/// regions, which trust each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chain(pub [u8; 16]);

impl Chain {
    /// Before the first entry.
    pub const START: Self = Self([0; 16]);

    /// After one more entry.
    #[must_use]
    pub fn after(self, document: &DocumentId, content: &Content) -> Self {
        match content {
            Content::Change { hash, .. } | Content::Erased { hash } => self.after_change(document, hash),
            Content::Tombstone { deleted_at_ms } => self.after_tombstone(document, *deleted_at_ms),
        }
    }

    /// After these entries.
    #[must_use]
    pub fn after_all<'a>(self, entries: impl IntoIterator<Item = &'a Entry>) -> Self {
        entries.into_iter().fold(self, |chain, entry| chain.after(&entry.document, &entry.content))
    }

    /// After an entry that names a change.
    #[must_use]
    pub fn after_change(self, document: &DocumentId, hash: &ChangeHash) -> Self {
        self.over(document, &[hash.as_bytes()])
    }

    /// After a tombstone.
    #[must_use]
    pub fn after_tombstone(self, document: &DocumentId, deleted_at_ms: u64) -> Self {
        self.over(document, &[b"tombstone", &deleted_at_ms.to_be_bytes()])
    }

    fn over(self, document: &DocumentId, name: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        hasher.update([document.as_bytes().len() as u8]);
        hasher.update(document.as_bytes());
        name.iter().for_each(|part| hasher.update(part));
        let digest = hasher.finalize();
        Self(std::array::from_fn(|at| digest[at]))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub document: DocumentId,
    pub content: Content,
}

/// What an entry says of its document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The origin received this change.
    Change { hash: ChangeHash, bytes: Bytes },
    /// The document was deleted, for good.
    Tombstone { deleted_at_ms: u64 },
    /// A change whose bytes are gone, because its document was deleted since.
    Erased { hash: ChangeHash },
}

impl Content {
    fn kind(&self) -> u8 {
        match self {
            Self::Change { .. } => KIND_CHANGES,
            Self::Tombstone { .. } => KIND_TOMBSTONE,
            Self::Erased { .. } => KIND_ERASED,
        }
    }
}

/// A body that was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    #[error("a run of log entries: {0}")]
    Malformed(#[from] ReadError),
    #[error("a run of log entries holds an unreadable change: {0}")]
    Change(#[from] ChangeError),
    #[error("a run of log entries holds a change that is none, or whose checksum is another")]
    Unnamed,
}

/// Packs entries into a body.
pub fn encode_run<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<u8> {
    let mut body = vec![VERSION];
    let mut section: Vec<&Entry> = Vec::new();
    for entry in entries {
        let joins = section.first().is_some_and(|first| {
            first.document == entry.document
                && first.content.kind() == entry.content.kind()
                && first.content.kind() != KIND_TOMBSTONE
        });
        if !joins {
            push_section(&mut body, &section);
            section.clear();
        }
        section.push(entry);
    }
    push_section(&mut body, &section);
    body
}

fn push_head(body: &mut Vec<u8>, kind: u8, document: &DocumentId) {
    let id = document.as_bytes();
    body.push(kind);
    body.push(u8::try_from(id.len()).expect("a document id is at most 64 bytes"));
    body.extend_from_slice(id);
}

fn push_section(body: &mut Vec<u8>, section: &[&Entry]) {
    let Some(first) = section.first() else { return };
    push_head(body, first.content.kind(), &first.document);
    if let Content::Tombstone { deleted_at_ms } = &first.content {
        return write_unsigned(body, *deleted_at_ms);
    }
    write_unsigned(body, section.len() as u64);
    for entry in section {
        match &entry.content {
            Content::Change { bytes, .. } => {
                write_unsigned(body, bytes.len() as u64);
                body.extend_from_slice(bytes);
            }
            Content::Erased { hash } => body.extend_from_slice(hash.as_bytes()),
            Content::Tombstone { .. } => unreachable!("a tombstone is a section of its own"),
        }
    }
}

/// An entry whose change has been taken apart, as whoever applies it needs it.
#[derive(Debug, Clone)]
pub enum Opened {
    Change(Change),
    Tombstone {
        deleted_at_ms: u64,
    },
    Erased {
        hash: ChangeHash,
    },
    /// A change that has a name and does not keep the rules of [`Change::decode`]: a newer program let it in. It is stored
    /// and passed on, and its document's affair.
    Unreadable {
        hash: ChangeHash,
        bytes: Bytes,
    },
}

impl Opened {
    /// The chain after this entry.
    pub fn chain(&self, before: Chain, document: &DocumentId) -> Chain {
        match self {
            Self::Change(change) => before.after_change(document, &change.hash),
            Self::Erased { hash } | Self::Unreadable { hash, .. } => before.after_change(document, hash),
            Self::Tombstone { deleted_at_ms } => before.after_tombstone(document, *deleted_at_ms),
        }
    }
}

/// Takes a body apart. Every change is parsed, its hash computed and its checksum compared. The changes share the
/// body's buffer.
pub fn open_run(body: &Bytes, limits: &Limits) -> Result<Vec<(DocumentId, Opened)>, RunError> {
    let mut opened = Vec::new();
    walk(body, |document, raw| {
        let content = match raw {
            Raw::Change(bytes) => open_change(bytes, limits)?,
            Raw::Tombstone(deleted_at_ms) => Opened::Tombstone { deleted_at_ms },
            Raw::Erased(hash) => Opened::Erased { hash },
        };
        opened.push((document.clone(), content));
        Ok(())
    })?;
    Ok(opened)
}

fn open_change(bytes: Bytes, limits: &Limits) -> Result<Opened, RunError> {
    match Change::decode(bytes.clone(), limits) {
        Ok(change) => Ok(Opened::Change(change)),
        Err(error) => match change_name(&bytes, limits) {
            Some(hash) => Ok(Opened::Unreadable { hash, bytes }),
            None => Err(error.into()),
        },
    }
}

/// As [`open_run`], without what only the graph needs of a change.
pub fn decode_run(body: &Bytes) -> Result<Vec<Entry>, RunError> {
    let opened = open_run(body, &Limits::stored())?;
    Ok(opened.into_iter().map(|(document, content)| Entry { document, content: content.into() }).collect())
}

impl From<Opened> for Content {
    fn from(opened: Opened) -> Self {
        match opened {
            Opened::Change(change) => Self::Change { hash: change.hash, bytes: change.bytes },
            Opened::Unreadable { hash, bytes } => Self::Change { hash, bytes },
            Opened::Tombstone { deleted_at_ms } => Self::Tombstone { deleted_at_ms },
            Opened::Erased { hash } => Self::Erased { hash },
        }
    }
}

/// How many entries a body holds. Looks at no change.
pub fn run_length(body: &Bytes) -> Result<u64, RunError> {
    let mut count = 0;
    walk(body, |_, _| {
        count += 1;
        Ok(())
    })?;
    Ok(count)
}

/// How many entries a body holds, and the chain after them. Every change is hashed and its checksum compared.
pub fn measure_run(before: Chain, body: &Bytes) -> Result<(u64, Chain), RunError> {
    let limits = Limits::stored();
    let (mut count, mut chain) = (0, before);
    walk(body, |document, raw| {
        chain = match raw {
            Raw::Change(bytes) => {
                let hash = change_name(&bytes, &limits).ok_or(RunError::Unnamed)?;
                chain.after_change(document, &hash)
            }
            Raw::Tombstone(deleted_at_ms) => chain.after_tombstone(document, deleted_at_ms),
            Raw::Erased(hash) => chain.after_change(document, &hash),
        };
        count += 1;
        Ok(())
    })?;
    Ok((count, chain))
}

/// A body in which a document's changes are erased; `None` if it holds none of them. The chain over it stays.
pub fn erase(body: &Bytes, document: &DocumentId) -> Result<Option<Vec<u8>>, RunError> {
    erase_where(body, |found| found == document)
}

/// As [`erase`], for every document of which `is_gone` says so.
pub fn erase_where(body: &Bytes, is_gone: impl Fn(&DocumentId) -> bool) -> Result<Option<Vec<u8>>, RunError> {
    // Most bodies hold nothing to erase, and their changes need not be taken apart to see that.
    let mut holds = false;
    walk(body, |document, raw| {
        holds = holds || matches!(raw, Raw::Change(_)) && is_gone(document);
        Ok(())
    })?;
    if !holds {
        return Ok(None);
    }
    let mut entries = decode_run(body)?;
    for entry in entries.iter_mut().filter(|entry| is_gone(&entry.document)) {
        if let Content::Change { hash, .. } = entry.content {
            entry.content = Content::Erased { hash };
        }
    }
    Ok(Some(encode_run(&entries)))
}

enum Raw {
    Change(Bytes),
    Tombstone(u64),
    Erased(ChangeHash),
}

fn walk(
    body: &Bytes,
    mut each: impl FnMut(&DocumentId, Raw) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let mut reader = Reader::new(body);
    if reader.byte("version")? != VERSION {
        return Err(reader.error("version", ReadProblem::Malformed).into());
    }
    while !reader.is_empty() {
        let kind = reader.byte("kind")?;
        let id_bytes = usize::from(reader.byte("document id's length")?);
        let id = reader.take("document id", id_bytes)?;
        let document =
            DocumentId::from_slice(id).map_err(|_| reader.error("document id", ReadProblem::Malformed))?;
        match kind {
            KIND_TOMBSTONE => each(&document, Raw::Tombstone(reader.unsigned("deletion time")?))?,
            KIND_CHANGES => {
                for _ in 0..section_length(&mut reader, 1)? {
                    let bytes = reader.length_prefixed("change")?;
                    each(&document, Raw::Change(body.slice_ref(bytes)))?;
                }
            }
            KIND_ERASED => {
                for _ in 0..section_length(&mut reader, 32)? {
                    each(&document, Raw::Erased(reader.hash("erased change")?))?;
                }
            }
            _ => return Err(reader.error("kind", ReadProblem::Malformed).into()),
        }
    }
    Ok(())
}

fn section_length(reader: &mut Reader<'_>, item_bytes_min: usize) -> Result<usize, RunError> {
    let count = reader.count("entries", item_bytes_min, usize::MAX)?;
    if count == 0 {
        return Err(reader.error("entries", ReadProblem::Malformed).into());
    }
    Ok(count)
}

/// Puts bodies that follow each other together, without looking inside.
pub fn join_bodies(bodies: &[Bytes]) -> Bytes {
    match bodies {
        [one] => one.clone(),
        _ => {
            let mut joined = vec![VERSION];
            bodies.iter().for_each(|body| joined.extend_from_slice(body.get(1..).unwrap_or_default()));
            joined.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use automerge::transaction::Transactable;
    use automerge::{ActorId, AutoCommit, ROOT};

    use super::*;

    fn document(number: u8) -> DocumentId {
        DocumentId::from_slice(&[number; 16]).unwrap()
    }

    /// A small valid change, another one for each number.
    fn change(number: u8) -> Content {
        let mut document = AutoCommit::new().with_actor(ActorId::from([number; 8]));
        document.put(ROOT, "number", u64::from(number)).unwrap();
        let change = document.get_changes(&[]).pop().unwrap();
        Content::Change { hash: ChangeHash(change.hash().0), bytes: change.raw_bytes().to_vec().into() }
    }

    fn entry(number: u8, content: Content) -> Entry {
        Entry { document: document(number), content }
    }

    /// Entries of all kinds, of three documents; the middle one has three changes in a row, and one more at the end.
    fn entries() -> Vec<Entry> {
        vec![
            entry(1, change(1)),
            entry(2, change(2)),
            entry(2, change(3)),
            entry(2, change(4)),
            entry(3, Content::Erased { hash: ChangeHash([7; 32]) }),
            entry(3, Content::Erased { hash: ChangeHash([8; 32]) }),
            entry(3, Content::Tombstone { deleted_at_ms: 1_700_000_000_000 }),
            entry(3, Content::Tombstone { deleted_at_ms: 0 }),
            entry(2, change(5)),
        ]
    }

    fn body(entries: &[Entry]) -> Bytes {
        encode_run(entries).into()
    }

    fn chain_over(entries: &[Entry]) -> Chain {
        entries.iter().fold(Chain::START, |chain, entry| chain.after(&entry.document, &entry.content))
    }

    fn change_bytes(content: &Content) -> usize {
        match content {
            Content::Change { bytes, .. } => bytes.len(),
            other => panic!("expected a change, found {other:?}"),
        }
    }

    #[test]
    fn entries_of_all_kinds_come_back() {
        let body = body(&entries());
        assert_eq!(decode_run(&body), Ok(entries()));
        assert_eq!(run_length(&body), Ok(9));
        assert_eq!(decode_run(&encode_run(&[]).into()), Ok(Vec::new()));
    }

    #[test]
    fn the_same_entries_make_the_same_bytes() {
        assert_eq!(body(&entries()), body(&entries()));
        assert_eq!(body(&decode_run(&body(&entries())).unwrap()), body(&entries()));
    }

    #[test]
    fn entries_of_a_document_that_follow_each_other_share_a_section() {
        let apart = [entry(2, change(2)), entry(1, change(1)), entry(2, change(3))];
        let together = [entry(2, change(2)), entry(2, change(3)), entry(1, change(1))];
        // Kind, length, id and count.
        let section_bytes = 1 + 1 + 16 + 1;
        assert_eq!(body(&apart).len(), body(&together).len() + section_bytes);
        let changes: usize = together.iter().map(|entry| 1 + change_bytes(&entry.content)).sum();
        assert_eq!(body(&together).len(), 1 + 2 * section_bytes + changes);
        assert_eq!(decode_run(&body(&apart)).unwrap(), apart);
    }

    #[test]
    fn changes_share_the_bodys_buffer() {
        let body = body(&entries());
        for (_, opened) in open_run(&body, &Limits::default()).unwrap() {
            if let Opened::Change(change) = opened {
                assert!(body.as_ptr_range().contains(&change.bytes.as_ptr()));
            }
        }
    }

    #[test]
    fn opened_entries_carry_the_chain_on_as_the_entries_do() {
        let opened = open_run(&body(&entries()), &Limits::default()).unwrap();
        let chain =
            opened.iter().fold(Chain::START, |chain, (document, opened)| opened.chain(chain, document));
        assert_eq!(chain, chain_over(&entries()));
    }

    #[test]
    fn erasing_takes_the_bytes_and_keeps_names_chain_and_length() {
        let whole = body(&entries());
        let erased = Bytes::from(erase(&whole, &document(2)).unwrap().unwrap());
        let left = decode_run(&erased).unwrap();
        assert_eq!(run_length(&erased), run_length(&whole));
        assert_eq!(chain_over(&left), chain_over(&entries()));
        for (left, before) in left.iter().zip(&entries()) {
            assert_eq!(left.document, before.document);
            match &before.content {
                Content::Change { hash, bytes } if before.document == document(2) => {
                    assert_eq!(left.content, Content::Erased { hash: *hash });
                    assert!(!erased.windows(bytes.len()).any(|window| window == bytes));
                }
                other => assert_eq!(&left.content, other, "what is another document's stays"),
            }
        }
    }

    #[test]
    fn erasing_what_is_not_there_leaves_a_body_alone() {
        let whole = body(&entries());
        assert_eq!(erase(&whole, &document(9)), Ok(None));
        assert_eq!(erase(&whole, &document(3)), Ok(None), "it holds no changes, though entries");
        let erased = erase(&whole, &document(2)).unwrap().unwrap();
        assert_eq!(erase(&erased.into(), &document(2)), Ok(None), "a second time there is nothing left");
    }

    #[test]
    fn several_documents_are_erased_at_once_as_one_after_the_other() {
        let whole = body(&entries());
        let one_by_one = erase(&erase(&whole, &document(1)).unwrap().unwrap().into(), &document(2)).unwrap();
        assert_eq!(erase_where(&whole, |id| *id != document(3)).unwrap(), one_by_one);
    }

    #[test]
    fn a_body_that_ends_inside_an_entry_is_refused() {
        let whole = body(&entries());
        let ends: Vec<usize> = section_ends();
        for length in 0..whole.len() {
            let cut = whole.slice(..length);
            // Between two sections a body ends well, with fewer entries: the chain is what notices that.
            match ends.contains(&length) {
                false => assert!(decode_run(&cut).is_err(), "cut to {length} bytes"),
                true => assert!(run_length(&cut).unwrap() < 9, "cut to {length} bytes"),
            }
            assert_eq!(run_length(&cut).is_err(), !ends.contains(&length));
        }
    }

    /// Where each section of the whole body ends, after its version.
    fn section_ends() -> Vec<usize> {
        let entries = entries();
        [0, 1, 4, 6, 7, 8].map(|count| body(&entries[..count]).len()).to_vec()
    }

    #[test]
    fn a_flipped_byte_never_yields_the_same_log() {
        let whole = body(&entries());
        let chain = chain_over(&entries());
        for at in 0..whole.len() {
            for flip in [1, 0x80, 0xff] {
                let mut damaged = whole.to_vec();
                damaged[at] ^= flip;
                // What is still readable is another log.
                if let Ok(entries) = decode_run(&damaged.into()) {
                    assert_ne!(chain_over(&entries), chain, "byte {at}");
                }
            }
        }
    }

    #[test]
    fn bodies_that_are_no_runs_are_refused() {
        let section = |kind: u8, rest: &[u8]| [&[VERSION, kind, 1, 9][..], rest].concat();
        let refused = [
            ("nothing", vec![]),
            ("another version", vec![VERSION + 1]),
            ("an unknown kind", section(3, &[1])),
            ("an empty id", vec![VERSION, KIND_TOMBSTONE, 0, 1]),
            ("an id that is too long", [&[VERSION, KIND_TOMBSTONE, 65][..], &[1; 66]].concat()),
            ("no changes", section(KIND_CHANGES, &[0])),
            ("no names", section(KIND_ERASED, &[0])),
            ("a count beyond the body", section(KIND_ERASED, &[2, 0])),
            ("a time with superfluous bytes", section(KIND_TOMBSTONE, &[0x80, 0])),
        ];
        for (what, bytes) in refused {
            assert!(matches!(run_length(&bytes.into()), Err(RunError::Malformed(_))), "{what}");
        }
        let no_change = Bytes::from(section(KIND_CHANGES, &[1, 3, 1, 2, 3]));
        assert_eq!(run_length(&no_change), Ok(1), "a length looks at no change");
        assert!(matches!(decode_run(&no_change), Err(RunError::Change(_))));
    }

    /// The stored name of a change is the hash of what it holds, whether this program understands that or not.
    #[test]
    fn a_change_that_breaks_the_rules_is_carried_under_its_name() {
        let strict = Limits { change_ops_max: 0, ..Limits::default() };
        let body = body(&[entry(1, change(1))]);
        let opened = open_run(&body, &strict).unwrap();
        let Content::Change { hash: expected, bytes: whole } = change(1) else { panic!("a change") };
        match &opened[..] {
            [(_, Opened::Unreadable { hash, bytes })] => assert_eq!((hash, bytes), (&expected, &whole)),
            other => panic!("expected an unreadable change, found {other:?}"),
        }
    }

    #[test]
    fn the_chain_differs_when_an_entry_differs_moves_or_is_left_out() {
        let whole = entries();
        let chain = chain_over(&whole);
        for at in 0..whole.len() {
            let mut without = whole.clone();
            let taken = without.remove(at);
            assert_ne!(chain_over(&without), chain, "without entry {at}");
            let mut elsewhere = whole.clone();
            elsewhere[at].document = document(8);
            assert_ne!(chain_over(&elsewhere), chain, "entry {at} of another document");
            let mut other = whole.clone();
            other[at].content = change(77);
            assert_ne!(chain_over(&other), chain, "another entry {at}");
            let mut moved = without;
            moved.insert(if at == 0 { 1 } else { at - 1 }, taken);
            assert_ne!(chain_over(&moved), chain, "entry {at} moved");
        }
        let tombstone = |deleted_at_ms| chain_over(&[entry(1, Content::Tombstone { deleted_at_ms })]);
        assert_ne!(tombstone(1), tombstone(2));
        assert_eq!(chain_over(&[]), Chain::START);
    }

    #[test]
    fn bodies_that_are_joined_hold_the_entries_of_all() {
        let entries = entries();
        let bodies = [body(&entries[..3]), body(&entries[3..5]), body(&entries[5..])];
        assert_eq!(decode_run(&join_bodies(&bodies)), Ok(entries));
        assert_eq!(join_bodies(&bodies[..1]), bodies[0]);
        assert_eq!(decode_run(&join_bodies(&[])), Ok(Vec::new()));
    }
}
