use super::*;

const FAST: Duration = Duration::from_millis(5);

fn start() -> (Watchdog, mpsc::Receiver<Missed>) {
    let (sender, ended) = mpsc::channel();
    let watchdog = Watchdog::with(FAST, move |missed| sender.send(missed).expect("the test waits")).unwrap();
    (watchdog, ended)
}

#[test]
fn only_own_looks_without_a_change_count() {
    let hearts = Hearts::default();
    let heart = hearts.add("accept");
    let check = |looks: u32| {
        for _ in 0..looks {
            assert_eq!(hearts.tick(TICK), None);
        }
    };
    check(MISSES - 1);
    heart.beat();
    // However long the process was stopped here (SIGSTOP, suspend) and wherever the clock jumped: there was no look.
    check(MISSES);
    assert_eq!(hearts.tick(TICK), Some(Missed { name: "accept", lasted: TICK * MISSES }));
}

#[test]
fn five_seconds() {
    assert_eq!(TICK * MISSES, Duration::from_secs(5));
    let line = Missed { name: "executor", lasted: Duration::from_secs(5) }.to_string();
    insta::assert_snapshot!(line, @"peili: watchdog: `executor` has not moved for 5.0 s; exiting with code 70 to be started again");
}

#[test]
fn a_dropped_heart_is_not_missed_but_a_dead_one_is() {
    let hearts = Hearts::default();
    drop(hearts.add("stopped"));
    for _ in 0..2 * MISSES {
        assert_eq!(hearts.tick(TICK), None);
    }
    let dead = hearts.add("dead");
    let died = thread::spawn(move || {
        let _heart = dead;
        panic!("a bug in a loop");
    })
    .join();
    assert!(died.is_err());
    let missed = (0..MISSES).find_map(|_| hearts.tick(TICK));
    assert_eq!(missed.map(|missed| missed.name), Some("dead"));
}

#[test]
fn one_still_heart_among_beating_ones_is_found() {
    let (watchdog, ended) = start();
    let (beating, _still) = (watchdog.heart("beating"), watchdog.heart("still"));
    let missed = loop {
        beating.beat();
        if let Ok(missed) = ended.recv_timeout(FAST / 5) {
            break missed;
        }
    };
    assert_eq!(missed.name, "still");
}

/// Hearts of tests beat as slowly as real ones, so ticks are slower here than in the other tests.
fn runtime(workers: usize) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn a_blocked_executor_is_noticed() {
    let (sender, ended) = mpsc::channel();
    let watchdog = Watchdog::with(Duration::from_millis(100), move |missed| {
        let _ = sender.send(missed);
    })
    .unwrap();
    let runtime = runtime(2);
    let _beats = watchdog.watch_executor(runtime.handle());
    let (release, blocked) = mpsc::channel::<()>();
    let blocked = Arc::new(Mutex::new(blocked));
    for _ in 0..2 {
        let blocked = Arc::clone(&blocked);
        runtime.spawn(async move {
            let _ = blocked.lock().map(|blocked| blocked.recv());
        });
    }
    let missed = ended.recv_timeout(Duration::from_secs(20)).expect("the blocked executor is noticed");
    assert_eq!(missed.name, "executor");
    drop(release);
}

#[test]
fn an_exhausted_blocking_pool_is_not_a_hang() {
    let (sender, ended) = mpsc::channel();
    let watchdog = Watchdog::with(Duration::from_millis(100), move |missed| {
        let _ = sender.send(missed);
    })
    .unwrap();
    let runtime = runtime(2);
    let _beats = watchdog.watch_executor(runtime.handle());
    let (release, blocked) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || blocked.recv());
    let queued = runtime.spawn_blocking(|| ());
    // Twice the time in which a hang is noticed.
    assert!(ended.recv_timeout(Duration::from_secs(2)).is_err());
    assert!(!queued.is_finished());
    drop(release);
}
