//! Pods of wasm programs: containerd's sandbox plugin a second time, on a socket of its own, for
//! the runtime `bulkhead-wasm`. The programs run in `bulkhead-wasm`'s engine; see `docs/wasm.md`.
//!
//! Where they run ([`place`]) is `wasm.isolation`: on [`threads`] of the daemon, or in a [`jailed`]
//! process for each pod. The second one's own module is the only one that a pod's keeper has, which
//! is therefore a program without the engine.

mod artifact;
pub mod jailed;
mod ordinary;
mod place;
mod root;
mod sandbox;
pub(super) mod spec;
mod stdio;
mod threads;

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_wasm::WasmError;

use super::agent::setup::{USUAL_SYSCTLS, sysctls};
use super::config::Config;
use super::pod::blocking;
use super::process::{Processes, check_sysctls, sysctl_path};
use super::proto::{NODE, PodSandboxConfig};
use super::sandbox::{Answer, Kind, Plan};
use super::state::State;
use super::storage::Storage;
use ordinary::Ordinary;
use place::{Net, Place, PodWish, Programs};
use sandbox::Running;
pub use sandbox::WasmSandbox;
pub use threads::OnThreads;

/// Pods of one daemon.
const MAX_PODS: usize = 16_384;
/// Largest resolv.conf of a host that is read.
const MAX_RESOLV: u64 = 64 << 10;

/// Pods of wasm programs.
#[derive(Debug)]
pub struct Wasm<P> {
    config: Arc<Config>,
    place: Arc<P>,
    /// For what is no wasm program in its pods.
    processes: Processes,
}

impl<P: Place> Wasm<P> {
    /// `place` is where programs run, `processes` makes the ordinary containers of its pods.
    pub fn new(config: Arc<Config>, place: P, processes: Processes) -> Self {
        Self {
            config,
            place: Arc::new(place),
            processes,
        }
    }
}

impl<P: Place> Kind for Wasm<P> {
    type Sandbox = WasmSandbox<P::Programs>;

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

    async fn start(&self, plan: Plan) -> Answer<Self::Sandbox> {
        let (config, place) = (Arc::clone(&self.config), Arc::clone(&self.place));
        let ordinary = Ordinary::new(self.processes.clone(), plan.clone());
        blocking(move || build(&config, &*place, ordinary, plan)).await?
    }

    fn clean(&self, state: &State) {
        self.place.clean(state);
        // Of whose keeper has died: the daemon itself, with pods on threads, cleans up after it.
        jailed::remove_cgroup(state);
        self.processes.clean(state);
    }
}

fn build<P: Place>(
    config: &Config,
    place: &P,
    ordinary: Ordinary,
    plan: Plan,
) -> Answer<WasmSandbox<P::Programs>> {
    let internal = |e: String| Status::new(Code::Internal, e);
    let storage = Storage::create(&plan.dir).map_err(|e| internal(e.to_string()))?;
    let net = match plan.netns.as_str() {
        "" if wants_host_network(&plan.wish) => Net::Host,
        "" => Net::None,
        path => {
            let file =
                File::open(path).map_err(|e| internal(format!("network namespace {path}: {e}")))?;
            let file = set_network_sysctls(file, Arc::clone(&plan.wish)).map_err(internal)?;
            Net::Namespace(file)
        }
    };
    let limit = plan.wish.linux.as_ref().and_then(|l| l.resources);
    let wish = PodWish {
        net,
        resolv: resolv_conf(&plan.wish),
        memory_bytes: limit
            .and_then(|l| u64::try_from(l.memory_limit_in_bytes).ok())
            .filter(|bytes| *bytes > 0),
    };
    let programs = place.open(config, &plan, wish)?;
    // In a runtime's context, as all that blocks is.
    if let Err(error) = programs.watch() {
        programs.take_down(Vec::new());
        return Err(internal(format!("sandbox {}: {error}", plan.id)));
    }
    let running = Running {
        place: programs,
        dir: plan.dir.clone(),
        namespace: plan.namespace.clone(),
        containerd: config.containerd_ttrpc.clone(),
        max_module_bytes: config.wasm.max_module_mib.saturating_mul(1 << 20),
        storage: Mutex::new(Some(storage)),
    };
    Ok(WasmSandbox::new(running, ordinary, plan))
}

/// The caller's fault.
fn is_invalid(error: &WasmError) -> bool {
    matches!(
        error,
        WasmError::Invalid { .. }
            | WasmError::Unsupported { .. }
            | WasmError::NoFunction { .. }
            | WasmError::Mount { .. }
    )
}

fn engine_failed(error: &WasmError) -> Status {
    let code = match is_invalid(error) {
        true => Code::InvalidArgument,
        false => Code::Internal,
    };
    Status::new(code, error.to_string())
}

fn precondition(error: impl ToString) -> Status {
    Status::new(Code::FailedPrecondition, error.to_string())
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
