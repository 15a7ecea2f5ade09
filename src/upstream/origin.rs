//! What a tag stands for at its registry: asked at the hosts that the runtime would ask after this node, as anybody may.
//!
//! No configured header, certificate or password is sent: what such a host tells is everybody's. Asks once, and keeps nothing but
//! the hosts and their anonymous tokens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt, TryFutureExt};
use http::StatusCode;
use tokio::time::{Instant, timeout};

use super::endpoint::{self, Endpoint, Host, SendError};
use super::{FetchError, hosts, lock};
use crate::oci::{Algorithm, Descriptor, MANIFEST_MEDIA_TYPES, Name, Tag};

/// For the head of one answer.
const HEADER: Duration = Duration::from_secs(2);
/// For all hosts together.
const LIMIT: Duration = Duration::from_secs(5);
/// How long hosts are kept: their configuration may change.
const KEEP: Duration = Duration::from_secs(60);
/// Repositories whose hosts and tokens are kept.
const REPOSITORIES: usize = 256;

/// The hosts of repositories that were asked about lately.
#[derive(Default)]
pub(super) struct Origins(Mutex<HashMap<Name, (Endpoints, Instant)>>);

type Endpoints = Arc<[Endpoint]>;

impl Origins {
    /// Forgets all: the configuration is another.
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }

    /// `load` reads the hosts of the registry, and blocks.
    pub(super) async fn resolve(
        &self,
        name: &Name,
        tag: &Tag,
        load: impl FnOnce() -> Vec<hosts::Host> + Send + 'static,
    ) -> Result<Descriptor, FetchError> {
        let endpoints = self.endpoints(name, load).await?;
        let asked = timeout(LIMIT, async {
            let mut last = FetchError::NotFound;
            for endpoint in endpoints.iter().filter(|endpoint| endpoint.resolves()) {
                match resolve(endpoint, tag).await {
                    Ok(target) => return Ok(target),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        asked.await.unwrap_or_else(|_| Err(FetchError::Failed("it takes too long".into())))
    }

    async fn endpoints(
        &self,
        name: &Name,
        load: impl FnOnce() -> Vec<hosts::Host> + Send + 'static,
    ) -> Result<Endpoints, FetchError> {
        let fresh = |(_, at): &(Endpoints, Instant)| at.elapsed() < KEEP;
        if let Some((endpoints, _)) = lock(&self.0).get(name).filter(|kept| fresh(kept)) {
            return Ok(Arc::clone(endpoints));
        }
        let about = name.clone();
        let made = tokio::task::spawn_blocking(move || {
            let hosts = load().into_iter().filter_map(|host| {
                let made = Host::new(&host.anonymous());
                made.inspect_err(|error| tracing::debug!(url = host.url, %error, "cannot be asked")).ok()
            });
            hosts.map(|host| Endpoint::mirroring(&host, &about, HEADER)).collect::<Endpoints>()
        });
        let endpoints = made.await.map_err(|error| FetchError::Failed(error.to_string()))?;
        let mut kept = lock(&self.0);
        if kept.len() >= REPOSITORIES {
            kept.clear();
        }
        kept.insert(name.clone(), (Arc::clone(&endpoints), Instant::now()));
        Ok(endpoints)
    }
}

async fn resolve(endpoint: &Endpoint, tag: &Tag) -> Result<Descriptor, FetchError> {
    let (path, accept) = (format!("manifests/{tag}"), MANIFEST_MEDIA_TYPES.join(", "));
    let fails = |error: SendError| match error {
        SendError::Status(StatusCode::NOT_FOUND, _) => FetchError::NotFound,
        SendError::Status(StatusCode::TOO_MANY_REQUESTS, _)
        | SendError::Token(StatusCode::TOO_MANY_REQUESTS, _) => FetchError::Held,
        SendError::Status(status, _) | SendError::Token(status, _) if status.is_client_error() => {
            FetchError::Refused(error.to_string())
        }
        error => FetchError::Failed(error.to_string()),
    };
    let ask = |method| endpoint.send(method, &path, &accept, None).map_err(fails).boxed();
    endpoint::target(ask, FetchError::Failed, Algorithm::Sha256, HEADER).await
}
