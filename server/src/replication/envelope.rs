//! Messages between regions: several frames in one, compressed as a stream.
//!
//! ```text
//! message = 0 frames | 1 raw_length compressed        raw_length: unsigned LEB128
//! frames  = (length frame)*                           length: unsigned LEB128
//! ```
//!
//! What is compressed is one zstd stream per direction of a link, flushed at the end of each message: what was said before (ids
//! of origins, documents and authors above all) need not be said again. A single keystroke's message is mostly that. Messages
//! of kind 0 are not part of the stream.

use std::io;

use bytes::Bytes;
use isobar_protocol::link::LinkFrame;
use isobar_protocol::link::codec::{self, LinkFrameError};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use crate::storage::packing::{push_leb128, take, take_leb128};

/// Frames are gathered into one message up to so many bytes; a single larger frame is a message of its own.
pub(super) const MESSAGE_BYTES: usize = 256 << 10;

/// What a message may have beyond its longest frame: the frame's length, and what a part says of itself.
const OVERHEAD_BYTES: usize = 64;

/// Most bytes that a message may unpack to whose longest frame has so many.
pub(super) const fn message_bytes_max(frame_bytes_max: usize) -> usize {
    frame_bytes_max + OVERHEAD_BYTES
}

/// Smaller messages are not compressed: pings and the like.
const COMPRESS_BYTES_MIN: usize = 32;

/// Half of what faster levels leave, at a third of what a core can do on a link.
const COMPRESSION_LEVEL: i32 = 3;

/// How far back the stream looks, as a power of two: 1 MiB, some thousand keystrokes. Both ends hold that much for each link.
const WINDOW_LOG: u32 = 20;

/// Bytes by which the output grows while a message is compressed.
const OUTPUT_STEP_BYTES: usize = 16 << 10;

const PLAIN: u8 = 0;
const COMPRESSED: u8 = 1;

/// A message that was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnvelopeError {
    #[error("the message is malformed")]
    Malformed,
    #[error("the message unpacks to more than {0} bytes")]
    TooLarge(usize),
    #[error(transparent)]
    Frame(#[from] LinkFrameError),
}

/// Frames on their way into one message.
#[derive(Default)]
pub(super) struct Envelope {
    frames: Vec<u8>,
}

impl Envelope {
    pub(super) fn push(&mut self, frame: &LinkFrame) {
        let bytes = codec::encode(frame);
        push_leb128(&mut self.frames, bytes.len() as u64);
        self.frames.extend_from_slice(&bytes);
    }

    pub(super) fn is_full(&self) -> bool {
        self.frames.len() >= MESSAGE_BYTES
    }
}

/// The sending end of a link's stream.
pub(super) struct Sealer(Encoder<'static>);

impl Sealer {
    pub(super) fn new() -> io::Result<Self> {
        let mut encoder = Encoder::new(COMPRESSION_LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        Ok(Self(encoder))
    }

    /// The message, and how many bytes its frames were. Messages are to be sent in the order in which they are sealed.
    pub(super) fn seal(&mut self, envelope: Envelope) -> io::Result<(Bytes, usize)> {
        let frames = envelope.frames;
        let mut message = Vec::with_capacity(frames.len() / 2 + 64);
        if frames.len() < COMPRESS_BYTES_MIN {
            message.push(PLAIN);
            message.extend_from_slice(&frames);
            return Ok((message.into(), frames.len()));
        }
        message.push(COMPRESSED);
        push_leb128(&mut message, frames.len() as u64);
        let mut input = InBuffer::around(&frames);
        while input.pos() < frames.len() {
            self.step(&mut message, |encoder, output| encoder.run(&mut input, output))?;
        }
        while self.step(&mut message, |encoder, output| encoder.flush(output))? > 0 {}
        Ok((message.into(), frames.len()))
    }

    /// Lets the encoder write behind what there is.
    fn step(
        &mut self,
        message: &mut Vec<u8>,
        work: impl FnOnce(&mut Encoder<'static>, &mut OutBuffer<'_, [u8]>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let start = message.len();
        message.resize(start + OUTPUT_STEP_BYTES, 0);
        let mut output = OutBuffer::around(&mut message[start..]);
        let left = work(&mut self.0, &mut output);
        let written = output.pos();
        message.truncate(start + written);
        left
    }
}

/// The receiving end of a link's stream.
pub(super) struct Opener {
    decoder: Decoder<'static>,
    bytes_max: usize,
}

impl Opener {
    pub(super) fn new(frame_bytes_max: usize) -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Self { decoder, bytes_max: message_bytes_max(frame_bytes_max) })
    }

    /// The frames of a message. Frames that a newer program sent and this one does not know are left out. After an error
    /// the stream is of no use any more.
    pub(super) fn open(&mut self, message: &Bytes) -> Result<Vec<LinkFrame>, EnvelopeError> {
        let mut rest = &message[..];
        let frames = match take(&mut rest, 1).ok_or(EnvelopeError::Malformed)?[0] {
            PLAIN => message.slice_ref(rest),
            COMPRESSED => {
                let raw = take_leb128(&mut rest).ok_or(EnvelopeError::Malformed)?;
                let raw = usize::try_from(raw).unwrap_or(usize::MAX);
                if raw > self.bytes_max {
                    return Err(EnvelopeError::TooLarge(self.bytes_max));
                }
                self.decompress(rest, raw)?
            }
            _ => return Err(EnvelopeError::Malformed),
        };
        split(&frames)
    }

    fn decompress(&mut self, compressed: &[u8], raw: usize) -> Result<Bytes, EnvelopeError> {
        // One byte more than it may be, so that too long a message shows.
        let mut frames = vec![0; raw + 1];
        let mut input = InBuffer::around(compressed);
        let mut output = OutBuffer::around(&mut frames[..]);
        loop {
            let (read, written) = (input.pos(), output.pos());
            self.decoder.run(&mut input, &mut output).map_err(|_| EnvelopeError::Malformed)?;
            if input.pos() == compressed.len() && output.pos() == written {
                break;
            }
            if input.pos() == read && output.pos() == written {
                return Err(EnvelopeError::Malformed);
            }
        }
        let written = output.pos();
        if written != raw {
            return Err(EnvelopeError::Malformed);
        }
        frames.truncate(raw);
        Ok(frames.into())
    }
}

fn split(frames: &Bytes) -> Result<Vec<LinkFrame>, EnvelopeError> {
    let mut rest = &frames[..];
    let mut opened = Vec::new();
    while !rest.is_empty() {
        let length = take_leb128(&mut rest).ok_or(EnvelopeError::Malformed)?;
        let length = usize::try_from(length).map_err(|_| EnvelopeError::Malformed)?;
        let frame = take(&mut rest, length).ok_or(EnvelopeError::Malformed)?;
        match codec::decode(frames.slice_ref(frame)) {
            Ok(frame) => opened.push(frame),
            Err(LinkFrameError::UnknownFrame(kind)) => tracing::debug!(kind, "unknown frame from a peer"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use isobar_protocol::config::LINK_FRAME_BYTES_MAX;
    use isobar_protocol::ids::{OriginId, Seq};
    use isobar_protocol::log::Chain;

    use super::*;

    fn opener() -> Opener {
        Opener::new(LINK_FRAME_BYTES_MAX).unwrap()
    }

    fn entries(bytes: usize) -> LinkFrame {
        let body = (0..bytes).map(|at| (at * at / 7) as u8).collect::<Vec<u8>>().into();
        LinkFrame::Entries { origin: OriginId(uuid::Uuid::nil()), first: Seq(1), chain: Chain::START, body }
    }

    fn seal(sealer: &mut Sealer, frames: &[LinkFrame]) -> (Bytes, usize) {
        let mut envelope = Envelope::default();
        frames.iter().for_each(|frame| envelope.push(frame));
        sealer.seal(envelope).unwrap()
    }

    #[test]
    fn frames_come_back_message_by_message() {
        let (mut sealer, mut opener) = (Sealer::new().unwrap(), opener());
        for bytes in [10, 100_000, 0, 300, 3 << 20, 5] {
            let frames = [LinkFrame::Ping { sent_ms: 5 }, entries(bytes), LinkFrame::Pong { sent_ms: 6 }];
            let (message, raw) = seal(&mut sealer, &frames);
            assert!(raw > bytes);
            assert_eq!(opener.open(&message).unwrap(), frames);
            let (small, _) = seal(&mut sealer, &frames[..1]);
            assert_eq!(small[0], PLAIN);
            assert_eq!(opener.open(&small).unwrap(), frames[..1]);
        }
    }

    #[test]
    fn what_was_said_before_costs_little() {
        let mut sealer = Sealer::new().unwrap();
        let (first, raw) = seal(&mut sealer, &[entries(200)]);
        let (second, _) = seal(&mut sealer, &[entries(200)]);
        assert!(
            second.len() < first.len() / 4 && second.len() < raw / 4,
            "{} then {}",
            first.len(),
            second.len()
        );
    }

    #[test]
    fn damaged_messages_are_refused_and_never_panic() {
        let (message, _) = seal(&mut Sealer::new().unwrap(), &[entries(2_000)]);
        for length in 0..message.len() {
            assert!(opener().open(&message.slice(..length)).is_err(), "cut to {length}");
        }
        for at in 0..message.len() {
            let mut flipped = message.to_vec();
            flipped[at] ^= 0x10;
            let _ = opener().open(&flipped.into());
        }
    }

    #[test]
    fn a_message_is_as_long_as_it_says() {
        let (message, raw) = seal(&mut Sealer::new().unwrap(), &[entries(2_000)]);
        let mut rest = &message[1..];
        take_leb128(&mut rest).unwrap();
        for claimed in [raw - 1, raw + 1, message_bytes_max(LINK_FRAME_BYTES_MAX)] {
            let mut lying = vec![COMPRESSED];
            push_leb128(&mut lying, claimed as u64);
            lying.extend_from_slice(rest);
            assert!(matches!(opener().open(&lying.into()), Err(EnvelopeError::Malformed)));
        }
    }

    #[test]
    fn a_claim_of_too_many_bytes_is_refused_before_they_are_allocated() {
        let mut message = vec![COMPRESSED];
        push_leb128(&mut message, u64::from(u32::MAX));
        assert!(matches!(opener().open(&message.into()), Err(EnvelopeError::TooLarge(_))));
    }
}
