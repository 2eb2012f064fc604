//! Where the programs of a pod run, as the rest of this module sees it: on threads of this process
//! ([`super::threads`]), or in a jailed process of the pod ([`super::jailed`]).

use std::fmt::Debug;
use std::fs::File;
use std::time::Duration;

use bulkhead_wasm::{Source, Stats, Status, Stdio};
use serde::{Deserialize, Serialize};

use crate::daemon::cgroup::Used;
use crate::daemon::config::Config;
use crate::daemon::sandbox::{Answer, OwnEnd, Plan};
use crate::daemon::state::State;

/// How long programs have to end once they are killed.
pub const END_TIME: Duration = Duration::from_secs(5);
/// In the pod's directory: containers' files, each by a number.
pub const ROOTS: &str = "rootfs";

/// The network of a pod.
#[derive(Debug)]
pub enum Net {
    /// None.
    None,
    /// The host's.
    Host,
    /// This namespace.
    Namespace(File),
}

/// What a pod is made of, besides its plan.
#[derive(Debug)]
pub struct PodWish {
    /// Its network.
    pub net: Net,
    /// Its `resolv.conf`.
    pub resolv: String,
    /// Memory of all its programs together, in bytes.
    pub memory_bytes: Option<u64>,
}

/// A user of the container's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserWish {
    /// Number.
    pub uid: u32,
    /// Number of its main group.
    pub gid: u32,
    /// Of its others.
    pub groups: Vec<u32>,
}

/// What a program is started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramWish {
    /// The container's id, for messages.
    pub id: String,
    /// Its files: a name in [`ROOTS`].
    pub root: String,
    /// Which function; `None`: the usual one.
    pub function: Option<String>,
    /// Arguments, the program's name first.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// As whom it has files; `None`: root.
    pub user: Option<UserWish>,
    /// Most memory in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU share in thousandths.
    pub cpu_milli: Option<u32>,
}

/// How a program has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Exit code, or 128 + signal.
    pub code: u8,
    /// For lack of memory.
    pub out_of_memory: bool,
    /// For people: one line, then the program's stack where there is one.
    pub message: Option<String>,
}

/// Where pods' programs run.
pub trait Place: Debug + Send + Sync + 'static {
    /// The programs of one pod.
    type Programs: Programs;

    /// Makes room for a pod. Blocks.
    ///
    /// # Errors
    /// The host refuses something; nothing is left.
    fn open(&self, config: &Config, plan: &Plan, wish: PodWish) -> Answer<Self::Programs>;

    /// Takes away what a pod of an earlier process has left. Blocks.
    fn clean(&self, state: &State);
}

/// The programs of one pod.
pub trait Programs: Debug + Send + Sync + 'static {
    /// A program that can be started.
    type Code: Debug + Send + 'static;
    /// One in a container.
    type Program: Program;

    /// What was made ready before, by the digest of its bytes. Blocks.
    fn find(&self, name: &str, digest: &str) -> Option<Self::Code>;

    /// Makes a program ready. Blocks, for long if it has to be compiled.
    ///
    /// # Errors
    /// For people.
    fn load(&self, source: Source<'_>) -> Result<Self::Code, String>;

    /// Prepares a container whose files are mounted. `streams`: standard input, output, error.
    fn create(
        &self,
        code: Self::Code,
        wish: ProgramWish,
        streams: [Stdio; 3],
    ) -> impl Future<Output = Answer<Self::Program>> + Send;

    /// The process that they run in.
    fn pid(&self) -> u32;

    /// Begins to notice its end. On a runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    fn watch(&self) -> std::io::Result<()>;

    /// Resolves when what they run in has ended by itself.
    fn ended(&self) -> impl Future<Output = OwnEnd> + Send;

    /// CPU time of all of them.
    fn used(&self) -> Option<Used>;

    /// What there is to say, for a verbose Status.
    fn info(&self) -> Option<String>;

    /// Ends these, which are all there are, and lets none be started any more. Blocks.
    fn take_down(&self, programs: Vec<Self::Program>);
}

/// A program in a container.
pub trait Program: Clone + Debug + Send + Sync + 'static {
    /// Where it is in its life.
    fn status(&self) -> Status;

    /// Starts it.
    fn start(&self) -> impl Future<Output = Answer<()>> + Send;

    /// Does what a signal does to a process without handlers.
    ///
    /// # Errors
    /// It is not running.
    fn signal(&self, signal: i32) -> Answer<()>;

    /// Waits for its end.
    fn ended(&self) -> impl Future<Output = Ended> + Send;

    /// Changes its memory limit, in bytes.
    ///
    /// # Errors
    /// What it runs in has ended.
    fn set_memory_limit(&self, bytes: Option<u64>) -> Answer<()>;

    /// Changes its CPU share, in thousandths.
    ///
    /// # Errors
    /// What it runs in has ended.
    fn set_cpu_share(&self, milli: Option<u32>) -> Answer<()>;

    /// What it uses.
    fn stats(&self) -> impl Future<Output = Answer<Stats>> + Send;
}
