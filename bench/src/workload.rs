//! What the writers write: real Automerge changes and real Yjs updates, made before any clock starts.
//!
//! A [`Chain`] is a linear history: link 0 is the document as it is first uploaded, every later link is one edit that
//! depends on the one before. A position in it is the number of links held: 0 is nothing, `links()` is all. Documents
//! of one scenario share a chain under different ids, which no server under test can profit from.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use automerge::transaction::{CommitOptions, Transactable};
use automerge::{ActorId, AutoCommit, ObjType, ROOT, ReadDoc};
use bytes::Bytes;
use yrs::block::ClientID;
use yrs::{GetString, ReadTxn, StateVector, Text, Transact};

use crate::frames::Hash;

/// One edit of a chain.
#[derive(Debug)]
pub struct Link {
    pub hash: Hash,
    /// The Automerge change; for link 0 the whole document.
    pub chunk: Bytes,
    /// The same edit as a Yjs update; for link 0 the whole document.
    pub update: Bytes,
}

/// A linear history. Never empty.
#[derive(Debug)]
pub struct Chain {
    links: Vec<Link>,
    by_checksum: HashMap<[u8; 4], u32>,
    /// The Yjs clock of the first character after link 0.
    yjs_clock: u64,
    /// The text at the end of link 0.
    base_text: String,
}

/// The only Yjs client that writes; its clock counts characters.
const YJS_CLIENT: ClientID = ClientID::new(1);

/// A document in both worlds.
pub struct Seed {
    pub automerge: AutoCommit,
    pub yjs: yrs::Doc,
}

impl Seed {
    /// A document with one character.
    pub fn small() -> Result<Self> {
        Self::numbered(0)
    }

    /// The same by another author, so that no hash of its chain is that of another's.
    pub fn numbered(number: u32) -> Result<Self> {
        let mut author = [1; 16];
        author[12..].copy_from_slice(&(0x0101_0101 + number).to_be_bytes());
        let mut automerge = AutoCommit::new().with_actor(ActorId::from(author));
        let text = automerge.put_object(ROOT, "text", ObjType::Text)?;
        automerge.splice_text(&text, 0, 0, ".")?;
        automerge.commit_with(CommitOptions::default().with_time(0));
        let yjs = yjs_document();
        let text = yjs.get_or_insert_text("text");
        text.push(&mut yjs.transact_mut(), ".");
        Ok(Self { automerge, yjs })
    }
}

/// An empty Yjs document whose edits are those of the one writing client.
pub fn yjs_document() -> yrs::Doc {
    yrs::Doc::with_client_id(YJS_CLIENT.get())
}

impl Chain {
    /// `edits` insertions of one character each after what `seed` holds; the edits' authors take turns.
    pub fn build(seed: Seed, edits: usize, authors: usize) -> Result<Self> {
        let Seed { mut automerge, yjs } = seed;
        let (_, text) = automerge.get(ROOT, "text")?.context("the seed has a text")?;
        let yjs_text = yjs.get_or_insert_text("text");
        let base_text = automerge.text(&text)?;
        ensure!(base_text == yjs_text.get_string(&yjs.transact()), "the seeds differ");

        let mut links = Vec::with_capacity(edits + 1);
        let head = |document: &mut AutoCommit| document.get_heads()[0].0;
        let update = yjs.transact().encode_state_as_update_v1(&StateVector::default());
        links.push(Link {
            hash: head(&mut automerge),
            chunk: automerge.save().into(),
            update: update.into(),
        });
        let yjs_clock = yjs.transact().state_vector().get(&YJS_CLIENT).into();

        let length = base_text.chars().count();
        let yjs_length = base_text.len() as u32;
        for edit in 0..edits {
            automerge.set_actor(ActorId::from([2 + (edit % authors) as u8; 16]));
            automerge.splice_text(&text, length + edit, 0, "x")?;
            automerge.commit_with(CommitOptions::default().with_time(0));
            let change = automerge.get_last_local_change().context("an edit makes a change")?;
            let chunk = Bytes::copy_from_slice(change.raw_bytes());
            let mut transaction = yjs.transact_mut();
            yjs_text.insert(&mut transaction, yjs_length + edit as u32, "x");
            links.push(Link { hash: change.hash().0, chunk, update: transaction.encode_update_v1().into() });
        }
        let checksum = |link: &Link| [link.hash[0], link.hash[1], link.hash[2], link.hash[3]];
        let by_checksum = links.iter().enumerate().map(|(at, link)| (checksum(link), at as u32)).collect();
        Ok(Self { links, by_checksum, yjs_clock, base_text })
    }

    /// How many links there are; also the position that holds everything.
    pub fn links(&self) -> u32 {
        self.links.len() as u32
    }

    pub fn link(&self, at: u32) -> &Link {
        &self.links[at as usize]
    }

    pub fn base_text(&self) -> &str {
        &self.base_text
    }

    /// The heads of somebody who stands at a position.
    pub fn heads(&self, position: u32) -> &[Hash] {
        match position {
            0 => &[],
            position => std::slice::from_ref(&self.links[position as usize - 1].hash),
        }
    }

    /// Which link a chunk's checksum names.
    pub fn find_checksum(&self, checksum: [u8; 4]) -> Option<u32> {
        self.by_checksum.get(&checksum).copied()
    }

    /// Which link a hash names.
    pub fn find_hash(&self, hash: &Hash) -> Option<u32> {
        let at = self.find_checksum([hash[0], hash[1], hash[2], hash[3]])?;
        (self.links[at as usize].hash == *hash).then_some(at)
    }

    /// The position of a Yjs document whose writing client has reached a clock.
    pub fn position_at_clock(&self, clock: u64) -> u32 {
        match clock.checked_sub(self.yjs_clock) {
            Some(edits) => 1 + edits as u32,
            None => 0,
        }
    }

    /// The position of a Yjs document with this state vector.
    pub fn position_at(&self, state: &StateVector) -> u32 {
        self.position_at_clock(state.get(&YJS_CLIENT).into())
    }
}

/// A document of a scenario.
#[derive(Debug, Clone)]
pub struct Document {
    /// The id as Automerge clients write it; Yjs servers use the same text as name.
    pub id: Arc<str>,
    pub chain: Arc<Chain>,
}

impl Document {
    /// The document numbered `number` of a scenario; equal numbers name equal documents in every run.
    pub fn numbered(number: u32, chain: &Arc<Chain>) -> Self {
        // In the shape of a random UUID (version 4, variant 1): the JavaScript servers take nothing else.
        let mut id = *b"isobar\x4fb\x8fnch\0\0\0\0";
        id[12..].copy_from_slice(&number.to_be_bytes());
        Self { id: bs58::encode(id).with_check().into_string().into(), chain: Arc::clone(chain) }
    }
}

#[cfg(test)]
mod tests {
    use automerge::Automerge;
    use yrs::Update;
    use yrs::updates::decoder::Decode;

    use super::*;

    #[test]
    fn a_chain_replays_to_the_same_text_in_both_worlds() {
        let chain = Chain::build(Seed::small().unwrap(), 7, 3).unwrap();
        let all =
            |part: fn(&Link) -> &Bytes| (0..chain.links()).map(|at| part(chain.link(at)).to_vec()).collect();
        let chunks: Vec<Vec<u8>> = all(|link| &link.chunk);
        let document = Automerge::load(&chunks.concat()).unwrap();
        let (_, text) = document.get(ROOT, "text").unwrap().unwrap();
        assert_eq!(document.text(&text).unwrap(), ".xxxxxxx");
        assert_eq!(document.get_heads()[0].0, chain.heads(chain.links())[0]);

        let yjs = yrs::Doc::new();
        let updates: Vec<Vec<u8>> = all(|link| &link.update);
        for (at, update) in updates.iter().enumerate() {
            yjs.transact_mut().apply_update(Update::decode_v1(update).unwrap()).unwrap();
            assert_eq!(chain.position_at(&yjs.transact().state_vector()), at as u32 + 1);
        }
        assert_eq!(yjs.get_or_insert_text("text").get_string(&yjs.transact()), ".xxxxxxx");
    }

    #[test]
    fn positions_are_found_by_hash_and_an_unknown_hash_is_not() {
        let chain = Chain::build(Seed::small().unwrap(), 2, 1).unwrap();
        assert_eq!(chain.find_hash(&chain.link(2).hash), Some(2));
        let mut other = chain.link(2).hash;
        other[31] ^= 1;
        assert_eq!(chain.find_hash(&other), None);
        assert!(chain.heads(0).is_empty());
    }
}
