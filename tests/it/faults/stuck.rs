//! Peili itself stands still: its executor, which the watchdog ends, and its pool for blocking work, which only what
//! needs the disk may notice.

use std::time::{Duration, Instant};

use peili_lab::{Freezer, Generation};

use super::client::Client;
use super::fleet::{Fleet, Setup};
use super::runtime::{Runtime, needs};
use super::{NET, NEW, STALL, Slow, When, added, timed};
use crate::Case;
use crate::cluster::Cluster;

/// The watchdog looks every half second, and ends the process after ten looks without a change.
const WATCHDOG: Duration = Duration::from_millis(5500);

/// Deadline of a request for a blob.
const DEADLINE: Duration = Duration::from_secs(3);

/// Threads for blocking work at most, those of them that may be with the disk, and clients that want one at a time.
const POOL: usize = 64;
const DISK: usize = 16;
const CLIENTS: usize = 24;
/// When no thread comes up any more: those that stand still at the disk are all that may be there.
const NO_MORE: Duration = Duration::from_secs(2);

pub(super) fn cases() -> Vec<Case> {
    let needs = needs(Generation::V2);
    vec![
        timed("faults::stuck::executor", &needs, executor),
        timed("faults::stuck::blocking_pool_of_the_asker", &NET, || blocking_pool(0)),
        timed("faults::stuck::blocking_pool_of_the_holder", &NET, || blocking_pool(1)),
    ]
}

async fn executor() -> Result<(), Slow> {
    let mut runtime = Runtime::start(Generation::V2).await;
    for when in When::ALL {
        let control = runtime.control(when).await;
        let image = runtime.held(when).await;
        let mut freezer = None;
        let strike = async |cluster: &mut Cluster| {
            let process = cluster.nodes[1].peili.process_mut().unwrap();
            let frozen = freezer.insert(Freezer::new().unwrap());
            frozen.freeze(&process.threads("peili").unwrap()).unwrap();
            let status = process.ended(WATCHDOG + DEADLINE).await.unwrap();
            assert_eq!(status.code(), Some(70), "{}", process.log_tail());
            assert!(process.log_tail().contains("watchdog"), "{}", process.log_tail());
        };
        let pull = runtime.struck(when, &image, strike).await.unwrap();
        drop(freezer);
        let asker = &mut runtime.cluster.nodes[1].peili;
        asker.restart().await.unwrap();
        added(&format!("the executor stands still {when:?}"), control + WATCHDOG, pull.elapsed, NEW)?;
        runtime.cluster.connected().await;
        runtime.still_shares().await;
    }
    Ok(())
}

async fn blocking_pool(node: usize) -> Result<(), Slow> {
    let (mut fleet, _) = Setup::at(When::Before, 1).start().await;
    let control = fleet.control().await;
    let freezer = Freezer::new().unwrap();
    exhaust(&fleet, node, &freezer).await;
    let exhausted = Instant::now();
    let own = own_blob(&fleet, node);
    if node == 0 {
        // What needs the disk is given up; what does not goes on.
        let began = Instant::now();
        assert_eq!(fleet.asker().fetch(&own).await.unwrap().status, 404);
        added("a blob on a disk that hangs", DEADLINE, began.elapsed(), NEW)?;
        fleet.says(&["deadline"]).await;
    }
    let pull = fleet.pull().await;
    println!("the pool of node {node} is exhausted: {pull:?}");
    let limit = if node == 0 { NEW } else { STALL };
    if node == 1 {
        let holder = fleet.nodes[1].plan.peer_id.clone();
        fleet.says(&[&holder, "peers-failed"]).await;
    }
    added(&format!("the blocking pool of node {node} is exhausted"), control, pull.elapsed, limit)?;
    if node == 0 {
        // The watchdog lets it live: it is the disk that hangs, and a restart would not help.
        tokio::time::sleep((2 * WATCHDOG).saturating_sub(exhausted.elapsed())).await;
    }
    assert!(fleet.nodes[node].process_mut().unwrap().is_running());
    assert_eq!(fleet.nodes[node].admin("/livez").await.unwrap().status, 200);
    drop(freezer);
    assert_eq!(fleet.nodes[node].fetch(&own).await.unwrap().status, 200);
    fleet.warm().await;
    Ok(())
}

/// A blob that this node itself holds.
fn own_blob(fleet: &Fleet, node: usize) -> String {
    if node == 0 { fleet.unrelated_layer() } else { fleet.layer(0) }
}

/// Stops each thread for blocking work as it comes up, until there can be no more: either all that there may be, or all that
/// may be with the disk were stopped at it, and nobody else gets there.
async fn exhaust(fleet: &Fleet, node: usize, freezer: &Freezer) {
    let process = fleet.nodes[node].process().unwrap();
    // They are started first, and have the same name.
    let workers = std::thread::available_parallelism().unwrap().get().max(2);
    let (address, path) = (fleet.nodes[node].registry(), own_blob(fleet, node));
    let (mut frozen, mut clients) = (Vec::new(), Vec::new());
    let began = Instant::now();
    let mut last = began;
    while frozen.len() < POOL && last.elapsed() < NO_MORE {
        let ask = |_| {
            let (namespace, path) = (fleet.network.nodes[node].namespace.clone(), path.clone());
            tokio::task::spawn_blocking(move || {
                namespace.run(move || Client::connect(address).send(&path, ""))
            })
        };
        clients.extend((0..CLIENTS).map(ask));
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut new = process.threads("peili").unwrap().split_off(workers);
        new.retain(|thread| !frozen.contains(thread));
        freezer.freeze(&new).unwrap();
        if !new.is_empty() {
            last = Instant::now();
        }
        frozen.extend(new);
    }
    assert!(frozen.len() >= DISK, "{} threads stand still", frozen.len());
    println!("{} threads of node {node} stand still after {:?}", frozen.len(), began.elapsed());
    for client in clients {
        let _ = client.await;
    }
}
