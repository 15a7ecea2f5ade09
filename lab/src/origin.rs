//! A registry of images that counts what it serves and misbehaves on request.
//!
//! It runs on a thread of its own, with a runtime of its own, so that it can live in a network namespace, serves tests
//! with and without an executor, and is not slowed by them. It speaks plain HTTP/1.1, which containerd takes as `server`
//! with `http://`, or the same over TLS.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use peili::oci::Digest;
use tokio::sync::{mpsc, oneshot};

use crate::certificates::Certificates;
use crate::image::{Blob, Image};
use crate::netns::Namespace;

mod serve;

/// Longest that a change of the listener may take.
const CONTROL_LIMIT: Duration = Duration::from_secs(5);

/// How it answers; changed at any time by [`Origin::behave`].
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Answer every request with this status and nothing else.
    pub status: Option<u16>,
    /// Take requests and never answer.
    pub hang: bool,
    /// Wait before each answer's header.
    pub delay: Duration,
    /// End the connection after this many bytes of a body; a client that reads slowly gets less.
    pub cut_after: Option<u64>,
    /// Bytes per second of each body; one connection carries one body at a time.
    pub rate: Option<u64>,
    /// To which requests all of this applies.
    pub scope: Scope,
}

/// Which requests a [`Behaviour`] applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All.
    #[default]
    All,
    /// Manifests only.
    Manifests,
    /// Blobs only: configs and layers.
    Blobs,
}

/// How a private repository asks for the password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// `WWW-Authenticate: Basic`
    Basic,
    /// `WWW-Authenticate: Bearer`, with a token endpoint on the same port.
    Bearer,
}

/// What was served. Bytes are those handed to connections; a client that hangs up may have got less.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests for manifests, HEAD included.
    pub manifest_requests: u64,
    /// Bytes of manifests' bodies.
    pub manifest_bytes: u64,
    /// Requests for blobs, HEAD included.
    pub blob_requests: u64,
    /// Bytes of blobs' bodies.
    pub blob_bytes: u64,
    /// Bytes by digest.
    pub bytes_by_digest: BTreeMap<Digest, u64>,
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`
    pub method: String,
    /// `/v2/library/app/manifests/v1`
    pub path: String,
    /// `ns` of the query.
    pub ns: Option<String>,
    /// The `Range` header.
    pub range: Option<String>,
    /// Whether it carried an `Authorization` header.
    pub authorized: bool,
    /// Who asked.
    pub remote: SocketAddr,
    /// The status of the answer, 0 while there is none.
    pub status: u16,
}

/// A running registry. Dropped: gone, with its connections.
#[derive(Debug)]
pub struct Origin {
    state: Arc<State>,
    addresses: Vec<SocketAddr>,
    control: mpsc::UnboundedSender<Control>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    content: Mutex<BTreeMap<String, Repository>>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<Request>>,
    counts: Mutex<Counts>,
    connections: AtomicU64,
    tls: Option<Arc<rustls::ServerConfig>>,
}

#[derive(Clone, Debug, Default)]
struct Repository {
    tags: BTreeMap<String, Digest>,
    blobs: BTreeMap<Digest, Blob>,
    /// Manifests among the blobs.
    manifests: Vec<Digest>,
    password: Option<(String, String, Challenge)>,
}

#[derive(Debug)]
enum Control {
    /// Whether to listen; answered when done.
    Listen(bool, oneshot::Sender<()>),
}

impl Origin {
    /// Starts one on a free port of loopback.
    pub fn start() -> Result<Self> {
        Self::start_at(None, &[([127, 0, 0, 1], 0).into()])
    }

    /// Starts one at these addresses (port 0: a free one), inside `namespace`.
    pub fn start_at(namespace: Option<&Namespace>, addresses: &[SocketAddr]) -> Result<Self> {
        Self::run(namespace, addresses, State::default())
    }

    /// Starts one that speaks TLS.
    pub fn start_tls(
        namespace: Option<&Namespace>,
        addresses: &[SocketAddr],
        certificates: &Certificates,
    ) -> Result<Self> {
        let tls = Some(Arc::clone(&certificates.server));
        Self::run(namespace, addresses, State { tls, ..State::default() })
    }

    fn run(namespace: Option<&Namespace>, addresses: &[SocketAddr], state: State) -> Result<Self> {
        let state = Arc::new(state);
        let (control, commands) = mpsc::unbounded_channel();
        let (ready, started) = std::sync::mpsc::channel();
        let (namespace, wanted, shared) = (namespace.cloned(), addresses.to_vec(), Arc::clone(&state));
        let thread = std::thread::Builder::new().name("origin".into()).spawn(move || {
            if let Some(namespace) = namespace
                && let Err(error) = namespace.enter()
            {
                let _ = ready.send(Err(error));
                return;
            }
            serve::run(&shared, &wanted, &ready, commands);
        })?;
        let addresses = started.recv().context("the origin's thread ended")??;
        Ok(Self { state, addresses, control, thread: Some(thread) })
    }

    /// Its first address.
    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// All its addresses, in the order asked for.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// `http://ADDRESS`, or `https://ADDRESS`
    pub fn url(&self) -> String {
        let scheme = if self.state.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// Serves `image` from now on.
    pub fn add(&self, image: &Image) {
        let mut content = lock(&self.state.content);
        let repository = content.entry(image.repository.clone()).or_default();
        repository.tags.insert(image.tag.clone(), image.root);
        repository.manifests.extend(&image.manifests);
        repository.blobs.extend(image.blobs.iter().map(|(digest, blob)| (*digest, blob.clone())));
    }

    /// Serves a repository's content only to who knows the password.
    pub fn set_password(&self, repository: &str, user: &str, password: &str, challenge: Challenge) {
        lock(&self.state.content).entry(repository.to_owned()).or_default().password =
            Some((user.to_owned(), password.to_owned(), challenge));
    }

    /// Forgets a tag, and with it nothing else.
    pub fn remove_tag(&self, repository: &str, tag: &str) {
        if let Some(repository) = lock(&self.state.content).get_mut(repository) {
            repository.tags.remove(tag);
        }
    }

    /// Changes how it answers; bodies on their way go on as they began.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut lock(&self.state.behaviour));
    }

    /// Stops listening and closes all connections: new ones are refused.
    pub fn refuse(&self) {
        self.listen(false);
    }

    /// Listens again, at the same addresses.
    pub fn accept(&self) {
        self.listen(true);
    }

    /// What was served since the start or the last [`Self::reset`].
    pub fn counts(&self) -> Counts {
        lock(&self.state.counts).clone()
    }

    /// Bytes of this image's layers served.
    pub fn layer_bytes(&self, image: &Image) -> u64 {
        let counts = lock(&self.state.counts);
        image.layers.iter().filter_map(|digest| counts.bytes_by_digest.get(digest)).sum()
    }

    /// The requests since the start or the last [`Self::reset`], oldest first.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state.requests).clone()
    }

    /// Connections taken since the start.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Forgets counts and requests.
    pub fn reset(&self) {
        lock(&self.state.requests).clear();
        *lock(&self.state.counts) = Counts::default();
    }

    fn listen(&self, listening: bool) {
        let (done, mut finished) = oneshot::channel();
        if self.control.send(Control::Listen(listening, done)).is_err() {
            return;
        }
        // Not `blocking_recv`, which refuses to run on an executor's thread; the origin's own thread answers at once.
        let started = std::time::Instant::now();
        while finished.try_recv() == Err(oneshot::error::TryRecvError::Empty)
            && started.elapsed() < CONTROL_LIMIT
        {
            std::thread::yield_now();
        }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        // The thread ends when its commands do.
        self.control = mpsc::unbounded_channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
