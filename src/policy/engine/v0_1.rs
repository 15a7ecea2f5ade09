//! Version 0.1 of the contract: what the macro makes of `wit/policy.wit`, and the way from and to the host's own types.
//! What a verdict must be is checked here.

pub(super) mod election;
pub(super) mod registry;
pub(super) mod trust;

use std::time::{Duration, SystemTime};

use wasmtime::component::{HasSelf, InstancePre, Linker};
use wasmtime::{Result, Store};

use super::Info;
use super::host::Host;
use crate::oci::Level;
use crate::policy::text::{clean, is_code};
use crate::policy::world::World;
use crate::policy::{self, Provenance, Reason};

use registry::bindings::peili::policy as common;

pub(super) use common::types::Node;
use common::types::{self, TrustLevel};
pub(super) use common::{data, logging};

/// Longest text of a policy that is shown, in bytes.
const MESSAGE: usize = 256;
/// Features of a host that a policy may require (`policy-info.requires`).
const FEATURES: [&str; 1] = ["data"];
/// Errors about settings that are shown.
const ERRORS: usize = 16;

/// A world as components have it.
pub(in crate::policy) trait Abi: World {
    /// A component that can be instantiated.
    type Pre: Clone + Send + Sync;
    /// What an instance exports.
    type Exports: Send;
    /// A request as guests get it.
    type Asked;

    /// Looks for the world's exports.
    fn pre(pre: InstancePre<Host>) -> Result<Self::Pre>;

    /// An instance that is not configured.
    fn instantiate(pre: &Self::Pre, store: &mut Store<Host>) -> Result<Self::Exports>;

    /// Configures it.
    fn configure(
        exports: &Self::Exports,
        store: &mut Store<Host>,
        settings: &str,
        here: Option<&Node>,
    ) -> Result<std::result::Result<Info, Unconfigured>>;

    /// A request as guests get it.
    fn request(request: &Self::Request) -> Self::Asked;

    /// Asks, and reads the answer: a verdict, or what is wrong with it.
    fn ask(
        exports: &Self::Exports,
        store: &mut Store<Host>,
        asked: &Self::Asked,
    ) -> Result<std::result::Result<Self::Verdict, String>>;
}

/// Why a policy cannot be configured, by its own word.
#[derive(Debug)]
pub(in crate::policy) enum Unconfigured {
    /// Pointers and messages, escaped.
    Settings(Vec<(String, String)>),
    /// A feature that it needs and that is not here.
    Requires(String),
}

/// Implements [`Abi`] by what the generator made in `bindings`, and by `request` and `verdict` beside it: each world has its own
/// copy of all types but those of `types`.
macro_rules! abi {
    ($world:ty, $exports:ident, $pre:ident, $interface:ident, $ask:ident, $request:ident) => {
        impl super::Abi for $world {
            type Pre = self::bindings::$pre<super::Host>;
            type Exports = self::bindings::$exports;
            type Asked = $request;

            fn pre(pre: ::wasmtime::component::InstancePre<super::Host>) -> ::wasmtime::Result<Self::Pre> {
                Self::Pre::new(pre)
            }

            fn instantiate(
                pre: &Self::Pre,
                store: &mut ::wasmtime::Store<super::Host>,
            ) -> ::wasmtime::Result<Self::Exports> {
                pre.instantiate(store)
            }

            fn configure(
                exports: &Self::Exports,
                store: &mut ::wasmtime::Store<super::Host>,
                settings: &str,
                here: Option<&super::Node>,
            ) -> ::wasmtime::Result<Result<super::Info, super::Unconfigured>> {
                let lifecycle = exports.peili_policy_lifecycle();
                Ok(match lifecycle.call_configure(store, settings, here)? {
                    Ok(info) => super::info(&info.summary, &info.requires),
                    Err(errors) => Err(super::setting_errors(
                        errors.iter().map(|error| (error.pointer.as_str(), error.message.as_str())),
                    )),
                })
            }

            fn request(request: &Self::Request) -> $request {
                self::request(request)
            }

            fn ask(
                exports: &Self::Exports,
                store: &mut ::wasmtime::Store<super::Host>,
                asked: &$request,
            ) -> ::wasmtime::Result<Result<Self::Verdict, String>> {
                Ok(verdict(exports.$interface().$ask(store, asked)?))
            }
        }
    };
}
use abi;

impl types::Host for Host {}

/// What guests may import: it is the same in all worlds.
pub(super) fn add_to_linker(linker: &mut Linker<Host>) -> Result<()> {
    logging::add_to_linker::<_, HasSelf<Host>>(linker, |host| host)?;
    data::add_to_linker::<_, HasSelf<Host>>(linker, |host| host)?;
    types::add_to_linker::<_, HasSelf<Host>>(linker, |host| host)
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

/// What a policy says of itself, or what it needs that is not here.
fn info(summary: &str, requires: &[String]) -> std::result::Result<Info, Unconfigured> {
    match requires.iter().find(|feature| !FEATURES.contains(&feature.as_str())) {
        Some(feature) => Err(Unconfigured::Requires(clean(feature, MESSAGE))),
        None => Ok(Info { summary: clean(summary, MESSAGE) }),
    }
}

fn setting_errors<'a>(errors: impl Iterator<Item = (&'a str, &'a str)>) -> Unconfigured {
    let errors = errors.take(ERRORS);
    Unconfigured::Settings(
        errors.map(|(pointer, message)| (clean(pointer, MESSAGE), clean(message, MESSAGE))).collect(),
    )
}

fn reason(reason: types::Reason) -> std::result::Result<Reason, String> {
    if !is_code(&reason.code) {
        return Err("the code of its reason is not kebab-case of at most 64 bytes".into());
    }
    Ok(Reason { message: clean(&reason.message, MESSAGE), code: reason.code })
}

/// Milliseconds since the Unix epoch.
fn timestamp(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, milliseconds)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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
