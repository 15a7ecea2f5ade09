//! Opens the gossip's streams on connections, and takes those that others open. What is said on them is `stream`'s.
//!
//! libp2p-stream would do the same; it drops streams that are opened while another waits to be taken, as when all nodes of a
//! cluster start at once. Here those wait, and libp2p asks their connection for no more meanwhile.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
    NotifyHandler, StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent,
    ToSwarm,
};
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol};

use super::codec::either;

/// Streams of one connection that wait to be taken; each peer opens one.
const WAITING: usize = 4;

/// A stream, or none.
#[derive(Debug)]
pub(super) enum Event {
    /// The peer has opened one.
    Incoming(Stream),
    /// This node has, as it was told to.
    Opened(Stream),
    /// It could not.
    Failed(String),
}

/// Connections on which a stream is to be opened.
pub(super) struct Behaviour {
    protocols: Vec<StreamProtocol>,
    queue: VecDeque<ToSwarm<(PeerId, Event), Open>>,
}

impl Behaviour {
    /// `protocols`: the names that are spoken, the best first.
    pub(super) fn new(protocols: Vec<StreamProtocol>) -> Self {
        Self { protocols, queue: VecDeque::new() }
    }

    /// Opens a stream on a connection. An event says what came of it, unless the connection is closed before.
    pub(super) fn open(&mut self, peer: PeerId, connection: ConnectionId) {
        let handler = NotifyHandler::One(connection);
        self.queue.push_back(ToSwarm::NotifyHandler { peer_id: peer, handler, event: Open });
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = (PeerId, Event);

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(self.protocols.clone()))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(self.protocols.clone()))
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(&mut self, peer: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        self.queue.push_back(ToSwarm::GenerateEvent((peer, event)));
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.queue.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}

/// The order to open a stream.
#[derive(Debug)]
pub(super) struct Open;

/// The streams of one connection.
pub(super) struct Handler {
    protocols: Vec<StreamProtocol>,
    queue: VecDeque<ConnectionHandlerEvent<Offer, (), Event>>,
}

impl Handler {
    fn new(protocols: Vec<StreamProtocol>) -> Self {
        Self { protocols, queue: VecDeque::new() }
    }

    fn substream(&self) -> SubstreamProtocol<Offer, ()> {
        SubstreamProtocol::new(Offer(self.protocols.clone()), ())
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = Event;
    type InboundProtocol = Offer;
    type OutboundProtocol = Offer;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, ()> {
        self.substream()
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), Self::ToBehaviour>> {
        self.queue.pop_front().map_or(Poll::Pending, Poll::Ready)
    }

    fn on_behaviour_event(&mut self, Open: Open) {
        let protocol = self.substream();
        self.queue.push_back(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), ()>,
    ) {
        let told = match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: stream, .. })
                if self.queue.len() < WAITING =>
            {
                Event::Incoming(stream)
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream, ..
            }) => Event::Opened(stream),
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                Event::Failed(describe(error, &self.protocols))
            }
            _ => return,
        };
        self.queue.push_back(ConnectionHandlerEvent::NotifyBehaviour(told));
    }
}

/// A stream as it is, once one of these names is agreed on.
pub(super) struct Offer(Vec<StreamProtocol>);

impl UpgradeInfo for Offer {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl<S> InboundUpgrade<S> for Offer {
    type Output = S;
    type Error = Infallible;
    type Future = Ready<Result<S, Infallible>>;

    fn upgrade_inbound(self, stream: S, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

impl<S> OutboundUpgrade<S> for Offer {
    type Output = S;
    type Error = Infallible;
    type Future = Ready<Result<S, Infallible>>;

    fn upgrade_outbound(self, stream: S, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

fn describe(error: StreamUpgradeError<Infallible>, protocols: &[StreamProtocol]) -> String {
    match error {
        StreamUpgradeError::Timeout => format!("it did not answer to {} in time", either(protocols)),
        StreamUpgradeError::NegotiationFailed => {
            format!("it does not speak {}; what version is it?", either(protocols))
        }
        StreamUpgradeError::Io(error) => error.to_string(),
        StreamUpgradeError::Apply(never) => match never {},
    }
}
