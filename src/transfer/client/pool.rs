//! Connections by peer ID: at most so many requests at once, and a few idle connections, the last used one first.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::oci::PeerId;

/// Requests to one peer at once, drains included: half of the connections that its port allows.
pub(super) const REQUESTS_PER_PEER: u32 = 32;
/// Handshakes with one peer at once. Many requests that begin together would else all shake hands, none of them in time:
/// a handshake costs each end about 1 ms of CPU, and most requests are over before they would have a connection.
const DIALS_PER_PEER: usize = 4;
/// Idle connections that are kept per peer.
const IDLE_PER_PEER: usize = 4;
/// Below the 60 s after which the server closes an idle connection.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// The connections of all peers that are not in use.
#[derive(Default)]
pub(super) struct Pool(Mutex<HashMap<PeerId, PerPeer>>);

/// The right to one request; held until its body has ended.
pub(super) type Permit = OwnedSemaphorePermit;

/// An open connection; dropping it closes it. No task of its own drives it but whoever waits for an answer or reads one,
/// so that bytes pass from the socket to their reader without a change of threads.
pub(super) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    /// `None`: it ended.
    driver: Option<Driver>,
    /// The membership certificate that the other end was shown last.
    shown: Option<Bytes>,
}

type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// How a request gets its connection.
pub(super) enum Way {
    /// By one that was idle.
    Pooled(Connection),
    /// By a new one; the permit is held until it is there.
    Dial(Permit),
}

struct PerPeer {
    permits: Arc<Semaphore>,
    dials: Arc<Semaphore>,
    /// Told when a connection becomes idle.
    returned: Arc<Notify>,
    /// When its process last did something: one that hangs shakes no hands.
    lived: Option<Instant>,
    /// The last used one is last.
    idle: Vec<(Connection, Instant)>,
}

impl Connection {
    pub(super) fn new(
        sender: SendRequest<Empty<Bytes>>,
        driver: impl Future<Output = hyper::Result<()>> + Send + 'static,
    ) -> Self {
        Self { sender, driver: Some(Box::pin(driver)), shown: None }
    }

    /// What of `certificate` the next request has to show: nothing if it was shown on this connection.
    pub(super) fn show(&mut self, certificate: Option<Bytes>) -> Option<Bytes> {
        let new = certificate.filter(|certificate| self.shown.as_ref() != Some(certificate))?;
        self.shown = Some(new.clone());
        Some(new)
    }

    /// Sends a request and waits for the answer's header.
    pub(super) async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        poll_fn(|context| {
            self.drive(context);
            self.sender.poll_ready(context)
        })
        .await?;
        let mut answer = pin!(self.sender.send_request(request));
        let driver = &mut self.driver;
        poll_fn(|context| {
            drive(driver, context);
            answer.as_mut().poll(context)
        })
        .await
    }

    /// The next frame of an answer that this connection gave.
    pub(super) fn poll_frame(
        &mut self,
        incoming: &mut Incoming,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        // Asked first: hyper reads from the socket only what somebody waits for.
        match Pin::new(&mut *incoming).poll_frame(context) {
            Poll::Pending => {
                self.drive(context);
                Pin::new(incoming).poll_frame(context)
            }
            frame @ Poll::Ready(_) => frame,
        }
    }

    /// Whether the other end has closed it, as far as this end was told.
    fn is_closed(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.driver.is_none() || self.sender.is_closed()
    }

    fn drive(&mut self, context: &mut Context<'_>) {
        drive(&mut self.driver, context);
    }
}

fn drive(driver: &mut Option<Driver>, context: &mut Context<'_>) {
    if let Some(Poll::Ready(result)) = driver.as_mut().map(|driver| driver.as_mut().poll(context)) {
        *driver = None;
        if let Err(error) = result {
            tracing::debug!(%error, "a connection to a peer broke");
        }
    }
}

impl Pool {
    /// Waits until fewer than [`REQUESTS_PER_PEER`] requests to `peer` run.
    pub(super) async fn permit(&self, peer: &PeerId) -> Permit {
        let permits = Arc::clone(&self.lock().entry(peer.clone()).or_default().permits);
        permits.acquire_owned().await.expect("the semaphore is never closed")
    }

    /// An idle connection to `peer` or the right to open one, whichever there is first.
    pub(super) async fn way(&self, peer: &PeerId) -> Way {
        loop {
            if let Some(connection) = self.take(peer) {
                return Way::Pooled(connection);
            }
            let (dials, returned) = {
                let mut peers = self.lock();
                let peer = peers.entry(peer.clone()).or_default();
                (Arc::clone(&peer.dials), Arc::clone(&peer.returned))
            };
            tokio::select! {
                biased;
                () = returned.notified() => {}
                permit = dials.acquire_owned() => {
                    return Way::Dial(permit.expect("the semaphore is never closed"));
                }
            }
        }
    }

    /// An idle connection to `peer`.
    fn take(&self, peer: &PeerId) -> Option<Connection> {
        let mut peers = self.lock();
        let idle = &mut peers.get_mut(peer)?.idle;
        while let Some((mut connection, since)) = idle.pop() {
            if since.elapsed() < IDLE_LIMIT && !connection.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection that has nothing left to read.
    pub(super) fn put(&self, peer: &PeerId, mut connection: Connection) {
        if connection.is_closed() {
            return;
        }
        let mut peers = self.lock();
        let peer = peers.entry(peer.clone()).or_default();
        if peer.idle.len() >= IDLE_PER_PEER {
            peer.idle.remove(0);
        }
        peer.idle.push((connection, Instant::now()));
        peer.returned.notify_one();
    }

    /// `peer` shook hands or answered.
    pub(super) fn lives(&self, peer: &PeerId) {
        self.lock().entry(peer.clone()).or_default().lived = Some(Instant::now());
    }

    /// Whether `peer` did so after `began`.
    pub(super) fn lives_since(&self, peer: &PeerId, began: Instant) -> bool {
        self.lock().get(peer).and_then(|peer| peer.lived).is_some_and(|lived| lived > began)
    }

    /// Closes the connections to `peer` that have been idle since `began`: if one got no answer, they would get none either.
    pub(super) fn close(&self, peer: &PeerId, began: Instant) {
        if let Some(peer) = self.lock().get_mut(peer) {
            peer.idle.retain(|(_, since)| *since > began);
        }
    }

    /// Closes what was idle for too long, and forgets peers without connections.
    pub(super) fn reap(&self) {
        self.lock().retain(|_, peer| {
            peer.idle
                .retain_mut(|(connection, since)| since.elapsed() < IDLE_LIMIT && !connection.is_closed());
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
        Self {
            permits: Arc::new(Semaphore::new(REQUESTS_PER_PEER as usize)),
            dials: Arc::new(Semaphore::new(DIALS_PER_PEER)),
            returned: Arc::default(),
            lived: None,
            idle: Vec::new(),
        }
    }
}
