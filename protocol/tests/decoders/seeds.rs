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
use isobar_protocol::base::{BaseIndex, BaseSummary};
use isobar_protocol::bloom::BloomFilter;
use isobar_protocol::change::Change;
use isobar_protocol::chunk::{ChunkKind, census, chunks};
use isobar_protocol::config::Limits;
use isobar_protocol::graph::Graph;
use isobar_protocol::ids::{
    ChangeHash, DocumentId, OriginId, PeerId, PlacementGroup, RegionName, Seq, StorageId,
};
use isobar_protocol::link::codec::{decode, encode};
use isobar_protocol::link::handshake::{
    ClusterId, ClusterKey, Handshake, Hello, Identity, NodeId, Nonce, Step, VERSIONS,
};
use isobar_protocol::link::{BaseContents, DocumentContents, Fingerprints, LinkFrame, Progress, Standing};
use isobar_protocol::log::{Chain, Content, Entry, encode_run, erase, open_run};
use isobar_protocol::notice::{KnownRegion, Notice, Observation, ObserverStanding, Scope};
use isobar_protocol::receipts::Baseline;
use isobar_protocol::replica::LinkId;
use isobar_protocol::sync_message::SyncMessage;
use isobar_protocol::wire::{
    ClientFrame, PeerMetadata, RemoteHeads, encode_ephemeral, encode_error, encode_join,
    encode_remote_heads_changed, encode_remote_subscription_change, encode_sync, encode_unavailable,
};
use uuid::Uuid;

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

fn origin(number: u128) -> OriginId {
    OriginId(uuid::Uuid::from_u128(number))
}

fn link_frames() -> Vec<LinkFrame> {
    let document = DocumentId::from_slice(&[7; 16]).unwrap();
    let group = PlacementGroup::new("everywhere").unwrap();
    let region = RegionName::new("eu").unwrap();
    let chain = Chain([3; 16]);
    let progress = Progress { origin: origin(1), region, group: group.clone(), seq: Seq(300), chain };
    let part = || Bytes::from_static(b"a part of a base");
    let base = BaseContents { summary: part(), index: part(), chunk: part() };
    let changes = vec![Bytes::from_static(b"0123456789"), Bytes::from_static(b"another change")];
    let contents = DocumentContents {
        document: document.clone(),
        group,
        deleted_at_ms: None,
        base: Some(base),
        changes,
    };
    let deleted = DocumentContents {
        deleted_at_ms: Some(1 << 40),
        base: None,
        changes: Vec::new(),
        ..contents.clone()
    };
    vec![
        LinkFrame::Have { origins: vec![progress.clone(), progress.clone()] },
        LinkFrame::Subscribe { origin: origin(2), after: Seq(0), chain },
        LinkFrame::Unsubscribe { origin: origin(2) },
        LinkFrame::Entries {
            origin: origin(2),
            first: Seq(1),
            chain,
            body: Bytes::from_static(&[2, 1, 1, 9, 0]),
        },
        LinkFrame::Truncated { origin: origin(2), floor: Seq(9) },
        LinkFrame::SnapshotRequest { after: Some(document.clone()) },
        LinkFrame::SnapshotPage {
            vector: vec![progress],
            documents: vec![contents.clone(), deleted],
            next: None,
        },
        LinkFrame::Ping { sent_ms: 1 << 41 },
        LinkFrame::Pong { sent_ms: 0 },
        LinkFrame::Interest { add: vec![document.clone()], remove: vec![document.clone()] },
        LinkFrame::Presence {
            document: document.clone(),
            sender: "peer-1".to_owned(),
            session: "session".to_owned(),
            count: 4,
            data: Bytes::from_static(b"cursor"),
        },
        LinkFrame::Find { request: 1, document: document.clone() },
        LinkFrame::Found { request: 1, standing: Standing::Deleted },
        LinkFrame::Found {
            request: 2,
            standing: Standing::Elsewhere { urls: vec!["wss://frankfurt.example".to_owned()] },
        },
        LinkFrame::DocumentRequest { request: 2, document: document.clone() },
        LinkFrame::DocumentAnswer { request: 2, contents: Some(contents) },
        LinkFrame::HeadsRequest { request: 5, document: document.clone(), heads: vec![ChangeHash([7; 32])] },
        LinkFrame::HeadsAnswer { request: 5, has: true },
        LinkFrame::ScrubRequest { request: 3, prefix: vec![1, 2] },
        LinkFrame::ScrubAnswer { request: 3, fingerprints: Fingerprints::Buckets(vec![(1, [5; 16]); 256]) },
        LinkFrame::ScrubAnswer {
            request: 4,
            fingerprints: Fingerprints::Documents(vec![(document, [5; 16])]),
        },
        LinkFrame::Failed { message: "no".to_owned() },
    ]
}

#[test]
fn link_frame_seeds_are_accepted() {
    for seed in seeds("link_frame", || link_frames().iter().map(encode).collect()) {
        decode(seed.into()).unwrap();
    }
}

#[test]
fn notice_seeds_are_accepted() {
    let (document, node) = (DocumentId::from_slice(&[7; 16]).unwrap(), Uuid::from_u128(5));
    let (group, region) = (PlacementGroup::new("all").unwrap(), RegionName::new("eu").unwrap());
    let (storage_id, heads) = (StorageId::new("a storage").unwrap(), vec![ChangeHash([3; 32])]);
    let make = || {
        let observation = Observation {
            document: document.clone(),
            group: group.clone(),
            baseline: Baseline(7),
            heads: heads.clone(),
            is_closed: true,
        };
        let known = KnownRegion {
            region: region.clone(),
            storage_id: storage_id.clone(),
            client_url: Some("wss://eu".into()),
            link: Some(LinkId(9)),
        };
        let urls = vec!["wss://eu".to_owned()];
        let notices = [
            Notice::Appended,
            Notice::Stored { documents: vec![document.clone()] },
            Notice::Interest {
                scope: Scope::Sessions(group.clone()),
                anew: true,
                add: vec![document.clone()],
                remove: vec![document.clone()],
            },
            Notice::Presence {
                from_region: true,
                group: group.clone(),
                document: document.clone(),
                sender: "sender".into(),
                session: "session".into(),
                count: 300,
                data: Bytes::from_static(b"cursor"),
            },
            Notice::Keeping {
                regions: vec![known],
                observers: vec![ObserverStanding { node, epoch: 1, taken: 2, told: 3 }],
            },
            Notice::Search { request: 300, group: group.clone(), document: document.clone() },
            Notice::Searching { node, request: 300 },
            Notice::Searched { node, request: 300, outcome: Standing::Elsewhere { urls } },
            Notice::Observed {
                epoch: 1,
                number: 2,
                observed: vec![observation],
                left: vec![document.clone()],
            },
            Notice::Reached {
                node,
                epoch: 1,
                region: region.clone(),
                storage_id: storage_id.clone(),
                link: LinkId(9),
                documents: vec![(document.clone(), heads.clone())],
            },
        ];
        notices.iter().map(|notice| notice.encode().to_vec()).collect()
    };
    for seed in seeds("notice", make) {
        assert!(Notice::decode(&seed.into()).unwrap().is_some());
    }
}

#[test]
fn base_seeds_are_accepted() {
    let make = || {
        let parts = |salt, divisor| {
            let mut graph = Graph::new();
            for change in follow(&script(salt)).get_changes(&[]) {
                let bytes = Bytes::copy_from_slice(change.raw_bytes());
                let change = Change::decode(bytes, &Limits::default()).unwrap();
                graph.ingest(change, &Limits::default()).unwrap();
            }
            graph.advance_durable(graph.staged_end());
            let (summary, entries) = graph.summarise(graph.staged_end() / divisor);
            let index = BaseIndex::default().extended(entries.into_iter());
            let summary = summary.encode();
            [&u16::try_from(summary.len()).unwrap().to_le_bytes(), &summary[..], &index.encode()].concat()
        };
        vec![parts(1, 1), parts(2, 2), parts(5, 1), parts(9, 4)]
    };
    for seed in seeds("base", make) {
        let (length, rest) = seed.split_first_chunk::<2>().unwrap();
        let (summary, index) = rest.split_at(usize::from(u16::from_le_bytes(*length)));
        let (summary, index) = (BaseSummary::decode(summary).unwrap(), BaseIndex::decode(index).unwrap());
        assert_eq!(summary.change_count, index.len() as u64);
        assert!(summary.heads.iter().all(|head| index.position_of(&head.hash) == Some(head.position)));
    }
}

#[test]
fn log_run_seeds_are_accepted() {
    let make = || {
        let changes = follow(&script(5)).get_changes(&[]);
        let mut entries: Vec<_> = changes
            .iter()
            .take(9)
            .zip([1, 1, 2, 2, 2, 3, 1, 1, 1])
            .map(|(change, document)| Entry {
                document: DocumentId::from_slice(&[document; 16]).unwrap(),
                content: Content::Change {
                    hash: ChangeHash(change.hash().0),
                    bytes: change.raw_bytes().to_vec().into(),
                },
            })
            .collect();
        let document = DocumentId::from_slice(&[2; 16]).unwrap();
        entries.push(Entry {
            document: document.clone(),
            content: Content::Tombstone { deleted_at_ms: 1 << 40 },
        });
        let whole = encode_run(&entries);
        let erased = erase(&whole.clone().into(), &document).unwrap().unwrap();
        let sealed = changes.iter().filter(|change| contents(change.raw_bytes()).len() < 256).take(3);
        let sealed = sealed.flat_map(|change| {
            let contents = contents(change.raw_bytes());
            [&[64, contents.len() as u8][..], &contents].concat()
        });
        vec![
            under(0, &whole),
            under(0, &erased),
            under(0, &encode_run(&entries[..1])),
            under(1, &sealed.collect::<Vec<_>>()),
        ]
    };
    for seed in seeds("log_run", make) {
        if seed[0] == 0 {
            assert!(!open_run(&seed[1..].to_vec().into(), &Limits::default()).unwrap().is_empty());
        }
    }
}

#[test]
fn handshake_seeds_are_accepted() {
    let identity = |region: &str| Identity {
        key: ClusterKey::new(&[42; 32]).unwrap(),
        cluster: ClusterId::new("weather").unwrap(),
        versions: VERSIONS,
        hello: Hello {
            region: RegionName::new(region).unwrap(),
            node: NodeId([1; 16]),
            storage_id: StorageId::new(region).unwrap(),
            groups: ["everywhere", "near"].map(|group| PlacementGroup::new(group).unwrap()).into(),
            features: ["zstd".to_owned()].into(),
            client_url: Some("wss://eu.example".to_owned()),
            lineage: Some([NodeId([1; 16]), NodeId([2; 16])].into()),
        },
    };
    let make = || {
        let (dialler, opening) = Handshake::dial(identity("eu"), Nonce([4; 32]));
        let opening = Bytes::from(opening);
        let Ok(Step::Answer { handshake: acceptor, send: challenge }) =
            Handshake::accept(identity("us"), Nonce([5; 32])).receive(&opening)
        else {
            panic!("expected a challenge")
        };
        let challenge = Bytes::from(challenge);
        let Ok(Step::Answer { send: introduction, .. }) = dialler.receive(&challenge) else {
            panic!("expected an introduction")
        };
        let introduction = Bytes::from(introduction);
        let Ok(Step::Done { send: Some(welcome), .. }) = acceptor.receive(&introduction) else {
            panic!("expected a welcome")
        };
        let messages = [opening, challenge, introduction, welcome.into()];
        let mut seeds: Vec<_> = messages.iter().map(|message| under(0, message)).collect();
        let plain = Hello {
            groups: [].into(),
            features: [].into(),
            client_url: None,
            lineage: None,
            ..identity("us").hello
        };
        seeds.extend([identity("eu").hello, plain].map(|hello| under(1, &hello.encode())));
        seeds
    };
    for seed in seeds("handshake", make) {
        let message = Bytes::copy_from_slice(&seed[1..]);
        match seed[0] {
            1 => _ = Hello::decode(message).unwrap(),
            // An opening is answered; what else there is, is of another handshake.
            _ if message[0] == 1 => {
                let acceptor = Handshake::accept(identity("us"), Nonce([6; 32]));
                assert!(matches!(acceptor.receive(&message), Ok(Step::Answer { .. })));
            }
            _ => {}
        }
    }
}
