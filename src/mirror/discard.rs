//! Unfinished downloads of the runtime that must not be gone on with. containerd goes on with what it got, elsewhere; if that
//! was wrong, its download can never be completed and stays in the way of all later ones (its issue 3974).

use std::sync::Arc;

use tokio_util::task::TaskTracker;

use super::metrics::Metrics;
use crate::oci::Digest;
use crate::store::Provider;

/// What it takes to discard downloads. Clones share it.
#[derive(Clone)]
pub(crate) struct Discarding {
    pub(crate) store: Arc<dyn Provider>,
    pub(crate) metrics: Metrics,
    /// Owns what goes on after a client has gone.
    pub(crate) tasks: TaskTracker,
}

impl Discarding {
    /// Discards the downloads of `digest`, which are known to be wrong.
    pub(crate) async fn now(&self, digest: &Digest) {
        match self.store.discard_ingests(digest).await {
            Ok(count) => drop(self.metrics.discarded.inc_by(count as u64)),
            Err(error) => tracing::error!(%digest, %error, "cannot discard a poisoned download"),
        }
    }

    /// Discards a download of `digest` that came to a wrong end; tells whether there was one.
    pub(crate) async fn if_stuck(&self, digest: &Digest) -> bool {
        match self.store.discard_stuck(digest).await {
            Ok(is_stuck) => {
                self.metrics.discarded.inc_by(u64::from(is_stuck));
                is_stuck
            }
            Err(error) => {
                tracing::debug!(%digest, %error, "cannot look after an unfinished download");
                false
            }
        }
    }
}
