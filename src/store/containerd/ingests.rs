//! Discards unfinished downloads of one digest.
//!
//! After a body turned out to be wrong, containerd keeps what it has written and resumes on top of it. It may still be
//! writing while this runs, and then its ingest comes back, so the same ones are looked for again for some seconds.
//! One that began after the call is a new attempt and is never touched.

use std::time::{Duration, SystemTime};

use tokio::time::sleep;

use super::api::{Api, ApiError, Ingest};
use crate::oci::Digest;

/// When to look again after the first time.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(400), Duration::from_millis(1500)];

/// Digests that are looked for again at the same time; more than a lying peer can make a node pull at once.
pub(super) const FOLLOWED: usize = 256;

/// One request to discard.
pub(super) struct Discard {
    api: Api,
    namespaces: Vec<String>,
    digest: String,
    before: SystemTime,
}

impl Discard {
    pub(super) fn new(api: &Api, namespaces: &[String], digest: &Digest) -> Self {
        Self {
            api: api.clone(),
            namespaces: namespaces.to_vec(),
            digest: digest.to_string(),
            before: SystemTime::now(),
        }
    }

    /// Discards what is there; returns how many.
    pub(super) async fn run(&self) -> Result<usize, ApiError> {
        let mut count = 0;
        for namespace in &self.namespaces {
            for ingest in self.api.ingests(namespace).await? {
                if self.concerns(&ingest) && self.api.abort(namespace, &ingest.reference).await? {
                    tracing::info!(namespace, ingest = ingest.reference, "poisoned download discarded");
                    count += 1;
                }
            }
        }
        Ok(count)
    }

    /// Looks again.
    pub(super) async fn follow(self) {
        for pause in AGAIN {
            sleep(pause).await;
            if let Err(error) = self.run().await {
                tracing::warn!(digest = self.digest, %error, "cannot look again for a poisoned download");
                return;
            }
        }
    }

    /// References are `layer-sha256:...`, `manifest-...`, `config-...`, in newer versions with a prefix.
    fn concerns(&self, ingest: &Ingest) -> bool {
        ingest.reference.contains(&self.digest) && ingest.started.is_some_and(|started| started < self.before)
    }
}
