//! Who stands for the strict role, in which order, and when whoever leads makes room. It can delay a leader, and make none.

use std::time::Duration;

use super::lease::{Ms, Standing};
use super::members::View;
use super::rendezvous;
use super::roles::Role;
use super::seats::{BEST_FOR, Seats};
use super::strict::Cause;
use super::table::Held;
use crate::oci::{Digest, PeerId};
use crate::policy::election::{Handover, Ranked, Tenure};

/// Nodes that may take the lease: the load of the API server does not grow with the cluster.
pub(super) const CANDIDATES: usize = 5;
/// All others together ask the API server about once a second, and each at most so often.
const OBSERVER: Ms = 30_000;

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
    /// How many members the holder sees.
    pub members: u32,
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
        let is_best = held.seats.first().copied() == view.place(here);
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
        let all = view.members.len().max(usize::try_from(lease.members).unwrap_or(usize::MAX));
        let members = all.max(if view.members.len() <= 1 { known } else { 0 });
        let pause = OBSERVER.max((members as Ms).saturating_mul(1_000));
        if view.members.len() <= 1 && members > 1 {
            // The others are there and cannot be asked, and each of them sees the same: every one draws whether it stands, so that about five do.
            let draw = draw(here);
            let stands = draw % (members as u64) < CANDIDATES as u64;
            let rank = u32::try_from((draw >> 32) % CANDIDATES as u64).unwrap_or(0);
            return if stands { Standing::Candidate(rank) } else { Standing::Observer(pause) };
        }
        let place = view.place(here);
        match held.iter().position(|seat| Some(*seat) == place) {
            Some(rank) => Standing::Candidate(u32::try_from(rank).unwrap_or(u32::MAX)),
            None => Standing::Observer(pause),
        }
    }
}

fn draw(here: &PeerId) -> u64 {
    let digest = Digest::sha256(format!("stands {here}").as_bytes());
    u64::from_be_bytes(*digest.as_bytes().first_chunk().unwrap_or(&[0; 8]))
}
