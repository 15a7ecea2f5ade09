//! The image service of CRI, as kubelet calls it. Every call has a time limit; errors keep containerd's text.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AuthConfig, ImageSpec, ListImagesRequest, PullImageRequest, RemoveImageRequest, VersionRequest,
};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint, Uri};

/// Limit of calls that are not pulls.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// A client of one containerd. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

/// A pull that succeeded.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// What containerd calls the image.
    pub image: String,
    /// How long the call took.
    pub elapsed: Duration,
}

/// A pull that did not.
#[derive(Clone, Debug)]
pub struct PullFailed {
    /// containerd's text, or that the limit passed.
    pub message: String,
    /// How long the call took.
    pub elapsed: Duration,
}

impl Cri {
    /// A client of the socket at `path`; connects at the first call, and again after containerd's restart.
    pub fn new(path: &Path) -> Self {
        let path: PathBuf = path.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not used, but must parse.
        let channel = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        Self { channel }
    }

    /// The runtime's name and version.
    pub async fn version(&self) -> Result<String> {
        let mut client = RuntimeServiceClient::new(self.channel.clone());
        let call = client.version(VersionRequest { version: "v1".into() });
        let answer = timeout(CALL_LIMIT, call).await.context("CRI Version hangs")??.into_inner();
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Pulls an image as kubelet does, without a secret.
    pub async fn pull(&self, reference: &str, limit: Duration) -> Result<Pulled, PullFailed> {
        self.pull_with(reference, None, limit).await
    }

    /// Pulls an image with a user name and a password.
    pub async fn pull_with(
        &self,
        reference: &str,
        secret: Option<(&str, &str)>,
        limit: Duration,
    ) -> Result<Pulled, PullFailed> {
        let started = Instant::now();
        let auth = secret.map(|(username, password)| AuthConfig {
            username: username.to_owned(),
            password: password.to_owned(),
            ..AuthConfig::default()
        });
        let request = PullImageRequest { image: Some(spec(reference)), auth, sandbox_config: None };
        let mut client = self.images();
        let answer = timeout(limit, client.pull_image(request)).await;
        let elapsed = started.elapsed();
        match answer {
            Ok(Ok(response)) => Ok(Pulled { image: response.into_inner().image_ref, elapsed }),
            Ok(Err(status)) => Err(PullFailed { message: status.message().to_owned(), elapsed }),
            Err(_) => Err(PullFailed { message: format!("not done within {limit:?}"), elapsed }),
        }
    }

    /// The names of all images, tags and digests.
    pub async fn images_listed(&self) -> Result<Vec<String>> {
        let mut client = self.images();
        let call = client.list_images(ListImagesRequest { filter: None });
        let answer = timeout(CALL_LIMIT, call).await.context("CRI ListImages hangs")??.into_inner();
        let names =
            answer.images.into_iter().flat_map(|image| [image.repo_tags, image.repo_digests].concat());
        Ok(names.collect())
    }

    /// Removes an image; one that is not there is removed already.
    pub async fn remove(&self, reference: &str) -> Result<()> {
        let mut client = self.images();
        let call = client.remove_image(RemoveImageRequest { image: Some(spec(reference)) });
        timeout(CALL_LIMIT, call).await.context("CRI RemoveImage hangs")??;
        Ok(())
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }
}

impl std::fmt::Display for PullFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (after {:?})", self.message, self.elapsed)
    }
}

impl std::error::Error for PullFailed {}

fn spec(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..ImageSpec::default() }
}
