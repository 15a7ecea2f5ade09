//! containerd absent, killed, restarted and hung, under the `peili` of the node that asks and of the one that holds.

use std::time::{Duration, Instant};

use peili_lab::{Generation, wait};

use super::runtime::{RECONCILED, Runtime, needs};
use super::{NEW, SUSPECTED, Slow, When, added, timed};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY};

/// How long a containerd hangs.
const HANG: Duration = Duration::from_secs(3);

/// What happens to a containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Stopped,
    Killed,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = |what: &str| format!("faults::containerds::{what}_{generation:?}").to_lowercase();
        cases.push(timed(name("absent"), &needs(generation), move || absent(generation)));
        cases.push(timed(name("under_the_holder"), &needs(generation), move || holder(generation)));
        cases.push(timed(name("under_the_asker"), &needs(generation), move || asker(generation)));
    }
    cases
}

impl Fault {
    fn strike(self, cluster: &mut Cluster, node: usize) {
        let containerd = &mut cluster.nodes[node].containerd;
        match self {
            Self::Stopped => containerd.process().unwrap().pause().unwrap(),
            Self::Killed => containerd.kill(),
        }
    }

    async fn heal(self, cluster: &mut Cluster, node: usize) {
        let member = &mut cluster.nodes[node];
        match self {
            Self::Stopped => member.containerd.process().unwrap().resume().unwrap(),
            Self::Killed => member.containerd.restart().await.unwrap(),
        }
        member.peili.ready(RECONCILED).await.unwrap();
    }
}

/// Holder and asker come up without a containerd: they live, say so and are quick to say "not here".
async fn absent(generation: Generation) -> Result<(), Slow> {
    let mut runtime = Runtime::start(generation).await;
    let image = runtime.held(When::Before).await;
    let control = runtime.control(When::Before).await;
    for node in [0, 1] {
        let member = &mut runtime.cluster.nodes[node];
        member.containerd.kill();
        std::fs::remove_file(member.containerd.socket()).unwrap();
        member.peili.relaunch().unwrap();
        wait::until("alive", RECONCILED, async || {
            member.peili.admin("/livez").await.is_ok_and(|answer| answer.status == 200).then_some(())
        })
        .await
        .unwrap();
        assert_eq!(member.peili.admin("/readyz").await.unwrap().status, 503);
        let began = Instant::now();
        let path = format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]);
        assert_eq!(member.peili.fetch(&path).await.unwrap().status, 404);
        added("a request without containerd", Duration::ZERO, began.elapsed(), SUSPECTED)?;
        let problems = member.peili.status().await.unwrap()["problems"].to_string();
        assert!(problems.contains("store"), "{problems}");
        if node == 0 {
            // The holder has nothing to give, and the pull of the other node goes upstream.
            let pull = runtime.cluster.nodes[1].pull(&image).await;
            added("the holder's containerd is absent", control, pull.elapsed, NEW)?;
            assert_eq!(runtime.cluster.origin.layer_bytes(&image), image.layer_bytes());
        }
    }
    for node in [0, 1] {
        Fault::Killed.heal(&mut runtime.cluster, node).await;
        let problems = runtime.cluster.nodes[node].peili.status().await.unwrap()["problems"].to_string();
        assert!(!problems.contains("store"), "{problems}");
    }
    runtime.cluster.connected().await;
    runtime.still_shares().await;
    Ok(())
}

/// Content is read from its files, so that a holder serves on while its containerd is away.
async fn holder(generation: Generation) -> Result<(), Slow> {
    let mut runtime = Runtime::start(generation).await;
    for when in When::ALL {
        let control = runtime.control(when).await;
        for fault in [Fault::Stopped, Fault::Killed] {
            let image = runtime.held(when).await;
            let pull =
                runtime.struck(when, &image, async |cluster: &mut Cluster| fault.strike(cluster, 0)).await;
            let pull = pull.unwrap();
            assert_eq!(runtime.cluster.origin.layer_bytes(&image), 0);
            added(&format!("the holder's containerd, {fault:?} {when:?}"), control, pull.elapsed, NEW)?;
            fault.heal(&mut runtime.cluster, 0).await;
        }
    }
    // What is new after the restart is seen.
    runtime.still_shares().await;
    Ok(())
}

async fn asker(generation: Generation) -> Result<(), Slow> {
    let mut runtime = Runtime::start(generation).await;
    for fault in [Fault::Stopped, Fault::Killed] {
        fetched_without(&mut runtime, fault).await?;
    }
    for when in [When::MidBody, When::BetweenLayers] {
        let control = runtime.control(when).await;
        let image = runtime.held(when).await;
        let strike = async |cluster: &mut Cluster| {
            Fault::Stopped.strike(cluster, 1);
            tokio::time::sleep(HANG).await;
            cluster.nodes[1].containerd.process().unwrap().resume().unwrap();
        };
        let pull = runtime.struck(when, &image, strike).await.unwrap();
        assert_eq!(runtime.cluster.origin.layer_bytes(&image), 0);
        added(&format!("the asker's containerd, stopped {when:?}"), control + HANG, pull.elapsed, NEW)?;

        let image = runtime.held(when).await;
        let strike = async |cluster: &mut Cluster| Fault::Killed.strike(cluster, 1);
        let pull = runtime.struck(when, &image, strike).await;
        assert!(pull.is_err(), "{pull:?}");
        Fault::Killed.heal(&mut runtime.cluster, 1).await;
        let again = runtime.cluster.nodes[1].pull(&image).await;
        assert_eq!(runtime.cluster.origin.layer_bytes(&image), 0);
        added(&format!("the asker's containerd, killed {when:?}, again"), control, again.elapsed, NEW)?;
    }
    runtime.still_shares().await;
    Ok(())
}

/// While its containerd is away the asker answers as ever: what it asks of peers has nothing to do with its own store.
async fn fetched_without(runtime: &mut Runtime, fault: Fault) -> Result<(), Slow> {
    let image = runtime.held(When::Before).await;
    let fetch = async |cluster: &Cluster| {
        let began = Instant::now();
        let path = format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]);
        let answer = cluster.nodes[1].peili.fetch(&path).await.unwrap();
        assert_eq!((answer.status, answer.body.len() as u64), (200, image.blobs[&image.layers[0]].size));
        began.elapsed()
    };
    fetch(&runtime.cluster).await;
    let control = fetch(&runtime.cluster).await;
    fault.strike(&mut runtime.cluster, 1);
    let fetched = fetch(&runtime.cluster).await;
    fault.heal(&mut runtime.cluster, 1).await;
    added(&format!("the asker's containerd, {fault:?} before"), control, fetched, NEW)?;
    let pull = runtime.cluster.nodes[1].containerd.cri().pull(&image.reference(REGISTRY), PULL).await;
    pull.unwrap();
    assert_eq!(runtime.cluster.origin.layer_bytes(&image), 0);
    Ok(())
}
