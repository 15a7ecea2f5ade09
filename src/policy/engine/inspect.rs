//! Whether bytes are a component that may be compiled: bounded, of a world and a version of the contract that this host has.
//! Compilers take long for crafted input, and nobody upstream calls that a fault, so the bounds come first.

use std::collections::BTreeMap;

use wasmparser::{Encoding, Parser, Payload};
use wasmtime::component::Component;

use crate::policy::text::clean;

/// Largest component, in bytes.
pub const SIZE_LIMIT: u64 = 4 << 20;
/// Functions of all its modules.
const FUNCTIONS: u32 = 20_000;
/// Largest body of a function, in bytes: the compiler's time grows faster than it.
const BODY: usize = 256 << 10;
/// Names of each kind that are told of a component.
const NAMES: usize = 100;
/// Longest of them, in bytes.
const NAME: usize = 128;
/// The worlds of the contract, which are what their policies export.
const WORLDS: [&str; 3] = ["registry", "trust", "election"];
/// The versions of the contract that this host speaks.
const SUPPORTED: &str = "0.1";

/// Why a component is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::policy) enum Unfit {
    #[error("it has {0} bytes, more than 4 MiB")]
    Size(u64),
    #[error("{0}")]
    Form(String),
    #[error("{0}")]
    World(String),
    #[error("it cannot be compiled: {0}")]
    Compile(String),
}

/// Bounds, before the compiler sees anything.
pub(super) fn check(bytes: &[u8]) -> Result<(), Unfit> {
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(Unfit::Size(bytes.len() as u64));
    }
    let form = |text: &str| Unfit::Form(text.into());
    if !bytes.starts_with(b"\0asm") {
        return Err(form("it is no WebAssembly"));
    }
    let mut functions = 0_u32;
    for (index, payload) in Parser::new(0).parse_all(bytes).enumerate() {
        let payload = payload.map_err(|error| {
            Unfit::Form(format!("it is damaged: {} at byte {}", error.message(), error.offset()))
        })?;
        match payload {
            Payload::Version { encoding: Encoding::Module, .. } if index == 0 => {
                return Err(form(
                    "it is a core module and no component; `peili plugin build` makes one of it",
                ));
            }
            Payload::CodeSectionStart { count, .. } => {
                functions = functions.saturating_add(count);
                if functions > FUNCTIONS {
                    return Err(form("it has more than 20,000 functions"));
                }
            }
            Payload::CodeSectionEntry(body) if body.range().len() > BODY => {
                return Err(form("a function has more than 256 KiB"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What a component shows of itself without being compiled. Names are fit to be printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The world whose policy it says it is; `None`: of none that can be told.
    pub world: Option<&'static str>,
    /// The version of the contract that it is built for.
    pub contract: Option<String>,
    /// What it asks of its host.
    pub imports: Vec<String>,
    /// What a host may call.
    pub exports: Vec<String>,
    /// Functions of all its modules.
    pub functions: u32,
    /// Sections that nobody runs, with their sizes in bytes: names, types, who made it.
    pub sections: BTreeMap<String, u64>,
}

/// The facts of a component that is within the bounds.
///
/// # Errors
/// It is not, or is no component.
pub fn facts(bytes: &[u8]) -> Result<Facts, String> {
    check(bytes).map_err(|unfit| unfit.to_string())?;
    Ok(surface(bytes))
}

/// The world whose policy these bytes say they are; `None`: of none that can be told.
pub fn world(bytes: &[u8]) -> Option<&'static str> {
    surface(bytes).world
}

/// What stands before the first damage.
fn surface(bytes: &[u8]) -> Facts {
    let mut facts = Facts::default();
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(bytes).map_while(Result::ok) {
        match payload {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::CodeSectionStart { count, .. } => {
                facts.functions = facts.functions.saturating_add(count);
            }
            Payload::CustomSection(section) if facts.sections.len() < NAMES => {
                let size = facts.sections.entry(clean(section.name(), NAME)).or_default();
                *size = size.saturating_add(section.data().len() as u64);
            }
            Payload::ComponentImportSection(imports) if depth == 0 => {
                let names =
                    imports.into_iter().map_while(Result::ok).map(|import| clean(import.name.name, NAME));
                facts.imports.extend(names.take(NAMES.saturating_sub(facts.imports.len())));
            }
            Payload::ComponentExportSection(exports) if depth == 0 => {
                for export in exports.into_iter().map_while(Result::ok) {
                    if facts.world.is_none()
                        && let Some((world, version)) = exported(export.name.name)
                    {
                        (facts.world, facts.contract) = (Some(world), Some(clean(version, NAME)));
                    }
                    if facts.exports.len() < NAMES {
                        facts.exports.push(clean(export.name.name, NAME));
                    }
                }
            }
            _ => {}
        }
    }
    facts
}

/// The world that an exported interface makes its component a policy of, and the version of the contract.
fn exported(interface: &str) -> Option<(&'static str, &str)> {
    let (name, version) = interface.strip_prefix("peili:policy/")?.split_once('@')?;
    Some((WORLDS.into_iter().find(|world| *world == name)?, version))
}

/// The world, by what is exported, and imports that are none of a policy's.
pub(super) fn check_world(
    engine: &wasmtime::Engine,
    component: &Component,
    wanted: &str,
) -> Result<(), Unfit> {
    let component = component.component_type();
    let exports: Vec<String> = component.exports(engine).map(|(name, _)| name.to_owned()).collect();
    let version = |world: &str| {
        let interface = format!("peili:policy/{world}@");
        exports.iter().find_map(|name| name.strip_prefix(&interface).map(str::to_owned))
    };
    match version(wanted) {
        Some(version) if is_supported(&version) => {}
        Some(version) => {
            return Err(Unfit::World(format!(
                "it is built for version {version} of the contract; this Peili has {SUPPORTED}"
            )));
        }
        None => {
            let other = WORLDS.into_iter().find(|world| version(world).is_some());
            return Err(Unfit::World(match other {
                Some(world) => format!("it is a policy of the {world} world, not of the {wanted} world"),
                None => format!("it is no policy: it does not export `peili:policy/{wanted}`"),
            }));
        }
    }
    let interfaces = ["logging", "data", "types"].map(|name| format!("peili:policy/{name}@{SUPPORTED}."));
    for (name, _) in component.imports(engine) {
        let is_known = interfaces.iter().any(|known| name.starts_with(known)) || name.starts_with("wasi:");
        if !is_known {
            return Err(Unfit::World(format!("it imports `{name}`, which policies do not get")));
        }
    }
    Ok(())
}

fn is_supported(version: &str) -> bool {
    version.strip_prefix(SUPPORTED).is_some_and(|rest| rest.starts_with('.'))
}
