//! One pod, one container: what everything else builds on.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::cri::containerd::{Node, OURS};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;

pub const TESTS: &[Test] = &[
    ("first_pod", true, first_pod),
    ("nothing_is_left", true, nothing_is_left),
];

/// A pod with one container prints its kernel, ends with a code, is seen and removed.
fn first_pod(node: &mut Node, handler: &str) -> Result<()> {
    let cri = node.cri(handler)?;
    let config = pod("first");
    let id = cri.run_pod(&config)?;
    ensure!(
        cri.pod_status(&id)?.state == SANDBOX_READY,
        "pod is not ready"
    );
    let script = "uname -r; echo oops >&2; hostname; exit 7";
    let spec = container("c", "busybox", &["sh", "-c", script]);
    let c = cri.create(&id, &config, &spec)?;
    cri.start(&c)?;
    let status = cri.wait_exit(&c, PATIENCE)?;
    ensure!(status.exit_code == 7, "exit code {}", status.exit_code);
    let (out, err) = log(&config, &spec)?;
    println!("  the container says {out:?}");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut lines = out.lines();
    let seen = lines.next().context("no output")?;
    let same = seen == kernel.trim();
    ensure!(
        same == (handler != OURS),
        "kernel {seen} with {handler}, host {kernel}"
    );
    ensure!(lines.next() == Some("first"), "hostname: {out}");
    ensure!(err == "oops\n", "standard error: {err:?}");
    cri.remove(&c)?;

    let spec = container("sleeper", "busybox", &["sleep", "1000"]);
    let c = cri.create(&id, &config, &spec)?;
    cri.start(&c)?;
    let answer = cri.exec(&c, &["sh", "-c", "echo in; echo bad >&2; exit 3"])?;
    ensure!(
        (
            answer.stdout.as_slice(),
            answer.stderr.as_slice(),
            answer.exit_code
        ) == (b"in\n".as_slice(), b"bad\n".as_slice(), 3),
        "exec: {answer:?}"
    );
    cri.stop(&c, 0)?;
    let status = cri.status(&c)?;
    ensure!(status.exit_code == 137, "killed: {status:?}");
    cri.stop_pod(&id)?;
    ensure!(
        cri.pod_status(&id)?.state == SANDBOX_NOTREADY,
        "pod is ready"
    );
    cri.remove_pod(&id)?;
    ensure!(cri.pods()?.is_empty(), "pod is left");
    Ok(())
}

/// What pods could leave on the host.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    counts: BTreeMap<&'static str, usize>,
}

fn host(node: &Node) -> Result<Host> {
    let pid = node.sandboxer_pid();
    let entries = |dir: String| fs::read_dir(dir).map_or(0, Iterator::count);
    let lines = |file: String| fs::read_to_string(file).map_or(0, |t| t.lines().count());
    let mut counts = BTreeMap::new();
    counts.insert("descriptors", entries(format!("/proc/{pid}/fd")));
    counts.insert("threads", bulkhead_tests::process::threads(pid)?);
    counts.insert(
        "mounts of the sandboxer",
        lines(format!("/proc/{pid}/mounts")),
    );
    counts.insert("mounts", lines("/proc/self/mounts".into()));
    counts.insert("links", entries("/sys/class/net".into()));
    counts.insert("network namespaces", entries("/run/netns".into()));
    counts.insert("pods", entries("/run/bulkhead/pods".into()));
    counts.insert("cgroups", entries("/sys/fs/cgroup".into()));
    Ok(Host { counts })
}

/// Pods come and go; nothing of them stays.
fn nothing_is_left(node: &mut Node, handler: &str) -> Result<()> {
    come_and_go(node, handler, 3)
}

/// Makes and removes pods, and compares what is on the host before and after.
pub fn come_and_go(node: &mut Node, handler: &str, pods: usize) -> Result<()> {
    let cri = node.cri(handler)?;
    let one = |n: usize| -> Result<()> {
        let config = pod(&format!("leak{n}"));
        let id = cri.run_pod(&config)?;
        let spec = container("c", "busybox", &["sleep", "1000"]);
        let c = cri.create(&id, &config, &spec)?;
        cri.start(&c)?;
        cri.exec(&c, &["true"])?;
        cri.stop_pod(&id)?;
        cri.remove_pod(&id)
    };
    // The first makes what stays for good: threads of runtimes, connections, the bridge.
    one(0)?;
    let before = settled(node, None)?;
    for n in 1..=pods {
        one(n).with_context(|| format!("pod {n} of {pods}"))?;
        if n % 10 == 0 {
            println!("  {n} pods: {:?}", host(node)?.counts);
        }
    }
    let after = settled(node, Some(&before))?;
    println!("  before {:?}\n  after  {:?}", before.counts, after.counts);
    ensure!(before == after, "left: {before:?} became {after:?}");
    Ok(())
}

/// What is there once it is as `wanted`, or has not changed for a while.
fn settled(node: &Node, wanted: Option<&Host>) -> Result<Host> {
    let mut last = host(node)?;
    let mut same = 0;
    for _ in 0..200 {
        if wanted.is_some_and(|w| *w == last) || (wanted.is_none() && same > 60) {
            return Ok(last);
        }
        std::thread::sleep(Duration::from_millis(100));
        let now = host(node)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    if wanted.is_none() {
        bail!("what is there changes all the time: {last:?}");
    }
    Ok(last)
}
