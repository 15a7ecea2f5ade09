use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::listener::Clients;
use crate::listener::tests::{Reply, SOON, ask, eventually, raw};
use crate::mirror::{NotHere, Source};
use crate::oci::{ByteRange, Descriptor, MANIFEST_MEDIA_TYPES};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const NS: &str = "?ns=r.io";

/// What the fake does with a blob, by its content.
const ENDLESS: &[u8] = b"a body without an end";
const BROKEN: &[u8] = b"a body that breaks";
const HANGS: &[u8] = b"no answer at all";
const PANICS: &[u8] = b"a bug";

#[derive(Default)]
struct Fake {
    blobs: HashMap<Digest, Bytes>,
    tags: HashMap<String, Digest>,
    refusals: HashMap<Digest, NotHere>,
    asked: std::sync::Mutex<Vec<String>>,
    bodies: Arc<AtomicUsize>,
}

/// Counts open bodies.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fake {
    fn with(contents: &[&[u8]]) -> Self {
        let mut fake = Self::default();
        for content in contents {
            fake.blobs.insert(Digest::sha256(content), Bytes::copy_from_slice(content));
        }
        fake
    }

    fn answer(
        &self,
        digest: &Digest,
        media_type: &str,
        range: Option<oci::RangeHeader>,
        head: bool,
    ) -> Result<Answer, Refusal> {
        if let Some(cause) = self.refusals.get(digest) {
            return Err(Refusal::NotHere(*cause));
        }
        let content = self.blobs.get(digest).ok_or(Refusal::NotHere(NotHere::Unknown))?.clone();
        let size = if content == ENDLESS { 1 << 40 } else { content.len() as u64 };
        let whole = ByteRange::whole(size);
        let range = range.map_or(Ok(whole), |range| range.resolve(size)).map_err(Refusal::Range)?;
        self.bodies.fetch_add(1, Ordering::SeqCst);
        let open = Open(Arc::clone(&self.bodies));
        let bytes: Vec<io::Result<Bytes>> = match &content[..] {
            BROKEN => vec![Ok(content.slice(..6)), Err(io::Error::other("broken"))],
            _ if head => Vec::new(),
            ENDLESS => Vec::new(),
            _ => vec![Ok(content.slice(range.start as usize..range.end as usize))],
        };
        let mut bytes = futures::stream::iter(bytes).boxed();
        if content == ENDLESS && !head {
            bytes = futures::stream::repeat_with(|| Ok(Bytes::from_static(&[0; 65536]))).boxed();
        }
        let body = bytes.map(move |chunk| {
            let _open = &open;
            chunk
        });
        Ok(Answer {
            descriptor: Descriptor::new(*digest, size, media_type),
            range,
            body: body.boxed(),
            source: if content.len() % 2 == 0 { Source::Local } else { Source::Peers },
        })
    }
}

#[async_trait]
impl Backend for Fake {
    async fn manifest(
        &self,
        name: &Name,
        target: &Target,
        head: bool,
        _limit: Duration,
    ) -> Result<Answer, Refusal> {
        let digest = match target {
            Target::Tag(tag) => {
                self.asked.lock().unwrap().push(format!("{name}:{tag}"));
                *self.tags.get(tag.as_str()).ok_or(Refusal::NotHere(NotHere::TagUpstream))?
            }
            Target::Digest(digest) => *digest,
        };
        self.answer(&digest, MANIFEST_MEDIA_TYPES[1], None, head)
    }

    async fn blob(&self, request: BlobRequest, _limit: Duration) -> Result<Answer, Refusal> {
        match self.blobs.get(&request.digest).map(|content| &content[..]) {
            Some(HANGS) => futures::future::pending().await,
            Some(PANICS) => panic!("a bug"),
            _ => self.answer(&request.digest, LAYER, request.range, request.head),
        }
    }

    fn tags(&self, name: &Name) -> Vec<Tag> {
        let here = name.repository.as_str() == "a/b";
        self.tags.keys().filter(|_| here).map(|tag| tag.parse().unwrap()).collect()
    }

    async fn referrers(&self, _: &Name, digest: &Digest) -> Result<Vec<Referrer>, NotHere> {
        let referrer = |content: &[u8], manifest: &str| {
            let descriptor = Descriptor::new(Digest::sha256(content), 3, MANIFEST_MEDIA_TYPES[1]);
            Referrer::parse(descriptor, manifest.as_bytes()).expect("a manifest")
        };
        Ok(match self.blobs.contains_key(digest) {
            true => vec![
                referrer(b"one", r#"{"artifactType":"sig/nature","annotations":{"a":"b"}}"#),
                referrer(b"two", r#"{"artifactType":"","config":{"mediaType":"s/bom"}}"#),
            ],
            false => Vec::new(),
        })
    }
}

struct Node {
    server: Server,
    fake: Arc<Fake>,
    metrics: Metrics,
    causes: Arc<Causes>,
    registry: prometheus_client::registry::Registry,
}

impl Node {
    fn start(fake: Fake, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config { listen: vec![([127, 0, 0, 1], 0).into()], ..Config::default() };
        change(&mut config);
        config.check().unwrap();
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = Metrics::register(registry.sub_registry_with_prefix("peili_registry"));
        let (fake, causes) = (Arc::new(fake), Arc::new(Causes::default()));
        let server = Server::start(
            config.bind().unwrap(),
            &config,
            Arc::<Fake>::clone(&fake),
            metrics.clone(),
            Arc::clone(&causes),
            None,
        );
        Self { server: server.unwrap(), fake, metrics, causes, registry }
    }

    fn address(&self) -> SocketAddr {
        self.server.addresses()[0]
    }

    async fn get(&self, target: &str, headers: &str) -> Reply {
        ask(self.address(), "GET", target, headers).await
    }
}

/// Checks that GET and HEAD answer `target` with the same 404, its code and its cause.
async fn check_not_here(node: &Node, target: &str, code: &str, cause: &str) {
    let get = node.get(target, "").await;
    assert_eq!(get.status, 404, "{target}");
    assert!(get.reason.starts_with("Not Here (peili: "), "{target}: {}", get.reason);
    let error: serde_json::Value = serde_json::from_slice(&get.body).unwrap();
    assert_eq!(error["errors"][0]["code"], code, "{target}");
    assert_eq!(error["errors"][0]["detail"]["cause"], cause, "{target}");
    assert!(error["errors"][0]["message"].as_str().is_some_and(|message| !message.is_empty()), "{target}");
    let head = ask(node.address(), "HEAD", target, "").await;
    assert_eq!((head.status, &head.reason, head.length()), (404, &get.reason, get.length()), "{target}");
    assert_eq!(head.body, b"");
}

fn blob(content: &[u8]) -> String {
    format!("/v2/a/b/blobs/{}{NS}", Digest::sha256(content))
}

#[tokio::test]
async fn pulls_by_digest_and_tag() {
    let (manifest, layer) = (b"{\"a\":1}".as_slice(), b"layer!".as_slice());
    let mut fake = Fake::with(&[manifest, layer, b""]);
    let digest = Digest::sha256(manifest);
    fake.tags.insert("v1".into(), digest);
    let node = Node::start(fake, |_| ());
    let cases = [
        (format!("/v2/a/b/manifests/{digest}{NS}"), manifest, MANIFEST_MEDIA_TYPES[1]),
        (format!("/v2/a/b/manifests/v1{NS}"), manifest, MANIFEST_MEDIA_TYPES[1]),
        ("/v2/r.io/a/b/manifests/v1".into(), manifest, MANIFEST_MEDIA_TYPES[1]),
        (blob(layer), layer, LAYER),
        (blob(b""), b"", LAYER),
    ];
    for (target, content, media_type) in cases {
        for method in ["GET", "HEAD"] {
            // Credentials are dropped unread.
            let reply = ask(node.address(), method, &target, "authorization: Basic Zm9vOmJhcg==\r\n").await;
            assert_eq!((reply.status, reply.length()), (200, content.len()), "{method} {target}");
            assert_eq!(reply.body, if method == "GET" { content } else { b"" });
            let digest = Digest::sha256(content).to_string();
            for (name, value) in [
                ("docker-content-digest", Some(digest.as_str())),
                ("content-type", Some(media_type)),
                ("accept-ranges", Some("bytes")),
                ("oci-namespace", Some("r.io")),
                ("content-range", None),
                ("content-encoding", None),
                ("transfer-encoding", None),
                ("www-authenticate", None),
            ] {
                assert_eq!(reply.header(name), value, "{method} {target}: {name}");
            }
        }
    }
    let base = node.get("/v2/", "").await;
    assert_eq!((base.status, base.body.as_slice()), (200, b"{}".as_slice()));
    assert_eq!(base.header("docker-distribution-api-version"), Some("registry/2.0"));
}

#[tokio::test]
async fn ranges() {
    let content: Vec<u8> = (0..2048_u32).map(|number| number as u8).collect();
    let node = Node::start(Fake::with(&[&content, b""]), |_| ());
    let target = blob(&content);
    for (range, start, end) in [
        ("0-", 0, 2048),
        ("500-1499", 500, 1500),
        ("500-", 500, 2048),
        ("-500", 1548, 2048),
        ("2000-5000", 2000, 2048),
        ("0-0", 0, 1),
        ("-5000", 0, 2048),
    ] {
        let reply = node.get(&target, &format!("range: bytes={range}\r\n")).await;
        assert_eq!((reply.status, reply.length()), (206, end - start), "{range}");
        assert_eq!(reply.header("content-range"), Some(&*format!("bytes {start}-{}/2048", end - 1)));
        assert_eq!(reply.body, content[start..end], "{range}");
        let digest = Digest::sha256(&content).to_string();
        assert_eq!(reply.header("docker-content-digest"), Some(&*digest));
    }
    for range in ["5000-10000", "2048-", "-0"] {
        let reply = node.get(&target, &format!("range: bytes={range}\r\n")).await;
        assert_eq!((reply.status, reply.header("content-range")), (416, Some("bytes */2048")), "{range}");
    }
    // Not one range: ignored (RFC 9110, 14.2).
    for headers in
        ["range: bytes=500-0\r\n", "range: bytes=0-1,4-5\r\n", "range: bytes=0-1\r\nrange: bytes=4-5\r\n"]
    {
        assert_eq!(node.get(&target, headers).await.status, 200, "{headers}");
    }
    // Ranges are for GET only (14.2), and a range of what is unknown is unknown.
    assert_eq!(ask(node.address(), "HEAD", &target, "range: bytes=0-1\r\n").await.status, 200);
    assert_eq!(node.get(&blob(b"unknown"), "range: bytes=9-\r\n").await.status, 404);
    assert_eq!(node.get(&blob(b""), "range: bytes=0-\r\n").await.status, 416);
}

#[tokio::test]
async fn whatever_cannot_be_served_is_not_here() {
    let mut fake = Fake::with(&[PANICS]);
    let causes = [
        (NotHere::Private, "private"),
        (NotHere::TagDisputed, "tag-disputed"),
        (NotHere::TagTooOld, "tag-too-old"),
        (NotHere::PeersFailed, "peers-failed"),
        (NotHere::PeersBusy, "peers-busy"),
        (NotHere::UpstreamsFailed, "upstreams-failed"),
        (NotHere::UpstreamsRefused, "upstreams-refused"),
        (NotHere::StoreFailed, "store-failed"),
        (NotHere::Unsupported, "unsupported"),
    ];
    for (cause, label) in causes {
        fake.refusals.insert(Digest::sha256(label.as_bytes()), cause);
    }
    let node = Node::start(fake, |_| ());
    for (cause, label) in causes {
        let code = if cause == NotHere::Unsupported { "UNSUPPORTED" } else { "BLOB_UNKNOWN" };
        check_not_here(&node, &blob(label.as_bytes()), code, label).await;
    }
    let hex = Digest::sha256(b"").hex();
    let manifest = |reference: &str| format!("/v2/a/manifests/{reference}{NS}");
    check_not_here(&node, &blob(b"unknown"), "BLOB_UNKNOWN", "unknown").await;
    check_not_here(&node, &blob(PANICS), "BLOB_UNKNOWN", "internal").await;
    check_not_here(&node, &manifest("v2"), "MANIFEST_UNKNOWN", "tag-upstream").await;
    check_not_here(&node, &manifest(&format!("sha256:{hex}")), "MANIFEST_UNKNOWN", "unknown").await;
    check_not_here(&node, &manifest("sha256:00"), "DIGEST_INVALID", "malformed").await;
    check_not_here(&node, &manifest("a b".replace(' ', "%20").as_str()), "MANIFEST_UNKNOWN", "malformed")
        .await;
    check_not_here(&node, "/v2/A/manifests/1?ns=r.io", "NAME_INVALID", "malformed").await;
    check_not_here(&node, "/v2/a/manifests/1?ns=-", "NAME_INVALID", "malformed").await;
    check_not_here(&node, "/", "UNSUPPORTED", "malformed").await;
    // A partial list would hide signatures.
    check_not_here(&node, &manifest(&format!("sha256-{hex}")), "UNSUPPORTED", "unsupported").await;
    check_not_here(&node, &manifest(&format!("sha256-{hex}.sig")), "UNSUPPORTED", "unsupported").await;
    check_not_here(&node, &format!("/v2/a/tags/list{NS}"), "UNSUPPORTED", "unsupported").await;
    check_not_here(&node, &format!("/v2/a/referrers/sha256:{hex}{NS}"), "UNSUPPORTED", "unsupported").await;
    check_not_here(&node, "/v2/_catalog", "UNSUPPORTED", "malformed").await;
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"] {
        let reply = ask(node.address(), method, "/v2/a/blobs/uploads/", "content-length: 0\r\n").await;
        assert_eq!(reply.status, 404, "{method}");
    }
    let upload = format!(
        "POST /v2/a/blobs/uploads/ HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n{}",
        "x".repeat(500_000)
    );
    let reply = Reply::parse(&raw(node.address(), upload.as_bytes()).await);
    assert_eq!(reply.status, 404);
    let long = format!("GET /v2/{} HTTP/1.1\r\nhost: x\r\n\r\n", "a/".repeat(60_000));
    let many = format!("GET /v2/ HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(300));
    let connect = "CONNECT r.io:443 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    for request in [long.as_str(), &many, connect, "\u{1}\r\n\r\n"] {
        let reply = Reply::parse(&raw(node.address(), request.as_bytes()).await);
        assert_eq!(reply.status, 404, "{}", request.get(..20).unwrap_or(request));
        assert!(reply.reason.starts_with("Not Here (peili: "));
        assert_eq!(reply.body.len(), reply.length());
    }
    assert!(
        node.causes
            .last()
            .iter()
            .any(|cause| cause.cause == "private" && cause.subject.starts_with("r.io/a/b@sha256:"))
    );
}

#[tokio::test]
async fn connections_too_many_are_told() {
    let node = Node::start(Fake::with(&[b"12"]), |_| ());
    let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", blob(b"12"));
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(node.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        held.push(stream);
    }
    check_not_here(&node, &blob(b"12"), "BLOB_UNKNOWN", "overloaded").await;
    drop(held);
    let again = async { while node.get(&blob(b"12"), "").await.status != 200 {} };
    tokio::time::timeout(SOON, again).await.expect("slots come back");
}

#[tokio::test]
async fn one_deadline_until_the_header() {
    let fake = Fake::with(&[HANGS]);
    let node = Node::start(fake, |config| config.blob_deadline = Duration::from_millis(150));
    let start = tokio::time::Instant::now();
    check_not_here(&node, &blob(HANGS), "BLOB_UNKNOWN", "deadline").await;
    // One for GET and one for HEAD.
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_broken_body_ends_short_by_fin() {
    let node = Node::start(Fake::with(&[BROKEN]), |_| ());
    // Pipelined requests make unread bytes, which would turn a close into an RST.
    let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", blob(BROKEN)).repeat(200);
    let reply = Reply::parse(&raw(node.address(), request.as_bytes()).await);
    assert_eq!((reply.status, reply.length(), reply.body.as_slice()), (200, BROKEN.len(), &BROKEN[..6]));
    eventually("the body is dropped", || node.fake.bodies.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_drops_the_body() {
    let node = Node::start(Fake::with(&[ENDLESS]), |_| ());
    for range in ["", "range: bytes=1048576-\r\n"] {
        let mut stream = TcpStream::connect(node.address()).await.unwrap();
        let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n{range}\r\n", blob(ENDLESS));
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut first = vec![0; 1 << 20];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(node.fake.bodies.load(Ordering::SeqCst), 1);
        assert_eq!(node.metrics.in_flight.get(), 1);
        drop(stream);
        eventually("the body is dropped", || node.fake.bodies.load(Ordering::SeqCst) == 0).await;
        eventually("it is no longer in flight", || node.metrics.in_flight.get() == 0).await;
    }
}

#[tokio::test]
async fn keep_alive_and_pipelining() {
    let node = Node::start(Fake::with(&[b"12345", b"abc"]), |_| ());
    let get = |content: &[u8], more: &str| format!("GET {} HTTP/1.1\r\nhost: x\r\n{more}\r\n", blob(content));
    let requests = [get(b"12345", ""), get(b"nothing", ""), get(b"abc", "connection: close\r\n")].concat();
    let text = String::from_utf8(raw(node.address(), requests.as_bytes()).await).unwrap();
    let parts: Vec<_> = text.split("HTTP/1.1 ").skip(1).collect();
    assert_eq!(parts.len(), 3, "{text}");
    assert!(parts[0].starts_with("200") && parts[0].ends_with("\r\n\r\n12345"));
    assert!(parts[1].starts_with("404"));
    assert!(parts[2].starts_with("200") && parts[2].ends_with("\r\n\r\nabc"));
}

#[tokio::test]
async fn unknown_content_ten_thousand_times_leaves_nothing_behind() {
    let node = Node::start(Fake::default(), |_| ());
    let runtime = tokio::runtime::Handle::current().metrics();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let tasks = runtime.num_alive_tasks();
    let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", blob(b"unknown"));
    for _ in 0..100 {
        let mut stream = TcpStream::connect(node.address()).await.unwrap();
        for _ in 0..100 {
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut buffer = [0; 4096];
            let mut reply = Vec::new();
            while !reply.ends_with(b"]}") {
                let count = stream.read(&mut buffer).await.unwrap();
                assert_ne!(count, 0);
                reply.extend_from_slice(&buffer[..count]);
            }
            assert!(reply.starts_with(b"HTTP/1.1 404 "));
        }
    }
    eventually("all tasks end", || runtime.num_alive_tasks() <= tasks).await;
    // Other tests run in this process too, so that only a growth by the number of connections counts.
    assert!(descriptors() < 100, "{}", descriptors());
    let cause = &node.causes.last()[0];
    assert_eq!((cause.count, node.causes.last().len()), (10_000, 1));
    assert_eq!(node.metrics.served().not_here, 10_000);
}

#[tokio::test]
async fn lists_of_what_is_held() {
    let mut fake = Fake::with(&[b"{}"]);
    for tag in ["v1", "v2", "v10", "latest"] {
        fake.tags.insert(tag.into(), Digest::sha256(b"{}"));
    }
    let digest = Digest::sha256(b"{}");
    fake.tags.insert(format!("sha256-{}", digest.hex()), digest);
    let node = Node::start(fake, |config| config.lists = Lists::Held);
    let list = |reply: &Reply| {
        let body: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!(body["name"], "a/b");
        serde_json::from_value::<Vec<String>>(body["tags"].clone()).unwrap()
    };
    let all = node.get("/v2/a/b/tags/list?ns=r.io", "").await;
    assert_eq!(list(&all)[..1], ["latest"]);
    assert_eq!(list(&all)[2..], ["v1", "v10", "v2"]);
    assert_eq!(all.header("link"), None);
    let page = node.get("/v2/a/b/tags/list?ns=r.io&n=2&last=sha256-z", "").await;
    assert_eq!(list(&page), ["v1", "v10"]);
    assert_eq!(page.header("link"), Some("</v2/a/b/tags/list?n=2&last=v10&ns=r.io>; rel=\"next\""));
    assert_eq!(list(&node.get("/v2/a/b/tags/list?ns=r.io&n=2&last=v10", "").await), ["v2"]);
    assert_eq!(list(&node.get("/v2/a/b/tags/list?ns=r.io&n=0", "").await), [""; 0]);
    check_not_here(&node, "/v2/other/tags/list?ns=r.io", "NAME_UNKNOWN", "unknown").await;

    let fallback = format!("/v2/a/b/manifests/sha256-{}{NS}", digest.hex());
    assert_eq!(node.get(&fallback, "").await.status, 200);

    let referrers = format!("/v2/a/b/referrers/{digest}{NS}");
    let reply = node.get(&referrers, "").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some(MANIFEST_MEDIA_TYPES[0])));
    assert_eq!(reply.header("oci-filters-applied"), None);
    let index: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(index["schemaVersion"], 2);
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2));
    let reply = node.get(&format!("{referrers}&artifactType=sig%2Fnature"), "").await;
    assert_eq!(reply.header("oci-filters-applied"), Some("artifactType"));
    let index: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
    let expected = serde_json::json!([{
        "mediaType": MANIFEST_MEDIA_TYPES[1], "size": 3, "digest": Digest::sha256(b"one"),
        "artifactType": "sig/nature", "annotations": {"a": "b"}
    }]);
    assert_eq!(index["manifests"], expected);
    let none = node.get(&format!("/v2/a/b/referrers/{}{NS}", Digest::sha256(b"x")), "").await;
    assert_eq!((none.status, none.body.ends_with(br#""schemaVersion":2}"#)), (200, true));
}

#[tokio::test]
async fn counts_have_closed_labels() {
    let node = Node::start(Fake::with(&[b"ab", b"abc"]), |_| ());
    node.get(&blob(b"ab"), "").await;
    node.get(&blob(b"abc"), "range: bytes=1-\r\n").await;
    node.get(&blob(b"abc"), "range: bytes=5-\r\n").await;
    node.get("/v2/secret/image/manifests/v1", "").await;
    ask(node.address(), "BREW", "/coffee", "").await;
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &node.registry).unwrap();
    let mut lines: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("peili_registry_requests_total") || line.contains("sent_bytes_total"))
        .collect();
    lines.sort_unstable();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    peili_registry_requests_total{kind="blob",method="GET",outcome="local"} 1
    peili_registry_requests_total{kind="blob",method="GET",outcome="peers"} 1
    peili_registry_requests_total{kind="blob",method="GET",outcome="range"} 1
    peili_registry_requests_total{kind="manifest",method="GET",outcome="tag-upstream"} 1
    peili_registry_requests_total{kind="other",method="other",outcome="unsupported"} 1
    peili_registry_sent_bytes_total{source="local"} 2
    peili_registry_sent_bytes_total{source="peers"} 2
    peili_registry_sent_bytes_total{source="upstream"} 0
    "#);
    assert!(!text.contains("secret"));
    let amount = |requests, bytes| Amount { requests, bytes };
    assert_eq!(
        node.metrics.served(),
        Served { local: amount(1, 2), peers: amount(1, 2), not_here: 2, ..Served::default() }
    );
}

#[tokio::test]
async fn configuration_is_checked_and_applied_live() {
    let check = |change: fn(&mut Config)| {
        let mut config = Config::default();
        change(&mut config);
        config.check()
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert!(matches!(check(|c| c.listen = vec![([0, 0, 0, 0], 0).into()]), Err(ConfigError::NotLoopback(_))));
    let wide = |c: &mut Config| (c.listen, c.clients) = (vec![([0, 0, 0, 0], 0).into()], Clients::All);
    assert_eq!(check(wide), Ok(()));
    assert!(matches!(check(|c| c.default_registry = "a b".into()), Err(ConfigError::DefaultRegistry(_))));
    let zero = check(|c| c.manifest_deadline = Duration::ZERO).unwrap_err();
    assert_eq!(zero.to_string(), "`registry.manifest-deadline`: 0ns is not between 10ms and 1m");

    let node = Node::start(Fake::default(), |_| ());
    let mut config = Config { default_registry: "new.io".into(), ..Config::default() };
    node.server.apply(&config).unwrap();
    node.get("/v2/a/manifests/v1", "").await;
    config.blob_deadline = Duration::MAX;
    assert!(node.server.apply(&config).is_err());
    assert_eq!(*node.fake.asked.lock().unwrap(), ["new.io/a:v1"]);
    assert!(tokio::time::timeout(SOON, node.server.drain(SOON)).await.unwrap());
}
