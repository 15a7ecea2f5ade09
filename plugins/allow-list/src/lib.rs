//! Which registries and repositories may be used: a name that no glob allows, or that one denies, is refused.
//!
//! It never asks for more than the others do: what it does not refuse it leaves to them.

use peili_policy::registry::{Policy, Request, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError};
use serde::Deserialize;

/// The lists of the operator.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Globs over `registry/repository`. Empty: all that is not denied.
    pub allow: Vec<String>,
    /// Globs that are refused, whatever `allow` says.
    pub deny: Vec<String>,
    /// What is said to who is refused, at most 200 bytes, such as whom to ask.
    pub message: String,
}

/// The policy.
#[derive(Debug)]
pub struct AllowList {
    allow: Globs,
    deny: Globs,
    message: String,
}

impl Policy for AllowList {
    type Settings = Settings;

    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let mut errors = Vec::new();
        let mut globs = |list: &[String], key: &str| {
            Globs::new(list).unwrap_or_else(|GlobError { index, message }| {
                errors.push(SettingError { pointer: format!("/{key}/{index}"), message });
                Globs::default()
            })
        };
        let (allow, deny) = (globs(&settings.allow, "allow"), globs(&settings.deny, "deny"));
        if settings.message.len() > 200 {
            errors.push(SettingError { pointer: "/message".into(), message: "more than 200 bytes".into() });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self { allow, deny, message: settings.message })
    }

    fn summary(&self) -> String {
        match (self.allow.len(), self.deny.len()) {
            (0, 0) => "allows all".into(),
            (0, denied) => format!("allows all but {denied} globs"),
            (allowed, 0) => format!("allows {allowed} globs"),
            (allowed, denied) => format!("allows {allowed} globs, denies {denied}"),
        }
    }

    fn decide(&mut self, request: &Request) -> Verdict {
        let name = request.name();
        let (code, what) = if self.deny.matches(&name) {
            ("denied", "is denied")
        } else if !self.allow.is_empty() && !self.allow.matches(&name) {
            ("not-allowed", "is not on the allow list")
        } else {
            return Verdict::abstain();
        };
        if self.message.is_empty() {
            Verdict::deny(code, &format!("{} {what}", &request.registry))
        } else {
            Verdict::deny(code, &self.message)
        }
    }
}

peili_policy::export_registry_policy!(AllowList);

#[cfg(test)]
mod tests {
    use peili_policy::registry::{Availability, Decision, Descriptor, Operation, Reference, Requester};

    use super::*;

    fn request(registry: &str, repository: &str) -> Request {
        Request {
            operation: Operation::Manifests,
            requester: Requester::Runtime,
            registry: registry.into(),
            repository: repository.into(),
            reference: Some(Reference::Tag("v1".into())),
            descriptor: Descriptor { media_type: None, size: None },
            availability: Availability { local: false, peers: 0, peers_in_zone: 0, tag_age: None },
            upstreams: vec![],
            now: 0,
            attributes: vec![],
        }
    }

    fn policy(settings: &str) -> AllowList {
        AllowList::new(serde_json::from_str(settings).unwrap(), None).unwrap()
    }

    #[test]
    fn what_is_not_allowed_is_denied_and_all_else_left_to_others() {
        let mut policy =
            policy(r#"{"allow": ["docker.io/library/*", "ghcr.io/**"], "deny": ["ghcr.io/evil/**"]}"#);
        let mut decide = |registry, repository| policy.decide(&request(registry, repository));
        assert_eq!(decide("docker.io", "library/nginx"), Verdict::abstain());
        assert_eq!(decide("ghcr.io", "a/b/c"), Verdict::abstain());
        for (registry, repository, code) in [
            ("quay.io", "a/b", "not-allowed"),
            ("docker.io", "team/x", "not-allowed"),
            ("ghcr.io", "evil/x", "denied"),
        ] {
            let verdict = decide(registry, repository);
            assert_eq!(verdict.decision, Decision::Deny);
            let reason = verdict.reason.unwrap();
            assert_eq!(reason.code, code);
            assert!(reason.message.contains(registry), "{}", reason.message);
        }
    }

    #[test]
    fn without_lists_nothing_is_denied() {
        assert_eq!(policy("{}").decide(&request("quay.io", "a/b")), Verdict::abstain());
    }

    #[test]
    fn each_wrong_glob_is_named() {
        let settings = serde_json::from_str(r#"{"allow": ["a/b", "a//b"], "deny": ["{a}"]}"#).unwrap();
        let errors = AllowList::new(settings, None).unwrap_err();
        let pointers: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
        assert_eq!(pointers, ["/allow/1", "/deny/0"]);
    }
}
