//! Pods that outlive the daemon.
//!
//! With `isolation = "process"` a pod has a *keeper*: a process with the daemon's code for one pod
//! ([`process`]). It takes containerd's Task calls at the pod's address, has its standard streams,
//! makes its mounts, and starts the jailed process of its VM ([`super::worker`]) or of its wasm
//! programs ([`super::wasm::jailed`]). It is trusted as the daemon is, and no code that a guest's
//! memory reaches runs in it.
//!
//! The daemon starts keepers and passes containerd's calls about sandboxes on to them ([`Keepers`]),
//! by ttrpc on a socket in the pod's directory. When the daemon dies, keepers and pods go on; the
//! next one finds them by the lock that each holds. When a keeper dies its pod ends, and the daemon
//! answers for it as for any that has ended.

mod pods;
pub mod process;

pub use pods::{Keepers, KeptEndpoint};

use super::config::{Config, Isolation};
use super::vm::Guests;

/// Kinds of pods that can have keepers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// VMs.
    Vm(Guests),
    /// Programs of wasm.
    Wasm,
}

impl Kept {
    /// All of them.
    const ALL: [Self; 3] = [Self::Vm(Guests::Linux), Self::Vm(Guests::App), Self::Wasm];

    /// What a keeper is told.
    fn shown(self) -> &'static str {
        match self {
            Self::Vm(guests) => guests.shown(),
            Self::Wasm => "wasm",
        }
    }

    /// What is configured for them.
    fn isolation(self, config: &Config) -> Isolation {
        match self {
            Self::Vm(guests) => guests.isolation(config),
            Self::Wasm => config.wasm.isolation,
        }
    }
}

/// How the program is told that it is to be a keeper.
pub const ARGUMENT: &str = "--bulkhead-keeper";
/// In a pod's directory: held as long as its keeper lives.
const LOCK: &str = "keeper.lock";
/// In a pod's directory: where its keeper answers. A short name, as a socket's path has 107 bytes, and
/// another than the agent's of ordinary containers.
const SOCKET: &str = "kpr.sock";
/// A call that is answered by the keeper's end alone.
const LIFE: &str = "Life";
/// What a keeper says once it answers.
const READY: &str = "ready";
