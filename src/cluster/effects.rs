//! Requests of whoever leads: each asks the guard first and after its answer, and is over before the term is.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http::Method;
use serde_json::Value;

use super::{Api, Fault, Response};
use crate::election::lease::{Ms, Token};
use crate::election::strict::{Clock, Guard, LeaseMetrics};

/// The longest that a request may take.
const LIMIT: Ms = 3_000;
/// Between two tries, and between two writes of the summary.
pub(super) const PAUSE: Ms = 15_000;
/// After a refusal that a person has to see to.
const LONG_PAUSE: Ms = 60_000;

/// Where requests go: the API server, or a stand-in of a test.
#[async_trait]
pub(super) trait Server: Send + Sync {
    /// As [`Api::namespace`].
    fn namespace(&self) -> Result<String, Fault>;

    /// As [`Api::call`].
    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Response, Fault>;
}

#[async_trait]
impl Server for Api {
    fn namespace(&self) -> Result<String, Fault> {
        Self::namespace(self)
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Response, Fault> {
        Self::call(self, method, path, body, limit).await
    }
}

/// Why an effect did not come about, or nobody knows whether it did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The term is over.
    Over,
    /// Somebody has written under this later token.
    Fenced(Token),
    /// Something is wrong, and what to do about it.
    Fault(Fault, String),
}

impl Stop {
    /// How long not to try again.
    pub(super) fn pause(&self) -> Ms {
        match self {
            Self::Fenced(_) => LONG_PAUSE,
            Self::Fault(fault, _) if fault.cause.reached() == Some(true) => LONG_PAUSE,
            Self::Fault(..) | Self::Over => PAUSE,
        }
    }
}

impl From<Fault> for Stop {
    /// With what is to be done about such a fault anywhere.
    fn from(fault: Fault) -> Self {
        let remedy = fault.cause.remedy().to_owned();
        Self::Fault(fault, remedy)
    }
}

/// Sends for a leader.
pub(super) struct Effects {
    pub(super) server: Arc<dyn Server>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) metrics: LeaseMetrics,
}

impl Effects {
    /// The time by the guard's clock.
    pub(super) fn now(&self) -> Ms {
        self.clock.now()
    }

    /// The namespace of Peili's objects.
    pub(super) fn namespace(&self) -> Result<String, Stop> {
        Ok(self.server.namespace()?)
    }

    /// Sends a request, if the term is not over. An answer of any status is one, unless the term is over by then.
    pub(super) async fn send(
        &self,
        guard: &Guard,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response, Stop> {
        let now = self.clock.now();
        let Some(permit) = guard.check(now) else {
            self.metrics.fenced();
            return Err(Stop::Over);
        };
        // What is still under way then is given up: no answer of it is used, and it was sent in time.
        let limit = Duration::from_millis(LIMIT.min(permit.valid_until - now));
        let result = self.server.call(method, path, body, limit).await;
        // The answer is of use to a leader only, be it to go on from it or to say what is wrong.
        guard.check(self.clock.now()).ok_or(Stop::Over)?;
        Ok(result?)
    }
}
