//! Simulated nodes, the links between them, and the time.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use peili::network::gossip::holdings::mix;
use peili::network::gossip::wire::Frame;
use peili::network::gossip::{Action, Gossip, Key, Limits, LinkId, Ms};
use prost::Message as _;

use super::holdings::{Pool, Set, Shared};
use super::notary::{Registry, Signer, draft};

/// The clock's step, where nothing else is said: what a frame takes from one node to another, the receiver's turn included.
pub(super) const STEP: Ms = 5;
/// Steps that a connection takes from SYN to the gossip's first word, with a cluster key: TCP 2, TLS 3, yamux 1, a stream for
/// the certificate 4, one for the greeting 4, the gossip's 2 (counted in a trace of real processes).
const CONNECT: Ms = 16;
/// When an attempt to connect to a machine that is gone is given up.
const CONNECT_TIMEOUT: Ms = 5_000;
/// Bytes of all that and of its end, of both directions (from the same trace: 7,300 to 8,600).
const HANDSHAKE: u64 = 8_000;
/// What a process takes to read a whole view of 20,000 contents: pairs matter little (measured with 8 and 50 processes and
/// nothing else to do), and microseconds for each member's record, of which two signatures are verified.
const READING: Ms = 20;
const VERIFYING: u64 = 100;
/// The first moment.
const BEGINNING: Ms = 1_000_000;
/// Changes that each log keeps; thousands of logs have to fit into one machine.
const LOG: usize = 4_096;

/// A node that runs.
pub(super) struct Node {
    pub(super) gossip: Gossip<Shared>,
    pub(super) started: Ms,
    /// When its clock showed 0.
    zero: Ms,
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
    /// Bytes on all wires: of nodes that came or went too, and of handshakes.
    pub(super) wire: u64,
    step: Ms,
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
    pub(super) fn new(sets: Vec<Set>, floods: bool, step: Ms) -> Self {
        let mut world = Self {
            now: BEGINNING,
            nodes: Vec::new(),
            parts: BTreeMap::new(),
            wire: 0,
            step,
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
        // A process's clock begins with it; those of the beginning have run for long.
        let zero = if self.now == BEGINNING { 0 } else { self.now };
        let mut gossip = Gossip::new(draft(key), signer, holdings, limits, mix(key), self.now - zero);
        if self.floods {
            gossip.flood();
        }
        let number = self.nodes.len();
        self.numbers.insert(key, number);
        self.nodes.push(Some(Node {
            gossip,
            started: self.now,
            zero,
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
        self.events.entry(self.now + CONNECT * self.step).or_default().push(Event::Up(from, to));
    }

    /// A node holds something, from now on.
    pub(super) fn hold(&mut self, number: usize, content: u64) {
        let now = self.now;
        if let Some(node) = &mut self.nodes[number] {
            node.gossip.hold(content, true, now - node.zero);
            node.due = now;
        }
    }

    /// Counts from now on.
    pub(super) fn reset(&mut self) {
        self.parts.clear();
        self.wire = 0;
        for node in self.nodes.iter_mut().flatten() {
            (node.sent, node.got, node.frames) = (0, 0, 0);
        }
    }

    /// Moves the clock by a step.
    pub(super) fn step(&mut self) {
        self.now += self.step;
        while let Some(entry) = self.events.first_entry() {
            if *entry.key() > self.now {
                break;
            }
            for event in entry.remove() {
                // The driver has a turn after each, so that what comes at the same time goes on in different frames.
                for number in self.happen(event).into_iter().flatten() {
                    self.act(number);
                }
            }
        }
        for number in 0..self.nodes.len() {
            let Some(node) = &mut self.nodes[number] else { continue };
            let mut is_active = node.due <= self.now;
            while node.pulls.front().is_some_and(|(at, _)| *at <= self.now) {
                if let Some((_, content)) = node.pulls.pop_front() {
                    node.gossip.hold(content, true, self.now - node.zero);
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

    /// Returns to whom.
    fn happen(&mut self, event: Event) -> [Option<usize>; 2] {
        let now = self.now;
        match event {
            Event::Frame(number, link, frame) => {
                let Some(node) = &mut self.nodes[number] else { return [None; 2] };
                // A fault would be one of the simulation: the sender is the same program.
                if let Err(fault) = node.gossip.receive(link, *frame, now - node.zero) {
                    eprintln!("a frame was refused: {fault}");
                }
                [Some(number), None]
            }
            Event::Up(from, to) => {
                let key =
                    |number: usize| self.nodes[number].as_ref().map(|node| node.gossip.members().own().key);
                let (Some(of_from), Some(of_to)) = (key(from), key(to)) else { return [None; 2] };
                self.next += 1;
                let link = self.next as LinkId;
                self.links.insert(link, (from, to));
                self.wire += HANDSHAKE;
                for (number, peer, outbound) in [(from, of_to, true), (to, of_from, false)] {
                    let Some(node) = &mut self.nodes[number] else { continue };
                    node.gossip.link_up(link, peer, outbound, "10.100.200.1".into(), now - node.zero);
                    node.sent += HANDSHAKE / 2;
                    node.got += HANDSHAKE / 2;
                }
                [Some(from), Some(to)]
            }
            Event::Down(number, link) => {
                let Some(node) = &mut self.nodes[number] else { return [None; 2] };
                node.gossip.link_down(link, now - node.zero);
                [Some(number), None]
            }
            Event::Unreachable(number, key) => {
                let Some(node) = &mut self.nodes[number] else { return [None; 2] };
                node.gossip.dial_failed(key, now - node.zero);
                [Some(number), None]
            }
        }
    }

    fn act(&mut self, number: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[number] else { return };
        node.gossip.tick(now - node.zero);
        if node.joined.is_none() && node.gossip.is_complete() {
            node.joined = Some(now + READING + node.gossip.members().live() as Ms * VERIFYING / 1000);
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
                        self.events.entry(now + self.step).or_default().push(Event::Down(other, link));
                    }
                    if let Some(node) = &mut self.nodes[number] {
                        node.gossip.link_down(link, now - node.zero);
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
            node.due = (node.zero + node.gossip.next_due(now - node.zero)).max(now + self.step);
            if self.step == 1 {
                // tokio's timers are late by up to a millisecond, so that no two nodes keep step; longer steps are late enough.
                node.due += mix(now ^ mix(number as u64)) % 2;
            }
            drop(node.gossip.renewed());
        }
    }

    fn other(&self, link: LinkId, than: usize) -> Option<usize> {
        self.links.get(&link).map(|(a, b)| if *a == than { *b } else { *a })
    }

    fn send(&mut self, number: usize, link: LinkId) {
        let now = self.now;
        let Some(node) = &mut self.nodes[number] else { return };
        let Some(frame) = node.gossip.flush(link, now - node.zero) else { return };
        let (data, acknowledgement) = cost(frame.encoded_len());
        node.sent += data;
        node.got += acknowledgement;
        node.frames += 1;
        self.wire += data + acknowledgement;
        self.count(&frame, data + acknowledgement);
        let Some(other) = self.other(link, number) else { return };
        if let Some(receiver) = &mut self.nodes[other] {
            receiver.got += data;
            receiver.sent += acknowledgement;
            self.events.entry(now + self.step).or_default().push(Event::Frame(other, link, Box::new(frame)));
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
