//! Signs this node's records with its identity, and judges those of others: by their signature, their certificate and the gate.

use std::sync::Arc;

use bytes::Bytes;
use libp2p::PeerId as P2pId;
use libp2p::identity::{Keypair, PublicKey};

use super::super::gossip::Key;
use super::super::gossip::record::{Notary, Record, RecordError, Suspicion};
use crate::network::Peer;
use crate::network::admission::Admission;
use crate::network::identity::peer_id;
use crate::oci::{Action, Digest, Gate};

/// What a signature is for comes before what is signed, so that none can be used for something else.
const RECORD: &[u8] = b"peili gossip record 1\n";
const SUSPICION: &[u8] = b"peili gossip suspicion 1\n";

/// The notary of a node.
pub(super) struct Keeper {
    keypair: Keypair,
    key: Key,
    admission: Admission,
    gate: Arc<dyn Gate>,
}

impl Keeper {
    pub(super) fn new(keypair: Keypair, admission: Admission, gate: Arc<dyn Gate>) -> Self {
        let key = member_key(&keypair.public().to_peer_id());
        Self { keypair, key, admission, gate }
    }

    fn sign(&self, purpose: &[u8], body: &[u8]) -> Vec<u8> {
        // An ed25519 key signs whatever it is given.
        self.keypair.sign(&[purpose, body].concat()).unwrap_or_default()
    }
}

impl Notary for Keeper {
    fn seal(&self, record: Record) -> Arc<Record> {
        let body = record.body();
        let signature = self.sign(RECORD, &body);
        Arc::new(record.sealed(body, signature))
    }

    fn open(&self, signed: &Bytes) -> Result<Arc<Record>, RecordError> {
        let (mut record, parts) = Record::parse(signed)?;
        let identity = identity(&record.identity)?;
        let id = peer_id(&identity).ok_or(RecordError::Field("identity"))?;
        record.key = member_key(&identity);
        if record.key == self.key {
            // Its own, of an earlier life or from another's mouth: nobody's leave is needed.
            verify(&identity, RECORD, &parts.body, &parts.signature)?;
            return Ok(Arc::new(record));
        }
        if !self.gate.allows(&id, Action::Connect) {
            return Err(RecordError::Admission(format!("peer {id} is not trusted")));
        }
        verify(&identity, RECORD, &parts.body, &parts.signature)?;
        let unproved = self.gate.is_unproved(&id);
        if self.admission.by_key() && (unproved || !record.certificate.is_empty()) {
            let judged = self.admission.admit(&id, &record.certificate);
            if unproved {
                judged.map_err(|refused| RecordError::Admission(format!("peer {id}: {refused}")))?;
            }
        }
        Ok(Arc::new(record))
    }

    fn accuse(&self, subject: Key, seq: u64) -> Arc<Suspicion> {
        let signature = self.sign(SUSPICION, &Suspicion::body(subject, seq, self.key));
        Arc::new(Suspicion::sealed(subject, seq, self.key, signature))
    }

    fn hear(&self, signed: &Bytes, of: &dyn Fn(Key) -> Option<Bytes>) -> Result<Arc<Suspicion>, RecordError> {
        let (suspicion, parts) = Suspicion::parse(signed)?;
        let accuser = of(suspicion.accuser).ok_or(RecordError::Field("accuser"))?;
        verify(&identity(&accuser)?, SUSPICION, &parts.body, &parts.signature)?;
        Ok(Arc::new(suspicion))
    }
}

/// The key of a member.
pub(super) fn member_key(peer: &P2pId) -> Key {
    content_key(&Digest::sha256(&peer.to_bytes()))
}

/// The key of a content.
pub(super) fn content_key(digest: &Digest) -> Key {
    digest.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The identity in a record.
pub(super) fn identity(bytes: &Bytes) -> Result<P2pId, RecordError> {
    P2pId::from_bytes(bytes).map_err(|_| RecordError::Field("identity"))
}

/// A member as the rest of the program knows it.
pub(super) fn peer(record: &Record) -> Option<Arc<Peer>> {
    Some(Arc::new(Peer {
        id: peer_id(&identity(&record.identity).ok()?)?,
        transfer: record.transfer.clone(),
        node: record.node.clone(),
        zone: record.zone.clone(),
        version: record.version.clone(),
    }))
}

/// The public key of an ed25519 identity is in it.
fn verify(peer: &P2pId, purpose: &[u8], body: &[u8], signature: &[u8]) -> Result<(), RecordError> {
    /// The multihash that leaves bytes as they are.
    const IDENTITY: u64 = 0;
    let multihash = peer.as_ref();
    let key = (multihash.code() == IDENTITY).then(|| PublicKey::try_decode_protobuf(multihash.digest()));
    let Some(Ok(key)) = key else { return Err(RecordError::Field("identity")) };
    if key.verify(&[purpose, body].concat(), signature) { Ok(()) } else { Err(RecordError::Signature) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::conformance::TestGate;
    use crate::network::identity::Identity;
    use crate::oci::Level;

    fn keeper(gate: &Arc<TestGate>) -> (Keeper, Record) {
        let identity = Identity::generate();
        let keeper = Keeper::new(identity.keypair().clone(), Admission::off(), Arc::clone(gate) as _);
        let bytes = identity.keypair().public().to_peer_id().to_bytes().into();
        (keeper, Record { key: 0, identity: bytes, seq: 1, ..Record::default() })
    }

    #[test]
    fn records_are_signed_by_whom_they_are_about() {
        let gate = Arc::new(TestGate::default());
        let ((one, record), (other, _)) = (keeper(&gate), keeper(&gate));
        let sealed = one.seal(record.clone());
        assert_eq!(other.open(&sealed.signed).unwrap().key, one.key);
        let forged = other.seal(record);
        assert!(matches!(one.open(&forged.signed), Err(RecordError::Signature)));
        let mut changed = sealed.signed.to_vec();
        let last = changed.len() - 1;
        changed[last] ^= 1;
        assert!(one.open(&changed.into()).is_err());
    }

    #[test]
    fn records_of_whom_the_gate_refuses_are_not_believed() {
        let gate = Arc::new(TestGate::default());
        let ((one, record), (other, _)) = (keeper(&gate), keeper(&gate));
        let sealed = one.seal(record);
        gate.set(&peer(&sealed).unwrap().id, Level::None);
        assert!(matches!(other.open(&sealed.signed), Err(RecordError::Admission(_))));
    }

    #[test]
    fn a_suspicion_is_its_accusers() {
        let gate = Arc::new(TestGate::default());
        let ((one, record), (other, others)) = (keeper(&gate), keeper(&gate));
        let said = one.accuse(5, 6);
        let of = |bytes: Bytes| move |key| (key == one.key).then(|| bytes.clone());
        assert_eq!(*other.hear(&said.signed, &of(record.identity.clone())).unwrap(), *said);
        assert!(other.hear(&said.signed, &of(others.identity)).is_err());
        assert!(other.hear(&said.signed, &|_| None).is_err());
    }

    #[test]
    fn a_signature_for_one_thing_is_none_for_another() {
        let gate = Arc::new(TestGate::default());
        let (one, record) = keeper(&gate);
        let body = record.body();
        let signature = one.sign(SUSPICION, &body);
        let sealed = record.sealed(body, signature);
        assert!(matches!(one.open(&sealed.signed), Err(RecordError::Signature)));
    }
}
