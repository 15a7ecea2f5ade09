//! Containers of a rendered pod, as kubelet, containerd and runc make them of it: on a root that holds what the image holds, with the pod's mounts
//! and no others of the node's, under its rights. A mount of it can be left out, or made read-only.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use peili_lab::containerd::Options;
use peili_lab::netns::NetworkNode;
use peili_lab::node::Ports;
use peili_lab::process::Process;
use peili_lab::requirements::cluster;
use peili_lab::scratch::Scratch;
use peili_lab::{Containerd, Generation, http};
use serde_json::{Value, json};

use crate::story::shipped;

/// Where the image has the program.
const PROGRAM: &str = "/usr/bin/peili";
/// `node.drain`, and what a busy machine needs.
const END: Duration = Duration::from_secs(20);
/// Nothing of the node's is a program to anybody here, as on Talos.
const NO_PROGRAMS: [&str; 3] = ["nosuid", "nodev", "noexec"];

/// A node of Kubernetes: a containerd, its files at the paths that the chart has for them, and runc.
pub(super) struct Host {
    pub(super) place: NetworkNode,
    pub(super) containerd: Containerd,
    /// Where pods find the API server.
    service: SocketAddr,
    /// What containerd asks of runc for a container.
    spec: Value,
    // After containerd, whose folders are mounted in it.
    scratch: Scratch,
}

/// What is other than rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Altered {
    Nothing,
    /// Without this mount.
    Without(&'static str),
    /// With this one read-only.
    ReadOnly(&'static str),
}

/// A rendered pod on a node, with what its volumes hold.
pub(super) struct Pod<'a> {
    host: &'a Host,
    spec: Value,
    volumes: Scratch,
}

/// A container that runs. Dropped: gone.
pub(super) struct Running<'a> {
    host: &'a Host,
    id: String,
    process: Process,
}

impl Host {
    pub(super) async fn start(generation: Generation, place: &NetworkNode, service: SocketAddr) -> Self {
        let scratch = Scratch::new().unwrap();
        let options = Options::new(generation).in_namespace(&place.namespace);
        let containerd = Containerd::start(options).await.unwrap();
        let spec = containerd.spec().unwrap();
        let host = Self { place: place.clone(), containerd, service, spec, scratch };
        host.show(&host.containerd.state(), "/run/containerd");
        let content = "/var/lib/containerd/io.containerd.content.v1.content";
        host.show(&host.containerd.content_root(), content);

        shipped(host.scratch.path()).write_tree(&host.image()).unwrap();
        host
    }

    /// Where a path of the node is.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.scratch.path().join("host").join(path.trim_start_matches('/'))
    }

    pub(super) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Lets a folder of containerd's be at a path of the node.
    fn show(&self, folder: &Path, at: &str) {
        // containerd makes its own when it first needs them.
        for folder in [folder, &self.path(at)] {
            fs::create_dir_all(folder).unwrap();
        }
        mount(&["--bind"], folder, &self.path(at));
    }

    /// Lets containerd read its hosts.toml files in this folder of the node, and nobody write there if it is `sealed`.
    pub(super) fn keep_hosts(&self, folder: &str, sealed: bool) {
        let folder = self.path(folder);
        fs::create_dir_all(&folder).unwrap();
        if sealed {
            mount(&["--bind"], &folder, &folder);
            mount(&["-o", "remount,bind,ro,nosuid,nodev,noexec"], &folder, &folder);
        }
        mount(&["--bind"], &folder, &self.containerd.hosts_dir());
    }

    fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }

    fn runc(&self) -> Command {
        let mut command = Command::new(cluster().unwrap().join("runc"));
        command.arg("--root").arg(self.scratch.path().join("runc"));
        command
    }
}

fn mount(options: &[&str], from: &Path, to: &Path) {
    let output = Command::new("mount").args(options).arg(from).arg(to).output().unwrap();
    assert!(output.status.success(), "{} at {}: {output:?}", from.display(), to.display());
}

impl<'a> Pod<'a> {
    /// The pod of this DaemonSet among the objects. `given`: files of volumes that the objects do not hold, as `VOLUME/FILE`.
    pub(super) fn new(host: &'a Host, objects: &[Value], name: &str, given: &[(&str, &[u8])]) -> Self {
        let is_it = |object: &&Value| object["kind"] == "DaemonSet" && object["metadata"]["name"] == name;
        let template = &objects.iter().find(is_it).unwrap()["spec"]["template"];
        let pod = Self { host, spec: template["spec"].clone(), volumes: Scratch::new().unwrap() };
        for volume in list(&pod.spec["volumes"]) {
            let name = text(&volume["name"]);
            let folder = pod.volumes.path().join(name);
            if let Some(path) = volume["hostPath"]["path"].as_str() {
                let makes = volume["hostPath"]["type"] == "DirectoryOrCreate";
                let path = host.path(path);
                if makes {
                    fs::create_dir_all(path).unwrap();
                } else {
                    assert!(path.is_dir(), "{}", path.display());
                }
                continue;
            }
            fs::create_dir(&folder).unwrap();
            let of_map = |object: &&Value| {
                object["kind"] == "ConfigMap" && object["metadata"]["name"] == volume["configMap"]["name"]
            };
            for (file, content) in
                objects.iter().find(of_map).into_iter().flat_map(|map| map["data"].as_object().unwrap())
            {
                fs::write(folder.join(file), text(content)).unwrap();
            }
            for item in list(&volume["downwardAPI"]["items"]) {
                assert_eq!(item["fieldRef"]["fieldPath"], "metadata.labels");
                let labels = template["metadata"]["labels"].as_object().unwrap();
                let lines: String = labels.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
                fs::write(folder.join(text(&item["path"])), lines).unwrap();
            }
        }
        let of_volume = |path: &PathBuf| path.parent().is_some_and(Path::is_dir);
        let given = given.iter().map(|(file, content)| (pod.volumes.path().join(file), content));
        for (path, content) in given.filter(|(path, _)| of_volume(path)) {
            fs::write(path, content).unwrap();
        }
        pod
    }

    /// The mounts of a container: their names, and whether it may write there.
    pub(super) fn mounts(&self, container: &str) -> Vec<(String, bool)> {
        let mounts = list(&self.container(container)["volumeMounts"]);
        mounts.iter().map(|mount| (text(&mount["name"]).to_owned(), mount["readOnly"] != true)).collect()
    }

    /// Where they are, and whether it may write there.
    pub(super) fn places(&self, container: &str) -> Vec<(String, bool)> {
        let mounts = list(&self.container(container)["volumeMounts"]);
        mounts.iter().map(|mount| (text(&mount["mountPath"]).to_owned(), mount["readOnly"] != true)).collect()
    }

    fn container(&self, name: &str) -> &Value {
        let all = ["initContainers", "containers"].into_iter().flat_map(|list_of| list(&self.spec[list_of]));
        all.into_iter().find(|container| container["name"] == *name).unwrap()
    }

    /// Starts a container without waiting.
    pub(super) fn launch(&self, container: &str, altered: Altered) -> Running<'a> {
        let (id, bundle) = self.bundle(container, altered, None);
        let mut command = self.host.runc();
        command.arg("run").arg("--bundle").arg(&bundle).arg(&id);
        let process = Process::spawn(&id, command, &bundle.join("log"), None).unwrap();
        Running { host: self.host, id, process }
    }

    /// Runs a container to its end, with other arguments if they are given.
    pub(super) fn run(&self, container: &str, altered: Altered, arguments: Option<&[&str]>) -> Output {
        let (id, bundle) = self.bundle(container, altered, arguments);
        let output = self.host.runc().arg("run").arg("--bundle").arg(&bundle).arg(&id).output().unwrap();
        fs::remove_dir_all(bundle).unwrap();
        output
    }

    /// What runc is given: its name, and the folder.
    fn bundle(&self, container: &str, altered: Altered, arguments: Option<&[&str]>) -> (String, PathBuf) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("peili-lab-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let bundle = self.host.scratch.path().join(&id);
        fs::create_dir(&bundle).unwrap();
        // A root of its own: runc makes the points of mounts in it.
        let mut copy = Command::new("cp");
        copy.arg("--archive").arg("--link").arg(self.host.image()).arg(bundle.join("root"));
        assert!(copy.status().unwrap().success());
        let config = self.config(&id, self.container(container), altered, arguments);
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        (id, bundle)
    }

    /// As containerd's CRI makes it of what kubelet asks.
    fn config(&self, id: &str, container: &Value, altered: Altered, arguments: Option<&[&str]>) -> Value {
        let host = self.host;
        let mut config = host.spec.clone();
        let (of_pod, confined) = (&self.spec["securityContext"], &container["securityContext"]);
        assert_eq!((&of_pod["runAsUser"], &confined["privileged"]), (&json!(0), &json!(false)));
        config["root"] = json!({"path": "root", "readonly": confined["readOnlyRootFilesystem"]});
        if of_pod["seccompProfile"]["type"] != "RuntimeDefault" {
            config["linux"]["seccomp"] = Value::Null;
        }
        if confined["capabilities"]["drop"] == json!(["ALL"]) {
            config["process"]["capabilities"] = json!({});
        }
        config["process"]["noNewPrivileges"] = (confined["allowPrivilegeEscalation"] == false).into();

        let of_container = list(&container["args"]);
        let of_container = of_container.iter().map(|argument| text(argument));
        let arguments = arguments.map_or_else(|| of_container.collect::<Vec<_>>(), <[_]>::to_vec);
        config["process"]["args"] = [PROGRAM].into_iter().chain(arguments).collect();
        let address = host.place.address().to_string();
        let mut environment = vec![
            "PATH=/usr/bin".to_owned(),
            "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt".to_owned(),
            format!("KUBERNETES_SERVICE_HOST={}", host.service.ip()),
            format!("KUBERNETES_SERVICE_PORT={}", host.service.port()),
        ];
        for variable in list(&container["env"]) {
            let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
            let value = match field {
                None => text(&variable["value"]),
                Some("spec.nodeName") => "node-1",
                Some("status.podIP" | "status.hostIP") => &address,
                Some(field) => panic!("unknown field {field}"),
            };
            environment.push(format!("{}={value}", text(&variable["name"])));
        }
        config["process"]["env"] = environment.into();

        let limit = text(&container["resources"]["limits"]["memory"]);
        let mebibytes: u64 = limit.strip_suffix("Mi").unwrap().parse().unwrap();
        config["linux"]["resources"]["memory"] = json!({"limit": mebibytes << 20});
        config["linux"]["cgroupsPath"] = format!("/{id}").into();
        config["linux"]["rootfsPropagation"] = "rslave".into();
        assert_eq!(self.spec["hostNetwork"], true);
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = format!("/run/netns/{}", host.place.namespace.name()).into();
            }
        }
        config["mounts"] = self.mounts_of(&config["mounts"], container, altered).into();
        config
    }

    fn mounts_of(&self, base: &Value, container: &Value, altered: Altered) -> Vec<Value> {
        let mut mounts = Vec::new();
        // CRI makes no /run.
        for mount in list(base).into_iter().filter(|mount| mount["destination"] != "/run") {
            let mut mount = mount.clone();
            mount["options"].as_array_mut().unwrap().push("noexec".into());
            mounts.push(mount);
        }
        let bind = |from: &Path, at: &str, options: &[&str]| {
            let options: Vec<_> = ["rbind"].iter().chain(&NO_PROGRAMS).chain(options).collect();
            json!({"destination": at, "type": "bind", "source": from, "options": options})
        };
        // What kubelet adds by itself; by the first doctor knows that it is in a pod.
        for (file, at) in
            [("/var/lib/kubelet/pods/1/etc-hosts", "/etc/hosts"), ("/etc/resolv.conf", "/etc/resolv.conf")]
        {
            mounts.push(bind(&self.host.path(file), at, &["rprivate", "ro"]));
        }
        let volume =
            |name: &str| list(&self.spec["volumes"]).into_iter().find(|volume| volume["name"] == *name);
        let rendered = list(&container["volumeMounts"]);
        if let Altered::Without(name) | Altered::ReadOnly(name) = altered {
            assert!(rendered.iter().any(|mount| mount["name"] == name), "no mount {name}");
        }
        for mount in rendered {
            let name = text(&mount["name"]);
            if matches!(altered, Altered::Without(left) if left == name) {
                continue;
            }
            let folder = match volume(name).unwrap()["hostPath"]["path"].as_str() {
                Some(path) => self.host.path(path),
                None => self.volumes.path().join(name),
            };
            let is_sealed =
                mount["readOnly"] == true || matches!(altered, Altered::ReadOnly(sealed) if sealed == name);
            let propagates = mount["mountPropagation"] == "HostToContainer";
            let options =
                [if propagates { "rslave" } else { "rprivate" }, if is_sealed { "ro" } else { "rw" }];
            mounts.push(bind(&folder, text(&mount["mountPath"]), &options));
        }
        mounts
    }
}

impl Running<'_> {
    /// What the runtime of this node gets from the mirror.
    pub(super) async fn fetch(&self, path: &str) -> Option<http::Answer> {
        self.get(Ports::DEFAULT.registry, path).await
    }

    pub(super) async fn status(&self) -> Option<Value> {
        serde_json::from_slice(&self.get(Ports::DEFAULT.admin, "/status").await?.body).ok()
    }

    pub(super) async fn is_ready(&self) -> bool {
        self.get(Ports::DEFAULT.admin, "/readyz").await.is_some_and(|answer| answer.status == 200)
    }

    async fn get(&self, port: u16, path: &str) -> Option<http::Answer> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        http::get(Some(&self.host.place.namespace), address, path).await.ok()
    }

    pub(super) fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits for its end.
    pub(super) async fn has_ended(&mut self) {
        self.process.ended(END).await.unwrap();
    }

    /// Runs the program in it, as `kubectl exec` does.
    pub(super) fn exec(&self, arguments: &[&str]) -> Output {
        self.host.runc().args(["exec", &self.id, PROGRAM]).args(arguments).output().unwrap()
    }

    /// What the kernel says of its first process: a file of `/proc/ID`.
    pub(super) fn proc(&self, file: &str) -> String {
        let output = self.host.runc().args(["state", &self.id]).output().unwrap();
        let state: Value = serde_json::from_slice(&output.stdout).unwrap();
        fs::read_to_string(format!("/proc/{}/{file}", state["pid"])).unwrap()
    }

    pub(super) fn log(&self) -> String {
        self.process.log()
    }

    /// As kubelet ends it. Its log.
    pub(super) async fn end(mut self) -> String {
        if self.process.is_running() {
            let output = self.host.runc().args(["kill", &self.id, "TERM"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        self.process.ended(END).await.unwrap();
        let log = self.log();
        assert!(!log.contains("panicked at"), "{log}");
        log
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.host.runc().args(["delete", "--force", &self.id]).output();
    }
}

fn list(value: &Value) -> Vec<&Value> {
    value.as_array().into_iter().flatten().collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}
