//! The decoders against automerge itself: what automerge writes, ours read to equal values, and what ours
//! accept, automerge accepts as well.

#[path = "decoders/authors.rs"]
mod authors;
#[path = "decoders/changes.rs"]
mod changes;
