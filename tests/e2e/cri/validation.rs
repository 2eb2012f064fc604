//! What validation suites of CRI ask beyond the usual: mounts below mounts, profiles, log rotation,
//! calls repeated.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{Node, OURS, PROCESS};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, log, pod, pod as config};
use bulkhead_tests::env::PATIENCE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Test;

pub const TESTS: &[Test] = &[
    ("mounts_below_volumes", true, mounts_below_volumes),
    ("seccomp_profiles", true, seccomp_profiles),
    ("privileges_by_setuid", true, privileges_by_setuid),
    ("unprivileged_ports_and_ping", true, unprivileged),
    ("log_rotation", true, log_rotation),
    ("repeated_calls", true, repeated_calls),
    ("terminal_and_environment", true, terminal_and_environment),
    ("processes_of_a_pod", true, processes_of_a_pod),
];

const PRIVATE: i32 = 0;
const HOST_TO_CONTAINER: i32 = 1;
const BIDIRECTIONAL: i32 = 2;

/// A file system on the host; gone when dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        mount(
            Some("none"),
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn volume(host: &Path, inside: &str, readonly: bool, propagation: i32) -> Mount {
    Mount {
        container_path: inside.into(),
        host_path: host.display().to_string(),
        readonly,
        propagation,
    }
}

pub fn mounts_below_volumes(node: &mut Node, handler: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let volumes = dir.path().join("volumes");
    let _top = Mounted::tmpfs(&volumes)?;
    mount(
        None::<&str>,
        &volumes,
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )?;
    for name in ["later", "early"] {
        fs::create_dir(volumes.join(name))?;
    }
    let _early = Mounted::tmpfs(&volumes.join("early"))?;
    let pod = TestPod::run(node, handler, pod("mounts"))?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.mounts = vec![
        volume(&volumes, "/private", false, PRIVATE),
        volume(&volumes, "/follows", false, HOST_TO_CONTAINER),
        volume(&volumes, "/read-only", true, PRIVATE),
    ];
    let c = pod.start(&spec)?;
    // Read-only is not recursive, as with every other runtime.
    ensure!(
        pod.cri.exec(&c, &["touch", "/read-only/x"])?.exit_code != 0,
        "the volume can be written"
    );
    pod.sh(&c, "touch /read-only/early/x")?;
    ensure!(volumes.join("early/x").exists());
    let later = Mounted::tmpfs(&volumes.join("later"))?;
    fs::write(volumes.join("later/flag"), "mounted later")?;
    pod.until(&c, "cat /follows/later/flag", "mounted later")?;
    let seen = pod.sh(&c, "ls -A /private/later")?;
    ensure!(seen.is_empty(), "a private volume shows {seen:?}");
    drop(later);
    pod.remove()?;
    // A pod of ours cannot mount on its host, and says so.
    if [OURS, PROCESS].contains(&handler) {
        let mut wish = config("shared");
        let security = &mut wish.linux.get_or_insert_default().security_context;
        security.get_or_insert_default().privileged = true;
        let pod = TestPod::run(node, handler, wish)?;
        let mut spec = container("c", "busybox", &["true"]);
        spec.mounts = vec![volume(&volumes, "/shared", false, BIDIRECTIONAL)];
        spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
            privileged: true,
            ..LinuxContainerSecurityContext::default()
        });
        let started = pod.start(&spec).map_err(|e| format!("{e:#}"));
        ensure!(
            started.as_ref().is_err_and(|e| e.contains("Bidirectional")),
            "{started:?}"
        );
        pod.remove()?;
    }
    Ok(())
}

pub fn seccomp_profiles(node: &mut Node, handler: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let profile = dir.path().join("no-chmod.json");
    fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )?;
    let pod = TestPod::run(node, handler, pod("seccomp"))?;
    let start = |name: &str, seccomp: Option<SecurityProfile>| {
        let mut spec = container(name, "busybox", &["sleep", "100000"]);
        spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
            seccomp,
            ..LinuxContainerSecurityContext::default()
        });
        pod.start(&spec)
    };
    let mode = |c: &str| -> Result<String> {
        let text = pod.sh(c, "grep ^Seccomp: /proc/self/status")?;
        Ok(text
            .split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned())
    };
    let unconfined = SecurityProfile {
        profile_type: 1,
        ..SecurityProfile::default()
    };
    ensure!(mode(&start("unconfined", Some(unconfined))?)? == "0");
    ensure!(mode(&start("none", None)?)? == "0");
    ensure!(mode(&start("default", Some(SecurityProfile::default()))?)? == "2");
    let file = SecurityProfile {
        profile_type: 2,
        localhost_ref: profile.display().to_string(),
    };
    let c = start("file", Some(file))?;
    let answer = pod.cri.exec(&c, &["chmod", "400", "/tmp"])?;
    let error = String::from_utf8_lossy(&answer.stderr).into_owned();
    ensure!(
        answer.exit_code != 0 && error.contains("Operation not permitted"),
        "{answer:?}"
    );
    pod.remove()
}

/// Programs with the set-user-ID bit work, unless the container may gain no privileges.
fn privileges_by_setuid(node: &mut Node, handler: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let tool = dir.path().join("python");
    let pod = TestPod::run(node, handler, pod("setuid"))?;
    // The image's own interpreter, in a volume and with the bit.
    let mut spec = container("maker", "python3", &["sleep", "100000"]);
    spec.mounts = vec![volume(dir.path(), "/tool", false, PRIVATE)];
    let maker = pod.start(&spec)?;
    let copy = "cp -L $(command -v python3) /tool/python && chmod 4755 /tool/python";
    pod.sh(&maker, copy)?;
    ensure!(tool.exists());
    for (no_new_privs, expected) in [(false, "0"), (true, "1000")] {
        let name = format!("user-{no_new_privs}");
        let mut spec = container(&name, "python3", &["sleep", "100000"]);
        spec.mounts = vec![volume(dir.path(), "/tool", true, PRIVATE)];
        spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 1000 }),
            no_new_privs,
            ..LinuxContainerSecurityContext::default()
        });
        let c = pod.start(&spec)?;
        let said = pod.sh(&c, "/tool/python -c 'import os; print(os.geteuid())'")?;
        ensure!(
            said.trim() == expected,
            "no_new_privs {no_new_privs}: {said}"
        );
    }
    pod.remove()
}

/// As containerd allows by default.
fn unprivileged(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("ports"))?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        capabilities: Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            ..Capability::default()
        }),
        ..LinuxContainerSecurityContext::default()
    });
    let c = pod.start(&spec)?;
    pod.sh(
        &c,
        "mkdir -p /dev/shm/w && echo low > /dev/shm/w/x && httpd -p 80 -h /dev/shm/w",
    )?;
    pod.until(&c, "wget -qO- http://127.0.0.1/x", "low")?;
    let range = pod.sh(&c, "cat /proc/sys/net/ipv4/ping_group_range")?;
    ensure!(
        range.split_whitespace().eq(["0", "2147483647"]),
        "ping_group_range {range}"
    );
    pod.remove()
}

/// As kubelet rotates logs: rename, then ask for a new file.
fn log_rotation(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("rotation"))?;
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let spec = container("c", "busybox", &["sh", "-c", script]);
    let c = pod.start(&spec)?;
    let current = Path::new(&pod.config.log_directory).join(&spec.log_path);
    let old = current.with_extension("old");
    let grown = || -> Result<()> {
        let begin = Instant::now();
        while log(&pod.config, &spec).map_or(0, |l| l.0.lines().count()) < 3 {
            ensure!(begin.elapsed() < PATIENCE, "nothing is logged");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    grown()?;
    fs::rename(&current, &old)?;
    pod.cri.reopen_log(&c)?;
    grown()?;
    pod.cri.stop(&c, 0)?;
    // No line twice, none missing.
    let last = |path: &Path| -> Result<u64> {
        let text = fs::read_to_string(path)?;
        let word = text.lines().last().and_then(|l| l.rsplit(' ').next());
        Ok(word.context("empty")?.parse()?)
    };
    let first: u64 = log(&pod.config, &spec)?
        .0
        .lines()
        .next()
        .context("empty")?
        .parse()?;
    ensure!(first == last(&old)? + 1, "{first} after {}", last(&old)?);
    pod.remove()
}

/// kubelet repeats what it is not sure of.
fn repeated_calls(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("repeated"))?;
    let unknown = "0123456789abcdef";
    pod.cri.stop_pod(unknown)?;
    pod.cri.remove_pod(unknown)?;
    pod.cri.remove(unknown)?;
    // Created, never started.
    let spec = container("created", "busybox", &["true"]);
    let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
    pod.cri.remove(&c)?;
    pod.cri.remove(&c)?;
    let c = pod.sleeper("c")?;
    pod.cri.stop(&c, 0)?;
    pod.cri.stop(&c, 0)?;
    // Still running when it is removed.
    let running = pod.sleeper("running")?;
    pod.cri.remove(&running)?;
    pod.cri.stop_pod(&pod.id)?;
    pod.cri.stop_pod(&pod.id)?;
    ensure!(pod.cri.pod_status(&pod.id)?.state == SANDBOX_NOTREADY);
    ensure!(pod.cri.status(&c)?.state == CONTAINER_EXITED);
    let (cri, id) = (node.cri(handler)?, pod.id.clone());
    pod.remove()?;
    cri.remove_pod(&id)
}

fn terminal_and_environment(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, pod("terminal"))?;
    let script = "test -t 0 && test -t 1 && test -t 2 && echo tty; pwd; echo $COLOUR; exit 3";
    let mut spec = container("c", "busybox", &["sh", "-c", script]);
    spec.tty = true;
    spec.stdin = true;
    spec.working_dir = "/etc".into();
    spec.envs = vec![KeyValue {
        key: "COLOUR".into(),
        value: "dark blue".into(),
    }];
    let c = pod.start(&spec)?;
    ensure!(pod.cri.wait_exit(&c, PATIENCE)?.exit_code == 3);
    let (out, _) = log(&pod.config, &spec)?;
    let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
    ensure!(lines == ["tty", "/etc", "dark blue"], "{out:?}");
    pod.remove()
}

/// `shareProcessNamespace`.
pub fn processes_of_a_pod(node: &mut Node, handler: &str) -> Result<()> {
    let options = NamespaceOption::default();
    let mut wish = pod("processes");
    let security = &mut wish.linux.get_or_insert_default().security_context;
    security.get_or_insert_default().namespace_options = Some(options.clone());
    let pod = TestPod::run(node, handler, wish)?;
    let start = |name: &str| {
        let command = ["sh", "-c", "sleep 45678 & exec sleep 56789"];
        let mut spec = container(name, "busybox", &command);
        let security = &mut spec.linux.get_or_insert_default().security_context;
        security.get_or_insert_default().namespace_options = Some(options.clone());
        pod.start(&spec)
    };
    let (a, b) = (start("a")?, start("b")?);
    let count = "ps | grep -c '[s]leep 45678'";
    pod.until(&a, count, "2")?;
    let first = pod.sh(&a, "cat /proc/1/cmdline")?;
    ensure!(!first.contains("sleep"), "process 1 is {first:?}");
    // Not PID 1, so SIGTERM ends it; and all of the container ends with it.
    let begin = Instant::now();
    pod.cri.stop(&b, 200)?;
    ensure!(
        begin.elapsed() < Duration::from_secs(100),
        "SIGTERM is ignored"
    );
    ensure!(pod.cri.status(&b)?.exit_code == 143);
    pod.until(&a, count, "1")?;
    pod.remove()
}
