//! The network over libp2p: TCP, TLS 1.3 with proved identities, yamux, and a control protocol of our own.
//!
//! One task, the driver, owns the libp2p swarm and drives the gossip ([`super::gossip`]); handles read the view in memory and
//! leave orders. A few neighbours have a stream each for the gossip's frames; who else is connected may ask and be asked.
//!
//! ```text
//!   handles --orders--> driver --dial, messages--> libp2p
//!      ^                  |
//!      +----- view <------+
//! ```

mod behaviour;
mod book;
mod bootstrap;
mod codec;
mod disk;
mod driver;
mod lookup;
#[doc(hidden)]
pub mod message;
mod notary;
mod stream;
mod streams;
mod transport;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::admission::Admission;
use super::facts::Facts;
use super::gossip::Limits;
use super::identity::Identity;
use super::metrics::Metrics;
use super::{
    Advertisement, Config, KnownPeer, Member, Network, Peer, PeerConfig, ResolveError, Status, TagQuestion,
    TagSource, Tagged,
};
use crate::oci::{Action, Digest, Gate, PeerId};
use book::Book;
use driver::{Command, Driver, Question, Reply};
use lookup::{Names, SystemNames};
use view::Shared;

pub use lookup::{Unresolved, resolve};

/// Questions about tags that wait for the driver; more fail at once.
const COMMANDS: usize = 256;
/// How long [`Swarm::shutdown`] waits for the peers to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

/// What this node tells its peers about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// Where its peer port listens; an unspecified address stands for the one that peers see.
    pub transfer: Vec<SocketAddr>,
    /// Kubernetes node name; empty: unknown. At most 256 bytes, without control characters; so the two below.
    pub node: String,
    /// Zone; empty: unknown.
    pub zone: String,
    /// Peili's version.
    pub version: String,
}

/// What the network asks, and where it counts.
pub struct Parts {
    /// How far peers are trusted.
    pub gate: Arc<dyn Gate>,
    /// By which peers prove themselves that the gate does not know.
    pub admission: Admission,
    /// What names mean here.
    pub tags: Arc<dyn TagSource>,
    /// Counters.
    pub metrics: Metrics,
    /// Folder in which the view is kept over a restart; `None`: nowhere.
    pub keep: Option<PathBuf>,
    /// Whom of the members that a view on disk has this node dials first; `None`: anyone.
    pub first: Option<First>,
}

/// Chooses whom to dial first.
pub type First = Box<dyn Fn(Vec<Member>) -> Vec<PeerId> + Send + Sync>;

/// Why the network did not start. What is wrong outside the process (an address in use, no route) is never the
/// reason: that is retried for ever and shown in the status.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the network: {0}")]
pub struct SpawnError(String);

/// Owns the running network: dropping it ends the task and closes every connection.
pub struct Swarm {
    task: AbortOnDropHandle<()>,
    commands: mpsc::Sender<Command>,
}

/// A handle to the running network; cheap to clone.
#[derive(Clone)]
pub struct SwarmNetwork {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

impl Swarm {
    /// Starts the network. Must be called within a tokio runtime.
    pub fn spawn(
        identity: &Identity,
        config: &Config,
        announcement: &Announcement,
        parts: Parts,
    ) -> Result<(Self, SwarmNetwork), SpawnError> {
        Self::spawn_with(identity, config, announcement, parts, Arc::new(SystemNames))
    }

    fn spawn_with(
        identity: &Identity,
        config: &Config,
        announcement: &Announcement,
        parts: Parts,
        names: Arc<dyn Names>,
    ) -> Result<(Self, SwarmNetwork), SpawnError> {
        let (gate, admission) = (Arc::clone(&parts.gate), parts.admission.clone());
        let shared = Arc::new(Shared::new(identity, gate, admission, Limits::default()));
        *shared.book() = Book::new(config);
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let driver = Driver::new(identity, config, announcement, parts, Arc::clone(&shared), names)
            .map_err(SpawnError)?;
        let task = AbortOnDropHandle::new(tokio::spawn(driver.run(receiver)));
        Ok((Self { task, commands: commands.clone() }, SwarmNetwork { shared, commands }))
    }

    /// Tells the peers that this node goes away, waits up to a second until they know, and ends.
    pub async fn shutdown(self) {
        let farewell = async {
            if self.commands.send(Command::Shutdown).await.is_ok() {
                // An error is a driver that has ended already.
                let _ = self.task.await;
            }
        };
        // Too late: dropping the task closes the connections, which the peers see as well.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

impl SwarmNetwork {
    /// This node's peer ID.
    pub fn peer_id(&self) -> &PeerId {
        &self.shared.id
    }

    /// Whether the task of the network runs: until [`Swarm::shutdown`], or a panic.
    pub fn is_running(&self) -> bool {
        !self.commands.is_closed()
    }

    /// Peers that said who they are.
    pub fn known_peers(&self) -> Vec<KnownPeer> {
        self.shared.known_peers()
    }

    /// What a peer said of itself that is or was connected.
    pub fn known_peer(&self, id: &PeerId) -> Option<Arc<Peer>> {
        self.shared.peers().get(id).and_then(|known| known.peer.clone())
    }

    /// The gate's answers have changed: closes connections that it allows no more, and tells and believes the rest
    /// as it says now. Reads of the view obey the gate at once even without this.
    pub fn recheck(&self) {
        self.shared.order(|orders| orders.recheck = true);
    }

    /// Live members that the gate lets take part, this node included, in no order.
    pub fn members(&self) -> Vec<Member> {
        self.shared.members(false)
    }

    /// Changes whenever another answer of [`Self::members`] is possible.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Whether what nobody here holds nobody holds, and who is not here is nowhere: a neighbour's whole view was taken.
    pub fn is_complete(&self) -> bool {
        self.shared.view().gossip.is_complete()
    }

    /// Tells all members what this node says of itself. To be changed seldom: it makes a new record.
    pub fn set_facts(&self, facts: Facts) {
        self.shared.order(|orders| orders.facts = Some(facts));
    }

    /// Tells all members that this node is in that zone; empty: unknown.
    pub fn set_zone(&self, zone: &str) {
        self.shared.order(|orders| orders.zone = Some(zone.to_owned()));
    }

    /// Whom this node dials first when it has no neighbour.
    pub fn dial_first(&self, peers: &[PeerId]) {
        self.shared.dial_first(peers);
    }

    /// Signed records of those of these members that live, in their order, as [`Self::hint`] takes them elsewhere.
    pub fn records(&self, peers: &[PeerId]) -> Vec<Vec<u8>> {
        self.shared.signed(peers).iter().map(|record| record.to_vec()).collect()
    }

    /// Somebody who cannot be trusted says that these are there: who has no neighbour may dial some of them. The last word counts.
    pub fn hint(&self, records: &[Vec<u8>]) {
        self.shared.hint(records);
    }

    /// Whether the last word named somebody who may be dialled.
    pub fn is_hinted(&self) -> bool {
        self.shared.book().has_somebody()
    }

    /// What this node makes of its view: hashes of the candidates of elections and of who leads. Neighbours are told when views
    /// are compared.
    pub fn set_opinion(&self, candidates: u32, leaders: u32) {
        self.shared.view_mut().gossip.set_opinion(candidates, leaders);
    }

    /// What each neighbour that has compared made of its view then.
    pub fn opinions(&self) -> Vec<(u32, u32)> {
        self.shared.view().gossip.opinions().collect()
    }

    /// The same where its answers changed about these peers only.
    pub fn recheck_peers(&self, peers: impl IntoIterator<Item = PeerId>) {
        self.shared.order(|orders| orders.recheck_peers.extend(peers));
    }

    /// Replaces the configured peers and service names. Connections that stay allowed stay up.
    pub fn set_peers(&self, peers: Vec<PeerConfig>, dns: Vec<String>) {
        self.shared.order(|orders| {
            orders.configure = Some((peers, dns));
            orders.recheck = true;
        });
    }
}

impl SwarmNetwork {
    async fn ask<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, ResolveError>>,
        limit: Duration,
    ) -> Result<T, ResolveError> {
        self.commands.try_send(command).map_err(|error| {
            ResolveError::Unreachable(match error {
                mpsc::error::TrySendError::Full(_) => "too many questions wait".into(),
                mpsc::error::TrySendError::Closed(_) => "the network has stopped".into(),
            })
        })?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ResolveError::Unreachable("the network has stopped".into())),
            Err(_) => Err(ResolveError::Timeout),
        }
    }
}

#[async_trait]
impl Network for SwarmNetwork {
    fn holders(&self, digest: &Digest) -> Vec<Arc<Peer>> {
        self.shared.holders(digest)
    }

    async fn find(&self, digest: &Digest, limit: Duration) -> Vec<Arc<Peer>> {
        let here = self.shared.holders(digest);
        if !here.is_empty() || self.shared.view().gossip.is_complete() {
            return here;
        }
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Find { digest: *digest, reply }, answer, limit).await.unwrap_or_default()
    }

    fn tag_peers(&self) -> Vec<Arc<Peer>> {
        self.shared.tag_peers()
    }

    fn advertise(&self, change: Advertisement) {
        self.shared.advertise(change);
    }

    async fn resolve(
        &self,
        peer: &PeerId,
        question: &TagQuestion,
        limit: Duration,
    ) -> Result<Option<Tagged>, ResolveError> {
        if !self.shared.gate.allows(peer, Action::Tags) {
            return Err(ResolveError::Denied);
        }
        let (reply, answer) = oneshot::channel();
        let question = Question::Tag(question.clone());
        self.ask(Command::Ask { peer: peer.clone(), question, reply: Reply::Tag(reply) }, answer, limit).await
    }

    fn status(&self) -> Status {
        self.shared.status()
    }
}

#[cfg(test)]
mod tests;
