//! What has to change for one registry: from the files, the records and what is asked for. Reads only.

use std::path::{Path, PathBuf};

use super::disk::{self, Access, Content};
use super::edit;
use super::journal::{Journal, Original, Record};
use super::report::{Action, Change, diff};
use super::tree::{FILE, Place, Tree};
use super::{Error, Mirror, Mode, Target};

/// A change of one file that `configure` makes.
#[derive(Debug)]
pub(super) struct Write {
    /// The record that comes first.
    pub(super) record: Record,
    /// The file's folder, as the host names it.
    pub(super) folder: PathBuf,
    /// The folder is there.
    pub(super) folder_exists: bool,
    /// What the file gets.
    pub(super) access: Option<Access>,
    /// Why it is changed, where it was Peili's before.
    pub(super) why: Option<&'static str>,
    /// What is there now.
    pub(super) old: Option<String>,
}

/// What to do about a file on record.
#[derive(Debug, PartialEq)]
pub(super) enum Undo {
    /// Put back what was there.
    Restore(Original),
    /// Take the file away, and the folders that were made for it.
    Remove,
    /// Write this: others changed the file.
    Strip(String, Access),
    /// Nothing.
    Forget(&'static str),
}

/// What `configure` must do for `target`; `None`: nothing.
pub(super) fn write(
    tree: &Tree<'_>,
    journal: &Journal<'_>,
    target: &Target,
    mirror: &Mirror,
    mode: Mode,
) -> Result<Option<Write>, Error> {
    let mut place = tree.place(target)?;
    let path = place.folder.join(FILE);
    let current = disk::read(&tree.root.at(&path))?;
    let record = journal.get(&path)?;
    if let (Some(file), Some(record)) = (&current, &record)
        && (&file.text, &record.mirror, record.mode) == (&record.written, mirror, mode)
    {
        return Ok(None);
    }
    if record.as_ref().is_some_and(|record| record.folder) && matches!(target, Target::Registry(_)) {
        // What it hides by being there is what it was made from.
        place.hides = tree.default()?;
    }
    let here = tree.root.at(&place.folder);
    let sample = target.sample();
    let fail = |fault| Error::file(&path, fault);

    let set = |text: &str| edit::is_set(text, &here, &sample, mirror, mode).map_err(fail);
    let mut why = None;
    let original = match (&current, &record) {
        (Some(file), Some(record)) if record.wrote(&file.text) => record.original.clone(),
        // From `only` to `first` is a change, although Peili is the first host then too.
        (Some(file), record)
            if !file.text.is_empty()
                && record.as_ref().is_none_or(|record| record.mode == mode)
                && set(&file.text)? =>
        {
            return Ok(None);
        }
        (Some(file), Some(record)) => {
            let stripped = edit::strip(&file.text, &record.mirror).map_err(fail)?;
            if stripped != file.text && record.mode == Mode::Only {
                return Err(Error::Edited(path));
            }
            why = Some("Peili was not the first host any more");
            Some(Original { text: stripped, access: file.access })
        }
        (Some(file), None) => Some(file.clone().into()),
        (None, Some(record)) => {
            why = Some("it was gone");
            record.original.clone()
        }
        (None, None) => None,
    };

    let inherited = || tree.inherited(&place, target, journal, mirror);
    let mut base = match &original {
        Some(original) if !original.text.is_empty() => {
            Some(Content { text: original.text.clone(), access: original.access })
        }
        _ => inherited()?,
    };
    // Who wiped the folder took the certificates too, and containerd fails a pull that cannot read one.
    if current.is_none()
        && base.as_ref().is_some_and(|base| !missing(tree, &place, target, &base.text).is_empty())
    {
        base = inherited()?;
    }
    let text = base.as_ref().map_or("", |base| &base.text);
    let written = edit::add(text, &here, &sample, mirror, mode).map_err(fail)?;
    let old = current.as_ref().map(|file| file.text.clone());
    if old.as_ref() == Some(&written) {
        return Ok(None);
    }
    let mut new = Record::new(path, target.name().to_owned(), mirror.clone(), mode, written);
    new.folder = !place.exists || record.as_ref().is_some_and(|record| record.folder);
    new.made = record.as_ref().map(|record| record.made.clone()).unwrap_or_default();
    new.before =
        old.clone().filter(|_| record.is_some() && old.as_deref() != original.as_ref().map(|o| &o.text[..]));
    let access = current.map(|file| file.access).or(original.as_ref().map(|original| original.access));
    new.original = original;
    Ok(Some(Write {
        access: access.or(base.map(|base| base.access)),
        record: new,
        folder: place.folder,
        folder_exists: place.exists,
        why,
        old,
    }))
}

/// What `cleanup` must do about a record.
pub(super) fn undo(current: Option<&Content>, record: &Record) -> Result<Undo, Error> {
    let Some(file) = current else {
        return Ok(match &record.original {
            Some(_) => Undo::Forget("it is gone"),
            None => Undo::Remove,
        });
    };
    let back = || record.original.clone().map_or(Undo::Remove, Undo::Restore);
    if record.original.as_ref().is_some_and(|original| original.text == file.text) {
        return Ok(Undo::Forget("it is as it was before Peili"));
    }
    if record.wrote(&file.text) {
        return Ok(back());
    }
    let strip =
        |text: &str| edit::strip(text, &record.mirror).map_err(|fault| Error::file(&record.path, fault));
    let stripped = strip(&file.text)?;
    if stripped == file.text {
        return Ok(Undo::Forget("Peili is not in it any more"));
    }
    // Somebody changed Peili's own entry, and nothing else.
    if stripped == strip(&record.written)? {
        return Ok(back());
    }
    Ok(Undo::Strip(stripped, file.access))
}

/// Files that the text names for this target's hosts and that are not there, as the host names them.
pub(super) fn missing(tree: &Tree<'_>, place: &Place, target: &Target, text: &str) -> Vec<PathBuf> {
    // The folder may not be there yet: names are resolved as the host does, by the text alone.
    let hosts = edit::read(text, &place.folder, &target.sample()).unwrap_or_default();
    let names = hosts.iter().flat_map(|host| {
        let client = host.client.iter().flat_map(|(certificate, key)| [Some(certificate), key.as_ref()]);
        host.ca.iter().chain(client.flatten())
    });
    let names = names.map(|path| disk::lexical(path));
    names.filter(|path| !disk::exists(&tree.root.at(path)).unwrap_or(true)).collect()
}

impl Write {
    /// As it is shown.
    pub(super) fn change(&self) -> Change {
        let action = if self.old.is_some() { Action::Change } else { Action::Create };
        Change {
            path: self.record.path.clone(),
            action,
            note: self.why.map(str::to_owned),
            diff: diff(&self.record.path, self.old.as_deref(), Some(&self.record.written)),
        }
    }
}

impl Undo {
    /// As it is shown.
    pub(super) fn change(&self, path: &Path, old: Option<&str>) -> Change {
        let (action, new, note) = match self {
            Self::Restore(original) => (Action::Restore, Some(&original.text[..]), None),
            Self::Remove => (Action::Remove, None, None),
            Self::Strip(text, _) => {
                (Action::Strip, Some(&text[..]), Some("it was changed since; the other changes stay"))
            }
            Self::Forget(note) => (Action::Forget, old, Some(*note)),
        };
        Change { path: path.to_owned(), action, note: note.map(str::to_owned), diff: diff(path, old, new) }
    }
}
