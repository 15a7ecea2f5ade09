//! Listening, looking names up and dialling, and what went wrong with it in words.

use std::error::Error;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use libp2p::core::transport::ListenerId;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionDenied, ConnectionId, DialError, ListenError};
use libp2p::{Multiaddr, PeerId as P2pId};
use tokio::task::JoinError;
use tokio::time::Instant;

use super::super::behaviour::{Behaviour, NotTrusted, socket};
use super::super::bootstrap::{Lookup, Target};
use super::super::lookup::look_up;
use super::super::view::Subject;
use super::{Driver, LookupDone};
use crate::network::PeerConfig;
use crate::network::claim::ADDRESS_LIMIT;
use crate::network::identity::peer_id;
use crate::network::metrics::{Refused, RefusedLabels};
use crate::oci::PeerId;

impl Driver {
    /// Listens where that is not so yet.
    pub(super) fn listen(&mut self) {
        let mut failures = Vec::new();
        for (address, listener) in &mut self.listen {
            if listener.is_some() {
                continue;
            }
            match self.swarm.listen_on(multiaddr(*address)) {
                Ok(id) => {
                    *listener = Some(id);
                    self.shared.problem(Subject::Listen(*address), None);
                }
                Err(error) => failures.push((*address, error)),
            }
        }
        let listens = self.listen.iter().any(|(_, listener)| listener.is_some());
        for (address, error) in failures {
            let cause = root_cause(&error);
            if listens && address.is_ipv6() && is_missing_family(&error) {
                tracing::info!(%address, error = cause, "this machine has no IPv6, going on without it");
                self.listen.retain(|(other, _)| *other != address);
                self.shared.problem(Subject::Listen(address), None);
            } else {
                let problem = format!("cannot listen at {address}: {cause}");
                self.shared.problem(Subject::Listen(address), Some(problem));
            }
        }
    }

    pub(super) fn on_listener_closed(&mut self, id: ListenerId, error: Option<&io::Error>) {
        for (address, listener) in &mut self.listen {
            if *listener == Some(id) {
                *listener = None;
                let cause = error.map_or_else(|| "closed".to_owned(), |error| root_cause(error));
                let problem = format!("cannot listen at {address}: {cause}");
                self.shared.problem(Subject::Listen(*address), Some(problem));
            }
        }
        self.on_listening();
    }

    pub(super) fn on_listening(&mut self) {
        let addresses = self.swarm.listeners().filter_map(socket);
        let mut addresses: Vec<String> = addresses.map(|address| address.to_string()).collect();
        addresses.sort_unstable();
        *self.shared.listening() = addresses;
        self.amend();
    }

    pub(super) fn configure(&mut self, peers: &[PeerConfig], dns: &[String]) {
        // This node may be in its own list: one file for all nodes.
        let own = self.shared.id.clone();
        let peers: Vec<PeerConfig> = peers.iter().filter(|peer| peer.id != own).cloned().collect();
        let gone = self.bootstrap.configure(&peers, dns, Instant::now());
        for target in gone {
            self.shared.forget_problems(|subject| match (&target, subject) {
                (Target::Peer(id), Subject::Peer(other)) => id == other,
                (Target::Service(name), Subject::Dns(other)) => name == other,
                (Target::Service(_), Subject::Address(_)) => true,
                _ => false,
            });
            if let Target::Peer(id) = target {
                self.shared.peers_mut().retain(|other, known| *other != id || known.connected);
            }
        }
        for (id, nowhere) in self.bootstrap.peers() {
            let connected = {
                let mut peers = self.shared.peers_mut();
                peers.entry(id.clone()).or_default().connected
            };
            if !connected {
                let text = if nowhere && dns.is_empty() {
                    "not connected; no address is configured for it, so it must connect here"
                } else {
                    "not connected yet"
                };
                self.shared.expect(Subject::Peer(id.clone()), format!("peer {id}: {text}"));
            }
        }
    }

    pub(super) fn start_lookups(&mut self, now: Instant) {
        for Lookup { target, names } in self.bootstrap.due(now) {
            let resolver = Arc::clone(&self.names);
            self.lookups.spawn(async move {
                let look_up = |name: String| {
                    let resolver = Arc::clone(&resolver);
                    async move { look_up(resolver, &name).await.map_err(|error| (name, error)) }
                };
                (target, futures::future::join_all(names.into_iter().map(look_up)).await)
            });
        }
    }

    pub(super) fn on_lookup(&mut self, done: Result<LookupDone, JoinError>) {
        let Ok((target, results)) = done else { return };
        let now = Instant::now();
        let (found, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        let found: Vec<SocketAddr> = found.into_iter().flatten().flatten().collect();
        let failed: Vec<String> = failed
            .into_iter()
            .filter_map(Result::err)
            .map(|(name, error)| format!("dns {name}: {error}"))
            .collect();
        match target {
            Target::Peer(id) => {
                let problem = (!failed.is_empty()).then(|| format!("peer {id}: {}", failed.join("; ")));
                let addresses = self.bootstrap.peer_addresses(&id, found, now);
                if addresses.is_empty() {
                    // Without a failed name it has connected meanwhile.
                    if let Some(problem) = problem {
                        self.shared.problem(Subject::Peer(id), Some(problem));
                    }
                    return;
                }
                self.dial_peer(id, &addresses, now);
            }
            // The gossip knows addresses, and no names.
            Target::Member(_) | Target::Hint => {}
            Target::Service(name) => {
                let problem = failed.into_iter().next();
                let answer = if problem.is_none() { Ok(found.as_slice()) } else { Err(()) };
                let links = &self.links;
                let connected = |id: &PeerId| links.values().any(|link| link.id == *id);
                let addresses = self.bootstrap.service_addresses(&name, answer, connected, now);
                if problem.is_none() {
                    let left = |subject: &Subject| matches!(subject, Subject::Address(address) if !found.contains(address));
                    self.shared.forget_problems(left);
                } else if !self.bootstrap.is_alone() {
                    // None of them is dialled again before the name is known, so what is said of them would stay, whatever becomes of them.
                    self.shared.forget_problems(|subject| matches!(subject, Subject::Address(_)));
                }
                self.shared.problem(Subject::Dns(name.clone()), problem);
                self.dial_service(&name, addresses, now);
            }
        }
    }

    /// Goes on through the addresses of services, while nobody is here.
    pub(super) fn step(&mut self, now: Instant) {
        let links = &self.links;
        let connected = |id: &PeerId| links.values().any(|link| link.id == *id);
        for (name, addresses) in self.bootstrap.steps(connected, now) {
            self.dial_service(&name, addresses, now);
        }
    }

    fn dial_service(&mut self, name: &str, addresses: Vec<SocketAddr>, now: Instant) {
        for address in addresses {
            let options = DialOpts::unknown_peer_id().address(multiaddr(address)).allocate_new_port().build();
            self.dial(Target::Service(name.to_owned()), Some(address), options, now);
        }
    }

    fn dial_peer(&mut self, id: PeerId, addresses: &[SocketAddr], now: Instant) {
        let Ok(peer) = id.as_str().parse::<P2pId>() else {
            let problem = format!("peer {id}: its ID is not a peer ID of libp2p");
            self.shared.problem(Subject::Peer(id.clone()), Some(problem));
            return self.bootstrap.failed(&Target::Peer(id), None, now);
        };
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::NotDialing)
            .addresses(addresses.iter().copied().map(multiaddr).collect())
            // From the port that this node listens at, the same way could not be gone again for a minute after a restart.
            .allocate_new_port()
            .build();
        self.dial(Target::Peer(id), None, options, now);
    }

    pub(super) fn dial(
        &mut self,
        target: Target,
        address: Option<SocketAddr>,
        options: DialOpts,
        now: Instant,
    ) {
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, (target, address));
            }
            Err(error) => {
                tracing::debug!(?target, %error, "cannot dial");
                if let Some(address) = address {
                    self.bootstrap.dialed(address);
                }
                self.bootstrap.failed(&target, None, now);
            }
        }
    }

    pub(super) fn on_dial_failed(&mut self, connection: ConnectionId, met: Option<P2pId>, error: &DialError) {
        let Some((target, address)) = self.dials.remove(&connection) else { return };
        if let Some(address) = address {
            self.bootstrap.dialed(address);
        }
        if let (DialError::Denied { .. }, Some(address)) = (error, address)
            && let Some(link) = met.as_ref().and_then(|met| self.links.get(met))
        {
            // It is here already, over as many connections as one peer may have.
            self.bootstrap.connected(&link.id, Some(address));
            self.shared.problem(Subject::Address(address), None);
            return;
        }
        let wrong = match error {
            DialError::WrongPeerId { address, .. } | DialError::LocalPeerId { address } => socket(address),
            _ => None,
        };
        self.bootstrap.failed(&target, wrong, Instant::now());
        if let (Target::Service(_), DialError::LocalPeerId { .. }, Some(address)) = (&target, error, address)
        {
            self.bootstrap.is_own(address);
            return;
        }
        self.metrics.dial_failures.inc();
        let text = describe(error);
        match (target, address) {
            (Target::Peer(id), _) => {
                if !self.shared.peers().get(&id).is_some_and(|known| known.connected) {
                    self.shared.problem(Subject::Peer(id.clone()), Some(format!("peer {id}{text}")));
                }
            }
            (Target::Service(name), Some(address)) => {
                let at = format!(" at {address}");
                let at = if text.starts_with(&at) { String::new() } else { at };
                let id = met.as_ref().and_then(peer_id).map(|id| format!(": {id}")).unwrap_or_default();
                self.shared.address_problem(address, format!("a peer of {name}{at}{id}{text}"));
            }
            (Target::Service(_), None) => {}
            // Anybody may have put it there who may write the lease.
            (Target::Hint, _) => tracing::debug!("somebody whom the lease names{text}"),
            (Target::Member(key), _) => {
                let now = self.now();
                self.shared.view_mut().gossip.dial_failed(key, now);
                if let Some(peer) = met {
                    self.unanswerable(peer, "it cannot be reached");
                }
                self.turn();
            }
        }
    }

    pub(super) fn on_refused(&mut self, from: &Multiaddr, error: &ListenError, peer: Option<P2pId>) {
        let ip = socket(from).map(|address| address.ip());
        let from = ip.map_or_else(|| from.to_string(), |ip| ip.to_string());
        let why = match error {
            ListenError::Denied { cause } => cause.downcast_ref::<NotTrusted>(),
            _ => None,
        };
        let reason = match error {
            ListenError::Denied { .. } if why.is_some() => Refused::Peer,
            ListenError::Denied { .. } => Refused::Limit,
            _ => Refused::Handshake,
        };
        self.metrics.refused.get_or_create(&RefusedLabels { reason }).inc();
        match (why, peer.as_ref().and_then(peer_id)) {
            (Some(why), Some(id)) => self.show_refused(&id, ip, &why.to_string()),
            _ => tracing::debug!(from, %error, "an incoming connection failed"),
        }
    }
}

/// Where the control plane listens.
pub(super) fn listening(swarm: &libp2p::Swarm<Behaviour>) -> Vec<SocketAddr> {
    swarm.listeners().filter_map(socket).collect()
}

/// Where peers reach this node's control plane: what is configured, then the ports it listens at.
pub(super) fn control_addresses(
    swarm: &libp2p::Swarm<Behaviour>,
    advertise: &[SocketAddr],
) -> Vec<SocketAddr> {
    let mut addresses = advertise.to_vec();
    for listening in swarm.listeners().filter_map(socket) {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), listening.port());
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.truncate(ADDRESS_LIMIT);
    addresses
}

pub(super) fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Continues a sentence: ` at 10.0.0.2:5001: connection refused`.
fn describe(error: &DialError) -> String {
    let at = |address: &Multiaddr| {
        socket(address).map_or_else(|| address.to_string(), |address| address.to_string())
    };
    match error {
        DialError::WrongPeerId { obtained, address } => {
            format!(" at {}: another identity answered: {obtained}", at(address))
        }
        DialError::LocalPeerId { address } => format!(" at {}: this node itself answered", at(address)),
        DialError::Transport(errors) => {
            let each =
                errors.iter().map(|(address, error)| format!(" at {}: {}", at(address), root_cause(error)));
            each.collect::<Vec<_>>().join(";")
        }
        DialError::Denied { cause } => format!(": {}", denial(cause)),
        other => format!(": {}", root_cause(other)),
    }
}

fn denial(cause: &ConnectionDenied) -> String {
    match cause.downcast_ref::<NotTrusted>() {
        Some(not_trusted) => not_trusted.to_string(),
        None => root_cause(cause),
    }
}

/// Whether the system knows no such addresses at all: IPv6 is off.
fn is_missing_family(error: &(dyn Error + 'static)) -> bool {
    let code = innermost(error).downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    code == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn innermost<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut innermost = error;
    loop {
        // Both hide what they wrap from `source`.
        let inner = if let Some(TransportError::Other(inner)) =
            innermost.downcast_ref::<TransportError<io::Error>>()
        {
            Some(inner as &(dyn Error + 'static))
        } else if let Some(error) = innermost.downcast_ref::<io::Error>() {
            error.get_ref().map(|inner| inner as &(dyn Error + 'static))
        } else {
            innermost.source()
        };
        match inner {
            Some(inner) => innermost = inner,
            None => return innermost,
        }
    }
}

/// The innermost error, which names the cause; as part of a sentence, system errors without their number.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let text = innermost(error).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut characters = text.chars();
    match (characters.next(), characters.next()) {
        (Some(first), Some(second)) if second.is_lowercase() => {
            first.to_lowercase().chain(text[first.len_utf8()..].chars()).collect()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_missing_family_is_told_from_a_missing_address() {
        let check = |errno: Errno, expected: bool| {
            let error = TransportError::Other(io::Error::from(errno));
            assert_eq!(is_missing_family(&error), expected, "{errno}");
        };
        check(Errno::AFNOSUPPORT, true);
        check(Errno::ADDRNOTAVAIL, false);
        check(Errno::ADDRINUSE, false);
        let multiaddr = "/ip6/::1".parse().unwrap();
        assert!(!is_missing_family(&TransportError::<io::Error>::MultiaddrNotSupported(multiaddr)));
    }
}
