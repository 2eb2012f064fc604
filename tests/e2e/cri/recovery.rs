//! Daemons that die and come back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{IoType, Node};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;

pub const TESTS: &[Test] = &[
    ("containerd_restarts", true, containerd_restarts),
    ("sandboxer_is_killed", false, sandboxer_is_killed),
    (
        "sandboxer_is_killed_at_start",
        false,
        sandboxer_is_killed_at_start,
    ),
    (
        "sandboxer_is_killed_at_each_step",
        false,
        sandboxer_is_killed_at_each_step,
    ),
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

/// The same pod with a connection to the containerd of now.
struct Reconnected(TestPod);

impl Reconnected {
    fn new(node: &Node, handler: &str, mut pod: TestPod) -> Result<Self> {
        let id = std::mem::take(&mut pod.id);
        Ok(Self(TestPod {
            cri: node.cri(handler)?,
            config: pod.config.clone(),
            id,
        }))
    }
}

fn until_lost(pod: &TestPod, c: &str) -> Result<()> {
    let status = pod.cri.wait_exit(c, PATIENCE)?;
    ensure!(status.exit_code != 0, "{status:?}");
    let begin = Instant::now();
    while pod.cri.pod_status(&pod.id)?.state != SANDBOX_NOTREADY {
        ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Its VMs end with it: containerd learns that, nothing is left, new pods start.
fn sandboxer_is_killed(node: &mut Node, handler: &str) -> Result<()> {
    let pods = [
        TestPod::run(node, handler, pod("killed1"))?,
        TestPod::run(node, handler, pod("killed2"))?,
    ];
    let containers = [pods[0].sleeper("c")?, pods[1].sleeper("c")?];
    node.kill_sandboxer();
    node.start_sandboxer()?;
    for (pod, c) in pods.iter().zip(&containers) {
        until_lost(pod, c)?;
    }
    for pod in pods {
        pod.remove()?;
    }
    let new = TestPod::run(node, handler, pod("after"))?;
    let c = new.sleeper("c")?;
    ensure!(new.sh(&c, "echo new")? == "new\n");
    new.remove()?;
    left(node)
}

/// In the middle of a pod's start.
fn sandboxer_is_killed_at_start(node: &mut Node, handler: &str) -> Result<()> {
    for delay in [100, 400, 900] {
        let cri = node.cri(handler)?;
        let starting = std::thread::spawn(move || cri.run_pod(&pod("halfway")));
        std::thread::sleep(Duration::from_millis(delay));
        node.kill_sandboxer();
        node.start_sandboxer()?;
        let started = starting.join().map_err(|_| anyhow::anyhow!("thread"))?;
        let cri = node.cri(handler)?;
        for p in cri.pods()? {
            cri.stop_pod(&p.id)?;
            cri.remove_pod(&p.id)?;
        }
        println!(
            "  after {delay} ms: {:?}",
            started.map_err(|e| format!("{e:#}").len()).is_ok()
        );
    }
    let new = TestPod::run(node, handler, pod("halfway"))?;
    new.remove()?;
    left(node)
}

/// What a pod has gone through when the sandboxer dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Step {
    PodRuns,
    ContainerCreated,
    ExecRuns,
    ContainerExited,
    PodStops,
    PodStopped,
}

/// Whatever it was doing: kubelet's clean-up works, and nothing is left.
fn sandboxer_is_killed_at_each_step(node: &mut Node, handler: &str) -> Result<()> {
    for step in [
        Step::PodRuns,
        Step::ContainerCreated,
        Step::ExecRuns,
        Step::ContainerExited,
        Step::PodStops,
        Step::PodStopped,
    ] {
        kill_at(step, node, handler).with_context(|| format!("{step:?}"))?;
        left(node).with_context(|| format!("{step:?}"))?;
    }
    let new = TestPod::run(node, handler, pod("after-all"))?;
    new.remove()
}

fn kill_at(step: Step, node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("step"))?;
    let mut busy = None;
    if step >= Step::ContainerCreated {
        let spec = container("c", "busybox", &["sleep", "100000"]);
        let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
        if step >= Step::ExecRuns {
            pod.cri.start(&c)?;
        }
        if step == Step::ExecRuns {
            let (cri, id) = (node.cri(handler)?, c.clone());
            let sleep = std::thread::spawn(move || drop(cri.exec(&id, &["sleep", "98765"])));
            pod.until(&c, "ps | grep '[9]8765'", "98765")?;
            busy = Some(sleep);
        }
        if step == Step::ContainerExited {
            pod.cri.stop(&c, 0)?;
        }
    }
    match step {
        Step::PodStops => {
            let (cri, id) = (node.cri(handler)?, pod.id.clone());
            busy = Some(std::thread::spawn(move || drop(cri.stop_pod(&id))));
        }
        Step::PodStopped => pod.cri.stop_pod(&pod.id)?,
        _ => {}
    }
    node.kill_sandboxer();
    node.start_sandboxer()?;
    if let Some(busy) = busy {
        // The call ends, with whatever answer.
        busy.join().map_err(|_| anyhow::anyhow!("thread"))?;
    }
    let begin = Instant::now();
    while pod.cri.pod_status(&pod.id)?.state != SANDBOX_NOTREADY {
        ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    pod.remove()
}

/// As systemd does it.
fn sandboxer_restarts(node: &mut Node, handler: &str) -> Result<()> {
    let pod1 = TestPod::run(node, handler, pod("term"))?;
    let c = pod1.sleeper("c")?;
    node.terminate_sandboxer()?;
    node.start_sandboxer()?;
    until_lost(&pod1, &c)?;
    pod1.remove()?;
    let new = TestPod::run(node, handler, pod("term2"))?;
    new.remove()?;
    left(node)
}

/// Nothing of pods is on the host.
fn left(node: &Node) -> Result<()> {
    let entries = |dir: &str| std::fs::read_dir(dir).map_or(0, Iterator::count);
    ensure!(entries("/run/bulkhead/pods") == 0, "state is left");
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", node.sandboxer_pid()))?;
    ensure!(
        !mounts.contains("/run/bulkhead/pods"),
        "mounts are left: {mounts}"
    );
    ensure!(entries("/run/netns") == 0, "network namespaces are left");
    Ok(())
}
