//! What is wrong with a configuration, where, and how it is shown to people.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}: {source}{}", path.display(), hint_of_read(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file is larger than 1 MiB.
    #[error("{} is larger than 1 MiB", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It was read, and these things are wrong with it; at least one.
    #[error("{}", render(.0))]
    Invalid(Vec<Fault>),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key: `mirror.segment`; empty: the whole.
    pub path: String,
    /// Where it was said.
    pub origin: Origin,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
    /// File name and line's text, for [`Origin::File`].
    pub(crate) excerpt: Option<Box<(PathBuf, String)>>,
}

/// Where a value comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nothing sets it.
    #[default]
    Default,
    /// The file; lines and columns count from 1, columns and length in characters.
    File {
        /// Line.
        line: u64,
        /// Column.
        column: u64,
        /// Characters that it takes on its line; 0: unknown.
        length: u64,
    },
    /// An environment variable.
    Environment(Arc<str>),
    /// `--set`, as it was given.
    Flag(Arc<str>),
}

impl Origin {
    /// The line of the file, if it is in it.
    pub(crate) fn line(&self) -> Option<u64> {
        match self {
            Self::File { line, .. } => Some(*line),
            _ => None,
        }
    }
}

impl Fault {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            path: String::new(),
            origin: Origin::Default,
            message: message.into(),
            hint: None,
            excerpt: None,
        }
    }

    pub(crate) fn at(mut self, origin: &Origin) -> Self {
        if self.origin == Origin::Default {
            self.origin = origin.clone();
        }
        self
    }

    /// Puts a key or index before the path.
    pub(crate) fn within(mut self, segment: &str) -> Self {
        self.path = match (segment, self.path.as_str()) {
            (_, "") => segment.to_owned(),
            ("", _) => self.path,
            (_, path) if path.starts_with('[') => format!("{segment}{path}"),
            (_, path) => format!("{segment}.{path}"),
        };
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { String::new() } else { format!("{}: ", self.path) };
        match (&self.origin, self.excerpt.as_deref()) {
            (Origin::File { line, column, length }, Some((file, text))) => {
                write!(f, "{}:{line}:{column}: {path}{}", file.display(), self.message)?;
                excerpt(f, *line, *column, *length, text)?;
            }
            (Origin::Default | Origin::File { .. }, _) => write!(f, "{path}{}", self.message)?,
            (Origin::Environment(name), _) => {
                write!(f, "environment variable {name}: {path}{}", self.message)?;
            }
            (Origin::Flag(text), _) => write!(f, "--set {text}: {path}{}", self.message)?,
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

/// The line with a caret under what is wrong.
fn excerpt(f: &mut fmt::Formatter<'_>, line: u64, column: u64, length: u64, text: &str) -> fmt::Result {
    /// More would wrap on a terminal and drown the message.
    const WIDTH: usize = 120;
    let column = usize::try_from(column).unwrap_or(1).max(1) - 1;
    if column >= WIDTH {
        return Ok(());
    }
    let shown: String = text.chars().take(WIDTH).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let rest = shown.trim_end().chars().count().saturating_sub(column).max(1);
    let carets = usize::try_from(length).unwrap_or(1).clamp(1, rest);
    let number = line.to_string();
    let margin = " ".repeat(number.len());
    write!(f, "\n{margin} |\n{number} | {}\n", shown.trim_end())?;
    write!(f, "{margin} | {}{}", " ".repeat(column), "^".repeat(carets))
}

fn render(faults: &[Fault]) -> String {
    let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
    texts.join("\n\n")
}

fn hint_of_read(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "\nhint: without --config, no file is needed",
        io::ErrorKind::PermissionDenied => "\nhint: let the user that runs peili read it",
        _ => "",
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { line, .. } => write!(f, "line {line}"),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(text) => write!(f, "--set {}", text.split('=').next().unwrap_or(text)),
        }
    }
}
