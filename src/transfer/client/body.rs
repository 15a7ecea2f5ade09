//! A segment's bytes as they come: exactly as many as announced, and a connection that outlives a caller's interest.

use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use hyper::body::Incoming;
use tokio::time::timeout;

use super::Shared;
use super::pool::{Connection, Permit};
use crate::oci::PeerId;

/// A drain that takes longer costs more than a new connection.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The body of one answer.
pub(super) struct Body {
    shared: Arc<Shared>,
    peer: PeerId,
    left: u64,
    /// `None`: all was read, or the connection broke.
    source: Option<Source>,
}

struct Source {
    incoming: Incoming,
    connection: Connection,
    /// Given back after the connection.
    permit: Permit,
}

impl Body {
    pub(super) fn new(
        shared: Arc<Shared>,
        peer: PeerId,
        incoming: Incoming,
        length: u64,
        connection: Connection,
        permit: Permit,
    ) -> Self {
        Self { shared, peer, left: length, source: Some(Source { incoming, connection, permit }) }
    }

    fn end(&mut self) {
        if let Some(source) = self.source.take() {
            self.shared.pool.put(&self.peer, source.connection);
        }
    }
}

impl Stream for Body {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Some(source) = &mut self.source else { return Poll::Ready(None) };
            let frame = ready!(source.connection.poll_frame(&mut source.incoming, context));
            let error = match frame {
                // Trailers: not part of the protocol.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(mut data) if !data.is_empty() => {
                        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
                        data.truncate(left);
                        self.left -= data.len() as u64;
                        self.shared.metrics.fetch_bytes.inc_by(data.len() as u64);
                        if self.left == 0 {
                            self.end();
                        }
                        return Poll::Ready(Some(Ok(data)));
                    }
                    _ => continue,
                },
                Some(Err(error)) => {
                    let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
                    io::Error::new(cause.map_or(io::ErrorKind::UnexpectedEof, io::Error::kind), error)
                }
                None => io::ErrorKind::UnexpectedEof.into(),
            };
            self.source = None;
            return Poll::Ready(Some(Err(error)));
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let Some(source) = self.source.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let cost = u32::try_from(self.left.div_ceil(1024)).unwrap_or(u32::MAX);
        let Ok(budget) = Arc::clone(&self.shared.drains).try_acquire_many_owned(cost) else { return };
        let (shared, peer, mut left) = (Arc::clone(&self.shared), self.peer.clone(), self.left);
        runtime.spawn(async move {
            let Source { mut incoming, mut connection, permit } = source;
            let drain = timeout(DRAIN_LIMIT, async {
                while left > 0 {
                    let frame = poll_fn(|context| connection.poll_frame(&mut incoming, context)).await;
                    let Some(Ok(frame)) = frame else { return false };
                    let count = frame.data_ref().map_or(0, |data| data.len() as u64);
                    shared.metrics.drained_bytes.inc_by(count);
                    let Some(rest) = left.checked_sub(count) else { return false };
                    left = rest;
                }
                true
            });
            if let Some(Ok(true)) = shared.stop.run_until_cancelled(drain).await {
                shared.pool.put(&peer, connection);
            }
            drop((permit, budget));
        });
    }
}
