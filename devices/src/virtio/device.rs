//! What every virtio device implements, and what it is given.

use std::any::Any;
use std::sync::Arc;

use event_manager::{EventOps, EventSet};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::GuestMemory;

/// Everything a device gets when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub mem: GuestMemory,
    /// All queues of the device in index order, validated by the transport. A queue the driver
    /// left unconfigured is present with `ready() == false`.
    pub queues: Vec<Queue>,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    /// Features both sides agreed on.
    pub features: u64,
}

impl Activation {
    /// Refuses a transport that gave another number of queues than the device has.
    pub(crate) fn expect_queues(
        &self,
        device: &'static str,
        wanted: usize,
    ) -> Result<(), DeviceError> {
        if self.queues.len() == wanted {
            return Ok(());
        }
        Err(DeviceError::BadSetup {
            device,
            reason: format!("{} queues instead of {wanted}", self.queues.len()),
        })
    }
}

/// Why a device cannot be activated or used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver set the device up in a way it cannot work in.
    #[error("{device}: the driver's set-up is unusable: {reason}")]
    BadSetup {
        /// Device name.
        device: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A host resource is missing.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Device name.
        device: &'static str,
        /// What was attempted, on which object.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// Why saved state cannot be taken back.
#[derive(Debug, thiserror::Error)]
#[error("{device}: saved state does not fit: {reason}")]
pub struct StateError {
    /// Device name.
    pub device: &'static str,
    /// What does not fit.
    pub reason: String,
}

/// One virtio device, independent of the transport.
///
/// Threads: `activate`, `deactivate`, `read_config` and `write_config` are called from vCPU
/// threads, `on_activated`, `handle_queue` and `handle_event` from the device's event loop
/// thread; the transport serialises all of them with one lock per device.
///
/// `Any` lets the owner of a transport reach a device's own methods:
/// `transport.with_device(|d| (d as &mut dyn Any).downcast_mut::<Blk>().map(…))`.
pub trait VirtioDevice: Any + Send {
    /// Short name for logs and `inspect`: `blk`, `vsock`, …
    fn name(&self) -> &'static str;
    /// Device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];
    /// Features offered, without those of the transport (`VERSION_1`, `RING_EVENT_IDX` and
    /// `RING_INDIRECT_DESC` are added by the transport).
    fn features(&self) -> u64;
    /// Reads the device's configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's configuration space; writes that make no sense are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: take over the queues.
    ///
    /// # Errors
    /// The transport then sets `DEVICE_NEEDS_RESET`; the device must stay reusable.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// First call on the event loop after `activate`: register own descriptors with `ops`, using
    /// `Events::with_data(fd, token, set)` where `token < TOKEN_LIMIT`.
    fn on_activated(&mut self, _ops: &mut EventOps) {}
    /// The driver notified queue `index` (or the VM resumes and queues may have work).
    fn handle_queue(&mut self, index: u16, ops: &mut EventOps);
    /// A descriptor the device registered is ready.
    fn handle_event(&mut self, _token: u32, _set: EventSet, _ops: &mut EventOps) {}
    /// The driver resets the device: stop all work and give the queues back. Descriptors must be
    /// unregistered in `on_deactivated`, the next call on the event loop.
    fn deactivate(&mut self) -> Vec<Queue>;
    /// On the event loop after `deactivate`: unregister own descriptors.
    fn on_deactivated(&mut self, _ops: &mut EventOps) {}
    /// Read-only view of the queues while active (for `inspect` and `save`).
    fn queues(&self) -> &[Queue];
    /// The device's own state as versioned, serialisable data; queues, features and status are
    /// saved by the transport. Called while the VM is paused and no request is in flight.
    fn save(&self) -> serde_json::Value;
    /// Takes back what `save` gave, before activation.
    ///
    /// # Errors
    /// When the state is of another version or makes no sense for this device.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError>;
    /// Once, before anything else: the eventfds the driver's notifications arrive at, one per
    /// queue. A device that stops early to let others have their turn writes to its own.
    fn set_queue_events(&mut self, _events: Arc<[EventFd]>) {}
    /// True if, since `on_activated`, the host kernel reads the queues' eventfds itself (vhost):
    /// the event loop then leaves them alone until the device is deactivated.
    fn kernel_reads_queue_events(&self) -> bool {
        false
    }
    /// Before `save`: stop whatever works on the queues outside the event loop and bring `queues`
    /// up to date.
    fn quiesce(&mut self) {}
    /// When the VM resumes: take up again what `quiesce` stopped.
    fn resume(&mut self) {}
    /// Counters for `inspect` and metrics: requests, bytes, errors.
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// Tokens at and above this value belong to the transport.
pub const TOKEN_LIMIT: u32 = 0x8000_0000;
