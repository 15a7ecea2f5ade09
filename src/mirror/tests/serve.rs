//! What peers get from this node, and what they are told of it.

use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};

use super::*;
use crate::network::{Network, ResolveError, Status, TagQuestion, Tagged};
use crate::oci::Level;
use crate::store::memory::{LAYER, Stored};
use crate::store::{Change, Health, Watch};
use crate::transfer::Source as _;

struct Served {
    store: Arc<MemoryStore>,
    serve: Serve,
    gate: Arc<PinnedTrust>,
    peer: PeerId,
}

fn served(trust: trust::Config, private: &[&str]) -> Served {
    let peer = Hub::new_id();
    let (store, unowned) = (Arc::new(MemoryStore::new()), trust.unowned);
    let gate = Arc::new(PinnedTrust::new(trust, [peer.clone()]).unwrap());
    let config = Config { private: private.iter().map(ToString::to_string).collect(), ..Config::default() };
    let settings = Settings::new(&config, unowned).unwrap();
    let serve = Serve::new(&settings, store.clone(), gate.clone(), nothing_of_tags(), Metrics::default());
    Served { store, serve, gate, peer }
}

impl Served {
    async fn gives(&self, digest: &Digest) -> bool {
        self.serve.open(&self.peer, digest, 0, 100).await.unwrap().is_some()
    }

    fn tells(&self, name: &str) -> bool {
        self.serve.tag(&self.peer, &name.parse::<Reference>().unwrap()).is_some()
    }
}

#[tokio::test]
async fn content_is_served_if_one_of_its_repositories_is_allowed() {
    let deny = vec!["registry.test/secret/**".into()];
    let node = served(trust::Config { deny, ..trust::Config::default() }, &[]);
    let open = node.store.put_image("registry.test/library/app:v1", &[b"open", b"shared"]);
    let secret = node.store.put_image("registry.test/secret/app:v1", &[b"secret", b"shared"]);
    for blob in &open.blobs {
        assert!(node.gives(&blob.descriptor.digest).await, "{}", blob.descriptor.media_type);
    }
    for blob in secret.blobs.iter().filter(|blob| &blob.bytes[..] != b"shared") {
        assert!(!node.gives(&blob.descriptor.digest).await, "{}", blob.descriptor.media_type);
    }
    assert!(node.tells("registry.test/library/app:v1") && !node.tells("registry.test/secret/app:v1"));
    // A peer that is trusted no longer gets nothing, wherever the question comes from.
    node.gate.replace(trust::Config::default(), [Hub::new_id()]).unwrap();
    assert_eq!(node.gate.level(&node.peer, crate::oci::Action::Serve), Level::None);
    assert!(!node.gives(&open.target.digest).await && !node.tells("registry.test/library/app:v1"));
}

#[tokio::test]
async fn content_of_unknown_repositories_is_served_by_a_setting_only() {
    for unowned in [false, true] {
        let node = served(trust::Config { unowned, ..trust::Config::default() }, &[]);
        let orphan = node.store.put_blob(b"orphan".to_vec());
        assert_eq!(node.gives(&orphan.digest).await, unowned);
        let labelled = Stored::new(LAYER, b"labelled".to_vec()).labelled("registry.test", "library/app");
        node.store.put_stored(&labelled);
        assert!(node.gives(&labelled.descriptor.digest).await);
        assert!(!node.gives(&Digest::sha256(b"nothing")).await);
    }
}

#[tokio::test]
async fn a_label_that_names_denied_and_allowed_repositories_allows() {
    let deny = vec!["registry.test/secret/**".into()];
    let node = served(trust::Config { deny, ..trust::Config::default() }, &[]);
    let blob = |bytes: &[u8], repositories: &str| {
        let blob = Stored::new(LAYER, bytes.to_vec()).labelled("registry.test", repositories);
        node.store.put_stored(&blob);
        blob.descriptor.digest
    };
    let both = blob(b"both", "secret/app,library/app");
    let only = blob(b"only", "secret/app");
    assert!(node.gives(&both).await && !node.gives(&only).await);
}

/// A label drops the registry's port: until an image record tells, content may be what a pattern with a port means.
#[tokio::test]
async fn content_whose_port_is_unknown_is_kept_where_any_port_is_denied_or_private() {
    let deny = vec!["registry.test:5000/secret/**".into()];
    let node = served(trust::Config { deny, ..trust::Config::default() }, &["registry.test:*/team/**"]);
    let manifest = Artifact::image("", &[b"in flight"]).blobs.pop().unwrap();
    let labelled = |blob: Stored, repository: &str| {
        let blob = blob.labelled("registry.test", repository);
        node.store.put_stored(&blob);
        blob.descriptor.digest
    };
    let secret = labelled(Stored::new(LAYER, b"secret".to_vec()), "secret/app");
    let open = labelled(Stored::new(LAYER, b"open".to_vec()), "library/app");
    let layer = labelled(Stored::new(LAYER, b"private layer".to_vec()), "team/app");
    let private = labelled(manifest, "team/app");
    assert!(!node.gives(&secret).await && !node.gives(&private).await);
    assert!(node.gives(&open).await);
    // Nobody has said yet that it is a layer, and not a manifest.
    assert!(!node.gives(&layer).await);
    // Its port is known now, and is another one than those of the patterns.
    node.store.put_image("registry.test/secret/other:v1", &[b"tells the port"]);
    assert!(node.gives(&secret).await);
    assert!(node.gives(&private).await && node.gives(&layer).await);
}

#[tokio::test]
async fn private_manifests_are_for_no_peer_and_their_layers_are() {
    let node = served(trust::Config::default(), &["registry.test/team/**"]);
    let artifact = node.store.put_image("registry.test/team/app:v1", &[b"layer"]);
    assert!(!node.gives(&artifact.target.digest).await);
    assert!(!node.tells("registry.test/team/app:v1"));
    assert!(node.gives(&Digest::sha256(b"layer")).await);
    // The same manifest under an open name too is private all the same: anybody can give it one.
    node.store.put(&Artifact { name: "registry.test/library/app:v1".into(), ..artifact.clone() });
    assert!(!node.gives(&artifact.target.digest).await);
}

#[tokio::test]
async fn ranges_of_segments_are_clamped() {
    let node = served(trust::Config::default(), &[]);
    node.store.put_image("registry.test/library/app:v1", &[b"0123456789"]);
    let check = async |start: u64, length: u64, expected: &[u8]| {
        let digest = Digest::sha256(b"0123456789");
        let segment = node.serve.open(&node.peer, &digest, start, length).await.unwrap().unwrap();
        assert_eq!(segment.range.len(), expected.len() as u64);
        let body: Vec<Bytes> = segment.body.try_collect().await.unwrap();
        assert_eq!(body.concat(), expected);
    };
    check(0, 10, b"0123456789").await;
    check(3, 4, b"3456").await;
    check(8, u64::MAX, b"89").await;
    check(10, 5, b"").await;
    check(99, 5, b"").await;
    check(u64::MAX, u64::MAX, b"").await;
}

#[tokio::test]
async fn what_is_held_is_advertised_and_what_changes() {
    let lab = Lab::new(1);
    let holder = &lab.holders[0];
    let (before, before_layer, _) = image("library/before", 10);
    holder.store.put(&before);
    let task = tokio::spawn(advertise(holder.store.clone(), holder.network.clone()));
    let network = Arc::clone(&lab.mirror.shared.fetcher.network);
    let held = |digest: Digest| !network.holders(&digest).is_empty();
    until("the snapshot", || held(before_layer)).await;
    let (after, after_layer, _) = image("library/after", 10);
    holder.store.put(&after);
    until("an addition", || held(after_layer) && held(after.target.digest)).await;
    holder.store.remove(&before_layer);
    until("a removal", || !held(before_layer)).await;
    assert!(held(after_layer) && !task.is_finished());
    task.abort();
}

/// A store whose watcher lags at the first change, and a network that writes down what it is told.
struct Lagging(MemoryStore, Mutex<u32>);

#[derive(Default)]
struct Recorder(Mutex<Vec<Advertisement>>);

impl Watcher for Lagging {
    fn watch(&self) -> Watch {
        let mut watches = self.1.lock().unwrap();
        *watches += 1;
        if *watches > 1 {
            return self.0.watch();
        }
        let (sender, changes) = broadcast::channel(1);
        for byte in 0..3 {
            sender.send(Change::Added(Digest::sha256(&[byte]))).unwrap();
        }
        Watch { held: Vec::new(), changes }
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.0.health()
    }
}

#[async_trait]
impl Network for Recorder {
    fn holders(&self, _: &Digest) -> Vec<Arc<crate::network::Peer>> {
        Vec::new()
    }

    fn tag_peers(&self) -> Vec<Arc<crate::network::Peer>> {
        Vec::new()
    }

    fn advertise(&self, change: Advertisement) {
        self.0.lock().unwrap().push(change);
    }

    async fn resolve(
        &self,
        _: &PeerId,
        _: &TagQuestion,
        _: Duration,
    ) -> Result<Option<Tagged>, ResolveError> {
        Ok(None)
    }

    fn status(&self) -> Status {
        Status::default()
    }
}

#[tokio::test]
async fn a_store_that_was_not_read_yet_is_not_told_of() {
    let (store, recorder) = (Arc::new(MemoryStore::new()), Arc::new(Recorder::default()));
    store.set_health(Health::Starting);
    let task = tokio::spawn(advertise(Arc::clone(&store) as _, recorder.clone()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let told = || recorder.0.lock().unwrap().clone();
    assert_eq!(told(), []);
    store.set_health(Health::Ready);
    until("an empty store is told of", || told() == [Advertisement::All(Vec::new())]).await;
    task.abort();
}

#[tokio::test]
async fn a_watcher_that_lags_advertises_all_anew() {
    let store = MemoryStore::new();
    let held = store.put_blob(b"held".to_vec()).digest;
    let (watcher, recorder) = (Arc::new(Lagging(store, Mutex::default())), Arc::new(Recorder::default()));
    let task = tokio::spawn(advertise(watcher, recorder.clone()));
    let told = || recorder.0.lock().unwrap().clone();
    until("a second snapshot", || told().len() >= 2).await;
    assert_eq!(told(), [Advertisement::All(Vec::new()), Advertisement::All(vec![held])]);
    task.abort();
}
