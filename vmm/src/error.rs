//! What can go wrong with a VM, in words a person can act on.

use std::io;
use std::path::PathBuf;

use bulkhead_devices::virtio::blk::DiskError;
use bulkhead_devices::virtio::net::TapError;
use bulkhead_devices::virtio::{DeviceError, StateError};

/// Where an error comes from; callers map it to exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The configuration asks for something impossible.
    Config,
    /// A file (kernel, initramfs, disk) is missing or not what it should be.
    Image,
    /// `/dev/kvm` is missing, closed to us, or not hardware KVM.
    Kvm,
    /// The host lacks memory, descriptors or another resource.
    Host,
    /// The guest or the VM's own state is at fault.
    Guest,
}

/// Why a VM cannot be built or driven.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A configuration value is out of range.
    #[error("{what}: {reason}")]
    Config {
        /// The option.
        what: &'static str,
        /// Why it cannot be, and what can.
        reason: String,
    },
    /// A file cannot be opened or read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What the file is for: kernel, initramfs, disk.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A file is not of the kind it should be.
    #[error("{what} {}: {reason}", path.display())]
    BadFile {
        /// What the file is for.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, and what would do.
        reason: String,
    },
    /// KVM is not there, or is not what we need.
    #[error("{0}")]
    Kvm(String),
    /// A KVM call failed.
    #[error("KVM: {call} failed: {source}")]
    KvmCall {
        /// The ioctl.
        call: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The host does not give what is needed.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted, on which object.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// Guest memory cannot be accessed where a boot structure must be.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Saved state does not fit.
    #[error("restore: {0}")]
    State(String),
    /// The VM has ended or is in a state in which this makes no sense.
    #[error("{0}")]
    NotRunning(String),
}

impl From<StateError> for VmError {
    fn from(error: StateError) -> Self {
        Self::State(error.to_string())
    }
}

impl VmError {
    /// The class of this error.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Config { .. } => ErrorClass::Config,
            Self::File { .. } | Self::BadFile { .. } | Self::Disk(_) => ErrorClass::Image,
            Self::Kvm(_) => ErrorClass::Kvm,
            Self::KvmCall { .. } | Self::Host { .. } | Self::Device(_) | Self::Tap(_) => {
                ErrorClass::Host
            }
            Self::Memory(_) | Self::State(_) | Self::NotRunning(_) => ErrorClass::Guest,
        }
    }

    /// Wraps a failed KVM call.
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::KvmCall {
            call,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }

    /// Wraps a failed host call.
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}
