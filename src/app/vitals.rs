//! Tasks without which the process is not what it seems: the one that keeps the store's view, the network's, the one
//! that tells peers what is held, the one that follows the configuration.
//!
//! None of them ends by itself; one that panicked is gone, and what it kept looks right and is not. The process then
//! is ended by the watchdog and started again.

use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::task::AbortOnDropHandle;

use crate::watchdog::{BEAT, Heart, Watchdog};

/// Looks at the tasks. Dropping it ends that.
pub(super) struct Vitals {
    parts: Arc<Mutex<Vec<Vital>>>,
    watchdog: Watchdog,
    _looks: AbortOnDropHandle<()>,
}

struct Vital {
    heart: Heart,
    is_running: Box<dyn Fn() -> bool + Send>,
    name: &'static str,
    missed: bool,
}

impl Vitals {
    /// Begins to look at what is added. Must be called within a runtime.
    pub(super) fn start(watchdog: Watchdog) -> Self {
        let parts = Arc::new(Mutex::new(Vec::<Vital>::new()));
        let looked_at = Arc::clone(&parts);
        let looks = tokio::spawn(async move {
            let mut interval = tokio::time::interval(BEAT);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                looked_at.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().for_each(Vital::look);
            }
        });
        Self { parts, watchdog, _looks: AbortOnDropHandle::new(looks) }
    }

    /// Lets the watchdog end the process, naming `name`, some seconds after `is_running` says that the task is gone.
    pub(super) fn add(&mut self, name: &'static str, is_running: impl Fn() -> bool + Send + 'static) {
        let heart = self.watchdog.heart(name);
        let vital = Vital { heart, is_running: Box::new(is_running), name, missed: false };
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).push(vital);
    }

    /// From now on tasks may end; the watchdog goes on with all else until what is returned is dropped.
    pub(super) fn end(self) -> Watchdog {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.watchdog
    }
}

impl Vital {
    fn look(&mut self) {
        if (self.is_running)() {
            self.heart.beat();
        } else if !self.missed {
            self.missed = true;
            tracing::error!(task = self.name, "a task has died; the watchdog will end the process");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// A watchdog of 50 looks a second, and what it says at the end.
    fn watchdog() -> (Watchdog, mpsc::Receiver<&'static str>) {
        let (sender, ended) = mpsc::channel();
        let watchdog = Watchdog::with(Duration::from_millis(200), move |missed| {
            let _ = sender.send(missed.name);
        });
        (watchdog.unwrap(), ended)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_task_that_panics_ends_the_process_and_one_that_ends_after_the_watch_does_not() {
        let (lives, dies) =
            (tokio::spawn(std::future::pending::<()>()), tokio::spawn(async { panic!("dies") }));
        let (watchdog, ended) = watchdog();
        let mut vitals = Vitals::start(watchdog);
        let (living, dying) = (lives.abort_handle(), dies.abort_handle());
        vitals.add("lives", move || !living.is_finished());
        assert!(ended.recv_timeout(Duration::from_secs(3)).is_err(), "all live");
        vitals.add("dies", move || !dying.is_finished());
        assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok("dies"));

        let (watchdog, ended) = self::watchdog();
        let mut vitals = Vitals::start(watchdog);
        let living = lives.abort_handle();
        vitals.add("lives", move || !living.is_finished());
        let _watchdog = vitals.end();
        lives.abort();
        assert!(ended.recv_timeout(Duration::from_secs(3)).is_err(), "it may end in a drain");
    }
}
