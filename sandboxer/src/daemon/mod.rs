//! The node daemon: containerd's sandbox plugin.
//!
//! One process serves all pods. containerd asks it for sandboxes by gRPC ([`controller`]) and for
//! containers by ttrpc, on a socket per pod ([`ttrpc`], [`task`]); see `docs/cri.md`.

pub mod agent;
pub mod cgroup;
pub mod config;
pub mod container;
pub mod controller;
pub mod events;
pub mod fuzz;
pub mod grpc;
pub mod keeper;
pub mod metrics;
pub mod pod;
pub mod process;
pub mod program;
pub mod proto;
pub mod sandbox;
pub mod shim;
pub mod state;
pub mod stdio;
pub mod storage;
pub mod streaming;
pub mod task;
pub mod ttrpc;
pub mod vm;
pub mod wasm;
pub mod worker;

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::engine::microvm::share::enter_private_mounts;
use crate::fsutil;
use config::Config;
use controller::{Controller, Endpoint};
use events::Events;
use keeper::{Keepers, Kept, KeptEndpoint};
use process::Processes;
use sandbox::Kind;
use vm::{Guests, Vms};
use wasm::{OnThreads, Wasm};

/// Open files the daemon wants to be able to have.
const NOFILE: u64 = 1 << 20;

/// Bulkhead's node daemon: runs containerd's pods in sandboxes.
#[derive(Debug, Parser)]
#[command(name = "sandboxer", version)]
struct Args {
    /// Configuration file.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("another sandboxer runs with {}; stop it first", .0.display())]
    Running(PathBuf),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DaemonError {
    let what = what.into();
    move |source| DaemonError::Io { what, source }
}

/// Runs the daemon.
pub fn main() -> ExitCode {
    // Before anything else is done that a jail would have to undo.
    if let Some(code) = bulkhead_wasm::compiler_main() {
        return code;
    }
    if let Some(code) = wasm::jailed::main().or_else(program::main) {
        return code;
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), DaemonError> {
    let config = Config::load(args.config.as_deref())?;
    if args.check {
        return Ok(());
    }
    start_logging(&config);
    program::open();
    private_dir(&config.run_dir)?;
    let lock_file = config.run_dir.join("sandboxer.lock");
    let _lock = fsutil::lock(&lock_file, false).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => DaemonError::Running(config.run_dir.clone()),
        _ => io_error(lock_file.display().to_string())(e),
    })?;
    raise_nofile();
    // Before any thread: mounts of ours must not outlive us, and those of the host must reach us.
    let mut host_mounts = None;
    if !root_is_shared() {
        tracing::warn!(
            "the root mount is not shared: volumes that are mounted later would not be seen in a \
             namespace of our own, so our mounts are made in the host's"
        );
    } else {
        let own = File::open("/proc/self/ns/mnt").map_err(io_error("/proc/self/ns/mnt"))?;
        if !enter_private_mounts() {
            return Err(io_error("mount namespace of our own (are you root?)")(
                io::Error::last_os_error(),
            ));
        }
        host_mounts = Some(own);
    }
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()
        .map_err(io_error("starting the runtime"))?;
    // Keepers of pods are started somewhere else.
    let file = args.config.as_deref().map(std::path::absolute).transpose();
    let file = file.map_err(io_error("the configuration's path"))?;
    let result = runtime.block_on(serve(Arc::new(config), file, host_mounts));
    // Threads that still wait for a guest are not waited for.
    runtime.shutdown_background();
    result
}

fn start_logging(config: &Config) {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log.level.clone());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
}

fn private_dir(path: &Path) -> Result<(), DaemonError> {
    std::fs::create_dir_all(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)))
        .map_err(io_error(path.display().to_string()))
}

fn raise_nofile() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    let wanted = NOFILE.max(soft);
    // Root may raise the hard limit; others get what there is.
    let got = [(wanted, wanted.max(hard)), (hard, hard)]
        .into_iter()
        .find(|(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard).is_ok());
    if let Some((soft, _)) = got
        && soft < NOFILE
    {
        tracing::warn!(
            limit = soft,
            "few open files are allowed; set LimitNOFILE=1048576"
        );
    }
}

/// Whether mounts of the host reach other namespaces: `shared:` in the line of `/`.
fn root_is_shared() -> bool {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/"))
        .is_some_and(|line| line.contains(" shared:"))
}

/// `file`: where the configuration comes from; `host_mounts`: the host's mount namespace, if we have
/// left it.
async fn serve(
    config: Arc<Config>,
    file: Option<PathBuf>,
    host_mounts: Option<File>,
) -> Result<(), DaemonError> {
    let events = Events::start(config.containerd_ttrpc.clone());
    // VMs of an earlier process went with it.
    crate::rundir::clean_stale(&config.run_dir);
    let keeping = Keeping {
        config: Arc::clone(&config),
        file,
        events: events.clone(),
        mounts: host_mounts.as_ref(),
    };
    let vms = |guests| (Kept::Vm(guests), Vms::new(Arc::clone(&config), guests));
    let microvms = keeping.of(vms(Guests::Linux)).await?;
    let app_pods = keeping.of(vms(Guests::App)).await?;
    let own_mounts = host_mounts.as_ref().map(File::try_clone).transpose();
    let own_mounts = own_mounts.map_err(io_error("the host's mount namespace"))?;
    let processes = Processes::new(Arc::clone(&config), own_mounts);
    let wasm = Wasm::new(Arc::clone(&config), OnThreads::default(), processes.clone());
    let wasm_pods = keeping.of((Kept::Wasm, wasm)).await?;
    drop(keeping);
    drop(host_mounts);
    let process_pods = Controller::new(processes, events);
    // All sockets are there before any of them is served.
    let listeners = (
        bind(&config.socket)?,
        bind(&config.app.socket)?,
        bind(&config.wasm.socket)?,
        bind(&config.process.socket)?,
    );
    if let Ok(Some(listen)) = config.metrics.parse() {
        let all: [Arc<dyn metrics::Source>; 4] = [
            microvms.clone(),
            app_pods.clone(),
            wasm_pods.clone(),
            process_pods.clone(),
        ];
        metrics::serve(&listen, Arc::new(all))
            .await
            .map_err(io_error(format!(
                "metrics.listen {}",
                config.metrics.listen
            )))?;
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("signals"))?;
    let mut serving = JoinSet::new();
    serving.spawn(accept(listeners.0, KeptEndpoint(Arc::clone(&microvms))));
    serving.spawn(accept(listeners.1, KeptEndpoint(Arc::clone(&app_pods))));
    serving.spawn(accept(listeners.2, KeptEndpoint(Arc::clone(&wasm_pods))));
    serving.spawn(accept(listeners.3, Endpoint(Arc::clone(&process_pods))));
    start_watchdog();
    notify("READY=1");
    tracing::info!(socket = %config.socket.display(), "ready");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify("STOPPING=1");
    serving.shutdown().await;
    tokio::join!(
        microvms.end_all(),
        app_pods.end_all(),
        wasm_pods.end_all(),
        process_pods.end_all()
    );
    tracing::info!("ended");
    Ok(())
}

/// What pods with keepers have in common.
struct Keeping<'a> {
    config: Arc<Config>,
    /// Where the configuration comes from.
    file: Option<PathBuf>,
    events: Events,
    /// The host's mount namespace, if we have left it.
    mounts: Option<&'a File>,
}

impl Keeping<'_> {
    async fn of<K: Kind>(&self, (kept, kind): (Kept, K)) -> Result<Arc<Keepers<K>>, DaemonError> {
        let mounts = self.mounts.map(File::try_clone).transpose();
        let mounts = mounts.map_err(io_error("the host's mount namespace"))?;
        let own = Controller::empty(kind, self.events.clone());
        let (config, file) = (Arc::clone(&self.config), self.file.clone());
        Ok(Keepers::new(own, kept, config, file, mounts).await)
    }
}

/// Serves containerd's connections to a controller.
async fn accept<S: grpc::Service>(listener: UnixListener, endpoint: S) {
    let endpoint = Arc::new(endpoint);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let endpoint = Arc::clone(&endpoint);
                tokio::spawn(async move {
                    if let Err(error) = grpc::serve(stream, endpoint).await {
                        tracing::debug!(%error, "a connection of containerd broke");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A controller's socket.
fn bind(path: &Path) -> Result<UnixListener, DaemonError> {
    bind_private(path).map_err(io_error(format!("socket {}", path.display())))
}

/// A socket for root only.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // We hold the lock: whoever made it has gone.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Tells systemd that the runtime still turns, if it wants to be told.
fn start_watchdog() {
    let interval = std::env::var("WATCHDOG_USEC")
        .ok()
        .and_then(|v| v.parse().ok());
    let Some(interval) = interval.filter(|us| *us >= 1000).map(Duration::from_micros) else {
        return;
    };
    tokio::spawn(async move {
        loop {
            notify("WATCHDOG=1");
            // Twice as often as needed.
            tokio::time::sleep(interval / 2).await;
        }
    });
}

/// Tells systemd, if it started us.
fn notify(text: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    let sent = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(text.as_bytes(), &address)
            }
            None => socket.send_to(text.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd cannot be told");
    }
}
