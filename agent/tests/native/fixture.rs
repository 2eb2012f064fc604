//! An agent in namespaces of this host, and containers of a static busybox in it.
//!
//! Or an agent in a VM: `BULKHEAD_AGENT_VM=CID:DIR` names its vsock address and the directory
//! behind its virtio-fs device "share" (tests/vm starts one). All tests share it, so they must run
//! one at a time.

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bulkhead_protocol::client::{Client, RpcError, SandboxClient, TaskClient};
use bulkhead_protocol::types::{Any, Mount};
use bulkhead_protocol::{CONTROL_PORT, STREAM_PORT, sandbox, stream, task};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Where the guest mounts the share.
pub const SHARE: &str = "/run/bulkhead/share";
/// No step may take longer; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where the agent runs.
enum Place {
    /// In namespaces here, with its sockets and its share in a directory.
    Here {
        process: Child,
        dir: tempfile::TempDir,
    },
    /// In a VM.
    Vm { cid: u32, share: PathBuf },
}

/// A running agent.
pub struct Agent {
    place: Place,
    pub tasks: TaskClient,
    pub sandbox: SandboxClient,
}

/// How a process ended and what it said.
#[derive(Debug)]
pub struct Output {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

/// Why these tests cannot run here.
fn obstacle() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root");
    }
    // In a child process: the test itself must stay where it is.
    let unshare = Command::new("unshare")
        .args(["-mpfiun", "mount", "-t", "tmpfs", "none", "/mnt"])
        .stderr(Stdio::null())
        .status();
    if !unshare.is_ok_and(|s| s.success()) {
        return Some("namespaces and mounts are not allowed here");
    }
    if busybox().is_none() {
        return Some("no static busybox (apt-get install busybox-static)");
    }
    None
}

/// Says why a test does not run here, also to the one who counts: `BULKHEAD_SKIPS` names a file
/// that takes one line for each.
pub fn skipped(reason: &str) {
    use std::io::Write;
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    println!("SKIPPED: {reason}");
    if let Some(path) = std::env::var_os("BULKHEAD_SKIPS") {
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(format!("{test}: {reason}\n").as_bytes())
            .unwrap();
    }
}

fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|p| p.exists())
}

impl Agent {
    /// Starts one; `None`, with a line saying why, where that is impossible.
    pub async fn start() -> Option<Self> {
        let place = match vm() {
            Some((cid, share)) => Place::Vm { cid, share },
            None => match obstacle() {
                Some(reason) => {
                    skipped(reason);
                    return None;
                }
                None => start_here(),
            },
        };
        let control = place.connect(CONTROL_PORT).await;
        let client = Client::new(control).with_timeout(Some(PATIENCE));
        let agent = Self {
            place,
            tasks: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client),
        };
        agent.clear().await;
        for directory in ["rootfs", "volumes"] {
            std::fs::create_dir_all(agent.share(directory)).unwrap();
        }
        agent
            .sandbox
            .configure_sandbox(&sandbox::ConfigureSandboxRequest {
                hostname: "pod".into(),
                shares: vec![sandbox::Share {
                    tag: "share".into(),
                    path: SHARE.into(),
                    options: vec![],
                }],
                ..Default::default()
            })
            .await
            .unwrap();
        Some(agent)
    }

    /// Whether it runs in a VM, with all that a guest has.
    pub fn in_vm(&self) -> bool {
        matches!(self.place, Place::Vm { .. })
    }

    /// Whether the guest has a feature.
    pub async fn has(&self, feature: &str) -> bool {
        let info = self.sandbox.get_info(&sandbox::GetInfoRequest {}).await;
        info.unwrap().features.iter().any(|f| f == feature)
    }

    /// The number of the newest event.
    pub async fn newest_event(&self) -> u64 {
        let mut after = 0;
        loop {
            let request = sandbox::WaitEventRequest {
                after,
                timeout_ms: 1,
            };
            let events = self.sandbox.wait_event(&request).await.unwrap().events;
            match events.last() {
                Some(event) => after = event.sequence,
                None => return after,
            }
        }
    }

    /// Removes what earlier tests have left in a VM.
    async fn clear(&self) {
        if !self.in_vm() {
            return;
        }
        for n in 0..20 {
            let id = format!("c{n}");
            let state = task::StateRequest {
                id: id.clone(),
                ..Default::default()
            };
            if self.tasks.state(&state).await.is_ok() {
                let delete = task::DeleteRequest {
                    id: id.clone(),
                    ..Default::default()
                };
                if self.tasks.delete(&delete).await.is_err() {
                    self.destroy(&id).await;
                }
            }
        }
        for directory in ["rootfs", "volumes"] {
            let _ = std::fs::remove_dir_all(self.share(directory));
        }
    }

    /// The pid of an agent that runs here.
    fn pid(&self) -> Option<u32> {
        let Place::Here { process, .. } = &self.place else {
            return None;
        };
        let parent = process.id();
        std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))
            .ok()?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    }

    /// A path of the share, on the host.
    pub fn share(&self, path: &str) -> PathBuf {
        match &self.place {
            Place::Here { dir, .. } => dir.path().join("share").join(path),
            Place::Vm { share, .. } => share.join(path),
        }
    }

    /// A connection to the agent of its own.
    pub async fn connect(&self) -> Client {
        Client::new(self.place.connect(CONTROL_PORT).await)
    }

    /// Opens a stream; gives it and the name to use in requests.
    pub async fn stream(&self) -> (UnixStream, String) {
        let id = format!(
            "s{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let mut connection = self.raw_stream().await;
        stream::connect(&mut connection, &id).await.unwrap();
        (connection, stream::uri(&id))
    }

    /// A connection to the stream port, without its header.
    pub async fn raw_stream(&self) -> UnixStream {
        self.place.connect(STREAM_PORT).await
    }

    /// Waits for the agent's own end, which must be in order. Of a VM, tests/vm sees it.
    pub fn wait_end(&mut self) {
        if let Place::Here { process, .. } = &mut self.place {
            assert!(process.wait().unwrap().success());
        }
    }

    /// A root file system of busybox for container `id`.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let root = self.share(&format!("rootfs/{id}"));
        for d in [
            "bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/www", "vol",
        ] {
            std::fs::create_dir_all(root.join(d)).unwrap();
        }
        std::fs::copy(busybox().unwrap(), root.join("bin/busybox")).unwrap();
        for tool in [
            "sh", "cat", "echo", "sleep", "id", "ls", "mkdir", "rm", "stty", "tty", "head", "yes",
            "grep", "ps", "hostname", "env", "pwd", "touch", "wc", "dd", "ip", "mount", "kill",
            "true", "tr", "tail", "date", "readlink", "ln", "stat", "test", "umask", "printf",
        ] {
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(tool));
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/home/www:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(
            root.join("etc/group"),
            "root:x:0:\nwww:x:33:\naudio:x:29:www\n",
        )
        .unwrap();
        root
    }

    /// A create request for `args` in a container of its own root.
    pub fn request(&self, id: &str, args: &[&str]) -> (task::CreateTaskRequest, Value) {
        self.rootfs(id);
        let request = task::CreateTaskRequest {
            id: id.into(),
            rootfs: vec![Mount {
                r#type: "bulkhead-share".into(),
                source: format!("{SHARE}/rootfs/{id}"),
                ..Default::default()
            }],
            ..Default::default()
        };
        (request, spec(args))
    }

    /// Creates a container.
    pub async fn create(
        &self,
        mut request: task::CreateTaskRequest,
        spec: &Value,
        user: &str,
    ) -> Result<u32, RpcError> {
        let options = sandbox::ContainerOptions {
            oci_spec: serde_json::to_vec(spec).unwrap(),
            user: user.into(),
            sandbox_etc: true,
            ..Default::default()
        };
        request.options = Some(Any::of(sandbox::CONTAINER_OPTIONS_TYPE_URL, &options));
        Ok(self.tasks.create(&request).await?.pid)
    }

    /// Starts the container's first process.
    pub async fn start_task(&self, id: &str) -> u32 {
        let request = task::StartRequest {
            id: id.into(),
            exec_id: String::new(),
        };
        self.tasks.start(&request).await.unwrap().pid
    }

    /// Creates and starts a container without streams.
    pub async fn launch(&self, id: &str, args: &[&str]) {
        let (request, spec) = self.request(id, args);
        self.create(request, &spec, "").await.unwrap();
        self.start_task(id).await;
    }

    /// Runs a container to its end.
    pub async fn run(&self, id: &str, args: &[&str]) -> Output {
        let (request, spec) = self.request(id, args);
        self.run_spec(request, &spec, "").await
    }

    /// Runs a container to its end, without input, and deletes it.
    pub async fn run_spec(
        &self,
        mut request: task::CreateTaskRequest,
        spec: &Value,
        user: &str,
    ) -> Output {
        let id = request.id.clone();
        let (stdout, out_name) = self.stream().await;
        let (stderr, err_name) = self.stream().await;
        request.stdout = out_name;
        request.stderr = err_name;
        self.create(request, spec, user).await.unwrap();
        self.start_task(&id).await;
        let output = self.collect(&id, "", stdout, stderr).await;
        self.delete(&id, "").await;
        output
    }

    /// Reads both streams to their ends, then asks how it ended.
    pub async fn collect(
        &self,
        id: &str,
        exec_id: &str,
        stdout: UnixStream,
        stderr: UnixStream,
    ) -> Output {
        let (stdout, stderr) = tokio::join!(read_all(stdout), read_all(stderr));
        Output {
            status: self.wait(id, exec_id).await,
            stdout,
            stderr,
        }
    }

    /// Waits for a process's end.
    pub async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = task::WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
        };
        tokio::time::timeout(PATIENCE, self.tasks.wait(&request))
            .await
            .expect("the process does not end")
            .unwrap()
            .exit_status
    }

    /// Deletes a process.
    pub async fn delete(&self, id: &str, exec_id: &str) -> task::DeleteResponse {
        let request = task::DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
        };
        self.tasks.delete(&request).await.unwrap()
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> Result<(), RpcError> {
        let request = task::KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all: false,
        };
        self.tasks.kill(&request).await.map(drop)
    }

    /// Ends a container and deletes it.
    pub async fn destroy(&self, id: &str) {
        let _ = self.kill(id, "", libc::SIGKILL).await;
        self.wait(id, "").await;
        self.delete(id, "").await;
    }

    /// Announces a process.
    pub async fn announce(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        terminal: bool,
        stdio: [&str; 3],
    ) -> Result<(), RpcError> {
        let request = task::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal,
            stdin: stdio[0].into(),
            stdout: stdio[1].into(),
            stderr: stdio[2].into(),
            spec: Some(Any {
                type_url: sandbox::OCI_PROCESS_TYPE_URL.into(),
                value: serde_json::to_vec(process).unwrap(),
            }),
        };
        self.tasks.exec(&request).await.map(drop)
    }

    /// Starts an announced process.
    pub async fn start_exec(&self, id: &str, exec_id: &str) -> Result<u32, RpcError> {
        let request = task::StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
        };
        Ok(self.tasks.start(&request).await?.pid)
    }

    /// Runs a process in a container to its end.
    pub async fn exec(&self, id: &str, process: &Value) -> Output {
        let exec_id = format!("e{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (stdout, out_name) = self.stream().await;
        let (stderr, err_name) = self.stream().await;
        self.announce(id, &exec_id, process, false, ["", &out_name, &err_name])
            .await
            .unwrap();
        self.start_exec(id, &exec_id).await.unwrap();
        let output = self.collect(id, &exec_id, stdout, stderr).await;
        self.delete(id, &exec_id).await;
        output
    }

    /// What a container leaves behind in the agent: bundles and mounts.
    pub fn leftovers(&self) -> Vec<String> {
        let Some(pid) = self.pid() else {
            return Vec::new();
        };
        let mut left: Vec<String> = Vec::new();
        for dir in ["c", "libcontainer"] {
            let path = format!("/proc/{pid}/root/run/bulkhead/{dir}");
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                left.push(entry.path().display().to_string());
            }
        }
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        left.extend(
            mounts
                .lines()
                .filter(|l| l.contains("/run/bulkhead/c/"))
                .map(str::to_owned),
        );
        left
    }

    /// Descriptors the agent has open.
    pub fn descriptors(&self) -> usize {
        self.pid().map_or(0, |pid| {
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count()
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // PID 1 of its namespace: everything in it ends too.
        if let Some(Ok(pid)) = self.pid().map(i32::try_from) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        if let Place::Here { process, .. } = &mut self.place {
            let id = process.id();
            let _ = process.wait();
            for hierarchy in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                let left = Path::new(hierarchy).join(format!("bulkhead-agent-test-{id}"));
                assert!(
                    !left.exists() || std::thread::panicking(),
                    "{left:?} is left"
                );
            }
        }
    }
}

/// The VM to test against.
fn vm() -> Option<(u32, PathBuf)> {
    let value = std::env::var("BULKHEAD_AGENT_VM").ok()?;
    let (cid, share) = value.split_once(':').expect("CID:DIR");
    Some((cid.parse().expect("a CID"), PathBuf::from(share)))
}

fn start_here() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"))
        .arg("--test-listen")
        .arg(dir.path())
        .arg(format!("share={}", share.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "listening\n");
    Place::Here { process, dir }
}

impl Place {
    /// Connects to a port of the agent.
    async fn connect(&self, port: u32) -> UnixStream {
        match self {
            Self::Here { dir, .. } => {
                let name = if port == CONTROL_PORT {
                    "control.sock"
                } else {
                    "stream.sock"
                };
                UnixStream::connect(dir.path().join(name)).await.unwrap()
            }
            Self::Vm { cid, .. } => {
                let address = VsockAddr::new(*cid, port);
                let deadline = std::time::Instant::now() + PATIENCE;
                loop {
                    let fd = socket(
                        AddressFamily::Vsock,
                        SockType::Stream,
                        SockFlag::SOCK_CLOEXEC,
                        None,
                    )
                    .unwrap();
                    match connect(fd.as_raw_fd(), &address) {
                        Ok(()) => {
                            let stream = std::os::unix::net::UnixStream::from(fd);
                            stream.set_nonblocking(true).unwrap();
                            return UnixStream::from_std(stream).unwrap();
                        }
                        // It may still boot.
                        Err(_) if std::time::Instant::now() < deadline => {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        Err(errno) => panic!("connect to {address}: {errno}"),
                    }
                }
            }
        }
    }
}

/// Everything up to the stream's end.
pub async fn read_all(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes))
        .await
        .expect("the stream does not end")
        .unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until `wanted` appears; gives all that was read.
pub async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.contains(wanted) {
            let mut buffer = [0; 1024];
            let n = stream.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the stream ended before {wanted:?}: {text:?}");
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    };
    let done = tokio::time::timeout(PATIENCE, read).await;
    assert!(done.is_ok(), "no {wanted:?} in {text:?}");
    text
}

/// Writes all.
pub async fn write(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

/// Capabilities containers get by default, shortened.
pub const CAPABILITIES: [&str; 5] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_KILL",
];

/// A process object.
pub fn process(args: &[&str]) -> Value {
    let caps = json!(CAPABILITIES);
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
    })
}

/// A spec as a container engine makes it.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(args),
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                {"type": "network", "path": "/proc/1/ns/net"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

/// Where something is on the host.
pub fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}
