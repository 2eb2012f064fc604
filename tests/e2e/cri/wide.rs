//! What pods are used for: several containers, networks, files, streams, limits, users.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::cri::containerd::{Isolation, METRICS, Node, OURS};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, WebSocket, container, log, pod};
use bulkhead_tests::env::PATIENCE;

use super::Test;

pub const TESTS: &[Test] = &[
    ("containers_share_localhost_and_memory", true, sharing),
    ("network", true, network),
    ("names", true, names),
    ("port_forward", true, port_forward),
    ("volumes", true, volumes),
    ("interactive_exec", true, interactive_exec),
    ("attach", true, attach),
    ("much_output", true, much_output),
    ("security_context", true, security_context),
    ("privileged", true, privileged),
    ("limits_and_stats", true, limits_and_stats),
    ("stop_gracefully", true, stop_gracefully),
    ("bad_input", false, bad_input),
];

fn sharing(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("sharing"))?;
    let (a, b) = (pod.sleeper("a")?, pod.sleeper("b")?);
    pod.sh(
        &a,
        "mkdir -p /tmp/www && echo from-a > /tmp/www/x && httpd -p 127.0.0.1:8080 -h /tmp/www",
    )?;
    pod.until(&b, "wget -qO- http://127.0.0.1:8080/x", "from-a")?;
    ensure!(
        pod.cri.exec(&b, &["cat", "/tmp/www/x"])?.exit_code != 0,
        "files are shared"
    );
    pod.sh(&a, "echo memory > /dev/shm/x")?;
    ensure!(pod.sh(&b, "cat /dev/shm/x")? == "memory\n");
    // Processes are too: that is what the namespace mode 0 of these containers means.
    ensure!(
        pod.sh(&b, "ps")?.contains("httpd"),
        "processes are not shared"
    );
    pod.remove()
}

fn get(address: &str, path: &str) -> Result<Vec<u8>> {
    let begin = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(e) if begin.elapsed() > PATIENCE => {
                return Err(e).context(address.to_owned());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    Ok(all)
}

/// Two pods reach each other, the host, and are reached by it.
pub fn network(node: &mut Node, handler: &str) -> Result<()> {
    let first = TestPod::run(node, handler, pod("net1"))?;
    let second = TestPod::run(node, handler, pod("net2"))?;
    let (a, b) = (first.sleeper("c")?, second.sleeper("c")?);
    let ip = first
        .cri
        .pod_status(&first.id)?
        .network
        .context("no network")?
        .ip;
    ensure!(
        first.sh(&a, "ip addr show eth0")?.contains(&ip),
        "no {ip} in the pod"
    );
    first.sh(
        &a,
        "mkdir -p /tmp/www && head -c 8000000 /dev/zero > /tmp/www/big && echo hello > /tmp/www/x && httpd -p 8080 -h /tmp/www",
    )?;
    let answer = get(&format!("{ip}:8080"), "/x")?;
    ensure!(answer.ends_with(b"hello\n"), "host to pod");
    let answer = get(&format!("{ip}:8080"), "/big")?;
    ensure!(
        answer.len() > 8_000_000,
        "host to pod: {} bytes",
        answer.len()
    );
    second.until(&b, &format!("wget -qO- http://{ip}:8080/x"), "hello")?;
    // IPv6, by the second range of the test's network.
    let text = first.sh(&a, "ip -6 addr show eth0")?;
    let six = text
        .split_whitespace()
        .find_map(|w| w.strip_prefix("fd77::").map(|r| format!("fd77::{r}")))
        .context("no IPv6 address")?;
    let six = six.split('/').next().unwrap_or_default();
    second.until(&b, &format!("wget -qO- 'http://[{six}]:8080/x'"), "hello")?;
    // Out of the pod.
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut request = [0; 512];
        let _ = stream.read(&mut request)?;
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom the host\n")?;
        Ok(())
    });
    let said = first.sh(&a, &format!("wget -qO- http://10.77.0.1:{port}/"))?;
    ensure!(said == "from the host\n", "pod to host: {said:?}");
    server.join().map_err(|_| anyhow::anyhow!("server"))??;
    first.remove()?;
    second.remove()
}

fn names(node: &mut Node, handler: &str) -> Result<()> {
    let mut config = pod("names");
    config.hostname = "my-host".into();
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.9.8.7".into()],
        searches: vec!["svc.example".into()],
        options: vec!["ndots:5".into()],
    });
    let linux = config.linux.get_or_insert_default();
    linux
        .sysctls
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "77".into());
    let pod = TestPod::run(node, handler, config)?;
    let c = pod.sleeper("c")?;
    ensure!(pod.sh(&c, "hostname")? == "my-host\n");
    let resolv = pod.sh(&c, "cat /etc/resolv.conf")?;
    for line in [
        "nameserver 10.9.8.7",
        "search svc.example",
        "options ndots:5",
    ] {
        ensure!(resolv.contains(line), "{resolv}");
    }
    ensure!(pod.sh(&c, "cat /etc/hosts")?.contains("localhost"));
    let port = pod.sh(&c, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start")?;
    ensure!(port == "77\n", "sysctl: {port}");
    pod.remove()
}

pub fn port_forward(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("forward"))?;
    let c = pod.sleeper("c")?;
    pod.sh(
        &c,
        "mkdir -p /tmp/www && echo forwarded > /tmp/www/x && httpd -p 127.0.0.1:8081 -h /tmp/www",
    )?;
    pod.until(&c, "wget -qO- http://127.0.0.1:8081/x", "forwarded")?;
    forwarded(&pod, 8081, "forwarded\n")?;
    pod.remove()
}

/// Asks a port of a pod for `/x` by way of containerd, until the answer ends with some text.
pub fn forwarded(pod: &TestPod, port: i32, wanted: &str) -> Result<()> {
    let url = pod.cri.port_forward_url(&pod.id, port)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    socket.send(0, b"GET /x HTTP/1.0\r\n\r\n")?;
    let mut all = Vec::new();
    while let Some((channel, data)) = socket.receive()? {
        ensure!(
            channel == 0 || data.len() == 2,
            "error: {}",
            String::from_utf8_lossy(&data)
        );
        all.extend(data);
        if all.ends_with(wanted.as_bytes()) {
            break;
        }
    }
    ensure!(
        all.ends_with(wanted.as_bytes()),
        "{}",
        String::from_utf8_lossy(&all)
    );
    Ok(())
}

pub fn volumes(node: &mut Node, handler: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (data, map) = (dir.path().join("data"), dir.path().join("map"));
    fs::create_dir(&data)?;
    fs::write(data.join("in"), "from the host")?;
    // As kubelet keeps a config map.
    let version = |n: &str| -> Result<()> {
        fs::create_dir_all(map.join(n))?;
        fs::write(map.join(n).join("key"), n)?;
        std::os::unix::fs::symlink(n, map.join("..tmp"))?;
        Ok(fs::rename(map.join("..tmp"), map.join("..data"))?)
    };
    version("v1")?;
    std::os::unix::fs::symlink("..data/key", map.join("key"))?;
    fs::write(dir.path().join("file"), "a single file")?;
    let mount = |host: &std::path::Path, inside: &str, readonly| Mount {
        container_path: inside.into(),
        host_path: host.display().to_string(),
        readonly,
        ..Mount::default()
    };
    let pod = TestPod::run(node, handler, pod("volumes"))?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.mounts = vec![
        mount(&data, "/data", false),
        mount(&data, "/data-ro", true),
        mount(&map, "/map", true),
        mount(&dir.path().join("file"), "/etc/file", true),
    ];
    let c = pod.start(&spec)?;
    ensure!(pod.sh(&c, "cat /data/in /etc/file /map/key")? == "from the hosta single filev1");
    pod.sh(
        &c,
        "echo -n back > /data/out && mkdir /data/sub && chmod 700 /data/sub",
    )?;
    ensure!(fs::read_to_string(data.join("out"))? == "back" && data.join("sub").is_dir());
    ensure!(
        pod.cri.exec(&c, &["touch", "/data-ro/x"])?.exit_code != 0,
        "read-only"
    );
    version("v2")?;
    pod.until(&c, "cat /map/key", "v2")?;
    fs::write(data.join("later"), "later")?;
    pod.until(&c, "cat /data/later", "later")?;
    pod.remove()?;
    ensure!(fs::read_to_string(data.join("in"))? == "from the host");
    Ok(())
}

pub fn interactive_exec(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("exec"))?;
    let c = pod.sleeper("c")?;
    let script = "read x; echo got $x; stty size; test -t 1 && echo tty; exit 4";
    let url = pod.cri.exec_url(&c, &["sh", "-c", script], true, true)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    socket.send(4, br#"{"Width":91,"Height":33}"#)?;
    // The size comes as a message of its own: give it the time that a person would.
    pod.sh(&c, "sleep 1")?;
    socket.send(0, b"hello\n")?;
    let (out, _, end) = socket.finish()?;
    let out = String::from_utf8_lossy(&out);
    ensure!(
        out.contains("got hello") && out.contains("tty\r\n"),
        "{out}"
    );
    ensure!(out.contains("33 91"), "{out}");
    ensure!(end.contains("\"4\""), "exit code: {end}");
    // Without a terminal. The protocol has no end of input.
    let script = "head -c 100000 | wc -c; echo e >&2";
    let url = pod.cri.exec_url(&c, &["sh", "-c", script], false, true)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    for _ in 0..10 {
        socket.send(0, &[b'x'; 10_000])?;
    }
    let (out, err, _) = socket.finish()?;
    ensure!(String::from_utf8_lossy(&out).trim() == "100000", "{out:?}");
    ensure!(err == b"e\n");
    // A time-out ends what it started.
    let begin = Instant::now();
    let late = pod.cri.exec_for(&c, &["sleep", "4321"], 2);
    ensure!(late.is_err() && begin.elapsed() < PATIENCE, "{late:?}");
    pod.until(&c, "ps | grep -c '[s]leep 4321' || true", "0")?;
    pod.remove()
}

pub fn attach(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("attach"))?;
    let mut spec = container(
        "c",
        "busybox",
        &["sh", "-c", "while read x; do echo said $x; done; echo end"],
    );
    spec.stdin = true;
    spec.stdin_once = true;
    let c = pod.start(&spec)?;
    let url = pod.cri.attach_url(&c, false, true)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    socket.send(0, b"one\n")?;
    let mut seen = Vec::new();
    while !seen.ends_with(b"said one\n") {
        let (channel, data) = socket.receive()?.context("attach ended")?;
        if channel == 1 {
            seen.extend(data);
        }
    }
    // Once: the container's input ends with its only client's.
    drop(socket);
    ensure!(pod.cri.wait_exit(&c, PATIENCE)?.exit_code == 0);
    ensure!(log(&pod.config, &spec)?.0.ends_with("end\n"));
    pod.remove()
}

fn much_output(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("output"))?;
    let spec = container("c", "busybox", &["seq", "1", "300000"]);
    let c = pod.start(&spec)?;
    let status = pod.cri.wait_exit(&c, PATIENCE)?;
    ensure!(status.exit_code == 0);
    // containerd may still be writing down what it has taken.
    let begin = Instant::now();
    let mut out = log(&pod.config, &spec)?.0;
    while out.lines().count() < 300_000 && begin.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(100));
        out = log(&pod.config, &spec)?.0;
    }
    ensure!(
        out.lines().count() == 300_000,
        "{} lines",
        out.lines().count()
    );
    ensure!(
        out.lines().zip(1u32..).all(|(l, n)| l == n.to_string()),
        "lines differ"
    );
    let s = pod.sleeper("s")?;
    let answer = pod.cri.exec(&s, &["head", "-c", "3000000", "/dev/zero"])?;
    ensure!(
        answer.stdout.len() == 3_000_000,
        "{} bytes",
        answer.stdout.len()
    );
    pod.remove()
}

pub fn security_context(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("security"))?;
    let mut spec = container("user", "busybox", &["sleep", "100000"]);
    let security = LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 2000 }),
        supplemental_groups: vec![3000],
        readonly_rootfs: true,
        no_new_privs: true,
        capabilities: Some(Capability {
            add_capabilities: Vec::new(),
            drop_capabilities: vec!["ALL".into()],
        }),
        seccomp: Some(SecurityProfile::default()),
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        ..LinuxContainerSecurityContext::default()
    };
    spec.linux.get_or_insert_default().security_context = Some(security);
    let c = pod.start(&spec)?;
    let groups = pod.sh(&c, "id -u; id -g; id -G")?;
    ensure!(
        groups.starts_with("1000\n2000\n") && groups.contains("3000"),
        "{groups}"
    );
    let status = pod.sh(&c, "cat /proc/self/status")?;
    for line in [
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
    ] {
        ensure!(status.contains(line), "no {line}: {status}");
    }
    ensure!(
        pod.cri.exec(&c, &["touch", "/x"])?.exit_code != 0,
        "root is writable"
    );
    pod.remove()
}

fn privileged(node: &mut Node, handler: &str) -> Result<()> {
    let mut config = pod("privileged");
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    let pod = TestPod::run(node, handler, config)?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
        privileged: true,
        ..LinuxContainerSecurityContext::default()
    });
    let c = pod.start(&spec)?;
    pod.sh(
        &c,
        "mkdir /m && mount -t tmpfs x /m && touch /m/f && umount /m",
    )?;
    pod.sh(&c, "echo 1 > /proc/sys/net/ipv4/ip_forward")?;
    pod.remove()
}

pub fn limits_and_stats(node: &mut Node, handler: &str) -> Result<()> {
    let mut config = pod("limits");
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 80_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 128 << 20,
        ..LinuxContainerResources::default()
    });
    let pod = TestPod::run(node, handler, config)?;
    let limit = |mib: i64| LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..LinuxContainerResources::default()
    };
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.linux.get_or_insert_default().resources = Some(limit(40));
    let c = pod.start(&spec)?;
    let max = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    ensure!(
        pod.sh(&c, max)? == "41943040\n50000 100000\n",
        "{}",
        pod.sh(&c, max)?
    );
    let in_process = node.isolation() == Isolation::Process && handler == OURS;
    match (pod.cri.update(&c, limit(48)), in_process) {
        // Such a VM keeps the size it was made with, and says so.
        (Err(error), true) => {
            let error = format!("{error:#}");
            ensure!(error.contains("make the pod anew"), "{error}");
        }
        (Ok(()), true) => bail!("a VM in a process has grown"),
        (updated, false) => {
            updated?;
            ensure!(pod.sh(&c, max)?.starts_with("50331648\n"));
        }
    }
    pod.sh(&c, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")?;
    let stats = pod.cri.stats(&c)?;
    let cpu = stats
        .cpu
        .and_then(|c| c.usage_core_nano_seconds)
        .map_or(0, |v| v.value);
    let memory = stats
        .memory
        .and_then(|m| m.working_set_bytes)
        .map_or(0, |v| v.value);
    ensure!(
        cpu > 1_000_000 && memory > 10_000,
        "cpu {cpu} ns, memory {memory}"
    );
    let stats = pod.cri.pod_stats(&pod.id)?.linux.context("no linux")?;
    ensure!(
        stats.containers.len() == 1 && stats.network.is_some(),
        "{stats:?}"
    );

    if handler == OURS && !in_process {
        figures(&pod)?;
    }

    let mut spec = container("oom", "busybox", &["sh", "-c", "tail /dev/zero"]);
    spec.linux.get_or_insert_default().resources = Some(limit(24));
    let c = pod.start(&spec)?;
    let status = pod.cri.wait_exit(&c, PATIENCE)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "{status:?}"
    );
    pod.remove()
}

/// A file of the cgroup in which the threads of a pod's VM are.
pub fn pod_cgroup(pod: &str, file: &str) -> Result<String> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|l| l.strip_prefix("0::/"));
    // The sandboxer is a child of ours, in the same cgroup.
    let path = std::path::Path::new("/sys/fs/cgroup")
        .join(own.context("no cgroup v2")?)
        .join(format!("bulkhead-{pod}"))
        .join(file);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// What the host knows of the pod: its VM's threads are held to the pod's share of CPU and counted,
/// and Prometheus gets figures.
fn figures(pod: &TestPod) -> Result<()> {
    let read = |file| pod_cgroup(&pod.id, file);
    ensure!(read("cpu.max")? == "80000 100000\n", "{}", read("cpu.max")?);
    ensure!(read("cpu.weight")? == "20\n", "{}", read("cpu.weight")?);
    ensure!(read("cgroup.threads")?.lines().count() >= 2, "no threads");
    let used = read("cpu.stat")?;
    let used = used.lines().find_map(|l| l.strip_prefix("usage_usec "));
    let used: u64 = used.context("no usage")?.parse()?;
    ensure!(used > 10_000, "{used} us");

    let mut stream = std::os::unix::net::UnixStream::connect(METRICS)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    let labels = format!(
        "{{runtime=\"{OURS}\",sandbox=\"{}\",namespace=\"default\",pod=\"limits\"",
        pod.id
    );
    for name in [
        "bulkhead_pod_memory_bytes",
        "bulkhead_pod_cpu_seconds_total",
        "bulkhead_pod_processes",
        "bulkhead_vm_exits_total",
        "bulkhead_vm_resident_bytes",
        "bulkhead_vm_cpu_seconds_total",
    ] {
        // In all: some have a label more, and a copy of a VM had no exit of some reasons.
        let values = text
            .lines()
            .filter(|l| l.starts_with(&format!("{name}{labels}")))
            .map(|l| l.rsplit(' ').next().unwrap_or_default().parse::<f64>())
            .collect::<Result<Vec<_>, _>>()?;
        ensure!(
            values.iter().sum::<f64>() > 0.0,
            "{name} {values:?}: {text}"
        );
    }
    let running = format!("bulkhead_pods{{runtime=\"{OURS}\",state=\"running\"}} 1\n");
    ensure!(text.contains(&running), "{text}");
    Ok(())
}

fn stop_gracefully(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("grace"))?;
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let spec = container("polite", "busybox", &["sh", "-c", script]);
    let c = pod.start(&spec)?;
    let begin = Instant::now();
    while !log(&pod.config, &spec)?.0.contains("up") {
        ensure!(begin.elapsed() < PATIENCE, "never up");
        std::thread::sleep(Duration::from_millis(50));
    }
    pod.cri.stop(&c, 60)?;
    ensure!(pod.cri.status(&c)?.exit_code == 5);
    ensure!(log(&pod.config, &spec)?.0.ends_with("bye\n"));
    let script = "trap '' TERM; echo deaf; sleep 100000";
    let spec = container("deaf", "busybox", &["sh", "-c", script]);
    let deaf = pod.start(&spec)?;
    let begin = Instant::now();
    while !log(&pod.config, &spec)?.0.contains("deaf") {
        ensure!(begin.elapsed() < PATIENCE, "never started");
        std::thread::sleep(Duration::from_millis(50));
    }
    let begin = Instant::now();
    pod.cri.stop(&deaf, 1)?;
    ensure!(pod.cri.status(&deaf)?.exit_code == 137 && begin.elapsed() < PATIENCE);
    pod.remove()
}

fn bad_input(node: &mut Node, handler: &str) -> Result<()> {
    let cri = node.cri(handler)?;
    let mut host = pod("hostnet");
    host.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption {
            network: 2,
            ..NamespaceOption::default()
        }),
        ..Default::default()
    });
    let error = format!("{:#}", cri.run_pod(&host).expect_err("host network"));
    ensure!(error.contains("hostNetwork"), "{error}");

    let pod = TestPod::run(node, handler, pod("bad"))?;
    let spec = container("missing", "busybox", &["/no/such/program"]);
    let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
    let error = format!("{:#}", pod.cri.start(&c).expect_err("no such program"));
    ensure!(error.contains("/no/such/program"), "{error}");
    let status = pod.cri.status(&c)?;
    ensure!(
        status.state == CONTAINER_EXITED && status.exit_code != 0,
        "{status:?}"
    );
    pod.cri.remove(&c)?;

    let mut spec = container("device", "busybox", &["true"]);
    spec.mounts = vec![Mount {
        container_path: "/x".into(),
        host_path: "/dev/null".into(),
        ..Mount::default()
    }];
    let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
    ensure!(pod.cri.start(&c).is_err(), "a device as a volume");
    // The pod is as good as before.
    let c = pod.sleeper("good")?;
    let answer = pod.cri.exec(&c, &["/no/such/program"]);
    ensure!(
        answer.is_err() || answer.is_ok_and(|a| a.exit_code != 0),
        "exec"
    );
    ensure!(pod.sh(&c, "echo fine")? == "fine\n");
    pod.remove()
}
