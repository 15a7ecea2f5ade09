//! Who says what a tag means.

use std::sync::OnceLock;
use std::time::SystemTime;

use super::plans::Says;
use super::*;
use crate::policy::registry::TagResolution;
use crate::upstream::FetchError;

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

/// Peers that know a tag for too long, or do not know for how long, do not answer where a plan limits its age.
#[tokio::test]
async fn what_is_too_old_is_not_told() {
    let hour = Duration::from_secs(3600);
    for resolution in [None, Some(TagResolution::Peers)] {
        let plan = Plan { max_tag_age: Some(hour), tag_resolution: resolution, ..Plan::default() };
        let lab = Lab::ruled(2, &Config::default(), None, Arc::new(Says(plan)));
        let (artifact, _, _) = image("library/app", 10);
        let name = tagged();
        lab.hold(0, &artifact);
        lab.hold(1, &artifact);
        let refusal = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
        assert_eq!(refusal, Refusal::NotHere(NotHere::TagTooOld), "nobody knows how old it is");
        let ago = |hours: u32| SystemTime::now() - hours * hour;
        lab.holders[0].tags.ages().resolved(&name, &artifact.target, ago(2));
        let refusal = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
        assert_eq!(refusal, Refusal::NotHere(NotHere::TagTooOld));
        // One that is young enough is enough, and another content that is older does not dispute it.
        let other = Artifact::image("registry.test/library/app:v1", &[b"another"]);
        lab.hold(0, &other);
        lab.holders[1].tags.ages().resolved(&name, &artifact.target, ago(0));
        assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
        // What was told is as old as it was there.
        let age = lab.tags.ages().of(&name, &artifact.target, SystemTime::now() + hour).unwrap();
        assert!(age >= hour && age < 2 * hour, "{age:?}");
        // A registry that answers is asked instead, but where peers are preferred.
        lab.upstream.set(&registry(), true);
        let answer = outcome(lab.manifest("library/app", "v1").await);
        match resolution {
            None => assert_eq!(answer, Err(Refusal::NotHere(NotHere::TagUpstream))),
            _ => assert!(answer.is_ok()),
        }
    }
}

/// What the runtime got from the registry after it was sent there is as old as that, and policies are told.
#[tokio::test]
async fn the_runtime_resolves_tags_too() {
    let lab = Lab::new(0);
    lab.upstream.set(&registry(), true);
    let (artifact, _, _) = image("library/app", 10);
    let refusal = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::TagUpstream));
    lab.store.put(&artifact);
    let later = SystemTime::now() + Duration::from_secs(60);
    let age = lab.tags.ages().of(&tagged(), &artifact.target, later).unwrap();
    assert!(age >= Duration::from_secs(60), "{age:?}");
}

fn tagged() -> Reference {
    "registry.test/library/app:v1".parse().unwrap()
}

/// A node and two others, of which the first is the home of all tags and the second its deputy, and an image at the registry.
fn at_home(plan: &Plan) -> (Lab, Artifact) {
    let homes: Arc<OnceLock<[PeerId; 2]>> = Arc::default();
    let says = || Arc::new(Says(plan.clone()));
    let known = Arc::new(Fixed(homes.clone()));
    let lab = Lab::built(2, &Config::default(), None, (says(), says()), known);
    homes.set([lab.holders[0].id.clone(), lab.holders[1].id.clone()]).unwrap();
    let (artifact, _, _) = image("library/app", 10);
    lab.upstream.tag(&tagged().name, &"v1".parse().unwrap(), Ok(artifact.target.clone()));
    lab.upstream.set(&registry(), true);
    // The content is somewhere, under another name.
    let elsewhere = Artifact { name: "registry.test/library/app:v0".into(), ..artifact.clone() };
    lab.hold(1, &elsewhere);
    (lab, artifact)
}

struct Fixed(Arc<OnceLock<[PeerId; 2]>>);

impl Homes for Fixed {
    fn home(&self, _: &[u8]) -> Home {
        Home::Peer(self.0.get().unwrap()[0].clone())
    }

    fn runner_up(&self, _: &[u8]) -> Home {
        Home::Peer(self.0.get().unwrap()[1].clone())
    }
}

fn home() -> Plan {
    Plan { tag_resolution: Some(TagResolution::Home), ..Plan::default() }
}

/// However many ask, the registry is asked once.
#[tokio::test]
async fn a_home_asks_once_for_all() {
    let (lab, artifact) = at_home(&home());
    let asked = (0..20).map(|_| lab.manifest("library/app", "v1"));
    for answer in futures::future::join_all(asked).await {
        assert_eq!(outcome(answer), Ok(artifact.target.digest));
    }
    assert_eq!(lab.upstream.resolved(), 1);
    assert!(
        lab.holders[0].tags.ages().within(&tagged(), Duration::from_secs(60), SystemTime::now()).is_some()
    );
}

/// One more, where the home is gone.
#[tokio::test]
async fn a_home_that_is_gone_costs_one_more() {
    let (lab, artifact) = at_home(&home());
    assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
    lab.hub.set_connected(&lab.holders[0].id, false);
    for _ in 0..5 {
        assert_eq!(outcome(lab.manifest("library/app", "v1").await), Ok(artifact.target.digest));
    }
    assert_eq!(lab.upstream.resolved(), 2);
}

/// A home that may not know says so, asks no more for a while, and the runtime goes there itself.
#[tokio::test]
async fn a_home_without_a_right_leaves_it_to_each() {
    let (lab, _) = at_home(&home());
    lab.upstream.tag(&tagged().name, &"v1".parse().unwrap(), Err(FetchError::Refused("401".into())));
    for _ in 0..5 {
        let refusal = outcome(lab.manifest("library/app", "v1").await).unwrap_err();
        assert_eq!(refusal, Refusal::NotHere(NotHere::TagUpstream));
    }
    assert_eq!(lab.upstream.resolved(), 1);
}

/// Peers cannot send a node anywhere that its own policies do not send it.
#[tokio::test]
async fn a_home_asks_only_by_its_own_plan() {
    let homes: Arc<OnceLock<[PeerId; 2]>> = Arc::default();
    let (asks, serves) = (Arc::new(Says(home())), Arc::new(Says(Plan::default())));
    let lab = Lab::built(2, &Config::default(), None, (asks, serves), Arc::new(Fixed(homes.clone())));
    homes.set([lab.holders[0].id.clone(), lab.holders[1].id.clone()]).unwrap();
    let (artifact, _, _) = image("library/app", 10);
    lab.upstream.tag(&tagged().name, &"v1".parse().unwrap(), Ok(artifact.target));
    lab.upstream.set(&registry(), true);
    assert!(lab.manifest("library/app", "v1").await.is_err());
    assert_eq!(lab.upstream.resolved(), 0);
}
