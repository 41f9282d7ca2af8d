use proptest::prelude::*;

use super::*;
use crate::config::{
    CLIENT_URL_BYTES_MAX, LINK_FEATURE_BYTES_MAX, LINK_FEATURES_MAX, LINK_LINEAGE_MAX, REGION_GROUPS_MAX,
};

const DIALLED: Nonce = Nonce([0xd1; 32]);
const ACCEPTED: Nonce = Nonce([0xac; 32]);

fn hello(region: &str) -> Hello {
    Hello {
        region: RegionName::new(region).unwrap(),
        node: NodeId([region.as_bytes()[0]; 16]),
        storage_id: StorageId::new(&format!("storage of {region}")).unwrap(),
        groups: ["everywhere", "near"].map(|group| PlacementGroup::new(group).unwrap()).into(),
        features: ["zstd".to_owned()].into(),
        client_url: Some(format!("wss://{region}.example")),
        lineage: Some([1, 2, region.as_bytes()[0]].map(|node| NodeId([node; 16])).into()),
    }
}

fn identity(region: &str) -> Identity {
    Identity {
        key: ClusterKey::new(&[42; 32]).unwrap(),
        cluster: ClusterId::new("weather").unwrap(),
        versions: Versions { min: 1, max: 3 },
        hello: hello(region),
    }
}

/// What happened to both sides, up to and including the first refusal.
struct Outcome {
    /// All messages, the dialler's first.
    sent: Vec<Bytes>,
    dialler: Option<Result<Agreed, HandshakeError>>,
    acceptor: Option<Result<Agreed, HandshakeError>>,
}

impl Outcome {
    /// That the message which was tampered with, or which comes first from a stranger, is refused by its receiver
    /// or, if nothing was proved before it, by who sent it.
    fn refused(self) -> HandshakeError {
        match (self.dialler, self.acceptor) {
            (Some(Err(error)), None) | (None, Some(Err(error))) => error,
            // The acceptor is done before the dialler has read its last message.
            (Some(Err(error)), Some(Ok(_))) => error,
            (dialler, acceptor) => panic!("expected to be refused: {dialler:?}, {acceptor:?}"),
        }
    }
}

/// Lets two identities shake hands over a wire that changes the messages, which are numbered from 0.
fn over(dialler: Identity, acceptor: Identity, mut wire: impl FnMut(usize, &[u8]) -> Vec<u8>) -> Outcome {
    let (dialling, first) = Handshake::dial(dialler, DIALLED);
    let mut sides = [Some(dialling), Some(Handshake::accept(acceptor, ACCEPTED))];
    let mut outcomes = [None, None];
    let mut sent = vec![Bytes::from(first)];
    for turn in 0.. {
        let receiver = (turn + 1) % 2;
        let Some(side) = sides[receiver].take() else { break };
        let send = match side.receive(&wire(turn, &sent[turn]).into()) {
            Ok(Step::Answer { handshake, send }) => {
                sides[receiver] = Some(handshake);
                Some(send)
            }
            Ok(Step::Done { agreed, send }) => {
                outcomes[receiver] = Some(Ok(agreed));
                send
            }
            Err(error) => {
                outcomes[receiver] = Some(Err(error));
                None
            }
        };
        let Some(send) = send else { break };
        sent.push(send.into());
    }
    let [dialler, acceptor] = outcomes;
    Outcome { sent, dialler, acceptor }
}

fn untouched(_: usize, message: &[u8]) -> Vec<u8> {
    message.to_vec()
}

/// A handshake as it should be.
fn agreed() -> Vec<Bytes> {
    over(identity("eu"), identity("us"), untouched).sent
}

/// An acceptor that has seen an opening.
fn challenger(nonce: Nonce, opening: &Bytes) -> (Handshake, Bytes) {
    match Handshake::accept(identity("us"), nonce).receive(opening) {
        Ok(Step::Answer { handshake, send }) => (handshake, send.into()),
        other => panic!("expected a challenge, found {other:?}"),
    }
}

#[test]
fn both_sides_agree_and_learn_who_the_other_is() {
    let outcome = over(identity("eu"), identity("us"), untouched);
    assert_eq!(outcome.dialler, Some(Ok(Agreed { version: 3, peer: hello("us") })));
    assert_eq!(outcome.acceptor, Some(Ok(Agreed { version: 3, peer: hello("eu") })));
    assert_eq!(outcome.sent.len(), 4);
}

#[test]
fn the_highest_common_version_is_chosen() {
    let newer = Identity { versions: Versions { min: 2, max: 9 }, ..identity("eu") };
    let outcome = over(newer, identity("us"), untouched);
    assert_eq!(outcome.dialler.unwrap().unwrap().version, 3);
    assert_eq!(outcome.acceptor.unwrap().unwrap().version, 3);
}

#[test]
fn disjoint_versions_are_refused() {
    let newer = Versions { min: 4, max: 9 };
    let ours = Versions { min: 1, max: 3 };
    let error = over(Identity { versions: newer, ..identity("eu") }, identity("us"), untouched).refused();
    assert_eq!(error, HandshakeError::NoCommonVersion { ours, theirs: newer });
    // The dialler checks for itself.
    let (dialler, opening) = Handshake::dial(identity("eu"), DIALLED);
    let mut transcript = Transcript::new(&identity("us").key);
    transcript.append(&opening);
    let challenge = Challenge { versions: newer, nonce: ACCEPTED }.encode();
    let challenge = transcript.prove(kind::CHALLENGE, challenge);
    let error = dialler.receive(&challenge.into()).unwrap_err();
    assert_eq!(error, HandshakeError::NoCommonVersion { ours, theirs: newer });
}

#[test]
fn another_key_is_refused_before_the_dialler_says_who_it_is() {
    let stranger = Identity { key: ClusterKey::new(&[43; 32]).unwrap(), ..identity("us") };
    let outcome = over(identity("eu"), stranger, untouched);
    assert_eq!(outcome.sent.len(), 2, "an opening and a challenge, and no introduction");
    assert_eq!(outcome.dialler, Some(Err(HandshakeError::WrongKey)));
    assert_eq!(outcome.acceptor, None);
}

#[test]
fn a_dialler_with_another_key_that_goes_on_regardless_is_refused() {
    let stranger = Identity { key: ClusterKey::new(&[43; 32]).unwrap(), ..identity("eu") };
    let (handshake, opening) = Handshake::dial(stranger, DIALLED);
    let (acceptor, challenge) = challenger(ACCEPTED, &opening.into());
    assert!(matches!(handshake.receive(&challenge), Err(HandshakeError::WrongKey)));
    // It introduces itself with a proof under the key that it holds.
    let mut transcript = Transcript::new(&ClusterKey::new(&[43; 32]).unwrap());
    let introduction = transcript.prove(kind::INTRODUCTION, hello("eu").encode());
    assert_eq!(acceptor.receive(&introduction.into()).unwrap_err(), HandshakeError::WrongKey);
}

#[test]
fn another_cluster_is_refused() {
    let other = Identity { cluster: ClusterId::new("climate").unwrap(), ..identity("eu") };
    let outcome = over(other, identity("us"), untouched);
    assert_eq!(outcome.sent.len(), 1, "nothing is answered");
    assert_eq!(outcome.refused(), HandshakeError::OtherCluster("climate".to_owned()));
}

#[test]
fn a_region_does_not_link_to_its_own_name() {
    let outcome = over(identity("eu"), identity("eu"), untouched);
    assert_eq!(outcome.refused(), HandshakeError::OwnRegion(RegionName::new("eu").unwrap()));
}

#[test]
fn the_dialler_does_not_link_to_its_own_name_either() {
    // An acceptor that does not mind, with the key.
    let (dialler, opening) = Handshake::dial(identity("eu"), DIALLED);
    let (mut acceptor, challenge) = challenger(ACCEPTED, &opening.into());
    acceptor.identity.hello = hello("eu");
    let Ok(Step::Answer { handshake: dialler, send }) = dialler.receive(&challenge) else { panic!() };
    let introduction = Bytes::from(send);
    acceptor.transcript.verify(kind::INTRODUCTION, &introduction).unwrap();
    let welcome = acceptor.transcript.prove(kind::WELCOME, hello("eu").encode());
    let own = RegionName::new("eu").unwrap();
    assert_eq!(dialler.receive(&welcome.into()).unwrap_err(), HandshakeError::OwnRegion(own));
}

#[test]
fn strangers_learn_neither_names_nor_groups_nor_ids() {
    let sent = agreed();
    let secrets: [&[u8]; 7] = [b"eu", b"us", b"storage", b"everywhere", b"near", b"zstd", b"example"];
    for message in &sent[..2] {
        for secret in secrets {
            let found = message.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "{:?} in a message to a stranger", String::from_utf8_lossy(secret));
        }
        assert!(!message.windows(16).any(|window| window == [b'u'; 16] || window == [b'e'; 16]));
    }
    let to_who_proved_it = &sent[2];
    assert!(to_who_proved_it.windows(7).any(|window| window == b"storage"), "the search finds what is there");
}

#[test]
fn a_replayed_introduction_is_refused() {
    let sent = agreed();
    let (acceptor, challenge) = challenger(Nonce([0xad; 32]), &sent[0]);
    assert_ne!(challenge, sent[1]);
    assert_eq!(acceptor.receive(&sent[2]).unwrap_err(), HandshakeError::WrongKey);
    // With the nonce of then it would be taken: it is the nonce that refuses it.
    let (acceptor, _) = challenger(ACCEPTED, &sent[0]);
    assert!(matches!(acceptor.receive(&sent[2]), Ok(Step::Done { .. })));
}

#[test]
fn a_replayed_challenge_or_welcome_is_refused() {
    let sent = agreed();
    let (dialler, opening) = Handshake::dial(identity("eu"), Nonce([0xd2; 32]));
    assert_eq!(dialler.receive(&sent[1]).unwrap_err(), HandshakeError::WrongKey);
    let (dialler, _) = Handshake::dial(identity("eu"), Nonce([0xd2; 32]));
    let (_, challenge) = challenger(ACCEPTED, &opening.into());
    let Ok(Step::Answer { handshake: dialler, .. }) = dialler.receive(&challenge) else { panic!() };
    assert_eq!(dialler.receive(&sent[3]).unwrap_err(), HandshakeError::WrongKey);
}

#[test]
fn a_reflected_proof_is_refused() {
    let sent = agreed();
    let under = |kind: u8, message: &Bytes| Bytes::from([&[kind], &message[1..]].concat());
    // Its own challenge comes back to the acceptor as an introduction.
    let (acceptor, challenge) = challenger(ACCEPTED, &sent[0]);
    let reflected = acceptor.receive(&under(kind::INTRODUCTION, &challenge)).unwrap_err();
    assert_eq!(reflected, HandshakeError::WrongKey);
    // Its own introduction comes back to the dialler as a welcome.
    let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
    let Ok(Step::Answer { handshake: dialler, send }) = dialler.receive(&sent[1]) else { panic!() };
    let reflected = dialler.receive(&under(kind::WELCOME, &send.into())).unwrap_err();
    assert_eq!(reflected, HandshakeError::WrongKey);
    // Its own opening comes back to the dialler.
    let (dialler, opening) = Handshake::dial(identity("eu"), DIALLED);
    assert_eq!(dialler.receive(&opening.into()).unwrap_err(), HandshakeError::OutOfTurn(kind::OPENING));
}

#[test]
fn a_proof_is_good_in_its_own_message_only() {
    let transcript = || Transcript::new(&identity("eu").key);
    let message = transcript().prove(kind::INTRODUCTION, hello("eu").encode());
    let elsewhere = [&[kind::WELCOME], &message[1..]].concat();
    assert!(transcript().verify(kind::INTRODUCTION, &message.into()).is_ok());
    let refused = transcript().verify(kind::WELCOME, &elsewhere.into());
    assert_eq!(refused, Err(HandshakeError::WrongKey), "after the same messages");
}

#[test]
fn a_proof_of_another_handshake_with_the_same_peer_is_refused() {
    let first = agreed();
    let (dialler, opening) = Handshake::dial(identity("eu"), Nonce([9; 32]));
    let (acceptor, challenge) = challenger(Nonce([8; 32]), &opening.into());
    let Ok(Step::Answer { handshake: dialler, .. }) = dialler.receive(&challenge) else { panic!() };
    assert_eq!(acceptor.receive(&first[2]).unwrap_err(), HandshakeError::WrongKey);
    assert_eq!(dialler.receive(&first[3]).unwrap_err(), HandshakeError::WrongKey);
}

#[test]
fn a_byte_changed_anywhere_is_refused() {
    let sent = agreed();
    for (number, message) in sent.iter().enumerate() {
        for at in 0..message.len() {
            for flip in [1, 0x80, 0xff] {
                let outcome = over(identity("eu"), identity("us"), |turn, message| {
                    let mut message = message.to_vec();
                    if turn == number {
                        message[at] ^= flip;
                    }
                    message
                });
                assert!(!matches!(outcome.dialler, Some(Ok(_))), "message {number}, byte {at}");
                if number < 3 {
                    assert!(!matches!(outcome.acceptor, Some(Ok(_))), "message {number}, byte {at}");
                }
                outcome.refused();
            }
        }
    }
}

#[test]
fn a_message_that_is_cut_or_extended_is_refused() {
    for (number, message) in agreed().iter().enumerate() {
        for length in (0..message.len()).chain([message.len() + 1]) {
            let outcome = over(identity("eu"), identity("us"), |turn, message| {
                let mut message = message.to_vec();
                if turn == number {
                    message.resize(length, 0);
                }
                message
            });
            // Only an opening may be longer than what is known of it, and then the dialler notices by the proof.
            outcome.refused();
        }
    }
}

#[test]
fn messages_out_of_turn_are_refused() {
    let sent = agreed();
    let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
    assert_eq!(dialler.receive(&sent[3]).unwrap_err(), HandshakeError::OutOfTurn(kind::WELCOME));
    let acceptor = Handshake::accept(identity("us"), ACCEPTED);
    assert_eq!(acceptor.receive(&sent[2]).unwrap_err(), HandshakeError::OutOfTurn(kind::INTRODUCTION));
    let acceptor = Handshake::accept(identity("us"), ACCEPTED);
    assert_eq!(acceptor.receive(&Bytes::from_static(&[99])).unwrap_err(), HandshakeError::OutOfTurn(99));
}

#[test]
fn a_message_beyond_the_limit_is_refused_unread() {
    let acceptor = Handshake::accept(identity("us"), ACCEPTED);
    let message = Bytes::from(vec![kind::OPENING; HANDSHAKE_BYTES_MAX + 1]);
    assert_eq!(acceptor.receive(&message).unwrap_err(), HandshakeError::TooLong(HANDSHAKE_BYTES_MAX + 1));
}

#[test]
fn a_refusal_says_why_and_is_not_answered() {
    let reasons = [
        (HandshakeError::TooLong(9), Refusal::Malformed),
        (HandshakeError::OtherCluster("x".to_owned()), Refusal::OtherCluster),
        (HandshakeError::WrongKey, Refusal::WrongKey),
        (HandshakeError::OwnRegion(RegionName::new("eu").unwrap()), Refusal::OwnRegion),
        (HandshakeError::NoCommonVersion { ours: VERSIONS, theirs: VERSIONS }, Refusal::NoCommonVersion),
    ];
    for (error, reason) in reasons {
        let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
        let heard = dialler.receive(&error.refusal().unwrap().into()).unwrap_err();
        assert_eq!(heard, HandshakeError::Refused(reason));
        assert_eq!(heard.refusal(), None);
    }
    let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
    let sibling = dialler.receive(&Refusal::KeptElsewhere.encode().into()).unwrap_err();
    assert_eq!(sibling, HandshakeError::Refused(Refusal::KeptElsewhere));
    let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
    let newer = Bytes::from_static(&[kind::REFUSAL, 77, 1, 2]);
    assert_eq!(dialler.receive(&newer).unwrap_err(), HandshakeError::Refused(Refusal::Other(77)));
}

#[test]
fn a_key_is_not_short_and_is_not_printed() {
    assert_eq!(ClusterKey::new(&[]).unwrap_err(), KeyTooShort { bytes: 0 });
    assert_eq!(ClusterKey::new(&[7; 31]).unwrap_err(), KeyTooShort { bytes: 31 });
    let printed = format!("{:?}", Handshake::accept(identity("us"), ACCEPTED));
    assert!(!printed.contains("42"), "{printed}");
}

#[test]
fn fields_that_a_newer_version_appends_are_skipped_and_proved() {
    let (dialler, opening) = Handshake::dial(identity("eu"), DIALLED);
    let (mut acceptor, challenge) = challenger(ACCEPTED, &opening.into());
    let Ok(Step::Answer { handshake: dialler, send }) = dialler.receive(&challenge) else { panic!() };
    acceptor.transcript.verify(kind::INTRODUCTION, &send.into()).unwrap();
    let newer = [hello("us").encode(), vec![1, 2, 3]].concat();
    let welcome = acceptor.transcript.prove(kind::WELCOME, newer);
    match dialler.receive(&welcome.into()) {
        Ok(Step::Done { agreed, .. }) => assert_eq!(agreed.peer, hello("us")),
        other => panic!("expected to agree, found {other:?}"),
    }
}

#[test]
fn a_hello_beyond_its_limits_is_refused() {
    let refused = |hello: &Hello| Hello::decode(hello.encode().into()).is_err();
    let mut at_most = hello("eu");
    let group = |number: usize| PlacementGroup::new(&format!("{number:0256}")).unwrap();
    at_most.groups = (0..REGION_GROUPS_MAX).map(group).collect();
    at_most.features =
        (0..LINK_FEATURES_MAX).map(|number| format!("{number:0LINK_FEATURE_BYTES_MAX$}")).collect();
    at_most.client_url = Some("u".repeat(CLIENT_URL_BYTES_MAX));
    at_most.lineage = Some(vec![NodeId([7; 16]); LINK_LINEAGE_MAX]);
    assert!(!refused(&at_most));
    assert!(at_most.encode().len() * 2 < HANDSHAKE_BYTES_MAX);
    let mut beyond = at_most.clone();
    beyond.groups.insert(group(REGION_GROUPS_MAX));
    assert!(refused(&beyond));
    let mut beyond = at_most.clone();
    beyond.features.insert("one more".to_owned());
    assert!(refused(&beyond));
    let beyond = Hello { features: ["f".repeat(LINK_FEATURE_BYTES_MAX + 1)].into(), ..hello("eu") };
    assert!(refused(&beyond));
    let beyond = Hello { lineage: Some(vec![NodeId([7; 16]); LINK_LINEAGE_MAX + 1]), ..hello("eu") };
    assert!(refused(&beyond));
    let beyond = Hello { client_url: Some("u".repeat(CLIENT_URL_BYTES_MAX + 1)), ..at_most };
    assert!(refused(&beyond));
}

#[test]
fn a_hello_of_before_lineages_is_told_from_an_empty_lineage() {
    for lineage in [None, Some(Vec::new()), Some(vec![NodeId([1; 16]), NodeId([0; 16])])] {
        let hello = Hello { lineage, ..hello("eu") };
        assert_eq!(Hello::decode(hello.encode().into()), Ok(hello));
    }
}

proptest! {
    #[test]
    fn noise_never_ends_a_handshake_well(noise in prop::collection::vec(any::<u8>(), 0..300), kind in 0..6_u8) {
        let message = Bytes::from([vec![kind], noise].concat());
        let (dialler, _) = Handshake::dial(identity("eu"), DIALLED);
        prop_assert!(dialler.receive(&message).is_err());
        let (acceptor, _) = challenger(ACCEPTED, &agreed()[0]);
        prop_assert!(acceptor.receive(&message).is_err());
        let _ = Handshake::accept(identity("us"), ACCEPTED).receive(&message);
        if let Ok(hello) = Hello::decode(message.clone()) {
            prop_assert!(message.starts_with(&hello.encode()));
        }
    }
}
