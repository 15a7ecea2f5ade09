//! What a changed set of policies would have said of the last requests, before it is in force.
//!
//! Keeps copies of recent questions of the registry world, and compares what the set in force and its successor answer to
//! them now. It changes nothing, counts nowhere, and asks nobody about peers.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::Failure;
use super::chain::Chain;
use super::election::{Election, View, Why};
use super::registry::{Reference, Registry, Request, Requester, Way};

/// Requests that are kept.
const KEPT: usize = 1000;
/// Longest text of one that is kept, in bytes: what a peer says of itself is bounded elsewhere, and far below it. With it all
/// of them have 2 MiB at most.
const TEXT: usize = 2048;
/// Of fewer requests that differ no share is counted: one image more or less would be all of it.
const LEAST: usize = 50;
/// For one policy and request: more than a request has, since it is no fault of a policy's if the machine is busy.
const LIMIT: Duration = Duration::from_millis(50);
/// For all requests; those that are left then are not asked about.
const TIME: Duration = Duration::from_secs(5);

/// Views that are kept: the last one of each role.
const ROLES: usize = 16;

/// The last requests and views.
#[derive(Debug, Default)]
pub(super) struct Recent {
    requests: Mutex<VecDeque<Request>>,
    views: Mutex<BTreeMap<String, View>>,
}

/// Why a set is not to be taken over.
#[derive(Debug)]
pub(super) enum Objection {
    /// A policy of it fails on a request.
    Fails { policy: Arc<str>, failure: Failure, on: String },
    /// With it the built-in would rank.
    Unranked { why: String, on: String },
    /// It answers too many otherwise.
    Changes {
        changed: usize,
        asked: usize,
        limit: u8,
        /// One of them, and the policy that decides it then or, failing that, decided it before.
        example: String,
        by: Option<Arc<str>>,
    },
}

impl Recent {
    /// Keeps a copy, unless it would wait for that: what is left out is as good as what is kept.
    pub(super) fn keep(&self, request: &Request) {
        if text(request) > TEXT {
            return;
        }
        let copy = request.clone();
        let mut kept = match self.requests.try_lock() {
            Ok(kept) => kept,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let oldest = if kept.len() == KEPT { kept.pop_front() } else { None };
        kept.push_back(copy);
        // Freed once nobody is kept out by it.
        drop(kept);
        drop(oldest);
    }

    /// All of them, the oldest first.
    pub(super) fn all(&self) -> Vec<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Keeps a copy of the last view of its role.
    pub(super) fn keep_view(&self, view: &View) {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        let known = views.get_mut(&view.role.name);
        let is_known = known.is_some();
        if let Some(known) = known.filter(|known| *known != view) {
            known.clone_from(view);
        }
        if !is_known && views.len() < ROLES {
            views.insert(view.role.name.clone(), view.clone());
        }
    }

    /// The last view of each role.
    pub(super) fn views(&self) -> Vec<View> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// Asks both sets about each request, once about those that are alike: one image that is asked for again and again is one.
///
/// What fails in the set in force too is no objection, whoever made it fail: else a crafted name would keep all changes out.
pub(super) fn compare(
    requests: &[Request],
    before: &Chain<Registry>,
    after: &Chain<Registry>,
    limit: u8,
) -> Result<(), Objection> {
    let ends = Instant::now() + TIME;
    let (mut asked, mut changed, mut example) = (0, 0, None);
    for request in distinct(requests) {
        if Instant::now() >= ends {
            break;
        }
        let (now, had_failed) = before.replay(request, LIMIT);
        let (then, failed) = after.replay(request, LIMIT);
        let is_new = |policy: &Arc<str>| had_failed.iter().all(|(known, _)| known != policy);
        if let Some((policy, failure)) = failed.into_iter().find(|(policy, _)| is_new(policy)) {
            return Err(Objection::Fails { policy, failure, on: describe(request) });
        }
        if !had_failed.is_empty() {
            continue;
        }
        asked += 1;
        if !is_same(&now.way, &then.way) {
            changed += 1;
            example.get_or_insert_with(|| {
                let text = format!("{}: {now}, and then {then}", describe(request));
                (text, then.by.or(now.by))
            });
        }
    }
    match example {
        Some((example, by)) if asked >= LEAST && changed * 100 > asked * usize::from(limit) => {
            Err(Objection::Changes { changed, asked, limit, example, by })
        }
        _ => Ok(()),
    }
}

/// Asks both sets about each view. That another one leads then is what a change is for; that nobody can be ranked is not.
pub(super) fn rank(
    views: &[View],
    before: &Chain<Election>,
    after: &Chain<Election>,
) -> Result<(), Objection> {
    for view in views {
        let (then, _) = after.replay(view, LIMIT);
        if !then.why.is_fault() || before.replay(view, LIMIT).0.why.is_fault() {
            continue;
        }
        let on = format!("the last view of the role {}", view.role.name);
        return Err(match then.why {
            Why::Failed(policy, failure) => Objection::Fails { policy, failure, on },
            why => Objection::Unranked { why: why.to_string(), on },
        });
    }
    Ok(())
}

impl fmt::Display for Objection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fails { failure, on, .. } => write!(f, "on a recent request, {on}, {failure}"),
            Self::Unranked { why, on } => write!(f, "on {on}, {why}"),
            Self::Changes { changed, asked, limit, example, .. } => write!(
                f,
                "{changed} of {asked} different recent requests would be answered otherwise, more than {limit} of 100 \
                 (policies.max-change); one is {example}"
            ),
        }
    }
}

/// Those that differ in more than the time of day, and how upstreams did then.
fn distinct(requests: &[Request]) -> Vec<&Request> {
    let mut distinct: Vec<&Request> = Vec::new();
    let is_alike = |one: &Request, other: &Request| {
        (&one.reference, &one.name, one.operation) == (&other.reference, &other.name, other.operation)
            && (&one.requester, &one.descriptor, one.availability)
                == (&other.requester, &other.descriptor, other.availability)
            && one
                .upstreams
                .iter()
                .map(|known| &known.name)
                .eq(other.upstreams.iter().map(|known| &known.name))
    };
    for request in requests {
        if !distinct.iter().any(|known| is_alike(known, request)) {
            distinct.push(request);
        }
    }
    distinct
}

/// The words of a denial are no decision.
fn is_same(one: &Way, other: &Way) -> bool {
    matches!((one, other), (Way::Deny(_), Way::Deny(_))) || one == other
}

fn describe(request: &Request) -> String {
    let Request { name, reference, requester, .. } = request;
    let asks = if matches!(requester, Requester::Runtime) { "" } else { " for a peer" };
    match reference {
        Some(Reference::Tag(tag)) => format!("{name}:{tag}{asks}"),
        Some(Reference::Digest(digest)) => format!("{name}@{digest}{asks}"),
        None => format!("{name}{asks}"),
    }
}

/// Bytes of text that are of unknown length.
fn text(request: &Request) -> usize {
    let node = match &request.requester {
        Requester::Runtime => 0,
        Requester::Peer(node, _) => {
            let labels = node.labels.iter().map(|label| label.key.len() + label.value.len());
            node.id.len() + node.name.len() + node.version.len() + labels.sum::<usize>()
        }
    };
    let media_type = request.descriptor.0.as_ref().map_or(0, |text| text.len());
    node + media_type + request.name.repository.as_str().len() + request.name.registry.as_str().len()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::policy::registry::Availability;

    fn request(number: usize) -> Request {
        let image = format!("r.test/a/app-{number}:v1").parse().unwrap();
        Request::manifest(&image, Requester::Runtime, Availability::default(), Arc::default())
    }

    #[test]
    fn the_last_are_kept() {
        let recent = Recent::default();
        let requests: Vec<Request> = (0..KEPT + 10).map(request).collect();
        let began = Instant::now();
        requests.iter().for_each(|request| recent.keep(request));
        println!("{:?} for each", began.elapsed() / 1010);
        let all = recent.all();
        assert_eq!((all.len(), describe(&all[0])), (KEPT, "r.test/a/app-10:v1".into()));
        let mut large = request(0);
        large.descriptor.0 = Some("x".repeat(TEXT).into());
        recent.keep(&large);
        assert_eq!(recent.all(), all, "what would fill memory is not");
    }

    /// Guards that no request waits for a copy of another.
    #[test]
    fn nobody_waits_to_be_kept() {
        let recent = Recent::default();
        let held = recent.requests.lock().unwrap();
        recent.keep(&request(1));
        drop(held);
        assert!(recent.all().is_empty());
    }

    #[test]
    fn those_that_are_alike_are_one() {
        let requests = [request(1), request(2), request(1)];
        assert_eq!(distinct(&requests), [&requests[0], &requests[1]]);
    }
}
