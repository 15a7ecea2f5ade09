//! `peili doctor` as a program, against faults that are made outside of it: on a real API server, between network namespaces, on a real
//! containerd. Each has the verdicts that it is to have and no others, in time; each manifest that is printed is applied, and clears its
//! verdict.

mod api;
mod network;
mod node;
mod refusals;
mod rights;
mod server;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use peili_lab::netns::Namespace;
use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use serde_json::{Value, json};

use crate::Case;

/// Longest for a verdict, on a busy machine.
const VERDICT: Duration = Duration::from_secs(5);
/// Longest until something that is certain is seen: the server acts by Roles that it was told of within a second or so.
const SOON: Duration = Duration::from_secs(15);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = rights::cases();
    cases.extend(api::cases());
    cases.extend(network::cases());
    cases.extend(node::cases());
    cases.extend(refusals::cases());
    cases
}

/// One run of it.
pub(crate) struct Doctor {
    config: Value,
    namespace: Option<Namespace>,
    /// Files that it sees at other places: `(path, at)`.
    files: Vec<(PathBuf, &'static str)>,
    environment: Vec<(String, String)>,
    uid: Option<u32>,
    arguments: Vec<String>,
    scratch: Scratch,
}

/// What it found.
#[derive(Debug)]
pub(crate) struct Found {
    /// In order; one that is said twice is there twice.
    codes: Vec<String>,
    report: Value,
    exit: Option<i32>,
    took: Duration,
}

impl Doctor {
    /// Of a node without containerd and without a mirror that runs, so that what is asked for is all that is looked at.
    fn new(config: &Value) -> Self {
        let mut doctor = Self {
            config: json!({
                "store": {"source": "layout:/nowhere"},
                "admin": {"listen": ["127.0.0.1:1"]},
                "node": {"name": "here"},
            }),
            namespace: None,
            files: Vec::new(),
            environment: Vec::new(),
            uid: None,
            arguments: Vec::new(),
            scratch: Scratch::new().unwrap(),
        };
        doctor.merge(config);
        doctor
    }

    /// Where a node runs, as it is configured, with the files that it sees.
    pub(crate) fn of(plan: &Plan) -> Self {
        let mut doctor = Self::new(&json!({}));
        doctor.config = plan.config.clone();
        doctor.namespace = plan.namespace.clone();
        doctor.files = plan.files().to_vec();
        doctor
    }

    fn merge(&mut self, changes: &Value) {
        for (section, keys) in changes.as_object().unwrap() {
            for (key, value) in keys.as_object().unwrap() {
                self.config[section][key] = value.clone();
            }
        }
    }

    fn in_namespace(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// Lets it see `text` at `at`. Takes root.
    fn with_file(mut self, at: &'static str, text: &str) -> Self {
        let path = self.scratch.path().join(at.trim_start_matches('/').replace('/', "-"));
        std::fs::write(&path, text).unwrap();
        self.files.push((path, at));
        self
    }

    /// Lets it have a variable more.
    pub(crate) fn with_environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn with_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
        self
    }

    async fn run(&self) -> Found {
        let file = self.scratch.path().join("peili.yaml");
        std::fs::write(&file, self.config.to_string()).unwrap();
        let mut command = Command::new(binary().unwrap());
        if !self.files.is_empty() {
            command = Command::new("unshare");
            let script = "while [ \"$1\" != -- ]; do mount --bind \"$1\" \"$2\" || exit; shift 2; done; shift; exec \"$@\"";
            command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
            for (path, at) in &self.files {
                command.arg(path).arg(at);
            }
            command.arg("--").arg(binary().unwrap());
        }
        command.args(["doctor", "--json", "--config"]).arg(file);
        command.arg("--data-dir").arg(self.scratch.path().join("data")).args(&self.arguments);
        for variable in ["PEILI_CONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "NODE_NAME"] {
            command.env_remove(variable);
        }
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let (namespace, start) = (self.namespace.clone(), Instant::now());
        let output = tokio::task::spawn_blocking(move || match namespace {
            Some(namespace) => namespace.run(|| command.output()).unwrap(),
            None => command.output(),
        });
        let output = output.await.unwrap().unwrap();
        let took = start.elapsed();
        let report: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        Found { codes: codes(&report), report, exit: output.status.code(), took }
    }

    /// Has these verdicts and no others, in time, and the exit code of the worst.
    pub(crate) async fn finds(&self, what: &str, expected: &[&str]) -> Found {
        let found = self.run().await;
        println!("{what}: {:?} after {:?}", found.codes, found.took);
        found.are(what, expected);
        found
    }

    /// The same, once the server acts by what it was told: until then it may be as `before`.
    async fn comes_to(&self, what: &str, before: &[&str], expected: &[&str]) -> Found {
        let start = Instant::now();
        loop {
            let found = self.run().await;
            if found.codes == sorted(before) && before != expected && start.elapsed() < SOON {
                continue;
            }
            println!("{what}: {:?} after {:?}", found.codes, found.took);
            found.are(what, expected);
            return found;
        }
    }
}

impl Found {
    fn are(&self, what: &str, expected: &[&str]) {
        assert_eq!(self.codes, sorted(expected), "{what}: {:#}", self.report);
        assert!(self.took < VERDICT, "{what}: {:?}", self.took);
        let is = |severity: &str| {
            self.report["verdicts"].as_array().unwrap().iter().any(|verdict| verdict["severity"] == severity)
        };
        let exit = match () {
            () if is("problem") => 3,
            () if is("warning") => 4,
            () => 0,
        };
        assert_eq!(self.exit, Some(exit), "{what}: {:#}", self.report);
    }

    pub(crate) fn verdict(&self, code: &str) -> &Value {
        let all = self.report["verdicts"].as_array().unwrap();
        all.iter().find(|verdict| verdict["code"] == code).unwrap()
    }

    /// The objects of a verdict's manifests, a list for each file.
    fn manifests(&self, code: &str) -> Vec<Vec<Value>> {
        let all = self.verdict(code)["manifests"].as_array().unwrap();
        all.iter().map(|manifest| manifest["objects"].as_array().unwrap().clone()).collect()
    }
}

/// The codes of a report's verdicts, in order.
pub(crate) fn codes(report: &Value) -> Vec<String> {
    let verdicts = report["verdicts"].as_array().unwrap();
    let mut codes: Vec<_> =
        verdicts.iter().map(|verdict| verdict["code"].as_str().unwrap().to_owned()).collect();
    codes.sort();
    codes
}

fn sorted(codes: &[&str]) -> Vec<String> {
    let mut codes: Vec<_> = codes.iter().map(ToString::to_string).collect();
    codes.sort();
    codes
}

/// What a node in a cluster has configured.
fn in_cluster(url: &str, credentials: &Path) -> Value {
    json!({"kubernetes": {"endpoints": [url], "credentials": credentials}})
}
