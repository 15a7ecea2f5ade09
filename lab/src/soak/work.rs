//! What goes on in a soak: pulls, clients that hang up, images that come and go, nodes that die.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peili::oci::Reference;
use peili::pull::{self, Destination, Host, Silent};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::fleet::{Fleet, REGISTRY, Slot};

/// Longest that a pull may take; the largest image has 18 MiB.
const PULL_LIMIT: Duration = Duration::from_secs(60);
/// Longest that a client waits for a byte.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Most that a client reads before it hangs up.
const READ_MOST: usize = 1 << 20;

/// Starts everything but [`kill_for_ever`]; `rate`: pulls per second.
pub(super) fn spawn(tasks: &mut JoinSet<()>, fleet: &Arc<Fleet>, seed: u64, rate: f64) {
    let mut number = 0;
    let mut random = || {
        number += 1;
        StdRng::seed_from_u64(seed.wrapping_mul(1000) + number)
    };
    #[expect(clippy::cast_precision_loss, reason = "a handful of nodes")]
    let pause = fleet.slots.len() as f64 / rate;
    for index in 0..fleet.slots.len() {
        tasks.spawn(pull_for_ever(Arc::clone(fleet), index, random(), pause));
    }
    for _ in 0..2 {
        tasks.spawn(hang_up_for_ever(Arc::clone(fleet), random(), 2.0 / rate));
    }
    tasks.spawn(publish_for_ever(Arc::clone(fleet), random()));
}

async fn pull_for_ever(fleet: Arc<Fleet>, index: usize, mut random: StdRng, pause: f64) {
    let slot = &fleet.slots[index];
    loop {
        sleep(Duration::from_secs_f64(random.random_range(0.0..2.0 * pause))).await;
        let number = random.random_range(0..fleet.images.len());
        let pooled = &fleet.images[number];
        let present = pooled.present.read().await;
        if !*present {
            continue;
        }
        let pulled = {
            let _shared = slot.content.read().await;
            pull(slot, &pooled.image.reference(REGISTRY), pooled.image.root).await
        };
        match pulled {
            Ok(()) => drop(slot.pulls.fetch_add(1, Ordering::Relaxed)),
            Err(error) => {
                fleet.violation(format!("a pull on {} failed: {error:#}", slot.name));
                continue;
            }
        }
        if let Some(old) = slot.keep(number) {
            let _alone = slot.content.write().await;
            if let Err(error) = slot.remove(&fleet.images[old].image) {
                fleet.violation(format!("cannot remove an image on {}: {error:#}", slot.name));
            }
        }
    }
}

/// Must succeed whatever happens to Peili: the registry is there and has the image.
async fn pull(slot: &Slot, reference: &str, root: peili::oci::Digest) -> Result<()> {
    let reference: Reference = reference.parse()?;
    let (dirs, registry) = (vec![slot.hosts()], reference.name.registry.clone());
    let hosts = tokio::task::spawn_blocking(move || Host::load(&dirs, &registry)).await??;
    let options = pull::Options::new(reference, hosts, Destination::Layout(slot.layout()));
    let summary = timeout(PULL_LIMIT, pull::pull(options, &Silent))
        .await
        .with_context(|| format!("not done within {PULL_LIMIT:?}"))??;
    ensure!(summary.digest == root, "another image came: {}", summary.digest);
    Ok(())
}

async fn hang_up_for_ever(fleet: Arc<Fleet>, mut random: StdRng, pause: f64) {
    loop {
        sleep(Duration::from_secs_f64(random.random_range(0.0..2.0 * pause))).await;
        let slot = &fleet.slots[random.random_range(0..fleet.slots.len())];
        let image = &fleet.images[random.random_range(0..fleet.images.len())].image;
        let layer = image.layers[random.random_range(0..image.layers.len())];
        let from = if random.random_range(0..2) == 0 {
            String::new()
        } else {
            format!("Range: bytes={}-\r\n", random.random_range(0..64 << 10))
        };
        let request = format!(
            "GET /v2/{}/blobs/{layer}?ns={REGISTRY} HTTP/1.1\r\nHost: localhost\r\n{from}\r\n",
            image.repository
        );
        let most = random.random_range(0..READ_MOST);
        match hang_up(slot, &request, most).await {
            Ok(Some(status)) if !["200", "206", "404"].contains(&&*status) => {
                fleet.violation(format!("{} answered {status}", slot.name));
            }
            Ok(Some(_)) => drop(slot.hang_ups.fetch_add(1, Ordering::Relaxed)),
            // It is being killed.
            Ok(None) | Err(_) => {}
        }
    }
}

/// Asks, reads up to `most` bytes and closes. Returns the answer's status, if one came.
async fn hang_up(slot: &Slot, request: &str, most: usize) -> Result<Option<String>> {
    let mut stream = timeout(READ_LIMIT, TcpStream::connect(slot.registry)).await??;
    stream.write_all(request.as_bytes()).await?;
    let (mut buffer, mut status, mut read) = (vec![0; 16 << 10], None, 0);
    while read <= most {
        let count = timeout(READ_LIMIT, stream.read(&mut buffer)).await??;
        if count == 0 {
            break;
        }
        if read == 0 {
            let head = String::from_utf8_lossy(&buffer[..count.min(64)]).into_owned();
            status = head.split(' ').nth(1).map(str::to_owned);
            if status.as_deref() == Some("404") {
                break;
            }
        }
        read += count;
    }
    Ok(status)
}

/// Images appear at the registry and disappear from it; nodes keep what they have.
async fn publish_for_ever(fleet: Arc<Fleet>, mut random: StdRng) {
    loop {
        sleep(Duration::from_secs_f64(random.random_range(0.5..1.5))).await;
        let pooled = &fleet.images[random.random_range(0..fleet.images.len())];
        let mut present = pooled.present.write().await;
        if *present {
            fleet.origin.remove_tag(&pooled.image.repository, &pooled.image.tag);
        } else {
            fleet.origin.add(&pooled.image);
        }
        *present = !*present;
    }
}

/// Kills and restarts nodes that are not stable, one at a time.
pub(super) async fn kill_for_ever(fleet: &Fleet, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let stable = fleet.slots.iter().take_while(|slot| slot.stable).count();
    loop {
        sleep(Duration::from_secs_f64(random.random_range(2.0..6.0))).await;
        let slot = &fleet.slots[random.random_range(stable..fleet.slots.len())];
        let (gently, down) = (random.random_range(0..3) == 0, random.random_range(0.2..3.0));
        if let Err(error) = slot.restart(gently, Duration::from_secs_f64(down)).await {
            fleet.violation(format!("{}: {error:#}", slot.name));
        }
    }
}
