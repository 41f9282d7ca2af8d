//! Clients of a running `isobar serve`, over real sockets, on SQLite and on Postgres.
//!
//! The JavaScript client has its own tests in `../interop`.

#![allow(clippy::unwrap_used, reason = "a test that meets an error shall fail")]

mod recording;
mod region;
mod samod_client;
mod trace;
