//! Links: who is dialled, who is accepted, and who is silent.

use std::sync::Arc;

use rand::RngExt;

use super::changes::What;
use super::holdings::Holdings;
use super::link::Link;
use super::members::{self, State};
use super::{Action, Gossip, Key, LinkId, Ms, NEIGHBOURS, NEIGHBOURS_LIMIT, SUSPICION, record, wire};

/// How long a dial may take.
const DIAL: Ms = 10_000;
/// How long a member that could not be reached is not tried again, at first and at most.
const REDIAL: Ms = 1_000;
pub(super) const REDIAL_LIMIT: Ms = 60_000;
/// How often one that is no neighbour is looked after, and how often where some are held to be dead.
pub(super) const PROBE: Ms = 60_000;
const PROBE_DEAD: Ms = 20_000;
/// Pause between two dials.
const DIAL_PAUSE: Ms = 50;

impl<H: Holdings> Gossip<H> {
    /// Looks after the signs of life of the neighbours.
    pub(super) fn listen(&mut self, now: Ms) {
        let quiet = self.is_quiet(now);
        let mut silent = Vec::new();
        for link in self.links.iter_mut().filter(|link| link.silence_due(quiet) <= now) {
            if link.asked.is_some() {
                silent.push(link.id);
            } else {
                link.ask(self.members.root(), now);
            }
        }
        for id in silent {
            self.link_down(id, now);
            self.actions.push(Action::Dead(id));
        }
    }

    pub(super) fn wants_neighbours(&self) -> bool {
        let neighbours = self.links.iter().filter(|link| !link.guest).count() + self.dialing.len();
        neighbours < NEIGHBOURS && neighbours + 1 < self.members.known()
    }

    /// Sees to it that there are neighbours enough, chosen at random among the living; where none of them is left, among
    /// all that are known.
    pub(super) fn find_neighbours(&mut self, now: Ms) {
        self.dialing.retain(|_, until| *until > now);
        if now < self.next_dial || self.links.len() >= NEIGHBOURS || !self.wants_neighbours() {
            return;
        }
        self.next_dial = now + DIAL_PAUSE;
        let mut found = None;
        if self.links.is_empty() && self.dialing.is_empty() && !self.first.is_empty() {
            // One of them, and then others as ever: nobody depends on them.
            let first = std::mem::take(&mut self.first);
            found = self.choose(now, |member| first.contains(&member.key));
            self.first = first;
            self.counts.introduced += u64::from(found.is_some());
        }
        let found = found.or_else(|| self.choose(now, members::Member::is_live));
        match found.or_else(|| self.choose(now, |member| member.state != State::Left)) {
            Some(key) => self.dial(key, now),
            None => self.next_dial = now + REDIAL,
        }
    }

    /// Looks after one that is no neighbour: all that are could be dead with it, and one that is held to be dead may only have
    /// been cut off.
    pub(super) fn probe(&mut self, now: Ms) {
        if now < self.next_probe {
            return;
        }
        let pause = if self.members.known() > self.members.live() { PROBE_DEAD } else { PROBE };
        self.next_probe = now + self.rng.random_range(pause * 3 / 4..pause * 5 / 4);
        if let Some(key) = self.choose(now, |member| member.state != State::Left) {
            self.probed = Some(key);
            self.dial(key, now);
        }
    }

    fn dial(&mut self, key: Key, now: Ms) {
        self.dialing.insert(key, now + DIAL);
        self.actions.push(Action::Dial(key));
    }

    /// Some member that is no neighbour and may be dialled.
    fn choose(&mut self, now: Ms, suits: impl Fn(&members::Member) -> bool) -> Option<Key> {
        let numbers = self.members.numbers();
        let start = self.rng.random_range(0..numbers);
        let members = (0..numbers).filter_map(|offset| self.members.get((start + offset) % numbers));
        let mut keys = members.filter(|member| !member.record.control.is_empty() && suits(member));
        let member = keys.find(|member| {
            member.key != self.draft.key
                && !self.dialing.contains_key(&member.key)
                && self.failed.get(&member.key).is_none_or(|(until, _)| *until <= now)
                && self.links.iter().all(|link| link.key != member.key)
        });
        member.map(|member| member.key)
    }

    /// A member that was to be dialled cannot be reached: to the others that is a word about it.
    pub fn dial_failed(&mut self, key: Key, now: Ms) {
        self.declined(key, now);
        self.accuse(key, now);
    }

    /// A member was reached and took no link: it is not dialled again at once.
    pub fn declined(&mut self, key: Key, now: Ms) {
        self.dialing.remove(&key);
        let (until, times) = self.failed.entry(key).or_insert((0, 0));
        *until = now + (REDIAL << (*times).min(6)).min(REDIAL_LIMIT);
        *times += 1;
    }

    /// A connection to `key`, whose identity is proved, is there. `outbound`: this node dialled.
    pub fn link_up(&mut self, id: LinkId, key: Key, outbound: bool, observed: String, now: Ms) {
        let taken = self.links.iter().fold(0_u16, |taken, link| taken | link.bit);
        let bit = !taken & taken.wrapping_add(1);
        if bit == 0 {
            self.actions.push(Action::Close(id));
            return;
        }
        self.changes.begin(bit);
        let neighbours = self.links.iter().filter(|link| !link.guest).count();
        let guest = !outbound && neighbours >= NEIGHBOURS_LIMIT;
        let mut link = Link::new(id, key, bit, outbound, guest, observed, self.changes.end(), now);
        if outbound {
            link.out.hello = Some(self.hello(&link));
            link.at_once(now);
        }
        self.links.push(link);
    }

    /// What this node says of itself first. Who has connected here is told when it has said who it is, and not before.
    pub(super) fn hello(&mut self, link: &Link) -> wire::Hello {
        wire::Hello {
            record: self.members.own().record.signed.clone(),
            complete: !self.completeness.is_open(),
            full: link.guest,
            members: self.members.live() as u32,
            observed: link.observed.clone(),
            sample: if link.outbound { Vec::new() } else { self.sample(link.key) },
        }
    }

    /// Records of a few others.
    fn sample(&mut self, not: Key) -> Vec<bytes::Bytes> {
        const SAMPLE: usize = 8;
        if self.members.by_key(not).is_some_and(members::Member::is_live) {
            return Vec::new();
        }
        let numbers = self.members.numbers();
        let start = self.rng.random_range(0..numbers);
        let others = (0..numbers).filter_map(|offset| self.members.get((start + offset) % numbers));
        let live =
            others.filter(|member| member.is_live() && member.key != self.draft.key && member.key != not);
        live.take(SAMPLE).map(|member| member.record.signed.clone()).collect()
    }

    /// The connection of a link is gone, or its other end is silent: unless it took its leave, it is suspected.
    pub fn link_down(&mut self, id: LinkId, now: Ms) {
        let Some(at) = self.links.iter().position(|link| link.id == id) else { return };
        self.drop_bulk(at);
        let link = self.links.swap_remove(at);
        if link.outbound && !link.ready {
            // It lives, and has no room.
            self.declined(link.key, now);
        }
        if link.outbound && link.is_closing {
            self.declined(link.key, now);
        }
        self.missing.retain(|_, missing| missing.link != id);
        if link.is_closing || !link.ready {
            return;
        }
        self.accuse(link.key, now);
    }

    fn accuse(&mut self, key: Key, now: Ms) {
        let Some(index) = self.members.find(key) else { return };
        if let Some(member) = self.members.get(index).filter(|member| member.state == State::Alive) {
            let suspicion = self.notary.accuse(key, member.record.seq);
            self.suspect(index, suspicion, 0, now);
        }
    }

    pub(super) fn suspect(&mut self, index: u32, suspicion: Arc<record::Suspicion>, known: u16, now: Ms) {
        let seq = suspicion.seq;
        self.members.update(index, |member| {
            (member.state, member.since) = (State::Suspected, now);
            member.suspicion = Some(suspicion);
        });
        self.suspects.push_back((now + SUSPICION, index, seq));
        self.push(index, What::Suspicion(seq), known, now);
        for link in &mut self.links {
            link.alarm = true;
        }
    }
}
