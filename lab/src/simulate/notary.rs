//! Records of simulated members: of real size, signed with zeros, and read once for all nodes.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use peili::network::gossip::record::{Notary, Record, RecordError, Suspicion};

/// Length of an Ed25519 signature, of a libp2p identity, and of a certificate of membership.
const SIGNATURE: usize = 64;
const IDENTITY: usize = 38;
const CERTIFICATE: usize = 120;
/// Bytes of facts without labels.
const FACTS: usize = 26;

/// All that was ever signed.
#[derive(Default)]
pub(super) struct Registry {
    records: Mutex<HashMap<Bytes, Arc<Record>>>,
    suspicions: Mutex<HashMap<Bytes, Arc<Suspicion>>>,
}

/// Signs for one member.
pub(super) struct Signer {
    pub(super) registry: Arc<Registry>,
    pub(super) key: u64,
}

/// The record of a member as those of a cloud's nodes are.
pub(super) fn draft(key: u64) -> Record {
    let ip = Ipv4Addr::from((10 << 24) | ((key >> 40) as u32 & 0x00ff_ffff));
    Record {
        key,
        identity: vec![1; IDENTITY].into(),
        seq: 1_790_000_000,
        process: key,
        node: format!("ip-{}.eu-central-1.compute.internal", ip.to_string().replace('.', "-")),
        zone: "eu-central-1a".into(),
        version: "0.1.0".into(),
        control: vec![(ip, 5001).into()],
        transfer: vec![(ip, 5002).into()],
        certificate: vec![2; CERTIFICATE].into(),
        facts: vec![2; FACTS].into(),
        ..Record::default()
    }
}

impl Notary for Signer {
    fn seal(&self, record: Record) -> Arc<Record> {
        let body = record.body();
        let record = Arc::new(record.sealed(body, vec![0; SIGNATURE]));
        let mut records = self.registry.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.insert(record.signed.clone(), Arc::clone(&record));
        record
    }

    fn open(&self, signed: &Bytes) -> Result<Arc<Record>, RecordError> {
        let records = self.registry.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.get(signed).cloned().ok_or(RecordError::Signature)
    }

    fn accuse(&self, subject: u64, seq: u64) -> Arc<Suspicion> {
        let suspicion = Arc::new(Suspicion::sealed(subject, seq, self.key, vec![0; SIGNATURE]));
        let mut suspicions = self.registry.suspicions.lock().unwrap_or_else(PoisonError::into_inner);
        suspicions.insert(suspicion.signed.clone(), Arc::clone(&suspicion));
        suspicion
    }

    fn hear(&self, signed: &Bytes, _: &dyn Fn(u64) -> Option<Bytes>) -> Result<Arc<Suspicion>, RecordError> {
        let suspicions = self.registry.suspicions.lock().unwrap_or_else(PoisonError::into_inner);
        suspicions.get(signed).cloned().ok_or(RecordError::Signature)
    }
}
