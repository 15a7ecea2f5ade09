//! The registry world of version 0.1.

#![allow(missing_docs, unreachable_pub, reason = "generated; the documentation is in the contract")]

use std::time::Duration;

use self::bindings::exports::peili::policy::registry as abi;
use self::bindings::exports::peili::policy::registry::Request;
use super::{milliseconds, reason, timestamp};
use crate::oci::Health;
use crate::policy::registry::{self as domain, Registry};
use crate::policy::text::clean;

pub(super) mod bindings {
    wasmtime::component::bindgen!({ path: "wit/policy.wit", world: "registry-policy" });
}

/// Sources of one plan.
const SOURCES: usize = 16;

super::abi!(Registry, RegistryPolicy, RegistryPolicyPre, peili_policy_registry, call_decide, Request);

/// A request as guests get it.
fn request(request: &domain::Request) -> Request {
    let (media_type, size) = &request.descriptor;
    Request {
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
            tag_age: request.availability.tag_age.map(milliseconds),
        },
        upstreams: request
            .upstreams
            .iter()
            .map(|upstream| abi::Upstream {
                name: upstream.name.to_string(),
                health: match upstream.health {
                    Health::Unknown => abi::Health::Unknown,
                    Health::Healthy => abi::Health::Healthy,
                    Health::Degraded => abi::Health::Degraded,
                    Health::RateLimited => abi::Health::RateLimited,
                    Health::Unreachable => abi::Health::Unreachable,
                },
                latency: upstream.latency.map(milliseconds),
            })
            .collect(),
        now: timestamp(request.now),
        attributes: Vec::new(),
    }
}

/// A verdict, or what is wrong with it.
fn verdict(verdict: abi::Verdict) -> Result<domain::Verdict, String> {
    let reason = verdict.reason.map(reason).transpose()?;
    let decision = match verdict.decision {
        abi::Decision::Abstain => domain::Decision::Abstain,
        abi::Decision::Bypass => domain::Decision::Bypass,
        abi::Decision::Deny => domain::Decision::Deny,
        abi::Decision::Mirror(plan) => domain::Decision::Mirror(self::plan(plan)?),
    };
    Ok(domain::Verdict { decision, reason })
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
        without_upstreams: plan.forbidden.contains(abi::SourceKinds::UPSTREAMS),
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
    let abi::Route { upstream, repository } = match source {
        abi::Source::Peers => return Ok(domain::Source::Peers),
        abi::Source::Origin => return Ok(domain::Source::Origin),
        abi::Source::Upstream(route) => route,
    };
    let repository =
        repository.map(|name| name.parse().map_err(|_| format!("`{}` is no repository", clean(&name, 64))));
    Ok(domain::Source::Upstream(domain::Route {
        upstream: upstream.into(),
        repository: repository.transpose()?,
    }))
}
