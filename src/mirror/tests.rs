//! The mirror over the in-memory twins of all that it is made of: what it answers, and what a fault of a peer costs.

mod content;
mod faults;
mod guards;
mod lies;
mod plans;
mod serve;
mod tags;
mod upstreams;

use futures::TryStreamExt;
use tokio::time::timeout;

use std::io;

use super::*;
use crate::network::memory::{Hub, MemoryNetwork};
use crate::network::{Advertisement, TagSource as _};
use crate::oci::{ByteRange, Home, RangeError, Reference};
use crate::store::Watcher;
use crate::store::memory::{Artifact, MemoryStore};
use crate::transfer::memory::{Fault, Memory};
use crate::trust::{self, PinnedTrust};
use crate::upstream;
use crate::upstream::memory::MemoryUpstreams;

/// Nothing here takes longer, but for a machine that stands still.
const LIMIT: Duration = Duration::from_secs(10);
const ZONE: &str = "here";
const MIB: usize = 1 << 20;

/// For what peers get where tags are of no interest.
fn nothing_of_tags() -> Tags {
    let upstream = Arc::new(upstream::memory::Memory::default());
    Tags::new(upstream, Arc::new(MemoryUpstreams::default()), Metrics::default())
}

/// A node, and others that hold things.
struct Lab {
    mirror: Mirror,
    store: Arc<MemoryStore>,
    hub: Hub,
    transfer: Arc<Memory>,
    upstream: Arc<upstream::memory::Memory>,
    upstreams: MemoryUpstreams,
    metrics: Metrics,
    id: PeerId,
    tags: Tags,
    holders: Vec<Holder>,
}

struct Holder {
    id: PeerId,
    store: Arc<MemoryStore>,
    network: Arc<MemoryNetwork>,
    tags: Tags,
}

impl Lab {
    fn new(holders: usize) -> Self {
        Self::with(holders, &Config { segment: ByteSize::mib(1), ..Config::default() })
    }

    /// A node with `config` and so many holders. The first one is in the node's zone, so that it is asked first.
    fn with(holders: usize, config: &Config) -> Self {
        Self::gated(holders, config, None)
    }

    /// With another gate for the mirror alone.
    fn gated(holders: usize, config: &Config, own: Option<Arc<dyn Gate>>) -> Self {
        Self::ruled(holders, config, own, Arc::new(crate::policy::registry::NoPolicy))
    }

    fn ruled(
        holders: usize,
        config: &Config,
        own: Option<Arc<dyn Gate>>,
        policy: Arc<dyn RegistryPolicy>,
    ) -> Self {
        let nobody = Arc::new(|_: &[u8]| Home::Nobody);
        Self::built(holders, config, own, (policy, Arc::new(crate::policy::registry::NoPolicy)), nobody)
    }

    /// With policies for the mirror and for what the holders serve, and with homes of tags.
    fn built(
        holders: usize,
        config: &Config,
        own: Option<Arc<dyn Gate>>,
        (policy, serving): (Arc<dyn RegistryPolicy>, Arc<dyn RegistryPolicy>),
        homes: Arc<dyn Homes>,
    ) -> Self {
        let (hub, id) = (Hub::new(), Hub::new_id());
        let upstream = Arc::new(upstream::memory::Memory::default());
        let upstreams = MemoryUpstreams::default();
        let tags = || Tags::new(upstream.clone(), Arc::new(upstreams.clone()), Metrics::default());
        let ids: Vec<_> = (0..holders).map(|_| Hub::new_id()).collect();
        let transfer = Arc::new(Memory::new(id.clone()));
        let everybody = || ids.iter().chain([&id]).cloned();
        let gate = || Arc::new(PinnedTrust::new(trust::Config::default(), everybody()).unwrap());
        let settings = Settings::new(config, false).unwrap();
        let holders = ids
            .iter()
            .map(|id| {
                let (store, gate, tags) = (Arc::new(MemoryStore::new()), gate(), tags());
                let serve =
                    Serve::new(&settings, store.clone(), gate.clone(), tags.clone(), Metrics::default())
                        .under(
                            serving.clone(),
                            Arc::new(super::serve::Strangers),
                            Arc::new(upstreams.clone()),
                        );
                let serve = Arc::new(serve);
                let network = hub.join(id.clone(), Vec::new(), gate.clone(), serve.clone());
                transfer.add(id.clone(), serve, gate.clone(), 64);
                Holder { id: id.clone(), store, network, tags }
            })
            .collect::<Vec<_>>();
        if let Some(first) = ids.first() {
            hub.set_zone(first, ZONE);
        }
        let (store, gate, metrics, tags) = (Arc::new(MemoryStore::new()), gate(), Metrics::default(), tags());
        let serve =
            Arc::new(Serve::new(&settings, store.clone(), gate.clone(), tags.clone(), metrics.clone()));
        let parts = Parts {
            policy,
            store: store.clone(),
            network: hub.join(id.clone(), Vec::new(), gate.clone(), serve),
            transfer: transfer.clone(),
            upstream: upstream.clone(),
            upstreams: Arc::new(upstreams.clone()),
            tags: tags.clone(),
            homes,
            gate: own.unwrap_or(gate),
            zone: ZONE.into(),
            metrics: metrics.clone(),
        };
        Self {
            mirror: Mirror::new(&settings, parts),
            store,
            hub,
            transfer,
            upstream,
            upstreams,
            metrics,
            id,
            tags,
            holders,
        }
    }

    /// Lets a holder hold an image and say so.
    fn hold(&self, holder: usize, artifact: &Artifact) {
        let holder = &self.holders[holder];
        holder.store.put(artifact);
        holder.network.advertise(Advertisement::All(holder.store.watch().held));
    }

    fn fault(&self, holder: usize, fault: Fault) {
        self.transfer.set(&self.holders[holder].id, fault);
    }

    /// How often a holder was asked for content.
    fn asked(&self, holder: usize) -> u64 {
        self.transfer.requests(&self.holders[holder].id)
    }

    fn conduct(&self, holder: usize) -> Conduct {
        self.mirror.conduct().get(&self.holders[holder].id).copied().unwrap_or_default()
    }

    async fn open(&self, digest: &Digest, range: Option<&str>) -> Result<Answer, Refusal> {
        let range = range.map(|range| RangeHeader::parse(range).unwrap());
        let request = BlobRequest { name: name("library/app"), digest: *digest, range, head: false };
        timeout(LIMIT, self.mirror.blob(request, LIMIT)).await.unwrap()
    }

    /// The bytes of a blob, and how long they took from the request on.
    async fn blob(&self, digest: &Digest) -> Result<(Vec<u8>, Duration), Refusal> {
        let began = Instant::now();
        let content = read(self.open(digest, None).await?).await.unwrap();
        Ok((content, began.elapsed()))
    }

    /// The cause of not serving a blob, and how long it took to say so.
    async fn refused(&self, digest: &Digest) -> (NotHere, Duration) {
        let began = Instant::now();
        match self.open(digest, None).await {
            Err(Refusal::NotHere(cause)) => (cause, began.elapsed()),
            Err(refusal) => panic!("{refusal:?}"),
            Ok(_) => panic!("it was served"),
        }
    }

    async fn manifest(&self, repository: &str, target: impl Into<Target>) -> Result<Answer, Refusal> {
        timeout(LIMIT, self.mirror.manifest(&name(repository), &target.into(), false, LIMIT)).await.unwrap()
    }
}

impl From<&str> for Target {
    fn from(tag: &str) -> Self {
        Self::Tag(tag.parse().unwrap())
    }
}

impl From<Digest> for Target {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

fn name(repository: &str) -> Name {
    format!("registry.test/{repository}").parse().unwrap()
}

/// An image of one layer, and its layer's digest and bytes.
fn image(repository: &str, size: usize) -> (Artifact, Digest, Vec<u8>) {
    // Each repository has other content, and no two segments of it are alike.
    let salt = repository.bytes().fold(7_usize, |salt, byte| (salt * 31 + usize::from(byte)) % 241);
    let block: Vec<u8> = (0..65_521).map(|index| ((index + index / 251 + salt) % 251) as u8).collect();
    let mut layer = block.repeat(size.div_ceil(block.len()));
    layer.truncate(size);
    let artifact = Artifact::image(&format!("registry.test/{repository}:v1"), &[&layer]);
    (artifact, Digest::sha256(&layer), layer)
}

async fn read(answer: Answer) -> io::Result<Vec<u8>> {
    timeout(
        LIMIT,
        answer.body.try_fold(Vec::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        }),
    )
    .await
    .unwrap()
}

/// What came before the end or an error, and whether there was an error.
async fn read_until_error(mut answer: Answer) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    while let Some(chunk) = timeout(LIMIT, answer.body.next()).await.unwrap() {
        match chunk {
            Ok(chunk) => all.extend_from_slice(&chunk),
            Err(_) => return (all, true),
        }
    }
    (all, false)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn within(what: &str, elapsed: Duration, limit_ms: u64) {
    println!("{what}: {} ms of {limit_ms} ms", elapsed.as_millis());
    assert!(elapsed <= Duration::from_millis(limit_ms), "{what} took {elapsed:?}");
}
