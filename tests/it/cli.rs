//! The program from a shell, and its registry on loopback over OCI layouts: no root, no containerd.

mod metrics;
mod process;
mod registry;

use std::process::{Command, Output};
use std::time::Duration;

use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Node, http, wait};
use serde_json::{Value, json};

use crate::Case;
use crate::cluster::REGISTRY;

/// Longest wait for a change to be in force.
const CHANGE: Duration = Duration::from_secs(20);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("cli::identity", &[], identity),
        Case::new("cli::configuration", &[], configuration),
        Case::new("cli::status", &[], status),
        Case::new("cli::changes_while_it_runs", &[], changes),
        Case::new("cli::a_signal_drains", &[], drain),
    ];
    cases.extend(metrics::cases());
    cases.extend(process::cases());
    cases.extend(registry::cases());
    cases
}

/// Two nodes on loopback that know each other; the first holds the image, the second nothing.
struct Pair {
    holder: Node,
    other: Node,
    scratch: Scratch,
}

impl Pair {
    async fn start(images: &[&Image], config: &Value) -> Self {
        let scratch = Scratch::new().unwrap();
        let mut plans = Vec::new();
        for (name, images) in [("holder", images), ("other", &[][..])] {
            let folder = scratch.path().join(name);
            layout(&folder, images);
            let mut plan = Plan::on_loopback(name, &format!("layout:{}", folder.display())).unwrap();
            plan.merge(&json!({"upstream": {"hosts-dirs": [scratch.path().join("certs.d")]}}));
            plan.merge(config);
            plans.push(plan);
        }
        Plan::introduce(&mut plans);
        let [holder, other] = plans.try_into().unwrap();
        Self { holder: holder.start().await.unwrap(), other: other.start().await.unwrap(), scratch }
    }

    /// Waits until the other node knows what the holder has.
    async fn known(&self) {
        wait::until("content known", CHANGE, async || {
            let held = self.holder.advertised().await.ok()?;
            (held > 0 && self.other.known(&self.holder).await.ok()? == Some(held)).then_some(())
        })
        .await
        .unwrap();
    }
}

/// A layout with several images, each under its full name.
pub(crate) fn layout(folder: &std::path::Path, images: &[&Image]) {
    std::fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let mut entries = Vec::new();
    for image in images {
        image.write_layout(folder, Some(&image.reference(REGISTRY))).unwrap();
        let index = std::fs::read(folder.join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        entries.push(index["manifests"][0].clone());
    }
    let index = json!({"schemaVersion": 2, "manifests": entries});
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

/// Runs the program to its end.
async fn peili(arguments: &[&str]) -> Output {
    let mut command = Command::new(binary().unwrap());
    command.args(arguments).env_remove("PEILI_CONFIG");
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn identity() {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = Scratch::new().unwrap();
    let folder = scratch.path().join("data");
    let arguments = ["identity", "--data-dir", folder.to_str().unwrap()];
    let first = peili(&arguments).await;
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    assert!(text(&first.stdout).starts_with("12D3KooW"), "{first:?}");
    assert_eq!(peili(&arguments).await.stdout, first.stdout, "made once");
    // Processes that make it at once agree.
    let raced = scratch.path().join("raced");
    let race = (0..8).map(async |_| peili(&["identity", "--data-dir", raced.to_str().unwrap()]).await);
    let made = futures::future::join_all(race).await;
    assert!(made.iter().all(|one| one.status.success() && one.stdout == made[0].stdout), "{made:?}");
    let mut files = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
        files += 1;
        std::fs::write(&path, "not an identity").unwrap();
    }
    assert_eq!(files, 1);
    let corrupt = peili(&arguments).await;
    assert_eq!(corrupt.status.code(), Some(1));
    assert!(text(&corrupt.stderr).starts_with("error: "), "{corrupt:?}");
}

async fn configuration() {
    let scratch = Scratch::new().unwrap();
    let path = scratch.path().join("peili.yaml");
    let file = path.to_str().unwrap();
    let check = async |text: &str, code: i32, expected: &str| {
        std::fs::write(&path, text).unwrap();
        let output = peili(&["config", "check", "--config", file]).await;
        let error = self::text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(expected), "{error}");
    };
    check("", 0, "warning: the network is open").await;
    check("mirror:\n  segment: 4MiB\n", 0, "").await;
    check("mirror:\n  segmnt: 4MiB\n", 2, "peili.yaml:2:3").await;
    check("mirror:\n  segment: 1GiB\n", 2, "64KiB to 64MiB").await;
    check("registry:\n  listen: [0.0.0.0:5000]\n", 2, "registry.clients").await;
    check("mirror: [", 2, "peili.yaml").await;
    let output = peili(&["run", "--config", file]).await;
    assert_eq!(output.status.code(), Some(2), "a wrong file ends the start too");
    let output = peili(&["config", "check", "--config", "/no/such/file"]).await;
    assert_eq!(output.status.code(), Some(2));

    let schema = peili(&["config", "schema"]).await;
    let schema: Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert!(schema["properties"]["mirror"].is_object());
    std::fs::write(&path, "mirror:\n  segment: 4MiB\n").unwrap();
    let show = peili(&["config", "show", "--config", file, "--set", "node.zone=z1"]).await;
    assert!(text(&show.stdout).contains("zone: z1"), "{show:?}");
    for arguments in [&["completions", "bash"][..], &["man"], &["--help"], &["--version"]] {
        let output = peili(arguments).await;
        assert!(output.status.success() && !output.stdout.is_empty(), "{arguments:?}");
    }
    assert_eq!(peili(&["no-such-command"]).await.status.code(), Some(2));
}

async fn status() {
    let image = Image::builder("library/app", "v1").layer(4096).build().unwrap();
    let nowhere = "no-such.invalid:5001";
    let pair = Pair::start(&[&image], &json!({"network": {"dns": [nowhere]}})).await;
    pair.known().await;
    let address = format!("127.0.0.1:{}", pair.other.plan.ports.admin);
    wait::until("the missing name reported", CHANGE, async || {
        pair.other.status().await.ok()?["problems"].to_string().contains(nowhere).then_some(())
    })
    .await
    .unwrap();
    let output = peili(&["status", "--address", &address]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let shown = text(&output.stdout);
    assert!(shown.contains("other") && shown.contains("holder"), "{shown}");
    assert_eq!(shown.matches(nowhere).count(), 1, "each problem once: {shown}");
    let output = peili(&["status", "--json", "--address", &address]).await;
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["node"]["name"], "other");
    let nobody = peili(&["status", "--address", "127.0.0.1:1"]).await;
    assert_eq!(nobody.status.code(), Some(1));
    // Without an address it is where the daemon's own configuration has it, but for what is said beside.
    let file = pair.scratch.path().join("status.yaml");
    let named = async |arguments: &[&str]| {
        let output =
            peili(&[&["status", "--json", "--config", file.to_str().unwrap()], arguments].concat()).await;
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output.status.code(), status["node"]["name"].as_str().map(str::to_owned), text(&output.stderr))
    };
    let port = |node: &Node| node.plan.ports.admin;
    std::fs::write(&file, format!("admin: {{listen: [\"0.0.0.0:{}\"], clients: all}}\n", port(&pair.other)))
        .unwrap();
    assert_eq!(named(&[]).await.1.as_deref(), Some("other"));
    let holder = format!("127.0.0.1:{}", port(&pair.holder));
    assert_eq!(named(&["--address", &holder]).await.1.as_deref(), Some("holder"));
    let listen = format!("admin.listen=[\"{holder}\"]");
    assert_eq!(named(&["--set", &listen]).await.1.as_deref(), Some("holder"));
    // The mirror may run on by what its file was.
    std::fs::write(&file, "admin: {lissten: []}\n").unwrap();
    assert_eq!(named(&["--address", &holder]).await.1.as_deref(), Some("holder"), "nothing is read");
    let (code, _, said) = named(&[]).await;
    assert!(code != Some(2) && said.contains("lissten") && said.contains("the default"), "{code:?} {said}");
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(pair.other.admin(path).await.unwrap().status, 200, "{path}");
    }
}

/// Peers and private repositories are taken over from a changed file, without a restart; a wrong file changes nothing.
async fn changes() {
    let image = Image::builder("library/app", "v1").layer(1 << 20).build().unwrap();
    let mut pair = Pair::start(&[&image], &json!({})).await;
    let peers = pair.other.plan.config["network"]["peers"].take();
    // A list that has no other node: without any, the network would be open.
    let own = pair.other.plan.peer_id.clone();
    pair.other.plan.merge(&json!({"network": {"peers": [{"id": own}]}}));
    pair.other.rewrite().unwrap();
    let manifest = format!("/v2/library/app/manifests/{}?ns={REGISTRY}", image.root);
    let answers = async |pair: &Pair, status: u16, what: &str| {
        wait::until(what, CHANGE, async || {
            let answer = pair.other.fetch(&manifest).await.ok()?;
            (answer.status == status).then_some(())
        })
        .await
        .unwrap();
    };
    let process = pair.other.process().unwrap().id();
    answers(&pair, 404, "the peer gone").await;
    pair.other.plan.merge(&json!({"network": {"peers": peers}}));
    pair.other.rewrite().unwrap();
    answers(&pair, 200, "the peer added").await;

    pair.other.plan.merge(&json!({"mirror": {"private": [format!("{REGISTRY}/library/*")]}}));
    pair.other.rewrite().unwrap();
    answers(&pair, 404, "the repository private").await;
    std::fs::write(pair.other.plan.config_path(), "mirror: {privat: []}").unwrap();
    wait::until("the wrong file reported", CHANGE, async || {
        let problems = pair.other.status().await.ok()?["problems"].to_string();
        problems.contains("configuration").then_some(())
    })
    .await
    .unwrap();
    answers(&pair, 404, "the last good one in force").await;
    pair.other.plan.merge(&json!({"mirror": {"private": []}}));
    pair.other.rewrite().unwrap();
    pair.other.process().unwrap().signal(rustix::process::Signal::HUP).unwrap();
    answers(&pair, 200, "public again").await;

    // What the holder gives away changes live too, also for peers that are connected.
    pair.holder.plan.merge(&json!({"trust": {"deny": [format!("{REGISTRY}/library/*")]}}));
    pair.holder.rewrite().unwrap();
    answers(&pair, 404, "denied by the holder").await;
    pair.holder.plan.merge(&json!({"trust": {"deny": []}}));
    pair.holder.rewrite().unwrap();
    answers(&pair, 200, "given again").await;

    let problems = async |pair: &Pair, what: &str, expected: &dyn Fn(&str) -> bool| {
        wait::until(what, CHANGE, async || {
            let problems = pair.other.status().await.ok()?["problems"].to_string();
            expected(&problems).then_some(())
        })
        .await
        .unwrap();
    };
    pair.other.plan.merge(&json!({"registry": {"default-registry": "r.test"}, "log": {"level": "debug"}}));
    pair.other.rewrite().unwrap();
    let needed = |problems: &str| problems.contains("a restart is needed for registry.default-registry\"");
    problems(&pair, "what needs a restart", &needed).await;
    // A node of which nobody wants anything has nothing to say.
    pair.holder.kill();
    wait::until("log.level applied", CHANGE, async || {
        pair.other.log_tail().contains("\"DEBUG\"").then_some(())
    })
    .await
    .unwrap();
    pair.other.plan.merge(&json!({"registry": {"default-registry": "docker.io"}}));
    pair.other.rewrite().unwrap();
    problems(&pair, "as at the start", &|problems: &str| !problems.contains("configuration")).await;
    assert_eq!(pair.other.process().unwrap().id(), process);
}

/// A transfer that runs when SIGTERM comes ends whole, new ones are refused, and the exit code is 0.
async fn drain() {
    use std::io::{Read as _, Write as _};
    let image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
    let mut pair = Pair::start(&[&image], &json!({})).await;
    pair.known().await;
    let mut stream = std::net::TcpStream::connect(pair.other.registry()).unwrap();
    stream.set_read_timeout(Some(CHANGE)).unwrap();
    let layer = image.layers[0];
    write!(stream, "GET /v2/library/app/blobs/{layer}?ns={REGISTRY} HTTP/1.0\r\n\r\n").unwrap();
    let mut first = [0; 1 << 10];
    stream.read_exact(&mut first).unwrap();
    assert!(first.starts_with(b"HTTP/1.0 200") || first.starts_with(b"HTTP/1.1 200"));

    pair.other.process().unwrap().signal(rustix::process::Signal::TERM).unwrap();
    let registry = pair.other.registry();
    wait::until("new connections refused", CHANGE, async || {
        http::request(registry, "GET", "/v2/").is_err().then_some(())
    })
    .await
    .unwrap();
    let ready = pair.other.admin("/readyz").await.unwrap();
    assert_eq!(ready.status, 503, "whoever is asked to serve must listen");
    let mut rest = first.to_vec();
    stream.read_to_end(&mut rest).unwrap();
    let head = rest.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(peili::oci::Digest::sha256(&rest[head..]), layer);
    let status = pair.other.process_mut().unwrap().ended(CHANGE).await.unwrap();
    assert_eq!(status.code(), Some(0));
}
