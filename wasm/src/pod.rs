//! Pods and their containers: what a sandboxer drives.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::Notify;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

use crate::control::Control;
use crate::engine::Engine;
use crate::error::WasmError;
use crate::exit::{Exit, Reason};
use crate::limits::{Budget, Usage};
use crate::names::Resolver;
use crate::program::{Program, ProgramKind};
use crate::run;
use crate::stdio::Stdio;
use crate::threads::{Network, Spawner, ThreadHook, Threads};
use crate::user::User;

/// What a pod is given.
#[derive(Default)]
pub struct PodConfig {
    /// Its id; part of thread names.
    pub id: String,
    /// Which network its programs see.
    pub network: Network,
    /// Its resolv.conf and hosts file.
    pub resolver: Resolver,
    /// Memory for all its programs together, in bytes; `None` is no limit but each program's own.
    pub memory_bytes: Option<u64>,
    /// Called on each of its threads before use.
    pub thread_hook: Option<ThreadHook>,
    /// Whether each thread loads the filter of [`crate::harden_thread`], after the hook.
    pub harden: bool,
    /// Starts its threads; plain threads of this process if left out.
    pub spawner: Option<Spawner>,
}

impl fmt::Debug for PodConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodConfig")
            .field("id", &self.id)
            .field("network", &self.network)
            .field("memory_bytes", &self.memory_bytes)
            .finish_non_exhaustive()
    }
}

/// A directory of the host in a program's file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Directory on the host.
    pub host: PathBuf,
    /// Absolute path for the program.
    pub guest: String,
    /// The program cannot write.
    pub read_only: bool,
}

/// What a container runs, and with what.
#[derive(Debug)]
pub struct ContainerConfig {
    /// Its id, for messages.
    pub id: String,
    /// The program.
    pub program: Program,
    /// Which function; by default what the program is for (`_start`, `wasi:cli/run`, HTTP).
    pub function: Option<String>,
    /// Arguments, the program's name first.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Working directory. Programs of WASI preview 1 know none: they start in `/`.
    pub cwd: Option<String>,
    /// As whom it opens and makes files; by default as the process. Others need root.
    pub user: Option<User>,
    /// Its whole file system.
    pub mounts: Vec<Mount>,
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
    /// Memory of all its instances together, in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU share in thousandths of a core.
    pub cpu_milli: Option<u32>,
    /// It is ended after this time.
    pub deadline: Option<Duration>,
    /// Instructions it may execute; needs an engine with fuel.
    pub fuel: Option<u64>,
    /// Where its memory and stack are written if it traps, as a core dump in the WebAssembly format;
    /// needs an engine with core dumps. Not for requests of a server.
    pub core_dump: Option<std::fs::File>,
    /// How a program that serves HTTP is reached.
    pub http: HttpConfig,
    /// It may make sockets and requests and look names up, where the pod has a network.
    pub sockets: bool,
}

/// How a program that serves HTTP is reached.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Address in the pod's network.
    pub listen: SocketAddr,
    /// Threads that answer; each request gets an instance of its own.
    pub threads: usize,
    /// Requests answered at one time; more wait.
    pub concurrent: usize,
    /// A request that takes longer is ended.
    pub timeout: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            // The convention of runwasi.
            listen: SocketAddr::from(([0, 0, 0, 0], 8080)),
            threads: 1,
            concurrent: 100,
            timeout: Duration::from_secs(300),
        }
    }
}

impl ContainerConfig {
    /// A container of `program` with nothing but its name.
    pub fn new(id: &str, program: Program) -> Self {
        Self {
            id: id.to_owned(),
            args: vec![program.name().to_owned()],
            program,
            function: None,
            env: Vec::new(),
            cwd: None,
            user: None,
            mounts: Vec::new(),
            stdin: Stdio::Null,
            stdout: Stdio::Null,
            stderr: Stdio::Null,
            memory_bytes: None,
            cpu_milli: None,
            deadline: None,
            fuel: None,
            core_dump: None,
            http: HttpConfig::default(),
            sockets: true,
        }
    }
}

/// The programs of a pod share threads, network and memory limit.
#[derive(Debug, Clone)]
pub struct Pod(Arc<PodInner>);

#[derive(Debug)]
pub(crate) struct PodInner {
    pub(crate) engine: Engine,
    pub(crate) threads: Threads,
    pub(crate) resolver: Arc<Resolver>,
    memory: Arc<Budget>,
}

impl Pod {
    /// Makes a pod. It has no threads until something runs.
    pub fn new(engine: &Engine, config: PodConfig) -> Self {
        Self(Arc::new(PodInner {
            engine: engine.clone(),
            threads: Threads::new(
                &config.id,
                config.network,
                config.thread_hook,
                config.harden,
                config.spawner,
            ),
            resolver: Arc::new(config.resolver),
            memory: Arc::new(Budget::new(config.memory_bytes.unwrap_or(u64::MAX))),
        }))
    }

    /// Nothing is going to be started any more: its threads do not wait for that.
    pub fn close(&self) {
        self.0.threads.close();
    }

    /// Memory of all its programs.
    pub fn memory(&self) -> &Budget {
        &self.0.memory
    }

    /// Prepares a container: all that can be wrong is found out here.
    ///
    /// # Errors
    /// A mount is missing, the function does not exist, or a setting does not fit the engine.
    pub fn create(&self, config: ContainerConfig) -> Result<Container, WasmError> {
        let name = config.program.name();
        let unsupported = |reason: String| WasmError::Unsupported {
            name: name.to_owned(),
            reason,
        };
        let kind = config.program.kind();
        if config.fuel.is_some() && !self.0.engine.0.config.fuel {
            return Err(unsupported(
                "fuel needs an engine that counts instructions (EngineConfig::fuel)".into(),
            ));
        }
        if config.core_dump.is_some() && !self.0.engine.0.config.core_dumps {
            return Err(unsupported(
                "core dumps need an engine that takes them (EngineConfig::core_dumps)".into(),
            ));
        }
        if kind.serves_http() && !self.0.threads.has_network() && config.function.is_none() {
            return Err(unsupported(
                "it serves HTTP, but the pod has no network".into(),
            ));
        }
        let wanted = match (&config.function, kind) {
            (Some(function), _) => Some(function.as_str()),
            (None, ProgramKind::Core) => Some("_start"),
            (None, ProgramKind::Library) => Some(""),
            (None, _) => None,
        };
        let exports = &config.program.0.exports;
        if let Some(function) = wanted
            && !exports.iter().any(|e| e == function)
        {
            let hint = if exports.is_empty() {
                String::new()
            } else {
                format!("; it exports {}", exports.join(", "))
            };
            let function = if function.is_empty() {
                "wasi:cli/run".into()
            } else {
                function.to_owned()
            };
            return Err(WasmError::NoFunction {
                name: name.to_owned(),
                function,
                hint,
            });
        }
        let files = preopen(&config.mounts)?;
        let usage = Arc::new(Usage::new(
            config.memory_bytes.unwrap_or(u64::MAX),
            Arc::clone(&self.0.memory),
        ));
        let control = Arc::new(Control::new(config.cpu_milli));
        Ok(Container(Arc::new(ContainerInner {
            pod: Arc::clone(&self.0),
            id: config.id.clone(),
            usage,
            control,
            state: Mutex::new(State::Created(Box::new((config, files)))),
            changed: Condvar::new(),
            ended: Notify::new(),
        })))
    }
}

/// Opens what the program may see. Nothing else of the host's files is within its reach.
fn preopen(mounts: &[Mount]) -> Result<WasiFilesystemCtx, WasmError> {
    let mut builder = WasiCtxBuilder::new();
    // The thread is the program's own: no need to hand its reads to another one.
    builder.allow_blocking_current_thread(true);
    for mount in mounts {
        let fail = |reason: String| WasmError::Mount {
            host: mount.host.display().to_string(),
            guest: mount.guest.clone(),
            reason,
        };
        if !mount.guest.starts_with('/') {
            return Err(fail("the program's path must be absolute".into()));
        }
        let meta = std::fs::metadata(&mount.host).map_err(|e| fail(e.to_string()))?;
        if !meta.is_dir() {
            return Err(fail(
                "it is a file; WebAssembly programs are given directories: mount its directory"
                    .into(),
            ));
        }
        let perms = if mount.read_only {
            FsPerms::ReadOnly
        } else {
            FsPerms::ReadWrite
        };
        builder
            .preopened_dir(&mount.host, &mount.guest, perms)
            .map_err(|e| fail(e.to_string()))?;
    }
    Ok(builder.build().filesystem().clone())
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Not started.
    Created,
    /// Its program runs.
    Running,
    /// Its program is held.
    Paused,
    /// Its program has ended.
    Stopped,
}

enum State {
    Created(Box<(ContainerConfig, WasiFilesystemCtx)>),
    Running,
    Stopped(Exit),
}

/// A program in a pod.
#[derive(Clone)]
pub struct Container(Arc<ContainerInner>);

pub(crate) struct ContainerInner {
    pub(crate) pod: Arc<PodInner>,
    id: String,
    pub(crate) usage: Arc<Usage>,
    pub(crate) control: Arc<Control>,
    state: Mutex<State>,
    changed: Condvar,
    ended: Notify,
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container")
            .field("id", &self.0.id)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// What a container uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// CPU time of the program and its host calls.
    pub cpu: Duration,
    /// Linear memories and tables in bytes.
    pub memory_bytes: u64,
    /// Most of these at a time.
    pub memory_peak_bytes: u64,
    /// The limit that counts, in bytes; `u64::MAX` is none.
    pub memory_limit_bytes: u64,
    /// How often more memory was refused.
    pub memory_refused: u64,
    /// Instances alive.
    pub instances: usize,
}

impl Container {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong_state(&self, reason: &str) -> WasmError {
        WasmError::State {
            id: self.0.id.clone(),
            reason: reason.to_owned(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        match *self.state() {
            State::Created(_) => Status::Created,
            State::Running if self.0.control.is_paused() => Status::Paused,
            State::Running => Status::Running,
            State::Stopped(_) => Status::Stopped,
        }
    }

    /// Starts the program.
    ///
    /// # Errors
    /// It was started before, or the host has no thread for it.
    pub fn start(&self) -> Result<(), WasmError> {
        let (config, files) = {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Running) {
                State::Created(parts) => *parts,
                other => {
                    *state = other;
                    return Err(self.wrong_state("was started before"));
                }
            }
        };
        // Tells the end whatever happens, even if the thread panics.
        let guard = EndGuard(Arc::clone(&self.0));
        let user = config.user.clone();
        let job = Box::new(move |runtime: &Runtime| {
            let inner = Arc::clone(&guard.0);
            let exit = runtime.block_on(run::container(&inner, config, files));
            inner.finish(exit);
            drop(guard);
        });
        let result = self.0.pod.threads.run(user.as_ref(), job);
        if let Err(e) = &result {
            self.0.finish(Exit::failed(e.to_string()));
        }
        result
    }

    /// Does what a signal does to a process without handlers: most end it, `STOP` and `CONT` hold
    /// and continue it, some are ignored. A server asked by `TERM` finishes what it is doing.
    ///
    /// # Errors
    /// It is not running.
    pub fn signal(&self, signal: i32) -> Result<(), WasmError> {
        match *self.state() {
            State::Running => {}
            State::Created(_) => return Err(self.wrong_state("is not started")),
            State::Stopped(_) => return Err(self.wrong_state("has ended")),
        }
        match signal {
            libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => self.hold(true),
            libc::SIGCONT => self.hold(false),
            libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | 0 => {}
            libc::SIGTERM | libc::SIGINT | libc::SIGQUIT if !self.0.control.is_paused() => {
                self.0.control.terminate(signal.unsigned_abs());
                self.0.pod.engine.interrupt();
            }
            other => {
                self.0.control.kill(other.unsigned_abs());
                self.0.pod.engine.interrupt();
            }
        }
        Ok(())
    }

    fn hold(&self, paused: bool) {
        self.0.control.pause(paused);
        self.0.pod.engine.interrupt();
    }

    /// Changes its memory limit, in bytes. It can be changed at any time; what the program has beyond
    /// a lower one it keeps.
    pub fn set_memory_limit(&self, bytes: Option<u64>) {
        self.0.usage.set_limit(bytes.unwrap_or(u64::MAX));
    }

    /// Changes its CPU share, in thousandths of a core.
    pub fn set_cpu_share(&self, milli: Option<u32>) {
        self.0.control.set_share(milli);
    }

    /// Holds the program: it executes nothing until [`Self::resume`].
    ///
    /// # Errors
    /// It is not running.
    pub fn pause(&self) -> Result<(), WasmError> {
        self.signal(libc::SIGSTOP)
    }

    /// Lets a held program go on.
    ///
    /// # Errors
    /// It is not running.
    pub fn resume(&self) -> Result<(), WasmError> {
        self.signal(libc::SIGCONT)
    }

    /// Waits for the end; blocks the calling thread. A container that was never started has none.
    ///
    /// # Errors
    /// It was not started.
    pub fn wait(&self) -> Result<Exit, WasmError> {
        let mut state = self.state();
        loop {
            match &*state {
                State::Stopped(exit) => return Ok(exit.clone()),
                State::Created(_) => return Err(self.wrong_state("is not started")),
                State::Running => {}
            }
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the end, at most for `timeout`.
    pub fn wait_for(&self, timeout: Duration) -> Option<Exit> {
        let state = self.state();
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(state, timeout, |s| !matches!(s, State::Stopped(_)))
            .unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Stopped(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Waits for the end, on any runtime.
    pub async fn ended(&self) -> Exit {
        loop {
            let ended = self.0.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if let State::Stopped(exit) = &*self.state() {
                return exit.clone();
            }
            ended.await;
        }
    }

    /// What it uses.
    pub fn stats(&self) -> Stats {
        let usage = &self.0.usage;
        Stats {
            cpu: self.0.control.cpu.used(),
            memory_bytes: usage.container.used(),
            memory_peak_bytes: usage.container.peak(),
            memory_limit_bytes: usage.container.limit().min(usage.pod.limit()),
            memory_refused: usage
                .container
                .refused()
                .saturating_add(usage.pod.refused()),
            instances: usage.instances.load(Ordering::Relaxed),
        }
    }
}

impl ContainerInner {
    fn finish(&self, exit: Exit) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*state, State::Stopped(_)) {
            *state = State::Stopped(exit);
        }
        drop(state);
        self.changed.notify_all();
        self.ended.notify_waiters();
    }
}

struct EndGuard(Arc<ContainerInner>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        // Does nothing if the end was told properly.
        self.0.finish(Exit {
            code: crate::exit::TRAPPED,
            reason: Reason::Failed,
            message: Some("the sandbox failed while it ran the program (a bug)".into()),
        });
    }
}
