//! Whom a node without neighbours may ask by the word of a lease: signed records, put there by anybody who may write it.
//!
//! A hint and no more. Its records are judged as those of the gossip are, and become no part of the view; their addresses are dialled only
//! at the ports that this configuration knows, few and seldom, and whoever answers there has to prove that the record is its own.
//! Pure state: the driver dials.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId as P2pId;
use tokio::time::Instant;

use super::notary::identity;
use crate::network::Config;
use crate::network::gossip::record::Record;

/// Records that are looked at, and bytes of all of them.
const RECORDS: usize = 5;
const BYTES: usize = 4 << 10;
/// Dials that may be under way.
pub(super) const AT_ONCE: usize = 2;
/// Dials in a minute.
pub(super) const RATE: usize = 5;
const MINUTE: Duration = Duration::from_secs(60);
/// Between two dials of one address.
const AGAIN: Duration = Duration::from_secs(12);
/// The same records are judged again after so long: keys and lists may be others.
const STALE: Duration = Duration::from_secs(10);

/// What a lease says of who is there.
#[derive(Default)]
pub(super) struct Book {
    /// At which nodes are reached.
    ports: Vec<u16>,
    /// As it was given last, and when it was judged.
    given: Vec<Vec<u8>>,
    judged: Option<Instant>,
    /// Where somebody may be, those of whom little is known to be tried last.
    places: Vec<Place>,
    dialed: VecDeque<Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    peer: P2pId,
    address: SocketAddr,
    tried: Option<Instant>,
}

impl Book {
    pub(super) fn new(config: &Config) -> Self {
        let ports = config.listen.iter().chain(&config.advertise).map(SocketAddr::port);
        Self { ports: ports.filter(|port| *port != 0).collect(), ..Self::default() }
    }

    /// Takes what a lease says. `judge`: whether a record is believed to be its member's, and another one's than this node. Returns
    /// whether it was looked at.
    pub(super) fn take(
        &mut self,
        records: &[Vec<u8>],
        judge: impl Fn(&[u8]) -> Option<Arc<Record>>,
        now: Instant,
    ) -> bool {
        let mut bytes = 0;
        let fits = |record: &&Vec<u8>| {
            bytes += record.len();
            bytes <= BYTES
        };
        let records: Vec<&Vec<u8>> = records.iter().take(RECORDS).take_while(fits).collect();
        let is_same = self.given.iter().eq(records.iter().copied());
        if is_same && self.judged.is_some_and(|judged| now < judged + STALE) {
            return false;
        }
        let records: Vec<Vec<u8>> = records.into_iter().cloned().collect();
        let believed = records.iter().filter_map(|record| judge(record)).filter(|record| !record.leaving);
        let found: Vec<(P2pId, Vec<SocketAddr>)> = believed
            .filter_map(|record| Some((identity(&record.identity).ok()?, self.usable(&record.control))))
            .collect();
        let before = std::mem::take(&mut self.places);
        let longest = found.iter().map(|(_, addresses)| addresses.len()).max().unwrap_or(0);
        // One address of each, and then the next ones.
        for place in 0..longest {
            for (peer, addresses) in &found {
                let Some(address) = addresses.get(place).copied() else { continue };
                let known = before.iter().find(|known| (&known.peer, known.address) == (peer, address));
                let tried = known.and_then(|known| known.tried);
                self.places.push(Place { peer: *peer, address, tried });
            }
        }
        (self.given, self.judged) = (records, Some(now));
        true
    }

    fn usable(&self, claimed: &[SocketAddr]) -> Vec<SocketAddr> {
        let mut usable: Vec<SocketAddr> = Vec::new();
        for claim in claimed {
            let address = SocketAddr::new(claim.ip().to_canonical(), claim.port());
            if self.ports.contains(&address.port())
                && is_elsewhere(address.ip())
                && !usable.contains(&address)
            {
                usable.push(address);
            }
        }
        usable
    }

    /// Whether it names somebody who may be asked.
    pub(super) fn has_somebody(&self) -> bool {
        !self.places.is_empty()
    }

    /// Whom to dial now, of those that are not `connected`. `flying`: dials that are under way.
    pub(super) fn next(
        &mut self,
        flying: usize,
        connected: impl Fn(&P2pId) -> bool,
        now: Instant,
    ) -> Option<(P2pId, SocketAddr)> {
        if self.due(flying, now)? > now {
            return None;
        }
        let may = |place: &&mut Place| {
            place.tried.is_none_or(|tried| now >= tried + AGAIN) && !connected(&place.peer)
        };
        let place = self.places.iter_mut().filter(may).min_by_key(|place| place.tried)?;
        place.tried = Some(now);
        self.dialed.push_back(now);
        Some((place.peer, place.address))
    }

    /// When somebody may be dialled; `None`: not until something happens.
    pub(super) fn due(&mut self, flying: usize, now: Instant) -> Option<Instant> {
        while self.dialed.front().is_some_and(|at| now >= *at + MINUTE) {
            self.dialed.pop_front();
        }
        let place = self.places.iter().map(|place| place.tried.map_or(now, |tried| tried + AGAIN)).min()?;
        if flying >= AT_ONCE {
            return None;
        }
        let full = self.dialed.front().filter(|_| self.dialed.len() >= RATE);
        Some(full.map_or(place, |first| place.max(*first + MINUTE)))
    }

    /// Sockets of tests are on this machine.
    #[cfg(test)]
    pub(super) fn put(&mut self, peer: P2pId, address: SocketAddr) {
        self.places.push(Place { peer, address, tried: None });
    }
}

/// Whether an address can be that of another machine, and of one only.
fn is_elsewhere(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let nowhere = ip.is_loopback() || ip.is_link_local() || ip.is_multicast();
            // "This network", and what is reserved, broadcast among it.
            !nowhere && ip.octets()[0] != 0 && ip.octets()[0] < 240
        }
        IpAddr::V6(ip) => {
            let parts = ip.segments();
            // Which others turn into an IPv4 address: NAT64 (RFC 6052), 6to4 (RFC 3056), and the compatible ones of old.
            let inner = match parts {
                [0x64, 0xff9b, 0, 0, 0, 0, high, low]
                | [0, 0, 0, 0, 0, 0, high, low]
                | [0x2002, high, low, ..] => Some((u32::from(high) << 16) | u32::from(low)),
                _ => None,
            };
            let is_site_local = parts[0] & 0xffc0 == 0xfec0;
            let is_discarded = parts[..4] == [0x100, 0, 0, 0] || parts[..2] == [0x2001, 0xdb8];
            !(ip.is_multicast() || ip.is_unicast_link_local() || is_site_local || is_discarded)
                && inner.is_none_or(|inner| is_elsewhere(IpAddr::V4(inner.into())))
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    fn peer() -> P2pId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    fn record(peer: P2pId, control: &[&str]) -> Record {
        let control = control.iter().map(|address| address.parse().unwrap()).collect();
        Record { identity: peer.to_bytes().into(), control, ..Record::default() }
    }

    /// A book of records that are believed.
    fn book(records: &[Record]) -> Book {
        let config = Config { listen: vec!["0.0.0.0:5001".parse().unwrap()], ..Config::default() };
        let mut book = Book::new(&config);
        fill(&mut book, records, Instant::now());
        book
    }

    fn fill(book: &mut Book, records: &[Record], now: Instant) {
        let names: Vec<Vec<u8>> = (0..records.len()).map(|number| number.to_be_bytes().to_vec()).collect();
        let judge = |bytes: &[u8]| {
            let number = usize::from_be_bytes(bytes.try_into().ok()?);
            records.get(number).cloned().map(Arc::new)
        };
        book.take(&names, judge, now);
    }

    fn addresses(book: &Book) -> Vec<String> {
        book.places.iter().map(|place| place.address.to_string()).collect()
    }

    #[test]
    fn only_addresses_of_other_machines_at_the_configured_port_are_used() {
        let claimed = [
            "10.0.0.1:5001",
            "10.0.0.1:22",
            "127.0.0.1:5001",
            "[::1]:5001",
            "[::ffff:127.0.0.1]:5001",
            "169.254.169.254:5001",
            "[fe80::1]:5001",
            "224.0.0.1:5001",
            "[ff02::1]:5001",
            "0.0.0.0:5001",
            "[::]:5001",
            "[64:ff9b::a9fe:a9fe]:5001",
            "[64:ff9b::7f00:1]:5001",
            "[2002:7f00:1::]:5001",
            "[::127.0.0.1]:5001",
            "[fec0::1]:5001",
            "[100::1]:5001",
            "[2001:db8::1]:5001",
            "255.255.255.255:5001",
            "[::ffff:10.0.0.1]:5001",
            "[fd00::1]:5001",
            "[64:ff9b::a00:1]:5001",
        ];
        let book = book(&[record(peer(), &claimed)]);
        assert_eq!(addresses(&book), ["10.0.0.1:5001", "[fd00::1]:5001", "[64:ff9b::a00:1]:5001"]);
    }

    #[test]
    fn a_port_that_is_advertised_is_a_configured_one() {
        let config = Config {
            listen: vec!["0.0.0.0:0".parse().unwrap()],
            advertise: vec!["10.0.0.9:6001".parse().unwrap()],
            ..Config::default()
        };
        let mut book = Book::new(&config);
        fill(&mut book, &[record(peer(), &["10.0.0.1:6001", "10.0.0.1:5001"])], Instant::now());
        assert_eq!(addresses(&book), ["10.0.0.1:6001"]);
    }

    #[test]
    fn two_at_once_and_five_a_minute() {
        let many: Vec<Record> = (1..6)
            .map(|n| record(peer(), &[&format!("10.0.0.{n}:5001"), &format!("10.0.1.{n}:5001")]))
            .collect();
        let mut book = book(&many);
        let mut now = Instant::now();
        assert_eq!(book.next(0, |_| false, now).unwrap().1.to_string(), "10.0.0.1:5001");
        assert_eq!(book.next(1, |_| false, now).unwrap().1.to_string(), "10.0.0.2:5001");
        assert_eq!((book.next(2, |_| false, now), book.due(2, now)), (None, None));
        let mut dialed = vec![now, now];
        for _ in 0..6_000 {
            now += Duration::from_millis(100);
            // All fail at once; and the lease is written anew all the time.
            fill(&mut book, &many[..4], now);
            dialed.extend(book.next(0, |_| false, now).map(|_| now));
        }
        for (at, first) in dialed.iter().enumerate() {
            let within = dialed[at..].iter().filter(|other| **other < *first + MINUTE).count();
            assert!(within <= RATE, "{within}");
        }
        assert!(dialed.len() >= 50, "and it goes on: {}", dialed.len());
        assert!(book.next(0, |_| true, now + MINUTE).is_none(), "who is here is not dialled");
    }

    #[test]
    fn one_address_is_not_dialled_again_at_once() {
        let mut book = book(&[record(peer(), &["10.0.0.1:5001"])]);
        let now = Instant::now();
        assert!(book.next(0, |_| false, now).is_some());
        assert_eq!(book.due(0, now), Some(now + AGAIN));
        assert!(book.next(0, |_| false, now + AGAIN / 2).is_none());
        assert!(book.next(0, |_| false, now + AGAIN).is_some());
    }

    #[test]
    fn what_is_gone_from_the_book_is_dialled_no_more() {
        let mut book = book(&[record(peer(), &["10.0.0.1:5001"])]);
        assert!(book.has_somebody());
        fill(&mut book, &[], Instant::now());
        assert!(!book.has_somebody() && book.next(0, |_| false, Instant::now()).is_none());
        let leaving = Record { leaving: true, ..record(peer(), &["10.0.0.1:5001"]) };
        fill(&mut book, &[leaving], Instant::now());
        assert!(!book.has_somebody());
    }

    /// A hostile book: more than is read.
    #[test]
    fn of_a_long_book_a_little_is_looked_at() {
        let judged = std::cell::Cell::new(0);
        let judge = |_: &[u8]| {
            judged.set(judged.get() + 1);
            None
        };
        let (mut book, now) = (Book::default(), Instant::now());
        book.take(&vec![vec![7; 100]; 10_000], judge, now);
        assert_eq!(judged.get(), RECORDS);
        book.take(&vec![vec![7; 100]; 10_000], judge, now + STALE / 2);
        assert_eq!(judged.get(), RECORDS, "the same is not judged again");
        book.take(&vec![vec![7; 100]; 10_000], judge, now + STALE);
        assert_eq!(judged.get(), 2 * RECORDS, "at once: trust may be another");
        book.take(&[vec![7; BYTES + 1], vec![7]], judge, now + STALE);
        assert_eq!(judged.get(), 2 * RECORDS, "nor what is too long");
        let all: Vec<String> =
            (0..10_000).map(|n| format!("10.{}.{}.{}:5001", n / 2_500, n / 250 % 10, n % 250)).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut book = self::book(&[record(peer(), &all)]);
        let dialed = (0..600).filter(|n| book.next(0, |_| false, now + MINUTE / 600 * *n).is_some()).count();
        assert_eq!(dialed, RATE);
    }
}
