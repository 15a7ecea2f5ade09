//! The files that an operator gives a policy beside its settings: `data` of the configuration.
//!
//! They are there from `new` on, and an instance sees the same always, so what is made of them is made once, in `new`. Whoever uses
//! them needs a host of the contract 0.1.1.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::contract::peili::policy::data as host;

thread_local! {
    /// What [`testing::with`] gives, where there is no host.
    static GIVEN: RefCell<BTreeMap<String, Vec<u8>>> = const { RefCell::new(BTreeMap::new()) };
}

/// The names of all files, in order.
pub fn names() -> Vec<String> {
    if cfg!(target_arch = "wasm32") {
        host::names()
    } else {
        GIVEN.with_borrow(|files| files.keys().cloned().collect())
    }
}

/// What the file of this name has.
///
/// # Errors
/// The operator gives none of this name; the text is fit for a [`SettingError`](crate::SettingError).
pub fn bytes(name: &str) -> Result<Vec<u8>, String> {
    let bytes = if cfg!(target_arch = "wasm32") {
        host::read(name)
    } else {
        GIVEN.with_borrow(|files| files.get(name).cloned())
    };
    bytes.ok_or_else(|| format!("no file `{name}` is given: `data` of the configuration names them"))
}

/// The text of the file of this name.
///
/// # Errors
/// There is none, or it is no UTF-8.
pub fn text(name: &str) -> Result<String, String> {
    String::from_utf8(bytes(name)?).map_err(|_| format!("the file `{name}` is no UTF-8 text"))
}

/// The lines of the file of this name with their numbers, from 1 on: without blanks around them, empty ones, and those that begin
/// with `#`.
///
/// # Errors
/// As of [`text`].
pub fn lines(name: &str) -> Result<Vec<(usize, String)>, String> {
    let text = text(name)?;
    let lines = text.lines().map(str::trim).zip(1..);
    let said = lines.filter(|(line, _)| !(line.is_empty() || line.starts_with('#')));
    Ok(said.map(|(line, number)| (number, line.to_owned())).collect())
}

/// Files for tests on the machine that one works on.
pub mod testing {
    use super::GIVEN;

    /// Does `work` with these files, by name; on this thread alone.
    pub fn with<T>(files: &[(&str, &str)], work: impl FnOnce() -> T) -> T {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec()));
        let before = GIVEN.replace(files.collect());
        let done = work();
        GIVEN.set(before);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_numbered_and_without_comments() {
        testing::with(&[("list", "# ours\n\n a/b \r\nc/d"), ("mark", "x")], || {
            assert_eq!(names(), ["list", "mark"]);
            assert_eq!(lines("list").unwrap(), [(3, "a/b".to_owned()), (4, "c/d".to_owned())]);
            assert!(lines("other").unwrap_err().contains("no file `other`"));
        });
        assert!(names().is_empty());
    }
}
