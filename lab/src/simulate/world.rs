//! Simulated nodes, the links between them, and the time.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use peili::network::gossip::holdings::mix;
use peili::network::gossip::wire::Frame;
use peili::network::gossip::{Action, Gossip, Key, Limits, LinkId, Ms};
use prost::Message as _;

use super::holdings::{Pool, Set, Shared};
use super::notary::{Registry, Signer, draft};

/// The clock's step: what a frame takes from one node to another, the receiver's turn included.
pub(super) const STEP: Ms = 5;
/// What a connection takes: TCP, TLS, and the first words.
const CONNECT: Ms = 15;
/// When an attempt to connect to a machine that is gone is given up.
const CONNECT_TIMEOUT: Ms = 5_000;
/// Bytes of TCP's and TLS's handshakes with certificates, of both directions.
const HANDSHAKE: u64 = 5_000;
/// Changes that each log keeps; thousands of logs have to fit into one machine.
const LOG: usize = 4_096;

/// A node that runs.
pub(super) struct Node {
    pub(super) gossip: Gossip<Shared>,
    pub(super) started: Ms,
    /// When its view was complete.
    pub(super) joined: Option<Ms>,
    pub(super) sent: u64,
    pub(super) got: u64,
    pub(super) frames: u64,
    /// What it will hold, and when.
    pub(super) pulls: VecDeque<(Ms, u64)>,
    due: Ms,
}

/// Something that will happen.
enum Event {
    Frame(usize, LinkId, Box<Frame>),
    Up(usize, usize),
    Down(usize, LinkId),
    Unreachable(usize, Key),
}

/// All of it.
pub(super) struct World {
    pub(super) now: Ms,
    /// By number; numbers are not given again.
    pub(super) nodes: Vec<Option<Node>>,
    /// Bytes sent, by what they are for.
    pub(super) parts: BTreeMap<&'static str, u64>,
    /// Whether links may become lazy.
    floods: bool,
    numbers: HashMap<Key, usize>,
    links: HashMap<LinkId, (usize, usize)>,
    events: BTreeMap<Ms, Vec<Event>>,
    registry: Arc<Registry>,
    pool: Rc<RefCell<Pool>>,
    next: u64,
}

impl World {
    /// So many nodes that know one another and what each holds, and have no links yet.
    pub(super) fn new(sets: Vec<Set>, floods: bool) -> Self {
        let mut world = Self {
            now: 1_000_000,
            nodes: Vec::new(),
            parts: BTreeMap::new(),
            floods,
            numbers: HashMap::new(),
            links: HashMap::new(),
            events: BTreeMap::new(),
            registry: Arc::default(),
            pool: Rc::default(),
            next: 0,
        };
        let sets: Vec<Arc<Set>> = sets.into_iter().map(|set| world.pool.borrow_mut().put(set)).collect();
        for _ in &sets {
            world.start();
        }
        let own = |node: &Node| Arc::clone(&node.gossip.members().own().record);
        let records: Vec<_> = world.nodes.iter().flatten().map(own).collect();
        let now = world.now;
        for node in world.nodes.iter_mut().flatten() {
            for (record, set) in records.iter().zip(&sets) {
                let count = set.contents.len() as u32;
                let index = node.gossip.know(Arc::clone(record), count, set.hash, count, now);
                node.gossip.holdings_mut().know(index, Arc::clone(set));
            }
            node.joined = Some(now);
        }
        world
    }

    /// A node that knows nobody and holds nothing.
    pub(super) fn start(&mut self) -> usize {
        self.next += 1;
        let key = mix(self.next);
        let signer = Arc::new(Signer { registry: Arc::clone(&self.registry), key });
        let limits = Limits { changes: LOG, ..Limits::default() };
        let holdings = Shared::new(Rc::clone(&self.pool));
        let mut gossip = Gossip::new(draft(key), signer, holdings, limits, mix(key), self.now);
        if self.floods {
            gossip.flood();
        }
        let number = self.nodes.len();
        self.numbers.insert(key, number);
        self.nodes.push(Some(Node {
            gossip,
            started: self.now,
            joined: None,
            sent: 0,
            got: 0,
            frames: 0,
            pulls: VecDeque::new(),
            due: self.now,
        }));
        number
    }

    /// Its machine is gone: no connection is closed.
    pub(super) fn vanish(&mut self, number: usize) -> Option<Key> {
        let key = self.nodes[number].take()?.gossip.members().own().key;
        self.numbers.remove(&key);
        Some(key)
    }

    pub(super) fn node(&self, number: usize) -> Option<&Node> {
        self.nodes[number].as_ref()
    }

    /// Numbers of the nodes that run.
    pub(super) fn running(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|number| self.nodes[*number].is_some()).collect()
    }

    /// `from` will be connected to `to`.
    pub(super) fn connect(&mut self, from: usize, to: usize) {
        self.events.entry(self.now + CONNECT).or_default().push(Event::Up(from, to));
    }

    /// A node holds something, from now on.
    pub(super) fn hold(&mut self, number: usize, content: u64) {
        let now = self.now;
        if let Some(node) = &mut self.nodes[number] {
            node.gossip.hold(content, true, now);
            node.due = now;
        }
    }

    /// Counts from now on.
    pub(super) fn reset(&mut self) {
        self.parts.clear();
        for node in self.nodes.iter_mut().flatten() {
            (node.sent, node.got, node.frames) = (0, 0, 0);
        }
    }

    /// Moves the clock by [`STEP`].
    pub(super) fn step(&mut self) {
        self.now += STEP;
        let mut touched = HashSet::new();
        while let Some(entry) = self.events.first_entry() {
            if *entry.key() > self.now {
                break;
            }
            for event in entry.remove() {
                self.happen(event, &mut touched);
            }
        }
        for number in 0..self.nodes.len() {
            let Some(node) = &mut self.nodes[number] else { continue };
            let mut is_active = node.due <= self.now || touched.contains(&number);
            while node.pulls.front().is_some_and(|(at, _)| *at <= self.now) {
                if let Some((_, content)) = node.pulls.pop_front() {
                    node.gossip.hold(content, true, self.now);
                    is_active = true;
                }
            }
            if is_active {
                self.act(number);
            }
        }
        if self.now.is_multiple_of(1000) {
            self.pool.borrow_mut().purge(self.now);
        }
    }

    fn happen(&mut self, event: Event, touched: &mut HashSet<usize>) {
        let now = self.now;
        match event {
            Event::Frame(number, link, frame) => {
                let Some(node) = &mut self.nodes[number] else { return };
                // A fault would be one of the simulation: the sender is the same program.
                if let Err(fault) = node.gossip.receive(link, *frame, now) {
                    eprintln!("a frame was refused: {fault}");
                }
                touched.insert(number);
            }
            Event::Up(from, to) => {
                let key =
                    |number: usize| self.nodes[number].as_ref().map(|node| node.gossip.members().own().key);
                let (Some(of_from), Some(of_to)) = (key(from), key(to)) else { return };
                self.next += 1;
                let link = self.next as LinkId;
                self.links.insert(link, (from, to));
                for (number, peer, outbound) in [(from, of_to, true), (to, of_from, false)] {
                    let Some(node) = &mut self.nodes[number] else { continue };
                    node.gossip.link_up(link, peer, outbound, "10.100.200.1".into(), now);
                    node.sent += HANDSHAKE / 2;
                    node.got += HANDSHAKE / 2;
                    touched.insert(number);
                }
            }
            Event::Down(number, link) => {
                if let Some(node) = &mut self.nodes[number] {
                    node.gossip.link_down(link, now);
                    touched.insert(number);
                }
            }
            Event::Unreachable(number, key) => {
                if let Some(node) = &mut self.nodes[number] {
                    node.gossip.dial_failed(key, now);
                    touched.insert(number);
                }
            }
        }
    }

    fn act(&mut self, number: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[number] else { return };
        node.gossip.tick(now);
        if node.joined.is_none() && node.gossip.is_complete() {
            node.joined = Some(now);
        }
        for action in node.gossip.actions() {
            match action {
                Action::Dial(key) => match self.numbers.get(&key) {
                    Some(to) => self.connect(number, *to),
                    None => {
                        let events = self.events.entry(now + CONNECT_TIMEOUT).or_default();
                        events.push(Event::Unreachable(number, key));
                    }
                },
                Action::Close(link) => {
                    self.send(number, link);
                    if let Some(other) = self.other(link, number) {
                        self.events.entry(now + STEP).or_default().push(Event::Down(other, link));
                    }
                    if let Some(node) = &mut self.nodes[number] {
                        node.gossip.link_down(link, now);
                    }
                    self.links.remove(&link);
                }
                Action::Dead(_) | Action::Twin(_) | Action::Observed(..) => {}
            }
        }
        let links: Vec<LinkId> = self.nodes[number].iter().flat_map(|node| node.gossip.links()).collect();
        for link in links {
            self.send(number, link);
        }
        if let Some(node) = &mut self.nodes[number] {
            node.due = node.gossip.next_due(now).max(now + STEP);
            drop(node.gossip.renewed());
        }
    }

    fn other(&self, link: LinkId, than: usize) -> Option<usize> {
        self.links.get(&link).map(|(a, b)| if *a == than { *b } else { *a })
    }

    fn send(&mut self, number: usize, link: LinkId) {
        let now = self.now;
        let Some(node) = &mut self.nodes[number] else { return };
        let Some(frame) = node.gossip.flush(link, now) else { return };
        let (data, acknowledgement) = cost(frame.encoded_len());
        node.sent += data;
        node.got += acknowledgement;
        node.frames += 1;
        self.count(&frame, data + acknowledgement);
        let Some(other) = self.other(link, number) else { return };
        if let Some(receiver) = &mut self.nodes[other] {
            receiver.got += data;
            receiver.sent += acknowledgement;
            self.events.entry(now + STEP).or_default().push(Event::Frame(other, link, Box::new(frame)));
        }
    }

    fn count(&mut self, frame: &Frame, all: u64) {
        let parts = [
            ("changes of content", lengths(frame.deltas.iter().map(prost::Message::encoded_len))),
            ("records", lengths(frame.records.iter().map(bytes::Bytes::len))),
            ("suspicions", lengths(frame.suspicions.iter().map(bytes::Bytes::len))),
            ("what lazy links are told", lengths(frame.have.iter().map(prost::Message::encoded_len))),
            ("whole views", frame.bulk.as_ref().map_or(0, |bulk| bulk.encoded_len() as u64)),
            (
                "comparisons",
                frame.buckets.len() as u64
                    + frame.summary.as_ref().map_or(0, |summary| summary.encoded_len() as u64)
                    + lengths(frame.want.iter().map(prost::Message::encoded_len))
                    + lengths(frame.wholes.iter().map(prost::Message::encoded_len)),
            ),
        ];
        let mut rest = all;
        for (part, bytes) in parts {
            *self.parts.entry(part).or_default() += bytes;
            rest = rest.saturating_sub(bytes);
        }
        *self.parts.entry("TCP, TLS and frames").or_default() += rest;
    }
}

/// Bytes of parts of these lengths, each with its tag and length before it.
fn lengths(each: impl Iterator<Item = usize>) -> u64 {
    each.map(|length| length as u64 + 2).sum()
}

/// What a frame takes on the wire, and its acknowledgements: the length before it (4 bytes), yamux (12), TLS records (22 each, of
/// 16 KiB), and TCP over IPv4 with timestamps (52 for each segment of 1,448; one acknowledgement for two segments).
pub(super) fn cost(frame: usize) -> (u64, u64) {
    let bytes = frame + 4 + 12;
    let bytes = bytes + 22 * bytes.div_ceil(16 << 10);
    let segments = bytes.div_ceil(1448);
    ((bytes + 52 * segments) as u64, 52 * segments.div_ceil(2) as u64)
}
