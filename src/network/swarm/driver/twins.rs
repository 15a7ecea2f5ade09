//! Two processes with one identity, as a copied disk makes them: found, and named. Nothing is refused.

use std::net::IpAddr;
use std::time::Duration;

use super::super::view::Subject;
use super::{Driver, Link};

/// What a process that has ended may still have sent before a new one said hello.
const MARGIN: Duration = Duration::from_millis(500);

impl Driver {
    /// Notes for each peer whether two processes with its identity are connected.
    pub(super) fn name_twins(&self) {
        for link in self.links.values() {
            let text = link.twins().map(|ips| {
                let [one, other] = ips.map(|ip| ip.map_or_else(|| "?".to_owned(), |ip| ip.to_string()));
                format!(
                    "peer {}: two processes use its identity at once, at {one} and {other}; each node needs its own \
                     (was a node's disk copied with node.data-dir on it?)",
                    link.id
                )
            });
            self.shared.problem(Subject::Twins(link.id.clone()), text);
        }
    }
}

impl Link {
    /// Where the two are. Both must have answered after the later hello: the connection of a process that was
    /// restarted lives on for a while, but nobody answers there.
    fn twins(&self) -> Option<[Option<IpAddr>; 2]> {
        let mut greeted =
            self.connections.values().filter_map(|connection| Some((connection, connection.said?)));
        let (one, (first, since)) = greeted.next()?;
        greeted.find_map(|(other, (second, later))| {
            let both = one.answered.min(other.answered) > since.max(later) + MARGIN;
            (first != second && both).then(|| {
                let mut ips = [one.ip, other.ip];
                ips.sort_unstable();
                ips
            })
        })
    }
}
