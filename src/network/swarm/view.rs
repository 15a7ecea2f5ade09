//! What the driver writes and everyone else reads: the peers, what they hold, and what is wrong.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::inventory::{Held, Own};
use super::message::ADDRESS_LIMIT;
use crate::network::admission::Admission;
use crate::network::{Advertisement, Peer, PeerConfig, PeerStatus, Status};
use crate::oci::{Action, Digest, Gate, PeerId};

/// Problems that are kept at once, and subjects whose last log lines are remembered; what is more is not shown.
const PROBLEM_LIMIT: usize = 256;
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
    own: Mutex<Own>,
    peers: RwLock<BTreeMap<PeerId, Known>>,
    problems: Mutex<Problems>,
    listening: Mutex<Vec<String>>,
    orders: Mutex<Orders>,
}

/// What handles want of the driver; the last one counts.
#[derive(Default)]
pub(super) struct Orders {
    pub advertised: bool,
    pub recheck: bool,
    pub configure: Option<(Vec<PeerConfig>, Vec<String>)>,
}

/// A peer that is or was here.
#[derive(Default)]
pub(super) struct Known {
    /// Its record; `None`: it has not said who it is yet.
    pub peer: Option<Arc<Peer>>,
    pub held: Held,
    /// Whether a connection is up.
    pub connected: bool,
    /// Whether it said that it goes away.
    pub leaving: bool,
    /// When the last connection ended.
    pub gone: Option<Instant>,
}

/// What a problem is about; at most one each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Listen(SocketAddr),
    Own,
    Dns(String),
    /// An address that a service's name stands for.
    Address(SocketAddr),
    /// Not connected.
    Peer(PeerId),
    /// Connected, but something it does is wrong.
    Conduct(PeerId),
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
    pub(super) fn new(id: PeerId, gate: Arc<dyn Gate>, admission: Admission, limit: usize) -> Self {
        Self {
            id,
            gate,
            admission,
            wake: Notify::new(),
            own: Mutex::new(Own::new(limit)),
            peers: RwLock::default(),
            problems: Mutex::default(),
            listening: Mutex::default(),
            orders: Mutex::default(),
        }
    }

    pub(super) fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (changed, left_out) = {
            let mut own = self.own();
            (own.apply(change), own.left_out())
        };
        self.problem(
            Subject::Own,
            left_out.then(|| {
                let limit = super::inventory::INVENTORY_LIMIT;
                format!("this node holds more than {limit} digests; peers are not told of the rest")
            }),
        );
        if changed {
            self.order(|orders| orders.advertised = true);
        }
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
        let peers = self.peers();
        let holding =
            peers.iter().filter(|(_, known)| known.is_here() && known.held.digests.contains(digest));
        let trusted = holding.filter(|(id, _)| self.gate.allows(id, Action::Believe));
        trusted.filter_map(|(_, known)| known.peer.clone()).collect()
    }

    pub(super) fn tag_peers(&self) -> Vec<Arc<Peer>> {
        let peers = self.peers();
        let trusted =
            peers.iter().filter(|(id, known)| known.is_here() && self.gate.allows(id, Action::Tags));
        trusted.filter_map(|(_, known)| known.peer.clone()).collect()
    }

    pub(super) fn status(&self) -> Status {
        let problems = self.problems().texts.clone();
        let advertised = self.own().len();
        let peer = |(id, known): (&PeerId, &Known)| {
            let record = known.peer.as_deref();
            PeerStatus {
                id: id.to_string(),
                node: record.map(|peer| peer.node.clone()).unwrap_or_default(),
                zone: record.map(|peer| peer.zone.clone()).unwrap_or_default(),
                version: record.map(|peer| peer.version.clone()).unwrap_or_default(),
                connected: known.connected,
                level: self.gate.level(id, Action::Connect),
                proof: self.gate.proof(id).to_string(),
                holds: known.held.digests.len(),
                transfer: record.map(|peer| peer.transfer.clone()).unwrap_or_default(),
                problem: if known.connected {
                    String::new()
                } else {
                    problems.get(&Subject::Peer(id.clone())).cloned().unwrap_or_default()
                },
            }
        };
        let peers = self.peers().iter().map(peer).collect();
        let listening = self.listening().clone();
        let problems = self.admission.problems().into_iter().chain(problems.into_values()).collect();
        let admission = Some(self.admission.status());
        Status { id: self.id.to_string(), listening, peers, advertised, admission, problems }
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

impl Known {
    fn is_here(&self) -> bool {
        self.connected && !self.leaving
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
