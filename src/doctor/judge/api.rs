//! The way to the API server: which of name, connection, TLS and answer is the first that fails.

use std::time::Duration;

use super::super::code::{Code, Confidence, Severity};
use super::super::facts::Facts;
use super::super::fix;
use super::super::place::{Cni, Inside, Network};
use super::super::{Ports, Verdict};
use super::{Found, account, rights};
use crate::cluster::{Cause, Fault, Handshake, Obstacle, Origin, Reach};

/// How often at most an observer reads the lease (docs/elections.md).
const OBSERVERS: Duration = Duration::from_secs(30);

const GOES_ON: &str = "Mirroring goes on without it, and whoever leads is found by the members";

/// From whether the API is needed to what it says.
pub(super) fn judge(facts: &Facts, ports: &Ports, found: &mut Found) {
    let Some(wanted) = &facts.wanted else {
        return found.note("Kubernetes API: not needed, by `election.backend`");
    };
    if !facts.in_cluster {
        let fix = "in a cluster, let the pod have KUBERNETES_SERVICE_HOST and _PORT, or name the API servers in `kubernetes.endpoints`; \
                   elsewhere set `election.backend: gossip`";
        let seen = "neither `kubernetes.service`, `kubernetes.endpoints` nor KUBERNETES_SERVICE_HOST says where it is";
        return found.say(Verdict::new(Code::NoCluster, Confidence::High, fix).seen(seen));
    }
    let is_whole = account::files(facts, found);
    // The files could not be read in time: nothing was tried.
    if facts.reaches.is_empty() {
        return;
    }
    let named: Vec<&Reach> = facts.reaches.iter().filter(|reach| reach.origin != Origin::KubePrism).collect();
    // Anything may listen on loopback at KubePrism's port: without an authority nobody knows.
    let is_open = |reach: &Reach| {
        let is_taken = facts.account.untrusted.is_some() && reach.origin != Origin::KubePrism;
        if is_taken { reach.obstacle.is_none() } else { reach.is_open() }
    };
    let open = facts.reaches.iter().find(|reach| is_open(reach));
    let Some(open) = open else { return closed(facts, &named, ports, found) };
    let mut some: Vec<Verdict> = Vec::new();
    for reach in named.iter().filter(|reach| !is_open(reach)) {
        let verdict = beside(reach, open);
        // One for all that fail in the same way.
        match some.iter_mut().find(|other| other.code == verdict.code) {
            Some(other) => other.evidence.insert(0, line(reach)),
            None => some.push(verdict),
        }
    }
    found.verdicts.extend(some);
    if !is_whole {
        return;
    }
    let Some(answers) = &facts.answers else { return };
    match &answers.version {
        Ok(version) => {
            found.note(format!("Kubernetes API: {} answers ({version})", answers.address));
            rights::judge(facts, wanted, answers, found);
        }
        Err(fault) => said(facts, fault, found),
    }
}

/// Requests fail, though there is a secure connection.
pub(super) fn said(facts: &Facts, fault: &Fault, found: &mut Found) {
    let verdict = match fault.cause {
        Cause::Unauthorized => return account::refused(facts, &fault.text, found),
        Cause::Throttled => {
            let fix =
                "give Peili's service account a priority level by a FlowSchema, or find who else uses it up";
            Verdict::new(Code::Throttled, Confidence::High, fix)
        }
        Cause::Server => {
            let fix =
                "look at the control plane: etcd, its disk, its clocks. Nothing has to be done on this node";
            Verdict::new(Code::ControlPlane, Confidence::High, fix)
                .or("etcd has no leader or is slow")
                .or("etcd's disk is full")
        }
        Cause::NoAnswer | Cause::Timeout | Cause::Refused | Cause::Unroutable | Cause::Tls => {
            let fix =
                format!("look at the API server's load, its load balancer and the MTU on the way. {GOES_ON}");
            Verdict::new(Code::ApiSilent, Confidence::Medium, fix)
                .or("the API server hangs or is overloaded")
                .or("the MTU on the way is smaller than both ends believe (KubeSpan, WireGuard, VXLAN)")
        }
        Cause::NoCredentials | Cause::Unresolved => {
            let fix = "see the words of what failed, on this node's side";
            Verdict::new(Code::ApiSilent, Confidence::Low, fix)
        }
        _ => {
            let fix = "look at `kubernetes.endpoints`, and at proxies between this node and the API server";
            Verdict::new(Code::NotAnApiServer, Confidence::High, fix).or("a proxy answers instead")
        }
    };
    found.say(verdict.seen(fault.text.as_str()));
}

/// One address does not do, and another does: it works, and not as it could.
fn beside(reach: &Reach, open: &Reach) -> Verdict {
    if let Some(mut verdict) = reach.handshake.as_ref().and_then(insecure) {
        verdict.severity = Severity::Warning;
        return verdict.seen(line(reach)).seen(format!("{} is as it should be", open.address));
    }
    let (code, mut fix) = if reach.origin == Origin::Service {
        let fix = "look at what programs Services on this node (kube-proxy, or Cilium in its place), and at the endpoints of \
                   default/kubernetes: `kubectl get endpoints kubernetes`";
        (Code::ServiceUnreachable, fix.to_owned())
    } else {
        (Code::EndpointUnreachable, "mend it, or take it out of `kubernetes.endpoints`".to_owned())
    };
    if open.origin == Origin::KubePrism && reach.origin == Origin::Service {
        fix = format!(
            "Peili goes by KubePrism, which answers on this node; to have it first, and need the Service no more, set \
             `kubernetes.service: {}`. Otherwise {fix}",
            open.address
        );
    }
    let verdict = Verdict::new(code, Confidence::High, fix).seen(line(reach));
    let other = "a policy of the network lets one address through and not the other";
    verdict.seen(format!("{} answers", open.address)).or(other)
}

/// No address does.
fn closed(facts: &Facts, named: &[&Reach], ports: &Ports, found: &mut Found) {
    // Who takes a connection says more than who does not.
    let connected = named.iter().find(|reach| reach.obstacle.is_none());
    let verdict = match connected.and_then(|reach| reach.handshake.as_ref()) {
        Some(handshake) => insecure(handshake),
        None => far(facts, named, ports),
    };
    let mut verdict = verdict.unwrap_or_else(|| {
        let fix = "see what was found at each address, and `kubernetes.endpoints`";
        Verdict::new(Code::ApiUnreachable, Confidence::Low, fix)
    });
    verdict.evidence.extend(named.iter().map(|reach| line(reach)));
    if let Some(reach) = kubeprism(facts) {
        verdict.evidence.push(line(reach));
        if is_talos(facts) {
            verdict.fix = format!(
                "{}. Talos' KubePrism would answer for the API server at {} (`machine.features.kubePrism`: enabled, port 7445)",
                verdict.fix.trim_end_matches('.'),
                reach.address
            );
        }
    }
    // A certificate that does not count yet shows no more than the token that is of the future, too.
    let is_early = named.iter().any(|reach| matches!(reach.handshake, Some(Handshake::Early(_))));
    let causes: &[Code] = if is_early && verdict.code == Code::TlsTime { &[Code::ClockBehind] } else { &[] };
    found.say_or_fold(verdict, causes);
}

/// KubePrism, where it is worth a word: somebody is there, or Talos should have it.
fn kubeprism(facts: &Facts) -> Option<&Reach> {
    let reach = facts.reaches.iter().find(|reach| reach.origin == Origin::KubePrism)?;
    (reach.obstacle.is_none() || is_talos(facts)).then_some(reach)
}

/// Its nodes have KubePrism, for whoever is in their network.
fn is_talos(facts: &Facts) -> bool {
    facts.place.distribution == "Talos" && facts.place.network != Network::Pod
}

fn insecure(handshake: &Handshake) -> Option<Verdict> {
    Some(match handshake {
        Handshake::Trusted => return None,
        Handshake::Silent => {
            let fix = format!(
                "look at the API server's load, its load balancer and the MTU on the way. Established connections through a firewall that \
                 looks into TLS end so, too. {GOES_ON}"
            );
            Verdict::new(Code::TlsSilent, Confidence::Medium, fix)
                .or("the API server hangs: the kernel takes connections for it")
                .or("the MTU on the way is smaller than both ends believe, or a filter holds the handshake back")
        }
        Handshake::Issuer(_) => {
            let fix = "compare ca.crt with the cluster's (`kubectl get configmap kube-root-ca.crt -o yaml`); look for a proxy that opens TLS, \
                       and for an address of another cluster in `kubernetes.endpoints`";
            Verdict::new(Code::TlsIssuer, Confidence::High, fix)
                .or("a proxy in between opens TLS")
                .or("the address is another cluster's, or ca.crt is old")
        }
        Handshake::Name(_) => {
            let fix = "name an address in `kubernetes.endpoints` that the certificate has, or add this one to its subject alternative names \
                       (kubeadm: apiServer.certSANs; Talos: cluster.apiServer.certSANs)";
            Verdict::new(Code::TlsName, Confidence::High, fix)
        }
        Handshake::Time(_) | Handshake::Early(_) => {
            let fix = "compare this node's clock with another's; if it is right, renew the API server's certificate (`kubeadm certs renew \
                       apiserver`)";
            Verdict::new(Code::TlsTime, Confidence::High, fix)
                .or("the clock of this node is wrong")
                .or("the certificate was not renewed")
        }
        Handshake::Broken(_) => {
            let fix = "look at what listens there: `kubernetes.endpoints` may name another port, or a proxy may stand in between";
            Verdict::new(Code::TlsBroken, Confidence::Medium, fix)
                .or("another program has that port")
                .or("a load balancer has no API server behind it and hangs up")
        }
    })
}

/// There is no connection to any.
fn far(facts: &Facts, named: &[&Reach], ports: &Ports) -> Option<Verdict> {
    let obstacles: Vec<&Obstacle> = named.iter().filter_map(|reach| reach.obstacle.as_ref()).collect();
    let (first, are_same) = {
        let first = *obstacles.first()?;
        let kind = std::mem::discriminant(first);
        (first, obstacles.iter().all(|other| std::mem::discriminant(*other) == kind))
    };
    if !are_same {
        let fix = format!("see what was found at each address: they fail in different ways. {GOES_ON}");
        return Some(Verdict::new(Code::ApiUnreachable, Confidence::Low, fix));
    }
    let is_blocked = named.iter().any(|reach| reach.host_answers);
    if is_blocked {
        let verdict = Verdict::new(Code::ApiBlocked, Confidence::Medium, let_through(facts));
        let verdict = verdict
            .seen("another port of the same host answers, where a server that is down would have had its port refused")
            .or("the API server hangs with a full queue of connections");
        return Some(verdict.apply(policies(facts, ports)));
    }
    let others = others(facts);
    let reached = others.filter(|(reach, _)| *reach > 0).map(|(reach, all)| {
        format!(
            "{reach} of {all} other members reach the API server: it lives, and this node is cut off from it"
        )
    });
    if let Some(sign) = account::lives(facts).or(reached).filter(|_| *first == Obstacle::Timeout) {
        let verdict = Verdict::new(Code::ApiBlocked, Confidence::Medium, let_through(facts)).seen(sign);
        let verdict =
            verdict.or("who reaches the API server reaches another one, or this one at another address");
        return Some(verdict.apply(policies(facts, ports)));
    }
    let verdict = match first {
        Obstacle::Unresolved(_) => {
            let fix = "name the API server by an address in `kubernetes.endpoints`, or mend DNS";
            Verdict::new(Code::ApiUnresolved, Confidence::Medium, fix)
                .or("the name is wrong")
                .or("the name server is not reached")
        }
        Obstacle::Other(_) => {
            let fix = "see the kernel's words: nothing is known beyond them";
            Verdict::new(Code::ApiUnreachable, Confidence::Low, fix)
                .or("this process or this node is out of something: descriptors, ports, memory")
        }
        Obstacle::Timeout => {
            let fix = format!(
                "is the API server's host up? If other nodes reach it, packets are dropped on the way: {}",
                let_through(facts)
            );
            let policy = match facts.place.network {
                Network::Host => "a firewall of this node or on the way drops its packets",
                Network::Pod | Network::Unknown => {
                    "a policy of the network drops its packets (default-deny egress)"
                }
            };
            Verdict::new(Code::ApiUnreachable, Confidence::Medium, fix)
                .seen(account::sign_of_life(facts))
                .or(policy)
                .or("the API server's host is off, or cut off from all")
                .apply(policies(facts, ports))
        }
        Obstacle::Refused => {
            let fix = format!(
                "does the API server run, and do other nodes reach it? If they do, something rejects this node's packets: {}",
                let_through(facts)
            );
            Verdict::new(Code::ApiRefused, Confidence::Medium, fix)
                .or("the API server is down, or the Service has no endpoint")
                .or("a policy of the network rejects packets (kube-router of k3s and RKE2 does it so)")
                .apply(policies(facts, ports))
        }
        Obstacle::Unroutable(_) => {
            let fix = format!(
                "look at this node's routes (`ip route get ADDRESS`), and at policies that reject by ICMP: {}",
                let_through(facts)
            );
            Verdict::new(Code::ApiUnroutable, Confidence::Medium, fix)
                .or("a policy or a firewall answers with ICMP, or a route forbids it")
                .or("the API server's host is off, and a router says so")
                .apply(policies(facts, ports))
        }
        Obstacle::Family => {
            let fix = "give this node (or the pod) an address of that family, or name an API server in `kubernetes.endpoints` by one of the \
                       other";
            Verdict::new(Code::AddressFamily, Confidence::High, fix)
        }
    };
    Some(match others {
        Some((reach, all)) => verdict.seen(format!("{reach} of {all} other members reach the API server")),
        None => verdict,
    })
}

/// How many other members reach the API server, and how many say whether they do, where all have looked since it was lost here: those that do
/// not stand for the lease look once in max(30 s, N s), and what they say is of then.
fn others(facts: &Facts) -> Option<(usize, usize)> {
    let told = facts.told?;
    let all = told.reach + told.lack;
    let period = OBSERVERS.max(Duration::from_secs(all as u64 + 1));
    let since = facts.now.duration_since(told.lost).ok()?;
    (all > 0 && since > 2 * period).then_some((told.reach, all))
}

/// What lets packets through, for where this runs.
fn let_through(facts: &Facts) -> String {
    let place = &facts.place;
    match (place.network, place.cni) {
        (Network::Host, Cni::Cilium) => {
            "NetworkPolicies do not count for a process in the node's network. If Cilium's host firewall is on, let a \
             CiliumClusterwideNetworkPolicy with a nodeSelector have `egress: [{toEntities: [kube-apiserver]}]`"
                .to_owned()
        }
        (Network::Host, _) if is_talos(facts) => {
            "NetworkPolicies do not count for a process in the node's network. Look at the firewall between the nodes, and on control plane \
             nodes at Talos' NetworkRuleConfig for port 6443"
                .to_owned()
        }
        (Network::Host, _) => {
            let where_ = if place.inside == Inside::Pod { "pod with host networking" } else { "process on a node" };
            format!(
                "NetworkPolicies do not count for a {where_}: look at this node's firewall (`nft list ruleset`) and at those on the way"
            )
        }
        (Network::Pod | Network::Unknown, Cni::Cilium) => {
            "allow egress to the API server by a CiliumNetworkPolicy with `toEntities: [kube-apiserver]`; an ipBlock does not match it under \
             Cilium"
                .to_owned()
        }
        (Network::Pod | Network::Unknown, Cni::PerhapsCilium | Cni::Unknown) => {
            "allow egress to the API server: its endpoints' addresses and port as well as the Service; under Cilium by `toEntities: \
             [kube-apiserver]`, since an ipBlock does not match it there"
                .to_owned()
        }
    }
}

/// Only where they count.
fn policies(facts: &Facts, ports: &Ports) -> Vec<fix::Manifest> {
    match (&facts.namespace, facts.place.network) {
        (Ok(namespace), Network::Pod) => {
            let mut ports = ports.clone();
            ports.out.extend(&facts.registries);
            ports.out.sort_unstable();
            ports.out.dedup();
            fix::policies(namespace, &facts.place, &ports)
        }
        _ => Vec::new(),
    }
}

fn line(reach: &Reach) -> String {
    let what = match (&reach.obstacle, &reach.handshake) {
        (Some(obstacle), _) => obstacle.to_string(),
        (None, Some(handshake)) => handshake.to_string(),
        (None, None) => "a connection; nothing to check its certificate by".to_owned(),
    };
    let origin = match reach.origin {
        Origin::Endpoint => "endpoint",
        Origin::Service => "Service",
        Origin::KubePrism => "KubePrism",
    };
    format!("{origin} {}: {what}", reach.address)
}
