//! Many requests, rude clients, and no descriptors left.

use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use peili::network::identity::Identity;
use peili::oci::Digest;
use peili::transfer::FetchError;
use peili_lab::node::Plan;
use peili_lab::process::Usage;
use peili_lab::{Image, peer, wait};
use serde_json::json;

use super::client::Client;
use super::fleet::{Fleet, Setup};
use super::{NET, NEW, Slow, When, added, timed};
use crate::Case;

const SOON: Duration = Duration::from_secs(10);

/// Clients that ask for unknown content at once.
const CLIENTS: usize = 8;

/// Pieces in which lazy snapshotters (SOCI) fetch.
const PIECE: u64 = 8 << 20;

/// Peers that ask one holder at once, for how long, and how much at a time.
const REQUESTERS: usize = 50;
const RUSH: Duration = Duration::from_secs(4);
const BITE: u64 = 1 << 20;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("faults::load::ten_thousand_requests_for_unknown_content", &NET, unknown_content).alone(),
        Case::new("faults::load::fifty_requesters_of_one_holder", &NET, fifty_requesters).alone(),
        timed("faults::load::clients_that_hang_up", &NET, clients_that_hang_up),
    ];
    for when in When::ALL {
        let name = format!("faults::load::descriptors_exhausted_{when:?}").to_lowercase();
        cases.push(timed(name, &NET, move || descriptors_exhausted(when)));
    }
    cases
}

impl Fleet {
    /// Runs `work` as so many clients at once on the node that asks.
    async fn clients<T: Send + 'static>(
        &self,
        count: usize,
        work: impl Fn(usize, Client) -> T + Clone + Send + 'static,
    ) -> Vec<T> {
        let address = self.asker().registry();
        let clients = (0..count).map(|number| {
            let (namespace, work) = (self.network.nodes[0].namespace.clone(), work.clone());
            tokio::task::spawn_blocking(move || {
                namespace.run(move || work(number, Client::connect(address))).unwrap()
            })
        });
        let clients: Vec<_> = clients.collect();
        let mut results = Vec::new();
        for client in clients {
            results.push(client.await.unwrap());
        }
        results
    }

    /// Waits until a node holds no more descriptors and threads than `before`, but for a few.
    async fn settles(&self, node: usize, before: &Usage) {
        let what = format!("node {node} has no more descriptors and threads than {before:?}");
        let usage = || self.nodes[node].usage().unwrap();
        // Of the threads that read files some two dozen stay: they end after 10 s without work, and looking at a layout once a
        // second gives each some now and then.
        let settled = wait::until(&what, SOON, async || {
            let now = usage();
            (now.descriptors <= before.descriptors + 12 && now.threads <= before.threads + 24).then_some(())
        });
        let settled = settled.await;
        println!("before {before:?}, now {:?}", usage());
        settled.unwrap();
    }
}

async fn unknown_content() {
    let image = Image::builder("library/app", "v1").layer(64 << 10).build().unwrap();
    let (mut fleet, _) = Setup::new(1, image).start().await;
    fleet.pull().await;
    let requests = |count: usize| {
        fleet.clients(CLIENTS, move |client_number, mut client| {
            let times = (0..count / CLIENTS).map(|number| {
                let digest = Digest::sha256(&[number.to_le_bytes(), client_number.to_le_bytes()].concat());
                let kind = if number % 2 == 0 { "blobs" } else { "manifests" };
                let began = Instant::now();
                let (status, length) =
                    client.send(&format!("/v2/library/app/{kind}/{digest}?ns=lab.test"), "");
                assert_eq!(status, 404);
                client.read(length);
                began.elapsed()
            });
            times.collect::<Vec<_>>()
        })
    };
    requests(500).await;
    let before = fleet.asker().usage().unwrap();
    let mut times = requests(10_000).await.concat();
    times.sort_unstable();
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("10,000 requests for unknown content, {CLIENTS} at once: p50 {median:?}, p99 {p99:?}");
    // 1 ms is the promise for a release build on a quiet machine (`cargo xtask bench` measures it).
    assert!(p99 < Duration::from_millis(20), "{p99:?}");
    fleet.settles(0, &before).await;
    let grown = fleet.asker().usage().unwrap().resident.saturating_sub(before.resident);
    assert!(grown < 8 << 20, "{grown} bytes");
    let asked = fleet.asker().metric("peili_mirror_fetches_total", "").await.unwrap();
    assert!(asked < 20.0, "peers were asked for what nobody has");
}

/// Fifty nodes ask one holder without a pause: each gets its share, or is told that the holder is busy.
async fn fifty_requesters() {
    let image = Image::builder("library/app", "v1").layer(5 << 20).build().unwrap();
    let mut setup = Setup::new(1, image);
    setup.config = json!({"transfer": {"uploads": 8}});
    let identities: Vec<_> = (0..REQUESTERS).map(|_| Identity::generate()).collect();
    let introduce = |plans: &mut Vec<Plan>| {
        let peers = plans[1].config["network"]["peers"].as_array_mut().unwrap();
        peers.extend(identities.iter().map(|identity| json!({"id": identity.peer_id().to_string()})));
    };
    let (mut fleet, _) = setup.start_apart(introduce).await;
    fleet.settled(None).await;
    fleet.warm().await;
    let before = fleet.nodes[1].usage().unwrap();
    let (target, layer) = (peer::of(&fleet.nodes[1].plan).unwrap(), fleet.image.layers[0]);
    let start = Barrier::new(REQUESTERS);
    let rush = |asker: &peer::Asker| {
        // Handshakes are not what is shared out.
        while asker.ask(&target, &layer, 1).is_err() {}
        start.wait();
        let (began, mut bytes, mut busy) = (Instant::now(), 0, 0);
        while began.elapsed() < RUSH {
            match asker.ask(&target, &layer, BITE) {
                Ok(count) => bytes += count,
                Err(FetchError::Busy { queue }) => {
                    assert!(queue > 0, "busy without a queue");
                    busy += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        (bytes, busy)
    };
    let namespace = &fleet.network.nodes[0].namespace;
    let mut shares: Vec<(u64, u64)> = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let spawn = |identity| scope.spawn(move || peer::run(Some(namespace), identity, rush).unwrap());
            let threads: Vec<_> = identities.iter().map(spawn).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    });
    shares.sort_unstable();
    let (least, most) = (shares[0].0, shares[REQUESTERS - 1].0);
    let busy: u64 = shares.iter().map(|(_, busy)| busy).sum();
    println!("{REQUESTERS} requesters: {least} to {most} bytes each, {busy} times busy");
    assert!(least > 0 && most <= 2 * least + BITE, "{shares:?}");
    fleet.settles(1, &before).await;
    fleet.warm().await;
}

/// containerd's parallel fetch asks for open ranges and hangs up after its piece; others just vanish.
async fn clients_that_hang_up() -> Result<(), Slow> {
    let image = Image::builder("library/app", "v1").layer(48 << 20).build().unwrap();
    let (mut fleet, _) = Setup::new(1, image).start().await;
    let control = fleet.control().await;
    let before: Vec<_> = fleet.nodes.iter().map(|node| node.usage().unwrap()).collect();
    for read in [0, 1 << 20, 8 << 20] {
        let path = fleet.layer(0);
        let began = Instant::now();
        let answers = fleet.clients(24, move |number, mut client| {
            let range = format!("Range: bytes={}-\r\n", number << 20);
            let (status, length) = client.send(&path, &range);
            // The body of a 404 is shorter.
            (status, client.read(read.min(length)))
        });
        let answers = answers.await;
        let served = answers.iter().filter(|(status, bytes)| *status == 206 && *bytes == read).count();
        println!("{served} of 24 read {read} bytes and hung up, in {:?}", began.elapsed());
        assert!(answers.iter().all(|(status, _)| matches!(status, 206 | 404)), "{answers:?}");
        // As many as a peer may upload at once; the others may find it busy for longer than they wait. Of 24 that read
        // 8 MiB each all may: together that takes two debug builds on two cores longer than anybody waits.
        let least = if read > 1 << 20 { 1 } else { 8 };
        assert!(served >= least, "{answers:?}");
        fleet.warm().await;
    }
    // Pieces as a lazy snapshotter asks for them, each read whole.
    let (path, size) = (fleet.layer(0), fleet.image.layer_bytes());
    let pieces = usize::try_from(size.div_ceil(PIECE)).unwrap();
    let answers = fleet.clients(pieces, move |number, mut client| {
        let start = number as u64 * PIECE;
        let (status, length) = client.send(&path, &format!("Range: bytes={start}-{}\r\n", start + PIECE - 1));
        (status, length, client.read(length))
    });
    let answers = answers.await;
    let read: u64 = answers.iter().map(|(.., read)| read).sum();
    assert!(answers.iter().all(|(status, length, read)| *status == 206 && length == read), "{answers:?}");
    assert_eq!(read, size);
    for (node, before) in before.iter().enumerate() {
        fleet.settles(node, before).await;
    }
    let pull = fleet.warm().await;
    added("after clients that hang up", control, pull.elapsed, NEW)
}

async fn descriptors_exhausted(when: When) -> Result<(), Slow> {
    let (mut fleet, _) = Setup::at(when, 1).start().await;
    let control = fleet.control().await;
    for node in [0, 1] {
        let pid = fleet.nodes[node].process().unwrap().id();
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limits = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let before = limits.split_whitespace().next().unwrap().to_owned();
        let strike = async |fleet: &mut Fleet| {
            // Not one more than it has.
            limit_descriptors(pid, &fleet.nodes[node].usage().unwrap().descriptors.to_string());
        };
        let pull = fleet.struck(when, strike).await;
        limit_descriptors(pid, &before);
        println!("no descriptors at node {node}, {when:?}: {pull:?}");
        if node == 1 && pull.upstream > 0 {
            let holder = fleet.nodes[1].plan.peer_id.clone();
            fleet.says(&[&holder, "peers-failed"]).await;
        }
        added(&format!("no descriptors at node {node}, {when:?}"), control, pull.elapsed, NEW)?;
        fleet.warm().await;
    }
    for node in &mut fleet.nodes {
        assert!(node.process_mut().unwrap().is_running());
    }
    Ok(())
}

fn limit_descriptors(pid: u32, count: &str) {
    let limit = format!("--nofile={count}:");
    assert!(Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status().unwrap().success());
}
