//! Rows of what is told when the API server is lost: signs of life of the control plane, and what only looks like one.

use std::time::{Duration, SystemTime};

use super::{Code, Facts, Handshake, Network, Obstacle, Place, Ports, Row, far, judge, well};
use crate::doctor::Told;

/// The mirror has lost the API server then, and no other member says anything.
fn lost(facts: &mut Facts, lost: SystemTime) {
    facts.told = Some(Told { lost, reach: 0, lack: 0 });
}

/// It was lost so many seconds ago, and others reach it or lack it. The token is older.
fn words(facts: &mut Facts, seconds: u64, reach: usize, lack: usize) {
    let lost = facts.now - Duration::from_secs(seconds);
    facts.account.written = Some(lost);
    facts.told = Some(Told { lost, reach, lack });
}

pub(super) const ROWS: &[Row] = &[
    (
        "silence, and a token that is newer",
        |f| {
            far(f, Obstacle::Timeout);
            lost(f, f.account.written.unwrap() - Duration::from_secs(11));
        },
        &[Code::ApiBlocked],
    ),
    (
        "silence, and a token that may be as old",
        |f| {
            far(f, Obstacle::Timeout);
            lost(f, f.account.written.unwrap() - Duration::from_secs(10));
        },
        &[Code::ApiUnreachable],
    ),
    (
        "silence, and a token that was newer and is old by now",
        |f| {
            far(f, Obstacle::Timeout);
            f.account.written = Some(f.now - Duration::from_secs(660));
            lost(f, f.now - Duration::from_secs(1_000));
        },
        &[Code::ApiUnreachable],
    ),
    (
        "silence, and other members reach it",
        |f| {
            far(f, Obstacle::Timeout);
            words(f, 61, 1, 3);
        },
        &[Code::ApiBlocked],
    ),
    (
        "silence, and what others say may be old",
        |f| {
            far(f, Obstacle::Timeout);
            words(f, 60, 4, 0);
        },
        &[Code::ApiUnreachable],
    ),
    (
        "silence, and what others of many say may be old",
        |f| {
            far(f, Obstacle::Timeout);
            words(f, 900, 495, 4);
        },
        &[Code::ApiUnreachable],
    ),
    (
        "silence for all",
        |f| {
            far(f, Obstacle::Timeout);
            words(f, 61, 0, 4);
        },
        &[Code::ApiUnreachable],
    ),
    (
        "refused, and a token that is newer",
        |f| {
            far(f, Obstacle::Refused);
            lost(f, f.account.written.unwrap() - Duration::from_secs(11));
        },
        &[Code::ApiRefused],
    ),
];

/// Off Talos nobody is to look for it, and a pod with a network of its own has none.
#[test]
fn kubeprism_is_named_where_it_is_or_should_be() {
    let names = |distribution: &str, network, change: fn(&mut Facts)| {
        let mut facts = well();
        facts.place = Place { distribution: distribution.into(), network, ..Place::default() };
        far(&mut facts, Obstacle::Timeout);
        change(&mut facts);
        let (verdicts, seen) = judge(&facts, &Ports::default());
        let [verdict] = &verdicts[..] else { panic!("{verdicts:#?}") };
        let has = |text: &str| text.contains("127.0.0.1:7445");
        (seen.iter().chain(&verdict.evidence).any(|line| has(line)), has(&verdict.fix))
    };
    assert_eq!(names("kubeadm", Network::Host, |_| {}), (false, false));
    assert_eq!(names("Talos", Network::Pod, |_| {}), (false, false));
    assert_eq!(names("Talos", Network::Host, |_| {}), (true, true));
    let other: fn(&mut Facts) = |facts| {
        let prism = &mut facts.reaches[1];
        (prism.obstacle, prism.handshake) = (None, Some(Handshake::Broken("x".into())));
    };
    assert_eq!(names("kubeadm", Network::Host, other), (true, false));
    let answers: fn(&mut Facts) = |facts| {
        facts.answers = well().answers;
        let prism = &mut facts.reaches[1];
        (prism.obstacle, prism.handshake) = (None, Some(Handshake::Trusted));
    };
    assert_eq!(names("kubeadm", Network::Host, answers), (true, true));
}
