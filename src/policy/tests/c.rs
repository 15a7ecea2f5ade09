//! A policy in C: by what wit-bindgen makes of the contract, Debian's clang and its C library of WebAssembly, as a core module that is
//! wrapped. One that asks its machine nothing has no import but the contract's; one that does becomes what `wasm32-wasip2` gives, by
//! the adapter that all such tools take.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use peili_lab::Requirement::C;
use peili_lab::skip_unless;
use serde_json::Value;
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_bindgen_core::Files;
use wit_component::ComponentEncoder;
use wit_parser::Resolve;

use super::foreign::asked;
use super::request;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{RegistryPolicy, Ruling};
use crate::policy::{Config, Data, Node, Plugin, Policies, Stage, facts};

/// The component of `guest.c`.
fn component(folder: &Path, defines: &[&str]) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let contract = include_str!("../../../wit/policy.wit");
    let package = resolve.push_source("policy.wit", contract).unwrap();
    let world = resolve.select_world(&[package], Some("registry-policy")).unwrap();
    let mut files = Files::default();
    wit_bindgen_c::Opts::default().build().generate(&mut resolve, world, &mut files).unwrap();
    for (name, bytes) in files.iter() {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    std::fs::write(folder.join("guest.c"), include_str!("guest.c")).unwrap();
    let output = Command::new(peili_lab::requirements::clang().unwrap())
        .args(["--target=wasm32-wasi", "-mexec-model=reactor", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(defines)
        .args(["guest.c", "registry_policy.c", "registry_policy_component_type.o", "-o", "guest.wasm"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let module = std::fs::read(folder.join("guest.wasm")).unwrap();
    ComponentEncoder::default()
        .validate(true)
        .module(&module)
        .unwrap()
        .adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER)
        .unwrap()
        .encode()
        .unwrap()
}

/// What it says of two repositories, the first of which is on its list.
fn said(path: &Path) -> [String; 2] {
    let policies = Policies::new(Node::default(), Metrics::default());
    let data = |name: &str| Data {
        name: name.into(),
        path: path.to_owned(),
        sha256: None,
        content: Some(Arc::from(&b"team/old\nbad/app\n"[..])),
    };
    let apply = |name: &str| {
        let plugin = Plugin { data: vec![data(name)], ..Plugin::new("c", path, Value::Null) };
        policies.apply(&Config { registry: vec![plugin], ..Config::default() })
    };
    let error = apply("other").unwrap_err();
    assert!(error.stage == Stage::Configure && error.message.contains("no file `images`"), "{error}");
    apply("images").unwrap();
    assert_eq!(policies.loaded()[0].summary, "refuses a list, in C");
    let ask = |name: &str| RegistryPolicy::explain(&policies, &request(name));
    asked(2000, || {
        let (ruling, said) = ask("good/app");
        (ruling == Ruling::default(), said)
    });
    let said = |name: &str| {
        // Once more where the machine was too busy.
        let all = (0..3).map(|_| ask(name).1.remove(0).verdict);
        all.into_iter().find(|verdict| !verdict.contains("its time was up")).unwrap()
    };
    ["bad/app", "good/app"].map(said)
}

#[test]
fn one_that_asks_nothing_imports_the_contract_alone() {
    skip_unless!("policy::tests::c::one_that_asks_nothing_imports_the_contract_alone", C);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.wasm");
    let bytes = component(folder.path(), &[]);
    let imports = facts(&bytes).unwrap().imports;
    assert!(imports.iter().all(|name| name.starts_with("peili:policy/")), "{imports:?}");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(said(&path), ["deny (listed: it is on the list)", "abstain"]);
}

/// Guards that what a C library asks of a machine is answered, and with nothing of this machine.
#[test]
fn one_that_asks_its_machine_is_told_nothing() {
    skip_unless!("policy::tests::c::one_that_asks_its_machine_is_told_nothing", C);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.wasm");
    let bytes = component(folder.path(), &["-DASKS"]);
    let imports = facts(&bytes).unwrap().imports;
    for interface in ["cli/environment", "clocks/wall-clock", "random/random", "filesystem/preopens"] {
        let name = format!("wasi:{interface}@0.2.");
        assert!(imports.iter().any(|import| import.starts_with(&name)), "{name} is not in {imports:?}");
    }
    std::fs::write(&path, bytes).unwrap();
    let told = "time 0, since 0, HOME unset, random 0 0000, root closed, file closed, written 25 0";
    assert_eq!(said(&path), [format!("deny (listed: {told})").as_str(), "abstain"]);
}
