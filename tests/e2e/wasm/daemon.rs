//! Wasm pods of the daemon, by the calls that containerd makes.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use bulkhead_fixtures::wasm as fixtures;
use bulkhead_protocol::client::TaskClient;
use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::sandbox::OCI_RESOURCES_TYPE_URL;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, ProcessStatus};
use bulkhead_sandboxer::daemon::config::Isolation;
use bulkhead_sandboxer::daemon::proto;
use bulkhead_tests::env::PATIENCE;
use bulkhead_tests::wasm::daemon::{self, Bundle, Daemon, id_of};
use bulkhead_tests::wasm::{HELLO_BODY, http_component, wit};
use prost::Message;
use serde_json::{Value, json};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn wat(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

/// Runs one program to its end in a pod that exists.
fn once(
    daemon: &Daemon,
    tasks: &TaskClient,
    runtime: &tokio::runtime::Runtime,
    id: &str,
    program: &[u8],
    change: impl FnOnce(&mut Value),
) -> (u32, String, String) {
    let image = daemon.image(id, program).unwrap();
    let bundle = daemon.bundle(id, &image, &["/app.wasm"], change).unwrap();
    runtime
        .block_on(daemon::run(tasks, bundle))
        .unwrap_or_else(|e| panic!("{id}: {e:#}\n{}", daemon.log()))
}

/// The same tests for both places where programs can run.
macro_rules! both {
    ($($test:ident)*) => {
        mod threads {
            $(#[test] fn $test() { super::$test(super::Isolation::Thread); })*
        }
        mod processes {
            $(#[test] fn $test() { super::$test(super::Isolation::Process); })*
        }
    };
}

both! {
    a_container_has_arguments_volumes_output_and_an_exit_code
    files_are_those_of_the_containers_user
    ends_are_told_apart
    a_loop_is_paused_resumed_and_killed_and_cannot_be_entered
    a_server_listens_in_its_pods_network_only
}

const LOOP: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;

fn a_container_has_arguments_volumes_output_and_an_exit_code(isolation: Isolation) {
    let daemon = Daemon::start_as(isolation).unwrap();
    let runtime = runtime();
    let volume = daemon.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("note"), "from the host\n").unwrap();
    let single = daemon.dir().join("single");
    fs::write(&single, "one file\n").unwrap();
    let address = daemon.pod("p", "").unwrap();
    let program = fixtures::compile_c("container.wasm", include_str!("container.c")).unwrap();
    let image = daemon.image("c", &fs::read(program).unwrap()).unwrap();
    let bundle = daemon
        .bundle("c", &image, &["app.wasm", "one", "two words"], |spec| {
            spec["process"]["env"] = json!(["WHO=me"]);
            let bind = |destination: &str, source: &std::path::Path, more: &str| {
                json!({"destination": destination, "type": "bind",
                       "source": source, "options": ["rbind", more]})
            };
            spec["mounts"] = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                bind("/data", &volume, "rw"),
                bind("/readonly", &volume, "ro"),
                bind("/etc/single", &single, "ro"),
            ]);
        })
        .unwrap();
    let (code, out, err) = runtime
        .block_on(async {
            let tasks = daemon::connect(&address).await?;
            daemon::run(&tasks, bundle).await
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}", daemon.log()));
    assert_eq!(
        out,
        "arguments: one, two words\nWHO=me\nnote: from the host\nsingle: one file\n\
         read-only: refused\n"
    );
    assert_eq!((code, err.as_str()), (42, "to stderr\n"));
    assert_eq!(
        fs::read_to_string(volume.join("out")).unwrap(),
        "written by C\n"
    );
    daemon.remove("p").unwrap();
    assert!(!address.exists());
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", daemon.pid())).unwrap();
    // Other tests have daemons of their own in the same mount namespace.
    let ours = format!("{}/wasm/p/", daemon.dir().display());
    let left: Vec<&str> = mounts.lines().filter(|l| l.contains(&ours)).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn files_are_those_of_the_containers_user(isolation: Isolation) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let daemon = Daemon::start_as(isolation).unwrap();
    let runtime = runtime();
    let volume = daemon.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    for (name, mode) in [("secret", 0o600), ("team", 0o640)] {
        fs::write(volume.join(name), format!("{name}'s\n")).unwrap();
        fs::set_permissions(volume.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(volume.join("team"), None, Some(3000)).unwrap();
    let program = fixtures::compile_c("user.wasm", include_str!("user.c")).unwrap();
    let program = fs::read(program).unwrap();
    let address = daemon.pod("p", "").unwrap();
    let tasks = runtime.block_on(daemon::connect(&address)).unwrap();
    let run = |id: &str, user: Value| {
        once(&daemon, &tasks, &runtime, id, &program, |spec| {
            spec["process"]["args"] = json!(["app.wasm", id]);
            spec["process"]["user"] = user;
            spec["mounts"] = json!([
                {"destination": "/data", "type": "bind", "source": volume, "options": ["rbind"]}
            ]);
        })
    };
    // One after the other in one pod: no thread of the one serves the other.
    let all = "secret: secret's\nteam: team's\n".to_owned();
    let some = "secret: refused\nteam: team's\n".to_owned();
    let user = json!({"uid": 1000, "gid": 2000, "additionalGids": [3000]});
    for (id, user, out, owner) in [
        ("root", json!({"uid": 0, "gid": 0}), &all, (0, 0)),
        ("user", user, &some, (1000, 2000)),
        ("again", json!({}), &all, (0, 0)),
    ] {
        assert_eq!(run(id, user), (0, out.clone(), String::new()), "{id}");
        let made = fs::metadata(volume.join(id)).unwrap();
        assert_eq!((made.uid(), made.gid()), owner, "{id}");
    }
    // The daemon itself has stayed what it was.
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    assert!(status.contains("\nUid:\t0\t0\t0\t0\n"), "{status}");
    daemon.remove("p").unwrap();
}

fn ends_are_told_apart(isolation: Isolation) {
    let daemon = Daemon::start_as(isolation).unwrap();
    let runtime = runtime();
    let address = daemon.pod("p", "").unwrap();
    let tasks = runtime.block_on(daemon::connect(&address)).unwrap();
    let trap = wat(r#"(module (func $deep (unreachable)) (func (export "_start") (call $deep)))"#);
    let (code, _, err) = once(&daemon, &tasks, &runtime, "trap", &trap, |_| ());
    assert_eq!(code, 134);
    assert!(
        err.contains("unreachable") && err.contains("\n    at "),
        "{err}"
    );
    let bomb = wat(r#"(module (memory 1) (func (export "_start")
          (loop $l (if (i32.eq (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
          (br $l))))"#);
    let (code, _, err) = once(&daemon, &tasks, &runtime, "bomb", &bomb, |spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    });
    assert_eq!(code, 137);
    assert!(err.contains("memory"), "{err}");
    // Refused before it starts, with words that say what to do.
    let refused = |id: &str, program: &[u8], args: &[&str]| {
        let image = daemon.image(id, program).unwrap();
        let bundle = daemon.bundle(id, &image, args, |_| ()).unwrap();
        let error = runtime.block_on(tasks.create(&bundle.create));
        error.expect_err("refused").to_string()
    };
    let elf = refused("elf", &fixtures::static_hello_elf(), &["/app.wasm"]);
    assert!(elf.contains("native program"), "{elf}");
    let missing = refused("missing", &trap, &["/other.wasm"]);
    assert!(missing.contains("/other.wasm: No such file"), "{missing}");
    // An ordinary container, of which its spec does not say enough.
    let none = refused("none", &trap, &["/bin/sh"]);
    let said = ["/bin/sh", "names no namespaces"];
    assert!(said.iter().any(|words| none.contains(words)), "{none}");
    let function = refused("function", &trap, &["/app.wasm#nope"]);
    assert!(function.contains("nope"), "{function}");
    daemon.remove("p").unwrap();
}

async fn status(tasks: &TaskClient, bundle: &Bundle) -> i32 {
    let request = StateRequest {
        id: bundle.create.id.clone(),
        exec_id: String::new(),
    };
    tasks.state(&request).await.unwrap().status
}

async fn cpu_usec(tasks: &TaskClient, id: &str) -> u64 {
    let answer = tasks.stats(&StatsRequest { id: id.into() }).await.unwrap();
    let metrics = Metrics::decode(answer.stats.unwrap().value.as_slice()).unwrap();
    metrics.cpu.unwrap().usage_usec
}

async fn until_busy(tasks: &TaskClient, id: &str) {
    let (begin, first) = (Instant::now(), cpu_usec(tasks, id).await);
    while cpu_usec(tasks, id).await <= first + 1000 {
        assert!(begin.elapsed() < PATIENCE, "{id} executes nothing");
        tokio::task::yield_now().await;
    }
}

fn a_loop_is_paused_resumed_and_killed_and_cannot_be_entered(isolation: Isolation) {
    let daemon = Daemon::start_as(isolation).unwrap();
    let address = daemon.pod("p", "").unwrap();
    let image = daemon.image("loop", &wat(LOOP)).unwrap();
    let bundle = daemon.bundle("l", &image, &["/app.wasm"], |_| ()).unwrap();
    runtime().block_on(async {
        let tasks = daemon::connect(&address).await.unwrap();
        tasks.create(&bundle.create).await.unwrap();
        assert_eq!(status(&tasks, &bundle).await, ProcessStatus::Created as i32);
        let (id, exec_id) = (String::from("l"), String::new());
        let start = StartRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
        };
        tasks.start(&start).await.unwrap();
        until_busy(&tasks, "l").await;
        tasks.pause(&PauseRequest { id: id.clone() }).await.unwrap();
        assert_eq!(status(&tasks, &bundle).await, ProcessStatus::Paused as i32);
        // It stands still within a tick or two; then nothing more is used.
        let begin = Instant::now();
        loop {
            let before = cpu_usec(&tasks, "l").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            if cpu_usec(&tasks, "l").await == before {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "it goes on while paused");
        }
        tasks
            .resume(&ResumeRequest { id: id.clone() })
            .await
            .unwrap();
        until_busy(&tasks, "l").await;
        // Limits can be changed while it runs.
        let resources = json!({
            "memory": {"limit": 3 << 20}, "cpu": {"quota": 50_000, "period": 100_000},
        });
        let update = UpdateTaskRequest {
            id: id.clone(),
            resources: Some(Any {
                type_url: OCI_RESOURCES_TYPE_URL.into(),
                value: serde_json::to_vec(&resources).unwrap(),
            }),
            ..UpdateTaskRequest::default()
        };
        tasks.update(&update).await.unwrap();
        let stats = StatsRequest { id: id.clone() };
        let stats = tasks.stats(&stats).await.unwrap().stats.unwrap();
        let memory = Metrics::decode(stats.value.as_slice()).unwrap().memory;
        assert_eq!(memory.unwrap().usage_limit, 3 << 20);
        until_busy(&tasks, "l").await;
        let exec = ExecProcessRequest {
            id: id.clone(),
            exec_id: "e".into(),
            ..ExecProcessRequest::default()
        };
        let error = tasks.exec(&exec).await.expect_err("exec");
        assert_eq!(error.code(), Some(Code::Unimplemented), "{error}");
        let kill = KillRequest {
            id: id.clone(),
            exec_id,
            signal: 15,
            all: false,
        };
        tasks.kill(&kill).await.unwrap();
        let exit = daemon::wait(&tasks, &bundle).await.unwrap();
        assert_eq!(exit.exit_status, 143);
        assert_eq!(status(&tasks, &bundle).await, ProcessStatus::Stopped as i32);
        let error = tasks.kill(&kill).await.expect_err("it has ended");
        assert_eq!(error.code(), Some(Code::NotFound), "{error}");
        assert_eq!(daemon::delete(&tasks, &bundle).await.unwrap(), 143);
    });
    daemon.remove("p").unwrap();
}

fn a_server_listens_in_its_pods_network_only(isolation: Isolation) {
    let daemon = Daemon::start_as(isolation).unwrap();
    let namespace = super::namespace();
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let address = daemon.pod("p", &path).unwrap();
    let component = http_component(&wit().unwrap()).unwrap();
    let image = daemon.image("http", &component).unwrap();
    let bundle = daemon
        .bundle("h", &image, &["/app.wasm"], |spec| {
            spec["linux"]["resources"]["cpu"] = json!({"quota": 300_000, "period": 100_000});
        })
        .unwrap();
    let runtime = runtime();
    let tasks = runtime.block_on(async {
        let tasks = daemon::connect(&address).await.unwrap();
        daemon::start(&tasks, &bundle).await.unwrap();
        tasks
    });
    // The address that runwasi's users expect.
    let place = "127.0.0.1:8080";
    let begin = Instant::now();
    let answer = loop {
        match super::in_namespace(&namespace, || super::request(place, "/")) {
            Ok(answer) => break answer,
            Err(e) => assert!(begin.elapsed() < PATIENCE, "{e}\n{}", daemon.log()),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(answer.contains(HELLO_BODY), "{answer}");
    // A thread for each of its three CPUs, though the first one can enter no namespace any more.
    let process = match isolation {
        Isolation::Thread => daemon.pid(),
        Isolation::Process => worker_of(&daemon, "p"),
    };
    let serving = || {
        let tasks = fs::read_dir(format!("/proc/{process}/task"))
            .unwrap()
            .flatten();
        let names = tasks.map(|t| fs::read_to_string(t.path().join("comm")).unwrap_or_default());
        names.filter(|name| name.starts_with("wasm-p")).count()
    };
    while serving() < 3 {
        assert!(begin.elapsed() < PATIENCE, "{} threads", serving());
        std::thread::sleep(Duration::from_millis(10));
    }
    runtime.block_on(async {
        let kill = KillRequest {
            id: "h".into(),
            signal: 15,
            ..KillRequest::default()
        };
        tasks.kill(&kill).await.unwrap();
        // A server that is asked to end does so in peace.
        let exit = daemon::wait(&tasks, &bundle).await.unwrap();
        assert_eq!(exit.exit_status, 0);
    });
    daemon.remove("p").unwrap();
}

#[test]
fn what_ran_is_remembered_when_the_daemon_crashes() {
    let mut daemon = Daemon::start().unwrap();
    let runtime = runtime();
    let address = daemon.pod("crashed", "").unwrap();
    let image = daemon.image("loop", &wat(LOOP)).unwrap();
    let bundle = daemon.bundle("l", &image, &["/app.wasm"], |_| ()).unwrap();
    runtime.block_on(async {
        let tasks = daemon::connect(&address).await.unwrap();
        daemon::start(&tasks, &bundle).await.unwrap();
    });
    daemon.crash().unwrap();
    let request = proto::StatusRequest {
        sandbox_id: "crashed".into(),
        verbose: true,
    };
    let status: proto::StatusResponse = daemon.call("Status", &request).unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    let end: proto::WaitResponse = daemon.call("Wait", &id_of("crashed")).unwrap();
    assert_eq!(end.exit_status, 137);
    runtime.block_on(async {
        let tasks = daemon::connect(&address).await.unwrap();
        let exit = daemon::wait(&tasks, &bundle).await.unwrap();
        assert_eq!(exit.exit_status, 137);
        assert_eq!(daemon::delete(&tasks, &bundle).await.unwrap(), 137);
    });
    daemon.remove("crashed").unwrap();
    assert!(!address.exists());
    // And it works again.
    daemon.pod("crashed", "").unwrap();
    daemon.remove("crashed").unwrap();
}

/// The processes whose parent is the daemon: keepers.
fn children(pid: u32) -> Vec<u32> {
    // They are told by the thread that has started them.
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let lists = tasks.map(|t| fs::read_to_string(t.path().join("children")).unwrap_or_default());
    let all = lists.collect::<Vec<_>>().join(" ");
    all.split_whitespace()
        .filter_map(|p| p.parse().ok())
        .collect()
}

fn verbose(daemon: &Daemon, id: &str) -> proto::StatusResponse {
    let request = proto::StatusRequest {
        sandbox_id: id.into(),
        verbose: true,
    };
    daemon.call("Status", &request).unwrap()
}

/// The process that the programs of a pod run in.
fn worker_of(daemon: &Daemon, id: &str) -> u32 {
    let info = verbose(daemon, id).info;
    let worker = info
        .values()
        .filter_map(|v| serde_json::from_str::<Value>(v).ok())
        .find_map(|v| v["worker"].as_u64());
    u32::try_from(worker.unwrap_or_else(|| panic!("{info:?}"))).unwrap()
}

#[test]
fn a_pod_in_a_process_outlives_its_daemon() {
    let mut daemon = Daemon::start_as(Isolation::Process).unwrap();
    let runtime = runtime();
    let address = daemon.pod("p", "").unwrap();
    let image = daemon.image("loop", &wat(LOOP)).unwrap();
    let bundle = daemon.bundle("l", &image, &["/app.wasm"], |_| ()).unwrap();
    let worker = worker_of(&daemon, "p");
    let tasks = runtime.block_on(async {
        let tasks = daemon::connect(&address).await.unwrap();
        daemon::start(&tasks, &bundle).await.unwrap();
        tasks
    });
    daemon.crash().unwrap();
    assert_eq!(worker_of(&daemon, "p"), worker);
    assert_eq!(verbose(&daemon, "p").state, "SANDBOX_READY");
    runtime.block_on(async {
        // On the same connection: nobody has noticed.
        until_busy(&tasks, "l").await;
        let kill = KillRequest {
            id: "l".into(),
            signal: 15,
            ..KillRequest::default()
        };
        tasks.kill(&kill).await.unwrap();
        let exit = daemon::wait(&tasks, &bundle).await.unwrap();
        assert_eq!(exit.exit_status, 143);
    });
    daemon.remove("p").unwrap();
    assert!(!address.exists());
    assert!(!std::path::Path::new(&format!("/proc/{worker}")).exists());
}

#[test]
fn a_worker_is_jailed_and_dies_alone() {
    let daemon = Daemon::start_as(Isolation::Process).unwrap();
    let runtime = runtime();
    let (mut workers, mut tasks) = (Vec::new(), Vec::new());
    let image = daemon.image("loop", &wat(LOOP)).unwrap();
    for pod in ["a", "b"] {
        let address = daemon.pod(pod, "").unwrap();
        let bundle = daemon.bundle(pod, &image, &["/app.wasm"], |_| ()).unwrap();
        runtime.block_on(async {
            let connected = daemon::connect(&address).await.unwrap();
            daemon::start(&connected, &bundle).await.unwrap();
            until_busy(&connected, pod).await;
            tasks.push((connected, bundle));
        });
        workers.push(worker_of(&daemon, pod));
    }
    let proc = |path: &str| fs::read_to_string(format!("/proc/{}/{path}", workers[0])).unwrap();
    let status = proc("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name}\n{status}"))
            .trim()
            .to_owned()
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    // Files and their owners, in a user namespace that is nobody to the host.
    let kept = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
    assert_eq!(kept & !0x8000_00df, 0, "{kept:x}");
    for namespace in ["mnt", "pid", "ipc", "uts", "user", "net", "cgroup"] {
        let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(workers[0]), of(std::process::id()), "{namespace}");
        assert_ne!(of(workers[0]), of(workers[1]), "{namespace}");
    }
    let mut seen: Vec<String> = fs::read_dir(format!("/proc/{}/root", workers[0]))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    seen.sort();
    assert_eq!(seen, ["proc", "rootfs"]);
    let mounts = proc("mountinfo");
    assert!(mounts.lines().count() <= 4, "{mounts}");
    // Each thread of its programs has a filter more.
    let threads = fs::read_dir(format!("/proc/{}/task", workers[0])).unwrap();
    let hardened = threads.filter(|thread| {
        let path = thread.as_ref().unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        name.starts_with("wasm-") && status.contains("Seccomp_filters:\t4")
    });
    assert!(hardened.count() > 0);
    // One is gone: its pod with it, and nobody else.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(workers[0]).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    runtime.block_on(async {
        let exit = daemon::wait(&tasks[0].0, &tasks[0].1).await.unwrap();
        assert_eq!(exit.exit_status, 137);
    });
    let end: proto::WaitResponse = daemon.call("Wait", &id_of("a")).unwrap();
    assert_eq!(end.exit_status, 137);
    assert!(
        daemon.log().contains("was killed by SIGKILL"),
        "{}",
        daemon.log()
    );
    runtime.block_on(until_busy(&tasks[1].0, "b"));
    daemon.remove("a").unwrap();
    daemon.remove("b").unwrap();
    let begin = Instant::now();
    while !children(daemon.pid()).is_empty() {
        assert!(begin.elapsed() < PATIENCE, "processes are left");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_keeper_that_dies_leaves_no_cgroup() {
    let daemon = Daemon::start_as(Isolation::Process).unwrap();
    daemon.pod("kept", "").unwrap();
    let worker = worker_of(&daemon, "kept");
    let cgroup = fs::read_to_string(format!("/proc/{worker}/cgroup")).unwrap();
    let cgroup = cgroup.lines().find_map(|l| l.strip_prefix("0::/")).unwrap();
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .find(|root| fs::exists(format!("{root}/cgroup.controllers")).unwrap())
        .unwrap();
    let cgroup = format!("{root}/{cgroup}");
    assert!(
        cgroup.ends_with(":wasm") && fs::exists(&cgroup).unwrap(),
        "{cgroup}"
    );
    let [keeper] = children(daemon.pid())[..] else {
        panic!("several keepers");
    };
    let keeper = nix::unistd::Pid::from_raw(i32::try_from(keeper).unwrap());
    nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGKILL).unwrap();
    let end: proto::WaitResponse = daemon.call("Wait", &id_of("kept")).unwrap();
    assert_eq!(end.exit_status, 137);
    daemon.remove("kept").unwrap();
    assert!(!fs::exists(&cgroup).unwrap(), "{cgroup} is left");
}
