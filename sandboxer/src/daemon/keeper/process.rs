//! A keeper: the daemon's code for one pod.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::server::{CallFuture, Dispatch};
use nix::sched::{CloneFlags, setns};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::{Kept, LIFE, LOCK, READY, SOCKET};
use crate::daemon::config::{Config, Isolation};
use crate::daemon::controller::Controller;
use crate::daemon::events::Events;
use crate::daemon::grpc::Call;
use crate::daemon::process::Processes;
use crate::daemon::program;
use crate::daemon::proto::CONTROLLER;
use crate::daemon::sandbox::Kind;
use crate::daemon::state::State;
use crate::daemon::task::check_id;
use crate::daemon::vm::{Guests, Vms};
use crate::daemon::wasm::Wasm;
use crate::daemon::wasm::jailed::InProcess;
use crate::daemon::{bind_private, start_logging, ttrpc};
use crate::engine::microvm::share::enter_private_mounts;
use crate::fsutil;

/// Where keepers are, of all pods: outside of the daemon's cgroup, which systemd empties when it
/// restarts the daemon, and outside of the pods' own, whose memory they are not.
const CGROUP: &str = "/sys/fs/cgroup/bulkhead-keepers";
/// How long a keeper without a pod waits for somebody to want one.
const LONELY: Duration = Duration::from_secs(60);
/// How long a keeper that ends waits for what it has begun.
const LAST: Duration = Duration::from_secs(10);

/// What a keeper is told by its arguments.
#[derive(Debug, PartialEq, Eq)]
pub struct About {
    /// What it is a pod of.
    pub kept: Kept,
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// The daemon's configuration file, if it has one.
    pub config: Option<PathBuf>,
}

impl About {
    /// As arguments.
    pub fn arguments(&self) -> Vec<std::ffi::OsString> {
        let mut all: Vec<std::ffi::OsString> = vec![
            super::ARGUMENT.into(),
            self.kept.shown().into(),
            self.namespace.clone().into(),
            self.id.clone().into(),
        ];
        all.extend(self.config.iter().map(|c| c.clone().into_os_string()));
        all
    }

    fn parse(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> Option<Self> {
        let mut text = || arguments.next()?.into_string().ok();
        let shown = text()?;
        Some(Self {
            kept: Kept::ALL.into_iter().find(|k| k.shown() == shown)?,
            namespace: text()?,
            id: text()?,
            config: arguments.next().map(PathBuf::from),
        })
    }
}

/// Runs a keeper. The host's mount namespace is standard input, if the daemon has left it.
pub fn main() -> ExitCode {
    let result = match About::parse(std::env::args_os().skip(2)) {
        Some(about) => run(&about),
        None => Err(io::Error::other("not for people: sandboxer starts it")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            eprintln!("error: keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(about: &About) -> io::Result<()> {
    let mut config = Config::load(about.config.as_deref()).map_err(io::Error::other)?;
    // The file may have changed since the daemon read it.
    match about.kept {
        Kept::Vm(Guests::Linux) => config.microvm.isolation = Isolation::Process,
        Kept::Vm(Guests::App) => config.app.isolation = Isolation::Process,
        Kept::Wasm => program::open_whole()?,
    }
    start_logging(&config);
    check_id("sandbox", &about.id).map_err(|e| io::Error::other(e.message))?;
    // Best effort: on a host without cgroups v2 the worker says what is missing.
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let _ = std::fs::create_dir(CGROUP);
        let _ = std::fs::write(Path::new(CGROUP).join("cgroup.procs"), "0");
    }
    let mounts = own_mounts()?;
    let config = Arc::new(config);
    match about.kept {
        Kept::Vm(guests) => keep(about, &config, Vms::new(Arc::clone(&config), guests)),
        Kept::Wasm => {
            let processes = Processes::new(Arc::clone(&config), mounts);
            let wasm = Wasm::new(Arc::clone(&config), InProcess, processes);
            keep(about, &config, wasm)
        }
    }
}

fn keep<K: Kind>(about: &About, config: &Config, kind: K) -> io::Result<()> {
    let dir = kind.directory().join(&about.id);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)?;
    let _lock = fsutil::lock(&dir.join(LOCK), false)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(about, config, kind, &dir));
    // A pod may be in the making, for a daemon that has died meanwhile.
    runtime.shutdown_timeout(LAST);
    // Of a pod that was never started; one that was removed has taken it along.
    if let Ok(controller) = &served
        && State::read(&dir).is_ok_and(|state| state.started.is_none())
    {
        controller.adopt(dir.clone());
    }
    let _ = fsutil::remove_dir(&dir);
    served.map(drop)
}

/// What it mounts is gone with it, and of the daemon's mounts it holds none. Gives the host's mount
/// namespace, if we have left it.
fn own_mounts() -> io::Result<Option<File>> {
    // SAFETY: standard input is nobody else's in this process.
    let given = unsafe { OwnedFd::from_raw_fd(0) };
    let host = File::from(given);
    // Anything else than a namespace (/dev/null) is refused: then the daemon has not left it.
    if setns(host.as_fd(), CloneFlags::CLONE_NEWNS).is_err() {
        return Ok(None);
    }
    match enter_private_mounts() {
        true => Ok(Some(host)),
        false => Err(io::Error::last_os_error()),
    }
}

async fn serve<K: Kind>(
    about: &About,
    config: &Config,
    kind: K,
    dir: &Path,
) -> io::Result<Arc<Controller<K>>> {
    let events = Events::start(config.containerd_ttrpc.clone());
    let controller = Controller::empty(kind, events);
    let listener: UnixListener = bind_private(&dir.join(SOCKET))?;
    {
        // The daemon reads this line and closes the pipe.
        let mut out = io::stdout();
        writeln!(out, "{READY}")?;
        out.flush()?;
    }
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let front = Arc::new(Front {
                    controller: Arc::clone(&controller),
                    namespace: about.namespace.clone(),
                });
                connections.spawn(async move {
                    let _ = ttrpc::serve(stream, front, Arc::default()).await;
                });
                continue;
            }
            Some(_) = connections.join_next() => {}
            () = tokio::time::sleep(LONELY), if connections.is_empty() => {}
        }
        // The daemon has gone, or has no more to do with this pod.
        if connections.is_empty() {
            for pod in controller.all() {
                // containerd's calls have broken: nobody will start it, or learns that it has been.
                if pod.started().is_none() && pod.ended().is_none() {
                    let _ = controller.remove(&pod).await;
                }
            }
            if controller.all().is_empty() {
                return Ok(controller);
            }
        }
    }
}

/// containerd's calls, as the daemon passes them on.
struct Front<K: Kind> {
    controller: Arc<Controller<K>>,
    namespace: String,
}

impl<K: Kind> Dispatch for Front<K> {
    fn service(&self) -> &'static str {
        CONTROLLER
    }

    fn dispatch(&self, method: &str, payload: &[u8]) -> CallFuture {
        if method == LIFE {
            return Box::pin(std::future::pending());
        }
        let controller = Arc::clone(&self.controller);
        let call = Call {
            path: format!("{CONTROLLER}/{method}"),
            namespace: self.namespace.clone(),
            payload: payload.to_vec().into(),
        };
        Box::pin(async move { controller.dispatch(call).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood() {
        for config in [None, Some(PathBuf::from("/etc/x.toml"))] {
            let about = About {
                kept: Kept::Vm(Guests::App),
                namespace: "k8s.io".into(),
                id: "p".into(),
                config,
            };
            let words = about.arguments().into_iter().skip(1);
            assert_eq!(About::parse(words), Some(about));
        }
        assert_eq!(About::parse(["linux".into()].into_iter()), None);
    }
}
