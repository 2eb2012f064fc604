//! What wasm pods cost that do nothing: in the library, and in the daemon.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_wasm::{ContainerConfig, Engine, Pod, PodConfig, Source};

use super::report::{Goal, Report};
use super::wasm::{COMMAND, DOT, PATIENCE};
use crate::wasm::daemon::{Daemon, connect, start as start_task};

const IDLE: usize = 1000;

/// Waits an hour.
pub(super) const SLEEP: &str = r#"(module
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const 3600000000000))
    (drop (call $poll (i32.const 0) (i32.const 512) (i32.const 1) (i32.const 1024)))))"#;

/// Pods and programs in this process.
///
/// # Errors
/// Something does not run.
pub fn of_library(engine: &Engine, report: &mut Report) -> Result<()> {
    let load = |text| -> Result<_> {
        let bytes = wat::parse_str(text)?;
        let source = Source::Bytes {
            name: "bench",
            bytes: &bytes,
        };
        Ok(engine.load(source)?)
    };
    let program = load(SLEEP)?;
    let pod = || Pod::new(engine, PodConfig::default());
    let before = pss_kib("self")?;
    let mut all = Vec::new();
    for _ in 0..IDLE {
        let pod = pod();
        let container = pod.create(ContainerConfig::new("c", program.clone()))?;
        container.start()?;
        all.push((pod, container));
    }
    for (_, container) in &all {
        let begin = Instant::now();
        while container.stats().memory_bytes == 0 {
            if begin.elapsed() > PATIENCE {
                bail!("{container:?} does not start");
            }
            std::thread::yield_now();
        }
    }
    let after = pss_kib("self")?;
    report.add(
        "memory of a waiting program in a pod of its own (1,000 of them)",
        "KiB",
        &[(after - before) / IDLE as f64],
        &[],
        Goal::Shown,
        COMMAND,
    );
    let cpu = || nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    let switches = |usage: nix::sys::resource::Usage| usage.voluntary_context_switches();
    let begin = switches(cpu()?);
    std::thread::sleep(Duration::from_secs(3));
    let wakes = switches(cpu()?) - begin;
    report.add(
        "wake-ups a second of a process with 1,000 waiting programs",
        "1/s",
        &[wakes as f64 / 3.0],
        &[],
        Goal::Value(1.0),
        COMMAND,
    );
    for (_, container) in &all {
        container.signal(9)?;
    }
    for (_, container) in &all {
        container.wait()?;
    }
    Ok(())
}

/// Pods of the daemon, made as containerd makes them. Needs root.
///
/// # Errors
/// Something does not run.
pub fn of_daemon(report: &mut Report) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("idle pods of the daemon: needs root");
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let process = daemon.pid().to_string();
    let image = daemon.image("sleep", &wat::parse_str(SLEEP)?)?;
    let dot = daemon.image("dot", &wat::parse_str(DOT)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let begin = |pod: &str, image| -> Result<()> {
        let address = daemon.pod(pod, "")?;
        let mut bundle = daemon.bundle(pod, image, &["/app.wasm"], |_| ())?;
        // Nobody reads a thousand FIFOs here.
        bundle.create.stdout.clear();
        bundle.create.stderr.clear();
        runtime.block_on(async { start_task(&connect(&address).await?, &bundle).await })
    };
    // What is made once is there before anything is counted.
    begin("first", &dot)?;
    let before = pss_kib(&process)?;
    for n in 0..IDLE {
        daemon.pod(&format!("empty-{n}"), "")?;
    }
    let with_pods = pss_kib(&process)?;
    for n in 0..IDLE {
        begin(&format!("p{n}"), &image)?;
    }
    // Their programs wait, and nothing else is done any more.
    std::thread::sleep(Duration::from_secs(4));
    let with_programs = pss_kib(&process)?;
    let each = |kib: f64| kib / IDLE as f64;
    let mut add = |what: &str, unit: &str, value: f64| {
        report.add(what, unit, &[value], &[], Goal::Shown, COMMAND);
    };
    add(
        "PSS of the daemon with 1,000 empty pods",
        "MiB",
        with_pods / 1024.0,
    );
    add(
        "PSS of the daemon with 1,000 pods with a waiting program more",
        "MiB",
        with_programs / 1024.0,
    );
    add("each empty pod", "KiB", each(with_pods - before));
    add(
        "each pod with a waiting program",
        "KiB",
        each(with_programs - with_pods),
    );
    // What is mounted for them would outlive a daemon that is killed.
    daemon.remove("first")?;
    for n in 0..IDLE {
        daemon.remove(&format!("empty-{n}"))?;
        daemon.remove(&format!("p{n}"))?;
    }
    Ok(())
}

pub(super) fn pss_kib(process: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("Pss:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .context("no Pss in smaps_rollup")
}
