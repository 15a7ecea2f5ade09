//! The status for people: plain text, aligned, no wider than the terminal where that can be.

mod election;

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;

use super::{Status, StoreHealth};
use crate::network::admission::{self, Mode};
use crate::network::{MemberState, PeerStatus};
use crate::oci::Health;
use crate::registry::Amount;
use crate::telemetry::Cause;
use crate::{mirror, policy, trust};

pub use election::{render_election, render_explained};

/// Causes that are shown; `/status` has all.
const CAUSES: usize = 10;

/// A terminal narrower than this is written to as if it were this wide.
const NARROWEST: usize = 40;

/// Columns of a table are not made narrower than this.
const NARROWEST_COLUMN: usize = 5;

/// Between two columns.
const GAP: usize = 2;

/// What is written, and how wide it may get.
struct Page {
    text: String,
    width: usize,
}

/// `status` as text of at most `width` columns; 0: as wide as it gets.
pub fn render(status: &Status, width: usize) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    render_at(status, width, now)
}

pub(super) fn render_at(status: &Status, width: usize, now: u64) -> String {
    let width = if width == 0 { usize::MAX } else { width.max(NARROWEST) };
    let mut page = Page { text: String::new(), width };
    heading(&mut page, status, now);
    served(&mut page, status);
    peers(&mut page, status);
    causes(&mut page, &status.causes, now);
    page.text
}

/// What decides about an image, as text.
pub fn render_pull(explained: &mirror::Explained) -> String {
    let mirror::Explained { image, local, peers, said, ruling, by, enforced } = explained;
    let mut page = Page { text: String::new(), width: usize::MAX };
    page.line("Image    ", image);
    let here = if *local { "here, " } else { "" };
    let held = match peers {
        Some(peers) => format!("{here}by {}", counted(u64::from(*peers), "trusted peer", "trusted peers")),
        None => "not known by a tag: ask by digest".to_owned(),
    };
    page.line("Held     ", &held);
    policies_said(&mut page, said);
    let by = by.as_ref().map(|by| format!(", by {by}")).unwrap_or_default();
    page.line("Ruling   ", &format!("{ruling}{by}"));
    page.line("Enforced ", enforced);
    page.text
}

/// What decides about a peer, as text.
pub fn render_peer(explained: &trust::Explained) -> String {
    let trust::Explained { peer, node, proof, said, ruling, standing, seconds, level, serve } = explained;
    let mut page = Page { text: String::new(), width: usize::MAX };
    page.line("Peer     ", peer);
    page.line("Node     ", &known(node));
    page.line("Proof    ", if proof.is_empty() { "none" } else { proof });
    policies_said(&mut page, said);
    page.line("Ruling   ", ruling);
    if !standing.is_empty() {
        let end = humantime::format_duration(Duration::from_secs(*seconds));
        page.line("Stands   ", &format!("{standing}, for {end}"));
    }
    let serve = if *serve { "is served" } else { "is not served" };
    page.line("Enforced ", &format!("level {level}, {serve}"));
    page.text
}

fn policies_said(page: &mut Page, said: &[policy::Said]) {
    for (index, policy::Said { policy, mode, micros, verdict }) in said.iter().enumerate() {
        let mode = if *mode == policy::Mode::Monitor { " (monitored only)" } else { "" };
        let name = if index == 0 { "Policies " } else { "         " };
        page.line(name, &format!("{policy}{mode}: {verdict}, {micros} us"));
    }
}

fn heading(page: &mut Page, status: &Status, now: u64) {
    let (node, store, network) = (&status.node, &status.store, &status.network);
    let mut about = vec![known(&node.name)];
    if !node.zone.is_empty() {
        about.push(format!("zone {}", node.zone));
    }
    about.push(format!("up {}", humantime::format_duration(Duration::from_secs(node.uptime_seconds))));
    if !node.version.is_empty() {
        about.push(format!("peili {}", node.version));
    }
    let health = match &store.health {
        StoreHealth::Starting => "not read yet".into(),
        StoreHealth::Ready => "ready".into(),
        StoreHealth::Degraded { reason } => format!("degraded: {reason}"),
    };
    let bytes = store.bytes.map(|bytes| format!(", {}", size(bytes))).unwrap_or_default();
    let images = counted(store.images, "image", "images");
    let digests = counted(store.digests, "digest", "digests");
    let connected = network.peers.iter().filter(|peer| peer.connected).count();
    page.line("Node     ", &about.join(", "));
    page.line("Peer ID  ", &known(&node.peer_id));
    page.line("Store    ", &format!("{}, {health}", known(&store.source)));
    page.line("Holds    ", &format!("{images}, {digests} ({} advertised){bytes}", network.advertised));
    page.line("Peers    ", &format!("{connected} of {} connected", network.peers.len()));
    let view = if network.complete { "view complete" } else { "view not complete yet: neighbours are asked" };
    page.line("Members  ", &format!("{} live, {view}", network.members));
    if let Some(admission) = &network.admission {
        page.line("Admits   ", &admitted(admission, now));
    }
    for (index, policy) in status.policies.iter().enumerate() {
        let mode = if policy.mode == policy::Mode::Monitor { " (monitored only)" } else { "" };
        page.line(
            if index == 0 { "Policies " } else { "         " },
            &format!("{} ({}){mode}: {}", policy.name, policy.world, policy.summary),
        );
    }
    if let Some(election) = election::line(&status.election) {
        page.line("Election ", &election);
    }
    let silent: Vec<&str> = status
        .registries
        .iter()
        .filter(|registry| !registry.answers)
        .map(|registry| registry.name.as_str())
        .collect();
    if !silent.is_empty() {
        let all = status.registries.len();
        page.line(
            "Registry ",
            &format!("{} of {all} asked lately do not answer: {}", silent.len(), silent.join(", ")),
        );
    }
    for (index, upstream) in status.upstreams.iter().enumerate() {
        let health = match upstream.health {
            Health::Unknown => "not asked yet",
            Health::Healthy => "healthy",
            Health::Degraded => "degraded",
            Health::RateLimited => "rate-limited",
            Health::Unreachable => "unreachable",
        };
        let latency = upstream.latency_millis.map(|millis| format!(", {millis} ms")).unwrap_or_default();
        let name = if index == 0 { "Upstream " } else { "         " };
        page.line(name, &format!("{}: {health}{latency}", upstream.name));
    }
    // The network's are among them.
    for (index, problem) in status.problems.iter().enumerate() {
        if index == 0 {
            page.text.push_str("\nProblems\n");
        }
        for (number, line) in problem.lines().enumerate() {
            page.line(if number == 0 { "  - " } else { "    " }, line);
        }
    }
}

/// Who is admitted, and by what this node is.
fn admitted(admission: &admission::Status, now: u64) -> String {
    let admission::Status { mode, cluster, keys, certificate_until } = admission;
    match mode {
        Mode::Open => "whoever comes, for blobs: the network is open".into(),
        Mode::List => "listed peers".into(),
        Mode::Key if keys.is_empty() => format!("listed peers; cluster {cluster}: no key yet"),
        Mode::Key => {
            let keys = keys.join(" and ");
            let left = certificate_until.map_or(0, |until| until.saturating_sub(now)) / 60 * 60;
            let left = humantime::format_duration(Duration::from_secs(left));
            format!("members of cluster {cluster} by key {keys}; own certificate good for {left}")
        }
    }
}

fn served(page: &mut Page, status: &Status) {
    let served = &status.served;
    let row = |what: &str, amount: Amount| vec![what.into(), amount.requests.to_string(), size(amount.bytes)];
    page.text.push('\n');
    let mut rows = vec![
        vec!["Served to".into(), "REQUESTS".into(), "BYTES".into()],
        row("  the runtime, from here", served.local),
        row("  the runtime, from peers", served.from_peers),
        row("  the runtime, from upstreams", served.from_upstreams),
        row("  peers", served.to_peers),
        vec!["Not here, passed on".into(), served.not_here.to_string()],
    ];
    if status.upstreams.is_empty() {
        rows.remove(3);
    }
    page.table(&rows, &[]);
}

fn peers(page: &mut Page, status: &Status) {
    if status.network.peers.is_empty() {
        return;
    }
    page.text.push_str("\nPeers\n");
    let header =
        ["  NODE", "ZONE", "TRUST", "PROOF", "HOLDS", "VERSION", "PEER", "STATE"].map(String::from).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(status.network.peers.iter().map(peer)).collect();
    // Version, zone, trust: what others show too.
    page.table(&rows, &[5, 1, 2, 3]);
}

fn peer(peer: &PeerStatus) -> Vec<String> {
    let since = humantime::format_duration(Duration::from_secs(peer.seconds));
    let state = match (peer.connected, peer.state) {
        (true, None) => "connected".to_owned(),
        (true, Some(MemberState::Alive)) if peer.neighbour => format!("neighbour, alive for {since}"),
        (true, Some(MemberState::Alive)) => format!("connected, alive for {since}"),
        (_, Some(state)) if peer.problem.is_empty() => format!("{state:?} for {since}").to_lowercase(),
        (_, _) if peer.problem.is_empty() => "not connected".to_owned(),
        (_, _) => peer.problem.clone(),
    };
    vec![
        format!("  {}", known(&peer.node)),
        known(&peer.zone),
        format!("{:?}", peer.level).to_lowercase(),
        known(&peer.proof),
        peer.holds.to_string(),
        known(&peer.version),
        short(&peer.id),
        state,
    ]
}

fn causes(page: &mut Page, causes: &[Cause], now: u64) {
    if causes.is_empty() {
        return;
    }
    page.text.push_str("\nLast not served\n");
    let header = ["  AGO", "TIMES", "KIND", "CAUSE", "WHAT"].map(String::from).to_vec();
    let rows = causes.iter().take(CAUSES).map(|cause| {
        let ago = humantime::format_duration(Duration::from_secs(now.saturating_sub(cause.time)));
        // The largest unit is enough.
        let ago = format!("  {}", ago.to_string().split(' ').next().unwrap_or_default());
        let what = known(&cause.subject);
        vec![ago, cause.count.to_string(), cause.kind.clone(), cause.cause.clone(), what]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    // The cause and its subject say what kind it is.
    page.table(&rows, &[2]);
    if causes.len() > CAUSES {
        page.line("  ", &format!("and {} more in /status", causes.len() - CAUSES));
    }
}

impl Page {
    /// `value` after `label`, in as many lines as it needs: what is wrong and what to do must be readable in full. A
    /// word wider than a line stays whole, so that it can be copied.
    fn line(&mut self, label: &str, value: &str) {
        let indent = label.chars().count();
        let mut line = label.to_owned();
        let mut used = indent;
        for word in value.split_whitespace() {
            let length = word.chars().count();
            if used > indent && used + 1 + length > self.width {
                self.end_line(&line);
                line = " ".repeat(indent);
                used = indent;
            }
            if used > indent {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
            used += length;
        }
        self.end_line(&line);
    }

    /// Columns as wide as their widest cell. Where that is too wide for the page, the `optional` ones are left out, the
    /// first first, and then the widest ones are cut.
    fn table(&mut self, rows: &[Vec<String>], optional: &[usize]) {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let widest = |column: usize| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<_> = (0..columns).map(widest).collect();
        let mut optional = optional.iter();
        loop {
            let shown = widths.iter().filter(|width| **width > 0).count();
            if widths.iter().sum::<usize>() + GAP * shown.saturating_sub(1) <= self.width {
                break;
            }
            if let Some(width) = optional.next().and_then(|column| widths.get_mut(*column)) {
                *width = 0;
                continue;
            }
            match widths.iter_mut().max() {
                Some(widest) if *widest > NARROWEST_COLUMN => *widest -= 1,
                _ => break,
            }
        }
        for row in rows {
            let mut line = String::new();
            for (cell, &width) in row.iter().zip(&widths).filter(|(_, width)| **width > 0) {
                let cell = cut(cell, width);
                let _ = write!(line, "{cell:width$}{:GAP$}", "");
            }
            self.end_line(&line);
        }
    }

    /// One line, whatever a peer calls itself.
    fn end_line(&mut self, line: &str) {
        self.text.extend(line.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }));
        self.text.push('\n');
    }
}

fn known(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    let mut cut: String = cell.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// The end of a peer ID tells peers apart; all begin alike.
fn short(id: &str) -> String {
    let count = id.chars().count();
    if count <= 12 { id.to_owned() } else { format!("…{}", id.chars().skip(count - 8).collect::<String>()) }
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
