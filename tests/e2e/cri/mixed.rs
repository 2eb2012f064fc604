//! Wasm pods with ordinary containers beside the programs, and what both are asked for by CRI.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_fixtures::component;
use bulkhead_tests::cri::containerd::{Isolation, Node, WASM};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;
use bulkhead_tests::wasm::HELLO_BODY;

use super::Test;
use super::host::Host;
use super::process::{agents, lost, processes};
use super::wasm::LOOP;
use super::wide::forwarded;

pub const TESTS: &[Test] = &[
    ("wasm_mixed_pod", false, mixed_pod),
    ("wasm_mixed_pod_ends", false, ends),
];

/// What serves `/x` to its pod's loopback.
const SIDECAR: &str =
    "mkdir -p /tmp/www; echo beside > /tmp/www/x; exec httpd -f -p 127.0.0.1:8081 -h /tmp/www";

/// A directory with the programs.
fn programs() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::copy(component::http()?, dir.path().join("server.wasm"))?;
    fs::copy(component::ask()?, dir.path().join("ask.wasm"))?;
    fs::write(dir.path().join("loop.wasm"), wat::parse_str(LOOP)?)?;
    fs::write(dir.path().join("broken.wasm"), "#!/bin/sh\n")?;
    Ok(dir)
}

/// A container of one of them.
fn program(name: &str, file: &str, programs: &Path) -> ContainerConfig {
    let mut spec = container(name, "busybox", &[&format!("/data/{file}.wasm")]);
    spec.mounts = vec![Mount {
        container_path: "/data".into(),
        host_path: programs.display().to_string(),
        readonly: true,
        ..Mount::default()
    }];
    spec
}

/// Runs a container to its end: exit code, output, errors.
fn run(pod: &TestPod, spec: &ContainerConfig) -> Result<(i32, String, String)> {
    let c = pod.start(spec)?;
    let status = pod.cri.wait_exit(&c, PATIENCE)?;
    let (out, err) = log(&pod.config, spec)?;
    pod.cri.remove(&c)?;
    Ok((status.exit_code, out, err))
}

fn cpu(pod: &TestPod, c: &str) -> Result<u64> {
    let cpu = pod.cri.stats(c)?.cpu.context("no CPU time")?;
    Ok(cpu.usage_core_nano_seconds.map_or(0, |v| v.value))
}

fn mixed_pod(node: &mut Node, _: &str) -> Result<()> {
    let dir = programs()?;
    // Whoever listens there on the host is not to be reached from the pod.
    let hosts = TcpListener::bind("127.0.0.1:8081")?;
    let pod = TestPod::run(node, WASM, pod("mixed"))?;
    let server = pod.start(&program("server", "server", dir.path()))?;
    forwarded(&pod, 8080, HELLO_BODY)?;
    let (code, out, err) = run(&pod, &program("alone", "ask", dir.path()))?;
    ensure!((code, out.as_str()) == (1, ""), "{code}: {out}{err}");
    ensure!(agents().is_empty(), "an agent without need: {:?}", agents());
    drop(hosts);

    // Each finds the other on the pod's loopback.
    let sidecar = pod.start(&container("side", "busybox", &["sh", "-c", SIDECAR]))?;
    pod.until(&sidecar, "wget -qO- http://127.0.0.1:8081/x", "beside")?;
    let said = pod.sh(&sidecar, "wget -qO- http://127.0.0.1:8080/")?;
    ensure!(said == HELLO_BODY, "{said}");
    let (code, out, err) = run(&pod, &program("together", "ask", dir.path()))?;
    ensure!(code == 0 && out.ends_with("beside\n"), "{code}: {out}{err}");
    forwarded(&pod, 8081, "beside\n")?;
    // It has what a container has.
    ensure!(agents().len() == 1, "{:?}", agents());
    ensure!(pod.sh(&sidecar, "hostname")? == "mixed\n");
    ensure!(pod.sh(&sidecar, "ls /proc | grep -c '^[0-9]'")?.trim() != "0");
    let cgroup = Path::new("/sys/fs/cgroup/cri-test-mixed").join(format!("bulkhead-{}", pod.id));
    ensure!(cgroup.is_dir(), "{} is missing", cgroup.display());
    let stats = pod.cri.stats(&sidecar)?;
    ensure!(stats.memory.is_some(), "no statistics: {stats:?}");
    let spec = container(
        "ends",
        "busybox",
        &["sh", "-c", "echo out; echo err >&2; exit 3"],
    );
    let ended = run(&pod, &spec)?;
    ensure!(ended == (3, "out\n".into(), "err\n".into()), "{ended:?}");
    let error = pod
        .cri
        .exec(&server, &["sh"])
        .err()
        .context("exec went well")?;
    ensure!(format!("{error:#}").contains("not supported"), "{error:#}");

    // What cannot be run says why.
    for (spec, words) in [
        (
            program("broken", "broken", dir.path()),
            "does not begin with",
        ),
        (program("missing", "missing", dir.path()), "missing.wasm"),
        (container("nothing", "busybox", &["/nothing"]), "/nothing"),
    ] {
        let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
        let error = pod.cri.start(&c).err().context("it was started")?;
        ensure!(format!("{error:#}").contains(words), "{error:#}");
        pod.cri.remove(&c)?;
    }

    // A program that is held uses no time; an ordinary container neither.
    let spin = pod.start(&program("loop", "loop", dir.path()))?;
    let shell = pod.start(&container(
        "spin",
        "busybox",
        &["sh", "-c", "while :; do :; done"],
    ))?;
    for c in [&spin, &shell] {
        node.ctr(&["tasks", "pause", c])?;
        let held = cpu(&pod, c)?;
        std::thread::sleep(Duration::from_millis(300));
        let now = cpu(&pod, c)?;
        ensure!(now < held + 100_000_000, "{c} goes on: {held} ns, {now} ns");
        node.ctr(&["tasks", "resume", c])?;
        let begin = Instant::now();
        while cpu(&pod, c)? < now + 50_000_000 {
            ensure!(begin.elapsed() < PATIENCE, "{c} does not go on");
        }
        pod.cri.stop(c, 0)?;
        let status = pod.cri.status(c)?;
        ensure!(status.exit_code == 137, "{status:?}");
    }
    // A server that is asked to end does so in order.
    pod.cri.stop(&server, 20)?;
    let status = pod.cri.status(&server)?;
    ensure!(status.exit_code == 0, "{status:?}");
    pod.remove()?;
    ensure!(agents().is_empty(), "agents are left: {:?}", agents());
    ensure!(!cgroup.exists(), "the pod's cgroup is left");
    Ok(())
}

/// A pod with both, and its containers: a program, and a shell with a child.
fn busy(node: &Node, name: &str, programs: &Path) -> Result<(TestPod, [String; 2])> {
    let pod = TestPod::run(node, WASM, pod(name))?;
    let spin = pod.start(&program("loop", "loop", programs))?;
    let script = "setsid sleep 61616 & exec sleep 61616";
    let side = pod.start(&container("side", "busybox", &["sh", "-c", script]))?;
    pod.until(&side, "ps | grep -c '[6]1616'", "2")?;
    Ok((pod, [spin, side]))
}

/// Whatever ends a mixed pod, nothing of it is left.
fn ends(node: &mut Node, _: &str) -> Result<()> {
    let dir = programs()?;
    node.kill_sandboxer();
    node.start_sandboxer()?;
    // What is made once is made by the first.
    busy(node, "first", dir.path())?.0.remove()?;
    let before = Host::settled(node)?;

    // Its agent: the pod has ended, its programs too.
    let (pod, [spin, side]) = busy(node, "agent", dir.path())?;
    let agent = nix::unistd::Pid::from_raw(*agents().first().context("no agent")?);
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL)?;
    lost(&pod, &side, &[137])?;
    lost(&pod, &spin, &[137])?;
    ensure!(processes("sleep\u{0}61616") == 0, "processes are left");
    pod.remove()?;
    before.as_before(node)?;

    if node.isolation() == Isolation::Process {
        // It is none of the daemon's: all goes on.
        let (pod, [spin, side]) = busy(node, "stays", dir.path())?;
        node.kill_sandboxer();
        node.start_sandboxer()?;
        for c in [spin, side] {
            let state = pod.cri.status(&c)?.state;
            ensure!(state == CONTAINER_RUNNING, "does not run: {state}");
        }
        pod.remove()?;
        return before.as_before(node).map(drop);
    }
    // The daemon: before anybody cleans up, the ordinary containers end with it.
    let (pod, [spin, side]) = busy(node, "daemon", dir.path())?;
    node.kill_sandboxer();
    let begin = Instant::now();
    while processes("sleep\u{0}61616") + agents().len() > 0 {
        ensure!(begin.elapsed() < PATIENCE, "the pod has not ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    node.start_sandboxer()?;
    lost(&pod, &side, &[137, 255])?;
    lost(&pod, &spin, &[137, 255])?;
    pod.remove()?;
    busy(node, "next", dir.path())?.0.remove()?;
    before.as_before(node).map(drop)
}
