//! Peers with a valid identity that lie. Runtimes get the right bytes or none, and a lie does not outlive its pull.

use std::time::Duration;

use peili_lab::containerd::Options;
use peili_lab::liar::Lie;
use peili_lab::netns::Addresses;
use peili_lab::node::Plan;
use peili_lab::{Containerd, Generation, Image, Liar, Network, Origin, Requirement, wait};

use super::fleet::{Setup, trust};
use super::{NET, NEW, STALL, SUSPECTED, Slow, When, added, timed};
use crate::Case;
use crate::cluster::REGISTRY;

/// Until a kubelet tries a failed pull again.
const SOON: Duration = Duration::from_secs(10);
const PULL: Duration = Duration::from_secs(30);

const LIES: [Lie; 10] = [
    Lie::Bytes,
    Lie::Longer,
    Lie::Shorter,
    Lie::Endless,
    Lie::Slow,
    Lie::Nothing,
    Lie::Half,
    Lie::HalfWrong,
    Lie::BytesAfter(12 << 20),
    Lie::Hang,
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let needs = [&NET[..], &[Requirement::Containerd(generation)]].concat();
        for lie in [Lie::Bytes, Lie::HalfWrong] {
            let name = format!("faults::liars::runtime_{lie:?}_{generation:?}").to_lowercase();
            cases.push(Case::new(name, &needs, move || runtime(generation, lie, None)));
        }
    }
    // What is discarded is chosen by the time at which it was begun.
    let needs = [&NET[..], &[Requirement::Containerd(Generation::V2), Requirement::Faketime]].concat();
    for (name, clock) in [("behind", "-1h"), ("ahead", "+1h")] {
        let name = format!("faults::liars::runtime_bytes_clock_{name}");
        cases.push(Case::new(name, &needs, move || runtime(Generation::V2, Lie::Bytes, Some(clock))));
    }
    for lie in LIES {
        for when in When::ALL {
            // Only what is large has such an offset, or is passed on before it is verified.
            if !matches!(lie, Lie::BytesAfter(_) | Lie::HalfWrong) || when == When::MidBody {
                let lie_name = format!("{lie:?}");
                let lie_name = lie_name.split('(').next().unwrap_or_default();
                let name = format!("faults::liars::{lie_name}_{when:?}").to_lowercase();
                // Its second pull has 50 ms, too few beside others.
                cases.push(timed(name, &NET, move || lies(lie, when)).alone());
            }
        }
    }
    cases
}

/// containerd keeps what it got and would resume on top of it for ever (its issue 3974): the first pull may fail, the
/// second must not.
async fn runtime(generation: Generation, lie: Lie, clock: Option<&str>) {
    let network = Network::new(3, Addresses::V4).unwrap();
    let [node, hostile, last] = &network.nodes[..] else { unreachable!() };
    let origin = Origin::start_at(Some(&last.namespace), &[(last.address(), 80).into()]).unwrap();
    let large = Image::builder("library/large", "v1").layer(16 << 20).layer(6 << 20).build().unwrap();
    let small = Image::builder("library/small", "v1").layers(3, 64 << 10).seed(2).build().unwrap();
    let control =
        Image::builder("library/control", "v1").layer(16 << 20).layer(6 << 20).seed(3).build().unwrap();
    for image in [&large, &small, &control] {
        origin.add(image);
    }
    let liar = Liar::start(&hostile.namespace, hostile.address(), &[&large, &small]).unwrap();
    let containerd = Containerd::start(Options::new(generation).in_namespace(&node.namespace)).await.unwrap();
    let mut plan = Plan::in_namespace("node", "containerd", &node.namespace, node.address())
        .unwrap()
        .with_containerd(&containerd);
    trust(&mut plan, liar.peer_id(), liar.address());
    if clock.is_some() {
        plan.let_clock_jump().unwrap();
    }
    let peili = plan.start().await.unwrap();
    if let Some(offset) = clock {
        peili.set_clock(offset).unwrap();
    }
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
    // Who lies about small content, which is verified first, is not asked for what is streamed.
    let true_bytes = if lie == Lie::Bytes { 1 << 20 } else { 0 };
    liar.lie(if lie == Lie::Bytes { Lie::BytesAfter(true_bytes) } else { lie });
    let first = containerd.cri().pull(&large.reference(REGISTRY), PULL).await;
    println!("{generation}, {lie:?}: the first pull: {first:?}");
    assert!(liar.requests() > honest, "the liar was not asked");
    let pull = async || {
        origin.reset();
        containerd.cri().pull(&large.reference(REGISTRY), PULL).await
    };
    let before = peili.metric("peili_mirror_peer_bytes_total", "").await.unwrap();
    let second = if lie == Lie::HalfWrong {
        // Nobody saw that the bytes were wrong. It shows when the runtime's own end of it has failed, and a kubelet tries
        // again after 10 s.
        wait::until("a pull after the lie", SOON, async || pull().await.ok()).await.unwrap()
    } else {
        pull().await.unwrap()
    };
    println!(
        "{generation}, {lie:?}: the second pull: {:?}, the control: {:?}",
        second.elapsed, control.elapsed
    );
    // Nothing is resumed on top of what the liar gave, but where that ended before its first lie.
    for request in origin.requests().iter().filter(|request| request.path.contains("/blobs/")) {
        let start = request.range.as_deref().unwrap_or("bytes=0-");
        let start = start.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        let is_true =
            start.and_then(|start| start.parse::<u64>().ok()).is_some_and(|start| start <= true_bytes);
        assert!(is_true, "{request:?}");
    }
    let status = peili.status().await.unwrap();
    if lie == Lie::Bytes {
        assert!(peili.metric("peili_mirror_discarded_ingests_total", "").await.unwrap() > 0.0);
        // What is streamed comes from the liar no more; small content is verified first, and no pull fails.
        let taken = peili.metric("peili_mirror_peer_bytes_total", "").await.unwrap() - before;
        assert!(taken < f64::from(1 << 20), "{taken} bytes");
        liar.lie(Lie::Bytes);
        containerd.cri().pull(&small.reference(REGISTRY), PULL).await.unwrap();
        let problems = status["problems"].to_string();
        assert!(problems.contains("wrong digest") && problems.contains(liar.peer_id()), "{problems}");
    } else {
        // Whether its bytes were wrong was never seen; it is suspected for a while, since its bodies broke.
        assert!(status["causes"].to_string().contains("peers-failed"), "{status}");
    }
}

async fn lies(lie: Lie, when: When) -> Result<(), Slow> {
    let mut setup = Setup::at(when, 0);
    setup.liar = true;
    let (mut fleet, liar) = setup.start().await;
    let liar = liar.unwrap();
    let control = fleet.control().await;
    let first = fleet.struck(when, async |_| liar.lie(lie)).await;
    println!("{lie:?} {when:?}: {first:?}");
    assert!(first.upstream > 0, "{first:?}");
    fleet.says(&[liar.peer_id(), "peers-failed"]).await;
    let usage = fleet.asker().usage().unwrap();
    assert!(usage.peak_resident < 200 << 20, "{usage:?}");
    let limit = match lie {
        // What came of a large layer is of no use: it is begun again.
        Lie::Bytes | Lie::HalfWrong | Lie::BytesAfter(_) if when == When::MidBody => control + NEW,
        // Its first byte comes in time, and is followed by few.
        Lie::Slow => STALL,
        Lie::Hang if when != When::Before => STALL,
        _ => NEW,
    };
    added(&format!("{lie:?} {when:?}"), control, first.elapsed, limit)?;
    let second = fleet.pull().await;
    // Who lies about a content is left out for that one: of those that came before the first lie it lies now.
    let limit = if when == When::BetweenLayers { NEW } else { SUSPECTED };
    added(&format!("{lie:?} {when:?}, again"), control, second.elapsed, limit)
}
