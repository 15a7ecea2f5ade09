//! What this account may do with the objects of elections, and whether the server takes them.

use std::collections::BTreeSet;

use super::super::Verdict;
use super::super::code::{Code, Confidence};
use super::super::facts::{Answers, Facts, LockAnswer, Making, Purpose, Wanted};
use super::super::fix;
use super::{Found, account, api};
use crate::cluster::{Cause, Fault, Kind, Refusal, Right, Write};

/// Whom the API server takes somebody for who shows nothing.
const ANONYMOUS: &str = "system:anonymous";

/// All of it. The first fault that concerns every request is said alone.
pub(super) fn judge(facts: &Facts, wanted: &Wanted, answers: &Answers, found: &mut Found) {
    let Ok(namespace) = &facts.namespace else { return };
    if answers.who.as_deref() == Some(ANONYMOUS) {
        let words = "the API server takes this account for `system:anonymous`: something on the way takes the token out, or it takes no tokens";
        return account::refused(facts, words, found);
    }
    match general(answers) {
        // It has told its version, for which it needs no storage.
        Some(fault) if fault.cause == Cause::NoAnswer => {
            let fix = "look at the control plane: etcd, its disk. Nothing has to be done on this node";
            let verdict = Verdict::new(Code::ControlPlane, Confidence::Medium, fix);
            let verdict = verdict.seen("it tells its version, and does not answer what needs its storage");
            return found.say(verdict.seen(fault.text.as_str()).or("etcd is down, has no leader or is slow"));
        }
        Some(fault) => return api::said(facts, fault, found),
        None => {}
    }
    let writes: Vec<(&LockAnswer, Refusal, &str)> = answers
        .locks
        .iter()
        .filter_map(|answer| match &answer.write {
            Some(Write::Refused(refusal, text)) => Some((answer, *refusal, text.as_str())),
            _ => None,
        })
        .collect();
    let first = |wanted: Refusal| writes.iter().find(|(_, refusal, _)| *refusal == wanted);
    if let Some((_, _, text)) = first(Refusal::NoNamespace) {
        let fix = format!(
            "make it (`kubectl create namespace {namespace}`), or name another one in `kubernetes.namespace`"
        );
        return found.say(Verdict::new(Code::NamespaceMissing, Confidence::High, fix).seen(*text));
    }
    if let Some((_, _, text)) = first(Refusal::Terminating) {
        let fix = "nothing is made in it any more: wait until it is gone and make it anew, or name another one in `kubernetes.namespace`";
        return found.say(Verdict::new(Code::NamespaceTerminating, Confidence::High, fix).seen(*text));
    }
    missing(facts, answers, namespace, found);
    for answer in &answers.locks {
        lock(facts, answers, answer, namespace, found);
    }
    summary(facts, wanted, answers, namespace, found);
}

/// A fault that any request would have: no answer of one kind says anything then.
fn general(answers: &Answers) -> Option<&Fault> {
    let reviews = answers.rights.iter().filter_map(|(_, _, answer)| answer.as_ref().err());
    let objects = answers.locks.iter().filter_map(|answer| answer.there.as_ref().err());
    let is_general = |fault: &&Fault| {
        matches!(fault.cause, Cause::Unauthorized | Cause::Throttled | Cause::Server | Cause::Malformed)
            || fault.cause.reached() == Some(false)
    };
    reviews.chain(objects).find(is_general)
}

/// A verdict for each purpose that lacks a right.
fn missing(facts: &Facts, answers: &Answers, namespace: &str, found: &mut Found) {
    let refused = answers.rights.iter().find_map(|(_, _, answer)| answer.as_ref().err());
    if let Some(fault) = refused {
        let fix = "bind the ClusterRole system:basic-user to system:authenticated again, as Kubernetes does by itself";
        found.say(Verdict::new(Code::ReviewRefused, Confidence::High, fix).seen(fault.text.as_str()));
    }
    let mut all = Vec::new();
    let mut check = |code, confidence, purposes: &[Purpose], fix: &str| {
        let lacking = lacking(answers, purposes);
        if lacking.is_empty() {
            return;
        }
        let account = whom(facts, answers);
        let mut verdict = Verdict::new(code, confidence, fix);
        verdict.evidence = lacking.iter().map(|right| format!("may not {}", shown(right))).collect();
        if let Some(account) = &account {
            verdict.evidence.push(format!("the account is {account}"));
        }
        // One authorizer that fails does so for all of them.
        let errors: BTreeSet<&str> = answers
            .unsure
            .iter()
            .filter(|(right, _)| lacking.contains(right))
            .map(|(_, error)| error.as_str())
            .collect();
        if !errors.is_empty() {
            let errors =
                errors.into_iter().map(|error| format!("the API server could not look everywhere: {error}"));
            verdict.evidence.extend(errors);
            verdict.confidence = verdict.confidence.min(Confidence::Medium);
            verdict = verdict.or("an authorizer of the API server fails (a webhook) that would allow it");
        }
        // All nodes have one account: a right that names one of them is of use to no other.
        let any = |right: &Right| {
            if right.namespaced { right.clone() } else { Right { name: None, ..right.clone() } }
        };
        let rights: Vec<Right> = lacking.iter().map(any).collect();
        let rights: Vec<&Right> = rights.iter().collect();
        verdict = verdict.apply(fix::role(namespace, account.as_deref(), code, &rights));
        all.push(verdict);
    };
    let role = "apply the Role and the RoleBinding: they have the verbs that are missing and no others";
    check(Code::RightsLock, Confidence::High, &[Purpose::Lock], role);
    check(Code::RightsWatch, Confidence::High, &[Purpose::Watch], role);
    check(Code::RightsCoordinator, Confidence::High, &[Purpose::Summary, Purpose::Events], role);
    let cluster = "apply the ClusterRole and its binding, or set `kubernetes.read-node: false`";
    check(Code::RightsNode, Confidence::High, &[Purpose::Node], cluster);
    // Without reviews the lock itself has shown what may not be done.
    if refused.is_some()
        && let Some((answer, text)) =
            answers.locks.iter().find_map(|answer| Some((answer, forbidden(answer)?)))
    {
        let name = format!("{} {}", answer.lock.kind.name(), answer.lock.name);
        let fix = format!(
            "give the account a Role with get, update and watch on the {name}, and a RoleBinding; see docs/elections.md"
        );
        all.push(Verdict::new(Code::RightsLock, Confidence::High, fix).seen(text));
    }
    // Who may do nothing there may have the wrong namespace.
    let nothing = answers.rights.iter().all(|(_, _, answer)| matches!(answer, Ok(false)));
    let own = facts.account.names().is_none_or(|(own, _)| own == namespace);
    for mut verdict in all {
        if nothing && !own && verdict.code == Code::RightsLock {
            verdict.confidence = Confidence::Medium;
            verdict =
                verdict.or("the namespace does not exist, or is another one: see `kubernetes.namespace`");
        }
        found.say(verdict);
    }
}

fn lacking(answers: &Answers, purposes: &[Purpose]) -> Vec<Right> {
    let denied = answers
        .rights
        .iter()
        .filter(|(purpose, _, answer)| purposes.contains(purpose) && matches!(answer, Ok(false)));
    denied.map(|(_, right, _)| right.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The refusal of a lock by rights, where it was read or replaced.
fn forbidden(answer: &LockAnswer) -> Option<String> {
    match (&answer.there, &answer.write) {
        (Err(fault), _) if fault.cause == Cause::Forbidden => Some(fault.text.clone()),
        // That it may not be made is another verdict.
        (Ok(true), Some(Write::Refused(Refusal::Forbidden, text))) => Some(text.clone()),
        _ => None,
    }
}

fn may_create(answers: &Answers, making: Making) -> Option<bool> {
    let mut all = answers.rights.iter().filter(|(purpose, _, _)| *purpose == Purpose::Create(making));
    all.find_map(|(_, _, answer)| answer.as_ref().ok().copied())
}

/// Whether a review says that a lock may be replaced.
fn may_replace(answers: &Answers, lock: &LockAnswer) -> Option<bool> {
    let is_it = |right: &Right| right.verb == "update" && right.name.as_deref() == Some(&lock.lock.name);
    let mut all = answers.rights.iter().filter(|(_, right, _)| is_it(right));
    all.find_map(|(_, _, answer)| answer.as_ref().ok().copied())
}

/// One lock: whether it can be made, written, and is Peili's.
fn lock(facts: &Facts, answers: &Answers, answer: &LockAnswer, namespace: &str, found: &mut Found) {
    let (kind, name) = (answer.lock.kind, answer.lock.name.as_str());
    let shown = format!("{} {namespace}/{name}", kind.name());
    let making = if kind == Kind::Lease { Making::Lease } else { Making::ConfigMap };
    let is_absent = matches!(answer.there, Ok(false));
    let refusal = match &answer.write {
        Some(Write::Refused(refusal, text)) => Some((*refusal, text.as_str())),
        _ => None,
    };
    let may_not = is_absent
        && (may_create(answers, making) == Some(false) || matches!(refusal, Some((Refusal::Forbidden, _))));
    if may_not && answer.lock.writes {
        let right = Right {
            verb: "create",
            group: kind.group(),
            resource: kind.resource(),
            name: None,
            namespaced: true,
        };
        let account = whom(facts, answers);
        let fix = "make it beforehand, empty, as the first manifest does; or allow the account to make it, as the second one does: one of \
                   them is enough";
        let verdict =
            Verdict::new(Code::LockMissing, Confidence::High, fix).seen(format!("{shown} does not exist"));
        let manifests = [fix::lock(kind, namespace, name)];
        let role = fix::role(namespace, account.as_deref(), Code::LockMissing, &[&right]);
        return found.say(verdict.seen("it may not be made").apply(manifests).apply(role).either());
    }
    // Beside a lock of old its electors may hold the Lease, too: there Peili takes turns with them.
    if let Some((holder, is_ours)) = &answer.holder
        && !is_ours
        && kind == Kind::Lease
        && answers.locks.len() == 1
    {
        let fix = format!(
            "two programs of one name take turns, and neither works well: give this fleet a name of its own in `election.lease.name`, or \
             end the other one (`kubectl -n {namespace} get lease {name} -o yaml`)"
        );
        let verdict = Verdict::new(Code::LockForeign, Confidence::Medium, fix);
        found.say(
            verdict
                .seen(format!("{shown} is held by `{}`, and Peili has never written it", short(holder)))
                .or("an earlier program left it behind: it is taken after its duration"),
        );
    }
    match (&answer.write, refusal) {
        (_, Some((refusal, text))) => {
            if refusal == Refusal::Forbidden && may_replace(answers, answer) == Some(true) {
                let fix = "see the API server's words: a review says that the account may, and the write is forbidden";
                let verdict = Verdict::new(Code::WriteRefused, Confidence::Low, fix);
                found.say(verdict.seen(format!("{shown}: {text}")));
            } else if let Some(verdict) = refused(refusal) {
                found.say(verdict.seen(format!("{shown}: {text}")));
            } else if refusal == Refusal::NotDry {
                found.note(format!("{shown}: not tried, since a webhook takes no part in dry runs"));
            }
        }
        (Some(Write::Failed(fault)), _) if fault.cause == Cause::NoAnswer => {
            let fix = "a webhook that hangs, or a storage that is slow: look at ValidatingWebhookConfigurations and \
                       MutatingWebhookConfigurations that concern this kind, and at etcd";
            let verdict = Verdict::new(Code::WriteSilent, Confidence::Medium, fix);
            found.say(
                verdict
                    .seen(format!("{shown}: {}", fault.text))
                    .or("a webhook that has to be asked hangs")
                    .or("etcd is slow"),
            );
        }
        (Some(Write::Failed(fault)), _) => api::said(facts, fault, found),
        (Some(Write::Taken), _) => found.note(format!("{shown}: may be written")),
        _ => {}
    }
}

fn refused(refusal: Refusal) -> Option<Verdict> {
    Some(match refusal {
        Refusal::Quota => {
            let fix = "raise the ResourceQuota of the namespace, or let it not count this kind";
            Verdict::new(Code::Quota, Confidence::High, fix)
        }
        Refusal::Denied => {
            let fix = "exempt the lock (or Peili's namespace) from the webhook or the policy that is named";
            Verdict::new(Code::AdmissionDenied, Confidence::High, fix)
        }
        Refusal::WebhookDead => {
            let fix = "mend the webhook that is named, exempt this kind from it, or let its failurePolicy be Ignore";
            Verdict::new(Code::WebhookDead, Confidence::High, fix)
                .or("a policy of the network is between the API server and the webhook")
        }
        Refusal::Other => Verdict::new(
            Code::WriteRefused,
            Confidence::High,
            "see the API server's words, and `peili status`",
        ),
        // Said elsewhere, or nothing is wrong.
        Refusal::Forbidden
        | Refusal::NoNamespace
        | Refusal::Terminating
        | Refusal::NotDry
        | Refusal::Conflict => return None,
    })
}

fn summary(facts: &Facts, wanted: &Wanted, answers: &Answers, namespace: &str, found: &mut Found) {
    let is_absent = matches!(answers.summary, Some(Ok(false)));
    if is_absent && may_create(answers, Making::ConfigMap) == Some(false) {
        let right = Right { verb: "create", group: "", resource: "configmaps", name: None, namespaced: true };
        let account = whom(facts, answers);
        let fix = "make it beforehand, empty, as the first manifest does; or allow the account to make it, as the second one does: one of \
                   them is enough";
        let seen = format!("ConfigMap {namespace}/{} does not exist and may not be made", wanted.summary);
        found.say(
            Verdict::new(Code::SummaryMissing, Confidence::High, fix)
                .seen(seen)
                .apply([fix::lock(Kind::ConfigMap, namespace, &wanted.summary)])
                .apply(fix::role(namespace, account.as_deref(), Code::SummaryMissing, &[&right]))
                .either(),
        );
    }
}

/// Whom the rights are to be given to: what the server says counts more than what the token says.
fn whom(facts: &Facts, answers: &Answers) -> Option<String> {
    let said = answers.who.clone().or_else(|| Some(facts.account.subject.clone()));
    // A node's or a component's own name gets nothing by this hand.
    let is_own = |name: &String| !name.starts_with("system:") || name.starts_with("system:serviceaccount:");
    said.filter(|name| !name.is_empty() && is_own(name))
}

fn shown(right: &Right) -> String {
    let resource = match right.group {
        "" => right.resource.to_owned(),
        group => format!("{}.{group}", right.resource),
    };
    match &right.name {
        Some(name) => format!("{} {resource} `{name}`", right.verb),
        None => format!("{} {resource}", right.verb),
    }
}

fn short(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).take(120).collect()
}
