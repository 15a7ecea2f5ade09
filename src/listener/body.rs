//! Bodies of answers: exactly as long as their header says, or visibly cut.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::BoxStream;
use http_body::{Frame, SizeHint};

use super::socket::Exchange;

/// A body of a known length.
pub struct Body {
    source: Source,
    remaining: u64,
    /// Set by the connection that sends it.
    exchange: Option<Arc<Exchange>>,
    /// Dropped with the body: when it is through, or the client is gone.
    _guard: Option<Box<dyn Any + Send>>,
}

enum Source {
    Full(Bytes),
    Stream(BoxStream<'static, io::Result<Bytes>>),
    /// It failed; the error is given on when everything before it is sent.
    Failed(io::Error),
    Over,
}

impl Body {
    /// A body that is there.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { remaining: bytes.len() as u64, source: Source::Full(bytes), exchange: None, _guard: None }
    }

    /// No body.
    pub fn empty() -> Self {
        Self::full(Bytes::new())
    }

    /// `length` bytes that come from `stream`. If it fails, panics, ends early or gives more, the connection ends short.
    pub fn stream(stream: BoxStream<'static, io::Result<Bytes>>, length: u64) -> Self {
        Self { source: Source::Stream(stream), remaining: length, exchange: None, _guard: None }
    }

    /// Keeps `guard` as long as this body.
    #[must_use]
    pub fn guarded(mut self, guard: impl Any + Send) -> Self {
        self._guard = Some(Box::new(guard));
        self
    }

    pub(super) fn attach(&mut self, exchange: Arc<Exchange>) {
        self.exchange = Some(exchange);
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        match &mut self.source {
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then_some(Ok(bytes)))
            }
            Source::Stream(stream) => {
                let polled = catch_unwind(AssertUnwindSafe(|| stream.as_mut().poll_next(context)));
                polled.unwrap_or_else(|_| Poll::Ready(Some(Err(io::Error::other("internal error")))))
            }
            Source::Failed(_) | Source::Over => Poll::Ready(None),
        }
    }

    /// Ends with the error, but not before the socket has all that came before it.
    fn poll_failed(&mut self, context: &Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.exchange.as_ref().is_some_and(|exchange| !exchange.poll_flushed(context)) {
            return Poll::Pending;
        }
        match std::mem::replace(&mut self.source, Source::Over) {
            Source::Failed(error) => Poll::Ready(Some(Err(error))),
            _ => Poll::Ready(None),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let body = self.get_mut();
        if matches!(body.source, Source::Failed(_)) {
            return body.poll_failed(context);
        }
        let error = match std::task::ready!(body.poll_next(context)) {
            Some(Ok(bytes)) if bytes.len() as u64 <= body.remaining => {
                body.remaining -= bytes.len() as u64;
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            None if body.remaining == 0 => return Poll::Ready(None),
            Some(Ok(_)) => io::Error::other("the body is longer than announced"),
            Some(Err(error)) => error,
            None => io::ErrorKind::UnexpectedEof.into(),
        };
        // What is behind the stream ends now, not when the client has read all of it.
        body.source = Source::Failed(error);
        body.poll_failed(context)
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(exchange) = &self.exchange {
            exchange.end();
        }
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}
