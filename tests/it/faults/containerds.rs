//! containerd absent, killed, restarted and hung, under the `peili` of the node that asks and of the one that holds.

use std::time::Duration;

use peili_lab::containerd::Options;
use peili_lab::netns::Addresses;
use peili_lab::node::Plan;
use peili_lab::{Containerd, Generation, Image, Network, Requirement, wait};

use super::{NET, NEW, SUSPECTED, added};
use crate::Case;
use crate::cluster::{Cluster, REGISTRY, Setup};

/// The view of a store is right this long after containerd is back.
const RECONCILED: Duration = Duration::from_secs(30);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in [Generation::V1_7, Generation::V2] {
        let needs = [&NET[..], &[Requirement::Containerd(generation)]].concat();
        let name = |what: &str| format!("faults::containerds::{what}_{generation:?}").to_lowercase();
        cases.push(Case::new(name("absent_at_the_start"), &needs, move || absent(generation)));
        cases.push(Case::new(name("dies_and_hangs_under_the_holder"), &needs, move || holder(generation)));
        cases.push(Case::new(name("dies_and_hangs_under_the_asker"), &needs, move || asker(generation)));
    }
    cases
}

fn image(seed: u64) -> Image {
    Image::builder("library/app", &format!("v{seed}")).layers(3, 1 << 20).seed(seed).build().unwrap()
}

async fn absent(generation: Generation) {
    let network = Network::new(1, Addresses::V4).unwrap();
    let namespace = &network.nodes[0].namespace;
    let mut containerd = Containerd::start(Options::new(generation).in_namespace(namespace)).await.unwrap();
    containerd.kill();
    std::fs::remove_file(containerd.socket()).unwrap();
    let plan = Plan::in_namespace("node", "containerd", namespace, network.nodes[0].address());
    let mut peili = plan.unwrap().with_containerd(&containerd).launch().unwrap();
    wait::until("alive", RECONCILED, async || {
        peili.admin("/livez").await.is_ok_and(|answer| answer.status == 200).then_some(())
    })
    .await
    .unwrap();
    // Alive, and quick to say "not here".
    let digest = image(1).layers[0];
    let began = std::time::Instant::now();
    let answer = peili.fetch(&format!("/v2/library/app/blobs/{digest}?ns={REGISTRY}")).await.unwrap();
    assert_eq!(answer.status, 404);
    added("a request without containerd", Duration::ZERO, began.elapsed(), SUSPECTED);
    let problems = peili.status().await.unwrap()["problems"].to_string();
    assert!(problems.contains("containerd") || problems.contains("store"), "{problems}");
    containerd.restart().await.unwrap();
    wait::until("containerd is followed", RECONCILED, async || {
        let problems = peili.status().await.ok()?["problems"].to_string();
        (!problems.contains("store")).then_some(())
    })
    .await
    .unwrap();
    peili.ready(RECONCILED).await.unwrap();
}

/// Content is read from its files, so that a holder serves on while its containerd is away.
async fn holder(generation: Generation) {
    let mut cluster = Setup::new(generation).start().await;
    let images: Vec<_> = (1..=4).map(image).collect();
    for image in &images {
        cluster.seed(0, image).await;
    }
    // A containerd that is new has no content root yet, and its content is read by its API until the next
    // reconciliation; a start afterwards finds it at once.
    cluster.nodes[0].peili.restart().await.unwrap();
    known(&cluster, &images).await;
    warm(&cluster, &images[0]).await;
    let control = cluster.nodes[1].pull(&images[0]).await.elapsed;
    assert_eq!(cluster.origin.layer_bytes(&images[0]), 0);

    cluster.nodes[0].containerd.process().unwrap().pause().unwrap();
    let stopped = cluster.nodes[1].pull(&images[1]).await.elapsed;
    added("the holder's containerd hangs", control, stopped, NEW);
    cluster.nodes[0].containerd.process().unwrap().resume().unwrap();

    cluster.nodes[0].containerd.kill();
    let killed = cluster.nodes[1].pull(&images[2]).await.elapsed;
    added("the holder's containerd is killed", control, killed, NEW);

    cluster.nodes[0].containerd.restart().await.unwrap();
    cluster.nodes[0].peili.ready(RECONCILED).await.unwrap();
    let restarted = cluster.nodes[1].pull(&images[3]).await.elapsed;
    added("the holder's containerd is back", control, restarted, NEW);
    for image in &images {
        println!("{}: {} bytes from upstream", image.tag, cluster.origin.layer_bytes(image));
    }
    assert_eq!(images.iter().map(|image| cluster.origin.layer_bytes(image)).sum::<u64>(), 0);
    // What is new after the restart is seen.
    let new = image(5);
    cluster.seed(0, &new).await;
    known(&cluster, &[&images[..], std::slice::from_ref(&new)].concat()).await;
    cluster.nodes[1].pull(&new).await;
    assert_eq!(cluster.origin.layer_bytes(&new), 0);
}

/// Waits until the node that asks knows that all of this is held.
async fn known(cluster: &Cluster, images: &[Image]) {
    let blobs: usize = images.iter().map(|image| image.blobs.len()).sum();
    wait::until("the asker knows what is held", RECONCILED, async || {
        let status = cluster.nodes[1].peili.status().await.ok()?;
        (status["network"]["peers"][0]["holds"].as_u64()? >= blobs as u64).then_some(())
    })
    .await
    .unwrap();
}

fn layer(image: &Image, index: usize) -> String {
    format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[index])
}

/// Waits until the holder serves the asker: on a busy machine the first handshakes of a debug build may take longer
/// than a peer is given.
async fn warm(cluster: &Cluster, image: &Image) {
    wait::until("the holder serves", RECONCILED, async || {
        let answer = cluster.nodes[1].peili.fetch(&layer(image, 0)).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await
    .unwrap();
}

async fn asker(generation: Generation) {
    let mut cluster = Setup::new(generation).start().await;
    let images: Vec<_> = (1..=2).map(image).collect();
    for image in &images {
        cluster.seed(0, image).await;
    }
    warm(&cluster, &images[0]).await;
    let fetch = async |cluster: &Cluster, image: &Image| {
        let began = std::time::Instant::now();
        let answer = cluster.nodes[1].peili.fetch(&layer(image, 0)).await.unwrap();
        assert_eq!((answer.status, answer.body.len() as u64), (200, image.blobs[&image.layers[0]].size));
        began.elapsed()
    };
    fetch(&cluster, &images[0]).await;
    let control = fetch(&cluster, &images[0]).await;
    cluster.nodes[1].containerd.process().unwrap().pause().unwrap();
    added("the asker's containerd hangs", control, fetch(&cluster, &images[0]).await, NEW);
    cluster.nodes[1].containerd.process().unwrap().resume().unwrap();
    cluster.nodes[1].containerd.kill();
    added("the asker's containerd is killed", control, fetch(&cluster, &images[0]).await, NEW);
    cluster.nodes[1].containerd.restart().await.unwrap();
    cluster.nodes[1].peili.ready(RECONCILED).await.unwrap();
    cluster.nodes[1].pull(&images[1]).await;
    assert_eq!(cluster.origin.layer_bytes(&images[1]), 0);
}
