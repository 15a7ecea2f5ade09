//! The simulation's workload, in real time on real processes: the same steps, and the same is measured.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peili::network::gossip::Ms;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::MissedTickBehavior;

use super::super::holdings::Set;
use super::super::workload::{FOLLOWED, LOST, WARM, pulls};
use super::fleet::{Fleet, Traffic};
use super::member::{Order, Word, clock};

/// How often it is looked what is to be done.
const TICK: Duration = Duration::from_millis(5);
/// Until all nodes know one another.
const BEGINNING: Duration = Duration::from_secs(60);
/// Pause between two starts in the beginning; all in a moment would keep the processors busy for longer.
const START: Duration = Duration::from_millis(50);

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) nodes: usize,
    pub(super) seconds: u64,
    /// One node is replaced each time that so many milliseconds have passed.
    pub(super) replaced: Ms,
    pub(super) seed: u64,
}

/// What was measured; times in microseconds.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) traffic: Traffic,
    pub(super) changes: Vec<u64>,
    pub(super) failures: Vec<u64>,
    pub(super) joins: Vec<u64>,
    pub(super) lost: u64,
    /// Part of the processors' time that nobody used, of 1. Where there is none, the processes wait for one another and for
    /// whatever else runs, and times are longer than they would be.
    pub(super) idle: f64,
}

struct Course {
    fleet: Fleet,
    rng: SmallRng,
    /// Of those that run.
    nodes: BTreeMap<usize, Node>,
    /// What is followed, by its content: a change's own, or the mark of who died.
    changes: HashMap<u64, Followed>,
    deaths: HashMap<u64, (usize, Followed)>,
    measured: Measured,
}

#[derive(Default)]
struct Node {
    id: String,
    is_complete: bool,
    members: usize,
    /// A content that it alone holds.
    mark: u64,
    /// What it will hold, and when, by the machine's clock in milliseconds.
    pulls: VecDeque<(Ms, u64)>,
}

/// Something of which others are to learn.
struct Followed {
    /// `None`: it has not happened yet.
    at: Option<u64>,
    missing: BTreeSet<usize>,
    of: usize,
    last: u64,
    counts: bool,
}

/// Runs it; `progress` gets a line every now and then.
pub(super) async fn run(plan: &Plan, progress: impl Fn(String)) -> Result<Measured> {
    let mut course = Course {
        fleet: Fleet::new()?,
        rng: SmallRng::seed_from_u64(plan.seed),
        nodes: BTreeMap::new(),
        changes: HashMap::new(),
        deaths: HashMap::new(),
        measured: Measured::default(),
    };
    course.begin(plan.nodes, &progress).await?;
    course.go_on(plan, &progress).await
}

impl Course {
    /// Starts so many, with an inventory each, and waits until all know all.
    async fn begin(&mut self, count: usize, progress: &impl Fn(String)) -> Result<()> {
        progress(format!("{count} processes start"));
        for _ in 0..count {
            let mark = self.rng.random();
            let mut contents = Set::random(&mut self.rng).contents;
            contents.push(mark);
            let number = self.start(mark, contents).await?;
            tokio::time::sleep(START).await;
            while self.nodes[&number].id.is_empty() {
                self.hear().await?;
            }
        }
        let all_know = async {
            while !self.nodes.values().all(|node| node.is_complete && node.members == count) {
                let numbers: Vec<usize> = self.nodes.keys().copied().collect();
                for number in numbers {
                    self.fleet.order(number, &Order::Count).await?;
                }
                let pause = tokio::time::sleep(Duration::from_millis(500));
                tokio::pin!(pause);
                loop {
                    tokio::select! {
                        () = &mut pause => break,
                        heard = self.hear() => heard?,
                    }
                }
                self.fleet.check()?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(BEGINNING, all_know).await.context("the nodes do not find one another")??;
        self.measured.joins.clear();
        Ok(())
    }

    async fn go_on(mut self, plan: &Plan, progress: &impl Fn(String)) -> Result<Measured> {
        let start = clock() / 1000;
        let (measured, end) = (start + WARM, start + WARM + plan.seconds * 1000);
        let (mut replace, mut follow, mut said) = (start + plan.replaced, measured, start);
        let (mut before, mut processors) = (None, Processors::default());
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heard = self.hear() => heard?,
                _ = ticks.tick() => {
                    let now = clock() / 1000;
                    if now >= measured && before.is_none() {
                        before = Some(self.fleet.traffic()?);
                        processors = Processors::read()?;
                    }
                    if now >= end {
                        break;
                    }
                    if now >= replace && now + LOST / 2 < end {
                        replace += plan.replaced;
                        self.replace(now >= measured).await?;
                    }
                    if now >= follow && now + LOST / 2 < end {
                        follow += FOLLOWED;
                        self.follow_a_change().await?;
                    }
                    self.pull(now).await?;
                    self.settle().await?;
                    if now >= said {
                        progress(format!("{} processes: {} s", plan.nodes, (now - start) / 1000));
                        said += 10_000;
                        self.fleet.check()?;
                    }
                }
            }
        }
        let (before, after) = (before.unwrap_or_default(), self.fleet.traffic()?);
        self.measured.traffic =
            Traffic { bytes: after.bytes - before.bytes, packets: after.packets - before.packets };
        self.measured.idle = Processors::read()?.idle_since(processors);
        ensure!(!self.measured.joins.is_empty(), "no newcomer's view was complete");
        Ok(self.measured)
    }

    /// A process that holds `contents`, of which `mark` is its own, and knows one of the others.
    async fn start(&mut self, mark: u64, contents: Vec<u64>) -> Result<usize> {
        let other = self.random_node(|node| !node.id.is_empty());
        let number = self.fleet.start(other.map(|other| (other, self.nodes[&other].id.as_str())))?;
        self.nodes.insert(number, Node { mark, ..Node::default() });
        self.fleet.order(number, &Order::All(contents)).await?;
        Ok(number)
    }

    fn random_node(&mut self, suits: impl Fn(&Node) -> bool) -> Option<usize> {
        let numbers: Vec<usize> =
            self.nodes.iter().filter(|(_, node)| suits(node)).map(|(number, _)| *number).collect();
        (!numbers.is_empty()).then(|| numbers[self.rng.random_range(0..numbers.len())])
    }

    /// A machine is gone, and a new one comes.
    async fn replace(&mut self, is_measured: bool) -> Result<()> {
        let victim = self.random_node(|node| !node.id.is_empty()).context("nobody is left")?;
        let at = clock();
        self.fleet.freeze(victim)?;
        let Some(Node { mark, .. }) = self.nodes.remove(&victim) else { return Ok(()) };
        let missing: BTreeSet<usize> = self.nodes.keys().copied().collect();
        for number in &missing {
            self.fleet.order(*number, &Order::Gone(mark)).await?;
        }
        let of = missing.len();
        let death = Followed { at: Some(at), missing, of, last: at, counts: is_measured };
        self.deaths.insert(mark, (victim, death));
        let mark = self.rng.random();
        let number = self.start(mark, vec![mark]).await?;
        let pulls = pulls(clock() / 1000, &mut self.rng);
        if let Some(node) = self.nodes.get_mut(&number) {
            node.pulls = pulls.into();
        }
        Ok(())
    }

    async fn follow_a_change(&mut self) -> Result<()> {
        let Some(owner) = self.random_node(|node| node.is_complete) else { return Ok(()) };
        let content = self.rng.random();
        let others = self.nodes.iter().filter(|(number, node)| node.is_complete && **number != owner);
        let missing: BTreeSet<usize> = others.map(|(number, _)| *number).collect();
        for number in &missing {
            self.fleet.order(*number, &Order::Known(content)).await?;
        }
        self.fleet.order(owner, &Order::Hold(content)).await?;
        let of = missing.len() + 1;
        self.changes.insert(content, Followed { at: None, missing, of, last: 0, counts: true });
        Ok(())
    }

    async fn pull(&mut self, now: Ms) -> Result<()> {
        for (number, node) in &mut self.nodes {
            while let Some((_, content)) = node.pulls.pop_front_if(|(at, _)| *at <= now) {
                self.fleet.order(*number, &Order::Hold(content)).await?;
            }
        }
        Ok(())
    }

    /// Takes what one process says.
    async fn hear(&mut self) -> Result<()> {
        let (number, word) = self.fleet.words.recv().await.context("no process speaks")?;
        let learnt = |followed: &mut Followed, at: u64| {
            followed.missing.remove(&number);
            followed.last = followed.last.max(at);
        };
        match word {
            Word::Held(content, at) => {
                if let Some(change) = self.changes.get_mut(&content) {
                    change.at = Some(at);
                }
            }
            Word::Known(content, at) => {
                if let Some(change) = self.changes.get_mut(&content) {
                    learnt(change, at);
                }
            }
            Word::Gone(mark, at) => {
                if let Some((_, death)) = self.deaths.get_mut(&mark) {
                    learnt(death, at);
                }
            }
            Word::Ready(id) => {
                if let Some(node) = self.nodes.get_mut(&number) {
                    node.id = id;
                }
            }
            Word::Complete(after) => {
                if let Some(node) = self.nodes.get_mut(&number) {
                    node.is_complete = true;
                    self.measured.joins.push(after);
                }
            }
            Word::Members(members) => {
                if let Some(node) = self.nodes.get_mut(&number) {
                    node.members = members;
                }
            }
        }
        Ok(())
    }

    /// Takes note of what is known to 99 %, or never will be.
    async fn settle(&mut self) -> Result<()> {
        let now = clock();
        let (nodes, measured) = (&self.nodes, &mut self.measured);
        self.changes.retain(|_, change| {
            change.missing.retain(|number| nodes.contains_key(number));
            let Some(at) = change.at else { return true };
            let is_lost = now > at + LOST * 1000;
            if change.is_known() {
                measured.changes.push(change.last.saturating_sub(at));
            } else if is_lost {
                measured.lost += 1;
            }
            !change.is_known() && !is_lost
        });
        let mut over = Vec::new();
        for (mark, (victim, death)) in &mut self.deaths {
            death.missing.retain(|number| nodes.contains_key(number));
            let at = death.at.unwrap_or(now);
            if death.is_known() || now > at + LOST * 1000 {
                if death.counts {
                    // One that is not known by now counts with the time that it has not been known for.
                    let until = if death.is_known() { death.last } else { now };
                    measured.failures.push(until.saturating_sub(at));
                }
                over.push((*mark, *victim));
            }
        }
        for (mark, victim) in over {
            self.deaths.remove(&mark);
            self.fleet.kill(victim).await?;
        }
        Ok(())
    }
}

/// Time of all processors since the machine was started, in ticks.
#[derive(Clone, Copy, Default)]
struct Processors {
    all: u64,
    idle: u64,
}

impl Processors {
    fn read() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Self::parse(&text).context("/proc/stat says nothing of the processors")
    }

    /// proc(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is in these.
    fn parse(text: &str) -> Option<Self> {
        let numbers = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), idle: *ticks.get(3)? })
    }

    fn idle_since(self, before: Self) -> f64 {
        (self.idle - before.idle) as f64 / ((self.all - before.all) as f64).max(1.0)
    }
}

impl Followed {
    fn is_known(&self) -> bool {
        self.missing.len() * 100 <= self.of
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_a_part_of_all() {
        let of = |text| Processors::parse(text).unwrap();
        let (before, after) = (of("cpu  1 2 3 4 5 6 7 8 9 9\ncpu0 1\n"), of("cpu  11 2 3 14 5 6 7 28 9 9\n"));
        assert!((after.idle_since(before) - 0.25).abs() < 1e-9);
        assert!(Processors::parse("cpu0 1").is_none());
    }

    #[test]
    fn known_to_99_percent_of_50_is_known_to_all() {
        let followed = |missing: std::ops::Range<usize>, of| Followed {
            at: None,
            missing: missing.collect(),
            of,
            last: 0,
            counts: true,
        };
        assert!(followed(0..0, 50).is_known() && !followed(0..1, 50).is_known());
        assert!(followed(0..1, 100).is_known() && !followed(0..2, 100).is_known());
    }
}
