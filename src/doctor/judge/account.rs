//! What the mounted credentials are worth: whether they are there, and why they are refused.

use std::time::{Duration, SystemTime};

use super::super::Verdict;
use super::super::code::{Code, Confidence};
use super::super::facts::Facts;
use super::Found;

/// Clocks of a cluster differ by less; the API server itself grants a minute.
const SKEW: Duration = Duration::from_secs(60);
/// The first of January 2025, which was before there was any Peili.
const BEFORE: Duration = Duration::from_secs(1_735_689_600);
/// A token that was on its way when the API server was lost; and the longest between two.
const LATER: Duration = Duration::from_secs(10);
const RENEWED: Duration = Duration::from_secs(660);

const MOUNT: &str = "mount a projected volume with serviceAccountToken, the ConfigMap kube-root-ca.crt and the namespace, and name its \
                     folder in `kubernetes.credentials`; or set `election.backend: gossip`, with which no API is needed";

/// What is not there. Returns whether requests can be sent.
pub(super) fn files(facts: &Facts, found: &mut Found) -> bool {
    let account = &facts.account;
    let mut is_whole = true;
    let mut missing = |code, path: &std::path::Path, why: &str, other: &str| {
        let verdict = Verdict::new(code, Confidence::High, MOUNT);
        found.say(verdict.seen(format!("{}: {why}", path.display())).or(other));
        is_whole = false;
    };
    if let Some(why) = &account.unread {
        let other = "`automountServiceAccountToken: false`, as hardened clusters have it";
        missing(Code::NoToken, &account.token, why, other);
    }
    if let Some(why) = &account.untrusted {
        missing(Code::NoAuthority, &account.authority, why, "`kubernetes.credentials` names another folder");
    }
    if let Err(why) = &facts.namespace
        && !facts.reaches.is_empty()
    {
        let fix = "name it in `kubernetes.namespace`";
        found.say(Verdict::new(Code::NoNamespace, Confidence::High, fix).seen(why.as_str()));
        is_whole = false;
    }
    clock(facts, found);
    is_whole
}

/// Whether the clock is behind: by the token, or since nothing of this program was there at that time.
fn clock(facts: &Facts, found: &mut Found) {
    let fix = "look at the time synchronisation of this node (`timedatectl`, `talosctl time`)";
    let verdict = Verdict::new(Code::ClockBehind, Confidence::High, fix);
    let ahead = facts.account.issued.and_then(|issued| issued.duration_since(facts.now).ok());
    if let Some(ahead) = ahead.filter(|ahead| *ahead > SKEW) {
        let seen = format!("the token was issued {} s in the future, by this node's clock", ahead.as_secs());
        found.say(verdict.seen(seen).or("the clock of the control plane is ahead"));
    } else if let Ok(since) = facts.now.duration_since(SystemTime::UNIX_EPOCH)
        && since < BEFORE
    {
        let days = since.as_secs() / (24 * 60 * 60);
        found.say(verdict.seen(format!("this node's clock is {days} days after the first of January 1970")));
    }
}

/// The server does not accept the token, in these words.
pub(super) fn refused(facts: &Facts, words: &str, found: &mut Found) {
    let account = &facts.account;
    let over = account.expires.and_then(|end| facts.now.duration_since(end).ok());
    let whose = if account.subject.is_empty() { "nobody it names" } else { &account.subject };
    let is_for_others = !account.audiences.is_empty()
        && !account.issuer.is_empty()
        && account.audiences.iter().all(|audience| {
            *audience != account.issuer
                && !["api", "kubernetes"].contains(&audience.as_str())
                && !is_api(audience)
        });
    let verdict = match over {
        Some(over) => {
            let fix = "kubelet renews a projected token in place: restart the pod if this one was copied, and look at kubelet's log if it \
                       stands still";
            Verdict::new(Code::TokenExpired, Confidence::High, fix)
                .seen(format!("it ended {} s ago", over.as_secs()))
                .or("the clock of this node is ahead")
                .or("the service account was deleted meanwhile")
        }
        None if is_for_others => {
            let fix = "let the projected token have the API server's audience: leave `audience` out of `serviceAccountToken`";
            Verdict::new(Code::TokenAudience, Confidence::Low, fix)
                .seen(format!("it is for {}", account.audiences.join(", ")))
                .or("the service account was deleted")
                .or("the cluster's signing keys were replaced")
        }
        None => {
            let fix = "is the service account still there, and of this cluster? A pod that is made anew gets a new token";
            Verdict::new(Code::TokenRejected, Confidence::High, fix)
                .or("the service account was deleted, or made anew")
                .or("the cluster's signing keys were replaced")
        }
    };
    found.say(verdict.seen(format!("the token is of {whose}")).seen(words));
}

/// How clusters call themselves.
fn is_api(audience: &str) -> bool {
    audience.starts_with("https://kubernetes.default") || audience == "https://container.googleapis.com"
}

/// That the control plane lives: kubelet has written another token, which it got after this node had lost the API server. All by this node's
/// own clock. kubelet renews a token of ten minutes after eight; one that is older than all that says nothing of now.
pub(super) fn lives(facts: &Facts) -> Option<String> {
    let (written, lost) = (facts.account.written?, facts.told?.lost);
    let later = written.duration_since(lost).ok().filter(|later| *later > LATER)?;
    facts.now.duration_since(written).ok().filter(|age| *age < RENEWED)?;
    Some(format!(
        "this node's kubelet wrote another token {} s after the API server was lost here: it reaches a control plane that lives",
        later.as_secs()
    ))
}

/// How old the token is, as a sign of life of the control plane.
pub(super) fn sign_of_life(facts: &Facts) -> String {
    let age = |issued: SystemTime| facts.now.duration_since(issued).ok();
    match facts.account.issued.and_then(age) {
        Some(age) => format!(
            "the token was issued {} s ago: the control plane lived then, and was reached by this node's kubelet",
            age.as_secs()
        ),
        None => "the token does not say when the control plane issued it".to_owned(),
    }
}
