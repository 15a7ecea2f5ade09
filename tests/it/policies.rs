//! Policies from mounted files decide what crosses the wire: pulls through CRI, counted at the origin and at both peers.

mod data;
mod election;
mod failing;
mod newcomer;
mod plans;
mod recorded;
mod reload;
mod tags;
mod trust;
mod upstreams;

use std::time::Duration;

use peili_lab::image::write_empty_layout;
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Image, Requirement, policy, wait};
use serde_json::{Value, json};

use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};
use crate::pulls::tags::cause;
use crate::pulls::{needs, short};

/// Longest until a change of the configuration is in force: two looks at the file.
const APPLIED: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = |what: &str| format!("policies::{what}::{}", short(generation));
        let needs = needs_for(generation);
        cases.push(Case::new(name("denied"), &needs, move || denied(generation)));
    }
    let needs = needs_for(Generation::V2);
    cases.push(Case::new("policies::the_holder_denies", &needs, the_holder_denies));
    cases.push(Case::new("policies::bypassed", &needs, bypassed));
    // Timed: whoever is slow to tell a tag is not waited for.
    cases.push(Case::new("policies::a_plan", &needs, a_plan).timed());
    cases.push(Case::new("policies::replaced_live", &needs, replaced_live));
    cases.push(Case::new("policies::required", &[Requirement::Policies], required));
    cases.push(Case::new("policies::cases_of_the_shipped", &[Requirement::Policies], cases_of_the_shipped));
    cases.push(Case::new("policies::documented", &[Requirement::Policies], documented));
    cases.push(Case::new("policies::explained", &[Requirement::Policies], explained));
    cases.extend(data::cases());
    cases.extend(election::cases());
    cases.extend(failing::cases());
    cases.extend(newcomer::cases());
    cases.extend(plans::cases());
    cases.extend(recorded::cases());
    cases.extend(reload::cases());
    cases.extend(tags::cases());
    cases.extend(trust::cases());
    cases.extend(upstreams::cases());
    cases
}

fn needs_for(generation: Generation) -> Vec<Requirement> {
    [&needs(generation)[..], &[Requirement::Policies]].concat()
}

fn one(component: &str, failure: &str, settings: &Value) -> Value {
    let path = policy(component);
    json!({"policies": {"registry": [{"name": component, "path": path, "failure": failure, "settings": settings}]}})
}

fn guest(act: &str, failure: &str) -> Value {
    one("testguests", failure, &json!({"act": act, "on": "special/"}))
}

fn deny(message: &str) -> Value {
    one("allow-list", "deny", &json!({"deny": [format!("{REGISTRY}/special/**")], "message": message}))
}

/// Two images that have nothing in common, the first of which the policies of this file are about.
fn images() -> [Image; 2] {
    let image = |repository: &str, size, seed| {
        Image::builder(repository, "v1").layer(size).layer(4096).seed(seed).build().unwrap()
    };
    // Larger than what is verified whole in any case.
    [image("special/app", 6 << 20, 1), image("plain/app", 1 << 20, 2)]
}

/// Bytes that a node sent to peers.
async fn sent(cluster: &Cluster, node: usize) -> u64 {
    let status = cluster.nodes[node].peili.status().await.unwrap();
    status["served"]["to_peers"]["bytes"].as_u64().unwrap()
}

/// What a pull took from whom.
#[derive(Debug)]
struct Taken {
    /// Bytes of layers that the origin sent.
    origin: u64,
    /// Bytes that each node sent.
    nodes: Vec<u64>,
    /// Bytes that the node that pulled says it got from them.
    got: u64,
}

async fn pulled(cluster: &Cluster, node: usize, image: &Image) -> Taken {
    let all = async || {
        let mut all = Vec::new();
        for node in 0..cluster.nodes.len() {
            all.push(sent(cluster, node).await);
        }
        (all, cluster.nodes[node].peer_bytes().await)
    };
    cluster.origin.reset();
    let (mut nodes, mut got) = all().await;
    cluster.nodes[node].pull(image).await;
    let after = all().await;
    for (sent, after) in nodes.iter_mut().zip(after.0) {
        *sent = after - *sent;
    }
    got = after.1 - got;
    let taken = Taken { origin: cluster.origin.layer_bytes(image), nodes, got };
    println!("{}: {taken:?}", image.repository);
    taken
}

/// Bytes of layers that the second node's pull took from the origin. What all count agrees with it: the first one sent the rest, and
/// the second one got it.
async fn from_origin(cluster: &Cluster, image: &Image) -> u64 {
    let Taken { origin, nodes, got } = pulled(cluster, 1, image).await;
    let rest = image.layer_bytes() - origin;
    for count in [nodes[0], got] {
        assert!(
            if rest == 0 { count == 0 } else { count >= rest },
            "{count} bytes by peers, and {rest} left"
        );
    }
    origin
}

/// The settings that docs/policies.md shows are ones that the shipped policies take.
async fn documented() {
    let text =
        std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/policies.md"))
            .unwrap();
    let mut checked = Vec::new();
    let empty = tempfile::NamedTempFile::new().unwrap();
    for block in text.split("```yaml\n").skip(1) {
        let config: Value = serde_saphyr::from_str(block.split("```").next().unwrap()).unwrap();
        let worlds = config["policies"].as_object().into_iter().flatten();
        for plugin in worlds.flat_map(|(_, plugins)| plugins.as_array().into_iter().flatten()) {
            // Among the keys of `policies` are such as are no world.
            if !plugin.is_object() {
                continue;
            }
            let name = plugin["name"].as_str().unwrap();
            let mut command = std::process::Command::new(peili_lab::node::binary().unwrap());
            command.args(["plugin", "check"]).arg(policy(name));
            command.args(["--settings", &plugin["settings"].to_string()]);
            // The files that it names are somebody else's: empty ones will do.
            for data in plugin["data"].as_array().into_iter().flatten() {
                let (name, path) = (data["name"].as_str().unwrap(), empty.path().display());
                command.args(["--data", &format!("{name}={path}")]);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            checked.push(name.to_owned());
        }
    }
    assert!(checked.len() >= 6 && checked.contains(&"node-allow".to_owned()), "{checked:?}");
}

/// Over a closed registry a denial is the end of the pull, with its reason in the error and no request at the origin; over an
/// open one it is advice.
async fn denied(generation: Generation) {
    let setup = Setup { configs: vec![(1, deny("ask the platform team"))], ..Setup::new(generation) };
    let cluster = setup.start().await;
    let [special, plain] = images();
    cluster.seed(0, &special).await;
    cluster.seed(0, &plain).await;
    let second = &cluster.nodes[1];

    let mirror = second.peili.registry_url();
    second.containerd.set_hosts(REGISTRY, &mirror, &[&mirror]).unwrap();
    let error = second.containerd.cri().pull(&special.reference(REGISTRY), PULL).await.unwrap_err();
    assert!(error.to_string().contains("ask the platform team"), "{error}");
    assert_eq!(cluster.origin.requests().len(), 0);
    let answer = second.peili.fetch(&path(&special)).await.unwrap();
    assert_eq!((answer.status, cause(&answer)), (403, "denied".into()));
    let problems = async || second.peili.status().await.unwrap()["problems"].to_string();
    assert!(!problems().await.contains("advice"), "{}", problems().await);

    cluster.mirror(1, REGISTRY, &second.peili.registry_url());
    assert_eq!(from_origin(&cluster, &special).await, special.layer_bytes(), "all from the origin");
    assert_eq!(from_origin(&cluster, &plain).await, 0, "the other one from the peer");
}

/// A puller that runs no policy gets nothing that the holder's policy denies.
async fn the_holder_denies() {
    let setup = Setup { configs: vec![(0, deny(""))], ..Setup::new(Generation::V2) };
    let cluster = setup.start().await;
    let [special, plain] = images();
    cluster.origin.add(&special);
    cluster.nodes[0].pull(&special).await;
    cluster.seed(0, &plain).await;
    assert_eq!(from_origin(&cluster, &special).await, special.layer_bytes());
    assert_eq!(from_origin(&cluster, &plain).await, 0);
}

/// What is bypassed is not answered, although it is at a peer and here.
async fn bypassed() {
    let setup = Setup { configs: vec![(1, guest("bypass", "deny"))], ..Setup::new(Generation::V2) };
    let cluster = setup.start().await;
    let [special, plain] = images();
    cluster.seed(0, &special).await;
    cluster.seed(0, &plain).await;
    assert_eq!(from_origin(&cluster, &special).await, special.layer_bytes());
    assert_eq!(cause(&cluster.nodes[1].peili.fetch(&path(&special)).await.unwrap()), "bypassed");
    assert_eq!(from_origin(&cluster, &plain).await, 0);
}

/// Tags that the configuration takes from peers are not, where a plan says so; content that is bound to its digest is.
async fn a_plan() {
    let config = json!({"mirror": {"tags-peers-first": ["**"], "verify": false}});
    let setup = Setup { config, configs: vec![(1, guest("plan", "deny"))], ..Setup::new(Generation::V2) };
    let cluster = setup.start().await;
    let [special, plain] = images();
    cluster.seed(0, &special).await;
    cluster.seed(0, &plain).await;
    let second = &cluster.nodes[1].peili;
    let tag = |image: &Image| format!("/v2/{}/manifests/v1?ns={REGISTRY}", image.repository);
    assert_eq!(cause(&second.fetch(&tag(&special)).await.unwrap()), "tag-upstream");
    // The first node hears of an image's name after its content.
    wait::until("the tag by the first node", APPLIED, async || {
        (second.fetch(&tag(&plain)).await.ok()?.status == 200).then_some(())
    })
    .await
    .unwrap();
    assert_eq!(from_origin(&cluster, &special).await, 0);
    assert_eq!(tags_asked(&cluster, &special), 1, "the tag, and nothing else");
    assert_eq!(cluster.origin.requests().len(), 1);
    // `always-verify`: although the configuration turned it off.
    let unverified = second.metric("peili_mirror_verifications_total", "verdict=\"unverified\"").await;
    assert_eq!(unverified.unwrap_or(0.0), 0.0);
    assert_eq!(from_origin(&cluster, &plain).await, 0);
    assert_eq!(cluster.origin.requests(), [], "by the configuration nothing at all");
}

/// Policies come, change and go while the node runs; a broken one changes nothing and is in the status with its cause.
async fn replaced_live() {
    let mut cluster = Setup { count: 1, ..Setup::new(Generation::V2) }.start().await;
    let [special, _] = images();
    cluster.seed(0, &special).await;
    let node = &mut cluster.nodes[0].peili;
    let path = path(&special);
    assert_eq!(node.fetch(&path).await.unwrap().status, 200);

    let absent = json!({"policies": {"registry": [{"name": "absent", "path": "/no/such/policy.wasm"}]}});
    let slip = Some("recent requests would be answered otherwise");
    // So many images that a share of them means something.
    let asks = async |node: &peili_lab::Node| {
        for number in 0..60 {
            let name = format!("/v2/special/app-{number}/manifests/v1?ns={REGISTRY}");
            node.fetch(&name).await.unwrap();
        }
    };
    for (config, most, status, problem) in [
        (deny("first"), 20, 403, None),
        (absent, 20, 403, Some("No such file")),
        (guest("bypass", "deny"), 20, 403, slip),
        (guest("bypass", "deny"), 100, 404, None),
        (json!({"policies": {"registry": []}}), 100, 200, None),
    ] {
        asks(node).await;
        node.plan.merge(&config);
        node.plan.merge(&json!({"policies": {"max-change": most}}));
        node.rewrite().unwrap();
        wait::until(&format!("{status}, {problem:?}"), APPLIED, async || {
            let problems = node.status().await.ok()?["problems"].to_string();
            let is_said = problem.is_none_or(|problem| problems.contains(problem))
                && problem.is_some() == problems.contains("policies: ");
            (node.fetch(&path).await.ok()?.status == status && is_said).then_some(())
        })
        .await
        .unwrap();
    }
    let problems = node.status().await.unwrap()["problems"].to_string();
    assert!(problems.contains("advice only"), "the runtime has another host: {problems}");
}

/// A node that must have its policies is not ready without them, says why, and runs; it is ready as soon as it has them.
async fn required() {
    let scratch = Scratch::new().unwrap();
    let (layout, file) = (scratch.path().join("layout"), scratch.path().join("policy.wasm"));
    write_empty_layout(&layout).unwrap();
    let mut plan = Plan::on_loopback("node-1", &format!("layout:{}", layout.display())).unwrap();
    let plugin = json!({"name": "allow-list", "path": &file});
    plan.merge(&json!({"policies": {"startup": "require", "registry": [plugin]}}));
    let node = plan.launch().unwrap();
    let ready = async |status: u16, text: &str| {
        wait::until(&format!("{status}: {text}"), Duration::from_secs(20), async || {
            let answer = node.admin("/readyz").await.ok()?;
            (answer.status == status && answer.text().contains(text)).then_some(())
        })
        .await
        .unwrap();
    };
    ready(503, "policies: policy `allow-list`").await;
    assert_eq!(node.admin("/livez").await.unwrap().status, 200, "it runs all the same");
    std::fs::copy(policy("allow-list"), &file).unwrap();
    ready(200, "").await;
    // What fails later leaves the last good ones, and the node ready.
    std::fs::write(&file, "no component").unwrap();
    wait::until("it is said", Duration::from_secs(20), async || {
        node.status().await.ok()?["problems"].to_string().contains("no WebAssembly").then_some(())
    })
    .await
    .unwrap();
    ready(200, "").await;
}

/// The cases of each policy that is shipped; and one that expects something else, or is of no policy, fails.
async fn cases_of_the_shipped() {
    let test = |component: &str, cases: &std::path::Path| {
        let mut command = std::process::Command::new(peili_lab::node::binary().unwrap());
        let output = command.args(["plugin", "test"]).args([&policy(component), cases]).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), text)
    };
    let plugins = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins");
    let shipped = ["allow-list", "node-allow", "tag-freshness", "upstream-order", "zone-boundary"];
    for name in shipped.into_iter().chain(["api-reachable", "prefer-labels", "zone-spread"]) {
        let (code, text) = test(name, &plugins.join(name).join("cases.yaml"));
        println!("{name}:\n{text}");
        assert_eq!(code, 0, "{name}");
        assert!(text.lines().all(|line| line.starts_with("ok ")) && text.lines().count() > 3);
        carries(name, text.lines().count());
    }
    let scratch = Scratch::new().unwrap();
    let write = |text: &str| {
        let file = scratch.path().join("cases.yaml");
        std::fs::write(&file, text).unwrap();
        file
    };
    for (component, cases, parts) in [
        (
            "allow-list",
            "cases: [{name: a, image: nginx, expect: deny}]",
            &["FAILED  a", "expected  deny", "said      abstain", "1 of 1 cases failed"][..],
        ),
        (
            "testguests",
            "cases: [{name: a, settings: {act: state}, image: nginx, expect: abstain}]",
            &["FAILED  a", "asked again: deny (state: each second time)"],
        ),
        (
            "testguests",
            "cases: [{name: a, settings: {act: loop}, image: nginx, expect: abstain}]",
            &["its time was up"],
        ),
        ("allow-list", "cases: [{name: a, expect: deny}]", &["case `a`: it names no `image`"]),
        ("node-allow", "cases: [{name: a, image: nginx, expect: deny}]", &["case `a`: it names no `peer`"]),
        ("node-allow", "cases: [{name: a, pear: {}, expect: deny}]", &["pear"]),
        (
            "allow-list",
            "cases: [{name: a, settings: {alow: []}, image: nginx, expect: deny}]",
            &["settings/alow"],
        ),
    ] {
        let (code, text) = test(component, &write(cases));
        assert_eq!(code, 1, "{text}");
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}

/// What is shipped carries its cases, its package and a schema that has the keys that it takes.
fn carries(name: &str, cases: usize) {
    let peili = |arguments: &[&str]| {
        let mut command = std::process::Command::new(peili_lab::node::binary().unwrap());
        let file = policy(name);
        let output = command.args(["plugin", arguments[0]]).arg(file).args(&arguments[1..]).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let inspected: Value = serde_json::from_str(&peili(&["inspect", "--json"])).unwrap();
    assert_eq!((&inspected["package"]["name"], &inspected["cases"]), (&json!(name), &json!(cases)));
    let keys = inspected["settings-schema"]["properties"].as_object().unwrap();
    // The refusal names all keys that there are.
    let refusal = peili(&["check", "--settings", r#"{"no-such-key": 1}"#]);
    let named: std::collections::BTreeSet<&str> = refusal.split('`').skip(1).step_by(2).collect();
    for key in keys.keys() {
        assert!(named.contains(key.as_str()), "{key}: {refusal}");
    }
    let expected = refusal.split("expected").nth(1).unwrap().split(" at line").next().unwrap();
    assert_eq!(expected.matches('`').count() / 2, keys.len(), "{refusal}");
}

/// A running node says what its policies say, and what comes of it; only its owner may ask.
async fn explained() {
    let scratch = Scratch::new().unwrap();
    let plan = |number: usize| {
        let layout = scratch.path().join(format!("layout-{number}"));
        write_empty_layout(&layout).unwrap();
        Plan::on_loopback(&format!("node-{number}"), &format!("layout:{}", layout.display())).unwrap()
    };
    let mut plans = [plan(1), plan(2)];
    Plan::introduce(&mut plans);
    let [one, mut two] = plans;
    two.merge(&deny("ask the platform team"));
    let grant = json!({"act": "grant", "level": "blobs", "withhold": true, "ttl-seconds": 60});
    two.merge(&json!({"policies": {"trust": [
        {"name": "watched", "path": policy("testguests-trust"), "settings": {"act": "deny"}, "mode": "monitor"},
        {"name": "guest", "path": policy("testguests-trust"), "settings": grant},
    ]}}));
    let (one, two) = (one.start().await.unwrap(), two.start().await.unwrap());
    let folder = two.plan.data_dir();
    let explain = |what: &str, of: &str, more: &[&str]| {
        let mut command = std::process::Command::new(peili_lab::node::binary().unwrap());
        let output =
            command.args(["explain", what, of, "--data-dir"]).arg(&folder).args(more).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    };
    let says = |(code, text): (i32, String), expected: (i32, &[&str])| {
        assert_eq!(code, expected.0, "{text}");
        for part in expected.1 {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    };
    let name = format!("{REGISTRY}/special/app:v1");
    let denied: &[&str] = &["allow-list: deny (denied: ask the platform team)", "Enforced 403: denied: ask"];
    says(explain("pull", &name, &[]), (0, denied));
    let other = format!("{REGISTRY}/other/app@sha256:{}", "ab".repeat(32));
    says(explain("pull", &other, &[]), (0, &["allow-list: abstain", "by 0 trusted peers", "else 404"]));
    let peer = one.plan.peer_id.clone();
    wait::until("it is judged", APPLIED, async || {
        explain("peer", &peer, &[]).1.contains("Stands").then_some(())
    })
    .await
    .unwrap();
    let stands: &[&str] = &[
        "Node     node-1",
        "Proof    listed",
        "watched (monitored only): deny for=60s (told-to: the test guest was told to)",
        "guest: allow level=blobs serve=no ttl=60s",
        "Stands   level=blobs serve=no ttl=60s, for ",
        "Enforced level blobs, is not served",
    ];
    says(explain("peer", &peer, &[]), (0, stands));
    let json: Value = serde_json::from_str(&explain("peer", &peer, &["--json"]).1).unwrap();
    assert_eq!((&json["level"], &json["serve"]), (&json!("blobs"), &json!(false)));

    let stranger = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    says(explain("peer", stranger, &[]), (1, &["no peer 12D3"]));
    let socket = folder.join("explain.sock");
    let mode = std::os::unix::fs::PermissionsExt::mode(&socket.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(two);
    says(explain("pull", &name, &[]), (1, &["cannot connect", "hint: is peili running"]));
}

/// How often the registry was asked what the image's tag means.
fn tags_asked(cluster: &Cluster, image: &Image) -> usize {
    let path = format!("/v2/{}/manifests/{}", image.repository, image.tag);
    cluster.origin.requests().iter().filter(|request| request.path == path).count()
}

fn path(image: &Image) -> String {
    format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root)
}
