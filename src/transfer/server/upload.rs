//! The body of an answer: exactly the segment's bytes, at the rate that is allowed, under one upload slot.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream};
use http_body::{Body, Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use super::super::Segment;
use super::super::metrics::Metrics;
use super::super::rate::Rate;
use super::super::slots::Slot;
use super::super::stream::Answering;

/// The body of any answer.
pub(super) enum Reply {
    Empty,
    Upload(Box<Upload>),
}

/// A segment on its way to a peer.
pub(super) struct Upload {
    body: BoxStream<'static, io::Result<Bytes>>,
    left: u64,
    /// Read, and waiting for its turn at the rate.
    chunk: Bytes,
    turn: Option<(usize, BoxFuture<'static, ()>)>,
    /// That of its peer and that of all, where there are limits.
    rates: [Option<Arc<Rate>>; 2],
    /// Given back as soon as the last byte is handed over.
    slot: Option<Slot>,
    sent: Counter,
    active: Gauge,
    _answering: Option<Answering>,
}

impl Upload {
    pub(super) fn new(
        segment: Segment,
        slot: Slot,
        rates: [Option<Arc<Rate>>; 2],
        metrics: &Metrics,
    ) -> Self {
        metrics.uploads.inc();
        Self {
            body: segment.body,
            left: segment.range.len(),
            chunk: Bytes::new(),
            turn: None,
            rates,
            slot: Some(slot),
            sent: metrics.upload_bytes.clone(),
            active: metrics.uploads.clone(),
            _answering: None,
        }
    }

    /// The request counts as being answered until the upload ends.
    pub(super) fn during(mut self, answering: Answering) -> Self {
        self._answering = Some(answering);
        self
    }

    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        while self.chunk.is_empty() {
            if self.left == 0 {
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut self.body).poll_next(context)) {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                // Ends the connection short of Content-Length, which the peer sees.
                None => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
            }
            if self.chunk.len() as u64 > self.left {
                self.chunk.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
            }
        }
        let piece = if self.rates.iter().all(Option::is_none) {
            std::mem::take(&mut self.chunk)
        } else {
            let (length, turn) = self.turn.get_or_insert_with(|| turn(&self.rates, self.chunk.len()));
            ready!(turn.as_mut().poll(context));
            let piece = self.chunk.split_to(*length);
            self.turn = None;
            piece
        };
        self.left -= piece.len() as u64;
        self.sent.inc_by(piece.len() as u64);
        if self.left == 0 {
            self.slot = None;
        }
        Poll::Ready(Some(Ok(piece)))
    }
}

/// How many of so many bytes go next, and when.
fn turn(rates: &[Option<Arc<Rate>>; 2], bytes: usize) -> (usize, BoxFuture<'static, ()>) {
    let length = rates.iter().flatten().map(|rate| rate.piece()).fold(bytes, usize::min);
    let rates = rates.clone();
    let pass = async move {
        for rate in rates.into_iter().flatten() {
            rate.pass(length).await;
        }
    };
    (length, pass.boxed())
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.active.dec();
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Upload(upload) => upload.poll_chunk(context).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Upload(upload) => upload.left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Upload(upload) => SizeHint::with_exact(upload.left),
        }
    }
}
