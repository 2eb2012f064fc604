//! What a kind of sandboxes is to the daemon: two traits, implemented once for each kind.
//!
//! The front ([`super::controller`], [`super::pod`], [`super::task`]) knows containerd: ids,
//! records, limits, events, what is asked for twice, what is left after a crash. A kind knows how
//! its sandboxes run, and nothing of containerd's rules. A [`Kind`] makes [`Sandbox`]es; a sandbox
//! makes processes, which the front hands back to it with every call about them.

use std::fmt::{self, Debug};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::rpc::Status;
use bulkhead_protocol::task::{
    CreateTaskRequest, ExecProcessRequest, KillRequest, PidsResponse, ResizePtyRequest,
    UpdateTaskRequest,
};
use bulkhead_protocol::types::Timestamp;

use super::events::Events;
use super::proto::PodSandboxConfig;
use super::state::State;
use super::streaming::Streams;

/// Exit status of what ended with its sandbox, as if killed.
pub const KILLED: u32 = 137;

/// What containerd is answered.
pub type Answer<T> = Result<T, Status>;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

/// Which process: of which container, and which of its Execs; empty: its first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Of {
    /// The container.
    pub container: String,
    /// The Exec.
    pub exec: String,
}

impl Of {
    /// Whether it is the container's own process.
    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }
}

/// An end that nobody has asked for.
#[derive(Debug, Clone, Default)]
pub struct OwnEnd {
    /// Why, in a line.
    pub reason: String,
    /// What the log should hold besides, if anything; several lines.
    pub details: String,
}

/// Ends a pod when somebody else than containerd asks for it.
#[derive(Clone)]
pub struct Stop(pub Arc<dyn Fn(Duration) + Send + Sync>);

impl Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stop")
    }
}

/// What a sandbox is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Id of the pod.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's directory, which is there.
    pub dir: PathBuf,
    /// Network namespace; empty: none.
    pub netns: String,
    /// What CRI says about the pod.
    pub wish: Arc<PodSandboxConfig>,
    /// Standard streams that containerd has opened.
    pub streams: Arc<Streams>,
    /// For events that only the sandbox knows of.
    pub events: Events,
    /// For those who stop it by other ways.
    pub stop: Stop,
}

/// A figure for Prometheus. Names of counters end with `_total`.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Name with unit.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Which of several of the name.
    pub label: Option<(&'static str, &'static str)>,
    /// The value.
    pub value: f64,
}

impl Figure {
    /// What goes up and down.
    pub fn gauge(name: &'static str, help: &'static str, value: f64) -> Self {
        debug_assert!(!name.ends_with("_total"), "{name}");
        Self {
            name,
            help,
            label: None,
            value,
        }
    }

    /// What only grows.
    pub fn counter(name: &'static str, help: &'static str, value: f64) -> Self {
        debug_assert!(name.ends_with("_total"), "{name}");
        Self {
            name,
            help,
            label: None,
            value,
        }
    }

    /// Prometheus' word for what it is.
    pub fn kind(&self) -> &'static str {
        match self.name.ends_with("_total") {
            true => "counter",
            false => "gauge",
        }
    }
}

/// One kind of sandboxes.
pub trait Kind: Debug + Send + Sync + 'static {
    /// A running one.
    type Sandbox: Sandbox;

    /// Name of the runtime.
    fn name(&self) -> &'static str;

    /// Where its pods' directories are.
    fn directory(&self) -> PathBuf;

    /// Most pods of one daemon.
    fn max_pods(&self) -> usize;

    /// Refuses what no sandbox of this kind can be, with the reason and what to do.
    ///
    /// # Errors
    /// The reason.
    fn check(&self, wish: &PodSandboxConfig) -> Result<(), String>;

    /// Makes a sandbox that is ready for containers. When that fails, nothing is left of it but
    /// its directory.
    fn start(&self, plan: Plan) -> impl Future<Output = Answer<Self::Sandbox>> + Send;

    /// Takes away what a sandbox of an earlier process has left outside of its directory. Blocks.
    fn clean(&self, state: &State);
}

/// A running sandbox. Calls about a process get what `create` or `exec` gave for it.
pub trait Sandbox: Debug + Send + Sync + 'static {
    /// What it keeps of a process.
    type Process: Debug + Send + Sync + 'static;

    /// Resolves once it has ended by itself; maybe also when it was asked to.
    fn ended(&self) -> impl Future<Output = OwnEnd> + Send;

    /// Asks what runs in it to end, and waits for that, but not much longer than `grace`.
    fn shut_down(&self, grace: Duration) -> impl Future<Output = ()> + Send;

    /// Ends it, and takes away all that it has on the host but its directory. Doing it again does
    /// nothing. Blocks.
    fn take_down(&self);

    /// What it says of itself, for a verbose Status.
    fn info(&self) -> Option<String>;

    /// What this kind alone can tell of itself. Does not block.
    fn figures(&self) -> Vec<Figure>;

    /// Makes a container and its first process, and gives the process's id. When that fails,
    /// [`Self::discard`] follows.
    fn create(
        &self,
        request: &CreateTaskRequest,
    ) -> impl Future<Output = Answer<(Self::Process, u32)>> + Send;

    /// Removes a container's files. Blocks.
    fn discard(&self, container: &str);

    /// Adds a process to a container.
    fn exec(
        &self,
        request: &ExecProcessRequest,
    ) -> impl Future<Output = Answer<Self::Process>> + Send;

    /// Starts a process and gives its id.
    fn start(&self, process: &Self::Process, of: &Of) -> impl Future<Output = Answer<u32>> + Send;

    /// Waits for the end of a process and until its output has been passed on. `None`: nobody
    /// knows, as the sandbox has ended or the process was deleted.
    fn wait(&self, process: &Self::Process, of: &Of) -> impl Future<Output = Option<Exit>> + Send;

    /// Deletes a process that has ended or never started; ends it before, if need be.
    fn delete(&self, process: &Self::Process, of: &Of) -> impl Future<Output = Answer<()>> + Send;

    /// Sends a signal.
    fn kill(
        &self,
        process: &Self::Process,
        request: &KillRequest,
    ) -> impl Future<Output = Answer<()>> + Send;

    /// Sets the size of a terminal.
    fn resize(
        &self,
        process: &Self::Process,
        request: &ResizePtyRequest,
    ) -> impl Future<Output = Answer<()>> + Send;

    /// Ends standard input behind all that has been written.
    fn close_stdin(&self, process: &Self::Process) -> impl Future<Output = ()> + Send;

    /// The processes of a container.
    fn pids(&self, container: &str) -> impl Future<Output = Answer<PidsResponse>> + Send;

    /// Freezes a container.
    fn pause(&self, container: &str) -> impl Future<Output = Answer<()>> + Send;

    /// Lets it go on.
    fn resume(&self, container: &str) -> impl Future<Output = Answer<()>> + Send;

    /// Changes a container's limits.
    fn update(&self, request: UpdateTaskRequest) -> impl Future<Output = Answer<()>> + Send;

    /// What a container uses.
    fn stats(&self, container: &str) -> impl Future<Output = Answer<Metrics>> + Send;
}
