//! Ways around what is kept: a size that is a lie, a private manifest asked for by other doors.

use async_trait::async_trait;

use super::*;
use crate::oci::{Action, Level};
use crate::transfer::{self, Segment};

/// Trusts everybody, but for one thing.
struct Without(Action);

impl Gate for Without {
    fn level(&self, _: &PeerId, action: Action) -> Level {
        if action == self.0 { Level::None } else { Level::Tags }
    }

    fn serves(&self, _: &PeerId, _: &Name) -> bool {
        true
    }
}

/// Trusts everybody, but for one who is introduced only: it keeps its connection.
#[derive(Default)]
struct But(std::sync::Mutex<Option<PeerId>>);

impl Gate for But {
    fn level(&self, peer: &PeerId, _: Action) -> Level {
        if self.0.lock().unwrap().as_ref() == Some(peer) { Level::Introduce } else { Level::Tags }
    }

    fn serves(&self, _: &PeerId, _: &Name) -> bool {
        true
    }
}

/// A peer that says something else of what it gives.
struct Saying<F>(Serve, F);

#[async_trait]
impl<F: Fn(&mut Descriptor) + Send + Sync> transfer::Source for Saying<F> {
    async fn open(
        &self,
        peer: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> io::Result<Option<Segment>> {
        let segment = self.0.open(peer, digest, start, length).await?;
        Ok(segment.map(|mut segment| {
            self.1(&mut segment.descriptor);
            segment
        }))
    }
}

/// A node of two holders, the first of which lies about sizes.
fn with_larger(artifact: &Artifact, by: u64) -> Lab {
    let lab = Lab::new(2);
    lab.hold(0, artifact);
    lab.hold(1, artifact);
    first_says(&lab, move |descriptor| {
        if descriptor.size > MIB as u64 {
            descriptor.size += by;
        }
    });
    lab
}

/// The first holder keeps nothing back, and says this of what it gives.
fn first_says(lab: &Lab, says: impl Fn(&mut Descriptor) + Send + Sync + 'static) {
    let gate = Arc::new(PinnedTrust::new(trust::Config::default(), [lab.id.clone()]).unwrap());
    let settings = Settings::new(&Config::default(), false).unwrap();
    let store = lab.holders[0].store.clone();
    let serve = Serve::new(&settings, store, gate.clone(), nothing_of_tags(), Metrics::default());
    lab.transfer.add(lab.holders[0].id.clone(), Arc::new(Saying(serve, says)), gate, 64);
}

async fn the_honest_one_gives(lab: &Lab, layer: &Digest, bytes: &[u8]) {
    let answer = lab.open(layer, None).await.unwrap();
    assert_eq!(answer.descriptor.size, bytes.len() as u64);
    assert!(read(answer).await.unwrap() == bytes);
    assert!(lab.conduct(0).misses > 0 && !lab.conduct(0).suspected);
}

#[tokio::test]
async fn content_of_a_size_that_its_manifest_does_not_name_is_not_taken() {
    let (artifact, layer, bytes) = image("library/app", 6 * MIB);
    let lab = with_larger(&artifact, 1);
    let manifest = lab.manifest("library/app", artifact.target.digest).await;
    assert!(manifest.is_ok());
    the_honest_one_gives(&lab, &layer, &bytes).await;
}

#[tokio::test]
async fn content_of_an_absurd_size_is_not_taken_where_no_manifest_is_known() {
    let (artifact, layer, bytes) = image("library/app", 6 * MIB);
    the_honest_one_gives(&with_larger(&artifact, 1 << 40), &layer, &bytes).await;
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

/// The same where only a peer has it, to whom it is not private.
#[tokio::test]
async fn a_private_manifest_is_no_blob_of_peers() {
    let private = "registry.test/team/**".to_owned();
    let lab = Lab::with(1, &Config { private: vec![private], ..Config::default() });
    let (artifact, layer, _) = image("team/app", 10);
    lab.hold(0, &artifact);
    let ask = |digest| {
        lab.mirror.blob(BlobRequest { name: name("team/app"), digest, range: None, head: false }, LIMIT)
    };
    let kept_back = Refusal::NotHere(NotHere::Private);
    first_says(&lab, |_| {});
    assert_eq!(ask(artifact.target.digest).await.map(drop).unwrap_err(), kept_back);
    assert!(ask(layer).await.is_ok());
    // It is held there before the record that says what it is.
    first_says(&lab, |descriptor| *descriptor = Descriptor::new(descriptor.digest, descriptor.size, ""));
    assert_eq!(ask(artifact.target.digest).await.map(drop).unwrap_err(), kept_back);
}

/// Guards each place where the gate is asked here: the network, with a gate of its own, has let these peers through.
#[tokio::test]
async fn the_gate_is_asked_before_a_peer_is_and_before_it_is_told() {
    let (artifact, layer, _) = image("library/app", 10);
    let lab = |action| {
        let lab = Lab::gated(1, &Config::default(), Some(Arc::new(Without(action))));
        lab.hold(0, &artifact);
        lab
    };
    let fetch = lab(Action::Fetch);
    assert_eq!(fetch.refused(&layer).await.0, NotHere::Unknown);
    assert_eq!(fetch.asked(0), 0);

    let tags = lab(Action::Tags);
    let refusal = tags.manifest("library/app", "v1").await.map(drop).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::Unknown));
    assert!(tags.blob(&layer).await.is_ok());

    let settings = Settings::new(&Config::default(), false).unwrap();
    let gate = Arc::new(Without(Action::Tags));
    let serve =
        Serve::new(&settings, tags.holders[0].store.clone(), gate, nothing_of_tags(), Metrics::default());
    assert_eq!(serve.tag(&tags.id, &"registry.test/library/app:v1".parse().unwrap()), None);
}

/// Guards that who is trusted no more while it gives is left, and the rest comes from another one.
#[tokio::test]
async fn who_is_trusted_no_more_in_mid_body_is_left() {
    let (artifact, layer, bytes) = image("library/app", 8 * MIB);
    let gate = Arc::new(But::default());
    let lab = Lab::gated(2, &Config::default(), Some(gate.clone()));
    lab.hold(0, &artifact);
    lab.hold(1, &artifact);
    let mut body = lab.open(&layer, None).await.unwrap().body;
    let mut came = body.next().await.unwrap().unwrap().to_vec();
    let asked = [lab.asked(0), lab.asked(1)];
    let giver = usize::from(asked[1] > 0);
    assert_eq!((asked[giver], asked[1 - giver]), (1, 0), "it would give all of it");
    *gate.0.lock().unwrap() = Some(lab.holders[giver].id.clone());
    while let Some(chunk) = timeout(LIMIT, body.next()).await.unwrap() {
        came.extend_from_slice(&chunk.unwrap());
    }
    assert!(came == bytes);
    assert_eq!(lab.asked(giver), 1);
    assert!(lab.asked(1 - giver) > 0);
}
