//! wasmtime: compiles components, keeps configured instances warm, and calls them within bounds of time and memory.
//!
//! Nothing of wasmtime leaves this module. A call runs on the thread of who asks and is ended by the epoch: a thread of its
//! own counts milliseconds, and only while calls run. Instances are thrown away after a trap, after many calls and where
//! they have grown. No code is loaded but what was compiled here from the component.

mod compiler;
mod embedded;
mod host;
mod inspect;
mod noop;
mod profile;
mod ticker;
mod v0_1;
mod wasi;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use wasmtime::component::{Component, Linker};
use wasmtime::{Store, Trap};

use self::host::{Host, Voice};
use self::ticker::Ticker;
use self::v0_1::Unconfigured;
use super::chain::Answers;
use super::election::Election;
use super::registry::Registry;
use super::trust::Trust;
use super::world::World;
use super::{Failure, Limits, Node};

pub use embedded::{EMBEDDED_LIMIT, Embedded};
pub(super) use inspect::Unfit;
pub use inspect::{Facts, SIZE_LIMIT, facts, world};
pub use noop::Noop;
pub(super) use profile::{Bound, Code};
pub(super) use v0_1::Abi;

/// The stack, which the profile of rankings names.
#[cfg(test)]
pub(super) const STACK: usize = profile::STACK;
/// How long the first `configure` may take, on a machine that is busy.
const CONFIGURE: Duration = Duration::from_secs(1);
/// How long a new instance may take, since one is made while a request waits: half of what that has.
const READY: Duration = Duration::from_millis(5);
/// Instances that are made at first, to see how long it takes.
const FIRST: usize = 3;
/// Instances of one policy that are kept between calls: as many as ask at once.
const WARM: usize = 16;
/// Calls after which an instance is replaced, so that what it gathers is bounded.
const CALLS: u32 = 10_000;

/// The engine, and what all components have in common.
pub(super) struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<Host>,
    ticker: Ticker,
    bound: Bound,
    pace: u32,
}

/// A component that was compiled.
pub(super) struct Compiled<W: Abi> {
    pre: W::Pre,
}

impl<W: Abi> Clone for Compiled<W> {
    fn clone(&self) -> Self {
        Self { pre: self.pre.clone() }
    }
}

/// What a policy is made with beside its component, the same for each of its instances.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub(super) name: Arc<str>,
    pub(super) settings: String,
    pub(super) data: Files,
    pub(super) limits: Limits,
}

/// What the operator's files have, by the names that the policy knows.
pub(super) type Files = Arc<BTreeMap<String, Arc<[u8]>>>;

/// What is said once a policy is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Info {
    /// One line, escaped.
    pub(super) summary: String,
}

/// Why a policy cannot be configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It does not like its settings: pointers and messages, escaped.
    Settings(Vec<(String, String)>),
    /// What an instance takes to be ready, and what it may.
    Slow(Duration, Duration),
    /// What it keeps leaves it no memory.
    Large,
    /// It needs what this host has not got.
    Requires(String),
    Failed(Failure),
}

/// A configured policy.
pub(super) struct Policy<W: Abi> {
    engine: Arc<Engine>,
    compiled: Compiled<W>,
    voice: Arc<Voice>,
    given: Given,
    /// `None`: it is not told.
    here: Option<v0_1::Node>,
    warm: Mutex<Vec<Instance<W>>>,
    /// The most memory of an instance that was used once, in bytes.
    used: AtomicUsize,
}

struct Instance<W: Abi> {
    store: Store<Host>,
    exports: W::Exports,
    calls: u32,
}

impl Engine {
    /// The engine of the worlds with this bound.
    pub(super) fn new(code: Code, bound: Bound) -> Result<Self, String> {
        let engine = profile::engine(code, bound).map_err(|error| format!("{error:#}"))?;
        let mut linker = Linker::new(&engine);
        v0_1::add_to_linker(&mut linker).map_err(|error| format!("{error:#}"))?;
        let ticker = Ticker::start(engine.clone()).map_err(|error| format!("no thread: {error}"))?;
        Ok(Self { engine, linker, ticker, bound, pace: code.pace() })
    }

    /// How many times as long as machine code its policies may take.
    pub(super) fn pace(&self) -> u32 {
        self.pace
    }

    /// Compiles a component, which may take a second for a large one; see [`compiler`].
    pub(super) fn compile<W: Abi>(&self, bytes: &[u8]) -> Result<Compiled<W>, Unfit> {
        inspect::check(bytes)?;
        let compiled = compiler::aside(|| Component::new(&self.engine, bytes))
            .map_err(|error| Unfit::Compile(format!("no thread: {error}")))?;
        let component = compiled
            .unwrap_or_else(|| Err(wasmtime::Error::msg("the compiler failed")))
            .map_err(|error| Unfit::Compile(format!("{error:#}")))?;
        inspect::check_world(&self.engine, &component, W::NAME)?;
        let mut linker = self.linker.clone();
        // Those of wasm32-wasip2, whose standard library names them also where nothing uses them.
        wasi::add_to_linker(&self.engine, &component, &mut linker)
            .map_err(|error| Unfit::Compile(format!("{error:#}")))?;
        let pre = linker.instantiate_pre(&component).and_then(W::pre);
        Ok(Compiled { pre: pre.map_err(|error| Unfit::World(format!("{error:#}")))? })
    }
}

impl<W: Abi> Policy<W> {
    /// Configures a component, and keeps the instance.
    pub(super) fn configure(
        engine: Arc<Engine>,
        compiled: Compiled<W>,
        given: Given,
        here: &Node,
    ) -> Result<(Self, Info), Refused> {
        let half = given.limits.time.map_or(READY, |time| time / 2);
        let ready = half.min(READY) * engine.pace;
        let policy = Self::new(engine, compiled, given, here);
        let (mut least, mut said) = (Duration::MAX, None);
        for _ in 0..FIRST {
            let began = Instant::now();
            let (instance, info) = policy.instance(began + CONFIGURE, W::fuel(None))?;
            least = least.min(began.elapsed());
            if instance.store.data().is_large() {
                return Err(Refused::Large);
            }
            policy.keep(instance);
            said = Some(info);
        }
        match said {
            Some(info) if least <= ready => Ok((policy, info)),
            _ => Err(Refused::Slow(least, ready)),
        }
    }

    /// For a case, of which there are many: one instance, however long it takes.
    pub(super) fn once(
        engine: Arc<Engine>,
        compiled: Compiled<W>,
        given: Given,
        here: &Node,
    ) -> Result<Self, Refused> {
        let policy = Self::new(engine, compiled, given, here);
        let (instance, _) = policy.instance(Instant::now() + CONFIGURE, W::fuel(None))?;
        policy.keep(instance);
        Ok(policy)
    }

    fn new(engine: Arc<Engine>, compiled: Compiled<W>, given: Given, here: &Node) -> Self {
        let voice = Arc::new(Voice::new(Arc::clone(&given.name), given.limits.log));
        let here = (!W::IS_COMMON).then(|| here.into());
        Self { engine, compiled, voice, given, here, warm: Mutex::default(), used: AtomicUsize::new(0) }
    }

    /// How many times as long as machine code it may take.
    pub(super) fn pace(&self) -> u32 {
        self.engine.pace
    }

    /// A new instance, configured. `fuel`: for that and what follows.
    fn instance(&self, deadline: Instant, fuel: u64) -> Result<(Instance<W>, Info), Refused> {
        let _running = self.engine.ticker.run();
        let Given { settings, data, limits, .. } = &self.given;
        let host = Host::new(Arc::clone(&self.voice), bytes(limits.memory), Arc::clone(data));
        let mut store = Store::new(&self.engine.engine, host);
        store.limiter(|host| host);
        store.set_hostcall_fuel(bytes(limits.verdict));
        store.epoch_deadline_trap();
        self.engine.ticker.limit(&mut store, deadline);
        let is_counted = self.engine.bound == Bound::Fuel;
        let make = || -> Result<_, wasmtime::Error> {
            if is_counted {
                store.set_fuel(fuel)?;
            }
            let exports = W::instantiate(&self.compiled.pre, &mut store)?;
            let info = W::configure(&exports, &mut store, settings, self.here.as_ref())?;
            Ok((exports, info))
        };
        let made = catch_unwind(AssertUnwindSafe(make));
        match made.unwrap_or_else(|_| Err(wasmtime::Error::msg("the host failed"))) {
            Ok((exports, Ok(info))) => Ok((Instance { store, exports, calls: 0 }, info)),
            Ok((_, Err(Unconfigured::Settings(errors)))) => Err(Refused::Settings(errors)),
            Ok((_, Err(Unconfigured::Requires(feature)))) => Err(Refused::Requires(feature)),
            Err(error) => Err(Refused::Failed(failure(&error, store.data()))),
        }
    }

    fn take(&self) -> Option<Instance<W>> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn keep(&self, instance: Instance<W>) {
        if W::IS_COMMON {
            self.used.fetch_max(instance.store.data().memory(), Ordering::Relaxed);
            return;
        }
        if instance.calls >= CALLS || instance.store.data().is_large() {
            return;
        }
        let mut warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner);
        if warm.len() < WARM {
            warm.push(instance);
        }
    }
}

impl<W: Abi> Answers<W> for Policy<W> {
    fn decide(&self, request: &W::Request, deadline: Instant) -> Result<W::Verdict, Failure> {
        let mut instance = match self.take() {
            Some(instance) => instance,
            None if Instant::now() >= deadline => return Err(Failure::Time),
            None => match self.instance(deadline, W::fuel(Some(request))) {
                Ok((instance, _)) => instance,
                Err(Refused::Failed(failure)) => return Err(failure),
                // It took them before, so it is not what it was.
                Err(_) => return Err(Failure::Trap("it refuses the settings that it had taken".into())),
            },
        };
        let asked = W::request(request);
        let called = {
            let _running = self.engine.ticker.run();
            if !self.engine.ticker.limit(&mut instance.store, deadline) {
                self.keep(instance);
                return Err(Failure::Time);
            }
            instance.store.data_mut().begin();
            instance.calls += 1;
            let Instance { store, exports, .. } = &mut instance;
            catch_unwind(AssertUnwindSafe(|| W::ask(exports, store, &asked)))
        };
        match called.unwrap_or_else(|_| Err(wasmtime::Error::msg("the host failed"))) {
            Ok(verdict) => {
                let checked = verdict.and_then(|verdict| W::check(request, &verdict).map(|()| verdict));
                let verdict = checked.map_err(Failure::Invalid);
                self.keep(instance);
                verdict
            }
            Err(error) => Err(failure(&error, instance.store.data())),
        }
    }

    fn cool(&self) -> usize {
        let warm = std::mem::take(&mut *self.warm.lock().unwrap_or_else(PoisonError::into_inner));
        let kept = warm.iter().map(|instance| instance.store.data().memory()).max();
        kept.unwrap_or(0).max(self.used.swap(0, Ordering::Relaxed))
    }
}

/// How long the compiler takes for a component, and nothing else that loading does.
///
/// # Errors
/// It is of no world, or cannot be compiled here.
pub fn compile_time(bytes: &[u8]) -> Result<Duration, String> {
    fn compiled<W: Abi>(bytes: &[u8], bound: Bound) -> Result<Duration, String> {
        let engine = Engine::new(Code::here(), bound)?;
        let began = Instant::now();
        engine.compile::<W>(bytes).map(|_| began.elapsed()).map_err(|unfit| unfit.to_string())
    }
    match world(bytes) {
        Some(Registry::NAME) => compiled::<Registry>(bytes, Bound::Time),
        Some(Trust::NAME) => compiled::<Trust>(bytes, Bound::Time),
        Some(Election::NAME) => compiled::<Election>(bytes, Bound::Fuel),
        _ => Err("it is of no world".into()),
    }
}

/// Limits are far below what an address space has.
fn bytes(limit: ByteSize) -> usize {
    usize::try_from(limit.as_u64()).unwrap_or(usize::MAX)
}

fn failure(error: &wasmtime::Error, host: &Host) -> Failure {
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Failure::Time,
        Some(Trap::OutOfFuel) => Failure::Fuel,
        Some(Trap::StackOverflow) => Failure::Stack,
        _ if host.was_refused() => Failure::Memory,
        Some(trap) => Failure::Trap(trap.to_string()),
        None => Failure::Trap(super::text::clean(&format!("{error:#}"), 256)),
    }
}
