//! Connections by peer ID: at most so many requests at once, and a few idle connections, the last used one first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::oci::PeerId;

/// Requests to one peer at once, drains included: half of the connections that its port allows.
pub(super) const REQUESTS_PER_PEER: u32 = 32;
/// Idle connections that are kept per peer.
const IDLE_PER_PEER: usize = 4;
/// Below the 60 s after which the server closes an idle connection.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// The connections of all peers that are not in use.
#[derive(Default)]
pub(super) struct Pool(Mutex<HashMap<PeerId, PerPeer>>);

/// The right to one request; held until its body has ended.
pub(super) type Permit = OwnedSemaphorePermit;

/// An open connection; dropping it closes it.
pub(super) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    _task: AbortOnDropHandle<()>,
}

struct PerPeer {
    permits: Arc<Semaphore>,
    /// The last used one is last.
    idle: Vec<(Connection, Instant)>,
}

impl Connection {
    pub(super) fn new(sender: SendRequest<Empty<Bytes>>, task: AbortOnDropHandle<()>) -> Self {
        Self { sender, _task: task }
    }

    /// Sends a request and waits for the answer's header.
    pub(super) async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }
}

impl Pool {
    /// Waits until fewer than [`REQUESTS_PER_PEER`] requests to `peer` run.
    pub(super) async fn permit(&self, peer: &PeerId) -> Permit {
        let permits = Arc::clone(&self.lock().entry(peer.clone()).or_default().permits);
        permits.acquire_owned().await.expect("the semaphore is never closed")
    }

    /// An idle connection to `peer`.
    pub(super) fn take(&self, peer: &PeerId) -> Option<Connection> {
        let mut peers = self.lock();
        let idle = &mut peers.get_mut(peer)?.idle;
        while let Some((connection, since)) = idle.pop() {
            if since.elapsed() < IDLE_LIMIT && !connection.sender.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection that has nothing left to read.
    pub(super) fn put(&self, peer: &PeerId, connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        let mut peers = self.lock();
        let idle = &mut peers.entry(peer.clone()).or_default().idle;
        if idle.len() >= IDLE_PER_PEER {
            idle.remove(0);
        }
        idle.push((connection, Instant::now()));
    }

    /// Closes the idle connections to `peer`: if one got no answer, the others would get none either.
    pub(super) fn close(&self, peer: &PeerId) {
        if let Some(peer) = self.lock().get_mut(peer) {
            peer.idle.clear();
        }
    }

    /// Closes what was idle for too long, and forgets peers without connections.
    pub(super) fn reap(&self) {
        self.lock().retain(|_, peer| {
            peer.idle
                .retain(|(connection, since)| since.elapsed() < IDLE_LIMIT && !connection.sender.is_closed());
            // Whoever waits for a permit, or has one, holds the semaphore.
            !peer.idle.is_empty() || Arc::strong_count(&peer.permits) > 1
        });
    }

    #[cfg(test)]
    pub(super) fn idle(&self, peer: &PeerId) -> usize {
        self.lock().get(peer).map_or(0, |peer| peer.idle.len())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, PerPeer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for PerPeer {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(REQUESTS_PER_PEER as usize)), idle: Vec::new() }
    }
}
