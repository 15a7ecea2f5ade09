//! The task that owns the libp2p swarm: connections, their messages, and dialling.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use libp2p::request_response::OutboundRequestId;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId as P2pId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::behaviour::{Behaviour, BehaviourEvent, STREAMS, socket};
use super::bootstrap::{Bootstrap, Target};
use super::lookup::Names;
use super::notary::member_key;
use super::stream;
use super::transport::transport;
use super::view::{Known, Shared, Subject};
use super::{Announcement, Parts};
use crate::network::claim::clean;
use crate::network::facts::Facts;
use crate::network::gossip::members::State;
use crate::network::gossip::{LinkId, Ms, NEIGHBOURS_LIMIT};
use crate::network::identity::{Identity, peer_id};
use crate::network::metrics::Metrics;
use crate::network::{Config, Peer, ResolveError, TagSource};
use crate::oci::{Action, Digest, PeerId};

mod dialing;
mod exchange;
mod hints;
mod keeping;
mod neighbours;
mod proof;

pub(super) use exchange::{Question, Reply};

/// Wait after a message that failed or led nowhere.
const RETRY: Duration = Duration::from_secs(1);
/// TCP, TLS and yamux together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections stay: libp2p would close those of quiet neighbours, and has no "never".
const IDLE_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Peers that are connected: of more, those that are no neighbours are let go when they have been there for so long.
const LINKS: usize = 2 * NEIGHBOURS_LIMIT;
const VISIT: Duration = Duration::from_secs(60);
/// Questions about tags on their way to one peer: with the one message besides, half of the streams that a connection
/// may have. The rest is the peer's.
const QUESTIONS: usize = STREAMS / 2 - 1;
/// Questions that wait for one of those to be answered; more fail at once.
const WAITING: usize = 64;
/// How long a peer that went away is shown.
const MEMORY: Duration = Duration::from_secs(600);
/// How long, and how many, peers that were refused are shown after their last attempt.
const REFUSED_MEMORY: Duration = Duration::from_secs(120);
const REFUSED_LIMIT: usize = 64;
/// Two processes with one identity refute each other every second; where that has ended, it is shown for so long.
const TWINS_MEMORY: Duration = Duration::from_secs(10);
/// How often what is too old is dropped, and failed listeners are tried again.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// Time for the farewell to reach the peers.
const FAREWELL: Duration = Duration::from_millis(500);
/// Time for the peers to read it before the connections close.
const READING: Duration = Duration::from_millis(50);

pub(super) enum Command {
    Ask {
        peer: PeerId,
        question: Question,
        reply: Reply,
    },
    /// Whoever knows all is asked.
    Find {
        digest: Digest,
        reply: oneshot::Sender<Result<Vec<Arc<Peer>>, ResolveError>>,
    },
    Shutdown,
}

type LookupDone = (Target, Vec<Result<Vec<SocketAddr>, (String, String)>>);

pub(super) struct Driver {
    swarm: libp2p::Swarm<Behaviour>,
    shared: Arc<Shared>,
    tags: Arc<dyn TagSource>,
    metrics: Metrics,
    announcement: Announcement,
    facts: Facts,
    /// Claimed control addresses of this node besides those it listens at.
    advertise: Vec<SocketAddr>,
    /// Addresses to listen at, and whether one does.
    listen: Vec<(SocketAddr, Option<libp2p::core::transport::ListenerId>)>,
    /// Addresses at which neighbours see this node and that are this machine's.
    own_ips: Vec<IpAddr>,
    links: HashMap<P2pId, Link>,
    questions: HashMap<OutboundRequestId, (P2pId, Reply)>,
    /// Questions for members to whom a connection is on its way.
    unasked: HashMap<P2pId, Vec<(Question, Reply)>>,
    neighbours: HashMap<LinkId, neighbours::Neighbour>,
    next_link: LinkId,
    events: mpsc::Sender<stream::Event>,
    from_streams: mpsc::Receiver<stream::Event>,
    farewells: JoinSet<()>,
    gossip_due: Ms,
    /// Identities that two processes have, and when that was seen last.
    twins: HashMap<PeerId, Instant>,
    bootstrap: Bootstrap,
    /// Hints of a lease are not followed before.
    next_hint: Instant,
    dials: HashMap<ConnectionId, (Target, Option<SocketAddr>)>,
    names: Arc<dyn Names>,
    lookups: JoinSet<LookupDone>,
    /// Questions to this node as the home of a tag.
    at_home: JoinSet<exchange::AtHome>,
    /// Peers that are not trusted, and when they tried last.
    refused: HashMap<PeerId, Instant>,
    housekeeping: Instant,
    keeping: keeping::Keeping,
}

/// A connected peer.
struct Link {
    id: PeerId,
    /// And the address at the other end of each. The last is the newest.
    connections: BTreeMap<ConnectionId, Option<IpAddr>>,
    /// Where the gossip's stream is being opened.
    opening: Option<ConnectionId>,
    /// Since when it is connected.
    since: Instant,
    /// The one message that is on its way to it.
    flight: Option<(OutboundRequestId, Flight)>,
    /// Whether this node dialled one of the connections, for more than a question.
    dialed: bool,
    /// Whether it heard who this is.
    greeted: bool,
    /// The greeting that is on its way tells no longer the present state.
    outdated: bool,
    /// Whether it answered this node's certificate, which is all that it is told before it shows its own.
    introduced: bool,
    /// Whether it was a member once.
    proved: bool,
    /// When a certificate that it showed was refused last.
    refused: Option<Instant>,
    /// Nothing is sent before.
    next: Option<Instant>,
    questions: usize,
    /// Questions that are not sent yet.
    waiting: VecDeque<(Question, Reply)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flight {
    Introduction,
    Hello,
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
        let transport = transport(identity)?;
        let swarm = libp2p::SwarmBuilder::with_existing_identity(identity.keypair().clone())
            .with_tokio()
            .with_other_transport(|_| transport)
            .map_err(|error| error.to_string())?
            .with_behaviour(|_| behaviour)
            .map_err(|error| error.to_string())?
            .with_swarm_config(|config| {
                config
                    .with_idle_connection_timeout(IDLE_TIMEOUT)
                    .with_max_negotiating_inbound_streams(STREAMS)
            })
            .with_connection_timeout(CONNECT_TIMEOUT)
            .build();
        let announcement = Announcement {
            transfer: announcement.transfer.clone(),
            node: clean(&announcement.node),
            zone: clean(&announcement.zone),
            version: clean(&announcement.version),
        };
        let first = parts.first;
        let (events, from_streams) = mpsc::channel(stream::EVENTS);
        let mut driver = Self {
            swarm,
            shared,
            tags: parts.tags,
            metrics: parts.metrics,
            announcement,
            facts: Facts::default(),
            advertise: config.advertise.clone(),
            listen: config.listen.iter().map(|address| (*address, None)).collect(),
            links: HashMap::new(),
            own_ips: Vec::new(),
            questions: HashMap::new(),
            unasked: HashMap::new(),
            neighbours: HashMap::new(),
            next_link: 0,
            events,
            from_streams,
            farewells: JoinSet::new(),
            gossip_due: 0,
            twins: HashMap::new(),
            bootstrap: Bootstrap::new(),
            next_hint: Instant::now(),
            dials: HashMap::new(),
            names,
            lookups: JoinSet::new(),
            at_home: JoinSet::new(),
            refused: HashMap::new(),
            housekeeping: Instant::now() + HOUSEKEEPING,
            keeping: keeping::Keeping::new(parts.keep),
        };
        driver.keeping.restore(&driver.shared);
        if let Some(first) = first {
            driver.shared.dial_first(&first(driver.shared.members(true)));
        }
        driver.listen();
        driver.amend();
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
                    Some(Command::Ask { peer, question, reply }) => self.ask(&peer, question, reply),
                    Some(Command::Find { digest, reply }) => self.find(digest, reply),
                    Some(Command::Shutdown) => return self.leave().await,
                    None => return,
                },
                Some(event) = self.from_streams.recv() => self.on_stream(event),
                () = shared.wake.notified() => self.on_orders(),
                Some(done) = self.lookups.join_next(), if !self.lookups.is_empty() => self.on_lookup(done),
                Some(done) = self.at_home.join_next(), if !self.at_home.is_empty() => self.on_home(done),
                () = tokio::time::sleep_until(due) => self.on_time(),
            }
        }
    }

    fn next_due(&self) -> Instant {
        let waiting = self.links.values().filter(|link| link.flight.is_none()).filter_map(|link| link.next);
        let first =
            self.bootstrap.next_due().into_iter().chain(waiting).fold(self.housekeeping, Instant::min);
        let hint = self.hint_due(Instant::now());
        first.min(self.gossip_due()).min(hint.unwrap_or(first))
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if self.gossip_due() <= now {
            self.turn();
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
        self.step(now);
        self.follow_hints(now);
        if self.housekeeping <= now {
            self.housekeeping = now + HOUSEKEEPING;
            self.keep_house(now);
        }
    }

    fn on_orders(&mut self) {
        let orders = self.shared.take_orders();
        if let Some((peers, dns)) = orders.configure {
            self.configure(&peers, &dns);
        }
        if let Some(facts) = orders.facts {
            self.facts = facts;
            self.amend();
        }
        if let Some(zone) = orders.zone {
            self.announcement.zone = clean(&zone);
            self.amend();
        }
        if orders.recheck || !orders.recheck_peers.is_empty() {
            self.shared.changed.send_modify(|count| *count += 1);
        }
        if orders.recheck {
            self.recheck();
        } else if !orders.recheck_peers.is_empty() {
            let peers = &orders.recheck_peers;
            self.refused.retain(|id, _| !peers.contains(id));
            self.recheck_links(|id| peers.contains(id));
        }
        self.turn();
    }

    fn keep_house(&mut self, now: Instant) {
        self.listen();
        self.keep(now);
        let pinned: HashSet<PeerId> = self.bootstrap.peers().map(|(id, _)| id.clone()).collect();
        self.shared
            .peers_mut()
            .retain(|id, known| known.gone.is_none_or(|gone| now - gone <= MEMORY) || pinned.contains(id));
        if self.links.len() > LINKS {
            let busy: HashSet<P2pId> = self.neighbours.values().map(|neighbour| neighbour.peer).collect();
            let visit = |link: &Link| link.questions == 0 && now - link.since > VISIT;
            let idle = self.links.iter().filter(|(peer, link)| visit(link) && !busy.contains(peer));
            for peer in idle.map(|(peer, _)| *peer).collect::<Vec<_>>() {
                // An error is a peer whose connections are gone already.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
        }
        // The gossip asks again only whom it knows.
        let unknown: Vec<P2pId> = {
            let view = self.shared.view();
            let members = view.gossip.members();
            self.links.keys().copied().filter(|peer| members.find(member_key(peer)).is_none()).collect()
        };
        for peer in unknown {
            self.open_stream(peer);
        }
        let over = |last: &Instant| now - *last > TWINS_MEMORY;
        for (id, _) in self.twins.extract_if(|_, last| over(last)) {
            self.shared.problem(Subject::Twins(id), None);
        }
        let counts = self.shared.view().gossip.counts();
        self.metrics.gossip(&counts);
        let shared = &self.shared;
        self.refused.retain(|id, last| {
            let recent = now - *last < REFUSED_MEMORY;
            if !recent {
                shared.forget_problems(|subject| *subject == Subject::Refused(id.clone()));
            }
            recent
        });
    }

    /// The gate answers differently: connections go, and what was refused before is asked for again.
    fn recheck(&mut self) {
        self.refused.clear();
        self.bootstrap.hurry(Instant::now());
        self.shared.forget_problems(|subject| matches!(subject, Subject::Refused(_)));
        // The certificate may be another.
        self.amend();
        self.recheck_links(|_| true);
    }

    fn recheck_links(&mut self, concerns: impl Fn(&PeerId) -> bool) {
        let gate = Arc::clone(&self.shared.gate);
        let mut closed = Vec::new();
        for (peer, link) in self.links.iter_mut().filter(|(_, link)| concerns(&link.id)) {
            // A member whose certificate ended may come in again, with a new one.
            let ended = link.proved && gate.is_unproved(&link.id);
            if gate.allows(&link.id, Action::Connect) && !ended {
                link.greet_again();
            } else {
                closed.push(*peer);
            }
        }
        for peer in closed {
            if let Some(link) = self.links.get(&peer) {
                tracing::info!(peer = %link.id, "closing the connection: the peer is no longer trusted");
            }
            // An error is a peer whose connections are gone already.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let concerned = self.links.iter().filter(|(_, link)| concerns(&link.id));
        let peers: Vec<P2pId> = concerned.map(|(peer, _)| *peer).collect();
        for peer in peers {
            self.push(peer);
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Control(event)) => self.on_control(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip((peer, event))) => self.on_gossip(peer, event),
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
                self.on_listener_closed(listener_id, reason.as_ref().err());
            }
            other => tracing::trace!(?other, "event"),
        }
    }

    fn on_connected(&mut self, peer: P2pId, connection: ConnectionId, remote: &Multiaddr) {
        let Some(id) = peer_id(&peer) else {
            self.swarm.close_connection(connection);
            return;
        };
        let target = self.dials.remove(&connection).map(|(target, _)| target);
        let is_question = matches!(target, Some(Target::Member(_))) && self.unasked.contains_key(&peer);
        let dialed = target.and_then(|_| socket(remote));
        self.bootstrap.connected(&id, dialed);
        if let Some(address) = dialed {
            self.shared.problem(Subject::Address(address), None);
        }
        let ip = socket(remote).map(|address| address.ip());
        let link = self.links.entry(peer).or_insert_with(|| Link {
            id,
            connections: BTreeMap::new(),
            opening: None,
            since: Instant::now(),
            flight: None,
            dialed: false,
            greeted: false,
            outdated: false,
            introduced: false,
            proved: false,
            refused: None,
            next: None,
            questions: 0,
            waiting: VecDeque::new(),
        });
        link.connections.insert(connection, ip);
        self.shared.saw(&link.id, link.connections.values().flatten());
        link.dialed |= dialed.is_some() && !is_question;
        // Where there was a connection before, the other end may have started anew while that was not known to be dead.
        link.greet_again();
        self.push(peer);
        for (question, reply) in self.unasked.remove(&peer).unwrap_or_default() {
            if let Some(id) = self.links.get(&peer).map(|link| link.id.clone()) {
                self.ask(&id, question, reply);
            }
        }
    }

    fn on_disconnected(&mut self, peer: P2pId, connection: ConnectionId, cause: &str) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        let Some(removed) = link.connections.remove(&connection) else { return };
        if !link.connections.is_empty() {
            self.shared.saw(&link.id, link.connections.values().flatten());
            if link.opening == Some(connection) {
                link.opening = None;
                self.open_stream(peer);
            }
            return;
        }
        let id = link.id.clone();
        let (proved, refused, from) = (link.proved, link.refused.is_some(), removed);
        let waiting = self.links.remove(&peer).map(|link| link.waiting).unwrap_or_default();
        if !proved && self.shared.gate.is_unproved(&id) {
            self.left_unproved(&id, from, refused);
        }
        for (_, reply) in waiting {
            reply.fail(ResolveError::Unreachable("the connection was lost".into()));
        }
        // What it said before its end counts: it may have taken its leave.
        while let Ok(event) = self.from_streams.try_recv() {
            self.on_stream(event);
        }
        self.end_streams(peer);
        let now = Instant::now();
        let leaving = self.shared.state(&id) == Some(State::Left);
        let greeted = {
            let mut peers = self.shared.peers_mut();
            let known = peers.get_mut(&id).filter(|known| known.connected);
            known.map(|known| (known.connected, known.gone) = (false, Some(now))).is_some()
        };
        if greeted {
            self.metrics.peers.dec();
            tracing::info!(peer = %id, cause, leaving, "disconnected");
        }
        self.bootstrap.disconnected(&id, greeted, now);
        let about =
            [Subject::Conduct(id.clone()), Subject::Gossip(id.clone()), Subject::Certificate(id.clone())];
        self.shared.forget_problems(|subject| about.contains(subject));
        if self.bootstrap.peers().any(|(pinned, _)| *pinned == id) {
            let text = match (greeted, leaving) {
                (true, true) => "it was shut down".to_owned(),
                (true, false) => format!("disconnected: {cause}"),
                (false, _) => {
                    "it closes the connection at once; perhaps it does not trust this node".to_owned()
                }
            };
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

    /// The connections of a peer count as gone at once: to close one in order takes the other end.
    fn lose(&mut self, peer: P2pId, why: &str) {
        let Some(link) = self.links.get(&peer) else { return };
        let connections: Vec<ConnectionId> = link.connections.keys().copied().collect();
        for connection in connections {
            self.swarm.close_connection(connection);
            self.on_disconnected(peer, connection, why);
        }
    }

    /// Asks a neighbour that knows all who holds something.
    fn find(&mut self, digest: Digest, reply: oneshot::Sender<Result<Vec<Arc<Peer>>, ResolveError>>) {
        let reply = Reply::Holders(reply);
        let complete = self.shared.view().gossip.complete_neighbour();
        match complete.and_then(|link| self.neighbours.get(&link)).map(|neighbour| neighbour.id.clone()) {
            Some(id) => self.ask(&id, Question::Holders(digest), reply),
            None => reply.fail(ResolveError::Unreachable("no neighbour knows all".into())),
        }
    }

    /// Tells the neighbours, waits until that is written, or not for long.
    async fn leave(mut self) {
        self.leave_gossip();
        let farewell = async {
            loop {
                tokio::select! {
                    written = self.farewells.join_next() => if written.is_none() { break },
                    // It is the swarm that writes.
                    _ = self.swarm.select_next_some() => {}
                    _ = self.from_streams.recv() => {}
                }
            }
        };
        // Who has not heard it sees the connection close.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
        let reads = async { while self.swarm.next().await.is_some() {} };
        let _ = tokio::time::timeout(READING, reads).await;
        self.keep_last().await;
    }
}

impl Drop for Driver {
    /// The view outlives the task in the handles; nobody is there any more.
    fn drop(&mut self) {
        for known in self.shared.peers_mut().values_mut() {
            *known = Known::default();
        }
        self.shared.view_mut().clear();
        self.shared.listening().clear();
        self.metrics.peers.set(0);
    }
}
