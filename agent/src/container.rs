//! One container: its processes, their states, and what is done to them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::sandbox::{EventKind, ExitEvent, OomEvent};
use bulkhead_protocol::types::ProcessStatus;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::devices;
use crate::disks;
use crate::error::{Context, Error, Result};
use crate::events::{Events, timestamp};
use crate::helper::{self, Job, create, exec};
use crate::layers;
use crate::mounts::unmount_all;
use crate::reaper::{Exit, Reaper};
use crate::spec::{self, Defaults};
use crate::stdio::{self, Pumps, Streaming};

/// Directory of the containers' bundles.
pub const BUNDLES: &str = "/run/bulkhead/c";
/// Execs one container may have at once.
const MAX_EXECS: usize = 1024;

/// Time for the first process to execute its program.
const EXECUTE_TIME: Duration = Duration::from_secs(60);

/// What a request says about stdio, kept for State.
#[derive(Clone, Debug, Default)]
pub struct StdioNames {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether there is a terminal.
    pub terminal: bool,
}

/// A process that Exec has announced.
struct Announced {
    process: Value,
    streaming: Streaming,
}

/// A process of a container.
struct Process {
    pid: i32,
    status: ProcessStatus,
    exit: watch::Sender<Option<Exit>>,
    names: StdioNames,
    pumps: Option<Pumps>,
    announced: Option<Announced>,
    /// Ends when the program is executed. Only of a container's first process.
    executed: Option<UnixStream>,
}

/// What State answers.
#[derive(Clone, Debug)]
pub struct View {
    /// Process id; 0 before there is one.
    pub pid: u32,
    /// Where it stands.
    pub status: ProcessStatus,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Its stdio.
    pub names: StdioNames,
}

struct State {
    init: Process,
    execs: HashMap<String, Process>,
    paused: bool,
    tasks: Vec<AbortHandle>,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// The bundle the host named.
    pub bundle: String,
    cgroup: Cgroup,
    defaults: Defaults,
    state: Mutex<State>,
    /// Held while the container is started, paused, changed or deleted.
    operation: tokio::sync::Mutex<()>,
    events: Arc<Events>,
}

impl Drop for State {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The directory of a container.
pub fn directory(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

/// Removes what a container leaves in the file system. Works on half-made ones too.
pub async fn clean_up(id: &str) {
    let cgroup = Cgroup::of(id);
    cgroup.kill();
    cgroup.remove().await;
    disks::forget(id);
    let directory = directory(id);
    unmount_all(&directory.join("rootfs"));
    layers::forget(id).await;
    for entry in std::fs::read_dir(directory.join("mounts"))
        .into_iter()
        .flatten()
        .flatten()
    {
        unmount_all(&entry.path());
    }
    // Never into a mount that could not be undone: remove_dir fails on those.
    for sub in ["mounts", "rootfs"] {
        let sub = directory.join(sub);
        for entry in std::fs::read_dir(&sub).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(entry.path());
            let _ = std::fs::remove_dir(entry.path());
        }
        let _ = std::fs::remove_dir(&sub);
    }
    for file in ["config.json", "console.sock"] {
        let _ = std::fs::remove_file(directory.join(file));
    }
    let _ = std::fs::remove_dir(&directory);
    let _ = std::fs::remove_dir_all(Path::new(create::STATE_DIR).join(id));
}

/// Makes the kernel forget names and files nobody uses. Otherwise the host would have to keep those
/// of a container that is gone, and with them its mounts, for as long as this guest runs.
fn forget_files() {
    if crate::in_guest() {
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "2");
    }
}

/// What [`Container::create`] needs.
pub struct New<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The bundle the host named.
    pub bundle: &'a str,
    /// Its spec.
    pub prepared: spec::Prepared,
    /// Its streams.
    pub streaming: Streaming,
    /// Their names.
    pub names: StdioNames,
}

impl Container {
    /// Makes a container whose bundle directory and root are ready. Its first process waits.
    pub async fn create(new: New<'_>, reaper: &Reaper, events: Arc<Events>) -> Result<Arc<Self>> {
        let bundle = directory(new.id);
        std::fs::write(bundle.join("config.json"), &new.prepared.config)
            .context(|| "write config.json".to_owned())?;
        let (child_ends, our_ends) = new.streaming.open(new.prepared.owner)?;
        let job = Job::Create(create::Create {
            id: new.id.to_owned(),
            bundle,
            terminal: new.names.terminal,
        });
        let made = helper::run(reaper, &job, child_ends).await?;
        let cgroup = Cgroup::of(new.id);
        if cgroup.exists() {
            // Before it starts. On failure the caller cleans up, which kills it.
            devices::restrict(cgroup.path(), &new.prepared.devices)?;
        }
        let pumps = our_ends.start(made.master)?;
        if let (Some(terminal), Some((columns, rows))) =
            (pumps.terminal(), new.prepared.console_size)
        {
            let _ = stdio::resize(terminal, columns, rows);
        }
        let container = Arc::new(Self {
            id: new.id.to_owned(),
            bundle: new.bundle.to_owned(),
            cgroup,
            defaults: new.prepared.defaults,
            state: Mutex::new(State {
                init: Process {
                    pid: made.pid,
                    status: ProcessStatus::Created,
                    exit: watch::Sender::new(None),
                    names: new.names,
                    pumps: Some(pumps),
                    announced: None,
                    executed: Some(made.executed),
                },
                execs: HashMap::new(),
                paused: false,
                tasks: Vec::new(),
            }),
            operation: tokio::sync::Mutex::default(),
            events,
        });
        tokio::spawn(container.clone().watch_exit(String::new(), made.end));
        container.watch_oom();
        Ok(container)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> Result<&Cgroup> {
        if self.cgroup.exists() {
            return Ok(&self.cgroup);
        }
        Err(Error::Unsupported(format!(
            "container {}: has no cgroup (this guest lacks cgroup v2, or the container has ended)",
            self.id
        )))
    }

    fn no_process(&self, exec_id: &str) -> Error {
        Error::NotFound(format!("container {} has no process {exec_id:?}", self.id))
    }

    fn with<T>(&self, exec_id: &str, f: impl FnOnce(&mut Process, bool) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        let paused = state.paused;
        let process = if exec_id.is_empty() {
            &mut state.init
        } else {
            state
                .execs
                .get_mut(exec_id)
                .ok_or_else(|| self.no_process(exec_id))?
        };
        f(process, paused)
    }

    /// Where a process stands.
    pub fn view(&self, exec_id: &str) -> Result<View> {
        self.with(exec_id, |process, paused| {
            Ok(View {
                pid: u32::try_from(process.pid).unwrap_or(0),
                status: if paused && process.status == ProcessStatus::Running {
                    ProcessStatus::Paused
                } else {
                    process.status
                },
                exit: *process.exit.borrow(),
                names: process.names.clone(),
            })
        })
    }

    async fn watch_exit(self: Arc<Self>, exec_id: String, end: oneshot::Receiver<Exit>) {
        let Ok(exit) = end.await else { return };
        let is_init = exec_id.is_empty();
        if is_init {
            // Whatever is left: processes that joined from outside the pid namespace.
            self.cgroup.kill();
            self.report_oom(&mut 0);
        }
        let pid = self.with(&exec_id, |process, _| {
            process.status = ProcessStatus::Stopped;
            if let Some(pumps) = &process.pumps {
                pumps.process_ended();
            }
            process.exit.send_replace(Some(exit));
            Ok(process.pid)
        });
        let Ok(pid) = pid else { return };
        self.events.push(EventKind::Exit(ExitEvent {
            container_id: self.id.clone(),
            exec_id,
            pid: u32::try_from(pid).unwrap_or(0),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        }));
    }

    fn watch_oom(self: &Arc<Self>) {
        // Without the memory controller there is nothing to watch.
        let Ok(watch) = self.cgroup.watch_oom() else {
            return;
        };
        let weak = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            let mut seen = 0;
            loop {
                // Read before waiting: that is what arms the wait.
                let _ = watch.text();
                let Some(container) = weak.upgrade() else {
                    return;
                };
                container.report_oom(&mut seen);
                drop(container);
                if watch.changed().await.is_err() {
                    return;
                }
            }
        });
        self.state().tasks.push(task.abort_handle());
    }

    fn report_oom(&self, seen: &mut u64) {
        let oom_kills = self.cgroup.oom_kills();
        if oom_kills > *seen {
            *seen = oom_kills;
            self.events.push(EventKind::Oom(OomEvent {
                container_id: self.id.clone(),
                oom_kills,
            }));
        }
    }

    /// Starts the first process, or one that Exec has announced. Gives its pid.
    pub async fn start(self: &Arc<Self>, exec_id: &str, reaper: &Reaper) -> Result<u32> {
        let _operation = self.operation.lock().await;
        if exec_id.is_empty() {
            return self.start_init().await;
        }
        let init = self.view("")?;
        if init.status != ProcessStatus::Running {
            return Err(Error::State(format!(
                "container {} is {:?}, not running: no process can join it",
                self.id, init.status
            )));
        }
        let Announced { process, streaming } = self.with(exec_id, |process, _| {
            process.announced.take().ok_or_else(|| {
                Error::State(format!(
                    "process {exec_id:?} of container {} is {:?}; only a created one can start",
                    self.id, process.status
                ))
            })
        })?;
        let started = self.start_exec(init.pid, process, streaming, reaper).await;
        match started {
            Ok((made_pid, end, pumps)) => {
                self.with(exec_id, |process, _| {
                    process.pid = made_pid;
                    process.status = ProcessStatus::Running;
                    process.pumps = Some(pumps);
                    Ok(())
                })?;
                tokio::spawn(self.clone().watch_exit(exec_id.to_owned(), end));
                Ok(u32::try_from(made_pid).unwrap_or(0))
            }
            Err(error) => {
                // As containerd's own shim: a process that could not start has ended.
                let _ = self.with(exec_id, |process, _| {
                    process.status = ProcessStatus::Stopped;
                    process.exit.send_replace(Some(Exit {
                        status: match error.code() {
                            Code::NotFound => 127,
                            Code::PermissionDenied => 126,
                            _ => 255,
                        },
                        at: std::time::SystemTime::now(),
                    }));
                    Ok(())
                });
                Err(error)
            }
        }
    }

    async fn start_init(&self) -> Result<u32> {
        let view = self.view("")?;
        if view.status != ProcessStatus::Created {
            return Err(Error::State(format!(
                "container {} is {:?}; only a created one can start",
                self.id, view.status
            )));
        }
        let socket = Path::new(create::STATE_DIR)
            .join(&self.id)
            .join(libcontainer::notify_socket::NOTIFY_FILE);
        libcontainer::notify_socket::NotifySocket::new(socket)
            .notify_container_start()
            .map_err(|error| Error::Helper {
                code: Code::Internal,
                message: format!("container {}: start: {error}", self.id),
            })?;
        let executed = self.with("", |process, _| Ok(process.executed.take()))?;
        if let Some(mut executed) = executed {
            // Nothing is ever written here: what counts is that the last copy of the other end
            // is closed. A program on a file system that hangs must not hold us for ever.
            let mut nothing = [0];
            let ended = executed.read(&mut nothing);
            let _ = tokio::time::timeout(EXECUTE_TIME, ended).await;
        }
        self.with("", |process, _| {
            // It may have been fast.
            if process.status == ProcessStatus::Created {
                process.status = ProcessStatus::Running;
            }
            Ok(())
        })?;
        Ok(view.pid)
    }

    async fn start_exec(
        &self,
        init: u32,
        process: Value,
        streaming: Streaming,
        reaper: &Reaper,
    ) -> Result<(i32, oneshot::Receiver<Exit>, Pumps)> {
        let mut process = process;
        let terminal = process["terminal"] == true;
        spec::apply_defaults(&mut process, &self.defaults);
        let root = std::fs::File::open(format!("/proc/{init}/root")).map_err(|error| {
            // Its end has not been reaped yet.
            Error::State(format!(
                "container {} is ending: no process can join it ({error})",
                self.id
            ))
        })?;
        let owner = spec::prepare_process(&mut process, &root, terminal)?;
        let size = spec::console_size(&process);
        let invalid =
            |error: serde_json::Error| Error::Invalid(format!("OCI process of an exec: {error}"));
        let job = Job::Exec(Box::new(exec::Exec {
            init: i32::try_from(init).unwrap_or(0),
            process: serde_json::from_value(process).map_err(invalid)?,
            cgroup: self.cgroup.exists().then(|| self.cgroup.path().to_owned()),
            seccomp: serde_json::from_value(self.defaults.seccomp.clone()).map_err(invalid)?,
        }));
        let (child_ends, our_ends) = streaming.open(owner)?;
        let made = helper::run(reaper, &job, child_ends).await?;
        let pumps = our_ends.start(made.master)?;
        if let (Some(terminal), Some((columns, rows))) = (pumps.terminal(), size) {
            let _ = stdio::resize(terminal, columns, rows);
        }
        Ok((made.pid, made.end, pumps))
    }

    /// Announces a process; [`Container::start`] starts it.
    pub fn announce(
        &self,
        exec_id: &str,
        mut process: Value,
        streaming: Streaming,
        names: StdioNames,
    ) -> Result<()> {
        let object = process.as_object_mut().ok_or_else(|| {
            Error::Invalid("exec: spec is not an OCI process object (JSON)".to_owned())
        })?;
        object.insert("terminal".into(), Value::Bool(names.terminal));
        let mut state = self.state();
        if state.execs.contains_key(exec_id) {
            return Err(Error::Exists(format!(
                "container {} has a process {exec_id:?} already",
                self.id
            )));
        }
        if state.execs.len() >= MAX_EXECS {
            return Err(Error::Limit(format!(
                "container {} has {MAX_EXECS} execs; delete those that have ended",
                self.id
            )));
        }
        state.execs.insert(
            exec_id.to_owned(),
            Process {
                pid: 0,
                status: ProcessStatus::Created,
                exit: watch::Sender::new(None),
                names,
                pumps: None,
                announced: Some(Announced { process, streaming }),
                executed: None,
            },
        );
        Ok(())
    }

    /// Waits for a process to end.
    pub async fn wait(&self, exec_id: &str) -> Result<Exit> {
        let mut exit = self.with(exec_id, |process, _| Ok(process.exit.subscribe()))?;
        let result = exit.wait_for(Option::is_some).await;
        match result.as_deref() {
            Ok(Some(exit)) => Ok(*exit),
            _ => Err(Error::State(format!(
                "process {exec_id:?} of container {} was deleted before it started",
                self.id
            ))),
        }
    }

    /// Sends a signal to a process, or to all.
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let signal = i32::try_from(signal)
            .ok()
            .filter(|s| (0..=64).contains(s))
            .ok_or_else(|| Error::Invalid(format!("signal {signal} does not exist")))?;
        let view = self.view(exec_id)?;
        if all {
            if signal == libc::SIGKILL && self.cgroup.exists() {
                self.cgroup.kill();
                return Ok(());
            }
            for pid in self.pids()? {
                let _ = send_signal(pid, signal);
            }
            return Ok(());
        }
        let gone = || {
            Error::NotFound(format!(
                "process {exec_id:?} of container {} is not running",
                self.id
            ))
        };
        if view.exit.is_some() || view.pid == 0 {
            return Err(gone());
        }
        match send_signal(view.pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(gone()),
            other => other.context(|| format!("send signal {signal} to container {}", self.id)),
        }
    }

    /// Its processes.
    pub fn pids(&self) -> Result<Vec<u32>> {
        if self.cgroup.exists() {
            return self.cgroup.pids();
        }
        // Without cgroups: those of its pid namespace.
        let init = self.view("")?;
        if init.exit.is_some() {
            return Ok(Vec::new());
        }
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = namespace(init.pid);
        Ok(std::fs::read_dir("/proc")
            .context(|| "list processes".to_owned())?
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter(|pid| ours.is_some() && namespace(*pid) == ours)
            .collect())
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, exec_id: &str, columns: u32, rows: u32) -> Result<()> {
        let size = |n: u32| {
            u16::try_from(n).map_err(|_| Error::Invalid(format!("terminal size {n} is over 65535")))
        };
        let (columns, rows) = (size(columns)?, size(rows)?);
        self.with(exec_id, |process, _| {
            match process.pumps.as_ref().and_then(Pumps::terminal) {
                Some(terminal) => stdio::resize(terminal, columns, rows),
                // Not started yet: for its start.
                None if process.announced.is_some() && process.names.terminal => {
                    if let Some(announced) = &mut process.announced {
                        announced.process["consoleSize"] =
                            serde_json::json!({"width": columns, "height": rows});
                    }
                    Ok(())
                }
                None => Err(Error::State(format!(
                    "process {exec_id:?} of container {} has no terminal",
                    self.id
                ))),
            }
        })
    }

    /// Ends a process's standard input.
    pub fn close_stdin(&self, exec_id: &str) -> Result<()> {
        self.with(exec_id, |process, _| {
            if let Some(pumps) = &process.pumps {
                pumps.close_stdin();
            }
            Ok(())
        })
    }

    /// Freezes or thaws it.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let _operation = self.operation.lock().await;
        let view = self.view("")?;
        if !matches!(view.status, ProcessStatus::Running | ProcessStatus::Paused) {
            return Err(Error::State(format!(
                "container {} is {:?}, not running",
                self.id, view.status
            )));
        }
        self.cgroup()?.freeze(frozen).await?;
        self.state().paused = frozen;
        Ok(())
    }

    /// Deletes an exec that has ended or never started.
    pub fn delete_exec(&self, exec_id: &str) -> Result<View> {
        let view = self.view(exec_id)?;
        if view.status == ProcessStatus::Running || view.status == ProcessStatus::Paused {
            return Err(Error::State(format!(
                "process {exec_id:?} of container {} is running; kill it first",
                self.id
            )));
        }
        self.state().execs.remove(exec_id);
        Ok(view)
    }

    /// Ends it and removes all its traces. Only if its first process has ended or never started.
    pub async fn delete(&self) -> Result<View> {
        let _operation = self.operation.lock().await;
        let view = self.view("")?;
        match view.status {
            ProcessStatus::Stopped => {}
            ProcessStatus::Created => self.end().await,
            _ => {
                return Err(Error::State(format!(
                    "container {} is running; kill it first",
                    self.id
                )));
            }
        }
        clean_up(&self.id).await;
        forget_files();
        let mut state = self.state();
        state.execs.clear();
        state.init.pumps = None;
        drop(state);
        self.view("")
    }

    /// Kills all its processes and waits for the first one's end.
    pub async fn end(&self) {
        if self.cgroup.exists() {
            let _ = std::fs::write(self.cgroup.path().join("cgroup.freeze"), "0");
        }
        let _ = self.kill("", libc::SIGKILL as u32, false);
        self.cgroup.kill();
        let _ = self.wait("").await;
    }
}

fn send_signal(pid: u32, signal: i32) -> std::io::Result<()> {
    let pid = i32::try_from(pid).map_err(std::io::Error::other)?;
    // A group or everybody is never meant.
    if pid <= 1 {
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    // Not nix: it knows no real-time signals.
    // SAFETY: kill takes a pid and a number.
    nix::errno::Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}
