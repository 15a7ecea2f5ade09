//! A child process: in a namespace or not, its output in a file, its signals and what it uses.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::netns::Namespace;
use crate::wait;

/// Bytes of a log that a failure shows.
const LOG_TAIL: usize = 8 << 10;

/// Clock ticks per second in `/proc`: 100 on every architecture that containerd runs on.
const USER_HZ: u64 = 100;

/// A running program. Dropped: killed; and if the thread panics, which is how a test fails, its log's end is printed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

/// What a process uses right now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Resident memory in bytes.
    pub resident: u64,
    /// Of that, what is of no file, in bytes: pages of programs are shared, and can be read again.
    pub anonymous: u64,
    /// Highest resident memory so far, in bytes.
    pub peak_resident: u64,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Time on a CPU, user and system.
    pub cpu: Duration,
}

impl Process {
    /// Starts `command` with its output appended to the file `log`.
    pub fn spawn(
        name: &str,
        mut command: Command,
        log: &Path,
        namespace: Option<&Namespace>,
    ) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log).context("cannot open the log")?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut spawn = move || command.spawn();
        let child = match namespace {
            Some(namespace) => namespace.run(spawn)?,
            None => spawn(),
        }
        .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name: name.to_owned(), log: log.to_owned() })
    }

    /// Its process ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// SIGSTOP: it hangs, and its sockets stay open.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// IDs of its threads of this name, the oldest first; without the first of all, in which a program begins.
    pub fn threads(&self, name: &str) -> Result<Vec<i32>> {
        let mut threads = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let task = task?.path();
            // It may end at any time.
            let Ok(comm) = fs::read_to_string(task.join("comm")) else { continue };
            let id = task.file_name().and_then(|id| id.to_str()?.parse().ok());
            if let Some(id) = id.filter(|id| comm.trim() == name && Ok(self.child.id()) != u32::try_from(*id))
            {
                threads.push(id);
            }
        }
        threads.sort_unstable();
        Ok(threads)
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.ended(limit).await
    }

    /// Waits for its end.
    pub async fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        wait::until(&what, limit, async || child.try_wait().transpose()).await?.map_err(Into::into)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last 8 KiB of the log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let start = log.len().saturating_sub(LOG_TAIL);
        let start = (start..log.len()).find(|&at| log.is_char_boundary(at)).unwrap_or(log.len());
        log[start..].to_owned()
    }

    /// What it uses right now, from `/proc`.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.child.id())
    }
}

impl Drop for Process {
    #[expect(clippy::print_stderr, reason = "a failing test shows why")]
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}--- end of the log of {}", self.name, self.log_tail(), self.name);
        }
    }
}

/// What the process `pid` uses right now, from `/proc`.
pub fn usage(pid: u32) -> Result<Usage> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let status = fs::read_to_string(folder.join("status")).context("the process is gone")?;
    let number = |key: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
    };
    let stat = fs::read_to_string(folder.join("stat"))?;
    // proc(5): after the name in parentheses, fields 14 and 15 are user and system time in clock ticks.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Usage {
        resident: number("VmRSS:").unwrap_or(0) << 10,
        anonymous: number("RssAnon:").unwrap_or(0) << 10,
        peak_resident: number("VmHWM:").unwrap_or(0) << 10,
        descriptors: fs::read_dir(folder.join("fd"))?.count(),
        threads: number("Threads:").and_then(|count| count.try_into().ok()).unwrap_or(0),
        cpu: Duration::from_millis(ticks * 1000 / USER_HZ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[tokio::test]
    async fn a_child_is_logged_measured_and_ended() {
        let scratch = Scratch::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo hello; exec sleep 60"]);
        let mut process = Process::spawn("sh", command, &scratch.path().join("log"), None).unwrap();
        wait::until("the log", Duration::from_secs(5), async || {
            process.log().contains("hello").then_some(())
        })
        .await
        .unwrap();
        let usage = process.usage().unwrap();
        assert!(usage.resident > 0 && usage.threads == 1 && usage.descriptors >= 3, "{usage:?}");
        assert!(process.is_running());
        process.terminate(Duration::from_secs(5)).await.unwrap();
        assert!(!process.is_running());
    }
}
