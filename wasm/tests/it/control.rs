//! Signals, pause, deadlines, statistics.

use std::time::{Duration, Instant};

use bulkhead_wasm::{Container, ContainerConfig, Reason, Status};

use crate::support::*;

const LOOP: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;

/// Sleeps an hour in the host, by poll_oneoff.
const SLEEP: &str = r#"(module
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const 3600000000000))
    (drop (call $poll (i32.const 0) (i32.const 512) (i32.const 1) (i32.const 1024)))))"#;

/// Reads standard input for ever.
const READER: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read"
    (func $read (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 4) (i32.const 100))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))))"#;

fn start(config: ContainerConfig) -> Container {
    let container = pod().create(config).expect("created");
    container.start().expect("started");
    container
}

/// Waits until it has used some CPU time, which shows that it executes.
fn until_busy(container: &Container) {
    let begin = container.stats().cpu;
    let deadline = Instant::now() + PATIENCE;
    while container.stats().cpu < begin + Duration::from_millis(5) {
        assert!(Instant::now() < deadline, "does not execute");
        std::thread::yield_now();
    }
}

#[test]
fn an_endless_loop_is_killed_at_once() {
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let container = start(container(LOOP));
            until_busy(&container);
            let begin = Instant::now();
            container.signal(9).expect("signalled");
            let exit = wait(&container);
            assert_eq!((exit.code, exit.reason), (137, Reason::Signal(9)));
            begin.elapsed()
        })
        .collect();
    times.sort();
    // The median: other tests may hold the processors for longer than we are measured by.
    assert!(times[2] < Duration::from_millis(20), "{times:?}");
}

#[test]
fn waiting_programs_are_killed_too() {
    for (signal, code) in [(9, 137), (15, 143), (1, 129)] {
        let sleeper = start(container(SLEEP));
        sleeper.signal(signal).expect("signalled");
        assert_eq!(wait(&sleeper).code, code);
    }
    let (reader, _writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe");
    let mut config = container(READER);
    config.stdin = bulkhead_wasm::Stdio::Fd(reader);
    let waiting = start(config);
    waiting.signal(15).expect("signalled");
    assert_eq!(wait(&waiting).reason, Reason::Signal(15));
    assert!(waiting.signal(15).is_err(), "it has ended");
}

#[test]
fn deadlines_end_loops_and_sleepers() {
    for program in [LOOP, SLEEP] {
        let mut config = container(program);
        config.deadline = Some(Duration::from_millis(200));
        let begin = Instant::now();
        let exit = run(config);
        assert_eq!((exit.code, exit.reason), (137, Reason::Deadline));
        assert!(begin.elapsed() >= Duration::from_millis(200));
    }
}

#[test]
fn a_paused_program_executes_nothing() {
    let container = start(container(LOOP));
    until_busy(&container);
    container.pause().expect("paused");
    assert_eq!(container.status(), Status::Paused);
    // It stops within a tick or two; then its clock must stand still.
    let mut last = container.stats().cpu;
    let deadline = Instant::now() + PATIENCE;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = container.stats().cpu;
        if now == last {
            break;
        }
        last = now;
        assert!(Instant::now() < deadline, "still executes");
    }
    container.resume().expect("resumed");
    until_busy(&container);
    container.pause().expect("paused");
    container.signal(9).expect("signalled");
    assert_eq!(wait(&container).code, 137, "paused programs can be killed");
}

#[test]
fn a_cpu_share_is_kept() {
    let mut config = container(LOOP);
    config.cpu_milli = Some(200);
    let container = start(config);
    until_busy(&container);
    let (begin, cpu) = (Instant::now(), container.stats().cpu);
    std::thread::sleep(Duration::from_secs(2));
    let used = container.stats().cpu - cpu;
    let share = used.as_secs_f64() / begin.elapsed().as_secs_f64();
    container.signal(9).expect("signalled");
    wait(&container);
    assert!(share < 0.35, "{share}");
}

#[test]
fn statistics_tell_memory() {
    let wat = r#"(module
      (import "wasi_snapshot_preview1" "poll_oneoff"
        (func $poll (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 3)
      (func (export "_start")
        (drop (memory.grow (i32.const 5)))
        (i32.store (i32.const 16) (i32.const 1))
        (i64.store (i32.const 24) (i64.const 3600000000000))
        (drop (call $poll (i32.const 0) (i32.const 512) (i32.const 1) (i32.const 1024)))))"#;
    let container = start(container(wat));
    let deadline = Instant::now() + PATIENCE;
    while container.stats().memory_bytes < 8 << 16 {
        assert!(Instant::now() < deadline, "{:?}", container.stats());
        std::thread::yield_now();
    }
    let stats = container.stats();
    assert_eq!((stats.memory_bytes, stats.instances), (8 << 16, 1));
    container.signal(9).expect("signalled");
    wait(&container);
    let stats = container.stats();
    assert_eq!((stats.memory_bytes, stats.instances), (0, 0));
    assert_eq!(stats.memory_peak_bytes, 8 << 16);
}

#[test]
fn states_are_told() {
    let pod = pod();
    let container = pod.create(container(&exit(3))).expect("created");
    assert_eq!(container.status(), Status::Created);
    assert!(container.wait().is_err() && container.signal(9).is_err());
    container.start().expect("started");
    assert_eq!(container.wait().expect("ends").code, 3);
    assert_eq!(container.status(), Status::Stopped);
    assert!(container.start().is_err());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    assert_eq!(runtime.block_on(container.ended()).code, 3);
}
