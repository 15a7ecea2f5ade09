//! A policy that misbehaves as its settings tell, for the tests of the host. Nobody installs it.

mod misdeeds;

use std::collections::BTreeMap;
use std::hint::black_box;

use peili_policy::registry::{Plan, Policy, Request, Route, Source, SourceKinds, TagResolution, Verdict};
use peili_policy::{LogLevel, Node, SettingError, TrustLevel, data, log};
use serde::Deserialize;

use misdeeds::{allocate, flood, garbage, recurse, spin};

/// What it does with a request.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Nothing wrong: abstains.
    Abstain,
    /// Nothing wrong: denies.
    Deny,
    /// Nothing wrong: bypasses.
    Bypass,
    /// Nothing wrong: the plan of the settings.
    Plan,
    /// Never returns.
    Loop,
    /// Panics.
    Panic,
    /// Allocates until there is no more.
    Allocate,
    /// Answers with a reason of 2 MiB.
    Verdict,
    /// Writes 100,000 lines to the log.
    Log,
    /// Calls itself without end.
    Recurse,
    /// Answers with texts that are none.
    Garbage,
    /// Nothing wrong: denies, with what its files have.
    Data,
    /// Asks for an upstream that nobody configured.
    Upstream,
    /// Denies each second time.
    State,
    /// Keeps 64 KiB more each time.
    Grow,
    /// Panics when it is configured.
    Configure,
    /// Refuses its settings.
    Refuse,
    /// Never returns when it is configured.
    Stuck,
}

/// Which requests it does that with; with all others it abstains.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// What.
    pub act: Act,
    /// Only for repositories in whose name this is.
    #[serde(default)]
    pub on: String,
    /// For [`Act::Plan`]: all that it says; none: something in each field.
    pub plan: Option<Constraints>,
}

/// What a plan says.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Constraints {
    /// `peers`, `upstreams`, `origin`.
    pub forbidden: Vec<String>,
    /// `blobs`, or else tags.
    pub min_trust: Option<String>,
    /// At least 1.
    pub max_fan_out: Option<u32>,
    /// `revalidated`, or else upstream-only.
    pub tag_resolution: Option<String>,
    /// Whatever the configuration says.
    pub always_verify: bool,
}

/// The policy.
#[derive(Debug)]
pub struct TestGuest {
    settings: Settings,
    calls: u64,
    kept: BTreeMap<u64, Vec<u8>>,
}

impl Policy for TestGuest {
    type Settings = Settings;

    fn new(settings: Settings, here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        match settings.act {
            Act::Configure => panic!("told to"),
            Act::Refuse => {
                Err(vec![SettingError { pointer: "/act".into(), message: "it is refused".into() }])
            }
            Act::Stuck => spin(),
            _ => {
                let name = here.map(|node| node.name).unwrap_or_default();
                log(LogLevel::Info, &format!("configured on {name}"));
                Ok(Self { settings, calls: 0, kept: BTreeMap::new() })
            }
        }
    }

    fn summary(&self) -> String {
        format!("does {:?} on `{}`", self.settings.act, self.settings.on)
    }

    fn decide(&mut self, request: &Request) -> Verdict {
        self.calls += 1;
        if !request.repository.contains(&self.settings.on) {
            return Verdict::abstain();
        }
        match self.settings.act {
            Act::Abstain | Act::Configure | Act::Refuse | Act::Stuck => Verdict::abstain(),
            Act::Deny => Verdict::deny("told-to", "the test guest was told to"),
            Act::Bypass => Verdict::bypass(),
            Act::Plan => Verdict::mirror(self.settings.plan.as_ref().map_or_else(plan, Constraints::plan)),
            Act::Loop => spin(),
            Act::Panic => panic!("told to, on {}", request.name()),
            Act::Allocate => allocate(),
            Act::Verdict => Verdict::deny("large", &"x".repeat(2 << 20)),
            Act::Log => {
                flood();
                Verdict::abstain()
            }
            Act::Recurse => {
                black_box(recurse(black_box(1)));
                Verdict::abstain()
            }
            Act::Garbage => Verdict { reason: Some(garbage()), ..Verdict::deny("", "") },
            Act::Data => {
                let file = |name: String| format!("{name}={}", data::text(&name).unwrap_or_default().trim());
                Verdict::deny("data", &data::names().into_iter().map(file).collect::<Vec<_>>().join(" "))
            }
            Act::Upstream => {
                let route = Route { upstream: "nobody".into(), repository: None };
                Verdict::mirror(Plan { sources: Some(vec![Source::Upstream(route)]), ..Plan::any() })
            }
            Act::State if self.calls.is_multiple_of(2) => Verdict::deny("state", "each second time"),
            Act::State => Verdict::abstain(),
            Act::Grow => {
                self.kept.insert(self.calls, black_box(vec![1; 64 << 10]));
                Verdict::abstain()
            }
        }
    }
}

impl Constraints {
    fn plan(&self) -> Plan {
        let kinds = self.forbidden.iter().map(|kind| match kind.as_str() {
            "peers" => SourceKinds::PEERS,
            "upstreams" => SourceKinds::UPSTREAMS,
            _ => SourceKinds::ORIGIN,
        });
        Plan {
            forbidden: kinds.fold(SourceKinds::empty(), |all, kind| all | kind),
            min_trust: self.min_trust.as_deref().map(|level| match level {
                "blobs" => TrustLevel::Blobs,
                _ => TrustLevel::Tags,
            }),
            max_fan_out: self.max_fan_out,
            tag_resolution: self.tag_resolution.as_deref().map(|resolution| match resolution {
                "revalidated" => TagResolution::Revalidated,
                _ => TagResolution::UpstreamOnly,
            }),
            always_verify: self.always_verify,
            ..Plan::any()
        }
    }
}

/// Something in each field.
fn plan() -> Plan {
    Plan {
        sources: Some(vec![Source::Peers, Source::Origin]),
        forbidden: SourceKinds::UPSTREAMS,
        tag_resolution: Some(TagResolution::UpstreamOnly),
        max_tag_age: Some(60_000),
        min_trust: Some(TrustLevel::Tags),
        always_verify: true,
        max_fan_out: Some(1),
    }
}

peili_policy::export_registry_policy!(TestGuest);
