//! Frames that are longer than others, in parts: cutting them, and putting them together.
//!
//! A part is an ordinary frame, so what people wait for passes between the parts of a document. The frame that they make
//! is never longer than [`LINK_PARTED_BYTES_MAX`]; a link holds the bytes of at most [`LINK_PARTED_FRAMES_MAX`] such frames.
//! Each part says how much is to come, so that too long a frame is refused with its
//! first part, and memory is taken once.

use std::collections::HashMap;

use bytes::Bytes;
use isobar_protocol::config::{
    LINK_FRAME_BYTES_MAX, LINK_PART_BYTES, LINK_PARTED_BYTES_MAX, LINK_PARTED_FRAMES_MAX,
};
use isobar_protocol::link::LinkFrame;
use isobar_protocol::link::codec::{self, LinkFrameError};

/// What fits through links. The defaults are the protocol's; tests make do with less.
#[derive(Debug, Clone, Copy)]
pub struct FrameLimits {
    /// Longest frame that comes whole.
    pub frame_bytes_max: usize,
    /// Longest frame that is put together of parts.
    pub parted_bytes_max: usize,
    /// Whether this node takes parts, and says so. One of before there were parts does not.
    pub takes_parts: bool,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            frame_bytes_max: LINK_FRAME_BYTES_MAX,
            parted_bytes_max: LINK_PARTED_BYTES_MAX,
            takes_parts: true,
        }
    }
}

impl FrameLimits {
    /// Most bytes of one document's contents that fit into a frame to a peer. An eighth of it is left to what may stand beside
    /// them in a page: a page's worth of small documents, and the vector, which is 4 MiB at most.
    pub fn contents_bytes_max(&self, peer_takes_parts: bool) -> usize {
        let frame = if peer_takes_parts { self.parted_bytes_max } else { self.frame_bytes_max };
        frame - frame / 8
    }
}

/// A sequence of parts that makes no frame. The link is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum PartsError {
    #[error("a frame in parts of more than {0} bytes")]
    TooLarge(usize),
    #[error("more than {LINK_PARTED_FRAMES_MAX} frames come in parts at the same time")]
    TooMany,
    #[error("a part does not follow the one before")]
    OutOfStep,
    #[error(transparent)]
    Frame(#[from] LinkFrameError),
}

/// Cuts an encoded frame.
pub(super) fn cut(transfer: u64, frame: Bytes) -> impl Iterator<Item = LinkFrame> {
    let length = frame.len();
    (0..length).step_by(LINK_PART_BYTES).map(move |start| {
        let end = length.min(start + LINK_PART_BYTES);
        LinkFrame::Part { transfer, left: (length - end) as u64, bytes: frame.slice(start..end) }
    })
}

/// A frame of which parts have come.
struct Begun {
    bytes: Vec<u8>,
    left: usize,
}

/// Puts the frames of one link together.
pub(super) struct Assembly {
    bytes_max: usize,
    begun: HashMap<u64, Begun>,
}

impl Assembly {
    pub(super) fn new(limits: &FrameLimits) -> Self {
        Self { bytes_max: limits.parted_bytes_max, begun: HashMap::new() }
    }

    /// Takes a frame as it came. Returns one that is whole, if it is one or completes one.
    pub(super) fn receive(&mut self, frame: LinkFrame) -> Result<Option<LinkFrame>, PartsError> {
        let LinkFrame::Part { transfer, left, bytes } = frame else { return Ok(Some(frame)) };
        let left = usize::try_from(left).map_err(|_| PartsError::TooLarge(self.bytes_max))?;
        if !self.begun.contains_key(&transfer) {
            self.begin(transfer, bytes.len().saturating_add(left))?;
        }
        let begun = self.begun.get_mut(&transfer).ok_or(PartsError::OutOfStep)?;
        if bytes.is_empty() || begun.left != bytes.len().saturating_add(left) {
            return Err(PartsError::OutOfStep);
        }
        begun.bytes.extend_from_slice(&bytes);
        begun.left = left;
        if left > 0 {
            return Ok(None);
        }
        let whole = self.begun.remove(&transfer).map(|begun| begun.bytes).unwrap_or_default();
        match codec::decode_parted(whole.into()) {
            Ok(LinkFrame::Part { .. }) => Err(PartsError::OutOfStep),
            Ok(frame) => Ok(Some(frame)),
            Err(LinkFrameError::UnknownFrame(kind)) => {
                tracing::debug!(kind, "unknown frame from a peer");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn begin(&mut self, transfer: u64, length: usize) -> Result<(), PartsError> {
        if length > self.bytes_max {
            return Err(PartsError::TooLarge(self.bytes_max));
        }
        if self.begun.len() >= LINK_PARTED_FRAMES_MAX {
            return Err(PartsError::TooMany);
        }
        self.begun.insert(transfer, Begun { bytes: Vec::with_capacity(length), left: length });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use isobar_protocol::ids::{OriginId, Seq};
    use isobar_protocol::log::Chain;

    use super::*;

    fn entries(bytes: usize) -> LinkFrame {
        let body = (0..bytes).map(|at| (at * at / 7) as u8).collect::<Vec<u8>>().into();
        LinkFrame::Entries { origin: OriginId(uuid::Uuid::nil()), first: Seq(1), chain: Chain::START, body }
    }

    fn parts(transfer: u64, frame: &LinkFrame) -> Vec<LinkFrame> {
        cut(transfer, codec::encode(frame).into()).collect()
    }

    fn assembly(bytes_max: usize) -> Assembly {
        Assembly::new(&FrameLimits { parted_bytes_max: bytes_max, ..FrameLimits::default() })
    }

    #[test]
    fn two_frames_in_parts_and_whole_ones_between_them_arrive() {
        let mut assembly = assembly(8 << 20);
        let (one, other, whole) = (entries(3 << 20), entries(2 << 20), LinkFrame::Ping { sent_ms: 1 });
        let (mut ones, mut others) = (parts(1, &one).into_iter(), parts(2, &other).into_iter());
        let mut arrived = Vec::new();
        for _ in 0..ones.len() {
            let frames = ones.next().into_iter().chain([whole.clone()]).chain(others.next());
            arrived.extend(frames.filter_map(|frame| assembly.receive(frame).unwrap()));
        }
        arrived.retain(|frame| *frame != whole);
        assert_eq!(arrived, [other, one]);
        assert!(assembly.begun.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_with_its_first_part() {
        let mut assembly = assembly(1 << 20);
        let first = parts(1, &entries(1 << 20)).swap_remove(0);
        assert!(matches!(assembly.receive(first), Err(PartsError::TooLarge(_))));
        let lying = LinkFrame::Part { transfer: 2, left: u64::MAX, bytes: Bytes::from_static(b"x") };
        assert!(matches!(assembly.receive(lying), Err(PartsError::TooLarge(_))));
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused() {
        let frames = parts(1, &entries(700 << 10));
        let mut skipping = assembly(8 << 20);
        skipping.receive(frames[0].clone()).unwrap();
        assert!(matches!(skipping.receive(frames[2].clone()), Err(PartsError::OutOfStep)));
        let mut repeating = assembly(8 << 20);
        repeating.receive(frames[0].clone()).unwrap();
        assert!(matches!(repeating.receive(frames[0].clone()), Err(PartsError::OutOfStep)));
        let empty = LinkFrame::Part { transfer: 7, left: 0, bytes: Bytes::new() };
        assert!(matches!(assembly(8 << 20).receive(empty), Err(PartsError::OutOfStep)));
        let mut crowded = assembly(8 << 20);
        let part = |transfer| LinkFrame::Part { transfer, left: 9, bytes: Bytes::from_static(b"x") };
        crowded.receive(part(1)).unwrap();
        crowded.receive(part(2)).unwrap();
        assert!(matches!(crowded.receive(part(3)), Err(PartsError::TooMany)));
    }

    #[test]
    fn parts_of_parts_and_damaged_frames_are_refused_and_unknown_ones_passed_over() {
        let part =
            |bytes: &'static [u8]| LinkFrame::Part { transfer: 1, left: 0, bytes: Bytes::from_static(bytes) };
        let nested = codec::encode(&part(b"x"));
        let nested = LinkFrame::Part { transfer: 2, left: 0, bytes: nested.into() };
        assert!(matches!(assembly(1 << 20).receive(nested), Err(PartsError::OutOfStep)));
        assert!(matches!(assembly(1 << 20).receive(part(&[8])), Err(PartsError::Frame(_))));
        assert!(assembly(1 << 20).receive(part(&[250, 1, 2])).unwrap().is_none());
    }
}
