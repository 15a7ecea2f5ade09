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

#[test]
fn configured_peers_get_tags_and_others_nothing() {
    let trust = PinnedTrust::new(Config::default(), [peer(PEER)]).unwrap();
    for action in [Action::Connect, Action::Believe, Action::Serve, Action::Fetch, Action::Tags] {
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
