//! One pod, one container: what everything else builds on.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{Node, PROCESS};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;
use super::host::Host;

pub const TESTS: &[Test] = &[
    ("first_pod", true, first_pod),
    ("nothing_is_left", true, nothing_is_left),
];

/// Whether its containers run on the host's kernel.
fn shares_kernel(handler: &str) -> bool {
    ["runc", "crun", PROCESS].contains(&handler)
}

/// A pod with one container prints its kernel, ends with a code, is seen and removed.
pub fn first_pod(node: &mut Node, handler: &str) -> Result<()> {
    let cri = node.cri(handler)?;
    // A log of its own: it runs once for each handler.
    let name = format!("first-{handler}");
    let config = pod(&name);
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
        same == shares_kernel(handler),
        "kernel {seen} with {handler}, host {kernel}"
    );
    ensure!(lines.next() == Some(&name), "hostname: {out}");
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
    let before = Host::settled(node)?;
    for n in 1..=pods {
        one(n).with_context(|| format!("pod {n} of {pods}"))?;
        if n % 10 == 0 {
            println!("  {n} pods: {:?}", Host::now(node)?.counts);
        }
    }
    println!("  before {:?}", before.counts);
    let after = before.as_before(node)?;
    println!("  after  {:?}", after.counts);
    Ok(())
}
