use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::TcpListener;

use super::*;
use crate::election;
use crate::listener::tests::{ask, raw};
use crate::network::admission::{Mode, Status as Admission};
use crate::network::{self, MemberState, PeerStatus};
use crate::oci::Level;
use crate::policy;
use crate::registry::Amount;
use crate::telemetry::Cause;

fn sample() -> Status {
    let peer = |node: &str, id: &str, problem: &str| PeerStatus {
        id: id.into(),
        node: node.into(),
        zone: if node.is_empty() { String::new() } else { "north".into() },
        version: "0.1.0".into(),
        connected: problem.is_empty(),
        state: problem.is_empty().then_some(MemberState::Alive),
        seconds: 3_725,
        neighbour: problem.is_empty(),
        level: Level::Tags,
        proof: "listed".into(),
        holds: 1234,
        transfer: Vec::new(),
        problem: problem.into(),
    };
    let cause = |ago: u64, cause: &str, subject: &str, count| Cause {
        time: 10_000 - ago,
        kind: "manifest".into(),
        cause: cause.into(),
        subject: subject.into(),
        count,
    };
    Status {
        diagnosis: Diagnosis::default(),
        version: Status::VERSION,
        node: Node {
            peer_id: "12D3KooWAAAABBBBCCCC".into(),
            name: "worker-1".into(),
            identity_problem: String::new(),
            data_problem: String::new(),
            zone: "north".into(),
            version: "0.1.0".into(),
            uptime_seconds: 3_725,
        },
        store: Store {
            source: "containerd".into(),
            health: StoreHealth::Degraded { reason: "containerd does not answer since 12 s".into() },
            images: 1,
            digests: 250,
            bytes: Some(5 << 30),
        },
        network: network::Status {
            id: "12D3KooWAAAABBBBCCCC".into(),
            listening: vec!["/ip4/0.0.0.0/tcp/5001".into()],
            peers: vec![
                peer("worker-2", "12D3KooWDDDDEEEEFFFF", ""),
                peer("", "12D3KooWGGGGHHHHIIII", "connection refused\nevil"),
            ],
            advertised: 250,
            members: 2,
            complete: true,
            admission: Some(Admission {
                mode: Mode::Key,
                cluster: "default".into(),
                keys: vec!["0123456789abcdef".into()],
                certificate_until: Some(10_000 + 12 * 3600),
            }),
            problems: vec!["peers.peili.svc: no such name".into()],
        },
        policies_refused: String::new(),
        policies: vec![policy::Loaded {
            world: "registry".into(),
            name: "allow-list".into(),
            sha256: "ab".repeat(32),
            data: std::collections::BTreeMap::new(),
            summary: "allows 2 globs".into(),
            mode: policy::Mode::Monitor,
            failure: policy::Failing::Deny,
        }],
        election: election::Status {
            mode: "gossip".into(),
            roles: vec![election::RoleStatus {
                role: "introducers".into(),
                holders: vec![election::Holder { id: "x".into(), node: "worker-2".into() }],
                ..election::RoleStatus::default()
            }],
            ..election::Status::default()
        },
        upstreams: vec![Upstream {
            name: "corp".into(),
            health: crate::oci::Health::Healthy,
            latency_millis: Some(12),
        }],
        registries: vec![
            AskedRegistry { name: "r.io".into(), answers: false },
            AskedRegistry { name: "docker.io".into(), answers: true },
        ],
        served: Served {
            local: Amount { requests: 10, bytes: 1 << 20 },
            from_peers: Amount { requests: 4, bytes: 3 << 30 },
            from_upstreams: Amount { requests: 2, bytes: 1 << 10 },
            to_peers: Amount { requests: 77, bytes: 0 },
            not_here: 3,
        },
        problems: vec![
            "containerd does not answer\nhint: systemctl status containerd".into(),
            "network: peers.peili.svc: no such name".into(),
        ],
        causes: vec![
            cause(5, "private", "r.io/secret:v1", 12),
            cause(4_000, "tag-upstream", "docker.io/library/nginx:1", 1),
        ],
    }
}

#[test]
fn status_for_people() {
    insta::assert_snapshot!(render::render_at(&sample(), 0, 10_000), @r"
    Node     worker-1, zone north, up 1h 2m 5s, peili 0.1.0
    Peer ID  12D3KooWAAAABBBBCCCC
    Store    containerd, degraded: containerd does not answer since 12 s
    Holds    1 image, 250 digests (250 advertised), 5.0 GiB
    Peers    1 of 2 connected
    Members  2 live, view complete
    Admits   members of cluster default by key 0123456789abcdef; own certificate good for 12h
    Policies allow-list (registry) (monitored only): allows 2 globs
    Election gossip; introducers: worker-2
    Registry 1 of 2 asked lately do not answer: r.io
    Upstream corp: healthy, 12 ms

    Problems
      - containerd does not answer
        hint: systemctl status containerd
      - network: peers.peili.svc: no such name

    Served to                      REQUESTS  BYTES
      the runtime, from here       10        1.0 MiB
      the runtime, from peers      4         3.0 GiB
      the runtime, from upstreams  2         1.0 KiB
      peers                        77        0 B
    Not here, passed on            3

    Peers
      NODE      ZONE   TRUST  PROOF   HOLDS  VERSION  PEER       STATE
      worker-2  north  tags   listed  1234   0.1.0    …EEEEFFFF  neighbour, alive for 1h 2m 5s
      -         -      tags   listed  1234   0.1.0    …HHHHIIII  connection refused?evil

    Last not served
      AGO  TIMES  KIND      CAUSE         WHAT
      5s   12     manifest  private       r.io/secret:v1
      1h   1      manifest  tag-upstream  docker.io/library/nginx:1
    ");
}

#[test]
fn status_on_a_narrow_terminal() {
    let text = render::render_at(&sample(), 48, 10_000);
    assert!(text.lines().all(|line| line.chars().count() <= 48), "{text}");
    insta::assert_snapshot!(text, @r"
    Node     worker-1, zone north, up 1h 2m 5s,
             peili 0.1.0
    Peer ID  12D3KooWAAAABBBBCCCC
    Store    containerd, degraded: containerd does
             not answer since 12 s
    Holds    1 image, 250 digests (250 advertised),
             5.0 GiB
    Peers    1 of 2 connected
    Members  2 live, view complete
    Admits   members of cluster default by key
             0123456789abcdef; own certificate good
             for 12h
    Policies allow-list (registry) (monitored only):
             allows 2 globs
    Election gossip; introducers: worker-2
    Registry 1 of 2 asked lately do not answer: r.io
    Upstream corp: healthy, 12 ms

    Problems
      - containerd does not answer
        hint: systemctl status containerd
      - network: peers.peili.svc: no such name

    Served to                      REQUESTS  BYTES
      the runtime, from here       10        1.0 MiB
      the runtime, from peers      4         3.0 GiB
      the runtime, from upstreams  2         1.0 KiB
      peers                        77        0 B
    Not here, passed on            3

    Peers
      NODE      HOLDS  PEER       STATE
      worker-2  1234   …EEEEFFFF  neighbour, alive …
      -         1234   …HHHHIIII  connection refuse…

    Last not served
      AGO  TIMES  CAUSE         WHAT
      5s   12     private       r.io/secret:v1
      1h   1      tag-upstream  docker.io/library/n…
    ");
}

#[test]
fn status_of_an_empty_node() {
    let status = Status { version: Status::VERSION, ..Status::default() };
    insta::assert_snapshot!(render::render_at(&status, 44, 0), @r"
    Node     -, up 0s
    Peer ID  -
    Store    -, not read yet
    Holds    0 images, 0 digests (0 advertised)
    Peers    0 of 0 connected
    Members  0 live, view not complete yet:
             neighbours are asked

    Served to                  REQUESTS  BYTES
      the runtime, from here   0         0 B
      the runtime, from peers  0         0 B
      peers                    0         0 B
    Not here, passed on        0
    ");
}

#[test]
fn status_round_trips_and_reads_what_it_does_not_know() {
    let text = serde_json::to_string(&sample()).unwrap();
    let read: Status = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
    let future: Status = serde_json::from_str(r#"{"version":1,"new":{},"node":{"name":"a","x":1}}"#).unwrap();
    assert_eq!(future.node.name, "a");
}

#[test]
fn ready_is_listener_and_store_only() {
    let down = Health::Degraded("containerd is down".into());
    assert_eq!(readiness(true, true, &Health::Ready), Ok(()));
    assert_eq!(readiness(true, true, &down), Ok(()));
    let never = readiness(true, false, &down);
    assert_eq!(never, Err("the store was not read yet: containerd is down".into()));
    assert!(readiness(true, false, &Health::Starting).is_err());
    assert!(readiness(false, true, &Health::Ready).is_err());
}

struct Admin {
    server: Server,
    ready: Arc<AtomicBool>,
}

fn start() -> Admin {
    let config = Config { listen: vec![([127, 0, 0, 1], 0).into()], ..Config::default() };
    config.check().unwrap();
    let ready = Arc::new(AtomicBool::new(false));
    let is_ready = Arc::clone(&ready);
    let sources = Sources {
        ready: Arc::new(move || {
            let is_ready = is_ready.load(Ordering::Relaxed);
            readiness(true, is_ready, if is_ready { &Health::Ready } else { &Health::Starting })
        }),
        status: Arc::new(sample),
        metrics: Arc::new({
            let mut all = Registry::default();
            crate::telemetry::registry(&mut all);
            all
        }),
    };
    Admin { server: Server::start(config.bind().unwrap(), &config, sources, None), ready }
}

#[tokio::test]
async fn endpoints() {
    let admin = start();
    let address = admin.server.addresses()[0];
    let check = async |method: &str, path: &str, status: u16, media_type: &str, body: &str| {
        let reply = ask(address, method, path, "").await;
        assert_eq!((reply.status, reply.header("content-type")), (status, Some(media_type)), "{path}");
        let text = String::from_utf8(reply.body.clone()).unwrap();
        assert!(text.contains(body), "{path}: {text}");
        assert!(method == "HEAD" || reply.length() == reply.body.len());
    };
    check("GET", "/livez", 200, TEXT, "ok\n").await;
    check("GET", "/readyz", 503, TEXT, "not ready: the store was not read yet\n").await;
    admin.ready.store(true, Ordering::Relaxed);
    check("GET", "/readyz?verbose", 200, TEXT, "ok\n").await;
    check("HEAD", "/readyz", 200, TEXT, "").await;
    check("GET", "/metrics", 200, OPEN_METRICS, "peili_build_info{version=").await;
    check("GET", "/metrics", 200, OPEN_METRICS, "# EOF\n").await;
    check("GET", "/status", 200, "application/json", r#""version":1"#).await;
    check("GET", "/other", 404, TEXT, "not found").await;
    check("POST", "/status", 405, TEXT, "only GET").await;
    assert!(raw(address, b"nonsense\r\n\r\n").await.starts_with(b"HTTP/1.1 400 "));
}

#[tokio::test]
async fn fetches_the_status() {
    let admin = start();
    let status = fetch(admin.server.addresses()[0]).await.unwrap();
    assert_eq!(serde_json::to_value(status).unwrap(), serde_json::to_value(sample()).unwrap());
    assert!(admin.server.drain(Duration::from_secs(20)).await);
}

/// Answers one connection with `answer`.
async fn answering(answer: &'static str) -> SocketAddr {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(answer.as_bytes()).await;
    });
    address
}

#[tokio::test]
async fn says_what_is_wrong_with_what_answers() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = fetch(free).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot connect to {free}: Connection refused")), "{error}");
    assert!(error.contains("\nhint: is peili running on this node?"), "{error}");
    for (answer, expected) in [
        (
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
            "is not peili's admin port: status 404 Not Found",
        ),
        ("SSH-2.0-OpenSSH\r\n", "is not peili's admin port"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "it has no `version`"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{\"version\":2}",
            "writes version 2 of the status, this program reads version 1",
        ),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", "is not peili's admin port"),
    ] {
        let error = fetch(answering(answer).await).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_hanging_node_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let limit = Duration::from_millis(50);
    let error = client::fetch_within(listener.local_addr().unwrap(), limit).await.unwrap_err();
    assert!(matches!(error, FetchError::Timeout { .. }), "{error}");
}
