//! The messages with connected peers: what is asked, answered and pushed.

use std::net::IpAddr;
use std::sync::Arc;

use libp2p::PeerId as P2pId;
use libp2p::request_response::{self, OutboundFailure, OutboundRequestId};
use libp2p::swarm::ConnectionId;
use tokio::time::Instant;

use super::super::codec::{PROTOCOL, Request};
use super::super::inventory::{Held, INVENTORY_LIMIT};
use super::super::message::{Hello, Message, Position, State};
use super::super::view::{Subject, reachable};
use super::proof::introduction;
use super::{Driver, Flight, QUESTIONS, RETRY, Reply, WAITING, dialing};
use crate::network::identity::peer_id;
use crate::network::metrics::{Answer, Direction, InventoryLabels, Kind, TagLabels};
use crate::network::{Peer, ResolveError};
use crate::oci::{Action, Descriptor, PeerId, Reference};

impl Driver {
    pub(super) fn on_control(&mut self, event: request_response::Event<Request, Message>) {
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
        // Before anything that it says is believed.
        if !self.hears(peer, &request) {
            return Message::Denied;
        }
        let Some(link) = self.links.get_mut(&peer) else { return Message::Denied };
        let id = link.id.clone();
        let gate = &self.shared.gate;
        match request {
            Message::Hello(hello) if hello.introduction => Message::State(State::default()),
            Message::Hello(hello) => {
                if link.flight.is_none() || !link.greeted {
                    link.has = hello.have;
                }
                link.denied = false;
                // The address of the connection that speaks comes first.
                let mut seen: Vec<IpAddr> = Vec::new();
                if let Some(speaks) = link.connections.get_mut(&connection) {
                    speaks.said = Some((hello.incarnation, Instant::now()));
                    seen.extend(speaks.ip);
                }
                for ip in link.connections.values().filter_map(|connection| connection.ip) {
                    if !seen.contains(&ip) {
                        seen.push(ip);
                    }
                }
                self.bootstrap.learn(&id, &seen, reachable(&seen, &hello.control));
                let record = Peer {
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
                known.held.incarnation(hello.incarnation);
                known.peer = Some(Arc::new(record));
                (known.leaving, known.gone) = (false, None);
                if !known.connected {
                    known.connected = true;
                    self.metrics.peers.inc();
                    tracing::info!(peer = %id, "connected");
                }
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
                known.held = Held::default();
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
                    Flight::Introduction => {
                        link.introduced = !std::mem::take(&mut link.outdated);
                        true
                    }
                    Flight::Hello => {
                        link.greeted = !std::mem::take(&mut link.outdated);
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
            // It takes this node for gone, and is about to close the connection.
            Message::Denied if matches!(flight, Flight::Hello | Flight::Introduction) => {
                link.next = Some(Instant::now() + RETRY);
                let (id, from) = (link.id.clone(), link.ip());
                if self.shared.admission.by_key() || flight == Flight::Introduction {
                    self.not_admitted(&id, from);
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
        link.greet_again();
        link.whole = None;
        link.next = Some(Instant::now() + RETRY);
        if let OutboundFailure::UnsupportedProtocols = error {
            let text = format!("peer {}: it does not speak {}", link.id, PROTOCOL);
            self.shared.problem(Subject::Conduct(link.id.clone()), Some(text));
        }
    }

    pub(super) fn push_all(&mut self) {
        let peers: Vec<P2pId> = self.links.keys().copied().collect();
        for peer in peers {
            self.push(peer);
        }
    }

    /// Sends `peer` the next thing that it does not know, unless a message is on its way.
    pub(super) fn push(&mut self, peer: P2pId) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        if link.flight.is_some() || link.next.is_some() {
            return;
        }
        let (message, flight) = if !link.greeted && self.shared.gate.is_unproved(&link.id) {
            let Some(introduction) = introduction(&self.shared, link) else { return };
            (introduction, Flight::Introduction)
        } else if !link.greeted {
            let have = self.shared.peers().get(&link.id).map(|known| known.held.state().have);
            let hello = Hello {
                incarnation: self.shared.own().position().incarnation,
                node: self.announcement.node.clone(),
                zone: self.announcement.zone.clone(),
                version: self.announcement.version.clone(),
                transfer: self.announcement.transfer.clone(),
                control: dialing::control_addresses(&self.swarm, &self.advertise),
                have: have.unwrap_or_default(),
                certificate: self.shared.admission.own().unwrap_or_default().to_vec(),
                introduction: false,
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
            Flight::Introduction | Flight::Hello | Flight::Leaving => None,
        };
        if let Some(kind) = kind {
            let labels = InventoryLabels { direction: Direction::Sent, kind };
            self.metrics.inventory.get_or_create(&labels).inc();
        }
        let request = self.swarm.behaviour_mut().control.send_request(&peer, Ok(message));
        link.flight = Some((request, flight));
    }

    pub(super) fn ask(&mut self, peer: &PeerId, name: Reference, reply: Reply) {
        let link = peer.as_str().parse::<P2pId>().ok().and_then(|id| Some((id, self.links.get_mut(&id)?)));
        let refused = match link {
            None => ResolveError::Unreachable("it is not connected".into()),
            Some((_, link)) if link.questions >= QUESTIONS => {
                // Who does not wait any more takes no place.
                link.waiting.retain(|(_, reply)| !reply.is_closed());
                if link.waiting.len() < WAITING {
                    link.waiting.push_back((name, reply));
                    return;
                }
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

    pub(super) fn answered(
        &mut self,
        question: OutboundRequestId,
        answer: Result<Option<Descriptor>, ResolveError>,
    ) {
        let Some((peer, reply)) = self.questions.remove(&question) else { return };
        if let Some(link) = self.links.get_mut(&peer) {
            link.questions = link.questions.saturating_sub(1);
            while let Some((name, reply)) = link.waiting.pop_front() {
                if !reply.is_closed() {
                    link.questions += 1;
                    let control = &mut self.swarm.behaviour_mut().control;
                    let question = control.send_request(&peer, Ok(Message::Resolve(name)));
                    self.questions.insert(question, (peer, reply));
                    break;
                }
            }
        }
        // The asker may have gone.
        let _ = reply.send(answer);
    }
}
