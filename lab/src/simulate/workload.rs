//! What happens in a simulated cluster, and what is measured of it.

use peili::network::gossip::members::Member;
use peili::network::gossip::{Key, Ms};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::holdings::{DISTINCT, Set, content};
use super::world::{STEP, World};

/// Time until the links are there and the tree is formed, which does not count.
pub(super) const WARM: Ms = 15_000;
/// Contents that a node pulls after it has replaced another, in a minute (issue 4).
const PULLS: u64 = 300;
/// Contents that every node gets in a minute in a burst (issue 4).
const BURST: u64 = 12;
/// Nodes replaced in a minute, of a hundred.
const REPLACED: f64 = 1.0;
/// Part of the nodes that dies at once.
const MASSACRE: f64 = 0.3;
/// How often it is looked who knows what.
pub(super) const LOOK: Ms = 25;
/// How often a change is followed.
pub(super) const FOLLOWED: Ms = 500;
/// A change that has not arrived by then is lost.
pub(super) const LOST: Ms = 10_000;
/// Deaths that are followed at once.
const DEATHS: usize = 50;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Scenario {
    /// 1 % of the nodes are replaced per minute by new machines, each of which pulls 300 contents
    Churn,
    /// The same, and 12 new contents on every node within a minute
    Burst,
    /// 30 % of the nodes are gone at once
    Massacre,
    /// The first one with links that never become lazy: the next best candidate
    Flood,
    /// Nothing
    Quiet,
}

/// Where a simulation differs from those of docs/network.md.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// What a frame takes from one node to another.
    pub(super) step: Ms,
    /// How often it is looked who knows what.
    pub(super) look: Ms,
    /// One node is replaced each time that this has passed, until shortly before the end. `None`: issue 4's part of them, at
    /// random.
    pub(super) replaced: Option<Ms>,
}

/// One simulation.
pub(super) struct Workload {
    nodes: usize,
    seconds: u64,
    scenario: Scenario,
    pace: Pace,
    rng: SmallRng,
    world: World,
    start: Ms,
    followed: Vec<Change>,
    deaths: Vec<Death>,
    change_ms: Vec<Ms>,
    failure_ms: Vec<Ms>,
    lost: u64,
}

/// A change that is followed.
struct Change {
    at: Ms,
    owner: Key,
    version: u32,
    missing: Vec<usize>,
    of: usize,
}

/// A death that is followed.
struct Death {
    at: Ms,
    key: Key,
    missing: Vec<usize>,
    of: usize,
}

/// What was measured.
pub(super) struct Figures {
    pub(super) kib_mean: f64,
    pub(super) kib_p99: f64,
    /// The same in the mean with nodes that came or went meanwhile, as a meter on the wire has it.
    pub(super) kib_wire: f64,
    pub(super) frames: f64,
    /// Median and p99.
    pub(super) change_ms: Option<(f64, f64)>,
    /// Median and p99.
    pub(super) failure_ms: Option<(f64, f64)>,
    /// Median and p99.
    pub(super) join_ms: Option<(f64, f64)>,
    pub(super) lost: u64,
    pub(super) duplicates: f64,
    /// Bytes that a node sends per second, by what they are for.
    pub(super) parts: Vec<(&'static str, f64)>,
}

impl Scenario {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Churn => "churn",
            Self::Burst => "burst",
            Self::Massacre => "massacre",
            Self::Flood => "flood",
            Self::Quiet => "quiet",
        }
    }
}

impl Workload {
    pub(super) fn new(nodes: usize, seconds: u64, scenario: Scenario, seed: u64) -> Self {
        let pace = Pace { step: STEP, look: LOOK, replaced: None };
        Self::at(pace, nodes, seconds, scenario, seed)
    }

    /// The same at another pace.
    pub(super) fn at(pace: Pace, nodes: usize, seconds: u64, scenario: Scenario, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let sets = (0..nodes).map(|_| Set::random(&mut rng)).collect();
        let world = World::new(sets, scenario == Scenario::Flood, pace.step);
        let start = world.now;
        Self {
            nodes,
            seconds,
            scenario,
            pace,
            rng,
            world,
            start,
            followed: Vec::new(),
            deaths: Vec::new(),
            change_ms: Vec::new(),
            failure_ms: Vec::new(),
            lost: 0,
        }
    }

    /// Runs it; `progress` gets a line every now and then.
    pub(super) fn run(mut self, progress: impl Fn(String)) -> Figures {
        let (measured, end) = (self.start + WARM, self.start + WARM + self.seconds * 1000);
        while self.world.now < end {
            self.world.step();
            let now = self.world.now;
            if self.scenario != Scenario::Quiet {
                self.replace(now >= measured, end);
            }
            if now == measured {
                self.world.reset();
                self.begin();
            }
            if now >= measured && now.is_multiple_of(FOLLOWED) && now + LOST / 2 < end {
                self.follow_a_change();
            }
            if now.is_multiple_of(self.pace.look) {
                self.look();
            }
            if now.is_multiple_of(10_000) {
                let at = (now - self.start) / 1000;
                progress(format!("{} of {} nodes: {at} s", self.scenario.name(), self.nodes));
            }
        }
        self.figures()
    }

    fn random_node(&mut self) -> usize {
        let running = self.world.running();
        running[self.rng.random_range(0..running.len())]
    }

    /// Now and then a machine is gone, and a new one comes.
    fn replace(&mut self, is_measured: bool, end: Ms) {
        let now = self.world.now;
        let is_time = if let Some(pause) = self.pace.replaced {
            (now - self.start).is_multiple_of(pause) && now + LOST / 2 < end
        } else {
            let per_step = self.nodes as f64 * REPLACED / 100.0 / 60_000.0 * self.pace.step as f64;
            self.rng.random::<f64>() < per_step
        };
        if !is_time {
            return;
        }
        let victim = self.random_node();
        let Some(key) = self.world.vanish(victim) else { return };
        if is_measured && self.scenario != Scenario::Massacre && self.deaths.len() < DEATHS {
            let missing = self.world.running();
            self.deaths.push(Death { at: self.world.now, key, of: missing.len(), missing });
        }
        let neighbour = self.random_node();
        let number = self.world.start();
        self.world.connect(number, neighbour);
        let pulls = pulls(now, &mut self.rng);
        if let Some(node) = &mut self.world.nodes[number] {
            node.pulls = pulls.into();
        }
    }

    /// What happens once, when measuring begins.
    fn begin(&mut self) {
        let now = self.world.now;
        match self.scenario {
            Scenario::Burst => {
                for node in self.world.nodes.iter_mut().flatten() {
                    let new = (0..BURST).map(|_| (now + self.rng.random_range(0..60_000), self.rng.random()));
                    node.pulls.extend(new);
                    node.pulls.make_contiguous().sort_unstable();
                }
            }
            Scenario::Massacre => {
                let doomed: Vec<usize> = self
                    .world
                    .running()
                    .into_iter()
                    .filter(|_| self.rng.random::<f64>() < MASSACRE)
                    .collect();
                let keys: Vec<Key> =
                    doomed.into_iter().filter_map(|number| self.world.vanish(number)).collect();
                let survivors = self.world.running();
                self.deaths.extend(keys.into_iter().take(DEATHS).map(|key| Death {
                    at: now,
                    key,
                    of: survivors.len(),
                    missing: survivors.clone(),
                }));
            }
            Scenario::Churn | Scenario::Flood | Scenario::Quiet => {}
        }
    }

    fn follow_a_change(&mut self) {
        if self.scenario == Scenario::Quiet {
            return;
        }
        let owner = self.random_node();
        let joined =
            |world: &World, number: usize| world.node(number).is_some_and(|node| node.joined.is_some());
        if !joined(&self.world, owner) {
            return;
        }
        self.world.hold(owner, self.rng.random());
        let Some(own) = self.world.node(owner).map(|node| node.gossip.members().own()) else { return };
        let (owner, version) = (own.key, own.version);
        let missing: Vec<usize> =
            self.world.running().into_iter().filter(|number| joined(&self.world, *number)).collect();
        self.followed.push(Change { at: self.world.now, owner, version, of: missing.len(), missing });
    }

    /// Looks who has learnt of what is followed.
    fn look(&mut self) {
        let (world, now) = (&self.world, self.world.now);
        for change in &mut self.followed {
            change.missing.retain(|number| {
                let known = world.node(*number).map(|node| node.gossip.members().by_key(change.owner));
                known.is_some_and(|known| known.is_none_or(|member| member.version < change.version))
            });
        }
        let (change_ms, lost) = (&mut self.change_ms, &mut self.lost);
        self.followed.retain(|change| {
            let arrived = change.missing.len() * 100 <= change.of;
            if arrived {
                change_ms.push(now - change.at);
            } else if now > change.at + LOST {
                *lost += 1;
            }
            !arrived && now <= change.at + LOST
        });
        for death in &mut self.deaths {
            death.missing.retain(|number| {
                let known = world.node(*number).and_then(|node| node.gossip.members().by_key(death.key));
                known.is_some_and(Member::is_live)
            });
        }
        let failure_ms = &mut self.failure_ms;
        self.deaths.retain(|death| {
            let known = death.missing.len() * 100 <= death.of;
            if known {
                failure_ms.push(now - death.at);
            }
            !known
        });
    }

    fn figures(mut self) -> Figures {
        let seconds = self.seconds as f64;
        // One that is not known by now counts with the time that it has not been known for.
        let now = self.world.now;
        self.failure_ms
            .extend(self.deaths.iter().filter(|death| now > death.at + LOST).map(|death| now - death.at));
        let nodes: Vec<_> = self.world.nodes.iter().flatten().collect();
        let old = nodes.iter().filter(|node| node.started <= self.start + WARM);
        let mut rates: Vec<Ms> = old.map(|node| ((node.sent + node.got) as f64 / seconds) as u64).collect();
        let mean = rates.iter().sum::<u64>() as f64 / rates.len() as f64 / 1024.0;
        let counts = nodes.iter().map(|node| node.gossip.counts());
        let (fresh, duplicate) = counts
            .fold((0, 0), |(fresh, duplicate), counts| (fresh + counts.fresh, duplicate + counts.duplicate));
        let newcomers = nodes.iter().filter(|node| node.started > self.start);
        let mut joins: Vec<Ms> =
            newcomers.filter_map(|node| node.joined.map(|joined| joined - node.started)).collect();
        let pair =
            |times: &mut Vec<Ms>| Some((percentile(times, 0.5)? as f64, percentile(times, 0.99)? as f64));
        let parts = self
            .world
            .parts
            .iter()
            .map(|(part, bytes)| (*part, *bytes as f64 / seconds / nodes.len() as f64));
        Figures {
            kib_mean: mean,
            kib_wire: 2.0 * self.world.wire as f64 / seconds / self.nodes as f64 / 1024.0,
            kib_p99: percentile(&mut rates, 0.99).unwrap_or(0) as f64 / 1024.0,
            frames: nodes.iter().map(|node| node.frames).sum::<u64>() as f64 / nodes.len() as f64 / seconds,
            change_ms: pair(&mut self.change_ms),
            failure_ms: pair(&mut self.failure_ms),
            join_ms: pair(&mut joins),
            lost: self.lost,
            duplicates: duplicate as f64 / (fresh as f64).max(1.0),
            parts: parts.collect(),
        }
    }
}

/// What a node that is new at `now` will hold, and when: an image of ten layers every two seconds.
pub(super) fn pulls(now: Ms, rng: &mut SmallRng) -> Vec<(Ms, u64)> {
    let mut pulls: Vec<(Ms, u64)> = (0..PULLS)
        .map(|pull| {
            let at = now + 2_000 + pull / 10 * 2_000 + rng.random_range(0..1_000);
            (at, content(rng.random_range(0..DISTINCT)))
        })
        .collect();
    pulls.sort_unstable();
    pulls
}

pub(super) fn percentile(values: &mut [u64], part: f64) -> Option<u64> {
    values.sort_unstable();
    values.get((values.len().saturating_sub(1) as f64 * part).round() as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_cluster_is_simulated() {
        let workload = Workload::new(40, 20, Scenario::Churn, 3);
        let figures = workload.run(|_| ());
        assert_eq!(figures.lost, 0);
        let (_, p99) = figures.change_ms.unwrap();
        assert!(p99 <= 1000.0, "{p99} ms");
        assert!(figures.kib_mean > 0.1 && figures.kib_mean < 20.0, "{} KiB/s", figures.kib_mean);
    }

    #[test]
    fn what_is_random_is_so_by_the_seed_alone() {
        let of = |seed| {
            let figures = Workload::new(20, 10, Scenario::Churn, seed).run(|_| ());
            (figures.kib_mean.to_bits(), figures.change_ms.map(|(median, _)| median.to_bits()))
        };
        assert_eq!(of(5), of(5));
        assert_ne!(of(5), of(6));
    }

    #[test]
    fn percentiles_are_of_the_values() {
        assert_eq!(percentile(&mut [], 0.5), None);
        assert_eq!(percentile(&mut [3, 1, 2], 0.5), Some(2));
        assert_eq!(percentile(&mut (0..100).collect::<Vec<_>>(), 0.99), Some(98));
    }
}
