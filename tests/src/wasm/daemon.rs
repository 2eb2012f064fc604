//! A sandboxer of the tests' own that runs wasm pods natively, and the calls containerd would make
//! to it. Needs root: the daemon mounts containers' files.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_protocol::client::{Client, TaskClient};
use bulkhead_protocol::task::{
    CreateTaskRequest, DeleteRequest, StartRequest, WaitRequest, WaitResponse,
};
use bulkhead_protocol::types::Mount;
use bulkhead_sandboxer::daemon::config::Isolation;
use bulkhead_sandboxer::daemon::proto::{self, CONTROLLER};
use prost::Message;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::cri::grpc;
use crate::env::{self, PATIENCE};
use crate::process::Guard;

/// Where a host of a mixed kind has cgroups of version 2.
const UNIFIED: &str = "/sys/fs/cgroup/unified/cgroup.controllers";

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    process: Guard,
    client: grpc::Client,
    // Short: paths of sockets have few bytes.
    dir: tempfile::TempDir,
    /// One at a time in a program: pods' cgroups are named by ids, which tests use again.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Daemon {
    /// Starts one.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start() -> Result<Self> {
        Self::start_as(Isolation::Thread)
    }

    /// Starts one whose pods are isolated like this.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start_as(isolation: Isolation) -> Result<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let isolation = match isolation {
            Isolation::Thread => "thread",
            Isolation::Process => "process",
        };
        // In memory, as /run of a node is: state is written, and synced, for every container.
        let dir = tempfile::Builder::new()
            .prefix("")
            .rand_bytes(5)
            .tempdir_in("/dev/shm")?;
        let run = dir.path().display();
        fs::write(
            dir.path().join("config.toml"),
            format!(
                "run_dir = \"{run}\"\nsocket = \"{run}/vm.sock\"\n\
                 containerd_ttrpc = \"{run}/none\"\n\
                 [app]\nsocket = \"{run}/app.sock\"\n\
                 [process]\nsocket = \"{run}/process.sock\"\n[wasm]\nisolation = \"{isolation}\"\n\
                 socket = \"{run}/wasm.sock\"\ncache_dir = \"{run}/code\"\n"
            ),
        )?;
        let (process, client) = Self::spawn(dir.path())?;
        Ok(Self {
            process,
            client,
            dir,
            _alone: alone,
        })
    }

    fn spawn(dir: &Path) -> Result<(Guard, grpc::Client)> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))?;
        let program = env::built("sandboxer")?;
        let mut command = match Path::new(UNIFIED).exists() {
            false => Command::new(program),
            // As every node has it: pods in processes have cgroups of version 2, which this host has
            // beside those of version 1.
            true => {
                let mut command = Command::new("unshare");
                let unified = Path::new(UNIFIED).parent().context("a parent")?.display();
                let replace =
                    format!("mount --bind {unified} /sys/fs/cgroup && exec \"$0\" \"$@\"");
                command.args(["--mount", "sh", "-c", &replace]).arg(program);
                command
            }
        };
        let child = command
            .arg("--config")
            .arg(dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("sandboxer")?;
        let mut process = Guard(child);
        let begin = Instant::now();
        loop {
            match grpc::Client::connect(&dir.join("wasm.sock")) {
                Ok(client) => return Ok((process, client)),
                Err(error) => {
                    let ended = process.0.try_wait()?;
                    if ended.is_some() || begin.elapsed() > PATIENCE {
                        let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
                        bail!("sandboxer is not ready ({ended:?}): {error:#}\n{log}");
                    }
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    }

    /// Kills it without a warning and starts another in its place.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn crash(&mut self) -> Result<()> {
        self.process.0.kill()?;
        self.process.0.wait()?;
        (self.process, self.client) = Self::spawn(self.dir.path())?;
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// A directory for the test's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// One call of the sandbox controller.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn call<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A> {
        self.client
            .call(&format!("/{CONTROLLER}/{method}"), request, PATIENCE)
    }

    /// Creates and starts a pod; gives the address of its tasks.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn pod(&self, id: &str, netns: &str) -> Result<PathBuf> {
        let _: proto::CreateResponse = self.call(
            "Create",
            &proto::CreateRequest {
                sandbox_id: id.to_owned(),
                netns_path: netns.to_owned(),
                ..proto::CreateRequest::default()
            },
        )?;
        let started: proto::StartResponse = self.call("Start", &id_of(id))?;
        let path = started.address.strip_prefix("ttrpc+unix://");
        Ok(path.context(started.address.clone())?.into())
    }

    /// Ends and removes a pod.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn remove(&self, id: &str) -> Result<()> {
        let _: proto::Nothing = self.call(
            "Stop",
            &proto::StopRequest {
                sandbox_id: id.to_owned(),
                timeout_secs: 1,
            },
        )?;
        let _: proto::Nothing = self.call("Shutdown", &id_of(id))?;
        Ok(())
    }

    /// Makes an image directory with one file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn image(&self, name: &str, program: &[u8]) -> Result<PathBuf> {
        image(self.dir(), name, program)
    }

    /// Prepares a container of `image`, with `change` made to its OCI spec.
    ///
    /// # Errors
    /// The bundle cannot be written.
    pub fn bundle(
        &self,
        id: &str,
        image: &Path,
        args: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Bundle> {
        bundle(self.dir(), id, image, args, change)
    }
}

impl Drop for Daemon {
    /// Pods in processes outlive their daemon, and so they would outlive a test that fails. Keepers
    /// are told where the configuration is; what belongs to a pod ends with its keeper.
    fn drop(&mut self) {
        let config = self.dir.path().join("config.toml").display().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            let pid = entry.file_name().to_string_lossy().parse();
            if let Ok(pid) = pid
                && words.contains("--bulkhead-keeper")
                && words.contains(&config)
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

/// Makes an image directory with one file, below `dir`.
///
/// # Errors
/// It cannot be written.
pub fn image(dir: &Path, name: &str, program: &[u8]) -> Result<PathBuf> {
    let root = dir.join("images").join(name);
    fs::create_dir_all(&root)?;
    fs::write(root.join("app.wasm"), program)?;
    Ok(root)
}

/// Prepares a container of `image` in a bundle below `dir`, with `change` made to its OCI spec.
///
/// # Errors
/// The bundle cannot be written.
pub fn bundle(
    dir: &Path,
    id: &str,
    image: &Path,
    args: &[&str],
    change: impl FnOnce(&mut Value),
) -> Result<Bundle> {
    let dir = dir.join("bundles").join(id);
    fs::create_dir_all(&dir)?;
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {"args": args, "cwd": "/", "env": []},
        "root": {"path": "rootfs"},
        "mounts": [],
        "linux": {"resources": {}},
    });
    change(&mut spec);
    fs::write(dir.join("config.json"), serde_json::to_vec(&spec)?)?;
    let fifo = |name: &str| -> Result<(String, File)> {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
        let reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        Ok((path.display().to_string(), reader))
    };
    let (stdout, out) = fifo("stdout")?;
    let (stderr, err) = fifo("stderr")?;
    Ok(Bundle {
        create: CreateTaskRequest {
            id: id.to_owned(),
            bundle: dir.display().to_string(),
            rootfs: vec![Mount {
                r#type: "bind".into(),
                source: image.display().to_string(),
                target: String::new(),
                options: vec!["rbind".into(), "rw".into()],
            }],
            stdout,
            stderr,
            ..CreateTaskRequest::default()
        },
        out,
        err,
    })
}

/// A request that names a sandbox.
pub fn id_of(id: &str) -> proto::IdRequest {
    proto::IdRequest {
        sandbox_id: id.to_owned(),
    }
}

/// A container to be made, and the readers of its output.
#[derive(Debug)]
pub struct Bundle {
    /// The call that makes it.
    pub create: CreateTaskRequest,
    out: File,
    err: File,
}

impl Bundle {
    /// What has been written by now. Everything, once the end was reported.
    ///
    /// # Errors
    /// It is no text.
    pub fn output(&mut self) -> Result<(String, String)> {
        Ok((read(&mut self.out)?, read(&mut self.err)?))
    }
}

fn read(file: &mut File) -> Result<String> {
    let mut all = Vec::new();
    match file.read_to_end(&mut all) {
        Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Err(e.into()),
        _ => Ok(String::from_utf8(all)?),
    }
}

/// Connects to a pod.
///
/// # Errors
/// Nobody listens.
pub async fn connect(address: &Path) -> Result<TaskClient> {
    let stream = UnixStream::connect(address)
        .await
        .with_context(|| address.display().to_string())?;
    Ok(TaskClient::new(Client::new(stream)))
}

/// Creates and starts.
///
/// # Errors
/// What the daemon answers.
pub async fn start(tasks: &TaskClient, bundle: &Bundle) -> Result<()> {
    tasks.create(&bundle.create).await?;
    let id = bundle.create.id.clone();
    let exec_id = String::new();
    tasks.start(&StartRequest { id, exec_id }).await?;
    Ok(())
}

/// Waits for the end.
///
/// # Errors
/// What the daemon answers.
pub async fn wait(tasks: &TaskClient, bundle: &Bundle) -> Result<WaitResponse> {
    let id = bundle.create.id.clone();
    let exec_id = String::new();
    Ok(tasks.wait(&WaitRequest { id, exec_id }).await?)
}

/// Removes the container; gives its exit status.
///
/// # Errors
/// What the daemon answers.
pub async fn delete(tasks: &TaskClient, bundle: &Bundle) -> Result<u32> {
    let id = bundle.create.id.clone();
    let exec_id = String::new();
    Ok(tasks
        .delete(&DeleteRequest { id, exec_id })
        .await?
        .exit_status)
}

/// All of it: exit status and output.
///
/// # Errors
/// What the daemon answers.
pub async fn run(tasks: &TaskClient, mut bundle: Bundle) -> Result<(u32, String, String)> {
    start(tasks, &bundle).await?;
    let exit = wait(tasks, &bundle).await?;
    let (out, err) = bundle.output()?;
    let deleted = delete(tasks, &bundle).await?;
    if deleted != exit.exit_status {
        bail!("Wait says {}, Delete {deleted}", exit.exit_status);
    }
    Ok((exit.exit_status, out, err))
}
