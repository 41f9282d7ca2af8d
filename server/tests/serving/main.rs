//! A real node in this process, real WebSockets, standard Automerge peers: what the server promises its clients.

#![allow(clippy::unwrap_used, reason = "a test that meets an error shall fail")]

mod bounds;
mod catch_up;
mod clones;
mod compaction;
mod configuration;
mod demo;
mod dialling;
#[path = "../../../protocol/tests/decoders/draft.rs"]
#[allow(dead_code, reason = "the decoders' tests need more columns")]
mod draft;
mod groups;
mod hostile;
mod lifecycle;
mod links;
mod pace;
mod quarantine;
mod receipts;
mod replication;
mod residency;
mod scrub;
mod siblings;
mod support;
mod tls;
