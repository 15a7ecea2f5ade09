//! What runs on each connection, and the two checks before there is one: the gate and the limits.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::{Endpoint, transport::PortUse};
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, ListenFailure, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId, ping};

use super::codec::{Codec, PROTOCOL};
use crate::network::identity::peer_id;
use crate::oci::{Action, Gate};

/// The driver, not the ping, decides when a connection is dead: libp2p's ping forgives one failure and then waits for
/// the negotiation of a new stream, ten seconds in all.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// An inventory page is half a MiB at most: ten seconds are 50 KiB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams with a request, of both directions, on one connection. Each may hold a message of a MiB, so that one peer
/// takes 24 MiB at most.
pub(super) const STREAMS: usize = 8;
/// One in each direction where both dial at once, and room for a new one while an old one is not known to be dead.
const CONNECTIONS_PER_PEER: u32 = 3;
/// Far above what ten nodes need, far below the descriptors of a process.
const CONNECTIONS: u32 = 512;
/// Connections that prove no identity hold their place for the handshake's time limit.
const PENDING: u32 = 256;
/// So many of them may come from one address: more than ten nodes behind one address ever need at once.
pub(super) const PENDING_PER_ADDRESS: usize = 16;
/// And from one IPv6 network of 64 bits, all of which one host may have.
const PENDING_PER_NETWORK: usize = 64;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    doorkeeper: Doorkeeper,
    limits: connection_limits::Behaviour,
    ping: ping::Behaviour,
    pub(super) control: request_response::Behaviour<Codec>,
}

/// Asks the gate as soon as the identity is proved, before anything runs on the connection. Until then it sees to it
/// that no address has too many.
pub(super) struct Doorkeeper {
    gate: Arc<dyn Gate>,
    /// Incoming connections without a proved identity, at most [`PENDING`].
    pending: HashMap<ConnectionId, IpAddr>,
}

/// Why the doorkeeper denied a connection.
#[derive(Debug)]
pub(super) struct NotTrusted;

/// Too many connections from one address prove no identity.
#[derive(Debug)]
struct TooMany;

impl Behaviour {
    pub(super) fn new(gate: Arc<dyn Gate>) -> Self {
        let limits = ConnectionLimits::default()
            .with_max_pending_incoming(Some(PENDING))
            .with_max_pending_outgoing(Some(PENDING))
            .with_max_established(Some(CONNECTIONS))
            .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER));
        let control = request_response::Config::default()
            .with_request_timeout(REQUEST_TIMEOUT)
            .with_max_concurrent_streams(STREAMS);
        Self {
            doorkeeper: Doorkeeper { gate, pending: HashMap::new() },
            limits: connection_limits::Behaviour::new(limits),
            ping: ping::Behaviour::new(
                ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT),
            ),
            control: request_response::Behaviour::with_codec(
                Codec,
                [(PROTOCOL, ProtocolSupport::Full)],
                control,
            ),
        }
    }
}

impl Doorkeeper {
    fn check(&self, peer: &PeerId) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        match peer_id(peer) {
            Some(peer) if self.gate.allows(&peer, Action::Connect) => Ok(dummy::ConnectionHandler),
            _ => Err(ConnectionDenied::new(NotTrusted)),
        }
    }

    fn admit(&mut self, connection: ConnectionId, ip: IpAddr) -> Result<(), TooMany> {
        let same = self.pending.values().filter(|other| **other == ip).count();
        let near = self.pending.values().filter(|other| network(other) == network(&ip)).count();
        if same >= PENDING_PER_ADDRESS || near >= PENDING_PER_NETWORK {
            return Err(TooMany);
        }
        self.pending.insert(connection, ip);
        Ok(())
    }
}

/// The IP address and TCP port with which `address` begins.
pub(super) fn socket(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip.to_canonical(), port)),
        _ => None,
    }
}

/// The first 64 bits of an IPv6 address; an IPv4 address as it is.
fn network(ip: &IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits() >> 64 << 64,
    }
}

impl NetworkBehaviour for Doorkeeper {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = std::convert::Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        match socket(remote) {
            Some(address) => self.admit(connection, address.ip()).map_err(ConnectionDenied::new),
            None => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pending.remove(&connection);
        self.check(&peer)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(&peer)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        // Comes for what was denied as well, by this or another behaviour.
        if let FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event {
            self.pending.remove(&connection_id);
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

impl fmt::Display for NotTrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not among the peers that this node trusts (`network.peers`)")
    }
}

impl std::error::Error for NotTrusted {}

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many connections from its address prove no identity")
    }
}

impl std::error::Error for TooMany {}
