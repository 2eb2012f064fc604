//! `containerd.task.v3.Task` for the programs of one pod.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::metrics::{
    CPUStat, METRICS_TYPE_URL, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskService;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty, Mount, ProcessStatus};
use bulkhead_wasm::{self as engine, ContainerConfig, Program, Reason, Source, WasmError};
use tokio::sync::watch;

use super::pod::Pod;
use super::root;
use super::spec::{self, Wish};
use super::stdio::{self, Held};
use crate::daemon::events::{Event, now};
use crate::daemon::pod::{KILLED, blocking};
use crate::daemon::proto::{TaskCreate, TaskDelete, TaskExit, TaskId, TaskStart};
use crate::daemon::stdio::Names;
use crate::daemon::storage::StorageError;
use crate::daemon::task::{Exit, check_id, read_spec, to_the_end};
use crate::image::open_in_image;
use crate::timeouts;

/// Containers of one pod.
const MAX_CONTAINERS: usize = 512;
/// How long Delete waits for the end of a program that was killed.
const END_TIME: Duration = Duration::from_secs(5);

type Answer<T> = Result<T, Status>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: String,
    names: Names,
    /// None: of an earlier process of ours.
    program: Option<engine::Container>,
    held: tokio::sync::Mutex<Held>,
    exit: watch::Sender<Option<Exit>>,
}

/// A container's place in its pod.
#[derive(Debug, Clone)]
pub enum Slot {
    /// Being made.
    Reserved,
    /// Made.
    Container(Arc<Container>),
}

impl Slot {
    /// A container of an earlier process.
    pub fn ended(id: &str) -> Self {
        let slot = Self::Container(Arc::new(Container {
            id: id.to_owned(),
            bundle: String::new(),
            names: Names::default(),
            program: None,
            held: tokio::sync::Mutex::default(),
            exit: watch::Sender::new(None),
        }));
        slot.sandbox_ended();
        slot
    }

    /// Its program.
    pub fn program(&self) -> Option<engine::Container> {
        match self {
            Self::Container(container) => container.program.clone(),
            Self::Reserved => None,
        }
    }

    /// Its pod has ended.
    pub fn sandbox_ended(&self) {
        if let Self::Container(container) = self {
            container.ended(Exit {
                status: KILLED,
                at: now(),
            });
        }
    }
}

impl Container {
    /// The first end counts.
    fn ended(&self, exit: Exit) {
        self.exit.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(exit);
            first
        });
    }

    fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.ok().and_then(|e| *e)
    }

    fn status(&self) -> ProcessStatus {
        match (self.exit(), self.program.as_ref().map(|p| p.status())) {
            (Some(_), _) | (None, None) => ProcessStatus::Stopped,
            (None, Some(engine::Status::Created)) => ProcessStatus::Created,
            (None, Some(engine::Status::Paused)) => ProcessStatus::Paused,
            // Its output is still being passed on.
            (None, Some(engine::Status::Running | engine::Status::Stopped)) => {
                ProcessStatus::Running
            }
        }
    }
}

/// The service.
#[derive(Debug)]
pub struct Tasks(pub Arc<Pod>);

fn no_exec() -> Status {
    Status::new(
        Code::Unimplemented,
        "exec is not supported by this sandbox: a WebAssembly program has no other programs beside it",
    )
}

fn engine_failed(error: &WasmError) -> Status {
    let code = match error {
        WasmError::Invalid { .. }
        | WasmError::Unsupported { .. }
        | WasmError::NoFunction { .. }
        | WasmError::Mount { .. } => Code::InvalidArgument,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

fn storage_failed(error: &StorageError) -> Status {
    let code = match error {
        StorageError::Io { .. } => Code::Internal,
        StorageError::Unsupported(_) => Code::InvalidArgument,
        StorageError::Missing(_) => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

impl Tasks {
    fn find(&self, id: &str, exec: &str) -> Answer<Arc<Container>> {
        let shown = |text: &str| text.chars().take(100).collect::<String>();
        match self.0.slots().get(id) {
            Some(Slot::Container(container)) if exec.is_empty() => Ok(Arc::clone(container)),
            Some(Slot::Container(_)) => Err(Status::new(
                Code::NotFound,
                format!("container {id} has no process {:?}", shown(exec)),
            )),
            _ => Err(Status::new(
                Code::NotFound,
                format!("sandbox {} has no container {:?}", self.0.id, shown(id)),
            )),
        }
    }

    /// The program of a container that has not ended.
    fn alive(&self, id: &str, exec: &str) -> Answer<engine::Container> {
        let container = self.find(id, exec)?;
        match &container.program {
            Some(program) if container.exit().is_none() => Ok(program.clone()),
            _ => Err(Status::new(
                Code::NotFound,
                format!("container {id} has ended already"),
            )),
        }
    }

    fn event(&self, event: Event) {
        self.0.shared.events.send(&self.0.namespace, event);
    }
}

/// Makes a container; undoes everything if that fails.
async fn create(pod: Arc<Pod>, request: CreateTaskRequest) -> Answer<u32> {
    check_id("container", &request.id)?;
    if !request.checkpoint.is_empty() {
        return Err(Status::new(
            Code::Unimplemented,
            "restoring a container from a checkpoint is not supported",
        ));
    }
    {
        let mut slots = pod.slots();
        if slots.contains_key(&request.id) {
            return Err(Status::new(
                Code::AlreadyExists,
                format!("container {} exists already", request.id),
            ));
        }
        if slots.len() >= MAX_CONTAINERS {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("sandbox {} has {MAX_CONTAINERS} containers", pod.id),
            ));
        }
        slots.insert(request.id.clone(), Slot::Reserved);
    }
    let id = request.id.clone();
    let made = make(&pod, request).await;
    match made {
        Ok(container) => {
            let slot = Slot::Container(container);
            let mut slots = pod.slots();
            // The pod may have ended meanwhile, and with it all that was in the list by then.
            if pod.running().is_err() {
                slot.sandbox_ended();
            }
            slots.insert(id, slot);
            drop(slots);
            pod.note_containers();
            Ok(std::process::id())
        }
        Err(error) => {
            remove_files(&pod, &id).await?;
            pod.slots().remove(&id);
            Err(error)
        }
    }
}

async fn remove_files(pod: &Arc<Pod>, id: &str) -> Answer<()> {
    let Ok(running) = pod.running() else {
        return Ok(());
    };
    let id = id.to_owned();
    blocking(move || lock(&running.storage).remove(&id)).await
}

async fn make(pod: &Arc<Pod>, request: CreateTaskRequest) -> Answer<Arc<Container>> {
    let names = Names {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let streams = stdio::connect(&names, &pod.streams)?;
    let stdio::Connected {
        stdin,
        stdout,
        stderr,
        held,
    } = streams;
    let preparing = Arc::clone(pod);
    let (id, bundle, rootfs) = (request.id.clone(), request.bundle.clone(), request.rootfs);
    let program = blocking(move || {
        let (mut config, pod) = prepare(&preparing, &id, Path::new(&bundle), &rootfs)?;
        config.stdin = stdin;
        config.stdout = stdout;
        config.stderr = stderr;
        pod.create(config).map_err(|e| engine_failed(&e))
    })
    .await??;
    let container = Arc::new(Container {
        id: request.id.clone(),
        bundle: request.bundle.clone(),
        names,
        program: Some(program.clone()),
        held: tokio::sync::Mutex::new(held),
        exit: watch::Sender::new(None),
    });
    tokio::spawn(watch_exit(Arc::clone(pod), Arc::clone(&container), program));
    let event = Event::Create(TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        pid: std::process::id(),
    });
    pod.shared.events.send(&pod.namespace, event);
    Ok(container)
}

/// Blocking part: files and program.
fn prepare(
    pod: &Pod,
    id: &str,
    bundle: &Path,
    rootfs: &[Mount],
) -> Answer<(ContainerConfig, engine::Pod)> {
    let running = pod.running()?;
    let wish = spec::read(&read_spec(bundle)?)?;
    let path = lock(&running.storage)
        .add_root(id, rootfs)
        .map_err(|e| storage_failed(&e))?;
    // The storage speaks of the guest's paths, of which there are none here.
    let number = PathBuf::from(path);
    let number = number.file_name().map(Path::new).unwrap_or(&number);
    let host = pod.host_root(number);
    root::complete(&host, &wish.binds, wish.read_only)?;
    let program = load(pod, &host, &wish)?;
    let mut config = ContainerConfig::new(id, program);
    let Wish {
        function,
        args,
        env,
        cwd,
        memory_bytes,
        cpu_milli,
        ..
    } = wish;
    config.function = function;
    config.args = args;
    config.env = env;
    config.cwd = Some(cwd);
    config.memory_bytes = memory_bytes;
    config.cpu_milli = cpu_milli;
    config.mounts = vec![engine::Mount {
        host,
        guest: "/".into(),
        // Mounts in it may be writable: the kernel tells them apart.
        read_only: false,
    }];
    config.http.threads = cpu_milli.map_or_else(
        || std::thread::available_parallelism().map_or(1, usize::from),
        |milli| usize::try_from(milli.div_ceil(1000)).unwrap_or(1),
    );
    Ok((config, running.engine))
}

/// Finds the program as the container would see it.
fn load(pod: &Pod, root: &Path, wish: &Wish) -> Answer<Program> {
    let shown: String = wish
        .program
        .display()
        .to_string()
        .chars()
        .take(200)
        .collect();
    // As runc's shim words it: containerd and kubelet take NotFound for something else.
    let refused = |reason: String| {
        Status::new(
            Code::Unknown,
            format!("OCI runtime create failed: {shown}: {reason}"),
        )
    };
    let file = File::from(
        open_in_image(root, &wish.program).map_err(|e| refused(format!("{e} in the image")))?,
    );
    let name = wish
        .program
        .file_name()
        .map_or_else(|| shown.clone().into(), |n| n.to_string_lossy());
    let source = Source::Open {
        name: &name,
        file: &file,
    };
    pod.shared.engine()?.load(source).map_err(|e| match e {
        WasmError::Invalid { .. } => refused(format!(
            "{e}; ordinary programs are not run in a wasm pod: give the pod another runtime class"
        )),
        e => refused(e.to_string()),
    })
}

/// Waits for the program's end and reports it once its output has been passed on.
async fn watch_exit(pod: Arc<Pod>, container: Arc<Container>, program: engine::Container) {
    let exit = tokio::select! {
        exit = program.ended() => exit,
        // Deleted without a start, or the pod has ended.
        _ = container.wait() => return report(&pod, &container),
    };
    let send = |event| pod.shared.events.send(&pod.namespace, event);
    if exit.reason == Reason::OutOfMemory {
        send(Event::Oom(TaskId {
            container_id: container.id.clone(),
        }));
    }
    let words = exit.message.as_deref().and_then(|m| m.lines().next());
    let words = words.map(|line| format!("wasm: {line}"));
    let mut held = container.held.lock().await;
    held.finish(words.as_deref(), timeouts::drain()).await;
    drop(held);
    container.ended(Exit {
        status: exit.code.into(),
        at: now(),
    });
    report(&pod, &container);
}

fn report(pod: &Pod, container: &Container) {
    let Some(exit) = container.exit() else { return };
    let event = Event::Exit(TaskExit {
        container_id: container.id.clone(),
        id: container.id.clone(),
        pid: std::process::id(),
        exit_status: exit.status,
        exited_at: Some(exit.at),
    });
    pod.shared.events.send(&pod.namespace, event);
}

async fn delete(pod: Arc<Pod>, request: DeleteRequest) -> Answer<DeleteResponse> {
    let tasks = Tasks(Arc::clone(&pod));
    let container = tasks.find(&request.id, &request.exec_id)?;
    if let Some(program) = &container.program {
        // One that runs is ended: containerd asks for that by a Kill before, but not always.
        let _ = program.signal(libc::SIGKILL);
        if program.status() == engine::Status::Created {
            container.ended(Exit {
                status: KILLED,
                at: now(),
            });
        }
    }
    let exit = tokio::time::timeout(timeouts::drain() + END_TIME, container.wait())
        .await
        .ok()
        .flatten()
        .unwrap_or_else(|| Exit {
            status: KILLED,
            at: now(),
        });
    container.ended(exit);
    remove_files(&pod, &request.id).await?;
    pod.slots().remove(&request.id);
    pod.note_containers();
    tasks.event(Event::Delete(TaskDelete {
        container_id: request.id,
        pid: std::process::id(),
        exit_status: exit.status,
        exited_at: Some(exit.at),
        id: String::new(),
    }));
    Ok(DeleteResponse {
        pid: std::process::id(),
        exit_status: exit.status,
        exited_at: Some(exit.at),
    })
}

/// What a program uses, in the form of a cgroup's statistics.
pub fn metrics(stats: &engine::Stats) -> Metrics {
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

impl TaskService for Tasks {
    async fn create(&self, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let pid = to_the_end(create(Arc::clone(&self.0), request)).await?;
        Ok(CreateTaskResponse { pid })
    }

    async fn start(&self, request: StartRequest) -> Answer<StartResponse> {
        let program = self.alive(&request.id, &request.exec_id)?;
        // It may have to make a thread.
        let started = blocking(move || program.start()).await?;
        started.map_err(|e| Status::new(Code::FailedPrecondition, e.to_string()))?;
        let pid = std::process::id();
        self.event(Event::Start(TaskStart {
            container_id: request.id,
            pid,
        }));
        Ok(StartResponse { pid })
    }

    async fn state(&self, request: StateRequest) -> Answer<StateResponse> {
        let container = self.find(&request.id, &request.exec_id)?;
        let exit = container.exit();
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.clone(),
            pid: std::process::id(),
            status: container.status() as i32,
            stdin: container.names.stdin.clone(),
            stdout: container.names.stdout.clone(),
            stderr: container.names.stderr.clone(),
            terminal: container.names.terminal,
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map(|e| e.at),
            exec_id: request.exec_id,
        })
    }

    async fn delete(&self, request: DeleteRequest) -> Answer<DeleteResponse> {
        to_the_end(delete(Arc::clone(&self.0), request)).await
    }

    async fn exec(&self, _: ExecProcessRequest) -> Answer<Empty> {
        Err(no_exec())
    }

    async fn resize_pty(&self, request: ResizePtyRequest) -> Answer<Empty> {
        // There is no terminal whose size could change; clients ask all the same.
        self.find(&request.id, &request.exec_id).map(|_| Empty {})
    }

    async fn close_io(&self, request: CloseIoRequest) -> Answer<Empty> {
        let container = self.find(&request.id, &request.exec_id)?;
        if request.stdin {
            container.held.lock().await.close_stdin();
        }
        Ok(Empty {})
    }

    async fn kill(&self, request: KillRequest) -> Answer<Empty> {
        let program = self.alive(&request.id, &request.exec_id)?;
        let signal = i32::try_from(request.signal).map_err(|_| {
            Status::new(
                Code::InvalidArgument,
                format!("there is no signal {}", request.signal),
            )
        })?;
        if program.status() == engine::Status::Created && signal == libc::SIGKILL {
            // As runc does: what never started ends.
            self.find(&request.id, "")?.ended(Exit {
                status: KILLED,
                at: now(),
            });
            return Ok(Empty {});
        }
        program
            .signal(signal)
            .map_err(|e| Status::new(Code::FailedPrecondition, e.to_string()))?;
        Ok(Empty {})
    }

    async fn wait(&self, request: WaitRequest) -> Answer<WaitResponse> {
        let container = self.find(&request.id, &request.exec_id)?;
        let exit = container.wait().await.ok_or_else(|| {
            Status::new(Code::NotFound, format!("container {} is gone", request.id))
        })?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at),
        })
    }

    async fn pids(&self, request: PidsRequest) -> Answer<PidsResponse> {
        // It has threads of ours, no process of its own.
        self.alive(&request.id, "")?;
        Ok(PidsResponse {
            processes: Vec::new(),
        })
    }

    async fn pause(&self, request: PauseRequest) -> Answer<Empty> {
        let program = self.alive(&request.id, "")?;
        program
            .pause()
            .map_err(|e| Status::new(Code::FailedPrecondition, e.to_string()))?;
        self.event(Event::Paused(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn resume(&self, request: ResumeRequest) -> Answer<Empty> {
        let program = self.alive(&request.id, "")?;
        program
            .resume()
            .map_err(|e| Status::new(Code::FailedPrecondition, e.to_string()))?;
        self.event(Event::Resumed(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(Status::new(
            Code::Unimplemented,
            "checkpoints of containers are not supported",
        ))
    }

    async fn update(&self, _: UpdateTaskRequest) -> Answer<Empty> {
        Err(Status::new(
            Code::Unimplemented,
            "the limits of a running wasm program cannot be changed: start it anew",
        ))
    }

    async fn stats(&self, request: StatsRequest) -> Answer<StatsResponse> {
        let program = self.alive(&request.id, "")?;
        Ok(StatsResponse {
            stats: Some(Any::of(METRICS_TYPE_URL, &metrics(&program.stats()))),
        })
    }

    async fn connect(&self, request: ConnectRequest) -> Answer<ConnectResponse> {
        self.find(&request.id, "")?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    async fn shutdown(&self, _: ShutdownRequest) -> Answer<Empty> {
        // The sandbox's life is the controller's matter.
        Ok(Empty {})
    }
}
