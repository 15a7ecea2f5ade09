//! The effective configuration for people.

use super::Loaded;
use super::error::Origin;
use super::tree::{Node, Value};

/// YAML with a comment after each key that says where its value comes from.
pub(super) fn show(loaded: &Loaded) -> String {
    let options = serde_saphyr::SerializerOptions::default();
    let text = serde_saphyr::to_string_with_options(&loaded.config, options)
        .expect("settings are texts, numbers, lists and tables with text keys");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // Reading the text back tells on which line each key stands.
    let printed = Node::parse(&text).expect("what was printed can be read");
    let Value::Table(sections) = &printed.value else { return text };
    let mut comment = |origin: &Origin, path: &str| {
        let Origin::File { line, .. } = origin else { return };
        if let Some(text) = usize::try_from(*line).ok().and_then(|line| lines.get_mut(line - 1)) {
            text.push_str("  # ");
            text.push_str(&source(loaded, path));
        }
    };
    for section in sections {
        match &section.node.value {
            Value::Table(keys) => {
                for key in keys {
                    comment(&key.origin, &format!("{}.{}", section.key, key.key));
                }
            }
            _ => comment(&section.origin, &section.key),
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn source(loaded: &Loaded, path: &str) -> String {
    match (loaded.tree.origin_of(path), &loaded.file) {
        (Origin::File { line, .. }, Some(file)) => format!("{}:{line}", file.display()),
        (Origin::Default, _) if path == "node.name" => loaded.name_source.to_owned(),
        (Origin::Default, _) if path == "kubernetes.service" => loaded.service_source.to_owned(),
        (origin, _) => origin.to_string(),
    }
}
