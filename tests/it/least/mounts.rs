//! Each mount of the pod is needed: the rendered pod runs beside a real containerd with the mounts that it names and no others of the node's, none
//! of which is for programs. With all of them all works; without one of them, or with one read-only that is writable, something breaks, and the
//! node says what where it can know. A mount that nothing needs would fail this test.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use peili_lab::image::Image;
use peili_lab::kubernetes::Options;
use peili_lab::netns::{Addresses, Network};
use peili_lab::node::{Node, Plan};
use peili_lab::scratch::Scratch;
use peili_lab::{Dns, Generation, Origin, chart, wait};
use serde_json::{Value, json};

use super::pod::{Altered, Host, Pod, Running};
use crate::chart::parse;
use crate::cli::layout;
use crate::cluster::{PULL, REGISTRY};
use crate::coordination::Cluster;
use crate::doctor;

use Altered::{Nothing, ReadOnly, Without};

/// Who is who in the network.
const POD: usize = 0;
const OTHER: usize = 1;
const SERVER: usize = 2;
const NAMES: usize = 3;
const OUTSIDE: usize = 4;
/// Longest until what is broken, or is not, is seen.
const SOON: Duration = Duration::from_secs(20);
const KEY: &str = "a key of the cluster for tests, 32 bytes at least";
const ZONE: &str = "zone-a";
/// containerd's own, where nothing of Talos' is.
const CONFIG: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n";

/// What the pod and its neighbours are joined to.
struct Rig {
    // Processes before the namespaces that they live in.
    other: Node,
    host: Host,
    cluster: Cluster,
    /// What the other node has and no registry: to be asked for, and to be pulled.
    theirs: Image,
    pulled: Image,
    /// What this node has.
    ours: Image,
    origin: Origin,
    _dns: Dns,
    _network: Network,
    _scratch: Scratch,
}

impl Rig {
    async fn start() -> Self {
        let network = Network::new(OUTSIDE + 1, Addresses::V4).unwrap();
        let scratch = Scratch::new().unwrap();
        let (server, outside) = (network.nodes[SERVER].clone(), network.nodes[OUTSIDE].clone());
        let cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
        cluster.allow_all().await;
        let names = &network.nodes[NAMES];
        let dns = Dns::start(&names.namespace, names.address()).unwrap();
        dns.set("kubernetes.default.svc.cluster.local", Some(vec![server.address()]));
        let mirrors = [POD, OTHER].map(|node| network.nodes[node].address());
        dns.set("peili-peers.peili.svc.cluster.local", Some(mirrors.into()));
        let origin =
            Origin::start_at(Some(&outside.namespace), &[SocketAddr::new(outside.address(), 80)]).unwrap();

        let image = |name: &str, seed| Image::builder(name, "1").layer(65_536).seed(seed).build().unwrap();
        let (theirs, pulled) = (image("library/theirs", 1), image("library/pulled", 2));
        let ours = image("library/ours", 3);
        origin.add(&ours);
        layout(&scratch.path().join("layout"), &[&theirs, &pulled]);
        let key = scratch.path().join("cluster.key");
        std::fs::write(&key, KEY).unwrap();
        let place = &network.nodes[OTHER];
        let store = format!("layout:{}", scratch.path().join("layout").display());
        let mut plan = Plan::in_namespace("node-2", &store, &place.namespace, place.address()).unwrap();
        plan.merge(&json!({
            "network": {"cluster-key": [key], "dns": ["peili-peers.peili.svc:5001"]},
            "election": {"backend": "gossip"},
        }));
        plan.set_resolver(dns.address()).unwrap();

        let service = SocketAddr::new(server.address(), 6443);
        let host = Host::start(Generation::V2, &network.nodes[POD], service).await;
        let resolver = format!(
            "nameserver {}\nsearch peili.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n",
            dns.address()
        );
        host.write("/etc/resolv.conf", &resolver);
        host.write("/var/lib/kubelet/pods/1/etc-hosts", "127.0.0.1 localhost\n");
        let other = plan.start().await.unwrap();
        Self {
            other,
            host,
            cluster,
            theirs,
            pulled,
            ours,
            origin,
            _dns: dns,
            _network: network,
            _scratch: scratch,
        }
    }

    /// Where images of the registry come from, without a mirror.
    fn hosts(&self) -> String {
        format!(
            "server = \"{}\"\n\n[host.\"{0}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
            self.origin.url()
        )
    }

    /// A pod of these objects, with what kubelet gives it.
    async fn pod(&self, objects: &[Value], name: &str, policies: &[(&str, &[u8])]) -> Pod<'_> {
        let folder = self.cluster.credentials("account").await;
        let credential = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let (token, authority, namespace) =
            (credential("token"), credential("ca.crt"), credential("namespace"));
        let mut given: Vec<(&str, &[u8])> = vec![
            ("token/token", &token),
            ("token/ca.crt", &authority),
            ("token/namespace", &namespace),
            ("cluster-key/current", KEY.as_bytes()),
            ("cluster-key/next", KEY.as_bytes()),
        ];
        given.extend(policies);
        Pod::new(&self.host, objects, name, &given)
    }

    /// What does not work. `identity`: that of the node; empty: any.
    async fn broken(&self, pod: &mut Running<'_>, identity: &str) -> BTreeSet<&'static str> {
        let Some(status) = pod.status().await.filter(|_| pod.is_running()) else { return ["runs"].into() };
        let tag = format!("/v2/library/unknown/manifests/1?ns={REGISTRY}");
        let (theirs, tag) = (pod.fetch(&layer(&self.theirs)).await, pod.fetch(&tag).await);
        let is = |what, works: bool| (!works).then_some(what);
        // Until it has heard of the last one's end it says that it starts.
        let elects = ["", "starting"].map(|cause| status["election"]["cause"] == cause);
        let looks = [
            is("ready", pod.is_ready().await),
            is("members", status["network"]["members"] == 2),
            is("takes", theirs.is_some_and(|answer| answer.status == 200)),
            is("gives", self.gives().await),
            is("elects", elects.contains(&true)),
            // While it answers, its tags are left to it.
            is("registry", tag.is_some_and(|answer| answer.text().contains("tag-upstream"))),
            is("identity", identity.is_empty() || status["node"]["peer_id"] == *identity),
            is("zone", status["node"]["zone"] == ZONE),
            is("policies", !status["problems"].to_string().contains("\"policies: ")),
            is("explain", pod.exec(&["election", "status"]).status.success()),
        ];
        looks.into_iter().flatten().collect()
    }

    /// Whether the other node gets what this one has.
    async fn gives(&self) -> bool {
        self.other.fetch(&layer(&self.ours)).await.is_ok_and(|answer| answer.status == 200)
    }

    /// Waits until exactly this is broken; an error: it is not.
    async fn comes_to(
        &self,
        pod: &mut Running<'_>,
        identity: &str,
        expected: &BTreeSet<&'static str>,
    ) -> Result<(), String> {
        let mut last = BTreeSet::new();
        let waited = wait::until("what is broken", SOON, async || {
            last = self.broken(pod, identity).await;
            (last == *expected).then_some(())
        });
        waited.await.map_err(|error| format!("{error}: {last:?} instead of {expected:?}"))
    }

    /// Leaves mounts out, one after the other, of the mirror's container.
    async fn alter(&self, pod: &Pod<'_>, identity: &str, rows: &[Row]) {
        let mut wrong = Vec::new();
        for row in rows {
            // What it remembers from before shows nothing.
            let _ = std::fs::remove_file(self.host.path("/var/lib/peili/zone"));
            if let Err(error) = self.altered(pod, identity, row).await {
                wrong.push(format!("{:?}: {error}", row.0));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    async fn altered(&self, pod: &Pod<'_>, identity: &str, row: &Row) -> Result<(), String> {
        let (altered, breaks, says, words) = row;
        let mut running = pod.launch("peili", *altered);
        let runs = !breaks.contains(&"runs");
        let at_once: BTreeSet<_> = breaks.iter().copied().filter(|broken| *broken != OUTAGE).collect();
        let mut text = if runs {
            self.comes_to(&mut running, identity, &at_once).await?;
            let doctor = running.exec(&["doctor", "--json"]);
            check(codes(&doctor) == *says, || said(&doctor))?;
            let broken = self.broken(&mut running, identity).await;
            check(broken == at_once, || format!("then {broken:?}"))?;
            // containerd is started anew, or hangs.
            let containerd = self.host.containerd.process().unwrap();
            containerd.pause().unwrap();
            let gives = self.gives().await;
            containerd.resume().unwrap();
            let is_lost = breaks.contains(&OUTAGE) || breaks.contains(&"gives");
            check(gives != is_lost, || format!("gives while containerd stands still: {gives}"))?;
            said(&doctor)
        } else {
            running.has_ended().await;
            said(&pod.run("peili", *altered, Some(&["doctor", "--json"])))
        };
        text.push_str(&running.end().await);
        check(text.contains(words), || format!("nobody says `{words}`: {text}"))?;
        shown(&format!("{altered:?}"), &breaks.join(", "), &says.join(", "), words);
        Ok(())
    }
}

fn check(is_so: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(otherwise()) }
}

/// What is other, what that breaks, doctor's verdicts, and words that doctor, the status or the log has.
type Row = (Altered, &'static [&'static str], &'static [&'static str], &'static str);

/// What it has is given while containerd stands still.
const OUTAGE: &str = "gives in an outage of containerd";

fn shown(what: &str, breaks: &str, says: &str, words: &str) {
    println!("| {what} | {breaks} | {says} | {words} |");
}

fn layer(image: &Image) -> String {
    format!("/v2/{}/blobs/{}?ns={REGISTRY}", image.repository, image.layers[0])
}

/// What a program said, on both ways.
fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).concat()
}

/// The codes of doctor's verdicts.
fn codes(output: &Output) -> Vec<String> {
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    doctor::codes(&report)
}

/// Of a container that ends: what is other, and what it says of that.
const CONFIGURE: &[(Altered, &str)] = &[
    (Without("config"), "cannot read /etc/peili/config/config.yaml: No such file"),
    (Without("data"), "cannot make /var/lib/peili/configure: Read-only file system"),
    (ReadOnly("data"), "cannot make /var/lib/peili/configure: Read-only file system"),
    (Without("runtime-config"), "/etc/containerd/certs.d is not there"),
    (
        ReadOnly("runtime-config"),
        "cannot write /host/etc/containerd/certs.d/lab.test/.peili-hosts.toml: Read-only file system",
    ),
];
const CLEANUP: &[(Altered, &str)] = &[
    (Without("data"), "cannot make /var/lib/peili/configure: Read-only file system"),
    (ReadOnly("data"), "cannot open /var/lib/peili/configure/lock: Read-only file system"),
    (Without("runtime-config"), "/etc/containerd/certs.d is not there"),
    (ReadOnly("runtime-config"), "/.peili-hosts.toml: Read-only file system"),
];
const MIRROR: &[Row] = &[
    (Without("config"), &["runs"], &[], "cannot read /etc/peili/config/config.yaml: No such file"),
    (
        Without("cluster-key"),
        &["elects", "gives", "members", "takes"],
        &["mirror-alone"],
        "cluster key /etc/peili/cluster-key/current: it cannot be read",
    ),
    // Nobody can know that there are labels.
    (Without("podinfo"), &["zone"], &[], ""),
    (Without("data"), &["explain", "identity"], &["mirror-data"], "data folder /var/lib/peili: No such file"),
    (ReadOnly("data"), &["explain"], &["mirror-data"], "data folder /var/lib/peili: Read-only file system"),
    (Without("runtime-socket"), &["gives", "ready"], &["containerd-absent"], "is the socket mounted?"),
    (Without("runtime-content"), &[OUTAGE], &[], "mirror: says: store: content comes over containerd's API"),
    (
        Without("runtime-config"),
        &["registry"],
        &["registries-silent", "runtime-unseen"],
        "containerd's configuration cannot be seen from here",
    ),
    (
        Without("token"),
        &["elects"],
        &["no-authority", "no-namespace", "no-token"],
        "mount a service account's token",
    ),
];

/// All mounts of these containers, and those that they may write to once more as read-only, are among those that are altered.
fn all_are_altered<'a>(pod: &Pod<'_>, container: &str, altered: impl Iterator<Item = &'a Altered>) {
    let names = |altered: &Altered| match altered {
        Nothing => unreachable!("a row alters something"),
        Without(name) => ((*name).to_owned(), false),
        ReadOnly(name) => ((*name).to_owned(), true),
    };
    let altered: BTreeSet<_> = altered.map(names).collect();
    let mounts = pod.mounts(container);
    let writable = mounts.iter().filter(|(_, writes)| *writes).cloned();
    let rendered = mounts.iter().map(|(name, _)| (name.clone(), false)).chain(writable).collect();
    assert_eq!(altered, rendered, "{container}");
}

pub(super) async fn each_is_needed() {
    let rig = Rig::start().await;
    let set = format!("runtime.registries={{{REGISTRY}}},podLabels.topology\\.kubernetes\\.io/zone={ZONE}");
    let values = chart::values("default").display().to_string();
    let objects = parse(&chart::render(&["--values", &values, "--set", &set]).unwrap());
    let pod = rig.pod(&objects, chart::NAME, &[]).await;
    let cleaner = rig.pod(&objects, "peili-cleanup", &[]).await;
    let hosts = format!("/etc/containerd/certs.d/{REGISTRY}/hosts.toml");
    rig.host.write("/etc/containerd/config.toml", CONFIG);
    rig.host.write(&hosts, &rig.hosts());
    rig.host.keep_hosts("/etc/containerd/certs.d", false);
    let cri = rig.host.containerd.cri();
    let _ = cri.pull(&rig.ours.reference(REGISTRY), PULL).await.unwrap();
    let written = || std::fs::read_to_string(rig.host.path(&hosts)).unwrap();

    // Whatever `configure` lacks, it says so, changes nothing, and the mirror goes on; doctor sees what is missing.
    let mut mirror = None;
    for (altered, words) in CONFIGURE {
        let output = pod.run("configure", *altered, None);
        let text = said(&output);
        assert!(output.status.success() && text.contains(words), "{altered:?}: {text}");
        assert_eq!(written(), rig.hosts(), "{altered:?}");
        let running = mirror.get_or_insert_with(|| pod.launch("peili", Nothing));
        rig.comes_to(running, "", &BTreeSet::new()).await.unwrap();
        let doctor = running.exec(&["doctor", "--json"]);
        assert_eq!(codes(&doctor), ["registry-not-set-up"], "{altered:?}: {}", said(&doctor));
        shown(&format!("configure: {altered:?}"), "set up", "registry-not-set-up", words);
    }
    all_are_altered(&pod, "configure", CONFIGURE.iter().map(|(altered, _)| altered));

    let output = pod.run("configure", Nothing, None);
    assert!(output.status.success() && written().contains("http://127.0.0.1:5000"), "{}", said(&output));
    let mirror = mirror.unwrap();
    let doctor = mirror.exec(&["doctor", "--json"]);
    assert_eq!(codes(&doctor), [] as [&str; 0], "{}", said(&doctor));
    let _ = cri.pull(&rig.pulled.digest_reference(REGISTRY), PULL).await.unwrap();
    confined(&pod, &mirror);
    let status = mirror.status().await.unwrap();
    let identity = status["node"]["peer_id"].as_str().unwrap().to_owned();
    let mode = async || (mirror.status().await?["election"]["mode"] == "lease").then_some(());
    wait::until("a lease", SOON, mode).await.unwrap();
    mirror.end().await;

    rig.alter(&pod, &identity, MIRROR).await;
    all_are_altered(&pod, "peili", MIRROR.iter().map(|(altered, ..)| altered));

    // A node is not clean before its files are.
    let set_up = written();
    for container in ["cleanup", "hold"] {
        for (altered, words) in CLEANUP {
            let output = cleaner.run(container, *altered, None);
            let text = said(&output);
            assert!(!output.status.success() && text.contains(words), "{container} {altered:?}: {text}");
            assert_eq!(written(), set_up, "{container} {altered:?}");
            shown(&format!("{container}: {altered:?}"), "clean", "", words);
        }
        all_are_altered(&cleaner, container, CLEANUP.iter().map(|(altered, _)| altered));
    }
    let output = cleaner.run("cleanup", Nothing, None);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(written(), rig.hosts());
}

/// The process has no more of the node than its mounts, none of which is for programs, and no rights.
fn confined(pod: &Pod<'_>, running: &Running<'_>) {
    let mounts = running.proc("mountinfo");
    let places = pod.places("peili");
    let mut of_node = Vec::new();
    for line in mounts.lines() {
        let (about, system) = line.split_once(" - ").unwrap();
        let (at, options) = (about.split(' ').nth(4).unwrap(), about.split(' ').nth(5).unwrap());
        let has = |option: &str| options.split(',').any(|other| other == option);
        // The kernel's own, and what runc hides of them.
        if ["proc", "sysfs", "tmpfs", "devpts", "mqueue"]
            .iter()
            .any(|kind| system.starts_with(&format!("{kind} ")))
        {
            assert!(has("noexec") || has("ro"), "{line}");
            continue;
        }
        match places.iter().find(|(place, _)| place == at) {
            Some((_, writes)) => assert!(has("ro") != *writes, "{line}"),
            None => assert!(["/", "/etc/hosts", "/etc/resolv.conf"].contains(&at) && has("ro"), "{line}"),
        }
        assert!(at == "/" || ["nosuid", "nodev", "noexec"].into_iter().all(has), "{line}");
        of_node.push(at);
    }
    assert_eq!(of_node.len(), places.len() + 3, "{mounts}");
    let status = running.proc("status");
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
}

/// Of those of [`MIRROR`] Talos' pod has another one, for containerd's configuration, and one for policies.
const TALOS: &[Row] = &[
    (Without("runtime-hosts"), &["registry"], &["registries-silent", "runtime-unseen"], ""),
    (
        Without("policies-0"),
        &["gives", "policies", "registry", "takes"],
        &["policies-refused", "runtime-unseen"],
        "allow-list.wasm",
    ),
];

/// As on Talos: nobody may write to the folder of hosts, which the machine's configuration makes.
pub(super) async fn each_on_talos_is_needed() {
    let rig = Rig::start().await;
    let set = format!(
        "policies.registry[0].settings.allow={{{REGISTRY}/**}},podLabels.topology\\.kubernetes\\.io/zone={ZONE}"
    );
    let values = chart::values("talos").display().to_string();
    let objects = parse(&chart::render(&["--values", &values, "--set", &set]).unwrap());
    let policy = std::fs::read(peili_lab::policy("allow-list")).unwrap();
    let pod = rig.pod(&objects, chart::NAME, &[("policies-0/allow-list.wasm", &policy)]).await;
    let hosts = rig.hosts().replacen("[host", "[host.\"http://127.0.0.1:5000\"]\n[host", 1);
    rig.host.write(&format!("/etc/cri/conf.d/hosts/{REGISTRY}/hosts.toml"), &hosts);
    rig.host.keep_hosts("/etc/cri/conf.d/hosts", true);
    let cri = rig.host.containerd.cri();
    let _ = cri.pull(&rig.ours.reference(REGISTRY), PULL).await.unwrap();

    let mut mirror = pod.launch("peili", Nothing);
    rig.comes_to(&mut mirror, "", &BTreeSet::new()).await.unwrap();
    let doctor = mirror.exec(&["doctor", "--json"]);
    assert_eq!(codes(&doctor), ["runtime-unseen"], "{}", said(&doctor));
    let _ = cri.pull(&rig.pulled.digest_reference(REGISTRY), PULL).await.unwrap();
    confined(&pod, &mirror);
    let status = mirror.status().await.unwrap();
    mirror.end().await;
    rig.alter(&pod, status["node"]["peer_id"].as_str().unwrap(), TALOS).await;
    let of_both =
        TALOS.iter().chain(MIRROR.iter().filter(|(altered, ..)| *altered != Without("runtime-config")));
    all_are_altered(&pod, "peili", of_both.map(|(altered, ..)| altered));
}
