//! One suite for the prober, on real servers, and for its twin.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::probe::Prober;
use super::{Config, Upstream, memory::Memory};
use crate::oci::Registry;

mod endpoint;
mod tls;
mod upstreams;

const LIMIT: Duration = Duration::from_millis(300);

/// How a server behaves, and what that means.
const CASES: [(&str, bool); 7] = [
    ("200", true),
    ("401", true),
    ("404", true),
    ("429", false),
    ("503", false),
    ("hang", false),
    ("refuse", false),
];

struct Server {
    address: String,
    requests: Arc<AtomicUsize>,
    /// Answers that `held` gives.
    permits: Arc<Semaphore>,
    task: JoinHandle<()>,
}

/// A server that answers each request with a status, with 200 as often as it is permitted (`held`), or never.
async fn serve(behaviour: &'static str) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    let permits = Arc::new(Semaphore::new(1));
    let permitted = Arc::clone(&permits);
    let task = tokio::spawn(async move {
        if behaviour == "refuse" {
            return;
        }
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = [0; 4096];
            let read = stream.read(&mut buffer).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&buffer[..read]);
            let head = head.to_lowercase();
            assert!(head.starts_with("get /v2/ http/1.1\r\n"), "{head}");
            assert!(!head.contains("authorization") && !head.contains("secret"), "{head}");
            count.fetch_add(1, Ordering::SeqCst);
            if behaviour == "held" {
                permitted.acquire().await.unwrap().forget();
            }
            if behaviour != "hang" {
                let status = if behaviour == "held" { "200" } else { behaviour };
                let text = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                let _ = stream.write_all(text.as_bytes()).await;
            } else {
                open.push(stream);
            }
        }
    });
    Server { address, requests, permits, task }
}

fn registry(text: &str) -> Registry {
    text.parse().unwrap()
}

fn prober(dir: &std::path::Path, own: &[&str], cache: Duration) -> Prober {
    let config = Config { hosts_dirs: vec![dir.to_owned()], cache, limit: LIMIT };
    Prober::new(config, own.iter().map(|own| own.parse().unwrap()).collect())
}

fn write(dir: &std::path::Path, registry: &str, text: &str) {
    fs::create_dir_all(dir.join(registry)).unwrap();
    fs::write(dir.join(registry).join("hosts.toml"), text).unwrap();
}

/// What every implementation does.
async fn check(upstream: &dyn Upstream, name: &str, expected: bool) {
    let begin = tokio::time::Instant::now();
    assert_eq!(upstream.answers(&registry(name)).await, expected, "{name}");
    assert_eq!(upstream.answers(&registry(name)).await, expected, "{name} from the cache");
    // The limit and what a loaded machine adds.
    assert!(begin.elapsed() < LIMIT + Duration::from_secs(2), "{name}");
}

#[tokio::test]
async fn conforms() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::default();
    let prober = prober(dir.path(), &[], Duration::from_secs(10));
    for (behaviour, expected) in CASES {
        let server = serve(behaviour).await;
        if behaviour == "refuse" {
            server.task.await.unwrap();
        }
        let name = format!("r{behaviour}.test");
        write(dir.path(), &name, &format!("server = \"http://{}\"", server.address));
        memory.set(&registry(&name), expected);
        check(&prober, &name, expected).await;
        check(&memory, &name, expected).await;
    }
    check(&prober, "does-not-exist.invalid", false).await;
    check(&memory, "does-not-exist.invalid", false).await;
}

#[tokio::test]
async fn hosts_after_the_mirror_are_asked_and_the_first_yes_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (before, hang, yes) = (serve("200").await, serve("hang").await, serve("401").await);
    let mirror = serve("200").await;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
        yes.address, before.address, mirror.address, hang.address
    );
    write(dir.path(), "a.test", &text);
    let prober = prober(dir.path(), &[&mirror.address], Duration::from_secs(10));
    assert!(prober.answers(&registry("a.test")).await);
    let counts = [&before, &mirror, &yes].map(|server| server.requests.load(Ordering::SeqCst));
    assert_eq!(counts, [0, 0, 1]);

    // Nobody is left after a mirror that is the last one.
    write(
        dir.path(),
        "b.test",
        &format!("server = \"http://{}\"\n[host.\"http://{}\"]", mirror.address, yes.address),
    );
    assert!(!prober.answers(&registry("b.test")).await);
}

/// What hosts files call this node's own mirror leads to no other registry, however it is bound.
#[tokio::test]
async fn the_mirror_itself_is_never_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = serve("200").await;
    let port = mirror.address.rsplit_once(':').unwrap().1.to_owned();
    let check = async |own: &str, host: &str, is_own: bool| {
        let text = format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{host}:{port}\"]\n");
        write(dir.path(), "a.test", &text);
        let prober = prober(dir.path(), &[&format!("{own}:{port}")], Duration::from_secs(10));
        assert_eq!(prober.answers(&registry("a.test")).await, !is_own, "{host} with {own} bound");
    };
    check("127.0.0.1", "127.0.0.1", true).await;
    check("127.0.0.1", "localhost", true).await;
    check("[::1]", "localhost", true).await;
    check("0.0.0.0", "localhost", true).await;
    check("0.0.0.0", "127.0.0.1", true).await;
    check("0.0.0.0", "127.0.0.2", true).await;
    check("[::]", "[::1]", true).await;
    // The same port of another address is another server.
    check("127.0.0.2", "127.0.0.1", false).await;
    check("[::]", "127.0.0.1", false).await;
    let route = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    if route.connect("192.0.2.1:9").is_ok() {
        let address = route.local_addr().unwrap().ip().to_string();
        check("0.0.0.0", &address, true).await;
    }
}

/// A registry that has no host but this mirror is asked by nobody, which is no silence.
#[tokio::test]
async fn a_closed_registry_is_not_among_those_that_were_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = serve("200").await;
    for (name, server) in [("closed.test", mirror.address.as_str()), ("silent.test", "127.0.0.1:1")] {
        let text = format!("server = \"http://{server}\"\n[host.\"http://{}\"]\n", mirror.address);
        write(dir.path(), name, &text);
    }
    let prober = prober(dir.path(), &[&mirror.address], Duration::from_secs(10));
    for name in ["closed.test", "silent.test"] {
        assert!(!prober.answers(&registry(name)).await, "{name}");
    }
    assert_eq!(prober.asked(Duration::from_secs(60), 10), [(registry("silent.test"), false)]);
}

/// Headers of a hosts file may say who asks; a probe does not. (Certificates: `tls`.)
#[tokio::test]
async fn a_probe_sends_nothing_that_is_configured() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve("200").await;
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://{0}\".header]\n\
         authorization = \"Basic c2VjcmV0\"\nx-api-key = [\"secret\"]\n",
        server.address
    );
    write(dir.path(), "a.test", &text);
    assert!(prober(dir.path(), &[], Duration::from_secs(10)).answers(&registry("a.test")).await);
}

#[tokio::test]
async fn many_requests_are_one_probe_and_the_cache_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve("200").await;
    write(dir.path(), "a.test", &format!("server = \"http://{}\"", server.address));
    let prober = Arc::new(prober(dir.path(), &[], Duration::from_secs(3600)));
    let name = registry("a.test");
    let all = futures::future::join_all((0..50).map(|_| prober.answers(&name))).await;
    assert!(all.into_iter().all(|answers| answers));
    assert_eq!(server.requests.load(Ordering::SeqCst), 1);

    let cache = Duration::from_millis(50);
    prober.reconfigure(Config { hosts_dirs: vec![dir.path().to_owned()], cache, limit: LIMIT });
    server.task.abort();
    let _ = server.task.await;
    assert!(!prober.answers(&name).await, "what was cached before counts no more");

    let server = serve("200").await;
    write(dir.path(), "a.test", &format!("server = \"http://{}\"", server.address));
    let became = async { while !prober.answers(&name).await {} };
    tokio::time::timeout(Duration::from_secs(10), became).await.expect("an old answer is renewed");
}

/// Guards the wait for a fresh answer: a renewal that runs while the old answer ends is awaited.
#[tokio::test]
async fn an_answer_that_ends_during_its_renewal_is_not_a_no() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve("held").await;
    write(dir.path(), "a.test", &format!("server = \"http://{}\"", server.address));
    let cache = Duration::from_secs(8);
    let limit = Duration::from_secs(7);
    let prober = Prober::new(Config { hosts_dirs: vec![dir.path().to_owned()], cache, limit }, Vec::new());
    let name = registry("a.test");
    assert!(prober.answers(&name).await);
    let known = tokio::time::Instant::now();
    // The renewal begins in the last quarter of the answer's life.
    tokio::time::sleep_until(known + cache * 4 / 5).await;
    let renewing = async {
        while server.requests.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep_until(known + cache).await;
    };
    assert!(prober.answers(&name).await, "it is still believed");
    renewing.await;
    let release = async { server.permits.add_permits(1) };
    let (answers, ()) = tokio::join!(prober.answers(&name), release);
    assert!(answers);
}
