//! The configuration as a tree whose nodes know where they were said: the file, the environment, a flag.
//!
//! Knows nothing of what the keys mean. Hostile input is bounded by the size that callers check and by the budget here.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, MessageFormatter, Spanned, UserMessageFormatter};

use super::error::{Fault, Origin};

/// Nesting that a document may have; the configuration needs 5.
const DEPTH_LIMIT: usize = 16;
/// Values of a document, with what aliases expand to; the configuration of 10,000 peers has 50,000.
const NODE_LIMIT: usize = 100_000;
/// Aliases of one document.
const ALIAS_LIMIT: usize = 100;

/// A value and where it was said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) origin: Origin,
    pub(crate) value: Value,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    /// From the environment or a flag: what it is depends on what is wanted.
    Word(String),
    List(Vec<Node>),
    Table(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) origin: Origin,
    pub(crate) node: Node,
}

impl Node {
    /// No keys.
    pub(crate) fn empty() -> Self {
        Self { origin: Origin::Default, value: Value::Table(Vec::new()) }
    }

    /// Parses a document; an empty one has no keys.
    pub(crate) fn parse(text: &str) -> Result<Self, Fault> {
        let options = serde_saphyr::options! {
            with_snippet: false,
            strict_booleans: true,
            budget: serde_saphyr::budget! {
                max_depth: DEPTH_LIMIT,
                max_nodes: NODE_LIMIT,
                max_events: 2 * NODE_LIMIT,
                max_aliases: ALIAS_LIMIT,
                max_documents: 2,
            },
            alias_limits: serde_saphyr::alias_limits! {
                max_total_replayed_events: NODE_LIMIT,
            },
        };
        let raw: Option<Spanned<Raw>> =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| {
                let message = match &error {
                    serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
                        format!("the key `{key}` is there twice")
                    }
                    _ => UserMessageFormatter.format_message(&error).into_owned(),
                };
                Fault::new(message)
                    .at(&error.location().map_or(Origin::Default, |location| origin(&location)))
            })?;
        Ok(match raw.map(Self::from) {
            None | Some(Self { value: Value::Null, .. }) => Self::empty(),
            Some(node) => node,
        })
    }

    /// A value of the environment or of a flag: a list or a table in YAML's `[..]` and `{..}`, else a word.
    pub(crate) fn word(text: &str, origin: &Origin) -> Result<Self, Fault> {
        let trimmed = text.trim();
        let structured = (trimmed.starts_with('[') && trimmed.ends_with(']'))
            || (trimmed.starts_with('{') && trimmed.ends_with('}'));
        // `[::1]` is an address and no list.
        let address = trimmed.trim_matches(['[', ']']).parse::<std::net::Ipv6Addr>().is_ok();
        if structured && !address {
            let mut node = Self::parse(trimmed).map_err(|fault| Fault { origin: origin.clone(), ..fault })?;
            node.set_origin(origin);
            return Ok(node);
        }
        Ok(Self { origin: origin.clone(), value: Value::Word(text.to_owned()) })
    }

    /// Sets `path`, keys with dots between, to `node`; tables on the way are made.
    pub(crate) fn set(&mut self, path: &str, node: Self) -> Result<(), Fault> {
        let (key, rest) = match path.split_once('.') {
            Some((key, rest)) => (key, Some(rest)),
            None => (path, None),
        };
        if key.is_empty() {
            return Err(Fault::new("an empty key").at(&node.origin));
        }
        if matches!(self.value, Value::Null) {
            self.value = Value::Table(Vec::new());
        }
        let Value::Table(entries) = &mut self.value else {
            return Err(Fault::new("is not a section, so it has no keys").at(&node.origin));
        };
        let origin = node.origin.clone();
        let index = match entries.iter().position(|entry| entry.key == key) {
            Some(index) => index,
            None => {
                entries.push(Entry {
                    key: key.to_owned(),
                    origin: origin.clone(),
                    node: Self { origin, value: Value::Null },
                });
                entries.len() - 1
            }
        };
        let entry = &mut entries[index];
        match rest {
            Some(rest) => entry.node.set(rest, node).map_err(|fault| fault.within(key)),
            None => {
                entry.origin = node.origin.clone();
                entry.node = node;
                Ok(())
            }
        }
    }

    /// Where the value at `path` (`network.peers[0].id`) was said; the nearest part above it, if only that was said.
    pub(crate) fn origin_of(&self, path: &str) -> Origin {
        let mut node = self;
        for segment in path.split('.') {
            let (key, indexes) = segment.split_once('[').unwrap_or((segment, ""));
            let Value::Table(entries) = &node.value else { return node.origin.clone() };
            let Some(entry) = entries.iter().find(|entry| entry.key == key) else { return Origin::Default };
            node = &entry.node;
            for index in indexes.split('[').filter_map(|index| index.strip_suffix(']')?.parse::<usize>().ok())
            {
                match &node.value {
                    Value::List(list) if index < list.len() => node = &list[index],
                    _ => return node.origin.clone(),
                }
            }
        }
        node.origin.clone()
    }

    /// The value of a key of this table.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        let Value::Table(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// The values of this list.
    pub(crate) fn items(&self) -> &[Self] {
        if let Value::List(list) = &self.value { list } else { &[] }
    }

    /// The lines of the file in which the values below this one were said, by their pointers (RFC 6901); that of a key where it
    /// has one.
    pub(crate) fn lines(&self) -> Vec<(String, u64)> {
        let mut lines = Vec::new();
        self.add_lines(String::new(), &self.origin, &mut lines);
        lines
    }

    fn add_lines(&self, pointer: String, origin: &Origin, lines: &mut Vec<(String, u64)>) {
        match &self.value {
            Value::List(list) => {
                for (index, node) in list.iter().enumerate() {
                    node.add_lines(format!("{pointer}/{index}"), &node.origin, lines);
                }
            }
            Value::Table(entries) => {
                for Entry { key, origin, node } in entries {
                    let key = key.replace('~', "~0").replace('/', "~1");
                    node.add_lines(format!("{pointer}/{key}"), origin, lines);
                }
            }
            _ => {}
        }
        if let Origin::File { line, .. } = origin {
            lines.push((pointer, *line));
        }
    }

    fn set_origin(&mut self, origin: &Origin) {
        self.origin = origin.clone();
        match &mut self.value {
            Value::List(list) => list.iter_mut().for_each(|node| node.set_origin(origin)),
            Value::Table(entries) => {
                for entry in entries {
                    entry.origin = origin.clone();
                    entry.node.set_origin(origin);
                }
            }
            _ => {}
        }
    }
}

fn origin(location: &Location) -> Origin {
    Origin::File { line: location.line(), column: location.column(), length: location.span().len() }
}

impl From<Spanned<Raw>> for Node {
    fn from(raw: Spanned<Raw>) -> Self {
        Self { origin: origin(&raw.referenced), value: raw.value.0 }
    }
}

/// A value as YAML's parser gives it.
struct Raw(Value);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor).map(Raw)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(raw) = access.next_element::<Spanned<Raw>>()? {
            list.push(raw.into());
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let node: Node = access.next_value::<Spanned<Raw>>()?.into();
            entries.push(Entry { key: key.value, origin: origin(&key.referenced), node });
        }
        Ok(Value::Table(entries))
    }
}

/// The tree of the file with the environment and flags on top, in that order.
pub(crate) fn overlay(
    mut root: Node,
    environment: &[(String, String)],
    flags: &[String],
) -> (Node, Vec<Fault>) {
    let mut faults = Vec::new();
    let mut set = |path: &str, text: &str, origin: &Origin| {
        let node = Node::word(text, origin).map_err(|fault| fault.within(path))?;
        root.set(path, node)
    };
    for (name, value) in environment {
        let Some((section, key)) = name.strip_prefix("PEILI_").and_then(|name| name.split_once("__")) else {
            continue;
        };
        if section.is_empty() {
            continue;
        }
        let path = format!("{section}.{}", key.replace("__", ".")).to_ascii_lowercase().replace('_', "-");
        faults.extend(set(&path, value, &Origin::Environment(Arc::from(name.as_str()))).err());
    }
    for flag in flags {
        let origin = Origin::Flag(Arc::from(flag.as_str()));
        let result = match flag.split_once('=') {
            Some((path, value)) => set(path.trim(), value, &origin),
            None => Err(Fault::new("has no `=`").at(&origin).hint("the form is --set key.path=value")),
        };
        faults.extend(result.err());
    }
    (root, faults)
}
