//! Elections for people and scripts: what `/status`, `peili election status` and `explain` show.

use serde::{Deserialize, Serialize};

use super::strict::State;
use super::table::{By, Table};
use super::{Backend, Role, identity, lease};
use crate::policy;

/// Elections for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// As the configuration has it.
    pub backend: Backend,
    /// `lease`, `gossip-degraded`, `gossip`, `alone`, `static`, `off`; empty: not known yet.
    pub mode: String,
    /// Why, where that is a state that should not last.
    pub cause: String,
    /// What to do about it.
    pub remedy: String,
    /// Live members that take part, this node included.
    pub members: usize,
    /// What stands for this node's election policies; `builtin`: there are none, or they failed.
    pub policy: String,
    /// Members that carry the same.
    pub carry: usize,
    /// Whether those are enough, and for long enough, that policies rank.
    pub agreed: bool,
    /// A hash of the candidates and their facts.
    pub view: String,
    /// Neighbours that saw the same candidates when views were compared last, and others.
    pub views: Compared,
    /// Neighbours that saw the same owners then, and others.
    pub owners: Compared,
    /// Each role.
    pub roles: Vec<RoleStatus>,
    /// The lease of the strict role, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseStatus>,
    /// The lock of electors of old, where it is held beside the lease, or observed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configmap: Option<LeaseStatus>,
}

/// The lease for people, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaseStatus {
    /// What keeps it: `Lease peili`, or `ConfigMap peili`.
    pub object: String,
    /// The process that holds it; empty: nobody, or not known.
    pub holder: String,
    /// This process leads.
    pub held: bool,
    /// `candidate N` (0 is tried first) or `observer`; empty: not known yet.
    pub standing: String,
    /// The token of this process's term: uid, version and transitions of the write that began it.
    pub token: String,
    /// How long ago the holder was seen to renew, in milliseconds.
    pub age_millis: Option<u64>,
    /// How long a record holds, in milliseconds.
    pub duration_millis: u64,
    /// Whether it has been healthy for long enough to be relied on.
    pub relied_on: bool,
    /// Whether this node reaches the API server.
    pub reached: Option<bool>,
    /// What is wrong; empty: nothing.
    pub fault: String,
}

/// What neighbours see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Compared {
    /// The same as this node.
    pub same: usize,
    /// Something else.
    pub other: usize,
}

/// One role for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RoleStatus {
    /// Its name.
    pub role: String,
    /// Who ranks.
    pub by: By,
    /// Why.
    pub why: String,
    /// Why the policies do not; empty: they do, or there are none.
    pub fallback: String,
    /// Members that can hold it.
    pub candidates: usize,
    /// Those who hold it; for a role that is held for each key by another one, none.
    pub holders: Vec<Holder>,
    /// Whether this node holds it, or some of its keys.
    pub held: bool,
    /// A hash of its owners.
    pub ranking: String,
}

/// Who holds a role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Holder {
    /// Peer ID.
    pub id: String,
    /// Node name; empty: unknown.
    pub node: String,
}

/// Why a role is held as it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Explained {
    /// The role as it stands.
    pub role: RoleStatus,
    /// The key that was asked about.
    pub key: Option<String>,
    /// Who holds the key, or the role.
    pub owners: Vec<Holder>,
    /// What stands for this node's policies, how many of the members carry the same, and how many there are.
    pub policy: String,
    /// See there.
    pub carry: usize,
    /// See there.
    pub members: usize,
    /// What each policy says now.
    pub said: Vec<policy::Said>,
    /// The best candidates, the best first: for a key in the order in which they would hold it.
    pub candidates: Vec<Standing>,
}

/// How a candidate stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// Peer ID.
    pub id: String,
    /// Node name; empty: unknown.
    pub node: String,
    /// Zone; empty: unknown.
    pub zone: String,
    /// Its weight; 0: it cannot hold the role.
    pub weight: u32,
    /// Whether it holds it.
    pub holds: bool,
}

impl Status {
    /// Adds how the strict role stands.
    pub(super) fn put_lease(&mut self, state: &State, table: &Table) {
        if let Some(role) = self.roles.iter_mut().find(|role| role.role == Role::Coordinator.name()) {
            role.put_lease(state, table);
        }
        self.lease = Some(LeaseStatus::of(state.own.as_deref().unwrap_or(state)));
        self.configmap = state.beside.as_deref().map(LeaseStatus::of);
    }
}

impl Explained {
    /// Says who holds the strict role, and whether that is this node.
    pub(super) fn put_lease(&mut self, state: &State, table: &Table) {
        self.role.put_lease(state, table);
        self.owners = self.role.holders.clone();
        for standing in &mut self.candidates {
            standing.holds = self.owners.iter().any(|owner| owner.id == standing.id);
        }
    }
}

impl RoleStatus {
    /// What the lease says of the strict role: its holder, who need not be a member, or nobody.
    fn put_lease(&mut self, state: &State, table: &Table) {
        self.held = state.leads();
        let holder = state.holder.as_deref().filter(|holder| !state.free && !holder.is_empty());
        let named = |holder: &str| identity::peer(holder).and_then(|peer| table.named(&peer));
        let foreign = |holder: &str| Holder { id: holder.to_owned(), node: holder.to_owned() };
        self.holders =
            holder.map(|holder| named(holder).unwrap_or_else(|| foreign(holder))).into_iter().collect();
    }
}

impl LeaseStatus {
    fn of(state: &State) -> Self {
        Self {
            object: state.lock.to_string(),
            holder: state.holder.as_deref().filter(|_| !state.free).unwrap_or_default().to_owned(),
            held: state.leads(),
            standing: match state.standing {
                None => String::new(),
                Some(lease::Standing::Candidate(rank)) => format!("candidate {rank}"),
                Some(lease::Standing::Observer(_)) => "observer".into(),
            },
            token: state.token().map(ToString::to_string).unwrap_or_default(),
            age_millis: state.age,
            duration_millis: state.duration,
            relied_on: state.relied_on,
            reached: state.reached,
            fault: state.fault.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }
}
