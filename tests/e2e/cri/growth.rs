//! Pods whose limits change while they run.

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::Node;
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, pod};

use super::Test;
use super::template::copy;
use super::wide::pod_cgroup;

pub const TESTS: &[Test] = &[("growth", false, growth)];

fn limits(cpu_percent: i64, memory_mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpu_percent * 1000,
        memory_limit_in_bytes: memory_mib << 20,
        ..LinuxContainerResources::default()
    }
}

/// A pod that boots grows, and so does one whose VM is a copy.
fn growth(node: &mut Node, handler: &str) -> Result<()> {
    let mut config = pod("growth");
    config.linux.get_or_insert_default().resources = Some(limits(100, 96));
    grows(TestPod::run(node, handler, config.clone())?)?;
    node.templates_made()?;
    if let Some(metadata) = &mut config.metadata {
        metadata.name = "growth-of-a-copy".into();
    }
    grows(copy(node, &config)?).context("of a copy")
}

/// A running VM gets more CPUs and memory as its containers may use more, and the pod more of the
/// host's CPUs; all of it goes back.
fn grows(pod: TestPod) -> Result<()> {
    let mut spec = container("c", "python3", &["sleep", "100000"]);
    spec.linux.get_or_insert_default().resources = Some(limits(100, 64));
    let c = pod.start(&spec)?;
    let neighbour = pod.sleeper("neighbour")?;
    let cpus = || -> Result<String> {
        let text = pod.sh(&c, "grep -c ^processor /proc/cpuinfo; nproc")?;
        let share = pod_cgroup(&pod.id, "cpu.max")?;
        Ok(format!("{} {share}", text.trim().replace('\n', " ")))
    };
    ensure!(cpus()? == "1 1 100000 100000\n", "{}", cpus()?);
    pod.cri.update(&c, limits(200, 64))?;
    ensure!(cpus()? == "2 2 200000 100000\n", "{}", cpus()?);
    let both = "for n in 1 2; do (i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done) & done; wait";
    pod.sh(&neighbour, both)?;
    let threads = pod_cgroup(&pod.id, "cgroup.threads")?;
    let vcpus = threads
        .lines()
        .filter_map(|id| std::fs::read_to_string(format!("/proc/{id}/comm")).ok())
        .filter(|name| name.starts_with("vcpu"))
        .count();
    ensure!(
        vcpus == 2,
        "{vcpus} threads of CPUs are in the pod's cgroup"
    );
    // There are no more; the limit holds all the same.
    pod.cri.update(&c, limits(500, 64))?;
    ensure!(cpus()? == "2 2 500000 100000\n", "{}", cpus()?);
    pod.cri.update(&c, limits(50, 64))?;
    ensure!(cpus()? == "1 1 50000 100000\n", "{}", cpus()?);
    pod.cri.update(&c, limits(150, 64))?;
    ensure!(cpus()? == "2 2 150000 100000\n", "{}", cpus()?);

    // Memory: a program that needs more than the VM had.
    let total = || -> Result<u64> {
        let text = pod.sh(&neighbour, "grep MemTotal /proc/meminfo")?;
        let kib = text.split_whitespace().nth(1).context("MemTotal")?;
        Ok(kib.parse::<u64>()? >> 10)
    };
    let before = total()?;
    let needs = ["python3", "-c", "print(len(b'x' * (150 << 20)))"];
    ensure!(
        pod.cri.exec(&c, &needs)?.exit_code != 0,
        "it fits in 64 MiB"
    );
    pod.cri.update(&c, limits(150, 192))?;
    let after = total()?;
    println!("  the guest has {before} MiB, then {after} MiB");
    ensure!(
        before < 200 && after >= before + 128,
        "{before} MiB, then {after} MiB"
    );
    let answer = pod.cri.exec(&c, &needs)?;
    ensure!(answer.stdout == b"157286400\n", "{answer:?}");
    let error = pod.cri.update(&c, limits(150, 5000)).err();
    let error = format!("{:#}", error.context("more than there is room for")?);
    ensure!(error.contains("grow_memory_mib"), "{error}");
    // What is given back is the host's again.
    pod.cri.update(&c, limits(150, 64))?;
    pod.until(
        &neighbour,
        "test $(awk '/MemTotal/ {print $2}' /proc/meminfo) -lt 204800 && echo less",
        "less",
    )?;
    pod.remove().context("remove")
}
