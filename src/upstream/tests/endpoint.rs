//! Upstreams of the configuration on real sockets: who is told the password, and what a refusal means for all else.

use std::sync::Mutex;

use super::*;
use crate::oci::Health;
use crate::upstream::metrics::Metrics;
use crate::upstream::named::{self, Named};
use crate::upstream::{FetchError, Route, Upstreams, Want};

/// A server that answers each request by a function of its head, and remembers the heads.
pub(super) struct Server {
    pub(super) address: String,
    seen: Arc<Mutex<Vec<String>>>,
    _task: JoinHandle<()>,
}

impl Server {
    pub(super) async fn start(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                let head = String::from_utf8(head).unwrap().to_lowercase();
                let text = answer(&head);
                kept.lock().unwrap().push(head);
                let _ = stream.write_all(text.as_bytes()).await;
            }
        });
        Self { address, seen, _task: task }
    }

    fn asked(&self, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|head| head.contains(part)).count()
    }
}

/// A head, and a body that ends with the connection.
fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}", body.len())
}

/// An upstream at `server`, whose password is for it.
fn named(server: &Server, folder: &std::path::Path) -> Named {
    let credentials = folder.join("config.json");
    let auths = serde_json::json!({"auths": {&server.address: {"username": "me", "password": "secret"}}});
    fs::write(&credentials, auths.to_string()).unwrap();
    let named = Named::new(Metrics::default());
    named.reconfigure(&[named::Config {
        name: "corp".into(),
        address: format!("http://{}", server.address),
        ca: None,
        credentials: Some(credentials),
        repositories: vec!["team".into()],
    }]);
    named
}

async fn fetch(named: &Named, repository: &str) -> Result<(), FetchError> {
    let route = Route { upstream: "corp".into(), repository: repository.parse().unwrap() };
    let digest = crate::oci::Digest::sha256(b"content");
    let want = Want { digest, is_manifest: false, start: 0, end: None, head: false };
    named.fetch(&route, &want).await.map(drop)
}

#[tokio::test]
async fn who_is_asked_by_a_redirect_is_not_told_who_asks() {
    let own = Arc::new(Mutex::new(String::new()));
    let realm = Arc::clone(&own);
    let storage = Server::start(move |_| {
        let realm = realm.lock().unwrap().clone();
        answer(
            "401 Unauthorized",
            &format!("WWW-Authenticate: Bearer realm=\"http://{realm}/token\"\r\n"),
            "",
        )
    })
    .await;
    let elsewhere = storage.address.clone();
    let registry = Server::start(move |_| {
        answer("307 Temporary Redirect", &format!("Location: http://{elsewhere}/x\r\n"), "")
    })
    .await;
    own.lock().unwrap().clone_from(&registry.address);
    let folder = tempfile::tempdir().unwrap();
    let result = fetch(&named(&registry, folder.path()), "team/app").await;
    assert!(matches!(result, Err(FetchError::Refused(_))), "{result:?}");
    assert_eq!(
        (storage.asked("get /x"), registry.asked("/token"), storage.asked("authorization")),
        (1, 0, 0)
    );
}

/// What one repository is refused, by the registry or by who gives its tokens, keeps nobody from another one; an old token is
/// replaced also where the registry says 403 of it.
#[tokio::test]
async fn a_refusal_is_of_one_repository() {
    let tokens = AtomicUsize::new(0);
    let registry = Server::start(move |head| {
        let host = head.split("host: ").nth(1).unwrap().split("\r\n").next().unwrap();
        let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n");
        if head.contains("scope=repository%3ateam%2fnone") {
            return answer("403 Forbidden", "", "");
        }
        if head.starts_with("get /token") {
            assert!(head.contains("authorization: basic "));
            let number = tokens.fetch_add(1, Ordering::SeqCst);
            return answer("200 OK", "", &format!("{{\"token\": \"number-{number}\"}}"));
        }
        match head.split("authorization: ").nth(1) {
            None => answer("401 Unauthorized", &challenge, ""),
            // It has ended.
            Some(token) if token.starts_with("bearer number-0") && head.contains("range") => {
                answer("403 Forbidden", "", "")
            }
            Some(_) => answer("200 OK", "", "content"),
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let named = named(&registry, folder.path());
    let refused = fetch(&named, "team/none").await;
    assert!(
        matches!(&refused, Err(FetchError::Refused(reason)) if reason.contains("token server")),
        "{refused:?}"
    );
    assert_eq!(fetch(&named, "team/app").await, Ok(()), "another repository");
    assert_eq!(named.known()[0].state.health, Health::Healthy);
    let route = Route { upstream: "corp".into(), repository: "team/app".parse().unwrap() };
    let digest = crate::oci::Digest::sha256(b"content");
    let want = Want { digest, is_manifest: false, start: 3, end: None, head: false };
    assert!(named.fetch(&route, &want).await.is_ok(), "with a new token");
    assert_eq!(registry.asked("get /token?scope=repository%3ateam%2fapp"), 2);
    assert_eq!(fetch(&named, "other/app").await, Err(FetchError::Unknown), "beside the prefixes");
}

#[tokio::test]
async fn a_pause_that_is_asked_for_is_kept() {
    let registry = Server::start(|_| answer("429 Too Many Requests", "Retry-After: 20\r\n", "")).await;
    let folder = tempfile::tempdir().unwrap();
    let named = named(&registry, folder.path());
    for _ in 0..3 {
        assert_eq!(fetch(&named, "team/app").await, Err(FetchError::Held));
    }
    assert_eq!(registry.asked("get /v2/"), 1);
    assert_eq!(named.known()[0].state.health, Health::RateLimited);
}
