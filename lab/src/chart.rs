//! The Helm chart of `deploy/chart`, rendered by the real Helm: for `deploy/manifests`, which are its renderings of `deploy/chart/ci`, and for tests.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::requirements::helm;

/// The version of Kubernetes that is rendered for: the newest one matters only where a template asks, and none does.
const KUBERNETES: &str = "1.31.0";
/// Release and namespace of what is rendered.
pub const NAME: &str = "peili";

/// The chart's folder.
pub fn folder() -> PathBuf {
    repository().join("deploy/chart")
}

/// The files of values that have a rendering, by name.
///
/// # Errors
/// Their folder cannot be read.
pub fn presets() -> Result<Vec<String>> {
    let folder = folder().join("ci");
    let files = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let paths = files.map(|file| Ok(file?.path())).collect::<Result<Vec<_>>>()?;
    let mut names: Vec<String> =
        paths.iter().filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// Where the rendering of a preset is.
pub fn rendering(preset: &str) -> PathBuf {
    repository().join("deploy/manifests").join(preset).with_extension("yaml")
}

/// The file of values of a preset.
pub fn values(preset: &str) -> PathBuf {
    folder().join("ci").join(preset).with_extension("yaml")
}

/// Renders the chart with these further arguments of `helm template`: `["--values", FILE]`, `["--set", "name=value"]`.
///
/// # Errors
/// There is no Helm, or what it says is wrong.
pub fn render(arguments: &[impl AsRef<OsStr>]) -> Result<String> {
    let chart = folder();
    let always = ["--namespace", NAME, "--kube-version", KUBERNETES].map(OsStr::new);
    let all = [OsStr::new("template"), OsStr::new(NAME), chart.as_os_str()].into_iter().chain(always);
    run_helm(all.chain(arguments.iter().map(AsRef::as_ref)))
}

/// What Helm prints.
fn run_helm<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> Result<String> {
    let mut helm = Command::new(helm().context("there is no Helm: `cargo xtask setup` gets it")?);
    let output = helm.args(arguments).output()?;
    // `lint` says what is wrong where others print.
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What a preset's rendering has to be: where it comes from, and what Helm says.
///
/// # Errors
/// As [`render`].
fn render_preset(preset: &str) -> Result<String> {
    // Hooks are for Helm: who applies a file would have them at once.
    let text = render(&[Path::new("--no-hooks"), Path::new("--values"), &values(preset)])?;
    Ok(format!(
        "# By `cargo xtask render`, of deploy/chart with ci/{preset}.yaml: name your image before you apply it.\n{text}"
    ))
}

/// Where the chart says what its values are.
fn guide() -> PathBuf {
    folder().join("README.md")
}

/// What the chart's README has to be: the table of values, as `values.yaml` comments them.
///
/// # Errors
/// It cannot be read, or a value has no comment.
fn render_guide() -> Result<String> {
    let text = fs::read_to_string(folder().join("values.yaml")).context("cannot read values.yaml")?;
    let mut table = String::new();
    for value in values_of(&text) {
        ensure!(!value.comment.is_empty(), "values.yaml: `{}` has no comment", value.path);
        let escaped = value.comment.replace('|', "\\|");
        table.push_str(&format!("| `{}` | `{}` | {escaped} |\n", value.path, value.default));
    }
    Ok(format!("{GUIDE}{table}"))
}

const GUIDE: &str = "\
# Peili's chart

[docs/install.md](../../docs/install.md) says how it is used. This table is made of `values.yaml` by `cargo xtask render`; values of other names or
forms are refused (`values.schema.json`).

| value | default | what it does |
| --- | --- | --- |
";

/// A value of `values.yaml`.
struct Value {
    path: String,
    default: String,
    comment: String,
}

/// Each value that is no map of others, with the comment above it. A comment above a map is that of its first value, if that has none.
fn values_of(text: &str) -> Vec<Value> {
    let (mut found, mut above, mut comment) = (Vec::new(), Vec::<(usize, String)>::new(), String::new());
    // After the title, which an empty line ends.
    for line in text.lines().skip_while(|line| !line.is_empty()) {
        let content = line.trim_start();
        let depth = line.len() - content.len();
        if let Some(text) = content.strip_prefix("# ") {
            comment = format!("{comment} {text}").trim_start().to_owned();
            continue;
        }
        let Some((key, default)) = content.split_once(':') else { continue };
        above.retain(|(at, _)| *at < depth);
        let path: Vec<&str> = above.iter().map(|(_, key)| key.as_str()).chain([key]).collect();
        let path = path.join(".");
        match default.trim() {
            "" => above.push((depth, key.to_owned())),
            default => {
                let comment = std::mem::take(&mut comment);
                found.push(Value { path, default: default.to_owned(), comment });
            }
        }
    }
    found
}

/// What takes Peili out of containerd's configuration on all nodes, for those who do without Helm: its rendering of the default values.
///
/// # Errors
/// As [`render`].
fn render_removal() -> Result<String> {
    let (values, template) = (values("default"), Path::new("templates/cleanup.yaml"));
    let text = render(&[Path::new("--values"), &values, Path::new("--show-only"), template])?;
    Ok(format!(
        "# By `cargo xtask render`: takes Peili out of containerd's configuration on each node where it is applied. Before all else is deleted: name\n\
         # your image, apply it, wait for the Job, delete it.\n{text}"
    ))
}

/// What Helm finds to be wrong with the chart and a preset.
///
/// # Errors
/// That, or there is no Helm.
pub fn lint(preset: &str) -> Result<()> {
    let (chart, values) = (folder(), values(preset));
    let words = ["lint", "--strict", "--values"].map(OsStr::new);
    run_helm(words.into_iter().chain([values.as_os_str(), chart.as_os_str()])).map(drop)
}

/// All that is checked in and made of the chart, with what it has to be: the table of values, and what Helm renders.
///
/// # Errors
/// As [`render`], and what of the chart cannot be read.
pub fn renderings() -> Result<Vec<(PathBuf, String)>> {
    let mut all = vec![(guide(), render_guide()?), (rendering("removal"), render_removal()?)];
    for preset in presets()? {
        all.push((rendering(&preset), render_preset(&preset)?));
    }
    all.push((images(), render_images(all.iter().map(|(_, text)| text.as_str()))));
    Ok(all)
}

/// Where the images are listed that a cluster needs for the chart.
pub fn images() -> PathBuf {
    repository().join("deploy/images.txt")
}

/// Every image of these renderings, once.
fn render_images<'a>(renderings: impl Iterator<Item = &'a str>) -> String {
    let fields = renderings.flat_map(str::lines).map(|line| line.trim_start().trim_start_matches("- "));
    let found: BTreeSet<&str> = fields.filter_map(|field| field.strip_prefix("image: ")).collect();
    let lines: String = found.into_iter().map(|image| format!("{}\n", image.trim_matches('"'))).collect();
    format!("{IMAGES}{lines}")
}

const IMAGES: &str = "\
# By `cargo xtask render`: every image that deploy/manifests, and so the chart with any of its values, has nodes run. With the name and the digest
# of your own image: the file images.txt that `cargo xtask image` writes.
";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_with_their_comments() {
        let text =
            "# Title\n\n# A map,\n# of one.\na:\n  b: \"\"\n  # Of c.\n  c: {d: 1}\n\n# Last.\ne: []\n";
        let found: Vec<_> =
            values_of(text).into_iter().map(|value| (value.path, value.default, value.comment)).collect();
        let expected = [("a.b", "\"\"", "A map, of one."), ("a.c", "{d: 1}", "Of c."), ("e", "[]", "Last.")];
        assert_eq!(
            found,
            expected.map(|(path, default, comment)| (path.into(), default.into(), comment.into()))
        );
    }
}
