//! What a neighbour says, and what follows from it.

use std::sync::Arc;

use super::changes::What;
use super::holdings::Holdings;
use super::members::State;
use super::record::{Record, Suspicion};
use super::sync::Completeness;
use super::wire::{BYE, Beat, Delta, Frame, GRAFT, Hello, PRUNE, Position, Whole, keys};
use super::{
    ACCUSATIONS, ACCUSATIONS_TIME, Action, Fault, GRAFT_AFTER, Gossip, LinkId, MISSING, Missing, Ms,
};

/// A neighbour that was asked for something in this time may answer with what came by another way meanwhile.
const ASKED: Ms = 2_000;

/// How much of a frame was new.
#[derive(Default)]
struct News {
    fresh: u64,
    duplicate: u64,
}

impl News {
    fn count(&mut self, fresh: bool) {
        self.fresh += u64::from(fresh);
        self.duplicate += u64::from(!fresh);
    }
}

pub(super) fn receive<H: Holdings>(
    gossip: &mut Gossip<H>,
    id: LinkId,
    frame: Frame,
    now: Ms,
) -> Result<(), Fault> {
    let Some(mut at) = gossip.links.iter().position(|link| link.id == id) else { return Ok(()) };
    let link = &mut gossip.links[at];
    (link.heard, link.asked) = (now, None);
    match (frame.hello, link.ready) {
        (Some(hello), false) => at = gossip.greet(at, &hello, now)?,
        (None, true) => {}
        _ => return Err(Fault::Hello),
    }
    let (bit, asked) = (gossip.links[at].bit, gossip.links[at].wanted);
    let mut news = News::default();
    for signed in &frame.records {
        match gossip.notary.open(signed) {
            Ok(record) => news.count(gossip.take_record(record, Some(at), bit, now)),
            // Whoever passed it on may know a key that this node does not.
            Err(_) => gossip.counts.refused += 1,
        }
    }
    for delta in &frame.deltas {
        news.count(gossip.take_delta(delta, id, bit, now));
    }
    for signed in &frame.suspicions {
        let members = &gossip.members;
        let identity = |key| members.by_key(key).map(|member| member.record.identity.clone());
        match gossip.notary.hear(signed, &identity) {
            // They go by all links, so that knowing one already says nothing about the tree.
            Ok(suspicion) => gossip.counts.fresh += u64::from(gossip.take_suspicion(suspicion, at, bit, now)),
            Err(_) => gossip.counts.refused += 1,
        }
    }
    gossip.counts.fresh += news.fresh;
    gossip.counts.duplicate += news.duplicate;
    let link = &mut gossip.links[at];
    match frame.tree {
        PRUNE => link.eager = false,
        GRAFT => link.eager = true,
        BYE => link.is_closing = true,
        _ => {}
    }
    let was_asked = asked.is_some_and(|asked| now < asked + ASKED);
    if news.duplicate > 0 && news.fresh == 0 && !gossip.floods && link.eager && !was_asked && frame.tree == 0
    {
        link.prune(now);
    }
    for position in &frame.have {
        gossip.hear_of(position, at, now);
    }
    for position in frame.want {
        gossip.links[at].answer(position, now);
    }
    for whole in &frame.wholes {
        gossip.take_whole(whole, at, bit, now);
    }
    if let Some(bulk) = frame.bulk {
        gossip.take_bulk(&bulk, at, now);
    }
    if frame.bulk_wanted {
        gossip.give_bulk(at, now);
    }
    if let Some(beat) = frame.beat {
        gossip.on_beat(beat, at, now);
    }
    if !frame.buckets.is_empty() {
        gossip.on_buckets(&frame.buckets, at, now);
    }
    if let Some(summary) = frame.summary {
        gossip.on_summary(&summary, at, now);
    }
    Ok(())
}

impl<H: Holdings> Gossip<H> {
    /// Returns where the link is from now on.
    fn greet(&mut self, mut at: usize, hello: &Hello, now: Ms) -> Result<usize, Fault> {
        let record = self.notary.open(&hello.record)?;
        let link = &mut self.links[at];
        if record.key != link.key {
            return Err(Fault::Stranger);
        }
        (link.ready, link.is_complete) = (true, hello.complete);
        link.guest |= hello.full;
        // Nothing that changed before it said who it is was told it.
        link.cursor = self.changes.end();
        let (bit, outbound, key) = (link.bit, link.outbound, link.key);
        if !outbound {
            let link = self.links.swap_remove(at);
            let hello = self.hello(&link);
            self.links.push(link);
            at = self.links.len() - 1;
            let link = &mut self.links[at];
            link.out.hello = Some(hello);
            link.at_once(now);
        }
        self.dialing.remove(&key);
        self.failed.remove(&key);
        self.take_record(record, Some(at), bit, now);
        for signed in &hello.sample {
            match self.notary.open(signed) {
                Ok(record) => drop(self.take_record(record, Some(at), bit, now)),
                Err(_) => self.counts.refused += 1,
            }
        }
        if !hello.observed.is_empty() {
            self.actions.push(Action::Observed(self.links[at].id, hello.observed.clone()));
        }
        // Where both have dialled, the one of the smaller key stays.
        let twin = self
            .links
            .iter()
            .position(|other| other.key == key && other.id != self.links[at].id && other.ready);
        if let Some(twin) = twin {
            let keeps_outbound = self.draft.key < key;
            // Of two that came from there, the last one is surely alive.
            let drops =
                if self.links[twin].outbound == outbound || outbound == keeps_outbound { twin } else { at };
            self.take_leave(drops, now);
            if drops == at {
                return Ok(at);
            }
        }
        if outbound && self.probed.take_if(|probed| *probed == key).is_some() {
            self.take_leave(at, now);
            return Ok(at);
        }
        self.begin_sync(at, hello.members as usize, outbound, now);
        Ok(at)
    }

    /// Closes a link of which nothing is wrong.
    pub(super) fn take_leave(&mut self, at: usize, now: Ms) {
        let link = &mut self.links[at];
        link.is_closing = true;
        link.out.tree = BYE;
        link.at_once(now);
        self.actions.push(Action::Close(link.id));
    }

    /// Takes a record; `false`: it is not new.
    pub(super) fn take_record(&mut self, record: Arc<Record>, at: Option<usize>, bit: u16, now: Ms) -> bool {
        if record.key == self.draft.key {
            let other = record.process != self.draft.process;
            if other && record.seq >= self.draft.seq {
                if self.met.replace(record.process) == Some(record.process) {
                    self.actions.push(Action::Twin(record.key));
                }
                self.refute(record.seq, now);
            }
            return false;
        }
        let Some(index) = self.members.find(record.key) else {
            if self.members.known() >= self.limits.members {
                self.counts.excess += 1;
                return false;
            }
            let state = if record.leaving { State::Left } else { State::Alive };
            let seq = record.seq;
            let index = self.members.add(record, state, now);
            self.push(index, What::Record(seq), bit, now);
            return true;
        };
        let Some(member) = self.members.get(index) else { return false };
        let (seq, state) = (member.record.seq, member.state);
        // Two processes with one identity may have the same number.
        let process = member.record.process;
        // Of one that is only remembered, the record that was kept says that it lives if another says so.
        let is_known = if state == State::Remembered {
            record.seq < seq
        } else {
            (record.seq, record.process) <= (seq, process)
        };
        if is_known {
            if let (Some(at), State::Dead | State::Left) = (at, state) {
                // It is not known there that this one is gone.
                let link = &mut self.links[at];
                match &member.suspicion {
                    Some(suspicion) if state == State::Dead => {
                        link.out.suspicions.push(suspicion.signed.clone());
                    }
                    _ => link.out.records.push(member.record.signed.clone()),
                }
                link.urgent(now);
            }
            if let (Some(at), true) = (at, record.seq == seq && record.process != process) {
                // The other process with this identity is to hear of this one.
                let link = &mut self.links[at];
                link.out.records.push(member.record.signed.clone());
                link.urgent(now);
            }
            let cursor = at.map_or(0, |at| self.links[at].cursor);
            self.changes.known(
                cursor,
                index,
                bit,
                |what| matches!(what, What::Record(of) if *of <= record.seq),
            );
            return false;
        }
        let before = member.before;
        if record.epoch != member.record.epoch {
            // Its inventory is told anew; or its owner has begun anew without knowing of this, and will be told.
            self.clear(index);
        }
        let seq = record.seq;
        if record.process != process {
            // One that was started again has a new number, and does not come back to an old one.
            if record.process == before {
                self.actions.push(Action::Twin(record.key));
            }
            self.members.update(index, |member| member.before = process);
        }
        self.members.update(index, |member| {
            member.state = if record.leaving { State::Left } else { State::Alive };
            (member.record, member.since, member.suspicion) = (record, now, None);
        });
        self.push(index, What::Record(seq), bit, now);
        true
    }

    fn take_delta(&mut self, delta: &Delta, id: LinkId, bit: u16, now: Ms) -> bool {
        let to = delta.from + (delta.contents.len() / 8) as u32;
        let position = Position { key: delta.key, epoch: delta.epoch, version: to, ..Position::default() };
        if delta.key == self.draft.key {
            return self.take_told(delta, to, now);
        }
        let Some(index) = self.members.find(delta.key) else {
            self.miss(position, id, now);
            return true;
        };
        let Some(member) = self.members.get(index) else { return false };
        let (epoch, version) = member.stamp();
        if (delta.epoch, to) <= (epoch, version) {
            let cursor = self.links.iter().find(|link| link.id == id).map_or(0, |link| link.cursor);
            self.changes.known(cursor, index, bit, |what| {
                matches!(what, What::Content { epoch, version, .. } if (*epoch, *version) <= (delta.epoch, to))
            });
            return false;
        }
        if delta.epoch != epoch || delta.from > version {
            self.miss(position, id, now);
            return true;
        }
        for (version, content, held) in delta.changes().filter(|(to, ..)| *to > version) {
            self.take(index, version, content, held);
            self.push(index, What::Content { epoch, version, content, held }, bit, now);
        }
        true
    }

    /// What this node told in an earlier life, after what it kept.
    fn take_told(&mut self, delta: &Delta, to: u32, now: Ms) -> bool {
        let (epoch, version) = self.members.own().stamp();
        if self.has_told(now) || delta.epoch != epoch || delta.from > version || to <= version {
            return false;
        }
        for (version, content, held) in delta.changes().filter(|(to, ..)| *to > version) {
            self.take(0, version, content, held);
        }
        self.members.update(0, |own| own.version = to);
        self.tell_difference();
        true
    }

    fn take_suspicion(&mut self, suspicion: Arc<Suspicion>, at: usize, bit: u16, now: Ms) -> bool {
        if suspicion.subject == self.draft.key {
            if suspicion.seq >= self.draft.seq {
                self.refute(suspicion.seq, now);
            }
            return false;
        }
        let Some(index) = self.members.find(suspicion.subject) else { return false };
        let Some(member) = self.members.get(index) else { return false };
        if suspicion.seq < member.record.seq {
            // It is refuted already; whoever says so does not know it.
            let position = Position { key: suspicion.subject, seq: suspicion.seq, ..member.position() };
            self.links[at].answer(position, now);
            return false;
        }
        if suspicion.seq > member.record.seq || member.state != State::Alive {
            let cursor = self.links[at].cursor;
            let seq = suspicion.seq;
            self.changes.known(cursor, index, bit, |what| *what == What::Suspicion(seq));
            return false;
        }
        let (since, count) = self.accusations.entry(suspicion.accuser).or_insert((now, 0));
        if now >= *since + ACCUSATIONS_TIME {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        if *count > ACCUSATIONS {
            self.counts.excess += 1;
            return false;
        }
        self.suspect(index, suspicion, bit, now);
        true
    }

    /// A neighbour has this much.
    fn hear_of(&mut self, position: &Position, at: usize, now: Ms) {
        let (id, cursor, bit) = (self.links[at].id, self.links[at].cursor, self.links[at].bit);
        if position.key == self.draft.key {
            self.hear_of_self(position, at, now);
        } else if self.is_news(position) {
            self.miss(*position, id, now);
        }
        if let Some(index) = self.members.find(position.key) {
            self.changes.known(cursor, index, bit, |what| match what {
                What::Record(seq) => *seq <= position.seq,
                What::Content { epoch, version, .. } => {
                    (*epoch, *version) <= (position.epoch, position.version)
                }
                What::Suspicion(_) => false,
                What::Position => true,
            });
        }
    }

    /// Something is missing that this link's other end has: it may still come by the tree.
    fn miss(&mut self, position: Position, link: LinkId, now: Ms) {
        let is_vain = self.vain.get(&position.key).is_some_and(|until| *until > now);
        if self.missing.len() < MISSING && !(is_vain && self.members.find(position.key).is_none()) {
            let missing = Missing { position, link, due: now + GRAFT_AFTER };
            self.missing.entry(position.key).or_insert(missing);
        }
    }

    /// What a neighbour knows of this node is more than this node knows, or else: an earlier life's, or a lie.
    pub(super) fn hear_of_self(&mut self, position: &Position, at: usize, now: Ms) {
        if position.seq > self.draft.seq {
            self.refute(position.seq, now);
        }
        let own = self.members.own();
        let stamp = (position.epoch, position.version);
        let differs = stamp == own.stamp() && position.hash != 0 && position.hash != own.hash as u32;
        if stamp <= own.stamp() && !differs {
            return;
        }
        if !self.has_told(now) {
            let known = own.position();
            self.links[at].want(known, now);
        } else if self.told_anew.is_none_or(|at| now >= at + super::RENEW_PAUSE) {
            self.told_anew = Some(now);
            self.new_epoch(position.epoch.max(own.record.epoch).saturating_add(1), now);
        }
    }

    fn take_whole(&mut self, whole: &Whole, at: usize, bit: u16, now: Ms) {
        let position =
            Position { key: whole.key, epoch: whole.epoch, version: whole.version, ..Position::default() };
        let staged = self.links[at].staging.take();
        let mut all = match staged {
            Some((of, all)) if of == position => all,
            _ => Vec::new(),
        };
        all.extend(keys(&whole.contents));
        if all.len() > self.limits.contents as usize {
            self.counts.excess += 1;
            all.truncate(self.limits.contents as usize);
        }
        if whole.more {
            self.links[at].staging = Some((position, all));
            return;
        }
        let Some(index) = self.members.find(whole.key) else { return };
        if index == 0 {
            if !self.has_told(now) {
                self.adopt(whole.epoch, whole.version, now);
                for content in all {
                    self.load(0, content);
                }
                self.tell_difference();
            }
            return;
        }
        let Some(member) = self.members.get(index) else { return };
        if whole.epoch != member.record.epoch || whole.version < member.version {
            return;
        }
        self.clear(index);
        for content in all {
            self.load(index, content);
        }
        self.members.update(index, |member| member.version = whole.version);
        self.push(index, What::Position, bit, now);
    }

    fn on_beat(&mut self, beat: Beat, at: usize, now: Ms) {
        let root = self.members.root();
        if beat.candidates != 0 {
            self.links[at].opinion = Some((beat.candidates, beat.leaders));
        }
        // Where nothing changes, all views should be the same.
        let compares = beat.compare || self.is_quiet(now);
        if beat.root == root {
            self.compared(at, true, now);
        }
        if compares && beat.root != root && self.completeness != Completeness::Partial {
            self.links[at].out.buckets = self.own_buckets();
            self.links[at].urgent(now);
        }
        if beat.answer {
            let link = &mut self.links[at];
            link.out.beat.get_or_insert(Beat { root, ..Beat::default() });
            link.urgent(now);
        }
    }
}
