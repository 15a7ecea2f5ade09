//! Version 0.1 of the contract: what the macro makes of `wit/policy.wit`, and the way from and to the host's own types.
//! What a verdict must be is checked here.

#![allow(missing_docs, unreachable_pub, reason = "generated; the documentation is in the contract")]

use std::time::{Duration, SystemTime};

use wasmtime::component::{HasSelf, Linker};

use super::Info;
use super::host::Host;
use crate::oci::Level;
use crate::policy::registry as domain;
use crate::policy::text::{clean, is_code};
use crate::policy::{self, Provenance, Reason};

wasmtime::component::bindgen!({ path: "wit/policy.wit", world: "registry-policy" });

use exports::peili::policy::registry as abi;
pub(super) use peili::policy::logging;
pub(super) use peili::policy::types::Node;
use peili::policy::types::{self, TrustLevel};

/// Longest text of a policy that is shown, in bytes.
const MESSAGE: usize = 256;
/// Sources of one plan.
const SOURCES: usize = 16;
/// Errors about settings that are shown.
const ERRORS: usize = 16;

impl types::Host for Host {}

/// What guests may import.
pub(super) fn add_to_linker(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    RegistryPolicy::add_to_linker::<_, HasSelf<Host>>(linker, |host| host)
}

impl From<&policy::Node> for Node {
    fn from(node: &policy::Node) -> Self {
        let provenance = |from| match from {
            Provenance::Claimed => types::Provenance::Claimed,
            Provenance::Verified => types::Provenance::Verified,
            Provenance::Configured => types::Provenance::Configured,
        };
        Self {
            id: node.id.clone(),
            name: node.name.clone(),
            name_provenance: provenance(node.name_provenance),
            version: node.version.clone(),
            labels: node
                .labels
                .iter()
                .map(|label| types::Label {
                    key: label.key.clone(),
                    value: label.value.clone(),
                    provenance: provenance(label.provenance),
                })
                .collect(),
        }
    }
}

/// A request as guests get it.
pub(super) fn request(request: &domain::Request) -> abi::Request {
    let (media_type, size) = &request.descriptor;
    abi::Request {
        operation: match request.operation {
            domain::Operation::Manifests => abi::Operation::Manifests,
            domain::Operation::Blobs => abi::Operation::Blobs,
            domain::Operation::Tags => abi::Operation::Tags,
            domain::Operation::Referrers => abi::Operation::Referrers,
        },
        requester: match &request.requester {
            domain::Requester::Runtime => abi::Requester::Runtime,
            domain::Requester::Peer(node, level) => {
                abi::Requester::Peer(abi::Peer { node: node.into(), level: (*level).into() })
            }
        },
        registry: request.name.registry.as_str().into(),
        repository: request.name.repository.as_str().into(),
        reference: request.reference.as_ref().map(|reference| match reference {
            domain::Reference::Tag(tag) => abi::Reference::Tag(tag.as_str().into()),
            domain::Reference::Digest(digest) => abi::Reference::Digest(digest.to_string()),
        }),
        descriptor: abi::Descriptor { media_type: media_type.as_deref().map(Into::into), size: *size },
        availability: abi::Availability {
            local: request.availability.local,
            peers: request.availability.peers,
            peers_in_zone: 0,
            tag_age: None,
        },
        upstreams: Vec::new(),
        now: request
            .now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
        attributes: Vec::new(),
    }
}

/// A verdict, or what is wrong with it.
pub(super) fn verdict(verdict: abi::Verdict) -> Result<domain::Verdict, String> {
    let reason = verdict.reason.map(reason).transpose()?;
    let decision = match verdict.decision {
        abi::Decision::Abstain => domain::Decision::Abstain,
        abi::Decision::Bypass => domain::Decision::Bypass,
        abi::Decision::Deny => domain::Decision::Deny,
        abi::Decision::Mirror(plan) => domain::Decision::Mirror(self::plan(plan)?),
    };
    Ok(domain::Verdict { decision, reason })
}

fn reason(reason: types::Reason) -> Result<Reason, String> {
    if !is_code(&reason.code) {
        return Err("the code of its reason is not kebab-case of at most 64 bytes".into());
    }
    Ok(Reason { message: clean(&reason.message, MESSAGE), code: reason.code })
}

fn plan(plan: abi::Plan) -> Result<domain::Plan, String> {
    let sources = plan.sources.map(|sources| {
        if sources.len() > SOURCES {
            return Err(format!("more than {SOURCES} sources"));
        }
        sources.into_iter().map(source).collect::<Result<Vec<_>, _>>()
    });
    if plan.max_fan_out == Some(0) {
        return Err("a fan-out of 0".into());
    }
    Ok(domain::Plan {
        sources: sources.transpose()?,
        without_peers: plan.forbidden.contains(abi::SourceKinds::PEERS),
        without_origin: plan.forbidden.contains(abi::SourceKinds::ORIGIN),
        tag_resolution: plan.tag_resolution.map(|resolution| match resolution {
            abi::TagResolution::Peers => domain::TagResolution::Peers,
            abi::TagResolution::Home => domain::TagResolution::Home,
            abi::TagResolution::Revalidated => domain::TagResolution::Revalidated,
            abi::TagResolution::UpstreamOnly => domain::TagResolution::UpstreamOnly,
        }),
        max_tag_age: plan.max_tag_age.map(Duration::from_millis),
        min_trust: plan.min_trust.map(Into::into),
        always_verify: plan.always_verify,
        max_fan_out: plan.max_fan_out,
    })
}

fn source(source: abi::Source) -> Result<domain::Source, String> {
    match source {
        abi::Source::Peers => Ok(domain::Source::Peers),
        abi::Source::Origin => Ok(domain::Source::Origin),
        abi::Source::Upstream(route) => {
            Err(format!("the upstream `{}` is not configured", clean(&route.upstream, 64)))
        }
    }
}

/// What a policy says of itself, or what it needs that is not here.
pub(super) fn info(info: &exports::peili::policy::lifecycle::PolicyInfo) -> Result<Info, String> {
    match info.requires.first() {
        Some(feature) => Err(clean(feature, MESSAGE)),
        None => Ok(Info { summary: clean(&info.summary, MESSAGE) }),
    }
}

/// Pointers and messages.
pub(super) fn setting_errors(
    errors: &[exports::peili::policy::lifecycle::SettingError],
) -> Vec<(String, String)> {
    let errors = errors.iter().take(ERRORS);
    errors.map(|error| (clean(&error.pointer, MESSAGE), clean(&error.message, MESSAGE))).collect()
}

impl From<Level> for TrustLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::None => Self::None,
            Level::Introduce => Self::Introduce,
            Level::Blobs => Self::Blobs,
            Level::Tags => Self::Tags,
        }
    }
}

impl From<TrustLevel> for Level {
    fn from(level: TrustLevel) -> Self {
        match level {
            TrustLevel::None => Self::None,
            TrustLevel::Introduce => Self::Introduce,
            TrustLevel::Blobs => Self::Blobs,
            TrustLevel::Tags => Self::Tags,
        }
    }
}
