//! On real sockets of loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant as StdInstant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::network::conformance::{Cluster, Controls, check_all, holders, wait_for};
use crate::oci::Level;

mod abuse;
mod admission;
mod facts;
mod flood;
mod kept;
mod recorded;

/// A node, its address and what it asks.
struct Node {
    identity: Identity,
    address: SocketAddr,
    swarm: Option<Swarm>,
    network: SwarmNetwork,
    controls: Controls,
}

struct Start {
    identity: Identity,
    peers: Vec<PeerConfig>,
    dns: Vec<String>,
    port: u16,
    names: Arc<dyn Names>,
    keep: Option<PathBuf>,
    advertise: Vec<SocketAddr>,
    name: String,
}

/// Names that a test decides on.
#[derive(Default)]
struct TestNames(Mutex<Option<Vec<IpAddr>>>);

#[async_trait]
impl Names for TestNames {
    async fn addresses(&self, _: &str) -> Result<Vec<IpAddr>, String> {
        self.0.lock().unwrap().clone().ok_or_else(|| "no such host".into())
    }
}

/// A name server that never answers.
struct Silent;

#[async_trait]
impl Names for Silent {
    async fn addresses(&self, _: &str) -> Result<Vec<IpAddr>, String> {
        std::future::pending().await
    }
}

/// Whether one of a few attempts stays within `limit`: on a machine that does other things, single ones do not.
async fn within(limit: Duration, mut attempt: impl AsyncFnMut(u8)) {
    let mut took = Vec::new();
    for number in 0..5 {
        let start = StdInstant::now();
        attempt(number).await;
        took.push(start.elapsed());
        if start.elapsed() < limit {
            return;
        }
    }
    panic!("none within {limit:?}: {took:?}");
}

impl Default for Start {
    fn default() -> Self {
        Self {
            identity: Identity::generate(),
            peers: Vec::new(),
            dns: Vec::new(),
            port: 0,
            names: Arc::new(TestNames::default()),
            keep: None,
            advertise: Vec::new(),
            name: "node".into(),
        }
    }
}

impl Start {
    /// Knows the nodes by identity and address.
    fn knowing(nodes: &[&Node]) -> Self {
        Self { peers: nodes.iter().map(|node| node.as_peer()).collect(), ..Self::default() }
    }

    async fn start(self) -> Node {
        self.start_with(Controls::default()).await
    }

    async fn start_with(self, controls: Controls) -> Node {
        let config = Config {
            listen: vec![(Ipv4Addr::LOCALHOST, self.port).into()],
            advertise: self.advertise,
            dns: self.dns,
            peers: self.peers,
            ..Config::default()
        };
        let announcement = Announcement {
            transfer: vec![(Ipv4Addr::UNSPECIFIED, 5002).into()],
            node: self.name,
            zone: "zone".into(),
            version: "0.1.0".into(),
        };
        let parts = Parts {
            gate: Arc::clone(&controls.gate) as _,
            admission: Admission::off(),
            tags: Arc::clone(&controls.tags) as _,
            metrics: Metrics::default(),
            keep: self.keep,
            first: None,
        };
        let (swarm, network) =
            Swarm::spawn_with(&self.identity, &config, &announcement, parts, self.names).unwrap();
        wait_for("it listens", || !network.status().listening.is_empty()).await;
        let address = network.status().listening[0].parse().unwrap();
        Node { identity: self.identity, address, swarm: Some(swarm), network, controls }
    }
}

impl Node {
    fn as_peer(&self) -> PeerConfig {
        PeerConfig { id: self.id(), addresses: vec![self.address.to_string()] }
    }

    fn id(&self) -> PeerId {
        self.network.peer_id().clone()
    }

    fn view(&self) -> Arc<dyn Network> {
        Arc::new(self.network.clone())
    }

    fn problems(&self) -> String {
        self.network.status().problems.join("\n")
    }

    fn connected(&self) -> usize {
        self.network.status().peers.iter().filter(|peer| peer.connected).count()
    }

    async fn sees(&self, count: usize) {
        wait_for("connected", || self.connected() == count).await;
    }

    async fn has_problem(&self, text: &str) {
        let end = StdInstant::now() + Duration::from_secs(15);
        while !self.problems().contains(text) {
            assert!(StdInstant::now() < end, "no problem with {text:?} in {:?}", self.problems());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn digests(count: usize) -> Vec<Digest> {
    (0..count).map(|n| Digest::sha256(&n.to_be_bytes())).collect()
}

struct Real(Vec<Node>);

#[async_trait]
impl Cluster for Real {
    async fn start(count: usize) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        for _ in 0..count {
            let earlier: Vec<&Node> = nodes.iter().collect();
            let node = Start::knowing(&earlier).start().await;
            nodes.push(node);
        }
        for node in &nodes {
            let others = nodes.iter().filter(|other| other.id() != node.id()).map(Node::as_peer).collect();
            node.network.set_peers(others, Vec::new());
        }
        Self(nodes)
    }

    fn network(&self, node: usize) -> Arc<dyn Network> {
        self.0[node].view()
    }

    fn id(&self, node: usize) -> PeerId {
        self.0[node].id()
    }

    fn controls(&self, node: usize) -> &Controls {
        &self.0[node].controls
    }

    fn recheck(&self, node: usize) {
        self.0[node].network.recheck();
    }

    async fn kill(&mut self, node: usize) {
        self.0[node].swarm = None;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    check_all::<Real>().await;
}

fn question(tag: &str) -> TagQuestion {
    TagQuestion { name: format!("ghcr.io/a/b:{tag}").parse().unwrap(), home: None }
}

#[tokio::test]
async fn five_nodes_converge_within_a_second_of_a_change() {
    let cluster = Real::start(5).await;
    for node in &cluster.0 {
        node.sees(4).await;
        wait_for("records", || node.network.tag_peers().len() == 4).await;
    }
    let mut digest = Digest::sha256(b"layer");
    within(Duration::from_secs(1), async |attempt| {
        digest = Digest::sha256(&[attempt]);
        cluster.0[0].network.advertise(Advertisement::Added(digest));
        for node in &cluster.0[1..] {
            wait_for("known", || holders(&node.view(), &digest) == [cluster.id(0)]).await;
        }
    })
    .await;
    let peer = cluster.0[1].network.holders(&digest).pop().unwrap();
    assert_eq!(peer.transfer, [SocketAddr::from(([127, 0, 0, 1], 5002))]);
    assert_eq!((peer.node.as_str(), peer.zone.as_str()), ("node", "zone"));
}

#[tokio::test]
async fn a_large_inventory_arrives_and_then_only_changes() {
    let one = Start::default().start().await;
    let two = Start::knowing(&[&one]).start().await;
    let mut all = digests(50_000);
    two.network.advertise(Advertisement::All(all.clone()));
    let held = |node: &Node| node.network.status().peers.iter().map(|peer| peer.holds).sum::<usize>();
    wait_for("all arrive", || held(&one) == 50_000).await;
    // More changes than the log remembers, at once: a gap, so the whole is sent again.
    all = digests(90_000).split_off(40_000);
    two.network.advertise(Advertisement::All(all.clone()));
    wait_for("all are replaced", || held(&one) == 50_000 && holders(&one.view(), &all[49_999]) == [two.id()])
        .await;
    assert!(holders(&one.view(), &digests(1)[0]).is_empty());
    two.network.advertise(Advertisement::Removed(all[0]));
    wait_for("a change arrives", || held(&one) == 49_999).await;
}

/// Until its view is whole, a newcomer asks who has one.
#[tokio::test]
async fn a_newcomer_finds_what_there_is_at_once() {
    let one = Start::default().start().await;
    let all = digests(50_000);
    one.network.advertise(Advertisement::All(all.clone()));
    wait_for("its own view is complete", || one.network.status().complete).await;
    let two = Start::knowing(&[&one]).start().await;
    two.sees(1).await;
    let since = StdInstant::now();
    while two.network.find(&all[49_999], Duration::from_millis(20)).await.is_empty() {
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", two.network.status());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("found after {:?}, complete: {}", since.elapsed(), two.network.status().complete);
    let found = two.network.find(&all[1], Duration::from_secs(1)).await;
    assert_eq!(found.iter().map(|peer| peer.id.clone()).collect::<Vec<_>>(), [one.id()]);
    wait_for("it knows all", || two.network.status().complete && holders(&two.view(), &all[0]).len() == 1)
        .await;
    assert!(two.network.find(&Digest::sha256(b"nobody"), Duration::from_secs(1)).await.is_empty());
}

#[tokio::test]
async fn a_restarted_node_is_found_again_and_tells_anew() {
    let one = Start::default().start().await;
    let mut two = Start::default().start().await;
    one.network.set_peers(vec![two.as_peer()], Vec::new());
    one.sees(1).await;
    let (before, after) = (Digest::sha256(b"before"), Digest::sha256(b"after"));
    two.network.advertise(Advertisement::Added(before));
    wait_for("known", || holders(&one.view(), &before).len() == 1).await;
    two.swarm = None;
    one.sees(0).await;
    one.has_problem("connection refused").await;
    let again = Start { identity: two.identity.clone(), port: two.address.port(), ..Start::default() };
    let two = again.start().await;
    two.network.advertise(Advertisement::All(vec![after]));
    wait_for("the new is known", || holders(&one.view(), &after) == [two.id()]).await;
    wait_for("what an earlier process held counts no more", || holders(&one.view(), &before).is_empty())
        .await;
    assert_eq!(one.problems(), "");
}

/// What was said of an address counts no more once its node has come by itself, or once nobody dials it any more.
#[tokio::test]
async fn what_an_address_was_is_forgotten() {
    let third = Start::default().start().await;
    let names = Arc::new(TestNames(Mutex::new(Some(vec![Ipv4Addr::LOCALHOST.into()]))));
    let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let dns = vec![format!("peers.test:{port}")];
    let start = || Start { dns: dns.clone(), names: Arc::clone(&names) as _, ..Start::knowing(&[&third]) };
    let one = start().start().await;
    one.sees(1).await;
    one.has_problem("a peer of peers.test").await;
    let two = Start { port, ..Start::knowing(&[&one]) }.start().await;
    one.sees(2).await;
    wait_for("it is here", || !one.problems().contains("a peer of")).await;
    drop(two);
    one.sees(1).await;
    one.has_problem("a peer of peers.test").await;
    *names.0.lock().unwrap() = None;
    one.has_problem("no such host").await;
    assert_eq!(one.problems().lines().count(), 1, "{}", one.problems());
}

#[tokio::test]
async fn another_identity_at_the_right_address_is_named() {
    let impostor = Start::default().start().await;
    let expected = Identity::generate().peer_id().clone();
    let peer = PeerConfig { id: expected.clone(), addresses: vec![impostor.address.to_string()] };
    let one = Start { peers: vec![peer], ..Start::default() }.start().await;
    let text =
        format!("peer {expected} at {}: another identity answered: {}", impostor.address, impostor.id());
    one.has_problem(&text).await;
    assert_eq!((one.connected(), impostor.connected()), (0, 0));
}

#[tokio::test]
async fn an_unknown_node_is_refused_before_it_says_anything() {
    let controls = Controls::default();
    *controls.gate.others.write().unwrap() = Some(Level::None);
    let one = Start::default().start_with(controls).await;
    let stranger = Start::knowing(&[&one]).start().await;
    let digest = Digest::sha256(b"claimed");
    stranger.network.advertise(Advertisement::Added(digest));
    one.network.advertise(Advertisement::Added(digest));
    one.has_problem(&format!("peer {} at 127.0.0.1 was refused", stranger.id())).await;
    // It goes on trying.
    stranger.has_problem(&format!("peer {}: it closes the connection at once", one.id())).await;
    assert_eq!((one.connected(), stranger.network.holders(&digest)), (0, Vec::new()));
    assert!(one.network.holders(&digest).is_empty() && one.network.status().peers.is_empty());
    // Once it is trusted, it is let in.
    one.controls.gate.set(&stranger.id(), Level::Blobs);
    one.network.recheck();
    wait_for("let in", || holders(&one.view(), &digest) == [stranger.id()]).await;
    assert_eq!(one.problems(), "");
}

#[tokio::test]
async fn garbage_on_the_port_harms_nobody() {
    let one = Start::default().start().await;
    let mut silent = Vec::new();
    for garbage in
        [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096], b"\x13/multistream/1.0.0\n\xff\xff\xff\xff"]
    {
        let mut stream = TcpStream::connect(one.address).await.unwrap();
        // It may close before all is written.
        let _ = stream.write_all(garbage).await;
        silent.push(stream);
    }
    let two = Start::knowing(&[&one]).start().await;
    two.sees(1).await;
    for mut stream in silent {
        let closed = tokio::time::timeout(Duration::from_secs(10), async {
            let mut buffer = [0; 1024];
            while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        });
        closed.await.expect("it is closed in time");
    }
    assert_eq!(one.connected(), 1);
}

/// As when a cluster is switched on: all streams are opened at the one that the others know within a millisecond.
#[tokio::test]
async fn nodes_that_come_at_once_are_all_taken() {
    let one = Start::default().start().await;
    let mut others = Vec::new();
    for _ in 0..10 {
        others.push(Start::default().start().await);
    }
    let start = StdInstant::now();
    for other in &others {
        other.network.set_peers(vec![one.as_peer()], Vec::new());
    }
    for node in others.iter().chain([&one]) {
        wait_for("each knows all", || node.network.status().members == 11).await;
    }
    // Most are refused the whole view, which goes to few at once; they do not wait for the next look at what differs.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_hung_peer_is_given_up_and_delays_no_other() {
    let one = Start::default().start().await;
    let two = Start::knowing(&[&one]).start().await;
    let hung = Start::knowing(&[&one]);
    // Else it would connect to the one that hangs, and that one could say that it lives.
    two.controls.gate.set(hung.identity.peer_id(), Level::None);
    // A thread that stands still is what a stopped process or a dropping firewall looks like.
    let (started, hung_node) = oneshot::channel();
    let (stop, stopped) = oneshot::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let node = hung.start().await;
            started.send((node.id(), node.network.clone())).ok().unwrap();
            let _: Result<(), _> = stopped.await;
            let _ = ended.recv();
            drop(node);
        });
    });
    let (hung, hung_network) = hung_node.await.unwrap();
    one.sees(2).await;
    let held = Digest::sha256(b"held by the one that hangs");
    hung_network.advertise(Advertisement::Added(held));
    wait_for("known", || holders(&one.view(), &held).len() == 1).await;

    stop.send(()).unwrap();
    let start = StdInstant::now();
    let news = Digest::sha256(b"news");
    one.network.advertise(Advertisement::Added(news));
    wait_for("the other hears at once", || holders(&two.view(), &news) == [one.id()]).await;
    // Before the one that hangs is given up, after 3 s.
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    let limit = Duration::from_millis(200);
    let answer = one.network.resolve(&hung, &question("v1"), limit).await;
    assert!(matches!(answer, Err(ResolveError::Timeout)), "{answer:?}");
    wait_for("it is given up", || holders(&one.view(), &held).is_empty()).await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(end);
    thread.join().unwrap();
}

#[tokio::test]
async fn a_node_that_shuts_down_is_forgotten_at_once() {
    let one = Start::default().start().await;
    let mut two = Start::default().start().await;
    one.network.set_peers(vec![two.as_peer()], Vec::new());
    one.sees(1).await;
    two.sees(1).await;
    two.swarm.take().unwrap().shutdown().await;
    one.sees(0).await;
    assert!(one.network.tag_peers().is_empty() && two.network.tag_peers().is_empty());
    let answer = two.network.resolve(&one.id(), &question("v1"), Duration::from_secs(1)).await;
    assert!(matches!(answer, Err(ResolveError::Unreachable(_))), "{answer:?}");
}

#[tokio::test]
async fn a_service_name_leads_to_peers_of_unknown_identity_and_never_to_oneself() {
    let one = Start::default().start().await;
    let names = Arc::new(TestNames::default());
    let dns = vec![format!("peers.test:{}", one.address.port())];
    let two = Start { dns: dns.clone(), names: Arc::clone(&names) as _, ..Start::default() }.start().await;
    two.has_problem(&format!("dns {}: no such host", dns[0])).await;
    // Alone is legal; when the name is there, the peer is found.
    *names.0.lock().unwrap() = Some(vec![Ipv4Addr::LOCALHOST.into()]);
    two.sees(1).await;
    wait_for("no problem is left", || two.problems().is_empty()).await;

    let own = Arc::new(TestNames(Mutex::new(Some(vec![Ipv4Addr::LOCALHOST.into()]))));
    let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let three =
        Start { dns: vec![format!("peers.test:{port}")], names: own, port, ..Start::default() }.start().await;
    wait_for("its own address is tried", || three.network.shared.peers().is_empty()).await;
    assert_eq!(three.problems(), "");
}

#[tokio::test]
async fn hanging_dns_delays_nothing() {
    let one = Start::default().start().await;
    let peers = vec![one.as_peer()];
    let two =
        Start { peers, dns: vec!["peers.test:5001".into()], names: Arc::new(Silent), ..Start::default() };
    let two = two.start().await;
    two.sees(1).await;
    two.has_problem("dns peers.test:5001: no name server answers within 5 s").await;
}

#[tokio::test]
async fn the_system_knows_localhost() {
    let found = lookup::look_up(Arc::new(SystemNames), "localhost:5001").await.unwrap();
    assert!(found.contains(&(Ipv4Addr::LOCALHOST, 5001).into()), "{found:?}");
    for wrong in ["localhost", "localhost:x", ":5001", "localhost:0"] {
        assert!(lookup::look_up(Arc::new(SystemNames), wrong).await.is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn a_taken_port_is_a_problem_that_goes_away() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let config = Config { listen: vec![address], ..Config::default() };
    let controls = Controls::default();
    let parts = Parts {
        gate: Arc::clone(&controls.gate) as _,
        admission: Admission::off(),
        tags: Arc::clone(&controls.tags) as _,
        metrics: Metrics::default(),
        keep: None,
        first: None,
    };
    let (_swarm, network) =
        Swarm::spawn(&Identity::generate(), &config, &Announcement::default(), parts).unwrap();
    let problems = network.status().problems;
    assert_eq!(problems, [format!("cannot listen at {address}: address already in use")]);
    drop(taken);
    wait_for("it listens", || network.status().listening == [address.to_string()]).await;
    assert!(network.status().problems.is_empty());
}
