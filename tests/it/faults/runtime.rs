//! Two nodes with a containerd each, the first of which holds what the second pulls through CRI, a layer at a time.

use std::time::Duration;

use peili_lab::cri::{PullFailed, Pulled};
use peili_lab::{Generation, Image, Requirement, wait};

use super::{NET, When};
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

/// Longest wait for a moment of a pull, and for a view of a store after a restart.
pub(super) const RECONCILED: Duration = Duration::from_secs(30);

/// What the holder and the origin send: 12 MiB take a quarter of a second.
const RATE: u64 = 400_000_000;

/// A registry that is asked without Peili.
const DIRECT: &str = "direct.test";

pub(super) struct Runtime {
    pub(super) cluster: Cluster,
    images: u64,
}

/// What a case needs that pulls through CRI.
pub(super) fn needs(generation: Generation) -> Vec<Requirement> {
    [&NET[..], &[Requirement::Containerd(generation)]].concat()
}

impl Runtime {
    pub(super) async fn start(generation: Generation) -> Self {
        let setup =
            Setup { containerd: |_, options| options.concurrent_downloads = 1, ..Setup::new(generation) };
        let mut cluster = setup.start().await;
        let origin = cluster.origin.url();
        cluster.nodes[1].containerd.set_hosts(DIRECT, &origin, &[]).unwrap();
        for node in [0, 2] {
            cluster.network.set_rate(node, Some(RATE)).unwrap();
        }
        // A containerd that is new has no content root yet, and its content is read by its API until the next
        // reconciliation; a start afterwards finds it at once.
        let first = Image::builder("library/first", "v1").layer(4096).build().unwrap();
        cluster.seed(0, &first).await;
        cluster.nodes[0].peili.restart().await.unwrap();
        cluster.connected().await;
        let mut runtime = Self { cluster, images: 1 };
        // On a busy machine the first handshakes of a debug build may take longer than a peer is given.
        let image = runtime.held(When::Before).await;
        runtime.cluster.nodes[1].pull(&image).await;
        runtime
    }

    /// An image that such a moment can be found in, unlike all others; the origin has it.
    pub(super) fn image(&mut self, when: When) -> Image {
        self.images += 1;
        let image = Image::builder("library/app", &format!("v{}", self.images)).seed(self.images);
        let image = match when {
            When::Before => image.layers(3, 1 << 20),
            When::MidBody => image.layer(12 << 20),
            When::BetweenLayers => image.layers(4, 2 << 20),
        };
        let image = image.build().unwrap();
        self.cluster.origin.add(&image);
        image
    }

    /// An image that the first node holds and the second knows of.
    pub(super) async fn held(&mut self, when: When) -> Image {
        let image = self.image(when);
        self.cluster.seed(0, &image).await;
        image
    }

    /// The time of a pull by the second node's containerd without Peili.
    pub(super) async fn control(&mut self, when: When) -> Duration {
        let image = self.image(when);
        self.cluster.nodes[1].pull_as(&image.reference(DIRECT)).await.elapsed
    }

    /// Pulls on the second node, and strikes at that moment of the pull; both go on beside each other.
    pub(super) async fn struck(
        &mut self,
        when: When,
        image: &Image,
        strike: impl AsyncFnOnce(&mut Cluster),
    ) -> Result<Pulled, PullFailed> {
        let reference = image.reference(REGISTRY);
        let cri = self.cluster.nodes[1].containerd.cri().clone();
        let before = self.cluster.nodes[1].peer_bytes().await;
        let at = async {
            let asker = &self.cluster.nodes[1];
            let is_there = async || match when {
                When::Before => true,
                When::MidBody => asker
                    .peili
                    .metric("peili_mirror_peer_bytes_total", "")
                    .await
                    .is_ok_and(|bytes| bytes >= before as f64 + 3e6),
                When::BetweenLayers => image.layers.iter().any(|layer| asker.containerd.has_blob(layer)),
            };
            wait::until("the moment of the pull", RECONCILED, async || is_there().await.then_some(()))
                .await
                .unwrap();
            strike(&mut self.cluster).await;
        };
        // What strikes before the pull is polled first.
        let ((), pull) = tokio::join!(at, cri.pull(&reference, PULL));
        pull
    }

    /// The second node pulls something new, of which no layer comes from upstream.
    pub(super) async fn still_shares(&mut self) {
        let image = self.held(When::Before).await;
        self.cluster.nodes[1].pull(&image).await;
        assert_eq!(self.cluster.origin.layer_bytes(&image), 0);
    }
}
