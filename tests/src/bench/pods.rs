//! Pods by stock containerd: how long their steps take and what they cost the host, beside runc
//! and crun through the same containerd in the same run.
//!
//! What a pod costs beside its programs is, of ours, all of the daemon but the guests' memory; of
//! the peers, the shim and the pause process. containerd itself is counted for nobody.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::report::{Goal, Report};
use crate::cri::containerd::{APP, IoType, Isolation, Node, OURS};
use crate::cri::{TestPod, pod};
use crate::process;

const RUNC: &str = "runc";
const CRUN: &str = "crun";
/// Samples of what one pod takes.
const ROUNDS: usize = 5;
/// Pods that start at the same time.
const AT_ONCE: usize = 20;
/// Numbers of pods whose memory is compared.
const CROWDS: [usize; 3] = [1, 10, 50];
/// Pods whose processes are measured, beyond a first one.
const ISOLATED: usize = 8;
/// Least memory of a guest: files that large which the daemon maps are guests' memory.
const GUEST_BYTES: u64 = 64 << 20;
/// A pod rests before its exits are counted, and for how long they are.
const REST: Duration = Duration::from_secs(15);
const WATCHED: Duration = Duration::from_secs(10);
/// Bytes that are sent through a connection.
const SENT_MIB: u64 = 64;
/// The node's address on the bridge of its pods.
const GATEWAY: &str = "10.77.0.1";
const COMMAND: &str = "bench pods";

/// Milliseconds of the steps of one pod's life.
#[derive(Debug, Default)]
struct Steps {
    /// Pod, container and start together.
    started: Vec<f64>,
    exec: Vec<f64>,
    gone: Vec<f64>,
}

/// What some pods add to the host.
#[derive(Debug)]
struct Cost {
    /// In KiB.
    pss: f64,
    processes: f64,
    threads: f64,
}

/// Parts of the benchmark, in the order in which they run.
pub const PARTS: [&str; 6] = ["steps", "at-once", "idle", "tcp", "crowds", "isolated"];

/// Runs these parts. Needs a host that may be changed: the lab.
///
/// # Errors
/// A daemon does not start, or a pod does not run.
pub fn run(sandboxer: &Path, parts: &[String]) -> Result<Report> {
    let version = version(RUNC)?;
    let mut report = Report::new("pods", RUNC, &version);
    let mut node = None;
    for part in parts {
        // These have nodes of their own.
        if part == "isolated" || part == "tcp" {
            drop(node.take());
            match part.as_str() {
                "tcp" => throughput(sandboxer, &mut report)?,
                _ => isolated(sandboxer, &mut report, &version)?,
            }
            continue;
        }
        let node = match &mut node {
            Some(node) => node,
            none => none.insert(Node::start(sandboxer, &["busybox"], IoType::Fifo)?),
        };
        match part.as_str() {
            "steps" => one_by_one(node, &mut report, &version)?,
            "at-once" => {
                for handler in [OURS, APP] {
                    eprintln!("{AT_ONCE} pods at once");
                    let (own, its) = (at_once(node, handler)?, at_once(node, RUNC)?);
                    let what = format!("{AT_ONCE} pods at once, until all run, {handler}");
                    report.add(&what, "ms", &[own], &[its], limit(handler, 2.5), COMMAND);
                }
            }
            "idle" => idle(node, &mut report)?,
            "crowds" => {
                for handler in [OURS, APP] {
                    crowds(node, &mut report, handler)?;
                }
            }
            other => bail!("unknown part {other}: {}", PARTS.join(", ")),
        }
    }
    Ok(report)
}

/// Goals are for pods in a microVM.
fn limit(handler: &str, ratio: f64) -> Goal {
    match handler {
        OURS => Goal::Ratio(ratio),
        _ => Goal::Shown,
    }
}

/// What one pod takes, beside runc's and crun's.
fn one_by_one(node: &Node, report: &mut Report, version: &str) -> Result<()> {
    let of = |handler: &str| -> Result<Steps> {
        eprintln!("{handler}: one pod after the other");
        steps(node, handler)
    };
    let (ours, app, runc, crun) = (of(OURS)?, of(APP)?, of(RUNC)?, of(CRUN)?);
    for (handler, own) in [(OURS, &ours), (APP, &app)] {
        for (peer, its) in [(RUNC, &runc), (CRUN, &crun)] {
            let goal = if peer == RUNC {
                limit(handler, 2.0)
            } else {
                Goal::Shown
            };
            report.beside(peer, if peer == RUNC { version } else { "" });
            let mut add = |what: &str, own: &[f64], its: &[f64], goal: Goal| {
                let what = format!("{what}, {handler} / {peer}");
                report.add(&what, "ms", own, its, goal, COMMAND);
            };
            add("pod run + create + start", &own.started, &its.started, goal);
            add("exec of true", &own.exec, &its.exec, goal);
            add("pod stop + remove", &own.gone, &its.gone, Goal::Shown);
        }
    }
    report.beside(RUNC, version);
    Ok(())
}

/// The first line of what a program says of its version, its last word.
fn version(program: &str) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .context(program.to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
}

fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

fn steps(node: &Node, handler: &str) -> Result<Steps> {
    let mut all = Steps::default();
    for round in 0..=ROUNDS {
        let begin = Instant::now();
        let pod = TestPod::run(node, handler, pod(&format!("bench-{handler}-{round}")))?;
        let c = pod.sleeper("c")?;
        let started = ms(begin);
        let begin = Instant::now();
        let answer = pod.cri.exec(&c, &["true"])?;
        ensure!(answer.exit_code == 0, "{answer:?}");
        let exec = ms(begin);
        let begin = Instant::now();
        pod.cri.stop(&c, 0)?;
        pod.remove()?;
        // The first one is to find everything in the host's caches.
        if round > 0 {
            all.started.push(started);
            all.exec.push(exec);
            all.gone.push(ms(begin));
        } else {
            // Nor is it to be a copy of a VM, nor the next one to run beside the making of that.
            node.templates_made()?;
        }
    }
    Ok(all)
}

/// Milliseconds until all of [`AT_ONCE`] pods run.
fn at_once(node: &Node, handler: &str) -> Result<f64> {
    TestPod::run(node, handler, pod("before-all"))?.remove()?;
    node.templates_made()?;
    let begin = Instant::now();
    let pods: Vec<TestPod> = thread::scope(|scope| {
        let started: Vec<_> = (0..AT_ONCE)
            .map(|n| {
                scope.spawn(move || -> Result<TestPod> {
                    let pod = TestPod::run(node, handler, pod(&format!("once-{handler}-{n}")))?;
                    pod.sleeper("c")?;
                    Ok(pod)
                })
            })
            .collect();
        started
            .into_iter()
            .map(|t| t.join().map_err(|_| anyhow!("a thread panicked"))?)
            .collect::<Result<_>>()
    })?;
    let took = ms(begin);
    for pod in pods {
        pod.remove()?;
    }
    Ok(took)
}

/// Exits of a pod that does nothing, and how often the daemon wakes up for nothing.
fn idle(node: &Node, report: &mut Report) -> Result<()> {
    let without_pods = wakeups(node)?;
    eprintln!("one pod that rests");
    for (handler, goal) in [(OURS, Goal::Value(10.0)), (APP, Goal::Value(10.0))] {
        let pod = TestPod::run(node, handler, pod("idle"))?;
        pod.sleeper("c")?;
        node.templates_made()?;
        thread::sleep(REST);
        let vms = process::kvm_directories(node.sandboxer_pid())?;
        let exits = |vms: &[_]| process::kvm_counter(vms, "exits");
        let before = exits(&vms)?;
        thread::sleep(WATCHED);
        let a_second = (exits(&vms)? - before) as f64 / WATCHED.as_secs_f64();
        let what = format!("exits of an idle pod, {handler}");
        report.add(&what, "1/s", &[a_second], &[], goal, COMMAND);
        let what = format!("wake-ups of the daemon beside that pod's CPU, {handler}");
        report.add(&what, "1/s", &[wakeups(node)?], &[], Goal::Shown, COMMAND);
        pod.remove()?;
    }
    let goal = Goal::Value(0.0);
    report.add(
        "wake-ups of the daemon without pods",
        "1/s",
        &[without_pods],
        &[],
        goal,
        COMMAND,
    );
    Ok(())
}

/// How often a second threads of the daemon wake up, without those that run guests' CPUs.
fn wakeups(node: &Node) -> Result<f64> {
    let count = || -> Result<u64> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", node.sandboxer_pid()))? {
            // A thread may end while we look.
            let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
                continue;
            };
            let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name));
            let name = field("Name:").unwrap_or_default().trim();
            if !name.starts_with("vcpu") && !name.starts_with("kvm-nx") {
                let count = field("voluntary_ctxt_switches:").unwrap_or_default().trim();
                sum += count.parse::<u64>().unwrap_or(0);
            }
        }
        Ok(sum)
    };
    let before = count()?;
    thread::sleep(WATCHED);
    Ok(count()?.saturating_sub(before) as f64 / WATCHED.as_secs_f64())
}

/// MiB a second through a TCP connection: pod to node, node to pod, pod to pod; as pods are by default,
/// without offloads, and with the host's kernel at the queues.
fn throughput(sandboxer: &Path, report: &mut Report) -> Result<()> {
    let of = |node: &Node, handler: &str| -> Result<[f64; 3]> {
        let one = TestPod::run(node, handler, pod("from"))?;
        let from = one.sleeper("c")?;
        let other = TestPod::run(node, handler, pod("to"))?;
        let to = other.sleeper("c")?;
        let send = format!(
            "dd if=/dev/zero bs=65536 count={} 2>/dev/null",
            SENT_MIB * 16
        );
        let rate = |begin: Instant| SENT_MIB as f64 / begin.elapsed().as_secs_f64();

        let listener = TcpListener::bind((GATEWAY, 0))?;
        let port = listener.local_addr()?.port();
        let taker = thread::spawn(move || -> Result<f64> {
            let (stream, _) = listener.accept()?;
            let begin = Instant::now();
            swallow(stream)?;
            Ok(rate(begin))
        });
        one.sh(&from, &format!("{send} | nc {GATEWAY} {port}"))?;
        let to_node = taker.join().map_err(|_| anyhow!("a thread panicked"))??;

        let listener = TcpListener::bind((GATEWAY, 0))?;
        let port = listener.local_addr()?.port();
        let giver = thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            let block = vec![0; 1 << 16];
            for _ in 0..SENT_MIB * 16 {
                stream.write_all(&block)?;
            }
            Ok(())
        });
        let begin = Instant::now();
        let got = one.sh(&from, &format!("nc {GATEWAY} {port} < /dev/null | wc -c"))?;
        let from_node = rate(begin);
        giver.join().map_err(|_| anyhow!("a thread panicked"))??;
        ensure!(got.trim() == (SENT_MIB << 20).to_string(), "{got} bytes");

        other.sh(&to, "nc -l -p 7000 > /dev/null 2>&1 & sleep 1")?;
        let ip = other
            .cri
            .pod_status(&other.id)?
            .network
            .context("no network")?
            .ip;
        let begin = Instant::now();
        one.sh(&from, &format!("{send} | nc {ip} 7000"))?;
        let to_pod = rate(begin);
        one.remove()?;
        other.remove()?;
        Ok([to_node, from_node, to_pod])
    };
    let mut its = None;
    for (name, lines) in [
        ("", ""),
        (", without offloads", "net_offload = false"),
        (", vhost-net", "vhost_net = true"),
    ] {
        eprintln!("TCP{name}");
        let node = Node::start_tuned(lines, sandboxer, &["busybox"], IoType::Fifo)?;
        let its = match its {
            Some(its) => its,
            None => *its.insert(of(&node, RUNC)?),
        };
        for handler in [OURS, APP] {
            // The app kernel's pods have no such settings.
            if handler == APP && !name.is_empty() {
                continue;
            }
            let own = of(&node, handler)?;
            let ways = ["pod to node", "node to pod", "pod to pod"];
            for (n, way) in ways.into_iter().enumerate() {
                let what = format!("TCP, {way}, {handler}{name}");
                report.add(&what, "MiB/s", &[own[n]], &[its[n]], Goal::Shown, COMMAND);
            }
        }
    }
    Ok(())
}

fn swallow(mut stream: TcpStream) -> Result<()> {
    let mut block = vec![0; 1 << 16];
    while stream.read(&mut block)? > 0 {}
    Ok(())
}

/// What 1, 10, 50 pods cost the host beside their programs.
fn crowds(node: &Node, report: &mut Report, handler: &str) -> Result<()> {
    let of = |handler: &str| -> Result<Vec<Cost>> {
        let nobody = cost(node, handler, 0)?;
        let (mut pods, mut costs) = (Vec::new(), Vec::new());
        for count in CROWDS {
            eprintln!("{handler}: {count} pods");
            while pods.len() < count {
                let name = format!("crowd-{handler}-{}", pods.len());
                let pod = TestPod::run(node, handler, pod(&name))?;
                pod.sleeper("c")?;
                pods.push(pod);
            }
            let mut now = cost(node, handler, count)?;
            now.processes -= nobody.processes;
            now.threads -= nobody.threads;
            costs.push(now);
        }
        for pod in pods {
            pod.remove()?;
        }
        // The daemon is there without a pod too.
        costs.insert(0, nobody);
        Ok(costs)
    };
    let (own, its) = (of(handler)?, of(RUNC)?);
    let goals = handler == OURS;
    let mib = |kib: f64| kib / 1024.0;
    let last = CROWDS.len();
    for (n, count) in CROWDS.iter().enumerate() {
        let (own, its) = (&own[n + 1], &its[n + 1]);
        let goal = if goals { Goal::Ratio(1.0) } else { Goal::Shown };
        let what = format!("PSS for {count} pods, {handler}");
        report.add(
            &what,
            "MiB",
            &[mib(own.pss)],
            &[mib(its.pss)],
            goal,
            COMMAND,
        );
    }
    let each = |of: &[Cost], what: fn(&Cost) -> f64| {
        (what(&of[last]) - what(&of[1])) / (CROWDS[last - 1] - CROWDS[0]) as f64
    };
    let goal = |value: f64| {
        if goals {
            Goal::Value(value)
        } else {
            Goal::Shown
        }
    };
    let mut add = |what: &str, unit: &str, of: fn(&Cost) -> f64, goal: Goal| {
        let what = format!("{what}, {handler}");
        report.add(
            &what,
            unit,
            &[each(&own, of)],
            &[each(&its, of)],
            goal,
            COMMAND,
        );
    };
    add(
        "PSS of each further pod",
        "MiB",
        |c| c.pss / 1024.0,
        goal(2.0),
    );
    add(
        "processes of each further pod",
        "1",
        |c| c.processes,
        goal(0.0),
    );
    add(
        "threads of each further pod",
        "1",
        |c| c.threads,
        Goal::Shown,
    );
    let what = format!("PSS without pods, {handler}");
    report.add(&what, "MiB", &[mib(own[0].pss)], &[], Goal::Shown, COMMAND);
    Ok(())
}

/// What is on the host for `pods` pods of a runtime, without containerd and the pods' programs.
fn cost(node: &Node, handler: &str, pods: usize) -> Result<Cost> {
    let daemon = node.sandboxer_pid();
    let ours = handler != RUNC;
    let mut cost = Cost {
        pss: 0.0,
        processes: 0.0,
        threads: 0.0,
    };
    if ours {
        let memory = process::memory_beside_files(daemon, GUEST_BYTES)?;
        cost.pss = memory.pss as f64;
        cost.threads = process::threads(daemon)? as f64;
    }
    let mut helpers = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        // Threads of the kernel have none; a process may end while we look.
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // Pause is `sleep` with another number than the container's program.
        if line.contains("containerd-shim-") || line.trim_end().ends_with("/bin/sleep 1000000") {
            helpers.insert(pid);
        }
    }
    for pid in &helpers {
        cost.pss += process::memory_beside_files(*pid, GUEST_BYTES)?.pss as f64;
        cost.threads += process::threads(*pid)? as f64;
    }
    cost.processes = helpers.len() as f64;
    ensure!(
        ours || helpers.len() == 2 * pods,
        "{} shims and pause processes for {pods} pods of {handler}",
        helpers.len()
    );
    Ok(cost)
}

/// What a pod costs more when it has processes of its own, in memory and in time.
fn isolated(sandboxer: &Path, report: &mut Report, version: &str) -> Result<()> {
    let mut found = Vec::new();
    for isolation in [Isolation::Thread, Isolation::Process] {
        let node = Node::start_isolated(isolation, sandboxer, &["busybox"], IoType::Fifo)?;
        for handler in [OURS, APP] {
            eprintln!("{handler}: {isolation:?}s");
            let started = steps(&node, handler)?.started;
            let mut pods = vec![TestPod::run(&node, handler, pod("first"))?];
            let one = own_pss(&node, isolation, 1)?;
            for n in 0..ISOLATED {
                pods.push(TestPod::run(&node, handler, pod(&format!("isolated-{n}")))?);
            }
            let all = own_pss(&node, isolation, pods.len())?;
            for pod in pods {
                pod.remove()?;
            }
            found.push((started, (all - one) / 1024.0 / ISOLATED as f64));
        }
    }
    let (threads, processes) = found.split_at(2);
    for (n, handler) in [OURS, APP].into_iter().enumerate() {
        let ((fast, few), (slow, more)) = (&threads[n], &processes[n]);
        let what = format!("PSS of each further pod in processes of its own, {handler}");
        report.beside("threads of the daemon", "");
        report.add(&what, "MiB", &[*more], &[*few], Goal::Shown, COMMAND);
        let what = format!("the same, beyond a pod in threads, {handler}");
        report.add(&what, "MiB", &[more - few], &[], Goal::Value(4.0), COMMAND);
        let what = format!("pod run + create + start, processes / threads, {handler}");
        report.add(&what, "ms", slow, fast, Goal::Shown, COMMAND);
    }
    report.beside(RUNC, version);
    Ok(())
}

/// KiB of the daemon, and of its pods' processes, without guests.
fn own_pss(node: &Node, isolation: Isolation, pods: usize) -> Result<f64> {
    let mut sum = process::memory_beside_files(node.sandboxer_pid(), GUEST_BYTES)?.pss;
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        // A process may end while we look.
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if matches!(comm.trim_end(), "sandboxer-pod" | "bulkhead-worker") {
            count += 1;
            sum += process::memory_beside_files(pid, GUEST_BYTES)?.pss;
        }
    }
    let expected = match isolation {
        Isolation::Thread => 0,
        Isolation::Process => 2 * pods,
    };
    ensure!(
        count == expected,
        "{count} processes for {pods} pods, {isolation:?}"
    );
    Ok(sum as f64)
}
