//! Daemons that die and come back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{IoType, Isolation, Node};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;
use super::host::Host;

pub const TESTS: &[Test] = &[
    ("containerd_restarts", true, containerd_restarts),
    ("ends_without_containerd", false, ends_without_containerd),
    ("sandboxer_is_killed", false, sandboxer_is_killed),
    ("sandboxer_restarts", false, sandboxer_restarts),
];

/// Running pods do not notice.
fn containerd_restarts(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("restart"))?;
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done";
    let spec = container("c", "busybox", &["sh", "-c", script]);
    let c = pod.start(&spec)?;
    pod.until(&c, "echo ready", "ready")?;
    node.kill_containerd();
    node.start_containerd()?;
    let pod = Reconnected::new(node, handler, pod)?.0;
    ensure!(
        pod.cri.status(&c)?.state == CONTAINER_RUNNING,
        "not running"
    );
    ensure!(
        pod.cri.pod_status(&pod.id)?.state == SANDBOX_READY,
        "not ready"
    );
    ensure!(pod.sh(&c, "echo still here")? == "still here\n");
    // No line is lost, and they go on. Of a stream, what containerd had received and not yet
    // written is lost with it: a line here, and nobody can send it again.
    let before = log(&pod.config, &spec)?.0.lines().count();
    let begin = Instant::now();
    loop {
        let text = log(&pod.config, &spec)?.0;
        if text.lines().count() > before + 5 {
            let lines: Vec<usize> = text.lines().filter_map(|l| l.parse().ok()).collect();
            let missing = lines.last().unwrap_or(&0).saturating_sub(lines.len());
            let may_miss = usize::from(node.io == IoType::Streaming);
            ensure!(
                lines.is_sorted_by(|a, b| a < b) && missing <= may_miss,
                "lost or repeated: {text}"
            );
            break;
        }
        ensure!(begin.elapsed() < PATIENCE, "the log has stopped");
        std::thread::sleep(Duration::from_millis(100));
    }
    pod.remove()
}

/// What a container ends with while containerd is away, it is told when it is back.
fn ends_without_containerd(node: &mut Node, handler: &str) -> Result<()> {
    let gate = tempfile::tempdir()?;
    let pod = TestPod::run(node, handler, pod("gone"))?;
    let script = "until [ -e /gate/go ]; do sleep 0.1; done; : > /gate/done; exit 7";
    let mut spec = container("c", "busybox", &["sh", "-c", script]);
    spec.mounts = vec![Mount {
        container_path: "/gate".into(),
        host_path: gate.path().display().to_string(),
        ..Mount::default()
    }];
    let c = pod.start(&spec)?;
    let before = {
        let spec = container("before", "busybox", &["sh", "-c", "exit 5"]);
        let c = pod.start(&spec)?;
        pod.cri.wait_exit(&c, PATIENCE)?;
        c
    };
    node.kill_containerd();
    std::fs::write(gate.path().join("go"), "")?;
    until("its end", || gate.path().join("done").exists())?;
    node.start_containerd()?;
    let pod = Reconnected::new(node, handler, pod)?.0;
    let code = pod.cri.wait_exit(&c, PATIENCE)?.exit_code;
    ensure!(code == 7, "ended with {code}");
    let code = pod.cri.status(&before)?.exit_code;
    ensure!(code == 5, "had ended with {code}");
    pod.remove()
}

/// The same pod with a connection to the containerd of now.
pub struct Reconnected(pub TestPod);

impl Reconnected {
    pub fn new(node: &Node, handler: &str, mut pod: TestPod) -> Result<Self> {
        let id = std::mem::take(&mut pod.id);
        Ok(Self(TestPod {
            cri: node.cri(handler)?,
            config: pod.config.clone(),
            id,
        }))
    }
}

pub fn until_lost(pod: &TestPod, c: &str) -> Result<()> {
    let status = pod.cri.wait_exit(c, PATIENCE)?;
    ensure!(status.exit_code != 0, "{status:?}");
    let begin = Instant::now();
    while pod.cri.pod_status(&pod.id)?.state != SANDBOX_NOTREADY {
        ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// What pods are going through when the sandboxer dies.
struct Moment {
    name: &'static str,
    /// Brings pods there. Gives those that exist, and calls that are under way.
    reach: fn(&mut Node, &str) -> Result<Reached>,
}

#[derive(Default)]
struct Reached {
    pods: Vec<TestPod>,
    /// Containers of those pods that were running.
    lost: Vec<(usize, String)>,
    calls: Vec<std::thread::JoinHandle<()>>,
}

const MOMENTS: &[Moment] = &[
    Moment {
        name: "a pod has been created",
        reach: created,
    },
    Moment {
        name: "a VM boots",
        reach: boots,
    },
    Moment {
        name: "pods are in use",
        reach: in_use,
    },
    Moment {
        name: "a guest is asked to go down",
        reach: stops,
    },
    Moment {
        name: "a VM is taken down",
        reach: taken_down,
    },
    Moment {
        name: "a pod is removed",
        reach: removed,
    },
];

/// Looks until something is so; what is waited for lasts only moments.
pub fn until(what: &str, so: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !so() {
        ensure!(begin.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

pub fn pod_directories() -> Vec<PathBuf> {
    // Of all kinds.
    let kinds = ["pods", "apps", "wasm", "host"];
    let entries = kinds.map(|kind| std::fs::read_dir(format!("/run/bulkhead/{kind}")));
    let entries = entries.into_iter().flatten().flatten().flatten();
    entries.map(|e| e.path()).collect()
}

fn starting(node: &Node, handler: &str) -> Result<std::thread::JoinHandle<()>> {
    let cri = node.cri(handler)?;
    // Its answer is whatever containerd makes of the end.
    Ok(std::thread::spawn(move || {
        drop(cri.run_pod(&pod("halfway")));
    }))
}

fn created(node: &mut Node, handler: &str) -> Result<Reached> {
    let call = starting(node, handler)?;
    until("a pod's record", || {
        pod_directories()
            .iter()
            .any(|d| d.join("state.json").exists())
    })?;
    Ok(Reached {
        calls: vec![call],
        ..Reached::default()
    })
}

fn boots(node: &mut Node, handler: &str) -> Result<Reached> {
    let call = starting(node, handler)?;
    let (tasks, wanted) = match node.isolation() {
        Isolation::Thread => (format!("/proc/{}/task", node.sandboxer_pid()), "vcpu"),
        Isolation::Process => ("/proc".to_owned(), "bulkhead-worker"),
    };
    until("a thread of a CPU, or a worker", || {
        let threads = std::fs::read_dir(&tasks).into_iter().flatten().flatten();
        threads
            .filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok())
            .any(|name| name.starts_with(wanted))
    })?;
    Ok(Reached {
        calls: vec![call],
        ..Reached::default()
    })
}

/// All that lasts, in one go: pods empty, with a container made, running with an Exec, ended, and
/// a pod that is stopped.
fn in_use(node: &mut Node, handler: &str) -> Result<Reached> {
    let empty = TestPod::run(node, handler, pod("empty"))?;
    let busy = TestPod::run(node, handler, pod("busy"))?;
    let stopped = TestPod::run(node, handler, pod("stopped"))?;
    let spec = container("made", "busybox", &["sleep", "100000"]);
    busy.cri.create(&busy.id, &busy.config, &spec)?;
    let ended = busy.sleeper("ended")?;
    busy.cri.stop(&ended, 0)?;
    let c = busy.sleeper("running")?;
    let (cri, id) = (node.cri(handler)?, c.clone());
    let exec = std::thread::spawn(move || drop(cri.exec(&id, &["sleep", "98765"])));
    busy.until(&c, "ps | grep '[9]8765'", "98765")?;
    stopped.sleeper("c")?;
    stopped.cri.stop_pod(&stopped.id)?;
    Ok(Reached {
        pods: vec![empty, busy, stopped],
        lost: vec![(1, c)],
        calls: vec![exec],
    })
}

fn stopping(node: &Node, handler: &str) -> Result<(TestPod, String, Reached)> {
    let pod = TestPod::run(node, handler, pod("stops"))?;
    let c = pod.sleeper("c")?;
    let (cri, id) = (node.cri(handler)?, pod.id.clone());
    let call = std::thread::spawn(move || drop(cri.stop_pod(&id)));
    let reached = Reached {
        calls: vec![call],
        ..Reached::default()
    };
    Ok((pod, c, reached))
}

fn stops(node: &mut Node, handler: &str) -> Result<Reached> {
    let (pod, c, mut reached) = stopping(node, handler)?;
    // containerd ends the containers first, then the sandbox.
    until("the container's end", || {
        pod.cri
            .status(&c)
            .is_ok_and(|s| s.state == CONTAINER_EXITED)
    })?;
    reached.pods.push(pod);
    Ok(reached)
}

fn taken_down(node: &mut Node, handler: &str) -> Result<Reached> {
    let (pod, _, mut reached) = stopping(node, handler)?;
    // The first thing that goes.
    until("the debug socket's end", || {
        std::fs::read_dir("/run/bulkhead/vms").map_or(0, Iterator::count) == 0
    })?;
    reached.pods.push(pod);
    Ok(reached)
}

fn removed(node: &mut Node, handler: &str) -> Result<Reached> {
    let pod = TestPod::run(node, handler, pod("removed"))?;
    pod.sleeper("c")?;
    pod.cri.stop_pod(&pod.id)?;
    let (cri, id) = (node.cri(handler)?, pod.id.clone());
    let call = std::thread::spawn(move || drop(cri.remove_pod(&id)));
    let directory = Path::new("/run/bulkhead/pods").join(&pod.id);
    until("the record's end", || {
        !directory.join("state.json").exists()
    })?;
    Ok(Reached {
        pods: vec![pod],
        calls: vec![call],
        ..Reached::default()
    })
}

/// Whatever it was doing: its VMs end with it, containerd learns that, kubelet's clean-up works,
/// nothing is left, and new pods start.
fn sandboxer_is_killed(node: &mut Node, handler: &str) -> Result<()> {
    // What a sandboxer has that has just been started and used once.
    let again = |node: &mut Node| -> Result<()> {
        node.kill_sandboxer();
        node.start_sandboxer()
    };
    let fresh = |node: &Node| TestPod::run(node, handler, pod("fresh"))?.remove();
    again(node)?;
    fresh(node)?;
    let before = Host::settled(node)?;
    // Once they are started, pods in processes go on: see `worker.rs`.
    let moments = match node.isolation() {
        Isolation::Thread => MOMENTS,
        Isolation::Process => &MOMENTS[..2],
    };
    for moment in moments {
        let begin = Instant::now();
        let reached = (moment.reach)(node, handler).context(moment.name)?;
        again(node)?;
        clean_up(node, handler, reached).context(moment.name)?;
        fresh(node).context(moment.name)?;
        before.as_before(node).context(moment.name)?;
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "  killed while {}: nothing is left ({seconds:.1} s)",
            moment.name
        );
    }
    Ok(())
}

/// What kubelet does when it finds that pods have ended.
fn clean_up(node: &Node, handler: &str, reached: Reached) -> Result<()> {
    for call in reached.calls {
        // They end, with whatever answer.
        call.join().map_err(|_| anyhow::anyhow!("thread"))?;
    }
    for (index, c) in &reached.lost {
        let pod = reached.pods.get(*index).context("no such pod")?;
        until_lost(pod, c)?;
    }
    let cri = node.cri(handler)?;
    for mut pod in reached.pods {
        let id = std::mem::take(&mut pod.id);
        let begin = Instant::now();
        // Not there: it was removed in time.
        while pod
            .cri
            .pod_status(&id)
            .is_ok_and(|s| s.state != SANDBOX_NOTREADY)
        {
            ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
            std::thread::sleep(Duration::from_millis(100));
        }
        cri.stop_pod(&id)?;
        cri.remove_pod(&id)?;
    }
    // Those that were being started.
    for pod in cri.pods()? {
        cri.stop_pod(&pod.id)?;
        cri.remove_pod(&pod.id)?;
    }
    Ok(())
}

/// As systemd does it.
fn sandboxer_restarts(node: &mut Node, handler: &str) -> Result<()> {
    let pod1 = TestPod::run(node, handler, pod("term"))?;
    let c = pod1.sleeper("c")?;
    node.terminate_sandboxer()?;
    node.start_sandboxer()?;
    match node.isolation() {
        Isolation::Thread => until_lost(&pod1, &c)?,
        // It is none of the daemon's.
        Isolation::Process => ensure!(pod1.sh(&c, "echo well")? == "well\n"),
    }
    pod1.remove()?;
    let new = TestPod::run(node, handler, pod("term2"))?;
    new.remove()?;
    ensure!(pod_directories().is_empty(), "state is left");
    Ok(())
}
