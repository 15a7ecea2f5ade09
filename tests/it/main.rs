//! Integration: real `peili` programs, real containerds of every generation, in network namespaces.
//!
//! A harness of its own (libtest-mimic): each case names what it needs of the machine, and is ignored with the reason
//! where that is missing; each runs in a fresh executor within a limit. A case fails by panicking, so that the logs of
//! the processes that it started are printed while they are dropped.

#![expect(clippy::unwrap_used, reason = "a case fails by panicking")]
#![expect(clippy::print_stdout, reason = "measured times and reasons of skips are the tests' output")]
#![expect(clippy::type_complexity, reason = "tables of cases are read where they stand")]

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use peili_lab::{Requirement, require};

mod admission;
mod chart;
mod cli;
mod clients;
mod cluster;
mod configmap;
mod configure;
mod coordination;
mod doctor;
mod election;
mod faults;
mod handover;
mod image;
mod kubernetes;
mod least;
mod network;
mod policies;
mod pulls;
mod seed;
mod story;
mod strain;
mod truth;
mod zone;

/// What a case may take unless it says otherwise: it starts containerds, on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(120);
/// What runs at once, however many threads there are: each case is several processes, which wait more than they work. `--test-threads`
/// lessens it.
const AT_ONCE: usize = 3;

/// Beside whom a case may run. In this order they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Beside {
    /// All but those that measure: it lasts as long as all the others, mostly waits, and begins before them.
    All,
    /// All others of its kind: it has time.
    Others,
    /// Those that look at the clock too, and wait nearly all of their time (measured: two cores idle for nine tenths of it).
    Watchers,
    /// Nobody: it measures what the machine can do.
    Nobody,
}

/// How many of each kind run.
static MACHINE: Mutex<[usize; 4]> = Mutex::new([0; 4]);
static ENDED: Condvar = Condvar::new();

/// A place on the machine, until it is dropped.
struct Place(Beside);

/// One test.
struct Case {
    name: String,
    requirements: Vec<Requirement>,
    limit: Duration,
    beside: Beside,
    run: Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>,
}

impl Case {
    /// `run` panics if something is wrong. `name` begins with its module: `pulls::containerd_1_6`.
    fn new<F: Future<Output = ()> + 'static>(
        name: impl Into<String>,
        requirements: &[Requirement],
        run: impl FnOnce() -> F + Send + 'static,
    ) -> Self {
        let requirements = requirements.to_vec();
        let run = Box::new(|| Box::pin(run()) as Pin<Box<dyn Future<Output = ()>>>);
        Self { name: name.into(), requirements, limit: LIMIT, beside: Beside::Others, run }
    }

    /// Lets it take longer, or less long, than [`LIMIT`].
    fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Lets only a few run beside it, none of which works much: it looks at the clock.
    fn timed(mut self) -> Self {
        self.beside = Beside::Watchers;
        self
    }

    /// Lets it run from the first to the last of the others, but for those that measure.
    fn throughout(mut self) -> Self {
        self.beside = Beside::All;
        self
    }

    /// Lets no other case run at the same time: it measures.
    fn alone(mut self) -> Self {
        self.beside = Beside::Nobody;
        self
    }

    fn into_trial(self, is_wanted: impl Fn(&Trial) -> bool) -> Trial {
        let Self { name, requirements, limit, beside, run } = self;
        let missing = require(&requirements).err();
        let ignored = missing.is_some();
        let of = name.clone();
        let run = move || {
            let _place = Place::take(beside);
            let began = Instant::now();
            execute(limit, run)?;
            println!("{of} took {:.1} s", began.elapsed().as_secs_f64());
            Ok(())
        };
        let trial = Trial::test(name, run).with_ignored_flag(ignored);
        if let Some(reason) = missing.filter(|_| is_wanted(&trial)) {
            report(trial.name(), &reason);
        }
        trial
    }
}

impl Place {
    /// Waits until it may run.
    fn take(beside: Beside) -> Self {
        // A case that failed leaves nothing behind that the next one could trip over.
        let mut running = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        let may = |running: &[usize; 4]| match beside {
            Beside::All => running[Beside::Nobody as usize] == 0,
            Beside::Nobody => running.iter().all(|count| *count == 0),
            kind => {
                let all: usize = running[Beside::Others as usize..].iter().sum();
                all == running[kind as usize] && all < AT_ONCE
            }
        };
        while !may(&running) {
            running = ENDED.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        running[beside as usize] += 1;
        Self(beside)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        MACHINE.lock().unwrap_or_else(PoisonError::into_inner)[self.0 as usize] -= 1;
        ENDED.notify_all();
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One more, for the one that runs throughout.
    arguments.test_threads.get_or_insert(AT_ONCE + 1);
    let mut cases = admission::cases();
    cases.extend(chart::cases());
    cases.extend(least::cases());
    cases.extend(cli::cases());
    cases.extend(clients::cases());
    cases.extend(configmap::cases());
    cases.extend(configure::cases());
    cases.extend(coordination::cases());
    cases.extend(doctor::cases());
    cases.extend(election::cases());
    cases.extend(faults::cases());
    cases.extend(handover::cases());
    cases.extend(image::cases());
    cases.extend(kubernetes::cases());
    cases.extend(seed::cases());
    cases.extend(story::cases());
    cases.extend(strain::cases());
    cases.extend(truth::cases());
    cases.extend(zone::cases());
    cases.extend(network::cases());
    cases.extend(policies::cases());
    cases.extend(pulls::cases());
    // Of a kind those that last begin first: else the last of them is waited for by an idle machine.
    cases.sort_by_key(|case| (case.beside, std::cmp::Reverse(case.limit)));
    let is_wanted = |trial: &Trial| !arguments.list && !arguments.is_filtered_out(trial);
    let trials = cases.into_iter().map(|case| case.into_trial(is_wanted)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn execute(limit: Duration, run: impl FnOnce() -> Pin<Box<dyn Future<Output = ()>>>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut case = run();
        // The case is dropped by the panic, so that its processes show their logs then too.
        let ended = tokio::time::timeout(limit, &mut case).await;
        assert!(ended.is_ok(), "not done within {limit:?}");
    });
    Ok(())
}

/// `cargo xtask test` collects these lines; the harness itself counts the case as ignored.
fn report(name: &str, reason: &str) {
    println!("skipped: {name}: {reason}");
}
