//! Documents for the tests: several authors who edit, fork and merge as a script of bytes tells them.

use automerge::marks::{ExpandMark, Mark};
use automerge::transaction::Transactable;
use automerge::{ActorId, AutoCommit, ObjType, ROOT, ReadDoc, ScalarValue};

const AUTHORS: usize = 3;

/// Lets authors follow the script, and returns their documents after they have merged. Equal scripts make equal
/// documents.
pub fn follow(script: &[u8]) -> AutoCommit {
    let mut documents = vec![base()];
    for author in 1..AUTHORS {
        let fork = documents[0].fork().with_actor(actor(author));
        documents.push(fork);
    }
    for step in script.chunks_exact(3) {
        let author = usize::from(step[0]) % AUTHORS;
        match step[0] / 64 {
            0 => merge(&mut documents, author, usize::from(step[1]) % AUTHORS),
            _ => edit(&mut documents[author], step[1], step[2]),
        }
    }
    for author in 1..AUTHORS {
        merge(&mut documents, 0, author);
    }
    let mut merged = documents.swap_remove(0);
    merged.commit();
    merged
}

fn actor(author: usize) -> ActorId {
    // The order of the ids differs from the order of the authors.
    ActorId::from([[0x77; 16], [0x11; 16], [0xee; 16]][author])
}

fn base() -> AutoCommit {
    let mut document = AutoCommit::new().with_actor(actor(0));
    let text = document.put_object(ROOT, "text", ObjType::Text).unwrap();
    document.splice_text(&text, 0, 0, "once upon a time").unwrap();
    document.put_object(ROOT, "list", ObjType::List).unwrap();
    document.put_object(ROOT, "map", ObjType::Map).unwrap();
    document.commit();
    document
}

fn merge(documents: &mut [AutoCommit], into: usize, from: usize) {
    if into != from {
        let mut other = std::mem::take(&mut documents[from]);
        documents[into].merge(&mut other).unwrap();
        documents[from] = other;
    }
}

fn edit(document: &mut AutoCommit, what: u8, argument: u8) {
    let object = |document: &AutoCommit, name: &str| document.get(ROOT, name).unwrap().unwrap().1;
    let position = |length: usize| usize::from(argument) % length.max(1);
    match what % 14 {
        0 => {
            let text = object(document, "text");
            let at = position(document.length(&text));
            document.splice_text(&text, at, 0, &"añ".repeat(usize::from(argument % 5))).unwrap();
        }
        1 => {
            let text = object(document, "text");
            let length = document.length(&text);
            let deleted = usize::from(argument % 7).min(length - position(length));
            document.splice_text(&text, position(length), deleted as isize, "").unwrap();
        }
        2 => {
            let text = object(document, "text");
            let length = document.length(&text);
            if length > 2 {
                let start = position(length - 1);
                let mark = Mark::new("bold".into(), true, start, length);
                document.mark(&text, mark, [ExpandMark::Both, ExpandMark::None][position(2)]).unwrap();
            }
        }
        3 => document.put(ROOT, format!("key{}", argument % 3), i64::from(argument) - 100).unwrap(),
        4 => document.put(ROOT, "counter", ScalarValue::counter(i64::from(argument))).unwrap(),
        5 => {
            if let Ok(Some((value, _))) = document.get(ROOT, "counter")
                && value.is_scalar()
            {
                document.increment(ROOT, "counter", i64::from(argument)).unwrap();
            }
        }
        6 => {
            let list = object(document, "list");
            let at = position(document.length(&list));
            document.insert(&list, at, value(argument)).unwrap();
        }
        7 => {
            let list = object(document, "list");
            if document.length(&list) > 0 {
                let at = position(document.length(&list));
                document.put(&list, at, value(argument)).unwrap();
            }
        }
        8 => {
            let list = object(document, "list");
            if document.length(&list) > 0 {
                let at = position(document.length(&list));
                document.delete(&list, at).unwrap();
            }
        }
        9 => {
            let map = object(document, "map");
            let inner = document.put_object(&map, format!("m{}", argument % 2), ObjType::Map).unwrap();
            document.put(&inner, "value", value(argument)).unwrap();
        }
        10 => {
            let map = object(document, "map");
            document.delete(&map, format!("m{}", argument % 2)).unwrap();
        }
        11 => {
            let options = automerge::transaction::CommitOptions::default()
                .with_message(format!("message {argument}"))
                .with_time(i64::from(argument) * 1_000_000 - 77);
            document.commit_with(options);
        }
        12 => {
            document.empty_change(automerge::transaction::CommitOptions::default());
        }
        _ => {
            document.commit();
        }
    }
}

fn value(argument: u8) -> ScalarValue {
    match argument % 9 {
        0 => ScalarValue::Null,
        1 => ScalarValue::Boolean(true),
        2 => ScalarValue::Uint(u64::from(argument) << 50),
        3 => ScalarValue::Int(-i64::from(argument) * 1000),
        4 => ScalarValue::F64(f64::from(argument) / 3.0),
        5 => ScalarValue::Str("a text that is longer than the others".into()),
        6 => ScalarValue::Bytes(vec![argument; 20]),
        7 => ScalarValue::Timestamp(1_700_000_000_000 + i64::from(argument)),
        _ => ScalarValue::counter(3),
    }
}
