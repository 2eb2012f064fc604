//! One virtual machine on KVM, as a library.
//!
//! A [`Vm`] is built from a [`VmConfig`], runs on threads of the calling process (one per vCPU,
//! one for its devices, one more if it shares directories) and ends with a [`VmExit`].
//!
//! ```no_run
//! use bulkhead_vmm::{Vm, VmConfig};
//!
//! # fn main() -> Result<(), bulkhead_vmm::VmError> {
//! let vm = Vm::create(VmConfig {
//!     kernel: "vmlinux".into(),
//!     memory_mib: 128,
//!     ..VmConfig::default()
//! })?;
//! vm.start()?;
//! println!("{:?}", vm.wait());
//! # Ok(())
//! # }
//! ```

pub mod boot;
mod bus;
pub mod config;
pub mod cpu;
mod dump;
pub mod error;
pub mod gdb;
pub mod kvm_check;
pub mod layout;
pub mod memory;
mod room;
pub mod seccomp;
pub mod snapshot;
pub mod stats;
mod steps;
mod template;
mod vm;
mod wiring;

pub use bulkhead_devices::virtio::vsock::Connecting;
pub use config::{
    Caching, Console, DiskConfig, DiskSource, NetConfig, ShareConfig, UPPER_PREFIX, VmConfig,
    joined_layout,
};
pub use error::{ErrorClass, VmError};
pub use kvm_check::{KvmKind, KvmReport, Probe, kvm_check};
pub use snapshot::VmState;
pub use stats::{Timeline, VmStats};
pub use template::Template;
pub use vm::{Vm, VmExit};
