//! The agent's service, run natively: real containers in new namespaces of this host.
//!
//! Where that is not allowed, each test prints "SKIPPED: reason" and ends. The same tests run
//! against an agent in a VM (tests/vm), where also what needs cgroup controllers is tested.

mod fixture;
mod hostile;
mod limits;
mod stdio;

use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::sandbox::{self, EventKind};
use bulkhead_protocol::task;
use bulkhead_protocol::types::{Empty, ProcessStatus};
use fixture::{Agent, CAPABILITIES, SHARE, process};
use prost::Message;
use serde_json::json;

macro_rules! agent {
    () => {
        match crate::fixture::Agent::start().await {
            Some(agent) => agent,
            None => return,
        }
    };
}
pub(crate) use agent;

async fn status(agent: &Agent, id: &str) -> ProcessStatus {
    let request = task::StateRequest {
        id: id.into(),
        exec_id: String::new(),
    };
    let state = agent.tasks.state(&request).await.unwrap();
    ProcessStatus::try_from(state.status).unwrap()
}

#[tokio::test]
async fn a_container_runs_and_is_gone_without_trace() {
    let agent = agent!();
    let before = agent.descriptors();
    let output = agent
        .run("c1", &["sh", "-c", "echo out; echo err >&2; exit 7"])
        .await;
    assert_eq!(
        (
            output.status,
            output.stdout.as_str(),
            output.stderr.as_str()
        ),
        (7, "out\n", "err\n")
    );
    assert_eq!(agent.leftovers(), Vec::<String>::new());
    assert_eq!(agent.descriptors(), before);
    // The same id again.
    assert_eq!(agent.run("c1", &["true"]).await.status, 0);
}

#[tokio::test]
async fn states_follow_the_life_of_a_container() {
    let agent = agent!();
    let (request, spec) = agent.request(
        "c1",
        &[
            "sh",
            "-c",
            "trap 'exit 3' TERM; while :; do sleep 0.05; done",
        ],
    );
    let pid = agent.create(request.clone(), &spec, "").await.unwrap();
    assert!(pid > 1);
    assert_eq!(status(&agent, "c1").await, ProcessStatus::Created);
    let error = agent.create(request, &spec, "").await.unwrap_err();
    assert_eq!(error.code(), Some(Code::AlreadyExists));

    assert_eq!(agent.start_task("c1").await, pid);
    assert_eq!(status(&agent, "c1").await, ProcessStatus::Running);
    let again = agent.start_exec("c1", "").await.unwrap_err();
    assert_eq!(again.code(), Some(Code::FailedPrecondition));
    let running = task::DeleteRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let error = agent.tasks.delete(&running).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));

    // Many wait for one end, and one asks afterwards.
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let tasks = agent.tasks.clone();
            tokio::spawn(async move {
                let request = task::WaitRequest {
                    id: "c1".into(),
                    ..Default::default()
                };
                tasks.wait(&request).await.unwrap().exit_status
            })
        })
        .collect();
    // The trap may not be set yet: the first signals are ignored by a PID 1.
    while status(&agent, "c1").await == ProcessStatus::Running {
        let _ = agent.kill("c1", "", libc::SIGTERM).await;
    }
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 3);
    }
    assert_eq!(agent.wait("c1", "").await, 3);
    assert_eq!(status(&agent, "c1").await, ProcessStatus::Stopped);
    let error = agent.kill("c1", "", libc::SIGTERM).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
    let deleted = agent.delete("c1", "").await;
    assert_eq!((deleted.exit_status, deleted.pid), (3, pid));
    assert!(deleted.exited_at.unwrap().seconds > 1_600_000_000);
    let error = agent.tasks.delete(&running).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
}

#[tokio::test]
async fn death_by_signal_is_128_and_the_signal() {
    let agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.wait("c1", "").await, 137);
    // A real-time signal, in a process that is not PID 1 of its namespace.
    agent.launch("c2", &["sleep", "1000"]).await;
    agent
        .announce("c2", "e", &process(&["sleep", "1000"]), false, ["", "", ""])
        .await
        .unwrap();
    agent.start_exec("c2", "e").await.unwrap();
    agent.kill("c2", "e", 40).await.unwrap();
    assert_eq!(agent.wait("c2", "e").await, 168);
    // A container that was made but never started.
    let (request, spec) = agent.request("c3", &["true"]);
    agent.create(request, &spec, "").await.unwrap();
    let deleted = agent.delete("c3", "").await;
    assert_eq!(deleted.exit_status, 137);
    assert_eq!(
        agent.kill("c1", "", 99).await.unwrap_err().code(),
        Some(Code::InvalidArgument)
    );
}

#[tokio::test]
async fn programs_that_cannot_run_are_told_apart() {
    let agent = agent!();
    let error = async |id: &str, program: &str| {
        let (request, spec) = agent.request(id, &[program]);
        agent.create(request, &spec, "").await.unwrap_err()
    };
    let missing = error("c1", "no-such-program").await;
    assert_eq!(missing.code(), Some(Code::NotFound), "{missing}");
    assert!(missing.to_string().contains("executable file not found"));
    let directory = error("c2", "/etc").await;
    assert_eq!(
        directory.code(),
        Some(Code::PermissionDenied),
        "{directory}"
    );
    let plain = error("c3", "/etc/passwd").await;
    assert_eq!(plain.code(), Some(Code::PermissionDenied), "{plain}");
    assert_eq!(agent.leftovers(), Vec::<String>::new());

    // Known only when it is executed: the container says it and ends as a shell would.
    let root = agent.rootfs("c4");
    std::fs::write(root.join("bin/bad"), "#!/no/such/interpreter\n").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(root.join("bin/bad"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = agent.run("c4", &["bad"]).await;
    assert_eq!(output.status, 127, "{output:?}");
    assert!(output.stderr.contains("interpreter"), "{output:?}");

    // The same for processes that join.
    agent.launch("c5", &["sleep", "1000"]).await;
    for (exec_id, program, code, exit) in [
        ("e1", "no-such-program", Code::NotFound, 127),
        ("e2", "/etc", Code::PermissionDenied, 126),
    ] {
        agent
            .announce("c5", exec_id, &process(&[program]), false, ["", "", ""])
            .await
            .unwrap();
        let error = agent.start_exec("c5", exec_id).await.unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
        assert_eq!(agent.wait("c5", exec_id).await, exit);
    }
    let mut lost = process(&["true"]);
    lost["cwd"] = json!("/no/such");
    agent
        .announce("c5", "e3", &lost, false, ["", "", ""])
        .await
        .unwrap();
    let error = agent.start_exec("c5", "e3").await.unwrap_err();
    assert!(error.to_string().contains("/no/such"), "{error}");
}

#[tokio::test]
async fn processes_join_a_container() {
    let agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    let output = agent
        .exec(
            "c1",
            &process(&["sh", "-c", "cat /proc/1/comm; hostname; echo $HOME; exit 9"]),
        )
        .await;
    assert_eq!(output.status, 9);
    assert_eq!(output.stdout, "sleep\nbox\n/root\n");
    assert_eq!(output.stderr, "");

    let mut as_www = process(&[
        "sh",
        "-c",
        "id -u; id -G; pwd; echo $HOME; echo hi > /dev/stdout",
    ]);
    as_www["user"] = json!({"username": "www"});
    as_www["cwd"] = json!("/tmp");
    let output = agent.exec("c1", &as_www).await;
    assert_eq!(
        output.stdout, "33\n33 29\n/tmp\n/home/www\nhi\n",
        "{output:?}"
    );

    // It sees the container's processes and nothing else.
    let output = agent.exec("c1", &process(&["ps", "-o", "comm"])).await;
    assert_eq!(output.stdout, "COMMAND\nsleep\nps\n");

    // Twenty at once.
    let many = (0..20).map(|n| {
        let agent = &agent;
        async move {
            let n = n.to_string();
            let output = agent
                .exec(
                    "c1",
                    &process(&["sh", "-c", &format!("echo {n}; exit {n}")]),
                )
                .await;
            assert_eq!(
                (output.status.to_string(), output.stdout),
                (n.clone(), format!("{n}\n"))
            );
        }
    });
    join_all(many).await;

    // Its end is the end of all that joined.
    agent
        .announce("c1", "e", &process(&["sleep", "1000"]), false, ["", "", ""])
        .await
        .unwrap();
    let duplicate = agent
        .announce("c1", "e", &process(&["true"]), false, ["", "", ""])
        .await
        .unwrap_err();
    assert_eq!(duplicate.code(), Some(Code::AlreadyExists));
    agent.start_exec("c1", "e").await.unwrap();
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.wait("c1", "e").await, 137);
    assert_eq!(agent.wait("c1", "").await, 137);
    let error = agent
        .announce("c1", "late", &process(&["true"]), false, ["", "", ""])
        .await;
    assert!(error.is_ok());
    let error = agent.start_exec("c1", "late").await.unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition), "{error}");
    agent.delete("c1", "").await;
    assert_eq!(agent.leftovers(), Vec::<String>::new());
}

/// Polls all at once.
async fn join_all<F: Future>(futures: impl Iterator<Item = F>) {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        futures.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if futures.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

/// The value of a line "Name:\tvalue" of /proc/self/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(":\t"))
        .unwrap_or_else(|| panic!("no {name} in {status}"))
}

#[tokio::test]
async fn privileges_are_as_the_spec_says_for_all_processes() {
    let agent = agent!();
    let (request, mut spec) = agent.request(
        "c1",
        &["sh", "-c", "cat /proc/self/status; exec sleep 1000"],
    );
    let nobody = json!({"uid": 33, "gid": 33, "additionalGids": [29], "umask": 0o27});
    spec["process"]["user"] = nobody.clone();
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    });
    let (mut stdout, name) = agent.stream().await;
    let request = task::CreateTaskRequest {
        stdout: name,
        ..request
    };
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c1").await;
    let init = fixture::read_until(&mut stdout, "nonvoluntary_ctxt_switches").await;
    // A process that says nothing of privileges gets the container's.
    let bare = json!({
        "args": ["sh", "-c", "cat /proc/self/status; mkdir /tmp/x; ulimit -n; cat /proc/self/oom_score_adj"],
        "cwd": "/", "env": ["PATH=/bin"], "user": nobody,
    });
    let exec = agent.exec("c1", &bare).await;
    let bits: u64 = [0, 1, 7, 6, 5].iter().map(|b| 1u64 << b).sum();
    for status in [&init, &exec.stdout] {
        assert_eq!(field(status, "Uid"), "33\t33\t33\t33");
        assert_eq!(field(status, "Groups").trim(), "29");
        assert_eq!(field(status, "NoNewPrivs"), "1");
        assert_eq!(field(status, "Seccomp"), "2");
        assert_eq!(
            u64::from_str_radix(field(status, "CapBnd"), 16).unwrap(),
            bits
        );
        // Not root, and nothing ambient: no effective capabilities after execve.
        assert_eq!(u64::from_str_radix(field(status, "CapEff"), 16).unwrap(), 0);
        // Signals 32 and 33 are the C library's own; what this test was started with decides.
        let ignored = u64::from_str_radix(field(status, "SigIgn"), 16).unwrap();
        assert_eq!(ignored & !(3 << 31), 0, "{ignored:x}");
        assert_eq!(field(status, "SigBlk"), "0000000000000000");
    }
    assert_eq!(field(&init, "Umask"), "0027");
    assert!(exec.stderr.contains("Operation not supported"), "{exec:?}");
    assert!(exec.stdout.ends_with("77\n321\n"), "{exec:?}");
    assert_eq!(CAPABILITIES.len(), 5);

    // Without no_new_privs a filter holds too, for both kinds of processes.
    let (request, mut spec) = agent.request("c2", &["sleep", "1000"]);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    });
    spec["process"]["noNewPrivileges"] = json!(false);
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c2").await;
    let output = agent
        .exec(
            "c2",
            &process(&["sh", "-c", "grep Seccomp: /proc/1/status; mkdir /x"]),
        )
        .await;
    assert!(output.stdout.contains("Seccomp:\t2"), "{output:?}");
    assert!(
        output.stderr.contains("Operation not supported"),
        "{output:?}"
    );
}

#[tokio::test]
async fn roots_mounts_and_users_are_as_the_spec_says() {
    let agent = agent!();
    std::fs::create_dir_all(agent.share("volumes/0")).unwrap();
    std::fs::write(agent.share("volumes/0/from-host"), "hello").unwrap();
    let script = "touch /x 2>/dev/null && echo root-writable
        cat /vol/from-host; echo back > /vol/from-guest
        touch /ro/y 2>/dev/null && echo ro-writable
        cat /proc/kcore | wc -c
        echo 1 > /proc/sys/kernel/panic 2>/dev/null && echo sys-writable
        id -un; id -G; echo $HOME; cat /etc/resolv.conf /etc/hostname; cat /proc/sys/net/ipv4/ip_forward
        test -c /dev/null && test -w /dev/shm && echo devices";
    let (request, mut spec) = agent.request("c1", &["sh", "-c", script]);
    let root = agent.share("rootfs/c1");
    std::fs::create_dir_all(root.join("ro")).unwrap();
    for f in ["resolv.conf", "hosts", "hostname"] {
        std::fs::write(root.join("etc").join(f), "").unwrap();
    }
    std::fs::set_permissions(
        agent.share("volumes/0"),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    spec["root"]["readonly"] = json!(true);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/vol", "type": "bind", "source": format!("{SHARE}/volumes/0"), "options": ["rbind"]}));
    mounts.push(json!({"destination": "/ro", "type": "bind", "source": format!("{SHARE}/volumes/0"), "options": ["rbind", "ro"]}));
    agent
        .sandbox
        .configure_sandbox(&sandbox::ConfigureSandboxRequest {
            hostname: "pod7".into(),
            dns: Some(sandbox::Dns {
                servers: vec!["10.0.0.53".into()],
                searches: vec!["a.b".into(), "c".into()],
                options: vec!["ndots:5".into()],
            }),
            sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        })
        .await
        .unwrap();
    let output = agent.run_spec(request, &spec, "www").await;
    assert_eq!(
        output.stdout,
        "hello0\nwww\n33 29\n/home/www\nnameserver 10.0.0.53\nsearch a.b c\noptions ndots:5\npod7\n1\ndevices\n",
        "{output:?}"
    );
    assert_eq!(
        std::fs::read_to_string(agent.share("volumes/0/from-guest")).unwrap(),
        "back\n"
    );
    assert_eq!(agent.leftovers(), Vec::<String>::new());

    let (request, spec) = agent.request("c2", &["true"]);
    let error = agent
        .create(request, &spec, "nobody-here")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::InvalidArgument), "{error}");
}

#[tokio::test]
async fn the_network_is_set_up_and_shared() {
    let agent = agent!();
    let configure = sandbox::ConfigureSandboxRequest {
        interfaces: vec![sandbox::Interface {
            name: "lo".into(),
            addresses: vec!["10.9.8.7/24".into(), "fd00::7/64".into()],
            mtu: 9000,
            ..Default::default()
        }],
        routes: vec![
            sandbox::Route {
                destination: "10.50.0.0/16".into(),
                interface: "lo".into(),
                ..Default::default()
            },
            sandbox::Route {
                gateway: "10.9.8.1".into(),
                interface: "lo".into(),
                metric: 7,
                ..Default::default()
            },
        ],
        ..Default::default()
    };
    // Twice: what is there already is no error.
    for _ in 0..2 {
        let result = agent.sandbox.configure_sandbox(&configure).await;
        if let Err(error) = result {
            // A gateway on the loopback is refused by some kernels; the rest must work.
            assert!(error.to_string().contains("via \"10.9.8.1\""), "{error}");
        }
    }
    let output = agent
        .run("c1", &["sh", "-c", "ip addr show lo; ip route"])
        .await;
    assert!(output.stdout.contains("inet 10.9.8.7/24"), "{output:?}");
    assert!(output.stdout.contains("inet6 fd00::7/64"), "{output:?}");
    assert!(output.stdout.contains("mtu 9000"), "{output:?}");
    assert!(
        output.stdout.contains("10.50.0.0/16 dev lo scope link"),
        "{output:?}"
    );
    let bad = sandbox::ConfigureSandboxRequest {
        interfaces: vec![sandbox::Interface {
            mac: "02:00:00:00:00:01".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let error = agent.sandbox.configure_sandbox(&bad).await.unwrap_err();
    assert!(error.to_string().contains("02:00:00:00:00:01"), "{error}");
}

#[tokio::test]
async fn events_tell_of_every_end() {
    let agent = agent!();
    let wait = |after| sandbox::WaitEventRequest {
        after,
        timeout_ms: 60_000,
    };
    let newest = agent.newest_event().await;
    let first = tokio::spawn({
        let sandbox = agent.sandbox.clone();
        async move { sandbox.wait_event(&wait(newest)).await.unwrap().events }
    });
    agent.launch("c1", &["sh", "-c", "exit 5"]).await;
    let events = first.await.unwrap();
    let Some(EventKind::Exit(exit)) = &events[0].kind else {
        panic!("{events:?}")
    };
    assert_eq!((exit.container_id.as_str(), exit.exit_status), ("c1", 5));
    assert!(exit.exec_id.is_empty() && exit.pid > 1);
    let none = sandbox::WaitEventRequest {
        after: events[0].sequence,
        timeout_ms: 1,
    };
    let later = agent.sandbox.wait_event(&none).await.unwrap();
    assert!(later.events.is_empty());
}

#[tokio::test]
async fn pids_pause_and_statistics() {
    let agent = agent!();
    agent
        .launch("c1", &["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
        .await;
    let id = || "c1".to_owned();
    let pids = async || {
        agent
            .tasks
            .pids(&task::PidsRequest { id: id() })
            .await
            .unwrap()
            .processes
            .len()
    };
    while pids().await != 3 {
        tokio::task::yield_now().await;
    }
    let info = agent
        .sandbox
        .get_info(&sandbox::GetInfoRequest {})
        .await
        .unwrap();
    assert!(info.cpus_online > 0 && info.memory_bytes > 1 << 20);
    assert!(info.kernel.starts_with("Linux "));
    assert!(info.boot.iter().any(|s| s.name == "listening"));
    if !info.features.iter().any(|f| f == "cgroup2") {
        crate::fixture::skipped("no cgroup v2 can be mounted here: pause, statistics");
        return;
    }
    agent
        .tasks
        .pause(&task::PauseRequest { id: id() })
        .await
        .unwrap();
    assert_eq!(status(&agent, "c1").await, ProcessStatus::Paused);
    agent
        .tasks
        .resume(&task::ResumeRequest { id: id() })
        .await
        .unwrap();
    assert_eq!(status(&agent, "c1").await, ProcessStatus::Running);
    let stats = agent
        .tasks
        .stats(&task::StatsRequest { id: id() })
        .await
        .unwrap()
        .stats
        .unwrap();
    let metrics = Metrics::decode(stats.value.as_slice()).unwrap();
    assert!(metrics.cpu.unwrap().usage_usec > 0, "{metrics:?}");
    let all = task::KillRequest {
        id: id(),
        signal: libc::SIGKILL as u32,
        all: true,
        ..Default::default()
    };
    agent.tasks.kill(&all).await.unwrap();
    assert_eq!(agent.wait("c1", "").await, 137);
    agent.delete("c1", "").await;
    assert_eq!(agent.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn many_containers_at_once() {
    let agent = agent!();
    let before = agent.descriptors();
    join_all((0..12).map(|n| {
        let agent = &agent;
        async move {
            let output = agent
                .run(
                    &format!("c{n}"),
                    &["sh", "-c", &format!("yes {n} | head -n 1000; exit {n}")],
                )
                .await;
            assert_eq!(output.status, n);
            assert_eq!(output.stdout, format!("{n}\n").repeat(1000));
        }
    }))
    .await;
    assert_eq!(agent.leftovers(), Vec::<String>::new());
    assert_eq!(agent.descriptors(), before);
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_half_made_container() {
    let agent = agent!();
    let other = bulkhead_protocol::client::TaskClient::new(agent.connect().await);
    let (mut request, spec) = agent.request("c1", &["true"]);
    let options = sandbox::ContainerOptions {
        oci_spec: serde_json::to_vec(&spec).unwrap(),
        ..Default::default()
    };
    request.options = Some(bulkhead_protocol::types::Any::of(
        sandbox::CONTAINER_OPTIONS_TYPE_URL,
        &options,
    ));
    let call = tokio::spawn(async move { other.create(&request).await });
    // Once the agent has the call (its id is taken), drop the connection.
    let (again, _) = agent.request("c1", &["true"]);
    loop {
        let probe = agent.create(again.clone(), &json!({}), "").await;
        if probe.unwrap_err().code() == Some(Code::AlreadyExists) || call.is_finished() {
            break;
        }
    }
    call.abort();
    let _ = call.await;
    // It is made whole, and can be deleted.
    let request = task::DeleteRequest {
        id: "c1".into(),
        ..Default::default()
    };
    while let Err(error) = agent.tasks.delete(&request).await {
        assert_eq!(error.code(), Some(Code::NotFound), "{error}");
    }
    assert_eq!(agent.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn shutdown_ends_containers_and_the_agent() {
    let mut agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    agent.sandbox.check(&Empty {}).await.unwrap();
    agent
        .sandbox
        .add_entropy(&sandbox::AddEntropyRequest { data: vec![7; 32] })
        .await
        .unwrap();
    agent
        .sandbox
        .shutdown(&sandbox::ShutdownRequest { grace_ms: 50 })
        .await
        .unwrap();
    agent.wait_end();
}

#[test]
fn the_binary_says_what_it_is() {
    let run = |args: &[&str]| {
        std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"))
            .args(args)
            .output()
            .unwrap()
    };
    let version = run(&["--version"]);
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("bulkhead-agent "));
    let alone = run(&[]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(!run(&["helper", "77"]).status.success());
}
