//! The process among others: who starts it, who reads its log, who ends it, and what its environment says.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use peili_lab::node::binary;
use peili_lab::process::Process;
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Node, http, wait};
use rustix::process::Signal;
use serde_json::json;

use super::{CHANGE, Pair, Plan, layout};
use crate::Case;
use crate::cluster::REGISTRY;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("cli::process::nobody_reads_its_log", &[], blocked_log),
        Case::new("cli::process::proxies_are_for_registries_only", &[], proxies),
        Case::new("cli::process::a_second_signal_ends_the_drain", &[], second_signal),
        Case::new("cli::process::a_drain_ends_at_its_limit", &[], drain_limit),
    ]
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A plan on loopback with the image in its layout, its configuration written.
fn plan(scratch: &Scratch, name: &str, images: &[&Image]) -> Plan {
    let folder = scratch.path().join(name);
    layout(&folder, images);
    let mut plan = Plan::on_loopback(name, &format!("layout:{}", folder.display())).unwrap();
    plan.merge(&json!({"upstream": {"hosts-dirs": [scratch.path().join("certs.d")]}}));
    plan
}

fn command(plan: &Plan) -> Command {
    std::fs::write(plan.config_path(), plan.config.to_string()).unwrap();
    let mut command = Command::new(binary().unwrap());
    command.arg("run").arg("--config").arg(plan.config_path());
    command
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn get(address: SocketAddr, path: &str) -> Option<u16> {
    http::request(address, "GET", path).ok().map(|answer| answer.status)
}

/// In a pod, standard error is a pipe that containerd reads. One that is full from the start, and never read, stops
/// nothing: the node starts, serves, and is not ended by its watchdog.
async fn blocked_log() {
    let image = Image::builder("library/app", "v1").layer(4096).build().unwrap();
    let scratch = Scratch::new().unwrap();
    let mut plan = plan(&scratch, "mute", &[&image]);
    plan.merge(&json!({"log": {"level": "debug"}}));
    let (_reader, writer) = std::io::pipe().unwrap();
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"x").is_ok() {}
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::empty()).unwrap();
    // A start that fails ends, although its error cannot be written.
    let mut wrong = Command::new(binary().unwrap());
    wrong.args(["run", "--set", "mirror.segmnt=1"]).stderr(writer.try_clone().unwrap());
    let mut wrong = Killed(wrong.spawn().unwrap());
    let ended = wait::until("its end", CHANGE, async || wrong.0.try_wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(2));

    let mut child = Killed(command(&plan).stdin(Stdio::null()).stderr(writer).spawn().unwrap());
    let (admin, registry) = (loopback(plan.ports.admin), loopback(plan.ports.registry));
    wait::until("ready", CHANGE, async || (get(admin, "/readyz") == Some(200)).then_some(())).await.unwrap();
    let path = format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]);
    let ready = Instant::now();
    // Twice what the watchdog bears.
    while ready.elapsed() < Duration::from_secs(10) {
        assert_eq!(get(registry, &path), Some(200));
        assert_eq!(get(admin, "/livez"), Some(200));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(child.0.try_wait().unwrap().is_none(), "it runs");
}

/// Peers are reached directly whatever `HTTPS_PROXY` says; a registry is probed through it, but never one on loopback.
async fn proxies() {
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, stop) = (Arc::clone(&asked), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    proxy.set_nonblocking(true).unwrap();
    let proxy = std::thread::spawn(move || {
        let mut heads = Vec::new();
        while !stopped.load(Ordering::Relaxed) {
            if let Ok((mut stream, _)) = proxy.accept() {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                let mut head = [0; 512];
                let length = stream.read(&mut head).unwrap_or(0);
                heads.push(String::from_utf8_lossy(&head[..length]).into_owned());
                count.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        heads
    });

    let image = Image::builder("library/app", "v1").layer(100_000).build().unwrap();
    let scratch = Scratch::new().unwrap();
    let mut plans = [plan(&scratch, "holder", &[&image]), plan(&scratch, "other", &[])];
    Plan::introduce(&mut plans);
    let mut proxied = Vec::new();
    for plan in &plans {
        let mut command = command(plan);
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env(name, &address).env(name.to_lowercase(), &address);
        }
        command.env_remove("NO_PROXY").env_remove("no_proxy");
        let log = scratch.path().join(format!("{}.log", plan.name));
        proxied.push(Process::spawn(&plan.name, command, &log, None).unwrap());
    }
    let registry = loopback(plans[1].ports.registry);
    let blob = format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]);
    wait::until("a peer's blob", CHANGE, async || (get(registry, &blob) == Some(200)).then_some(()))
        .await
        .unwrap();
    // A registry on loopback that nobody serves: asked for directly, so the tag goes to the peers.
    let local = "/v2/library/app/manifests/v1?ns=127.0.0.1:1";
    assert_eq!(get(registry, local), Some(404));
    assert_eq!(asked.load(Ordering::Relaxed), 0, "peers and loopback are not asked through the proxy");

    get(registry, &format!("/v2/library/app/manifests/v1?ns={REGISTRY}"));
    wait::until("the registry's probe", CHANGE, async || (asked.load(Ordering::Relaxed) > 0).then_some(()))
        .await
        .unwrap();
    stop.store(true, Ordering::Relaxed);
    let heads = proxy.join().unwrap();
    assert!(heads.iter().all(|head| head.starts_with(&format!("CONNECT {REGISTRY}:443 "))), "{heads:?}");
}

/// A node with a client that takes its layer too slowly to end.
async fn with_a_client_that_waits(config: &serde_json::Value) -> (Pair, TcpStream) {
    let image = Image::builder("library/app", "v1").layer(64 << 20).build().unwrap();
    let pair = Pair::start(&[&image], config).await;
    let mut stream = TcpStream::connect(pair.holder.registry()).unwrap();
    stream.set_read_timeout(Some(CHANGE)).unwrap();
    let layer = image.layers[0];
    write!(stream, "GET /v2/library/app/blobs/{layer}?ns={REGISTRY} HTTP/1.0\r\n\r\n").unwrap();
    stream.read_exact(&mut [0; 1 << 10]).unwrap();
    (pair, stream)
}

fn signal(node: &Node) {
    node.process().unwrap().signal(Signal::TERM).unwrap();
}

async fn second_signal() {
    let (mut pair, _stream) = with_a_client_that_waits(&json!({"node": {"drain": "1m"}})).await;
    signal(&pair.holder);
    let registry = pair.holder.registry();
    wait::until("the drain", CHANGE, async || TcpStream::connect(registry).is_err().then_some(()))
        .await
        .unwrap();
    let process = pair.holder.process_mut().unwrap();
    assert!(process.ended(Duration::from_secs(1)).await.is_err(), "the client holds it up");
    signal(&pair.holder);
    let status = pair.holder.process_mut().unwrap().ended(Duration::from_secs(10)).await.unwrap();
    assert_eq!(status.code(), Some(0));
}

async fn drain_limit() {
    let (mut pair, _stream) = with_a_client_that_waits(&json!({"node": {"drain": "2s"}})).await;
    let begin = Instant::now();
    signal(&pair.holder);
    let status = pair.holder.process_mut().unwrap().ended(Duration::from_secs(20)).await.unwrap();
    assert_eq!(status.code(), Some(0));
    assert!((2..15).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}
