//! Whose connections a server takes: by the address that one comes from, before a byte of it is read.
//!
//! A socket at a loopback address does not keep others out by itself: with `route_localnet`, which kube-proxy and the `portmap` plugin turn
//! on, packets of neighbours reach it unless a rule of the host drops them (CVE-2020-8558).

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::NotLoopback;

/// Bytes of a routing table that are read.
const TABLE: u64 = 1 << 20;
/// Between two lines of the log about connections that were closed.
const QUIET: Duration = Duration::from_secs(60);

/// Who may connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Clients {
    /// Processes in this network: connections from loopback addresses.
    #[default]
    Loopback,
    /// This node as a pod with a network of its own sees it: loopback, the gateways of the default routes, and the address in `HOST_IP`
    /// (`status.hostIP`). Behind a hostPort with `hostIP: 127.0.0.1` the runtime's connections come from there.
    Node,
    /// Whoever reaches the addresses.
    All,
}

/// [`Clients`] as a server asks it, and whom it has turned away; clones are the same one.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clients: Clients,
    node: Vec<IpAddr>,
    refused: Counter,
    strangers: Mutex<Strangers>,
}

/// Whom a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    /// This node.
    Own,
    /// Another who may.
    Other,
}

/// Who was turned away, and when that was logged.
#[derive(Clone, Copy, Debug, Default)]
struct Strangers {
    last: Option<(IpAddr, Instant)>,
    logged: Option<Instant>,
}

impl Clients {
    /// Checks that all of `addresses` are loopback if nobody else may connect; logs it if everybody may.
    ///
    /// # Errors
    /// The first address that is not.
    pub fn check(
        self,
        addresses: &[SocketAddr],
        (setting, clients): (&'static str, &'static str),
        risk: &'static str,
    ) -> Result<(), NotLoopback> {
        for &address in addresses.iter().filter(|address| !address.ip().to_canonical().is_loopback()) {
            match self {
                Self::Loopback => return Err(NotLoopback { address, setting, clients, risk }),
                Self::Node => {}
                Self::All => tracing::warn!(%address, setting, risk, "an address is not loopback"),
            }
        }
        Ok(())
    }

    /// Reads the routes of this network and `HOST_IP` where it needs them: those of a pod do not change. `refused` counts whom it turns away.
    pub fn admission(self, refused: Counter) -> Admission {
        // Those of a pod's node have a share of their own where all may come: kubelet's probes do.
        let node = if self == Self::Loopback { Vec::new() } else { node() };
        if self == Self::Node {
            tracing::info!(
                ?node,
                "addresses of this node, whose connections are taken beside those of loopback"
            );
        }
        Admission(Arc::new(Inner { clients: self, node, refused, strangers: Mutex::default() }))
    }
}

impl Admission {
    /// Who connects from `from`; `None`: nobody who may, which is counted, and logged once a minute.
    pub(super) fn admits(&self, from: IpAddr, server: &'static str) -> Option<Client> {
        let from = from.to_canonical();
        let is_own = from.is_loopback() || self.0.node.contains(&from);
        let client = match self.0.clients {
            _ if is_own => Some(Client::Own),
            Clients::All => Some(Client::Other),
            _ => None,
        };
        if client.is_none() {
            let now = Instant::now();
            let mut strangers = self.0.strangers.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.refused.inc();
            strangers.last = Some((from, now));
            if strangers.logged.is_none_or(|logged| now.duration_since(logged) > QUIET) {
                strangers.logged = Some(now);
                let (clients, all) = (self.0.clients, self.0.refused.get());
                drop(strangers);
                tracing::warn!(server, %from, ?clients, all, "closed a connection that does not come from this node");
            }
        }
        client
    }

    /// Connections that were closed, and where the last one came from if it was in the last `recent`.
    pub fn strangers(&self, recent: Duration) -> (u64, Option<IpAddr>) {
        let strangers = *self.0.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        let last = strangers.last.filter(|(_, at)| at.elapsed() < recent);
        (self.0.refused.get(), last.map(|(from, _)| from))
    }
}

fn node() -> Vec<IpAddr> {
    let read = |path: &str| {
        let mut text = String::new();
        // A kernel without this family has no such table.
        if let Ok(file) = File::open(path) {
            let _ = file.take(TABLE).read_to_string(&mut text);
        }
        text
    };
    let told = std::env::var("HOST_IP").ok().and_then(|address| address.parse::<IpAddr>().ok());
    let mut all = gateways(&read("/proc/self/net/route"));
    all.extend(gateways_of_ipv6(&read("/proc/self/net/ipv6_route")));
    all.extend(told);
    all.sort_unstable();
    all.dedup();
    all
}

/// Of `/proc/net/route`: device, destination, gateway, ...; addresses are numbers of this machine's byte order.
fn gateways(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (to, by, mask) = (columns.get(1)?, columns.get(2)?, columns.get(7)?);
        let bits = u32::from_str_radix(by, 16).ok().filter(|bits| *bits != 0)?;
        (*to == "00000000" && *mask == *to).then(|| Ipv4Addr::from(bits.to_ne_bytes()).into())
    };
    table.lines().skip(1).filter_map(gateway).collect()
}

/// Of `/proc/net/ipv6_route`: destination, its length, source, its length, next hop, ...; 32 digits an address.
fn gateways_of_ipv6(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (length, by) = (columns.get(1)?, columns.get(4)?);
        let bits = u128::from_str_radix(by, 16).ok().filter(|bits| *bits != 0)?;
        (*length == "00").then(|| Ipv6Addr::from(bits).into())
    };
    table.lines().filter_map(gateway).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(clients: Clients, node: &[&str]) -> Admission {
        let node = node.iter().filter(|_| clients != Clients::Loopback);
        let node = node.map(|address| address.parse().unwrap()).collect();
        Admission(Arc::new(Inner { clients, node, refused: Counter::default(), strangers: Mutex::default() }))
    }

    #[test]
    fn who_may_connect() {
        let cases = [
            ("127.0.0.1", [true, true, true]),
            ("127.8.8.8", [true, true, true]),
            ("::1", [true, true, true]),
            ("::ffff:127.0.0.1", [true, true, true]),
            ("10.244.1.1", [false, true, true]),
            ("::ffff:10.244.1.1", [false, true, true]),
            ("192.168.0.7", [false, true, true]),
            ("10.244.1.2", [false, false, true]),
            ("192.168.0.8", [false, false, true]),
            ("fe80::1", [false, false, true]),
        ];
        let all = [Clients::Loopback, Clients::Node, Clients::All];
        for (from, expected) in cases {
            let admits = all.map(|clients| {
                let admission = admission(clients, &["10.244.1.1", "192.168.0.7"]);
                let admits = admission.admits(from.parse().unwrap(), "test").is_some();
                let (count, last) = admission.strangers(QUIET);
                assert_eq!((count == 0, last.is_none()), (admits, admits), "{from}");
                admits
            });
            assert_eq!(admits, expected, "{from}");
        }
    }

    #[test]
    fn gateways_are_those_of_default_routes() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t0101F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth0\t0001F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                     eth0\t0000F40A\t0201F40A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let expected: IpAddr = Ipv4Addr::from(0x0101_F40A_u32.to_ne_bytes()).into();
        assert_eq!(gateways(table), [expected], "neither of networks, nor none");
        assert!(gateways("").is_empty() && gateways("x\nnonsense\n").is_empty());
        let table = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n\
                     fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
                     00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
        assert_eq!(gateways_of_ipv6(table), ["fd00::1".parse::<IpAddr>().unwrap()]);
    }
}
