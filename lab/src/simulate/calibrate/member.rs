//! One process of the calibration: the network that ships, and nothing else of Peili. It does what it is told on standard
//! input, a line each, tells on standard output what became of it, and ends when its input does.
//!
//! Times are microseconds of the machine's monotonic clock, which all processes share.

use std::fmt;
use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use peili::network::admission::Admission;
use peili::network::identity::Identity;
use peili::network::metrics::Metrics;
use peili::network::swarm::{Announcement, Parts, Swarm, SwarmNetwork};
use peili::network::{Advertisement, Config, Network as _, PeerConfig, TagSource, Tagged};
use peili::oci::{Algorithm, Digest, Members, PeerId, Reference};
use peili::trust::{self, PinnedTrust};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// How often it is looked whether something is known: fifty processes that look more often keep a processor busy by that alone.
pub(super) const POLL: Duration = Duration::from_millis(5);

/// Where it is and whom it knows.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Address of the control plane
    #[arg(long)]
    listen: SocketAddr,
    /// File with the cluster key
    #[arg(long)]
    key: PathBuf,
    /// A member, as ID@ADDRESS
    #[arg(long)]
    peer: Option<String>,
}

/// What it is told. Contents go by the first 8 bytes of their digests, as in the gossip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// It holds exactly these.
    All(Vec<u64>),
    /// It holds this one too, and tells since when.
    Hold(u64),
    /// It tells when it knows a holder of this.
    Known(u64),
    /// It tells when it knows none.
    Gone(u64),
    /// It tells how many members it knows.
    Count,
}

/// What it tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// The network runs, and this is the peer's ID.
    Ready(String),
    /// Its view was complete so many microseconds after it had begun.
    Complete(u64),
    /// It holds a content since then.
    Held(u64, u64),
    /// Since then it knows a holder.
    Known(u64, u64),
    /// Since then it knows none.
    Gone(u64, u64),
    /// Live members that it knows, itself included.
    Members(usize),
}

/// Microseconds of the clock that all processes of a machine share.
pub(super) fn clock() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1_000
}

/// Runs until its input ends.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let mut orders = orders();
    // The first random byte of a process takes aws-lc 40 ms; in the node that ships it is long gone when the network starts.
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut [0]).map_err(|_| anyhow!("there is nothing random"))?;
    let began = clock();
    let (_swarm, network) = spawn(options)?;
    tell(&Word::Ready(network.peer_id().to_string()))?;
    let mut is_complete = false;
    let mut watched: Vec<Order> = Vec::new();
    let mut polls = tokio::time::interval(POLL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                None => return Ok(true),
                Some(Order::All(contents)) => {
                    network.advertise(Advertisement::All(contents.into_iter().map(digest).collect()));
                }
                Some(Order::Hold(content)) => {
                    let now = clock();
                    network.advertise(Advertisement::Added(digest(content)));
                    tell(&Word::Held(content, now))?;
                }
                Some(Order::Count) => tell(&Word::Members(network.status().members))?,
                Some(watch) => watched.push(watch),
            },
            _ = polls.tick(), if !is_complete || !watched.is_empty() => {
                let now = clock();
                if !is_complete && network.status().complete {
                    is_complete = true;
                    // It has found the others: from now on the gossip alone says to whom it is connected.
                    network.set_peers(Vec::new(), Vec::new());
                    tell(&Word::Complete(now - began))?;
                }
                let (seen, rest): (Vec<_>, Vec<_>) =
                    watched.drain(..).map(|order| (seen(&network, &order, now), order)).partition(|(word, _)| word.is_some());
                watched = rest.into_iter().map(|(_, order)| order).collect();
                for word in seen.iter().filter_map(|(word, _)| word.as_ref()) {
                    tell(word)?;
                }
            }
        }
    }
}

/// Whether what is watched has come about.
fn seen(network: &SwarmNetwork, order: &Order, now: u64) -> Option<Word> {
    match order {
        Order::Known(content) => {
            (!network.holders(&digest(*content)).is_empty()).then_some(Word::Known(*content, now))
        }
        Order::Gone(content) => {
            network.holders(&digest(*content)).is_empty().then_some(Word::Gone(*content, now))
        }
        Order::All(_) | Order::Hold(_) | Order::Count => None,
    }
}

/// The network by cluster key, as most run it, with a record as long as those in the simulation.
fn spawn(options: &Options) -> Result<(Swarm, SwarmNetwork)> {
    let peers = options.peer.iter().map(|peer| {
        let (id, address) = peer.split_once('@').context("a member is ID@ADDRESS")?;
        Ok(PeerConfig { id: id.parse()?, addresses: vec![address.to_owned()] })
    });
    let config = Config {
        listen: vec![options.listen],
        cluster_key: vec![options.key.clone()],
        peers: peers.collect::<Result<_>>()?,
        ..Config::default()
    };
    let identity = Identity::generate();
    let trusted = trust::Peers { by_key: true, ..trust::Peers::default() };
    let gate = Arc::new(PinnedTrust::new(trust::Config::default(), trusted)?);
    let metrics = Metrics::default();
    let members = Arc::clone(&gate) as Arc<dyn Members>;
    let admission = Admission::new(identity.peer_id().clone(), &config, members, metrics.clone());
    let address = options.listen.ip().to_string();
    let announcement = Announcement {
        transfer: vec![SocketAddr::new(options.listen.ip(), options.listen.port() + 1)],
        node: format!("ip-{}.eu-central-1.compute.internal", address.replace('.', "-")),
        zone: "eu-central-1a".into(),
        version: "0.1.0".into(),
    };
    let parts = Parts { gate, admission, tags: Arc::new(NoTags), metrics, keep: None, first: None };
    Ok(Swarm::spawn(&identity, &config, &announcement, parts)?)
}

struct NoTags;

impl TagSource for NoTags {
    fn tag(&self, _: &PeerId, _: &Reference) -> Option<Tagged> {
        None
    }
}

/// A digest that the gossip knows by this key.
fn digest(content: u64) -> Digest {
    let bytes = [content; 4].map(u64::to_le_bytes).concat();
    Digest::from_bytes(Algorithm::Sha256, &bytes).unwrap_or_else(|| Digest::sha256(&bytes))
}

/// What comes on standard input; the channel ends with it.
fn orders() -> mpsc::UnboundedReceiver<Order> {
    let (sender, orders) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(Ok(order)) = line.map(|line| line.parse()) else { return };
            if sender.send(order).is_err() {
                return;
            }
        }
    });
    orders
}

fn tell(word: &Word) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{word}").context("nobody listens")
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(contents) => {
                f.write_str("all")?;
                contents.iter().try_for_each(|content| write!(f, " {content}"))
            }
            Self::Hold(content) => write!(f, "hold {content}"),
            Self::Known(content) => write!(f, "known {content}"),
            Self::Gone(content) => write!(f, "gone {content}"),
            Self::Count => f.write_str("count"),
        }
    }
}

impl FromStr for Order {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        Ok(match verb {
            "all" => Self::All(rest.split_whitespace().map(str::parse).collect::<Result<_, _>>()?),
            "hold" => Self::Hold(rest.parse()?),
            "known" => Self::Known(rest.parse()?),
            "gone" => Self::Gone(rest.parse()?),
            "count" => Self::Count,
            _ => bail!("not an order: {line}"),
        })
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(id) => write!(f, "ready {id}"),
            Self::Complete(after) => write!(f, "complete {after}"),
            Self::Held(content, at) => write!(f, "held {content} {at}"),
            Self::Known(content, at) => write!(f, "known {content} {at}"),
            Self::Gone(content, at) => write!(f, "gone {content} {at}"),
            Self::Members(count) => write!(f, "members {count}"),
        }
    }
}

impl FromStr for Word {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Ok(match words[..] {
            ["ready", id] => Self::Ready(id.to_owned()),
            ["complete", after] => Self::Complete(after.parse()?),
            ["held", content, at] => Self::Held(content.parse()?, at.parse()?),
            ["known", content, at] => Self::Known(content.parse()?, at.parse()?),
            ["gone", content, at] => Self::Gone(content.parse()?, at.parse()?),
            ["members", count] => Self::Members(count.parse()?),
            _ => bail!("not a word: {line}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for order in
            [Order::All(vec![1, u64::MAX]), Order::Hold(2), Order::Known(3), Order::Gone(4), Order::Count]
        {
            assert_eq!(order.to_string().parse::<Order>().unwrap(), order);
        }
        let words = [
            Word::Ready("id".into()),
            Word::Complete(1),
            Word::Held(2, 3),
            Word::Known(4, 5),
            Word::Gone(6, 7),
            Word::Members(8),
        ];
        for word in words {
            assert_eq!(word.to_string().parse::<Word>().unwrap(), word);
        }
        assert!("hold".parse::<Order>().is_err() && "ready".parse::<Word>().is_err());
    }

    #[test]
    fn a_content_has_the_key_that_the_gossip_gives_its_digest() {
        assert_eq!(digest(0x0102).as_bytes()[..8], 0x0102_u64.to_le_bytes());
    }
}
