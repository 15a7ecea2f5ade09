//! The accept loop of one address.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::clients::Client;
use super::{Handler, Limits, connection};
use crate::watchdog::{BEAT, Heart};

/// Pause after an error that the next call would meet again, so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(20);

const TOO_MANY: &str = "too many connections";
const TOO_MANY_FILES: &str = "too many open files";

pub(super) struct Accept {
    pub(super) name: &'static str,
    pub(super) slots: Arc<Semaphore>,
    pub(super) overloaded: Arc<Semaphore>,
    /// The share of those who are not this node.
    pub(super) others: Arc<Semaphore>,
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
                Ok((stream, from)) => match self.limits.admission.admits(from.ip(), self.name) {
                    Some(client) => self.take(stream, client, &mut connections),
                    // Dropped: closed.
                    None => continue,
                },
                Err(error) => refuse(&error, &listener, &mut self.spare).await,
            };
            self.report(&mut trouble, problem);
        }
        drop((listener, self.spare, self.heart.take()));
        while connections.join_next().await.is_some() {}
    }

    fn take(&self, stream: TcpStream, client: Client, connections: &mut JoinSet<()>) -> Option<&'static str> {
        // Whatever others do, this node's own come in: probes above all.
        let share = match client {
            Client::Own => None,
            Client::Other => Some(Arc::clone(&self.others).try_acquire_owned()),
        };
        let Ok(share) = share.transpose() else { return Some(TOO_MANY) };
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let overloaded = slot.is_err();
        let Ok(slot) = slot.or_else(|_| Arc::clone(&self.overloaded).try_acquire_owned()) else {
            return Some(TOO_MANY);
        };
        let (limits, handler, stop) =
            (Arc::clone(&self.limits), Arc::clone(&self.handler), self.stop.clone());
        connections.spawn(async move {
            connection::serve(stream, &limits, handler, &stop, overloaded).await;
            drop((slot, share));
        });
        overloaded.then_some(TOO_MANY)
    }

    /// Logs a change between well and not.
    fn report(&self, trouble: &mut Option<&'static str>, problem: Option<&'static str>) {
        match (*trouble, problem) {
            (None, Some(problem)) => {
                tracing::warn!(server = self.name, problem, "new connections are turned away");
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

/// Deals with an error of `accept`, and says what is wrong, if anything.
async fn refuse(error: &io::Error, listener: &TcpListener, spare: &mut Spare) -> Option<&'static str> {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => {
            let freed = spare.0.take().is_some();
            // The freed descriptor lets one connection be taken, which is closed at once. There may be none: the kernel
            // looks for a descriptor first. Then nothing is waited for, or the next one would be closed for no reason.
            let refused = freed && listener.accept().now_or_never().is_some_and(|taken| taken.is_ok());
            *spare = Spare::new();
            if freed && spare.0.is_some() {
                return refused.then_some(TOO_MANY_FILES);
            }
            TOO_MANY_FILES
        }
        Some(Errno::NOBUFS | Errno::NOMEM) => "no memory for sockets",
        _ => "accept fails",
    };
    tokio::time::sleep(PAUSE).await;
    Some(problem)
}
