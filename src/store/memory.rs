//! The in-memory twin of a store, and images to put into any store.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Content, Error, Health, Held, Image, Provider, Snapshot, Source, View, Watch, Watcher};
use crate::oci::{
    Algorithm, Descriptor, Digest, MANIFEST_MEDIA_TYPES, Manifest, OCTET_STREAM, Reference, is_manifest,
};

/// Media type of an image's config.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of an image's layer.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const INDEX: &str = MANIFEST_MEDIA_TYPES[0];
const MANIFEST: &str = MANIFEST_MEDIA_TYPES[1];

/// A store whose content a test puts in.
#[derive(Debug, Default)]
pub struct MemoryStore {
    view: View,
    state: Mutex<State>,
}

/// An image, or any other artifact, with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Name of the image record. Not every name is a reference.
    pub name: String,
    /// What the name stands for.
    pub target: Descriptor,
    /// Content, children before parents. Blobs may be taken away to make an image with missing children.
    pub blobs: Vec<Stored>,
}

/// Some content of an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What it is.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub bytes: Bytes,
    /// containerd's labels.
    pub labels: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct State {
    images: BTreeMap<String, Descriptor>,
    blobs: HashMap<Digest, (Bytes, Vec<Source>)>,
    manifests: HashMap<Digest, Arc<Manifest>>,
    failure: Option<String>,
    discarded: Vec<Digest>,
    watched: Vec<Digest>,
    stuck: HashSet<Digest>,
}

impl Stored {
    /// Content of this media type, by its sha256 digest.
    pub fn new(media_type: &str, bytes: impl Into<Bytes>) -> Self {
        Self::hashed(Algorithm::Sha256, media_type, bytes)
    }

    /// Content of this media type, by a digest of this algorithm.
    pub fn hashed(algorithm: Algorithm, media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let digest = Digest::of(algorithm, &bytes);
        Self {
            descriptor: Descriptor::new(digest, bytes.len() as u64, media_type),
            bytes,
            labels: Vec::new(),
        }
    }

    /// With containerd's label for the repositories that it came from.
    pub fn labelled(mut self, host: &str, repositories: &str) -> Self {
        self.labels.push((format!("containerd.io/distribution.source.{host}"), repositories.to_owned()));
        self
    }
}

impl Artifact {
    /// An image of these layers; its config is made from its name.
    pub fn image(name: &str, layers: &[&[u8]]) -> Self {
        let config =
            Stored::new(CONFIG, json!({"architecture": "amd64", "os": "linux", "author": name}).to_string());
        let layers = layers.iter().map(|layer| Stored::new(LAYER, layer.to_vec())).collect();
        Self::manifest(name, config, layers, None)
    }

    /// A manifest of any kind with its content.
    pub fn manifest(name: &str, config: Stored, layers: Vec<Stored>, subject: Option<&Descriptor>) -> Self {
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": wire(&config.descriptor),
            "layers": layers.iter().map(|layer| wire(&layer.descriptor)).collect::<Vec<_>>(),
        });
        if let Some(subject) = subject {
            manifest["subject"] = wire(subject);
        }
        let manifest = Stored::new(MANIFEST, manifest.to_string());
        let mut blobs = layers;
        blobs.push(config);
        let target = manifest.descriptor.clone();
        blobs.push(manifest);
        Self { name: name.to_owned(), target, blobs }
    }

    /// An index over the targets of other artifacts, with all of their content.
    pub fn index(name: &str, members: Vec<Self>) -> Self {
        let manifests: Vec<_> = members.iter().map(|member| wire(&member.target)).collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let index = Stored::new(INDEX, index.to_string());
        let target = index.descriptor.clone();
        let mut blobs: Vec<_> = members.into_iter().flat_map(|member| member.blobs).collect();
        blobs.push(index);
        Self { name: name.to_owned(), target, blobs }
    }

    /// A Helm chart.
    pub fn helm(name: &str) -> Self {
        let config =
            Stored::new("application/vnd.cncf.helm.config.v1+json", format!(r#"{{"name":"{name}"}}"#));
        let chart =
            Stored::new("application/vnd.cncf.helm.chart.content.v1.tar+gzip", format!("chart {name}"));
        Self::manifest(name, config, vec![chart], None)
    }

    /// A signature as cosign makes it, about `subject`.
    pub fn cosign(name: &str, subject: &Descriptor) -> Self {
        let config = Stored::new(CONFIG, json!({"author": name}).to_string());
        let payload =
            format!(r#"{{"critical":{{"image":{{"docker-manifest-digest":"{}"}}}}}}"#, subject.digest);
        let payload = Stored::new("application/vnd.dev.cosign.simplesigning.v1+json", payload);
        Self::manifest(name, config, vec![payload], Some(subject))
    }
}

impl MemoryStore {
    /// An empty store that is ready.
    pub fn new() -> Self {
        let store = Self::default();
        store.set_health(Health::Ready);
        store
    }

    /// Adds an artifact with its image record.
    pub fn put(&self, artifact: &Artifact) {
        let mut state = self.state();
        for blob in &artifact.blobs {
            state.insert(blob);
        }
        state.images.insert(artifact.name.clone(), artifact.target.clone());
        self.publish(&state);
    }

    /// Adds an image of these layers; returns it.
    pub fn put_image(&self, name: &str, layers: &[&[u8]]) -> Artifact {
        let artifact = Artifact::image(name, layers);
        self.put(&artifact);
        artifact
    }

    /// Adds content that no image record leads to; returns its descriptor.
    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> Descriptor {
        let blob = Stored::new(OCTET_STREAM, bytes);
        self.put_stored(&blob);
        blob.descriptor
    }

    /// Adds content with labels that no image record leads to.
    pub fn put_stored(&self, blob: &Stored) {
        let mut state = self.state();
        state.insert(blob);
        self.publish(&state);
    }

    /// Takes content away. Contents that are open stay readable.
    pub fn remove(&self, digest: &Digest) {
        let mut state = self.state();
        state.blobs.remove(digest);
        state.manifests.remove(digest);
        self.publish(&state);
    }

    /// Takes an image record away, and leaves its content.
    pub fn remove_image(&self, name: &str) {
        let mut state = self.state();
        state.images.remove(name);
        self.publish(&state);
    }

    /// Replaces the bytes of content and leaves its digest: a lying peer, a damaged disk.
    pub fn corrupt(&self, digest: &Digest, bytes: impl Into<Bytes>) {
        let mut state = self.state();
        if let Some(blob) = state.blobs.get_mut(digest) {
            blob.0 = bytes.into();
        }
    }

    /// Makes every later open fail for this reason, or none.
    pub fn fail(&self, reason: Option<&str>) {
        self.state().failure = reason.map(str::to_owned);
    }

    /// Sets the health.
    pub fn set_health(&self, health: Health) {
        self.view.set_health(health);
    }

    /// Digests whose unfinished downloads were to be discarded, in order.
    pub fn discarded(&self) -> Vec<Digest> {
        self.state().discarded.clone()
    }

    /// The next watch of a download of `digest` finds it complete and wrong.
    pub fn stick(&self, digest: &Digest) {
        self.state().stuck.insert(*digest);
    }

    /// Digests whose unfinished downloads were to be watched, in order.
    pub fn watched(&self) -> Vec<Digest> {
        self.state().watched.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let images = state
            .images
            .iter()
            .map(|(name, target)| Image { name: Reference::parse_full(name).ok(), target: target.clone() });
        let held = state.blobs.iter().map(|(digest, (bytes, sources))| Held {
            digest: *digest,
            size: bytes.len() as u64,
            sources: sources.clone(),
        });
        self.view.replace(Snapshot {
            images: images.collect(),
            held: held.collect(),
            manifests: state.manifests.clone(),
        });
    }
}

#[async_trait]
impl Provider for MemoryStore {
    fn view(&self) -> &View {
        &self.view
    }

    async fn open(&self, digest: &Digest, offset: u64) -> Result<Content, Error> {
        self.view.check_open(digest, offset)?;
        let state = self.state();
        if let Some(reason) = &state.failure {
            return Err(Error::Unavailable(reason.clone()));
        }
        let (bytes, _) = state.blobs.get(digest).ok_or(Error::NotFound(*digest))?;
        Ok(Content::bytes(bytes, offset))
    }

    async fn discard_ingests(&self, digest: &Digest) -> Result<usize, Error> {
        self.state().discarded.push(*digest);
        Ok(0)
    }

    async fn discard_stuck(&self, digest: &Digest) -> Result<bool, Error> {
        let mut state = self.state();
        state.watched.push(*digest);
        Ok(state.stuck.remove(digest))
    }
}

impl Watcher for MemoryStore {
    fn watch(&self) -> Watch {
        self.view.watch()
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.view.health()
    }
}

impl State {
    fn insert(&mut self, blob: &Stored) {
        let digest = blob.descriptor.digest;
        let sources = blob.labels.iter().flat_map(|(key, value)| Source::parse_label(key, value));
        self.blobs.insert(digest, (blob.bytes.clone(), sources.collect()));
        if is_manifest(&blob.descriptor.media_type)
            && let Ok((manifest, _)) = Manifest::parse_known(&blob.bytes)
        {
            self.manifests.insert(digest, Arc::new(manifest));
        }
    }
}

fn wire(descriptor: &Descriptor) -> Value {
    json!({
        "mediaType": &*descriptor.media_type,
        "digest": descriptor.digest.to_string(),
        "size": descriptor.size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{Subject, conformance};

    struct Memory(MemoryStore);

    #[async_trait]
    impl Subject for Memory {
        fn provider(&self) -> &dyn Provider {
            &self.0
        }

        fn watcher(&self) -> &dyn Watcher {
            &self.0
        }

        async fn put(&self, artifact: &Artifact) {
            self.0.put(artifact);
        }

        async fn delete(&self, artifact: &Artifact) {
            self.0.remove_image(&artifact.name);
            for blob in &artifact.blobs {
                self.0.remove(&blob.descriptor.digest);
            }
        }
    }

    #[tokio::test]
    async fn conforms() {
        conformance(&Memory(MemoryStore::new())).await;
    }
}
