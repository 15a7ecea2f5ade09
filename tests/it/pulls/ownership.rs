//! Who gets what: other namespaces of containerd, repositories that are denied, images that need a password.

use std::process::Command;

use peili_lab::origin::Challenge;
use peili_lab::{Generation, Image};
use serde_json::json;

use super::tags::cause;
use super::{needs, short};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

const SECRET: (&str, &str) = ("user", "password");

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = |what: &str| format!("pulls::{what}::{}", short(generation));
        let needs = needs(generation);
        cases.push(Case::new(name("denied_repositories"), &needs, move || denied(generation)));
        cases.push(Case::new(name("private_images"), &needs, move || private(generation)));
    }
    cases.push(Case::new("pulls::another_namespace", &needs(Generation::V2), another_namespace));
    cases
}

/// A layer is served if one repository that its holder knows it under may be, and because of no name in a request.
async fn denied(generation: Generation) {
    let config = json!({"trust": {"deny": [format!("{REGISTRY}/denied/**")]}});
    let setup = Setup { configs: vec![(0, config)], ..Setup::new(generation) };
    let cluster = setup.start().await;
    // The first layer is the same, of the same seed, size and place; the second differs in size.
    let open = Image::builder("open/app", "v1").layer(1 << 20).layer(4096).build().unwrap();
    let denied = Image::builder("denied/team/app", "v1").layer(1 << 20).layer(2 << 20).build().unwrap();
    assert_eq!(open.layers[0], denied.layers[0]);
    cluster.seed(0, &open).await;
    cluster.seed(0, &denied).await;

    let [_, second] = &cluster.nodes[..] else { unreachable!("there are two nodes") };
    // The name of an open repository opens nothing.
    for (kind, digest) in [("blobs", denied.layers[1]), ("manifests", denied.root)] {
        let path = format!("/v2/open/app/{kind}/{digest}?ns={REGISTRY}");
        assert_eq!(second.peili.fetch(&path).await.unwrap().status, 404);
    }
    second.pull(&denied).await;
    let counts = cluster.origin.counts();
    let bytes = |digest| counts.bytes_by_digest.get(digest).copied().unwrap_or(0);
    assert_eq!(bytes(&denied.layers[0]), 0, "shared with an open repository");
    assert_eq!(bytes(&denied.layers[1]), 2 << 20, "of the denied one only");
    assert!(bytes(&denied.root) > 0);
    second.pull(&open).await;
    assert_eq!(cluster.origin.counts().bytes_by_digest.get(&open.layers[1]), None);
}

/// Only the registry gives manifests of private images, so that it checks the pod's password; layers come from peers.
async fn private(generation: Generation) {
    let config = json!({"mirror": {"private": [format!("{REGISTRY}/private/**")]}});
    let cluster = Setup { config, ..Setup::new(generation) }.start().await;
    let image = Image::builder("private/app", "v1").layer(1 << 20).layer(4096).build().unwrap();
    cluster.origin.add(&image);
    cluster.origin.set_password(&image.repository, SECRET.0, SECRET.1, Challenge::Basic);
    let (tag, digest) = (image.reference(REGISTRY), image.digest_reference(REGISTRY));
    let [first, second] = &cluster.nodes[..] else { unreachable!("there are two nodes") };
    first.containerd.cri().pull_with(&tag, Some(SECRET), PULL).await.unwrap();
    let listed = image.layers.iter().map(|layer| (layer, image.repository.as_str()));
    for (layer, repository) in listed {
        let path = format!("/v2/{repository}/blobs/{layer}?ns={REGISTRY}");
        peili_lab::wait::until("the layer listed", PULL, async || {
            (first.peili.request("HEAD", &path, &[]).await.ok()?.status == 200).then_some(())
        })
        .await
        .unwrap();
    }
    cluster.settled().await;
    cluster.origin.reset();

    let without_password = async || {
        for reference in [&tag, &digest] {
            let result = second.containerd.cri().pull(reference, PULL).await;
            assert!(result.is_err(), "{reference} without the password");
        }
        for member in &cluster.nodes {
            for repository in [&image.repository[..], "open/other"] {
                let path = format!("/v2/{repository}/manifests/{}?ns={REGISTRY}", image.root);
                let answer = member.peili.fetch(&path).await.unwrap();
                assert_eq!(answer.status, 404, "{repository} at {}", member.peili.plan.name);
            }
            let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
            assert_eq!(cause(&member.peili.fetch(&path).await.unwrap()), "private");
            // A manifest is content too.
            let path = format!("/v2/{}/blobs/{}?ns={REGISTRY}", image.repository, image.root);
            let answer = member.peili.fetch(&path).await.unwrap();
            assert_eq!(answer.status, 404, "the manifest as a blob at {}", member.peili.plan.name);
        }
    };
    without_password().await;
    let counts = cluster.origin.counts();
    assert_eq!((counts.manifest_bytes, cluster.origin.layer_bytes(&image)), (0, 0));

    second.containerd.cri().pull_with(&tag, Some(SECRET), PULL).await.unwrap();
    assert_eq!(cluster.origin.layer_bytes(&image), 0);
    assert!(cluster.origin.counts().manifest_bytes > 0, "the registry gave the manifest");
    assert!(second.peer_bytes().await >= image.layer_bytes());
    // That the node has it now changes nothing for a pod without the password.
    without_password().await;
}

/// Blob files are shared by all namespaces of containerd; what only others list is not served.
async fn another_namespace() {
    let cluster = Setup::new(Generation::V2).start().await;
    let other = Image::builder("library/other", "v1").layer(1 << 20).build().unwrap();
    let own = Image::builder("library/own", "v1").layer(1 << 20).seed(2).build().unwrap();
    cluster.origin.add(&other);
    fetch(&cluster, 0, "other", &other);
    // After this one is known, so would the other be.
    cluster.seed(0, &own).await;
    assert!(cluster.nodes[0].containerd.has_blob(&other.layers[0]));
    for member in &cluster.nodes {
        for digest in [&other.layers[0], &other.root, &other.configs[0]] {
            let path = format!("/v2/library/other/blobs/{digest}?ns={REGISTRY}");
            assert_eq!(member.peili.request("HEAD", &path, &[]).await.unwrap().status, 404);
        }
    }
    cluster.nodes[1].pull(&other).await;
    assert_eq!(cluster.origin.layer_bytes(&other), other.layer_bytes());
}

/// Fetches an image or artifact with containerd's own `ctr`, into a namespace of containerd.
pub(super) fn fetch(cluster: &Cluster, node: usize, namespace: &str, image: &Image) {
    let containerd = &cluster.nodes[node].containerd;
    let binary = containerd.generation().binary().unwrap();
    let mut command = Command::new(binary.with_file_name("ctr"));
    command.arg("--address").arg(containerd.socket()).args(["--namespace", namespace, "content", "fetch"]);
    command.arg("--hosts-dir").arg(containerd.hosts_dir()).arg(image.reference(REGISTRY));
    let output = cluster.network.nodes[node].namespace.run(move || command.output()).unwrap().unwrap();
    assert!(output.status.success(), "{output:?}");
}
