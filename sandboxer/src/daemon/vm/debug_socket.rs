//! Pods for `vmmctl ps`, `inspect`, `stats`, `console`, `dump` and `stop`: a run directory and a
//! debug socket per VM, as `vmmctl run` makes them, for root only.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::task::AbortHandle;

use super::machine::Machine;
use crate::daemon::sandbox::Stop;
use crate::debug;
use crate::engine::microvm::MicroVm;
use crate::engine::stdio::watch;
use crate::rundir::{RunDir, State, process_start};

/// A VM's entry. Dropping it removes it.
#[derive(Debug)]
pub struct DebugSocket {
    /// `None`: the VM's own process serves it.
    task: Option<AbortHandle>,
    dir: RunDir,
}

impl Drop for DebugSocket {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// What `vmmctl ps` shows of a pod.
#[derive(Debug, Clone)]
pub struct About {
    /// The pod's id.
    pub id: String,
    /// What its VM runs.
    pub kind: &'static str,
    /// Its namespace and name.
    pub pod: String,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u64,
}

impl DebugSocket {
    /// Makes the entry and serves it. Needs a tokio runtime.
    ///
    /// # Errors
    /// The directory or socket cannot be made.
    pub fn start(root: &Path, about: About, stop_pod: Stop, vm: &Machine) -> io::Result<Self> {
        let mut dir = RunDir::create(
            root,
            State {
                version: 0,
                id: String::new(),
                // As crictl shortens ids.
                name: about.id.chars().take(13).collect(),
                alias: about.id,
                kind: about.kind.into(),
                mode: "pod".into(),
                image: about.pod,
                command: Vec::new(),
                state: "running".into(),
                pid: 0,
                pid_start: 0,
                created_ms: 0,
                cpus: about.cpus,
                memory_mib: about.memory_mib,
                ..State::default()
            },
        )
        .map_err(io::Error::other)?;
        let listener = debug::bind(&dir.path().join("debug.sock"))?;
        let vm = match vm {
            Machine::Thread(vm) => vm,
            Machine::Worker(worker) => {
                worker.serve_debug(&listener)?;
                let pid = worker.jailed().pid();
                dir.update(|state| {
                    state.pid = pid;
                    state.pid_start = process_start(pid).unwrap_or(0);
                })
                .map_err(io::Error::other)?;
                return Ok(Self { task: None, dir });
            }
        };
        let listener = UnixListener::from_std(listener)?;
        let stop = vm.stop_event().as_fd().try_clone_to_owned()?;
        let stop = watch(stop, Interest::READABLE)?;
        let served = serve(listener, stop, stop_pod, Arc::downgrade(vm));
        Ok(Self {
            task: Some(tokio::spawn(served).abort_handle()),
            dir,
        })
    }

    /// Lets `vmmctl exec` know a container, or forget it when there is no bundle. Blocks.
    pub fn set_container(&mut self, id: &str, bundle: Option<PathBuf>) {
        let changed = self.dir.update(|state| match bundle {
            Some(bundle) => drop(state.containers.insert(id.to_owned(), bundle)),
            None => drop(state.containers.remove(id)),
        });
        if let Err(error) = changed {
            tracing::warn!(container = id, %error, "vmmctl will not know it");
        }
    }
}

async fn serve(
    listener: UnixListener,
    stop: AsyncFd<std::os::fd::OwnedFd>,
    stop_pod: Stop,
    vm: Weak<MicroVm>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Some(vm) = vm.upgrade() else { return };
                if let Ok(stream) = accepted.and_then(|(stream, _)| stream.into_std()) {
                    debug::serve_connection(stream, vm);
                }
            }
            ready = stop.readable() => {
                let (Ok(mut ready), Some(vm)) = (ready, vm.upgrade()) else {
                    return;
                };
                ready.clear_ready();
                if let Some(grace) = vm.take_stop() {
                    drop(vm);
                    stop_pod.0(grace);
                }
            }
        }
    }
}
