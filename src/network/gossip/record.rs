//! What a member says of itself, signed: where it is reached, what it is, and that it may be here.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::wire::RECORD_LIMIT;
use crate::network::{claim, facts, versions};

/// A member's record, as it was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// See [`super::Key`].
    pub key: u64,
    /// The member's public key, in libp2p's encoding of peer IDs.
    pub identity: Bytes,
    /// Rises with each record of the member: seconds since 1970 at its start, then one more each time.
    pub seq: u64,
    /// A number of the process, by which two with one identity are told apart.
    pub process: u64,
    /// The member goes away.
    pub leaving: bool,
    /// The epoch of its inventory: a new one makes all that was told of the last one worth nothing.
    pub epoch: u32,
    /// Where its control plane is reached.
    pub control: Vec<SocketAddr>,
    /// Where its peer port is reached.
    pub transfer: Vec<SocketAddr>,
    /// Kubernetes node name; empty: unknown.
    pub node: String,
    /// Zone; empty: unknown.
    pub zone: String,
    /// Peili's version.
    pub version: String,
    /// Proof of membership; empty: none.
    pub certificate: Bytes,
    /// What it says of itself besides, as [`facts::Facts`] are written; empty: nothing.
    pub facts: Bytes,
    /// The record and its signature as they travel.
    pub signed: Bytes,
}

/// That a member is silent, by the word of one of its neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Who is silent.
    pub subject: u64,
    /// The record that the silence is about: a later one refutes it.
    pub seq: u64,
    /// Who says so.
    pub accuser: u64,
    /// The suspicion and its signature as they travel.
    pub signed: Bytes,
}

/// Signs for this node, and checks what others have signed.
pub trait Notary {
    /// Signs a record of this node; fills in `signed`.
    fn seal(&self, record: Record) -> Arc<Record>;
    /// Reads a record, and checks its signature and its proof of membership.
    fn open(&self, signed: &Bytes) -> Result<Arc<Record>, RecordError>;
    /// Signs a suspicion of this node.
    fn accuse(&self, subject: u64, seq: u64) -> Arc<Suspicion>;
    /// Reads a suspicion. Its signature is that of `accuser`, whom `identity` finds.
    fn hear(
        &self,
        signed: &Bytes,
        identity: &dyn Fn(u64) -> Option<Bytes>,
    ) -> Result<Arc<Suspicion>, RecordError>;
}

/// A record or a suspicion that is not believed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("not a record: {0}")]
    Encoding(#[from] prost::DecodeError),
    /// A field is too long, or not what it should be.
    #[error("`{0}` is not what it should be")]
    Field(&'static str),
    /// Whoever signed it was not who it is about.
    #[error("the signature is wrong")]
    Signature,
    /// Its member may not be here.
    #[error("{0}")]
    Admission(String),
}

/// Body and signature, as they travel.
#[derive(Clone, PartialEq, Message)]
pub struct Signed {
    /// What is signed.
    #[prost(bytes = "bytes", tag = "1")]
    pub body: Bytes,
    /// Ed25519.
    #[prost(bytes = "bytes", tag = "2")]
    pub signature: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct RecordBody {
    #[prost(bytes = "bytes", tag = "1")]
    identity: Bytes,
    #[prost(uint64, tag = "2")]
    seq: u64,
    #[prost(fixed64, tag = "3")]
    process: u64,
    #[prost(bool, tag = "4")]
    leaving: bool,
    #[prost(uint32, tag = "5")]
    epoch: u32,
    #[prost(string, tag = "6")]
    control: String,
    #[prost(string, tag = "7")]
    transfer: String,
    #[prost(string, tag = "8")]
    node: String,
    #[prost(string, tag = "9")]
    zone: String,
    #[prost(string, tag = "10")]
    version: String,
    #[prost(bytes = "bytes", tag = "11")]
    certificate: Bytes,
    #[prost(bytes = "bytes", tag = "12")]
    facts: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct SuspicionBody {
    #[prost(fixed64, tag = "1")]
    subject: u64,
    #[prost(uint64, tag = "2")]
    seq: u64,
    #[prost(fixed64, tag = "3")]
    accuser: u64,
}

impl Record {
    /// What is signed of it.
    pub fn body(&self) -> Vec<u8> {
        let body = RecordBody {
            identity: self.identity.clone(),
            seq: self.seq,
            process: self.process,
            leaving: self.leaving,
            epoch: self.epoch,
            control: claim::join(&self.control),
            transfer: claim::join(&self.transfer),
            node: self.node.clone(),
            zone: self.zone.clone(),
            version: self.version.clone(),
            certificate: self.certificate.clone(),
            facts: self.facts.clone(),
        };
        versions::besides(body.encode_to_vec())
    }

    /// With its signature.
    pub fn sealed(mut self, body: Vec<u8>, signature: Vec<u8>) -> Self {
        self.signed = Signed { body: body.into(), signature: signature.into() }.encode_to_vec().into();
        self
    }

    /// Reads what was signed. Checks no signature; `key` is left to whoever does.
    pub fn parse(signed: &Bytes) -> Result<(Self, Signed), RecordError> {
        if signed.len() > RECORD_LIMIT {
            return Err(RecordError::Field("record"));
        }
        let parts = Signed::decode(signed.clone())?;
        let body = RecordBody::decode(parts.body.clone())?;
        if body.seq == 0 {
            return Err(RecordError::Field("seq"));
        }
        let text = |field, claimed| claim::text(claimed).ok_or(RecordError::Field(field));
        let addresses = |field, claimed: &str| claim::addresses(claimed).ok_or(RecordError::Field(field));
        let record = Self {
            key: 0,
            identity: body.identity,
            seq: body.seq,
            process: body.process,
            leaving: body.leaving,
            epoch: body.epoch,
            control: addresses("control", &body.control)?,
            transfer: addresses("transfer", &body.transfer)?,
            node: text("node", body.node)?,
            zone: text("zone", body.zone)?,
            version: text("version", body.version)?,
            certificate: body.certificate,
            facts: Some(body.facts)
                .filter(|facts| facts.len() <= facts::LIMIT)
                .ok_or(RecordError::Field("facts"))?,
            signed: signed.clone(),
        };
        Ok((record, parts))
    }
}

impl Suspicion {
    /// What is signed of it.
    pub fn body(subject: u64, seq: u64, accuser: u64) -> Vec<u8> {
        versions::besides(SuspicionBody { subject, seq, accuser }.encode_to_vec())
    }

    /// With its signature.
    pub fn sealed(subject: u64, seq: u64, accuser: u64, signature: Vec<u8>) -> Self {
        let body = Self::body(subject, seq, accuser).into();
        let signed = Signed { body, signature: signature.into() }.encode_to_vec().into();
        Self { subject, seq, accuser, signed }
    }

    /// Reads what was signed; checks no signature.
    pub fn parse(signed: &Bytes) -> Result<(Self, Signed), RecordError> {
        let parts = Signed::decode(signed.clone())?;
        let body = SuspicionBody::decode(parts.body.clone())?;
        let signed = signed.clone();
        Ok((Self { subject: body.subject, seq: body.seq, accuser: body.accuser, signed }, parts))
    }
}
