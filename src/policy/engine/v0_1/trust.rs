//! The trust world of version 0.1.

#![allow(missing_docs, unreachable_pub, reason = "generated; the documentation is in the contract")]

use std::time::Duration;

use self::bindings::exports::peili::policy::trust as abi;
use self::bindings::exports::peili::policy::trust::Request;
use super::types::Attribute;
use super::{milliseconds, reason, timestamp};
use crate::policy::trust::{self as domain, RATE_MIN, TTL_LIMIT, TTL_MIN, Trust};

pub(super) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit/policy.wit",
        world: "trust-policy",
        with: {
            "peili:policy/types": crate::policy::engine::v0_1::common::types,
            "peili:policy/logging": crate::policy::engine::v0_1::common::logging,
            "peili:policy/data": crate::policy::engine::v0_1::common::data,
        },
    });
}

/// Longest denial: what made a policy deny is asked about again after it.
const DENY_LIMIT: Duration = Duration::from_hours(24);

super::abi!(Trust, TrustPolicy, TrustPolicyPre, peili_policy_trust, call_evaluate, Request);

fn request(request: &domain::Request) -> Request {
    let conduct = &request.conduct;
    let claim = |(name, value): &(domain::Claim, String)| Attribute {
        name: name.as_str().into(),
        value: value.clone(),
    };
    Request {
        peer: (&request.peer).into(),
        observed_addresses: request.observed.iter().map(ToString::to_string).collect(),
        announced_addresses: request.announced.clone(),
        evidence: request
            .evidence
            .iter()
            .map(|evidence| abi::Evidence {
                method: evidence.method.as_str().into(),
                verification: abi::Verification::Verified,
                claims: evidence.claims.iter().map(claim).collect(),
            })
            .collect(),
        conduct: abi::Conduct {
            bytes_verified: conduct.bytes,
            digest_mismatches: conduct.digest_mismatches,
            timeouts: conduct.timeouts,
            protocol_errors: conduct.protocol_errors,
            since_last_fault: conduct.since_last_fault.map(milliseconds),
        },
        policy_hash: None,
        level: request.level.into(),
        now: timestamp(request.now),
        attributes: Vec::new(),
    }
}

/// A verdict, or what is wrong with it. Times are brought within their limits.
fn verdict(verdict: abi::Verdict) -> Result<domain::Verdict, String> {
    let reason = verdict.reason.map(reason).transpose()?;
    let decision = match verdict.decision {
        abi::Decision::Abstain => domain::Decision::Abstain,
        abi::Decision::Deny(time) => {
            domain::Decision::Deny(Duration::from_millis(time).clamp(TTL_MIN, DENY_LIMIT))
        }
        abi::Decision::Allow(grant) => {
            if grant.max_uploads == Some(0) {
                return Err("uploads are limited to 0; `serve` says that nothing is sent".into());
            }
            if grant.max_upload_rate.is_some_and(|rate| rate < RATE_MIN) {
                return Err(format!("the upload rate is below {RATE_MIN} bytes a second, which is a stall"));
            }
            domain::Decision::Allow(domain::Grant {
                level: grant.level.into(),
                serve: grant.serve,
                max_uploads: grant.max_uploads,
                max_upload_rate: grant.max_upload_rate,
                ttl: Duration::from_millis(grant.ttl).clamp(TTL_MIN, TTL_LIMIT),
            })
        }
    };
    Ok(domain::Verdict { decision, reason })
}
