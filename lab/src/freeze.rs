//! Threads that stand still while the others of their process go on: what a deadlock looks like from outside.
//!
//! By ptrace, which stops single threads where a signal stops them all. One thread of this process is the tracer of all
//! that it stopped; when it ends they go on.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How often threads that ended are buried: a process is not over before its tracer has seen all its threads' ends.
const LOOK: Duration = Duration::from_millis(20);

/// Thread IDs to stop, and where to say that they stand still.
type Request = (Vec<i32>, mpsc::Sender<Result<()>>);

/// Stops threads. Dropped: they go on.
#[derive(Debug)]
pub struct Freezer {
    requests: Option<mpsc::Sender<Request>>,
    tracer: Option<JoinHandle<()>>,
}

impl Freezer {
    /// One that has stopped nothing yet.
    pub fn new() -> Result<Self> {
        let (requests, received) = mpsc::channel();
        let tracer = std::thread::Builder::new().name("tracer".into()).spawn(move || trace(&received))?;
        Ok(Self { requests: Some(requests), tracer: Some(tracer) })
    }

    /// Stops these threads; returns when they stand still.
    pub fn freeze(&self, threads: &[i32]) -> Result<()> {
        let (answer, stopped) = mpsc::channel();
        let requests = self.requests.as_ref().context("there is no tracer")?;
        requests.send((threads.to_vec(), answer)).ok().context("the tracer ended")?;
        stopped.recv().context("the tracer ended")?
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}

fn trace(requests: &mpsc::Receiver<Request>) {
    let mut frozen = Vec::new();
    loop {
        match requests.recv_timeout(LOOK) {
            Ok((threads, answer)) => {
                let result = threads.into_iter().try_for_each(|thread| {
                    let thread = Pid::from_raw(thread);
                    stop(thread).inspect(|()| frozen.push(thread))
                });
                let _ = answer.send(result);
            }
            Err(RecvTimeoutError::Timeout) => frozen.retain(|thread| !is_over(*thread)),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    for thread in frozen {
        // It may be over by now.
        let _ = ptrace::detach(thread, None);
    }
}

fn stop(thread: Pid) -> Result<()> {
    ptrace::seize(thread, ptrace::Options::empty())
        .with_context(|| format!("cannot trace thread {thread}"))?;
    ptrace::interrupt(thread)?;
    match waitpid(thread, Some(WaitPidFlag::__WALL))? {
        WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..) => Ok(()),
        other => bail!("thread {thread} does not stop: {other:?}"),
    }
}

fn is_over(thread: Pid) -> bool {
    let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
    matches!(
        waitpid(thread, Some(flags)),
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD)
    )
}
