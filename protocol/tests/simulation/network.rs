//! The network: connections between regions, in order and without loss while they last; and what cuts them.
//!
//! A connection is a WebSocket, so nothing is lost of it but its end: at whatever frame it breaks, what was sent before has arrived
//! or not, and nothing after it does. Single frames are never dropped, and overtake each other only where two connections exist. That
//! a frame arrives twice, or again much later, is more than a WebSocket does; the core bears it all the same.

use std::collections::VecDeque;

use bytes::Bytes;
use isobar_protocol::link::LinkFrame;
use isobar_protocol::replica::LinkId;

/// A connection between two regions. It has two sides: 0 is who dialled. Stream `n` leads away from side `n`.
#[derive(Debug)]
pub struct Connection {
    pub pair: usize,
    pub ends: [usize; 2],
    pub links: [LinkId; 2],
    /// Whether the side knows of the link and has not closed it.
    pub open: [bool; 2],
    pub streams: [Stream; 2],
    /// The number of each end's disk when its side came up.
    pub disk_numbers: [u64; 2],
}

#[derive(Debug, Default)]
pub struct Stream {
    /// As they travel: encoded.
    pub frames: VecDeque<Bytes>,
    /// When the frame that was sent last arrives.
    pub arrives_at: u64,
    /// Deliveries that were held up by a cut.
    pub held_up: usize,
}

/// Two regions, and what is between them.
#[derive(Debug)]
pub struct Pair {
    pub ends: [usize; 2],
    /// Nothing gets through from that end to the other.
    pub cut: [bool; 2],
    /// A dial is scheduled.
    pub dialling: bool,
    pub connection: Option<usize>,
    /// Something has changed at an end since the two were compared last.
    pub has_moved: bool,
    /// Frames that arrived lately at the other end, each with the life of the sender and that of the receiver.
    pub remembered: [VecDeque<Remembered>; 2],
}

#[derive(Debug)]
pub struct Remembered {
    pub lives: [u64; 2],
    pub frame: LinkFrame,
}

/// How many frames are remembered to be received again.
pub const REMEMBERED_MAX: usize = 12;

impl Pair {
    pub fn new(ends: [usize; 2]) -> Self {
        Self {
            ends,
            cut: [false; 2],
            dialling: false,
            connection: None,
            has_moved: false,
            remembered: [VecDeque::new(), VecDeque::new()],
        }
    }
}
