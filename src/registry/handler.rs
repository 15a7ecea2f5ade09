//! From a request to its answer: one deadline, one count, one cause.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::FutureExt as _;
use http::header::RANGE;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::{Instant, timeout};

use super::metrics::{self, Outcome};
use super::respond::{self, Cause, Kind};
use super::route::Route;
use super::{Backend, Config, ConfigError, Lists, Metrics, lists};
use crate::listener::{Body, Overloaded};
use crate::mirror::{Answer, BlobRequest, NotHere, Refusal, Target};
use crate::oci::{Name, RangeError, RangeHeader, Registry};
use crate::policy::Reason;
use crate::telemetry::Causes;

/// Bounds of the deadlines.
const DEADLINES: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);

/// What the backend may take beyond its deadline to say so.
const MARGIN: Duration = Duration::from_millis(20);

/// What a request needs of the configuration.
pub(super) struct Settings {
    default_registry: Registry,
    lists: Lists,
    manifest_deadline: Duration,
    blob_deadline: Duration,
}

pub(super) struct Handler {
    pub(super) settings: Arc<ArcSwap<Settings>>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) metrics: Metrics,
    pub(super) causes: Arc<Causes>,
}

/// Counts a request as long as its answer is not complete.
struct InFlight(Gauge);

/// An answer, and how it is counted.
struct Answered {
    response: Response<Body>,
    outcome: &'static str,
    source: &'static str,
}

/// How a request ends without content.
enum Refused {
    Cause(Cause),
    Denied(Reason),
    Range(RangeError),
}

impl Settings {
    pub(super) fn new(config: &Config) -> Result<Self, ConfigError> {
        let deadline = |setting, value| {
            if DEADLINES.contains(&value) { Ok(value) } else { Err(ConfigError::Deadline { setting, value }) }
        };
        Ok(Self {
            default_registry: config.default_registry.parse().map_err(ConfigError::DefaultRegistry)?,
            lists: config.lists,
            manifest_deadline: deadline("manifest-deadline", config.manifest_deadline)?,
            blob_deadline: deadline("blob-deadline", config.blob_deadline)?,
        })
    }
}

impl InFlight {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Handler {
    /// Answers a request, whatever happens.
    pub(super) async fn answer(self: Arc<Self>, request: Parts) -> Response<Body> {
        let start = Instant::now();
        let in_flight = InFlight::new(&self.metrics.in_flight);
        let settings = self.settings.load_full();
        let head = request.method == Method::HEAD;
        let method = match request.method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            _ => "other",
        };
        let route = Route::parse(&request.uri, &settings.default_registry);
        let (kind, deadline) = match &route {
            Ok(Route::Manifest(..)) => (Kind::Manifest, settings.manifest_deadline),
            Ok(Route::Blob(..)) => (Kind::Blob, settings.blob_deadline),
            _ => (Kind::Other, settings.manifest_deadline),
        };
        let subject = subject(&route);
        let work = async {
            match route {
                _ if request.extensions.get::<Overloaded>().is_some() => {
                    Err(Refused::Cause(Cause::Overloaded))
                }
                _ if method == "other" => Err(Refused::Cause(Cause::Method)),
                Ok(route) => self.route(route, &request, &settings, head, deadline).await,
                Err(malformed) => Err(Refused::Cause(Cause::Malformed(malformed))),
            }
        };
        // The backend keeps to the deadline itself, and knows what to say then.
        let at_most = deadline.max(self.backend.allowance()) + MARGIN;
        let answered = match bound(at_most, work).await {
            Ok(answered) => answered,
            Err(Refused::Range(error)) => {
                Answered { response: respond::range(error, head), outcome: "range", source: "none" }
            }
            Err(Refused::Denied(reason)) => {
                self.causes.note(kind.as_str(), respond::DENIED, &subject);
                let response = respond::denied(&reason, head);
                Answered { response, outcome: respond::DENIED, source: "none" }
            }
            Err(Refused::Cause(cause)) => {
                self.causes.note(kind.as_str(), cause.label(), &subject);
                tracing::debug!(kind = kind.as_str(), cause = cause.label(), subject, "not here");
                let response = respond::not_here(kind, &cause, head);
                Answered { response, outcome: cause.label(), source: "none" }
            }
        };
        let Answered { response, outcome, source } = answered;
        let outcome = Outcome { kind: kind.as_str(), method, outcome, source };
        self.metrics.finish(outcome, start.elapsed().as_secs_f64());
        response.map(|body| body.guarded(in_flight))
    }

    async fn route(
        &self,
        route: Route,
        request: &Parts,
        settings: &Settings,
        head: bool,
        deadline: Duration,
    ) -> Result<Answered, Refused> {
        let held = settings.lists == Lists::Held;
        match route {
            Route::Base => {
                let body = Bytes::from_static(b"{}");
                Ok(Answered::here(respond::json(StatusCode::OK, "application/json", body, head)))
            }
            Route::Manifest(_, Target::Tag(tag)) if tag.is_referrers() && !held => {
                Err(NotHere::Unsupported.into())
            }
            Route::Manifest(name, target) => {
                let answer = self.backend.manifest(&name, &target, head, deadline).await?;
                Ok(self.content(answer, &name, false, head))
            }
            Route::Blob(name, digest) => {
                let range = if head { None } else { range(request) };
                let blob = BlobRequest { name: name.clone(), digest, range, head };
                let answer = self.backend.blob(blob, deadline).await?;
                Ok(self.content(answer, &name, range.is_some(), head))
            }
            Route::Tags(..) | Route::Referrers(..) if !held => Err(NotHere::Unsupported.into()),
            Route::Tags(name, page) => {
                let response = lists::tags(&name, self.backend.tags(&name), &page, head);
                response.map(Answered::here).ok_or(NotHere::Unknown.into())
            }
            Route::Referrers(name, digest, artifact_type) => {
                let referrers = self.backend.referrers(&name, &digest).await?;
                let response = lists::referrers(&name, referrers, artifact_type.as_deref(), head);
                Ok(Answered::here(response))
            }
        }
    }

    fn content(&self, answer: Answer, name: &Name, partial: bool, head: bool) -> Answered {
        let source = metrics::source(answer.source);
        let sent = self.metrics.sent(answer.source);
        let response = respond::content(answer, name, partial, head, sent);
        Answered { response, outcome: source, source }
    }
}

impl Answered {
    fn here(response: Response<Body>) -> Self {
        Self { response, outcome: "local", source: "local" }
    }
}

impl From<NotHere> for Refused {
    fn from(cause: NotHere) -> Self {
        Self::Cause(Cause::NotHere(cause))
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotHere(cause) => cause.into(),
            Refusal::Denied(reason) => Self::Denied(reason),
            Refusal::Range(error) => Self::Range(error),
        }
    }
}

/// `work` within `deadline`, and its panics as a cause: the panic hook has logged them.
async fn bound(
    deadline: Duration,
    work: impl Future<Output = Result<Answered, Refused>>,
) -> Result<Answered, Refused> {
    match timeout(deadline, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Refused::Cause(Cause::Internal)),
        Err(_) => Err(NotHere::Deadline.into()),
    }
}

/// The one range that is asked for; several headers are none.
fn range(request: &Parts) -> Option<RangeHeader> {
    let mut values = request.headers.get_all(RANGE).iter();
    let value = values.next()?.to_str().ok()?;
    if values.next().is_some() { None } else { RangeHeader::parse(value) }
}

/// What a person reads in `status`.
fn subject<E>(route: &Result<Route, E>) -> String {
    match route {
        Ok(Route::Base) | Err(_) => String::new(),
        Ok(Route::Manifest(name, Target::Tag(tag))) => format!("{name}:{tag}"),
        Ok(Route::Manifest(name, Target::Digest(digest)) | Route::Blob(name, digest)) => {
            format!("{name}@{digest}")
        }
        Ok(Route::Tags(name, _)) => format!("{name} (tags)"),
        Ok(Route::Referrers(name, digest, _)) => format!("{name}@{digest} (referrers)"),
    }
}
