//! Discards unfinished downloads of one digest.
//!
//! After a body turned out to be wrong, containerd keeps what it has written and resumes on top of it. It may still be
//! writing while this runs, and then its ingest comes back, so the same ones are looked for again for some seconds.
//! While containerd is away or fails, the request is remembered. An ingest that began after the request is a new
//! attempt and is never touched.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::Shared;
use super::api::{ApiError, Ingest};
use crate::oci::Digest;

/// When to look again after a look that succeeded.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(400), Duration::from_millis(1500)];

/// When to look again after one that failed.
const RETRY: Duration = Duration::from_millis(500);

/// How long a request is remembered while containerd is away or fails: several of the longest pauses between attempts
/// to connect, and a restart of containerd.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Digests that are looked for again at the same time; more than a lying peer can make a node pull at once.
pub(super) const FOLLOWED: usize = 256;

/// One request to discard.
pub(super) struct Discard {
    shared: Arc<Shared>,
    digest: String,
    before: SystemTime,
}

impl Discard {
    pub(super) fn new(shared: &Arc<Shared>, digest: &Digest) -> Self {
        Self { shared: Arc::clone(shared), digest: digest.to_string(), before: SystemTime::now() }
    }

    /// Discards what is there; returns how many.
    pub(super) async fn run(&self) -> Result<usize, ApiError> {
        let Some(api) = self.shared.api.load_full() else {
            return Err(ApiError::Failed(self.shared.cause()));
        };
        let mut count = 0;
        for namespace in &self.shared.namespaces {
            for ingest in api.ingests(namespace).await? {
                if self.concerns(&ingest) && api.abort(namespace, &ingest.reference).await? {
                    tracing::info!(namespace, ingest = ingest.reference, "poisoned download discarded");
                    count += 1;
                }
            }
        }
        Ok(count)
    }

    /// Discards, tells how that went, and looks again until looks have succeeded.
    pub(super) async fn follow(self, first: oneshot::Sender<Result<usize, ApiError>>) {
        let end = Instant::now() + REMEMBERED;
        let outcome = self.run().await;
        let mut failure = outcome.as_ref().err().cloned();
        let mut again = AGAIN.iter();
        // Nobody may wait for it any more.
        let _ = first.send(outcome);
        loop {
            let pause = match &failure {
                Some(error) if Instant::now() + RETRY > end => {
                    tracing::warn!(digest = self.digest, %error, "a poisoned download may remain");
                    return;
                }
                Some(_) => RETRY,
                None => match again.next() {
                    Some(pause) => *pause,
                    None => return,
                },
            };
            sleep(pause).await;
            failure = self.run().await.err();
            if failure.is_some() {
                again = AGAIN.iter();
            }
        }
    }

    /// References are `layer-sha256:...`, `manifest-...`, `config-...`, in newer versions with a prefix.
    fn concerns(&self, ingest: &Ingest) -> bool {
        ingest.reference.contains(&self.digest) && ingest.started.is_some_and(|started| started < self.before)
    }
}
