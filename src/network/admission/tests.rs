//! Keys in files, certificates of two nodes, and a time of day that the test decides on.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::registry::Registry;

use super::*;
use crate::network::identity::Identity;
use crate::network::metrics::register;

const NOW: u64 = 1_800_000_000;
const HOUR: u64 = 3600;

/// Remembers who was admitted.
#[derive(Default)]
struct Table(Mutex<HashMap<PeerId, KeyId>>);

impl Members for Table {
    fn admit(&self, peer: &PeerId, key: KeyId, _: Duration) -> bool {
        self.0.lock().unwrap().insert(peer.clone(), key);
        true
    }

    fn sweep(&self, keys: &[KeyId]) -> bool {
        let mut members = self.0.lock().unwrap();
        let before = members.len();
        members.retain(|_, key| keys.contains(key));
        members.len() < before
    }
}

struct Node {
    id: PeerId,
    admission: Admission,
    members: Arc<Table>,
    time: Arc<AtomicU64>,
    registry: Registry,
}

impl Node {
    fn start(config: &Config) -> Self {
        let (members, time) = (Arc::new(Table::default()), Arc::new(AtomicU64::new(NOW)));
        let (id, clock) = (Identity::generate().peer_id().clone(), Arc::clone(&time));
        let clock: Clock = Box::new(move || clock.load(Ordering::Relaxed));
        let mut registry = Registry::default();
        let metrics = register(&mut registry);
        let node = Some((id.clone(), Arc::clone(&members) as Arc<dyn Members>));
        let admission = Admission::with(node, config, metrics, clock);
        Self { id, admission, members, time, registry }
    }

    fn admits(&self, other: &Self) -> Result<(), Refused> {
        self.admission.admit(&other.id, &other.admission.own().unwrap_or_default())
    }

    fn has(&self, other: &Self) -> bool {
        self.members.0.lock().unwrap().contains_key(&other.id)
    }

    fn set_time(&self, time: u64) {
        self.time.store(time, Ordering::Relaxed);
    }

    /// Looks until a change has stood.
    fn looks(&self) -> bool {
        (0..2).fold(false, |changed, _| self.admission.look() | changed)
    }

    fn until(&self) -> u64 {
        self.admission.status().certificate_until.unwrap()
    }

    fn metric(&self, line: &str) -> bool {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines().any(|it| it == line)
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn key(&self, name: &str, byte: u8) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, [byte; 40]).unwrap();
        path
    }
}

fn config(keys: &[&Path]) -> Config {
    Config { cluster_key: keys.iter().map(|path| path.to_path_buf()).collect(), ..Config::default() }
}

#[test]
fn nodes_with_the_same_key_admit_each_other_and_nobody_else() {
    let folder = Folder::new();
    let (key, other) = (folder.key("key", 1), folder.key("other", 2));
    let (one, two) = (Node::start(&config(&[&key])), Node::start(&config(&[&key])));
    assert_eq!((one.admits(&two), two.admits(&one)), (Ok(()), Ok(())));
    assert!(one.has(&two) && one.admission.by_key());
    assert!(one.metric("admissions_total{outcome=\"Admitted\"} 1"));

    let stranger = Node::start(&config(&[&other]));
    let theirs = Key::read(&other).unwrap().id();
    assert_eq!(one.admits(&stranger), Err(Refused::Key(theirs)));
    assert!(!one.has(&stranger) && one.metric("admissions_total{outcome=\"UnknownKey\"} 1"));
    // What was made for another one, shown by who is proved to be himself.
    let replayed = one.admission.admit(&stranger.id, &two.admission.own().unwrap());
    assert_eq!(replayed, Err(Refused::OtherPeer(two.id.clone())));
    assert!(!one.has(&stranger));

    let keyless = Node::start(&Config::default());
    assert_eq!((keyless.admission.own(), keyless.admission.by_key()), (None, false));
    assert_eq!((one.admits(&keyless), keyless.admits(&one)), (Err(Refused::Missing), Err(Refused::NoKey)));
    assert!(matches!(one.admission.admit(&two.id, b"garbage"), Err(Refused::Malformed(_))));
    let elsewhere = Node::start(&Config { cluster: "b".into(), ..config(&[&key]) });
    assert_eq!(one.admits(&elsewhere), Err(Refused::Cluster { theirs: "b".into(), ours: "default".into() }));
    assert_eq!(Admission::off().admit(&two.id, b"x"), Err(Refused::NoKey));
}

#[test]
fn clocks_that_are_wrong_are_named() {
    let folder = Folder::new();
    let key = folder.key("key", 1);
    let (one, two) = (Node::start(&config(&[&key])), Node::start(&config(&[&key])));
    one.set_time(NOW + 24 * HOUR + HOUR - 1);
    assert_eq!(one.admits(&two), Ok(()), "an hour apart is right");
    one.set_time(NOW + 26 * HOUR);
    let text = one.admits(&two).unwrap_err().to_string();
    assert_eq!(text, "its certificate expired 2h ago: is this node's clock or that one's wrong?");
    one.set_time(NOW - 2 * HOUR);
    let text = one.admits(&two).unwrap_err().to_string();
    assert!(text.contains("ends in 1day 2h") && text.ends_with("clock or that one's wrong?"), "{text}");
    assert!(one.has(&two), "who was admitted stays so until its end, whatever the time of day does");
    // Both clocks jump: each makes a certificate of the new day.
    for node in [&one, &two] {
        node.set_time(NOW + 240 * HOUR);
        assert!(node.admission.look() && !node.admission.look());
    }
    assert_eq!(one.admits(&two), Ok(()));
    for node in [&one, &two] {
        node.set_time(NOW);
        assert!(node.admission.look() && !node.admission.look());
    }
    assert_eq!(one.admits(&two), Ok(()));
}

#[test]
fn a_certificate_is_renewed_at_half_its_life() {
    let folder = Folder::new();
    let node = Node::start(&config(&[&folder.key("key", 1)]));
    assert_eq!(node.until(), NOW + 24 * HOUR);
    node.set_time(NOW + 12 * HOUR - 1);
    assert!(!node.admission.look());
    node.set_time(NOW + 12 * HOUR);
    assert!(node.admission.look() && !node.admission.look());
    assert_eq!(node.until(), NOW + 36 * HOUR);
    node.set_time(NOW + 12 * HOUR - 30);
    assert!(!node.admission.look(), "a clock that is set right needs no new one");
}

/// The whole replacement of a key: added, made the first, the old one removed. In each step each node admits each.
#[test]
fn a_key_is_replaced_in_three_steps_without_refusing_anybody() {
    let folder = Folder::new();
    let (old, new) = (folder.key("old", 1), folder.key("new", 2));
    let steps = [config(&[&old]), config(&[&old, &new]), config(&[&new, &old]), config(&[&new])];
    let nodes = [Node::start(&steps[0]), Node::start(&steps[0]), Node::start(&steps[0])];
    let all_admit_all = || {
        for (one, other) in nodes.iter().flat_map(|one| nodes.iter().map(move |other| (one, other))) {
            assert_eq!(one.admits(other), Ok(()));
        }
    };
    all_admit_all();
    for step in &steps[1..] {
        for node in &nodes {
            node.admission.reconfigure(step);
            all_admit_all();
        }
    }
    let id = Key::read(&new).unwrap().id();
    assert_eq!(nodes[0].admission.status().keys, [id.to_string()]);
    assert!(nodes.iter().all(|node| node.members.0.lock().unwrap().values().all(|key| *key == id)));
    // Who missed it is dropped.
    let late = Node::start(&steps[2]);
    assert_eq!(nodes[0].admits(&late), Ok(()));
    let latest = Node::start(&steps[0]);
    assert!(matches!(nodes[0].admits(&latest), Err(Refused::Key(_))));
}

/// Guards that members go with their key.
#[test]
fn a_key_that_is_gone_takes_its_members_along() {
    let folder = Folder::new();
    let (old, new) = (folder.key("old", 1), folder.key("new", 2));
    let (one, two) = (Node::start(&config(&[&new, &old])), Node::start(&config(&[&old])));
    assert_eq!(one.admits(&two), Ok(()));
    assert!(one.admission.reconfigure(&config(&[&new])) && !one.has(&two));
    assert!(!one.admission.reconfigure(&config(&[&new])));
    let other = Config { cluster: "other".into(), ..config(&[&new]) };
    let three = Node::start(&config(&[&new]));
    assert_eq!(one.admits(&three), Ok(()));
    assert!(one.admission.reconfigure(&other) && !one.has(&three), "and with the cluster's name");
}

#[test]
fn a_key_file_may_come_later_and_be_swapped() {
    let folder = Folder::new();
    let path = folder.path("key");
    let (node, other) = (Node::start(&config(&[&path])), Node::start(&config(&[&folder.key("other", 2)])));
    let problems = || node.admission.problems().join("\n");
    assert!(node.admission.by_key() && node.admission.own().is_none());
    assert_eq!(node.admits(&other), Err(Refused::NoKey));
    let text = format!("cluster key {}: it cannot be read: No such file", path.display());
    assert!(
        problems().starts_with(&text) && problems().ends_with("nobody is admitted by it"),
        "{}",
        problems()
    );
    assert!(node.metric("cluster_keys 0") && node.metric("cluster_key_errors 1"));

    // As a Secret is mounted: the file is a link to one in a folder that is a link itself.
    let put = |name: &str, content: &[u8]| {
        fs::create_dir(folder.path(name)).unwrap();
        fs::write(folder.path(name).join("key"), content).unwrap();
        symlink(name, folder.path("link")).unwrap();
        fs::rename(folder.path("link"), folder.path("..data")).unwrap();
    };
    symlink("..data/key", &path).unwrap();
    put("one", b"short");
    assert!(!node.looks());
    assert!(problems().contains("it has 5 bytes, a cluster key has at least 32"), "{}", problems());
    put("two", &[1; 40]);
    assert!(node.looks() && !node.looks());
    assert_eq!(problems(), "");
    assert!(node.metric("cluster_keys 1") && node.metric("cluster_key_errors 0"));
    assert!(matches!(node.admits(&other), Err(Refused::Key(_))));
    put("three", &[2; 40]);
    assert!(!node.admission.look(), "a change must stand");
    assert!(node.admission.look());
    assert_eq!((node.admits(&other), other.admits(&node)), (Ok(()), Ok(())));

    // What goes away again takes nothing with it but the next start.
    fs::remove_file(folder.path("..data")).unwrap();
    assert!(!node.looks());
    assert!(problems().ends_with("the key that it gave before stays in force"), "{}", problems());
    assert_eq!(node.admits(&other), Ok(()));
}

#[test]
fn a_file_that_cannot_be_read_is_read_as_soon_as_it_can() {
    let folder = Folder::new();
    let (first, second) = (folder.key("first", 1), folder.path("second"));
    fs::create_dir(&second).unwrap();
    let node = Node::start(&config(&[&second, &first]));
    assert!(node.admission.problems()[0].contains("it is not a regular file"));
    assert_eq!(node.admission.status().keys.len(), 1, "the other one counts");
    fs::remove_dir(&second).unwrap();
    fs::write(&second, [2; 40]).unwrap();
    assert!(node.looks());
    let keys: Vec<_> = [&second, &first].map(|path| Key::read(path).unwrap().id().to_string()).into();
    assert_eq!(node.admission.status().keys, keys);
}

#[test]
fn an_open_network_says_so() {
    let folder = Folder::new();
    let open = Node::start(&Config::default());
    assert_eq!(
        (open.admission.status().mode, open.admission.problems()),
        (Mode::Open, vec![OPEN.to_owned()])
    );
    assert!(open.metric("open 1"));
    let peer = crate::network::PeerConfig { id: open.id.clone(), addresses: Vec::new() };
    let listed = Config { peers: vec![peer], ..Config::default() };
    open.admission.reconfigure(&listed);
    assert_eq!((open.admission.status().mode, open.admission.problems()), (Mode::List, vec![]));
    assert!(open.metric("open 0"));
    open.admission.reconfigure(&Config { cluster_key: vec![folder.key("key", 1)], ..listed });
    assert_eq!((open.admission.status().mode, open.admission.problems()), (Mode::Key, vec![]));
}

#[tokio::test]
async fn changes_are_followed() {
    let folder = Folder::new();
    let path = folder.path("key");
    let node = Node::start(&config(&[&path]));
    let (sender, mut changes) = tokio::sync::mpsc::unbounded_channel();
    let following = node.admission.clone().follow(move || sender.send(()).unwrap());
    let following = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(following));
    folder.key("key", 1);
    tokio::time::timeout(Duration::from_secs(10), changes.recv()).await.unwrap().unwrap();
    assert!(node.admission.own().is_some());
    drop(following);
}
