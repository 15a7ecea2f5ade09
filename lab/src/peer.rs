//! A peer that is no `peili` program: it proves any identity and speaks the peer port's protocol.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use peili::network::Peer;
use peili::network::admission::Admission;
use peili::network::identity::Identity;
use peili::oci::{Digest, PeerId};
use peili::transfer::client::Client;
use peili::transfer::metrics::Metrics;
use peili::transfer::{FetchError, Segment, Transfer};

use crate::netns::Namespace;
use crate::node::Plan;

/// How long it waits for an answer's header.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks others for content.
pub struct Asker {
    client: Client,
    runtime: tokio::runtime::Runtime,
}

/// A peer that takes an upload when told to and does not read it, so that it lasts. Dropped: given back.
#[derive(Debug)]
pub struct Hold {
    /// One message: take it. Closed: give it back.
    orders: Option<mpsc::Sender<()>>,
    taken: mpsc::Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The peer port of a node.
pub fn of(plan: &Plan) -> Result<Peer> {
    Ok(Peer {
        id: plan.peer_id.parse::<PeerId>()?,
        transfer: vec![(plan.address, plan.ports.transfer).into()],
        node: String::new(),
        zone: String::new(),
        version: String::new(),
    })
}

/// Runs `work` as who proves `identity`, on a thread of its own inside `namespace`.
pub fn run<T: Send>(
    namespace: Option<&Namespace>,
    identity: &Identity,
    work: impl FnOnce(&Asker) -> T + Send,
) -> Result<T> {
    run_showing(namespace, &Admission::off(), identity, work)
}

/// The same for one that shows a membership certificate.
pub fn run_showing<T: Send>(
    namespace: Option<&Namespace>,
    admission: &Admission,
    identity: &Identity,
    work: impl FnOnce(&Asker) -> T + Send,
) -> Result<T> {
    let run = || -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = async { Client::presenting(admission.clone(), identity, Metrics::default()) };
        let client = runtime.block_on(client)?;
        Ok(work(&Asker { client, runtime }))
    };
    match namespace {
        Some(namespace) => namespace.run(run)?,
        // A runtime does not start within another.
        None => std::thread::scope(|scope| {
            scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        }),
    }
}

impl Asker {
    /// The first `length` bytes of `digest` on their way, as soon as `target` is not busy any more.
    fn patiently(&self, target: &Peer, digest: &Digest, length: u64) -> Result<Segment> {
        self.runtime.block_on(async {
            let limit = Instant::now() + 2 * PATIENCE;
            loop {
                match self.client.fetch(target, digest, 0, length, PATIENCE).await {
                    Ok(segment) => return Ok(segment),
                    Err(error) if Instant::now() > limit => return Err(error.into()),
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
    }

    /// Bytes that `target` sends of the first `length` of `digest`.
    pub fn ask(&self, target: &Peer, digest: &Digest, length: u64) -> Result<u64, FetchError> {
        self.runtime.block_on(async {
            let mut body = self.client.fetch(target, digest, 0, length, PATIENCE).await?.body;
            let mut count = 0;
            while let Some(chunk) = body.next().await {
                count += chunk.map_err(|error| FetchError::Unreachable(error.to_string()))?.len() as u64;
            }
            Ok(count)
        })
    }
}

impl Hold {
    /// Connects to `target`. The upload will be of the first `length` bytes of `digest`, more than sockets hold.
    pub fn connect(
        namespace: &Namespace,
        identity: &Identity,
        target: &Peer,
        digest: Digest,
        length: u64,
    ) -> Result<Self> {
        let (orders, ordered) = mpsc::channel::<()>();
        let (done, taken) = mpsc::channel();
        let (namespace, identity, target) = (namespace.clone(), identity.clone(), target.clone());
        let thread = std::thread::Builder::new().name("hold".into()).spawn(move || {
            let failed = done.clone();
            let hold = move |asker: &Asker| {
                for length in [1, length] {
                    match asker.patiently(&target, &digest, length) {
                        Ok(segment) => {
                            let _ = done.send(Ok(()));
                            // Nothing runs here meanwhile, so that nobody reads.
                            let ordered = ordered.recv();
                            asker.runtime.block_on(async { drop(segment) });
                            if ordered.is_err() {
                                return;
                            }
                        }
                        Err(error) => drop(done.send(Err(error))),
                    }
                }
            };
            if let Err(error) = run(Some(&namespace), &identity, hold) {
                let _ = failed.send(Err(error));
            }
        })?;
        let hold = Self { orders: Some(orders), taken, thread: Some(thread) };
        hold.taken.recv().context("the thread ended")??;
        Ok(hold)
    }

    /// Takes the upload; returns when it has begun.
    pub fn take(&self) -> Result<()> {
        let orders = self.orders.as_ref().context("it was given back")?;
        orders.send(()).context("the thread ended")?;
        self.taken.recv().context("the thread ended")?
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
