//! What a wasm pod costs more in processes of its own than on threads of the daemon.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use bulkhead_sandboxer::daemon::config::Isolation;

use super::report::{Goal, Report, median};
use super::wasm::{COMMAND, DOT};
use super::wasm_idle::{SLEEP, pss_kib};
use crate::wasm::daemon::{Daemon, connect, run as run_task, start as start_task};

/// Pods whose memory is looked at.
const PODS: usize = 20;
/// Pods whose start is timed.
const STARTS: usize = 30;

/// Memory of a process and all its descendants, in KiB.
fn pss_of_all(process: u32) -> Result<f64> {
    let mut sum = pss_kib(&process.to_string())?;
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"))?;
    for child in children.split_whitespace() {
        sum += pss_of_all(child.parse()?)?;
    }
    Ok(sum)
}

/// Times and memory of one way.
struct Cost {
    start_ms: Vec<f64>,
    pod_kib: f64,
}

fn cost(isolation: Isolation) -> Result<Cost> {
    let daemon = Daemon::start_as(isolation)?;
    let sleep = daemon.image("sleep", &wat::parse_str(SLEEP)?)?;
    let dot = daemon.image("dot", &wat::parse_str(DOT)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut start_ms = Vec::new();
    for n in 0..=STARTS {
        let id = format!("s{n}");
        let bundle = daemon.bundle(&id, &dot, &["/app.wasm"], |_| ())?;
        let begin = Instant::now();
        let address = daemon.pod(&id, "")?;
        runtime.block_on(async { run_task(&connect(&address).await?, bundle).await })?;
        // The first one has the engine made and the program compiled.
        if n > 0 {
            start_ms.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
        daemon.remove(&id)?;
    }
    let begin = |id: &str| -> Result<()> {
        let address = daemon.pod(id, "")?;
        let mut bundle = daemon.bundle(id, &sleep, &["/app.wasm"], |_| ())?;
        bundle.create.stdout.clear();
        bundle.create.stderr.clear();
        runtime.block_on(async { start_task(&connect(&address).await?, &bundle).await })
    };
    // Programs wait, and idle threads have gone.
    let settle = || std::thread::sleep(Duration::from_secs(4));
    begin("first")?;
    settle();
    let before = pss_of_all(daemon.pid())?;
    for n in 0..PODS {
        begin(&format!("p{n}"))?;
    }
    settle();
    let pod_kib = (pss_of_all(daemon.pid())? - before) / PODS as f64;
    daemon.remove("first")?;
    for n in 0..PODS {
        daemon.remove(&format!("p{n}"))?;
    }
    Ok(Cost { start_ms, pod_kib })
}

/// Both ways. Needs root.
///
/// # Errors
/// Something does not run.
pub fn run(report: &mut Report) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("pods in processes: needs root");
        return Ok(());
    }
    let threads = cost(Isolation::Thread)?;
    let processes = cost(Isolation::Process)?;
    let mut add = |what: &str, unit: &str, samples: &[f64], goal: Goal| {
        report.add(what, unit, samples, &[], goal, COMMAND);
    };
    let start = "a pod and its program, from Create to the exit code";
    add(
        &format!("{start}: threads"),
        "ms",
        &threads.start_ms,
        Goal::Shown,
    );
    add(
        &format!("{start}: processes"),
        "ms",
        &processes.start_ms,
        Goal::Shown,
    );
    let more = median(&processes.start_ms) - median(&threads.start_ms);
    add("what processes add to it", "ms", &[more], Goal::Value(15.0));
    let memory = "memory (PSS) of a pod with a waiting program";
    add(
        &format!("{memory}: threads"),
        "MiB",
        &[threads.pod_kib / 1024.0],
        Goal::Shown,
    );
    add(
        &format!("{memory}: processes"),
        "MiB",
        &[processes.pod_kib / 1024.0],
        Goal::Shown,
    );
    let more = (processes.pod_kib - threads.pod_kib) / 1024.0;
    add("what processes add to it", "MiB", &[more], Goal::Value(4.0));
    Ok(())
}
