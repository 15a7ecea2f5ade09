//! Who says what a tag means.

use super::*;

fn outcome(answer: Result<Answer, Refusal>) -> Result<Digest, Refusal> {
    answer.map(|answer| answer.descriptor.digest)
}

fn registry() -> crate::oci::Registry {
    "registry.test".parse().unwrap()
}

#[tokio::test]
async fn a_registry_that_answers_is_the_one_to_ask() {
    let lab = Lab::new(1);
    let (artifact, _, _) = image("library/app", 10);
    lab.hold(0, &artifact);
    lab.store.put(&artifact);
    lab.upstream.set(&registry(), true);
    let refusal = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::TagUpstream));
}

#[tokio::test]
async fn peers_answer_for_a_registry_that_does_not() {
    let lab = Lab::new(2);
    let (artifact, _, _) = image("library/app", 10);
    let unknown = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
    assert_eq!(unknown, Refusal::NotHere(NotHere::Unknown));
    lab.hold(1, &artifact);
    assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
    let unknown = outcome(lab.manifest("library/app", "v2").await).unwrap_err();
    assert_eq!(unknown, Refusal::NotHere(NotHere::Unknown));
}

#[tokio::test]
async fn a_disputed_tag_is_refused() {
    let lab = Lab::new(2);
    let (artifact, _, _) = image("library/app", 10);
    let other = Artifact::image("registry.test/library/app:v1", &[b"another"]);
    lab.hold(0, &artifact);
    lab.hold(1, &other);
    let disputed = Refusal::NotHere(NotHere::TagDisputed);
    assert_eq!(outcome(lab.manifest("library/app", "v1").await), Err(disputed.clone()));
    // This node has a say too.
    let lab = Lab::new(1);
    lab.hold(0, &artifact);
    lab.store.put(&other);
    assert_eq!(outcome(lab.manifest("library/app", "v1").await), Err(disputed));
}

#[tokio::test]
async fn configured_tags_are_asked_of_peers_first() {
    let config = Config { tags_peers_first: vec!["registry.test/library/*".into()], ..Config::default() };
    let lab = Lab::with(1, &config);
    let (artifact, _, _) = image("library/app", 10);
    let (other, _, _) = image("team/app", 10);
    lab.hold(0, &artifact);
    lab.hold(0, &other);
    lab.upstream.set(&registry(), true);
    assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
    let refusal = outcome(lab.manifest("team/app", "v1").await).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::TagUpstream));
}

/// The one node that knows a tag is found among more peers than are asked at once.
#[tokio::test]
async fn one_of_many_peers_knows_a_tag() {
    let lab = Lab::new(40);
    let (artifact, _, _) = image("library/app", 10);
    lab.hold(39, &artifact);
    for _ in 0..5 {
        assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
    }
}
