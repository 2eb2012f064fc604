//! Wasm pods: the image is an ordinary one, the programs come by a volume.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{Isolation, Node, WASM};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;
use super::recovery::Reconnected;
use super::wide::pod_cgroup;

pub const TESTS: &[Test] = &[
    ("wasm_pod", false, wasm_pod),
    ("wasm_without_containerd", false, without_containerd),
];

/// Programs go on when containerd is away, and what they ended with is not lost: they have no
/// processes, by which containerd would know that they are there.
fn without_containerd(node: &mut Node, _: &str) -> Result<()> {
    let volume = tempfile::tempdir()?;
    for (name, text) in [("copy", COPY), ("loop", LOOP)] {
        let path = volume.path().join(format!("{name}.wasm"));
        fs::write(path, wat::parse_str(text)?)?;
    }
    fs::write(volume.path().join("in"), "text\n")?;
    let pod = TestPod::run(node, WASM, pod("wasm-stays"))?;
    let start = |program: &str| {
        let mut spec = container(program, "busybox", &[&format!("/data/{program}.wasm")]);
        spec.mounts = vec![Mount {
            container_path: "/data".into(),
            host_path: volume.path().display().to_string(),
            ..Mount::default()
        }];
        pod.start(&spec)
    };
    let (ended, runs) = (start("copy")?, start("loop")?);
    ensure!(pod.cri.wait_exit(&ended, PATIENCE)?.exit_code == 7);
    node.kill_containerd();
    node.start_containerd()?;
    let pod = Reconnected::new(node, WASM, pod)?.0;
    let state = pod.cri.status(&runs)?.state;
    ensure!(state == CONTAINER_RUNNING, "does not run: {state}");
    ensure!(pod.cri.status(&ended)?.exit_code == 7, "the exit code");
    pod.cri.stop(&runs, 0)?;
    let code = pod.cri.status(&runs)?.exit_code;
    ensure!(code == 137, "stopped with {code}");
    pod.remove()
}

/// Prints a line, copies `data/in` to `data/out` and ends with 7.
pub const COPY: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read"
    (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 100) "hello from wasm\n")
  (data (i32.const 200) "data/in")
  (data (i32.const 220) "data/out")
  (func $must (param i32) (if (local.get 0) (then (call $exit (local.get 0)))))
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 100))
    (i32.store (i32.const 4) (i32.const 16))
    (call $must (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $must (call $open (i32.const 3) (i32.const 0) (i32.const 200) (i32.const 7)
      (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 20)))
    (call $must (call $open (i32.const 3) (i32.const 0) (i32.const 220) (i32.const 8)
      (i32.const 1) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 24)))
    (i32.store (i32.const 0) (i32.const 1000))
    (i32.store (i32.const 4) (i32.const 500))
    (call $must (call $read (i32.load (i32.const 20)) (i32.const 0) (i32.const 1) (i32.const 4)))
    (call $must (call $write (i32.load (i32.const 24)) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $exit (i32.const 7))))"#;
pub const LOOP: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;
pub const BOMB: &str = r#"(module (memory 1) (func (export "_start")
  (loop $l (if (i32.eq (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
  (br $l))))"#;

fn wasm_pod(node: &mut Node, _: &str) -> Result<()> {
    let cri = node.cri(WASM)?;
    let volume = tempfile::tempdir()?;
    for (name, text) in [("copy", COPY), ("loop", LOOP), ("bomb", BOMB)] {
        fs::write(
            volume.path().join(format!("{name}.wasm")),
            wat::parse_str(text)?,
        )?;
    }
    fs::write(volume.path().join("in"), "through a volume\n")?;
    let mount = |container_path: &str, path: &Path, readonly| Mount {
        container_path: container_path.into(),
        host_path: path.display().to_string(),
        readonly,
        ..Mount::default()
    };
    // A log of its own: this runs once for each way of standard streams.
    let number = std::time::UNIX_EPOCH.elapsed()?.as_millis();
    let mut config = pod(&format!("wasm-{number}"));
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 80_000,
        ..LinuxContainerResources::default()
    });
    let id = cri.run_pod(&config)?;
    ensure!(
        cri.pod_status(&id)?.state == SANDBOX_READY,
        "pod is not ready"
    );
    let make = |name: &str, program: &str, readonly, memory: i64| -> Result<_> {
        let mut spec = container(name, "busybox", &[&format!("/data/{program}.wasm")]);
        spec.mounts = vec![mount("/data", volume.path(), readonly)];
        spec.linux = Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: memory,
                ..LinuxContainerResources::default()
            }),
            ..LinuxContainerConfig::default()
        });
        let c = cri.create(&id, &config, &spec)?;
        cri.start(&c)?;
        Ok((c, spec))
    };

    let (c, spec) = make("copy", "copy", false, 0)?;
    let status = cri.wait_exit(&c, PATIENCE)?;
    let (out, err) = log(&config, &spec)?;
    ensure!(
        status.exit_code == 7,
        "exit code {}: {out}{err}",
        status.exit_code
    );
    ensure!(out == "hello from wasm\n", "output {out:?}");
    let copied = fs::read_to_string(volume.path().join("out"))?;
    ensure!(copied == "through a volume\n", "the host reads {copied:?}");
    cri.remove(&c)?;

    // Read-only: opening for writing fails, with WASI's EROFS or, as wasmtime has it, EIO.
    fs::write(volume.path().join("in"), "another text\n")?;
    let (c, _) = make("readonly", "copy", true, 0)?;
    let status = cri.wait_exit(&c, PATIENCE)?;
    ensure!(
        [29, 69].contains(&status.exit_code),
        "exit code {}",
        status.exit_code
    );
    let kept = fs::read_to_string(volume.path().join("out"))?;
    ensure!(kept == copied, "written although read-only: {kept:?}");
    cri.remove(&c)?;

    // As another user: the same file is not its own to write.
    let mut spec = container("user", "busybox", &["/data/copy.wasm"]);
    spec.mounts = vec![mount("/data", volume.path(), false)];
    spec.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 1000 }),
            ..LinuxContainerSecurityContext::default()
        }),
        ..LinuxContainerConfig::default()
    });
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o755))?;
    let c = cri.create(&id, &config, &spec)?;
    cri.start(&c)?;
    let status = cri.wait_exit(&c, PATIENCE)?;
    // WASI's EACCES.
    ensure!(status.exit_code == 2, "exit code {}", status.exit_code);
    cri.remove(&c)?;

    let (c, spec) = make("bomb", "bomb", true, 16 << 20)?;
    let status = cri.wait_exit(&c, PATIENCE)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "exit code {}, reason {:?}",
        status.exit_code,
        status.reason
    );
    let (_, err) = log(&config, &spec)?;
    ensure!(err.contains("memory"), "standard error {err:?}");
    cri.remove(&c)?;

    let (c, _) = make("loop", "loop", true, 0)?;
    let error = cri.exec(&c, &["sh"]).err().context("exec went well")?;
    ensure!(format!("{error:#}").contains("not supported"), "{error:#}");
    let stats = cri.stats(&c)?;
    ensure!(stats.cpu.is_some(), "no statistics: {stats:?}");
    cri.pod_stats(&id)?;
    // It computes in the pod's cgroup, which has the pod's share of CPU.
    let cgroup = |file: &str| match node.isolation() {
        Isolation::Thread => pod_cgroup(&id, file),
        Isolation::Process => {
            let parent = config.linux.as_ref().map(|l| l.cgroup_parent.as_str());
            let parent = parent.unwrap_or_default();
            let path = format!("/sys/fs/cgroup{parent}/bulkhead-{id}:wasm/{file}");
            Ok(fs::read_to_string(path)?)
        }
    };
    ensure!(cgroup("cpu.max")? == "80000 100000\n");
    ensure!(!cgroup("cgroup.threads")?.is_empty(), "no thread is there");
    cri.stop(&c, 1)?;
    let status = cri.status(&c)?;
    ensure!(status.exit_code == 143, "exit code {}", status.exit_code);
    cri.remove(&c)?;

    cri.stop_pod(&id)?;
    ensure!(cgroup("cpu.max").is_err(), "the cgroup outlives its pod");
    cri.remove_pod(&id)
}
