//! Programs on threads of this process, on one engine for all pods.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_protocol::rpc::{Code, Status as RpcStatus};
use bulkhead_wasm::{
    self as engine, Allocation, CacheConfig, CompilerConfig, ContainerConfig, Engine, EngineConfig,
    Network, PodConfig, Resolver, Source, Stats, Status, Stdio, ThreadHook, User,
};

use super::place::{END_TIME, Ended, Net, Place, PodWish, Program, ProgramWish, Programs, ROOTS};
use super::{engine_failed, precondition};
use crate::daemon::cgroup::{CpuShare, Threads, Used, clean_threads};
use crate::daemon::config::{Config, Wasm as Settings};
use crate::daemon::pod::blocking;
use crate::daemon::sandbox::{Answer, OwnEnd, Plan};
use crate::daemon::state::State;
use crate::daemon::vm::resources;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads of this process.
#[derive(Debug, Default)]
pub struct OnThreads {
    /// Made when first needed: it reserves a lot of address space.
    engine: OnceLock<Engine>,
}

/// How programs are made ready, as configured.
pub(super) fn engine_config(wish: &Settings, allocation: Allocation) -> EngineConfig {
    EngineConfig {
        allocation,
        cache: Some(CacheConfig {
            directory: wish.cache_dir.clone(),
            max_bytes: wish.cache_mib.saturating_mul(1 << 20),
        }),
        max_module_bytes: wish.max_module_mib.saturating_mul(1 << 20),
        compiler: CompilerConfig {
            program: Some("/proc/self/exe".into()),
            memory_bytes: wish.compile_memory_mib.saturating_mul(1 << 20),
            inlining: wish.inlining,
        },
        ..EngineConfig::default()
    }
}

impl OnThreads {
    /// The engine of this process. Blocks while it is made.
    fn engine(&self, config: &Config) -> Answer<Engine> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine.clone());
        }
        let instances = config.wasm.max_instances;
        // Too little address space, or the cache's directory is not ours.
        let made = Engine::new(&engine_config(
            &config.wasm,
            Allocation::Pooling { instances },
        ))
        .map_err(|e| RpcStatus::new(Code::Internal, format!("wasm engine: {e}")))?;
        Ok(self.engine.get_or_init(|| made).clone())
    }
}

impl Place for OnThreads {
    type Programs = ThreadPod;

    fn open(&self, config: &Config, plan: &Plan, wish: PodWish) -> Answer<ThreadPod> {
        let engine = self.engine(config)?;
        let threads = Threads::create(&plan.id);
        if let Some(threads) = &threads
            && let Err(error) = threads.limit(CpuShare::of(&resources(&plan.wish)))
        {
            tracing::warn!(sandbox = plan.id, %error, "the pod's share of CPU is not set");
        }
        let thread_hook = threads
            .as_ref()
            .map(|threads| -> ThreadHook { Arc::new(threads.entrance()) });
        let network = match wish.net {
            Net::None => Network::None,
            Net::Host => Network::Host,
            Net::Namespace(file) => Network::Namespace(file.into()),
        };
        let mut pod = pod_config(&plan.id, network, &wish.resolv, wish.memory_bytes);
        pod.thread_hook = thread_hook;
        Ok(ThreadPod {
            pod: engine::Pod::new(&engine, pod),
            engine,
            dir: plan.dir.clone(),
            threads: Mutex::new(threads),
        })
    }

    fn clean(&self, state: &State) {
        // Its network namespace was only looked at, its programs have ended with their process.
        clean_threads(&state.id);
    }
}

/// A pod's settings, wherever it is.
pub(super) fn pod_config(
    id: &str,
    network: Network,
    resolv: &str,
    memory_bytes: Option<u64>,
) -> PodConfig {
    PodConfig {
        id: id.to_owned(),
        network,
        resolver: Resolver::parse(resolv, "127.0.0.1 localhost\n"),
        memory_bytes,
        harden: true,
        ..PodConfig::default()
    }
}

/// A container's settings; `roots` is where [`ROOTS`] is for the engine.
pub(super) fn container_config(
    program: engine::Program,
    wish: ProgramWish,
    roots: PathBuf,
    streams: [Stdio; 3],
) -> ContainerConfig {
    let mut config = ContainerConfig::new(&wish.id, program);
    config.function = wish.function;
    config.args = wish.args;
    config.env = wish.env;
    config.cwd = Some(wish.cwd);
    config.user = wish.user.map(|user| User {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
    });
    config.memory_bytes = wish.memory_bytes;
    config.cpu_milli = wish.cpu_milli;
    config.mounts = vec![engine::Mount {
        host: roots.join(wish.root),
        guest: "/".into(),
        // Mounts in it may be writable: the kernel tells them apart.
        read_only: false,
    }];
    config.http.threads = wish.cpu_milli.map_or_else(
        || std::thread::available_parallelism().map_or(1, usize::from),
        |milli| usize::try_from(milli.div_ceil(1000)).unwrap_or(1),
    );
    [config.stdin, config.stdout, config.stderr] = streams;
    config
}

impl From<engine::Exit> for Ended {
    fn from(exit: engine::Exit) -> Self {
        Self {
            code: exit.code,
            out_of_memory: exit.reason == engine::Reason::OutOfMemory,
            message: exit.message,
        }
    }
}

/// The programs of a pod.
#[derive(Debug)]
pub struct ThreadPod {
    engine: Engine,
    pod: engine::Pod,
    /// The pod's directory.
    dir: PathBuf,
    /// Where its threads are counted, and held to the pod's share of CPU.
    threads: Mutex<Option<Threads>>,
}

impl Programs for ThreadPod {
    type Code = engine::Program;
    type Program = engine::Container;

    fn find(&self, name: &str, digest: &str) -> Option<engine::Program> {
        self.engine.find(name, digest)
    }

    fn load(&self, source: Source<'_>) -> Result<engine::Program, String> {
        self.engine.load(source).map_err(|e| e.to_string())
    }

    async fn create(
        &self,
        code: engine::Program,
        wish: ProgramWish,
        streams: [Stdio; 3],
    ) -> Answer<engine::Container> {
        let config = container_config(code, wish, self.dir.join(ROOTS), streams);
        let pod = self.pod.clone();
        let made = blocking(move || pod.create(config)).await?;
        made.map_err(|e| engine_failed(&e))
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn watch(&self) -> std::io::Result<()> {
        Ok(())
    }

    async fn ended(&self) -> OwnEnd {
        // There is nothing that could end but the programs.
        std::future::pending().await
    }

    fn used(&self) -> Option<Used> {
        lock(&self.threads).as_ref().and_then(Threads::usage)
    }

    fn info(&self) -> Option<String> {
        None
    }

    fn take_down(&self, programs: Vec<engine::Container>) {
        // Where nobody has asked them to end, as when the agent has died.
        for program in &programs {
            let _ = program.signal(libc::SIGKILL);
        }
        for program in &programs {
            if program.status() != Status::Created {
                program.wait_for(END_TIME);
            }
        }
        drop(programs);
        self.pod.close();
        let threads = lock(&self.threads).take();
        // Waits for them.
        drop(threads);
    }
}

impl Program for engine::Container {
    fn status(&self) -> Status {
        Self::status(self)
    }

    async fn start(&self) -> Answer<()> {
        let program = self.clone();
        // It may have to make a thread.
        let started = blocking(move || Self::start(&program)).await?;
        started.map_err(precondition)
    }

    fn signal(&self, signal: i32) -> Answer<()> {
        Self::signal(self, signal).map_err(precondition)
    }

    async fn ended(&self) -> Ended {
        Self::ended(self).await.into()
    }

    fn set_memory_limit(&self, bytes: Option<u64>) -> Answer<()> {
        Self::set_memory_limit(self, bytes);
        Ok(())
    }

    fn set_cpu_share(&self, milli: Option<u32>) -> Answer<()> {
        Self::set_cpu_share(self, milli);
        Ok(())
    }

    async fn stats(&self) -> Answer<Stats> {
        Ok(Self::stats(self))
    }
}
