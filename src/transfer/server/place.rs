//! A connection's place among the others: while its peer has not proved to be a member that of a handshake, which is
//! short and gives way to newer ones; then one of its peer's own.

use std::sync::OnceLock;

use http::Request;
use tokio_util::sync::CancellationToken;

use super::connections::{Entry, Ticket};
use super::{PROOF_LIMIT, Shared};
use crate::oci::PeerId;
use crate::transfer::metrics::{Handshake, Metrics};
use crate::transfer::wire;

#[derive(Default)]
pub(super) struct Place {
    /// Empty: the peer is not proved yet; `None`: it is, and there is no place for it.
    entry: OnceLock<Option<Entry>>,
    entered: CancellationToken,
}

/// The peer is no member. It is not answered, as who is unknown where there is no cluster key.
#[derive(Debug, thiserror::Error)]
#[error("the peer has not proved to be a member of the cluster")]
pub(super) struct NoMember;

impl Place {
    /// Gives `peer` a place of its own; `false`: it has too many, or there are too many in all.
    pub(super) fn enter(&self, shared: &Shared, peer: &PeerId) -> bool {
        let entry = self.entry.get_or_init(|| {
            let entry = shared.connections.enter(peer);
            shared.metrics.handshake(if entry.is_some() { Handshake::Accepted } else { Handshake::Full });
            if entry.is_none() {
                tracing::debug!(%peer, "refused a connection: there are too many");
            }
            entry
        });
        self.entered.cancel();
        entry.is_some()
    }

    /// Takes the certificate that a request shows, and lets nobody pass who is no member then.
    pub(super) fn prove<B>(
        &self,
        shared: &Shared,
        peer: &PeerId,
        request: &Request<B>,
    ) -> Result<(), NoMember> {
        let certificate = wire::parse_certificate(request.headers());
        let unproved = shared.gate.is_unproved(peer);
        if (unproved || !certificate.is_empty())
            && shared.admission.by_key()
            && let Err(refused) = shared.admission.admit(peer, &certificate)
        {
            // Not louder: strangers decide how often. Its own control plane hears of it, or this node's.
            tracing::debug!(%peer, %refused, unproved, "a certificate was refused at the peer port");
        }
        if shared.gate.is_unproved(peer) {
            return Err(NoMember);
        }
        if self.enter(shared, peer) { Ok(()) } else { Err(NoMember) }
    }

    /// Returns when the connection has to be closed.
    pub(super) async fn closed(&self, ticket: Ticket) {
        tokio::select! {
            biased;
            () = self.entered.cancelled() => {}
            () = ticket.displaced() => return,
            () = tokio::time::sleep(PROOF_LIMIT) => return,
        }
        drop(ticket);
        if let Some(Some(entry)) = self.entry.get() {
            entry.closed().await;
        }
    }

    /// Counts who never got so far.
    pub(super) fn end(&self, peer: &PeerId, metrics: &Metrics) {
        if self.entry.get().is_none() {
            tracing::debug!(%peer, "refused a connection: the peer has not proved to be a member");
            metrics.handshake(Handshake::Denied);
        }
    }
}
