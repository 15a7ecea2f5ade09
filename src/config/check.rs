//! What types cannot say: ranges, forms, and keys that contradict each other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;

use super::Config;
use super::error::Fault;
use super::tree::Node;
use crate::cluster;
use crate::election::{self, Backend};
use crate::listener::Clients;
use crate::network::admission::certificate::is_cluster;
use crate::network::facts;
use crate::oci::{Patterns, Registry, Repository};
use crate::policy::{DATA_FILES, Failing, Limits, Plugin};
use crate::store::containerd::is_namespace;
use crate::store::layout::Spec;

/// Policies of one world: each is asked at each request.
const POLICY_LIMIT: usize = 16;
/// Peers that one file may name; the network of this version carries ten.
const PEER_LIMIT: usize = 10_000;

const MINUTE: Duration = Duration::from_secs(60);

struct Check<'a> {
    tree: &'a Node,
    faults: Vec<Fault>,
}

/// All faults, in the order of the file.
pub(super) fn check(config: &Config, tree: &Node) -> Vec<Fault> {
    let mut check = Check { tree, faults: Vec::new() };
    check.node(config);
    check.store(config);
    check.serving(config);
    check.fetching(config);
    check.network(config);
    check.upstreams(config);
    check.policies(config);
    check.election(config);
    check.kubernetes(config);
    check.ports(config);
    check.faults.sort_by_key(|fault| fault.origin.line());
    check.faults
}

impl Check<'_> {
    fn fault(&mut self, path: &str, message: impl Into<String>, hint: Option<&str>) {
        let mut fault = Fault::new(message).at(&self.tree.origin_of(path)).within(path);
        fault.hint = hint.map(str::to_owned);
        self.faults.push(fault);
    }

    fn range<T: PartialOrd + Copy>(&mut self, path: &str, value: T, low: T, high: T, words: &str) {
        if value < low || value > high {
            self.fault(path, format!("must be {words}"), None);
        }
    }

    fn globs(&mut self, path: &str, patterns: &[String]) {
        for (index, pattern) in patterns.iter().enumerate() {
            if let Err(error) = Patterns::new(std::slice::from_ref(pattern)) {
                let hint = "patterns match registry/repository: docker.io/library/*, ghcr.io/acme/**";
                self.fault(&format!("{path}[{index}]"), error.to_string(), Some(hint));
            }
        }
    }

    fn node(&mut self, config: &Config) {
        for (path, text) in [("node.name", &config.node.name), ("node.zone", &config.node.zone)] {
            // DNS subdomain names and label values of Kubernetes are no longer.
            if text.len() > 253 || text.chars().any(char::is_control) {
                self.fault(path, "must be at most 253 characters, none of them a control character", None);
            }
        }
        if config.node.data_dir.as_os_str().is_empty() {
            self.fault("node.data-dir", "must not be empty", None);
        }
        self.range("node.drain", config.node.drain, Duration::ZERO, 10 * MINUTE, "at most 10m");
        let level = tracing_subscriber::EnvFilter::builder().parse(&config.log.level);
        if let Err(error) = level {
            let hint =
                Some("a level (error, warn, info, debug), or a list such as info,peili::network=debug");
            self.fault("log.level", format!("`{}` is not a filter: {error}", config.log.level), hint);
        }
    }

    fn store(&mut self, config: &Config) {
        let source = &config.store.source;
        let hint = Some("`containerd`, or layout:PATH, or layout:PATH,name=REGISTRY/REPOSITORY");
        if source != "containerd"
            && let Err(error) = source.parse::<Spec>()
        {
            self.fault("store.source", error.to_string(), hint);
        }
        if source == "containerd" && config.store.namespaces.is_empty() {
            self.fault(
                "store.namespaces",
                "must name at least one namespace",
                Some("Kubernetes uses k8s.io"),
            );
        }
        for (index, namespace) in config.store.namespaces.iter().enumerate() {
            if !is_namespace(namespace) {
                self.fault(
                    &format!("store.namespaces[{index}]"),
                    format!("`{namespace}` is not a namespace"),
                    None,
                );
            }
        }
    }

    fn serving(&mut self, config: &Config) {
        let hint = "whoever reaches the address reads every image of this node and its peers; in a pod with a \
                    network of its own set registry.clients: node; if you want that, set registry.clients: all";
        let is_wide = |clients| clients != Clients::Loopback;
        self.listen(
            "registry.listen",
            &config.registry.listen,
            Some((is_wide(config.registry.clients), hint)),
        );
        let hint = "whoever reaches the address sees peers, addresses and names of images; in a pod with a \
                    network of its own set admin.clients: node; if you want that, set admin.clients: all";
        self.listen("admin.listen", &config.admin.listen, Some((is_wide(config.admin.clients), hint)));
        self.listen("network.listen", &config.network.listen, None);
        self.listen("transfer.listen", &config.transfer.listen, None);
        let registry = &config.registry;
        if let Err(error) = registry.default_registry.parse::<Registry>() {
            self.fault("registry.default-registry", error.to_string(), None);
        }
        let low = Duration::from_millis(10);
        self.range("registry.manifest-deadline", registry.manifest_deadline, low, MINUTE, "10ms to 1m");
        self.range("registry.blob-deadline", registry.blob_deadline, low, MINUTE, "10ms to 1m");
        self.globs("trust.allow", &config.trust.allow);
        self.globs("trust.deny", &config.trust.deny);
        let transfer = &config.transfer;
        self.range("transfer.uploads", transfer.uploads, 1, 4096, "1 to 4096");
        self.range("transfer.uploads-per-peer", transfer.uploads_per_peer, 1, 4096, "1 to 4096");
        self.range("transfer.queue", transfer.queue, 0, 65_536, "at most 65536");
    }

    fn fetching(&mut self, config: &Config) {
        let mirror = &config.mirror;
        self.globs("mirror.private", &mirror.private);
        self.globs("mirror.tags-peers-first", &mirror.tags_peers_first);
        let (low, high) = (ByteSize::kib(64), ByteSize::mib(64));
        self.range("mirror.segment", mirror.segment, low, high, "64KiB to 64MiB");
        let budget = mirror.prefetch_budget;
        self.range("mirror.prefetch-budget", budget, ByteSize::mib(1), ByteSize::gib(16), "1MiB to 16GiB");
        self.range("mirror.stall", mirror.stall, Duration::from_millis(100), MINUTE, "100ms to 1m");
        self.range("mirror.busy-wait", mirror.busy_wait, Duration::ZERO, MINUTE, "at most 1m");
        let upstream = &config.upstream;
        let (low, high) = (Duration::from_millis(100), 60 * MINUTE);
        self.range("upstream.cache", upstream.cache, low, high, "100ms to 1h");
        let low = Duration::from_millis(10);
        self.range("upstream.limit", upstream.limit, low, Duration::from_secs(10), "10ms to 10s");
        if upstream.cache <= upstream.limit {
            let hint = Some("an answer that is older than upstream.cache when it comes is never believed");
            self.fault("upstream.cache", "must be longer than upstream.limit", hint);
        }
    }

    fn network(&mut self, config: &Config) {
        let network = &config.network;
        if network.cluster_key.len() > 2 {
            let hint = Some("the key that signs, and one more while it is replaced");
            self.fault("network.cluster-key", "at most two files", hint);
        }
        for (index, path) in network.cluster_key.iter().enumerate() {
            if path.as_os_str().is_empty() {
                self.fault(&format!("network.cluster-key[{index}]"), "must not be empty", None);
            }
        }
        if !is_cluster(&network.cluster) {
            let text = "must be 1 to 63 letters, digits, `.`, `_` or `-`";
            self.fault("network.cluster", text, None);
        }
        if network.deny.len() > PEER_LIMIT {
            self.fault("network.deny", format!("more than {PEER_LIMIT} peers"), None);
        }
        if network.peers.len() > PEER_LIMIT {
            self.fault("network.peers", format!("more than {PEER_LIMIT} peers"), None);
            return;
        }
        let mut seen = BTreeSet::new();
        for (index, peer) in network.peers.iter().enumerate() {
            let path = format!("network.peers[{index}]");
            if !seen.insert(&peer.id) {
                self.fault(
                    &format!("{path}.id"),
                    "this peer is there twice",
                    Some("put all of its addresses into one entry"),
                );
            }
            for (index, address) in peer.addresses.iter().enumerate() {
                self.host_and_port(&format!("{path}.addresses[{index}]"), address, "10.0.0.7:5001");
            }
        }
        for (index, name) in network.dns.iter().enumerate() {
            self.host_and_port(&format!("network.dns[{index}]"), name, "peili-peers.peili.svc:5001");
        }
    }

    fn upstreams(&mut self, config: &Config) {
        if config.upstreams.len() > POLICY_LIMIT {
            self.fault("upstreams", format!("more than {POLICY_LIMIT} upstreams"), None);
        }
        let mut seen = BTreeSet::new();
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let path = |key: &str| format!("upstreams[{index}].{key}");
            self.name(&path("name"), &upstream.name, "corp", &mut seen);
            // Sources of other kinds, as plans are printed.
            if ["peers", "origin"].contains(&upstream.name.as_str()) {
                self.fault(&path("name"), "this name has a meaning of its own", Some("give it another one"));
            }
            match upstream.is_secure() {
                None => {
                    let hint = Some("https://HOST[:PORT][/PATH], such as https://registry.corp.example");
                    self.fault(&path("address"), format!("`{}` is not an address", upstream.address), hint);
                }
                Some(false) if upstream.credentials.is_some() => {
                    let hint = Some("a password goes over https, or to loopback, and nowhere else");
                    self.fault(&path("credentials"), "the address is plain http", hint);
                }
                Some(_) => {}
            }
            for (key, file) in [("ca", &upstream.ca), ("credentials", &upstream.credentials)] {
                if file.as_ref().is_some_and(|file| !file.is_absolute()) {
                    self.fault(&path(key), "must be an absolute path", None);
                }
            }
            if upstream.repositories.is_empty() {
                let hint = Some("prefixes such as dockerhub/library, or / for all that is there");
                self.fault(&path("repositories"), "must name at least one", hint);
            }
            for (number, prefix) in upstream.repositories.iter().enumerate() {
                let path = format!("upstreams[{index}].repositories[{number}]");
                if prefix != "/" && prefix.trim_end_matches('/').parse::<Repository>().is_err() {
                    let hint = Some("whole parts of a repository's name: dockerhub/library; no globs");
                    self.fault(&path, format!("`{prefix}` is no prefix of repositories"), hint);
                }
            }
        }
    }

    fn name<'c>(&mut self, path: &str, name: &'c String, example: &str, seen: &mut BTreeSet<&'c String>) {
        let is_name = (1..=63).contains(&name.len())
            && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
        if !is_name {
            let hint = format!("1 to 63 lower-case letters, digits and `-`, such as {example}");
            self.fault(path, format!("`{name}` is not a name"), Some(&hint));
        }
        if !seen.insert(name) {
            self.fault(path, "this name is there twice", Some("give each its own"));
        }
    }

    fn policies(&mut self, config: &Config) {
        let policies = &config.policies;
        for (index, root) in policies.roots.iter().enumerate() {
            self.file(&format!("policies.roots[{index}]"), root, "/etc/peili/policies", &[]);
        }
        self.range("policies.max-change", policies.max_change, 0, 100, "0 to 100, of a hundred requests");
        let accept = &policies.accept;
        if !(accept.is_empty() || is_revision(accept)) {
            let hint = Some("as the refusal of a set names it, quoted");
            self.fault("policies.accept", format!("`{accept}` is not a revision"), hint);
        }
        if let Some(decisions) = &policies.decisions {
            self.file("policies.decisions.path", &decisions.path, "/var/lib/peili/decisions.jsonl", &[]);
            let (low, high) = (ByteSize::kib(64), ByteSize::gib(16));
            self.range("policies.decisions.max-size", decisions.max_size, low, high, "64KiB to 16GiB");
        }
        self.policies_of("policies.registry", &policies.registry, &policies.roots);
        for (world, plugins, most) in [
            ("registry", &policies.registry, Limits::TIME_MAX),
            ("trust", &policies.trust, Limits::TIME_MAX),
            ("election", &policies.election, Limits::ELECTION_TIME_MAX),
        ] {
            for (index, policy) in plugins.iter().enumerate() {
                self.limits(&format!("policies.{world}[{index}].limits"), &policy.limits, most);
            }
        }
        let trust = "where it does not answer, a peer keeps what it was granted, and newcomers get nothing";
        let election = "where it does not answer, the built-in ranks";
        for (world, hint, plugins) in
            [("trust", trust, &policies.trust), ("election", election, &policies.election)]
        {
            self.policies_of(&format!("policies.{world}"), plugins, &policies.roots);
            for (index, policy) in plugins.iter().enumerate() {
                if policy.failure != Failing::default() {
                    let path = format!("policies.{world}[{index}].failure");
                    let reason = "only a policy of the registry world has a failure verdict";
                    self.fault(&path, reason, Some(hint));
                }
            }
        }
    }

    /// A file or folder of policies by its whole path, beneath one of `roots` if there are any.
    fn file(&mut self, path: &str, file: &Path, example: &str, roots: &[PathBuf]) {
        if !file.is_absolute() || file.components().any(|part| part == Component::ParentDir) {
            let hint = format!("where it is mounted, such as {example}");
            self.fault(path, "must be an absolute path without `..`", Some(&hint));
        } else if !(roots.is_empty() || roots.iter().any(|root| file.starts_with(root))) {
            let hint = Some("files of policies are read beneath these folders only: add its folder there");
            self.fault(path, "is beneath none of policies.roots", hint);
        }
    }

    /// What a policy may use is within what this host lets any have. `time`: what its chain has.
    fn limits(&mut self, path: &str, limits: &Limits, time: Duration) {
        let Limits { time: own, memory, verdict, log } = limits;
        let is_within = |value: ByteSize, (low, high)| value >= low && value <= high;
        let least = Limits::TIME_MIN;
        if own.is_some_and(|own| own < least || own > time) {
            let hint =
                format!("all policies of this world have {} together", humantime::format_duration(time));
            let message = format!(
                "must be {} to {}",
                humantime::format_duration(least),
                humantime::format_duration(time)
            );
            self.fault(&format!("{path}.time"), message, Some(&hint));
        }
        if !is_within(*memory, Limits::MEMORY) {
            let hint = "each of up to 16 instances may take as much; a policy that needs more is to be given less data";
            self.fault(&format!("{path}.memory"), "must be 1MiB to 64MiB", Some(hint));
        }
        if !is_within(*verdict, Limits::VERDICT) {
            let hint = "64KiB is the most that the contract has for a verdict; leave it out for that";
            self.fault(&format!("{path}.verdict"), "must be 1KiB to 64KiB", Some(hint));
        }
        if *log > Limits::LOG_MAX {
            let hint = "lines a second; 0 lets the policy write none";
            self.fault(&format!("{path}.log"), format!("must be at most {}", Limits::LOG_MAX), Some(hint));
        }
    }

    /// The files that a policy gets.
    fn data(&mut self, path: &str, policy: &Plugin, roots: &[PathBuf]) {
        if policy.data.len() > DATA_FILES {
            let hint = "put what belongs together into one file";
            self.fault(path, format!("more than {DATA_FILES} files"), Some(hint));
        }
        let mut seen = BTreeSet::new();
        for (index, data) in policy.data.iter().enumerate() {
            let path = |key: &str| format!("{path}[{index}].{key}");
            self.name(&path("name"), &data.name, "images", &mut seen);
            self.file(&path("path"), &data.path, "/etc/peili/policies/images.txt", roots);
            self.digest(&path("sha256"), data.sha256.as_ref());
        }
    }

    fn digest(&mut self, path: &str, digest: Option<&String>) {
        let is_digest = |text: &String| text.len() == 64 && text.bytes().all(|c| c.is_ascii_hexdigit());
        if !digest.is_none_or(is_digest) {
            self.fault(path, "must be 64 hexadecimal digits", Some("as sha256sum prints it"));
        }
    }

    fn policies_of(&mut self, world: &str, policies: &[Plugin], roots: &[PathBuf]) {
        if policies.len() > POLICY_LIMIT {
            self.fault(world, format!("more than {POLICY_LIMIT} policies"), None);
        }
        let mut seen = BTreeSet::new();
        for (index, policy) in policies.iter().enumerate() {
            let path = |key: &str| format!("{world}[{index}].{key}");
            self.name(&path("name"), &policy.name, "allow-list", &mut seen);
            self.file(&path("path"), &policy.path, "/etc/peili/policies/allow-list.wasm", roots);
            if let Some(cases) = &policy.cases {
                self.file(&path("cases"), cases, "/etc/peili/policies/allow-list.yaml", roots);
            }
            self.digest(&path("sha256"), policy.sha256.as_ref());
            self.data(&path("data"), policy, roots);
            if !(policy.settings.is_null() || policy.settings.is_object()) {
                self.fault(&path("settings"), "must be keys and values", None);
            }
        }
    }

    fn election(&mut self, config: &Config) {
        let election = &config.election;
        let most = election::INTRODUCERS;
        self.range("election.introducers", election.introducers, 1, most, &format!("1 to {most}"));
        let is_name = |text: &str| {
            !text.is_empty()
                && text.len() <= 253
                && !text.chars().any(|c| c.is_control() || c.is_whitespace())
        };
        for (index, name) in election.nodes.iter().enumerate() {
            let path = format!("election.nodes[{index}]");
            if !is_name(name) {
                self.fault(
                    &path,
                    format!("`{name}` is no name of a node"),
                    Some("as `node.name` of that node"),
                );
            } else if election.nodes[..index].contains(name) {
                self.fault(&path, format!("`{name}` is named twice"), None);
            }
        }
        let named = !election.nodes.is_empty();
        if election.nodes.len() > election::NODES {
            self.fault("election.nodes", format!("more than {} nodes", election::NODES), None);
        } else if election.backend == Backend::Static && !named {
            self.fault(
                "election.nodes",
                "must name a node for `backend: static`",
                Some("as `node.name` of it"),
            );
        } else if election.backend != Backend::Static && named {
            self.fault("election.nodes", "is of use with `backend: static` only", None);
        }
        let text = |text: &str| text.len() <= facts::LABEL_LIMIT && !text.chars().any(char::is_control);
        for (key, value) in &election.labels {
            if key.is_empty() || !text(key) || !text(value) {
                let words = format!("a key and a value have at most {} bytes", facts::LABEL_LIMIT);
                self.fault(&format!("election.labels.{key}"), words, None);
            }
        }
        let bytes: usize = election.labels.iter().map(|(key, value)| key.len() + value.len()).sum();
        let (labels, limit) = (facts::LABELS, election::LABELS_LIMIT);
        if election.labels.len() > labels || bytes > limit {
            let hint = Some("each member tells all others of them: leave out what no policy asks for");
            self.fault("election.labels", format!("more than {labels} labels, or than {limit} bytes"), hint);
        }
    }

    fn kubernetes(&mut self, config: &Config) {
        let kubernetes = &config.kubernetes;
        if kubernetes.endpoints.len() > cluster::ENDPOINTS {
            self.fault("kubernetes.endpoints", format!("more than {}", cluster::ENDPOINTS), None);
        }
        for (index, address) in kubernetes.endpoints.iter().enumerate() {
            if cluster::endpoint(address).is_none() {
                let hint = Some("https://10.0.0.2:6443");
                self.fault(
                    &format!("kubernetes.endpoints[{index}]"),
                    format!("`{address}` is no address of an API server"),
                    hint,
                );
            }
        }
        if !kubernetes.service.is_empty() {
            self.host_and_port("kubernetes.service", &kubernetes.service, "10.96.0.1:443");
        }
        if !kubernetes.namespace.is_empty() && !cluster::is_name(&kubernetes.namespace) {
            self.fault(
                "kubernetes.namespace",
                format!("`{}` is no name of a namespace", kubernetes.namespace),
                None,
            );
        }
        let name = &config.election.lease.name;
        // The coordinator's ConfigMap is called after it.
        if !cluster::is_name(name) || !cluster::is_name(&format!("{name}-fleet")) {
            self.fault(
                "election.lease.name",
                format!("`{name}` is no name of an object"),
                Some("lower-case letters, digits, `-` and `.`"),
            );
        }
        let map = &config.election.configmap;
        if !map.name.is_empty() && !cluster::is_name(&map.name) {
            self.fault(
                "election.configmap.name",
                format!("`{}` is no name of an object", map.name),
                Some("lower-case letters, digits, `-` and `.`"),
            );
        } else if map.name == format!("{name}-fleet") {
            let words = format!("`{}` is the ConfigMap of the coordinator's summary", map.name);
            self.fault(
                "election.configmap.name",
                words,
                Some("name another one, or another `election.lease.name`"),
            );
        }
        let needs = match config.election.backend {
            Backend::Lease => Some("lease"),
            Backend::ConfigMap => Some("configmap"),
            Backend::Auto | Backend::Gossip | Backend::Static | Backend::Off => None,
        };
        if let Some(backend) = needs.filter(|_| !kubernetes.is_in_cluster()) {
            let hint = "in a pod $KUBERNETES_SERVICE_HOST and _PORT say where it is; elsewhere name it under kubernetes.endpoints";
            let words = format!("`{backend}` needs a Kubernetes API, and none is known");
            self.fault("election.backend", words, Some(hint));
        }
    }

    fn host_and_port(&mut self, path: &str, text: &str, example: &str) {
        let parts = text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
        let is_host = |host: &str| {
            let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            match address {
                Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
                None => host.parse::<Registry>().is_ok(),
            }
        };
        let valid = matches!(parts, Some((host, Ok(1..))) if is_host(host));
        if !valid {
            self.fault(path, format!("`{text}` is not host:port"), Some(&format!("for example {example}")));
        }
    }

    fn listen(&mut self, path: &str, addresses: &[SocketAddr], wide: Option<(bool, &str)>) {
        if addresses.is_empty() {
            self.fault(path, "must have at least one address", None);
        }
        for (index, address) in addresses.iter().enumerate() {
            let loopback = address.ip().to_canonical().is_loopback();
            if let Some((false, hint)) = wide
                && !loopback
            {
                self.fault(&format!("{path}[{index}]"), format!("{address} is not loopback"), Some(hint));
            }
        }
    }

    /// Two listeners cannot have one port at the same address, or at an address and at all addresses.
    fn ports(&mut self, config: &Config) {
        let parts = [
            ("registry.listen", &config.registry.listen),
            ("admin.listen", &config.admin.listen),
            ("network.listen", &config.network.listen),
            ("transfer.listen", &config.transfer.listen),
        ];
        let mut taken: BTreeMap<u16, Vec<(String, IpAddr)>> = BTreeMap::new();
        for (path, addresses) in parts {
            for (index, address) in addresses.iter().enumerate().filter(|(_, address)| address.port() != 0) {
                let path = format!("{path}[{index}]");
                let others = taken.entry(address.port()).or_default();
                let clash = others.iter().find(|(_, ip)| overlap(*ip, address.ip())).cloned();
                others.push((path.clone(), address.ip()));
                if let Some((other, _)) = clash {
                    self.fault(
                        &path,
                        format!("{address} is taken by {other}"),
                        Some("give each its own port"),
                    );
                }
            }
        }
    }
}

fn is_revision(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// Listeners of IPv6 are made for IPv6 alone, so the families do not meet.
fn overlap(left: IpAddr, right: IpAddr) -> bool {
    left.is_ipv4() == right.is_ipv4() && (left == right || left.is_unspecified() || right.is_unspecified())
}
