//! Who holds which role: from the members to the table that is read. Pure: the time is given, and nothing is asked but the policy.
//!
//! ```text
//!   members -> view (sorted, rounded) -> policies, if more than 2/3 carry the same ones, else all alike -> weights -> owners
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::campaign::{Campaign, Lease, reaches};
use super::lease::Standing;
use super::members::{Mark, Member, View};
use super::seats::Seats;
use super::strict::Cause;
use super::table::{Agreement, Alone, By, Held, Mode, Table};
use super::{Backend, Config, rendezvous};
use crate::oci::{Digest, PeerId};
use crate::policy::election::{
    self as policies, EffectiveHash, ElectionPolicy, Ranked, RoleKind, Selection, Tenure,
};

/// So long members must have carried the same policies before those rank.
pub(super) const CARRIED: Duration = Duration::from_secs(10);
/// A ranking that failed is tried again after it, where nothing else has changed.
const RETRY: Duration = Duration::from_secs(60);
/// So long a node that knows nobody yet waits for others before it takes itself for the only one.
const JOINING: Duration = Duration::from_secs(5);
/// Why nobody is coordinator.
const NO_LEASE: &str = "it is held under a lease, and there is none: no Kubernetes API, or another backend";
/// Longest tenure that a policy can ask for in an advisory role: for so long a node that was started later may see other owners.
const TENURE_LIMIT: Duration = Duration::from_secs(60);

/// A role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Who speaks for the cluster: at most one, under a lease, or nobody.
    Coordinator,
    /// Whom a node without neighbours dials first.
    Introducers,
    /// Who asks an upstream what a tag means, for all; for each tag another one.
    TagHome,
}

/// What is seen at a time.
#[derive(Clone, Debug)]
pub(super) struct Input {
    /// Of a clock that never goes back.
    pub now: Duration,
    /// Live members that take part, this node among them.
    pub members: Vec<Member>,
    /// Whether there is nobody who is not among them, as far as neighbours know. Before that owners are taken as they come.
    pub complete: bool,
    /// Why this node would be alone.
    pub alone: Alone,
    /// Nodes that are said to be there, this node among them, whether or not they are members.
    pub known: usize,
    /// How the lease stands, where there is one.
    pub lease: Option<Lease>,
}

/// What follows.
#[derive(Clone, Debug)]
pub(super) struct Output {
    /// Who holds what.
    pub table: Arc<Table>,
    /// What this node is to carry.
    pub mark: Mark,
    /// When to look again, even where nothing has changed.
    pub due: Option<Duration>,
    /// Roles that others hold than before.
    pub changed: Vec<Role>,
    /// The part of this node in the strict role; `None`: it is too early to say.
    pub standing: Option<Standing>,
    /// This node leads, and is to make room for a better one.
    pub yields: bool,
}

/// The roles of a node.
pub(super) struct Roles {
    here: PeerId,
    policy: Arc<dyn ElectionPolicy>,
    hash: Box<dyn Fn() -> EffectiveHash + Send>,
    /// What members carry, and since when.
    carried: HashMap<PeerId, (Mark, Duration)>,
    ranked: HashMap<Role, Evaluated>,
    introducers: Seats,
    campaign: Campaign,
    last: Option<Arc<Table>>,
}

/// What the policies said last, and of what.
struct Evaluated {
    view: [u8; 32],
    generation: i64,
    seats: u32,
    /// Who leads, and for how long, as a power of two.
    holder: Option<(usize, u32)>,
    at: Duration,
    ranked: Ranked,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Introducers, Self::TagHome];

    /// As policies, people and metrics see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Introducers => "introducers",
            Self::TagHome => "tag-home",
        }
    }

    /// The role of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// As policies are asked about it. `introducers`: their seats.
    pub(super) fn for_policies(self, introducers: u32) -> policies::Role {
        let (kind, selection, seats) = match self {
            Self::Coordinator => (RoleKind::Strict, Selection::Ranked, 1),
            Self::Introducers => (RoleKind::Advisory, Selection::Ranked, introducers),
            Self::TagHome => (RoleKind::Advisory, Selection::Proportional, 1),
        };
        policies::Role { name: self.name().into(), kind, selection, seats }
    }
}

impl Roles {
    /// Of the node `here`. `hash`: what its policies are, after the last ranking.
    pub(super) fn new(
        here: PeerId,
        policy: Arc<dyn ElectionPolicy>,
        hash: impl Fn() -> EffectiveHash + Send + 'static,
    ) -> Self {
        Self {
            here,
            policy,
            hash: Box::new(hash),
            carried: HashMap::new(),
            ranked: HashMap::new(),
            introducers: Seats::default(),
            campaign: Campaign::default(),
            last: None,
        }
    }

    /// Who holds what now. Takes the policies' time where candidates or policies have changed.
    pub(super) fn evaluate(&mut self, config: &Config, input: Input) -> Output {
        let now = input.now;
        let view = View::new(input.members, &self.here);
        let mut due = view.due.map(|left| now + left);
        let elects = config.backend.is_strict() || config.backend == Backend::Gossip;
        let lease = input.lease.filter(|_| config.backend.is_strict());
        let asks = elects && self.policy.is_active();
        if asks {
            self.ask_policies(&view, config, lease.as_ref(), now);
        } else {
            self.ranked.clear();
        }
        let mark = if asks { Mark::of(&(self.hash)()) } else { Mark::default() };
        let agreement = self.agreement(&view, mark, now, &mut due);
        let mut roles = Vec::new();
        for role in Role::ALL {
            let mut held = self.weigh(role, &view, config, agreement.in_force);
            match role {
                Role::Coordinator => match &lease {
                    None => held = Held::new(By::Nobody, vec![0; view.members.len()], NO_LEASE.into()),
                    Some(lease) => {
                        let asked = self.ranked.get(&role).filter(|_| held.by == By::Policy);
                        let asked = asked.map(|evaluated| evaluated.ranked.clone()).unwrap_or_default();
                        if held.by == By::BuiltIn {
                            held.weights = reaching(&view);
                        }
                        let wait = self.campaign.take(
                            &view,
                            &self.here,
                            &mut held,
                            lease,
                            &asked,
                            now,
                            input.complete,
                        );
                        due = earlier(due, wait);
                    }
                },
                Role::TagHome => {
                    held.owners =
                        rendezvous::Table::new(view.marks.iter().copied().zip(held.weights.iter().copied()));
                }
                Role::Introducers => {
                    let tenure = self.ranked.get(&role).filter(|_| held.by == By::Policy);
                    let tenure = tenure.and_then(|evaluated| evaluated.ranked.min_tenure).unwrap_or_default();
                    let wanted = introducers(&view, &held.weights, config);
                    let (seats, wait) =
                        self.introducers.take(&wanted, now, tenure.min(TENURE_LIMIT), input.complete, |id| {
                            view.place(id).is_some_and(|place| held.weights[place] > 0)
                        });
                    held.seats = seats.iter().filter_map(|id| view.place(id)).collect();
                    due = earlier(due, wait);
                }
            }
            held.digest = digest(role, &held, &view);
            roles.push((role, held));
        }
        let is_alone = view.members.len() <= 1;
        let mode = match (config.backend, &lease) {
            (Backend::Static, _) => Mode::Static,
            (Backend::Off, _) => Mode::Off,
            (_, Some(lease)) if self.is_lost(&view, &roles, lease) => Mode::Degraded(Cause::NoLeader),
            // One node that relies on its lease is a cluster of one.
            (_, Some(lease)) if lease.relied_on && !(is_alone && input.alone == Alone::Unreached) => {
                Mode::Lease
            }
            _ if is_alone => Mode::Alone(input.alone),
            (_, Some(lease)) => Mode::Degraded(lease.cause),
            (_, None) => Mode::Gossip,
        };
        let early = !input.complete && is_alone && now < JOINING;
        if early && lease.is_some() {
            due = earlier(due, Some(JOINING));
        }
        let standing = lease.as_ref().filter(|_| !early);
        let standing = standing.map(|lease| {
            let seats = roles.iter().find(|(role, _)| *role == Role::Coordinator);
            let seats = seats.map(|(_, held)| held.seats.as_slice()).unwrap_or_default();
            self.campaign.standing(&view, &self.here, seats, lease, input.known)
        });
        let yields = self.campaign.yields();
        let table = Arc::new(Table::new(mode, view, &self.here, roles, agreement));
        let before = self.last.replace(Arc::clone(&table));
        let differs =
            |role: &Role| before.as_ref().is_none_or(|before| before.digest(*role) != table.digest(*role));
        let changed = Role::ALL.into_iter().filter(differs).collect();
        Output { table, mark, due, changed, standing, yields }
    }

    /// Whether a node that reads the lease seldom knows by the members that it is not to be relied on: its holder says that it does
    /// not reach the API server.
    fn is_lost(&self, view: &View, roles: &[(Role, Held)], lease: &Lease) -> bool {
        let Some(holder) = lease.holder.as_ref().filter(|holder| lease.relied_on && **holder != self.here)
        else {
            return false;
        };
        let stands = |(role, held): &(Role, Held)| {
            *role == Role::Coordinator && held.seats.iter().any(|seat| view.members[*seat].id == self.here)
        };
        let is_cut_off = view.place(holder).is_some_and(|place| !reaches(&view.members[place]));
        is_cut_off && !roles.iter().any(stands)
    }

    fn ask_policies(&mut self, view: &View, config: &Config, lease: Option<&Lease>, now: Duration) {
        let generation = self.policy.generation();
        let seats = config.introducers;
        let mut candidates = None;
        for role in Role::ALL {
            if role == Role::Coordinator && lease.is_none() {
                self.ranked.remove(&role);
                continue;
            }
            let tenure = lease.filter(|_| role == Role::Coordinator).and_then(|lease| lease.tenure(view));
            let holder = tenure.map(|Tenure { candidate, duration }| {
                (candidate, u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1).ilog2())
            });
            let is_known = self.ranked.get(&role).is_some_and(|evaluated| {
                let same = (evaluated.view, evaluated.generation, evaluated.seats, evaluated.holder)
                    == (view.digest, generation, seats, holder);
                same && !(evaluated.ranked.why.is_fault() && now >= evaluated.at + RETRY)
            });
            if is_known {
                continue;
            }
            let candidates = candidates.get_or_insert_with(|| view.candidates()).clone();
            let count = candidates.len();
            let asked = policies::View { role: role.for_policies(seats), candidates, holder: tenure };
            let mut ranked = self.policy.rank(&asked);
            // Guarded here too, whoever implements the trait.
            ranked.weights = ranked.weights.filter(|weights| weights.len() == count);
            let evaluated = Evaluated { view: view.digest, generation, seats, holder, at: now, ranked };
            self.ranked.insert(role, evaluated);
        }
    }

    /// How many members carry what this node carries.
    fn agreement(&mut self, view: &View, mark: Mark, now: Duration, due: &mut Option<Duration>) -> Agreement {
        self.carried.retain(|id, _| view.place(id).is_some());
        let mut agreement = Agreement { mark, live: view.members.len(), ..Agreement::default() };
        for member in &view.members {
            // Its own record is behind by as long as it takes to be signed.
            let carries = if member.id == self.here { mark } else { member.facts.policy };
            let entry = self.carried.entry(member.id.clone()).or_insert((carries, now));
            if entry.0 != carries {
                *entry = (carries, now);
            }
            if carries != mark {
                continue;
            }
            agreement.carry += 1;
            if now >= entry.1 + CARRIED {
                agreement.settled += 1;
            } else if !mark.is_built_in() {
                *due = earlier(*due, Some(entry.1 + CARRIED));
            }
        }
        agreement.in_force = !mark.is_built_in() && 3 * agreement.settled > 2 * agreement.live;
        agreement
    }

    /// The weights of all members for a role, and by whom.
    fn weigh(&self, role: Role, view: &View, config: &Config, agreed: bool) -> Held {
        let all = |weight| vec![weight; view.members.len()];
        match config.backend {
            Backend::Off => return Held::new(By::Nobody, all(0), "`election.backend` is off".into()),
            Backend::Static => {
                // The first ones first, where that counts.
                let weight = |member: &Member| match named(config, member) {
                    Some(place) if role == Role::Introducers => u32::MAX - place,
                    place => u32::from(place.is_some()),
                };
                let weights = view.members.iter().map(weight).collect();
                return Held::new(By::Static, weights, "`election.nodes` names them".into());
            }
            Backend::Auto | Backend::Gossip | Backend::Lease | Backend::ConfigMap => {}
        }
        let Some(Evaluated { ranked, .. }) = self.ranked.get(&role) else {
            return Held::new(By::BuiltIn, all(1), policies::Why::NoPolicy.to_string());
        };
        let why = ranked.why.to_string();
        match &ranked.weights {
            Some(weights) if agreed => Held::new(By::Policy, weights.clone(), why),
            Some(_) => Held { fallback: Some(Fallback::Disagreement), ..Held::new(By::BuiltIn, all(1), why) },
            None => Held { fallback: Fallback::of(&ranked.why), ..Held::new(By::BuiltIn, all(1), why) },
        }
    }
}

/// Why the built-in ranks where there are policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// Too few members carry the same policies for long enough.
    Disagreement,
    /// A policy failed.
    Failed,
    /// The policies exclude everyone.
    Excluded,
    /// The view cannot be given to a policy.
    View,
}

impl Fallback {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Disagreement, Self::Failed, Self::Excluded, Self::View];

    /// As metrics and people see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disagreement => "disagreement",
            Self::Failed => "failed",
            Self::Excluded => "excluded",
            Self::View => "view",
        }
    }

    fn of(why: &policies::Why) -> Option<Self> {
        match why {
            policies::Why::Failed(..) => Some(Self::Failed),
            policies::Why::AllExcluded => Some(Self::Excluded),
            policies::Why::View(_) => Some(Self::View),
            _ => None,
        }
    }
}

/// Whom a node that was started again dials first, by what it remembers of the members: the built-in ranking.
pub fn remembered(members: Vec<Member>, here: &PeerId, config: &Config) -> Vec<PeerId> {
    let view = View::new(members, here);
    let weigh = |member: &Member| match config.backend {
        Backend::Off => 0,
        Backend::Static => named(config, member).map_or(0, |place| u32::MAX - place),
        Backend::Auto | Backend::Gossip | Backend::Lease | Backend::ConfigMap => 1,
    };
    let weights: Vec<u32> = view.members.iter().map(weigh).collect();
    introducers(&view, &weights, config)
}

/// The best for the seats: of each zone its best one first, then the next best of all; where they are named, as they are named.
fn introducers(view: &View, weights: &[u32], config: &Config) -> Vec<PeerId> {
    let seats = usize::try_from(config.introducers).unwrap_or(usize::MAX);
    let any_zone = config.backend == Backend::Static;
    let weighed: Vec<(u64, u32)> = view.marks.iter().copied().zip(weights.iter().copied()).collect();
    let order = rendezvous::ranked(&weighed, rendezvous::key(Role::Introducers.name(), b""));
    let mut zones = std::collections::HashSet::new();
    let (mut spread, mut rest) = (Vec::new(), Vec::new());
    for place in order {
        let member = &view.members[place as usize];
        let list = if any_zone || zones.insert(&member.zone) { &mut spread } else { &mut rest };
        list.push(member.id.clone());
    }
    spread.into_iter().chain(rest).take(seats).collect()
}

/// All members alike, but for those that say that they do not reach the API server, unless that is all.
fn reaching(view: &View) -> Vec<u32> {
    let any = view.members.iter().any(reaches);
    view.members.iter().map(|member| u32::from(!any || reaches(member))).collect()
}

/// Where the configuration names a member.
fn named(config: &Config, member: &Member) -> Option<u32> {
    (0..).zip(&config.nodes).find(|(_, name)| **name == member.name).map(|(place, _)| place)
}

/// What nodes compare of a role: who leads, or by which weights.
fn digest(role: Role, held: &Held, view: &View) -> [u8; 32] {
    let mut bytes = role.name().as_bytes().to_vec();
    match role {
        Role::Introducers | Role::Coordinator => {
            let mut seats: Vec<&str> =
                held.seats.iter().map(|place| view.members[*place].id.as_str()).collect();
            seats.sort_unstable();
            seats.iter().for_each(|id| bytes.extend([b"\0", id.as_bytes()].concat()));
        }
        Role::TagHome => {
            for (member, weight) in view.members.iter().zip(&held.weights).filter(|(_, weight)| **weight > 0)
            {
                bytes.extend([b"\0", member.id.as_str().as_bytes(), &weight.to_be_bytes()].concat());
            }
        }
    }
    *Digest::sha256(&bytes).as_bytes().first_chunk().unwrap_or(&[0; 32])
}

fn earlier(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    a.into_iter().chain(b).min()
}

#[cfg(test)]
pub(super) mod tests;
