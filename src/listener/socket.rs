//! A client's socket under hyper: bounds how long a client may take nothing, tells bodies when all is sent, and puts
//! our own answer in the place of hyper's automatic ones.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

pub(super) struct Socket {
    io: TokioIo<TcpStream>,
    exchange: Arc<Exchange>,
    malformed: Option<Bytes>,
    /// What is left of the answer that replaces hyper's.
    replacement: Bytes,
    limit: Duration,
    pause: Pin<Box<Sleep>>,
    paused: bool,
}

/// What the socket and the body of one connection tell each other.
#[derive(Default)]
pub(super) struct Exchange {
    /// An answer of a handler is on its way to hyper.
    answering: AtomicBool,
    failure: Mutex<Failure>,
}

#[derive(Default)]
enum Failure {
    #[default]
    None,
    /// The body failed and waits until hyper's buffer is empty.
    Waits(Waker),
    /// It was.
    Flushed,
}

impl Exchange {
    pub(super) fn begin(&self) {
        self.answering.store(true, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.answering.store(false, Ordering::Relaxed);
    }

    /// Whether everything that hyper had when this was asked first is sent.
    pub(super) fn poll_flushed(&self, context: &Context<'_>) -> bool {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*failure, Failure::Flushed) {
            return true;
        }
        *failure = Failure::Waits(context.waker().clone());
        false
    }

    fn flushed(&self) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if let Failure::Waits(waker) = &*failure {
            waker.wake_by_ref();
            *failure = Failure::Flushed;
        }
    }
}

impl Socket {
    pub(super) fn new(
        stream: TcpStream,
        exchange: Arc<Exchange>,
        malformed: Option<Bytes>,
        limit: Duration,
    ) -> Self {
        Self {
            io: TokioIo::new(stream),
            exchange,
            malformed,
            replacement: Bytes::new(),
            limit,
            pause: Box::pin(tokio::time::sleep(limit)),
            paused: false,
        }
    }

    pub(super) fn into_stream(self) -> TcpStream {
        self.io.into_inner()
    }

    /// Turns a wait that lasts longer than the limit into an error.
    fn bound<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.paused = false;
            return written;
        }
        if !self.paused {
            self.paused = true;
            self.pause.as_mut().reset(Instant::now() + self.limit);
        }
        ready!(self.pause.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Whether `bytes`, which hyper writes at once, are an answer that it made up by itself. No handler uses these
    /// statuses, and while one answers it is not looked for.
    fn is_automatic(&self, bytes: &[u8]) -> bool {
        self.malformed.is_some()
            && !self.exchange.answering.load(Ordering::Relaxed)
            && bytes.starts_with(b"HTTP/1.")
            && [&b" 400 "[..], b" 414 ", b" 431 "].iter().any(|status| bytes.get(8..13) == Some(*status))
            && bytes.ends_with(b"\r\n\r\n")
    }

    fn poll_replacement(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.replacement.is_empty() {
            let written = Pin::new(&mut self.io).poll_write(context, &self.replacement);
            let count = ready!(self.bound(context, written))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.replacement.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(context, buffer)
    }
}

impl Write for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let socket = self.get_mut();
        ready!(socket.poll_replacement(context))?;
        if let [head, rest @ ..] = slices
            && rest.iter().all(|slice| slice.is_empty())
            && socket.is_automatic(head)
        {
            socket.replacement = socket.malformed.clone().unwrap_or_default();
            return Poll::Ready(Ok(head.len()));
        }
        let written = Pin::new(&mut socket.io).poll_write_vectored(context, slices);
        socket.bound(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.get_mut();
        ready!(socket.poll_replacement(context))?;
        ready!(Pin::new(&mut socket.io).poll_flush(context))?;
        socket.exchange.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }
}
