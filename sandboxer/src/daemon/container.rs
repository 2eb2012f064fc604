//! The records of a pod's containers and their processes. They outlive the sandbox, because
//! containerd asks for exit codes and deletes containers after it has ended, however that came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::types::ProcessStatus;
use tokio::sync::watch;

use super::events::now;
use super::sandbox::{Answer, Exit, KILLED, Of, Sandbox};
use super::stdio::Names;

/// What changes about a process.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessState {
    /// Its id in the sandbox; 0: not known yet.
    pub pid: u32,
    /// It was started and nobody has reported its end.
    pub running: bool,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process<S: Sandbox> {
    /// Which.
    pub of: Of,
    /// Its standard streams.
    pub names: Names,
    /// The sandbox's part; `None`: of an earlier process of ours.
    pub handle: Option<S::Process>,
    state: Mutex<ProcessState>,
    exit: watch::Sender<Option<Exit>>,
}

impl<S: Sandbox> Process<S> {
    /// One that has not been started.
    pub fn new(of: Of, names: Names, handle: Option<S::Process>, pid: u32) -> Arc<Self> {
        Arc::new(Self {
            of,
            names,
            handle,
            state: Mutex::new(ProcessState {
                pid,
                running: false,
            }),
            exit: watch::Sender::new(None),
        })
    }

    /// What changes.
    pub fn state(&self) -> MutexGuard<'_, ProcessState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records its end; the first one counts.
    pub fn ended(&self, exit: Exit) -> bool {
        self.exit.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(exit);
            first
        })
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.ok().and_then(|e| *e)
    }
}

/// A container.
#[derive(Debug)]
pub struct Container<S: Sandbox> {
    /// containerd's directory for it.
    pub bundle: String,
    /// Its first process.
    pub init: Arc<Process<S>>,
    execs: Mutex<HashMap<String, Arc<Process<S>>>>,
    paused: Mutex<bool>,
}

impl<S: Sandbox> Container<S> {
    /// With its first process.
    pub fn new(bundle: String, init: Arc<Process<S>>) -> Arc<Self> {
        Arc::new(Self {
            bundle,
            init,
            execs: Mutex::default(),
            paused: Mutex::default(),
        })
    }

    /// Its other processes.
    pub fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process<S>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is frozen.
    pub fn paused(&self) -> MutexGuard<'_, bool> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of its processes.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn process(&self, exec: &str) -> Answer<Arc<Process<S>>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec).cloned().ok_or_else(|| {
            let shown: String = exec.chars().take(100).collect();
            Status::new(
                Code::NotFound,
                format!(
                    "container {} has no process {shown:?}",
                    self.init.of.container
                ),
            )
        })
    }

    /// Where a process stands.
    pub fn status(&self, process: &Process<S>) -> ProcessStatus {
        let running = process.state().running;
        match (process.exit(), running) {
            (Some(_), _) => ProcessStatus::Stopped,
            (None, false) => ProcessStatus::Created,
            (None, true) if *self.paused() => ProcessStatus::Paused,
            (None, true) => ProcessStatus::Running,
        }
    }
}

/// A container's place in its pod.
#[derive(Debug)]
pub enum Slot<S: Sandbox> {
    /// Being made.
    Reserved,
    /// Made.
    Container(Arc<Container<S>>),
}

impl<S: Sandbox> Slot<S> {
    /// A container of an earlier process of ours.
    pub fn ended(id: &str) -> Self {
        let of = Of {
            container: id.to_owned(),
            exec: String::new(),
        };
        let init = Process::new(of, Names::default(), None, 0);
        let slot = Self::Container(Container::new(String::new(), init));
        slot.sandbox_ended();
        slot
    }

    /// Its sandbox has gone: so have all its processes.
    pub fn sandbox_ended(&self) {
        let Self::Container(container) = self else {
            return;
        };
        let exit = Exit {
            status: KILLED,
            at: now(),
        };
        container.init.ended(exit);
        for process in container.execs().values() {
            process.ended(exit);
        }
    }
}
