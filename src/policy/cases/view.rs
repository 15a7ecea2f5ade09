//! The keys of a case about an election, and the view that they make.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use crate::policy::election::{Candidate, Reachability, Role, RoleKind, Selection, Tenure, View};

/// What is led.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Led {
    name: String,
    #[serde(default)]
    kind: Kind,
    #[serde(default)]
    selection: Selects,
    #[serde(default = "one")]
    seats: u32,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Strict,
    #[default]
    Advisory,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Selects {
    #[default]
    Ranked,
    Proportional,
}

/// Who may lead.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Stands {
    name: String,
    zone: Option<String>,
    #[serde(default)]
    version: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    load: u8,
    #[serde(default)]
    uptime_seconds: u64,
    #[serde(default)]
    api_server: Reaches,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reaches {
    #[default]
    Unknown,
    Reachable,
    Unreachable,
}

/// Who leads, by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Holds {
    candidate: String,
    #[serde(default)]
    seconds: u64,
}

/// The view that a case is about.
///
/// # Errors
/// It is none.
pub(super) fn view(role: Option<&Led>, stand: &[Stands], holder: Option<&Holds>) -> Result<View, String> {
    let role = role.ok_or("it names no `role`")?;
    let holder = holder.map(|holder| {
        let candidate = stand.iter().position(|stands| stands.name == holder.candidate);
        let candidate = candidate.ok_or_else(|| format!("`{}` is no candidate", holder.candidate))?;
        Ok::<_, String>(Tenure { candidate, duration: Duration::from_secs(holder.seconds) })
    });
    let view = View {
        role: Role {
            name: role.name.clone(),
            kind: match role.kind {
                Kind::Strict => RoleKind::Strict,
                Kind::Advisory => RoleKind::Advisory,
            },
            selection: match role.selection {
                Selects::Ranked => Selection::Ranked,
                Selects::Proportional => Selection::Proportional,
            },
            seats: role.seats,
        },
        candidates: stand.iter().map(Stands::candidate).collect(),
        holder: holder.transpose()?,
    };
    view.check()?;
    Ok(view)
}

impl Stands {
    fn candidate(&self) -> Candidate {
        Candidate {
            name: self.name.clone(),
            version: self.version.clone(),
            zone: self.zone.clone(),
            labels: self.labels.clone(),
            load: self.load,
            uptime: Duration::from_secs(self.uptime_seconds),
            api_server: match self.api_server {
                Reaches::Unknown => Reachability::Unknown,
                Reaches::Reachable => Reachability::Reachable,
                Reaches::Unreachable => Reachability::Unreachable,
            },
        }
    }
}

fn one() -> u32 {
    1
}
