//! Turns the tree into typed settings, so that each error knows its key and where it was said.

use std::fmt;

use serde::de::{
    self, Deserialize, DeserializeSeed, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, VariantAccess, Visitor,
};

use super::error::{Fault, Origin};
use super::tree::{Entry, Node, Value};

/// Reads `node` as a `T`. Stops at the first fault.
pub(crate) fn decode<'de, T: Deserialize<'de>>(node: &'de Node) -> Result<T, Fault> {
    T::deserialize(Decoder(node))
}

#[derive(Clone, Copy)]
struct Decoder<'a>(&'a Node);

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let found = match found {
            Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
            Unexpected::Map => "keys and values".to_owned(),
            Unexpected::Seq => "a list".to_owned(),
            Unexpected::Unsigned(number) => format!("the number {number}"),
            Unexpected::Signed(number) => format!("the number {number}"),
            Unexpected::Float(number) => format!("the number {number}"),
            Unexpected::Bool(value) => format!("{value}"),
            Unexpected::Str(text) => format!("`{text}`"),
            other => other.to_string(),
        };
        let expected = expected.to_string();
        let expected = match expected.as_str() {
            text if text.starts_with("struct ") => "keys and values",
            "a sequence" => "a list",
            "a string" => "a text",
            "a boolean" => "true or false",
            "u16" | "u32" | "u64" | "usize" => "a whole number",
            text => text,
        };
        Self::new(format!("expected {expected}, found {found}"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let fault = Self::new(format!("unknown key `{field}`"));
        choose(fault, field, expected, "keys here")
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        choose(Self::new(format!("`{variant}` is not possible here")), variant, expected, "possible")
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("the key `{field}` is missing"))
    }
}

/// A hint with the nearest name, or with all of them.
fn choose(fault: Fault, given: &str, names: &[&str], all: &str) -> Fault {
    match nearest(given, names) {
        Some(name) => fault.hint(format!("did you mean `{name}`?")),
        None => fault.hint(format!("{all}: {}", names.join(", "))),
    }
}

/// The name that is at most a third of its letters away.
pub(crate) fn nearest<'a>(given: &str, names: &[&'a str]) -> Option<&'a str> {
    // Longer texts are no typing errors, and the distance costs the product of both lengths.
    if given.len() > 64 {
        return None;
    }
    let given = given.to_ascii_lowercase().replace('_', "-");
    let near = names.iter().map(|name| (distance(&given, name), *name)).min()?;
    (near.0 <= near.1.len().max(3) / 3).then_some(near.1)
}

/// Levenshtein's distance, by bytes: the names are ASCII.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[right.len()]
}

impl<'de> Decoder<'de> {
    fn list<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let nodes: Vec<Node>;
        let items: Items<'_> = match &self.0.value {
            Value::List(list) => return visitor.visit_seq(Items { list: list.iter(), index: 0 }),
            Value::Null => Items { list: [].iter(), index: 0 },
            // `a,b` in a variable or a flag.
            Value::Word(text) => {
                nodes = text
                    .split(',')
                    .map(str::trim)
                    .filter(|part| !part.is_empty())
                    .map(|part| Node { origin: self.0.origin.clone(), value: Value::Word(part.to_owned()) })
                    .collect();
                Items { list: nodes.iter(), index: 0 }
            }
            _ => return Err(self.mismatch(&"a sequence")),
        };
        visitor.visit_seq(Owned(items))
    }

    fn table<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Table(entries) => visitor.visit_map(Pairs { entries: entries.iter(), entry: None }),
            // A section of which all keys are commented out.
            Value::Null => visitor.visit_map(Pairs { entries: [].iter(), entry: None }),
            _ => Err(self.mismatch(&"struct ")),
        }
    }

    fn mismatch(self, expected: &dyn de::Expected) -> Fault {
        let found = match &self.0.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Unsigned(number) => Unexpected::Unsigned(*number),
            Value::Signed(number) => Unexpected::Signed(*number),
            Value::Float(number) => Unexpected::Float(*number),
            Value::Text(text) | Value::Word(text) => Unexpected::Str(text),
            Value::List(_) => Unexpected::Seq,
            Value::Table(_) => Unexpected::Map,
        };
        Fault::invalid_type(found, expected)
    }

    fn any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(number) => visitor.visit_u64(*number),
            Value::Signed(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Text(text) => visitor.visit_str(text),
            Value::Word(text) => match (text.parse(), text.parse()) {
                (Ok(number), _) => visitor.visit_u64(number),
                (_, Ok(value)) => visitor.visit_bool(value),
                _ => visitor.visit_str(text),
            },
            Value::List(_) => self.list(visitor),
            Value::Table(_) => self.table(visitor),
        }
    }

    fn text<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Text(text) | Value::Word(text) => visitor.visit_str(text),
            Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) | Value::Float(_) => {
                self.any(visitor).map_err(|fault| match fault.message.starts_with("expected a text") {
                    true => fault.hint("quote it"),
                    false => fault,
                })
            }
            _ => self.any(visitor),
        }
    }
}

/// Adds where the value is to an error about it.
macro_rules! located {
    ($($method:ident => $inner:ident),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.$inner(visitor).map_err(|fault| fault.at(&self.0.origin))
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Decoder<'de> {
    type Error = Fault;

    located! {
        deserialize_any => any,
        deserialize_bool => any,
        deserialize_i8 => any,
        deserialize_i16 => any,
        deserialize_i32 => any,
        deserialize_i64 => any,
        deserialize_u8 => any,
        deserialize_u16 => any,
        deserialize_u32 => any,
        deserialize_u64 => any,
        deserialize_f32 => any,
        deserialize_f64 => any,
        deserialize_char => text,
        deserialize_str => text,
        deserialize_string => text,
        deserialize_bytes => text,
        deserialize_byte_buf => text,
        deserialize_identifier => text,
        deserialize_unit => any,
        deserialize_seq => list,
        deserialize_map => table,
        deserialize_ignored_any => any,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Null => visitor.visit_none(),
            Value::Word(text) if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
        .map_err(|fault: Fault| fault.at(&self.0.origin))
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self).map_err(|fault| fault.at(&self.0.origin))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Text(text) | Value::Word(text) => visitor.visit_enum(Variant(text)),
            _ => Err(self.mismatch(&"a text")),
        }
        .map_err(|fault| fault.at(&self.0.origin))
    }
}

/// The name of a variant without content.
struct Variant<'a>(&'a str);

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Fault;
    type Variant = Self;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self), Fault> {
        seed.deserialize(self.0.into_deserializer()).map(|value: T::Value| (value, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Fault> {
        Err(Fault::new("needs keys and values"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Fault> {
        Err(Fault::new("needs a list"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Fault> {
        Err(Fault::new("needs keys and values"))
    }
}

struct Items<'a> {
    list: std::slice::Iter<'a, Node>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(node) = self.list.next() else { return Ok(None) };
        let segment = format!("[{}]", self.index);
        self.index += 1;
        seed.deserialize(Decoder(node)).map(Some).map_err(|fault| fault.at(&node.origin).within(&segment))
    }
}

/// Items that live shorter than what is decoded from them.
struct Owned<'a>(Items<'a>);

impl<'de> SeqAccess<'de> for Owned<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(node) = self.0.list.next() else { return Ok(None) };
        let segment = format!("[{}]", self.0.index);
        self.0.index += 1;
        let (Value::Word(text) | Value::Text(text)) = &node.value else { return Ok(None) };
        seed.deserialize(text.as_str().into_deserializer())
            .map(Some)
            .map_err(|fault: Fault| fault.at(&node.origin).within(&segment))
    }
}

struct Pairs<'a> {
    entries: std::slice::Iter<'a, Entry>,
    entry: Option<&'a Entry>,
}

impl<'de> MapAccess<'de> for Pairs<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some(entry) = self.entries.next() else { return Ok(None) };
        self.entry = Some(entry);
        let key = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|fault: Fault| fault.at(&entry.origin))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some(entry) = self.entry.take() else { return Err(Fault::new("a value without a key")) };
        // An error about a value that is not there points at its key.
        let absent = entry.node.value == Value::Null;
        let origin = if absent { &entry.origin } else { &entry.node.origin };
        seed.deserialize(Decoder(&entry.node)).map_err(|mut fault| {
            if absent {
                fault.origin = Origin::Default;
            }
            fault.at(origin).within(&entry.key)
        })
    }
}
