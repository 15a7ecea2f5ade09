//! `peili plugin`: what its commands take, and what they print.

mod bench;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use super::Failure;
use super::commands::{print, print_json};
use crate::config::Inputs;
use crate::plugin::{self, Component, Fit, InspectError, Inspected, Manifest, NewError};

/// What `peili plugin` can be asked for.
#[derive(Debug, Subcommand)]
pub(super) enum Plugin {
    /// Write the crate of a new policy
    ///
    /// The crate is whole: an example that decides, its tests, cases, the SDK and all crates that it stands on. It builds without
    /// network. What is there already is never written over.
    #[command(after_help = "Examples:\n  peili plugin new only-signed --world registry\n  \
        peili plugin new gpu-peers --world trust --path policies/gpu-peers --json\n\n\
        Exit codes: 0 done, 1 failed (the folder is there already, or cannot be written), 2 wrong usage.")]
    New {
        /// Its name: lower-case letters, digits and dashes
        name: String,
        /// What it decides about
        #[arg(long, value_enum)]
        world: World,
        /// Where the crate is written [default: a folder of its name]
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
        /// Print name, world and folder as JSON
        #[arg(long)]
        json: bool,
    },

    /// Build the component of a policy from its crate
    ///
    /// Needs cargo, and either the target wasm32-unknown-unknown or the sources of Rust's standard library and LLVM's linker.
    #[command(
        after_help = "Examples:\n  peili plugin build plugins/allow-list\n  peili plugin build . --out allow-list.wasm --json\n\nExit codes: 0 done, 1 failed, 2 wrong usage."
    )]
    Build {
        /// Folder of the crate
        folder: PathBuf,
        /// Where the component is written; beside what cargo made unless told otherwise
        #[arg(long)]
        out: Option<PathBuf>,
        /// Print what was built as JSON
        #[arg(long)]
        json: bool,
    },

    /// Load a component as a node would, and say what it is or why a node would refuse it
    ///
    /// Also says which ways into a cluster are open to a component of its size.
    #[command(after_help = "Examples:\n  peili plugin check allow-list.wasm\n  \
        peili plugin check allow-list.wasm --settings '{\"allow\": [\"docker.io/library/*\"]}'\n  \
        peili plugin check allow-list.wasm --settings '{\"allow-data\": [\"images\"]}' --data images=images.txt\n\nExit codes: 0 a node would take it, 1 it would not, 2 wrong usage.")]
    Check {
        #[command(flatten)]
        subject: Subject,
        #[command(flatten)]
        data: Data,
    },

    /// Ask a policy the questions of a file, and compare its verdicts with those that are expected
    ///
    /// Each is asked twice of one instance and once of a fresh one, in the engine of a node. Data that is given counts where the file
    /// brings none.
    #[command(
        after_help = "Examples:\n  peili plugin test allow-list.wasm plugins/allow-list/cases.yaml\n  \
        peili plugin test allow-list.wasm cases.yaml --data images=images.txt\n\nExit codes: 0 all passed, 1 failed, 2 wrong usage."
    )]
    Test {
        /// The component
        file: PathBuf,
        /// The cases, as docs/writing-policies.md describes them
        cases: PathBuf,
        #[command(flatten)]
        data: Data,
        /// Print what was expected and said as JSON
        #[arg(long)]
        json: bool,
    },

    /// Ask a policy one question
    ///
    /// The question has the keys of a case of `peili plugin test`, without name, settings and expect.
    #[command(
        after_help = "Examples:\n  peili plugin run allow-list.wasm '{image: nginx:1.27}' --settings '{\"deny\": [\"quay.io/**\"]}'\n  \
        peili plugin run node-allow.wasm '{peer: {name: gpu-1}, observed: [10.0.0.7]}' --json\n  \
        peili plugin run zone-spread.wasm '{role: {name: coordinator}, candidates: [{name: a, zone: x}, {name: b}]}'\n\n\
        Exit codes: 0 it answered, whatever it said, or failed as the verdict then says; 1 it cannot be asked, 2 wrong usage."
    )]
    Run {
        #[command(flatten)]
        subject: Subject,
        #[command(flatten)]
        data: Data,
        /// The question, as YAML or JSON
        request: String,
    },

    /// Ask policies what a node recorded, and show where they say something else than they did there
    ///
    /// One component with its settings is compared with its recorded verdicts; all policies of a configuration, also with what was
    /// ruled. The log is that of `policies.decisions`.
    #[command(
        after_help = "Examples:\n  peili plugin replay decisions.jsonl allow-list.wasm --settings '{\"deny\": [\"quay.io/**\"]}'\n  \
        peili plugin replay decisions.jsonl --config peili.yaml --json\n  \
        peili plugin replay decisions.jsonl allow-list.wasm --write-cases cases.yaml\n  \
        peili plugin replay decisions.jsonl allow-list.wasm --settings '{\"allow-data\": [\"images\"]}' --data images=images.txt --write-cases cases.yaml\n\n\
        Exit codes: 0 they say the same, 1 they do not, or cannot be asked; 2 wrong usage."
    )]
    Replay {
        /// The log
        decisions: PathBuf,
        /// The component
        #[arg(required_unless_present = "config", conflicts_with = "config")]
        file: Option<PathBuf>,
        /// Settings as JSON
        #[arg(long, default_value = "{}", conflicts_with = "config")]
        settings: String,
        /// A file that the policy gets under this name; once for each
        #[arg(long, value_name = "NAME=FILE", value_parser = parse_data, conflicts_with = "config")]
        data: Vec<plugin::Data>,
        /// Name that the policy has in the log [default: the file's, or that of a policy that was alone]
        #[arg(long, conflicts_with = "config")]
        name: Option<String>,
        /// Ask the policies of this configuration
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Write what was asked and recorded as cases of `peili plugin test`, with the settings and the data; never over what is there
        #[arg(long, value_name = "FILE", conflicts_with = "config")]
        write_cases: Option<PathBuf>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },

    /// Ask two components the questions of a file, and show where they say different things
    ///
    /// Both get the same data: that of the file of cases, or where it brings none, that which is given.
    #[command(
        after_help = "Examples:\n  peili plugin diff allow-list.old.wasm allow-list.wasm cases.yaml\n  \
        peili plugin diff allow-list.old.wasm allow-list.wasm --requests decisions.jsonl\n  \
        peili plugin diff allow-list.old.wasm allow-list.wasm --requests decisions.jsonl --settings '{\"allow-data\": [\"images\"]}' --data images=images.txt\n\n\
        Exit codes: 0 they say the same, 1 they do not, or cannot be asked; 2 wrong usage."
    )]
    Diff {
        /// A component
        old: PathBuf,
        /// The other one
        new: PathBuf,
        /// The cases; what they expect does not count
        #[arg(required_unless_present = "requests")]
        cases: Option<PathBuf>,
        /// Take the questions from a node's decision log
        #[arg(long, value_name = "FILE", conflicts_with = "cases")]
        requests: Option<PathBuf>,
        /// Settings as JSON for what a node recorded; cases have their own
        #[arg(long, default_value = "{}", requires = "requests")]
        settings: String,
        #[command(flatten)]
        data: Data,
        /// Print the differences as JSON
        #[arg(long)]
        json: bool,
    },

    /// Measure what a policy costs: to compile, to load and to ask, and how much memory
    ///
    /// A registry policy is asked about an image, a trust policy about a peer that was just met, an election policy to rank; or they are
    /// asked what a node recorded. A call is warm on an instance that was used before, and cold on a new one, which is configured first.
    #[command(
        after_help = "Examples:\n  peili plugin bench allow-list.wasm --settings '{\"allow\": [\"docker.io/library/*\"]}' nginx:1.27\n  \
        peili plugin bench allow-list.wasm --requests decisions.jsonl --save before.json\n  \
        peili plugin bench allow-list.wasm --requests decisions.jsonl --baseline before.json --max-ratio 1.5\n  \
        peili plugin bench zone-spread.wasm --candidates 5000\n\n\
        Exit codes: 0 done; 1 it cannot be asked, or costs more than --max-ratio allows; 2 wrong usage."
    )]
    Bench(bench::Bench),

    /// Say what is in a component, without running it
    #[command(
        after_help = "Examples:\n  peili plugin inspect allow-list.wasm\n  peili plugin inspect allow-list.wasm --json | jq .imports\n\n\
        Exit codes: 0 done, 1 it cannot be read or is no component, 2 wrong usage."
    )]
    Inspect {
        /// The component
        file: PathBuf,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },

    /// Print a component as a ConfigMap, with the lines of configuration that name and pin it
    ///
    /// The files that it gets stand in the same ConfigMap.
    /// The lines of configuration are comments before the ConfigMap, and so are the ways into a cluster that it is too large for.
    #[command(
        after_help = "Examples:\n  peili plugin manifest allow-list.wasm --namespace kube-system | kubectl apply --server-side -f -\n  \
        peili plugin manifest allow-list.wasm --settings '{\"deny\": [\"quay.io/**\"]}' --json | jq .configuration\n  \
        peili plugin manifest allow-list.wasm --settings '{\"allow-data\": [\"images\"]}' --data images=images.txt\n\n\
        Exit codes: 0 done, 1 it cannot be read or is no policy, 2 wrong usage."
    )]
    Manifest {
        #[command(flatten)]
        subject: Subject,
        #[command(flatten)]
        data: Data,
        /// Name of the policy and of the ConfigMap [default: the file's]
        #[arg(long)]
        name: Option<String>,
        /// Namespace of the ConfigMap
        #[arg(long)]
        namespace: Option<String>,
    },
}

/// A component with its settings.
#[derive(Args, Debug)]
pub(super) struct Subject {
    /// The component
    file: PathBuf,
    /// Settings as JSON
    #[arg(long, default_value = "{}")]
    settings: String,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// The files that it gets.
#[derive(Args, Debug)]
pub(super) struct Data {
    /// A file that the policy gets under this name, as `data` of the configuration gives it; once for each
    #[arg(long, value_name = "NAME=FILE", value_parser = parse_data)]
    data: Vec<plugin::Data>,
}

fn parse_data(text: &str) -> Result<plugin::Data, String> {
    let (name, path) = text.split_once('=').ok_or("it is not NAME=FILE, such as images=images.txt")?;
    Ok(plugin::Given::file(name, Path::new(path)))
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum World {
    /// Which registries and repositories are mirrored
    Registry,
    /// Which peers are trusted, with what, and how much they get
    Trust,
    /// Who leads
    Election,
}

/// Does what was asked for.
pub(super) fn plugin(command: Plugin) -> Result<(), Failure> {
    match command {
        Plugin::New { name, world, path, json } => new(&name, world, path.as_deref(), json),
        Plugin::Build { folder, out, json } => {
            show(&plugin::build(&folder, out.as_deref()).context("no component")?, json)
        }
        Plugin::Check { subject, data } => {
            let component = plugin::check(&subject.file, subject.given(data)?);
            show(&component.context("a node would refuse it")?, subject.json)
        }
        Plugin::Test { file, cases, data, json } => test(&file, &cases, &data.data, json),
        Plugin::Run { subject, data, request } => {
            let answer = plugin::run(&subject.file, subject.given(data)?, &request);
            let answer = answer.context("it cannot be asked")?;
            if subject.json { print_json(&answer) } else { print(&format!("{}\n", answer.verdict)) }
        }
        Plugin::Replay { decisions, file, settings, data, name, config, write_cases, json } => {
            let replay = match (file, config) {
                (Some(file), _) => {
                    let given = plugin::Given { settings: parse_settings(&settings)?, data };
                    plugin::Replay::component(&file, given, name).context("it cannot be asked")?
                }
                (None, config) => {
                    plugin::Replay::configured(Inputs::new(config, Vec::new()).load()?.config.policies)
                }
            };
            replayed(&replay.run(&decisions, write_cases.as_deref()).context("it cannot be replayed")?, json)
        }
        Plugin::Diff { old, new, cases, requests, settings, data, json } => {
            let compared = match (cases, requests) {
                (_, Some(requests)) => {
                    let given = plugin::Given { settings: parse_settings(&settings)?, data: data.data };
                    plugin::diff_decisions(&old, &new, &given, &requests).context("they cannot be asked")?
                }
                (cases, None) => plugin::diff(&old, &new, &cases.unwrap_or_default(), &data.data)
                    .context("the cases cannot be run")?,
            };
            diff(&compared, json)
        }
        Plugin::Bench(command) => command.run(),
        Plugin::Inspect { file, json } => inspect(&file, json),
        Plugin::Manifest { subject, data, name, namespace } => {
            let given = subject.given(data)?;
            let made = plugin::manifest(&subject.file, name.as_deref(), namespace.as_deref(), &given)?;
            if subject.json { print_json(&made) } else { print(&manifest(&made)?) }
        }
    }
}

impl Subject {
    fn settings(&self) -> Result<Value, Failure> {
        parse_settings(&self.settings)
    }

    fn given(&self, data: Data) -> Result<plugin::Given, Failure> {
        Ok(plugin::Given { settings: self.settings()?, data: data.data })
    }
}

fn parse_settings(text: &str) -> Result<Value, Failure> {
    let settings: Value = serde_json::from_str(text)
        .map_err(|error| Failure::Usage(format!("--settings is not JSON: {error}")))?;
    // What a node's configuration takes.
    if settings.is_object() || settings.is_null() {
        Ok(settings)
    } else {
        Err(Failure::Usage("--settings is not keys and values, such as {\"deny\": []}".into()))
    }
}

impl From<NewError> for Failure {
    fn from(error: NewError) -> Self {
        match error {
            NewError::Name(..) => Self::Usage(error.to_string()),
            error => Self::Failed(error.into()),
        }
    }
}

impl From<InspectError> for Failure {
    fn from(error: InspectError) -> Self {
        match error {
            InspectError::Name(_) => Self::Usage(error.to_string()),
            error => Self::Failed(error.into()),
        }
    }
}

fn new(name: &str, world: World, path: Option<&Path>, json: bool) -> Result<(), Failure> {
    let world = match world {
        World::Registry => plugin::World::Registry,
        World::Trust => plugin::World::Trust,
        World::Election => plugin::World::Election,
    };
    let made = plugin::new(name, world, path)?;
    if json {
        return print_json(&made);
    }
    let path = made.path.display();
    print(&format!(
        "{path}: a policy of the {world} world; src/lib.rs decides, README.md says the rest\n\
         next:   cd {path} && peili plugin build . --out {name}.wasm && peili plugin test {name}.wasm cases.yaml\n"
    ))
}

fn show(component: &Component, json: bool) -> Result<(), Failure> {
    if json { print_json(component) } else { print(&lines(component)) }
}

fn lines(component: &Component) -> String {
    let Component { path, size, sha256, world, contract, imports, summary, fits } = component;
    let mut text =
        format!("file:     {}\nsize:     {} KiB\nsha256:   {sha256}\n", path.display(), size.div_ceil(1024));
    for (name, value) in [("world", world), ("contract", contract), ("does", summary)] {
        if let Some(value) = value {
            let _ = writeln!(text, "{:<9} {value}", format!("{name}:"));
        }
    }
    let imports = if imports.is_empty() { "nothing".into() } else { imports.join(", ") };
    let _ = writeln!(text, "imports:  {imports}");
    for (index, fit) in fits.iter().enumerate() {
        let _ = writeln!(text, "{:<9} {}", if index == 0 { "fits:" } else { "" }, fit.line());
    }
    text
}

fn inspect(file: &Path, json: bool) -> Result<(), Failure> {
    let inspected = plugin::inspect(file)?;
    if json {
        return print_json(&inspected);
    }
    let Inspected { component, exports, functions, sections, package, settings_schema, cases } = inspected;
    let sections: Vec<String> =
        sections.iter().map(|(name, size)| format!("{name} ({size} bytes)")).collect();
    let mut text = lines(&component);
    let of =
        |value: Option<&Value>, key: &str| value.and_then(|value| value[key].as_str()).map(plugin::printable);
    let package = ["name", "version", "license", "description"].map(|key| of(package.as_ref(), key));
    let keys = settings_schema.as_ref().and_then(|schema| schema["properties"].as_object());
    let keys = keys.map(|keys| keys.keys().map(|key| plugin::printable(key)).collect::<Vec<_>>().join(", "));
    for (name, value) in [
        ("package", Some(package.into_iter().flatten().collect::<Vec<_>>().join(", "))),
        ("settings", keys),
        ("cases", cases.map(|cases| format!("{cases}, which it must answer wherever it is loaded"))),
        ("exports", Some(exports.join(", "))),
        ("code", Some(format!("{functions} functions"))),
        ("sections", Some(sections.join(", "))),
    ] {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "{:<9} {value}", format!("{name}:"));
        }
    }
    print(&text)
}

/// As YAML. JSON is YAML too, and the configuration is for people, so that alone is written in its usual form.
fn manifest(manifest: &Manifest) -> Result<String, Failure> {
    let write = |value: &Value| serde_saphyr::to_string(value).context("cannot write YAML");
    let mut text = String::from(
        "# In Peili's configuration, with this ConfigMap mounted at the folder of `path` (the chart mounts NAME at\n\
         # /etc/peili/policies/NAME: `policies.configMaps`):\n",
    );
    for line in write(&manifest.configuration)?.lines() {
        let _ = writeln!(text, "#   {line}");
    }
    for fit in manifest.fits.iter().filter(|fit| !Fit::is_within(fit)) {
        let _ = writeln!(text, "# {}", fit.line());
    }
    text.push_str(&write(&manifest.config_map)?);
    Ok(text)
}

fn test(file: &Path, cases: &Path, data: &[plugin::Data], json: bool) -> Result<(), Failure> {
    let tested = plugin::test(file, cases, data).context("the cases cannot be run")?;
    if json {
        print_json(&tested)?;
    } else {
        tested.iter().try_for_each(|tested| print(&format!("{tested}\n")))?;
    }
    let failed = tested.iter().filter(|tested| !tested.passed).count();
    if failed > 0 {
        return Err(anyhow::anyhow!("{failed} of {} cases failed", tested.len()).into());
    }
    Ok(())
}

/// Changes that are printed for people.
const SHOWN: usize = 20;

fn replayed(replayed: &plugin::Replayed, json: bool) -> Result<(), Failure> {
    let plugin::Replayed { lines, outcomes, compared, changed, changes, written_cases } = replayed;
    if json {
        print_json(replayed)?;
    } else {
        let mut text = String::new();
        for (policy, outcomes) in outcomes {
            let counts: Vec<String> =
                outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}")).collect();
            let _ = writeln!(text, "{policy}: {}", counts.join(", "));
        }
        for change in changes.iter().take(SHOWN) {
            let _ = writeln!(text, "{change}");
        }
        if changes.len() > SHOWN {
            let _ = writeln!(text, "and {} more; --json lists them", changed - SHOWN as u64);
        }
        if let Some(reason) = &lines.first_unreadable {
            let _ = writeln!(text, "{} lines are no decisions, the first: {reason}", lines.unreadable);
        }
        if let Some(written) = written_cases {
            let _ = writeln!(text, "{written} cases written");
        }
        let _ = writeln!(
            text,
            "{changed} of {compared} recorded verdicts changed, in {} decisions",
            lines.decisions
        );
        print(&text)?;
    }
    if *changed > 0 {
        return Err(anyhow::anyhow!("{changed} of {compared} recorded verdicts changed").into());
    }
    Ok(())
}

fn diff(compared: &plugin::Compared, json: bool) -> Result<(), Failure> {
    let plugin::Compared { questions, different, differences } = compared;
    if json {
        print_json(differences)?;
    } else if differences.is_empty() {
        print(&format!("they say the same in {questions} cases\n"))?;
    } else {
        differences.iter().try_for_each(|difference| print(&format!("{difference}\n")))?;
        let more = different - differences.len() as u64;
        if more > 0 {
            print(&format!("and {more} more\n"))?;
        }
    }
    if *different > 0 {
        return Err(anyhow::anyhow!("they differ in {different} of {questions} cases").into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards that a long value is on one line: YAML would put spaces into it.
    #[test]
    fn the_yaml_is_the_object() {
        let lists =
            ["", "\n", "a", "a\n", " a\n\n", "# a: b\n- c\n", "key: |\n  x", "\"'\n", "\n\nlast", "a # b"];
        let lists =
            lists.map(str::to_owned).into_iter().chain([format!("{}\n", "docker.io/library/** ".repeat(99))]);
        let lists: serde_json::Map<_, _> =
            lists.enumerate().map(|(number, text)| (format!("a.{number}"), Value::from(text))).collect();
        let object = serde_json::json!({"data": lists, "binaryData": {"a.wasm": "AGFz".repeat(50_000)}});
        let configuration = serde_json::json!({"policies": {"registry": [{"name": "a"}]}});
        let made = Manifest { config_map: object.clone(), configuration, fits: Vec::new() };
        let text = manifest(&made).unwrap();
        assert!(
            text.starts_with("# ") && text.lines().any(|line| line == "#     - name: a"),
            "{}",
            &text[..200]
        );
        assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), object);
    }
}
