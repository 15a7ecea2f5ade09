//! The task that owns the libp2p swarm: connections, their messages, and dialling.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use libp2p::request_response::{self, OutboundFailure, OutboundRequestId};
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId as P2pId, ping, tcp, tls, yamux};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::behaviour::{Behaviour, BehaviourEvent};
use super::bootstrap::{Bootstrap, Target};
use super::codec::Request;
use super::inventory::{INVENTORY_LIMIT, Snapshot};
use super::lookup::Names;
use super::message::{Hello, Message, Position, State, clean};
use super::view::{Known, Shared, Subject, reachable};
use super::{Announcement, Parts};
use crate::network::identity::{Identity, peer_id};
use crate::network::metrics::{Answer, Direction, InventoryLabels, Kind, Metrics, TagLabels};
use crate::network::{Config, Peer, ResolveError, TagSource};
use crate::oci::{Action, Descriptor, PeerId, Reference};

mod dialing;

/// Changes that come within it go into one message.
const COALESCE: Duration = Duration::from_millis(50);
/// Wait after a message that failed or led nowhere.
const RETRY: Duration = Duration::from_secs(1);
/// TCP, TLS and yamux together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections stay: the ping decides when one is dead. libp2p has no "never".
const IDLE_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Questions about tags that wait for one peer's answer.
const QUESTIONS: usize = 64;
/// How long the record and the inventory of a peer that went away are kept for its return.
const MEMORY: Duration = Duration::from_secs(600);
/// How often what is too old is dropped, and failed listeners are tried again.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// A connection without an answered ping for so long is dead: pings go every second and a live peer answers within a
/// round trip.
const SILENCE: Duration = Duration::from_secs(3);
/// How often that is looked at.
const LIVENESS: Duration = Duration::from_millis(500);
/// Time for the farewell to reach the peers.
const FAREWELL: Duration = Duration::from_millis(500);

pub(super) enum Command {
    Resolve { peer: PeerId, name: Reference, reply: Reply },
    Shutdown,
}

type Reply = oneshot::Sender<Result<Option<Descriptor>, ResolveError>>;
type LookupDone = (Target, Vec<Result<Vec<SocketAddr>, (String, String)>>);

pub(super) struct Driver {
    swarm: libp2p::Swarm<Behaviour>,
    shared: Arc<Shared>,
    tags: Arc<dyn TagSource>,
    metrics: Metrics,
    announcement: Announcement,
    /// Claimed control addresses of this node besides those it listens at.
    advertise: Vec<SocketAddr>,
    /// Addresses to listen at, and whether one does.
    listen: Vec<(SocketAddr, Option<libp2p::core::transport::ListenerId>)>,
    links: HashMap<P2pId, Link>,
    questions: HashMap<OutboundRequestId, (P2pId, Reply)>,
    bootstrap: Bootstrap,
    dials: HashMap<ConnectionId, (Target, Option<SocketAddr>)>,
    names: Arc<dyn Names>,
    lookups: JoinSet<LookupDone>,
    flush: Option<Instant>,
    housekeeping: Instant,
    liveness: Instant,
}

/// A connection of a peer.
struct Connection {
    /// The address at the other end.
    ip: Option<IpAddr>,
    /// When a ping was answered last.
    alive: Instant,
}

/// A connected peer.
struct Link {
    id: PeerId,
    connections: HashMap<ConnectionId, Connection>,
    /// The one message that is on its way to it.
    flight: Option<(OutboundRequestId, Flight)>,
    /// Whether it answered a greeting that told the present state.
    greeted: bool,
    /// What it has of this node's inventory.
    has: Position,
    /// The whole inventory on its way, and the next page.
    whole: Option<(Snapshot, u32)>,
    /// It does not want to hear of inventories.
    denied: bool,
    /// Nothing is sent before.
    next: Option<Instant>,
    questions: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flight {
    Hello,
    Page { number: u32, last: bool, to: u64 },
    Change { to: u64 },
    Leaving,
}

impl Driver {
    pub(super) fn new(
        identity: &Identity,
        config: &Config,
        announcement: &Announcement,
        parts: Parts,
        shared: Arc<Shared>,
        names: Arc<dyn Names>,
    ) -> Result<Self, String> {
        let behaviour = Behaviour::new(parts.gate);
        let swarm = libp2p::SwarmBuilder::with_existing_identity(identity.keypair().clone())
            .with_tokio()
            .with_tcp(tcp::Config::new().nodelay(true), tls::Config::new, yamux::Config::default)
            .map_err(|error| error.to_string())?
            .with_behaviour(|_| behaviour)
            .map_err(|error| error.to_string())?
            .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_TIMEOUT))
            .with_connection_timeout(CONNECT_TIMEOUT)
            .build();
        let announcement = Announcement {
            transfer: announcement.transfer.clone(),
            node: clean(&announcement.node),
            zone: clean(&announcement.zone),
            version: clean(&announcement.version),
        };
        let mut driver = Self {
            swarm,
            shared,
            tags: parts.tags,
            metrics: parts.metrics,
            announcement,
            advertise: config.advertise.clone(),
            listen: config.listen.iter().map(|address| (*address, None)).collect(),
            links: HashMap::new(),
            questions: HashMap::new(),
            bootstrap: Bootstrap::new(),
            dials: HashMap::new(),
            names,
            lookups: JoinSet::new(),
            flush: None,
            housekeeping: Instant::now() + HOUSEKEEPING,
            liveness: Instant::now() + LIVENESS,
        };
        driver.listen();
        driver.configure(&config.peers, &config.dns);
        Ok(driver)
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let shared = Arc::clone(&self.shared);
        loop {
            let due = self.next_due();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = commands.recv() => match command {
                    Some(Command::Resolve { peer, name, reply }) => self.ask(&peer, name, reply),
                    Some(Command::Shutdown) => return self.leave().await,
                    None => return,
                },
                () = shared.wake.notified() => self.on_orders(),
                Some(done) = self.lookups.join_next(), if !self.lookups.is_empty() => self.on_lookup(done),
                () = tokio::time::sleep_until(due) => self.on_time(),
            }
        }
    }

    fn next_due(&self) -> Instant {
        let waiting = self.links.values().filter(|link| link.flight.is_none()).filter_map(|link| link.next);
        let times = [self.flush, self.bootstrap.next_due()].into_iter().flatten();
        let first = times.chain(waiting).fold(self.housekeeping, Instant::min);
        if self.links.is_empty() { first } else { first.min(self.liveness) }
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if self.flush.is_some_and(|flush| flush <= now) {
            self.flush = None;
            self.push_all();
        }
        let mut waiting = Vec::new();
        for (peer, link) in &mut self.links {
            if link.next.is_some_and(|next| next <= now) {
                link.next = None;
                waiting.push(*peer);
            }
        }
        for peer in waiting {
            self.push(peer);
        }
        self.start_lookups(now);
        if self.liveness <= now {
            self.close_dead(now);
        }
        if self.housekeeping <= now {
            self.housekeeping = now + HOUSEKEEPING;
            self.listen();
            let old = |known: &Known| known.gone.is_some_and(|gone| now - gone > MEMORY);
            for known in self.shared.peers_mut().values_mut().filter(|known| old(known)) {
                known.held = Default::default();
            }
            let pinned: Vec<PeerId> = self.bootstrap.peers().map(|(id, _)| id.clone()).collect();
            self.shared.peers_mut().retain(|id, known| pinned.contains(id) || !old(known));
        }
    }

    fn on_orders(&mut self) {
        let orders = self.shared.take_orders();
        if let Some((peers, dns)) = orders.configure {
            self.configure(&peers, &dns);
        }
        if orders.recheck {
            self.recheck();
        }
        if orders.advertised && self.flush.is_none() {
            self.flush = Some(Instant::now() + COALESCE);
        }
    }

    /// The gate answers differently: connections go, and what was refused before is asked for again.
    fn recheck(&mut self) {
        self.shared.forget_problems(|subject| matches!(subject, Subject::Refused(_)));
        let gate = Arc::clone(&self.shared.gate);
        let mut closed = Vec::new();
        for (peer, link) in &mut self.links {
            if gate.allows(&link.id, Action::Connect) {
                link.greeted = false;
                link.denied = false;
                link.whole = None;
            } else {
                closed.push(*peer);
            }
        }
        for (id, known) in self.shared.peers_mut().iter_mut() {
            if !gate.allows(id, Action::Believe) {
                known.held = Default::default();
            }
        }
        for peer in closed {
            if let Some(link) = self.links.get(&peer) {
                tracing::info!(peer = %link.id, "closing the connection: the peer is no longer trusted");
            }
            // An error is a peer whose connections are gone already.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        self.push_all();
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Control(event)) => self.on_control(event),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event { peer, connection, result })) => {
                let link = self.links.get_mut(&peer);
                let connection = link.and_then(|link| link.connections.get_mut(&connection));
                if let (Ok(_), Some(connection)) = (result, connection) {
                    connection.alive = Instant::now();
                }
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connected(peer_id, connection_id, endpoint.get_remote_address());
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                let cause = cause.map_or_else(|| "closed".to_owned(), |cause| cause.to_string());
                self.on_disconnected(peer_id, connection_id, &cause);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, peer_id, .. } => {
                self.on_refused(&send_back_addr, &error, peer_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_failed(connection_id, peer_id, &error);
            }
            SwarmEvent::NewListenAddr { .. } | SwarmEvent::ExpiredListenAddr { .. } => self.on_listening(),
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                self.on_listener_closed(listener_id, reason.err());
            }
            other => tracing::trace!(?other, "event"),
        }
    }

    fn on_connected(&mut self, peer: P2pId, connection: ConnectionId, remote: &Multiaddr) {
        let Some(id) = peer_id(&peer) else {
            self.swarm.close_connection(connection);
            return;
        };
        let dialed = self.dials.remove(&connection).and_then(|_| dialing::socket(remote));
        self.bootstrap.connected(&id, dialed);
        if let Some(address) = dialed {
            self.shared.problem(Subject::Address(address), None);
        }
        self.shared.problem(Subject::Peer(id.clone()), None);
        self.shared.forget_problems(|subject| *subject == Subject::Refused(id.clone()));
        let ip = dialing::socket(remote).map(|address| address.ip());
        let first = !self.links.contains_key(&peer);
        let link = self.links.entry(peer).or_insert_with(|| Link {
            id: id.clone(),
            connections: HashMap::new(),
            flight: None,
            greeted: false,
            has: Position::default(),
            whole: None,
            denied: false,
            next: None,
            questions: 0,
        });
        link.connections.insert(connection, Connection { ip, alive: Instant::now() });
        if first {
            tracing::info!(peer = %id, "connected");
            self.metrics.peers.inc();
            let mut peers = self.shared.peers_mut();
            let known = peers.entry(id).or_default();
            (known.connected, known.leaving, known.gone) = (true, false, None);
        } else {
            // The other end may have started anew while the old connection was not known to be dead.
            link.greeted = false;
        }
        self.push(peer);
    }

    fn on_disconnected(&mut self, peer: P2pId, connection: ConnectionId, cause: &str) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        if link.connections.remove(&connection).is_none() || !link.connections.is_empty() {
            return;
        }
        let id = link.id.clone();
        self.links.remove(&peer);
        self.metrics.peers.dec();
        tracing::info!(peer = %id, cause, "disconnected");
        let now = Instant::now();
        let leaving = {
            let mut peers = self.shared.peers_mut();
            let known = peers.entry(id.clone()).or_default();
            (known.connected, known.gone) = (false, Some(now));
            known.leaving
        };
        self.bootstrap.disconnected(&id, now);
        self.shared.forget_problems(|subject| *subject == Subject::Conduct(id.clone()));
        if self.bootstrap.peers().any(|(pinned, _)| *pinned == id) {
            let text = if leaving { "it was shut down".to_owned() } else { format!("disconnected: {cause}") };
            self.shared.problem(Subject::Peer(id.clone()), Some(format!("peer {id}: {text}")));
        }
        let unanswered: Vec<_> = self
            .questions
            .iter()
            .filter(|(_, (asked, _))| *asked == peer)
            .map(|(question, _)| *question)
            .collect();
        for question in unanswered {
            self.answered(question, Err(ResolveError::Unreachable("the connection was lost".into())));
        }
    }

    /// Closes connections that fell silent. They count as gone at once: to close one in order takes the other end.
    fn close_dead(&mut self, now: Instant) {
        // Where this node itself stood still (stopped, starved), silence says nothing about the others.
        let stood_still = now - self.liveness > LIVENESS;
        self.liveness = now + LIVENESS;
        let mut dead = Vec::new();
        for (peer, link) in &mut self.links {
            for (id, connection) in &mut link.connections {
                if stood_still {
                    connection.alive = now;
                } else if now - connection.alive > SILENCE {
                    dead.push((*peer, *id));
                }
            }
        }
        for (peer, connection) in dead {
            self.swarm.close_connection(connection);
            self.on_disconnected(peer, connection, "it does not answer");
        }
    }

    fn on_control(&mut self, event: request_response::Event<Request, Message>) {
        match event {
            request_response::Event::Message { peer, connection_id, message } => match message {
                // Dropping the channel resets the stream.
                request_response::Message::Request { request: Err(error), .. } => self.broke(peer, &error),
                request_response::Message::Request { request: Ok(request), channel, .. } => {
                    let answer = self.on_request(peer, connection_id, request);
                    // An error is a peer that does not wait any more.
                    let _ = self.swarm.behaviour_mut().control.send_response(channel, answer);
                    self.push(peer);
                }
                request_response::Message::Response { request_id, response } => {
                    self.on_answer(peer, request_id, response);
                }
            },
            request_response::Event::OutboundFailure { peer, request_id, error, .. } => {
                self.on_unanswered(peer, request_id, &error);
            }
            request_response::Event::InboundFailure { .. } | request_response::Event::ResponseSent { .. } => {
            }
        }
    }

    fn broke(&self, peer: P2pId, error: &str) {
        self.metrics.broken.inc();
        if let Some(id) = peer_id(&peer) {
            let text = format!("peer {id}: its message cannot be read: {error}");
            self.shared.problem(Subject::Conduct(id), Some(text));
        }
    }

    fn on_request(&mut self, peer: P2pId, connection: ConnectionId, request: Message) -> Message {
        let Some(link) = self.links.get_mut(&peer) else { return Message::Denied };
        let id = link.id.clone();
        let gate = &self.shared.gate;
        match request {
            Message::Hello(hello) => {
                if link.flight.is_none() || !link.greeted {
                    link.has = hello.have;
                }
                link.denied = false;
                // The address of the connection that speaks comes first.
                let speaks = link.connections.get(&connection).and_then(|connection| connection.ip);
                let mut seen: Vec<IpAddr> = speaks.into_iter().collect();
                for ip in link.connections.values().filter_map(|connection| connection.ip) {
                    if !seen.contains(&ip) {
                        seen.push(ip);
                    }
                }
                self.bootstrap.learn(&id, reachable(&seen, &hello.control));
                let record = Peer {
                    id: id.clone(),
                    transfer: reachable(&seen, &hello.transfer),
                    node: hello.node,
                    zone: hello.zone,
                    version: hello.version,
                };
                let mut peers = self.shared.peers_mut();
                let known = peers.entry(id).or_default();
                known.held.incarnation(hello.incarnation);
                known.leaving = false;
                known.peer = Some(Arc::new(record));
                Message::State(known.held.state())
            }
            Message::Inventory(inventory) => {
                if !gate.allows(&id, Action::Believe) {
                    return Message::Denied;
                }
                let kind = if inventory.page.is_some() { Kind::Whole } else { Kind::Change };
                let labels = InventoryLabels { direction: Direction::Received, kind };
                self.metrics.inventory.get_or_create(&labels).inc();
                let (state, excess) = {
                    let mut peers = self.shared.peers_mut();
                    let known = peers.entry(id.clone()).or_default();
                    let state = known.held.apply(inventory, INVENTORY_LIMIT);
                    (state, known.held.excess)
                };
                if excess {
                    let text = format!(
                        "peer {id}: it claims more than {INVENTORY_LIMIT} digests; the rest is ignored"
                    );
                    self.shared.problem(Subject::Conduct(id), Some(text));
                }
                Message::State(state)
            }
            Message::Resolve(name) => {
                let (answer, message) = if !gate.allows(&id, Action::Tags) {
                    (Answer::Denied, Message::Denied)
                } else {
                    let found = self.tags.tag(&id, &name);
                    (if found.is_some() { Answer::Found } else { Answer::Unknown }, Message::Resolved(found))
                };
                self.metrics.tags.get_or_create(&TagLabels { answer }).inc();
                message
            }
            Message::Leaving => {
                let mut peers = self.shared.peers_mut();
                let known = peers.entry(id).or_default();
                known.leaving = true;
                known.held = Default::default();
                Message::State(State::default())
            }
            Message::State(_) | Message::Resolved(_) | Message::Denied => {
                self.broke(peer, "an answer instead of a request");
                Message::Denied
            }
        }
    }

    fn on_answer(&mut self, peer: P2pId, request: OutboundRequestId, answer: Message) {
        if self.questions.contains_key(&request) {
            let answer = match answer {
                Message::Resolved(found) => Ok(found),
                Message::Denied => Err(ResolveError::Denied),
                _ => Err(ResolveError::Unreachable("it broke the protocol".into())),
            };
            return self.answered(request, answer);
        }
        let Some(link) = self.links.get_mut(&peer) else { return };
        let Some((_, flight)) = link.flight.take_if(|(sent, _)| *sent == request) else { return };
        match answer {
            Message::State(state) => {
                link.has = state.have;
                let incarnation = self.shared.own().position().incarnation;
                let reached = |to| state.have == Position { incarnation, version: to };
                let fits = match flight {
                    Flight::Hello => {
                        link.greeted = true;
                        true
                    }
                    Flight::Page { number, last, to } => {
                        let fits = if last { reached(to) } else { state.pages == number + 1 };
                        match &mut link.whole {
                            Some((_, page)) if fits && !last => *page = number + 1,
                            _ => link.whole = None,
                        }
                        fits
                    }
                    Flight::Change { to } => reached(to),
                    Flight::Leaving => true,
                };
                if !fits {
                    link.next = Some(Instant::now() + RETRY);
                }
            }
            Message::Denied => {
                link.denied = true;
                link.whole = None;
            }
            _ => {
                link.next = Some(Instant::now() + RETRY);
                self.broke(peer, "a wrong answer");
            }
        }
        self.push(peer);
    }

    fn on_unanswered(&mut self, peer: P2pId, request: OutboundRequestId, error: &OutboundFailure) {
        if let OutboundFailure::Io(error) = error
            && error.kind() == std::io::ErrorKind::InvalidData
        {
            self.broke(peer, &error.to_string());
        }
        if self.questions.contains_key(&request) {
            let error = match error {
                OutboundFailure::Timeout => ResolveError::Timeout,
                other => ResolveError::Unreachable(other.to_string().to_lowercase()),
            };
            return self.answered(request, Err(error));
        }
        let Some(link) = self.links.get_mut(&peer) else { return };
        if link.flight.take_if(|(sent, _)| *sent == request).is_none() {
            return;
        }
        tracing::debug!(peer = %link.id, %error, "a message was not answered");
        link.greeted = false;
        link.whole = None;
        link.next = Some(Instant::now() + RETRY);
        if let OutboundFailure::UnsupportedProtocols = error {
            let text = format!("peer {}: it does not speak {}", link.id, super::codec::PROTOCOL);
            self.shared.problem(Subject::Conduct(link.id.clone()), Some(text));
        }
    }

    fn push_all(&mut self) {
        let peers: Vec<P2pId> = self.links.keys().copied().collect();
        for peer in peers {
            self.push(peer);
        }
    }

    /// Sends `peer` the next thing that it does not know, unless a message is on its way.
    fn push(&mut self, peer: P2pId) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        if link.flight.is_some() || link.next.is_some() {
            return;
        }
        let (message, flight) = if !link.greeted {
            let have = self.shared.peers().get(&link.id).map(|known| known.held.state().have);
            let hello = Hello {
                incarnation: self.shared.own().position().incarnation,
                node: self.announcement.node.clone(),
                zone: self.announcement.zone.clone(),
                version: self.announcement.version.clone(),
                transfer: self.announcement.transfer.clone(),
                control: dialing::control_addresses(&self.swarm, &self.advertise),
                have: have.unwrap_or_default(),
            };
            (Message::Hello(hello), Flight::Hello)
        } else if link.denied || !self.shared.gate.allows(&link.id, Action::Serve) {
            return;
        } else {
            let mut own = self.shared.own();
            let position = own.position();
            let change = match &link.whole {
                None if link.has == position => return,
                None if link.has.incarnation == position.incarnation => own.since(link.has.version),
                _ => None,
            };
            if let Some(change) = change {
                let to = change.to;
                (Message::Inventory(change), Flight::Change { to })
            } else {
                let (snapshot, number) = link.whole.get_or_insert_with(|| (own.snapshot(), 0));
                let page = snapshot.page(position.incarnation, *number);
                let flight = Flight::Page { number: *number, last: page.last, to: page.to };
                (Message::Inventory(page), flight)
            }
        };
        let kind = match flight {
            Flight::Page { .. } => Some(Kind::Whole),
            Flight::Change { .. } => Some(Kind::Change),
            Flight::Hello | Flight::Leaving => None,
        };
        if let Some(kind) = kind {
            let labels = InventoryLabels { direction: Direction::Sent, kind };
            self.metrics.inventory.get_or_create(&labels).inc();
        }
        let request = self.swarm.behaviour_mut().control.send_request(&peer, Ok(message));
        link.flight = Some((request, flight));
    }

    fn ask(&mut self, peer: &PeerId, name: Reference, reply: Reply) {
        let link = peer.as_str().parse::<P2pId>().ok().and_then(|id| Some((id, self.links.get_mut(&id)?)));
        let refused = match link {
            None => ResolveError::Unreachable("it is not connected".into()),
            Some((_, link)) if link.questions >= QUESTIONS => {
                ResolveError::Unreachable("too many questions wait for its answer".into())
            }
            Some((id, link)) => {
                link.questions += 1;
                let question =
                    self.swarm.behaviour_mut().control.send_request(&id, Ok(Message::Resolve(name)));
                self.questions.insert(question, (id, reply));
                return;
            }
        };
        // The asker may have gone.
        let _ = reply.send(Err(refused));
    }

    fn answered(&mut self, question: OutboundRequestId, answer: Result<Option<Descriptor>, ResolveError>) {
        let Some((peer, reply)) = self.questions.remove(&question) else { return };
        if let Some(link) = self.links.get_mut(&peer) {
            link.questions = link.questions.saturating_sub(1);
        }
        // The asker may have gone.
        let _ = reply.send(answer);
    }

    /// Tells all peers, waits until they know, or not for long.
    async fn leave(mut self) {
        let mut waiting = HashSet::new();
        for (peer, link) in &mut self.links {
            let request = self.swarm.behaviour_mut().control.send_request(peer, Ok(Message::Leaving));
            link.flight = Some((request, Flight::Leaving));
            waiting.insert(request);
        }
        let farewell = async {
            while !waiting.is_empty() {
                if let SwarmEvent::Behaviour(BehaviourEvent::Control(
                    request_response::Event::Message {
                        message: request_response::Message::Response { request_id, .. },
                        ..
                    }
                    | request_response::Event::OutboundFailure { request_id, .. },
                )) = self.swarm.select_next_some().await
                {
                    waiting.remove(&request_id);
                }
            }
        };
        // Who has not heard it sees the connection close.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

impl Drop for Driver {
    /// The view outlives the task in the handles; nobody is there any more.
    fn drop(&mut self) {
        for known in self.shared.peers_mut().values_mut() {
            *known = Known::default();
        }
        self.shared.listening().clear();
        self.metrics.peers.set(0);
    }
}
