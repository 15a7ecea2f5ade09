//! Pulls from a small registry that counts, cuts, lies and refuses.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use http::{Request, Response, StatusCode};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::oci::{Algorithm, RangeHeader};

mod bounds;

const REPOSITORY: &str = "team/app";
const NAME: &str = "registry.test:5000/team/app:v1";

/// What a registry does wrong.
#[derive(Clone, Debug, Default)]
struct Fault {
    /// Every answer has this status.
    status: Option<u16>,
    /// Bodies of blobs end after so many bytes, so many times.
    cut: Option<(usize, usize)>,
    /// Blobs have their first byte flipped.
    lie: bool,
    /// Blobs have bytes after their end.
    longer: bool,
    /// A range is answered by the whole content.
    ignore_range: bool,
    /// HEAD has no `Docker-Content-Digest`.
    no_digest: bool,
    /// Requests need this token.
    token: Option<&'static str>,
    /// Tokens are given by the registry of this URL; `None`: by this one.
    realm: Option<String>,
    /// Nothing is answered.
    hang: bool,
    /// Blobs are never answered.
    hold_blobs: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    line: String,
    query: Option<String>,
    range: Option<String>,
    key: Option<String>,
}

struct Registry {
    url: String,
    state: Arc<State>,
    _server: JoinSet<()>,
}

struct State {
    contents: HashMap<String, (String, Bytes)>,
    fault: Mutex<Fault>,
    seen: Mutex<Vec<Seen>>,
    url: String,
}

type Body = StreamBody<BoxStream<'static, Result<Frame<Bytes>, io::Error>>>;

impl Registry {
    async fn start(image: &Image, fault: Fault) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/v2", listener.local_addr().unwrap());
        let state = Arc::new(State {
            contents: image.contents.clone(),
            fault: Mutex::new(fault),
            seen: Mutex::default(),
            url: url.clone(),
        });
        let mut server = JoinSet::new();
        let shared = Arc::clone(&state);
        server.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                connections.spawn(async move {
                    let service =
                        hyper::service::service_fn(move |request| answer(Arc::clone(&state), request));
                    drop(
                        hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(socket), service)
                            .await,
                    );
                });
            }
        });
        Self { url, state, _server: server }
    }

    fn host(&self) -> Host {
        host(&self.url)
    }

    fn lines(&self) -> Vec<String> {
        self.state.seen.lock().unwrap().iter().map(|seen| seen.line.clone()).collect()
    }

    fn ranges(&self) -> Vec<String> {
        self.state.seen.lock().unwrap().iter().filter_map(|seen| seen.range.clone()).collect()
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let text = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let (method, path, range) = (request.method().clone(), request.uri().path().to_owned(), text("range"));
    let line = format!("{method} {}", path.trim_start_matches("/v2/team/app/"));
    let query = request.uri().query().map(ToOwned::to_owned);
    state.seen.lock().unwrap().push(Seen {
        line,
        query: query.clone(),
        range: range.clone(),
        key: text("x-api-key"),
    });
    let fault = state.fault.lock().unwrap().clone();
    if fault.hang || fault.hold_blobs && path.contains("/blobs/") {
        std::future::pending::<()>().await;
    }
    let empty = |status: u16| Response::builder().status(status).body(body(Bytes::new(), None)).unwrap();
    if path == "/v2/token" {
        assert_eq!(query.as_deref(), Some("scope=repository%3Ateam%2Fapp%3Apull&service=test"));
        let token = json!({ "token": fault.token }).to_string();
        return Ok(Response::new(body(token.into(), None)));
    }
    if let Some(token) = fault.token
        && text("authorization") != Some(format!("Bearer {token}"))
    {
        let realm = fault.realm.as_ref().unwrap_or(&state.url);
        let challenge = format!("Bearer realm=\"{realm}/token\",service=\"test\"");
        let mut response = empty(401);
        response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
        return Ok(response);
    }
    if let Some(status) = fault.status {
        return Ok(empty(status));
    }
    let Some((media_type, content)) = state.contents.get(path.trim_start_matches("/v2/")) else {
        return Ok(empty(404));
    };
    let is_blob = path.contains("/blobs/");
    let mut content = content.clone();
    let size = content.len() as u64;
    let mut response = Response::builder().header("content-type", media_type);
    if !fault.no_digest {
        response = response.header("docker-content-digest", Digest::sha256(&content).to_string());
    }
    if is_blob && fault.lie {
        let mut wrong = content.to_vec();
        wrong[0] ^= 1;
        content = wrong.into();
    }
    if is_blob && fault.longer {
        content = [&content[..], b"surplus"].concat().into();
        return Ok(response.body(body(content, None)).unwrap());
    }
    let range = range.filter(|_| !fault.ignore_range).and_then(|range| RangeHeader::parse(&range));
    if let Some(range) = range {
        let range = range.resolve(size).unwrap();
        response =
            response.status(StatusCode::PARTIAL_CONTENT).header("content-range", range.content_range(size));
        content = content.slice(usize::try_from(range.start).unwrap()..);
    }
    response = response.header("content-length", content.len());
    let cut = match &mut state.fault.lock().unwrap().cut {
        Some((after, times)) if is_blob && *times > 0 && content.len() > *after => {
            *times -= 1;
            Some(*after)
        }
        _ => None,
    };
    Ok(response.body(body(content, cut)).unwrap())
}

/// The content, ended by a closed connection after `cut` bytes.
fn body(content: Bytes, cut: Option<usize>) -> Body {
    let frame = |bytes| Ok(Frame::data(bytes));
    let stream = match cut {
        None => stream::iter(vec![frame(content)]).boxed(),
        Some(cut) => {
            let wait = async {
                // So that the bytes before are on their way when the connection ends.
                tokio::task::yield_now().await;
                Err(io::Error::other("cut"))
            };
            stream::iter(vec![frame(content.slice(..cut))]).chain(stream::once(wait)).boxed()
        }
    };
    StreamBody::new(stream)
}

/// An image and everything that a registry has of it.
#[derive(Default)]
struct Image {
    contents: HashMap<String, (String, Bytes)>,
    layers: Vec<Digest>,
    root: Option<Digest>,
}

impl Image {
    fn blob(&mut self, algorithm: Algorithm, media_type: &str, content: Vec<u8>) -> Value {
        let digest = Digest::of(algorithm, &content);
        let size = content.len();
        self.contents.insert(
            format!("{REPOSITORY}/blobs/{digest}"),
            ("application/octet-stream".into(), content.into()),
        );
        json!({ "digest": digest, "size": size, "mediaType": media_type })
    }

    fn manifest(&mut self, media_type: &str, content: &Value, tag: Option<&str>) -> Value {
        let content = content.to_string().into_bytes();
        let (digest, size) = (Digest::sha256(&content), content.len());
        let stored = (media_type.to_owned(), Bytes::from(content));
        if let Some(tag) = tag {
            self.contents.insert(format!("{REPOSITORY}/manifests/{tag}"), stored.clone());
            self.root = Some(digest);
        }
        self.contents.insert(format!("{REPOSITORY}/manifests/{digest}"), stored);
        json!({ "digest": digest, "size": size, "mediaType": media_type })
    }

    fn image(&mut self, seed: u8, layers: &[(Algorithm, usize)], tag: Option<&str>) -> Value {
        let config =
            self.blob(Algorithm::Sha256, "application/vnd.oci.image.config.v1+json", vec![b'c', seed]);
        let layers: Vec<Value> = layers
            .iter()
            .enumerate()
            .map(|(i, (algorithm, size))| {
                let content = (0..*size).map(|at| (at * 7 + i * 13) as u8 ^ seed).collect();
                let layer = self.blob(*algorithm, "application/vnd.oci.image.layer.v1.tar+zstd", content);
                self.layers.push(layer["digest"].as_str().unwrap().parse().unwrap());
                layer
            })
            .collect();
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.manifest(MANIFEST_MEDIA_TYPES[1], &manifest, tag)
    }

    /// One layer of each size, sha256.
    fn plain(sizes: &[usize]) -> Self {
        let mut image = Self::default();
        let layers: Vec<_> = sizes.iter().map(|size| (Algorithm::Sha256, *size)).collect();
        image.image(1, &layers, Some("v1"));
        image
    }
}

fn host(url: &str) -> Host {
    Host::new(&crate::upstream::hosts::Host::new(url)).unwrap()
}

fn options(path: &Path, hosts: Vec<Host>) -> Options {
    Options {
        header_limit: Duration::from_millis(500),
        stall_limit: Duration::from_millis(500),
        ..Options::new(NAME.parse().unwrap(), hosts, Destination::Layout(path.to_owned()))
    }
}

/// Every blob file has the content of its name, and nothing unfinished is left.
fn check_layout(path: &Path, expected: usize) {
    let mut count = 0;
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        for entry in std::fs::read_dir(path.join("blobs").join(algorithm.as_str())).unwrap() {
            let entry = entry.unwrap();
            let digest = Digest::of(algorithm, &std::fs::read(entry.path()).unwrap());
            assert_eq!(digest.hex(), entry.file_name().to_str().unwrap());
            count += 1;
        }
    }
    assert_eq!(count, expected);
    let left: Vec<_> =
        std::fs::read_dir(path.join("ingest")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["index.lock"]);
}

fn index(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path.join("index.json")).unwrap()).unwrap()
}

fn layer(summary: &Summary, image: &Image, i: usize) -> Fetched {
    summary.contents.iter().find(|content| content.digest == image.layers[i]).unwrap().clone()
}

#[tokio::test]
async fn asks_as_containerd_does() {
    let image = Image::plain(&[100_000, 5]);
    let registry = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let summary = pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap();

    let root = image.root.unwrap();
    assert_eq!(registry.lines()[..2], ["HEAD manifests/v1".to_owned(), format!("GET manifests/{root}")]);
    assert_eq!(registry.lines().len(), 2 + 3);
    let namespaces: Vec<_> =
        registry.state.seen.lock().unwrap().iter().map(|seen| seen.query.clone()).collect();
    assert!(
        namespaces.iter().all(|query| query.as_deref() == Some("ns=registry.test%3A5000")),
        "{namespaces:?}"
    );
    assert_eq!((summary.digest, summary.resolved_by.as_str()), (root, registry.url.as_str()));
    assert_eq!(summary.contents.len(), 4);
    assert_eq!(layer(&summary, &image, 0).parts, [Part { host: registry.url.clone(), bytes: 100_000 }]);
    check_layout(folder.path(), 4);
    assert_eq!(
        index(folder.path())["manifests"],
        json!([{
            "mediaType": MANIFEST_MEDIA_TYPES[1], "digest": root, "size": image.contents[&format!("{REPOSITORY}/manifests/v1")].1.len(),
            "annotations": { "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "v1" },
        }])
    );

    let again = pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap();
    assert_eq!(again.bytes, 0);
    assert!(again.contents.iter().all(|content| content.held));
    assert_eq!(registry.lines().len(), 2 + 3 + 1, "only the tag is asked for again");
    assert_eq!(index(folder.path())["manifests"].as_array().unwrap().len(), 1, "the same name is replaced");
    let json = serde_json::to_value(&again).unwrap();
    assert_eq!(json["digest"], json!(root));
}

#[tokio::test]
async fn next_host_after_any_failure() {
    let image = Image::plain(&[1000]);
    let good = Registry::start(&image, Fault::default()).await;
    let unused = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    let faults =
        [404, 400, 401, 429, 500, 503].map(|status| Fault { status: Some(status), ..Fault::default() });
    for fault in faults.into_iter().chain([Fault { hang: true, ..Fault::default() }]) {
        let folder = tempfile::tempdir().unwrap();
        let bad = Registry::start(&image, fault.clone()).await;
        let refuses = host(&format!("http://{unused}/v2"));
        let mut pull_only = bad.host();
        pull_only.resolve = false;
        let hosts = vec![refuses, bad.host(), pull_only, good.host()];
        let summary = pull(options(folder.path(), hosts), &Silent).await.unwrap();
        assert_eq!(summary.failures.len(), 2, "{fault:?}: {:?}", summary.failures);
        assert_eq!(layer(&summary, &image, 0).failures.len(), 3);
        assert_eq!(layer(&summary, &image, 0).parts, [Part { host: good.url.clone(), bytes: 1000 }]);
        check_layout(folder.path(), 3);
    }
}

#[tokio::test]
async fn a_cut_body_is_resumed_on_the_same_host() {
    let image = Image::plain(&[500_000]);
    for ignore_range in [false, true] {
        let fault = Fault { cut: Some((100_000, 2)), ignore_range, ..Fault::default() };
        let registry = Registry::start(&image, fault).await;
        let folder = tempfile::tempdir().unwrap();
        let other = Registry::start(&image, Fault::default()).await;
        let hosts = vec![registry.host(), other.host()];
        let summary = pull(options(folder.path(), hosts), &Silent).await.unwrap();
        let layer = layer(&summary, &image, 0);
        assert_eq!((layer.resumed, layer.failures.len()), (2, 0));
        assert_eq!(
            layer.parts,
            [Part { host: registry.url.clone(), bytes: 500_000 }],
            "no byte is taken twice"
        );
        assert_eq!(other.lines(), Vec::<String>::new());
        if !ignore_range {
            assert_eq!(registry.ranges(), ["bytes=100000-", "bytes=200000-"]);
        }
        check_layout(folder.path(), 3);
    }
}

#[tokio::test]
async fn a_host_that_always_cuts_is_left_with_its_bytes_kept() {
    let image = Image::plain(&[500_000]);
    let cuts = Registry::start(&image, Fault { cut: Some((1000, 1000)), ..Fault::default() }).await;
    let good = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let summary = pull(options(folder.path(), vec![cuts.host(), good.host()]), &Silent).await.unwrap();
    let layer = layer(&summary, &image, 0);
    assert_eq!(good.ranges(), ["bytes=6000-"], "the first body and five resumes");
    assert_eq!(
        layer.parts,
        [Part { host: cuts.url.clone(), bytes: 6000 }, Part { host: good.url.clone(), bytes: 494_000 }]
    );
    check_layout(folder.path(), 3);
}

#[tokio::test]
async fn wrong_bytes_lead_to_the_next_host_from_byte_0() {
    let image = Image::plain(&[100_000]);
    for fault in [Fault { lie: true, ..Fault::default() }, Fault { longer: true, ..Fault::default() }] {
        let liar = Registry::start(&image, fault.clone()).await;
        let good = Registry::start(&image, Fault::default()).await;
        let folder = tempfile::tempdir().unwrap();
        let summary = pull(options(folder.path(), vec![liar.host(), good.host()]), &Silent).await.unwrap();
        assert_eq!(layer(&summary, &image, 0).failures.len(), 1, "{fault:?}");
        check_layout(folder.path(), 3);

        let alone = tempfile::tempdir().unwrap();
        let error = pull(options(alone.path(), vec![liar.host()]), &Silent).await.unwrap_err();
        assert!(matches!(error, Error::NotFetched { .. }), "{error}");
        assert!(!alone.path().join("index.json").exists(), "an image that is not whole is not named");
    }
}

/// A liar that is cut poisons the prefix; the honest host after it must not be blamed.
#[tokio::test]
async fn a_poisoned_prefix_is_fetched_again_from_the_same_host() {
    let image = Image::plain(&[100_000]);
    let liar = Registry::start(&image, Fault { lie: true, cut: Some((100, 1000)), ..Fault::default() }).await;
    let good = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let summary = pull(options(folder.path(), vec![liar.host(), good.host()]), &Silent).await.unwrap();
    let layer = layer(&summary, &image, 0);
    assert_eq!(layer.failures.len(), 1, "{:?}", layer.failures);
    assert_eq!(layer.parts[1], Part { host: good.url.clone(), bytes: 100_000 - 600 + 100_000 });
    check_layout(folder.path(), 3);
}

#[tokio::test]
async fn a_later_pull_goes_on_where_the_first_ended() {
    let image = Image::plain(&[100_000]);
    let cuts = Registry::start(&image, Fault { cut: Some((1000, 1000)), ..Fault::default() }).await;
    let good = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    pull(options(folder.path(), vec![cuts.host()]), &Silent).await.unwrap_err();
    let summary = pull(options(folder.path(), vec![good.host()]), &Silent).await.unwrap();
    assert_eq!(layer(&summary, &image, 0).kept, 6000);
    assert_eq!(good.ranges(), ["bytes=6000-"]);
    check_layout(folder.path(), 3);

    // What has rotted in the layout is fetched again.
    let blob = folder.path().join("blobs/sha256").join(image.layers[0].hex());
    std::fs::write(&blob, vec![0; 100_000]).unwrap();
    let summary = pull(options(folder.path(), vec![good.host()]), &Silent).await.unwrap();
    assert_eq!(summary.bytes, 100_000);
    check_layout(folder.path(), 3);
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_where_it_is_asked_for() {
    let image = Image::plain(&[1000]);
    let registry = Registry::start(&image, Fault { token: Some("abc"), ..Fault::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap();
    let tokens = registry.lines().iter().filter(|line| line.contains("token")).count();
    assert_eq!(tokens, 1, "one token serves the whole pull");
    check_layout(folder.path(), 3);
}

#[tokio::test]
async fn indexes_give_one_platform_or_all() {
    let mut image = Image::default();
    let mut entries: Vec<Value> = ["amd64", "arm64"]
        .iter()
        .enumerate()
        .map(|(i, architecture)| {
            let layers = [(Algorithm::Sha512, 3000), (Algorithm::Sha256, 10)];
            let mut entry = image.image(u8::try_from(i).unwrap(), &layers, None);
            entry["platform"] = json!({ "os": "linux", "architecture": architecture });
            entry
        })
        .collect();
    entries[1] = {
        // An index within the index.
        let inner = json!({ "schemaVersion": 2, "manifests": [entries[1]] });
        let mut entry = image.manifest(MANIFEST_MEDIA_TYPES[0], &inner, None);
        entry["platform"] = json!({ "os": "linux", "architecture": "arm64" });
        entry
    };
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    image.manifest(MANIFEST_MEDIA_TYPES[0], &index, Some("v1"));
    let registry = Registry::start(&image, Fault { no_digest: true, ..Fault::default() }).await;

    let mut counts = BTreeMap::new();
    for platforms in ["linux/amd64", "linux/arm64", "all"] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path(), vec![registry.host()]);
        options.platforms = platforms.parse().map_or(Platforms::All, Platforms::One);
        let summary = pull(options, &Silent).await.unwrap();
        assert_eq!(summary.digest, image.root.unwrap(), "the index is what the name stands for");
        check_layout(folder.path(), summary.contents.len());
        counts.insert(platforms, summary.contents.len());
    }
    assert_eq!(counts, [("all", 1 + 4 + 1 + 4), ("linux/amd64", 1 + 4), ("linux/arm64", 1 + 1 + 4)].into());

    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), vec![registry.host()]);
    options.platforms = Platforms::One("linux/s390x".parse().unwrap());
    assert!(matches!(pull(options, &Silent).await, Err(Error::Platform { .. })));
}

#[tokio::test]
async fn several_pulls_share_a_layout() {
    let image = Image::plain(&[300_000, 200_000, 7]);
    let registry = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut pulls = JoinSet::new();
    for i in 0..6 {
        let mut options = options(folder.path(), vec![registry.host()]);
        options.reference = format!("registry{i}.test/team/app:v1").parse().unwrap();
        pulls.spawn(async move { pull(options, &Silent).await.unwrap() });
    }
    pulls.join_all().await;
    let blobs = registry.lines().iter().filter(|line| line.starts_with("GET blobs/")).count();
    assert_eq!(blobs, 4, "each blob is fetched once");
    assert_eq!(index(folder.path())["manifests"].as_array().unwrap().len(), 6);
    check_layout(folder.path(), 5);
}

#[tokio::test]
async fn discarding_counts_or_verifies() {
    let image = Image::plain(&[300_000]);
    let liar = Registry::start(&image, Fault { lie: true, ..Fault::default() }).await;
    let discard = |verify| {
        let mut options = options(Path::new(""), vec![liar.host()]);
        options.destination = Destination::Discard { verify };
        options
    };
    let counted = pull(discard(false), &Silent).await.unwrap();
    assert_eq!(layer(&counted, &image, 0).parts[0].bytes, 300_000);
    assert!(matches!(pull(discard(true), &Silent).await, Err(Error::NotFetched { .. })));
}

#[tokio::test]
async fn refuses_what_is_no_layout() {
    let image = Image::plain(&[1]);
    let registry = Registry::start(&image, Fault::default()).await;
    let check = async |file: &str, content: &str, expected: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), content).unwrap();
        let error =
            pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(std::fs::read_to_string(folder.path().join(file)).unwrap(), content);
    };
    check("notes.txt", "mine", "not an OCI image layout, and not empty").await;
    check("oci-layout", r#"{"imageLayoutVersion":"2.0.0"}"#, "not an image layout of version 1").await;
    check("index.json", r#"{"manifests":[}"#, "not JSON").await;
    let error = pull(options(Path::new("/proc/none/x"), Vec::new()), &Silent).await.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let error = pull(options(folder.path(), Vec::new()), &Silent).await.unwrap_err().to_string();
    assert_eq!(error, format!("no host resolves {NAME}: no host is configured for it"));
}
