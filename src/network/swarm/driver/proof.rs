//! Peers that must prove to be members first: what they are told until then, and what becomes of what they show.
//!
//! ```text
//!   connected --> introduction: this node's certificate, and nothing else
//!   its hello, with its certificate --admitted--> our whole hello, the gossip, tags
//!                                   --refused---> denied; the doorkeeper closes the connection in time
//! ```

use std::net::IpAddr;
use std::time::Duration;

use libp2p::PeerId as P2pId;
use tokio::time::Instant;

use super::super::message::{Hello, Message};
use super::super::view::{Shared, Subject};
use super::{Driver, Flight, Link, REFUSED_LIMIT};
use crate::network::metrics::{Refused, RefusedLabels};
use crate::oci::{Action, PeerId};

/// Between two judgements of what one connection shows: half of what a refused peer waits, and a signature costs.
const JUDGEMENT: Duration = Duration::from_millis(500);

impl Driver {
    /// Whether `peer` may say `request`: it is a member, or becomes one by the certificate in it.
    pub(super) fn hears(&mut self, peer: P2pId, request: &Message) -> bool {
        let Some(link) = self.links.get(&peer) else { return false };
        let (id, from) = (link.id.clone(), link.ip());
        let (gate, admission) = (&self.shared.gate, &self.shared.admission);
        let unproved = gate.is_unproved(&id);
        if unproved && link.refused.is_some_and(|refused| refused.elapsed() < JUDGEMENT) {
            return false;
        }
        let judged = match request {
            Message::Hello(hello) if admission.by_key() && (unproved || !hello.certificate.is_empty()) => {
                admission.admit(&id, &hello.certificate)
            }
            _ => Ok(()),
        };
        let member = gate.allows(&id, Action::Connect) && !gate.is_unproved(&id);
        if let Some(link) = self.links.get_mut(&peer) {
            link.proved |= member;
            if judged.is_err() {
                link.refused = Some(Instant::now());
            }
        }
        match judged {
            Err(refused) if member => {
                let text = format!("peer {id} is trusted still, but {refused}");
                self.shared.problem(Subject::Certificate(id), Some(text));
            }
            Err(refused) => self.show_refused(&id, from, &refused.to_string()),
            Ok(()) if member && matches!(request, Message::Hello(_)) => {
                self.shared.problem(Subject::Certificate(id.clone()), None);
                self.forget_refused(&id);
            }
            Ok(()) => {}
        }
        member
    }

    /// A peer does not take this node for a member. Why is said there; what this node thinks of that peer says more.
    pub(super) fn not_admitted(&mut self, id: &PeerId, from: Option<IpAddr>) {
        if !self.refused.contains_key(id) {
            let at = from.map(|ip| format!(" at {ip}")).unwrap_or_default();
            let text = format!(
                "peer {id}{at} does not admit this node: its status says why; is the cluster key the same?"
            );
            self.note_refused(id, text);
        }
    }

    /// A peer was refused for this reason.
    pub(super) fn show_refused(&mut self, id: &PeerId, from: Option<IpAddr>, why: &str) {
        let at = from.map(|ip| format!(" at {ip}")).unwrap_or_default();
        self.note_refused(id, format!("peer {id}{at} was refused: {why}"));
    }

    /// A link is gone whose peer never proved itself; `refused`: it tried, and was told why not.
    pub(super) fn left_unproved(&mut self, id: &PeerId, from: Option<IpAddr>, refused: bool) {
        self.metrics.refused.get_or_create(&RefusedLabels { reason: Refused::Proof }).inc();
        if !refused {
            let why = "it came and showed no membership certificate: has it the cluster key?";
            self.show_refused(id, from, why);
        }
    }

    pub(super) fn forget_refused(&mut self, id: &PeerId) {
        if self.refused.remove(id).is_some() {
            self.shared.problem(Subject::Refused(id.clone()), None);
        }
    }

    fn note_refused(&mut self, id: &PeerId, text: String) {
        if self.refused.contains_key(id) || self.refused.len() < REFUSED_LIMIT {
            self.refused.insert(id.clone(), Instant::now());
            self.shared.problem(Subject::Refused(id.clone()), Some(text));
        }
    }
}

/// What an unproved peer is told: that this node is a member. `None`: it was told, or there is nothing to tell.
pub(super) fn introduction(shared: &Shared, link: &Link) -> Option<Message> {
    let certificate = shared.admission.own().filter(|_| !link.introduced)?;
    let certificate = certificate.to_vec();
    Some(Message::Hello(Hello { certificate, introduction: true, ..Hello::default() }))
}

impl Link {
    /// What it was told of this node is no longer so.
    pub(super) fn greet_again(&mut self) {
        self.greeted = false;
        self.introduced = false;
        self.outdated = matches!(self.flight, Some((_, Flight::Hello | Flight::Introduction)));
    }

    /// The address at the other end of one of its connections.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        self.connections.values().flatten().next().copied()
    }
}
