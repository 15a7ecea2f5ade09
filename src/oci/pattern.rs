//! Patterns over `registry/repository`, one rule for every setting that has them: `*` and `?` do not match `/`, `**` does.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::Name;

/// A set of patterns, compiled.
#[derive(Clone, Debug, Default)]
pub struct Patterns {
    exact: GlobSet,
    /// Those that have a port, without it.
    portless: GlobSet,
}

/// A pattern that cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("`{pattern}` is not a pattern: {reason}")]
pub struct PatternError {
    /// As configured.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Patterns {
    /// Compiles patterns.
    ///
    /// # Errors
    /// The first that cannot be used.
    pub fn new(patterns: &[String]) -> Result<Self, PatternError> {
        let error = |pattern: &str, error: &globset::Error| PatternError {
            pattern: pattern.into(),
            reason: error.kind().to_string(),
        };
        let (mut exact, mut portless) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        for pattern in patterns {
            let glob = |text: &str| {
                let glob = GlobBuilder::new(text).literal_separator(true).build();
                glob.map_err(|reason| error(pattern, &reason))
            };
            exact.add(glob(pattern)?);
            let without = without_ports(pattern);
            if without != *pattern {
                portless.add(glob(&without)?);
            }
        }
        let build = |set: GlobSetBuilder| set.build().map_err(|reason| error(&patterns.join(", "), &reason));
        Ok(Self { exact: build(exact)?, portless: build(portless)? })
    }

    /// Whether there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty()
    }

    /// Whether any pattern matches `name`.
    pub fn matches(&self, name: &Name) -> bool {
        !self.exact.is_empty() && self.exact.is_match(name.to_string())
    }

    /// Whether any pattern matches `name`, whose registry has no port, or could match it if it had one.
    pub fn matches_any_port(&self, name: &Name) -> bool {
        self.matches(name) || !self.portless.is_empty() && self.portless.is_match(name.to_string())
    }
}

/// Takes the ports out of a pattern: a colon, digits or wildcards, and the end of the registry or of an alternative. An
/// address has colons too, but none before such an end.
fn without_ports(pattern: &str) -> String {
    let mut left = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some(colon) = rest.find(':') {
        let after =
            rest[colon + 1..].trim_start_matches(|c: char| c.is_ascii_digit() || matches!(c, '*' | '?'));
        let is_port = after.is_empty() || after.starts_with(['/', ',', '}']);
        left.push_str(&rest[..colon]);
        if !is_port {
            left.push(':');
        }
        rest = if is_port { after } else { &rest[colon + 1..] };
    }
    left + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stop_at_slashes() {
        let patterns = Patterns::new(&["ghcr.io/*".into(), "docker.io/**/base".into()]).unwrap();
        let check =
            |name: &str, expected| assert_eq!(patterns.matches(&name.parse().unwrap()), expected, "{name}");
        check("ghcr.io/a", true);
        check("ghcr.io/a/b", false);
        check("docker.io/a/b/base", true);
        assert!(Patterns::new(&["[".into()]).unwrap_err().to_string().contains("`[`"));
        assert!(!Patterns::default().matches(&"a.io/b".parse().unwrap()));
    }

    #[test]
    fn a_port_that_is_unknown_may_be_any() {
        let check = |pattern: &str, name: &str, expected| {
            let patterns = Patterns::new(&[pattern.into()]).unwrap();
            assert_eq!(patterns.matches_any_port(&name.parse().unwrap()), expected, "{pattern} {name}");
        };
        for pattern in
            ["r.local/**", "r.local:5000/**", "r.local:*/**", "*:5000/**", "{a.io:1,r.local:2}/**", "**"]
        {
            check(pattern, "r.local/secret/app", true);
        }
        check("r.local:5000/**", "other.local/secret/app", false);
        check("r.local:5000/open/**", "r.local/secret/app", false);
        check("r.local:5000x/**", "r.local/secret/app", false);
        check("\\[::1\\]:5000/**", "[::1]/app", true);
        check("\\[::1\\]/**", "[::2]/app", false);
        let patterns = Patterns::new(&["r.local:5000/**".into()]).unwrap();
        assert!(!patterns.matches(&"r.local/app".parse().unwrap()));
    }
}
