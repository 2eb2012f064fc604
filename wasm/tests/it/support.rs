//! Engines, pods and pipes for tests.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;
use std::time::Duration;

use bulkhead_wasm::{
    Allocation, Container, ContainerConfig, Engine, EngineConfig, Exit, Pod, PodConfig, Program,
    Source, Stdio,
};

/// Long enough for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// One engine for all tests, as in a daemon: tests run beside each other and must not notice.
pub static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    Engine::new(&EngineConfig {
        allocation: Allocation::Pooling { instances: 100 },
        ..EngineConfig::default()
    })
    .expect("engine")
});

pub fn load(wat: &str) -> Program {
    let bytes = wat::parse_str(wat).expect("valid text");
    ENGINE
        .load(Source::Bytes {
            name: "test.wasm",
            bytes: &bytes,
        })
        .expect("loads")
}

pub fn pod() -> Pod {
    Pod::new(
        &ENGINE,
        PodConfig {
            id: "test".into(),
            memory_bytes: Some(64 << 20),
            ..PodConfig::default()
        },
    )
}

/// A container of `wat` in a pod of its own.
pub fn container(wat: &str) -> ContainerConfig {
    ContainerConfig::new("c", load(wat))
}

pub fn pipe() -> (OwnedFd, Stdio) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe");
    (reader, Stdio::Fd(writer))
}

pub fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    std::fs::File::from(fd)
        .read_to_string(&mut text)
        .expect("utf-8");
    text
}

pub fn wait(container: &Container) -> Exit {
    container
        .wait_for(PATIENCE)
        .unwrap_or_else(|| panic!("{container:?} does not end"))
}

pub fn run(config: ContainerConfig) -> Exit {
    let container = pod().create(config).expect("created");
    container.start().expect("started");
    wait(&container)
}

/// Runs and collects standard output.
pub fn run_output(mut config: ContainerConfig) -> (Exit, String) {
    let (reader, writer) = pipe();
    config.stdout = writer;
    let container = pod().create(config).expect("created");
    container.start().expect("started");
    let text = read_all(reader);
    (wait(&container), text)
}

/// A module that prints `text` by `fd_write`, once for each turn of a loop of `times`.
pub fn print(text: &str, times: u32) -> String {
    let length = text.len();
    let text = text.replace('\n', "\\n");
    format!(
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 64) "{text}")
          (func (export "_start") (local $n i32)
            (local.set $n (i32.const {times}))
            (i32.store (i32.const 0) (i32.const 64))
            (i32.store (i32.const 4) (i32.const {length}))
            (loop $again
              (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
              (local.set $n (i32.sub (local.get $n) (i32.const 1)))
              (br_if $again (local.get $n)))))"#
    )
}

/// A module that exits with `code`.
pub fn exit(code: u32) -> String {
    format!(
        r#"(module
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1)
          (func (export "_start") (call $exit (i32.const {code}))))"#
    )
}
