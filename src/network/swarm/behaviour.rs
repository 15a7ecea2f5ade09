//! What runs on each connection, and the checks before there is one: the gate, the limits, and the time that a peer has to
//! prove itself.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::{Endpoint, transport::PortUse};
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{
    CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm, ListenFailure,
    NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};
use tokio::time::{Instant, Sleep};

use super::codec::Codec;
use super::{codec, stream, streams};
use crate::network::identity::peer_id;
use crate::oci::{Action, Gate, Proof};

/// Messages are small; a peer that takes so long is of no use.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams with a request, of both directions, on one connection. Each may hold a message of 32 KiB.
pub(super) const STREAMS: usize = 8;
/// One in each direction where both dial at once, and room for a new one while an old one is not known to be dead.
const CONNECTIONS_PER_PEER: u32 = 3;
/// Far above what ten nodes need, far below the descriptors of a process.
const CONNECTIONS: u32 = 512;
/// Connections that prove no identity hold their place for the handshake's time limit.
const PENDING: u32 = 256;
/// So many of them may come from one address: more than ten nodes behind one address ever need at once.
pub(super) const PENDING_PER_ADDRESS: usize = 16;
/// Connections whose peer may only prove that it is a member: so many, for so long. A proof takes two round trips. The
/// oldest gives way to a new one, so that who does not prove itself keeps nobody out. Each may fill [`STREAMS`] messages in
/// its time.
const UNPROVED: usize = 32;
pub(super) const PROOF_TIME: Duration = Duration::from_secs(2);
/// So many of them from one address; a flood from there takes no more.
pub(super) const UNPROVED_PER_ADDRESS: usize = 8;
/// And from one IPv6 network of 64 bits, all of which one host may have.
const PENDING_PER_NETWORK: usize = 64;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    doorkeeper: Doorkeeper,
    limits: connection_limits::Behaviour,
    pub(super) gossip: streams::Behaviour,
    pub(super) control: request_response::Behaviour<Codec>,
}

/// Asks the gate as soon as the identity is proved, before anything runs on the connection. Until then it sees to it
/// that no address has too many.
pub(super) struct Doorkeeper {
    gate: Arc<dyn Gate>,
    /// Incoming connections without a proved identity, at most [`PENDING`].
    pending: HashMap<ConnectionId, IpAddr>,
    /// Connections whose peer was not proved to be a member when they were made, the oldest first.
    unproved: VecDeque<Unproved>,
    /// Of them, those to be closed.
    closing: VecDeque<(PeerId, ConnectionId)>,
    /// When the oldest one has to be looked at.
    due: Option<Pin<Box<Sleep>>>,
}

struct Unproved {
    connection: ConnectionId,
    peer: PeerId,
    id: crate::oci::PeerId,
    ip: Option<IpAddr>,
    since: Instant,
}

/// Why the doorkeeper denied a connection.
#[derive(Debug)]
pub(super) enum NotTrusted {
    /// Nothing speaks for the peer.
    Unknown,
    /// It is denied by name.
    Denied,
}

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
            doorkeeper: Doorkeeper::new(gate),
            limits: connection_limits::Behaviour::new(limits),
            gossip: streams::Behaviour::new(stream::protocols()),
            control: request_response::Behaviour::with_codec(
                Codec,
                codec::protocols().into_iter().map(|protocol| (protocol, ProtocolSupport::Full)),
                control,
            ),
        }
    }
}

impl Doorkeeper {
    fn new(gate: Arc<dyn Gate>) -> Self {
        let (unproved, closing) = (VecDeque::new(), VecDeque::new());
        Self { gate, pending: HashMap::new(), unproved, closing, due: None }
    }

    fn check(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        let Some(id) = peer_id(&peer) else { return Err(ConnectionDenied::new(NotTrusted::Unknown)) };
        if !self.gate.allows(&id, Action::Connect) {
            let denied = self.gate.proof(&id) == Proof::Denied;
            let why = if denied { NotTrusted::Denied } else { NotTrusted::Unknown };
            return Err(ConnectionDenied::new(why));
        }
        if self.gate.is_unproved(&id) {
            let ip = socket(remote).map(|address| address.ip());
            self.watch(Unproved { connection, peer, id, ip, since: Instant::now() });
        }
        Ok(dummy::ConnectionHandler)
    }

    /// Bounds the connections that prove nothing yet, and the time that they have.
    fn watch(&mut self, new: Unproved) {
        let gate = &self.gate;
        self.unproved.retain(|other| gate.is_unproved(&other.id));
        let same = |other: &Unproved| other.ip == new.ip;
        let of_address = self.unproved.iter().filter(|other| same(other)).count() >= UNPROVED_PER_ADDRESS;
        let first = if of_address { self.unproved.iter().position(same) } else { Some(0) };
        if (of_address || self.unproved.len() >= UNPROVED)
            && let Some(oldest) = first.and_then(|first| self.unproved.remove(first))
        {
            self.closing.push_back((oldest.peer, oldest.connection));
        }
        self.unproved.push_back(new);
    }

    /// The next connection whose time to prove something is over.
    fn overdue(&mut self, context: &mut Context<'_>) -> Option<(PeerId, ConnectionId)> {
        loop {
            if let Some(closing) = self.closing.pop_front() {
                return Some(closing);
            }
            let since = self.unproved.front()?.since;
            if since.elapsed() < PROOF_TIME {
                let due = self.due.get_or_insert_with(|| Box::pin(tokio::time::sleep(PROOF_TIME)));
                due.as_mut().reset(since + PROOF_TIME);
                if due.as_mut().poll(context).is_pending() {
                    return None;
                }
            }
            let oldest = self.unproved.pop_front()?;
            if self.gate.is_unproved(&oldest.id) {
                return Some((oldest.peer, oldest.connection));
            }
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
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pending.remove(&connection);
        self.check(connection, peer, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(connection, peer, remote)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            // Comes for what was denied as well, by this or another behaviour.
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => {
                self.pending.remove(&connection_id);
                self.unproved.retain(|other| other.connection != connection_id);
            }
            FromSwarm::DialFailure(DialFailure { connection_id, .. })
            | FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.unproved.retain(|other| other.connection != connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        match self.overdue(context) {
            Some((peer_id, connection)) => {
                let connection = CloseConnection::One(connection);
                Poll::Ready(ToSwarm::CloseConnection { peer_id, connection })
            }
            None => Poll::Pending,
        }
    }
}

impl fmt::Display for NotTrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "not among the peers that this node trusts (`network.peers`)",
            Self::Denied => "denied by this node's `network.deny`",
        })
    }
}

impl std::error::Error for NotTrusted {}

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many connections from its address prove no identity")
    }
}

impl std::error::Error for TooMany {}
