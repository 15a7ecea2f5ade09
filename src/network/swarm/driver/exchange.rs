//! The messages with connected peers: what is asked and answered. What the members hold is the gossip's business.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId as P2pId;
use libp2p::request_response::{self, OutboundFailure, OutboundRequestId, ResponseChannel};
use libp2p::swarm::ConnectionId;
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tokio::time::{Instant, timeout};

use super::super::codec::{Request, either, protocols};
use super::super::message::{HOLDERS, Hello, Message};
use super::super::notary;
use super::super::view::{Subject, reachable};
use super::{Driver, Flight, QUESTIONS, RETRY, WAITING, dialing, proof};
use crate::network::identity::peer_id;
use crate::network::metrics::{Answer, TagLabels};
use crate::network::{Peer, ResolveError, TagQuestion, Tagged};
use crate::oci::{Action, Digest, PeerId, Reference};

/// Questions to this node as a home that wait for a registry at once; to others it says what it knows.
const AT_HOME: usize = 64;
/// How long one may wait: less than its asker does.
const HOME_LIMIT: Duration = Duration::from_millis(1800);

/// What a peer is asked.
#[derive(Clone, Debug)]
pub(in super::super) enum Question {
    Tag(TagQuestion),
    Holders(Digest),
}

/// What is said to a request: now, or when the tag's registry has answered.
enum Said {
    Now(Message),
    Later(Home),
}

/// A question to this node as the home of a tag.
struct Home {
    peer: PeerId,
    name: Reference,
    fresh: Duration,
}

/// Where the answer of a home goes, and the answer.
pub(super) type AtHome = (ResponseChannel<Message>, Option<Tagged>);

impl From<Message> for Said {
    fn from(message: Message) -> Self {
        Self::Now(message)
    }
}

/// What it answered.
pub(super) enum Answered {
    Tag(Option<Tagged>),
    Holders(Vec<Arc<Peer>>),
}

/// Who waits for the answer, by the question.
pub(in super::super) enum Reply {
    Tag(oneshot::Sender<Result<Option<Tagged>, ResolveError>>),
    Holders(oneshot::Sender<Result<Vec<Arc<Peer>>, ResolveError>>),
}

impl Driver {
    pub(super) fn on_control(&mut self, event: request_response::Event<Request, Message>) {
        match event {
            request_response::Event::Message { peer, connection_id, message } => match message {
                // Dropping the channel resets the stream.
                request_response::Message::Request { request: Err(error), .. } => self.broke(peer, &error),
                request_response::Message::Request { request: Ok(request), channel, .. } => {
                    match self.on_request(peer, connection_id, request) {
                        Said::Now(answer) => self.say(channel, answer),
                        Said::Later(home) => self.answer_at_home(home, channel),
                    }
                    self.push(peer);
                    self.open_stream(peer);
                }
                request_response::Message::Response { request_id, response } => {
                    self.on_answer(peer, request_id, response);
                    self.open_stream(peer);
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

    fn on_request(&mut self, peer: P2pId, connection: ConnectionId, request: Message) -> Said {
        // Before anything that it says is believed.
        if !self.hears(peer, &request) {
            return Message::Denied.into();
        }
        let Some(link) = self.links.get_mut(&peer) else { return Message::Denied.into() };
        let id = link.id.clone();
        let gate = &self.shared.gate;
        match request {
            Message::Hello(hello) if hello.introduction => Message::Heard.into(),
            Message::Hello(hello) => {
                // The address of the connection that speaks comes first.
                let speaks = link.connections.get(&connection);
                let mut seen: Vec<IpAddr> = speaks.copied().flatten().into_iter().collect();
                for ip in link.connections.values().flatten().copied() {
                    if !seen.contains(&ip) {
                        seen.push(ip);
                    }
                }
                let control = reachable(&seen, &hello.control);
                // It was not there when it was dialled, and is not dialled again.
                for address in control.iter().filter(|address| seen.contains(&address.ip())) {
                    self.shared.problem(Subject::Address(*address), None);
                }
                self.bootstrap.learn(&id, &seen, control);
                let peer = Peer {
                    id: id.clone(),
                    transfer: reachable(&seen, &hello.transfer),
                    node: hello.node,
                    zone: hello.zone,
                    version: hello.version,
                };
                self.shared.problem(Subject::Peer(id.clone()), None);
                self.forget_refused(&id);
                let mut peers = self.shared.peers_mut();
                let known = peers.entry(id.clone()).or_default();
                known.peer = Some(Arc::new(peer));
                known.seen = seen;
                known.gone = None;
                if !known.connected {
                    known.connected = true;
                    self.metrics.peers.inc();
                    tracing::info!(peer = %id, "connected");
                }
                Message::Heard.into()
            }
            Message::Resolve(_) if !gate.allows(&id, Action::Tags) => {
                self.metrics.tags.get_or_create(&TagLabels { answer: Answer::Denied }).inc();
                Message::Denied.into()
            }
            Message::Resolve(TagQuestion { name, home: Some(fresh) }) if self.at_home.len() < AT_HOME => {
                Said::Later(Home { peer: id, name, fresh })
            }
            Message::Resolve(TagQuestion { name, .. }) => {
                let found = self.tags.tag(&id, &name);
                self.resolved(found).into()
            }
            Message::Holders(_) if !gate.allows(&id, Action::Serve) => Message::Denied.into(),
            Message::Holders(digest) => Message::Held(self.shared.records(&digest, HOLDERS)).into(),
            Message::Heard | Message::Held(_) | Message::Resolved(_) | Message::Denied => {
                self.broke(peer, "an answer instead of a request");
                Message::Denied.into()
            }
        }
    }

    fn say(&mut self, channel: ResponseChannel<Message>, answer: Message) {
        // An error is a peer that does not wait any more.
        let _ = self.swarm.behaviour_mut().control.send_response(channel, answer);
    }

    fn resolved(&self, found: Option<Tagged>) -> Message {
        let answer = if found.is_some() { Answer::Found } else { Answer::Unknown };
        self.metrics.tags.get_or_create(&TagLabels { answer }).inc();
        Message::Resolved(found)
    }

    /// The registry is asked beside the loop.
    fn answer_at_home(&mut self, Home { peer, name, fresh }: Home, channel: ResponseChannel<Message>) {
        let tags = Arc::clone(&self.tags);
        self.at_home.spawn(async move {
            let found = timeout(HOME_LIMIT, tags.home_tag(&peer, &name, fresh)).await;
            (channel, found.unwrap_or_default())
        });
    }

    pub(super) fn on_home(&mut self, done: Result<AtHome, JoinError>) {
        // One that panicked has dropped its channel, which resets the stream.
        let Ok((channel, found)) = done else { return };
        let answer = self.resolved(found);
        self.say(channel, answer);
    }

    fn on_answer(&mut self, peer: P2pId, request: OutboundRequestId, answer: Message) {
        if let Some((_, question)) = self.questions.get(&request) {
            let answered = match (question, answer) {
                (Reply::Tag(_), Message::Resolved(found)) => Ok(Answered::Tag(found)),
                (Reply::Holders(_), Message::Held(records)) => Ok(Answered::Holders(self.believed(&records))),
                (_, Message::Denied) => Err(ResolveError::Denied),
                _ => Err(ResolveError::Unreachable("it broke the protocol".into())),
            };
            return self.answered(request, answered);
        }
        let Some(link) = self.links.get_mut(&peer) else { return };
        let Some((_, flight)) = link.flight.take_if(|(sent, _)| *sent == request) else { return };
        match (answer, flight) {
            (Message::Heard, Flight::Introduction) => link.introduced = !std::mem::take(&mut link.outdated),
            (Message::Heard, Flight::Hello) => link.greeted = !std::mem::take(&mut link.outdated),
            // It takes this node for gone or for no member, and is about to close the connection.
            (Message::Denied, _) => {
                link.next = Some(Instant::now() + RETRY);
                let (id, from) = (link.id.clone(), link.ip());
                self.not_admitted(&id, from);
            }
            _ => {
                link.next = Some(Instant::now() + RETRY);
                self.broke(peer, "a wrong answer");
            }
        }
        self.push(peer);
    }

    /// Those of `records` that are right and whose members are believed.
    fn believed(&self, records: &[bytes::Bytes]) -> Vec<Arc<Peer>> {
        let view = self.shared.view();
        let records = records.iter().filter_map(|signed| view.gossip.judge(signed).ok());
        let peers = records.filter_map(|record| notary::peer(&record));
        let own = &self.shared.id;
        peers.filter(|peer| peer.id != *own && self.shared.gate.allows(&peer.id, Action::Believe)).collect()
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
        link.greet_again();
        link.next = Some(Instant::now() + RETRY);
        if let OutboundFailure::UnsupportedProtocols = error {
            let text = format!("peer {}: it does not speak {}", link.id, either(&protocols()));
            self.shared.problem(Subject::Conduct(link.id.clone()), Some(text));
        }
    }

    /// Tells `peer` who this is, unless it knows or a message is on its way.
    pub(super) fn push(&mut self, peer: P2pId) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        if link.flight.is_some() || link.next.is_some() || link.greeted {
            return;
        }
        let (message, flight) = if self.shared.gate.is_unproved(&link.id) {
            let Some(introduction) = proof::introduction(&self.shared, link) else { return };
            (introduction, Flight::Introduction)
        } else {
            let hello = Hello {
                node: self.announcement.node.clone(),
                zone: self.announcement.zone.clone(),
                version: self.announcement.version.clone(),
                transfer: self.announcement.transfer.clone(),
                control: dialing::control_addresses(&self.swarm, &self.advertise),
                certificate: self.shared.admission.own().unwrap_or_default().to_vec(),
                introduction: false,
            };
            (Message::Hello(hello), Flight::Hello)
        };
        let request = self.swarm.behaviour_mut().control.send_request(&peer, Ok(message));
        link.flight = Some((request, flight));
    }

    /// Asks a peer; one that is a member and not connected is dialled first.
    pub(super) fn ask(&mut self, peer: &PeerId, question: Question, reply: Reply) {
        let Ok(p2p) = peer.as_str().parse::<P2pId>() else {
            return reply.fail(ResolveError::Unreachable("its ID is not a peer ID of libp2p".into()));
        };
        let Some(link) = self.links.get_mut(&p2p) else { return self.ask_later(p2p, question, reply) };
        if link.questions < QUESTIONS {
            link.questions += 1;
            let question = self.swarm.behaviour_mut().control.send_request(&p2p, Ok(question.message()));
            self.questions.insert(question, (p2p, reply));
            return;
        }
        // Who does not wait any more takes no place.
        link.waiting.retain(|(_, reply)| !reply.is_closed());
        if link.waiting.len() < WAITING {
            link.waiting.push_back((question, reply));
        } else {
            reply.fail(ResolveError::Unreachable("too many questions wait for its answer".into()));
        }
    }

    fn ask_later(&mut self, peer: P2pId, question: Question, reply: Reply) {
        let record = {
            let view = self.shared.view();
            let member = view.gossip.members().by_key(notary::member_key(&peer));
            member.filter(|member| member.is_live()).map(|member| Arc::clone(&member.record))
        };
        let Some(record) = record else {
            return reply.fail(ResolveError::Unreachable("it is not connected".into()));
        };
        self.unasked.retain(|_, waiting| {
            waiting.retain(|(_, reply)| !reply.is_closed());
            !waiting.is_empty()
        });
        if self.unasked.values().map(Vec::len).sum::<usize>() >= WAITING {
            return reply.fail(ResolveError::Unreachable("too many questions wait for connections".into()));
        }
        let is_new = !self.unasked.contains_key(&peer);
        self.unasked.entry(peer).or_default().push((question, reply));
        if is_new && self.dial_record(peer, &record).is_err() {
            self.unanswerable(peer, "it cannot be reached");
        }
    }

    /// Questions for `peer` will not be asked.
    pub(super) fn unanswerable(&mut self, peer: P2pId, why: &str) {
        for (_, reply) in self.unasked.remove(&peer).unwrap_or_default() {
            reply.fail(ResolveError::Unreachable(why.into()));
        }
    }

    pub(super) fn answered(&mut self, question: OutboundRequestId, answer: Result<Answered, ResolveError>) {
        let Some((peer, reply)) = self.questions.remove(&question) else { return };
        if let Some(link) = self.links.get_mut(&peer) {
            link.questions = link.questions.saturating_sub(1);
            while let Some((question, reply)) = link.waiting.pop_front() {
                if !reply.is_closed() {
                    link.questions += 1;
                    let control = &mut self.swarm.behaviour_mut().control;
                    let question = control.send_request(&peer, Ok(question.message()));
                    self.questions.insert(question, (peer, reply));
                    break;
                }
            }
        }
        reply.give(answer);
    }
}

impl Question {
    pub(super) fn message(&self) -> Message {
        match self {
            Self::Tag(question) => Message::Resolve(question.clone()),
            Self::Holders(digest) => Message::Holders(*digest),
        }
    }
}

impl Reply {
    /// The asker may have gone, here and below.
    pub(super) fn fail(self, error: ResolveError) {
        match self {
            Self::Tag(reply) => drop(reply.send(Err(error))),
            Self::Holders(reply) => drop(reply.send(Err(error))),
        }
    }

    fn give(self, answer: Result<Answered, ResolveError>) {
        match (self, answer) {
            (Self::Tag(reply), Ok(Answered::Tag(found))) => drop(reply.send(Ok(found))),
            (Self::Holders(reply), Ok(Answered::Holders(found))) => drop(reply.send(Ok(found))),
            (reply, Ok(_)) => reply.fail(ResolveError::Unreachable("it broke the protocol".into())),
            (reply, Err(error)) => reply.fail(error),
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Self::Tag(reply) => reply.is_closed(),
            Self::Holders(reply) => reply.is_closed(),
        }
    }
}
