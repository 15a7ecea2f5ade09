//! The gossip: a full view of the members and of what each holds, kept by each node with a few neighbours.
//!
//! A pure state machine: frames, link events and the time go in; frames and wishes (dial, close) come out. It opens no
//! connection and reads no clock, so that a simulation of thousands runs what ships.
//!
//! - Changes flood along a tree that the links form by themselves (Plumtree: Leitão, Pereira, Rodrigues, SRDS 2007): a link
//!   whose pushes prove to be known already becomes lazy and is only told what there is; what was missed is asked for there.
//! - All that there is to say to a neighbour goes into one frame, at most one in [`COALESCE`].
//! - A silent neighbour is suspected by a signed word to all; unless its next record refutes that, everyone holds it to be
//!   dead [`SUSPICION`] later (SWIM: Das, Gupta, Motivala, DSN 2002).
//! - Hashes over the view, by a random neighbour every now and then, find what all that has missed.

pub mod changes;
pub mod holdings;
mod kept;
mod link;
pub mod members;
mod neighbours;
mod own;
mod receive;
pub mod record;
mod sync;
pub mod wire;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use changes::{Change, Changes, What};
use holdings::Holdings;
use link::Link;
use members::{Members, State};
use neighbours::{PROBE, REDIAL_LIMIT};
use record::{Notary, Record};
use sync::Completeness;
use wire::{Frame, Position};

/// A member or a content by the first 8 bytes of a hash.
pub type Key = u64;
/// A connection to a neighbour.
pub type LinkId = u32;
/// Milliseconds of a clock that never goes back.
pub type Ms = u64;

/// At most one frame of changes goes to a neighbour in this time; the first after a pause goes at once (issue 4: 50 ms).
pub const COALESCE: Ms = 50;
/// How often a lazy link is told what there is.
pub const LAZY: Ms = 400;
/// How long what a lazy link has told of may take to come by the tree, before it is asked for there.
pub const GRAFT_AFTER: Ms = 250;
/// Nothing has changed for so long: links are quiet.
pub const QUIET_AFTER: Ms = 10_000;
/// A neighbour that has said nothing for so long is asked for a sign of life.
pub const SILENCE: Ms = 1_000;
/// The same where all is quiet: 200 bytes/s have to do for all neighbours (issue 4).
pub const QUIET_SILENCE: Ms = 30_000;
/// And gets so long to give it.
pub const GRACE: Ms = 1_000;
/// How long a suspected member has to refute that.
pub const SUSPICION: Ms = 1_000;
/// How often the view is compared with a neighbour's.
pub const COMPARE: Ms = 10_000;
/// The same where all is quiet.
pub const QUIET_COMPARE: Ms = 60_000;
/// Links to neighbours that a node sees to.
pub const NEIGHBOURS: usize = 6;
/// Links to neighbours that it has at most; who comes later may only ask.
pub const NEIGHBOURS_LIMIT: usize = 12;
/// Links at once, those for questions included. A change knows a bit for each.
pub const LINKS: usize = 16;
/// How long the dead are remembered.
pub const FORGET: Ms = 600_000;
/// How long a start may take to find a neighbour whose view is complete.
pub const ALONE: Ms = 1_500;
/// A tick that comes so much too late finds a node that stood still.
const LATE: Ms = 200;
/// Suspicions of one accuser within a minute: more than it has neighbours are not believed.
const ACCUSATIONS: u32 = LINKS as u32;
const ACCUSATIONS_TIME: Ms = 60_000;
/// Pause between two times that an inventory is told anew, since someone knows it wrongly.
const RENEW_PAUSE: Ms = 30_000;
/// A member that was asked for and did not come is not asked for again so soon: its record may be one that this node does not
/// believe.
const VAIN: Ms = 10_000;
/// Members that are missed at once; what is more is found by the next comparison.
const MISSING: usize = 4096;

/// How much is kept; a peer decides how much there would be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Members, the dead included.
    pub members: usize,
    /// Contents of one member.
    pub contents: u32,
    /// Pairs of a member and a content.
    pub pairs: u64,
    /// Changes in the log.
    pub changes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { members: 10_000, contents: 100_000, pairs: 50_000_000, changes: 16_384 }
    }
}

/// What the owner is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect to this member and open a link; say [`Gossip::dial_failed`] if that is not possible.
    Dial(Key),
    /// Send what [`Gossip::flush`] still gives for this link, and close it.
    Close(LinkId),
    /// The other end of a link is silent, and the link is gone: its connection is dead.
    Dead(LinkId),
    /// Two processes have the identity of this member, or of this node.
    Twin(Key),
    /// The other end of a link sees this node at this address.
    Observed(LinkId, String),
}

/// What a neighbour did that the protocol does not allow: the link is to be closed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Its own record is not believed.
    #[error("its record is not believed: {0}")]
    Record(#[from] record::RecordError),
    /// It said something else before it said who it is, or said so twice.
    #[error("it did not say who it is first")]
    Hello,
    /// Its record is another's.
    #[error("its record is that of another member")]
    Stranger,
}

/// What has happened, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Records, changes of content and suspicions that were new.
    pub fresh: u64,
    /// And such that were known.
    pub duplicate: u64,
    /// Contents, members and claims beyond a limit.
    pub excess: u64,
    /// What was asked for because the tree did not bring it.
    pub grafts: u64,
    /// Records and suspicions that were not believed, and views that could not be read.
    pub refused: u64,
    /// Refutations of this node.
    pub refuted: u64,
    /// Comparisons that found a difference.
    pub differences: u64,
    /// Times that one of those who are dialled first was.
    pub introduced: u64,
}

/// What is missing, by the word of a neighbour.
#[derive(Clone, Copy, Debug)]
struct Missing {
    position: Position,
    link: LinkId,
    due: Ms,
}

/// The view of one node.
pub struct Gossip<H> {
    notary: Arc<dyn Notary + Send + Sync>,
    limits: Limits,
    rng: SmallRng,
    members: Members,
    holdings: H,
    changes: Changes,
    links: Vec<Link>,
    actions: Vec<Action>,
    /// The record of this node, unsigned; what is in the table is signed.
    draft: Record,
    started: Ms,
    completeness: Completeness,
    /// What this node holds; the table has what others were told of it.
    held: HashSet<u64>,
    /// All that this node holds was said once.
    listed: bool,
    /// Changes of it that are not told yet.
    untold: VecDeque<(u64, bool)>,
    /// Suspected members in the order in which they will be dead.
    suspects: VecDeque<(Ms, u32, u64)>,
    accusations: HashMap<Key, (Ms, u32)>,
    missing: HashMap<Key, Missing>,
    /// Unknown members that were asked for, and until when they are not asked for again.
    vain: HashMap<Key, Ms>,
    dialing: HashMap<Key, Ms>,
    /// Until when a member is not dialled, and how often that failed.
    failed: HashMap<Key, (Ms, u32)>,
    next_dial: Ms,
    next_probe: Ms,
    /// Who is dialled only to see whether it lives.
    probed: Option<Key>,
    next_compare: Ms,
    next_forget: Ms,
    refuted: Option<Ms>,
    told_anew: Option<Ms>,
    /// The last other process with this node's identity.
    met: Option<u64>,
    /// When something changed last.
    changed: Ms,
    counts: Counts,
    floods: bool,
    /// When the owner was to look after this at the latest.
    expected: Ms,
    /// Members of which there is another record or state.
    renewed: Vec<u32>,
    /// Whom a node without neighbours dials first.
    first: Vec<Key>,
    /// What the owner makes of the view: see [`wire::Beat`].
    opinion: (u32, u32),
}

impl<H: Holdings> Gossip<H> {
    /// The view of a node that knows nobody. `draft` is its record, but for number and signature; `seq` is above those of its
    /// earlier lives, where that is known.
    pub fn new(
        draft: Record,
        notary: Arc<dyn Notary + Send + Sync>,
        holdings: H,
        limits: Limits,
        seed: u64,
        now: Ms,
    ) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let own = notary.seal(draft.clone());
        Self {
            notary,
            limits,
            members: Members::new(own),
            holdings,
            changes: Changes::new(limits.changes),
            links: Vec::new(),
            actions: Vec::new(),
            draft,
            started: now,
            completeness: Completeness::Partial,
            held: HashSet::new(),
            listed: false,
            untold: VecDeque::new(),
            suspects: VecDeque::new(),
            accusations: HashMap::new(),
            missing: HashMap::new(),
            vain: HashMap::new(),
            dialing: HashMap::new(),
            failed: HashMap::new(),
            next_dial: now,
            next_probe: now + rng.random_range(PROBE / 2..PROBE),
            probed: None,
            next_compare: now + rng.random_range(COMPARE / 2..COMPARE),
            next_forget: now + FORGET / 60,
            refuted: None,
            told_anew: None,
            met: None,
            changed: now,
            counts: Counts::default(),
            floods: false,
            expected: now,
            renewed: Vec::new(),
            first: Vec::new(),
            opinion: (0, 0),
            rng,
        }
    }

    /// The members.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Who holds what, by the numbers of the members.
    pub fn holdings(&self) -> &H {
        &self.holdings
    }

    /// Whether a neighbour's complete view was taken, so that what nobody holds here nobody holds.
    pub fn is_complete(&self) -> bool {
        match self.completeness {
            Completeness::Partial | Completeness::Restored(_) => false,
            Completeness::Alone => self.links.iter().all(|link| link.bulk_in.is_none()),
            Completeness::Whole => true,
        }
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Links whose other end has said who it is.
    pub fn neighbours(&self) -> impl Iterator<Item = Key> + '_ {
        self.links.iter().filter(|link| link.is_neighbour()).map(|link| link.key)
    }

    /// Numbers of the members whose record or state is another than at the last call, some of them more than once; a number
    /// may have gone to another member.
    pub fn renewed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.renewed)
    }

    /// Says whom this node dials first when it has no neighbour.
    pub fn dial_first(&mut self, members: Vec<Key>) {
        self.first = members;
    }

    /// Says what this node makes of its view, which comparisons tell neighbours: the candidates of elections, and who leads.
    pub fn set_opinion(&mut self, candidates: u32, leaders: u32) {
        self.opinion = (candidates, leaders);
    }

    /// What each neighbour that has compared made of its view then.
    pub fn opinions(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.links.iter().filter_map(|link| link.opinion)
    }

    /// Contents that this node holds.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// The limit, if this node holds more than others are told.
    pub fn left_out(&self) -> Option<u32> {
        Some(self.limits.contents).filter(|limit| self.held.len() > *limit as usize)
    }

    /// What is to be done.
    pub fn actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    fn push(&mut self, member: u32, what: What, known: u16, now: Ms) {
        if matches!(what, What::Record(_) | What::Suspicion(_)) {
            self.renewed.push(member);
        }
        self.changes.push(Change { member, what, known });
        self.changed = now;
    }

    fn is_quiet(&self, now: Ms) -> bool {
        now >= self.changed + QUIET_AFTER
    }

    /// When there is something to do, at the latest.
    pub fn next_due(&self, now: Ms) -> Ms {
        let flushes = self.links.iter().filter_map(|link| link.flush_due(&self.changes));
        flushes.fold(self.tick_due(now), Ms::min)
    }

    /// When the time asks for something. What waits to be sent is not among it: it is, as soon as this node has looked.
    fn tick_due(&self, now: Ms) -> Ms {
        let quiet = self.is_quiet(now);
        let mut due = self.next_forget.min(self.next_compare).min(self.next_probe);
        if self.links.len() < NEIGHBOURS && self.wants_neighbours() {
            due = due.min(self.next_dial);
        }
        if let Some((at, ..)) = self.suspects.front() {
            due = due.min(*at);
        }
        if !self.tells(now) {
            due = due.min(self.started + ALONE);
        }
        if let Some(at) = self.kept_due() {
            due = due.min(at);
        }
        for missing in self.missing.values() {
            due = due.min(missing.due);
        }
        for link in &self.links {
            due = due.min(link.silence_due(quiet));
        }
        due
    }

    /// Does what the time asks for. Comes at [`Self::next_due`]; where it comes later, this node stood still.
    pub fn tick(&mut self, now: Ms) {
        let late = now.saturating_sub(self.expected);
        if late > LATE {
            // That says nothing about the others.
            for link in &mut self.links {
                link.excuse(late, now);
            }
        }
        while self.suspects.front().is_some_and(|(at, ..)| *at <= now) {
            let Some((_, index, seq)) = self.suspects.pop_front() else { break };
            let dies = self
                .members
                .get(index)
                .is_some_and(|member| member.state == State::Suspected && member.record.seq == seq);
            if dies {
                self.members.update(index, |member| (member.state, member.since) = (State::Dead, now));
                self.renewed.push(index);
            }
        }
        self.see_to_bulk(now);
        self.tell(now);
        self.graft(now);
        self.listen(now);
        if self.next_compare <= now {
            let pause = if self.is_quiet(now) { QUIET_COMPARE } else { COMPARE };
            self.next_compare = now + self.rng.random_range(pause * 3 / 4..pause * 5 / 4);
            self.compare_with_one(now);
        }
        self.find_neighbours(now);
        self.probe(now);
        if self.next_forget <= now {
            self.next_forget = now + FORGET / 60;
            self.forget(now);
        }
        self.expected = self.tick_due(now).max(now);
    }

    /// Asks for what a lazy link has and the tree did not bring.
    fn graft(&mut self, now: Ms) {
        let due: Vec<Key> =
            self.missing.iter().filter(|(_, missing)| missing.due <= now).map(|(key, _)| *key).collect();
        for key in due {
            let Some(missing) = self.missing.remove(&key) else { continue };
            if !self.is_news(&missing.position) {
                continue;
            }
            let known = self.known(key);
            if self.members.find(key).is_none() && self.vain.len() < MISSING {
                self.vain.insert(key, now + VAIN);
            }
            let Some(link) = self.links.iter_mut().find(|link| link.id == missing.link) else { continue };
            link.want(known, now);
            if !link.guest && !link.eager {
                link.graft(now);
            }
            self.counts.grafts += 1;
        }
    }

    /// How much is known of a member.
    fn known(&self, key: Key) -> Position {
        self.members.by_key(key).map_or(Position { key, ..Position::default() }, members::Member::position)
    }

    /// Whether a neighbour that is there knows more of a member than this node.
    fn is_news(&self, position: &Position) -> bool {
        match self.members.by_key(position.key) {
            None => true,
            Some(member) => {
                position.seq > member.record.seq || (position.epoch, position.version) > member.stamp()
            }
        }
    }

    fn forget(&mut self, now: Ms) {
        self.vain.retain(|_, until| *until > now);
        let gone: Vec<u32> = self
            .members
            .iter()
            .filter(|(index, member)| *index != 0 && !member.is_live() && now >= member.since + FORGET)
            .map(|(index, _)| index)
            .collect();
        for index in gone {
            self.holdings.forget(index);
            self.changes.forget(index);
            self.renewed.push(index);
            self.members.remove(index);
        }
        self.accusations.retain(|_, (since, _)| now < *since + ACCUSATIONS_TIME);
        self.failed.retain(|_, (until, _)| now < *until + REDIAL_LIMIT);
    }

    /// Takes a frame of a neighbour.
    pub fn receive(&mut self, id: LinkId, frame: Frame, now: Ms) -> Result<(), Fault> {
        receive::receive(self, id, frame, now)
    }

    /// The next frame for a link, if one is due.
    pub fn flush(&mut self, id: LinkId, now: Ms) -> Option<Frame> {
        link::flush(self, id, now)
    }

    /// The link of some neighbour whose view is complete.
    pub fn complete_neighbour(&self) -> Option<LinkId> {
        self.links.iter().find(|link| link.ready && link.is_complete).map(|link| link.id)
    }

    /// Reads and judges a record that came by another way.
    pub fn judge(&self, signed: &bytes::Bytes) -> Result<Arc<Record>, record::RecordError> {
        self.notary.open(signed)
    }

    /// Links that there are.
    pub fn links(&self) -> impl Iterator<Item = LinkId> + '_ {
        self.links.iter().map(|link| link.id)
    }

    /// Starts with a member as it would be known after a while; for simulations, which begin with a network that runs.
    /// `hash` and `count` are those of what `holdings` already has of it.
    pub fn know(&mut self, record: Arc<Record>, version: u32, hash: u64, count: u32, now: Ms) -> u32 {
        self.completeness = Completeness::Whole;
        let own = record.key == self.draft.key;
        let index = if own { 0 } else { self.members.add(record, State::Alive, now) };
        self.members.update(index, |member| {
            (member.version, member.hash, member.count) = (version, hash, count);
        });
        index
    }

    /// Links never become lazy; for simulations, which compare.
    pub fn flood(&mut self) {
        self.floods = true;
    }

    /// The holdings, to be filled beforehand.
    pub fn holdings_mut(&mut self) -> &mut H {
        &mut self.holdings
    }
}

#[cfg(test)]
mod tests;
