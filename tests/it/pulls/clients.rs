//! Clients that send no `ns` and name the registry in the path, as CRI-O, Podman and BuildKit do: skopeo, which shares
//! their library.

use std::process::Command;

use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Image, Requirement};
use serde_json::json;

use super::needs;
use crate::Case;
use crate::cluster::{Cluster, REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let needs = [&needs(Generation::V1_7)[..], &[Requirement::Skopeo]].concat();
    vec![Case::new("pulls::clients::skopeo", &needs, skopeo)]
}

async fn skopeo() {
    // There is no other host that such a client would ask for the tag.
    let config = json!({"mirror": {"tags-peers-first": ["**"]}});
    let cluster = Setup { config, ..Setup::new(Generation::V1_7) }.start().await;
    let image = Image::builder("library/app", "v1").layer(6 << 20).layer(4096).build().unwrap();
    cluster.seed(0, &image).await;
    for name in [format!(":{}", image.tag), format!("@{}", image.root)] {
        let copied = copy(&cluster, &format!("127.0.0.1:5000/{REGISTRY}/{}{name}", image.repository));
        let folder = copied.unwrap_or_else(|error| panic!("{name}: {error}"));
        for (digest, blob) in &image.blobs {
            let path = folder.path().join("image/blobs").join(digest.algorithm().as_str()).join(digest.hex());
            assert_eq!(std::fs::read(path).unwrap(), blob.read().unwrap());
        }
    }
    assert!(cluster.nodes[1].peer_bytes().await >= image.layer_bytes());
    assert_eq!(cluster.origin.requests(), []);
    // What is not here is "not here" in words that it understands.
    let unknown = copy(&cluster, &format!("127.0.0.1:5000/{REGISTRY}/library/unknown:v1"));
    let error = unknown.map(drop).unwrap_err();
    assert!(error.contains("manifest unknown"), "{error}");
}

/// Copies an image into a layout on the second node.
fn copy(cluster: &Cluster, reference: &str) -> Result<Scratch, String> {
    let folder = Scratch::new().unwrap();
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "--preserve-digests"]);
    command
        .arg(format!("docker://{reference}"))
        .arg(format!("oci:{}:v1", folder.path().join("image").display()));
    let output = cluster.network.nodes[1].namespace.run(move || command.output()).unwrap().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(folder) } else { Err(error.into_owned()) }
}
