//! The accept loop of one address.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Handler, Limits, connection};
use crate::watchdog::{BEAT, Heart};

/// Pause after an error that the next call would meet again, so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(20);

pub(super) struct Accept {
    pub(super) name: &'static str,
    pub(super) slots: Arc<Semaphore>,
    pub(super) limits: Arc<Limits>,
    pub(super) handler: Handler,
    pub(super) stop: CancellationToken,
    pub(super) heart: Option<Heart>,
    pub(super) spare: Spare,
}

/// A descriptor held back, so that connections can still be taken and closed when there is none left: a client that
/// is closed goes to its next host, one that waits in the backlog hangs.
pub(super) struct Spare(Option<File>);

impl Accept {
    /// Ends when stopped and all connections have ended.
    pub(super) async fn run(mut self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut trouble = None;
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                _ = beats.tick() => {
                    if let Some(heart) = &self.heart {
                        heart.beat();
                    }
                    continue;
                }
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let problem = match accepted {
                Ok((stream, _)) => self.take(stream, &mut connections),
                Err(error) => Some(refuse(&error, &listener, &mut self.spare).await),
            };
            self.report(&mut trouble, problem);
        }
        drop((listener, self.spare, self.heart.take()));
        while connections.join_next().await.is_some() {}
    }

    fn take(&self, stream: TcpStream, connections: &mut JoinSet<()>) -> Option<&'static str> {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            return Some("too many connections");
        };
        let (limits, handler, stop) =
            (Arc::clone(&self.limits), Arc::clone(&self.handler), self.stop.clone());
        connections.spawn(async move {
            connection::serve(stream, &limits, handler, &stop).await;
            drop(slot);
        });
        None
    }

    /// Logs a change between well and not.
    fn report(&self, trouble: &mut Option<&'static str>, problem: Option<&'static str>) {
        match (*trouble, problem) {
            (None, Some(problem)) => {
                tracing::warn!(server = self.name, problem, "new connections are closed");
            }
            (Some(_), None) => tracing::info!(server = self.name, "connections are accepted again"),
            _ => {}
        }
        *trouble = problem;
    }
}

impl Spare {
    pub(super) fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }
}

/// Deals with an error of `accept`, and says what is wrong.
async fn refuse(error: &io::Error, listener: &TcpListener, spare: &mut Spare) -> &'static str {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => {
            if spare.0.take().is_some() {
                // The freed descriptor lets one connection be taken, which is closed at once.
                let _ = tokio::time::timeout(PAUSE, listener.accept()).await;
            }
            *spare = Spare::new();
            "too many open files"
        }
        Some(Errno::NOBUFS | Errno::NOMEM) => "no memory for sockets",
        _ => "accept fails",
    };
    if spare.0.is_none() || problem != "too many open files" {
        tokio::time::sleep(PAUSE).await;
    }
    problem
}
