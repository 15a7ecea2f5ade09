//! Nodes as network namespaces, joined by a bridge that lives in a namespace of its own, so that nothing of the machine's
//! own network is touched and several networks use the same addresses side by side.
//!
//! ```text
//!   pl<pid>-<k>-sw            br0
//!                         p0 /   \ p1
//!                       veth      veth
//!   pl<pid>-<k>-0   eth0             eth0   pl<pid>-<k>-1
//!                   10.77.0.1        10.77.0.2
//!                   fd77::1          fd77::2
//! ```

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::requirements::program;
use crate::scratch::is_dead;

const PREFIX: &str = "pl";
/// Where `ip netns` keeps its namespaces.
const FOLDER: &str = "/run/netns";
/// A bridge has 1,024 ports at most, and the last byte of an IPv4 address holds this many.
const NODE_LIMIT: usize = 250;

/// Which addresses the nodes have (besides loopback, which always has both).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

/// How packets are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Silence.
    Drop,
    /// TCP connections are reset.
    Reject,
    /// Who is sent to answers with an ICMP error, as `iptables --reject-with` names it: `icmp-port-unreachable`. IPv4 only.
    Icmp(&'static str),
    /// The sender's routes say so, as `ip route` names it: `prohibit`, `blackhole`, `unreachable`.
    Route(&'static str),
}

/// A network namespace of this machine, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

/// What went through a device so far, bytes with the headers of Ethernet, which the kernel counts even on loopback.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that came.
    pub received: u64,
    /// In so many packets.
    pub packets: u64,
    /// Bytes that went.
    pub sent: u64,
}

/// A node of a [`Network`].
#[derive(Clone, Debug)]
pub struct NetworkNode {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its IPv4 address, unless the network is IPv6-only.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address, unless the network is IPv4-only.
    pub v6: Option<Ipv6Addr>,
    port: String,
}

/// Several nodes that reach each other. Dropped: everything in it is gone, processes of its namespaces included.
#[derive(Debug)]
pub struct Network {
    /// The nodes.
    pub nodes: Vec<NetworkNode>,
    switch: Namespace,
}

impl Namespace {
    /// Its name, as `ip netns` has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside this namespace: sockets made there, and programs started there, belong to it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| self.enter().map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into this namespace, for good. For threads of one's own only.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(format!("{FOLDER}/{}", self.name))
            .with_context(|| format!("no namespace {}", self.name))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("cannot enter namespace {}", self.name))
    }

    /// Sends what is for `subnet` (`10.78.0.0/16`) by way of `via`, which drops it: nodes pass nothing on.
    pub fn route(&self, subnet: &str, via: IpAddr) -> Result<()> {
        self.ip(&["route", "add", subnet, "via", &via.to_string()])
    }

    /// Lets all addresses of `subnet` be its own.
    pub fn own(&self, subnet: &str) -> Result<()> {
        self.ip(&["route", "add", "local", subnet, "dev", "lo"])
    }

    /// What a device in it has counted, of all programs.
    pub fn traffic(&self, device: &str) -> Result<Traffic> {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        Traffic::parse(&table, device).with_context(|| format!("/proc/net/dev says nothing of {device}"))
    }

    fn create(name: String) -> Result<Self> {
        run("ip", &["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        run("ip", &[&["-n", &self.name], arguments].concat())
    }

    fn execute(&self, program: &str, arguments: &[&str]) -> Result<()> {
        self.run(|| run(program, arguments))?
    }

    fn delete(&self) {
        if let Ok(output) = Command::new("ip").args(["netns", "pids", &self.name]).output() {
            for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                // A thread of this very process may still be on its way out of the namespace.
                let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid.filter(|pid| *pid != rustix::process::getpid()) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
        }
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

impl Traffic {
    /// From the kernel's table: for each device eight columns of what came, then those of what went.
    fn parse(table: &str, device: &str) -> Option<Self> {
        let line = table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
        let numbers: Vec<u64> = line.split_whitespace().map_while(|number| number.parse().ok()).collect();
        Some(Self { received: *numbers.first()?, packets: *numbers.get(1)?, sent: *numbers.get(8)? })
    }
}

impl NetworkNode {
    /// The address that peers use: IPv4 if there is one.
    pub fn address(&self) -> IpAddr {
        match (self.v4, self.v6) {
            (Some(address), _) => address.into(),
            (None, Some(address)) => address.into(),
            (None, None) => Ipv4Addr::LOCALHOST.into(),
        }
    }

    /// What its network card has counted.
    pub fn traffic(&self) -> Result<Traffic> {
        self.namespace.traffic("eth0")
    }

    /// All its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }
}

impl Network {
    /// A network of `count` nodes.
    pub fn new(count: usize, addresses: Addresses) -> Result<Self> {
        static SWEEP: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep);
        ensure!(count <= NODE_LIMIT, "at most {NODE_LIMIT} nodes");
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let switch = Namespace::create(format!("{name}-sw"))?;
        let mut network = Self { nodes: Vec::with_capacity(count), switch };
        network.switch.ip(&["link", "add", "br0", "type", "bridge"])?;
        network.switch.ip(&["link", "set", "br0", "up"])?;
        for index in 0..count {
            let namespace = Namespace::create(format!("{name}-{index}"))?;
            // In the network before the rest is set up, so that a failure removes it.
            let node = NetworkNode { namespace, v4: None, v6: None, port: format!("p{index}") };
            network.nodes.push(node);
            let switch = network.switch.name.clone();
            let Some(node) = network.nodes.last_mut() else { continue };
            node.join(&switch, index, addresses)?;
        }
        Ok(network)
    }

    /// Stops packets between two nodes in both directions; both ends notice what `block` says.
    pub fn block(&self, one: usize, other: usize, block: Block) -> Result<()> {
        self.filter(true, one, other, block)
    }

    /// Undoes [`Self::block`].
    pub fn unblock(&self, one: usize, other: usize, block: Block) -> Result<()> {
        self.filter(false, one, other, block)
    }

    /// Cuts the TCP connections that `one` has to `other` now: their packets are dropped on both sides for as long as the network is
    /// there, and those of later connections pass. Their number.
    pub fn cut(&self, one: usize, other: usize) -> Result<usize> {
        let (here, there) = (&self.nodes[one], &self.nodes[other]);
        let mut count = 0;
        for address in there.addresses() {
            let output = here.namespace.run(|| {
                let filter = ["state", "established", "dst", &address.to_string()];
                Command::new("ss").args(["-H", "-t", "-n"]).args(filter).output()
            })??;
            ensure!(output.status.success(), "ss: {}", String::from_utf8_lossy(&output.stderr).trim());
            for (local, remote) in connections(&String::from_utf8_lossy(&output.stdout)) {
                let program = if address.is_ipv6() { "ip6tables" } else { "iptables" };
                let (local, remote, address) = (local.to_string(), remote.to_string(), address.to_string());
                for (chain, side, from, to) in
                    [("INPUT", "-s", &remote, &local), ("OUTPUT", "-d", &local, &remote)]
                {
                    let packets = [side, &address, "-p", "tcp", "--sport", from, "--dport", to];
                    let rule = [&["-w", "-A", chain], &packets[..], &["-j", "DROP"]].concat();
                    here.namespace.execute(program, &rule)?;
                }
                count += 1;
            }
        }
        Ok(count)
    }

    /// Pulls a node's cable, or plugs it in again. The node itself sees its link go.
    pub fn set_link(&self, node: usize, up: bool) -> Result<()> {
        self.switch.ip(&["link", "set", &self.nodes[node].port, if up { "up" } else { "down" }])
    }

    /// Limits what a node sends, in bits per second; `None` lifts the limit.
    pub fn set_rate(&self, node: usize, bits_per_second: Option<u64>) -> Result<()> {
        let namespace = &self.nodes[node].namespace;
        match bits_per_second {
            Some(rate) => {
                let rate = format!("{rate}bit");
                let limit = ["rate", &rate, "burst", "256kb", "latency", "50ms"];
                let qdisc = ["qdisc", "replace", "dev", "eth0", "root", "tbf"];
                namespace.execute("tc", &[&qdisc[..], &limit[..]].concat())
            }
            None => namespace.execute("tc", &["qdisc", "del", "dev", "eth0", "root"]),
        }
    }

    fn filter(&self, adds: bool, one: usize, other: usize, block: Block) -> Result<()> {
        for (here, there) in [(one, other), (other, one)] {
            let (here, there) = (&self.nodes[here].namespace, &self.nodes[there]);
            for address in there.addresses() {
                let length = if address.is_ipv6() { 128 } else { 32 };
                let (program, address) =
                    (if length == 128 { "ip6tables" } else { "iptables" }, address.to_string());
                // Resets and ICMP pass, or the other end's would never arrive.
                let reset = [
                    "-p",
                    "tcp",
                    "!",
                    "--tcp-flags",
                    "RST",
                    "RST",
                    "-j",
                    "REJECT",
                    "--reject-with",
                    "tcp-reset",
                ];
                let chains = [("INPUT", "-s"), ("OUTPUT", "-d")];
                let (chains, target): (&[_], &[&str]) = match block {
                    Block::Drop => (&chains, &["-j", "DROP"]),
                    Block::Reject => (&chains, &reset),
                    Block::Icmp(kind) => {
                        (&chains[..1], &["!", "-p", "icmp", "-j", "REJECT", "--reject-with", kind])
                    }
                    Block::Route(kind) => {
                        let change = if adds { "add" } else { "del" };
                        here.ip(&["route", change, kind, &format!("{address}/{length}")])?;
                        continue;
                    }
                };
                for (chain, side) in chains {
                    let change = if adds { "-A" } else { "-D" };
                    let rule = [&["-w", change, chain, side, &address], target].concat();
                    here.execute(program, &rule)?;
                }
            }
        }
        Ok(())
    }
}

/// Of each connection that `ss -Htn` lists the ports, this end's first.
fn connections(list: &str) -> Vec<(u16, u16)> {
    let port = |end: &str| end.rsplit_once(':')?.1.parse().ok();
    let of_line = |line: &str| {
        let mut ends = line.split_whitespace().filter(|part| part.contains(':'));
        Some((port(ends.next()?)?, port(ends.next()?)?))
    };
    list.lines().filter_map(of_line).collect()
}

impl NetworkNode {
    fn join(&mut self, switch: &str, index: usize, addresses: Addresses) -> Result<()> {
        let (port, host) = (self.port.clone(), u8::try_from(index + 1)?);
        let ends = [&port[..], "netns", switch, "type", "veth", "peer", "name", "eth0", "netns"];
        run("ip", &[&["link", "add"], &ends[..], &[self.namespace.name()]].concat())?;
        run("ip", &["-n", switch, "link", "set", &port, "master", "br0", "up"])?;
        let namespace = &self.namespace;
        // Without the wait for duplicates an IPv6 address can be bound at once.
        namespace.execute("sh", &["-c", "echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad || true"])?;
        namespace.ip(&["link", "set", "eth0", "up"])?;
        if addresses != Addresses::V6 {
            let address = Ipv4Addr::new(10, 77, 0, host);
            namespace.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            self.v4 = Some(address);
        }
        if addresses != Addresses::V4 {
            let address = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host.into());
            namespace.ip(&["addr", "add", &format!("{address}/64"), "dev", "eth0", "nodad"])?;
            self.v6 = Some(address);
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for node in &self.nodes {
            node.namespace.delete();
        }
        self.switch.delete();
    }
}

/// Removes the namespaces of runs that are over.
fn sweep() {
    let Ok(entries) = std::fs::read_dir(FOLDER) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse().ok());
        if pid.is_some_and(is_dead) {
            Namespace { name }.delete();
        }
    }
}

fn run(name: &str, arguments: &[&str]) -> Result<()> {
    let Some(path) = program(name) else { bail!("no {name} on this machine") };
    let output = Command::new(path).args(arguments).output().with_context(|| format!("cannot run {name}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} {}: {}", arguments.join(" "), error.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let text = "Inter-|   Receive\n face |bytes    packets errs\n  eth0: 5 1 0\n    lo: 1280 20 0 0 0 0 0 0 1290 21\n";
        let traffic = Traffic { received: 1280, packets: 20, sent: 1290 };
        assert_eq!(Traffic::parse(text, "lo"), Some(traffic));
        assert_eq!(Traffic::parse("eth0: 5 1", "lo"), None);
    }

    #[test]
    fn connections_are_read_by_their_ports() {
        let text = "0 0 10.77.0.1:40000 10.77.0.4:6443 \n0      36    [fd77::1]:5  [fd77::2]:5001\nrubbish\n";
        assert_eq!(connections(text), [(40_000, 6_443), (5, 5_001)]);
    }
}
