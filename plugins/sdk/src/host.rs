//! What stands between a policy and its host: the place of the instance, the reading of settings, the log.

use std::sync::Mutex;

use serde::de::DeserializeOwned;

use crate::contract::peili::policy::logging;
use crate::{LogLevel, PolicyInfo, SettingError};

/// The policy of this instance, from its configuration on.
#[doc(hidden)]
pub struct Slot<P>(Mutex<Option<P>>);

impl<P> Slot<P> {
    /// Not configured yet.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Asks the policy.
    ///
    /// # Panics
    /// It was not configured: the host configures before all else.
    pub fn with<T>(&self, ask: impl FnOnce(&mut P) -> T) -> T {
        let mut policy = self.0.lock().expect("a policy that panicked is never asked again");
        ask(policy.as_mut().expect("the host configures before all else"))
    }
}

impl<P> Default for Slot<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads the settings, and puts the policy that `make` makes of them into its place.
#[doc(hidden)]
pub fn configure<P, S: DeserializeOwned>(
    slot: &Slot<P>,
    settings: &str,
    make: impl FnOnce(S) -> Result<(P, String), Vec<SettingError>>,
) -> Result<PolicyInfo, Vec<SettingError>> {
    std::panic::set_hook(Box::new(|panic| log(LogLevel::Error, &panic.to_string())));
    let settings = read(settings).map_err(|error| vec![error])?;
    let (policy, summary) = make(settings)?;
    *slot.0.lock().expect("nothing was asked yet") = Some(policy);
    Ok(PolicyInfo { summary, requires: Vec::new(), attributes: Vec::new() })
}

fn read<S: DeserializeOwned>(text: &str) -> Result<S, SettingError> {
    let mut reader = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| SettingError { pointer: pointer(error.path()), message: error.inner().to_string() })
}

/// RFC 6901.
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        let name = match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key } => key.replace('~', "~0").replace('/', "~1"),
            Segment::Enum { variant } => variant.clone(),
            Segment::Unknown => continue,
        };
        pointer.push('/');
        pointer.push_str(&name);
    }
    pointer
}

/// Makes the component of a policy of any world: the name of the world's module, of its function with question and answer, and of its
/// bindings' macro.
#[doc(hidden)]
#[macro_export]
macro_rules! export_policy {
    ($policy:ty, $world:ident, $ask:ident($question:ident) -> $answer:ident, $bindings:ident) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "the exports of a component are functions of C")]
        mod peili_policy_exports {
            use super::*;
            use $crate::contract::exports::peili::policy::lifecycle;
            use $crate::$world::bindings::exports::peili::policy::$world;

            static POLICY: $crate::Slot<$policy> = $crate::Slot::new();

            struct Exports;

            impl lifecycle::Guest for Exports {
                fn configure(
                    settings: ::std::string::String,
                    here: ::std::option::Option<$crate::Node>,
                ) -> ::std::result::Result<$crate::PolicyInfo, ::std::vec::Vec<$crate::SettingError>> {
                    $crate::configure(&POLICY, &settings, |settings| {
                        let policy = $crate::$world::make::<$policy>(settings, here)?;
                        let summary = $crate::$world::Policy::summary(&policy);
                        ::std::result::Result::Ok((policy, summary))
                    })
                }
            }

            impl $world::Guest for Exports {
                fn $ask(question: $world::$question) -> $world::$answer {
                    POLICY.with(|policy| $crate::$world::Policy::$ask(policy, &question))
                }
            }

            $crate::contract::export_base_bindings!(Exports with_types_in $crate::contract);
            $crate::$world::bindings::$bindings!(Exports with_types_in $crate::$world::bindings);
        }
    };
}

/// A line in the host's log, under this policy's name. The host cuts it at 1 KiB and takes few at a time.
pub fn log(level: LogLevel, message: &str) {
    if cfg!(target_arch = "wasm32") {
        logging::log(level, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        #[allow(dead_code, reason = "read for its errors")]
        allow: Vec<String>,
    }

    #[test]
    fn wrong_settings_are_named_by_pointer() {
        for (text, place) in [
            (r#"{"allow": ["a", 7]}"#, "/allow/1"),
            (r#"{"allow": [], "deny/x~": []}"#, "/deny~1x~0"),
            ("7", ""),
            ("{}", ""),
        ] {
            let error = read::<Settings>(text).unwrap_err();
            assert_eq!(error.pointer, place, "{}", error.message);
        }
    }

    #[test]
    fn a_policy_is_asked_after_it_was_configured() {
        let slot = Slot::new();
        let info = configure(&slot, r#"{"allow": ["a"]}"#, |settings: Settings| {
            Ok((settings.allow.len(), "one".to_owned()))
        });
        assert_eq!(info.unwrap().summary, "one");
        assert_eq!(slot.with(|count| *count), 1);
    }
}
