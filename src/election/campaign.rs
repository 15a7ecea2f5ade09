//! Who stands for the strict role, in which order, and when whoever leads makes room. It can delay a leader, and make none.

use std::time::Duration;

use super::lease::{Ms, Standing};
use super::members::{Member, View};
use super::rendezvous;
use super::roles::Role;
use super::seats::{BEST_FOR, Seats};
use super::strict::Cause;
use super::table::Held;
use crate::oci::{Digest, PeerId};
use crate::policy::election::{Handover, Ranked, Reachability, Tenure};

/// Nodes that may take the lease: the load of the API server does not grow with the cluster.
pub(super) const CANDIDATES: usize = 5;
/// All others together ask the API server about once a second, and each at most so often.
const OBSERVER: Ms = 30_000;
/// Members of which a lease is believed to have so many: whoever may write it could otherwise have all ask never again.
const BELIEVED: usize = 10_000;
/// Where nodes cannot see each other and nobody holds the lease, twice as many stand after each such time.
const MORE: Duration = Duration::from_secs(30);

/// How the lease stands, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    /// It has been healthy for long enough.
    pub relied_on: bool,
    /// Why not.
    pub cause: Cause,
    /// Which member holds it.
    pub holder: Option<PeerId>,
    /// For how long it has, as far as this node has seen.
    pub tenure: Duration,
    /// How many members the holder sees, by what anybody may have written.
    pub members: u32,
    /// For how long nobody has held it, as far as this node knows.
    pub free: Duration,
    /// How long a record holds.
    pub duration: Duration,
}

/// The candidates, over time.
#[derive(Default)]
pub(super) struct Campaign {
    seats: Seats,
    /// Since when another candidate has been better than this node, which leads.
    bettered: Option<Duration>,
    yields: bool,
}

impl Lease {
    /// As policies are told.
    pub(super) fn tenure(&self, view: &View) -> Option<Tenure> {
        let candidate = view.place(self.holder.as_ref()?)?;
        Some(Tenure { candidate, duration: self.tenure })
    }
}

impl Campaign {
    /// Puts the candidates into `held`, the best first. Returns when to look again.
    #[expect(clippy::too_many_arguments, reason = "what an evaluation has at hand, taken apart nowhere else")]
    pub(super) fn take(
        &mut self,
        view: &View,
        here: &PeerId,
        held: &mut Held,
        lease: &Lease,
        asked: &Ranked,
        now: Duration,
        settled: bool,
    ) -> Option<Duration> {
        let weighed: Vec<(u64, u32)> = view.marks.iter().copied().zip(held.weights.iter().copied()).collect();
        let order = rendezvous::ranked(&weighed, rendezvous::key(Role::Coordinator.name(), b""));
        let order: Vec<PeerId> =
            order.iter().filter_map(|place| Some(view.members.get(*place as usize)?.id.clone())).collect();
        let best = order.get(..CANDIDATES.min(order.len())).unwrap_or_default();
        let (seats, wait) = self.seats.take(best, now, Duration::ZERO, settled, |id| {
            view.place(id).is_some_and(|place| held.weights[place] > 0)
        });
        let rank = |id: &PeerId| order.iter().position(|other| other == id);
        let mut places: Vec<(Option<usize>, usize)> =
            seats.iter().filter_map(|id| Some((rank(id), view.place(id)?))).collect();
        places.sort_unstable();
        held.seats = places.into_iter().map(|(_, place)| place).collect();

        let leads = lease.holder.as_ref() == Some(here);
        let place = view.place(here);
        if let Some(place) =
            place.filter(|place| leads && held.weights[*place] > 0 && !held.seats.contains(place))
        {
            // When it goes is for policies to say, and not for its seat.
            held.seats.push(place);
        }
        // One that cannot lead is no better one.
        let can = |seat: &&usize| Some(**seat) == place || reaches(&view.members[**seat]);
        let is_best = held.seats.iter().find(can).copied() == place;
        let patience = match asked.handover {
            None | Some(Handover::Never) => None,
            Some(Handover::Idle) => Some(2 * lease.duration),
            Some(Handover::Now) => Some(BEST_FOR),
        };
        let Some(patience) = patience.filter(|_| leads && !is_best) else {
            self.bettered = None;
            self.yields = false;
            return wait;
        };
        let since = *self.bettered.get_or_insert(now);
        let served = asked.min_tenure.unwrap_or_default().saturating_sub(lease.tenure);
        let at = (since + patience).max(now + served);
        self.yields = now >= at;
        wait.into_iter().chain((!self.yields).then_some(at)).min()
    }

    /// This node leads, and another one has been better for long enough.
    pub(super) fn yields(&self) -> bool {
        self.yields
    }

    /// The part of this node. `known`: nodes that are said to be there.
    pub(super) fn standing(
        &self,
        view: &View,
        here: &PeerId,
        held: &[usize],
        lease: &Lease,
        known: usize,
    ) -> Standing {
        let said = usize::try_from(lease.members).unwrap_or(usize::MAX);
        let said = if view.members.len() <= 1 { said.max(known) } else { said };
        let members = view.members.len().max(said.min(BELIEVED));
        let pause = OBSERVER.max((members as Ms).saturating_mul(1_000));
        if view.members.len() <= 1 && members > 1 {
            // The others are there and cannot be asked, and each of them sees the same: every one draws whether it stands, so that about five do, and more if these are not there.
            let draw = draw(here);
            let doublings = u32::try_from(lease.free.as_secs() / MORE.as_secs()).unwrap_or(u32::MAX).min(16);
            let stands = draw % (members as u64) < (CANDIDATES as u64) << doublings;
            let rank = u32::try_from((draw >> 32) % CANDIDATES as u64).unwrap_or(0);
            return if stands { Standing::Candidate(rank) } else { Standing::Observer(pause) };
        }
        let place = view.place(here);
        if view.members.len() <= 1 && lease.holder.as_ref().is_some_and(|holder| holder != here) {
            // There are others, of whom this node knows nothing: they may be many, and each sees as much.
            return Standing::Observer(pause);
        }
        match held.iter().position(|seat| Some(*seat) == place) {
            Some(rank) => Standing::Candidate(u32::try_from(rank).unwrap_or(u32::MAX)),
            None => Standing::Observer(pause),
        }
    }
}

/// Whether a member does not say that it cannot reach the API server.
pub(super) fn reaches(member: &Member) -> bool {
    member.facts.api_server != Reachability::Unreachable
}

fn draw(here: &PeerId) -> u64 {
    let digest = Digest::sha256(format!("stands {here}").as_bytes());
    u64::from_be_bytes(*digest.as_bytes().first_chunk().unwrap_or(&[0; 8]))
}
