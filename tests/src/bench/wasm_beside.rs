//! What wasm tasks do to microVMs that rest in the same process: does memory that is taken and given
//! back there, in an address space that guests' memory is mapped in, disturb them?

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bulkhead_protocol::task::PidsRequest;

use super::report::{Goal, Report};
use super::wasm::DOT;
use crate::cri::containerd::{IoType, Node, OURS, WASM};
use crate::cri::{TestPod, pod};
use crate::process;
use crate::wasm::daemon::{bundle, connect, image, run as run_task};

const VMS: usize = 20;
/// Tasks a second that are asked for.
const RATE: usize = 1000;
/// How many are asked for at a time.
const CLIENTS: usize = 4;
/// The VMs rest before anything is counted, and for how long it is.
const REST: Duration = Duration::from_secs(15);
const WATCHED: Duration = Duration::from_secs(10);
/// Where pods' directories are.
const RUN: &str = "/run/bulkhead";
const COMMAND: &str = "bench wasm, in the lab";

/// What is seen of the VMs within some seconds.
struct Seen {
    /// Exits of all VMs, a second.
    exits: f64,
    /// Milliseconds of calls to the agents of one after the other.
    latencies: Vec<f64>,
}

/// Runs it. Needs a host with KVM that may be changed: the lab.
///
/// # Errors
/// A daemon does not start, or a pod does not run.
pub fn run(sandboxer: &Path) -> Result<Report> {
    let mut report = Report::new("wasm", "the same without tasks", "");
    let node = Node::start(sandboxer, &["busybox"], IoType::Fifo)?;
    let mut vms = Vec::new();
    for n in 0..VMS {
        let vm = TestPod::run(&node, OURS, pod(&format!("vm-{n}")))?;
        let c = vm.sleeper("c")?;
        let address = Path::new(RUN).join("pods").join(&vm.id).join("task.sock");
        vms.push((vm, c, address));
        eprintln!("{} of {VMS} microVMs run", n + 1);
    }
    let agents: Vec<(PathBuf, String)> = vms
        .iter()
        .map(|(_, c, address)| (address.clone(), c.clone()))
        .collect();
    let host = TestPod::run(&node, WASM, pod("tasks"))?;
    let tasks = Path::new(RUN).join("wasm").join(&host.id).join("task.sock");
    thread::sleep(REST);
    let alone = watch(&node, &agents)?;
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (beside, rate) = thread::scope(|scope| -> Result<_> {
        let load = scope.spawn(|| run_tasks(&tasks, &stop, &done));
        // Counted from when the first have gone through.
        let begin = Instant::now();
        while done.load(Ordering::Relaxed) < 2 * CLIENTS && begin.elapsed() < WATCHED {
            thread::sleep(Duration::from_millis(10));
        }
        let (begin, first) = (Instant::now(), done.load(Ordering::Relaxed));
        let seen = watch(&node, &agents);
        let count = done.load(Ordering::Relaxed) - first;
        let rate = count as f64 / begin.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        load.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok((seen?, rate))
    })?;
    let what = "wasm tasks beside 20 idle microVMs in the same process (1,000/s are asked for)";
    report.add(what, "1/s", &[rate], &[], Goal::Shown, COMMAND);
    report.add(
        "exits of 20 idle microVMs during these tasks",
        "1/s",
        &[beside.exits],
        &[alone.exits],
        Goal::Shown,
        COMMAND,
    );
    report.add(
        "a call to the agent of an idle microVM during these tasks, p50",
        "ms",
        &beside.latencies,
        &alone.latencies,
        Goal::Shown,
        COMMAND,
    );
    report.add(
        "the same, p95",
        "ms",
        &[high(&beside.latencies)],
        &[high(&alone.latencies)],
        Goal::Shown,
        COMMAND,
    );
    host.remove()?;
    for (vm, _, _) in vms {
        vm.remove()?;
    }
    Ok(report)
}

/// The sample that 95 of 100 are not above.
fn high(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = sorted.len() * 95 / 100;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

fn watch(node: &Node, agents: &[(PathBuf, String)]) -> Result<Seen> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let kvm = process::kvm_directories(node.sandboxer_pid())?;
    if kvm.len() != agents.len() {
        bail!("{} VMs of {} are in KVM's figures", kvm.len(), agents.len());
    }
    // Nobody calls the agents while exits are counted: the VMs are idle.
    let before = process::kvm_counter(&kvm, "exits")?;
    let begin = Instant::now();
    thread::sleep(WATCHED);
    let exits = process::kvm_counter(&kvm, "exits")? - before;
    let exits = exits as f64 / begin.elapsed().as_secs_f64();
    let latencies = runtime.block_on(async {
        let mut all = Vec::new();
        for (address, container) in agents.iter().cycle().take(3 * agents.len()) {
            let tasks = connect(address).await?;
            let request = PidsRequest {
                id: container.clone(),
            };
            let begin = Instant::now();
            tasks.pids(&request).await.context("call to an agent")?;
            all.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        anyhow::Ok(all)
    })?;
    Ok(Seen { exits, latencies })
}

/// Whole tasks through one pod, [`RATE`] a second or as many as there can be.
fn run_tasks(address: &Path, stop: &AtomicBool, done: &AtomicUsize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = image(dir.path(), "dot", &wat::parse_str(DOT)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let begin = Instant::now();
        let client = async |client: usize| -> Result<()> {
            let tasks = connect(address).await?;
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let due = begin + Duration::from_secs_f64((n * CLIENTS) as f64 / RATE as f64);
                tokio::time::sleep_until(due.into()).await;
                let id = format!("t{client}-{n}");
                let bundle = bundle(dir.path(), &id, &image, &["/app.wasm"], |_| ())?;
                let own = bundle.create.bundle.clone();
                let (code, out, err) = run_task(&tasks, bundle).await?;
                if (code, out.as_str()) != (0, ".") {
                    bail!("a task ended with {code}, output {out:?}{err:?}");
                }
                std::fs::remove_dir_all(own)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        tokio::try_join!(client(0), client(1), client(2), client(3)).map(drop)
    })
}
