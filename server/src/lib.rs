//! A node of Isobar: storage, group commit, live documents, clients' sessions, HTTP.
//!
//! The dependency direction is storage → commit, documents → connection → http → app → main. What synchronisation
//! means is decided in `isobar-protocol`; this crate reads inputs, calls it, and performs what it answers.

pub mod app;
pub mod commit;
pub mod config;
mod connection;
pub mod demo;
pub mod documents;
mod http;
pub mod materialise;
pub mod node;
pub mod outbox;
pub mod receipts;
pub mod recent_log;
pub mod replication;
pub mod scrub;
pub mod siblings;
pub mod storage;
pub mod telemetry;
