//! The chart and its renderings: that they are what Helm gives, that wrong values are refused with a hint, that Peili takes the configuration in
//! them, that no field of them is unknown to Kubernetes, and that a real API server takes them. What they do in a cluster is another matter.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use k8s_openapi::api::{apps, batch, coordination, core, flowcontrol, networking, rbac};
use peili_lab::kubernetes::{Options, Rule};
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement, chart};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::Case;

pub(crate) fn cases() -> Vec<Case> {
    let helm = [Requirement::Helm];
    vec![
        Case::new("chart::renderings", &helm, renderings),
        Case::new("chart::wrong_values", &helm, wrong_values),
        Case::new("chart::odd_values", &helm, odd_values),
        Case::new("chart::images", &helm, images),
        Case::new("chart::configurations", &[], configurations),
        Case::new("chart::settings_of_policies", &[Requirement::Policies], settings),
        Case::new("chart::fields", &[], fields),
        Case::new("chart::rights", &[], rights),
        Case::new("chart::alerts", &[Requirement::Promtool], alerts),
        Case::new("chart::an_api_server_takes_it", &[Requirement::Kubernetes], taken),
        Case::new("chart::the_removal_waits_by_its_own_rights", &[Requirement::Kubernetes], waits),
        Case::new("chart::the_removal_holds_until_it_is_ended", &[], holds),
    ]
}

/// The objects that a rendering has.
pub(crate) fn parse(rendering: &str) -> Vec<Value> {
    let documents: Vec<Option<Value>> = serde_saphyr::from_multiple(rendering).unwrap();
    documents.into_iter().flatten().filter(|object| !object.is_null()).collect()
}

/// The objects of a file of `deploy/manifests`.
fn objects(path: &Path) -> Vec<Value> {
    parse(&fs::read_to_string(path).unwrap())
}

/// Peili's configuration among them.
fn config_of(objects: &[Value]) -> &str {
    objects.iter().find_map(|object| object["data"]["config.yaml"].as_str()).unwrap()
}

fn all() -> Vec<(String, Vec<Value>)> {
    let presets = chart::presets().unwrap();
    assert!(presets.len() >= 13, "{presets:?}");
    presets.into_iter().map(|preset| (preset.clone(), objects(&chart::rendering(&preset)))).collect()
}

async fn renderings() {
    for preset in chart::presets().unwrap() {
        chart::lint(&preset).unwrap();
    }
    let mut known: BTreeSet<_> = BTreeSet::from([chart::rendering("namespace")]);
    for (path, text) in chart::renderings().unwrap() {
        let is_right = fs::read_to_string(&path).is_ok_and(|found| found == text);
        assert!(is_right, "{} is not what the chart gives: `cargo xtask render` writes it", path.display());
        known.insert(path);
    }
    let folder = chart::rendering("x");
    for file in fs::read_dir(folder.parent().unwrap()).unwrap() {
        let path = file.unwrap().path();
        assert!(known.contains(&path), "{} is of no file of values", path.display());
    }
}

async fn wrong_values() {
    let values = chart::values("default");
    let values = values.to_str().unwrap();
    let refused = |changes: &[&str], hint: &str| {
        let mut arguments = vec!["--values", values];
        arguments.extend(changes.iter().flat_map(|change| ["--set", change]));
        let error = chart::render(&arguments).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(error.contains(hint), "{changes:?}: {error}");
    };
    // Where one is not known or cannot be.
    refused(&["mode=pod"], "additional properties 'mode' not allowed");
    refused(&["runtime.configureMode=maybe"], "one of 'first', 'only'");
    refused(&["ports.admin=0"], "at '/ports/admin'");
    refused(&["image.digest=sha256:12"], "at '/image/digest'");
    refused(&["rbac.lease=all"], "one of 'create', 'precreated', 'none'");
    refused(&["runtime.registries={*.example.com}"], "at '/runtime/registries/0'");
    refused(&["runtime.hostsFolder=/a:/b"], "at '/runtime/hostsFolder'");
    refused(&["runtime.socket=/containerd.sock"], "at '/runtime/socket'");
    refused(&["networkMode=none"], "one of 'host', 'pod'");
    refused(&["networkPolicy.ports={0}"], "at '/networkPolicy/ports/0'");
    refused(&["name=007"], "at '/name'");
    refused(&["dataFolder=var"], "at '/dataFolder'");
    // Where two do not go together.
    refused(&["image.repository="], "name your own");
    refused(&["image.digest=", "image.tag="], "name one, best the digest");
    refused(&["image.digest=", "image.tag=latest"], "name a version or a digest");
    refused(&["clusterKey.existingSecret="], "peili cluster-key generate");
    refused(&["clusterKey.value=x"], "give one of them");
    refused(&["podMonitor.enabled=true"], "Say metrics.expose=true");
    refused(&["prometheusRule.enabled=true"], "Say metrics.expose=true");
    refused(&["rbac.lease=none"], "say election.backend=gossip");
    refused(&["runtime.hostsFolder=/etc/docker/certs.d"], "name a folder that holds both");
    refused(&["ports.peer=5001"], "two of them are the same");
    refused(&["config.admin.listen={127.0.0.1:6000}"], "say ports.admin, metrics.expose and networkMode");
    refused(&["config.registry.clients=all"], "say networkMode");
    refused(&["networkPolicy.kind=kubernetes"], "no such policy counts for pods with host networking");
    refused(&["networkMode=pod", "ciliumHostFirewall.enabled=true"], "Say networkPolicy.kind=cilium");
    refused(&["ports.registry=30500"], "is a NodePort");
    refused(&["config.node.data-dir=/x"], "say dataFolder");
    refused(&["runtime.configFolder="], "name containerd's folder");
    refused(&["config.policies.registry={}"], "say policies.registry");
    refused(&["config.election.lease.name=other"], "say election.lease");
    refused(&["config.network.cluster-key={/other}"], "say clusterKey");
    let error =
        format!("{:#}", chart::render(&["--values", values, "--namespace", "kube-system"]).unwrap_err());
    assert!(error.contains("Install into a namespace of its own"), "{error}");
    // The same is allowed where nothing may be created.
    let allowed = ["--values", values, "--namespace", "kube-system", "--set", "rbac.lease=precreated"];
    chart::render(&allowed).unwrap();
}

async fn odd_values() {
    let values = chart::values("default").display().to_string();
    let rendered = |changes: &str| {
        let text = chart::render(&["--values", &values, "--set", changes]).unwrap();
        parse(&text).into_iter().find(|object| object["kind"] == "DaemonSet").unwrap()
    };
    // Names of volumes are labels of DNS, whatever a ConfigMap is called.
    let long = "a.".repeat(40) + "b";
    let pod = &rendered(&format!("policies.configMaps={{{long},c.d}}"))["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().unwrap();
    let named: Vec<_> = volumes.iter().filter(|volume| volume["configMap"]["name"] == *long).collect();
    assert_eq!((named.len(), &named[0]["name"]), (1, &json!("policies-0")));
    let mark = |changes: &str| {
        rendered(changes)["spec"]["template"]["metadata"]["annotations"]["peili/restart"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    // What a running node does not take over makes another pod of it; what it does, does not.
    assert_ne!(mark("metrics.expose=true"), mark("metrics.expose=false"));
    assert_eq!(mark("config.log.level=debug"), mark("config.log.level=info"));
    let confined = &rendered("seLinuxOptions.type=spc_t")["spec"]["template"]["spec"]["securityContext"];
    assert_eq!(confined["seLinuxOptions"]["type"], "spc_t");
}

/// The images of all containers among these objects.
fn images_of(objects: &[Value]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for object in objects {
        for containers in ["initContainers", "containers", "ephemeralContainers"] {
            let containers = object["spec"]["template"]["spec"][containers].as_array();
            found.extend(
                containers.into_iter().flatten().map(|one| one["image"].as_str().unwrap().to_owned()),
            );
        }
    }
    found
}

/// A cluster without a registry is given what the list names, and no pod asks for more: hooks of Helm included, all by the one name
/// that the values give.
async fn images() {
    let listed = fs::read_to_string(chart::images()).unwrap();
    let listed: BTreeSet<String> =
        listed.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let mut needed = images_of(&objects(&chart::rendering("removal")));
    needed.extend(all().iter().flat_map(|(_, objects)| images_of(objects)));
    assert_eq!(needed, listed, "deploy/images.txt");

    let digest = format!("sha256:{}", "ab".repeat(32));
    let with = |changes: &str| {
        let values = chart::values("default").display().to_string();
        let objects = parse(&chart::render(&["--values", &values, "--set", changes]).unwrap());
        let hooks =
            objects.iter().filter(|object| !object["metadata"]["annotations"]["helm.sh/hook"].is_null());
        assert!(hooks.count() >= 2, "{changes}");
        images_of(&objects).into_iter().collect::<Vec<_>>()
    };
    let name = "registry.example/peili";
    assert_eq!(with(&format!("image.digest={digest}")), [format!("{name}@{digest}")]);
    // Of both, the digest: the tag may have moved.
    assert_eq!(with(&format!("image.digest={digest},image.tag=1.2")), [format!("{name}@{digest}")]);
    assert_eq!(with("image.digest=,image.tag=1.2"), [format!("{name}:1.2")]);
}

async fn configurations() {
    let scratch = Scratch::new().unwrap();
    for (preset, objects) in all() {
        let path = scratch.path().join(format!("{preset}.yaml"));
        fs::write(&path, config_of(&objects)).unwrap();
        let mut check = Command::new(peili_lab::node::binary().unwrap());
        check.args(["config", "check", "--config"]).arg(&path);
        let output = check
            .env("KUBERNETES_SERVICE_HOST", "10.96.0.1")
            .env("KUBERNETES_SERVICE_PORT", "443")
            .output()
            .await
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{preset}: {error}");
        // The key's Secret is not on this machine; nothing else is worth a warning.
        for line in error.lines().filter(|line| !line.is_empty()) {
            let is_known = line.starts_with("warning: cluster key /etc/peili/cluster-key/")
                || preset == "monitored" && line.contains("admin.clients");
            assert!(is_known, "{preset}: {line}");
        }
    }
}

/// Whatever settings a rendering gives to a policy that is shipped, that policy takes.
async fn settings() {
    let mut checked = 0;
    for (preset, objects) in all() {
        let config: Value = serde_saphyr::from_str(config_of(&objects)).unwrap();
        let lists =
            ["registry", "trust", "election"].map(|world| config["policies"][world].as_array().cloned());
        for policy in lists.into_iter().flatten().flatten() {
            let name =
                Path::new(policy["path"].as_str().unwrap()).file_stem().unwrap().to_str().unwrap().to_owned();
            let mut check = Command::new(peili_lab::node::binary().unwrap());
            check.args(["plugin", "check"]).arg(peili_lab::policy(&name));
            let output = check.arg("--settings").arg(policy["settings"].to_string()).output().await.unwrap();
            assert!(output.status.success(), "{preset}: {name}: {output:?}");
            checked += 1;
        }
    }
    assert!(checked >= 4, "{checked}");
}

/// An object, read as its type and written again.
fn read<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    serde_json::to_value(typed).unwrap()
}

/// What of `written` is missing in `read`, by path. Empty lists and maps say nothing.
fn lost(written: &Value, read: &Value, path: &str) -> Vec<String> {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => {
            let fields = written.iter();
            fields
                .flat_map(|(name, value)| {
                    lost(value, read.get(name).unwrap_or(&Value::Null), &format!("{path}.{name}"))
                })
                .collect()
        }
        (Value::Array(written), Value::Array(read)) if written.len() == read.len() => {
            let items = written.iter().zip(read).enumerate();
            items.flat_map(|(at, (written, read))| lost(written, read, &format!("{path}[{at}]"))).collect()
        }
        (Value::Array(empty), Value::Null) if empty.is_empty() => Vec::new(),
        (Value::Object(empty), Value::Null) if empty.is_empty() => Vec::new(),
        (written, read) if written == read => Vec::new(),
        _ => vec![path.to_owned()],
    }
}

async fn fields() {
    assert_eq!(
        lost(&json!({"a": {"b": 1, "c": [1, {"d": 2}]}}), &json!({"a": {"b": 1, "c": [1, {}]}}), ""),
        [".a.c[1].d"]
    );
    let mut kinds = BTreeSet::new();
    let mut renderings = all();
    renderings.extend(["namespace", "removal"].map(|name| (name.into(), objects(&chart::rendering(name)))));
    for (preset, objects) in renderings {
        for object in objects {
            let kind = object["kind"].as_str().unwrap();
            let read = match kind {
                "Namespace" => read::<core::v1::Namespace>(&object),
                "ConfigMap" => read::<core::v1::ConfigMap>(&object),
                "Secret" => read::<core::v1::Secret>(&object),
                "Service" => read::<core::v1::Service>(&object),
                "ServiceAccount" => read::<core::v1::ServiceAccount>(&object),
                "DaemonSet" => read::<apps::v1::DaemonSet>(&object),
                "Job" => read::<batch::v1::Job>(&object),
                "NetworkPolicy" => read::<networking::v1::NetworkPolicy>(&object),
                "Lease" => read::<coordination::v1::Lease>(&object),
                "Role" => read::<rbac::v1::Role>(&object),
                "RoleBinding" => read::<rbac::v1::RoleBinding>(&object),
                "ClusterRole" => read::<rbac::v1::ClusterRole>(&object),
                "ClusterRoleBinding" => read::<rbac::v1::ClusterRoleBinding>(&object),
                "FlowSchema" => read::<flowcontrol::v1::FlowSchema>(&object),
                "PriorityLevelConfiguration" => read::<flowcontrol::v1::PriorityLevelConfiguration>(&object),
                // Of others, whose types are not at hand.
                "PodMonitor"
                | "PrometheusRule"
                | "CiliumClusterwideNetworkPolicy"
                | "CiliumNetworkPolicy" => continue,
                kind => panic!("{preset} has a {kind}"),
            };
            let lost = lost(&object, &read, kind);
            assert!(lost.is_empty(), "{preset}: fields that Kubernetes does not know: {lost:?}");
            kinds.insert(kind.to_owned());
        }
    }
    assert!(kinds.len() >= 13, "{kinds:?}");
}

/// The rules of the rendered Role of the mirror, each as `verb group/resource/name`.
fn rules(objects: &[Value]) -> BTreeSet<String> {
    let of_mirror = |object: &&Value| object["kind"] == "Role" && object["metadata"]["name"] == chart::NAME;
    let texts = |rule: &Value, field: &str| -> Vec<String> {
        let values = rule[field].as_array().cloned().unwrap_or_default();
        values.iter().map(|value| value.as_str().unwrap().to_owned()).collect()
    };
    let mut found = BTreeSet::new();
    for rule in objects.iter().filter(of_mirror).flat_map(|role| role["rules"].as_array().unwrap()) {
        let mut names = texts(rule, "resourceNames");
        if names.is_empty() {
            names.push("*".into());
        }
        for verb in texts(rule, "verbs") {
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    found.extend(names.iter().map(|name| format!("{verb} {group}/{resource}/{name}")));
                }
            }
        }
    }
    found
}

/// A coordinator needs each of these rights (`doctor::rights` takes them away one by one) and nothing more is given.
async fn rights() {
    let needed = |leases: &[&str]| -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for rule in Rule::of_coordinator(leases) {
            let names = if rule.names.is_empty() { &["*"][..] } else { rule.names };
            for resource in rule.resources {
                let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
                for verb in rule.verbs {
                    all.extend(names.iter().map(|name| format!("{verb} {group}/{resource}/{name}")));
                }
            }
        }
        all
    };
    let creates = |right: &String| {
        let is_event = right.contains("/events/");
        right.starts_with("create ") && !is_event
    };
    let find = |preset: &str| rules(&objects(&chart::rendering(preset)));
    // The chart makes the ConfigMap: who may create that one may create any, those of policies too.
    let mut made = needed(&["peili"]);
    assert!(made.remove("create /configmaps/*"));
    assert_eq!(find("default"), made);
    let fleet = |object: &Value| object["kind"] == "ConfigMap" && object["metadata"]["name"] == "peili-fleet";
    assert!(objects(&chart::rendering("default")).iter().any(fleet));
    let mut precreated = made;
    precreated.retain(|right| !creates(right));
    assert_eq!(find("precreated"), precreated);
    precreated.extend(["get", "update", "watch"].map(|verb| format!("{verb} /configmaps/mirror-leader")));
    assert_eq!(find("configmap-lock"), precreated);
    assert_eq!(find("no-api"), BTreeSet::new());
    for (preset, objects) in all() {
        // The Node's zone is all that is ever given in the whole cluster, and to whom it is wanted.
        let wanted = ["monitored", "zones"].contains(&preset.as_str());
        let roles: Vec<&Value> = objects.iter().filter(|object| object["kind"] == "ClusterRole").collect();
        assert_eq!(roles.len(), usize::from(wanted), "{preset}");
        for role in roles {
            assert_eq!(role["rules"], json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]));
        }
        let pods = objects.iter().filter_map(|object| object["spec"]["template"]["spec"].as_object());
        for pod in pods {
            assert_eq!(pod["automountServiceAccountToken"], false, "{preset}");
        }
    }
}

/// Each alert fires where it must and not where it must not, by promtool; has a section for people; and asks for metrics that there are.
async fn alerts() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = chart::folder().join("files/rules.yaml");
    let promtool = peili_lab::requirements::prometheus("promtool").unwrap();
    let tests = repository.join("tests/fixtures/rules-test.yaml");
    for (what, file) in [("check", &rules), ("test", &tests)] {
        let output = Command::new(&promtool).args([what, "rules"]).arg(file).output().await.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        );
    }
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let text = read(&rules);
    let parsed: Value = serde_saphyr::from_str(&text).unwrap();
    // All that fires is compared in each case, so that one of an alert is a look-alike of all others.
    let (cases, guide) = (read(&tests), read(&repository.join("docs/operate.md")));
    let mut alerts = 0;
    for alert in
        parsed["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
    {
        let name = alert["alert"].as_str().unwrap();
        assert!(guide.contains(&format!("### {name}\n")), "docs/operate.md has no section {name}");
        assert_eq!(alert["annotations"]["runbook"], format!("docs/operate.md#{}", name.to_lowercase()));
        assert!(cases.contains(&format!("alertname=\"{name}\"")), "{name} has no case in which it fires");
        alerts += 1;
    }
    assert!(alerts >= 8, "{alerts}");
    let known = read(&repository.join("docs/metrics.md"));
    let words = |text: &str| -> BTreeSet<String> {
        let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let words = text.split(|letter| !is_part(letter));
        words
            .filter(|word| word.starts_with("peili_") || word.starts_with("leader_"))
            .map(str::to_owned)
            .collect()
    };
    for name in words(&text).union(&words(&guide)) {
        let sample = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let is_known = [Some(name.as_str()), sample]
            .iter()
            .flatten()
            .any(|name| known.contains(&format!("| `{name}` |")));
        assert!(is_known, "there is no metric {name}");
    }
    let monitored = objects(&chart::rendering("monitored"));
    let rendered = monitored.iter().find(|object| object["kind"] == "PrometheusRule").unwrap();
    assert_eq!(rendered["spec"], parsed);
}

/// Where objects of a kind are made.
fn path(object: &Value) -> String {
    let version = object["apiVersion"].as_str().unwrap();
    let root = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    let kind = object["kind"].as_str().unwrap();
    let plural = match kind {
        "FlowSchema" => "flowschemas".to_owned(),
        "NetworkPolicy" => "networkpolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/namespaces/{namespace}/{plural}"),
        None => format!("{root}/{plural}"),
    }
}

async fn taken() {
    let mut options = Options::on_loopback();
    options.flags.push("--runtime-config=batch/v1=true,networking.k8s.io/v1=true".into());
    let server = ApiServer::start(options).await.unwrap();
    println!("kube-apiserver {}", server.version());
    let post = async |object: &Value, query: &str| {
        let (status, said) =
            server.admin("POST", &format!("{}{query}", path(object)), Some(object)).await.unwrap();
        (status, said["message"].as_str().unwrap_or_default().to_owned())
    };
    let namespaces = objects(&chart::rendering("namespace"));
    assert_eq!(post(&namespaces[0], "").await.0, 201);
    let mut taken = 0;
    let mut renderings = all();
    renderings.push(("removal".into(), objects(&chart::rendering("removal"))));
    for (preset, objects) in renderings {
        for object in objects {
            let kind = object["kind"].as_str().unwrap();
            let is_of_others = !object["apiVersion"].as_str().unwrap().contains("k8s.io")
                && object["apiVersion"].as_str().unwrap().contains('.');
            let is_newer =
                object["apiVersion"] == "flowcontrol.apiserver.k8s.io/v1" && !server.is_at_least(29);
            if is_of_others || is_newer {
                println!("{preset}: this server has no {kind} of {}", object["apiVersion"]);
                continue;
            }
            let (status, message) = post(&object, "?dryRun=All&fieldValidation=Strict").await;
            assert_eq!(status, 201, "{preset}: {kind} {}: {message}", object["metadata"]["name"]);
            taken += 1;
        }
    }
    assert!(taken > 40, "{taken}");
}

/// What the Job of the removal does, by the rights that the chart gives it.
async fn waits() {
    let server = ApiServer::start(Options::on_loopback()).await.unwrap();
    server.namespace(chart::NAME).await.unwrap();
    let of_removal =
        |object: &Value| object["metadata"]["name"] == "peili-cleanup" && object["kind"] != "Job";
    let mut made = Vec::new();
    for object in objects(&chart::rendering("removal")).into_iter().filter(of_removal) {
        let (status, said) = server.admin("POST", &path(&object), Some(&object)).await.unwrap();
        assert_eq!(status, 201, "{said}");
        made.push(said);
    }
    assert_eq!(made.len(), 4, "{made:#?}");
    let scratch = Scratch::new().unwrap();
    let token = server.token(chart::NAME, "peili-cleanup", Duration::from_secs(3_600)).await.unwrap();
    let credentials = scratch.path().join("account");
    server.write_service_account_dir(&credentials, &token, chart::NAME).unwrap();
    let config = scratch.path().join("peili.yaml");
    fs::write(
        &config,
        json!({"kubernetes": {"endpoints": [server.url()], "credentials": credentials}}).to_string(),
    )
    .unwrap();
    let wait = async |more: &[&str]| {
        let mut cleanup = Command::new(peili_lab::node::binary().unwrap());
        cleanup.args(["cleanup", "--wait-for", "peili-cleanup", "--within", "5s", "--config"]).arg(&config);
        let began = Instant::now();
        let output = cleanup.args(more).output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned(), began.elapsed())
    };
    // No controller has seen it: nothing says that it has no node to be on.
    let (code, text, took) = wait(&[]).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("done on no node yet") && text.contains("hint: `peili cleanup` does the same by hand"),
        "{text}"
    );
    assert!(took < Duration::from_secs(8), "{took:?}");
    let set = async |ready: u64| {
        let place = "/apis/apps/v1/namespaces/peili/daemonsets/peili-cleanup";
        let (_, mut object) = server.admin("GET", place, None).await.unwrap();
        object["status"] = json!({
            "observedGeneration": object["metadata"]["generation"], "desiredNumberScheduled": 3, "numberReady": ready,
            "currentNumberScheduled": 3, "numberMisscheduled": 0,
        });
        let (status, said) = server.admin("PUT", &format!("{place}/status"), Some(&object)).await.unwrap();
        assert_eq!(status, 200, "{said}");
    };
    set(2).await;
    let (code, text, _) = wait(&["--exit-zero"]).await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("done on 2 of 3 nodes") && text.contains("not an error, by --exit-zero"), "{text}");
    set(3).await;
    let (code, text, took) = wait(&[]).await;
    assert_eq!((code, text.as_str()), (Some(0), "peili-cleanup: done on all nodes\n"));
    assert!(took < Duration::from_secs(2), "{took:?}");
    // Its rights are of this one object.
    let client = server.client(&token);
    for other in ["daemonsets/peili", "daemonsets"] {
        let (status, _) =
            client.send("GET", &format!("/apis/apps/v1/namespaces/peili/{other}"), None).await.unwrap();
        assert_eq!(status, 403, "{other}");
    }
    drop(server);
    let (code, text, _) = wait(&[]).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("Connection refused"), "{text}");
}

async fn holds() {
    let scratch = Scratch::new().unwrap();
    let root = scratch.path().join("host");
    fs::create_dir_all(root.join("etc/containerd/certs.d")).unwrap();
    let mut cleanup = Command::new(peili_lab::node::binary().unwrap());
    cleanup.args(["cleanup", "--hold", "--config-path=/etc/containerd/certs.d", "--root"]).arg(&root);
    cleanup.arg("--data-dir").arg(scratch.path().join("data")).stdout(Stdio::piped());
    let mut cleanup = cleanup.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(cleanup.stdout.take().unwrap()).lines();
    let first = lines.next_line().await.unwrap().unwrap();
    assert_eq!(first, "Peili is in no file of this node: nothing to do");
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "staying until SIGTERM, by --hold");
    let process = rustix::process::Pid::from_raw(cleanup.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert_eq!(cleanup.wait().await.unwrap().code(), Some(0));
}
