//! A byte on a holder's disk is wrong: whoever asks it is not the worse for it, and its status names the holder.

use peili_lab::Generation;
use peili_lab::Image;
use serde_json::json;

use super::runtime::needs;
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let case = |generation| {
        let name = format!("faults::corrupt::a_wrong_byte_{generation:?}").to_lowercase();
        Case::new(name, &needs(generation), move || wrong_byte(generation))
    };
    Generation::ALL.map(case).into()
}

async fn wrong_byte(generation: Generation) {
    // The holder whose disk is bad is asked first: it is in the zone of the node that asks.
    let configs = [(0, "near"), (1, "near"), (2, "far")];
    let configs = configs.map(|(node, zone)| (node, json!({"node": {"zone": zone}}))).into();
    let mut cluster = Setup { count: 3, configs, ..Setup::new(generation) }.start().await;
    for node in [0, 2] {
        // Content is read from its files once the content root is there, which a new containerd makes with the first.
        let first = Image::builder("library/first", "v1").layer(4096).seed(node as u64 + 10).build().unwrap();
        cluster.seed(node, &first).await;
        cluster.nodes[node].peili.restart().await.unwrap();
    }
    cluster.connected().await;
    let small = Image::builder("library/small", "v1").layers(2, 1 << 20).build().unwrap();
    let large = Image::builder("library/large", "v1").layers(2, 6 << 20).seed(2).build().unwrap();
    for image in [&small, &large] {
        let upstream = pulled_twice(&cluster, image).await;
        assert_eq!(upstream, 0, "the honest holder was not used for all");
        let problems = cluster.nodes[1].peili.status().await.unwrap()["problems"].to_string();
        let culprit = &cluster.nodes[0].peili.plan.peer_id;
        assert!(problems.contains("wrong digest") && problems.contains(culprit), "{problems}");
        assert!(!problems.contains(&cluster.nodes[2].peili.plan.peer_id), "{problems}");
    }
    // Segments of one content may come from both holders. Which one was wrong cannot be told then, and neither is asked.
    let mixed = Image::builder("library/mixed", "v1").layer(24 << 20).seed(3).build().unwrap();
    let upstream = pulled_twice(&cluster, &mixed).await;
    println!("of two segments and more: {upstream} bytes from upstream");
}

/// The first pull may fail, since what is large is passed on while it comes; the second must not. Layer bytes that the
/// second took from upstream.
async fn pulled_twice(cluster: &Cluster, image: &Image) -> u64 {
    cluster.seed(0, image).await;
    cluster.nodes[2].pull(image).await;
    cluster.shared(2, image).await;
    for layer in &image.layers {
        let path = cluster.nodes[0].containerd.content_root().join("blobs/sha256").join(layer.hex());
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let given = async |node: usize| {
        let status = cluster.nodes[node].peili.status().await.unwrap();
        status["served"]["to_peers"]["bytes"].as_u64().unwrap()
    };
    let before = (given(0).await, given(2).await);
    cluster.origin.reset();
    let reference = image.reference(REGISTRY);
    let first = cluster.nodes[1].containerd.cri().pull(&reference, PULL).await;
    let upstream = cluster.origin.layer_bytes(image);
    println!("{}: the first pull: {first:?}, {upstream} layer bytes from upstream", image.repository);
    cluster.origin.reset();
    cluster.nodes[1].pull(image).await;
    assert!(given(0).await > before.0, "the corrupt holder was not asked");
    let upstream = cluster.origin.layer_bytes(image);
    assert!(given(2).await + upstream >= before.1 + image.layer_bytes(), "nobody else gave it");
    upstream
}
