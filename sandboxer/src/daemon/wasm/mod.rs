//! Pods of wasm programs: containerd's sandbox plugin a second time, on a socket of its own, for
//! the runtime `bulkhead-wasm`. The programs run on threads of this process, in `bulkhead-wasm`'s
//! engine; see `docs/wasm.md`.

mod artifact;
mod ordinary;
mod root;
mod sandbox;
pub(super) mod spec;
mod stdio;

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_wasm::{
    Allocation, CacheConfig, CompilerConfig, Engine, EngineConfig, Network, PodConfig, Resolver,
    ThreadHook,
};

use super::agent::setup::{USUAL_SYSCTLS, sysctls};
use super::cgroup::{CpuShare, Threads, clean_threads};
use super::config::Config;
use super::pod::blocking;
use super::process::{Processes, check_sysctls, sysctl_path};
use super::proto::{NODE, PodSandboxConfig};
use super::sandbox::{Answer, Kind, Plan};
use super::state::State;
use super::storage::Storage;
use super::vm::resources;
use ordinary::Ordinary;
use sandbox::Running;
pub use sandbox::WasmSandbox;

/// Pods of one daemon.
const MAX_PODS: usize = 16_384;
/// Largest resolv.conf of a host that is read.
const MAX_RESOLV: u64 = 64 << 10;

/// Pods of wasm programs.
#[derive(Debug)]
pub struct Wasm {
    config: Arc<Config>,
    /// Made when first needed: it reserves a lot of address space.
    engine: Arc<OnceLock<Engine>>,
    /// For what is no wasm program in its pods.
    processes: Processes,
}

impl Wasm {
    /// Without an engine yet. `processes` makes the ordinary containers of its pods.
    pub fn new(config: Arc<Config>, processes: Processes) -> Self {
        Self {
            config,
            engine: Arc::default(),
            processes,
        }
    }
}

impl Kind for Wasm {
    type Sandbox = WasmSandbox;

    fn name(&self) -> &'static str {
        "bulkhead-wasm"
    }

    fn directory(&self) -> PathBuf {
        self.config.run_dir.join("wasm")
    }

    fn max_pods(&self) -> usize {
        MAX_PODS
    }

    fn check(&self, wish: &PodSandboxConfig) -> Result<(), String> {
        check_sysctls(wish)
    }

    async fn start(&self, plan: Plan) -> Answer<WasmSandbox> {
        let (config, engine) = (Arc::clone(&self.config), Arc::clone(&self.engine));
        let ordinary = Ordinary::new(self.processes.clone(), plan.clone());
        blocking(move || build(&config, &engine, ordinary, plan)).await?
    }

    fn clean(&self, state: &State) {
        // Its network namespace was only looked at, its programs have ended with their process.
        clean_threads(&state.id);
        self.processes.clean(state);
    }
}

/// The engine of this daemon. Blocks while it is made.
fn engine(config: &Config, kept: &OnceLock<Engine>) -> Answer<Engine> {
    if let Some(engine) = kept.get() {
        return Ok(engine.clone());
    }
    let wish = &config.wasm;
    // Too little address space, or the cache's directory is not ours.
    let made = Engine::new(&EngineConfig {
        allocation: Allocation::Pooling {
            instances: wish.max_instances,
        },
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
    })
    .map_err(|e| Status::new(Code::Internal, format!("wasm engine: {e}")))?;
    Ok(kept.get_or_init(|| made).clone())
}

fn build(
    config: &Config,
    kept: &OnceLock<Engine>,
    ordinary: Ordinary,
    plan: Plan,
) -> Answer<WasmSandbox> {
    let internal = |e: String| Status::new(Code::Internal, e);
    let engine = engine(config, kept)?;
    let storage = Storage::create(&plan.dir).map_err(|e| internal(e.to_string()))?;
    let network = match plan.netns.as_str() {
        "" if wants_host_network(&plan.wish) => Network::Host,
        "" => Network::None,
        path => {
            let file =
                File::open(path).map_err(|e| internal(format!("network namespace {path}: {e}")))?;
            let file = set_network_sysctls(file, Arc::clone(&plan.wish)).map_err(internal)?;
            Network::Namespace(file.into())
        }
    };
    let limit = plan.wish.linux.as_ref().and_then(|l| l.resources);
    let threads = Threads::create(&plan.id);
    if let Some(threads) = &threads
        && let Err(error) = threads.limit(CpuShare::of(&resources(&plan.wish)))
    {
        tracing::warn!(sandbox = plan.id, %error, "the pod's share of CPU is not set");
    }
    let thread_hook = threads
        .as_ref()
        .map(|threads| -> ThreadHook { Arc::new(threads.entrance()) });
    let pod = bulkhead_wasm::Pod::new(
        &engine,
        PodConfig {
            id: plan.id.clone(),
            network,
            resolver: Resolver::parse(&resolv_conf(&plan.wish), "127.0.0.1 localhost\n"),
            memory_bytes: limit
                .and_then(|l| u64::try_from(l.memory_limit_in_bytes).ok())
                .filter(|bytes| *bytes > 0),
            thread_hook,
            harden: true,
            ..PodConfig::default()
        },
    );
    let running = Running {
        engine,
        pod,
        dir: plan.dir.clone(),
        namespace: plan.namespace.clone(),
        containerd: config.containerd_ttrpc.clone(),
        max_module_bytes: config.wasm.max_module_mib.saturating_mul(1 << 20),
        storage: Mutex::new(Some(storage)),
        threads: Mutex::new(threads),
    };
    Ok(WasmSandbox::new(running, ordinary, plan))
}

/// Sets those of the pod's sysctls that belong to a network namespace, in this one. Others are for
/// ordinary containers: a wasm program has nothing they are about.
fn set_network_sysctls(namespace: File, wish: Arc<PodSandboxConfig>) -> Result<File, String> {
    use nix::sched::{CloneFlags, setns};
    // On a thread that ends with it: what `/proc/sys/net` shows is the namespace of who opens it.
    let work = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("entering the pod's network namespace: {e}"))?;
        for (name, value) in sysctls(USUAL_SYSCTLS, &wish) {
            let path = sysctl_path(&name);
            if !path.starts_with("net/") {
                continue;
            }
            let written = std::fs::write(PathBuf::from("/proc/sys").join(&path), &value);
            let asked_for = wish
                .linux
                .as_ref()
                .is_some_and(|l| l.sysctls.contains_key(&name));
            match written {
                Err(e) if asked_for => return Err(format!("sysctl {name} = {value:?}: {e}")),
                Err(error) => tracing::debug!(%error, name, "a usual sysctl is not set"),
                Ok(()) => {}
            }
        }
        Ok(namespace)
    };
    let thread = std::thread::Builder::new().name("wasm-sysctl".into());
    let thread = thread.spawn(work).map_err(|e| format!("a thread: {e}"))?;
    thread
        .join()
        .map_err(|_| "setting sysctls failed".to_owned())?
}

fn wants_host_network(wish: &PodSandboxConfig) -> bool {
    wish.linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.as_ref())
        .is_some_and(|options| options.network == NODE)
}

/// Without a wish: the host's own, as other runtimes do.
fn resolv_conf(wish: &PodSandboxConfig) -> String {
    use std::io::Read;
    let wish = wish.dns_config.as_ref();
    if let Some(dns) = wish.filter(|d| !d.servers.is_empty()) {
        let mut text = String::new();
        for server in &dns.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !dns.searches.is_empty() {
            text.push_str(&format!("search {}\n", dns.searches.join(" ")));
        }
        if !dns.options.is_empty() {
            text.push_str(&format!("options {}\n", dns.options.join(" ")));
        }
        return text;
    }
    let mut text = String::new();
    let read = File::open("/etc/resolv.conf").map(|f| f.take(MAX_RESOLV).read_to_string(&mut text));
    match read {
        Ok(Ok(_)) => text,
        _ => String::new(),
    }
}
