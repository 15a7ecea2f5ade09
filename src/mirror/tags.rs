//! What a tag means, asked of trusted peers. Only used where upstream cannot be asked, or policy says so: a tag is a
//! name that its registry may change at any time, and only the registry checks the pod's right to it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::seq::IndexedRandom;

use super::metrics::TagAnswer;
use super::{NotHere, Shared};
use crate::oci::{Action, Descriptor, Name, Reference, Tag};

/// Peers asked about one tag at once: enough that one stale node is outvoted, few enough for a large cluster.
const ASKED: usize = 8;
/// How long peers may take; those that are silent have no say.
const LIMIT: Duration = Duration::from_millis(250);

impl Shared {
    /// The descriptor of a tag, if this node is the one to answer.
    pub(super) async fn tag(&self, name: &Name, tag: &Tag) -> Result<Descriptor, NotHere> {
        let peers_first = self.rules.load().is_peers_first(name);
        if !peers_first && self.upstream.answers(&name.registry).await {
            self.metrics.tag(TagAnswer::Upstream);
            return Err(NotHere::TagUpstream);
        }
        let reference = Reference::tagged(name.clone(), tag.clone());
        let mut answers: Vec<Descriptor> = self.store.resolve(&reference).into_iter().collect();
        answers.extend(self.ask(&reference).await);
        let Some(first) = answers.first() else {
            self.metrics.tag(TagAnswer::Unknown);
            return Err(NotHere::Unknown);
        };
        if answers.iter().any(|answer| answer.digest != first.digest) {
            self.metrics.tag(TagAnswer::Disputed);
            let digests: Vec<_> = answers.iter().map(|answer| answer.digest).collect();
            tracing::warn!(image = %reference, ?digests, "nodes disagree about a tag; it is refused");
            return Err(NotHere::TagDisputed);
        }
        self.metrics.tag(TagAnswer::Known);
        Ok(answers.swap_remove(0))
    }

    async fn ask(&self, reference: &Reference) -> Vec<Descriptor> {
        let mut peers = self.fetcher.network.tag_peers();
        peers.retain(|peer| self.gate.allows(&peer.id, Action::Tags));
        let asked: Vec<_> = peers.sample(&mut rand::rng(), ASKED).map(Arc::clone).collect();
        let mut answers: FuturesUnordered<_> =
            asked.iter().map(|peer| self.fetcher.network.resolve(&peer.id, reference, LIMIT)).collect();
        let mut known = Vec::new();
        while let Some(answer) = answers.next().await {
            known.extend(answer.ok().flatten());
        }
        known
    }
}
