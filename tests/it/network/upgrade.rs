//! Six nodes, upgraded one by one to a program that speaks as the next version, and rolled back, while all of them pull.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use peili_lab::node::binary;
use peili_lab::requirements::next_version;
use peili_lab::{Containerd, Image, wait};
use serde_json::Value;

use super::{joined, six};
use crate::cluster::{Cluster, Member, PULL, REGISTRY};

/// Images that are pulled in turns.
const IMAGES: u64 = 12;
/// Between two pulls of a node: six containerds and six programs that are not optimised share the machine.
const PAUSE: Duration = Duration::from_secs(1);
/// A peer that was suspected, as happens on a machine that is so busy, is tried again after 30 s at the latest.
const BELIEVED: Duration = Duration::from_secs(45);
/// Longest end of a node that is asked to end.
const END: Duration = Duration::from_secs(15);

pub(super) async fn upgrade() {
    let Cluster { nodes, origin, network } = six().await;
    let images: Vec<Image> = (0..IMAGES)
        .map(|seed| {
            let image =
                Image::builder(&format!("library/app-{seed}"), "v1").layer(512 << 10).layers(2, 64 << 10);
            image.seed(seed).build().unwrap()
        })
        .collect();
    let across = Image::builder("library/across", "v1").layer(1 << 20).seed(99).build().unwrap();
    let back = Image::builder("library/back", "v1").layer(1 << 20).seed(98).build().unwrap();
    for image in images.iter().chain([&across, &back]) {
        origin.add(image);
    }
    let (containerds, mut peilis): (Vec<Containerd>, Vec<_>) =
        nodes.into_iter().map(|Member { containerd, peili }| (containerd, peili)).unzip();

    let (is_over, pulls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let puller = async |number: usize| {
        let cri = containerds[number].cri();
        for turn in (number..).step_by(5) {
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            let reference = images[turn % images.len()].reference(REGISTRY);
            if let Err(error) = cri.pull(&reference, PULL).await {
                panic!("node {number}, {reference}: {error}");
            }
            cri.remove(&reference).await.unwrap();
            pulls.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(PAUSE).await;
        }
    };
    let (old, next) = (binary().unwrap(), next_version());
    let work = async {
        for (program, first) in [(&next, &across), (&old, &back)] {
            for number in 0..6 {
                let node = &mut peilis[number];
                node.terminate(END).await.unwrap();
                node.plan.set_binary(program.clone());
                node.restart().await.unwrap();
                for node in &peilis {
                    joined(node, 6).await;
                }
                if number == 2 {
                    // Half are of one version and half of the other: what one of either holds, one of the other gets.
                    let versions = versions(&peilis[5].status().await.unwrap());
                    assert_eq!(
                        versions.iter().filter(|version| version.ends_with("+next")).count(),
                        if program == &next { 3 } else { 2 }
                    );
                    containerds[0].cri().pull(&first.reference(REGISTRY), PULL).await.unwrap();
                    let layer = format!("/v2/{}/blobs/{}?ns={REGISTRY}", first.repository, first.layers[0]);
                    for number in [5, 1] {
                        wait::until("it is known there", BELIEVED, async || {
                            let answer = peilis[number].request("HEAD", &layer, &[]).await.ok()?;
                            (answer.status == 200).then_some(())
                        })
                        .await
                        .unwrap();
                    }
                    let before = origin.layer_bytes(first);
                    containerds[5].cri().pull(&first.reference(REGISTRY), PULL).await.unwrap();
                    containerds[1].cri().pull(&first.reference(REGISTRY), PULL).await.unwrap();
                    assert_eq!(origin.layer_bytes(first), before, "another version's content was not used");
                }
            }
        }
        is_over.store(true, Ordering::Relaxed);
    };
    let pullers = futures::future::join_all((0..6).map(&puller));
    futures::future::join(work, pullers).await;
    println!("{} pulls, none failed", pulls.load(Ordering::Relaxed));
    assert!(pulls.load(Ordering::Relaxed) > 30);
    for node in &peilis {
        let log = node.log();
        assert!(!log.contains("what version is it?"), "a node of one version was not understood by another");
        assert!(versions(&node.status().await.unwrap()).iter().all(|version| !version.contains("next")));
    }
    drop((peilis, containerds, origin, network));
}

/// The versions of the other members.
fn versions(status: &Value) -> Vec<String> {
    let peers = status["network"]["peers"].as_array().unwrap();
    peers.iter().map(|peer| peer["version"].as_str().unwrap().to_owned()).collect()
}
