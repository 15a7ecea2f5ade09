//! Who belongs to the cluster, between real programs that find each other by address and know no peer IDs: members by a
//! cluster key, and those who are none. All on loopback, as one prefix.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peili::network::admission::Admission;
use peili::network::identity::Identity;
use peili::oci::{KeyId, Members, PeerId};
use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Node, Requirement, peer, wait};
use serde_json::json;

use crate::Case;
use crate::cli::layout;
use crate::cluster::REGISTRY;

/// Longest wait for a change to be in force: files are looked at each second, names are asked for again soon.
const CHANGE: Duration = Duration::from_secs(20);

const OLD: &[u8] = b"the old key of the cluster, 32 bytes at least";
const NEW: &[u8] = b"the new key of the cluster, 32 bytes at least";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("admission::members_share_and_strangers_get_nothing", &[], strangers),
        Case::new("admission::a_key_is_replaced_under_load", &[], rotation),
        Case::new("admission::a_late_key_and_denied_peers", &[], late_and_denied),
        Case::new("admission::clocks_that_jump", &[Requirement::Faketime], clocks),
        Case::new("admission::an_open_network_warns_and_gives_no_tags", &[], open),
        Case::new("admission::cluster_key_command", &[], command),
    ]
}

/// A mounted Secret: its files are links into a folder that is swapped whole.
struct Secret {
    folder: PathBuf,
    version: u32,
}

/// Nodes; the first one holds the image, the others nothing.
struct Rig {
    nodes: Vec<Node>,
    image: Image,
    // After the nodes that use it.
    scratch: Scratch,
}

impl Secret {
    fn new(scratch: &Scratch, name: &str, files: &[(&str, &[u8])]) -> Self {
        let folder = scratch.path().join(format!("secret-{name}"));
        std::fs::create_dir(&folder).unwrap();
        let mut secret = Self { folder, version: 0 };
        secret.put(files);
        secret
    }

    fn put(&mut self, files: &[(&str, &[u8])]) {
        self.version += 1;
        let version = format!("..{}", self.version);
        std::fs::create_dir(self.folder.join(&version)).unwrap();
        for (name, content) in files {
            std::fs::write(self.folder.join(&version).join(name), content).unwrap();
            // There from the first version on that has the file.
            let _ = symlink(format!("..data/{name}"), self.path(name));
        }
        symlink(&version, self.folder.join("..new")).unwrap();
        std::fs::rename(self.folder.join("..new"), self.folder.join("..data")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Rig {
    /// `count` nodes that look for the first one, which looks for nobody, with what `change` makes of each.
    async fn start(count: usize, mut change: impl FnMut(usize, &mut Plan, &Scratch)) -> Self {
        let scratch = Scratch::new().unwrap();
        let image = Image::builder("library/app", "v1").layer(1 << 20).build().unwrap();
        let mut nodes: Vec<Node> = Vec::new();
        for number in 0..count {
            let folder = scratch.path().join(format!("layout-{number}"));
            let held = if number == 0 { vec![&image] } else { Vec::new() };
            layout(&folder, &held);
            let name = format!("node-{number}");
            let mut plan = Plan::on_loopback(&name, &format!("layout:{}", folder.display())).unwrap();
            let first = nodes.first().map(|node| node.plan.control());
            plan.merge(&json!({
                "network": {"dns": first.into_iter().collect::<Vec<_>>()},
                "upstream": {"hosts-dirs": [scratch.path().join("certs.d")]},
                "log": {"level": "info,peili=debug"},
            }));
            change(number, &mut plan, &scratch);
            nodes.push(plan.start().await.unwrap());
        }
        Self { nodes, image, scratch }
    }

    fn layer(&self) -> String {
        format!("/v2/library/app/blobs/{}?ns={REGISTRY}", self.image.layers[0])
    }

    /// Waits until the node answers for the layer, or its tag, like that.
    async fn answers(&self, node: usize, path: &str, status: u16) {
        wait::until(&format!("node {node} answers {status} for {path}"), CHANGE, async || {
            (self.nodes[node].fetch(path).await.ok()?.status == status).then_some(())
        })
        .await
        .unwrap();
    }

    async fn has_problem(&self, node: usize, text: &str) {
        let mut last = String::new();
        let found = wait::until(text, CHANGE, async || {
            last = self.nodes[node].status().await.ok()?["problems"].to_string();
            last.contains(text).then_some(())
        });
        if found.await.is_err() {
            panic!("no problem with {text:?} in {last}");
        }
    }

    /// How one node sees another.
    async fn peer(&self, node: usize, other: usize) -> Option<serde_json::Value> {
        let status = self.nodes[node].status().await.ok()?;
        let peers = status["network"]["peers"].as_array()?;
        peers.iter().find(|peer| peer["id"] == *self.nodes[other].plan.peer_id).cloned()
    }

    async fn is_proved(&self, node: usize, other: usize, proof: &str) {
        wait::until(&format!("{proof} of {other} at {node}"), CHANGE, async || {
            let peer = self.peer(node, other).await?;
            (peer["proof"].as_str()?.starts_with(proof) && peer["connected"] == true).then_some(())
        })
        .await
        .unwrap();
    }

    /// Writes one node's changed configuration, and lets it count at once.
    fn configure(&mut self, node: usize, network: &serde_json::Value) {
        let node = &mut self.nodes[node];
        node.plan.merge(&json!({"network": network}));
        node.rewrite().unwrap();
        node.process().unwrap().signal(rustix::process::Signal::HUP).unwrap();
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        file(&self.scratch, name, content)
    }
}

fn file(scratch: &Scratch, name: &str, content: &[u8]) -> PathBuf {
    let path = scratch.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn tag() -> String {
    format!("/v2/library/app/manifests/v1?ns={REGISTRY}")
}

struct Nobody;

impl Members for Nobody {
    fn admit(&self, _: &PeerId, _: KeyId, _: Duration) -> bool {
        true
    }

    fn sweep(&self, _: &[KeyId]) -> bool {
        false
    }
}

/// Members by key give each other everything. Who has no key, another key, another cluster's name, or somebody else's
/// certificate joins nothing, advertises nothing and fetches nothing, and is named with the cause.
async fn strangers() {
    let rig = Rig::start(5, |number, plan, scratch| {
        let (key, cluster) = match number {
            2 => (NEW, "default"),
            3 => (OLD, "elsewhere"),
            _ => (OLD, "default"),
        };
        let key = file(scratch, &format!("key-{number}"), key);
        plan.merge(&json!({"network": {"cluster-key": [key], "cluster": cluster}}));
        if number == 4 {
            // A list with nobody on it but itself, and no key.
            let own = plan.peer_id.clone();
            plan.merge(&json!({"network": {"cluster-key": [], "peers": [{"id": own}]}}));
        }
        if number > 1 {
            // What a stranger holds, and claims.
            let image =
                Image::builder("library/theirs", "v1").layer(4096).seed(number as u64).build().unwrap();
            layout(&scratch.path().join(format!("layout-{number}")), &[&image]);
        }
    })
    .await;
    rig.is_proved(0, 1, "key ").await;
    rig.is_proved(1, 0, "key ").await;
    rig.answers(1, &rig.layer(), 200).await;
    rig.answers(1, &tag(), 200).await;

    let id = |node: usize| rig.nodes[node].plan.peer_id.clone();
    for (node, cause) in [(2, "which this node does not have"), (3, "was made for the cluster `elsewhere`")] {
        rig.has_problem(0, &format!("peer {} at 127.0.0.1 was refused: its certificate", id(node))).await;
        rig.has_problem(0, cause).await;
    }
    // The one with the list does not even begin to speak with whom it does not know.
    wait::until("a stranger refused", CHANGE, async || {
        (rig.nodes[4].metric("peili_network_dial_failures_total", "").await.ok()? > 0.0).then_some(())
    })
    .await
    .unwrap();
    for stranger in 2..5 {
        assert_eq!(rig.nodes[stranger].fetch(&rig.layer()).await.unwrap().status, 404);
        assert!(rig.peer(0, stranger).await.is_none() && rig.peer(stranger, 0).await.is_none());
        let theirs =
            Image::builder("library/theirs", "v1").layer(4096).seed(stranger as u64).build().unwrap();
        let path = format!("/v2/library/theirs/blobs/{}?ns={REGISTRY}", theirs.layers[0]);
        assert_eq!(rig.nodes[stranger].fetch(&path).await.unwrap().status, 200, "it holds it itself");
        assert_eq!(rig.nodes[0].fetch(&path).await.unwrap().status, 404);
    }

    // Straight at the peer port: without a certificate, with one of another key, and with a member's own one.
    let holder = peer::of(&rig.nodes[0].plan).unwrap();
    let digest = rig.image.layers[0];
    let certified = |peer: &PeerId, key: &[u8]| {
        let path = rig.file("shown", key);
        let config = peili::network::Config { cluster_key: vec![path], ..Default::default() };
        Admission::new(peer.clone(), &config, Arc::new(Nobody), Default::default())
    };
    let (newcomer, member) = (Identity::generate(), id(1).parse::<PeerId>().unwrap());
    for (what, admission, served) in [
        ("nothing", Admission::off(), false),
        ("another key", certified(newcomer.peer_id(), NEW), false),
        ("a member's certificate", certified(&member, OLD), false),
        ("its own certificate", certified(newcomer.peer_id(), OLD), true),
    ] {
        let asked = peer::run_showing(None, &admission, &newcomer, |asker| asker.ask(&holder, &digest, 1000));
        assert_eq!(asked.unwrap().is_ok(), served, "who shows {what}");
    }
    for outcome in ["UnknownKey", "OtherPeer", "Cluster", "Missing", "Admitted"] {
        let label = format!("outcome=\"{outcome}\"");
        let count = rig.nodes[0].metric("peili_network_admissions_total", &label).await.unwrap();
        assert!(count > 0.5, "{outcome}: {count}");
    }
}

/// The Secret of each node is replaced at another time, in three steps: the new key is added, made the first, and the old
/// one goes. Meanwhile two nodes ask for a layer without a pause; none of these requests fails, and all come from a peer.
async fn rotation() {
    let mut secrets = Vec::new();
    let rig = Rig::start(3, |number, plan, scratch| {
        let secret = Secret::new(scratch, &number.to_string(), &[("current", OLD), ("next", OLD)]);
        plan.merge(&json!({"network": {"cluster-key": [secret.path("current"), secret.path("next")]}}));
        secrets.push(secret);
    })
    .await;
    for node in 1..3 {
        rig.is_proved(0, node, "key ").await;
        rig.answers(node, &rig.layer(), 200).await;
    }
    let (rig, done) = (&rig, &std::cell::Cell::new(false));
    let load = async |node: usize| {
        let mut pulls = 0;
        while !done.get() {
            let answer = rig.nodes[node].fetch(&rig.layer()).await.unwrap();
            assert_eq!((answer.status, answer.body.len()), (200, 1 << 20), "pull {pulls} of node {node}");
            pulls += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        pulls
    };
    let keys =
        async |node: usize| rig.nodes[node].status().await.unwrap()["network"]["admission"]["keys"].clone();
    let rotate = async {
        let mut seen = vec![keys(0).await];
        for step in [
            [("current", OLD), ("next", NEW)],
            [("current", NEW), ("next", OLD)],
            [("current", NEW), ("next", NEW)],
        ] {
            for (node, secret) in secrets.iter_mut().enumerate() {
                secret.put(&step);
                // Not all at once.
                if node == 0 {
                    tokio::time::sleep(Duration::from_millis(700)).await;
                }
            }
            for node in 0..3 {
                wait::until("the step is in force", CHANGE, async || {
                    let now = keys(node).await;
                    (if node == 0 { now != seen[seen.len() - 1] } else { now == keys(0).await }).then_some(())
                })
                .await
                .unwrap();
            }
            seen.push(keys(0).await);
        }
        done.set(true);
        seen
    };
    let (seen, one, two) = tokio::join!(rotate, load(1), load(2));
    println!("{} pulls while the key was replaced", one + two);
    let lengths: Vec<_> = seen.iter().map(|keys| keys.as_array().unwrap().len()).collect();
    assert_eq!(lengths, [1, 2, 2, 1], "{seen:?}");
    assert!(one + two > 50 && seen[0][0] != seen[3][0], "{one} {two} {seen:?}");
    let new = seen[3][0].as_str().unwrap();
    for (node, other) in [(0, 1), (1, 0), (0, 2), (2, 0)] {
        rig.is_proved(node, other, &format!("key {new}")).await;
    }
    for node in &rig.nodes {
        assert_eq!(node.log().matches("closing the connection").count(), 0, "{}", node.plan.name);
    }
}

/// A key that is not there at the start, that is too short at first, and that then comes; and the deny list in both modes.
async fn late_and_denied() {
    let mut secrets = Vec::new();
    let mut rig = Rig::start(2, |number, plan, scratch| {
        let files: &[(&str, &[u8])] = if number == 0 { &[("key", OLD)] } else { &[] };
        let secret = Secret::new(scratch, &number.to_string(), files);
        plan.merge(&json!({"network": {"cluster-key": [secret.path("key")]}}));
        secrets.push(secret);
    })
    .await;
    rig.has_problem(1, "key: it cannot be read: No such file or directory").await;
    rig.has_problem(0, "showed no membership certificate").await;
    assert!(rig.nodes[1].metric("peili_network_cluster_key_errors", "").await.unwrap() > 0.5);
    assert!(rig.nodes[1].log().contains("the admission of members is degraded"));
    assert_eq!(rig.nodes[1].fetch(&rig.layer()).await.unwrap().status, 404);
    secrets[1].put(&[("key", b"short")]);
    rig.has_problem(1, "it has 5 bytes, a cluster key has at least 32").await;
    secrets[1].put(&[("key", OLD)]);
    rig.answers(1, &rig.layer(), 200).await;
    assert_eq!(rig.nodes[1].status().await.unwrap()["problems"], json!([]));

    let id = |rig: &Rig, node: usize| rig.nodes[node].plan.peer_id.clone();
    let denied = id(&rig, 1);
    let begin = Instant::now();
    rig.configure(0, &json!({"deny": [denied]}));
    rig.answers(1, &rig.layer(), 404).await;
    println!("denied after {:?}", begin.elapsed());
    rig.has_problem(0, "denied by this node's `network.deny`").await;
    rig.configure(0, &json!({"deny": []}));
    rig.answers(1, &rig.layer(), 200).await;

    // With a list instead of a key.
    for node in [0, 1] {
        let other = id(&rig, 1 - node);
        rig.configure(node, &json!({"cluster-key": [], "peers": [{"id": other}]}));
    }
    rig.is_proved(0, 1, "listed").await;
    rig.answers(1, &rig.layer(), 200).await;
    rig.configure(0, &json!({"deny": [denied]}));
    rig.answers(1, &rig.layer(), 404).await;
}

/// The clocks of all nodes jump: who is a member stays one. One clock is wrong: a node that starts
/// so is refused, both sides say why, and it comes back when its clock is right.
async fn clocks() {
    let mut rig = Rig::start(2, |number, plan, scratch| {
        plan.let_clock_jump().unwrap();
        let key = file(scratch, &format!("key-{number}"), OLD);
        plan.merge(&json!({"network": {"cluster-key": [key]}}));
    })
    .await;
    rig.answers(1, &rig.layer(), 200).await;
    for offset in ["+2d", "-2d"] {
        for node in &rig.nodes {
            node.set_clock(offset).unwrap();
        }
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            assert_eq!(rig.nodes[1].fetch(&rig.layer()).await.unwrap().status, 200, "{offset}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(rig.nodes[0].log().matches("disconnected").count(), 0);
    // Neither remembers the other.
    rig.nodes[1].kill();
    rig.nodes[0].set_clock("+0").unwrap();
    rig.nodes[0].restart().await.unwrap();
    rig.nodes[1].restart().await.unwrap();
    for node in [0, 1] {
        rig.has_problem(node, "is this node's clock or that one's wrong?").await;
    }
    assert_eq!(rig.nodes[1].fetch(&rig.layer()).await.unwrap().status, 404);
    rig.nodes[1].set_clock("+0").unwrap();
    rig.answers(1, &rig.layer(), 200).await;
}

/// With neither a key nor a list, blobs come from whoever is there, tags from nobody, and every surface says so.
async fn open() {
    const WARNING: &str = "the network is open: neither `network.cluster-key` nor `network.peers` is set";
    let mut rig = Rig::start(2, |_, _, _| {}).await;
    rig.answers(1, &rig.layer(), 200).await;
    rig.answers(1, &format!("/v2/library/app/manifests/{}?ns={REGISTRY}", rig.image.root), 200).await;
    assert_eq!(rig.nodes[1].fetch(&tag()).await.unwrap().status, 404);
    let peer = rig.peer(1, 0).await.unwrap();
    assert_eq!((&peer["level"], &peer["proof"]), (&json!("blobs"), &json!("open")));

    rig.has_problem(1, WARNING).await;
    assert_eq!(rig.nodes[1].status().await.unwrap()["network"]["admission"]["mode"], "open");
    assert!(rig.nodes[1].metric("peili_network_open", "").await.unwrap() > 0.5);
    assert!(rig.nodes[1].log().contains(WARNING));
    let config = rig.nodes[1].plan.config_path();
    let checked = peili(&["config", "check", "--config", config.to_str().unwrap()]).await;
    let text = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && text.starts_with(&format!("warning: {WARNING}")), "{text}");
    let address = format!("127.0.0.1:{}", rig.nodes[1].plan.ports.admin);
    let status = peili(&["status", "--address", &address]).await;
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(text.contains("the network is open") && text.contains("blobs"), "{text}");

    // A list closes it, while it runs.
    let own = rig.nodes[1].plan.peer_id.clone();
    rig.configure(1, &json!({"peers": [{"id": own}]}));
    rig.answers(1, &rig.layer(), 404).await;
    assert!(rig.nodes[1].metric("peili_network_open", "").await.unwrap() < 0.5);
}

async fn peili(arguments: &[&str]) -> std::process::Output {
    let mut command = std::process::Command::new(binary().unwrap());
    command.args(arguments).env_remove("PEILI_CONFIG");
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

async fn command() {
    let scratch = Scratch::new().unwrap();
    let path = scratch.path().join("cluster.key");
    let made = peili(&["cluster-key", "generate", path.to_str().unwrap()]).await;
    let text = String::from_utf8_lossy(&made.stdout).into_owned();
    assert!(made.status.success() && text.starts_with("key "), "{made:?}");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let content = std::fs::read_to_string(&path).unwrap();
    assert!(content.len() == 45 && !text.contains(content.trim()), "{content}");
    let id = peili(&["cluster-key", "id", path.to_str().unwrap()]).await;
    let id = String::from_utf8_lossy(&id.stdout).trim().to_owned();
    assert!(id.len() == 16 && text.contains(&id), "{id} {text}");
    let again = peili(&["cluster-key", "generate", path.to_str().unwrap()]).await;
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), content, "never overwritten");
    let printed = peili(&["cluster-key", "generate"]).await;
    assert!(printed.status.success() && printed.stdout.len() == 45);
    let short = file(&scratch, "short", b"0123456789");
    let refused = peili(&["cluster-key", "id", short.to_str().unwrap()]).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("it has 10 bytes"), "{text}");
}
