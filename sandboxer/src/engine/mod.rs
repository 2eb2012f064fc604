//! Sandboxes and where they run.
//!
//! [`Sandbox`] is all that the rest needs of one: it does not tell whether the VM's threads are
//! in this process ([`microvm::MicroVm`]) or in another ([`crate::debug::Remote`]). What happens
//! inside of a sandbox (containers, processes, streams) goes through [`agent::Agent`], on top of
//! [`Sandbox::connect`].

pub mod agent;
pub mod console;
pub mod container;
pub mod microvm;
pub mod stdio;

use std::fmt::Debug;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// A running sandbox. All calls block; none waits for a program in the sandbox.
pub trait Sandbox: Debug + Send + Sync {
    /// Id.
    fn id(&self) -> String;

    /// Configuration, memory map, devices and queues.
    ///
    /// # Errors
    /// The sandbox has ended.
    fn inspect(&self) -> Result<Value, EngineError>;

    /// Counters as of now.
    ///
    /// # Errors
    /// The sandbox has ended.
    fn stats(&self) -> Result<Value, EngineError>;

    /// Registers of each vCPU.
    ///
    /// # Errors
    /// The sandbox has ended, or has no vCPUs.
    fn registers(&self) -> Result<Value, EngineError>;

    /// Stops time in the sandbox.
    ///
    /// # Errors
    /// It is paused already, or has ended.
    fn pause(&self) -> Result<(), EngineError>;

    /// Lets it go on.
    ///
    /// # Errors
    /// It is not paused.
    fn resume(&self) -> Result<(), EngineError>;

    /// Writes memory and registers to an ELF core.
    ///
    /// # Errors
    /// The file cannot be written.
    fn dump(&self, path: &Path) -> Result<(), EngineError>;

    /// Ends it: asks the program with SIGTERM (nothing is asked of a bare kernel), ends it for
    /// good after `grace`. Returns once that is under way.
    ///
    /// # Errors
    /// The sandbox has ended.
    fn stop(&self, grace: Duration) -> Result<(), EngineError>;

    /// Connects to a vsock port of the guest.
    ///
    /// # Errors
    /// Nothing listens there, or the sandbox has ended.
    fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, EngineError>;

    /// The guest's console: what it wrote last, then what it writes; what is written to the
    /// stream is typed on it.
    ///
    /// # Errors
    /// The sandbox has ended or too many are attached.
    fn console(&self) -> Result<UnixStream, EngineError>;
}

/// Why a sandbox does not do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Kernel or guest image are not where they are looked for.
    #[error("{what}: not found in {looked}; give --{flag} FILE or set {variable}")]
    NoGuest {
        /// `guest kernel` or `guest image`.
        what: &'static str,
        /// Where it was looked for.
        looked: String,
        /// Option that names it.
        flag: &'static str,
        /// Environment variable that names it.
        variable: &'static str,
    },
    /// The VM cannot be made or driven.
    #[error(transparent)]
    Vm(#[from] bulkhead_vmm::VmError),
    /// The guest ended when it should not have.
    #[error("guest ended while {during}: {reason}{console}{remedy}")]
    GuestEnded {
        /// What was going on.
        during: &'static str,
        /// Why it ended.
        reason: String,
        /// Last line of its console, if it helps.
        console: String,
        /// What to do about it, if that is known.
        remedy: &'static str,
    },
    /// The guest does not answer.
    #[error(
        "guest gives no answer within {seconds} s while {during}{console}; look at its console with vmmctl -vv run, or give it more time with BULKHEAD_TIMEOUT_FACTOR"
    )]
    GuestHangs {
        /// What was going on.
        during: &'static str,
        /// How long it was given.
        seconds: u64,
        /// Last line of its console, if it helps.
        console: String,
    },
    /// The agent speaks another protocol.
    #[error(
        "guest image: its agent speaks protocol version {found}, this program {wanted}; take the guest image of the same release"
    )]
    Protocol {
        /// Version of the agent.
        found: u32,
        /// Ours.
        wanted: u32,
    },
    /// The agent refused a call.
    #[error("{what}: {}", short(source))]
    Agent {
        /// What was asked for.
        what: String,
        /// Its answer.
        #[source]
        source: bulkhead_protocol::client::RpcError,
    },
    /// The program cannot be executed.
    #[error("{command}: {reason}")]
    Program {
        /// The program.
        command: String,
        /// Why not.
        reason: String,
        /// There is none of that name.
        missing: bool,
    },
    /// A volume cannot be given to the guest.
    #[error("volume {}: {reason}", path.display())]
    Volume {
        /// Path on the host.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// The owner of the sandbox answered with an error.
    #[error("{message}")]
    Remote {
        /// Its kind.
        kind: String,
        /// Its message.
        message: String,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// What the agent says, without the name of the call and the code, which `-v` shows.
fn short(error: &bulkhead_protocol::client::RpcError) -> String {
    match error {
        bulkhead_protocol::client::RpcError::Status { status, .. } => status.message.clone(),
        other => other.to_string(),
    }
}

impl EngineError {
    /// A word for programs, stable across versions.
    pub fn kind(&self) -> &str {
        use bulkhead_vmm::ErrorClass;
        match self {
            Self::NoGuest { .. } => "guest_files",
            Self::Vm(e) => match e.class() {
                ErrorClass::Config => "vm_config",
                ErrorClass::Image => "vm_file",
                ErrorClass::Kvm => "kvm",
                ErrorClass::Host => "host",
                ErrorClass::Guest => "guest",
            },
            Self::GuestEnded { .. } => "guest_ended",
            Self::GuestHangs { .. } => "guest_hangs",
            Self::Protocol { .. } => "agent_version",
            Self::Agent { .. } => "agent",
            Self::Program { missing: true, .. } => "program_not_found",
            Self::Program { .. } => "program_not_executable",
            Self::Volume { .. } => "volume",
            Self::Remote { kind, .. } => kind,
            Self::Io { .. } => "io",
        }
    }

    /// Wraps a failed host call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
