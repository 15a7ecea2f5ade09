//! The gossip's links: streams on the connections of members, what the gossip wants of them, and the time that it keeps.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use bytes::Bytes;
use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId as P2pId, Stream};
use tokio::time::Instant;

use super::super::bootstrap::Target;
use super::super::notary::{identity, member_key};
use super::super::stream::{self, Event};
use super::super::streams;
use super::super::view::Subject;
use super::{Driver, dialing};
use crate::network::claim::ADDRESS_LIMIT;
use crate::network::facts::Facts;
use crate::network::gossip::record::Record;
use crate::network::gossip::wire::{self, RECORD_LIMIT};
use crate::network::gossip::{Action as Wish, Key, LinkId};
use crate::network::identity::peer_id;
use crate::oci::{Action, PeerId};

/// What a signature adds to a record's body.
const SIGNED: usize = 72;

/// A stream to a neighbour.
pub(super) struct Neighbour {
    pub(super) peer: P2pId,
    pub(super) id: PeerId,
    pub(super) link: stream::Link,
}

impl Driver {
    /// A connection's other end is a member: the gossip begins, where this node dialled.
    pub(super) fn open_stream(&mut self, peer: P2pId) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        // What it is will be proved by the first thing that it says there, if it was not before; what it holds is believed, or
        // not, where that is used.
        let may_speak = self.shared.gate.allows(&link.id, Action::Connect);
        let is_there = self.neighbours.values().any(|neighbour| neighbour.peer == peer);
        if !may_speak || is_there || !link.greeted || !link.dialed || link.opening.is_some() {
            return;
        }
        // The newest is the least likely to be dead.
        let Some((connection, _)) = link.connections.last_key_value() else { return };
        link.opening = Some(*connection);
        self.swarm.behaviour_mut().gossip.open(peer, *connection);
    }

    pub(super) fn on_gossip(&mut self, peer: P2pId, event: streams::Event) {
        let mut opened = || {
            if let Some(link) = self.links.get_mut(&peer) {
                link.opening = None;
            }
        };
        match event {
            streams::Event::Incoming(stream) => self.begin_gossip(peer, stream, false),
            streams::Event::Opened(stream) => {
                opened();
                self.begin_gossip(peer, stream, true);
            }
            streams::Event::Failed(error) => {
                opened();
                let Some(id) = peer_id(&peer) else { return };
                self.shared.problem(Subject::Gossip(id.clone()), Some(format!("peer {id}: {error}")));
                let now = self.now();
                self.shared.view_mut().gossip.declined(member_key(&peer), now);
            }
        }
    }

    /// A member has opened a stream, or this node has.
    fn begin_gossip(&mut self, peer: P2pId, stream: Stream, outbound: bool) {
        let Some(link) = self.links.get(&peer) else { return };
        let id = link.id.clone();
        if !self.shared.gate.allows(&id, Action::Connect) {
            return;
        }
        let observed = link.ip().map(|ip| ip.to_string()).unwrap_or_default();
        self.shared.problem(Subject::Gossip(id.clone()), None);
        self.next_link += 1;
        let number = self.next_link;
        let link = stream::Link::new(number, stream, &self.events);
        self.neighbours.insert(number, Neighbour { peer, id, link });
        if self.neighbours.len() == 1 {
            // From here on it is the neighbours who say where this node is.
            self.amend();
        }
        let now = self.now();
        self.shared.view_mut().gossip.link_up(number, member_key(&peer), outbound, observed, now);
        self.turn();
    }

    pub(super) fn on_stream(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Frame(number, frame) => {
                let Some(id) = self.neighbours.get(&number).map(|neighbour| neighbour.id.clone()) else {
                    return;
                };
                self.metrics.frames_received.inc();
                let received = self.shared.view_mut().gossip.receive(number, *frame, now);
                if let Err(fault) = received {
                    self.metrics.broken.inc();
                    let text = format!("peer {id}: {fault}");
                    self.shared.problem(Subject::Conduct(id), Some(text));
                    self.end_stream(number);
                }
            }
            Event::Written => {}
            Event::Ended(number, why) => {
                if let Some(neighbour) = self.neighbours.get(&number) {
                    tracing::debug!(peer = %neighbour.id, why, "the gossip with a neighbour has ended");
                }
                self.end_stream(number);
            }
        }
        self.turn();
    }

    /// The stream of a link is gone, or is to go.
    fn end_stream(&mut self, number: LinkId) {
        let now = self.now();
        self.shared.view_mut().gossip.link_down(number, now);
        self.neighbours.remove(&number);
    }

    /// A peer is not connected any more.
    pub(super) fn end_streams(&mut self, peer: P2pId) {
        let of_peer: Vec<LinkId> = self
            .neighbours
            .iter()
            .filter(|(_, neighbour)| neighbour.peer == peer)
            .map(|(number, _)| *number)
            .collect();
        for number in of_peer {
            self.end_stream(number);
        }
    }

    /// Does what the gossip wants, sends what it has to say, and shows what it knows.
    pub(super) fn turn(&mut self) {
        let now = self.now();
        let wishes = {
            let gossip = &mut self.shared.view_mut().gossip;
            gossip.tick(now);
            gossip.actions()
        };
        for wish in wishes {
            match wish {
                Wish::Dial(key) => self.dial_member(key),
                Wish::Close(number) => {
                    self.flush(number);
                    self.shared.view_mut().gossip.link_down(number, now);
                    if let Some(neighbour) = self.neighbours.remove(&number) {
                        tokio::spawn(neighbour.link.finish());
                    }
                }
                Wish::Dead(number) => {
                    if let Some(neighbour) = self.neighbours.remove(&number) {
                        tracing::info!(peer = %neighbour.id, "a neighbour is silent");
                        self.lose(neighbour.peer, "it does not answer");
                    }
                }
                Wish::Twin(key) => {
                    let peer = {
                        let view = self.shared.view();
                        let member = view.gossip.members().by_key(key);
                        member.and_then(|member| identity(&member.record.identity).ok())
                    };
                    let Some(id) = peer.as_ref().and_then(peer_id) else { continue };
                    let text = format!(
                        "peer {id}: two processes use its identity at once; each node needs its own (was a node's disk \
                         copied with node.data-dir on it?)"
                    );
                    self.shared.problem(Subject::Twins(id.clone()), Some(text));
                    self.twins.insert(id, Instant::now());
                }
                Wish::Observed(number, text) => self.observed(number, &text),
            }
        }
        let numbers: Vec<LinkId> = self.neighbours.keys().copied().collect();
        for number in numbers {
            self.flush(number);
        }
        self.shared.renew();
        self.gossip_due = self.shared.view().gossip.next_due(self.now());
    }

    fn flush(&mut self, number: LinkId) {
        let Some(neighbour) = self.neighbours.get(&number) else { return };
        let now = self.now();
        while neighbour.link.has_room() {
            let Some(frame) = self.shared.view_mut().gossip.flush(number, now) else { break };
            self.metrics.frames_sent.inc();
            neighbour.link.send(wire::encode(&frame));
        }
    }

    /// The gossip's clock.
    pub(super) fn now(&self) -> u64 {
        self.shared.now()
    }

    /// When the gossip has to be looked at.
    pub(super) fn gossip_due(&self) -> Instant {
        self.shared.instant(self.gossip_due)
    }

    fn dial_member(&mut self, key: Key) {
        let record = {
            let view = self.shared.view();
            view.gossip.members().by_key(key).map(|member| std::sync::Arc::clone(&member.record))
        };
        let peer = record.as_ref().and_then(|record| identity(&record.identity).ok());
        let (Some(record), Some(peer)) = (record, peer) else { return };
        if self.links.contains_key(&peer) {
            if let Some(link) = self.links.get_mut(&peer) {
                link.dialed = true;
            }
            return self.open_stream(peer);
        }
        if self.dial_record(peer, &record).is_err() {
            let now = self.now();
            self.shared.view_mut().gossip.dial_failed(key, now);
        }
    }

    /// Dials a member where its record says that it is.
    pub(super) fn dial_record(&mut self, peer: P2pId, record: &Record) -> Result<(), ()> {
        let addresses: Vec<Multiaddr> = record.control.iter().copied().map(dialing::multiaddr).collect();
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .allocate_new_port()
            .build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, (Target::Member(member_key(&peer)), None));
                Ok(())
            }
            // It is being dialled already, for something else; that attempt will tell.
            Err(DialError::DialPeerConditionFalse(_)) => Ok(()),
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot dial a member");
                Err(())
            }
        }
    }

    /// A neighbour sees this node at an address: if it is one of this machine, it is where others can reach it.
    fn observed(&mut self, _: LinkId, text: &str) {
        let Ok(ip) = text.parse::<IpAddr>() else { return };
        let ip = ip.to_canonical();
        if self.own_ips.contains(&ip) || self.own_ips.len() >= ADDRESS_LIMIT || !is_local(ip) {
            return;
        }
        self.own_ips.push(ip);
        self.amend();
    }

    /// Brings this node's record up to date.
    pub(super) fn amend(&mut self) {
        let ports = dialing::listening(&self.swarm);
        let mut control = self.advertise.clone();
        let mut transfer = Vec::new();
        let advertised: Vec<IpAddr> = self.advertise.iter().map(SocketAddr::ip).collect();
        // A socket that listens at one address says itself where it is.
        let sockets = ports.iter().chain(&self.announcement.transfer).map(SocketAddr::ip);
        let named = sockets.filter(|ip| !ip.is_unspecified());
        let mut ips: Vec<IpAddr> = advertised.iter().chain(&self.own_ips).copied().chain(named).collect();
        if ips.is_empty() && !ports.is_empty() && self.neighbours.is_empty() {
            // Nobody has said where this node is, and a lease may have to name it to the first who comes.
            ips = routed();
        }
        for ip in &ips {
            // Where addresses are configured, they are the ones that others can reach.
            if advertised.is_empty() {
                spread(&ports, *ip, &mut control);
            }
            spread(&self.announcement.transfer, *ip, &mut transfer);
        }
        control.truncate(ADDRESS_LIMIT);
        transfer.truncate(ADDRESS_LIMIT);
        let certificate = self.shared.admission.own().unwrap_or_default();
        let announcement = self.announcement.clone();
        let facts = self.facts.clone();
        let now = self.now();
        let mut left_out = false;
        self.shared.view_mut().gossip.amend(
            |record| {
                (record.control, record.transfer) = (control, transfer);
                (record.node, record.zone) = (announcement.node, announcement.zone);
                (record.version, record.certificate) = (announcement.version, certificate);
                record.facts = facts.encode();
                left_out = facts != Facts::decode(&record.facts).unwrap_or_default();
                if record.body().len() + SIGNED > RECORD_LIMIT {
                    // A record that nobody takes would be worse than one that says less.
                    left_out = true;
                    record.facts = Facts { labels: Vec::new(), ..facts }.encode();
                }
                if record.body().len() + SIGNED > RECORD_LIMIT {
                    record.facts = Bytes::new();
                }
            },
            now,
        );
        let text = "this node has so many addresses, or so long names, that peers are not told all of `election.labels`";
        self.shared.problem(Subject::Facts, left_out.then(|| text.to_owned()));
    }

    /// Tells the neighbours that this node goes away; `farewells` end when that is written.
    pub(super) fn leave_gossip(&mut self) {
        let now = self.now();
        self.shared.view_mut().gossip.leave(now);
        let numbers: Vec<LinkId> = self.neighbours.keys().copied().collect();
        for number in &numbers {
            self.flush(*number);
        }
        for (_, neighbour) in std::mem::take(&mut self.neighbours) {
            self.farewells.spawn(neighbour.link.finish());
        }
    }
}

/// Adds where sockets that listen at `sockets` are reached by `ip`.
fn spread(sockets: &[SocketAddr], ip: IpAddr, addresses: &mut Vec<SocketAddr>) {
    for socket in sockets {
        let fits = socket.ip() == ip || socket.ip().is_unspecified() && (socket.is_ipv6() || ip.is_ipv4());
        let address = SocketAddr::new(ip, socket.port());
        if fits && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
}

/// The addresses from which this machine would go out. Nothing is sent.
fn routed() -> Vec<IpAddr> {
    // For documentation: they are nobody's.
    const SOMEWHERE: [(&str, &str); 2] = [("0.0.0.0:0", "198.51.100.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let routed = SOMEWHERE.into_iter().filter_map(|(from, to)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    });
    routed.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()).collect()
}

/// Whether this machine has the address: else a neighbour could send all others elsewhere.
fn is_local(ip: IpAddr) -> bool {
    !ip.is_unspecified() && UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_sockets_that_listen_anywhere() {
        let check = |sockets: &[&str], ip: &str, expected: &[&str]| {
            let sockets: Vec<SocketAddr> = sockets.iter().map(|socket| socket.parse().unwrap()).collect();
            let mut addresses = Vec::new();
            spread(&sockets, ip.parse().unwrap(), &mut addresses);
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            assert_eq!(addresses, expected);
        };
        check(&["0.0.0.0:5001", "[::]:5001"], "10.0.0.1", &["10.0.0.1:5001"]);
        check(&["0.0.0.0:5001"], "fd00::1", &[]);
        check(&["[::]:5001"], "fd00::1", &["[fd00::1]:5001"]);
        check(&["10.0.0.2:5001"], "10.0.0.1", &[]);
        check(&["127.0.0.1:5001"], "127.0.0.1", &["127.0.0.1:5001"]);
    }

    #[test]
    fn routes_lead_from_addresses_of_this_machine() {
        assert!(routed().into_iter().all(|ip| is_local(ip) && !ip.is_loopback()));
    }

    #[test]
    fn an_address_of_another_machine_is_not_this_ones() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(!is_local("192.0.2.1".parse().unwrap()) && !is_local("0.0.0.0".parse().unwrap()));
    }
}
