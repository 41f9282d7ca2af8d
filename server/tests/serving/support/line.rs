//! A TCP connection that may be as slow as a test wants it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

pub struct Line {
    stream: TcpStream,
    pace: Option<Pace>,
}

struct Pace {
    every: Duration,
    bytes: usize,
    next: Pin<Box<Sleep>>,
}

impl Line {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, pace: None }
    }

    /// From now on so many bytes arrive at a time.
    pub fn throttle(&mut self, every: Duration, bytes: usize) {
        self.pace = Some(Pace { every, bytes, next: Box::pin(tokio::time::sleep(every)) });
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, pace } = &mut *self;
        let Some(pace) = pace else { return Pin::new(stream).poll_read(context, buffer) };
        ready!(pace.next.as_mut().poll(context));
        let room = buffer.remaining().min(pace.bytes);
        let mut piece = ReadBuf::new(buffer.initialize_unfilled_to(room));
        ready!(Pin::new(stream).poll_read(context, &mut piece))?;
        let bytes = piece.filled().len();
        buffer.advance(bytes);
        pace.next = Box::pin(tokio::time::sleep(pace.every));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
