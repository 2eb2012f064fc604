//! Programs that want to harm. Each runs beside a neighbour in another pod that must not notice.

use std::io::Read;
use std::time::{Duration, Instant};

use bulkhead_wasm::{
    Container, ContainerConfig, Engine, EngineConfig, Pod, PodConfig, Reason, Source, WasmError,
};

use crate::support::*;

const LOOP: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;

/// A neighbour still gets its work done.
fn neighbour() {
    let (exit, text) = run_output(container(&print("fine\n", 3)));
    assert_eq!((exit.code, text.as_str()), (0, "fine\nfine\nfine\n"));
}

#[test]
fn memory_bomb() {
    // Grows page by page and gives up when it gets no more.
    let wat = r#"(module (memory (export "memory") 1)
      (func (export "_start")
        (loop $l
          (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))
          (br $l))))"#;
    let mut config = container(wat);
    config.memory_bytes = Some(8 << 20);
    let pod = pod();
    let bomb = pod.create(config).expect("created");
    bomb.start().expect("started");
    let exit = wait(&bomb);
    assert_eq!(
        (exit.code, exit.reason),
        (137, Reason::OutOfMemory),
        "{exit:?}"
    );
    let stats = bomb.stats();
    assert!(stats.memory_peak_bytes <= 8 << 20, "{stats:?}");
    assert!(stats.memory_refused > 0, "{stats:?}");
    assert_eq!(pod.memory().used(), 0);
    // Asks for too much from the beginning.
    let mut config = container(r#"(module (memory 1000) (func (export "_start")))"#);
    config.memory_bytes = Some(8 << 20);
    assert_eq!(run(config).reason, Reason::OutOfMemory);
    // One that lives with the refusal is no victim.
    let wat =
        r#"(module (memory 1) (func (export "_start") (drop (memory.grow (i32.const 60000)))))"#;
    let mut config = container(wat);
    config.memory_bytes = Some(8 << 20);
    let exit = run(config);
    assert_eq!((exit.code, exit.reason), (0, Reason::Exited));
    neighbour();
}

#[test]
fn the_pod_is_the_limit_of_all_its_programs() {
    let sleeper = r#"(module
      (import "wasi_snapshot_preview1" "poll_oneoff"
        (func $poll (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 100)
      (func (export "_start")
        (i32.store (i32.const 16) (i32.const 1))
        (i64.store (i32.const 24) (i64.const 3600000000000))
        (drop (call $poll (i32.const 0) (i32.const 512) (i32.const 1) (i32.const 1024)))))"#;
    let pod = Pod::new(
        &ENGINE,
        PodConfig {
            memory_bytes: Some(10 << 20),
            ..PodConfig::default()
        },
    );
    let start = || {
        let container = pod.create(container(sleeper)).expect("created");
        container.start().expect("started");
        container
    };
    let one = start();
    let deadline = Instant::now() + PATIENCE;
    while one.stats().memory_bytes == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let two = start();
    assert_eq!(wait(&two).reason, Reason::OutOfMemory);
    one.signal(9).expect("signalled");
    assert_eq!(wait(&one).code, 137);
    assert_eq!(pod.memory().used(), 0);
}

#[test]
fn table_bomb() {
    let wat = r#"(module (table $t 1 funcref)
      (func (export "_start")
        (loop $l
          (if (i32.eq (table.grow $t (ref.null func) (i32.const 10000)) (i32.const -1))
            (then unreachable))
          (br $l))))"#;
    let mut config = container(wat);
    config.memory_bytes = Some(1 << 20);
    let exit = run(config);
    assert_eq!(
        (exit.code, exit.reason),
        (137, Reason::OutOfMemory),
        "{exit:?}"
    );
    neighbour();
}

#[test]
fn stack_overflow() {
    let exit = run(container(
        r#"(module (func $f (export "_start") (call $f) (call $f)))"#,
    ));
    assert_eq!((exit.code, exit.reason), (134, Reason::Trap));
    let message = exit.message.expect("message");
    assert!(message.contains("stack"), "{message}");
    assert!(message.lines().count() < 50, "{message}");
    neighbour();
}

#[test]
fn endless_loops_do_not_starve_a_neighbour() {
    let pods: Vec<(Pod, Container)> = (0..4)
        .map(|_| {
            let pod = pod();
            let container = pod.create(container(LOOP)).expect("created");
            container.start().expect("started");
            (pod, container)
        })
        .collect();
    neighbour();
    for (_, container) in &pods {
        container.signal(9).expect("signalled");
    }
    for (_, container) in &pods {
        assert_eq!(wait(container).code, 137);
    }
}

#[test]
fn output_flood_with_a_slow_reader() {
    let (reader, writer) = pipe();
    let mut config = container(&print(&"x".repeat(1000), 0));
    config.stdout = writer;
    let flood = pod().create(config).expect("created");
    flood.start().expect("started");
    let mut reader = std::fs::File::from(reader);
    let mut some = [0; 4096];
    reader.read_exact(&mut some).expect("flows");
    // Nobody reads any more: the program is held back and uses no CPU.
    let deadline = Instant::now() + PATIENCE;
    let mut last = flood.stats().cpu;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = flood.stats().cpu;
        if now == last {
            break;
        }
        last = now;
        assert!(Instant::now() < deadline, "is not held back");
    }
    neighbour();
    let begin = Instant::now();
    flood.signal(9).expect("signalled");
    assert_eq!(wait(&flood).code, 137, "a held-back program can be killed");
    assert!(begin.elapsed() < Duration::from_secs(10));
    // A reader that goes away does not kill us.
    let (reader, writer) = pipe();
    let mut config = container(&print("x", 10));
    config.stdout = writer;
    drop(reader);
    assert_eq!(run(config).code, 0);
}

#[test]
fn what_was_written_last_arrives() {
    // More than a pipe holds, read only after the program has written it.
    let text = "y".repeat(60_000);
    let (exit, got) = run_output(container(&print(&text, 3)));
    assert_eq!((exit.code, got.len()), (0, 180_000));
}

#[test]
fn host_call_flood() {
    let wat = r#"(module
      (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "sched_yield" (func $yield (result i32)))
      (memory (export "memory") 16)
      (func (export "_start")
        (loop $l
          (drop (call $random (i32.const 0) (i32.const 1000000)))
          (drop (call $random (i32.const 0) (i32.const -1)))
          (drop (call $yield))
          (br $l))))"#;
    let flood = pod().create(container(wat)).expect("created");
    flood.start().expect("started");
    neighbour();
    flood.signal(15).expect("signalled");
    let exit = wait(&flood);
    assert!([134, 143].contains(&exit.code), "{exit:?}");
}

#[test]
fn open_files_without_end() {
    let dir = tempfile::tempdir().expect("tempdir");
    std::fs::write(dir.path().join("f"), "").expect("write");
    // Opens the same file until it is refused, then gives up with that errno.
    let wat = r#"(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (data (i32.const 1024) "f")
      (func (export "_start") (local $errno i32)
        (loop $l
          (local.set $errno (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 1)
            (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 512)))
          (if (local.get $errno) (then (call $exit (local.get $errno))))
          (br $l))))"#;
    let mut config = container(wat);
    config.mounts = vec![bulkhead_wasm::Mount {
        host: dir.path().to_owned(),
        guest: "/".into(),
        read_only: true,
    }];
    let exit = run(config);
    assert_ne!(exit.code, 0, "{exit:?}");
    // Their descriptors are back, and there were always some left.
    neighbour();
}

#[test]
fn a_module_of_200_mb_is_refused_unread() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("big.wasm");
    // A custom section of 200 MB, sparse.
    let file = std::fs::File::create(&path).expect("create");
    std::io::Write::write_all(&mut &file, b"\0asm\x01\0\0\0").expect("write");
    file.set_len(200 << 20).expect("grow");
    let begin = Instant::now();
    let error = ENGINE.load(Source::File(&path)).expect_err("too large");
    assert!(matches!(error, WasmError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("max_module"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1));
    // Allowed, it is read and found wanting.
    let engine = Engine::new(&EngineConfig {
        max_module_bytes: 300 << 20,
        ..EngineConfig::default()
    })
    .expect("engine");
    let error = engine.load(Source::File(&path)).expect_err("zeros");
    assert!(matches!(error, WasmError::Invalid { .. }), "{error}");
    neighbour();
}

#[test]
fn fifos_and_directories_are_no_programs() {
    let dir = tempfile::tempdir().expect("tempdir");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    for path in [fifo.as_path(), dir.path(), "/dev/zero".as_ref()] {
        let error = ENGINE.load(Source::File(path)).expect_err("no program");
        assert!(error.to_string().contains("regular"), "{error}");
    }
}

#[test]
fn fuel_ends_a_program() {
    let engine = Engine::new(&EngineConfig {
        fuel: true,
        ..EngineConfig::default()
    })
    .expect("engine");
    let bytes = wat::parse_str(LOOP).expect("text");
    let program = engine
        .load(Source::Bytes {
            name: "loop",
            bytes: &bytes,
        })
        .expect("loads");
    let pod = Pod::new(&engine, PodConfig::default());
    let mut config = ContainerConfig::new("c", program);
    config.fuel = Some(100_000);
    let container = pod.create(config).expect("created");
    container.start().expect("started");
    assert_eq!(wait(&container).reason, Reason::Fuel);
    let mut config = self::container(LOOP);
    config.fuel = Some(1);
    assert!(
        self::pod().create(config).is_err(),
        "this engine counts nothing"
    );
}

/// What ended leaves nothing behind, however often. In a process of its own: other tests open files.
#[test]
fn a_thousand_programs_leave_nothing() {
    const ALONE: &str = "BULKHEAD_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let alone = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["hostile::a_thousand_programs_leave_nothing", "--exact"])
            .env(ALONE, "1")
            .output()
            .expect("starts");
        let text = String::from_utf8_lossy(&alone.stdout);
        assert!(alone.status.success(), "{text}");
        assert!(text.contains("1 passed"), "{text}");
        return;
    }
    let pod = pod();
    let program = load(&exit(0));
    let fds = || std::fs::read_dir("/proc/self/fd").expect("list").count();
    let once = || {
        let container = pod
            .create(ContainerConfig::new("c", program.clone()))
            .expect("created");
        container.start().expect("started");
        assert_eq!(wait(&container).code, 0);
    };
    once();
    let before = fds();
    for _ in 0..1000 {
        once();
    }
    // The threads of the last ones may still be on their way out, as those of the first may have
    // been: then there are fewer now.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while fds() > before && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(fds() <= before, "{} descriptors, {before} before", fds());
    assert_eq!(pod.memory().used(), 0);
}
