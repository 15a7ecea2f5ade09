//! Discards unfinished downloads of one digest.
//!
//! After a body turned out to be wrong, containerd keeps what it has written and resumes on top of it. It may still be
//! writing while this runs, so the same ones are looked for again for some seconds. While containerd is away or fails,
//! the request is remembered.
//!
//! No clock tells a poisoned download from a new attempt. The first look finds the poisoned ones: a new attempt under
//! the same reference would have resumed what is there. Later looks abort only these, told apart by when containerd says
//! that they began, and leave attempts alone that began after the first look.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::api::{Api, ApiError, Ingest};
use crate::oci::Digest;

/// When to look again after a look that succeeded.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(400), Duration::from_millis(1500)];

/// When to look again after one that failed.
const RETRY: Duration = Duration::from_millis(500);

/// How long a request is remembered while containerd is away or fails: several of the longest pauses between attempts
/// to connect, and a restart of containerd.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Digests that are looked for at the same time; more than a lying peer can make a node pull at once.
pub(super) const FOLLOWED: usize = 256;

/// Tasks that look for the downloads of a digest, one for each digest: whoever wants one may go away while containerd
/// hangs. Dropping it ends them.
#[derive(Debug, Default)]
pub(super) struct Following(Mutex<HashMap<Digest, AbortOnDropHandle<()>>>);

impl Following {
    /// Runs `work`, instead of what still runs for the digest; its answer never comes if a later call takes over.
    /// `None`: there are too many.
    pub(super) fn run<T: Send + 'static, W: Future<Output = ()> + Send + 'static>(
        &self,
        digest: &Digest,
        work: impl FnOnce(oneshot::Sender<T>) -> W,
    ) -> Option<oneshot::Receiver<T>> {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|_, running| !running.is_finished());
        if tasks.len() >= FOLLOWED && !tasks.contains_key(digest) {
            return None;
        }
        let (sender, answer) = oneshot::channel();
        tasks.insert(*digest, AbortOnDropHandle::new(tokio::spawn(work(sender))));
        Some(answer)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// One request to discard.
pub(super) struct Discard {
    shared: Arc<Shared>,
    digest: Digest,
    /// What the first look found, by namespace.
    poisoned: Option<Vec<(String, Ingest)>>,
}

impl Discard {
    pub(super) fn new(shared: &Arc<Shared>, digest: &Digest) -> Self {
        Self { shared: Arc::clone(shared), digest: *digest, poisoned: None }
    }

    /// Discards what is there; returns how many.
    pub(super) async fn run(&mut self) -> Result<usize, ApiError> {
        let api = self.shared.connected()?;
        let poisoned = match &self.poisoned {
            Some(poisoned) => poisoned,
            None => self.poisoned.insert(self.shared.ingests_of(&api, &self.digest).await?),
        };
        let mut count = 0;
        for (namespace, known) in poisoned {
            let now = api.ingest(namespace, &known.reference).await?;
            if now.is_some_and(|now| now.started == known.started)
                && api.abort(namespace, &known.reference).await?
            {
                tracing::info!(namespace, ingest = known.reference, "poisoned download discarded");
                count += 1;
            }
        }
        Ok(count)
    }

    /// Discards, tells how that went, and looks again until looks have succeeded.
    pub(super) async fn follow(mut self, first: oneshot::Sender<Result<usize, ApiError>>) {
        let end = Instant::now() + REMEMBERED;
        let outcome = self.run().await;
        let mut failure = outcome.as_ref().err().cloned();
        let mut again = AGAIN.iter();
        // Nobody may wait for it any more.
        let _ = first.send(outcome);
        loop {
            let pause = match &failure {
                Some(error) if Instant::now() + RETRY > end => {
                    tracing::warn!(digest = %self.digest, %error, "a poisoned download may remain");
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
}

impl Shared {
    /// Unfinished downloads of `digest` with their namespaces. References are `layer-sha256:...`, `manifest-...`,
    /// `config-...`, in newer versions with a prefix.
    pub(super) async fn ingests_of(
        &self,
        api: &Api,
        digest: &Digest,
    ) -> Result<Vec<(String, Ingest)>, ApiError> {
        let digest = digest.to_string();
        let mut found = Vec::new();
        for namespace in &self.namespaces {
            let ingests = api.ingests(namespace).await?.into_iter();
            let ingests = ingests.filter(|ingest| ingest.reference.contains(&digest));
            found.extend(ingests.map(|ingest| (namespace.clone(), ingest)));
        }
        Ok(found)
    }
}
