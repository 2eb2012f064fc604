//! Pods on the app kernel. Most tests are those of pods in VMs with Linux, run again; what stands
//! here alone is where the two differ.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, Node};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::{Test, basic, wide};

pub const TESTS: &[Test] = &[
    ("app_pod", false, two_containers),
    ("app_memory", false, memory),
    ("app_limits", false, limits),
    ("app_refusals", false, refusals),
    ("app_nothing_is_left", false, |node, _| {
        basic::come_and_go(node, APP, 3)
    }),
    ("app_network", false, network),
    ("app_port_forward", false, |node, _| {
        wide::port_forward(node, APP)
    }),
    ("app_volumes", false, |node, _| wide::volumes(node, APP)),
    ("app_interactive_exec", false, |node, _| {
        wide::interactive_exec(node, APP)
    }),
    ("app_attach", false, |node, _| wide::attach(node, APP)),
];

/// Two containers share the loopback, the name and the shared memory, and nothing else.
fn two_containers(node: &mut Node, _: &str) -> Result<()> {
    let pod = TestPod::run(node, APP, pod("apppair"))?;
    let script = "mkdir /www && echo hello > /www/x && uname -r && hostname && echo oops >&2 && \
                  exec httpd -f -p 127.0.0.1:8080 -h /www";
    let spec = container("server", "busybox", &["sh", "-c", script]);
    let server = pod.start(&spec)?;
    let neighbour = pod.sleeper("neighbour")?;
    pod.until(
        &neighbour,
        "wget -qO- http://127.0.0.1:8080/x 2>/dev/null || true",
        "hello",
    )?;
    let (out, err) = log(&pod.config, &spec)?;
    let mut lines = out.lines();
    let kernel = lines.next().context("no output")?;
    println!("  the container says {out:?}");
    ensure!(kernel.ends_with("-bulkhead-app"), "kernel {kernel}");
    ensure!(lines.next() == Some("apppair"), "host name: {out}");
    ensure!(err == "oops\n", "standard error: {err:?}");
    ensure!(
        pod.cri.exec(&neighbour, &["cat", "/www/x"])?.exit_code != 0,
        "files are shared"
    );
    pod.sh(&server, "echo memory > /dev/shm/x")?;
    ensure!(pod.sh(&neighbour, "cat /dev/shm/x")? == "memory\n");
    let answer = pod
        .cri
        .exec(&server, &["sh", "-c", "echo in; echo bad >&2; exit 3"])?;
    ensure!(
        (
            answer.stdout.as_slice(),
            answer.stderr.as_slice(),
            answer.exit_code
        ) == (b"in\n".as_slice(), b"bad\n".as_slice(), 3),
        "exec: {answer:?}"
    );
    let ended = pod.start(&container(
        "ended",
        "busybox",
        &["sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"],
    ))?;
    let status = pod.cri.wait_exit(&ended, PATIENCE)?;
    ensure!(status.exit_code == 139, "exit code {}", status.exit_code);
    let missing = container("missing", "busybox", &["/no/such/program"]);
    let missing = pod.cri.create(&pod.id, &pod.config, &missing)?;
    let error = pod.cri.start(&missing).err().context("it was started")?;
    let error = format!("{error:#}");
    ensure!(error.contains("no such file or directory"), "{error}");

    let stats = pod.cri.stats(&server)?;
    let cpu = stats.cpu.and_then(|c| c.usage_core_nano_seconds);
    let memory = stats.memory.and_then(|m| m.working_set_bytes);
    let (cpu, memory) = (cpu.map_or(0, |v| v.value), memory.map_or(0, |v| v.value));
    println!("  server: {} us of CPU, {} KiB", cpu / 1000, memory >> 10);
    ensure!(cpu > 0 && memory > 10_000, "{cpu} ns, {memory} bytes");
    let both = pod.cri.pod_stats(&pod.id)?.linux.context("no pod stats")?;
    ensure!(both.containers.len() >= 2, "{both:?}");

    pod.cri.stop(&server, 0)?;
    let status = pod.cri.status(&server)?;
    ensure!(status.exit_code == 137, "killed: {status:?}");
    ensure!(pod.sh(&neighbour, "echo still here")? == "still here\n");
    pod.remove()
}

fn network(node: &mut Node, _: &str) -> Result<()> {
    wide::network(node, APP)
}

/// The pod's limit is its machine's memory. The program that takes it all is ended, its neighbour
/// is not. CPU is limited on the host.
fn memory(node: &mut Node, _: &str) -> Result<()> {
    let mut config = pod("appmemory");
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 80_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 48 << 20,
        ..LinuxContainerResources::default()
    });
    let pod = TestPod::run(node, APP, config)?;
    ensure!(wide::pod_cgroup(&pod.id, "cpu.max")? == "80000 100000\n");
    let neighbour = pod.sleeper("neighbour")?;
    let bomb = pod.start(&container("bomb", "busybox", &["tail", "/dev/zero"]))?;
    let status = pod.cri.wait_exit(&bomb, PATIENCE)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "{status:?}"
    );
    ensure!(pod.sh(&neighbour, "echo fine")? == "fine\n");
    // A container's own limit is less than the pod has; a program below it goes on.
    let mut spec = container(
        "limited",
        "busybox",
        &[
            "sh",
            "-c",
            "head -c 2m /dev/zero | tail -c 2m | wc -c; tail /dev/zero; echo \"ended $?\"",
        ],
    );
    spec.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 12 << 20,
        ..LinuxContainerResources::default()
    });
    let limited = pod.start(&spec)?;
    let status = pod.cri.wait_exit(&limited, PATIENCE)?;
    let (out, _) = log(&pod.config, &spec)?;
    ensure!(
        status.exit_code == 0 && out == "2097152\nended 137\n",
        "{status:?}: {out}"
    );
    ensure!(pod.sh(&neighbour, "echo fine")? == "fine\n");
    pod.remove()
}

/// A container's CPU quota and number of tasks are kept within the machine that it shares.
fn limits(node: &mut Node, _: &str) -> Result<()> {
    let pod = TestPod::run(node, APP, pod("applimits"))?;
    let neighbour = pod.sleeper("neighbour")?;
    let quota = |percent: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: percent * 1000,
        ..LinuxContainerResources::default()
    };
    let mut spec = container("busy", "busybox", &["sh", "-c", "while :; do :; done"]);
    spec.linux.get_or_insert_default().resources = Some(quota(20));
    let busy = pod.start(&spec)?;
    let part = |seconds: &str| -> Result<f64> {
        let now = || -> Result<(i64, u64)> {
            let cpu = pod.cri.stats(&busy)?.cpu.context("no CPU statistics")?;
            let used = cpu.usage_core_nano_seconds.context("no use of CPU")?;
            Ok((cpu.timestamp, used.value))
        };
        let before = now()?;
        pod.sh(&neighbour, &format!("sleep {seconds}"))?;
        let after = now()?;
        Ok((after.1 - before.1) as f64 / (after.0 - before.0) as f64)
    };
    let limited = part("5")?;
    pod.cri.update(&busy, quota(70))?;
    let more = part("5")?;
    println!("  of 20 % of a CPU it has {limited:.2}, of 70 % {more:.2}");
    ensure!(
        (0.1..0.35).contains(&limited) && (0.45..0.85).contains(&more),
        "{limited:.2} of 0.2, {more:.2} of 0.7"
    );
    pod.cri.stop(&busy, 0)?;

    let tasks = |script: &str, name: &str| {
        let mut spec = container(name, "busybox", &["sh", "-c", script]);
        let resources = LinuxContainerResources {
            unified: [("pids.max".to_owned(), "20".to_owned())].into(),
            ..LinuxContainerResources::default()
        };
        spec.linux.get_or_insert_default().resources = Some(resources);
        spec
    };
    let spec = tasks("while :; do sleep 1000 & echo one; done", "many");
    let many = pod.start(&spec)?;
    let status = pod.cri.wait_exit(&many, PATIENCE)?;
    let (out, err) = log(&pod.config, &spec)?;
    ensure!(
        status.exit_code == 2 && out.lines().count() == 19 && err.contains("can't fork"),
        "{status:?}: {out} {err}"
    );
    let bomb = pod.start(&tasks("f() { f | f & }; f; exec sleep 100000", "bomb"))?;
    let script = "i=0; while [ $i -lt 30 ]; do /bin/true; i=$((i+1)); done; echo fine";
    ensure!(pod.sh(&neighbour, script)? == "fine\n");
    pod.cri.stop(&bomb, 0)?;
    pod.remove()
}

/// What it cannot do is said, with what to do instead.
fn refusals(node: &mut Node, _: &str) -> Result<()> {
    let cri = node.cri(APP)?;
    let mut host = pod("apphost");
    host.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption {
            network: 2,
            ..NamespaceOption::default()
        }),
        ..LinuxSandboxSecurityContext::default()
    });
    let mut tuned = pod("apptuned");
    tuned
        .linux
        .get_or_insert_default()
        .sysctls
        .insert("net.core.somaxconn".into(), "100".into());
    for (config, words) in [(host, "hostNetwork"), (tuned, "net.core.somaxconn")] {
        let error = cri.run_pod(&config).err().context("it was started")?;
        let error = format!("{error:#}");
        ensure!(
            error.contains(words) && error.contains("runtime"),
            "{words}: {error}"
        );
    }
    let pod = TestPod::run(node, APP, pod("apppause"))?;
    let c = pod.sleeper("c")?;
    let paused = Command::new("ctr")
        .args(["--namespace", "k8s.io", "tasks", "pause", &c])
        .output()
        .context("ctr")?;
    let said = String::from_utf8_lossy(&paused.stderr);
    ensure!(
        !paused.status.success() && said.contains("does not freeze"),
        "{paused:?}"
    );
    ensure!(pod.sh(&c, "echo fine")? == "fine\n");
    pod.remove()
}
