//! What follows from another fault is no verdict of its own; what only comes at the same time is.

use std::time::{Duration, SystemTime};

use serde_json::json;

use super::{
    Code, Confidence, Facts, Handshake, Obstacle, Origin, Ports, Purpose, Unresolved, answers, asked, denies,
    dns, far, insecure, judge, mirror, reach, well,
};
use crate::doctor::Verdict;
use crate::doctor::code::Severity;

const NAME: &str = "dns peers.peili.svc:5001: no name server answers";

/// All of it, for want of a name server: the API server, the registries, the peers.
fn down(facts: &mut Facts) {
    far(facts, Obstacle::Unresolved("temporary".into()));
    dns(facts, Unresolved::Silent, Err(Unresolved::Silent));
    mirror(facts, |status| {
        status.registries = vec![asked("a.test", false), asked("b.test", false)];
        status.election.mode = "alone".into();
        status.network.problems = vec![NAME.into(), "no cluster key".into()];
    });
    let unnamed = ["10.96.0.1:443", "a.test", "b.test"].map(|name| (name.to_owned(), Unresolved::Silent));
    facts.unnamed = unnamed.to_vec();
}

fn said(change: fn(&mut Facts)) -> (Vec<Code>, Vec<Verdict>) {
    let mut facts = well();
    down(&mut facts);
    change(&mut facts);
    let (verdicts, _) = judge(&facts, &Ports::default());
    (verdicts.iter().map(|verdict| verdict.code).collect(), verdicts)
}

#[test]
fn what_follows_from_a_dead_name_server_is_no_verdict_of_its_own() {
    let (codes, verdicts) = said(|_| {});
    assert_eq!(codes, [Code::DnsSilent], "{verdicts:#?}");
    let evidence = verdicts[0].evidence.join("\n");
    for follows in ["api-unresolved", "registries-silent", "mirror-alone", "a.test"] {
        assert!(evidence.contains(follows), "{follows}: {evidence}");
    }
    let check = |what: &str, expected: &[Code], change: fn(&mut Facts)| {
        let (codes, verdicts) = said(change);
        assert_eq!(codes, expected, "{what}: {verdicts:#?}");
    };
    check("an endpoint has no address, the Service answers", &[Code::DnsSilent], |facts| {
        let mut endpoint = reach(Origin::Endpoint, "api.test:6443");
        (endpoint.obstacle, endpoint.handshake) = (Some(Obstacle::Unresolved("x".into())), None);
        facts.reaches = vec![endpoint, reach(Origin::Service, "10.96.0.1:443")];
        facts.answers = well().answers;
        facts.unnamed.push(("api.test:6443".into(), Unresolved::Silent));
    });
    check("names fail otherwise", &[Code::DnsFailing], |facts| {
        dns(facts, Unresolved::Other("refused".into()), Ok(1));
    });
    check("the peers' name is not known", &[Code::DnsNoName], |facts| {
        *facts = Facts { unnamed: Vec::new(), mirror: facts.mirror.clone(), ..well() };
        dns(facts, Unresolved::NoSuchHost, Ok(1));
        mirror(facts, |status| {
            status.election.mode = "alone".into();
            status.network.problems = vec!["dns peers.peili.svc:5001: no such host".into()];
        });
    });
}

/// Each of these would be there with a name server, too.
#[test]
fn what_is_another_fault_stays() {
    let check = |what: &str, expected: &[Code], change: fn(&mut Facts)| {
        let (codes, verdicts) = said(change);
        assert_eq!(codes, expected, "{what}: {verdicts:#?}");
    };
    check("the API server's name is none", &[Code::ApiUnresolved, Code::DnsSilent], |facts| {
        facts.unnamed.remove(0);
    });
    check("packets to the API server are dropped", &[Code::ApiUnreachable, Code::DnsSilent], |facts| {
        facts.reaches[0].obstacle = Some(Obstacle::Timeout);
    });
    check("one registry has a name", &[Code::DnsSilent, Code::RegistriesSilent], |facts| {
        facts.unnamed.pop();
    });
    check("a peer of old was tried", &[Code::DnsSilent, Code::MirrorAlone], |facts| {
        let Ok(status) = &mut facts.mirror else { panic!("no mirror") };
        status.network.problems.push("a peer of peers.peili.svc:5001 at 10.0.0.9:5001: refused".into());
    });
    check("a peer that is named was tried", &[Code::DnsSilent, Code::MirrorAlone], |facts| {
        let Ok(status) = &mut facts.mirror else { panic!("no mirror") };
        let peer = json!({
            "id": "x", "node": "", "zone": "", "version": "", "connected": false, "level": "tags", "holds": 0, "transfer": [],
            "problem": "peer x: refused",
        });
        status.network.peers.push(serde_json::from_value(peer).unwrap());
    });
    check("another name has addresses", &[Code::DnsSilent, Code::MirrorAlone], |facts| {
        facts.names.push(("others.peili.svc".into(), Ok(2)));
    });
}

/// In 1970 no certificate counts yet, which is no fault of certificates.
#[test]
fn a_clock_explains_certificates_that_do_not_count_yet() {
    let check = |change: fn(&mut Facts), expected: &[Code]| {
        let mut facts = well();
        insecure(&mut facts, Handshake::Early("not valid yet".into()));
        change(&mut facts);
        let (verdicts, _) = judge(&facts, &Ports::default());
        let codes: Vec<Code> = verdicts.iter().map(|verdict| verdict.code).collect();
        assert_eq!(codes, expected, "{verdicts:#?}");
        verdicts
    };
    let verdicts = check(|facts| facts.now = SystemTime::UNIX_EPOCH, &[Code::ClockBehind]);
    assert_eq!(verdicts[0].severity, Severity::Problem, "the API server is not reached");
    assert!(verdicts[0].evidence.iter().any(|line| line.contains("not valid yet")), "{verdicts:#?}");
    let old: fn(&mut Facts) = |facts| {
        facts.now = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        facts.account.issued = None;
    };
    check(old, &[Code::ClockBehind]);
    // One that is over is not explained by a clock that is behind.
    check(
        |facts| {
            facts.now = SystemTime::UNIX_EPOCH;
            facts.reaches[0].handshake = Some(Handshake::Time("expired".into()));
        },
        &[Code::TlsTime, Code::ClockBehind],
    );
}

/// An authorizer that fails is not one that says no.
#[test]
fn a_right_that_could_not_be_looked_at_is_not_surely_lacking() {
    let mut facts = well();
    denies(&mut facts, Purpose::Watch);
    let right = answers(&mut facts).rights[2].1.clone();
    answers(&mut facts).unsure.push((right, "the webhook is dead".into()));
    let (verdicts, _) = judge(&facts, &Ports::default());
    assert_eq!((verdicts[0].code, verdicts[0].confidence), (Code::RightsWatch, Confidence::Medium));
    assert!(verdicts[0].evidence.iter().any(|line| line.contains("the webhook is dead")), "{verdicts:#?}");
    assert!(verdicts[0].other_causes[0].contains("authorizer"), "{verdicts:#?}");
}
