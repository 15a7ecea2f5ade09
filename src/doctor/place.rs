//! Where this runs: in a pod or on a node, in whose network, with which network plugin and distribution. By files alone; what is not
//! certain is `unknown`, since a manifest for the wrong place does harm.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use serde::Serialize;

use crate::configure::{Distribution, Report};

/// Bytes of a table of the kernel, or of a file with labels.
const LIMIT: u64 = 4 << 20;
/// Devices that network plugins make on a node, and never in a pod.
const OF_NODES: [&str; 9] =
    ["cilium_", "lxc", "cni", "cali", "flannel", "veth", "kube-ipvs", "weave", "antrea-gw"];

/// Where this runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Place {
    /// A pod or a node.
    pub inside: Inside,
    /// Whose network it is.
    pub network: Network,
    /// The network plugin.
    pub cni: Cni,
    /// As people write it: `Talos`, `k3s`, `RKE2`, `kubeadm`, `unknown`.
    pub distribution: String,
    /// The label that tells Peili's pods from others: key and value.
    #[serde(skip)]
    pub label: (String, String),
}

/// What this process is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inside {
    /// A pod of a kubelet.
    Pod,
    /// No pod.
    #[default]
    Node,
}

/// Whose network it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// The node's: NetworkPolicies do not count there.
    Host,
    /// A pod's own.
    Pod,
    /// Not known.
    #[default]
    Unknown,
}

/// The network plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cni {
    /// Cilium, by its devices or its configuration.
    Cilium,
    /// Routes are as Cilium makes them, and others could.
    PerhapsCilium,
    /// Not known.
    #[default]
    Unknown,
}

impl Place {
    /// Looks around. `root`: where the host's files are. `labels`: the pod's, where they are mounted. Blocks on files.
    pub fn look(root: &Path, labels: &Path, report: Option<&Report>) -> Self {
        let table = |name: &str| read(Path::new(name));
        let inside = if in_pod() { Inside::Pod } else { Inside::Node };
        let devices = devices(&table("/proc/self/net/dev"));
        let [pod, host] = told();
        let told = by_addresses(pod, host);
        let network = match (inside, told) {
            (Inside::Pod, Some(told)) => told,
            _ => network(inside, &devices, is_paired(Path::new("/sys/class/net/eth0"))),
        };
        let configured = fs::read_dir(root.join("etc/cni/net.d")).into_iter().flatten().flatten();
        let mut names = configured.filter_map(|entry| entry.file_name().into_string().ok());
        let is_cilium = devices.iter().any(|name| name.starts_with("cilium_"))
            || names.any(|name| name.contains("cilium"));
        let cni = match is_cilium {
            true => Cni::Cilium,
            false if network == Network::Pod && has_host_gateway(&table("/proc/self/net/route")) => {
                Cni::PerhapsCilium
            }
            false => Cni::Unknown,
        };
        let distribution = report.and_then(|report| report.node.as_ref()).map(|node| node.distribution);
        Self {
            inside,
            network,
            cni,
            distribution: named(root, distribution).to_owned(),
            label: label(&read(labels)),
        }
    }
}

fn read(path: &Path) -> String {
    use std::io::Read as _;
    let mut text = String::new();
    // What is not there, or no text, says nothing.
    let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    if let Some(file) = is_file.then(|| fs::File::open(path).ok()).flatten() {
        let _ = file.take(LIMIT).read_to_string(&mut text);
    }
    text
}

/// Whether this is a pod of a kubelet.
pub(super) fn in_pod() -> bool {
    inside(&read(Path::new("/proc/self/mountinfo"))) == Inside::Pod
}

/// `status.podIP` and `status.hostIP`, as the chart has them from the downward API.
fn told() -> [Option<String>; 2] {
    ["POD_IP", "HOST_IP"].map(|name| std::env::var(name).ok())
}

/// The node's address, where this is a pod with a network of its own and its pod says so.
pub(super) fn host_of_pod() -> Option<IpAddr> {
    let [pod, host] = told();
    let address = host.as_ref()?.parse().ok();
    (by_addresses(pod, host)? == Network::Pod).then_some(address).flatten()
}

/// With host networking both are the same.
fn by_addresses(pod: Option<String>, host: Option<String>) -> Option<Network> {
    let (pod, host) = (pod?.parse::<IpAddr>().ok()?, host?.parse::<IpAddr>().ok()?);
    Some(if pod == host { Network::Host } else { Network::Pod })
}

/// kubelet mounts `/etc/hosts` of a pod from its own folder.
fn inside(mounts: &str) -> Inside {
    let is_kubelets = |line: &str| line.contains("/pods/") && line.contains("/etc-hosts /etc/hosts ");
    if mounts.lines().any(is_kubelets) { Inside::Pod } else { Inside::Node }
}

fn devices(table: &str) -> Vec<String> {
    let names = table.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

/// Whether a device is one end of a pair, whose other end is elsewhere: so pods are joined to their node. A node's own device is none.
fn is_paired(device: &Path) -> bool {
    let number = |name: &str| read(&device.join(name)).trim().parse::<u32>().ok();
    match (number("ifindex"), number("iflink")) {
        (Some(own), Some(other)) => own != other && !device.join("device").exists(),
        _ => false,
    }
}

fn network(inside: Inside, devices: &[String], is_paired: bool) -> Network {
    let of_node = devices.iter().any(|name| OF_NODES.iter().any(|prefix| name.starts_with(prefix)));
    match inside {
        Inside::Node => Network::Host,
        Inside::Pod if of_node => Network::Host,
        // A node that has no pods yet has these two as well, and they are not paired.
        Inside::Pod if is_paired && devices.iter().all(|name| matches!(name.as_str(), "lo" | "eth0")) => {
            Network::Pod
        }
        Inside::Pod => Network::Unknown,
    }
}

/// Whether the way out leads by one address that has a route to itself, as Cilium makes it. 169.254.0.0/16 is Calico's and others'.
fn has_host_gateway(table: &str) -> bool {
    let routes: Vec<[&str; 4]> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            Some([*columns.first()?, *columns.get(1)?, *columns.get(2)?, *columns.get(7)?])
        })
        .collect();
    let gateway = routes.iter().find(|[_, to, by, mask]| *to == "00000000" && *mask == *to && *by != *to);
    let Some([device, _, gateway, _]) = gateway else { return false };
    // As the kernel prints it: the bytes of the address as a number of this machine.
    let address = u32::from_str_radix(gateway, 16).map(|bits| Ipv4Addr::from(bits.to_ne_bytes()));
    let is_local = address.is_ok_and(|address| address.is_link_local());
    !is_local
        && routes.iter().any(|[other, to, by, mask]| {
            other == device && to == gateway && *by == "00000000" && *mask == "FFFFFFFF"
        })
}

fn named(root: &Path, found: Option<Distribution>) -> &'static str {
    match found {
        Some(Distribution::Plain) | None if root.join("etc/kubernetes/kubelet.conf").is_file() => "kubeadm",
        Some(Distribution::Plain) | None => "unknown",
        Some(distribution) => distribution.name(),
    }
}

/// By the file of the downward API, `KEY="VALUE"` a line; the value is empty without it: a policy by a guess may select nobody.
fn label(labels: &str) -> (String, String) {
    const KEY: &str = "app.kubernetes.io/name";
    let value =
        labels.lines().find_map(|line| line.strip_prefix(KEY)?.strip_prefix("=\"")?.strip_suffix('"'));
    (KEY.to_owned(), value.unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_downward_api_tell_whose_network_it_is() {
        let check = |pod: &str, host: &str, expected| {
            assert_eq!(by_addresses(Some(pod.into()), Some(host.into())), expected, "{pod} {host}");
        };
        check("10.0.0.1", "10.0.0.1", Some(Network::Host));
        check("10.244.0.7", "10.0.0.1", Some(Network::Pod));
        check("", "10.0.0.1", None);
        assert_eq!(by_addresses(None, Some("10.0.0.1".into())), None);
    }

    #[test]
    fn a_pod_is_told_from_a_node_and_its_network_from_the_nodes() {
        let pod = "1 2 254:1 /var/lib/kubelet/pods/0a-1b/etc-hosts /etc/hosts rw - ext4 /dev/vda rw\n";
        assert_eq!(inside(pod), Inside::Pod);
        assert_eq!(inside("1 2 254:1 / / rw - ext4 /dev/vda rw\n"), Inside::Node);
        let check = |inside, devices: &[&str], expected| {
            let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
            assert_eq!(network(inside, &devices, true), expected, "{devices:?}");
            let unpaired = if expected == Network::Pod { Network::Unknown } else { expected };
            assert_eq!(network(inside, &devices, false), unpaired, "{devices:?}");
        };
        check(Inside::Pod, &["lo", "eth0"], Network::Pod);
        check(Inside::Pod, &["lo", "eth0", "cilium_host", "lxc12"], Network::Host);
        check(Inside::Pod, &["lo", "ens3"], Network::Unknown);
        check(Inside::Node, &["lo", "eth0"], Network::Host);
        let table = "Inter-|   Receive\n face |bytes\n    lo: 1 2\n  eth0: 3 4\n";
        assert_eq!(devices(table), ["lo", "eth0"]);
    }

    #[test]
    fn cilium_is_guessed_by_its_gateway_and_calico_is_not_taken_for_it() {
        let head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n";
        let check =
            |routes: &str, expected| assert_eq!(has_host_gateway(&format!("{head}{routes}")), expected);
        let hex = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let lines = |gateway: [u8; 4]| {
            let gateway = hex(gateway);
            format!(
                "eth0 00000000 {gateway} 0003 0 0 0 00000000 0 0 0\neth0 {gateway} 00000000 0005 0 0 0 FFFFFFFF 0 0 0\n"
            )
        };
        check(&lines([10, 0, 0, 15]), true);
        check(&lines([169, 254, 1, 1]), false);
        let bridge = format!("eth0 00000000 {} 0003 0 0 0 00000000 0 0 0\n", hex([10, 244, 0, 1]));
        check(&bridge, false);
        check("", false);
    }

    #[test]
    fn distributions_and_labels_are_read_from_files() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(named(root.path(), None), "unknown");
        assert_eq!(named(root.path(), Some(Distribution::Talos)), "Talos");
        fs::create_dir_all(root.path().join("etc/kubernetes")).unwrap();
        fs::write(root.path().join("etc/kubernetes/kubelet.conf"), "").unwrap();
        assert_eq!(named(root.path(), Some(Distribution::Plain)), "kubeadm");
        assert_eq!(label("a=\"b\"\napp.kubernetes.io/name=\"mirror\"\n").1, "mirror");
        assert_eq!(label("").1, "");
        let labels = root.path().join("labels");
        fs::create_dir_all(root.path().join("etc/cni/net.d")).unwrap();
        assert_eq!(Place::look(root.path(), &labels, None).cni, Cni::Unknown);
        fs::write(root.path().join("etc/cni/net.d/05-cilium.conflist"), "").unwrap();
        assert_eq!(Place::look(root.path(), &labels, None).cni, Cni::Cilium);
    }
}
