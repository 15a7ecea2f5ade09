//! This node's own `peili`, and its holder's: killed, hung and told to end, at every moment of a pull.

use std::time::{Duration, Instant};

use peili_lab::{Generation, Image};
use rustix::process::Signal;
use serde_json::json;

use super::fleet::{Fleet, Setup};
use super::runtime::{Runtime, needs};
use super::{NET, NEW, Slow, When, added, timed};
use crate::Case;
use crate::cluster::Cluster;

const END: Duration = Duration::from_secs(20);

/// After so long a liveness probe ends a process that hangs.
const PROBE: Duration = Duration::from_secs(2);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for when in When::ALL {
        let name = |what: &str| format!("faults::processes::asker_{what}_{when:?}").to_lowercase();
        cases.push(timed(name("killed"), &NET, move || killed(when)));
        cases.push(timed(name("terminated"), &NET, move || terminated(when)));
    }
    for node in [0, 1] {
        let name = ["asker", "holder"][node];
        let name = format!("faults::processes::{name}_drains_for_no_longer_than_its_limit");
        cases.push(timed(name, &NET, move || drain_limit(node)));
    }
    for generation in Generation::ALL {
        let name = format!("faults::processes::asker_stopped_{generation:?}").to_lowercase();
        // Beside a cluster 300 ms are too few.
        cases.push(timed(name, &needs(generation), move || stopped(generation)).alone());
    }
    cases
}

async fn signalled(when: When, signal: Signal) -> Result<Fleet, Slow> {
    let (mut fleet, _) = Setup::at(when, 1).start().await;
    let control = fleet.control().await;
    let strike = async |fleet: &mut Fleet| fleet.asker().process().unwrap().signal(signal).unwrap();
    let pull = fleet.struck(when, strike).await;
    println!("{signal:?} {when:?}: {pull:?}");
    match when {
        When::MidBody if signal == Signal::TERM => {
            assert_eq!((pull.upstream, pull.resumed), (0, 0), "the body was cut: {pull:?}");
        }
        When::BetweenLayers if signal == Signal::TERM => {
            assert_eq!(pull.resumed, 0, "a body was cut: {pull:?}");
            assert!(pull.upstream > 0, "{pull:?}");
        }
        _ => assert!(pull.upstream > 0, "{pull:?}"),
    }
    added(&format!("the asker, {signal:?} {when:?}"), control, pull.elapsed, NEW)?;
    Ok(fleet)
}

async fn killed(when: When) -> Result<(), Slow> {
    let mut fleet = signalled(when, Signal::KILL).await?;
    // Its node is served again as soon as it is started again.
    fleet.nodes[0].restart().await.unwrap();
    fleet.settled(None).await;
    fleet.warm().await;
    Ok(())
}

/// Bodies that run end as if nothing was; what comes later goes upstream.
async fn terminated(when: When) -> Result<(), Slow> {
    let mut fleet = signalled(when, Signal::TERM).await?;
    let status = fleet.nodes[0].process_mut().unwrap().ended(END).await.unwrap();
    assert_eq!(status.code(), Some(0));
    Ok(())
}

/// A body that would take longer than the drain may is cut, and goes on upstream.
async fn drain_limit(node: usize) -> Result<(), Slow> {
    let image = Image::builder("library/app", "v1").layer(8 << 20).build().unwrap();
    let mut setup = Setup::new(1, image);
    setup.config = json!({"node": {"drain": "1s"}});
    let (mut fleet, _) = setup.start().await;
    let control = fleet.control().await;
    // 1 MB/s: slow, and no stall.
    fleet.network.set_rate(1, Some(8_000_000)).unwrap();
    let before = fleet.peer_bytes().await;
    let mut ended = Duration::ZERO;
    let moment = async |fleet: &mut Fleet| fleet.in_mid_body(before, 5e5).await;
    let strike = async |fleet: &mut Fleet| {
        let process = fleet.nodes[node].process_mut().unwrap();
        process.signal(Signal::TERM).unwrap();
        let began = Instant::now();
        let status = process.ended(END).await.unwrap();
        assert_eq!(status.code(), Some(0));
        ended = began.elapsed();
    };
    let pull = fleet.struck_at(moment, strike).await;
    println!("node {node} with a drain of 1 s: {pull:?}, ended after {ended:?}");
    assert!(pull.mirrored > 0 && pull.upstream > 0 && pull.resumed == 1, "{pull:?}");
    // The part before the signal came slowly: what it took is no matter of the drain.
    let slow = Duration::from_secs_f64(pull.mirrored as f64 / 1e6);
    added(&format!("node {node}, the pull"), control + slow, pull.elapsed, NEW)?;
    added(&format!("node {node}, its end"), Duration::from_secs(1), ended, 2 * NEW)
}

/// containerd waits as long as its mirror hangs: it has no limit of its own for a header (its pull request 13164 adds
/// one). What bounds it is Peili's liveness probe, which restarts the process: here after two seconds.
async fn stopped(generation: Generation) -> Result<(), Slow> {
    let mut runtime = Runtime::start(generation).await;
    for when in When::ALL {
        let control = runtime.control(when).await;
        let image = runtime.held(when).await;
        let strike = async |cluster: &mut Cluster| {
            cluster.nodes[1].peili.process().unwrap().pause().unwrap();
            tokio::time::sleep(PROBE).await;
            cluster.nodes[1].peili.restart().await.unwrap();
        };
        let pull = runtime.struck(when, &image, strike).await.unwrap();
        let upstream = runtime.cluster.origin.layer_bytes(&image);
        println!("{generation}, stopped {when:?}: {upstream} of {} bytes from upstream", image.layer_bytes());
        added(&format!("stopped {when:?}, then restarted"), control + PROBE, pull.elapsed, NEW)?;
        runtime.cluster.connected().await;
        runtime.still_shares().await;
    }
    Ok(())
}
