//! Which registries and repositories may be used: a name that no glob allows, or that one denies, is refused.
//!
//! It never asks for more than the others do: what it does not refuse it leaves to them.

use peili_policy::registry::{Policy, Request, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError, data};
use serde::Deserialize;

/// The lists of the operator.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Globs over `registry/repository`. Empty: all that is not denied.
    pub allow: Vec<String>,
    /// Globs that are refused, whatever `allow` says.
    pub deny: Vec<String>,
    /// Names of `data` with more globs to allow, one a line. With any of them what is on no list is refused, also if they are empty.
    pub allow_data: Vec<String>,
    /// The same to refuse.
    pub deny_data: Vec<String>,
    /// What is said to who is refused, at most 200 bytes, such as whom to ask.
    pub message: String,
}

/// The policy.
#[derive(Debug)]
pub struct AllowList {
    /// `None`: all that is not denied.
    allow: Option<Globs>,
    deny: Globs,
    message: String,
}

impl Policy for AllowList {
    type Settings = Settings;

    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let mut errors = Vec::new();
        let mut globs = |list: &[String], key: &str, files: &[String]| {
            let (mut all, mut places) = (list.to_vec(), Vec::new());
            places.extend((0..list.len()).map(|index| (format!("/{key}/{index}"), String::new())));
            for (index, file) in files.iter().enumerate() {
                let pointer = format!("/{key}-data/{index}");
                let lines = data::lines(file).unwrap_or_else(|message| {
                    errors.push(SettingError { pointer: pointer.clone(), message });
                    Vec::new()
                });
                for (number, line) in lines {
                    all.push(line);
                    places.push((pointer.clone(), format!("line {number} of `{file}`: ")));
                }
            }
            Globs::new(&all).unwrap_or_else(|GlobError { index, message }| {
                let (pointer, place) = places.swap_remove(index);
                errors.push(SettingError { pointer, message: format!("{place}{message}") });
                Globs::default()
            })
        };
        let allow = globs(&settings.allow, "allow", &settings.allow_data);
        let deny = globs(&settings.deny, "deny", &settings.deny_data);
        let is_closed = !(allow.is_empty() && settings.allow_data.is_empty());
        if settings.message.len() > 200 {
            errors.push(SettingError { pointer: "/message".into(), message: "more than 200 bytes".into() });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self { allow: is_closed.then_some(allow), deny, message: settings.message })
    }

    fn summary(&self) -> String {
        match (self.allow.as_ref().map(Globs::len), self.deny.len()) {
            (None, 0) => "allows all".into(),
            (None, denied) => format!("allows all but {denied} globs"),
            (Some(allowed), 0) => format!("allows {allowed} globs"),
            (Some(allowed), denied) => format!("allows {allowed} globs, denies {denied}"),
        }
    }

    fn decide(&mut self, request: &Request) -> Verdict {
        let name = request.name();
        let (code, what) = if self.deny.matches(&name) {
            ("denied", "is denied")
        } else if self.allow.as_ref().is_some_and(|allow| !allow.matches(&name)) {
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
    fn globs_of_files_are_globs_too() {
        let settings = r#"{"allow": ["docker.io/library/*"], "allow-data": ["team"], "deny-data": ["bad"]}"#;
        let files = [("team", "# of the team\nghcr.io/team/*\n"), ("bad", "ghcr.io/team/old")];
        let mut policy = data::testing::with(&files, || policy(settings));
        assert_eq!(policy.summary(), "allows 2 globs, denies 1");
        for (repository, is_denied) in [("team/app", false), ("team/old", true), ("other/app", true)] {
            let verdict = policy.decide(&request("ghcr.io", repository));
            assert_eq!(verdict.decision == Decision::Deny, is_denied, "{repository}");
        }
        let empty = r#"{"allow-data": ["team"]}"#;
        let mut policy = data::testing::with(&[("team", "")], || self::policy(empty));
        let verdict = policy.decide(&request("ghcr.io", "team/app"));
        assert_eq!(verdict.decision, Decision::Deny, "an empty list allows nothing");
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named_by_its_line() {
        let settings = serde_json::from_str(r#"{"allow-data": ["team", "none"]}"#).unwrap();
        let made = data::testing::with(&[("team", "a/b\n\na//b")], || AllowList::new(settings, None));
        let errors: Vec<_> = made
            .unwrap_err()
            .into_iter()
            .map(|error| format!("{}: {}", error.pointer, error.message))
            .collect();
        assert!(errors[0].starts_with("/allow-data/1: no file `none`"), "{errors:?}");
        assert!(errors[1].starts_with("/allow-data/0: line 3 of `team`: an empty segment"), "{errors:?}");
    }

    #[test]
    fn each_wrong_glob_is_named() {
        let settings = serde_json::from_str(r#"{"allow": ["a/b", "a//b"], "deny": ["{a}"]}"#).unwrap();
        let errors = AllowList::new(settings, None).unwrap_err();
        let pointers: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
        assert_eq!(pointers, ["/allow/1", "/deny/0"]);
    }
}
