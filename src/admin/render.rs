//! The status for people: plain text, aligned, no wider than the terminal where that can be.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;

use super::{Status, StoreHealth};
use crate::network::PeerStatus;
use crate::registry::Amount;
use crate::telemetry::Cause;

/// Causes that are shown; `/status` has all.
const CAUSES: usize = 10;

/// Narrower than this, lines are cut off as if it were this wide.
const NARROWEST: usize = 40;

/// `status` as text of at most `width` columns; 0: as wide as it gets.
pub fn render(status: &Status, width: usize) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    render_at(status, width, now)
}

pub(super) fn render_at(status: &Status, width: usize, now: u64) -> String {
    let mut text = String::new();
    heading(&mut text, status);
    served(&mut text, status);
    peers(&mut text, status);
    causes(&mut text, &status.causes, now);
    let width = if width == 0 { usize::MAX } else { width.max(NARROWEST) };
    text.lines().map(|line| cut(line.trim_end(), width) + "\n").collect()
}

fn heading(text: &mut String, status: &Status) {
    let node = &status.node;
    let uptime = humantime::format_duration(Duration::from_secs(node.uptime_seconds));
    let name = if node.name.is_empty() { "-" } else { &node.name };
    let zone = if node.zone.is_empty() { String::new() } else { format!(" in zone {}", node.zone) };
    let store = &status.store;
    let health = match &store.health {
        StoreHealth::Starting => "starting: not read yet".into(),
        StoreHealth::Ready => "ready".into(),
        StoreHealth::Degraded { reason } => format!("degraded: {reason}"),
    };
    let bytes = store.bytes.map(|bytes| format!(", {}", size(bytes))).unwrap_or_default();
    let connected = status.network.peers.iter().filter(|peer| peer.connected).count();
    let rows = [
        vec!["Node".into(), format!("{name}{zone}, up {uptime}, peili {}", node.version)],
        vec!["Peer ID".into(), node.peer_id.clone()],
        vec!["Store".into(), format!("{} {health}", store.source)],
        vec![
            "Holds".into(),
            format!(
                "{}, {}{bytes}",
                counted(store.images, "image", "images"),
                counted(store.digests, "digest", "digests")
            ),
        ],
        vec![
            "Peers".into(),
            format!(
                "{connected} of {} connected, {} advertised",
                status.network.peers.len(),
                counted(status.network.advertised as u64, "digest", "digests")
            ),
        ],
    ];
    table(text, &rows, "");
    let problems = status.problems.iter().chain(&status.network.problems);
    for (index, problem) in problems.enumerate() {
        if index == 0 {
            text.push_str("\nProblems\n");
        }
        for line in problem.lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
}

fn served(text: &mut String, status: &Status) {
    let served = &status.served;
    let row = |what: &str, amount: Amount| vec![what.into(), amount.requests.to_string(), size(amount.bytes)];
    text.push_str("\nServed\n");
    let rows = [
        vec![String::new(), "REQUESTS".into(), "BYTES".into()],
        row("to the runtime from here", served.local),
        row("to the runtime from peers", served.from_peers),
        row("to peers", served.to_peers),
        vec!["not here, sent to the next host".into(), served.not_here.to_string()],
    ];
    table(text, &rows, "  ");
}

fn peers(text: &mut String, status: &Status) {
    if status.network.peers.is_empty() {
        return;
    }
    text.push_str("\nPeers\n");
    let header = ["NODE", "ZONE", "TRUST", "HOLDS", "VERSION", "PEER", "STATE"].map(String::from).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(status.network.peers.iter().map(peer)).collect();
    table(text, &rows, "  ");
}

fn peer(peer: &PeerStatus) -> Vec<String> {
    let known = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let state = match peer.connected {
        true => "connected".to_owned(),
        false if peer.problem.is_empty() => "not connected".to_owned(),
        false => peer.problem.clone(),
    };
    vec![
        known(&peer.node),
        known(&peer.zone),
        format!("{:?}", peer.level).to_lowercase(),
        peer.holds.to_string(),
        known(&peer.version),
        short(&peer.id),
        state,
    ]
}

fn causes(text: &mut String, causes: &[Cause], now: u64) {
    if causes.is_empty() {
        return;
    }
    text.push_str("\nLast not served\n");
    let header = ["AGO", "TIMES", "KIND", "CAUSE", "WHAT"].map(String::from).to_vec();
    let rows = causes.iter().take(CAUSES).map(|cause| {
        let ago = humantime::format_duration(Duration::from_secs(now.saturating_sub(cause.time)));
        // The largest unit is enough.
        let ago = ago.to_string().split(' ').next().unwrap_or_default().to_owned();
        vec![ago, cause.count.to_string(), cause.kind.clone(), cause.cause.clone(), cause.subject.clone()]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    table(text, &rows, "  ");
    if causes.len() > CAUSES {
        let _ = writeln!(text, "  and {} more in /status", causes.len() - CAUSES);
    }
}

/// Columns as wide as their widest cell, two spaces apart. The last one is not filled up.
fn table(text: &mut String, rows: &[Vec<String>], indent: &str) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        text.push_str(indent);
        for (cell, width) in row.iter().zip(&widths) {
            // Cells are one line each, whatever a peer calls itself.
            let cell: String = cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            let _ = write!(text, "{cell:width$}  ");
        }
        text.push('\n');
    }
}

fn cut(line: &str, width: usize) -> String {
    if line.chars().count() <= width {
        return line.to_owned();
    }
    let mut cut: String = line.chars().take(width - 1).collect();
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
