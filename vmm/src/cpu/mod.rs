//! Virtual CPUs: their identity, initial state, threads and saved state.

pub(crate) mod cpuid;
pub(crate) mod regs;
pub mod state;
pub(crate) mod thread;

pub use state::VcpuState;
