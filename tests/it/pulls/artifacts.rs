//! What CRI cannot pull: Helm charts, cosign's signatures and WebAssembly modules, by containerd's `ctr`.

use peili_lab::{Generation, Image};

use super::ownership::fetch;
use super::{needs, nothing_went_wrong, only_the_tag_from, short};
use crate::Case;
use crate::cluster::{REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let case = |generation| {
        let name = format!("pulls::artifacts::{}", short(generation));
        Case::new(name, &needs(generation), move || artifacts(generation))
    };
    Generation::ALL.map(case).into()
}

async fn artifacts(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let image = Image::builder("library/app", "v1").layer(4096).build().unwrap();
    let signature = Image::cosign_signature(&image);
    for artifact in [Image::helm_chart("charts/app", "1.2.3"), signature, Image::wasm("modules/app", "v1")] {
        cluster.origin.add(&artifact);
        fetch(&cluster, 0, "k8s.io", &artifact);
        cluster.shared(0, &artifact).await;
        cluster.origin.reset();
        fetch(&cluster, 1, "k8s.io", &artifact);
        only_the_tag_from(&cluster.origin, &artifact);
        assert!(artifact.blobs.keys().all(|digest| cluster.nodes[1].containerd.has_blob(digest)));
        // The media types are the artifact's own.
        let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", artifact.repository, artifact.root);
        let answer = cluster.nodes[1].peili.fetch(&path).await.unwrap();
        assert_eq!(answer.header("content-type"), Some(&*artifact.blobs[&artifact.root].media_type));
        for digest in artifact.layers.iter().chain(&artifact.configs) {
            let path = format!("/v2/{}/blobs/{digest}?ns={REGISTRY}", artifact.repository);
            let answer = cluster.nodes[1].peili.request("HEAD", &path, &[]).await.unwrap();
            assert_eq!(answer.header("content-type"), Some(&*artifact.blobs[digest].media_type));
        }
    }
    nothing_went_wrong(&cluster).await;
}
