//! The sans-io core of Isobar.
//!
//! State machines and codecs that the server, the browser client and the simulator share. Nothing here does
//! input or output: no sockets, no clock, no randomness, no logging, no `async`. Time, where it matters, is an
//! argument; what must happen next is a return value. The crate compiles for wasm32.
//!
//! The dependency direction is [`ids`] and [`config`] → wire formats → change graph → session.

pub mod base;
mod base58;
pub mod bloom;
mod census;
pub mod change;
pub mod chunk;
mod columns;
pub mod config;
pub mod graph;
pub mod ids;
pub mod interest;
mod leb128;
pub mod link;
pub mod log;
pub mod notice;
#[cfg(feature = "planted")]
pub mod planted;
#[cfg(not(feature = "planted"))]
mod planted;
pub mod presence;
pub mod receipts;
pub mod replica;
pub mod scrub;
pub mod session;
pub mod sync_message;
pub mod wire;

pub use leb128::{ReadError, ReadProblem};
