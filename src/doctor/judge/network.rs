//! Names, and what the mirror that runs here says of its peers.

use super::super::Verdict;
use super::super::code::{Code, Confidence};
use super::super::facts::{Facts, Runtime, Unseen};
use super::Found;
use crate::admin::{AskedRegistry, Node, StoreHealth};
use crate::cluster::{Obstacle, Origin, Reach};
use crate::network::Status as NetworkStatus;
use crate::network::swarm::Unresolved;

/// Of those that the mirror names: it may be another program that answers.
const PROBLEMS: usize = 16;

/// What follows where no name server says where others are.
const NAMES_DOWN: [Code; 2] = [Code::DnsSilent, Code::DnsFailing];
/// What keeps peers from being found.
const NO_PEERS: [Code; 4] = [Code::DnsSilent, Code::DnsFailing, Code::DnsNoName, Code::DnsNotTheClusters];

pub(super) fn judge(facts: &Facts, found: &mut Found) {
    names(facts, found);
    mirror(facts, found);
    host_port(facts, found);
}

/// One verdict for all names: they are asked of the same servers.
fn names(facts: &Facts, found: &mut Found) {
    let failed: Vec<(&str, &Unresolved)> = facts
        .names
        .iter()
        .filter_map(|(name, answer)| Some((name.as_str(), answer.as_ref().err()?)))
        .collect();
    for (name, answer) in &facts.names {
        if let Ok(count) = answer {
            found.note(format!("DNS: {name} has {count} addresses"));
        }
    }
    let Some((_, first)) = failed.first() else { return };
    let cluster = facts.cluster_name.as_ref();
    let is_known = matches!(cluster, Some(Ok(_)));
    let is_silent = matches!(first, Unresolved::Silent);
    let mut verdict = match first {
        Unresolved::Silent if !is_known => {
            let fix = "allow UDP and TCP 53 to the cluster's DNS, and see that it runs (`kubectl -n kube-system get pods -l \
                       k8s-app=kube-dns`)";
            Verdict::new(Code::DnsSilent, Confidence::Medium, fix)
                .or("a policy of the network drops port 53")
                .or("the DNS server is down")
        }
        Unresolved::NoSuchHost | Unresolved::NoAddresses if is_known => {
            let fix = "is the headless Service there, in that namespace and domain, and does it publish addresses that are not ready? \
                       (`kubectl get service -A`; `publishNotReadyAddresses: true`)";
            Verdict::new(Code::DnsNoName, Confidence::High, fix)
                .or("the name in `network.dns` is wrong")
                .or("no pod is behind the Service yet")
        }
        Unresolved::NoSuchHost if matches!(cluster, Some(Err(Unresolved::NoSuchHost))) => {
            let fix = "with host networking let the pod have `dnsPolicy: ClusterFirstWithHostNet`; outside a cluster name peers in \
                       `network.peers`, or use a name that your DNS knows";
            Verdict::new(Code::DnsNotTheClusters, Confidence::Medium, fix)
                .or("a pod with host networking and the default dnsPolicy")
                .or("this machine is in no cluster")
        }
        _ => {
            let fix = "look at /etc/resolv.conf, at the name server that it names, and whether TCP 53 to it is open as UDP is: the addresses of a \
                       fleet are more than a datagram holds";
            Verdict::new(Code::DnsFailing, Confidence::Medium, fix)
        }
    };
    verdict.evidence.extend(failed.iter().map(|(name, why)| format!("{name}: {why}")));
    if let Some(Err(why)) = cluster
        && !is_silent
    {
        verdict.evidence.push(format!("kubernetes.default.svc: {why}"));
    }
    if is_known {
        verdict.evidence.push("kubernetes.default.svc is known there".to_owned());
    }
    if NAMES_DOWN.contains(&verdict.code) && without_names(facts) {
        for code in [Code::ApiUnresolved, Code::EndpointUnreachable] {
            found.fold(code, &mut verdict);
        }
    }
    found.say(verdict);
}

/// Whether all API servers that are named and not reached are so for want of a name server.
fn without_names(facts: &Facts) -> bool {
    let is_wanted = |reach: &&Reach| reach.origin != Origin::KubePrism && !reach.is_open();
    let is_unresolved = |reach: &Reach| matches!(reach.obstacle, Some(Obstacle::Unresolved(_)));
    let mut wanted = facts.reaches.iter().filter(is_wanted);
    wanted.all(|reach| is_unresolved(reach) && is_unnamed(facts, &reach.address))
}

fn is_unnamed(facts: &Facts, name: &str) -> bool {
    facts.unnamed.iter().any(|(unnamed, _)| unnamed == name)
}

/// Whether names are all that the mirror has of others, and none of them has an address: it has tried nobody.
fn knows_names_alone(facts: &Facts, status: &NetworkStatus) -> bool {
    let is_name = |line: &str| line.starts_with("dns ") || line.contains(": dns ");
    let is_peer = |line: &str| line.starts_with("peer ") || line.starts_with("a peer of ");
    facts.names.iter().all(|(_, answer)| answer.is_err())
        && status.problems.iter().all(|line| is_name(line) || !is_peer(line))
        && status.peers.iter().all(|peer| is_name(&peer.problem))
}

fn mirror(facts: &Facts, found: &mut Found) {
    let status = match &facts.mirror {
        Ok(status) => status,
        Err(why) => return found.note(format!("mirror: none was asked: {why}")),
    };
    found.note(format!(
        "mirror: runs ({}), mode {}, {} members",
        status.node.version,
        if status.election.mode.is_empty() { "not known yet" } else { &status.election.mode },
        status.network.members
    ));
    let says =
        status.problems.iter().take(PROBLEMS).map(|problem| problem.lines().next().unwrap_or_default());
    for problem in says {
        found.note(format!("mirror: says: {problem}"));
    }
    if status.election.mode == "alone" {
        let mut verdict = Verdict::new(Code::MirrorAlone, Confidence::High, status.election.remedy.as_str())
            .seen(format!("the cause that it names is `{}`", status.election.cause));
        verdict.evidence.extend(status.network.problems.iter().take(4).cloned());
        let verdict =
            verdict.or("this is the only node").or("the other nodes' peer ports are closed to this one");
        let causes: &[Code] = if knows_names_alone(facts, &status.network) { &NO_PEERS } else { &[] };
        found.say_or_fold(verdict, causes);
    }
    data(&status.node, found);
    if !status.policies_refused.is_empty() {
        let (what, fix) = status.policies_refused.split_once("\nhint: ").unwrap_or((
            &status.policies_refused,
            "mend what is named; `peili plugin check FILE` says of a component what a node would",
        ));
        let in_force = match status.policies.len() {
            0 => "no policy is in force".to_owned(),
            some => format!("{some} of before are in force"),
        };
        found.say(Verdict::new(Code::PoliciesRefused, Confidence::High, fix).seen(what).seen(in_force));
    }
    peer_ports(facts, found);
    registries(facts, &status.registries, found);
    let is_explained = facts.runtime.as_ref().is_some_and(|runtime| runtime.version.is_err());
    if let StoreHealth::Degraded { reason } = &status.store.health
        && !is_explained
    {
        let fix = "see what is wrong with the runtime; `peili status` shows when it is over";
        found.say(Verdict::new(Code::MirrorStore, Confidence::High, fix).seen(reason.as_str()));
    }
}

/// One verdict for what the mirror keeps and who it is: without a folder to write to it may have no identity to keep either.
fn data(node: &Node, found: &mut Found) {
    let (code, fix) = match (node.data_problem.as_str(), node.identity_problem.as_str()) {
        ("", "") => return,
        ("", _) => {
            let fix = "do as is said of the file, and start the mirror again: until then no list of peers has this node";
            (Code::IdentityPassing, fix)
        }
        _ => {
            let fix = "let the mirror write to `node.data-dir`: the chart mounts the host's folder /var/lib/peili there; then start it again";
            (Code::MirrorData, fix)
        }
    };
    let mut verdict = Verdict::new(code, Confidence::High, fix);
    verdict.evidence.extend(node.problems().cloned());
    found.say(verdict);
}

/// A hostPort with `hostIP: 127.0.0.1` is for the node's own processes, where the network plugin heeds that.
fn host_port(facts: &Facts, found: &mut Found) {
    let Some((address, answers)) = facts.host_port else { return };
    if !answers {
        return found.note(format!("registry: not reached at {address}, as it should be"));
    }
    let fix = format!(
        "use a network plugin that heeds `hostIP` of a hostPort, keep port {} of the nodes closed by their firewall, or use host networking \
         (`networkMode: host` of the chart)",
        address.port()
    );
    let verdict = Verdict::new(Code::RegistryWide, Confidence::High, fix);
    found.say(
        verdict.seen(format!("Peili answers at {address}")).or("the hostPort has no `hostIP: 127.0.0.1`"),
    );
}

/// One that is down is its own matter; that all are is this node's, or the cluster's.
fn registries(facts: &Facts, asked: &[AskedRegistry], found: &mut Found) {
    let names = |answers: bool| -> Vec<&str> {
        asked.iter().filter(|one| one.answers == answers).map(|one| one.name.as_str()).collect()
    };
    let (answer, silent) = (names(true), names(false));
    if silent.is_empty() {
        return;
    }
    if !answer.is_empty() {
        return found.note(format!("registries: {} answer, {} do not", answer.join(", "), silent.join(", ")));
    }
    let fix = "let this node reach its registries (egress of policies and firewalls, DNS, `HTTPS_PROXY`); where there is to be no way to them, \
               say so: `mirror.tags-peers-first`";
    let mut verdict = Verdict::new(Code::RegistriesSilent, Confidence::Medium, fix).seen(silent.join(", "));
    if matches!(facts.runtime, Some(Runtime { report: Err(Unseen::NoRuntime), .. })) {
        verdict = verdict.or("other hosts stand for them in hosts.toml files, which are not seen from here");
    }
    verdict = verdict
        .or("a policy or a firewall lets nothing through to registries")
        .or("the registries are down, or fail with 5xx or 429");
    let unnamed = facts.unnamed.iter().filter(|(name, _)| silent.contains(&name.as_str()));
    verdict.evidence.extend(unnamed.map(|(name, why)| format!("{name}: {why}")));
    let are_unnamed = silent.iter().all(|name| is_unnamed(facts, name));
    found.say_or_fold(verdict, if are_unnamed { &NAMES_DOWN } else { &[] });
}

/// Members hear of each other by the control plane; content comes by another port. One that is not reached may be on its way down.
fn peer_ports(facts: &Facts, found: &mut Found) {
    let failed: Vec<(&str, &str)> = facts
        .peer_ports
        .iter()
        .filter_map(|(name, answer)| Some((name.as_str(), answer.as_ref().err()?.as_str())))
        .collect();
    let all = facts.peer_ports.len();
    if all == 0 {
        return;
    }
    if failed.len() < all {
        let missing: Vec<&str> = failed.iter().map(|(name, _)| *name).collect();
        let but =
            if missing.is_empty() { String::new() } else { format!(", not that of {}", missing.join(", ")) };
        found.note(format!("mirror: the peer ports of {} of {all} members answer{but}", all - missing.len()));
        return;
    }
    let fix = "let the nodes reach each other at the peer port (`transfer.listen`, TCP 5002) and not only at the control plane: until then \
               images come from registries";
    let mut verdict = Verdict::new(Code::PeerPort, Confidence::High, fix);
    verdict.evidence.extend(failed.iter().map(|(name, why)| format!("{name}: {why}")));
    found.say(
        verdict
            .or("a policy or a firewall lets the control plane through and not the peer port")
            .or("the members advertise addresses at which they are not reached"),
    );
}
