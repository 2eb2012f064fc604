//! What ordinary programs expect.

use bulkhead_wasm::{
    CacheConfig, CompilerConfig, ContainerConfig, Engine, EngineConfig, Origin, Pod, PodConfig,
    ProgramKind, Reason, Source, Stdio, WasmError,
};

use crate::support::*;

#[test]
fn prints_and_ends() {
    let (exit, text) = run_output(container(&print("hello\n", 2)));
    assert_eq!((exit.code, exit.reason), (0, Reason::Exited));
    assert_eq!(text, "hello\nhello\n");
}

#[test]
fn every_exit_code_is_kept() {
    for code in [0, 1, 7, 125, 126, 137, 255] {
        let end = run(container(&exit(code)));
        assert_eq!(
            (u32::from(end.code), end.reason),
            (code, Reason::Exited),
            "{end:?}"
        );
    }
}

#[test]
fn arguments_and_environment() {
    // Prints the raw buffer of args_get or environ_get.
    let program = |call: &str| {
        format!(
            r#"(module
              (import "wasi_snapshot_preview1" "{call}_sizes_get"
                (func $sizes (param i32 i32) (result i32)))
              (import "wasi_snapshot_preview1" "{call}_get"
                (func $get (param i32 i32) (result i32)))
              (import "wasi_snapshot_preview1" "fd_write"
                (func $write (param i32 i32 i32 i32) (result i32)))
              (memory (export "memory") 1)
              (func (export "_start")
                (drop (call $sizes (i32.const 0) (i32.const 12)))
                (drop (call $get (i32.const 1024) (i32.const 4096)))
                (i32.store (i32.const 8) (i32.const 4096))
                (drop (call $write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16)))))"#
        )
    };
    let mut config = container(&program("args"));
    config.args = vec!["prog".into(), "a b".into(), "ü".into()];
    assert_eq!(run_output(config).1, "prog\0a b\0ü\0");
    let mut config = container(&program("environ"));
    config.env = vec![("A".into(), "1".into()), ("B".into(), "x=y".into())];
    assert_eq!(run_output(config).1, "A=1\0B=x=y\0");
}

#[test]
fn a_pipe_without_a_reader_is_told() {
    let program = r#"(module
      (import "wasi_snapshot_preview1" "fd_write"
        (func $write (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (func (export "_start")
        (i32.store (i32.const 4) (i32.const 9))
        (call $exit (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe");
    drop(reader);
    let mut config = container(program);
    config.stdout = Stdio::Fd(writer);
    // WASI's EPIPE.
    assert_eq!(run(config).code, 64);
}

#[test]
fn standard_input_is_read_to_its_end() {
    let cat = r#"(module
      (import "wasi_snapshot_preview1" "fd_read"
        (func $read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write"
        (func $write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func (export "_start")
        (loop $again
          (i32.store (i32.const 0) (i32.const 1024))
          (i32.store (i32.const 4) (i32.const 1000))
          (if (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4))
            (then unreachable))
          (if (i32.load (i32.const 4))
            (then
              (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
              (br $again))))))"#;
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe");
    let mut config = container(cat);
    config.stdin = Stdio::Fd(reader);
    let text = "some lines\n".repeat(2000);
    let sent = text.clone();
    let feeder = std::thread::spawn(move || {
        use std::io::Write;
        std::fs::File::from(writer)
            .write_all(sent.as_bytes())
            .expect("written");
    });
    let (exit, got) = run_output(config);
    feeder.join().expect("fed");
    assert_eq!(exit.code, 0, "{exit:?}");
    assert_eq!(got, text);
    // A regular file, and nothing at all.
    let mut config = container(cat);
    config.stdin = Stdio::Fd(std::fs::File::open("/etc/hostname").expect("file").into());
    let expected = std::fs::read_to_string("/etc/hostname").expect("file");
    assert_eq!(run_output(config).1, expected);
    assert_eq!(run_output(container(cat)).1, "");
}

#[test]
fn traps_are_readable_and_point_into_the_program() {
    let wat = r#"(module
      (func $inner (param i32) (result i32) (i32.div_u (i32.const 1) (local.get 0)))
      (func $outer (result i32) (call $inner (i32.const 0)))
      (func $main (export "_start") (drop (call $outer))))"#;
    // Inlined functions have no frames: what is left is where they were inlined to.
    let end = run(container(wat));
    assert_eq!((end.code, end.reason), (134, Reason::Trap));
    let message = end.message.expect("message");
    assert!(message.contains("integer divide by zero"), "{message}");
    assert!(message.contains("at main"), "{message}");
    let engine = Engine::new(&EngineConfig {
        compiler: CompilerConfig {
            inlining: false,
            ..CompilerConfig::default()
        },
        ..EngineConfig::default()
    });
    let engine = engine.expect("engine");
    let bytes = wat::parse_str(wat).expect("text");
    let source = Source::Bytes {
        name: "trap",
        bytes: &bytes,
    };
    let program = engine.load(source).expect("loads");
    let pod = Pod::new(&engine, PodConfig::default());
    let trap = pod.create(ContainerConfig::new("c", program));
    let trap = trap.expect("created");
    trap.start().expect("started");
    let message = wait(&trap).message.expect("message");
    let inner = message.find("inner").expect("innermost frame");
    let outer = message.find("outer").expect("outer frame");
    assert!(inner < outer, "{message}");
}

#[test]
fn functions_by_name() {
    let wat = r#"(module
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (global $ready (mut i32) (i32.const 0))
      (func (export "_initialize") (global.set $ready (i32.const 40)))
      (func (export "answer") (call $exit (i32.add (global.get $ready) (i32.const 2))))
      (func (export "takes") (param i32)))"#;
    let mut config = container(wat);
    config.function = Some("answer".into());
    assert_eq!(run(config).code, 42);
    let mut config = container(wat);
    config.function = Some("takes".into());
    let end = run(config);
    assert_eq!(end.reason, Reason::Failed);
    assert!(
        end.message
            .as_deref()
            .is_some_and(|m| m.contains("parameters")),
        "{end:?}"
    );
    let mut config = container(wat);
    config.function = Some("nope".into());
    let error = pod()
        .create(config)
        .expect_err("no such function")
        .to_string();
    assert!(
        error.contains("nope") && error.contains("answer"),
        "{error}"
    );
    let error = pod()
        .create(container(wat))
        .expect_err("no _start")
        .to_string();
    assert!(error.contains("_start"), "{error}");
}

#[test]
fn what_is_not_offered_is_named() {
    let load = |wat: &str| {
        let bytes = wat::parse_str(wat).expect("text");
        ENGINE
            .load(Source::Bytes {
                name: "x",
                bytes: &bytes,
            })
            .expect_err("not offered")
            .to_string()
    };
    let error = load(r#"(module (import "wasi_nn" "load" (func)) (func (export "_start")))"#);
    assert!(error.contains("wasi_nn"), "{error}");
    let error =
        load(r#"(module (import "wasi_unstable" "fd_write" (func)) (func (export "_start")))"#);
    assert!(error.contains("WASI SDK"), "{error}");
    let error =
        load(r#"(component (import "wasi:keyvalue/store@0.2.0" (instance (export "x" (func)))))"#);
    assert!(error.contains("wasi:keyvalue"), "{error}");
}

#[test]
fn a_component_runs() {
    // `wasi:cli/run` by hand: exits with an error.
    let wat = r#"(component
      (core module $m (func (export "run") (result i32) (i32.const 1)))
      (core instance $i (instantiate $m))
      (func $run (result (result)) (canon lift (core func $i "run")))
      (instance $run-instance (export "run" (func $run)))
      (export "wasi:cli/run@0.2.0" (instance $run-instance))
      (export "hello" (func $run)))"#;
    let program = load(wat);
    assert_eq!(program.kind(), ProgramKind::Command);
    assert_eq!(run(ContainerConfig::new("c", program.clone())).code, 1);
    let mut config = ContainerConfig::new("c", program);
    config.function = Some("hello".into());
    assert_eq!(run(config).code, 1);
}

#[test]
fn a_component_of_the_next_generation_runs() {
    let program = load(
        r#"(component
          (core module $m (func (export "run") (result i32) (i32.const 1)))
          (core instance $i (instantiate $m))
          (func $run async (result (result)) (canon lift (core func $i "run")))
          (instance $run-instance (export "run" (func $run)))
          (export "wasi:cli/run@0.3.0" (instance $run-instance)))"#,
    );
    assert_eq!(program.kind(), ProgramKind::CommandP3);
    assert_eq!(run(ContainerConfig::new("c", program)).code, 1);
}

#[test]
fn a_cached_start_never_compiles() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = EngineConfig {
        cache: Some(CacheConfig {
            directory: dir.path().join("cache"),
            max_bytes: 64 << 20,
        }),
        ..EngineConfig::default()
    };
    let path = dir.path().join("hello.wasm");
    std::fs::write(&path, wat::parse_str(print("hi\n", 1)).expect("text")).expect("write");
    let origin = |config: &EngineConfig| {
        let engine = Engine::new(config).expect("engine");
        let program = engine.load(Source::File(&path)).expect("loads");
        program.origin()
    };
    assert_eq!(origin(&config), Origin::Compiled);
    assert_eq!(origin(&config), Origin::Disk);
    // Another configuration makes other code.
    let fuel = EngineConfig {
        fuel: true,
        ..config.clone()
    };
    assert_eq!(origin(&fuel), Origin::Compiled);
    assert_eq!(origin(&config), Origin::Disk);
    // Damaged code is made anew, not run.
    for entry in std::fs::read_dir(dir.path().join("cache"))
        .expect("list")
        .flatten()
    {
        if entry.path().extension().is_some_and(|e| e == "cwasm") {
            let mut code = std::fs::read(entry.path()).expect("read");
            let middle = code.len() / 2;
            code[middle] ^= 0xff;
            std::fs::write(entry.path(), code).expect("write");
        }
    }
    assert_eq!(origin(&config), Origin::Compiled);
    assert_eq!(origin(&config), Origin::Disk);
    // A changed program is another program.
    std::fs::write(&path, wat::parse_str(print("ho\n", 1)).expect("text")).expect("write");
    assert_eq!(origin(&config), Origin::Compiled);
}

/// Toolchains that can make threads use atomic instructions also in programs that have none.
#[test]
fn atomics_work_and_memory_is_not_shared() {
    let exit = run(container(
        r#"(module (memory (export "memory") 1)
          (func (export "_start")
            (if (i32.atomic.rmw.add (i32.const 0) (i32.const 5)) (then unreachable))
            (if (i32.ne (i32.atomic.load (i32.const 0)) (i32.const 5)) (then unreachable))))"#,
    ));
    assert_eq!((exit.code, exit.reason), (0, Reason::Exited), "{exit:?}");
    // Nobody could ever wake it.
    let exit = run(container(
        r#"(module (memory 1)
          (func (export "_start")
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#,
    ));
    assert_eq!((exit.code, exit.reason), (134, Reason::Trap), "{exit:?}");
    let bytes = wat::parse_str(r#"(module (memory 1 2 shared) (func (export "_start")))"#);
    let bytes = bytes.expect("text");
    let loaded = ENGINE.load(Source::Bytes {
        name: "shared",
        bytes: &bytes,
    });
    let words = match loaded {
        Err(error) => error.to_string(),
        Ok(program) => {
            let exit = run(ContainerConfig::new("c", program));
            assert_eq!(exit.reason, Reason::Failed, "{exit:?}");
            exit.message.expect("a message")
        }
    };
    assert!(words.contains("shared"), "{words}");
}

/// Inlining takes memory by the size of the program's code; without it, it is another code that
/// another part of the engine runs.
#[test]
fn what_is_too_large_for_inlining_is_compiled_without() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = |memory_bytes| EngineConfig {
        cache: Some(CacheConfig {
            directory: dir.path().join("cache"),
            max_bytes: 64 << 20,
        }),
        compiler: CompilerConfig {
            memory_bytes,
            ..CompilerConfig::default()
        },
        ..EngineConfig::default()
    };
    // Leaves this loop when it is told to end.
    let wat = r#"(module (func $f (result i32) (i32.const 1))
      (func (export "_start") (loop $l (br_if $l (call $f)))))"#;
    let bytes = wat::parse_str(wat).expect("text");
    let run = |memory_bytes| {
        let engine = Engine::new(&config(memory_bytes)).expect("engine");
        let source = Source::Bytes {
            name: "loop",
            bytes: &bytes,
        };
        let program = engine.load(source).expect("loads");
        let origin = program.origin();
        let pod = Pod::new(&engine, PodConfig::default());
        let container = pod
            .create(ContainerConfig::new("c", program))
            .expect("created");
        container.start().expect("started");
        let deadline = std::time::Instant::now() + PATIENCE;
        while container.stats().cpu.as_millis() < 30 {
            assert!(std::time::Instant::now() < deadline, "does not run");
            std::thread::yield_now();
        }
        container.signal(15).expect("signalled");
        assert_eq!(wait(&container).code, 143);
        origin
    };
    assert_eq!(run(0), Origin::Compiled);
    // Found again, also by who could inline: it is as good as it was.
    assert_eq!(run(0), Origin::Disk);
    assert_eq!(run(1 << 30), Origin::Disk);
    let code = std::fs::read_dir(dir.path().join("cache")).expect("list");
    let code = code.flatten();
    let count = code.filter(|e| e.path().extension().is_some_and(|x| x == "cwasm"));
    assert_eq!(count.count(), 1);
}

#[test]
fn malformed_files_are_told_apart() {
    let load = |bytes: &[u8]| {
        ENGINE
            .load(Source::Bytes {
                name: "x.wasm",
                bytes,
            })
            .expect_err("malformed")
    };
    let good = wat::parse_str(print("hello\n", 1)).expect("text");
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"\x7fELF\x02\x01\x01\0", "native program"),
        (b" (module)", "text"),
        (b"hello world", "\\0asm"),
        (b"\0asm\x09\0\0\0", "version"),
        (&good[..good.len() - 3], "not a valid"),
        (b"\0asm\x01\0\0\0\xff\xff\xff\xff\x0f", "not a valid"),
    ] {
        let error = load(bytes);
        assert!(matches!(error, WasmError::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // Every cut and every flipped byte is refused or runs; none harms.
    for at in 8..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 0x55;
        for bytes in [&bytes[..], &good[..at]] {
            let _ = ENGINE.load(Source::Bytes {
                name: "x.wasm",
                bytes,
            });
        }
    }
    assert_eq!(run_output(container(&print("alive\n", 1))).1, "alive\n");
}
