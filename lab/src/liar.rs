//! A hostile node: it proves a valid identity, speaks the real control plane and the real peer protocol, says that it
//! holds an image, and sends what it should not.
//!
//! The one fixture that takes more from the library than names: the network and the peer port, so that nothing but the
//! content is wrong. It runs on a thread of its own inside a namespace, and trusts everybody.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use peili::network::admission::Admission;
use peili::network::identity::Identity;
use peili::network::swarm::{Announcement, Parts, Swarm};
use peili::network::{self, Advertisement, Network as _, TagSource, Tagged};
use peili::oci::{Action, ByteRange, Descriptor, Digest, Gate, Level, Name, PeerId, Reference};
use peili::transfer::server::{Access, Server};
use peili::transfer::{self, Segment, Source};
use tokio::sync::oneshot;

use crate::image::Image;
use crate::netns::Namespace;
use crate::node::Ports;

const CHUNK: usize = 64 << 10;

/// Content above this size is passed on to the runtime before it is verified.
const PASSED_ON: usize = 4 << 20;

/// Its zone: who is in it too asks it before all others.
pub const ZONE: &str = "liar";

/// How it lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lie {
    /// Not.
    #[default]
    None,
    /// Wrong bytes of the right length.
    Bytes,
    /// It says that the content is one byte longer than it is.
    Longer,
    /// It says that the content is one byte shorter than it is.
    Shorter,
    /// It says that the content has a TiB, and goes on for ever.
    Endless,
    /// A byte at a time, ten times a second.
    Slow,
    /// It has nothing of what it claims.
    Nothing,
    /// Bodies end at their half.
    Half,
    /// Of content above 4 MiB, which is passed on while it comes: wrong bytes, and bodies end at their half, so that no
    /// digest is ever compared.
    HalfWrong,
    /// Wrong bytes from this offset of the content on.
    BytesAfter(u64),
    /// It takes requests and says nothing, and bodies stand still.
    Hang,
}

/// A running liar. Dropped: gone.
#[derive(Debug)]
pub struct Liar {
    peer_id: String,
    address: SocketAddr,
    lie: Arc<Mutex<Lie>>,
    requests: Arc<Mutex<u64>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Content {
    held: HashMap<Digest, (Descriptor, Bytes)>,
    lie: Arc<Mutex<Lie>>,
    requests: Arc<Mutex<u64>>,
}

struct Everybody;

impl Liar {
    /// Starts one in `namespace` at `address` on the default ports; it claims all of `images`.
    pub fn start(namespace: &Namespace, address: IpAddr, images: &[&Image]) -> Result<Self> {
        let identity = Identity::generate();
        let peer_id = identity.peer_id().to_string();
        let (lie, requests) = (Arc::default(), Arc::default());
        let mut held = HashMap::new();
        for (digest, blob) in images.iter().flat_map(|image| &image.blobs) {
            held.insert(*digest, (Descriptor::new(*digest, blob.size, &blob.media_type), blob.read()?));
        }
        let content = Content { held, lie: Arc::clone(&lie), requests: Arc::clone(&requests) };
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let namespace = namespace.clone();
        let thread = std::thread::Builder::new().name("liar".into()).spawn(move || {
            let run = || -> Result<()> {
                namespace.enter()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(live(&identity, address, content, &ready, stopped))
            };
            if let Err(error) = run() {
                let _ = ready.send(Err(error));
            }
        })?;
        started.recv().context("the liar's thread ended")??;
        let address = SocketAddr::new(address, Ports::DEFAULT.network);
        Ok(Self { peer_id, address, lie, requests, stop: Some(stop), thread: Some(thread) })
    }

    /// Its peer ID.
    pub fn peer_id(&self) -> &str {
        &self.peer_id
    }

    /// Its control plane.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lies like this from now on, in bodies that are on their way too.
    pub fn lie(&self, lie: Lie) {
        *lock(&self.lie) = lie;
    }

    /// How often it was asked for content.
    pub fn requests(&self) -> u64 {
        *lock(&self.requests)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn live(
    identity: &Identity,
    address: IpAddr,
    content: Content,
    ready: &std::sync::mpsc::Sender<Result<()>>,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let ports = Ports::DEFAULT;
    let held = content.held.keys().copied().collect();
    let listener = tokio::net::TcpListener::bind((address, ports.transfer)).await?;
    let gate = Arc::new(Everybody);
    let config = transfer::Config::default();
    let metrics = transfer::metrics::Metrics::default();
    let access = Access::by(Arc::clone(&gate) as _);
    let server = Server::spawn(vec![listener], identity, &config, access, Arc::new(content), metrics)?;
    let config = network::Config {
        listen: vec![SocketAddr::new(address, ports.network)],
        ..network::Config::default()
    };
    let announcement = Announcement {
        transfer: vec![SocketAddr::new(address, ports.transfer)],
        node: "liar".into(),
        zone: ZONE.into(),
        ..Announcement::default()
    };
    let parts = Parts {
        gate,
        admission: Admission::off(),
        tags: Arc::new(Everybody),
        metrics: network::metrics::Metrics::default(),
        keep: None,
        first: None,
    };
    let (swarm, network) = Swarm::spawn(identity, &config, &announcement, parts)?;
    network.advertise(Advertisement::All(held));
    let _ = ready.send(Ok(()));
    let _ = stopped.await;
    drop((server, swarm));
    Ok(())
}

impl Gate for Everybody {
    fn level(&self, _: &PeerId, _: Action) -> Level {
        Level::Tags
    }

    fn serves(&self, _: &PeerId, _: &Name) -> bool {
        true
    }
}

impl TagSource for Everybody {
    fn tag(&self, _: &PeerId, _: &Reference) -> Option<Tagged> {
        None
    }
}

#[async_trait]
impl Source for Content {
    async fn open(
        &self,
        _: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> Result<Option<Segment>, io::Error> {
        *lock(&self.requests) += 1;
        let lie = *lock(&self.lie);
        let Some((descriptor, bytes)) = self.held.get(digest).filter(|_| lie != Lie::Nothing) else {
            return Ok(None);
        };
        let size = match lie {
            Lie::Longer => descriptor.size + 1,
            Lie::Shorter => descriptor.size.saturating_sub(1),
            Lie::Endless => 1 << 40,
            _ => descriptor.size,
        };
        if lie == Lie::Hang {
            std::future::pending::<()>().await;
        }
        let descriptor = Descriptor { size, ..descriptor.clone() };
        let range = ByteRange { start: start.min(size), end: start.saturating_add(length).min(size) };
        let half = range.start + range.len() / 2;
        let body =
            Body { bytes: bytes.clone(), at: range.start, half, end: range.end, lie: Arc::clone(&self.lie) };
        let body = futures::stream::unfold(body, |mut body| async move {
            let chunk = body.next().await?;
            Some((chunk, body))
        });
        Ok(Some(Segment { descriptor, range, body: body.boxed() }))
    }
}

/// A body on its way; it lies as the liar does at the moment.
struct Body {
    /// The whole content.
    bytes: Bytes,
    at: u64,
    half: u64,
    end: u64,
    lie: Arc<Mutex<Lie>>,
}

impl Body {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        let mut lie = *lock(&self.lie);
        if lie == Lie::HalfWrong && self.bytes.len() <= PASSED_ON {
            lie = Lie::None;
        }
        let stop = if matches!(lie, Lie::Half | Lie::HalfWrong) { self.half } else { self.end };
        if self.at >= stop {
            // The peer port ends the connection where a body ends early.
            return (self.at < self.end).then(|| Err(io::ErrorKind::UnexpectedEof.into()));
        }
        match lie {
            Lie::Hang => std::future::pending().await,
            Lie::Slow => tokio::time::sleep(Duration::from_millis(100)).await,
            _ => {}
        }
        let step = if lie == Lie::Slow { 1 } else { CHUNK };
        let count = usize::try_from(stop - self.at).unwrap_or(step).min(step);
        let chunk = match usize::try_from(self.at).ok().filter(|at| at + count <= self.bytes.len()) {
            Some(at) => self.bytes.slice(at..at + count),
            None => vec![0; count].into(),
        };
        let wrong = match lie {
            Lie::Bytes | Lie::HalfWrong => true,
            Lie::BytesAfter(offset) => self.at >= offset,
            _ => false,
        };
        self.at += count as u64;
        Some(Ok(if wrong { chunk.iter().map(|byte| !byte).collect() } else { chunk }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
