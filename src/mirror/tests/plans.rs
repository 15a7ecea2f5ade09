//! What a plan of a policy says about peers.

use super::*;
use crate::oci::Level;
use crate::policy::registry::{Plan, Request, Ruling, Way};

/// Says the same of everything.
pub(super) struct Says(pub(super) Plan);

impl RegistryPolicy for Says {
    fn is_active(&self) -> bool {
        true
    }

    fn generation(&self) -> i64 {
        1
    }

    fn decide(&self, _: &Request) -> Ruling {
        Ruling { way: Way::Mirror(self.0.clone()), by: Some("says".into()) }
    }
}

/// Believes everybody's content and nobody's tags.
struct Blobs;

impl Gate for Blobs {
    fn level(&self, _: &PeerId, _: crate::oci::Action) -> Level {
        Level::Blobs
    }

    fn serves(&self, _: &PeerId, _: &Name) -> bool {
        true
    }
}

#[tokio::test]
async fn peers_below_the_least_trust_are_not_asked() {
    let (artifact, layer, bytes) = image("library/app", MIB);
    for (least, is_asked) in [(Level::Tags, false), (Level::Blobs, true)] {
        let plan = Plan { min_trust: Some(least), ..Plan::default() };
        let lab = Lab::ruled(1, &Config::default(), Some(Arc::new(Blobs)), Arc::new(Says(plan)));
        lab.hold(0, &artifact);
        if is_asked {
            assert!(lab.blob(&layer).await.unwrap().0 == bytes);
        } else {
            assert_eq!(lab.refused(&layer).await.0, NotHere::Unknown);
        }
        assert_eq!(lab.asked(0) > 0, is_asked, "{least}");
    }
}

/// A second peer is not asked beside one that is slow, where the plan lets one be asked at a time.
#[tokio::test]
async fn no_more_peers_are_asked_at_once_than_the_plan_says() {
    let (artifact, layer, bytes) = image("library/app", MIB);
    for (most, hedges) in [(None, 1), (Some(1), 0)] {
        let plan = Plan { max_fan_out: most, ..Plan::default() };
        let lab = Lab::ruled(2, &Config::default(), None, Arc::new(Says(plan)));
        lab.hold(0, &artifact);
        lab.hold(1, &artifact);
        lab.fault(0, Fault::Hung);
        assert!(lab.blob(&layer).await.unwrap().0 == bytes, "from the other one");
        assert_eq!(lab.metrics.hedges.get(), hedges, "{most:?}");
    }
}
