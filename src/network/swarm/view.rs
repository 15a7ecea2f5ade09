//! What the driver writes and everyone else reads: the peers, what they hold, and what is wrong.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::book::Book;
use super::notary::{self, Keeper, content_key};
use crate::network::admission::Admission;
use crate::network::claim::ADDRESS_LIMIT;
use crate::network::facts::Facts;
use crate::network::gossip::holdings::Index;
use crate::network::gossip::members::{Member, State};
use crate::network::gossip::record::{Notary, Record};
use crate::network::gossip::{Gossip, Limits, Ms};
use crate::network::identity::Identity;
use crate::network::{self, Advertisement, KnownPeer, MemberState, Peer, PeerConfig, PeerStatus, Status};
use crate::oci::{Action, Digest, Gate, PeerId};

/// Problems that are kept at once, and subjects whose last log lines are remembered; what is more is not shown.
const PROBLEM_LIMIT: usize = 256;
/// Of those that are about addresses of services, and of those of the same words: dead addresses do not hide what is wrong at another one.
const ADDRESS_PROBLEMS: usize = 16;
const ALIKE: usize = 8;
/// Lines that the log gets about one subject within a time: a peer decides how often its problem changes.
const LOG_LINES: u32 = 5;
const LOG_TIME: Duration = Duration::from_secs(60);

/// Shared by the driver and the handles.
pub(super) struct Shared {
    pub id: PeerId,
    pub gate: Arc<dyn Gate>,
    pub admission: Admission,
    /// Wakes the driver after one of the fields below was written.
    pub wake: Notify,
    began: Instant,
    keeper: Arc<Keeper>,
    view: RwLock<View>,
    /// Whom a lease names.
    book: Mutex<Book>,
    peers: RwLock<BTreeMap<PeerId, Known>>,
    problems: Mutex<Problems>,
    listening: Mutex<Vec<String>>,
    orders: Mutex<Orders>,
    /// Rises when members change, or what the gate says of them.
    pub changed: watch::Sender<u64>,
}

/// What the gossip knows, and its members as the rest of the program knows them.
pub(super) struct View {
    pub gossip: Gossip<Index>,
    /// By the number of the member.
    members: HashMap<u32, Arc<Peer>>,
}

/// What handles want of the driver; the last one counts.
#[derive(Default)]
pub(super) struct Orders {
    pub recheck: bool,
    pub recheck_peers: HashSet<PeerId>,
    pub configure: Option<(Vec<PeerConfig>, Vec<String>)>,
    pub facts: Option<Facts>,
    pub zone: Option<String>,
}

/// A peer that is or was connected, or that is configured.
#[derive(Default)]
pub(super) struct Known {
    /// What it said of itself; `None`: it has not said who it is yet.
    pub peer: Option<Arc<Peer>>,
    /// Where its connections come from, or came from last.
    pub seen: Vec<IpAddr>,
    /// Whether a connection is up.
    pub connected: bool,
    /// When the last connection ended.
    pub gone: Option<Instant>,
}

/// What a problem is about; at most one each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Listen(SocketAddr),
    Own,
    /// What this node says of itself.
    Facts,
    /// The view on disk.
    Kept,
    Dns(String),
    /// An address that a service's name stands for.
    Address(SocketAddr),
    /// Not connected.
    Peer(PeerId),
    /// Connected, but something it does is wrong.
    Conduct(PeerId),
    /// Connected, but the gossip with it cannot begin.
    Gossip(PeerId),
    /// Two processes with its identity are connected.
    Twins(PeerId),
    /// Not trusted, and refused.
    Refused(PeerId),
    /// Its certificate is refused, though it is trusted otherwise or still.
    Certificate(PeerId),
}

/// What is wrong now, and what the log was told of it.
#[derive(Default)]
struct Problems {
    texts: BTreeMap<Subject, String>,
    /// Outlives the problem: since when lines are counted, and how many there were.
    logged: BTreeMap<Subject, (Instant, u32)>,
}

impl Shared {
    pub(super) fn new(
        identity: &Identity,
        gate: Arc<dyn Gate>,
        admission: Admission,
        limits: Limits,
    ) -> Self {
        let peer = identity.keypair().public().to_peer_id();
        let keeper = Arc::new(Keeper::new(identity.keypair().clone(), admission.clone(), Arc::clone(&gate)));
        let draft = Record {
            key: notary::member_key(&peer),
            identity: peer.to_bytes().into(),
            // Above that of an earlier life, if the clock is right; if it is not, others say so.
            seq: SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs().max(1)),
            process: rand::random(),
            ..Record::default()
        };
        let gossip =
            Gossip::new(draft, Arc::clone(&keeper) as _, Index::default(), limits, rand::random(), 0);
        Self {
            id: identity.peer_id().clone(),
            gate,
            admission,
            wake: Notify::new(),
            began: Instant::now(),
            keeper,
            book: Mutex::default(),
            view: RwLock::new(View { gossip, members: HashMap::new() }),
            peers: RwLock::default(),
            problems: Mutex::default(),
            listening: Mutex::default(),
            orders: Mutex::default(),
            changed: watch::Sender::default(),
        }
    }

    /// The gossip's clock.
    pub(super) fn now(&self) -> Ms {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(Ms::MAX)
    }

    /// When its clock will show that.
    pub(super) fn instant(&self, at: Ms) -> Instant {
        self.began + Duration::from_millis(at)
    }

    pub(super) fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn peers(&self) -> RwLockReadGuard<'_, BTreeMap<PeerId, Known>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn peers_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<PeerId, Known>> {
        self.peers.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn listening(&self) -> MutexGuard<'_, Vec<String>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_orders(&self) -> Orders {
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn order(&self, order: impl FnOnce(&mut Orders)) {
        order(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_one();
    }

    pub(super) fn advertise(&self, change: Advertisement) {
        let now = self.now();
        let left_out = {
            let gossip = &mut self.view_mut().gossip;
            match change {
                Advertisement::Added(digest) => gossip.hold(content_key(&digest), true, now),
                Advertisement::Removed(digest) => gossip.hold(content_key(&digest), false, now),
                Advertisement::All(digests) => {
                    let all: HashSet<u64> = digests.iter().map(content_key).collect();
                    gossip.hold_all(&all, now);
                }
            }
            gossip.left_out()
        };
        let text = left_out.map(|limit| {
            format!("this node holds more than {limit} digests; peers are not told of the rest")
        });
        self.problem(Subject::Own, text);
        self.wake.notify_one();
    }

    /// Takes note of what has become of members since the last time.
    pub(super) fn renew(&self) {
        let view = &mut *self.view_mut();
        let renewed = view.gossip.renewed();
        if !renewed.is_empty() {
            self.changed.send_modify(|count| *count += 1);
        }
        for number in renewed {
            match view.gossip.members().get(number).and_then(|member| notary::peer(&member.record)) {
                Some(member) => view.members.insert(number, member),
                None => view.members.remove(&number),
            };
        }
    }

    /// Members that may take part, this node included: the live ones, or with `remembered` also those of an earlier life.
    pub(super) fn members(&self, remembered: bool) -> Vec<network::Member> {
        let view = self.view();
        let suits = |member: &Member| member.is_live() || (remembered && member.state == State::Remembered);
        let member = |(number, member): (u32, &Member)| {
            let peer = match view.members.get(&number) {
                Some(peer) => Arc::clone(peer),
                None => notary::peer(&member.record)?,
            };
            let takes_part = number == 0
                || (self.gate.allows(&peer.id, Action::Connect) && !self.gate.is_unproved(&peer.id));
            let silent = Duration::from_millis(self.now().saturating_sub(member.since));
            takes_part.then(|| network::Member {
                peer,
                facts: Facts::decode(&member.record.facts).unwrap_or_default(),
                suspected: (member.state == State::Suspected).then_some(silent),
            })
        };
        view.gossip.members().iter().filter(|(_, member)| suits(member)).filter_map(member).collect()
    }

    /// Whom to dial first.
    pub(super) fn dial_first(&self, peers: &[PeerId]) {
        let keys = peers.iter().filter_map(|id| Some(notary::member_key(&id.as_str().parse().ok()?)));
        self.view_mut().gossip.dial_first(keys.collect());
    }

    /// Signed records of those of these members that live, in their order.
    pub(super) fn signed(&self, peers: &[PeerId]) -> Vec<bytes::Bytes> {
        let gossip = &self.view().gossip;
        let keys = peers.iter().filter_map(|id| Some(notary::member_key(&id.as_str().parse().ok()?)));
        let live = keys.filter_map(|key| gossip.members().by_key(key)).filter(|member| member.is_live());
        live.map(|member| member.record.signed.clone()).collect()
    }

    /// Takes what a lease says of who is there. In an open network anybody could stand there.
    pub(super) fn hint(&self, records: &[Vec<u8>]) {
        let records = if self.admission.is_open() { &[] } else { records };
        let judge = |record: &[u8]| {
            let record = self.keeper.open(&bytes::Bytes::copy_from_slice(record)).ok()?;
            (record.key != self.view().gossip.members().own().key).then_some(record)
        };
        if self.book().take(records, judge, Instant::now()) {
            self.wake.notify_one();
        }
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a peer is by the gossip's word.
    pub(super) fn state(&self, id: &PeerId) -> Option<State> {
        let view = self.view();
        let key = notary::member_key(&id.as_str().parse().ok()?);
        view.gossip.members().by_key(key).map(|member| member.state)
    }

    /// Notes what is wrong with `subject`, or that nothing is; logs a change.
    pub(super) fn problem(&self, subject: Subject, text: Option<String>) {
        let mut problems = self.problems();
        let gone = text.is_none();
        if let Some((text, last)) = problems.note(subject, text, Instant::now()) {
            let more = if last { "; more changes of this within a minute are not logged" } else { "" };
            if gone {
                tracing::info!(problem = %text, "no longer{more}");
            } else {
                tracing::warn!(problem = %text, "the network is degraded{more}");
            }
        }
    }

    /// Notes what is wrong at an address of a service: of thousands a few say enough.
    pub(super) fn address_problem(&self, address: SocketAddr, text: String) {
        let subject = Subject::Address(address);
        let kind = |address: SocketAddr, text: &str| text.replace(&address.to_string(), "");
        {
            let problems = self.problems();
            let others = problems.texts.iter().filter_map(|(other, text)| match other {
                Subject::Address(other) => Some(kind(*other, text)),
                _ => None,
            });
            let (others, own): (Vec<String>, _) = (others.collect(), kind(address, &text));
            let alike = others.iter().filter(|other| **other == own).count();
            let is_full = others.len() >= ADDRESS_PROBLEMS || alike >= ALIKE;
            if is_full && !problems.texts.contains_key(&subject) {
                return;
            }
        }
        self.problem(subject, Some(text));
    }

    /// Notes what is normal for a while after the start: shown, not logged, and less than a known cause.
    pub(super) fn expect(&self, subject: Subject, text: String) {
        self.problems().texts.entry(subject).or_insert(text);
    }

    pub(super) fn forget_problems(&self, about: impl Fn(&Subject) -> bool) {
        self.problems().texts.retain(|subject, _| !about(subject));
    }

    fn problems(&self) -> MutexGuard<'_, Problems> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn holders(&self, digest: &Digest) -> Vec<Arc<Peer>> {
        let view = self.view();
        let numbers = view.gossip.holdings().holders(content_key(digest));
        let members = numbers.into_iter().flatten().filter_map(|number| view.member(number));
        members.filter(|peer| self.gate.allows(&peer.id, Action::Believe)).map(Arc::clone).collect()
    }

    /// Signed records of some that hold `digest`, this node among them.
    pub(super) fn records(&self, digest: &Digest, limit: usize) -> Vec<bytes::Bytes> {
        let gossip = &self.view().gossip;
        let numbers = gossip.holdings().holders(content_key(digest)).into_iter().flatten();
        let live =
            numbers.filter_map(|number| gossip.members().get(number)).filter(|member| member.is_live());
        live.map(|member| member.record.signed.clone()).take(limit).collect()
    }

    pub(super) fn tag_peers(&self) -> Vec<Arc<Peer>> {
        let view = self.view();
        let members = view.members.keys().filter_map(|number| view.member(*number));
        members.filter(|peer| self.gate.allows(&peer.id, Action::Tags)).map(Arc::clone).collect()
    }

    /// Where the connections of a peer that said who it is come from now.
    pub(super) fn saw<'a>(&self, id: &PeerId, addresses: impl Iterator<Item = &'a IpAddr>) {
        if let Some(known) = self.peers_mut().get_mut(id).filter(|known| known.peer.is_some()) {
            known.seen.clear();
            for ip in addresses {
                if !known.seen.contains(ip) {
                    known.seen.push(*ip);
                }
            }
        }
    }

    pub(super) fn known_peers(&self) -> Vec<KnownPeer> {
        let view = self.view();
        let members = view.members.iter().filter(|(number, _)| **number != 0);
        let mut known: HashMap<PeerId, KnownPeer> = members
            .map(|(_, peer)| (peer.id.clone(), KnownPeer { peer: Arc::clone(peer), observed: Vec::new() }))
            .collect();
        drop(view);
        for (id, said) in self.peers().iter() {
            let Some(peer) = &said.peer else { continue };
            let known = known
                .entry(id.clone())
                .or_insert_with(|| KnownPeer { peer: Arc::clone(peer), observed: Vec::new() });
            known.observed.clone_from(&said.seen);
        }
        known.into_values().collect()
    }

    pub(super) fn status(&self) -> Status {
        let problems = self.problems().texts.clone();
        let mut peers: BTreeMap<PeerId, PeerStatus> = BTreeMap::new();
        let view = self.view();
        let neighbours: HashSet<u64> = view.gossip.neighbours().collect();
        for (number, member) in view.gossip.members().iter() {
            let Some(peer) = view.members.get(&number).filter(|_| number != 0) else { continue };
            let age = Duration::from_millis(self.now().saturating_sub(member.since));
            peers.insert(
                peer.id.clone(),
                PeerStatus {
                    state: Some(member_state(member)),
                    seconds: age.as_secs(),
                    neighbour: neighbours.contains(&member.key),
                    holds: member.count as usize,
                    ..self.peer_status(&peer.id, Some(peer))
                },
            );
        }
        let (advertised, members, complete) =
            (view.gossip.held(), view.gossip.members().live(), view.gossip.is_complete());
        drop(view);
        for (id, known) in self.peers().iter() {
            let status = peers.entry(id.clone()).or_insert_with(|| self.peer_status(id, known.peer.as_ref()));
            status.connected = known.connected;
            if !known.connected {
                status.problem = problems.get(&Subject::Peer(id.clone())).cloned().unwrap_or_default();
            }
        }
        let peers = peers.into_values().collect();
        let listening = self.listening().clone();
        let problems = self.admission.problems().into_iter().chain(problems.into_values()).collect();
        let admission = Some(self.admission.status());
        Status {
            id: self.id.to_string(),
            listening,
            peers,
            advertised,
            members,
            complete,
            admission,
            problems,
        }
    }

    fn peer_status(&self, id: &PeerId, peer: Option<&Arc<Peer>>) -> PeerStatus {
        PeerStatus {
            id: id.to_string(),
            node: peer.map(|peer| peer.node.clone()).unwrap_or_default(),
            zone: peer.map(|peer| peer.zone.clone()).unwrap_or_default(),
            version: peer.map(|peer| peer.version.clone()).unwrap_or_default(),
            connected: false,
            state: None,
            seconds: 0,
            neighbour: false,
            level: self.gate.level(id, Action::Connect),
            proof: self.gate.proof(id).to_string(),
            holds: 0,
            transfer: peer.map(|peer| peer.transfer.clone()).unwrap_or_default(),
            problem: String::new(),
        }
    }
}

impl View {
    /// Nobody is there any more.
    pub(super) fn clear(&mut self) {
        self.members.clear();
    }

    /// A live member other than this node.
    fn member(&self, number: u32) -> Option<&Arc<Peer>> {
        let is_live = number != 0 && self.gossip.members().get(number).is_some_and(Member::is_live);
        self.members.get(&number).filter(|_| is_live)
    }
}

fn member_state(member: &Member) -> MemberState {
    match member.state {
        State::Remembered => MemberState::Remembered,
        State::Alive => MemberState::Alive,
        State::Suspected => MemberState::Suspected,
        State::Dead => MemberState::Dead,
        State::Left => MemberState::Left,
    }
}

impl Problems {
    /// Takes what is wrong with `subject`. What changed, if the log is to be told, and whether that is the last line
    /// about it for a while.
    fn note(&mut self, subject: Subject, text: Option<String>, now: Instant) -> Option<(String, bool)> {
        let line = match text {
            Some(text) => {
                if self.texts.get(&subject) == Some(&text) {
                    return None;
                }
                if self.texts.len() >= PROBLEM_LIMIT && !self.texts.contains_key(&subject) {
                    return None;
                }
                self.texts.insert(subject.clone(), text.clone());
                text
            }
            None => self.texts.remove(&subject)?,
        };
        self.logged.retain(|_, (since, _)| now.duration_since(*since) < LOG_TIME);
        if self.logged.len() >= PROBLEM_LIMIT && !self.logged.contains_key(&subject) {
            return None;
        }
        let (_, lines) = self.logged.entry(subject).or_insert((now, 0));
        *lines = lines.saturating_add(1);
        (*lines <= LOG_LINES).then_some((line, *lines == LOG_LINES))
    }
}

/// Where to reach a port of a peer: at the addresses it is seen at first, then where it claims to be. An unspecified
/// claim stands for the seen address. Claims that would lead back to this machine or to many are dropped.
pub(super) fn reachable(seen: &[IpAddr], claimed: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    let mut add = |address: SocketAddr| {
        if addresses.len() < ADDRESS_LIMIT && !addresses.contains(&address) {
            addresses.push(address);
        }
    };
    for ip in seen.iter().filter(|ip| !is_link_local(ip)) {
        for claim in claimed {
            add(SocketAddr::new(*ip, claim.port()));
        }
    }
    let local = seen.iter().any(IpAddr::is_loopback);
    for claim in claimed {
        let ip = claim.ip().to_canonical();
        let useless = ip.is_unspecified() || ip.is_multicast() || (ip.is_loopback() && !local);
        if !useless && ip != IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
            add(SocketAddr::new(ip, claim.port()));
        }
    }
    addresses
}

/// Without its scope, such an address leads nowhere.
fn is_link_local(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seen_address_comes_first_and_claims_are_bounded() {
        let check = |seen: &[&str], claimed: &[&str], expected: &[&str]| {
            let seen: Vec<IpAddr> = seen.iter().map(|ip| ip.parse().unwrap()).collect();
            let claimed: Vec<SocketAddr> = claimed.iter().map(|address| address.parse().unwrap()).collect();
            let found: Vec<String> = reachable(&seen, &claimed).iter().map(ToString::to_string).collect();
            assert_eq!(found, expected);
        };
        check(&["10.0.0.7"], &["0.0.0.0:5002", "[::]:5002"], &["10.0.0.7:5002"]);
        check(&["10.0.0.7"], &["192.168.1.2:5002"], &["10.0.0.7:5002", "192.168.1.2:5002"]);
        check(&["10.0.0.7"], &["127.0.0.1:22", "224.0.0.1:1"], &["10.0.0.7:22", "10.0.0.7:1"]);
        check(&["127.0.0.1"], &["127.0.0.1:22"], &["127.0.0.1:22"]);
        check(&["fe80::1"], &["[2001:db8::1]:5"], &["[2001:db8::1]:5"]);
        check(&["fd00::1"], &[], &[]);
        let many: Vec<SocketAddr> = (1..100).map(|port| ([10, 0, 0, 1], port).into()).collect();
        assert_eq!(reachable(&[[10, 0, 0, 2].into()], &many).len(), ADDRESS_LIMIT);
    }

    /// Guards `LOG_LINES` and the bounds of `Problems`.
    #[test]
    fn a_peer_that_changes_its_errors_does_not_fill_the_log() {
        let id: PeerId = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".parse().unwrap();
        let (mut problems, now) = (Problems::default(), Instant::now());
        let mut lines = |subject: &Subject, now: Instant| {
            let texts = (0..50).flat_map(|n| [Some(format!("error {n}")), None]);
            texts.filter_map(|text| problems.note(subject.clone(), text, now)).collect::<Vec<_>>()
        };
        let conduct = Subject::Conduct(id);
        let told = lines(&conduct, now);
        assert_eq!(told.len(), LOG_LINES as usize);
        assert_eq!(
            told.iter().map(|(_, last)| *last).collect::<Vec<_>>(),
            [false, false, false, false, true]
        );
        assert_eq!(lines(&Subject::Own, now).len(), LOG_LINES as usize, "others are not concerned");
        assert_eq!(lines(&conduct, now + LOG_TIME).len(), LOG_LINES as usize);
        for port in 0..2 * PROBLEM_LIMIT {
            let address = ([10, 0, 0, 1], u16::try_from(port).unwrap()).into();
            problems.note(Subject::Address(address), Some("x".into()), now + LOG_TIME);
        }
        assert_eq!((problems.texts.len(), problems.logged.len()), (PROBLEM_LIMIT, PROBLEM_LIMIT));
    }
}
