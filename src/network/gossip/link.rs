//! One neighbour: what it has still to be told, and when.

use std::collections::HashMap;

use super::changes::{Changes, What};
use super::holdings::Holdings;
use super::sync::{BulkIn, BulkOut};
use super::wire::{Beat, Delta, Frame, GRAFT, KEYS, PRUNE, Position, contents};
use super::{COALESCE, GRACE, Gossip, Key, LATE, LAZY, LinkId, Ms, QUIET_SILENCE, SILENCE};

/// What one frame may carry in answers; the rest follows in the next.
const BUDGET: usize = 128 << 10;
/// Questions of a neighbour that wait for their answers. It asks again for the rest.
const ANSWERS: usize = 8192;

/// A neighbour.
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) key: Key,
    /// Its bit in the changes.
    pub(super) bit: u16,
    pub(super) outbound: bool,
    /// Where its other end is seen.
    pub(super) observed: String,
    /// It has said who it is.
    pub(super) ready: bool,
    /// It is there for questions only.
    pub(super) guest: bool,
    /// Changes are pushed to it; else it is told what there is.
    pub(super) eager: bool,
    /// One of the ends has taken its leave.
    pub(super) is_closing: bool,
    /// Its view is complete.
    pub(super) is_complete: bool,
    /// The first change that it has not been told of.
    pub(super) cursor: u64,
    /// What there is to say besides.
    pub(super) out: Frame,
    /// Among what it has not been told of is a suspicion, which does not wait.
    pub(super) alarm: bool,
    /// Since when that waits.
    waiting: Option<Ms>,
    /// When it was told something last; `None`: what waits goes at once.
    flushed: Option<Ms>,
    told: Ms,
    /// When it last said something.
    pub(super) heard: Ms,
    /// When it was asked for a sign of life.
    pub(super) asked: Option<Ms>,
    /// When it was last asked for something.
    pub(super) wanted: Option<Ms>,
    /// Members of which it wants more than it has.
    pub(super) answers: std::collections::VecDeque<Position>,
    /// Where a whole that is sent in pages stands.
    pub(super) paging: Option<(Position, Vec<u64>)>,
    /// Pages of a whole that comes.
    pub(super) staging: Option<(Position, Vec<u64>)>,
    pub(super) bulk_out: Option<BulkOut>,
    pub(super) bulk_in: Option<BulkIn>,
    /// What it made of its view last: see [`Beat`].
    pub(super) opinion: Option<(u32, u32)>,
}

impl Link {
    #[expect(clippy::too_many_arguments, reason = "each is a field, and there is one caller")]
    pub(super) fn new(
        id: LinkId,
        key: Key,
        bit: u16,
        outbound: bool,
        guest: bool,
        observed: String,
        cursor: u64,
        now: Ms,
    ) -> Self {
        Self {
            id,
            key,
            bit,
            outbound,
            observed,
            ready: false,
            guest,
            eager: true,
            is_closing: false,
            is_complete: false,
            cursor,
            out: Frame::default(),
            alarm: false,
            waiting: None,
            flushed: None,
            told: now,
            heard: now,
            asked: None,
            wanted: None,
            answers: std::collections::VecDeque::new(),
            paging: None,
            staging: None,
            bulk_out: None,
            bulk_in: None,
            opinion: None,
        }
    }

    pub(super) fn is_neighbour(&self) -> bool {
        self.ready && !self.guest && !self.is_closing
    }

    /// Something besides changes waits.
    pub(super) fn urgent(&mut self, now: Ms) {
        self.waiting.get_or_insert(now);
    }

    /// Something waits, and not for its turn.
    pub(super) fn at_once(&mut self, now: Ms) {
        self.waiting = Some(now);
        self.flushed = None;
    }

    pub(super) fn want(&mut self, known: Position, now: Ms) {
        self.out.want.push(known);
        self.wanted = Some(now);
        self.urgent(now);
    }

    pub(super) fn answer(&mut self, position: Position, now: Ms) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back(position);
            self.urgent(now);
        }
    }

    pub(super) fn graft(&mut self, now: Ms) {
        self.eager = true;
        self.out.tree = GRAFT;
        self.urgent(now);
    }

    pub(super) fn prune(&mut self, now: Ms) {
        self.eager = false;
        self.out.tree = PRUNE;
        self.urgent(now);
    }

    /// Compares the view, of this hash, with the neighbour's.
    pub(super) fn compare(&mut self, root: u64, now: Ms) {
        self.out.beat = Some(Beat { root, answer: true, compare: true, ..Beat::default() });
        self.urgent(now);
    }

    /// Asks for a sign of life.
    pub(super) fn ask(&mut self, root: u64, now: Ms) {
        self.asked = Some(now);
        let beat = self.out.beat.get_or_insert(Beat { root, ..Beat::default() });
        beat.answer = true;
        self.urgent(now);
    }

    /// This node stood still for so long. That is only left out, so that on a node that is always late the dead are found too;
    /// but after a longer time an answer may wait to be read.
    pub(super) fn excuse(&mut self, late: Ms, now: Ms) {
        self.heard = (self.heard + late).min(now);
        let read = if late > GRACE { (now + LATE).saturating_sub(GRACE) } else { 0 };
        self.asked = self.asked.map(|asked| (asked + late).max(read));
    }

    /// When it has been silent for too long.
    pub(super) fn silence_due(&self, quiet: bool) -> Ms {
        match self.asked {
            Some(asked) => asked + GRACE,
            None => {
                let silence = if quiet { QUIET_SILENCE } else { SILENCE };
                // One end asks first, so that one question tells both that the other lives.
                self.heard + if self.outbound { silence } else { silence * 5 / 4 }
            }
        }
    }

    /// When it may be told something again.
    fn turn(&self) -> Ms {
        self.flushed.map_or(0, |at| at + COALESCE)
    }

    /// When there is a frame for it.
    pub(super) fn flush_due(&self, changes: &Changes) -> Option<Ms> {
        let mut due = self.waiting.map(|since| since.max(self.turn()));
        if !self.answers.is_empty() || self.paging.is_some() || self.bulk_out.is_some() {
            due = self.flushed.or(Some(0));
        }
        if self.is_neighbour() && self.cursor < changes.end() && changes.any_unknown(self.cursor, self.bit) {
            let at = if self.eager || self.alarm { self.turn() } else { self.told + LAZY };
            due = Some(due.map_or(at, |due| due.min(at)));
        }
        due
    }
}

pub(super) fn flush<H: Holdings>(gossip: &mut Gossip<H>, id: LinkId, now: Ms) -> Option<Frame> {
    let at = gossip.links.iter().position(|link| link.id == id)?;
    if gossip.links[at].flush_due(&gossip.changes)? > now {
        return None;
    }
    let mut link = gossip.links.swap_remove(at);
    let mut frame = std::mem::take(&mut link.out);
    link.waiting = None;
    if link.is_neighbour() {
        gossip.tell_changes(&mut link, &mut frame, now);
    } else if !link.ready {
        // A connection that has not said who it is learns nothing yet.
    } else {
        link.cursor = gossip.changes.end();
    }
    if let Some(beat) = frame.beat.as_mut().filter(|beat| beat.compare) {
        (beat.candidates, beat.leaders) = gossip.opinion;
    }
    if link.ready {
        gossip.answer_questions(&mut link, &mut frame);
        gossip.bulk_page(&mut link, &mut frame);
    }
    link.flushed = Some(now);
    gossip.links.push(link);
    (frame != Frame::default()).then_some(frame)
}

impl<H: Holdings> Gossip<H> {
    /// Adds to `frame` what has changed since the link was told last.
    fn tell_changes(&mut self, link: &mut Link, frame: &mut Frame, now: Ms) {
        let end = self.changes.end();
        if !link.eager && !link.alarm && now < link.told + LAZY {
            return;
        }
        (link.told, link.alarm) = (now, false);
        let Some(changes) = self.changes.since(link.cursor) else {
            // It has missed some: the hashes will tell which.
            link.cursor = end;
            let root = self.members.root();
            frame.beat = Some(Beat { root, answer: true, compare: true, ..Beat::default() });
            return;
        };
        let mut deltas: Vec<(u32, Delta, Vec<u64>)> = Vec::new();
        // Where it is in what the link is told.
        let mut told: HashMap<u32, usize> = HashMap::new();
        for change in changes {
            if change.known & link.bit != 0 {
                continue;
            }
            let Some(member) = self.members.get(change.member) else { continue };
            if let What::Suspicion(seq) = change.what {
                if seq == member.record.seq {
                    frame
                        .suspicions
                        .extend(member.suspicion.iter().map(|suspicion| suspicion.signed.clone()));
                }
                continue;
            }
            if !link.eager || change.what == What::Position {
                let at = *told.entry(change.member).or_insert_with(|| {
                    // Without what is not news: these are most of what there is to say to a lazy link.
                    frame.have.push(Position { seq: 0, hash: 0, ..member.position() });
                    frame.have.len() - 1
                });
                if matches!(change.what, What::Record(_)) {
                    frame.have[at].seq = member.record.seq;
                }
                continue;
            }
            match change.what {
                What::Record(seq) if seq == member.record.seq => {
                    frame.records.push(member.record.signed.clone());
                }
                What::Content { epoch, version, content, held } if epoch == member.record.epoch => {
                    let open = deltas.iter_mut().rev().find(|(of, ..)| *of == change.member);
                    match open {
                        Some((_, delta, keys))
                            if delta.from + keys.len() as u32 + 1 == version && keys.len() < KEYS =>
                        {
                            if !held {
                                delta.removed.push(keys.len() as u32);
                            }
                            keys.push(content);
                        }
                        _ => {
                            let removed = if held { Vec::new() } else { vec![0] };
                            let from = version - 1;
                            let delta = Delta { key: member.key, epoch, from, removed, ..Delta::default() };
                            deltas.push((change.member, delta, vec![content]));
                        }
                    }
                }
                _ => {}
            }
        }
        link.cursor = end;
        frame.deltas.extend(deltas.into_iter().map(|(_, mut delta, keys)| {
            delta.contents = contents(keys.into_iter());
            delta
        }));
    }

    /// Adds to `frame` what the neighbour lacks, as far as it fits.
    fn answer_questions(&mut self, link: &mut Link, frame: &mut Frame) {
        let mut size = 0;
        while size < BUDGET {
            if let Some((position, mut keys)) = link.paging.take() {
                let page = keys.split_off(keys.len().saturating_sub(KEYS));
                size += 8 * page.len() + 32;
                let more = !keys.is_empty();
                frame.wholes.push(super::wire::Whole {
                    key: position.key,
                    epoch: position.epoch,
                    version: position.version,
                    contents: contents(page.into_iter()),
                    more,
                });
                link.paging = more.then_some((position, keys));
                continue;
            }
            let Some(asked) = link.answers.pop_front() else { break };
            let Some(index) = self.members.find(asked.key) else { continue };
            let Some(member) = self.members.get(index) else { continue };
            if member.record.seq > asked.seq {
                size += member.record.signed.len();
                frame.records.push(member.record.signed.clone());
            }
            if let (Some(suspicion), false) =
                (&member.suspicion, member.state == super::members::State::Alive)
            {
                frame.suspicions.push(suspicion.signed.clone());
            }
            let (epoch, version) = member.stamp();
            let differs =
                (asked.epoch, asked.version) == (epoch, version) && asked.hash != member.hash as u32;
            if (epoch, version) <= (asked.epoch, asked.version) && !differs {
                continue;
            }
            let logged = if asked.epoch == epoch && !differs {
                self.changes.contents(index, epoch, asked.version, version)
            } else {
                None
            };
            match logged.filter(|changes| changes.len() <= KEYS) {
                Some(changes) => {
                    let removed = changes.iter().enumerate().filter(|(_, (_, held))| !held);
                    let removed = removed.map(|(index, _)| index as u32).collect();
                    size += 8 * changes.len() + 32;
                    let contents = contents(changes.iter().map(|(content, _)| *content));
                    frame.deltas.push(Delta {
                        key: member.key,
                        epoch,
                        from: asked.version,
                        contents,
                        removed,
                    });
                }
                None => link.paging = Some((member.position(), self.holdings.of(index))),
            }
        }
    }
}
