//! A running pod of wasm programs as the front sees it.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::Mount;
use bulkhead_wasm::{self as engine, ContainerConfig, Engine, Program, Reason, Source, WasmError};
use tokio::sync::Notify;

use super::root;
use super::spec::{self, Wish};
use super::stdio::{self, Held};
use crate::daemon::cgroup::Threads;
use crate::daemon::events::{Event, Events, now};
use crate::daemon::pod::blocking;
use crate::daemon::proto::TaskId;
use crate::daemon::sandbox::{Answer, Exit, Figure, KILLED, Of, OwnEnd, Plan, Sandbox};
use crate::daemon::stdio::Names;
use crate::daemon::storage::{Storage, StorageError};
use crate::daemon::streaming::Streams;
use crate::daemon::task::read_spec;
use crate::image::open_in_image;
use crate::timeouts;

/// How long programs have to end once they are killed.
const END_TIME: Duration = Duration::from_secs(5);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What blocking calls need.
#[derive(Debug)]
struct Running {
    engine: Engine,
    pod: engine::Pod,
    dir: PathBuf,
    /// `None`: taken down.
    storage: Mutex<Option<Storage>>,
    /// Where its threads are counted, and held to the pod's share of CPU.
    threads: Mutex<Option<Threads>>,
}

/// A running pod.
#[derive(Debug)]
pub struct WasmSandbox {
    id: String,
    namespace: String,
    events: Events,
    streams: Arc<Streams>,
    running: Arc<Running>,
    programs: Mutex<HashMap<String, engine::Container>>,
}

/// A container's program.
#[derive(Debug)]
pub struct WasmProcess {
    program: engine::Container,
    held: tokio::sync::Mutex<Held>,
    /// It ended without ever having run.
    discarded: Notify,
}

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

fn has_ended() -> Status {
    Status::new(Code::FailedPrecondition, "the sandbox has ended")
}

fn precondition(error: impl ToString) -> Status {
    Status::new(Code::FailedPrecondition, error.to_string())
}

impl WasmSandbox {
    /// Ready for containers.
    pub(super) fn new(
        engine: Engine,
        pod: engine::Pod,
        storage: Storage,
        threads: Option<Threads>,
        plan: Plan,
    ) -> Self {
        Self {
            id: plan.id,
            namespace: plan.namespace,
            events: plan.events,
            streams: plan.streams,
            running: Arc::new(Running {
                engine,
                pod,
                dir: plan.dir,
                storage: Mutex::new(Some(storage)),
                threads: Mutex::new(threads),
            }),
            programs: Mutex::default(),
        }
    }

    fn program(&self, container: &str) -> Answer<engine::Container> {
        lock(&self.programs).get(container).cloned().ok_or_else(|| {
            Status::new(Code::NotFound, format!("there is no container {container}"))
        })
    }
}

impl Sandbox for WasmSandbox {
    type Process = WasmProcess;

    async fn ended(&self) -> OwnEnd {
        // There is nothing that could end but its programs.
        std::future::pending().await
    }

    /// First in peace, then by force.
    async fn shut_down(&self, grace: Duration) {
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
                    if program.status() != engine::Status::Created {
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

    fn take_down(&self) {
        lock(&self.programs).clear();
        // Mounts go with it.
        *lock(&self.running.storage) = None;
        self.running.pod.close();
        let threads = lock(&self.running.threads).take();
        // Waits for them.
        drop(threads);
    }

    fn info(&self) -> Option<String> {
        None
    }

    fn figures(&self) -> Vec<Figure> {
        let used = lock(&self.running.threads)
            .as_ref()
            .and_then(Threads::usage);
        let help = "CPU time of a wasm pod's threads.";
        let figure = |(mode, value): (&'static str, Duration)| Figure {
            label: Some(("mode", mode)),
            ..Figure::counter("bulkhead_wasm_cpu_seconds_total", help, value.as_secs_f64())
        };
        used.map(|used| [("user", used.user), ("system", used.system)].map(figure))
            .map(Vec::from)
            .unwrap_or_default()
    }

    async fn create(&self, request: &CreateTaskRequest) -> Answer<(WasmProcess, u32)> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let stdio::Connected {
            stdin,
            stdout,
            stderr,
            held,
        } = stdio::connect(&names, &self.streams)?;
        let running = Arc::clone(&self.running);
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let rootfs = request.rootfs.clone();
        let program = blocking(move || {
            let mut config = prepare(&running, &id, Path::new(&bundle), &rootfs)?;
            config.stdin = stdin;
            config.stdout = stdout;
            config.stderr = stderr;
            running.pod.create(config).map_err(|e| engine_failed(&e))
        })
        .await??;
        lock(&self.programs).insert(request.id.clone(), program.clone());
        let process = WasmProcess {
            program,
            held: tokio::sync::Mutex::new(held),
            discarded: Notify::new(),
        };
        Ok((process, std::process::id()))
    }

    fn discard(&self, container: &str) {
        lock(&self.programs).remove(container);
        if let Some(storage) = lock(&self.running.storage).as_mut() {
            storage.remove(container);
        }
    }

    async fn exec(&self, _: &ExecProcessRequest) -> Answer<WasmProcess> {
        Err(no_exec())
    }

    async fn start(&self, process: &WasmProcess, _: &Of) -> Answer<u32> {
        let program = process.program.clone();
        // It may have to make a thread.
        let started = blocking(move || program.start()).await?;
        started.map_err(precondition)?;
        Ok(std::process::id())
    }

    async fn wait(&self, process: &WasmProcess, of: &Of) -> Option<Exit> {
        let exit = tokio::select! {
            exit = process.program.ended() => exit,
            () = process.discarded.notified() => {
                return Some(Exit { status: KILLED, at: now() });
            }
        };
        if exit.reason == Reason::OutOfMemory {
            let event = Event::Oom(TaskId {
                container_id: of.container.clone(),
            });
            self.events.send(&self.namespace, event);
        }
        let words = exit.message.as_deref().and_then(|m| m.lines().next());
        let words = words.map(|line| format!("wasm: {line}"));
        let mut held = process.held.lock().await;
        held.finish(words.as_deref(), timeouts::drain()).await;
        drop(held);
        Some(Exit {
            status: exit.code.into(),
            at: now(),
        })
    }

    async fn delete(&self, process: &WasmProcess, _: &Of) -> Answer<()> {
        // One that runs is ended: containerd asks for that by a Kill before, but not always.
        let _ = process.program.signal(libc::SIGKILL);
        if process.program.status() == engine::Status::Created {
            process.discarded.notify_one();
        }
        Ok(())
    }

    async fn kill(&self, process: &WasmProcess, request: &KillRequest) -> Answer<()> {
        let signal = i32::try_from(request.signal).map_err(|_| {
            Status::new(
                Code::InvalidArgument,
                format!("there is no signal {}", request.signal),
            )
        })?;
        if process.program.status() == engine::Status::Created && signal == libc::SIGKILL {
            // As runc does: what never started ends.
            process.discarded.notify_one();
            return Ok(());
        }
        process.program.signal(signal).map_err(precondition)
    }

    async fn resize(&self, _: &WasmProcess, _: &ResizePtyRequest) -> Answer<()> {
        // There is no terminal whose size could change; clients ask all the same.
        Ok(())
    }

    async fn close_stdin(&self, process: &WasmProcess) {
        process.held.lock().await.close_stdin();
    }

    async fn pids(&self, _: &str) -> Answer<PidsResponse> {
        // It has threads of ours, no process of its own.
        Ok(PidsResponse {
            processes: Vec::new(),
        })
    }

    async fn pause(&self, container: &str) -> Answer<()> {
        self.program(container)?.pause().map_err(precondition)
    }

    async fn resume(&self, container: &str) -> Answer<()> {
        self.program(container)?.resume().map_err(precondition)
    }

    async fn update(&self, _: UpdateTaskRequest) -> Answer<()> {
        Err(Status::new(
            Code::Unimplemented,
            "the limits of a running wasm program cannot be changed: start it anew",
        ))
    }

    async fn stats(&self, container: &str) -> Answer<Metrics> {
        Ok(metrics(&self.program(container)?.stats()))
    }
}

/// Blocking part: files and program.
fn prepare(
    running: &Running,
    id: &str,
    bundle: &Path,
    rootfs: &[Mount],
) -> Answer<ContainerConfig> {
    let wish = spec::read(&read_spec(bundle)?)?;
    let path = match lock(&running.storage).as_mut() {
        Some(storage) => storage
            .add_root(id, rootfs)
            .map_err(|e| storage_failed(&e))?,
        None => return Err(has_ended()),
    };
    // The storage speaks of the guest's paths, of which there are none here.
    let number = PathBuf::from(path);
    let number = number.file_name().map(Path::new).unwrap_or(&number);
    let host = running.dir.join("rootfs").join(number);
    root::complete(&host, &wish.binds, wish.read_only)?;
    let program = load(&running.engine, &host, &wish)?;
    let mut config = ContainerConfig::new(id, program);
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
    config.function = function;
    config.args = args;
    config.env = env;
    config.cwd = Some(cwd);
    config.user = user;
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
    Ok(config)
}

/// Finds the program as the container would see it.
fn load(engine: &Engine, root: &Path, wish: &Wish) -> Answer<Program> {
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
    engine.load(source).map_err(|e| match e {
        WasmError::Invalid { .. } => refused(format!(
            "{e}; ordinary programs are not run in a wasm pod: give the pod another runtime class"
        )),
        e => refused(e.to_string()),
    })
}

/// What a program uses, in the form of a cgroup's statistics.
fn metrics(stats: &engine::Stats) -> Metrics {
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
