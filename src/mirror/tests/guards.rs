//! Ways around what is kept: a size that is a lie, a private manifest asked for by other doors.

use async_trait::async_trait;

use super::*;
use crate::transfer::{self, Segment};

/// A peer that says its content is larger than it is.
struct Larger(Serve);

#[async_trait]
impl transfer::Source for Larger {
    async fn open(
        &self,
        peer: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> io::Result<Option<Segment>> {
        let segment = self.0.open(peer, digest, start, length).await?;
        Ok(segment.map(|mut segment| {
            segment.descriptor.size += 1 << 40;
            segment
        }))
    }
}

#[tokio::test]
async fn content_of_a_size_that_its_manifest_does_not_name_is_not_taken() {
    let lab = Lab::new(2);
    let (artifact, layer, bytes) = image("library/app", 6 * MIB);
    lab.hold(0, &artifact);
    lab.hold(1, &artifact);
    let gate = Arc::new(PinnedTrust::new(trust::Config::default(), [lab.id.clone()]).unwrap());
    let settings = Settings::new(&Config::default(), false).unwrap();
    let serve = Serve::new(&settings, lab.holders[0].store.clone(), gate.clone(), Metrics::default());
    lab.transfer.add(lab.holders[0].id.clone(), Arc::new(Larger(serve)), gate, 64);
    // The manifest says the size; it comes from the honest one, since the other one's has a wrong size itself.
    let manifest = lab.manifest("library/app", artifact.target.digest).await;
    assert!(manifest.is_ok());
    let answer = lab.open(&layer, None).await.unwrap();
    assert_eq!(answer.descriptor.size, 6 * MIB as u64);
    assert!(read(answer).await.unwrap() == bytes);
    assert!(lab.conduct(0).misses > 0 && !lab.conduct(0).suspected);
}

#[tokio::test]
async fn a_private_manifest_is_no_blob_and_no_other_name_opens_it() {
    let lab = Lab::with(1, &Config { private: vec!["registry.test/team/**".into()], ..Config::default() });
    let (artifact, layer, _) = image("team/app", 10);
    lab.store.put(&artifact);
    lab.store.put(&Artifact { name: "registry.test/library/app:v1".into(), ..artifact.clone() });
    let manifest = artifact.target.digest;
    let private = Refusal::NotHere(NotHere::Private);
    // `open` asks under `library/app`.
    assert_eq!(lab.open(&manifest, None).await.map(drop).unwrap_err(), private);
    assert_eq!(lab.manifest("library/app", manifest).await.map(drop).unwrap_err(), private);
    assert_eq!(lab.manifest("team/app", manifest).await.map(drop).unwrap_err(), private);
    assert!(lab.open(&layer, None).await.is_ok());
}
