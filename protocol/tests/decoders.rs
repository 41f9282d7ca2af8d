//! The decoders against automerge itself: what automerge writes, ours read to equal values, and what ours
//! accept, automerge accepts as well.

// The lint's exception for tests does not reach the functions that they share.
#![allow(clippy::unwrap_used)]

#[path = "decoders/authors.rs"]
mod authors;
#[path = "decoders/changes.rs"]
mod changes;
#[path = "decoders/chunk_census.rs"]
mod chunk_census;
#[path = "decoders/draft.rs"]
mod draft;
#[path = "decoders/frames.rs"]
mod frames;
#[path = "decoders/hostile.rs"]
mod hostile;
#[path = "decoders/seeds.rs"]
mod seeds;
#[path = "decoders/sync_messages.rs"]
mod sync_messages;
