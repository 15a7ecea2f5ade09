//! Which peer or address to dial when. Pure state: the driver looks names up and dials.
//!
//! A configured peer is dialled under its identity, at its configured addresses and at those that it told when it was
//! last here. The addresses of a service's name are dialled without one: who answers is decided by the gate. A few of them at first;
//! while nobody is here one after the other, so that one who lives is found among thousands who do not.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::time::Instant;

use crate::network::PeerConfig;
use crate::oci::PeerId;

/// First wait after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait between attempts to reach a configured peer.
const PEER_WAIT: Duration = Duration::from_secs(10);
/// First and longest wait between questions about a service's name.
const SERVICE_FIRST_WAIT: Duration = Duration::from_millis(250);
const SERVICE_WAIT: Duration = Duration::from_secs(30);
/// Longest wait between questions, and between attempts to reach a configured peer, while nobody is here: whatever says where others are,
/// this node is with them 5 s after that (issue 6). Not where there are more than [`FEW`].
const ALONE_WAIT: Duration = Duration::from_secs(3);
const FEW: usize = 128;
/// Addresses of one service that are dialled at once, chosen at random.
const SAMPLE: usize = 10;
/// While nobody is here as many more are dialled after this pause: 50 a second. If the 5,000 nodes of a cluster do so, each is dialled 50
/// times a second.
const STEP: Duration = Duration::from_millis(200);
/// So many of one service may be under way then.
const FLYING: usize = 50;
/// Between the last of them and the first again.
const ROUND: Duration = Duration::from_secs(2);
/// Addresses of one service that are kept: an answer of a DNS, of 64 KiB, holds half of that.
const FOUND: usize = 8_192;
/// Addresses dialled for one configured peer.
const PEER_ADDRESSES: usize = 16;

/// What a dial or a lookup is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Target {
    Peer(PeerId),
    Service(String),
    /// One that the gossip knows, by its key there: dialled once, since the gossip says when again.
    Member(u64),
    /// One that a lease names.
    Hint,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lookup {
    pub target: Target,
    pub names: Vec<String>,
}

/// All that is tried.
pub(super) struct Bootstrap {
    peers: BTreeMap<PeerId, Pinned>,
    services: BTreeMap<String, Service>,
    /// Addresses at which this node itself answered.
    own: HashSet<SocketAddr>,
    /// Who proved its identity at an address that this node dialled.
    met: HashMap<SocketAddr, PeerId>,
    /// Where peers that are here say that they are, as far as they are seen there.
    claimed: HashMap<PeerId, Vec<SocketAddr>>,
}

#[derive(Default)]
struct Pinned {
    addresses: Vec<String>,
    /// Told by the peer itself.
    learned: Vec<SocketAddr>,
    /// Where another identity answered: left out of the next attempt.
    wrong: BTreeSet<SocketAddr>,
    connected: bool,
    busy: bool,
    attempts: u32,
    due: Option<Instant>,
}

struct Service {
    wait: Duration,
    due: Instant,
    busy: bool,
    dialing: HashSet<SocketAddr>,
    /// The last answer, in the order in which it is tried.
    found: Vec<SocketAddr>,
    /// What was dialled of it in this round.
    tried: HashSet<SocketAddr>,
    /// When the next ones are dialled if nobody is here.
    step: Instant,
}

impl Bootstrap {
    pub(super) fn new() -> Self {
        Self {
            peers: BTreeMap::new(),
            services: BTreeMap::new(),
            own: HashSet::new(),
            met: HashMap::new(),
            claimed: HashMap::new(),
        }
    }

    /// Takes new lists; what is in both keeps its state. Says which targets are no more.
    pub(super) fn configure(&mut self, peers: &[PeerConfig], dns: &[String], now: Instant) -> Vec<Target> {
        let mut gone = Vec::new();
        self.peers.retain(|id, _| {
            let stays = peers.iter().any(|peer| peer.id == *id);
            if !stays {
                gone.push(Target::Peer(id.clone()));
            }
            stays
        });
        self.services.retain(|name, _| {
            let stays = dns.contains(name);
            if !stays {
                gone.push(Target::Service(name.clone()));
            }
            stays
        });
        for peer in peers {
            let pinned = self.peers.entry(peer.id.clone()).or_default();
            if pinned.due.is_none() || pinned.addresses != peer.addresses {
                pinned.addresses.clone_from(&peer.addresses);
                pinned.attempts = 0;
                pinned.due = Some(now);
            }
        }
        for name in dns {
            self.services.entry(name.clone()).or_insert_with(|| Service {
                wait: SERVICE_FIRST_WAIT,
                due: now,
                busy: false,
                dialing: HashSet::new(),
                found: Vec::new(),
                tried: HashSet::new(),
                step: now,
            });
        }
        gone
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = (&PeerId, bool)> {
        self.peers.iter().map(|(id, peer)| (id, peer.addresses.is_empty() && peer.learned.is_empty()))
    }

    /// When there is something to do; `None`: not until something happens.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let peers = self.peers.values().filter(|peer| peer.wants()).filter_map(|peer| peer.due);
        let services = self.services.values().filter(|service| !service.busy).map(|service| service.due);
        let alone = self.services.values().filter(|service| self.is_alone() && service.may_step());
        peers.chain(services).chain(alone.map(|service| service.step)).min()
    }

    /// Whether nobody is here who has said who it is.
    pub(super) fn is_alone(&self) -> bool {
        self.claimed.is_empty()
    }

    /// Names to look up now. Each must be answered by [`Self::peer_addresses`] or [`Self::service_addresses`].
    pub(super) fn due(&mut self, now: Instant) -> Vec<Lookup> {
        let mut lookups = Vec::new();
        for (id, peer) in &mut self.peers {
            if peer.wants() && peer.due.is_some_and(|due| due <= now) {
                peer.busy = true;
                lookups.push(Lookup { target: Target::Peer(id.clone()), names: peer.addresses.clone() });
            }
        }
        for (name, service) in &mut self.services {
            if !service.busy && service.due <= now {
                service.busy = true;
                lookups.push(Lookup { target: Target::Service(name.clone()), names: vec![name.clone()] });
            }
        }
        lookups
    }

    /// Where to dial `id`, given what its names stand for. Empty: nowhere; the attempt has failed.
    pub(super) fn peer_addresses(
        &mut self,
        id: &PeerId,
        found: Vec<SocketAddr>,
        now: Instant,
    ) -> Vec<SocketAddr> {
        let Some(peer) = self.peers.get_mut(id) else { return Vec::new() };
        if peer.connected {
            peer.busy = false;
            return Vec::new();
        }
        let mut all: Vec<SocketAddr> = Vec::new();
        for address in found.into_iter().chain(peer.learned.iter().copied()) {
            if !all.contains(&address) && !self.own.contains(&address) && all.len() < PEER_ADDRESSES {
                all.push(address);
            }
        }
        let right: Vec<_> = all.iter().copied().filter(|address| !peer.wrong.contains(address)).collect();
        if right.is_empty() {
            peer.wrong.clear();
        } else {
            all = right;
        }
        if all.is_empty() {
            self.failed(&Target::Peer(id.clone()), None, now);
        }
        all
    }

    /// Which of a service's addresses to dial: those where nobody is met who is `connected`.
    pub(super) fn service_addresses(
        &mut self,
        name: &str,
        found: Result<&[SocketAddr], ()>,
        connected: impl Fn(&PeerId) -> bool,
        now: Instant,
    ) -> Vec<SocketAddr> {
        let is_alone = self.is_alone();
        let Some(service) = self.services.get_mut(name) else { return Vec::new() };
        service.busy = false;
        let is_short = found.is_ok_and(|found| found.len() <= FEW) || found.is_err();
        let longest = if is_alone && is_short { ALONE_WAIT } else { SERVICE_WAIT };
        service.due = now + jitter(service.wait.min(longest));
        service.wait = (service.wait * 2).min(SERVICE_WAIT);
        let Ok(found) = found else { return Vec::new() };
        service.take(found);
        if self.services.len() == 1 {
            // An address that the name has no more may be another pod's next.
            self.own.retain(|address| found.contains(address));
            self.met.retain(|address, id| found.contains(address) || connected(id));
        }
        self.sample(name, connected, now)
    }

    /// Which further addresses of services to dial, while nobody is here.
    pub(super) fn steps(
        &mut self,
        connected: impl Fn(&PeerId) -> bool,
        now: Instant,
    ) -> Vec<(String, Vec<SocketAddr>)> {
        if !self.is_alone() {
            return Vec::new();
        }
        let due = self.services.iter().filter(|(_, service)| service.may_step() && service.step <= now);
        let due: Vec<String> = due.map(|(name, _)| name.clone()).collect();
        due.into_iter().map(|name| (name.clone(), self.sample(&name, &connected, now))).collect()
    }

    /// Some of a service's addresses: where nobody is met who is `connected`, and in this round those that were not dialled.
    fn sample(&mut self, name: &str, connected: impl Fn(&PeerId) -> bool, now: Instant) -> Vec<SocketAddr> {
        let is_alone = self.is_alone();
        let Some(service) = self.services.get_mut(name) else { return Vec::new() };
        let claimed: HashSet<&SocketAddr> = self
            .claimed
            .iter()
            .filter(|(id, _)| connected(id))
            .flat_map(|(_, addresses)| addresses)
            .collect();
        let missing = |address: &SocketAddr| {
            !self.own.contains(address)
                && !self.met.get(address).is_some_and(&connected)
                && !claimed.contains(address)
        };
        let flying = if is_alone { FLYING } else { SAMPLE };
        let limit = SAMPLE.min(flying.saturating_sub(service.dialing.len()));
        let mut next = service.left(missing, limit);
        service.step = now + STEP;
        if limit > 0 && next.is_empty() {
            // The round is over.
            service.tried.clear();
            service.step = now + ROUND;
            if !is_alone {
                next = service.left(missing, limit);
            }
        }
        service.tried.extend(&next);
        service.dialing.extend(&next);
        next
    }

    /// The peer is connected, over a connection to `address` if this node dialled.
    pub(super) fn connected(&mut self, id: &PeerId, address: Option<SocketAddr>) {
        if let Some(address) = address {
            self.met.insert(address, id.clone());
            self.dialed(address);
        }
        if let Some(peer) = self.peers.get_mut(id) {
            peer.connected = true;
            peer.busy = false;
            peer.wrong.clear();
        }
    }

    /// The peer said hello, and where its control plane is reached. What it said before counts no more. Only where it
    /// is `seen` can it say that a service's address is its own: else it could keep this node from any other peer.
    pub(super) fn learn(&mut self, id: &PeerId, seen: &[IpAddr], addresses: Vec<SocketAddr>) {
        let own = addresses.iter().copied().filter(|address| seen.contains(&address.ip()));
        self.claimed.insert(id.clone(), own.collect());
        if let Some(peer) = self.peers.get_mut(id) {
            peer.learned = addresses;
            peer.attempts = 0;
        }
    }

    /// The last connection to the peer is gone. One that went before the peer said hello was a failed attempt: so it
    /// looks when the other side does not trust this node.
    pub(super) fn disconnected(&mut self, id: &PeerId, greeted: bool, now: Instant) {
        self.met.retain(|_, met| met != id);
        self.claimed.remove(id);
        if let Some(peer) = self.peers.get_mut(id) {
            peer.connected = false;
        }
        self.failed(&Target::Peer(id.clone()), None, now);
        if greeted {
            for service in self.services.values_mut() {
                service.wait = SERVICE_FIRST_WAIT;
                service.due = service.due.min(now + jitter(SERVICE_FIRST_WAIT));
            }
        }
    }

    /// An attempt failed; `wrong`: where another identity answered.
    pub(super) fn failed(&mut self, target: &Target, wrong: Option<SocketAddr>, now: Instant) {
        let longest = if self.is_alone() && self.peers.len() <= FEW { ALONE_WAIT } else { PEER_WAIT };
        if let Target::Peer(id) = target
            && let Some(peer) = self.peers.get_mut(id)
        {
            peer.busy = false;
            peer.wrong.extend(wrong);
            let wait = FIRST_WAIT.saturating_mul(1 << peer.attempts.min(10)).min(longest);
            peer.attempts = peer.attempts.saturating_add(1);
            peer.due = Some(now + jitter(wait));
        }
    }

    /// What failed may succeed now.
    pub(super) fn hurry(&mut self, now: Instant) {
        for peer in self.peers.values_mut().filter(|peer| peer.wants()) {
            (peer.attempts, peer.due) = (0, Some(now));
        }
        for service in self.services.values_mut() {
            (service.wait, service.due, service.step) = (SERVICE_FIRST_WAIT, now, now);
        }
    }

    /// An attempt at a service's address came to an end.
    pub(super) fn dialed(&mut self, address: SocketAddr) {
        for service in self.services.values_mut() {
            service.dialing.remove(&address);
        }
    }

    /// This node itself answered at `address`.
    pub(super) fn is_own(&mut self, address: SocketAddr) {
        self.own.insert(address);
    }
}

impl Service {
    /// Takes an answer. What was in the one before keeps its place, so that each address has its turn.
    fn take(&mut self, found: &[SocketAddr]) {
        let new: HashSet<SocketAddr> = found.iter().copied().collect();
        self.found.retain(|address| new.contains(address));
        self.tried.retain(|address| new.contains(address));
        let known: HashSet<SocketAddr> = self.found.iter().copied().collect();
        let mut unknown: Vec<SocketAddr> = new.difference(&known).copied().collect();
        unknown.shuffle(&mut rand::rng());
        // Who is new is tried first.
        unknown.append(&mut self.found);
        unknown.truncate(FOUND);
        self.found = unknown;
    }

    /// The first that are wanted, of those that are neither under way nor tried in this round.
    fn left(&self, is_wanted: impl Fn(&SocketAddr) -> bool, limit: usize) -> Vec<SocketAddr> {
        let is_left = |address: &&SocketAddr| {
            is_wanted(address) && !self.dialing.contains(*address) && !self.tried.contains(*address)
        };
        self.found.iter().filter(is_left).take(limit).copied().collect()
    }

    fn may_step(&self) -> bool {
        !self.found.is_empty() && self.dialing.len() < FLYING
    }
}

impl Pinned {
    fn wants(&self) -> bool {
        let somewhere = !self.addresses.is_empty() || !self.learned.is_empty();
        somewhere && !self.connected && !self.busy
    }
}

/// Between three and five quarters of `wait`, so that nodes that start together do not dial together for ever.
fn jitter(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.75..1.25))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> PeerId {
        "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".parse().unwrap()
    }

    fn other() -> PeerId {
        "12D3KooWNbGStKgBKvn5mVKzJGEDvhnAPFMyAgLhTHVQWzeBhnrt".parse().unwrap()
    }

    fn address(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 5001).into()
    }

    #[test]
    fn a_peer_is_tried_with_growing_waits_until_it_is_there() {
        let mut now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        let names = vec!["a:5001".to_owned()];
        bootstrap.configure(&[PeerConfig { id: id(), addresses: names.clone() }], &[], now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(bootstrap.due(now), [Lookup { target: Target::Peer(id()), names: names.clone() }]);
            assert_eq!((bootstrap.due(now), bootstrap.next_due()), (vec![], None), "one attempt at a time");
            assert_eq!(bootstrap.peer_addresses(&id(), vec![address(1)], now), [address(1)]);
            bootstrap.failed(&Target::Peer(id()), None, now);
            let due = bootstrap.next_due().unwrap();
            waits.push(due - now);
            now = due;
        }
        assert!(waits[0] <= FIRST_WAIT.mul_f64(1.25), "{waits:?}");
        assert!(waits[11] >= ALONE_WAIT.mul_f64(0.75) && waits[11] <= ALONE_WAIT.mul_f64(1.25), "{waits:?}");
        bootstrap.connected(&id(), Some(address(1)));
        assert_eq!(bootstrap.next_due(), None);
        // Somebody else is here.
        bootstrap.learn(&other(), &[], vec![]);
        bootstrap.disconnected(&id(), false, now);
        assert!(bootstrap.next_due().unwrap() - now >= PEER_WAIT.mul_f64(0.75), "it was let in by nobody");
        bootstrap.connected(&id(), Some(address(1)));
        bootstrap.learn(&id(), &[], vec![]);
        bootstrap.disconnected(&id(), true, now);
        assert!(bootstrap.next_due().unwrap() - now <= FIRST_WAIT.mul_f64(1.25));
    }

    #[test]
    fn a_peer_without_addresses_is_waited_for_and_then_remembered() {
        let now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        bootstrap.configure(&[PeerConfig { id: id(), addresses: vec![] }], &[], now);
        assert_eq!(bootstrap.next_due(), None);
        bootstrap.connected(&id(), None);
        bootstrap.learn(&id(), &[], vec![address(3)]);
        bootstrap.disconnected(&id(), true, now);
        let later = bootstrap.next_due().unwrap();
        assert_eq!(bootstrap.due(later).len(), 1);
        assert_eq!(bootstrap.peer_addresses(&id(), vec![], later), [address(3)]);
    }

    #[test]
    fn an_address_where_another_identity_answered_is_left_out_once() {
        let now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        bootstrap.configure(&[PeerConfig { id: id(), addresses: vec!["a:1".into()] }], &[], now);
        let both = vec![address(1), address(2)];
        bootstrap.due(now);
        assert_eq!(bootstrap.peer_addresses(&id(), both.clone(), now), both);
        bootstrap.failed(&Target::Peer(id()), Some(address(1)), now);
        assert_eq!(bootstrap.peer_addresses(&id(), both.clone(), now), [address(2)]);
        bootstrap.failed(&Target::Peer(id()), Some(address(2)), now);
        assert_eq!(bootstrap.peer_addresses(&id(), both.clone(), now), both);
    }

    #[test]
    fn a_service_is_sampled_without_self_and_without_those_who_are_there() {
        let now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        let name = "peers.svc:5001".to_owned();
        bootstrap.configure(&[], std::slice::from_ref(&name), now);
        assert_eq!(bootstrap.due(now).len(), 1);
        bootstrap.is_own(address(1));
        bootstrap.learn(&id(), &[address(2).ip()], vec![address(2)]);
        let found: Vec<_> = (1..=40).map(address).collect();
        let dial = bootstrap.service_addresses(&name, Ok(&found), |peer| *peer == id(), now);
        assert_eq!(dial.len(), SAMPLE);
        assert!(!dial.contains(&address(1)) && !dial.contains(&address(2)), "{dial:?}");
        let again = bootstrap.service_addresses(&name, Ok(&found), |_| false, now);
        assert!(again.is_empty(), "what is being dialled is not dialled again: {again:?}");
        bootstrap.dialed(dial[0]);
        assert_eq!(bootstrap.service_addresses(&name, Ok(&found), |_| false, now).len(), 1);
    }

    /// 5,000 addresses, one of which lives; half of the others refuse at once, and half are silent for 5 s.
    #[test]
    fn one_who_lives_is_found_among_thousands_by_few_dials_at_a_time() {
        let mut now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        let name = "peers.svc:5001".to_owned();
        bootstrap.configure(&[], std::slice::from_ref(&name), now);
        let found: Vec<SocketAddr> =
            (0..5_000_u16).map(|n| ([10, 1, n.to_be_bytes()[0], n.to_be_bytes()[1]], 5001).into()).collect();
        let (alive, start) = (found[1_234], now);
        let mut flying: Vec<(SocketAddr, Instant)> = Vec::new();
        let (mut dialed, mut asked, mut in_a_second) = (HashSet::new(), 0, Vec::new());
        while !dialed.contains(&alive) {
            now = bootstrap.next_due().unwrap().max(now).min(now + STEP);
            assert!(now < start + Duration::from_secs(600), "{} were dialled", dialed.len());
            let done = |(address, since): &(SocketAddr, Instant)| {
                let is_silent =
                    address.port() == 5001 && address.ip().to_string().ends_with(['1', '3', '5', '7', '9']);
                now >= *since + if is_silent { Duration::from_secs(5) } else { Duration::ZERO }
            };
            for (address, _) in flying.extract_if(.., |dial| done(dial)).collect::<Vec<_>>() {
                bootstrap.dialed(address);
            }
            let mut next = Vec::new();
            for _ in bootstrap.due(now) {
                asked += 1;
                next.extend(bootstrap.service_addresses(&name, Ok(&found), |_| false, now));
            }
            next.extend(bootstrap.steps(|_| false, now).into_iter().flat_map(|(_, addresses)| addresses));
            in_a_second.retain(|at| now < *at + Duration::from_secs(1));
            in_a_second.extend(next.iter().map(|_| now));
            assert!(in_a_second.len() <= 80, "{} in a second", in_a_second.len());
            flying.extend(next.iter().map(|address| (*address, now)));
            assert!(flying.len() <= FLYING);
            for address in next {
                assert!(dialed.insert(address), "each has its turn before one is tried again");
            }
        }
        assert!(asked < 40, "and DNS is asked seldom for so long an answer: {asked}");
        bootstrap.connected(&id(), Some(alive));
        bootstrap.learn(&id(), &[alive.ip()], vec![alive]);
        flying.iter().for_each(|(address, _)| bootstrap.dialed(*address));
        assert!(bootstrap.steps(|_| true, now + ROUND).is_empty(), "somebody is here");
        assert!(bootstrap.next_due().unwrap() > now + STEP);
    }

    #[test]
    fn who_is_alone_asks_again_soon() {
        let mut now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        let name = "peers.svc:5001".to_owned();
        bootstrap.configure(&[], std::slice::from_ref(&name), now);
        let mut longest = |bootstrap: &mut Bootstrap, found: Result<&[SocketAddr], ()>| {
            let waits = (0..20).map(|_| {
                bootstrap.due(now);
                bootstrap.service_addresses(&name, found, |_| true, now);
                let due = bootstrap.services[&name].due;
                let wait = due - now;
                now = due;
                wait
            });
            waits.max().unwrap()
        };
        assert!(longest(&mut bootstrap, Err(())) <= ALONE_WAIT.mul_f64(1.25));
        assert!(longest(&mut bootstrap, Ok(&[address(1)])) <= ALONE_WAIT.mul_f64(1.25));
        let many: Vec<SocketAddr> =
            (0..=FEW).map(|n| ([10, 0, 0, 1], 1 + u16::try_from(n).unwrap()).into()).collect();
        assert!(longest(&mut bootstrap, Ok(&many)) >= SERVICE_WAIT.mul_f64(0.75));
        bootstrap.learn(&id(), &[], vec![]);
        assert!(longest(&mut bootstrap, Err(())) >= SERVICE_WAIT.mul_f64(0.75));
    }

    /// Guards the two rules of `learn`.
    #[test]
    fn claims_are_bounded_and_keep_no_other_peer_away() {
        let now = Instant::now();
        let mut bootstrap = Bootstrap::new();
        let name = "peers.svc:5001".to_owned();
        bootstrap.configure(&[], std::slice::from_ref(&name), now);
        bootstrap.connected(&id(), None);
        for n in 0..100 {
            bootstrap.learn(&id(), &[address(2).ip()], vec![address(2), address(n), address(n / 2)]);
        }
        bootstrap.learn(&id(), &[address(2).ip()], vec![address(2), address(3)]);
        let held = bootstrap.met.len() + bootstrap.claimed.values().map(Vec::len).sum::<usize>();
        assert_eq!(held, 1);
        let found = [address(2), address(3), address(4)];
        let mut dial = bootstrap.service_addresses(&name, Ok(&found), |peer| *peer == id(), now);
        dial.sort_unstable();
        assert_eq!(dial, [address(3), address(4)]);
        bootstrap.disconnected(&id(), true, now);
        assert!(bootstrap.claimed.is_empty());
    }
}
