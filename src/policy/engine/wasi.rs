//! Stubs for what the standard library of `wasm32-wasip2` names, also where a policy uses none of it.
//!
//! They are harmless: each call answers the same always, with what says nothing (0, no text, an empty list, nothing there, done).
//! No clock moves, random bytes are 0, no file is there, what is written goes nowhere. Answers follow from the types that the
//! component itself imports, so there is no version of WASI that is the right one. What has no such answer traps when it is called.

use wasmtime::component::types::{ComponentFunc, ComponentInstance, ComponentItem};
use wasmtime::component::{Component, Linker, Resource, ResourceAny, ResourceType, Type, Val};
use wasmtime::{Result, StoreContextMut};

use super::host::Host;

/// Handles that an instance may hold: the host has some bytes for each.
const HANDLES: u32 = 1000;
/// Random bytes of one call.
const RANDOM: u64 = 4096;
/// Nested types that are followed; the interfaces have 4.
const DEPTH: usize = 8;

/// A stream, a descriptor, a pollable: one is like the other.
struct Stub;

/// Defines what the component imports of WASI.
pub(super) fn add_to_linker(
    engine: &wasmtime::Engine,
    component: &Component,
    linker: &mut Linker<Host>,
) -> Result<()> {
    for (name, item) in component.component_type().imports(engine) {
        if let (true, ComponentItem::ComponentInstance(instance)) = (name.starts_with("wasi:"), item.ty) {
            define(engine, linker, name, &instance)?;
        }
    }
    Ok(())
}

fn define(
    engine: &wasmtime::Engine,
    linker: &mut Linker<Host>,
    interface: &str,
    instance: &ComponentInstance,
) -> Result<()> {
    let mut place = linker.instance(interface)?;
    for (name, item) in instance.exports(engine) {
        match item.ty {
            ComponentItem::Resource(_) => {
                place.resource(name, ResourceType::host::<Stub>(), |mut store, _| {
                    let host = store.data_mut();
                    host.handles = host.handles.saturating_sub(1);
                    Ok(())
                })?;
            }
            ComponentItem::ComponentFunc(_) => {
                let what = format!("{interface}#{name}");
                // Who asks for random bytes takes it that all came, and would go on with what was in their place.
                let is_random = interface.starts_with("wasi:random/") && name.ends_with("random-bytes");
                place.func_new(name, move |mut store, func: ComponentFunc, given, results| {
                    for value in given {
                        give_back(&mut store, value)?;
                    }
                    if let (true, Some(Val::U64(count)), [bytes]) = (is_random, given.first(), &mut *results)
                    {
                        if *count > RANDOM {
                            return Err(wasmtime::Error::msg(format!("`{what}` gives 4 KiB at most")));
                        }
                        *bytes = Val::List((0..*count).map(|_| Val::U8(0)).collect());
                        return Ok(());
                    }
                    for (result, of) in results.iter_mut().zip(func.results()) {
                        let answer = nothing(&mut store, &of, DEPTH)?;
                        *result = answer.ok_or_else(|| {
                            wasmtime::Error::msg(format!("`{what}` has no harmless answer"))
                        })?;
                    }
                    Ok(())
                })?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Ends the loan of what is lent, and takes what is given: a call that keeps a handle traps.
fn give_back(store: &mut StoreContextMut<'_, Host>, value: &Val) -> Result<()> {
    match value {
        Val::Resource(resource) => resource.resource_drop(&mut *store),
        Val::List(values) | Val::Tuple(values) => values.iter().try_for_each(|value| give_back(store, value)),
        Val::Record(fields) => fields.iter().try_for_each(|(_, value)| give_back(store, value)),
        Val::Variant(_, Some(value)) | Val::Option(Some(value)) => give_back(store, value),
        Val::Result(Ok(Some(value)) | Err(Some(value))) => give_back(store, value),
        _ => Ok(()),
    }
}

/// The value of a type that says nothing; none, where each would say something.
fn nothing(store: &mut StoreContextMut<'_, Host>, of: &Type, depth: usize) -> Result<Option<Val>> {
    let Some(depth) = depth.checked_sub(1) else { return Ok(None) };
    Ok(Some(match of {
        Type::Bool => Val::Bool(false),
        Type::S8 => Val::S8(0),
        Type::U8 => Val::U8(0),
        Type::S16 => Val::S16(0),
        Type::U16 => Val::U16(0),
        Type::S32 => Val::S32(0),
        Type::U32 => Val::U32(0),
        Type::S64 => Val::S64(0),
        Type::U64 => Val::U64(0),
        Type::Float32 => Val::Float32(0.0),
        Type::Float64 => Val::Float64(0.0),
        Type::Char => Val::Char('\0'),
        Type::String => Val::String(String::new()),
        Type::List(_) => Val::List(Vec::new()),
        Type::Option(_) => Val::Option(None),
        Type::Flags(_) => Val::Flags(Vec::new()),
        Type::Record(record) => {
            let mut fields = Vec::new();
            for field in record.fields() {
                let Some(value) = nothing(store, &field.ty, depth)? else { return Ok(None) };
                fields.push((field.name.to_owned(), value));
            }
            Val::Record(fields)
        }
        Type::Tuple(tuple) => {
            let mut values = Vec::new();
            for of in tuple.types() {
                let Some(value) = nothing(store, &of, depth)? else { return Ok(None) };
                values.push(value);
            }
            Val::Tuple(values)
        }
        Type::Result(result) => match result.ok() {
            None => Val::Result(Ok(None)),
            Some(of) => {
                let Some(value) = nothing(store, &of, depth)? else { return Ok(None) };
                Val::Result(Ok(Some(Box::new(value))))
            }
        },
        Type::Own(_) => {
            let host = store.data_mut();
            host.handles += 1;
            if host.handles > HANDLES {
                return Err(wasmtime::Error::msg("it holds more than 1,000 handles"));
            }
            Val::Resource(ResourceAny::try_from_resource(Resource::<Stub>::new_own(0), &mut *store)?)
        }
        _ => return Ok(None),
    }))
}
