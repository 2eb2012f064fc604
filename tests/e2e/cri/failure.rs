//! Bad requests, and what fails in use: full disks, clients that do not read or leave, guests that
//! panic or hang.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_protocol::client::{Client as Ttrpc, ClientOptions, TaskClient};
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::task::{CreateTaskRequest, KillRequest, StateRequest};
use bulkhead_protocol::types::Any;
use bulkhead_sandboxer::daemon::proto as sandbox;
use bulkhead_tests::cri::containerd::{Node, OURS};
use bulkhead_tests::cri::grpc::{Client, code};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, WebSocket, container, pod};
use bulkhead_tests::env::PATIENCE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Test;
use super::host::Host;

pub const TESTS: &[Test] = &[
    ("bad_requests", false, bad_requests),
    ("full_disk_and_clients_that_leave", true, in_use),
    ("guest_panics", false, guest_panics),
    ("guest_hangs", false, guest_hangs),
    ("cni_fails", true, cni_fails),
];

const CONTROLLER: &str = "/run/bulkhead/microvm.sock";

/// Past containerd: what it would never send.
fn bad_requests(node: &mut Node, _: &str) -> Result<()> {
    let client = Client::connect(Path::new(CONTROLLER))?;
    let call = |method: &str, request: &dyn Fn(&str) -> Result<()>| -> Result<i32> {
        let path = format!("/{}/{method}", sandbox::CONTROLLER);
        match request(&path) {
            Ok(()) => Ok(0),
            Err(error) => code(&error).with_context(|| format!("{method}: {error:#}")),
        }
    };
    let create = |request: &sandbox::CreateRequest| {
        call("Create", &|path| {
            client
                .call::<_, sandbox::CreateResponse>(path, request, PATIENCE)
                .map(drop)
        })
    };
    let by_id = |method: &str, id: &str| {
        let request = sandbox::IdRequest {
            sandbox_id: id.into(),
        };
        call(method, &|path| {
            client
                .call::<_, sandbox::Nothing>(path, &request, PATIENCE)
                .map(drop)
        })
    };
    let wish = |id: &str| sandbox::CreateRequest {
        sandbox_id: id.into(),
        ..sandbox::CreateRequest::default()
    };
    let invalid = Code::InvalidArgument as i32;
    // What cannot be decoded, names that lead elsewhere.
    let mut garbage = wish("garbage");
    garbage.options = Some(Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: vec![0xff; 100],
    });
    ensure!(create(&garbage)? == invalid);
    for id in ["", "..", "../../etc", "a/b", &"x".repeat(100)] {
        ensure!(create(&wish(id))? == invalid, "{id:?}");
    }
    // Nobody by that name.
    for method in [
        "Start", "Stop", "Wait", "Status", "Platform", "Metrics", "Update",
    ] {
        let answer = by_id(method, "nobody")?;
        ensure!(answer == Code::NotFound as i32, "{method}: {answer}");
    }
    ensure!(by_id("Shutdown", "nobody")? == 0, "asked for twice");
    ensure!(by_id("Destroy", "nobody")? == Code::Unimplemented as i32);
    // Large is taken, too large is refused, and the daemon lives.
    let mut large = wish("large");
    large.annotations = BTreeMap::from([("a".into(), "x".repeat(1 << 20))]);
    ensure!(create(&large)? == 0);
    large.sandbox_id = "larger".into();
    large.annotations = BTreeMap::from([("a".into(), "x".repeat(6 << 20))]);
    ensure!(create(&large).is_err() || create(&large)? != 0);
    // Once more is no error; its network is not there, which names it and leaves nothing.
    let client = Client::connect(Path::new(CONTROLLER))?;
    let request = sandbox::CreateRequest {
        netns_path: "/run/netns/not-there".into(),
        ..wish("no-network")
    };
    for _ in 0..2 {
        let path = format!("/{}/Create", sandbox::CONTROLLER);
        client.call::<_, sandbox::CreateResponse>(&path, &request, PATIENCE)?;
    }
    let path = format!("/{}/Start", sandbox::CONTROLLER);
    let id = sandbox::IdRequest {
        sandbox_id: "no-network".into(),
    };
    let error = client
        .call::<_, sandbox::StartResponse>(&path, &id, PATIENCE)
        .err()
        .context("a pod without its network")?;
    ensure!(format!("{error:#}").contains("not-there"), "{error:#}");
    let path = format!("/{}/Shutdown", sandbox::CONTROLLER);
    let id = sandbox::IdRequest {
        sandbox_id: "large".into(),
    };
    client.call::<_, sandbox::Nothing>(&path, &id, PATIENCE)?;
    let left = fs::read_dir("/run/bulkhead/pods")?.count();
    ensure!(left == 0, "{left} pods are left");
    bad_tasks(node)
}

/// The same for containers: on the socket of a running pod.
fn bad_tasks(node: &mut Node) -> Result<()> {
    let pod = TestPod::run(node, OURS, pod("bad-tasks"))?;
    let c = pod.sleeper("c")?;
    let error = pod
        .cri
        .create(&pod.id, &pod.config, &container("none", "busybox", &[]))
        .map(drop);
    // The test image has a command; one without would be refused by containerd itself.
    if let Err(error) = error {
        ensure!(format!("{error:#}").contains("command"), "{error:#}");
    }
    let socket = format!("/run/bulkhead/pods/{}/task.sock", pod.id);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(&socket).await?;
        let options = ClientOptions {
            timeout: Some(PATIENCE),
            ..ClientOptions::default()
        };
        let tasks = TaskClient::new(Ttrpc::with_options(stream, options));
        let create = |id: &str, bundle: &str| CreateTaskRequest {
            id: id.into(),
            bundle: bundle.into(),
            ..CreateTaskRequest::default()
        };
        for (request, wanted) in [
            (create(&c, "/"), Code::AlreadyExists),
            (create("x/y", "/"), Code::InvalidArgument),
            (create("new", "/no/such/bundle"), Code::InvalidArgument),
        ] {
            let answer = tasks.create(&request).await;
            let got = answer.err().and_then(|e| e.code());
            ensure!(got == Some(wanted), "{}: {got:?}", request.id);
        }
        let state = |id: &str, exec: &str| StateRequest {
            id: id.into(),
            exec_id: exec.into(),
        };
        for (id, exec) in [("nobody", ""), (c.as_str(), "no-exec")] {
            let answer = tasks.state(&state(id, exec)).await;
            let got = answer.err().and_then(|e| e.code());
            ensure!(got == Some(Code::NotFound), "{id} {exec}: {got:?}");
        }
        let signal = KillRequest {
            id: c.clone(),
            signal: 4711,
            ..KillRequest::default()
        };
        ensure!(tasks.kill(&signal).await.is_err(), "signal 4711");
        anyhow::Ok(())
    })?;
    ensure!(pod.sh(&c, "echo fine")? == "fine\n");
    pod.remove()
}

/// A file system of a megabyte; gone when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let size = Some("size=1m");
        mount(
            Some("none"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            size,
        )?;
        Ok(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn in_use(node: &mut Node, handler: &str) -> Result<()> {
    let small = Small::new()?;
    let pod = TestPod::run(node, handler, pod("trouble"))?;
    let mut spec = container("c", "busybox", &["sleep", "100000"]);
    spec.mounts = vec![Mount {
        container_path: "/small".into(),
        host_path: small.0.path().display().to_string(),
        ..Mount::default()
    }];
    let c = pod.start(&spec)?;
    // Full is what the program is told, and it goes on once there is room.
    let script = "dd if=/dev/zero of=/small/x bs=64k count=100";
    let answer = pod.cri.exec(&c, &["sh", "-c", script])?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    ensure!(
        answer.exit_code != 0 && said.contains("No space left"),
        "{answer:?}"
    );
    pod.sh(&c, "rm /small/x && echo fits > /small/y && cat /small/y")?;

    // A gigabyte that nobody reads: it waits where it is made.
    let before = anonymous_kib(node)?;
    let url = pod
        .cri
        .exec_url(&c, &["head", "-c", "1000000000", "/dev/zero"], false, false)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    for n in 0..10 {
        ensure!(pod.sh(&c, &format!("echo {n}"))? == format!("{n}\n"));
    }
    let grown = anonymous_kib(node)?.saturating_sub(before);
    println!("  with output that nobody reads, the sandboxer has {grown} KiB more");
    ensure!(handler != OURS || grown < 8 << 10, "{grown} KiB more");
    // What is read after that is whole.
    let mut read = 0;
    while read < 4_000_000 {
        let (channel, data) = socket.receive()?.context("the output ended")?;
        ensure!(channel == 1 && data.iter().all(|b| *b == 0), "{channel}");
        read += data.len();
    }
    // The client leaves in the middle: what it ran ends, since nobody takes its output.
    drop(socket);
    pod.until(&c, "ps | grep -c '[h]ead -c 1000' || true", "0")?;
    ensure!(pod.sh(&c, "echo fine")? == "fine\n");
    pod.remove()
}

/// Memory of the sandboxer that is no file and no guest.
fn anonymous_kib(node: &Node) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", node.sandboxer_pid()))?;
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let word = line.and_then(|l| l.split_whitespace().next());
    Ok(word.context("no RssAnon")?.parse()?)
}

pub fn privileged(name: &str) -> PodSandboxConfig {
    let mut config = pod(name);
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    config
}

pub fn with_privileges(mut spec: ContainerConfig) -> ContainerConfig {
    spec.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
        privileged: true,
        ..LinuxContainerSecurityContext::default()
    });
    spec
}

/// The pod is not ready, and the log says why.
fn ended_for(node: &Node, pod: &TestPod, c: &str, reason: &str) -> Result<()> {
    let status = pod.cri.wait_exit(c, PATIENCE)?;
    ensure!(status.exit_code == 137, "{status:?}");
    let begin = Instant::now();
    while pod.cri.pod_status(&pod.id)?.state != SANDBOX_NOTREADY {
        ensure!(begin.elapsed() < PATIENCE, "the pod is still ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    let log = node.logs();
    let said = log
        .lines()
        .any(|l| l.contains(&pod.id) && l.contains("ended by itself") && l.contains(reason));
    ensure!(said, "no {reason:?} in the log: {log}");
    Ok(())
}

fn guest_panics(node: &mut Node, handler: &str) -> Result<()> {
    let pod = TestPod::run(node, handler, privileged("panic"))?;
    let spec = with_privileges(container("c", "busybox", &["sleep", "100000"]));
    let c = pod.start(&spec)?;
    // The call ends with the guest, one way or another.
    let script = "echo 2 > /proc/sys/vm/panic_on_oom && tail /dev/zero";
    let _ = pod.cri.exec(&c, &["sh", "-c", script]);
    ended_for(node, &pod, &c, "Out of memory")?;
    // Its last words are there for people.
    let log = node.logs();
    ensure!(log.contains("last words of the guest"), "{log}");
    pod.remove()
}

/// A guest that stands still, agent and all: a stop ends all the same, soon after its grace.
fn guest_hangs(node: &mut Node, handler: &str) -> Result<()> {
    // The sandboxer's patience on an emulated host would be a minute and a half.
    node.kill_sandboxer();
    node.start_sandboxer_with(&[("BULKHEAD_TIMEOUT_FACTOR", "4")])?;
    let patience = Duration::from_secs(2 * 3 * 4);
    let pod = TestPod::run(node, handler, pod("hangs"))?;
    let c = pod.start(&container("c", "busybox", &["sleep", "100000"]))?;
    // As `vmmctl ps` and crictl shorten ids.
    let paused = Command::new(bulkhead_tests::env::vmmctl()?)
        .args(["pause", &pod.id[..13]])
        .output()?;
    ensure!(paused.status.success(), "{paused:?}");
    let grace = Duration::from_secs(1);
    let begin = Instant::now();
    pod.cri.stop(&c, 1)?;
    let took = begin.elapsed();
    println!(
        "  the stop of a guest that hangs took {:.1} s",
        took.as_secs_f64()
    );
    ensure!(
        took < grace + patience + Duration::from_secs(20),
        "{took:?}"
    );
    ended_for(node, &pod, &c, "did not answer to SIGKILL")?;
    pod.remove()?;
    node.terminate_sandboxer()?;
    node.start_sandboxer()
}

/// A network that cannot be made is said by the pod's creation, leaves nothing, and does not harm
/// the next one.
fn cni_fails(node: &mut Node, handler: &str) -> Result<()> {
    const REFUSES: &str = r#"#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "code": 100, "msg": "the test refuses"}'; exit 1 ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' ;;
esac
"#;
    // Makes the bridge, which stays.
    TestPod::run(node, handler, pod("cni0"))?.remove()?;
    let before = Host::settled(node)?;
    node.chain_cni(Some(REFUSES))?;
    let result = refused_pods(node, handler);
    node.chain_cni(None)?;
    result?;
    let begin = Instant::now();
    while let Err(error) = TestPod::run(node, handler, pod("cni2")).and_then(TestPod::remove) {
        ensure!(begin.elapsed() < PATIENCE, "no pod after that: {error:#}");
    }
    before.as_before(node).map(drop)
}

fn refused_pods(node: &Node, handler: &str) -> Result<()> {
    let begin = Instant::now();
    let mut failures = 0;
    while failures < 3 {
        match TestPod::run(node, handler, pod("cni1")) {
            // Not read yet.
            Ok(pod) => {
                ensure!(failures == 0 && begin.elapsed() < PATIENCE, "the pod runs");
                pod.remove()?;
            }
            Err(error) => {
                let error = format!("{error:#}");
                ensure!(error.contains("the test refuses"), "{error}");
                failures += 1;
            }
        }
    }
    let left = node.cri(handler)?.pods()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
