//! Pods of ordinary containers, beside those in sandboxes: what is asked of every runtime, and what
//! is left when the sandboxer or a pod's agent is killed.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{Node, PROCESS};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, pod};
use bulkhead_tests::env::PATIENCE;

use super::host::Host;
use super::{Test, basic, validation, wide};

pub const TESTS: &[Test] = &[
    ("process_pod", false, |node, _| {
        basic::first_pod(node, PROCESS)
    }),
    ("process_nothing_is_left", false, |node, _| {
        basic::come_and_go(node, PROCESS, 3)
    }),
    ("process_volumes", false, |node, _| {
        wide::volumes(node, PROCESS)
    }),
    ("process_mounts_below_volumes", false, |node, _| {
        validation::mounts_below_volumes(node, PROCESS)
    }),
    ("process_security_context", false, |node, _| {
        wide::security_context(node, PROCESS)
    }),
    ("process_seccomp_profiles", false, |node, _| {
        validation::seccomp_profiles(node, PROCESS)
    }),
    ("process_limits_and_stats", false, |node, _| {
        wide::limits_and_stats(node, PROCESS)
    }),
    ("process_processes_of_a_pod", false, |node, _| {
        validation::processes_of_a_pod(node, PROCESS)
    }),
    ("process_interactive_exec", false, |node, _| {
        wide::interactive_exec(node, PROCESS)
    }),
    ("process_port_forward", false, |node, _| {
        wide::port_forward(node, PROCESS)
    }),
    ("process_host_network", false, host_network),
    ("process_refusals", false, refusals),
    ("process_agent_is_killed", false, agent_is_killed),
    ("process_sandboxer_is_killed", false, sandboxer_is_killed),
];

fn with_namespaces(name: &str, options: NamespaceOption) -> PodSandboxConfig {
    let mut wish = pod(name);
    let security = &mut wish.linux.get_or_insert_default().security_context;
    security.get_or_insert_default().namespace_options = Some(options);
    wish
}

/// `hostNetwork` and `hostIPC`.
fn host_network(node: &mut Node, _: &str) -> Result<()> {
    let options = NamespaceOption {
        network: 2,
        ipc: 2,
        ..NamespaceOption::default()
    };
    let pod = TestPod::run(node, PROCESS, with_namespaces("hostnet", options.clone()))?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    let security = &mut spec.linux.get_or_insert_default().security_context;
    security.get_or_insert_default().namespace_options = Some(options);
    let c = pod.start(&spec)?;
    for kind in ["net", "ipc"] {
        let hosts = fs::read_link(format!("/proc/self/ns/{kind}"))?;
        let seen = pod.sh(&c, &format!("readlink /proc/self/ns/{kind}"))?;
        ensure!(Path::new(seen.trim()) == hosts, "{kind}: {seen}");
    }
    pod.remove()
}

/// What this kind cannot give is said when the pod is made.
fn refusals(node: &mut Node, _: &str) -> Result<()> {
    let mut sysctl = pod("refused");
    let linux = sysctl.linux.get_or_insert_default();
    linux.sysctls.insert("kernel.panic".into(), "1".into());
    let host_pid = NamespaceOption {
        pid: 2,
        ..NamespaceOption::default()
    };
    for (wish, word) in [
        (sysctl, "whole host"),
        (with_namespaces("refused", host_pid), "hostPID"),
    ] {
        let made = TestPod::run(node, PROCESS, wish).map(TestPod::remove);
        let error = made.err().map(|e| format!("{e:#}")).unwrap_or_default();
        ensure!(error.contains(word), "no {word:?}: {error}");
    }
    Ok(())
}

/// The agents of this host's pods: processes that were started as such.
pub fn agents() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).nth(1) == Some(b"--host")
    })
    .collect()
}

/// Processes of this host whose command line holds some text.
pub fn processes(text: &str) -> usize {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|e| fs::read(e.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(text))
        .count()
}

/// A pod with a container that has a child, and its container.
fn busy(node: &Node, name: &str) -> Result<(TestPod, String)> {
    let pod = TestPod::run(node, PROCESS, pod(name))?;
    let script = "setsid sleep 71717 & exec sleep 71717";
    let c = pod.start(&container("c", "busybox", &["sh", "-c", script]))?;
    pod.until(&c, "ps | grep -c '[7]1717'", "2")?;
    Ok((pod, c))
}

/// The pod has ended with whom containerd asks: 137; or that is gone, too: 255, as it says itself.
pub fn lost(pod: &TestPod, c: &str, codes: &[i32]) -> Result<()> {
    let status = pod.cri.wait_exit(c, PATIENCE)?;
    ensure!(codes.contains(&status.exit_code), "{status:?}");
    let begin = Instant::now();
    while pod.cri.pod_status(&pod.id)?.state != SANDBOX_NOTREADY {
        ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn agent_is_killed(node: &mut Node, _: &str) -> Result<()> {
    TestPod::run(node, PROCESS, pod("first"))?.remove()?;
    let before = Host::settled(node)?;
    ensure!(agents().is_empty(), "agents are left: {:?}", agents());
    let (pod, c) = busy(node, "agent")?;
    let all = agents();
    ensure!(all.len() == 1, "{all:?}");
    let agent = nix::unistd::Pid::from_raw(*all.first().context("no agent")?);
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL)?;
    lost(&pod, &c, &[137])?;
    let log = node.logs();
    let said = |l: &str| l.contains(&pod.id) && l.contains("its agent was killed by SIGKILL");
    ensure!(log.lines().any(said), "{log}");
    ensure!(processes("sleep\u{0}71717") == 0, "processes are left");
    pod.remove()?;
    before.as_before(node).map(drop)
}

fn sandboxer_is_killed(node: &mut Node, _: &str) -> Result<()> {
    TestPod::run(node, PROCESS, pod("first"))?.remove()?;
    node.kill_sandboxer();
    node.start_sandboxer()?;
    TestPod::run(node, PROCESS, pod("first"))?.remove()?;
    let before = Host::settled(node)?;
    let (pod1, c) = busy(node, "daemon")?;
    node.kill_sandboxer();
    // Before anybody cleans up: its pods end with it.
    let begin = Instant::now();
    while processes("sleep\u{0}71717") + agents().len() > 0 {
        ensure!(begin.elapsed() < PATIENCE, "the pod has not ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    node.start_sandboxer()?;
    lost(&pod1, &c, &[137, 255])?;
    let cri = node.cri(PROCESS)?;
    let id = pod1.id.clone();
    // Its connection is to a containerd that has not changed.
    pod1.remove()?;
    ensure!(cri.pods()?.iter().all(|p| p.id != id), "the pod is left");
    TestPod::run(node, PROCESS, pod("next"))?.remove()?;
    before.as_before(node).map(drop)
}
