//! A stand-in for the API server where no real one is: what an election needs of it (objects with a uid and a version that are
//! compared and swapped, a watch, a token), over TLS. Of rights it knows one that may be forbidden; it has no schemas, admission, times or storage. Tests that compare it with the
//! real one say how far it may be believed; none stands on it alone.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::client::Client;
use super::credentials::{Account, Credentials};
use crate::netns::Namespace;
use crate::scratch::Scratch;

/// As kube-apiserver's own.
const BODY_LIMIT: usize = 3 << 20;
/// Changes that a watch can begin before.
const HISTORY: usize = 1_024;
/// Objects, all in all.
const OBJECTS: usize = 10_000;
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
/// Whose token counts: an hour is longer than any demonstration.
const TOKEN_TIME: Duration = Duration::from_secs(3_600);

/// A verb and a resource: `update`, `leases`.
type Forbidden = (&'static str, &'static str);

type Body = StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

/// A running one. Dropped: gone.
pub struct StandIn {
    address: SocketAddr,
    namespace: String,
    token: String,
    admin: Client,
    frozen: watch::Sender<bool>,
    forbidden: watch::Sender<Option<Forbidden>>,
    credentials: Credentials,
    _serving: AbortOnDropHandle<()>,
    // After what uses it.
    scratch: Scratch,
}

/// What all connections share.
struct Shared {
    namespace: String,
    tokens: [String; 2],
    store: Mutex<Store>,
    version: watch::Sender<u64>,
    frozen: watch::Receiver<bool>,
    forbidden: watch::Receiver<Option<Forbidden>>,
}

/// The objects by their paths, and what happened to them.
#[derive(Clone, Default)]
struct Store {
    version: u64,
    objects: BTreeMap<String, Value>,
    history: VecDeque<Change>,
}

#[derive(Clone)]
struct Change {
    version: u64,
    path: String,
    event: Value,
}

/// What a path is about.
struct Target {
    /// `leases`, and so on.
    plural: String,
    group: String,
    namespace: String,
    /// The path of the collection.
    folder: String,
    name: Option<String>,
}

/// What is answered: a status, and an object or a Status.
type Answer = (u16, Value);

impl StandIn {
    /// Starts one with one namespace. `place`: where it runs and is reached, at port 6443; `None`: on loopback, at a free port.
    pub fn start(place: Option<(&Namespace, IpAddr)>, namespace: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        let (ip, port) = place.map_or((Ipv4Addr::LOCALHOST.into(), 0), |(_, ip)| (ip, super::PORT));
        let names = ["kubernetes.default.svc".to_owned(), ip.to_string()];
        let credentials = Credentials::make(scratch.path(), &names)?;
        let bind = move || TcpListener::bind((ip, port));
        let listener = match place {
            Some((place, _)) => place.run(bind)??,
            None => bind()?,
        };
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let until = SystemTime::now() + TOKEN_TIME;
        let token = |name: &str| credentials.token(&Account { namespace, name, uid: name }, until);
        let tokens = [token("peili")?, token("admin")?];
        let (frozen, is_frozen) = watch::channel(false);
        let (forbidden, is_forbidden) = watch::channel(None);
        let admin = Client::new(address, place.map(|(place, _)| place.clone()), credentials.nobody());
        let admin = admin.with_token(&tokens[1]);
        let shared = Arc::new(Shared {
            namespace: namespace.to_owned(),
            tokens: tokens.clone(),
            store: Mutex::default(),
            version: watch::Sender::default(),
            frozen: is_frozen,
            forbidden: is_forbidden,
        });
        let acceptor = TlsAcceptor::from(Arc::new(tls(scratch.path())?));
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let serving = AbortOnDropHandle::new(tokio::spawn(serve(shared, listener, acceptor)));
        let [token, _] = tokens;
        let namespace = namespace.to_owned();
        let all = Self {
            address,
            namespace,
            token,
            admin,
            frozen,
            forbidden,
            credentials,
            _serving: serving,
            scratch,
        };
        Ok(all)
    }

    /// `https://ADDRESS:PORT`
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// A folder with `token`, `ca.crt` and `namespace` of an account that may do everything.
    pub fn credentials(&self) -> Result<PathBuf> {
        let folder = self.scratch.path().join("account");
        self.credentials.write_volume(&folder, &self.token, &self.namespace)?;
        Ok(folder)
    }

    /// From now on connections come about and nothing is answered (`true`), or all is as ever.
    pub fn freeze(&self, freezes: bool) {
        self.frozen.send_replace(freezes);
    }

    /// From now on the account may not do this, unless a Role that is made says that it may; `None`: it may do everything. Bindings are
    /// not looked at.
    pub fn forbid(&self, forbidden: Option<(&'static str, &'static str)>) {
        self.forbidden.send_replace(forbidden);
    }

    /// A request of the administrator: the answer's status and body.
    pub async fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        self.admin.send(method, path, body).await
    }
}

fn tls(folder: &Path) -> Result<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(folder.join("server.crt"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key"))?;
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_no_client_auth();
    config.with_single_cert(chain, key).context("the certificate of the stand-in")
}

async fn serve(shared: Arc<Shared>, listener: tokio::net::TcpListener, acceptor: TlsAcceptor) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(Arc::clone(&shared), stream, acceptor.clone()));
                }
                // Out of descriptors; the next accept may go better.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(shared: Arc<Shared>, stream: tokio::net::TcpStream, acceptor: TlsAcceptor) {
    shared.thawed().await;
    let _ = stream.set_nodelay(true);
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = hyper::service::service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    let _ = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    shared.thawed().await;
    let (parts, body) = request.into_parts();
    let shown = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let is_known = |shown: &str| shared.tokens.iter().any(|token| shown == format!("Bearer {token}"));
    if !shown.is_some_and(is_known) {
        return whole(refused(401, "Unauthorized", None, "this token is of nobody"));
    }
    let Ok(body) = Limited::new(body, BODY_LIMIT).collect().await else {
        return whole(refused(413, "RequestEntityTooLarge", None, "the body is too large"));
    };
    let query = parts.uri.query().unwrap_or_default();
    let object: Option<Value> = serde_json::from_slice(&body.to_bytes()).ok();
    match (parts.uri.path(), &object) {
        ("/version", _) => return whole((200, json!({"gitVersion": "v0.0.0-stand-in"}))),
        (REVIEWS, Some(review)) => return whole((201, shared.review(review))),
        _ => {}
    }
    let Some(target) = Target::parse(parts.uri.path()) else {
        return whole(refused(404, "NotFound", None, "the server could not find the requested resource"));
    };
    if query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1") {
        return watched(shared, &target, query);
    }
    let verb = if parts.method == Method::PUT { "update" } else { "" };
    let is_account = shown == Some(&*format!("Bearer {}", shared.tokens[0]));
    if is_account && !shared.may(verb, &target.plural) {
        let text = format!(
            "{} is forbidden: the account cannot {verb} resource \"{}\"",
            target.resource(),
            target.plural
        );
        return whole(refused(403, "Forbidden", None, &text));
    }
    let is_dry = query.split('&').any(|pair| pair == "dryRun=All");
    let answer = shared.carry_out(&parts.method, &target, object, is_dry);
    shared.thawed().await;
    whole(answer)
}

fn whole((status, body): Answer) -> Response<Body> {
    let frame = Ok(Frame::data(Bytes::from(body.to_string())));
    respond(status, stream::iter([frame]).boxed())
}

fn respond(status: u16, body: BoxStream<'static, Result<Frame<Bytes>, Infallible>>) -> Response<Body> {
    let mut response = Response::new(StreamBody::new(body));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// Tells what happens to one object, or to all of a kind, after a version.
fn watched(shared: &Arc<Shared>, target: &Target, query: &str) -> Response<Body> {
    let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let name = value("fieldSelector").and_then(|selector| selector.strip_prefix("metadata.name%3D"));
    let after: u64 = value("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let seconds = value("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(1_800);
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let (folder, name) = (format!("{}/", target.folder), name.map(str::to_owned));
    let seen = (Arc::clone(shared), shared.version.subscribe(), after);
    let lines = stream::unfold(seen, move |(shared, mut versions, after)| {
        let (folder, name) = (folder.clone(), name.clone());
        async move {
            loop {
                shared.thawed().await;
                let _ = versions.borrow_and_update();
                let (last, lines) = shared.lock().since(after, |path| {
                    path.strip_prefix(&folder)
                        .is_some_and(|found| name.as_ref().is_none_or(|name| name == found))
                });
                if !lines.is_empty() {
                    return Some((Ok(Frame::data(Bytes::from(lines))), (shared, versions, last)));
                }
                let changed = tokio::time::timeout_at(end, versions.changed()).await;
                if !matches!(changed, Ok(Ok(()))) {
                    return None;
                }
            }
        }
    });
    respond(200, lines.boxed())
}

impl Shared {
    /// Waits for as long as it is frozen.
    async fn thawed(&self) {
        let _ = self.frozen.clone().wait_for(|frozen| !frozen).await;
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the account may do this.
    fn may(&self, verb: &str, resource: &str) -> bool {
        if *self.forbidden.borrow() != Some((verb, resource)) {
            return true;
        }
        let has =
            |list: &Value, wanted: &str| list.as_array().is_some_and(|all| all.contains(&json!(wanted)));
        let allows = |rule: &Value| has(&rule["verbs"], verb) && has(&rule["resources"], resource);
        let store = self.lock();
        let mut roles = store.objects.values().filter(|object| object["kind"] == "Role");
        roles.any(|role| role["rules"].as_array().is_some_and(|rules| rules.iter().any(allows)))
    }

    /// A SelfSubjectAccessReview with its answer.
    fn review(&self, review: &Value) -> Value {
        let asked = &review["spec"]["resourceAttributes"];
        let text = |name: &str| asked[name].as_str().unwrap_or_default();
        json!({"kind": review["kind"], "status": {"allowed": self.may(text("verb"), text("resource"))}})
    }

    /// `is_dry`: answers as if, and changes nothing.
    fn carry_out(&self, method: &Method, target: &Target, object: Option<Value>, is_dry: bool) -> Answer {
        if target.namespace != self.namespace {
            let text = format!("namespaces \"{}\" not found", target.namespace);
            return refused(404, "NotFound", Some(("namespaces", &target.namespace)), &text);
        }
        let mut store = self.lock();
        let before = is_dry.then(|| store.clone());
        let answer = match (method.as_str(), &target.name, object) {
            ("GET", None, _) => (200, store.list(target)),
            ("GET", Some(name), _) => store.get(target, name),
            ("POST", None, Some(object)) => store.create(target, object),
            ("PUT", Some(name), Some(object)) => store.replace(target, name, object),
            ("DELETE", Some(name), _) => store.delete(target, name),
            ("POST" | "PUT", _, None) => refused(400, "BadRequest", None, "the body is no JSON"),
            _ => refused(405, "MethodNotAllowed", None, "the stand-in does not do this"),
        };
        if let Some(before) = before {
            *store = before;
        }
        self.version.send_replace(store.version);
        answer
    }
}

impl Store {
    fn get(&self, target: &Target, name: &str) -> Answer {
        match self.objects.get(&target.path(name)) {
            Some(object) => (200, object.clone()),
            None => target.absent(name),
        }
    }

    fn list(&self, target: &Target) -> Value {
        let folder = format!("{}/", target.folder);
        let items: Vec<&Value> = self
            .objects
            .range(folder.clone()..)
            .map_while(|(path, object)| path.starts_with(&folder).then_some(object))
            .collect();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    fn create(&mut self, target: &Target, mut object: Value) -> Answer {
        let Some(name) = object["metadata"]["name"].as_str().map(str::to_owned) else {
            return refused(422, "Invalid", None, "metadata.name: Required value");
        };
        let path = target.path(&name);
        if self.objects.contains_key(&path) {
            let text = format!("{} \"{name}\" already exists", target.resource());
            return refused(409, "AlreadyExists", Some((&target.plural, &name)), &text);
        }
        if self.objects.len() >= OBJECTS {
            return refused(507, "InsufficientStorage", None, "the stand-in is full");
        }
        let uid: [u8; 16] = rand::random();
        object["metadata"]["uid"] = json!(format!("{:032x}", u128::from_be_bytes(uid)));
        object["metadata"]["namespace"] = json!(target.namespace);
        (201, self.store("ADDED", path, object))
    }

    fn replace(&mut self, target: &Target, name: &str, mut object: Value) -> Answer {
        let path = target.path(name);
        let meant = |field: &str| object["metadata"][field].as_str().filter(|text| !text.is_empty());
        let Some(now) = self.objects.get(&path) else {
            // A Lease is made by replacing it, unless a uid says which one is meant.
            return match (meant("uid"), &*target.plural) {
                (Some(_), _) => target.conflict(name, "the uid in the precondition is of no object"),
                (None, "leases") => self.create(target, object),
                (None, _) => target.absent(name),
            };
        };
        for field in ["uid", "resourceVersion"] {
            if meant(field).is_some_and(|meant| now["metadata"][field] != meant) {
                return target.conflict(name, "the object has been modified");
            }
        }
        if target.plural == "leases" && meant("resourceVersion").is_none() {
            return refused(
                422,
                "Invalid",
                None,
                "metadata.resourceVersion: must be specified for an update",
            );
        }
        for field in ["uid", "resourceVersion", "namespace"] {
            object["metadata"][field] = now["metadata"][field].clone();
        }
        if object == *now {
            return (200, object);
        }
        (200, self.store("MODIFIED", path, object))
    }

    fn delete(&mut self, target: &Target, name: &str) -> Answer {
        let path = target.path(name);
        let Some(object) = self.objects.get(&path).cloned() else { return target.absent(name) };
        self.store("DELETED", path.clone(), object);
        self.objects.remove(&path);
        (200, json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}))
    }

    fn store(&mut self, kind: &str, path: String, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let event = json!({"type": kind, "object": object});
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Change { version: self.version, path: path.clone(), event });
        self.objects.insert(path, object.clone());
        object
    }

    /// What happened after a version, as lines of a watch, and the version after them.
    fn since(&self, after: u64, is_wanted: impl Fn(&str) -> bool) -> (u64, String) {
        if self.history.front().is_some_and(|first| first.version > after + 1) && after < self.version {
            let (_, status) = refused(410, "Expired", None, "too old resource version");
            let line = json!({"type": "ERROR", "object": status});
            return (self.version, format!("{line}\n"));
        }
        let new = self.history.iter().filter(|change| change.version > after && is_wanted(&change.path));
        (self.version, new.map(|change| format!("{}\n", change.event)).collect())
    }
}

impl Target {
    /// `/api/v1/namespaces/N/PLURAL[/NAME]` or `/apis/GROUP/VERSION/namespaces/N/PLURAL[/NAME]`.
    fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        let (group, rest) = match &*parts {
            ["api", "v1", rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return None,
        };
        let (namespace, plural, name) = match rest {
            ["namespaces", namespace, plural] => (namespace, plural, None),
            ["namespaces", namespace, plural, name] => (namespace, plural, Some((*name).to_owned())),
            _ => return None,
        };
        let folder = match &name {
            Some(name) => path.strip_suffix(name.as_str())?.trim_end_matches('/').to_owned(),
            None => path.to_owned(),
        };
        let (plural, group) = ((*plural).to_owned(), group.to_owned());
        Some(Self { plural, group, namespace: (*namespace).to_owned(), folder, name })
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    fn absent(&self, name: &str) -> Answer {
        let text = format!("{} \"{name}\" not found", self.resource());
        refused(404, "NotFound", Some((&self.plural, name)), &text)
    }

    fn conflict(&self, name: &str, text: &str) -> Answer {
        refused(409, "Conflict", Some((&self.plural, name)), text)
    }
}

fn refused(status: u16, reason: &str, object: Option<(&str, &str)>, text: &str) -> Answer {
    let mut body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "message": text,
        "code": status,
    });
    if let Some((kind, name)) = object {
        body["details"] = json!({"kind": kind, "name": name});
    }
    (status, body)
}
