//! `isolation = "process"`: what a pod's worker is, looked at from outside, and its end.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, Node, OURS};
use bulkhead_tests::cri::proto::{SANDBOX_NOTREADY, SANDBOX_READY};
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;
use bulkhead_tests::process;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Test;
use super::host::Host;

pub const TESTS: &[Test] = &[
    ("worker_is_jailed", false, |node, _| {
        for handler in [OURS, APP] {
            is_jailed(node, handler).with_context(|| handler.to_owned())?;
        }
        Ok(())
    }),
    ("worker_dies_alone", false, dies_alone),
    ("pod_outlives_its_daemon", false, outlives_its_daemon),
    ("keeper_dies_alone", false, keeper_dies_alone),
];

/// Capabilities that serving files takes: see `jail::KEPT`.
const KEPT: u64 =
    (1 << 0) | (1 << 1) | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 6) | (1 << 7) | (1 << 31);

fn cgroup(pod: &TestPod) -> String {
    let parent = pod.config.linux.as_ref().map(|l| l.cgroup_parent.clone());
    format!("{}/bulkhead-{}", parent.unwrap_or_default(), pod.id)
}

/// The only process in the pod's cgroup.
pub fn worker_of(pod: &TestPod) -> Result<u32> {
    // That of wasm programs has a cgroup beside that of the pod's ordinary containers.
    let of = |end: &str| format!("/sys/fs/cgroup{}{end}/cgroup.procs", cgroup(pod));
    let wasm = of(":wasm");
    let path = match std::path::Path::new(&wasm).exists() {
        true => wasm,
        false => of(""),
    };
    let text = fs::read_to_string(&path).context(path)?;
    let mut pids = text.lines();
    let pid = pids.next().context("no process is in the pod's cgroup")?;
    ensure!(pids.next().is_none(), "several processes: {text}");
    Ok(pid.parse()?)
}

fn field(status: &str, name: &str) -> Result<String> {
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    Ok(line.context(name.to_owned())?.trim().to_owned())
}

fn names(dir: &str) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).context(dir.to_owned())? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn is_jailed(node: &mut Node, handler: &str) -> Result<()> {
    let (neighbour, pod) = (
        TestPod::run(node, handler, pod("neighbour"))?,
        TestPod::run(node, handler, pod("jailed"))?,
    );
    let c = pod.sleeper("c")?;
    neighbour.sleeper("c")?;
    pod.sh(&c, "echo mine > /tmp/mine")?;
    let (pid, daemon) = (worker_of(&pod)?, node.sandboxer_pid());
    ensure!(pid != worker_of(&neighbour)?, "one process for two pods");
    let proc = format!("/proc/{pid}");

    // Every thread: no right but those for files, none to be had, a filter.
    let mut filters = BTreeSet::new();
    for task in names(&format!("{proc}/task"))? {
        let status = fs::read_to_string(format!("{proc}/task/{task}/status"))?;
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            let caps = u64::from_str_radix(&field(&status, set)?, 16)?;
            ensure!(caps == KEPT, "thread {task}: {set} {caps:x}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            let caps = u64::from_str_radix(&field(&status, set)?, 16)?;
            ensure!(caps == 0, "thread {task}: {set} {caps:x}");
        }
        ensure!(field(&status, "NoNewPrivs:")? == "1", "thread {task}");
        ensure!(field(&status, "Seccomp:")? == "2", "thread {task}");
        filters.insert(field(&status, "Seccomp_filters:")?);
        let pids = field(&status, "NSpid:")?;
        ensure!(
            pids.split_whitespace().count() == 2,
            "thread {task}: {pids}"
        );
    }
    // Those of the roles have theirs besides.
    ensure!(filters == set(&["3", "4"]), "{filters:?}");

    // Namespaces: none of the daemon's, the network is the pod's.
    let ns = |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    for kind in ["mnt", "pid", "ipc", "uts", "user", "cgroup", "net"] {
        let (own, daemons) = (ns(pid, kind)?, ns(daemon, kind)?);
        ensure!(own != daemons, "{kind}: {}", own.display());
        let neighbours = ns(worker_of(&neighbour)?, kind)?;
        ensure!(own != neighbours, "{kind}: {}", own.display());
    }
    let net = fs::metadata(format!("{proc}/ns/net"))?.ino();
    let pods: Vec<u64> = fs::read_dir("/run/netns")?
        .flatten()
        .filter_map(|e| Some(fs::metadata(e.path()).ok()?.ino()))
        .collect();
    ensure!(pods.contains(&net), "its network is no pod's");

    // An empty root that cannot be written, and in it its own pod's files.
    let root = format!("{proc}/root");
    let found = names(&root)?;
    ensure!(found == set(&["proc", "rootfs", "volumes"]), "{found:?}");
    let mounts = fs::read_to_string(format!("{proc}/mountinfo"))?;
    for place in ["/", "/rootfs", "/volumes"] {
        let line = mounts
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>())
            .find(|l| l.get(4) == Some(&place))
            .with_context(|| format!("no mount at {place}: {mounts}"))?;
        let options: Vec<_> = line.get(5).context("options")?.split(',').collect();
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            ensure!(options.contains(&option), "{place}: {line:?}");
        }
    }
    let containers = names(&format!("{root}/rootfs"))?;
    ensure!(containers.len() == 1, "{containers:?}");
    let own = containers.first().context("no container")?;
    let mine = fs::read_to_string(format!("{root}/rootfs/{own}/tmp/mine"))?;
    ensure!(mine == "mine\n", "{mine:?}");
    // Nothing of the host's processes.
    let seen = names(&format!("{root}/proc"))?;
    let seen: Vec<_> = seen.iter().filter(|n| n.parse::<u32>().is_ok()).collect();
    ensure!(seen == ["1"], "{seen:?}");

    // What it holds: its VM, sockets, its pod's files.
    for fd in names(&format!("{proc}/fd"))? {
        let Ok(link) = fs::read_link(format!("{proc}/fd/{fd}")) else {
            continue;
        };
        let link = link.to_string_lossy().into_owned();
        let known = [
            "anon_inode:",
            "socket:",
            "/dev/kvm",
            "/dev/net/tun",
            "/memfd:",
            // Guest memory: a file without a name.
            "/#",
            "/rootfs",
            "/volumes",
            "/dev/null",
            "/proc/",
            "pipe:",
        ];
        // The guest's image, and where it logs to.
        let given = link.ends_with(".erofs") || link.ends_with("/sandboxer.log");
        ensure!(
            given || link == "/" || known.iter().any(|k| link.starts_with(k)),
            "descriptor {fd}: {link}"
        );
    }
    let limits = fs::read_to_string(format!("{proc}/limits"))?;
    let core = limits
        .lines()
        .find(|l| l.starts_with("Max core file size"))
        .context("limits")?;
    ensure!(core.split_whitespace().nth(4) == Some("0"), "{core}");

    // The pod's cgroup counts it.
    let in_cgroup = fs::read_to_string(format!("{proc}/cgroup"))?;
    ensure!(
        in_cgroup.trim() == format!("0::{}", cgroup(&pod)),
        "{in_cgroup}"
    );
    let parent = format!("/sys/fs/cgroup{}", cgroup(&pod));
    let memory: u64 = fs::read_to_string(format!("{parent}/memory.current"))?
        .trim()
        .parse()?;
    let own = process::memory_beside_files(pid, 64 << 20)?;
    let keeper = process::memory_beside_files(keeper_of(&pod)?, 64 << 20)?;
    println!(
        "  {handler}, KiB: worker {own:?}, its cgroup {}, keeper {keeper:?}",
        memory >> 10
    );
    ensure!(memory >> 10 > own.guest / 2, "{memory} bytes: {own:?}");
    neighbour.remove()?;
    pod.remove()
}

fn until_gone(what: &str, gone: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !gone() {
        ensure!(begin.elapsed() < PATIENCE, "{what} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A killed worker takes its pod with it, and nobody else's; nothing is left of it.
fn dies_alone(node: &mut Node, handler: &str) -> Result<()> {
    TestPod::run(node, handler, pod("first"))?.remove()?;
    let before = Host::settled(node)?;
    let neighbour = TestPod::run(node, handler, pod("neighbour"))?;
    let lucky = neighbour.sleeper("c")?;
    let pod = TestPod::run(node, handler, pod("dies"))?;
    let c = pod.sleeper("c")?;
    let worker = worker_of(&pod)?;
    kill(Pid::from_raw(i32::try_from(worker)?), Signal::SIGKILL)?;
    let status = pod.cri.wait_exit(&c, PATIENCE)?;
    ensure!(status.exit_code == 137, "{status:?}");
    until_gone("a ready pod", || {
        pod.cri
            .pod_status(&pod.id)
            .is_ok_and(|s| s.state == SANDBOX_NOTREADY)
    })?;
    let log = node.logs();
    let said = |l: &str| l.contains(&pod.id) && l.contains("its worker was killed by SIGKILL");
    ensure!(log.lines().any(said), "{log}");
    ensure!(neighbour.sh(&lucky, "echo well")? == "well\n");
    let state = neighbour.cri.pod_status(&neighbour.id)?.state;
    ensure!(state == SANDBOX_READY, "the neighbour is not ready");
    pod.remove()?;
    neighbour.remove()?;
    before.as_before(node).map(drop)
}

/// The process that has the daemon's code for a pod.
pub fn keeper_of(pod: &TestPod) -> Result<u32> {
    let pids = fs::read_to_string("/sys/fs/cgroup/bulkhead-keepers/cgroup.procs")?;
    let pid = pids.lines().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&pod.id)
    });
    Ok(pid.context("no keeper")?.parse()?)
}

/// Pods go on without their daemon, and the next one finds them.
fn outlives_its_daemon(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("outlives"))?;
    let c = pod.sleeper("c")?;
    let script = "until [ -e /tmp/go ]; do sleep 0.1; done; echo late; exit 9";
    let spec = container("ends", "busybox", &["sh", "-c", script]);
    let ends = pod.start(&spec)?;
    pod.sh(&c, "echo kept > /tmp/kept")?;
    let (worker, keeper) = (worker_of(&pod)?, keeper_of(&pod)?);
    node.kill_sandboxer();
    // Without a daemon: programs run, output is passed on, an end is told.
    ensure!(pod.sh(&c, "cat /tmp/kept")? == "kept\n");
    pod.sh(&ends, "touch /tmp/go")?;
    let status = pod.cri.wait_exit(&ends, PATIENCE)?;
    ensure!(status.exit_code == 9, "{status:?}");
    let (out, _) = log(&pod.config, &spec)?;
    ensure!(out == "late\n", "{out:?}");
    node.start_sandboxer()?;
    ensure!((worker_of(&pod)?, keeper_of(&pod)?) == (worker, keeper));
    let state = pod.cri.pod_status(&pod.id)?.state;
    ensure!(state == SANDBOX_READY, "the pod is not ready");
    ensure!(pod.sh(&c, "cat /tmp/kept")? == "kept\n");
    // Nothing in it is less than before: another container with a root of its own, a stop in order.
    let more = pod.sleeper("more")?;
    ensure!(pod.sh(&more, "ls /tmp")?.is_empty());
    TestPod::run(node, handler, bulkhead_tests::cri::pod("next"))?.remove()?;
    let directory = format!("/sys/fs/cgroup{}", cgroup(&pod));
    pod.remove()?;
    ensure!(!fs::exists(&directory)?, "{directory} is left");
    let left = fs::read_dir("/run/bulkhead/pods")?.count();
    ensure!(left == 0, "{left} pods are left");
    until_gone("the keeper", || {
        !fs::exists(format!("/proc/{keeper}")).unwrap_or(true)
    })
}

/// A keeper that dies takes its pod with it, and nobody else's.
fn keeper_dies_alone(node: &mut Node, handler: &str) -> Result<()> {
    TestPod::run(node, handler, pod("first"))?.remove()?;
    let before = Host::settled(node)?;
    let neighbour = TestPod::run(node, handler, pod("neighbour"))?;
    let lucky = neighbour.sleeper("c")?;
    let pod = TestPod::run(node, handler, pod("kept"))?;
    let c = pod.sleeper("c")?;
    let worker = worker_of(&pod)?;
    kill(
        Pid::from_raw(i32::try_from(keeper_of(&pod)?)?),
        Signal::SIGKILL,
    )?;
    let status = pod.cri.wait_exit(&c, PATIENCE)?;
    // Its connection has broken: containerd itself says 255 then.
    ensure!([137, 255].contains(&status.exit_code), "{status:?}");
    until_gone("a ready pod", || {
        pod.cri
            .pod_status(&pod.id)
            .is_ok_and(|s| s.state == SANDBOX_NOTREADY)
    })?;
    until_gone("the worker", || {
        !fs::exists(format!("/proc/{worker}")).unwrap_or(true)
    })?;
    ensure!(neighbour.sh(&lucky, "echo well")? == "well\n");
    pod.remove()?;
    neighbour.remove()?;
    before.as_before(node).map(drop)
}
