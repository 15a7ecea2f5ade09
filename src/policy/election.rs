//! The election world: who leads. Views, rankings, and how rankings become one.
//!
//! It knows nothing of leases and memberships: who calls builds the view from facts that all nodes have alike, and does with
//! the ranking what its role needs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use serde_json::Value;

use super::world::World;
use super::{Config, Failing, Failure, Limits, Loaded, Mode, Plugin, Reason, Said, describe};

/// Largest weight that one policy gives (`wit/policy.wit`).
pub const WEIGHT_MAX: u16 = 1000;
/// Largest view, in bytes of its texts and of what each candidate takes beside them (`wit/policy.wit`).
pub const VIEW_LIMIT: usize = 4 << 20;
/// Longest tenure that a policy may want.
pub(super) const TENURE_LIMIT: Duration = Duration::from_hours(24);
/// Instructions for one ranking, and for each candidate of it.
pub(super) const FUEL: (u64, u64) = (2_000_000, 4_000);
/// What rankings depend on besides components and settings: the contract, the engine with its version, since another one may
/// count instructions otherwise, and what bounds a policy.
pub(super) const PROFILE: &str =
    "peili:policy@0.1 wasmtime@48.0.8 fuel=2000000+4000n memory=16MiB stack=256KiB nan=canonical";
/// Weights that are shown of a ranking.
const SHOWN: usize = 16;
/// Longest text of a view, in bytes (`wit/policy.wit`).
pub const TEXT_LIMIT: usize = 1024;

/// How a role is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoleKind {
    /// Under a lease: the ranking only delays campaigns.
    Strict,
    /// By rendezvous over the membership.
    Advisory,
}

/// How weights make a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// By weight, ties by rendezvous hash.
    Ranked,
    /// Each key's rendezvous hash is weighted.
    Proportional,
}

/// What is led.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Role {
    /// `coordinator`, `introducers`, `tag-home`.
    pub name: String,
    /// How it is held.
    pub kind: RoleKind,
    /// How weights make a leader.
    pub selection: Selection,
    /// How many lead at once.
    pub seats: u32,
}

/// Whether a candidate reaches the API server, by its own signed word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reachability {
    /// It has not said.
    #[default]
    Unknown,
    /// It does.
    Reachable,
    /// It does not.
    Unreachable,
}

/// A node that may lead, with facts that all nodes have alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Its Kubernetes name; empty: unknown.
    pub name: String,
    /// Its version of Peili.
    pub version: String,
    /// Its zone.
    pub zone: Option<String>,
    /// Its labels; the order is theirs, so that it is the same everywhere.
    pub labels: BTreeMap<String, String>,
    /// Tenths of its capacity; more than 10 is 10.
    pub load: u8,
    /// How long it runs; policies see it rounded down to a power of two of milliseconds.
    pub uptime: Duration,
    /// Whether it reaches the API server.
    pub api_server: Reachability,
}

/// Who leads, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tenure {
    /// Index of the candidate.
    pub candidate: usize,
    /// How long it leads; rounded as [`Candidate::uptime`] is.
    pub duration: Duration,
}

/// What a ranking is made of. Whoever has the same policies and the same view gets the same ranking.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// What is led.
    pub role: Role,
    /// Live admitted members, sorted by peer ID.
    pub candidates: Vec<Candidate>,
    /// Who leads now.
    pub holder: Option<Tenure>,
}

/// When a leader makes room for a better candidate; the most reluctant first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Handover {
    /// It does not.
    Never,
    /// Once it has nothing to do.
    Idle,
    /// At once.
    Now,
}

/// What one policy says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranking {
    /// One for each candidate in order: 0 is ineligible, else 1 to [`WEIGHT_MAX`]. Empty: it abstains.
    pub weights: Vec<u16>,
    /// How long a leader stays before a better one may follow it.
    pub min_tenure: Option<Duration>,
    /// When it makes room for a better one.
    pub handover: Option<Handover>,
    /// Why.
    pub reason: Option<Reason>,
}

/// What all policies together say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranked {
    /// One for each candidate in order, and not all of them 0, which is ineligible; none: the built-in ranking, in which all
    /// candidates are equal.
    pub weights: Option<Vec<u32>>,
    /// The longest that any policy wants; none: the role's own.
    pub min_tenure: Option<Duration>,
    /// The most reluctant that any policy wants; none: the role's own.
    pub handover: Option<Handover>,
    /// How this came about.
    pub why: Why,
}

/// How a ranking came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Why {
    /// There is no policy whose ranking counts.
    #[default]
    NoPolicy,
    /// All abstain from weights.
    Abstained,
    /// These gave weights, in their order.
    Policies(Vec<Arc<str>>),
    /// One failed, so the built-in ranks.
    Failed(Arc<str>, Failure),
    /// Each candidate is excluded by one policy or another, so the built-in ranks.
    AllExcluded,
    /// The view is none that policies get, so the built-in ranks.
    View(&'static str),
}

/// Tells sets of policies apart that may rank the same view differently. It is the same on all nodes with the same contract,
/// engine, components and settings, and says nothing of them to who has not got the cluster key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EffectiveHash(pub [u8; 32]);

impl EffectiveHash {
    /// Of who ranks by the built-in: without a policy, or because its last ranking failed.
    pub const BUILT_IN: Self = Self([0; 32]);
}

impl fmt::Display for EffectiveHash {
    /// In hexadecimal; `builtin` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::BUILT_IN {
            return f.write_str("builtin");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Answers who is to lead. A ranking may take 20 ms of the caller's thread, ten times that where code must be interpreted, and
/// does not wait for anything but its own work; it always has an answer.
pub trait ElectionPolicy: Send + Sync {
    /// Whether there is any policy: without one a view need not be made.
    fn is_active(&self) -> bool;

    /// Another number whenever other policies are in force.
    fn generation(&self) -> i64;

    /// The ranking.
    fn rank(&self, view: &View) -> Ranked;

    /// The ranking, and what each policy said; it counts nowhere.
    fn explain(&self, view: &View) -> (Ranked, Vec<Said>) {
        (self.rank(view), Vec::new())
    }

    /// What the policies in force are; [`EffectiveHash::BUILT_IN`] without one whose ranking counts, and while the last ranking
    /// of any role failed. `key`: the cluster key, or none in an open cluster.
    fn hash(&self, key: Option<&[u8]>) -> EffectiveHash;
}

/// No policies.
#[derive(Clone, Copy, Debug)]
pub struct NoRanking;

impl ElectionPolicy for NoRanking {
    fn is_active(&self) -> bool {
        false
    }

    fn generation(&self) -> i64 {
        0
    }

    fn rank(&self, _: &View) -> Ranked {
        Ranked::default()
    }

    fn hash(&self, _: Option<&[u8]>) -> EffectiveHash {
        EffectiveHash::BUILT_IN
    }
}

/// The world.
pub(super) struct Election;

/// What a chain says so far.
#[derive(Debug, Default)]
pub(super) struct Merge {
    weights: Option<Vec<u32>>,
    min_tenure: Option<Duration>,
    handover: Option<Handover>,
    by: Vec<Arc<str>>,
    is_any: bool,
    failed: Option<(Arc<str>, Failure)>,
}

impl World for Election {
    const NAME: &'static str = "election";
    const OUTCOMES: &'static [&'static str] = &["abstain", "rank"];
    const DEADLINE: Duration = Limits::ELECTION_TIME_MAX;
    const IS_COMMON: bool = true;

    type Request = View;
    type Verdict = Ranking;
    type Ruling = Ranked;
    type Merge = Merge;

    fn input(view: &View) -> impl std::hash::Hash {
        view
    }

    fn fuel(view: Option<&View>) -> u64 {
        let candidates = view.map_or(0, |view| view.candidates.len() as u64);
        FUEL.0.saturating_add(FUEL.1.saturating_mul(candidates))
    }

    fn check(view: &View, ranking: &Ranking) -> Result<(), String> {
        let (weights, candidates) = (&ranking.weights, view.candidates.len());
        if weights.is_empty() {
            return Ok(());
        }
        if weights.len() != candidates {
            return Err(format!("{} weights for {candidates} candidates", weights.len()));
        }
        if weights.iter().all(|weight| *weight == 0) {
            return Err("it excludes each candidate".into());
        }
        Ok(())
    }

    fn outcome(ranking: &Ranking) -> usize {
        usize::from(!ranking.weights.is_empty())
    }

    fn describe(ranking: &Ranking) -> String {
        let mut text = if ranking.weights.is_empty() {
            "abstain".into()
        } else {
            format!("weights={}", listed(&ranking.weights))
        };
        told(&mut text, ranking.min_tenure, ranking.handover);
        describe(&text, ranking.reason.as_ref())
    }

    fn add(merge: &mut Merge, policy: &Arc<str>, answer: Result<Ranking, Failure>, _: Failing) {
        merge.is_any = true;
        let ranking = match answer {
            Ok(ranking) => ranking,
            Err(failure) => {
                merge.failed.get_or_insert_with(|| (Arc::clone(policy), failure));
                return;
            }
        };
        merge.min_tenure = merge.min_tenure.max(ranking.min_tenure);
        merge.handover = match (merge.handover, ranking.handover) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        if ranking.weights.is_empty() {
            return;
        }
        merge.by.push(Arc::clone(policy));
        let more = ranking.weights.into_iter().map(u32::from);
        merge.weights = Some(match merge.weights.take() {
            None => more.collect(),
            Some(weights) => weights.into_iter().zip(more).map(|(one, other)| both(one, other)).collect(),
        });
    }

    fn ruling(merge: Merge) -> Ranked {
        let Merge { weights, min_tenure, handover, by, is_any, failed } = merge;
        let built_in = |why| Ranked { why, ..Ranked::default() };
        match (failed, weights) {
            (Some((policy, failure)), _) => built_in(Why::Failed(policy, failure)),
            (None, Some(weights)) if weights.iter().all(|weight| *weight == 0) => built_in(Why::AllExcluded),
            (None, weights) => {
                let why = match (&weights, is_any) {
                    (Some(_), _) => Why::Policies(by),
                    (None, true) => Why::Abstained,
                    (None, false) => Why::NoPolicy,
                };
                Ranked { weights, min_tenure, handover, why }
            }
        }
    }

    fn plugins(config: &Config) -> &[Plugin] {
        &config.election
    }
}

/// A weight of two policies: 0 from either excludes.
fn both(one: u32, other: u32) -> u32 {
    if one == 0 || other == 0 { 0 } else { one.saturating_add(other) }
}

impl View {
    /// Whether policies may get it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), &'static str> {
        let is_long = |text: &str| text.len() > TEXT_LIMIT;
        // What an entry of a list takes beside its texts.
        let mut size = 1024_usize;
        for Candidate { name, version, zone, labels, .. } in &self.candidates {
            let texts = [name.as_str(), version.as_str(), zone.as_deref().unwrap_or_default()];
            let labels = labels.iter().flat_map(|(key, value)| [key.as_str(), value.as_str()]);
            for text in texts.into_iter().chain(labels) {
                if is_long(text) {
                    return Err("a text of the view has more than 1 KiB");
                }
                size = size.saturating_add(text.len());
            }
            size = size.saturating_add(64);
        }
        if is_long(&self.role.name) {
            return Err("a text of the view has more than 1 KiB");
        }
        if size > VIEW_LIMIT {
            return Err("the view has more than 4 MiB");
        }
        if self.holder.is_some_and(|holder| holder.candidate >= self.candidates.len()) {
            return Err("the holder is no candidate");
        }
        Ok(())
    }
}

/// What the policies whose rankings count are, for [`hash`]; empty: there are none. `loaded` and `plugins` in the same order.
pub(super) fn effective(loaded: &[Loaded], plugins: &[Plugin]) -> Vec<u8> {
    let counted = loaded.iter().zip(plugins).filter(|(_, plugin)| plugin.mode == Mode::Enforce);
    let part = |(loaded, plugin): (&Loaded, &Plugin)| {
        let mut part = vec![loaded.sha256.clone().into(), canonical(&plugin.settings)];
        let Limits { memory, verdict, .. } = plugin.limits;
        let bounds = (memory, verdict);
        // Who has neither carries the hash that it had before there were any.
        if !loaded.data.is_empty() || bounds != (Limits::DEFAULT.memory, Limits::DEFAULT.verdict) {
            part.push(serde_json::json!([loaded.data, memory.as_u64(), verdict.as_u64()]));
        }
        Value::Array(part)
    };
    let parts: Vec<Value> = counted.map(part).collect();
    if parts.is_empty() {
        return Vec::new();
    }
    serde_json::json!([PROFILE, parts]).to_string().into_bytes()
}

/// The same for settings that are the same, whatever the order of their keys; none are empty ones.
fn canonical(settings: &Value) -> Value {
    match settings {
        Value::Null => Value::Object(serde_json::Map::new()),
        settings => sorted(settings),
    }
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(keys) => {
            let keys: BTreeMap<&String, Value> =
                keys.iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(keys.into_iter().map(|(key, value)| (key.clone(), value)).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(sorted).collect()),
        value => value.clone(),
    }
}

/// By HMAC, so that who has not got the key cannot try which settings give it.
pub(super) fn hash(effective: &[u8], key: Option<&[u8]>) -> EffectiveHash {
    if effective.is_empty() {
        return EffectiveHash::BUILT_IN;
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.unwrap_or_default());
    let tag = hmac::sign(&key, effective);
    let mut hash = [0; 32];
    hash.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
    EffectiveHash(hash)
}

/// The first weights, and of more their number and a check of all: that two lists differ is seen.
fn listed<T: fmt::Display>(weights: &[T]) -> String {
    let shown: Vec<String> = weights.iter().take(SHOWN).map(ToString::to_string).collect();
    let shown = shown.join(",");
    if weights.len() <= SHOWN {
        return shown;
    }
    let all: Vec<String> = weights.iter().map(ToString::to_string).collect();
    let check = crate::oci::Digest::sha256(all.join(",").as_bytes()).hex();
    format!("{shown},... [{} in all: {}]", weights.len(), check.get(..8).unwrap_or_default())
}

fn told(text: &mut String, min_tenure: Option<Duration>, handover: Option<Handover>) {
    use fmt::Write as _;
    // Text takes all that is written.
    if let Some(time) = min_tenure {
        let _ = write!(text, " min-tenure={}s", time.as_secs());
    }
    if let Some(handover) = handover {
        let _ = write!(text, " handover={handover}");
    }
}

impl fmt::Display for Ranked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = self.weights.as_ref();
        let mut text = weights.map_or("built-in".into(), |weights| format!("weights={}", listed(weights)));
        told(&mut text, self.min_tenure, self.handover);
        write!(f, "{text} ({})", self.why)
    }
}

impl Why {
    /// Whether something is wrong that an operator should see.
    pub fn is_fault(&self) -> bool {
        matches!(self, Self::Failed(..) | Self::AllExcluded | Self::View(_))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicy => f.write_str("no policy"),
            Self::Abstained => f.write_str("all policies abstain"),
            Self::Policies(names) => write!(f, "by {}", names.join(", ")),
            Self::Failed(policy, failure) => write!(f, "the policy `{policy}` failed: {failure}"),
            Self::AllExcluded => f.write_str("the policies together exclude each candidate"),
            Self::View(fault) => f.write_str(fault),
        }
    }
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Idle => "idle",
            Self::Now => "now",
        })
    }
}
