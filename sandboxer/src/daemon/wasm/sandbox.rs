//! A running pod of wasm programs as the front sees it. What is no such program is handed on to
//! [`Ordinary`].

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::Mount;
use bulkhead_wasm::{Engine, Source, Stats, Status as State};
use nix::fcntl::OFlag;
use tokio::sync::Notify;

use super::artifact::Containerd;
use super::place::{END_TIME, Program, ProgramWish, Programs, ROOTS, UserWish};
use super::spec::{self, Wish};
use super::stdio::{self, Held};
use super::{Ordinary, root};
use crate::daemon::agent::AgentProcess;
use crate::daemon::events::{Event, Events, now};
use crate::daemon::pod::blocking;
use crate::daemon::proto::TaskId;
use crate::daemon::sandbox::{Answer, Exit, Figure, KILLED, Of, OwnEnd, Plan, Sandbox};
use crate::daemon::stdio::Names;
use crate::daemon::storage::{Storage, StorageError};
use crate::daemon::streaming::Streams;
use crate::daemon::task::read_spec;
use crate::fsutil;
use crate::image::open_in_image;
use crate::timeouts;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What blocking calls need.
#[derive(Debug)]
pub(super) struct Running<P> {
    /// Where its programs run.
    pub(super) place: P,
    /// The pod's directory.
    pub(super) dir: PathBuf,
    /// containerd's, of the pod.
    pub(super) namespace: String,
    /// containerd's socket of events.
    pub(super) containerd: PathBuf,
    /// Largest program that is read.
    pub(super) max_module_bytes: u64,
    /// `None`: taken down.
    pub(super) storage: Mutex<Option<Storage>>,
}

/// A running pod.
#[derive(Debug)]
pub struct WasmSandbox<P: Programs> {
    id: String,
    namespace: String,
    events: Events,
    streams: Arc<Streams>,
    running: Arc<Running<P>>,
    programs: Mutex<HashMap<String, P::Program>>,
    /// Streams of the programs, by container.
    streams_of: Mutex<HashMap<String, SharedHeld>>,
    ordinary: Ordinary,
}

/// The streams of a program, for the pod's end.
type SharedHeld = Arc<tokio::sync::Mutex<Held>>;

/// A process of a container.
#[derive(Debug)]
pub enum PodProcess<P> {
    /// A wasm program.
    Wasm(WasmProcess<P>),
    /// Of an ordinary container.
    Ordinary(AgentProcess),
}

/// A container's program.
#[derive(Debug)]
pub struct WasmProcess<P> {
    program: P,
    held: SharedHeld,
    /// It ended without ever having run.
    discarded: Notify,
}

fn no_exec() -> Status {
    Status::new(
        Code::Unimplemented,
        "exec is not supported by this sandbox: a WebAssembly program has no other programs beside it",
    )
}

fn storage_failed(error: &StorageError) -> Status {
    let code = match error {
        StorageError::Io { .. } => Code::Internal,
        StorageError::Unsupported(_) => Code::InvalidArgument,
        StorageError::Missing(_) => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

fn has_ended() -> Status {
    Status::new(Code::FailedPrecondition, "the sandbox has ended")
}

impl<P: Programs> WasmSandbox<P> {
    /// Ready for containers.
    pub(super) fn new(running: Running<P>, ordinary: Ordinary, plan: Plan) -> Self {
        Self {
            id: plan.id,
            namespace: plan.namespace,
            events: plan.events,
            streams: plan.streams,
            running: Arc::new(running),
            programs: Mutex::default(),
            streams_of: Mutex::default(),
            ordinary,
        }
    }

    /// The program of a container; `None`: it is an ordinary one.
    fn program(&self, container: &str) -> Option<P::Program> {
        lock(&self.programs).get(container).cloned()
    }

    /// Asks the wasm programs to end: first in peace, then by force.
    async fn end_programs(&self, grace: Duration) {
        let programs: Vec<_> = lock(&self.programs).values().cloned().collect();
        for (signal, time) in [(libc::SIGTERM, grace), (libc::SIGKILL, END_TIME)] {
            if time.is_zero() {
                continue;
            }
            for program in &programs {
                // One that has ended refuses it.
                let _ = program.signal(signal);
            }
            let all = async {
                for program in &programs {
                    if program.status() != State::Created {
                        program.ended().await;
                    }
                }
            };
            if tokio::time::timeout(time, all).await.is_ok() {
                return;
            }
        }
        tracing::warn!(sandbox = self.id, "a program does not end");
    }
}

impl<P: Program> WasmProcess<P> {
    async fn wait(&self, sandbox: &WasmSandbox<impl Programs>, of: &Of) -> Exit {
        let exit = tokio::select! {
            exit = self.program.ended() => exit,
            () = self.discarded.notified() => {
                return Exit { status: KILLED, at: now() };
            }
        };
        if exit.out_of_memory {
            let event = Event::Oom(TaskId {
                container_id: of.container.clone(),
            });
            sandbox.events.send(&sandbox.namespace, event);
        }
        // Why, and the program's stack.
        let words = exit
            .message
            .as_deref()
            .map(|words| format!("wasm: {words}"));
        let mut held = self.held.lock().await;
        held.finish(words.as_deref(), timeouts::drain()).await;
        drop(held);
        Exit {
            status: exit.code.into(),
            at: now(),
        }
    }

    /// One that runs is ended: containerd asks for that by a Kill before, but not always.
    fn delete(&self) {
        let _ = self.program.signal(libc::SIGKILL);
        if self.program.status() == State::Created {
            self.discarded.notify_one();
        }
    }

    fn kill(&self, request: &KillRequest) -> Answer<()> {
        let signal = i32::try_from(request.signal).map_err(|_| {
            Status::new(
                Code::InvalidArgument,
                format!("there is no signal {}", request.signal),
            )
        })?;
        if self.program.status() == State::Created && signal == libc::SIGKILL {
            // As runc does: what never started ends.
            self.discarded.notify_one();
            return Ok(());
        }
        self.program.signal(signal)
    }
}

impl<P: Programs> Sandbox for WasmSandbox<P> {
    type Process = PodProcess<P::Program>;

    async fn ended(&self) -> OwnEnd {
        tokio::select! {
            end = self.ordinary.ended() => end,
            end = self.running.place.ended() => end,
        }
    }

    async fn shut_down(&self, grace: Duration) {
        tokio::join!(self.end_programs(grace), self.ordinary.shut_down(grace));
    }

    fn take_down(&self) {
        self.ordinary.take_down();
        let programs = std::mem::take(&mut *lock(&self.programs));
        self.running
            .place
            .take_down(programs.into_values().collect());
        // containerd waits for the end of its streams before it asks for anything else. One that is
        // locked is being ended just now.
        for held in std::mem::take(&mut *lock(&self.streams_of)).values() {
            if let Ok(mut held) = held.try_lock() {
                held.close();
            }
        }
        // Mounts go with it.
        *lock(&self.running.storage) = None;
    }

    fn info(&self) -> Option<String> {
        let ordinary = self.ordinary.running().and_then(|o| o.info());
        self.running.place.info().or(ordinary)
    }

    fn figures(&self) -> Vec<Figure> {
        let used = self.running.place.used();
        let help = "CPU time of a wasm pod's threads.";
        let figure = |(mode, value): (&'static str, Duration)| Figure {
            label: Some(("mode", mode)),
            ..Figure::counter("bulkhead_wasm_cpu_seconds_total", help, value.as_secs_f64())
        };
        used.map(|used| [("user", used.user), ("system", used.system)].map(figure))
            .map(Vec::from)
            .unwrap_or_default()
    }

    async fn create(&self, request: &CreateTaskRequest) -> Answer<(Self::Process, u32)> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (running, streams) = (Arc::clone(&self.running), Arc::clone(&self.streams));
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let rootfs = request.rootfs.clone();
        let made = blocking(move || {
            let Some((code, wish)) = prepare(&running, &id, Path::new(&bundle), &rootfs)? else {
                return Ok::<_, Status>(None);
            };
            // On a thread of the runtime, too.
            Ok(Some((code, wish, stdio::connect(&names, &streams)?)))
        });
        let Some((code, wish, connected)) = made.await?? else {
            let (process, pid) = self.ordinary.started().await?.create(request).await?;
            return Ok((PodProcess::Ordinary(process), pid));
        };
        let stdio::Connected {
            stdin,
            stdout,
            stderr,
            held,
        } = connected;
        let place = &self.running.place;
        let program = place.create(code, wish, [stdin, stdout, stderr]).await?;
        let held = Arc::new(tokio::sync::Mutex::new(held));
        lock(&self.programs).insert(request.id.clone(), program.clone());
        lock(&self.streams_of).insert(request.id.clone(), Arc::clone(&held));
        let process = WasmProcess {
            program,
            held,
            discarded: Notify::new(),
        };
        Ok((PodProcess::Wasm(process), place.pid()))
    }

    fn discard(&self, container: &str) {
        lock(&self.programs).remove(container);
        lock(&self.streams_of).remove(container);
        if let Some(storage) = lock(&self.running.storage).as_mut() {
            storage.remove(container);
        }
        if let Some(ordinary) = self.ordinary.running() {
            ordinary.discard(container);
        }
    }

    async fn exec(&self, request: &ExecProcessRequest) -> Answer<Self::Process> {
        if self.program(&request.id).is_some() {
            return Err(no_exec());
        }
        let process = self.ordinary.get()?.exec(request).await?;
        Ok(PodProcess::Ordinary(process))
    }

    async fn start(&self, process: &Self::Process, of: &Of) -> Answer<u32> {
        match process {
            PodProcess::Wasm(process) => {
                process.program.start().await?;
                Ok(self.running.place.pid())
            }
            PodProcess::Ordinary(process) => self.ordinary.get()?.start(process, of).await,
        }
    }

    async fn wait(&self, process: &Self::Process, of: &Of) -> Option<Exit> {
        match process {
            PodProcess::Wasm(process) => Some(process.wait(self, of).await),
            PodProcess::Ordinary(process) => self.ordinary.get().ok()?.wait(process, of).await,
        }
    }

    async fn delete(&self, process: &Self::Process, of: &Of) -> Answer<()> {
        match process {
            PodProcess::Wasm(process) => {
                process.delete();
                Ok(())
            }
            PodProcess::Ordinary(process) => self.ordinary.get()?.delete(process, of).await,
        }
    }

    async fn kill(&self, process: &Self::Process, request: &KillRequest) -> Answer<()> {
        match process {
            PodProcess::Wasm(process) => process.kill(request),
            PodProcess::Ordinary(process) => self.ordinary.get()?.kill(process, request).await,
        }
    }

    async fn resize(&self, process: &Self::Process, request: &ResizePtyRequest) -> Answer<()> {
        match process {
            // There is no terminal whose size could change; clients ask all the same.
            PodProcess::Wasm(_) => Ok(()),
            PodProcess::Ordinary(process) => self.ordinary.get()?.resize(process, request).await,
        }
    }

    async fn close_stdin(&self, process: &Self::Process) {
        match process {
            PodProcess::Wasm(process) => process.held.lock().await.close_stdin(),
            PodProcess::Ordinary(process) => {
                if let Some(ordinary) = self.ordinary.running() {
                    ordinary.close_stdin(process).await;
                }
            }
        }
    }

    async fn pids(&self, container: &str) -> Answer<PidsResponse> {
        match self.program(container) {
            // It has threads of ours, no process of its own.
            Some(_) => Ok(PidsResponse::default()),
            None => self.ordinary.get()?.pids(container).await,
        }
    }

    async fn pause(&self, container: &str) -> Answer<()> {
        match self.program(container) {
            Some(program) => program.signal(libc::SIGSTOP),
            None => self.ordinary.get()?.pause(container).await,
        }
    }

    async fn resume(&self, container: &str) -> Answer<()> {
        match self.program(container) {
            Some(program) => program.signal(libc::SIGCONT),
            None => self.ordinary.get()?.resume(container).await,
        }
    }

    async fn update(&self, request: UpdateTaskRequest) -> Answer<()> {
        let Some(program) = self.program(&request.id) else {
            return self.ordinary.get()?.update(request).await;
        };
        if let Some(any) = &request.resources {
            let limits = spec::limits(&any.value)?;
            if let Some(bytes) = limits.memory_bytes {
                program.set_memory_limit(bytes)?;
            }
            if let Some(milli) = limits.cpu_milli {
                program.set_cpu_share(milli)?;
            }
        }
        Ok(())
    }

    async fn stats(&self, container: &str) -> Answer<Metrics> {
        match self.program(container) {
            Some(program) => Ok(metrics(&program.stats().await?)),
            None => self.ordinary.get()?.stats(container).await,
        }
    }
}

/// Blocking part: files and program. `None`: it is an ordinary one.
fn prepare<P: Programs>(
    running: &Running<P>,
    id: &str,
    bundle: &Path,
    rootfs: &[Mount],
) -> Answer<Option<(P::Code, ProgramWish)>> {
    let oci = read_spec(bundle)?;
    let entry = spec::entry(&oci)?;
    let path = match lock(&running.storage).as_mut() {
        Some(storage) => storage
            .add_root(id, rootfs)
            .map_err(|e| storage_failed(&e))?,
        None => return Err(has_ended()),
    };
    // The storage speaks of the guest's paths, of which there are none here.
    let number = PathBuf::from(path);
    let number = number.file_name().map(Path::new).unwrap_or(&number);
    let host = running.dir.join(ROOTS).join(number);
    let mut found = None;
    if !entry.is_named_wasm() && !begins_as_wasm(&host, &entry.program) {
        // Without any file in it, it may be an artifact.
        if is_empty(&host) {
            found = artifact(running, id, &entry.program)?;
        }
        if found.is_none() {
            // The agent mounts it for itself.
            if let Some(storage) = lock(&running.storage).as_mut() {
                storage.remove(id);
            }
            return Ok(None);
        }
    }
    let wish = spec::read(&oci)?;
    root::complete(&host, &wish.binds, wish.read_only)?;
    let code = match found {
        Some(code) => code,
        None => load(running, id, &host, &wish)?,
    };
    let Wish {
        function,
        args,
        env,
        cwd,
        user,
        memory_bytes,
        cpu_milli,
        ..
    } = wish;
    let wish = ProgramWish {
        id: id.to_owned(),
        root: number.to_string_lossy().into_owned(),
        function,
        args,
        env,
        cwd,
        user: user.map(|user| UserWish {
            uid: user.uid,
            gid: user.gid,
            groups: user.groups,
        }),
        memory_bytes,
        cpu_milli,
    };
    Ok(Some((code, wish)))
}

/// Whether the image has a wasm program of this name, whatever that is. Others are not looked for:
/// an ordinary program may be anywhere, in `PATH` or on a volume.
fn begins_as_wasm(root: &Path, program: &Path) -> bool {
    let head = || -> io::Result<Vec<u8>> {
        let root = fsutil::open_dir(root)?;
        // Not opened yet: in an image it may be a device of this host.
        let found = fsutil::open_in_root(&root, program.as_os_str(), OFlag::O_PATH)?;
        let found = File::from(found);
        let mut head = Vec::new();
        if found.metadata()?.is_file() {
            let path = format!("/proc/self/fd/{}", found.as_raw_fd());
            File::open(path)?.take(8).read_to_end(&mut head)?;
        }
        Ok(head)
    };
    head().is_ok_and(|head| Engine::is_wasm(&head))
}

fn is_empty(root: &Path) -> bool {
    std::fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_none())
}

/// The name of a program for people.
fn shown(program: &Path) -> String {
    let text = program.display().to_string();
    text.chars().take(200).collect()
}

/// As runc's shim words it: containerd and kubelet take NotFound for something else.
fn refused(program: &Path, reason: impl std::fmt::Display) -> Status {
    let text = format!("OCI runtime create failed: {}: {reason}", shown(program));
    Status::new(Code::Unknown, text)
}

/// The last part of a program's path.
fn file_name(program: &Path) -> String {
    program
        .file_name()
        .map_or_else(|| shown(program), |n| n.to_string_lossy().into_owned())
}

/// Finds the program as the container would see it, or in an image that has no files.
fn load<P: Programs>(running: &Running<P>, id: &str, root: &Path, wish: &Wish) -> Answer<P::Code> {
    let opened = match open_in_image(root, &wish.program) {
        Ok(fd) => File::from(fd),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let reason = format!("{e} in the image");
            return match artifact(running, id, &wish.program) {
                Ok(Some(program)) => Ok(program),
                Ok(None) => Err(refused(&wish.program, reason)),
                Err(other) => {
                    let reason = format!("{reason}; nor is it an artifact: {}", other.message);
                    Err(refused(&wish.program, reason))
                }
            };
        }
        Err(e) => return Err(refused(&wish.program, format!("{e} in the image"))),
    };
    let source = Source::Open {
        name: &file_name(&wish.program),
        file: &opened,
    };
    running
        .place
        .load(source)
        .map_err(|e| refused(&wish.program, e))
}

/// What there is of an artifact's module.
enum Found<C> {
    /// It was made ready before.
    Ready(C),
    /// Its bytes.
    Bytes(bytes::Bytes),
}

/// The program of an image whose layer is the module itself. Blocks.
fn artifact<P: Programs>(
    running: &Running<P>,
    id: &str,
    program: &Path,
) -> Answer<Option<P::Code>> {
    let name = file_name(program);
    let found = tokio::runtime::Handle::current().block_on(async {
        let containerd = Containerd::connect(&running.containerd, &running.namespace).await?;
        let Some(module) = containerd.module_of(id, &name).await? else {
            return Ok(None);
        };
        if let Some(known) = running.place.find(&name, &module.digest) {
            return Ok(Some(Found::Ready(known)));
        }
        if module.size > running.max_module_bytes {
            let (size, limit) = (module.size, running.max_module_bytes);
            return Err(refused(
                program,
                format!("its module has {size} bytes; the limit is {limit} (wasm.max_module_mib)"),
            ));
        }
        let bytes = containerd
            .read(&module.digest, running.max_module_bytes)
            .await?;
        Ok(Some(Found::Bytes(bytes)))
    })?;
    match found {
        None => Ok(None),
        Some(Found::Ready(program)) => Ok(Some(program)),
        Some(Found::Bytes(bytes)) => {
            let source = Source::Bytes {
                name: &name,
                bytes: &bytes,
            };
            let loaded = running.place.load(source);
            loaded.map(Some).map_err(|e| refused(program, e))
        }
    }
}

/// What a program uses, in the form of a cgroup's statistics.
fn metrics(stats: &Stats) -> Metrics {
    let usec = u64::try_from(stats.cpu.as_micros()).unwrap_or(u64::MAX);
    Metrics {
        pids: Some(PidsStat {
            current: u64::try_from(stats.instances).unwrap_or(u64::MAX),
            limit: 0,
        }),
        cpu: Some(CPUStat {
            usage_usec: usec,
            user_usec: usec,
            ..CPUStat::default()
        }),
        memory: Some(MemoryStat {
            anon: stats.memory_bytes,
            usage: stats.memory_bytes,
            usage_limit: stats.memory_limit_bytes,
            ..MemoryStat::default()
        }),
        memory_events: Some(MemoryEvents {
            max: stats.memory_refused,
            oom: stats.memory_refused,
            ..MemoryEvents::default()
        }),
        ..Metrics::default()
    }
}
