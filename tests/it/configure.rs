//! `peili configure` and `peili cleanup`, as a program on real files, and pulls through the trees that they write.

mod disk;
mod trees;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use peili_lab::node::binary;
use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Requirement, requirements};
use serde_json::Value;

use crate::Case;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("configure::command_line", &[], command_line),
        Case::new("configure::guide", &[], guide),
        Case::new("configure::unit_file", &[Requirement::SystemdAnalyze], unit_file),
    ];
    for (name, generation) in [
        ("configure::talos_keeps_layers_v1_6", Generation::V1_6),
        ("configure::talos_keeps_layers_v1_7", Generation::V1_7),
        ("configure::talos_keeps_layers_v2", Generation::V2),
    ] {
        let keeps = move || async move { talos_keeps_layers(generation) };
        cases.push(Case::new(name, &[Requirement::Containerd(generation)], keeps));
    }
    cases.extend(disk::cases());
    cases.extend(trees::cases());
    cases
}

/// A host's files in a folder, and where Peili keeps its records.
struct Host {
    scratch: Scratch,
}

impl Host {
    /// A node of kubeadm with a mirror for one registry.
    fn new() -> Self {
        let host = Self { scratch: Scratch::new().unwrap() };
        host.fill();
        host
    }

    fn fill(&self) {
        let certs = self.certs();
        std::fs::create_dir_all(certs.join("a.io")).unwrap();
        std::fs::create_dir_all(certs.join("b.io")).unwrap();
        let config = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n";
        std::fs::write(self.root().join("etc/containerd/config.toml"), config).unwrap();
        std::fs::write(
            certs.join("a.io/hosts.toml"),
            "# ours\nserver = \"https://a.test\"\n[host.\"https://m.test\"]\n",
        )
        .unwrap();
        std::fs::write(certs.join("b.io/ca.crt"), "").unwrap();
    }

    fn root(&self) -> PathBuf {
        self.scratch.path().join("host")
    }

    fn certs(&self) -> PathBuf {
        self.root().join("etc/containerd/certs.d")
    }

    fn data(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary().unwrap());
        command.arg(arguments[0]).arg("--root").arg(self.root()).arg("--data-dir").arg(self.data());
        command.args(&arguments[1..]).env_remove("PEILI_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs it, wants this exit code, and returns what it printed to both.
    fn ends(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        text
    }
}

/// All files below a folder with their content.
fn snapshot(folder: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let content = if path.is_dir() { None } else { Some(std::fs::read(&path).unwrap()) };
            if path.is_dir() {
                folders.push(path.clone());
            }
            all.push((path, content));
        }
    }
    all.sort();
    all
}

async fn command_line() {
    let host = Host::new();
    let before = snapshot(&host.root());
    // An init container goes on all the same, and says it.
    let text = host.ends(&["configure", "--check", "a.io", "b.io", "--exit-zero"], 0);
    assert!(text.contains("not set up for a.io") && text.contains("by --exit-zero: this node"), "{text}");
    let text = host.ends(&["configure", "--exit-zero", "--set", "registry.listen=[]"], 0);
    assert!(text.contains("at least one address"), "{text}");
    let text = host.ends(&["configure", "--check", "a.io", "b.io"], 3);
    assert!(text.contains("not set up for a.io") && text.ends_with("see the problems above\n"), "{text}");
    let text = host.ends(&["configure", "--dry-run", "a.io", "b.io"], 0);
    assert!(
        text.contains("+[host.\"http://127.0.0.1:5000\"]") && text.contains("+ca = [\"ca.crt\"]"),
        "{text}"
    );
    let json = host.run(&["configure", "--dry-run", "--json", "a.io", "b.io"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (json["changes"].as_array().unwrap().len(), &json["node"]["distribution"]),
        (2, &"plain".into())
    );
    assert_eq!(snapshot(&host.root()), before, "nothing was written");
    assert!(!host.data().exists());

    // Where Peili answers is what its own configuration says.
    let text = host.ends(&["configure", "a.io", "b.io", "--set", "registry.listen=[::1]:5050"], 0);
    assert_eq!(text.matches("wrote ").count() + text.matches("changed ").count(), 2, "{text}");
    assert!(
        std::fs::read_to_string(host.certs().join("b.io/hosts.toml"))
            .unwrap()
            .contains("http://localhost:5050")
    );
    host.ends(&["configure", "--check", "--set", "registry.listen=[::1]:5050"], 0);
    host.ends(&["configure", "--check"], 3);
    host.ends(&["configure"], 0);
    let text = host.ends(&["configure", "--check"], 0);
    assert!(text.ends_with("this node is set up\n"), "{text}");
    let json = host.run(&["configure", "--check", "--json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["ready"], json["findings"].as_array().unwrap().len()), (&true.into(), 0));

    std::fs::remove_dir_all(host.certs()).unwrap();
    let json = host.run(&["configure", "--check", "--json"]);
    assert_eq!(json.status.code(), Some(3));
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["findings"][0]["code"], "not-set-up");
    host.fill();
    host.ends(&["configure"], 0);
    let text = host.ends(&["cleanup", "--dry-run"], 0);
    assert!(text.contains("would restore") && text.contains("-[host.\"http://127.0.0.1:5000\"]"), "{text}");
    host.ends(&["cleanup"], 0);
    assert_eq!(snapshot(&host.root()), before);
    assert!(host.ends(&["cleanup"], 0).contains("nothing to do"));

    assert!(host.ends(&["configure", "--format", "talos"], 0).contains("machine:"));
    assert!(
        host.ends(&["configure", "--format", "bottlerocket", "--mode", "only"], 2).contains("Bottlerocket")
    );
    assert!(host.ends(&["configure", "not a registry"], 2).contains("not a registry"));
    assert!(host.ends(&["configure", "--mirror", "127.0.0.1:5000"], 2).contains("http://HOST:PORT"));
    assert!(host.ends(&["configure", "--set", "registry.lisen=1"], 2).contains("listen"));
    host.ends(&["configure", "--check", "--dry-run"], 2);
    std::fs::write(host.certs().join("a.io/hosts.toml"), "server = 1\n").unwrap();
    let text = host.ends(&["configure", "a.io"], 1);
    assert!(
        text.starts_with("error: /etc/containerd/certs.d/a.io/hosts.toml:1: ") && text.contains("\nhint: "),
        "{text}"
    );
}

/// What is printed for Talos is laid over its own configuration, which discards layers, and each containerd finds its table.
fn talos_keeps_layers(generation: Generation) {
    let output = Command::new(binary().unwrap()).args(["configure", "--format", "talos"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let patch: Value = serde_saphyr::from_slice(&output.stdout).unwrap();
    let part = patch["machine"]["files"][0]["content"].as_str().unwrap();
    let scratch = Scratch::new().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let (version, table) = match generation {
        Generation::V2 => (3, "io.containerd.cri.v1.images\""),
        Generation::V1_6 | Generation::V1_7 => (2, "io.containerd.grpc.v1.cri\".containerd"),
    };
    let own = format!(
        "version = {version}\nimports = [{:?}]\n[plugins.\"{table}]\ndiscard_unpacked_layers = true\n",
        path("part.toml")
    );
    std::fs::write(path("own.toml"), own).unwrap();
    for (text, expected) in [("", "true"), (part, "false")] {
        std::fs::write(path("part.toml"), format!("version = {version}\n{text}")).unwrap();
        let mut dump = Command::new(generation.binary().unwrap());
        let output = dump.arg("--config").arg(path("own.toml")).args(["config", "dump"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains(&format!("discard_unpacked_layers = {expected}")),
            "{text}"
        );
    }
}

/// What the guide shows is what the example says, and is a right configuration.
async fn guide() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guide = std::fs::read_to_string(root.join("docs/without-kubernetes.md")).unwrap();
    let block = guide.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let shown: Vec<&str> = block.lines().map(|line| line.strip_prefix("   ").unwrap_or(line)).collect();
    let example = std::fs::read_to_string(root.join("examples/systemd.yaml")).unwrap();
    let lines: Vec<&str> = example.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(shown.join("\n").trim_end(), lines.join("\n"));
    let scratch = Scratch::new().unwrap();
    let file = scratch.path().join("config.yaml");
    std::fs::write(&file, shown.join("\n")).unwrap();
    for file in [file, root.join("examples/systemd.yaml")] {
        let mut check = Command::new(binary().unwrap());
        check.args(["config", "check", "--config"]).arg(&file);
        let output = check.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// systemd takes the unit as it is, with the program that is there.
async fn unit_file() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd/peili.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let scratch = Scratch::new().unwrap();
    let file = scratch.path().join("peili.service");
    let program = binary().unwrap();
    assert!(text.contains("ExecStart=/usr/local/bin/peili run --config /etc/peili/config.yaml\n"));
    std::fs::write(&file, text.replace("/usr/local/bin/peili", program.to_str().unwrap())).unwrap();
    let mut verify = Command::new(requirements::program("systemd-analyze").unwrap());
    let output = verify.args(["verify", "--man=no"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let about: Vec<&str> = said.lines().filter(|line| line.contains("peili")).collect();
    assert!(output.status.success() && about.is_empty(), "{said}");
}
