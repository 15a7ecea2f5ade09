//! The containerd store against a real containerd: conformance, then each way in which containerd fails.
//!
//! Needs root and a containerd: `/usr/bin/containerd`, or the one that `PEILI_CONTAINERD` names.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    CreateImageRequest, CreateNamespaceRequest, DeleteContentRequest, DeleteImageRequest, Image,
    ListStatusesRequest, Namespace, UpdateImageRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor as WireDescriptor;
use peili::oci::{Descriptor, Digest, Reference};
use peili::store::conformance::{Subject, conformance, eventually};
use peili::store::containerd::ContainerdStore;
use peili::store::memory::{Artifact, Stored};
use peili::store::{Change, Config, Error, Health, Provider, Watcher};
use tokio::process::{Child, Command};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const NAMESPACE: &str = "k8s.io";

/// A containerd with folders of its own. Dropping it kills the process.
struct Containerd {
    folder: tempfile::TempDir,
    child: Option<Child>,
}

struct Real {
    containerd: Containerd,
    store: ContainerdStore,
    files: bool,
}

impl Containerd {
    fn absent() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), child: None }
    }

    async fn started() -> Self {
        let mut containerd = Self::absent();
        containerd.start().await;
        containerd
    }

    async fn start(&mut self) {
        let binary = std::env::var("PEILI_CONTAINERD").unwrap_or_else(|_| "/usr/bin/containerd".into());
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            path("root"),
            path("state"),
            path("containerd.sock"),
            path("containerd.sock.ttrpc"),
        );
        std::fs::write(path("config.toml"), config).unwrap();
        let log = std::fs::File::create(path("log")).unwrap();
        let child = Command::new(binary)
            .args(["--config", &path("config.toml")])
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(channel) = self.try_channel().await
                && VersionClient::new(channel).version(()).await.is_ok()
            {
                break;
            }
            let log = || std::fs::read_to_string(path("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "containerd does not start: {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for name in [NAMESPACE, "other"] {
            let namespace = Some(Namespace { name: name.into(), ..Namespace::default() });
            let _ = NamespacesClient::new(self.channel().await)
                .create(CreateNamespaceRequest { namespace })
                .await;
        }
    }

    async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.child.as_ref().unwrap().id().unwrap();
        let id = rustix::process::Pid::from_raw(id.try_into().unwrap()).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    fn config(&self) -> Config {
        Config { socket: self.socket(), ..Config::default() }
    }

    async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        containerd_client::connect(self.socket()).await
    }

    async fn channel(&self) -> Channel {
        self.try_channel().await.unwrap()
    }

    /// Writes content, or only its first `bytes` without an end.
    async fn write(&self, namespace: &str, blob: &Stored, bytes: usize) -> Result<(), Status> {
        let digest = blob.descriptor.digest.to_string();
        let complete = bytes == blob.bytes.len();
        let request = WriteContentRequest {
            action: if complete { WriteAction::Commit } else { WriteAction::Write }.into(),
            r#ref: format!("layer-{digest}"),
            total: blob.bytes.len() as i64,
            expected: digest,
            data: blob.bytes[..bytes].to_vec(),
            labels: blob.labels.iter().cloned().collect(),
            ..WriteContentRequest::default()
        };
        let mut client = ContentClient::new(self.channel().await);
        let requests = futures::stream::iter([request]);
        let mut answers = client.write(within(namespace, requests)).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }

    async fn create_image(&self, namespace: &str, name: &str, target: &Descriptor) {
        let image = Image {
            name: name.to_owned(),
            target: Some(WireDescriptor {
                media_type: target.media_type.to_string(),
                digest: target.digest.to_string(),
                size: target.size as i64,
                ..WireDescriptor::default()
            }),
            ..Image::default()
        };
        let mut client = ImagesClient::new(self.channel().await);
        let create = CreateImageRequest { image: Some(image.clone()), ..CreateImageRequest::default() };
        match client.create(within(namespace, create)).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update = UpdateImageRequest { image: Some(image), ..UpdateImageRequest::default() };
                client.update(within(namespace, update)).await.unwrap();
            }
            other => drop(other.unwrap()),
        }
    }

    async fn put(&self, namespace: &str, artifact: &Artifact) {
        for blob in &artifact.blobs {
            match self.write(namespace, blob, blob.bytes.len()).await {
                Err(status) if status.code() != Code::AlreadyExists => panic!("{status}"),
                _ => {}
            }
        }
        self.create_image(namespace, &artifact.name, &artifact.target).await;
    }

    async fn ingests(&self) -> usize {
        let mut client = ContentClient::new(self.channel().await);
        let request = within(NAMESPACE, ListStatusesRequest::default());
        client.list_statuses(request).await.unwrap().into_inner().statuses.len()
    }
}

#[async_trait]
impl Subject for Real {
    fn provider(&self) -> &dyn Provider {
        &self.store
    }

    fn watcher(&self) -> &dyn Watcher {
        &self.store
    }

    async fn put(&self, artifact: &Artifact) {
        self.containerd.put(NAMESPACE, artifact).await;
    }

    async fn delete(&self, artifact: &Artifact) {
        let name = artifact.name.clone();
        let request = DeleteImageRequest { name, ..DeleteImageRequest::default() };
        ImagesClient::new(self.containerd.channel().await).delete(within(NAMESPACE, request)).await.unwrap();
        for blob in &artifact.blobs {
            let request = DeleteContentRequest { digest: blob.descriptor.digest.to_string() };
            // The collector may have been faster.
            let _ =
                ContentClient::new(self.containerd.channel().await).delete(within(NAMESPACE, request)).await;
        }
    }

    fn reads_files(&self) -> bool {
        self.files
    }
}

fn within<T>(namespace: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.parse().unwrap());
    request
}

fn reference(text: &str) -> Reference {
    Reference::parse_full(text).unwrap()
}

async fn health(store: &ContainerdStore, wanted: impl Fn(&Health) -> bool) -> Health {
    let mut health = store.health();
    let wait = tokio::time::timeout(Duration::from_secs(20), health.wait_for(|health| wanted(health))).await;
    wait.expect("health changes in time").unwrap().clone()
}

async fn ready(store: &ContainerdStore) {
    health(store, |health| *health == Health::Ready).await;
}

async fn degraded(store: &ContainerdStore) -> String {
    match health(store, |health| matches!(health, Health::Degraded(_))).await {
        Health::Degraded(reason) => reason,
        other => panic!("{other:?}"),
    }
}

async fn read(store: &ContainerdStore, digest: &Digest) -> Vec<u8> {
    let mut content = store.open(digest, 0).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = content.next(u64::MAX).await.unwrap() {
        bytes.extend_from_slice(&chunk);
    }
    bytes
}

async fn within_a_second(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    eventually(what, condition).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{what}: {:?}", began.elapsed());
}

#[tokio::test]
async fn conforms_by_files() {
    let containerd = Containerd::started().await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    assert!(store.content_root().is_some());
    conformance(&Real { containerd, store, files: true }).await;
}

#[tokio::test]
async fn conforms_by_the_api() {
    let containerd = Containerd::started().await;
    let config = Config { content_root: Some("/nonexistent".into()), ..containerd.config() };
    let store = ContainerdStore::new(&config);
    ready(&store).await;
    assert_eq!(store.content_root(), None);
    conformance(&Real { containerd, store, files: false }).await;
}

#[tokio::test]
async fn absent_then_started_then_killed_then_restarted() {
    let mut containerd = Containerd::absent();
    let store = ContainerdStore::new(&containerd.config());
    let reason = degraded(&store).await;
    assert!(reason.ends_with("No such file or directory; is the socket mounted?"), "{reason}");

    containerd.start().await;
    ready(&store).await;
    let artifact = Artifact::image("one.test/restart:1", &[b"restart: layer"]);
    containerd.put(NAMESPACE, &artifact).await;
    let name = reference("one.test/restart:1");
    within_a_second("an image", || store.resolve(&name).is_some()).await;

    containerd.kill().await;
    degraded(&store).await;
    let layer = &artifact.blobs[0];
    assert_eq!(store.resolve(&name), Some(artifact.target.clone()), "the view stands");
    assert_eq!(read(&store, &layer.descriptor.digest).await, layer.bytes, "files stay readable");

    containerd.start().await;
    ready(&store).await;
    let again = Artifact::image("one.test/restart:2", &[b"restart: another"]);
    containerd.put(NAMESPACE, &again).await;
    let name = reference("one.test/restart:2");
    within_a_second("an image after a restart", || store.resolve(&name).is_some()).await;
}

#[tokio::test]
async fn stopped_and_continued() {
    let containerd = Containerd::started().await;
    let files = ContainerdStore::new(&containerd.config());
    let config = Config { content_root: Some("/nonexistent".into()), ..containerd.config() };
    let api = ContainerdStore::new(&config);
    ready(&files).await;
    ready(&api).await;
    let artifact = Artifact::image("one.test/stopped:1", &[b"stopped: layer"]);
    containerd.put(NAMESPACE, &artifact).await;
    let name = reference("one.test/stopped:1");
    eventually("an image", || files.resolve(&name).is_some() && api.resolve(&name).is_some()).await;

    containerd.signal(rustix::process::Signal::STOP);
    let layer = &artifact.blobs[0];
    let digest = layer.descriptor.digest;
    let began = Instant::now();
    assert!(matches!(api.open(&digest, 0).await, Err(Error::Unavailable(_))));
    assert!(api.discard_ingests(&digest).await.is_err());
    assert!(began.elapsed() < Duration::from_secs(6), "calls have limits");
    let reason = degraded(&files).await;
    assert!(reason.contains("does not answer"), "{reason}");
    assert_eq!(files.resolve(&name), Some(artifact.target.clone()), "the view stands");
    assert_eq!(read(&files, &digest).await, layer.bytes);

    containerd.signal(rustix::process::Signal::CONT);
    ready(&files).await;
    ready(&api).await;
    assert_eq!(read(&api, &digest).await, layer.bytes);
}

#[tokio::test]
async fn layers_of_a_running_pull_are_seen() {
    let containerd = Containerd::started().await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let layer = Stored::new("application/octet-stream", vec![7; 100_000]).labelled("one.test", "flight");
    let digest = layer.descriptor.digest;
    containerd.write(NAMESPACE, &layer, 50_000).await.unwrap();
    // Two polls, so that an old containerd's ingest is seen before it ends.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(store.describe(&digest).is_none(), "not complete");
    let mut watch = store.watch();
    let rest = containerd.write_rest(&layer, 50_000).await;
    assert!(rest.is_ok(), "{rest:?}");
    within_a_second("a layer without an image record", || store.describe(&digest).is_some()).await;
    assert_eq!(watch.changes.recv().await.unwrap(), Change::Added(digest));
    let owner = || store.describe(&digest).is_some_and(|blob| blob.repositories.len() == 1);
    eventually("its owner", owner).await;
}

#[tokio::test]
async fn other_namespaces_are_closed() {
    let containerd = Containerd::started().await;
    let other = Artifact::image("one.test/other:1", &[b"other namespace: layer"]);
    containerd.put("other", &other).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let both = Config { namespaces: vec![NAMESPACE.into(), "other".into()], ..containerd.config() };
    let both = ContainerdStore::new(&both);
    ready(&both).await;
    let later = Artifact::image("one.test/other:2", &[b"other namespace: later"]);
    containerd.put("other", &later).await;
    eventually("the other namespace", || both.resolve(&reference("one.test/other:2")).is_some()).await;
    for artifact in [&other, &later] {
        let digest = artifact.blobs[0].descriptor.digest;
        let file = store.content_root().unwrap().join("blobs/sha256").join(digest.hex());
        assert!(Path::new(&file).exists(), "the file is there for all");
        assert_eq!(store.describe(&digest), None);
        assert!(matches!(store.open(&digest, 0).await, Err(Error::NotFound(_))));
        assert_eq!(read(&both, &digest).await, artifact.blobs[0].bytes);
    }
}

#[tokio::test]
async fn ingests_that_began_before_are_discarded() {
    let containerd = Containerd::started().await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let poisoned = Stored::new("application/octet-stream", vec![1; 9000]);
    let innocent = Stored::new("application/octet-stream", vec![2; 9000]);
    for blob in [&poisoned, &innocent] {
        containerd.write(NAMESPACE, blob, 5000).await.unwrap();
    }
    assert_eq!(containerd.ingests().await, 2);
    assert_eq!(store.discard_ingests(&poisoned.descriptor.digest).await.unwrap(), 1);
    assert_eq!(containerd.ingests().await, 1);
    // A new attempt is not touched by what still looks for the old one.
    containerd.write(NAMESPACE, &poisoned, 4000).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2300)).await;
    assert_eq!(containerd.ingests().await, 2);
}

impl Containerd {
    /// Ends what [`Containerd::write`] began.
    async fn write_rest(&self, blob: &Stored, offset: usize) -> Result<(), Status> {
        let digest = blob.descriptor.digest.to_string();
        let request = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("layer-{digest}"),
            total: blob.bytes.len() as i64,
            expected: digest,
            offset: offset as i64,
            data: blob.bytes[offset..].to_vec(),
            labels: blob.labels.iter().cloned().collect(),
        };
        let mut client = ContentClient::new(self.channel().await);
        let requests = futures::stream::iter([request]);
        let mut answers = client.write(within(NAMESPACE, requests)).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }
}
