//! Peers with a valid identity that lie. Runtimes get the right bytes or none, and a lie does not outlive its pull.

use std::time::Duration;

use peili_lab::containerd::Options;
use peili_lab::liar::Lie;
use peili_lab::netns::Addresses;
use peili_lab::node::Plan;
use peili_lab::{Containerd, Generation, Image, Liar, Network, Origin, Requirement, wait};

use super::fleet::{Setup, trust};
use super::{NET, NEW, STALL, added};
use crate::Case;
use crate::cluster::REGISTRY;

const PULL: Duration = Duration::from_secs(30);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let needs = [&NET[..], &[Requirement::Containerd(generation)]].concat();
        let name = |what: &str| format!("faults::liars::{what}_{generation:?}").to_lowercase();
        cases.push(Case::new(name("wrong_bytes"), &needs, move || wrong_bytes(generation)));
    }
    for (lie, added) in [
        (Lie::Longer, NEW),
        (Lie::Shorter, NEW),
        (Lie::Endless, NEW),
        (Lie::Nothing, NEW),
        (Lie::Half, NEW),
        (Lie::Slow, STALL),
        (Lie::Bytes, NEW),
    ] {
        let name = format!("faults::liars::{lie:?}").to_lowercase();
        cases.push(Case::new(name, &NET, move || other_lies(lie, added)));
    }
    cases
}

/// containerd keeps what it got and would resume on top of it for ever (its issue 3974): the first pull may fail, the
/// second must not.
async fn wrong_bytes(generation: Generation) {
    let network = Network::new(3, Addresses::V4).unwrap();
    let [node, hostile, last] = &network.nodes[..] else { unreachable!() };
    let origin = Origin::start_at(Some(&last.namespace), &[(last.address(), 80).into()]).unwrap();
    let large = Image::builder("library/large", "v1").layer(24 << 20).layer(6 << 20).build().unwrap();
    let small = Image::builder("library/small", "v1").layers(3, 64 << 10).seed(2).build().unwrap();
    let control =
        Image::builder("library/control", "v1").layer(24 << 20).layer(6 << 20).seed(3).build().unwrap();
    for image in [&large, &small, &control] {
        origin.add(image);
    }
    let liar = Liar::start(&hostile.namespace, hostile.address(), &[&large, &small]).unwrap();
    let containerd = Containerd::start(Options::new(generation).in_namespace(&node.namespace)).await.unwrap();
    let mut plan = Plan::in_namespace("node", "containerd", &node.namespace, node.address())
        .unwrap()
        .with_containerd(&containerd);
    trust(&mut plan, liar.peer_id(), liar.address());
    let peili = plan.start().await.unwrap();
    wait::until("the liar's claims", PULL, async || {
        let status = peili.status().await.ok()?;
        (status["network"]["peers"][0]["holds"].as_u64()? > 6).then_some(())
    })
    .await
    .unwrap();
    containerd.set_hosts(REGISTRY, &origin.url(), &[&peili.registry_url()]).unwrap();
    let control = containerd.cri().pull(&control.reference(REGISTRY), PULL).await.unwrap();
    // It is honest once, so that it is known and connected; not yet suspected, it is asked first.
    let path = format!("/v2/library/small/blobs/{}?ns={REGISTRY}", small.layers[0]);
    wait::until("the liar serves", PULL, async || {
        let answer = peili.fetch(&path).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await
    .unwrap();
    let honest = liar.requests();
    liar.lie(Lie::Bytes);

    // Small content, manifests among it, is verified before the first byte: no pull fails.
    containerd.cri().pull(&small.reference(REGISTRY), PULL).await.unwrap();
    assert!(liar.requests() > honest, "the liar was not asked");

    let first = containerd.cri().pull(&large.reference(REGISTRY), PULL).await;
    println!("{generation}: the first pull: {first:?}");
    let asked = liar.requests();
    let second = containerd.cri().pull(&large.reference(REGISTRY), PULL).await.unwrap();
    println!("{generation}: the second pull: {:?}, the control: {:?}", second.elapsed, control.elapsed);
    assert_eq!(liar.requests(), asked, "the liar was asked again");
    assert!(peili.metric("peili_mirror_discarded_ingests_total", "").await.unwrap() > 0.0);
    let problems = peili.status().await.unwrap()["problems"].to_string();
    assert!(problems.contains("wrong digest") && problems.contains(liar.peer_id()), "{problems}");
}

async fn other_lies(lie: Lie, limit: Duration) {
    let image = Image::builder("library/app", "v1").layer(6 << 20).layers(3, 64 << 10).build().unwrap();
    let mut setup = Setup::new(0, image);
    setup.liar = true;
    let (fleet, liar) = setup.start().await;
    let liar = liar.unwrap();
    let control = fleet.control().await;
    liar.lie(lie);
    let first = fleet.pull().await;
    added(&format!("{lie:?}"), control.elapsed, first.elapsed, limit);
    assert!(first.upstream > 0, "{first:?}");
    let usage = fleet.asker().usage().unwrap();
    assert!(usage.peak_resident < 200 << 20, "{usage:?}");
    let second = fleet.pull().await;
    added(&format!("{lie:?}, again"), control.elapsed, second.elapsed, NEW);
}
