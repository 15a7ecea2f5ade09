//! Patterns over `registry/repository`, one rule for every setting that has them: `*` and `?` do not match `/`, `**` does.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::Name;

/// A set of patterns, compiled.
#[derive(Clone, Debug, Default)]
pub struct Patterns(GlobSet);

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
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            let glob = GlobBuilder::new(pattern).literal_separator(true).build();
            set.add(glob.map_err(|reason| error(pattern, &reason))?);
        }
        set.build().map(Self).map_err(|reason| error(&patterns.join(", "), &reason))
    }

    /// Whether there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether any pattern matches `name`.
    pub fn matches(&self, name: &Name) -> bool {
        !self.0.is_empty() && self.0.is_match(name.to_string())
    }
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
}
