//! What the probes found, before anybody judges it. No opinions here.

use std::net::SocketAddr;
use std::time::SystemTime;

use crate::admin::Status;
use crate::cluster::{Account, Fault, Kind, Reach, Right, Write};
use crate::configure;
use crate::network::swarm::Unresolved;

use super::Told;
use super::place::Place;

/// All that was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// When.
    pub now: SystemTime,
    /// What the mirror of this node knows of a loss of the API server; `None`: it reaches it, or nobody knows.
    pub told: Option<Told>,
    /// Where this runs.
    pub place: Place,
    /// What the configuration needs of the Kubernetes API; `None`: nothing.
    pub wanted: Option<Wanted>,
    /// Whether anything says where the API is.
    pub in_cluster: bool,
    /// What is mounted.
    pub account: Account,
    /// Of Peili's objects, or why it is not known.
    pub namespace: Result<String, String>,
    /// The API server's addresses, in the order in which they are asked.
    pub reaches: Vec<Reach>,
    /// What the first address said to which there is a way.
    pub answers: Option<Answers>,
    /// The names by which peers are found, with the number of their addresses.
    pub names: Vec<(String, Result<usize, Unresolved>)>,
    /// A name that each cluster's DNS knows, where there are names to be compared with.
    pub cluster_name: Option<Result<usize, Unresolved>>,
    /// API servers (`HOST:PORT`), and registries that do not answer, of whose names no name server says anything.
    pub unnamed: Vec<(String, Unresolved)>,
    /// Ports of the registries' hosts that the runtime is configured with.
    pub registries: Vec<u16>,
    /// The runtime of this node; `None`: the store is no containerd.
    pub runtime: Option<Runtime>,
    /// What the mirror that runs here says of itself; an error: why there is none.
    pub mirror: Result<Box<Status>, String>,
    /// Peer ports of some live members that the mirror knows, by the members' names, and why one is not reached.
    pub peer_ports: Vec<(String, Result<(), String>)>,
    /// The registry's port at the node's address, behind which nobody should be, and whether Peili answers there; `None`: not looked at.
    pub host_port: Option<(SocketAddr, bool)>,
}

/// What the configuration needs of the Kubernetes API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The locks of elections.
    pub locks: Vec<Lock>,
    /// The ConfigMap of the fleet summary.
    pub summary: String,
    /// The rights, each with what it is for.
    pub rights: Vec<(Purpose, Right)>,
}

/// A lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// What it is kept in.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Whether it is written, or only looked at.
    pub writes: bool,
}

/// What a right is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To read and replace a lock.
    Lock,
    /// To be told of changes of a lock.
    Watch,
    /// To make a lock of this kind where there is none.
    Create(Making),
    /// To read and replace the fleet summary.
    Summary,
    /// To tell Events.
    Events,
    /// To read this Node.
    Node,
}

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Making {
    /// A Lease.
    Lease,
    /// A ConfigMap: a lock, or the fleet summary.
    ConfigMap,
}

/// What one address of the API server said.
#[derive(Clone, Debug)]
pub struct Answers {
    /// The address.
    pub address: String,
    /// Its version. All else is only asked where it has told that.
    pub version: Result<String, Fault>,
    /// Whom it takes this account for, where it says that.
    pub who: Option<String>,
    /// What this account may do.
    pub rights: Vec<(Purpose, Right, Result<bool, Fault>)>,
    /// What went wrong while the server looked at a right that it says is lacking.
    pub unsure: Vec<(Right, String)>,
    /// The locks.
    pub locks: Vec<LockAnswer>,
    /// Whether the ConfigMap of the fleet summary is there.
    pub summary: Option<Result<bool, Fault>>,
}

/// What was said of a lock.
#[derive(Clone, Debug)]
pub struct LockAnswer {
    /// Which.
    pub lock: Lock,
    /// Whether it is there.
    pub there: Result<bool, Fault>,
    /// Who holds it, and whether Peili has ever written it.
    pub holder: Option<(String, bool)>,
    /// What became of a dry write; `None`: it is not written.
    pub write: Option<Write>,
}

/// The runtime of this node.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// Its socket, for people.
    pub socket: String,
    /// Its version, or why it does not answer.
    pub version: Result<String, Silence>,
    /// What `peili configure --check` says; an error: why it says nothing.
    pub report: Result<Box<configure::Report>, Unseen>,
    /// Folders of registry hosts that containerd is to read and that do not exist.
    pub missing: Vec<String>,
    /// The data folder, in which `peili configure` keeps its records, is not seen from here.
    pub unrecorded: bool,
}

/// Why containerd does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// There is no socket.
    Absent,
    /// It may not be opened: the kernel's words.
    Denied(String),
    /// Nobody listens.
    Down,
    /// It is open, and nothing comes.
    Silent,
    /// Something else answers, in its own words.
    Other(String),
}

/// Why `peili configure --check` says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unseen {
    /// There is no containerd below the root that was named.
    NoRuntime,
    /// The distribution writes the folder itself.
    Owned(String),
    /// It cannot be read: why.
    Unreadable(String),
}
