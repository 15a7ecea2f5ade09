mod judge;

use std::sync::Arc;

use super::*;

const PEER: &str = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
const OTHER: &str = "12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD";

fn peer(text: &str) -> PeerId {
    text.parse().unwrap()
}

fn config(allow: &[&str], deny: &[&str]) -> Config {
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    Config { allow: texts(allow), deny: texts(deny), unowned: false }
}

const ACTIONS: [Action; 5] = [Action::Connect, Action::Believe, Action::Serve, Action::Fetch, Action::Tags];
const KEY: KeyId = KeyId([1; 8]);
const OLD: KeyId = KeyId([2; 8]);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn by_key() -> Peers {
    Peers { by_key: true, ..Peers::default() }
}

fn levels(trust: &PinnedTrust, id: &str) -> [Level; 5] {
    ACTIONS.map(|action| trust.level(&peer(id), action))
}

#[test]
fn configured_peers_get_tags_and_others_nothing() {
    let trust = PinnedTrust::new(Config::default(), [peer(PEER)]).unwrap();
    for action in ACTIONS {
        assert!(trust.allows(&peer(PEER), action));
        assert_eq!(trust.level(&peer(OTHER), action), Level::None);
        assert!(!trust.allows(&peer(OTHER), action));
    }
}

#[test]
fn deny_wins_and_an_empty_allow_is_all() {
    let check = |allow: &[&str], deny: &[&str], name: &str, expected: bool| {
        let trust = PinnedTrust::new(config(allow, deny), [peer(PEER)]).unwrap();
        let name: Name = name.parse().unwrap();
        assert_eq!(trust.serves(&peer(PEER), &name), expected, "{allow:?} {deny:?} {name}");
        assert!(!trust.serves(&peer(OTHER), &name));
    };
    check(&[], &[], "ghcr.io/a/b", true);
    check(&["ghcr.io/a/*"], &[], "ghcr.io/a/b", true);
    check(&["ghcr.io/a/*"], &[], "ghcr.io/a/b/c", false);
    check(&["ghcr.io/a/**"], &[], "ghcr.io/a/b/c", true);
    check(&["ghcr.io/a/*"], &[], "quay.io/a/b", false);
    check(&["**"], &["ghcr.io/**"], "ghcr.io/a/b", false);
    check(&["ghcr.io/a/b"], &["ghcr.io/a/b"], "ghcr.io/a/b", false);
    check(&[], &["docker.io/library/nginx"], "nginx", false);
    check(&[], &["r.local:5000/**"], "r.local:5000/a", false);
}

#[test]
fn replacing_is_whole_and_says_whether_it_changed_anything() {
    let trust = PinnedTrust::new(config(&[], &[]), [peer(PEER)]).unwrap();
    assert!(!trust.replace(config(&[], &[]), [peer(PEER)]).unwrap());
    assert!(trust.replace(config(&[], &["["]), [peer(OTHER)]).is_err());
    assert!(trust.allows(&peer(PEER), Action::Tags) && !trust.allows(&peer(OTHER), Action::Tags));
    assert!(trust.replace(Config { unowned: true, ..config(&[], &[]) }, [peer(OTHER)]).unwrap());
    assert!(!trust.allows(&peer(PEER), Action::Connect) && trust.allows(&peer(OTHER), Action::Tags));
    assert!(trust.unowned());
}

/// Guards the cap of an open network.
#[test]
fn without_key_and_list_all_get_blobs_and_no_tags() {
    let trust = PinnedTrust::new(Config::default(), []).unwrap();
    assert_eq!(levels(&trust, PEER), [Level::Blobs; 5]);
    assert!(!trust.allows(&peer(PEER), Action::Tags) && !trust.is_unproved(&peer(PEER)));
    assert_eq!(trust.proof(&peer(PEER)), Proof::Open);
    assert!(trust.serves(&peer(PEER), &"ghcr.io/a/b".parse().unwrap()));
    assert!(trust.replace(Config::default(), [peer(OTHER)]).unwrap());
    assert_eq!(levels(&trust, PEER), [Level::None; 5], "a list closes it");
}

/// Guards that an unproved peer gets no further than to prove itself.
#[test]
fn a_member_by_key_is_trusted_until_its_certificate_ends() {
    let trust = PinnedTrust::new(Config::default(), by_key()).unwrap();
    let unproved = [Level::Introduce, Level::None, Level::None, Level::None, Level::None];
    assert_eq!(levels(&trust, PEER), unproved);
    assert!(trust.is_unproved(&peer(PEER)) && !trust.serves(&peer(PEER), &"ghcr.io/a/b".parse().unwrap()));
    assert!(trust.admit(&peer(PEER), KEY, DAY));
    assert_eq!(levels(&trust, PEER), [Level::Tags; 5]);
    assert_eq!((trust.proof(&peer(PEER)), trust.proof(&peer(OTHER))), (Proof::Key(KEY), Proof::None));
    assert!(!trust.is_unproved(&peer(PEER)) && trust.serves(&peer(PEER), &"ghcr.io/a/b".parse().unwrap()));
    assert_eq!(levels(&trust, OTHER), unproved);
    let end = Instant::now() + DAY;
    let table = trust.table.load();
    assert_eq!(trust.level_at(&table, &peer(PEER), Action::Connect, end), Level::Introduce);
    assert_eq!(trust.level_at(&table, &peer(PEER), Action::Tags, end), Level::None);
    assert!(!trust.sweep(&[KEY]) && trust.sweep_at(&[KEY], end) && trust.members().is_empty());
}

#[test]
fn members_go_with_the_key_that_admitted_them() {
    let trust = PinnedTrust::new(Config::default(), by_key()).unwrap();
    for id in [PEER, OTHER] {
        assert!(trust.admit(&peer(id), OLD, DAY));
    }
    assert!(trust.admit(&peer(PEER), KEY, DAY));
    // The certificate that it showed before comes late.
    assert!(trust.admit(&peer(PEER), OLD, DAY - Duration::from_secs(60)));
    assert!(!trust.sweep(&[KEY, OLD]));
    assert!(trust.sweep(&[KEY]));
    assert_eq!((trust.proof(&peer(PEER)), trust.proof(&peer(OTHER))), (Proof::Key(KEY), Proof::None));
    assert!(trust.replace(Config::default(), [peer(OTHER)]).unwrap());
    assert_eq!(trust.proof(&peer(PEER)), Proof::None, "without a key nobody is a member by one");
}

/// Guards the deny list, in every mode.
#[test]
fn who_is_denied_gets_nothing_whatever_it_shows() {
    let denied = BTreeSet::from([peer(PEER)]);
    for (has_key, listed) in
        [(false, vec![]), (false, vec![peer(PEER)]), (true, vec![]), (true, vec![peer(PEER)])]
    {
        let peers = Peers { listed: listed.into_iter().collect(), denied: denied.clone(), by_key: has_key };
        let trust = PinnedTrust::new(Config::default(), peers).unwrap();
        assert!(!trust.admit(&peer(PEER), KEY, DAY));
        assert_eq!(levels(&trust, PEER), [Level::None; 5], "{has_key}");
        assert_eq!(trust.proof(&peer(PEER)), Proof::Denied);
        assert!(!trust.serves(&peer(PEER), &"ghcr.io/a/b".parse().unwrap()));
    }
    // Denied after it was admitted.
    let trust = PinnedTrust::new(Config::default(), by_key()).unwrap();
    assert!(trust.admit(&peer(PEER), KEY, DAY));
    assert!(trust.replace(Config::default(), Peers { denied, ..by_key() }).unwrap());
    assert_eq!(levels(&trust, PEER), [Level::None; 5]);
}

/// Guards `MEMBERS`: who ends first goes first.
#[test]
fn members_are_bounded() {
    let trust = PinnedTrust::new(Config::default(), by_key()).unwrap();
    let id = |number: usize| -> PeerId {
        let digits = format!("{number:05}").replace('0', "a");
        format!("{}{digits}", "1".repeat(40)).parse().unwrap()
    };
    for number in 0..MEMBERS {
        assert!(trust.admit(&id(number), KEY, DAY + Duration::from_secs(number as u64)));
    }
    assert!(trust.admit(&id(MEMBERS), KEY, DAY + DAY));
    assert_eq!(trust.members().len(), MEMBERS);
    assert_eq!((trust.proof(&id(0)), trust.proof(&id(1))), (Proof::None, Proof::Key(KEY)));
    let later = Instant::now() + DAY + Duration::from_secs(MEMBERS as u64 / 2);
    assert!(trust.admit_at(&id(MEMBERS + 1), KEY, DAY, later));
    assert!(trust.members().len() < MEMBERS / 2 + 2, "those whose time is over went");
}
