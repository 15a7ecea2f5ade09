//! Some nodes in one process and a network that loses what it is told to; time passes when the test says so.

mod bounds;
mod content;
mod election;
mod failure;
mod kept;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::holdings::Index;
use super::record::{RecordError, Suspicion};
use super::*;

/// Steps of the clock, and what a frame takes.
const STEP: Ms = 5;

/// Signs with nothing but a mark, which stands for what only the owner can do.
struct Mark {
    key: Key,
    /// Records that are not admitted.
    barred: Arc<Mutex<HashSet<Key>>>,
}

/// The signature of a member.
fn mark(key: Key) -> Vec<u8> {
    mix(key ^ 77).to_le_bytes().repeat(8)
}

use super::holdings::mix;

impl Notary for Mark {
    fn seal(&self, record: Record) -> Arc<Record> {
        let body = record.body();
        Arc::new(record.sealed(body, mark(self.key)))
    }

    fn open(&self, signed: &Bytes) -> Result<Arc<Record>, RecordError> {
        let (mut record, parts) = Record::parse(signed)?;
        let key = record.identity.first_chunk::<8>().ok_or(RecordError::Field("identity"))?;
        record.key = u64::from_le_bytes(*key);
        if parts.signature != mark(record.key) {
            return Err(RecordError::Signature);
        }
        if self.barred.lock().unwrap().contains(&record.key) {
            return Err(RecordError::Admission("barred".into()));
        }
        Ok(Arc::new(record))
    }

    fn accuse(&self, subject: u64, seq: u64) -> Arc<Suspicion> {
        Arc::new(Suspicion::sealed(subject, seq, self.key, mark(self.key)))
    }

    fn hear(
        &self,
        signed: &Bytes,
        identity: &dyn Fn(u64) -> Option<Bytes>,
    ) -> Result<Arc<Suspicion>, RecordError> {
        let (suspicion, parts) = Suspicion::parse(signed)?;
        let known = identity(suspicion.accuser).is_some() && parts.signature == mark(suspicion.accuser);
        if known { Ok(Arc::new(suspicion)) } else { Err(RecordError::Signature) }
    }
}

struct World {
    now: Ms,
    nodes: BTreeMap<Key, Gossip<Index>>,
    /// The ends of each link.
    links: BTreeMap<LinkId, (Key, Key)>,
    under_way: Vec<(Ms, Key, LinkId, Bytes)>,
    barred: Arc<Mutex<HashSet<Key>>>,
    /// Pairs between which nothing passes any more.
    cut: HashSet<(Key, Key)>,
    /// Nodes that stand still.
    frozen: HashSet<Key>,
    /// Nodes in all.
    size: usize,
    /// Bytes of inventories that were sent.
    inventories: usize,
    /// Whether those who know nobody find somebody.
    bootstraps: bool,
    next: u64,
}

fn draft(key: Key, seq: u64) -> Record {
    Record {
        key,
        identity: Bytes::copy_from_slice(&key.to_le_bytes()),
        seq,
        process: mix(key ^ seq),
        control: vec![([10, 0, 0, 1], 5001).into()],
        ..Record::default()
    }
}

impl World {
    /// So many nodes, each of which knows the first one.
    fn new(count: usize) -> Self {
        let mut world = Self {
            now: 1_000_000,
            nodes: BTreeMap::new(),
            links: BTreeMap::new(),
            under_way: Vec::new(),
            barred: Arc::default(),
            cut: HashSet::new(),
            frozen: HashSet::new(),
            size: count,
            inventories: 0,
            bootstraps: true,
            next: 0,
        };
        let mut first = None;
        for _ in 0..count {
            let key = world.start(Limits::default());
            match first {
                None => first = Some(key),
                Some(first) => world.connect(key, first),
            }
        }
        world
    }

    /// The same, after they have found one another.
    fn settled(count: usize) -> Self {
        let mut world = Self::new(count);
        world.until("everybody knows everybody", 10_000, |world| {
            world.is_one()
                && world.nodes.values().all(|node| node.is_complete() && node.members().live() == count)
        });
        world
    }

    fn start(&mut self, limits: Limits) -> Key {
        self.next += 1;
        let key = mix(self.next);
        self.restart(key, 100, limits);
        key
    }

    fn restart(&mut self, key: Key, seq: u64, limits: Limits) {
        let notary = Arc::new(Mark { key, barred: Arc::clone(&self.barred) });
        let seed = mix(key ^ seq);
        let node = Gossip::new(draft(key, seq), notary, Index::default(), limits, seed, self.now);
        self.nodes.insert(key, node);
    }

    fn keys(&self) -> Vec<Key> {
        self.nodes.keys().copied().collect()
    }

    fn connect(&mut self, from: Key, to: Key) {
        let (passes, now) = (self.passes(from, to), self.now);
        let Some(node) = self.nodes.get_mut(&from) else { return };
        if !passes {
            node.dial_failed(to, now);
            return;
        }
        self.next += 1;
        let link = self.next as LinkId;
        self.links.insert(link, (from, to));
        node.link_up(link, to, true, "10.0.0.1".into(), now);
        if let Some(node) = self.nodes.get_mut(&to) {
            node.link_up(link, from, false, "10.0.0.2".into(), now);
        }
    }

    fn passes(&self, from: Key, to: Key) -> bool {
        self.nodes.contains_key(&to) && !self.cut.contains(&(from, to)) && !self.cut.contains(&(to, from))
    }

    /// Its machine is gone: nobody is told.
    fn vanish(&mut self, key: Key) -> Gossip<Index> {
        self.nodes.remove(&key).unwrap()
    }

    /// Its process is gone: the kernel closes its connections.
    fn kill(&mut self, key: Key) {
        self.vanish(key);
        let ends: Vec<_> = self.links.iter().filter(|(_, (a, b))| *a == key || *b == key).collect();
        let ends: Vec<(LinkId, Key)> =
            ends.into_iter().map(|(link, (a, b))| (*link, if *a == key { *b } else { *a })).collect();
        for (link, other) in ends {
            self.links.remove(&link);
            if let Some(node) = self.nodes.get_mut(&other) {
                node.link_down(link, self.now);
            }
        }
    }

    fn other(&self, link: LinkId, of: Key) -> Option<Key> {
        self.links.get(&link).map(|(a, b)| if *a == of { *b } else { *a })
    }

    fn send(&mut self, key: Key) {
        let Some(node) = self.nodes.get_mut(&key) else { return };
        let links: Vec<LinkId> = node.links().collect();
        for link in links {
            while let Some(frame) = self.nodes.get_mut(&key).and_then(|node| node.flush(link, self.now)) {
                let contents = frame.deltas.iter().map(|delta| &delta.contents);
                let contents = contents.chain(frame.wholes.iter().map(|whole| &whole.contents));
                let contents = contents.chain(frame.bulk.iter().map(|bulk| &bulk.holdings));
                self.inventories += contents.map(Bytes::len).sum::<usize>();
                let bytes = wire::encode(&frame);
                if let Some(to) = self.other(link, key).filter(|to| self.passes(key, *to)) {
                    self.under_way.push((self.now + STEP, to, link, bytes));
                }
            }
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        let (arrived, rest) =
            std::mem::take(&mut self.under_way).into_iter().partition(|(at, ..)| *at <= self.now);
        self.under_way = rest;
        let arrived: Vec<(Ms, Key, LinkId, Bytes)> = arrived;
        for (at, key, link, bytes) in arrived {
            if self.frozen.contains(&key) {
                self.under_way.push((at, key, link, bytes));
            } else if let Some(node) = self.nodes.get_mut(&key) {
                node.receive(link, wire::decode(bytes).unwrap(), self.now).unwrap();
            }
        }
        for key in self.keys() {
            if self.frozen.contains(&key) {
                continue;
            }
            let Some(node) = self.nodes.get_mut(&key) else { continue };
            node.tick(self.now);
            for action in node.actions() {
                match action {
                    Action::Dial(to) => self.connect(key, to),
                    Action::Close(link) => {
                        self.send(key);
                        let other = self.other(link, key);
                        self.step_link_away(key, other, link);
                    }
                    Action::Dead(_) | Action::Twin(_) | Action::Observed(..) => {}
                }
            }
            self.send(key);
            self.bootstrap(key);
        }
    }

    /// One that knows few tries others, as the owner of a gossip does.
    fn bootstrap(&mut self, key: Key) {
        let few = self.nodes.get(&key).is_some_and(|node| {
            node.members().live() <= NEIGHBOURS.min(self.size.saturating_sub(1)) && node.started != self.now
        });
        if few && self.now.is_multiple_of(200) {
            let keys = self.keys();
            let other = keys[(mix(key ^ self.now) % keys.len() as u64) as usize];
            if other != key && self.bootstraps {
                self.connect(key, other);
            }
        }
    }

    /// What was sent arrives before the end does.
    fn step_link_away(&mut self, key: Key, other: Option<Key>, link: LinkId) {
        let (now, before) = (self.now, std::mem::take(&mut self.under_way));
        let (of_link, rest) = before.into_iter().partition::<Vec<_>, _>(|(.., of, _)| *of == link);
        self.under_way = rest;
        for (_, to, link, bytes) in of_link {
            if let Some(node) = self.nodes.get_mut(&to) {
                node.receive(link, wire::decode(bytes).unwrap(), now).unwrap();
            }
        }
        for end in [Some(key), other.filter(|other| self.passes(key, *other))].into_iter().flatten() {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.link_down(link, now);
            }
        }
        self.links.remove(&link);
    }

    fn run(&mut self, time: Ms) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    /// Runs until `holds`; returns how long that took.
    fn until(&mut self, what: &str, limit: Ms, holds: impl Fn(&Self) -> bool) -> Ms {
        let began = self.now;
        while !holds(self) {
            assert!(self.now < began + limit, "not within {limit} ms: {what}");
            self.step();
        }
        self.now - began
    }

    /// All views are the same.
    fn is_one(&self) -> bool {
        let mut roots = self.nodes.values().map(|node| node.members().root());
        let first = roots.next();
        roots.all(|root| Some(root) == first)
    }

    fn holders(&self, at: Key, content: u64) -> Vec<Key> {
        let node = &self.nodes[&at];
        let numbers = node.holdings().holders(content).into_iter().flatten();
        let members = numbers.filter_map(|number| node.members().get(number));
        members.filter(|member| member.is_live()).map(|member| member.key).collect()
    }

    fn state(&self, at: Key, of: Key) -> Option<State> {
        self.nodes[&at].members().by_key(of).map(|member| member.state)
    }

    fn hold(&mut self, key: Key, content: u64, held: bool) {
        let now = self.now;
        self.nodes.get_mut(&key).unwrap().hold(content, held, now);
    }
}
