//! What a component carries for people and for who loads it, in custom sections of its own: its package, the schema of its
//! settings, and questions with the answers that it must give. They are bytes of the component, so its pin covers them.

use wasmparser::{Parser, Payload};

/// Of one section, in bytes.
pub const EMBEDDED_LIMIT: usize = 256 << 10;
/// Their names. What follows a change of their form gets another one.
const NAMES: [&str; 3] = ["peili:package", "peili:settings-schema", "peili:cases"];

/// What a component carries. Nothing of it was looked at but its size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Embedded {
    /// JSON: `name`, `version`, `description`, `license`.
    pub package: Option<Vec<u8>>,
    /// A JSON schema of the settings.
    pub schema: Option<Vec<u8>>,
    /// A file of cases.
    pub cases: Option<Vec<u8>>,
}

impl Embedded {
    /// Reads what `component` carries, of each kind what comes first.
    ///
    /// # Errors
    /// One of them is too large.
    pub fn of(component: &[u8]) -> Result<Self, String> {
        let mut embedded = Self::default();
        let mut depth = 0_usize;
        for payload in Parser::new(0).parse_all(component).map_while(Result::ok) {
            match payload {
                // What a module within it carries is its compiler's.
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::CustomSection(section) if depth == 0 => {
                    let Some(kind) = NAMES.iter().position(|name| *name == section.name()) else { continue };
                    if section.data().len() > EMBEDDED_LIMIT {
                        return Err(format!("its section `{}` has more than 256 KiB", NAMES[kind]));
                    }
                    let [package, schema, cases] =
                        [&mut embedded.package, &mut embedded.schema, &mut embedded.cases];
                    [package, schema, cases][kind].get_or_insert_with(|| section.data().to_vec());
                }
                _ => {}
            }
        }
        Ok(embedded)
    }

    /// Puts it into a component that carries nothing yet.
    pub fn put(&self, component: &mut Vec<u8>) {
        for (name, data) in NAMES.into_iter().zip([&self.package, &self.schema, &self.cases]) {
            let Some(data) = data else { continue };
            let mut body = length(name.len());
            body.extend(name.as_bytes());
            body.extend(data);
            // A custom section has the number 0.
            component.push(0);
            component.extend(length(body.len()));
            component.extend(body);
        }
    }
}

/// LEB128.
fn length(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let byte = u8::try_from(number & 0x7f).unwrap_or_default();
        number >>= 7;
        if number == 0 {
            bytes.push(byte);
            return bytes;
        }
        bytes.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty component.
    const EMPTY: [u8; 8] = *b"\0asm\x0d\0\x01\0";

    #[test]
    fn what_is_put_in_is_read() {
        let embedded = Embedded { package: Some(b"{}".to_vec()), schema: None, cases: Some(vec![b'x'; 300]) };
        let mut component = EMPTY.to_vec();
        embedded.put(&mut component);
        assert_eq!(Embedded::of(&component).unwrap(), embedded);
        // A second one of a kind does not take the place of the first.
        Embedded { cases: Some(b"other".to_vec()), ..Embedded::default() }.put(&mut component);
        assert_eq!(Embedded::of(&component).unwrap(), embedded);
        assert!(super::super::inspect::facts(&component).is_ok(), "it is a component still");
    }

    #[test]
    fn each_is_bounded() {
        let mut component = EMPTY.to_vec();
        Embedded { cases: Some(vec![b'x'; EMBEDDED_LIMIT + 1]), ..Embedded::default() }.put(&mut component);
        assert!(Embedded::of(&component).unwrap_err().contains("`peili:cases` has more than 256 KiB"));
    }
}
