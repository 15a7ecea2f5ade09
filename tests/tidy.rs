//! Holds the code to ARCHITECTURE.md: who may use whom, where each third-party crate has its home, and how a file looks.
//!
//! To change the architecture, change a table here in a commit of its own that says why. Tests (`#[cfg(test)]`) may use
//! whatever they like: the tables are about the program.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module with the modules that it may use. One way: a module that stands below another never uses it.
#[rustfmt::skip] // Else each name of a long list has a line.
const GRAPH: &[(&str, &[&str])] = &[
    ("oci", &[]),
    ("telemetry", &[]),
    ("watchdog", &[]),
    ("store", &["oci"]),
    ("network", &["oci"]),
    ("upstream", &["oci"]),
    ("policy", &["oci"]),
    ("trust", &["oci", "policy"]),
    // `policy` for the ranking of candidates.
    ("election", &["oci", "policy"]),
    ("cluster", &["oci", "election"]),
    ("transfer", &["oci", "network"]),
    ("mirror", &["oci", "store", "network", "transfer", "upstream", "trust", "policy", "telemetry"]),
    ("pull", &["oci", "upstream", "store"]),
    // `upstream` for the reading of what it writes.
    ("configure", &["oci", "upstream"]),
    // What `registry` and `admin` share: sockets, connections, limits.
    ("listener", &["watchdog"]),
    // `policy` for the reasons that it shows.
    ("registry", &["oci", "policy", "mirror", "listener", "watchdog", "telemetry"]),
    // Reads everything, changes nothing.
    ("admin", &[
        "oci", "store", "network", "transfer", "upstream", "trust", "policy", "election", "mirror",
        "registry", "listener", "watchdog", "telemetry",
    ]),
    // Composes the Config of each module.
    ("config", &[
        "oci", "store", "network", "transfer", "upstream", "trust", "policy", "election", "cluster",
        "mirror", "registry", "admin", "listener", "watchdog", "telemetry", "pull",
    ]),
    // Looks at what the others do; `oci` for digests. Only a task of its own in `app` stands on it, which nothing waits for.
    // `registry` and `listener` for who may connect to it, `upstream` for the ports of registries.
    ("doctor", &["oci", "store", "network", "election", "cluster", "admin", "config", "configure", "registry", "listener", "upstream"]),
    // The only one that names adapters.
    ("app", &[
        "oci", "store", "network", "transfer", "upstream", "trust", "policy", "election", "cluster",
        "mirror", "registry", "admin", "listener", "watchdog", "telemetry", "config", "doctor",
    ]),
    ("plugin", &["oci", "policy"]),
    // `upstream` for the hosts that `peili pull` asks, `cluster` for the DaemonSet that `peili cleanup` waits for.
    ("cli", &[
        "oci", "network", "upstream", "cluster", "admin", "config", "app", "pull", "configure", "doctor",
        "plugin", "telemetry",
    ]),
];

/// Third-party crates that have a home: the files and folders below `src` (without `.rs`) that may name them.
const HOMES: &[(&str, &[&str])] = &[
    ("libp2p", &["network"]),
    ("kube", &["cluster"]),
    ("roaring", &["network/gossip"]),
    // Certificates of the peer port are libp2p's too.
    ("libp2p_tls", &["network", "transfer"]),
    ("containerd_client", &["store/containerd"]),
    ("tonic", &["store/containerd"]),
    ("prost", &["store/containerd", "network"]),
    ("prost_types", &["store/containerd"]),
    // In `upstream` and `pull` as the provider of reqwest.
    ("rustls", &["transfer", "network", "upstream", "pull", "cluster"]),
    ("tokio_rustls", &["transfer", "cluster/reach"]),
    ("x509_parser", &["cluster/reach"]),
    ("reqwest", &["upstream", "pull"]),
    ("hyper", &["transfer", "registry", "admin", "listener", "cluster/api"]),
    // In `store/containerd` as the glue between tokio and tonic.
    ("hyper_util", &["transfer", "registry", "admin", "listener", "store/containerd", "cluster/api"]),
    ("clap", &["cli", "main"]),
    ("clap_complete", &["cli"]),
    ("clap_mangen", &["cli"]),
    ("indicatif", &["pull"]),
    ("hickory_resolver", &["network"]),
    ("base64", &["network/admission", "transfer/wire", "upstream/credentials", "plugin/manifest", "cluster"]),
    ("flate2", &["plugin"]),
    ("zeroize", &["network/admission"]),
    // In `plugin` for cargo's configuration.
    ("toml_edit", &["upstream", "configure", "plugin/vendored"]),
    ("similar", &["configure"]),
    ("wasmtime", &["policy/engine"]),
    ("wasmparser", &["policy/engine"]),
    ("wit_component", &["plugin"]),
    ("tar", &["store", "pull", "plugin/new"]),
    // In `configure` for the files of k3s and RKE2, in `doctor` for manifests, in `policy` for the cases of authors and operators, in
    // `plugin` for a request.
    ("serde_saphyr", &["config", "cli", "configure", "doctor/fix", "policy/cases"]),
];

/// Lines of a file. Longer ones are split by concept.
const LINES: usize = 600;

/// A source file, read.
struct Source {
    /// Below the repository, for messages.
    path: String,
    /// Below `src`, without `.rs`: `store/containerd`.
    name: String,
    text: String,
    /// Lines that are code of the program: tests and comments are blank.
    code: Vec<String>,
    /// Children by `mod NAME;`, and whether only tests have them.
    children: Vec<(String, bool)>,
}

#[test]
fn modules_use_only_what_stands_below_them() {
    let mut faults = Faults::default();
    for source in program() {
        let module = source.module();
        if matches!(module, "lib" | "main") {
            continue;
        }
        let Some((_, allowed)) = GRAPH.iter().find(|(name, _)| *name == module) else {
            faults.add(
                &source,
                1,
                &format!("module `{module}` is not in GRAPH of tests/tidy.rs: add it there"),
            );
            continue;
        };
        for (line, used) in uses(&source.code) {
            let is_module = GRAPH.iter().any(|(name, _)| *name == used);
            if is_module && used != module && !allowed.contains(&used.as_str()) {
                faults.add(&source, line, &format!("`{module}` may not use `{used}`: pass what it needs from `app`, behind a trait of `{module}`"));
            }
        }
        let is_top = source.name == module;
        for (index, line) in source.code.iter().enumerate() {
            if is_top && (line.starts_with("use super::") || line.contains("super::super::")) {
                faults.add(
                    &source,
                    index + 1,
                    "name other modules by `crate::`, so that this test sees them",
                );
            }
        }
    }
    faults.report();
}

#[test]
fn the_graph_has_no_cycle() {
    // A module may only use those that are in the table before it.
    let mut faults = String::new();
    for (index, (module, allowed)) in GRAPH.iter().enumerate() {
        for used in *allowed {
            if !GRAPH[..index].iter().any(|(name, _)| name == used) {
                let _ = writeln!(faults, "`{module}` uses `{used}`, which does not stand before it in GRAPH");
            }
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

/// Generated, so that it is right: a drawing by hand leaves out what does not fit in.
#[test]
fn architecture_shows_the_graph() {
    let mut graph = String::from("```text\n");
    for (module, allowed) in GRAPH.iter().rev() {
        let line = format!("{module:<9} -> {}", allowed.join(" "));
        let _ = writeln!(graph, "{}", line.trim_end_matches([' ', '>', '-']));
    }
    graph.push_str("```\n");
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap_or_default();
    let section = text.split("\n## ").find_map(|section| section.strip_prefix("The graph\n"));
    let shown = section.is_some_and(|section| section.contains(&graph));
    assert!(shown, "ARCHITECTURE.md: let the block of \"The graph\" be\n{graph}");
}

#[test]
fn third_party_crates_stay_at_home() {
    let mut faults = Faults::default();
    for source in program() {
        for (index, line) in source.code.iter().enumerate() {
            for (name, homes) in HOMES {
                let is_home = |home: &&&str| {
                    source.name == **home
                        || source.name.strip_prefix(**home).is_some_and(|rest| rest.starts_with(['/', '_']))
                };
                if names_crate(line, name) && !homes.iter().any(|home| is_home(&home)) {
                    let homes = homes.join("`, `");
                    faults.add(
                        &source,
                        index + 1,
                        &format!("`{name}` has its home in `{homes}`: put a type or trait of ours between"),
                    );
                }
            }
        }
    }
    faults.report();
}

#[test]
fn every_file_belongs_to_a_module() {
    let mut folders: Vec<PathBuf> =
        ["src", "lab/src", "xtask/src", "plugins/sdk/src"].iter().map(|folder| root().join(folder)).collect();
    // A file beside them is a test of its own.
    let tests = fs::read_dir(root().join("tests")).into_iter().flatten().flatten();
    folders.extend(tests.map(|entry| entry.path()).filter(|path| path.is_dir()));
    for folder in folders {
        let mut reached: BTreeSet<PathBuf> = BTreeSet::new();
        for name in ["lib", "main"] {
            let path = folder.join(name).with_extension("rs");
            if path.is_file() {
                reach(&folder, &path, &mut reached);
            }
        }
        let mut faults = String::new();
        for path in files(&folder).into_iter().filter(|path| !reached.contains(path)) {
            let path = shown(&path);
            let _ = writeln!(faults, "{path}:1: no `mod` leads here: declare it in its parent or delete it");
        }
        assert!(faults.is_empty(), "\n{faults}");
    }
}

#[test]
fn files_are_short_documented_and_finished() {
    let mut faults = Faults::default();
    let folders = ["src", "lab/src", "xtask/src", "tests", "plugins/sdk/src", "fuzz/fuzz_targets"];
    for folder in folders {
        for path in files(&root().join(folder)) {
            let source = Source::read(&root().join("src"), &path);
            let lines = source.text.lines().count();
            if lines > LINES {
                faults.add(
                    &source,
                    LINES,
                    &format!("{lines} lines, more than {LINES}: split it by concept into a folder"),
                );
            }
            let first = source.text.lines().next().unwrap_or_default();
            let is_test = source.name.ends_with("/tests") || source.name.contains("/tests/");
            if !first.starts_with("//!") && !is_test {
                faults.add(&source, 1, "begin with `//!`: the module's job and what it does not do");
            }
            for (index, line) in source.text.lines().enumerate() {
                // Spelt so that this very line does not match.
                let unfinished = [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("TO", "DO")];
                if unfinished.iter().any(|mark| line.contains(mark)) {
                    faults.add(&source, index + 1, "finish it, or open an issue and leave it out");
                }
            }
            if source.name.ends_with("/mod") || source.name == "util" || source.name.ends_with("/util") {
                faults.add(
                    &source,
                    1,
                    "name the file after what it is about: `foo.rs` beside `foo/`, no `mod.rs`, no `util`",
                );
            }
        }
    }
    faults.report();
}

#[test]
fn the_tables_see_what_they_forbid() {
    let code = |text: &str| Source::parse("src/x.rs".into(), "x".into(), text.into()).code;
    let check = |text: &str, expected: &[(usize, &str)]| {
        let found = uses(&code(text));
        let found: Vec<_> = found.iter().map(|(line, name)| (*line, name.as_str())).collect();
        assert_eq!(found, expected, "{text}");
    };
    check("use crate::store::Store;\nlet a = crate::network::b();\n", &[(1, "store"), (2, "network")]);
    check("use crate::{\n    oci::{Digest, Name},\n    store,\n};\n", &[(1, "oci"), (1, "store")]);
    check("// crate::store\n/// [`crate::store::X`]\n", &[]);
    check("#[cfg(test)]\nmod tests {\n    use crate::app;\n}\nuse crate::oci;\n", &[(5, "oci")]);
    check("#[cfg(test)]\nuse crate::app;\nuse crate::oci;\n", &[(3, "oci")]);
    check("#[cfg(any(test, feature = \"x\"))]\nfn a() {\n    crate::app::b();\n}\n", &[]);
    let source =
        Source::parse("".into(), "x".into(), "pub mod a;\n#[cfg(test)]\nmod tests;\nmod b;\n".into());
    assert_eq!(source.children, [("a".into(), false), ("tests".into(), true), ("b".into(), false)]);
    assert!(names_crate("use hyper::body;", "hyper") && names_crate("x(tonic::Status)", "tonic"));
    assert!(!names_crate("use hyper_util::rt;", "hyper") && !names_crate("crate::x::tar::y", "tar"));
    assert!(names_crate("use {tar, http};", "tar") && names_crate("use tar;", "tar"));
}

/// The table of docs/guards.md: what to remove is there, and so are the tests that fail then.
#[test]
fn guards_and_their_tests_are_there() {
    let document = fs::read_to_string(root().join("docs/guards.md")).unwrap_or_default();
    let (mut faults, mut rows) = (String::new(), 0);
    for (index, line) in document.lines().enumerate() {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, _, remove, fails] = cells[..] else { continue };
        let (remove, fails) = (quoted(remove), quoted(fails));
        if remove.is_empty() {
            // The head of a table.
            continue;
        }
        rows += 1;
        let is_there = match remove[..] {
            // A file, or one below it: what a module guards may move within it.
            [file, code] => {
                let file = root().join(file);
                let below = files(&file.with_extension(""));
                [file]
                    .iter()
                    .chain(&below)
                    .any(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(code)))
            }
            _ => false,
        };
        if !is_there {
            let _ = writeln!(faults, "docs/guards.md:{}: {remove:?} is no file with a line of it", index + 1);
        }
        for test in fails.iter().filter(|test| !is_test(test)) {
            let _ = writeln!(faults, "docs/guards.md:{}: no test `{test}`", index + 1);
        }
        if fails.is_empty() {
            let _ = writeln!(faults, "docs/guards.md:{}: name a test", index + 1);
        }
    }
    assert!(faults.is_empty() && rows > 30, "{rows} rows\n{faults}");
}

/// The figures in these documents are of one state of what is simulated; another one has to be measured anew.
#[test]
fn the_simulations_are_of_what_ships() {
    for (module, document, simulation) in
        [("network/gossip", "network", "network"), ("election/lease", "elections", "election")]
    {
        let mut sources = Vec::new();
        let folder = root().join("src").join(module);
        for path in files(&folder).into_iter().chain([folder.with_extension("rs")]) {
            if !path.to_string_lossy().contains("tests") {
                let text = fs::read_to_string(&path).unwrap();
                let code =
                    text.lines().map(|line| without_comment(line).trim()).filter(|line| !line.is_empty());
                sources.extend(code.collect::<String>().into_bytes());
            }
        }
        let number = peili::oci::Digest::sha256(&sources).to_string();
        let number = &number["sha256:".len()..][..12];
        let document = format!("docs/{document}.md");
        let text = fs::read_to_string(root().join(&document)).unwrap();
        assert!(
            text.contains(number),
            "{module} has changed: run `cargo xtask simulate {simulation}`, and put the figures and {number} into {document}"
        );
    }
}

/// What stands between backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Whether `module::of::src::name` is a test, or `TARGET name` a case of a harness of its own.
fn is_test(name: &str) -> bool {
    if let Some((target, case)) = name.split_once(' ') {
        let sources = files(&root().join("tests").join(target));
        return sources.iter().any(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(case)));
    }
    let Some((module, function)) = name.rsplit_once("::") else { return false };
    // `a::tests` is a file of its own or stands in that of `a`.
    let modules = std::iter::successors(Some(module), |module| Some(module.rsplit_once("::")?.0));
    let mut files =
        modules.map(|module| root().join("src").join(module.replace("::", "/")).with_extension("rs"));
    let test = format!("fn {function}(");
    files
        .find(|path| path.is_file())
        .is_some_and(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(&test)))
}

/// What is wrong, each with file, line and what to do.
#[derive(Default)]
struct Faults(String);

impl Faults {
    fn add(&mut self, source: &Source, line: usize, message: &str) {
        let _ = writeln!(self.0, "{}:{line}: {message}", source.path);
    }

    fn report(&self) {
        if !self.0.is_empty() {
            panic!("\n{}", self.0);
        }
    }
}

impl Source {
    fn read(folder: &Path, path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let name = path.strip_prefix(folder).unwrap_or(path).with_extension("");
        Self::parse(shown(path), name.to_string_lossy().into_owned(), text)
    }

    /// Relies on rustfmt: an item ends on a line that is indented as its first is.
    fn parse(path: String, name: String, text: String) -> Self {
        let (mut code, mut children) = (Vec::new(), Vec::new());
        // Indentation of the `#[cfg(test)]` whose item is being passed over.
        let mut test: Option<usize> = None;
        for line in text.lines() {
            let indent = line.len() - line.trim_start().len();
            let trimmed = without_comment(line).trim();
            let is_test = test.is_some();
            if let Some(child) = child(trimmed) {
                children.push((child.to_owned(), is_test));
            }
            if is_test {
                let ends = trimmed.ends_with(['}', ';', ',']) && !trimmed.starts_with("#[");
                if test == Some(indent) && ends {
                    test = None;
                }
                code.push(String::new());
            } else if trimmed.starts_with("#[cfg(test)]") || trimmed.starts_with("#[cfg(any(test,") {
                test = (!trimmed.ends_with([';', '}'])).then_some(indent);
                code.push(String::new());
            } else {
                code.push(without_comment(line).to_owned());
            }
        }
        Self { path, name, text, code, children }
    }

    /// The module at the top of the tree that it belongs to.
    fn module(&self) -> &str {
        self.name.split('/').next().unwrap_or(&self.name)
    }
}

/// The files of the program: those that only tests have are left out.
fn program() -> Vec<Source> {
    let folder = root().join("src");
    let mut sources: Vec<Source> = files(&folder).iter().map(|path| Source::read(&folder, path)).collect();
    let mut tests: BTreeSet<String> = BTreeSet::new();
    for source in &sources {
        let prefix = if matches!(&source.name[..], "lib" | "main") {
            String::new()
        } else {
            format!("{}/", source.name)
        };
        tests.extend(
            source.children.iter().filter(|(_, test)| *test).map(|(child, _)| format!("{prefix}{child}")),
        );
    }
    sources.retain(|source| {
        !tests.iter().any(|test| {
            source.name.strip_prefix(&test[..]).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    });
    assert!(!sources.is_empty(), "no sources below {}", folder.display());
    sources
}

/// The first segments after `crate::`, with the line of each.
fn uses(code: &[String]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in code.iter().enumerate() {
        for (at, _) in line.match_indices("crate::") {
            let is_path = !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '$'));
            let rest = &line[at + "crate::".len()..];
            if !is_path {
                continue;
            }
            let Some(group) = rest.strip_prefix('{') else {
                found.push((index + 1, identifier(rest).to_owned()));
                continue;
            };
            let text = [group].into_iter().chain(code[index + 1..].iter().map(String::as_str));
            found.extend(group_names(&text.collect::<Vec<_>>().join("\n")).map(|name| (index + 1, name)));
        }
    }
    found
}

/// The names at the top of a `{...}` whose opening brace is gone.
fn group_names(text: &str) -> impl Iterator<Item = String> {
    let (mut depth, mut top) = (0, String::new());
    for character in text.chars() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            other if depth == 0 => top.push(other),
            _ => {}
        }
    }
    let names: Vec<String> = top.split(',').map(|part| identifier(part.trim()).to_owned()).collect();
    names.into_iter().filter(|name| !name.is_empty())
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// Whether a line of code names a crate: `name::`, or `name` in a `use`.
fn names_crate(line: &str, name: &str) -> bool {
    let is_use = line.trim_start().trim_start_matches("pub ").starts_with("use ");
    line.match_indices(name).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + name.len()..]);
        let begins = !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '"' | '.'));
        let listed = is_use && after.starts_with([';', ',', '}', ' ']) && !before.contains("::");
        begins && (after.starts_with("::") || listed)
    })
}

/// `mod NAME;` with any visibility.
fn child(line: &str) -> Option<&str> {
    let declaration = line.strip_suffix(';')?;
    let (visibility, name) = declaration.rsplit_once("mod ")?;
    let visible = visibility.is_empty() || visibility == "pub " || visibility.starts_with("pub(");
    (visible || visibility.starts_with("#[")).then_some(name)
}

/// The line up to a comment. A `//` inside a string ends it too, which hides a little code and never invents any.
fn without_comment(line: &str) -> &str {
    line.find("//").filter(|at| !line[..*at].ends_with(':')).map_or(line, |at| &line[..at])
}

fn reach(folder: &Path, path: &Path, reached: &mut BTreeSet<PathBuf>) {
    if !path.is_file() || !reached.insert(path.to_owned()) {
        return;
    }
    let source = Source::read(folder, path);
    let is_root = matches!(&source.name[..], "lib" | "main");
    let below = if is_root { folder.to_owned() } else { folder.join(&source.name) };
    for (child, _) in &source.children {
        reach(folder, &below.join(child).with_extension("rs"), reached);
    }
}

/// All Rust files below a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}
