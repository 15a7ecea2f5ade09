//! The commands: plan for all that is asked for, then change one file after the other, each with its record first.

use std::path::{Path, PathBuf};

use super::disk::{self, Disk};
use super::find::{Node, Root};
use super::journal::{Journal, Record};
use super::plan::{self, Undo, Write};
use super::report::{Action, Change, Code, Report, diff};
use super::tree::{FILE, Tree};
use super::{DEFAULT, Error, Mode, Options, Target, edit};

/// What a command works on.
struct Work<'a> {
    options: &'a Options,
    disk: &'a Disk,
    root: Root,
    journal: Journal<'a>,
    /// The values of `config_path`.
    lists: Vec<Vec<PathBuf>>,
    targets: Vec<Target>,
    mode: Mode,
}

pub(super) fn configure(options: &Options, disk: &Disk) -> Result<Report, Error> {
    let (mut work, mut report) = Work::new(options, disk)?;
    if let Some(node) = &report.node
        && let Some(format) = node.distribution.owner()
        && options.config_paths.is_empty()
    {
        return Err(Error::Owned(node.distribution, format));
    }
    work.journal.lock()?;
    work.repair()?;
    // All is planned before the first write: a file that cannot be changed leaves the others alone.
    let writes = work.plan(&mut report)?;
    for write in writes {
        report.changes.push(write.change());
        work.write(write)?;
    }
    work.look_around(&mut report)?;
    Ok(finish(report))
}

pub(super) fn preview(options: &Options, disk: &Disk) -> Result<Report, Error> {
    let (work, mut report) = Work::new(options, disk)?;
    let writes = work.plan(&mut report)?;
    report.changes = writes.iter().map(Write::change).collect();
    work.look_around(&mut report)?;
    work.owner(&mut report, false)?;
    Ok(finish(report))
}

pub(super) fn check(options: &Options, disk: &Disk) -> Result<Report, Error> {
    let (work, mut report) = Work::new(options, disk)?;
    let mut writes = Vec::new();
    for tree in work.trees() {
        for target in &work.targets {
            match plan::write(&tree, &work.journal, target, &options.mirror, work.mode) {
                Ok(Some(write)) => writes.push(write),
                Ok(None) => report.unchanged.push(target.name().to_owned()),
                // A file that containerd cannot read, or that was changed: the node is not set up.
                Err(error @ (Error::File { .. } | Error::Edited(_))) => {
                    let text = error.to_string();
                    let (text, fix) = text.split_once("\nhint: ").unwrap_or((&text, "peili configure"));
                    report.add(Code::NotSetUp, text.to_owned(), Some(fix.to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
    }
    for write in &writes {
        let path = write.record.path.display();
        let text = match (write.why, work.journal.get(&write.record.path)?) {
            (Some(why), Some(_)) => format!("{path}: changed since it was set up: {why}"),
            (None, Some(_)) => format!("{path}: set up in another way than is asked for now"),
            (_, None) => format!("{path}: not set up for {}", write.record.target),
        };
        report.add(Code::NotSetUp, text, Some("peili configure".into()));
        report.changes.push(write.change());
    }
    work.look_around(&mut report)?;
    work.owner(&mut report, writes.is_empty())?;
    Ok(finish(report))
}

pub(super) fn cleanup(options: &Options, dry: bool, disk: &Disk) -> Result<Report, Error> {
    let root = Root::new(options.root.clone());
    let mut journal = Journal::new(options.state.clone(), disk);
    let is_wanted =
        |name: &str| options.targets.is_empty() || options.targets.iter().any(|target| target.name() == name);
    let mut report = Report::new(None);
    // Without a record it is only looked at where containerd looks; no containerd, no such place.
    let node = match Node::find(&root, !options.config_paths.is_empty()) {
        Ok(node) => Some(node),
        Err(Error::NoRuntime(_) | Error::Runtime(_)) => None,
        Err(error) => return Err(error),
    };
    let lists = lists(options, node.as_ref());
    if !dry {
        journal.lock()?;
    }
    let mut work = Work { options, disk, root, journal, lists, targets: Vec::new(), mode: Mode::First };
    if !dry {
        work.repair()?;
    }
    let records: Vec<_> =
        work.journal.all()?.into_iter().filter(|record| is_wanted(&record.target)).collect();
    let mut undone = Vec::new();
    for record in &records {
        work.sees(&record.path)?;
        let current = disk::read(&work.root.at(&record.path))?;
        let undo = plan::undo(current.as_ref(), record)?;
        undone.push((record, undo, current));
    }
    for (record, undo, current) in undone {
        let mut change = undo.change(&record.path, current.as_ref().map(|file| &file.text[..]));
        if let Some(kept) = work.undo(record, &undo, dry)? {
            let note = change.note.take().unwrap_or_default();
            change.note = Some(format!("{note}; what it had before Peili is in {}", kept.display()));
        }
        report.changes.push(change);
    }
    work.strip_unrecorded(&records, &is_wanted, dry, &mut report)?;
    report.ready = true;
    Ok(report)
}

/// The folders of each `config_path`: as told, else as found.
fn lists(options: &Options, node: Option<&Node>) -> Vec<Vec<PathBuf>> {
    let split =
        |list: &String| list.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from).collect();
    let told: Vec<Vec<PathBuf>> = options.config_paths.iter().map(split).collect();
    match node {
        _ if !told.is_empty() => told,
        Some(node) if !node.config_path.is_empty() => vec![node.config_path.clone()],
        _ => vec![vec![super::find::HOSTS.into()]],
    }
}

fn finish(mut report: Report) -> Report {
    report.ready = !report.findings.iter().any(|finding| finding.code.stops());
    report
}

impl<'a> Work<'a> {
    fn new(options: &'a Options, disk: &'a Disk) -> Result<(Self, Report), Error> {
        let root = Root::new(options.root.clone());
        let node = match Node::find(&root, !options.config_paths.is_empty()) {
            Ok(node) => Some(node),
            // Who names the folders needs no containerd that can be understood.
            Err(Error::Runtime(_)) if !options.config_paths.is_empty() => None,
            Err(error) => return Err(error),
        };
        let journal = Journal::new(options.state.clone(), disk);
        let lists = lists(options, node.as_ref());
        let records = journal.all()?;
        let targets = if options.targets.is_empty() { recorded(&records) } else { options.targets.clone() };
        let mode = options.mode.unwrap_or_else(|| {
            let is_of = |record: &&Record| targets.iter().any(|target| target.name() == record.target);
            records.iter().find(is_of).map_or(Mode::First, |record| record.mode)
        });
        let report = Report::new(node);
        Ok((Self { options, disk, root, journal, lists, targets, mode }, report))
    }

    fn trees(&self) -> impl Iterator<Item = Tree<'_>> {
        self.lists.iter().map(|folders| Tree { root: &self.root, folders })
    }

    /// Whether the host's files are there: what a pod has not mounted is not gone. On the host itself it is.
    fn sees(&self, file: &Path) -> Result<(), Error> {
        let mut above = file.ancestors().skip(2);
        let (Some(hosts), Some(folder)) = (above.next(), above.next()) else { return Ok(()) };
        if self.options.root == Path::new("/") || disk::exists(&self.root.at(folder))? {
            return Ok(());
        }
        Err(Error::NoFolder(hosts.to_owned()))
    }

    /// Removes what a run that was killed left under names that nobody reads.
    fn repair(&self) -> Result<(), Error> {
        self.journal.repair()?;
        for record in self.journal.all()? {
            let file = self.root.at(&record.path);
            if file.parent().is_some_and(Path::is_dir) {
                self.disk.remove_temporary(&file)?;
            }
            if let Some(folder) = record.path.parent() {
                self.disk.remove_temporary(&self.root.at(folder))?;
            }
        }
        Ok(())
    }

    fn plan(&self, report: &mut Report) -> Result<Vec<Write>, Error> {
        let mut writes: Vec<Write> = Vec::new();
        for tree in self.trees() {
            for target in &self.targets {
                let write = plan::write(&tree, &self.journal, target, &self.options.mirror, self.mode)?;
                match write {
                    // Two names may lead to one file.
                    Some(write) => {
                        let file = self.root.at(&write.record.path);
                        if !writes.iter().any(|other| self.root.at(&other.record.path) == file) {
                            writes.push(write);
                        }
                    }
                    None => report.unchanged.push(target.name().to_owned()),
                }
            }
        }
        Ok(writes)
    }

    fn write(&self, mut write: Write) -> Result<(), Error> {
        let folder = self.root.at(&write.folder);
        let mut missing = Vec::new();
        if !write.folder_exists {
            // The folder of hosts itself may be new; what it lies in must be there.
            let parent = write.folder.parent().unwrap_or(Path::new("/"));
            let above = parent.parent().unwrap_or(Path::new("/"));
            if !disk::exists(&self.root.at(parent))? {
                if !disk::exists(&self.root.at(above))? {
                    return Err(Error::NoFolder(parent.to_owned()));
                }
                missing.push(parent.to_owned());
            }
        }
        for made in &missing {
            if !write.record.made.contains(made) {
                write.record.made.push(made.clone());
            }
        }
        self.journal.save(&write.record)?;
        for made in &missing {
            self.disk.make_folder(&self.root.at(made))?;
        }
        let text = &write.record.written;
        if write.folder_exists {
            // A link to the file stays a link.
            self.disk.replace(&self.root.at(&write.record.path), text, write.access)?;
        } else {
            self.disk.place_folder(&folder, FILE, text, write.access)?;
        }
        Ok(())
    }

    /// Undoes one file; returns where what it had before is kept, if it could not be put back.
    fn undo(&mut self, record: &Record, undo: &Undo, dry: bool) -> Result<Option<PathBuf>, Error> {
        let file = self.root.at(&record.path);
        let folder = record.path.parent().map(|folder| self.root.at(folder));
        let is_lost = match undo {
            Undo::Strip(..) => record.mode == Mode::Only,
            Undo::Forget(_) => !file.exists(),
            Undo::Restore(_) | Undo::Remove => false,
        };
        let lost = record.original.as_ref().filter(|original| is_lost && !original.text.is_empty());
        if dry {
            return Ok(lost.map(|_| self.journal.kept(record)));
        }
        let kept = lost.map(|original| self.journal.keep(record, &original.text)).transpose()?;
        match undo {
            Undo::Restore(original) => self.disk.replace(&file, &original.text, Some(original.access))?,
            Undo::Strip(text, access) => self.disk.replace(&file, text, Some(*access))?,
            Undo::Remove => self.remove(record, &file, folder.as_deref())?,
            Undo::Forget(_) => {}
        }
        self.journal.remove(&record.path)?;
        Ok(kept)
    }

    /// Takes away a file that was made for Peili, and the folders that were, if nothing else is in them.
    fn remove(&self, record: &Record, file: &Path, folder: Option<&Path>) -> Result<(), Error> {
        let is_made = record.folder && folder.is_some_and(Path::is_dir);
        match folder {
            Some(folder) if is_made && self.disk.take_folder(folder, FILE)? => {}
            _ if disk::exists(file)? => self.disk.remove_file(file)?,
            _ => {}
        }
        for made in record.made.iter().rev() {
            if self.disk.remove_empty_folder(&self.root.at(made))? {
                continue;
            }
            // Whoever else is in it takes it away in the end.
            let others = self.journal.all()?;
            let heir =
                others.into_iter().find(|other| other.path != record.path && other.path.starts_with(made));
            if let Some(mut heir) = heir.filter(|heir| !heir.made.contains(made)) {
                heir.made.insert(0, made.clone());
                self.journal.save(&heir)?;
            }
        }
        Ok(())
    }

    /// Entries that lead to Peili in files of which there is no record: written by hand, or the records are lost.
    fn strip_unrecorded(
        &self,
        records: &[Record],
        is_wanted: &dyn Fn(&str) -> bool,
        dry: bool,
        report: &mut Report,
    ) -> Result<(), Error> {
        let mirror = &self.options.mirror;
        for folder in self.lists.iter().flatten() {
            let entries = std::fs::read_dir(self.root.at(folder)).into_iter().flatten().flatten();
            let mut names: Vec<_> =
                entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
            names.retain(|name| !name.starts_with('.') && is_wanted(&super::tree::target_name(name)));
            names.sort();
            for name in names {
                let path = folder.join(&name).join(FILE);
                let file = self.root.at(&path);
                if records.iter().any(|record| record.path == path) || !file.is_file() {
                    continue;
                }
                let Some(content) = disk::read(&file)? else { continue };
                // A file that cannot be read has no entry that counts.
                let Ok(stripped) = edit::strip(&content.text, mirror) else { continue };
                if stripped == content.text {
                    continue;
                }
                if !dry {
                    self.disk.replace(&file, &stripped, Some(content.access))?;
                }
                report.changes.push(Change {
                    action: Action::Strip,
                    note: Some("there is no record of what it was before".into()),
                    diff: diff(&path, Some(&content.text), Some(&stripped)),
                    path,
                });
            }
        }
        Ok(())
    }

    /// Looks for what stops, or surprises, beside the files that are asked for.
    fn look_around(&self, report: &mut Report) -> Result<(), Error> {
        let (mirror, mode) = (&self.options.mirror, self.mode);
        for tree in self.trees() {
            let is_default = self.targets.contains(&Target::Default);
            for (registry, folder) in tree.shadows(mirror)?.into_iter().filter(|_| is_default) {
                if self.targets.iter().any(|target| target.name() == registry) {
                    continue;
                }
                report.add(
                    Code::Shadowed,
                    format!(
                        "{}: {registry} has a folder of its own, so that {DEFAULT} does not count for it",
                        folder.display()
                    ),
                    Some(format!(
                        "to have it too: peili configure {DEFAULT} {registry} (`runtime.registries` of the chart)"
                    )),
                );
            }
            for target in &self.targets {
                let place = tree.place(target)?;
                let path = place.folder.join(FILE);
                let Some(content) = disk::read(&self.root.at(&path))? else { continue };
                for file in plan::missing(&tree, &place, target, &content.text) {
                    report.add(
                        Code::MissingFile,
                        format!(
                            "{}: {} is not there: containerd fails every pull that reads this file",
                            path.display(),
                            file.display()
                        ),
                        Some("put it there, or take it out of the file".into()),
                    );
                }
                let original = self.journal.get(&path)?.and_then(|record| record.original);
                if mode == Mode::First && original.is_some_and(|original| is_ignored(&original.text)) {
                    report.add(
                        Code::Ignored,
                        format!("{}: had no [host] table, for which containerd 1.6 and 1.7 ignored it so far; now its `server` counts", path.display()),
                        None,
                    );
                }
            }
        }
        let names = || self.targets.iter().map(Target::name).collect::<Vec<_>>().join(", ");
        let policies = &self.options.settings.policies;
        if mode == Mode::Only {
            report.add(
                Code::Only,
                format!("pulls of {} depend on Peili: where it has no answer, they fail", names()),
                Some(
                    "if Peili's own image comes from there, a node without Peili cannot get it: import that image, or leave its \
                     registry open"
                        .into(),
                ),
            );
        } else if !policies.is_empty() {
            report.add(
                Code::Advisory,
                format!(
                    "what the policies ({}) deny is advice for {}: the runtime goes on to the registry itself",
                    policies.join(", "),
                    names()
                ),
                Some("to let denials bind, make Peili the only host: peili configure REGISTRY --mode only".into()),
            );
        }
        let is_new = report.node.as_ref().is_some_and(Node::is_2);
        if mirror.has_brackets() && !is_new {
            report.add(
                Code::Ipv6,
                format!("containerd 1.6 and 1.7 ignore a file with {} in it: their parser takes no `]` in a table's name", mirror.url()),
                Some("with them, use a name: --mirror http://localhost:5000".into()),
            );
        }
        self.settings(report);
        Ok(())
    }

    /// Whether Peili itself and containerd's configuration mean the same containerd and folders.
    fn settings(&self, report: &mut Report) {
        let Some(node) = report.node.clone() else { return };
        let folders: Vec<_> = self.lists.iter().flatten().cloned().collect();
        let shown = |folders: &[PathBuf]| {
            folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        if !self.options.config_paths.is_empty()
            && let Some(unread) = folders.iter().find(|folder| !node.config_path.contains(folder))
            && !node.config_path.is_empty()
        {
            report.add(
                Code::ConfigPath,
                format!(
                    "{}: config_path is {}, so that nothing reads {}",
                    node.config.display(),
                    shown(&node.config_path),
                    unread.display()
                ),
                Some("leave out --config-path, or change config_path and restart containerd".into()),
            );
        }
        let settings = &self.options.settings;
        if !settings.containerd {
            return;
        }
        let own: Vec<_> = settings.hosts_dirs.iter().filter_map(|folder| self.on_host(folder)).collect();
        if folders.iter().any(|folder| !own.contains(folder)) {
            report.add(
                Code::Settings,
                format!(
                    "Peili looks for hosts in {}, containerd in {}",
                    shown(&settings.hosts_dirs),
                    shown(&folders)
                ),
                Some(format!("set upstream.hosts-dirs: [{}] in Peili's configuration", shown(&folders))),
            );
        }
        if self.on_host(&settings.socket).as_ref() != Some(&node.socket) {
            report.add(
                Code::Settings,
                format!(
                    "Peili is configured for the containerd at {}, this node's is at {}",
                    settings.socket.display(),
                    node.socket.display()
                ),
                Some(format!("set store.socket: {} in Peili's configuration", node.socket.display())),
            );
        }
    }

    /// A path of Peili's configuration as the host names it: it may have the prefix.
    fn on_host(&self, path: &Path) -> Option<PathBuf> {
        match path.strip_prefix(&self.options.root) {
            Ok(below) => Some(Path::new("/").join(below)),
            Err(_) => Some(path.to_owned()),
        }
    }

    /// Where the distribution writes the folder: whether it will write Peili into it.
    fn owner(&self, report: &mut Report, is_set: bool) -> Result<(), Error> {
        let Some(node) = report.node.clone() else { return Ok(()) };
        let Some(format) = node.distribution.owner() else { return Ok(()) };
        let name = node.distribution.name();
        for target in &self.targets {
            let told = node.is_told_of(&self.root, target.name(), &self.options.mirror);
            let mut is_written = false;
            for tree in self.trees() {
                is_written |= self.journal.get(&tree.place(target)?.folder.join(FILE))?.is_some();
            }
            // Talos and Bottlerocket do not show what they were told; what is there and not written by Peili is theirs.
            if is_set
                && told.unwrap_or(!is_written && !matches!(format, super::Format::K3s | super::Format::Rke2))
            {
                continue;
            }
            let state = if told == Some(true) {
                "was told of Peili, but has not written it yet: restart it"
            } else {
                "was not told of Peili and would remove it"
            };
            report.add(
                Code::Owned,
                format!("{name} writes its folder of hosts itself, and for {} {state}", target.name()),
                Some(format!("peili configure --format {} prints what it needs", format.name())),
            );
        }
        Ok(())
    }
}

/// What the records are about; all registries if there are none.
fn recorded(records: &[Record]) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::new();
    for record in records {
        if let Ok(target) = record.target.parse()
            && !targets.contains(&target)
        {
            targets.push(target);
        }
    }
    if targets.is_empty() { vec![Target::Default] } else { targets }
}

/// Whether containerd 1.6 and 1.7 ignore this file: it has no table of hosts.
fn is_ignored(text: &str) -> bool {
    !text.trim().is_empty() && !text.contains("[host")
}
