//! Upstreams that a plan names: in which order they are asked, and what their faults cost.

use super::plans::Says;
use super::*;
use crate::oci::{Repository, Tag};
use crate::policy::registry::{Plan, Route, Source as PlanSource, TagResolution};
use crate::upstream::FetchError;
use crate::upstream::memory::Fault as UpstreamFault;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn at(upstream: &str) -> PlanSource {
    PlanSource::Upstream(Route { upstream: upstream.into(), repository: Some(repository()) })
}

fn repository() -> Repository {
    "hub/library/app".parse().unwrap()
}

fn sources(sources: &[PlanSource]) -> Plan {
    Plan { sources: Some(sources.to_vec()), ..Plan::default() }
}

/// A node whose policy says `plan`, with upstreams `a` and `b` that hold an image of so many bytes, and a peer that may.
fn lab(plan: Plan, size: usize) -> (Lab, Artifact, Digest, Vec<u8>) {
    let lab = Lab::ruled(1, &Config::default(), None, Arc::new(Says(plan)));
    let (artifact, layer, bytes) = image("library/app", size);
    for upstream in ["a", "b"] {
        lab.upstreams.add(upstream, &["hub"]);
        lab.upstreams.put(upstream, &repository(), LAYER, &bytes, None);
        let manifest = artifact.blobs.iter().find(|blob| blob.descriptor == artifact.target).unwrap();
        let tag: Tag = "v1".parse().unwrap();
        lab.upstreams.put(upstream, &repository(), &artifact.target.media_type, &manifest.bytes, Some(&tag));
    }
    (lab, artifact, layer, bytes)
}

fn fails(lab: &Lab, upstream: &str) {
    let error = Some(FetchError::Failed("refused".into()));
    lab.upstreams.set(upstream, UpstreamFault { error, ..UpstreamFault::default() });
}

#[tokio::test]
async fn content_comes_whole_and_in_ranges() {
    let (lab, artifact, layer, bytes) = lab(sources(&[at("a")]), 3 * MIB);
    let answer = lab.open(&layer, None).await.unwrap();
    assert_eq!(answer.source, Source::Upstream);
    assert!(read(answer).await.unwrap() == bytes);
    for (range, from, to) in
        [("bytes=5-", 5, 3 * MIB), ("bytes=7-1000000", 7, 1_000_001), ("bytes=-9", 3 * MIB - 9, 3 * MIB)]
    {
        let answer = lab.open(&layer, Some(range)).await.unwrap();
        assert_eq!((answer.range.start, answer.range.end), (from as u64, to as u64));
        assert!(read(answer).await.unwrap() == bytes[from..to], "{range}");
    }
    let past = lab.open(&layer, Some("bytes=4000000-")).await.map(drop);
    assert!(matches!(past, Err(Refusal::Range(_))), "{past:?}");
    let answer = lab.manifest("library/app", "v1").await.unwrap();
    assert_eq!((answer.source, answer.descriptor), (Source::Upstream, artifact.target));
    let unknown = lab.open(&Digest::sha256(b"unknown"), None).await.map(drop).unwrap_err();
    // What nobody has is not for the registry to give.
    assert!(matches!(&unknown, Refusal::Denied(reason) if reason.message.starts_with("no node and no")));
}

/// In the order of the plan; an upstream is not asked for what a peer gives.
#[tokio::test]
async fn sources_are_asked_in_their_order() {
    let peers_first = sources(&[PlanSource::Peers, at("a"), PlanSource::Origin]);
    let (lab1, artifact, layer, _) = lab(peers_first, MIB);
    assert_eq!(lab1.open(&layer, None).await.unwrap().source, Source::Upstream);
    lab1.hold(0, &artifact);
    assert_eq!(lab1.open(&layer, None).await.unwrap().source, Source::Peers);

    let (lab2, artifact, layer, _) = lab(sources(&[at("a"), PlanSource::Peers]), MIB);
    lab2.hold(0, &artifact);
    assert_eq!(lab2.open(&layer, None).await.unwrap().source, Source::Upstream);
    fails(&lab2, "a");
    assert_eq!(lab2.open(&layer, None).await.unwrap().source, Source::Peers);
    let answer = lab2.manifest("library/app", artifact.target.digest).await.unwrap();
    assert_eq!(answer.source, Source::Peers);
}

/// A body that breaks off goes on where it was, and elsewhere if nothing comes there.
#[tokio::test]
async fn what_breaks_off_goes_on() {
    let (lab, _, layer, bytes) = lab(sources(&[at("a"), at("b")]), 3 * MIB);
    lab.upstreams.set("a", UpstreamFault { cut: Some((MIB as u64, 2)), ..UpstreamFault::default() });
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    let starts: Vec<_> = lab.upstreams.asked("a").iter().map(|want| want.start).collect();
    assert_eq!(starts, [0, MIB as u64, 2 * MIB as u64]);
    assert!(lab.upstreams.asked("b").is_empty());

    lab.upstreams.set("a", UpstreamFault { cut: Some((0, 1000)), ..UpstreamFault::default() });
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    assert_eq!(lab.upstreams.asked("b").len(), 1);
    fails(&lab, "a");
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
}

/// Wrong content never comes whole, and what the runtime has of it is discarded before its next attempt.
#[tokio::test]
async fn wrong_content_is_cut_and_discarded() {
    let (lab, artifact, layer, bytes) = lab(sources(&[at("a"), at("b"), PlanSource::Origin]), MIB);
    lab.upstreams.set("a", UpstreamFault { lies: true, ..UpstreamFault::default() });
    let (came, is_cut) = read_until_error(lab.open(&layer, None).await.unwrap()).await;
    assert!(is_cut && came.len() < MIB);
    assert_eq!(lab.store.discarded(), [layer]);
    assert!(lab.upstreams.blamed("a").is_some_and(|problem| problem.contains("wrong content")));
    assert!(lab.blob(&layer).await.unwrap().0 == bytes, "the next attempt gets it from the other one");
    let answer = lab.manifest("library/app", artifact.target.digest).await.unwrap();
    assert_eq!(answer.descriptor, artifact.target);
    assert!(lab.upstreams.blamed("b").is_none());
}

/// An upstream says what a tag means; peers only where none does, and where the plan lets them.
#[tokio::test]
async fn tags_are_the_upstreams_to_resolve() {
    for (resolution, known) in [(None, true), (Some(TagResolution::UpstreamOnly), false)] {
        let plan = Plan { tag_resolution: resolution, ..sources(&[at("a"), PlanSource::Peers]) };
        let (lab, artifact, ..) = lab(plan, 100);
        let (mut older, ..) = image("library/app", 99);
        older.name = artifact.name.clone();
        lab.hold(0, &older);
        let answer = lab.manifest("library/app", "v1").await.unwrap();
        assert_eq!(answer.descriptor, artifact.target, "not the older one of the peer");
        fails(&lab, "a");
        let answer = lab.manifest("library/app", "v1").await;
        match answer {
            Ok(answer) => assert!(known && answer.descriptor == older.target),
            Err(refusal) => assert!(!known && refusal != Refusal::NotHere(NotHere::Unknown), "{refusal:?}"),
        }
    }
}

/// Guards that peers' old word does not count where the registry itself may be asked, and that a registry which must not be is not
/// looked at.
#[tokio::test]
async fn a_tag_is_of_peers_only_where_nobody_else_answers() {
    let open = sources(&[PlanSource::Peers, at("a"), PlanSource::Origin]);
    for (plan, answers, error, is_known) in [
        (open.clone(), true, FetchError::Held, false),
        (open.clone(), false, FetchError::Held, true),
        (open, false, FetchError::Refused("403".into()), false),
        (sources(&[PlanSource::Peers, at("a")]), true, FetchError::Held, true),
    ] {
        let (lab, artifact, ..) = lab(plan, 100);
        lab.hold(0, &artifact);
        lab.upstream.set(&"registry.test".parse().unwrap(), answers);
        lab.upstreams.set("a", UpstreamFault { error: Some(error.clone()), ..UpstreamFault::default() });
        assert_eq!(lab.manifest("library/app", "v1").await.is_ok(), is_known, "{answers} {error}");
    }
    let lab = Lab::ruled(1, &Config::default(), None, Arc::new(Says(sources(&[PlanSource::Peers]))));
    let (artifact, ..) = image("library/app", 100);
    lab.hold(0, &artifact);
    lab.upstream.set(&"registry.test".parse().unwrap(), true);
    assert!(lab.manifest("library/app", "v1").await.is_ok(), "an air gap has no registry that answers");
}

/// Guards that what is closed stays closed: by failing upstreams, and by a node that has no time.
#[tokio::test]
async fn a_closed_registry_is_refused_with_the_cause() {
    let (lab, _, layer, _) = lab(sources(&[PlanSource::Peers, at("a")]), 100);
    fails(&lab, "a");
    let refusal = lab.open(&layer, None).await.map(drop).unwrap_err();
    let Refusal::Denied(reason) = refusal else { panic!("{refusal:?}") };
    assert!(reason.message.starts_with("its upstreams fail"), "{reason}");

    let lab = Lab::ruled(1, &Config::default(), None, Arc::new(Says(sources(&[PlanSource::Peers]))));
    let (artifact, layer, _) = image("library/app", 100);
    lab.hold(0, &artifact);
    lab.fault(0, Fault::Hung);
    let request = BlobRequest { name: name("library/app"), digest: layer, range: None, head: false };
    let refusal = lab.mirror.blob(request, Duration::from_millis(20)).await.map(drop).unwrap_err();
    let Refusal::Denied(reason) = refusal else { panic!("{refusal:?}") };
    assert!(reason.message.starts_with("it did not come in time"), "{reason}");
}
