//! Pods whose VMs begin as copies of one that was booted beforehand.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::cri::containerd::{Node, OURS};
use bulkhead_tests::cri::proto::PodSandboxConfig;
use bulkhead_tests::cri::{TestPod, pod};
use bulkhead_tests::env;
use serde_json::Value;

use super::Test;

pub const TESTS: &[Test] = &[("pods_start_as_copies", false, pods_start_as_copies)];

/// As the time line of a copy has it.
const COPIED: &str = "memory copied";

/// Whether the VM of a pod has not booted.
fn is_copy(pod: &TestPod) -> Result<bool> {
    let shown = Command::new(env::vmmctl()?)
        .args(["inspect", &pod.id])
        .output()
        .context("vmmctl")?;
    ensure!(shown.status.success(), "{shown:?}");
    let shown: Value = serde_json::from_slice(&shown.stdout)?;
    let marks = shown["vm"]["timeline"].as_array().context("no time line")?;
    let words: Vec<String> = marks
        .iter()
        .map(|mark| format!("{} {}", mark["stage"].as_str().unwrap_or("?"), mark["us"]))
        .collect();
    println!("  its time line in us: {}", words.join(", "));
    Ok(marks.iter().any(|mark| mark["stage"] == COPIED))
}

/// A pod that is a copy. The daemon boots what it copies after the first pod of a shape, one at a
/// time.
///
/// # Errors
/// Pods of this shape boot again and again.
pub fn copy(node: &Node, config: &PodSandboxConfig) -> Result<TestPod> {
    for _ in 0..3 {
        let pod = TestPod::run(node, OURS, config.clone())?;
        if is_copy(&pod)? {
            return Ok(pod);
        }
        pod.remove()?;
        node.templates_made()?;
    }
    bail!("pods boot, still");
}

/// What copies have in common is nothing that a program could take for its own: not random numbers,
/// nor the address of their network, nor their time; and what they do, only one of them sees.
fn pods_start_as_copies(node: &mut Node, _: &str) -> Result<()> {
    let (one, two) = (copy(node, &pod("one"))?, copy(node, &pod("two"))?);
    let (a, b) = (one.sleeper("c")?, two.sleeper("c")?);
    let differ = |what: &str, script: &str| -> Result<()> {
        let (first, second) = (one.sh(&a, script)?, two.sh(&b, script)?);
        ensure!(
            first != second && !first.trim().is_empty(),
            "{what}: {first:?} and {second:?}"
        );
        Ok(())
    };
    differ("random numbers", "od -An -N32 -tx1 /dev/urandom")?;
    differ("random ids", "cat /proc/sys/kernel/random/uuid")?;
    differ("boot ids", "cat /proc/sys/kernel/random/boot_id")?;
    differ("hardware addresses", "cat /sys/class/net/eth0/address")?;
    differ("addresses", "ip -4 -o addr show eth0")?;
    differ("names", "hostname")?;
    for (pod, c) in [(&one, &a), (&two, &b)] {
        let mac = pod.sh(c, "cat /sys/class/net/eth0/address")?;
        ensure!(!mac.starts_with("02:00:00:00:00"), "the template's: {mac}");
        let seconds: u64 = pod.sh(c, "date +%s")?.trim().parse()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(seconds) < 20, "{seconds}, and here {now}");
    }
    one.sh(&a, "echo mine > /dev/shm/mark && echo mine > /mark")?;
    two.sh(&b, "test ! -e /dev/shm/mark && test ! -e /mark")?;
    // A third, with those still there.
    let three = copy(node, &pod("three"))?;
    let c = three.sleeper("c")?;
    ensure!(three.sh(&c, "hostname")? == "three\n", "its name");
    for pod in [one, two, three] {
        pod.remove()?;
    }
    Ok(())
}
