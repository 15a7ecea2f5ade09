//! Layers around a peer connection's socket: fewer and larger reads on the way in, time limits on the way out.
//!
//! Client: hyper <- [`Gather`] <- TLS <- [`Prefetch`] <- socket. Server: hyper <-> [`Guarded`] <-> TLS <-> socket.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Read from the socket at once: four TLS records. rustls itself reads 4 KiB at a time.
const PREFETCH: usize = 64 << 10;

/// Progress that an upload has to make within the stall limit; a peer that takes a byte now and then has stalled.
const PROGRESS: usize = 64 << 10;

/// Reads ahead from the inner stream, in large pieces.
pub(super) struct Prefetch<T> {
    inner: T,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Fills the reader's whole buffer with what is there: TLS gives one record of 16 KiB at a time.
pub(super) struct Gather<T> {
    inner: T,
}

/// Ends a connection whose peer is slow to send a request's header or does not take what it asked for.
pub(super) struct Guarded<T> {
    inner: T,
    requests: Requests,
    limits: StallLimits,
    /// Runs from a header's first byte on; with the number of requests before it.
    header: Option<(u64, Pin<Box<Sleep>>)>,
    /// Runs while a write waits; with the bytes written since it was set.
    write: Option<(usize, Pin<Box<Sleep>>)>,
}

/// How many requests a connection's service has seen, and how many of them are answered.
#[derive(Clone, Default)]
pub(super) struct Requests(Arc<(AtomicU64, AtomicU64)>);

/// Counts a request as answered when it is dropped.
pub(super) struct Answering(Requests);

#[derive(Clone, Copy)]
pub(super) struct StallLimits {
    /// For a whole request header, from its first byte.
    pub(super) header: Duration,
    /// For [`PROGRESS`] bytes of an answer.
    pub(super) write: Duration,
}

impl<T> Prefetch<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner, buffer: vec![0; PREFETCH].into(), start: 0, end: 0 }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Prefetch<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.start == this.end {
            let mut buffer = ReadBuf::new(&mut this.buffer);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut buffer))?;
            (this.start, this.end) = (0, buffer.filled().len());
        }
        let count = out.remaining().min(this.end - this.start);
        out.put_slice(&this.buffer[this.start..this.start + count]);
        this.start += count;
        Poll::Ready(Ok(()))
    }
}

impl<T> Gather<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gather<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        while out.remaining() > 0 {
            let filled = out.filled().len();
            match Pin::new(&mut self.inner).poll_read(context, out) {
                Poll::Ready(Ok(())) if out.filled().len() > filled => {}
                // The end or the error shows again at the next read.
                _ if filled > before => break,
                end => return end,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Requests {
    /// Called when a request arrives.
    pub(super) fn begin(&self) -> Answering {
        self.0.0.fetch_add(1, Ordering::AcqRel);
        Answering(self.clone())
    }

    fn seen(&self) -> u64 {
        self.0.0.load(Ordering::Acquire)
    }

    fn is_idle(&self) -> bool {
        self.0.1.load(Ordering::Acquire) == self.seen()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.0.1.fetch_add(1, Ordering::AcqRel);
    }
}

impl<T> Guarded<T> {
    pub(super) fn new(inner: T, requests: Requests, limits: StallLimits) -> Self {
        Self { inner, requests, limits, header: None, write: None }
    }

    /// After a read that gave `received` bytes, or waits if that is `None`.
    fn check_header(&mut self, context: &mut Context<'_>, received: Option<usize>) -> io::Result<()> {
        let seen = self.requests.seen();
        if self.header.as_ref().is_some_and(|(before, _)| *before != seen) {
            self.header = None;
        }
        if received.is_some_and(|count| count > 0) && self.header.is_none() && self.requests.is_idle() {
            self.header = Some((seen, Box::pin(tokio::time::sleep(self.limits.header))));
        }
        if let Some((_, sleep)) = &mut self.header
            && sleep.as_mut().poll(context).is_ready()
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    fn check_write(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(count)) => {
                if let Some((progress, _)) = &mut self.write {
                    *progress += count;
                    if *progress >= PROGRESS {
                        self.write = None;
                    }
                }
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let limit = self.limits.write;
                let (_, sleep) = self.write.get_or_insert_with(|| (0, Box::pin(tokio::time::sleep(limit))));
                ready!(sleep.as_mut().poll(context));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(context, out);
        let received = read.is_ready().then(|| out.filled().len() - before);
        self.check_header(context, received)?;
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.check_write(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, pieces);
        self.check_write(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(context);
        let done = flushed.is_ready();
        let flushed = ready!(self.check_write(context, flushed.map_ok(|()| 0)));
        if done && flushed.is_ok() {
            self.write = None;
        }
        Poll::Ready(flushed.map(|_| ()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.inner).poll_shutdown(context).map_ok(|()| 0);
        self.check_write(context, closed).map_ok(|_| ())
    }
}

macro_rules! write_through {
    ($($layer:ident),*) => {$(
        impl<T: AsyncWrite + Unpin> AsyncWrite for $layer<T> {
            fn poll_write(
                mut self: Pin<&mut Self>,
                context: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.inner).poll_write(context, bytes)
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                context: &mut Context<'_>,
                pieces: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.inner).poll_write_vectored(context, pieces)
            }

            fn is_write_vectored(&self) -> bool {
                self.inner.is_write_vectored()
            }

            fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_flush(context)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_shutdown(context)
            }
        }
    )*};
}
write_through!(Prefetch, Gather);
