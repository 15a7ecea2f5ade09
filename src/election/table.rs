//! Who holds what, as it is read: by the mirror for each tag, and by people. It is replaced whole and never changed.

use serde::{Deserialize, Serialize};

use super::Backend;
use super::members::{Mark, Member, View};
use super::rendezvous;
use super::roles::{Fallback, Role};
use super::status::{Compared, Explained, Holder, RoleStatus, Standing, Status};
use super::strict::{BOOK, Cause};
use crate::oci::{Digest, Home, PeerId};
use crate::policy;
use crate::policy::election::{Candidate, Reachability};

/// Candidates that an explanation shows.
const SHOWN: usize = 20;

/// How roles are given now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// By the view of the members, and the strict role by a lease that is healthy.
    Lease,
    /// By the view of the members, and the strict role by nobody for sure.
    Degraded(Cause),
    /// By the view of the members.
    Gossip,
    /// No other member is known.
    Alone(Alone),
    /// To the nodes that the configuration names.
    Static,
    /// To nobody.
    Off,
}

/// Why a node is alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alone {
    /// Nothing says where others could be.
    NoBootstrapSource,
    /// Nobody of those that it looks for has answered.
    Unreached,
}

/// Who ranks for a role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// The policies.
    Policy,
    /// Nobody: all members are equal.
    #[default]
    BuiltIn,
    /// The configuration.
    Static,
    /// The role is not given.
    Nobody,
}

/// How many members carry the same policies as this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Agreement {
    pub mark: Mark,
    pub carry: usize,
    /// For long enough.
    pub settled: usize,
    pub live: usize,
    pub in_force: bool,
}

/// One role.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub by: By,
    pub why: String,
    pub fallback: Option<Fallback>,
    /// Of each member; 0: it cannot hold the role.
    pub weights: Vec<u32>,
    /// Places of those who hold a ranked role.
    pub seats: Vec<usize>,
    /// Who holds which key.
    pub owners: rendezvous::Table,
    pub digest: [u8; 32],
}

/// All roles at a time.
#[derive(Clone, Debug)]
pub struct Table {
    mode: Mode,
    view: View,
    here: Option<usize>,
    roles: Vec<(Role, Held)>,
    agreement: Agreement,
}

impl Mode {
    /// As metrics and people see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::Degraded(_) => "gossip-degraded",
            Self::Gossip => "gossip",
            Self::Alone(_) => "alone",
            Self::Static => "static",
            Self::Off => "off",
        }
    }

    /// All names.
    pub const NAMES: [&'static str; 6] = ["lease", "gossip-degraded", "gossip", "alone", "static", "off"];

    /// Why, where that should not last; else empty.
    pub const fn cause(self) -> &'static str {
        match self {
            Self::Alone(Alone::NoBootstrapSource) => "no-bootstrap-source",
            Self::Alone(Alone::Unreached) => "unreached",
            Self::Degraded(cause) => cause.name(),
            _ => "",
        }
    }

    /// What to do about it; else empty.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Alone(Alone::NoBootstrapSource) => {
                "nothing says where other nodes are: name a headless service under `network.dns`, or nodes under \
                 `network.peers`; a single node may stay as it is"
            }
            Self::Alone(Alone::Unreached) => {
                "no other node has answered yet: the problems of the network say why (names, addresses, ports, the cluster \
                 key); the first node of a cluster may stay as it is until others come"
            }
            Self::Degraded(cause) => cause.remedy(),
            _ => "",
        }
    }
}

impl Held {
    pub(super) fn new(by: By, weights: Vec<u32>, why: String) -> Self {
        let (seats, owners) = (Vec::new(), rendezvous::Table::default());
        Self { by, why, fallback: None, weights, seats, owners, digest: [0; 32] }
    }
}

impl Table {
    pub(super) fn new(
        mode: Mode,
        view: View,
        here: &PeerId,
        roles: Vec<(Role, Held)>,
        agreement: Agreement,
    ) -> Self {
        Self { mode, here: view.place(here), view, roles, agreement }
    }

    /// How roles are given.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Who does it for `key`.
    pub fn home(&self, key: &[u8]) -> Home {
        let key = rendezvous::key(Role::TagHome.name(), key);
        self.at(self.held(Role::TagHome).and_then(|held| held.owners.owner(key)))
    }

    /// Who is the home of a key when its home is gone. It computes all draws of the key: for when the home does not answer.
    pub fn runner_up(&self, key: &[u8]) -> Home {
        let key = rendezvous::key(Role::TagHome.name(), key);
        self.at(self.held(Role::TagHome).and_then(|held| held.owners.order(key).get(1).copied()))
    }

    fn at(&self, place: Option<u32>) -> Home {
        match place.map(|place| place as usize) {
            Some(place) if Some(place) == self.here => Home::Here,
            Some(place) => {
                self.view.members.get(place).map_or(Home::Nobody, |member| Home::Peer(member.id.clone()))
            }
            None => Home::Nobody,
        }
    }

    /// Whom a node without neighbours dials first.
    pub fn introducers(&self) -> Vec<PeerId> {
        let seats = self.held(Role::Introducers).into_iter().flat_map(|held| &held.seats);
        seats.filter_map(|place| Some(self.view.members.get(*place)?.id.clone())).collect()
    }

    /// Whom a node without peers may ask, as the lease tells: introducers first, then this node, then others.
    pub(super) fn book(&self) -> Vec<PeerId> {
        let mut book = self.introducers();
        for place in self.here.into_iter().chain(0..self.view.members.len()) {
            if book.len() >= BOOK {
                break;
            }
            let Some(Member { id, .. }) = self.view.members.get(place) else { continue };
            if !book.contains(id) {
                book.push(id.clone());
            }
        }
        book
    }

    /// What this node makes of its view, as neighbours are told: the candidates, and who leads. Never 0.
    pub fn opinion(&self) -> (u32, u32) {
        let short = |bytes: &[u8; 32]| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).max(1);
        // Who stands for the strict role may differ, since some see the lease later than others.
        let compared = self.roles.iter().filter(|(role, _)| *role != Role::Coordinator);
        let all: Vec<u8> = compared.flat_map(|(_, held)| held.digest).collect();
        let all = *Digest::sha256(&all).as_bytes().first_chunk().unwrap_or(&[0; 32]);
        (short(&self.view.digest), short(&all))
    }

    /// Whether this node holds a role, or some of its keys.
    pub fn holds(&self, role: Role) -> bool {
        let Some((held, here)) = self.held(role).zip(self.here) else { return false };
        match role {
            // Of the strict role it is the lease that says who holds it.
            Role::Coordinator => false,
            Role::Introducers => held.seats.contains(&here),
            Role::TagHome => held.weights.get(here).is_some_and(|weight| *weight > 0),
        }
    }

    /// Why the built-in ranks for a role where there are policies.
    pub fn fallback(&self, role: Role) -> Option<Fallback> {
        self.held(role)?.fallback
    }

    /// Live members that take part.
    pub fn members(&self) -> usize {
        self.view.members.len()
    }

    /// Members that say that they reach the API server.
    pub(super) fn reaching(&self) -> usize {
        let reaches = |member: &&Member| member.facts.api_server == Reachability::Reachable;
        self.view.members.iter().filter(reaches).count()
    }

    /// Members that carry the same policies as this node.
    pub fn carry(&self) -> usize {
        self.agreement.carry
    }

    pub(super) fn digest(&self, role: Role) -> Option<[u8; 32]> {
        self.held(role).map(|held| held.digest)
    }

    pub(super) fn candidates(&self) -> Vec<Candidate> {
        self.view.candidates()
    }

    fn held(&self, role: Role) -> Option<&Held> {
        self.roles.iter().find(|(known, _)| *known == role).map(|(_, held)| held)
    }

    /// For people. `opinions`: those of the neighbours.
    pub fn status(&self, backend: Backend, opinions: &[(u32, u32)]) -> Status {
        let own = self.opinion();
        let compared = |same: &dyn Fn(&(u32, u32)) -> bool| {
            let same = opinions.iter().filter(|opinion| same(opinion)).count();
            Compared { same, other: opinions.len() - same }
        };
        Status {
            backend,
            mode: self.mode.name().into(),
            cause: self.mode.cause().into(),
            remedy: self.mode.remedy().into(),
            members: self.members(),
            policy: self.agreement.mark.to_string(),
            carry: self.agreement.carry,
            agreed: self.agreement.in_force,
            view: hex(&self.view.digest),
            views: compared(&|opinion| opinion.0 == own.0),
            owners: compared(&|opinion| opinion.1 == own.1),
            roles: Role::ALL.iter().map(|role| self.role(*role)).collect(),
            lease: None,
            configmap: None,
        }
    }

    fn role(&self, role: Role) -> RoleStatus {
        let Some(held) = self.held(role) else { return RoleStatus::default() };
        RoleStatus {
            role: role.name().into(),
            by: held.by,
            why: held.why.clone(),
            fallback: held.fallback.map(Fallback::name).unwrap_or_default().into(),
            candidates: held.weights.iter().filter(|weight| **weight > 0).count(),
            holders: match role {
                // The lease says who it is.
                Role::Coordinator => Vec::new(),
                Role::Introducers | Role::TagHome => {
                    held.seats.iter().filter_map(|place| self.holder(*place)).collect()
                }
            },
            held: self.holds(role),
            ranking: hex(&held.digest),
        }
    }

    /// A member by its ID.
    pub(super) fn named(&self, id: &PeerId) -> Option<Holder> {
        self.holder(self.view.place(id)?)
    }

    fn holder(&self, place: usize) -> Option<Holder> {
        let Member { id, name, .. } = self.view.members.get(place)?;
        Some(Holder { id: id.to_string(), node: name.clone() })
    }

    /// Why a role, or a key of it, is held as it is. `said`: what the policies say.
    pub(super) fn explain(&self, role: Role, key: Option<&str>, said: Vec<policy::Said>) -> Explained {
        let status = self.role(role);
        let Some(held) = self.held(role) else { return Explained::default() };
        let mut order: Vec<usize> = match key {
            Some(key) if role == Role::TagHome => {
                let order = held.owners.order(rendezvous::key(role.name(), key.as_bytes()));
                order.into_iter().map(|place| place as usize).collect()
            }
            _ => {
                let weighed: Vec<(u64, u32)> =
                    self.view.marks.iter().copied().zip(held.weights.iter().copied()).collect();
                let order = rendezvous::ranked(&weighed, rendezvous::key(role.name(), b""));
                order.into_iter().map(|place| place as usize).collect()
            }
        };
        let owners: Vec<usize> = match (role, key) {
            (Role::TagHome, Some(_)) => order.first().copied().into_iter().collect(),
            // The lease says who it is; all the others stand for it.
            (Role::Coordinator, _) => Vec::new(),
            _ => held.seats.clone(),
        };
        order.extend((0..self.members()).filter(|place| held.weights.get(*place) == Some(&0)));
        // Those who sit are shown, wherever they rank.
        let seated: Vec<usize> =
            order.iter().copied().skip(SHOWN).filter(|place| owners.contains(place)).collect();
        let shown = order.into_iter().take(SHOWN).chain(seated);
        let standing = |place: usize| {
            let Member { id, name, zone, .. } = self.view.members.get(place)?;
            Some(Standing {
                id: id.to_string(),
                node: name.clone(),
                zone: zone.clone(),
                weight: held.weights.get(place).copied().unwrap_or(0),
                holds: owners.contains(&place),
            })
        };
        Explained {
            role: status,
            key: key.map(str::to_owned),
            owners: owners.iter().filter_map(|place| self.holder(*place)).collect(),
            policy: self.agreement.mark.to_string(),
            carry: self.agreement.carry,
            members: self.members(),
            said,
            candidates: shown.filter_map(standing).collect(),
        }
    }
}

fn hex(digest: &[u8; 32]) -> String {
    digest[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}
