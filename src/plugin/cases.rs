//! `peili plugin test`: the cases of an author, asked of the real engine.
//!
//! What a case is, and when it has passed, is `policy`'s, since a node asks them too.

use std::path::{Path, PathBuf};

use crate::policy::cases::{Case, File, Tested};
use crate::policy::metrics::Metrics;
use crate::policy::registry::RegistryPolicy;
use crate::policy::trust::TrustPolicy;
use crate::policy::{self, LoadError, Policies, Said};

/// Largest file of cases, in bytes.
const SIZE_LIMIT: u64 = 4 << 20;

/// Why the cases cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum CasesError {
    /// The file of cases cannot be read.
    #[error("cannot read {}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The component is of no world, or of one that has no cases.
    #[error("{} is no policy of the registry or the trust world", .0.display())]
    World(PathBuf),
    /// A case that is none.
    #[error("case `{case}`: {reason}")]
    Case {
        /// Which.
        case: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A node would not take the component with the settings of a case.
    #[error("case `{case}`: {error}")]
    Load {
        /// Which.
        case: String,
        /// Why.
        error: Box<LoadError>,
    },
}

/// Runs the cases of a file with the component at `path`.
///
/// # Errors
/// They cannot be run; a case that fails is none.
pub fn test(path: &Path, cases: &Path) -> Result<Vec<Tested>, CasesError> {
    let file = read(cases)?;
    let is_trust = match super::world(path) {
        Some("registry") => false,
        Some("trust") => true,
        _ => return Err(CasesError::World(path.to_owned())),
    };
    let policies = Policies::new(file.here(), Metrics::default());
    let mut tested = Vec::new();
    for case in &file.cases {
        let settings = case.settings.as_ref().unwrap_or(&file.settings);
        let config = super::alone(path, settings.clone(), is_trust);
        let load = || {
            // What is in force already is kept, with its instances: here they are to be new ones.
            let loaded = policies.apply(&policy::Config::default()).and_then(|()| policies.apply(&config));
            loaded.map_err(|error| CasesError::Load { case: case.name.clone(), error: error.into() })
        };
        load()?;
        let mut said = [ask(case, &policies, is_trust)?, ask(case, &policies, is_trust)?, String::new()];
        load()?;
        said[2] = ask(case, &policies, is_trust)?;
        tested.push(case.judge(&said));
    }
    Ok(tested)
}

fn read(path: &Path) -> Result<File, CasesError> {
    use std::io::Read as _;
    let wrong = |reason: String| CasesError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut text = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut text).map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > SIZE_LIMIT {
        return Err(wrong("it has more than 4 MiB".into()));
    }
    File::parse(&text).map_err(wrong)
}

/// What the policy says.
fn ask(case: &Case, policies: &Policies, is_trust: bool) -> Result<String, CasesError> {
    let wrong = |reason| CasesError::Case { case: case.name.clone(), reason };
    let said = if is_trust {
        TrustPolicy::explain(policies, &case.trust().map_err(wrong)?).1
    } else {
        RegistryPolicy::explain(policies, &case.registry().map_err(wrong)?).1
    };
    Ok(said.into_iter().next().map(|Said { verdict, .. }| verdict).unwrap_or_default())
}
