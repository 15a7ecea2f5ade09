//! Writes the decision log on a thread of its own: one line each, in a file and the one before it, of bounded size.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, fchmod, open};

use super::{Job, LINE_LIMIT};
use crate::policy::metrics::Recorded;

/// How soon a file that could not be opened or written is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// Bytes that are gathered before they are written, while more wait.
const BATCH: u64 = 64 << 10;
/// Only who runs the node may read which images it asks for.
const OWNER: Mode = Mode::RUSR.union(Mode::WUSR);

/// The file that is written to now.
struct Open {
    file: File,
    size: u64,
}

struct Writer<'a> {
    path: PathBuf,
    /// Of one file: half of what both may have.
    limit: u64,
    open: Option<Open>,
    /// Whole lines that are not written yet, and how many they are.
    batch: Vec<u8>,
    lines: u64,
    retry: Option<Instant>,
    counted: &'a Recorded,
    problem: &'a Mutex<Option<String>>,
}

/// Writes what comes until nobody can send any more. `limit`: of both files, in bytes.
pub(super) fn run(
    jobs: &Receiver<Job>,
    path: PathBuf,
    limit: u64,
    counted: &Recorded,
    problem: &Mutex<Option<String>>,
) {
    let mut writer = Writer {
        path,
        limit: limit / 2,
        open: None,
        batch: Vec::new(),
        lines: 0,
        retry: None,
        counted,
        problem,
    };
    // That it cannot be written is known before there is anything to write.
    writer.write();
    while let Ok(job) = jobs.recv() {
        writer.add(job);
        while let Ok(job) = jobs.try_recv() {
            writer.add(job);
        }
        writer.write();
    }
}

impl Writer<'_> {
    fn add(&mut self, job: Job) {
        let record = job();
        let line = serde_json::to_vec(&record).unwrap_or_default();
        if line.is_empty() || line.len() >= LINE_LIMIT {
            self.counted.dropped.inc();
            return;
        }
        self.batch.extend(line);
        self.batch.push(b'\n');
        self.lines += 1;
        if self.batch.len() as u64 >= self.limit.min(BATCH) {
            self.write();
        }
    }

    /// Writes the batch, or drops it.
    fn write(&mut self) {
        let now = Instant::now();
        let result =
            if self.retry.is_some_and(|at| now < at) { Err(None) } else { self.try_write().map_err(Some) };
        match result {
            Ok(()) => {
                self.retry = None;
                self.counted.written.inc_by(self.lines);
                set(self.problem, None);
            }
            Err(error) => {
                self.counted.dropped.inc_by(self.lines);
                if let Some(error) = error {
                    self.open = None;
                    self.retry = Some(now + RETRY);
                    set(self.problem, Some(format!("{}: {error}", self.path.display())));
                }
            }
        }
        self.batch.clear();
        self.lines = 0;
    }

    fn try_write(&mut self) -> io::Result<()> {
        let size = self.batch.len() as u64;
        let mut current = match self.open.take() {
            Some(open) => open,
            None => Open::at(&self.path)?,
        };
        // It was deleted, or moved by somebody who keeps logs.
        if !current.is_at(&self.path)? {
            current = Open::at(&self.path)?;
        }
        if current.size > 0 && current.size + size > self.limit {
            let before = before(&self.path);
            if before.symlink_metadata().is_ok() {
                check(&File::from(open(&before, OFlags::RDONLY | FLAGS, Mode::empty())?))?;
            }
            std::fs::rename(&self.path, before)?;
            current = Open::at(&self.path)?;
        }
        current.file.write_all(&self.batch)?;
        current.size += size;
        self.open = Some(current);
        Ok(())
    }
}

/// A pipe in its place is not waited for, and a link is not followed to what is not a log.
const FLAGS: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);
/// How each line begins.
const BEGINS: &[u8] = br#"{"time":"#;

/// Whether a file is one of these logs: what an operator names by mistake is left as it is.
fn check(file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return wrong("it is not a regular file");
    }
    let mut head = [0; BEGINS.len()];
    let length = file.read_at(&mut head, 0)?;
    if head[..length] == BEGINS[..length] {
        Ok(())
    } else {
        wrong("it is no decision log; it is left as it is")
    }
}

impl Open {
    /// Whether the path still leads to it.
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let own = self.file.metadata()?;
        Ok(path.symlink_metadata().is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())))
    }

    fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | FLAGS;
        let file = File::from(open(path, flags, OWNER)?);
        check(&file)?;
        let metadata = file.metadata()?;
        fchmod(&file, OWNER)?;
        let mut open = Self { file, size: metadata.len() };
        open.end_line()?;
        Ok(open)
    }

    /// What a process that was killed left in mid-line does not spoil the next.
    fn end_line(&mut self) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let mut last = [0];
        if self.size > 0 && self.file.read_at(&mut last, self.size - 1)? == 1 && last != *b"\n" {
            self.file.write_all(b"\n")?;
            self.size += 1;
        }
        Ok(())
    }
}

/// Where the full file goes.
fn before(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Says once that something is wrong, and once that it is well again.
pub(super) fn set(problem: &Mutex<Option<String>>, text: Option<String>) {
    let mut problem = problem.lock().unwrap_or_else(PoisonError::into_inner);
    if *problem == text {
        return;
    }
    match &text {
        Some(problem) => tracing::warn!(problem, "decisions are not recorded"),
        None => tracing::info!("decisions are recorded again"),
    }
    *problem = text;
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::policy::cases::{Asked, Who};
    use crate::policy::record::Record;

    fn record(image: &str) -> Record {
        Record {
            time: Some(std::time::SystemTime::UNIX_EPOCH),
            generation: 1,
            world: "registry".into(),
            here: Who::default(),
            request: Asked::parse(&format!("{{image: {image}}}")).unwrap(),
            ruling: "mirror".into(),
            by: None,
            said: Vec::new(),
        }
    }

    /// Lets the records be written; the counters and the problem.
    fn written(path: &Path, limit: u64, records: Vec<Record>) -> (Recorded, Option<String>) {
        let (jobs, received) = sync_channel::<Job>(records.len() + 1);
        for record in records {
            jobs.try_send(Box::new(move || record)).map_err(|_| "full").unwrap();
        }
        drop(jobs);
        let (counted, problem) = (Recorded::default(), Mutex::default());
        run(&received, path.to_owned(), limit, &counted, &problem);
        let problem = problem.into_inner().unwrap();
        (counted, problem)
    }

    #[test]
    fn lines_are_read_as_they_were_and_are_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decisions.jsonl");
        // Of somebody who was killed, and of somebody who let others read.
        fs::write(&path, "{\"time\"").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let (counted, problem) = written(&path, 1 << 20, vec![record("nginx:1"), record("nginx:2")]);
        assert_eq!((counted.written.get(), counted.dropped.get(), problem), (2, 0, None));
        let text = fs::read_to_string(&path).unwrap();
        let records: Vec<_> = text.lines().map(Record::parse).collect();
        assert!(records[0].is_err() && records.len() == 3, "{text}");
        let images: Vec<_> =
            records[1..].iter().map(|record| record.as_ref().unwrap().request.subject()).collect();
        assert_eq!(images, ["nginx:1", "nginx:2"]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    /// Guards that a log does not fill a disk.
    #[test]
    fn both_files_are_within_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decisions.jsonl");
        for number in 0..50 {
            written(&path, 4000, vec![record(&format!("nginx:{number}"))]);
        }
        let size = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(
            size(&path) <= 2000 && size(&before(&path)) <= 2000,
            "{} {}",
            size(&path),
            size(&before(&path))
        );
        let text = fs::read_to_string(before(&path)).unwrap() + &fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() > 10 && text.lines().last().unwrap().contains("nginx:49"), "{text}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    /// Guards that nothing else is written over, and that nobody waits for a pipe.
    #[test]
    fn what_is_no_log_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, "precious").unwrap();
        let path = dir.path().join("decisions.jsonl");
        symlink(&other, &path).unwrap();
        let (counted, problem) = written(&path, 1 << 20, vec![record("nginx:1")]);
        assert_eq!((counted.written.get(), counted.dropped.get()), (0, 1));
        assert!(problem.unwrap().contains("decisions.jsonl: "));
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
        // A link is none, wherever it leads: what is empty could be the beginning of a log.
        fs::write(&other, "").unwrap();
        let (counted, _) = written(&path, 1 << 20, vec![record("nginx:1")]);
        assert_eq!((counted.written.get(), counted.dropped.get()), (0, 1));
        assert_eq!(fs::read_to_string(&other).unwrap(), "");

        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, OWNER, 0).unwrap();
        let (_, problem) = written(&path, 1 << 20, vec![record("nginx:1")]);
        assert!(problem.unwrap().contains("not a regular file"));

        // A path of another file, by mistake; and of one in whose place the full log would go.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "policies: {}").unwrap();
        let (counted, problem) = written(&path, 1 << 20, vec![record("nginx:1")]);
        assert_eq!((counted.written.get(), counted.dropped.get()), (0, 1));
        assert!(problem.unwrap().contains("no decision log"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "policies: {}");
    }

    /// Guards that what is written is where the path leads, whoever moves logs about.
    #[test]
    fn a_log_that_is_taken_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decisions.jsonl");
        let (jobs, taken) = std::sync::mpsc::channel::<Job>();
        let counted = Recorded::default();
        let problem = Mutex::new(None);
        std::thread::scope(|scope| {
            let (own, counted, problem) = (path.clone(), &counted, &problem);
            scope.spawn(move || run(&taken, own, 1 << 20, counted, problem));
            let write = |number: u64| {
                jobs.send(Box::new(|| record("nginx:1"))).unwrap();
                let start = Instant::now();
                while counted.written.get() < number && start.elapsed() < Duration::from_secs(10) {
                    std::thread::yield_now();
                }
            };
            write(1);
            fs::rename(&path, dir.path().join("kept")).unwrap();
            write(2);
            assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
            drop(jobs);
        });
    }

    #[test]
    fn a_line_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("decisions.jsonl");
        let long = Record { ruling: "x".repeat(LINE_LIMIT), ..record("nginx:1") };
        let (counted, _) = written(&path, 1 << 20, vec![long]);
        assert_eq!((counted.written.get(), counted.dropped.get()), (0, 1));
    }
}
