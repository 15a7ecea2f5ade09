//! Elections for people.

use super::{Page, known, short};
use crate::election::{By, Compared, Explained, Holder, LeaseStatus, Role, RoleStatus, Status};

/// Elections as one line of a node's status; `None`: nothing is known yet.
pub(super) fn line(status: &Status) -> Option<String> {
    if status.mode.is_empty() {
        return None;
    }
    let mut text = mode(status);
    for role in status.roles.iter().filter(|role| !role.holders.is_empty()) {
        text.push_str(&format!("; {}: {}", role.role, names(&role.holders)));
    }
    Some(text)
}

/// `peili election status` as text.
pub fn render_election(status: &Status) -> String {
    let mut page = Page { text: String::new(), width: usize::MAX };
    if status.mode.is_empty() {
        page.line("Mode     ", "not known yet");
        return page.text;
    }
    page.line("Mode     ", &mode(status));
    if !status.remedy.is_empty() {
        page.line("         ", &status.remedy);
    }
    page.line("Members  ", &format!("{} live", status.members));
    let agreed = if status.agreed { ", they rank" } else { "" };
    page.line(
        "Policies ",
        &format!("{}, carried by {} of {}{agreed}", status.policy, status.carry, status.members),
    );
    let compared = |Compared { same, other }: Compared| format!("{same} the same, {other} other");
    let neighbours =
        format!("see candidates: {}; owners: {}", compared(status.views), compared(status.owners));
    page.line("Neighbours ", &neighbours);
    for lease in [&status.lease, &status.configmap].into_iter().flatten() {
        page.line("Lock     ", &lease_line(lease));
        if !lease.fault.is_empty() {
            page.line("         ", &lease.fault);
        }
    }
    page.text.push('\n');
    let header = ["ROLE", "BY", "HERE", "CANDIDATES", "HOLDERS", "WHY"].map(String::from).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(status.roles.iter().map(role)).collect();
    page.table(&rows, &[]);
    page.text
}

/// Why a role is held as it is, as text.
pub fn render_explained(explained: &Explained) -> String {
    let Explained { role, key, owners, policy, carry, members, said, candidates } = explained;
    let mut page = Page { text: String::new(), width: usize::MAX };
    page.line("Role     ", &role.role);
    if let Some(key) = key {
        page.line("Key      ", key);
    }
    page.line(
        "Held by  ",
        &match (owners.is_empty(), key) {
            (false, _) => names(owners),
            (true, None) if role.role == Role::TagHome.name() && role.candidates > 0 => {
                "for each key another one; name a key to see whom".into()
            }
            (true, _) => "nobody".into(),
        },
    );
    let fallback = if role.fallback.is_empty() { String::new() } else { format!(" ({})", role.fallback) };
    page.line("Ranked   ", &format!("{}{fallback}: {}", by(role.by), role.why));
    page.line("Policies ", &format!("{policy}, carried by {carry} of {members}"));
    for policy in said {
        page.line("         ", &format!("{}: {}, {} us", policy.policy, policy.verdict, policy.micros));
    }
    page.text.push('\n');
    let header = ["NODE", "ZONE", "WEIGHT", "HOLDS", "PEER"].map(String::from).to_vec();
    let rows = candidates.iter().map(|standing| {
        let holds = if standing.holds { "yes" } else { "" };
        let (node, zone) = (known(&standing.node), known(&standing.zone));
        vec![node, zone, standing.weight.to_string(), holds.into(), short(&standing.id)]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    page.table(&rows, &[]);
    page.text
}

fn lease_line(lease: &LeaseStatus) -> String {
    let seconds = |millis: u64| format!("{:.1} s", millis as f64 / 1_000.0);
    let object = &lease.object;
    let mut parts = vec![match (lease.holder.as_str(), lease.age_millis) {
        ("", _) => format!("{object} is held by nobody"),
        (holder, Some(age)) => format!("{object} is held by {holder}, renewed {} ago", seconds(age)),
        (holder, None) => format!("{object} is held by {holder}"),
    }];
    if !lease.standing.is_empty() {
        parts.push(format!("this node is {}", lease.standing));
    }
    if !lease.token.is_empty() {
        parts.push(format!("it leads by token {}", lease.token));
    }
    match lease.reached {
        Some(true) => parts.push("the API server is reached".into()),
        Some(false) => parts.push("the API server is not reached".into()),
        None => {}
    }
    parts.join("; ")
}

fn mode(status: &Status) -> String {
    if status.cause.is_empty() { status.mode.clone() } else { format!("{} ({})", status.mode, status.cause) }
}

fn by(by: By) -> &'static str {
    match by {
        By::Policy => "policies",
        By::BuiltIn => "built-in",
        By::Static => "configuration",
        By::Nobody => "nobody",
    }
}

fn role(role: &RoleStatus) -> Vec<String> {
    let here = if role.held { "yes" } else { "no" };
    let holders = if role.holders.is_empty() { "-".into() } else { names(&role.holders) };
    let why =
        if role.fallback.is_empty() { role.why.clone() } else { format!("{}: {}", role.fallback, role.why) };
    vec![role.role.clone(), by(role.by).into(), here.into(), role.candidates.to_string(), holders, why]
}

fn names(holders: &[Holder]) -> String {
    let name = |holder: &Holder| if holder.node.is_empty() { short(&holder.id) } else { holder.node.clone() };
    holders.iter().map(name).collect::<Vec<_>>().join(", ")
}
