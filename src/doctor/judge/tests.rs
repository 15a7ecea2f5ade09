//! A row for each code: what is changed in facts that are well, and all that is said then. Look-alikes have rows of their own.

mod data;
mod folded;
mod lost;

use std::time::{Duration, SystemTime};

use http::Uri;

use super::super::code::{Code, Confidence};
use super::super::facts::{
    Answers, Facts, Lock, LockAnswer, Making, Purpose, Runtime, Silence, Unseen, Wanted,
};
use super::super::place::{Cni, Inside, Network, Place};
use super::super::{CAUSES, Ports};
use super::judge;
use crate::admin::{AskedRegistry, Status, StoreHealth};
use crate::cluster::{
    Account, Cause, Fault, Handshake, Kind, Obstacle, Origin, Reach, Refusal, Right, Write,
};
use crate::configure;
use crate::network::swarm::Unresolved;

fn reach(origin: Origin, address: &str) -> Reach {
    let uri: Uri = format!("https://{address}").parse().unwrap();
    let handshake = Some(Handshake::Trusted);
    Reach { origin, address: address.into(), uri, obstacle: None, host_answers: false, handshake }
}

fn right(verb: &'static str, resource: &'static str, name: Option<&str>) -> Right {
    Right { verb, group: "", resource, name: name.map(str::to_owned), namespaced: resource != "nodes" }
}

fn well() -> Facts {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let lock = Lock { kind: Kind::Lease, name: "peili".into(), writes: true };
    let rights = vec![
        (Purpose::Lock, right("get", "leases", Some("peili"))),
        (Purpose::Lock, right("update", "leases", Some("peili"))),
        (Purpose::Watch, right("watch", "leases", Some("peili"))),
        (Purpose::Create(Making::Lease), right("create", "leases", None)),
        (Purpose::Summary, right("get", "configmaps", Some("peili-fleet"))),
        (Purpose::Create(Making::ConfigMap), right("create", "configmaps", None)),
        (Purpose::Events, right("create", "events", None)),
        (Purpose::Node, right("get", "nodes", Some("n"))),
    ];
    let wanted = Wanted { locks: vec![lock.clone()], summary: "peili-fleet".into(), rights: rights.clone() };
    let report = configure::Report {
        node: None,
        changes: Vec::new(),
        unchanged: Vec::new(),
        findings: Vec::new(),
        ready: true,
    };
    Facts {
        now,
        told: None,
        place: Place::default(),
        wanted: Some(wanted),
        in_cluster: true,
        account: Account {
            issued: Some(now - Duration::from_secs(100)),
            written: Some(now - Duration::from_secs(99)),
            expires: Some(now + Duration::from_secs(500)),
            audiences: vec!["https://issuer".into()],
            issuer: "https://issuer".into(),
            subject: "system:serviceaccount:peili:peili".into(),
            ..Account::default()
        },
        namespace: Ok("peili".into()),
        reaches: vec![
            reach(Origin::Service, "10.96.0.1:443"),
            Reach {
                obstacle: Some(Obstacle::Refused),
                handshake: None,
                ..reach(Origin::KubePrism, "127.0.0.1:7445")
            },
        ],
        answers: Some(Answers {
            address: "10.96.0.1:443".into(),
            version: Ok("v1.34.4".into()),
            who: None,
            rights: rights.into_iter().map(|(purpose, right)| (purpose, right, Ok(true))).collect(),
            locks: vec![LockAnswer { lock, there: Ok(true), holder: None, write: Some(Write::Taken) }],
            unsure: Vec::new(),
            summary: Some(Ok(true)),
        }),
        names: vec![("peers.peili.svc".into(), Ok(3))],
        cluster_name: Some(Ok(1)),
        runtime: Some(Runtime {
            socket: "/run/containerd/containerd.sock".into(),
            version: Ok("2.1".into()),
            report: Ok(Box::new(report)),
            missing: Vec::new(),
            unrecorded: false,
        }),
        mirror: Err("nothing listens".into()),
        unnamed: Vec::new(),
        registries: Vec::new(),
        peer_ports: Vec::new(),
        host_port: None,
    }
}

fn answers(facts: &mut Facts) -> &mut Answers {
    facts.answers.as_mut().unwrap()
}

fn runtime(facts: &mut Facts) -> &mut Runtime {
    facts.runtime.as_mut().unwrap()
}

/// The first address is not open, for this reason; so nothing was asked.
fn far(facts: &mut Facts, obstacle: Obstacle) {
    facts.answers = None;
    facts.reaches[0].obstacle = Some(obstacle);
    facts.reaches[0].handshake = None;
}

fn insecure(facts: &mut Facts, handshake: Handshake) {
    facts.answers = None;
    facts.reaches[0].handshake = Some(handshake);
}

fn fault(cause: Cause) -> Fault {
    Fault::new(cause, "words")
}

fn fails(facts: &mut Facts, cause: Cause) {
    answers(facts).version = Err(fault(cause));
}

fn refuses(facts: &mut Facts, refusal: Refusal) {
    answers(facts).locks[0].write = Some(Write::Refused(refusal, "words".into()));
}

fn denies(facts: &mut Facts, denied: Purpose) {
    for (purpose, _, answer) in &mut answers(facts).rights {
        if *purpose == denied {
            *answer = Ok(false);
        }
    }
}

fn finds(facts: &mut Facts, code: configure::Code) {
    let finding = configure::Finding { code, text: "found".into(), fix: None };
    let report = runtime(facts).report.as_mut().unwrap();
    report.ready = !code.stops();
    report.findings.push(finding);
}

fn asked(name: &str, answers: bool) -> AskedRegistry {
    AskedRegistry { name: name.into(), answers }
}

fn mirror(facts: &mut Facts, change: fn(&mut Status)) {
    let mut status = Status::default();
    change(&mut status);
    facts.mirror = Ok(Box::new(status));
}

fn dns(facts: &mut Facts, name: Unresolved, cluster: Result<usize, Unresolved>) {
    facts.names[0].1 = Err(name);
    facts.cluster_name = Some(cluster);
}

type Row = (&'static str, fn(&mut Facts), &'static [Code]);

const ROWS: &[Row] = &[
    ("well", |_| {}, &[]),
    ("not needed", |f| (f.wanted, f.in_cluster) = (None, false), &[]),
    ("no cluster", |f| (f.in_cluster, f.answers) = (false, None), &[Code::NoCluster]),
    ("no token", |f| (f.account.unread, f.answers) = (Some("gone".into()), None), &[Code::NoToken]),
    (
        "no authority",
        |f| {
            (f.account.untrusted, f.answers) = (Some("gone".into()), None);
            f.reaches[0].handshake = None;
        },
        &[Code::NoAuthority],
    ),
    ("no namespace", |f| (f.namespace, f.answers) = (Err("gone".into()), None), &[Code::NoNamespace]),
    (
        "expired and refused",
        |f| {
            f.account.expires = Some(f.now - Duration::from_secs(5));
            fails(f, Cause::Unauthorized);
        },
        &[Code::TokenExpired],
    ),
    ("expired and taken", |f| f.account.expires = Some(f.now - Duration::from_secs(5)), &[]),
    (
        "for others",
        |f| {
            f.account.audiences = vec!["vault".into()];
            fails(f, Cause::Unauthorized);
        },
        &[Code::TokenAudience],
    ),
    ("for others and taken", |f| f.account.audiences = vec!["vault".into()], &[]),
    ("refused", |f| fails(f, Cause::Unauthorized), &[Code::TokenRejected]),
    (
        "issued in the future",
        |f| f.account.issued = Some(f.now + Duration::from_secs(90)),
        &[Code::ClockBehind],
    ),
    ("issued a moment ahead", |f| f.account.issued = Some(f.now + Duration::from_secs(30)), &[]),
    ("no name", |f| far(f, Obstacle::Unresolved("x".into())), &[Code::ApiUnresolved]),
    ("silence", |f| far(f, Obstacle::Timeout), &[Code::ApiUnreachable]),
    (
        "silence, and the host answers",
        |f| {
            far(f, Obstacle::Timeout);
            f.reaches[0].host_answers = true;
        },
        &[Code::ApiBlocked],
    ),
    ("no way", |f| far(f, Obstacle::Unroutable("x".into())), &[Code::ApiUnroutable]),
    ("refused by all", |f| far(f, Obstacle::Refused), &[Code::ApiRefused]),
    (
        "different at each address",
        |f| {
            far(f, Obstacle::Refused);
            let mut other = reach(Origin::Endpoint, "10.0.0.2:6443");
            (other.obstacle, other.handshake) = (Some(Obstacle::Timeout), None);
            f.reaches.insert(0, other);
        },
        &[Code::ApiUnreachable],
    ),
    ("another family", |f| far(f, Obstacle::Family), &[Code::AddressFamily]),
    (
        "the Service is dead, an endpoint answers",
        |f| {
            (f.reaches[0].obstacle, f.reaches[0].handshake) = (Some(Obstacle::Refused), None);
            f.reaches.insert(0, reach(Origin::Endpoint, "10.0.0.2:6443"));
        },
        &[Code::ServiceUnreachable],
    ),
    (
        "the Service has a certificate for other names, an endpoint is as it should be",
        |f| {
            f.reaches[0].handshake = Some(Handshake::Name(vec!["x".into()]));
            f.reaches.insert(0, reach(Origin::Endpoint, "10.0.0.2:6443"));
        },
        &[Code::TlsName],
    ),
    (
        "two endpoints are dead in one way, the Service answers",
        |f| {
            for address in ["10.0.0.2:6443", "10.0.0.3:6443"] {
                let mut other = reach(Origin::Endpoint, address);
                (other.obstacle, other.handshake) = (Some(Obstacle::Timeout), None);
                f.reaches.insert(0, other);
            }
        },
        &[Code::EndpointUnreachable],
    ),
    (
        "one address is silent while its host answers, another one is refused",
        |f| {
            far(f, Obstacle::Refused);
            let mut other = reach(Origin::Endpoint, "10.0.0.2:6443");
            (other.obstacle, other.handshake, other.host_answers) = (Some(Obstacle::Timeout), None, true);
            f.reaches.insert(0, other);
        },
        &[Code::ApiUnreachable],
    ),
    ("the kernel says something else", |f| far(f, Obstacle::Other("EMFILE".into())), &[Code::ApiUnreachable]),
    (
        "the token is taken out on the way",
        |f| {
            let answers = f.answers.as_mut().unwrap();
            answers.who = Some("system:anonymous".into());
            answers.rights.iter_mut().for_each(|right| right.2 = Ok(false));
        },
        &[Code::TokenRejected],
    ),
    (
        "a review allows what is forbidden then",
        |f| {
            let lock = &mut f.answers.as_mut().unwrap().locks[0];
            lock.write = Some(Write::Refused(Refusal::Forbidden, "cannot".into()));
        },
        &[Code::WriteRefused],
    ),
    (
        "an endpoint is dead, the Service answers",
        |f| {
            let mut other = reach(Origin::Endpoint, "10.0.0.2:6443");
            (other.obstacle, other.handshake) = (Some(Obstacle::Timeout), None);
            f.reaches.insert(0, other);
        },
        &[Code::EndpointUnreachable],
    ),
    ("TLS is silent", |f| insecure(f, Handshake::Silent), &[Code::TlsSilent]),
    ("another issuer", |f| insecure(f, Handshake::Issuer("CN=x".into())), &[Code::TlsIssuer]),
    ("another name", |f| insecure(f, Handshake::Name(vec!["a".into()])), &[Code::TlsName]),
    (
        "a certificate that does not count yet",
        |f| insecure(f, Handshake::Early("x".into())),
        &[Code::TlsTime],
    ),
    ("another time", |f| insecure(f, Handshake::Time("x".into())), &[Code::TlsTime]),
    ("no TLS", |f| insecure(f, Handshake::Broken("x".into())), &[Code::TlsBroken]),
    (
        "a token is missing, and there is no way either",
        |f| {
            f.account.unread = Some("gone".into());
            far(f, Obstacle::Refused);
        },
        &[Code::NoToken, Code::ApiRefused],
    ),
    ("no answer", |f| fails(f, Cause::NoAnswer), &[Code::ApiSilent]),
    ("no API server", |f| fails(f, Cause::Malformed), &[Code::NotAnApiServer]),
    ("errors", |f| fails(f, Cause::Server), &[Code::ControlPlane]),
    (
        "silence after the version",
        |f| answers(f).locks[0].there = Err(fault(Cause::NoAnswer)),
        &[Code::ControlPlane],
    ),
    ("no such path", |f| fails(f, Cause::NoObject), &[Code::NotAnApiServer]),
    (
        "errors after the version",
        |f| answers(f).locks[0].there = Err(fault(Cause::Server)),
        &[Code::ControlPlane],
    ),
    ("too many requests", |f| fails(f, Cause::Throttled), &[Code::Throttled]),
    ("no such namespace", |f| refuses(f, Refusal::NoNamespace), &[Code::NamespaceMissing]),
    ("the namespace ends", |f| refuses(f, Refusal::Terminating), &[Code::NamespaceTerminating]),
    (
        "may not read the lock",
        |f| {
            denies(f, Purpose::Lock);
            let lock = &mut answers(f).locks[0];
            (lock.there, lock.write) = (Err(fault(Cause::Forbidden)), None);
        },
        &[Code::RightsLock],
    ),
    (
        "may not replace the lock",
        |f| {
            denies(f, Purpose::Lock);
            refuses(f, Refusal::Forbidden);
        },
        &[Code::RightsLock],
    ),
    ("may not watch", |f| denies(f, Purpose::Watch), &[Code::RightsWatch]),
    ("may not tell Events", |f| denies(f, Purpose::Events), &[Code::RightsCoordinator]),
    ("may not read its Node", |f| denies(f, Purpose::Node), &[Code::RightsNode]),
    ("may not make what is there", |f| denies(f, Purpose::Create(Making::Lease)), &[]),
    (
        "may not ask what it may",
        |f| {
            for (_, _, answer) in &mut answers(f).rights {
                *answer = Err(fault(Cause::Forbidden));
            }
        },
        &[Code::ReviewRefused],
    ),
    (
        "may neither ask nor replace",
        |f| {
            for (_, _, answer) in &mut answers(f).rights {
                *answer = Err(fault(Cause::Forbidden));
            }
            refuses(f, Refusal::Forbidden);
        },
        &[Code::RightsLock, Code::ReviewRefused],
    ),
    (
        "the lock is missing, and may not be made",
        |f| {
            denies(f, Purpose::Create(Making::Lease));
            answers(f).locks[0].there = Ok(false);
            refuses(f, Refusal::Forbidden);
        },
        &[Code::LockMissing],
    ),
    ("the lock is missing, and may be made", |f| answers(f).locks[0].there = Ok(false), &[]),
    (
        "held by another",
        |f| answers(f).locks[0].holder = Some(("spegel-1".into(), false)),
        &[Code::LockForeign],
    ),
    (
        "held by another, in whose turns Peili takes part",
        |f| {
            answers(f).locks[0].holder = Some(("spegel-1".into(), false));
            let old = answers(f).locks[0].clone();
            answers(f).locks.push(old);
        },
        &[],
    ),
    ("held by Peili", |f| answers(f).locks[0].holder = Some(("n/p/0".into(), true)), &[]),
    (
        "no summary, and none may be made",
        |f| {
            denies(f, Purpose::Create(Making::ConfigMap));
            answers(f).summary = Some(Ok(false));
        },
        &[Code::SummaryMissing],
    ),
    ("no summary yet", |f| answers(f).summary = Some(Ok(false)), &[]),
    ("a quota", |f| refuses(f, Refusal::Quota), &[Code::Quota]),
    ("a webhook says no", |f| refuses(f, Refusal::Denied), &[Code::AdmissionDenied]),
    ("a webhook is dead", |f| refuses(f, Refusal::WebhookDead), &[Code::WebhookDead]),
    ("a webhook does not try", |f| refuses(f, Refusal::NotDry), &[]),
    ("somebody was faster", |f| refuses(f, Refusal::Conflict), &[]),
    ("something else", |f| refuses(f, Refusal::Other), &[Code::WriteRefused]),
    (
        "silence when it is written",
        |f| answers(f).locks[0].write = Some(Write::Failed(fault(Cause::NoAnswer))),
        &[Code::WriteSilent],
    ),
    ("DNS is silent", |f| dns(f, Unresolved::Silent, Err(Unresolved::Silent)), &[Code::DnsSilent]),
    ("only that name is unknown", |f| dns(f, Unresolved::NoSuchHost, Ok(1)), &[Code::DnsNoName]),
    (
        "another DNS",
        |f| dns(f, Unresolved::NoSuchHost, Err(Unresolved::NoSuchHost)),
        &[Code::DnsNotTheClusters],
    ),
    ("DNS fails", |f| dns(f, Unresolved::Other("refused".into()), Ok(1)), &[Code::DnsFailing]),
    ("one answer was lost", |f| dns(f, Unresolved::Silent, Ok(1)), &[Code::DnsFailing]),
    ("no socket", |f| runtime(f).version = Err(Silence::Absent), &[Code::ContainerdAbsent]),
    (
        "no containerd at all",
        |f| {
            runtime(f).version = Err(Silence::Absent);
            runtime(f).report = Err(Unseen::NoRuntime);
        },
        &[Code::ContainerdAbsent],
    ),
    (
        "not allowed",
        |f| runtime(f).version = Err(Silence::Denied("EACCES".into())),
        &[Code::ContainerdDenied],
    ),
    ("not listening", |f| runtime(f).version = Err(Silence::Down), &[Code::ContainerdDown]),
    ("not answering", |f| runtime(f).version = Err(Silence::Silent), &[Code::ContainerdSilent]),
    ("files unseen", |f| runtime(f).report = Err(Unseen::NoRuntime), &[Code::RuntimeUnseen]),
    (
        "files unreadable",
        |f| runtime(f).report = Err(Unseen::Unreadable("x".into())),
        &[Code::RegistryUnreadable],
    ),
    (
        "no folder",
        |f| {
            runtime(f).missing = vec!["/etc/containerd/certs.d".into()];
            finds(f, configure::Code::NotSetUp);
        },
        &[Code::HostsFolderMissing],
    ),
    ("not set up", |f| finds(f, configure::Code::NotSetUp), &[Code::RegistryNotSetUp]),
    (
        "owned and not set up",
        |f| {
            finds(f, configure::Code::NotSetUp);
            finds(f, configure::Code::Owned);
        },
        &[Code::RegistryOwned],
    ),
    ("owned", |f| finds(f, configure::Code::Owned), &[Code::RegistryOwned]),
    ("not read", |f| finds(f, configure::Code::Mirrors), &[Code::RegistryIgnored]),
    ("a file is missing", |f| finds(f, configure::Code::MissingFile), &[Code::RegistryFile]),
    ("layers are forgotten", |f| finds(f, configure::Code::Discard), &[Code::LayersDiscarded]),
    ("a registry of its own", |f| finds(f, configure::Code::Shadowed), &[]),
    ("no containerd is wanted", |f| f.runtime = None, &[]),
    ("the mirror is well", |f| mirror(f, |s| s.election.mode = "lease".into()), &[]),
    ("the mirror is alone", |f| mirror(f, |s| s.election.mode = "alone".into()), &[Code::MirrorAlone]),
    (
        "policies are refused",
        |f| mirror(f, |s| s.policies_refused = "not a component\nhint: mount one".into()),
        &[Code::PoliciesRefused],
    ),
    (
        "no peer port answers",
        |f| {
            mirror(f, |s| s.election.mode = "lease".into());
            f.peer_ports = vec![("a".into(), Err("x".into())), ("b".into(), Err("x".into()))];
        },
        &[Code::PeerPort],
    ),
    (
        "one peer port does not answer",
        |f| {
            mirror(f, |s| s.election.mode = "lease".into());
            f.peer_ports = vec![("a".into(), Err("x".into())), ("b".into(), Ok(()))];
        },
        &[],
    ),
    (
        "no registry answers",
        |f| mirror(f, |s| s.registries = vec![asked("a.test", false), asked("b.test", false)]),
        &[Code::RegistriesSilent],
    ),
    (
        "one registry does not answer",
        |f| mirror(f, |s| s.registries = vec![asked("a.test", false), asked("b.test", true)]),
        &[],
    ),
    (
        "the hostPort is open to others",
        |f| f.host_port = Some(("10.0.0.1:5000".parse().unwrap(), true)),
        &[Code::RegistryWide],
    ),
    (
        "the hostPort is for the node alone",
        |f| f.host_port = Some(("10.0.0.1:5000".parse().unwrap(), false)),
        &[],
    ),
    (
        "the mirror's store",
        |f| mirror(f, |s| s.store.health = StoreHealth::Degraded { reason: "x".into() }),
        &[Code::MirrorStore],
    ),
    (
        "two at once",
        |f| {
            far(f, Obstacle::Timeout);
            runtime(f).version = Err(Silence::Down);
            finds(f, configure::Code::Discard);
        },
        &[Code::ApiUnreachable, Code::ContainerdDown, Code::LayersDiscarded],
    ),
];

#[test]
fn each_fault_has_its_verdict_and_no_other() {
    let ports = Ports { peers: vec![5001], metrics: None, out: vec![443] };
    let mut covered = Vec::new();
    for (name, change, expected) in ROWS.iter().chain(lost::ROWS).chain(data::ROWS) {
        let mut facts = well();
        change(&mut facts);
        let (verdicts, _) = judge(&facts, &ports);
        let codes: Vec<Code> = verdicts.iter().map(|verdict| verdict.code).collect();
        assert_eq!(codes, *expected, "{name}: {verdicts:#?}");
        for verdict in &verdicts {
            assert!(!verdict.fix.is_empty() || verdict.code == Code::MirrorAlone, "{name}: {verdict:#?}");
            assert!(verdict.other_causes.len() <= CAUSES, "{name}: {verdict:#?}");
        }
        covered.extend(codes);
    }
    let missing: Vec<Code> = Code::ALL.iter().filter(|code| !covered.contains(code)).copied().collect();
    assert!(missing.is_empty(), "no row has {missing:?}");
}

/// A policy of the network is printed where it counts, and a firewall is named where it does not.
#[test]
fn what_lets_packets_through_is_said_for_the_place() {
    let check = |network, cni, distribution: &str, words: &str, manifests: &[&str]| {
        let mut facts = well();
        far(&mut facts, Obstacle::Timeout);
        let distribution = distribution.to_owned();
        let label = ("app.kubernetes.io/name".to_owned(), "peili".to_owned());
        facts.place = Place { inside: Inside::Pod, network, cni, distribution, label };
        let ports = Ports { peers: vec![5001], ..Ports::default() };
        let (verdicts, _) = judge(&facts, &ports);
        assert!(verdicts[0].fix.contains(words), "{verdicts:#?}");
        let kinds: Vec<_> = verdicts[0].manifests.iter().map(|manifest| manifest.file.as_str()).collect();
        assert_eq!(kinds, manifests);
    };
    check(Network::Pod, Cni::Cilium, "", "ipBlock", &["ciliumnetworkpolicy.yaml"]);
    check(Network::Pod, Cni::Unknown, "", "endpoints' addresses", &["networkpolicy.yaml"]);
    check(Network::Unknown, Cni::Unknown, "", "endpoints' addresses", &[]);
    check(Network::Host, Cni::Cilium, "", "CiliumClusterwideNetworkPolicy", &[]);
    check(Network::Host, Cni::Unknown, "Talos", "NetworkRuleConfig", &[]);
    check(Network::Host, Cni::Unknown, "", "nft list ruleset", &[]);
}

/// How old the token is is evidence, and makes no cause of two: the server may have ended since.
#[test]
fn a_young_token_does_not_make_a_policy_of_silence() {
    for age in [1, 10_000] {
        let mut facts = well();
        facts.account.issued = Some(facts.now - Duration::from_secs(age));
        far(&mut facts, Obstacle::Timeout);
        let (verdicts, _) = judge(&facts, &Ports::default());
        assert_eq!((verdicts[0].code, verdicts[0].other_causes.len()), (Code::ApiUnreachable, 2));
        assert!(verdicts[0].evidence.iter().any(|line| line.contains(&format!("{age} s ago"))));
    }
}

/// The Role is for whom the server names, where it does.
#[test]
fn a_role_is_for_the_account_that_asks() {
    let mut facts = well();
    denies(&mut facts, Purpose::Watch);
    let name = |facts: &Facts| {
        let (verdicts, _) = judge(facts, &Ports::default());
        verdicts[0].manifests[0].objects[1]["subjects"][0]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(name(&facts), "peili");
    answers(&mut facts).who = Some("system:serviceaccount:peili:other".into());
    assert_eq!(name(&facts), "other");
}
