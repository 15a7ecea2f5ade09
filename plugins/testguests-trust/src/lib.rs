//! A trust policy that misbehaves as its settings tell, for the tests of the host. Nobody installs it.

#[path = "../../testguests/src/misdeeds.rs"]
mod misdeeds;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use peili_policy::trust::{Grant, Policy, Request, Verdict};
use peili_policy::{Node, SettingError, TrustLevel};
use serde::Deserialize;

use misdeeds::{allocate, flood, garbage, recurse, spin};

/// What it does with a peer.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Nothing wrong: abstains.
    Abstain,
    /// Nothing wrong: denies for a minute.
    Deny,
    /// Nothing wrong: grants what the settings say.
    Grant,
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
    /// Grants uploads, of which there may be none.
    Zero,
    /// Keeps 64 KiB more each time.
    Grow,
}

/// With which peers it does that; of all others it abstains.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// What.
    pub act: Act,
    /// Only with peers in whose name this is.
    #[serde(default)]
    pub on: String,
    /// Of a grant: `introduce`, `blobs`, or else tags.
    #[serde(default)]
    pub level: String,
    /// Of a grant: not served.
    #[serde(default)]
    pub withhold: bool,
    /// Of a grant.
    pub max_uploads: Option<u32>,
    /// Of a grant.
    pub max_upload_rate: Option<u64>,
    /// Of a grant; none: the longest.
    pub ttl_seconds: Option<u64>,
    /// Of a grant: from when on it never returns instead, in seconds since 1970.
    pub stuck_from: Option<u64>,
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

    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        Ok(Self { settings, calls: 0, kept: BTreeMap::new() })
    }

    fn summary(&self) -> String {
        format!("does {:?} with `{}`", self.settings.act, self.settings.on)
    }

    fn evaluate(&mut self, request: &Request) -> Verdict {
        self.calls += 1;
        if !request.peer.name.contains(&self.settings.on) {
            return Verdict::abstain();
        }
        match self.settings.act {
            Act::Abstain => Verdict::abstain(),
            Act::Deny => Verdict::deny(Duration::from_secs(60), "told-to", "the test guest was told to"),
            Act::Grant if self.settings.stuck_from.is_some_and(|from| request.now >= from * 1000) => spin(),
            Act::Grant => Verdict::allow(grant(&self.settings)),
            Act::Loop => spin(),
            Act::Panic => panic!("told to, with {}", request.peer.name),
            Act::Allocate => allocate(),
            Act::Verdict => Verdict::deny(Duration::from_secs(60), "large", &"x".repeat(2 << 20)),
            Act::Log => {
                flood();
                Verdict::abstain()
            }
            Act::Recurse => {
                black_box(recurse(black_box(1)));
                Verdict::abstain()
            }
            Act::Garbage => Verdict { reason: Some(garbage()), ..Verdict::abstain() },
            Act::Zero => Verdict::allow(Grant { max_uploads: Some(0), ..Grant::all(TrustLevel::Tags) }),
            Act::Grow => {
                self.kept.insert(self.calls, black_box(vec![1; 64 << 10]));
                Verdict::abstain()
            }
        }
    }
}

fn grant(settings: &Settings) -> Grant {
    let level = match settings.level.as_str() {
        "introduce" => TrustLevel::Introduce,
        "blobs" => TrustLevel::Blobs,
        _ => TrustLevel::Tags,
    };
    let all = Grant::all(level);
    Grant {
        serve: !settings.withhold,
        max_uploads: settings.max_uploads,
        max_upload_rate: settings.max_upload_rate,
        ttl: settings.ttl_seconds.map_or(all.ttl, |seconds| seconds * 1000),
        ..all
    }
}

peili_policy::export_trust_policy!(TestGuest);
