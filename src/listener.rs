//! Small HTTP/1.1 servers on a few addresses: bind, accept, bound, drain. What `registry` and `admin` share.
//!
//! It knows nothing of what is served. It keeps these rules for both:
//! - who may not connect is closed before a byte is read ([`Clients`]);
//! - the accept loop survives exhausted descriptors, and beats for the watchdog;
//! - connections, heads and pauses of a client are bounded, and so is what a slow reader holds in memory;
//! - a connection too many gets one quick answer, marked as [`Overloaded`], rather than silence;
//! - a body that fails ends the connection by FIN after everything that came before the failure, never by RST;
//! - dropping the [`Server`] ends every task of it; [`Server::drain`] lets answers end first.

mod accept;
mod bind;
mod body;
mod clients;
mod connection;
mod socket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::Response;
use http::request::Parts;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::watchdog::Watchdog;

pub use bind::{BindError, NotLoopback, Sockets};
pub use body::Body;
pub use clients::{Admission, Clients};

/// Connections beyond the limit that are answered at once.
const OVERLOADED: usize = 64;

/// A connection beyond the limit has so long to send its request.
const OVERLOADED_HEAD: Duration = Duration::from_secs(2);

/// Answers requests. Gets the head only: a request's body is never read.
pub type Handler = Arc<dyn Fn(Parts) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// Marks, in the extensions of a request's head, a connection beyond the limit: it should be answered without work, and
/// ends after the answer.
#[derive(Clone, Copy, Debug)]
pub struct Overloaded;

/// Who a server's clients are, and what they may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Who they are.
    pub admission: Admission,
    /// Connections at once, half of them at most of others than this node. [`OVERLOADED`] more are answered as [`Overloaded`]; beyond those they are closed as they
    /// come, which is quicker for a client than to wait.
    pub connections: usize,
    /// A request's head must be complete this long after its connection, or the answer before, is through. Also
    /// ends idle connections.
    pub head: Duration,
    /// A client that takes no byte of an answer for this long is cut off.
    pub write: Duration,
    /// The complete answer to what is not HTTP, or has too large a head. `None`: hyper's 400, 414 and 431.
    pub malformed: Option<Bytes>,
}

/// A running server.
pub struct Server {
    addresses: Vec<SocketAddr>,
    stop: CancellationToken,
    loops: JoinSet<()>,
}

impl Limits {
    /// Limits of a server of this node for `connections` clients whom `admission` admits.
    ///
    /// Idle connections: Go's default transport keeps its own for 90 s, and a server that closes first makes a retry.
    /// Writes: a runtime that unpacks to a slow disk pauses for long.
    pub fn new(admission: Admission, connections: usize) -> Self {
        Self {
            admission,
            connections,
            head: Duration::from_secs(120),
            write: Duration::from_secs(300),
            malformed: None,
        }
    }
}

impl Server {
    /// Serves on `sockets`. With a watchdog, each accept loop has a heart called `name` there.
    pub fn start(
        sockets: Sockets,
        limits: Limits,
        handler: &Handler,
        name: &'static str,
        watchdog: Option<&Watchdog>,
    ) -> Self {
        let stop = CancellationToken::new();
        let slots = Arc::new(Semaphore::new(limits.connections));
        let overloaded = Arc::new(Semaphore::new(OVERLOADED));
        let others = Arc::new(Semaphore::new((limits.connections / 2).max(1)));
        let limits = Arc::new(limits);
        let addresses = sockets.addresses();
        let mut loops = JoinSet::new();
        for listener in sockets.into_listeners() {
            let accept = accept::Accept {
                name,
                slots: Arc::clone(&slots),
                overloaded: Arc::clone(&overloaded),
                others: Arc::clone(&others),
                limits: Arc::clone(&limits),
                handler: Arc::clone(handler),
                stop: stop.clone(),
                heart: watchdog.map(|watchdog| watchdog.heart(name)),
                spare: accept::Spare::new(),
            };
            loops.spawn(accept.run(listener));
        }
        Self { addresses, stop, loops }
    }

    /// The addresses that are bound, with their real ports.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Stops accepting at once, ends idle connections, and lets answers end for at most `limit`. Returns whether all
    /// of them did.
    pub async fn drain(mut self, limit: Duration) -> bool {
        self.stop.cancel();
        let all = async { while self.loops.join_next().await.is_some() {} };
        tokio::time::timeout(limit, all).await.is_ok()
    }
}

#[cfg(test)]
pub(crate) mod tests;
