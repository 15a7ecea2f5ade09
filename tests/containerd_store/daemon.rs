//! A containerd of its own, without its CRI, and the calls by which a runtime changes what it holds.

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use containerd_client::services::v1::CreateRequest as CreateLeaseRequest;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    CreateImageRequest, CreateNamespaceRequest, DeleteContentRequest, DeleteImageRequest, Image,
    ListStatusesRequest, Namespace, UpdateImageRequest, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use containerd_client::types::Descriptor as WireDescriptor;
use futures::StreamExt as _;
use peili::oci::Descriptor;
use peili::store::Config;
use peili::store::memory::{Artifact, Stored};
use peili_lab::Generation;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

pub(crate) const NAMESPACE: &str = "k8s.io";
/// What a runtime holds while it pulls; without one the garbage collector takes what no image leads to.
const LEASE: &str = "pull";

/// What needs more of the machine than a content store does, in the names of all generations.
const DISABLED: [&str; 5] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
];

/// A containerd with folders of its own. Dropping it kills the process.
pub(crate) struct Containerd {
    generation: Generation,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Containerd {
    pub(crate) fn absent(generation: Generation) -> Self {
        Self { generation, folder: tempfile::tempdir().unwrap(), child: None }
    }

    pub(crate) async fn started(generation: Generation) -> Self {
        let mut containerd = Self::absent(generation);
        containerd.start().await;
        containerd
    }

    pub(crate) async fn start(&mut self) {
        let binary = self.generation.binary().unwrap();
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {DISABLED:?}\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
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
            let request = CreateLeaseRequest { id: LEASE.into(), ..CreateLeaseRequest::default() };
            // From the second start on it is there.
            let _ = LeasesClient::new(self.channel().await).create(within(name, request)).await;
        }
    }

    pub(crate) async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let id = self.child.as_ref().unwrap().id().unwrap();
        let id = rustix::process::Pid::from_raw(id.try_into().unwrap()).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    pub(crate) fn config(&self) -> Config {
        Config { socket: self.socket(), ..Config::default() }
    }

    /// Deletes an image record and the content of its artifact.
    pub(crate) async fn delete(&self, artifact: &Artifact) {
        let request = DeleteImageRequest { name: artifact.name.clone(), ..DeleteImageRequest::default() };
        ImagesClient::new(self.channel().await).delete(within(NAMESPACE, request)).await.unwrap();
        for blob in &artifact.blobs {
            let request = DeleteContentRequest { digest: blob.descriptor.digest.to_string() };
            // The collector may have been faster.
            let _ = ContentClient::new(self.channel().await).delete(within(NAMESPACE, request)).await;
        }
    }

    async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        containerd_client::connect(self.socket()).await
    }

    async fn channel(&self) -> Channel {
        self.try_channel().await.unwrap()
    }

    /// Writes content, or only its first `bytes` without an end.
    pub(crate) async fn write(&self, namespace: &str, blob: &Stored, bytes: usize) -> Result<(), Status> {
        let complete = bytes == blob.bytes.len();
        let action = if complete { WriteAction::Commit } else { WriteAction::Write };
        self.send(namespace, request(action, blob, 0, &blob.bytes[..bytes])).await
    }

    /// Ends what [`Containerd::write`] began.
    pub(crate) async fn write_rest(&self, blob: &Stored, offset: usize) -> Result<(), Status> {
        self.send(NAMESPACE, request(WriteAction::Commit, blob, offset, &blob.bytes[offset..])).await
    }

    /// Writes these bytes for `blob` from its beginning, and does not commit them.
    pub(crate) async fn write_only(&self, blob: &Stored, bytes: &[u8]) {
        self.send(NAMESPACE, request(WriteAction::Write, blob, 0, bytes)).await.unwrap();
    }

    /// Is the writer of an unfinished download until the sender is dropped, as one that commits for long: containerd takes
    /// the end of the requests for the end of the writer, and not that nobody reads its answers.
    pub(crate) async fn hold(
        &self,
        blob: &Stored,
    ) -> (oneshot::Sender<Infallible>, Streaming<WriteContentResponse>) {
        let request = request(WriteAction::Stat, blob, 0, b"");
        let (open, closed) = oneshot::channel();
        let last = futures::stream::once(closed).filter_map(|_| std::future::ready(None));
        let requests = futures::stream::iter([request]).chain(last);
        let mut client = ContentClient::new(self.channel().await);
        let mut answers = client.write(within(NAMESPACE, requests)).await.unwrap().into_inner();
        answers.message().await.unwrap();
        (open, answers)
    }

    async fn send(&self, namespace: &str, request: WriteContentRequest) -> Result<(), Status> {
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

    /// Puts an artifact; returns when its image record was about to be made.
    pub(crate) async fn put(&self, namespace: &str, artifact: &Artifact) -> Instant {
        for blob in &artifact.blobs {
            match self.write(namespace, blob, blob.bytes.len()).await {
                Err(status) if status.code() != Code::AlreadyExists => panic!("{status}"),
                _ => {}
            }
        }
        let began = Instant::now();
        self.create_image(namespace, &artifact.name, &artifact.target).await;
        began
    }

    pub(crate) async fn ingests(&self) -> usize {
        let mut client = ContentClient::new(self.channel().await);
        let request = within(NAMESPACE, ListStatusesRequest::default());
        client.list_statuses(request).await.unwrap().into_inner().statuses.len()
    }
}

fn request(action: WriteAction, blob: &Stored, offset: usize, data: &[u8]) -> WriteContentRequest {
    let digest = blob.descriptor.digest.to_string();
    WriteContentRequest {
        action: action.into(),
        r#ref: format!("layer-{digest}"),
        total: blob.descriptor.size as i64,
        expected: digest,
        offset: offset as i64,
        data: data.to_vec(),
        labels: blob.labels.iter().cloned().collect(),
    }
}

fn within<T>(namespace: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.parse().unwrap());
    request.metadata_mut().insert("containerd-lease", LEASE.parse().unwrap());
    request
}
