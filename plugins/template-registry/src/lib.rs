//! Say here what the policy decides. As it begins: what a glob of `deny` matches is refused.
//!
//! It is asked for each manifest and blob, on the node that pulls and on the one that serves. All that it may know is in the
//! request; its verdict must depend on that and on the settings alone.

use peili_policy::registry::{Policy, Request, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError};
use serde::Deserialize;

/// What the operator may say in the configuration, under `settings`. An unknown key is an error that names it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Globs over `registry/repository`: `docker.io/library/*`, `ghcr.io/**`.
    pub deny: Vec<String>,
}

/// The policy, made of its settings.
#[derive(Debug)]
pub struct MyPolicy {
    deny: Globs,
}

impl Policy for MyPolicy {
    type Settings = Settings;

    /// Once for each instance: what is costly belongs here. What is wrong is told with its place in the settings.
    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let wrong =
            |GlobError { index, message }| vec![SettingError { pointer: format!("/deny/{index}"), message }];
        Ok(Self { deny: Globs::new(&settings.deny).map_err(wrong)? })
    }

    /// One line for `peili status`.
    fn summary(&self) -> String {
        format!("denies {} globs", self.deny.len())
    }

    /// Without an opinion, abstain: others decide, at last Peili itself. A code is kebab-case; the message is shown to who pulls.
    fn decide(&mut self, request: &Request) -> Verdict {
        if self.deny.matches(&request.name()) {
            return Verdict::deny("denied", "it is on the list of what is not used here");
        }
        Verdict::abstain()
    }
}

peili_policy::export_registry_policy!(MyPolicy);

#[cfg(test)]
mod tests {
    use peili_policy::registry::{Availability, Decision, Descriptor, Operation, Reference, Requester};

    use super::*;

    fn request(registry: &str, repository: &str, tag: &str) -> Request {
        Request {
            operation: Operation::Manifests,
            requester: Requester::Runtime,
            registry: registry.into(),
            repository: repository.into(),
            reference: Some(Reference::Tag(tag.into())),
            descriptor: Descriptor { media_type: None, size: None },
            availability: Availability { local: false, peers: 0, peers_in_zone: 0, tag_age: None },
            upstreams: vec![],
            now: 0,
            attributes: vec![],
        }
    }

    #[test]
    fn what_is_on_the_list_is_denied() {
        let settings = serde_json::from_str(r#"{"deny": ["quay.io/**"]}"#).unwrap();
        let mut policy = MyPolicy::new(settings, None).unwrap();
        assert_eq!(policy.decide(&request("quay.io", "team/app", "v1")).decision, Decision::Deny);
        assert_eq!(policy.decide(&request("docker.io", "library/nginx", "v1")), Verdict::abstain());
    }

    #[test]
    fn a_wrong_glob_is_named() {
        let settings = Settings { deny: vec!["a/b".into(), "a//b".into()] };
        assert_eq!(MyPolicy::new(settings, None).unwrap_err()[0].pointer, "/deny/1");
    }
}
