//! Discards a download that is complete and can never be committed.
//!
//! When a body broke off before its digest could be checked, containerd resumes on top of what it has, from its next
//! host. Was the prefix wrong, then the commit fails, and containerd keeps the download (its issue 3974): every later
//! pull finds it complete, commits, fails, and asks nobody.
//!
//! What is complete may also be right, and just being committed: on a slow disk the sync of a large blob takes many
//! seconds, in which nothing of it changes. So two equal looks only raise the question. The answer is containerd's: it
//! gives a download to one writer at a time, and that one keeps it until its commit has ended, so whoever becomes the
//! writer knows that nobody is at it; and it tells the new writer the digest of what is written, which it hashes for
//! that. It does the same for each pull that tries again, so this costs a node no more than one of these. The download
//! is aborted while it is held, so that no new attempt is hit.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::Shared;
use super::api::{Api, ApiError, Ingest};
use crate::oci::Digest;

/// Between two looks: short after a change, since a pod that failed to start is tried again after some seconds.
const LOOK_SOON: Duration = Duration::from_millis(400);
const LOOK: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(5);

/// How long a download is watched that does not grow, and how long containerd is waited for.
const QUIET: Duration = Duration::from_secs(60);

/// How long one is watched that grows: 10 GiB at 100 Mbit/s.
const LONGEST: Duration = Duration::from_secs(15 * 60);

/// How long there may be none: until the runtime's next attempt after a failed one.
const ABSENT: Duration = Duration::from_secs(10);

/// One digest whose downloads are watched.
pub(super) struct Watch {
    shared: Arc<Shared>,
    digest: Digest,
}

impl Watch {
    pub(super) fn new(shared: &Arc<Shared>, digest: &Digest) -> Self {
        Self { shared: Arc::clone(shared), digest: *digest }
    }

    /// Watches and tells whether a download was discarded.
    pub(super) async fn follow(self, outcome: oneshot::Sender<Result<bool, ApiError>>) {
        // Nobody may wait for it any more.
        let _ = outcome.send(self.run().await);
    }

    async fn run(&self) -> Result<bool, ApiError> {
        let longest = Instant::now() + LONGEST;
        let (mut changed, mut seen) = (Instant::now(), Instant::now());
        let mut before = Vec::new();
        loop {
            if self.shared.view.describe(&self.digest).is_some() {
                return Ok(false);
            }
            let failure = match self.look().await {
                Ok((api, ingests)) => {
                    for (namespace, ingest) in &ingests {
                        let is_complete = ingest.total > 0 && ingest.offset == ingest.total;
                        let stands = is_complete && before.iter().any(|(_, known)| known == ingest);
                        if stands && let Some(outcome) = self.decide(&api, namespace, ingest).await? {
                            return Ok(outcome);
                        }
                    }
                    if ingests != before {
                        changed = Instant::now();
                    }
                    if !ingests.is_empty() {
                        seen = Instant::now();
                    }
                    before = ingests;
                    None
                }
                Err(error) => {
                    // Only looks that succeed say that there is none.
                    seen = Instant::now();
                    Some(error)
                }
            };
            let next = Instant::now() + LOOK;
            if next > (changed + QUIET).min(longest) || next > seen + ABSENT {
                return failure.map_or(Ok(false), Err);
            }
            sleep(if changed.elapsed() < SOON { LOOK_SOON } else { LOOK }).await;
        }
    }

    async fn look(&self) -> Result<(Arc<Api>, Vec<(String, Ingest)>), ApiError> {
        let api = self.shared.connected()?;
        let ingests = self.shared.ingests_of(&api, &self.digest).await?;
        Ok((api, ingests))
    }

    /// Aborts a complete download unless it is right, which ends the watch too; `None`: somebody is at it.
    async fn decide(&self, api: &Api, namespace: &str, known: &Ingest) -> Result<Option<bool>, ApiError> {
        let Some(writer) = api.writer(namespace, &known.reference, &self.digest).await? else {
            return Ok(None);
        };
        // An empty one was begun by the question: the download has gone meanwhile. One of another size began anew.
        let stands = writer.offset == known.total || writer.offset == 0;
        let outcome = match (stands, writer.digest == Some(self.digest)) {
            (false, _) => Ok(None),
            (true, true) => Ok(Some(false)),
            (true, false) => api.abort(namespace, &known.reference).await.map(Some),
        };
        if let Ok(Some(true)) = outcome {
            let ingest = &known.reference;
            tracing::warn!(namespace, ingest, "a download was complete and wrong: discarded");
        }
        writer.close().await;
        outcome
    }
}
