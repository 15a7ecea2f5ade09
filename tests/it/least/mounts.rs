//! Each mount of the pod: the rendered DaemonSet's containers run by runc on the image's files alone, read-only and without any capability, all mounts
//! `nosuid`, `nodev` and `noexec`. With all of them a node works; without any one of them something is missing, and doctor names it where it can know.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use peili_lab::kubernetes::Options;
use peili_lab::netns::{Addresses, Namespace, Network};
use peili_lab::node::Plan;
use peili_lab::process::Process;
use peili_lab::requirements::cluster;
use peili_lab::scratch::Scratch;
use peili_lab::{Containerd, Dns, Generation, Image, Origin, chart, containerd, http, wait};
use serde_json::{Value, json};

use crate::chart::parse;
use crate::cli::layout;
use crate::cluster::REGISTRY;
use crate::coordination::Cluster;
use crate::story::shipped;

/// Who is who in the network: the node whose pod is looked at, another one, the API server, and names with the registry.
const HERE: usize = 0;
const OTHER: usize = 1;
const SERVER: usize = 2;
const OUTSIDE: usize = 3;
/// Longest until a pod that began has all that it will have.
const SOON: Duration = Duration::from_secs(30);
/// For how long what is missing has to stay so.
const STAYS: Duration = Duration::from_secs(1);
const ZONE: &str = "zone-a";
const REGISTRY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5000);
const ADMIN_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5003);

/// What becomes of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// It is left out.
    Gone,
    /// It cannot be written to.
    ReadOnly,
}

/// A mount, what is done to it, what is missing then, and the codes that doctor says.
type Needed = (&'static str, Change, &'static [&'static str], &'static str);

const EXPECTED: [Needed; 9] = [
    // It ends and says which file is not there; doctor reads the same one.
    ("config", Change::Gone, &["mirror"], "(the file of the configuration is missing)"),
    ("cluster-key", Change::Gone, &["peers", "lease"], "mirror-alone"),
    // A node without a zone is none that anything is wrong with.
    ("podinfo", Change::Gone, &["zone"], ""),
    ("data", Change::Gone, &["identity"], "identity-passing"),
    ("data", Change::ReadOnly, &["identity"], "identity-passing"),
    // Not Ready before it has seen the store once.
    ("runtime-socket", Change::Gone, &["mirror"], "containerd-absent"),
    // Without it content comes through containerd's API, which costs more and fails where containerd does.
    ("runtime-content", Change::Gone, &["content without containerd"], ""),
    // Whether containerd asks Peili is seen by these files alone.
    ("runtime-config", Change::Gone, &[], "runtime-unseen"),
    ("token", Change::Gone, &["lease"], "no-authority no-namespace no-token"),
];

/// The pod of a node, as it was rendered.
struct Pod {
    spec: Value,
    /// Where the image's files are.
    root: PathBuf,
    /// Folders of the machine by the names of volumes.
    volumes: BTreeMap<String, PathBuf>,
    /// Files that kubelet gives each pod.
    files: Vec<(PathBuf, &'static str)>,
    environment: Vec<String>,
    namespace: Namespace,
    scratch: Scratch,
}

/// What a node has of its own and of others.
struct Has<'a> {
    containerd: &'a Containerd,
    own: &'a Image,
    theirs: &'a Image,
}

/// A container that runs. Dropped: gone.
struct Running<'a> {
    pod: &'a Pod,
    id: String,
    process: Process,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.pod.runc(&["delete", "--force", &self.id]).output();
        let _ = self.process.kill();
    }
}

impl Pod {
    fn container(&self, name: &str) -> &Value {
        let lists = [&self.spec["initContainers"], &self.spec["containers"]];
        let mut all = lists.into_iter().flat_map(|list| list.as_array().unwrap());
        all.find(|container| container["name"] == name).unwrap()
    }

    /// Mounts of a container by their volumes.
    fn mounts(&self, name: &str) -> Vec<&str> {
        let mounts = self.container(name)["volumeMounts"].as_array().unwrap();
        mounts.iter().map(|mount| mount["name"].as_str().unwrap()).collect()
    }

    fn runc(&self, arguments: &[&str]) -> Command {
        let mut runc = Command::new(cluster().unwrap().join("runc"));
        runc.arg("--root").arg(self.scratch.path().join("runc")).args(arguments);
        runc
    }

    /// What runc is told of a container, with one of its mounts changed.
    fn bundle(&self, name: &str, changed: Option<(&str, Change)>) -> PathBuf {
        let container = self.container(name);
        let security = &container["securityContext"];
        assert_eq!(
            (&security["capabilities"]["drop"], &security["readOnlyRootFilesystem"]),
            (&json!(["ALL"]), &json!(true))
        );
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]}),
        ];
        let mut bind = |source: &Path, at: &str, is_read_only: bool| {
            let access = if is_read_only { "ro" } else { "rw" };
            mounts.push(json!({
                "destination": at, "type": "bind", "source": source,
                "options": ["bind", access, "nosuid", "nodev", "noexec", "rprivate"],
            }));
        };
        for mount in container["volumeMounts"].as_array().unwrap() {
            let volume = mount["name"].as_str().unwrap();
            let change = changed.filter(|(name, _)| *name == volume).map(|(_, change)| change);
            if change != Some(Change::Gone) {
                let is_read_only = mount["readOnly"] == json!(true) || change.is_some();
                bind(&self.volumes[volume], mount["mountPath"].as_str().unwrap(), is_read_only);
            }
        }
        for (file, at) in &self.files {
            bind(file, at, true);
        }
        // A new one each time: runc makes the places of mounts in it.
        let root = self.scratch.path().join("root");
        let _ = fs::remove_dir_all(&root);
        let copied = Command::new("cp").args(["-a", "--link"]).arg(&self.root).arg(&root).status().unwrap();
        assert!(copied.success());
        let mut arguments = vec![json!("/usr/bin/peili")];
        arguments.extend(container["args"].as_array().unwrap().iter().cloned());
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": arguments, "env": self.environment,
                "capabilities": {}, "noNewPrivileges": true,
            },
            "root": {"path": root, "readonly": true},
            "mounts": mounts,
            "linux": {
                "namespaces": [
                    {"type": "mount"}, {"type": "pid"}, {"type": "ipc"},
                    {"type": "network", "path": format!("/run/netns/{}", self.namespace.name())},
                ],
                "maskedPaths": ["/proc/kcore", "/proc/keys"], "readonlyPaths": ["/proc/sys"],
            },
        });
        let folder = self.scratch.path().join("bundle");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        folder
    }

    fn begin(&self, name: &str, changed: Option<(&str, Change)>) -> Running<'_> {
        let bundle = self.bundle(name, changed);
        let id = format!("{}-{name}", self.namespace.name());
        let mut runc = self.runc(&["run", "--bundle"]);
        runc.arg(bundle).arg(&id);
        let process = Process::spawn(name, runc, &self.scratch.path().join("log"), None).unwrap();
        Running { pod: self, id, process }
    }

    /// Runs the init container to its end. Returns what it said.
    async fn configure(&self, changed: Option<(&str, Change)>) -> String {
        let _ = fs::remove_file(self.scratch.path().join("log"));
        let mut running = self.begin("configure", changed);
        let ended = running.process.ended(SOON).await.unwrap();
        assert!(ended.success(), "{changed:?}: {}", running.process.log());
        running.process.log()
    }

    /// Runs the mirror until exactly this is missing, and stays so. Returns doctor's codes.
    async fn comes_to(
        &self,
        changed: Option<(&str, Change)>,
        expected: &[&'static str],
        has: &Has<'_>,
    ) -> String {
        let _ = fs::remove_file(self.scratch.path().join("log"));
        // As on a node that is new to Peili.
        let data = &self.volumes["data"];
        fs::remove_dir_all(data).unwrap();
        fs::create_dir_all(data).unwrap();
        let mut running = self.begin("peili", changed);
        let expected: BTreeSet<_> = expected.iter().copied().collect();
        let (mut last, mut since) = (BTreeSet::new(), None);
        let what = format!("{changed:?}");
        let waited = wait::until(&what, SOON, async || {
            last = running.lacks(has).await;
            if last != expected {
                since = None;
                return None;
            }
            (since.get_or_insert_with(Instant::now).elapsed() > STAYS).then_some(())
        });
        if let Err(error) = waited.await {
            panic!("{error}: {last:?} is missing instead of {expected:?}; {}", running.process.log_tail());
        }
        if running.process.is_running() {
            running.doctor()
        } else {
            let log = running.process.log();
            assert!(log.contains("cannot read /etc/peili/config/config.yaml"), "{log}");
            "(the file of the configuration is missing)".into()
        }
    }

    fn hosts(&self) -> PathBuf {
        self.volumes["runtime-config"].join("certs.d/_default/hosts.toml")
    }
}

impl Running<'_> {
    async fn get(&self, address: SocketAddr, path: &str) -> Option<http::Answer> {
        http::get(Some(&self.pod.namespace), address, path).await.ok().filter(|answer| answer.status == 200)
    }

    /// What a node has that this one has not.
    async fn lacks(&self, has: &Has<'_>) -> BTreeSet<&'static str> {
        let mut lacks = BTreeSet::new();
        if self.get(ADMIN_PORT, "/readyz").await.is_none() {
            return ["mirror"].into();
        }
        let manifest =
            |image: &Image| format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
        if self.get(REGISTRY_PORT, &manifest(has.theirs)).await.is_none() {
            lacks.insert("peers");
        }
        if self.get(REGISTRY_PORT, &manifest(has.own)).await.is_none() {
            lacks.insert("own content");
        }
        // While containerd hangs its files can be read.
        has.containerd.process().unwrap().pause().unwrap();
        if self.get(REGISTRY_PORT, &manifest(has.own)).await.is_none() {
            lacks.insert("content without containerd");
        }
        has.containerd.process().unwrap().resume().unwrap();
        let status: Value =
            serde_json::from_slice(&self.get(ADMIN_PORT, "/status").await.unwrap().body).unwrap();
        if status["election"]["mode"] != "lease" {
            lacks.insert("lease");
        }
        if status["node"]["zone"] != ZONE {
            lacks.insert("zone");
        }
        if !self.pod.volumes["data"].join("identity.key").is_file() {
            lacks.insert("identity");
        }
        lacks
    }

    /// The codes that doctor says in it, but for notes; that it cannot see is one that counts.
    fn doctor(&self) -> String {
        let output =
            self.pod.runc(&["exec", &self.id, "/usr/bin/peili", "doctor", "--json"]).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        let verdicts = report["verdicts"].as_array().unwrap().iter();
        let codes: BTreeSet<&str> = verdicts
            .filter(|verdict| verdict["severity"] != "note" || verdict["code"] == "runtime-unseen")
            .map(|verdict| verdict["code"].as_str().unwrap())
            .collect();
        codes.into_iter().collect::<Vec<_>>().join(" ")
    }
}

pub(super) async fn each_is_needed() {
    let network = Network::new(OUTSIDE + 1, Addresses::V4).unwrap();
    let scratch = Scratch::new().unwrap();
    let (here, server, outside) = (&network.nodes[HERE], &network.nodes[SERVER], &network.nodes[OUTSIDE]);
    let cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
    cluster.allow_all().await;
    let credentials = cluster.credentials("account").await;

    let values = chart::values("default").display().to_string();
    let rendered = parse(&chart::render(&["--values", &values]).unwrap());
    let of_kind = |kind: &str, name: &str| {
        rendered.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name).unwrap()
    };
    let spec = of_kind("DaemonSet", "peili")["spec"]["template"]["spec"].clone();
    let config = of_kind("ConfigMap", "peili")["data"]["config.yaml"].as_str().unwrap();

    let dns = Dns::start(&outside.namespace, outside.address()).unwrap();
    dns.set("kubernetes.default.svc.cluster.local", Some(vec![server.address()]));
    let mirrors = vec![here.address(), network.nodes[OTHER].address()];
    dns.set("peili-peers.peili.svc.cluster.local", Some(mirrors));

    // What the node has, and what kubelet would put there.
    let origin =
        Origin::start_at(Some(&outside.namespace), &[SocketAddr::new(outside.address(), 5000)]).unwrap();
    let options = containerd::Options::new(Generation::V1_6).in_namespace(&here.namespace);
    let containerd = Containerd::start(options).await.unwrap();
    containerd.set_hosts(REGISTRY, &format!("http://{}", origin.address()), &[]).unwrap();
    let own = Image::builder("library/own", "1").layer(4_096).seed(1).build().unwrap();
    origin.add(&own);
    containerd.cri().pull(&own.reference(REGISTRY), SOON).await.unwrap();
    let folder = |name: &str| {
        let path = scratch.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };
    let write = |folder: &Path, name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    let (configured, key, podinfo) = (folder("config"), folder("cluster-key"), folder("podinfo"));
    write(&configured, "config.yaml", config);
    let secret = "a key of the cluster for tests, 32 bytes at least";
    write(&key, "current", secret);
    write(&podinfo, "labels", &format!("topology.kubernetes.io/zone=\"{ZONE}\"\n"));
    let (socket, runtime) = (folder("run"), folder("etc"));
    fs::hard_link(containerd.socket(), socket.join("containerd.sock")).unwrap();
    let registries = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n";
    write(&runtime, "config.toml", registries);
    // By its place a process knows that a kubelet gave it to it.
    let of_kubelet = folder("kubelet/pods/9d1d2f3a");
    let names = of_kubelet.join("etc-hosts");
    fs::write(&names, "127.0.0.1 localhost\n").unwrap();
    let theirs = Image::builder("library/theirs", "1").layer(4_096).seed(2).build().unwrap();
    let images = folder("layout");
    layout(&images, &[&theirs]);
    let place = &network.nodes[OTHER];
    let store = format!("layout:{}", images.display());
    let mut plan = Plan::in_namespace("other", &store, &place.namespace, place.address()).unwrap();
    plan.merge(
        &json!({"network": {"cluster-key": [key.join("current")], "dns": ["peili-peers.peili.svc:5001"]}}),
    );
    plan.set_resolver(dns.address()).unwrap();
    let other = plan.start().await.unwrap();
    let mut files = other.plan.files().to_vec();
    files.push((names, "/etc/hosts"));

    let image = folder("image");
    let root = image.join("root");
    shipped(&image).write_tree(&root).unwrap();
    let pod = Pod {
        spec,
        root,
        volumes: BTreeMap::from([
            ("config".into(), configured),
            ("cluster-key".into(), key.clone()),
            ("podinfo".into(), podinfo),
            ("data".into(), folder("data")),
            ("runtime-socket".into(), socket),
            ("runtime-content".into(), containerd.content_root()),
            ("runtime-config".into(), runtime),
            ("token".into(), credentials),
        ]),
        files,
        environment: vec![
            "PATH=/usr/bin".into(),
            "PEILI_CONFIG=/etc/peili/config/config.yaml".into(),
            "NODE_NAME=here".into(),
            format!("POD_IP={}", here.address()),
            format!("HOST_IP={}", here.address()),
            format!("KUBERNETES_SERVICE_HOST={}", server.address()),
            "KUBERNETES_SERVICE_PORT=6443".into(),
        ],
        namespace: here.namespace.clone(),
        scratch: Scratch::new().unwrap(),
    };

    // The init container. It never fails, and says what it could not do.
    let _ = fs::remove_dir_all(pod.volumes["runtime-config"].join("certs.d"));
    pod.configure(None).await;
    assert!(pod.hosts().is_file());
    let written = fs::read(pod.hosts()).unwrap();
    let without = [
        ("config", Change::Gone, "cannot read /etc/peili/config/config.yaml"),
        // Where what was there before is kept for the removal.
        ("data", Change::Gone, "cannot make /var/lib/peili/configure"),
        ("runtime-config", Change::Gone, "/etc/containerd/certs.d is not there"),
        // As on Talos, where the folder is the system's.
        (
            "runtime-config",
            Change::ReadOnly,
            "cannot make /host/etc/containerd/certs.d: Read-only file system",
        ),
    ];
    for (mount, change, says) in without {
        let _ = fs::remove_dir_all(pod.volumes["runtime-config"].join("certs.d"));
        let said = pod.configure(Some((mount, change))).await;
        assert!(said.contains(says) && !pod.hosts().exists(), "{mount} {change:?}: {said}");
    }
    let tried: BTreeSet<&str> = without.iter().map(|(mount, ..)| *mount).collect();
    assert_eq!(tried, pod.mounts("configure").into_iter().collect());
    fs::create_dir_all(pod.hosts().parent().unwrap()).unwrap();
    fs::write(pod.hosts(), written).unwrap();

    // The mirror.
    let has = Has { containerd: &containerd, own: &own, theirs: &theirs };
    assert_eq!(pod.comes_to(None, &[], &has).await, "", "with all mounts");
    for (mount, change, missing, says) in EXPECTED {
        let began = Instant::now();
        let codes = pod.comes_to(Some((mount, change)), missing, &has).await;
        println!(
            "{:.1} s: {mount} {change:?}: {missing:?} is missing, doctor says: {codes}",
            began.elapsed().as_secs_f64()
        );
        assert_eq!(codes, says, "{mount} {change:?}");
    }
    let tried: BTreeSet<&str> = EXPECTED.iter().map(|(mount, ..)| *mount).collect();
    assert_eq!(tried, pod.mounts("peili").into_iter().collect());
}
