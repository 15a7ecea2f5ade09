//! A newcomer's path, from nothing but the program and a toolchain to a running mirror that obeys: without network, without crates
//! that cargo has fetched before, with the target of policies and without it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use peili_lab::image::write_empty_layout;
use peili_lab::node::{Plan, binary};
use peili_lab::requirements::{wasm_sources, wasm_target};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, wait};
use serde_json::{Value, json};

use super::APPLIED;
use crate::Case;

/// Two policies are built; where there is no target, the standard library too: 75 seconds on two cores that do nothing else.
const LIMIT: Duration = Duration::from_secs(480);
const SETTINGS: &str = r#"{"deny": ["quay.io/**"]}"#;

/// What a newcomer writes instead of what is there: the policy refuses a tag that moves.
const EDITS: [(&str, &str); 4] = [
    ("registry::{Policy, Request, Verdict}", "registry::{Policy, Reference, Request, Verdict}"),
    (
        "        if self.deny.matches(&request.name()) {",
        "        let moves = matches!(&request.reference, Some(Reference::Tag(tag)) if tag == \"latest\");\n        \
         if moves && self.deny.matches(&request.name()) {",
    ),
    (
        "Verdict::deny(\"denied\", \"it is on the list of what is not used here\")",
        "Verdict::deny(\"moving-tag\", \"name a version\")",
    ),
    ("request(\"quay.io\", \"team/app\", \"v1\")", "request(\"quay.io\", \"team/app\", \"latest\")"),
];

/// Which part of its cases changes with it.
const CASES: [(&str, &str); 2] = [
    ("team/app:v1", "team/app:latest"),
    ("(denied: it is on the list of what is not used here)", "(moving-tag: name a version)"),
];

pub(super) fn cases() -> Vec<Case> {
    let routes: [(&str, Requirement, fn() -> Option<PathBuf>); 2] = [
        ("with_the_target", Requirement::WasmTarget, wasm_target),
        ("without_the_target", Requirement::WasmSources, wasm_sources),
    ];
    let case = |(name, requirement, programs): (&str, Requirement, fn() -> Option<PathBuf>)| {
        let run = move || newcomer(programs().unwrap());
        // Root for a namespace without network.
        Case::new(format!("policies::newcomer::{name}"), &[Requirement::Root, requirement], run).within(LIMIT)
    };
    routes.into_iter().map(case).collect()
}

/// What the newcomer has: a folder, this program, and a toolchain.
struct Desk {
    folder: PathBuf,
    programs: PathBuf,
}

impl Desk {
    /// Runs a program in a folder of the desk, without network and without a home.
    fn run(&self, folder: &str, program: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new("unshare");
        command.arg("--net").arg(program).args(arguments).current_dir(self.folder.join(folder)).env_clear();
        // `binary` may have been built for coverage and the like: only what a toolchain needs.
        command.env("PATH", format!("{}:/usr/bin:/bin", self.programs.display()));
        command.env("HOME", &self.folder).env("CARGO_HOME", self.folder.join("cargo"));
        // So that the second policy finds what the first has built.
        command.env("CARGO_TARGET_DIR", self.folder.join("target"));
        command.output().unwrap()
    }

    /// A program that must end with this code; what it printed.
    fn expect(&self, code: i32, folder: &str, program: &Path, arguments: &[&str]) -> String {
        let output = self.run(folder, program, arguments);
        let (printed, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{printed}\n{said}");
        printed.into_owned()
    }

    fn peili(&self, folder: &str, arguments: &[&str]) -> String {
        self.expect(0, folder, &binary().unwrap(), &[&["plugin"], arguments].concat())
    }
}

fn edit(file: &Path, edits: &[(&str, &str)]) {
    let mut text = std::fs::read_to_string(file).unwrap();
    for (from, to) in edits {
        assert!(text.contains(from), "{} has no `{from}`", file.display());
        text = text.replacen(from, to, 1);
    }
    std::fs::write(file, text).unwrap();
}

async fn newcomer(programs: PathBuf) {
    let scratch = Scratch::new().unwrap();
    let desk = Desk { folder: scratch.path().to_owned(), programs };
    let crate_folder = scratch.path().join("no-latest");

    desk.peili("", &["new", "no-latest", "--world", "registry"]);
    desk.expect(1, "", &binary().unwrap(), &["plugin", "new", "no-latest", "--world", "trust"]);
    edit(&crate_folder.join("src/lib.rs"), &EDITS);
    // The author's own tests; the lock file is as cargo would write it.
    let cargo = desk.programs.join("cargo");
    desk.expect(0, "no-latest", &cargo, &["test", "--offline", "--locked", "--quiet"]);

    let built = desk.peili("no-latest", &["build", ".", "--out", "no-latest.wasm", "--json"]);
    let built: Value = serde_json::from_str(&built).unwrap();
    assert_eq!((&built["world"], &built["contract"]), (&json!("registry"), &json!("0.1.1")));
    let imports = built["imports"].as_array().unwrap();
    let is_known = |import: &Value| import.as_str().unwrap().starts_with("peili:policy/");
    assert!(imports.iter().all(is_known), "{imports:?}");
    let fits = built["fits"].as_array().unwrap();
    println!("{} bytes: {fits:?}", built["size"]);
    assert!(fits.len() == 4 && fits.iter().all(|fit| fit["size"].as_u64() <= fit["limit"].as_u64()));

    let check = ["plugin", "check", "no-latest.wasm", "--settings", SETTINGS];
    desk.expect(1, "no-latest", &binary().unwrap(), &check);
    let test = ["plugin", "test", "no-latest.wasm", "cases.yaml"];
    let failed = desk.expect(1, "no-latest", &binary().unwrap(), &test);
    assert!(failed.contains("FAILED"), "the cases are still those of the example:\n{failed}");
    edit(&crate_folder.join("cases.yaml"), &CASES);
    edit(&crate_folder.join("cases.yaml"), &CASES[..1]);
    desk.expect(0, "no-latest", &binary().unwrap(), &test);
    // The component carries the cases.
    desk.peili("no-latest", &["build", ".", "--out", "no-latest.wasm"]);
    let checked = desk.expect(0, "no-latest", &binary().unwrap(), &check);
    assert!(checked.contains("denies 1 globs"), "{checked}");
    let inspected = desk.peili("no-latest", &["inspect", "no-latest.wasm"]);
    for part in ["package:  no-latest, 0.1.0", "settings: deny", "cases:    3, which"] {
        assert!(inspected.contains(part), "{part} is not in\n{inspected}");
    }
    let request = "{image: quay.io/team/app:latest}";
    let said = desk.peili("no-latest", &["run", "no-latest.wasm", request, "--settings", SETTINGS]);
    assert_eq!(said, "deny (moving-tag: name a version)\n");

    obeyed(&desk, &crate_folder).await;

    // Another world, as it begins; one for each route, since each is built from nothing.
    let world = if wasm_target().as_deref() == Some(&desk.programs) { "election" } else { "trust" };
    desk.peili("", &["new", "another", "--world", world, "--path", world]);
    desk.peili(world, &["build", ".", "--out", "another.wasm"]);
    desk.peili(world, &["test", "another.wasm", "cases.yaml"]);
    desk.expect(0, world, &cargo, &["test", "--offline", "--locked", "--quiet"]);
}

/// Mounted into a node that runs: by the configuration that `manifest` prints, with its pin.
async fn obeyed(desk: &Desk, crate_folder: &Path) {
    let layout = desk.folder.join("layout");
    write_empty_layout(&layout).unwrap();
    let plan = Plan::on_loopback("node-1", &format!("layout:{}", layout.display())).unwrap();
    let mut node = plan.start().await.unwrap();
    let path = |tag: &str| format!("/v2/team/app/manifests/{tag}?ns=quay.io");
    assert_eq!(node.fetch(&path("latest")).await.unwrap().status, 404);

    let printed = desk.peili("no-latest", &["manifest", "no-latest.wasm", "--settings", SETTINGS, "--json"]);
    let printed: Value = serde_json::from_str(&printed).unwrap();
    let mut configuration = printed["configuration"].clone();
    let plugin = &mut configuration["policies"]["registry"][0];
    assert_eq!(plugin["path"], "/etc/peili/policies/no-latest.wasm");
    plugin["path"] = json!(crate_folder.join("no-latest.wasm"));
    node.plan.merge(&configuration);
    node.rewrite().unwrap();
    wait::until("it is refused", APPLIED, async || {
        let answer = node.fetch(&path("latest")).await.ok()?;
        (answer.status == 403 && answer.text().contains("name a version")).then_some(())
    })
    .await
    .unwrap();
    assert_eq!(node.fetch(&path("v1")).await.unwrap().status, 404, "a tag that does not move is left alone");
}
