//! Why something is decided as it is: asked and answered over a unix socket in the node's data folder, which only its owner may
//! open. Nothing else is served there.
//!
//! `GET /pull?IMAGE`, `GET /peer?ID`, `GET /election` and `GET /election?ROLE` or `?ROLE&KEY`; the answers are JSON. An answer takes the policies' time, so there are few at once.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::client::send;
use crate::election::{self, Role};
use crate::mirror;
use crate::oci::{PeerId, Reference};
use crate::trust;

/// The socket's name in the data folder.
const NAME: &str = "explain.sock";
/// Answers at once.
const AT_ONCE: usize = 2;
/// For a connection, and for an answer.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Of an answer: what 16 policies say.
const SIZE_LIMIT: usize = 1 << 20;
/// Between two attempts to accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers about one thing.
type Explainer<Q, A> = Arc<dyn Fn(&Q) -> A + Send + Sync>;

/// Who knows the answers. They take up to 20 ms.
#[derive(Clone)]
pub struct Explainers {
    /// How an image would be mirrored.
    pub pull: Explainer<Reference, mirror::Explained>,
    /// How a peer stands; `None`: it is not known.
    pub peer: Explainer<PeerId, Option<trust::Explained>>,
    /// How elections stand.
    pub election: Explainer<(), election::Status>,
    /// Gives a role away; waits for it for a second.
    pub give_away: Explainer<Role, Result<(), String>>,
    /// Who holds a role, or a key of it; `None`: that is not known yet.
    pub role: Explainer<(Role, Option<String>), Option<election::Explained>>,
}

/// Answers as long as it lives, and takes its socket away.
#[derive(Debug)]
pub struct ExplainServer {
    path: PathBuf,
    _task: AbortOnDropHandle<()>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// Nothing listens there.
    #[error(
        "cannot connect to {}: {reason}\nhint: is peili running on this node, and are you the user that it runs as? the socket is in `node.data-dir`",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's; not its source, which would be said again behind the hint.
        reason: io::Error,
    },
    /// It took too long.
    #[error("{} did not answer within 5 s", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
    },
    /// The node says why.
    #[error("{0}")]
    Refused(String),
    /// Something else than an explanation.
    #[error("what answers at {} is not peili: {reason}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl ExplainServer {
    /// Listens in `folder`; a socket that an earlier process left there is replaced. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// It cannot be made there; a path may have 107 bytes.
    pub fn start(folder: &Path, explainers: Explainers) -> io::Result<Self> {
        let path = folder.join(NAME);
        // Nobody may open it before it is the owner's alone.
        let new = folder.join(format!(".{NAME}"));
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&new, &path)?;
        let task = AbortOnDropHandle::new(tokio::spawn(accept(listener, explainers)));
        Ok(Self { path, _task: task })
    }
}

impl Drop for ExplainServer {
    fn drop(&mut self) {
        // One that is left is replaced by the next process.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, explainers: Explainers) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the explain socket cannot accept");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let explainers = explainers.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let service = hyper::service::service_fn(move |request| answer(explainers.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(TIME_LIMIT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // An error is a client that went away.
            let _ = tokio::time::timeout(2 * TIME_LIMIT, connection).await;
        });
    }
}

async fn answer(explainers: Explainers, request: Request<Incoming>) -> http::Result<Response<Full<Bytes>>> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let path = request.uri().path().to_owned();
    let is_get = request.method() == Method::GET;
    let is_post = request.method() == Method::POST;
    // Policies run on the thread of who asks.
    let explained = tokio::task::spawn_blocking(move || match path.as_str() {
        "/pull" if is_get => match query.parse::<Reference>() {
            Ok(image) => json(&(explainers.pull)(&image)),
            Err(error) => (StatusCode::BAD_REQUEST, error.to_string()),
        },
        "/peer" if is_get => match query.parse::<PeerId>() {
            Ok(peer) => match (explainers.peer)(&peer) {
                Some(explained) => json(&explained),
                None => (StatusCode::NOT_FOUND, format!("no peer {peer} ever said who it is")),
            },
            Err(error) => (StatusCode::BAD_REQUEST, error.to_string()),
        },
        "/election" if is_get && query.is_empty() => json(&(explainers.election)(&())),
        "/election" if is_get => {
            let (name, key) = query.split_once('&').map_or((&*query, None), |(name, key)| (name, Some(key)));
            match Role::named(name) {
                Some(role) => match (explainers.role)(&(role, key.map(str::to_owned))) {
                    Some(explained) => json(&explained),
                    None => (StatusCode::NOT_FOUND, "it is not known yet who holds what".to_owned()),
                },
                None => no_role(name),
            }
        }
        "/election/yield" if is_post => match Role::named(&query) {
            Some(role) => match (explainers.give_away)(&role) {
                Ok(()) => json(&()),
                Err(reason) => (StatusCode::CONFLICT, reason),
            },
            None => no_role(&query),
        },
        _ => (
            StatusCode::NOT_FOUND,
            "there are GET /pull?IMAGE, /peer?ID and /election?ROLE&KEY, and POST /election/yield?ROLE"
                .to_owned(),
        ),
    });
    let (status, text) = explained.await.unwrap_or_else(|error| {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("it cannot be explained: {error}"))
    });
    Response::builder().status(status).body(Full::new(text.into()))
}

fn no_role(name: &str) -> (StatusCode, String) {
    let names = Role::ALL.map(Role::name).join(", ");
    (StatusCode::NOT_FOUND, format!("there is no role `{name}`\nhint: the roles are {names}"))
}

fn json(explained: &impl Serialize) -> (StatusCode, String) {
    match serde_json::to_string(explained) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// Asks the node with this data folder how it would mirror `image`.
///
/// # Errors
/// Why there is no answer, with a hint.
pub async fn explain_pull(folder: &Path, image: &Reference) -> Result<mirror::Explained, ExplainError> {
    ask(&folder.join(NAME), &format!("/pull?{image}")).await
}

/// Asks the node with this data folder how `peer` stands.
///
/// # Errors
/// Why there is no answer, with a hint.
pub async fn explain_peer(folder: &Path, peer: &PeerId) -> Result<trust::Explained, ExplainError> {
    ask(&folder.join(NAME), &format!("/peer?{peer}")).await
}

/// Asks the node with this data folder how its elections stand.
///
/// # Errors
/// Why there is no answer, with a hint.
pub async fn election_status(folder: &Path) -> Result<election::Status, ExplainError> {
    ask(&folder.join(NAME), "/election").await
}

/// Asks the node with this data folder who holds a role, or a key of it.
///
/// # Errors
/// Why there is no answer, with a hint.
pub async fn explain_role(
    folder: &Path,
    role: &str,
    key: Option<&str>,
) -> Result<election::Explained, ExplainError> {
    let key = key.map(|key| format!("&{key}")).unwrap_or_default();
    ask(&folder.join(NAME), &format!("/election?{role}{key}")).await
}

/// Has the node with this data folder give a role away.
///
/// # Errors
/// Why it did not, with a hint.
pub async fn yield_role(folder: &Path, role: &str) -> Result<(), ExplainError> {
    let path = folder.join(NAME);
    let answer =
        tokio::time::timeout(TIME_LIMIT, exchange(&path, (Method::POST, &format!("/election/yield?{role}"))))
            .await;
    answer.map_err(|_| ExplainError::Timeout { path: path.clone() })?
}

async fn ask<T: DeserializeOwned>(path: &Path, question: &str) -> Result<T, ExplainError> {
    let answer = tokio::time::timeout(TIME_LIMIT, exchange(path, (Method::GET, question))).await;
    answer.map_err(|_| ExplainError::Timeout { path: path.to_owned() })?
}

async fn exchange<T: DeserializeOwned>(path: &Path, question: (Method, &str)) -> Result<T, ExplainError> {
    let stream = UnixStream::connect(path)
        .await
        .map_err(|reason| ExplainError::Connect { path: path.to_owned(), reason })?;
    let wrong = |reason: String| ExplainError::Answer { path: path.to_owned(), reason };
    let (status, body) = send(stream, "localhost", question, SIZE_LIMIT).await.map_err(wrong)?;
    match status {
        StatusCode::OK => serde_json::from_slice(&body).map_err(|error| wrong(error.to_string())),
        _ => Err(ExplainError::Refused(String::from_utf8_lossy(&body).into_owned())),
    }
}
