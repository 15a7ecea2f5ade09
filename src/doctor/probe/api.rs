//! What the configuration needs of the Kubernetes API, and what the API says to it.

use std::net::IpAddr;

use futures::future::join_all;
use tokio::task::spawn_blocking;

use super::super::Subject;
use super::super::facts::{Answers, Lock, LockAnswer, Making, Purpose, Wanted};
use crate::cluster::{self, Api, Examiner, Kind, Reach, Review, Right};
use crate::election::{Backend, Hold};
use crate::network::swarm::Unresolved;

/// What the configuration needs; `None`: nothing.
pub(super) fn wanted(subject: &Subject) -> Option<Wanted> {
    let election = &subject.election;
    if !election.backend.is_strict() {
        return None;
    }
    let lease = |writes| Lock { kind: Kind::Lease, name: election.lease.name.clone(), writes };
    let old = |writes| Lock { kind: Kind::ConfigMap, name: election.configmap_name().to_owned(), writes };
    let locks = match (election.backend, election.configmap.hold) {
        (Backend::ConfigMap, Hold::Sole) => vec![old(true)],
        (Backend::ConfigMap, Hold::Both) => vec![lease(true), old(true)],
        (Backend::ConfigMap, Hold::Observe) => vec![lease(true), old(false)],
        _ => vec![lease(true)],
    };
    let summary = cluster::summary_name(&election.lease.name);
    let right = |verb, group, resource, name: Option<&str>| Right {
        verb,
        group,
        resource,
        name: name.map(str::to_owned),
        namespaced: true,
    };
    let mut rights = Vec::new();
    for lock in &locks {
        let of = |verb| right(verb, lock.kind.group(), lock.kind.resource(), Some(&lock.name));
        rights.push((Purpose::Lock, of("get")));
        if lock.writes {
            rights.push((Purpose::Lock, of("update")));
            rights.push((Purpose::Watch, of("watch")));
            let any = right("create", lock.kind.group(), lock.kind.resource(), None);
            rights.push((Purpose::Create(making(lock.kind)), any));
        }
    }
    rights.push((Purpose::Summary, right("get", "", "configmaps", Some(&summary))));
    rights.push((Purpose::Summary, right("update", "", "configmaps", Some(&summary))));
    rights.push((Purpose::Create(Making::ConfigMap), right("create", "", "configmaps", None)));
    rights.push((Purpose::Events, right("create", "events.k8s.io", "events", None)));
    if subject.cluster.read_node {
        let node = right("get", "", "nodes", Some(&subject.node));
        rights.push((Purpose::Node, Right { namespaced: false, ..node }));
    }
    rights.sort();
    rights.dedup();
    Some(Wanted { locks, summary, rights })
}

/// What is made by a right to make objects of this kind.
pub(super) fn making(kind: Kind) -> Making {
    match kind {
        Kind::Lease => Making::Lease,
        Kind::ConfigMap => Making::ConfigMap,
    }
}

/// The namespace of Peili's objects.
pub(super) async fn namespace(config: &cluster::Config) -> Result<String, String> {
    let api = Api::new(config);
    let read = spawn_blocking(move || api.namespace().map_err(|fault| fault.text));
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}

/// API servers whose names no name server says anything of, as [`Reach::address`] has them.
pub(super) async fn unnamed(config: &cluster::Config) -> Vec<(String, Unresolved)> {
    let tries = config.places().into_iter().map(async |(_, uri)| {
        let host = uri.host()?;
        // An address needs no name server.
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let why = if is_address { None } else { super::silence(host).await };
        Some((format!("{host}:{}", uri.port_u16().unwrap_or(443)), why?))
    });
    join_all(tries).await.into_iter().flatten().collect()
}

/// Asks the first address to which there is a way; `None`: there is none, or nothing to ask for.
pub(super) async fn ask(
    subject: &Subject,
    reaches: &[Reach],
    wanted: Option<&Wanted>,
    namespace: Option<&str>,
) -> Option<Answers> {
    let wanted = wanted.filter(|_| subject.asks)?;
    let reach = reaches.iter().find(|reach| reach.is_open())?;
    let examiner = Examiner::new(&subject.cluster, reach);
    let mut answers = Answers {
        address: reach.address.clone(),
        version: examiner.version().await,
        who: None,
        rights: Vec::new(),
        unsure: Vec::new(),
        locks: Vec::new(),
        summary: None,
    };
    let Some(namespace) = namespace.filter(|_| answers.version.is_ok()) else { return Some(answers) };
    let rights =
        join_all(wanted.rights.iter().map(|(purpose, right)| async {
            (*purpose, right.clone(), examiner.may(namespace, right).await)
        }));
    let locks = join_all(wanted.locks.iter().map(|lock| look_at(&examiner, namespace, lock)));
    let summary = examiner.object(Kind::ConfigMap, namespace, &wanted.summary);
    let (who, rights, locks, summary) = tokio::join!(examiner.who(), rights, locks, summary);
    (answers.who, answers.locks) = (who, locks);
    for (purpose, right, review) in rights {
        if let Ok(Review { allowed: false, error: Some(error) }) = &review {
            answers.unsure.push((right.clone(), error.clone()));
        }
        answers.rights.push((purpose, right, review.map(|review| review.allowed)));
    }
    answers.summary = Some(summary.map(|summary| summary.is_some()));
    Some(answers)
}

async fn look_at(examiner: &Examiner, namespace: &str, lock: &Lock) -> LockAnswer {
    let found = examiner.object(lock.kind, namespace, &lock.name).await;
    let stored = found.as_ref().ok().and_then(Option::as_ref);
    let holder = stored.and_then(|stored| lock.kind.holder(stored));
    // What cannot be read cannot be replaced by itself.
    let write = match &found {
        Ok(stored) if lock.writes => {
            Some(examiner.write(lock.kind, namespace, &lock.name, stored.as_ref()).await)
        }
        _ => None,
    };
    LockAnswer { lock: lock.clone(), there: found.map(|found| found.is_some()), holder, write }
}
