//! Where components are compiled: on a thread of its own that gives way to all others. One at a time, since whoever loads
//! policies holds their lock.

use std::io;
use std::thread;

use rustix::process::{getpriority_process, setpriority_process};

/// How much it gives way: where all processors are busy, it gets about a quarter of one.
const NICE: i32 = 5;

/// Does `work` there and waits for it; `None`: it panicked.
///
/// # Errors
/// There is no thread.
pub(super) fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<Option<T>> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("policy-compiler".into()).spawn_scoped(scope, || {
            // Of this thread alone; where it may not, it compiles all the same.
            let own = getpriority_process(None).unwrap_or(0);
            let _ = setpriority_process(None, own.max(NICE));
            work()
        })?;
        Ok(thread.join().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_way_and_who_waits_for_it_does_not() {
        let before = getpriority_process(None).unwrap();
        let there = aside(|| getpriority_process(None).unwrap()).unwrap();
        assert_eq!(there, Some(NICE.max(before)));
        assert_eq!(getpriority_process(None).unwrap(), before);
        assert!(aside(|| -> () { panic!("a fault of the compiler") }).unwrap().is_none());
    }
}
